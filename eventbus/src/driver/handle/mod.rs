//! One event to its end: its run, and what becomes of it when that fails.

mod batch;
mod letter;
mod parked;
mod run;

use std::num::NonZeroU32;
use std::sync::atomic::Ordering as Atomic;
use std::time::{Duration, SystemTime};

pub(super) use self::batch::batch;
use self::letter::bury_until;
pub(super) use self::parked::head;
use self::parked::{give_up, park};
use self::run::{Ended, run};
use super::parked::planted::{Bug, planted};
use super::parked::{Meets, Parked, Place};
use super::subscribed::Subscribed;
use super::{MAX_PAUSE, PAUSE};
use crate::envelope::Envelope;
use crate::error::Class;
use crate::extract::Context;
use crate::failure::Failure;
use crate::parking::Waits;
use crate::service::BoundRoute;
use crate::transport::{Content, Delivery, Settle, Token};

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
    let context = subscribed.context(route, delivery, envelope);
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
