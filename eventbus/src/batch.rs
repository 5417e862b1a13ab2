//! Batch handlers: many events in one call, one outcome for each.

use std::fmt;
use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;

use parking_lot::Mutex;

use crate::envelope::Envelope;
use crate::error::Error;
use crate::event::Message;
use crate::extract::{Beginning, Context, FromState, State};
use crate::failure::Failure;
use crate::outcome::{IntoOutcome, Outcome};
use crate::unit::Unit;

/// Decoded events for one call of a batch handler; at most one of each key, so that none that fails is
/// overtaken by a later one of its key. They are in no order among each other.
///
/// It becomes [`Outcomes`], one for each event, and nothing else does:
///
/// ```
/// # use eventbus::{Batch, Event, Failure, Outcomes, State};
/// # use serde::{Serialize, Deserialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.placed", version = 1, key = order_id)]
/// # struct OrderPlaced { order_id: u64 }
/// # #[derive(Clone)] struct Db;
/// # impl Db { async fn insert(&self, _: Vec<u64>) -> Result<Vec<bool>, std::io::Error> { Ok(vec![]) } }
/// async fn index(orders: Batch<OrderPlaced>, State(db): State<Db>) -> Result<Outcomes, Failure> {
///     let ids = orders.iter().map(|order| order.message.order_id).collect();
///     let mut stored = db.insert(ids).await?.into_iter();
///     Ok(orders.each(|_| match stored.next() {
///         Some(true) => Ok(()),
///         _ => Err(Failure::transient("index.conflict", "not stored")),
///     }))
/// }
/// ```
/// What fails runs again alone, and then as any other event: later, parked, dead-lettered. A failure of the
/// whole call, or a panic, says nothing of one event: each runs alone. So does each where one fails beside a
/// [`Unit`], such as a `Tx` of the crate `outbox`: a batch is one transaction.
#[derive(Debug)]
pub struct Batch<M> {
    items: Vec<Item<M>>,
}

/// One event of a batch.
#[derive(Debug)]
#[non_exhaustive]
pub struct Item<M> {
    /// The decoded message.
    pub message: M,
    /// Its envelope: attributes, key, headers.
    pub envelope: Envelope,
    /// How often it was delivered, from 1; `None` where the transport does not count.
    pub attempt: Option<NonZeroU32>,
}

impl<M> Batch<M> {
    /// Returns how many events it holds: at least one.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Looks at the events, in the order of the outcomes.
    pub fn iter(&self) -> std::slice::Iter<'_, Item<M>> {
        self.items.iter()
    }

    /// Every event succeeded.
    pub fn done(self) -> Outcomes {
        self.each(|_| ())
    }

    /// Gives each event, in order, for an outcome.
    pub fn each<O: IntoOutcome>(self, mut outcome: impl FnMut(Item<M>) -> O) -> Outcomes {
        Outcomes(self.items.into_iter().map(|item| outcome(item).into_outcome()).collect())
    }
}

impl<'a, M> IntoIterator for &'a Batch<M> {
    type Item = &'a Item<M>;
    type IntoIter = std::slice::Iter<'a, Item<M>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// One outcome for each event of a [`Batch`]; only a batch makes them, so their number is always right.
#[derive(Debug)]
pub struct Outcomes(Vec<Outcome>);

/// What a batch handler may return.
#[diagnostic::on_unimplemented(
    message = "a batch handler cannot return `{Self}`",
    label = "not outcomes",
    note = "return Outcomes, made with Batch::each or Batch::done, or a Result of them with eventbus::Failure"
)]
pub trait IntoOutcomes {
    /// The outcomes; `None` stands for one failure of all.
    #[doc(hidden)]
    fn into_outcomes(self) -> Result<Vec<Outcome>, Failure>;
}

impl IntoOutcomes for Outcomes {
    fn into_outcomes(self) -> Result<Vec<Outcome>, Failure> {
        Ok(self.0)
    }
}

impl IntoOutcomes for Result<Outcomes, Failure> {
    fn into_outcomes(self) -> Result<Vec<Outcome>, Failure> {
        self.map(|outcomes| outcomes.0)
    }
}

/// Deliveries that go to a batch handler in one call, as its other arguments see them before it runs.
#[derive(Debug)]
pub struct Gathered<'a> {
    contexts: Vec<&'a Context>,
    parts: Mutex<Vec<Part>>,
}

