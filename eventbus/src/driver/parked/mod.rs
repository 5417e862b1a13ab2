//! Parking: events that wait durably, and the keys that wait behind them, in a log of their own.
//!
//! ```text
//!   source ──▶ lane ──fails──▶ Park (confirmed) ──▶ source settled
//!                ▲                  │
//!                └──── head, due ◀──┴── followers of its key, in the order of the source
//! ```
//! The log is the topic `<topic>.<group>.parked`, with as many partitions as the source; the owner of a
//! partition of the source owns the same one here. Its state is a fold of the log, so that whoever owns
//! the partition next begins where the last owner stood, whatever became of it. The low-water mark is the
//! position of the group in that topic.

mod bodies;
mod fold;
mod operator;
mod place;
pub(super) mod planted;
pub(super) mod record;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub(super) use self::fold::{Meets, Waiting};
pub use self::operator::{HeldKey, ParkedKeys};
use self::place::Log;
pub(super) use self::place::Place;
use self::record::Sequence;
use crate::admin::TopicSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Group, Topic};
use crate::parking::Parking;
use crate::partition::PartitionId;
use crate::subscription::{Start, Subscription};
use crate::transport::Transport;

/// Partitions that are taken over side by side.
const AT_ONCE: usize = 16;
/// How often the log is read for what others appended: operators, and owners that replaced us.
const READ_EVERY: Duration = Duration::from_millis(500);
/// Where nothing is parked, operators have nothing to say; an owner that replaced us is heard of later.
const READ_AT_REST: Duration = Duration::from_secs(2);

/// An event that finds no room asks again much sooner than this.
const FULL_FOR: Duration = Duration::from_secs(1);

/// The parking of one subscription.
pub(super) struct Parked {
    log: Arc<Log>,
    places: Mutex<HashMap<PartitionId, Arc<Place>>>,
    /// Rung when an event is to be parked.
    parks: Notify,
    /// Rung when a head may have become due, or room may have become free.
    changed: Notify,
    pub(super) parking: Parking,
    /// As many deliveries run with caution after an owner that did not leave by itself.
    window: usize,
    /// Events whose run was begun and never ended run alone: a process that ends with one names it.
    pub(super) suspects: tokio::sync::Mutex<()>,
    /// When an event last found no room.
    refused_at: Mutex<Option<Instant>>,
    fails: AtomicBool,
}

/// A parked key whose first event is due.
pub(super) struct Head {
    pub(super) place: Arc<Place>,
    pub(super) sequence: Sequence,
}

impl Parked {
    pub(super) async fn open(
        transport: &Arc<dyn Transport>,
        source: &Topic,
        group: &Group,
        parking: Parking,
        window: usize,
    ) -> Result<Self> {
        let topic = source.parked(group)?;
        let log = Log {
            publisher: transport.publisher().await?,
            transport: transport.clone(),
            topic: topic.clone(),
            group: group.clone(),
            source: source.clone(),
            bodies: bodies::Taken::default(),
        };
        let admin = log.admin()?;
        let Some(info) = admin.topic(source).await? else {
            return Err(Error::not_found("there is no such topic").with("topic", source));
        };
        let n_partitions = u32::try_from(info.partitions.len()).ok().and_then(std::num::NonZeroU32::new);
        let spec =
            TopicSpec::new(topic.clone()).with_partitions(n_partitions.unwrap_or(TopicSpec::PARTITIONS));
        admin.declare(&spec).await?;
        if admin.group(group, &topic).await?.is_empty() {
            // The group is the low-water mark, and keeps retention from passing it.
            let mark = Subscription::group(topic, group.clone()).with_start(Start::Earliest);
            let member = transport.subscribe(&mark).await?;
            member.close((Instant::now() + Duration::from_secs(10)).into_std()).await?;
        }
        Ok(Self {
            log: Arc::new(log),
            places: Mutex::default(),
            parks: Notify::new(),
            changed: Notify::new(),
            parking,
            window,
            suspects: tokio::sync::Mutex::default(),
            refused_at: Mutex::default(),
            fails: AtomicBool::new(false),
        })
    }

