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

/// Stores events behind the end of their partitions, in one statement: locks the partitions in one order, finds their ends,
/// inserts. Returns where each partition ended before; a topic that is gone returns nothing. Columns without a
/// value are empty, and `unnest` fills them up.
pub(super) const INSERT: &str = r#"
WITH locked AS MATERIALIZED (
  SELECT p.topic, p.partition, p.first, c.slot
  FROM eventbus_partition p
  JOIN unnest($1::bigint[], $2::integer[]) WITH ORDINALITY AS c (topic, partition, slot)
    ON c.topic = p.topic AND c.partition = p.partition
  ORDER BY p.topic, p.partition FOR UPDATE OF p
), ends AS MATERIALIZED (
  SELECT l.topic, l.partition, l.slot, h.next,
    greatest(h.last_stored, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint * 1000) AS stored_at
  FROM locked l CROSS JOIN LATERAL eventbus_head(l.topic, l.partition, l.first) h
), stored AS (
  INSERT INTO eventbus_event
  SELECT e.topic, e.partition, e.next + i.rank, e.stored_at, i.size, i.id, i.other_id, i.source, i.type, i.version, i.subject,
    i.time, i.content_type, i.schema, i.key, i.extensions, i.headers, i.payload
  FROM unnest($3::bigint[], $4::bigint[], $5::integer[], $6::uuid[], $7::text[], $8::text[], $9::text[], $10::bigint[],
    $11::text[], $12::bigint[], $13::text[], $14::text[], $15::bytea[], $16::bytea[], $17::bytea[], $18::bytea[])
  AS i (slot, rank, size, id, other_id, source, type, version, subject, time, content_type, schema, key,
    extensions, headers, payload)
  JOIN ends e ON e.slot = i.slot
)
SELECT topic, partition, next FROM ends"#;

/// Many events, a column each.
#[derive(Default)]
pub(super) struct Columns<'a> {
    /// The partitions, and how many events go into each.
    topics: Vec<i64>,
    partitions: Vec<i32>,
    counts: Vec<i64>,
    /// The partition of each event, counted from 1.
    slots: Vec<i64>,
    ranks: Vec<i64>,
    sizes: Vec<i32>,
    ids: Sparse<Uuid>,
    other_ids: Sparse<String>,
    sources: Vec<&'a str>,
    types: Vec<&'a str>,
    versions: Sparse<i64>,
    subjects: Sparse<&'a str>,
    times: Sparse<i64>,
    content_types: Sparse<&'a str>,
    schemas: Sparse<&'a str>,
    keys: Sparse<&'a [u8]>,
    extensions: Sparse<&'a [u8]>,
    headers: Sparse<&'a [u8]>,
    payloads: Sparse<&'a [u8]>,
}

/// A column that costs nothing as long as no event has a value in it.
struct Sparse<T>(Vec<Option<T>>);

impl<T> Default for Sparse<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Sparse<T> {
    /// Sets the value of the event at a place, which is the last so far.
    fn set(&mut self, at: usize, value: Option<T>) {
        if value.is_some() {
            self.0.resize_with(at, || None);
            self.0.push(value);
        }
    }
}

impl<'a> Columns<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Names a partition that events go into; returns its number for [`push`](Self::push).
    pub(super) fn open(&mut self, topic: i64, partition: u32) -> usize {
        self.topics.push(topic);
        self.partitions.push(partition as i32);
        self.counts.push(0);
        self.topics.len()
    }

    /// Adds an event to a partition; returns how far behind the present end it goes.
    pub(super) fn push(&mut self, slot: usize, event: &'a Envelope) -> i64 {
        let block = |headers: &'a Headers| (!headers.is_empty()).then(|| headers.as_block().as_ref());
        let (at, uuid) = (self.slots.len(), event.id().as_uuid());
        let mut rank = 0;
        if let Some(count) = self.counts.get_mut(slot - 1) {
            rank = *count;
            *count += 1;
        }
        self.slots.push(slot as i64);
        self.ranks.push(rank);
        self.sizes.push(i32::try_from(event.size_bytes()).unwrap_or(i32::MAX));
        self.other_ids.set(at, if uuid.is_none() { Some(event.id().to_string()) } else { None });
        self.ids.set(at, uuid);
        self.sources.push(event.source());
        self.types.push(event.event_type());
        self.versions.set(at, event.version().map(i64::from));
        self.subjects.set(at, event.subject());
        self.times.set(at, event.time().map(to_nanos));
        self.content_types.set(at, event.content_type());
        self.schemas.set(at, event.schema());
        self.keys.set(at, event.key().map(Key::as_bytes));
        self.extensions.set(at, block(event.extensions()));
        self.headers.set(at, block(event.headers()));
        self.payloads.set(at, event.payload().map(|payload| payload.as_ref()));
        rank
    }

    /// The statement that inserts them.
    pub(super) fn insert(&self) -> Query<'_, Postgres, PgArguments> {
        sqlx::query(INSERT)
            .bind(&self.topics)
            .bind(&self.partitions)
            .bind(&self.slots)
            .bind(&self.ranks)
            .bind(&self.sizes)
            .bind(&self.ids.0)
            .bind(&self.other_ids.0)
            .bind(&self.sources)
            .bind(&self.types)
            .bind(&self.versions.0)
            .bind(&self.subjects.0)
            .bind(&self.times.0)
            .bind(&self.content_types.0)
            .bind(&self.schemas.0)
            .bind(&self.keys.0)
            .bind(&self.extensions.0)
            .bind(&self.headers.0)
            .bind(&self.payloads.0)
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
