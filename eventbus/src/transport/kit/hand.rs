//! What a consumer holds: the bound of its window, and the tokens of its deliveries.

use std::num::NonZeroUsize;

use tokio::time::Instant;

use super::cursor::{Cursor, Entry, Handed};
use crate::admin::Offset;
use crate::partition::PartitionId;
use crate::transport::delivery::{Delivery, Token};

/// Unsettled events in the hand of one consumer, against the bound of its window.
#[derive(Debug)]
pub(crate) struct Hand {
    n_events: usize,
    n_bytes: usize,
    window: NonZeroUsize,
    window_bytes: NonZeroUsize,
}

impl Hand {
    pub(crate) fn new(window: NonZeroUsize, window_bytes: NonZeroUsize) -> Self {
        Self { n_events: 0, n_bytes: 0, window, window_bytes }
    }

    /// How many more events the window has room for.
    pub(crate) fn room(&self) -> usize {
        // One event always goes out, however large; more only while the bytes have room.
        if self.n_events > 0 && self.n_bytes >= self.window_bytes.get() {
            return 0;
        }
        self.window.get().saturating_sub(self.n_events)
    }

    fn take(&mut self, n_bytes: usize) {
        self.n_events += 1;
        self.n_bytes += n_bytes;
    }

    pub(crate) fn give_back(&mut self, n_events: usize, n_bytes: usize) {
        self.n_events = self.n_events.saturating_sub(n_events);
        self.n_bytes = self.n_bytes.saturating_sub(n_bytes);
    }

    /// Hands out what a partition has, first what waits and is due, then what comes next in its log.
    pub(crate) fn fill(
        &mut self,
        cursor: &mut Cursor,
        now: Instant,
        until: Instant,
        max: usize,
        mut next: impl FnMut(u64) -> Option<Entry>,
        mut out: impl FnMut(Handed),
    ) {
        let mut n_taken = 0;
        while n_taken < max && self.room() > 0 {
            let handed = match cursor.take_due(now, until) {
                Some(handed) => handed,
                None if !cursor.may_read(self.window_bytes.get()) => return,
                None => {
                    let Some(entry) = next(cursor.next()) else { return };
                    match cursor.read(entry, until) {
                        Some(handed) => handed,
                        None => continue,
                    }
                }
            };
            self.take(handed.size);
            n_taken += 1;
            out(handed);
        }
    }
}

/// What a token says: which handing-out of which event, under which owner of its partition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) partition: PartitionId,
    pub(crate) epoch: u32,
    pub(crate) offset: u64,
    pub(crate) handout: u16,
}

/// Partitions that a token can name.
pub(crate) const MAX_PARTITIONS: u32 = 1 << 16;

impl Place {
    pub(crate) fn of(token: Token) -> Self {
        let high = token.high();
        Self {
            epoch: (high >> 32) as u32,
            partition: PartitionId(u32::from((high >> 16) as u16)),
            handout: high as u16,
            offset: token.low(),
        }
    }

    pub(crate) fn token(self) -> Token {
        let partition = u64::from(self.partition.0 as u16);
        Token::new(u64::from(self.epoch) << 32 | partition << 16 | u64::from(self.handout), self.offset)
    }
}

/// Turns what a cursor handed out into a delivery.
pub(crate) fn delivery(handed: Handed, partition: PartitionId, epoch: u32) -> Delivery {
    let place = Place { partition, epoch, offset: handed.offset, handout: handed.handout };
    Delivery::new(place.token(), partition, handed.content)
        .with_offset(Offset(handed.offset))
        .with_attempt(handed.attempt)
        .with_lease_until(handed.until.into_std())
        .with_stored_at(handed.stored_at)
}
