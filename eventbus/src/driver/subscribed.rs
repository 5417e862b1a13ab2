//! One topic of a service: its consumer, its routes, its books.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use super::books::{Books, Settling};
use super::lanes::{Lanes, Work};
use super::layers::breaker::Breaker;
use super::layers::metrics::Meters;
use super::layers::rate::Rate;
use super::parked::Parked;
use super::parked::record::Sequence;
use super::silence::Silence;
use super::{Counts, Health, HealthState};
use crate::bus::Bus;
use crate::capability::{Capabilities, Lease, Ordering, Replay};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::extract::Context;
use crate::failure::Failure;
use crate::name::{Group, Topic};
use crate::observer::{Observer, Watched};
use crate::parking::{Followers, Parking, Waits};
use crate::service::{BoundRoute, Handling, Policy};
use crate::subscription::Subscription;
use crate::transport::{Consumer, Delivery, Publisher, Token, Transport};
use crate::versions::Unfit;

pub(crate) struct Subscribed {
    pub(super) topic: Topic,
    pub(super) group: Group,
    pub(super) dead_letters: Topic,
    pub(super) routes: Vec<BoundRoute>,
    /// Whether one of them takes batches.
    batches: bool,
    pub(super) policy: Policy,
    pub(super) source: String,
    consumer: RwLock<Arc<dyn Consumer>>,
    subscription: Subscription,
    pub(super) silence: Silence,
    pub(super) publisher: Arc<dyn Publisher>,
    pub(super) transport: Arc<dyn Transport>,
    /// Leases are renewed so often; `None` where there are none.
    pub(super) renew_every: Option<Duration>,
    pub(super) lease: Duration,
    /// Whether the transport holds back later events of a key that was handed back.
    pub(super) ordered: bool,
    pub(super) lanes: Lanes,
    pub(super) breaker: Breaker,
    pub(super) rate: Rate,
    pub(super) meters: Meters,
    pub(super) observer: Option<Arc<dyn Observer>>,
    /// Where failed events wait.
    pub(super) waits: Waits,
    pub(super) followers: Followers,
    pub(super) parked: Option<Parked>,
    stopping: watch::Sender<bool>,
    pub(super) books: Books,
    pub(super) settling: Settling,
    /// Rung whenever a delivery leaves the books.
    pub(super) settled: Notify,
    pub(super) counters: Counters,
    pub(super) polling_fails: AtomicBool,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) handled: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) redelivered: AtomicU64,
    pub(super) dead_lettered: AtomicU64,
    pub(super) unknown: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) duplicates: AtomicU64,
}

impl Subscribed {
    pub(crate) async fn open(
        bus: &Bus,
        group: &Group,
        topic: Topic,
        routes: Vec<BoundRoute>,
        policy: &Policy,
    ) -> Result<Self> {
        let capabilities = bus.transport().capabilities();
        let mut subscription = Subscription::group(topic.clone(), group.clone())
            .with_ordering(capabilities.ordering.min(Ordering::PerKey))
            .with_window(policy.window)
            .with_window_bytes(policy.window_bytes)
            .with_revoke_within(policy.revoke_within)
            .with_lease(policy.lease)
            .with_start(policy.start.clone());
        if capabilities.delay {
            subscription = subscription.with_delayed_retry();
        }
        let (waits, followers, logs) = parking(&policy.parking, &capabilities, subscription.ordering)?;
        let (publisher, consumer) =
            (bus.transport().publisher().await?, bus.transport().subscribe(&subscription).await?);
        let parked = match logs {
            true => {
                Some(Parked::open(bus.transport(), &topic, group, policy.parking, policy.window.get()).await?)
            }
            false => None,
        };
        let meters = Meters::new(&topic, group, routes.iter().map(|route| route.name));
        Ok(Self {
            observer: bus.observer().cloned(),
            waits,
            followers,
            parked,
            stopping: watch::channel(false).0,
            dead_letters: topic.dead_letters()?,
            source: format!("/{group}"),
            group: group.clone(),
            batches: routes.iter().any(|route| matches!(route.handling, Handling::Batch { .. })),
            routes,
            policy: policy.clone(),
            publisher,
            transport: bus.transport().clone(),
            consumer: RwLock::new(consumer),
            silence: Silence::new(policy.silence, policy.retry.max),
            renew_every: (capabilities.lease == Lease::Extendable).then_some(subscription.lease / 3),
            lease: subscription.lease,
            ordered: subscription.ordering >= Ordering::PerKey,
            topic,
            subscription,
            lanes: Lanes::default(),
            breaker: Breaker::new(policy.breaker_at.get()),
            rate: rate(policy),
            meters,
            books: Books::default(),
            settling: Settling::default(),
            settled: Notify::new(),
            counters: Counters::default(),
            polling_fails: AtomicBool::new(false),
        })
    }

