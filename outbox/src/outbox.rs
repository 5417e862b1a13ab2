//! Publishing inside a transaction.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use eventbus::{Bus, Envelope, Error, ErrorKind, EventId, Message, Result, Text, Topic};
use sqlx::Pool;

use crate::backend::{Backend, Fate};
use crate::bell::Bell;
use crate::direct::Direct;
use crate::doorbell::Doorbell;
use crate::namespace::Namespace;
use crate::row::Row;
use crate::store::Store;
use crate::transaction::{Open, Transaction};

/// Most keys in one transaction: each is a lock of PostgreSQL, whose table of locks is shared by all.
const MAX_KEYS: usize = 512;

/// Settings of an [`Outbox`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Where the tables are.
    pub namespace: Namespace,
    /// The CloudEvents `source` of what is published; `/` and the program's name by default.
    pub source: Text,
    /// Largest event in bytes, headers and the relay's marks counted: what the broker takes, as the event is refused
    /// before the commit. 983,040 by default, which is what all brokers take unless they are set otherwise.
    pub max_event_bytes: usize,
    /// Whether commits are told to relays of other processes on PostgreSQL, which else look by themselves every quarter of a
    /// second: with `NOTIFY` on a connection of the pool, after the commit and at most twenty times a second. They are by
    /// default. (On SQLite, relays see that the file has changed.)
    pub doorbell: bool,
}

impl Default for Options {
    fn default() -> Self {
        let program = std::env::current_exe().ok();
        let stem = program.as_deref().and_then(|path| path.file_stem()).and_then(|stem| stem.to_str());
        Self {
            namespace: Namespace::default(),
            source: format!("/{}", stem.unwrap_or("outbox")).into(),
            max_event_bytes: 983_040,
            doorbell: true,
        }
    }
}

impl Options {
    /// Sets where the tables are.
    #[must_use]
    pub fn with_namespace(self, namespace: Namespace) -> Self {
        Self { namespace, ..self }
    }

    /// Sets the CloudEvents `source` of what is published.
    #[must_use]
    pub fn with_source(self, source: impl Into<Text>) -> Self {
        Self { source: source.into(), ..self }
    }

    /// Sets the largest event in bytes, headers counted.
    #[must_use]
    pub fn with_max_event_bytes(self, bytes: usize) -> Self {
        Self { max_event_bytes: bytes, ..self }
    }

    /// Sets whether commits are told to relays of other processes.
    #[must_use]
    pub fn with_doorbell(self, doorbell: bool) -> Self {
        Self { doorbell, ..self }
    }
}

/// Events as rows of the transactions that they tell of. Cheap to clone; clones wake the same relays.
///
/// | Bound | Value |
/// |---|---|
/// | an event | 983,040 bytes, [`Options::max_event_bytes`] |
/// | keys in one transaction | 512; any number of events |
///
/// What is published in one transaction is in the order of the calls, for each key and topic; transactions that publish
/// under one key are in the order of their commits. A transaction holds its keys from its first append to its end, so that
/// another one with the same key waits: append last. [`Transaction`] does so by itself.
pub struct Outbox<Db: Backend>(Arc<Inner<Db>>);

struct Inner<Db: Backend> {
    pool: Pool<Db>,
    options: Options,
    statements: Db::Statements,
    bell: Bell,
    doorbell: Doorbell,
    writer: Arc<Db::Writer>,
    direct: OnceLock<Direct>,
}

/// A transaction whose commit may not have been answered: asked with [`Outbox::resolve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub(crate) Fate);

impl<Db: Backend> Outbox<Db> {
    /// An outbox in the database of these connections, with the default settings.
    pub fn new(pool: Pool<Db>) -> Self {
        Self::with_options(pool, Options::default())
    }

    /// An outbox with settings of one's own.
    pub fn with_options(pool: Pool<Db>, options: Options) -> Self {
        let statements = Db::statements(&options.namespace);
        let (bell, doorbell) = (Bell::default(), Doorbell::default());
        let (writer, direct) = (Arc::default(), OnceLock::new());
        Self(Arc::new(Inner { pool, options, statements, bell, doorbell, writer, direct }))
    }

    /// Creates what is missing of the tables. Programs that start at once do not disturb each other.
    ///
    /// Who migrates by other means runs the files in `outbox/sql/` instead; they say what version they are.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) for tables of a newer version; [`Unauthorized`](ErrorKind::Unauthorized) where
    /// the user may not create tables; or transient.
    ///
    /// # Cancellation
    /// It is all there or nothing.
    pub async fn migrate(&self) -> Result<()> {
        let (pool, namespace) = (self.0.pool.clone(), self.0.options.namespace.clone());
        whole(async move { Db::migrate(&pool, &namespace).await }).await
    }

