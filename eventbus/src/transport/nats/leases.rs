//! Groups as entries of a bucket: one for a group, with its members and who owns which partition, and one for the
//! position in each partition. Every change names the revision that it was made from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::names;
use super::reader::{Next, Reader};
use super::store::{Clock, Held, Store, bounds, missing};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::{Audience, Start, Subscription};
use crate::transport::kit::cursor::Past;
use crate::transport::kit::leased::{self, Fetched, Gained, Look, Progress, Share, Standing, Step, Wanted};

/// How often a change is tried that others were quicker with.
const TRIES: usize = 200;
const SOON: Duration = Duration::from_millis(5);

/// What is kept of a group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct GroupDoc {
    /// Tells a group from one of the same name that was deleted.
    pub(super) id: u64,
    /// Changes with every join, leave and release.
    pub(super) generation: u64,
    /// Where the group begins in each partition.
    pub(super) starts: Vec<u64>,
    pub(super) members: BTreeMap<u64, MemberDoc>,
    /// Owner and epoch of each partition.
    pub(super) shares: Vec<(Option<u64>, u32)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MemberDoc {
    /// When it is dead unless it says something: the server's time in milliseconds.
    pub(super) until: u64,
    pub(super) process: String,
}

/// What is kept of a group's position in a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CursorDoc {
    /// The group's id.
    pub(super) group: u64,
    pub(super) epoch: u32,
    pub(super) floor: u64,
    /// Events above the floor that are settled, or wait.
    pub(super) past: BTreeMap<u64, PastDoc>,
}

/// `attempt` 0 = settled; `due` is the server's time in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PastDoc {
    pub(super) attempt: u32,
    pub(super) due: Option<u64>,
}

impl PastDoc {
    fn write(past: Past, clock: &Clock) -> Option<Self> {
        match past {
            Past::Fresh => None,
            Past::Settled => Some(Self { attempt: 0, due: None }),
            Past::Waiting { attempt, due } => {
                Some(Self { attempt: attempt.get(), due: due.map(|due| clock.at(due)) })
            }
        }
    }

    fn read(self, clock: &Clock) -> Past {
        match NonZeroU32::new(self.attempt) {
            None => Past::Settled,
            Some(attempt) => Past::Waiting { attempt, due: self.due.and_then(|due| clock.moment(due)) },
        }
    }
}

impl CursorDoc {
    fn exceptions(&self, clock: &Clock) -> HashMap<u64, Past> {
        self.past.iter().map(|(offset, past)| (*offset, past.read(clock))).collect()
    }

    /// This with a member's progress in it.
    fn with(&self, progress: &Progress, clock: &Clock) -> Self {
        let mut after = self.clone();
        after.floor = after.floor.max(progress.floor);
        for (offset, past) in &progress.changed {
            match PastDoc::write(*past, clock) {
                Some(known) => _ = after.past.insert(*offset, known),
                None => _ = after.past.remove(offset),
            }
        }
        after.past = after.past.split_off(&after.floor);
        after
    }
}

impl GroupDoc {
    /// Removes members that are dead at a time; true if there were some.
    pub(super) fn bury(&mut self, now: u64) -> bool {
        let before = self.members.len();
        self.members.retain(|_, member| member.until >= now);
        self.free_shares();
        self.members.len() < before
    }

    fn free_shares(&mut self) {
        let Self { members, shares, .. } = self;
        for (owner, _) in shares {
            *owner = owner.filter(|owner| members.contains_key(owner));
        }
    }

    /// The position in a partition as the group begins.
    pub(super) fn beginning(&self, partition: u32) -> CursorDoc {
        let floor = self.starts.get(partition as usize).copied().unwrap_or(1);
        CursorDoc { group: self.id, epoch: 0, floor, past: BTreeMap::new() }
    }

