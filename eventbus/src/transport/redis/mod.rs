//! Redis 7 or later and Valkey: a topic is a stream for each partition.
//!
//! A partition is read by one member at a time, in the order of the stream, from where its group stands. Groups are
//! kept beside the streams, in hashes that scripts change, and not as the server's consumer groups: those hand the
//! entries of a stream to any member and take them over by idle time, which keeps no order and races slow handlers.
//! So an event is settled alone, retried with a delay and counted exactly, and the owner of a partition that was
//! lost changes nothing.
//!
//! **Confirmed events may be lost on a failover**: replication is asynchronous, and no option changes that. What
//! a confirm survives otherwise is what the server keeps: see `durability`.
//!
//! The address is `redis://user:password@host:port/database?…`; `rediss://` speaks TLS (feature `redis-tls`), and
//! `valkey://` is the same as `redis://`.
//!
//! | Option | Default | Meaning |
//! |---|---|---|
//! | `declare` | `verify` | `create`: topics are created on use; `verify`: a topic must exist |
//! | `partitions` | 16 | of topics that are created on use |
//! | `retention` | `7d` | age above which settled events are removed, of topics that are created on use; `off` = kept |
//! | `max_event_bytes` | 4 MiB | largest event |
//! | `session` | 10 s | a member that is silent for so long loses its partitions |
//! | `timeout` | 10 s | longest wait for a connection or an answer |
//! | `durability` | `server` | `flushed`: a confirm waits for the append-only file (`WAITAOF 1 0`, Redis 7.2) |
//! | `ca` | the system's | file (PEM) of the authorities to trust |
//! | `cert`, `key` | none | files (PEM) of the certificate that is shown to the server, and of its key |
//!
//! TLS takes the process's provider of cryptography (rustls); where the program installed none before it connects, this
//! installs ring.
//!
//! Offsets pack an entry's id: milliseconds in the upper 42 bits, the counter within in the lower 22; they have
//! gaps. Leases and delays are in the time of the server's clock. Settled events are removed by retention: never
//! before every group has settled them. What waits to be published is bounded: 65,536 events and 64 MiB.

mod admin;
mod entry;
mod fitness;
mod keys;
mod leases;
mod publisher;
mod retention;
mod store;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

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

/// Bounds and times of a Redis store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether topics are created on use; otherwise one that is missing is an error.
    pub create_topics: bool,
    /// Partitions of topics that are created on use, at most 4,096.
    pub partitions: u32,
    /// Age above which settled events are removed, of topics that are created on use; `None` = kept.
    pub retention: Option<Duration>,
    /// Largest event in bytes, headers counted; at most 64 MiB.
    pub max_event_bytes: usize,
    /// A member that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// Longest wait for a connection or an answer.
    pub timeout: Duration,
    /// Whether a confirm waits for the append-only file.
    pub flushed: bool,
    /// Authorities to trust instead of the system's, and who we are.
    pub files: TlsFiles,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create_topics: false,
            partitions: TopicSpec::PARTITIONS.get(),
            retention: Some(Duration::from_secs(7 * 86_400)),
            max_event_bytes: 4 << 20,
            session: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            flushed: false,
            files: TlsFiles::default(),
        }
    }
}

const KNOWN: [&str; 10] = [
    "declare",
    "partitions",
    "retention",
    "max_event_bytes",
    "session",
    "timeout",
    "durability",
    "ca",
    "cert",
    "key",
];

/// Most partitions of a topic in this store.
const MAX_PARTITIONS: u32 = 4096;

impl Options {
    /// The options of a URL such as `redis://cache/0?declare=create`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        let mut options = Self::default();
        for (name, value) in url.options() {
            match name {
                "declare" => options.create_topics = url.choice(name, value, &["verify", "create"])? == 1,
                "partitions" => options.partitions = url.number(name, value)?,
                "retention" if value == "off" => options.retention = None,
                "retention" => options.retention = Some(url.duration(name, value)?),
                "max_event_bytes" => options.max_event_bytes = url.number(name, value)?,
                "session" => options.session = url.duration(name, value)?,
                "timeout" => options.timeout = url.duration(name, value)?,
                "durability" => options.flushed = url.choice(name, value, &["server", "flushed"])? == 1,
                "ca" => options.files.ca = Some(PathBuf::from(value)),
                "cert" => options.files.cert = Some(PathBuf::from(value)),
                "key" => options.files.key = Some(PathBuf::from(value)),
                _ => return Err(url.unknown_option(name, &KNOWN)),
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        limits::partitions(self.partitions, MAX_PARTITIONS)?;
        limits::max_event_bytes(self.max_event_bytes)?;
        limits::session(self.session, limits::SESSION)?;
        limits::timeout(self.timeout)
    }
}

/// A Redis or Valkey server as a broker. Clones share their connections, and so does everything opened from them.
#[derive(Clone)]
pub struct Redis {
    store: Arc<Store>,
    consumers: Arc<Consumers<Store>>,
}

impl Redis {
    /// Connects to the server that an address names, and asks what it keeps.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) for an option that cannot be used; [`Unauthorized`](ErrorKind::Unauthorized)
    /// for a wrong user or password, or if TLS fails; [`Unsupported`](ErrorKind::Unsupported) for a server before version 7;
    /// [`Unavailable`](ErrorKind::Unavailable) if it does not answer within `timeout`.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        let store = Store::open(url, Options::from_url(url)?).await?;
        Ok(Self { store, consumers: Arc::default() })
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis")
            .field("place", &self.store.place)
            .field("options", &self.store.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Redis {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: self.store.durability,
            max_event_bytes: Some(self.store.options.max_event_bytes),
            ..leased::CLAIMS
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.store.is_open()?;
        Ok(Arc::new(QueuedPublisher::new(self.store.queue.clone(), "RedisPublisher")))
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

/// What the server keeps of what it confirmed.
fn durability(append_only: bool, fsync: &str, flushed: bool) -> Result<Durability> {
    match (append_only, fsync) {
        (true, "always") => Ok(Durability::Flushed),
        (true, _) if flushed => Ok(Durability::Flushed),
        (true, _) => Ok(Durability::Broker),
        (false, _) if flushed => Err(Error::new(
            ErrorKind::Config,
            "durability=flushed needs a server with an append-only file: set appendonly yes",
        )),
        (false, _) => Ok(Durability::Process),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confirm_claims_what_the_server_keeps() {
        for (append_only, fsync, flushed, claim) in [
            (false, "everysec", false, Durability::Process),
            (true, "everysec", false, Durability::Broker),
            (true, "everysec", true, Durability::Flushed),
            (true, "always", false, Durability::Flushed),
        ] {
            assert_eq!(durability(append_only, fsync, flushed).unwrap(), claim);
        }
        assert_eq!(durability(false, "no", true).unwrap_err().kind(), ErrorKind::Config);
    }
}
