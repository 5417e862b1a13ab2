//! The loop of a relay: what is claimed, published and noted goes on side by side.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use eventbus::{Envelope, Error, ErrorKind, Publisher, Result, Topic};
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::flow::{Flow, Round, Sent, Writes};
use super::{Part, Policy, Shared};
use crate::bell::Bell;
use crate::row::{Pending, RowId, Shard};
use crate::store::{Leased, Store};

/// Rounds on their way at once.
const ROUNDS: usize = 4;
/// How soon the store is looked at again without a hint: at first, and after nothing was there for a while.
const LOOK_SOON: Duration = Duration::from_millis(5);
const LOOK_LATE: Duration = Duration::from_millis(250);
/// The pause when the broker takes nothing, or the database answers nothing.
const PAUSE_FROM: Duration = Duration::from_millis(50);
const PAUSE_TO: Duration = Duration::from_secs(5);

/// How long a relay that stops waits for the database, beside the broker.
const STOP: Duration = Duration::from_secs(5);

pub(super) struct Pump {
    store: Arc<dyn Store>,
    publisher: Arc<dyn Publisher>,
    bell: Bell,
    name: Arc<str>,
    identity: Arc<str>,
    lease: Duration,
    flow: Flow,
    shared: Arc<Shared>,
    /// When what is owned ends for us, well before it ends for others.
    until: Instant,
    /// Shards to be given back.
    surplus: Vec<Shard>,
    /// When to look again, and how long to wait if that finds nothing.
    look_at: Instant,
    look_every: Duration,
    /// Whether something was committed since the last look began.
    rung: bool,
    /// The broker is left alone until then, and after how many rounds in vain.
    resume_at: Instant,
    vain: u32,
    /// The same for writes.
    write_at: Instant,
    failed_writes: u32,
    /// Whether the broker is there again, so that what waits for it is due.
    unblock: bool,
    patience: u32,
}

type Outcomes = Vec<(RowId, Result<()>)>;

/// What is written in one go; and of what was owned what still is.
struct Written {
    writes: Writes,
    outcome: Result<Option<Vec<Shard>>>,
    released: Vec<Shard>,
    /// Whether what waits for the broker was to be due.
    unblocks: bool,
}

impl Pump {
    #[expect(clippy::too_many_arguments, reason = "called once, by the builder of all of it")]
    pub(super) fn new(
        store: Arc<dyn Store>,
        publisher: Arc<dyn Publisher>,
        bell: Bell,
        name: String,
        identity: String,
        lease: Duration,
        policy: Policy,
        shared: Arc<Shared>,
    ) -> Self {
        let now = Instant::now();
        Self {
            store,
            publisher,
            bell,
            name: name.into(),
            identity: identity.into(),
            lease,
            flow: Flow::new(policy),
            shared,
            until: now,
            surplus: Vec::new(),
            look_at: now,
            look_every: LOOK_SOON,
            rung: false,
            resume_at: now,
            vain: 0,
            write_at: now,
            failed_writes: 0,
            unblock: false,
            patience: policy.patience,
        }
    }

