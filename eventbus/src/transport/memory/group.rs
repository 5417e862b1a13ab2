//! A group in one topic: its members, and its cursor in each partition.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::closing::Closing;
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::Polled;
use crate::transport::kit::assign;
use crate::transport::kit::cursor::{Cursor, Order, lease_end};
use crate::transport::kit::hand::Hand;

pub(super) struct GroupState {
    pub(super) members: BTreeMap<u64, Member>,
    pub(super) shares: Vec<Share>,
    /// Forgotten with its last member: a broadcast instance.
    pub(super) ephemeral: bool,
}

/// One partition as the group sees it.
pub(super) struct Share {
    pub(super) cursor: Cursor,
    pub(super) owner: Option<u64>,
    /// Counts the owners, so that a token of an earlier one is void.
    pub(super) epoch: u32,
    /// Set while the owner drains it for another member.
    pub(super) revoke_at: Option<Instant>,
}

pub(super) struct Member {
    pub(super) wake: Arc<Notify>,
    pub(super) news: VecDeque<News>,
    pub(super) hand: Hand,
    pub(super) lease: Duration,
    pub(super) revoke_within: Duration,
    /// A member that neither polls nor answers until then may lose its partitions to others.
    pub(super) alive_until: Instant,
    pub(super) polls_waiting: usize,
    /// It found nothing and sleeps: whoever has something for it wakes it once.
    asleep: bool,
    /// Counts those who sleep, for publishers.
    n_asleep: Arc<AtomicUsize>,
    /// The transport value it was opened from.
    pub(super) opened_from: Arc<Closing>,
}

pub(super) enum News {
    Polled(Polled),
    DataLoss { expected: u64, first: u64, partition: PartitionId },
}

impl Drop for Member {
    fn drop(&mut self) {
        self.is_awake();
    }
}

impl Member {
    pub(super) fn new(
        subscription: &Subscription,
        wake: Arc<Notify>,
        n_asleep: Arc<AtomicUsize>,
        opened_from: Arc<Closing>,
        now: Instant,
    ) -> Self {
        Self {
            wake,
            news: VecDeque::new(),
            hand: Hand::new(subscription.window, subscription.window_bytes),
            lease: subscription.lease,
            revoke_within: subscription.revoke_within,
            alive_until: lease_end(now, subscription.lease),
            polls_waiting: 0,
            asleep: false,
            n_asleep,
            opened_from,
        }
    }

    pub(super) fn is_alive(&self, now: Instant) -> bool {
        self.polls_waiting > 0 || self.alive_until > now
    }

    pub(super) fn touch(&mut self, now: Instant) {
        self.alive_until = self.alive_until.max(lease_end(now, self.lease));
    }

    pub(super) fn doze(&mut self) {
        if !std::mem::replace(&mut self.asleep, true) {
            self.n_asleep.fetch_add(1, Atomic::Relaxed);
        }
    }

    pub(super) fn is_awake(&mut self) {
        if std::mem::take(&mut self.asleep) {
            self.n_asleep.fetch_sub(1, Atomic::Relaxed);
        }
    }

    pub(super) fn rouse(&mut self) {
        if self.asleep {
            self.is_awake();
            self.wake.notify_one();
        }
    }

    fn tell(&mut self, polled: Polled) {
        self.news.push_back(News::Polled(polled));
        self.wake.notify_one();
    }
}

impl GroupState {
    pub(super) fn new(order: Order, floors: impl Iterator<Item = u64>, ephemeral: bool) -> Self {
        let share =
            |floor| Share { cursor: Cursor::new(order, floor), owner: None, epoch: 0, revoke_at: None };
        Self { members: BTreeMap::new(), shares: floors.map(share).collect(), ephemeral }
    }

