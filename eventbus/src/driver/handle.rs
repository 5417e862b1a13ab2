//! One event to its end: its run, and what becomes of it when that fails.

use std::hash::{Hash, Hasher};
use std::num::NonZeroU32;
use std::sync::atomic::Ordering as Atomic;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::Instrument;

use super::layers::breaker::Pass;
use super::layers::dead_letter;
use super::layers::limit::limited;
use super::layers::metrics::Meters;
use super::layers::trace::{self, Hop};
use super::outputs;
use super::parked::planted::{Bug, planted};
use super::parked::record::{Parked as ParkedEvent, Sequence};
use super::parked::{Head, Meets, Parked, Place, Waiting};
use super::subscribed::Subscribed;
use super::{MAX_PAUSE, PAUSE};
use crate::envelope::{Envelope, extension};
use crate::error::{Class, ErrorKind, Result};
use crate::extract::Context;
use crate::failure::Failure;
use crate::header::Headers;
use crate::id::EventId;
use crate::outcome::{IntoOutcome, Outcome};
use crate::parking::{Followers, Waits};
use crate::service::{BoundRoute, Handling};
use crate::transport::{Content, Delivery, Settle, Token};

/// How long a parked event waits whose body cannot be read.
const UNREADABLE: Duration = Duration::from_secs(30);

/// What makes an event ours: its delivery, or its place in the parking log.
#[derive(Clone, Copy)]
enum Claim<'a> {
    Delivery(Token),
    Parked(&'a Place),
}

impl Claim<'_> {
    fn holds(self, subscribed: &Subscribed) -> bool {
        match self {
            Self::Delivery(token) => subscribed.holds(token),
            Self::Parked(place) => place.is_ours(),
        }
    }

    /// Waits; returns whether to go on.
    async fn sleep(self, subscribed: &Subscribed, time: Duration) -> bool {
        subscribed.sleep(time).await && self.holds(subscribed)
    }
}

/// A record of the parking log about a run.
#[derive(Clone, Copy)]
enum Note {
    Attempt { attempts: u32, due: Option<SystemTime>, held: bool },
    Done,
}

/// How the runs in a lane ended.
enum Ended {
    Done,
    Failed(Failure),
    /// The driver stops, or the partition is gone: its next owner runs the event.
    Stopped,
}

/// Handles one delivery to its end: effect, outputs, parking or dead letter. Returns how it is settled.
pub(super) async fn delivery(subscribed: &Subscribed, delivery: Delivery) -> Settle {
    let envelope = match &delivery.content {
        Content::Envelope(envelope) => envelope.clone(),
        Content::Undecodable(bad) => {
            let failure = Failure::poison("undecodable", &bad.reason);
            let claim = Claim::Delivery(delivery.token);
            let buried = bury_until(subscribed, &delivery, "", &failure, claim).await;
            return buried.err().unwrap_or(Settle::Ack);
        }
    };
    let Some(route) = subscribed.route(&envelope) else {
        subscribed.counters.unknown.fetch_add(1, Atomic::Relaxed);
        return Settle::Ack;
    };
    let context = subscribed.context(delivery, envelope);
    if subscribed.is_expired(&context.envelope) {
        return Settle::Ack;
    }
    let Some(parked) = &subscribed.parked else {
        return fresh(subscribed, route, context, None, 0, None).await;
    };
    let Some(place) = parked.place(context.delivery.partition) else {
        return Settle::Return;
    };
    // What an operator redrives runs at once, whatever waits.
    if is_redriven(subscribed, &context.envelope) {
        let (id, sequence) = (context.envelope.id().clone(), subscribed.sequence(&context.envelope));
        let (settle, handled) = fresh_told(subscribed, route, context, None, 0, None).await;
        if handled && place.held(&sequence).is_some_and(|held| held == id) {
            // A failure here leaves the sequence held: it can be redriven again.
            match place.done(&id).await {
                Ok(()) => parked.ring(),
                Err(error) => tracing::warn!(%error, %id, "the sequence could not be freed"),
            }
        }
        return settle;
    }
    let (id, sequence) = (context.envelope.id(), subscribed.sequence(&context.envelope));
    match place.meets(id, &sequence, context.delivery.offset.unwrap_or_default()) {
        Meets::Itself => Settle::Ack,
        Meets::Parked => park(subscribed, parked, &place, &context, 0, None, false).await,
        Meets::Nothing { begun } => {
            fresh(subscribed, route, context, Some((parked, &place)), begun, None).await
        }
    }
}

