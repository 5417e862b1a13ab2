//! Publishing: events go out in call order, several rounds under way at a time; each is answered by the server's own
//! acknowledgement.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering as Atomic};
use std::sync::{Arc, Weak};

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{Client, Message, StatusCode, Subscriber};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::store::{Store, missing, unavailable};
use super::{message, names};
use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::Receipt;
use crate::transport::kit::queue::{Ending, Queued, Rounds};

/// What is sent in one round at most.
const MAX_ROUND_EVENTS: usize = 1024;
const MAX_ROUND_BYTES: usize = 8 << 20;
/// Rounds whose acknowledgements are waited for at a time.
const MAX_ROUNDS: usize = 8;

/// Where acknowledgements arrive, and who waits for which.
pub(super) struct Acks {
    inbox: String,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiting>>,
}

/// The place of an event: its round, its batch in that, and itself in this; and where it went.
struct Waiting {
    sent: Arc<Sent>,
    at: (usize, usize),
    partition: u32,
}

/// A round that was sent.
struct Sent {
    outcomes: Mutex<Vec<Vec<Option<Result<Receipt>>>>>,
    n_left: AtomicUsize,
    done: Notify,
}

impl Sent {
    fn set(&self, (batch, event): (usize, usize), outcome: Result<Receipt>) {
        let mut outcomes = self.outcomes.lock();
        if let Some(place) = outcomes.get_mut(batch).and_then(|batch| batch.get_mut(event))
            && place.is_none()
        {
            *place = Some(outcome);
            drop(outcomes);
            if self.n_left.fetch_sub(1, Atomic::AcqRel) == 1 {
                self.done.notify_one();
            }
        }
    }
}

impl Acks {
    /// Begins to hear acknowledgements.
    pub(super) async fn hear(client: &Client) -> Result<(Arc<Self>, Subscriber)> {
        let inbox = client.new_inbox();
        let heard = client.subscribe(format!("{inbox}.*")).await.map_err(unavailable)?;
        Ok((Arc::new(Self { inbox, next: AtomicU64::new(0), waiting: Mutex::default() }), heard))
    }

    fn wait(&self, waiting: Waiting) -> (u64, String) {
        let number = self.next.fetch_add(1, Atomic::Relaxed);
        self.waiting.lock().insert(number, waiting);
        (number, format!("{}.{number}", self.inbox))
    }

    fn take(&self, number: u64) -> Option<Waiting> {
        self.waiting.lock().remove(&number)
    }

    fn heard(&self, store: &Store, message: &Message) {
        let number = message.subject.rsplit_once('.').and_then(|(_, number)| number.parse().ok());
        let Some(waiting) = number.and_then(|number| self.take(number)) else { return };
        waiting.sent.set(waiting.at, outcome(store, message, waiting.partition));
    }

    /// Forgets what was waited for in vain.
    fn give_up(&self, sent: &Arc<Sent>) {
        self.waiting.lock().retain(|_, waiting| !Arc::ptr_eq(&waiting.sent, sent));
    }
}

/// What an acknowledgement says.
fn outcome(store: &Store, message: &Message, partition: u32) -> Result<Receipt> {
    if message.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(Error::not_found("no stream takes the events of this partition"));
    }
    let answer: Response<PublishAck> = serde_json::from_slice(&message.payload).map_err(|error| {
        Error::new(ErrorKind::Unknown, "the server's acknowledgement cannot be read").caused_by(error)
    })?;
    match answer {
        Response::Ok(ack) => Ok(Receipt::new(PartitionId(partition), Offset(ack.sequence))),
        Response::Err { error } => {
            let (kind, what) = match error.error_code() {
                ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => {
                    (ErrorKind::TooLarge, "the stream takes no event of this size")
                }
                ErrorCode::STREAM_STORE_FAILED
                | ErrorCode::INSUFFICIENT_RESOURCES
                | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
                | ErrorCode::STORAGE_RESOURCES_EXCEEDED => (ErrorKind::Full, "the server has no room"),
                _ => (ErrorKind::Failed, "the server refused the event"),
            };
            Err(Error::new(kind, what).with("place", &store.place).caused_by(error))
        }
    }
}

