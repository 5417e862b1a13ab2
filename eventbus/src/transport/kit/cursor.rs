//! A group's place in one partition: what is settled, in hand, waiting, and what may go out next.
//!
//! ```text
//!   settled        floor                                next
//!  ─────────────────┤ S │ hand │ S │ waiting │ hand │ … ├──────────▶ the log
//!                     ◀────────── slots ──────────────▶
//! ```
//! Shared by the transports that keep deliveries themselves. Offsets ascend and may have gaps. It does no
//! input or output and reads no clock: the caller passes the time.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::name::Key;
use crate::transport::delivery::{Content, FIRST, Settle};

/// Most slots between the floor and the next event: what a long-delayed event lets others pass it by.
const MAX_SPAN: usize = 16 * 1024;

/// Which earlier events hold an event back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    None,
    PerKey,
    Total,
}

/// An event as the log holds it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) offset: u64,
    pub(crate) content: Content,
    /// Bytes that count against a window.
    pub(crate) size: usize,
    pub(crate) stored_at: SystemTime,
    /// Earlier deliveries that ended in a retry, as the store remembers them.
    pub(crate) past: Past,
}

/// What a store remembers of an event that is not settled, or is settled out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Past {
    #[default]
    Fresh,
    Waiting {
        attempt: NonZeroU32,
        due: Option<Instant>,
    },
    Settled,
}

/// An event that goes out now.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) offset: u64,
    pub(crate) handout: u16,
    pub(crate) attempt: NonZeroU32,
    pub(crate) until: Instant,
    pub(crate) stored_at: SystemTime,
    pub(crate) size: usize,
    pub(crate) content: Content,
}

/// What a settle met.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Settling {
    /// It was ours; so many bytes are in hand no more.
    Done { size: usize },
    /// The same token had settled it before.
    Repeated,
    /// The token is from an earlier handing-out.
    Lost,
}

/// Whether a handing-out counts as an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    Yes,
    No,
}

#[derive(Debug)]
struct Slot {
    offset: u64,
    state: State,
    attempt: NonZeroU32,
    handout: u16,
    /// Bytes that count against a window.
    size: usize,
    stored_at: SystemTime,
}

#[derive(Debug)]
enum State {
    Waiting { due: Option<Instant>, content: Content },
    InHand { until: Instant, content: Content },
    Settled,
}

#[derive(Debug)]
pub(crate) struct Cursor {
    order: Order,
    /// Everything that was read and is not below the floor, by offset.
    slots: VecDeque<Slot>,
    /// Where the log is to be read next.
    next: u64,
    /// Events that the floor has passed.
    n_passed: u64,
    /// Waiting offsets of each key that is held back; the first of each is in `due`.
    held: HashMap<Option<Key>, BTreeSet<u64>>,
    /// Waiting events that nothing holds back, by the time they may go out.
    due: BTreeSet<(Option<Instant>, u64)>,
    n_in_hand: usize,
    bytes_in_hand: usize,
    bytes_waiting: usize,
    /// No lease ends before this.
    expiry: Option<Instant>,
}

impl Cursor {
    pub(crate) fn new(order: Order, floor: u64) -> Self {
        Self {
            order,
            slots: VecDeque::new(),
            next: floor,
            n_passed: 0,
            held: HashMap::new(),
            due: BTreeSet::new(),
            n_in_hand: 0,
            bytes_in_hand: 0,
            bytes_waiting: 0,
            expiry: None,
        }
    }

    pub(crate) fn order(&self) -> Order {
        self.order
    }

    /// Every offset below is settled.
    pub(crate) fn floor(&self) -> u64 {
        self.slots.front().map_or(self.next, |slot| slot.offset)
    }

    /// How many events the floor has passed since this cursor began; gaps are none.
    pub(crate) fn n_passed(&self) -> u64 {
        self.n_passed
    }

    /// The next offset to be read from the log.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Where in `slots` an offset is; at once where offsets have no gaps.
    fn index(&self, offset: u64) -> Option<usize> {
        let guess = usize::try_from(offset.checked_sub(self.slots.front()?.offset)?).ok()?;
        if self.slots.get(guess).is_some_and(|slot| slot.offset == offset) {
            return Some(guess);
        }
        self.slots.binary_search_by_key(&offset, |slot| slot.offset).ok()
    }

