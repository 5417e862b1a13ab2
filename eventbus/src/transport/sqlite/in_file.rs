//! Publishing in somebody else's transaction on the same file.

use std::borrow::Cow;
use std::path::Path;
use std::sync::LazyLock;

use async_trait::async_trait;

use super::row::{self, StoredId};
use super::schema::{MAX_OFFSET, position};
use super::{Sqlite, clock, topics};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::name::Topic;
use crate::partition;
use crate::transport::{InFile, Place, SqlValue, Statements};

const CREATE: &str = "INSERT INTO eventbus_topic (name, partitions) VALUES (?1, ?2) RETURNING id, partitions";

const CREATE_PARTITIONS: &str =
    "WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < ?2)
INSERT INTO eventbus_partition (topic, partition) SELECT ?1, n FROM numbers";

/// Moves the end of a partition behind so many events.
const ADVANCE: &str = "UPDATE eventbus_partition SET next = next + ?3, last_stored = max(last_stored, ?4)
WHERE topic = ?1 AND partition = ?2 RETURNING next, last_stored";

/// Events of one statement, and the statements: few sizes, so that few are prepared.
static INSERTS: LazyLock<[(usize, String); 3]> = LazyLock::new(|| [32, 4, 1].map(|n| (n, row::insertion(n))));

/// Where the events of a transaction go in one partition.
struct Part {
    topic: i64,
    partition: u32,
    n_events: u64,
    /// The offset of the next one, and when they are stored, in nanoseconds.
    next: u64,
    stored_at: i64,
}

fn number(value: i64) -> SqlValue<'static> {
    SqlValue::Integer(value)
}

/// The numbers of the first row, if there is one.
async fn numbers<const N: usize>(
    connection: &mut dyn Statements,
    sql: &str,
    values: &[SqlValue<'_>],
) -> Result<Option<[i64; N]>> {
    let rows = connection.run(sql, values).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let mut numbers = [0; N];
    for (number, value) in numbers.iter_mut().zip(row) {
        let SqlValue::Integer(value) = value else {
            return Err(Error::new(ErrorKind::Corrupt, "a number of the store is none"));
        };
        *number = *value;
    }
    Ok(Some(numbers))
}

impl Sqlite {
    /// Refuses what the file has no room for, before anything is changed.
    async fn has_room(&self, connection: &mut dyn Statements, n_bytes: usize) -> Result<()> {
        let Some(max) = self.store.max_file_bytes() else { return Ok(()) };
        let mut pragma = async |sql: &str| {
            Ok::<_, Error>(numbers::<1>(connection, sql, &[]).await?.map_or(0, |[n]| n as u64))
        };
        let (count, free, size) = (
            pragma("PRAGMA page_count").await?,
            pragma("PRAGMA freelist_count").await?,
            pragma("PRAGMA page_size").await?.max(1),
        );
        topics::room(count, free, n_bytes as u64 / size + 1, max / size)
    }

    /// The id and the partitions of a topic, which is created if it is missing.
    async fn resolve(&self, connection: &mut dyn Statements, topic: &Topic) -> Result<(i64, u32)> {
        let name = SqlValue::Text(Cow::Borrowed(topic.as_str()));
        let found = match numbers(connection, topics::FIND, std::slice::from_ref(&name)).await? {
            Some(found) => found,
            None => {
                let partitions = number(i64::from(self.store.options.partitions));
                let made = numbers(connection, CREATE, &[name, partitions.clone()]).await?;
                let made: [i64; 2] = made.ok_or_else(|| missing("topic"))?;
                connection.run(CREATE_PARTITIONS, &[number(made[0]), partitions]).await?;
                made
            }
        };
        let [id, partitions] = found;
        Ok((id, u32::try_from(partitions).map_err(|_| missing("number of partitions"))?))
    }
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the store is damaged: a {what} is missing"))
}

#[async_trait]
impl InFile for Sqlite {
    fn path(&self) -> &Path {
        &self.store.path
    }

    fn max_event_bytes(&self) -> usize {
        self.store.options.max_event_bytes
    }

    async fn append(
        &self,
        transaction: &mut dyn Statements,
        events: &[(&Topic, Envelope)],
    ) -> Result<Option<Place>> {
        let mut n_bytes = 0;
        for (topic, event) in events {
            n_bytes += event.check(self.max_event_bytes()).map_err(|error| error.with("topic", topic))?;
        }
        self.has_room(transaction, n_bytes).await?;
        let mut known: Vec<(&Topic, (i64, u32))> = Vec::new();
        let mut parts: Vec<Part> = Vec::new();
        let mut part_of = Vec::with_capacity(events.len());
        for (topic, event) in events {
            let (id, n_partitions) = match known.iter().find(|(name, _)| name == topic) {
                Some((_, found)) => *found,
                None => {
                    let found = self.resolve(transaction, topic).await?;
                    known.push((topic, found));
                    found
                }
            };
            let partition = partition::of_envelope(event, n_partitions).0;
            let at = parts.iter().position(|part| (part.topic, part.partition) == (id, partition));
            let at = at.unwrap_or_else(|| {
                parts.push(Part { topic: id, partition, n_events: 0, next: 0, stored_at: 0 });
                parts.len() - 1
            });
            parts.iter_mut().skip(at).take(1).for_each(|part| part.n_events += 1);
            part_of.push(at);
        }
        let now = clock::to_nanos(self.store.wall.now());
        for part in &mut parts {
            let place = [part.topic, i64::from(part.partition), part.n_events as i64, now].map(number);
            let ends: [i64; 2] =
                numbers(transaction, ADVANCE, &place).await?.ok_or_else(|| missing("partition"))?;
            let next = u64::try_from(ends[0]).unwrap_or(u64::MAX);
            if next > MAX_OFFSET {
                return Err(topics::numbered_all());
            }
            (part.next, part.stored_at) = (next - part.n_events, ends[1]);
        }
        let mut rows = Vec::with_capacity(events.len());
        for ((_, event), at) in events.iter().zip(part_of) {
            let Some(part) = parts.get_mut(at) else { continue };
            let at = position(part.topic, part.partition, part.next);
            part.next += 1;
            rows.push((at, part.stored_at, StoredId::of(event.id()), event));
        }
        let mut rest = rows.as_slice();
        while let Some((size, sql)) = INSERTS.iter().find(|(size, _)| *size <= rest.len()) {
            let (now, later) = rest.split_at(*size);
            let columns =
                now.iter().flat_map(|(at, stored, id, event)| row::columns(*at, *stored, id, event));
            transaction.run(sql, &columns.collect::<Vec<_>>()).await?;
            rest = later;
        }
        Ok(rows.last().map(|(at, ..)| Place(*at)))
    }

    async fn at(&self, connection: &mut dyn Statements, place: Place) -> Result<Option<(String, EventId)>> {
        let sql = "SELECT source, id FROM eventbus_event WHERE position = ?1";
        let rows = connection.run(sql, &[number(place.0)]).await?;
        Ok(match rows.into_iter().next().as_deref() {
            Some([SqlValue::Text(source), SqlValue::Blob(id)]) => {
                uuid::Uuid::from_slice(id).ok().map(|id| (source.to_string(), EventId::from(id)))
            }
            Some([SqlValue::Text(source), SqlValue::Text(id)]) => {
                Some((source.to_string(), EventId::parse(id)))
            }
            _ => None,
        })
    }

    fn committed(&self) {
        self.store.has_news();
    }
}
