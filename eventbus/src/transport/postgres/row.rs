//! Events as rows: written in columns of many, and read back without loss.

use bytes::Bytes;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row};
use uuid::Uuid;

use crate::envelope::Envelope;
use crate::header::Headers;
use crate::id::EventId;
use crate::name::Key;
use crate::time::{from_nanos, to_nanos};
use crate::transport::kit::leased::Stored;
use crate::transport::kit::texts::Texts;
use crate::transport::{Content, Undecodable};

/// Stores events behind the end of their partitions, in one statement: locks the partitions in one order, gives out
/// offsets, inserts. Returns where each partition ended before; a topic that is gone returns nothing.
pub(super) const INSERT: &str = r#"
WITH input AS (
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::bigint[], $4::integer[], $5::uuid[], $6::text[], $7::text[], $8::text[],
    $9::bigint[], $10::text[], $11::bigint[], $12::text[], $13::text[], $14::bytea[], $15::bytea[], $16::bytea[], $17::bytea[])
  AS t (topic, partition, rank, size, id, other_id, source, type, version, subject, time, content_type, schema, key,
    extensions, headers, payload)
), counts AS (
  SELECT topic, partition, count(*) AS n FROM input GROUP BY topic, partition
), ends AS MATERIALIZED (
  SELECT p.topic, p.partition, p.next, c.n,
    greatest(p.last_stored, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint * 1000) AS stored_at
  FROM eventbus_partition p JOIN counts c ON c.topic = p.topic AND c.partition = p.partition
  ORDER BY p.topic, p.partition FOR UPDATE OF p
), moved AS (
  UPDATE eventbus_partition p SET next = e.next + e.n, last_stored = e.stored_at FROM ends e
  WHERE p.topic = e.topic AND p.partition = e.partition
), stored AS (
  INSERT INTO eventbus_event
  SELECT i.topic, i.partition, e.next + i.rank, e.stored_at, i.size, i.id, i.other_id, i.source, i.type, i.version, i.subject,
    i.time, i.content_type, i.schema, i.key, i.extensions, i.headers, i.payload
  FROM input i JOIN ends e ON e.topic = i.topic AND e.partition = i.partition
)
SELECT topic, partition, next FROM ends"#;

/// Many events, a column each.
#[derive(Default)]
pub(super) struct Columns<'a> {
    topics: Vec<i64>,
    partitions: Vec<i32>,
    ranks: Vec<i64>,
    sizes: Vec<i32>,
    ids: Vec<Option<Uuid>>,
    other_ids: Vec<Option<String>>,
    sources: Vec<&'a str>,
    types: Vec<&'a str>,
    versions: Vec<Option<i64>>,
    subjects: Vec<Option<&'a str>>,
    times: Vec<Option<i64>>,
    content_types: Vec<Option<&'a str>>,
    schemas: Vec<Option<&'a str>>,
    keys: Vec<Option<&'a [u8]>>,
    extensions: Vec<Option<&'a [u8]>>,
    headers: Vec<Option<&'a [u8]>>,
    payloads: Vec<Option<&'a [u8]>>,
}

impl<'a> Columns<'a> {
    /// Adds an event that goes `rank` behind the present end of its partition.
    pub(super) fn push(&mut self, topic: i64, partition: u32, rank: i64, event: &'a Envelope) {
        let block = |headers: &'a Headers| (!headers.is_empty()).then(|| headers.as_block().as_ref());
        let uuid = event.id().as_uuid();
        self.topics.push(topic);
        self.partitions.push(partition as i32);
        self.ranks.push(rank);
        self.sizes.push(i32::try_from(event.size_bytes()).unwrap_or(i32::MAX));
        self.other_ids.push(if uuid.is_none() { Some(event.id().to_string()) } else { None });
        self.ids.push(uuid);
        self.sources.push(event.source());
        self.types.push(event.event_type());
        self.versions.push(event.version().map(i64::from));
        self.subjects.push(event.subject());
        self.times.push(event.time().map(to_nanos));
        self.content_types.push(event.content_type());
        self.schemas.push(event.schema());
        self.keys.push(event.key().map(Key::as_bytes));
        self.extensions.push(block(event.extensions()));
        self.headers.push(block(event.headers()));
        self.payloads.push(event.payload().map(|payload| payload.as_ref()));
    }

