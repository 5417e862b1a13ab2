//! Administration of the server: works while programs use it.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use redis::{Pipeline, Value};

use super::store::{Store, missing, script};
use super::{MAX_PARTITIONS, Redis, entry, keys};
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, Retention, TopicInfo, TopicSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::kit::refusals;

/// What the server says of a stream.
#[derive(Debug, Clone, Copy, Default)]
struct StreamInfo {
    n_added: u64,
    length: u64,
    first: u64,
    next: u64,
}

fn damaged() -> Error {
    Error::new(ErrorKind::Corrupt, "what is kept of a topic cannot be read")
}

impl StreamInfo {
    /// Reads the answers to `XINFO STREAM` and `XRANGE - + COUNT 1`.
    fn read(info: &Value, first: &Value) -> Result<Self> {
        let info: HashMap<String, Value> = redis::from_redis_value(info.clone()).map_err(|_| damaged())?;
        let number = |name: &str| match info.get(name) {
            Some(Value::Int(number)) => Ok(number.unsigned_abs()),
            _ => Err(damaged()),
        };
        let last = match info.get("last-generated-id") {
            Some(Value::BulkString(id)) => keys::offset(id).ok_or_else(damaged)?,
            _ => return Err(damaged()),
        };
        let n_added = number("entries-added")?;
        let next = if n_added == 0 && last == 0 { 0 } else { last + 1 };
        let first = match first {
            Value::Array(entries) => {
                entries.first().and_then(entry::stored).map_or(next, |entry| entry.offset)
            }
            _ => next,
        };
        Ok(Self { n_added, length: number("length")?, first, next })
    }
}

impl Store {
    /// Looks at every partition of a topic, and at its declaration.
    async fn look(&self, topic: &Topic) -> Result<Option<(Vec<StreamInfo>, Retention)>> {
        let meta = keys::meta(topic);
        let declared: (Option<u32>, Option<String>, Option<String>) = self
            .with(|mut connection| async move {
                let fields = ["partitions", "max_age", "max_events"];
                redis::cmd("HMGET").arg(meta).arg(&fields).query_async(&mut connection).await
            })
            .await?;
        let (Some(n_partitions), max_age, max_events) = declared else { return Ok(None) };
        let mut pipeline = Pipeline::new();
        for stream in keys::streams(topic, n_partitions) {
            pipeline.cmd("XINFO").arg("STREAM").arg(&stream);
            pipeline.cmd("XRANGE").arg(&stream).arg("-").arg("+").arg("COUNT").arg(1);
        }
        let answers: Vec<Value> =
            self.with(|mut connection| async move { pipeline.query_async(&mut connection).await }).await?;
        let streams = answers.as_chunks::<2>().0.iter().map(|[info, first]| StreamInfo::read(info, first));
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
        let retention = Retention {
            max_age: number(max_age).map(Duration::from_millis),
            max_events: number(max_events).and_then(NonZeroU64::new),
        };
        Ok(Some((streams.collect::<Result<_>>()?, retention)))
    }

    async fn describe(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let Some((streams, retention)) = self.look(topic).await? else { return Ok(None) };
        let partition = |(at, info): (usize, StreamInfo)| {
            PartitionInfo::new(PartitionId(at as u32), Offset(info.first), Offset(info.next))
                .with_kept(info.length)
        };
        let partitions = streams.into_iter().enumerate().map(partition).collect();
        Ok(Some(TopicInfo::new(topic.clone(), partitions, retention)))
    }

    async fn all(&self) -> Result<Vec<Topic>> {
        let mut names: Vec<String> = self
            .with(|mut connection| async move {
                redis::cmd("SMEMBERS").arg(keys::TOPICS).query_async(&mut connection).await
            })
            .await?;
        names.sort_unstable();
        names.into_iter().map(Topic::new).collect()
    }

    /// The bounds of a partition that must exist, and the number of partitions.
    async fn bounds(&self, topic: &Topic, partition: PartitionId) -> Result<StreamInfo> {
        let (streams, _) = self.look(topic).await?.ok_or_else(|| missing(topic))?;
        streams
            .get(partition.0 as usize)
            .copied()
            .ok_or_else(|| refusals::no_partition(topic, partition, streams.len()))
    }

