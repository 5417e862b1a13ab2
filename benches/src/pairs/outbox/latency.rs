//! From a commit to a consumer on another broker, at a rate that does not wait for answers.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eventbus::{EventId, Group, Polled, Settle, Start, Subscription, Topic};
use outbox::{Outbox, Relay};
use parking_lot::Mutex;
use sqlx::Postgres;
use tokio::task::JoinSet;
use xtask::brokers::Kind;

use super::{Home, SLOW};
use crate::brokers::{broker, topic};
use crate::times::{middle, real_sleep};
use crate::{Anyhow, is_wanted, order};

const LINE: &str = "outbox to a JetStream consumer, 1,000 transactions a second";
const RATE: u32 = 1_000;
const N: u32 = 10_000;

/// When a transaction was to begin, when it was to commit, and when that was done.
type Began = Arc<Mutex<HashMap<EventId, (Instant, Instant, Instant)>>>;

pub(super) async fn run() -> Anyhow<()> {
    if !is_wanted(LINE) {
        return Ok(());
    }
    println!("\n| path | bar | measured | |\n|---|---|---|---|");
    let (broker, home) = (broker(Kind::Nats).await?, Home::open(SLOW).await?);
    let bus = eventbus::connect(broker.url()).await?;
    let topic = topic(&bus).await?;
    let subscription = Subscription::group(topic.clone(), Group::new("bench")?).with_start(Start::Earliest);
    let consumer = bus.transport().subscribe(&subscription).await?;
    let relaying = Relay::new(&home.outbox).start(&bus).await?;
    let began = Began::default();
    // Before the clock: connections, statements, and what the client learns.
    for n in 0..200 {
        one(&home.outbox, &topic, n, Instant::now(), &began).await?;
    }
    began.lock().clear();
    let (first, outbox, all, to) =
        (Instant::now() + Duration::from_millis(200), home.outbox.clone(), began.clone(), topic.clone());
    let writing = tokio::spawn(async move {
        let mut tasks = JoinSet::new();
        for n in 0..N {
            let at = first + Duration::from_secs(1) * n / RATE;
            tokio::time::sleep_until(at.into()).await;
            let (outbox, topic, began) = (outbox.clone(), to.clone(), all.clone());
            tasks.spawn(async move { one(&outbox, &topic, u64::from(n), at, &began).await });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Anyhow::Ok(())
    });
    let mut arrived: HashMap<EventId, Instant> = HashMap::new();
    let max = NonZeroUsize::new(256).unwrap_or(NonZeroUsize::MIN);
    while arrived.len() < N as usize + 200 {
        if let Polled::Deliveries(deliveries) = consumer.poll(max).await? {
            let now = Instant::now();
            for delivery in &deliveries {
                arrived.insert(delivery.content.envelope().ok_or("undecodable")?.id().clone(), now);
            }
            let outcomes: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
            consumer.settle(&outcomes).await?.all()?;
        }
    }
    writing.await??;
    relaying.stop().await;
    let began = std::mem::take(&mut *began.lock());
    let mut commits: Vec<Duration> =
        began.values().map(|(_, called, done)| done.duration_since(*called)).collect();
    let times = began.iter().filter_map(|(id, (begin, called, _))| {
        arrived.get(id).map(|at| (at.duration_since(*begin), at.saturating_duration_since(*called)))
    });
    let (mut from_begin, mut from_commit): (Vec<Duration>, Vec<Duration>) = times.unzip();
    let sync = real_sleep(SLOW);
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let verdict = |times: &mut Vec<Duration>, from: &str| {
        let median = middle(times);
        let late = times.get(times.len() * 99 / 100).copied().unwrap_or_default();
        let is_met =
            median <= sync + Duration::from_micros(1_500) && late.as_secs_f64() <= 2.5 * sync.as_secs_f64();
        println!(
            "| {LINE}, from the {from}; sync of {:.2} ms slept | median {:.1} ms, p99 {:.1} ms | {:.2} ms, p99 {:.2} ms | {} |",
            millis(sync),
            millis(sync) + 1.5,
            2.5 * millis(sync),
            millis(median),
            millis(late),
            if is_met { "met" } else { "missed" }
        );
    };
    verdict(&mut from_commit, "call of commit");
    verdict(&mut from_begin, "time at which the transaction was due");
    let late = commits.len() * 99 / 100;
    let median = middle(&mut commits);
    let late = commits.get(late).copied().unwrap_or_default();
    println!(
        "| of it the commit alone, with the append | | {:.2} ms, p99 {:.2} ms | |",
        millis(median),
        millis(late)
    );
    bus.transport().close().await?;
    Ok(())
}

async fn one(outbox: &Outbox<Postgres>, topic: &Topic, n: u64, due: Instant, began: &Began) -> Anyhow<()> {
    let mut tx = outbox.begin().await?;
    let insert = sqlx::query("INSERT INTO work (buyer, note) VALUES ($1, 'an order of a buyer')");
    insert.bind(n.cast_signed()).execute(&mut *tx).await?;
    let id = tx.publish(topic, &order(n))?;
    let called = Instant::now();
    tx.commit().await?;
    began.lock().insert(id, (due, called, Instant::now()));
    Ok(())
}
