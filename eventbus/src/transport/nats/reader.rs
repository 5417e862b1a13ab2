//! Reads one partition ahead, in its order, without a gap that is not told.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Message;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use super::message;
use super::store::{Store, reading, since, unavailable};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::leased::Stored;

/// What is read ahead of one partition at most; of bytes, one event more.
const MAX_AHEAD: usize = 512;
const MAX_BYTES_AHEAD: usize = 1 << 20;
/// What the server sends without being asked again.
const BATCH: usize = 256;
/// How often the server says that it has nothing; twice as long in silence, and reading begins anew.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// For how long one request for events stands.
const EXPIRES: Duration = Duration::from_secs(30);
/// A silence in which what was announced should have come.
const SILENCE: Duration = Duration::from_secs(10);
/// How often reading fails at one place before its event is fetched by itself.
const ALONE_AFTER: u32 = 3;
/// When a reader that failed is tried again.
const AGAIN: Duration = Duration::from_millis(200);

pub(super) struct Reader {
    ahead: Arc<Ahead>,
    /// The offset that is due next.
    pub(super) next: u64,
    /// Dropped with the reader: then its task ends.
    _stop: oneshot::Sender<()>,
}

#[derive(Default)]
struct Ahead {
    found: Mutex<Found>,
    room: Notify,
}

#[derive(Default)]
struct Found {
    items: VecDeque<Item>,
    n_bytes: usize,
}

enum Item {
    Event(Stored),
    /// Everything below was removed.
    Hole(u64),
    Failed(Error),
    /// The stream is gone.
    Gone,
}

/// What comes next of a partition.
pub(super) enum Next {
    Events(Vec<Stored>),
    Hole(u64),
    Gone,
}

impl Reader {
    /// Begins to read; `bell` rings for everything that is found.
    pub(super) fn start(
        store: &Arc<Store>,
        topic: Topic,
        partition: u32,
        from: u64,
        bell: watch::Sender<u64>,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let ahead = Arc::<Ahead>::default();
        let reading = Reading { store: store.clone(), topic, partition, ahead: ahead.clone(), bell };
        tokio::spawn(reading.run(from, stopped));
        Self { ahead, next: from, _stop: stop }
    }

    /// Takes what was read: events up to a number and bytes (but one), or what stands before them.
    ///
    /// # Errors
    /// What reading met; it goes on all the same.
    pub(super) fn take(&mut self, max: usize, max_bytes: usize) -> Result<Next> {
        let mut found = self.ahead.found.lock();
        let (mut events, mut n_bytes) = (Vec::new(), 0);
        while events.is_empty() || (events.len() < max && n_bytes < max_bytes) {
            match found.items.pop_front() {
                Some(Item::Event(stored)) => {
                    n_bytes += stored.content.size_bytes();
                    self.next = stored.offset + 1;
                    events.push(stored);
                }
                // What was found before comes first.
                Some(item) if !events.is_empty() => {
                    found.items.push_front(item);
                    break;
                }
                Some(Item::Hole(first)) => {
                    self.next = first;
                    return Ok(Next::Hole(first));
                }
                Some(Item::Failed(error)) => return Err(error),
                Some(Item::Gone) => return Ok(Next::Gone),
                None => break,
            }
        }
        found.n_bytes = found.n_bytes.saturating_sub(n_bytes);
        drop(found);
        self.ahead.room.notify_one();
        Ok(Next::Events(events))
    }
}

struct Reading {
    store: Arc<Store>,
    topic: Topic,
    partition: u32,
    ahead: Arc<Ahead>,
    bell: watch::Sender<u64>,
}

