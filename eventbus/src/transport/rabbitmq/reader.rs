//! Reads streams: ahead for members, and up to their end for whoever looks.
//!
//! Where a stream ends, no method tells at once (what a declaration counts is seconds old). But a reader that begins at
//! the last chunk is sent all that was committed when it began in one go, before the channel answers anything else; and
//! no partition is empty, since each begins with a message of ours.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::Consumer;
use lapin::message::Delivery;
use lapin::types::AMQPValue;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::store::Store;
use super::streams::{Readers, at, exists};
use super::wire::reading;
use super::{message, names};
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::transport::kit::leased::Stored;
use crate::transport::kit::leased::registers::{Ahead, Bounds, Item};
use crate::transport::kit::refusals;

/// What the broker sends ahead to a reader: at first, and when events are small.
const AT_FIRST: u16 = 16;
const AT_MOST: u16 = 128;
/// What that may be in bytes, as far as the size of events is known.
const MAX_BYTES_AHEAD: usize = 1 << 20;
/// More than a chunk holds.
const CHUNK: u16 = u16::MAX;
/// For how long the first offsets of a topic are believed where they are not to be exact.
const FIRST_AGE: Duration = Duration::from_secs(5);
/// How far the clocks of publishers and the broker may be apart, for positions by time to be exact.
const APART: Duration = Duration::from_secs(1);
/// How long an event that should be there may take to come.
const SILENCE: Duration = Duration::from_secs(2);
/// When a reader that hears nothing acknowledges what it had.
const ACK_AFTER: Duration = Duration::from_secs(60);
/// When a reader that failed is tried again.
const AGAIN: Duration = Duration::from_millis(200);

/// A reader of a stream on a channel of its own.
struct Attached {
    readers: Readers,
    messages: Consumer,
    prefetch: u16,
    n_unacked: u16,
    /// The last message that was taken, unless the broker was told.
    unacked: Option<u64>,
}

impl Attached {
    /// The next message; `None` if the broker ended the reader.
    async fn next(&mut self) -> Result<Option<(u64, Delivery)>> {
        match self.messages.next().await {
            Some(message) => self.taken(message).map(Some),
            None => Ok(None),
        }
    }

    /// The next message, however long that takes: the broker ends readers that acknowledge nothing for half an hour.
    async fn next_in_time(&mut self) -> Result<Option<(u64, Delivery)>> {
        loop {
            match tokio::time::timeout(ACK_AFTER, self.next()).await {
                Ok(next) => return next,
                Err(_) => {
                    if let Some(last) = self.unacked.take() {
                        self.n_unacked = 0;
                        self.readers.ack(last)?;
                    }
                }
            }
        }
    }

    /// The next message of those that have arrived.
    fn ready(&mut self) -> Result<Option<(u64, Delivery)>> {
        match self.messages.next().now_or_never().flatten() {
            Some(message) => self.taken(message).map(Some),
            None => Ok(None),
        }
    }

    /// The next message of those that were there when this was asked; `None` behind the last.
    async fn rest(&mut self) -> Result<Option<(u64, Delivery)>> {
        if let Some(last) = self.unacked.take() {
            self.readers.ack(last)?;
        }
        // What it answers comes behind what the reader was sent, also for the credit that it just got.
        self.readers.set_credit(1).await?;
        self.ready()
    }

    fn taken(&mut self, message: lapin::Result<Delivery>) -> Result<(u64, Delivery)> {
        let message = message.map_err(reading)?;
        self.n_unacked += 1;
        self.unacked = Some(message.delivery_tag);
        if self.n_unacked * 2 >= self.prefetch {
            (self.n_unacked, self.unacked) = (0, None);
            self.readers.ack(message.delivery_tag)?;
        }
        let offset = message::offset(&message).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "a message of a stream does not say where it stands")
        })?;
        Ok((offset, message))
    }
}

fn gone(name: &str) -> Error {
    Error::not_found("there is no stream of this partition").with("stream", name)
}

impl Store {
    async fn attach(&self, name: &str, from: AMQPValue, prefetch: u16) -> Result<Attached> {
        let attaching = async {
            let readers = Readers::open(&self.wires, prefetch).await?;
            let messages = readers.begin(name, from).await?;
            Ok(Attached { readers, messages, prefetch, n_unacked: 0, unacked: None })
        };
        self.wires.within(attaching).await
    }

