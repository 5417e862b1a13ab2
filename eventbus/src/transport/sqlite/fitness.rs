//! What can be said of the file and of the library that reads it.

use rusqlite::Connection;

use super::schema::from_sqlite;
use crate::error::Result;
use crate::fitness::Probe;

/// Before this version the write-ahead log can corrupt the file.
const SOUND: i32 = 3_051_003;

pub(super) fn probes(connection: &Connection) -> Result<Vec<Probe>> {
    let ask = |sql: &str| -> Result<String> {
        connection.query_row(sql, [], |row| row.get(0)).map_err(from_sqlite)
    };
    let (whole, journal) = (ask("PRAGMA quick_check(1)")?, ask("PRAGMA journal_mode")?);
    Ok(vec![
        Probe::good("integrity", &whole).or_bad(
            whole == "ok",
            "stop the programs, keep a copy of the file, and restore the last good one",
        ),
        Probe::good("journal mode", &journal).or_bad(
            journal == "wal",
            "open it with a program of this framework: it sets the write-ahead log",
        ),
        Probe::good("library", rusqlite::version()).or_bad(
            rusqlite::version_number() >= SOUND,
            "build with the bundled SQLite, or a system one of 3.51.3 or later",
        ),
    ])
}
