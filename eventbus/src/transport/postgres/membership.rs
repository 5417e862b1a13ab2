//! Groups as rows: who is a member, who owns which partition, where the group stands.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};
use tokio::time::Instant;

use super::topics;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::sql::from_sqlx;
use crate::subscription::{Audience, Start, Subscription};
use crate::time::to_nanos;
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

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

/// Enters a group of a topic, creating the group where it is missing.
pub(super) async fn join(
    connection: &mut PgConnection,
    (topic, n_partitions): (i64, u32),
    subscription: &Subscription,
    session: Duration,
) -> Result<Seat> {
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    let (name, ephemeral) = match &subscription.audience {
        Audience::Group(group) => (group.as_str().to_owned(), false),
        // Not a valid group name, so that no group can ever meet it.
        Audience::Broadcast => (format!("broadcast:{}", crate::EventId::generate()), true),
    };
    let created = sqlx::query(
        "INSERT INTO eventbus_group (name, topic, ephemeral) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING id",
    )
    .bind(&name)
    .bind(topic)
    .bind(ephemeral)
    .fetch_optional(&mut *transaction)
    .await
    .map_err(from_sqlx)?;
    let group: i64 = match created {
        Some(row) => {
            let group = row.try_get(0).map_err(from_sqlx)?;
            let mut starts = Vec::with_capacity(n_partitions as usize);
            for (partition, first, next) in bounds(&mut transaction, topic).await? {
                let start =
                    start_of(&mut transaction, topic, partition, (first, next), &subscription.start).await?;
                starts.push((partition as i32, start as i64));
            }
            if starts.is_empty() {
                return Err(topics::missing(&subscription.topic));
            }
            let (partitions, floors): (Vec<i32>, Vec<i64>) = starts.into_iter().unzip();
            sqlx::query(
                "INSERT INTO eventbus_cursor (grp, partition, floor)
                 SELECT $1, partition, floor FROM unnest($2::integer[], $3::bigint[]) AS t (partition, floor)",
            )
            .bind(group)
            .bind(partitions)
            .bind(floors)
            .execute(&mut *transaction)
            .await
            .map_err(from_sqlx)?;
            group
        }
        None => {
            let found =
                sqlx::query("SELECT id FROM eventbus_group WHERE topic = $1 AND name = $2 FOR UPDATE")
                    .bind(topic)
                    .bind(&name)
                    .fetch_optional(&mut *transaction)
                    .await
                    .map_err(from_sqlx)?;
            let found = found.ok_or_else(|| topics::missing(&subscription.topic))?;
            found.try_get(0).map_err(from_sqlx)?
        }
    };
    let member = enter(&mut transaction, group, session).await?;
    transaction.commit().await.map_err(from_sqlx)?;
    Ok(Seat { group: GroupRow { topic, id: group, ephemeral }, member })
}

async fn enter(connection: &mut PgConnection, group: i64, session: Duration) -> Result<u64> {
    let row = sqlx::query(
        "INSERT INTO eventbus_member (grp, alive_until, process)
         VALUES ($1, clock_timestamp() + $2 * interval '1 microsecond', $3) RETURNING id",
    )
    .bind(group)
    .bind(micros(session))
    .bind(leased::process())
    .fetch_one(&mut *connection)
    .await
    .map_err(from_sqlx)?;
    bump(connection, group).await?;
    row.try_get::<i64, _>(0).map(i64::unsigned_abs).map_err(from_sqlx)
}

/// Tells the other members to look at the group.
async fn bump(connection: &mut PgConnection, group: i64) -> Result<()> {
    let bump = sqlx::query("UPDATE eventbus_group SET generation = generation + 1 WHERE id = $1").bind(group);
    bump.execute(connection).await.map(drop).map_err(from_sqlx)
}

