//! Administration of the server: works while programs use it.

use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::stream::{Info, Stream};
use async_trait::async_trait;
use futures_util::future::try_join_all;
use futures_util::{FutureExt as _, StreamExt as _};

use super::leases::{CursorDoc, GroupDoc};
use super::store::{Held, Store, TopicDoc, bounds, damaged, missing, since, unavailable};
use super::{MAX_PARTITIONS, Nats, message, names};
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};

/// What one read asks the server for at most.
const READ_AT_ONCE: usize = 256;
/// Between the news of an event and its place in the stream.
const SOON: Duration = Duration::from_millis(2);
/// How often a topic is looked at that says nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

fn changed_meanwhile() -> Error {
    Error::new(ErrorKind::Conflict, "the group changed meanwhile: a member may have joined")
}

impl Store {
    /// The number of partitions of a topic that must exist; it is never created.
    async fn existing(&self, topic: &Topic) -> Result<u32> {
        Ok(self.declared(topic).await?.ok_or_else(|| missing(topic))?.partitions)
    }

    async fn describe(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let Some(declared) = self.declared(topic).await? else { return Ok(None) };
        let looks = self.look_at_all(topic, declared.partitions).await?;
        let partition = |(at, (_, info)): (usize, &(Stream, Info))| {
            let (first, next) = bounds(info);
            PartitionInfo::new(PartitionId(at as u32), Offset(first), Offset(next))
                .with_kept(info.state.messages)
        };
        let partitions = looks.iter().enumerate().map(partition).collect();
        let retention = Retention {
            max_age: declared.max_age.map(Duration::from_millis),
            max_events: declared.max_events.and_then(NonZeroU64::new),
        };
        Ok(Some(TopicInfo::new(topic.clone(), partitions, retention)))
    }

    pub(super) async fn all(&self) -> Result<Vec<Topic>> {
        let mut found = Vec::new();
        for key in self.keys(names::TOPICS).await? {
            let name = names::unflat(key.strip_prefix(names::TOPICS).unwrap_or_default());
            // One that is being made or deleted is none.
            let topic = Topic::new(name)?;
            if self.declared(&topic).await?.is_some() {
                found.push(topic);
            }
        }
        Ok(found)
    }

    /// The stream of a partition that must exist.
    async fn place(&self, topic: &Topic, partition: PartitionId) -> Result<(Stream, Info)> {
        let n_partitions = self.existing(topic).await?;
        if partition.0 >= n_partitions {
            return Err(Error::not_found("there is no such partition")
                .with("topic", topic)
                .with("partition", partition)
                .with("partitions", n_partitions));
        }
        self.look(topic, partition.0).await?.ok_or_else(|| missing(topic))
    }

    async fn positions(&self, topic: &Topic, wanted: Option<&Group>) -> Result<Vec<GroupInfo>> {
        let n_partitions = self.existing(topic).await?;
        let looks = self.look_at_all(topic, n_partitions).await?;
        let prefix = names::groups(topic);
        let keys = match wanted {
            Some(group) => vec![names::group(topic, group.as_str())],
            None => self.keys(&prefix).await?,
        };
        let (mut found, now) = (Vec::new(), self.clock().now());
        for key in keys {
            let group = Group::new(names::unflat(key.strip_prefix(&prefix).unwrap_or_default()))?;
            let Some(Held { value: doc, .. }) = self.get::<GroupDoc>(&key).await? else { continue };
            let cursors = (0..n_partitions).map(|partition| self.cursor(topic, &group, &doc, partition));
            let cursors = try_join_all(cursors).await?;
            for (at, ((_, info), cursor)) in looks.iter().zip(cursors).enumerate() {
                let (first, next) = bounds(info);
                let floor = cursor.value.floor;
                let above = cursor.value.past.range(floor.max(first)..);
                let settled_above = above.filter(|(_, past)| past.attempt == 0).count() as u64;
                let lag = next.saturating_sub(floor.max(first)).saturating_sub(settled_above);
                let owner = doc.shares.get(at).and_then(|(owner, _)| doc.members.get(&(*owner)?));
                let owner = owner.filter(|member| member.until >= now);
                let (partition, floor, end) = (PartitionId(at as u32), Offset(floor), Offset(next));
                found.push(
                    GroupInfo::new(group.clone(), topic.clone(), partition, floor, end, lag)
                        .with_owner(owner.map(|member| member.process.clone())),
                );
            }
        }
        Ok(found)
    }

