//! Looking at topics and groups, and changing them, apart from the flow of events.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use crate::error::Result;
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::PartitionId;
use crate::transport::Content;

/// The position of an event in its partition: it ascends, and may have gaps.
///
/// Where a broker's own position is not one number, the transport packs it and says how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Offset(pub u64);

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How much of a topic is kept after every group has settled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Retention {
    /// Removed when older than this; `None` = no bound by age.
    pub max_age: Option<Duration>,
    /// Only so many events of a partition are kept; `None` = no bound by count.
    pub max_events: Option<NonZeroU64>,
}

/// The declaration of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicSpec {
    /// Its name.
    pub topic: Topic,
    /// The number of partitions; keys move if it changes, so it never changes silently.
    pub partitions: NonZeroU32,
    /// What is kept.
    pub retention: Retention,
}

impl TopicSpec {
    /// Default number of partitions.
    pub const PARTITIONS: NonZeroU32 = NonZeroU32::new(16).unwrap();

    /// Declares a topic with 16 partitions and the transport's default retention.
    pub fn new(topic: Topic) -> Self {
        Self { topic, partitions: Self::PARTITIONS, retention: Retention::default() }
    }

    /// Sets the number of partitions.
    #[must_use]
    pub fn with_partitions(mut self, partitions: NonZeroU32) -> Self {
        self.partitions = partitions;
        self
    }

    /// Sets the longest age of an event that is kept.
    #[must_use]
    pub fn with_max_age(mut self, age: Duration) -> Self {
        self.retention.max_age = Some(age);
        self
    }

    /// Sets how many events of a partition are kept.
    #[must_use]
    pub fn with_max_events(mut self, events: NonZeroU64) -> Self {
        self.retention.max_events = Some(events);
        self
    }
}

/// What is known of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartitionInfo {
    /// Its number.
    pub partition: PartitionId,
    /// The first offset that is kept; equal to `next` when it is empty.
    pub first: Offset,
    /// The offset that the next event gets, or (where offsets have gaps) one that it does not get below.
    pub next: Offset,
    /// How many events are kept. Where a broker does not count them (Kafka), how many offsets there are between
    /// `first` and `next`, which is more where a topic is compacted or events were written in transactions.
    pub n_kept: u64,
}

impl PartitionInfo {
    /// Describes a partition whose offsets have no gaps.
    pub fn new(partition: PartitionId, first: Offset, next: Offset) -> Self {
        Self { partition, first, next, n_kept: next.0.saturating_sub(first.0) }
    }

    /// Says how many events are kept, where that is not what the offsets say.
    #[must_use]
    pub fn with_kept(mut self, n_kept: u64) -> Self {
        self.n_kept = n_kept;
        self
    }
}

/// What is known of one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicInfo {
    /// Its name.
    pub topic: Topic,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionInfo>,
    /// What is kept.
    pub retention: Retention,
}

impl TopicInfo {
    /// Describes a topic.
    pub fn new(topic: Topic, partitions: Vec<PartitionInfo>, retention: Retention) -> Self {
        Self { topic, partitions, retention }
    }
}

/// The position of a group in one partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupInfo {
    /// The group.
    pub group: Group,
    /// The topic.
    pub topic: Topic,
    /// The partition.
    pub partition: PartitionId,
    /// Every event below is settled.
    pub settled: Offset,
    /// The offset that the next event gets.
    pub end: Offset,
    /// Events that are not settled yet.
    pub lag: u64,
    /// The member that owns the partition now.
    pub owner: Option<String>,
}

impl GroupInfo {
    /// Describes a group's position; `lag` is the number of events not settled.
    pub fn new(
        group: Group,
        topic: Topic,
        partition: PartitionId,
        settled: Offset,
        end: Offset,
        lag: u64,
    ) -> Self {
        Self { group, topic, partition, settled, end, lag, owner: None }
    }

    /// Names the present owner.
    #[must_use]
    pub fn with_owner(mut self, owner: Option<String>) -> Self {
        self.owner = owner;
        self
    }
}

/// One stored event, read outside any group.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Record {
    /// Its partition.
    pub partition: PartitionId,
    /// Its offset.
    pub offset: Offset,
    /// When the transport stored it; never descends within a partition.
    pub stored_at: SystemTime,
    /// The event, or bytes that are not one.
    pub content: Content,
}

impl Record {
    /// Describes a stored event.
    pub fn new(partition: PartitionId, offset: Offset, stored_at: SystemTime, content: Content) -> Self {
        Self { partition, offset, stored_at, content }
    }
}

/// Administration of a transport: topics, groups, positions and ranged reads.
///
/// Nothing here joins a group or moves a live group's position, except where the name says so.
/// All calls may be repeated. Dropping a future leaves a change either done or not begun.
#[async_trait]
pub trait Admin: Send + Sync {
    /// Creates the topic, or verifies that it is as declared. `Ok(true)` = it was created now.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) if it exists with another partition count.
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    async fn declare(&self, spec: &TopicSpec) -> Result<bool>;

    /// Lists the topics, by name.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn topics(&self) -> Result<Vec<TopicInfo>>;

    /// Describes one topic; `None` if it does not exist.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>>;

    /// Deletes a topic with its events and every group's position in it.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound).
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    async fn delete_topic(&self, topic: &Topic) -> Result<()>;

    /// Removes the events of a partition below `before`, and returns how many. A group that had not
    /// read them gets [`DataLoss`](crate::ErrorKind::DataLoss) at its next poll.
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64>;

    /// Lists the groups' positions, by group, topic and partition; of one topic or of all.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>>;

    /// The positions of one group in one topic, by partition; empty if it has none. Where a broker keeps groups apart
    /// from topics this is much less work than [`groups`](Self::groups).
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>>;

    /// Forgets a group's position in a topic.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound); [`Conflict`](crate::ErrorKind::Conflict) while it has members.
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()>;

    /// Moves a group to the given offset of a partition; what is below counts as settled, what is
    /// not will be delivered (again).
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) while the group has members.
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()>;

    /// Returns the partition that a key belongs to.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId>;

    /// Returns the first offset stored at or after a time; the end if there is none.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset>;

    /// Reads up to `max` records of a partition from an offset, inclusive, without any group.
    ///
    /// # Errors
    /// [`DataLoss`](crate::ErrorKind::DataLoss) if `from` is below the first kept offset.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>>;

    /// Looks at what the broker's settings, as far as a client can read them, mean for the promises of this transport.
    /// Nothing is changed; empty where there is nothing to look at.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if the broker cannot be asked now. Settings that this user may
    /// not read are a doubtful probe, not an error, where the broker says so.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn probes(&self) -> Result<Vec<Probe>>;

    /// Waits until the topic has a record at or above one of the given positions, or `within` passed.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()>;
}
