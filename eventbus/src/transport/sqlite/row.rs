//! Events as rows: written and read back without loss; a row that is no event is kept as it is.

use std::borrow::Cow;
use std::sync::LazyLock;

use bytes::Bytes;
use rusqlite::types::{ToSql, ToSqlOutput, ValueRef};
use rusqlite::{CachedStatement, Connection, Row, params, params_from_iter};
use smallvec::SmallVec;
use uuid::Uuid;

use super::clock;
use super::schema::{from_sqlite, offset_of, position};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::header::Headers;
use crate::id::EventId;
use crate::name::Key;
use crate::transport::kit::leased::Stored;
use crate::transport::kit::texts::Texts;
use crate::transport::{Content, SqlValue, Undecodable};

/// The columns in the order [`stored`] reads them.
const COLUMNS: &str = "position, stored_at, id, source, type, version, subject, time, content_type, schema, key, extensions, headers, payload, checksum";

/// How many columns an event has.
pub(super) const N_COLUMNS: usize = 15;

/// The statement that inserts so many events.
pub(super) fn insertion(n_events: usize) -> String {
    let event = format!("({})", ["?"; N_COLUMNS].join(", "));
    format!("INSERT INTO eventbus_event VALUES {}", vec![event; n_events].join(", "))
}

/// Prepares the insertion of events.
pub(super) fn insert(connection: &Connection) -> Result<CachedStatement<'_>> {
    static ONE: LazyLock<String> = LazyLock::new(|| insertion(1));
    connection.prepare_cached(&ONE).map_err(from_sqlite)
}

/// Inserts one event.
pub(super) fn put(
    statement: &mut CachedStatement<'_>,
    at: i64,
    stored_at: i64,
    event: &Envelope,
) -> Result<()> {
    let id = StoredId::of(event.id());
    let columns = columns(at, stored_at, &id, event);
    statement.execute(params_from_iter(columns)).map(drop).map_err(from_sqlite)
}

/// An id as it is stored: the bytes of a UUID, or text.
pub(super) enum StoredId {
    Uuid(Uuid),
    Text(String),
}

impl StoredId {
    pub(super) fn of(id: &EventId) -> Self {
        id.as_uuid().map_or_else(|| Self::Text(id.to_string()), Self::Uuid)
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Uuid(uuid) => uuid.as_bytes(),
            Self::Text(text) => text.as_bytes(),
        }
    }
}

/// What is stored of an event, in the order of the columns.
pub(super) fn columns<'a>(
    at: i64,
    stored_at: i64,
    id: &'a StoredId,
    event: &'a Envelope,
) -> [SqlValue<'a>; N_COLUMNS] {
    let text =
        |text: Option<&'a str>| text.map_or(SqlValue::Null, |text| SqlValue::Text(Cow::Borrowed(text)));
    let blob =
        |bytes: Option<&'a [u8]>| bytes.map_or(SqlValue::Null, |blob| SqlValue::Blob(Cow::Borrowed(blob)));
    let integer = |number: Option<i64>| number.map_or(SqlValue::Null, SqlValue::Integer);
    let block = |headers: &'a Headers| blob((!headers.is_empty()).then(|| &**headers.as_block()));
    [
        SqlValue::Integer(at),
        SqlValue::Integer(stored_at),
        match id {
            StoredId::Uuid(uuid) => blob(Some(uuid.as_bytes())),
            StoredId::Text(id) => text(Some(id)),
        },
        text(Some(event.source())),
        text(Some(event.event_type())),
        integer(event.version().map(i64::from)),
        text(event.subject()),
        integer(event.time().map(clock::to_nanos)),
        text(event.content_type()),
        text(event.schema()),
        blob(event.key().map(Key::as_bytes)),
        block(event.extensions()),
        block(event.headers()),
        blob(event.payload().map(AsRef::as_ref)),
        SqlValue::Integer(i64::from(checksum(at, id, event))),
    ]
}

impl ToSql for SqlValue<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

/// The sum over an event and its place, by which a byte that changed on the disk is noticed (CRC-32, IEEE).
fn checksum(at: i64, id: &StoredId, event: &Envelope) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    // Small fields are summed together: a call for each would cost more than the sum.
    let mut small: SmallVec<[u8; 256]> = SmallVec::new();
    // Lengths are part of it, so that nothing moves from one field to the next unnoticed.
    let mut field = |bytes: Option<&[u8]>| {
        small.extend_from_slice(&bytes.map_or(u32::MAX, |bytes| bytes.len() as u32).to_le_bytes());
        match bytes.unwrap_or_default() {
            large if large.len() > small.inline_size() => {
                sum.update(&small);
                sum.update(large);
                small.clear();
            }
            bytes => small.extend_from_slice(bytes),
        }
    };
    field(Some(&at.to_le_bytes()));
    field(Some(id.bytes()));
    field(Some(event.source().as_bytes()));
    field(Some(event.event_type().as_bytes()));
    field(event.version().map(u32::to_le_bytes).as_ref().map(<[u8; 4]>::as_slice));
    field(event.subject().map(str::as_bytes));
    field(event.time().map(|time| clock::to_nanos(time).to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
    field(event.content_type().map(str::as_bytes));
    field(event.schema().map(str::as_bytes));
    field(event.key().map(Key::as_bytes));
    field(Some(event.extensions().as_block()));
    field(Some(event.headers().as_block()));
    field(event.payload().map(|payload| payload.as_ref()));
    sum.update(&small);
    sum.finalize()
}

/// Reads up to `max` events of a partition from an offset, until `max_bytes` are reached; at least one.
pub(super) fn read(
    connection: &Connection,
    topic: i64,
    partition: u32,
    from: u64,
    to: u64,
    max: usize,
    max_bytes: usize,
) -> Result<Vec<Stored>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM eventbus_event WHERE position >= ?1 AND position < ?2 ORDER BY position LIMIT ?3"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(from_sqlite)?;
    let bounds = params![position(topic, partition, from), position(topic, partition, to), max as i64];
    let (mut texts, mut found, mut n_bytes) = (Texts::default(), Vec::new(), 0);
    let mut rows = statement.query(bounds).map_err(from_sqlite)?;
    let missing = |offset: u64| {
        Error::new(ErrorKind::Corrupt, "the store is damaged: events are missing between others")
            .with("partition", partition)
            .with("offset", offset)
    };
    while n_bytes < max_bytes.max(1) {
        let expected = from + found.len() as u64;
        let Some(row) = rows.next().map_err(from_sqlite)? else {
            if found.len() < max && expected < to {
                return Err(missing(expected));
            }
            break;
        };
        let row = stored(row, &mut texts).map_err(from_sqlite)?;
        if row.offset != expected {
            return Err(missing(expected));
        }
        n_bytes += row.content.size_bytes();
        found.push(row);
    }
    Ok(found)
}

