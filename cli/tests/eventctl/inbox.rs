//! `inbox` and `audit`: what consumers remember, and whether all that an outbox numbered is there, in order, and handled.

use eventbus::{Envelope, Failure, FromState, Meta, Service, Start, State, Topic};
use outbox::{AnyOutbox, Inbox, Options, Outbox, Tx};
use serde_json::Value;
use sqlx::Sqlite;

use crate::shell::{Shell, text};

#[derive(Clone)]
struct Hand(Inbox<Sqlite>);

impl FromState<Hand> for Inbox<Sqlite> {
    fn from_state(hand: &Hand) -> Self {
        hand.0.clone()
    }
}

async fn charge(_: Tx<Sqlite>, Meta(_): Meta, State(_): State<Hand>) -> Result<(), Failure> {
    Ok(())
}

async fn furnish(url: &str) -> Outbox<Sqlite> {
    // The bus makes the file.
    eventbus::connect(url).await.unwrap().close().await.unwrap();
    let AnyOutbox::Sqlite(outbox) = AnyOutbox::open(url, Options::default()).await.unwrap() else {
        panic!("not a file")
    };
    outbox.migrate().await.unwrap();
    outbox
}

fn orders() -> Topic {
    Topic::new("orders").unwrap()
}

async fn publish(outbox: &Outbox<Sqlite>, n: u64) {
    let mut tx = outbox.begin().await.unwrap();
    for n in 0..n {
        let event = Envelope::new("shop.order.placed", "/shop").with_key("7").with_payload(n.to_string());
        tx.publish_envelope(&orders(), event).unwrap();
    }
    tx.commit().await.unwrap();
}

