//! What a relay has in hand, as a state without input, output or clock.
//!
//! ```text
//!  claimed ─▶ waiting ─▶ ready ─▶ on its way ─▶ published ─▶ settled
//!             (behind one of      │
//!              its key)           └─▶ failed: again, blocked, or parked
//! ```
//! Of each key one event is on its way at a time, the one with the lowest id; the next leaves when it is confirmed. So
//! whoever publishes an event has published all earlier ones of its key, or found them gone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use eventbus::{Envelope, Error, ErrorKind, Topic};

use crate::row::{Pending, RowId, Shard};
use crate::store::{Blocked, Claim};

use super::Policy;

/// A key of a topic.
type Lane = Arc<(String, Bytes)>;

/// An event on its way.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) id: RowId,
    pub(crate) topic: Topic,
    pub(crate) envelope: Envelope,
}

#[derive(Debug)]
struct Held {
    pending: Pending,
    lane: Lane,
    stage: Stage,
    /// How often it failed since it was claimed, and how many events had been published when it first did.
    tries: u32,
    failed_at: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// For its turn in its lane.
    Waiting,
    OnItsWay,
    /// To be removed from the outbox, or noted there.
    Ended,
}

/// The events of one key, by id. An event that was published before, and is there again as its removal failed, may come
/// before the one that is on its way.
#[derive(Debug, Default)]
struct Waiting {
    rows: VecDeque<RowId>,
    /// One of it is on its way, or its failure is being noted: nothing else of it leaves.
    is_busy: bool,
}

impl Waiting {
    fn insert(&mut self, id: RowId) {
        let at = self.rows.partition_point(|other| *other < id);
        self.rows.insert(at, id);
    }

    fn remove(&mut self, id: RowId) {
        self.rows.retain(|other| *other != id);
    }
}

/// What is to be written, and is held until that is done.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    pub(crate) published: Vec<(Shard, RowId)>,
    pub(crate) blocked: Vec<Blocked>,
    pub(crate) parked: Vec<Blocked>,
}

impl Writes {
    pub(crate) fn is_empty(&self) -> bool {
        self.published.is_empty() && self.blocked.is_empty() && self.parked.is_empty()
    }
}

/// Events of one key that are waited with: from the first number on no more are asked for, and above the second none is
/// taken. A long key must not fill the hand.
const FULL_LANE: usize = 16;
const LONGEST_LANE: usize = 64;

/// Batches in hand, whatever becomes of them.
const MOST_BATCHES: usize = 8;

/// Whether a failure is about the event or its topic, and not about the broker, the way there or who we are there.
fn is_of_the_event(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::TooLarge
            | ErrorKind::Invalid
            | ErrorKind::NotFound
            | ErrorKind::Unsupported
            | ErrorKind::Undecodable
            | ErrorKind::UnknownType
    )
}

/// How a round of publishing ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// Something was published.
    Went,
    /// Nothing was published, for reasons that may pass: the broker is away.
    Stuck,
    /// Nothing was published, and keys are blocked or events parked for it.
    Refused,
}

#[derive(Debug)]
pub(crate) struct Flow {
    policy: Policy,
    /// The next claim begins behind it: so that shards with much to do do not starve those behind them, and what is held of
    /// them is not read past again at once.
    claimed_up_to: Shard,
    /// Most events of a shard in a claim.
    share: usize,
    /// What is ours, and what is only to be brought to its end.
    owned: HashMap<Shard, i64>,
    leaving: HashMap<Shard, i64>,
    held: HashMap<RowId, Held>,
    lanes: HashMap<Lane, Waiting>,
    /// Keys of which an event may leave. Some may have nothing to send any more, and one may be there twice.
    ready: VecDeque<Lane>,
    writes: Writes,
    n_bytes: usize,
    n_on_their_way: usize,
    /// Events that are published or given up, and not noted yet.
    n_ended: usize,
    /// How many events were published: whoever fails while others go through fails by itself.
    n_published: u64,
    /// While a claim is on its way: keys of which something was let go since it began. What it brings of them could be
    /// behind what it was not to bring.
    let_go: HashSet<Lane>,
}

