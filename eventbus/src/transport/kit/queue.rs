//! Accepted events on their way to the store: what every transport does that stores behind a queue.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::admit::{Admitted, Refused};
use crate::envelope::Envelope;
use crate::error::{Error, Result};
use crate::name::Topic;
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