    /// Finds the handler of an event. One that was redriven to a handler is for that handler alone.
    pub(super) fn route(&self, envelope: &Envelope) -> Option<&BoundRoute> {
        let group = envelope.extension("evt-replay-group");
        if group.is_some_and(|group| group != self.group.as_str()) {
            return None;
        }
        // A handler that was renamed since is found by the type, as at first.
        let named = group.and_then(|_| envelope.extension("evt-replay-handler"));
        // What failed because its version was unknown goes to whoever knows it now.
        let handler =
            named.filter(|name| *name != Unfit::NAME && self.routes.iter().any(|route| route.name == *name));
        self.routes.iter().filter(|route| handler.is_none_or(|name| name == route.name)).find(|route| {
            let is_let_in = || route.guard.as_ref().is_none_or(|guard| guard.holds(envelope.headers()));
            route.takes.fits(envelope) && is_let_in()
        })
    }

    /// What orders an event among others of its partition.
    pub(super) fn sequence(&self, envelope: &Envelope) -> Sequence {
        if self.ordered { Sequence::of(envelope) } else { Sequence::Event(envelope.id().clone()) }
    }

    /// A delivery on its way to a handler.
    pub(super) fn context(&self, route: &BoundRoute, delivery: Delivery, envelope: Envelope) -> Context {
        Context::new(self.topic.clone(), self.group.clone(), route.name, delivery, envelope)
    }

    /// Counts a retry, and says how long until then.
    pub(super) fn next_attempt(&self, handler: &str, failure: &Failure, attempt: u32) -> Duration {
        self.counters.retried.fetch_add(1, Atomic::Relaxed);
        tracing::debug!(%failure, attempt, topic = %self.topic, handler, "waits for another attempt");
        failure.delay().unwrap_or_else(|| self.policy.retry.delay(attempt, fastrand::f64()))
    }

    /// Whether the producer said that nobody needs the event any more.
    pub(super) fn is_expired(&self, envelope: &Envelope) -> bool {
        let expired = envelope.expiry().is_some_and(|end| end <= std::time::SystemTime::now());
        self.counters.expired.fetch_add(u64::from(expired), Atomic::Relaxed);
        expired
    }

    pub(super) fn consumer(&self) -> Arc<dyn Consumer> {
        self.consumer.read().clone()
    }

    /// Joins the group again, with a consumer in the place of the one that was left.
    ///
    /// # Cancellation
    /// Safe: the place stays as it is.
    pub(super) async fn join_again(&self) -> Result<()> {
        let consumer = self.transport.subscribe(&self.subscription).await?;
        *self.consumer.write() = consumer;
        Ok(())
    }

    /// Ends every wait of what is in hand.
    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits; returns whether the driver goes on.
    pub(super) async fn sleep(&self, time: Duration) -> bool {
        let mut stopping = self.stopping.subscribe();
        tokio::time::timeout(time, stopping.wait_for(|stopping| *stopping)).await.is_err()
    }

