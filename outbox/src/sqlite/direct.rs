//! Events that go into the topics of a bus in the same file, without an outbox and a relay between them.

use std::borrow::Cow;

use async_trait::async_trait;
use eventbus::sql::from_sqlx;
use eventbus::transport::{Place, SqlValue, Statements as Connection};
use eventbus::{Envelope, Error, ErrorKind, Result, Transport};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _, SqliteConnection, SqlitePool, TypeInfo as _, ValueRef as _};
use uuid::Uuid;

use super::Statements;
use crate::backend::Fate;
use crate::direct::Direct;
use crate::row::{Row, known_as};

/// A connection, for the bus.
struct Lent<'a>(&'a mut SqliteConnection);

#[async_trait]
impl Connection for Lent<'_> {
    async fn run(&mut self, sql: &str, values: &[SqlValue<'_>]) -> Result<Vec<Vec<SqlValue<'static>>>> {
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in values {
            query = match value {
                SqlValue::Null => query.bind(None::<i64>),
                SqlValue::Integer(number) => query.bind(*number),
                SqlValue::Text(text) => query.bind(text.as_ref()),
                SqlValue::Blob(bytes) => query.bind(bytes.as_ref()),
            };
        }
        let rows = query.fetch_all(&mut *self.0).await.map_err(from_sqlx)?;
        rows.iter().map(values_of).collect::<sqlx::Result<_>>().map_err(from_sqlx)
    }
}

fn values_of(row: &SqliteRow) -> sqlx::Result<Vec<SqlValue<'static>>> {
    let value = |column: usize| {
        let raw = row.try_get_raw(column)?;
        Ok(match raw.type_info().name() {
            "NULL" => SqlValue::Null,
            "TEXT" => SqlValue::Text(Cow::Owned(row.try_get_unchecked(column)?)),
            "BLOB" => SqlValue::Blob(Cow::Owned(row.try_get_unchecked(column)?)),
            _ => SqlValue::Integer(row.try_get_unchecked(column)?),
        })
    };
    (0..row.len()).map(value).collect()
}

/// Whether the bus is in this file; then its events can be numbered.
pub(super) async fn adjoin(
    pool: &SqlitePool,
    statements: &Statements,
    transport: &dyn Transport,
) -> Result<bool> {
    let Some(bus) = transport.in_file() else { return Ok(false) };
    let ours = sqlx::query_scalar::<_, String>("SELECT file FROM pragma_database_list WHERE name = 'main'");
    let ours = ours.fetch_one(pool).await.map_err(from_sqlx)?;
    // A database in memory has no file.
    let (Ok(ours), Ok(theirs)) = (std::fs::canonicalize(ours), std::fs::canonicalize(bus.path())) else {
        return Ok(false);
    };
    if ours != theirs {
        return Ok(false);
    }
    let begin = sqlx::query(AssertSqlSafe(statements.begin_numbers.clone()));
    begin.execute(pool).await.map_err(from_sqlx)?;
    Ok(true)
}

/// Publishes events in the present transaction. `None` = there are events before them in the outbox, or the bus has no room:
/// nothing was changed.
pub(super) async fn publish(
    connection: &mut SqliteConnection,
    statements: &Statements,
    direct: &Direct,
    rows: &[Row],
    in_unit: bool,
) -> Result<Option<Fate>> {
    let (Some(bus), Some(last)) = (direct.bus(), rows.last()) else { return Ok(None) };
    let n_events = i64::try_from(rows.len()).unwrap_or(i64::MAX);
    // Who has the last number has the file to himself: whatever is in the outbox is seen, and stays before these.
    let number = sqlx::query_scalar::<_, i64>(AssertSqlSafe(statements.number.clone())).bind(n_events);
    let Some(number) = number.fetch_optional(&mut *connection).await.map_err(from_sqlx)? else {
        return Ok(None);
    };
    let first = number - n_events + 1;
    let marked = |(row, number): (&Row, i64)| -> Envelope {
        let event = row.event.clone().with_extension("evt-source", &*direct.identity);
        event.with_extension("evt-seq", number.to_string())
    };
    let events: Vec<_> =
        rows.iter().zip(first..).map(|(row, number)| (&row.topic, marked((row, number)))).collect();
    // A unit ends with its first error; a transaction of somebody else may go on, and has all of it or nothing.
    if !in_unit {
        run(connection, "SAVEPOINT evt_direct").await?;
    }
    let outcome = bus.append(&mut Lent(connection), &events).await;
    if !in_unit {
        let end = match outcome {
            Ok(_) => "RELEASE evt_direct",
            Err(_) => "ROLLBACK TO evt_direct; RELEASE evt_direct",
        };
        run(connection, end).await?;
    }
    match outcome {
        Ok(Some(place)) => Ok(Some(Fate::Published { place, id: last.id })),
        Ok(None) => Err(Error::new(ErrorKind::Unexpected, "the bus says of no event where it is")),
        Err(error) if error.kind() == ErrorKind::Full => Ok(None),
        Err(error) => Err(error),
    }
}

async fn run(connection: &mut SqliteConnection, sql: &'static str) -> Result<()> {
    sqlx::raw_sql(sql).execute(connection).await.map_err(from_sqlx).map(drop)
}

/// Whether the event at a place is the one; `None` = there is none (yet, or any more).
pub(super) async fn is_published(
    pool: &SqlitePool,
    direct: &Direct,
    place: Place,
    id: Uuid,
) -> Result<Option<bool>> {
    let Some(bus) = direct.bus() else { return Ok(None) };
    let mut connection = pool.acquire().await.map_err(from_sqlx)?;
    let found = bus.at(&mut Lent(&mut connection), place).await?;
    Ok(found.map(|(source, found)| known_as(&source, &found) == id))
}