    pub(super) async fn run(mut self, mut stopping: watch::Receiver<bool>) {
        let (tell, mut leases) = watch::channel(None);
        let keeper =
            tokio::spawn(keep(self.store.clone(), self.name.clone(), self.lease, tell, self.shared.clone()));
        let mut rounds: JoinSet<Outcomes> = JoinSet::new();
        let mut claiming: Option<JoinHandle<Result<Vec<Pending>>>> = None;
        let mut writing: Option<JoinHandle<Written>> = None;
        let (mut bell, store) = (self.bell.ear(), self.store.clone());
        let mut news = Box::pin(store.news());
        let end = self.lease / 3 + STOP;
        let mut stops_at = stopping.borrow_and_update().then(|| Instant::now() + end);
        loop {
            let now = Instant::now();
            if now >= self.until {
                self.flow.own(&[]);
            }
            if stops_at.is_some_and(|end| now >= end) {
                tracing::warn!("the relay ends before all is noted; what is not is published again");
                break;
            }
            let stops = stops_at.is_some();
            if stops && rounds.is_empty() && claiming.is_none() && writing.is_none() && self.flow.is_done() {
                break;
            }
            if !stops && claiming.is_none() && (self.rung || now >= self.look_at) {
                claiming = self.claim();
            }
            while !stops && rounds.len() < ROUNDS && now >= self.resume_at && self.flow.is_ready() {
                let round = self.round();
                if !round.is_empty() {
                    rounds.spawn(publish_safely(self.publisher.clone(), round, self.lease / 3));
                }
            }
            if writing.is_none() && now >= self.write_at {
                writing = self.write();
            }
            let wake_at = self.wake_at(now, stops || claiming.is_some(), writing.is_some());
            tokio::select! {
                biased;
                Some(outcomes) = rounds.join_next() => self.published(outcomes.unwrap_or_default()),
                written = ended(&mut writing) => match written {
                    Ok(written) => self.written(written),
                    // What it would have noted is published again by whoever has the shards next.
                    Err(error) => return tracing::error!(%error, "the relay ends: its work on the database panicked"),
                },
                claimed = ended(&mut claiming) => self.claimed(claimed.unwrap_or_else(|error| Err(interrupted(error)))),
                Ok(()) = leases.changed() => {
                    if let Some(Leases { leased, until }) = leases.borrow_and_update().clone() {
                        self.flow.own(&leased.shards);
                        (self.until, self.surplus) = (until, leased.surplus);
                    }
                }
                () = bell.rung() => self.rung = true,
                () = &mut news => {
                    self.rung = true;
                    news = Box::pin(store.news());
                }
                changed = stopping.changed(), if !stops => {
                    if changed.is_err() || *stopping.borrow_and_update() {
                        stops_at = Some(Instant::now() + end);
                    }
                }
                () = tokio::time::sleep_until(wake_at) => {}
            }
        }
        drop((leases, news, rounds));
        let leaving = async {
            // A lease that came after it would hold what nobody uses.
            _ = keeper.await;
            self.store.leave(&self.name).await
        };
        if let Err(error) = bounded(STOP, leaving).await {
            tracing::debug!(%error, "the relay's shards are free when its lease ends");
        }
        _ = tokio::time::timeout(STOP, self.store.close()).await;
    }

    /// When something is to be done though nothing is heard.
    fn wake_at(&self, now: Instant, claims: bool, writes: bool) -> Instant {
        let mut at = now + LOOK_LATE;
        if !claims && self.flow.has_room() {
            at = at.min(self.look_at.max(now + Duration::from_millis(1)));
        }
        if self.flow.is_ready() && self.resume_at > now {
            at = at.min(self.resume_at);
        }
        if !writes && self.write_at > now {
            at = at.min(self.write_at);
        }
        at
    }

    fn claim(&mut self) -> Option<JoinHandle<Result<Vec<Pending>>>> {
        let claim = self.flow.claim()?;
        self.rung = false;
        self.shared.statements.fetch_add(1, Ordering::Relaxed);
        let store = self.store.clone();
        let limit = self.lease / 3;
        Some(tokio::spawn(async move { bounded(limit, store.claim(&claim)).await }))
    }

    fn claimed(&mut self, claimed: Result<Vec<Pending>>) {
        let now = Instant::now();
        match claimed {
            Ok(rows) => {
                self.shared.is_well(Part::Claims);
                self.look_every = match rows.is_empty() {
                    true => (self.look_every * 2).min(LOOK_LATE),
                    false => LOOK_SOON,
                };
                self.look_at = match self.flow.claimed(rows) {
                    // As soon as there is room again.
                    true => now,
                    false => now + self.look_every,
                };
            }
            Err(error) => {
                self.flow.claimed(Vec::new());
                self.database_fails(Part::Claims, &error);
                self.look_at = now + LOOK_LATE;
            }
        }
    }

    fn round(&mut self) -> Vec<Sent> {
        let mut round = self.flow.next_round();
        for sent in &mut round {
            let epoch = self.flow.epoch(sent.id);
            let envelope = std::mem::replace(&mut sent.envelope, Envelope::new("", ""));
            sent.envelope = envelope
                .with_extension("evt-source", &*self.identity)
                .with_extension("evt-seq", sent.id.0.to_string())
                .with_extension("evt-epoch", epoch.to_string());
        }
        round
    }