    async fn positions(&self, topic: &Topic) -> Result<Vec<GroupInfo>> {
        let (streams, _) = self.look(topic).await?.ok_or_else(|| missing(topic))?;
        let (set, prefix) = (keys::groups(topic), keys::group_prefix(topic));
        let (mut names, now): (Vec<String>, (u64, u64)) = self
            .with(|mut connection| async move {
                redis::pipe().cmd("SMEMBERS").arg(set).cmd("TIME").query_async(&mut connection).await
            })
            .await?;
        let now = now.0 * 1000 + now.1 / 1000;
        names.sort_unstable();
        let mut found = Vec::new();
        for name in names {
            let mut pipeline = Pipeline::new();
            pipeline.cmd("HGETALL").arg(format!("{prefix}{name}"));
            for partition in 0..streams.len() {
                pipeline.cmd("HGETALL").arg(keys::exceptions(topic, &name, partition as u32));
            }
            let mut answers: Vec<HashMap<String, String>> = self
                .with(|mut connection| async move { pipeline.query_async(&mut connection).await })
                .await?;
            let group = answers.remove(0);
            if group.is_empty() || group.get("ephemeral").is_some_and(|ephemeral| ephemeral == "1") {
                continue;
            }
            let of = Group::new(&name)?;
            for (at, (info, exceptions)) in streams.iter().zip(&answers).enumerate() {
                let cursor = group.get(&format!("c:{at}")).ok_or_else(damaged)?;
                let parts: Vec<&str> = cursor.split('|').collect();
                let [floor, _, owner, passed] = parts.as_slice() else { return Err(damaged()) };
                let floor = keys::offset(floor.as_bytes()).ok_or_else(damaged)?;
                let passed: u64 = passed.parse().map_err(|_| damaged())?;
                // What was removed unread is not waited for.
                let passed = passed.max(info.n_added.saturating_sub(info.length));
                let settled_above = exceptions
                    .iter()
                    .filter(|(id, memory)| {
                        *memory == "s" && keys::offset(id.as_bytes()).is_some_and(|offset| offset >= floor)
                    })
                    .count() as u64;
                let lag = info.n_added.saturating_sub(passed).saturating_sub(settled_above);
                let owner = group.get(&format!("m:{owner}")).and_then(|member| {
                    let (alive_until, process) = member.split_once('|')?;
                    let lives = alive_until.parse::<u64>().is_ok_and(|until| until >= now);
                    lives.then(|| format!("member {owner} of {process}"))
                });
                let (partition, floor, end) = (PartitionId(at as u32), Offset(floor), Offset(info.next));
                found.push(
                    GroupInfo::new(of.clone(), topic.clone(), partition, floor, end, lag).with_owner(owner),
                );
            }
        }
        Ok(found)
    }

