//! What relays do in an SQLite file.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use eventbus::sql::from_sqlx;
use eventbus::time::{boot_id, since_boot};
use eventbus::{Error, ErrorKind, Result};
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqlitePoolOptions, SqliteRow};
use sqlx::{AssertSqlSafe, Row as _, Sqlite, SqliteConnection, SqlitePool};

use super::writer::{Unit, Writer};
use crate::backend::Uncommitted;
use crate::namespace::Namespace;
use crate::outbox::whole;
use crate::row::{Pending, RowId, Shard, Stored};
use crate::store::{Blocked, Claim, Leased, Store};

/// Connections of a relay: for claims; and one that hears of what others commit. It writes by the writer of its process.
const CONNECTIONS: u32 = 2;
/// Longest wait for the write lock.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often we look whether another process committed something.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A key that waits longer than this was noted under a clock that went back since: it is due.
const LONGEST_WAIT: &str = "360000";

#[derive(Debug)]
struct SqliteStore {
    pool: SqlitePool,
    writer: Arc<Writer>,
    /// The service's connections.
    home: SqlitePool,
    boot: String,
    sql: Sql,
}

#[derive(Debug)]
struct Sql {
    identify: Arc<str>,
    identity: Arc<str>,
    seen: Arc<str>,
    gone: Arc<str>,
    alive: Arc<str>,
    candidates: Arc<str>,
    lease: Arc<str>,
    leased: Arc<str>,
    release: Arc<str>,
    leave: Arc<str>,
    claim: Arc<str>,
    owned: Arc<str>,
    settle: Arc<str>,
    free: Arc<str>,
    block: Arc<str>,
    park: Arc<str>,
    parked: Arc<str>,
    freed: Arc<str>,
    unblock: Arc<str>,
}

