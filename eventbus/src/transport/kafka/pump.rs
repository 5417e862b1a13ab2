//! The thread of one member: it polls all the time, so that the group never takes the member for dead, reads ahead up
//! to a bound, and gives partitions up when they are drained.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant as StdInstant};

use parking_lot::{Condvar, Mutex};
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::client::{from_kafka, missing};
use super::hold::Hold;
use super::record;
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;

/// What is read ahead at most; reading goes on at half of it.
const MAX_AHEAD: usize = 4096;
const MAX_BYTES_AHEAD: usize = 16 << 20;
/// What is taken from the client before the consumer hears of it.
const MAX_READ: usize = 64;
/// How long reading waits for room before the client is told to pause. To pause drops what the client fetched, and to
/// go on takes it a tenth of a second until events come again, at times a whole one: too dear for a queue that is full
/// for a moment. Not longer, as the client fetches on meanwhile, and nothing is polled, so that a change in the group
/// waits as long.
const PAUSE_AFTER: Duration = Duration::from_millis(100);
/// Longest wait for an event while something else is to be done soon: the member is not in yet, or partitions are to be
/// given up when they are drained.
const WAIT: Duration = Duration::from_millis(25);
/// The same at rest, and so the longest time until a member that goes is gone.
const WAIT_AT_REST: Duration = Duration::from_millis(100);
/// When a look at a group's positions that failed is tried again.
const PIN_AGAIN: Duration = Duration::from_millis(100);
/// When a hole that could not be passed is looked at again.
const HOLE_AGAIN: Duration = Duration::from_millis(500);
/// How often an unreachable cluster is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// What the pump and the consumer share.
pub(super) struct Shared {
    pub(super) topic: Topic,
    pub(super) hold: Mutex<Hold>,
    pub(super) wake: Notify,
    /// Tells the pump that something was taken from the hold.
    pub(super) room: Condvar,
    /// Partitions that should move, and when they are taken at the latest.
    leaving: Mutex<BTreeMap<u32, Instant>>,
    /// Whether the member goes: then nothing is drained.
    pub(super) is_closing: AtomicBool,
    /// Whether it was assigned something, be it nothing, and that is settled.
    pub(super) is_in: AtomicBool,
    /// Where the group begins in partitions that it has no position in, as it was when this member subscribed.
    starts: Mutex<BTreeMap<u32, i64>>,
    /// Whether there was an assignment, be it of nothing.
    is_assigned: AtomicBool,
    /// Whether partitions came that do not know whether reading is paused.
    is_changed: AtomicBool,
    timeout: Duration,
}

