//! What the log of one partition says, folded record by record. It does no input or output and reads no
//! clock.
//!
//! ```text
//!  low-water                                                       end
//!  ───┤ Takeover · Park x · Park y · Attempt x · Done x · Park z · … ├──▶
//! ```
//! Every owner reads everything, its own records and those of others: a Park of an owner that was replaced
//! counts, its Attempts and Dones do not, and a Takeover above ours says that we are replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::SystemTime;

use tokio::time::Instant;

use super::planted::{Bug, planted};
use super::record::{Entry, Parked, Record, Sequence};
use crate::admin::Offset;
use crate::id::EventId;

/// One moment on both clocks: records carry times of day, waiting is done on the timer's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) wall: SystemTime,
    pub(super) timer: Instant,
}

impl Now {
    pub(super) fn get() -> Self {
        Self { wall: SystemTime::now(), timer: Instant::now() }
    }

    fn to_timer(self, due: Option<SystemTime>) -> Instant {
        let left = due.and_then(|due| due.duration_since(self.wall).ok()).unwrap_or_default();
        self.timer.checked_add(left).unwrap_or(self.timer)
    }
}

/// A parked event: where its newest copy is, and when it may run.
#[derive(Debug, Clone)]
pub(in crate::driver) struct Waiting {
    pub(in crate::driver) parked: Parked,
    /// Where its body is; `None` until the record is read back, where confirms name no offset.
    pub(super) position: Option<u64>,
    due: Instant,
}

impl Waiting {
    /// When it may run, as a time of day; `None` = at once.
    pub(super) fn due_wall(&self, now: Now) -> Option<SystemTime> {
        let left = self.due.checked_duration_since(now.timer).filter(|left| !left.is_zero())?;
        now.wall.checked_add(left)
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// By origin.
    waiting: BTreeMap<u64, Waiting>,
    /// The highest origin that was ever parked: what comes again at or below it has been here.
    highest: Offset,
    /// Its head is with a lane.
    running: bool,
}

/// What a delivery from the source meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::driver) enum Meets {
    /// Nothing of its key is parked. So many earlier runs were begun and never ended.
    Nothing { begun: u32 },
    /// Earlier events of its key are parked: it parks behind them.
    Parked,
    /// It was parked before: its source is settled, no more.
    Itself,
}

#[derive(Debug)]
pub(super) struct Fold {
    /// Position of our Takeover: whose records are ours. `None` until it is read.
    epoch: Option<u64>,
    last_takeover: u64,
    /// The last Takeover that was not followed by its Release.
    unreleased: Option<u64>,
    unclean: bool,
    queues: HashMap<Sequence, Queue>,
    /// Sequence and place in its queue of each parked event.
    pending: HashMap<EventId, (Sequence, u64)>,
    n_sequences: usize,
    finished: HashSet<EventId>,
    /// Runs that were begun of events that are not parked.
    begun: HashMap<EventId, u32>,
    /// Heads that may run, by when.
    heads: BTreeSet<(Instant, Sequence)>,
    indexed: HashMap<Sequence, Instant>,
    /// How often operators said something.
    pub(super) n_said: u64,
    /// The first position that was not read.
    pub(super) next: u64,
    /// Records read at or above the low-water mark: positions may have gaps and say nothing of how many they are.
    pub(super) n_records: u64,
}

impl Fold {
    pub(super) fn from(low: u64) -> Self {
        Self {
            epoch: None,
            last_takeover: 0,
            unreleased: None,
            unclean: false,
            queues: HashMap::new(),
            pending: HashMap::new(),
            n_sequences: 0,
            finished: HashSet::new(),
            begun: HashMap::new(),
            heads: BTreeSet::new(),
            indexed: HashMap::new(),
            n_said: 0,
            next: low,
            n_records: 0,
        }
    }

    /// Says that the Takeover at this position is ours: what was read before is what we found.
    pub(super) fn begin(&mut self, epoch: u64) {
        self.epoch = Some(epoch);
    }

    pub(super) fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    /// Says where the source ends: what was parked from beyond was of a topic that was deleted since, and says
    /// nothing of the events that have those places now.
    pub(super) fn source_ends(&mut self, next: Offset) {
        for queue in self.queues.values_mut().filter(|queue| queue.highest >= next) {
            queue.highest = Offset(0);
        }
    }

    /// Whether somebody took over after us.
    pub(super) fn is_fenced(&self) -> bool {
        self.epoch.is_some_and(|epoch| self.last_takeover > epoch)
    }

    /// Whether the owner before us did not leave by itself.
    pub(super) fn is_unclean(&self) -> bool {
        self.unclean || (self.epoch.is_none() && self.unreleased.is_some())
    }

