//! The bucket of groups, the server's clock that says who lives, and partitions read ahead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::names;
use super::store::{Clock, Store};
use super::topics::bounds;
use crate::error::Result;
use crate::name::Topic;
use crate::transport::kit::leased::registers::{self, Ahead, Bounds, Entry, GroupDoc, Held, Registers};
use crate::transport::kit::tasks::Tasks;

fn key(entry: Entry<'_>) -> String {
    match entry {
        Entry::Group(topic, group) => names::group(topic, group),
        Entry::Cursor(topic, group, partition) => names::cursor(topic, group, partition),
    }
}

impl registers::Clock for Clock {
    fn write(&self, due: Instant) -> u64 {
        self.at(due)
    }

    fn read(&self, due: u64) -> Option<Instant> {
        self.moment(due)
    }
}

#[async_trait]
impl Registers for Store {
    const NAME: &'static str = "NatsConsumer";

    type Clock = Clock;

    fn open(&self) -> Result<()> {
        self.is_open()
    }

    fn silence(&self) -> Duration {
        self.options.session
    }

    fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    fn clock(&self) -> Clock {
        self.clock()
    }

    async fn get<T: DeserializeOwned + Send>(&self, entry: Entry<'_>) -> Result<Option<Held<T>>> {
        self.get(&key(entry)).await
    }

    async fn set<T: Serialize + Sync>(
        &self,
        entry: Entry<'_>,
        value: &T,
        revision: u64,
    ) -> Result<Option<u64>> {
        self.set(&key(entry), value, revision).await
    }

    async fn remove(&self, entry: Entry<'_>, revision: u64) -> Result<Option<()>> {
        self.remove_at(&key(entry), revision).await
    }

    async fn groups(&self, topic: &Topic) -> Result<Vec<String>> {
        let prefix = names::groups(topic);
        let keys = self.keys(&prefix).await?;
        Ok(keys.iter().filter_map(|key| key.strip_prefix(&prefix)).map(names::unflat).collect())
    }

    async fn changes(&self, entry: Entry<'_>) -> Result<BoxStream<'static, Bytes>> {
        let heard = self.subscribe(names::changes(&key(entry))).await?;
        Ok(heard.map(|message| message.payload).boxed())
    }

    /// The server's time in milliseconds at which it is dead.
    fn mark(&self) -> u64 {
        self.clock().now() + self.options.session.as_millis() as u64
    }

    async fn attend(&self, _member: u64) -> Result<()> {
        Ok(())
    }

    async fn absent(&self, _member: u64) {}

    async fn dead(&self, _group: Entry<'_>, doc: &GroupDoc) -> Result<BTreeSet<u64>> {
        self.set_clock().await?;
        let now = self.clock().now();
        Ok(doc.members.iter().filter(|(_, member)| member.until < now).map(|(member, _)| *member).collect())
    }

    async fn partitions(&self, topic: &Topic) -> Result<u32> {
        self.partitions(topic).await
    }

    fn forget(&self, topic: &Topic) {
        self.forget(topic);
    }

    async fn existing(&self, topic: &Topic) -> Result<Option<u32>> {
        Ok(self.declared(topic).await?.map(|declared| declared.partitions))
    }

    async fn bounds(&self, topic: &Topic, partitions: u32, _is_exact: bool) -> Result<Vec<Bounds>> {
        Ok(self.look_at_all(topic, partitions).await?.iter().map(|(_, info)| bounds(info)).collect())
    }

    async fn first_since(&self, topic: &Topic, partition: u32, time: SystemTime) -> Result<Option<u64>> {
        match self.look(topic, partition).await? {
            Some((stream, _)) => self.first_since(&stream, time).await,
            None => Ok(None),
        }
    }

    async fn read_ahead(
        self: Arc<Self>,
        topic: Topic,
        partition: u32,
        from: u64,
        ahead: Ahead,
        stopped: oneshot::Receiver<()>,
    ) {
        self.read_partition(topic, partition, from, ahead, stopped).await;
    }
}