    fn published(&mut self, outcomes: Outcomes) {
        let n_failed = outcomes.iter().filter(|(_, outcome)| outcome.is_err()).count() as u64;
        let n_published = outcomes.len() as u64 - n_failed;
        self.shared.failed.fetch_add(n_failed, Ordering::Relaxed);
        self.shared.published.fetch_add(n_published, Ordering::Relaxed);
        let failure =
            outcomes.iter().find_map(|(_, outcome)| outcome.as_ref().err()).map(ToString::to_string);
        match self.flow.confirmed(outcomes, fastrand::f64) {
            Round::Went => {
                // Only then were keys blocked for want of a broker.
                self.unblock |= self.vain >= self.patience;
                (self.vain, self.resume_at) = (0, Instant::now());
                self.shared.is_well(Part::Broker);
            }
            Round::Stuck => {
                self.vain = self.vain.saturating_add(1);
                self.resume_at = Instant::now() + pause(self.vain);
                let reason = format!("the broker takes nothing: {}", failure.unwrap_or_default());
                if self.shared.ails(Part::Broker, reason.clone()) {
                    tracing::warn!(%reason, "it is tried again");
                }
            }
            Round::Refused => {
                let reason = format!("events could not be published: {}", failure.unwrap_or_default());
                if self.shared.ails(Part::Broker, reason.clone()) {
                    tracing::error!(%reason, "keys are blocked, or events are set aside");
                }
            }
        }
    }

    fn write(&mut self) -> Option<JoinHandle<Written>> {
        let (writes, released) = (self.flow.take_writes(), self.flow.left(&self.surplus));
        if writes.is_empty() && released.is_empty() && !self.unblock {
            return None;
        }
        self.surplus.retain(|shard| !released.contains(shard));
        let unblocks = std::mem::take(&mut self.unblock);
        let unblock = unblocks.then(|| self.flow.shards());
        let (store, name, epochs) = (self.store.clone(), self.name.clone(), self.flow.epochs());
        let n_statements = [writes.published.is_empty(), writes.blocked.is_empty(), writes.parked.is_empty()];
        let n_statements = n_statements.into_iter().filter(|is_empty| !is_empty).count() as u64;
        self.shared.statements.fetch_add(n_statements, Ordering::Relaxed);
        let limit = self.lease;
        Some(tokio::spawn(async move {
            let outcome = async {
                let mut owned = None;
                if !writes.published.is_empty() {
                    owned = Some(store.settle(&name, &epochs, &writes.published).await?);
                }
                // Before keys are blocked anew, which are not meant.
                if let Some(shards) = unblock {
                    store.unblock(&shards).await?;
                }
                if !writes.blocked.is_empty() {
                    store.block(&name, &epochs, &writes.blocked).await?;
                }
                if !writes.parked.is_empty() {
                    store.park(&name, &epochs, &writes.parked).await?;
                }
                if !released.is_empty() {
                    store.release(&name, &released).await?;
                }
                Ok(owned)
            };
            let outcome = bounded(limit, outcome).await;
            Written { writes, outcome, released, unblocks }
        }))
    }

    fn written(&mut self, written: Written) {
        let Written { writes, outcome, released, unblocks } = written;
        match outcome {
            Ok(owned) => {
                self.shared.is_well(Part::Writes);
                self.failed_writes = 0;
                self.shared.blocked.fetch_add(writes.blocked.len() as u64, Ordering::Relaxed);
                self.shared.parked.fetch_add(writes.parked.len() as u64, Ordering::Relaxed);
                for key in writes.blocked.iter().chain(&writes.parked) {
                    tracing::warn!(topic = %key.topic, row = key.head.0, attempts = key.attempts, error = %key.error,
                        "an event could not be published");
                }
                self.flow.written(&writes);
                if let Some(owned) = owned {
                    self.flow.lost(&writes.published, &owned);
                }
            }
            Err(error) => {
                self.database_fails(Part::Writes, &error);
                self.unblock |= unblocks;
                self.failed_writes = self.failed_writes.saturating_add(1);
                self.write_at = Instant::now() + pause(self.failed_writes);
                self.flow.return_writes(writes);
                self.surplus.extend(released);
            }
        }
    }

    fn database_fails(&self, part: Part, error: &Error) {
        if self.shared.ails(part, format!("the database fails: {error}")) {
            tracing::warn!(%error, "the database fails; it is tried again");
        }
    }
}