    /// Takes a record that was read from the log.
    pub(super) fn read(&mut self, position: u64, entry: Option<Entry>, now: Now) {
        self.next = position + 1;
        self.n_records += 1;
        let Some(Entry { record, epoch }) = entry else { return };
        let ours = self.epoch == Some(epoch);
        let stale = epoch < self.last_takeover && !planted(Bug::EpochIgnored);
        match record {
            Record::Takeover => {
                if self.epoch.is_none() {
                    self.unclean = self.unreleased.is_some();
                }
                self.unreleased = Some(position);
                self.last_takeover = position;
            }
            Record::Swept if stale => {}
            Record::Swept => (self.last_takeover, self.unreleased) = (epoch, Some(epoch)),
            Record::Release if self.unreleased == Some(epoch) => self.unreleased = None,
            Record::Release => {}
            // What we wrote was taken in when it was confirmed. Only its place may be news.
            Record::Park(parked) if ours => self.locate(&parked.id, position),
            Record::Park(parked) => self.park(parked, Some(position), stale, now),
            Record::Attempt { .. } | Record::Done { .. } if ours || stale => {}
            Record::Attempt { id, attempts, due, held } => self.attempt(&id, attempts, due, held, now),
            Record::Done { id } => self.done(&id),
            // About the event that the operator saw, and no other.
            Record::Redrive { sequence, id } => {
                self.n_said += 1;
                if self.held(&sequence) == Some(id) {
                    self.redrive(&sequence, now);
                }
            }
            Record::Resolve { sequence, id, .. } => {
                self.n_said += 1;
                if self.held(&sequence) == Some(id.clone()) {
                    self.done(&id);
                }
            }
        }
    }

    fn locate(&mut self, id: &EventId, position: u64) {
        if let Some(waiting) = self.waiting_mut(id) {
            waiting.position = Some(waiting.position.map_or(position, |known| known.max(position)));
        }
    }

    /// Takes an event in. A copy of one that is here brings its newer place.
    pub(super) fn park(&mut self, parked: Parked, position: Option<u64>, stale: bool, now: Now) {
        if self.finished.contains(&parked.id) {
            return;
        }
        self.begun.remove(&parked.id);
        let due = now.to_timer(parked.due);
        let sequence = parked.sequence.clone();
        if let Some(waiting) = self.waiting_mut(&parked.id) {
            waiting.position = waiting.position.max(position);
            if planted(Bug::SweepForgetsAttempts) {
                waiting.parked.attempts = parked.attempts;
            }
            waiting.parked.attempts = waiting.parked.attempts.max(parked.attempts);
            if !stale {
                (waiting.parked.held, waiting.due) = (parked.held, due);
            }
        } else {
            let order = if planted(Bug::LogOrder) { position.unwrap_or(u64::MAX) } else { parked.origin.0 };
            self.pending.insert(parked.id.clone(), (sequence.clone(), order));
            let queue = self.queues.entry(sequence.clone()).or_default();
            self.n_sequences += usize::from(queue.waiting.is_empty());
            queue.highest = queue.highest.max(parked.origin);
            queue.waiting.insert(order, Waiting { parked, position, due });
        }
        self.index(&sequence);
    }

    /// Notes that a run begins, or how it ended where another follows.
    pub(super) fn attempt(
        &mut self,
        id: &EventId,
        attempts: u32,
        due: Option<SystemTime>,
        held: bool,
        now: Now,
    ) {
        let due = now.to_timer(due);
        if let Some(waiting) = self.waiting_mut(id) {
            waiting.parked.attempts = waiting.parked.attempts.max(attempts);
            (waiting.parked.held, waiting.due) = (held, due);
            if let Some((sequence, _)) = self.pending.get(id).cloned() {
                self.index(&sequence);
            }
        } else if !self.finished.contains(id) {
            let begun = self.begun.entry(id.clone()).or_default();
            *begun = attempts.max(*begun);
        }
    }

    /// Ends an event.
    pub(super) fn done(&mut self, id: &EventId) {
        self.begun.remove(id);
        self.finished.insert(id.clone());
        let Some((sequence, order)) = self.pending.remove(id) else { return };
        if let Some(queue) = self.queues.get_mut(&sequence) {
            queue.waiting.remove(&order);
            self.n_sequences -= usize::from(queue.waiting.is_empty());
        }
        self.index(&sequence);
    }

    fn redrive(&mut self, sequence: &Sequence, now: Now) {
        if let Some(id) = self.held(sequence)
            && let Some(waiting) = self.waiting_mut(&id)
        {
            waiting.parked.attempts = 0;
            (waiting.parked.held, waiting.due) = (false, now.timer);
        }
        if planted(Bug::RedriveHeadOnly)
            && let Some(queue) = self.queues.get_mut(sequence)
        {
            let head = queue.waiting.keys().next().copied();
            queue.waiting.retain(|order, _| Some(*order) == head);
        }
        self.index(sequence);
    }

