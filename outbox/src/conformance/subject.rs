//! What a store's author gives the suite.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{Envelope, Result, Topic};

use crate::store::Store;

/// An outbox under test, which holds nothing yet.
#[async_trait]
pub trait Subject: Send + Sync + 'static {
    /// Opens the store, as a relay of another process would: what is opened shares the tables and nothing else.
    ///
    /// # Errors
    /// What the database says.
    async fn store(&self) -> Result<Arc<dyn Store>>;

    /// Begins a transaction.
    ///
    /// # Errors
    /// What the database says.
    async fn begin(&self) -> Result<Box<dyn Writing>>;

    /// Returns the longest wait for what must happen; a case ends after four times as long.
    fn patience(&self) -> Duration {
        Duration::from_secs(20)
    }

    /// Whether a transaction begins only when the one before it has ended.
    fn writes_in_turn(&self) -> bool {
        false
    }
}

/// A transaction that stores events.
#[async_trait]
pub trait Writing: Send {
    /// Stores an event in the transaction, at once.
    ///
    /// # Errors
    /// What the database says.
    async fn append(&mut self, topic: &Topic, event: Envelope) -> Result<()>;

    /// Commits it.
    ///
    /// # Errors
    /// What the database says.
    async fn commit(self: Box<Self>) -> Result<()>;

    /// Undoes it.
    ///
    /// # Errors
    /// What the database says.
    async fn rollback(self: Box<Self>) -> Result<()>;
}
