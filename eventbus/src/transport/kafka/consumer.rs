//! One member of a group, or one broadcast instance.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::{Duration, Instant as StdInstant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::Instant;

use super::client::{Client, from_kafka, interrupted};
use super::hold::{Floor, Hold};
use super::pump::{self, Context, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::{Audience, Start, Subscription};
use crate::transport::kit::hand::Place;
use crate::transport::{Consumer, Polled, Settle, Settled, Token};

/// How long a commit is tried.
const COMMIT_WITHIN: Duration = Duration::from_secs(5);
/// The same while the group changes, which takes as long as its slowest member.
const CHANGE_WITHIN: Duration = Duration::from_secs(15);
const COMMIT_AGAIN: Duration = Duration::from_millis(20);

pub(super) struct KafkaConsumer {
    member: Arc<Member>,
    /// One poll reads at a time; a second one waits behind it.
    polling: tokio::sync::Mutex<()>,
}

struct Member {
    client: Arc<Client>,
    /// Taken when the member leaves: the last to let go of it closes it, and that must be its thread.
    consumer: Arc<Mutex<Option<Arc<BaseConsumer<Context>>>>>,
    shared: Arc<Shared>,
    subscription: Subscription,
    /// One settle is committed at a time, so that positions never go back.
    saving: Arc<tokio::sync::Mutex<()>>,
    closed: AtomicBool,
    /// True when the thread has left the group.
    gone: watch::Receiver<bool>,
}

impl KafkaConsumer {
    pub(super) async fn join(client: Arc<Client>, wanted: &Subscription) -> Result<Arc<Self>> {
        let wanted = wanted.clone();
        // On a task of its own: a caller that goes away leaves a member that is whole, and that leaves when the
        // task's result is dropped.
        let joining = tokio::spawn(async move {
            let n_partitions = client.partitions(&wanted.topic).await?;
            let subscription = wanted.clone();
            let joined = client.blocking(move |client| join(client, &subscription, n_partitions)).await?;
            let (shared, consumer) = joined;
            let (left, gone) = watch::channel(false);
            let (mut pumped, pumping) = (consumer.clone(), shared.clone());
            let consumer = Arc::new(Mutex::new(Some(consumer)));
            let slot = consumer.clone();
            let thread = std::thread::Builder::new().name("eventbus-kafka".to_owned()).spawn(move || {
                pump::run(&pumped, &pumping);
                drop(slot.lock().take());
                // A commit may be on its way.
                while Arc::get_mut(&mut pumped).is_none() {
                    std::thread::sleep(Duration::from_millis(2));
                }
                drop(pumped);
                left.send_replace(true);
                pumping.wake.notify_waiters();
            });
            thread.map_err(|error| {
                Error::new(ErrorKind::Unavailable, "a thread could not be started").caused_by(error)
            })?;
            let member = Arc::new(Member {
                client,
                consumer,
                shared,
                subscription: wanted,
                saving: Arc::default(),
                closed: AtomicBool::new(false),
                gone,
            });
            Ok::<_, Error>(Arc::new(Self { member, polling: tokio::sync::Mutex::default() }))
        });
        let consumer = joining.await.map_err(interrupted)??;
        consumer.member.is_in().await;
        // Closed meanwhile: this member would be nobody's.
        consumer.member.open()?;
        Ok(consumer)
    }

    /// Leaves the group, and waits until that is done.
    pub(super) async fn leave(&self) {
        let member = self.member.clone();
        if !member.closed.swap(true, Atomic::AcqRel) {
            // Behind what is being committed.
            let leaving = member.clone();
            let asked = tokio::spawn(async move {
                let _saved = leaving.saving.lock().await;
                leaving.shared.is_closing.store(true, Atomic::Release);
                leaving.shared.wake.notify_waiters();
                leaving.shared.wake.notify_one();
            });
            drop(asked.await);
        }
        drop(member.gone.clone().wait_for(|gone| *gone).await);
    }
}

/// Blocks. Pins where a new group begins, then joins. What is shared comes first, and so is dropped first where nobody
/// takes the result: a consumer that is dropped is still told what it is assigned, and must not wait for anything then.
fn join(
    client: &Client,
    wanted: &Subscription,
    n_partitions: u32,
) -> Result<(Arc<Shared>, Arc<BaseConsumer<Context>>)> {
    let topic = &wanted.topic;
    let shared = Shared::new(topic.clone(), Hold::new(wanted), client.options.timeout);
    let context = Context(Arc::downgrade(&shared));
    let group = match &wanted.audience {
        Audience::Group(group) => group.as_str().to_owned(),
        Audience::Broadcast => format!("eventbus-broadcast-{}", crate::EventId::generate()),
    };
    let config = client.consumer_config(&group);
    if wanted.group_name().is_none() {
        let starts = starts(client, topic, n_partitions, &wanted.start)?;
        let consumer: BaseConsumer<Context> = config.create_with_context(context).map_err(from_kafka)?;
        consumer.assign(&starts).map_err(from_kafka)?;
        let all: Vec<u32> = (0..n_partitions).collect();
        shared.hold.lock().gain(&all, &BTreeMap::new());
        shared.is_in.store(true, Atomic::Release);
        return Ok((shared, Arc::new(consumer)));
    }
    let starts = begin(client, &config, topic, n_partitions, &wanted.start)?;
    let of = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
        Some((element.partition().unsigned_abs(), element.offset().to_raw()?))
    };
    shared.set_starts(starts.elements().iter().filter_map(of));
    let consumer: BaseConsumer<Context> = config.create_with_context(context).map_err(from_kafka)?;
    consumer.subscribe(&[topic.as_str()]).map_err(from_kafka)?;
    Ok((shared, Arc::new(consumer)))
}

