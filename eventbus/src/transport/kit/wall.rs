//! The wall clock as an open store sees it: it stamps events and bounds their age. Nothing that is due
//! depends on it, so that a step of the clock ends no lease and fires no delay.

use std::sync::atomic::{AtomicI64, Ordering as Atomic};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

/// A clock that is ahead of the timer by more since the last look has been stepped, and not slewed.
const TOLERANCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Wall {
    /// Nanoseconds that the clock was stepped by the conformance suite.
    stepped: AtomicI64,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    timer: Instant,
    wall: SystemTime,
    step: Option<Step>,
}

/// The last step forward.
#[derive(Debug, Clone, Copy)]
struct Step {
    timer: Instant,
    /// What the clock would say without any step.
    steady: SystemTime,
    /// What it said after it.
    wall: SystemTime,
}

impl Default for Wall {
    fn default() -> Self {
        let seen = Seen { timer: Instant::now(), wall: SystemTime::now(), step: None };
        Self { stepped: AtomicI64::new(0), seen: Mutex::new(seen) }
    }
}

impl Wall {
    pub(crate) fn now(&self) -> SystemTime {
        let (now, stepped) = (SystemTime::now(), self.stepped.load(Atomic::Relaxed));
        let step = Duration::from_nanos(stepped.unsigned_abs());
        let there = if stepped < 0 { now.checked_sub(step) } else { now.checked_add(step) };
        there.unwrap_or(now)
    }

    /// What was stamped before this is older than `age`. Time that a step forward says has passed has not: what
    /// was stamped before the step is as old as the timer says, until its age has passed since the step as well.
    pub(crate) fn oldest(&self, age: Duration) -> SystemTime {
        let (timer, now) = (Instant::now(), self.now());
        let mut seen = self.seen.lock();
        let expected = seen.wall + timer.duration_since(seen.timer);
        let steady = |step: &Step| step.steady + timer.duration_since(step.timer);
        if now > expected + TOLERANCE {
            let without = seen.step.as_ref().map_or(expected, steady);
            seen.step = Some(Step { timer, steady: without, wall: now });
        }
        (seen.timer, seen.wall) = (timer, now);
        let before = |time: SystemTime| time.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        match &seen.step {
            Some(step) if before(now) < step.wall => before(steady(step)).min(before(now)),
            _ => before(now),
        }
    }

    /// Steps the clock, as an operator or a time server does.
    #[cfg(any(test, feature = "conformance"))]
    pub(crate) fn step(&self, by_nanos: i64) {
        self.stepped.fetch_add(by_nanos, Atomic::Relaxed);
    }
}
