//! A map that all who read its stream agree on: each change is a message that names the revision it was made from, and
//! holds if that is the revision when its turn in the stream comes.
//!
//! Whoever wants to know what is true now appends a look, and reads up to it. The stream is bounded: from time to time
//! the whole map is appended, and what lies before may be removed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::map::{Change, Map, Read};
use super::streams::{Readers, at, exists, short};
use super::wire::{Wires, failed, reading};
use super::{message, names};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::kit::leased::registers::Held;

/// How many messages before the end reading begins: a whole map is most likely among them.
const NEAR: u64 = 8192;
/// What the map may be: a whole one and what comes between two of them must be kept.
const MAX_MAP: usize = 4 << 20;
/// What the broker sends ahead, and how often it is told that more may come.
const AHEAD: u16 = 1024;
const ACK_EVERY: u64 = 256;
/// When a reader that failed is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// What a message of the stream is: its property `type`.
const SET: &str = "set";
const REMOVE: &str = "remove";
const LOOK: &str = "look";
const WHOLE: &str = "whole";
const KEY: &str = "key";
const REVISION: &str = "revision";

pub(super) struct Table {
    shared: Arc<Shared>,
    reading: JoinHandle<()>,
}

struct Shared {
    wires: Arc<Wires>,
    name: String,
    state: Mutex<State>,
    sender: tokio::sync::Mutex<Option<Channel>>,
    /// One look at a time: who waits for it is served by the next one, however many they are.
    looking: tokio::sync::Mutex<()>,
    n_asked: AtomicU64,
    n_looked: AtomicU64,
    /// Begins the marks of our own messages.
    mark: String,
    next_mark: AtomicU64,
}

#[derive(Default)]
struct State {
    map: Map,
    waiting: HashMap<String, oneshot::Sender<Result<Option<u64>>>>,
    is_gone: bool,
}

impl Drop for Table {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl Table {
    /// Begins to read the map that a stream keeps.
    pub(super) fn open(wires: &Arc<Wires>, name: String) -> Arc<Self> {
        let shared = Arc::new(Shared {
            wires: wires.clone(),
            name,
            state: Mutex::default(),
            sender: tokio::sync::Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            n_asked: AtomicU64::new(0),
            n_looked: AtomicU64::new(0),
            mark: format!("{:016x}", fastrand::u64(..)),
            next_mark: AtomicU64::new(0),
        });
        let reading = tokio::spawn(follow(shared.clone()));
        Arc::new(Self { shared, reading })
    }

    /// Whether the stream was deleted.
    pub(super) fn is_gone(&self) -> bool {
        self.shared.state.lock().is_gone
    }

    /// The value of a key, as far as it was heard: what others wrote just now may not be in it.
    pub(super) fn heard(&self, key: &str) -> Option<Bytes> {
        self.shared.state.lock().map.get(key).map(|held| held.value)
    }

    /// The value of a key now.
    pub(super) async fn get(&self, key: &str) -> Result<Option<Held<Bytes>>> {
        self.look().await?;
        Ok(self.shared.state.lock().map.get(key))
    }

    /// The keys that begin like this now.
    pub(super) async fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        self.look().await?;
        Ok(self.shared.state.lock().map.keys(prefix))
    }

    /// Reads what was written before this.
    async fn look(&self) -> Result<()> {
        let shared = &self.shared;
        let ours = shared.n_asked.fetch_add(1, Atomic::AcqRel) + 1;
        let _turn = shared.wires.within(async { Ok(shared.looking.lock().await) }).await?;
        if shared.n_looked.load(Atomic::Acquire) >= ours {
            // One that began after we asked.
            return Ok(());
        }
        let up_to = shared.n_asked.load(Atomic::Acquire);
        shared.change(LOOK, "", 0, Bytes::new()).await?;
        shared.n_looked.store(up_to, Atomic::Release);
        Ok(())
    }

    /// Writes a key if nobody changed it meanwhile; `None` = somebody did. Returns the new revision.
    ///
    /// # Errors
    /// [`Full`](ErrorKind::Full) if the map would be larger than its stream can keep.
    pub(super) async fn set(&self, key: &str, value: Bytes, revision: u64) -> Result<Option<u64>> {
        let n_bytes = self.shared.state.lock().map.n_bytes();
        if n_bytes + value.len() > MAX_MAP {
            return Err(Error::new(
                ErrorKind::Full,
                "the topic has too many groups and partitions for its map",
            )
            .with("stream", &self.shared.name)
            .with("bytes", n_bytes)
            .with("max", MAX_MAP));
        }
        self.shared.change(SET, key, revision, value).await
    }

