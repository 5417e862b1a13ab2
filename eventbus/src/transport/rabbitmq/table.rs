//! A map that all who read its stream agree on: each change is a message that names the revision it was made from, and
//! holds if that is the revision when its turn in the stream comes.
//!
//! Whoever wants to know what is true now appends a look, and reads up to it. The stream is bounded: from time to time
//! the whole map is appended, and what lies before may be removed.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::wire::{Wires, failed, reading};
use super::{message, names};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::kit::leased::registers::Held;

/// What the stream keeps at least, and in pieces of which size it is removed.
const MAX_BYTES: i64 = 16 << 20;
const SEGMENT_BYTES: i64 = 1 << 20;
/// How many messages before the end reading begins: a whole map is most likely among them.
const NEAR: u64 = 8192;
/// What is appended between two whole maps, or as much as the map's own size.
const BETWEEN: usize = 1 << 20;
/// What the map may be: a whole one and what comes between two of them must be kept.
const MAX_MAP: usize = 4 << 20;
/// What the broker sends ahead, and how often it is told that more may come.
const AHEAD: u16 = 1024;
const ACK_EVERY: u64 = 256;
/// When a reader that failed is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// How long somebody else may take to create a topic.
const LONGEST: Duration = Duration::from_secs(60);
/// Offsets that may be missing though nothing was removed: the broker's own notes take some.
const GAP: u64 = 16;

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
    entries: BTreeMap<String, (u64, Bytes)>,
    n_bytes: usize,
    /// The offset that is due next; `None` = nothing was read.
    next: Option<u64>,
    /// What was read, until the map is known.
    unknown: Option<Unknown>,
    /// Whether reading must begin at the first message: there was no whole map near the end.
    from_first: bool,
    since_whole: usize,
    waiting: HashMap<String, oneshot::Sender<Result<Option<u64>>>>,
    heard: HashMap<String, Vec<mpsc::UnboundedSender<Bytes>>>,
    is_gone: bool,
}

struct Unknown {
    /// Where reading began.
    from: u64,
    before: Vec<(u64, Change)>,
    /// Whether that is not where the stream begins: if there is no whole map up to this offset, it is read from there.
    until: Option<u64>,
}

enum Change {
    Set {
        key: String,
        revision: u64,
        value: Bytes,
    },
    Remove {
        key: String,
        revision: u64,
    },
    /// The map as it was after an offset.
    Whole(Whole),
    Look,
}

#[derive(Serialize, Deserialize)]
struct Whole {
    after: u64,
    entries: BTreeMap<String, (u64, String)>,
}

impl Drop for Table {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// What the broker is told of a stream.
pub(super) fn stream_arguments(more: &[(&'static str, AMQPValue)]) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
    for (name, value) in more {
        arguments.insert((*name).into(), value.clone());
    }
    arguments
}

/// Where reading a stream begins.
pub(super) fn read_from(offset: AMQPValue) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), offset);
    arguments
}

pub(super) fn at(offset: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX))
}

/// A name as the protocol wants it; ours are checked before.
pub(super) fn short(name: &str) -> Result<ShortString> {
    ShortString::try_new(name)
        .map_err(|_| Error::config("a name is longer than 255 bytes").with("name", name))
}

/// Whether there is a queue of this name.
pub(super) async fn exists(wires: &Wires, name: &str) -> Result<bool> {
    match look_for(wires, name).await {
        // "Not found" closes the channel, and a client that hears of the end first reports that instead.
        Err(error) if error.kind() == ErrorKind::Unavailable => look_for(wires, name).await,
        found => found,
    }
}

async fn look_for(wires: &Wires, name: &str) -> Result<bool> {
    let channel = wires.read.channel().await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let looking = async {
        match channel.queue_declare(short(name)?, passive, FieldTable::default()).await.map_err(failed) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            // It is there, and is another connection's.
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(true),
            Err(error) => Err(error),
        }
    };
    wires.within(looking).await
}

