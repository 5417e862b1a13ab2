//! The databases that an outbox can be in.

use std::fmt::Debug;
use std::future::Future;
use std::ops::DerefMut;
use std::sync::Arc;

use eventbus::fitness::Probe;
use eventbus::sql::{from_sqlx, is_unknown};
use eventbus::transport::Place;
use eventbus::{Error, ErrorKind, Result, Transport};
use sqlx::{Database, Pool};

use crate::direct::Direct;
use crate::namespace::Namespace;
use crate::operator::Dialect;
use crate::row::Row;
use crate::store::Store;

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// How a handler's event is known to be handled.
#[doc(hidden)]
#[derive(Debug)]
pub enum Known<'a> {
    /// By its own id.
    Message { id: uuid::Uuid },
    /// By its number in its key.
    Sequence { source: &'a str, key: &'a [u8], seq: i64 },
}

/// A database of `sqlx` whose transactions can hold events: `sqlx::Postgres` and `sqlx::Sqlite`, with the feature of the
/// same name.
///
/// It is sealed: what is asked of a database is proven for each.
pub trait Backend: Database + sealed::Sealed {
    /// What the transactions of a process share.
    #[doc(hidden)]
    type Writer: Debug + Default + Send + Sync + 'static;

    /// A transaction.
    #[doc(hidden)]
    type Unit: DerefMut<Target = Self::Connection> + Send + 'static;

    /// The statements, with the tables' names in them.
    #[doc(hidden)]
    type Statements: Debug + Send + Sync + 'static;

    #[doc(hidden)]
    fn statements(namespace: &Namespace) -> Self::Statements;

    #[doc(hidden)]
    fn migrate(pool: &Pool<Self>, namespace: &Namespace) -> impl Future<Output = Result<()>> + Send;

    #[doc(hidden)]
    fn begin(
        pool: &Pool<Self>,
        writer: &Arc<Self::Writer>,
    ) -> impl Future<Output = Result<Self::Unit>> + Send;

    #[doc(hidden)]
    fn commit(unit: Self::Unit) -> impl Future<Output = Result<(), Uncommitted>> + Send;

    #[doc(hidden)]
    fn rollback(unit: Self::Unit) -> impl Future<Output = Result<(), Uncommitted>> + Send;

    /// Stores events; returns by what the transaction can be found out. In a unit it fails where that is over already.
    #[doc(hidden)]
    fn append(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        rows: &[Row],
        in_unit: bool,
        direct: Option<&Direct>,
    ) -> impl Future<Output = Result<Fate>> + Send;