/// The end of a task, if there is one; takes it out then.
async fn ended<T>(task: &mut Option<JoinHandle<T>>) -> std::result::Result<T, tokio::task::JoinError> {
    let Some(running) = task else { return std::future::pending().await };
    let outcome = running.await;
    *task = None;
    outcome
}

/// An answer of the database within a bound: a way that swallows everything answers nothing for many minutes.
async fn bounded<T>(limit: Duration, answer: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::new(ErrorKind::Timeout, "the database did not answer in time"));
    tokio::time::timeout(limit, answer).await.unwrap_or_else(late)
}

fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Unavailable, "the work on the database was interrupted").caused_by(error)
}

fn pause(times: u32) -> Duration {
    let doubled = PAUSE_FROM.saturating_mul(1 << times.saturating_sub(1).min(10)).min(PAUSE_TO);
    doubled.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// The same, if a transport panics as well: then it is not known what became of the events.
async fn publish_safely(publisher: Arc<dyn Publisher>, round: Vec<Sent>, within: Duration) -> Outcomes {
    let ids: Vec<RowId> = round.iter().map(|sent| sent.id).collect();
    let unknown = |_| {
        let lost = || Err(Error::new(ErrorKind::Unknown, "the transport panicked"));
        ids.iter().map(|id| (*id, lost())).collect()
    };
    AssertUnwindSafe(publish(publisher, round, within)).catch_unwind().await.unwrap_or_else(unknown)
}

/// Publishes a round, and waits for the broker's answers; a topic that takes nothing does not hold up the others.
async fn publish(publisher: Arc<dyn Publisher>, round: Vec<Sent>, within: Duration) -> Outcomes {
    let end = Instant::now() + within;
    let mut topics: HashMap<Topic, (Vec<RowId>, Vec<Envelope>)> = HashMap::new();
    for Sent { id, topic, envelope } in round {
        let (ids, envelopes) = topics.entry(topic).or_default();
        ids.push(id);
        envelopes.push(envelope);
    }
    let each = topics.into_iter().map(|(topic, (ids, envelopes))| {
        let publisher = &publisher;
        async move {
            let took_nothing = |_| Err(Error::new(ErrorKind::Timeout, "the broker took nothing in time"));
            let accepted = tokio::time::timeout_at(end, publisher.enqueue(&topic, envelopes)).await;
            let receipts = match accepted.unwrap_or_else(took_nothing) {
                Ok(confirm) => tokio::time::timeout_at(end, confirm)
                    .await
                    .map_err(|_| Error::new(ErrorKind::Unknown, "the broker did not answer in time")),
                Err(error) => Err(error),
            };
            match receipts {
                Ok(receipts) => {
                    let mut receipts = receipts.into_iter();
                    let missing = || Err(Error::new(ErrorKind::Unknown, "the transport gave no outcome"));
                    let outcome = |id| (id, receipts.next().unwrap_or_else(missing).map(drop));
                    ids.into_iter().map(outcome).collect()
                }
                Err(error) => ids.into_iter().map(|id| (id, Err(error.duplicate()))).collect::<Vec<_>>(),
            }
        }
    });
    join_all(each).await.into_iter().flatten().collect()
}

#[derive(Debug, Clone)]
struct Leases {
    leased: Leased,
    until: Instant,
}

/// Keeps the lease, on a task of its own: a broker that is slow must not cost it.
async fn keep(
    store: Arc<dyn Store>,
    name: Arc<str>,
    lease: Duration,
    tell: watch::Sender<Option<Leases>>,
    shared: Arc<Shared>,
) {
    loop {
        let began = Instant::now();
        let wait = match bounded(lease / 3, store.lease(&name, lease)).await {
            Ok(leased) => {
                shared.is_well(Part::Leases);
                let until = began + lease * 2 / 3;
                if tell.send(Some(Leases { leased, until })).is_err() {
                    return;
                }
                lease / 5
            }
            Err(error) => {
                if shared.ails(Part::Leases, format!("the lease could not be renewed: {error}")) {
                    tracing::warn!(%error, "the lease could not be renewed; it is tried again");
                }
                (lease / 20).max(PAUSE_FROM)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = tell.closed() => return,
        }
    }
}
