//! Removing what retention allows: old or surplus events that every group has settled.

use std::time::Duration;

use rusqlite::params;

use super::clock;
use super::schema::{from_sqlite, position};
use super::writer::{Job, Round};
use crate::error::Result;

/// One pass over all topics; a large surplus goes in several.
pub(super) struct Trim;

/// Rows removed in one transaction, so that producers never wait long behind it.
const MAX_ROWS: u64 = 2_000;

impl Job for Trim {
    fn run(&mut self, round: &mut Round<'_>) -> Result<()> {
        forget_dead_broadcasts(round)?;
        let sql = "SELECT p.topic, p.partition, p.first, p.next, t.max_age, t.max_events,
                (SELECT min(c.floor) FROM eventbus_cursor c JOIN eventbus_group g ON g.id = c.grp
                 WHERE g.topic = p.topic AND c.partition = p.partition)
            FROM eventbus_partition p JOIN eventbus_topic t ON t.id = p.topic
            WHERE (t.max_age IS NOT NULL OR t.max_events IS NOT NULL) AND p.first < p.next";
        let mut statement = round.connection.prepare_cached(sql).map_err(from_sqlite)?;
        type Row = (i64, u32, u64, u64, Option<i64>, Option<u64>, Option<u64>);
        let rows: Vec<Row> = statement
            .query_map([], |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get(4)?,
                    row.get(5)?,
                    row.get(6)?,
                ))
            })
            .and_then(Iterator::collect)
            .map_err(from_sqlite)?;
        for (topic, partition, first, next, max_age, max_events, floor) in rows {
            let mut before = max_events.map_or(first, |keep| next.saturating_sub(keep));
            if let Some(age) = max_age {
                let sql = "SELECT count(*) FROM (SELECT 1 FROM eventbus_event
                    WHERE position >= ?1 AND position < ?2 AND stored_at < ?3 LIMIT ?4)";
                let (from, to) = (position(topic, partition, first), position(topic, partition, next));
                let oldest = clock::to_nanos(round.wall.oldest(Duration::from_nanos(age.unsigned_abs())));
                let old: u64 = round
                    .connection
                    .prepare_cached(sql)
                    .and_then(|mut s| s.query_row(params![from, to, oldest, MAX_ROWS], |row| row.get(0)))
                    .map_err(from_sqlite)?;
                before = before.max(first + old);
            }
            let before = before.min(floor.unwrap_or(next)).min(first + MAX_ROWS);
            if before > first {
                remove(round, topic, partition, before)?;
            }
        }
        Ok(())
    }

    fn done(self: Box<Self>, outcome: Result<()>) {
        if let Err(error) = outcome {
            tracing::warn!(%error, "retention could not be enforced; it is tried again");
        }
    }
}

/// A broadcast whose process died would hold back retention for ever.
fn forget_dead_broadcasts(round: &mut Round<'_>) -> Result<()> {
    let dead = "SELECT g.id FROM eventbus_group g WHERE g.ephemeral
        AND NOT EXISTS (SELECT 1 FROM eventbus_member m WHERE m.grp = g.id AND m.alive_until >= ?1)";
    for sql in [
        format!("DELETE FROM eventbus_exception WHERE grp IN ({dead})"),
        format!("DELETE FROM eventbus_cursor WHERE grp IN ({dead})"),
        format!("DELETE FROM eventbus_member WHERE grp IN ({dead})"),
        format!("DELETE FROM eventbus_group WHERE id IN ({dead})"),
    ] {
        round
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.execute([clock::monotonic()]))
            .map_err(from_sqlite)?;
    }
    Ok(())
}

/// Removes the events of a partition below an offset. Returns how many.
pub(super) fn remove(round: &mut Round<'_>, topic: i64, partition: u32, before: u64) -> Result<u64> {
    let (from, to) = (position(topic, partition, 0), position(topic, partition, before));
    let n_removed = round
        .connection
        .prepare_cached("DELETE FROM eventbus_event WHERE position >= ?1 AND position < ?2")
        .and_then(|mut statement| statement.execute([from, to]))
        .map_err(from_sqlite)?;
    round
        .connection
        .prepare_cached(
            "UPDATE eventbus_partition SET first = max(first, ?3) WHERE topic = ?1 AND partition = ?2",
        )
        .and_then(|mut statement| statement.execute(params![topic, partition, before]))
        .map_err(from_sqlite)?;
    Ok(n_removed as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Admin, Offset, TopicSpec};
    use crate::transport::sqlite::writer::Command;
    use crate::transport::sqlite::{Options, Sqlite};
    use crate::{Envelope, PartitionId, Topic, Transport};

    async fn first_after_trim(sqlite: &Sqlite, topic: &Topic) -> Offset {
        sqlite.store.send(Command::Job(Box::new(Trim))).unwrap();
        // Whatever is written next is written behind the trim.
        sqlite.purge(topic, PartitionId(0), Offset(0)).await.unwrap();
        sqlite.topic(topic).await.unwrap().unwrap().partitions[0].first
    }

    #[tokio::test]
    async fn age_is_what_passed_and_not_what_the_clock_says() {
        let folder = tempfile::tempdir().unwrap();
        let sqlite = Sqlite::open_path(folder.path().join("bus.db"), Options::default()).await.unwrap();
        let topic = Topic::new("orders").unwrap();
        let one = std::num::NonZeroU32::MIN;
        let age = Duration::from_millis(50);
        sqlite
            .declare(&TopicSpec::new(topic.clone()).with_partitions(one).with_max_age(age * 40))
            .await
            .unwrap();
        let event = Envelope::new("t", "/s").with_payload("x");
        sqlite.publisher().await.unwrap().enqueue(&topic, vec![event]).await.unwrap().await.all().unwrap();
        let hour = 3_600_000_000_000;
        sqlite.store.wall.step(hour);
        assert_eq!(first_after_trim(&sqlite, &topic).await, Offset(0), "an hour that was none removed it");
        // A clock that was put right for good counts again when the age has passed since.
        std::thread::sleep(age * 41);
        assert_eq!(first_after_trim(&sqlite, &topic).await, Offset(1), "it is older than it may be");
        sqlite.store.wall.step(-hour);
        let event = Envelope::new("t", "/s").with_payload("x");
        sqlite.publisher().await.unwrap().enqueue(&topic, vec![event]).await.unwrap().await.all().unwrap();
        assert_eq!(first_after_trim(&sqlite, &topic).await, Offset(1));
    }
}