impl Reading {
    async fn run(self, from: u64, mut stopped: oneshot::Receiver<()>) {
        let mut next = from.max(1);
        let mut consumer = None;
        let reading = async {
            // Where reading failed last, and how often.
            let (mut at, mut n_failed) = (0, 0);
            loop {
                let read = self.read(&mut next, &mut consumer).await;
                n_failed = if next == at { n_failed + 1 } else { 0 };
                at = next;
                if n_failed >= ALONE_AFTER {
                    n_failed = 0;
                    if let Err(error) = self.take_alone(&mut next).await {
                        tracing::debug!(%error, topic = %self.topic, partition = self.partition, "reading anew");
                    }
                }
                match read {
                    Ok(true) => {}
                    Ok(false) => return self.put(Item::Gone),
                    Err(error) if error.is_retryable() => {
                        tracing::debug!(%error, topic = %self.topic, partition = self.partition, "reading anew");
                    }
                    Err(error) => self.put(Item::Failed(error)),
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        tokio::select! {
            () = reading => {}
            _ = &mut stopped => {}
        }
        // The server forgets it by itself, but later.
        if let Some(name) = consumer {
            let stream = super::names::stream(&self.topic, self.partition);
            let deleting = self.store.context.delete_consumer_from_stream(name, stream);
            drop(tokio::time::timeout(HEARTBEAT, deleting).await);
        }
    }

    fn put(&self, item: Item) {
        let mut found = self.ahead.found.lock();
        if let Item::Event(stored) = &item {
            found.n_bytes += stored.content.size_bytes();
        }
        // One that nobody took is as good as the next one.
        let is_repeated = matches!((&item, found.items.back()), (Item::Failed(_), Some(Item::Failed(_))));
        if !is_repeated {
            found.items.push_back(item);
        }
        drop(found);
        self.bell.send_modify(|n| *n += 1);
    }

    /// Reads until that fails (an error that may be retried), ends, or the stream is gone (false).
    async fn read(&self, next: &mut u64, name: &mut Option<String>) -> Result<bool> {
        let mut connections = self.store.connections.subscribe();
        let Some((stream, info)) = self.store.look(&self.topic, self.partition).await? else {
            return Ok(false);
        };
        self.pass_hole(next, info.state.first_sequence);
        if *next > info.state.last_sequence + 1 {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the stream ends before the group's position: it is another",
            )
            .with("topic", &self.topic)
            .with("partition", self.partition)
            .with("position", *next)
            .with("end", info.state.last_sequence + 1));
        }
        let consumer = stream.create_consumer(reading(since(*next))).await.map_err(unavailable)?;
        if let Some(before) = name.replace(consumer.cached_info().name.clone()) {
            drop(stream.delete_consumer(&before).await);
        }
        let mut messages = consumer
            .stream()
            .max_messages_per_batch(BATCH)
            .max_bytes_per_batch(self.store.max_bytes_at_once())
            .heartbeat(HEARTBEAT)
            .expires(EXPIRES)
            .messages()
            .await
            .map_err(unavailable)?;
        let (mut due, mut n_pending) = (1, info.state.last_sequence.saturating_sub(*next - 1));
        loop {
            let next_one = tokio::time::timeout(SILENCE, messages.next());
            let found = tokio::select! {
                found = next_one => found,
                _ = connections.changed() => {
                    return Err(Error::new(ErrorKind::Unavailable, "the connection is another"));
                }
            };
            let message = match found {
                Ok(Some(message)) => message.map_err(unavailable)?,
                Ok(None) => return Ok(true),
                // What was there does not come: it may have been removed, up to the end.
                Err(_) if n_pending > 0 => {
                    let state = stream.get_info().await.map_err(unavailable)?.state;
                    self.pass_hole(next, state.first_sequence);
                    n_pending = state.last_sequence.saturating_sub(*next - 1);
                    continue;
                }
                Err(_) => continue,
            };
            let place = message.info().map_err(|error| {
                Error::new(ErrorKind::Unavailable, "a message that does not say where it stands")
                    .caused_by(error)
            })?;
            // The numbers of the reader itself have no gaps: one that is missing was lost on the way.
            if place.consumer_sequence != due {
                return Err(Error::new(ErrorKind::Unavailable, "an event was lost on its way"));
            }
            (due, n_pending) = (due + 1, place.pending);
            let (offset, stored_at) = (place.stream_sequence, place.published.into());
            if offset < *next {
                continue;
            }
            if offset > *next {
                // Removed in between, one by one or all below.
                let found = stream.get_info().await.map_err(unavailable)?;
                self.pass_hole(next, found.state.first_sequence.min(offset));
            }
            self.wait_for_room().await;
            let (Message { message, .. }, at) = (message, offset);
            let content = message::content(message.headers.as_ref(), message.payload);
            self.put(Item::Event(Stored { offset: at, stored_at, content }));
            *next = offset + 1;
        }
    }

    /// Takes one event by itself, which the flow of messages did not bring: a foreign program may have written headers
    /// that the client does not read, and it would begin anew for ever.
    async fn take_alone(&self, next: &mut u64) -> Result<()> {
        if let Some(stored) = self.store.alone(&self.topic, self.partition, *next).await? {
            self.put(Item::Event(stored));
            *next += 1;
        }
        Ok(())
    }

    /// Notes that everything below `first` was removed, if some of that was not read.
    fn pass_hole(&self, next: &mut u64, first: u64) {
        if *next < first {
            *next = first;
            self.put(Item::Hole(first));
        }
    }

    async fn wait_for_room(&self) {
        loop {
            {
                let found = self.ahead.found.lock();
                if found.items.len() < MAX_AHEAD && found.n_bytes < MAX_BYTES_AHEAD {
                    return;
                }
            }
            self.ahead.room.notified().await;
        }
    }
}
