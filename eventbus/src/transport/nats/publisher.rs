//! Publishing: events go out in call order without waiting for each other; each batch is answered when the server has
//! acknowledged its last event.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{Client, Message, StatusCode, Subscriber};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::store::{Store, unavailable};
use super::topics::missing;
use super::{message, names};
use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::Receipt;
use crate::transport::kit::queue::{Queued, Rounds};

/// What is taken from the queue at once at most.
const MAX_ROUND_EVENTS: usize = 1024;
const MAX_ROUND_BYTES: usize = 8 << 20;
/// How often acknowledgements that do not come are looked for.
const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// Where acknowledgements arrive, and who waits for which.
pub(super) struct Acks {
    inbox: String,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiting>>,
    /// Numbers of the batches that are not answered.
    open: Mutex<BTreeSet<u64>>,
    answered: watch::Sender<u64>,
    /// Whether the last event waited in vain for the connection: the next ones do not.
    is_stuck: AtomicBool,
}

/// An event that waits for its acknowledgement: its batch, its place in that, and where it went.
struct Waiting {
    batch: Arc<Batch>,
    at: usize,
    partition: u32,
}

/// A batch that is on its way.
struct Batch {
    number: u64,
    topic: Topic,
    /// When what is not acknowledged is unknown.
    deadline: Instant,
    queued: Mutex<Option<Queued>>,
    outcomes: Mutex<Vec<Option<Result<Receipt>>>>,
    n_left: AtomicUsize,
    changed: Notify,
    acks: Arc<Acks>,
}

impl Batch {
    /// Notes what became of an event; the last one answers the batch.
    fn set(&self, at: usize, outcome: Result<Receipt>) {
        let outcome = outcome.map_err(|error| error.with("topic", &self.topic));
        match self.outcomes.lock().get_mut(at) {
            Some(place) if place.is_none() => *place = Some(outcome),
            _ => return,
        }
        self.changed.notify_one();
        if self.n_left.fetch_sub(1, Atomic::AcqRel) == 1 {
            self.answer();
        }
    }

    fn answer(&self) {
        let outcomes = std::mem::take(&mut *self.outcomes.lock());
        if let Some(queued) = self.queued.lock().take() {
            queued.answer(outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(unknown()))));
        }
        self.acks.open.lock().remove(&self.number);
        self.acks.answered.send_modify(|n| *n += 1);
    }

    /// Waits until an event's outcome is known; if it was not stored, as far as we know, what that is for those of its
    /// key that follow: they were not sent.
    async fn refusal(&self, at: usize) -> Option<ErrorKind> {
        loop {
            match self.outcomes.lock().get(at) {
                Some(None) => {}
                Some(Some(Err(error))) if error.is_retryable() => return Some(ErrorKind::Unavailable),
                Some(Some(Err(_))) => return Some(ErrorKind::Failed),
                // Answered as a whole, or stored.
                _ => return None,
            }
            self.changed.notified().await;
        }
    }
}

fn stuck() -> Error {
    Error::new(ErrorKind::Unavailable, "there is no connection, and it took no more events in time")
}

fn unknown() -> Error {
    Error::new(ErrorKind::Unknown, "the server did not confirm in time")
}

impl Acks {
    /// Begins to hear acknowledgements.
    pub(super) async fn hear(client: &Client) -> Result<(Arc<Self>, Subscriber)> {
        let inbox = client.new_inbox();
        let heard = client.subscribe(format!("{inbox}.*")).await.map_err(unavailable)?;
        let acks = Self {
            inbox,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            open: Mutex::default(),
            answered: watch::Sender::new(0),
            is_stuck: AtomicBool::new(false),
        };
        Ok((Arc::new(acks), heard))
    }

    /// Notes a batch that is not empty.
    fn begin(self: &Arc<Self>, queued: Queued, deadline: Instant) -> Arc<Batch> {
        let number = self.next.fetch_add(1, Atomic::Relaxed);
        self.open.lock().insert(number);
        let n_events = queued.events.len();
        Arc::new(Batch {
            number,
            topic: queued.topic.clone(),
            deadline,
            queued: Mutex::new(Some(queued)),
            outcomes: Mutex::new((0..n_events).map(|_| None).collect()),
            n_left: AtomicUsize::new(n_events),
            changed: Notify::new(),
            acks: self.clone(),
        })
    }