/// What becomes of a delivery in a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Runs,
    Handled,
    Alone,
}

impl<'a> Gathered<'a> {
    fn new(contexts: Vec<&'a Context>) -> Self {
        let parts = Mutex::new(vec![Part::Runs; contexts.len()]);
        Self { contexts, parts }
    }

    /// Returns the deliveries: at least one, all for one handler, and each with a body that decodes.
    pub fn contexts(&self) -> &[&'a Context] {
        &self.contexts
    }

    /// One of them was handled before: it is settled with the others, and not given to the handler.
    pub fn pass_over(&self, at: usize) {
        self.decide(at, Part::Handled);
    }

    /// One of them is not part of this call: it runs alone afterwards.
    pub fn leave(&self, at: usize) {
        self.decide(at, Part::Alone);
    }

    fn decide(&self, at: usize, part: Part) {
        if let Some(undecided) = self.parts.lock().get_mut(at) {
            *undecided = part;
        }
    }

    /// Ends a unit of work with this call, as [`Unit`] says: where one event fails, all of them do, and each runs
    /// alone.
    ///
    /// # Errors
    /// As [`Context::enlist`].
    pub fn enlist(&self, unit: impl Unit + 'static) -> Result<(), Failure> {
        match self.contexts.first() {
            Some(first) => first.enlist(unit),
            None => Err(Failure::permanent("batch", "a call without an event")),
        }
    }

    /// What the handler is given; `None` where nothing is left for it.
    fn batch<M>(&self, messages: Vec<M>) -> Option<Batch<M>> {
        let parts = self.parts.lock();
        let runs = messages.into_iter().zip(&self.contexts).zip(parts.iter());
        let items: Vec<Item<M>> = runs
            .filter(|(_, part)| **part == Part::Runs)
            .map(|((message, context), _)| Item {
                message,
                envelope: context.envelope().clone(),
                attempt: context.attempt(),
            })
            .collect();
        (!items.is_empty()).then_some(Batch { items })
    }

    /// What became of each, by the outcomes of those that the handler was given; `None` = it runs alone.
    fn outcomes(self, ran: Vec<Outcome>) -> Vec<Option<Outcome>> {
        let mut ran = ran.into_iter();
        let absent = || Failure::transient("batch", "the handler gave no outcome").into_outcome();
        let each = self.parts.into_inner().into_iter().map(|part| match part {
            Part::Runs => Some(ran.next().unwrap_or_else(absent)),
            Part::Handled => Some(Outcome::duplicate()),
            Part::Alone => None,
        });
        each.collect()
    }
}

/// An argument of a batch handler, after its [`Batch`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a batch handler with state `{S}`",
    label = "not an argument of batches",
    note = "after its Batch<E> a batch handler takes State<T>, or a Tx of the crate outbox"
)]
pub trait ExtractBatch<S>: Sized + Send {
    /// Looks whether runs can work, once for each handler when a service starts.
    ///
    /// # Errors
    /// Why the service cannot start.
    fn prepare(_: &Beginning<'_>, _: &S) -> impl Future<Output = Result<(), Error>> + Send {
        std::future::ready(Ok(()))
    }

    /// Takes the argument from the deliveries of a call.
    ///
    /// # Errors
    /// The outcome of a call with one event, without a run of the handler. Where there are more, each runs alone.
    fn extract(call: &Gathered<'_>, state: &S) -> impl Future<Output = Result<Self, Outcome>> + Send;
}

impl<S: Sync, T: FromState<S> + Send> ExtractBatch<S> for State<T> {
    async fn extract(_: &Gathered<'_>, state: &S) -> Result<Self, Outcome> {
        Ok(Self(T::from_state(state)))
    }
}

/// An async function that handles batches: a [`Batch`], and up to four other arguments.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a batch handler for state `{S}`",
    label = "not a batch handler",
    note = "a batch handler is an `async fn(Batch<E>)` that may take State<T> and Tx as well, and returns Outcomes or Result<Outcomes, Failure>"
)]
pub trait BatchHandler<Arguments, S>: Clone + Send + Sync + 'static {
    /// The messages it takes.
    type Message: Message;

    /// Has each argument look whether runs can work.
    #[doc(hidden)]
    fn prepare(&self, beginning: &Beginning<'_>, state: &S)
    -> impl Future<Output = Result<(), Error>> + Send;

    /// Runs the handler on the messages of some deliveries; one outcome for each, or `None` where it runs alone.
    #[doc(hidden)]
    fn call(
        &self,
        gathered: Gathered<'_>,
        messages: Vec<Self::Message>,
        state: &S,
    ) -> impl Future<Output = Result<Vec<Option<Outcome>>, Outcome>> + Send;
}