fn is_redriven(subscribed: &Subscribed, envelope: &Envelope) -> bool {
    envelope.extension("evt-replay-group").is_some_and(|group| group == subscribed.group.as_str())
}

/// Handles deliveries of different lanes in one call of a batch handler. Returns how each is settled.
///
/// What is anything else than a plain first run is handled alone, and so is what fails.
pub(super) async fn batch(subscribed: &Subscribed, deliveries: Vec<Delivery>) -> Vec<Settle> {
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
                contexts.push(subscribed.context(one, envelope));
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
    let outcomes: Vec<Option<Outcome>> = match limited(subscribed.policy.timeout, handler.call(&contexts))
        .await
        .and_then(|ran| ran)
    {
        Ok(outcomes) => outcomes.into_iter().map(Some).collect(),
        Err(failure) => {
            tracing::debug!(%failure, n = contexts.len(), topic = %subscribed.topic, handler = route.name, "a batch failed; each of it runs alone");
            subscribed.breaker.undecided(pass);
            contexts.iter().map(|_| None).collect()
        }
    };
    for ((context, at), outcome) in contexts.into_iter().zip(places).zip(outcomes) {
        let ended = match outcome {
            Some(outcome) => conclude(subscribed, route, &context, outcome, Hop::begin(&context), started)
                .await
                .map_or(Ok(()), |f| Err(Some(f))),
            None => Err(None),
        };
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

/// Handles an event that nothing of its key waits before. `begun` runs of it ended with their process;
/// `failed` is how it ran in a batch.
async fn fresh(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: Context,
    parking: Option<(&Parked, &Place)>,
    begun: u32,
    failed: Option<Failure>,
) -> Settle {
    fresh_told(subscribed, route, context, parking, begun, failed).await.0
}

/// The same; says as well whether its handler succeeded, which a settle alone does not tell.
async fn fresh_told(
    subscribed: &Subscribed,
    route: &BoundRoute,
    mut context: Context,
    parking: Option<(&Parked, &Place)>,
    begun: u32,
    mut failed: Option<Failure>,
) -> (Settle, bool) {
    let (claim, retry) = (Claim::Delivery(context.delivery.token), subscribed.policy.retry);
    let mut attempt = context.delivery.attempt.map_or(1, NonZeroU32::get).saturating_add(begun);
    let id = context.envelope.id().clone();
    let caution = parking.filter(|(_, place)| place.is_cautious() || begun > 0);
    // An event that may have ended the process before runs alone among its like, so that an innocent
    // neighbour is not counted again.
    let mut _alone = None;
    if let Some((parked, _)) = caution {
        if begun >= retry.attempts.get() {
            let failure =
                Failure::permanent("aborted", format_args!("the process ended in each of {begun} runs"));
            return (give_up(subscribed, route, &context, parking, &failure).await, false);
        }
        if begun > 0 {
            _alone = Some(parked.suspects.lock().await);
            context.delivery.attempt = NonZeroU32::new(attempt);
        }
    }
    let mut begins = caution.map(|(_, place)| (place, begun + 1)).filter(|_| !planted(Bug::CountsAfterRun));
    let (mut handled, mut parks) = (false, false);
    let settle = loop {
        let (runs, before) = match failed.take() {
            // It ran in a batch: again alone, if it may pass, and once less.
            Some(failure) if failure.may_pass_at_once() => (retry.in_lane.get() - 1, Some(failure)),
            Some(failure) => (0, Some(failure)),
            None => (retry.in_lane.get(), None),
        };
        let ended = match before {
            Some(failure) if runs == 0 => Ended::Failed(failure),
            _ => run(subscribed, route, &context, runs, claim, begins.take()).await,
        };
        let failure = match ended {
            Ended::Done => {
                handled = true;
                break Settle::Ack;
            }
            Ended::Stopped => break Settle::Return,
            Ended::Failed(failure) => failure,
        };
        if failure.class() != Class::Transient || attempt >= retry.attempts.get() {
            break give_up(subscribed, route, &context, parking, &failure).await;
        }
        let after = subscribed.next_attempt(route.name, &failure, attempt);
        match (subscribed.waits, parking) {
            (Waits::Transport, _) => break Settle::Retry { after: Some(after) },
            (Waits::Log, Some((parked, place))) => {
                let due = SystemTime::now().checked_add(after);
                parks = true;
                break park(subscribed, parked, place, &context, attempt, due, false).await;
            }
            _ => {
                if !claim.sleep(subscribed, after).await {
                    break Settle::Return;
                }
                attempt += 1;
                context.delivery.attempt = context.delivery.attempt.and(NonZeroU32::new(attempt));
            }
        }
    };
    if let Some((_, place)) = caution {
        if planted(Bug::CountsAfterRun) {
            drop(place.attempt(&id, begun + 1, None, false).await);
        }
        // What was begun and ended is said, so that nobody takes it for what ended a process.
        let ended =
            settle == Settle::Ack && !parks && place.held(&subscribed.sequence(&context.envelope)).is_none();
        if !ended || place.done(&id).await.is_err() {
            place.ended(&id);
        }
    }
    (settle, handled)
}

/// Handles the head of a parked key, and the events behind it, until one is not due.
pub(super) async fn head(subscribed: &Subscribed, parked: &Parked, head: &Head) {
    run_due(subscribed, &head.place, &head.sequence).await;
    parked.give_back(head);
    subscribed.settled.notify_waiters();
}

async fn run_due(subscribed: &Subscribed, place: &Place, sequence: &Sequence) {
    while let Some(waiting) = place.head(sequence) {
        if !place.is_ours() || subscribed.is_stopping() || !run_head(subscribed, place, &waiting).await {
            break;
        }
    }
}

/// Runs one parked event. Returns whether it ended, so that the next of its key may follow at once.
async fn run_head(subscribed: &Subscribed, place: &Place, waiting: &Waiting) -> bool {
    let (parked, claim) = (&waiting.parked, Claim::Parked(place));
    let (id, retry) = (&parked.id, subscribed.policy.retry);
    let envelope = match place.body(waiting).await {
        Ok(envelope) => envelope,
        Err(error) => {
            tracing::error!(%error, topic = %subscribed.topic, %id, "a parked event could not be read; its key waits");
            let due = SystemTime::now().checked_add(UNREADABLE);
            let waits = Note::Attempt { attempts: parked.attempts, due, held: false };
            note(subscribed, place, claim, id, waits).await;
            return false;
        }
    };
    let route = subscribed.route(&envelope);
    let Some(route) = route.filter(|_| !subscribed.is_expired(&envelope)) else {
        return note(subscribed, place, claim, id, Note::Done).await;
    };
    let attempt = parked.attempts.saturating_add(1);
    let delivery = Delivery::new(Token::new(0, 0), place.partition, Content::Envelope(envelope.clone()))
        .with_offset(parked.origin)
        .with_attempt(NonZeroU32::new(attempt).unwrap_or(NonZeroU32::MIN));
    let context = subscribed.context(delivery, envelope);
    let failure = if parked.attempts >= retry.attempts.get() {
        // Its last run was begun and never ended.
        let runs = parked.attempts;
        Failure::permanent("aborted", format_args!("the process ended in the last of {runs} runs"))
    } else {
        let begins = Some((place, attempt)).filter(|_| !planted(Bug::CountsAfterRun));
        match run(subscribed, route, &context, 1, claim, begins).await {
            Ended::Stopped => return false,
            Ended::Done => return note(subscribed, place, claim, id, Note::Done).await,
            Ended::Failed(failure) => failure,
        }
    };
    if failure.class() == Class::Transient && attempt < retry.attempts.get() {
        let after = subscribed.next_attempt(route.name, &failure, attempt);
        let due = SystemTime::now().checked_add(after);
        let waits = Note::Attempt { attempts: attempt, due, held: false };
        note(subscribed, place, claim, id, waits).await;
        return false;
    }
    if bury_until(subscribed, &context.delivery, route.name, &failure, claim).await.is_err() {
        return false;
    }
    outputs::refuse(subscribed, route, &context, &failure).await;
    if subscribed.followers == Followers::Hold && matches!(parked.sequence, Sequence::Key(_)) {
        let held = Note::Attempt { attempts: attempt, due: None, held: true };
        note(subscribed, place, claim, id, held).await;
        return false;
    }
    note(subscribed, place, claim, id, Note::Done).await
}

/// Parks an event of the source. Its source is settled only when that is stored.
async fn park(
    subscribed: &Subscribed,
    parked: &Parked,
    place: &Place,
    context: &Context,
    attempts: u32,
    due: Option<SystemTime>,
    held: bool,
) -> Settle {
    let token = context.delivery.token;
    let event = ParkedEvent {
        id: context.envelope.id().clone(),
        sequence: subscribed.sequence(&context.envelope),
        origin: context.delivery.offset.unwrap_or_default(),
        attempts,
        due,
        held,
    };
    let claim = Claim::Delivery(token);
    if !held && !parked.has_room(place, &event.sequence) {
        if planted(Bug::DropsOverBound) {
            return Settle::Ack;
        }
        // This is the key's lane: nobody else makes room in it. If that is not enough it comes again, and its
        // worker is free meanwhile for the heads that make room elsewhere.
        run_due(subscribed, place, &event.sequence).await;
        if !claim.sleep(subscribed, PAUSE).await || !parked.has_room(place, &event.sequence) {
            return Settle::Return;
        }
    }
    if planted(Bug::SettlesBeforePark) {
        drop(subscribed.consumer().settle(&[(token, Settle::Ack)]).await);
    }
    let mut pause = PAUSE;
    loop {
        let error = match place.park(&context.envelope, event.clone()).await {
            Ok(()) => {
                parked.ring();
                return Settle::Ack;
            }
            Err(error) => error,
        };
        if matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::Invalid) {
            // With its marks it is above the limit: it cannot wait, so it is an operator's.
            let failure = Failure::permanent("parking.too_large", &error);
            let buried = bury_until(subscribed, &context.delivery, "", &failure, claim).await;
            return buried.err().unwrap_or(Settle::Ack);
        }
        tracing::warn!(%error, topic = %subscribed.topic, id = %event.id, "the event could not be parked; trying again");
        if !claim.sleep(subscribed, pause).await {
            return Settle::Return;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Dead-letters an event, and holds its followers where that is the policy.
async fn give_up(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    parking: Option<(&Parked, &Place)>,
    failure: &Failure,
) -> Settle {
    let claim = Claim::Delivery(context.delivery.token);
    if let Err(settle) = bury_until(subscribed, &context.delivery, route.name, failure, claim).await {
        return settle;
    }
    outputs::refuse(subscribed, route, context, failure).await;
    match parking {
        Some((parked, place))
            if subscribed.followers == Followers::Hold && context.envelope.key().is_some() =>
        {
            let attempts = context.delivery.attempt.map_or(1, NonZeroU32::get);
            park(subscribed, parked, place, context, attempts, None, true).await
        }
        _ => Settle::Ack,
    }
}

/// Stores a note, and repeats that while the transport refuses it. Returns whether it is stored; if not,
/// the event is not ours any more, or the driver stops.
async fn note(subscribed: &Subscribed, place: &Place, claim: Claim<'_>, id: &EventId, note: Note) -> bool {
    let mut pause = PAUSE;
    loop {
        let noted = match note {
            Note::Attempt { attempts, due, held } => place.attempt(id, attempts, due, held).await,
            Note::Done => place.done(id).await,
        };
        let Err(error) = noted else { return true };
        tracing::warn!(%error, topic = %subscribed.topic, group = %subscribed.group, "the parking log failed; trying again");
        if !claim.sleep(subscribed, pause).await {
            return false;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Runs an event in its lane, briefly again after transient failures.
async fn run(
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

/// Publishes what a run emitted, and books how it ended. Returns why it failed, if it did.
async fn conclude(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    outcome: Outcome,
    hop: Option<Hop>,
    started: Option<Instant>,
) -> Option<Failure> {
    let n_sent = outcome.outputs.len();
    let failure = match outcome.verdict {
        Ok(()) if n_sent == 0 => None,
        Ok(()) => {
            let sent = outputs::publish(subscribed, route, context, outcome.outputs, hop).await;
            sent.err().map(Failure::from)
        }
        Err(failure) => Some(failure),
    };
    let class = failure.as_ref().map(Failure::class);
    if let Some(started) = started {
        let n_sent = if class.is_none() { n_sent } else { 0 };
        subscribed.meters.ran(route.name, started.elapsed(), class, n_sent);
    }
    if failure.is_none() {
        subscribed.breaker.succeeded();
        subscribed.counters.handled.fetch_add(1, Atomic::Relaxed);
    }
    if let Some(observer) = &subscribed.observer {
        observer.ran(route.name, context, failure.as_ref());
    }
    failure
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

/// Dead-letters a delivery. Only a confirmed letter lets the source be settled: until then it comes again
/// where the transport keeps delays, and waits here where it does not. `Err` says how to settle it.
async fn bury_until(
    subscribed: &Subscribed,
    delivery: &Delivery,
    handler: &str,
    failure: &Failure,
    claim: Claim<'_>,
) -> Result<(), Settle> {
    let mut pause = PAUSE;
    while let Err(error) = bury(subscribed, delivery, handler, failure).await {
        tracing::error!(%error, topic = %subscribed.dead_letters, "the dead letter could not be stored; the event stays");
        if subscribed.waits == Waits::Transport {
            return Err(Settle::Retry { after: Some(subscribed.policy.retry.base) });
        }
        if !claim.sleep(subscribed, pause).await {
            return Err(Settle::Return);
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
    subscribed.counters.dead_lettered.fetch_add(1, Atomic::Relaxed);
    subscribed.meters.dead_lettered();
    Ok(())
}

async fn bury(subscribed: &Subscribed, delivery: &Delivery, handler: &str, failure: &Failure) -> Result<()> {
    let letter = dead_letter::letter(delivery, &subscribed.topic, &subscribed.group, handler, failure);
    tracing::warn!(%failure, topic = %subscribed.topic, group = %subscribed.group, handler, id = %letter.id(), "dead-lettered");
    match store_letter(subscribed, letter.clone()).await {
        // With its marks it is above the limit. What was read stays in its topic, at the place that
        // the letter names.
        Err(error) if matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::Invalid) => {
            let slim = letter.without_payload().with_headers(Headers::new());
            store_letter(subscribed, slim.with_extension("evt-dlq-body", "omitted")).await
        }
        stored => stored,
    }
}

async fn store_letter(subscribed: &Subscribed, letter: Envelope) -> Result<()> {
    let confirm = subscribed.publisher.enqueue(&subscribed.dead_letters, vec![letter]).await?;
    confirm.await.single().map(drop)
}
