//! Topics and partitions as rows.

use rusqlite::{OptionalExtension, params};

use super::clock;
use super::schema::{MAX_PARTITIONS, from_sqlite};
use super::writer::{End, Round};
use crate::admin::{Retention, TopicSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::refusals;

/// The id of a topic, and its number of partitions.
pub(super) const FIND: &str = "SELECT id, partitions FROM eventbus_topic WHERE name = ?1";

/// Finds a topic: its id and number of partitions.
pub(super) fn resolve(round: &mut Round<'_>, topic: &Topic) -> Result<Option<(i64, u32)>> {
    if let Some(known) = round.topics.get(topic.as_str()) {
        return Ok(Some(*known));
    }
    let found = round
        .connection
        .prepare_cached(FIND)
        .and_then(|mut s| s.query_row([topic.as_str()], |row| Ok((row.get(0)?, row.get(1)?))).optional())
        .map_err(from_sqlite)?;
    if let Some(found) = found {
        round.topics.insert(topic.as_str().to_owned(), found);
    }
    Ok(found)
}

pub(super) fn resolve_or_create(round: &mut Round<'_>, topic: &Topic, partitions: u32) -> Result<(i64, u32)> {
    match resolve(round, topic)? {
        Some(found) => Ok(found),
        None => create(round, topic, partitions, Retention::default()),
    }
}

/// Finds a topic that must exist.
pub(super) fn existing(round: &mut Round<'_>, topic: &Topic) -> Result<(i64, u32)> {
    resolve(round, topic)?.ok_or_else(|| Error::not_found("there is no such topic").with("topic", topic))
}

fn create(round: &mut Round<'_>, topic: &Topic, partitions: u32, retention: Retention) -> Result<(i64, u32)> {
    if partitions > MAX_PARTITIONS {
        return Err(
            Error::config("a topic of this store has at most 4096 partitions").with("partitions", partitions)
        );
    }
    let run = round.connection.execute(
        "INSERT INTO eventbus_topic (name, partitions, max_age, max_events) VALUES (?1, ?2, ?3, ?4)",
        params![
            topic.as_str(),
            partitions,
            retention.max_age.map(clock::nanos),
            retention.max_events.map(|events| events.get()),
        ],
    );
    run.map_err(from_sqlite)?;
    let id = round.connection.last_insert_rowid();
    let mut insert = round
        .connection
        .prepare_cached("INSERT INTO eventbus_partition (topic, partition) VALUES (?1, ?2)")
        .map_err(from_sqlite)?;
    for partition in 0..partitions {
        insert.execute(params![id, partition]).map_err(from_sqlite)?;
    }
    round.news = true;
    round.topics.insert(topic.as_str().to_owned(), (id, partitions));
    Ok((id, partitions))
}

/// Whether so many pages more fit into a file of so many, of which some are free.
pub(super) fn room(count: u64, free: u64, needed: u64, max: u64) -> Result<()> {
    match count.saturating_sub(free) + needed <= max {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Full, "the file has reached its bound")
            .with("pages", count)
            .with("max_pages", max)),
    }
}

/// A partition is at its end.
pub(super) const NUMBERED_ALL: &str = "the partition has numbered all the events it can";

/// Creates a declared topic, or verifies it.
pub(super) fn declare(round: &mut Round<'_>, spec: &TopicSpec) -> Result<bool> {
    match resolve(round, &spec.topic)? {
        None => create(round, &spec.topic, spec.partitions.get(), spec.retention).map(|_| true),
        Some((_, found)) if found == spec.partitions.get() => Ok(false),
        Some((_, found)) => Err(refusals::other_partitions(&spec.topic, spec.partitions, found)),
    }
}

/// The next offset of a partition and the newest time stored in it.
pub(super) fn end(round: &Round<'_>, topic: i64, partition: u32) -> Result<End> {
    round
        .connection
        .prepare_cached(
            "SELECT next, last_stored FROM eventbus_partition WHERE topic = ?1 AND partition = ?2",
        )
        .and_then(|mut statement| {
            statement.query_row(params![topic, partition], |row| {
                Ok(End { next: row.get(0)?, last_stored: row.get(1)? })
            })
        })
        .map_err(from_sqlite)
}

/// Deletes a topic with its events, groups and positions.
pub(super) fn delete(round: &mut Round<'_>, topic: &Topic) -> Result<()> {
    let (id, partitions) = existing(round, topic)?;
    round.topics.remove(topic.as_str());
    round.news = true;
    for partition in 0..partitions {
        super::retention::remove(round, id, partition, super::schema::MAX_OFFSET)?;
    }
    for sql in [
        "DELETE FROM eventbus_exception WHERE grp IN (SELECT id FROM eventbus_group WHERE topic = ?1)",
        "DELETE FROM eventbus_cursor WHERE grp IN (SELECT id FROM eventbus_group WHERE topic = ?1)",
        "DELETE FROM eventbus_member WHERE grp IN (SELECT id FROM eventbus_group WHERE topic = ?1)",
        "DELETE FROM eventbus_group WHERE topic = ?1",
        "DELETE FROM eventbus_partition WHERE topic = ?1",
        "DELETE FROM eventbus_topic WHERE id = ?1",
    ] {
        round.connection.execute(sql, [id]).map_err(from_sqlite)?;
    }
    Ok(())
}