macro_rules! batch_handler {
    ($($argument:ident),*) => {
        impl<F, Fut, Out, M, S, $($argument),*> BatchHandler<(Batch<M>, $($argument),*), S> for F
        where
            F: Fn(Batch<M>, $($argument),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send,
            Out: IntoOutcomes,
            M: Message,
            S: Send + Sync + 'static,
            $($argument: ExtractBatch<S>,)*
        {
            type Message = M;

            #[allow(unused_variables, reason = "there may be no argument")]
            async fn prepare(&self, beginning: &Beginning<'_>, state: &S) -> Result<(), Error> {
                $($argument::prepare(beginning, state).await?;)*
                Ok(())
            }

            #[allow(non_snake_case, unused_variables, reason = "arguments are named as their types")]
            async fn call(
                &self,
                gathered: Gathered<'_>,
                messages: Vec<M>,
                state: &S,
            ) -> Result<Vec<Option<Outcome>>, Outcome> {
                $(let $argument = $argument::extract(&gathered, state).await?;)*
                let Some(batch) = gathered.batch(messages) else { return Ok(gathered.outcomes(Vec::new())) };
                let ran = self(batch, $($argument),*).await.into_outcomes()?;
                Ok(gathered.outcomes(ran))
            }
        }
    };
}

batch_handler!();
batch_handler!(A);
batch_handler!(A, B);
batch_handler!(A, B, C);
batch_handler!(A, B, C, D);

type Preparing<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;
type Running<'a> = Pin<Box<dyn Future<Output = Result<Vec<Option<Outcome>>, Failure>> + Send + 'a>>;

/// A batch handler bound to its state.
pub(crate) trait BoundBatch: Send + Sync {
    fn prepare<'a>(&'a self, beginning: &'a Beginning<'a>) -> Preparing<'a>;

    /// Runs it on some deliveries; one outcome for each, in order, or one failure that says nothing of each. `None` is one
    /// that runs alone; a single delivery always has an outcome, or the failure.
    fn call<'a>(&'a self, contexts: &'a [Context]) -> Running<'a>;
}

pub(crate) fn bind<A: 'static, S: Send + Sync + 'static, H: BatchHandler<A, S>>(
    handler: H,
    state: S,
) -> Box<dyn BoundBatch> {
    Box::new(WithState { handler, state, arguments: std::marker::PhantomData::<fn(A)> })
}

struct WithState<H, S, A> {
    handler: H,
    state: S,
    arguments: std::marker::PhantomData<fn(A)>,
}

impl<A: 'static, S: Send + Sync + 'static, H: BatchHandler<A, S>> BoundBatch for WithState<H, S, A> {
    fn prepare<'a>(&'a self, beginning: &'a Beginning<'a>) -> Preparing<'a> {
        Box::pin(self.handler.prepare(beginning, &self.state))
    }

    fn call<'a>(&'a self, contexts: &'a [Context]) -> Running<'a> {
        Box::pin(async move {
            let is_one = contexts.len() == 1;
            let mut decodes = Vec::with_capacity(contexts.len());
            let (mut gathered, mut messages) = (Vec::new(), Vec::new());
            for context in contexts {
                let decoded = context.envelope().decode();
                decodes.push(decoded.is_ok());
                match decoded {
                    Ok(message) => {
                        gathered.push(context);
                        messages.push(message);
                    }
                    Err(error) if is_one => return Err(Failure::poison("decode", error)),
                    Err(_) => {}
                }
            }
            if gathered.is_empty() {
                return Ok(contexts.iter().map(|_| None).collect());
            }
            let mut ran = match self.handler.call(Gathered::new(gathered), messages, &self.state).await {
                Ok(ran) => ran,
                Err(outcome) if is_one => vec![Some(outcome)],
                Err(outcome) => match outcome.verdict {
                    Ok(()) => contexts.iter().map(|_| None).collect(),
                    Err(failure) => return Err(failure),
                },
            }
            .into_iter();
            Ok(decodes.into_iter().map(|decodes| if decodes { ran.next().flatten() } else { None }).collect())
        })
    }
}

impl fmt::Debug for dyn BoundBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoundBatch")
    }
}
