//! The wall clock as an open store sees it: it stamps events and bounds their age. Nothing that is due
//! depends on it, so that a step of the clock ends no lease and fires no delay.

use std::sync::atomic::{AtomicI64, Ordering as Atomic};
use std::time::{Duration, Instant, SystemTime};

#[derive(Debug)]
pub(crate) struct Wall {
    /// Nanoseconds that the clock was stepped by the conformance suite.
    stepped: AtomicI64,
    opened: (Instant, SystemTime),
}

impl Default for Wall {
    fn default() -> Self {
        Self { stepped: AtomicI64::new(0), opened: (Instant::now(), SystemTime::now()) }
    }
}

impl Wall {
    pub(crate) fn now(&self) -> SystemTime {
        let (now, stepped) = (SystemTime::now(), self.stepped.load(Atomic::Relaxed));
        let step = Duration::from_nanos(stepped.unsigned_abs());
        let there = if stepped < 0 { now.checked_sub(step) } else { now.checked_add(step) };
        there.unwrap_or(now)
    }

    /// The time against which ages are counted: what a step forward says has passed since opening, has not.
    pub(crate) fn steady(&self) -> SystemTime {
        let (timer, wall) = self.opened;
        wall.checked_add(timer.elapsed()).map_or_else(|| self.now(), |steady| steady.min(self.now()))
    }

    /// Steps the clock, as an operator or a time server does.
    #[cfg(any(test, feature = "conformance"))]
    pub(crate) fn step(&self, by_nanos: i64) {
        self.stepped.fetch_add(by_nanos, Atomic::Relaxed);
    }
}
