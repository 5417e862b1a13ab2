//! The tables in the file, their version, and the settings a connection must have.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::clock;
use crate::error::{Error, ErrorKind, Result};

/// The version this code reads and writes.
const VERSION: i64 = 1;

/// The first library version without the WAL-reset corruption of 3.7.0 to 3.51.2.
const MIN_LIBRARY: i32 = 3_051_003;

/// Positions pack topic, partition and offset, so that one b-tree holds the log of every partition
/// in order and needs no second index.
const OFFSET_BITS: u32 = 36;
const PARTITION_BITS: u32 = 12;
/// Most partitions of a topic in this store.
pub(super) const MAX_PARTITIONS: u32 = 1 << PARTITION_BITS;
/// Most events a partition can ever number.
pub(super) const MAX_OFFSET: u64 = (1 << OFFSET_BITS) - 1;

/// The row id of an event.
pub(super) fn position(topic: i64, partition: u32, offset: u64) -> i64 {
    topic << (OFFSET_BITS + PARTITION_BITS)
        | i64::from(partition) << OFFSET_BITS
        | offset.min(MAX_OFFSET) as i64
}

/// The offset in a row id.
pub(super) fn offset_of(position: i64) -> u64 {
    position as u64 & MAX_OFFSET
}

const TABLES: &str = "
CREATE TABLE eventbus_meta (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
CREATE TABLE eventbus_topic (
  id INTEGER PRIMARY KEY AUTOINCREMENT CHECK (id < 32768), name TEXT NOT NULL UNIQUE,
  partitions INTEGER NOT NULL, max_age INTEGER, max_events INTEGER) STRICT;
CREATE TABLE eventbus_partition (
  topic INTEGER NOT NULL, partition INTEGER NOT NULL, first INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0,
  last_stored INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (topic, partition)) STRICT, WITHOUT ROWID;
CREATE TABLE eventbus_event (
  position INTEGER PRIMARY KEY, stored_at INTEGER NOT NULL, id ANY, source TEXT, type TEXT, version INTEGER, subject TEXT,
  time INTEGER, content_type TEXT, schema TEXT, key BLOB, extensions BLOB, headers BLOB, payload BLOB, checksum INTEGER) STRICT;
CREATE TABLE eventbus_group (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, topic INTEGER NOT NULL, ephemeral INTEGER NOT NULL,
  generation INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, name)) STRICT;
CREATE TABLE eventbus_cursor (
  grp INTEGER NOT NULL, partition INTEGER NOT NULL, floor INTEGER NOT NULL, epoch INTEGER NOT NULL DEFAULT 0,
  owner INTEGER, PRIMARY KEY (grp, partition)) STRICT, WITHOUT ROWID;
CREATE TABLE eventbus_exception (
  grp INTEGER NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL, attempt INTEGER, due INTEGER, due_wall INTEGER,
  PRIMARY KEY (grp, partition, offset)) STRICT, WITHOUT ROWID;
CREATE TABLE eventbus_member (
  id INTEGER PRIMARY KEY AUTOINCREMENT, grp INTEGER NOT NULL, alive_until INTEGER NOT NULL, pid INTEGER NOT NULL) STRICT;
CREATE INDEX eventbus_member_by_group ON eventbus_member (grp);
";

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Writer,
    Reader,
}

/// Opens a connection with the settings that durability rests on, and checks that they took effect.
pub(super) fn open(path: &Path, role: Role, busy_timeout: Duration) -> Result<Connection> {
    if rusqlite::version_number() < MIN_LIBRARY {
        return Err(Error::config(
            "the SQLite library is older than 3.51.3, whose write-ahead log can corrupt the file",
        )
        .with("version", rusqlite::version()));
    }
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)
        .map_err(|error| from_sqlite(error).with("file", path.display()))?;
    configure(&connection, role, busy_timeout).map_err(|error| error.with("file", path.display()))?;
    Ok(connection)
}

fn configure(connection: &Connection, role: Role, busy_timeout: Duration) -> Result<()> {
    connection.busy_timeout(busy_timeout).map_err(from_sqlite)?;
    connection.set_prepared_statement_cache_capacity(64);
    let mode: String =
        connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(from_sqlite)?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(Error::config("the file cannot use write-ahead logging (a network file system?)")
            .with("journal_mode", mode));
    }
    connection.pragma_update(None, "synchronous", "FULL").map_err(from_sqlite)?;
    let level: i64 = connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).map_err(from_sqlite)?;
    if level < 2 {
        return Err(Error::config("the connection does not sync every commit").with("synchronous", level));
    }
    connection.pragma_update(None, "wal_autocheckpoint", 4000).map_err(from_sqlite)?;
    if role == Role::Reader {
        connection.pragma_update(None, "query_only", true).map_err(from_sqlite)?;
    }
    Ok(())
}

