//! The partitions that a member holds: read ahead by the pump, handed out and settled here.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::kit::cursor::{Cursor, Entry, Order, Past, Settling, lease_end};
use crate::transport::kit::hand::{Hand, Place};
use crate::transport::kit::leased::Stored;
use crate::transport::{Delivery, Polled, Settle, Token};

/// A delivery is ours for as long as its partition is.
const FOR_EVER: Duration = Duration::MAX;

pub(super) struct Hold {
    owned: BTreeMap<u32, Owned>,
    hand: Hand,
    order: Order,
    revoke_within: Duration,
    news: VecDeque<News>,
    /// Why nothing comes for now, as the client said last. It says so again and again while that is so, and who hears it waits
    /// before the next poll: told one after another, the delays would outlast what caused them.
    trouble: Option<Error>,
    /// The epoch of the next ownership; begins anywhere, so that no two consumers share one.
    next_epoch: u32,
    /// What is read ahead: events and bytes.
    pub(super) n_ahead: usize,
    pub(super) bytes_ahead: usize,
}

enum News {
    Polled(Polled),
    Failed(Error),
}

struct Owned {
    epoch: u32,
    /// Where the group begins, until that is committed.
    start: Option<i64>,
    /// `None` until the first event shows where reading began.
    cursor: Option<Cursor>,
    ahead: VecDeque<Stored>,
    revoke_at: Option<Instant>,
    /// The floor that is committed, as far as we know.
    committed: u64,
}

/// A position to commit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floor {
    pub(super) partition: u32,
    pub(super) epoch: u32,
    pub(super) floor: u64,
}

impl Hold {
    pub(super) fn new(subscription: &Subscription) -> Self {
        let order = match subscription.ordering {
            crate::capability::Ordering::None => Order::None,
            _ => Order::PerKey,
        };
        Self {
            owned: BTreeMap::new(),
            hand: Hand::new(subscription.window, subscription.window_bytes),
            order,
            revoke_within: subscription.revoke_within,
            news: VecDeque::new(),
            trouble: None,
            next_epoch: fastrand::u32(..),
            n_ahead: 0,
            bytes_ahead: 0,
        }
    }

    /// Takes partitions; `starts` are where the group begins in those that it has no position in.
    pub(super) fn gain(&mut self, partitions: &[u32], starts: &BTreeMap<u32, i64>) {
        for partition in partitions {
            self.forget(*partition);
            self.next_epoch = self.next_epoch.wrapping_add(1);
            let owned = Owned {
                epoch: self.next_epoch,
                start: starts.get(partition).copied(),
                cursor: None,
                ahead: VecDeque::new(),
                revoke_at: None,
                committed: 0,
            };
            self.owned.insert(*partition, owned);
        }
        self.trouble = None;
        let gained: Vec<_> = partitions.iter().copied().map(PartitionId).collect();
        if !gained.is_empty() {
            self.news.push_back(News::Polled(Polled::Assigned(gained)));
        }
    }

    /// Notes that partitions should move; returns when they are taken at the latest.
    pub(super) fn revoke(&mut self, partitions: &[u32]) -> Instant {
        let deadline = lease_end(Instant::now(), self.revoke_within);
        for partition in partitions {
            if let Some(owned) = self.owned.get_mut(partition) {
                owned.revoke_at = Some(deadline);
                drop_ahead(owned, &mut self.n_ahead, &mut self.bytes_ahead);
            }
        }
        let partitions = partitions.iter().copied().map(PartitionId).collect();
        self.news.push_back(News::Polled(Polled::Revoking { partitions, deadline: deadline.into_std() }));
        deadline
    }

    pub(super) fn lose(&mut self, partitions: &[u32]) {
        let gone: Vec<_> =
            partitions.iter().copied().filter(|partition| self.forget(*partition)).map(PartitionId).collect();
        if !gone.is_empty() {
            self.news.push_back(News::Polled(Polled::Lost(gone)));
        }
    }

    /// Forgets a partition without news; false if it was not ours.
    pub(super) fn forget(&mut self, partition: u32) -> bool {
        let Some(mut owned) = self.owned.remove(&partition) else { return false };
        drop_ahead(&mut owned, &mut self.n_ahead, &mut self.bytes_ahead);
        if let Some(cursor) = &owned.cursor {
            let (n_events, n_bytes) = cursor.in_hand();
            self.hand.give_back(n_events, n_bytes);
        }
        true
    }

