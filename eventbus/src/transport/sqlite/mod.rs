//! The embedded durable transport: one SQLite file, shared by several processes of one machine.
//!
//! Write-ahead log, a sync for every commit, one writer in each process that commits everything that
//! waits at once. Partitions and groups are as on a broker: keys keep their order, groups are durable,
//! members share partitions and hand them over.
//!
//! | Option of `sqlite://path?…` | Default | Meaning |
//! |---|---|---|
//! | `partitions` | 16 | of topics that are created on use |
//! | `max_event_bytes` | 4 MiB | largest event |
//! | `max_file_bytes` | unbounded | size of the file above which publishing is refused as full |
//! | `session` | 10 s | a process that is silent for so long loses its partitions |
//! | `busy_timeout` | 10 s | how long to wait for another process's transaction |
//!
//! What waits for the writer is bounded: 65,536 events and 64 MiB; publishing waits beyond. Settled
//! events are kept until the topic's retention removes them: never before every group has settled them.

mod admin;
mod clock;
mod fitness;
mod in_file;
mod leases;
mod membership;
mod publisher;
mod retention;
mod row;
mod schema;
mod store;
mod topics;
mod writer;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::Duration;

use async_trait::async_trait;

use self::publisher::SqlitePublisher;
use self::store::Store;
use super::kit::leased::{self, Consumers, LeasedConsumer};
use super::kit::limits;
use super::{Consumer, InFile, Publisher, Transport};
use crate::admin::{Admin, TopicSpec};
use crate::capability::{Capabilities, Durability};
use crate::error::{Error, ErrorKind, Result};
use crate::subscription::Subscription;
use crate::url::Url;

/// Bounds and times of an SQLite store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Partitions of topics that are created on use, at most 4,096.
    pub partitions: u32,
    /// Largest event in bytes, headers counted; at most 64 MiB.
    pub max_event_bytes: usize,
    /// Size of the file above which publishing is refused as full; `None` = the disk decides.
    pub max_file_bytes: Option<u64>,
    /// A process that is silent for so long loses its partitions to others.
    pub session: Duration,
    /// How long to wait for another process's transaction.
    pub busy_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            partitions: TopicSpec::PARTITIONS.get(),
            max_event_bytes: 4 << 20,
            max_file_bytes: None,
            session: Duration::from_secs(10),
            busy_timeout: Duration::from_secs(10),
        }
    }
}

impl Options {
    /// The options of a URL such as `sqlite://shop.db?partitions=4`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) naming the option that is unknown or out of range.
    pub fn from_url(url: &Url) -> Result<Self> {
        let mut options = Self::default();
        for (name, value) in url.options() {
            match name {
                "partitions" => options.partitions = url.number(name, value)?,
                "max_event_bytes" => options.max_event_bytes = url.number(name, value)?,
                "max_file_bytes" => options.max_file_bytes = Some(url.number(name, value)?),
                "session" => options.session = url.duration(name, value)?,
                "busy_timeout" => options.busy_timeout = url.duration(name, value)?,
                _ => {
                    return Err(url.unknown_option(
                        name,
                        &["partitions", "max_event_bytes", "max_file_bytes", "session", "busy_timeout"],
                    ));
                }
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        limits::partitions(self.partitions, schema::MAX_PARTITIONS)?;
        limits::max_event_bytes(self.max_event_bytes)?;
        limits::session(self.session, limits::SESSION)
    }
}

/// The embedded durable transport.
///
/// Clones share the file handle and its writer; so do everything opened from them. A second value on
/// the same path is a second writer, as another process would be.
#[derive(Clone)]
pub struct Sqlite {
    store: Arc<Store>,
    consumers: Arc<Consumers<Store>>,
}

impl Sqlite {
    /// Opens the file that an address names, creating it if it does not exist.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) for a path or option that cannot be used; [`Corrupt`](ErrorKind::Corrupt)
    /// for a file that is not SQLite or is damaged; [`Unauthorized`](ErrorKind::Unauthorized) for a
    /// read-only one; [`Conflict`](ErrorKind::Conflict) for one written by a newer version.
    ///
    /// # Cancellation
    /// The file may have been created; nothing stays open.
    pub async fn open(url: &Url) -> Result<Self> {
        if url.place().is_empty() {
            return Err(Error::config("sqlite:// needs the path of a file, such as sqlite://shop.db"));
        }
        Self::open_path(url.place(), Options::from_url(url)?).await
    }

    /// Opens a file.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Cancellation
    /// The file may have been created; nothing stays open.
    pub async fn open_path(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        options.check()?;
        let path: PathBuf = path.as_ref().to_owned();
        let opening = tokio::task::spawn_blocking(move || Store::open(&path, options));
        let store = opening.await.map_err(|error| {
            Error::new(ErrorKind::Unexpected, "opening was interrupted").caused_by(error)
        })??;
        Ok(Self { store, consumers: Arc::default() })
    }

    /// Bounds the size of the file from now on; `None` = the disk decides.
    ///
    /// # Errors
    /// [`Closed`](ErrorKind::Closed).
    pub fn set_max_file_bytes(&self, bytes: Option<u64>) -> Result<()> {
        self.store.bound(bytes)
    }

    /// Steps the wall clock that this value sees, by nanoseconds: the conformance suite's clock hook.
    #[cfg(feature = "conformance")]
    #[doc(hidden)]
    pub fn step_clock(&self, by_nanos: i64) {
        self.store.wall.step(by_nanos);
    }

    /// Returns how many transactions were committed, each with one sync of the log.
    pub fn n_commits(&self) -> u64 {
        self.store.counters.commits.load(Atomic::Relaxed)
    }

    /// Returns how many publishes, settles and other writes those transactions carried.
    pub fn n_writes(&self) -> u64 {
        self.store.counters.jobs.load(Atomic::Relaxed)
    }
}

impl fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sqlite")
            .field("file", &self.store.path)
            .field("options", &self.store.options)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Sqlite {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: Durability::Flushed,
            max_event_bytes: Some(self.store.options.max_event_bytes),
            ..leased::CLAIMS
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.store.is_open()?;
        Ok(Arc::new(SqlitePublisher::new(self.store.clone())))
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
        Some(self)
    }

    async fn close(&self) -> Result<()> {
        let outcome = self.consumers.leave().await;
        self.store.close().await.and(outcome)
    }
}