    /// The statement that inserts them.
    pub(super) fn insert(&self) -> Query<'_, Postgres, PgArguments> {
        sqlx::query(INSERT)
            .bind(&self.topics)
            .bind(&self.partitions)
            .bind(&self.ranks)
            .bind(&self.sizes)
            .bind(&self.ids)
            .bind(&self.other_ids)
            .bind(&self.sources)
            .bind(&self.types)
            .bind(&self.versions)
            .bind(&self.subjects)
            .bind(&self.times)
            .bind(&self.content_types)
            .bind(&self.schemas)
            .bind(&self.keys)
            .bind(&self.extensions)
            .bind(&self.headers)
            .bind(&self.payloads)
    }
}

/// The columns in the order [`stored`] reads them, from a row whose first is the partition.
macro_rules! event_columns {
    () => {
        r#"e."offset", e.stored_at, e.id, e.other_id, e.source, e.type, e.version, e.subject, e.time, e.content_type, e.schema, e.key, e.extensions, e.headers, e.payload"#
    };
}
pub(super) use event_columns;

/// Reads the event whose columns begin at `at`; a row that is no event is kept as it is.
pub(super) fn stored(row: &PgRow, at: usize, texts: &mut Texts) -> Result<Stored, sqlx::Error> {
    let content = match envelope(row, at, texts) {
        Ok(envelope) => Content::Envelope(envelope),
        Err(reason) => {
            let headers =
                bytes(row, at + 13).ok().flatten().and_then(|block| Headers::from_block(block).ok());
            let raw = bytes(row, at + 14).ok().flatten();
            Content::Undecodable(Box::new(Undecodable::new(raw, headers.unwrap_or_default(), reason)))
        }
    };
    let offset = row.try_get::<i64, _>(at)?.unsigned_abs();
    Ok(Stored { offset, stored_at: from_nanos(row.try_get(at + 1)?), content })
}

fn bytes(row: &PgRow, column: usize) -> Result<Option<Bytes>, String> {
    let found = row.try_get::<Option<&[u8]>, _>(column);
    found.map(|found| found.map(Bytes::copy_from_slice)).map_err(|error| error.to_string())
}

fn envelope(row: &PgRow, at: usize, texts: &mut Texts) -> Result<Envelope, String> {
    let bad = |error: sqlx::Error| error.to_string();
    let text = |column: usize| row.try_get::<Option<&str>, _>(at + column).map_err(bad);
    let number = |column: usize| row.try_get::<Option<i64>, _>(at + column).map_err(bad);
    let id = match row.try_get::<Option<Uuid>, _>(at + 2).map_err(bad)? {
        Some(uuid) => EventId::from(uuid),
        None => EventId::parse(text(3)?.ok_or("the id is missing")?),
    };
    let source = texts.share(text(4)?.ok_or("the source is missing")?);
    let event_type = texts.share(text(5)?.ok_or("the type is missing")?);
    let version = number(6)?.map(u32::try_from).transpose().map_err(|_| "the version is out of range")?;
    let block = |column| {
        bytes(row, at + column)?
            .map_or(Ok(Headers::new()), |b| Headers::from_block(b).map_err(|e| e.to_string()))
    };
    let mut envelope = Envelope::bare(event_type, source, id, number(8)?.map(from_nanos))
        .with_version(version)
        .with_extensions(block(12)?)
        .with_headers(block(13)?);
    if let Some(subject) = text(7)? {
        envelope = envelope.with_subject(subject.to_owned());
    }
    if let Some(content_type) = text(9)? {
        envelope = envelope.with_content_type(texts.share(content_type));
    }
    if let Some(schema) = text(10)? {
        envelope = envelope.with_schema(texts.share(schema));
    }
    if let Some(key) = bytes(row, at + 11)? {
        envelope = envelope.with_key(Key::new(key));
    }
    if let Some(payload) = bytes(row, at + 14)? {
        envelope = envelope.with_payload(payload);
    }
    Ok(envelope)
}