    fn shares(&self) -> Vec<Share> {
        let share = |(partition, (owner, epoch)): (usize, &(Option<u64>, u32))| Share {
            partition: partition as u32,
            owner: *owner,
            epoch: *epoch,
        };
        self.shares.iter().enumerate().map(share).collect()
    }
}

/// One membership of a group, or one broadcast instance, which is kept in memory alone.
pub(super) struct Membership {
    topic: Topic,
    name: String,
    is_broadcast: bool,
    /// Rings for events, and for changes of the group.
    bell: watch::Sender<u64>,
    /// As the last look found it.
    generation: AtomicU64,
    /// Whether a message said otherwise: it may have been refused, so a look must say what is true.
    has_news: AtomicBool,
    is_gone: AtomicBool,
    /// What is ours.
    owned: Mutex<BTreeMap<u32, Owned>>,
    listening: Option<AbortHandle>,
}

struct Owned {
    epoch: u32,
    /// What is kept, as far as we know.
    held: Held<CursorDoc>,
    reader: Option<Reader>,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership")
            .field("topic", &self.topic)
            .field("group", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Some(listening) = &self.listening {
            listening.abort();
        }
    }
}

impl Membership {
    fn key(&self) -> String {
        names::group(&self.topic, &self.name)
    }

    fn cursor(&self, partition: u32) -> String {
        names::cursor(&self.topic, &self.name, partition)
    }

    fn disown(&self, partitions: &[u32]) {
        let mut owned = self.owned.lock();
        if self.is_broadcast {
            // Its memory is all there is.
            for partition in partitions {
                if let Some(of) = owned.get_mut(partition) {
                    of.reader = None;
                }
            }
        } else {
            partitions.iter().for_each(|partition| _ = owned.remove(partition));
        }
    }
}

type Seat = leased::Seat<Arc<Membership>>;

#[async_trait]
impl leased::Store for Store {
    type Group = Arc<Membership>;

    const NAME: &'static str = "NatsConsumer";

    fn is_open(&self) -> Result<()> {
        self.is_open()
    }

    fn session(&self) -> Duration {
        self.options.session
    }

    fn look_every(&self) -> Option<Duration> {
        // Readers and the group's changes ring.
        None
    }

    fn news(&self, group: &Arc<Membership>) -> watch::Receiver<u64> {
        group.bell.subscribe()
    }

    async fn join(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat> {
        let (store, wanted) = (self.clone(), subscription.clone());
        self.tasks
            .run(async move {
                // A topic that is remembered may have been deleted and created anew.
                match store.enter(&wanted).await {
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        store.forget(&wanted.topic);
                        store.enter(&wanted).await
                    }
                    entered => entered,
                }
            })
            .await
    }