    fn is_stuck(&self, store: &Store) -> bool {
        self.is_stuck.load(Atomic::Acquire) && store.client.connection_state() != State::Connected
    }

    fn wait(&self, waiting: Waiting) -> (u64, String) {
        let number = self.next.fetch_add(1, Atomic::Relaxed);
        self.waiting.lock().insert(number, waiting);
        (number, format!("{}.{number}", self.inbox))
    }

    fn take(&self, number: u64) -> Option<Waiting> {
        self.waiting.lock().remove(&number)
    }

    /// Takes in what the server says of an event.
    fn heard(&self, store: &Arc<Store>, message: &Message) {
        let number = message.subject.rsplit_once('.').and_then(|(_, number)| number.parse().ok());
        let Some(Waiting { batch, at, partition }) = number.and_then(|number| self.take(number)) else {
            return;
        };
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            // There is no stream, or it has no leader now: a look says which.
            let store = store.clone();
            tokio::spawn(async move {
                let found = store.look(&batch.topic, partition).await;
                let error = match found {
                    Ok(Some(_)) => Error::new(ErrorKind::Unavailable, "the stream took no event just then"),
                    Ok(None) => {
                        store.forget(&batch.topic);
                        Error::not_found("no stream takes the events of this partition")
                    }
                    Err(error) => error,
                };
                batch.set(at, Err(error));
            });
            return;
        }
        batch.set(at, outcome(message, partition));
    }

    /// Gives up what should have been acknowledged by now.
    fn sweep(&self) {
        let now = Instant::now();
        let late: Vec<Waiting> = {
            let mut waiting = self.waiting.lock();
            waiting
                .extract_if(|_, waiting| waiting.batch.deadline <= now)
                .map(|(_, waiting)| waiting)
                .collect()
        };
        late.into_iter().for_each(|waiting| waiting.batch.set(waiting.at, Err(unknown())));
    }

    /// Waits until every batch that began before this was answered.
    async fn flush(&self) {
        let last = self.next.load(Atomic::Acquire);
        let mut answered = self.answered.subscribe();
        loop {
            answered.borrow_and_update();
            if self.open.lock().first().is_none_or(|first| *first >= last)
                || answered.changed().await.is_err()
            {
                return;
            }
        }
    }
}

/// What an acknowledgement says.
fn outcome(message: &Message, partition: u32) -> Result<Receipt> {
    let answer: Response<PublishAck> = serde_json::from_slice(&message.payload).map_err(|error| {
        Error::new(ErrorKind::Unknown, "the server's acknowledgement cannot be read").caused_by(error)
    })?;
    match answer {
        Response::Ok(ack) => {
            let receipt = Receipt::new(PartitionId(partition), Offset(ack.sequence));
            Ok(if ack.duplicate { receipt.duplicate() } else { receipt })
        }
        Response::Err { error } => {
            let (kind, what) = match error.error_code() {
                ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => {
                    (ErrorKind::TooLarge, "the stream takes no event of this size")
                }
                ErrorCode::STREAM_STORE_FAILED
                | ErrorCode::INSUFFICIENT_RESOURCES
                | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
                | ErrorCode::STORAGE_RESOURCES_EXCEEDED => (ErrorKind::Full, "the server has no room"),
                ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT => {
                    (ErrorKind::Unknown, "an event of the same id is on its way")
                }
                _ if error.code() >= 500 => (ErrorKind::Unavailable, "the server cannot take the event now"),
                _ => (ErrorKind::Failed, "the server refused the event"),
            };
            Err(Error::new(kind, what).caused_by(error))
        }
    }
}

