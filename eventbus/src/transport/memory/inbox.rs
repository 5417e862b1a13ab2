//! Where publishers put events: numbered, in order, behind a lock of its own, so that publishing never waits
//! for consumers. Whoever looks at the topic takes what is in it first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::topic::Stored;
use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::id::EventId;
use crate::partition::{self, PartitionId};
use crate::transport::{Content, Receipt};

/// Why events of a topic are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// Groups are to read them.
    ForGroups,
    /// Only for replay: what is beyond the ring goes at once.
    ForReplay,
    /// Nobody can ever read them: a new group starts behind them.
    Not,
}

pub(super) struct Inbox {
    /// The next offset of each partition.
    next: Vec<u64>,
    waiting: Vec<(PartitionId, Stored)>,
    kept: Kept,
    /// Offsets were given to events that were not kept.
    skipped: bool,
    dedup: Option<Dedup>,
    last_stored: SystemTime,
}

/// Events that took room and need none.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Unused {
    pub(super) n_events: usize,
    pub(super) n_bytes: usize,
}

impl Inbox {
    pub(super) fn new(n_partitions: u32, kept: Kept, dedup: Option<Duration>) -> Self {
        Self {
            next: vec![0; n_partitions as usize],
            waiting: Vec::new(),
            kept,
            skipped: false,
            dedup: dedup.map(|window| Dedup { window, seen: HashMap::new(), ages: VecDeque::new() }),
            last_stored: SystemTime::UNIX_EPOCH,
        }
    }

    /// Numbers and takes events, with a receipt each.
    pub(super) fn take(
        &mut self,
        batch: impl Iterator<Item = Envelope>,
        now: SystemTime,
        mut receipt: impl FnMut(Receipt),
    ) -> Unused {
        let stored_at = now.max(self.last_stored);
        self.last_stored = stored_at;
        let (mut unused, n_partitions) = (Unused::default(), self.next.len() as u32);
        for envelope in batch {
            let partition = partition::of_envelope(&envelope, n_partitions);
            let Some(next) = self.next.get_mut(partition.0 as usize) else { continue };
            let place = Receipt::new(partition, Offset(*next));
            if let Some(dedup) = &mut self.dedup
                && let Some(first) = dedup.meet(&envelope, place)
            {
                unused.add(envelope.size_bytes());
                receipt(first.duplicate());
                continue;
            }
            receipt(place);
            *next += 1;
            let n_bytes = envelope.size_bytes();
            if self.kept == Kept::Not {
                self.skipped = true;
                unused.add(n_bytes);
            } else {
                let content = Content::Envelope(envelope);
                self.waiting.push((partition, Stored { content, n_bytes, stored_at }));
            }
        }
        unused
    }

    /// Takes bytes as a foreign producer would put them.
    pub(super) fn take_raw(&mut self, partition: PartitionId, content: Content, now: SystemTime) {
        if let Some(next) = self.next.get_mut(partition.0 as usize) {
            *next += 1;
            let (n_bytes, stored_at) = (content.size_bytes(), now.max(self.last_stored));
            self.waiting.push((partition, Stored { content, n_bytes, stored_at }));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && !self.skipped
    }

    pub(super) fn kept(&self) -> Kept {
        self.kept
    }

    pub(super) fn keep(&mut self, kept: Kept) {
        self.kept = kept;
    }

    /// Swaps what waits into an empty list. Returns the next offsets if some were given to what was not kept.
    pub(super) fn empty_into(&mut self, taken: &mut Vec<(PartitionId, Stored)>) -> Option<&[u64]> {
        std::mem::swap(&mut self.waiting, taken);
        std::mem::take(&mut self.skipped).then_some(&self.next)
    }
}

impl Unused {
    fn add(&mut self, n_bytes: usize) {
        self.n_events += 1;
        self.n_bytes += n_bytes;
    }
}

struct Dedup {
    window: Duration,
    seen: HashMap<(String, EventId), Receipt>,
    ages: VecDeque<(Instant, (String, EventId))>,
}

impl Dedup {
    /// Returns the receipt of an earlier copy inside the window, or remembers this one.
    fn meet(&mut self, envelope: &Envelope, place: Receipt) -> Option<Receipt> {
        let now = Instant::now();
        while let Some((stored, _)) = self.ages.front()
            && now.duration_since(*stored) >= self.window
        {
            if let Some((_, key)) = self.ages.pop_front() {
                self.seen.remove(&key);
            }
        }
        let key = (envelope.source().to_owned(), envelope.id().clone());
        if let Some(first) = self.seen.get(&key) {
            return Some(*first);
        }
        self.seen.insert(key.clone(), place);
        self.ages.push_back((now, key));
        None
    }
}
