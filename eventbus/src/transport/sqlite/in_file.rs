//! Publishing in somebody else's transaction on the same file.

use std::borrow::Cow;
use std::collections::HashMap;
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

/// Moves the end of a partition behind so many events, of a topic that has as many partitions as was thought.
const ADVANCE: &str = "UPDATE eventbus_partition SET next = next + ?4, last_stored = max(last_stored, ?5)
WHERE topic = (SELECT id FROM eventbus_topic WHERE name = ?1 AND partitions = ?2) AND partition = ?3
RETURNING topic, next, last_stored";

/// Takes that back.
const RETREAT: &str = "UPDATE eventbus_partition SET next = next - ?3 WHERE topic = ?1 AND partition = ?2";

/// Events of one statement, and the statements: few sizes, so that few are prepared.
static INSERTS: LazyLock<[(usize, String); 3]> = LazyLock::new(|| [32, 4, 1].map(|n| (n, row::insertion(n))));

/// Where the events of a transaction go in one partition.
struct Part<'a> {
    topic: &'a Topic,
    n_partitions: u32,
    partition: u32,
    n_events: u64,
    /// The topic's id, the offset of the next one, and when they are stored, in nanoseconds.
    id: i64,
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

    /// The number of partitions of a topic, which is created if it is missing.
    async fn resolve(&self, connection: &mut dyn Statements, topic: &Topic) -> Result<u32> {
        let name = SqlValue::Text(Cow::Borrowed(topic.as_str()));
        let [_, n_partitions] = match numbers(connection, topics::FIND, std::slice::from_ref(&name)).await? {
            Some(found) => found,
            None => {
                let n_partitions = number(i64::from(self.store.options.partitions));
                let made = numbers(connection, CREATE, &[name, n_partitions.clone()]).await?;
                let made: [i64; 2] = made.ok_or_else(|| missing("topic"))?;
                connection.run(CREATE_PARTITIONS, &[number(made[0]), n_partitions]).await?;
                made
            }
        };
        let n_partitions = u32::try_from(n_partitions).map_err(|_| missing("number of partitions"))?;
        self.store.remember(topic, n_partitions);
        Ok(n_partitions)
    }

    /// Gives out places in each partition; `false` = a topic is not what it was thought to be, and none is given out.
    async fn advance(&self, connection: &mut dyn Statements, parts: &mut [Part<'_>]) -> Result<bool> {
        let now = clock::to_nanos(self.store.wall.now());
        for at in 0..parts.len() {
            let (before, [part, ..]) = parts.split_at_mut(at) else { break };
            let place = [
                SqlValue::Text(Cow::Borrowed(part.topic.as_str())),
                number(part.n_partitions.into()),
                number(part.partition.into()),
                number(part.n_events as i64),
                number(now),
            ];
            let Some([id, next, stored_at]) = numbers(connection, ADVANCE, &place).await? else {
                for part in before {
                    let place = [part.id, part.partition.into(), part.n_events as i64].map(number);
                    connection.run(RETREAT, &place).await?;
                }
                return Ok(false);
            };
            let next = u64::try_from(next).ok().filter(|next| *next <= MAX_OFFSET);
            // Not as a bound that may be raised: there is no going on.
            let all = || Error::new(ErrorKind::Unexpected, topics::NUMBERED_ALL).with("topic", part.topic);
            let next = next.ok_or_else(all)?;
            (part.id, part.next, part.stored_at) = (id, next - part.n_events, stored_at);
        }
        Ok(true)
    }
}

/// Sorts events into the partitions of their topics; of each event which part it is in.
fn sort<'a>(
    events: &[(&'a Topic, Envelope)],
    n_partitions: &HashMap<String, u32>,
) -> (Vec<Part<'a>>, Vec<usize>) {
    let (mut parts, mut part_of) = (Vec::<Part<'_>>::new(), Vec::with_capacity(events.len()));
    for (topic, event) in events {
        let n_partitions = n_partitions.get(topic.as_str()).copied().unwrap_or(1);
        let partition = partition::of_envelope(event, n_partitions).0;
        let at = parts.iter().position(|part| (part.topic, part.partition) == (*topic, partition));
        let at = at.unwrap_or_else(|| {
            parts.push(Part { topic, n_partitions, partition, n_events: 0, id: 0, next: 0, stored_at: 0 });
            parts.len() - 1
        });
        parts.iter_mut().skip(at).take(1).for_each(|part| part.n_events += 1);
        part_of.push(at);
    }
    (parts, part_of)
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
        // How many partitions topics have is remembered, and looked at where places are given out: another process may have
        // made the topic anew, or a transaction that made it may have been undone.
        let mut known = HashMap::new();
        for (topic, _) in events {
            if !known.contains_key(topic.as_str()) {
                let n_partitions = match self.store.remembered(topic) {
                    Some(remembered) => remembered,
                    None => self.resolve(transaction, topic).await?,
                };
                known.insert(topic.to_string(), n_partitions);
            }
        }
        let (mut parts, mut part_of) = sort(events, &known);
        if !self.advance(transaction, &mut parts).await? {
            for (topic, _) in events {
                known.insert(topic.to_string(), self.resolve(transaction, topic).await?);
            }
            (parts, part_of) = sort(events, &known);
            if !self.advance(transaction, &mut parts).await? {
                return Err(missing("partition"));
            }
        }
        let mut rows = Vec::with_capacity(events.len());
        for ((_, event), at) in events.iter().zip(part_of) {
            let Some(part) = parts.get_mut(at) else { continue };
            let at = position(part.id, part.partition, part.next);
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
