//! What operators see and change, whatever the database.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::fitness::Probe;
use eventbus::{Error, ErrorKind, Result, Topic};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::backend::Backend;
use crate::outbox::{Outbox, whole};
use crate::row::RowId;

/// How an outbox is.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// Events that wait, blocked ones included.
    pub n_pending: u64,
    /// Their bytes.
    pub n_bytes: u64,
    /// The age of the oldest, in milliseconds by the database's clock; `None` where nothing waits.
    pub oldest_ms: Option<i64>,
    /// Keys that are blocked.
    pub n_blocked_keys: u64,
    /// Events that were set aside.
    pub n_parked: u64,
    /// Shards that no relay owns now: nothing of them is published.
    pub n_unowned_shards: u64,
}

/// A relay, as it last said.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct RelaySeen {
    /// Its name: program, process and a number.
    pub relay: String,
    /// How many shards it owns.
    pub n_shards: u64,
    /// Milliseconds since its last word.
    pub silent_ms: i64,
}

/// Which events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Which {
    /// Those that wait.
    Pending,
    /// Those that wait and whose key is blocked.
    Blocked,
    /// Those that were set aside.
    Parked,
}

/// An event in the outbox.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Entry {
    /// Its place.
    pub id: i64,
    /// The part of the outbox.
    pub shard: i64,
    /// What it is known by, as a UUID.
    pub event_id: String,
    /// Where it goes.
    pub topic: String,
    /// The bytes of its key in hexadecimal digits; `None` without a key.
    pub key: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Milliseconds since it was stored.
    pub age_ms: i64,
    /// How often it was tried in vain, as far as that is stored.
    pub attempts: u64,
    /// Why it waits or was set aside.
    pub error: Option<String>,
    /// What it says beside its body, as it is stored: JSON.
    pub head: String,
}

/// A key that is blocked.
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Stuck {
    /// The part of the outbox.
    pub shard: i64,
    /// The topic.
    pub topic: String,
    /// The bytes of the key in hexadecimal digits.
    pub key: String,
    /// The event that failed.
    pub head_id: i64,
    /// How often it was tried in vain.
    pub attempts: u64,
    /// Whether it may pass by itself.
    pub may_pass: bool,
    /// Milliseconds until the next try.
    pub retry_in_ms: i64,
    /// What went wrong.
    pub error: String,
    /// How many events wait, the one that failed included.
    pub n_waiting: u64,
}

/// What operators do with an outbox, while programs and relays work on it. Every change is one transaction.
///
/// What is changed is seen by relays at their next look; what one has in hand already may still be published. Errors of all
/// methods: transient, and [`NotFound`](ErrorKind::NotFound) without tables. Dropping a call loses only the knowledge.
#[async_trait]
pub trait Operator: fmt::Debug + Send + Sync {
    /// Says how it is.
    async fn status(&self) -> Result<Status>;

    /// Lists relays that said something lately.
    async fn relays(&self) -> Result<Vec<RelaySeen>>;

    /// Lists events from the oldest, of a topic or all, of at least an age, up to a number.
    async fn entries(
        &self,
        which: Which,
        topic: Option<&Topic>,
        older_than: Duration,
        max: u32,
    ) -> Result<Vec<Entry>>;

    /// Shows one event, waiting or set aside, with its body.
    async fn entry(&self, id: RowId) -> Result<Option<(Entry, Option<Vec<u8>>)>>;

    /// Lists keys that are blocked, the longest first.
    async fn stuck(&self, max: u32) -> Result<Vec<Stuck>>;

    /// Makes blocked keys due at once: that of an event, or all. Returns how many.
    async fn retry(&self, head: Option<RowId>) -> Result<u64>;

    /// Takes shards from a relay that is known to be gone, which otherwise lose it with its lease. Returns how many.
    async fn release(&self, relay: &str) -> Result<u64>;

    /// Sets an event aside that waits; its key goes on without it. `false` = it does not wait (any more).
    async fn park(&self, id: RowId, reason: &str) -> Result<bool>;

    /// Puts an event that was set aside back in its place: before what waits of its key, behind what was published. `false` = it
    /// is not set aside. Relays of PostgreSQL see it within ten seconds.
    async fn unpark(&self, id: RowId) -> Result<bool>;

    /// Removes an event that was set aside, for good. `false` = it is not set aside.
    async fn discard(&self, id: RowId) -> Result<bool>;

