//! Publishing into memory: take room, append, done; the confirm is ready at once.

use std::fmt;
use std::sync::Arc;
use std::task::Poll;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Broker;
use super::closing::Closing;
use super::topic::TopicState;
use crate::envelope::Envelope;
use crate::error::{Error, Result};
use crate::name::Topic;
use crate::transport::kit::admit::Admitted;
use crate::transport::{Confirm, Publisher, Receipts};

pub(super) struct MemoryPublisher {
    broker: Arc<Broker>,
    transport_closed: Arc<Closing>,
    closed: Closing,
    /// The topic published to last, so that a run of publishes finds it without the broker's map.
    last: Mutex<Option<Arc<TopicState>>>,
}

impl MemoryPublisher {
    pub(super) fn new(broker: Arc<Broker>, transport_closed: Arc<Closing>) -> Self {
        Self { broker, transport_closed, closed: Closing::default(), last: Mutex::new(None) }
    }

    fn open(&self) -> Result<()> {
        if self.closed.is_closed() || self.transport_closed.is_closed() {
            return Err(Error::closed("publisher"));
        }
        Ok(())
    }

    /// Waits in line for room, or for the end. Dropping the future gives back what was taken.
    async fn take<'a>(&self, room: &'a Semaphore, n: usize) -> Result<SemaphorePermit<'a>> {
        // `fits` has bounded n by the size of the room, which is at most u32::MAX.
        let mut room = std::pin::pin!(room.acquire_many(n as u32));
        let deleted = |_| Error::not_found("the topic was deleted");
        // Mostly there is room, and nothing else to set up.
        if let Poll::Ready(taken) = std::future::poll_fn(|task| Poll::Ready(room.as_mut().poll(task))).await {
            return taken.map_err(deleted);
        }
        tokio::select! {
            taken = room => taken.map_err(deleted),
            () = self.closed.wait() => Err(Error::closed("publisher")),
            () = self.transport_closed.wait() => Err(Error::closed("transport")),
        }
    }

    fn topic(&self, topic: &Topic) -> Arc<TopicState> {
        let mut last = self.last.lock();
        match &*last {
            Some(state) if state.spec.topic == *topic && !state.room_events.is_closed() => state.clone(),
            _ => last.insert(self.broker.topic(topic)).clone(),
        }
    }
}

impl fmt::Debug for MemoryPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryPublisher").field("closed", &self.closed).finish_non_exhaustive()
    }
}

#[async_trait]
impl Publisher for MemoryPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        self.open()?;
        let topic = self.topic(topic);
        let admitted = Admitted::check(batch, self.broker.options.max_event_bytes.get());
        admitted.fits(topic.max_events, topic.max_bytes)?;
        let events_room = self.take(&topic.room_events, admitted.events.len()).await?;
        let bytes_room = self.take(&topic.room_bytes, admitted.n_bytes).await?;
        // It may have been closed while this batch waited for room.
        self.open()?;
        events_room.forget();
        bytes_room.forget();
        let (events, refused) = admitted.into_parts();
        let mut stored = Receipts::default();
        topic.append(events.into_iter(), |receipt| stored.push(Ok(receipt)));
        if refused.is_empty() {
            return Ok(Confirm::ready(stored));
        }
        Ok(Confirm::ready(Admitted::receipts(refused, stored.into_iter())))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.close();
        Ok(())
    }
}
