//! The runs of an event in its lane.

use std::hash::{Hash, Hasher};
use std::sync::atomic::Ordering as Atomic;

use tokio::time::Instant;
use tracing::Instrument;

use super::super::layers::breaker::Pass;
use super::super::layers::limit::limited;
use super::super::layers::metrics::Meters;
use super::super::layers::trace::{self, Hop};
use super::super::outputs;
use super::super::parked::Place;
use super::super::subscribed::Subscribed;
use super::Claim;
use super::parked::{Note, note};
use crate::envelope::Envelope;
use crate::extract::Context;
use crate::failure::Failure;
use crate::outcome::{IntoOutcome, Outcome};
use crate::service::BoundRoute;

/// How the runs in a lane ended.
pub(super) enum Ended {
    Done,
    Failed(Failure),
    /// The driver stops, or the partition is gone: its next owner runs the event.
    Stopped,
}

/// Runs an event in its lane, briefly again after transient failures.
pub(super) async fn run(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    in_lane: u32,
    claim: Claim<'_>,
    mut begins: Option<(&Place, u32)>,
) -> Ended {
    let mut runs = 1;
    loop {
        while let Some(wait) = subscribed.rate.take() {
            if !claim.sleep(subscribed, wait).await {
                return Ended::Stopped;
            }
        }
        let pass = subscribed.breaker.admit().await;
        if pass == Pass::Stopped || !claim.holds(subscribed) {
            // The partition may have moved while this waited: its next owner runs the event.
            subscribed.breaker.undecided(pass);
            return Ended::Stopped;
        }
        // Only now: a run that the breaker or the rate held back never began.
        if let Some((place, attempts)) = begins.take() {
            let begin = Note::Attempt { attempts, due: None, held: false };
            if !note(subscribed, place, claim, context.envelope.id(), begin).await {
                subscribed.breaker.undecided(pass);
                return Ended::Stopped;
            }
        }
        let (started, hop) = (Meters::clock(), Hop::begin(context));
        let outcome = run_once(subscribed, route, context, hop).await;
        let Some(failure) = conclude(subscribed, route, context, outcome, hop, started).await else {
            return Ended::Done;
        };
        if failure.is_of_a_dependency() {
            if subscribed.breaker.failed(pass, identity(&context.envelope)) {
                if pass == Pass::Probe {
                    // It goes back, counted, so that the next probe is another event.
                    return Ended::Failed(failure);
                }
                // Down for everybody: it waits here for a probe to succeed, and no attempt is used up.
                continue;
            }
        } else {
            subscribed.breaker.undecided(pass);
        }
        if !failure.may_pass_at_once() || runs >= in_lane {
            return Ended::Failed(failure);
        }
        runs += 1;
        tokio::time::sleep(subscribed.policy.retry.in_lane_pause.mul_f64(fastrand::f64())).await;
    }
}

/// Ends a run: publishes what it emitted, or commits it with its unit of work; and books how it ended. Returns why it
/// failed, if it did.
pub(super) async fn conclude(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    outcome: Outcome,
    hop: Option<Hop>,
    started: Option<Instant>,
) -> Option<Failure> {
    let Outcome { verdict, outputs, is_duplicate } = outcome;
    let n_sent = outputs.len();
    let failure = match (verdict, context.take_unit()) {
        (Ok(()), None) if n_sent == 0 => None,
        (Ok(()), None) => {
            let sent = outputs::publish(subscribed, route, context, outputs, hop).await;
            sent.err().map(Failure::from)
        }
        (Ok(()), Some(unit)) => match outputs::complete(subscribed, route, context, outputs, hop).await {
            Ok(outputs) => unit.commit(outputs).await.err(),
            Err(error) => {
                unit.abandon().await;
                Some(error.into())
            }
        },
        (Err(failure), unit) => {
            if let Some(unit) = unit {
                unit.abandon().await;
            }
            Some(failure)
        }
    };
    let done = Booked { failure: failure.as_ref(), n_sent, is_duplicate };
    book(subscribed, route, context, &done, started);
    failure
}

/// How a run ended.
pub(super) struct Booked<'a> {
    pub(super) failure: Option<&'a Failure>,
    pub(super) n_sent: usize,
    pub(super) is_duplicate: bool,
}

/// Books how a run ended.
pub(super) fn book(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    run: &Booked<'_>,
    started: Option<Instant>,
) {
    let class = run.failure.map(Failure::class);
    if let Some(started) = started {
        let n_sent = if class.is_none() { run.n_sent } else { 0 };
        subscribed.meters.ran(route.name, started.elapsed(), class, n_sent);
    }
    if run.failure.is_none() {
        subscribed.breaker.succeeded();
        let counters = &subscribed.counters;
        let counter = if run.is_duplicate { &counters.duplicates } else { &counters.handled };
        counter.fetch_add(1, Atomic::Relaxed);
        if run.is_duplicate {
            let id = context.envelope().id();
            tracing::debug!(topic = %subscribed.topic, handler = route.name, %id, "handled before: passed over");
        }
    }
    if let Some(observer) = &subscribed.observer {
        observer.ran(route.name, context, run.failure);
    }
}

/// What makes two failing events different ones for the breaker: the key, or the id where there is none.
pub(super) fn identity(envelope: &Envelope) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    match envelope.key() {
        Some(key) => key.as_bytes().hash(&mut hasher),
        None => envelope.id().hash(&mut hasher),
    }
    hasher.finish()
}

/// Runs the handler within its bounds.
async fn run_once(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    hop: Option<Hop>,
) -> Outcome {
    let span = trace::span(subscribed, route.name, context, hop);
    let ran = limited(subscribed.policy.timeout, route.call(context)).instrument(span).await;
    ran.unwrap_or_else(Failure::into_outcome)
}