    /// Counts events that were set aside, of a topic or all, for at least a time.
    async fn n_parked(&self, topic: Option<&Topic>, older_than: Duration) -> Result<u64>;

    /// Removes events that were set aside, of a topic or all, for at least a time; for good. Returns how many.
    async fn purge(&self, topic: Option<&Topic>, older_than: Duration) -> Result<u64>;

    /// Says whether it can be trusted: the database, who publishes, what waits for too long.
    async fn probes(&self) -> Result<Vec<Probe>>;

    /// Transactions that hold something back, with their age: keys that are held, and how far relays may read.
    async fn blockers(&self) -> Result<Vec<String>>;
}

impl<Db: Backend> Outbox<Db> {
    /// Returns what operators do with it.
    pub fn operator(&self) -> impl Operator + 'static {
        Desk(self.clone())
    }
}

/// The words in which databases differ.
#[doc(hidden)]
#[derive(Debug)]
pub struct Dialect {
    /// Before a list of names and values: makes an object in JSON.
    pub(crate) object: &'static str,
    /// Between the namespace and the name of a table.
    pub(crate) separator: char,
    /// Milliseconds since a time, whose column stands for `{}`.
    pub(crate) since_ms: &'static str,
    /// The bytes of a column in hexadecimal digits.
    pub(crate) hex: &'static str,
    /// An id as a literal, of its hexadecimal digits.
    pub(crate) id: &'static str,
    /// A text as a literal, of its bytes in hexadecimal digits.
    pub(crate) utf8: &'static str,
    /// A value as JSON has it where an object is made.
    pub(crate) text: &'static str,
    pub(crate) bool: &'static str,
    pub(crate) now: &'static str,
    /// Whether a shard has an owner whose lease holds.
    pub(crate) is_owned: fn() -> String,
    /// Milliseconds since the last word of a relay `r`.
    pub(crate) silent_ms: fn() -> String,
    /// After a query: its rows stay as they are until the end.
    pub(crate) lock: &'static str,
    /// Between the columns and the values of an insert that gives an id of its own.
    pub(crate) own_id: &'static str,
    pub(crate) blockers: &'static str,
}

pub(crate) struct Desk<Db: Backend>(pub(crate) Outbox<Db>);

impl<Db: Backend> fmt::Debug for Desk<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Operator").field(&self.0).finish()
    }
}

/// Columns that both tables of events have.
const EVENT: &str = "id, shard, event_id, topic, key, has_key, head, payload, size, created_at";

impl<Db: Backend> Desk<Db> {
    /// The statement for this database and these tables.
    fn sql(&self, text: &str) -> String {
        let dialect = Db::DIALECT;
        let text = text
            .replace("OBJECT(", dialect.object)
            .replace("NOW()", dialect.now)
            .replace("OWNED()", &(dialect.is_owned)())
            .replace("SILENT()", &(dialect.silent_ms)())
            .replace("OWN_ID", dialect.own_id);
        let functions = [
            ("SINCE(", dialect.since_ms),
            ("HEX(", dialect.hex),
            ("UTF8(", dialect.utf8),
            ("TEXT(", dialect.text),
            ("BOOL(", dialect.bool),
        ];
        let text = functions.iter().fold(text, |text, (name, by)| call(&text, name, by));
        let separator = dialect.separator;
        text.replace("EVT", &format!("{}{separator}", self.0.options().namespace))
    }

    pub(crate) async fn ask<T: DeserializeOwned + Send + 'static>(&self, text: &str) -> Result<Vec<T>> {
        let (outbox, sql) = (self.0.clone(), self.sql(text));
        let rows = whole(async move { Db::texts(outbox.pool(), sql).await }).await?;
        let read = |row: String| {
            serde_json::from_str(&row).map_err(|error| {
                Error::new(ErrorKind::Unexpected, "the database's answer was not understood").caused_by(error)
            })
        };
        rows.into_iter().map(read).collect()
    }

    /// Runs statements in one transaction; returns how many rows the last of them changed.
    pub(crate) async fn change(&self, texts: &[String]) -> Result<u64> {
        let (outbox, all) = (self.0.clone(), texts.iter().map(|text| self.sql(text)).collect::<Vec<_>>());
        whole(async move { Db::change(outbox.pool(), all).await }).await
    }

    fn entries_sql(&self, table: &str, more: &str, filter: &str) -> String {
        format!(
            "SELECT OBJECT('id', e.id, 'shard', e.shard, 'event_id', HEX(e.event_id), 'topic', e.topic,
              'key', CASE WHEN e.has_key THEN HEX(e.key) END, 'size', e.size, 'age_ms', SINCE(e.created_at), {more},
              'head', TEXT(e.head)) FROM {table} WHERE {filter}"
        )
    }
}