    pub(super) fn owns(&self, partition: u32, epoch: u32) -> bool {
        self.owned.get(&partition).is_some_and(|owned| owned.epoch == epoch)
    }

    pub(super) fn owns_any(&self, partition: u32) -> bool {
        self.owned.contains_key(&partition)
    }

    /// Where the group begins in partitions of ours: to be committed before anything of them is handed out, or an
    /// event that was handed out would be passed over by a later member that begins at the end.
    pub(super) fn starts(&self) -> Vec<(u32, i64)> {
        self.owned.iter().filter_map(|(partition, owned)| Some((*partition, owned.start?))).collect()
    }

    /// Notes that these starts are committed.
    pub(super) fn begun(&mut self, starts: &[(u32, i64)]) {
        for (partition, _) in starts {
            if let Some(owned) = self.owned.get_mut(partition) {
                owned.start = None;
            }
        }
    }

    /// What is held, with the offset that is due next where that is known.
    pub(super) fn positions(&self) -> Vec<(u32, Option<u64>)> {
        self.owned
            .iter()
            .map(|(partition, owned)| {
                let next = owned.ahead.back().map(|stored| stored.offset + 1);
                (*partition, next.or_else(|| owned.cursor.as_ref().map(Cursor::next)))
            })
            .collect()
    }

    /// Takes an event that was read; not of a partition that is not ours, or moves away.
    pub(super) fn read(&mut self, partition: u32, stored: Stored) {
        let Some(owned) = self.owned.get_mut(&partition).filter(|owned| owned.revoke_at.is_none()) else {
            return;
        };
        let due = owned.ahead.back().map(|last| last.offset + 1);
        let due = due.or_else(|| owned.cursor.as_ref().map(Cursor::next)).unwrap_or(0);
        if stored.offset < due {
            // It came again after a pause.
            return;
        }
        self.trouble = None;
        self.n_ahead += 1;
        self.bytes_ahead += stored.content.size_bytes();
        owned.ahead.push_back(stored);
    }

    /// Tells an error that will not pass, or of what is over: once, whatever comes.
    pub(super) fn tell(&mut self, error: Error) {
        self.news.push_back(News::Failed(error));
    }

    /// Notes why nothing comes for now: forgotten when something does.
    pub(super) fn fail(&mut self, error: Error) {
        self.trouble = Some(error);
    }

    /// Tells what there is to tell: news, deliveries, and why there are none.
    pub(super) fn look(&mut self, max: usize, now: Instant) -> Result<Option<Polled>> {
        match self.news.pop_front() {
            Some(News::Polled(polled)) => return Ok(Some(polled)),
            Some(News::Failed(error)) => return Err(error),
            None => {}
        }
        let deliveries = self.collect(max, now);
        if !deliveries.is_empty() {
            return Ok(Some(Polled::Deliveries(deliveries)));
        }
        self.trouble.take().map_or(Ok(None), Err)
    }

    /// Notes that events below `first` were removed unread.
    pub(super) fn jump(&mut self, partition: u32, first: u64, error: Error) {
        if let Some(owned) = self.owned.get_mut(&partition) {
            // What is read ahead comes before the hole.
            if owned.ahead.is_empty() {
                match &mut owned.cursor {
                    Some(cursor) => drop(cursor.jump(first)),
                    None => owned.cursor = Some(Cursor::new(self.order, first)),
                }
            }
            self.news.push_back(News::Failed(error));
        }
    }