/// Partition, first and next offset of every partition of a topic.
async fn bounds(connection: &mut PgConnection, topic: i64) -> Result<Vec<(u32, u64, u64)>> {
    let rows =
        sqlx::query("SELECT partition, first, next FROM eventbus_range WHERE topic = $1 ORDER BY partition")
            .bind(topic)
            .fetch_all(connection)
            .await
            .map_err(from_sqlx)?;
    let number = |row: &sqlx::postgres::PgRow, at: usize| row.try_get::<i64, _>(at).map(i64::unsigned_abs);
    rows.iter()
        .map(|row| Ok((row.try_get::<i32, _>(0)?.unsigned_abs(), number(row, 1)?, number(row, 2)?)))
        .collect::<Result<_, sqlx::Error>>()
        .map_err(from_sqlx)
}

async fn start_of(
    connection: &mut PgConnection,
    topic: i64,
    partition: u32,
    (first, next): (u64, u64),
    start: &Start,
) -> Result<u64> {
    Ok(match start {
        Start::Latest => next,
        Start::Earliest => first,
        Start::Offsets(offsets) => {
            offsets.get(&PartitionId(partition)).map_or(first, |at| at.0).clamp(first, next)
        }
        Start::Time(time) => {
            first_since(connection, topic, partition, (first, next), to_nanos(*time)).await?
        }
    })
}

