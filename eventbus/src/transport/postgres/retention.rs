//! Removing what retention allows: old or surplus events that every group has settled.

use std::sync::Weak;
use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};

use super::membership;
use super::store::Store;
use crate::error::Result;
use crate::sql::from_sqlx;

const TRIM_EVERY: Duration = Duration::from_secs(10);
/// Events removed of a partition in one pass, so that producers never wait long behind it.
const MAX_ROWS: i64 = 5_000;
/// Names the lock that lets one process trim at a time: "evt-trim".
const LOCK: i64 = 0x6576_742d_7472_696d;

/// Enforces retention from time to time, until the store is gone.
pub(super) async fn keep(store: Weak<Store>) {
    loop {
        tokio::time::sleep(TRIM_EVERY).await;
        let Some(store) = store.upgrade() else { return };
        let trimmed = store
            .run(|store| async move {
                let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
                trim(&mut connection).await
            })
            .await;
        if let Err(error) = trimmed {
            tracing::warn!(%error, "retention could not be enforced; it is tried again");
        }
    }
}

/// One pass over all topics; a large surplus goes in several. Nothing is done while another process does it.
async fn trim(connection: &mut PgConnection) -> Result<()> {
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    let lock = sqlx::query("SELECT pg_try_advisory_xact_lock($1)").bind(LOCK);
    let ours: bool =
        lock.fetch_one(&mut *transaction).await.and_then(|row| row.try_get(0)).map_err(from_sqlx)?;
    if !ours {
        return Ok(());
    }
    forget_dead_broadcasts(&mut transaction).await?;
    let rows = sqlx::query(
        r#"SELECT p.topic, p.partition, least(p.first + $1, coalesce(f.floor, p.next), greatest(
             CASE WHEN t.max_events IS NULL THEN p.first ELSE p.next - t.max_events END,
             coalesce((SELECT max(e."offset") + 1 FROM (
               SELECT "offset", stored_at FROM eventbus_event e
               WHERE e.topic = p.topic AND e.partition = p.partition AND e."offset" >= p.first ORDER BY "offset" LIMIT $1) e
               WHERE t.max_age IS NOT NULL
                 AND e.stored_at < (extract(epoch FROM clock_timestamp()) * 1000000)::bigint * 1000 - t.max_age), p.first)
           )) AS before
           FROM eventbus_range p JOIN eventbus_topic t ON t.id = p.topic
           LEFT JOIN (SELECT g.topic, c.partition, min(c.floor) AS floor FROM eventbus_position c
             JOIN eventbus_group g ON g.id = c.grp GROUP BY g.topic, c.partition) f
             ON f.topic = p.topic AND f.partition = p.partition
           WHERE (t.max_age IS NOT NULL OR t.max_events IS NOT NULL) AND p.first < p.next"#,
    )
    .bind(MAX_ROWS)
    .fetch_all(&mut *transaction)
    .await
    .map_err(from_sqlx)?;
    transaction.commit().await.map_err(from_sqlx)?;
    for row in rows {
        let read = || Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        let (topic, partition, before): (i64, i32, i64) = read().map_err(from_sqlx)?;
        remove(connection, topic, partition, before).await?;
    }
    Ok(())
}

/// A broadcast whose process died would hold back retention for ever. Long after its session: a server that was away
/// must not end one that lives.
async fn forget_dead_broadcasts(connection: &mut PgConnection) -> Result<()> {
    let dead = sqlx::query(
        "SELECT g.id FROM eventbus_group g WHERE g.ephemeral AND NOT EXISTS (
           SELECT 1 FROM eventbus_member m WHERE m.grp = g.id
           AND m.alive_until + interval '1 minute' >= clock_timestamp())
         FOR UPDATE SKIP LOCKED",
    );
    let dead = dead.fetch_all(&mut *connection).await.map_err(from_sqlx)?;
    let dead: Vec<i64> =
        dead.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(from_sqlx)?;
    if dead.is_empty() { Ok(()) } else { membership::forget(connection, dead).await }
}

/// Removes the events of a partition below an offset that is not above its end, in one statement. Returns how many.
pub(super) async fn remove(
    connection: &mut PgConnection,
    topic: i64,
    partition: i32,
    before: i64,
) -> Result<u64> {
    let removed = sqlx::query(
        r#"WITH moved AS (
             UPDATE eventbus_partition SET first = greatest(first, $3) WHERE topic = $1 AND partition = $2)
           DELETE FROM eventbus_event WHERE topic = $1 AND partition = $2 AND "offset" < $3"#,
    )
    .bind(topic)
    .bind(partition)
    .bind(before)
    .execute(connection)
    .await
    .map_err(from_sqlx)?;
    Ok(removed.rows_affected())
}
