//! Lanes: events of one key wait for each other, keys do not.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

use foldhash::quality::RandomState;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::parked::Head;
use super::parked::record::Sequence;
use crate::admin::Offset;
use crate::partition::PartitionId;
use crate::transport::{Delivery, Token};

/// What orders a delivery among others: the hash of its key, or of itself where it has none. Keys that
/// share 64 bits of a hash under a random secret share a lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lane {
    hash: u64,
    keyed: bool,
}

impl PartialEq for Lane {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for Lane {}

impl Hash for Lane {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// A lane is a hash already.
#[derive(Debug, Default, Clone, Copy)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

type ByLane<T> = HashMap<Lane, T, BuildHasherDefault<AsItIs>>;

/// What a worker does for a lane.
pub(super) enum Work {
    /// An event from the source.
    Delivery(Delivery),
    /// The first event of a parked key.
    Head(Head),
}

/// Work that waits for a worker. Its size is bounded by the subscription's window: only what was
/// polled is in it, and polling stops when the window is full; and one head a parked key.
#[derive(Default)]
pub(super) struct Lanes {
    inner: Mutex<Inner>,
    arrived: Notify,
    secret: RandomState,
}

#[derive(Default)]
struct Inner {
    /// Lanes at work, with what waits behind the one that runs.
    busy: ByLane<VecDeque<Work>>,
    /// Work whose lane is free.
    ready: VecDeque<(Lane, Work)>,
    /// Lanes whose event was handed back: nothing later runs before that event is here again.
    paused: ByLane<(PartitionId, Option<Offset>)>,
    /// Workers that wait for work and that nobody has woken yet.
    n_asleep: usize,
    closed: bool,
}

impl Inner {
    /// Frees a lane; returns what waited behind.
    fn free(&mut self, lane: &Lane) -> Option<Work> {
        let next = self.busy.get_mut(lane).and_then(VecDeque::pop_front);
        if next.is_none() {
            self.busy.remove(lane);
        }
        next
    }
}

impl Lanes {
    fn lane_of(&self, delivery: &Delivery) -> Lane {
        match delivery.content.envelope().and_then(|envelope| envelope.key()) {
            Some(key) => Lane { hash: self.secret.hash_one(key.as_bytes()), keyed: true },
            None => Lane { hash: self.secret.hash_one(delivery.token), keyed: false },
        }
    }

    /// Adds deliveries in order. Returns those that are to go back, because an earlier event of their
    /// lane was handed back while they were on their way.
    #[must_use]
    pub(super) fn add(&self, deliveries: Vec<Delivery>) -> Vec<Token> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let mut early = Vec::new();
        for delivery in deliveries {
            let lane = self.lane_of(&delivery);
            match inner.paused.get(&lane) {
                Some((partition, awaited))
                    if *partition == delivery.partition && delivery.offset > *awaited =>
                {
                    early.push(delivery.token);
                    continue;
                }
                Some(_) => {
                    inner.paused.remove(&lane);
                }
                None => {}
            }
            self.queue(inner, lane, Work::Delivery(delivery));
        }
        early
    }

    /// Adds the head of a parked key, in the lane of its key.
    pub(super) fn add_head(&self, head: Head) {
        let lane = match &head.sequence {
            Sequence::Key(key) => Lane { hash: self.secret.hash_one(key.as_bytes()), keyed: true },
            Sequence::Event(id) => Lane { hash: self.secret.hash_one(id), keyed: false },
        };
        self.queue(&mut self.inner.lock(), lane, Work::Head(head));
    }

    fn queue(&self, inner: &mut Inner, lane: Lane, work: Work) {
        match inner.busy.get_mut(&lane) {
            Some(behind) => behind.push_back(work),
            None => {
                inner.busy.insert(lane, VecDeque::new());
                self.ready(inner, lane, work);
            }
        }
    }

    fn ready(&self, inner: &mut Inner, lane: Lane, work: Work) {
        inner.ready.push_back((lane, work));
        if inner.n_asleep > 0 {
            inner.n_asleep -= 1;
            self.arrived.notify_one();
        }
    }

    /// Stops a lane until the event that is handed back returns. Returns what waited behind it.
    #[must_use]
    pub(super) fn pause(
        &self,
        lane: &Lane,
        partition: PartitionId,
        awaited: Option<Offset>,
    ) -> VecDeque<Work> {
        let mut inner = self.inner.lock();
        if lane.keyed {
            inner.paused.insert(*lane, (partition, awaited));
        }
        inner.busy.get_mut(lane).map(std::mem::take).unwrap_or_default()
    }

    /// Lets a lane go on after all: what was awaited comes to another member now.
    pub(super) fn unpause(&self, lane: &Lane) {
        self.inner.lock().paused.remove(lane);
    }

    /// Forgets what is awaited of partitions that are no longer ours.
    pub(super) fn forget(&self, partitions: &[PartitionId]) {
        self.inner.lock().paused.retain(|_, (partition, _)| !partitions.contains(partition));
    }

