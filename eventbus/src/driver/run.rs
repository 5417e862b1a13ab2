//! The loops: intake, workers, settling, renewing.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::handle;
use super::lanes::{Lane, Work};
use super::layers::metrics::Meters;
use super::subscribed::Subscribed;
use super::{MAX_PAUSE, PAUSE};
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;
use crate::transport::{Delivery, Polled, Settle, Token};

/// No drain takes longer, whatever is asked for.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);
/// Outcomes settled in one call.
const SETTLE_BATCH: usize = 256;

/// How often gauges are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(1);

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
    let mut parking = JoinSet::new();
    if Meters::ARE_ON {
        parking.spawn(report(subscribed.clone()));
    }
    parking.spawn(heads(subscribed.clone()));
    parking.spawn(keep_parked(subscribed.clone()));
    let ended = intake(&subscribed, &returning, &mut stop).await;
    drop((returning, parking));
    if let Err(error) = &ended {
        tracing::error!(%error, topic = %subscribed.topic, group = %subscribed.group, "the subscription ended");
    }
    let deadline = Instant::now() + drain_within.min(LONGEST_DRAIN);
    // What has not begun goes back: it is delivered to whoever comes next.
    let waiting = subscribed.deliveries(subscribed.lanes.take_waiting());
    subscribed.strike(waiting.iter().map(|delivery| delivery.token));
    subscribed.lanes.close();
    subscribed.breaker.stop();
    subscribed.stop();
    let finished = async { while workers.join_next().await.is_some() {} };
    let drained = tokio::time::timeout_at(deadline, finished).await;
    // The workers' ends are gone: the settler finishes what was sent and stops.
    let settled =
        async { while !subscribed.books.lock().is_empty() && settler.join_next().await.is_some() {} };
    let settled = match drained {
        Ok(()) => tokio::time::timeout_at(deadline, settled).await.map_err(drop),
        Err(_) => Err(()),
    };
    if let (Some(parked), Ok(())) = (&subscribed.parked, &settled) {
        drop(tokio::time::timeout_at(deadline + PAUSE, parked.close()).await);
    }
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
                if let Some(parked) = &subscribed.parked {
                    parked.release(&ready).await;
                }
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
                let of = deliveries.iter().map(|delivery| delivery.partition);
                if !gain(subscribed, of.collect(), stop).await? {
                    return Ok(());
                }
                add(subscribed, returning, deliveries).await;
            }
            Ok(Polled::Assigned(partitions)) => {
                subscribed.lanes.forget(&partitions);
                leaving.retain(|partition| !partitions.contains(partition));
                if !gain(subscribed, partitions.into_iter().collect(), stop).await? {
                    return Ok(());
                }
            }
            Ok(Polled::Revoking { partitions, .. }) => {
                if let Some(parked) = &subscribed.parked {
                    parked.leave(&partitions);
                }
                let waiting = subscribed.deliveries(subscribed.lanes.take_waiting());
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
                if let Some(parked) = &subscribed.parked {
                    parked.lose(&partitions);
                }
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
    let idle = |partition: PartitionId| {
        subscribed.parked.as_ref().is_none_or(|parked| parked.is_idle(partition))
            && !books.values().any(|held| *held == partition)
    };
    leaving.iter().copied().filter(|partition| idle(*partition)).collect()
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

/// Loads what is parked of partitions before anything of them runs. Returns whether to go on.
async fn gain(
    subscribed: &Subscribed,
    partitions: BTreeSet<PartitionId>,
    stop: &mut watch::Receiver<bool>,
) -> Result<bool> {
    let Some(parked) = &subscribed.parked else { return Ok(true) };
    let mut pause = PAUSE;
    while parked.lacks(partitions.iter().copied()) {
        let partitions: Vec<_> = partitions.iter().copied().collect();
        let gained = tokio::select! {
            biased;
            () = async { drop(stop.wait_for(|stop| *stop).await) } => return Ok(false),
            gained = parked.gain(&partitions) => gained,
        };
        if let Err(error) = gained {
            if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::DataLoss { .. }) {
                // Trying again mends nothing: the subscription ends, and says why.
                return Err(error);
            }
            subscribed.polling_fails.store(true, Atomic::Relaxed);
            tracing::warn!(%error, topic = %subscribed.topic, group = %subscribed.group, "what is parked could not be loaded; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }
    Ok(true)
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

/// One worker: takes a free lane, runs what it holds in order.
async fn work(subscribed: Arc<Subscribed>, settling: Settling) {
    while let Some((lane, work)) = subscribed.lanes.next().await {
        let mut next = Some(work);
        while let Some(work) = next {
            match work {
                Work::Delivery(delivery) => {
                    let max = subscribed.batch_of(&delivery);
                    let more = max.map_or(Vec::new(), |max| {
                        subscribed.lanes.take_more(max, |other| subscribed.go_together(&delivery, other))
                    });
                    let others: Vec<Lane> = more.iter().map(|(lane, _)| *lane).collect();
                    let goes_on = if max.is_some() {
                        let all = std::iter::once((lane, delivery)).chain(more).collect();
                        deliver_batch(&subscribed, &settling, all).await
                    } else {
                        deliver(&subscribed, &settling, &lane, delivery).await
                    };
                    if !goes_on {
                        return;
                    }
                    others.iter().for_each(|lane| subscribed.lanes.pass_on(lane));
                }
                Work::Head(head) => {
                    if let Some(parked) = &subscribed.parked {
                        handle::head(&subscribed, parked, &head).await;
                    }
                }
            }
            next = subscribed.lanes.done(&lane);
        }
    }
}

/// Handles a delivery and sends how it is settled. Returns whether anybody listens.
async fn deliver(subscribed: &Subscribed, settling: &Settling, lane: &Lane, delivery: Delivery) -> bool {
    // A partition that was lost while this waited: the next owner runs it.
    if !subscribed.holds(delivery.token) {
        return true;
    }
    let place = (delivery.token, delivery.partition, delivery.offset);
    let how = handle::delivery(subscribed, delivery).await;
    send(subscribed, settling, lane, place, how).await
}

/// Handles deliveries of different lanes in one call, and sends how each is settled.
async fn deliver_batch(
    subscribed: &Subscribed,
    settling: &Settling,
    mut batch: Vec<(Lane, Delivery)>,
) -> bool {
    batch.retain(|(_, delivery)| subscribed.holds(delivery.token));
    let places: Vec<_> = batch.iter().map(|(lane, d)| (*lane, (d.token, d.partition, d.offset))).collect();
    let deliveries = batch.into_iter().map(|(_, delivery)| delivery).collect();
    let settles = handle::batch(subscribed, deliveries).await;
    for ((lane, place), how) in places.into_iter().zip(settles) {
        if !send(subscribed, settling, &lane, place, how).await {
            return false;
        }
    }
    true
}

/// Sends how a delivery is settled, and what of its lane goes back with it.
async fn send(
    subscribed: &Subscribed,
    settling: &Settling,
    lane: &Lane,
    (token, partition, offset): (Token, PartitionId, Option<Offset>),
    how: Settle,
) -> bool {
    let behind = match how {
        Settle::Retry { .. } | Settle::Return if subscribed.ordered => {
            subscribed.lanes.pause(lane, partition, offset)
        }
        _ => VecDeque::new(),
    };
    // A lost partition is struck from the books before its pauses are forgotten: whoever comes second
    // here undoes the pause.
    if !subscribed.holds(token) {
        subscribed.lanes.unpause(lane);
    }
    // The event first: what is returned after it then waits behind it.
    let followers =
        subscribed.deliveries(behind).into_iter().map(|follower| (follower.token, Settle::Return));
    for outcome in std::iter::once((token, how)).chain(followers) {
        if settling.send(outcome).await.is_err() {
            return false;
        }
    }
    true
}

/// Brings parked events that are due to their lanes.
async fn heads(subscribed: Arc<Subscribed>) {
    if let Some(parked) = &subscribed.parked {
        loop {
            subscribed.lanes.add_head(parked.next_head().await);
        }
    }
}

/// Tells the state that changes without an event.
async fn report(subscribed: Arc<Subscribed>) {
    loop {
        subscribed.meters.state(subscribed.counts().held, subscribed.breaker.is_open());
        tokio::time::sleep(REPORT_EVERY).await;
    }
}

/// Reads what others append to the parking log.
async fn keep_parked(subscribed: Arc<Subscribed>) {
    if let Some(parked) = &subscribed.parked {
        parked.keep().await;
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
