//! Outbox and inbox in PostgreSQL.

mod floor;
mod store;

use std::collections::HashSet;
use std::sync::Arc;

use eventbus::fitness::Probe;
use eventbus::sql::{from_sqlx, postgres_probes};
use eventbus::{Error, ErrorKind, Result, Transport};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool, Postgres, Row as _};

use crate::backend::{Backend, Fate, Known, Steps, Uncommitted, known, missing, sealed};
use crate::direct::Direct;
use crate::namespace::Namespace;
use crate::operator::Dialect;
use crate::row::Row;
use crate::store::Store;

/// Makes the tables, each text the next version.
const TABLES: Steps = [include_str!("../../sql/postgres/1.sql"), include_str!("../../sql/postgres/2.sql")];

/// Names the lock under which tables are created: the bytes of "evoutbox".
const LOCK: i64 = 0x6576_6f75_7462_6f78;

/// Most rows that one helping of forgetting removes.
const HELPING: i64 = 10_000;

/// Transactions that hold keys, or that relays' floors wait for.
const BLOCKERS: &str = "SELECT to_json(format('process %s of %s: %s for %s s, holds %s keys, last said: %s', a.pid, coalesce(nullif(a.application_name, ''), 'a program'),
    a.state, round(extract(epoch FROM clock_timestamp() - a.xact_start)), (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid
      AND l.locktype = 'advisory' AND l.classid = 'EVToutbox'::regclass::oid AND l.granted), left(a.query, 60)))
  FROM pg_stat_activity a WHERE a.datname = current_database() AND a.xact_start < clock_timestamp() - interval '1 s'
    AND a.pid <> pg_backend_pid() AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) ORDER BY a.xact_start";

/// Makes a commit durable: what it acknowledges must not vanish with the server. Fails in a transaction that is failed.
const CHECK: &str = "SELECT set_config('synchronous_commit', 'on', true)
  WHERE current_setting('synchronous_commit') IN ('off', 'local')";

/// Where it is told that something was committed, for relays of other processes; the namespace is put before it.
const CHANNEL: &str = "evt.outbox";

/// What the server says of an id that it has not given out (yet).
const IN_THE_FUTURE: &str = "22023";

/// When the server came up after its last crash: its counters begin anew then, and a standby has counters of its own. A server
/// that crashed may have lost a transaction without a trace, and gives its id to another one, whose fate is not that of the first.
const LIFE: &str = "(extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()) * 1000000)::bigint";

#[doc(hidden)]
#[derive(Debug)]
pub struct Statements {
    append: Arc<str>,
    announce: Arc<str>,
    fate: Arc<str>,
    remember_message: Arc<str>,
    remember_sequence: Arc<str>,
    remember_messages: Arc<str>,
    remember_sequences: Arc<str>,
    intend: Arc<str>,
    end: Arc<str>,
    register: Arc<str>,
    forget: [Arc<str>; 2],
}

impl sealed::Sealed for Postgres {}

impl Backend for Postgres {
    type Writer = ();
    type Unit = sqlx::Transaction<'static, Self>;
    type Statements = Statements;

