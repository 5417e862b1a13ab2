//! The loops: intake, workers, settling, renewing.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::breaker::Pass;
use super::dead_letter;
use super::subscribed::Subscribed;
use crate::envelope::{Envelope, extension};
use crate::error::{Class, Error, ErrorKind, Result};
use crate::extract::Context;
use crate::failure::Failure;
use crate::header::Headers;
use crate::id::EventId;
use crate::name::Topic;
use crate::outcome::{IntoOutcome, Outcome, Output};
use crate::partition::PartitionId;
use crate::service::BoundRoute;
use crate::transport::{Content, Delivery, Polled, Settle, Token};

/// No drain takes longer, whatever is asked for.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);
/// Outcomes settled in one call.
const SETTLE_BATCH: usize = 256;
/// Pause after a failure of the transport itself, and its longest.
const PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(5);

type Settling = mpsc::Sender<(Token, Settle)>;

/// Runs one subscription until it is stopped, then drains it.
pub(super) async fn run(
    subscribed: Arc<Subscribed>,
    mut stop: watch::Receiver<bool>,
    drain_within: Duration,
) -> Result<()> {
    let (settling, outcomes) = mpsc::channel(subscribed.policy.window.get());
    // Dropped with this future, so that an aborted driver leaves no task behind.
    let mut workers = JoinSet::new();
    for _ in 0..subscribed.policy.lanes.get() {
        workers.spawn(work(subscribed.clone(), settling.clone()));
    }
    let returning = settling;
    let mut settler = JoinSet::new();
    settler.spawn(settle(subscribed.clone(), outcomes));
    let mut renewing = JoinSet::new();
    if let Some(every) = subscribed.renew_every {
        renewing.spawn(renew(subscribed.clone(), every));
    }
    let ended = intake(&subscribed, &returning, &mut stop).await;
    drop(returning);
    if let Err(error) = &ended {
        tracing::error!(%error, topic = %subscribed.topic, group = %subscribed.group, "the subscription ended");
    }
    let deadline = Instant::now() + drain_within.min(LONGEST_DRAIN);
    // What has not begun goes back: it is delivered to whoever comes next.
    let waiting = subscribed.lanes.take_waiting();
    subscribed.strike(waiting.iter().map(|delivery| delivery.token));
    subscribed.lanes.close();
    subscribed.breaker.stop();
    let finished = async { while workers.join_next().await.is_some() {} };
    let drained = tokio::time::timeout_at(deadline, finished).await;
    // The workers' ends are gone: the settler finishes what was sent and stops.
    let settled =
        async { while !subscribed.books.lock().is_empty() && settler.join_next().await.is_some() {} };
    let settled = match drained {
        Ok(()) => tokio::time::timeout_at(deadline, settled).await.map_err(drop),
        Err(_) => Err(()),
    };
    let closed = subscribed.consumer.close((deadline + PAUSE).into_std()).await;
    ended?;
    match settled {
        Ok(()) => closed,
        Err(()) => {
            Err(Error::new(ErrorKind::Timeout, "handlers were still running when the time to drain was over")
                .with("topic", &subscribed.topic)
                .with("group", &subscribed.group))
        }
    }
}

