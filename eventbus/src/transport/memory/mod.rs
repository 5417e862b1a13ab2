//! The in-process transport: fit for production where losing events at process end is acceptable.
//!
//! Bounded by count and bytes, first in first out per key, with leases, attempts, delays and
//! rejects; optionally a replay ring and a deduplication window.
//!
//! | Option of `memory://name?…` | Default | Meaning |
//! |---|---|---|
//! | `partitions` | 16 | of topics that are created on use; with 1, order is kept per topic |
//! | `max_events` | 65536 | unsettled events a topic holds before publishing waits |
//! | `max_bytes` | 256 MiB | unsettled bytes a topic holds before publishing waits |
//! | `max_event_bytes` | 4 MiB | largest event |
//! | `replay` | 0 | settled events kept for replay, per partition; 0 = none |
//! | `dedup` | off | how long one id is stored once, such as `2m` |

mod admin;
mod closing;
mod consumer;
mod group;
mod inbox;
mod publisher;
mod topic;

use std::collections::HashMap;
use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use self::closing::Closing;
use self::publisher::MemoryPublisher;
use self::topic::TopicState;
use super::kit::hand::MAX_PARTITIONS;
use super::kit::wall::Wall;
use super::{Consumer, InFile, Publisher, Transport};
use crate::admin::{Admin, TopicSpec};
use crate::capability::{
    Ack, Attempts, Capabilities, Durability, Instances, Lease, Members, Ordering, Replay,
};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::subscription::Subscription;
use crate::url::Url;

/// Bounds and features of an in-process broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Partitions of topics that are created on use, at most 65,536; with 1, order is kept per topic.
    pub partitions: NonZeroU32,
    /// Unsettled events a topic holds before publishing waits.
    pub max_events: NonZeroUsize,
    /// Unsettled bytes a topic holds before publishing waits.
    pub max_bytes: NonZeroUsize,
    /// Largest event in bytes, headers counted; at most `max_bytes`.
    pub max_event_bytes: NonZeroUsize,
    /// Settled events kept for replay, per partition; 0 = no replay.
    pub replay: usize,
    /// How long one id is stored once; `None` = every copy is stored.
    pub dedup: Option<Duration>,
}

const fn at_least_one(n: usize) -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(n.saturating_sub(1))
}

impl Default for Options {
    fn default() -> Self {
        Self {
            partitions: TopicSpec::PARTITIONS,
            max_events: at_least_one(65_536),
            max_bytes: at_least_one(256 << 20),
            max_event_bytes: at_least_one(4 << 20),
            replay: 0,
            dedup: None,
        }
    }
}

impl Options {
    /// The options of a URL such as `memory://shop?replay=1000`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        let mut options = Self::default();
        for (name, value) in url.options() {
            match name {
                "partitions" => options.partitions = url.number(name, value)?,
                "max_events" => options.max_events = url.number(name, value)?,
                "max_bytes" => options.max_bytes = url.number(name, value)?,
                "max_event_bytes" => options.max_event_bytes = url.number(name, value)?,
                "replay" => options.replay = url.number(name, value)?,
                "dedup" => options.dedup = Some(url.duration(name, value)?),
                _ => {
                    return Err(url.unknown_option(
                        name,
                        &["partitions", "max_events", "max_bytes", "max_event_bytes", "replay", "dedup"],
                    ));
                }
            }
        }
        if options.partitions.get() > MAX_PARTITIONS {
            return Err(url.bad_option("partitions", "is above 65536"));
        }
        if options.max_event_bytes > options.max_bytes {
            return Err(Error::config("max_event_bytes is above max_bytes: such an event would never fit"));
        }
        Ok(options)
    }
}

/// The in-process transport. Clones and values opened under one name share a broker.
#[derive(Clone)]
pub struct Memory {
    broker: Arc<Broker>,
    /// Closed with this value, not with the broker.
    closed: Arc<Closing>,
}

struct Broker {
    options: Options,
    topics: Mutex<HashMap<Topic, Arc<TopicState>>>,
    next_member: AtomicU64,
    wall: Arc<Wall>,
}

