//! Handlers whose effects happen once.

mod identity;
mod intent;
mod tx;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus::{Beginning, Context, Error, ErrorKind, Failure, Gathered, Group, Result};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use self::identity::{Identity, age};
pub use self::intent::Intent;
pub use self::tx::Tx;
use crate::backend::{Backend, Known};
use crate::outbox::{Outbox, whole};
use crate::transaction::Open;

/// How it is known that an event was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memory {
    /// A row for each event, kept for a time: catches what a broker delivers again, what a producer repeats, and a member
    /// that does not know that it was replaced. What is older than that time is not run, but dead-lettered.
    Events {
        /// How long, at least as long as the broker keeps events and letters may be redriven.
        keep: Duration,
    },
    /// A row for each key of each producer, with the number (`evt-seq`) of its last event, as a [`Relay`](crate::Relay)
    /// writes it: what is not newer was handled. Needs events of an outbox, and keys whose events wait behind one that
    /// fails ([`Parking`](eventbus::Parking)): where followers go on, or a letter is redriven behind them, the event that
    /// was left behind is refused as overtaken. Events without a key are known as [`Events`](Self::Events), for 14 days.
    Sequences,
}

impl Memory {
    /// For how long an event is remembered by its id.
    fn keep(self) -> Duration {
        match self {
            Self::Events { keep } => keep,
            Self::Sequences => KEEP,
        }
    }
}

/// What handlers with a [`Tx`] or an [`Intent`] need: an outbox, and how they remember. It is (or is part of) the state of a
/// [`Service`](eventbus::Service).
///
/// The name of a memory is `service.handler@generation`. A handler that is renamed begins a new one; so does a
/// [`generation`](Self::with_generation) of one's choice, for a replay that is to run again what was handled. Two services
/// with one name that share a database share their memory: what one handled, the other does not.
pub struct Inbox<Db: Backend>(Arc<Inner<Db>>);

struct Inner<Db: Backend> {
    outbox: Outbox<Db>,
    memory: Memory,
    generation: u32,
    /// Consumers that are noted with how long they remember.
    consumers: Mutex<HashMap<String, Arc<OnceCell<()>>>>,
    /// Whether a task forgets what is too old.
    forgets: AtomicBool,
    /// Whether the database was away when a handler was prepared: the next ones do not wait for it again.
    is_away: AtomicBool,
}

/// For how long events are remembered that nothing else is said of.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);
/// How much longer it is remembered: clocks of producers and ours are not one.
const SLACK: Duration = Duration::from_secs(24 * 3600);
/// How often what is too old is forgotten, and the pause between two helpings of it.
const FORGET_EVERY: Duration = Duration::from_secs(600);
const FORGET_PAUSE: Duration = Duration::from_millis(100);
/// How long a service that starts waits for the database.
const REACH: Duration = Duration::from_secs(5);

impl<Db: Backend> Inbox<Db> {
    /// Handlers that remember each event for 14 days.
    pub fn new(outbox: &Outbox<Db>) -> Self {
        Self::with_memory(outbox, Memory::Events { keep: KEEP })
    }

    /// Handlers that remember as it is said.
    pub fn with_memory(outbox: &Outbox<Db>, memory: Memory) -> Self {
        Self::named(outbox.clone(), memory, 1)
    }

    fn named(outbox: Outbox<Db>, memory: Memory, generation: u32) -> Self {
        let (consumers, forgets, is_away) = (Mutex::default(), AtomicBool::default(), AtomicBool::default());
        Self(Arc::new(Inner { outbox, memory, generation, consumers, forgets, is_away }))
    }

    /// The same under another name, beginning with 1: nothing was handled yet.
    #[must_use]
    pub fn with_generation(&self, generation: u32) -> Self {
        Self::named(self.0.outbox.clone(), self.0.memory, generation)
    }

    /// Returns the outbox.
    pub fn outbox(&self) -> &Outbox<Db> {
        &self.0.outbox
    }

