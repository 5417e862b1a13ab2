//! The partitions a consumer owns: read ahead, handed out, settled in memory, and what must be saved.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Fetched, Gained, Progress, Standing, Stored, Wanted};
use crate::error::{Error, ErrorKind};
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::kit::cursor::{Cursor, Entry, Order, Past, Settling, lease_end};
use crate::transport::kit::hand::{self, Hand, Place};
use crate::transport::{Delivery, Polled, Settle, Token};

pub(super) struct Partitions {
    owned: BTreeMap<u32, Owned>,
    hand: Hand,
    order: Order,
    lease: Duration,
    revoke_within: Duration,
    pub(super) news: VecDeque<News>,
    /// `None` = not known yet.
    pub(super) generation: Option<u64>,
}

struct Owned {
    epoch: u32,
    cursor: Cursor,
    exceptions: HashMap<u64, Past>,
    /// Read ahead; the first is at the cursor's next or above.
    buffer: VecDeque<Stored>,
    revoke_at: Option<Instant>,
    dirty: BTreeSet<u64>,
    /// Events below the floor that is stored, since we own the partition.
    n_saved: u64,
    moved: bool,
    has_exceptions: bool,
}

pub(super) enum News {
    Polled(Polled),
    Failed(Error),
}

impl Partitions {
    pub(super) fn new(subscription: &Subscription) -> Self {
        let order = match subscription.ordering {
            crate::capability::Ordering::None => Order::None,
            _ => Order::PerKey,
        };
        Self {
            owned: BTreeMap::new(),
            hand: Hand::new(subscription.window, subscription.window_bytes),
            order,
            lease: subscription.lease,
            revoke_within: subscription.revoke_within,
            news: VecDeque::new(),
            generation: None,
        }
    }

    /// What we believe to own, by epoch.
    pub(super) fn known(&self) -> BTreeMap<u32, u32> {
        self.owned.iter().map(|(partition, owned)| (*partition, owned.epoch)).collect()
    }

    /// Takes over what the store says of the group.
    pub(super) fn apply(&mut self, standing: Standing, now: Instant) {
        self.generation = Some(standing.generation);
        self.lose(&standing.lost);
        let gained: Vec<_> = standing.gained.iter().map(|gained| PartitionId(gained.partition)).collect();
        for Gained { partition, epoch, floor, exceptions } in standing.gained {
            let has_exceptions = !exceptions.is_empty();
            let cursor = Cursor::new(self.order, floor);
            let owned = Owned {
                epoch,
                cursor,
                exceptions,
                buffer: VecDeque::new(),
                revoke_at: None,
                dirty: BTreeSet::new(),
                n_saved: 0,
                moved: false,
                has_exceptions,
            };
            self.owned.insert(partition, owned);
        }
        if !gained.is_empty() {
            self.news.push_back(News::Polled(Polled::Assigned(gained)));
        }
        let deadline = lease_end(now, self.revoke_within);
        let mut revoking = Vec::new();
        for (partition, owned) in &mut self.owned {
            let release = standing.to_release.contains(partition);
            // It is not withdrawn: what the owner put aside must be handed out again, in order, and
            // that begins with a release.
            if release && owned.revoke_at.is_none() {
                owned.revoke_at = Some(deadline);
                revoking.push(PartitionId(*partition));
            }
        }
        if !revoking.is_empty() {
            self.news.push_back(News::Polled(Polled::Revoking {
                partitions: revoking,
                deadline: deadline.into_std(),
            }));
        }
    }

    /// Forgets partitions that another member has.
    pub(super) fn lose(&mut self, partitions: &[u32]) {
        let gone: Vec<_> =
            partitions.iter().copied().filter(|partition| self.forget(*partition)).map(PartitionId).collect();
        if !gone.is_empty() {
            self.news.push_back(News::Polled(Polled::Lost(gone)));
        }
    }

    /// Forgets a partition without news; false if it was not ours.
    pub(super) fn forget(&mut self, partition: u32) -> bool {
        let Some(owned) = self.owned.remove(&partition) else { return false };
        let (n_events, n_bytes) = owned.cursor.in_hand();
        self.hand.give_back(n_events, n_bytes);
        true
    }

    /// Partitions whose time to be released is over.
    pub(super) fn overdue(&self, now: Instant) -> Vec<u32> {
        let late = |owned: &Owned| owned.revoke_at.is_some_and(|end| end <= now);
        self.owned.iter().filter(|(_, owned)| late(owned)).map(|(partition, _)| *partition).collect()
    }

    pub(super) fn owns(&self, partition: u32, epoch: u32) -> bool {
        self.owned.get(&partition).is_some_and(|owned| owned.epoch == epoch)
    }

