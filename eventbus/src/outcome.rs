//! What a handler returns: done, a failure, and events to publish before the input is settled.

use crate::envelope::Envelope;
use crate::error::Result;
use crate::event::{Event, Message};
use crate::failure::Failure;
use crate::id::EventId;
use crate::name::Topic;

/// The result of one run of a handler.
#[derive(Debug)]
pub struct Outcome {
    pub(crate) verdict: Result<(), Failure>,
    pub(crate) outputs: Vec<Output>,
    /// The handler was not run: it had succeeded before.
    pub(crate) is_duplicate: bool,
}

impl Outcome {
    /// The event was handled before: it is settled and counted as a duplicate, and the handler is not run. For
    /// extractors that remember what was done.
    pub fn duplicate() -> Self {
        Self { is_duplicate: true, ..Self::ended(Ok(()), Vec::new()) }
    }

    fn ended(verdict: Result<(), Failure>, outputs: Vec<Output>) -> Self {
        Self { verdict, outputs, is_duplicate: false }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        failure.into_outcome()
    }
}

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) to: To,
    pub(crate) id: Option<EventId>,
    pub(crate) envelope: Envelope,
}

/// Where an output goes.
#[derive(Debug)]
pub(crate) enum To {
    Topic(Topic),
    /// The topic of the route.
    Route,
    /// Whoever asked.
    Asker,
}

/// Answers a command, before it is settled. Nothing is sent if nobody asked for an answer.
#[derive(Debug)]
pub struct Reply<R>(pub R);

/// Publishes one event to the route's topic, before the input is settled.
///
/// Its id is derived from the input's id and the handler, so that a repeated run emits the same event
/// again and not another one.
#[derive(Debug)]
pub struct Emit<E>(pub E);

/// Publishes any number of events, in order, before the input is settled.
///
/// ```
/// # use eventbus::{Emits, Event, Topic};
/// # use serde::{Serialize, Deserialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.paid", version = 1, key = order_id)]
/// # struct Paid { order_id: u64 }
/// # fn main() -> eventbus::Result<()> {
/// let emits = Emits::new().to(&Topic::new("paid-orders")?, &Paid { order_id: 7 })?;
/// # drop(emits); Ok(()) }
/// ```
#[derive(Debug, Default)]
pub struct Emits(Vec<Output>);

impl Emits {
    /// Publishes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an event for a topic; its id is derived from the input, the handler and its place here.
    ///
    /// # Errors
    /// Permanent if the codec cannot write the value.
    pub fn to<E: Event>(self, topic: &Topic, event: &E) -> Result<Self> {
        self.push(topic, event, None)
    }

    /// Adds an event with an id of the caller's choice, such as one derived from an order and its
    /// transition, so that different inputs that lead to it emit it once.
    ///
    /// # Errors
    /// Permanent if the codec cannot write the value.
    pub fn to_as<E: Event>(self, topic: &Topic, event: &E, id: EventId) -> Result<Self> {
        self.push(topic, event, Some(id))
    }

    fn push<E: Event>(mut self, topic: &Topic, event: &E, id: Option<EventId>) -> Result<Self> {
        self.0.push(Output { to: To::Topic(topic.clone()), id, envelope: Envelope::of(event, "/")? });
        Ok(self)
    }

    /// Returns the events with their topics, for publishing outside a handler. Events without an id of
    /// the caller's choice keep a fresh one.
    pub fn into_envelopes(self, source: &str) -> Vec<(Topic, Envelope)> {
        let complete = |output: Output| {
            let envelope = output.envelope.with_source(source.to_owned());
            let envelope = match output.id {
                Some(id) => envelope.with_id(id),
                None => envelope,
            };
            match output.to {
                To::Topic(topic) => Some((topic, envelope)),
                To::Route | To::Asker => None,
            }
        };
        self.0.into_iter().filter_map(complete).collect()
    }

    /// Tells whether there is nothing to publish.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a handler may return.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "not an outcome",
    note = "return (), Emit<E>, Emits, Reply<R>, or a Result of one of these with eventbus::Failure as its error"
)]
pub trait IntoOutcome {
    /// Turns the value into an outcome.
    fn into_outcome(self) -> Outcome;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Outcome {
        Outcome::ended(Ok(()), Vec::new())
    }
}

impl IntoOutcome for Failure {
    fn into_outcome(self) -> Outcome {
        Outcome::ended(Err(self), Vec::new())
    }
}

impl<E: Event> IntoOutcome for Emit<E> {
    fn into_outcome(self) -> Outcome {
        match Envelope::of(&self.0, "/") {
            Ok(envelope) => Outcome::ended(Ok(()), vec![Output { to: To::Route, id: None, envelope }]),
            Err(error) => Failure::from(error).into_outcome(),
        }
    }
}

impl<R: Message> IntoOutcome for Reply<R> {
    fn into_outcome(self) -> Outcome {
        match Envelope::of(&self.0, "/") {
            Ok(envelope) => Outcome::ended(Ok(()), vec![Output { to: To::Asker, id: None, envelope }]),
            Err(error) => Failure::from(error).into_outcome(),
        }
    }
}

impl<E: Event> IntoOutcome for Option<Emit<E>> {
    fn into_outcome(self) -> Outcome {
        self.map_or_else(|| ().into_outcome(), Emit::into_outcome)
    }
}

impl IntoOutcome for Emits {
    fn into_outcome(self) -> Outcome {
        Outcome::ended(Ok(()), self.0)
    }
}

impl<T: IntoOutcome> IntoOutcome for Result<T, Failure> {
    fn into_outcome(self) -> Outcome {
        match self {
            Ok(value) => value.into_outcome(),
            Err(failure) => failure.into_outcome(),
        }
    }
}
