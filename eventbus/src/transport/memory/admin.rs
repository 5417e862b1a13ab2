//! Administration of the in-process broker.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::Memory;
use super::consumer::first_since;
use super::group::GroupState;
use super::topic::{GroupId, Log, TopicState};
use crate::admin::{Admin, GroupInfo, Offset, PartitionInfo, Record, TopicInfo, TopicSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::fitness::Probe;
use crate::name::{Group, Key, Topic};
use crate::partition::{self, PartitionId};
use crate::transport::Content;
use crate::transport::kit::cursor::Cursor;
use crate::transport::kit::hand::MAX_PARTITIONS;
use crate::transport::kit::refusals;

fn describe(state: &TopicState) -> TopicInfo {
    let inner = state.lock();
    let info = |(at, log): (usize, &Log)| {
        PartitionInfo::new(PartitionId(at as u32), Offset(log.base), Offset(log.next()))
    };
    TopicInfo::new(
        state.spec.topic.clone(),
        inner.logs.iter().enumerate().map(info).collect(),
        state.spec.retention,
    )
}

fn check_partition(state: &TopicState, partition: PartitionId) -> Result<()> {
    if partition.0 < state.spec.partitions.get() {
        return Ok(());
    }
    Err(refusals::no_partition(&state.spec.topic, partition, state.spec.partitions))
}

impl Memory {
    /// Puts bytes that are not an event into a partition, as a foreign producer could on a broker.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) for a topic or partition that does not exist; [`Full`](ErrorKind::Full).
    pub fn inject(&self, topic: &Topic, partition: PartitionId, content: Content) -> Result<()> {
        let state = self.broker.existing(topic)?;
        check_partition(&state, partition)?;
        state.append_raw(partition, content)
    }

    /// Steps the wall clock that this broker sees, by nanoseconds: the conformance suite's clock hook.
    #[cfg(feature = "conformance")]
    #[doc(hidden)]
    pub fn step_clock(&self, by_nanos: i64) {
        self.broker.wall.step(by_nanos);
    }

    fn partition(&self, topic: &Topic, partition: PartitionId) -> Result<Arc<TopicState>> {
        let state = self.broker.existing(topic)?;
        check_partition(&state, partition)?;
        Ok(state)
    }
}

#[async_trait]
impl Admin for Memory {
    async fn declare(&self, spec: &TopicSpec) -> Result<bool> {
        if spec.partitions.get() > MAX_PARTITIONS {
            return Err(
                Error::config("a topic has at most 65536 partitions").with("partitions", spec.partitions)
            );
        }
        if self.broker.options.partitions.get() == 1 && spec.partitions.get() > 1 {
            return Err(Error::new(
                ErrorKind::Conflict,
                "this broker keeps order per topic: topics have one partition",
            )
            .with("topic", &spec.topic)
            .with("partitions", spec.partitions));
        }
        let mut topics = self.broker.topics.lock();
        match topics.get(&spec.topic) {
            None => {
                topics.insert(
                    spec.topic.clone(),
                    Arc::new(TopicState::new(spec.clone(), &self.broker.options, self.broker.wall.clone())),
                );
                Ok(true)
            }
            Some(state) if state.spec.partitions == spec.partitions => Ok(false),
            Some(state) => {
                Err(refusals::other_partitions(&spec.topic, spec.partitions, state.spec.partitions))
            }
        }
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>> {
        let states: Vec<_> = self.broker.topics.lock().values().cloned().collect();
        let mut topics: Vec<_> = states.iter().map(|state| describe(state)).collect();
        topics.sort_by(|a, b| a.topic.cmp(&b.topic));
        Ok(topics)
    }

    async fn topic(&self, topic: &Topic) -> Result<Option<TopicInfo>> {
        let state = self.broker.topics.lock().get(topic).cloned();
        Ok(state.map(|state| describe(&state)))
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let state = self.broker.existing(topic)?;
        self.broker.topics.lock().remove(topic);
        state.delete();
        Ok(())
    }

    async fn purge(&self, topic: &Topic, partition: PartitionId, before: Offset) -> Result<u64> {
        let state = self.partition(topic, partition)?;
        let mut inner = state.lock();
        Ok(state.purge(&mut inner, partition, before.0))
    }

    async fn groups(&self, topic: Option<&Topic>) -> Result<Vec<GroupInfo>> {
        let states: Vec<_> = match topic {
            Some(topic) => vec![self.broker.existing(topic)?],
            None => self.broker.topics.lock().values().cloned().collect(),
        };
        let mut groups = Vec::new();
        for state in states {
            let inner = state.lock();
            for (id, group) in &inner.groups {
                let GroupId::Named(name) = id else { continue };
                for (at, (share, log)) in group.shares.iter().zip(&inner.logs).enumerate() {
                    let cursor: &Cursor = &share.cursor;
                    let lag =
                        cursor.n_unsettled() as u64 + log.next().saturating_sub(cursor.next().max(log.base));
                    let (settled, end) = (Offset(cursor.floor()), Offset(log.next()));
                    let info = GroupInfo::new(
                        name.clone(),
                        state.spec.topic.clone(),
                        PartitionId(at as u32),
                        settled,
                        end,
                        lag,
                    );
                    groups.push(info.with_owner(share.owner.map(|member| format!("member-{member}"))));
                }
            }
        }
        groups.sort_by(|a, b| (&a.group, &a.topic, a.partition).cmp(&(&b.group, &b.topic, b.partition)));
        Ok(groups)
    }

    async fn group(&self, group: &Group, topic: &Topic) -> Result<Vec<GroupInfo>> {
        Ok(self.groups(Some(topic)).await?.into_iter().filter(|info| info.group == *group).collect())
    }

    async fn delete_group(&self, group: &Group, topic: &Topic) -> Result<()> {
        let state = self.broker.existing(topic)?;
        let mut inner = state.lock();
        let id = GroupId::Named(group.clone());
        idle_group(&inner.groups, &id, group)?;
        inner.groups.remove(&id);
        state.forget_settled(&mut inner);
        Ok(())
    }

    async fn seek(&self, group: &Group, topic: &Topic, partition: PartitionId, to: Offset) -> Result<()> {
        let state = self.partition(topic, partition)?;
        let mut inner = state.lock();
        let inner = &mut *inner;
        let id = GroupId::Named(group.clone());
        idle_group(&inner.groups, &id, group)?;
        let at = partition.0 as usize;
        let bounds = inner.logs.get(at).map(|log| (log.base, log.next()));
        if let (Some((first, next)), Some(share)) =
            (bounds, inner.groups.get_mut(&id).and_then(|group| group.shares.get_mut(at)))
        {
            share.cursor = Cursor::new(share.cursor.order(), to.0.clamp(first, next));
        }
        state.settled(inner, partition);
        Ok(())
    }

    async fn partition_of(&self, topic: &Topic, key: &Key) -> Result<PartitionId> {
        Ok(partition::of_key(key, self.broker.existing(topic)?.spec.partitions.get()))
    }

    async fn offset_at(&self, topic: &Topic, partition: PartitionId, time: SystemTime) -> Result<Offset> {
        let state = self.partition(topic, partition)?;
        let inner = state.lock();
        Ok(Offset(inner.logs.get(partition.0 as usize).map_or(0, |log| first_since(log, time))))
    }

    async fn read(
        &self,
        topic: &Topic,
        partition: PartitionId,
        from: Offset,
        max: usize,
    ) -> Result<Vec<Record>> {
        let state = self.partition(topic, partition)?;
        let inner = state.lock();
        let Some(log) = inner.logs.get(partition.0 as usize) else { return Ok(Vec::new()) };
        if from.0 < log.base {
            return Err(refusals::removed(topic, partition, from, log.base));
        }
        let skip = (from.0 - log.base) as usize;
        let records = log.entries.iter().enumerate().skip(skip).take(max).map(|(at, stored)| {
            Record::new(partition, Offset(log.base + at as u64), stored.stored_at, stored.content.clone())
        });
        Ok(records.collect())
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        Ok(Vec::new())
    }

    async fn wait(&self, topic: &Topic, positions: &[(PartitionId, Offset)], within: Duration) -> Result<()> {
        let state = self.broker.existing(topic)?;
        let arrived = || {
            let inner = state.lock();
            inner.deleted
                || positions.iter().any(|(partition, offset)| {
                    inner.logs.get(partition.0 as usize).is_some_and(|log| log.next() > offset.0)
                })
        };
        drop(tokio::time::timeout(within, state.until(arrived)).await);
        Ok(())
    }
}

fn idle_group(groups: &BTreeMap<GroupId, GroupState>, id: &GroupId, group: &Group) -> Result<()> {
    match groups.get(id) {
        None => Err(Error::not_found("there is no such group in this topic").with("group", group)),
        Some(state) if !state.members.is_empty() => {
            Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
                .with("group", group)
                .with("members", state.members.len()))
        }
        Some(_) => Ok(()),
    }
}
