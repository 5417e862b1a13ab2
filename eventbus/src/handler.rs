//! Async functions as handlers, with extractors as arguments.

use std::future::Future;
use std::pin::Pin;

use crate::error::Error;
use crate::extract::{Beginning, Context, Extract};
use crate::outcome::{IntoOutcome, Outcome};

/// An async function that handles deliveries: up to eight extractors in, an outcome out.
///
/// ```
/// # use eventbus::{Emit, Event, Failure, State, Typed};
/// # use serde::{Serialize, Deserialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.placed", version = 1, key = order_id)]
/// # struct OrderPlaced { order_id: u64 }
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.stock.reserved", version = 1, key = order_id)]
/// # struct StockReserved { order_id: u64 }
/// # #[derive(Clone)] struct Stock;
/// # impl Stock { async fn hold(&self, _: u64) -> Result<(), std::io::Error> { Ok(()) } }
/// async fn reserve(Typed(order): Typed<OrderPlaced>, State(stock): State<Stock>) -> Result<Emit<StockReserved>, Failure> {
///     stock.hold(order.order_id).await?;
///     Ok(Emit(StockReserved { order_id: order.order_id }))
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler for state `{S}`",
    label = "not a handler",
    note = "a handler is an `async fn` whose arguments are extractors (Typed<E>, State<S>, Meta, Headers, Raw, Deadline, Attempt)",
    note = "and that returns (), Emit<E>, Emits, Reply<R>, or a Result of one of these with eventbus::Failure as its error",
    note = "State<T> needs `.with_state(…)` with a T"
)]
pub trait Handler<Arguments, S>: Clone + Send + Sync + 'static {
    /// The type and version that the arguments ask for.
    const MESSAGE: Option<(&'static str, u32)>;
    /// Whether that is a command, which has one owner.
    const IS_COMMAND: bool;

    /// Has each argument look whether runs can work.
    fn prepare(&self, beginning: &Beginning<'_>, state: &S)
    -> impl Future<Output = Result<(), Error>> + Send;

    /// Runs the handler on one delivery.
    fn call(&self, context: &Context, state: &S) -> impl Future<Output = Outcome> + Send;
}

const fn first(found: &[Option<(&'static str, u32)>]) -> Option<(&'static str, u32)> {
    let mut rest = found;
    while let [message, others @ ..] = rest {
        if message.is_some() {
            return *message;
        }
        rest = others;
    }
    None
}

macro_rules! handler {
    ($($argument:ident),*) => {
        impl<F, Fut, Out, S, $($argument),*> Handler<($($argument,)*), S> for F
        where
            F: Fn($($argument),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send,
            Out: IntoOutcome,
            S: Send + Sync + 'static,
            $($argument: Extract<S>,)*
        {
            const MESSAGE: Option<(&'static str, u32)> = first(&[$($argument::MESSAGE),*]);
            const IS_COMMAND: bool = false $(|| $argument::IS_COMMAND)*;

            #[allow(unused_variables, reason = "there may be no argument")]
            async fn prepare(&self, beginning: &Beginning<'_>, state: &S) -> Result<(), Error> {
                $($argument::prepare(beginning, state).await?;)*
                Ok(())
            }

            #[allow(non_snake_case, unused_variables, reason = "arguments are named as their types")]
            async fn call(&self, context: &Context, state: &S) -> Outcome {
                $(
                    let $argument = match $argument::extract(context, state).await {
                        Ok(value) => value,
                        Err(outcome) => return outcome,
                    };
                )*
                self($($argument),*).await.into_outcome()
            }
        }
    };
}

handler!();
handler!(A);
handler!(A, B);
handler!(A, B, C);
handler!(A, B, C, D);
handler!(A, B, C, D, E);
handler!(A, B, C, D, E, G);
handler!(A, B, C, D, E, G, H);
handler!(A, B, C, D, E, G, H, I);

type Preparing<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// A handler bound to its state; one boxed future for each delivery.
pub(crate) trait Bound: Send + Sync {
    fn prepare<'a>(&'a self, _: &'a Beginning<'a>) -> Preparing<'a> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn call<'a>(&'a self, context: &'a Context) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;
}

pub(crate) fn bind<A: 'static, S: Send + Sync + 'static, H: Handler<A, S>>(
    handler: H,
    state: S,
) -> Box<dyn Bound> {
    Box::new(WithState { handler, state, arguments: std::marker::PhantomData::<fn(A)> })
}

struct WithState<H, S, A> {
    handler: H,
    state: S,
    arguments: std::marker::PhantomData<fn(A)>,
}

impl<A: 'static, S: Send + Sync + 'static, H: Handler<A, S>> Bound for WithState<H, S, A> {
    fn prepare<'a>(&'a self, beginning: &'a Beginning<'a>) -> Preparing<'a> {
        Box::pin(self.handler.prepare(beginning, &self.state))
    }

    fn call<'a>(&'a self, context: &'a Context) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>> {
        Box::pin(self.handler.call(context, &self.state))
    }
}