    /// Forgets what is older than its consumer remembers, a helping of it; returns whether there may be more. A process with
    /// handlers does so by itself every ten minutes.
    ///
    /// # Errors
    /// Transient.
    ///
    /// # Cancellation
    /// It goes on.
    pub async fn forget(&self) -> Result<bool> {
        let outbox = self.0.outbox.clone();
        whole(async move {
            let mut open = outbox.clone().opened().await?;
            let more = Db::forget(&mut open.transaction, outbox.statements()).await?;
            open.commit().await?;
            Ok(more)
        })
        .await
    }

    fn consumer(&self, group: &Group, handler: &str) -> String {
        format!("{group}.{handler}@{}", self.0.generation)
    }

    /// Looks whether a handler can remember what it handles, for as long as it is needed.
    async fn prepare(&self, beginning: &Beginning<'_>, memory: Memory) -> Result<()> {
        named(beginning.handler())?;
        let keep = memory.keep();
        let kept = match memory {
            Memory::Events { .. } => beginning.retention().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "the broker does not say how long it keeps the topic's events");
                None
            }),
            Memory::Sequences => None,
        };
        if let Some(kept) = kept.and_then(|retention| retention.max_age)
            && kept > keep
        {
            let message = "the topic keeps events for longer than the inbox remembers them: have it remember for as long";
            return Err(Error::new(ErrorKind::Config, message)
                .with("topic", beginning.topic())
                .with("topic_keeps_seconds", kept.as_secs())
                .with("remembers_seconds", keep.as_secs()));
        }
        let ready = async {
            self.0.outbox.verify().await?;
            self.register(&self.consumer(beginning.group(), beginning.handler()), memory).await
        };
        if self.0.is_away.load(Ordering::Relaxed) {
            return Ok(());
        }
        // Events wait for a database that is away: they are tried until it is back.
        let reason = match tokio::time::timeout(REACH, ready).await {
            Ok(Err(error)) if error.is_retryable() => error.to_string(),
            Ok(ready) => return ready,
            Err(_) => format!("no answer within {REACH:?}"),
        };
        tracing::warn!(reason, "the inbox cannot be reached yet");
        self.0.is_away.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Begins a run: `None` if the event was handled before.
    async fn begin(&self, context: &Context) -> Result<Option<Open<Db>>, Failure> {
        let event = context.envelope();
        named(context.handler())?;
        let consumer = self.consumer(context.group(), context.handler());
        let keep = self.0.memory.keep();
        self.register(&consumer, self.0.memory).await?;
        let identity = Identity::of(event, context.topic(), self.0.memory)?;
        let outbox = self.0.outbox.clone();
        let is_redriven = event.extension("evt-replay-group").is_some();
        let is_old = age(event).is_some_and(|age| age > keep);
        whole(async move {
            let mut open = outbox.clone().opened().await?;
            let is_forgotten = identity.is_forgotten();
            let noted =
                Db::remember(&mut open.transaction, outbox.statements(), &consumer, &identity.known()).await;
            let refused = match noted {
                Ok(true) if is_old && !is_redriven && is_forgotten => Err(too_old(keep)),
                Ok(true) => return Ok(Some(open)),
                Ok(false) if is_redriven && !is_forgotten => Err(Error::new(
                    ErrorKind::Conflict,
                    "later events of the key were handled: the sequence of keys cannot go back",
                )),
                // Who handled it may be of the same group, and is believed when that is committed.
                Ok(false) => return open.commit().await.map(|()| None),
                Err(error) => Err(error),
            };
            // One that fails ends with its connection.
            _ = open.rollback().await;
            refused
        })
        .await
        .map_err(Failure::from)
    }

    /// Begins a call with several events: those that were handled before are passed over, and those that may be refused are
    /// left to be told so alone.
    async fn begin_all(&self, call: &Gathered<'_>) -> Result<Open<Db>, Failure> {
        let (memory, keep) = (self.0.memory, self.0.memory.keep());
        let mut consumer = String::new();
        let (mut places, mut identities) = (Vec::new(), Vec::new());
        for (at, context) in call.contexts().iter().enumerate() {
            if at == 0 {
                named(context.handler())?;
                consumer = self.consumer(context.group(), context.handler());
            }
            let identity = Identity::of(context.envelope(), context.topic(), memory).ok();
            let is_old = age(context.envelope()).is_some_and(|age| age > keep);
            match identity.filter(|identity| !(is_old && identity.is_forgotten())) {
                Some(identity) => {
                    places.push(at);
                    identities.push(identity);
                }
                None => call.leave(at),
            }
        }
        self.register(&consumer, memory).await?;
        let outbox = self.0.outbox.clone();
        let noted = whole(async move {
            let mut open = outbox.clone().opened().await?;
            let known: Vec<Known<'_>> = identities.iter().map(Identity::known).collect();
            match Db::remember_all(&mut open.transaction, outbox.statements(), &consumer, &known).await {
                Ok(are_new) => Ok((open, are_new)),
                Err(error) => {
                    // One that fails ends with its connection.
                    _ = open.rollback().await;
                    Err(error)
                }
            }
        });
        let (open, are_new) = noted.await?;
        for (at, _) in places.into_iter().zip(are_new).filter(|(_, is_new)| !is_new) {
            call.pass_over(at);
        }
        Ok(open)
    }

    /// Notes once in this process for how long a consumer remembers, and forgets from then on what is older.
    async fn register(&self, consumer: &str, memory: Memory) -> Result<()> {
        let cell = self.0.consumers.lock().entry(consumer.to_owned()).or_default().clone();
        cell.get_or_try_init(|| async {
            let (outbox, name) = (self.0.outbox.clone(), consumer.to_owned());
            let seconds = i64::try_from(memory.keep().saturating_add(SLACK).as_secs()).unwrap_or(i64::MAX);
            let memory = match memory {
                Memory::Events { .. } => "events",
                Memory::Sequences => "sequences",
            };
            let before = whole({
                let (outbox, name) = (outbox.clone(), name.clone());
                async move {
                    let mut open = outbox.clone().opened().await?;
                    let statements = outbox.statements();
                    let before =
                        Db::register(&mut open.transaction, statements, &name, memory, seconds).await?;
                    open.commit().await?;
                    Ok(before)
                }
            });
            if let Some(before) = before.await?
                && before != memory
            {
                let message = "the consumer remembered in another way until now: give it another generation";
                return Err(Error::new(ErrorKind::Conflict, message)
                    .with("consumer", name)
                    .with("remembers", before));
            }
            self.0.is_away.store(false, Ordering::Relaxed);
            if !self.0.forgets.swap(true, Ordering::Relaxed) {
                tokio::spawn(forget(Arc::downgrade(&self.0)));
            }
            Ok(())
        })
        .await
        .copied()
    }
}

