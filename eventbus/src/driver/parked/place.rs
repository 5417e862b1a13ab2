//! One partition of the parking log, and its owner: takes over, appends, reads on, rewrites, releases.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Atomic};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::bodies::{Bodies, Taken};
use super::fold::{Fold, Meets, Now, Waiting};
use super::planted::{Bug, planted};
use super::record::{self, Parked, Record, Sequence};
use crate::admin::{Admin, Offset};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::name::{Group, Key, Topic};
use crate::partition::PartitionId;
use crate::transport::{Publisher, Transport};

/// Records that one read brings.
pub(super) const PAGE: usize = 512;
/// How often a log that should hold our Takeover is read again, and when.
const SHORT_READS: u32 = 100;
const SOON: Duration = Duration::from_millis(20);

/// Keys that are tried to reach every partition: as many as 4,096 partitions never need.
const MAX_TRIALS: u32 = 1_000_000;

/// Pause after a sweep that failed.
const SWEEP_PAUSE: Duration = Duration::from_secs(30);

/// The log of one subscription.
pub(super) struct Log {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) publisher: Arc<dyn Publisher>,
    /// `<topic>.<group>.parked`
    pub(super) topic: Topic,
    pub(super) group: Group,
    /// What is consumed.
    pub(super) source: Topic,
    pub(super) bodies: Taken,
}

impl Log {
    pub(super) fn admin(&self) -> Result<&dyn Admin> {
        self.transport.admin().ok_or_else(|| Error::new(ErrorKind::Unsupported, "parking needs an admin"))
    }

    /// The low-water mark of each partition: what lies below is ended, or copied above.
    pub(super) async fn lows(&self) -> Result<BTreeMap<PartitionId, u64>> {
        let of_us = self.admin()?.group(&self.group, &self.topic).await?;
        Ok(of_us.into_iter().map(|info| (info.partition, info.settled.0)).collect())
    }

    /// Appends a record; it is stored when this returns.
    async fn append(&self, partition: PartitionId, record: Envelope) -> Result<Option<Offset>> {
        let receipt = self.publisher.enqueue(&self.topic, vec![record]).await?.await.single()?;
        if receipt.partition != partition {
            return Err(Error::new(ErrorKind::Conflict, "the parking topic was repartitioned")
                .with("topic", &self.topic));
        }
        Ok(receipt.offset)
    }
}

/// Reads on in a parking log; fewer than [`PAGE`] records are the end of it.
///
/// # Errors
/// Corrupt if a record cannot be read: it may be the only copy of an event, so nothing is skipped.
pub(super) async fn page(
    admin: &dyn Admin,
    topic: &Topic,
    partition: PartitionId,
    from: u64,
) -> Result<Vec<(u64, Envelope)>> {
    let records = admin.read(topic, partition, Offset(from), PAGE).await?;
    let readable = |record: crate::admin::Record| match record.content.envelope() {
        Some(envelope) => Ok((record.offset.0, envelope.clone())),
        None => Err(Error::new(ErrorKind::Corrupt, "the parking log is damaged: a record cannot be read")
            .with("topic", topic)
            .with("partition", partition)
            .with("offset", record.offset)),
    };
    records.into_iter().map(readable).collect()
}

/// A key that leads to each of some partitions, for records that belong there whatever they are about.
pub(super) async fn slots(
    admin: &dyn Admin,
    topic: &Topic,
    partitions: &[PartitionId],
) -> Result<BTreeMap<PartitionId, Key>> {
    let mut missing: BTreeSet<PartitionId> = partitions.iter().copied().collect();
    let mut slots = BTreeMap::new();
    for n in 0..MAX_TRIALS {
        if missing.is_empty() {
            break;
        }
        let key = Key::new(format!("slot-{n}"));
        let partition = admin.partition_of(topic, &key).await?;
        if missing.remove(&partition) {
            slots.insert(partition, key);
        }
    }
    match missing.first() {
        None => Ok(slots),
        Some(partition) => {
            Err(Error::new(ErrorKind::Unexpected, "no key leads to the partition")
                .with("partition", partition))
        }
    }
}

/// What an owner knows of its partition, and does to it.
pub(in crate::driver) struct Place {
    log: Arc<Log>,
    pub(in crate::driver) partition: PartitionId,
    slot: Key,
    taking: tokio::sync::Mutex<()>,
    fold: Mutex<Fold>,
    bodies: Mutex<Bodies>,
    /// Shared by what appends, alone for a sweep: no record falls between its copies.
    writing: tokio::sync::RwLock<()>,
    reading: tokio::sync::Mutex<()>,
    /// Deliveries that still run with caution, because the owner before us did not leave by itself.
    cautious: AtomicUsize,
    leaving: AtomicBool,
    n_running: AtomicUsize,
    sweep_after: Mutex<Option<Instant>>,
}

