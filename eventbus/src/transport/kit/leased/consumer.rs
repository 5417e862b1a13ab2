//! One member: polls what its partitions have, saves what is settled, keeps its seat.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant as StdInstant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Notify, OnceCell, OwnedMutexGuard};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::partitions::{News, Partitions};
use super::{Seat, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::kit::cursor::lease_end;
use crate::transport::kit::hand::Place;
use crate::transport::{Consumer, Polled, Settle, Settled, Token};

pub(in crate::transport) struct LeasedConsumer<S: Store> {
    member: Arc<Member<S>>,
    /// One poll reads at a time; a second one waits behind it.
    polling: tokio::sync::Mutex<()>,
    heartbeat: JoinHandle<()>,
}

/// Shared with the heartbeat, and with saves on their way.
struct Member<S: Store> {
    store: Arc<S>,
    subscription: Subscription,
    group: S::Group,
    /// The seat's member id; a new one if others had declared it dead.
    id: AtomicU64,
    state: Mutex<Partitions>,
    /// One coordination with the group at a time.
    coordinating: Arc<tokio::sync::Mutex<()>>,
    /// One settle is saved at a time, so that what is settled later is saved later.
    saving: Arc<tokio::sync::Mutex<()>>,
    wake: Notify,
    closed: AtomicBool,
    /// Set when the leave is stored.
    left: OnceCell<()>,
}

/// Events of one partition that one read brings.
const READ_AHEAD: usize = 512;

impl<S: Store> LeasedConsumer<S> {
    /// Joins on a task of its own: a caller that goes away in the middle leaves a member that is whole, and
    /// that leaves the group when the task's result is dropped.
    pub(in crate::transport) async fn join(store: Arc<S>, wanted: &Subscription) -> Result<Arc<Self>> {
        let wanted = wanted.clone();
        let joining = tokio::spawn(async move {
            let seat = store.join(&wanted).await?;
            let member = Arc::new(Member {
                group: seat.group,
                id: AtomicU64::new(seat.member),
                state: Mutex::new(Partitions::new(&wanted)),
                subscription: wanted,
                coordinating: Arc::default(),
                saving: Arc::default(),
                wake: Notify::new(),
                closed: AtomicBool::new(false),
                left: OnceCell::new(),
                store,
            });
            // From here on a drop leaves the group.
            let heartbeat = tokio::spawn(beat(Arc::downgrade(&member), member.store.session() / 3));
            let consumer = Arc::new(Self { member, polling: tokio::sync::Mutex::default(), heartbeat });
            consumer.member.coordinate().await?;
            Ok(consumer)
        });
        joining.await.map_err(interrupted)?
    }

    /// Ends the membership and waits until that is stored.
    pub(in crate::transport) async fn leave(&self) -> Result<()> {
        self.heartbeat.abort();
        self.member.closed.store(true, Atomic::Release);
        self.member.wake.notify_waiters();
        self.member.wake.notify_one();
        // Whoever comes second waits for the first.
        let left = self.member.left.get_or_try_init(async || {
            // On a task of its own: a caller that goes away leaves all the same, behind what is being saved, and
            // behind a look at the group, which would take the seat again.
            let member = self.member.clone();
            let leaving = tokio::spawn(async move {
                let _saved = member.saving.lock().await;
                let _stood = member.coordinating.lock().await;
                member.store.leave(&member.seat()).await
            });
            leaving.await.map_err(interrupted)?
        });
        left.await?;
        Ok(())
    }
}

fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Unexpected, "the work on the store was interrupted").caused_by(error)
}

/// Keeps a member's seat while it lives.
async fn beat<S: Store>(member: Weak<Member<S>>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(member) = member.upgrade() else { return };
        if let Err(error) = member.coordinate().await {
            tracing::warn!(%error, topic = %member.subscription.topic, "the group could not be kept; trying again");
        }
    }
}

impl<S: Store> Member<S> {
    fn seat(&self) -> Seat<S::Group> {
        Seat { group: self.group.clone(), member: self.id.load(Atomic::Acquire) }
    }