    /// How many events are in hand, and their bytes.
    pub(crate) fn in_hand(&self) -> (usize, usize) {
        (self.n_in_hand, self.bytes_in_hand)
    }

    /// Unsettled events that were read from the log.
    pub(crate) fn n_unsettled(&self) -> usize {
        self.slots.iter().filter(|slot| !matches!(slot.state, State::Settled)).count()
    }

    /// Whether more may be read: a bound on what waits while others pass.
    pub(crate) fn may_read(&self, max_waiting_bytes: usize) -> bool {
        self.slots.len() < MAX_SPAN && self.bytes_waiting < max_waiting_bytes
    }

    /// When the next delay ends. Of no interest to an owner that could not take the event.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        self.due.first().and_then(|(due, _)| *due)
    }

    /// When the next lease may end.
    pub(crate) fn expiry(&self) -> Option<Instant> {
        self.expiry
    }

    /// Takes the next event of the log. Returns it if nothing holds it back.
    pub(crate) fn read(&mut self, entry: Entry, until: Instant) -> Option<Handed> {
        let offset = entry.offset;
        debug_assert!(offset >= self.next, "an entry from behind the reader");
        self.next = offset + 1;
        let (attempt, due) = match entry.past {
            Past::Settled => {
                self.slots.push_back(Slot {
                    offset,
                    state: State::Settled,
                    attempt: FIRST,
                    handout: 0,
                    size: 0,
                    stored_at: entry.stored_at,
                });
                self.advance();
                return None;
            }
            Past::Fresh => (FIRST, None),
            Past::Waiting { attempt, due } => (attempt, due),
        };
        let waits = due.is_some()
            || (!self.held.is_empty()
                && self.group_of(&entry.content).is_some_and(|key| self.held.contains_key(&key)));
        let state = State::Waiting { due, content: entry.content };
        self.slots.push_back(Slot {
            offset,
            state,
            attempt,
            handout: 0,
            size: entry.size,
            stored_at: entry.stored_at,
        });
        if waits {
            self.wait(offset);
            return None;
        }
        self.hand(offset, until)
    }

    /// Returns the next waiting event that is due.
    pub(crate) fn take_due(&mut self, now: Instant, until: Instant) -> Option<Handed> {
        let (due, offset) = *self.due.first()?;
        if due.is_some_and(|due| due > now) {
            return None;
        }
        self.unwait(offset);
        self.hand(offset, until)
    }

    /// Ends leases that are over; returns the bytes that are in hand no more and how many they were.
    pub(crate) fn expire(&mut self, now: Instant) -> (usize, usize) {
        if self.expiry.is_none_or(|expiry| expiry > now) {
            return (0, 0);
        }
        let ended: Vec<u64> =
            self.offsets(|state| matches!(state, State::InHand { until, .. } if *until <= now));
        let size = ended.iter().map(|offset| self.give_back(*offset, None, Counted::Yes)).sum();
        self.expiry = self
            .slots
            .iter()
            .filter_map(|slot| match slot.state {
                State::InHand { until, .. } => Some(until),
                _ => None,
            })
            .min();
        (ended.len(), size)
    }

    /// Gives back everything in hand, for the next owner. The deliveries count as attempts.
    pub(crate) fn abandon(&mut self) {
        for offset in self.offsets(|state| matches!(state, State::InHand { .. })) {
            self.give_back(offset, None, Counted::Yes);
        }
        self.expiry = None;
    }

    pub(crate) fn settle(&mut self, offset: u64, handout: u16, how: Settle, now: Instant) -> Settling {
        if offset < self.floor() {
            return Settling::Repeated;
        }
        let Some(slot) = self.slot(offset) else { return Settling::Lost };
        if slot.handout != handout {
            return Settling::Lost;
        }
        if !matches!(slot.state, State::InHand { .. }) {
            return Settling::Repeated;
        }
        let size = slot.size;
        match how {
            Settle::Ack | Settle::Reject => {
                slot.state = State::Settled;
                self.n_in_hand -= 1;
                self.bytes_in_hand -= size;
                self.advance();
            }
            Settle::Retry { .. } | Settle::Return => {
                let (due, counted) = match how {
                    Settle::Retry { after } => (after.and_then(|after| now.checked_add(after)), Counted::Yes),
                    _ => (None, Counted::No),
                };
                self.give_back(offset, due, counted);
                // The token stays good for a repeated settle: only an ended lease voids it.
                if let Some(slot) = self.slot(offset) {
                    slot.handout = handout;
                }
            }
        }
        Settling::Done { size }
    }

    /// Moves the end of a lease; false if the token is void.
    pub(crate) fn renew(&mut self, offset: u64, handout: u16, until: Instant) -> bool {
        let Some(slot) = self.slot(offset) else { return false };
        match &mut slot.state {
            State::InHand { until: end, .. } if slot.handout == handout => {
                *end = until;
                self.expiry = Some(self.expiry.map_or(until, |expiry| expiry.min(until)));
                true
            }
            _ => false,
        }
    }

    /// Skips to `first`, because the log begins there now; returns what was expected if that loses events.
    pub(crate) fn jump(&mut self, first: u64) -> Option<u64> {
        let expected = self.next;
        if expected >= first {
            return None;
        }
        self.next = first;
        Some(expected)
    }

    /// What the store must remember of one offset.
    pub(crate) fn past(&self, offset: u64) -> Past {
        let Some(slot) = self.index(offset).and_then(|at| self.slots.get(at)) else {
            return if offset < self.next { Past::Settled } else { Past::Fresh };
        };
        match &slot.state {
            State::Settled => Past::Settled,
            State::Waiting { due, .. } if slot.attempt > FIRST => {
                Past::Waiting { attempt: slot.attempt, due: *due }
            }
            State::InHand { .. } if slot.attempt > FIRST => {
                Past::Waiting { attempt: slot.attempt, due: None }
            }
            _ => Past::Fresh,
        }
    }

    fn offsets(&self, wanted: impl Fn(&State) -> bool) -> Vec<u64> {
        self.slots.iter().filter(|slot| wanted(&slot.state)).map(|slot| slot.offset).collect()
    }

    fn slot(&mut self, offset: u64) -> Option<&mut Slot> {
        let at = self.index(offset)?;
        self.slots.get_mut(at)
    }

    fn hand(&mut self, offset: u64, until: Instant) -> Option<Handed> {
        let slot = self.slot(offset)?;
        let content = match std::mem::replace(&mut slot.state, State::Settled) {
            State::Waiting { content, .. } => content,
            other => {
                slot.state = other;
                return None;
            }
        };
        slot.state = State::InHand { until, content: content.clone() };
        slot.handout = slot.handout.wrapping_add(1);
        let handed = Handed {
            offset,
            handout: slot.handout,
            attempt: slot.attempt,
            until,
            stored_at: slot.stored_at,
            size: slot.size,
            content,
        };
        self.n_in_hand += 1;
        self.bytes_in_hand += handed.size;
        self.expiry = Some(self.expiry.map_or(until, |expiry| expiry.min(until)));
        Some(handed)
    }

    /// Turns an event in hand into a waiting one and voids its token; returns its size.
    fn give_back(&mut self, offset: u64, due: Option<Instant>, counted: Counted) -> usize {
        let Some(slot) = self.slot(offset) else { return 0 };
        let State::InHand { content, .. } = &slot.state else { return 0 };
        let (content, size) = (content.clone(), slot.size);
        slot.state = State::Waiting { due, content };
        if counted == Counted::Yes {
            slot.attempt = slot.attempt.saturating_add(1);
        }
        slot.handout = slot.handout.wrapping_add(1);
        self.n_in_hand -= 1;
        self.bytes_in_hand -= size;
        self.wait(offset);
        size
    }

    /// The events that hold each other back, as a key of `held`; `None` = this one stands alone.
    #[expect(clippy::option_option, reason = "the inner option is the one queue of a total order")]
    fn group_of(&self, content: &Content) -> Option<Option<Key>> {
        match self.order {
            Order::None => None,
            Order::Total => Some(None),
            Order::PerKey => {
                content.envelope().and_then(|envelope| envelope.key()).map(|key| Some(key.clone()))
            }
        }
    }

    fn due_of(&self, offset: u64) -> Option<Instant> {
        match self.slots.get(self.index(offset)?)?.state {
            State::Waiting { due, .. } => due,
            _ => None,
        }
    }

    fn waiting(&self, offset: u64) -> Option<&Content> {
        match &self.slots.get(self.index(offset)?)?.state {
            State::Waiting { content, .. } => Some(content),
            _ => None,
        }
    }

    fn wait(&mut self, offset: u64) {
        let Some(content) = self.waiting(offset) else { return };
        let (group, size) = (self.group_of(content), content.size_bytes());
        self.bytes_waiting += size;
        let Some(group) = group else {
            self.due.insert((self.due_of(offset), offset));
            return;
        };
        let queue = self.held.entry(group).or_default();
        let head = queue.first().copied();
        queue.insert(offset);
        if head.is_none_or(|head| offset < head) {
            if let Some(head) = head {
                self.due.remove(&(self.due_of(head), head));
            }
            self.due.insert((self.due_of(offset), offset));
        }
    }

    fn unwait(&mut self, offset: u64) {
        let Some(content) = self.waiting(offset) else { return };
        let (group, size) = (self.group_of(content), content.size_bytes());
        self.bytes_waiting -= size;
        self.due.remove(&(self.due_of(offset), offset));
        let Some(group) = group else { return };
        let Some(queue) = self.held.get_mut(&group) else { return };
        queue.remove(&offset);
        match queue.first().copied() {
            Some(head) => {
                self.due.insert((self.due_of(head), head));
            }
            None => {
                self.held.remove(&group);
            }
        }
    }

    fn advance(&mut self) {
        while self.slots.front().is_some_and(|slot| matches!(slot.state, State::Settled)) {
            self.slots.pop_front();
            self.n_passed += 1;
        }
    }
}

