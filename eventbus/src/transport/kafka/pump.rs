//! The thread of one member: it polls all the time, so that the group never takes the member for dead, reads ahead up
//! to a bound, and gives partitions up when they are drained.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant as StdInstant};

use parking_lot::Mutex;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::client::{from_kafka, missing};
use super::hold::{Hold, News};
use super::record;
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;

/// What is read ahead at most; reading goes on at half of it.
const MAX_AHEAD: usize = 4096;
const MAX_BYTES_AHEAD: usize = 16 << 20;
/// Longest wait for an event, and so for a partition to be given up.
const WAIT: Duration = Duration::from_millis(25);
/// How often an unreachable cluster is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// What the pump and the consumer share.
pub(super) struct Shared {
    pub(super) topic: Topic,
    pub(super) hold: Mutex<Hold>,
    pub(super) wake: Notify,
    /// Partitions that should move, and when they are taken at the latest.
    leaving: Mutex<BTreeMap<u32, Instant>>,
    /// Whether the member goes: then nothing is drained.
    pub(super) is_closing: AtomicBool,
    /// Whether it was assigned something, be it nothing, and that is settled.
    pub(super) is_in: AtomicBool,
    /// Where the group begins in partitions that it has no position in, as it was when this member subscribed.
    starts: Mutex<BTreeMap<u32, i64>>,
    /// Positions in which the group begins with this member: to be committed.
    begun: Mutex<Option<TopicPartitionList>>,
    timeout: Duration,
}

impl Shared {
    pub(super) fn new(topic: Topic, hold: Hold, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            topic,
            hold: Mutex::new(hold),
            wake: Notify::new(),
            leaving: Mutex::default(),
            is_closing: AtomicBool::new(false),
            is_in: AtomicBool::new(false),
            starts: Mutex::default(),
            begun: Mutex::default(),
            timeout,
        })
    }

    pub(super) fn set_starts(&self, starts: impl Iterator<Item = (u32, i64)>) {
        *self.starts.lock() = starts.collect();
    }

    /// Gives partitions that the group has no position in the one that was the start when this member subscribed:
    /// a group that has members through another topic takes no position from outside. Returns those.
    fn pin(
        &self,
        consumer: &BaseConsumer<Context>,
        tpl: &mut TopicPartitionList,
    ) -> Result<TopicPartitionList> {
        let mut begun = TopicPartitionList::new();
        if tpl.count() == 0 {
            return Ok(begun);
        }
        let known = consumer.committed_offsets(tpl.clone(), self.timeout).map_err(from_kafka)?;
        let starts = self.starts.lock();
        for element in known.elements() {
            if matches!(element.offset(), KafkaOffset::Offset(_)) {
                continue;
            }
            let (partition, topic) = (element.partition(), self.topic.as_str());
            let Some(start) = starts.get(&partition.unsigned_abs()) else { continue };
            let start = KafkaOffset::Offset(*start);
            tpl.set_partition_offset(topic, partition, start).map_err(from_kafka)?;
            begun.add_partition_offset(topic, partition, start).map_err(from_kafka)?;
        }
        Ok(begun)
    }

    /// Commits where the group begins; then the member is in.
    fn begin(&self, consumer: &BaseConsumer<Context>) {
        let Some(begun) = self.begun.lock().take() else { return };
        if begun.count() > 0
            && let Err(error) = consumer.commit(&begun, CommitMode::Sync)
        {
            // The group is changing: the next assignment, or the next turn, does it.
            tracing::debug!(%error, topic = %self.topic, "where a group begins could not be committed yet");
            let mut next = self.begun.lock();
            if next.is_none() && !consumer.assignment_lost() {
                *next = Some(begun);
            }
            return;
        }
        self.is_in.store(true, Atomic::Release);
    }

    fn fail(&self, error: Error) {
        self.hold.lock().news.push_back(News::Failed(error));
        self.wake.notify_one();
    }
}

/// Hears what the group decides.
pub(super) struct Context(pub(super) Weak<Shared>);

impl ClientContext for Context {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
    }
}

fn numbers(partitions: &TopicPartitionList) -> Vec<u32> {
    partitions.elements().iter().map(|element| element.partition().unsigned_abs()).collect()
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, tpl: &mut TopicPartitionList) {
        let Some(shared) = self.0.upgrade() else { return unassign(consumer, tpl) };
        let partitions = numbers(tpl);
        match error {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                let begun = match shared.pin(consumer, tpl) {
                    Ok(begun) => begun,
                    Err(error) => return shared.fail(error),
                };
                let assigned = match consumer.rebalance_protocol() {
                    RebalanceProtocol::Cooperative => consumer.incremental_assign(tpl),
                    _ => consumer.assign(tpl),
                };
                match assigned {
                    Ok(()) => shared.hold.lock().gain(&partitions),
                    Err(error) => return shared.fail(from_kafka(error)),
                }
                *shared.begun.lock() = Some(begun);
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => {
                if shared.is_closing.load(Atomic::Acquire) || consumer.assignment_lost() {
                    shared.hold.lock().lose(&partitions);
                    unassign(consumer, tpl);
                } else {
                    // Only reported: the client waits until they are given up, and polling goes on.
                    let deadline = shared.hold.lock().revoke(&partitions);
                    shared
                        .leaving
                        .lock()
                        .extend(partitions.into_iter().map(|partition| (partition, deadline)));
                }
            }
            _ => {
                shared.hold.lock().lose(&partitions);
                unassign(consumer, tpl);
            }
        }
        shared.wake.notify_one();
    }
}