impl Flow {
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            policy,
            claimed_up_to: Shard(0),
            share: 0,
            owned: HashMap::new(),
            leaving: HashMap::new(),
            held: HashMap::new(),
            lanes: HashMap::new(),
            ready: VecDeque::new(),
            writes: Writes::default(),
            n_bytes: 0,
            n_on_their_way: 0,
            n_ended: 0,
            n_published: 0,
            let_go: HashSet::new(),
        }
    }

    /// Takes what is ours from now on; what is not any more is brought to its end, where it is on its way.
    pub(crate) fn own(&mut self, shards: &[(Shard, i64)]) {
        let before = std::mem::replace(&mut self.owned, shards.iter().copied().collect());
        for (shard, epoch) in before {
            if !self.owned.contains_key(&shard) {
                self.leaving.insert(shard, epoch);
            }
        }
        self.leaving.retain(|shard, _| !self.owned.contains_key(shard));
        let idle = self.held.iter().filter(|(_, held)| {
            held.stage == Stage::Waiting && !self.owned.contains_key(&held.pending.shard)
        });
        let idle: Vec<RowId> = idle.map(|(id, _)| *id).collect();
        idle.into_iter().for_each(|id| self.drop_row(id));
    }

    /// Of these shards those that are not ours any more, and of which nothing is in hand.
    pub(crate) fn left(&self, shards: &[Shard]) -> Vec<Shard> {
        let busy: HashSet<Shard> = self.held.values().map(|held| held.pending.shard).collect();
        let is_left = |shard: &Shard| !busy.contains(shard) && !self.owned.contains_key(shard);
        shards.iter().copied().filter(is_left).collect()
    }

    /// Shards and epochs under which things are written.
    pub(crate) fn epochs(&self) -> Vec<(Shard, i64)> {
        self.owned.iter().chain(&self.leaving).map(|(shard, epoch)| (*shard, *epoch)).collect()
    }

    pub(crate) fn shards(&self) -> Vec<Shard> {
        self.owned.keys().copied().collect()
    }

    /// Whether more can be taken in hand: while one batch is noted and others are on their way, the next one is claimed.
    pub(crate) fn has_room(&self) -> bool {
        let n_waiting = self.held.len() - self.n_on_their_way - self.n_ended;
        !self.owned.is_empty()
            && n_waiting < self.policy.batch_events
            && self.held.len() < self.policy.batch_events.saturating_mul(MOST_BATCHES)
            && self.n_bytes < self.policy.batch_bytes.saturating_mul(2)
    }

    /// What to ask the store for; `None` while enough is in hand. Its answer goes to [`claimed`](Self::claimed), also if it
    /// is none.
    pub(crate) fn claim(&mut self) -> Option<Claim> {
        if !self.has_room() {
            return None;
        }
        let mut shards = self.shards();
        shards.sort_unstable();
        let first = shards.partition_point(|shard| *shard <= self.claimed_up_to);
        shards.rotate_left(first);
        let fair = self.policy.batch_events.saturating_mul(2).div_ceil(shards.len());
        self.share = self.share.clamp(fair.min(self.policy.batch_events), self.policy.batch_events);
        let mut claim = Claim::new(shards, self.policy.batch_events, self.policy.batch_bytes);
        claim.max_of_shard = self.share;
        claim.held = self.held.keys().copied().collect();
        let full = self.lanes.iter().filter(|(_, waiting)| waiting.rows.len() >= FULL_LANE);
        claim.full = full.map(|(lane, _)| (lane.0.clone(), lane.1.clone())).collect();
        self.let_go.clear();
        Some(claim)
    }

    /// Takes what the store gave; returns whether a bound of the claim cut it short, so that there may be more at once.
    pub(crate) fn claimed(&mut self, rows: Vec<Pending>) -> bool {
        let is_cut = self.is_cut(&rows);
        if let Some(last) = rows.last() {
            self.claimed_up_to = last.shard;
            // Of one shard more is taken where there is not enough of all: a few keys of one shard would fill the hand else, and
            // each has one event on its way.
            self.share = match rows.len() >= self.policy.batch_events.div_ceil(2) {
                true => self.share / 2,
                false => self.share.saturating_mul(2),
            };
        }
        for pending in rows {
            // The shard may have gone while the store answered.
            if !self.owned.contains_key(&pending.shard) || self.held.contains_key(&pending.id) {
                continue;
            }
            let lane: Lane = Arc::new((pending.topic.clone(), pending.key.clone()));
            let n_waiting = self.lanes.get(&lane).map_or(0, |waiting| waiting.rows.len());
            if self.let_go.contains(&lane) || n_waiting >= LONGEST_LANE {
                // Nothing behind it is taken either: the next claim brings all of it in order.
                self.let_go.insert(lane);
                continue;
            }
            let (id, shard) = (pending.id, pending.shard);
            let unreadable = pending.event.as_ref().err().cloned();
            self.n_bytes += pending.size_bytes;
            let waiting = self.lanes.entry(lane.clone()).or_default();
            waiting.insert(id);
            if !waiting.is_busy && waiting.rows.len() == 1 {
                self.ready.push_back(lane.clone());
            }
            self.held.insert(id, Held { pending, lane, stage: Stage::Waiting, tries: 0, failed_at: 0 });
            if let Some(reason) = unreadable {
                tracing::error!(row = id.0, %shard, %reason, "a row of the outbox is no event");
            }
        }
        is_cut
    }

    /// Whether an answer is as long as the last claim allowed, as a whole or of a shard.
    fn is_cut(&self, rows: &[Pending]) -> bool {
        let n_bytes: usize = rows.iter().map(|pending| pending.size_bytes).sum();
        let mut of_shard = HashMap::new();
        rows.iter().for_each(|pending| *of_shard.entry(pending.shard).or_insert(0_usize) += 1);
        rows.len() >= self.policy.batch_events
            || n_bytes >= self.policy.batch_bytes
            || of_shard.values().any(|n| *n >= self.share)
    }

    /// The next events to publish, each of another key; those that are no events end here.
    pub(crate) fn next_round(&mut self) -> Vec<Sent> {
        let mut round = Vec::new();
        let mut n_bytes = 0;
        while round.len() < self.policy.batch_events && n_bytes < self.policy.batch_bytes {
            let Some(lane) = self.ready.pop_front() else { break };
            let Some(waiting) = self.lanes.get_mut(&lane).filter(|waiting| !waiting.is_busy) else {
                continue;
            };
            let first = waiting.rows.front();
            let Some(held) = first.and_then(|id| self.held.get_mut(id)) else { continue };
            waiting.is_busy = true;
            match &held.pending.event {
                Ok((topic, envelope)) => {
                    let sent = Sent { id: held.pending.id, topic: topic.clone(), envelope: envelope.clone() };
                    held.stage = Stage::OnItsWay;
                    n_bytes += held.pending.size_bytes;
                    self.n_on_their_way += 1;
                    round.push(sent);
                }
                Err(reason) => {
                    let (id, reason) = (held.pending.id, reason.clone());
                    self.give_up(id, false, format!("undecodable: {reason}"), 1.0);
                }
            }
        }
        round
    }

    /// The epoch that is written into events of a shard.
    pub(crate) fn epoch(&self, id: RowId) -> i64 {
        let shard = self.held.get(&id).map(|held| held.pending.shard);
        shard
            .and_then(|shard| self.owned.get(&shard).or_else(|| self.leaving.get(&shard)))
            .copied()
            .unwrap_or(0)
    }

    /// Takes the outcomes of a round. `random` is in 0..1, for backoff.
    pub(crate) fn confirmed(
        &mut self,
        outcomes: Vec<(RowId, Result<(), Error>)>,
        mut random: impl FnMut() -> f64,
    ) -> Round {
        let n_published = outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count();
        self.n_published += n_published as u64;
        let n_failed = outcomes.len() - n_published;
        let (mut n_kept, mut n_of_the_event) = (0, 0);
        for (id, outcome) in outcomes {
            self.n_on_their_way -= 1;
            match outcome {
                Ok(()) => self.published(id),
                Err(error) if n_published == 0 && self.keeps(id, &error) => {
                    n_kept += 1;
                    self.again(id);
                }
                Err(error) => {
                    n_of_the_event += usize::from(is_of_the_event(&error));
                    self.give_up(id, !is_of_the_event(&error), error.to_string(), random());
                }
            }
        }
        // One key that fails alone says nothing of the broker.
        let is_stuck = n_kept > 0 || n_failed > 1 && n_of_the_event == 0;
        match (n_published, is_stuck) {
            (0, true) => Round::Stuck,
            (0, false) => Round::Refused,
            _ => Round::Went,
        }
    }

    /// Whether an event that failed is sent again without a note: while nothing else goes through either, so that an outage
    /// is not told of each key; and not for ever, so that others get their turn.
    fn keeps(&mut self, id: RowId, error: &Error) -> bool {
        let Some(held) = self.held.get_mut(&id) else { return false };
        if is_of_the_event(error) || held.pending.attempts > 0 {
            return false;
        }
        if held.tries == 0 {
            held.failed_at = self.n_published;
        }
        held.tries += 1;
        held.tries <= self.policy.patience && held.failed_at == self.n_published
    }

    fn published(&mut self, id: RowId) {
        let Some(held) = self.held.get_mut(&id) else { return };
        held.stage = Stage::Ended;
        self.n_ended += 1;
        let (lane, shard) = (held.lane.clone(), held.pending.shard);
        self.writes.published.push((shard, id));
        if let Some(waiting) = self.lanes.get_mut(&lane) {
            waiting.remove(id);
        }
        self.open(lane);
    }

    /// Sends an event again: nothing else of its key goes before it, but for what is a repetition itself.
    fn again(&mut self, id: RowId) {
        let Some(held) = self.held.get_mut(&id) else { return };
        held.stage = Stage::Waiting;
        let (lane, shard) = (held.lane.clone(), held.pending.shard);
        if !self.owned.contains_key(&shard) {
            self.drop_row(id);
        }
        self.open(lane);
    }

    /// Nothing of a key is on its way any more.
    fn open(&mut self, lane: Lane) {
        let Some(waiting) = self.lanes.get_mut(&lane) else { return };
        waiting.is_busy = false;
        match waiting.rows.is_empty() {
            true => _ = self.lanes.remove(&lane),
            false => self.ready.push_back(lane),
        }
    }

    /// Blocks the key of an event, or parks the event if it can never pass. Until the store says so, the lane stays as it
    /// is and closed: what is behind the event would be claimed anew and overtake it.
    fn give_up(&mut self, id: RowId, may_pass: bool, error: String, random: f64) {
        let Some(held) = self.held.get_mut(&id) else { return };
        held.stage = Stage::Ended;
        self.n_ended += 1;
        let attempts = held.pending.attempts.saturating_add(1);
        let retry_in = self.policy.backoff(attempts, random);
        let blocked = Blocked { may_pass, ..Blocked::new(&held.pending, attempts, retry_in, error) };
        match may_pass || !self.policy.parks {
            true => self.writes.blocked.push(blocked),
            false => self.writes.parked.push(blocked),
        }
    }

    /// What is to be written now.
    pub(crate) fn take_writes(&mut self) -> Writes {
        std::mem::take(&mut self.writes)
    }

    /// Takes writes back that were not made.
    pub(crate) fn return_writes(&mut self, writes: Writes) {
        let later = std::mem::replace(&mut self.writes, writes);
        self.writes.published.extend(later.published);
        self.writes.blocked.extend(later.blocked);
        self.writes.parked.extend(later.parked);
    }

    /// The writes were made: what they are of is not ours any more. Of a key that is blocked nothing is, and a key whose
    /// event was parked goes on.
    pub(crate) fn written(&mut self, writes: &Writes) {
        writes.published.iter().for_each(|(_, id)| self.forget(*id));
        for blocked in &writes.blocked {
            let lane = self.held.get(&blocked.head).map(|held| held.lane.clone());
            let Some(lane) = lane else { continue };
            let waiting = self.lanes.remove(&lane).unwrap_or_default();
            self.let_go.insert(lane);
            waiting.rows.into_iter().for_each(|id| self.forget(id));
        }
        for parked in &writes.parked {
            let lane = self.held.get(&parked.head).map(|held| held.lane.clone());
            self.drop_row(parked.head);
            lane.into_iter().for_each(|lane| self.open(lane));
        }
        // What is left behind is at its end when nothing of it is held.
        let busy: HashSet<Shard> = self.held.values().map(|held| held.pending.shard).collect();
        self.leaving.retain(|shard, _| busy.contains(shard));
    }

    /// Of shards that were written, those that are not `owned` any more are not ours until a lease says so.
    pub(crate) fn lost(&mut self, written: &[(Shard, RowId)], owned: &[Shard]) {
        let lost: HashSet<Shard> =
            written.iter().map(|(shard, _)| *shard).filter(|shard| !owned.contains(shard)).collect();
        if lost.iter().any(|shard| self.owned.contains_key(shard)) {
            let rest: Vec<_> = self.owned.iter().map(|(shard, epoch)| (*shard, *epoch)).collect();
            let rest: Vec<_> = rest.into_iter().filter(|(shard, _)| !lost.contains(shard)).collect();
            self.own(&rest);
        }
    }

    /// Drops an event that is not on its way from its lane; the store has it.
    fn drop_row(&mut self, id: RowId) {
        if let Some(held) = self.held.get(&id) {
            let lane = held.lane.clone();
            self.let_go.insert(lane.clone());
            if let Some(waiting) = self.lanes.get_mut(&lane) {
                waiting.remove(id);
                if waiting.rows.is_empty() && !waiting.is_busy {
                    self.lanes.remove(&lane);
                }
            }
        }
        self.forget(id);
    }

    fn forget(&mut self, id: RowId) {
        if let Some(held) = self.held.remove(&id) {
            self.n_bytes -= held.pending.size_bytes;
            self.n_ended -= usize::from(held.stage == Stage::Ended);
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether nothing is on its way and nothing is to be written.
    pub(crate) fn is_done(&self) -> bool {
        self.n_on_their_way == 0 && self.writes.is_empty()
    }
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
