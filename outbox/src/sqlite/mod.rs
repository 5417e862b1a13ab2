//! Outbox and inbox in an SQLite file.

mod direct;
mod store;
mod writer;

use std::sync::Arc;

use eventbus::fitness::Probe;
use eventbus::sql::from_sqlx;
use eventbus::time::{boot_id, since_boot};
use eventbus::{Error, ErrorKind, Result, Transport};
use sqlx::{AssertSqlSafe, Connection as _, Row as _, Sqlite, SqliteConnection, SqlitePool};

use self::writer::{Unit, Writer};
use crate::backend::{Backend, Fate, Known, Steps, Uncommitted, known, missing, sealed};
use crate::direct::Direct;
use crate::namespace::Namespace;
use crate::operator::Dialect;
use crate::row::{Row, Shard};
use crate::store::Store;

/// Makes the tables, each text the next version.
const TABLES: Steps = [include_str!("../../sql/sqlite/1.sql"), include_str!("../../sql/sqlite/2.sql")];

/// The first library without the corruption of the write-ahead log of 3.7.0 to 3.51.2.
const MIN_LIBRARY: [u32; 3] = [3, 51, 3];

/// Most rows that one helping of forgetting removes: others write in between.
const HELPING: i64 = 1000;

/// Rows of one statement: few sizes, so that few statements are prepared.
const CHUNKS: [usize; 7] = [256, 64, 16, 4, 3, 2, 1];

#[doc(hidden)]
#[derive(Debug)]
pub struct Statements {
    /// One for each size of [`CHUNKS`].
    append: [Arc<str>; CHUNKS.len()],
    fate: Arc<str>,
    /// Gives numbers to events that are not rows of the outbox, while there is none.
    number: Arc<str>,
    begin_numbers: Arc<str>,
    remember_message: Arc<str>,
    remember_sequence: Arc<str>,
    registered: Arc<str>,
    intend: Arc<str>,
    end: Arc<str>,
    register: Arc<str>,
    forget: [Arc<str>; 2],
}

impl sealed::Sealed for Sqlite {}

impl Backend for Sqlite {
    type Writer = Writer;
    type Unit = Unit;
    type Statements = Statements;

