//! SQLite: producers that share commits, on a disk whose sync takes a known time.

use std::sync::Arc;
use std::time::Duration;

use eventbus::transport::sqlite::{Options as BusOptions, Sqlite as SqliteBus};
use eventbus::{Bus, Topic};
use eventbus_tests::disk::Disk;
use outbox::{Outbox, Relay};
use sqlx::Sqlite;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};

use super::side_by_side;
use crate::{Anyhow, order, pair, timed};

const LINE: &str = "outbox on SQLite, 64 producers to one, sync of 1 ms";

const INTO: &str = "outbox on SQLite, into a bus in the same file, 16 producers, sync of 1 ms, by the transactions to by a relay";

pub(super) async fn run() -> Anyhow<()> {
    pair(LINE, 15.0, 64 * 100, || producers(1), || producers(64)).await?;
    pair(INTO, 1.0, 16 * 200, || into_a_bus(false), || into_a_bus(true)).await
}

/// Until the topic holds what 3,200 transactions published.
async fn into_a_bus(by_themselves: bool) -> Anyhow<f64> {
    let place = Place::open(16).await?;
    let bus =
        Bus::new(SqliteBus::open_path(place.folder.path().join("shop.db"), BusOptions::default()).await?);
    if by_themselves && !place.outbox.publish_into(&bus).await? {
        return Err("the bus is not in this file".into());
    }
    let relaying = Relay::new(&place.outbox).start(&bus).await?;
    let took = timed(async {
        place.transactions(16, 200).await?;
        let (topic, admin) = (Topic::new("orders")?, bus.transport().admin().ok_or("no admin")?);
        loop {
            // The relay may not have had its turn yet.
            let Some(info) = admin.topic(&topic).await? else {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            };
            let ends: Vec<_> = info.partitions.iter().map(|part| (part.partition, part.next)).collect();
            if ends.iter().map(|(_, next)| next.0).sum::<u64>() >= 16 * 200 {
                return Ok(());
            }
            admin.wait(&topic, &ends, Duration::from_millis(100)).await?;
        }
    })
    .await?;
    relaying.stop().await;
    place.pool.close().await;
    bus.close().await?;
    Ok(took)
}

/// As long as 6,400 transactions take, of which one producer runs 400.
async fn producers(n_producers: u64) -> Anyhow<f64> {
    let place = Place::open(4).await?;
    let each = if n_producers == 1 { 400 } else { 100 };
    let took = timed(place.transactions(n_producers, each)).await?;
    place.pool.close().await;
    Ok(took * 6_400.0 / (n_producers * each) as f64)
}

/// A file on a disk whose sync takes a millisecond.
struct Place {
    folder: tempfile::TempDir,
    pool: SqlitePool,
    outbox: Outbox<Sqlite>,
    _disk: Arc<Disk>,
}

impl Place {
    async fn open(n_connections: u32) -> Anyhow<Self> {
        let folder = tempfile::tempdir()?;
        let disk = Disk::below(folder.path());
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("shop.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let pool = SqlitePoolOptions::new().max_connections(n_connections).connect_with(options).await?;
        let outbox: Outbox<Sqlite> = Outbox::new(pool.clone());
        outbox.migrate().await?;
        sqlx::raw_sql(
            "CREATE TABLE work (id INTEGER PRIMARY KEY, buyer INTEGER NOT NULL, note TEXT NOT NULL)",
        )
        .execute(&pool)
        .await?;
        disk.forget();
        disk.slow_syncs(Duration::from_millis(1));
        Ok(Self { folder, pool, outbox, _disk: disk })
    }

    async fn transactions(&self, n_producers: u64, each: u64) -> Anyhow<()> {
        let outbox = self.outbox.clone();
        side_by_side(n_producers, each, move |n| {
            let outbox = outbox.clone();
            async move {
                let mut tx = outbox.begin().await?;
                let insert = sqlx::query("INSERT INTO work (buyer, note) VALUES ($1, 'an order of a buyer')");
                insert.bind(n.cast_signed()).execute(&mut *tx).await?;
                tx.publish(&Topic::new("orders")?, &order(n))?;
                Ok(tx.commit().await?)
            }
        })
        .await
    }
}
