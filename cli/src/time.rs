//! How times are shown to people.

use std::time::SystemTime;

use clap::ValueEnum;
use eventbus::time::to_rfc3339;
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The form of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Time {
    /// RFC 3339, in UTC.
    #[value(alias = "utc")]
    Iso,
    /// RFC 3339, in the time zone of this machine.
    Local,
    /// How long ago.
    Relative,
    /// Seconds since 1970.
    Unix,
}

impl Time {
    /// Shows a time.
    pub(crate) fn show(self, time: SystemTime) -> String {
        match self {
            Self::Iso => to_rfc3339(time),
            Self::Local => Timestamp::try_from(time).map_or_else(
                |_| to_rfc3339(time),
                |time| time.to_zoned(TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S%.3f%:z").to_string(),
            ),
            Self::Relative => {
                let ago = SystemTime::now().duration_since(time).unwrap_or_default();
                format!("{:.1}s ago", ago.as_secs_f64())
            }
            Self::Unix => {
                let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                format!("{:.3}", since.as_secs_f64())
            }
        }
    }
}
