//! The tables, their version, and what an error of the server means.

use sqlx::{Connection, PgConnection, Row};

use crate::error::{Error, ErrorKind, Result};
use crate::sql::from_sqlx;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_version_is_taken() {
        assert!(known("1").is_ok());
        assert_eq!(known("2").unwrap_err().kind(), ErrorKind::Conflict);
        assert_eq!(known("x").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
