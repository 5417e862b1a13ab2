//! Publishing: a round of events goes out in order on one channel, and is answered when the broker has confirmed the last
//! of them.
//!
//! A message that no queue takes is returned, and confirmed all the same; the client hangs what was returned on whichever
//! confirm comes next. So a round is judged as a whole: nothing else is on its way on the channel then.

use std::collections::HashMap;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use lapin::message::{BasicReturnMessage, Delivery};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation};
use tokio::time::Instant;

use super::store::Store;
use super::streams::{self, short};
use super::wire::failed;
use super::{message, names};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Key;
use crate::partition::{self, PartitionId};
use crate::transport::Receipt;
use crate::transport::kit::queue::{Queued, Rounds};

/// What is taken from the queue at once at most.
const MAX_ROUND_EVENTS: usize = 2048;
const MAX_ROUND_BYTES: usize = 8 << 20;
/// How often a broker that takes nothing is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// An event that waits for its confirm.
struct Sent {
    batch: usize,
    at: usize,
    partition: u32,
    confirm: BoxFuture<'static, lapin::Result<Confirmation>>,
}

/// Stores what is published until the store is closed.
pub(super) async fn write(store: Weak<Store>, mut rounds: Rounds) {
    let mut line = None;
    while let Some(round) = rounds.next(MAX_ROUND_EVENTS, MAX_ROUND_BYTES).await {
        let Some(store) = store.upgrade() else { return };
        if !round.batches.is_empty() {
            send(&store, &mut line, round.batches).await;
        }
        if round.ending.tell() {
            return;
        }
    }
}

/// Sends a round and answers it. The channel is kept if all of it was confirmed or refused.
async fn send(store: &Store, line: &mut Option<Channel>, batches: Vec<Queued>) {
    let deadline = Instant::now() + store.options.timeout;
    let mut outcomes: Vec<Vec<Option<Result<Receipt>>>> =
        batches.iter().map(|batch| batch.events.iter().map(|_| None).collect()).collect();
    let channel = open(store, line.take(), deadline).await;
    let mut sent = Vec::new();
    for (number, (batch, outcomes)) in batches.iter().zip(&mut outcomes).enumerate() {
        let handing = async {
            // Nothing was sent: it may be tried again.
            let channel = channel.as_ref().map_err(Error::duplicate)?;
            let partitions = store.wires.within(Box::pin(store.partitions(&batch.topic))).await?;
            hand_over(channel, batch, number, partitions, outcomes, &mut sent);
            Ok::<_, Error>(())
        };
        if let Err(error) = handing.await {
            outcomes.iter_mut().for_each(|outcome| *outcome = Some(Err(error.duplicate())));
        }
    }
    let is_whole = confirm(store, &batches, sent, &mut outcomes, deadline).await;
    if is_whole {
        *line = channel.ok();
    }
    for (batch, outcomes) in batches.into_iter().zip(outcomes) {
        let topic = batch.topic.clone();
        let known = outcomes.into_iter().map(|outcome| {
            outcome.unwrap_or_else(|| Err(unknown())).map_err(|error| error.with("topic", &topic))
        });
        batch.answer(known);
    }
}

fn unknown() -> Error {
    Error::new(ErrorKind::Unknown, "the broker did not confirm")
}

