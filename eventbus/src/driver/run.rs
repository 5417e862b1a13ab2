//! The loops: intake, workers, settling, renewing.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::handle;
use super::lanes::{Handed, Lane, Work};
use super::layers::metrics::Meters;
use super::silence;
use super::subscribed::Subscribed;
use super::{MAX_PAUSE, PAUSE};
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;
use crate::transport::{Consumer, Delivery, Polled, Settle, Token};

/// No drain takes longer, whatever is asked for.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);
/// How often gauges are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Runs one subscription until it is stopped, then drains it.
pub(super) async fn run(
    subscribed: Arc<Subscribed>,
    mut stop: watch::Receiver<bool>,
    drain_within: Duration,
) -> Result<()> {
    // Dropped with this future, so that an aborted driver leaves no task behind.
    let mut workers = JoinSet::new();
    for _ in 0..subscribed.policy.lanes.get() {
        workers.spawn(work(subscribed.clone()));
    }
    let mut settler = JoinSet::new();
    settler.spawn(settle(subscribed.clone()));
    let mut renewing = JoinSet::new();
    if let Some(every) = subscribed.renew_every {
        renewing.spawn(renew(subscribed.clone(), every));
    }
    let mut others = JoinSet::new();
    if Meters::ARE_ON {
        others.spawn(report(subscribed.clone()));
    }
    let watched = subscribed.clone();
    others.spawn(async move { silence::watch(&watched).await });
    others.spawn(heads(subscribed.clone()));
    others.spawn(keep_parked(subscribed.clone()));
    let ended = intake(&subscribed, &mut stop).await;
    drop(others);
    if let Err(error) = &ended {
        tracing::error!(%error, topic = %subscribed.topic, group = %subscribed.group, "the subscription ended");
    }
    let deadline = Instant::now() + drain_within.min(LONGEST_DRAIN);
    // What has not begun goes back: it is delivered to whoever comes next.
    let waiting = subscribed.deliveries(subscribed.lanes.take_waiting());
    subscribed.lose(waiting.iter().map(|delivery| delivery.token));
    subscribed.lanes.close();
    subscribed.breaker.stop();
    subscribed.stop();
    let finished = async { while workers.join_next().await.is_some() {} };
    let drained = tokio::time::timeout_at(deadline, finished).await;
    // The settler finishes what was sent and stops.
    subscribed.settling.close();
    let settled = async { while !subscribed.books.is_empty() && settler.join_next().await.is_some() {} };
    let settled = match drained {
        Ok(()) => tokio::time::timeout_at(deadline, settled).await.map_err(drop),
        Err(_) => Err(()),
    };
    if let (Some(parked), Ok(())) = (&subscribed.parked, &settled) {
        drop(tokio::time::timeout_at(deadline + PAUSE, parked.close()).await);
    }
    let closed = subscribed.consumer().close((deadline + PAUSE).into_std()).await;
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

/// Waits until the transport answers again: one that is back and has nothing new says nothing to a poll.
async fn answers(subscribed: &Subscribed) {
    let Some(admin) = subscribed.transport.admin() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(MAX_PAUSE).await;
        if admin.topic(&subscribed.topic).await.is_ok() {
            return;
        }
    }
}

