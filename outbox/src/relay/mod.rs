//! Sends what is stored to a bus.

mod flow;
mod pump;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus::{Bus, Error, ErrorKind, Result};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::pump::Pump;
use crate::backend::Backend;
use crate::bell::Bell;
use crate::outbox::Outbox;
use crate::store::Store;

/// What becomes of a key whose first event cannot be published for what it is: too large for the broker, no event at all,
/// for a topic that does not exist. (Whatever else fails, such as missing rights, may pass and blocks the key.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Permanent {
    /// The key waits and is tried again every few minutes, until it goes or an operator acts; other keys go on. Nothing
    /// of the key's order is lost.
    #[default]
    Block,
    /// The event is set aside with its reason, and later ones of its key go on without it.
    Park,
}

/// Bounds of what is in hand, and when failures are tried again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) batch_events: usize,
    pub(crate) batch_bytes: usize,
    /// Rounds in which the broker takes nothing before keys are blocked one by one.
    pub(crate) patience: u32,
    pub(crate) parks: bool,
    pub(crate) backoff_from: Duration,
    pub(crate) backoff_to: Duration,
}

impl Policy {
    /// How long a key waits after so many attempts; `random` in 0..1 spreads those that failed together.
    pub(crate) fn backoff(&self, attempts: u32, random: f64) -> Duration {
        let doubled = self.backoff_from.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        doubled.min(self.backoff_to).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }
}

type Opening = Pin<Box<dyn Future<Output = Result<Arc<dyn Store>>> + Send>>;

/// Publishes what transactions stored, in the order of each key: an event is removed when the broker has confirmed it.
///
/// Any number of relays share an outbox, in services or in processes of their own; each of 64 parts has one owner at a time,
/// and moves to another within the lease when its owner ends without a word. An event may be published again, with the same
/// id: when a relay ends between the broker's answer and the note of it, when it is stopped for longer than its lease, or when
/// the broker's answer is lost. A repetition may come behind later events of its key; it says so by `evt-seq`.
///
/// | Bound | Default | Option |
/// |---|---|---|
/// | a lease | 15 s, renewed every 3 s | [`with_lease`](Self::with_lease) |
/// | events and bytes of a round; up to four rounds at once, and eight times the events or twice the bytes in hand | 500, 1 MiB | [`with_batch`](Self::with_batch) |
/// | the answer of the broker | a third of the lease | |
/// | a look without a hint | 5 ms after news, then up to 250 ms | |
/// | a key that failed waits | 1 s, doubling to 5 min | |
/// | all fail in a way that may pass: pause | 50 ms, doubling to 5 s | |
///
/// Every event carries `evt-source` (a name of this outbox), `evt-seq` (its number, which ascends along each key) and
/// `evt-epoch` (of its owner).
pub struct Relay {
    opening: Opening,
    bell: Bell,
    name: String,
    lease: Duration,
    policy: Policy,
    max_event_bytes: usize,
}

impl Relay {
    /// A relay of an outbox, with connections of its own to the same database.
    pub fn new<Db: Backend>(outbox: &Outbox<Db>) -> Self {
        let (bell, max_event_bytes) = (outbox.bell().clone(), outbox.options().max_event_bytes);
        let outbox = outbox.clone();
        Self::with(Box::pin(async move { outbox.store().await }), bell, max_event_bytes)
    }

    /// A relay of another store.
    pub fn over(store: Arc<dyn Store>) -> Self {
        Self::with(Box::pin(async move { Ok(store) }), Bell::default(), 0)
    }

    fn with(opening: Opening, bell: Bell, max_event_bytes: usize) -> Self {
        let program = std::env::args().next().unwrap_or_default();
        let program = program.rsplit('/').next().unwrap_or("relay").to_owned();
        let policy = Policy {
            batch_events: 500,
            batch_bytes: 1 << 20,
            patience: 3,
            parks: false,
            backoff_from: Duration::from_secs(1),
            backoff_to: Duration::from_secs(300),
        };
        let name = format!("{program}-{}-{:08x}", std::process::id(), fastrand::u32(..));
        Self { opening, bell, name, lease: Duration::from_secs(15), policy, max_event_bytes }
    }

