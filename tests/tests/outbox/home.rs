//! The databases, each test in a place of its own; and a broker that is told what to do.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::transport::memory::{Memory, Options as MemoryOptions};
use eventbus::{Bus, Confirm, Envelope, Error, ErrorKind, PartitionId, Publisher, Receipt, Result, Topic};
use eventbus_tests::around::{Around, Change, Enqueue, Enqueues};
use outbox::{Backend, Namespace, Options, Outbox, Relay, Relaying, Store};
use parking_lot::Mutex;
use sqlx::{AssertSqlSafe, Pool, Postgres, Sqlite};

/// How long a test waits for what must come.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A database that tests have at hand.
pub(crate) trait Home: Backend {
    /// A fresh place; the value keeps it.
    fn open() -> impl Future<Output = (Pool<Self>, Namespace, Box<dyn Send + Sync>)> + Send;

    /// Runs statements; `EVT` stands for where the tables of the outbox are, with its separator.
    fn run(connection: &mut Self::Connection, sql: String) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Reads a number.
    fn number(
        connection: &mut Self::Connection,
        sql: String,
    ) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Reads texts with a number.
    fn pairs(
        connection: &mut Self::Connection,
        sql: String,
    ) -> impl Future<Output = sqlx::Result<Vec<(String, i64)>>> + Send;

    /// What stands before the names of the outbox's tables.
    fn tables(namespace: &Namespace) -> String;

    /// Whether a transaction begins when the one before it has ended.
    const WRITES_IN_TURN: bool;

    /// Makes all events of the outbox a day older.
    const AGED_OUTBOX: &str;

    /// Makes all calls that began a month older.
    const AGED_INTENTS: &str;

    /// Shifts whatever the database's clock has noted.
    fn shifted(seconds: i32) -> Vec<String>;

    /// The first version of the tables.
    const FIRST_TABLES: &str;

    /// Makes the oldest rows of the inbox older.
    fn aged(n_rows: u32, seconds: u32) -> String;
}

impl Home for Sqlite {
    async fn open() -> (Pool<Self>, Namespace, Box<dyn Send + Sync>) {
        let folder = tempfile::tempdir().unwrap();
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(folder.path().join("test.db"))
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(20))
            .create_if_missing(true);
        let pool =
            sqlx::sqlite::SqlitePoolOptions::new().max_connections(12).connect_with(options).await.unwrap();
        (pool, Namespace::default(), Box::new(folder))
    }

    async fn run(connection: &mut sqlx::SqliteConnection, sql: String) -> sqlx::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
    }

    async fn number(connection: &mut sqlx::SqliteConnection, sql: String) -> sqlx::Result<i64> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(connection).await
    }

    async fn pairs(connection: &mut sqlx::SqliteConnection, sql: String) -> sqlx::Result<Vec<(String, i64)>> {
        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(connection).await
    }

    fn tables(namespace: &Namespace) -> String {
        format!("{namespace}_")
    }

    const WRITES_IN_TURN: bool = true;
    const AGED_OUTBOX: &str = "UPDATE EVToutbox SET created_at = created_at - 86400000";
    const AGED_INTENTS: &str = "UPDATE EVTintent SET begun_at = begun_at - 30 * 86400000";
    const FIRST_TABLES: &str = include_str!("../../../outbox/sql/sqlite/1.sql");

    /// Leases are in the time of the machine, which does not jump.
    fn shifted(seconds: i32) -> Vec<String> {
        let by = |(table, column)| format!("UPDATE EVT{table} SET {column} = {column} + {seconds} * 1000");
        [("outbox", "created_at"), ("outbox_blocked", "retry_at"), ("inbox", "seen_at")].map(by).into()
    }

    fn aged(n_rows: u32, seconds: u32) -> String {
        format!(
            "UPDATE EVTinbox SET seen_at = seen_at - {seconds} * 1000 WHERE id IN (SELECT id FROM EVTinbox ORDER BY id LIMIT {n_rows})"
        )
    }
}

impl Home for Postgres {
    async fn open() -> (Pool<Self>, Namespace, Box<dyn Send + Sync>) {
        let url = xtask::brokers::url(xtask::brokers::Kind::Postgres).unwrap();
        let name = format!("t{:016x}", fastrand::u64(..));
        let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
        let options = options.options([("search_path", name.as_str())]);
        let pool =
            sqlx::postgres::PgPoolOptions::new().max_connections(12).connect_with(options).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE SCHEMA {name}"))).execute(&pool).await.unwrap();
        (pool, Namespace::new(&name).unwrap(), Box::new(Schema { url, name }))
    }