/// Commits where a group begins in partitions that it has no position in, so that what is published from now on is
/// not missed, whenever the group gets to it. A group with members refuses that: they do it. Returns the starts.
fn begin(
    client: &Client,
    config: &rdkafka::ClientConfig,
    topic: &Topic,
    n_partitions: u32,
    start: &Start,
) -> Result<TopicPartitionList> {
    let outside: BaseConsumer = config.clone().remove("group.instance.id").create().map_err(from_kafka)?;
    let mut asked = TopicPartitionList::new();
    asked.add_partition_range(topic.as_str(), 0, n_partitions as i32 - 1);
    let known = outside.committed_offsets(asked, client.options.timeout).map_err(from_kafka)?;
    let is_new = |partition: i32| {
        let found = known.find_partition(topic.as_str(), partition);
        // An error of one partition is not "no position": it is left to the assignment.
        found.is_some_and(|found| found.error().is_ok() && !matches!(found.offset(), KafkaOffset::Offset(_)))
    };
    let starts = starts(client, topic, n_partitions, start)?;
    let mut begins = TopicPartitionList::new();
    for element in starts.elements().iter().filter(|element| is_new(element.partition())) {
        begins
            .add_partition_offset(topic.as_str(), element.partition(), element.offset())
            .map_err(from_kafka)?;
    }
    if begins.count() == 0 {
        return Ok(starts);
    }
    match outside.commit(&begins, CommitMode::Sync) {
        Ok(()) => Ok(starts),
        Err(error)
            if matches!(
                error.rdkafka_error_code(),
                Some(Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress)
            ) =>
        {
            Ok(starts)
        }
        Err(error) => Err(from_kafka(error)),
    }
}

/// The offset in each partition that a start means.
fn starts(client: &Client, topic: &Topic, n_partitions: u32, start: &Start) -> Result<TopicPartitionList> {
    let wanted = |partition: u32| match start {
        Start::Latest => KafkaOffset::End,
        Start::Earliest => KafkaOffset::Beginning,
        Start::Offsets(offsets) => offsets
            .get(&PartitionId(partition))
            .map_or(KafkaOffset::Beginning, |offset| KafkaOffset::Offset(offset.0 as i64)),
        Start::Time(time) => KafkaOffset::Offset(super::admin::millis(*time)),
    };
    match start {
        Start::Time(_) => {
            let asked = (0..n_partitions).map(|partition| (partition, wanted(partition)));
            let (times, ends) = (client.list(topic, asked)?, client.list(topic, client.ends(n_partitions))?);
            let mut starts = TopicPartitionList::new();
            for ((partition, found), (_, end)) in times.into_iter().zip(ends) {
                starts
                    .add_partition_offset(
                        topic.as_str(),
                        partition as i32,
                        KafkaOffset::Offset(found.unwrap_or(end.unwrap_or(0)) as i64),
                    )
                    .map_err(from_kafka)?;
            }
            Ok(starts)
        }
        _ => {
            let (lows, ends) = (
                client.list(topic, client.beginnings(n_partitions))?,
                client.list(topic, client.ends(n_partitions))?,
            );
            let mut starts = TopicPartitionList::new();
            for ((partition, low), (_, end)) in lows.into_iter().zip(ends) {
                let (low, end) = (low.unwrap_or(0), end.unwrap_or(0));
                let at = match wanted(partition) {
                    KafkaOffset::End => end,
                    KafkaOffset::Offset(offset) => offset.unsigned_abs().clamp(low, end),
                    _ => low,
                };
                starts
                    .add_partition_offset(topic.as_str(), partition as i32, KafkaOffset::Offset(at as i64))
                    .map_err(from_kafka)?;
            }
            Ok(starts)
        }
    }
}

