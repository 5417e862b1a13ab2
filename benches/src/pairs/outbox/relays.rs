//! Relays: what they publish a second beside the raw client, beside the loop that everybody writes first, and
//! while a transaction of another program stays open.

use std::time::{Duration, Instant};

use eventbus::{Bus, Envelope, Topic};
use outbox::Relay;
use sqlx::Row as _;
use tokio::task::JoinSet;
use xtask::brokers::Kind;

use super::{Home, void};
use crate::brokers::{Raw, Wire, broker, topic};
use crate::{Anyhow, is_wanted, pair};

pub(super) async fn run(events: &[Envelope]) -> Anyhow<()> {
    for (kind, name) in [(Kind::Kafka, "Kafka"), (Kind::Nats, "JetStream"), (Kind::Rabbitmq, "RabbitMQ")] {
        let lines = Lines::of(name);
        if !lines.is_wanted() {
            continue;
        }
        let (broker, home) = (broker(kind).await?, Home::open(Duration::ZERO).await?);
        let (raw, bus) = (Raw::connect(&broker).await?, eventbus::connect(broker.url()).await?);
        let events: Vec<Envelope> = events.iter().take(30_000).cloned().collect();
        let own_keys: Vec<Envelope> =
            events.iter().enumerate().map(|(n, event)| event.clone().with_key(n.to_string())).collect();
        for (line, events) in [(&lines.own_keys, &own_keys), (&lines.keys, &events)] {
            let wires: Vec<Wire> = events.iter().map(Wire::of).collect();
            let ours = || relay(&home, &bus, events);
            pair(line, 0.76, events.len(), || raw.publish(&wires), ours).await?;
        }
        pair(
            &lines.naive,
            15.0,
            events.len(),
            || naive(&home, &bus, &own_keys),
            || relay(&home, &bus, &own_keys),
        )
        .await?;
        bus.transport().close().await?;
    }
    held_snapshot(events).await
}

struct Lines {
    own_keys: String,
    keys: String,
    naive: String,
}

impl Lines {
    fn of(name: &str) -> Self {
        Self {
            own_keys: format!("relay to {name}, a key an event, to the raw client with a window of 1024"),
            keys: format!("relay to {name}, 1,000 keys, to the raw client with a window of 1024"),
            naive: format!("relay to {name}, a key an event, to a loop of select, publish, delete"),
        }
    }

    fn is_wanted(&self) -> bool {
        [&self.own_keys, &self.keys, &self.naive].into_iter().any(|line| is_wanted(line))
    }
}

/// From the start of a relay to the last confirm and the note of it.
async fn relay(home: &Home, bus: &Bus, events: &[Envelope]) -> Anyhow<f64> {
    let topic = topic(bus).await?;
    home.fill(&topic, events).await?;
    let started = Instant::now();
    let relaying = Relay::new(&home.outbox).start(bus).await?;
    while relaying.counts().published < events.len() as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let took = started.elapsed().as_secs_f64();
    let statements = relaying.counts().statements;
    relaying.stop().await;
    eprintln!("{:.1} statements for 500 events", statements as f64 * 500.0 / events.len() as f64);
    bus.transport().admin().ok_or("no administration")?.delete_topic(&topic).await?;
    Ok(took)
}

/// One row, one confirm and one commit at a time; a thirtieth of the events.
async fn naive(home: &Home, bus: &Bus, events: &[Envelope]) -> Anyhow<f64> {
    let (topic, some) = (topic(bus).await?, events.get(..events.len() / 30).unwrap_or(events));
    home.fill(&topic, some).await?;
    let publisher = bus.transport().publisher().await?;
    let started = Instant::now();
    let mut n = 0;
    while let Some(event) = some.get(n) {
        let mut tx = home.pool.begin().await?;
        let select =
            "SELECT shard, id, topic FROM evt.outbox ORDER BY shard, id LIMIT 1 FOR UPDATE SKIP LOCKED";
        let row = sqlx::query(select).fetch_one(&mut *tx).await?;
        publisher
            .enqueue(&Topic::new(row.try_get::<&str, _>(2)?)?, vec![event.clone()])
            .await?
            .await
            .single()?;
        let delete = sqlx::query("DELETE FROM evt.outbox WHERE shard = $1 AND id = $2");
        delete.bind(row.try_get::<i16, _>(0)?).bind(row.try_get::<i64, _>(1)?).execute(&mut *tx).await?;
        tx.commit().await?;
        n += 1;
    }
    let took = started.elapsed().as_secs_f64();
    bus.transport().admin().ok_or("no administration")?.delete_topic(&topic).await?;
    Ok(took * events.len() as f64 / some.len().max(1) as f64)
}

const HELD: &str = "relay at a steady rate while a snapshot is held for 60 s";
/// Events a second that are offered, in transactions of so many.
const OFFERED: u64 = 20_000;
const TOGETHER: u64 = 500;

/// Rows that were deleted stay for as long as somebody may see them: what a relay reads must not grow with them.
async fn held_snapshot(events: &[Envelope]) -> Anyhow<()> {
    if !is_wanted(HELD) {
        return Ok(());
    }
    println!("\n| path | bar | measured | |\n|---|---|---|---|");
    let home = Home::open(Duration::ZERO).await?;
    home.fill(&Topic::new("orders")?, events.get(..10_000).unwrap_or(events)).await?;
    let mut holder = home.pool.begin().await?;
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM evt.outbox")
        .execute(&mut *holder)
        .await?;
    let bus = void();
    let relaying = Relay::new(&home.outbox).start(&bus).await?;
    let mut writers = JoinSet::new();
    let (begun, n_writers) = (Instant::now() + Duration::from_millis(500), 2);
    for writer in 0..n_writers {
        let outbox = home.outbox.clone();
        writers.spawn(async move {
            let topic = Topic::new("orders")?;
            let every = Duration::from_secs_f64((TOGETHER * n_writers) as f64 / OFFERED as f64);
            for round in 0..OFFERED * 60 / TOGETHER / n_writers {
                tokio::time::sleep_until((begun + every * u32::try_from(round)?).into()).await;
                let mut tx = outbox.begin().await?;
                for n in 0..TOGETHER {
                    let n = (round * n_writers + writer) * TOGETHER + n;
                    tx.publish_envelope(&topic, crate::event(n).with_key((n % 100_000).to_string()))?;
                }
                tx.commit().await?;
            }
            Anyhow::Ok(())
        });
    }
    let (mut rates, mut before) = (Vec::new(), 0);
    for second in 0..60u32 {
        tokio::time::sleep_until((begun + Duration::from_secs(1) * (second + 1)).into()).await;
        let now = relaying.counts().published;
        rates.push((now - before) as f64);
        before = now;
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    holder.rollback().await?;
    relaying.stop().await;
    // The first second begins with what was there before.
    let of = |range: std::ops::Range<usize>| rates.get(range).unwrap_or_default().iter().sum::<f64>() / 5.0;
    let (first, last) = (of(1..6), of(55..60));
    let verdict = if last / first >= 0.98 { "met" } else { "missed" };
    println!(
        "| {HELD}: its last five seconds ÷ its first; offered {OFFERED} a second | 0.98 | {:.3} ({first:.0}, {last:.0} a second) | {verdict} |",
        last / first
    );
    Ok(())
}
