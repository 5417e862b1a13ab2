//! Time for leases and delays that a step of the wall clock cannot move.
//!
//! Deadlines that several processes share are in nanoseconds of the machine's monotonic clock, which
//! all processes of one boot read alike (clock_gettime(2), `CLOCK_MONOTONIC`). The boot's id is kept
//! in the file: after a restart of the machine every lease is over, and delays are converted through
//! the wall time stored beside them.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::time::since_boot;
pub(super) use crate::time::{boot_id, from_nanos, nanos, to_nanos};

/// Nanoseconds of the machine's monotonic clock.
pub(super) fn monotonic() -> i64 {
    nanos(since_boot())
}

/// Nanoseconds since 1970 by the wall clock.
pub(super) fn wall() -> i64 {
    to_nanos(SystemTime::now())
}

/// Turns a stored deadline into one of this process, given what both clocks say now.
pub(super) fn to_instant(deadline: i64, now: Instant, now_monotonic: i64) -> Instant {
    let left = u64::try_from(deadline.saturating_sub(now_monotonic)).unwrap_or(0);
    now.checked_add(Duration::from_nanos(left)).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_passed_is_now() {
        let now = Instant::now();
        assert_eq!(to_instant(5, now, 10), now);
        assert_eq!(to_instant(15, now, 10), now + Duration::from_nanos(5));
    }
}
