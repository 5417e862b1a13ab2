//! Groups as entries of a map that is changed by compare and set: one for a group, with its members and who owns which
//! partition, and one for the position in each partition. Every change names the revision that it was made from.
//!
//! A store that has such a map, and whose partitions are read ahead by tasks, is a [`leased::Store`] by [`Registers`]
//! alone. Offsets begin at 1.

mod ahead;
mod docs;
pub(in crate::transport) mod groups;
mod membership;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

pub(in crate::transport) use self::ahead::{Ahead, Item};
pub(in crate::transport) use self::docs::{Clock, GroupDoc};
use crate::admin::{Offset, PartitionInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::Start;
use crate::transport::kit::tasks::Tasks;

/// How often a change is tried that others were quicker with.
const TRIES: usize = 200;

/// An entry of the map.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) enum Entry<'a> {
    /// A group of a topic, by its name.
    Group(&'a Topic, &'a str),
    /// Its position in a partition.
    Cursor(&'a Topic, &'a str, u32),
}

/// A value of the map with the revision that a change must name; 0 = there is none.
pub(in crate::transport) struct Held<T> {
    pub(in crate::transport) value: T,
    pub(in crate::transport) revision: u64,
}

/// First and next offset of a partition, and how many events it keeps.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Bounds {
    pub(in crate::transport) first: u64,
    pub(in crate::transport) next: u64,
    pub(in crate::transport) n_kept: u64,
}

impl Bounds {
    /// What operators see of them.
    pub(in crate::transport) fn info(self, partition: usize) -> PartitionInfo {
        let Self { first, next, n_kept } = self;
        PartitionInfo::new(PartitionId(partition as u32), Offset(first), Offset(next)).with_kept(n_kept)
    }
}

/// A map for groups, and partitions that are read ahead.
#[async_trait]
pub(in crate::transport) trait Registers: Send + Sync + 'static {
    /// The name that tells a consumer's transport apart in `Debug`.
    const NAME: &'static str;

    type Clock: Clock + Send + Sync;

    /// Fails once the store is closed.
    fn open(&self) -> Result<()>;

    /// A member that is silent for so long loses its partitions.
    fn silence(&self) -> Duration;

    fn tasks(&self) -> &Tasks;

    /// How moments are written now.
    fn clock(&self) -> Self::Clock;

    /// The value of an entry, as of now and not as some copy remembers it.
    async fn get<T: DeserializeOwned + Send>(&self, entry: Entry<'_>) -> Result<Option<Held<T>>>;

    /// Writes an entry if nobody changed it meanwhile; `None` = somebody did. Returns the new revision.
    async fn set<T: Serialize + Sync>(
        &self,
        entry: Entry<'_>,
        value: &T,
        revision: u64,
    ) -> Result<Option<u64>>;

    /// Removes an entry if nobody changed it meanwhile; `None` = somebody did.
    async fn remove(&self, entry: Entry<'_>, revision: u64) -> Result<Option<()>>;

    /// The names of a topic's groups; some may be gone.
    async fn groups(&self, topic: &Topic) -> Result<Vec<String>>;

    /// What is written into an entry from now on, or tried to be.
    async fn changes(&self, entry: Entry<'_>) -> Result<BoxStream<'static, Bytes>>;

    /// What a member that lives now writes as [`MemberDoc::until`](docs::MemberDoc::until).
    fn mark(&self) -> u64;

    /// Makes a member known as living, beside what it writes.
    async fn attend(&self, member: u64) -> Result<()>;

    /// Forgets what [`attend`](Self::attend) did.
    async fn absent(&self, member: u64);

    /// The members of a group that are dead now.
    async fn dead(&self, group: Entry<'_>, doc: &GroupDoc) -> Result<BTreeSet<u64>>;

    /// The number of partitions of a topic; it is created where that is wanted. May be remembered.
    async fn partitions(&self, topic: &Topic) -> Result<u32>;

    /// Forgets what [`partitions`](Self::partitions) remembers.
    fn forget(&self, topic: &Topic);

    /// The number of partitions of a topic that exists now.
    async fn existing(&self, topic: &Topic) -> Result<Option<u32>>;

    /// What the partitions of a topic hold; where that is not to be exact, their first offset may be seconds old.
    async fn bounds(&self, topic: &Topic, partitions: u32, is_exact: bool) -> Result<Vec<Bounds>>;

    /// The first event of a partition that was stored at or after a time.
    async fn first_since(
        &self,
        topic: &Topic,
        partition: u32,
        time: std::time::SystemTime,
    ) -> Result<Option<u64>>;

    /// Reads a partition ahead, in its order, until it is stopped.
    async fn read_ahead(
        self: Arc<Self>,
        topic: Topic,
        partition: u32,
        from: u64,
        ahead: Ahead,
        stopped: oneshot::Receiver<()>,
    );
}

/// Somebody was quicker with an operator's change.
pub(in crate::transport) fn changed_meanwhile() -> Error {
    Error::new(ErrorKind::Conflict, "it was changed meanwhile: a member may have joined")
}

/// The offset in each partition that a start means.
async fn starts<R: Registers>(store: &R, topic: &Topic, partitions: u32, start: &Start) -> Result<Vec<u64>> {
    let all = store.bounds(topic, partitions, true).await?;
    Ok(match start {
        Start::Latest => all.iter().map(|bounds| bounds.next).collect(),
        Start::Earliest => all.iter().map(|bounds| bounds.first).collect(),
        Start::Offsets(offsets) => {
            let wanted = |at: usize| offsets.get(&PartitionId(at as u32)).map_or(0, |offset| offset.0);
            all.iter().enumerate().map(|(at, bounds)| wanted(at).clamp(bounds.first, bounds.next)).collect()
        }
        Start::Time(time) => {
            let finding = all.iter().enumerate().map(|(at, bounds)| async move {
                let found = store.first_since(topic, at as u32, *time).await?;
                Ok::<_, Error>(found.unwrap_or(bounds.next))
            });
            futures_util::future::try_join_all(finding).await?
        }
    })
}
