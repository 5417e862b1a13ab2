//! Handlers whose effects happen once.

use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use eventbus::{
    Beginning, Context, Envelope, Error, ErrorKind, EventId, Extract, Failure, FromState, Group, Message,
    Outcome, Result, Topic, Unit,
};
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OnceCell, OwnedMutexGuard};

use crate::backend::{Backend, Known};
use crate::outbox::{Outbox, whole};
use crate::row::dedup_id;
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

/// What handlers with a [`Tx`] need: an outbox, and how they remember. It is (or is part of) the state of a
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
/// How long the end of a run that failed is waited for; it goes on without us.
const ROLLBACK: Duration = Duration::from_secs(1);

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

    fn keep(&self) -> Duration {
        match self.0.memory {
            Memory::Events { keep } => keep,
            Memory::Sequences => KEEP,
        }
    }

    /// Looks whether a handler can remember what it handles, for as long as it is needed.
    async fn prepare(&self, beginning: &Beginning<'_>) -> Result<()> {
        named(beginning.handler())?;
        let keep = self.keep();
        let kept = match self.0.memory {
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
            self.register(&self.consumer(beginning.group(), beginning.handler()), keep).await
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
        let keep = self.keep();
        self.register(&consumer, keep).await?;
        let identity = Identity::of(event, context.topic(), self.0.memory, consumer)?;
        let outbox = self.0.outbox.clone();
        let is_redriven = event.extension("evt-replay-group").is_some();
        let is_old = age(event).is_some_and(|age| age > keep);
        whole(async move {
            let mut open = outbox.clone().opened().await?;
            let is_forgotten = identity.is_forgotten();
            let refused = match Db::remember(&mut open.transaction, outbox.statements(), &identity.known())
                .await
            {
                Ok(true) if is_old && !is_redriven && is_forgotten => Err(Error::new(
                    ErrorKind::Invalid,
                    "the event is older than the inbox remembers, which cannot say whether it was handled",
                )
                .with("remembers_days", keep.as_secs() / 86_400)),
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

    /// Notes once in this process for how long a consumer remembers, and forgets from then on what is older.
    async fn register(&self, consumer: &str, keep: Duration) -> Result<()> {
        let cell = self.0.consumers.lock().entry(consumer.to_owned()).or_default().clone();
        cell.get_or_try_init(|| async {
            let (outbox, name) = (self.0.outbox.clone(), consumer.to_owned());
            let memory = match self.0.memory {
                Memory::Events { .. } => "events",
                Memory::Sequences => "sequences",
            };
            let seconds = i64::try_from(keep.saturating_add(SLACK).as_secs()).unwrap_or(i64::MAX);
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

/// A handler without a name cannot remember: every closure has the same one.
fn named(handler: &str) -> Result<()> {
    if !handler.contains('{') {
        return Ok(());
    }
    let message = "a handler with a Tx must be a function: what it handled is remembered under its name";
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

/// How long ago an event was made, as far as it says: by its time, or by its id (UUIDv7).
fn age(event: &Envelope) -> Option<Duration> {
    let of_id = || {
        let (seconds, nanos) = event.id().as_uuid()?.get_timestamp()?.to_unix();
        SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
    };
    SystemTime::now().duration_since(event.time().or_else(of_id)?).ok()
}

/// By what an event is known.
enum Identity {
    Message { consumer: String, id: uuid::Uuid },
    Sequence { consumer: String, source: String, key: Vec<u8>, seq: i64 },
}

impl Identity {
    fn of(event: &Envelope, topic: &Topic, memory: Memory, consumer: String) -> Result<Self, Failure> {
        let (Memory::Sequences, Some(key)) = (memory, event.key()) else {
            return Ok(Self::Message { consumer, id: dedup_id(event) });
        };
        let seq = event.extension("evt-seq").and_then(|seq| seq.parse().ok());
        match (seq, event.extension("evt-source")) {
            (Some(seq), Some(source)) => {
                // Numbers ascend along the keys of a topic.
                let source = format!("{source}/{topic}");
                Ok(Self::Sequence { consumer, source, key: key.as_bytes().to_vec(), seq })
            }
            _ => Err(Failure::permanent(
                "inbox.no_sequence",
                "the event has no number of an outbox (evt-seq, evt-source), which Memory::Sequences needs",
            )),
        }
    }

    fn known(&self) -> Known<'_> {
        match self {
            Self::Message { consumer, id } => Known::Message { consumer, id: *id },
            Self::Sequence { consumer, source, key, seq } => {
                Known::Sequence { consumer, source, key, seq: *seq }
            }
        }
    }

    /// Whether it is forgotten after a time.
    fn is_forgotten(&self) -> bool {
        matches!(self, Self::Message { .. })
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

/// The transaction of a run: an argument of a handler, used as a connection (`&mut *tx`).
///
/// It begins before the handler, with the note that the event is handled; an event that was handled before is settled
/// without a run. It is committed after the handler with all that the handler wrote, [published](Self::publish) and
/// returned ([`Emit`](eventbus::Emit), [`Reply`](eventbus::Reply)), and only then is the event settled: all of it happens
/// once, or not yet. A handler that fails, panics or runs out of time leaves nothing.
///
/// What the handler does outside of the database, such as a mail, is not part of it and may happen again. The value must be
/// dropped when the handler returns; one that is kept makes the run fail.
pub struct Tx<Db: Backend>(OwnedMutexGuard<Open<Db>>);

impl<Db: Backend> Tx<Db> {
    /// Publishes a message with the commit; returns its id.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) or [`Invalid`](ErrorKind::Invalid): nothing is added.
    pub fn publish<M: Message>(&mut self, topic: &Topic, message: &M) -> Result<EventId> {
        self.0.publish(topic, message)
    }

    /// Publishes an envelope with the commit.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn publish_envelope(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        self.0.publish_envelope(topic, event)
    }
}

impl<Db: Backend> Deref for Tx<Db> {
    type Target = Db::Connection;

    fn deref(&self) -> &Self::Target {
        &self.0.transaction
    }
}

impl<Db: Backend> DerefMut for Tx<Db> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0.transaction
    }
}

impl<Db: Backend> fmt::Debug for Tx<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tx").field(&*self.0).finish()
    }
}

impl<Db: Backend, S: Sync> Extract<S> for Tx<Db>
where
    Inbox<Db>: FromState<S>,
{
    async fn prepare(beginning: &Beginning<'_>, state: &S) -> Result<()> {
        Inbox::<Db>::from_state(state).prepare(beginning).await
    }

    async fn extract(context: &Context, state: &S) -> Result<Self, Outcome> {
        let inbox = Inbox::<Db>::from_state(state);
        let Some(open) = inbox.begin(context).await? else { return Err(Outcome::duplicate()) };
        let open = Arc::new(AsyncMutex::new(open));
        let guard = open.clone().lock_owned().await;
        context.enlist(Run(open))?;
        Ok(Self(guard))
    }
}

/// The transaction as the driver ends it.
#[derive(Debug)]
struct Run<Db: Backend>(Arc<AsyncMutex<Open<Db>>>);

#[async_trait]
impl<Db: Backend> Unit for Run<Db> {
    async fn commit(self: Box<Self>, outputs: Vec<(Topic, Envelope)>) -> Result<(), Failure> {
        let Some(open) = Arc::into_inner(self.0) else {
            return Err(Failure::permanent("inbox.kept", "the handler kept its Tx when it returned"));
        };
        let mut open = open.into_inner();
        for (topic, event) in outputs {
            if let Err(error) = open.publish_envelope(&topic, event) {
                _ = whole(open.rollback()).await;
                return Err(error.into());
            }
        }
        whole(open.commit()).await.map_err(Failure::from)
    }

    async fn abandon(self: Box<Self>) {
        // Whoever still has it ends it by dropping it.
        let Some(open) = Arc::into_inner(self.0) else { return };
        // A statement that is still running is waited for by the connection, not by us.
        if tokio::time::timeout(ROLLBACK, whole(open.into_inner().rollback())).await.is_err() {
            tracing::debug!("the rollback of a failed run goes on");
        }
    }
}
