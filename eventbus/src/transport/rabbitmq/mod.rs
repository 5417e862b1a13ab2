//! RabbitMQ 3.10 or later: a topic is a super stream, with a stream queue for each partition.
//!
//! An event is a message published to the exchange of the topic's name, with the number of its partition as the routing
//! key, and kept by the stream `topic-N`; its offset is the stream's. A partition is read by one member at a time, in
//! order. So an event is settled alone, retried with a delay and counted exactly, groups begin where they want, and what
//! was settled can be read again.
//!
//! Why streams and not quorum queues: those hand what was not acknowledged to any member, behind what came later, so
//! that many members keep no order before RabbitMQ 4.0 (single active consumers with priorities), and what was
//! acknowledged is gone. Any queue can be bound to a topic's exchange beside its streams, for programs that want one; one that
//! rejects (`overflow=reject-publish`) makes publishing fail, though the stream has the event.
//! Groups are kept in a stream of each topic, `evt:groups:topic`: changes are messages that name the revision they were
//! made from, and whoever reads the stream agrees which of them hold. The owner of a partition that was lost changes
//! nothing.
//!
//! The address is `amqp://user:password@host:port,host:port/vhost?…`; `amqps://` speaks TLS (feature `rabbitmq-tls`).
//! Without a virtual host it is `/`. The user must be allowed to configure, write and read.
//!
//! | Option | Default | Meaning |
//! |---|---|---|
//! | `declare` | `verify` | `create`: topics are created on use; `verify`: a topic must exist |
//! | `partitions` | 16 | of topics that are created on use; each is a stream |
//! | `retention` | `7d` | age above which events are removed, settled or not, of topics that are created on use; `off` = kept |
//! | `max_event_bytes` | 1 MiB | largest event; the server's own bound (`max_message_size`) is 16 MiB from 4.0 on |
//! | `session` | 10 s | a member that is silent for so long (2 s at least) loses its partitions |
//! | `timeout` | 10 s | longest wait for a connection or an answer; a publish without one is unknown then |
//! | `ca` | the system's | file (PEM) of authorities to trust beside the system's |
//! | `cert`, `key` | none | files (PEM) of the certificate that is shown to the broker, and of its key |
//!
//! A confirm says that a majority of the stream's copies has the event, in memory: streams are not synced to disk before
//! (RabbitMQ manual, "Streams: Data Safety"). It names no offset. In a cluster what is read is the copy of the node that
//! one is connected to, which may be behind for a moment. Events are removed by age in pieces of 64 MiB, whether
//! groups have settled them or not; a group that was behind gets an error that says so. Purging hides events, which go
//! by age. A member is dead when its connection is gone, and it
//! said nothing for a session to those who knew it: no clock is compared. When an
//! event was stored is what its publisher's clock said, and the broker has seconds of its own: positions by time are
//! exact if the two are at most a second apart, and as near as they are otherwise. A delay is kept as what is left of it. While the broker has an alarm of memory or
//! disk it takes nothing: publishing fails after `timeout`, and groups stand still. What waits to be published is
//! bounded: 65,536 events and 64 MiB; what is read ahead too: 1 MiB of each partition, and at most 128 events that the
//! broker sends at once.

mod admin;
mod fitness;
mod map;
mod message;
mod names;
mod publisher;
mod reader;
mod store;
mod streams;
mod table;
mod topics;
mod wire;

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

/// Bounds and times of a RabbitMQ client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether topics are created on use; otherwise one that is missing is an error.
    pub create_topics: bool,
    /// Partitions of topics that are created on use, at most 1,024.
    pub partitions: u32,
    /// Age above which events are removed, of topics that are created on use; `None` = kept.
    pub retention: Option<Duration>,
    /// Largest event in bytes, headers counted.
    pub max_event_bytes: usize,
    /// A member that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// Longest wait for a connection or an answer.
    pub timeout: Duration,
    /// Authorities to trust beside the system's, and who we are.
    pub files: TlsFiles,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create_topics: false,
            partitions: TopicSpec::PARTITIONS.get(),
            retention: Some(Duration::from_secs(7 * 86_400)),
            max_event_bytes: 1 << 20,
            session: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            files: TlsFiles::default(),
        }
    }
}

const KNOWN: [&str; 9] =
    ["declare", "partitions", "retention", "max_event_bytes", "session", "timeout", "ca", "cert", "key"];

/// Most partitions of a topic: each is a stream.
const MAX_PARTITIONS: u32 = 1024;

impl Options {
    /// The options of a URL such as `amqp://broker:5672/vhost?declare=create`.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option that is unknown or out of range.
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
        // Heartbeats of AMQP are whole seconds, and two of them must fit.
        limits::session(self.session, Duration::from_secs(2))?;
        limits::timeout(self.timeout)?;
        if self.retention.is_some_and(|age| age < Duration::from_secs(1)) {
            return Err(Error::config("retention must be 1s or more, or off"));
        }
        Ok(())
    }
}

/// A virtual host of RabbitMQ as a broker. Clones share their connections, and so does everything opened from them.
#[derive(Clone)]
pub struct RabbitMq {
    store: Arc<Store>,
    consumers: Arc<Consumers<Store>>,
}

impl RabbitMq {
    /// Connects to the broker or cluster that an address names.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an option that cannot be used, or a virtual host that does not exist or
    /// may not be entered; [`Unauthorized`](crate::ErrorKind::Unauthorized) for a wrong user or password, or one that may
    /// not declare, or if TLS fails; [`Unavailable`](crate::ErrorKind::Unavailable) if no broker answers within `timeout`.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        let store = Store::open(url, Options::from_url(url)?).await?;
        Ok(Self { store, consumers: Arc::default() })
    }
}

impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq")
            .field("place", &self.store.wires.place)
            .field("options", &self.store.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for RabbitMq {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: Durability::Broker,
            max_event_bytes: Some(self.store.options.max_event_bytes),
            ..leased::CLAIMS
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.store.is_open()?;
        Ok(Arc::new(QueuedPublisher::new(self.store.queue.clone(), "RabbitMqPublisher")))
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
