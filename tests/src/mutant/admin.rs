//! Administration with defects.

use std::sync::atomic::Ordering as Atomic;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use eventbus::admin::{GroupInfo, Record, Retention, TopicInfo};
use eventbus::fitness::Probe;
use eventbus::{Admin, Group, Key, Offset, PartitionId, Result, Topic, TopicSpec};

use super::Defect;
use super::transport::Shared;

#[derive(Debug)]
pub(super) struct MutantAdmin(pub(super) Shared);

impl MutantAdmin {
    fn hide(&self, info: &mut TopicInfo) {
        if self.0.is(Defect::RetentionHidden) {
            info.retention = Retention::default();
        }
    }
}

#[async_trait]
impl Admin for MutantAdmin {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        self.0.memory.declare(spec).await
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let mut topics = self.0.memory.topics().await?;
        topics.iter_mut().for_each(|info| self.hide(info));
        Ok(topics)
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let mut found = self.0.memory.topic(topic).await?;
        found.iter_mut().for_each(|info| self.hide(info));
        Ok(found)
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.0.memory.delete_topic(topic).await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        self.0.memory.purge(topic, partition, before).await
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let mut groups = self.0.memory.groups(topic).await?;
        if self.0.is(Defect::LagLies) {
            groups
                .iter_mut()
                .for_each(|group| group.lag = group.end.0 - group.settled.0.min(group.end.0) + 1);
        }
        Ok(groups)
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        self.0.memory.group(group, topic).await
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        self.0.memory.delete_group(group, topic).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        self.0.memory.seek(group, topic, partition, to).await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        self.0.memory.partition_of(topic, key).await
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let time = if self.0.is(Defect::TimeSeekExclusive) { time + Duration::from_nanos(1) } else { time };
        self.0.memory.offset_at(topic, partition, time).await
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        self.0.world.replayed.store(true, Atomic::SeqCst);
        let from = if self.0.is(Defect::ReplayOffByOne) { Offset(from.0 + 1) } else { from };
        let max = if self.0.is(Defect::ReadsShortPages) { max.min(256) } else { max };
        self.0.memory.read(topic, partition, from, max).await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.0.memory.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        self.0.memory.wait(topic, positions, within).await
    }
}