/// Replaces calls of a function by a text in which `{}` stands for the argument.
fn call(text: &str, name: &str, by: &str) -> String {
    let mut done = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(name) {
        let (argument, after) = after.split_once(')').unwrap_or((after, ""));
        done.push_str(before);
        done.push_str(&by.replace("{}", argument));
        rest = after;
    }
    done + rest
}

/// A text as a literal: of its bytes, in which nothing stands that statements are made of.
pub(crate) fn literal(text: &str) -> String {
    let printable: String = text.chars().filter(|char| !char.is_control()).take(1024).collect();
    let hex: String = printable.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("UTF8({hex})")
}

/// Rows of a table, whose name stands before its columns, that are of an age at least since a time, and of a topic.
fn of_age(table: &str, since: &str, topic: Option<&Topic>, older_than: Duration) -> String {
    let of =
        topic.map(|topic| format!(" AND {table}topic = {}", literal(topic.as_str()))).unwrap_or_default();
    format!("SINCE({table}{since}) >= {}{of}", older_than.as_millis())
}

const PENDING: &str =
    "EVToutbox e LEFT JOIN EVToutbox_blocked b ON b.shard = e.shard AND b.topic = e.topic AND b.key = e.key";
const OF_PENDING: &str = "'attempts', coalesce(b.attempts, 0), 'error', b.error";
const OF_PARKED: &str = "'attempts', e.attempts, 'error', e.error";

