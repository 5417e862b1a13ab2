//! Brokers: the raw client beside ours on one broker that nobody else uses, started for the purpose.
//!
//! Raw sends the same bodies with the same CloudEvents headers, whose values were made beforehand; it reads the headers of a
//! message that a program would want and decodes the same JSON. Ours is the transport: events into
//! their headers and back, partitions, groups and positions.

pub(crate) mod held;
mod kafka;
mod nats;
mod postgres;
mod rabbitmq;
mod raw;
mod redis;
pub(crate) mod still;

use std::collections::VecDeque;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eventbus::{Bus, Envelope, Group, Key, Polled, Settle, Start, Subscription, Token, Topic, TopicSpec};
use tokio::sync::mpsc;
use xtask::brokers::{Broker, Kind};

pub(crate) use self::raw::Raw;
use crate::{Anyhow, Order, is_wanted};

/// Partitions of a topic: ours, and raw where the broker has partitions or they cost nothing.
const PARTITIONS: u32 = 16;
/// Sent before the clock starts: connections, and what a client learns of a topic.
const FIRST: usize = 64;

/// Runs the lines of all brokers that are wanted, one broker at a time.
pub(crate) async fn all(events: &[Envelope]) -> Anyhow<()> {
    let wires: Vec<Wire> = events.iter().map(Wire::of).collect();
    if is_any_wanted(kafka::LINES) {
        kafka::run(&broker(Kind::Kafka).await?, events, &wires).await?;
    }
    // The others are slower.
    let (events, wires) = (events.get(..50_000).unwrap_or(events), wires.get(..50_000).unwrap_or(&wires));
    if is_any_wanted(rabbitmq::LINES) {
        rabbitmq::run(&broker(Kind::Rabbitmq).await?, events, wires).await?;
    }
    if is_any_wanted(nats::LINES) {
        nats::run(&broker(Kind::Nats).await?, events, wires).await?;
    }
    if is_any_wanted(redis::LINES) {
        redis::run(&broker(Kind::Redis).await?, events, wires).await?;
    }
    if is_any_wanted(postgres::LINES) {
        postgres::run(&broker(Kind::Postgres).await?, events, wires).await?;
    }
    Ok(())
}

pub(crate) fn is_any_wanted(lines: &[&str]) -> bool {
    lines.iter().any(|line| is_wanted(line))
}

pub(crate) async fn broker(kind: Kind) -> Anyhow<Broker> {
    let broker = tokio::task::spawn_blocking(move || Broker::start(kind, None)).await??;
    eprintln!("{kind}: {}", broker.version());
    Ok(broker)
}

/// A name that nothing else has.
fn fresh(what: &str) -> String {
    static N: AtomicUsize = AtomicUsize::new(0);
    format!("{what}-{}", N.fetch_add(1, Ordering::Relaxed))
}

/// An event as a raw client sends it.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    id: String,
    key: Bytes,
    partition: u32,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
}

impl Wire {
    /// The attributes that our mapping writes, by their names without the prefix of a protocol.
    pub(crate) fn of(event: &Envelope) -> Self {
        let id = event.id().to_string();
        let headers = vec![
            ("specversion", "1.0".to_owned()),
            ("id", id.clone()),
            ("source", event.source().to_owned()),
            ("type", event.event_type().to_owned()),
            ("dataversion", event.version().unwrap_or_default().to_string()),
        ];
        Self {
            id,
            key: event.key().map(Key::as_bytes).map(Bytes::copy_from_slice).unwrap_or_default(),
            partition: eventbus::partition::of_envelope(event, PARTITIONS).0,
            headers,
            body: event.payload().cloned().unwrap_or_default(),
        }
    }
}

/// What a raw consumer does with a body.
fn decode(body: &[u8]) -> Anyhow<()> {
    std::hint::black_box(serde_json::from_slice::<Order>(body)?.amount_cents);
    Ok(())
}

