//! Topics and partitions as rows.

use sqlx::{PgConnection, Row};

use super::store::Store;
use crate::admin::{Retention, TopicSpec};
use crate::error::{Error, Result};
use crate::name::Topic;
use crate::sql::from_sqlx;
use crate::time::nanos;
use crate::transport::kit::refusals;

/// Most partitions of a topic in this store.
pub(super) const MAX_PARTITIONS: u32 = 4096;

/// Finds a topic: its id and number of partitions.
pub(super) async fn find(connection: &mut PgConnection, topic: &Topic) -> Result<Option<(i64, u32)>> {
    let row = sqlx::query("SELECT id, partitions FROM eventbus_topic WHERE name = $1")
        .bind(topic.as_str())
        .fetch_optional(connection)
        .await
        .map_err(from_sqlx)?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get::<i32, _>(1)?.unsigned_abs())))
        .transpose()
        .map_err(from_sqlx)
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}

/// Finds a topic that must exist.
pub(super) async fn existing(connection: &mut PgConnection, topic: &Topic) -> Result<(i64, u32)> {
    find(connection, topic).await?.ok_or_else(|| missing(topic))
}

impl Store {
    /// Finds a topic, from memory where it is known, and creates it where that is wanted.
    pub(super) async fn resolve(&self, connection: &mut PgConnection, topic: &Topic) -> Result<(i64, u32)> {
        if let Some(known) = self.topics.lock().get(topic) {
            return Ok(*known);
        }
        let found = match find(connection, topic).await? {
            Some(found) => found,
            None if self.options.create_topics => {
                create(connection, topic, self.options.partitions, Retention::default()).await?;
                existing(connection, topic).await?
            }
            None => return Err(missing(topic).with("hint", "create it, or say declare=create")),
        };
        self.topics.lock().insert(topic.clone(), found);
        Ok(found)
    }
}

/// Creates a topic with its partitions in one statement; false if it exists.
async fn create(
    connection: &mut PgConnection,
    topic: &Topic,
    partitions: u32,
    retention: Retention,
) -> Result<bool> {
    if partitions > MAX_PARTITIONS {
        return Err(
            Error::config("a topic of this store has at most 4096 partitions").with("partitions", partitions)
        );
    }
    let created = sqlx::query(
        "WITH created AS (
           INSERT INTO eventbus_topic (name, partitions, max_age, max_events) VALUES ($1, $2, $3, $4)
           ON CONFLICT (name) DO NOTHING RETURNING id)
         INSERT INTO eventbus_partition (topic, partition)
         SELECT id, partition FROM created, generate_series(0, $2 - 1) AS partition",
    )
    .bind(topic.as_str())
    .bind(partitions as i32)
    .bind(retention.max_age.map(nanos))
    .bind(retention.max_events.map(|events| i64::try_from(events.get()).unwrap_or(i64::MAX)))
    .execute(connection)
    .await
    .map_err(from_sqlx)?;
    Ok(created.rows_affected() > 0)
}

/// Creates a declared topic, or verifies it.
pub(super) async fn declare(connection: &mut PgConnection, spec: &TopicSpec) -> Result<bool> {
    if create(connection, &spec.topic, spec.partitions.get(), spec.retention).await? {
        return Ok(true);
    }
    let (_, found) = existing(connection, &spec.topic).await?;
    if found == spec.partitions.get() {
        return Ok(false);
    }
    Err(refusals::other_partitions(&spec.topic, spec.partitions, found))
}

/// Deletes a topic with its events, groups and positions, in one statement. Returns its id.
pub(super) async fn delete(connection: &mut PgConnection, topic: &Topic) -> Result<i64> {
    let (id, _) = existing(connection, topic).await?;
    sqlx::query(
        "WITH groups AS (DELETE FROM eventbus_group WHERE topic = $1 RETURNING id),
           exceptions AS (DELETE FROM eventbus_exception USING groups WHERE grp = groups.id),
           settled AS (DELETE FROM eventbus_settled USING groups WHERE grp = groups.id),
           cursors AS (DELETE FROM eventbus_cursor USING groups WHERE grp = groups.id),
           members AS (DELETE FROM eventbus_member USING groups WHERE grp = groups.id),
           partitions AS (DELETE FROM eventbus_partition WHERE topic = $1),
           events AS (DELETE FROM eventbus_event WHERE topic = $1)
         DELETE FROM eventbus_topic WHERE id = $1",
    )
    .bind(id)
    .execute(connection)
    .await
    .map_err(from_sqlx)?;
    Ok(id)
}