    /// Makes partitions ours that are not yet: their parked state is loaded when this returns.
    pub(super) async fn gain(&self, partitions: &[PartitionId]) -> Result<()> {
        let ours = |partition: &PartitionId| match self.places.lock().get(partition) {
            Some(place) if !place.is_fenced() => {
                place.leave(false);
                true
            }
            _ => false,
        };
        let new: Vec<_> = partitions.iter().copied().filter(|partition| !ours(partition)).collect();
        let gained = if new.is_empty() { Ok(()) } else { self.take_over(&new).await };
        self.changed.notify_one();
        gained
    }

    async fn take_over(&self, partitions: &[PartitionId]) -> Result<()> {
        let admin = self.log.admin()?;
        let slots = place::slots(admin, &self.log.topic, partitions).await?;
        let lows = self.log.lows().await?;
        let (mut taken, mut outcome) = (Vec::with_capacity(slots.len()), Ok(()));
        let mut slots = slots.into_iter();
        while outcome.is_ok() && slots.len() > 0 {
            // Side by side: each waits for the broker a few times.
            let mut gaining = JoinSet::new();
            for (partition, slot) in slots.by_ref().take(AT_ONCE) {
                let low = lows.get(&partition).copied().unwrap_or(0);
                gaining.spawn(Place::gain(self.log.clone(), partition, slot, low));
            }
            while let Some(gained) = gaining.join_next().await {
                let interrupted =
                    |error| Error::new(ErrorKind::Unexpected, "a takeover was interrupted").caused_by(error);
                match gained.map_err(interrupted).flatten() {
                    Ok(place) => taken.push(place),
                    Err(error) => outcome = Err(error),
                }
            }
        }
        // Read after the takeovers: nobody parks what lies behind these ends any more but we.
        let ends = match admin.topic(&self.log.source).await {
            Ok(source) => source.map(|info| info.partitions).unwrap_or_default(),
            Err(error) => {
                // They are taken over again: not from somebody who did not leave by himself.
                for place in taken {
                    drop(place.release().await);
                }
                return Err(error);
            }
        };
        let mut places = self.places.lock();
        for place in taken {
            let end = ends.iter().find(|info| info.partition == place.partition).map(|info| info.next);
            place.begin(end, self.window);
            places.insert(place.partition, Arc::new(place));
        }
        outcome
    }

    /// Whether something of these partitions is still to be gained.
    pub(super) fn lacks(&self, mut partitions: impl Iterator<Item = PartitionId>) -> bool {
        let places = self.places.lock();
        partitions.any(|partition| places.get(&partition).is_none_or(|place| place.is_fenced()))
    }

    pub(super) fn place(&self, partition: PartitionId) -> Option<Arc<Place>> {
        self.places.lock().get(&partition).filter(|place| !place.is_fenced()).cloned()
    }

    /// Begins no more heads of partitions that move away.
    pub(super) fn leave(&self, partitions: &[PartitionId]) {
        let places = self.places.lock();
        partitions.iter().filter_map(|partition| places.get(partition)).for_each(|place| place.leave(true));
    }

    /// Whether no head of a partition runs.
    pub(super) fn is_idle(&self, partition: PartitionId) -> bool {
        self.places.lock().get(&partition).is_none_or(|place| place.is_idle())
    }

    /// Forgets partitions that are gone.
    pub(super) fn lose(&self, partitions: &[PartitionId]) {
        let mut places = self.places.lock();
        for place in partitions.iter().filter_map(|partition| places.remove(partition)) {
            place.leave(true);
        }
    }

    /// Says in the log that partitions were left with nothing begun, and forgets them.
    pub(super) async fn release(&self, partitions: &[PartitionId]) {
        for partition in partitions {
            let place = self.places.lock().remove(partition);
            let Some(place) = place else { continue };
            place.leave(true);
            if let Err(error) = place.release().await {
                tracing::warn!(%error, topic = %self.log.topic, %partition, "the next owner begins with caution");
            }
        }
    }

    /// Releases everything.
    pub(super) async fn close(&self) {
        let all: Vec<_> = self.places.lock().keys().copied().collect();
        self.release(&all).await;
    }