/// Stores what is published until the store is closed.
pub(super) async fn write(
    store: Weak<Store>,
    mut rounds: Rounds,
    (acks, mut heard): (Arc<Acks>, Subscriber),
) {
    let (hearing, of) = (acks.clone(), store.clone());
    let hearing = Ended(tokio::spawn(async move {
        while let Some(message) = heard.next().await {
            let Some(store) = of.upgrade() else { return };
            hearing.heard(&store, &message);
        }
    }));
    let under_way = Arc::new(Semaphore::new(MAX_ROUNDS));
    let mut last: Option<JoinHandle<()>> = None;
    while let Some(round) = rounds.next(MAX_ROUND_EVENTS, MAX_ROUND_BYTES).await {
        let Ok(turn) = under_way.clone().acquire_owned().await else { break };
        let Some(store) = store.upgrade() else { break };
        let is_last = round.ending.is_last();
        let sent = send(&store, &acks, &round.batches).await;
        let (acks, before, deadline) = (acks.clone(), last.take(), Instant::now() + store.options.timeout);
        last = Some(tokio::spawn(async move {
            finish(&acks, &sent, round.batches, deadline).await;
            drop(turn);
            tell(round.ending, before).await;
        }));
        if is_last {
            break;
        }
    }
    if let Some(last) = last {
        drop(last.await);
    }
    drop(hearing);
}

/// A task that ends with its owner.
struct Ended(JoinHandle<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells who waits for a round that it, and all before it, were answered.
async fn tell(ending: Ending, before: Option<JoinHandle<()>>) {
    if let Some(before) = before {
        drop(before.await);
    }
    ending.tell();
}

/// Hands a round to the connection, in order.
async fn send(store: &Arc<Store>, acks: &Acks, round: &[Queued]) -> Arc<Sent> {
    let outcomes: Vec<Vec<Option<Result<Receipt>>>> =
        round.iter().map(|queued| queued.events.iter().map(|_| None).collect()).collect();
    let n_left = AtomicUsize::new(outcomes.iter().map(Vec::len).sum());
    let sent = Arc::new(Sent { outcomes: Mutex::new(outcomes), n_left, done: Notify::new() });
    let mut resolved: HashMap<&Topic, Result<u32>> = HashMap::new();
    for (batch_at, queued) in round.iter().enumerate() {
        if !queued.events.is_empty() && !resolved.contains_key(&queued.topic) {
            resolved.insert(&queued.topic, store.partitions(&queued.topic).await);
        }
        // What follows a refused event of its key in its batch must not overtake it.
        let mut held: HashSet<&Key> = HashSet::new();
        for (event_at, event) in queued.events.iter().enumerate() {
            let at = (batch_at, event_at);
            if event.key().is_some_and(|key| held.contains(key)) {
                let error =
                    Error::new(ErrorKind::Failed, "an earlier event of this key in the batch was refused");
                sent.set(at, Err(error));
                continue;
            }
            let handed = match resolved.get(&queued.topic) {
                Some(Ok(n_partitions)) => {
                    let partition = partition::of_envelope(event, *n_partitions).0;
                    hand_over(store, acks, &sent, at, &queued.topic, partition, event).await
                }
                Some(Err(error)) => Err(error.duplicate()),
                None => Err(missing(&queued.topic)),
            };
            if let Err(error) = handed {
                held.extend(event.key());
                sent.set(at, Err(error));
            }
        }
    }
    sent
}

async fn hand_over(
    store: &Store,
    acks: &Acks,
    sent: &Arc<Sent>,
    at: (usize, usize),
    topic: &Topic,
    partition: u32,
    event: &Envelope,
) -> Result<()> {
    let (mut headers, mut n_bytes) = message::headers(event)?;
    if store.options.dedup.is_some() {
        let id = format!("{} {}", event.source(), event.id());
        n_bytes += id.len() + "Nats-Msg-Id: \r\n".len();
        headers.insert(NATS_MESSAGE_ID, id.escape_default().to_string());
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
    let (number, reply) = acks.wait(Waiting { sent: sent.clone(), at, partition });
    let subject = names::subject(topic, partition);
    let handing = store.client.publish_with_reply_and_headers(subject, reply, headers, payload);
    // Without a connection the client keeps a few, and then takes no more.
    let error = match tokio::time::timeout(store.options.timeout, handing).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => Error::new(ErrorKind::Unavailable, "the event could not be sent").caused_by(error),
        Err(_) => Error::new(ErrorKind::Unavailable, "the connection took no more events in time"),
    };
    drop(acks.take(number));
    Err(error)
}

/// Waits for a round's acknowledgements, and answers its batches in order.
async fn finish(acks: &Acks, sent: &Arc<Sent>, round: Vec<Queued>, deadline: Instant) {
    let all = async {
        while sent.n_left.load(Atomic::Acquire) > 0 {
            sent.done.notified().await;
        }
    };
    if tokio::time::timeout_at(deadline, all).await.is_err() {
        acks.give_up(sent);
    }
    let outcomes = std::mem::take(&mut *sent.outcomes.lock());
    for (queued, outcomes) in round.into_iter().zip(outcomes) {
        let topic = queued.topic.clone();
        queued.answer(outcomes.into_iter().map(|outcome| match outcome {
            Some(outcome) => outcome.map_err(|error| error.with("topic", &topic)),
            None => Err(
                Error::new(ErrorKind::Unknown, "the server did not confirm in time").with("topic", &topic),
            ),
        }));
    }
}