    /// What changing a group without members answered.
    fn changed(group: &Group, topic: &Topic, answer: i64) -> Result<()> {
        match answer {
            0 => Err(Error::not_found("there is no such group in this topic")
                .with("group", group)
                .with("topic", topic)),
            ..0 => Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
                .with("group", group)
                .with("members", -answer)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Admin for Redis {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        let declared = spec.partitions.get();
        if declared > MAX_PARTITIONS {
            return Err(Error::config("a topic of this store has at most 4096 partitions")
                .with("partitions", spec.partitions));
        }
        let (topic, kept) = (&spec.topic, spec.retention);
        let max_events = kept.max_events.map(NonZeroU64::get);
        match self.store.declare(topic, declared, kept.max_age, max_events).await? {
            (_, true) => Ok(true),
            (found, false) if found == declared => Ok(false),
            (found, false) => Err(refusals::other_partitions(topic, declared, found)),
        }
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let mut found = Vec::new();
        for topic in self.store.all().await? {
            found.extend(self.store.describe(&topic).await?);
        }
        Ok(found)
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        self.store.describe(topic).await
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let n_partitions = self.store.existing(topic).await?;
        self.store.forget(topic);
        let names = [keys::meta(topic), keys::groups(topic)];
        let names = names.into_iter().chain(keys::streams(topic, n_partitions)).collect();
        let arguments = [keys::channel(topic), keys::group_prefix(topic), keys::exception_prefix(topic)];
        let arguments = arguments.into_iter().map(String::into_bytes).collect();
        let deleted: u32 = self.store.script(script!("delete"), names, arguments).await?;
        let name = topic.to_string();
        self.store
            .with(|mut connection| async move {
                redis::cmd("SREM").arg(keys::TOPICS).arg(name).query_async::<()>(&mut connection).await
            })
            .await?;
        if deleted == 0 { Err(missing(topic)) } else { Ok(()) }
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let bounds = self.store.bounds(topic, partition).await?;
        let names = vec![keys::meta(topic), keys::stream(topic, partition.0)];
        let id = keys::id(before.0.min(bounds.next));
        let arguments =
            vec![keys::channel(topic).into_bytes(), partition.to_string().into_bytes(), id.into_bytes()];
        self.store.script(script!("purge"), names, arguments).await
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let topics = match topic {
            Some(topic) => vec![topic.clone()],
            None => self.store.all().await?,
        };
        let mut found = Vec::new();
        for topic in topics {
            found.extend(self.store.positions(&topic).await?);
        }
        found.sort_by(|a, b| (&a.group, &a.topic, a.partition).cmp(&(&b.group, &b.topic, b.partition)));
        Ok(found)
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        Ok(self.groups(Some(topic)).await?.into_iter().filter(|info| info.group == *group).collect())
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let n_partitions = self.store.existing(topic).await?;
        let exceptions =
            (0..n_partitions).map(|partition| keys::exceptions(topic, group.as_str(), partition));
        let names = [keys::groups(topic), keys::group(topic, group.as_str())];
        let names = names.into_iter().chain(exceptions).collect();
        let arguments = vec![group.as_str().as_bytes().to_vec()];
        Store::changed(group, topic, self.store.script(script!("forget"), names, arguments).await?)
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let bounds = self.store.bounds(topic, partition).await?;
        let names = vec![
            keys::group(topic, group.as_str()),
            keys::exceptions(topic, group.as_str(), partition.0),
            keys::stream(topic, partition.0),
        ];
        let id = keys::id(to.0.clamp(bounds.first, bounds.next));
        let arguments = vec![partition.to_string().into_bytes(), id.into_bytes()];
        Store::changed(group, topic, self.store.script(script!("seek"), names, arguments).await?)
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        Ok(partition::of_key(key, self.store.existing(topic).await?))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let bounds = self.store.bounds(topic, partition).await?;
        let (stream, since) = (keys::stream(topic, partition.0), keys::since(time));
        let found: Vec<Value> = self
            .store
            .with(|mut connection| async move {
                redis::cmd("XRANGE")
                    .arg(stream)
                    .arg(since)
                    .arg("+")
                    .arg("COUNT")
                    .arg(1)
                    .query_async(&mut connection)
                    .await
            })
            .await?;
        Ok(Offset(found.first().and_then(entry::stored).map_or(bounds.next, |entry| entry.offset)))
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        let n_partitions = self.store.existing(topic).await?;
        if partition.0 >= n_partitions {
            return Err(self.store.bounds(topic, partition).await.err().unwrap_or_else(damaged));
        }
        let (stream, meta) = (keys::stream(topic, partition.0), keys::meta(topic));
        let (entries, first): (Vec<Value>, Option<String>) = self
            .store
            .with(|mut connection| async move {
                let mut both = redis::pipe();
                both.cmd("XRANGE").arg(stream).arg(keys::id(from.0)).arg("+").arg("COUNT").arg(max);
                both.cmd("HGET")
                    .arg(meta)
                    .arg(format!("first:{partition}"))
                    .query_async(&mut connection)
                    .await
            })
            .await?;
        let first = first.and_then(|first| keys::offset(first.as_bytes())).unwrap_or(0);
        if from.0 < first {
            return Err(refusals::removed(topic, partition, from, first));
        }
        let record = |entry: &Value| {
            let found = entry::stored(entry).ok_or_else(damaged)?;
            Ok(Record::new(partition, Offset(found.offset), found.stored_at, found.content))
        };
        entries.iter().map(record).collect()
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.store.probes().await
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        let mut bell = self.store.bells.hear(topic.clone());
        self.store.existing(topic).await?;
        let waiting = async {
            loop {
                bell.borrow_and_update();
                let mut pipeline = Pipeline::new();
                for (partition, from) in positions {
                    let (stream, id) = (keys::stream(topic, partition.0), keys::id(from.0));
                    pipeline.cmd("XRANGE").arg(stream).arg(id).arg("+").arg("COUNT").arg(1);
                }
                let found: Vec<Vec<Value>> = self
                    .store
                    .with(|mut connection| async move { pipeline.query_async(&mut connection).await })
                    .await?;
                if found.iter().any(|entries| !entries.is_empty()) || bell.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(within, waiting).await.unwrap_or(Ok(()))
    }
}
