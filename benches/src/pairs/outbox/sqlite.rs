//! SQLite: producers that share commits, on a disk whose sync takes a known time.

use std::time::Duration;

use eventbus::Topic;
use eventbus_tests::disk::Disk;
use outbox::Outbox;
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use super::side_by_side;
use crate::{Anyhow, order, pair, timed};

const LINE: &str = "outbox on SQLite, 64 producers to one, sync of 1 ms";

pub(super) async fn run() -> Anyhow<()> {
    pair(LINE, 15.0, 64 * 100, || producers(1), || producers(64)).await
}

/// As long as 6,400 transactions take, of which one producer runs 400.
async fn producers(n_producers: u64) -> Anyhow<f64> {
    let folder = tempfile::tempdir()?;
    let disk = Disk::below(folder.path());
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("shop.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await?;
    let outbox: Outbox<Sqlite> = Outbox::new(pool.clone());
    outbox.migrate().await?;
    sqlx::raw_sql("CREATE TABLE work (id INTEGER PRIMARY KEY, buyer INTEGER NOT NULL, note TEXT NOT NULL)")
        .execute(&pool)
        .await?;
    disk.forget();
    disk.slow_syncs(Duration::from_millis(1));
    let each = if n_producers == 1 { 400 } else { 100 };
    let took = timed(side_by_side(n_producers, each, move |n| {
        let outbox = outbox.clone();
        async move {
            let mut tx = outbox.begin().await?;
            let insert = sqlx::query("INSERT INTO work (buyer, note) VALUES ($1, 'an order of a buyer')");
            insert.bind(n.cast_signed()).execute(&mut *tx).await?;
            tx.publish(&Topic::new("orders")?, &order(n))?;
            Ok(tx.commit().await?)
        }
    }))
    .await?;
    pool.close().await;
    Ok(took * 6_400.0 / (n_producers * each) as f64)
}