    fn statements(namespace: &Namespace) -> Statements {
        let sql = |text: &str| namespace.sql(text, '.');
        Statements {
            append: sql(&format!("SELECT evt.outbox_append($1, $2, $3, $4, $5, $6, $7)::text, {LIFE}")),
            // It says nothing that must outlive the server.
            announce: sql(&format!("SELECT set_config('synchronous_commit', 'off', true), pg_notify('{CHANNEL}', '')")),
            fate: sql(&format!("SELECT CASE pg_xact_status($1::text::xid8) WHEN 'aborted' THEN false
                WHEN 'committed' THEN CASE WHEN {LIFE} = $2 THEN true
                  ELSE (SELECT true FROM evt.outbox WHERE event_id = $3 LIMIT 1) END END")),
            remember_message: sql("INSERT INTO evt.inbox (consumer, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"),
            remember_sequence: sql("INSERT INTO evt.key_progress AS p (consumer, source, key, last_seq) VALUES ($1, $2, $3, $4)
                ON CONFLICT (consumer, source, key) DO UPDATE SET last_seq = excluded.last_seq, seen_at = excluded.seen_at
                WHERE p.last_seq < excluded.last_seq"),
            // Sorted, so that calls with events in common wait for each other in one direction. All of them are new most of
            // the time, and then there is nothing to tell.
            remember_messages: sql("WITH noted AS (INSERT INTO evt.inbox (consumer, message_id)
                  SELECT $1, i FROM unnest($2::uuid[]) AS e (i) ORDER BY i ON CONFLICT DO NOTHING RETURNING message_id)
                SELECT CASE WHEN count(*) < cardinality($2::uuid[]) THEN coalesce(array_agg(message_id), '{}') END FROM noted"),
            remember_sequences: sql("WITH noted AS (INSERT INTO evt.key_progress AS p (consumer, source, key, last_seq)
                  SELECT $1, s, k, n FROM unnest($2::text[], $3::bytea[], $4::bigint[]) AS e (s, k, n) ORDER BY s COLLATE \"C\", k
                  ON CONFLICT (consumer, source, key) DO UPDATE SET last_seq = excluded.last_seq, seen_at = excluded.seen_at
                  WHERE p.last_seq < excluded.last_seq RETURNING source, key)
                SELECT CASE WHEN count(*) < cardinality($3::bytea[]) THEN coalesce(array_agg(source), '{}') END,
                  CASE WHEN count(*) < cardinality($3::bytea[]) THEN coalesce(array_agg(key), '{}') END FROM noted"),
            intend: sql("INSERT INTO evt.intent AS i (consumer, message_id)
                SELECT $1::text, $2::uuid WHERE NOT EXISTS (SELECT 1 FROM evt.inbox WHERE consumer = $1 AND message_id = $2)
                ON CONFLICT (consumer, message_id) DO UPDATE SET runs = i.runs + 1, begun_at = now() RETURNING runs"),
            end: sql("DELETE FROM evt.intent WHERE consumer = $1 AND message_id = $2"),
            register: sql("WITH before AS (SELECT memory FROM evt.consumer WHERE consumer = $1),
                noted AS (INSERT INTO evt.consumer AS c VALUES ($1, $2, $3)
                  ON CONFLICT (consumer) DO UPDATE SET remembers_seconds = excluded.remembers_seconds WHERE c.memory = excluded.memory)
                SELECT memory FROM before"),
            // A row that nothing else marks as too old is found by the index of ranges.
            forget: [sql("DELETE FROM evt.inbox WHERE ctid = ANY (ARRAY (SELECT i.ctid FROM evt.inbox i
                JOIN evt.consumer c USING (consumer)
                WHERE i.seen_at < now() - (SELECT min(remembers_seconds) FROM evt.consumer) * interval '1 s'
                  AND i.seen_at < now() - c.remembers_seconds * interval '1 s' LIMIT $1))"),
                sql("DELETE FROM evt.intent WHERE ctid = ANY (ARRAY (SELECT i.ctid FROM evt.intent i JOIN evt.consumer c USING (consumer)
                WHERE i.begun_at < now() - c.remembers_seconds * interval '1 s' LIMIT $1))")],
        }
    }

    async fn migrate(pool: &PgPool, namespace: &Namespace) -> Result<()> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        if missing(version(&mut connection, namespace).await?, &TABLES)?.is_empty() {
            return Ok(());
        }
        let mut transaction = connection.begin().await.map_err(from_sqlx)?;
        // Two programs that start at once must not both create.
        let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
        lock.execute(&mut *transaction).await.map_err(from_sqlx)?;
        for text in missing(version(&mut transaction, namespace).await?, &TABLES)? {
            let tables = sqlx::raw_sql(AssertSqlSafe(namespace.sql(text, '.')));
            transaction.execute(tables).await.map_err(from_sqlx)?;
        }
        transaction.commit().await.map_err(from_sqlx)
    }

    async fn begin(pool: &PgPool, _: &Arc<()>) -> Result<Self::Unit> {
        pool.begin().await.map_err(from_sqlx)
    }

    async fn commit(unit: Self::Unit) -> Result<(), Uncommitted> {
        unit.commit().await.map_err(Uncommitted::from)
    }

    async fn rollback(unit: Self::Unit) -> Result<(), Uncommitted> {
        unit.rollback().await.map_err(Uncommitted::from)
    }

    /// Appends raise what is too low, and so does the check of a unit without one.
    async fn sound(_: &mut PgConnection) -> Result<()> {
        Ok(())
    }

    async fn append(
        connection: &mut PgConnection,
        statements: &Statements,
        rows: &[Row],
        _: bool,
        _: Option<&Direct>,
    ) -> Result<Fate> {
        // An absent body in every row is an empty column, which `unnest` fills up.
        let has_body = rows.iter().any(|row| row.payload().is_some());
        let payloads: Vec<Option<&[u8]>> = match has_body {
            true => rows.iter().map(Row::payload).collect(),
            false => Vec::new(),
        };
        let query = sqlx::query(AssertSqlSafe(statements.append.clone()))
            .bind(rows.iter().map(|row| row.topic.as_str()).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.key.as_ref()).collect::<Vec<&[u8]>>())
            .bind(rows.iter().map(|row| row.has_key).collect::<Vec<bool>>())
            .bind(rows.iter().map(|row| row.id).collect::<Vec<_>>())
            .bind(rows.iter().map(Row::head).collect::<Vec<_>>())
            .bind(payloads)
            .bind(rows.iter().map(Row::size).collect::<Vec<_>>());
        let row = query.fetch_one(connection).await.map_err(from_sqlx)?;
        let id = row.try_get::<&str, _>(0).map_err(from_sqlx)?.parse();
        let id = id.map_err(|_| unreadable("the id of a transaction"))?;
        let event = rows.last().map(|row| row.id).unwrap_or_default();
        Ok(Fate::Transaction { id, life: row.try_get(1).map_err(from_sqlx)?, event })
    }

    /// The server answers the commit of a transaction in which a statement failed as if it had been one, with a word that says
    /// rollback, which `sqlx` does not read. Any other statement fails there.
    async fn check(connection: &mut PgConnection) -> Result<()> {
        sqlx::query(CHECK).execute(connection).await.map_err(from_sqlx).map(drop)
    }

    const HAS_DOORBELL: bool = true;

    async fn announce(connection: &mut PgConnection, statements: &Statements) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(statements.announce.clone()));
        query.execute(connection).await.map_err(from_sqlx).map(drop)
    }

