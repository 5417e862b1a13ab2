//! Extractors: what a handler's arguments take from a delivery.

use std::future::Future;
use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::admin::{Offset, Retention};
use crate::bus::Bus;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind};
use crate::event::Message;
use crate::failure::Failure;
use crate::header::Headers;
use crate::name::{Group, Topic};
use crate::outcome::Outcome;
use crate::partition::PartitionId;
use crate::transport::Delivery;
use crate::unit::Unit;

/// One delivery on its way to a handler.
#[derive(Debug)]
pub struct Context {
    pub(crate) topic: Topic,
    pub(crate) group: Group,
    pub(crate) handler: &'static str,
    pub(crate) delivery: Delivery,
    pub(crate) envelope: Envelope,
    unit: Mutex<Option<Box<dyn Unit>>>,
}

impl Context {
    pub(crate) fn new(
        topic: Topic,
        group: Group,
        handler: &'static str,
        delivery: Delivery,
        envelope: Envelope,
    ) -> Self {
        Self { topic, group, handler, delivery, envelope, unit: Mutex::new(None) }
    }

    /// Returns the event with all its attributes.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// Returns the topic it came from.
    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Returns the group that handles it.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Returns the name of the handler: that of its function.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// Returns the partition it came from.
    pub fn partition(&self) -> PartitionId {
        self.delivery.partition
    }

    /// Returns its place in the partition, where the transport has places.
    pub fn offset(&self) -> Option<Offset> {
        self.delivery.offset
    }

    /// Returns how often it was delivered, from 1; `None` where the transport does not count.
    pub fn attempt(&self) -> Option<NonZeroU32> {
        self.delivery.attempt
    }

    /// Ends a unit of work with this run, as [`Unit`] says.
    ///
    /// # Errors
    /// A permanent failure if the run has a unit already: two cannot end as one.
    pub fn enlist(&self, unit: impl Unit + 'static) -> Result<(), Failure> {
        let mut enlisted = self.unit.lock();
        if enlisted.is_some() {
            return Err(Failure::permanent("unit.second", "a handler can have one unit of work, such as Tx"));
        }
        *enlisted = Some(Box::new(unit));
        Ok(())
    }

    pub(crate) fn take_unit(&self) -> Option<Box<dyn Unit>> {
        self.unit.lock().take()
    }
}

/// A handler that is about to take events: what its arguments look at before the service starts.
#[derive(Debug)]
pub struct Beginning<'a> {
    pub(crate) bus: &'a Bus,
    pub(crate) topic: &'a Topic,
    pub(crate) group: &'a Group,
    pub(crate) handler: &'static str,
}

impl Beginning<'_> {
    /// Returns the topic that it takes events from.
    pub fn topic(&self) -> &Topic {
        self.topic
    }

    /// Returns the group that it handles them for.
    pub fn group(&self) -> &Group {
        self.group
    }

    /// Returns the name of the handler: that of its function.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// Asks what the broker keeps of the topic; `None` = there is no such topic yet, or it does not say.
    ///
    /// # Errors
    /// As [`Admin::topic`](crate::Admin::topic).
    ///
    /// # Cancellation
    /// Safe.
    pub async fn retention(&self) -> Result<Option<Retention>, Error> {
        let Some(admin) = self.bus.transport().admin() else { return Ok(None) };
        Ok(admin.topic(self.topic).await?.map(|info| info.retention))
    }
}

/// An argument of a handler.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a handler with state `{S}`",
    label = "not an extractor",
    note = "extractors are Typed<E>, State<S>, Meta, Headers, Raw, Deadline and Attempt"
)]
pub trait Extract<S>: Sized + Send {
    /// The type and version this argument is for, which routes deliveries to the handler.
    const MESSAGE: Option<(&'static str, u32)> = None;
    /// Whether that is a command, which has one owner.
    const IS_COMMAND: bool = false;

    /// Looks whether runs can work, once for each handler when a service starts.
    ///
    /// # Errors
    /// Why the service cannot start.
    fn prepare(_: &Beginning<'_>, _: &S) -> impl Future<Output = Result<(), Error>> + Send {
        std::future::ready(Ok(()))
    }

    /// Takes the argument from a delivery.
    ///
    /// # Errors
    /// The run's outcome, without a run of the handler: a [`Failure`], or [`Outcome::duplicate`].
    fn extract(context: &Context, state: &S) -> impl Future<Output = Result<Self, Outcome>> + Send;
}

/// The decoded message. A body that does not decode is dead-lettered with its bytes.
#[derive(Debug)]
pub struct Typed<M>(pub M);

impl<M: Message, S: Sync> Extract<S> for Typed<M> {
    const MESSAGE: Option<(&'static str, u32)> = Some((M::TYPE, M::VERSION));
    const IS_COMMAND: bool = M::IS_COMMAND;

    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        match context.envelope.decode() {
            Ok(message) => Ok(Self(message)),
            Err(error) => Err(Failure::poison("decode", error).into()),
        }
    }
}

/// The service's state, or a part of it.
#[derive(Debug)]
pub struct State<T>(pub T);

/// A part of the state that [`State`] can take.
pub trait FromState<S> {
    /// Takes the part.
    fn from_state(state: &S) -> Self;
}

impl<S: Clone> FromState<S> for S {
    fn from_state(state: &S) -> Self {
        state.clone()
    }
}

impl<S: Sync, T: FromState<S> + Send> Extract<S> for State<T> {
    async fn extract(_: &Context, state: &S) -> Result<Self, Outcome> {
        Ok(Self(T::from_state(state)))
    }
}

/// The whole envelope: attributes, key, extensions.
#[derive(Debug, Clone)]
pub struct Meta(pub Envelope);

impl<S: Sync> Extract<S> for Meta {
    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        Ok(Self(context.envelope.clone()))
    }
}

impl<S: Sync> Extract<S> for Headers {
    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        Ok(context.envelope.headers().clone())
    }
}

/// The body as it came, undecoded; empty where it is absent.
#[derive(Debug, Clone)]
pub struct Raw(pub Bytes);

impl<S: Sync> Extract<S> for Raw {
    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        Ok(Self(context.envelope.payload().cloned().unwrap_or_default()))
    }
}

/// When the event is of no use any more: the `expirytime` of its producer. `None` = it always is.
///
/// An event that is late already does not reach its handler.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Option<SystemTime>);

impl Deadline {
    /// Returns how much time is left; `None` = without end.
    pub fn left(&self) -> Option<Duration> {
        self.0.map(|end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

impl<S: Sync> Extract<S> for Deadline {
    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        Ok(Self(context.envelope.expiry()))
    }
}

/// How often the event was delivered, from 1.
#[derive(Debug, Clone, Copy)]
pub struct Attempt(pub NonZeroU32);

impl<S: Sync> Extract<S> for Attempt {
    async fn extract(context: &Context, _: &S) -> Result<Self, Outcome> {
        match context.attempt() {
            Some(attempt) => Ok(Self(attempt)),
            None => {
                let error = Error::new(ErrorKind::Unsupported, "this transport does not count deliveries");
                Err(Failure::from(error).into())
            }
        }
    }
}