/// The first offset stored at or after a time. Stored times never descend, so halving finds it.
pub(super) async fn first_since(
    connection: &mut PgConnection,
    topic: i64,
    partition: u32,
    (mut low, mut high): (u64, u64),
    time: i64,
) -> Result<u64> {
    while low < high {
        let middle = low + (high - low) / 2;
        let row = sqlx::query(
            r#"SELECT stored_at FROM eventbus_event WHERE topic = $1 AND partition = $2 AND "offset" >= $3 ORDER BY "offset" LIMIT 1"#,
        )
        .bind(topic)
        .bind(partition as i32)
        .bind(middle as i64)
        .fetch_optional(&mut *connection)
        .await
        .map_err(from_sqlx)?;
        let stored: Option<i64> = row.map(|row| row.try_get(0)).transpose().map_err(from_sqlx)?;
        if stored.is_some_and(|stored| stored < time) { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}

/// Locks a group until the transaction's end, before anything of it is changed: whoever changes ownership does so
/// first, so that nobody waits in a circle. False if it does not exist.
async fn lock(connection: &mut PgConnection, group: i64) -> Result<bool> {
    let lock = sqlx::query("SELECT 1 FROM eventbus_group WHERE id = $1 FOR UPDATE").bind(group);
    lock.fetch_optional(connection).await.map(|row| row.is_some()).map_err(from_sqlx)
}

/// Says that a member lives, removes those that do not, and takes what should be ours.
pub(super) async fn stand(
    connection: &mut PgConnection,
    seat: &Seat,
    known: &BTreeMap<u32, u32>,
    session: Duration,
) -> Result<Standing> {
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    let group = seat.group.id;
    if !lock(&mut transaction, group).await? {
        return Err(Error::not_found("the topic or group was deleted"));
    }
    let alive = sqlx::query(
        "UPDATE eventbus_member SET alive_until = clock_timestamp() + $2 * interval '1 microsecond' WHERE id = $1",
    )
    .bind(seat.member as i64)
    .bind(micros(session))
    .execute(&mut *transaction)
    .await
    .map_err(from_sqlx)?;
    let member = if alive.rows_affected() == 1 {
        seat.member
    } else {
        enter(&mut transaction, group, session).await?
    };
    let dead = sqlx::query("DELETE FROM eventbus_member WHERE grp = $1 AND alive_until < clock_timestamp()");
    let dead = dead.bind(group).execute(&mut *transaction).await.map_err(from_sqlx)?;
    sqlx::query(
        "UPDATE eventbus_cursor SET owner = NULL WHERE grp = $1 AND owner IS NOT NULL
         AND owner NOT IN (SELECT id FROM eventbus_member WHERE grp = $1)",
    )
    .bind(group)
    .execute(&mut *transaction)
    .await
    .map_err(from_sqlx)?;
    if dead.rows_affected() > 0 {
        bump(&mut transaction, group).await?;
    }
    let members = sqlx::query("SELECT id FROM eventbus_member WHERE grp = $1 ORDER BY id").bind(group);
    let members = members.fetch_all(&mut *transaction).await.map_err(from_sqlx)?;
    let members: Vec<u64> = members
        .iter()
        .map(|row| row.try_get::<i64, _>(0).map(i64::unsigned_abs))
        .collect::<Result<_, _>>()
        .map_err(from_sqlx)?;
    let cursors = sqlx::query(
        "SELECT partition, owner, epoch, floor FROM eventbus_position WHERE grp = $1 ORDER BY partition",
    );
    let cursors = cursors.bind(group).fetch_all(&mut *transaction).await.map_err(from_sqlx)?;
    let cursor = |row: &sqlx::postgres::PgRow| {
        let share = Share {
            partition: row.try_get::<i32, _>(0)?.unsigned_abs(),
            owner: row.try_get::<Option<i64>, _>(1)?.map(i64::unsigned_abs),
            epoch: row.try_get::<i64, _>(2)? as u32,
        };
        Ok((share, row.try_get::<i64, _>(3)?.unsigned_abs()))
    };
    let (shares, floors): (Vec<Share>, Vec<u64>) = cursors
        .iter()
        .map(cursor)
        .collect::<Result<Vec<_>, sqlx::Error>>()
        .map_err(from_sqlx)?
        .into_iter()
        .unzip();
    let (steps, lost) = leased::steps(member, &members, &shares, known);
    let (mut taken, mut gained, mut to_release) = (Vec::new(), Vec::new(), Vec::new());
    for ((share, floor), step) in shares.iter().zip(floors).zip(steps) {
        let partition = share.partition;
        match step {
            Step::Keep => continue,
            Step::Release => {
                to_release.push(partition);
                continue;
            }
            Step::Load => {}
            Step::Take => taken.push((partition as i32, floor as i64)),
        }
        let epoch = share.epoch.wrapping_add(u32::from(step == Step::Take));
        gained.push(Gained { partition, epoch, floor, exceptions: HashMap::new() });
    }
    if !taken.is_empty() {
        // Who is no owner settles nothing: where the group stood then is where it stands.
        let (partitions, floors): (Vec<i32>, Vec<i64>) = taken.into_iter().unzip();
        sqlx::query(
            "WITH settled AS (DELETE FROM eventbus_settled WHERE grp = $1 AND partition = ANY ($2))
             UPDATE eventbus_cursor c SET owner = $3, epoch = c.epoch + 1, floor = t.floor
             FROM unnest($2::integer[], $4::bigint[]) AS t (partition, floor)
             WHERE c.grp = $1 AND c.partition = t.partition",
        )
        .bind(group)
        .bind(partitions)
        .bind(member as i64)
        .bind(floors)
        .execute(&mut *transaction)
        .await
        .map_err(from_sqlx)?;
    }
    if !gained.is_empty() {
        let wanted: Vec<i32> = gained.iter().map(|gained| gained.partition as i32).collect();
        let mut found = exceptions(&mut transaction, group, wanted).await?;
        for gained in &mut gained {
            gained.exceptions = found.remove(&gained.partition).unwrap_or_default();
        }
    }
    let generation = sqlx::query("SELECT generation FROM eventbus_group WHERE id = $1").bind(group);
    let generation = generation.fetch_one(&mut *transaction).await.and_then(|row| row.try_get::<i64, _>(0));
    let generation = generation.map_err(from_sqlx)?.unsigned_abs();
    transaction.commit().await.map_err(from_sqlx)?;
    Ok(Standing { member, generation, gained, lost, to_release })
}

/// What a group remembers above the floors of some partitions, by partition and offset.
async fn exceptions(
    connection: &mut PgConnection,
    group: i64,
    partitions: Vec<i32>,
) -> Result<HashMap<u32, HashMap<u64, Past>>> {
    let rows = sqlx::query(
        r#"SELECT partition, "offset", attempt, (extract(epoch FROM due - clock_timestamp()) * 1000000)::bigint
           FROM eventbus_exception WHERE grp = $1 AND partition = ANY ($2)"#,
    )
    .bind(group)
    .bind(partitions)
    .fetch_all(connection)
    .await
    .map_err(from_sqlx)?;
    let now = Instant::now();
    let mut found: HashMap<u32, HashMap<u64, Past>> = HashMap::new();
    for row in rows {
        let read = || -> Result<_, sqlx::Error> {
            let attempt: Option<i64> = row.try_get(2)?;
            let left: Option<i64> = row.try_get(3)?;
            let past = match attempt.and_then(|attempt| NonZeroU32::new(attempt as u32)) {
                None => Past::Settled,
                Some(attempt) => {
                    let left = left.map(|left| Duration::from_micros(u64::try_from(left).unwrap_or(0)));
                    Past::Waiting { attempt, due: left.and_then(|left| now.checked_add(left)) }
                }
            };
            Ok((row.try_get::<i32, _>(0)?.unsigned_abs(), row.try_get::<i64, _>(1)?.unsigned_abs(), past))
        };
        let (partition, offset, past) = read().map_err(from_sqlx)?;
        found.entry(partition).or_default().insert(offset, past);
    }
    Ok(found)
}

/// Locks the positions of the partitions that are still the member's, and moves them: a row is inserted, and the one before it
/// is deleted by its place, so that nothing dead is looked through.
macro_rules! move_positions {
    () => {
        "WITH held AS MATERIALIZED (
           SELECT i.partition, i.epoch, i.floor, i.before FROM eventbus_cursor c
           JOIN unnest($3::integer[], $4::bigint[], $5::bigint[], $6::bigint[]) AS i (partition, epoch, floor, before)
             ON c.partition = i.partition AND c.epoch = i.epoch
           WHERE c.grp = $1 AND c.owner = $2 ORDER BY c.partition FOR UPDATE OF c
         ), settled AS (
           INSERT INTO eventbus_settled SELECT $1, partition, epoch, floor FROM held ON CONFLICT DO NOTHING
         ), passed AS (
           DELETE FROM eventbus_settled s USING held h
           WHERE s.grp = $1 AND s.partition = h.partition AND s.epoch = h.epoch AND s.floor >= h.before AND s.floor < h.floor
         )"
    };
}

/// Stores progress in one statement. Returns the partitions that are no longer the member's; nothing of those changed.
pub(super) async fn save(
    connection: &mut PgConnection,
    seat: &Seat,
    progress: &[Progress],
) -> Result<Vec<u32>> {
    let (mut partitions, mut epochs) = (Vec::new(), Vec::new());
    let (mut floors, mut before) = (Vec::new(), Vec::new());
    let (mut of, mut offsets, mut attempts, mut dues) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let now = Instant::now();
    for part in progress {
        partitions.push(part.partition as i32);
        epochs.push(i64::from(part.epoch));
        floors.push(part.floor as i64);
        before.push(part.floor.saturating_sub(part.n_passed) as i64);
        for (offset, past) in &part.changed {
            let (attempt, due) = match past {
                Past::Fresh => continue,
                Past::Settled => (None, None),
                Past::Waiting { attempt, due } => (
                    Some(i64::from(attempt.get())),
                    due.map(|due| micros(due.saturating_duration_since(now))),
                ),
            };
            of.push(part.partition as i32);
            offsets.push(*offset as i64);
            attempts.push(attempt);
            dues.push(due);
        }
    }
    let plain = !progress.iter().any(|part| part.has_exceptions || !part.changed.is_empty());
    let moved = match plain {
        true => sqlx::query(concat!(move_positions!(), " SELECT partition FROM held")),
        false => sqlx::query(concat!(
            move_positions!(),
            r#", noted AS (
                 INSERT INTO eventbus_exception
                 SELECT $1, x.partition, x."offset", x.attempt, clock_timestamp() + x.due * interval '1 microsecond'
                 FROM unnest($7::integer[], $8::bigint[], $9::bigint[], $10::bigint[]) AS x (partition, "offset", attempt, due)
                 JOIN held ON held.partition = x.partition
                 ON CONFLICT (grp, partition, "offset") DO UPDATE SET attempt = excluded.attempt, due = excluded.due
               ), gone AS (
                 DELETE FROM eventbus_exception e USING held h
                 WHERE e.grp = $1 AND e.partition = h.partition AND e."offset" >= h.before AND e."offset" < h.floor
               )
               SELECT partition FROM held"#
        )),
    };
    let moved = moved
        .bind(seat.group.id)
        .bind(seat.member as i64)
        .bind(&partitions)
        .bind(&epochs)
        .bind(&floors)
        .bind(&before);
    let moved = if plain { moved } else { moved.bind(&of).bind(&offsets).bind(&attempts).bind(&dues) };
    let saved = moved.fetch_all(connection).await;
    let saved = saved.map_err(from_sqlx)?;
    let saved: Vec<i32> =
        saved.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(from_sqlx)?;
    let is_lost = |partition: &u32| !saved.contains(&(*partition as i32));
    Ok(progress.iter().map(|part| part.partition).filter(is_lost).collect())
}

