//! One topic: the logs of its partitions, its groups, and the room that bounds them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::Options;
use super::closing::Closing;
use super::group::GroupState;
use crate::admin::{Offset, TopicSpec};
use crate::envelope::Envelope;
use crate::id::EventId;
use crate::name::Group;
use crate::partition::{self, PartitionId};
use crate::transport::wall::Wall;
use crate::transport::{Content, Receipt};

/// Dead letters a partition keeps at least.
const MIN_LETTERS: usize = 1_000;

/// The name of a group, or the number of a broadcast instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum GroupId {
    Named(Group),
    Broadcast(u64),
}

pub(super) struct TopicState {
    pub(super) spec: TopicSpec,
    pub(super) room_events: Semaphore,
    pub(super) room_bytes: Semaphore,
    pub(super) max_events: usize,
    pub(super) max_bytes: usize,
    /// Rung at every arrival, for readers outside groups.
    pub(super) arrivals: Notify,
    inner: Mutex<Inner>,
    ring: usize,
    wall: Arc<Wall>,
}

pub(super) struct Inner {
    pub(super) logs: Vec<Log>,
    pub(super) groups: BTreeMap<GroupId, GroupState>,
    pub(super) deleted: bool,
    dedup: Option<Dedup>,
    last_stored: SystemTime,
}

/// One partition's events that somebody may still read.
pub(super) struct Log {
    pub(super) base: u64,
    pub(super) entries: VecDeque<Stored>,
    /// Events below were settled by every group and no longer take room.
    free_below: u64,
}

pub(super) struct Stored {
    pub(super) content: Content,
    /// Bytes of room that it takes.
    n_bytes: usize,
    pub(super) stored_at: SystemTime,
}

struct Dedup {
    window: Duration,
    seen: HashMap<(String, EventId), Receipt>,
    ages: VecDeque<(Instant, (String, EventId))>,
}

