//! Publishing: one task stores whatever waits in one statement, the confirms resolve after its commit.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgConnection, Postgres, Row};

use super::row::Columns;
use super::store::Store;
use super::topics;
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::{self, PartitionId};
use crate::sql::{from_sqlx, is_unknown};
use crate::transport::Receipt;
use crate::transport::kit::queue::{Queued, Rounds};

/// What goes into one statement at most.
const MAX_ROUND_EVENTS: usize = 4096;
const MAX_ROUND_BYTES: usize = 16 << 20;

/// Stores what is published until the store is closed.
pub(super) async fn write(store: Weak<Store>, mut rounds: Rounds) {
    let mut writing = Writing::default();
    while let Some(round) = rounds.next(MAX_ROUND_EVENTS, MAX_ROUND_BYTES).await {
        let Some(store) = store.upgrade() else { return };
        store_round(&store, &mut writing, round.batches).await;
        if round.ending.tell() {
            return;
        }
    }
}

/// Stores a round and answers everybody in it.
async fn store_round(store: &Arc<Store>, writing: &mut Writing, mut round: Vec<Queued>) {
    // A second try is for topics that were deleted and created anew since they were looked up.
    for last in [false, true] {
        let outcome = try_store(store, writing, &round).await;
        let mut rest = Vec::new();
        match outcome {
            Ok(places) => {
                for (queued, places) in round.into_iter().zip(places) {
                    match places {
                        Ok(receipts) => queued.answer(receipts.into_iter().map(Ok)),
                        Err(error) if error.kind() == ErrorKind::NotFound && !last => rest.push(queued),
                        Err(error) => queued.fail(&error),
                    }
                }
            }
            Err(error) => round.into_iter().for_each(|queued| queued.fail(&error)),
        }
        if rest.is_empty() {
            return;
        }
        round = rest;
    }
}

/// The connection of the writing task, kept between rounds; one that failed is not used again.
#[derive(Default)]
struct Writing {
    connection: Option<PoolConnection<Postgres>>,
    used: Option<Instant>,
}

/// A connection that was idle for so long is asked whether it lives before events are entrusted to it.
const TRUSTED: Duration = Duration::from_millis(500);

impl Writing {
    async fn connection(&mut self, store: &Store) -> Result<PoolConnection<Postgres>> {
        let is_fresh = self.used.is_some_and(|used| used.elapsed() < TRUSTED);
        if let Some(mut connection) = self.connection.take()
            && (is_fresh || connection.ping().await.is_ok())
        {
            return Ok(connection);
        }
        store.pool.acquire().await.map_err(from_sqlx)
    }

    fn keep(&mut self, connection: PoolConnection<Postgres>) {
        (self.connection, self.used) = (Some(connection), Some(Instant::now()));
    }
}

/// Events of one batch on their way: the topic's id, and for each event its partition and how far behind the end
/// it goes.
type Placed = (i64, Vec<(u32, i64)>);

/// Where the events of each batch were stored; one whose topic is missing is an error of its own.
async fn try_store(
    store: &Arc<Store>,
    writing: &mut Writing,
    round: &[Queued],
) -> Result<Vec<Result<Vec<Receipt>>>> {
    let mut connection = writing.connection(store).await?;
    let stored = store_with(store, &mut connection, round).await;
    match &stored {
        Ok(_) => writing.keep(connection),
        // Whatever is wrong with it goes with it.
        Err(_) => drop(connection.detach()),
    }
    stored
}

async fn store_with(
    store: &Arc<Store>,
    connection: &mut PgConnection,
    round: &[Queued],
) -> Result<Vec<Result<Vec<Receipt>>>> {
    let mut found: HashMap<&Topic, Result<(i64, u32)>> = HashMap::new();
    for queued in round.iter().filter(|queued| !queued.events.is_empty()) {
        if !found.contains_key(&queued.topic) {
            let resolved = store.resolve(connection, &queued.topic).await;
            // A connection that failed is not kept.
            if let Err(error) = &resolved
                && error.is_retryable()
            {
                return Err(error.duplicate());
            }
            found.insert(&queued.topic, resolved);
        }
    }
    let mut columns = Columns::default();
    let mut slots: HashMap<(i64, u32), usize> = HashMap::new();
    let mut places: Vec<Result<Placed>> = Vec::with_capacity(round.len());
    for queued in round {
        let (topic, n_partitions) = match found.get(&queued.topic) {
            Some(Ok(found)) => *found,
            Some(Err(error)) => {
                places.push(Err(error.duplicate()));
                continue;
            }
            None => (0, 1),
        };
        let mut of_batch = Vec::with_capacity(queued.events.len());
        for event in &queued.events {
            let partition = partition::of_envelope(event, n_partitions).0;
            let slot = *slots.entry((topic, partition)).or_insert_with(|| columns.open(topic, partition));
            of_batch.push((partition, columns.push(slot, event)));
        }
        places.push(Ok((topic, of_batch)));
    }
    let mut ends: HashMap<(i64, u32), i64> = HashMap::new();
    if !columns.is_empty() {
        ends = insert(connection, &columns).await?;
        let mut topics: Vec<i64> = slots.keys().map(|(topic, _)| *topic).collect();
        topics.sort_unstable();
        topics.dedup();
        topics.into_iter().for_each(|topic| store.ring(topic));
    }
    let receipts = |(queued, place): (&Queued, Result<Placed>)| {
        let (topic, of_batch) = place?;
        let receipts = of_batch.into_iter().map(|(partition, rank)| {
            let end = ends.get(&(topic, partition))?;
            Some(Receipt::new(PartitionId(partition), Offset((end + rank).unsigned_abs())))
        });
        receipts.collect::<Option<Vec<_>>>().ok_or_else(|| {
            store.topics.lock().remove(&queued.topic);
            topics::missing(&queued.topic)
        })
    };
    Ok(round.iter().zip(places).map(receipts).collect())
}

/// Runs the one statement; a deadlock with another process is tried again, since nothing of it was stored.
async fn insert(connection: &mut PgConnection, columns: &Columns<'_>) -> Result<HashMap<(i64, u32), i64>> {
    let mut tries = 0;
    loop {
        tries += 1;
        match columns.insert().fetch_all(&mut *connection).await {
            Ok(rows) => {
                let end = |row: &sqlx::postgres::PgRow| {
                    Ok(((row.try_get(0)?, row.try_get::<i32, _>(1)?.unsigned_abs()), row.try_get(2)?))
                };
                return rows.iter().map(end).collect::<Result<_, sqlx::Error>>().map_err(from_sqlx);
            }
            Err(error) if is_unknown(&error) => {
                return Err(
                    Error::new(ErrorKind::Unknown, "the connection ended before the answer").caused_by(error)
                );
            }
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("40P01") && tries < 5 => {}
            Err(error) => return Err(from_sqlx(error)),
        }
    }
}