async fn intake(
    subscribed: &Subscribed,
    returning: &Settling,
    stop: &mut watch::Receiver<bool>,
) -> Result<()> {
    let mut pause = PAUSE;
    let mut leaving: BTreeSet<PartitionId> = BTreeSet::new();
    loop {
        let polled = tokio::select! {
            biased;
            () = async { drop(stop.wait_for(|stop| *stop).await) } => return Ok(()),
            () = emptied(subscribed, &leaving), if !leaving.is_empty() => {
                let ready = free(subscribed, &leaving);
                match subscribed.consumer.release(&ready).await {
                    Ok(()) => {
                        subscribed.lanes.forget(&ready);
                        leaving.retain(|partition| !ready.contains(partition));
                    }
                    Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
                    Err(error) => {
                        // At the deadline they are taken all the same.
                        tracing::warn!(%error, topic = %subscribed.topic, "partitions could not be released; trying again");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                continue;
            }
            polled = subscribed.consumer.poll(subscribed.policy.window) => polled,
        };
        subscribed.polling_fails.store(polled.is_err(), Atomic::Relaxed);
        match polled {
            Ok(Polled::Deliveries(deliveries)) => {
                pause = PAUSE;
                subscribed.take(&deliveries);
                add(subscribed, returning, deliveries).await;
            }
            Ok(Polled::Assigned(partitions)) => {
                subscribed.lanes.forget(&partitions);
                leaving.retain(|partition| !partitions.contains(partition));
            }
            Ok(Polled::Revoking { partitions, .. }) => {
                let waiting = subscribed.lanes.take_waiting();
                let (gone, kept): (Vec<_>, Vec<_>) =
                    waiting.into_iter().partition(|d| partitions.contains(&d.partition));
                subscribed.strike(gone.iter().map(|delivery| delivery.token));
                add(subscribed, returning, kept).await;
                subscribed.lanes.forget(&partitions);
                leaving.extend(partitions);
            }
            Ok(Polled::Lost(partitions)) => {
                let lost: Vec<_> = {
                    let books = subscribed.books.lock();
                    books.iter().filter(|(_, of)| partitions.contains(of)).map(|(token, _)| *token).collect()
                };
                subscribed.strike(lost.into_iter());
                subscribed.lanes.forget(&partitions);
                leaving.retain(|partition| !partitions.contains(partition));
            }
            Ok(Polled::Closed) => return Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Closed) => {
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(%error, topic = %subscribed.topic, group = %subscribed.group, "polling failed");
                // A hole in the history is reported once, and the next poll goes on behind it.
                if !matches!(error.kind(), ErrorKind::DataLoss { .. }) {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }
}

/// Partitions that are to move and of which nothing is in hand.
fn free(subscribed: &Subscribed, leaving: &BTreeSet<PartitionId>) -> Vec<PartitionId> {
    let books = subscribed.books.lock();
    leaving.iter().copied().filter(|partition| !books.values().any(|held| held == partition)).collect()
}

async fn emptied(subscribed: &Subscribed, leaving: &BTreeSet<PartitionId>) {
    loop {
        let mut settled = std::pin::pin!(subscribed.settled.notified());
        settled.as_mut().enable();
        if !free(subscribed, leaving).is_empty() {
            return;
        }
        settled.await;
    }
}

/// Puts deliveries into their lanes; those that came too early go back.
async fn add(subscribed: &Subscribed, returning: &Settling, deliveries: Vec<Delivery>) {
    for token in subscribed.lanes.add(deliveries) {
        // Nobody receives any more only when the driver ends, and then everything is redelivered.
        if returning.send((token, Settle::Return)).await.is_err() {
            return;
        }
    }
}

/// One worker: takes a free lane, runs its deliveries in order.
async fn work(subscribed: Arc<Subscribed>, settling: Settling) {
    while let Some((lane, delivery)) = subscribed.lanes.next().await {
        let mut next = Some(delivery);
        while let Some(delivery) = next {
            // A partition that was lost while this waited: the next owner runs it.
            if subscribed.holds(delivery.token) {
                let (token, partition, offset) = (delivery.token, delivery.partition, delivery.offset);
                let how = handle(&subscribed, delivery).await;
                let behind = match how {
                    Settle::Retry { .. } if subscribed.ordered => {
                        subscribed.lanes.pause(&lane, partition, offset)
                    }
                    _ => VecDeque::new(),
                };
                // A lost partition is struck from the books before its pauses are forgotten: whoever
                // comes second here undoes the pause.
                if !subscribed.holds(token) {
                    subscribed.lanes.unpause(&lane);
                }
                // The event first: what is returned after it then waits behind it.
                let followers = behind.into_iter().map(|follower| (follower.token, Settle::Return));
                for outcome in std::iter::once((token, how)).chain(followers) {
                    if settling.send(outcome).await.is_err() {
                        return;
                    }
                }
            }
            next = subscribed.lanes.done(&lane);
        }
    }
}

async fn settle(subscribed: Arc<Subscribed>, mut outcomes: mpsc::Receiver<(Token, Settle)>) {
    let mut batch = Vec::with_capacity(SETTLE_BATCH);
    while outcomes.recv_many(&mut batch, SETTLE_BATCH).await > 0 {
        let mut pause = PAUSE;
        loop {
            match subscribed.consumer.settle(&batch).await {
                Ok(settled) => {
                    if !settled.lost.is_empty() {
                        tracing::warn!(n = settled.lost.len(), topic = %subscribed.topic, "deliveries were lost before their settle; they run again");
                    }
                    break;
                }
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%error, topic = %subscribed.topic, "settling failed; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
                Err(error) => {
                    tracing::error!(%error, topic = %subscribed.topic, "settling failed");
                    break;
                }
            }
        }
        subscribed.strike(batch.drain(..).map(|(token, _)| token));
    }
}

async fn renew(subscribed: Arc<Subscribed>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let tokens: Vec<Token> = subscribed.books.lock().keys().copied().collect();
        if tokens.is_empty() {
            continue;
        }
        if let Err(error) = subscribed.consumer.renew(&tokens, subscribed.lease).await {
            tracing::warn!(%error, topic = %subscribed.topic, "leases could not be renewed");
        }
    }
}

/// Handles one delivery to its end: effect, outputs, or dead letter. Returns how it is settled.
async fn handle(subscribed: &Subscribed, delivery: Delivery) -> Settle {
    let envelope = match &delivery.content {
        Content::Envelope(envelope) => envelope.clone(),
        Content::Undecodable(bad) => {
            let failure = Failure::poison("undecodable", &bad.reason);
            return bury(subscribed, &delivery, "", &failure).await;
        }
    };
    let Some(route) = subscribed.route(&envelope) else {
        subscribed.counters.unknown.fetch_add(1, Atomic::Relaxed);
        return Settle::Ack;
    };
    let context =
        Context { topic: subscribed.topic.clone(), group: subscribed.group.clone(), delivery, envelope };
    let retry = subscribed.policy.retry;
    let mut runs = 1;
    let failure = loop {
        let pass = subscribed.breaker.admit().await;
        if pass == Pass::Stopped || !subscribed.holds(context.delivery.token) {
            // The partition may have moved while this waited: its next owner runs the event.
            subscribed.breaker.undecided(pass);
            return Settle::Return;
        }
        let outcome = run_once(subscribed, route, &context).await;
        let failure = match outcome.verdict {
            Ok(()) => match publish(subscribed, route, &context, outcome.outputs).await {
                Ok(()) => {
                    subscribed.breaker.succeeded();
                    subscribed.counters.handled.fetch_add(1, Atomic::Relaxed);
                    return Settle::Ack;
                }
                Err(error) => Failure::from(error),
            },
            Err(failure) => failure,
        };
        if failure.is_of_a_dependency() {
            if subscribed.breaker.failed(pass, identity(&context.envelope)) {
                if pass == Pass::Probe {
                    // It goes back, counted, so that the next probe is another event.
                    break failure;
                }
                // Down for everybody: it waits here for a probe to succeed, and no attempt is used up.
                continue;
            }
        } else {
            subscribed.breaker.undecided(pass);
        }
        if failure.class() != Class::Transient || failure.delay().is_some() || runs >= retry.in_lane.get() {
            break failure;
        }
        runs += 1;
        tokio::time::sleep(retry.in_lane_pause.mul_f64(fastrand::f64())).await;
    };
    let attempt = context.delivery.attempt.map_or(1, u32::from);
    if failure.class() == Class::Transient && attempt < retry.attempts.get() {
        subscribed.counters.retried.fetch_add(1, Atomic::Relaxed);
        tracing::debug!(%failure, attempt, topic = %subscribed.topic, handler = route.name, "handed back");
        let after = failure.delay().unwrap_or_else(|| retry.delay(attempt, fastrand::f64()));
        return Settle::Retry { after: Some(after) };
    }
    bury(subscribed, &context.delivery, route.name, &failure).await
}

/// What makes two failing events different ones for the breaker: the key, or the id where there is none.
fn identity(envelope: &Envelope) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    match envelope.key() {
        Some(key) => key.as_bytes().hash(&mut hasher),
        None => envelope.id().hash(&mut hasher),
    }
    hasher.finish()
}

/// Runs the handler; a panic or an overrun is a failure like any other.
async fn run_once(subscribed: &Subscribed, route: &BoundRoute, context: &Context) -> Outcome {
    let mut running = route.handler.call(context);
    let caught = std::future::poll_fn(|task| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(task))) {
            Ok(poll) => poll,
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                std::task::Poll::Ready(Failure::panic(text).into_outcome())
            }
        }
    });
    match subscribed.policy.timeout {
        None => caught.await,
        Some(limit) => tokio::time::timeout(limit, caught).await.unwrap_or_else(|_| {
            Failure::transient("timeout", format_args!("not done after {limit:?}")).into_outcome()
        }),
    }
}

