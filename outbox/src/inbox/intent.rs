//! Handlers that call somebody else, whose doing is not in the database.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use eventbus::{
    Beginning, Context, Envelope, Error, ErrorKind, Extract, Failure, FromState, Outcome, Result, Topic, Unit,
};
use parking_lot::Mutex;
use uuid::Uuid;

use super::identity::age;
use super::tx::{Run, Tx, shared};
use super::{Inbox, Memory, named};
use crate::backend::{Backend, Known};
use crate::outbox::{Outbox, whole};
use crate::row::dedup_id;
use crate::transaction::Open;

/// A call to somebody else, such as a payment or a mail: an argument of a handler.
///
/// That the call begins is committed before the handler runs, and that it ended after it, in one transaction with what the
/// handler returns ([`Emit`](eventbus::Emit), [`Reply`](eventbus::Reply)) and with what it writes in that of
/// [`finish`](Self::finish). An event whose handler ended is passed over, as with a [`Tx`]. Where the process ends in between,
/// or the handler fails, it runs again, with the same [`key`](Self::key): what is published and written happens once, and
/// **the call itself at least once**; once only if whoever is called keeps to the key (HTTP's `Idempotency-Key`, as the draft
/// `draft-ietf-httpapi-idempotency-key-header` has it), for at least as long as the event may be repeated.
/// [`is_repeated`](Self::is_repeated) says when to ask whether it happened, where they can be asked.
///
/// Events are known by their ids, whatever the [`Memory`]. It costs two commits an event, where a [`Tx`] costs one.
///
/// ```
/// # use eventbus::{Emit, Event, Failure, State, Typed};
/// # use outbox::Intent;
/// # use serde::{Serialize, Deserialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.placed", version = 1, key = order_id)]
/// # struct OrderPlaced { order_id: i64, cents: i64 }
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.paid", version = 1, key = order_id)]
/// # struct OrderPaid { order_id: i64 }
/// # #[derive(Clone)] struct Bank;
/// # impl Bank { async fn charge(&self, _: i64, _key: &str) -> Result<String, std::io::Error> { Ok(String::new()) } }
/// # #[cfg(feature = "postgres")]
/// async fn pay(
///     Typed(order): Typed<OrderPlaced>,
///     State(bank): State<Bank>,
///     intent: Intent<sqlx::Postgres>,
/// ) -> Result<Emit<OrderPaid>, Failure> {
///     let receipt = bank.charge(order.cents, intent.key()).await?;
///     let mut tx = intent.finish().await?;
///     sqlx::query("INSERT INTO payments VALUES ($1, $2)").bind(order.order_id).bind(receipt).execute(&mut *tx).await?;
///     Ok(Emit(OrderPaid { order_id: order.order_id }))
/// }
/// ```
pub struct Intent<Db: Backend> {
    key: String,
    runs: u32,
    call: Arc<Call<Db>>,
}

/// What a run's handler and its driver share.
struct Call<Db: Backend> {
    outbox: Outbox<Db>,
    consumer: String,
    id: Uuid,
    /// The transaction of its result, once it has begun.
    run: Mutex<Option<Run<Db>>>,
    is_finished: AtomicBool,
}

impl<Db: Backend> Intent<Db> {
    /// Returns the key of idempotence: a UUID of the event and the consumer (`service.handler@generation`), the same in every
    /// run, and another one for another handler of the event.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns whether a run before this one began and did not end: the call may have happened.
    pub fn is_repeated(&self) -> bool {
        self.runs > 1
    }

    /// Begins the transaction in which the call ends: the handler's writes, what it publishes and returns, and that the event
    /// is handled. To be called at most once, after the call; without it the end is a transaction of its own.
    ///
    /// # Errors
    /// Transient; also if another member has ended the event meanwhile: then it is passed over next. Permanent for a second
    /// call.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn finish(&self) -> Result<Tx<Db>, Failure> {
        // The second would wait for the first.
        if self.call.is_finished.swap(true, Ordering::AcqRel) {
            return Err(Failure::permanent("intent.finished", "a handler finishes its Intent once"));
        }
        let ended = self.call.end().await;
        self.call.is_finished.store(ended.is_ok(), Ordering::Release);
        let (tx, run) = shared(ended?).await;
        *self.call.run.lock() = Some(run);
        Ok(tx)
    }
}

