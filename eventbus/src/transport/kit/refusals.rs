//! What every transport refuses in the same words.

use std::fmt::Display;

use crate::admin::Offset;
use crate::error::{Error, ErrorKind};
use crate::name::Topic;
use crate::partition::PartitionId;

/// A topic that exists was declared with another number of partitions.
pub(crate) fn other_partitions(topic: &Topic, declared: impl Display, found: impl Display) -> Error {
    Error::new(ErrorKind::Conflict, "the topic has another number of partitions: keys would move")
        .with("topic", topic)
        .with("declared", declared)
        .with("found", found)
}

/// A topic has fewer partitions.
pub(crate) fn no_partition(topic: &Topic, partition: PartitionId, partitions: impl Display) -> Error {
    Error::not_found("there is no such partition")
        .with("topic", topic)
        .with("partition", partition)
        .with("partitions", partitions)
}

/// Events from an offset on were removed, up to the first that is kept.
pub(crate) fn removed(topic: &Topic, partition: PartitionId, from: Offset, first: u64) -> Error {
    let kind = ErrorKind::DataLoss { expected: from, first: Offset(first) };
    Error::new(kind, "events below the first kept offset are gone")
        .with("topic", topic)
        .with("partition", partition)
}
