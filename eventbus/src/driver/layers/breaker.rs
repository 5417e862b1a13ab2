//! The circuit breaker: when everything fails, what everything needs is down.
//!
//! Transient failures of different keys, with no success between them, open it. While it is open no
//! handler runs but one probe at a time, nothing is handed back and no attempt is counted; what is in
//! hand fills the window, so intake stops. A probe that succeeds closes it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::driver::parked::planted::{Bug, planted};

/// The first pause before a probe, and the longest; it doubles with each failed probe.
const PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(in crate::driver) struct Breaker {
    /// Different keys that fail in a row before it opens.
    threshold: usize,
    state: Mutex<State>,
    /// Whether anything failed since the last success: nobody looks further while all is well.
    troubled: AtomicBool,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Keys that failed since the last success, as hashes.
    failing: HashSet<u64>,
    open: Option<Open>,
    stopped: bool,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    probe_at: Instant,
    pause: Duration,
    probing: bool,
}

/// Whether a handler may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::driver) enum Pass {
    Go,
    /// The breaker is open: this run decides whether it stays so.
    Probe,
    /// The driver is stopping: hand the event back as it is.
    Stopped,
}

impl Breaker {
    pub(in crate::driver) fn new(threshold: usize) -> Self {
        Self { threshold, state: Mutex::default(), troubled: AtomicBool::new(false), changed: Notify::new() }
    }

    /// Waits while the breaker is open; lets one probe pass at a time.
    pub(in crate::driver) async fn admit(&self) -> Pass {
        if !self.troubled.load(Atomic::Acquire) {
            return Pass::Go;
        }
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let wake_at = {
                let mut state = self.state.lock();
                let stopped = state.stopped;
                match &mut state.open {
                    None => return Pass::Go,
                    Some(_) if stopped => return Pass::Stopped,
                    Some(open) if !open.probing && open.probe_at <= Instant::now() => {
                        open.probing = true;
                        return Pass::Probe;
                    }
                    Some(open) if open.probing => None,
                    Some(open) => Some(open.probe_at),
                }
            };
            match wake_at {
                Some(at) => drop(tokio::time::timeout_at(at, changed).await),
                None => changed.await,
            }
        }
    }

    pub(in crate::driver) fn succeeded(&self) {
        if !self.troubled.load(Atomic::Acquire) {
            return;
        }
        let mut state = self.state.lock();
        self.troubled.store(false, Atomic::Release);
        state.failing.clear();
        if state.open.take().is_some() {
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Notes a transient failure of a key. Returns whether the breaker is open now.
    pub(in crate::driver) fn failed(&self, pass: Pass, key: u64) -> bool {
        let mut state = self.state.lock();
        self.troubled.store(true, Atomic::Release);
        if let Some(open) = &mut state.open {
            if pass == Pass::Probe {
                let pause = (open.pause * 2).min(MAX_PAUSE);
                *open = Open { probe_at: Instant::now() + open.pause, pause, probing: false };
                drop(state);
                self.changed.notify_waiters();
            }
            return true;
        }
        state.failing.insert(key);
        if state.failing.len() >= self.threshold && !planted(Bug::ParksEverything) {
            state.failing.clear();
            state.open = Some(Open { probe_at: Instant::now() + PAUSE, pause: PAUSE * 2, probing: false });
        }
        state.open.is_some()
    }

    /// A probe that ended in something else than success or a transient failure: let the next one pass.
    pub(in crate::driver) fn undecided(&self, pass: Pass) {
        if pass != Pass::Probe {
            return;
        }
        let mut state = self.state.lock();
        if let Some(open) = &mut state.open {
            open.probing = false;
            drop(state);
            self.changed.notify_waiters();
        }
    }

    pub(in crate::driver) fn is_open(&self) -> bool {
        self.state.lock().open.is_some()
    }

    /// Sends everybody who waits home.
    pub(in crate::driver) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLD: usize = 10;

    #[tokio::test(start_paused = true)]
    async fn opens_after_different_keys_and_closes_after_a_probe() {
        let breaker = Breaker::new(THRESHOLD);
        for _ in 0..100 {
            assert!(!breaker.failed(Pass::Go, 1), "one key that fails is not an outage");
        }
        for key in 2..THRESHOLD as u64 {
            assert!(!breaker.failed(Pass::Go, key));
        }
        assert!(breaker.failed(Pass::Go, 99));
        let started = Instant::now();
        assert_eq!(breaker.admit().await, Pass::Probe);
        assert_eq!(started.elapsed(), PAUSE);
        let second = tokio::time::timeout(Duration::from_secs(60), breaker.admit()).await;
        assert!(second.is_err(), "one probe at a time");
        assert!(breaker.failed(Pass::Probe, 1));
        assert_eq!(breaker.admit().await, Pass::Probe);
        breaker.succeeded();
        assert_eq!((breaker.admit().await, breaker.is_open()), (Pass::Go, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_the_wait() {
        let breaker = Breaker::new(THRESHOLD);
        let opened = (0..THRESHOLD as u64).any(|key| breaker.failed(Pass::Go, key));
        assert!(opened);
        assert!(breaker.is_open());
        breaker.stop();
        assert_eq!(breaker.admit().await, Pass::Stopped);
    }
}
