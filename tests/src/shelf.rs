//! A store of somebody else, which is not in any database: what a user of `outbox::Store` writes, and what may be wrong with it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use eventbus::{Envelope, Error, ErrorKind, Result, Topic};
use outbox::conformance::{Subject, Writing};
use outbox::{Blocked, Claim, Leased, Pending, RowId, Shard, Store};
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// What is wrong with a shelf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is named after what it does")]
pub enum Flaw {
    None,
    LosesHeaders,
    ShowsWhatIsOpen,
    KeepsWhatIsUndone,
    ReadsBehindACursor,
    SkipsWhatDoesNotFit,
    Shuffles,
    ForgetsWhatIsHeld,
    ForgetsWhatIsFull,
    KnowsNoTopics,
    KnowsNoShards,
    GivesNumbersAgain,
    HoldsNoKeys,
    HasManyNames,
    SharesNothing,
    RenewsNothing,
    CountsEpochsAlways,
    LeasesForEver,
    KeepsEpochs,
    KeepsWhatIsReleased,
    ReleasesForOthers,
    KnowsNoOwner,
    KnowsNoEpoch,
    RemovesRanges,
    RemovesByNumber,
    KnowsNoBlocks,
    BlocksOneEvent,
    CountsForTheKey,
    KeepsBlocks,
    BlocksWhatIsGone,
    UnblocksAll,
    UnblocksNothing,
    ParksKeys,
    ParksNothing,
    SkipsWhatIsTaken,
}

type Lane = (String, Bytes);

#[derive(Debug, Clone)]
struct Row {
    pending: Pending,
    lane: Lane,
    is_open: bool,
}

#[derive(Debug)]
struct Block {
    head: RowId,
    attempts: u32,
    may_pass: bool,
    due: Instant,
}

#[derive(Debug, Clone)]
struct Owner {
    relay: String,
    until: Instant,
}

#[derive(Debug, Default)]
struct State {
    last: i64,
    rows: BTreeMap<RowId, Row>,
    keys: HashMap<Lane, Arc<AsyncMutex<()>>>,
    blocked: HashMap<Lane, Block>,
    parked: Vec<RowId>,
    owners: HashMap<Shard, Owner>,
    epochs: HashMap<Shard, i64>,
    relays: HashMap<String, Instant>,
    names: u32,
    cursor: Option<RowId>,
    taken: HashSet<RowId>,
}

/// Events in memory.
#[derive(Debug)]
pub struct Shelf {
    flaw: Flaw,
    state: Arc<Mutex<State>>,
}

impl Shelf {
    /// An empty one.
    pub fn new(flaw: Flaw) -> Self {
        Self { flaw, state: Arc::default() }
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    fn again(&self) -> Self {
        Self { flaw: self.flaw, state: self.state.clone() }
    }

    fn owned(&self, state: &State, relay: &str, epochs: &[(Shard, i64)]) -> HashSet<Shard> {
        let is_owned = |(shard, epoch): &&(Shard, i64)| {
            let is_owner = state.owners.get(shard).is_some_and(|owner| owner.relay == relay);
            let is_now = state.epochs.get(shard) == Some(epoch) || self.has(Flaw::KnowsNoEpoch);
            is_owner && is_now || self.has(Flaw::KnowsNoOwner) || self.has(Flaw::SkipsWhatIsTaken)
        };
        epochs.iter().filter(is_owned).map(|(shard, _)| *shard).collect()
    }
}

fn shard_of(lane: &Lane) -> Shard {
    let sum = lane
        .0
        .bytes()
        .chain(lane.1.iter().copied())
        .fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    Shard((sum % u32::from(Shard::COUNT)) as u8)
}

#[async_trait]
impl Store for Shelf {
    async fn identity(&self) -> Result<String> {
        let mut state = self.state.lock();
        state.names += u32::from(state.names == 0 || self.has(Flaw::HasManyNames));
        Ok(format!("shelf-{}", state.names))
    }

    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased> {
        if self.has(Flaw::SkipsWhatIsTaken) {
            let all = (0..Shard::COUNT).map(|n| (Shard(n), 0));
            return Ok(Leased { shards: all.collect(), surplus: Vec::new() });
        }
        let (mut state, now) = (self.state.lock(), Instant::now());
        let state = &mut *state;
        state.relays.insert(relay.to_owned(), now + ttl);
        state.relays.retain(|_, until| *until > now);
        let n_relays = if self.has(Flaw::SharesNothing) { 1 } else { state.relays.len() };
        let share = usize::from(Shard::COUNT).div_ceil(n_relays);
        let mut leased = Leased::default();
        let all = (0..Shard::COUNT).map(Shard);
        let (ours, others): (Vec<_>, Vec<_>) =
            all.partition(|shard| state.owners.get(shard).is_some_and(|owner| owner.relay == relay));
        for shard in ours.into_iter().chain(others) {
            let owner = state.owners.get(&shard);
            let is_ours = owner.is_some_and(|owner| owner.relay == relay);
            let is_over = |owner: &Owner| owner.until <= now && !self.has(Flaw::LeasesForEver);
            if !is_ours && !owner.is_none_or(is_over) {
                continue;
            }
            if leased.shards.len() >= share {
                leased.surplus.extend(is_ours.then_some(shard));
                continue;
            }
            let epoch = state.epochs.entry(shard).or_default();
            *epoch +=
                i64::from(!is_ours && !self.has(Flaw::KeepsEpochs) || self.has(Flaw::CountsEpochsAlways));
            let until = match owner {
                Some(owner) if is_ours && self.has(Flaw::RenewsNothing) => owner.until,
                _ => now + ttl,
            };
            state.owners.insert(shard, Owner { relay: relay.to_owned(), until });
            leased.shards.push((shard, *epoch));
        }
        Ok(leased)
    }

    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()> {
        let is_kept = |shard: &Shard, owner: &Owner| {
            !shards.contains(shard) || owner.relay != relay && !self.has(Flaw::ReleasesForOthers)
        };
        if !self.has(Flaw::KeepsWhatIsReleased) {
            self.state.lock().owners.retain(|shard, owner| is_kept(shard, owner));
        }
        Ok(())
    }

