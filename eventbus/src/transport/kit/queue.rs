//! Accepted events on their way to the store: what every transport does that stores behind a queue.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};

use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::admit::{Admitted, Refused};
use crate::envelope::Envelope;
use crate::error::{Error, Result};
use crate::name::Topic;
use crate::transport::Publisher;
use crate::transport::confirm::{Confirm, Receipt, Resolver};

/// Accepted and not yet confirmed, of one transport value: events and bytes.
pub(crate) const MAX_WAITING_EVENTS: usize = 65_536;
pub(crate) const MAX_WAITING_BYTES: usize = 64 << 20;

/// The room for what is accepted and not yet confirmed; publishing waits for it.
#[derive(Debug)]
pub(crate) struct Room {
    events: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            events: Arc::new(Semaphore::new(MAX_WAITING_EVENTS)),
            bytes: Arc::new(Semaphore::new(MAX_WAITING_BYTES)),
        }
    }
}

impl Room {
    /// Checks a batch and waits for its room. `open` says whether it may still be sent then.
    pub(crate) async fn accept(
        &self,
        topic: &Topic,
        batch: Vec<Envelope>,
        max_event_bytes: usize,
        open: impl Fn() -> Result<()>,
    ) -> Result<(Queued, Confirm)> {
        open()?;
        let admitted = Admitted::check(batch, max_event_bytes);
        admitted.fits(MAX_WAITING_EVENTS, MAX_WAITING_BYTES)?;
        let (n_events, n_bytes) = (admitted.events.len(), admitted.n_bytes);
        let closed = |_| Error::closed("publisher");
        let events = self.events.clone().acquire_many_owned(n_events as u32).await.map_err(closed)?;
        let bytes = self.bytes.clone().acquire_many_owned(n_bytes as u32).await.map_err(closed)?;
        open()?;
        let (kept, refused) = admitted.into_parts();
        let (confirm, resolver) = Confirm::waiting(kept.len() + refused.len());
        let queued =
            Queued { topic: topic.clone(), events: kept, n_bytes, refused, resolver, _room: [events, bytes] };
        Ok((queued, confirm))
    }
}

/// A batch that was accepted; its room is given back when it is answered, however that ends.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) topic: Topic,
    pub(crate) events: Vec<Envelope>,
    pub(crate) n_bytes: usize,
    refused: Refused,
    resolver: Resolver,
    _room: [OwnedSemaphorePermit; 2],
}

impl Queued {
    /// Answers with one outcome for each of `events`, in order.
    pub(crate) fn answer(self, stored: impl Iterator<Item = Result<Receipt>>) {
        let receipts = Admitted::receipts(self.refused, stored);
        // Whoever hears of it may publish again at once: the room is there by then.
        drop(self._room);
        self.resolver.resolve(receipts);
    }

    /// Answers that none of them was stored, or that it is not known.
    pub(crate) fn fail(self, error: &Error) {
        let n_events = self.events.len();
        self.answer((0..n_events).map(|_| Err(error.duplicate())));
    }
}

/// What a storing task is asked for, in order.
#[derive(Debug)]
enum Work {
    Publish(Queued),
    Flush(oneshot::Sender<()>),
    Stop,
}

/// The way to the one task of a transport value that stores what is published.
#[derive(Debug)]
pub(crate) struct Queue {
    room: Room,
    work: mpsc::UnboundedSender<Work>,
    closed: AtomicBool,
    /// True when the storing task has ended.
    ended: watch::Receiver<bool>,
    max_event_bytes: usize,
}

/// The storing task's end of a [`Queue`].
#[derive(Debug)]
pub(crate) struct Rounds {
    work: mpsc::UnboundedReceiver<Work>,
    /// Says that the task has ended, however it does.
    _ended: End,
}