/// A channel that confirms, on a connection that takes events.
async fn open(store: &Store, line: Option<Channel>, deadline: Instant) -> Result<Channel> {
    let is_blocked = AtomicBool::new(false);
    let opening = async {
        while store.wires.send.is_blocked().await {
            is_blocked.store(true, Atomic::Relaxed);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        is_blocked.store(false, Atomic::Relaxed);
        if let Some(line) = line.filter(|line| line.status().connected()) {
            return Ok(line);
        }
        let channel = store.wires.send.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
        Ok(channel)
    };
    match tokio::time::timeout_at(deadline, opening).await {
        Ok(outcome) => outcome,
        Err(_) if is_blocked.load(Atomic::Relaxed) => {
            Err(Error::new(ErrorKind::Full, "the broker takes no events: it has an alarm of memory or disk"))
        }
        Err(_) => Err(Error::new(ErrorKind::Unavailable, "the broker did not answer in time")),
    }
}

/// Sends the events of a batch in order. After one of a key that is not sent, none of that key is.
fn hand_over(
    channel: &Channel,
    batch: &Queued,
    number: usize,
    partitions: u32,
    outcomes: &mut [Option<Result<Receipt>>],
    sent: &mut Vec<Sent>,
) {
    let now = SystemTime::now();
    let mut refused: HashMap<&Key, ErrorKind> = HashMap::new();
    for (at, (event, outcome)) in batch.events.iter().zip(outcomes).enumerate() {
        if let Some(kind) = event.key().and_then(|key| refused.get(key)) {
            let error = Error::new(*kind, "an earlier event of this key in the batch was not stored");
            *outcome = Some(Err(error));
            continue;
        }
        let partition = partition::of_envelope(event, partitions).0;
        match hand_one(channel, batch, event, partition, now) {
            Ok(confirm) => sent.push(Sent { batch: number, at, partition, confirm }),
            Err(error) => {
                if let Some(key) = event.key() {
                    let kind = if error.is_retryable() { ErrorKind::Unavailable } else { ErrorKind::Failed };
                    refused.insert(key, kind);
                }
                *outcome = Some(Err(error));
            }
        }
    }
}

/// Puts an event in line, and returns what will say what became of it. The client takes it when that is polled first, and
/// is not waited for: each write to its socket would be a turn of its thread.
fn hand_one(
    channel: &Channel,
    batch: &Queued,
    event: &Envelope,
    partition: u32,
    now: SystemTime,
) -> Result<BoxFuture<'static, lapin::Result<Confirmation>>> {
    let properties = message::properties(event, now)?;
    let payload = event.payload().cloned().unwrap_or_default();
    let (exchange, place) = (short(batch.topic.as_str())?, short(&partition.to_string())?);
    let (channel, mandatory) =
        (channel.clone(), BasicPublishOptions { mandatory: true, ..Default::default() });
    let publishing =
        async move { channel.basic_publish(exchange, place, mandatory, &payload, properties).await?.await };
    let mut publishing = publishing.boxed();
    match (&mut publishing).now_or_never() {
        Some(Err(error)) => Err(failed(error)),
        Some(Ok(known)) => Ok(std::future::ready(Ok(known)).boxed()),
        None => Ok(publishing),
    }
}

/// By exchange and routing key: what was returned, and why that is.
type Returned = HashMap<(String, String), Option<Error>>;

/// Notes a message that was returned, whichever confirm it hangs on.
fn note(returned: &mut Returned, message: Option<BasicReturnMessage>) {
    if let Some(message) = message {
        let Delivery { exchange, routing_key, .. } = message.delivery;
        returned.insert((exchange.to_string(), routing_key.to_string()), None);
    }
}

/// Waits for the confirms of a round; false if some did not come.
async fn confirm(
    store: &Store,
    batches: &[Queued],
    sent: Vec<Sent>,
    outcomes: &mut [Vec<Option<Result<Receipt>>>],
    deadline: Instant,
) -> bool {
    let (mut is_whole, mut confirmed) = (true, Vec::with_capacity(sent.len()));
    let mut returned = Returned::new();
    for Sent { batch, at, partition, confirm } in sent {
        let outcome = match tokio::time::timeout_at(deadline, confirm).await {
            Ok(Ok(Confirmation::Ack(message))) => {
                note(&mut returned, message);
                Ok(())
            }
            Ok(Ok(Confirmation::Nack(message))) => {
                note(&mut returned, message);
                Err(Error::new(ErrorKind::Unavailable, "the broker could not store the event"))
            }
            Ok(Ok(Confirmation::NotRequested)) => Err(unknown()),
            Ok(Err(error)) => Err(unknown().caused_by(failed(error))),
            Err(_) => Err(unknown()),
        };
        is_whole &= outcome.as_ref().is_ok();
        confirmed.push((batch, at, partition, outcome));
    }
    for ((exchange, number), why) in &mut returned {
        // It was deleted, or its node is just coming up.
        let is_there = streams::exists(&store.wires, &names::stream(exchange, number)).await;
        *why = Some(match is_there {
            Ok(false) => Error::not_found("no stream takes the events of this partition"),
            _ => Error::new(ErrorKind::Unavailable, "the stream of this partition takes no events now"),
        });
    }
    for (number, at, partition, outcome) in confirmed {
        let (Some(batch), Some(slot)) =
            (batches.get(number), outcomes.get_mut(number).and_then(|outcomes| outcomes.get_mut(at)))
        else {
            continue;
        };
        let place = (batch.topic.to_string(), partition.to_string());
        *slot = Some(match outcome {
            Ok(()) => match returned.get(&place) {
                Some(why) => Err(why.as_ref().map_or_else(unknown, Error::duplicate)),
                None => Ok(Receipt::new(PartitionId(partition), None)),
            },
            Err(error) => Err(error),
        });
    }
    is_whole
}
