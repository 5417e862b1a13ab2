//! What relays do in PostgreSQL.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use eventbus::Result;
use eventbus::sql::from_sqlx;
use parking_lot::Mutex;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgListener, PgPoolOptions, PgRow};
use sqlx::{AssertSqlSafe, PgPool, Postgres, Row as _};
use tokio::sync::Mutex as AsyncMutex;

use super::floor::Floors;
use super::{CHANNEL, LIFE, unreadable};
use crate::namespace::Namespace;
use crate::row::{Pending, RowId, Shard, Stored};
use crate::store::{Blocked, Claim, Leased, Store};

/// Connections of a relay: claims, settles, leases, news.
const CONNECTIONS: u32 = 4;
/// Longest wait for a connection, and for a statement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The pause before listening again, where that failed: relays look by themselves.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// A key that waits longer than this was noted by a server whose clock went back since: it is due.
const LONGEST_WAIT: &str = "interval '6 min'";

#[derive(Debug)]
struct PostgresStore {
    pool: PgPool,
    floors: Floors,
    sql: Sql,
    /// Whether a relay reads where dead rows may be many: then floors move.
    busy: Mutex<bool>,
    channel: Arc<str>,
    listener: AsyncMutex<Option<PgListener>>,
}

#[derive(Debug)]
struct Sql {
    identity: Arc<str>,
    alive: Arc<str>,
    lease: Arc<str>,
    surplus: Arc<str>,
    orphans: Arc<str>,
    release: Arc<str>,
    leave: Arc<str>,
    claim: Arc<str>,
    settle: Arc<str>,
    block: Arc<str>,
    park: Arc<str>,
    unblock: Arc<str>,
}

/// The rows of a statement's `owned`: shards that are still the relay's when it begins. Another may take them before it ends;
/// what it says then of an event that was published is true all the same.
const OWNED: &str = "WITH owned AS MATERIALIZED (
  SELECT s.shard FROM evt.outbox_shard s JOIN unnest($2::smallint[], $3::bigint[]) AS e (shard, epoch)
    ON s.shard = e.shard AND s.epoch = e.epoch
  WHERE s.owner = $1 ORDER BY s.shard FOR KEY SHARE OF s)";

/// What no number is below.
const LOWEST: i64 = i64::MIN;

/// The rows of a statement's `keys`.
const KEYS: &str = "keys AS (SELECT * FROM unnest($4::smallint[], $5::text[], $6::bytea[], $7::bigint[], $8::integer[], $9::boolean[],
  $10::float8[], $11::text[]) AS k (shard, topic, key, head_id, attempts, may_pass, retry_in, error) JOIN owned USING (shard))";

