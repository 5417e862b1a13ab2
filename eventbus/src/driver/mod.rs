//! The driver: polls for free room, runs handlers in lanes, settles after outputs are confirmed, hands
//! partitions over, drains.
//!
//! ```text
//!  poll ──▶ lanes (one key at a time, N keys in parallel) ──▶ outputs confirmed ──▶ settle
//!    ▲                                                                               │
//!    └──────────── room in the window ◀──────────────────────────────────────────────┘
//! ```
//! It never settles before the effect, and never after a partition is lost.

mod handle;
mod lanes;
mod layers;
mod observer;
mod outputs;
mod parked;
mod run;
mod subscribed;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use self::observer::Observer;
pub use self::parked::{HeldKey, ParkedKeys};
pub(crate) use self::subscribed::Subscribed;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Group, Topic};

/// What a service has done so far, over all its topics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Deliveries whose handler succeeded.
    pub handled: u64,
    /// Deliveries that were handed back for another attempt.
    pub retried: u64,
    /// Deliveries that were not the first of their event.
    pub redelivered: u64,
    /// Events that were dead-lettered.
    pub dead_lettered: u64,
    /// Events of a type that no route knows.
    pub unknown: u64,
    /// Events that came after their `expirytime` and were not handled.
    pub expired: u64,
    /// Events that are parked now: they wait for an attempt, or behind an event of their key.
    pub parked: u64,
    /// Keys that wait now for an operator, because an event of theirs was dead-lettered.
    pub held: u64,
    /// Deliveries in hand now.
    pub in_flight: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.handled += other.handled;
        self.retried += other.retried;
        self.redelivered += other.redelivered;
        self.dead_lettered += other.dead_lettered;
        self.unknown += other.unknown;
        self.expired += other.expired;
        self.parked += other.parked;
        self.held += other.held;
        self.in_flight += other.in_flight;
    }
}

/// How a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// It takes and handles events.
    Running,
    /// It holds back or tries again.
    Degraded {
        /// The topic.
        topic: Topic,
        /// The group.
        group: Group,
        /// Why.
        reason: &'static str,
    },
}

/// A service at work. Dropping it stops the work without draining; what was in hand is redelivered.
#[derive(Debug)]
pub struct Running {
    subscriptions: Vec<(Arc<Subscribed>, JoinHandle<Result<()>>)>,
    stop: watch::Sender<bool>,
    drain_within: Duration,
}

impl Running {
    pub(crate) fn new(drain_within: Duration) -> Self {
        Self { subscriptions: Vec::new(), stop: watch::channel(false).0, drain_within }
    }

    pub(crate) fn add(&mut self, subscription: Arc<Subscribed>) {
        if let Some(observer) = &subscription.observer {
            observer.joined(&subscription);
        }
        let task = tokio::spawn(run::run(subscription.clone(), self.stop.subscribe(), self.drain_within));
        self.subscriptions.push((subscription, task));
    }

    /// Returns what was done so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.subscriptions.iter().for_each(|(subscription, _)| counts += subscription.counts());
        counts
    }

    /// Returns the health of each subscription.
    pub fn health(&self) -> Vec<Health> {
        self.subscriptions.iter().map(|(subscription, _)| subscription.health()).collect()
    }

    /// Describes the subscriptions, a line each: topic, group, lanes, retry, dead letters.
    pub fn describe(&self) -> Vec<String> {
        self.subscriptions.iter().map(|(subscription, _)| subscription.to_string()).collect()
    }

    /// Stops intake, finishes what is in hand, settles, leaves; within the service's budget.
    ///
    /// # Errors
    /// [`Timeout`](ErrorKind::Timeout) if handlers were still running at the end of the budget: their
    /// events are redelivered.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.send_replace(true);
        let mut outcome = Ok(());
        for (_, task) in self.subscriptions.drain(..) {
            let ended = task.await.unwrap_or_else(|error| {
                Err(Error::new(ErrorKind::Unexpected, "the driver ended by itself").caused_by(error))
            });
            outcome = outcome.and(ended);
        }
        outcome
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.subscriptions.iter().for_each(|(_, task)| task.abort());
    }
}

/// Waits for SIGTERM or Ctrl-C.
pub async fn shutdown_signal() {
    let interrupt = async { drop(tokio::signal::ctrl_c().await) };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}
