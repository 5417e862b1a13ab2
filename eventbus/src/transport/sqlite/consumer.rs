//! One member: polls what its partitions have, saves what is settled, keeps its seat.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering as Atomic};
use std::time::{Duration, Instant as StdInstant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::clock;
use super::membership::{self, Seat};
use super::partitions::{Fetched, News, Partitions, Wanted};
use super::row;
use super::schema::from_sqlite;
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::cursor::lease_end;
use crate::transport::hand::Place;
use crate::transport::{Consumer, Polled, Settle, Settled, Token};

pub(super) struct SqliteConsumer {
    member: Arc<Member>,
    /// One poll reads at a time; a second one waits behind it.
    polling: tokio::sync::Mutex<()>,
    heartbeat: JoinHandle<()>,
}

/// Shared with the heartbeat.
struct Member {
    store: Arc<Store>,
    subscription: Subscription,
    seat: Seat,
    /// The seat's member id; a new one if others had declared it dead.
    id: AtomicI64,
    state: Mutex<Partitions>,
    /// One coordination with the group at a time.
    coordinating: tokio::sync::Mutex<()>,
    /// One settle is saved at a time, so that its answer is about what it settled.
    saving: tokio::sync::Mutex<()>,
    wake: Notify,
    closed: AtomicBool,
}

/// Rows of one partition that one read brings.
const READ_AHEAD: usize = 512;

impl SqliteConsumer {
    pub(super) async fn join(store: Arc<Store>, subscription: &Subscription) -> Result<Arc<Self>> {
        let (partitions, session) = (store.options.partitions, clock::nanos(store.options.session));
        let wanted = subscription.clone();
        let seat = store.write(move |round| membership::join(round, &wanted, partitions, session)).await?;
        let member = Arc::new(Member {
            id: AtomicI64::new(seat.member),
            state: Mutex::new(Partitions::new(subscription)),
            subscription: subscription.clone(),
            coordinating: tokio::sync::Mutex::default(),
            saving: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
            store,
            seat,
        });
        // From here on a drop leaves the group.
        let heartbeat = tokio::spawn(beat(Arc::downgrade(&member), member.store.options.session / 3));
        let consumer = Arc::new(Self { member, polling: tokio::sync::Mutex::default(), heartbeat });
        consumer.member.coordinate().await?;
        Ok(consumer)
    }

    /// Ends the membership and waits until that is stored.
    pub(super) async fn leave(&self) -> Result<()> {
        self.heartbeat.abort();
        if self.member.closed.swap(true, Atomic::AcqRel) {
            return Ok(());
        }
        self.member.wake.notify_waiters();
        self.member.wake.notify_one();
        let seat = self.member.seat();
        self.member.store.write(move |round| membership::leave(round, seat)).await
    }
}

/// Keeps a member's seat while it lives.
async fn beat(member: std::sync::Weak<Member>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(member) = member.upgrade() else { return };
        if let Err(error) = member.coordinate().await {
            tracing::warn!(%error, topic = %member.subscription.topic, "the group could not be kept; trying again");
        }
    }
}

impl Member {
    fn seat(&self) -> Seat {
        Seat { member: self.id.load(Atomic::Acquire), ..self.seat }
    }