/// Does what nobody else does at the same time, on any connection. A broker that is asked for a stream while somebody
/// else creates it ends the connection (seen with 3.10.8).
pub(super) async fn alone<T>(wires: &Wires, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let name = short(&names::lock(what))?;
    let deadline = Instant::now() + wires.timeout + LONGEST;
    let channel = loop {
        let channel = wires.read.channel().await?;
        let ours = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let declaring =
            async { channel.queue_declare(name.clone(), ours, FieldTable::default()).await.map_err(failed) };
        match wires.within(declaring).await {
            Ok(_) => break channel,
            Err(error) if error.kind() == ErrorKind::Conflict && Instant::now() < deadline => {
                tokio::time::sleep(AGAIN * 2).await;
            }
            Err(error) => return Err(error),
        }
    };
    // Also if the work is given up: the lock would stand as long as the connection.
    let lock = Lock { channel, name };
    let outcome = work.await;
    drop(lock);
    outcome
}

/// A lock that is held; dropped, it is given back.
struct Lock {
    channel: Channel,
    name: ShortString,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // It is in the client's line, before the end of the channel.
        let ending = self.channel.queue_delete(self.name.clone(), QueueDeleteOptions::default());
        drop(ending.now_or_never());
    }
}

/// Creates the stream of a map, if there is none.
pub(super) async fn create(wires: &Wires, name: &str) -> Result<()> {
    let channel = wires.read.channel().await?;
    let arguments = stream_arguments(&[
        ("x-max-length-bytes", AMQPValue::LongLongInt(MAX_BYTES)),
        ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(SEGMENT_BYTES)),
    ]);
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declaring = async { channel.queue_declare(short(name)?, durable, arguments).await.map_err(failed) };
    match wires.within(declaring).await {
        // With other bounds: those of whoever made it.
        Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
        declared => declared.map(drop),
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
        self.shared.state.lock().entries.get(key).map(|(_, value)| value.clone())
    }

    /// The value of a key now.
    pub(super) async fn get(&self, key: &str) -> Result<Option<Held<Bytes>>> {
        self.look().await?;
        let state = self.shared.state.lock();
        Ok(state.entries.get(key).map(|(revision, value)| Held { value: value.clone(), revision: *revision }))
    }

    /// The keys that begin like this now.
    pub(super) async fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        self.look().await?;
        let state = self.shared.state.lock();
        let from = state.entries.range(prefix.to_owned()..);
        Ok(from.map(|(key, _)| key).take_while(|key| key.starts_with(prefix)).cloned().collect())
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
        let n_bytes = self.shared.state.lock().n_bytes;
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
        let is_known = self.shared.state.lock().is_known();
        if !is_known || self.shared.n_looked.load(Atomic::Acquire) == 0 {
            self.look().await?;
        }
        Ok(partitions.iter().map(|partition| self.low(*partition)).collect())
    }

    /// What is written to a key from now on.
    pub(super) fn changes(&self, key: &str) -> mpsc::UnboundedReceiver<Bytes> {
        let (sender, heard) = mpsc::unbounded_channel();
        let mut state = self.shared.state.lock();
        for known in state.heard.values_mut() {
            known.retain(|heard| !heard.is_closed());
        }
        state.heard.retain(|_, heard| !heard.is_empty());
        state.heard.entry(key.to_owned()).or_default().push(sender);
        heard
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
        let channel = self.wires.read.own_channel().await?;
        let consuming = async {
            let (next, from_first) = {
                let state = self.state.lock();
                (state.next, state.from_first)
            };
            let end = if next.is_none() && from_first { 0 } else { self.end_now().await? };
            let from = match next {
                Some(next) if end < next => {
                    let what = "the stream is another: it was deleted and created anew";
                    return Err(Error::not_found(what).with("stream", &self.name));
                }
                Some(next) => at(next),
                None if end > NEAR => {
                    let from = end - NEAR;
                    let mut state = self.state.lock();
                    state.next = Some(from);
                    state.unknown = Some(Unknown { from, before: Vec::new(), until: Some(end) });
                    at(from)
                }
                None => AMQPValue::LongString("first".into()),
            };
            channel.basic_qos(AHEAD, BasicQosOptions::default()).await.map_err(reading)?;
            let (tag, options) = (ShortString::default(), BasicConsumeOptions::default());
            channel.basic_consume(short(&self.name)?, tag, options, read_from(from)).await.map_err(reading)
        };
        let mut messages = match self.wires.within(consuming).await {
            Ok(messages) => messages,
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
                ack(&channel, tag)?;
            }
        }
        // The broker ended it: because the stream was deleted, or moves.
        exists(&self.wires, &self.name).await
    }

    /// The offset of a message that is appended now.
    async fn end_now(&self) -> Result<u64> {
        let channel = self.wires.read.own_channel().await?;
        channel.basic_qos(AHEAD, BasicQosOptions::default()).await.map_err(reading)?;
        let (tag, options) = (ShortString::default(), BasicConsumeOptions::default());
        let from = read_from(AMQPValue::LongString("next".into()));
        let mut messages =
            channel.basic_consume(short(&self.name)?, tag, options, from).await.map_err(reading)?;
        let mark = format!("{}.end.{}", self.mark, self.next_mark.fetch_add(1, Atomic::Relaxed));
        self.append(LOOK, "", 0, &mark, b"").await?;
        while let Some(message) = messages.next().await {
            let message = message.map_err(reading)?;
            if message.properties.message_id().as_ref().is_some_and(|known| known.as_str() == mark) {
                return message::offset(&message).ok_or_else(|| self.gone());
            }
            ack(&channel, message.delivery_tag)?;
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
        match state.next {
            None => {
                state.unknown =
                    (offset > 0).then(|| Unknown { from: offset, before: Vec::new(), until: None })
            }
            Some(next) if offset < next => return true,
            // More was removed than we had read. What is left holds a whole map.
            Some(next) if offset > next + GAP => {
                state.begin_anew();
                return false;
            }
            Some(_) => {}
        }
        state.next = Some(offset + 1);
        state.since_whole += size;
        let is_ours = mark.as_str().starts_with(&self.mark);
        let outcome = match change {
            Some(change) => state.take(offset, change),
            None => Some(Ok(None)),
        };
        if state.unknown.as_ref().is_some_and(|unknown| unknown.until.is_some_and(|until| until <= offset)) {
            // Whoever waits is answered when its message is read again.
            state.begin_anew();
            return false;
        }
        let told = if is_ours { state.waiting.remove(mark.as_str()) } else { None };
        match (told, outcome) {
            (Some(told), Some(outcome)) => drop(told.send(outcome)),
            (Some(told), None) => _ = state.waiting.insert(mark.as_str().to_owned(), told),
            (None, _) => {}
        }
        let is_due = state.since_whole > BETWEEN.max(state.n_bytes) && state.unknown.is_none();
        if is_ours && is_due {
            state.since_whole = 0;
            let whole = state.whole(offset);
            drop(state);
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
        state.entries.clear();
        // Who waits finds its sender gone; who hears finds a value that is none.
        state.waiting.clear();
        for heard in std::mem::take(&mut state.heard).into_values().flatten() {
            drop(heard.send(Bytes::new()));
        }
    }
}

/// Says that the broker may send more, without waiting until that is written.
pub(super) fn ack(channel: &Channel, tag: u64) -> Result<()> {
    let acked = channel.basic_ack(tag, BasicAckOptions { multiple: true });
    acked.now_or_never().transpose().map(drop).map_err(failed)
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

impl State {
    fn is_known(&self) -> bool {
        self.next.is_some() && self.unknown.is_none()
    }

    /// Forgets what was read: reading begins at the first message there is.
    fn begin_anew(&mut self) {
        (self.next, self.unknown, self.from_first) = (None, None, true);
        (self.entries, self.n_bytes, self.since_whole) = (BTreeMap::new(), 0, 0);
    }

    /// What a change makes of the map: the new revision, `None` if it was made from another than there is. Nothing while
    /// the map is not known and may still be.
    fn take(&mut self, offset: u64, change: Change) -> Option<Result<Option<u64>>> {
        let Some(Unknown { from, before, until }) = &mut self.unknown else {
            return Some(Ok(self.apply(offset, change)));
        };
        match change {
            // All that came after it was read.
            Change::Whole(whole) if whole.after + 1 >= *from => {
                let before = std::mem::take(before);
                self.unknown = None;
                let known = whole.entries.into_iter();
                self.entries =
                    known.map(|(key, (revision, value))| (key, (revision, value.into()))).collect();
                self.n_bytes = self.entries.iter().map(|(key, (_, value))| key.len() + value.len()).sum();
                for (at, change) in before.into_iter().filter(|(at, _)| *at > whole.after) {
                    self.apply(at, change);
                }
                None
            }
            Change::Look if until.is_none() => {
                Some(Err(Error::new(ErrorKind::Corrupt, "the map of groups has lost its beginning")))
            }
            change => {
                before.push((offset, change));
                None
            }
        }
    }

    fn apply(&mut self, offset: u64, change: Change) -> Option<u64> {
        let is_from = |entries: &BTreeMap<String, (u64, Bytes)>, key: &str, revision: u64| {
            entries.get(key).map_or(0, |(known, _)| *known) == revision
        };
        // 0 is no revision: it says that there is none.
        let made = offset + 1;
        match change {
            Change::Set { key, revision, value } => {
                let holds = is_from(&self.entries, &key, revision);
                // Those who hear are told what was tried too: they look what holds.
                if let Some(heard) = self.heard.get(&key) {
                    heard.iter().for_each(|heard| drop(heard.send(value.clone())));
                }
                if !holds {
                    return None;
                }
                self.n_bytes += key.len() + value.len();
                if let Some((_, old)) = self.entries.insert(key.clone(), (made, value)) {
                    self.n_bytes -= key.len() + old.len();
                }
                Some(made)
            }
            Change::Remove { key, revision } => {
                if !is_from(&self.entries, &key, revision) {
                    return None;
                }
                if let Some((_, old)) = self.entries.remove(&key) {
                    self.n_bytes -= key.len() + old.len();
                }
                if let Some(heard) = self.heard.get(&key) {
                    heard.iter().for_each(|heard| drop(heard.send(Bytes::new())));
                }
                Some(made)
            }
            Change::Whole(_) => {
                self.since_whole = 0;
                None
            }
            Change::Look => None,
        }
    }

    /// The map as bytes, as it is after an offset.
    fn whole(&self, after: u64) -> Vec<u8> {
        let text = |value: &Bytes| String::from_utf8_lossy(value).into_owned();
        let entries =
            self.entries.iter().map(|(key, (revision, value))| (key.clone(), (*revision, text(value))));
        serde_json::to_vec(&Whole { after, entries: entries.collect() }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(key: &str, revision: u64, value: &'static str) -> Change {
        Change::Set { key: key.into(), revision, value: Bytes::from_static(value.as_bytes()) }
    }

    fn took(state: &mut State, at: u64, change: Change) -> Option<u64> {
        state.take(at, change).unwrap().unwrap()
    }

    fn begun(from: u64, until: Option<u64>) -> State {
        State { unknown: Some(Unknown { from, before: Vec::new(), until }), ..State::default() }
    }

    #[test]
    fn a_change_holds_if_it_was_made_from_what_is_there() {
        let mut state = State::default();
        assert_eq!(took(&mut state, 0, set("a", 0, "x")), Some(1));
        assert_eq!(took(&mut state, 1, set("a", 0, "y")), None, "made from nothing");
        assert_eq!(took(&mut state, 2, set("a", 1, "z")), Some(3));
        let remove = |revision| Change::Remove { key: "a".into(), revision };
        assert_eq!(took(&mut state, 4, remove(1)), None);
        assert_eq!(took(&mut state, 5, remove(3)), Some(6));
        assert_eq!((took(&mut state, 6, set("a", 0, "n")), state.n_bytes), (Some(7), 2));
    }

    #[test]
    fn who_begins_in_the_middle_knows_nothing_before_a_whole_map() {
        let mut told = State::default();
        for (at, change) in [(1, set("a", 0, "1")), (2, set("b", 0, "2")), (3, set("a", 2, "3"))] {
            took(&mut told, at, change);
        }
        let whole = || serde_json::from_slice::<Whole>(&told.whole(3)).unwrap();
        let (early, middle) = (whole(), whole());
        let mut late = begun(3, None);
        assert!(late.take(3, set("a", 2, "3")).is_none());
        assert_eq!(late.take(4, Change::Look).unwrap().unwrap_err().kind(), ErrorKind::Corrupt);
        // Written before the map was, and read after it was asked for.
        took(&mut told, 4, Change::Look);
        took(&mut told, 5, set("b", 3, "5"));
        assert!(late.take(5, set("b", 3, "5")).is_none());
        late.take(6, Change::Whole(middle));
        assert_eq!(late.entries, told.entries);
        assert_eq!((late.n_bytes, took(&mut late, 7, set("b", 6, "7"))), (told.n_bytes, Some(8)));
        // One that lies too far back does not help.
        let mut later = begun(5, None);
        later.take(6, Change::Whole(early));
        assert!(later.unknown.is_some());
        // Near the end, the beginning may still be read.
        assert!(begun(3, Some(9)).take(4, Change::Look).is_none());
    }
}
