//! A transport whose events are in an SQLite file: what else is in that file may store events in its own transactions.

use std::borrow::Cow;
use std::fmt::Debug;
use std::path::Path;

use async_trait::async_trait;

use crate::envelope::Envelope;
use crate::error::Result;
use crate::id::EventId;
use crate::name::Topic;

/// A value of a statement, or of a row that it returned (SQLite's storage classes, without floating point).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SqlValue<'a> {
    /// Nothing.
    Null,
    /// A number.
    Integer(i64),
    /// A text.
    Text(Cow<'a, str>),
    /// Bytes.
    Blob(Cow<'a, [u8]>),
}

/// A connection of somebody else to the file, with a transaction open on it that holds the file's write lock.
#[async_trait]
pub trait Statements: Send {
    /// Runs one statement with values for `?1`, `?2` and so on; returns its rows.
    ///
    /// # Errors
    /// What the database says. The statement has done nothing then; those before it stay done.
    async fn run(&mut self, sql: &str, values: &[SqlValue<'_>]) -> Result<Vec<Vec<SqlValue<'static>>>>;
}

/// Where an event is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(pub i64);

/// Stores events inside of a transaction of somebody else, so that they are published if and only if it commits.
///
/// That is as good as publishing after the commit, and needs nobody who does: a file has one writer at a time, so places
/// are given out in the order of the commits, and a transaction that is undone gives its places back before anybody else is
/// given them.
#[async_trait]
pub trait InFile: Debug + Send + Sync {
    /// Returns the file.
    fn path(&self) -> &Path;

    /// Returns the largest event in bytes, headers counted.
    fn max_event_bytes(&self) -> usize;

    /// Stores events, each behind all that its partition holds; creates topics that are missing. Returns where the last
    /// one is, or nothing without an event.
    ///
    /// # Errors
    /// [`Full`](crate::ErrorKind::Full) for a file that has reached its bound, and [`TooLarge`](crate::ErrorKind::TooLarge):
    /// nothing was changed. What the database says: undo the transaction, or a savepoint around the call.
    ///
    /// # Cancellation
    /// As an error.
    async fn append(
        &self,
        transaction: &mut dyn Statements,
        events: &[(&Topic, Envelope)],
    ) -> Result<Option<Place>>;

    /// Returns source and id of the event at a place, if one is there: retention may have removed it.
    ///
    /// # Errors
    /// What the database says.
    ///
    /// # Cancellation
    /// Safe.
    async fn at(&self, connection: &mut dyn Statements, place: Place) -> Result<Option<(String, EventId)>>;

    /// Says that a transaction with events was committed. Without it consumers of this value look after 5 ms.
    fn committed(&self);
}