    async fn run(connection: &mut sqlx::PgConnection, sql: String) -> sqlx::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
    }

    async fn number(connection: &mut sqlx::PgConnection, sql: String) -> sqlx::Result<i64> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(connection).await
    }

    async fn pairs(connection: &mut sqlx::PgConnection, sql: String) -> sqlx::Result<Vec<(String, i64)>> {
        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(connection).await
    }

    fn tables(namespace: &Namespace) -> String {
        format!("{namespace}.")
    }

    const WRITES_IN_TURN: bool = false;
    const AGED_OUTBOX: &str = "UPDATE EVToutbox SET created_at = created_at - interval '1 day'";
    const AGED_INTENTS: &str = "UPDATE EVTintent SET begun_at = begun_at - interval '30 days'";
    const FIRST_TABLES: &str = include_str!("../../../outbox/sql/postgres/1.sql");

    fn shifted(seconds: i32) -> Vec<String> {
        let by = |(table, column)| {
            format!(
                "UPDATE EVT{table} SET {column} = {column} + {seconds} * interval '1 s' WHERE isfinite({column})"
            )
        };
        let noted = [
            ("outbox_shard", "lease_until"),
            ("outbox_relay", "seen_at"),
            ("outbox_blocked", "retry_at"),
            ("outbox", "created_at"),
            ("inbox", "seen_at"),
        ];
        noted.map(by).into()
    }

    fn aged(n_rows: u32, seconds: u32) -> String {
        format!(
            "UPDATE EVTinbox SET seen_at = seen_at - {seconds} * interval '1 s'
            WHERE ctid = ANY (ARRAY (SELECT ctid FROM EVTinbox ORDER BY seen_at DESC LIMIT {n_rows}))"
        )
    }
}

/// A schema that goes with its test: a server with thousands of them is not the one that is tested.
struct Schema {
    url: String,
    name: String,
}

impl Drop for Schema {
    fn drop(&mut self) {
        let (url, name) = (self.url.clone(), self.name.clone());
        let drop = async move {
            let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await?;
            let sql =
                format!("SET lock_timeout = '5s'; DROP SCHEMA IF EXISTS {name}, {name}_b, {name}_n CASCADE");
            Postgres::run(&mut connection, sql).await
        };
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(drop).map_err(std::io::Error::other)
        });
        if let Ok(Err(error)) = dropped.join() {
            eprintln!("the schema of a test stays: {error}");
        }
    }
}

/// Puts a bug around a store.
pub(crate) type Break<Db> = fn(Arc<dyn Store>, &Pool<Db>, &Namespace) -> Arc<dyn Store>;

/// One test: a database with the tables, an outbox, a broker.
pub(crate) struct Cx<Db: Home> {
    pub(crate) pool: Pool<Db>,
    pub(crate) namespace: Namespace,
    pub(crate) outbox: Outbox<Db>,
    pub(crate) broker: Broker,
    pub(crate) bus: Bus,
    pub(crate) topic: Topic,
    /// What is put around the store of each relay: a design that was refused.
    pub(crate) broken: Option<Break<Db>>,
    _place: Box<dyn Send + Sync>,
}

impl<Db: Home> Cx<Db> {
    pub(crate) async fn open() -> Self {
        let (pool, namespace, place) = Db::open().await;
        Self::on(pool, namespace, place).await
    }

    /// The same in a database of one's own.
    pub(crate) async fn on(pool: Pool<Db>, namespace: Namespace, place: Box<dyn Send + Sync>) -> Self {
        let options = Options::default().with_namespace(namespace.clone()).with_source("/test");
        let outbox = Outbox::with_options(pool.clone(), options);
        outbox.migrate().await.unwrap();
        let broker = Broker::default();
        let memory = Memory::new(MemoryOptions::default());
        let bus = Bus::new(Around { inner: Arc::new(memory), change: broker.clone() });
        let topic = Topic::new("orders").unwrap();
        Self { pool, namespace, outbox, broker, bus, topic, broken: None, _place: place }
    }

    /// A relay whose lease is short, and long enough for a machine with much to do.
    pub(crate) async fn relay(&self) -> Relaying {
        self.relay_with(|relay| relay.with_lease(Duration::from_secs(5))).await
    }

    pub(crate) async fn relay_with(&self, with: impl FnOnce(Relay) -> Relay) -> Relaying {
        let relay = match self.broken {
            Some(_) => Relay::over(self.store().await),
            None => Relay::new(&self.outbox),
        };
        with(relay).start(&self.bus).await.unwrap()
    }

    pub(crate) async fn store(&self) -> Arc<dyn Store> {
        let store = self.outbox.store().await.unwrap();
        match self.broken {
            Some(broken) => broken(store, &self.pool, &self.namespace),
            None => store,
        }
    }

    pub(crate) async fn run(&self, sql: &str) {
        let mut connection = self.pool.acquire().await.unwrap();
        Db::run(&mut connection, self.sql(sql)).await.unwrap();
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let mut connection = self.pool.acquire().await.unwrap();
        Db::number(&mut connection, self.sql(sql)).await.unwrap()
    }

    /// How many events are stored and not published.
    pub(crate) async fn n_stored(&self) -> i64 {
        self.number("SELECT count(*) FROM EVToutbox").await
    }

    pub(crate) fn sql(&self, sql: &str) -> String {
        sql.replace("EVT", &self.tables())
    }

    pub(crate) fn tables(&self) -> String {
        Db::tables(&self.namespace)
    }

    /// An event `n` of a key.
    pub(crate) fn event(&self, key: &str, n: i64) -> Envelope {
        Envelope::new("test.counted", "/test").with_key(key).with_payload(n.to_string())
    }