    /// Hands out at most `max` deliveries.
    fn collect(&mut self, max: usize, now: Instant) -> Vec<Delivery> {
        let until = lease_end(now, FOR_EVER);
        let mut deliveries = Vec::new();
        let Self { owned, hand, order, n_ahead, bytes_ahead, .. } = self;
        for (partition, owned) in owned {
            if owned.revoke_at.is_some() || owned.start.is_some() {
                continue;
            }
            let Owned { cursor, ahead, epoch, committed, .. } = owned;
            let cursor = match (cursor, ahead.front()) {
                (Some(cursor), _) => cursor,
                (none, Some(first)) => {
                    *committed = first.offset;
                    none.insert(Cursor::new(*order, first.offset))
                }
                (None, None) => continue,
            };
            let next = |_| {
                let stored = ahead.pop_front()?;
                let size = stored.content.size_bytes();
                *n_ahead -= 1;
                *bytes_ahead -= size;
                Some(Entry {
                    offset: stored.offset,
                    content: stored.content,
                    size,
                    stored_at: stored.stored_at,
                    past: Past::Fresh,
                })
            };
            let left = max - deliveries.len();
            hand.fill(cursor, now, until, left, next, |handed| {
                let (partition, epoch) = (PartitionId(*partition), *epoch);
                let place = Place { partition, epoch, offset: handed.offset, handout: handed.handout };
                deliveries.push(
                    Delivery::new(place.token(), partition, handed.content)
                        .with_offset(crate::Offset(handed.offset))
                        .with_stored_at(handed.stored_at),
                );
            });
        }
        deliveries
    }

    /// When a delayed retry is due that the window has room for.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        if self.hand.room() == 0 {
            return None;
        }
        let held = self.owned.values().filter(|owned| owned.revoke_at.is_none());
        held.filter_map(|owned| owned.cursor.as_ref()?.due_at()).min()
    }

    /// Settles in memory; the caller commits [`floors`](Self::floors). Returns the tokens that are void.
    pub(super) fn settle(&mut self, outcomes: &[(Token, Settle)], now: Instant) -> Vec<Token> {
        let mut lost = Vec::new();
        for (token, how) in outcomes {
            let Place { partition, epoch, offset, handout } = Place::of(*token);
            let owned = self.owned.get_mut(&partition.0).filter(|owned| owned.epoch == epoch);
            let Some(cursor) = owned.and_then(|owned| owned.cursor.as_mut()) else {
                lost.push(*token);
                continue;
            };
            match cursor.settle(offset, handout, *how, now) {
                Settling::Done { size } => self.hand.give_back(1, size),
                Settling::Repeated => {}
                Settling::Lost => lost.push(*token),
            }
        }
        lost
    }

    /// The floors that are above what is committed.
    pub(super) fn floors(&self) -> Vec<Floor> {
        let moved = |(partition, owned): (&u32, &Owned)| {
            let floor = owned.cursor.as_ref()?.floor();
            (floor > owned.committed).then_some(Floor { partition: *partition, epoch: owned.epoch, floor })
        };
        self.owned.iter().filter_map(moved).collect()
    }

    pub(super) fn committed(&mut self, floors: &[Floor]) {
        for Floor { partition, epoch, floor } in floors {
            if let Some(owned) = self.owned.get_mut(partition).filter(|owned| owned.epoch == *epoch) {
                owned.committed = owned.committed.max(*floor);
            }
        }
    }
}

fn drop_ahead(owned: &mut Owned, n_ahead: &mut usize, bytes_ahead: &mut usize) {
    *n_ahead -= owned.ahead.len();
    *bytes_ahead -= owned.ahead.iter().map(|stored| stored.content.size_bytes()).sum::<usize>();
    owned.ahead.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::name::{Group, Topic};

    #[test]
    fn what_keeps_failing_is_told_once_and_not_when_it_is_over() {
        let subscription = Subscription::group(Topic::new("t").unwrap(), Group::new("g").unwrap());
        let mut hold = Hold::new(&subscription);
        let look = |hold: &mut Hold| hold.look(16, Instant::now());
        for n in 0..20 {
            hold.fail(Error::new(ErrorKind::Unavailable, format!("for the time {n}")));
        }
        assert!(look(&mut hold).unwrap_err().to_string().contains("for the time 19"));
        assert!(look(&mut hold).unwrap().is_none());
        hold.fail(Error::new(ErrorKind::Unavailable, "until there are partitions"));
        hold.gain(&[0], &BTreeMap::new());
        assert!(matches!(look(&mut hold), Ok(Some(Polled::Assigned(_)))));
        assert!(look(&mut hold).unwrap().is_none());
        // What is told once is told whatever came since.
        hold.tell(Error::new(ErrorKind::Corrupt, "the log was cut"));
        hold.gain(&[1], &BTreeMap::new());
        assert_eq!(look(&mut hold).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