    /// Why the broker ended a reader: because the stream was deleted, or moves.
    async fn ended(&self, name: &str) -> Error {
        match exists(&self.wires, name).await {
            Ok(false) => gone(name),
            Ok(true) => Error::new(ErrorKind::Unavailable, "the broker ended the reader"),
            Err(error) => error,
        }
    }

    /// Whether a stream holds a message; waits a little for it.
    pub(super) async fn is_born(&self, name: &str) -> Result<bool> {
        let mut attached = self.attach(name, AMQPValue::LongString("first".into()), 1).await?;
        match tokio::time::timeout(SILENCE, attached.next()).await {
            Ok(first) => first.map(|first| first.is_some()),
            Err(_) => Ok(false),
        }
    }

    /// Where readers of some streams that begin at `from` stand when they were sent all that was committed when they
    /// began, or the first of that.
    async fn look_at(&self, names: &[String], from: &'static str, is_first: bool) -> Result<Vec<u64>> {
        let looking = async {
            let readers = Readers::open(&self.wires, if is_first { 1 } else { CHUNK }).await?;
            let mut begun = readers.begin_all(names, &AMQPValue::LongString(from.into())).await?;
            let mut found = Vec::with_capacity(names.len());
            for (reader, name) in begun.iter_mut().zip(names) {
                let Some(message) = reader.next().await else { return Err(self.ended(name).await) };
                let message = message.map_err(reading)?;
                found.push(message::offset(&message).ok_or_else(|| gone(name))?);
            }
            if is_first {
                return Ok(found);
            }
            // What it answers comes behind the rest.
            readers.set_credit(1).await?;
            for (reader, last) in begun.iter_mut().zip(&mut found) {
                while let Some(Some(message)) = reader.next().now_or_never() {
                    *last = message::offset(&message.map_err(reading)?).unwrap_or(*last);
                }
            }
            Ok(found)
        };
        self.wires.within(looking).await
    }

    /// What partitions of a topic hold; where that is not to be exact, their first offset may be seconds old.
    pub(super) async fn bounds_of(
        &self,
        topic: &Topic,
        partitions: &[u32],
        is_exact: bool,
    ) -> Result<Vec<Bounds>> {
        let names: Vec<String> = partitions.iter().map(|partition| names::stream(topic, partition)).collect();
        let known = self.firsts.lock().get(topic).filter(|_| !is_exact).and_then(|(firsts, at)| {
            (at.elapsed() < FIRST_AGE && firsts.len() == names.len()).then(|| firsts.clone())
        });
        let firsts = async {
            match known {
                Some(known) => Ok(known),
                None => self.look_at(&names, "first", true).await,
            }
        };
        let table = self.table(topic);
        let (firsts, lows, lasts) =
            tokio::try_join!(firsts, table.lows(partitions), self.look_at(&names, "last", false))?;
        if !is_exact {
            self.firsts.lock().insert(topic.clone(), (firsts.clone(), Instant::now()));
        }
        let bounds = firsts.into_iter().zip(lows).zip(lasts).map(|((first, low), last)| {
            let first = first.max(1).max(low);
            let next = (last + 1).max(first);
            Bounds { first, next, n_kept: next - first }
        });
        Ok(bounds.collect())
    }

    /// The first offset of a partition that holds an event, or would.
    async fn first(&self, topic: &Topic, partition: u32) -> Result<u64> {
        let (names, table) = ([names::stream(topic, partition)], self.table(topic));
        let partitions = [partition];
        let (first, low) = tokio::try_join!(self.look_at(&names, "first", true), table.lows(&partitions))?;
        Ok(first.into_iter().chain(low).fold(1, u64::max))
    }

    pub(super) async fn exact_bounds(&self, topic: &Topic, partition: u32) -> Result<Bounds> {
        let found = self.bounds_of(topic, &[partition], true).await?;
        found.first().copied().ok_or_else(|| gone(&names::stream(topic, partition)))
    }

