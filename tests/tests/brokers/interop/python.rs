//! The CloudEvents SDK for Python over RabbitMQ, with the client that is usual there.

use std::process::Command;

use lapin::options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use xtask::brokers::{Kind, url};
use xtask::clients;

use super::{N_EVENTS, all, declared, is_theirs, ours, told};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/rabbitmq.py");

fn sdk(what: &str, place: &str, mode: &str) -> Vec<Vec<String>> {
    let folder = clients::python(&["cloudevents==2.2.0", "pika==1.4.4"]).unwrap();
    let address = url(Kind::Rabbitmq).unwrap();
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", folder).arg(PROGRAM);
    told(python.args([what, &address, place, mode, &N_EVENTS.to_string()]))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_python_sdk_writes_is_read() {
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    for mode in ["binary", "structured", "amqp1"] {
        let topic = declared(&bus, "python-writes", 1).await;
        sdk("write", topic.as_str(), mode);
        let found = all(admin, &topic).await;
        assert_eq!(found.len(), N_EVENTS, "{mode}");
        for (n, record) in found.iter().enumerate() {
            let event = record.content.envelope().unwrap_or_else(|| panic!("{mode}: {:?}", record.content));
            is_theirs(event, n, "/python/sdk", &format!("süß {n}"));
            assert_eq!(event.key().unwrap().as_bytes(), format!("key-{n}").as_bytes(), "{mode}");
        }
        admin.delete_topic(&topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_the_python_sdk_reads() {
    let address = url(Kind::Rabbitmq).unwrap();
    let bus = eventbus::connect(&address).await.unwrap();
    let topic = declared(&bus, "python-reads", 1).await;
    // A queue beside the stream, as consumers of other kinds have it.
    let connection = Connection::connect(&address, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let queue = format!("{topic}.python");
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.as_str().into(), durable, FieldTable::default()).await.unwrap();
    let (exchange, options) = (topic.as_str().into(), QueueBindOptions::default());
    channel
        .queue_bind(queue.as_str().into(), exchange, "0".into(), options, FieldTable::default())
        .await
        .unwrap();
    let events = (0..N_EVENTS).map(|n| ours(n, &format!("süß {n}"))).collect();
    let publisher = bus.transport().publisher().await.unwrap();
    publisher.enqueue(&topic, events).await.unwrap().await.all().unwrap();
    let read = sdk("read", &queue, "");
    assert_eq!(read.len(), N_EVENTS);
    for (n, line) in read.iter().enumerate() {
        let (subject, own, key) = (format!("süß {n}"), format!("c{n}"), format!("key-{n}"));
        let (time, media, body) = ("2026-01-02T03:04:05.678000+00:00", "application/json", n.to_string());
        let rest = ["/ours", "ours.tried", &subject, time, "urn:schema:1", media, &own, &key, &body];
        assert_eq!(line[1..], rest, "event {n}");
        assert_eq!(line[0], format!("id {n}"));
    }
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    bus.transport().admin().unwrap().delete_topic(&topic).await.unwrap();
    bus.close().await.unwrap();
}
