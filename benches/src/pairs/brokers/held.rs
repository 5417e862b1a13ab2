//! PostgreSQL while somebody holds a snapshot: what was overwritten or deleted since stays, and must not be read again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use eventbus::{Envelope, Meta, Service, State};
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinSet;
use xtask::brokers::Kind;

use super::{broker, topic};
use crate::{Anyhow, is_wanted};

const LINE: &str = "PostgreSQL, a snapshot held for 60 s";
/// Each awaits the confirm of an event before it publishes the next.
const PRODUCERS: usize = 8;
const SECONDS: usize = 60;

async fn count(_: Meta, State(handled): State<Arc<AtomicU64>>) {
    handled.fetch_add(1, Ordering::Relaxed);
}

/// Prints a table of its own: the rate of the last five seconds to that of the first, of publishing and of consuming.
pub(crate) async fn all(events: &[Envelope]) -> Anyhow<()> {
    if !is_wanted(LINE) {
        return Ok(());
    }
    let broker = broker(Kind::Postgres).await?;
    let bus = eventbus::connect(broker.url()).await?;
    let topic = topic(&bus).await?;
    let (published, handled) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let service =
        Service::new("held").on(topic.clone(), count).with_state(handled.clone()).start(&bus).await?;
    let mut holder = PgConnection::connect(broker.url()).await?;
    let mut snapshot = holder.begin().await?;
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM eventbus_event")
        .execute(&mut *snapshot)
        .await?;
    let begun = Instant::now();
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let publisher = bus.transport().publisher().await?;
        let (topic, published) = (topic.clone(), published.clone());
        let own: Vec<Envelope> = events.iter().skip(producer).step_by(PRODUCERS).cloned().collect();
        producers.spawn(async move {
            for event in own.iter().cycle() {
                if begun.elapsed() > Duration::from_secs(SECONDS as u64) {
                    break;
                }
                let event = event.clone().with_id(eventbus::EventId::generate());
                publisher.enqueue(&topic, vec![event]).await?.await.all()?;
                published.fetch_add(1, Ordering::Relaxed);
            }
            Anyhow::Ok(())
        });
    }
    let (mut rates, mut before) = (Vec::new(), (0, 0));
    for second in 1..=SECONDS as u64 {
        tokio::time::sleep_until((begun + Duration::from_secs(second)).into()).await;
        let now = (published.load(Ordering::Relaxed), handled.load(Ordering::Relaxed));
        rates.push((now.0 - before.0, now.1 - before.1));
        before = now;
    }
    while let Some(done) = producers.join_next().await {
        done??;
    }
    snapshot.rollback().await?;
    service.stop().await?;
    bus.close().await?;
    println!("| path | bar | measured | |\n|---|---|---|---|");
    type Of = fn(&(u64, u64)) -> u64;
    for (what, of) in [("publishing", (|rate| rate.0) as Of), ("consuming", |rate| rate.1)] {
        let mean =
            |rates: &[(u64, u64)]| rates.iter().map(of).sum::<u64>() as f64 / rates.len().max(1) as f64;
        // The first second opens connections.
        let (first, last) =
            (mean(rates.get(1..6).unwrap_or_default()), mean(rates.get(SECONDS - 5..).unwrap_or_default()));
        println!(
            "| {LINE}, {what}: its last five seconds ÷ its first; {PRODUCERS} awaiting producers | | {:.2} ({first:.0}, {last:.0} a second) | |",
            last / first
        );
    }
    println!();
    Ok(())
}