    async fn leave(&self, relay: &str) -> Result<()> {
        self.state.lock().relays.remove(relay);
        let all: Vec<Shard> = (0..Shard::COUNT).map(Shard).collect();
        self.release(relay, &all).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>> {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let state = &mut *state;
        let (mut found, mut n_bytes, mut of_shard) = (Vec::new(), 0, HashMap::<Shard, usize>::new());
        for (id, row) in &state.rows {
            let (pending, lane) = (&row.pending, &row.lane);
            let block = state.blocked.get(lane);
            let waits = block.is_some_and(|block| {
                block.due > now && (block.head == *id || !self.has(Flaw::BlocksOneEvent))
            });
            let is_full = claim
                .full
                .iter()
                .any(|(topic, key)| (*topic == lane.0 || self.has(Flaw::KnowsNoTopics)) && *key == lane.1);
            if row.is_open && !self.has(Flaw::ShowsWhatIsOpen)
                || !claim.shards.contains(&pending.shard) && !self.has(Flaw::KnowsNoShards)
                || claim.held.contains(id) && !self.has(Flaw::ForgetsWhatIsHeld)
                || is_full && !self.has(Flaw::ForgetsWhatIsFull)
                || waits && !self.has(Flaw::KnowsNoBlocks)
                || self.has(Flaw::ReadsBehindACursor) && state.cursor >= Some(*id)
                || self.has(Flaw::SkipsWhatIsTaken) && state.taken.contains(id)
            {
                continue;
            }
            let n_of_shard = of_shard.entry(pending.shard).or_default();
            if *n_of_shard >= claim.max_of_shard {
                continue;
            }
            if found.len() >= claim.max_events || n_bytes >= claim.max_bytes {
                break;
            }
            if self.has(Flaw::SkipsWhatDoesNotFit)
                && n_bytes + pending.size_bytes * 2 > claim.max_bytes
                && id.0 % 2 == 0
            {
                continue;
            }
            *n_of_shard += 1;
            n_bytes += pending.size_bytes;
            let attempts = block
                .filter(|block| block.head == *id || self.has(Flaw::CountsForTheKey))
                .map_or(0, |block| block.attempts);
            found.push(pending.clone().with_attempts(attempts));
        }
        if self.has(Flaw::Shuffles) {
            fastrand::shuffle(&mut found);
        }
        if self.has(Flaw::SkipsWhatIsTaken) {
            found.truncate(1);
            state.taken.extend(found.iter().map(|pending| pending.id));
        }
        state.cursor = found.iter().map(|pending| Some(pending.id)).max().flatten().max(state.cursor);
        Ok(found)
    }

    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>> {
        let mut state = self.state.lock();
        let owned = self.owned(&state, relay, owned);
        for (shard, id) in published.iter().filter(|(shard, _)| owned.contains(shard)) {
            let is_there = state
                .rows
                .get(id)
                .is_some_and(|row| row.pending.shard == *shard || self.has(Flaw::RemovesByNumber));
            if self.has(Flaw::RemovesRanges) {
                state.rows.retain(|other, row| row.pending.shard != *shard || other > id);
            } else if is_there {
                state.rows.remove(id);
            }
            if !self.has(Flaw::KeepsBlocks) {
                state.blocked.retain(|_, block| block.head != *id);
            }
        }
        Ok(owned.into_iter().collect())
    }

    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()> {
        let mut state = self.state.lock();
        let owned = self.owned(&state, relay, owned);
        for key in blocked.iter().filter(|key| owned.contains(&key.shard)) {
            if state.rows.contains_key(&key.head) || self.has(Flaw::BlocksWhatIsGone) {
                let (due, lane) = (Instant::now() + key.retry_in, (key.topic.clone(), key.key.clone()));
                let block = Block { head: key.head, attempts: key.attempts, may_pass: key.may_pass, due };
                state.blocked.insert(lane, block);
            }
        }
        Ok(())
    }

    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()> {
        let mut state = self.state.lock();
        let owned = self.owned(&state, relay, owned);
        for key in parked.iter().filter(|key| owned.contains(&key.shard)) {
            if !self.has(Flaw::ParksNothing) {
                state.rows.remove(&key.head);
                state.parked.push(key.head);
            }
            if !self.has(Flaw::ParksKeys) {
                state.blocked.retain(|_, block| block.head != key.head);
            }
        }
        Ok(())
    }

    async fn unblock(&self, shards: &[Shard]) -> Result<()> {
        let now = Instant::now();
        for (lane, block) in &mut self.state.lock().blocked {
            let is_meant = block.may_pass && shards.contains(&shard_of(lane)) || self.has(Flaw::UnblocksAll);
            if is_meant && !self.has(Flaw::UnblocksNothing) {
                block.due = now;
            }
        }
        Ok(())
    }

    async fn news(&self) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    async fn close(&self) {}
}

struct Transaction {
    shelf: Shelf,
    rows: Vec<RowId>,
    keys: HashMap<Lane, OwnedMutexGuard<()>>,
}

impl Drop for Transaction {
    fn drop(&mut self) {
        let mut state = self.shelf.state.lock();
        self.rows.drain(..).for_each(|id| _ = state.rows.remove(&id));
    }
}

#[async_trait]
impl Writing for Transaction {
    async fn append(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        let has_key = event.key().is_some();
        let lane = {
            let made = Pending::new(RowId(0), Shard(0), topic.clone(), event.clone());
            (made.topic.clone(), made.key)
        };
        if has_key && !self.keys.contains_key(&lane) && !self.shelf.has(Flaw::HoldsNoKeys) {
            let key = self.shelf.state.lock().keys.entry(lane.clone()).or_default().clone();
            let held = tokio::time::timeout(Duration::from_secs(10), key.lock_owned()).await;
            let late =
                |_| Error::new(ErrorKind::Unavailable, "another transaction holds the key for too long");
            self.keys.insert(lane.clone(), held.map_err(late)?);
        }
        let event =
            if self.shelf.has(Flaw::LosesHeaders) { event.with_headers(Default::default()) } else { event };
        let mut state = self.shelf.state.lock();
        state.last = match self.shelf.has(Flaw::GivesNumbersAgain) {
            true => state.rows.keys().next_back().map_or(0, |id| id.0),
            false => state.last,
        } + 1;
        let id = RowId(state.last);
        let pending = Pending::new(id, shard_of(&lane), topic.clone(), event);
        let is_open = !self.shelf.has(Flaw::KeepsWhatIsUndone);
        state.rows.insert(id, Row { pending, lane, is_open });
        if is_open {
            self.rows.push(id);
        }
        Ok(())
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let mut state = self.shelf.state.lock();
        for id in std::mem::take(&mut self.rows) {
            if let Some(row) = state.rows.get_mut(&id) {
                row.is_open = false;
            }
        }
        drop(state);
        Ok(())
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Subject for Shelf {
    async fn store(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.again()))
    }

    async fn begin(&self) -> Result<Box<dyn Writing>> {
        Ok(Box::new(Transaction { shelf: self.again(), rows: Vec::new(), keys: HashMap::new() }))
    }

    /// Nothing takes long here.
    fn patience(&self) -> Duration {
        Duration::from_secs(3)
    }
}
