//! Events as rows.

use std::fmt;

use bytes::Bytes;
use eventbus::{Envelope, EventId, Key, Result, Topic};
use uuid::Uuid;

use crate::head;

/// The place of an event in the outbox: ascends along each key, and is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId(pub i64);

/// One of the 64 parts of an outbox, each published by one relay at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shard(pub u8);

impl Shard {
    /// How many there are, for ever: another number would move keys between relays in the middle.
    pub const COUNT: u8 = 64;
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An event on its way into the outbox.
#[doc(hidden)]
#[derive(Debug)]
pub struct Row {
    pub(crate) topic: Topic,
    pub(crate) key: Bytes,
    pub(crate) has_key: bool,
    pub(crate) id: Uuid,
    pub(crate) event: Envelope,
}

/// What a relay adds to an event at most: three names and their values.
const MARKS_BYTES: usize = 160;

impl Row {
    /// Checks an event as a transport would that is given it with a relay's marks.
    pub(crate) fn new(topic: &Topic, event: Envelope, max_event_bytes: usize) -> Result<Self> {
        let event = event
            .admit(max_event_bytes.saturating_sub(MARKS_BYTES))
            .map_err(|error| error.with("topic", topic))?;
        let id = dedup_id(&event);
        let (key, has_key) = match event.key() {
            Some(key) => (key.to_bytes(), true),
            None => (Bytes::copy_from_slice(id.as_bytes()), false),
        };
        Ok(Self { topic: topic.clone(), key, has_key, id, event })
    }

    /// What the event says beside topic, key and body.
    pub(crate) fn head(&self) -> String {
        head::write(&self.event)
    }

    pub(crate) fn payload(&self) -> Option<&[u8]> {
        self.event.payload().map(AsRef::as_ref)
    }

    pub(crate) fn size(&self) -> i32 {
        i32::try_from(self.event.size_bytes()).unwrap_or(i32::MAX)
    }
}

/// What an event is known by: its id if that is a UUID, else one made of source and id, which CloudEvents 1.0 (section
/// 3.1.1, "id") makes unique together.
pub(crate) fn dedup_id(event: &Envelope) -> Uuid {
    known_as(event.source(), event.id())
}

/// The same of an event with this source and id.
pub(crate) fn known_as(source: &str, id: &EventId) -> Uuid {
    id.as_uuid().unwrap_or_else(|| {
        let name = format!("{source}\n{id}");
        Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes())
    })
}

/// An event that waits to be published.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pending {
    /// Its place.
    pub id: RowId,
    /// The part of the outbox.
    pub shard: Shard,
    /// What it is known by.
    pub event_id: Uuid,
    /// Where it goes, as it is written.
    pub topic: String,
    /// What orders it: its key, or its own id if it has none.
    pub key: Bytes,
    /// The event, or why the row is none.
    pub event: std::result::Result<(Topic, Envelope), String>,
    /// Its size in bytes, as its writer counted it.
    pub size_bytes: usize,
    /// How often it was tried in vain, as far as that is stored.
    pub attempts: u32,
}

/// A row as it is stored.
pub(crate) struct Stored<'a> {
    pub(crate) id: i64,
    pub(crate) shard: i64,
    pub(crate) event_id: Uuid,
    pub(crate) topic: &'a str,
    pub(crate) key: Bytes,
    pub(crate) has_key: bool,
    pub(crate) head: &'a str,
    pub(crate) payload: Option<Bytes>,
    pub(crate) size: i64,
    pub(crate) attempts: i64,
}

impl Stored<'_> {
    pub(crate) fn read(self) -> Pending {
        let topic = Topic::new(self.topic).map_err(|error| error.message().to_owned());
        let key = self.has_key.then(|| self.key.clone());
        let event = topic.and_then(|topic| {
            head::read(self.head, self.event_id, key, self.payload).map(|event| (topic, event))
        });
        Pending {
            id: RowId(self.id),
            shard: Shard(u8::try_from(self.shard).unwrap_or_default()),
            event_id: self.event_id,
            topic: self.topic.to_owned(),
            key: self.key,
            event,
            size_bytes: usize::try_from(self.size).unwrap_or_default(),
            attempts: u32::try_from(self.attempts).unwrap_or_default(),
        }
    }
}

impl Pending {
    /// An event at its place, as a store reads it that was not yet tried.
    pub fn new(id: RowId, shard: Shard, topic: Topic, event: Envelope) -> Self {
        let event_id = dedup_id(&event);
        let key = event.key().map_or_else(|| Bytes::copy_from_slice(event_id.as_bytes()), Key::to_bytes);
        Self {
            id,
            shard,
            event_id,
            topic: topic.to_string(),
            key,
            size_bytes: event.size_bytes(),
            event: Ok((topic, event)),
            attempts: 0,
        }
    }

    /// Sets how often it was tried in vain.
    #[must_use]
    pub fn with_attempts(self, attempts: u32) -> Self {
        Self { attempts, ..self }
    }

    /// The id under which the event is published.
    pub fn published_id(&self) -> EventId {
        match &self.event {
            Ok((_, event)) => event.id().clone(),
            Err(_) => EventId::from(self.event_id),
        }
    }

    /// The key of the event, if it has one.
    pub fn ordering_key(&self) -> Option<&Key> {
        self.event.as_ref().ok().and_then(|(_, event)| event.key())
    }
}
