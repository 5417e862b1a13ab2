//! Dead letters: stored before anything is settled.

use std::sync::atomic::Ordering as Atomic;

use super::super::layers::dead_letter;
use super::super::subscribed::Subscribed;
use super::{Claim, MAX_PAUSE, PAUSE};
use crate::envelope::Envelope;
use crate::error::{ErrorKind, Result};
use crate::failure::Failure;
use crate::header::Headers;
use crate::parking::Waits;
use crate::transport::{Delivery, Settle};

/// Dead-letters a delivery. Only a confirmed letter lets the source be settled: until then it comes again
/// where the transport keeps delays, and waits here where it does not. `Err` says how to settle it.
pub(super) async fn bury_until(
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