/// Has a service handle everything, each event once.
async fn handle_all(shell: &Shell, outbox: &Outbox<Sqlite>, n: u64) {
    let bus = eventbus::connect(&shell.url("a")).await.unwrap();
    let service = Service::new("billing").start_at(Start::Earliest).on(orders(), charge);
    let running = service.with_state(Hand(Inbox::new(outbox))).start(&bus).await.unwrap();
    let handled = async {
        while shell.lines(&["inbox", "list"]).first().is_none_or(|seen| seen["known"] != n) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), handled).await.unwrap();
    running.stop().await.unwrap();
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_consumers_remember_is_seen_and_forgotten() {
    let shell = Shell::new();
    let outbox = furnish(&shell.url("a")).await;
    assert!(shell.lines(&["inbox", "list"]).is_empty());
    publish(&outbox, 3).await;
    shell.ok(&["outbox", "relay", "--once"]);
    handle_all(&shell, &outbox, 3).await;
    let seen = shell.lines(&["inbox", "list"]).remove(0);
    let name = seen["consumer"].as_str().unwrap();
    assert!(name.starts_with("billing.charge@"), "{name}");
    let of_one = ["inbox", "list", "--consumer", name];
    assert_eq!(shell.lines(&of_one).len(), 3);
    assert_eq!(shell.run(&["inbox", "list", "--consumer", "nobody"]).status.code(), Some(4));

    let audit = ["audit", "orders", "--range", "start:end", "--consumer", name, "-o", "jsonl"];
    let sound = shell.run(&audit);
    assert!(sound.status.success() && sound.stdout.is_empty(), "{}", text(&sound.stderr));
    assert!(text(&sound.stderr).contains("3 events, 3 of them numbered"), "{}", text(&sound.stderr));

    let id = shell.lines(&["tail", "orders", "--full"])[1]["ce"]["id"].as_str().unwrap().to_owned();
    let dry = shell.run(&["inbox", "forget", &id, "--consumer", name, "--dry-run"]);
    assert!(dry.status.success() && shell.lines(&of_one).len() == 3);
    assert_eq!(shell.run(&["inbox", "forget", &id, "--consumer", "nobody"]).status.code(), Some(4));
    shell.ok(&["inbox", "forget", &id, "--consumer", name]);
    assert_eq!(shell.lines(&of_one).len(), 2);
    assert_eq!(shell.run(&["inbox", "forget", &id]).status.code(), Some(2), "of whom must be said");
    let all = ["inbox", "forget", &id, "--all"];
    assert_eq!(shell.run(&all).status.code(), Some(5), "nobody confirmed it");
    let all = [&all[..], &["--confirm", &id]].concat();
    assert_eq!(shell.run(&all).status.code(), Some(4), "nobody remembers it");
    let lost = shell.run(&audit);
    let found: Value = serde_json::from_slice(&lost.stdout).unwrap();
    assert_eq!(
        (lost.status.code(), &found["finding"], &found["id"]),
        (Some(7), &"unhandled".into(), &id.into())
    );
    // As it is listed.
    let listed = shell.lines(&of_one)[0]["event_id"].as_str().unwrap().to_owned();
    shell.ok(&["inbox", "forget", &listed, "--consumer", name]);
    assert_eq!(shell.lines(&of_one).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_tells_repetitions_from_another_order() {
    let shell = Shell::new();
    furnish(&shell.url("a")).await;
    let bus = eventbus::connect(&shell.url("a")).await.unwrap();
    let publisher = bus.transport().publisher().await.unwrap();
    let numbered = |seq: u32| {
        let event = Envelope::new("shop.order.placed", "/shop").with_key("7");
        event.with_extension("evt-source", "there").with_extension("evt-seq", seq.to_string())
    };
    let send =
        async |seq| publisher.enqueue(&orders(), vec![numbered(seq)]).await.unwrap().await.all().unwrap();
    for seq in [3, 5, 3, 9] {
        send(seq).await;
    }
    let audit = || shell.run(&["audit", "orders", "--range", "start:end", "-o", "jsonl"]);
    let repeated = audit();
    assert!(repeated.status.success(), "a repetition is nothing wrong: {}", text(&repeated.stderr));
    assert!(text(&repeated.stdout).contains("\"repeated\""), "{}", text(&repeated.stdout));
    send(8).await;
    let reordered = audit();
    let last: Value = serde_json::from_str(text(&reordered.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(
        (reordered.status.code(), &last["finding"], &last["seq"]),
        (Some(7), &"reordered".into(), &"8".into())
    );
    bus.close().await.unwrap();
    assert_eq!(shell.run(&["audit", "nothing"]).status.code(), Some(4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_set_aside_is_removed_when_it_is_old() {
    let shell = Shell::new();
    let outbox = furnish(&shell.url("a")).await;
    publish(&outbox, 2).await;
    let first = shell.lines(&["outbox", "list"])[0]["id"].to_string();
    shell.ok(&["outbox", "park", &first]);
    let purge = |more: &[&str]| shell.run(&[&["outbox", "purge"], more].concat());
    let n_parked = || shell.lines(&["outbox", "list", "--state", "parked"]).len();
    assert_eq!(purge(&["--execute"]).status.code(), Some(2), "an age must be named");
    let planned = purge(&["--older-than", "0s"]);
    assert!(text(&planned.stderr).contains("1 events") && n_parked() == 1, "{}", text(&planned.stderr));
    for spared in [
        ["--older-than", "1h", "--execute", "--confirm", "parked"].as_slice(),
        &["--older-than", "0s", "--topic", "others", "--execute", "--confirm", "parked"],
    ] {
        assert!(purge(spared).status.success() && n_parked() == 1);
    }
    let all = ["--older-than", "0s", "--topic", "orders", "--execute"];
    assert_eq!((purge(&all).status.code(), n_parked()), (Some(5), 1), "nobody confirmed it");
    assert!(purge(&[&all[..], &["--confirm", "parked"]].concat()).status.success());
    assert_eq!((n_parked(), shell.lines(&["outbox", "list"]).len()), (0, 1), "what waits stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_takes_what_is_published_while_the_bus_is_away() {
    let shell = Shell::new();
    furnish(&shell.url("a")).await;
    let store = shell.url("a");
    let lines = "{\"n\":1}\n{\"n\":2}\n";
    let away = [
        "publish",
        "orders",
        "-",
        "--input",
        "jsonl",
        "-k",
        "7",
        "--via-outbox",
        "--store",
        &store,
        "-c",
        "amqp://127.0.0.1:1",
    ];
    let dry = shell.run_with(&[&away[..], &["--dry-run"]].concat(), lines);
    assert!(dry.status.success() && shell.lines(&["outbox", "list"]).is_empty(), "{}", text(&dry.stderr));
    let published = shell.run_with(&away, lines);
    assert!(published.status.success(), "{}", text(&published.stderr));
    let waiting = shell.lines(&["outbox", "list"]);
    assert_eq!((waiting.len(), &waiting[0]["key"]), (2, &"7".into()));
    let large = shell.run_with(&["publish", "orders", "-", "--via-outbox"], &"x".repeat(2 << 20));
    assert_eq!(large.status.code(), Some(1), "{}", text(&large.stderr));
    assert!(text(&large.stderr).contains("too large"), "{}", text(&large.stderr));
    shell.ok(&["outbox", "relay", "--once"]);
    assert_eq!(shell.lines(&["tail", "orders"]).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_as_protected_as_the_contexts_that_name_it() {
    let shell = Shell::new();
    let store = shell.url("a");
    let outbox = furnish(&store).await;
    publish(&outbox, 1).await;
    let id = shell.lines(&["outbox", "list"])[0]["id"].to_string();
    shell.ok(&["context", "add", "dev", &shell.url("b"), "--use"]);
    shell.ok(&["context", "add", "prod", "amqp://127.0.0.1:1", "--outbox", &store, "--protected"]);
    // Not by its context, but by its address.
    let park = ["outbox", "--store", &store, "park", &id, "--reason", "EVT HEX(1) NOW() it's"];
    let refused = |more: &[&str]| {
        let run =
            shell.command(&[&park[..], more].concat()).stdin(std::process::Stdio::null()).output().unwrap();
        (run.status.code(), text(&run.stderr))
    };
    let (code, said) = refused(&[]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("--confirm prod"), "{said}");
    eventbus::connect(&shell.url("b")).await.unwrap().close().await.unwrap();
    let relay = ["-c", &shell.url("b"), "outbox", "--store", &store, "relay", "--once"];
    let relay = shell.command(&relay).stdin(std::process::Stdio::null()).output().unwrap();
    assert_eq!(relay.status.code(), Some(5), "{}", text(&relay.stderr));
    let (code, said) = refused(&["-c", "prdo"]);
    assert_eq!(code, Some(2), "a name that is mistyped protects nothing: {said}");
    let (code, said) = refused(&["--confirm", "prod"]);
    assert_eq!(code, Some(0), "{said}");
    let parked = shell.lines(&["outbox", "--store", &store, "list", "--state", "parked"]);
    assert_eq!(parked[0]["error"], "EVT HEX(1) NOW() it's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_looks_at_the_outbox_too() {
    let shell = Shell::new();
    let outbox = furnish(&shell.url("a")).await;
    let state = |checks: &[Value], name: &str| {
        let found = checks.iter().find(|check| check["check"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {checks:?}"))["state"].as_str().unwrap().to_owned()
    };
    let sound = shell.lines(&["doctor"]);
    assert!(sound.iter().all(|check| check["state"] == "ok"), "{sound:?}");
    assert_eq!(state(&sound, "outbox: database: integrity"), "ok");
    // Something waits, and nobody publishes it.
    publish(&outbox, 1).await;
    let waits = shell.run(&["doctor", "--fix-hints", "-o", "json"]);
    assert_eq!(waits.status.code(), Some(7), "{}", text(&waits.stderr));
    let checks: Vec<Value> = serde_json::from_slice(&waits.stdout).unwrap();
    assert_eq!(state(&checks, "outbox: relays"), "FAILED");
    shell.ok(&["outbox", "relay", "--once"]);
    assert_eq!(shell.run(&["doctor"]).status.code(), Some(0));
    let missing = shell.run(&["doctor", "--store", &shell.url("none"), "-o", "json"]);
    let checks: Vec<Value> = serde_json::from_slice(&missing.stdout).unwrap();
    assert_eq!((missing.status.code(), state(&checks, "outbox: read").as_str()), (Some(7), "FAILED"));
}
