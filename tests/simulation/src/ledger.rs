//! A database as relays, writers and inboxes see one: transactions that others do not see before they are committed, which
//! end in another order than they began, locks on keys, and leases by its own clock.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eventbus::{Envelope, Error, ErrorKind, Result, Topic};
use outbox::{Blocked, Claim, Leased, Pending, RowId, Shard};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

/// A key of a topic.
type Lane = (String, Bytes);

/// A transaction.
pub(crate) type TxId = u64;

/// A number of a key, with what tells attempts for it apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) topic: String,
    pub(crate) key: String,
    pub(crate) n: u64,
    pub(crate) token: u64,
}

#[derive(Debug, Clone)]
struct Row {
    lane: Lane,
    topic: Topic,
    envelope: Envelope,
}

#[derive(Debug, Default)]
struct Transaction {
    node: u64,
    rows: Vec<(RowId, Row)>,
    counted: Vec<(String, u64)>,
    handled: Vec<(&'static str, Uuid)>,
    committed: Vec<Noted>,
    effects: Vec<Noted>,
    /// Its end was asked for: it ends as asked, whoever asked is gone.
    is_ending: bool,
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
    relay: Option<String>,
    epoch: i64,
    until: Instant,
}

#[derive(Debug, Default)]
struct State {
    last_row: i64,
    last_tx: TxId,
    open: BTreeMap<TxId, Transaction>,
    locks: HashMap<Lane, TxId>,
    rows: BTreeMap<(Shard, RowId), Row>,
    blocked: HashMap<(Shard, Lane), Block>,
    owners: BTreeMap<Shard, Owner>,
    relays: BTreeMap<String, Instant>,
    counts: HashMap<String, u64>,
    handled: HashSet<(&'static str, Uuid)>,
    handling: HashMap<(&'static str, Uuid), TxId>,
    committed: Vec<Noted>,
    effects: Vec<Noted>,
    /// Of the bug that takes rows: by whom, and when.
    taken: HashMap<RowId, (String, Instant)>,
}

/// The database.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    state: Mutex<State>,
    ended: Notify,
}

/// What the server ended.
fn gone() -> Error {
    Error::new(ErrorKind::Unavailable, "the transaction was ended by the server")
}

/// FNV-1a; any function will do that is the same for ever.
fn shard_of(topic: &str, key: &[u8]) -> Shard {
    let fold = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let sum = topic.as_bytes().iter().chain(key).fold(0xcbf2_9ce4_8422_2325, fold);
    Shard(u8::try_from(sum % u64::from(Shard::COUNT)).unwrap_or_default())
}

impl State {
    fn tx(&mut self, tx: TxId) -> Result<&mut Transaction> {
        self.open.get_mut(&tx).ok_or_else(gone)
    }

    fn end(&mut self, tx: TxId) {
        self.open.remove(&tx);
        self.locks.retain(|_, holder| *holder != tx);
        self.handling.retain(|_, holder| *holder != tx);
    }

    fn owned(&self, relay: &str, epochs: &[(Shard, i64)]) -> HashSet<Shard> {
        let is_owned = |(shard, epoch): &&(Shard, i64)| {
            self.owners
                .get(shard)
                .is_some_and(|owner| owner.epoch == *epoch && owner.relay.as_deref() == Some(relay))
        };
        epochs.iter().filter(is_owned).map(|(shard, _)| *shard).collect()
    }
}

impl Ledger {
    pub(crate) fn begin(&self, node: u64) -> TxId {
        let mut state = self.state.lock();
        state.last_tx += 1;
        let tx = state.last_tx;
        state.open.insert(tx, Transaction { node, ..Transaction::default() });
        tx
    }