    async fn stand(self: &Arc<Self>, seat: &Seat, known: BTreeMap<u32, u32>) -> Result<Standing> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks.run(async move { store.stand_at(&seat, &known).await }).await
    }

    async fn read(
        self: &Arc<Self>,
        seat: &Seat,
        wanted: Vec<Wanted>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Look>> {
        let group = &seat.group;
        if group.is_gone.load(Atomic::Acquire) {
            return Ok(None);
        }
        let (mut fetched, mut outcome) = (Vec::new(), Ok(()));
        let mut owned = group.owned.lock();
        for wanted in wanted {
            let Some(of) = owned.get_mut(&wanted.partition).filter(|of| of.epoch == wanted.epoch) else {
                continue;
            };
            let reader = match &mut of.reader {
                Some(reader) if reader.next == wanted.from.max(1) => reader,
                slot => {
                    let (topic, bell) = (group.topic.clone(), group.bell.clone());
                    slot.insert(Reader::start(self, topic, wanted.partition, wanted.from.max(1), bell))
                }
            };
            match reader.take(max, max_bytes) {
                Ok(Next::Events(rows)) if rows.is_empty() => {}
                Ok(Next::Events(rows)) => fetched.push(Fetched { wanted, first: wanted.from, rows }),
                Ok(Next::Hole(first)) => fetched.push(Fetched { wanted, first, rows: Vec::new() }),
                Ok(Next::Gone) => {
                    drop(owned);
                    group.end();
                    return Ok(None);
                }
                Err(error) => outcome = Err(error),
            }
        }
        drop(owned);
        if fetched.is_empty() {
            outcome?;
        }
        // No generation is this one: then the group is looked at.
        let has_news = group.has_news.swap(false, Atomic::AcqRel);
        let generation = if has_news { u64::MAX } else { group.generation.load(Atomic::Acquire) };
        Ok(Some(Look { generation, fetched }))
    }

    async fn save(self: &Arc<Self>, seat: &Seat, progress: Arc<[Progress]>) -> Result<Vec<u32>> {
        let (store, group) = (self.clone(), seat.group.clone());
        self.tasks
            .run(async move {
                let clock = store.clock();
                let saving = progress.iter().map(|part| store.save_one(&group, part, &clock));
                Ok(try_join_all(saving).await?.into_iter().flatten().collect())
            })
            .await
    }

    async fn release(self: &Arc<Self>, seat: &Seat, partitions: Vec<u32>) -> Result<()> {
        seat.group.disown(&partitions);
        if seat.group.is_broadcast {
            return Ok(());
        }
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks
            .run(async move {
                let member = seat.member;
                let changed = store.change(&seat.group, |doc, _| {
                    for partition in &partitions {
                        if let Some((owner, _)) = doc.shares.get_mut(*partition as usize)
                            && *owner == Some(member)
                        {
                            *owner = None;
                            doc.generation += 1;
                        }
                    }
                });
                changed.await.map(|_| ())
            })
            .await
    }

    async fn leave(self: &Arc<Self>, seat: &Seat) -> Result<()> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks.run(async move { store.leave_at(&seat).await }).await
    }

    fn leave_soon(self: &Arc<Self>, seat: Seat) {
        let store = self.clone();
        self.tasks.leave_soon(async move { store.leave_at(&seat).await });
    }
}

fn void() -> Error {
    Error::not_found("the topic or group was deleted")
}

impl Store {
    /// Changes a group, from what it is, until nobody was quicker. `None` = there is no such group.
    pub(super) async fn change_group<T>(
        &self,
        key: &str,
        mut change: impl FnMut(&mut GroupDoc, &Clock) -> T,
    ) -> Result<Option<(GroupDoc, T)>> {
        for _ in 0..TRIES {
            let Some(Held { value: mut doc, revision }) = self.get::<GroupDoc>(key).await? else {
                return Ok(None);
            };
            let outcome = change(&mut doc, &self.clock());
            if self.set(key, &doc, revision).await?.is_some() {
                return Ok(Some((doc, outcome)));
            }
            tokio::time::sleep(SOON.mul_f64(fastrand::f64())).await;
        }
        Err(Error::new(ErrorKind::Unavailable, "others change the group all the time"))
    }

    async fn change<T>(
        &self,
        group: &Membership,
        change: impl FnMut(&mut GroupDoc, &Clock) -> T,
    ) -> Result<(GroupDoc, T)> {
        self.change_group(&group.key(), change).await?.ok_or_else(void)
    }

    fn member(&self, clock: &Clock) -> MemberDoc {
        let until = clock.now() + self.options.session.as_millis() as u64;
        MemberDoc { until, process: leased::process() }
    }

