//! RabbitMQ as others use it: wrong addresses, names that are taken, streams that vanish, queues bound beside ours.

use eventbus::fitness::Verdict;
use eventbus::{Envelope, ErrorKind, Topic, TopicSpec};
use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ConnectionProperties};
use xtask::brokers::{Kind, url};

async fn channel() -> (Connection, Channel) {
    let address = url(Kind::Rabbitmq).unwrap();
    let connection = Connection::connect(&address, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments
}

const DURABLE: QueueDeclareOptions = QueueDeclareOptions {
    durable: true,
    passive: false,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

fn named(what: &str) -> Topic {
    Topic::new(format!("{what}.{:x}", fastrand::u64(..))).unwrap()
}

fn spec(topic: &Topic) -> TopicSpec {
    TopicSpec::new(topic.clone()).with_partitions(2.try_into().unwrap())
}

#[tokio::test]
async fn a_session_shorter_than_heartbeats_is_refused() {
    let error = eventbus::connect("amqp://127.0.0.1?session=1s").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_is_a_conflict() {
    let (_connection, foreign) = channel().await;
    let topic = named("taken");
    let name = ShortString::from(format!("{topic}-1"));
    foreign.queue_declare(name.clone(), DURABLE, quorum()).await.unwrap();
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    let error = admin.declare(&spec(&topic)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    // It is no topic, and one when the name is free.
    assert!(admin.topic(&topic).await.unwrap().is_none());
    foreign.queue_delete(name, QueueDeleteOptions::default()).await.unwrap();
    assert!(admin.declare(&spec(&topic)).await.unwrap());
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_stream_takes_is_not_confirmed() {
    let (_connection, foreign) = channel().await;
    let topic = named("vanished");
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    bus.transport().admin().unwrap().declare(&spec(&topic)).await.unwrap();
    let publisher = bus.transport().publisher().await.unwrap();
    let batch: Vec<_> =
        (0..200).map(|n| Envelope::new("t", "/s").with_key(format!("k{n}")).with_payload("x")).collect();
    let whole = publisher.enqueue(&topic, batch.clone()).await.unwrap().await.all().unwrap();
    foreign.queue_delete(format!("{topic}-1").into(), QueueDeleteOptions::default()).await.unwrap();
    let outcomes = publisher.enqueue(&topic, batch).await.unwrap().await;
    // The broker acknowledges what it returns: exactly those of the partition that is gone are told as not stored.
    for (before, outcome) in whole.iter().zip(outcomes.iter()) {
        match outcome {
            Ok(receipt) => assert_eq!((receipt.partition.0, before.partition.0), (0, 0)),
            Err(error) => assert_eq!((error.kind(), before.partition.0), (ErrorKind::NotFound, 1), "{error}"),
        }
    }
    bus.close().await.unwrap();
}

/// What is asked beside a look at a stream that is missing is on the same connection, and is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_stream_fails_nobody_else() {
    let (_connection, foreign) = channel().await;
    let (damaged, whole) = (named("damaged"), named("whole"));
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    for topic in [&damaged, &whole] {
        let spec = TopicSpec::new(topic.clone()).with_partitions(6.try_into().unwrap());
        admin.declare(&spec).await.unwrap();
    }
    foreign.queue_delete(format!("{damaged}-3").into(), QueueDeleteOptions::default()).await.unwrap();
    let looks = (0..100).map(|n| {
        let topic = if n % 2 == 0 { &damaged } else { &whole };
        async move { (n % 2 == 0, admin.topic(topic).await) }
    });
    for (is_damaged, looked) in futures_util::future::join_all(looks).await {
        match looked {
            Ok(info) => assert!(!is_damaged && info.is_some()),
            Err(error) => assert!(is_damaged && error.kind() == ErrorKind::NotFound, "{error}"),
        }
    }
    for topic in [&damaged, &whole] {
        admin.delete_topic(topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

/// More refusals than a connection has channels: none of them is heard again by whoever has the next channel of its number.
#[tokio::test(flavor = "multi_thread")]
async fn old_refusals_are_told_to_nobody_else() {
    let (_connection, foreign) = channel().await;
    let (damaged, whole) = (named("refused"), named("again"));
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    for topic in [&damaged, &whole] {
        admin.declare(&spec(topic)).await.unwrap();
    }
    foreign.queue_delete(format!("{damaged}-1").into(), QueueDeleteOptions::default()).await.unwrap();
    let looks = futures_util::stream::iter((0..2_600).map(|n| {
        let topic = if n % 2 == 0 { &damaged } else { &whole };
        async move { (n % 2 == 0, admin.declare(&spec(topic)).await) }
    }));
    let mut looks = looks.buffer_unordered(16);
    while let Some((is_damaged, declared)) = looks.next().await {
        match declared {
            Ok(is_new) => assert!(!is_damaged && !is_new),
            Err(error) => assert!(is_damaged && error.kind() == ErrorKind::Conflict, "{error}"),
        }
    }
    for topic in [&damaged, &whole] {
        admin.delete_topic(topic).await.unwrap();
    }
    bus.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn any_queue_can_be_bound_beside_the_streams() {
    let (_connection, foreign) = channel().await;
    let topic = named("bound");
    let bus = eventbus::connect(&url(Kind::Rabbitmq).unwrap()).await.unwrap();
    let admin = bus.transport().admin().unwrap();
    admin.declare(&spec(&topic)).await.unwrap();
    let name = ShortString::from(format!("foreign.{topic}"));
    foreign.queue_declare(name.clone(), DURABLE, quorum()).await.unwrap();
    for partition in ["0", "1"] {
        let (exchange, options) = (ShortString::from(topic.as_str()), QueueBindOptions::default());
        foreign
            .queue_bind(name.clone(), exchange, partition.into(), options, FieldTable::default())
            .await
            .unwrap();
    }
    let sent = Envelope::new("shop.paid", "/shop").with_subject("o-7").with_payload("{}");
    let publisher = bus.transport().publisher().await.unwrap();
    publisher.enqueue(&topic, vec![sent.clone()]).await.unwrap().await.all().unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut got =
        foreign.basic_consume(name.clone(), "t".into(), options, FieldTable::default()).await.unwrap();
    let message = got.next().await.unwrap().unwrap();
    let headers = message.properties.headers().clone().unwrap();
    let header = |name: &str| match headers.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!((header("ce-type"), header("ce-subject")), ("shop.paid".into(), "o-7".into()));
    assert_eq!(message.properties.message_id().clone().unwrap().as_str(), sent.id().to_string());
    assert_eq!(message.data, b"{}");
    foreign.queue_delete(name, QueueDeleteOptions::default()).await.unwrap();
    let probes = admin.probes().await.unwrap();
    assert!(probes.iter().any(|probe| probe.name.contains("alarm") && probe.verdict == Verdict::Good));
    bus.close().await.unwrap();
}
