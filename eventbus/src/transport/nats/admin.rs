//! Administration of the server: works while programs use it.

use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::stream::{Info, Stream};
use async_trait::async_trait;
use futures_util::future::try_join_all;
use futures_util::{FutureExt as _, StreamExt as _};

use super::pages::since;
use super::store::{Store, damaged, unavailable};
use super::topics::{TopicDoc, bounds, missing};
use super::{MAX_PARTITIONS, Nats, message, names};
use crate::admin::{Admin, GroupInfo, Offset, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::kit::leased::registers::{Bounds, changed_meanwhile, groups};
use crate::transport::kit::refusals;

/// What one read asks the server for at most.
const READ_AT_ONCE: usize = 256;
/// Between the news of an event and its place in the stream.
const SOON: Duration = Duration::from_millis(2);
/// How often a topic is looked at that says nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl Store {
    /// The number of partitions of a topic that must exist; it is never created.
    async fn existing(&self, topic: &Topic) -> Result<u32> {
        Ok(self.declared(topic).await?.ok_or_else(|| missing(topic))?.partitions)
    }

    async fn describe(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let Some(declared) = self.declared(topic).await? else { return Ok(None) };
        let looks = self.look_at_all(topic, declared.partitions).await?;
        let partitions = looks.iter().enumerate().map(|(at, (_, info))| bounds(info).info(at)).collect();
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
            return Err(refusals::no_partition(topic, partition, n_partitions));
        }
        self.look(topic, partition.0).await?.ok_or_else(|| missing(topic))
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
        Err(refusals::other_partitions(&spec.topic, declared, found))
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let listed = self.store.all().await?;
        groups::topics(listed, |topic| async move { self.store.describe(&topic).await }).await
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
        let Bounds { first, next, .. } = bounds(&info);
        let before = before.0.min(next);
        if before <= first {
            return Ok(0);
        }
        Ok(stream.purge().sequence(before).await.map_err(unavailable)?.purged)
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        match topic {
            Some(topic) => groups::all(&*self.store, vec![topic.clone()], true).await,
            None => groups::all(&*self.store, self.store.all().await?, false).await,
        }
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        groups::positions(&*self.store, topic, Some(group)).await
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let (group, topic, store) = (group.clone(), topic.clone(), self.store.clone());
        let work = async move { groups::delete(&*store, &group, &topic).await };
        self.store.tasks.run(work).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let (_, info) = self.store.place(topic, partition).await?;
        groups::seek(&*self.store, group, topic, partition, to, bounds(&info)).await
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
        let Bounds { first, next, .. } = bounds(&info);
        if from.0 < first && first > 1 {
            return Err(refusals::removed(topic, partition, from, first));
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
