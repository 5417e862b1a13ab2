//! Administration of the database: works while programs use it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgConnection, Row};

use super::row::{event_columns, stored};
use super::store::Store;
use super::{Postgres, membership, retention, topics};
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, Retention, TopicInfo, TopicSpec};
use crate::error::Result;
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::sql::{from_sqlx, postgres_probes};
use crate::time::to_nanos;
use crate::transport::kit::refusals;
use crate::transport::kit::texts::Texts;

impl Store {
    async fn connection(&self) -> Result<PoolConnection<sqlx::Postgres>> {
        self.pool.acquire().await.map_err(from_sqlx)
    }
}

/// The topics of a name, or all, with their partitions.
async fn describe(connection: &mut PgConnection, name: Option<&Topic>) -> Result<Vec<TopicInfo>> {
    let rows = sqlx::query(
        "SELECT t.name, t.max_age, t.max_events, p.partition, p.first, p.next
         FROM eventbus_topic t JOIN eventbus_range p ON p.topic = t.id
         WHERE $1::text IS NULL OR t.name = $1 ORDER BY t.name, p.partition",
    )
    .bind(name.map(Topic::as_str))
    .fetch_all(connection)
    .await
    .map_err(from_sqlx)?;
    let mut found: Vec<TopicInfo> = Vec::new();
    for row in &rows {
        let number =
            |at: usize| row.try_get::<Option<i64>, _>(at).map(|number| number.map(i64::unsigned_abs));
        let read = || -> Result<_, sqlx::Error> {
            let retention = Retention {
                max_age: number(1)?.map(Duration::from_nanos),
                max_events: number(2)?.and_then(std::num::NonZeroU64::new),
            };
            let partition = PartitionId(row.try_get::<i32, _>(3)?.unsigned_abs());
            let (first, next) = (number(4)?.unwrap_or_default(), number(5)?.unwrap_or_default());
            Ok((
                row.try_get::<&str, _>(0)?,
                retention,
                PartitionInfo::new(partition, Offset(first), Offset(next)),
            ))
        };
        let (name, retention, partition) = read().map_err(from_sqlx)?;
        match found.last_mut().filter(|info| info.topic.as_str() == name) {
            Some(info) => info.partitions.push(partition),
            None => found.push(TopicInfo::new(Topic::new(name)?, vec![partition], retention)),
        }
    }
    Ok(found)
}

/// The topic's id and the bounds of one partition of it, which must exist.
async fn bounds(
    connection: &mut PgConnection,
    topic: &Topic,
    partition: PartitionId,
) -> Result<(i64, u64, u64)> {
    let (id, n_partitions) = topics::existing(&mut *connection, topic).await?;
    let row = sqlx::query("SELECT first, next FROM eventbus_range WHERE topic = $1 AND partition = $2")
        .bind(id)
        .bind(partition.0 as i32)
        .fetch_optional(connection)
        .await
        .map_err(from_sqlx)?;
    let row = row.ok_or_else(|| refusals::no_partition(topic, partition, n_partitions))?;
    let number = |at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs).map_err(from_sqlx);
    Ok((id, number(0)?, number(1)?))
}

async fn positions(connection: &mut PgConnection, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
    let rows = sqlx::query(
        r#"SELECT g.name, t.name, c.partition, c.floor, p.next,
             greatest(0, p.next - greatest(c.floor, p.first) - (SELECT count(*) FROM eventbus_exception x
               WHERE x.grp = g.id AND x.partition = c.partition AND x."offset" >= c.floor AND x.attempt IS NULL)),
             c.owner, m.process
           FROM eventbus_position c JOIN eventbus_group g ON g.id = c.grp JOIN eventbus_topic t ON t.id = g.topic
           JOIN eventbus_range p ON p.topic = t.id AND p.partition = c.partition
           LEFT JOIN eventbus_member m ON m.id = c.owner AND m.alive_until >= clock_timestamp()
           WHERE NOT g.ephemeral AND ($1::text IS NULL OR t.name = $1) ORDER BY g.name, t.name, c.partition"#,
    )
    .bind(topic.map(Topic::as_str))
    .fetch_all(connection)
    .await
    .map_err(from_sqlx)?;
    let info = |row: &sqlx::postgres::PgRow| -> Result<GroupInfo> {
        let number = |at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs).map_err(from_sqlx);
        let text = |at: usize| row.try_get::<&str, _>(at).map_err(from_sqlx);
        let partition = PartitionId(row.try_get::<i32, _>(2).map_err(from_sqlx)?.unsigned_abs());
        let owner: Option<i64> = row.try_get(6).map_err(from_sqlx)?;
        let process: Option<&str> = row.try_get(7).map_err(from_sqlx)?;
        let owner = owner.zip(process).map(|(owner, process)| format!("member {owner} of {process}"));
        let (group, topic) = (Group::new(text(0)?)?, Topic::new(text(1)?)?);
        let (floor, next, lag) = (Offset(number(3)?), Offset(number(4)?), number(5)?);
        Ok(GroupInfo::new(group, topic, partition, floor, next, lag).with_owner(owner))
    };
    rows.iter().map(info).collect()
}

/// Reads a range of a partition, in one statement.
const READ: &str = concat!(
    "SELECT ",
    event_columns!(),
    r#" FROM eventbus_event e WHERE e.topic = $1 AND e.partition = $2 AND e."offset" >= $3 ORDER BY e."offset" LIMIT $4"#
);