#[derive(Debug)]
struct End(watch::Sender<bool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl Queue {
    pub(crate) fn new(max_event_bytes: usize) -> (Arc<Self>, Rounds) {
        let (sender, work) = mpsc::unbounded_channel();
        let (end, ended) = watch::channel(false);
        let (room, closed) = (Room::default(), AtomicBool::new(false));
        let queue = Self { room, work: sender, closed, ended, max_event_bytes };
        (Arc::new(queue), Rounds { work, _ended: End(end) })
    }

    /// Fails once the transport is closed.
    pub(crate) fn is_open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("transport")) } else { Ok(()) }
    }

    fn send(&self, work: Work) -> Result<()> {
        self.work.send(work).map_err(|_| Error::closed("transport"))
    }

    async fn flush(&self) -> Result<()> {
        let (done, flushed) = oneshot::channel();
        self.send(Work::Flush(done))?;
        flushed.await.map_err(|_| Error::closed("transport"))
    }

    /// Closes, and waits until everything accepted was answered and the storing task has ended. Each call waits.
    pub(crate) async fn stop(&self) {
        if !self.closed.swap(true, Atomic::AcqRel) {
            // It takes what is before this, and ends.
            drop(self.send(Work::Stop));
        }
        drop(self.ended.clone().wait_for(|ended| *ended).await);
    }
}

/// What goes to the store at once, and who hears of it.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) batches: Vec<Queued>,
    pub(crate) ending: Ending,
}

impl Rounds {
    /// Waits for work and takes what is there, up to a number of events and bytes (and one batch more). `None` when
    /// nobody can publish any more.
    pub(crate) async fn next(&mut self, max_events: usize, max_bytes: usize) -> Option<Round> {
        let mut next = Some(self.work.recv().await?);
        let (mut batches, mut ending) = (Vec::new(), Ending::default());
        let (mut n_events, mut n_bytes) = (0, 0);
        while let Some(work) = next.take() {
            match work {
                Work::Publish(queued) => {
                    n_events += queued.events.len();
                    n_bytes += queued.n_bytes;
                    batches.push(queued);
                }
                Work::Flush(done) => ending.flushed.push(done),
                Work::Stop => {
                    ending.is_last = true;
                    break;
                }
            }
            if n_events < max_events && n_bytes < max_bytes {
                next = self.work.try_recv().ok();
            }
        }
        Some(Round { batches, ending })
    }
}

/// Who waits for the end of a round.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    flushed: Vec<oneshot::Sender<()>>,
    is_last: bool,
}

impl Ending {
    /// Whether somebody waits for it.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.flushed.is_empty()
    }

    /// Whether nothing comes after the round.
    pub(crate) fn is_last(&self) -> bool {
        self.is_last
    }

    /// Tells that everything of the round was answered; true if it was the last one.
    pub(crate) fn tell(self) -> bool {
        self.flushed.into_iter().for_each(|done| _ = done.send(()));
        self.is_last
    }
}

/// A publisher whose events go through a [`Queue`].
pub(crate) struct QueuedPublisher {
    queue: Arc<Queue>,
    closed: AtomicBool,
    /// The name of the transport's publisher, for `Debug`.
    name: &'static str,
}

impl QueuedPublisher {
    pub(crate) fn new(queue: Arc<Queue>, name: &'static str) -> Self {
        Self { queue, closed: AtomicBool::new(false), name }
    }

    fn is_open(&self) -> Result<()> {
        self.queue.is_open()?;
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("publisher")) } else { Ok(()) }
    }
}

impl fmt::Debug for QueuedPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(self.name).field("closed", &self.closed).finish_non_exhaustive()
    }
}

#[async_trait]
impl Publisher for QueuedPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let (queue, open) = (&*self.queue, || self.is_open());
        let (queued, confirm) = queue.room.accept(topic, batch, queue.max_event_bytes, open).await?;
        queue.send(Work::Publish(queued))?;
        Ok(confirm)
    }

    async fn flush(&self) -> Result<()> {
        self.queue.flush().await
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Atomic::AcqRel) || self.queue.is_open().is_err() {
            return Ok(());
        }
        self.queue.flush().await
    }
}
