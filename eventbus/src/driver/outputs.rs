//! What handlers emit: completed with ids and causes, published before the input is settled.

use std::time::SystemTime;

use super::layers::trace::Hop;
use super::subscribed::Subscribed;
use crate::envelope::{Envelope, extension};
use crate::error::{Error, Result};
use crate::extract::Context;
use crate::failure::Failure;
use crate::id::EventId;
use crate::name::Topic;
use crate::outcome::{Output, To};
use crate::request::{FAILED, FAILURE_CODE, FAILURE_MESSAGE};
use crate::service::BoundRoute;

/// Publishes what a handler emitted, in order, and waits until all of it is confirmed.
pub(super) async fn publish(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    outputs: Vec<Output>,
    hop: Option<Hop>,
) -> Result<()> {
    let outputs = complete(subscribed, route, context, outputs, hop).await?;
    let mut confirms = Vec::with_capacity(outputs.len());
    for (topic, envelope) in outputs {
        confirms.push(subscribed.publisher.enqueue(&topic, vec![envelope]).await?);
    }
    for confirm in confirms {
        confirm.await.all()?;
    }
    Ok(())
}

/// Gives what a handler emitted its topics and all that says where it comes from.
pub(super) async fn complete(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    outputs: Vec<Output>,
    hop: Option<Hop>,
) -> Result<Vec<(Topic, Envelope)>> {
    let mut completed = Vec::with_capacity(outputs.len());
    for (at, output) in outputs.into_iter().enumerate() {
        let topic = match (output.to, &route.emit_to) {
            (To::Topic(topic), _) => topic,
            (To::Route, Some(topic)) => topic.clone(),
            (To::Asker, _) => match asker_of(context) {
                // An inbox that is gone is not made again by an answer.
                Some(found) if !is_open(subscribed, &found).await? => continue,
                Some(found) => found,
                None => continue,
            },
            (To::Route, None) => {
                return Err(Error::config("the route emits events and names no topic: add .emit_to(topic)")
                    .with("handler", route.name));
            }
        };
        let envelope = signed(subscribed, route, context, output.envelope, output.id, at);
        let envelope = match hop {
            Some(hop) => hop.mark(envelope),
            None => envelope,
        };
        completed.push((topic, envelope));
    }
    Ok(completed)
}

/// Where the answer to an event goes, if somebody still waits for one.
fn asker_of(context: &Context) -> Option<Topic> {
    let waits = context.envelope.expiry().is_none_or(|end| end > SystemTime::now());
    let topic = context.envelope.extension(extension::REPLY_TO).filter(|_| waits)?;
    Topic::new(topic).ok()
}

/// Whether an inbox is still there, as far as the transport can say.
async fn is_open(subscribed: &Subscribed, asker: &Topic) -> Result<bool> {
    match subscribed.transport.admin() {
        Some(admin) => Ok(admin.topic(asker).await?.is_some()),
        None => Ok(true),
    }
}

/// Tells whoever asked that there will be no answer. Nothing depends on it: the letter is stored.
pub(super) async fn refuse(
    subscribed: &Subscribed,
    route: &BoundRoute,
    context: &Context,
    failure: &Failure,
) {
    let Some(asker) = asker_of(context) else { return };
    if !is_open(subscribed, &asker).await.unwrap_or(false) {
        return;
    }
    let said: String = failure.message().chars().take(256).collect();
    let answer = Envelope::new(FAILED, "/")
        .with_extension(FAILURE_CODE, failure.code())
        .with_extension(FAILURE_MESSAGE, said);
    let answer = signed(subscribed, route, context, answer, None, 0);
    let sent = async { subscribed.publisher.enqueue(&asker, vec![answer]).await?.await.all() };
    if let Err(error) = sent.await {
        tracing::warn!(%error, topic = %asker, "whoever asked could not be told of the failure");
    }
}

/// Gives an output its id, source, cause and conversation.
fn signed(
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