    /// Commits an event.
    pub(crate) async fn publish(&self, key: &str, n: i64) {
        let mut tx = self.outbox.begin().await.unwrap();
        tx.publish_envelope(&self.topic, self.event(key, n)).unwrap();
        tx.commit().await.unwrap();
    }

    /// Waits until the broker has what the test waits for.
    pub(crate) async fn until(&self, what: &str, mut holds: impl FnMut(&[Seen]) -> bool) {
        let waiting = async {
            while !holds(&self.broker.seen()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(SOON, waiting).await.is_err() {
            panic!("{what} did not come true: {:?}", self.broker.seen());
        }
    }

    /// Waits until there are so many rows.
    pub(crate) async fn until_rows(&self, n_rows: i64, of: &str) {
        let waiting = async {
            while self.number(&format!("SELECT count(*) FROM {of}")).await != n_rows {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(SOON, waiting).await.is_err() {
            panic!("{of} does not have {n_rows} rows");
        }
    }

    /// Waits until nothing is stored any more.
    pub(crate) async fn until_empty(&self) {
        self.until_rows(0, "EVToutbox").await;
    }
}

/// An event that the broker stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) topic: String,
    pub(crate) key: String,
    pub(crate) n: i64,
    pub(crate) id: String,
    pub(crate) seq: i64,
}

/// What the broker does with the events of a key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Does {
    Refuses(ErrorKind),
    /// Stores them, and the answer is lost.
    LosesAnswers,
    Panics,
}

#[derive(Debug, Default)]
struct Plan {
    keys: HashMap<String, Does>,
    is_away: bool,
    answers_after: Duration,
    /// One of so many answers is lost.
    loses_one_in: u32,
}

/// A broker that notes what it stores, and fails when it is told to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Broker(Arc<Mutex<(Plan, Vec<Seen>)>>);

impl Broker {
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.0.lock().1.clone()
    }

    pub(crate) fn on(&self, key: &str, does: impl Into<Option<Does>>) {
        let keys = &mut self.0.lock().0.keys;
        match does.into() {
            Some(does) => _ = keys.insert(key.to_owned(), does),
            None => _ = keys.remove(key),
        }
    }

    pub(crate) fn is_away(&self, is_away: bool) {
        self.0.lock().0.is_away = is_away;
    }

    pub(crate) fn answers_after(&self, time: Duration) {
        self.0.lock().0.answers_after = time;
    }

    pub(crate) fn loses_one_in(&self, answers: u32) {
        self.0.lock().0.loses_one_in = answers;
    }

    /// The numbers of each key, in the order in which they were stored for the first time.
    pub(crate) fn firsts(&self) -> BTreeMap<String, Vec<i64>> {
        let mut firsts: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for seen in self.seen() {
            let of_key = firsts.entry(seen.key).or_default();
            if !of_key.contains(&seen.n) {
                of_key.push(seen.n);
            }
        }
        firsts
    }

    fn store(&self, topic: &Topic, event: &Envelope) -> Result<Receipt> {
        let (plan, seen) = &mut *self.0.lock();
        let key = event.key().map_or_else(String::new, ToString::to_string);
        if plan.is_away {
            return Err(Error::new(ErrorKind::Unavailable, "the broker is away"));
        }
        let does = plan.keys.get(&key).copied();
        assert!(!matches!(does, Some(Does::Panics)), "as it should");
        if let Some(Does::Refuses(kind)) = does {
            return Err(Error::new(kind, "the broker refuses this key"));
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        seen.push(Seen {
            topic: topic.to_string(),
            key,
            n: event.payload().map_or(0, |body| text(body).parse().unwrap_or(-1)),
            id: event.id().to_string(),
            seq: event.extension("evt-seq").unwrap_or("0").parse().unwrap(),
        });
        let is_lost = plan.loses_one_in > 0 && fastrand::u32(..plan.loses_one_in) == 0;
        match does {
            Some(Does::LosesAnswers) => Err(Error::new(ErrorKind::Unknown, "the answer was lost")),
            _ if is_lost => Err(Error::new(ErrorKind::Unknown, "the answer was lost")),
            _ => Ok(Receipt::new(PartitionId(0), None)),
        }
    }
}

impl Change for Broker {
    fn publisher(&self, publisher: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        Arc::new(Enqueues(publisher, self.clone()))
    }
}

#[async_trait]
impl Enqueue for Broker {
    async fn enqueue(&self, inner: &dyn Publisher, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let receipts = batch.iter().map(|event| self.store(topic, event)).collect::<Vec<_>>();
        let time = self.0.lock().0.answers_after;
        if time > Duration::ZERO {
            tokio::time::sleep(time).await;
        }
        // What is stored goes on to those who listen.
        let stored =
            batch.into_iter().zip(&receipts).filter(|(_, stored)| stored.is_ok()).map(|(event, _)| event);
        inner.enqueue(topic, stored.collect()).await?.await.all()?;
        Ok(Confirm::ready(receipts.into_iter().collect()))
    }
}
