//! Batch handlers: many events in one call, one outcome for each.

use std::fmt;
use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;

use crate::envelope::Envelope;
use crate::event::Message;
use crate::extract::{Context, FromState, State};
use crate::failure::Failure;
use crate::outcome::{IntoOutcome, Outcome};

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
/// whole call, or a panic, says nothing of one event: each runs alone.
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

/// An async function that handles batches: a [`Batch`], and optionally a [`State`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a batch handler for state `{S}`",
    label = "not a batch handler",
    note = "a batch handler is an `async fn(Batch<E>)` or `async fn(Batch<E>, State<T>)` that returns Outcomes or Result<Outcomes, Failure>"
)]
pub trait BatchHandler<Arguments, S>: Clone + Send + Sync + 'static {
    /// The messages it takes.
    type Message: Message;

    /// Runs the handler.
    #[doc(hidden)]
    fn call(
        &self,
        batch: Batch<Self::Message>,
        state: &S,
    ) -> impl Future<Output = Result<Vec<Outcome>, Failure>> + Send;
}

impl<F, Fut, Out, M, S> BatchHandler<(Batch<M>,), S> for F
where
    F: Fn(Batch<M>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Out> + Send,
    Out: IntoOutcomes,
    M: Message,
    S: Send + Sync + 'static,
{
    type Message = M;

    async fn call(&self, batch: Batch<M>, _: &S) -> Result<Vec<Outcome>, Failure> {
        self(batch).await.into_outcomes()
    }
}

impl<F, Fut, Out, M, T, S> BatchHandler<(Batch<M>, State<T>), S> for F
where
    F: Fn(Batch<M>, State<T>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Out> + Send,
    Out: IntoOutcomes,
    M: Message,
    T: FromState<S> + Send,
    S: Send + Sync + 'static,
{
    type Message = M;

    async fn call(&self, batch: Batch<M>, state: &S) -> Result<Vec<Outcome>, Failure> {
        self(batch, State(T::from_state(state))).await.into_outcomes()
    }
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<Vec<Outcome>, Failure>> + Send + 'a>>;

/// A batch handler bound to its state.
pub(crate) trait BoundBatch: Send + Sync {
    /// Runs it on some deliveries; one outcome for each, in order, or one failure that says nothing of each.
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
    fn call<'a>(&'a self, contexts: &'a [Context]) -> Running<'a> {
        Box::pin(async move {
            let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(contexts.len());
            let mut items = Vec::with_capacity(contexts.len());
            for context in contexts {
                outcomes.push(match context.envelope().decode() {
                    Ok(message) => {
                        let (envelope, attempt) = (context.envelope().clone(), context.attempt());
                        items.push(Item { message, envelope, attempt });
                        None
                    }
                    Err(error) => Some(Failure::poison("decode", error).into_outcome()),
                });
            }
            if !items.is_empty() {
                let mut each = self.handler.call(Batch { items }, &self.state).await?.into_iter();
                outcomes.iter_mut().filter(|outcome| outcome.is_none()).for_each(|gap| *gap = each.next());
            }
            let absent = || Failure::transient("batch", "the handler gave no outcome").into_outcome();
            Ok(outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(absent)).collect())
        })
    }
}

impl fmt::Debug for dyn BoundBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoundBatch")
    }
}
