//! The CloudEvents SDK and the Kafka client for Java; keys land where that client puts them.

use std::process::Command;

use eventbus::Offset;
use eventbus::admin::Record;
use xtask::brokers::{Kind, url};
use xtask::clients;

use super::{N_EVENTS, TIME, all, declared, is_theirs, ours, told};

const SDK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/Sdk.java");

/// Runs the program of the SDK; returns its lines, split.
fn sdk(arguments: &[&str]) -> Vec<Vec<String>> {
    let folders = ["cloudevents-kafka", "cloudevents-json-jackson"]
        .map(|artifact| clients::java("io.cloudevents", artifact, "4.0.1").unwrap());
    let path = folders.map(|folder| format!("{}/*", folder.display())).join(":");
    told(Command::new("java").args(["-cp", &path, SDK]).args(arguments))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_java_sdk_writes_is_read() {
    let address = url(Kind::Kafka).unwrap();
    let bus = eventbus::connect(&address).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    let servers = address.trim_start_matches("kafka://");
    for encoding in ["BINARY", "STRUCTURED"] {
        let topic = declared(&bus, "java-writes", 7).await;
        let sent = sdk(&["write", servers, topic.as_str(), encoding, &N_EVENTS.to_string()]);
        assert_eq!(sent.len(), N_EVENTS);
        let found = all(admin, &topic).await;
        assert_eq!(found.len(), N_EVENTS, "{encoding}");
        for (n, sent) in sent.iter().enumerate() {
            let [partition, offset, key] = sent.as_slice() else { panic!("{sent:?}") };
            let is_it = |record: &&Record| {
                record.partition.to_string() == *partition && record.offset.to_string() == *offset
            };
            let record = found.iter().find(is_it).unwrap();
            let event =
                record.content.envelope().unwrap_or_else(|| panic!("{encoding}: {:?}", record.content));
            assert_eq!(hex(event.key().unwrap().as_bytes()), *key, "{encoding}");
            is_theirs(event, n, "/java/sdk", &format!("süß {n}"));
            let expected = admin.partition_of(&topic, event.key().unwrap()).await.unwrap();
            assert_eq!(expected, record.partition, "the partition of the key {key}");
        }
        admin.delete_topic(&topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_the_java_sdk_reads() {
    let address = url(Kind::Kafka).unwrap();
    let bus = eventbus::connect(&address).await.unwrap();
    let topic = declared(&bus, "java-reads", 7).await;
    let events = (0..N_EVENTS).map(|n| ours(n, &format!("süß {n}"))).collect();
    let publisher = bus.transport().publisher().await.unwrap();
    let receipts = publisher.enqueue(&topic, events).await.unwrap().await.all().unwrap();
    let servers = address.trim_start_matches("kafka://");
    let read = sdk(&["read", servers, topic.as_str(), &N_EVENTS.to_string()]);
    for (n, receipt) in receipts.iter().enumerate() {
        let place = [receipt.partition.to_string(), receipt.offset.map(|Offset(at)| at.to_string()).unwrap()];
        let found = read.iter().find(|line| line[..2] == place).unwrap();
        let wanted = [
            hex(format!("key-{n}").as_bytes()),
            format!("id {n}"),
            "/ours".to_owned(),
            "ours.tried".to_owned(),
            format!("süß {n}"),
            TIME.to_owned(),
            "urn:schema:1".to_owned(),
            "application/json".to_owned(),
            format!("c{n}"),
        ];
        assert_eq!(found[2..11], wanted, "event {n}");
        assert_eq!(found[11], hex(format!("{{\"n\":{n}}}").as_bytes()));
    }
    bus.transport().admin().unwrap().delete_topic(&topic).await.unwrap();
    bus.close().await.unwrap();
}
