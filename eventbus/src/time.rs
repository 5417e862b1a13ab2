//! Times as RFC 3339 text.

use std::time::SystemTime;

/// Writes a time as RFC 3339 in UTC, with as many digits as it needs.
pub fn to_rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "out of range".to_owned(), |time| time.to_string())
}

/// Reads an RFC 3339 time with any offset; `None` if it is not one.
pub fn from_rfc3339(text: &str) -> Option<SystemTime> {
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
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
}