impl Place {
    /// Takes over: reads all that was said before, and says so in the log.
    pub(super) async fn gain(log: Arc<Log>, partition: PartitionId, slot: Key, mut low: u64) -> Result<Self> {
        loop {
            match Self::gain_from(log.clone(), partition, slot.clone(), low).await {
                Err(error) if matches!(error.kind(), ErrorKind::DataLoss { .. }) => {
                    // Whoever is being replaced may have swept since the mark was read. If it did not move,
                    // records are missing that were not copied.
                    let moved = log.lows().await?.get(&partition).copied().unwrap_or(0);
                    if moved <= low || planted(Bug::TrustsFirstMark) {
                        return Err(error);
                    }
                    low = moved;
                }
                gained => return gained,
            }
        }
    }

    async fn gain_from(log: Arc<Log>, partition: PartitionId, slot: Key, low: u64) -> Result<Self> {
        let place = Self {
            bodies: Mutex::new(Bodies::new(&log.bodies)),
            log,
            partition,
            slot,
            taking: tokio::sync::Mutex::default(),
            fold: Mutex::new(Fold::from(low)),
            writing: tokio::sync::RwLock::default(),
            reading: tokio::sync::Mutex::default(),
            cautious: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
            n_running: AtomicUsize::new(0),
            sweep_after: Mutex::default(),
        };
        match place.epoch().await {
            Ok(_) => {}
            // Events can be handled and room be made; the takeover is said when there is room.
            Err(error) if error.kind() == ErrorKind::Full => place.read_on().await?,
            Err(error) => return Err(error),
        }
        Ok(place)
    }

    /// Begins, with where the source ended after the takeover. Deliveries run with caution at first if the owner
    /// before us did not leave by itself.
    pub(super) fn begin(&self, source_end: Option<Offset>, cautious: usize) {
        let mut fold = self.fold.lock();
        if let Some(end) = source_end {
            fold.source_ends(end);
        }
        if fold.is_unclean() && !planted(Bug::NoCaution) {
            self.cautious.store(cautious, Atomic::Relaxed);
        }
    }