fn stored(row: &Row<'_>, texts: &mut Texts) -> rusqlite::Result<Stored> {
    let place: i64 = row.get(0)?;
    let whole = |envelope: Envelope| match row.get::<_, Option<u32>>(14) {
        Ok(Some(sum)) if sum == checksum(place, &StoredId::of(envelope.id()), &envelope) => Ok(envelope),
        Ok(Some(_)) | Err(_) => Err("the stored bytes changed: their checksum does not fit".to_owned()),
        // Written past us, as a test or a repair does.
        Ok(None) => Ok(envelope),
    };
    let content = match envelope(row, texts).and_then(whole) {
        Ok(envelope) => Content::Envelope(envelope),
        Err(reason) => {
            let headers = bytes(row, 12).ok().flatten().and_then(|block| Headers::from_block(block).ok());
            let raw = match row.get_ref(13)? {
                ValueRef::Null => None,
                ValueRef::Blob(raw) | ValueRef::Text(raw) => Some(Bytes::copy_from_slice(raw)),
                ValueRef::Integer(number) => Some(Bytes::from(number.to_string())),
                ValueRef::Real(number) => Some(Bytes::from(number.to_string())),
            };
            Content::Undecodable(Box::new(Undecodable::new(raw, headers.unwrap_or_default(), reason)))
        }
    };
    Ok(Stored { offset: offset_of(place), stored_at: clock::from_nanos(row.get(1)?), content })
}

fn bytes(row: &Row<'_>, column: usize) -> Result<Option<Bytes>, String> {
    match row.get_ref(column) {
        Ok(ValueRef::Null) => Ok(None),
        Ok(ValueRef::Blob(blob)) => Ok(Some(Bytes::copy_from_slice(blob))),
        _ => Err(format!("column {column} is not a blob")),
    }
}

fn text<'a>(row: &'a Row<'_>, column: usize) -> Result<Option<&'a str>, String> {
    match row.get_ref(column) {
        Ok(ValueRef::Null) => Ok(None),
        Ok(ValueRef::Text(text)) => {
            std::str::from_utf8(text).map(Some).map_err(|_| format!("column {column} is not UTF-8"))
        }
        _ => Err(format!("column {column} is not text")),
    }
}

fn envelope(row: &Row<'_>, texts: &mut Texts) -> Result<Envelope, String> {
    let id = match row.get_ref(2) {
        Ok(ValueRef::Blob(blob)) => EventId::from(Uuid::from_slice(blob).map_err(|_| "the id is no UUID")?),
        Ok(ValueRef::Text(id)) => EventId::parse(std::str::from_utf8(id).map_err(|_| "the id is not UTF-8")?),
        _ => return Err("the id is missing".into()),
    };
    let source = texts.share(text(row, 3)?.ok_or("the source is missing")?);
    let event_type = texts.share(text(row, 4)?.ok_or("the type is missing")?);
    let integer = |column: usize| {
        row.get::<_, Option<i64>>(column).map_err(|_| format!("column {column} is not a number"))
    };
    let version = integer(5)?.map(u32::try_from).transpose().map_err(|_| "the version is out of range")?;
    let block = |column| {
        bytes(row, column)?.map_or(Ok(Headers::new()), |b| Headers::from_block(b).map_err(|e| e.to_string()))
    };
    let mut envelope = Envelope::bare(event_type, source, id, integer(7)?.map(clock::from_nanos))
        .with_version(version)
        .with_extensions(block(11)?)
        .with_headers(block(12)?);
    if let Some(subject) = text(row, 6)? {
        envelope = envelope.with_subject(subject.to_owned());
    }
    if let Some(content_type) = text(row, 8)? {
        envelope = envelope.with_content_type(texts.share(content_type));
    }
    if let Some(schema) = text(row, 9)? {
        envelope = envelope.with_schema(texts.share(schema));
    }
    if let Some(key) = bytes(row, 10)? {
        envelope = envelope.with_key(Key::new(key));
    }
    if let Some(payload) = bytes(row, 13)? {
        envelope = envelope.with_payload(payload);
    }
    Ok(envelope)
}