    /// Has transactions publish into a bus by themselves, from now on and with all clones, if its topics are in the same SQLite
    /// file: an event is in its topic when the transaction is committed, and there is no relay between them. Returns whether
    /// that is so; with any other bus or database nothing changes.
    ///
    /// The order and the guarantees are those of a relay, without its repetitions. Start a relay all the same: while the
    /// outbox holds anything (from before, of other programs, or because the bus's file has reached its bound), transactions
    /// put their events behind it.
    ///
    /// # Errors
    /// As [`verify`](Self::verify); [`Conflict`](ErrorKind::Conflict) after a call with another bus.
    ///
    /// # Cancellation
    /// It is so or not; repeat it.
    pub async fn publish_into(&self, bus: &Bus) -> Result<bool> {
        let (outbox, transport) = (self.clone(), bus.transport().clone());
        let adjoin = async move { Db::adjoin(&outbox.0.pool, &outbox.0.statements, &transport).await };
        if !whole(adjoin).await? {
            return Ok(false);
        }
        let store = self.store().await?;
        let identity = store.identity().await;
        store.close().await;
        let direct = Direct { transport: bus.transport().clone(), identity: identity?.into() };
        match Arc::ptr_eq(&self.0.direct.get_or_init(|| direct).transport, bus.transport()) {
            true => Ok(true),
            false => Err(Error::new(ErrorKind::Conflict, "the outbox publishes into another bus already")),
        }
    }

