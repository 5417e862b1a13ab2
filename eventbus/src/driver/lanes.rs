//! Lanes: events of one key wait for each other, keys do not.

use std::collections::{BTreeMap, HashMap, VecDeque};
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

/// An event that is handed back: its delivery and its place.
pub(super) type Handed = (Token, PartitionId, Option<Offset>);

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
    /// Lanes of which events were handed back: nothing later runs before they are here again.
    paused: ByLane<Awaited>,
    /// What is being handed back, with its place.
    returning: foldhash::HashMap<Token, (Lane, Option<Offset>)>,
    /// Polls that were begun.
    n_polls: u64,
    /// Workers that wait for work and that nobody has woken yet.
    n_asleep: usize,
    closed: bool,
}

/// Events of a lane that were handed back and are not here again.
struct Awaited {
    partition: PartitionId,
    events: BTreeMap<Option<Offset>, Back>,
}

/// How far an event is that was handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    /// The transport was not told yet, or has not answered: a poll may still bring what follows it.
    Going(Token),
    /// It is the transport's since so many polls were begun: a later one brings nothing of its key before it.
    Gone(u64),
}

impl Inner {
    /// Notes that an event of a lane is handed back.
    fn await_again(&mut self, lane: &Lane, (token, partition, offset): Handed) {
        let fresh = || Awaited { partition, events: BTreeMap::new() };
        self.paused.entry(*lane).or_insert_with(fresh).events.insert(offset, Back::Going(token));
        self.returning.insert(token, (*lane, offset));
    }

    /// Whether an event may run: nothing that was handed back stands before it.
    fn may_run(&mut self, lane: &Lane, partition: PartitionId, offset: Option<Offset>, poll: u64) -> bool {
        let Some(awaited) = self.paused.get_mut(lane).filter(|awaited| awaited.partition == partition) else {
            return true;
        };
        while let Some((first, back)) = awaited.events.first_key_value().filter(|(first, _)| **first < offset)
        {
            match back {
                // It would have come before this one. It is settled elsewhere, or was removed.
                Back::Gone(since) if *since < poll => {
                    let first = *first;
                    awaited.events.remove(&first);
                }
                _ => return false,
            }
        }
        awaited.events.remove(&offset);
        if awaited.events.is_empty() {
            self.paused.remove(lane);
        }
        true
    }

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

    /// Notes that a poll begins; returns its number.
    pub(super) fn poll_begins(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.n_polls += 1;
        inner.n_polls
    }

