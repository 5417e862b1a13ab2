//! NATS with JetStream, 2.10 or later: a topic is a stream for each partition.
//!
//! An event is a message on the subject `evt.topic.partition`, kept by the stream `evt-topic-partition` (a dot in the
//! name is written `=` there), and its offset is its sequence. A partition is read by one member at a time, in order,
//! through a pull consumer that the server forgets afterwards. Groups are kept in the bucket `evt`, changed by
//! compare and set, and not as durable consumers: those give what was not acknowledged to any member, behind what
//! came later, so they keep no order; and two owners of one overlap. So an event is settled alone, retried with a
//! delay and counted exactly, and the owner of a partition that was lost changes nothing.
//!
//! The address is `nats://user:password@host:port,host:port?…`; a user alone is a token.
//!
//! | Option | Default | Meaning |
//! |---|---|---|
//! | `declare` | `verify` | `create`: topics are created on use; `verify`: a topic must exist |
//! | `partitions` | 16 | of topics that are created on use; each is a stream |
//! | `replicas` | 1 | copies of each stream that is created, and of the bucket: 1, 3 or 5 |
//! | `retention` | `7d` | age above which events are removed, settled or not, of topics that are created on use; `off` = kept |
//! | `max_event_bytes` | the server's `max_payload` less 16 KiB | largest event |
//! | `dedup` | `off` | a window in which an event of the same source and id is stored once (`Nats-Msg-Id`) |
//! | `session` | 10 s | a member that is silent for so long loses its partitions |
//! | `timeout` | 10 s | longest wait for a connection or an answer; a publish without one is unknown then |
//! | `tls` | `off` on loopback, else `on` | `on`: the connection must speak TLS |
//! | `ca` | the system's | file (PEM) of the authorities to trust |
//! | `cert`, `key` | none | files (PEM) of the certificate that is shown to the server, and of its key |
//! | `credentials` | none | file of credentials (JWT and key) |
//!
//! TLS takes the process's provider of cryptography (rustls); where the program installed none before it connects, this
//! installs ring.
//!
//! With `dedup` on, an event that is replayed into its topic within the window is taken for a repetition, and is not
//! stored: that is why it is off. A confirm says that the servers hold the event, not that a disk does: JetStream
//! syncs every two minutes unless `sync_interval: always` is set. Events are removed by age whether groups have
//! settled them or not; a group that was behind gets an error that says so. Leases and delays are in the server's
//! time. What waits to be published is bounded: 65,536 events and 64 MiB; what is read ahead too: 1 MiB of each
//! partition, and what the server sends at once.

mod admin;
mod bucket;
mod fitness;
mod leases;
mod message;
mod names;
mod pages;
mod publisher;
mod reader;
mod store;
mod topics;

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
use crate::error::{Error, Result};
use crate::subscription::Subscription;
use crate::url::Url;

/// Bounds and times of a NATS client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether topics are created on use; otherwise one that is missing is an error.
    pub create_topics: bool,
    /// Partitions of topics that are created on use, at most 1,024.
    pub partitions: u32,
    /// Copies of streams that are created, and of the bucket.
    pub replicas: usize,
    /// Age above which events are removed, of topics that are created on use; `None` = kept.
    pub retention: Option<Duration>,
    /// Largest event in bytes, headers counted; `None` = as the server is set.
    pub max_event_bytes: Option<usize>,
    /// The window in which an event is stored once; `None` = it is stored as often as it is published.
    pub dedup: Option<Duration>,
    /// A member that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// Longest wait for a connection or an answer.
    pub timeout: Duration,
    /// Whether the connection must speak TLS.
    pub tls: bool,
    /// Authorities to trust instead of the system's, and who we are.
    pub files: TlsFiles,
    /// A file of credentials.
    pub credentials: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create_topics: false,
            partitions: TopicSpec::PARTITIONS.get(),
            replicas: 1,
            retention: Some(Duration::from_secs(7 * 86_400)),
            max_event_bytes: None,
            dedup: None,
            session: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            tls: false,
            files: TlsFiles::default(),
            credentials: None,
        }
    }
}

