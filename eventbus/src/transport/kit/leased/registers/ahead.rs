//! What is read ahead of one partition, between the task that reads it and the member that takes it.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use crate::error::{Error, Result};
use crate::transport::kit::leased::Stored;

/// What is read ahead of one partition at most; of bytes, one event more.
const MAX_AHEAD: usize = 512;
const MAX_BYTES_AHEAD: usize = 1 << 20;

/// A member's end.
pub(in crate::transport) struct Reader {
    found: Arc<Shared>,
    /// The offset that is due next.
    pub(super) next: u64,
    /// Dropped with the reader: then its task ends.
    _stop: oneshot::Sender<()>,
}

/// The reading task's end.
#[derive(Clone)]
pub(in crate::transport) struct Ahead {
    shared: Arc<Shared>,
    /// Rings for everything that is found.
    bell: watch::Sender<u64>,
}

#[derive(Default)]
struct Shared {
    found: Mutex<Found>,
    room: Notify,
}

#[derive(Default)]
struct Found {
    items: VecDeque<Item>,
    n_bytes: usize,
}

pub(in crate::transport) enum Item {
    Event(Stored),
    /// Everything below was removed.
    Hole(u64),
    Failed(Error),
    /// The partition is gone.
    Gone,
}

/// What comes next of a partition.
pub(super) enum Next {
    Events(Vec<Stored>),
    Hole(u64),
    Gone,
}

impl Reader {
    /// Starts a task that reads from an offset on, until the reader is dropped: then what it was given ends.
    pub(super) fn start<F>(
        from: u64,
        bell: watch::Sender<u64>,
        run: impl FnOnce(Ahead, oneshot::Receiver<()>) -> F,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::<Shared>::default();
        tokio::spawn(run(Ahead { shared: shared.clone(), bell }, stopped));
        Self { found: shared, next: from, _stop: stop }
    }

    /// Takes what was read: events up to a number and bytes (but one), or what stands before them.
    ///
    /// # Errors
    /// What reading met; it goes on all the same.
    pub(super) fn take(&mut self, max: usize, max_bytes: usize) -> Result<Next> {
        let mut found = self.found.found.lock();
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
        self.found.room.notify_one();
        Ok(Next::Events(events))
    }
}

impl Ahead {
    pub(in crate::transport) fn put(&self, item: Item) {
        let mut found = self.shared.found.lock();
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

    /// Notes that everything below `first` was removed, if some of that was not read.
    pub(in crate::transport) fn pass_hole(&self, next: &mut u64, first: u64) {
        if *next < first {
            *next = first;
            self.put(Item::Hole(first));
        }
    }

    pub(in crate::transport) async fn wait_for_room(&self) {
        loop {
            {
                let found = self.shared.found.lock();
                if found.items.len() < MAX_AHEAD && found.n_bytes < MAX_BYTES_AHEAD {
                    return;
                }
            }
            self.shared.room.notified().await;
        }
    }
}