    async fn enter(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat> {
        let topic = &subscription.topic;
        // Not what is remembered: a group is made for as many partitions as there are.
        self.forget(topic);
        let n_partitions = self.partitions(topic).await?;
        let member = fastrand::u64(1..);
        let (name, is_broadcast) = match &subscription.audience {
            Audience::Group(group) => (group.as_str().to_owned(), false),
            Audience::Broadcast => (String::new(), true),
        };
        let mut membership = Membership {
            topic: topic.clone(),
            name,
            is_broadcast,
            bell: watch::Sender::new(0),
            generation: AtomicU64::new(0),
            has_news: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            owned: Mutex::default(),
            listening: None,
        };
        if is_broadcast {
            let starts = self.starts(topic, n_partitions, &subscription.start).await?;
            let owned = starts.into_iter().enumerate().map(|(partition, floor)| {
                let value = CursorDoc { group: 0, epoch: 0, floor, past: BTreeMap::new() };
                (partition as u32, Owned { epoch: 0, held: Held { value, revision: 0 }, reader: None })
            });
            membership.owned = Mutex::new(owned.collect());
            return Ok(Seat { group: Arc::new(membership), member });
        }
        let key = membership.key();
        // Changes are heard before the first look.
        let mut changes = self.subscribe(names::changes(&key)).await?;
        for _ in 0..TRIES {
            if let Some(doc) = self.sit(&key, member).await? {
                // Deleted meanwhile: what was just made must not be found by a topic of the same name.
                let declared = self.declared(topic).await?.map(|declared| declared.partitions);
                if declared != Some(doc.shares.len() as u32) {
                    self.change_group(&key, |doc, _| _ = doc.members.remove(&member)).await?;
                    return Err(match declared {
                        None => missing(topic),
                        Some(found) => Error::new(
                            ErrorKind::Conflict,
                            "the group was made for another number of partitions: delete it",
                        )
                        .with("topic", topic)
                        .with("group", doc.shares.len())
                        .with("found", found),
                    });
                }
                let group = Arc::new_cyclic(|weak: &std::sync::Weak<Membership>| {
                    let weak = weak.clone();
                    let listening = tokio::spawn(async move {
                        while let Some(change) = changes.next().await {
                            let Some(group) = weak.upgrade() else { return };
                            group.hear(&change.payload);
                        }
                    });
                    membership.listening = Some(listening.abort_handle());
                    membership
                });
                return Ok(Seat { group, member });
            }
            let starts = self.starts(topic, n_partitions, &subscription.start).await?;
            let doc = GroupDoc {
                id: fastrand::u64(1..),
                generation: 1,
                shares: starts.iter().map(|_| (None, 0)).collect(),
                starts,
                members: BTreeMap::new(),
            };
            self.set(&key, &doc, 0).await?;
        }
        Err(Error::new(ErrorKind::Unavailable, "others delete the group all the time"))
    }

    /// Enters a member into a group; `None` if there is no such group.
    async fn sit(&self, key: &str, member: u64) -> Result<Option<GroupDoc>> {
        let sat = self.change_group(key, |doc: &mut GroupDoc, clock: &Clock| {
            doc.members.insert(member, self.member(clock));
            doc.generation += 1;
        });
        Ok(sat.await?.map(|(doc, ())| doc))
    }

    /// The offset in each partition that a start means.
    async fn starts(&self, topic: &Topic, n_partitions: u32, start: &Start) -> Result<Vec<u64>> {
        let looks = self.look_at_all(topic, n_partitions).await?;
        let bounds = |at: usize| looks.get(at).map_or((1, 1), |(_, info)| bounds(info));
        let all = 0..looks.len();
        Ok(match start {
            Start::Latest => all.map(|at| bounds(at).1).collect(),
            Start::Earliest => all.map(|at| bounds(at).0).collect(),
            Start::Offsets(offsets) => {
                let wanted = |at: usize| offsets.get(&PartitionId(at as u32)).map_or(0, |offset| offset.0);
                all.map(|at| wanted(at).clamp(bounds(at).0, bounds(at).1)).collect()
            }
            Start::Time(time) => {
                let finding = looks.iter().map(|(stream, info)| async move {
                    Ok::<_, Error>(
                        self.first_since(stream, *time).await?.unwrap_or(info.state.last_sequence + 1),
                    )
                });
                try_join_all(finding).await?
            }
        })
    }

    /// The first event of a stream that was stored at or after a time.
    pub(super) async fn first_since(
        &self,
        stream: &async_nats::jetstream::stream::Stream,
        time: std::time::SystemTime,
    ) -> Result<Option<u64>> {
        let nanos = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let start_time = async_nats::datetime::from_nanos(i128::try_from(nanos).unwrap_or(i128::MAX))
            .map_err(|_| Error::config("a start lies beyond the times that NATS knows"))?;
        let found = self.fetch(stream, DeliverPolicy::ByStartTime { start_time }, 1).await?;
        Ok(found.first().and_then(|message| Some(message.info().ok()?.stream_sequence)))
    }

    async fn stand_at(&self, seat: &Seat, known: &BTreeMap<u32, u32>) -> Result<Standing> {
        let group = &seat.group;
        if group.is_broadcast {
            return Ok(self.stand_alone(seat, known));
        }
        self.set_clock().await?;
        let changing = self.change(group, |doc, clock| {
            if doc.bury(clock.now()) {
                doc.generation += 1;
            }
            let mut member = seat.member;
            if !doc.members.contains_key(&member) {
                // Others declared it dead: what it was is over.
                member = fastrand::u64(1..);
                doc.generation += 1;
            }
            doc.members.insert(member, self.member(clock));
            let members: Vec<u64> = doc.members.keys().copied().collect();
            let (steps, lost) = leased::steps(member, &members, &doc.shares(), known);
            for ((owner, epoch), step) in doc.shares.iter_mut().zip(&steps) {
                if *step == Step::Take {
                    (*owner, *epoch) = (Some(member), epoch.wrapping_add(1));
                }
            }
            (member, steps, lost)
        });
        let changed = changing.await;
        if changed.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            group.end();
        }
        let (doc, (member, steps, mut lost)) = changed?;
        group.generation.store(doc.generation, Atomic::Release);
        let (mut taking, mut to_release) = (Vec::new(), Vec::new());
        for (share, step) in doc.shares().into_iter().zip(steps) {
            match step {
                Step::Keep => {}
                Step::Release => to_release.push(share.partition),
                Step::Load | Step::Take => taking.push(share),
            }
        }
        let clock = self.clock();
        let loading = taking.iter().map(|share| self.load(group, &doc, share));
        let mut gained = Vec::new();
        {
            let loaded = try_join_all(loading).await?;
            let mut owned = group.owned.lock();
            for (share, held) in taking.iter().zip(loaded) {
                let Some(held) = held else {
                    // Somebody else took it meanwhile.
                    if known.contains_key(&share.partition) && !lost.contains(&share.partition) {
                        lost.push(share.partition);
                    }
                    continue;
                };
                gained.push(Gained {
                    partition: share.partition,
                    epoch: share.epoch,
                    floor: held.value.floor,
                    exceptions: held.value.exceptions(&clock),
                });
                owned.insert(share.partition, Owned { epoch: share.epoch, held, reader: None });
            }
        }
        let taken: BTreeSet<u32> = gained.iter().map(|gained| gained.partition).collect();
        let disowned: Vec<u32> = lost.iter().copied().filter(|lost| !taken.contains(lost)).collect();
        group.disown(&disowned);
        Ok(Standing { member, generation: doc.generation, gained, lost, to_release })
    }

