//! Apache Kafka 3.9 or later, through librdkafka.
//!
//! A topic is a topic, a group is a consumer group, and keys land on the partition that the Java client chooses
//! (murmur2). The producer is idempotent and waits for all in-sync replicas; offsets are committed up to the first
//! event that is not settled, and never after a partition was lost. A partition that moves is drained first:
//! members keep polling meanwhile.
//!
//! The address is `kafka://user:password@host:port,host:port?…`.
//!
//! | Option | Default | Meaning |
//! |---|---|---|
//! | `declare` | `verify` | `create`: topics are created on use; `verify`: a topic must exist |
//! | `partitions` | 16 | of topics that are created on use |
//! | `replication` | the broker's | copies of topics that are created on use |
//! | `max_event_bytes` | 983,040 | largest event; the topic's `max.message.bytes` must be larger |
//! | `session` | 10 s | a member that is silent for so long loses its partitions |
//! | `timeout` | 10 s | longest wait for an answer |
//! | `delivery_timeout` | 120 s | how long a publish is tried before its outcome is unknown |
//! | `linger` | 0 ms | how long a publish waits for company |
//! | `compression` | `lz4` | `none`, `gzip`, `lz4` |
//! | `protocol` | `classic` | `consumer`: groups of KIP-848, assigned by the broker (Kafka 4.0) |
//! | `instance` | none | `group.instance.id`: a member that comes back soon keeps its partitions |
//! | `security` | `plaintext` on loopback, else `ssl` | `plaintext`, `ssl`, `sasl_plaintext`, `sasl_ssl` |
//! | `sasl` | `PLAIN` | `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`, with the user and password of the address |
//! | `ca` | the system's | file (PEM) of the authorities to trust |
//! | `cert`, `key` | none | files (PEM) of the certificate that is shown to the broker, and of its key |
//!
//! `ssl` and SCRAM need the feature `kafka-tls`. Kafka keeps no count of attempts, no lease and no delay: a failed
//! event is retried by the driver, which parks it in a topic. Names that differ only in `.` and `_` cannot stand
//! side by side in Kafka; the second is refused as a conflict. What a confirm means is what `acks=all` means: in the
//! memory of every in-sync replica, not on a disk. What waits to be published is bounded: 65,536 events and 64 MiB;
//! what is read ahead too: 16 MiB.
//!
//! The first event that a producer sends to a partition (and the first after a minute without one) goes alone, which
//! costs it one round trip: librdkafka takes a refused request for stored if the next one was taken, which brokers do
//! for producers that they do not know (confluent-kafka-go #921). What librdkafka calls delivered without an offset
//! has an unknown outcome here.
//!
//! Exactly-once by transactions (consume, process, produce) is not offered. librdkafka 2.12 lacks part 2 of KIP-890
//! (librdkafka #5423): an end of a transaction that was delayed on the wire may end the next one, and events would be
//! committed that their handler took back, or the other way round. Handlers run at least once on Kafka as everywhere.
//! Records of other programs' transactions are read once they are committed (`isolation.level=read_committed`).

mod admin;
mod client;
mod consumer;
mod ends;
mod fitness;
mod hold;
mod line;
mod publisher;
mod pump;
mod record;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use self::client::Client;
use self::consumer::KafkaConsumer;
use self::publisher::KafkaPublisher;
use super::kit::limits;
use super::{Consumer, InFile, Publisher, Transport};
use crate::admin::{Admin, TopicSpec};
use crate::capability::{Ack, Capabilities, Durability, Instances, Members, Ordering, Replay};
use crate::error::{Error, Result};
use crate::subscription::Subscription;
use crate::url::Url;

/// Bounds and times of a Kafka client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether topics are created on use; otherwise one that is missing is an error.
    pub create_topics: bool,
    /// Partitions of topics that are created on use.
    pub partitions: u32,
    /// Copies of topics that are created on use; `None` = as the broker is set.
    pub replication: Option<u16>,
    /// Largest event in bytes, headers counted; at most 64 MiB.
    pub max_event_bytes: usize,
    /// A member that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// How long a publish is tried before its outcome is unknown.
    pub delivery_timeout: Duration,
    /// How long a publish waits for company.
    pub linger: Duration,
    /// `none`, `gzip` or `lz4`.
    pub compression: &'static str,
    /// Whether the broker assigns partitions (KIP-848).
    pub consumer_protocol: bool,
    /// The static member id, if there is one.
    pub instance: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create_topics: false,
            partitions: TopicSpec::PARTITIONS.get(),
            replication: None,
            max_event_bytes: 960 << 10,
            session: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            delivery_timeout: Duration::from_secs(120),
            linger: Duration::ZERO,
            compression: "lz4",
            consumer_protocol: false,
            instance: None,
        }
    }
}