    /// A broker's places in PostgreSQL are given out under the lock of a partition, which a transaction would hold until its
    /// commit: for each publisher of the partition.
    async fn adjoin(_: &PgPool, _: &Statements, _: &Arc<dyn Transport>) -> Result<bool> {
        Ok(false)
    }

    async fn fate(
        pool: &PgPool,
        statements: &Statements,
        fate: &Fate,
        _: Option<&Direct>,
    ) -> Result<Option<bool>> {
        let Fate::Transaction { id, life, event } = fate else { return Ok(None) };
        let fate = sqlx::query_scalar(AssertSqlSafe(statements.fate.clone()));
        match fate.bind(id.to_string()).bind(life).bind(event).fetch_one(pool).await {
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(IN_THE_FUTURE) => Ok(None),
            fate => fate.map_err(from_sqlx),
        }
    }

    async fn remember(
        connection: &mut PgConnection,
        statements: &Statements,
        consumer: &str,
        known: &Known<'_>,
    ) -> Result<bool> {
        let query = match known {
            Known::Message { id } => {
                sqlx::query(AssertSqlSafe(statements.remember_message.clone())).bind(consumer).bind(*id)
            }
            Known::Sequence { source, key, seq } => {
                sqlx::query(AssertSqlSafe(statements.remember_sequence.clone()))
                    .bind(consumer)
                    .bind(*source)
                    .bind(*key)
                    .bind(*seq)
            }
        };
        Ok(query.execute(connection).await.map_err(from_sqlx)?.rows_affected() > 0)
    }