    /// Sets for how long this relay owns what it owns without a word: from one second to ten minutes.
    #[must_use]
    pub fn with_lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    /// Sets the most events and bytes of a round.
    #[must_use]
    pub fn with_batch(mut self, events: usize, bytes: usize) -> Self {
        (self.policy.batch_events, self.policy.batch_bytes) = (events, bytes);
        self
    }

    /// Sets what becomes of events that can never be published.
    #[must_use]
    pub fn with_permanent(mut self, permanent: Permanent) -> Self {
        self.policy.parks = permanent == Permanent::Park;
        self
    }

    /// Starts to publish.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) for a bound out of range; [`NotFound`](ErrorKind::NotFound) without tables;
    /// [`Conflict`](ErrorKind::Conflict) for tables of a newer version; or what the database or the bus say. What goes
    /// wrong later is tried again, and told by [`Relaying::state`].
    ///
    /// # Cancellation
    /// Nothing goes on.
    pub async fn start(self, bus: &Bus) -> Result<Relaying> {
        let out_of_range =
            |what: &str| Err(Error::new(ErrorKind::Config, format!("the relay's {what} is out of range")));
        if self.lease < Duration::from_secs(1) || self.lease > Duration::from_secs(600) {
            return out_of_range("lease (1 s to 10 min)");
        }
        if self.policy.batch_events == 0 || self.policy.batch_events > 10_000 || self.policy.batch_bytes == 0
        {
            return out_of_range("batch (1 to 10,000 events, 1 byte or more)");
        }
        let takes = bus.transport().capabilities().max_event_bytes;
        if takes.is_some_and(|takes| takes < self.max_event_bytes) {
            tracing::warn!(
                broker = takes,
                outbox = self.max_event_bytes,
                "the outbox takes events that are too large for the broker: set its max_event_bytes"
            );
        }
        let store = self.opening.await?;
        let publisher = bus.transport().publisher().await?;
        let identity = store.identity().await?;
        let (stop, stopping) = watch::channel(false);
        let shared = Arc::new(Shared::default());
        let pump = Pump::new(
            store,
            publisher,
            self.bell,
            self.name,
            identity,
            self.lease,
            self.policy,
            shared.clone(),
        );
        let task = tokio::spawn(pump.run(stopping));
        Ok(Relaying { stop, task, shared })
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("name", &self.name).field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// What a relay did since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Events that the broker confirmed.
    pub published: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Times that a key was blocked.
    pub blocked: u64,
    /// Events that were set aside.
    pub parked: u64,
    /// Statements to the database, but for leases.
    pub statements: u64,
}

/// How a relay is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It does what it should.
    Running,
    /// Something goes wrong and is tried again.
    Degraded {
        /// What it is.
        reason: String,
    },
}

#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) published: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) blocked: AtomicU64,
    pub(crate) parked: AtomicU64,
    pub(crate) statements: AtomicU64,
    /// What goes wrong now.
    ails: Mutex<BTreeMap<Part, String>>,
}

/// What can go wrong, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Leases,
    Writes,
    Claims,
    Broker,
}

impl Shared {
    pub(crate) fn is_well(&self, part: Part) {
        self.ails.lock().remove(&part);
    }

    /// Notes what goes wrong; returns whether it just began to.
    pub(crate) fn ails(&self, part: Part, reason: String) -> bool {
        self.ails.lock().insert(part, reason).is_none()
    }
}

/// A relay that runs, until it is stopped or dropped.
pub struct Relaying {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    shared: Arc<Shared>,
}

impl Relaying {
    /// Finishes what is on its way, notes it, gives everything back and ends. What the broker does not answer within a
    /// third of the lease is left to the next relay.
    ///
    /// # Cancellation
    /// It ends all the same.
    pub async fn stop(self) {
        _ = self.stop.send(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the relay ended with a panic; what it did not note is published again");
        }
    }

    /// Returns what it did.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            published: read(&self.shared.published),
            failed: read(&self.shared.failed),
            blocked: read(&self.shared.blocked),
            parked: read(&self.shared.parked),
            statements: read(&self.shared.statements),
        }
    }

    /// Returns how it is.
    pub fn state(&self) -> State {
        let ails = self.shared.ails.lock().values().next().cloned();
        match ails {
            Some(reason) => State::Degraded { reason },
            None if self.task.is_finished() => State::Degraded { reason: "the relay has ended".to_owned() },
            None => State::Running,
        }
    }
}

impl fmt::Debug for Relaying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relaying")
            .field("state", &self.state())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