impl Log {
    pub(super) fn next(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    pub(super) fn get(&self, offset: u64) -> Option<&Stored> {
        self.entries.get(offset.checked_sub(self.base)? as usize)
    }
}

impl TopicState {
    pub(super) fn new(spec: TopicSpec, options: &Options, wall: Arc<Wall>) -> Self {
        let log = || Log { base: 0, entries: VecDeque::new(), free_below: 0 };
        let ring = spec.retention.max_events.map_or(options.replay, |events| events.get() as usize);
        // A dead letter is kept although no group reads it: it is the last copy.
        let ring = if spec.topic.as_str().ends_with(".dlq") { ring.max(MIN_LETTERS) } else { ring };
        Self {
            room_events: Semaphore::new(options.max_events.get().min(Semaphore::MAX_PERMITS)),
            room_bytes: Semaphore::new(options.max_bytes.get().min(u32::MAX as usize)),
            max_events: options.max_events.get(),
            max_bytes: options.max_bytes.get().min(u32::MAX as usize),
            arrivals: Notify::new(),
            inner: Mutex::new(Inner {
                logs: (0..spec.partitions.get()).map(|_| log()).collect(),
                groups: BTreeMap::new(),
                deleted: false,
                dedup: options.dedup.map(|window| Dedup {
                    window,
                    seen: HashMap::new(),
                    ages: VecDeque::new(),
                }),
                last_stored: SystemTime::UNIX_EPOCH,
            }),
            spec,
            ring,
            wall,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Stores events for which room was taken, and wakes their owners. Returns a receipt each.
    pub(super) fn append(&self, batch: impl Iterator<Item = Envelope>, mut receipt: impl FnMut(Receipt)) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let now = self.wall.now().max(inner.last_stored);
        inner.last_stored = now;
        let (mut n_unused, mut bytes_unused) = (0, 0);
        let keeps = !inner.groups.is_empty() || self.ring > 0;
        for envelope in batch {
            let partition = partition::of_envelope(&envelope, self.spec.partitions.get());
            let Some(log) = inner.logs.get_mut(partition.0 as usize) else { continue };
            let place = Receipt::new(partition, Offset(log.next()));
            if let Some(dedup) = &mut inner.dedup
                && let Some(first) = dedup.meet(&envelope, place)
            {
                n_unused += 1;
                bytes_unused += envelope.size_bytes();
                receipt(first.duplicate());
                continue;
            }
            receipt(place);
            if !keeps {
                // Nobody can ever read it: a new group starts behind it.
                log.base += 1;
                log.free_below = log.base;
                n_unused += 1;
                bytes_unused += envelope.size_bytes();
                continue;
            }
            let n_bytes = envelope.size_bytes();
            log.entries.push_back(Stored { content: Content::Envelope(envelope), n_bytes, stored_at: now });
            for group in inner.groups.values_mut() {
                let owner = group.shares.get(partition.0 as usize).and_then(|share| share.owner);
                if let Some(member) = owner.and_then(|id| group.members.get_mut(&id)) {
                    member.rouse();
                }
            }
        }
        if inner.groups.is_empty() && keeps {
            for log in &mut inner.logs {
                let next = log.next();
                self.trim(log, next);
            }
        }
        self.give_room(n_unused, bytes_unused);
        self.arrivals.notify_waiters();
    }

    /// Puts bytes into a partition as a foreign producer would: the raw hook of the conformance suite.
    pub(super) fn append_raw(&self, partition: PartitionId, content: Content) {
        let mut inner = self.inner.lock();
        let stored_at = self.wall.now().max(inner.last_stored);
        if let Some(log) = inner.logs.get_mut(partition.0 as usize) {
            let n_bytes = content.size_bytes();
            log.entries.push_back(Stored { content, n_bytes, stored_at });
        }
        for member in inner.groups.values().flat_map(|group| group.members.values()) {
            member.wake.notify_one();
        }
    }

    /// Forgets what every group has settled, beyond the replay ring.
    pub(super) fn settled(&self, inner: &mut Inner, partition: PartitionId) {
        let at = partition.0 as usize;
        let floors =
            inner.groups.values().filter_map(|group| group.shares.get(at)).map(|share| share.cursor.floor());
        let floor = floors.min();
        if let Some(log) = inner.logs.get_mut(at) {
            let floor = floor.unwrap_or(log.next());
            self.trim(log, floor);
        }
    }

    fn trim(&self, log: &mut Log, floor: u64) {
        let (mut n_events, mut n_bytes) = (0, 0);
        while log.free_below < floor {
            if let Some(stored) = log.get(log.free_below) {
                n_events += 1;
                n_bytes += stored.n_bytes;
            }
            log.free_below += 1;
        }
        while log.base < log.free_below && log.entries.len() > self.ring {
            log.entries.pop_front();
            log.base += 1;
        }
        self.give_room(n_events, n_bytes);
    }

    fn give_room(&self, n_events: usize, n_bytes: usize) {
        if n_events > 0 {
            self.room_events.add_permits(n_events);
        }
        if n_bytes > 0 {
            self.room_bytes.add_permits(n_bytes);
        }
    }

    /// Removes events below `before`, whoever still wants them. Returns how many.
    pub(super) fn purge(&self, inner: &mut Inner, partition: PartitionId, before: u64) -> u64 {
        let Some(log) = inner.logs.get_mut(partition.0 as usize) else { return 0 };
        let before = before.min(log.next());
        let base = log.base;
        self.trim(log, before);
        while log.base < before {
            log.entries.pop_front();
            log.base += 1;
        }
        let n_removed = log.base - base;
        for member in inner.groups.values().flat_map(|group| group.members.values()) {
            member.wake.notify_one();
        }
        n_removed
    }

    /// Ends every member that was opened from one transport value.
    pub(super) fn leave_all(&self, opened_from: &Arc<Closing>) {
        let mut inner = self.inner.lock();
        let now = Instant::now();
        for group in inner.groups.values_mut() {
            let gone: Vec<u64> = group
                .members
                .iter()
                .filter(|(_, member)| Arc::ptr_eq(&member.opened_from, opened_from))
                .map(|(id, _)| *id)
                .collect();
            for member in gone {
                group.leave(member, now);
            }
        }
        self.forget_ephemeral(&mut inner);
    }

    /// Drops broadcast groups without members, and what only they kept.
    pub(super) fn forget_ephemeral(&self, inner: &mut Inner) {
        let before = inner.groups.len();
        inner.groups.retain(|_, group| !group.ephemeral || !group.members.is_empty());
        if inner.groups.len() < before {
            self.forget_settled(inner);
        }
    }

    /// Trims every partition, after a group is gone.
    pub(super) fn forget_settled(&self, inner: &mut Inner) {
        for at in 0..self.spec.partitions.get() {
            self.settled(inner, PartitionId(at));
        }
    }

    /// Marks the topic as deleted and wakes everybody who waits on it.
    pub(super) fn delete(&self) {
        let mut inner = self.inner.lock();
        inner.deleted = true;
        for member in inner.groups.values().flat_map(|group| group.members.values()) {
            member.wake.notify_one();
        }
        self.room_events.close();
        self.room_bytes.close();
        self.arrivals.notify_waiters();
    }
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