    async fn remember_all(
        connection: &mut PgConnection,
        statements: &Statements,
        consumer: &str,
        known: &[Known<'_>],
    ) -> Result<Vec<bool>> {
        let (mut ids, mut sources, mut keys, mut numbers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for known in known {
            match known {
                Known::Message { id } => ids.push(*id),
                Known::Sequence { source, key, seq } => {
                    sources.push(*source);
                    keys.push(*key);
                    numbers.push(*seq);
                }
            }
        }
        // `None` = all.
        let (mut new_ids, mut new_keys) = (None::<HashSet<uuid::Uuid>>, None::<HashSet<(String, Vec<u8>)>>);
        if !ids.is_empty() {
            let sql = AssertSqlSafe(statements.remember_messages.clone());
            let query = sqlx::query_scalar::<_, Option<Vec<uuid::Uuid>>>(sql).bind(consumer).bind(ids);
            let noted = query.fetch_one(&mut *connection).await.map_err(from_sqlx)?;
            new_ids = noted.map(|ids| ids.into_iter().collect());
        }
        if !keys.is_empty() {
            let sql = AssertSqlSafe(statements.remember_sequences.clone());
            let query = sqlx::query_as::<_, (Option<Vec<String>>, Option<Vec<Vec<u8>>>)>(sql).bind(consumer);
            let query = query.bind(sources).bind(keys).bind(numbers);
            let (sources, keys) = query.fetch_one(connection).await.map_err(from_sqlx)?;
            new_keys = sources.zip(keys).map(|(sources, keys)| sources.into_iter().zip(keys).collect());
        }
        // The first of two with one id is the new one.
        let are_new = known.iter().map(|known| match known {
            Known::Message { id } => new_ids.as_mut().is_none_or(|new| new.remove(id)),
            Known::Sequence { source, key, .. } => {
                new_keys.as_mut().is_none_or(|new| new.remove(&((*source).to_owned(), key.to_vec())))
            }
        });
        Ok(are_new.collect())
    }

    async fn intend(
        connection: &mut PgConnection,
        statements: &Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> Result<Option<u32>> {
        let query = sqlx::query_scalar::<_, i32>(AssertSqlSafe(statements.intend.clone()));
        let runs = query.bind(consumer).bind(id).fetch_optional(connection).await.map_err(from_sqlx)?;
        Ok(runs.map(|runs| u32::try_from(runs).unwrap_or(u32::MAX)))
    }

    async fn end(
        connection: &mut PgConnection,
        statements: &Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(statements.end.clone())).bind(consumer).bind(id);
        query.execute(connection).await.map_err(from_sqlx).map(drop)
    }

    async fn register(
        connection: &mut PgConnection,
        statements: &Statements,
        consumer: &str,
        memory: &str,
        seconds: i64,
    ) -> Result<Option<String>> {
        let query = sqlx::query_scalar(AssertSqlSafe(statements.register.clone()));
        query.bind(consumer).bind(memory).bind(seconds).fetch_optional(connection).await.map_err(from_sqlx)
    }

    async fn forget(connection: &mut PgConnection, statements: &Statements) -> Result<bool> {
        let mut more = false;
        for statement in &statements.forget {
            let query = sqlx::query(AssertSqlSafe(statement.clone())).bind(HELPING);
            let done = query.execute(&mut *connection).await.map_err(from_sqlx)?;
            more |= done.rows_affected() >= HELPING as u64;
        }
        Ok(more)
    }

    async fn probes(pool: &PgPool) -> Result<Vec<Probe>> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        postgres_probes(&mut connection).await
    }

    const DIALECT: Dialect = Dialect {
        object: "json_build_object(",
        separator: '.',
        since_ms: "(extract(epoch FROM clock_timestamp() - {}) * 1000)::bigint",
        hex: "replace(replace({}::text, '-', ''), '\\x', '')",
        id: "'{}'",
        utf8: "convert_from('\\x{}'::bytea, 'UTF8')",
        text: "({})::text",
        bool: "{}",
        now: "now()",
        is_owned: || "owner IS NOT NULL AND lease_until > clock_timestamp()".to_owned(),
        silent_ms: || "(extract(epoch FROM clock_timestamp() - r.seen_at) * 1000)::bigint".to_owned(),
        lock: "FOR UPDATE",
        own_id: "OVERRIDING SYSTEM VALUE",
        blockers: BLOCKERS,
    };

    async fn texts(pool: &PgPool, sql: String) -> Result<Vec<String>> {
        let rows = sqlx::query_scalar(AssertSqlSafe(format!("SELECT t::text FROM ({sql}) AS q (t)")));
        rows.fetch_all(pool).await.map_err(from_sqlx)
    }

    async fn change(pool: &PgPool, statements: Vec<String>) -> Result<u64> {
        let mut transaction = pool.begin().await.map_err(from_sqlx)?;
        let mut n_rows = 0;
        for sql in statements {
            let done = sqlx::query(AssertSqlSafe(sql)).execute(&mut *transaction).await;
            n_rows = done.map_err(from_sqlx)?.rows_affected();
        }
        transaction.commit().await.map_err(from_sqlx)?;
        Ok(n_rows)
    }

    async fn verify(pool: &PgPool, namespace: &Namespace) -> Result<bool> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        known(version(&mut connection, namespace).await?, &TABLES)
    }

    async fn store(pool: &PgPool, _: &Arc<()>, namespace: &Namespace) -> Result<Arc<dyn Store>> {
        store::open(pool, namespace).await
    }
}

/// What the tables say they are; `None` if there are none.
async fn version(connection: &mut PgConnection, namespace: &Namespace) -> Result<Option<String>> {
    // Not to_regclass: it may answer from a cache that is older than the lock under which this is asked.
    let exists = sqlx::query_scalar::<_, bool>(
        "SELECT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'meta')",
    );
    if !exists.bind(namespace.as_str()).fetch_one(&mut *connection).await.map_err(from_sqlx)? {
        return Ok(None);
    }
    let text = namespace.sql("SELECT value FROM evt.meta WHERE name = 'version'", '.');
    let found = sqlx::query_scalar::<_, String>(AssertSqlSafe(text)).fetch_optional(connection).await;
    found.map_err(from_sqlx).map(|found| Some(found.unwrap_or_default()))
}

fn unreadable(what: &str) -> Error {
    Error::new(ErrorKind::Unexpected, format!("the server's answer was not understood: {what}"))
}