async fn intake(subscribed: &Subscribed, stop: &mut watch::Receiver<bool>) -> Result<()> {
    let mut pause = PAUSE;
    let mut leaving: BTreeSet<PartitionId> = BTreeSet::new();
    // Whether the last poll failed in a way that passes.
    let mut is_away = false;
    loop {
        let (consumer, poll) = (subscribed.consumer(), subscribed.lanes.poll_begins());
        let polling = consumer.poll(subscribed.policy.window);
        let polled = tokio::select! {
            biased;
            () = async { drop(stop.wait_for(|stop| *stop).await) } => return Ok(()),
            () = emptied(subscribed, &leaving), if !leaving.is_empty() => {
                let ready = free(subscribed, &leaving);
                if let Some(parked) = &subscribed.parked {
                    parked.release(&ready).await;
                }
                match consumer.release(&ready).await {
                    Ok(()) => {
                        subscribed.lanes.forget(&ready);
                        subscribed.silence.left(&ready);
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
            () = subscribed.silence.broken() => {
                leaving.clear();
                if !rejoin(subscribed, &*consumer, stop).await? {
                    return Ok(());
                }
                continue;
            }
            polled = polling => polled,
            () = answers(subscribed), if is_away => {
                is_away = false;
                subscribed.polling_fails.store(false, Atomic::Relaxed);
                continue;
            }
        };
        is_away = polled.as_ref().is_err_and(Error::is_retryable);
        subscribed.polling_fails.store(polled.is_err(), Atomic::Relaxed);
        match polled {
            Ok(Polled::Deliveries(deliveries)) => {
                pause = PAUSE;
                subscribed.take(&deliveries);
                let of = deliveries.iter().map(|delivery| delivery.partition);
                if !gain(subscribed, of.collect(), stop).await? {
                    return Ok(());
                }
                add(subscribed, deliveries, poll);
            }
            Ok(Polled::Assigned(partitions)) => {
                subscribed.lanes.forget(&partitions);
                subscribed.silence.gained(&partitions);
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
                subscribed.lose(gone.iter().map(|delivery| delivery.token));
                // They came before whatever was handed back meanwhile.
                add(subscribed, kept, 0);
                subscribed.lanes.forget(&partitions);
                leaving.extend(partitions);
            }
            Ok(Polled::Lost(partitions)) => {
                lose(subscribed, &partitions);
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

/// Forgets partitions that are no longer ours, and what is in hand of them.
fn lose(subscribed: &Subscribed, partitions: &[PartitionId]) {
    subscribed.lose(subscribed.books.of(partitions).into_iter());
    subscribed.lanes.forget(partitions);
    subscribed.silence.left(partitions);
    if let Some(parked) = &subscribed.parked {
        parked.lose(partitions);
    }
}

/// Gives a consumer up and joins the group again. Returns whether to go on.
async fn rejoin(
    subscribed: &Subscribed,
    silent: &dyn Consumer,
    stop: &mut watch::Receiver<bool>,
) -> Result<bool> {
    lose(subscribed, &subscribed.silence.leave_all());
    let joining = async {
        if let Err(error) = silent.close((Instant::now() + MAX_PAUSE).into_std()).await {
            tracing::debug!(%error, topic = %subscribed.topic, "the silent consumer did not leave");
        }
        let mut pause = PAUSE;
        while let Err(error) = subscribed.join_again().await {
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Closed) {
                return Err(error);
            }
            subscribed.polling_fails.store(true, Atomic::Relaxed);
            tracing::warn!(%error, topic = %subscribed.topic, group = %subscribed.group, "joining again failed; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
        Ok(true)
    };
    tokio::select! {
        biased;
        () = async { drop(stop.wait_for(|stop| *stop).await) } => Ok(false),
        joined = joining => joined,
    }
}

/// Partitions that are to move and of which nothing is in hand.
fn free(subscribed: &Subscribed, leaving: &BTreeSet<PartitionId>) -> Vec<PartitionId> {
    let idle = |partition: PartitionId| {
        subscribed.parked.as_ref().is_none_or(|parked| parked.is_idle(partition))
            && !subscribed.books.has_any_of(partition)
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
        // Loading took its time, in which nothing could be heard.
        subscribed.silence.expect_after(Duration::ZERO);
    }
    Ok(true)
}

/// Puts deliveries into their lanes; those that came too early go back.
fn add(subscribed: &Subscribed, deliveries: Vec<Delivery>, poll: u64) {
    let early = subscribed.lanes.add(deliveries, poll);
    if !early.is_empty() {
        subscribed.settling.send(early.into_iter().map(|token| (token, Settle::Return)));
    }
}

/// One worker: takes a free lane, runs what it holds in order.
async fn work(subscribed: Arc<Subscribed>) {
    let mut done = None;
    while let Some((lane, work)) = subscribed.lanes.next(done).await {
        match work {
            Work::Delivery(delivery) => match subscribed.batch_of(&delivery) {
                None => deliver(&subscribed, &lane, delivery).await,
                Some(max) => {
                    let together = |other: &Delivery| subscribed.go_together(&delivery, other);
                    let mut batch = subscribed.lanes.take_more(max, together);
                    let others: Vec<Lane> = batch.iter().map(|(lane, _)| *lane).collect();
                    batch.insert(0, (lane, delivery));
                    deliver_batch(&subscribed, batch).await;
                    others.iter().for_each(|lane| subscribed.lanes.pass_on(lane));
                }
            },
            Work::Head(head) => {
                if let Some(parked) = &subscribed.parked {
                    handle::head(&subscribed, parked, &head).await;
                }
            }
        }
        done = Some(lane);
    }
}

/// Handles a delivery and sends how it is settled.
async fn deliver(subscribed: &Subscribed, lane: &Lane, delivery: Delivery) {
    // A partition that was lost while this waited: the next owner runs it.
    if subscribed.holds(delivery.token) {
        let place = (delivery.token, delivery.partition, delivery.offset);
        let how = handle::delivery(subscribed, delivery).await;
        send(subscribed, lane, place, how);
    }
}

/// Handles deliveries of different lanes in one call, and sends how each is settled.
async fn deliver_batch(subscribed: &Subscribed, mut batch: Vec<(Lane, Delivery)>) {
    batch.retain(|(_, delivery)| subscribed.holds(delivery.token));
    let places: Vec<_> = batch.iter().map(|(lane, d)| (*lane, (d.token, d.partition, d.offset))).collect();
    let deliveries = batch.into_iter().map(|(_, delivery)| delivery).collect();
    let settles = handle::batch(subscribed, deliveries).await;
    for ((lane, place), how) in places.into_iter().zip(settles) {
        send(subscribed, &lane, place, how);
    }
}

/// Sends how a delivery is settled, and what of its lane goes back with it.
fn send(subscribed: &Subscribed, lane: &Lane, handed: Handed, how: Settle) {
    let (token, ..) = handed;
    // One that was lost while it ran is the next owner's. That may be us again: then what waits in the lane was
    // delivered since, and stays.
    let behind = match how {
        Settle::Retry { .. } | Settle::Return if subscribed.ordered && subscribed.holds(token) => {
            subscribed.lanes.pause(lane, handed)
        }
        _ => VecDeque::new(),
    };
    // A lost partition is struck from the books before its pauses are forgotten: whoever comes second
    // here undoes the pause.
    if !subscribed.holds(token) {
        subscribed.lanes.unpause(lane, |token| subscribed.holds(token));
    }
    // The event first: what is returned after it then waits behind it.
    let followers =
        subscribed.deliveries(behind).into_iter().map(|follower| (follower.token, Settle::Return));
    subscribed.settling.send(std::iter::once((token, how)).chain(followers));
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

async fn settle(subscribed: Arc<Subscribed>) {
    let mut batch = Vec::new();
    while subscribed.settling.next(&mut batch).await {
        let mut pause = PAUSE;
        let taken = loop {
            let delay = batch.iter().filter_map(|(_, how)| match how {
                Settle::Retry { after } => *after,
                _ => None,
            });
            if let Some(delay) = delay.max() {
                subscribed.silence.expect_after(delay);
            }
            match subscribed.consumer().settle(&batch).await {
                Ok(settled) => {
                    if !settled.lost.is_empty() {
                        tracing::warn!(n = settled.lost.len(), topic = %subscribed.topic, "deliveries were lost before their settle; they run again");
                    }
                    break true;
                }
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%error, topic = %subscribed.topic, "settling failed; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
                Err(error) => {
                    tracing::error!(%error, topic = %subscribed.topic, "settling failed");
                    break false;
                }
            }
        };
        subscribed.lanes.settled(batch.iter().map(|(token, _)| *token), taken);
        subscribed.strike(batch.drain(..).map(|(token, _)| token));
    }
}

async fn renew(subscribed: Arc<Subscribed>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let tokens: Vec<Token> = subscribed.books.tokens();
        if tokens.is_empty() {
            continue;
        }
        if let Err(error) = subscribed.consumer().renew(&tokens, subscribed.lease).await {
            tracing::warn!(%error, topic = %subscribed.topic, "leases could not be renewed");
        }
    }
}