    /// Prepares transactions to publish into a transport by themselves; `false` = they cannot.
    #[doc(hidden)]
    fn adjoin(
        pool: &Pool<Self>,
        statements: &Self::Statements,
        transport: &Arc<dyn Transport>,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Fails where commits on a connection may be lost again, as far as it does not mend that; units that were begun here are
    /// sound.
    #[doc(hidden)]
    fn sound(connection: &mut Self::Connection) -> impl Future<Output = Result<()>> + Send;

    /// Fails where a commit would undo the transaction.
    #[doc(hidden)]
    fn check(connection: &mut Self::Connection) -> impl Future<Output = Result<()>> + Send;

    /// Whether relays of other processes wait to be told.
    #[doc(hidden)]
    const HAS_DOORBELL: bool;

    /// Tells relays of other processes that something was committed.
    #[doc(hidden)]
    fn announce(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Whether a transaction was committed; `None` = that cannot be said (yet).
    #[doc(hidden)]
    fn fate(
        pool: &Pool<Self>,
        statements: &Self::Statements,
        fate: &Fate,
        direct: Option<&Direct>,
    ) -> impl Future<Output = Result<Option<bool>>> + Send;

    /// Notes that a consumer handles an event; `false` = it did before. Waits for another transaction that does so now.
    #[doc(hidden)]
    fn remember(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        consumer: &str,
        known: &Known<'_>,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// The same for many, which are of one kind of memory and at most one of each key; one answer for each.
    #[doc(hidden)]
    fn remember_all(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        consumer: &str,
        known: &[Known<'_>],
    ) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Notes that a consumer begins a call for an event; returns how often it did, or `None` if it handled the event before.
    #[doc(hidden)]
    fn intend(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> impl Future<Output = Result<Option<u32>>> + Send;

    /// Notes that the call has ended.
    #[doc(hidden)]
    fn end(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Notes for how long a consumer remembers, in seconds, and how; returns how it was noted before.
    #[doc(hidden)]
    fn register(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
        consumer: &str,
        memory: &str,
        seconds: i64,
    ) -> impl Future<Output = Result<Option<String>>> + Send;

    /// Forgets what is older than its consumer remembers, up to a bound; returns whether there may be more.
    #[doc(hidden)]
    fn forget(
        connection: &mut Self::Connection,
        statements: &Self::Statements,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Whether there are tables; an error if they are not ours to use.
    #[doc(hidden)]
    fn verify(pool: &Pool<Self>, namespace: &Namespace) -> impl Future<Output = Result<bool>> + Send;

    /// What can be said of the server, or of the file.
    #[doc(hidden)]
    fn probes(pool: &Pool<Self>) -> impl Future<Output = Result<Vec<Probe>>> + Send;

    /// The words in which databases differ.
    #[doc(hidden)]
    const DIALECT: Dialect;

    /// Reads texts.
    #[doc(hidden)]
    fn texts(pool: &Pool<Self>, sql: String) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Runs statements in one transaction; returns how many rows the last of them changed.
    #[doc(hidden)]
    fn change(pool: &Pool<Self>, statements: Vec<String>) -> impl Future<Output = Result<u64>> + Send;

    /// What a relay works on: connections of its own.
    #[doc(hidden)]
    fn store(
        pool: &Pool<Self>,
        writer: &Arc<Self::Writer>,
        namespace: &Namespace,
    ) -> impl Future<Output = Result<Arc<dyn Store>>> + Send;
}

/// Why a commit is none, or is not known to be one.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub struct Uncommitted {
    pub(crate) is_unknown: bool,
    pub(crate) error: Arc<Error>,
}

impl Uncommitted {
    /// It is none.
    #[cfg(feature = "sqlite")]
    pub(crate) fn refused(error: Error) -> Self {
        Self { is_unknown: false, error: Arc::new(error) }
    }
}

impl Uncommitted {
    pub(crate) fn told(self) -> Error {
        Error::new(self.error.kind(), "the transaction was not committed").caused_by(self.error)
    }
}

impl From<sqlx::Error> for Uncommitted {
    fn from(error: sqlx::Error) -> Self {
        Self { is_unknown: is_unknown(&error), error: Arc::new(from_sqlx(error)) }
    }
}

/// By what a transaction can be found out.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// PostgreSQL: the id of the transaction, with its epoch; which life of the server gave it out, if that can be said; its last
    /// event.
    Transaction { id: u64, life: Option<i64>, event: uuid::Uuid },
    /// SQLite: the last event of the transaction.
    Event { row: i64, id: uuid::Uuid },
    /// SQLite: the last event of the transaction, in the bus itself.
    Published { place: Place, id: uuid::Uuid },
}

/// The version of the tables that this code reads and writes.
const VERSION: usize = 2;

/// The texts that make the tables, each of what the one before made.
pub(crate) type Steps = [&'static str; VERSION];

/// What is still to be run of the texts, by the version that tables say they are of; an error if they are not ours to use.
pub(crate) fn missing(version: Option<String>, steps: &'static Steps) -> Result<&'static [&'static str]> {
    let Some(text) = version else { return Ok(steps) };
    match text.parse::<usize>() {
        Ok(newer) if newer > VERSION => Err(Error::new(
            ErrorKind::Conflict,
            "the tables were made by a newer version of outbox: update this program",
        )
        .with("tables_version", newer)
        .with("known_version", VERSION)),
        Ok(at @ 1..) => Ok(steps.get(at..).unwrap_or_default()),
        _ => Err(Error::new(ErrorKind::Corrupt, "the tables have no readable version")
            .with("found", text.escape_debug())),
    }
}

/// Whether there are tables; an error if they are not ours to use as they are.
pub(crate) fn known(version: Option<String>, steps: &'static Steps) -> Result<bool> {
    let is_none = version.is_none();
    match missing(version, steps)? {
        [] => Ok(true),
        _ if is_none => Ok(false),
        _ => Err(Error::new(
            ErrorKind::Conflict,
            "the tables are of an older version: call migrate(), or run what is newer of outbox/sql/",
        )
        .with("known_version", VERSION)),
    }
}