const KNOWN: [&str; 16] = [
    "declare",
    "partitions",
    "replication",
    "max_event_bytes",
    "session",
    "timeout",
    "delivery_timeout",
    "linger",
    "compression",
    "protocol",
    "instance",
    "security",
    "sasl",
    "ca",
    "cert",
    "key",
];

impl Options {
    /// The options of a URL such as `kafka://broker:9092?declare=create`.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        const COMPRESSIONS: [&str; 3] = ["none", "gzip", "lz4"];
        let mut options = Self::default();
        for (name, value) in url.options() {
            match name {
                "declare" => options.create_topics = url.choice(name, value, &["verify", "create"])? == 1,
                "partitions" => options.partitions = url.number(name, value)?,
                "replication" => options.replication = Some(url.number(name, value)?),
                "max_event_bytes" => options.max_event_bytes = url.number(name, value)?,
                "session" => options.session = url.duration(name, value)?,
                "timeout" => options.timeout = url.duration(name, value)?,
                "delivery_timeout" => options.delivery_timeout = url.duration(name, value)?,
                "linger" => options.linger = url.duration(name, value)?,
                "compression" => {
                    let chosen = url.choice(name, value, &COMPRESSIONS)?;
                    options.compression = COMPRESSIONS.get(chosen).copied().unwrap_or("lz4");
                }
                "protocol" => {
                    options.consumer_protocol = url.choice(name, value, &["classic", "consumer"])? == 1
                }
                "instance" => options.instance = Some(value.to_owned()),
                "security" | "sasl" | "ca" | "cert" | "key" => {}
                _ => return Err(url.unknown_option(name, &KNOWN)),
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        limits::partitions(self.partitions, u32::from(u16::MAX))?;
        if self.replication == Some(0) {
            return Err(Error::config("replication must be 1 or more"));
        }
        limits::max_event_bytes(self.max_event_bytes)?;
        limits::session(self.session, limits::SESSION)?;
        limits::timeout(self.timeout)?;
        if self.delivery_timeout.is_zero() {
            return Err(Error::config("delivery_timeout must be longer than zero"));
        }
        if self.linger >= self.delivery_timeout {
            return Err(Error::config("linger must be shorter than delivery_timeout"));
        }
        Ok(())
    }
}

/// Kafka as a broker. Clones share their producer, and so does everything opened from them.
#[derive(Clone)]
pub struct Kafka {
    client: Arc<Client>,
    consumers: Arc<Mutex<Vec<std::sync::Weak<KafkaConsumer>>>>,
}

impl Kafka {
    /// Connects to the cluster that an address names.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an option that cannot be used;
    /// [`Unauthorized`](crate::ErrorKind::Unauthorized) for a wrong user or password, or if TLS fails;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if no broker answers within `timeout`.
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        let client = Client::open(url, Options::from_url(url)?).await?;
        Ok(Self { client, consumers: Arc::default() })
    }
}

impl fmt::Debug for Kafka {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kafka")
            .field("place", &self.client.place)
            .field("options", &self.client.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Kafka {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            ordering: Ordering::PerKey,
            order_members: Members::Many,
            ack: Ack::Cumulative,
            replay: Replay::OffsetAndTime,
            durability: Durability::Broker,
            max_event_bytes: Some(self.client.options.max_event_bytes),
            absent_payload: true,
            instances: Instances::Many,
            admin: true,
            ..Capabilities::NONE
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.client.is_open()?;
        Ok(Arc::new(KafkaPublisher::new(self.client.clone())))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        self.client.is_open()?;
        subscription.check(&self.capabilities())?;
        let consumer = KafkaConsumer::join(self.client.clone(), subscription).await?;
        let mut consumers = self.consumers.lock();
        consumers.retain(|known| known.strong_count() > 0);
        consumers.push(Arc::downgrade(&consumer));
        Ok(consumer)
    }

    fn admin(&self) -> Option<&dyn Admin> {
        Some(self)
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.client.close();
        // On a task of its own: a caller who goes away does not end it, and one who comes again waits for it too.
        let (client, consumers) = (self.client.clone(), self.consumers.clone());
        let closing = tokio::spawn(async move {
            let open: Vec<_> = consumers.lock().iter().filter_map(std::sync::Weak::upgrade).collect();
            for consumer in open {
                consumer.leave().await;
            }
            client.producing.flush().await;
        });
        closing.await.map_err(client::interrupted)
    }
}