impl Member {
    fn open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("consumer")) } else { self.client.is_open() }
    }

    /// Waits until the group took the member in. A group that takes long is no failure: positions are pinned.
    async fn is_in(&self) {
        let end = Instant::now() + self.client.options.timeout;
        while !self.shared.is_in.load(Atomic::Acquire) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn look(&self, max: NonZeroUsize) -> Result<Option<Polled>> {
        let told = self.shared.hold.lock().look(max.get(), Instant::now());
        self.shared.room.notify_one();
        told
    }

    /// Commits what is settled, on a task that a caller who goes away does not end.
    async fn commit(self: &Arc<Self>, turn: OwnedMutexGuard<()>) -> Result<()> {
        let floors = self.shared.hold.lock().floors();
        if floors.is_empty() || self.subscription.group_name().is_none() {
            return Ok(());
        }
        let member = self.clone();
        let committing = tokio::spawn(async move {
            let begun = Instant::now();
            loop {
                // What is not ours any more is not committed.
                let floors: Vec<Floor> = {
                    let hold = member.shared.hold.lock();
                    floors.iter().copied().filter(|floor| hold.owns(floor.partition, floor.epoch)).collect()
                };
                let mut positions = TopicPartitionList::new();
                for Floor { partition, floor, .. } in &floors {
                    let (name, at) = (member.subscription.topic.as_str(), KafkaOffset::Offset(*floor as i64));
                    positions.add_partition_offset(name, *partition as i32, at).map_err(from_kafka)?;
                }
                if floors.is_empty() {
                    break;
                }
                let Some(consumer) = member.consumer.lock().clone() else {
                    return Err(Error::closed("consumer"));
                };
                let commit = move || consumer.commit(&positions, CommitMode::Sync);
                match tokio::task::spawn_blocking(commit).await.map_err(interrupted)? {
                    Ok(()) => {
                        member.shared.hold.lock().committed(&floors);
                        break;
                    }
                    // The group is changing: it is over soon, or the partitions are lost.
                    Err(error)
                        if from_kafka(error.clone()).is_retryable() && begun.elapsed() < patience(&error) =>
                    {
                        tokio::time::sleep(COMMIT_AGAIN).await;
                    }
                    Err(error)
                        if matches!(
                            error.rdkafka_error_code(),
                            Some(Code::UnknownMemberId | Code::FencedInstanceId)
                        ) =>
                    {
                        let gone: Vec<u32> = floors.iter().map(|floor| floor.partition).collect();
                        member.shared.hold.lock().lose(&gone);
                        member.shared.wake.notify_one();
                        break;
                    }
                    Err(error) => return Err(from_kafka(error)),
                }
            }
            drop(turn);
            Ok(())
        });
        committing.await.map_err(interrupted)?
    }
}

/// How long a commit that failed is tried again.
fn patience(error: &KafkaError) -> Duration {
    match error.rdkafka_error_code() {
        Some(Code::IllegalGeneration | Code::RebalanceInProgress) => CHANGE_WITHIN,
        _ => COMMIT_WITHIN,
    }
}

#[async_trait]
impl Consumer for KafkaConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let _one_at_a_time = self.polling.lock().await;
        let member = &*self.member;
        loop {
            let woken = member.shared.wake.notified();
            if member.open().is_err() {
                return Ok(Polled::Closed);
            }
            if let Some(polled) = member.look(max)? {
                return Ok(polled);
            }
            let wake_at = member.shared.hold.lock().wake_at();
            match wake_at {
                None => woken.await,
                Some(at) => drop(tokio::time::timeout_at(at, woken).await),
            }
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        self.member.open()?;
        let mut lost = self.member.shared.hold.lock().settle(outcomes, Instant::now());
        // A retry may be due at once, and the window has room.
        self.member.shared.wake.notify_one();
        // Those who wait for their turn share a commit: the first takes what all of them settled.
        let turn = self.member.saving.clone().lock_owned().await;
        self.member.open()?;
        self.member.commit(turn).await?;
        let hold = self.member.shared.hold.lock();
        for (token, _) in outcomes {
            let Place { partition, epoch, .. } = Place::of(*token);
            if !hold.owns(partition.0, epoch) && !lost.contains(token) {
                lost.push(*token);
            }
        }
        drop(hold);
        Ok(Settled { lost })
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        let turn = self.member.saving.clone().lock_owned().await;
        self.member.open()?;
        self.member.commit(turn).await?;
        let mut hold = self.member.shared.hold.lock();
        partitions.iter().for_each(|partition| _ = hold.forget(partition.0));
        Ok(())
    }

    async fn renew(&self, _tokens: &[Token], _lease: Duration) -> Result<Settled> {
        Err(Error::new(
            ErrorKind::Unsupported,
            "Kafka has no leases: a delivery is ours while its partition is",
        ))
    }

    async fn close(&self, deadline: StdInstant) -> Result<()> {
        match tokio::time::timeout_at(Instant::from_std(deadline), self.leave()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "the broker did not take the leave in time")),
        }
    }
}

impl Drop for KafkaConsumer {
    fn drop(&mut self) {
        self.member.closed.store(true, Atomic::Release);
        self.member.shared.is_closing.store(true, Atomic::Release);
    }
}

impl fmt::Debug for KafkaConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaConsumer")
            .field("topic", &self.member.subscription.topic)
            .field("audience", &self.member.subscription.audience)
            .finish_non_exhaustive()
    }
}
