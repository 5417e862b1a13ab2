//! One member's view: poll what its partitions have, settle, hand back.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::closing::Closing;
use super::group::{GroupState, Member, News};
use super::topic::{GroupId, Inner, Log, TopicState};
use crate::admin::Offset;
use crate::capability::Ordering;
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;
use crate::subscription::{Audience, Start, Subscription};
use crate::transport::kit::cursor::{Entry, Order, Past, Settling, lease_end};
use crate::transport::kit::hand::{self, Place};
use crate::transport::{Consumer, Delivery, Polled, Settle, Settled, Token};

pub(super) struct MemoryConsumer {
    topic: Arc<TopicState>,
    group: GroupId,
    member: u64,
    wake: Arc<Notify>,
    /// One poll waits at a time; a second one is queued behind it.
    polling: tokio::sync::Mutex<()>,
}

impl MemoryConsumer {
    pub(super) fn join(
        topic: Arc<TopicState>,
        member: u64,
        subscription: &Subscription,
        opened_from: Arc<Closing>,
    ) -> Result<Self> {
        let wake = Arc::new(Notify::new());
        let group = match &subscription.audience {
            Audience::Group(group) => GroupId::Named(group.clone()),
            Audience::Broadcast => GroupId::Broadcast(member),
        };
        let order = match subscription.ordering {
            Ordering::None => Order::None,
            Ordering::PerKey => Order::PerKey,
            Ordering::PerTopic => Order::Total,
        };
        let now = Instant::now();
        let mut inner = topic.lock();
        if inner.deleted {
            return Err(Error::not_found("the topic was deleted").with("topic", &topic.spec.topic));
        }
        topic.keep_for_groups(&mut inner);
        let Inner { groups, logs, .. } = &mut *inner;
        let state = groups.entry(group.clone()).or_insert_with(|| {
            let floors = logs
                .iter()
                .enumerate()
                .map(|(at, log)| start_of(log, PartitionId(at as u32), &subscription.start));
            GroupState::new(order, floors, matches!(subscription.audience, Audience::Broadcast))
        });
        let newcomer = Member::new(subscription, wake.clone(), topic.n_asleep(), opened_from, now);
        state.members.insert(member, newcomer);
        state.rebalance(now);
        drop(inner);
        Ok(Self { topic, group, member, wake, polling: tokio::sync::Mutex::default() })
    }

    /// Runs `work` on the group and member, unless the member has left.
    fn with<T>(&self, work: impl FnOnce(&mut GroupState, &mut Vec<Log>, Instant) -> T) -> Result<T> {
        let mut inner = self.topic.lock();
        let inner = &mut *inner;
        match inner.groups.get_mut(&self.group) {
            Some(group) if group.members.contains_key(&self.member) => {
                Ok(work(group, &mut inner.logs, Instant::now()))
            }
            _ => Err(Error::closed("consumer")),
        }
    }

    fn leave(&self) {
        let mut inner = self.topic.lock();
        if let Some(group) = inner.groups.get_mut(&self.group) {
            group.leave(self.member, Instant::now());
        }
        self.topic.forget_ephemeral(&mut inner);
    }

    /// Returns what there is now, or when to look again.
    fn look(&self, max: NonZeroUsize) -> Result<Looked> {
        let mut inner = self.topic.lock();
        let inner = &mut *inner;
        let deleted = inner.deleted;
        let Some(group) = inner.groups.get_mut(&self.group) else { return Ok(Looked::Found(Polled::Closed)) };
        let now = Instant::now();
        group.keep_time(now);
        let Some(member) = group.members.get_mut(&self.member) else {
            return Ok(Looked::Found(Polled::Closed));
        };
        let revived = !member.is_alive(now);
        member.touch(now);
        member.is_awake();
        if revived {
            group.rebalance(now);
        }
        let Some(member) = group.members.get_mut(&self.member) else {
            return Ok(Looked::Found(Polled::Closed));
        };
        match member.news.pop_front() {
            Some(News::Polled(polled)) => return Ok(Looked::Found(polled)),
            Some(News::DataLoss { expected, first, partition }) => {
                let kind = ErrorKind::DataLoss { expected: Offset(expected), first: Offset(first) };
                return Err(Error::new(kind, "events were removed before this group read them")
                    .with("topic", &self.topic.spec.topic)
                    .with("partition", partition));
            }
            None if deleted => {
                return Err(Error::not_found("the topic was deleted").with("topic", &self.topic.spec.topic));
            }
            None => {}
        }
        let deliveries = self.collect(group, &inner.logs, max.get(), now);
        if !deliveries.is_empty() {
            return Ok(Looked::Found(Polled::Deliveries(deliveries)));
        }
        match group.members.get_mut(&self.member) {
            Some(member) if !member.news.is_empty() => return Ok(Looked::Again),
            Some(member) => member.doze(),
            None => {}
        }
        if !self.topic.is_up_to_date() {
            return Ok(Looked::Again);
        }
        Ok(Looked::WaitUntil(group.wake_at(self.member, now)))
    }

