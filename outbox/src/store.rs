//! What a relay needs of a database.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use eventbus::Result;

use crate::row::{Pending, RowId, Shard};

/// What a relay owns, until its lease ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leased {
    /// The shards, each under its epoch.
    pub shards: Vec<(Shard, i64)>,
    /// Shards of ours that others should have: to be released as soon as nothing of them is on its way.
    pub surplus: Vec<Shard>,
}

/// What a relay asks for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Claim {
    /// Shards that it owns.
    pub shards: Vec<Shard>,
    /// Events that it has already.
    pub held: Vec<RowId>,
    /// Keys, each with its topic, of which no more is wanted.
    pub full: Vec<(String, Bytes)>,
    /// Most events.
    pub max_events: usize,
    /// Most events of one shard, for stores that go through them one by one: so that many keys are in hand.
    pub max_of_shard: usize,
    /// Most bytes; one event is given however large it is.
    pub max_bytes: usize,
}

impl Claim {
    /// Asks for events of shards, of which none is held yet.
    pub fn new(shards: Vec<Shard>, max_events: usize, max_bytes: usize) -> Self {
        Self { shards, held: Vec::new(), full: Vec::new(), max_events, max_of_shard: max_events, max_bytes }
    }
}

/// A key whose first event could not be published.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Blocked {
    /// The part of the outbox.
    pub shard: Shard,
    /// The topic.
    pub topic: String,
    /// The key, as [`Pending::key`].
    pub key: Bytes,
    /// The event that failed.
    pub head: RowId,
    /// How often it was tried in vain.
    pub attempts: u32,
    /// Whether it may pass by itself.
    pub may_pass: bool,
    /// When it is tried again, from now.
    pub retry_in: Duration,
    /// What went wrong.
    pub error: String,
}

impl Blocked {
    /// Says that an event failed, for a reason that may pass.
    pub fn new(pending: &Pending, attempts: u32, retry_in: Duration, error: impl Into<String>) -> Self {
        // A text of PostgreSQL holds no NUL, and a line of a terminal no control characters.
        let plain = |char: char| if char.is_control() { ' ' } else { char };
        let error = error.into().chars().map(plain).take(1024).collect();
        let (topic, key) = (pending.topic.clone(), pending.key.clone());
        let (shard, head) = (pending.shard, pending.id);
        Self { shard, topic, key, head, attempts, may_pass: true, retry_in, error }
    }
}

/// The part of a database that relays work on. Any number of relays share it, in any number of processes.
///
/// What is final only under ownership names the relay and the epochs that it knows: a relay whose lease is over changes
/// nothing. No method holds a transaction open when it returns, and none is cancelled: a relay runs each to its end.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// The name under which events of this outbox are numbered: one for each sequence of row ids in the world.
    ///
    /// # Errors
    /// Transient, or what the tables say about themselves.
    async fn identity(&self) -> Result<String>;

    /// Says that a relay lives, renews what it owns and takes its fair share of what nobody owns, for `ttl`.
    ///
    /// # Errors
    /// Transient: nothing changed, or it is not known; what is owned ends with the last lease.
    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased>;

    /// Gives shards back.
    ///
    /// # Errors
    /// Transient: they are free when their lease ends.
    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()>;

    /// Gives everything back: the relay ends.
    ///
    /// # Errors
    /// Transient: what it owns is free when its lease ends.
    async fn leave(&self, relay: &str) -> Result<()>;

    /// Reads committed events of shards in the order of their ids, but for those of keys that are blocked for now, or full. If an
    /// event is returned, so is (or was, and is held or gone) every earlier one of its key.
    ///
    /// # Errors
    /// Transient.
    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>>;

    /// Removes events that were published, and what blocked their keys; returns of the shards named those that the relay
    /// still owns. Events of others stay.
    ///
    /// # Errors
    /// Transient: they may be removed or not; repeat it.
    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>>;

    /// Notes keys that are blocked, in place of what is noted of them; but for those whose event is gone: a note that comes
    /// late (the relay did not wait for it any more, and did it again) blocks nothing.
    ///
    /// # Errors
    /// Transient.
    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()>;

    /// Sets events aside, each with the number of attempts and the error, and frees their keys.
    ///
    /// # Errors
    /// Transient.
    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()>;

    /// Makes due at once whatever of these shards is blocked by what may pass: the broker is there again.
    ///
    /// # Errors
    /// Transient.
    async fn unblock(&self, shards: &[Shard]) -> Result<()>;

    /// Waits until another process may have committed something. It may never return.
    async fn news(&self);

    /// Ends the connections.
    async fn close(&self);
}

/// A name that no other outbox has.
pub(crate) fn identity() -> String {
    uuid::Uuid::from_u128(u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..)))
        .simple()
        .to_string()
}
