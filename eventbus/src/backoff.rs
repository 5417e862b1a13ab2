//! How long to wait before the next attempt: exponential, capped, with full jitter.

use std::num::NonZeroU32;
use std::time::Duration;

/// When a failed delivery is tried again, and when it is given up.
///
/// A transient failure is first retried where it is, at once and briefly, because most pass; its lane
/// waits. Then the event is handed back to the transport with a delay: its key waits, others go on,
/// and the count and the delay survive this process. After the last attempt it is dead-lettered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retry {
    /// Runs in the lane before the event is handed back; at least 1. Default 3.
    pub in_lane: NonZeroU32,
    /// The longest pause between runs in the lane. Default 100 ms.
    pub in_lane_pause: Duration,
    /// Deliveries before the event is dead-lettered; at least 1. Default 8.
    pub attempts: NonZeroU32,
    /// The first delay between deliveries; doubles each time. Default 1 s.
    pub base: Duration,
    /// The longest delay between deliveries. Default 5 min.
    pub max: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            in_lane: NonZeroU32::MIN.saturating_add(2),
            in_lane_pause: Duration::from_millis(100),
            attempts: NonZeroU32::MIN.saturating_add(7),
            base: Duration::from_secs(1),
            max: Duration::from_secs(300),
        }
    }
}

impl Retry {
    /// Backs off from `base` to `max`, over so many deliveries.
    pub fn exponential(base: Duration, max: Duration, attempts: NonZeroU32) -> Self {
        Self { base, max, attempts, ..Self::default() }
    }

    /// Dead-letters at the first failure.
    pub fn never() -> Self {
        Self { in_lane: NonZeroU32::MIN, attempts: NonZeroU32::MIN, ..Self::default() }
    }

    /// Sets how often an event runs in its lane before it is handed back.
    #[must_use]
    pub fn with_in_lane(mut self, runs: NonZeroU32) -> Self {
        self.in_lane = runs;
        self
    }

    /// The delay after the given attempt: between zero and the exponential bound (full jitter), so
    /// that events that failed together do not return together.
    pub(crate) fn delay(&self, attempt: u32, random: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(30);
        let bound = self.base.saturating_mul(1 << doublings).min(self.max);
        bound.mul_f64(random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap() {
        let retry = Retry::default();
        let whole = |attempt| retry.delay(attempt, 1.0).as_secs();
        assert_eq!([1, 2, 3, 8, 9, 10, 4_000].map(whole), [1, 2, 4, 128, 256, 300, 300]);
        assert_eq!(retry.delay(5, 0.0), Duration::ZERO);
    }
}
