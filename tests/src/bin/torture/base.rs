//! The database of a run over an outbox: what its processes write, and what it says at the end.

use std::future::Future;
use std::time::Duration;

use outbox::Backend;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Pool, Postgres, Sqlite};

use crate::roles::Step;

/// Connections of a process, and its longest wait for one.
const CONNECTIONS: u32 = 8;
const TIMEOUT: Duration = Duration::from_secs(3);

/// A key, a number and a token of an event.
pub(crate) type Noted = (String, i64, String);

/// A database with the tables of a run: `truth`, the last number of each key; `committed`, the event of each number;
/// `effects`, in their order.
pub(crate) trait Base: Backend {
    /// Connects when a connection is needed.
    fn connect(url: &str) -> sqlx::Result<Pool<Self>>;

    /// Creates the tables, with so many keys.
    fn create(pool: &Pool<Self>, keys: &[String]) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Takes the next number of a key; whoever else wants it waits.
    fn count_up(
        connection: &mut Self::Connection,
        key: &str,
    ) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Notes an event in a table.
    fn note(
        connection: &mut Self::Connection,
        table: &'static str,
        step: &Step,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Counts the rows of a table.
    fn count(pool: &Pool<Self>, table: &'static str) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Reads a table in its order.
    fn noted(pool: &Pool<Self>, table: &'static str)
    -> impl Future<Output = sqlx::Result<Vec<Noted>>> + Send;

    /// Ends some connections of others, where a server can.
    fn disconnect(pool: &Pool<Self>) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// A statement about a table, whose name is one of ours.
macro_rules! about {
    ($table:expr, $committed:literal, $effects:literal) => {
        if $table == "committed" { $committed } else { $effects }
    };
}

macro_rules! base {
    ($database:ty, $connection:ty, $connect:expr, $position:literal, $disconnect:literal) => {
        impl Base for $database {
            fn connect(url: &str) -> sqlx::Result<Pool<Self>> {
                $connect(url)
            }

            async fn create(pool: &Pool<Self>, keys: &[String]) -> sqlx::Result<()> {
                let tables = concat!(
                    "CREATE TABLE truth (key TEXT PRIMARY KEY, n BIGINT NOT NULL);
                    CREATE TABLE committed (pos ",
                    $position,
                    ", key TEXT NOT NULL, n BIGINT NOT NULL, token TEXT NOT NULL);
                    CREATE TABLE effects (pos ",
                    $position,
                    ", key TEXT NOT NULL, n BIGINT NOT NULL, token TEXT NOT NULL);"
                );
                let mut transaction = pool.begin().await?;
                sqlx::raw_sql(tables).execute(&mut *transaction).await?;
                for key in keys {
                    let insert = sqlx::query("INSERT INTO truth VALUES ($1, -1)").bind(key);
                    insert.execute(&mut *transaction).await?;
                }
                transaction.commit().await
            }

            async fn count_up(connection: &mut $connection, key: &str) -> sqlx::Result<i64> {
                let sql = "UPDATE truth SET n = n + 1 WHERE key = $1 RETURNING n";
                sqlx::query_scalar(sql).bind(key).fetch_one(connection).await
            }

            async fn note(
                connection: &mut $connection,
                table: &'static str,
                step: &Step,
            ) -> sqlx::Result<()> {
                let sql = about!(
                    table,
                    "INSERT INTO committed (key, n, token) VALUES ($1, $2, $3)",
                    "INSERT INTO effects (key, n, token) VALUES ($1, $2, $3)"
                );
                let n = i64::try_from(step.n).unwrap_or(i64::MAX);
                let insert = sqlx::query(sql).bind(&step.key).bind(n).bind(&step.token);
                insert.execute(connection).await.map(drop)
            }

            async fn count(pool: &Pool<Self>, table: &'static str) -> sqlx::Result<i64> {
                let sql = about!(table, "SELECT count(*) FROM committed", "SELECT count(*) FROM effects");
                sqlx::query_scalar(sql).fetch_one(pool).await
            }

            async fn noted(pool: &Pool<Self>, table: &'static str) -> sqlx::Result<Vec<Noted>> {
                let sql = about!(
                    table,
                    "SELECT key, n, token FROM committed ORDER BY pos",
                    "SELECT key, n, token FROM effects ORDER BY pos"
                );
                sqlx::query_as(sql).fetch_all(pool).await
            }

            async fn disconnect(pool: &Pool<Self>) -> sqlx::Result<()> {
                sqlx::query($disconnect).execute(pool).await.map(drop)
            }
        }
    };
}

fn server(url: &str) -> sqlx::Result<Pool<Postgres>> {
    let options: PgConnectOptions = url.parse()?;
    let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(TIMEOUT);
    Ok(pool.connect_lazy_with(options))
}

fn file(url: &str) -> sqlx::Result<Pool<Sqlite>> {
    let options: SqliteConnectOptions = url.parse()?;
    let options = options
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(20));
    let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(TIMEOUT);
    Ok(pool.connect_lazy_with(options))
}

base!(
    Postgres,
    sqlx::PgConnection,
    server,
    "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE datname = current_database()
      AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT 4) AS some"
);
base!(Sqlite, sqlx::SqliteConnection, file, "INTEGER PRIMARY KEY AUTOINCREMENT", "SELECT 1");