/// Creates what is missing and refuses what a newer version wrote.
pub(super) fn migrate(connection: &mut Connection) -> Result<()> {
    let transaction = connection
        .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
        .map_err(from_sqlite)?;
    let exists: bool = transaction
        .query_row("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'eventbus_meta')", [], |row| {
            row.get(0)
        })
        .map_err(from_sqlite)?;
    if !exists {
        transaction.execute_batch(TABLES).map_err(from_sqlite)?;
        transaction
            .execute("INSERT INTO eventbus_meta VALUES ('version', ?1)", [VERSION])
            .map_err(from_sqlite)?;
    }
    let version: Option<i64> = transaction
        .query_row("SELECT value FROM eventbus_meta WHERE name = 'version'", [], |row| row.get(0))
        .optional()
        .map_err(from_sqlite)?;
    match version {
        Some(VERSION) => {}
        Some(newer) if newer > VERSION => {
            return Err(Error::new(
                ErrorKind::Conflict,
                "the file was written by a newer version of eventbus: update this program",
            )
            .with("file_version", newer)
            .with("known_version", VERSION));
        }
        other => {
            return Err(Error::new(ErrorKind::Corrupt, "the file has no readable schema version")
                .with("found", format!("{other:?}")));
        }
    }
    adopt_boot(&transaction)?;
    transaction.commit().map_err(from_sqlite)
}

/// After a restart of the machine the monotonic clock began anew: no member lives, and delays are
/// converted through the wall clock.
fn adopt_boot(connection: &Connection) -> Result<()> {
    let boot = clock::boot_id();
    let known: Option<String> = connection
        .query_row("SELECT value FROM eventbus_meta WHERE name = 'boot'", [], |row| row.get(0))
        .optional()
        .map_err(from_sqlite)?;
    if known.as_deref() == Some(boot.as_str()) {
        return Ok(());
    }
    let run = |sql: &str| connection.execute(sql, []).map_err(from_sqlite);
    run("DELETE FROM eventbus_member")?;
    run("UPDATE eventbus_cursor SET owner = NULL")?;
    run("DELETE FROM eventbus_group WHERE ephemeral")?;
    connection
        .execute(
            "UPDATE eventbus_exception SET due = ?1 + max(0, due_wall - ?2) WHERE due IS NOT NULL",
            params![clock::monotonic(), clock::wall()],
        )
        .map_err(from_sqlite)?;
    connection
        .execute("INSERT OR REPLACE INTO eventbus_meta VALUES ('boot', ?1)", [boot])
        .map_err(from_sqlite)?;
    Ok(())
}

/// Classes an error of SQLite once, where its code is known.
pub(super) fn from_sqlite(error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode as Code;
    let (kind, message) = match error.sqlite_error_code() {
        Some(Code::DiskFull) => (ErrorKind::Full, "the disk or the file's bound is full"),
        Some(Code::DatabaseBusy | Code::DatabaseLocked) => {
            (ErrorKind::Unavailable, "another process holds the file's write lock")
        }
        Some(Code::SystemIoFailure) => (ErrorKind::Unavailable, "the file system failed"),
        Some(Code::NotADatabase) => (ErrorKind::Corrupt, "the file is not an SQLite database"),
        Some(Code::DatabaseCorrupt) => (ErrorKind::Corrupt, "the database file is damaged"),
        Some(Code::ReadOnly | Code::PermissionDenied | Code::AuthorizationForStatementDenied) => {
            (ErrorKind::Unauthorized, "the file is read-only for this program")
        }
        Some(Code::CannotOpen) => (ErrorKind::Config, "the file cannot be opened: does its folder exist?"),
        Some(Code::TooBig) => (ErrorKind::TooLarge, "a value is too large for SQLite"),
        _ => (ErrorKind::Unexpected, "SQLite refused a statement"),
    };
    Error::new(kind, message).caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_sort_as_topic_partition_offset() {
        let positions = [
            position(1, 0, 0),
            position(1, 0, 7),
            position(1, 1, 0),
            position(1, MAX_PARTITIONS - 1, MAX_OFFSET),
            position(2, 0, 0),
            position(32_767, 0, 0),
        ];
        assert!(positions.is_sorted() && positions.iter().all(|position| *position > 0));
        assert_eq!(offset_of(position(3, 9, 12_345)), 12_345);
    }

    #[test]
    fn a_newer_file_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        migrate(&mut connection).unwrap();
        connection.execute("UPDATE eventbus_meta SET value = 99 WHERE name = 'version'", []).unwrap();
        let error = migrate(&mut connection).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.to_string().contains("newer version"), "{error}");
    }

    #[test]
    fn a_new_boot_ends_leases_and_keeps_delays() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        let later = clock::wall() + 3_600_000_000_000;
        connection
            .execute("INSERT INTO eventbus_member (grp, alive_until, pid) VALUES (1, 1, 1)", [])
            .unwrap();
        connection.execute("INSERT INTO eventbus_exception VALUES (1, 0, 0, 2, 5, ?1)", [later]).unwrap();
        connection.execute("UPDATE eventbus_meta SET value = 'another' WHERE name = 'boot'", []).unwrap();
        migrate(&mut connection).unwrap();
        let members: i64 =
            connection.query_row("SELECT count(*) FROM eventbus_member", [], |row| row.get(0)).unwrap();
        let due: i64 =
            connection.query_row("SELECT due FROM eventbus_exception", [], |row| row.get(0)).unwrap();
        assert_eq!(members, 0);
        assert!((due - clock::monotonic() - 3_600_000_000_000).abs() < 10_000_000_000);
    }
}
