//! Waiting for events outside of any group: one look for all who wait.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};
use std::time::Duration;

use parking_lot::Mutex;
use rdkafka::consumer::Consumer as _;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::watch;

use super::admin::offset_of;
use super::client::{Client, from_kafka};
use crate::error::Result;
use crate::name::Topic;

/// How often the ends of what is waited for are looked at. What this process publishes is known at once.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The ends of partitions that somebody waits for, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Ends {
    known: Mutex<Known>,
    moved: watch::Sender<u64>,
    n_waits: AtomicUsize,
}

#[derive(Debug, Default)]
struct Known {
    /// By topic and partition: who waits, and the end.
    ends: HashMap<(Topic, u32), (usize, u64)>,
    is_looking: bool,
}

/// Takes a wait back, however it ends.
struct Wait<'a> {
    ends: &'a Ends,
    topic: &'a Topic,
    wanted: &'a [(u32, u64)],
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.ends.n_waits.fetch_sub(1, Atomic::AcqRel);
        let mut known = self.ends.known.lock();
        for (partition, _) in self.wanted {
            let place = (self.topic.clone(), *partition);
            if let Some((n_waiting, _)) = known.ends.get_mut(&place) {
                *n_waiting -= 1;
                if *n_waiting == 0 {
                    known.ends.remove(&place);
                }
            }
        }
    }
}

impl Ends {
    fn wait<'a>(&'a self, topic: &'a Topic, wanted: &'a [(u32, u64)]) -> Wait<'a> {
        self.n_waits.fetch_add(1, Atomic::AcqRel);
        let mut known = self.known.lock();
        for (partition, _) in wanted {
            known.ends.entry((topic.clone(), *partition)).or_default().0 += 1;
        }
        Wait { ends: self, topic, wanted }
    }

    fn has(&self, topic: &Topic, wanted: &[(u32, u64)]) -> bool {
        let known = self.known.lock();
        let end = |partition: u32| known.ends.get(&(topic.clone(), partition)).map_or(0, |(_, end)| *end);
        wanted.iter().any(|(partition, offset)| end(*partition) > *offset)
    }

    /// Takes the end of a partition that an event was stored in by this process.
    pub(super) fn stored(&self, topic: &str, partition: u32, offset: u64) {
        if self.n_waits.load(Atomic::Acquire) > 0
            && let Ok(topic) = Topic::new(topic)
        {
            self.moved(std::iter::once((topic, partition, offset + 1)));
        }
    }

    /// Takes ends that are known now.
    pub(super) fn moved(&self, ends: impl Iterator<Item = (Topic, u32, u64)>) {
        let mut known = self.known.lock();
        let mut is_news = false;
        for (topic, partition, end) in ends {
            if let Some((_, before)) =
                known.ends.get_mut(&(topic, partition)).filter(|(_, before)| end > *before)
            {
                *before = end;
                is_news = true;
            }
        }
        drop(known);
        if is_news {
            self.moved.send_modify(|n| *n += 1);
        }
    }
}

impl Client {
    /// Returns when a partition has an event at or above an offset that is waited for.
    pub(super) async fn arrives(self: &Arc<Self>, topic: &Topic, wanted: Vec<(u32, u64)>) -> Result<()> {
        let mut moved = self.ends.moved.subscribe();
        let _wait = self.ends.wait(topic, &wanted);
        let (name, asked) = (topic.clone(), wanted.clone());
        let first = self
            .blocking(move |client| {
                client.list(&name, asked.iter().map(|(partition, _)| (*partition, KafkaOffset::End)))
            })
            .await?;
        let ends = first.into_iter().filter_map(|(partition, end)| Some((topic.clone(), partition, end?)));
        self.ends.moved(ends);
        while !self.ends.has(topic, &wanted) {
            self.look_for_all();
            if moved.changed().await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Has somebody look from time to time, as long as anybody waits.
    fn look_for_all(self: &Arc<Self>) {
        if std::mem::replace(&mut self.ends.known.lock().is_looking, true) {
            return;
        }
        let client = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let Some(client) = client.upgrade() else { return };
                {
                    let mut known = client.ends.known.lock();
                    if known.ends.is_empty() || client.is_open().is_err() {
                        known.is_looking = false;
                        return;
                    }
                }
                if let Err(error) = client.blocking(Self::look).await {
                    tracing::debug!(%error, "the ends of partitions could not be looked at; trying again");
                }
            }
        });
    }

    /// Blocks.
    fn look(&self) -> Result<()> {
        let mut asked = TopicPartitionList::new();
        for (topic, partition) in self.ends.known.lock().ends.keys() {
            asked
                .add_partition_offset(topic.as_str(), *partition as i32, KafkaOffset::End)
                .map_err(from_kafka)?;
        }
        let found = self.reader.lock().offsets_for_times(asked, self.options.timeout).map_err(from_kafka)?;
        let ends = found.elements().into_iter().filter_map(|element| {
            let end = offset_of(&element)?;
            Some((Topic::new(element.topic()).ok()?, element.partition().unsigned_abs(), end))
        });
        self.ends.moved(ends);
        Ok(())
    }
}