    /// Ends transactions; those whose commit is on its way only if the server itself ends.
    pub(crate) fn abort_all(&self, of: impl Fn(u64) -> bool, is_server: bool) {
        let mut state = self.state.lock();
        let is_meant = |(_, open): &(&TxId, &Transaction)| of(open.node) && (is_server || !open.is_ending);
        let meant: Vec<TxId> = state.open.iter().filter(is_meant).map(|(tx, _)| *tx).collect();
        meant.into_iter().for_each(|tx| state.end(tx));
        drop(state);
        self.ended.notify_waiters();
    }

    fn abort(&self, tx: TxId) {
        self.state.lock().end(tx);
        self.ended.notify_waiters();
    }

    /// Waits until a lock can be had, and takes it.
    async fn take<T>(&self, tx: TxId, mut take: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            {
                let mut state = self.state.lock();
                state.tx(tx)?;
                if let Some(taken) = take(&mut state) {
                    return Ok(taken);
                }
            }
            ended.await;
        }
    }

    /// Holds a key of a topic until the end.
    pub(crate) async fn hold(&self, tx: TxId, topic: &str, key: &str) -> Result<()> {
        let lane = (topic.to_owned(), Bytes::copy_from_slice(key.as_bytes()));
        let take = |state: &mut State| match state.locks.get(&lane) {
            Some(holder) if *holder != tx => None,
            _ => {
                state.locks.insert(lane.clone(), tx);
                Some(())
            }
        };
        self.take(tx, take).await
    }

    /// The next number of a key, which is held.
    pub(crate) fn count_up(&self, tx: TxId, key: &str) -> Result<u64> {
        let mut state = self.state.lock();
        let n = state.counts.get(key).copied().unwrap_or(0);
        state.tx(tx)?.counted.push((key.to_owned(), n + 1));
        Ok(n)
    }

    /// Whether a consumer has not handled an event yet; waits for whoever does now.
    pub(crate) async fn remember(&self, tx: TxId, consumer: &'static str, id: Uuid) -> Result<bool> {
        let of = (consumer, id);
        let take = |state: &mut State| {
            if state.handled.contains(&of) {
                return Some(false);
            }
            if state.handling.get(&of).is_some_and(|holder| *holder != tx) {
                return None;
            }
            state.handling.insert(of, tx);
            state.tx(tx).ok()?.handled.push(of);
            Some(true)
        };
        self.take(tx, take).await
    }

    /// The place of the next event.
    pub(crate) fn next_row(&self) -> RowId {
        let mut state = self.state.lock();
        state.last_row += 1;
        RowId(state.last_row)
    }

    /// Stores an event.
    pub(crate) fn append(
        &self,
        tx: TxId,
        id: RowId,
        topic: &Topic,
        noted: Noted,
        envelope: Envelope,
    ) -> Result<()> {
        let mut state = self.state.lock();
        let key = envelope.key().map(eventbus::Key::to_bytes).unwrap_or_default();
        let row = Row { lane: (topic.to_string(), key), topic: topic.clone(), envelope };
        let open = state.tx(tx)?;
        open.rows.push((id, row));
        open.committed.push(noted);
        Ok(())
    }

    /// Notes what would be an event, which goes another way.
    pub(crate) fn note_committed(&self, tx: TxId, noted: Noted) -> Result<()> {
        self.state.lock().tx(tx)?.committed.push(noted);
        Ok(())
    }

    pub(crate) fn note_effect(&self, tx: TxId, noted: Noted) -> Result<()> {
        self.state.lock().tx(tx)?.effects.push(noted);
        Ok(())
    }

    /// Says that the end is on its way.
    pub(crate) fn ending(&self, tx: TxId) {
        if let Ok(open) = self.state.lock().tx(tx) {
            open.is_ending = true;
        }
    }

    pub(crate) fn commit(&self, tx: TxId) -> Result<()> {
        let mut state = self.state.lock();
        let open = std::mem::take(state.tx(tx)?);
        for (id, row) in open.rows {
            state.rows.insert((shard_of(&row.lane.0, &row.lane.1), id), row);
        }
        state.counts.extend(open.counted);
        state.handled.extend(open.handled);
        state.committed.extend(open.committed);
        state.effects.extend(open.effects);
        state.end(tx);
        drop(state);
        self.ended.notify_waiters();
        Ok(())
    }

