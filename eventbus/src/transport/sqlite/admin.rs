//! Administration of the file: works while programs use it.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, params};

use super::schema::from_sqlite;
use super::{Sqlite, clock, fitness, membership, retention, row, topics};
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::kit::refusals;

type TopicRow = (i64, String, u32, Retention);

fn topic_rows(connection: &Connection, name: Option<&str>) -> Result<Vec<TopicRow>> {
    let sql = "SELECT id, name, partitions, max_age, max_events FROM eventbus_topic WHERE ?1 IS NULL OR name = ?1 ORDER BY name";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            let rows = statement.query_map([name], |row| {
                let retention = Retention {
                    max_age: row
                        .get::<_, Option<i64>>(3)?
                        .map(|nanos| Duration::from_nanos(nanos.unsigned_abs())),
                    max_events: row.get::<_, Option<u64>>(4)?.and_then(std::num::NonZeroU64::new),
                };
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, retention))
            })?;
            rows.collect()
        })
        .map_err(from_sqlite)
}

fn describe(connection: &Connection, (id, name, _, retention): TopicRow) -> Result<TopicInfo> {
    let sql = "SELECT partition, first, next FROM eventbus_partition WHERE topic = ?1 ORDER BY partition";
    let partitions = connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            let info = |row: &rusqlite::Row<'_>| {
                Ok(PartitionInfo::new(PartitionId(row.get(0)?), Offset(row.get(1)?), Offset(row.get(2)?)))
            };
            statement.query_map([id], info).and_then(Iterator::collect)
        })
        .map_err(from_sqlite)?;
    Ok(TopicInfo::new(Topic::new(name)?, partitions, retention))
}

/// Finds a topic's id and partitions, or reports that it is missing.
fn existing(connection: &Connection, topic: &Topic) -> Result<(i64, u32)> {
    connection
        .prepare_cached("SELECT id, partitions FROM eventbus_topic WHERE name = ?1")
        .and_then(|mut s| s.query_row([topic.as_str()], |row| Ok((row.get(0)?, row.get(1)?))).optional())
        .map_err(from_sqlite)?
        .ok_or_else(|| Error::not_found("there is no such topic").with("topic", topic))
}

/// The bounds of one partition of a topic that must exist.
fn bounds(connection: &Connection, topic: &Topic, partition: PartitionId) -> Result<(i64, u64, u64)> {
    let (id, n_partitions) = existing(connection, topic)?;
    let sql = "SELECT first, next FROM eventbus_partition WHERE topic = ?1 AND partition = ?2";
    let found: Option<(u64, u64)> = connection
        .prepare_cached(sql)
        .and_then(|mut s| {
            s.query_row(params![id, partition.0], |row| Ok((row.get(0)?, row.get(1)?))).optional()
        })
        .map_err(from_sqlite)?;
    match found {
        Some((first, next)) => Ok((id, first, next)),
        None => Err(refusals::no_partition(topic, partition, n_partitions)),
    }
}

fn group_rows(connection: &Connection, topic: Option<&str>) -> Result<Vec<GroupInfo>> {
    let sql = "SELECT g.name, t.name, c.partition, c.floor, p.first, p.next,
            (SELECT count(*) FROM eventbus_exception x WHERE x.grp = g.id AND x.partition = c.partition
             AND x.offset >= c.floor AND x.attempt IS NULL),
            c.owner, m.pid
        FROM eventbus_cursor c JOIN eventbus_group g ON g.id = c.grp JOIN eventbus_topic t ON t.id = g.topic
        JOIN eventbus_partition p ON p.topic = t.id AND p.partition = c.partition
        LEFT JOIN eventbus_member m ON m.id = c.owner AND m.alive_until >= ?2
        WHERE NOT g.ephemeral AND (?1 IS NULL OR t.name = ?1) ORDER BY g.name, t.name, c.partition";
    type GroupRow = (String, String, u32, u64, u64, u64, u64, Option<i64>, Option<u32>);
    let rows: Vec<GroupRow> = connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            let rows = statement.query_map(params![topic, clock::monotonic()], |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get(4)?,
                    row.get(5)?,
                    row.get(6)?,
                    row.get(7)?,
                    row.get(8)?,
                ))
            })?;
            rows.collect()
        })
        .map_err(from_sqlite)?;
    rows.into_iter()
        .map(|(group, topic, partition, floor, first, next, settled_above, owner, pid)| {
            let lag = next.saturating_sub(floor.max(first)).saturating_sub(settled_above);
            let info = GroupInfo::new(
                Group::new(group)?,
                Topic::new(topic)?,
                PartitionId(partition),
                Offset(floor),
                Offset(next),
                lag,
            );
            Ok(info.with_owner(owner.zip(pid).map(|(owner, pid)| format!("member {owner} of process {pid}"))))
        })
        .collect()
}

