//! What operators see and change of what consumers remember.

use std::fmt;

use async_trait::async_trait;
use eventbus::{Envelope, Result};
use serde::Deserialize;
use uuid::Uuid;

use crate::backend::Backend;
use crate::operator::{Desk, literal};
use crate::outbox::Outbox;
use crate::row::dedup_id;

/// A consumer that remembers what it handled.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct ConsumerSeen {
    /// Its name: `service.handler@generation`.
    pub consumer: String,
    /// By what it knows an event, as [`Memory`](crate::Memory) has it.
    pub memory: String,
    /// For how many seconds at least.
    pub remembers_seconds: u64,
    /// How many events, or keys, it knows.
    pub n_known: u64,
    /// How many calls of an [`Intent`](crate::Intent) began and have not ended.
    pub n_begun: u64,
    /// Milliseconds since the first of them; `None` where it knows nothing.
    pub oldest_ms: Option<i64>,
}

/// An event that a consumer handled.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Handled {
    /// What the event is known by, as a UUID without hyphens.
    pub event_id: String,
    /// Milliseconds since then.
    pub age_ms: i64,
}

/// How far a consumer has handled a key.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Progress {
    /// The outbox that numbers the key's events, and the topic, as the inbox notes them.
    pub source: String,
    /// The bytes of the key in hexadecimal digits.
    pub key: String,
    /// The last number.
    pub last_seq: i64,
    /// Milliseconds since then.
    pub age_ms: i64,
}

/// What operators do with what consumers remember, while programs handle events. Errors of all methods: transient, and
/// [`NotFound`](eventbus::ErrorKind::NotFound) without tables. Dropping a call loses only the knowledge.
#[async_trait]
pub trait InboxOperator: fmt::Debug + Send + Sync {
    /// Lists consumers, by name, and counts what they know: that looks at all of it.
    async fn consumers(&self) -> Result<Vec<ConsumerSeen>>;

    /// Returns by what a consumer knows events, as [`ConsumerSeen::memory`] has it; `None` = there is no such consumer.
    async fn memory(&self, consumer: &str) -> Result<Option<String>>;

    /// Lists what a consumer handled that knows events by their ids, the latest first.
    async fn handled(&self, consumer: &str, max: u32) -> Result<Vec<Handled>>;

    /// Lists how far a consumer is that knows events by their numbers, the latest first.
    async fn progress(&self, consumer: &str, max: u32) -> Result<Vec<Progress>>;

    /// Returns which of these events a consumer knows by their ids.
    async fn knows(&self, consumer: &str, ids: &[Uuid]) -> Result<Vec<Uuid>>;

    /// Has one consumer, or all, forget an event that they know by its id: when it comes again, it is handled again. Returns
    /// how many knew it.
    async fn forget(&self, consumer: Option<&str>, id: Uuid) -> Result<u64>;
}

impl<Db: Backend> Outbox<Db> {
    /// Returns what operators do with what consumers remember in this database.
    pub fn inbox_operator(&self) -> impl InboxOperator + 'static {
        Desk(self.clone())
    }
}

/// What an inbox knows an event by: its id if that is a UUID, else one that is made of its source and its id.
pub fn known_by(event: &Envelope) -> Uuid {
    dedup_id(event)
}

#[derive(Deserialize)]
struct Known {
    id: String,
}

#[derive(Deserialize)]
struct Noted {
    memory: String,
}

/// An id as a literal of the database.
fn literal_id<Db: Backend>(id: &Uuid) -> String {
    Db::DIALECT.id.replace("{}", &id.simple().to_string())
}

#[async_trait]
impl<Db: Backend> InboxOperator for Desk<Db> {
    async fn consumers(&self) -> Result<Vec<ConsumerSeen>> {
        self.ask(
            "SELECT OBJECT('consumer', c.consumer, 'memory', c.memory, 'remembers_seconds', c.remembers_seconds,
              'n_known', (SELECT count(*) FROM EVTinbox i WHERE i.consumer = c.consumer)
                + (SELECT count(*) FROM EVTkey_progress k WHERE k.consumer = c.consumer),
              'n_begun', (SELECT count(*) FROM EVTintent t WHERE t.consumer = c.consumer),
              'oldest_ms', coalesce((SELECT max(SINCE(i.seen_at)) FROM EVTinbox i WHERE i.consumer = c.consumer),
                (SELECT max(SINCE(k.seen_at)) FROM EVTkey_progress k WHERE k.consumer = c.consumer)))
            FROM EVTconsumer c ORDER BY c.consumer",
        )
        .await
    }

    async fn memory(&self, consumer: &str) -> Result<Option<String>> {
        let of = literal(consumer);
        let sql = format!("SELECT OBJECT('memory', c.memory) FROM EVTconsumer c WHERE c.consumer = {of}");
        Ok(self.ask::<Noted>(&sql).await?.pop().map(|noted| noted.memory))
    }

    async fn handled(&self, consumer: &str, max: u32) -> Result<Vec<Handled>> {
        self.ask(&format!(
            "SELECT OBJECT('event_id', HEX(i.message_id), 'age_ms', SINCE(i.seen_at)) FROM EVTinbox i
            WHERE i.consumer = {} ORDER BY i.seen_at DESC LIMIT {max}",
            literal(consumer)
        ))
        .await
    }

    async fn progress(&self, consumer: &str, max: u32) -> Result<Vec<Progress>> {
        self.ask(&format!(
            "SELECT OBJECT('source', k.source, 'key', HEX(k.key), 'last_seq', k.last_seq, 'age_ms', SINCE(k.seen_at))
            FROM EVTkey_progress k WHERE k.consumer = {} ORDER BY k.seen_at DESC LIMIT {max}",
            literal(consumer)
        ))
        .await
    }

    async fn knows(&self, consumer: &str, ids: &[Uuid]) -> Result<Vec<Uuid>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let list: Vec<String> = ids.iter().map(literal_id::<Db>).collect();
        let known: Vec<Known> = self
            .ask(&format!(
                "SELECT OBJECT('id', HEX(i.message_id)) FROM EVTinbox i WHERE i.consumer = {} AND i.message_id IN ({})",
                literal(consumer),
                list.join(", ")
            ))
            .await?;
        Ok(known.iter().filter_map(|known| Uuid::parse_str(&known.id).ok()).collect())
    }

    async fn forget(&self, consumer: Option<&str>, id: Uuid) -> Result<u64> {
        let of = consumer.map_or_else(
            || "consumer IN (SELECT consumer FROM EVTconsumer)".to_owned(),
            |consumer| format!("consumer = {}", literal(consumer)),
        );
        self.change(&[format!("DELETE FROM EVTinbox WHERE {of} AND message_id = {}", literal_id::<Db>(&id))])
            .await
    }
}