    /// What was committed, and the effects, in their order.
    pub(crate) fn account(&self) -> (Vec<Noted>, Vec<Noted>) {
        let state = self.state.lock();
        (state.committed.clone(), state.effects.clone())
    }

    /// How many events are still to be published, and how many effects there are.
    pub(crate) fn counts(&self) -> (usize, usize, usize) {
        let state = self.state.lock();
        (state.rows.len() + state.open.len(), state.committed.len(), state.effects.len())
    }

    /// Keys that are noted as blocked although what blocked them is gone.
    pub(crate) fn stale_blocks(&self) -> Vec<String> {
        let state = self.state.lock();
        let stale = state
            .blocked
            .iter()
            .filter(|((shard, _), block)| !state.rows.contains_key(&(*shard, block.head)));
        stale.map(|((_, (topic, key)), block)| format!("{topic} {key:?} by {}", block.head.0)).collect()
    }

    pub(crate) fn lease(&self, relay: &str, ttl: Duration, shuffle: impl FnOnce(&mut [Shard])) -> Leased {
        let (mut state, now) = (self.state.lock(), Instant::now());
        state.relays.insert(relay.to_owned(), now);
        state.relays.retain(|_, seen| now < *seen + ttl * 10);
        let n_relays = state.relays.values().filter(|seen| now < **seen + ttl).count().max(1);
        let share = usize::from(Shard::COUNT).div_ceil(n_relays);
        let nobody = Owner { relay: None, epoch: 0, until: now };
        let mut ours = Vec::new();
        let mut free = Vec::new();
        for shard in (0..Shard::COUNT).map(Shard) {
            let owner = state.owners.entry(shard).or_insert_with(|| nobody.clone());
            match owner.relay.as_deref() {
                Some(owner) if owner == relay => ours.push(shard),
                Some(_) if now <= owner.until => {}
                _ => free.push(shard),
            }
        }
        shuffle(&mut free);
        let (kept, surplus) = ours.split_at(ours.len().min(share));
        let mut leased = Leased { shards: Vec::new(), surplus: surplus.to_vec() };
        for shard in kept.iter().chain(&free).take(share) {
            if let Some(owner) = state.owners.get_mut(shard) {
                owner.epoch += i64::from(owner.relay.as_deref() != Some(relay));
                (owner.relay, owner.until) = (Some(relay.to_owned()), now + ttl);
                leased.shards.push((*shard, owner.epoch));
            }
        }
        leased
    }

    pub(crate) fn release(&self, relay: &str, shards: impl Fn(Shard) -> bool) {
        let mut state = self.state.lock();
        let owned = state.owners.iter_mut();
        for (_, owner) in
            owned.filter(|(shard, owner)| owner.relay.as_deref() == Some(relay) && shards(**shard))
        {
            owner.relay = None;
        }
    }

    pub(crate) fn leave(&self, relay: &str) {
        self.state.lock().relays.remove(relay);
        self.release(relay, |_| true);
    }

    pub(crate) fn claim(&self, claim: &Claim, blocks_one_event: bool) -> Vec<Pending> {
        let (state, now) = (self.state.lock(), Instant::now());
        let (held, full): (HashSet<_>, HashSet<_>) =
            (claim.held.iter().collect(), claim.full.iter().collect());
        let (mut found, mut n_bytes) = (Vec::new(), 0);
        for shard in &claim.shards {
            let rows = state.rows.range((*shard, RowId(i64::MIN))..=(*shard, RowId(i64::MAX)));
            for ((_, id), row) in rows {
                let block = state.blocked.get(&(*shard, row.lane.clone()));
                let is_blocked = |block: &Block| now < block.due && (!blocks_one_event || block.head == *id);
                let waits = block.is_some_and(is_blocked);
                if held.contains(id) || full.contains(&row.lane) || waits {
                    continue;
                }
                if found.len() == claim.max_events || n_bytes >= claim.max_bytes {
                    return found;
                }
                let pending = Pending::new(*id, *shard, row.topic.clone(), row.envelope.clone());
                n_bytes += pending.size_bytes;
                let attempts = block.filter(|block| block.head == *id).map_or(0, |block| block.attempts);
                found.push(pending.with_attempts(attempts));
            }
        }
        found
    }

