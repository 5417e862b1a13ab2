//! What machines read is as its schema says: every list with -o json against a checked-in JSON Schema.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use eventbus::{Envelope, Failure, Meta, Service, Topic};
use outbox::{AnyOutbox, Options};
use serde_json::Value;

use crate::shell::Shell;

async fn fails(Meta(event): Meta) -> Result<(), Failure> {
    match event.event_type() {
        "bad" => Err(Failure::permanent("no.stock", "nothing left")),
        _ => Ok(()),
    }
}

/// A bus with what every list can show: a dead letter, a held key, a waiting event, a chain.
async fn furnish(url: &str) {
    let bus = eventbus::connect(url).await.unwrap();
    let topic = Topic::new("orders").unwrap();
    let running = Service::new("billing").on(topic.clone(), fails).with_state(()).start(&bus).await.unwrap();
    let publisher = bus.publisher().await.unwrap();
    let event = |name: &'static str| Envelope::new(name, "/test").with_key("k").with_payload("{\"n\":1}");
    let bad = event("bad").with_header("content-type", "mine").with_header("raw", [0, 255]);
    publisher.publish_envelope(&topic, bad.clone()).await.unwrap();
    let caused = event("good").with_extension("causationid", bad.id().to_string()).with_payload(vec![0, 255]);
    publisher.publish_envelope(&topic, caused).await.unwrap();
    publisher.publish_envelope(&topic, event("good").without_payload()).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while running.counts().held != 1 || running.counts().parked != 3 {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", running.counts());
        tokio::task::yield_now().await;
    }
    running.stop().await.unwrap();
    bus.close().await.unwrap();
}

/// In the same file: an event that waits, a key that is blocked, what two consumers know.
async fn furnish_outbox(url: &str) {
    let AnyOutbox::Sqlite(outbox) = AnyOutbox::open(url, Options::default()).await.unwrap() else {
        panic!("not a file")
    };
    outbox.migrate().await.unwrap();
    let mut tx = outbox.begin().await.unwrap();
    let event = Envelope::new("good", "/test").with_key("k").with_payload("{}");
    tx.publish_envelope(&Topic::new("orders").unwrap(), event).unwrap();
    tx.commit().await.unwrap();
    let rows = "INSERT INTO evt_outbox_blocked SELECT shard, topic, key, id, 1, 1, 1, 'away' FROM evt_outbox;
        INSERT INTO evt_consumer VALUES ('billing.charge@1', 'events', 100), ('billing.count@1', 'sequences', 100);
        INSERT INTO evt_inbox (consumer, message_id) VALUES ('billing.charge@1', randomblob(16));
        INSERT INTO evt_key_progress (consumer, source, key, last_seq) VALUES ('billing.count@1', 'shop/orders', x'6b', 7)";
    sqlx::raw_sql(rows).execute(outbox.pool()).await.unwrap();
    outbox.pool().close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_as_their_schemas_say() {
    let shell = Shell::new();
    furnish(&shell.url("a")).await;
    furnish_outbox(&shell.url("a")).await;
    shell.ok(&["context", "add", "shop", &shell.url("a"), "--use"]);
    let place = shell.lines(&["tail", "orders", "--type", "bad", "-o", "jsonl"])[0]["ref"]
        .as_str()
        .unwrap()
        .to_owned();
    let commands: &[(&str, &[&str])] = &[
        ("topics", &["inspect", "topics", "--internal"]),
        ("topic", &["inspect", "topic", "orders"]),
        ("groups", &["inspect", "groups", "--internal"]),
        ("group", &["inspect", "group", "billing"]),
        ("lag", &["inspect", "lag"]),
        ("chain", &["inspect", "message", &place, "--chain"]),
        ("capabilities", &["capabilities"]),
        ("doctor", &["doctor"]),
        ("contexts", &["context", "list"]),
        ("letters", &["dlq", "list"]),
        ("letter-groups", &["dlq", "list", "--group-by", "type"]),
        ("parked-keys", &["dlq", "list", "--parked-keys"]),
        ("plan", &["replay", "plan", "orders", "--to", "copy"]),
        ("record", &["inspect", "message", &place]),
        ("outbox-status", &["outbox", "status"]),
        ("outbox-events", &["outbox", "list"]),
        ("outbox-event", &["outbox", "show", "1"]),
        ("outbox-stuck", &["outbox", "stuck"]),
        ("consumers", &["inbox", "list"]),
        ("handled", &["inbox", "list", "--consumer", "billing.charge@1"]),
        ("progress", &["inbox", "list", "--consumer", "billing.count@1"]),
        ("audit", &["audit", "orders", "--range", "start:end", "--consumer", "billing.charge@1"]),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let mut unused: BTreeSet<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap()
    };
    for (name, command) in commands {
        unused.remove(&format!("{name}.json"));
        let (code, shown, said) = shell.told(&[command, &["-o", "json"][..]].concat());
        // Some say by their code that something is wrong.
        assert!(code == 0 || code == 7, "{name}: {said}");
        let shown: Value = serde_json::from_str(&shown).unwrap();
        assert!(shown.as_array().is_none_or(|rows| !rows.is_empty()), "{name} shows nothing to check");
        let check = jsonschema::validator_for(&read(name)).unwrap();
        let wrong: Vec<_> = check.iter_errors(&shown).map(|error| error.to_string()).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:#?} in {shown}");
    }
    assert!(unused.is_empty(), "schemas that nothing is checked against: {unused:?}");
    // Every record of a list is one as well.
    let check = jsonschema::validator_for(&read("record")).unwrap();
    for record in shell.lines(&["tail", "orders", "orders.dlq", "--full", "-o", "jsonl"]) {
        assert!(check.is_valid(&record), "{record}");
    }
}