fn unassign(consumer: &BaseConsumer<Context>, partitions: &TopicPartitionList) {
    let unassigned = match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions),
        _ => consumer.unassign(),
    };
    if let Err(error) = unassigned {
        tracing::warn!(%error, "partitions could not be given up");
    }
}

/// Polls until the member goes, then leaves the group.
pub(super) fn run(consumer: &Arc<BaseConsumer<Context>>, shared: &Arc<Shared>) {
    let mut is_paused = false;
    let mut reported: Option<StdInstant> = None;
    while !shared.is_closing.load(Atomic::Acquire) {
        match consumer.poll(WAIT) {
            None => {}
            Some(Ok(message)) => {
                let stored = record::stored(&message);
                shared.hold.lock().read(message.partition().unsigned_abs(), stored);
                drop(message);
                shared.wake.notify_one();
            }
            Some(Err(error)) => react(consumer, shared, error, &mut reported),
        }
        shared.begin(consumer);
        give_up_drained(consumer, shared);
        let (n_ahead, bytes_ahead) = {
            let hold = shared.hold.lock();
            (hold.n_ahead, hold.bytes_ahead)
        };
        let is_full = n_ahead >= MAX_AHEAD || bytes_ahead >= MAX_BYTES_AHEAD;
        let has_room = n_ahead < MAX_AHEAD / 2 && bytes_ahead < MAX_BYTES_AHEAD / 2;
        if (is_full && !is_paused) || (has_room && is_paused) {
            is_paused = is_full;
            let all = consumer.assignment();
            let changed =
                all.and_then(|all| if is_full { consumer.pause(&all) } else { consumer.resume(&all) });
            if let Err(error) = changed {
                tracing::debug!(%error, "reading ahead could not be paused or resumed");
            }
        }
    }
    // What the client waits for would keep it from leaving.
    let leaving = std::mem::take(&mut *shared.leaving.lock());
    if !leaving.is_empty() {
        give_up(consumer, shared, leaving.keys());
    }
    consumer.unsubscribe();
}

fn give_up<'a>(consumer: &BaseConsumer<Context>, shared: &Shared, leaving: impl Iterator<Item = &'a u32>) {
    let mut partitions = TopicPartitionList::new();
    for partition in leaving {
        partitions.add_partition(shared.topic.as_str(), *partition as i32);
    }
    unassign(consumer, &partitions);
}

/// Hands back partitions that should move and that nothing of is in hand, or whose time is over.
fn give_up_drained(consumer: &BaseConsumer<Context>, shared: &Shared) {
    let mut leaving = shared.leaving.lock();
    if leaving.is_empty() {
        return;
    }
    let now = Instant::now();
    let mut hold = shared.hold.lock();
    let late: Vec<u32> =
        leaving.iter().filter(|(_, end)| **end <= now).map(|(partition, _)| *partition).collect();
    hold.lose(&late);
    // The client takes what it asked for back at once, not in parts.
    if leaving.keys().any(|partition| hold.owns_any(*partition)) {
        return;
    }
    drop(hold);
    let given_up = std::mem::take(&mut *leaving);
    drop(leaving);
    give_up(consumer, shared, given_up.keys());
    shared.wake.notify_one();
}

fn react(
    consumer: &BaseConsumer<Context>,
    shared: &Shared,
    error: KafkaError,
    reported: &mut Option<StdInstant>,
) {
    match error.rdkafka_error_code() {
        Some(Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition) => {
            shared.fail(missing(&shared.topic));
        }
        Some(Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::NoOffset) => pass_hole(consumer, shared),
        _ => {
            let error = from_kafka(error);
            let is_due = reported.is_none_or(|last| last.elapsed() >= REPORT_EVERY);
            if !error.is_retryable() || is_due {
                *reported = Some(StdInstant::now());
                shared.fail(error.with("topic", &shared.topic));
            }
        }
    }
}

/// Finds the partitions whose events were removed unread, says so, and reads on behind the hole.
fn pass_hole(consumer: &BaseConsumer<Context>, shared: &Shared) {
    let topic = shared.topic.as_str();
    let positions = shared.hold.lock().positions();
    for (partition, next) in positions {
        let number = partition as i32;
        let Ok((low, _)) = consumer.fetch_watermarks(topic, number, shared.timeout) else { continue };
        let expected = match next {
            Some(next) => Some(next),
            None => {
                let mut asked = TopicPartitionList::new();
                asked.add_partition(topic, number);
                let committed = consumer.committed_offsets(asked, shared.timeout).ok();
                committed.and_then(|found| match found.find_partition(topic, number)?.offset() {
                    KafkaOffset::Offset(offset) => Some(offset.unsigned_abs()),
                    _ => None,
                })
            }
        };
        let (first, Some(expected)) = (low.unsigned_abs(), expected) else { continue };
        if expected >= first {
            continue;
        }
        if let Err(error) = read_from(consumer, topic, number, low) {
            shared.fail(error.with("topic", topic).with("partition", partition));
            continue;
        }
        let kind = ErrorKind::DataLoss { expected: Offset(expected), first: Offset(first) };
        let error = Error::new(kind, "events were removed before this group read them")
            .with("topic", topic)
            .with("partition", partition);
        shared.hold.lock().jump(partition, first, error);
        shared.wake.notify_one();
    }
}

/// Reads a partition on from an offset. Not by seeking: the client refuses that where it had no position.
fn read_from(consumer: &BaseConsumer<Context>, topic: &str, partition: i32, offset: i64) -> Result<()> {
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, partition, KafkaOffset::Offset(offset)).map_err(from_kafka)?;
    consumer.incremental_unassign(&place).map_err(from_kafka)?;
    consumer.incremental_assign(&place).map_err(from_kafka)
}
