//! What the settings of a PostgreSQL server, and other programs on it, mean for what it confirms.

use std::time::{Duration, SystemTime};

use sqlx::{PgConnection, Row};

use super::from_sqlx;
use crate::error::Result;
use crate::fitness::Probe;
use crate::time::to_nanos;

/// A transaction that is open for so long keeps dead rows from being removed, and the tables grow.
const LONG: Duration = Duration::from_secs(600);

/// Clocks that differ by more make times of events misleading.
const SKEW: Duration = Duration::from_secs(5);

/// Looks at a server: whether a crash loses what it confirmed, what holds it back, whether its clock is ours.
///
/// # Errors
/// Transient.
///
/// # Cancellation
/// Safe.
pub async fn postgres_probes(connection: &mut PgConnection) -> Result<Vec<Probe>> {
    let before = SystemTime::now();
    let row = sqlx::query(
        "SELECT current_setting('fsync'), current_setting('full_page_writes'),
            current_setting('server_version'),
            (SELECT count(*) FROM pg_prepared_xacts),
            (SELECT coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)), 0)::float8
             FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()),
            extract(epoch FROM clock_timestamp())::float8",
    );
    let row = row.fetch_one(connection).await.map_err(from_sqlx)?;
    let after = SystemTime::now();
    let text = |at: usize| row.try_get::<String, _>(at).map_err(from_sqlx);
    let number = |at: usize| row.try_get::<f64, _>(at).map_err(from_sqlx);
    let (fsync, pages, version) = (text(0)?, text(1)?, text(2)?);
    let n_prepared: i64 = row.try_get(3).map_err(from_sqlx)?;
    let oldest = Duration::try_from_secs_f64(number(4)?.max(0.0)).unwrap_or(Duration::MAX);
    let seconds = |time: SystemTime| to_nanos(time) as f64 / 1e9;
    // As far as the server's clock lies outside of the time that the question took.
    let theirs = number(5)?;
    let skew = (seconds(before) - theirs).max(theirs - seconds(after)).max(0.0);
    Ok(vec![
        Probe::good("server", version),
        Probe::good("fsync", &fsync)
            .or_bad(fsync == "on", "set fsync on: a crash of the machine loses confirmed events"),
        Probe::good("full page writes", &pages)
            .or_bad(pages == "on", "set full_page_writes on: a crash can tear pages"),
        Probe::good("prepared transactions", n_prepared)
            .or_doubtful(n_prepared == 0, "commit or roll back what pg_prepared_xacts shows"),
        Probe::good("longest transaction of others", format!("{} s", oldest.as_secs()))
            .or_doubtful(oldest < LONG, "end it: tables grow while it is open"),
        Probe::good("clock against ours", format!("{skew:.1} s apart"))
            .or_doubtful(skew < SKEW.as_secs_f64(), "have both machines keep the time"),
    ])
}