    /// When to look again although nothing arrives: a lease or a time to release ends, or an event that
    /// the window has room for is due.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let has_room = self.hand.room() > 0;
        let times = self.owned.values().flat_map(|owned| {
            let takes = has_room && owned.revoke_at.is_none();
            [owned.cursor.expiry(), owned.revoke_at, takes.then(|| owned.cursor.due_at()).flatten()]
        });
        times.flatten().min()
    }

    /// Partitions to read: nothing is buffered and the window has room.
    pub(super) fn wanted(&self, max_waiting_bytes: usize) -> Vec<Wanted> {
        if self.hand.room() == 0 {
            return Vec::new();
        }
        let reads = |owned: &Owned| {
            owned.buffer.is_empty() && owned.revoke_at.is_none() && owned.cursor.may_read(max_waiting_bytes)
        };
        self.owned
            .iter()
            .filter(|(_, owned)| reads(owned))
            .map(|(partition, owned)| Wanted {
                partition: *partition,
                epoch: owned.epoch,
                from: owned.cursor.next(),
            })
            .collect()
    }

    /// Takes rows that were read, unless the partition moved on in the meantime.
    pub(super) fn fetched(&mut self, fetched: Vec<Fetched>) {
        for Fetched { wanted, first, rows } in fetched {
            let Some(owned) = self.owned.get_mut(&wanted.partition) else { continue };
            if owned.epoch != wanted.epoch || owned.cursor.next() != wanted.from || !owned.buffer.is_empty() {
                continue;
            }
            if let Some(expected) = owned.cursor.jump(first) {
                let kind =
                    ErrorKind::DataLoss { expected: crate::Offset(expected), first: crate::Offset(first) };
                let error = Error::new(kind, "events were removed before this group read them")
                    .with("partition", wanted.partition);
                self.news.push_back(News::Failed(error));
                owned.moved = true;
                continue;
            }
            owned.buffer.extend(rows);
        }
    }

    /// Hands out at most `max` deliveries.
    pub(super) fn collect(&mut self, max: usize, now: Instant) -> Vec<Delivery> {
        let until = lease_end(now, self.lease);
        let mut deliveries = Vec::new();
        for (partition, owned) in &mut self.owned {
            let (n_ended, size) = owned.cursor.expire(now);
            self.hand.give_back(n_ended, size);
            if owned.revoke_at.is_some() {
                continue;
            }
            let (buffer, exceptions) = (&mut owned.buffer, &mut owned.exceptions);
            let next = |_| {
                let row = buffer.pop_front()?;
                let past = exceptions.remove(&row.offset).unwrap_or_default();
                Some(Entry {
                    offset: row.offset,
                    size: row.content.size_bytes(),
                    content: row.content,
                    stored_at: row.stored_at,
                    past,
                })
            };
            let (epoch, left) = (owned.epoch, max - deliveries.len());
            self.hand.fill(&mut owned.cursor, now, until, left, next, |handed| {
                deliveries.push(hand::delivery(handed, PartitionId(*partition), epoch));
            });
        }
        deliveries
    }

    /// Settles in memory; the caller saves [`progress`](Self::progress). Returns the tokens that are void.
    pub(super) fn settle(&mut self, outcomes: &[(Token, Settle)], now: Instant) -> Vec<Token> {
        let mut lost = Vec::new();
        for (token, how) in outcomes {
            let Place { partition, epoch, offset, handout } = Place::of(*token);
            let Some(owned) = self.owned.get_mut(&partition.0).filter(|owned| owned.epoch == epoch) else {
                lost.push(*token);
                continue;
            };
            match owned.cursor.settle(offset, handout, *how, now) {
                Settling::Done { size } => {
                    self.hand.give_back(1, size);
                    owned.moved = true;
                    owned.dirty.insert(offset);
                }
                Settling::Repeated => {}
                Settling::Lost => lost.push(*token),
            }
        }
        lost
    }

    pub(super) fn renew(&mut self, tokens: &[Token], until: Instant) -> Vec<Token> {
        let held = |token: &Token, owned: &mut BTreeMap<u32, Owned>| {
            let Place { partition, epoch, offset, handout } = Place::of(*token);
            let owned = owned.get_mut(&partition.0).filter(|owned| owned.epoch == epoch);
            owned.is_some_and(|owned| owned.cursor.renew(offset, handout, until))
        };
        tokens.iter().copied().filter(|token| !held(token, &mut self.owned)).collect()
    }

    /// What is settled and not saved yet. The caller gives it back by [`unsaved`](Self::unsaved) if saving fails.
    pub(super) fn progress(&mut self) -> Arc<[Progress]> {
        let moved = self.owned.iter_mut().filter(|(_, owned)| owned.moved);
        moved
            .map(|(partition, owned)| {
                owned.moved = false;
                let floor = owned.cursor.floor();
                let n_passed = owned.cursor.n_passed() - owned.n_saved;
                owned.n_saved += n_passed;
                let dirty = std::mem::take(&mut owned.dirty);
                let changed: Vec<_> = dirty
                    .into_iter()
                    .filter(|offset| *offset >= floor)
                    .map(|offset| (offset, owned.cursor.past(offset)))
                    .collect();
                let has_exceptions = owned.has_exceptions;
                owned.has_exceptions |= !changed.is_empty();
                Progress {
                    partition: *partition,
                    epoch: owned.epoch,
                    floor,
                    n_passed,
                    changed,
                    has_exceptions,
                }
            })
            .collect()
    }

    /// Takes back progress that could not be saved, so that the next settle saves it.
    pub(super) fn unsaved(&mut self, progress: &[Progress]) {
        for part in progress {
            if let Some(owned) = self.owned.get_mut(&part.partition).filter(|owned| owned.epoch == part.epoch)
            {
                owned.moved = true;
                owned.n_saved -= part.n_passed;
                owned.dirty.extend(part.changed.iter().map(|(offset, _)| *offset));
            }
        }
    }
}
