//! The outbox and the inbox beside the same work without them, on a PostgreSQL of their own whose sync takes a known time.

mod append;
mod handlers;
mod latency;
mod relays;
mod sqlite;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use eventbus::transport::memory::{Memory, Options};
use eventbus::{Bus, Envelope, Topic};
use outbox::Outbox;
use sqlx::Postgres;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::task::JoinSet;
use xtask::brokers::Broker;

use crate::{Anyhow, is_wanted};

/// A slow disk that is the same every time; the other disk takes no time at all.
const SLOW: Duration = Duration::from_millis(2);
const DISKS: [(&str, Duration); 2] = [("sync of 2 ms", SLOW), ("free sync", Duration::ZERO)];

/// Runs the lines that are wanted.
pub(crate) async fn all(events: &[Envelope]) -> Anyhow<()> {
    append::run(events).await?;
    handlers::run(events).await?;
    relays::run(events).await?;
    sqlite::run().await?;
    latency::run().await?;
    Ok(())
}

fn is_any_wanted<'a>(lines: impl IntoIterator<Item = &'a String>) -> bool {
    lines.into_iter().any(|line| is_wanted(line))
}

/// A server of our own, with the tables of an outbox and some of a service.
struct Home {
    _broker: Broker,
    pool: PgPool,
    outbox: Outbox<Postgres>,
}

impl Home {
    async fn open(sync: Duration) -> Anyhow<Self> {
        let broker = tokio::task::spawn_blocking(move || Broker::start_with_sync(sync)).await??;
        let pool = PgPoolOptions::new().max_connections(32).connect(broker.url()).await?;
        let outbox = Outbox::new(pool.clone());
        outbox.migrate().await?;
        let tables = "CREATE TABLE work (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, buyer bigint NOT NULL, note text NOT NULL);
            CREATE TABLE account (id bigint PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50);
            INSERT INTO account SELECT n, 0 FROM generate_series(0, 9999) AS n;
            CREATE TABLE raw (LIKE evt.outbox INCLUDING ALL);
            CREATE TABLE raw_inbox (LIKE evt.inbox INCLUDING ALL);";
        sqlx::raw_sql(tables).execute(&pool).await?;
        Ok(Self { _broker: broker, pool, outbox })
    }

    /// Every side of a pair begins with empty tables.
    async fn clear(&self) -> Anyhow<()> {
        let tables = "TRUNCATE work, raw, raw_inbox, evt.outbox, evt.outbox_blocked, evt.inbox, evt.key_progress, evt.consumer";
        self.run(tables).await
    }

    /// Stores events as transactions would have done before the clock starts.
    async fn fill(&self, topic: &Topic, events: &[Envelope]) -> Anyhow<()> {
        self.clear().await?;
        for some in events.chunks(500) {
            let mut tx = self.outbox.begin().await?;
            for event in some {
                tx.publish_envelope(topic, event.clone())?;
            }
            tx.commit().await?;
        }
        self.run("ANALYZE evt.outbox").await
    }

    async fn run(&self, sql: &'static str) -> Anyhow<()> {
        sqlx::raw_sql(sql).execute(&self.pool).await?;
        Ok(())
    }
}

/// A bus that nobody reads: what is published is gone.
fn void() -> Bus {
    Bus::new(Memory::new(Options::default()))
}

/// Tasks that each do the same so many times, one after the other, as connections of a service do.
async fn side_by_side<F, W>(n_tasks: u64, each: u64, work: W) -> Anyhow<()>
where
    W: Fn(u64) -> F + Send + Sync + 'static,
    F: Future<Output = Anyhow<()>> + Send,
{
    let (work, mut tasks) = (Arc::new(work), JoinSet::new());
    for task in 0..n_tasks {
        let work = work.clone();
        tasks.spawn(async move {
            for n in 0..each {
                work(task * each + n).await?;
            }
            Anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}