    /// The deliveries among some work; heads go back to the parking.
    pub(super) fn deliveries(&self, work: impl IntoIterator<Item = Work>) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        for work in work {
            match (work, &self.parked) {
                (Work::Delivery(delivery), _) => deliveries.push(delivery),
                (Work::Head(head), Some(parked)) => parked.give_back(&head),
                (Work::Head(_), None) => {}
            }
        }
        deliveries
    }

    /// How many others may go with this one in a call of its batch handler, if it has one.
    pub(super) fn batch_of(&self, delivery: &Delivery) -> Option<usize> {
        // Most services have none, and need not look for the route twice.
        if !self.batches {
            return None;
        }
        match self.route(delivery.content.envelope()?)?.handling {
            Handling::Batch { max, .. } if max.get() > 1 => Some(max.get() - 1),
            _ => None,
        }
    }

    /// Whether two deliveries go to the same handler.
    pub(super) fn go_together(&self, one: &Delivery, other: &Delivery) -> bool {
        let name = |delivery: &Delivery| {
            let route = self.route(delivery.content.envelope()?)?;
            Some(std::ptr::from_ref(route))
        };
        name(one) == name(other)
    }

    /// Whether a delivery is still ours.
    pub(super) fn holds(&self, token: Token) -> bool {
        self.books.holds(token)
    }

    pub(super) fn take(&self, deliveries: &[Delivery]) {
        let again = deliveries
            .iter()
            .filter(|delivery| delivery.attempt.is_some_and(|attempt| attempt.get() > 1))
            .count();
        self.counters.redelivered.fetch_add(again as u64, Atomic::Relaxed);
        self.meters.consumed(deliveries.len());
        self.silence.heard();
        self.books.enter(deliveries);
    }

    /// Strikes what was settled from the books.
    pub(super) fn strike(&self, tokens: impl Iterator<Item = Token>) {
        self.left(self.books.settle(tokens));
    }

    /// Strikes what is no longer ours: whoever works on it finds out.
    pub(super) fn lose(&self, tokens: impl Iterator<Item = Token>) {
        self.left(self.books.lose(tokens));
    }

    fn left(&self, n_deliveries: usize) {
        self.meters.settled(n_deliveries);
        self.settled.notify_waiters();
        if let Some(observer) = &self.observer {
            observer.settled();
        }
    }

    pub(crate) fn health(&self) -> Health {
        let degraded = |reason| HealthState::Degraded { reason };
        let state = if self.breaker.is_open() {
            HealthState::Paused { reason: "handlers of many keys fail: waiting for a probe to succeed" }
        } else if self.polling_fails.load(Atomic::Relaxed) {
            degraded("the transport fails: trying again")
        } else if self.silence.is_silent() {
            degraded("events wait and nothing is delivered: joined again")
        } else {
            self.parked.as_ref().and_then(Parked::ails).map_or(HealthState::Running, degraded)
        };
        Health { topic: self.topic.clone(), group: self.group.clone(), state }
    }

    pub(crate) fn counts(&self) -> Counts {
        let (parked, held) = self.parked.as_ref().map_or((0, 0), Parked::counts);
        let read = |counter: &AtomicU64| counter.load(Atomic::Relaxed);
        Counts {
            handled: read(&self.counters.handled),
            retried: read(&self.counters.retried),
            redelivered: read(&self.counters.redelivered),
            dead_lettered: read(&self.counters.dead_lettered),
            unknown: read(&self.counters.unknown),
            expired: read(&self.counters.expired),
            duplicates: read(&self.counters.duplicates),
            parked,
            held,
            in_flight: self.books.len() as u64,
        }
    }
}

#[cfg(feature = "rate-limit")]
fn rate(policy: &Policy) -> Rate {
    Rate::new(policy.per_second)
}

#[cfg(not(feature = "rate-limit"))]
fn rate(_: &Policy) -> Rate {
    Rate::default()
}

/// Chooses where failed events wait, what followers do, and whether a parking log is kept.
fn parking(
    wanted: &Parking,
    capabilities: &Capabilities,
    ordering: Ordering,
) -> Result<(Waits, Followers, bool)> {
    let can_log = capabilities.replay >= Replay::Offset && capabilities.admin;
    let lacks = |what: &str| {
        Err(Error::new(ErrorKind::Unsupported, format!("the transport cannot park like this: {what}")))
    };
    let waits = match wanted.waits {
        Waits::Auto if capabilities.delay => Waits::Transport,
        Waits::Auto if can_log => Waits::Log,
        Waits::Auto => Waits::Lane,
        Waits::Transport if !capabilities.delay => return lacks("it keeps no delays"),
        Waits::Log if !can_log => return lacks("a log needs replay by offset and an admin"),
        waits => waits,
    };
    let keyed = ordering >= Ordering::PerKey;
    let followers = match wanted.followers {
        Some(Followers::Hold) if !can_log || !keyed => {
            return lacks("to hold followers needs order, replay by offset and an admin");
        }
        Some(followers) => followers,
        None if can_log && keyed => Followers::Hold,
        None => Followers::Skip,
    };
    // Also where nothing is parked: what was begun before a process ended is noted there.
    Ok((waits, followers, can_log))
}

impl Watched for Subscribed {
    fn n_waiting(&self) -> u64 {
        self.parked.as_ref().map_or(0, Parked::n_waiting)
    }

    fn name(&self) -> String {
        format!("{} for {}", self.topic, self.group)
    }
}

impl fmt::Display for Subscribed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { topic, group, policy, dead_letters, .. } = self;
        let retry = policy.retry;
        write!(
            f,
            "{topic} → {group}   {} lanes   {} attempts, {:?} to {:?}   dead letters: {dead_letters}",
            policy.lanes, retry.attempts, retry.base, retry.max
        )
    }
}

impl fmt::Debug for Subscribed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribed")
            .field("topic", &self.topic)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}
