//! Reads one partition ahead, in its order, without a gap that is not told.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Message;
use futures_util::StreamExt as _;
use tokio::sync::oneshot;

use super::message;
use super::pages::{reading, since};
use super::store::{Store, unavailable};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::leased::Stored;
use crate::transport::kit::leased::registers::{Ahead, Item};

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

struct Reading {
    store: Arc<Store>,
    topic: Topic,
    partition: u32,
    ahead: Ahead,
}

impl Store {
    /// Reads a partition ahead until it is stopped.
    pub(super) async fn read_partition(
        self: Arc<Self>,
        topic: Topic,
        partition: u32,
        from: u64,
        ahead: Ahead,
        stopped: oneshot::Receiver<()>,
    ) {
        Reading { store: self, topic, partition, ahead }.run(from, stopped).await;
    }
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
                    Ok(false) => return self.ahead.put(Item::Gone),
                    Err(error) if error.is_retryable() => {
                        tracing::debug!(%error, topic = %self.topic, partition = self.partition, "reading anew");
                    }
                    Err(error) => self.ahead.put(Item::Failed(error)),
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

    /// Reads until that fails (an error that may be retried), ends, or the stream is gone (false).
    async fn read(&self, next: &mut u64, name: &mut Option<String>) -> Result<bool> {
        let mut connections = self.store.connections.subscribe();
        let Some((stream, info)) = self.store.look(&self.topic, self.partition).await? else {
            return Ok(false);
        };
        self.ahead.pass_hole(next, info.state.first_sequence);
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
                    self.ahead.pass_hole(next, state.first_sequence);
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
                self.ahead.pass_hole(next, found.state.first_sequence.min(offset));
            }
            self.ahead.wait_for_room().await;
            let (Message { message, .. }, at) = (message, offset);
            let content = message::content(message.headers.as_ref(), message.payload);
            self.ahead.put(Item::Event(Stored { offset: at, stored_at, content }));
            *next = offset + 1;
        }
    }

    /// Takes one event by itself, which the flow of messages did not bring: a foreign program may have written headers
    /// that the client does not read, and it would begin anew for ever.
    async fn take_alone(&self, next: &mut u64) -> Result<()> {
        if let Some(stored) = self.store.alone(&self.topic, self.partition, *next).await? {
            self.ahead.put(Item::Event(stored));
            *next += 1;
        }
        Ok(())
    }
}