/// Publishes what a handler emitted, in order, and waits until all of it is confirmed.
async fn publish(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    outputs: Vec<Output>,
) -> Result<()> {
    let mut confirms = Vec::with_capacity(outputs.len());
    for (at, output) in outputs.into_iter().enumerate() {
        let topic: &Topic = match (&output.topic, &route.emit_to) {
            (Some(topic), _) | (None, Some(topic)) => topic,
            (None, None) => {
                return Err(Error::config("the route emits events and names no topic: add .emit_to(topic)")
                    .with("handler", route.name));
            }
        };
        let envelope = complete(subscribed, route, context, output.envelope, output.id, at);
        confirms.push(subscribed.publisher.enqueue(topic, vec![envelope]).await?);
    }
    for confirm in confirms {
        confirm.await.all()?;
    }
    Ok(())
}

/// Gives an output its id, source, cause and conversation.
fn complete(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    envelope: Envelope,
    id: Option<EventId>,
    at: usize,
) -> Envelope {
    let cause = context.envelope.id();
    let id =
        id.unwrap_or_else(|| EventId::derive(cause, &format!("{}/{}/{at}", subscribed.group, route.name)));
    let conversation = context
        .envelope
        .extension(extension::CORRELATION_ID)
        .map_or_else(|| cause.to_string(), str::to_owned);
    // The origin of the journey is never rewritten (W3C trace context as a CloudEvents extension).
    let journey = [extension::TRACE_PARENT, extension::TRACE_STATE];
    let envelope =
        journey.into_iter().fold(envelope, |envelope, name| match context.envelope.extension(name) {
            Some(value) if envelope.extension(name).is_none() => envelope.with_extension(name, value),
            _ => envelope,
        });
    envelope
        .with_id(id)
        .with_source(subscribed.source.clone())
        .with_time(SystemTime::now())
        .with_extension(extension::CORRELATION_ID, conversation)
        .with_extension(extension::CAUSATION_ID, cause.to_string())
}

