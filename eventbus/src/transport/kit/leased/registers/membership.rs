//! The members of groups whose entries are kept by [`Registers`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::ahead::{Next, Reader};
use super::docs::{CursorDoc, GroupDoc, MemberDoc};
use super::{Entry, Held, Registers, TRIES, starts};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::subscription::{Audience, Subscription};
use crate::transport::kit::leased::{self, Fetched, Gained, Look, Progress, Share, Standing, Step, Wanted};

const SOON: Duration = Duration::from_millis(5);

/// One membership of a group, or one broadcast instance, which is kept in memory alone.
pub(in crate::transport) struct Membership {
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
    fn entry(&self) -> Entry<'_> {
        Entry::Group(&self.topic, &self.name)
    }

    fn cursor(&self, partition: u32) -> Entry<'_> {
        Entry::Cursor(&self.topic, &self.name, partition)
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
impl<R: Registers> leased::Store for R {
    type Group = Arc<Membership>;

    const NAME: &'static str = R::NAME;

    fn is_open(&self) -> Result<()> {
        self.open()
    }

    fn session(&self) -> Duration {
        self.silence()
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
        self.tasks()
            .run(async move {
                // A topic that is remembered may have been deleted and created anew.
                match enter(&*store, &wanted).await {
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        store.forget(&wanted.topic);
                        enter(&*store, &wanted).await
                    }
                    entered => entered,
                }
            })
            .await
    }

    async fn stand(self: &Arc<Self>, seat: &Seat, known: BTreeMap<u32, u32>) -> Result<Standing> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks().run(async move { stand_at(&*store, &seat, &known).await }).await
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
                    let (store, topic, from) = (self.clone(), group.topic.clone(), wanted.from.max(1));
                    slot.insert(Reader::start(from, group.bell.clone(), |ahead, stopped| async move {
                        store.read_ahead(topic, wanted.partition, from, ahead, stopped).await;
                    }))
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
        self.tasks()
            .run(async move {
                let clock = store.clock();
                let saving = progress.iter().map(|part| save_one(&*store, &group, part, &clock));
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
        self.tasks()
            .run(async move {
                let member = seat.member;
                let changed = change(&*store, &seat.group, |doc| {
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
        self.tasks().run(async move { leave_at(&*store, &seat).await }).await
    }

    fn leave_soon(self: &Arc<Self>, seat: Seat) {
        let store = self.clone();
        self.tasks().leave_soon(async move { leave_at(&*store, &seat).await });
    }
}

fn void() -> Error {
    Error::not_found("the topic or group was deleted")
}

/// Changes a group, from what it is, until nobody was quicker. `None` = there is no such group.
async fn change_group<R: Registers, T>(
    store: &R,
    entry: Entry<'_>,
    change: impl FnMut(&mut GroupDoc) -> T + Send,
) -> Result<Option<(GroupDoc, T)>>
where
    T: Send,
{
    judged(store, entry, false, change).await
}

/// Changes a group, of which those that are dead were removed if that is asked for.
async fn judged<R: Registers, T>(
    store: &R,
    entry: Entry<'_>,
    is_judged: bool,
    mut change: impl FnMut(&mut GroupDoc) -> T + Send,
) -> Result<Option<(GroupDoc, T)>>
where
    T: Send,
{
    for _ in 0..TRIES {
        let Some(Held { value: mut doc, revision }) = store.get::<GroupDoc>(entry).await? else {
            return Ok(None);
        };
        if is_judged {
            let dead = store.dead(entry, &doc).await?;
            if doc.bury(&dead) {
                doc.generation += 1;
            }
        }
        let outcome = change(&mut doc);
        if store.set(entry, &doc, revision).await?.is_some() {
            return Ok(Some((doc, outcome)));
        }
        tokio::time::sleep(SOON.mul_f64(fastrand::f64())).await;
    }
    Err(Error::new(ErrorKind::Unavailable, "others change the group all the time"))
}

async fn change<R: Registers, T: Send>(
    store: &R,
    group: &Membership,
    change: impl FnMut(&mut GroupDoc) -> T + Send,
) -> Result<(GroupDoc, T)> {
    change_group(store, group.entry(), change).await?.ok_or_else(void)
}

async fn enter<R: Registers>(store: &R, subscription: &Subscription) -> Result<Seat> {
    let topic = &subscription.topic;
    // Not what is remembered: a group is made for as many partitions as there are.
    store.forget(topic);
    let n_partitions = store.partitions(topic).await?;
    let member = fastrand::u64(1..);
    let (name, is_broadcast) = match &subscription.audience {
        Audience::Group(group) => (group.as_str().to_owned(), false),
        Audience::Broadcast => (String::new(), true),
    };
    let mut membership = Membership {
        topic: topic.clone(),
        name: name.clone(),
        is_broadcast,
        bell: watch::Sender::new(0),
        generation: AtomicU64::new(0),
        has_news: AtomicBool::new(false),
        is_gone: AtomicBool::new(false),
        owned: Mutex::default(),
        listening: None,
    };
    if is_broadcast {
        let starts = starts(store, topic, n_partitions, &subscription.start).await?;
        let owned = starts.into_iter().enumerate().map(|(partition, floor)| {
            let value = CursorDoc { group: 0, epoch: 0, floor, past: BTreeMap::new() };
            (partition as u32, Owned { epoch: 0, held: Held { value, revision: 0 }, reader: None })
        });
        membership.owned = Mutex::new(owned.collect());
        return Ok(Seat { group: Arc::new(membership), member });
    }
    let entry = Entry::Group(topic, &name);
    // Changes are heard before the first look.
    let mut changes = store.changes(entry).await?;
    store.attend(member).await?;
    let doc = take_seat(store, subscription, entry, n_partitions, member).await;
    if doc.is_err() {
        // What it wrote may arrive yet: nothing is to say that it lives.
        store.absent(member).await;
    }
    doc?;
    let group = Arc::new_cyclic(|weak: &std::sync::Weak<Membership>| {
        let weak = weak.clone();
        let listening = tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                let Some(group) = weak.upgrade() else { return };
                group.hear(&change);
            }
        });
        membership.listening = Some(listening.abort_handle());
        membership
    });
    Ok(Seat { group, member })
}

/// Enters a member into a group, which is created if there is none.
async fn take_seat<R: Registers>(
    store: &R,
    subscription: &Subscription,
    entry: Entry<'_>,
    n_partitions: u32,
    member: u64,
) -> Result<()> {
    let topic = &subscription.topic;
    for _ in 0..TRIES {
        if let Some(doc) = sit(store, entry, member).await? {
            // Deleted meanwhile: what was just made must not be found by a topic of the same name.
            let declared = store.existing(topic).await?;
            if declared != Some(doc.shares.len() as u32) {
                change_group(store, entry, |doc| _ = doc.members.remove(&member)).await?;
                return Err(match declared {
                    None => Error::not_found("there is no such topic").with("topic", topic),
                    Some(found) => Error::new(
                        ErrorKind::Conflict,
                        "the group was made for another number of partitions: delete it",
                    )
                    .with("topic", topic)
                    .with("group", doc.shares.len())
                    .with("found", found),
                });
            }
            return Ok(());
        }
        let starts = starts(store, topic, n_partitions, &subscription.start).await?;
        store.set(entry, &GroupDoc::new(starts), 0).await?;
    }
    Err(Error::new(ErrorKind::Unavailable, "others delete the group all the time"))
}

/// Enters a member into a group; `None` if there is no such group.
async fn sit<R: Registers>(store: &R, entry: Entry<'_>, member: u64) -> Result<Option<GroupDoc>> {
    let sat = change_group(store, entry, |doc: &mut GroupDoc| {
        doc.members.insert(member, MemberDoc::new(store.mark()));
        doc.generation += 1;
    });
    Ok(sat.await?.map(|(doc, ())| doc))
}

async fn stand_at<R: Registers>(store: &R, seat: &Seat, known: &BTreeMap<u32, u32>) -> Result<Standing> {
    let group = &seat.group;
    if group.is_broadcast {
        return Ok(stand_alone(store, seat, known));
    }
    store.attend(seat.member).await?;
    let changing = judged(store, group.entry(), true, |doc| {
        let mut member = seat.member;
        if !doc.members.contains_key(&member) {
            // Others declared it dead: what it was is over.
            member = fastrand::u64(1..);
            doc.generation += 1;
        }
        doc.members.insert(member, MemberDoc::new(store.mark()));
        let members: Vec<u64> = doc.members.keys().copied().collect();
        let (steps, lost) = leased::steps(member, &members, &doc.shares(), known);
        for ((owner, epoch), step) in doc.shares.iter_mut().zip(&steps) {
            if *step == Step::Take {
                (*owner, *epoch) = (Some(member), epoch.wrapping_add(1));
            }
        }
        (member, steps, lost)
    });
    let Some((doc, (member, steps, mut lost))) = changing.await? else {
        group.end();
        return Err(void());
    };
    if member != seat.member {
        store.absent(seat.member).await;
        store.attend(member).await?;
    }
    group.generation.store(doc.generation, Atomic::Release);
    let (mut taking, mut to_release) = (Vec::new(), Vec::new());
    for (share, step) in doc.shares().into_iter().zip(steps) {
        match step {
            Step::Keep => {}
            Step::Release => to_release.push(share.partition),
            Step::Load | Step::Take => taking.push(share),
        }
    }
    let clock = store.clock();
    let loading = taking.iter().map(|share| load(store, group, &doc, share));
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
fn stand_alone<R: Registers>(store: &R, seat: &Seat, known: &BTreeMap<u32, u32>) -> Standing {
    let (clock, mut owned) = (store.clock(), seat.group.owned.lock());
    let mut gained = Vec::new();
    for (partition, of) in owned.iter_mut().filter(|(partition, _)| !known.contains_key(partition)) {
        of.epoch = of.epoch.wrapping_add(1);
        let (floor, exceptions) = (of.held.value.floor, of.held.value.exceptions(&clock));
        gained.push(Gained { partition: *partition, epoch: of.epoch, floor, exceptions });
    }
    Standing { member: seat.member, generation: 0, gained, lost: Vec::new(), to_release: Vec::new() }
}

/// Reads a position and writes our epoch into it: from then on no former owner changes it. `None` = somebody has a later
/// epoch.
async fn load<R: Registers>(
    store: &R,
    group: &Membership,
    doc: &GroupDoc,
    share: &Share,
) -> Result<Option<Held<CursorDoc>>> {
    let entry = group.cursor(share.partition);
    for _ in 0..TRIES {
        let found = store.get::<CursorDoc>(entry).await?;
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
        if let Some(revision) = store.set(entry, &value, revision).await? {
            return Ok(Some(Held { value, revision }));
        }
    }
    Err(Error::new(ErrorKind::Unavailable, "others change the position all the time"))
}

/// Stores progress in one partition; the partition if it is not ours any more.
async fn save_one<R: Registers>(
    store: &R,
    group: &Membership,
    part: &Progress,
    clock: &R::Clock,
) -> Result<Option<u32>> {
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
    let entry = group.cursor(part.partition);
    let mut revision = known.revision;
    for _ in 0..TRIES {
        if let Some(saved) = store.set(entry, &known.value, revision).await? {
            let mut owned = group.owned.lock();
            if let Some(of) = owned.get_mut(&part.partition).filter(|of| of.epoch == part.epoch) {
                of.held = Held { value: known.value, revision: saved };
            }
            return Ok(None);
        }
        // An answer of ours was lost, or it is another's: the epoch says which.
        match store.get::<CursorDoc>(entry).await? {
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

async fn leave_at<R: Registers>(store: &R, seat: &Seat) -> Result<()> {
    let group = &seat.group;
    group.owned.lock().clear();
    if group.is_broadcast {
        return Ok(());
    }
    let left = change_group(store, group.entry(), |doc| {
        if doc.members.remove(&seat.member).is_some() {
            doc.free_shares();
            doc.generation += 1;
        }
    });
    let left = left.await;
    // Also if that failed: nothing is to say that it lives.
    store.absent(seat.member).await;
    left.map(drop)
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