/// Hands partitions back.
pub(super) async fn release(connection: &mut PgConnection, seat: &Seat, partitions: Vec<u32>) -> Result<()> {
    let partitions: Vec<i32> = partitions.into_iter().map(|partition| partition as i32).collect();
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    lock(&mut transaction, seat.group.id).await?;
    sqlx::query(
        "UPDATE eventbus_cursor SET owner = NULL WHERE grp = $1 AND partition = ANY ($2) AND owner = $3",
    )
    .bind(seat.group.id)
    .bind(partitions)
    .bind(seat.member as i64)
    .execute(&mut *transaction)
    .await
    .map_err(from_sqlx)?;
    bump(&mut transaction, seat.group.id).await?;
    transaction.commit().await.map_err(from_sqlx)
}

/// Leaves the group; a broadcast's group goes with it.
pub(super) async fn leave(connection: &mut PgConnection, seat: &Seat) -> Result<()> {
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    lock(&mut transaction, seat.group.id).await?;
    for sql in [
        "DELETE FROM eventbus_member WHERE id = $1",
        "UPDATE eventbus_cursor SET owner = NULL WHERE grp = $2 AND owner = $1",
    ] {
        let gone = sqlx::query(sql).bind(seat.member as i64);
        let gone = if sql.contains("$2") { gone.bind(seat.group.id) } else { gone };
        gone.execute(&mut *transaction).await.map_err(from_sqlx)?;
    }
    if seat.group.ephemeral {
        forget(&mut transaction, vec![seat.group.id]).await?;
    } else {
        bump(&mut transaction, seat.group.id).await?;
    }
    transaction.commit().await.map_err(from_sqlx)
}

