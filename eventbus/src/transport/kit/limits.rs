//! What the options of every transport are held to.

use std::time::Duration;

use super::queue::MAX_WAITING_BYTES;
use crate::error::{Error, Result};

/// The shortest session where nothing else bounds it.
pub(in crate::transport) const SESSION: Duration = Duration::from_millis(100);
/// The longest session and the longest wait for an answer.
const HOUR: Duration = Duration::from_secs(3600);

/// Partitions of a topic, up to what the transport can have.
pub(in crate::transport) fn partitions(n: u32, most: u32) -> Result<()> {
    if (1..=most).contains(&n) {
        return Ok(());
    }
    Err(Error::config(format!("partitions must be 1 to {most}")))
}

/// The largest event: it must fit among those that wait.
pub(in crate::transport) fn max_event_bytes(bytes: usize) -> Result<()> {
    if (1..=MAX_WAITING_BYTES).contains(&bytes) {
        return Ok(());
    }
    Err(Error::config("max_event_bytes must be 1 to 64 MiB"))
}

/// How long a member may be silent; the shortest that the transport can tell is said as people write it.
pub(in crate::transport) fn session(session: Duration, least: Duration) -> Result<()> {
    if (least..=HOUR).contains(&session) {
        return Ok(());
    }
    Err(Error::config(format!("session must be {least:?} to 1h")))
}

/// The longest wait for an answer.
pub(in crate::transport) fn timeout(timeout: Duration) -> Result<()> {
    if !timeout.is_zero() && timeout <= HOUR {
        return Ok(());
    }
    Err(Error::config("timeout must be longer than zero, and 1h at most"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_are_allowed_and_nothing_beyond() {
        assert!(partitions(1, 4096).is_ok() && partitions(4096, 4096).is_ok());
        assert!(partitions(4097, 4096).unwrap_err().to_string().contains("1 to 4096"));
        assert!(partitions(0, 4096).is_err());
        assert!(max_event_bytes(1).is_ok() && max_event_bytes(64 << 20).is_ok());
        assert!(max_event_bytes(0).is_err() && max_event_bytes((64 << 20) + 1).is_err());
        let least = Duration::from_millis(100);
        assert!(session(least, least).is_ok() && session(HOUR, least).is_ok());
        assert!(session(Duration::from_millis(99), least).unwrap_err().to_string().contains("100ms to 1h"));
        assert!(session(HOUR + least, least).is_err());
        assert!(timeout(Duration::from_nanos(1)).is_ok() && timeout(HOUR).is_ok());
        assert!(timeout(Duration::ZERO).is_err() && timeout(HOUR + least).is_err());
    }
}