impl Shared {
    pub(super) fn new(topic: Topic, hold: Hold, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            topic,
            hold: Mutex::new(hold),
            wake: Notify::new(),
            room: Condvar::new(),
            leaving: Mutex::default(),
            is_closing: AtomicBool::new(false),
            is_in: AtomicBool::new(false),
            starts: Mutex::default(),
            is_assigned: AtomicBool::new(false),
            is_changed: AtomicBool::new(false),
            timeout,
        })
    }

    pub(super) fn set_starts(&self, starts: impl Iterator<Item = (u32, i64)>) {
        *self.starts.lock() = starts.collect();
    }

    /// Gives partitions that the group has no position in the one that was the start when this member subscribed:
    /// a group that has members through another topic takes no position from outside. Partitions that were added
    /// since begin at their beginning. Returns those starts.
    fn pin(
        &self,
        consumer: &BaseConsumer<Context>,
        tpl: &mut TopicPartitionList,
    ) -> Result<BTreeMap<u32, i64>> {
        let mut begun = BTreeMap::new();
        if tpl.count() == 0 {
            return Ok(begun);
        }
        let known = consumer.committed_offsets(tpl.clone(), self.timeout).map_err(from_kafka)?;
        let starts = self.starts.lock();
        for element in known.elements() {
            element.error().map_err(from_kafka)?;
            if matches!(element.offset(), KafkaOffset::Offset(_)) {
                continue;
            }
            let partition = element.partition();
            let start = starts.get(&partition.unsigned_abs()).copied().unwrap_or(0);
            tpl.set_partition_offset(self.topic.as_str(), partition, KafkaOffset::Offset(start))
                .map_err(from_kafka)?;
            begun.insert(partition.unsigned_abs(), start);
        }
        Ok(begun)
    }

    /// Pins until that is done, or the member goes: the client waits for the answer to an assignment, and asks
    /// only once.
    fn pin_at_last(
        &self,
        consumer: &BaseConsumer<Context>,
        tpl: &mut TopicPartitionList,
    ) -> BTreeMap<u32, i64> {
        let mut is_reported = false;
        loop {
            match self.pin(consumer, tpl) {
                Ok(begun) => return begun,
                Err(_) if self.is_closing.load(Atomic::Acquire) => return BTreeMap::new(),
                Err(error) if !is_reported => {
                    is_reported = true;
                    self.fail(error.with("topic", &self.topic));
                }
                Err(_) => {}
            }
            std::thread::sleep(PIN_AGAIN);
        }
    }

    /// Commits where the group begins in partitions of ours; then the member is in.
    fn begin(&self, consumer: &BaseConsumer<Context>) {
        let starts = self.hold.lock().starts();
        if !starts.is_empty() {
            if let Err(error) = self.commit_starts(consumer, &starts) {
                // The group is changing: the next turn does it, if the partitions are ours then.
                tracing::debug!(%error, topic = %self.topic, "where a group begins could not be committed yet");
                return;
            }
            self.hold.lock().begun(&starts);
            self.wake.notify_one();
        }
        if self.is_assigned.load(Atomic::Acquire) {
            self.is_in.store(true, Atomic::Release);
        }
    }

    fn commit_starts(&self, consumer: &BaseConsumer<Context>, starts: &[(u32, i64)]) -> KafkaResult<()> {
        let mut positions = TopicPartitionList::with_capacity(starts.len());
        for (partition, start) in starts {
            let at = KafkaOffset::Offset(*start);
            positions.add_partition_offset(self.topic.as_str(), *partition as i32, at)?;
        }
        consumer.commit(&positions, CommitMode::Sync)
    }

    fn fail(&self, error: Error) {
        let mut hold = self.hold.lock();
        // The client says only once what will not pass.
        if error.is_retryable() {
            hold.fail(error)
        } else {
            hold.tell(error)
        }
        drop(hold);
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
            // Nothing is taken any more; the client waits for an answer all the same.
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS
                if shared.is_closing.load(Atomic::Acquire) =>
            {
                return unassign(consumer, tpl);
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                let begun = shared.pin_at_last(consumer, tpl);
                let assigned = match consumer.rebalance_protocol() {
                    RebalanceProtocol::Cooperative => consumer.incremental_assign(tpl),
                    _ => consumer.assign(tpl),
                };
                if let Err(error) = assigned {
                    // The client waits for an answer, whatever it is.
                    unassign(consumer, tpl);
                    return shared.fail(from_kafka(error));
                }
                shared.hold.lock().gain(&partitions, &begun);
                shared.is_assigned.store(true, Atomic::Release);
                shared.is_changed.store(true, Atomic::Release);
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
    let (mut paused, mut hole) = (Paused::default(), None::<StdInstant>);
    let mut reported: Option<StdInstant> = None;
    while !shared.is_closing.load(Atomic::Acquire) {
        let has_room = paused.has_room(shared);
        paused.keep(consumer, shared);
        // Partitions that are told to pause bring nothing, and whether there is room is to be seen soon.
        let is_at_rest =
            !paused.is_on && shared.is_in.load(Atomic::Acquire) && shared.leaving.lock().is_empty();
        let wait = if is_at_rest { WAIT_AT_REST } else { WAIT };
        if has_room && read(consumer, shared, wait, &mut reported) {
            hole = hole.or_else(|| Some(StdInstant::now()));
        }
        shared.begin(consumer);
        give_up_drained(consumer, shared);
        // Not while the client waits for partitions to be given up: it would take this for the answer.
        if hole.is_some_and(|due| due <= StdInstant::now()) && shared.leaving.lock().is_empty() {
            hole = (!pass_holes(consumer, shared)).then(|| StdInstant::now() + HOLE_AGAIN);
        }
    }
    // What the client waits for would keep it from leaving.
    let leaving = std::mem::take(&mut *shared.leaving.lock());
    if !leaving.is_empty() {
        give_up(consumer, shared, leaving.keys());
    }
    consumer.unsubscribe();
}

/// Waits for an event, and takes those that are there with it; the consumer is woken once for all of them. True if a
/// partition has no position to be read from.
fn read(
    consumer: &BaseConsumer<Context>,
    shared: &Shared,
    mut wait: Duration,
    reported: &mut Option<StdInstant>,
) -> bool {
    let mut n_read = 0;
    let mut has_hole = false;
    while n_read < MAX_READ {
        match consumer.poll(std::mem::take(&mut wait)) {
            None => break,
            Some(Ok(message)) => {
                let stored = record::stored(&message);
                let mut hold = shared.hold.lock();
                hold.read(message.partition().unsigned_abs(), stored);
                n_read += 1;
                if is_full(&hold) {
                    break;
                }
            }
            Some(Err(error)) => {
                has_hole = react(shared, error, reported);
                break;
            }
        }
    }
    if n_read > 0 {
        shared.wake.notify_one();
    }
    has_hole
}

/// Whether reading pauses, and the partitions that were told so: the client keeps that for each, also while it is away.
#[derive(Default)]
struct Paused {
    is_on: bool,
    /// Since when enough is read ahead; reading goes on when half of it is gone.
    full: Option<StdInstant>,
    partitions: BTreeSet<i32>,
}

impl Paused {
    /// Whether the client may be asked for more: it is told to pause, and so has none, or there is room. Waits a little
    /// for that.
    fn has_room(&mut self, shared: &Shared) -> bool {
        let mut hold = shared.hold.lock();
        if self.full.is_some() && !self.is_on && !is_half_empty(&hold) {
            shared.room.wait_for(&mut hold, WAIT);
        }
        self.full = match self.full {
            None => is_full(&hold).then(StdInstant::now),
            Some(_) if is_half_empty(&hold) => None,
            since => since,
        };
        self.is_on || self.full.is_none()
    }

    /// Pauses when there was no room for long, and goes on when there is; tells those that do not know.
    fn keep(&mut self, consumer: &BaseConsumer<Context>, shared: &Shared) {
        let is_on = self.full.is_some_and(|since| since.elapsed() >= PAUSE_AFTER);
        let is_changed = shared.is_changed.swap(false, Atomic::AcqRel);
        if is_on == self.is_on && !is_changed {
            return;
        }
        self.is_on = is_on;
        if let Err(error) = self.tell(consumer, shared.topic.as_str()) {
            shared.is_changed.store(true, Atomic::Release);
            tracing::debug!(%error, "reading ahead could not be paused or resumed; trying again");
        }
    }

    /// Not those that know: to resume one that has no position yet would ask the client to find one.
    fn tell(&mut self, consumer: &BaseConsumer<Context>, topic: &str) -> KafkaResult<()> {
        let assigned = consumer.assignment()?;
        let told: Vec<i32> = assigned
            .elements_for_topic(topic)
            .iter()
            .map(|element| element.partition())
            .filter(|partition| self.partitions.contains(partition) != self.is_on)
            .collect();
        if told.is_empty() {
            return Ok(());
        }
        let mut list = TopicPartitionList::with_capacity(told.len());
        for partition in &told {
            list.add_partition(topic, *partition);
        }
        if self.is_on {
            consumer.pause(&list)?;
            self.partitions.extend(told);
        } else {
            consumer.resume(&list)?;
            self.partitions.retain(|partition| !told.contains(partition));
        }
        Ok(())
    }
}

fn is_full(hold: &Hold) -> bool {
    hold.n_ahead >= MAX_AHEAD || hold.bytes_ahead >= MAX_BYTES_AHEAD
}

fn is_half_empty(hold: &Hold) -> bool {
    hold.n_ahead < MAX_AHEAD / 2 && hold.bytes_ahead < MAX_BYTES_AHEAD / 2
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

/// Reports an error; true if a partition has no position to be read from, and so is not read.
fn react(shared: &Shared, error: KafkaError, reported: &mut Option<StdInstant>) -> bool {
    match error.rdkafka_error_code() {
        Some(Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition) => {
            shared.fail(missing(&shared.topic));
            false
        }
        // Said once for a partition: what is not mended now is mended in a later turn.
        Some(Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::NoOffset | Code::LogTruncation) => true,
        _ => {
            let error = from_kafka(error);
            let is_due = reported.is_none_or(|last| last.elapsed() >= REPORT_EVERY);
            if !error.is_retryable() || is_due {
                *reported = Some(StdInstant::now());
                shared.fail(error.with("topic", &shared.topic));
            }
            false
        }
    }
}

/// Looks at every partition of ours, and reads those on whose position is not in the log any more. False if it is to
/// be repeated: at the first that gives no answer, as the others would wait as long.
fn pass_holes(consumer: &BaseConsumer<Context>, shared: &Shared) -> bool {
    let positions = shared.hold.lock().positions();
    for (partition, next) in positions {
        match pass_hole(consumer, shared, partition, next) {
            Ok(()) => {}
            // Polling says that too.
            Err(error) if error.kind() == ErrorKind::NotFound => return true,
            Err(error) => {
                tracing::debug!(%error, partition, "a hole could not be passed yet");
                return false;
            }
        }
    }
    true
}

/// Reads a partition on if its next position lies outside of the log, and says what that means.
fn pass_hole(
    consumer: &BaseConsumer<Context>,
    shared: &Shared,
    partition: u32,
    next: Option<u64>,
) -> Result<()> {
    let (topic, number) = (shared.topic.as_str(), partition as i32);
    let (low, high) = consumer.fetch_watermarks(topic, number, shared.timeout).map_err(from_kafka)?;
    let committed = || -> Result<Option<u64>> {
        let mut asked = TopicPartitionList::new();
        asked.add_partition(topic, number);
        let found = consumer.committed_offsets(asked, shared.timeout).map_err(from_kafka)?;
        Ok(found.find_partition(topic, number).and_then(|element| match element.offset() {
            KafkaOffset::Offset(offset) => Some(offset.unsigned_abs()),
            _ => None,
        }))
    };
    let start = || shared.starts.lock().get(&partition).map(|start| start.unsigned_abs());
    let expected = match next {
        Some(next) => Some(next),
        None => committed()?.or_else(start),
    };
    let (first, end) = (low.unsigned_abs(), high.unsigned_abs());
    match expected {
        Some(expected) if (first..=end).contains(&expected) => Ok(()),
        // There never was a position: nothing is lost.
        None => read_from(consumer, topic, number, low),
        Some(expected) if expected < first => {
            read_from(consumer, topic, number, low)?;
            let kind = ErrorKind::DataLoss { expected: Offset(expected), first: Offset(first) };
            let error = Error::new(kind, "events were removed before this group read them")
                .with("topic", topic)
                .with("partition", partition);
            shared.hold.lock().jump(partition, first, error);
            shared.wake.notify_one();
            Ok(())
        }
        Some(expected) => {
            read_from(consumer, topic, number, high)?;
            let mut hold = shared.hold.lock();
            hold.lose(&[partition]);
            hold.gain(&[partition], &BTreeMap::new());
            hold.tell(
                Error::new(
                    ErrorKind::Corrupt,
                    "the log ends before the group's position: it was cut, or is another",
                )
                .with("topic", topic)
                .with("partition", partition)
                .with("position", expected)
                .with("end", end),
            );
            drop(hold);
            shared.wake.notify_one();
            Ok(())
        }
    }
}

/// Reads a partition on from an offset. Not by seeking: the client refuses that where it had no position.
fn read_from(consumer: &BaseConsumer<Context>, topic: &str, partition: i32, offset: i64) -> Result<()> {
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, partition, KafkaOffset::Offset(offset)).map_err(from_kafka)?;
    consumer.incremental_unassign(&place).map_err(from_kafka)?;
    consumer.incremental_assign(&place).map_err(from_kafka)
}
