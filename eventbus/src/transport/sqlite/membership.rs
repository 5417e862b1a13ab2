//! Groups as rows: who is a member, who owns which partition, where the group stands.
//!
//! Every member computes the same targets from the same rows. A partition has one owner at a time;
//! each ownership has an epoch, and every write of an owner names it, so that one who lost the
//! partition changes nothing.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;

use rusqlite::{OptionalExtension, params};
use tokio::time::Instant;

use super::clock;
use super::schema::{from_sqlite, position};
use super::topics;
use super::writer::Round;
use crate::error::{Error, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::{Audience, Start, Subscription};
use crate::transport::kit::cursor::Past;
use crate::transport::kit::leased::{self, Gained, Progress, Share, Standing, Step};

/// A group of a topic.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupRow {
    pub(super) topic: i64,
    pub(super) id: i64,
    pub(super) ephemeral: bool,
}

/// A member of a group.
pub(super) type Seat = leased::Seat<GroupRow>;

/// Joins a group, creating topic and group where they are missing.
pub(super) fn join(
    round: &mut Round<'_>,
    subscription: &Subscription,
    partitions: u32,
    session: i64,
) -> Result<Seat> {
    let (topic, n_partitions) = topics::resolve_or_create(round, &subscription.topic, partitions)?;
    let ephemeral = matches!(subscription.audience, Audience::Broadcast);
    let name = match &subscription.audience {
        Audience::Group(group) => group.as_str().to_owned(),
        // Not a valid group name, so that no group can ever meet it.
        Audience::Broadcast => format!("broadcast:{}", crate::EventId::generate()),
    };
    let found: Option<i64> = round
        .connection
        .prepare_cached("SELECT id FROM eventbus_group WHERE topic = ?1 AND name = ?2")
        .and_then(|mut statement| statement.query_row(params![topic, name], |row| row.get(0)).optional())
        .map_err(from_sqlite)?;
    let group = match found {
        Some(group) => group,
        None => {
            let sql = "INSERT INTO eventbus_group (name, topic, ephemeral) VALUES (?1, ?2, ?3)";
            round.connection.execute(sql, params![name, topic, ephemeral]).map_err(from_sqlite)?;
            let group = round.connection.last_insert_rowid();
            for partition in 0..n_partitions {
                let floor = start_of(round, topic, partition, &subscription.start)?;
                round
                    .connection
                    .prepare_cached("INSERT INTO eventbus_cursor (grp, partition, floor) VALUES (?1, ?2, ?3)")
                    .and_then(|mut statement| statement.execute(params![group, partition, floor]))
                    .map_err(from_sqlite)?;
            }
            group
        }
    };
    let member = enter(round, group, session)?;
    Ok(Seat { group: GroupRow { topic, id: group, ephemeral }, member })
}

fn enter(round: &mut Round<'_>, group: i64, session: i64) -> Result<u64> {
    let alive_until = clock::monotonic().saturating_add(session);
    let sql = "INSERT INTO eventbus_member (grp, alive_until, pid) VALUES (?1, ?2, ?3)";
    round.connection.execute(sql, params![group, alive_until, std::process::id()]).map_err(from_sqlite)?;
    let member = round.connection.last_insert_rowid();
    bump(round, group)?;
    Ok(member.unsigned_abs())
}

/// Tells the other members to look at the group.
fn bump(round: &mut Round<'_>, group: i64) -> Result<()> {
    round.news = true;
    round
        .connection
        .prepare_cached("UPDATE eventbus_group SET generation = generation + 1 WHERE id = ?1")
        .and_then(|mut statement| statement.execute([group]))
        .map(drop)
        .map_err(from_sqlite)
}

/// The first and the next offset of a partition.
pub(super) fn bounds(round: &Round<'_>, topic: i64, partition: u32) -> Result<(u64, u64)> {
    round
        .connection
        .prepare_cached("SELECT first, next FROM eventbus_partition WHERE topic = ?1 AND partition = ?2")
        .and_then(|mut statement| {
            statement.query_row(params![topic, partition], |row| Ok((row.get(0)?, row.get(1)?)))
        })
        .map_err(from_sqlite)
}

fn start_of(round: &Round<'_>, topic: i64, partition: u32, start: &Start) -> Result<u64> {
    let (first, next) = bounds(round, topic, partition)?;
    Ok(match start {
        Start::Latest => next,
        Start::Earliest => first,
        Start::Offsets(offsets) => {
            offsets.get(&PartitionId(partition)).map_or(first, |at| at.0).clamp(first, next)
        }
        Start::Time(time) => {
            first_since(round.connection, topic, partition, (first, next), clock::to_nanos(*time))?
        }
    })
}