    /// Removes a key if nobody changed it meanwhile; `None` = somebody did.
    pub(super) async fn remove(&self, key: &str, revision: u64) -> Result<Option<()>> {
        let removed = self.shared.change(REMOVE, key, revision, Bytes::new()).await?;
        Ok(removed.map(drop))
    }

    /// The offset below which a partition was purged, as far as it was heard.
    pub(super) fn low(&self, partition: u32) -> u64 {
        let low = self.heard(&names::low(partition));
        low.and_then(|low| std::str::from_utf8(&low).ok()?.parse().ok()).unwrap_or(0)
    }

    /// The offsets below which partitions were purged; of what others purge just now, perhaps not.
    pub(super) async fn lows(&self, partitions: &[u32]) -> Result<Vec<u64>> {
        let is_known = self.shared.state.lock().map.is_known();
        if !is_known || self.shared.n_looked.load(Atomic::Acquire) == 0 {
            self.look().await?;
        }
        Ok(partitions.iter().map(|partition| self.low(*partition)).collect())
    }

    /// What is written to a key from now on.
    pub(super) fn changes(&self, key: &str) -> mpsc::UnboundedReceiver<Bytes> {
        self.shared.state.lock().map.hear(key)
    }
}

/// Forgets who waits, also if it goes away.
struct Waiting<'a> {
    shared: &'a Shared,
    mark: String,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().waiting.remove(&self.mark);
    }
}

impl Shared {
    fn gone(&self) -> Error {
        Error::not_found("the topic or group was deleted").with("stream", &self.name)
    }

    /// Appends a change and reads up to it: the revision it made, `None` if another was made meanwhile.
    async fn change(&self, kind: &str, key: &str, revision: u64, value: Bytes) -> Result<Option<u64>> {
        let mark = format!("{}.{}", self.mark, self.next_mark.fetch_add(1, Atomic::Relaxed));
        let (told, outcome) = oneshot::channel();
        {
            let mut state = self.state.lock();
            if state.is_gone {
                return Err(self.gone());
            }
            state.waiting.insert(mark.clone(), told);
        }
        let waiting = Waiting { shared: self, mark };
        let changing = async {
            self.append(kind, key, revision, &waiting.mark, &value).await?;
            outcome.await.unwrap_or_else(|_| Err(self.gone()))
        };
        self.wires.within(changing).await
    }

    async fn append(&self, kind: &str, key: &str, revision: u64, mark: &str, value: &[u8]) -> Result<()> {
        let mut headers = FieldTable::default();
        headers.insert(KEY.into(), AMQPValue::LongString(key.into()));
        headers.insert(REVISION.into(), AMQPValue::LongLongInt(i64::try_from(revision).unwrap_or(i64::MAX)));
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_type(short(kind)?)
            .with_message_id(short(mark)?)
            .with_headers(headers);
        let mut sender = self.sender.lock().await;
        let channel = match sender.as_ref().filter(|known| known.status().connected()) {
            Some(known) => known.clone(),
            None => sender.insert(self.wires.send.channel().await?).clone(),
        };
        drop(sender);
        let (queue, options) = (short(&self.name)?, BasicPublishOptions::default());
        // The client has it when this was polled; that it is in the stream, the reader says.
        let handed = channel.basic_publish(ShortString::default(), queue, options, value, properties);
        handed.now_or_never().transpose().map(drop).map_err(failed)
    }

