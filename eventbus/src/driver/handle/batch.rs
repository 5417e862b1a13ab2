//! Several events in one call of a batch handler.

use tokio::time::Instant;

use super::super::layers::breaker::Pass;
use super::super::layers::limit::limited;
use super::super::layers::metrics::Meters;
use super::super::layers::trace::Hop;
use super::super::outputs;
use super::super::parked::Meets;
use super::super::subscribed::Subscribed;
use super::run::{Booked, book, conclude, identity};
use super::{delivery, fresh, is_redriven};
use crate::envelope::{Envelope, extension};
use crate::extract::Context;
use crate::failure::Failure;
use crate::outcome::Outcome;
use crate::service::{BoundRoute, Handling};
use crate::transport::{Delivery, Settle};
use crate::unit::Unit;

/// How an event of a call ended: handled, or to be run alone after it failed in the call or was not part of it.
type Ended = Result<(), Option<Failure>>;

/// Handles deliveries of different lanes in one call of a batch handler. Returns how each is settled.
///
/// What is anything else than a plain first run is handled alone, and so is what fails.
pub(in crate::driver) async fn batch(subscribed: &Subscribed, deliveries: Vec<Delivery>) -> Vec<Settle> {
    let mut settles = vec![Settle::Return; deliveries.len()];
    let (mut contexts, mut places) = (Vec::new(), Vec::new());
    let mut batch = None;
    for (at, one) in deliveries.into_iter().enumerate() {
        let envelope = one.content.envelope().cloned();
        let plain = envelope.filter(|envelope| is_plain(subscribed, &one, envelope));
        let route = plain.as_ref().and_then(|envelope| subscribed.route(envelope));
        match (route, plain) {
            (Some(route @ BoundRoute { handling: Handling::Batch { handler, .. }, .. }), Some(envelope)) => {
                batch = Some((route, handler));
                contexts.push(subscribed.context(route, one, envelope));
                places.push(at);
            }
            _ => settles[at] = delivery(subscribed, one).await,
        }
    }
    let Some((route, handler)) = batch else { return settles };
    while let Some(wait) = subscribed.rate.take() {
        if !subscribed.sleep(wait).await {
            return settles;
        }
    }
    let pass = subscribed.breaker.admit().await;
    if pass == Pass::Stopped {
        return settles;
    }
    let started = Meters::clock();
    let ran = limited(subscribed.policy.timeout, handler.call(&contexts)).await.and_then(|ran| ran);
    // One by itself ends with its unit as if there were no batch.
    let unit =
        if contexts.len() > 1 || ran.is_err() { contexts.iter().find_map(Context::take_unit) } else { None };
    let ended = match (ran, unit) {
        (Ok(outcomes), None) => Ok(one_by_one(subscribed, route, &contexts, outcomes, started).await),
        (Ok(outcomes), Some(unit)) => together(subscribed, route, &contexts, outcomes, unit, started).await,
        (Err(failure), unit) => {
            if let Some(unit) = unit {
                unit.abandon().await;
            }
            Err(failure)
        }
    };
    let ended = ended.unwrap_or_else(|failure| {
        tracing::debug!(%failure, n = contexts.len(), topic = %subscribed.topic, handler = route.name, "a batch failed; each of it runs alone");
        subscribed.breaker.undecided(pass);
        contexts.iter().map(|_| Err(None)).collect()
    });
    for ((context, at), ended) in contexts.into_iter().zip(places).zip(ended) {
        settles[at] = match ended {
            Ok(()) => Settle::Ack,
            Err(failure) => {
                match &failure {
                    Some(failure) if failure.is_of_a_dependency() => {
                        subscribed.breaker.failed(pass, identity(&context.envelope));
                    }
                    _ => subscribed.breaker.undecided(pass),
                }
                let place = subscribed
                    .parked
                    .as_ref()
                    .map(|parked| (parked, parked.place(context.delivery.partition)));
                match place {
                    None => fresh(subscribed, route, context, None, 0, failure).await,
                    Some((_, None)) => Settle::Return,
                    Some((parked, Some(place))) => {
                        fresh(subscribed, route, context, Some((parked, &place)), 0, failure).await
                    }
                }
            }
        };
    }
    settles
}

/// Ends each event of a call by itself.
async fn one_by_one(
    subscribed: &Subscribed,
    route: &BoundRoute,
    contexts: &[Context],
    outcomes: Vec<Option<Outcome>>,
    started: Option<Instant>,
) -> Vec<Ended> {
    let mut ended = Vec::with_capacity(contexts.len());
    for (context, outcome) in contexts.iter().zip(outcomes) {
        let Some(outcome) = outcome else {
            ended.push(Err(None));
            continue;
        };
        let failure = conclude(subscribed, route, context, outcome, Hop::begin(context), started).await;
        ended.push(failure.map_or(Ok(()), |failure| Err(Some(failure))));
    }
    ended
}

/// Ends the events of a call as one: all of what they did is final, or nothing of it.
async fn together(
    subscribed: &Subscribed,
    route: &BoundRoute,
    contexts: &[Context],
    outcomes: Vec<Option<Outcome>>,
    unit: Box<dyn Unit>,
    started: Option<Instant>,
) -> Result<Vec<Ended>, Failure> {
    let (mut all, mut done) = (Vec::new(), Vec::with_capacity(contexts.len()));
    for (context, outcome) in contexts.iter().zip(outcomes) {
        let Some(Outcome { verdict, outputs, is_duplicate }) = outcome else {
            done.push(None);
            continue;
        };
        done.push(Some((outputs.len(), is_duplicate)));
        let completed = match verdict {
            Ok(()) => outputs::complete(subscribed, route, context, outputs, Hop::begin(context))
                .await
                .map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        match completed {
            Ok(outputs) => all.extend(outputs),
            Err(failure) => {
                unit.abandon().await;
                return Err(failure);
            }
        }
    }
    unit.commit(all).await?;
    let booked = contexts.iter().zip(done).map(|(context, done)| {
        let (n_sent, is_duplicate) = done.ok_or(None)?;
        book(subscribed, route, context, &Booked { failure: None, n_sent, is_duplicate }, started);
        Ok(())
    });
    Ok(booked.collect())
}

/// Whether a delivery is a plain first run: nothing of its key waits, and nobody was cautious about it.
fn is_plain(subscribed: &Subscribed, delivery: &Delivery, envelope: &Envelope) -> bool {
    if envelope.extension(extension::EXPIRY_TIME).is_some() || is_redriven(subscribed, envelope) {
        return false;
    }
    let Some(parked) = &subscribed.parked else { return true };
    parked.place(delivery.partition).is_some_and(|place| {
        let (id, sequence) = (envelope.id(), subscribed.sequence(envelope));
        let meets = place.meets(id, &sequence, delivery.offset.unwrap_or_default());
        meets == Meets::Nothing { begun: 0 } && !place.is_wary()
    })
}