/// Brokers that were opened by name; they live as long as a value that uses them.
static NAMED: Mutex<Option<HashMap<String, Weak<Broker>>>> = Mutex::new(None);

impl Memory {
    /// Creates a broker of its own.
    pub fn new(options: Options) -> Self {
        Self::over(Arc::new(Broker::new(options)))
    }

    /// Opens the broker of this name in this process; an empty name is a broker of its own.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) if it is open with other options.
    pub fn named(name: &str, options: Options) -> Result<Self> {
        if name.is_empty() {
            return Ok(Self::new(options));
        }
        let mut named = NAMED.lock();
        let named = named.get_or_insert_default();
        named.retain(|_, broker| broker.strong_count() > 0);
        let broker = match named.get(name).and_then(Weak::upgrade) {
            Some(broker) if broker.options != options => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "this in-memory broker is open with other options",
                )
                .with("name", name));
            }
            Some(broker) => broker,
            None => {
                let broker = Arc::new(Broker::new(options));
                named.insert(name.to_owned(), Arc::downgrade(&broker));
                broker
            }
        };
        Ok(Self::over(broker))
    }

    fn over(broker: Arc<Broker>) -> Self {
        Self { broker, closed: Arc::default() }
    }

    /// Opens another value on the same broker, closed apart from this one.
    #[must_use]
    pub fn reopen(&self) -> Self {
        Self::over(self.broker.clone())
    }

    fn open(&self) -> Result<()> {
        if self.closed.is_closed() { Err(Error::closed("transport")) } else { Ok(()) }
    }
}

impl Broker {
    fn new(options: Options) -> Self {
        Self { options, topics: Mutex::default(), next_member: AtomicU64::new(1), wall: Arc::default() }
    }

    fn topic(&self, topic: &Topic) -> Arc<TopicState> {
        let mut topics = self.topics.lock();
        if let Some(state) = topics.get(topic) {
            return state.clone();
        }
        let bounded = self.options.partitions.get().min(MAX_PARTITIONS);
        let partitions = NonZeroU32::new(bounded).unwrap_or(TopicSpec::PARTITIONS);
        let spec = TopicSpec::new(topic.clone()).with_partitions(partitions);
        let state = Arc::new(TopicState::new(spec, &self.options, self.wall.clone()));
        topics.insert(topic.clone(), state.clone());
        state
    }

    fn existing(&self, topic: &Topic) -> Result<Arc<TopicState>> {
        self.topics
            .lock()
            .get(topic)
            .cloned()
            .ok_or_else(|| Error::not_found("there is no such topic").with("topic", topic))
    }

    fn next_member(&self) -> u64 {
        self.next_member.fetch_add(1, Atomic::Relaxed)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("options", &self.broker.options).finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Memory {
    fn capabilities(&self) -> Capabilities {
        let options = &self.broker.options;
        Capabilities {
            ordering: if options.partitions.get() == 1 { Ordering::PerTopic } else { Ordering::PerKey },
            order_members: if options.partitions.get() == 1 { Members::One } else { Members::Many },
            ack: Ack::Individual,
            lease: Lease::Extendable,
            attempts: Attempts::Exact,
            delay: true,
            dedup: options.dedup,
            replay: if options.replay > 0 { Replay::OffsetAndTime } else { Replay::None },
            durability: Durability::Volatile,
            max_event_bytes: Some(options.max_event_bytes.get()),
            absent_payload: true,
            instances: Instances::One,
            admin: true,
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.open()?;
        Ok(Arc::new(MemoryPublisher::new(self.broker.clone(), self.closed.clone())))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        self.open()?;
        subscription.check(&self.capabilities())?;
        let topic = self.broker.topic(&subscription.topic);
        let member = self.broker.next_member();
        Ok(Arc::new(consumer::MemoryConsumer::join(topic, member, subscription, self.closed.clone())?))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        Some(self)
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.closed.close();
        let topics: Vec<_> = self.broker.topics.lock().values().cloned().collect();
        for topic in topics {
            topic.leave_all(&self.closed);
        }
        Ok(())
    }
}