    /// A broadcast instance owns everything, from where it stands.
    fn stand_alone(&self, seat: &Seat, known: &BTreeMap<u32, u32>) -> Standing {
        let (clock, mut owned) = (self.clock(), seat.group.owned.lock());
        let mut gained = Vec::new();
        for (partition, of) in owned.iter_mut().filter(|(partition, _)| !known.contains_key(partition)) {
            of.epoch = of.epoch.wrapping_add(1);
            let (floor, exceptions) = (of.held.value.floor, of.held.value.exceptions(&clock));
            gained.push(Gained { partition: *partition, epoch: of.epoch, floor, exceptions });
        }
        Standing { member: seat.member, generation: 0, gained, lost: Vec::new(), to_release: Vec::new() }
    }

    /// Reads a position and writes our epoch into it: from then on no former owner changes it. `None` = somebody
    /// has a later epoch.
    async fn load(
        &self,
        group: &Membership,
        doc: &GroupDoc,
        share: &Share,
    ) -> Result<Option<Held<CursorDoc>>> {
        let key = group.cursor(share.partition);
        for _ in 0..TRIES {
            let found = self.get::<CursorDoc>(&key).await?;
            let revision = found.as_ref().map_or(0, |found| found.revision);
            let mut value = match found {
                // Not one of a group of this name that was deleted.
                Some(found) if found.value.group == doc.id => found.value,
                _ => doc.beginning(share.partition),
            };
            if value.epoch > share.epoch {
                return Ok(None);
            }
            if value.epoch == share.epoch && revision > 0 {
                return Ok(Some(Held { value, revision }));
            }
            value.epoch = share.epoch;
            if let Some(revision) = self.set(&key, &value, revision).await? {
                return Ok(Some(Held { value, revision }));
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "others change the position all the time"))
    }

