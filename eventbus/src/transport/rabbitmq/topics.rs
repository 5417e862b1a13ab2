//! Topics: a super stream each, declared and verified, with its entry in the map of topics.

use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Confirmation, ExchangeKind};
use serde::{Deserialize, Serialize};

use super::store::{AT_ONCE, Store, decode, encode};
use super::streams::{self, short, stream_arguments};
use super::wire::failed;
use super::{message, names};
use crate::admin::Retention;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::leased::registers::{Held, changed_meanwhile};

/// What is removed at once when events are too old.
const SEGMENT_BYTES: i64 = 64 << 20;

/// What is kept of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TopicDoc {
    pub(super) partitions: u32,
    /// Whether all its streams are there; a topic that is not ready is none.
    pub(super) is_ready: bool,
    /// Whether it is being deleted.
    pub(super) is_leaving: bool,
    /// Seconds.
    pub(super) max_age: Option<u64>,
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}

impl Store {
    /// What is kept of a topic that is ready, as of now.
    pub(super) async fn declared(&self, topic: &Topic) -> Result<Option<TopicDoc>> {
        Ok(self.entry(topic).await?.map(|held| held.value).filter(|declared| declared.is_ready))
    }

    /// The number of partitions of a topic, as far as it was heard.
    pub(super) fn heard(&self, topic: &Topic) -> Result<Option<u32>> {
        let Some(heard) = self.topics.heard(topic.as_str()) else { return Ok(None) };
        let heard: TopicDoc = decode(topic.as_str(), &heard)?;
        Ok(heard.is_ready.then_some(heard.partitions))
    }

    async fn entry(&self, topic: &Topic) -> Result<Option<Held<TopicDoc>>> {
        let Some(found) = self.topics.get(topic.as_str()).await? else { return Ok(None) };
        Ok(Some(Held { value: decode(topic.as_str(), &found.value)?, revision: found.revision }))
    }

    /// The number of partitions of a topic, as it was heard; it is created where that is wanted.
    pub(super) async fn partitions(&self, topic: &Topic) -> Result<u32> {
        if let Some(heard) = self.heard(topic)? {
            return Ok(heard);
        }
        match self.declared(topic).await? {
            Some(found) => Ok(found.partitions),
            None if self.options.create_topics => {
                let retention = Retention { max_age: self.options.retention, ..Retention::default() };
                Ok(self.declare(topic, self.options.partitions, retention).await?.0)
            }
            None => Err(missing(topic).with("hint", "create it, or say declare=create")),
        }
    }

    pub(super) async fn all(&self) -> Result<Vec<Topic>> {
        let mut found = Vec::new();
        for name in self.topics.keys("").await? {
            // One that is being made or deleted is none.
            let heard =
                self.topics.heard(&name).map(|heard| decode::<TopicDoc>(&name, &heard)).transpose()?;
            if heard.is_some_and(|heard| heard.is_ready) {
                found.push(Topic::new(name)?);
            }
        }
        Ok(found)
    }