    /// Adds the deliveries that a poll brought, in order. Returns those that are to go back, because an earlier event
    /// of their lane was handed back while they were on their way.
    #[must_use]
    pub(super) fn add(&self, deliveries: Vec<Delivery>, poll: u64) -> Vec<Token> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let mut early = Vec::new();
        for delivery in deliveries {
            let lane = self.lane_of(&delivery);
            let Delivery { token, partition, offset, .. } = delivery;
            if inner.may_run(&lane, partition, offset, poll) {
                self.queue(inner, lane, Work::Delivery(delivery));
            } else {
                inner.await_again(&lane, (token, partition, offset));
                early.push(token);
            }
        }
        early
    }

    /// Notes what became of settles: the transport has what was handed back among them, or may still have it in flight,
    /// and then brings what follows first.
    pub(super) fn settled(&self, tokens: impl Iterator<Item = Token>, taken: bool) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        // Nothing is handed back most of the time.
        if inner.returning.is_empty() {
            return;
        }
        for token in tokens {
            if let Some((lane, offset)) = inner.returning.remove(&token)
                && taken
                && let Some(back) =
                    inner.paused.get_mut(&lane).and_then(|awaited| awaited.events.get_mut(&offset))
                // It may have come again before the answer did, and been handed back once more.
                && *back == Back::Going(token)
            {
                *back = Back::Gone(inner.n_polls);
            }
        }
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

    /// Stops a lane until the event that is handed back returns. Returns what waited behind it, which goes back too.
    #[must_use]
    pub(super) fn pause(&self, lane: &Lane, handed: Handed) -> VecDeque<Work> {
        let mut inner = self.inner.lock();
        let behind = inner.busy.get_mut(lane).map(std::mem::take).unwrap_or_default();
        if lane.keyed {
            inner.await_again(lane, handed);
            for work in &behind {
                if let Work::Delivery(Delivery { token, partition, offset, .. }) = work {
                    inner.await_again(lane, (*token, *partition, *offset));
                }
            }
        }
        behind
    }

    /// Awaits no longer what is not ours any more: it comes to another member, or under another token.
    pub(super) fn unpause(&self, lane: &Lane, holds: impl Fn(Token) -> bool) {
        let mut inner = self.inner.lock();
        if let Some(awaited) = inner.paused.get_mut(lane) {
            awaited.events.retain(|_, back| match back {
                Back::Going(token) => holds(*token),
                Back::Gone(_) => true,
            });
            if awaited.events.is_empty() {
                inner.paused.remove(lane);
            }
        }
    }

    /// Forgets what is awaited of partitions that are no longer ours.
    pub(super) fn forget(&self, partitions: &[PartitionId]) {
        self.inner.lock().paused.retain(|_, awaited| !partitions.contains(&awaited.partition));
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
        let five = vec![
            delivery(Some("a"), 1),
            delivery(Some("a"), 2),
            delivery(Some("b"), 3),
            delivery(None, 4),
            delivery(None, 5),
        ];
        let early = lanes.add(five, 1);
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
                .add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2), delivery(Some("b"), 3)], 1)
                .is_empty()
        );
        let (running, _) = lanes.next(None).await.unwrap();
        assert!(lanes.add(vec![delivery(Some("b"), 4), delivery(Some("b"), 5)], 1).is_empty());
        let waiting: Vec<_> = lanes.take_waiting().iter().map(low).collect();
        // A lane that is put back must begin with its first.
        assert_eq!(waiting, [3, 4, 5, 2]);
        lanes.close();
        assert!(lanes.next(Some(running)).await.is_none());
    }

    fn handed(n: u64) -> Handed {
        (Token::new(0, n), PartitionId(0), Some(Offset(n)))
    }

    async fn runs(lanes: &Lanes, n_runs: usize) -> Vec<u64> {
        let (mut order, mut done) = (Vec::new(), None);
        for _ in 0..n_runs {
            let (lane, work) = lanes.next(done.take()).await.unwrap();
            order.push(low(&work));
            done = Some(lane);
        }
        order
    }

    /// Event 1 of a key was handed back with event 2, which waited behind it.
    async fn handed_back() -> Lanes {
        let lanes = Lanes::default();
        let poll = lanes.poll_begins();
        assert!(lanes.add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2)], poll).is_empty());
        let (lane, _) = lanes.next(None).await.unwrap();
        assert_eq!(lanes.pause(&lane, handed(1)).len(), 1);
        lanes.pass_on(&lane);
        lanes
    }

    #[tokio::test]
    async fn a_paused_lane_takes_nothing_before_the_awaited_event() {
        let lanes = handed_back().await;
        let poll = lanes.poll_begins();
        let early = lanes.add(vec![delivery(Some("a"), 3), delivery(Some("b"), 4)], poll);
        assert_eq!(early, [Token::new(0, 3)]);
        assert!(lanes.add(vec![delivery(Some("a"), 1), delivery(Some("a"), 2)], poll).is_empty());
        assert_eq!(runs(&lanes, 3).await, [4, 1, 2]);
    }

    #[tokio::test]
    async fn what_came_too_early_is_awaited_as_well() {
        let lanes = handed_back().await;
        let poll = lanes.poll_begins();
        assert_eq!(lanes.add(vec![delivery(Some("a"), 3)], poll), [Token::new(0, 3)]);
        // The transport has 1 and 2 back, and not yet 3: it goes on with what follows.
        lanes.settled([1, 2].map(|n| Token::new(0, n)).into_iter(), true);
        let next = vec![delivery(Some("a"), 1), delivery(Some("a"), 2), delivery(Some("a"), 4)];
        assert_eq!(lanes.add(next, lanes.poll_begins()), [Token::new(0, 4)]);
        lanes.settled([3, 4].map(|n| Token::new(0, n)).into_iter(), true);
        let last = vec![delivery(Some("a"), 3), delivery(Some("a"), 4), delivery(Some("a"), 5)];
        assert!(lanes.add(last, lanes.poll_begins()).is_empty());
        assert_eq!(runs(&lanes, 5).await, [1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn an_answer_speaks_of_its_own_delivery() {
        let lanes = handed_back().await;
        // Event 1 comes again before the answer to its settle does, and is handed back again.
        let again = |n: u64| Delivery { token: Token::new(1, n), ..delivery(Some("a"), n) };
        assert!(lanes.add(vec![again(1)], lanes.poll_begins()).is_empty());
        let (lane, _) = lanes.next(None).await.unwrap();
        assert!(lanes.pause(&lane, (Token::new(1, 1), PartitionId(0), Some(Offset(1)))).is_empty());
        lanes.settled([1, 2].map(|n| Token::new(0, n)).into_iter(), true);
        assert_eq!(lanes.add(vec![delivery(Some("a"), 3)], lanes.poll_begins()), [Token::new(0, 3)]);
    }

    #[tokio::test]
    async fn only_what_was_lost_is_not_awaited_any_more() {
        let lanes = handed_back().await;
        let (lane, _) = {
            assert!(lanes.add(vec![delivery(Some("b"), 9)], lanes.poll_begins()).is_empty());
            lanes.next(None).await.unwrap()
        };
        let a = lanes.lane_of(&delivery(Some("a"), 1));
        lanes.unpause(&lane, |_| false);
        lanes.unpause(&a, |token| token == Token::new(0, 2));
        let poll = lanes.poll_begins();
        assert_eq!(lanes.add(vec![delivery(Some("a"), 3)], poll), [Token::new(0, 3)], "2 is awaited");
        lanes.unpause(&a, |_| false);
        assert!(lanes.add(vec![delivery(Some("a"), 3)], poll).is_empty());
    }

    #[tokio::test]
    async fn a_lane_does_not_wait_for_what_is_gone() {
        let lanes = handed_back().await;
        let before = lanes.poll_begins();
        lanes.settled([1, 2].map(|n| Token::new(0, n)).into_iter(), true);
        // This poll may have looked before the transport had them back.
        assert_eq!(lanes.add(vec![delivery(Some("a"), 3)], before), [Token::new(0, 3)]);
        lanes.settled(std::iter::once(Token::new(0, 3)), true);
        // Retention removed 1 and 2.
        let after = lanes.poll_begins();
        assert!(lanes.add(vec![delivery(Some("a"), 3), delivery(Some("a"), 4)], after).is_empty());
        assert_eq!(runs(&lanes, 2).await, [3, 4]);
        let inner = lanes.inner.lock();
        assert!(inner.paused.is_empty() && inner.returning.is_empty());
    }
}
