//! One virtual host of RabbitMQ: topics, the maps in which groups are kept, and who lives.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use futures_util::stream::{self, BoxStream};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::streams::{self, short};
use super::table::Table;
use super::wire::{Wires, failed};
use super::{Options, names, publisher};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::leased::registers::{self, Ahead, Bounds, Entry, GroupDoc, Held, Registers};
use crate::transport::kit::queue::Queue;
use crate::transport::kit::tasks::Tasks;
use crate::transport::kit::tls;
use crate::url::Url;

/// Partitions that are looked at side by side.
pub(super) const AT_ONCE: usize = 16;

/// When a member that is not there is looked for again.
const SECOND_LOOK: Duration = Duration::from_millis(500);
/// When a broker that is just coming up is asked again.
const AGAIN: Duration = Duration::from_millis(100);

pub(super) struct Store {
    pub(super) wires: Arc<Wires>,
    pub(super) options: Options,
    pub(super) queue: Arc<Queue>,
    pub(super) topics: Arc<Table>,
    groups: Mutex<HashMap<Topic, Arc<Table>>>,
    /// What members of groups said last, and when we saw that.
    seen: Mutex<HashMap<u64, (u64, Instant)>>,
    /// Members of ours, with the number of the connection that says that they live.
    attended: Mutex<HashMap<u64, u64>>,
    /// The first offsets of topics that were looked at, and when.
    pub(super) firsts: Mutex<HashMap<Topic, (Vec<u64>, Instant)>>,
    /// One topic is created at a time.
    pub(super) making: tokio::sync::Mutex<()>,
    pub(super) tasks: Tasks,
}

/// Delays are written as what is left of them: the broker tells nobody its time. So an event whose partition moves waits
/// for as long as was left when that was stored; never less.
pub(super) struct Left(Instant);

impl registers::Clock for Left {
    fn write(&self, due: Instant) -> u64 {
        u64::try_from(due.saturating_duration_since(self.0).as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
    }

    fn read(&self, due: u64) -> Option<Instant> {
        self.0.checked_add(Duration::from_millis(due))
    }
}

impl Store {
    pub(super) async fn open(url: &Url, options: Options) -> Result<Arc<Self>> {
        let wires = Arc::new(Wires::new(url, &options)?);
        let opening = async {
            wires.read.connection().await?;
            loop {
                let creating = streams::create(&wires, names::TOPICS);
                match streams::alone(&wires, names::TOPICS, creating).await {
                    // A broker that just started lets clients in before it has its queues.
                    Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
                    created => return created,
                }
            }
        };
        let opened = wires.within(opening).await;
        opened.map_err(|error| tls::at_opening(error).with("place", &wires.place))?;
        let (queue, rounds) = Queue::new(options.max_event_bytes);
        let store = Arc::new(Self {
            topics: Table::open(&wires, names::TOPICS.to_owned()),
            wires,
            options,
            queue,
            groups: Mutex::default(),
            seen: Mutex::default(),
            attended: Mutex::default(),
            firsts: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            tasks: Tasks::default(),
        });
        store.tasks.keep(tokio::spawn(publisher::write(Arc::downgrade(&store), rounds)));
        store.tasks.keep(tokio::spawn(attend_again(Arc::downgrade(&store))));
        Ok(store)
    }

    pub(super) fn is_open(&self) -> Result<()> {
        self.queue.is_open()
    }

    pub(super) async fn close(&self) {
        self.queue.stop().await;
        self.tasks.end().await;
        self.wires.close().await;
    }

    /// The map of a topic's groups.
    pub(super) fn table(&self, topic: &Topic) -> Arc<Table> {
        let mut groups = self.groups.lock();
        match groups.get(topic).filter(|table| !table.is_gone()) {
            Some(table) => table.clone(),
            None => {
                let table = Table::open(&self.wires, names::groups(topic));
                groups.insert(topic.clone(), table.clone());
                table
            }
        }
    }

    /// Whether a member's connection is there: its queue takes a message, or the broker returns it.
    async fn lives(&self, member: u64) -> Result<bool> {
        let (queue, nowhere) = (short(&names::member(member))?, ShortString::default());
        let looking = |channel: Channel| async move {
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let sent = channel.basic_publish(nowhere, queue, options, b"", BasicProperties::default());
            sent.await.map_err(failed)?.await.map_err(failed)
        };
        Ok(!matches!(self.wires.send.ask(looking).await?, Confirmation::Ack(Some(_))))
    }

    /// Forgets the map of a topic's groups.
    pub(super) fn forget_table(&self, topic: &Topic) {
        self.groups.lock().remove(topic);
    }
}

/// Says that members of ours live, on each new connection at once.
async fn attend_again(store: Weak<Store>) {
    let Some(mut numbers) = store.upgrade().map(|store| store.wires.read.numbers.subscribe()) else { return };
    while numbers.changed().await.is_ok() {
        let Some(store) = store.upgrade() else { return };
        let members: Vec<u64> = store.attended.lock().keys().copied().collect();
        for member in members {
            if let Err(error) = store.attend(member).await {
                tracing::debug!(%error, "a member says that it lives with its next look at the group");
            }
        }
    }
}

fn key(entry: Entry<'_>) -> String {
    match entry {
        Entry::Group(_, group) => names::group(group),
        Entry::Cursor(_, group, partition) => names::cursor(group, partition),
    }
}

fn topic_of(entry: Entry<'_>) -> &Topic {
    match entry {
        Entry::Group(topic, _) | Entry::Cursor(topic, _, _) => topic,
    }
}

pub(super) fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T> {
    serde_json::from_slice(value).map_err(|error| damaged(key).caused_by(error))
}

pub(super) fn encode<T: Serialize>(key: &str, value: &T) -> Result<Bytes> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| damaged(key).caused_by(error))
}