    /// Begins a transaction that publishes when it commits. On SQLite it takes the file's write lock at once: one that begins
    /// to write later may be refused in the middle. There the transactions of a process take turns, and it waits up to
    /// ten seconds for its own; those that wait for each other are savepoints of one transaction and committed together.
    ///
    /// # Errors
    /// Transient if the database gives no connection, or its turn does not come; [`Config`](ErrorKind::Config) on an SQLite
    /// connection that does not sync its commits.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn begin(&self) -> Result<Transaction<Db>> {
        self.open().await.map(Transaction)
    }

    /// Stores an event in a transaction of one's own, at once; returns its id. It must be the last thing that the
    /// transaction does, and the only call of this kind: two may wait for each other's keys in two transactions, of which
    /// the database then ends one. [`begin`](Self::begin) has no such rule.
    ///
    /// No relay is woken, and finds the event within a quarter of a second: say [`wake`](Self::wake) after the commit.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) or [`Invalid`](ErrorKind::Invalid) for the event; [`NotFound`](ErrorKind::NotFound)
    /// without tables; [`Config`](ErrorKind::Config) on an SQLite connection that does not sync its commits; or transient.
    /// After an error of the database the transaction cannot be committed on PostgreSQL.
    ///
    /// # Cancellation
    /// The event may be stored in the transaction, or not: roll it back.
    pub async fn publish<M: Message>(
        &self,
        transaction: &mut Db::Connection,
        topic: &Topic,
        message: &M,
    ) -> Result<EventId> {
        let event = Envelope::of(message, self.0.options.source.clone())?;
        let id = event.id().clone();
        self.publish_all(transaction, [(topic.clone(), event)]).await?;
        Ok(id)
    }

    /// Stores any number of events in their order, as [`publish`](Self::publish) does, in one statement; returns by what the
    /// transaction can be asked for. Without an event nothing is stored and nothing returned.
    ///
    /// # Errors
    /// As [`publish`](Self::publish); [`TooLarge`](ErrorKind::TooLarge) for more than 512 keys.
    ///
    /// # Cancellation
    /// As [`publish`](Self::publish).
    pub async fn publish_all(
        &self,
        transaction: &mut Db::Connection,
        events: impl IntoIterator<Item = (Topic, Envelope)>,
    ) -> Result<Option<Ticket>> {
        let max = self.0.options.max_event_bytes;
        let rows = events.into_iter().map(|(topic, event)| Row::new(&topic, event, max));
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        Db::sound(transaction).await?;
        self.append(transaction, &rows, false).await
    }

    /// Wakes the relays: something was committed. Those of other processes hear of it up to 50 ms later, if the
    /// [doorbell](Options::doorbell) can be rung.
    pub fn wake(&self) {
        self.0.bell.ring();
        if let Some(bus) = self.0.direct.get().and_then(Direct::bus) {
            bus.committed();
        }
        if Db::HAS_DOORBELL && self.0.options.doorbell {
            self.0.doorbell.ring(self);
        }
    }

    /// Finds out whether a transaction was committed; `None` = that cannot be said: it may still run, or it is too long
    /// ago (PostgreSQL keeps the last two billion), or on SQLite a relay has published its events already.
    ///
    /// # Errors
    /// Transient.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn resolve(&self, ticket: Ticket) -> Result<Option<bool>> {
        let outbox = self.clone();
        let asked = async move {
            let inner = &*outbox.0;
            Db::fate(&inner.pool, &inner.statements, &ticket.0, inner.direct.get()).await
        };
        whole(asked).await
    }

    /// Returns the connections.
    pub fn pool(&self) -> &Pool<Db> {
        &self.0.pool
    }

    /// Returns the settings.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    pub(crate) fn bell(&self) -> &Bell {
        &self.0.bell
    }

    pub(crate) fn doorbell(&self) -> &Doorbell {
        &self.0.doorbell
    }

    pub(crate) fn statements(&self) -> &Db::Statements {
        &self.0.statements
    }

    /// Opens what relays work on, with connections of its own: for relays and tools of one's own.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) without tables; [`Conflict`](ErrorKind::Conflict) for tables of a newer version;
    /// or transient.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn store(&self) -> Result<Arc<dyn Store>> {
        self.verify().await?;
        let outbox = self.clone();
        whole(async move { Db::store(&outbox.0.pool, &outbox.0.writer, &outbox.0.options.namespace).await })
            .await
    }

    /// Fails unless the tables are there and of the version that this program knows; changes nothing.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) without tables; [`Conflict`](ErrorKind::Conflict) for tables of a newer version;
    /// or transient.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn verify(&self) -> Result<()> {
        let outbox = self.clone();
        let namespace = &self.0.options.namespace;
        match whole(async move { Db::verify(&outbox.0.pool, &outbox.0.options.namespace).await }).await? {
            true => Ok(()),
            false => {
                let message = "the tables of the outbox are missing: call migrate(), or run outbox/sql/";
                Err(Error::new(ErrorKind::NotFound, message).with("namespace", namespace))
            }
        }
    }

    /// A transaction; on a task of its own, as a connection that is given up while it begins comes back to the others in the
    /// middle of one (sqlx 0.9.0, issue 4393).
    pub(crate) async fn open(&self) -> Result<Open<Db>> {
        whole(self.clone().opened()).await
    }

    /// The same, for who is on a task of its own already.
    pub(crate) async fn opened(self) -> Result<Open<Db>> {
        let transaction = Db::begin(&self.0.pool, &self.0.writer).await?;
        Ok(Open::new(self, transaction))
    }

    pub(crate) async fn append(
        &self,
        connection: &mut Db::Connection,
        rows: &[Row],
        in_unit: bool,
    ) -> Result<Option<Ticket>> {
        if rows.is_empty() {
            return Ok(None);
        }
        check_keys(rows)?;
        let direct = self.0.direct.get();
        Db::append(connection, &self.0.statements, rows, in_unit, direct).await.map(|fate| Some(Ticket(fate)))
    }

    /// Asks for a while what became of a commit that was not answered.
    pub(crate) async fn find_out(&self, ticket: Ticket) -> Option<bool> {
        let asking = async {
            loop {
                match self.resolve(ticket).await {
                    Ok(Some(committed)) => return committed,
                    Ok(None) => {}
                    Err(error) => tracing::debug!(%error, "the fate of a commit is not known yet"),
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        tokio::time::timeout(ASK_FOR, asking).await.ok()
    }
}

/// For how long a commit that was not answered is asked for, and how often.
const ASK_FOR: Duration = Duration::from_secs(5);
const ASK_EVERY: Duration = Duration::from_millis(100);

fn check_keys(rows: &[Row]) -> Result<()> {
    if rows.len() <= MAX_KEYS {
        return Ok(());
    }
    let keyed = rows.iter().filter(|row| row.has_key);
    let keys: std::collections::HashSet<_> = keyed.map(|row| (&row.topic, &row.key)).collect();
    if keys.len() <= MAX_KEYS {
        return Ok(());
    }
    Err(Error::new(ErrorKind::TooLarge, "a transaction publishes under at most 512 keys: use several")
        .with("keys", keys.len()))
}

/// Runs a unit of work on a task of its own, which a caller who goes away does not end in the middle.
pub(crate) async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(outcome) => outcome,
        Err(error) => {
            Err(Error::new(ErrorKind::Unexpected, "the work on the database was interrupted")
                .caused_by(error))
        }
    }
}

impl<Db: Backend> Clone for Outbox<Db> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Db: Backend> fmt::Debug for Outbox<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox")
            .field("database", &Db::NAME)
            .field("options", &self.0.options)
            .finish_non_exhaustive()
    }
}
