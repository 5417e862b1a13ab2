//! Events of the official clients: what the CloudEvents SDKs and the brokers' own clients write is read as it was
//! meant, and the other way round.

mod go;
mod java;
mod python;

use std::process::Command;

use eventbus::admin::{Record, TopicSpec};
use eventbus::{Admin, Bus, Envelope, EventId, Topic};

const N_EVENTS: usize = 60;
const TIME: &str = "2026-01-02T03:04:05.678Z";

/// Runs a program to its end; returns its lines, split at tabs.
fn told(command: &mut Command) -> Vec<Vec<String>> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

async fn declared(bus: &Bus, name: &str, n_partitions: u32) -> Topic {
    let topic = Topic::new(format!("{name}.{:x}", fastrand::u64(..))).unwrap();
    let spec = TopicSpec::new(topic.clone()).with_partitions(n_partitions.try_into().unwrap());
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

/// What the programs write as their nth event, but for its key.
fn is_theirs(event: &Envelope, n: usize, source: &str, subject: &str) {
    assert_eq!(event.id().to_string(), format!("id-{n}"));
    assert_eq!((event.source(), event.event_type()), (source, "sdk.tried"));
    assert_eq!(event.subject(), Some(subject));
    assert_eq!(event.time(), eventbus::time::from_rfc3339(TIME));
    assert_eq!((event.schema(), event.content_type()), (Some("urn:schema:1"), Some("application/json")));
    assert_eq!(event.extension("correlationid"), Some(format!("c{n}").as_str()));
    // Some put a space behind the colon.
    let body = String::from_utf8(event.payload().unwrap().to_vec()).unwrap();
    assert_eq!(body.replace(' ', ""), format!("{{\"n\":{n}}}"));
}

/// What we write as the nth event.
fn ours(n: usize, subject: &str) -> Envelope {
    Envelope::new("ours.tried", "/ours")
        .with_id(EventId::parse(&format!("id {n}")))
        .with_time(eventbus::time::from_rfc3339(TIME))
        .with_subject(subject.to_owned())
        .with_schema("urn:schema:1")
        .with_content_type("application/json")
        .with_extension("correlationid", format!("c{n}"))
        .with_key(format!("key-{n}"))
        .with_payload(format!("{{\"n\":{n}}}"))
}
