//! Events of the official clients: what the CloudEvents SDK and the Kafka client for Java write is read as it was meant,
//! and the other way round; keys land where the Java client puts them.

use std::process::Command;

use eventbus::admin::{Record, TopicSpec};
use eventbus::{Admin, Bus, Envelope, EventId, Offset, Topic};
use xtask::brokers::{Kind, java_libraries, url};

const N_EVENTS: usize = 60;
const SDK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/Sdk.java");

/// Runs the program of the SDK; returns its lines, split.
fn sdk(arguments: &[&str]) -> Vec<Vec<String>> {
    let folders = ["cloudevents-kafka", "cloudevents-json-jackson"]
        .map(|artifact| java_libraries("io.cloudevents", artifact, "4.0.1").unwrap());
    let path = folders.map(|folder| format!("{}/*", folder.display())).join(":");
    let output = Command::new("java").args(["-cp", &path, SDK]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

async fn declared(bus: &Bus, name: &str) -> Topic {
    let topic = Topic::new(format!("{name}.{:x}", fastrand::u64(..))).unwrap();
    let spec = TopicSpec::new(topic.clone()).with_partitions(7.try_into().unwrap());
    bus.transport().admin().unwrap().declare(&spec).await.unwrap();
    topic
}

async fn all(admin: &dyn Admin, topic: &Topic) -> Vec<Record> {
    let mut found = Vec::new();
    for known in admin.topic(topic).await.unwrap().unwrap().partitions {
        found.extend(admin.read(topic, known.partition, known.first, N_EVENTS).await.unwrap());
    }
    found
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
        let topic = declared(&bus, "java-writes").await;
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
            assert_eq!(event.id().to_string(), format!("id-{n}"));
            assert_eq!((event.source(), event.event_type()), ("/java/sdk", "sdk.tried"));
            assert_eq!(event.subject(), Some(format!("süß {n}").as_str()));
            assert_eq!(event.time(), eventbus::time::from_rfc3339("2026-01-02T03:04:05.678Z"));
            assert_eq!(
                (event.schema(), event.content_type()),
                (Some("urn:schema:1"), Some("application/json"))
            );
            assert_eq!(event.extension("correlationid"), Some(format!("c{n}").as_str()));
            assert_eq!(event.payload().unwrap().as_ref(), format!("{{\"n\":{n}}}").as_bytes());
            let ours = admin.partition_of(&topic, event.key().unwrap()).await.unwrap();
            assert_eq!(ours, record.partition, "the partition of the key {key}");
        }
        admin.delete_topic(&topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_the_java_sdk_reads() {
    let address = url(Kind::Kafka).unwrap();
    let bus = eventbus::connect(&address).await.unwrap();
    let topic = declared(&bus, "java-reads").await;
    let time = "2026-01-02T03:04:05.678Z";
    let event = |n: usize| {
        Envelope::new("ours.tried", "/ours")
            .with_id(EventId::parse(&format!("id {n}")))
            .with_time(eventbus::time::from_rfc3339(time))
            .with_subject(format!("süß {n}"))
            .with_schema("urn:schema:1")
            .with_content_type("application/json")
            .with_extension("correlationid", format!("c{n}"))
            .with_key(format!("key-{n}"))
            .with_payload(format!("{{\"n\":{n}}}"))
    };
    let events: Vec<Envelope> = (0..N_EVENTS).map(event).collect();
    let publisher = bus.transport().publisher().await.unwrap();
    let receipts = publisher.enqueue(&topic, events.clone()).await.unwrap().await.all().unwrap();
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
            time.to_owned(),
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
