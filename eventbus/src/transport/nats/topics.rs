//! Topics: what is declared of them, and a stream for each partition.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config, Info, StorageType, Stream};
use async_nats::jetstream::{ErrorCode, context};
use futures_util::future::{join_all, try_join_all};
use serde::{Deserialize, Serialize};

use super::names;
use super::store::{Store, unavailable};
use crate::admin::Retention;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::leased::registers::Bounds;

/// For how long the number of partitions of a topic is believed.
const TOPIC_AGE: Duration = Duration::from_secs(30);
/// Least age of events and least window that the server takes for a stream.
pub(super) const SHORTEST: Duration = Duration::from_millis(100);

/// What is kept of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TopicDoc {
    pub(super) partitions: u32,
    /// Whether all its streams are there; a topic that is not ready is none.
    pub(super) is_ready: bool,
    /// Milliseconds.
    pub(super) max_age: Option<u64>,
    pub(super) max_events: Option<u64>,
}

impl Store {
    /// What the server says of the stream of a partition, if there is one.
    pub(super) async fn look(&self, topic: &Topic, partition: u32) -> Result<Option<(Stream, Info)>> {
        let looking = async {
            match self.context.get_stream(names::stream(topic, partition)).await {
                Ok(stream) => {
                    let info = stream.cached_info().clone();
                    Ok(Some((stream, info)))
                }
                Err(error) => match error.kind() {
                    context::GetStreamErrorKind::JetStream(error)
                        if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                    {
                        Ok(None)
                    }
                    _ => Err(unavailable(error)),
                },
            }
        };
        self.within(looking).await
    }

    /// Looks at all partitions of a topic that exists.
    pub(super) async fn look_at_all(&self, topic: &Topic, n_partitions: u32) -> Result<Vec<(Stream, Info)>> {
        let looking = (0..n_partitions).map(|partition| self.look(topic, partition));
        join_all(looking).await.into_iter().map(|found| found?.ok_or_else(|| missing(topic))).collect()
    }

    /// What is kept of a topic that is ready.
    pub(super) async fn declared(&self, topic: &Topic) -> Result<Option<TopicDoc>> {
        let found = self.get::<TopicDoc>(&names::topic(topic)).await?;
        Ok(found.map(|held| held.value).filter(|declared| declared.is_ready))
    }

    /// The number of partitions of a topic; it is created where that is wanted.
    pub(super) async fn partitions(&self, topic: &Topic) -> Result<u32> {
        if let Some((known, looked)) = self.topics.lock().get(topic)
            && looked.elapsed() < TOPIC_AGE
        {
            return Ok(*known);
        }
        let found = match self.declared(topic).await? {
            Some(found) => found.partitions,
            None if self.options.create_topics => {
                let retention = Retention { max_age: self.options.retention, ..Retention::default() };
                self.declare(topic, self.options.partitions, retention).await?.0
            }
            None => return Err(missing(topic).with("hint", "create it, or say declare=create")),
        };
        self.topics.lock().insert(topic.clone(), (found, Instant::now()));
        Ok(found)
    }

    pub(super) fn forget(&self, topic: &Topic) {
        self.topics.lock().remove(topic);
    }

    /// Creates a topic; returns its partitions, and whether it is new. What an earlier try left undone is done.
    pub(super) async fn declare(
        &self,
        topic: &Topic,
        partitions: u32,
        kept: Retention,
    ) -> Result<(u32, bool)> {
        if kept.max_age.is_some_and(|age| age < SHORTEST) {
            return Err(Error::config("NATS keeps events for 100 ms at least"));
        }
        let max_age = kept.max_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let max_events = kept.max_events.map(std::num::NonZeroU64::get);
        let wanted = TopicDoc { partitions, is_ready: false, max_age, max_events };
        let key = names::topic(topic);
        let is_new = self.set(&key, &wanted, 0).await?.is_some();
        // Deleted in between: whoever asked may ask again.
        let found = self.get::<TopicDoc>(&key).await?.ok_or_else(|| missing(topic))?;
        let n_partitions = found.value.partitions;
        let creating = (0..n_partitions).map(|partition| self.create(topic, partition, found.value));
        match try_join_all(creating).await {
            Ok(_) if found.value.is_ready => {}
            // If somebody was quicker, it is what they made of it.
            Ok(_) => drop(self.set(&key, &TopicDoc { is_ready: true, ..found.value }, found.revision).await?),
            Err(error) => {
                if is_new && error.kind() == ErrorKind::Config {
                    // Nobody can ever make it.
                    self.remove_at(&key, found.revision).await?;
                }
                return Err(error);
            }
        }
        Ok((n_partitions, is_new))
    }

    async fn create(&self, topic: &Topic, partition: u32, declared: TopicDoc) -> Result<()> {
        let config = Config {
            name: names::stream(topic, partition),
            subjects: vec![names::subject(topic, partition)],
            storage: StorageType::File,
            num_replicas: self.options.replicas,
            max_age: declared.max_age.map(Duration::from_millis).unwrap_or_default(),
            max_messages: declared.max_events.map_or(-1, |most| i64::try_from(most).unwrap_or(i64::MAX)),
            duplicate_window: self.options.dedup.unwrap_or(Duration::ZERO),
            allow_direct: true,
            ..Config::default()
        };
        let creating = async { Ok(self.context.create_stream(config).await) };
        match self.within(creating).await? {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                // The server takes no stream with these settings, now or later.
                context::CreateStreamErrorKind::JetStream(known)
                    if known.code() == 400
                        && known.error_code() != ErrorCode::STREAM_NAME_EXIST
                        && known.error_code() != ErrorCode::STREAM_SUBJECT_OVERLAP =>
                {
                    Err(Error::config("the server refuses a stream with these settings")
                        .with("topic", topic)
                        .caused_by(error))
                }
                // It stands already, with other settings: those of whoever made it.
                context::CreateStreamErrorKind::JetStream(known)
                    if known.error_code() == ErrorCode::STREAM_NAME_EXIST =>
                {
                    self.verify(topic, partition).await
                }
                context::CreateStreamErrorKind::JetStream(known)
                    if known.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP =>
                {
                    Err(Error::new(ErrorKind::Conflict, "another stream takes the subjects of this topic")
                        .with("topic", topic)
                        .with("subject", names::subject(topic, partition))
                        .caused_by(error))
                }
                _ => Err(unavailable(error).with("topic", topic)),
            },
        }
    }

    /// Fails unless the stream of a partition takes the events of this partition and no others.
    async fn verify(&self, topic: &Topic, partition: u32) -> Result<()> {
        let (_, info) = self.look(topic, partition).await?.ok_or_else(|| missing(topic))?;
        let subject = names::subject(topic, partition);
        if info.config.subjects == [subject.as_str()] {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, "a stream of this name holds something else")
            .with("stream", &info.config.name)
            .with("wanted", subject)
            .with("found", info.config.subjects.join(" ")))
    }

    pub(super) async fn delete_stream(&self, topic: &Topic, partition: u32) -> Result<()> {
        let deleting = async { Ok(self.context.delete_stream(names::stream(topic, partition)).await) };
        match self.within(deleting).await? {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                context::DeleteStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(())
                }
                _ => Err(unavailable(error)),
            },
        }
    }
}

/// What a stream holds.
pub(super) fn bounds(info: &Info) -> Bounds {
    let state = &info.state;
    Bounds { first: state.first_sequence.max(1), next: state.last_sequence + 1, n_kept: state.messages }
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}
