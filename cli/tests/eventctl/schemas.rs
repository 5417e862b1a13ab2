//! What machines read is as its schema says: every list with -o json against a checked-in JSON Schema.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use eventbus::{Envelope, Failure, Meta, Service, Topic};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_as_their_schemas_say() {
    let shell = Shell::new();
    furnish(&shell.url("a")).await;
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
        let shown: Value = serde_json::from_str(&shell.ok(&[command, &["-o", "json"][..]].concat())).unwrap();
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
