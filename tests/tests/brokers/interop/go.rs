//! The CloudEvents SDK and the NATS client for Go.

use std::path::Path;
use std::process::Command;

use xtask::brokers::{Kind, url};
use xtask::clients;

use super::{N_EVENTS, TIME, all, declared, is_theirs, ours, told};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/nats");

fn sdk(what: &str, subject: &str, mode: &str) -> Vec<Vec<String>> {
    let program = clients::go(Path::new(SOURCE), "nats-interop").unwrap();
    let address = url(Kind::Nats).unwrap();
    told(Command::new(program).args([what, &address, subject, mode, &N_EVENTS.to_string()]))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_go_sdk_writes_is_read() {
    let bus = eventbus::connect(&url(Kind::Nats).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    for mode in ["binary", "structured"] {
        let topic = declared(&bus, "go-writes", 1).await;
        sdk("write", &format!("evt.{topic}.0"), mode);
        let found = all(admin, &topic).await;
        assert_eq!(found.len(), N_EVENTS, "{mode}");
        for (n, record) in found.iter().enumerate() {
            let event = record.content.envelope().unwrap_or_else(|| panic!("{mode}: {:?}", record.content));
            is_theirs(event, n, "/go/sdk", &format!("subject-{n}"));
            assert_eq!(event.key().unwrap().as_bytes(), format!("key-{n}").as_bytes(), "{mode}");
        }
        admin.delete_topic(&topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_the_go_sdk_reads() {
    let bus = eventbus::connect(&url(Kind::Nats).unwrap()).await.unwrap();
    let topic = declared(&bus, "go-reads", 1).await;
    // Texts that headers hold as they are: this SDK does not decode what the binding has encoded.
    let events = (0..N_EVENTS).map(|n| ours(n, &format!("subject-{n}"))).collect();
    let publisher = bus.transport().publisher().await.unwrap();
    publisher.enqueue(&topic, events).await.unwrap().await.all().unwrap();
    let read = sdk("read", &format!("evt.{topic}.0"), "");
    assert_eq!(read.len(), N_EVENTS);
    for (n, line) in read.iter().enumerate() {
        let (subject, own, key) = (format!("subject-{n}"), format!("c{n}"), format!("key-{n}"));
        let (media, body) = ("application/json", format!("{{\"n\":{n}}}"));
        let rest = ["/ours", "ours.tried", &subject, TIME, "urn:schema:1", media, &own, &key, &body];
        assert_eq!(line[1..], rest, "event {n}");
        assert_eq!(line[0], format!("id%20{n}"));
    }
    bus.transport().admin().unwrap().delete_topic(&topic).await.unwrap();
    bus.close().await.unwrap();
}