impl Sql {
    fn new(namespace: &Namespace) -> Self {
        let sql = |text: &str| namespace.sql(text, '.');
        Self {
            identity: sql("WITH made AS (INSERT INTO evt.meta VALUES ('identity', $1) ON CONFLICT DO NOTHING RETURNING value)
                SELECT value FROM made UNION ALL SELECT value FROM evt.meta WHERE name = 'identity' LIMIT 1"),
            alive: sql("WITH seen AS (INSERT INTO evt.outbox_relay VALUES ($1, clock_timestamp())
                  ON CONFLICT (relay) DO UPDATE SET seen_at = excluded.seen_at),
                gone AS (DELETE FROM evt.outbox_relay WHERE abs(extract(epoch FROM seen_at - clock_timestamp())) > 10 * $2::float8 AND relay <> $1)
                SELECT 1 + count(*) FROM evt.outbox_relay WHERE relay <> $1
                  AND abs(extract(epoch FROM seen_at - clock_timestamp())) < $2::float8"),
            // A lease that is longer than leases are is of before the clock went back.
            lease: sql("UPDATE evt.outbox_shard s SET owner = $1, lease_until = clock_timestamp() + $2::float8 * interval '1 s', lease_seconds = $2::float8,
                  epoch = s.epoch + (s.owner IS DISTINCT FROM $1)::integer
                WHERE s.shard IN (SELECT shard FROM evt.outbox_shard
                  WHERE owner = $1 OR owner IS NULL OR lease_until < clock_timestamp()
                    OR lease_until > clock_timestamp() + 2 * lease_seconds * interval '1 s'
                  ORDER BY (owner IS DISTINCT FROM $1), random() LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED)
                RETURNING s.shard, s.epoch"),
            surplus: sql("SELECT shard FROM evt.outbox_shard WHERE owner = $1 AND shard <> ALL ($2::smallint[])"),
            // A note that a key is blocked may be written while the event is removed, as neither sees the other.
            orphans: sql("DELETE FROM evt.outbox_blocked b WHERE b.shard = ANY ($1::smallint[])
                AND NOT EXISTS (SELECT 1 FROM evt.outbox o WHERE o.shard = b.shard AND o.id = b.head_id)"),
            release: sql("UPDATE evt.outbox_shard SET owner = NULL, lease_until = '-infinity' WHERE owner = $1 AND shard = ANY ($2::smallint[])"),
            leave: sql("WITH gone AS (DELETE FROM evt.outbox_relay WHERE relay = $1)
                UPDATE evt.outbox_shard SET owner = NULL, lease_until = '-infinity' WHERE owner = $1"),
            // Whether a key is due is asked of the time at which the statement began: of a time that goes on, a later event of a key
            // could be due where an earlier one just was not. What is left out is looked up in hash tables, which lists
            // (`<> ALL`) and joins of a plan that knows no sizes are not: thousands of rows are passed by thousands.
            claim: sql(&format!("SELECT id, shard, event_id, topic, key, has_key, head::text, payload, size,
                  coalesce((SELECT b.attempts FROM evt.outbox_blocked b
                    WHERE b.shard = q.shard AND b.topic = q.topic AND b.key = q.key AND b.head_id = q.id), 0)
                FROM (
                  SELECT f.*, sum(f.size) OVER (ORDER BY f.place, f.id) AS total FROM (
                    SELECT s.place, o.* FROM (
                      SELECT u.shard, u.place, CASE WHEN (SELECT {LIFE}) = $8 THEN u.floor ELSE '{LOWEST}'::bigint END AS floor
                      FROM unnest($1::smallint[], $2::bigint[]) WITH ORDINALITY AS u (shard, floor, place)) s
                    CROSS JOIN LATERAL (
                      SELECT o.id, o.shard, o.event_id, o.topic, o.key, o.has_key, o.head, o.payload, o.size::bigint
                      FROM evt.outbox o
                      WHERE o.shard = s.shard AND o.id >= s.floor AND o.id NOT IN (SELECT unnest($3::bigint[]))
                        AND (o.topic, o.key) NOT IN (SELECT x.topic, x.key FROM unnest($6::text[], $7::bytea[]) AS x (topic, key))
                        AND (o.topic, o.key) NOT IN (SELECT b.topic, b.key FROM evt.outbox_blocked b WHERE b.shard = ANY ($1::smallint[])
                          AND b.retry_at > now() AND b.retry_at <= now() + {LONGEST_WAIT})
                      ORDER BY o.id LIMIT $9) o
                    ORDER BY s.place, o.id LIMIT $4) f) q
                WHERE total - size < $5 ORDER BY place, id")),
            settle: sql(&format!("{OWNED}, ids AS MATERIALIZED (
                  SELECT i.shard, i.id FROM unnest($4::smallint[], $5::bigint[]) AS i (shard, id) JOIN owned USING (shard)),
                gone AS (DELETE FROM evt.outbox o USING ids i WHERE o.shard = i.shard AND o.id = i.id),
                freed AS (DELETE FROM evt.outbox_blocked b USING ids i WHERE b.shard = i.shard AND b.head_id = i.id)
                SELECT shard FROM owned")),
            block: sql(&format!("{OWNED}, {KEYS}
                INSERT INTO evt.outbox_blocked
                SELECT shard, topic, key, head_id, attempts, may_pass, clock_timestamp() + retry_in * interval '1 s', error FROM keys k
                WHERE EXISTS (SELECT 1 FROM evt.outbox o WHERE o.shard = k.shard AND o.id = k.head_id)
                ON CONFLICT (shard, topic, key) DO UPDATE SET head_id = excluded.head_id, attempts = excluded.attempts,
                  may_pass = excluded.may_pass, retry_at = excluded.retry_at, error = excluded.error")),
            park: sql(&format!("{OWNED}, {KEYS},
                gone AS (DELETE FROM evt.outbox o USING keys k WHERE o.shard = k.shard AND o.id = k.head_id RETURNING o.*, k.attempts, k.error),
                freed AS (DELETE FROM evt.outbox_blocked b USING keys k WHERE b.shard = k.shard AND b.topic = k.topic AND b.key = k.key)
                INSERT INTO evt.outbox_parked (id, shard, event_id, topic, key, has_key, head, payload, size, created_at, attempts, error)
                SELECT id, shard, event_id, topic, key, has_key, head, payload, size, created_at, attempts, error FROM gone
                ON CONFLICT (id) DO UPDATE SET error = excluded.error, attempts = excluded.attempts, parked_at = clock_timestamp()")),
            unblock: sql("UPDATE evt.outbox_blocked SET retry_at = now() WHERE may_pass AND retry_at > now() AND shard = ANY ($1::smallint[])"),
        }
    }
}

pub(super) async fn open(pool: &PgPool, namespace: &Namespace) -> Result<Arc<dyn Store>> {
    // Relays read along an index whatever the statistics say, which are of another moment. What they write says only what was
    // done: lost with the server, it is done again.
    let connect = (*pool.connect_options()).clone().application_name("outbox-relay").options([
        ("enable_seqscan", "off"),
        ("enable_bitmapscan", "off"),
        // What is guessed of 64 shards looks dear, and compiling the plan takes longer than what it does.
        ("jit", "off"),
        // For hash tables of keys in hand and blocked: hundreds of thousands after an outage.
        ("work_mem", "64MB"),
        ("synchronous_commit", "off"),
        ("statement_timeout", "10s"),
    ]);
    let pool =
        PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(TIMEOUT).connect_lazy_with(connect);
    let (floors, sql) = (Floors::new(namespace), Sql::new(namespace));
    let (channel, listener) = (namespace.sql(CHANNEL, '.'), AsyncMutex::default());
    Ok(Arc::new(PostgresStore { pool, floors, sql, busy: Mutex::new(false), channel, listener }))
}

impl PostgresStore {
    async fn listen(&self) -> sqlx::Result<PgListener> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(&self.channel).await?;
        Ok(listener)
    }

    async fn connection(&self) -> Result<PoolConnection<Postgres>> {
        self.pool.acquire().await.map_err(from_sqlx)
    }
}

fn numbers(shards: &[Shard]) -> Vec<i16> {
    shards.iter().map(|shard| i16::from(shard.0)).collect()
}

fn epochs(owned: &[(Shard, i64)]) -> (Vec<i16>, Vec<i64>) {
    owned.iter().map(|(shard, epoch)| (i16::from(shard.0), *epoch)).unzip()
}

fn shard(row: &PgRow) -> Result<Shard> {
    let number: i16 = row.try_get(0).map_err(from_sqlx)?;
    u8::try_from(number).map(Shard).map_err(|_| unreadable("a shard"))
}

fn pending(row: &PgRow) -> sqlx::Result<Pending> {
    let payload: Option<&[u8]> = row.try_get(7)?;
    let stored = Stored {
        id: row.try_get(0)?,
        shard: i64::from(row.try_get::<i16, _>(1)?),
        event_id: row.try_get(2)?,
        topic: row.try_get(3)?,
        key: Bytes::copy_from_slice(row.try_get(4)?),
        has_key: row.try_get(5)?,
        head: row.try_get(6)?,
        payload: payload.map(Bytes::copy_from_slice),
        size: row.try_get(8)?,
        attempts: i64::from(row.try_get::<i32, _>(9)?),
    };
    Ok(stored.read())
}

#[async_trait]
impl Store for PostgresStore {
    async fn identity(&self) -> Result<String> {
        let fresh = crate::store::identity();
        loop {
            let mut transaction = self.pool.begin().await.map_err(from_sqlx)?;
            // Unlike what is written later, it is told to others: it must not vanish with the server.
            let durable = sqlx::raw_sql("SET LOCAL synchronous_commit = on").execute(&mut *transaction);
            durable.await.map_err(from_sqlx)?;
            let query = sqlx::query_scalar(AssertSqlSafe(self.sql.identity.clone())).bind(&fresh);
            let found = query.fetch_optional(&mut *transaction).await.map_err(from_sqlx)?;
            transaction.commit().await.map_err(from_sqlx)?;
            // Nothing is returned when another relay made one in this moment.
            if let Some(identity) = found {
                return Ok(identity);
            }
        }
    }

    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased> {
        let mut connection = self.connection().await?;
        let ttl = ttl.as_secs_f64();
        let alive = sqlx::query_scalar::<_, i64>(AssertSqlSafe(self.sql.alive.clone())).bind(relay).bind(ttl);
        let n_relays = alive.fetch_one(&mut *connection).await.map_err(from_sqlx)?.max(1);
        let share = i64::from(Shard::COUNT).div_euclid(n_relays)
            + i64::from(i64::from(Shard::COUNT).rem_euclid(n_relays) > 0);
        let lease = sqlx::query(AssertSqlSafe(self.sql.lease.clone())).bind(relay).bind(ttl).bind(share);
        let rows = lease.fetch_all(&mut *connection).await.map_err(from_sqlx)?;
        let mut shards = Vec::with_capacity(rows.len());
        for row in &rows {
            shards.push((shard(row)?, row.try_get(1).map_err(from_sqlx)?));
        }
        let ours: Vec<i16> = shards.iter().map(|(shard, _)| i16::from(shard.0)).collect();
        let orphans = sqlx::query(AssertSqlSafe(self.sql.orphans.clone())).bind(&ours);
        orphans.execute(&mut *connection).await.map_err(from_sqlx)?;
        let surplus = sqlx::query(AssertSqlSafe(self.sql.surplus.clone())).bind(relay).bind(ours);
        let surplus = surplus.fetch_all(&mut *connection).await.map_err(from_sqlx)?;
        Ok(Leased { shards, surplus: surplus.iter().map(shard).collect::<Result<_>>()? })
    }

    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(self.sql.release.clone())).bind(relay).bind(numbers(shards));
        query.execute(&self.pool).await.map_err(from_sqlx).map(drop)
    }

    async fn leave(&self, relay: &str) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(self.sql.leave.clone())).bind(relay);
        query.execute(&self.pool).await.map_err(from_sqlx).map(drop)
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>> {
        let mut connection = self.connection().await?;
        if *self.busy.lock() {
            self.floors.step(&mut connection, &claim.shards).await?;
        }
        let (floors, life) = self.floors.of(&claim.shards);
        let held: Vec<i64> = claim.held.iter().map(|id| id.0).collect();
        let query = sqlx::query(AssertSqlSafe(self.sql.claim.clone()))
            .bind(numbers(&claim.shards))
            .bind(floors)
            .bind(held)
            .bind(i64::try_from(claim.max_events).unwrap_or(i64::MAX))
            .bind(i64::try_from(claim.max_bytes).unwrap_or(i64::MAX))
            .bind(claim.full.iter().map(|(topic, _)| topic.as_str()).collect::<Vec<_>>())
            .bind(claim.full.iter().map(|(_, key)| key.as_ref()).collect::<Vec<&[u8]>>())
            .bind(life)
            .bind(i64::try_from(claim.max_of_shard).unwrap_or(i64::MAX));
        let rows = query.fetch_all(&mut *connection).await.map_err(from_sqlx)?;
        *self.busy.lock() = !rows.is_empty();
        rows.iter().map(pending).collect::<sqlx::Result<_>>().map_err(from_sqlx)
    }

    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>> {
        let (shards, epochs) = epochs(owned);
        let (of, ids): (Vec<i16>, Vec<i64>) =
            published.iter().map(|(shard, id)| (i16::from(shard.0), id.0)).unzip();
        let query = sqlx::query(AssertSqlSafe(self.sql.settle.clone()));
        let query = query.bind(relay).bind(shards).bind(epochs).bind(of).bind(ids);
        let rows = query.fetch_all(&self.pool).await.map_err(from_sqlx)?;
        rows.iter().map(shard).collect()
    }

    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()> {
        self.note(&self.sql.block, relay, owned, blocked).await
    }

    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()> {
        self.note(&self.sql.park, relay, owned, parked).await
    }

    async fn unblock(&self, shards: &[Shard]) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(self.sql.unblock.clone())).bind(numbers(shards));
        query.execute(&self.pool).await.map_err(from_sqlx).map(drop)
    }

    async fn news(&self) {
        let mut listener = self.listener.lock().await;
        loop {
            let heard = match &mut *listener {
                Some(listener) => listener.recv().await.map(|_| true),
                None => match self.listen().await {
                    Ok(found) => {
                        *listener = Some(found);
                        Ok(false)
                    }
                    Err(error) => Err(error),
                },
            };
            match heard {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(%error, "what other processes commit is looked for");
                    *listener = None;
                    tokio::time::sleep(LISTEN_AGAIN).await;
                }
            }
        }
    }

    async fn close(&self) {
        // One that is listening ends with its pool.
        if let Ok(mut listener) = self.listener.try_lock() {
            listener.take();
        }
        self.pool.close().await;
    }
}

impl PostgresStore {
    async fn note(
        &self,
        statement: &Arc<str>,
        relay: &str,
        owned: &[(Shard, i64)],
        keys: &[Blocked],
    ) -> Result<()> {
        let (shards, epochs) = epochs(owned);
        let query = sqlx::query(AssertSqlSafe(statement.clone()))
            .bind(relay)
            .bind(shards)
            .bind(epochs)
            .bind(keys.iter().map(|key| i16::from(key.shard.0)).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| key.topic.as_str()).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| key.key.as_ref()).collect::<Vec<&[u8]>>())
            .bind(keys.iter().map(|key| key.head.0).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| i32::try_from(key.attempts).unwrap_or(i32::MAX)).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| key.may_pass).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| key.retry_in.as_secs_f64()).collect::<Vec<_>>())
            .bind(keys.iter().map(|key| key.error.as_str()).collect::<Vec<_>>());
        query.execute(&self.pool).await.map_err(from_sqlx).map(drop)
    }
}