    fn statements(namespace: &Namespace) -> Statements {
        let sql = |text: &str| namespace.sql(text, '_');
        let append = |n_rows: usize| {
            let rows = vec!["(?, ?, ?, ?, ?, ?, ?, ?)"; n_rows].join(", ");
            sql(&format!(
                "INSERT INTO evt_outbox (shard, event_id, topic, key, has_key, size, head, payload) VALUES {rows}"
            ))
        };
        Statements {
            append: CHUNKS.map(append),
            fate: sql("SELECT event_id FROM evt_outbox WHERE id = ?"),
            number: sql("UPDATE sqlite_sequence SET seq = seq + ?1
                WHERE name = 'evt_outbox' AND NOT EXISTS (SELECT 1 FROM evt_outbox) RETURNING seq"),
            begin_numbers: sql("INSERT INTO sqlite_sequence SELECT 'evt_outbox', 0
                WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'evt_outbox')"),
            remember_message: sql("INSERT OR IGNORE INTO evt_inbox (consumer, message_id) VALUES (?, ?)"),
            remember_sequence: sql("INSERT INTO evt_key_progress (consumer, source, key, last_seq) VALUES (?, ?, ?, ?)
                ON CONFLICT (consumer, source, key) DO UPDATE SET last_seq = excluded.last_seq, seen_at = excluded.seen_at
                WHERE last_seq < excluded.last_seq"),
            intend: sql("INSERT INTO evt_intent (consumer, message_id)
                SELECT ?1, ?2 WHERE NOT EXISTS (SELECT 1 FROM evt_inbox WHERE consumer = ?1 AND message_id = ?2)
                ON CONFLICT (consumer, message_id) DO UPDATE SET runs = runs + 1, begun_at = excluded.begun_at RETURNING runs"),
            end: sql("DELETE FROM evt_intent WHERE consumer = ? AND message_id = ?"),
            registered: sql("SELECT memory, remembers_seconds FROM evt_consumer WHERE consumer = ?"),
            register: sql("INSERT INTO evt_consumer VALUES (?, ?, ?)
                ON CONFLICT (consumer) DO UPDATE SET remembers_seconds = excluded.remembers_seconds WHERE memory = excluded.memory"),
            // Rows are in the order of their time: what is looked at is what nobody remembers, and a little more.
            forget: [sql("DELETE FROM evt_inbox WHERE id IN (SELECT i.id FROM evt_inbox i JOIN evt_consumer c USING (consumer)
                WHERE i.id < coalesce((SELECT id FROM evt_inbox WHERE seen_at >=
                    unixepoch('subsec') * 1000 - (SELECT min(remembers_seconds) FROM evt_consumer) * 1000 ORDER BY id LIMIT 1), 1 << 62)
                  AND i.seen_at < unixepoch('subsec') * 1000 - c.remembers_seconds * 1000 ORDER BY i.id LIMIT ?)"),
                sql("DELETE FROM evt_intent WHERE (consumer, message_id) IN (SELECT i.consumer, i.message_id FROM evt_intent i
                  JOIN evt_consumer c USING (consumer) WHERE i.begun_at < unixepoch('subsec') * 1000 - c.remembers_seconds * 1000 LIMIT ?)")],
        }
    }

    async fn migrate(pool: &SqlitePool, namespace: &Namespace) -> Result<()> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        check_library(&mut connection).await?;
        if missing(version(&mut connection, namespace).await?, &TABLES)?.is_empty() {
            return Ok(());
        }
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(from_sqlx)?;
        for text in missing(version(&mut transaction, namespace).await?, &TABLES)? {
            let tables = sqlx::raw_sql(AssertSqlSafe(namespace.sql(text, '_')));
            tables.execute(&mut *transaction).await.map_err(from_sqlx)?;
        }
        transaction.commit().await.map_err(from_sqlx)
    }

    async fn begin(pool: &SqlitePool, writer: &Arc<Writer>) -> Result<Unit> {
        writer.begin(pool).await
    }

    async fn commit(unit: Unit) -> Result<(), Uncommitted> {
        unit.commit().await
    }

    async fn rollback(unit: Unit) -> Result<(), Uncommitted> {
        unit.rollback().await
    }

    async fn append(
        connection: &mut SqliteConnection,
        statements: &Statements,
        rows: &[Row],
        in_unit: bool,
        direct: Option<&Direct>,
    ) -> Result<Fate> {
        if in_unit {
            // One was ended below its user, by hand or by an error of the database, if another can begin: then events would be
            // stored outside of it.
            if sqlx::raw_sql("BEGIN").execute(&mut *connection).await.is_ok() {
                _ = sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await;
                let message = "the transaction was ended before its events were stored";
                return Err(Error::new(ErrorKind::Unexpected, message));
            }
        }
        if let Some(direct) = direct
            && let Some(fate) = direct::publish(connection, statements, direct, rows, in_unit).await?
        {
            return Ok(fate);
        }
        let (mut rest, mut last) = (rows, None);
        while let Some(row) = rest.last() {
            let chunk = CHUNKS.iter().zip(&statements.append).find(|(size, _)| **size <= rest.len());
            let Some((size, statement)) = chunk else { break };
            let (now, later) = rest.split_at(*size);
            let mut query = sqlx::query(AssertSqlSafe(statement.clone()));
            for row in now {
                query = query
                    .bind(i64::from(shard_of(row).0))
                    .bind(row.id)
                    .bind(row.topic.as_str())
                    .bind(row.key.as_ref())
                    .bind(row.has_key)
                    .bind(i64::from(row.size()))
                    .bind(row.head())
                    .bind(row.payload());
            }
            let done = query.execute(&mut *connection).await.map_err(from_sqlx)?;
            last = Some(Fate::Event { row: done.last_insert_rowid(), id: row.id });
            rest = later;
        }
        last.ok_or_else(|| Error::new(ErrorKind::Unexpected, "nothing was to be stored"))
    }

    async fn adjoin(
        pool: &SqlitePool,
        statements: &Statements,
        transport: &Arc<dyn Transport>,
    ) -> Result<bool> {
        direct::adjoin(pool, statements, transport.as_ref()).await
    }

    async fn sound(connection: &mut SqliteConnection) -> Result<()> {
        let level = sqlx::query_scalar::<_, i64>("PRAGMA synchronous").fetch_one(connection).await;
        match level.map_err(from_sqlx)? {
            2.. => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Config,
                "the connection does not sync its commits: what was published or acknowledged could be lost with the power; set synchronous=FULL",
            )),
        }
    }

    /// A statement that fails undoes itself alone, or ends the transaction: then a commit fails.
    async fn check(_: &mut SqliteConnection) -> Result<()> {
        Ok(())
    }

    const HAS_DOORBELL: bool = false;

    /// The file says by itself that it has changed.
    async fn announce(_: &mut SqliteConnection, _: &Statements) -> Result<()> {
        Ok(())
    }

    /// An event that is there was committed; one that is not may have been published since.
    async fn fate(
        pool: &SqlitePool,
        statements: &Statements,
        fate: &Fate,
        direct: Option<&Direct>,
    ) -> Result<Option<bool>> {
        let (row, id) = match (fate, direct) {
            (Fate::Event { row, id }, _) => (row, id),
            (Fate::Published { place, id }, Some(direct)) => {
                return direct::is_published(pool, direct, *place, *id).await;
            }
            _ => return Ok(None),
        };
        let found = sqlx::query_scalar::<_, uuid::Uuid>(AssertSqlSafe(statements.fate.clone())).bind(row);
        let found = found.fetch_optional(pool).await.map_err(from_sqlx)?;
        // Another event in its place: numbers are given out once, so ours was not.
        Ok(found.map(|found| found == *id))
    }

    async fn remember(
        connection: &mut SqliteConnection,
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

    /// One by one: there is no wire between them.
    async fn remember_all(
        connection: &mut SqliteConnection,
        statements: &Statements,
        consumer: &str,
        known: &[Known<'_>],
    ) -> Result<Vec<bool>> {
        let mut are_new = Vec::with_capacity(known.len());
        for known in known {
            are_new.push(Self::remember(connection, statements, consumer, known).await?);
        }
        Ok(are_new)
    }

    async fn intend(
        connection: &mut SqliteConnection,
        statements: &Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> Result<Option<u32>> {
        let query = sqlx::query_scalar::<_, i64>(AssertSqlSafe(statements.intend.clone()));
        let runs = query.bind(consumer).bind(id).fetch_optional(connection).await.map_err(from_sqlx)?;
        Ok(runs.map(|runs| u32::try_from(runs).unwrap_or(u32::MAX)))
    }

    async fn end(
        connection: &mut SqliteConnection,
        statements: &Statements,
        consumer: &str,
        id: uuid::Uuid,
    ) -> Result<()> {
        let query = sqlx::query(AssertSqlSafe(statements.end.clone())).bind(consumer).bind(id);
        query.execute(connection).await.map_err(from_sqlx).map(drop)
    }

    async fn register(
        connection: &mut SqliteConnection,
        statements: &Statements,
        consumer: &str,
        memory: &str,
        seconds: i64,
    ) -> Result<Option<String>> {
        let before = sqlx::query(AssertSqlSafe(statements.registered.clone())).bind(consumer);
        let before = before.fetch_optional(&mut *connection).await.map_err(from_sqlx)?;
        let noted = before.map(|row| Ok::<_, sqlx::Error>((row.try_get(0)?, row.try_get::<i64, _>(1)?)));
        let noted: Option<(String, i64)> = noted.transpose().map_err(from_sqlx)?;
        if noted.as_ref().is_none_or(|(_, before)| *before != seconds) {
            let query = sqlx::query(AssertSqlSafe(statements.register.clone()));
            query.bind(consumer).bind(memory).bind(seconds).execute(connection).await.map_err(from_sqlx)?;
        }
        Ok(noted.map(|(memory, _)| memory))
    }

    async fn forget(connection: &mut SqliteConnection, statements: &Statements) -> Result<bool> {
        let mut more = false;
        for statement in &statements.forget {
            let query = sqlx::query(AssertSqlSafe(statement.clone())).bind(HELPING);
            let done = query.execute(&mut *connection).await.map_err(from_sqlx)?;
            more |= done.rows_affected() >= HELPING as u64;
        }
        Ok(more)
    }

    async fn probes(pool: &SqlitePool) -> Result<Vec<Probe>> {
        let ask = |sql: &'static str| sqlx::query_scalar::<_, String>(sql).fetch_one(pool);
        let whole = ask("PRAGMA quick_check(1)").await.map_err(from_sqlx)?;
        let journal = ask("PRAGMA journal_mode").await.map_err(from_sqlx)?;
        Ok(vec![
            Probe::good("integrity", &whole).or_bad(
                whole == "ok",
                "stop the programs, keep a copy of the file, and restore the last good one",
            ),
            Probe::good("journal mode", &journal).or_doubtful(
                journal == "wal",
                "set journal_mode=WAL: else who reads and who writes wait for each other",
            ),
        ])
    }

    const DIALECT: Dialect = Dialect {
        object: "json_object(",
        separator: '_',
        since_ms: "CAST(unixepoch('subsec') * 1000 - {} AS INTEGER)",
        hex: "iif({} IS NULL, NULL, lower(hex({})))",
        id: "x'{}'",
        utf8: "CAST(x'{}' AS TEXT)",
        text: "{}",
        bool: "json(iif({}, 'true', 'false'))",
        now: "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
        is_owned: || {
            let (boot, now) = (boot_id().replace('\'', ""), since_boot().as_millis());
            format!("owner IS NOT NULL AND boot = '{boot}' AND lease_until > {now}")
        },
        silent_ms: || format!("{} - r.seen_at", since_boot().as_millis()),
        lock: "",
        own_id: "",
        blockers: "",
    };

    async fn texts(pool: &SqlitePool, sql: String) -> Result<Vec<String>> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(pool).await.map_err(from_sqlx)
    }

    async fn change(pool: &SqlitePool, statements: Vec<String>) -> Result<u64> {
        let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(from_sqlx)?;
        let mut n_rows = 0;
        for sql in statements {
            let done = sqlx::query(AssertSqlSafe(sql)).execute(&mut *transaction).await;
            n_rows = done.map_err(from_sqlx)?.rows_affected();
        }
        transaction.commit().await.map_err(from_sqlx)?;
        Ok(n_rows)
    }

    async fn verify(pool: &SqlitePool, namespace: &Namespace) -> Result<bool> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        check_library(&mut connection).await?;
        known(version(&mut connection, namespace).await?, &TABLES)
    }

    async fn store(pool: &SqlitePool, writer: &Arc<Writer>, namespace: &Namespace) -> Result<Arc<dyn Store>> {
        Ok(store::open(pool, writer, namespace))
    }
}

/// The part of the outbox that an event goes into: of its topic and key.
fn shard_of(row: &Row) -> Shard {
    let mut name = Vec::with_capacity(row.topic.as_str().len() + 1 + row.key.len());
    name.extend_from_slice(row.topic.as_str().as_bytes());
    name.push(1);
    name.extend_from_slice(&row.key);
    let part = eventbus::partition::of_key(&eventbus::Key::new(name), u32::from(Shard::COUNT));
    Shard(u8::try_from(part.0).unwrap_or_default())
}

/// What the tables say they are; `None` if there are none.
async fn version(connection: &mut SqliteConnection, namespace: &Namespace) -> Result<Option<String>> {
    let exists = sqlx::query_scalar::<_, bool>("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = ?)");
    let exists = exists.bind(format!("{namespace}_meta")).fetch_one(&mut *connection).await;
    if !exists.map_err(from_sqlx)? {
        return Ok(None);
    }
    let text = namespace.sql("SELECT value FROM evt_meta WHERE name = 'version'", '_');
    let found = sqlx::query_scalar::<_, String>(AssertSqlSafe(text)).fetch_optional(connection).await;
    found.map_err(from_sqlx).map(|found| Some(found.unwrap_or_default()))
}

async fn check_library(connection: &mut SqliteConnection) -> Result<()> {
    let version = sqlx::query_scalar::<_, String>("SELECT sqlite_version()").fetch_one(connection).await;
    let version = version.map_err(from_sqlx)?;
    let numbers: Vec<u32> = version.split('.').filter_map(|part| part.parse().ok()).collect();
    if numbers.as_slice() >= MIN_LIBRARY.as_slice() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Config,
        "the SQLite library is older than 3.51.3, whose write-ahead log can corrupt the file",
    )
    .with("version", version))
}
