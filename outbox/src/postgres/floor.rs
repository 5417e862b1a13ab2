//! From where a relay reads: dead rows below need not be looked at.
//!
//! A floor may pass a number only when no transaction that could still commit a lower one is left. Transactions get their
//! own number before their events do (see `outbox_append`), so: read the last number given out, then take a number of a
//! transaction, and when all transactions before that one have ended, whatever is below is there to be seen.
//!
//! That is true for one life of the server: one that crashed may give out numbers again that it gave to transactions which it
//! lost, of events as well, so that a floor of before is one no more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus::Result;
use eventbus::sql::from_sqlx;
use parking_lot::Mutex;
use sqlx::{AssertSqlSafe, PgConnection, Row as _};
use tokio::time::Instant;

use super::{LIFE, unreadable};
use crate::namespace::Namespace;
use crate::row::Shard;

/// How often floors move, and how often everything is looked at in spite of them: rows written by hand may be below.
const STEP: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Floors {
    state: Mutex<State>,
    last_number: Arc<str>,
    lowest: Arc<str>,
}

#[derive(Debug)]
struct State {
    floors: HashMap<Shard, i64>,
    /// The life of the server in which they are floors.
    life: Option<i64>,
    /// The last number when we looked, and the transaction whose elders must end.
    waits: Option<(i64, String)>,
    stepped: Instant,
    swept: Instant,
}

impl Floors {
    pub(super) fn new(namespace: &Namespace) -> Self {
        let now = Instant::now();
        Self {
            state: Mutex::new(State {
                floors: HashMap::new(),
                life: None,
                waits: None,
                stepped: now,
                swept: now,
            }),
            last_number: namespace.sql(
                &format!("SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END, {LIFE} FROM evt.outbox_id_seq"),
                '.',
            ),
            lowest: namespace.sql(
                &format!("SELECT s.shard, (SELECT o.id FROM evt.outbox o WHERE o.shard = s.shard AND o.id >= s.floor ORDER BY o.id LIMIT 1),
                  pg_snapshot_xmin(pg_current_snapshot()) >= $3::text::xid8, {LIFE}
                FROM unnest($1::smallint[], $2::bigint[]) AS s (shard, floor)"),
                '.',
            ),
        }
    }

    /// The floors of shards, each the lowest id that is to be read, and the life of the server in which they are.
    pub(super) fn of(&self, shards: &[Shard]) -> (Vec<i64>, Option<i64>) {
        let mut state = self.state.lock();
        if state.swept.elapsed() >= SWEEP {
            state.swept = Instant::now();
            state.floors.clear();
        }
        let floor = |shard| state.floors.get(shard).copied().unwrap_or(i64::MIN);
        (shards.iter().map(floor).collect(), state.life)
    }

    /// Moves floors, if it is time.
    pub(super) async fn step(&self, connection: &mut PgConnection, shards: &[Shard]) -> Result<()> {
        let (waits, floors) = {
            let mut state = self.state.lock();
            if state.stepped.elapsed() < STEP {
                return Ok(());
            }
            state.stepped = Instant::now();
            let floor = |shard: &Shard| state.floors.get(shard).copied().unwrap_or(i64::MIN);
            (state.waits.clone(), shards.iter().map(floor).collect::<Vec<_>>())
        };
        let Some((last, elder)) = waits else {
            // In this order, each in a transaction of its own.
            let last = sqlx::query_as::<_, (i64, Option<i64>)>(AssertSqlSafe(self.last_number.clone()));
            let (last, life) = last.fetch_one(&mut *connection).await.map_err(from_sqlx)?;
            let elder = sqlx::query_scalar::<_, String>("SELECT pg_current_xact_id()::text");
            let elder = elder.fetch_one(connection).await.map_err(from_sqlx)?;
            let mut state = self.state.lock();
            if state.life != life {
                state.floors.clear();
                state.life = life;
            }
            state.waits = Some((last, elder));
            return Ok(());
        };
        let numbers: Vec<i16> = shards.iter().map(|shard| i16::from(shard.0)).collect();
        let query = sqlx::query(AssertSqlSafe(self.lowest.clone())).bind(numbers).bind(floors).bind(elder);
        let rows = query.fetch_all(connection).await.map_err(from_sqlx)?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let life: Option<i64> = row.try_get(3).map_err(from_sqlx)?;
            let mut state = self.state.lock();
            if life != state.life {
                // What we wait for was said in another life.
                state.waits = None;
                return Ok(());
            }
            drop(state);
            let have_ended: bool = row.try_get(2).map_err(from_sqlx)?;
            if !have_ended {
                return Ok(());
            }
            let shard = u8::try_from(row.try_get::<i16, _>(0).map_err(from_sqlx)?);
            let shard = Shard(shard.map_err(|_| unreadable("a shard"))?);
            let lowest: Option<i64> = row.try_get(1).map_err(from_sqlx)?;
            found.push((shard, lowest.map_or(last + 1, |lowest| lowest.min(last + 1))));
        }
        let mut state = self.state.lock();
        state.waits = None;
        state.floors.extend(found);
        Ok(())
    }
}
