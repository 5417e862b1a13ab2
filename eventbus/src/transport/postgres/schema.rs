//! The tables, their version, and what an error of the server means.

use sqlx::{Connection, PgConnection, Row};

use crate::error::{Error, ErrorKind, Result};

/// The version this code reads and writes.
const VERSION: &str = "1";

/// Offsets and counters are updated in place as long as their pages have room: half of a page is left free.
const TABLES: &str = r#"
CREATE TABLE eventbus_meta (name text PRIMARY KEY, value text NOT NULL);
CREATE TABLE eventbus_topic (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL UNIQUE, partitions integer NOT NULL,
  max_age bigint, max_events bigint);
CREATE TABLE eventbus_partition (
  topic bigint NOT NULL, partition integer NOT NULL, first bigint NOT NULL DEFAULT 0, next bigint NOT NULL DEFAULT 0,
  last_stored bigint NOT NULL DEFAULT 0, PRIMARY KEY (topic, partition)) WITH (fillfactor = 50);
CREATE TABLE eventbus_event (
  topic bigint NOT NULL, partition integer NOT NULL, "offset" bigint NOT NULL, stored_at bigint NOT NULL, size integer NOT NULL,
  id uuid, other_id text, source text, type text, version bigint, subject text, time bigint, content_type text, schema text,
  key bytea, extensions bytea, headers bytea, payload bytea, PRIMARY KEY (topic, partition, "offset"));
CREATE TABLE eventbus_group (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL, topic bigint NOT NULL,
  ephemeral boolean NOT NULL, generation bigint NOT NULL DEFAULT 0, UNIQUE (topic, name)) WITH (fillfactor = 50);
CREATE TABLE eventbus_cursor (
  grp bigint NOT NULL, partition integer NOT NULL, floor bigint NOT NULL, epoch bigint NOT NULL DEFAULT 0, owner bigint,
  PRIMARY KEY (grp, partition)) WITH (fillfactor = 50);
CREATE TABLE eventbus_exception (
  grp bigint NOT NULL, partition integer NOT NULL, "offset" bigint NOT NULL, attempt bigint, due timestamptz,
  PRIMARY KEY (grp, partition, "offset"));
CREATE TABLE eventbus_member (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, grp bigint NOT NULL, alive_until timestamptz NOT NULL,
  process text NOT NULL);
CREATE INDEX eventbus_member_by_group ON eventbus_member (grp);
INSERT INTO eventbus_meta VALUES ('version', '1');
"#;

/// Names the lock under which tables are created: the bytes of "eventbus".
const LOCK: i64 = 0x6576_656e_7462_7573;

/// Creates what is missing and refuses what a newer version wrote.
pub(super) async fn migrate(connection: &mut PgConnection) -> Result<()> {
    if let Some(version) = version(connection).await? {
        return known(&version);
    }
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    // Two programs that start at once must not both create.
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
    lock.execute(&mut *transaction).await.map_err(from_sqlx)?;
    match version(&mut transaction).await? {
        Some(version) => known(&version)?,
        None => {
            sqlx::raw_sql(TABLES).execute(&mut *transaction).await.map_err(from_sqlx)?;
        }
    }
    transaction.commit().await.map_err(from_sqlx)
}

async fn version(connection: &mut PgConnection) -> Result<Option<String>> {
    // Not to_regclass: it may answer from a cache that is older than the lock under which this is asked.
    let exists = sqlx::query(
        "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relname = 'eventbus_meta' AND pg_table_is_visible(oid))",
    );
    let exists = exists.fetch_one(&mut *connection).await.and_then(|row| row.try_get::<bool, _>(0));
    if !exists.map_err(from_sqlx)? {
        return Ok(None);
    }
    let version = sqlx::query("SELECT value FROM eventbus_meta WHERE name = 'version'");
    let version = version.fetch_one(connection).await.and_then(|row| row.try_get(0));
    version.map(Some).map_err(from_sqlx)
}

fn known(version: &str) -> Result<()> {
    match (version.parse::<u64>(), VERSION.parse::<u64>()) {
        (Ok(found), Ok(known)) if found == known => Ok(()),
        (Ok(found), Ok(known)) if found > known => Err(Error::new(
            ErrorKind::Conflict,
            "the tables were written by a newer version of eventbus: update this program",
        )
        .with("tables_version", found)
        .with("known_version", known)),
        _ => {
            Err(Error::new(ErrorKind::Corrupt, "the tables have no readable version").with("found", version))
        }
    }
}

/// Classes an error once, where its code is known ("PostgreSQL Error Codes", appendix A of the manual).
pub(super) fn from_sqlx(error: sqlx::Error) -> Error {
    let (kind, message) = match &error {
        sqlx::Error::Database(database) => of_code(&database.code().unwrap_or_default()),
        sqlx::Error::PoolTimedOut => (ErrorKind::Unavailable, "the server gave no connection in time"),
        sqlx::Error::PoolClosed => (ErrorKind::Closed, "the transport is closed"),
        sqlx::Error::Tls(_) => (ErrorKind::Unavailable, "TLS with the server failed"),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
            (ErrorKind::Unavailable, "the connection to the server was lost")
        }
        sqlx::Error::Configuration(_) => (ErrorKind::Config, "the address or its options cannot be used"),
        _ => (ErrorKind::Unexpected, "the server's answer was not understood"),
    };
    Error::new(kind, message).caused_by(error)
}

fn of_code(code: &str) -> (ErrorKind, &'static str) {
    match code {
        "28000" | "28P01" => (ErrorKind::Unauthorized, "the server refused the user or the password"),
        "42501" => (ErrorKind::Unauthorized, "the user lacks a right"),
        "3D000" => (ErrorKind::NotFound, "there is no such database"),
        "42P01" => (ErrorKind::NotFound, "the tables are gone"),
        "53100" => (ErrorKind::Full, "the server's disk is full"),
        "25006" => {
            (ErrorKind::Unavailable, "the server takes no writes: it is a replica or is set read-only")
        }
        "54000" => (ErrorKind::TooLarge, "a value is too large for the server"),
        "55P03" => (ErrorKind::Unavailable, "another transaction holds a lock for too long"),
        "40001" | "40P01" => (ErrorKind::Unavailable, "the server asks to try the transaction again"),
        "57014" => (ErrorKind::Timeout, "the server ended the statement"),
        _ if code.starts_with("08")
            || code.starts_with("53")
            || code.starts_with("57P")
            || code.starts_with("58") =>
        {
            (ErrorKind::Unavailable, "the server cannot work now")
        }
        _ => (ErrorKind::Unexpected, "the server refused a statement"),
    }
}

/// Tells whether a failed write may have been stored all the same: the connection ended before its answer.
pub(super) fn is_unknown(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // A server that shuts down may say so after the commit, while it waits for a replica.
        sqlx::Error::Database(database) => database.code().is_some_and(|code| code.starts_with("57P")),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_kinds() {
        for (code, kind) in [
            ("28P01", ErrorKind::Unauthorized),
            ("53100", ErrorKind::Full),
            ("53300", ErrorKind::Unavailable),
            ("57P01", ErrorKind::Unavailable),
            ("40P01", ErrorKind::Unavailable),
            ("22012", ErrorKind::Unexpected),
        ] {
            assert_eq!(of_code(code).0, kind, "{code}");
        }
    }

    #[test]
    fn only_our_version_is_taken() {
        assert!(known("1").is_ok());
        assert_eq!(known("2").unwrap_err().kind(), ErrorKind::Conflict);
        assert_eq!(known("x").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