    fn collect(&self, group: &mut GroupState, logs: &[Log], max: usize, now: Instant) -> Vec<Delivery> {
        let Some(member) = group.members.get_mut(&self.member) else { return Vec::new() };
        let until = lease_end(now, member.lease);
        let mut deliveries = Vec::new();
        for (at, share) in group.shares.iter_mut().enumerate() {
            if share.owner != Some(self.member) || share.revoke_at.is_some() {
                continue;
            }
            let Some(log) = logs.get(at) else { continue };
            let partition = PartitionId(at as u32);
            if let Some(expected) = share.cursor.jump(log.base) {
                member.news.push_back(News::DataLoss { expected, first: log.base, partition });
                continue;
            }
            let next = |offset| {
                let stored = log.get(offset)?;
                Some(Entry {
                    offset,
                    content: stored.content.clone(),
                    size: stored.n_bytes,
                    stored_at: stored.stored_at,
                    past: Past::Fresh,
                })
            };
            let (epoch, left) = (share.epoch, max - deliveries.len());
            member.hand.fill(&mut share.cursor, now, until, left, next, |handed| {
                deliveries.push(hand::delivery(handed, partition, epoch));
            });
        }
        deliveries
    }
}

enum Looked {
    Found(Polled),
    Again,
    WaitUntil(Option<Instant>),
}

fn start_of(log: &Log, partition: PartitionId, start: &Start) -> u64 {
    match start {
        Start::Latest => log.next(),
        Start::Earliest => log.base,
        Start::Offsets(offsets) => {
            offsets.get(&partition).map_or(log.base, |offset| offset.0).clamp(log.base, log.next())
        }
        Start::Time(time) => first_since(log, *time),
    }
}

/// The first offset stored at or after a time; the end if there is none.
pub(super) fn first_since(log: &Log, time: std::time::SystemTime) -> u64 {
    log.base + log.entries.partition_point(|stored| stored.stored_at < time) as u64
}

/// Counts a poll that waits, also when its future is dropped.
struct Waiting<'a>(&'a MemoryConsumer);

impl<'a> Waiting<'a> {
    fn begin(consumer: &'a MemoryConsumer) -> Self {
        drop(consumer.with(|group, _, _| {
            if let Some(member) = group.members.get_mut(&consumer.member) {
                member.polls_waiting += 1;
            }
        }));
        Self(consumer)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        drop(self.0.with(|group, _, now| {
            if let Some(member) = group.members.get_mut(&self.0.member) {
                member.polls_waiting -= 1;
                member.touch(now);
            }
        }));
    }
}

#[async_trait]
impl Consumer for MemoryConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let _one_at_a_time = self.polling.lock().await;
        self.topic.free().await;
        if let Looked::Found(polled) = self.look(max)? {
            return Ok(polled);
        }
        // Mostly somebody is about to publish: to let them costs less than to sleep and be woken.
        tokio::task::yield_now().await;
        if let Looked::Found(polled) = self.look(max)? {
            return Ok(polled);
        }
        let _waiting = Waiting::begin(self);
        loop {
            let wake_at = match self.look(max)? {
                Looked::Found(polled) => return Ok(polled),
                Looked::Again => continue,
                Looked::WaitUntil(wake_at) => wake_at,
            };
            match wake_at {
                Some(at) => drop(tokio::time::timeout_at(at, self.wake.notified()).await),
                None => self.wake.notified().await,
            }
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        let mut settled = Settled::default();
        self.topic.free().await;
        let mut inner = self.topic.lock();
        let inner = &mut *inner;
        let Some(group) = inner.groups.get_mut(&self.group) else { return Err(Error::closed("consumer")) };
        let Some(member) = group.members.get_mut(&self.member) else { return Err(Error::closed("consumer")) };
        let now = Instant::now();
        member.touch(now);
        let mut moved: u64 = 0;
        for (token, how) in outcomes {
            let Place { partition, epoch, offset, handout } = Place::of(*token);
            match group.shares.get_mut(partition.0 as usize) {
                Some(share) if share.owner == Some(self.member) && share.epoch == epoch => {
                    match share.cursor.settle(offset, handout, *how, now) {
                        Settling::Done { size } => {
                            member.hand.give_back(1, size);
                            moved |= 1 << (partition.0 % 64);
                        }
                        Settling::Repeated => {}
                        Settling::Lost => settled.lost.push(*token),
                    }
                }
                _ => settled.lost.push(*token),
            }
        }
        if moved != 0 {
            member.rouse();
            for at in (0..self.topic.spec.partitions.get()).filter(|at| moved >> (at % 64) & 1 == 1) {
                self.topic.settled(inner, PartitionId(at));
            }
        }
        Ok(settled)
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        self.with(|group, _, now| group.release(self.member, partitions, now))
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        self.with(|group, _, now| {
            let until = lease_end(now, lease);
            if let Some(member) = group.members.get_mut(&self.member) {
                member.alive_until = member.alive_until.max(until);
            }
            let mut settled = Settled::default();
            for token in tokens {
                let Place { partition, epoch, offset, handout } = Place::of(*token);
                let renewed = group.shares.get_mut(partition.0 as usize).is_some_and(|share| {
                    share.owner == Some(self.member)
                        && share.epoch == epoch
                        && share.cursor.renew(offset, handout, until)
                });
                if !renewed {
                    settled.lost.push(*token);
                }
            }
            settled
        })
    }

    async fn close(&self, _deadline: StdInstant) -> Result<()> {
        self.leave();
        Ok(())
    }
}

impl Drop for MemoryConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for MemoryConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConsumer")
            .field("topic", &self.topic.spec.topic)
            .field("group", &self.group)
            .field("member", &self.member)
            .finish_non_exhaustive()
    }
}