/// A lease that ends at `now + lease`, or never if that is out of range.
pub(crate) fn lease_end(now: Instant, lease: Duration) -> Instant {
    now.checked_add(lease).unwrap_or(now + Duration::from_secs(365 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Envelope;

    fn entry(offset: u64, key: &'static str) -> Entry {
        let content = Content::Envelope(Envelope::new("t", "/s").with_key(key).with_payload("x"));
        Entry {
            offset,
            size: content.size_bytes(),
            content,
            stored_at: SystemTime::UNIX_EPOCH,
            past: Past::Fresh,
        }
    }

    fn setup(order: Order, keys: &[&'static str]) -> (Cursor, Instant, Vec<Handed>) {
        let (mut cursor, now) = (Cursor::new(order, 0), Instant::now());
        let handed = (0..)
            .zip(keys)
            .filter_map(|(at, key)| cursor.read(entry(at, key), now + Duration::from_secs(1)))
            .collect();
        (cursor, now, handed)
    }

    #[test]
    fn the_floor_passes_only_settled_events() {
        let (mut cursor, now, handed) = setup(Order::PerKey, &["a", "b", "c"]);
        for at in [2, 1] {
            cursor.settle(handed[at].offset, handed[at].handout, Settle::Ack, now);
            assert_eq!(cursor.floor(), 0);
        }
        cursor.settle(0, handed[0].handout, Settle::Ack, now);
        assert_eq!((cursor.floor(), cursor.in_hand()), (3, (0, 0)));
    }

    #[test]
    fn a_waiting_event_holds_back_its_key_only() {
        let (mut cursor, now, handed) = setup(Order::PerKey, &["a"]);
        let later = now + Duration::from_secs(5);
        cursor.settle(0, handed[0].handout, Settle::Retry { after: Some(Duration::from_secs(5)) }, now);
        assert!(cursor.read(entry(1, "a"), later).is_none(), "the follower waits");
        assert!(cursor.read(entry(2, "b"), later).is_some(), "another key goes on");
        assert!(cursor.take_due(now, later).is_none());
        assert_eq!((cursor.due_at(), cursor.expiry()), (Some(later), Some(now + Duration::from_secs(1))));
        let out: Vec<_> = std::iter::from_fn(|| cursor.take_due(later, later))
            .map(|h| (h.offset, h.attempt.get()))
            .collect();
        assert_eq!(out, [(0, 2), (1, 1)]);
        assert!(cursor.read(entry(3, "a"), later).is_some(), "nothing is held any more");
    }

    #[test]
    fn without_order_nothing_is_held_back() {
        let (mut cursor, now, handed) = setup(Order::None, &["a"]);
        cursor.settle(0, handed[0].handout, Settle::Retry { after: Some(Duration::from_secs(5)) }, now);
        assert!(cursor.read(entry(1, "a"), now).is_some());
    }

    #[test]
    fn gaps_are_passed() {
        let (mut cursor, now) = (Cursor::new(Order::PerKey, 3), Instant::now());
        let until = now + Duration::from_secs(1);
        let handed: Vec<_> =
            [5, 90, 1_000_000].into_iter().filter_map(|at| cursor.read(entry(at, "a"), until)).collect();
        assert_eq!((cursor.floor(), cursor.next()), (5, 1_000_001));
        assert_eq!(cursor.settle(91, 1, Settle::Ack, now), Settling::Lost, "nothing was there");
        cursor.settle(90, handed[1].handout, Settle::Ack, now);
        assert_eq!((cursor.past(90), cursor.past(91), cursor.floor()), (Past::Settled, Past::Settled, 5));
        cursor.settle(5, handed[0].handout, Settle::Ack, now);
        assert_eq!((cursor.floor(), cursor.past(1_000_000)), (1_000_000, Past::Fresh));
        cursor.settle(1_000_000, handed[2].handout, Settle::Ack, now);
        assert_eq!(cursor.floor(), 1_000_001);
    }

    #[test]
    fn an_ended_lease_voids_the_token() {
        let (mut cursor, now, handed) = setup(Order::PerKey, &["a", "a"]);
        let later = now + Duration::from_secs(2);
        assert_eq!(cursor.expire(now), (0, 0));
        assert_eq!(cursor.expire(later).0, 2);
        assert_eq!(cursor.settle(0, handed[0].handout, Settle::Ack, later), Settling::Lost);
        let again = cursor.take_due(later, later).unwrap();
        assert_eq!((again.offset, again.attempt.get()), (0, 2));
        assert_eq!(cursor.settle(0, handed[0].handout, Settle::Ack, later), Settling::Lost);
        assert!(matches!(cursor.settle(0, again.handout, Settle::Ack, later), Settling::Done { .. }));
        assert_eq!(cursor.settle(0, again.handout, Settle::Ack, later), Settling::Repeated);
    }

    #[test]
    fn a_repeated_retry_is_no_second_attempt() {
        let (mut cursor, now, handed) = setup(Order::PerKey, &["a"]);
        let retry = Settle::Retry { after: None };
        assert!(matches!(cursor.settle(0, handed[0].handout, retry, now), Settling::Done { .. }));
        assert_eq!(cursor.settle(0, handed[0].handout, retry, now), Settling::Repeated);
        assert_eq!(cursor.take_due(now, now).unwrap().attempt.get(), 2);
    }

    #[test]
    fn removed_history_is_reported_once() {
        let (mut cursor, _, _) = setup(Order::PerKey, &["a"]);
        assert_eq!(cursor.jump(1), None);
        assert_eq!(cursor.jump(5), Some(1));
        assert_eq!((cursor.jump(5), cursor.next(), cursor.floor()), (None, 5, 0));
    }

    #[test]
    fn what_is_remembered_survives_an_owner() {
        let (mut cursor, now, handed) = setup(Order::PerKey, &["a", "b", "c"]);
        cursor.settle(1, handed[1].handout, Settle::Ack, now);
        cursor.settle(0, handed[0].handout, Settle::Retry { after: None }, now);
        assert_eq!(cursor.past(1), Past::Settled);
        assert_eq!(cursor.past(2), Past::Fresh);
        let two = NonZeroU32::new(2).unwrap();
        assert_eq!(cursor.past(0), Past::Waiting { attempt: two, due: None });
        let mut next = Cursor::new(Order::PerKey, cursor.floor());
        let out: Vec<_> = (0..3)
            .filter_map(|at| next.read(Entry { past: cursor.past(at), ..entry(at, "k") }, now))
            .map(|handed| (handed.offset, handed.attempt.get()))
            .collect();
        assert_eq!(out, [(0, 2), (2, 1)]);
    }
}