/// Removes groups with their members and positions.
pub(super) async fn forget(connection: &mut PgConnection, groups: Vec<i64>) -> Result<()> {
    sqlx::query(
        "WITH exceptions AS (DELETE FROM eventbus_exception WHERE grp = ANY ($1)),
           settled AS (DELETE FROM eventbus_settled WHERE grp = ANY ($1)),
           cursors AS (DELETE FROM eventbus_cursor WHERE grp = ANY ($1)),
           members AS (DELETE FROM eventbus_member WHERE grp = ANY ($1))
         DELETE FROM eventbus_group WHERE id = ANY ($1)",
    )
    .bind(groups)
    .execute(connection)
    .await
    .map(drop)
    .map_err(from_sqlx)
}

/// Finds a group that must exist and have no live member, and locks it. Returns the ids of topic and group.
pub(super) async fn idle_group(
    connection: &mut PgConnection,
    topic: &Topic,
    group: &str,
) -> Result<(i64, i64)> {
    let (topic_id, _) = topics::existing(connection, topic).await?;
    let found = sqlx::query(
        "SELECT g.id, (SELECT count(*) FROM eventbus_member m WHERE m.grp = g.id AND m.alive_until >= clock_timestamp())
         FROM eventbus_group g WHERE g.topic = $1 AND g.name = $2 FOR UPDATE OF g",
    )
    .bind(topic_id)
    .bind(group)
    .fetch_optional(connection)
    .await
    .map_err(from_sqlx)?;
    let found = found.map(|row| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?))).transpose();
    match found.map_err(from_sqlx)? {
        None => Err(Error::not_found("there is no such group in this topic")
            .with("group", group)
            .with("topic", topic)),
        Some((_, members)) if members > 0 => {
            Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
                .with("group", group)
                .with("members", members))
        }
        Some((id, _)) => Ok((topic_id, id)),
    }
}