    /// Brings ownership in line with the members that live. Call after every change of members.
    pub(super) fn rebalance(&mut self, now: Instant) {
        let live: Vec<u64> =
            self.members.iter().filter(|(_, member)| member.is_alive(now)).map(|(id, _)| *id).collect();
        let live = if live.is_empty() { self.members.keys().copied().collect() } else { live };
        let targets = assign::targets(&live, self.shares.len() as u32);
        let mut assigned: BTreeMap<u64, Vec<PartitionId>> = BTreeMap::new();
        let mut revoked = assigned.clone();
        let mut lost = assigned.clone();
        for (at, (share, target)) in self.shares.iter_mut().zip(targets).enumerate() {
            let Some(target) = live.get(target).copied() else { continue };
            let partition = PartitionId(at as u32);
            match share.owner {
                Some(owner) if owner == target && share.revoke_at.is_none() => {}
                // A revocation is not withdrawn: what the owner put aside must be handed out again, in
                // order, and that begins with a release.
                Some(owner) if live.contains(&owner) && share.revoke_at.is_none_or(|end| end > now) => {
                    if share.revoke_at.is_none() {
                        let budget =
                            self.members.get(&owner).map_or(Duration::ZERO, |member| member.revoke_within);
                        share.revoke_at = Some(lease_end(now, budget));
                        revoked.entry(owner).or_default().push(partition);
                    }
                }
                previous => {
                    if let Some(owner) = previous {
                        take_from(share, self.members.get_mut(&owner));
                        lost.entry(owner).or_default().push(partition);
                    }
                    share.owner = Some(target);
                    share.epoch = share.epoch.wrapping_add(1);
                    share.revoke_at = None;
                    assigned.entry(target).or_default().push(partition);
                }
            }
        }
        for (id, member) in &mut self.members {
            if let Some(partitions) = lost.remove(id) {
                member.tell(Polled::Lost(partitions));
            }
            if let Some(partitions) = revoked.remove(id) {
                let deadline = lease_end(now, member.revoke_within).into_std();
                member.tell(Polled::Revoking { partitions, deadline });
            }
            if let Some(partitions) = assigned.remove(id) {
                member.tell(Polled::Assigned(partitions));
            }
        }
    }

    /// Takes back what timed out: leases of deliveries, partitions that were to be released, members
    /// that went silent while others wait.
    pub(super) fn keep_time(&mut self, now: Instant) {
        let mut overdue = false;
        for share in &mut self.shares {
            let (n_ended, size) = share.cursor.expire(now);
            if n_ended > 0
                && let Some(owner) = share.owner.and_then(|id| self.members.get_mut(&id))
            {
                owner.hand.give_back(n_ended, size);
                owner.wake.notify_one();
            }
            overdue |= share.revoke_at.is_some_and(|end| end <= now);
        }
        overdue |= self.members.len() > 1
            && self.shares.iter().any(|share| {
                share.owner.and_then(|id| self.members.get(&id)).is_some_and(|owner| !owner.is_alive(now))
            });
        if overdue {
            self.rebalance(now);
        }
    }

    /// When a waiting member has to look again: [`keep_time`](Self::keep_time) has something to do, or
    /// an event that the member could take is due. Anything else would wake it for nothing, again and again.
    pub(super) fn wake_at(&self, member: u64, now: Instant) -> Option<Instant> {
        let has_room = self.members.get(&member).is_some_and(|member| member.hand.room() > 0);
        let shares = self.shares.iter().flat_map(|share| {
            let takes = has_room && share.owner == Some(member) && share.revoke_at.is_none();
            [share.cursor.expiry(), share.revoke_at, takes.then(|| share.cursor.due_at()).flatten()]
        });
        let owners = self.shares.iter().filter_map(|share| self.members.get(&share.owner?));
        // Who polls now may fall silent at any time after.
        let later =
            (self.members.len() > 1).then(|| self.members.values().map(|other| other.lease).min()).flatten();
        let later = later.and_then(|lease| now.checked_add(lease));
        let silent = owners
            .filter(|owner| self.members.len() > 1 && owner.polls_waiting == 0 && owner.alive_until > now);
        shares.flatten().chain(silent.map(|owner| owner.alive_until)).chain(later).min()
    }

    /// Hands partitions back; what is in hand of them goes to the next owner.
    pub(super) fn release(&mut self, member: u64, partitions: &[PartitionId], now: Instant) {
        for partition in partitions {
            if let Some(share) = self.shares.get_mut(partition.0 as usize)
                && share.owner == Some(member)
            {
                take_from(share, self.members.get_mut(&member));
            }
        }
        self.rebalance(now);
    }

    pub(super) fn leave(&mut self, member: u64, now: Instant) {
        for share in &mut self.shares {
            if share.owner == Some(member) {
                take_from(share, None);
            }
        }
        if let Some(gone) = self.members.remove(&member) {
            // A poll that waits must see that it is closed.
            gone.wake.notify_one();
            gone.wake.notify_waiters();
        }
        self.rebalance(now);
    }
}

fn take_from(share: &mut Share, owner: Option<&mut Member>) {
    if let Some(owner) = owner {
        let (n_in_hand, bytes) = share.cursor.in_hand();
        owner.hand.give_back(n_in_hand, bytes);
    }
    share.cursor.abandon();
    share.owner = None;
    share.revoke_at = None;
}