#[async_trait]
impl<Db: Backend> Operator for Desk<Db> {
    async fn status(&self) -> Result<Status> {
        let sql = "SELECT OBJECT('n_pending', (SELECT count(*) FROM EVToutbox), 'n_bytes', (SELECT coalesce(sum(size), 0) FROM EVToutbox),
            'oldest_ms', (SELECT max(SINCE(created_at)) FROM EVToutbox), 'n_blocked_keys', (SELECT count(*) FROM EVToutbox_blocked),
            'n_parked', (SELECT count(*) FROM EVToutbox_parked),
            'n_unowned_shards', (SELECT count(*) FROM EVToutbox_shard WHERE NOT (OWNED())))";
        let missing = || Error::new(ErrorKind::Unexpected, "the database gave no answer");
        self.ask(sql).await?.pop().ok_or_else(missing)
    }

    async fn relays(&self) -> Result<Vec<RelaySeen>> {
        self.ask(
            "SELECT OBJECT('relay', r.relay, 'n_shards', (SELECT count(*) FROM EVToutbox_shard s WHERE s.owner = r.relay),
            'silent_ms', SILENT()) FROM EVToutbox_relay r ORDER BY r.relay",
        )
        .await
    }

    async fn entries(
        &self,
        which: Which,
        topic: Option<&Topic>,
        older_than: Duration,
        max: u32,
    ) -> Result<Vec<Entry>> {
        let filter = of_age("e.", "created_at", topic, older_than);
        let order = format!(" ORDER BY e.id LIMIT {max}");
        let sql = match which {
            Which::Pending => self.entries_sql(PENDING, OF_PENDING, &filter),
            Which::Blocked => {
                self.entries_sql(PENDING, OF_PENDING, &format!("b.head_id IS NOT NULL AND {filter}"))
            }
            Which::Parked => self.entries_sql("EVToutbox_parked e", OF_PARKED, &filter),
        };
        self.ask(&(sql + &order)).await
    }

    async fn entry(&self, id: RowId) -> Result<Option<(Entry, Option<Vec<u8>>)>> {
        let filter = format!("e.id = {}", id.0);
        for (table, more) in [(PENDING, OF_PENDING), ("EVToutbox_parked e", OF_PARKED)] {
            let found = self.ask(&self.entries_sql(table, more, &filter)).await?.pop();
            let Some(entry) = found else { continue };
            let name = table.split(' ').next().unwrap_or(table);
            let body = format!("SELECT OBJECT('hex', HEX(payload)) FROM {name} WHERE id = {}", id.0);
            let body: Option<Body> = self.ask(&body).await?.pop();
            return Ok(Some((entry, body.and_then(|body| body.hex).map(|hex| bytes_of(&hex)))));
        }
        Ok(None)
    }

    async fn stuck(&self, max: u32) -> Result<Vec<Stuck>> {
        self.ask(&format!(
            "SELECT OBJECT('shard', b.shard, 'topic', b.topic, 'key', HEX(b.key), 'head_id', b.head_id, 'attempts', b.attempts,
            'may_pass', BOOL(b.may_pass), 'retry_in_ms', -SINCE(b.retry_at), 'error', b.error, 'n_waiting', (SELECT count(*) FROM EVToutbox o
              WHERE o.shard = b.shard AND o.topic = b.topic AND o.key = b.key))
            FROM EVToutbox_blocked b ORDER BY b.attempts DESC, b.head_id LIMIT {max}"
        ))
        .await
    }

    async fn retry(&self, head: Option<RowId>) -> Result<u64> {
        let filter = head.map_or_else(|| "1 = 1".to_owned(), |id| format!("head_id = {}", id.0));
        self.change(&[format!("UPDATE EVToutbox_blocked SET retry_at = NOW() WHERE {filter}")]).await
    }

    async fn release(&self, relay: &str) -> Result<u64> {
        let relay = literal(relay);
        self.change(&[
            format!("DELETE FROM EVToutbox_relay WHERE relay = {relay}"),
            format!("UPDATE EVToutbox_shard SET owner = NULL WHERE owner = {relay}"),
        ])
        .await
    }

    async fn park(&self, id: RowId, reason: &str) -> Result<bool> {
        let (id, reason) = (id.0, literal(reason));
        let n_parked = self
            .change(&[
                // A relay that notes it as published waits for us, or we find it gone.
                format!("SELECT 1 FROM EVToutbox WHERE id = {id} {}", Db::DIALECT.lock),
                format!(
                    "INSERT INTO EVToutbox_parked ({EVENT}, attempts, error) SELECT {EVENT}, coalesce((SELECT attempts FROM EVToutbox_blocked
                      WHERE head_id = {id}), 0), {reason} FROM EVToutbox WHERE id = {id}"
                ),
                format!("DELETE FROM EVToutbox_blocked WHERE head_id = {id}"),
                format!("DELETE FROM EVToutbox WHERE id = {id}"),
            ])
            .await?;
        Ok(n_parked > 0)
    }

    async fn unpark(&self, id: RowId) -> Result<bool> {
        let id = id.0;
        let n_back = self
            .change(&[
                format!(
                    "INSERT INTO EVToutbox ({EVENT}) OWN_ID SELECT {EVENT} FROM EVToutbox_parked WHERE id = {id}"
                ),
                format!("DELETE FROM EVToutbox_parked WHERE id = {id}"),
            ])
            .await?;
        self.0.wake();
        Ok(n_back > 0)
    }

    async fn discard(&self, id: RowId) -> Result<bool> {
        Ok(self.change(&[format!("DELETE FROM EVToutbox_parked WHERE id = {}", id.0)]).await? > 0)
    }

    async fn purge(&self, topic: Option<&Topic>, older_than: Duration) -> Result<u64> {
        let filter = of_age("", "parked_at", topic, older_than);
        self.change(&[format!("DELETE FROM EVToutbox_parked WHERE {filter}")]).await
    }

    async fn probes(&self) -> Result<Vec<Probe>> {
        self.look().await
    }

    async fn n_parked(&self, topic: Option<&Topic>, older_than: Duration) -> Result<u64> {
        let filter = of_age("p.", "parked_at", topic, older_than);
        let sql = format!("SELECT OBJECT('n', (SELECT count(*) FROM EVToutbox_parked p WHERE {filter}))");
        Ok(self.ask::<Count>(&sql).await?.pop().map_or(0, |count| count.n))
    }

    async fn blockers(&self) -> Result<Vec<String>> {
        match Db::DIALECT.blockers {
            "" => Ok(Vec::new()),
            sql => self.ask(sql).await,
        }
    }
}

#[derive(Deserialize)]
struct Count {
    n: u64,
}

#[derive(Deserialize)]
struct Body {
    hex: Option<String>,
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digit = |at: usize| hex.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    (0..hex.len()).step_by(2).filter_map(digit).collect()
}