    /// Reads at most `max` events of a partition from an offset, of those that were confirmed before this.
    ///
    /// # Errors
    /// [`DataLoss`](ErrorKind::DataLoss) if events from there on were removed.
    pub(super) async fn page(
        &self,
        topic: &Topic,
        partition: u32,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Stored>> {
        let (name, table) = (names::stream(topic, partition), self.table(topic));
        let low = table.lows(&[partition]).await?.first().copied().unwrap_or(0);
        if from.0 < low {
            return Err(refusals::removed(topic, PartitionId(partition), from, low));
        }
        let (mut found, mut not_before, from) = (Vec::new(), UNIX_EPOCH, from.0.max(1));
        if max == 0 {
            return Ok(found);
        }
        // From the event before, which is there, or nothing would say that there is no more.
        let prefetch = u16::try_from(max).unwrap_or(AT_MOST).clamp(1, AT_MOST - 1) + 1;
        let mut attached = self.attach(&name, at(from - 1), prefetch).await?;
        let Ok(first) = tokio::time::timeout(SILENCE, attached.next()).await else {
            // Unless the broker's own notes are, or there is no such place yet.
            let next = self.look_at(std::slice::from_ref(&name), "last", false).await?;
            return match next.first() {
                Some(last) if *last >= from => {
                    let what = "the broker did not bring the events";
                    Err(Error::new(ErrorKind::Unavailable, what).with("stream", &name))
                }
                _ => Ok(found),
            };
        };
        let Some((mut offset, mut message)) = first? else { return Err(self.ended(&name).await) };
        if offset > from {
            let kept = self.first(topic, partition).await?;
            if kept > from {
                return Err(refusals::removed(topic, PartitionId(partition), Offset(from), kept));
            }
        }
        loop {
            if let Some(stored) = message::stored(message, offset, not_before) {
                // The one before says what time it was at least.
                not_before = stored.stored_at;
                if offset >= from {
                    found.push(stored);
                }
            }
            if found.len() == max {
                return Ok(found);
            }
            (offset, message) = match attached.ready()? {
                Some(next) => next,
                None => match self.wires.within(attached.rest()).await? {
                    Some(next) => next,
                    None => return Ok(found),
                },
            };
        }
    }

    /// The first event of a partition that was stored at or after a time: the broker finds the second, and what
    /// publishers wrote of their time the place near it.
    pub(super) async fn first_since(
        &self,
        topic: &Topic,
        partition: u32,
        time: SystemTime,
    ) -> Result<Option<u64>> {
        let bounds = self.exact_bounds(topic, partition).await?;
        if bounds.next == bounds.first {
            return Ok(None);
        }
        let last = self.page(topic, partition, Offset(bounds.next - 1), 1).await?;
        // Nothing is as late: the broker would send nothing, and not say so.
        let Some(latest) = last.first().map(|last| last.stored_at).filter(|latest| *latest >= time) else {
            return Ok(None);
        };
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let from = Duration::from_secs(since.saturating_sub(APART).as_secs());
        let Some(mut from) = self.at_second(topic, partition, from, bounds).await? else { return Ok(None) };
        // Whatever a publisher's clock says, from here on it is later.
        let until = Duration::from_secs((since + APART).as_secs() + 1);
        let until = match UNIX_EPOCH.checked_add(until).is_some_and(|until| latest >= until) {
            true => self.at_second(topic, partition, until, bounds).await?.unwrap_or(bounds.next),
            false => bounds.next,
        };
        loop {
            let page = self.page(topic, partition, Offset(from), usize::from(AT_MOST)).await?;
            let Some(last) = page.last() else { return Ok((until < bounds.next).then_some(until)) };
            if let Some(found) = page.iter().find(|stored| stored.stored_at >= time || stored.offset >= until)
            {
                return Ok(Some(found.offset));
            }
            from = last.offset + 1;
        }
    }

    /// The first offset in or after a second of the broker's time; `None` if there is none before the end.
    async fn at_second(
        &self,
        topic: &Topic,
        partition: u32,
        second: Duration,
        bounds: Bounds,
    ) -> Result<Option<u64>> {
        let name = names::stream(topic, partition);
        let mut attached = self.attach(&name, AMQPValue::Timestamp(second.as_secs()), 1).await?;
        // A publisher whose clock is ahead is not as late as it says: then nothing comes.
        let found = match tokio::time::timeout(SILENCE, attached.next()).await {
            Ok(found) => found?.map(|(offset, _)| offset),
            Err(_) => None,
        };
        Ok(found.filter(|found| *found < bounds.next).map(|found| found.max(bounds.first)))
    }

    /// Waits until one of some partitions has an event at or above an offset.
    pub(super) async fn wait_for(&self, topic: &Topic, positions: &[(u32, u64)]) -> Result<()> {
        let waiting = positions.iter().map(|(partition, from)| {
            let name = names::stream(topic, *partition);
            async move {
                let mut attached = self.attach(&name, at(*from), 1).await?;
                loop {
                    match attached.next().await? {
                        Some((offset, _)) if offset >= (*from).max(1) => return Ok(()),
                        Some(_) => {}
                        None => return Err(self.ended(&name).await),
                    }
                }
            }
            .boxed()
        });
        let waiting: Vec<_> = waiting.collect();
        if waiting.is_empty() {
            return std::future::pending().await;
        }
        futures_util::future::select_all(waiting).await.0
    }

    /// Reads a partition ahead until it is stopped.
    pub(super) async fn read_partition(
        self: Arc<Self>,
        topic: Topic,
        partition: u32,
        from: u64,
        ahead: Ahead,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let reading = Reading { store: self, topic, partition, ahead };
        tokio::select! {
            () = reading.run(from) => {}
            _ = &mut stopped => {}
        }
    }
}

struct Reading {
    store: Arc<Store>,
    topic: Topic,
    partition: u32,
    ahead: Ahead,
}

impl Reading {
    async fn run(self, from: u64) {
        let (mut next, mut prefetch) = (from.max(1), AT_FIRST);
        loop {
            match self.read(&mut next, &mut prefetch).await {
                // Begin again with another prefetch.
                Ok(true) => continue,
                Ok(false) => return self.ahead.put(Item::Gone),
                Err(error) if error.kind() == ErrorKind::Closed => return,
                Err(error) if error.is_retryable() => {
                    tracing::debug!(%error, topic = %self.topic, partition = self.partition, "reading anew");
                }
                Err(error) => self.ahead.put(Item::Failed(error)),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Reads until that fails, or the stream is gone (false), or should be read with another prefetch (true).
    async fn read(&self, next: &mut u64, prefetch: &mut u16) -> Result<bool> {
        let (store, name) = (&self.store, names::stream(&self.topic, self.partition));
        // What was removed otherwise shows when the first event comes.
        let attaching = async {
            let low = store.table(&self.topic).lows(&[self.partition]).await?;
            self.ahead.pass_hole(next, low.first().copied().unwrap_or(0));
            store.attach(&name, at(*next), *prefetch).await
        };
        let mut attached = match attaching.await {
            Ok(attached) => attached,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let (mut n_read, mut n_bytes) = (0_usize, 0_usize);
        let mut not_before = UNIX_EPOCH;
        loop {
            let Some((offset, message)) = attached.next_in_time().await? else {
                return match store.ended(&name).await {
                    error if error.kind() == ErrorKind::NotFound => Ok(false),
                    error => Err(error),
                };
            };
            if offset < *next {
                continue;
            }
            if offset > *next {
                // Removed, or the broker's own notes.
                self.ahead.pass_hole(next, store.first(&self.topic, self.partition).await?.min(offset));
            }
            self.ahead.pass_hole(next, store.table(&self.topic).low(self.partition));
            (n_read, n_bytes) = (n_read + 1, n_bytes + message.data.len());
            if let Some(stored) = message::stored(message, offset, not_before).filter(|_| offset >= *next) {
                not_before = stored.stored_at;
                self.ahead.wait_for_room().await;
                self.ahead.put(Item::Event(stored));
            }
            *next = (*next).max(offset + 1);
            if n_read >= usize::from(*prefetch) || n_bytes > 4 * MAX_BYTES_AHEAD {
                let wanted = MAX_BYTES_AHEAD / (n_bytes / n_read).max(1);
                let wanted = u16::try_from(wanted).unwrap_or(AT_MOST).clamp(1, AT_MOST);
                if wanted >= prefetch.saturating_mul(4) || wanted <= *prefetch / 4 {
                    *prefetch = wanted;
                    return Ok(true);
                }
                (n_read, n_bytes) = (0, 0);
            }
        }
    }
}
