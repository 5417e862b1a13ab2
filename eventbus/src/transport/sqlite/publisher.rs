//! Publishing into the file: the writer stores whole rounds, the confirm resolves after the commit.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};

use async_trait::async_trait;
use smallvec::SmallVec;

use super::clock;
use super::row;
use super::schema::{MAX_OFFSET, from_sqlite, position};
use super::store::Store;
use super::topics;
use super::writer::{Command, End, Job, Round};
use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::{self, PartitionId};
use crate::transport::kit::queue::Queued;
use crate::transport::{Confirm, Publisher, Receipt};

pub(super) struct SqlitePublisher {
    store: Arc<Store>,
    closed: AtomicBool,
}

impl SqlitePublisher {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store, closed: AtomicBool::new(false) }
    }

    fn open(&self) -> Result<()> {
        self.store.is_open()?;
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("publisher")) } else { Ok(()) }
    }
}

impl fmt::Debug for SqlitePublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlitePublisher").field("file", &self.store.path).finish_non_exhaustive()
    }
}

#[async_trait]
impl Publisher for SqlitePublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let max_event_bytes = self.store.options.max_event_bytes;
        let (queued, confirm) = self.store.room.accept(topic, batch, max_event_bytes, || self.open()).await?;
        let publish = Publish { queued, stored: Vec::new(), partitions: self.store.options.partitions };
        self.store.send(Command::Job(Box::new(publish)))?;
        Ok(confirm)
    }

    async fn flush(&self) -> Result<()> {
        // Jobs are answered in the order they were sent.
        self.store.write(|_| Ok(())).await
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Atomic::AcqRel) || self.store.closed.load(Atomic::Acquire) {
            return Ok(());
        }
        self.flush().await
    }
}

struct Publish {
    queued: Queued,
    stored: Vec<Receipt>,
    /// Of a topic that is created on use.
    partitions: u32,
}

impl Job for Publish {
    fn run(&mut self, round: &mut Round<'_>) -> Result<()> {
        if self.queued.events.is_empty() {
            return Ok(());
        }
        self.stored = store_events(round, &self.queued.topic, &self.queued.events, self.partitions)?;
        Ok(())
    }

    fn needs_savepoint(&self) -> bool {
        false
    }

    fn done(self: Box<Self>, outcome: Result<()>) {
        match outcome {
            Ok(()) => self.queued.answer(self.stored.into_iter().map(Ok)),
            Err(error) => self.queued.fail(&error),
        }
    }

    fn size_bytes(&self) -> usize {
        self.queued.n_bytes
    }
}

/// Refuses events that would pass the bound of the file, before anything is written.
fn has_room(round: &Round<'_>, events: &[Envelope]) -> Result<()> {
    let Some(max) = round.max_pages else { return Ok(()) };
    let pragma = |sql: &str| -> Result<u64> {
        let mut statement = round.connection.prepare_cached(sql).map_err(from_sqlite)?;
        statement.query_row([], |row| row.get(0)).map_err(from_sqlite)
    };
    let (count, free, size) =
        (pragma("PRAGMA page_count")?, pragma("PRAGMA freelist_count")?, pragma("PRAGMA page_size")?);
    let needed = events.iter().map(Envelope::size_bytes).sum::<usize>() as u64 / size.max(1) + 1;
    topics::room(count, free, needed, max)
}

/// Stores events of one topic in the present transaction, creating the topic if it is missing. What can be
/// refused is refused before the first is written; after that an error is the round's.
fn store_events(
    round: &mut Round<'_>,
    topic: &Topic,
    events: &[Envelope],
    partitions: u32,
) -> Result<Vec<Receipt>> {
    has_room(round, events)?;
    let resolved = topics::resolve_or_create(round, topic, partitions);
    // Half a topic must not be committed.
    round.is_broken |= resolved.is_err();
    let (id, n_partitions) = resolved?;
    let now = clock::to_nanos(round.wall.now());
    let mut ends: SmallVec<[(u32, End); 4]> = SmallVec::new();
    let mut places = Vec::with_capacity(events.len());
    for event in events {
        let partition = partition::of_envelope(event, n_partitions).0;
        let at = match ends.iter().position(|(known, _)| *known == partition) {
            Some(at) => at,
            None => {
                let end = round.end(id, partition)?;
                ends.push((partition, End { last_stored: now.max(end.last_stored), ..end }));
                ends.len() - 1
            }
        };
        let Some((_, end)) = ends.get_mut(at) else { continue };
        if end.next >= MAX_OFFSET {
            return Err(Error::new(ErrorKind::Full, topics::NUMBERED_ALL).with("topic", topic));
        }
        places.push((partition, *end));
        end.next += 1;
    }
    let mut insert = row::insert(round.connection)?;
    for (event, (partition, end)) in events.iter().zip(&places) {
        if let Err(error) = row::put(&mut insert, position(id, *partition, end.next), end.last_stored, event)
        {
            round.is_broken = true;
            return Err(error);
        }
    }
    round.news = true;
    ends.into_iter().for_each(|(partition, end)| round.set_end(id, partition, end));
    let receipt = |(partition, end): (u32, End)| Receipt::new(PartitionId(partition), Offset(end.next));
    Ok(places.into_iter().map(receipt).collect())
}