    /// As a claim, of rows that nobody took in the last half minute.
    pub(crate) fn take_any(&self, relay: &str, claim: &Claim) -> Vec<Pending> {
        let all = Claim::new((0..Shard::COUNT).map(Shard).collect(), usize::MAX, usize::MAX);
        let found = self.claim(&all, false);
        let (mut state, now) = (self.state.lock(), Instant::now());
        let mut taken = Vec::new();
        for pending in found.into_iter().filter(|pending| !claim.held.contains(&pending.id)) {
            let by = state.taken.get(&pending.id);
            if taken.len() < 3 && by.is_none_or(|(by, at)| by == relay || now > *at + Duration::from_secs(30))
            {
                state.taken.insert(pending.id, (relay.to_owned(), now));
                taken.push(pending);
            }
        }
        taken
    }

    pub(crate) fn settle(
        &self,
        relay: &str,
        epochs: &[(Shard, i64)],
        published: &[(Shard, RowId)],
        removes_ranges: bool,
    ) -> Vec<Shard> {
        let mut state = self.state.lock();
        let owned = state.owned(relay, epochs);
        for of in published.iter().filter(|(shard, _)| owned.contains(shard)) {
            match removes_ranges {
                true => state.rows.retain(|(shard, id), _| *shard != of.0 || *id > of.1),
                false => _ = state.rows.remove(of),
            }
            state.blocked.retain(|(shard, _), block| *shard != of.0 || block.head != of.1);
        }
        epochs.iter().map(|(shard, _)| *shard).filter(|shard| owned.contains(shard)).collect()
    }

    /// Removes events, whoever says so.
    pub(crate) fn remove(&self, published: &[(Shard, RowId)]) {
        let mut state = self.state.lock();
        for of in published {
            state.rows.remove(of);
        }
    }

    pub(crate) fn block(
        &self,
        relay: &str,
        epochs: &[(Shard, i64)],
        blocked: &[Blocked],
        notes_what_is_gone: bool,
    ) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let owned = state.owned(relay, epochs);
        for key in blocked.iter().filter(|key| owned.contains(&key.shard)) {
            if !notes_what_is_gone && !state.rows.contains_key(&(key.shard, key.head)) {
                continue;
            }
            let block = Block {
                head: key.head,
                attempts: key.attempts,
                may_pass: key.may_pass,
                due: now + key.retry_in,
            };
            state.blocked.insert((key.shard, (key.topic.clone(), key.key.clone())), block);
        }
    }

    pub(crate) fn park(&self, relay: &str, epochs: &[(Shard, i64)], parked: &[Blocked]) {
        let mut state = self.state.lock();
        let owned = state.owned(relay, epochs);
        for key in parked.iter().filter(|key| owned.contains(&key.shard)) {
            state.rows.remove(&(key.shard, key.head));
            state.blocked.remove(&(key.shard, (key.topic.clone(), key.key.clone())));
        }
    }

    pub(crate) fn unblock(&self, shards: &[Shard]) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        for ((shard, _), block) in &mut state.blocked {
            if block.may_pass && shards.contains(shard) {
                block.due = block.due.min(now);
            }
        }
    }
}

/// A transaction of a process, undone when it is dropped.
#[derive(Debug)]
pub(crate) struct Tx {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) id: TxId,
}

impl Tx {
    pub(crate) fn begin(ledger: &Arc<Ledger>, node: u64) -> Self {
        Self { ledger: ledger.clone(), id: ledger.begin(node) }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        self.ledger.abort(self.id);
    }
}
