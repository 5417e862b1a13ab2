//! Administration of the cluster: works while programs use it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::Kafka;
use super::client::{Client, Quiet, from_kafka, missing};
use super::record;
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::kit::refusals;

/// How many groups are asked for their positions at a time.
const MAX_ASKING: usize = 16;
/// When something that a broker is not ready for is asked again.
const SOON: Duration = Duration::from_millis(20);

/// The offset that an element names, if it is one.
pub(super) fn offset_of(element: &TopicPartitionListElem<'_>) -> Option<u64> {
    match element.offset() {
        KafkaOffset::Offset(offset) => Some(offset.unsigned_abs()),
        _ => None,
    }
}

/// A time in the broker's milliseconds; a part of one is the next.
pub(super) fn millis(time: SystemTime) -> i64 {
    let past = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(past.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}

impl Client {
    pub(super) fn ends(&self, n_partitions: u32) -> impl Iterator<Item = (u32, KafkaOffset)> + use<> {
        (0..n_partitions).map(|partition| (partition, KafkaOffset::End))
    }

    pub(super) fn beginnings(&self, n_partitions: u32) -> impl Iterator<Item = (u32, KafkaOffset)> + use<> {
        (0..n_partitions).map(|partition| (partition, KafkaOffset::Beginning))
    }

    /// Asks for offsets by time in milliseconds, or for ends or beginnings, of many partitions at once; `None` where
    /// nothing is that young. Blocks.
    pub(super) fn list(
        &self,
        topic: &Topic,
        wanted: impl Iterator<Item = (u32, KafkaOffset)>,
    ) -> Result<Vec<(u32, Option<u64>)>> {
        let mut asked = TopicPartitionList::new();
        for (partition, offset) in wanted {
            asked.add_partition_offset(topic.as_str(), partition as i32, offset).map_err(from_kafka)?;
        }
        let end = Instant::now() + self.options.timeout;
        loop {
            match self.list_once(asked.clone()) {
                // A topic that was just created has no leaders yet, or leaders that do not know it yet.
                Err(error) if error.is_retryable() && Instant::now() < end => std::thread::sleep(SOON),
                listed => return listed,
            }
        }
    }

    fn list_once(&self, asked: TopicPartitionList) -> Result<Vec<(u32, Option<u64>)>> {
        let found = self.reader.lock().offsets_for_times(asked, self.options.timeout).map_err(from_kafka)?;
        let read = |element: &TopicPartitionListElem<'_>| {
            element.error().map_err(from_kafka)?;
            Ok((element.partition().unsigned_abs(), offset_of(element)))
        };
        found.elements().iter().map(read).collect()
    }

    /// First and next offset of each partition. Blocks.
    fn bounds(&self, topic: &Topic) -> Result<Vec<(u64, u64)>> {
        let n_partitions = self.find(topic)?.ok_or_else(|| missing(topic))?;
        let (lows, ends) =
            (self.list(topic, self.beginnings(n_partitions))?, self.list(topic, self.ends(n_partitions))?);
        Ok(lows
            .into_iter()
            .zip(ends)
            .map(|((_, low), (_, end))| (low.unwrap_or(0), end.unwrap_or(0)))
            .collect())
    }

    fn bounds_of(&self, topic: &Topic, partition: PartitionId) -> Result<(u64, u64)> {
        let number = partition.0 as i32;
        let end = Instant::now() + self.options.timeout;
        loop {
            let found = self.reader.lock().fetch_watermarks(topic.as_str(), number, self.options.timeout);
            match found.map_err(from_kafka) {
                Ok((low, end)) => return Ok((low.unsigned_abs(), end.unsigned_abs())),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(match self.find(topic)? {
                        Some(n_partitions) => refusals::no_partition(topic, partition, n_partitions),
                        None => missing(topic),
                    });
                }
                Err(error) if error.is_retryable() && Instant::now() < end => std::thread::sleep(SOON),
                Err(error) => return Err(error),
            }
        }
    }

    fn describe(&self, topic: &Topic) -> Result<TopicInfo> {
        let partition = |(at, (first, next)): (usize, (u64, u64))| {
            PartitionInfo::new(PartitionId(at as u32), Offset(first), Offset(next))
        };
        let partitions = self.bounds(topic)?.into_iter().enumerate().map(partition).collect();
        Ok(TopicInfo::new(topic.clone(), partitions, Retention::default()))
    }

    /// Every topic but Kafka's own. Blocks.
    fn all(&self) -> Result<Vec<Topic>> {
        let metadata = self.reader.lock().fetch_metadata(None, self.options.timeout).map_err(from_kafka)?;
        let mut names: Vec<Topic> = metadata
            .topics()
            .iter()
            .filter(|topic| !topic.name().starts_with("__") && topic.error().is_none())
            .filter_map(|topic| Topic::new(topic.name()).ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Acts for a group from outside of it. Blocks.
    fn outside(&self, group: &str) -> Result<BaseConsumer> {
        self.consumer_config(group).remove("group.instance.id").create().map_err(from_kafka)
    }

    fn positions(&self, topics: &[Topic]) -> Result<Vec<GroupInfo>> {
        let groups = self.reader.lock().fetch_group_list(None, self.options.timeout).map_err(from_kafka)?;
        let mut names: Vec<Group> =
            groups.groups().iter().filter_map(|group| Group::new(group.name()).ok()).collect();
        names.sort();
        let bounds: Vec<_> =
            topics.iter().map(|topic| Ok((topic, self.bounds(topic)?))).collect::<Result<_>>()?;
        // A client of librdkafka asks for one group only, and most of the time is waiting: many at a time.
        let per_thread = names.len().div_ceil(MAX_ASKING).max(1);
        std::thread::scope(|scope| {
            let asking: Vec<_> = names
                .chunks(per_thread)
                .map(|groups| {
                    let bounds = &bounds;
                    scope.spawn(move || -> Result<Vec<GroupInfo>> {
                        let of = |group| self.positions_of(group, bounds);
                        Ok(groups.iter().map(of).collect::<Result<Vec<_>>>()?.concat())
                    })
                })
                .collect();
            let mut found = Vec::new();
            for thread in asking {
                let of_thread =
                    thread.join().map_err(|_| Error::new(ErrorKind::Unexpected, "a look-up died"));
                found.extend(of_thread??);
            }
            Ok(found)
        })
    }

    fn positions_of(&self, group: &Group, topics: &[(&Topic, Vec<(u64, u64)>)]) -> Result<Vec<GroupInfo>> {
        let outside = self.outside(group.as_str())?;
        let mut asked = TopicPartitionList::new();
        for (topic, bounds) in topics {
            asked.add_partition_range(topic.as_str(), 0, bounds.len() as i32 - 1);
        }
        let known = outside.committed_offsets(asked, self.options.timeout).map_err(from_kafka)?;
        let mut found = Vec::new();
        for (topic, bounds) in topics {
            for element in known.elements_for_topic(topic.as_str()) {
                let KafkaOffset::Offset(settled) = element.offset() else { continue };
                let (settled, partition) = (settled.unsigned_abs(), element.partition().unsigned_abs());
                let Some((first, next)) = bounds.get(partition as usize).copied() else { continue };
                let (partition, lag) = (PartitionId(partition), next.saturating_sub(settled.max(first)));
                let (settled, next, topic) = (Offset(settled), Offset(next), Topic::clone(topic));
                found.push(GroupInfo::new(group.clone(), topic, partition, settled, next, lag));
            }
        }
        Ok(found)
    }

    /// Reads a range of a partition. Blocks.
    fn read(&self, topic: &Topic, partition: PartitionId, from: Offset, max: usize) -> Result<Vec<Record>> {
        let (first, next) = self.bounds_of(topic, partition)?;
        if from.0 < first {
            return Err(refusals::removed(topic, partition, from, first));
        }
        let mut found = Vec::new();
        if from.0 >= next || max == 0 {
            return Ok(found);
        }
        self.with_reader(|reader| {
            let assign = |reader: &BaseConsumer<Quiet>, at: u64| {
                let mut place = TopicPartitionList::new();
                let number = partition.0 as i32;
                place
                    .add_partition_offset(topic.as_str(), number, KafkaOffset::Offset(at as i64))
                    .map_err(from_kafka)?;
                reader.assign(&place).map_err(from_kafka)
            };
            assign(reader, from.0)?;
            let mut is_at_end = false;
            let end = Instant::now() + self.options.timeout;
            let outcome = loop {
                match reader.poll(Duration::from_millis(100)) {
                    Some(Ok(message)) => {
                        use rdkafka::Message as _;
                        if message.topic() != topic.as_str() || message.partition() != partition.0 as i32 {
                            continue;
                        }
                        let stored = record::stored(&message);
                        let offset = Offset(stored.offset);
                        if found.last().is_some_and(|last: &Record| last.offset >= offset) {
                            continue;
                        }
                        is_at_end = false;
                        found.push(Record::new(partition, offset, stored.stored_at, stored.content));
                        if found.len() == max || offset.0 + 1 >= next {
                            break Ok(());
                        }
                    }
                    // One of the range that this reader read before may still be on its way.
                    Some(Err(KafkaError::PartitionEOF(ended))) if ended != partition.0 as i32 => {}
                    // An end that is below the one that was asked for is believed the second time, after a look
                    // from there: records that are no events, or were compacted, are never brought.
                    Some(Err(KafkaError::PartitionEOF(_))) if is_at_end => break Ok(()),
                    Some(Err(KafkaError::PartitionEOF(_))) => {
                        is_at_end = true;
                        let at = found.last().map_or(from.0, |last: &Record| last.offset.0 + 1);
                        if let Err(error) = assign(reader, at) {
                            break Err(error);
                        }
                    }
                    Some(Err(error)) if from_kafka(error.clone()).is_retryable() => {}
                    Some(Err(error)) => break Err(from_kafka(error)),
                    None => {}
                }
                if Instant::now() > end {
                    break Err(Error::new(
                        ErrorKind::Unavailable,
                        "the broker did not bring the events in time",
                    ));
                }
            };
            drop(reader.unassign());
            outcome.map(|()| found)
        })
    }
}

#[async_trait]
impl Admin for Kafka {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let (topic, declared) = (&spec.topic, spec.partitions.get());
        let is_new = self.client.declare(topic, declared, spec.retention).await?;
        self.client.forget(topic);
        let found = self.client.created(topic).await?;
        if found == declared {
            return Ok(is_new);
        }
        Err(refusals::other_partitions(topic, declared, found))
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let mut topics: Vec<TopicInfo> = self
            .client
            .blocking(|client| client.all()?.iter().map(|topic| client.describe(topic)).collect())
            .await?;
        self.client.keeps(&mut topics).await?;
        Ok(topics)
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let topic = topic.clone();
        let found = self.client.blocking(move |client| client.describe(&topic)).await;
        match found {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => {
                let mut found = found?;
                self.client.keeps(std::slice::from_mut(&mut found)).await?;
                Ok(Some(found))
            }
        }
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.client.delete_topic(topic).await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let name = topic.clone();
        let (first, next) = self.client.blocking(move |client| client.bounds_of(&name, partition)).await?;
        let before = before.0.min(next);
        if before <= first {
            return Ok(0);
        }
        let mut records = TopicPartitionList::new();
        records
            .add_partition_offset(topic.as_str(), partition.0 as i32, KafkaOffset::Offset(before as i64))
            .map_err(from_kafka)?;
        self.client.delete_records(&records).await?;
        Ok(before - first)
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let topic = topic.cloned();
        self.client
            .blocking(move |client| {
                let topics = match topic {
                    Some(topic) => vec![topic],
                    None => client.all()?,
                };
                client.positions(&topics)
            })
            .await
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        let (group, topic) = (group.clone(), topic.clone());
        self.client
            .blocking(move |client| client.positions_of(&group, &[(&topic, client.bounds(&topic)?)]))
            .await
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        // Kafka keeps a group as one: its positions in other topics go too.
        if self.group(group, topic).await?.is_empty() {
            return Err(Error::not_found("there is no such group in this topic")
                .with("group", group)
                .with("topic", topic));
        }
        self.client.delete_group(group.as_str()).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let (name, topic) = (group.to_string(), topic.clone());
        self.client
            .blocking(move |client| {
                let (first, next) = client.bounds_of(&topic, partition)?;
                let mut position = TopicPartitionList::new();
                let at = KafkaOffset::Offset(to.0.clamp(first, next) as i64);
                position.add_partition_offset(topic.as_str(), partition.0 as i32, at).map_err(from_kafka)?;
                match client.outside(&name)?.commit(&position, CommitMode::Sync) {
                    Err(error)
                        if matches!(
                            error.rdkafka_error_code(),
                            Some(Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress)
                        ) =>
                    {
                        Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
                            .with("group", name))
                    }
                    outcome => outcome.map_err(from_kafka),
                }
            })
            .await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        Ok(partition::of_key(key, self.client.partitions_of(topic).await?))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let topic = topic.clone();
        self.client
            .blocking(move |client| {
                let (_, next) = client.bounds_of(&topic, partition)?;
                let asked = std::iter::once((partition.0, KafkaOffset::Offset(millis(time))));
                let found = client.list(&topic, asked)?;
                Ok(Offset(found.first().and_then(|(_, offset)| *offset).unwrap_or(next)))
            })
            .await
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        let topic = topic.clone();
        self.client.blocking(move |client| client.read(&topic, partition, from, max)).await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.client.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        let wanted = positions.iter().map(|(partition, offset)| (partition.0, offset.0)).collect();
        let waiting = self.client.arrives(topic, wanted);
        tokio::time::timeout(within, waiting).await.unwrap_or(Ok(()))
    }
}

impl Client {
    /// The number of partitions of a topic that must exist; it is never created.
    async fn partitions_of(self: &std::sync::Arc<Self>, topic: &Topic) -> Result<u32> {
        let name = topic.clone();
        let end = Instant::now() + self.options.timeout;
        loop {
            let asked = name.clone();
            match self.blocking(move |client| client.find(&asked)).await? {
                Some(found) => return Ok(found),
                // One that was just created may have no leaders yet.
                None if Instant::now() < end && self.is_listed(&name).await? => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                None => return Err(missing(topic)),
            }
        }
    }

    async fn is_listed(self: &std::sync::Arc<Self>, topic: &Topic) -> Result<bool> {
        let topic = topic.clone();
        self.blocking(move |client| Ok(client.all()?.contains(&topic))).await
    }
}
