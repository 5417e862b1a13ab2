//! PostgreSQL 15 or later as a broker, for teams whose only infrastructure is a database.
//!
//! Partitions, durable groups with leases, delays and replay are rows, as in the embedded transport. What is
//! published at one time by one process goes into one statement; offsets are given out under the lock of the
//! partition's row, so that no reader ever sees a later event before an earlier one.
//!
//! The address is `postgres://user:password@host:port/database?…`; `postgresql://` is the same.
//!
//! | Option | Default | Meaning |
//! |---|---|---|
//! | `declare` | `verify` | `create`: topics are created on use; `verify`: a topic must exist |
//! | `partitions` | 16 | of topics that are created on use |
//! | `max_event_bytes` | 4 MiB | largest event |
//! | `session` | 10 s | a member that is silent for so long loses its partitions |
//! | `max_connections` | 8 | connections of one transport value, besides one that listens |
//! | `timeout` | 10 s | longest wait for a connection |
//! | `durability` | `flushed` | `relaxed`: commits are not flushed (`synchronous_commit = off`); said at the start |
//! | `sslmode` | `disable` on loopback, else `verify-full` | `disable`, `require` (encrypted, and nobody knows with whom), `verify-ca`, `verify-full` |
//! | `sslrootcert` | the system's | file (PEM) of authorities to trust beside the system's; `require` is `verify-ca` then, as in libpq |
//! | `sslcert`, `sslkey` | none | files (PEM) of the certificate that is shown to the server, and of its key |
//!
//! Leases and delays are in the time of the server's clock: a step of that clock moves them. What waits to be
//! published is bounded: 65,536 events and 64 MiB; publishing waits beyond. Settled events are kept until the
//! topic's retention removes them: never before every group has settled them. TLS needs the feature
//! `postgres-tls`.

mod admin;
mod leases;
mod membership;
mod publisher;
mod retention;
mod row;
mod schema;
mod store;
mod topics;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use self::store::Store;
use super::kit::leased::{self, Consumers, LeasedConsumer};
use super::kit::limits;
use super::kit::queue::QueuedPublisher;
use super::{Consumer, InFile, Publisher, TlsFiles, Transport};
use crate::admin::{Admin, TopicSpec};
use crate::capability::{Capabilities, Durability};
use crate::error::{Error, ErrorKind, Result};
use crate::subscription::Subscription;
use crate::url::Url;

/// Bounds and times of a PostgreSQL store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether topics are created on use; otherwise one that is missing is an error.
    pub create_topics: bool,
    /// Partitions of topics that are created on use, at most 4,096.
    pub partitions: u32,
    /// Largest event in bytes, headers counted; at most 64 MiB.
    pub max_event_bytes: usize,
    /// A member that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// Most connections of one transport value, besides the one that listens.
    pub max_connections: u32,
    /// Longest wait for a connection.
    pub timeout: Duration,
    /// Whether a commit is flushed before it is confirmed.
    pub flushed: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create_topics: false,
            partitions: TopicSpec::PARTITIONS.get(),
            max_event_bytes: 4 << 20,
            session: Duration::from_secs(10),
            max_connections: 8,
            timeout: Duration::from_secs(10),
            flushed: true,
        }
    }
}

const KNOWN: [&str; 11] = [
    "declare",
    "partitions",
    "max_event_bytes",
    "session",
    "max_connections",
    "timeout",
    "durability",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
];

