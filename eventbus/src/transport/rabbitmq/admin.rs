//! Administration of the broker: works while programs use it.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::store::Store;
use super::topics::missing;
use super::{MAX_PARTITIONS, RabbitMq, names};
use crate::admin::{Admin, GroupInfo, Offset, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::kit::leased::registers::{Bounds, Held, Registers as _, changed_meanwhile, groups};
use crate::transport::kit::refusals;

impl Store {
    /// The number of partitions of a topic that must exist; it is never created.
    async fn present(&self, topic: &Topic) -> Result<u32> {
        match self.heard(topic)? {
            Some(heard) => Ok(heard),
            None => self.existing(topic).await?.ok_or_else(|| missing(topic)),
        }
    }

    async fn describe(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let Some(declared) = self.declared(topic).await? else { return Ok(None) };
        let bounds = self.bounds(topic, declared.partitions, false).await?;
        let partitions = bounds.into_iter().enumerate().map(|(at, bounds)| bounds.info(at)).collect();
        let max_age = declared.max_age.map(Duration::from_secs);
        Ok(Some(TopicInfo::new(topic.clone(), partitions, Retention { max_age, ..Retention::default() })))
    }

    /// Fails unless there is such a partition.
    async fn has(&self, topic: &Topic, partition: PartitionId) -> Result<()> {
        let n_partitions = self.present(topic).await?;
        if partition.0 < n_partitions {
            return Ok(());
        }
        Err(refusals::no_partition(topic, partition, n_partitions))
    }

    /// What a partition that must exist holds.
    async fn place(&self, topic: &Topic, partition: PartitionId) -> Result<Bounds> {
        self.has(topic, partition).await?;
        self.exact_bounds(topic, partition.0).await
    }
}

#[async_trait]
impl Admin for RabbitMq {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let declared = spec.partitions.get();
        if declared > MAX_PARTITIONS {
            return Err(Error::config("a topic of RabbitMQ has at most 1024 partitions here")
                .with("partitions", spec.partitions));
        }
        let (topic, store, retention) = (spec.topic.clone(), self.store.clone(), spec.retention);
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
        self.store.tasks.run(async move { store.delete(&topic).await }).await
    }

    /// The broker removes nothing by hand: what is below is not handed out any more, and goes when it is too old.
    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let Bounds { first, next, .. } = self.store.place(topic, partition).await?;
        let before = before.0.min(next);
        if before <= first {
            return Ok(0);
        }
        let (table, key) = (self.store.table(topic), names::low(partition.0));
        let revision = table.get(&key).await?.map_or(0, |Held { revision, .. }| revision);
        table.set(&key, before.to_string().into(), revision).await?.ok_or_else(changed_meanwhile)?;
        Ok(before - first)
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
        self.store.tasks.run(async move { groups::delete(&*store, &group, &topic).await }).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let bounds = self.store.place(topic, partition).await?;
        groups::seek(&*self.store, group, topic, partition, to, bounds).await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        Ok(partition::of_key(key, self.store.present(topic).await?))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let bounds = self.store.place(topic, partition).await?;
        let found = self.store.first_since(topic, partition.0, time).await?;
        Ok(Offset(found.unwrap_or(bounds.next)))
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        self.store.has(topic, partition).await?;
        let page = self.store.page(topic, partition.0, from, max).await?;
        Ok(page
            .into_iter()
            .map(|stored| Record::new(partition, Offset(stored.offset), stored.stored_at, stored.content))
            .collect())
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.store.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        self.store.present(topic).await?;
        let positions: Vec<_> = positions.iter().map(|(partition, from)| (partition.0, from.0)).collect();
        tokio::time::timeout(within, self.store.wait_for(topic, &positions)).await.unwrap_or(Ok(()))
    }
}