impl Sql {
    fn new(namespace: &Namespace) -> Self {
        let sql = |text: &str| namespace.sql(text, '_');
        Self {
            identify: sql("INSERT OR IGNORE INTO evt_meta VALUES ('identity', ?)"),
            identity: sql("SELECT value FROM evt_meta WHERE name = 'identity'"),
            seen: sql("INSERT OR REPLACE INTO evt_outbox_relay VALUES (?, ?, ?)"),
            gone: sql("DELETE FROM evt_outbox_relay WHERE boot <> ?1 OR seen_at < ?2 OR seen_at > ?2 + 1200000"),
            alive: sql("SELECT count(*) FROM evt_outbox_relay"),
            candidates: sql("SELECT shard FROM evt_outbox_shard WHERE owner = ?1 OR owner IS NULL OR boot <> ?2 OR lease_until < ?3 OR lease_until > ?3 + 600000
                ORDER BY owner IS ?1 DESC, random() LIMIT ?4"),
            lease: sql("UPDATE evt_outbox_shard SET epoch = epoch + (owner IS NOT ?1), owner = ?1, boot = ?2, lease_until = ?3
                WHERE shard IN (SELECT value FROM json_each(?4))"),
            leased: sql("SELECT shard, epoch, lease_until = ?2 FROM evt_outbox_shard WHERE owner = ?1"),
            release: sql("UPDATE evt_outbox_shard SET owner = NULL, lease_until = 0
                WHERE owner = ? AND shard IN (SELECT value FROM json_each(?))"),
            leave: sql("DELETE FROM evt_outbox_relay WHERE relay = ?"),
            claim: sql(&format!("WITH found AS (
                  SELECT o.id, o.size, iif(b.head_id = o.id, b.attempts, 0) AS attempts FROM evt_outbox o
                  LEFT JOIN evt_outbox_blocked b ON b.shard = o.shard AND b.topic = o.topic AND b.key = o.key
                  WHERE o.shard IN (SELECT value FROM json_each(?1)) AND o.id NOT IN (SELECT value FROM json_each(?2))
                    AND (o.topic, hex(o.key)) NOT IN (SELECT x.value ->> 0, x.value ->> 1 FROM json_each(?6) x)
                    AND (b.retry_at IS NULL OR b.retry_at <= ?3 OR b.retry_at > ?3 + {LONGEST_WAIT})
                  ORDER BY o.id LIMIT ?4),
                summed AS (SELECT id, attempts, size, sum(size) OVER (ORDER BY id) AS total FROM found)
                SELECT o.id, o.shard, o.event_id, o.topic, o.key, o.has_key, o.head, o.payload, o.size, s.attempts
                FROM summed s JOIN evt_outbox o USING (id) WHERE s.total - s.size < ?5 ORDER BY o.id")),
            owned: sql("SELECT s.shard FROM evt_outbox_shard s JOIN json_each(?2) e
                ON s.shard = e.value ->> 0 AND s.epoch = e.value ->> 1 WHERE s.owner = ?1"),
            settle: sql("DELETE FROM evt_outbox WHERE id IN (SELECT o.id FROM json_each(?1) e
                JOIN evt_outbox o ON o.id = e.value ->> 1 AND o.shard = e.value ->> 0
                WHERE o.shard IN (SELECT value FROM json_each(?2)))"),
            free: sql("DELETE FROM evt_outbox_blocked WHERE (shard, head_id) IN (SELECT e.value ->> 0, e.value ->> 1 FROM json_each(?1) e)
                AND shard IN (SELECT value FROM json_each(?2))"),
            block: sql("INSERT OR REPLACE INTO evt_outbox_blocked SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8
                WHERE EXISTS (SELECT 1 FROM evt_outbox WHERE id = ?4 AND shard = ?1)"),
            park: sql("INSERT OR REPLACE INTO evt_outbox_parked (id, shard, event_id, topic, key, has_key, size, created_at, attempts, error, head, payload)
                SELECT id, shard, event_id, topic, key, has_key, size, created_at, ?2, ?3, head, payload FROM evt_outbox WHERE id = ?1"),
            parked: sql("DELETE FROM evt_outbox WHERE id = ?"),
            freed: sql("DELETE FROM evt_outbox_blocked WHERE shard = ? AND topic = ? AND key = ?"),
            unblock: sql("UPDATE evt_outbox_blocked SET retry_at = ? WHERE may_pass AND shard IN (SELECT value FROM json_each(?))"),
        }
    }
}

pub(super) fn open(home: &SqlitePool, writer: &Arc<Writer>, namespace: &Namespace) -> Arc<dyn Store> {
    let connect = (*home.connect_options()).clone().busy_timeout(TIMEOUT).create_if_missing(false);
    let pool = SqlitePoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(TIMEOUT)
        .connect_lazy_with(connect);
    let (writer, home, sql) = (writer.clone(), home.clone(), Sql::new(namespace));
    Arc::new(SqliteStore { pool, writer, home, boot: boot_id(), sql })
}

impl SqliteStore {
    async fn begin(&self) -> Result<Unit> {
        let (writer, home) = (self.writer.clone(), self.home.clone());
        whole(async move { writer.begin(&home).await }).await
    }

    async fn commit(unit: Unit) -> Result<()> {
        whole(async move { unit.commit().await.map_err(Uncommitted::told) }).await
    }

    /// One statement in a transaction of its own.
    async fn write(&self, query: Query<'_, Sqlite, SqliteArguments>) -> Result<()> {
        let mut unit = self.begin().await?;
        query.execute(&mut *unit).await.map_err(from_sqlx)?;
        Self::commit(unit).await
    }

    /// Of shards with their epochs those that are still the relay's, as a list in JSON.
    async fn owned(
        &self,
        connection: &mut SqliteConnection,
        relay: &str,
        owned: &[(Shard, i64)],
    ) -> Result<Vec<Shard>> {
        let known = list(owned.iter().map(|(shard, epoch)| (shard.0, epoch)));
        let query = sqlx::query(AssertSqlSafe(self.sql.owned.clone())).bind(relay).bind(known);
        let rows = query.fetch_all(connection).await.map_err(from_sqlx)?;
        rows.iter().map(shard).collect()
    }
}

fn list<T: serde::Serialize>(items: impl Iterator<Item = T>) -> String {
    // Numbers and pairs of them: there is nothing that JSON cannot hold.
    serde_json::to_string(&items.collect::<Vec<_>>()).unwrap_or_default()
}

/// As SQLite's `hex` writes bytes.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

fn numbers(shards: &[Shard]) -> String {
    list(shards.iter().map(|shard| shard.0))
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// Milliseconds since 1970.
fn now() -> i64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn shard(row: &SqliteRow) -> Result<Shard> {
    let number = u8::try_from(row.try_get::<i64, _>(0).map_err(from_sqlx)?);
    number.map(Shard).map_err(|_| Error::new(ErrorKind::Corrupt, "there is a shard out of range"))
}

fn pending(row: &SqliteRow) -> sqlx::Result<Pending> {
    let payload: Option<&[u8]> = row.try_get(7)?;
    let stored = Stored {
        id: row.try_get(0)?,
        shard: row.try_get(1)?,
        event_id: row.try_get(2)?,
        topic: row.try_get(3)?,
        key: Bytes::copy_from_slice(row.try_get(4)?),
        has_key: row.try_get(5)?,
        head: row.try_get(6)?,
        payload: payload.map(Bytes::copy_from_slice),
        size: row.try_get(8)?,
        attempts: row.try_get(9)?,
    };
    Ok(stored.read())
}

#[async_trait]
impl Store for SqliteStore {
    async fn identity(&self) -> Result<String> {
        let fresh = sqlx::query(AssertSqlSafe(self.sql.identify.clone())).bind(crate::store::identity());
        self.write(fresh).await?;
        let identity = sqlx::query_scalar(AssertSqlSafe(self.sql.identity.clone()));
        identity.fetch_one(&self.pool).await.map_err(from_sqlx)
    }

    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased> {
        let mut transaction = self.begin().await?;
        let (now, ttl) = (millis(since_boot()), millis(ttl));
        let seen = sqlx::query(AssertSqlSafe(self.sql.seen.clone())).bind(relay).bind(&self.boot).bind(now);
        seen.execute(&mut *transaction).await.map_err(from_sqlx)?;
        let gone = sqlx::query(AssertSqlSafe(self.sql.gone.clone())).bind(&self.boot).bind(now - ttl);
        gone.execute(&mut *transaction).await.map_err(from_sqlx)?;
        let n_relays = sqlx::query_scalar::<_, i64>(AssertSqlSafe(self.sql.alive.clone()));
        let n_relays = n_relays.fetch_one(&mut *transaction).await.map_err(from_sqlx)?.max(1);
        let count = i64::from(Shard::COUNT);
        let share = count / n_relays + i64::from(count % n_relays > 0);
        let candidates = sqlx::query(AssertSqlSafe(self.sql.candidates.clone()));
        let candidates = candidates.bind(relay).bind(&self.boot).bind(now).bind(share);
        let rows = candidates.fetch_all(&mut *transaction).await.map_err(from_sqlx)?;
        let ours = rows.iter().map(shard).collect::<Result<Vec<_>>>()?;
        let lease = sqlx::query(AssertSqlSafe(self.sql.lease.clone()));
        let lease = lease.bind(relay).bind(&self.boot).bind(now + ttl).bind(numbers(&ours));
        lease.execute(&mut *transaction).await.map_err(from_sqlx)?;
        let leased = sqlx::query(AssertSqlSafe(self.sql.leased.clone())).bind(relay).bind(now + ttl);
        let rows = leased.fetch_all(&mut *transaction).await.map_err(from_sqlx)?;
        let mut leased = Leased::default();
        for row in &rows {
            let (shard, is_renewed) = (shard(row)?, row.try_get::<bool, _>(2).map_err(from_sqlx)?);
            match is_renewed {
                true => leased.shards.push((shard, row.try_get(1).map_err(from_sqlx)?)),
                false => leased.surplus.push(shard),
            }
        }
        Self::commit(transaction).await?;
        Ok(leased)
    }

    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(self.sql.release.clone())).bind(relay).bind(numbers(shards));
        self.write(query).await
    }

    async fn leave(&self, relay: &str) -> Result<()> {
        let all: Vec<Shard> = (0..Shard::COUNT).map(Shard).collect();
        self.release(relay, &all).await?;
        let query = sqlx::query(AssertSqlSafe(self.sql.leave.clone())).bind(relay);
        self.write(query).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>> {
        let query = sqlx::query(AssertSqlSafe(self.sql.claim.clone()))
            .bind(numbers(&claim.shards))
            .bind(list(claim.held.iter().map(|id| id.0)))
            .bind(now())
            .bind(i64::try_from(claim.max_events).unwrap_or(i64::MAX))
            .bind(i64::try_from(claim.max_bytes).unwrap_or(i64::MAX))
            .bind(list(claim.full.iter().map(|(topic, key)| (topic, hex(key)))));
        let rows = query.fetch_all(&self.pool).await.map_err(from_sqlx)?;
        rows.iter().map(pending).collect::<sqlx::Result<_>>().map_err(from_sqlx)
    }

    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>> {
        let mut transaction = self.begin().await?;
        let owned = self.owned(&mut transaction, relay, owned).await?;
        let (ids, shards) = (list(published.iter().map(|(shard, id)| (shard.0, id.0))), numbers(&owned));
        for statement in [&self.sql.settle, &self.sql.free] {
            let query = sqlx::query(AssertSqlSafe(statement.clone())).bind(&ids).bind(&shards);
            query.execute(&mut *transaction).await.map_err(from_sqlx)?;
        }
        Self::commit(transaction).await?;
        Ok(owned)
    }

    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()> {
        let mut transaction = self.begin().await?;
        let owned = self.owned(&mut transaction, relay, owned).await?;
        for key in blocked.iter().filter(|key| owned.contains(&key.shard)) {
            let query = sqlx::query(AssertSqlSafe(self.sql.block.clone()))
                .bind(i64::from(key.shard.0))
                .bind(&key.topic)
                .bind(key.key.as_ref())
                .bind(key.head.0)
                .bind(i64::from(key.attempts))
                .bind(key.may_pass)
                .bind(now() + millis(key.retry_in))
                .bind(&key.error);
            query.execute(&mut *transaction).await.map_err(from_sqlx)?;
        }
        Self::commit(transaction).await
    }

    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()> {
        let mut transaction = self.begin().await?;
        let owned = self.owned(&mut transaction, relay, owned).await?;
        for key in parked.iter().filter(|key| owned.contains(&key.shard)) {
            let query = sqlx::query(AssertSqlSafe(self.sql.park.clone()));
            let query = query.bind(key.head.0).bind(i64::from(key.attempts)).bind(&key.error);
            query.execute(&mut *transaction).await.map_err(from_sqlx)?;
            let query = sqlx::query(AssertSqlSafe(self.sql.parked.clone())).bind(key.head.0);
            query.execute(&mut *transaction).await.map_err(from_sqlx)?;
            let query = sqlx::query(AssertSqlSafe(self.sql.freed.clone()));
            let query = query.bind(i64::from(key.shard.0)).bind(&key.topic).bind(key.key.as_ref());
            query.execute(&mut *transaction).await.map_err(from_sqlx)?;
        }
        Self::commit(transaction).await
    }

    async fn unblock(&self, shards: &[Shard]) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(self.sql.unblock.clone())).bind(now()).bind(numbers(shards));
        self.write(query).await
    }

    async fn news(&self) {
        let Ok(mut connection) = self.pool.acquire().await else { return std::future::pending().await };
        let mut before = None;
        loop {
            let version =
                sqlx::query_scalar::<_, i64>("PRAGMA data_version").fetch_one(&mut *connection).await;
            match (version, before) {
                (Ok(version), Some(before)) if version != before => return,
                (Ok(version), _) => before = Some(version),
                (Err(_), _) => return std::future::pending().await,
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}