    /// Frees the lane that its worker is done with, and waits for work: what waited behind that lane comes
    /// first, then whatever lane is free. `None` when closed.
    pub(super) async fn next(&self, mut done: Option<Lane>) -> Option<(Lane, Work)> {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            {
                let mut inner = self.inner.lock();
                if let Some(lane) = done.take()
                    && let Some(next) = inner.free(&lane)
                {
                    return Some((lane, next));
                }
                if let Some(ready) = inner.ready.pop_front() {
                    return Some(ready);
                }
                if inner.closed {
                    return None;
                }
                // In line before anybody sees it asleep: each of those who are woken is another one.
                inner.n_asleep += 1;
                arrived.as_mut().enable();
            }
            arrived.await;
        }
    }

    /// Takes further deliveries whose lanes are free, in order, while they may go together with one.
    pub(super) fn take_more(
        &self,
        max: usize,
        together: impl Fn(&Delivery) -> bool,
    ) -> Vec<(Lane, Delivery)> {
        let mut inner = self.inner.lock();
        let mut more = Vec::new();
        while more.len() < max
            && let Some((_, Work::Delivery(delivery))) = inner.ready.front()
            && together(delivery)
            && let Some((lane, Work::Delivery(delivery))) = inner.ready.pop_front()
        {
            more.push((lane, delivery));
        }
        more
    }

    /// Frees the lane; what waited behind becomes ready for any worker.
    pub(super) fn pass_on(&self, lane: &Lane) {
        let mut inner = self.inner.lock();
        if let Some(next) = inner.free(lane) {
            self.ready(&mut inner, *lane, next);
        }
    }

    /// Takes back everything that has not begun, in order within each lane.
    pub(super) fn take_waiting(&self) -> Vec<Work> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let mut waiting = Vec::new();
        for (lane, work) in inner.ready.drain(..) {
            waiting.push(work);
            waiting.extend(inner.busy.remove(&lane).into_iter().flatten());
        }
        inner.busy.values_mut().for_each(|behind| waiting.extend(behind.drain(..)));
        waiting
    }

    /// Lets the workers end when nothing is ready.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.arrived.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Content, Envelope};

    fn delivery(key: Option<&'static str>, n: u64) -> Delivery {
        let event = Envelope::new("t", "/s");
        let event = match key {
            Some(key) => event.with_key(key),
            None => event,
        };
        Delivery::new(Token::new(0, n), PartitionId(0), Content::Envelope(event)).with_offset(Offset(n))
    }

    fn low(work: &Work) -> u64 {
        match work {
            Work::Delivery(delivery) => delivery.token.low(),
            Work::Head(head) => u64::from(head.place.partition.0),
        }
    }

    #[tokio::test]
    async fn a_key_runs_one_at_a_time_and_others_go_on() {
        let lanes = Lanes::default();
        let early = lanes.add(vec![
            delivery(Some("a"), 1),
            delivery(Some("a"), 2),
            delivery(Some("b"), 3),
            delivery(None, 4),
            delivery(None, 5),
        ]);
        assert!(early.is_empty());
        let mut taken = Vec::new();
        for _ in 0..4 {
            taken.push(lanes.next(None).await.unwrap());
        }
        assert_eq!(taken.iter().map(|(_, work)| low(work)).collect::<Vec<_>>(), [1, 3, 4, 5]);
        let behind = lanes.next(Some(taken[0].0)).await.unwrap();
        assert_eq!(low(&behind.1), 2);
        lanes.close();
        assert!(lanes.next(Some(behind.0)).await.is_none() && lanes.next(None).await.is_none());
    }

    #[tokio::test]
    async fn what_has_not_begun_can_be_taken_back() {
        let lanes = Lanes::default();
        assert!(
            lanes
                .add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2), delivery(Some("b"), 3)])
                .is_empty()
        );
        let (running, _) = lanes.next(None).await.unwrap();
        assert!(lanes.add(vec![delivery(Some("b"), 4), delivery(Some("b"), 5)]).is_empty());
        let waiting: Vec<_> = lanes.take_waiting().iter().map(low).collect();
        // A lane that is put back must begin with its first.
        assert_eq!(waiting, [3, 4, 5, 2]);
        lanes.close();
        assert!(lanes.next(Some(running)).await.is_none());
    }

    #[tokio::test]
    async fn a_paused_lane_takes_nothing_before_the_awaited_event() {
        let lanes = Lanes::default();
        assert!(lanes.add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2)]).is_empty());
        let (lane, _) = lanes.next(None).await.unwrap();
        assert_eq!(lanes.pause(&lane, PartitionId(0), Some(Offset(1))).len(), 1);
        lanes.pass_on(&lane);
        assert_eq!(lanes.add(vec![delivery(Some("a"), 3), delivery(Some("b"), 4)]), [Token::new(0, 3)]);
        assert!(lanes.add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2)]).is_empty());
        let order: Vec<_> = [lanes.next(None).await, lanes.next(None).await]
            .into_iter()
            .flatten()
            .map(|(_, work)| low(&work))
            .collect();
        assert_eq!(order, [4, 1]);
    }
}