    /// Stores progress in one partition; the partition if it is not ours any more.
    async fn save_one(&self, group: &Membership, part: &Progress, clock: &Clock) -> Result<Option<u32>> {
        let known = {
            let mut owned = group.owned.lock();
            let Some(of) = owned.get_mut(&part.partition).filter(|of| of.epoch == part.epoch) else {
                return Ok(Some(part.partition));
            };
            let after = of.held.value.with(part, clock);
            if group.is_broadcast {
                of.held.value = after;
                return Ok(None);
            }
            Held { value: after, revision: of.held.revision }
        };
        let key = group.cursor(part.partition);
        let mut revision = known.revision;
        for _ in 0..TRIES {
            if let Some(saved) = self.set(&key, &known.value, revision).await? {
                let mut owned = group.owned.lock();
                if let Some(of) = owned.get_mut(&part.partition).filter(|of| of.epoch == part.epoch) {
                    of.held = Held { value: known.value, revision: saved };
                }
                return Ok(None);
            }
            // An answer of ours was lost, or it is another's: the epoch says which.
            match self.get::<CursorDoc>(&key).await? {
                Some(found) if found.value.epoch == part.epoch && found.value.group == known.value.group => {
                    revision = found.revision;
                }
                _ => {
                    group
                        .owned
                        .lock()
                        .extract_if(part.partition..=part.partition, |_, of| of.epoch == part.epoch)
                        .for_each(drop);
                    return Ok(Some(part.partition));
                }
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "the position could not be stored"))
    }

    async fn leave_at(&self, seat: &Seat) -> Result<()> {
        let group = &seat.group;
        group.owned.lock().clear();
        if group.is_broadcast {
            return Ok(());
        }
        let key = group.key();
        let left = self.change_group(&key, |doc, _| {
            if doc.members.remove(&seat.member).is_some() {
                doc.free_shares();
                doc.generation += 1;
            }
        });
        left.await.map(|_| ())
    }
}

impl Membership {
    /// Takes in what somebody wrote of the group, or tried to.
    fn hear(&self, payload: &[u8]) {
        let generation = serde_json::from_slice::<GroupDoc>(payload).map(|doc| doc.generation).ok();
        if generation != Some(self.generation.load(Atomic::Acquire)) {
            self.has_news.store(true, Atomic::Release);
            self.ring();
        }
    }

    fn ring(&self) {
        self.bell.send_modify(|n| *n += 1);
    }

    /// Notes that there is no group, or no topic, any more.
    fn end(&self) {
        self.is_gone.store(true, Atomic::Release);
        self.ring();
    }
}