    fn open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("consumer")) } else { self.store.is_open() }
    }

    /// Renews the seat and brings ownership in line with the group.
    ///
    /// On a task of its own, which holds the turn to its end: what the store was asked in vain must be over before
    /// it is asked again, or an old answer would take a partition under an epoch that nobody here knows.
    async fn coordinate(self: &Arc<Self>) -> Result<()> {
        let turn = self.coordinating.clone().lock_owned().await;
        self.open()?;
        let member = self.clone();
        let coordinating = tokio::spawn(async move {
            let coordinated = member.stand().await;
            drop(turn);
            coordinated
        });
        coordinating.await.map_err(interrupted)?
    }

    async fn stand(&self) -> Result<()> {
        let overdue = self.state.lock().overdue(Instant::now());
        if !overdue.is_empty() {
            self.store.release(&self.seat(), overdue.clone()).await?;
            self.state.lock().lose(&overdue);
        }
        let known = self.state.lock().known();
        let standing = self.store.stand(&self.seat(), known).await?;
        if self.closed.load(Atomic::Acquire) {
            // The leave was stored before this: a seat that was taken again must not stay.
            self.store.leave_soon(Seat { group: self.group.clone(), member: standing.member });
            return Err(Error::closed("consumer"));
        }
        self.id.store(standing.member, Atomic::Release);
        self.state.lock().apply(standing, Instant::now());
        self.wake.notify_one();
        Ok(())
    }

    /// Hands partitions back, on a task of its own as [`coordinate`](Self::coordinate) is.
    async fn release(self: &Arc<Self>, partitions: Vec<u32>) -> Result<()> {
        // Between forgetting a partition and letting the store forget it, a look at the group would take it again.
        let turns = (self.saving.clone().lock_owned().await, self.coordinating.clone().lock_owned().await);
        let member = self.clone();
        let releasing = tokio::spawn(async move {
            let ours: Vec<u32> = {
                let mut state = member.state.lock();
                partitions.into_iter().filter(|partition| state.forget(*partition)).collect()
            };
            let released = member.store.release(&member.seat(), ours).await;
            drop(turns);
            released
        });
        releasing.await.map_err(interrupted)?
    }

    /// Reads what the owned partitions have, and whether the group changed.
    async fn fetch(self: &Arc<Self>) -> Result<()> {
        let wanted = self.state.lock().wanted(self.subscription.window_bytes.get());
        let max = self.subscription.window.get().min(READ_AHEAD);
        let max_bytes = self.subscription.window_bytes.get() / wanted.len().max(1);
        let Some(look) = self.store.read(&self.seat(), wanted, max, max_bytes).await? else {
            return Err(
                Error::not_found("the topic or group was deleted").with("topic", &self.subscription.topic)
            );
        };
        let changed = {
            let mut state = self.state.lock();
            state.fetched(look.fetched);
            state.generation != Some(look.generation)
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

    /// Saves progress that was made in memory, on a task that a caller who goes away does not end. What it
    /// returns is no longer ours.
    async fn save(self: &Arc<Self>, turn: OwnedMutexGuard<()>) -> Result<Vec<u32>> {
        let progress = self.state.lock().progress();
        if progress.is_empty() {
            return Ok(Vec::new());
        }
        let member = self.clone();
        let saving = tokio::spawn(async move {
            let saved = member.store.save(&member.seat(), progress.clone()).await;
            match &saved {
                Ok(lost) if lost.is_empty() => {}
                Ok(lost) => {
                    member.state.lock().lose(lost);
                    member.wake.notify_one();
                }
                // The next settle saves it.
                Err(_) => member.state.lock().unsaved(&progress),
            }
            drop(turn);
            saved
        });
        saving.await.map_err(interrupted)?
    }
}

#[async_trait]
impl<S: Store> Consumer for LeasedConsumer<S> {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let _one_at_a_time = self.polling.lock().await;
        let member = &self.member;
        let mut news = member.store.news(&member.group);
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
            let look_at = member.store.look_every().map(|every| Instant::now() + every);
            let wake_at = member.state.lock().wake_at().into_iter().chain(look_at).min();
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
        let turn = self.member.saving.clone().lock_owned().await;
        self.member.open()?;
        let mut lost = self.member.state.lock().settle(outcomes, Instant::now());
        let moved = self.member.save(turn).await?;
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
        let turn = self.member.saving.clone().lock_owned().await;
        self.member.open()?;
        self.member.save(turn).await?;
        self.member.release(partitions.iter().map(|partition| partition.0).collect()).await
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
            Err(_) => Err(Error::new(ErrorKind::Timeout, "the store did not take the leave in time")),
        }
    }
}

impl<S: Store> Drop for LeasedConsumer<S> {
    fn drop(&mut self) {
        self.heartbeat.abort();
        if !self.member.closed.swap(true, Atomic::AcqRel) {
            self.member.store.clone().leave_soon(self.member.seat());
        }
    }
}

impl<S: Store> fmt::Debug for LeasedConsumer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(S::NAME)
            .field("topic", &self.member.subscription.topic)
            .field("audience", &self.member.subscription.audience)
            .field("member", &self.member.id)
            .finish_non_exhaustive()
    }
}

/// The consumers that a transport value opened, so that closing it closes them.
pub(in crate::transport) struct Consumers<S: Store>(Mutex<Vec<Weak<LeasedConsumer<S>>>>);

impl<S: Store> Default for Consumers<S> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<S: Store> Consumers<S> {
    /// Takes a consumer in; fails if the store was closed meanwhile, which this one would not hear of.
    pub(in crate::transport) fn add(&self, consumer: &Arc<LeasedConsumer<S>>) -> Result<()> {
        let mut known = self.0.lock();
        known.retain(|consumer| consumer.strong_count() > 0);
        known.push(Arc::downgrade(consumer));
        drop(known);
        consumer.member.open()
    }

    /// Ends all memberships; the first error is returned after all were tried. Each call waits for all of them.
    pub(in crate::transport) async fn leave(&self) -> Result<()> {
        let open: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        let mut outcome = Ok(());
        for consumer in open {
            outcome = outcome.and(consumer.leave().await);
        }
        outcome
    }
}