    /// Position of our Takeover, which is said before anything else.
    async fn epoch(&self) -> Result<u64> {
        let _one_at_a_time = self.taking.lock().await;
        if let Some(epoch) = self.fold.lock().epoch() {
            return Ok(epoch);
        }
        let takeover = record::control(&Record::Takeover, &self.slot, 0);
        let id = takeover.id().clone();
        self.log.append(self.partition, takeover).await?;
        self.read_until(Some(&id)).await?;
        self.fold.lock().epoch().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "the takeover is not in the log yet")
                .with("topic", &self.log.topic)
        })
    }

    /// Parks an event: it is stored when this returns.
    pub(in crate::driver) async fn park(&self, event: &Envelope, parked: Parked) -> Result<()> {
        let _shared = self.writing.read().await;
        let record = record::park(event, &parked, &self.slot, self.epoch().await?);
        let position = self.log.append(self.partition, record).await?;
        // First: once it is parked, it may be run to its end by others, which forgets the body.
        self.bodies.lock().keep(event);
        self.fold.lock().park(parked, position.map(|position| position.0), false, Now::get());
        Ok(())
    }

    /// Notes that a run begins, or how one ended that is not the last.
    pub(in crate::driver) async fn attempt(
        &self,
        id: &EventId,
        attempts: u32,
        due: Option<SystemTime>,
        held: bool,
    ) -> Result<()> {
        let _shared = self.writing.read().await;
        let record = Record::Attempt { id: id.clone(), attempts, due, held };
        self.append(&record).await?;
        self.fold.lock().attempt(id, attempts, due, held, Now::get());
        Ok(())
    }

    /// Ends a parked event; its key is free only when this returned.
    pub(in crate::driver) async fn done(&self, id: &EventId) -> Result<()> {
        let _shared = self.writing.read().await;
        if planted(Bug::FreesKeyEarly) {
            self.fold.lock().done(id);
            return Ok(());
        }
        self.append(&Record::Done { id: id.clone() }).await?;
        self.fold.lock().done(id);
        self.bodies.lock().drop_one(id);
        Ok(())
    }

    async fn append(&self, record: &Record) -> Result<Option<Offset>> {
        let record = record::control(record, &self.slot, self.epoch().await?);
        self.log.append(self.partition, record).await
    }

    /// Says that we left by ourselves, with nothing begun.
    pub(super) async fn release(&self) -> Result<()> {
        let _alone = self.writing.write().await;
        self.append(&Record::Release).await.map(drop)
    }

    /// Reads what was appended since, by us and by others.
    pub(super) async fn read_on(&self) -> Result<()> {
        self.read_until(None).await
    }

    /// Reads on; the record with this id is our Takeover. A copy of a log may be behind for a moment: what was said
    /// before our Takeover is read when that is.
    async fn read_until(&self, takeover: Option<&EventId>) -> Result<()> {
        let _one_at_a_time = self.reading.lock().await;
        let (mut is_there, mut n_short) = (takeover.is_none(), 0);
        loop {
            let next = self.fold.lock().next;
            let records = page(self.log.admin()?, &self.log.topic, self.partition, next).await?;
            let n_records = records.len();
            is_there |= self.take_in(records, takeover);
            if n_records < PAGE {
                if is_there || n_short == SHORT_READS {
                    return Ok(());
                }
                n_short += 1;
                tokio::time::sleep(SOON).await;
            }
        }
    }

    /// Takes in a page of the log; whether our Takeover was in it.
    fn take_in(&self, records: Vec<(u64, Envelope)>, takeover: Option<&EventId>) -> bool {
        let (mut fold, now, mut is_there) = (self.fold.lock(), Now::get(), false);
        for (position, envelope) in records {
            let ours = takeover == Some(envelope.id());
            if ours && planted(Bug::ForgetsParkedOnTakeover) {
                *fold = Fold::from(position);
            }
            let entry = record::parse(&envelope);
            let of = entry.as_ref().and_then(|entry| match &entry.record {
                Record::Park(parked) => Some(parked.id.clone()),
                Record::Done { id } | Record::Resolve { id, .. } => Some(id.clone()),
                _ => None,
            });
            fold.read(position, entry, now);
            if let Some(id) = of {
                self.keep_body(&id, &fold, &envelope);
            }
            if ours {
                fold.begin(position);
                is_there = true;
            }
        }
        is_there
    }

    /// Keeps the body that a record brought, or forgets one that nobody needs any more.
    fn keep_body(&self, id: &EventId, fold: &Fold, record: &Envelope) {
        let mut bodies = self.bodies.lock();
        if fold.position(id).is_none() {
            bodies.drop_one(id);
        } else if let Ok(event) = record::unpark(record) {
            bodies.keep(&event);
        }
    }

    /// Reads the event of a parked one.
    pub(in crate::driver) async fn body(&self, waiting: &Waiting) -> Result<Envelope> {
        if let Some(event) = self.bodies.lock().get(&waiting.parked.id) {
            return Ok(event.clone());
        }
        let mut position = self.fold.lock().position(&waiting.parked.id).or(waiting.position);
        if position.is_none() {
            // The confirm named no offset: it is where we read it.
            self.read_on().await?;
            position = self.fold.lock().position(&waiting.parked.id);
        }
        let missing = || {
            Error::new(ErrorKind::NotFound, "a parked event is not where it was")
                .with("topic", &self.log.topic)
                .with("id", &waiting.parked.id)
        };
        let at = Offset(position.ok_or_else(missing)?);
        let records = self.log.admin()?.read(&self.log.topic, self.partition, at, 1).await?;
        let record = records.first().filter(|record| record.offset == at).ok_or_else(missing)?;
        let event = record::unpark(record.content.envelope().ok_or_else(missing)?)?;
        if *event.id() == waiting.parked.id { Ok(event) } else { Err(missing()) }
    }

    /// The first position that was not read.
    pub(super) fn next(&self) -> u64 {
        self.fold.lock().next
    }

    /// Whether the log is to be rewritten: it is long, and not because of what is pending.
    pub(super) fn is_long(&self, sweep_after: usize) -> bool {
        let fold = self.fold.lock();
        let is_due = self.sweep_after.lock().is_none_or(|at| Instant::now() >= at);
        is_due && fold.n_records > sweep_after.max(2 * (fold.n_pending() + fold.begun().len())) as u64
    }

    /// Leaves the log as it is for a while, after a sweep that failed.
    pub(super) fn sweep_later(&self) {
        *self.sweep_after.lock() = Some(Instant::now() + SWEEP_PAUSE);
    }

    /// Appends all that is pending once more, and moves the low-water mark up to what was read before.
    ///
    /// A crash between leaves copies, which are dropped by id. Whoever was replaced moves nothing.
    pub(super) async fn sweep(&self) -> Result<()> {
        let _alone = self.writing.write().await;
        let blind = planted(Bug::SweepsBlind);
        if !blind {
            self.read_on().await?;
        }
        let (pending, begun, mut low, n_said, n_below) = {
            let fold = self.fold.lock();
            if fold.is_fenced() && !blind {
                return Ok(());
            }
            (fold.all(), fold.begun(), fold.next, fold.n_said, fold.n_records)
        };
        // All of it can be read, or nothing is written.
        for waiting in &pending {
            self.body(waiting).await?;
        }
        if planted(Bug::SweepMovesFirst) {
            self.move_low(low, n_below).await?;
        }
        self.append(&Record::Swept).await?;
        for waiting in pending {
            let event = self.body(&waiting).await?;
            let mut parked = waiting.parked.clone();
            parked.due = waiting.due_wall(Now::get());
            if planted(Bug::SweepForgetsAttempts) {
                parked.attempts = 0;
            }
            let record = record::park(&event, &parked, &self.slot, self.epoch().await?);
            let position = self.log.append(self.partition, record).await?;
            self.fold.lock().park(parked, position.map(|position| position.0), false, Now::get());
        }
        for (id, attempts) in begun {
            self.append(&Record::Attempt { id, attempts, due: None, held: false }).await?;
        }
        if blind {
            low = self.end().await?;
        } else {
            self.read_on().await?;
            let fold = self.fold.lock();
            // What an operator said meanwhile is not in the copies: the next sweep has it.
            if fold.is_fenced() || fold.n_said != n_said {
                return Ok(());
            }
        }
        self.move_low(low, n_below).await
    }

    async fn end(&self) -> Result<u64> {
        let info = self.log.admin()?.topic(&self.log.topic).await?;
        let found = info.and_then(|info| info.partitions.into_iter().find(|p| p.partition == self.partition));
        Ok(found.map_or(0, |info| info.next.0))
    }

    /// Moves the low-water mark; so many records lie below it.
    async fn move_low(&self, low: u64, n_below: u64) -> Result<()> {
        let (admin, topic) = (self.log.admin()?, &self.log.topic);
        admin.seek(&self.log.group, topic, self.partition, Offset(low)).await?;
        self.fold.lock().swept(n_below);
        // What lies below is copied or ended; where records cannot be removed they only take room.
        if let Err(error) = admin.purge(topic, self.partition, Offset(low)).await {
            tracing::debug!(%error, %topic, "the swept part of the parking log stays");
        }
        Ok(())
    }

    pub(in crate::driver) fn meets(&self, id: &EventId, sequence: &Sequence, origin: Offset) -> Meets {
        self.fold.lock().meets(id, sequence, origin)
    }

    pub(in crate::driver) fn held(&self, sequence: &Sequence) -> Option<EventId> {
        self.fold.lock().held(sequence)
    }

    pub(in crate::driver) fn head(&self, sequence: &Sequence) -> Option<Waiting> {
        self.fold.lock().head(sequence, Instant::now())
    }

    pub(in crate::driver) fn sizes(&self, sequence: &Sequence) -> (usize, usize) {
        self.fold.lock().sizes(sequence)
    }

    /// Forgets a run that was begun with caution and ended.
    pub(in crate::driver) fn ended(&self, id: &EventId) {
        self.fold.lock().ended(id);
    }

    /// Whether the next delivery runs with caution.
    pub(in crate::driver) fn is_cautious(&self) -> bool {
        self.cautious.load(Atomic::Relaxed) > 0
            && self
                .cautious
                .fetch_update(Atomic::Relaxed, Atomic::Relaxed, |left| left.checked_sub(1))
                .is_ok()
    }

    /// Whether deliveries run with caution now.
    pub(in crate::driver) fn is_wary(&self) -> bool {
        self.cautious.load(Atomic::Relaxed) > 0
    }

    /// Whether the partition is still ours, as far as the log says.
    pub(in crate::driver) fn is_ours(&self) -> bool {
        !self.leaving.load(Atomic::Acquire) && !self.is_fenced()
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.fold.lock().is_fenced()
    }

    pub(super) fn leave(&self, leaving: bool) {
        self.leaving.store(leaving, Atomic::Release);
    }

    /// Takes a sequence whose head is due. Give it back.
    pub(super) fn take_due(&self) -> Option<Sequence> {
        if !self.is_ours() {
            return None;
        }
        let sequence = self.fold.lock().take_due(Instant::now())?;
        self.n_running.fetch_add(1, Atomic::AcqRel);
        Some(sequence)
    }

    pub(in crate::driver) fn give_back(&self, sequence: &Sequence) {
        self.fold.lock().returned(sequence);
        self.n_running.fetch_sub(1, Atomic::AcqRel);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.n_running.load(Atomic::Acquire) == 0
    }

    pub(super) fn due_at(&self) -> Option<Instant> {
        if self.is_ours() { self.fold.lock().due_at() } else { None }
    }

    /// Parked events that do not wait for an operator.
    pub(super) fn n_waiting(&self) -> usize {
        let fold = self.fold.lock();
        fold.n_pending() - fold.all_held().iter().map(|(_, behind)| behind + 1).sum::<usize>()
    }

    /// Events that are parked, and sequences that wait for an operator.
    pub(super) fn counts(&self) -> (usize, usize) {
        let fold = self.fold.lock();
        (fold.n_pending(), fold.n_held())
    }
}
