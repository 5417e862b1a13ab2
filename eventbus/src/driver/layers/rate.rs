//! The rate limit: so many runs a second, spread by a leaky bucket, for a dependency that takes no more.

use std::time::Duration;

#[cfg(feature = "rate-limit")]
use governor::clock::{Clock, Reference};
#[cfg(feature = "rate-limit")]
use governor::middleware::NoOpMiddleware;
#[cfg(feature = "rate-limit")]
use governor::state::{InMemoryState, NotKeyed};

/// The driver's timer as the limiter's clock, so that both stand still together.
#[cfg(feature = "rate-limit")]
#[derive(Debug, Clone)]
struct Timer(tokio::time::Instant);

#[cfg(feature = "rate-limit")]
impl Clock for Timer {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The limit of one subscription, if it has one.
#[derive(Debug, Default)]
pub(in crate::driver) struct Rate {
    #[cfg(feature = "rate-limit")]
    limiter: Option<governor::RateLimiter<NotKeyed, InMemoryState, Timer, NoOpMiddleware<Duration>>>,
}

impl Rate {
    /// Allows so many runs a second, one at a time.
    #[cfg(feature = "rate-limit")]
    pub(in crate::driver) fn new(per_second: Option<std::num::NonZeroU32>) -> Self {
        let limiter = per_second.map(|runs| {
            let quota = governor::Quota::per_second(runs).allow_burst(std::num::NonZeroU32::MIN);
            governor::RateLimiter::direct_with_clock(quota, Timer(tokio::time::Instant::now()))
        });
        Self { limiter }
    }

    /// Takes a place; returns how long to wait before trying again where there is none.
    pub(in crate::driver) fn take(&self) -> Option<Duration> {
        #[cfg(feature = "rate-limit")]
        if let Some(limiter) = &self.limiter {
            let wait = limiter.check().err()?;
            let now = limiter.clock().now();
            // A timer has whole milliseconds: what is shorter would be asked for at once, again and again.
            return Some(
                Duration::from_nanos(wait.earliest_possible().duration_since(now).as_u64())
                    .max(Duration::from_millis(1)),
            );
        }
        None
    }
}
