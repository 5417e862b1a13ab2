//! The tables, their version, and what an error of the server means.

use sqlx::{Connection, PgConnection, Row};

use crate::error::{Error, ErrorKind, Result};
use crate::sql::from_sqlx;

/// The version this code reads and writes.
const VERSION: u64 = 2;

/// What changes with every event is never updated, only inserted and deleted: while somebody holds a snapshot (a dump, a long
/// report), the server keeps every version of a row and reads through all of them to find the last one. Where a partition ends is
/// what its last event says; where a group stands is its last row of `eventbus_settled`. Both are found from the end of an index,
/// where nothing dead is. Counters that change rarely are updated in place: half of their pages is left free.
const TABLES: &str = r#"
CREATE TABLE eventbus_meta (name text PRIMARY KEY, value text NOT NULL);
CREATE TABLE eventbus_topic (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL UNIQUE, partitions integer NOT NULL,
  max_age bigint, max_events bigint);
CREATE TABLE eventbus_partition (
  topic bigint NOT NULL, partition integer NOT NULL, first bigint NOT NULL DEFAULT 0, PRIMARY KEY (topic, partition))
  WITH (fillfactor = 50);
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
INSERT INTO eventbus_meta VALUES ('version', '2');
"#;

/// What version 2 added. A function that may change things looks anew with each of its statements (manual, Function Volatility
/// Categories): it sees what was committed while its caller waited for the lock of the partition.
const ENDS: &str = r#"
CREATE TABLE eventbus_settled (
  grp bigint NOT NULL, partition integer NOT NULL, epoch bigint NOT NULL, floor bigint NOT NULL,
  PRIMARY KEY (grp, partition, epoch, floor));
CREATE VIEW eventbus_range AS
  SELECT p.topic, p.partition, p.first, greatest(p.first, (
    SELECT e."offset" + 1 FROM eventbus_event e
    WHERE e.topic = p.topic AND e.partition = p.partition AND e."offset" >= p.first ORDER BY e."offset" DESC LIMIT 1)) AS next
  FROM eventbus_partition p;
CREATE VIEW eventbus_position AS
  SELECT c.grp, c.partition, c.epoch, c.owner, greatest(c.floor, (
    SELECT s.floor FROM eventbus_settled s
    WHERE s.grp = c.grp AND s.partition = c.partition AND s.epoch = c.epoch ORDER BY s.floor DESC LIMIT 1)) AS floor
  FROM eventbus_cursor c;
CREATE FUNCTION eventbus_head(of_topic bigint, of_partition integer, first bigint, OUT next bigint, OUT last_stored bigint)
  LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  SELECT e."offset" + 1, e.stored_at INTO next, last_stored FROM eventbus_event e
  WHERE e.topic = of_topic AND e.partition = of_partition AND e."offset" >= first ORDER BY e."offset" DESC LIMIT 1;
  next := greatest(first, next);
END $$;
"#;

/// The tables of version 1 kept a partition's end, and a group's position, in rows that were updated. Programs of that version
/// that still run find a column missing: they fail, and lose nothing.
const FROM_VERSION_1: &str = r#"
LOCK TABLE eventbus_partition, eventbus_cursor IN ACCESS EXCLUSIVE MODE;
UPDATE eventbus_partition p SET first = p.next WHERE p.first < p.next AND NOT EXISTS (
  SELECT 1 FROM eventbus_event e WHERE e.topic = p.topic AND e.partition = p.partition AND e."offset" >= p.first);
ALTER TABLE eventbus_partition DROP COLUMN next, DROP COLUMN last_stored;
UPDATE eventbus_meta SET value = '2' WHERE name = 'version';
"#;

/// Names the lock under which tables are created: the bytes of "eventbus".
const LOCK: i64 = 0x6576_656e_7462_7573;

/// Creates what is missing, brings up what an older version wrote, and refuses what a newer one did.
pub(super) async fn migrate(connection: &mut PgConnection) -> Result<()> {
    if let Some(version) = version(connection).await?
        && is_ours(&version)?
    {
        return Ok(());
    }
    let mut transaction = connection.begin().await.map_err(from_sqlx)?;
    // Two programs that start at once must not both create.
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
    lock.execute(&mut *transaction).await.map_err(from_sqlx)?;
    let missing = match version(&mut transaction).await? {
        None => Some(TABLES),
        Some(version) => (!is_ours(&version)?).then_some(FROM_VERSION_1),
    };
    for tables in missing.into_iter().flat_map(|missing| [missing, ENDS]) {
        sqlx::raw_sql(tables).execute(&mut *transaction).await.map_err(from_sqlx)?;
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

/// Whether tables are of this version; false of the one before, which is brought up.
fn is_ours(version: &str) -> Result<bool> {
    match (version.parse::<u64>(), VERSION) {
        (Ok(found), known) if found == known => Ok(true),
        (Ok(1), _) => Ok(false),
        (Ok(found), known) if found > known => Err(Error::new(
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
    fn a_newer_version_is_refused() {
        assert!(is_ours("2").unwrap());
        assert!(!is_ours("1").unwrap());
        assert_eq!(is_ours("3").unwrap_err().kind(), ErrorKind::Conflict);
        assert_eq!(is_ours("x").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