#[async_trait]
impl Admin for Sqlite {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let spec = spec.clone();
        self.store.write(move |round| topics::declare(round, &spec)).await
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        self.store
            .read(|connection| {
                topic_rows(connection, None)?.into_iter().map(|row| describe(connection, row)).collect()
            })
            .await
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let name = topic.clone();
        self.store
            .read(move |connection| {
                let found = topic_rows(connection, Some(name.as_str()))?.pop();
                found.map(|row| describe(connection, row)).transpose()
            })
            .await
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let topic = topic.clone();
        self.store.write(move |round| topics::delete(round, &topic)).await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let topic = topic.clone();
        self.store
            .write(move |round| {
                let (id, _, next) = bounds(round.connection, &topic, partition)?;
                round.news = true;
                retention::remove(round, id, partition.0, before.0.min(next))
            })
            .await
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let topic = topic.cloned();
        self.store
            .read(move |connection| {
                if let Some(topic) = &topic {
                    existing(connection, topic)?;
                }
                group_rows(connection, topic.as_ref().map(Topic::as_str))
            })
            .await
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        Ok(self.groups(Some(topic)).await?.into_iter().filter(|info| info.group == *group).collect())
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let (group, topic) = (group.clone(), topic.clone());
        self.store
            .write(move |round| {
                let (_, id) = membership::idle_group(round, &topic, group.as_str())?;
                membership::forget(round, id)
            })
            .await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let (group, topic) = (group.clone(), topic.clone());
        self.store
            .write(move |round| {
                let (_, id) = membership::idle_group(round, &topic, group.as_str())?;
                let (_, first, next) = bounds(round.connection, &topic, partition)?;
                let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| {
                    round.connection.execute(sql, values).map_err(from_sqlite)
                };
                run(
                    "DELETE FROM eventbus_exception WHERE grp = ?1 AND partition = ?2",
                    &[&id, &partition.0],
                )?;
                let to = to.0.clamp(first, next);
                run(
                    "UPDATE eventbus_cursor SET floor = ?3, owner = NULL, epoch = epoch + 1 WHERE grp = ?1 AND partition = ?2",
                    &[&id, &partition.0, &to],
                )?;
                Ok(())
            })
            .await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        let name = topic.clone();
        let (_, n_partitions) = self.store.read(move |connection| existing(connection, &name)).await?;
        Ok(partition::of_key(key, n_partitions))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let topic = topic.clone();
        self.store
            .read(move |connection| {
                let (id, first, next) = bounds(connection, &topic, partition)?;
                let nanos = clock::to_nanos(time);
                membership::first_since(connection, id, partition.0, (first, next), nanos).map(Offset)
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
            .read(move |connection| {
                let (id, first, next) = bounds(connection, &topic, partition)?;
                if from.0 < first {
                    return Err(refusals::removed(&topic, partition, from, first));
                }
                let rows = row::read(connection, id, partition.0, from.0, next, max, usize::MAX)?;
                Ok(rows
                    .into_iter()
                    .map(|row| Record::new(partition, Offset(row.offset), row.stored_at, row.content))
                    .collect())
            })
            .await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.store.read(|connection| fitness::probes(connection)).await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        let mut news = self.store.news();
        let waiting = async {
            loop {
                news.borrow_and_update();
                let Some(info) = self.topic(topic).await? else {
                    return Err(Error::not_found("there is no such topic").with("topic", topic));
                };
                let arrived = |(partition, offset): &(PartitionId, Offset)| {
                    info.partitions.iter().any(|known| known.partition == *partition && known.next > *offset)
                };
                if positions.iter().any(arrived) || news.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(within, waiting).await.unwrap_or(Ok(()))
    }
}
