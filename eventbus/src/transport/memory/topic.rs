//! One topic: the logs of its partitions, its groups, and the room that bounds them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::Options;
use super::closing::Closing;
use super::group::GroupState;
use super::inbox::{Inbox, Kept};
use crate::admin::TopicSpec;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Group;
use crate::partition::PartitionId;
use crate::transport::kit::wall::Wall;
use crate::transport::{Content, Receipt};

/// How often a consumer lets others run before it sleeps on the lock.
const TURNS: usize = 4;
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
    /// Locked after `inner`, where both are.
    inbox: Mutex<Inbox>,
    inner: Mutex<Inner>,
    /// Members that found nothing and sleep.
    n_asleep: Arc<AtomicUsize>,
    /// Rung at every arrival, for readers outside groups, while there are any.
    arrivals: Notify,
    n_listening: AtomicUsize,
    ring: usize,
    wall: Arc<Wall>,
}

pub(super) struct Inner {
    pub(super) logs: Vec<Log>,
    pub(super) groups: BTreeMap<GroupId, GroupState>,
    pub(super) deleted: bool,
    /// What was in the inbox a moment ago; empty, kept for its room.
    taken: Vec<(PartitionId, Stored)>,
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
    pub(super) n_bytes: usize,
    pub(super) stored_at: SystemTime,
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
            inbox: Mutex::new(Inbox::new(spec.partitions.get(), kept_without_groups(ring), options.dedup)),
            inner: Mutex::new(Inner {
                logs: (0..spec.partitions.get()).map(|_| log()).collect(),
                groups: BTreeMap::new(),
                deleted: false,
                taken: Vec::new(),
            }),
            n_asleep: Arc::default(),
            arrivals: Notify::new(),
            n_listening: AtomicUsize::new(0),
            spec,
            ring,
            wall,
        }
    }

    /// Locks the topic, with everything in it that was published before.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock();
        self.fill(&mut inner, &mut self.inbox.lock());
        inner
    }

    /// Lets others run while somebody works on the topic: to sleep on its lock costs a thread more than that.
    pub(super) async fn free(&self) {
        for _ in 0..TURNS {
            if !self.inner.is_locked() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Whether nothing was published since the topic was locked.
    pub(super) fn is_up_to_date(&self) -> bool {
        self.inbox.lock().is_empty()
    }

    pub(super) fn n_asleep(&self) -> Arc<AtomicUsize> {
        self.n_asleep.clone()
    }

    /// Takes what was published into the logs, and wakes those of its owners who sleep.
    fn fill(&self, inner: &mut Inner, inbox: &mut Inbox) {
        if inbox.is_empty() {
            return;
        }
        let Inner { logs, groups, taken, .. } = inner;
        let next = inbox.empty_into(taken);
        let anybody_sleeps = self.n_asleep.load(Atomic::Relaxed) > 0;
        for (partition, stored) in taken.drain(..) {
            let at = partition.0 as usize;
            if let Some(log) = logs.get_mut(at) {
                log.entries.push_back(stored);
            }
            if anybody_sleeps {
                for group in groups.values_mut() {
                    let owner = group.shares.get(at).and_then(|share| share.owner);
                    if let Some(member) = owner.and_then(|id| group.members.get_mut(&id)) {
                        member.rouse();
                    }
                }
            }
        }
        if let Some(next) = next {
            for (log, next) in logs.iter_mut().zip(next) {
                // Nothing of what was not kept is in the way: nobody had a place before it.
                if log.next() < *next {
                    log.base = *next;
                    log.free_below = *next;
                }
            }
        }
        if groups.is_empty() {
            for log in logs {
                let next = log.next();
                self.trim(log, next);
            }
        }
    }

    /// Stores events for which room was taken. Their owners find them, or are woken.
    pub(super) fn append(&self, batch: impl Iterator<Item = Envelope>, receipt: impl FnMut(Receipt)) {
        let now = self.wall.now();
        let (unused, kept) = {
            let mut inbox = self.inbox.lock();
            (inbox.take(batch, now, receipt), inbox.kept())
        };
        self.give_room(unused.n_events, unused.n_bytes);
        self.arrived(kept == Kept::ForReplay);
    }

    /// Puts bytes into a partition as a foreign producer would: the raw hook of the conformance suite.
    pub(super) fn append_raw(&self, partition: PartitionId, content: Content) -> Result<()> {
        let full = |_| Error::new(ErrorKind::Full, "the topic has no room").with("topic", &self.spec.topic);
        let n_bytes = content.size_bytes().min(self.max_bytes);
        self.room_events.try_acquire().map_err(full)?.forget();
        // `max_bytes` is at most u32::MAX.
        match self.room_bytes.try_acquire_many(n_bytes as u32) {
            Ok(room) => room.forget(),
            Err(none) => {
                self.give_room(1, 0);
                return Err(full(none));
            }
        }
        let mut inner = self.inner.lock();
        let mut inbox = self.inbox.lock();
        // What was numbered before and not kept is behind us then.
        self.fill(&mut inner, &mut inbox);
        inbox.take_raw(partition, content, self.wall.now());
        self.fill(&mut inner, &mut inbox);
        drop((inbox, inner));
        self.arrived(false);
        Ok(())
    }

    /// Who goes to sleep says so before a last look into the inbox: whoever put something there after that look
    /// sees it here.
    fn arrived(&self, must_fill: bool) {
        if must_fill || self.n_asleep.load(Atomic::Relaxed) > 0 {
            drop(self.lock());
        }
        if self.n_listening.load(Atomic::Relaxed) > 0 {
            self.arrivals.notify_waiters();
        }
    }

    /// Waits until a condition holds that arrivals change. It is to lock the topic.
    pub(super) async fn until(&self, holds: impl Fn() -> bool) {
        let _listening = Listening::begin(&self.n_listening);
        loop {
            // Listen first, look second: an arrival between the two is not missed.
            let mut arrival = std::pin::pin!(self.arrivals.notified());
            arrival.as_mut().enable();
            if holds() {
                return;
            }
            arrival.await;
        }
    }

    /// Keeps events from now on for a group that is about to begin.
    pub(super) fn keep_for_groups(&self, inner: &mut Inner) {
        let mut inbox = self.inbox.lock();
        self.fill(inner, &mut inbox);
        inbox.keep(Kept::ForGroups);
    }

    /// Keeps events no longer, if the last group is gone.
    fn keep_for_whom(&self, inner: &mut Inner) {
        if inner.groups.is_empty() {
            let mut inbox = self.inbox.lock();
            self.fill(inner, &mut inbox);
            inbox.keep(kept_without_groups(self.ring));
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
        let mut inner = self.lock();
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
        self.keep_for_whom(inner);
    }

    /// Marks the topic as deleted and wakes everybody who waits on it.
    pub(super) fn delete(&self) {
        let mut inner = self.lock();
        inner.deleted = true;
        for member in inner.groups.values().flat_map(|group| group.members.values()) {
            member.wake.notify_one();
        }
        self.room_events.close();
        self.room_bytes.close();
        self.arrivals.notify_waiters();
    }
}

const fn kept_without_groups(ring: usize) -> Kept {
    if ring > 0 { Kept::ForReplay } else { Kept::Not }
}

/// Counts a reader that waits for arrivals, also when its future is dropped.
struct Listening<'a>(&'a AtomicUsize);

impl<'a> Listening<'a> {
    fn begin(n_listening: &'a AtomicUsize) -> Self {
        n_listening.fetch_add(1, Atomic::Relaxed);
        Self(n_listening)
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Atomic::Relaxed);
    }
}