/// The first offset stored at or after a time. Stored times never descend, so halving finds it.
pub(super) fn first_since(
    connection: &rusqlite::Connection,
    topic: i64,
    partition: u32,
    (mut low, mut high): (u64, u64),
    time: i64,
) -> Result<u64> {
    let sql = "SELECT stored_at FROM eventbus_event WHERE position >= ?1 ORDER BY position LIMIT 1";
    let mut statement = connection.prepare_cached(sql).map_err(from_sqlite)?;
    while low < high {
        let middle = low + (high - low) / 2;
        let stored: i64 = statement
            .query_row([position(topic, partition, middle)], |row| row.get(0))
            .map_err(from_sqlite)?;
        if stored < time { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}

/// Says that a member lives, removes those that do not, and takes what should be ours.
pub(super) fn stand(
    round: &mut Round<'_>,
    seat: &Seat,
    known: &BTreeMap<u32, u32>,
    session: i64,
) -> Result<Standing> {
    let (now, group) = (clock::monotonic(), seat.group.id);
    let connection = round.connection;
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| {
        connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(values))
            .map_err(from_sqlite)
    };
    if generation(connection, group)?.is_none() {
        return Err(Error::not_found("the topic or group was deleted"));
    }
    let alive = run(
        "UPDATE eventbus_member SET alive_until = ?2 WHERE id = ?1",
        &[&seat.member, &now.saturating_add(session)],
    )?;
    let member = if alive == 1 { seat.member } else { enter(round, group, session)? };
    // A deadline far beyond any session is of another boot of a machine that does not name its boots.
    let far = now.saturating_add(86_400_000_000_000);
    let sql = "DELETE FROM eventbus_member WHERE grp = ?1 AND (alive_until < ?2 OR alive_until > ?3)";
    let n_dead = run(sql, &[&group, &now, &far])?;
    run(
        "UPDATE eventbus_cursor SET owner = NULL WHERE grp = ?1 AND owner IS NOT NULL
         AND owner NOT IN (SELECT id FROM eventbus_member WHERE grp = ?1)",
        &[&group],
    )?;
    if n_dead > 0 {
        bump(round, group)?;
    }
    let members: Vec<u64> = connection
        .prepare_cached("SELECT id FROM eventbus_member WHERE grp = ?1 ORDER BY id")
        .and_then(|mut statement| statement.query_map([group], |row| row.get(0)).and_then(Iterator::collect))
        .map_err(from_sqlite)?;
    let cursors: Vec<(Share, u64)> = connection
        .prepare_cached(
            "SELECT partition, owner, epoch, floor FROM eventbus_cursor WHERE grp = ?1 ORDER BY partition",
        )
        .and_then(|mut statement| {
            let cursor = |row: &rusqlite::Row<'_>| {
                Ok((Share { partition: row.get(0)?, owner: row.get(1)?, epoch: row.get(2)? }, row.get(3)?))
            };
            statement.query_map([group], cursor).and_then(Iterator::collect)
        })
        .map_err(from_sqlite)?;
    let shares: Vec<Share> = cursors.iter().map(|(share, _)| *share).collect();
    let (steps, lost) = leased::steps(member, &members, &shares, known);
    let mut standing = Standing { member, generation: 0, gained: Vec::new(), lost, to_release: Vec::new() };
    for ((Share { partition, mut epoch, .. }, floor), step) in cursors.into_iter().zip(steps) {
        match step {
            Step::Keep => continue,
            Step::Release => {
                standing.to_release.push(partition);
                continue;
            }
            Step::Load => {}
            Step::Take => {
                let sql = "UPDATE eventbus_cursor SET owner = ?3, epoch = epoch + 1 WHERE grp = ?1 AND partition = ?2";
                run(sql, &[&group, &partition, &member])?;
                epoch += 1;
            }
        }
        let exceptions = exceptions(connection, group, partition)?;
        standing.gained.push(Gained { partition, epoch, floor, exceptions });
    }
    standing.generation = generation(connection, group)?.unwrap_or_default();
    Ok(standing)
}

/// How often a group changed; `None` if it does not exist.
pub(super) fn generation(connection: &rusqlite::Connection, group: i64) -> Result<Option<u64>> {
    connection
        .prepare_cached("SELECT generation FROM eventbus_group WHERE id = ?1")
        .and_then(|mut statement| statement.query_row([group], |row| row.get(0)).optional())
        .map_err(from_sqlite)
}

fn exceptions(connection: &rusqlite::Connection, group: i64, partition: u32) -> Result<HashMap<u64, Past>> {
    let sql = "SELECT offset, attempt, due FROM eventbus_exception WHERE grp = ?1 AND partition = ?2";
    let (now, now_monotonic) = (Instant::now(), clock::monotonic());
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            let rows = statement.query_map(params![group, partition], |row| {
                let attempt: Option<u32> = row.get(1)?;
                let due: Option<i64> = row.get(2)?;
                let past = match attempt.and_then(NonZeroU32::new) {
                    None => Past::Settled,
                    Some(attempt) => Past::Waiting {
                        attempt,
                        due: due.map(|due| clock::to_instant(due, now, now_monotonic)),
                    },
                };
                Ok((row.get(0)?, past))
            })?;
            rows.collect()
        })
        .map_err(from_sqlite)
}

