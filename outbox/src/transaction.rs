//! A transaction that publishes what it was given when it commits.

use std::fmt;
use std::ops::{Deref, DerefMut};

use eventbus::{Envelope, Error, ErrorKind, EventId, Message, Result, Topic};

use crate::backend::{Backend, Uncommitted};
use crate::outbox::{Outbox, Ticket, whole};
use crate::row::Row;

/// A transaction of the database, and what it publishes.
///
/// It is used as a connection: `sqlx::query(…).execute(&mut *tx)`. Events are kept until [`commit`](Self::commit) and
/// stored in one statement just before it. Dropped without a commit, it is rolled back and nothing is published.
#[must_use = "what is not committed is rolled back"]
pub struct Transaction<Db: Backend>(pub(crate) Open<Db>);

/// What a transaction is made of; shared with the one that handlers are given.
pub(crate) struct Open<Db: Backend> {
    outbox: Outbox<Db>,
    pub(crate) transaction: Db::Unit,
    events: Events,
    ticket: Option<Ticket>,
}

/// Events that are not stored yet.
struct Events(Vec<Row>);

impl Drop for Events {
    fn drop(&mut self) {
        if !self.0.is_empty() && !std::thread::panicking() {
            tracing::warn!(
                n_events = self.0.len(),
                "a transaction ended without a commit: what it would have published is not published"
            );
        }
    }
}

impl<Db: Backend> Open<Db> {
    pub(crate) fn new(outbox: Outbox<Db>, transaction: Db::Unit) -> Self {
        Self { outbox, transaction, events: Events(Vec::new()), ticket: None }
    }

    pub(crate) fn publish<M: Message>(&mut self, topic: &Topic, message: &M) -> Result<EventId> {
        let event = Envelope::of(message, self.outbox.options().source.clone())?;
        let id = event.id().clone();
        self.publish_envelope(topic, event)?;
        Ok(id)
    }

    pub(crate) fn publish_envelope(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        self.events.0.push(Row::new(topic, event, self.outbox.options().max_event_bytes)?);
        Ok(())
    }

    pub(crate) async fn flush(&mut self) -> Result<Option<Ticket>> {
        if let Some(ticket) = self.outbox.append(&mut self.transaction, &self.events.0, true).await? {
            self.events.0.clear();
            self.ticket = Some(ticket);
        }
        Ok(self.ticket)
    }

    /// Stores the events; fails where a commit would not be one.
    async fn ready(&mut self) -> Result<()> {
        // One inside of it that failed to begin takes the outer one with it (sqlx 0.9.0), and its commit says nothing.
        if !sqlx::Connection::is_in_transaction(&*self.transaction) {
            let message = "the transaction was ended by one inside of it";
            return Err(Error::new(ErrorKind::Unexpected, message));
        }
        match self.events.0.is_empty() {
            true => Db::check(&mut self.transaction).await,
            false => self.flush().await.map(drop),
        }
    }

    /// Stores the events and commits; to be run on a task of its own.
    pub(crate) async fn commit(mut self) -> Result<()> {
        if let Err(error) = self.ready().await {
            // A rollback may fail as well: then the connection ends, and the transaction with it.
            _ = self.rollback().await;
            return Err(error);
        }
        let committed = match Db::commit(self.transaction).await {
            Ok(()) => Ok(()),
            Err(Uncommitted { is_unknown: true, error }) => {
                let fate = match self.ticket {
                    Some(ticket) => self.outbox.find_out(ticket).await,
                    None => None,
                };
                match fate {
                    Some(true) => Ok(()),
                    Some(false) => {
                        let message = "the connection ended, and the transaction was rolled back";
                        Err(Error::new(ErrorKind::Unavailable, message).caused_by(error))
                    }
                    None => {
                        let message = "the connection ended before the commit was answered";
                        Err(Error::new(ErrorKind::Unknown, message).caused_by(error))
                    }
                }
            }
            Err(failed) => Err(failed.told()),
        };
        if self.ticket.is_some() {
            self.outbox.wake();
        }
        committed
    }

    pub(crate) async fn rollback(mut self) -> Result<()> {
        self.events.0.clear();
        Db::rollback(self.transaction).await.map_err(Uncommitted::told)
    }
}

impl<Db: Backend> Transaction<Db> {
    /// Publishes a message if the transaction commits; returns its id.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) or [`Invalid`](ErrorKind::Invalid): nothing is added, and the transaction goes on.
    pub fn publish<M: Message>(&mut self, topic: &Topic, message: &M) -> Result<EventId> {
        self.0.publish(topic, message)
    }

    /// Publishes an envelope if the transaction commits.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn publish_envelope(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        self.0.publish_envelope(topic, event)
    }

    /// Stores the events now, so that only the commit is left; returns by what its outcome can be asked for afterwards,
    /// with [`Outbox::resolve`]. `None` where nothing was published. Keys are held from here on.
    ///
    /// # Errors
    /// As [`Outbox::publish_all`].
    ///
    /// # Cancellation
    /// The events may be stored in the transaction, or not: roll it back.
    pub async fn flush(&mut self) -> Result<Option<Ticket>> {
        self.0.flush().await
    }

    /// Stores the events, commits, and wakes the relays of this process.
    ///
    /// When the connection ends before the commit is answered, PostgreSQL is asked for up to five seconds what became of
    /// the transaction, if it published something.
    ///
    /// # Errors
    /// [`Unknown`](ErrorKind::Unknown): it may be committed with everything in it, or not at all. Ask
    /// [`Outbox::resolve`] with what [`flush`](Self::flush) returned, or repeat the work in a way that finds out.
    /// Otherwise nothing is committed: transient for a deadlock, a serialisation failure or a lost connection;
    /// permanent for a constraint that is checked at the commit, and as [`Outbox::publish_all`].
    ///
    /// # Cancellation
    /// It goes on, and only the knowledge is lost.
    pub async fn commit(self) -> Result<()> {
        whole(self.0.commit()).await
    }

    /// Undoes everything, and publishes nothing. On SQLite it waits until what it may have read is committed.
    ///
    /// # Errors
    /// Transient: it is undone all the same, with its connection; on SQLite what it read may be undone as well.
    ///
    /// # Cancellation
    /// It goes on.
    pub async fn rollback(self) -> Result<()> {
        whole(self.0.rollback()).await
    }
}

impl<Db: Backend> Deref for Transaction<Db> {
    type Target = Db::Connection;

    fn deref(&self) -> &Self::Target {
        &self.0.transaction
    }
}

impl<Db: Backend> DerefMut for Transaction<Db> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0.transaction
    }
}

impl<Db: Backend> fmt::Debug for Open<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open")
            .field("database", &Db::NAME)
            .field("n_events", &self.events.0.len())
            .finish_non_exhaustive()
    }
}

impl<Db: Backend> fmt::Debug for Transaction<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Transaction").field(&self.0).finish()
    }
}