/// A topic of ours that is empty.
pub(crate) async fn topic(bus: &Bus) -> Anyhow<Topic> {
    let topic = Topic::new(fresh("orders"))?;
    let spec =
        TopicSpec::new(topic.clone()).with_partitions(NonZeroU32::new(PARTITIONS).unwrap_or(NonZeroU32::MIN));
    bus.transport().admin().ok_or("no administration")?.declare(&spec).await?;
    Ok(topic)
}

/// Our side of publishing: as many events as the window holds are on their way, a sixteenth of it handed over at once.
async fn publish(bus: &Bus, events: &[Envelope], window: usize) -> Anyhow<f64> {
    publish_batches(bus, events, window.div_ceil(16), window.min(16)).await
}

/// Batches of a size, some of them on their way at once.
async fn publish_batches(bus: &Bus, events: &[Envelope], size: usize, n_open: usize) -> Anyhow<f64> {
    let topic = topic(bus).await?;
    let publisher = bus.transport().publisher().await?;
    let (first, rest) = events.split_at(FIRST.min(events.len()));
    publisher.enqueue(&topic, first.to_vec()).await?.await.all()?;
    let batches: Vec<Vec<Envelope>> = rest.chunks(size).map(<[Envelope]>::to_vec).collect();
    let started = Instant::now();
    let mut open = VecDeque::new();
    for batch in batches {
        if open.len() == n_open
            && let Some(confirm) = open.pop_front()
        {
            eventbus::Receipts::all(confirm.await)?;
        }
        open.push_back(publisher.enqueue(&topic, batch).await?);
    }
    for confirm in open {
        confirm.await.all()?;
    }
    let took = started.elapsed().as_secs_f64();
    bus.transport().admin().ok_or("no administration")?.delete_topic(&topic).await?;
    Ok(took * events.len() as f64 / rest.len().max(1) as f64)
}

/// A topic of ours that holds all events.
async fn filled(bus: &Bus, events: &[Envelope]) -> Anyhow<Topic> {
    let topic = topic(bus).await?;
    let publisher = bus.transport().publisher().await?;
    for batch in events.chunks(256) {
        publisher.enqueue(&topic, batch.to_vec()).await?.await.all()?;
    }
    Ok(topic)
}

/// Our side of consuming, by a new group, from the first event that arrives.
async fn consume(bus: &Bus, topic: &Topic, n: usize) -> Anyhow<f64> {
    let group = Group::new(fresh("bench"))?;
    let subscription = Subscription::group(topic.clone(), group.clone()).with_start(Start::Earliest);
    let consumer = bus.transport().subscribe(&subscription).await?;
    // Polled and settled side by side, as the driver does it: what was done meanwhile is settled at once.
    let (done, mut finished) = mpsc::unbounded_channel::<Vec<Token>>();
    let settling = async {
        let mut together = Vec::new();
        while finished.recv_many(&mut together, 64).await > 0 {
            let outcomes: Vec<_> = together.drain(..).flatten().map(|token| (token, Settle::Ack)).collect();
            consumer.settle(&outcomes).await?.all()?;
        }
        Anyhow::Ok(())
    };
    let handling = async {
        let (mut left, max, mut started) = (n, NonZeroUsize::new(256).unwrap_or(NonZeroUsize::MIN), None);
        while left > 0 {
            let Polled::Deliveries(deliveries) = consumer.poll(max).await? else { continue };
            started.get_or_insert_with(Instant::now);
            for delivery in &deliveries {
                let event = delivery.content.envelope().ok_or("undecodable")?;
                std::hint::black_box(event.decode::<Order>()?.amount_cents);
            }
            left -= deliveries.len();
            done.send(deliveries.iter().map(|delivery| delivery.token).collect())?;
        }
        drop(done);
        Anyhow::Ok(started)
    };
    let (started, ()) = tokio::try_join!(handling, settling)?;
    let took = started.map(|started| started.elapsed().as_secs_f64()).unwrap_or_default();
    consumer.close(Instant::now() + Duration::from_secs(10)).await?;
    bus.transport().admin().ok_or("no administration")?.delete_group(&group, topic).await?;
    Ok(took)
}
