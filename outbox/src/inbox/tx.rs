//! The transaction of a handler.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{
    Beginning, Context, Envelope, EventId, Extract, ExtractBatch, Failure, FromState, Gathered, Message,
    Outcome, Result, Topic, Unit,
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::Inbox;
use crate::backend::Backend;
use crate::outbox::whole;
use crate::transaction::Open;

/// How long the end of a run that failed is waited for; it goes on without us.
const ROLLBACK: Duration = Duration::from_secs(1);

/// The transaction of a run: an argument of a handler, used as a connection (`&mut *tx`).
///
/// It begins before the handler, with the note that the event is handled; an event that was handled before is settled
/// without a run. It is committed after the handler with all that the handler wrote, [published](Self::publish) and
/// returned ([`Emit`](eventbus::Emit), [`Reply`](eventbus::Reply)), and only then is the event settled: all of it happens
/// once, or not yet. A handler that fails, panics or runs out of time leaves nothing.
///
/// What the handler does outside of the database, such as a mail, is not part of it and may happen again. The value must be
/// dropped when the handler returns; one that is kept makes the run fail.
///
/// A batch handler (`async fn(Batch<E>, Tx<Db>)`) has one for all events of a call, which is given those that were not handled
/// before. Where one of them fails, nothing of the call is committed, and each runs alone, as a batch of one.
///
/// ```
/// # use eventbus::{Batch, Event, Failure, Outcomes};
/// # use outbox::Tx;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(type = "shop.order.placed", version = 1, key = order_id)]
/// # struct OrderPlaced { order_id: i64 }
/// # #[cfg(feature = "postgres")]
/// async fn index(orders: Batch<OrderPlaced>, mut tx: Tx<sqlx::Postgres>) -> Result<Outcomes, Failure> {
///     let ids: Vec<i64> = orders.iter().map(|order| order.message.order_id).collect();
///     sqlx::query("INSERT INTO bills SELECT unnest($1)").bind(ids).execute(&mut *tx).await?;
///     Ok(orders.done())
/// }
/// ```
pub struct Tx<Db: Backend>(OwnedMutexGuard<Open<Db>>);

impl<Db: Backend> Tx<Db> {
    /// Publishes a message with the commit; returns its id.
    ///
    /// # Errors
    /// [`TooLarge`](eventbus::ErrorKind::TooLarge) or [`Invalid`](eventbus::ErrorKind::Invalid): nothing is added.
    pub fn publish<M: Message>(&mut self, topic: &Topic, message: &M) -> Result<EventId> {
        self.0.publish(topic, message)
    }

    /// Publishes an envelope with the commit.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn publish_envelope(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        self.0.publish_envelope(topic, event)
    }
}

impl<Db: Backend> Deref for Tx<Db> {
    type Target = Db::Connection;

    fn deref(&self) -> &Self::Target {
        &self.0.transaction
    }
}

impl<Db: Backend> DerefMut for Tx<Db> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0.transaction
    }
}

impl<Db: Backend> fmt::Debug for Tx<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tx").field(&*self.0).finish()
    }
}

impl<Db: Backend, S: Sync> Extract<S> for Tx<Db>
where
    Inbox<Db>: FromState<S>,
{
    async fn prepare(beginning: &Beginning<'_>, state: &S) -> Result<()> {
        let inbox = Inbox::<Db>::from_state(state);
        inbox.prepare(beginning, inbox.0.memory).await
    }

    async fn extract(context: &Context, state: &S) -> Result<Self, Outcome> {
        let inbox = Inbox::<Db>::from_state(state);
        let Some(open) = inbox.begin(context).await? else { return Err(Outcome::duplicate()) };
        let (tx, run) = shared(open).await;
        context.enlist(run)?;
        Ok(tx)
    }
}

impl<Db: Backend, S: Sync> ExtractBatch<S> for Tx<Db>
where
    Inbox<Db>: FromState<S>,
{
    async fn prepare(beginning: &Beginning<'_>, state: &S) -> Result<()> {
        let inbox = Inbox::<Db>::from_state(state);
        inbox.prepare(beginning, inbox.0.memory).await
    }

    async fn extract(call: &Gathered<'_>, state: &S) -> Result<Self, Outcome> {
        let inbox = Inbox::<Db>::from_state(state);
        let open = match call.contexts() {
            [one] => inbox.begin(one).await?.ok_or_else(Outcome::duplicate)?,
            _ => inbox.begin_all(call).await?,
        };
        let (tx, run) = shared(open).await;
        call.enlist(run)?;
        Ok(tx)
    }
}

/// A transaction for a handler, and for the driver, which ends it.
pub(super) async fn shared<Db: Backend>(open: Open<Db>) -> (Tx<Db>, Run<Db>) {
    let open = Arc::new(AsyncMutex::new(open));
    (Tx(open.clone().lock_owned().await), Run(open))
}

impl<Db: Backend> Run<Db> {
    /// The end of a run whose handler has no transaction.
    pub(super) fn of(open: Open<Db>) -> Self {
        Self(Arc::new(AsyncMutex::new(open)))
    }
}

/// The transaction as the driver ends it.
#[derive(Debug)]
pub(super) struct Run<Db: Backend>(Arc<AsyncMutex<Open<Db>>>);

#[async_trait]
impl<Db: Backend> Unit for Run<Db> {
    async fn commit(self: Box<Self>, outputs: Vec<(Topic, Envelope)>) -> Result<(), Failure> {
        let Some(open) = Arc::into_inner(self.0) else {
            return Err(Failure::permanent("inbox.kept", "the handler kept its Tx when it returned"));
        };
        let mut open = open.into_inner();
        for (topic, event) in outputs {
            if let Err(error) = open.publish_envelope(&topic, event) {
                _ = whole(open.rollback()).await;
                return Err(error.into());
            }
        }
        whole(open.commit()).await.map_err(Failure::from)
    }

    async fn abandon(self: Box<Self>) {
        // Whoever still has it ends it by dropping it.
        let Some(open) = Arc::into_inner(self.0) else { return };
        // A statement that is still running is waited for by the connection, not by us.
        if tokio::time::timeout(ROLLBACK, whole(open.into_inner().rollback())).await.is_err() {
            tracing::debug!("the rollback of a failed run goes on");
        }
    }
}