    fn open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("consumer")) } else { self.store.is_open() }
    }

    /// Renews the seat and brings ownership in line with the group's rows.
    async fn coordinate(&self) -> Result<()> {
        let _one_at_a_time = self.coordinating.lock().await;
        self.open()?;
        let overdue = self.state.lock().overdue(Instant::now());
        if !overdue.is_empty() {
            self.hand_back(overdue.clone()).await?;
            self.state.lock().lose(&overdue);
        }
        let (seat, session) = (self.seat(), clock::nanos(self.store.options.session));
        let known = self.state.lock().known();
        let standing = self.store.write(move |round| membership::stand(round, seat, &known, session)).await?;
        if self.closed.load(Atomic::Acquire) {
            // The leave was stored before this: a seat that was taken again must not stay.
            let gone = Seat { member: standing.member, ..self.seat };
            drop(self.store.submit(move |round| membership::leave(round, gone)));
            return Err(Error::closed("consumer"));
        }
        self.id.store(standing.member, Atomic::Release);
        self.state.lock().apply(standing, Instant::now());
        self.wake.notify_one();
        Ok(())
    }

    async fn hand_back(&self, partitions: Vec<u32>) -> Result<()> {
        let seat = self.seat();
        self.store.write(move |round| membership::release(round, seat, &partitions)).await
    }

    /// Reads what the owned partitions have, and whether the group changed.
    async fn fetch(&self) -> Result<()> {
        let wanted = self.state.lock().wanted(self.subscription.window_bytes.get());
        let seat = self.seat();
        let max = self.subscription.window.get().min(READ_AHEAD);
        let max_bytes = self.subscription.window_bytes.get() / wanted.len().max(1);
        let read = move |connection: &mut Connection| read(connection, seat, wanted, max, max_bytes);
        let (generation, fetched) = self.store.read(read).await?;
        let Some(generation) = generation else {
            return Err(
                Error::not_found("the topic or group was deleted").with("topic", &self.subscription.topic)
            );
        };
        let changed = {
            let mut state = self.state.lock();
            state.fetched(fetched);
            state.generation != generation
        };
        if changed { self.coordinate().await } else { Ok(()) }
    }

    fn look(&self, max: NonZeroUsize) -> Result<Option<Polled>> {
        let mut state = self.state.lock();
        match state.news.pop_front() {
            Some(News::Polled(polled)) => return Ok(Some(polled)),
            Some(News::Failed(error)) => return Err(error.with("topic", &self.subscription.topic)),
            None => {}
        }
        let deliveries = state.collect(max.get(), Instant::now());
        Ok((!deliveries.is_empty()).then_some(Polled::Deliveries(deliveries)))
    }

    /// Saves progress that was made in memory. What it returns is no longer ours.
    async fn save(&self) -> Result<Vec<u32>> {
        let seat = self.seat();
        let (progress, saving) = {
            // Under one lock, so that what was settled later is saved later.
            let mut state = self.state.lock();
            let progress = state.progress();
            if progress.is_empty() {
                return Ok(Vec::new());
            }
            let job = progress.clone();
            match self.store.submit(move |round| membership::save(round, seat, &job)) {
                Ok(saving) => (progress, saving),
                Err(error) => {
                    state.unsaved(&progress);
                    return Err(error);
                }
            }
        };
        let mut guard = Unsaved { member: self, progress };
        let lost = saving.await.map_err(|_| Error::closed("store"))??;
        guard.progress.clear();
        if !lost.is_empty() {
            self.state.lock().lose(&lost);
            self.wake.notify_one();
        }
        Ok(lost)
    }
}

/// Progress on its way to the file; whatever is left when this is dropped is saved again.
struct Unsaved<'a> {
    member: &'a Member,
    progress: Vec<membership::Progress>,
}

impl Drop for Unsaved<'_> {
    fn drop(&mut self) {
        if !self.progress.is_empty() {
            self.member.state.lock().unsaved(&self.progress);
        }
    }
}

/// One consistent look at the file: the group's generation and the rows of each wanted partition.
fn read(
    connection: &mut Connection,
    seat: Seat,
    wanted: Vec<Wanted>,
    max: usize,
    max_bytes: usize,
) -> Result<(Option<i64>, Vec<Fetched>)> {
    let view = connection.transaction().map_err(from_sqlite)?;
    let generation = view
        .prepare_cached("SELECT generation FROM eventbus_group WHERE id = ?1")
        .and_then(|mut statement| statement.query_row([seat.group], |row| row.get(0)).optional())
        .map_err(from_sqlite)?;
    let bounds: HashMap<u32, (u64, u64)> = view
        .prepare_cached("SELECT partition, first, next FROM eventbus_partition WHERE topic = ?1")
        .and_then(|mut statement| {
            statement
                .query_map([seat.topic], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))
                .and_then(Iterator::collect)
        })
        .map_err(from_sqlite)?;
    let mut fetched = Vec::new();
    for wanted in wanted {
        let Some((first, next)) = bounds.get(&wanted.partition).copied() else { continue };
        if first <= wanted.from && next <= wanted.from {
            continue;
        }
        let rows = if first > wanted.from {
            Vec::new()
        } else {
            row::read(&view, seat.topic, wanted.partition, wanted.from, next, max, max_bytes)?
        };
        fetched.push(Fetched { wanted, first, rows });
    }
    Ok((generation, fetched))
}