/// Why an event is refused that nobody may know any more.
fn too_old(keep: Duration) -> Error {
    let message = "the event is older than the inbox remembers, which cannot say whether it was handled";
    Error::new(ErrorKind::Invalid, message).with("remembers_days", keep.as_secs() / 86_400)
}

/// A handler without a name cannot remember: every closure has the same one.
fn named(handler: &str) -> Result<()> {
    if !handler.contains('{') {
        return Ok(());
    }
    let message =
        "a handler with a Tx or an Intent must be a function: what it handled is remembered under its name";
    Err(Error::new(ErrorKind::Config, message))
}

async fn forget<Db: Backend>(inbox: std::sync::Weak<Inner<Db>>) {
    // Programs that start together do not all forget at once.
    tokio::time::sleep(FORGET_EVERY.mul_f64(fastrand::f64())).await;
    while let Some(inner) = inbox.upgrade() {
        let more = Inbox(inner).forget().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "what the inbox remembers for too long could not be forgotten");
            false
        });
        tokio::time::sleep(if more { FORGET_PAUSE } else { FORGET_EVERY }).await;
    }
}

impl<Db: Backend> Clone for Inbox<Db> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Db: Backend> fmt::Debug for Inbox<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("outbox", &self.0.outbox)
            .field("memory", &self.0.memory)
            .finish_non_exhaustive()
    }
}