/// Stores progress. Returns the partitions that are no longer the member's; nothing of those changed.
pub(super) fn save(round: &mut Round<'_>, seat: &Seat, progress: &[Progress]) -> Result<Vec<u32>> {
    let mut lost = Vec::new();
    let (now, now_monotonic, now_wall) =
        (Instant::now(), clock::monotonic(), clock::to_nanos(round.wall.now()));
    for part in progress {
        let sql = "UPDATE eventbus_cursor SET floor = max(floor, ?5) WHERE grp = ?1 AND partition = ?2 AND owner = ?3 AND epoch = ?4";
        let n = round
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| {
                s.execute(params![seat.group.id, part.partition, seat.member, part.epoch, part.floor])
            })
            .map_err(from_sqlite)?;
        if n == 0 {
            lost.push(part.partition);
            continue;
        }
        for (offset, past) in &part.changed {
            let (attempt, due) = match past {
                Past::Fresh => continue,
                Past::Settled => (None, None),
                Past::Waiting { attempt, due } => {
                    (Some(attempt.get()), due.map(|due| clock::nanos(due.saturating_duration_since(now))))
                }
            };
            round
                .connection
                .prepare_cached("INSERT OR REPLACE INTO eventbus_exception VALUES (?1, ?2, ?3, ?4, ?5, ?6)")
                .and_then(|mut statement| {
                    let due_at = due.map(|left| now_monotonic.saturating_add(left));
                    let due_wall = due.map(|left| now_wall.saturating_add(left));
                    statement.execute(params![
                        seat.group.id,
                        part.partition,
                        offset,
                        attempt,
                        due_at,
                        due_wall
                    ])
                })
                .map_err(from_sqlite)?;
        }
        if part.has_exceptions {
            round
                .connection
                .prepare_cached(
                    "DELETE FROM eventbus_exception WHERE grp = ?1 AND partition = ?2 AND offset < ?3",
                )
                .and_then(|mut statement| {
                    statement.execute(params![seat.group.id, part.partition, part.floor])
                })
                .map_err(from_sqlite)?;
        }
    }
    Ok(lost)
}

/// Hands partitions back.
pub(super) fn release(round: &mut Round<'_>, seat: &Seat, partitions: &[u32]) -> Result<()> {
    for partition in partitions {
        let sql = "UPDATE eventbus_cursor SET owner = NULL WHERE grp = ?1 AND partition = ?2 AND owner = ?3";
        round
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(params![seat.group.id, partition, seat.member]))
            .map_err(from_sqlite)?;
    }
    bump(round, seat.group.id)
}

/// Leaves the group; a broadcast's group goes with it.
pub(super) fn leave(round: &mut Round<'_>, seat: &Seat) -> Result<()> {
    let run = |sql: &str, id: u64| round.connection.execute(sql, [id]).map_err(from_sqlite);
    run("DELETE FROM eventbus_member WHERE id = ?1", seat.member)?;
    run("UPDATE eventbus_cursor SET owner = NULL WHERE owner = ?1", seat.member)?;
    if seat.group.ephemeral {
        round.news = true;
        return forget(round, seat.group.id);
    }
    bump(round, seat.group.id)
}

/// Removes a group with its members and positions.
pub(super) fn forget(round: &Round<'_>, group: i64) -> Result<()> {
    for sql in [
        "DELETE FROM eventbus_exception WHERE grp = ?1",
        "DELETE FROM eventbus_cursor WHERE grp = ?1",
        "DELETE FROM eventbus_member WHERE grp = ?1",
        "DELETE FROM eventbus_group WHERE id = ?1",
    ] {
        round.connection.execute(sql, [group]).map_err(from_sqlite)?;
    }
    Ok(())
}

/// Finds a group that must exist and have no live member.
pub(super) fn idle_group(round: &mut Round<'_>, topic: &Topic, group: &str) -> Result<(i64, i64)> {
    let (topic_id, _) = topics::existing(round, topic)?;
    let found: Option<(i64, i64)> = round
        .connection
        .query_row(
            "SELECT g.id, (SELECT count(*) FROM eventbus_member m WHERE m.grp = g.id AND m.alive_until >= ?3)
             FROM eventbus_group g WHERE g.topic = ?1 AND g.name = ?2",
            params![topic_id, group, clock::monotonic()],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()
        .map_err(from_sqlite)?;
    match found {
        None => Err(Error::not_found("there is no such group in this topic")
            .with("group", group)
            .with("topic", topic)),
        Some((_, members)) if members > 0 => {
            Err(Error::new(crate::ErrorKind::Conflict, "the group has members: stop them first")
                .with("group", group)
                .with("members", members))
        }
        Some((id, _)) => Ok((topic_id, id)),
    }
}
