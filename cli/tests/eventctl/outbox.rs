//! `outbox`: what waits, what is stuck, and how it is freed.

use eventbus::{Envelope, Topic};
use outbox::{AnyOutbox, Options, Outbox};
use serde_json::Value;

use crate::shell::{Shell, text};

/// Events in an outbox beside the bus, in its file: two of a key whose topic has a name that no bus takes, and one that goes.
async fn furnish(url: &str) -> AnyOutbox {
    // The bus makes the file.
    let bus = eventbus::connect(url).await.unwrap();
    bus.close().await.unwrap();
    let any = AnyOutbox::open(url, Options::default()).await.unwrap();
    let AnyOutbox::Sqlite(outbox) = &any else { panic!("not a file") };
    outbox.migrate().await.unwrap();
    any
}

async fn publish(outbox: &AnyOutbox, key: &str, body: &'static str) {
    let event = Envelope::new("shop.order.placed", "/shop").with_key(key).with_payload(body);
    outbox.publish(vec![(Topic::new("orders").unwrap(), event)]).await.unwrap();
}

/// The file as a row that is no event: its head was written by hand.
async fn spoil(outbox: &AnyOutbox) {
    let AnyOutbox::Sqlite(outbox) = outbox else { panic!("not a file") };
    spoil_in(outbox).await;
}

async fn spoil_in(outbox: &Outbox<sqlx::Sqlite>) {
    let sql = "UPDATE evt_outbox SET head = '{}' WHERE id = (SELECT min(id) FROM evt_outbox)";
    sqlx::query(sql).execute(outbox.pool()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_is_seen_and_freed() {
    let shell = Shell::new();
    let outbox = furnish(&shell.url("a")).await;
    let status = shell.lines(&["outbox", "status"]);
    assert_eq!((&status[0]["pending"], &status[0]["unowned_shards"]), (&0.into(), &64.into()));
    publish(&outbox, "bad", "1").await;
    publish(&outbox, "bad", "2").await;
    publish(&outbox, "7", "{\"n\":3}").await;
    let waits = shell.run(&["outbox", "status"]);
    assert_eq!(waits.status.code(), Some(7), "events wait and nobody publishes them");
    assert!(text(&waits.stderr).contains("no relay"), "{}", text(&waits.stderr));
    let listed = shell.lines(&["outbox", "list"]);
    let ids: Vec<i64> = listed.iter().map(|row| row["id"].as_i64().unwrap()).collect();
    assert_eq!((listed.len(), &listed[2]["key"], &listed[2]["error"]), (3, &"7".into(), &Value::Null));
    let shown = shell.run(&["outbox", "show", &ids[2].to_string(), "-o", "json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!((&shown["body"], &shown["head"]["type"]), (&"{\"n\":3}".into(), &"shop.order.placed".into()));

    spoil(&outbox).await;
    let relayed = shell.run(&["outbox", "relay", "--once"]);
    assert_eq!(relayed.status.code(), Some(3), "{}", text(&relayed.stderr));
    assert!(text(&relayed.stderr).contains("2 events wait"), "{}", text(&relayed.stderr));
    assert_eq!(shell.lines(&["tail", "orders"]).len(), 1);
    let stuck = shell.run(&["outbox", "stuck", "-o", "jsonl"]);
    assert_eq!(stuck.status.code(), Some(7));
    let stuck: Value = serde_json::from_slice(&stuck.stdout).unwrap();
    assert_eq!(
        (&stuck["waiting"], &stuck["head"], &stuck["key"]),
        (&2.into(), &ids[0].into(), &"bad".into())
    );
    assert_eq!(shell.lines(&["outbox", "list", "--state", "blocked"]).len(), 2);

    // Set aside, the rest goes; nothing is removed without its name.
    let bad = ids[0].to_string();
    assert_eq!(shell.run(&["outbox", "skip", &bad, "--confirm", &bad]).status.code(), Some(4), "it waits");
    shell.ok(&["outbox", "park", &bad, "--reason", "no head"]);
    assert_eq!(shell.run(&["outbox", "park", &bad]).status.code(), Some(4));
    assert_eq!(shell.lines(&["outbox", "list", "--state", "parked"])[0]["error"], "no head");
    shell.ok(&["outbox", "relay", "--once"]);
    assert_eq!(shell.lines(&["tail", "orders"]).len(), 2);
    assert_eq!(shell.run(&["outbox", "skip", &bad]).status.code(), Some(5));
    let dry = shell.run(&["outbox", "unpark", &bad, "--dry-run"]);
    assert!(dry.status.success() && shell.lines(&["outbox", "list"]).is_empty());
    shell.ok(&["outbox", "skip", &bad, "--confirm", &bad]);
    assert!(shell.lines(&["outbox", "list", "--state", "parked"]).is_empty());
    assert!(shell.run(&["outbox", "status"]).status.success());
    assert_eq!(shell.run(&["outbox", "release", "nobody"]).status.code(), Some(4));
    shell.ok(&["outbox", "retry"]);
    assert!(shell.lines(&["outbox", "blockers"]).is_empty());
}

#[test]
fn an_outbox_that_is_not_there_is_told() {
    let shell = Shell::new();
    let told = |arguments: &[&str]| {
        let output = shell.run(arguments);
        (output.status.code(), text(&output.stderr))
    };
    let (code, said) = told(&["outbox", "--store", "mysql://a:secret@b/c", "status"]);
    assert!(code == Some(2) && said.contains("postgres://") && !said.contains("secret"), "{code:?} {said}");
    let (code, said) = told(&["outbox", "--store", "postgres://a:secret@127.0.0.1:1/c", "status"]);
    assert!(code == Some(6) && !said.contains("secret"), "{code:?} {said}");
    let (code, said) = told(&["outbox", "--store", "sqlite:///nowhere/at.db", "status"]);
    assert!(code == Some(2) && said.contains("folder"), "{code:?} {said}");
    let (code, said) = told(&["outbox", "--namespace", "a;b", "--store", "sqlite://x.db", "status"]);
    assert!(code == Some(2) && said.contains("namespace"), "{code:?} {said}");
    // One that is named and would not be looked at; the environment names one for all commands.
    for (arguments, flag) in [
        (&["publish", "t", "x", "--store", "sqlite://x.db"][..], "--via-outbox"),
        (&["audit", "t", "--store", "sqlite://x.db"], "--consumer"),
        (&["audit", "t", "--namespace", "x"], "--consumer"),
    ] {
        let (code, said) = told(arguments);
        assert!(code == Some(2) && said.contains(flag), "{arguments:?}: {code:?} {said}");
    }
    let mut published = shell.command(&["publish", "t", "x", "-c", &shell.url("a")]);
    let published = published.env("EVENTCTL_STORE", "sqlite://nowhere/x.db").output().unwrap();
    assert!(published.status.success(), "{}", text(&published.stderr));
    let (code, said) = told(&["outbox", "status"]);
    assert!(code.is_some_and(|code| code != 0) && said.contains("tables"), "{code:?} {said}");
}
