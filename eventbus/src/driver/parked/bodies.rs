//! Bodies of parked events, as far as they fit: a head whose body is here is run without a read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};

use crate::envelope::Envelope;
use crate::id::EventId;

/// Bytes of bodies that one subscription keeps. What is parked beyond is read when its turn comes.
const MAX_BYTES: usize = 32 << 20;

/// What the bodies of all partitions of a subscription take up, in bytes.
pub(super) type Taken = Arc<AtomicUsize>;

/// The bodies of one partition.
pub(super) struct Bodies {
    kept: foldhash::HashMap<EventId, Envelope>,
    taken: Taken,
}

impl Bodies {
    pub(super) fn new(taken: &Taken) -> Self {
        Self { kept: foldhash::HashMap::default(), taken: taken.clone() }
    }

    /// Keeps a body, if there is room.
    pub(super) fn keep(&mut self, event: &Envelope) {
        let size = event.size_bytes();
        let fits = |taken: usize| taken.checked_add(size).filter(|taken| *taken <= MAX_BYTES);
        if self.kept.contains_key(event.id())
            || self.taken.fetch_update(Atomic::Relaxed, Atomic::Relaxed, fits).is_err()
        {
            return;
        }
        self.kept.insert(event.id().clone(), event.clone());
    }

    pub(super) fn get(&self, id: &EventId) -> Option<&Envelope> {
        self.kept.get(id)
    }

    pub(super) fn drop_one(&mut self, id: &EventId) {
        if let Some(event) = self.kept.remove(id) {
            self.taken.fetch_sub(event.size_bytes(), Atomic::Relaxed);
        }
    }
}

impl Drop for Bodies {
    fn drop(&mut self) {
        let size = self.kept.values().map(Envelope::size_bytes).sum();
        self.taken.fetch_sub(size, Atomic::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_not_kept_and_room_comes_back() {
        let taken = Taken::default();
        let large = |n: u8| Envelope::new("t", "/s").with_payload(vec![n; MAX_BYTES / 3]);
        let (mut one, mut other) = (Bodies::new(&taken), Bodies::new(&taken));
        let [a, b, c] = [1, 2, 3].map(large);
        one.keep(&a);
        one.keep(&a);
        one.keep(&b);
        other.keep(&c);
        assert!(one.get(a.id()) == Some(&a) && one.get(b.id()) == Some(&b) && other.get(c.id()).is_none());
        one.drop_one(a.id());
        other.keep(&c);
        assert!(one.get(a.id()).is_none() && other.get(c.id()) == Some(&c));
        drop((one, other));
        assert_eq!(taken.load(Atomic::Relaxed), 0);
    }
}
