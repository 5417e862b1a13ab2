//! The driver: polls for free room, runs handlers in lanes, settles after outputs are confirmed, hands
//! partitions over, drains.
//!
//! ```text
//!  poll ──▶ lanes (one key at a time, N keys in parallel) ──▶ outputs confirmed ──▶ settle
//!    ▲                                                                               │
//!    └──────────── room in the window ◀──────────────────────────────────────────────┘
//! ```
//! It never settles before the effect, and never after a partition is lost.

mod books;
mod handle;
mod lanes;
mod layers;
mod outputs;
mod parked;
mod run;
mod silence;
mod subscribed;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use self::parked::{HeldKey, ParkedKeys};
pub(crate) use self::subscribed::Subscribed;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Group, Topic};

/// Pause after a failure of the transport itself, and its longest.
const PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(5);

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
    /// Deliveries of events that were handled before, whose handler was not run again.
    pub duplicates: u64,
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
        self.duplicates += other.duplicates;
        self.parked += other.parked;
        self.held += other.held;
        self.in_flight += other.in_flight;
    }
}

/// How one subscription of a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// The topic.
    pub topic: Topic,
    /// The group.
    pub group: Group,
    /// How it is.
    pub state: HealthState,
}

/// What a subscription does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HealthState {
    /// It takes and handles events.
    Running,
    /// It goes on as far as it can, and tries again what fails.
    Degraded {
        /// What fails.
        reason: &'static str,
    },
    /// It takes no more events until what it waits for is there.
    Paused {
        /// What it waits for.
        reason: &'static str,
    },
}

impl Health {
    /// Tells whether nothing is wrong.
    pub fn is_running(&self) -> bool {
        self.state == HealthState::Running
    }

    /// Returns what is wrong, if anything is.
    pub fn reason(&self) -> Option<&'static str> {
        match self.state {
            HealthState::Running => None,
            HealthState::Degraded { reason } | HealthState::Paused { reason } => Some(reason),
        }
    }
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
            observer.joined(subscription.clone());
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

    /// Returns a handle that sees the same and can be kept elsewhere, such as behind a health page.
    pub fn monitor(&self) -> Monitor {
        Monitor {
            subscriptions: self.subscriptions.iter().map(|(subscription, _)| subscription.clone()).collect(),
        }
    }

    /// Describes the subscriptions, a line each: topic, group, lanes, retry, dead letters.
    pub fn describe(&self) -> Vec<String> {
        self.subscriptions.iter().map(|(subscription, _)| subscription.to_string()).collect()
    }

    /// Waits until a subscription ends by itself, and says why: its topic was deleted, or its group closed.
    ///
    /// # Cancellation
    /// Safe: what ended is still reported by [`stop`](Self::stop) or the next call.
    pub async fn failed(&mut self) -> Error {
        let (at, ended) = std::future::poll_fn(|task| {
            let ends = self.subscriptions.iter_mut().enumerate().find_map(|(at, (_, handle))| {
                match std::pin::Pin::new(handle).poll(task) {
                    std::task::Poll::Ready(ended) => Some((at, ended)),
                    std::task::Poll::Pending => None,
                }
            });
            ends.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        })
        .await;
        let (subscription, _) = self.subscriptions.remove(at);
        let by_itself = || Error::new(ErrorKind::Unexpected, "the subscription ended by itself");
        let error = match ended {
            Ok(Ok(())) => by_itself(),
            Ok(Err(error)) => error,
            Err(panic) => by_itself().caused_by(panic),
        };
        error.with("subscription", subscription)
    }

    /// Stops intake, finishes what is in hand, settles, leaves; within the service's budget.
    ///
    /// # Errors
    /// [`Timeout`](ErrorKind::Timeout) if handlers were still running at the end of the budget: their
    /// events are redelivered.
    ///
    /// # Cancellation
    /// The rest stops without draining; what was in hand is redelivered.
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

/// Looks at a service from elsewhere; it does not keep the service running.
#[derive(Debug, Clone)]
pub struct Monitor {
    subscriptions: Vec<Arc<Subscribed>>,
}

impl Monitor {
    /// Returns what was done so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.subscriptions.iter().for_each(|subscription| counts += subscription.counts());
        counts
    }

    /// Returns the health of each subscription.
    pub fn health(&self) -> Vec<Health> {
        self.subscriptions.iter().map(|subscription| subscription.health()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.subscriptions.iter().for_each(|(_, task)| task.abort());
    }
}

/// Waits for SIGTERM or Ctrl-C. It listens from the call on, not from the first poll: call it before anybody
/// is told that the program runs. Must be called inside a tokio runtime.
pub fn shutdown_signal() -> impl Future<Output = ()> + Send {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
        async move {
            // A signal that cannot be listened to does what it does without us.
            match (interrupt, terminate) {
                (Ok(mut interrupt), Ok(mut terminate)) => {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                }
                _ => std::future::pending().await,
            }
        }
    }
    #[cfg(not(unix))]
    async {
        drop(tokio::signal::ctrl_c().await);
    }
}
