//! Times as RFC 3339 text, and as the nanoseconds that stores keep.

#[cfg(any(test, feature = "boot-clock", feature = "postgres"))]
use std::time::Duration;
use std::time::SystemTime;
#[cfg(any(test, feature = "sqlite", feature = "sqlx-postgres"))]
use std::time::UNIX_EPOCH;

/// Writes a time as RFC 3339 in UTC, with as many digits as it needs.
pub fn to_rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "out of range".to_owned(), |time| time.to_string())
}

/// Reads an RFC 3339 time with any offset; `None` if it is not one.
pub fn from_rfc3339(text: &str) -> Option<SystemTime> {
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

/// How long this machine runs: a clock that all its processes read alike and nobody can set (clock_gettime(2),
/// `CLOCK_MONOTONIC`). It means nothing in another boot.
#[cfg(feature = "boot-clock")]
pub fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Names the present boot of the machine; empty where the system has no such name.
#[cfg(feature = "boot-clock")]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// Nanoseconds since 1970; of times out of range the nearest.
#[cfg(any(test, feature = "sqlite", feature = "sqlx-postgres"))]
pub(crate) fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

/// The time so many nanoseconds after 1970.
#[cfg(any(test, feature = "postgres", feature = "sqlite"))]
pub(crate) fn from_nanos(nanos: i64) -> SystemTime {
    let size = Duration::from_nanos(nanos.unsigned_abs());
    let time = if nanos < 0 { UNIX_EPOCH.checked_sub(size) } else { UNIX_EPOCH.checked_add(size) };
    time.unwrap_or(UNIX_EPOCH)
}

/// Nanoseconds of a duration; of durations out of range the longest.
#[cfg(any(test, feature = "postgres", feature = "sqlite"))]
pub(crate) fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip() {
        for text in ["1970-01-01T00:00:00Z", "2026-11-21T08:00:00.123456789Z", "1969-12-31T23:59:59.5Z"] {
            assert_eq!(to_rfc3339(from_rfc3339(text).unwrap()), text);
        }
        assert_eq!(from_rfc3339("2026-11-21T09:00:00+01:00"), from_rfc3339("2026-11-21T08:00:00Z"));
        assert_eq!(from_rfc3339("yesterday"), None);
    }

    #[test]
    fn times_before_and_after_1970_round_trip() {
        for nanos in [0, 1, -1, 1_700_000_000_123_456_789, -86_400_000_000_000] {
            assert_eq!(to_nanos(from_nanos(nanos)), nanos);
        }
    }
}