impl Options {
    /// The options of a URL such as `postgres://me@db/shop?declare=create`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        let mut options = Self::default();
        for (name, value) in url.options() {
            match name {
                "declare" => options.create_topics = url.choice(name, value, &["verify", "create"])? == 1,
                "partitions" => options.partitions = url.number(name, value)?,
                "max_event_bytes" => options.max_event_bytes = url.number(name, value)?,
                "session" => options.session = url.duration(name, value)?,
                "max_connections" => options.max_connections = url.number(name, value)?,
                "timeout" => options.timeout = url.duration(name, value)?,
                "durability" => options.flushed = url.choice(name, value, &["flushed", "relaxed"])? == 0,
                "sslmode" | "sslrootcert" | "sslcert" | "sslkey" => {}
                _ => return Err(url.unknown_option(name, &KNOWN)),
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        limits::partitions(self.partitions, topics::MAX_PARTITIONS)?;
        limits::max_event_bytes(self.max_event_bytes)?;
        limits::session(self.session, limits::SESSION)?;
        if self.max_connections < 2 {
            return Err(Error::config("max_connections must be 2 or more"));
        }
        limits::timeout(self.timeout)
    }
}

/// Where and as whom to connect.
fn connection(url: &Url) -> Result<PgConnectOptions> {
    let place = url.authority(5432)?;
    let [(host, port)] = place.hosts.as_slice() else {
        return Err(Error::config("postgres:// takes one host: host:port/database"));
    };
    let user =
        place.user.ok_or_else(|| Error::config("postgres:// needs a user: user:password@host/database"))?;
    let database = if place.path.is_empty() { user } else { place.path };
    let mut connect = PgConnectOptions::new_without_pgpass()
        .host(host)
        .port(*port)
        .username(user)
        .database(database)
        .application_name("eventbus");
    if let Some(password) = place.password {
        connect = connect.password(password);
    }
    let mut mode = if place.is_loopback() { PgSslMode::Disable } else { PgSslMode::VerifyFull };
    let mut files = TlsFiles::default();
    for (name, value) in url.options() {
        match name {
            "sslmode" => {
                let modes =
                    [PgSslMode::Disable, PgSslMode::Require, PgSslMode::VerifyCa, PgSslMode::VerifyFull];
                let chosen = url.choice(name, value, &["disable", "require", "verify-ca", "verify-full"])?;
                mode = modes.get(chosen).copied().unwrap_or(PgSslMode::VerifyFull);
            }
            "sslrootcert" => files.ca = Some(PathBuf::from(value)),
            "sslcert" => files.cert = Some(PathBuf::from(value)),
            "sslkey" => files.key = Some(PathBuf::from(value)),
            _ => {}
        }
    }
    if !matches!(mode, PgSslMode::Disable) && !cfg!(feature = "postgres-tls") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this program was built without TLS for PostgreSQL: enable the feature \"postgres-tls\" of eventbus, or say sslmode=disable where the network is trusted",
        ));
    }
    // Who names an authority wants it to be asked.
    if matches!(mode, PgSslMode::Require) && files.ca.is_some() {
        mode = PgSslMode::VerifyCa;
    }
    let texts = files.read(!matches!(mode, PgSslMode::Disable), "say sslmode=verify-full")?;
    if let Some(ca) = texts.ca {
        connect = connect.ssl_root_cert_from_pem(ca.into_bytes());
    }
    if let Some((cert, key)) = texts.identity {
        connect = connect.ssl_client_cert_from_pem(cert).ssl_client_key_from_pem(key);
    }
    Ok(connect.ssl_mode(mode))
}

/// A PostgreSQL database as a broker. Clones share their connections, and so does everything opened from them.
#[derive(Clone)]
pub struct Postgres {
    store: Arc<Store>,
    consumers: Arc<Consumers<Store>>,
}

impl Postgres {
    /// Connects to the database that an address names, and creates the tables if they are missing.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) for an option that cannot be used; [`Unauthorized`](ErrorKind::Unauthorized)
    /// for a wrong user or password, or if TLS fails; [`NotFound`](ErrorKind::NotFound) for a missing database;
    /// [`Unavailable`](ErrorKind::Unavailable) if the server does not answer within `timeout`;
    /// [`Conflict`](ErrorKind::Conflict) for tables of a newer version.
    ///
    /// # Cancellation
    /// The tables may have been created; nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        let store = Store::open(connection(url)?, Options::from_url(url)?).await?;
        Ok(Self { store, consumers: Arc::default() })
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("place", &self.store.place)
            .field("options", &self.store.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Postgres {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: if self.store.options.flushed { Durability::Flushed } else { Durability::Process },
            max_event_bytes: Some(self.store.options.max_event_bytes),
            ..leased::CLAIMS
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.store.is_open()?;
        Ok(Arc::new(QueuedPublisher::new(self.store.queue.clone(), "PostgresPublisher")))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        self.store.is_open()?;
        subscription.check(&self.capabilities())?;
        let consumer = LeasedConsumer::join(self.store.clone(), subscription).await?;
        self.consumers.add(&consumer)?;
        Ok(consumer)
    }

    fn admin(&self) -> Option<&dyn Admin> {
        Some(self)
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        let outcome = self.consumers.leave().await;
        self.store.close().await;
        outcome
    }
}
