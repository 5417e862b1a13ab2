//! An outbox in whatever database an address names: for tools.

use std::str::FromStr as _;
use std::time::Duration;

use eventbus::sql::from_sqlx;
use eventbus::{Envelope, Error, ErrorKind, Result, Topic};

use crate::operator::Operator;
use crate::outbox::{Options, Outbox};
use crate::recall::InboxOperator;
use crate::relay::Relay;

/// An outbox whose database is known when the program runs.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum AnyOutbox {
    /// In PostgreSQL.
    #[cfg(feature = "postgres")]
    Postgres(Outbox<sqlx::Postgres>),
    /// In an SQLite file.
    #[cfg(feature = "sqlite")]
    Sqlite(Outbox<sqlx::Sqlite>),
}

/// Connections of a tool, and its longest wait for one.
const CONNECTIONS: u32 = 4;
const TIMEOUT: Duration = Duration::from_secs(10);

impl AnyOutbox {
    /// Opens the database that an address names: `postgres://user:password@host/database` with the options of libpq, or
    /// `sqlite://file.db`, which must exist. Off loopback, `sslmode` is `verify-full` where none is named, or `allow`
    /// or `prefer`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) for an address that is none; [`Unsupported`](ErrorKind::Unsupported) for a database
    /// that is not compiled in; [`Unauthorized`](ErrorKind::Unauthorized) or transient as the database says.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn open(url: &str, options: Options) -> Result<Self> {
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        match scheme {
            #[cfg(feature = "postgres")]
            Some("postgres" | "postgresql") => {
                let connect = sqlx::postgres::PgConnectOptions::from_str(url).map_err(not_an_address)?;
                let connect = verified(connect);
                let pool = sqlx::postgres::PgPoolOptions::new()
                    .max_connections(CONNECTIONS)
                    .acquire_timeout(TIMEOUT);
                let pool = pool.connect_with(connect.application_name("outbox")).await.map_err(from_sqlx)?;
                Ok(Self::Postgres(Outbox::with_options(pool, options)))
            }
            #[cfg(feature = "sqlite")]
            Some("sqlite") => {
                let connect = sqlx::sqlite::SqliteConnectOptions::from_str(url).map_err(not_an_address)?;
                let pool = sqlx::sqlite::SqlitePoolOptions::new()
                    .max_connections(CONNECTIONS)
                    .acquire_timeout(TIMEOUT);
                let pool = pool.connect_with(connect.busy_timeout(TIMEOUT)).await.map_err(from_sqlx)?;
                Ok(Self::Sqlite(Outbox::with_options(pool, options)))
            }
            #[cfg(not(feature = "postgres"))]
            Some("postgres" | "postgresql") => Err(not_built()),
            #[cfg(not(feature = "sqlite"))]
            Some("sqlite") => Err(not_built()),
            _ => Err(Error::new(
                ErrorKind::Config,
                "an outbox is in postgres://user@host/database or in sqlite://file.db",
            )),
        }
    }

    /// Fails unless the tables are there, as [`Outbox::verify`] does.
    ///
    /// # Errors
    /// As [`Outbox::verify`].
    ///
    /// # Cancellation
    /// Safe.
    pub async fn verify(&self) -> Result<()> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(outbox) => outbox.verify().await,
            #[cfg(feature = "sqlite")]
            Self::Sqlite(outbox) => outbox.verify().await,
        }
    }

    /// Returns what operators do with it.
    pub fn operator(&self) -> Box<dyn Operator> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(outbox) => Box::new(outbox.operator()),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(outbox) => Box::new(outbox.operator()),
        }
    }

    /// Returns what operators do with what consumers remember.
    pub fn inbox_operator(&self) -> Box<dyn InboxOperator> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(outbox) => Box::new(outbox.inbox_operator()),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(outbox) => Box::new(outbox.inbox_operator()),
        }
    }

    /// Returns a relay of it.
    pub fn relay(&self) -> Relay {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(outbox) => Relay::new(outbox),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(outbox) => Relay::new(outbox),
        }
    }

    /// Publishes events in a transaction of their own.
    ///
    /// # Errors
    /// As [`Transaction::commit`](crate::Transaction::commit).
    ///
    /// # Cancellation
    /// All of it is committed, or nothing.
    pub async fn publish(&self, events: Vec<(Topic, Envelope)>) -> Result<()> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(outbox) => publish(outbox, events).await,
            #[cfg(feature = "sqlite")]
            Self::Sqlite(outbox) => publish(outbox, events).await,
        }
    }
}

/// Off this machine, who answers must be who was called, unless the address says otherwise.
#[cfg(feature = "postgres")]
fn verified(options: sqlx::postgres::PgConnectOptions) -> sqlx::postgres::PgConnectOptions {
    use sqlx::postgres::PgSslMode;
    let host = options.get_host();
    let is_here = host.starts_with('/')
        || host == "localhost"
        || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    match options.get_ssl_mode() {
        PgSslMode::Prefer | PgSslMode::Allow if !is_here => options.ssl_mode(PgSslMode::VerifyFull),
        _ => options,
    }
}

async fn publish<Db: crate::Backend>(outbox: &Outbox<Db>, events: Vec<(Topic, Envelope)>) -> Result<()> {
    let mut tx = outbox.begin().await?;
    for (topic, event) in events {
        tx.publish_envelope(&topic, event)?;
    }
    tx.commit().await
}

#[cfg(not(all(feature = "postgres", feature = "sqlite")))]
fn not_built() -> Error {
    Error::new(ErrorKind::Unsupported, "this program was built without that database")
}

/// The address is not repeated: there may be a password in it.
fn not_an_address(_: sqlx::Error) -> Error {
    Error::new(ErrorKind::Config, "the address of the outbox, or one of its options, cannot be used")
}
