//! Events that wait in the parking log: how they get there, and how they leave it.

use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use super::super::outputs;
use super::super::parked::planted::{Bug, planted};
use super::super::parked::record::{Parked as ParkedEvent, Sequence};
use super::super::parked::{Head, Parked, Place, Waiting};
use super::super::subscribed::Subscribed;
use super::letter::bury_until;
use super::run::{Ended, run};
use super::{Claim, MAX_PAUSE, PAUSE};
use crate::error::{Class, ErrorKind};
use crate::extract::Context;
use crate::failure::Failure;
use crate::id::EventId;
use crate::parking::Followers;
use crate::service::BoundRoute;
use crate::transport::{Content, Delivery, Settle, Token};

/// How long a parked event waits whose body cannot be read.
const UNREADABLE: Duration = Duration::from_secs(30);

/// A record of the parking log about a run.
#[derive(Clone, Copy)]
pub(super) enum Note {
    Attempt { attempts: u32, due: Option<SystemTime>, held: bool },
    Done,
}

/// Handles the head of a parked key, and the events behind it, until one is not due.
pub(in crate::driver) async fn head(subscribed: &Subscribed, parked: &Parked, head: &Head) {
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
    let context = subscribed.context(route, delivery, envelope);
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
pub(super) async fn park(
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
pub(super) async fn give_up(
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
pub(super) async fn note(
    subscribed: &Subscribed,
    place: &Place,
    claim: Claim<'_>,
    id: &EventId,
    note: Note,
) -> bool {
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