/// Dead-letters a delivery. Only a confirmed letter lets the source be settled.
async fn bury(subscribed: &Subscribed, delivery: &Delivery, handler: &str, failure: &Failure) -> Settle {
    let letter = dead_letter::letter(delivery, &subscribed.topic, &subscribed.group, handler, failure);
    tracing::warn!(%failure, topic = %subscribed.topic, group = %subscribed.group, handler, id = %letter.id(), "dead-lettered");
    let stored = match store_letter(subscribed, letter.clone()).await {
        // With its marks it is above the limit. What was read stays in its topic, at the place that
        // the letter names.
        Err(error) if matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::Invalid) => {
            let slim = letter.without_payload().with_headers(Headers::new());
            store_letter(subscribed, slim.with_extension("evt-dlq-body", "omitted")).await
        }
        stored => stored,
    };
    match stored {
        Ok(()) => {
            subscribed.counters.dead_lettered.fetch_add(1, Atomic::Relaxed);
            Settle::Ack
        }
        Err(error) => {
            tracing::error!(%error, topic = %subscribed.dead_letters, "the dead letter could not be stored; the event stays");
            Settle::Retry { after: Some(subscribed.policy.retry.base) }
        }
    }
}

async fn store_letter(subscribed: &Subscribed, letter: Envelope) -> Result<()> {
    let confirm = subscribed.publisher.enqueue(&subscribed.dead_letters, vec![letter]).await?;
    confirm.await.single().map(drop)
}