const KNOWN: [&str; 13] = [
    "declare",
    "partitions",
    "replicas",
    "retention",
    "max_event_bytes",
    "dedup",
    "session",
    "timeout",
    "tls",
    "ca",
    "cert",
    "key",
    "credentials",
];

/// Where a server listens of which no port is said.
const PORT: u16 = 4222;

/// Most partitions of a topic: each is a stream.
const MAX_PARTITIONS: u32 = 1024;

impl Options {
    /// The options of a URL such as `nats://broker:4222?declare=create`.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        let mut options = Self { tls: !url.authority(PORT)?.is_loopback(), ..Self::default() };
        for (name, value) in url.options() {
            match name {
                "declare" => options.create_topics = url.choice(name, value, &["verify", "create"])? == 1,
                "partitions" => options.partitions = url.number(name, value)?,
                "replicas" => options.replicas = url.number(name, value)?,
                "retention" if value == "off" => options.retention = None,
                "retention" => options.retention = Some(url.duration(name, value)?),
                "max_event_bytes" => options.max_event_bytes = Some(url.number(name, value)?),
                "dedup" if value == "off" => options.dedup = None,
                "dedup" => options.dedup = Some(url.duration(name, value)?),
                "session" => options.session = url.duration(name, value)?,
                "timeout" => options.timeout = url.duration(name, value)?,
                "tls" => options.tls = url.choice(name, value, &["off", "on"])? == 1,
                "ca" => options.files.ca = Some(PathBuf::from(value)),
                "cert" => options.files.cert = Some(PathBuf::from(value)),
                "key" => options.files.key = Some(PathBuf::from(value)),
                "credentials" => options.credentials = Some(PathBuf::from(value)),
                _ => return Err(url.unknown_option(name, &KNOWN)),
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        limits::partitions(self.partitions, MAX_PARTITIONS)?;
        if !matches!(self.replicas, 1 | 3 | 5) {
            return Err(Error::config("replicas must be 1, 3 or 5"));
        }
        self.max_event_bytes.map_or(Ok(()), limits::max_event_bytes)?;
        limits::session(self.session, limits::SESSION)?;
        limits::timeout(self.timeout)?;
        let is_short = |bound: Option<Duration>| bound.is_some_and(|bound| bound < topics::SHORTEST);
        if is_short(self.dedup) || is_short(self.retention) {
            return Err(Error::config("dedup and retention must be 100ms or more, or off"));
        }
        if self.dedup.zip(self.retention).is_some_and(|(dedup, retention)| dedup > retention) {
            return Err(Error::config("dedup must not be longer than retention"));
        }
        Ok(())
    }
}

/// A NATS server with JetStream as a broker. Clones share their connection, and so does everything opened from them.
#[derive(Clone)]
pub struct Nats {
    store: Arc<Store>,
    consumers: Arc<Consumers<Store>>,
}

impl Nats {
    /// Connects to the server or cluster that an address names.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an option that cannot be used;
    /// [`Unauthorized`](crate::ErrorKind::Unauthorized) for a wrong user, password or token, or if TLS fails;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if no server answers within `timeout`, or JetStream is off.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        let store = Store::open(url, Options::from_url(url)?).await?;
        Ok(Self { store, consumers: Arc::default() })
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nats")
            .field("place", &self.store.place)
            .field("options", &self.store.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Nats {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: Durability::Broker,
            max_event_bytes: Some(self.store.max_event_bytes),
            dedup: self.store.options.dedup,
            ..leased::CLAIMS
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.store.is_open()?;
        Ok(Arc::new(QueuedPublisher::new(self.store.queue.clone(), "NatsPublisher")))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_loopback_it_speaks_tls_unless_told_otherwise() {
        for (address, tls) in [
            ("nats://127.0.0.1", false),
            ("nats://localhost?tls=on", true),
            ("nats://broker:4222", true),
            ("nats://127.0.0.1,broker", true),
            ("nats://broker?tls=off", false),
        ] {
            let url = Url::parse(address).unwrap();
            assert_eq!(Options::from_url(&url).unwrap().tls, tls, "{address}");
        }
    }
}
