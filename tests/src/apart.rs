//! A bus of its own on a broker that is shared: every topic under a name that begins with a text of its own.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use eventbus::admin::{GroupInfo, Record, TopicInfo, TopicSpec};
use eventbus::fitness::Probe;
use eventbus::{
    Admin, Bus, Capabilities, Confirm, Consumer, Envelope, Group, InFile, Key, Offset, PartitionId,
    Publisher, Result, Subscription, Topic, Transport,
};

/// The bus, as a transport.
#[derive(Debug)]
pub struct Apart {
    inner: Bus,
    prefix: String,
}

impl Apart {
    /// A bus whose topics begin with `prefix` on the one within.
    pub fn new(inner: Bus, prefix: String) -> Self {
        Self { inner, prefix }
    }

    fn name(&self, topic: &Topic) -> Result<Topic> {
        Topic::new(format!("{}.{topic}", self.prefix))
    }

    /// The name within, if it is one of ours.
    fn own(&self, topic: &Topic) -> Option<Topic> {
        let rest = topic.as_str().strip_prefix(&self.prefix)?.strip_prefix('.')?;
        Topic::new(rest).ok()
    }

    fn within(&self) -> Result<&dyn Admin> {
        self.inner
            .transport()
            .admin()
            .ok_or_else(|| eventbus::Error::new(eventbus::ErrorKind::NotFound, "no administration"))
    }

    fn topic_info(&self, mut info: TopicInfo) -> Option<TopicInfo> {
        info.topic = self.own(&info.topic)?;
        Some(info)
    }

    fn group_infos(&self, infos: Vec<GroupInfo>) -> Vec<GroupInfo> {
        let own = |mut info: GroupInfo| {
            info.topic = self.own(&info.topic)?;
            Some(info)
        };
        infos.into_iter().filter_map(own).collect()
    }
}

#[async_trait]
impl Transport for Apart {
    fn capabilities(&self) -> Capabilities {
        self.inner.transport().capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        let inner = self.inner.transport().publisher().await?;
        Ok(Arc::new(ApartPublisher { inner, prefix: self.prefix.clone() }))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        let mut renamed = subscription.clone();
        renamed.topic = self.name(&subscription.topic)?;
        self.inner.transport().subscribe(&renamed).await
    }

    fn admin(&self) -> Option<&dyn Admin> {
        Some(self)
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct ApartPublisher {
    inner: Arc<dyn Publisher>,
    prefix: String,
}

#[async_trait]
impl Publisher for ApartPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        self.inner.enqueue(&Topic::new(format!("{}.{topic}", self.prefix))?, batch).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[async_trait]
impl Admin for Apart {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let mut renamed = spec.clone();
        renamed.topic = self.name(&spec.topic)?;
        self.within()?.declare(&renamed).await
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let all = self.within()?.topics().await?;
        Ok(all.into_iter().filter_map(|info| self.topic_info(info)).collect())
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let found = self.within()?.topic(&self.name(topic)?).await?;
        Ok(found.and_then(|info| self.topic_info(info)))
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.within()?.delete_topic(&self.name(topic)?).await
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        self.within()?.purge(&self.name(topic)?, partition, before).await
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let renamed = topic.map(|topic| self.name(topic)).transpose()?;
        Ok(self.group_infos(self.within()?.groups(renamed.as_ref()).await?))
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        Ok(self.group_infos(self.within()?.group(group, &self.name(topic)?).await?))
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        self.within()?.delete_group(group, &self.name(topic)?).await
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        self.within()?.seek(group, &self.name(topic)?, partition, to).await
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        self.within()?.partition_of(&self.name(topic)?, key).await
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        self.within()?.offset_at(&self.name(topic)?, partition, time).await
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        self.within()?.read(&self.name(topic)?, partition, from, max).await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.within()?.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        self.within()?.wait(&self.name(topic)?, positions, within).await
    }
}
