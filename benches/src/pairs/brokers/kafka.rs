//! Kafka: rdkafka with the settings that ours has.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use eventbus::Envelope;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{CommitMode, Consumer as _, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers as _, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message as _};
use xtask::brokers::Broker;

use super::{FIRST, PARTITIONS, Wire, consume, decode, filled, fresh, publish};
use crate::{Anyhow, pair};

const PUBLISH: &str = "Kafka publish, window 1024";
const PUBLISH_64: &str = "Kafka publish, window 64";
const CONSUME: &str = "Kafka consume to typed events";
pub(super) const LINES: &[&str] = &[PUBLISH, PUBLISH_64, CONSUME];

pub(super) async fn run(broker: &Broker, events: &[Envelope], wires: &[Wire]) -> Anyhow<()> {
    let bus = eventbus::connect(broker.url()).await?;
    let hosts = hosts(broker);
    let n = events.len();
    for (name, bar, window) in [(PUBLISH_64, 0.92, 64), (PUBLISH, 0.92, 1024)] {
        pair(name, bar, n, || raw_publish(&hosts, wires, window), || publish(&bus, events, window)).await?;
    }
    let (ours, raw) = (filled(&bus, events).await?, raw_topic(&hosts).await?);
    send(&producer(&hosts)?, &raw, wires, 1024).await?;
    pair(CONSUME, 0.85, n, || raw_consume(&hosts, &raw, n), || consume(&bus, &ours, n)).await?;
    bus.transport().close().await?;
    Ok(())
}

pub(super) fn hosts(broker: &Broker) -> String {
    broker.url().trim_start_matches("kafka://").to_owned()
}

fn config(hosts: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", hosts);
    config
}

async fn raw_topic(hosts: &str) -> Anyhow<String> {
    let admin: AdminClient<DefaultClientContext> = config(hosts).create()?;
    let name = fresh("raw");
    let topic = NewTopic::new(&name, PARTITIONS.cast_signed(), TopicReplication::Fixed(1));
    for outcome in admin.create_topics([&topic], &AdminOptions::new()).await? {
        outcome.map_err(|(topic, code)| format!("{topic}: {code}"))?;
    }
    Ok(name)
}

fn producer(hosts: &str) -> Anyhow<FutureProducer> {
    Ok(config(hosts)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", "0")
        .set("queue.buffering.max.messages", "200000")
        .set("queue.buffering.max.kbytes", "262144")
        .create()?)
}

async fn send(producer: &FutureProducer, topic: &str, wires: &[Wire], window: usize) -> Anyhow<()> {
    let mut open: VecDeque<DeliveryFuture> = VecDeque::with_capacity(window);
    let delivered = async |sent: DeliveryFuture| -> Anyhow<()> {
        sent.await?.map(drop).map_err(|(error, _)| error.into())
    };
    for wire in wires {
        if open.len() == window
            && let Some(sent) = open.pop_front()
        {
            delivered(sent).await?;
        }
        let headers = OwnedHeaders::new_with_capacity(wire.headers.len());
        let headers = wire.headers.iter().fold(headers, |headers, (name, value)| {
            headers.insert(Header { key: &format!("ce_{name}"), value: Some(value) })
        });
        let record = FutureRecord::to(topic)
            .key(wire.key.as_ref())
            .payload(wire.body.as_ref())
            .partition(wire.partition.cast_signed())
            .headers(headers);
        open.push_back(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for sent in open {
        delivered(sent).await?;
    }
    Ok(())
}

pub(super) async fn raw_publish(hosts: &str, wires: &[Wire], window: usize) -> Anyhow<f64> {
    let (topic, producer) = (raw_topic(hosts).await?, producer(hosts)?);
    let (first, rest) = wires.split_at(FIRST.min(wires.len()));
    send(&producer, &topic, first, FIRST).await?;
    let started = Instant::now();
    send(&producer, &topic, rest, window).await?;
    Ok(started.elapsed().as_secs_f64() * wires.len() as f64 / rest.len().max(1) as f64)
}

async fn raw_consume(hosts: &str, topic: &str, n: usize) -> Anyhow<f64> {
    let consumer: StreamConsumer = config(hosts)
        .set("group.id", fresh("raw"))
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "250")
        .create()?;
    consumer.subscribe(&[topic])?;
    let mut started = None;
    for at in 1..=n {
        let message = consumer.recv().await?;
        started.get_or_insert_with(Instant::now);
        let headers = message.headers().ok_or("no headers")?;
        for header in headers.iter().filter(|header| matches!(header.key, "ce_id" | "ce_type")) {
            std::hint::black_box(header.value.map(str::from_utf8).transpose()?);
        }
        decode(message.payload().ok_or("no body")?)?;
        consumer.store_offset_from_message(&message)?;
        if at % 256 == 0 {
            consumer.commit_consumer_state(CommitMode::Async)?;
        }
    }
    match consumer.commit_consumer_state(CommitMode::Sync) {
        // Committed already.
        Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
        Err(error) => return Err(error.into()),
    }
    let took = started.map(|started| started.elapsed().as_secs_f64()).unwrap_or_default();
    // A group that leaves, as ours does, so that the next one is alone with the broker.
    tokio::task::spawn_blocking(move || drop(consumer)).await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    Ok(took)
}