    /// A group's position, as it is or as it begins.
    async fn cursor(
        &self,
        topic: &Topic,
        group: &Group,
        doc: &GroupDoc,
        partition: u32,
    ) -> Result<Held<CursorDoc>> {
        let key = names::cursor(topic, group.as_str(), partition);
        let found = self.get::<CursorDoc>(&key).await?;
        let revision = found.as_ref().map_or(0, |found| found.revision);
        let value = found.map(|found| found.value).filter(|value| value.group == doc.id);
        let value = value.unwrap_or_else(|| doc.beginning(partition));
        Ok(Held { value, revision })
    }

    /// A group that has no members now, with its revision.
    async fn idle_group(&self, group: &Group, topic: &Topic) -> Result<Held<GroupDoc>> {
        self.set_clock().await?;
        let found = self.get::<GroupDoc>(&names::group(topic, group.as_str())).await?;
        let Some(mut found) = found else {
            return Err(Error::not_found("there is no such group in this topic")
                .with("group", group)
                .with("topic", topic));
        };
        found.value.bury(self.clock().now());
        if found.value.members.is_empty() {
            return Ok(found);
        }
        Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
            .with("group", group)
            .with("members", found.value.members.len()))
    }
}

#[async_trait]
impl Admin for Nats {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let declared = spec.partitions.get();
        if declared > MAX_PARTITIONS {
            return Err(Error::config("a topic of NATS has at most 1024 partitions here")
                .with("partitions", spec.partitions));
        }
        let (topic, store) = (spec.topic.clone(), self.store.clone());
        let retention = spec.retention;
        let (found, is_new) =
            self.store.tasks.run(async move { store.declare(&topic, declared, retention).await }).await?;
        if found == declared {
            return Ok(is_new);
        }
        Err(Error::new(ErrorKind::Conflict, "the topic has another number of partitions: keys would move")
            .with("topic", &spec.topic)
            .with("declared", declared)
            .with("found", found))
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let mut found = Vec::new();
        for topic in self.store.all().await? {
            match self.store.describe(&topic).await {
                Ok(info) => found.extend(info),
                // Deleted since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        self.store.describe(topic).await
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let (topic, store) = (topic.clone(), self.store.clone());
        let work = async move {
            let key = names::topic(&topic);
            let found = store.get::<TopicDoc>(&key).await?.ok_or_else(|| missing(&topic))?;
            store.forget(&topic);
            // From here on nobody finds it; what is left undone, the next try does.
            let leaving = TopicDoc { is_ready: false, ..found.value };
            let revision = store.set(&key, &leaving, found.revision).await?.ok_or_else(changed_meanwhile)?;
            // Members hear that.
            store.remove(store.keys(&names::groups(&topic)).await?.into_iter()).await?;
            let deleting = (0..leaving.partitions).map(|partition| store.delete_stream(&topic, partition));
            try_join_all(deleting).await?;
            // Those of members that were on their way in.
            store.remove(store.keys(&names::groups(&topic)).await?.into_iter()).await?;
            store.clear(&names::cursors(&topic)).await?;
            store.remove_at(&key, revision).await?.ok_or_else(changed_meanwhile)?;
            store.clear(&key).await
        };
        self.store.tasks.run(work).await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let (stream, info) = self.store.place(topic, partition).await?;
        let (first, next) = bounds(&info);
        let before = before.0.min(next);
        if before <= first {
            return Ok(0);
        }
        Ok(stream.purge().sequence(before).await.map_err(unavailable)?.purged)
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let is_one = topic.is_some();
        let topics = match topic {
            Some(topic) => vec![topic.clone()],
            None => self.store.all().await?,
        };
        let mut found = Vec::new();
        for topic in topics {
            match self.store.positions(&topic, None).await {
                Err(error) if error.kind() == ErrorKind::NotFound && !is_one => {}
                positions => found.extend(positions?),
            }
        }
        found.sort_by(|a, b| (&a.group, &a.topic, a.partition).cmp(&(&b.group, &b.topic, b.partition)));
        Ok(found)
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        self.store.positions(topic, Some(group)).await
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let (group, topic, store) = (group.clone(), topic.clone(), self.store.clone());
        let work = async move {
            let n_partitions = store.existing(&topic).await?;
            let found = store.idle_group(&group, &topic).await?;
            let key = names::group(&topic, group.as_str());
            store.remove_at(&key, found.revision).await?.ok_or_else(changed_meanwhile)?;
            for partition in 0..n_partitions {
                let key = names::cursor(&topic, group.as_str(), partition);
                // One of a new group of this name stays.
                let cursor = store.get::<CursorDoc>(&key).await?;
                if let Some(cursor) = cursor.filter(|cursor| cursor.value.group == found.value.id) {
                    store.remove_at(&key, cursor.revision).await?;
                }
            }
            Ok(())
        };
        self.store.tasks.run(work).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let (_, info) = self.store.place(topic, partition).await?;
        let (first, next) = bounds(&info);
        let Held { value: mut doc, revision } = self.store.idle_group(group, topic).await?;
        let Held { mut value, revision: at } = self.store.cursor(topic, group, &doc, partition.0).await?;
        // A member that joins meanwhile changes the group, or takes the position under an epoch of its own; one that
        // was declared dead and wakes finds an epoch that is not its own.
        let share = doc.shares.get_mut(partition.0 as usize).ok_or_else(changed_meanwhile)?;
        let epoch = share.1.wrapping_add(1);
        *share = (None, epoch);
        doc.generation += 1;
        let key = names::group(topic, group.as_str());
        self.store.set(&key, &doc, revision).await?.ok_or_else(changed_meanwhile)?;
        (value.epoch, value.floor) = (epoch, to.0.clamp(first, next));
        value.past.clear();
        let key = names::cursor(topic, group.as_str(), partition.0);
        self.store.set(&key, &value, at).await?.ok_or_else(changed_meanwhile)?;
        Ok(())
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        Ok(partition::of_key(key, self.store.existing(topic).await?))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let (stream, info) = self.store.place(topic, partition).await?;
        let found = self.store.first_since(&stream, time).await?;
        Ok(Offset(found.unwrap_or(info.state.last_sequence + 1)))
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        let (stream, info) = self.store.place(topic, partition).await?;
        let (first, next) = bounds(&info);
        if from.0 < first && first > 1 {
            let kind = ErrorKind::DataLoss { expected: from, first: Offset(first) };
            return Err(Error::new(kind, "events below the first kept offset are gone")
                .with("topic", topic)
                .with("partition", partition));
        }
        // As many as there are, up to `max`: who asks takes fewer for the end.
        let wanted = next.saturating_sub(from.0.max(1)).min(max as u64) as usize;
        let (mut found, mut at) = (Vec::new(), from.0.max(1));
        while found.len() < wanted {
            let page = self.store.fetch(&stream, since(at), (wanted - found.len()).min(READ_AT_ONCE)).await?;
            if page.is_empty() {
                break;
            }
            for message in page {
                let (offset, stored_at) = match message.info() {
                    Ok(place) => (place.stream_sequence, place.published.into()),
                    Err(error) => return Err(damaged(&info.config.name).caused_by(error)),
                };
                at = offset + 1;
                let message = message.message;
                let content = message::content(message.headers.as_ref(), message.payload);
                found.push(Record::new(partition, Offset(offset), stored_at, content));
            }
        }
        Ok(found)
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.store.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        self.store.existing(topic).await?;
        // Heard before the first look; a message is heard a moment before it has its place.
        let mut news = self.store.subscribe(names::subjects(topic)).await?;
        let waiting = async {
            loop {
                let looks = positions.iter().map(|(partition, _)| self.store.look(topic, partition.0));
                let looks = try_join_all(looks).await?;
                let is_there = looks.iter().zip(positions).any(|(look, (_, from))| {
                    look.as_ref().is_none_or(|(_, info)| info.state.last_sequence >= from.0.max(1))
                });
                if is_there {
                    return Ok(());
                }
                // In between also without news: the last look may have been too early.
                match tokio::time::timeout(LOOK_AGAIN, news.next()).await {
                    Ok(None) => return Ok(()),
                    Ok(Some(_)) => while news.next().now_or_never().flatten().is_some() {},
                    Err(_) => {}
                }
                tokio::time::sleep(SOON).await;
            }
        };
        tokio::time::timeout(within, waiting).await.unwrap_or(Ok(()))
    }
}