/// Stores what is published until the store is closed.
pub(super) async fn write(store: Weak<Store>, mut rounds: Rounds, (acks, heard): (Arc<Acks>, Subscriber)) {
    let hearing = hear(store.clone(), acks.clone(), heard);
    let writing = async {
        while let Some(round) = rounds.next(MAX_ROUND_EVENTS, MAX_ROUND_BYTES).await {
            let Some(store) = store.upgrade() else { return };
            for queued in round.batches {
                send(&store, &acks, queued).await;
            }
            drop(store);
            if round.ending.is_last() {
                acks.flush().await;
                round.ending.tell();
                return;
            }
            if round.ending.is_awaited() {
                let acks = acks.clone();
                tokio::spawn(async move {
                    acks.flush().await;
                    round.ending.tell();
                });
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = hearing => {}
    }
}

/// Hears acknowledgements, and misses those that do not come.
async fn hear(store: Weak<Store>, acks: Arc<Acks>, mut heard: Subscriber) {
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = heard.next() => {
                let (Some(message), Some(store)) = (message, store.upgrade()) else { break };
                acks.heard(&store, &message);
            }
            _ = sweep.tick() => acks.sweep(),
        }
    }
    // The connection is gone for good: the rest is unknown in time.
    loop {
        sweep.tick().await;
        acks.sweep();
    }
}

/// Hands a batch to the connection, in order.
async fn send(store: &Arc<Store>, acks: &Arc<Acks>, queued: Queued) {
    if queued.events.is_empty() {
        return queued.answer(std::iter::empty());
    }
    let (topic, events) = (queued.topic.clone(), queued.events.clone());
    let batch = acks.begin(queued, Instant::now() + store.options.timeout);
    let looked = if acks.is_stuck(store) { Err(stuck()) } else { store.partitions(&topic).await };
    let n_partitions = match looked {
        Ok(n_partitions) => n_partitions,
        Err(error) => {
            acks.is_stuck.store(error.kind() == ErrorKind::Unavailable, Atomic::Release);
            let error = if error.kind() == ErrorKind::NotFound { missing(&topic) } else { error };
            return (0..events.len()).for_each(|at| batch.set(at, Err(error.duplicate())));
        }
    };
    // The last event of each key that was sent.
    let mut sent: HashMap<&Key, usize> = HashMap::new();
    let mut refused: HashMap<&Key, ErrorKind> = HashMap::new();
    for (at, event) in events.iter().enumerate() {
        if let Some(key) = event.key() {
            // One that was lost with the connection must not be overtaken by one that was not written yet: so each
            // event of a key waits for the one before it. Different keys do not wait.
            if let Some(before) = sent.insert(key, at)
                && !refused.contains_key(key)
                && let Some(kind) = batch.refusal(before).await
            {
                refused.insert(key, kind);
            }
            if let Some(kind) = refused.get(key) {
                let error = Error::new(*kind, "an earlier event of this key in the batch was not stored");
                batch.set(at, Err(error));
                continue;
            }
        }
        let partition = partition::of_envelope(event, n_partitions).0;
        let handed = if acks.is_stuck(store) {
            Err(stuck())
        } else {
            hand_over(store, &batch, at, partition, event).await
        };
        acks.is_stuck.store(
            handed.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unavailable),
            Atomic::Release,
        );
        if let Err(error) = handed {
            batch.set(at, Err(error));
        }
    }
}

async fn hand_over(
    store: &Store,
    batch: &Arc<Batch>,
    at: usize,
    partition: u32,
    event: &Envelope,
) -> Result<()> {
    let (mut headers, mut n_bytes) = message::headers(event)?;
    if store.options.dedup.is_some() {
        let id = message::id(event);
        n_bytes += id.len() + "Nats-Msg-Id: \r\n".len();
        headers.insert(NATS_MESSAGE_ID, id);
    }
    let payload = event.payload().cloned().unwrap_or_default();
    let max = store.client.max_payload();
    if n_bytes + payload.len() > max {
        // The server would end the connection.
        return Err(Error::new(
            ErrorKind::TooLarge,
            "headers and body together are above what the server takes",
        )
        .with("bytes", n_bytes + payload.len())
        .with("max", max));
    }
    let (number, reply) = batch.acks.wait(Waiting { batch: batch.clone(), at, partition });
    let subject = names::subject(&batch.topic, partition);
    let handing = store.client.publish_with_reply_and_headers(subject, reply, headers, payload);
    // Without a connection the client keeps a few, and then takes no more.
    let error = match tokio::time::timeout_at(batch.deadline, handing).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => Error::new(ErrorKind::Unavailable, "the event could not be sent").caused_by(error),
        Err(_) => stuck(),
    };
    // If it was given up meanwhile, that stands.
    drop(batch.acks.take(number));
    Err(error)
}