pub(super) fn damaged(key: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "what is kept under a key cannot be read").with("key", key)
}

#[async_trait]
impl Registers for Store {
    const NAME: &'static str = "RabbitMqConsumer";

    type Clock = Left;

    fn open(&self) -> Result<()> {
        self.is_open()
    }

    fn silence(&self) -> Duration {
        self.options.session
    }

    fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    fn clock(&self) -> Left {
        Left(Instant::now())
    }

    async fn get<T: DeserializeOwned + Send>(&self, entry: Entry<'_>) -> Result<Option<Held<T>>> {
        let key = key(entry);
        let Some(found) = self.table(topic_of(entry)).get(&key).await? else { return Ok(None) };
        Ok(Some(Held { value: decode(&key, &found.value)?, revision: found.revision }))
    }

    async fn set<T: Serialize + Sync>(
        &self,
        entry: Entry<'_>,
        value: &T,
        revision: u64,
    ) -> Result<Option<u64>> {
        let key = key(entry);
        let value = encode(&key, value)?;
        self.table(topic_of(entry)).set(&key, value, revision).await
    }

    async fn remove(&self, entry: Entry<'_>, revision: u64) -> Result<Option<()>> {
        self.table(topic_of(entry)).remove(&key(entry), revision).await
    }

    async fn groups(&self, topic: &Topic) -> Result<Vec<String>> {
        let keys = self.table(topic).keys(names::GROUP).await?;
        Ok(keys.iter().filter_map(|key| key.strip_prefix(names::GROUP)).map(str::to_owned).collect())
    }

    async fn changes(&self, entry: Entry<'_>) -> Result<BoxStream<'static, Bytes>> {
        let table = self.table(topic_of(entry));
        let heard = table.changes(&key(entry));
        // The map is read as long as somebody hears of it.
        let heard = stream::unfold((heard, table), |(mut heard, table)| async move {
            heard.recv().await.map(|value| (value, (heard, table)))
        });
        Ok(heard.boxed())
    }

    fn mark(&self) -> u64 {
        fastrand::u64(..)
    }

    /// A member lives while its connection does: a queue of that connection alone says so.
    async fn attend(&self, member: u64) -> Result<()> {
        let (_, number) = self.wires.read.connection().await?;
        if self.attended.lock().get(&member) == Some(&number) {
            return Ok(());
        }
        let ours = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        // It keeps nothing of what is published to see whether it is there.
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(0));
        match streams::declare(&self.wires, short(&names::member(member))?, ours, arguments).await {
            Ok(_) => {
                self.attended.lock().insert(member, number);
                Ok(())
            }
            // By a connection of ours that the broker has not given up yet: next time.
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn absent(&self, member: u64) {
        self.attended.lock().remove(&member);
        self.seen.lock().remove(&member);
        if let Err(error) = streams::delete(&self.wires, &names::member(member)).await {
            tracing::debug!(%error, "what says that a member lives is left to the connection's end");
        }
    }

    /// Dead is whose connection is gone, and who, if we know it, said nothing new for a session. Nobody's clock matters.
    async fn dead(&self, _group: Entry<'_>, doc: &GroupDoc) -> Result<BTreeSet<u64>> {
        let now = Instant::now();
        let doubtful: Vec<(u64, u64)> = {
            let mut seen = self.seen.lock();
            let heard = |member: &u64, until: u64| match seen.get(member) {
                Some((known, at)) if *known == until => now.duration_since(*at) <= self.options.session,
                // Something new; of one that we did not know, nothing.
                Some(_) => true,
                None => false,
            };
            let all = doc.members.iter().map(|(member, doc)| (*member, doc.until));
            let (fresh, doubtful): (Vec<_>, Vec<_>) = all.partition(|(member, until)| heard(member, *until));
            for (member, until) in fresh {
                let known = seen.entry(member).or_insert((until, now));
                if known.0 != until {
                    *known = (until, now);
                }
            }
            doubtful
        };
        let look = || try_join_all(doubtful.iter().map(|(member, _)| self.lives(*member)));
        let mut looked = look().await?;
        if looked.contains(&false) {
            // After a restart of the broker those that live say so again, each as soon as it is connected.
            tokio::time::sleep(SECOND_LOOK).await;
            looked = look().await?;
        }
        let mut seen = self.seen.lock();
        let mut dead = BTreeSet::new();
        for ((member, until), lives) in doubtful.into_iter().zip(looked) {
            if lives {
                seen.insert(member, (until, now));
            } else {
                seen.remove(&member);
                dead.insert(member);
            }
        }
        Ok(dead)
    }

    async fn partitions(&self, topic: &Topic) -> Result<u32> {
        self.partitions(topic).await
    }

    fn forget(&self, _topic: &Topic) {}

    async fn existing(&self, topic: &Topic) -> Result<Option<u32>> {
        Ok(self.declared(topic).await?.map(|declared| declared.partitions))
    }

    async fn bounds(&self, topic: &Topic, partitions: u32, is_exact: bool) -> Result<Vec<Bounds>> {
        let all: Vec<u32> = (0..partitions).collect();
        self.bounds_of(topic, &all, is_exact).await
    }

    async fn first_since(&self, topic: &Topic, partition: u32, time: SystemTime) -> Result<Option<u64>> {
        self.first_since(topic, partition, time).await
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