#[async_trait]
impl Consumer for SqliteConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let _one_at_a_time = self.polling.lock().await;
        let member = &*self.member;
        let mut news = member.store.news();
        loop {
            if member.open().is_err() {
                return Ok(Polled::Closed);
            }
            if let Some(polled) = member.look(max)? {
                return Ok(polled);
            }
            // Whatever is stored after this mark rings again.
            news.borrow_and_update();
            match member.fetch().await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Closed => return Ok(Polled::Closed),
                Err(error) => return Err(error),
            }
            if let Some(polled) = member.look(max)? {
                return Ok(polled);
            }
            let wake_at = member.state.lock().wake_at();
            let changed = async {
                tokio::select! {
                    changed = news.changed() => changed.map_err(|_| Error::closed("store")),
                    () = member.wake.notified() => Ok(()),
                }
            };
            match wake_at {
                None => changed.await?,
                Some(at) => match tokio::time::timeout_at(at, changed).await {
                    Ok(changed) => changed?,
                    Err(_) if !member.state.lock().overdue(Instant::now()).is_empty() => {
                        member.coordinate().await?
                    }
                    Err(_) => {}
                },
            }
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        let _saving = self.member.saving.lock().await;
        self.member.open()?;
        let mut lost = self.member.state.lock().settle(outcomes, Instant::now());
        let moved = self.member.save().await?;
        let state = self.member.state.lock();
        for (token, _) in outcomes {
            let Place { partition, epoch, .. } = Place::of(*token);
            let gone = moved.contains(&partition.0) || !state.owns(partition.0, epoch);
            if gone && !lost.contains(token) {
                lost.push(*token);
            }
        }
        drop(state);
        // A retry may be due at once, and room in the window lets more be read.
        self.member.wake.notify_one();
        Ok(Settled { lost })
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        let _saving = self.member.saving.lock().await;
        self.member.open()?;
        self.member.save().await?;
        let ours: Vec<u32> = {
            let mut state = self.member.state.lock();
            let ours: Vec<u32> = partitions
                .iter()
                .map(|partition| partition.0)
                .filter(|partition| state.owns_any(*partition))
                .collect();
            for partition in &ours {
                state.forget(*partition);
            }
            ours
        };
        self.member.hand_back(ours).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        self.member.open()?;
        let lost = self.member.state.lock().renew(tokens, lease_end(Instant::now(), lease));
        Ok(Settled { lost })
    }

    async fn close(&self, deadline: StdInstant) -> Result<()> {
        match tokio::time::timeout_at(Instant::from_std(deadline), self.leave()).await {
            Ok(Err(error)) if error.kind() == ErrorKind::Closed => Ok(()),
            Ok(left) => left,
            Err(_) => Err(Error::new(ErrorKind::Timeout, "the file did not take the leave in time")),
        }
    }
}

impl Drop for SqliteConsumer {
    fn drop(&mut self) {
        self.heartbeat.abort();
        if !self.member.closed.swap(true, Atomic::AcqRel) {
            let seat = self.member.seat();
            drop(self.member.store.submit(move |round| membership::leave(round, seat)));
        }
    }
}

impl fmt::Debug for SqliteConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteConsumer")
            .field("topic", &self.member.subscription.topic)
            .field("audience", &self.member.subscription.audience)
            .field("member", &self.member.id)
            .finish_non_exhaustive()
    }
}