impl<Db: Backend> Call<Db> {
    /// A transaction with the note that the event is handled.
    async fn end(&self) -> Result<Open<Db>, Failure> {
        let (outbox, consumer, id) = (self.outbox.clone(), self.consumer.clone(), self.id);
        let ended = whole(async move {
            let mut open = outbox.clone().opened().await?;
            let statements = outbox.statements();
            let noted = async {
                let is_first =
                    Db::remember(&mut open.transaction, statements, &consumer, &Known::Message { id })
                        .await?;
                Db::end(&mut open.transaction, statements, &consumer, id).await?;
                Ok(is_first)
            };
            match noted.await {
                Ok(true) => Ok(open),
                Ok(false) => {
                    _ = open.rollback().await;
                    Err(Error::new(ErrorKind::Conflict, "another member of the group has handled the event"))
                }
                Err(error) => {
                    // One that fails ends with its connection.
                    _ = open.rollback().await;
                    Err(error)
                }
            }
        });
        ended.await.map_err(|error| match error.kind() {
            // The next run finds out, and is none.
            ErrorKind::Conflict => Failure::transient("intent.overtaken", error),
            _ => error.into(),
        })
    }
}

impl<Db: Backend> Inbox<Db> {
    /// Notes that a call begins; returns how often it did, or `None` if the event was handled before.
    async fn intend(&self, context: &Context) -> Result<Option<Intent<Db>>, Failure> {
        let event = context.envelope();
        named(context.handler())?;
        let memory = self.by_events();
        let (consumer, keep) = (self.consumer(context.group(), context.handler()), memory.keep());
        self.register(&consumer, memory).await?;
        let is_redriven = event.extension("evt-replay-group").is_some();
        let is_old = !is_redriven && age(event).is_some_and(|age| age > keep);
        let (outbox, id) = (self.outbox().clone(), dedup_id(event));
        let call = Call {
            outbox: outbox.clone(),
            consumer: consumer.clone(),
            id,
            run: Mutex::default(),
            is_finished: AtomicBool::default(),
        };
        let key = Uuid::new_v5(&id, consumer.as_bytes()).to_string();
        let begun = whole(async move {
            let mut open = outbox.clone().opened().await?;
            match Db::intend(&mut open.transaction, outbox.statements(), &consumer, id).await {
                Ok(Some(1)) if is_old => {
                    _ = open.rollback().await;
                    Err(super::too_old(keep))
                }
                Ok(runs) => open.commit().await.map(|()| runs),
                Err(error) => {
                    _ = open.rollback().await;
                    Err(error)
                }
            }
        });
        Ok(begun.await?.map(|runs| Intent { key, runs, call: Arc::new(call) }))
    }

    /// How its handlers with an [`Intent`] remember.
    fn by_events(&self) -> Memory {
        Memory::Events { keep: self.0.memory.keep() }
    }
}

impl<Db: Backend, S: Sync> Extract<S> for Intent<Db>
where
    Inbox<Db>: FromState<S>,
{
    async fn prepare(beginning: &Beginning<'_>, state: &S) -> Result<()> {
        let inbox = Inbox::<Db>::from_state(state);
        inbox.prepare(beginning, inbox.by_events()).await
    }

    async fn extract(context: &Context, state: &S) -> Result<Self, Outcome> {
        let inbox = Inbox::<Db>::from_state(state);
        let Some(intent) = inbox.intend(context).await? else { return Err(Outcome::duplicate()) };
        context.enlist(Calling(intent.call.clone()))?;
        Ok(intent)
    }
}

/// The call as the driver ends it.
#[derive(Debug)]
struct Calling<Db: Backend>(Arc<Call<Db>>);

#[async_trait]
impl<Db: Backend> Unit for Calling<Db> {
    async fn commit(self: Box<Self>, outputs: Vec<(Topic, Envelope)>) -> Result<(), Failure> {
        let begun = self.0.run.lock().take();
        let run = match begun {
            Some(run) => run,
            None => Run::of(self.0.end().await?),
        };
        Box::new(run).commit(outputs).await
    }

    /// That the call began stays noted: it may have happened.
    async fn abandon(self: Box<Self>) {
        let begun = self.0.run.lock().take();
        if let Some(run) = begun {
            Box::new(run).abandon().await;
        }
    }
}

impl<Db: Backend> fmt::Debug for Intent<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intent").field("key", &self.key).field("runs", &self.runs).finish_non_exhaustive()
    }
}

impl<Db: Backend> fmt::Debug for Call<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("consumer", &self.consumer).field("id", &self.id).finish_non_exhaustive()
    }
}