    /// What a delivery from the source meets here.
    pub(super) fn meets(&self, id: &EventId, sequence: &Sequence, origin: Offset) -> Meets {
        if !planted(Bug::ParksTwice) && (self.pending.contains_key(id) || self.finished.contains(id)) {
            return Meets::Itself;
        }
        match self.queues.get(sequence) {
            Some(queue)
                if queue.highest > Offset(0) && origin <= queue.highest && !planted(Bug::ParksTwice) =>
            {
                Meets::Itself
            }
            Some(queue) if !queue.waiting.is_empty() && !planted(Bug::RunsFollowerInLane) => Meets::Parked,
            _ => Meets::Nothing { begun: self.begun.get(id).copied().unwrap_or(0) },
        }
    }

    /// The event of a sequence that waits for an operator.
    pub(super) fn held(&self, sequence: &Sequence) -> Option<EventId> {
        let head = self.queues.get(sequence)?.waiting.values().next()?;
        head.parked.held.then(|| head.parked.id.clone())
    }

    /// Where the newest copy of a parked event is.
    pub(super) fn position(&self, id: &EventId) -> Option<u64> {
        let (sequence, order) = self.pending.get(id)?;
        self.queues.get(sequence)?.waiting.get(order)?.position
    }

    /// How many events of a sequence are parked, and how many sequences.
    pub(super) fn sizes(&self, sequence: &Sequence) -> (usize, usize) {
        (self.queues.get(sequence).map_or(0, |queue| queue.waiting.len()), self.n_sequences)
    }

    /// Sequences that wait for an operator: the event that failed, and how many wait behind it.
    pub(super) fn all_held(&self) -> Vec<(Parked, usize)> {
        let held = |queue: &Queue| {
            let head = queue.waiting.values().next().filter(|head| head.parked.held)?;
            Some((head.parked.clone(), queue.waiting.len() - 1))
        };
        let mut all: Vec<_> = self.queues.values().filter_map(held).collect();
        all.sort_by_key(|(parked, _)| parked.origin);
        all
    }

    pub(super) fn n_pending(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn n_held(&self) -> usize {
        self.all_held().len()
    }

    /// When the next head may run.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.heads.first().map(|(due, _)| *due)
    }

    /// Takes a sequence whose head is due; it is the caller's until [`returned`](Self::returned).
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Sequence> {
        let (due, sequence) = self.heads.first()?.clone();
        if due > now {
            return None;
        }
        if let Some(queue) = self.queues.get_mut(&sequence) {
            queue.running = true;
        }
        self.index(&sequence);
        Some(sequence)
    }

    /// Gives a sequence back that was taken.
    pub(super) fn returned(&mut self, sequence: &Sequence) {
        if let Some(queue) = self.queues.get_mut(sequence) {
            queue.running = false;
        }
        self.index(sequence);
    }

    /// The head of a sequence, if it may run.
    pub(super) fn head(&self, sequence: &Sequence, now: Instant) -> Option<Waiting> {
        let head = self.queues.get(sequence)?.waiting.values().next()?;
        (!head.parked.held && head.due <= now).then(|| head.clone())
    }

    /// Everything that is parked, each sequence in its order.
    pub(super) fn all(&self) -> Vec<Waiting> {
        let mut all: Vec<_> =
            self.queues.values().flat_map(|queue| queue.waiting.values().cloned()).collect();
        if planted(Bug::SweepReorders) {
            all.reverse();
            all.iter_mut().zip(1..).for_each(|(waiting, n)| waiting.parked.origin = Offset(n));
        }
        all
    }

    /// Runs that were begun of events that are not parked.
    pub(super) fn begun(&self) -> Vec<(EventId, u32)> {
        self.begun.iter().map(|(id, n)| (id.clone(), *n)).collect()
    }

    /// Forgets an event that ended without being parked.
    pub(super) fn ended(&mut self, id: &EventId) {
        self.begun.remove(id);
    }

    /// Forgets what ended, after the log was rewritten from `low` on.
    pub(super) fn swept(&mut self, n_below: u64) {
        self.n_records = self.n_records.saturating_sub(n_below);
        self.finished.clear();
        self.queues.retain(|_, queue| queue.running || !queue.waiting.is_empty());
    }

    fn waiting_mut(&mut self, id: &EventId) -> Option<&mut Waiting> {
        let (sequence, order) = self.pending.get(id)?;
        self.queues.get_mut(sequence)?.waiting.get_mut(order)
    }

    fn index(&mut self, sequence: &Sequence) {
        if let Some(due) = self.indexed.remove(sequence) {
            self.heads.remove(&(due, sequence.clone()));
        }
        let Some(queue) = self.queues.get(sequence) else { return };
        if let Some(head) = queue.waiting.values().next()
            && !head.parked.held
            && !queue.running
        {
            self.heads.insert((head.due, sequence.clone()));
            self.indexed.insert(sequence.clone(), head.due);
        }
    }
}
