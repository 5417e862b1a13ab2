//! The services' tables: in SQLite or in PostgreSQL, by the same SQL.

use std::time::Duration;

use async_trait::async_trait;
use eventbus::sql::from_sqlx;
use eventbus::{Error, ErrorKind, Result};
use outbox::Backend;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection as _, PgConnection, Pool, Postgres, Row as _, Sqlite, TypeInfo as _, ValueRef as _};

/// Longest wait for a connection, and for another process that writes to the same file.
const CONNECT: Duration = Duration::from_secs(5);
const BUSY: Duration = Duration::from_secs(30);
/// Connections of a process to a database: handlers that run at once beyond them wait.
const CONNECTIONS: u32 = 16;
/// Whoever creates tables takes this number first: PostgreSQL has them created once at a time.
const CREATION: i64 = 0x6573_686f_7000;

/// What statements are given and rows are made of. Numbers are not negative.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number, at most `i64::MAX`.
    Number(u64),
    /// A text.
    Text(String),
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// A row of an answer.
#[derive(Debug)]
pub struct Row(Vec<Value>);

impl Row {
    /// Returns the number in a column, counted from 0.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if there is none.
    pub fn number<T: TryFrom<u64>>(&self, column: usize) -> Result<T> {
        match self.0.get(column) {
            Some(Value::Number(number)) => T::try_from(*number).map_err(|_| not_as_expected(column)),
            _ => Err(not_as_expected(column)),
        }
    }

    /// Returns the text in a column, counted from 0.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if there is none.
    pub fn text(&self, column: usize) -> Result<&str> {
        match self.0.get(column) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(not_as_expected(column)),
        }
    }
}

fn not_as_expected(column: usize) -> Error {
    Error::new(ErrorKind::Corrupt, "a row of the services' tables is not what was stored")
        .with("column", column)
}

/// A connection to the tables, in a transaction or not.
#[async_trait]
pub trait Tables: Send {
    /// Runs a statement, whose parameters are `$1`, `$2`…; returns how many rows it changed.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) for a number beyond `i64::MAX`; transient or permanent, as the database says.
    async fn run(&mut self, sql: &'static str, values: &[Value]) -> Result<u64>;

    /// Reads rows.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    async fn read(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>>;

    /// Reads the first row, if there is one.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    async fn first(&mut self, sql: &'static str, values: &[Value]) -> Result<Option<Row>> {
        Ok(self.read(sql, values).await?.into_iter().next())
    }

    /// Reads the number of the only row.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    async fn count(&mut self, sql: &'static str) -> Result<u64> {
        self.first(sql, &[]).await?.ok_or_else(|| not_as_expected(0))?.number(0)
    }
}

/// A database that the services' tables can be in.
pub trait Db: Backend<Connection: Tables> {
    /// Connects to what an address names; an SQLite file is created.
    fn connect(url: &str) -> impl Future<Output = Result<Pool<Self>>> + Send;

    /// Creates tables, however many processes do so at once.
    fn create(pool: &Pool<Self>, schema: &'static str) -> impl Future<Output = Result<()>> + Send;
}

fn not_an_address(error: &sqlx::Error) -> Error {
    Error::new(ErrorKind::Config, "the address of the services' tables cannot be used: sqlite://file.db or postgres://user@host/database")
        .caused_by(match error {
            // Others may repeat the address, and a password with it.
            sqlx::Error::Configuration(why) => why.to_string(),
            _ => String::new(),
        })
}

/// A number as databases keep it.
fn stored(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|_| {
        Error::new(ErrorKind::Invalid, "a number is too large for the services' tables")
            .with("number", number)
    })
}

macro_rules! bound {
    ($query:expr, $values:expr) => {{
        let mut query = $query;
        for value in $values {
            query = match value {
                Value::Number(number) => query.bind(stored(*number)?),
                Value::Text(text) => query.bind(text),
            };
        }
        query
    }};
}

macro_rules! tables {
    ($connection:ty, $number:literal) => {
        #[async_trait]
        impl Tables for $connection {
            async fn run(&mut self, sql: &'static str, values: &[Value]) -> Result<u64> {
                let query = bound!(sqlx::query(sql), values);
                Ok(query.execute(self).await.map_err(from_sqlx)?.rows_affected())
            }

            async fn read(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>> {
                let rows = bound!(sqlx::query(sql), values).fetch_all(self).await.map_err(from_sqlx)?;
                let mut read = Vec::with_capacity(rows.len());
                for row in rows {
                    let mut values = Vec::with_capacity(row.len());
                    for column in 0..row.len() {
                        let sort = row.try_get_raw(column).map_err(from_sqlx)?.type_info().name().to_owned();
                        values.push(if sort == $number {
                            let number: i64 = row.try_get(column).map_err(from_sqlx)?;
                            Value::Number(u64::try_from(number).map_err(|_| not_as_expected(column))?)
                        } else {
                            Value::Text(row.try_get(column).map_err(from_sqlx)?)
                        });
                    }
                    read.push(Row(values));
                }
                Ok(read)
            }
        }
    };
}

tables!(sqlx::SqliteConnection, "INTEGER");
tables!(PgConnection, "INT8");

impl Db for Sqlite {
    async fn connect(url: &str) -> Result<Pool<Self>> {
        let options: SqliteConnectOptions = url.parse().map_err(|error| not_an_address(&error))?;
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY);
        // A file does not go away between two uses, as a server may.
        let pool = SqlitePoolOptions::new().test_before_acquire(false);
        let pool = pool.max_connections(CONNECTIONS).acquire_timeout(CONNECT);
        pool.connect_with(options).await.map_err(|error| cannot_open(error, url))
    }

    async fn create(pool: &Pool<Self>, schema: &'static str) -> Result<()> {
        let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(from_sqlx)?;
        sqlx::raw_sql(schema).execute(&mut *transaction).await.map_err(from_sqlx)?;
        transaction.commit().await.map_err(from_sqlx)
    }
}

impl Db for Postgres {
    async fn connect(url: &str) -> Result<Pool<Self>> {
        let options: PgConnectOptions = url.parse().map_err(|error| not_an_address(&error))?;
        let options = options.application_name("eshop");
        // A pool says only that it has no connection; this says why.
        let first = PgConnection::connect_with(&options).await.map_err(|error| cannot_open(error, url))?;
        // It has nothing to lose.
        _ = first.close().await;
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(CONNECT);
        Ok(pool.connect_lazy_with(options))
    }

    async fn create(pool: &Pool<Self>, schema: &'static str) -> Result<()> {
        let mut transaction = pool.begin().await.map_err(from_sqlx)?;
        let one_at_a_time = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CREATION);
        one_at_a_time.execute(&mut *transaction).await.map_err(from_sqlx)?;
        sqlx::raw_sql(schema).execute(&mut *transaction).await.map_err(from_sqlx)?;
        transaction.commit().await.map_err(from_sqlx)
    }
}

fn cannot_open(error: sqlx::Error, url: &str) -> Error {
    let place = eventbus::url::Url::parse(url).map_or_else(|_| "?".into(), |url| url.to_string());
    from_sqlx(error).with("tables", place)
}