    /// Creates a topic; returns its partitions, and whether it is new. What an earlier try left undone is done.
    pub(super) async fn declare(
        &self,
        topic: &Topic,
        partitions: u32,
        kept: Retention,
    ) -> Result<(u32, bool)> {
        if kept.max_events.is_some() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "streams of RabbitMQ are bounded by age, not by number of events",
            ));
        }
        let max_age = kept.max_age.map(|age| age.max(Duration::from_secs(1)).as_secs());
        let wanted = TopicDoc { partitions, is_ready: false, is_leaving: false, max_age };
        let key = topic.as_str();
        if let Some(found) = self.declared(topic).await? {
            self.verify(topic, found.partitions).await?;
            return Ok((found.partitions, false));
        }
        let _one_at_a_time = self.making.lock().await;
        streams::alone(&self.wires, key, self.make(topic, wanted)).await
    }

    /// Makes a topic, or what is left to do of one; nobody else makes or deletes it meanwhile.
    async fn make(&self, topic: &Topic, wanted: TopicDoc) -> Result<(u32, bool)> {
        let key = topic.as_str();
        let mut found = self.entry(topic).await?;
        if let Some(Held { value, revision }) = found.as_ref().filter(|found| found.value.is_leaving) {
            self.raze(topic, value.partitions).await?;
            self.topics.remove(key, *revision).await?.ok_or_else(changed_meanwhile)?;
            found = None;
        }
        let is_new = found.is_none();
        let (doc, revision) = match found {
            Some(found) => (found.value, found.revision),
            None => {
                let made = self.topics.set(key, encode(key, &wanted)?, 0).await?;
                (wanted, made.ok_or_else(changed_meanwhile)?)
            }
        };
        if doc.is_ready {
            return Ok((doc.partitions, false));
        }
        if let Err(error) = self.create(topic, doc, is_new).await {
            if is_new && !error.is_retryable() {
                // As it is asked for, nobody can ever make it.
                self.topics.remove(key, revision).await?;
            }
            return Err(error);
        }
        let ready = TopicDoc { is_ready: true, ..doc };
        self.topics.set(key, encode(key, &ready)?, revision).await?.ok_or_else(changed_meanwhile)?;
        Ok((doc.partitions, is_new))
    }

    /// Fails unless the streams of a topic that should be there are.
    async fn verify(&self, topic: &Topic, partitions: u32) -> Result<()> {
        let looking = (0..partitions).map(|partition| async move {
            let name = names::stream(topic, partition);
            if streams::exists(&self.wires, &name).await? {
                return Ok(());
            }
            Err(Error::new(
                ErrorKind::Conflict,
                "a stream of the topic was deleted: delete the topic, or restore it",
            )
            .with("topic", topic)
            .with("stream", name))
        });
        stream::iter(looking).buffer_unordered(AT_ONCE).try_collect::<()>().await
    }

    async fn create(&self, topic: &Topic, declared: TopicDoc, is_new: bool) -> Result<()> {
        streams::create(&self.wires, &names::groups(topic)).await?;
        let exchange = short(topic.as_str())?;
        let creating = |channel: Channel| async move {
            let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            let mut arguments = FieldTable::default();
            arguments.insert("x-super-stream".into(), AMQPValue::Boolean(true));
            let declaring = channel.exchange_declare(exchange, ExchangeKind::Direct, durable, arguments);
            declaring.await.map_err(failed)
        };
        let created = self.wires.read.ask(creating).await;
        created.map_err(|error| refused(error).with("exchange", topic))?;
        let all = (0..declared.partitions)
            .map(|partition| self.create_partition(topic, partition, declared, is_new));
        stream::iter(all).buffer_unordered(AT_ONCE).try_collect::<()>().await
    }

    async fn create_partition(
        &self,
        topic: &Topic,
        partition: u32,
        declared: TopicDoc,
        is_new: bool,
    ) -> Result<()> {
        let name = names::stream(topic, partition);
        // One that an earlier try left has its first message, or is empty: that shows after a while only.
        if !is_new && streams::exists(&self.wires, &name).await? && self.is_born(&name).await? {
            return Ok(());
        }
        let mut bounds = vec![("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(SEGMENT_BYTES))];
        if let Some(seconds) = declared.max_age {
            bounds.push(("x-max-age", AMQPValue::LongString(format!("{seconds}s").into())));
        }
        let (queue, exchange) = (short(&name)?, short(topic.as_str())?);
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        // One by one: what is given up half-way goes no further than what is on its way.
        streams::declare(&self.wires, queue.clone(), durable, stream_arguments(&bounds))
            .await
            .map_err(|error| refused(error).with("queue", &name))?;
        let (bound, number) = (queue.clone(), short(&partition.to_string())?);
        let binding = |channel: Channel| async move {
            let mut order = FieldTable::default();
            order.insert("x-stream-partition-order".into(), AMQPValue::LongUInt(partition));
            let options = QueueBindOptions::default();
            channel.queue_bind(bound, exchange, number, options, order).await.map_err(failed)
        };
        self.wires.read.ask(binding).await?;
        let bearing = async {
            let channel = self.wires.read.channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let born = channel.basic_publish(ShortString::default(), queue, options, b"", message::birth());
            born.await.map_err(failed)?.await.map_err(failed)
        };
        match self.wires.within(bearing).await? {
            Confirmation::Ack(None) => Ok(()),
            _ => Err(Error::new(ErrorKind::Unavailable, "the stream took no message").with("queue", &name)),
        }
    }

    pub(super) async fn delete(&self, topic: &Topic) -> Result<()> {
        let key = topic.as_str();
        let deleting = async {
            let found = self.entry(topic).await?.ok_or_else(|| missing(topic))?;
            // From here on nobody finds it; what is left undone, the next try does, or who creates it anew.
            let leaving = TopicDoc { is_ready: false, is_leaving: true, ..found.value };
            let revision = self.topics.set(key, encode(key, &leaving)?, found.revision).await?;
            let revision = revision.ok_or_else(changed_meanwhile)?;
            self.raze(topic, leaving.partitions).await?;
            self.topics.remove(key, revision).await?.ok_or_else(changed_meanwhile)
        };
        let _one_at_a_time = self.making.lock().await;
        streams::alone(&self.wires, key, deleting).await
    }

    /// Deletes what a topic is made of.
    async fn raze(&self, topic: &Topic, partitions: u32) -> Result<()> {
        // Members hear that: their map ends.
        streams::delete(&self.wires, &names::groups(topic)).await?;
        let all = (0..partitions).map(|partition| async move {
            streams::delete(&self.wires, &names::stream(topic, partition)).await
        });
        stream::iter(all).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let exchange = short(topic.as_str())?;
        let deleting = |channel: Channel| async move {
            channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await.map_err(failed)
        };
        self.wires.read.ask(deleting).await?;
        self.forget_table(topic);
        Ok(())
    }
}

/// What it means that something of this name cannot be declared.
fn refused(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Conflict => {
            Error::new(ErrorKind::Conflict, "something else has this name, or other arguments")
                .caused_by(error)
        }
        // Names that begin with `amq.` are the broker's own.
        ErrorKind::Unauthorized => {
            Error::new(ErrorKind::Unauthorized, "the broker does not let this user declare it")
                .caused_by(error)
        }
        _ => error,
    }
}