#[async_trait]
impl Admin for Postgres {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let spec = spec.clone();
        self.store
            .run(|store| async move { topics::declare(&mut *store.connection().await?, &spec).await })
            .await
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        self.store.run(|store| async move { describe(&mut *store.connection().await?, None).await }).await
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let topic = topic.clone();
        let found = self
            .store
            .run(|store| async move { describe(&mut *store.connection().await?, Some(&topic)).await });
        Ok(found.await?.pop())
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let topic = topic.clone();
        self.store
            .run(|store| async move {
                store.topics.lock().remove(&topic);
                let id = topics::delete(&mut *store.connection().await?, &topic).await?;
                store.ring(id);
                Ok(())
            })
            .await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let topic = topic.clone();
        self.store
            .run(move |store| async move {
                let mut connection = store.connection().await?;
                let (id, _, next) = bounds(&mut connection, &topic, partition).await?;
                let before = before.0.min(next) as i64;
                let removed = retention::remove(&mut connection, id, partition.0 as i32, before).await?;
                store.ring(id);
                Ok(removed)
            })
            .await
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let topic = topic.cloned();
        self.store
            .run(|store| async move {
                let mut connection = store.connection().await?;
                if let Some(topic) = &topic {
                    topics::existing(&mut connection, topic).await?;
                }
                positions(&mut connection, topic.as_ref()).await
            })
            .await
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        Ok(self.groups(Some(topic)).await?.into_iter().filter(|info| info.group == *group).collect())
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let (group, topic) = (group.clone(), topic.clone());
        self.store
            .run(|store| async move {
                let mut connection = store.connection().await?;
                let mut transaction = connection.begin().await.map_err(from_sqlx)?;
                let (_, id) = membership::idle_group(&mut transaction, &topic, group.as_str()).await?;
                membership::forget(&mut transaction, vec![id]).await?;
                transaction.commit().await.map_err(from_sqlx)
            })
            .await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let (group, topic) = (group.clone(), topic.clone());
        self.store
            .run(move |store| async move {
                let mut connection = store.connection().await?;
                let mut transaction = connection.begin().await.map_err(from_sqlx)?;
                let (_, id) = membership::idle_group(&mut transaction, &topic, group.as_str()).await?;
                let (_, first, next) = bounds(&mut transaction, &topic, partition).await?;
                sqlx::query(
                    "WITH gone AS (DELETE FROM eventbus_exception WHERE grp = $1 AND partition = $2),
                       settled AS (DELETE FROM eventbus_settled WHERE grp = $1 AND partition = $2)
                     UPDATE eventbus_cursor SET floor = $3, owner = NULL, epoch = epoch + 1 WHERE grp = $1 AND partition = $2",
                )
                .bind(id)
                .bind(partition.0 as i32)
                .bind(to.0.clamp(first, next) as i64)
                .execute(&mut *transaction)
                .await
                .map_err(from_sqlx)?;
                transaction.commit().await.map_err(from_sqlx)
            })
            .await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        let topic = topic.clone();
        let found = self
            .store
            .run(|store| async move { topics::existing(&mut *store.connection().await?, &topic).await });
        Ok(partition::of_key(key, found.await?.1))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let topic = topic.clone();
        self.store
            .run(move |store| async move {
                let mut connection = store.connection().await?;
                let (id, first, next) = bounds(&mut connection, &topic, partition).await?;
                let nanos = to_nanos(time);
                membership::first_since(&mut connection, id, partition.0, (first, next), nanos)
                    .await
                    .map(Offset)
            })
            .await
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        let topic = topic.clone();
        self.store
            .run(move |store| async move {
                let mut connection = store.connection().await?;
                let (id, ..) = bounds(&mut connection, &topic, partition).await?;
                let rows = sqlx::query(READ)
                    .bind(id)
                    .bind(partition.0 as i32)
                    .bind(i64::try_from(from.0).unwrap_or(i64::MAX))
                    .bind(i64::try_from(max).unwrap_or(i64::MAX))
                    .fetch_all(&mut *connection)
                    .await
                    .map_err(from_sqlx)?;
                // Looked at afterwards: what was there then was there before.
                let (_, first, _) = bounds(&mut connection, &topic, partition).await?;
                if from.0 < first {
                    return Err(refusals::removed(&topic, partition, from, first));
                }
                let mut texts = Texts::default();
                rows.iter()
                    .map(|row| {
                        let found = stored(row, 0, &mut texts).map_err(from_sqlx)?;
                        Ok(Record::new(partition, Offset(found.offset), found.stored_at, found.content))
                    })
                    .collect()
            })
            .await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        let look = |store: Arc<Store>| async move {
            postgres_probes(&mut *store.pool.acquire().await.map_err(from_sqlx)?).await
        };
        self.store.run(look).await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        let name = topic.clone();
        let found = self
            .store
            .run(|store| async move { topics::existing(&mut *store.connection().await?, &name).await });
        let id = found.await?.0;
        let mut bell = self.store.bells.hear(id);
        let (partitions, offsets): (Vec<i32>, Vec<i64>) =
            positions.iter().map(|(partition, offset)| (partition.0 as i32, offset.0 as i64)).unzip();
        let waiting = async {
            loop {
                bell.borrow_and_update();
                let (partitions, offsets) = (partitions.clone(), offsets.clone());
                let look = self.store.run(move |store| async move {
                    let arrived = sqlx::query(
                        r#"SELECT EXISTS (SELECT 1 FROM eventbus_range p
                           JOIN unnest($2::integer[], $3::bigint[]) AS w (partition, "offset") ON w.partition = p.partition
                           WHERE p.topic = $1 AND p.next > w."offset")"#,
                    );
                    let arrived = arrived.bind(id).bind(partitions).bind(offsets);
                    let row = arrived.fetch_one(&mut *store.connection().await?).await;
                    row.and_then(|row| row.try_get::<bool, _>(0)).map_err(from_sqlx)
                });
                if look.await? || bell.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(within, waiting).await.unwrap_or(Ok(()))
    }
}