    /// Waits for a parked key whose first event is due.
    pub(super) async fn next_head(&self) -> Head {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let places: Vec<_> = self.places.lock().values().cloned().collect();
            for place in &places {
                if let Some(sequence) = place.take_due() {
                    return Head { place: place.clone(), sequence };
                }
            }
            match places.iter().filter_map(|place| place.due_at()).min() {
                Some(at) => drop(tokio::time::timeout_at(at, changed).await),
                None => changed.await,
            }
        }
    }

    /// Gives a head back: its key goes on when it is due again.
    pub(super) fn give_back(&self, head: &Head) {
        head.place.give_back(&head.sequence);
        self.changed.notify_one();
    }

    /// Says that a head may be due, or that there may be room.
    pub(super) fn ring(&self) {
        self.changed.notify_one();
    }

    /// Whether one more event of a sequence may be parked.
    pub(super) fn has_room(&self, place: &Place, sequence: &Sequence) -> bool {
        let room = match place.sizes(sequence) {
            (0, n_keys) => n_keys < self.parking.max_keys.get(),
            (n_events, _) => n_events < self.parking.max_per_key.get(),
        };
        self.parks.notify_one();
        if !room {
            *self.refused_at.lock() = Some(Instant::now());
        }
        room
    }

    /// Reads what others append, and rewrites logs that have become long.
    pub(super) async fn keep(&self) {
        let mut pause = READ_EVERY;
        loop {
            if pause > READ_EVERY && tokio::time::timeout(pause, self.parks.notified()).await.is_ok() {
                pause = READ_EVERY;
            }
            if pause == READ_EVERY {
                tokio::time::sleep(pause).await;
            }
            let kept = self.read_on().await;
            let is_at_rest = kept.is_ok() && self.counts() == (0, 0);
            pause = if is_at_rest { READ_AT_REST.min(pause * 3 / 2) } else { READ_EVERY };
            self.fails.store(kept.is_err(), Atomic::Relaxed);
            if let Err(error) = kept {
                tracing::warn!(%error, topic = %self.log.topic, "the parking log could not be read; trying again");
            }
        }
    }

    pub(super) async fn read_on(&self) -> Result<()> {
        let places: Vec<_> = self.places.lock().values().cloned().collect();
        let Some(info) = self.log.admin()?.topic(&self.log.topic).await? else {
            return Err(Error::not_found("the parking topic was deleted").with("topic", &self.log.topic));
        };
        let mut outcome = Ok(());
        for place in places {
            let behind = info
                .partitions
                .iter()
                .any(|info| info.partition == place.partition && info.next.0 > place.next());
            if behind {
                outcome = outcome.and(place.read_on().await);
            }
            if place.is_ours() && place.is_long(self.parking.sweep_after.get()) {
                match place.sweep().await {
                    // Somebody opens the group at this moment: the next round does it.
                    Err(error) if error.kind() == ErrorKind::Conflict => {}
                    swept => {
                        if swept.is_err() {
                            place.sweep_later();
                        }
                        outcome = outcome.and(swept);
                    }
                }
            }
        }
        self.changed.notify_one();
        outcome
    }

    /// Why the parking is not well, if it is not.
    pub(super) fn ails(&self) -> Option<&'static str> {
        if self.refused_at.lock().is_some_and(|at| at.elapsed() < FULL_FOR) {
            Some("as many events are parked as may be: their keys wait")
        } else if self.fails.load(Atomic::Relaxed) {
            Some("the parking log fails: trying again")
        } else {
            None
        }
    }

    /// Parked events that do not wait for an operator.
    pub(super) fn n_waiting(&self) -> u64 {
        self.places.lock().values().map(|place| place.n_waiting() as u64).sum()
    }

    /// Events that are parked, and sequences that wait for an operator.
    pub(super) fn counts(&self) -> (u64, u64) {
        let places = self.places.lock();
        places
            .values()
            .map(|place| place.counts())
            .fold((0, 0), |(parked, held), (p, h)| (parked + p as u64, held + h as u64))
    }
}