    /// Reads until that fails, or the stream is gone (false).
    async fn read(self: &Arc<Self>) -> Result<bool> {
        let beginning = async {
            let readers = Readers::open(&self.wires, AHEAD).await?;
            let (next, is_from_first) = {
                let map = &self.state.lock().map;
                (map.next(), map.is_from_first())
            };
            let end = if next.is_none() && is_from_first { 0 } else { self.end_now().await? };
            let from = match next {
                Some(next) if end < next => {
                    let what = "the stream is another: it was deleted and created anew";
                    return Err(Error::not_found(what).with("stream", &self.name));
                }
                Some(next) => at(next),
                None if end > NEAR => {
                    self.state.lock().map.begin_at(end - NEAR, end);
                    at(end - NEAR)
                }
                None => AMQPValue::LongString("first".into()),
            };
            let messages = readers.begin(&self.name, from).await?;
            Ok((readers, messages))
        };
        let (readers, mut messages) = match self.wires.within(beginning).await {
            Ok(begun) => begun,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut n_read = 0_u64;
        while let Some(message) = messages.next().await {
            let message = message.map_err(reading)?;
            let tag = message.delivery_tag;
            n_read += 1;
            if !self.take(message) {
                return Ok(true);
            }
            if n_read.is_multiple_of(ACK_EVERY) {
                readers.ack(tag)?;
            }
        }
        // The broker ended it: because the stream was deleted, or moves.
        exists(&self.wires, &self.name).await
    }

    /// The offset of a message that is appended now.
    async fn end_now(&self) -> Result<u64> {
        let readers = Readers::open(&self.wires, AHEAD).await?;
        let mut messages = readers.begin(&self.name, AMQPValue::LongString("next".into())).await?;
        let mark = format!("{}.end.{}", self.mark, self.next_mark.fetch_add(1, Atomic::Relaxed));
        self.append(LOOK, "", 0, &mark, b"").await?;
        while let Some(message) = messages.next().await {
            let message = message.map_err(reading)?;
            if message.properties.message_id().as_ref().is_some_and(|known| known.as_str() == mark) {
                return message::offset(&message).ok_or_else(|| self.gone());
            }
            readers.ack(message.delivery_tag)?;
        }
        Err(Error::new(ErrorKind::Unavailable, "the broker ended the reader"))
    }

    /// Takes in a message, in the order of the stream; false if reading must begin anew.
    fn take(self: &Arc<Self>, message: Delivery) -> bool {
        let Some(offset) = message::offset(&message) else { return true };
        let mark = message.properties.message_id().clone().unwrap_or_default();
        let size = message.data.len() + 128;
        let change = read_change(message);
        let mut state = self.state.lock();
        let outcome = match state.map.take_in(offset, size, change) {
            Read::Taken(outcome) => outcome,
            Read::Known => return true,
            // Whoever waits is answered when its message is read again.
            Read::Restart => return false,
        };
        let is_ours = mark.as_str().starts_with(&self.mark);
        let told = if is_ours { state.waiting.remove(mark.as_str()) } else { None };
        match (told, outcome) {
            (Some(told), Some(outcome)) => drop(told.send(outcome)),
            (Some(told), None) => _ = state.waiting.insert(mark.as_str().to_owned(), told),
            (None, _) => {}
        }
        let due = if is_ours { state.map.due(offset) } else { None };
        drop(state);
        if let Some(whole) = due {
            let shared = self.clone();
            // If that fails, the next change that is ours says it again, later.
            tokio::spawn(async move {
                let mark = shared.mark.clone();
                if let Err(error) = shared.append(WHOLE, "", 0, &mark, &whole).await {
                    tracing::debug!(%error, stream = %shared.name, "the map was not written");
                }
            });
        }
        true
    }

    /// Tells everybody that nothing more comes.
    fn end(&self) {
        let mut state = self.state.lock();
        state.is_gone = true;
        // Who waits finds its sender gone.
        state.waiting.clear();
        state.map.end();
    }
}

async fn follow(shared: Arc<Shared>) {
    loop {
        match shared.read().await {
            Ok(true) => {}
            Ok(false) => return shared.end(),
            Err(error) if error.kind() == ErrorKind::Closed => return,
            Err(error) if !error.is_retryable() => {
                // Whoever waits hears why, instead of waiting in vain.
                let waiting = std::mem::take(&mut shared.state.lock().waiting);
                waiting.into_values().for_each(|told| drop(told.send(Err(error.duplicate()))));
            }
            Err(error) => tracing::debug!(%error, stream = %shared.name, "reading anew"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// What a message of the stream says; `None` for what is not ours.
fn read_change(message: Delivery) -> Option<Change> {
    let Delivery { properties, data, .. } = message;
    let kind = properties.kind().clone()?;
    let header = |name: &str| properties.headers().as_ref()?.inner().get(name);
    let key = || match header(KEY)? {
        AMQPValue::LongString(key) => String::from_utf8(key.as_bytes().to_vec()).ok(),
        _ => None,
    };
    let revision = || match header(REVISION)? {
        AMQPValue::LongLongInt(revision) => u64::try_from(*revision).ok(),
        _ => None,
    };
    Some(match kind.as_str() {
        SET => Change::Set { key: key()?, revision: revision()?, value: Bytes::from(data) },
        REMOVE => Change::Remove { key: key()?, revision: revision()? },
        LOOK => Change::Look,
        WHOLE => Change::Whole(serde_json::from_slice(&data).ok()?),
        _ => return None,
    })
}
