//! A third party's transport, written only against the public API: append-only files in a folder.
//!
//! One file of events for each topic, one file of settled positions for each group. One process; no
//! order, leases, counts or replay are claimed. It shows how little a transport needs to be.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use eventbus::capability::{Ack, Durability};
use eventbus::{
    Admin, Audience, Capabilities, Confirm, Consumer, Content, Delivery, Envelope, Error, ErrorKind, EventId,
    Headers, InFile, Key, Offset, PartitionId, Polled, Publisher, Receipt, Result, Settle, Settled,
    Subscription, Token, Topic, Transport,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

const MAX_EVENT_BYTES: usize = 1 << 20;

/// The transport; values on one folder share its state.
#[derive(Debug, Clone)]
pub struct Folder {
    shared: Arc<Shared>,
    closed: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    topics: Mutex<HashMap<Topic, TopicFile>>,
    arrived: Notify,
    next_consumer: std::sync::atomic::AtomicU64,
}

#[derive(Debug)]
struct TopicFile {
    log: File,
    events: Vec<Envelope>,
    groups: HashMap<String, GroupFile>,
}

#[derive(Debug)]
struct GroupFile {
    settled_log: Option<File>,
    /// Positions that wait for a consumer.
    pending: BTreeSet<usize>,
    /// Positions read of the log so far.
    seen: usize,
}

fn io(error: std::io::Error) -> Error {
    let kind = if error.kind() == std::io::ErrorKind::StorageFull {
        ErrorKind::Full
    } else {
        ErrorKind::Unavailable
    };
    Error::new(kind, "the folder failed").caused_by(error)
}

impl Folder {
    /// Opens a folder.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn open(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(io)?;
        let shared =
            Shared { folder, topics: Mutex::default(), arrived: Notify::new(), next_consumer: 1.into() };
        Ok(Self { shared: Arc::new(shared), closed: Arc::default() })
    }

    /// Another value on the same folder.
    #[must_use]
    pub fn reopen(&self) -> Self {
        Self { shared: self.shared.clone(), closed: Arc::default() }
    }

    fn is_open(&self) -> Result<()> {
        if self.closed.load(Atomic::SeqCst) {
            Err(Error::new(ErrorKind::Closed, "the folder is closed"))
        } else {
            Ok(())
        }
    }
}

impl Shared {
    fn load(&self, topic: &Topic) -> Result<TopicFile> {
        let path = self.folder.join(format!("{topic}.events"));
        let bytes = if path.exists() { fs::read(&path).map_err(io)? } else { Vec::new() };
        let log = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while let Some(event) = decode(&mut rest) {
            events.push(event);
        }
        Ok(TopicFile { log, events, groups: HashMap::new() })
    }
}

#[async_trait]
impl Transport for Folder {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            ack: Ack::Individual,
            durability: Durability::Process,
            max_event_bytes: Some(MAX_EVENT_BYTES),
            absent_payload: true,
            ..Capabilities::NONE
        }
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        self.is_open()?;
        Ok(Arc::new(FolderPublisher { folder: self.clone(), closed: AtomicBool::new(false) }))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        self.is_open()?;
        subscription.check(&self.capabilities())?;
        let shared = &self.shared;
        let number = shared.next_consumer.fetch_add(1, Atomic::SeqCst);
        let mut topics = shared.topics.lock();
        if !topics.contains_key(&subscription.topic) {
            topics.insert(subscription.topic.clone(), shared.load(&subscription.topic)?);
        }
        let file = topics
            .get_mut(&subscription.topic)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "no such topic"))?;
        let (name, durable) = match &subscription.audience {
            Audience::Group(group) => (group.to_string(), true),
            _ => (format!("broadcast {number}"), false),
        };
        if !file.groups.contains_key(&name) {
            let path = shared.folder.join(format!("{}.{name}.settled", subscription.topic));
            let known = if durable { fs::read(&path).ok() } else { None };
            let settled: BTreeSet<usize> = known
                .iter()
                .flat_map(|bytes| bytes.as_chunks::<8>().0)
                .map(|at| usize::from_le_bytes(*at))
                .collect();
            let fresh = known.is_none();
            let settled_log = if durable {
                Some(OpenOptions::new().create(true).append(true).open(path).map_err(io)?)
            } else {
                None
            };
            let seen = file.events.len();
            let pending =
                if fresh { BTreeSet::new() } else { (0..seen).filter(|at| !settled.contains(at)).collect() };
            file.groups.insert(name.clone(), GroupFile { settled_log, pending, seen });
        }
        Ok(Arc::new(FolderConsumer {
            folder: self.clone(),
            weak: Arc::downgrade(shared),
            topic: subscription.topic.clone(),
            group: name,
            number,
            window: subscription.window,
            window_bytes: subscription.window_bytes,
            held: Mutex::default(),
            closed: AtomicBool::new(false),
        }))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        None
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Atomic::SeqCst);
        self.shared.arrived.notify_waiters();
        Ok(())
    }
}

#[derive(Debug)]
struct FolderPublisher {
    folder: Folder,
    closed: AtomicBool,
}

#[async_trait]
impl Publisher for FolderPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        self.folder.is_open()?;
        if self.closed.load(Atomic::SeqCst) {
            return Err(Error::new(ErrorKind::Closed, "the publisher is closed"));
        }
        let mut topics = self.folder.shared.topics.lock();
        let missing = || Error::new(ErrorKind::NotFound, "nobody has subscribed to this topic");
        let Some(file) = topics.get_mut(topic) else {
            return Ok(Confirm::ready(batch.iter().map(|_| Err(missing())).collect()));
        };
        let mut store = |event: Envelope| {
            let event = event.admit(MAX_EVENT_BYTES)?;
            file.log.write_all(&encode(&event)).map_err(io)?;
            file.events.push(event);
            let at = file.events.len() as u64 - 1;
            Ok(Receipt::new(PartitionId(0), Offset(at)))
        };
        let receipts = batch.into_iter().map(&mut store).collect();
        self.folder.shared.arrived.notify_waiters();
        Ok(Confirm::ready(receipts))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Atomic::SeqCst);
        Ok(())
    }
}

#[derive(Debug)]
struct FolderConsumer {
    folder: Folder,
    weak: Weak<Shared>,
    topic: Topic,
    group: String,
    number: u64,
    window: NonZeroUsize,
    window_bytes: NonZeroUsize,
    held: Mutex<Held>,
    closed: AtomicBool,
}

/// What is in hand: positions by token number, and the tokens that were settled.
#[derive(Debug, Default)]
struct Held {
    positions: HashMap<u64, (usize, usize)>,
    done: BTreeSet<u64>,
    next: u64,
}

impl FolderConsumer {
    fn with<T>(&self, work: impl FnOnce(&mut TopicFile) -> Result<T>) -> Result<T> {
        let mut topics = self.folder.shared.topics.lock();
        work(topics.get_mut(&self.topic).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such topic"))?)
    }

    fn is_open(&self) -> Result<()> {
        self.folder.is_open()?;
        if self.closed.load(Atomic::SeqCst) {
            Err(Error::new(ErrorKind::Closed, "the consumer is closed"))
        } else {
            Ok(())
        }
    }

    fn take(&self, max: usize) -> Result<Vec<Delivery>> {
        self.with(|file| {
            let mut held = self.held.lock();
            let TopicFile { events, groups, .. } = file;
            let Some(group) = groups.get_mut(&self.group) else { return Ok(Vec::new()) };
            group.pending.extend(group.seen..events.len());
            group.seen = events.len();
            let mut deliveries = Vec::new();
            while deliveries.len() < max && held.positions.len() < self.window.get() {
                let bytes: usize = held.positions.values().map(|(_, size)| size).sum();
                if !held.positions.is_empty() && bytes >= self.window_bytes.get() {
                    break;
                }
                let Some(at) = group.pending.pop_first() else { break };
                let Some(event) = events.get(at) else { break };
                held.next += 1;
                let number = held.next;
                held.positions.insert(number, (at, event.size_bytes()));
                let content = Content::Envelope(event.clone());
                deliveries.push(
                    Delivery::new(Token::new(self.number, number), PartitionId(0), content)
                        .with_offset(Offset(at as u64)),
                );
            }
            Ok(deliveries)
        })
    }

    fn leave(&self) {
        if self.closed.swap(true, Atomic::SeqCst) || self.weak.strong_count() == 0 {
            return;
        }
        let held = std::mem::take(&mut *self.held.lock());
        let returned = self.with(|file| {
            if let Some(group) = file.groups.get_mut(&self.group) {
                group.pending.extend(held.positions.values().map(|(at, _)| at));
            }
            Ok(())
        });
        drop(returned);
        self.folder.shared.arrived.notify_waiters();
    }
}

#[async_trait]
impl Consumer for FolderConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        loop {
            let mut arrived = std::pin::pin!(self.folder.shared.arrived.notified());
            arrived.as_mut().enable();
            if self.is_open().is_err() {
                return Ok(Polled::Closed);
            }
            let deliveries = self.take(max.get())?;
            if !deliveries.is_empty() {
                return Ok(Polled::Deliveries(deliveries));
            }
            arrived.await;
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        self.is_open()?;
        self.with(|file| {
            let mut held = self.held.lock();
            let Some(group) = file.groups.get_mut(&self.group) else { return Ok(Settled::default()) };
            let mut settled = Settled::default();
            for (token, how) in outcomes {
                if token.high() != self.number {
                    settled.lost.push(*token);
                    continue;
                }
                let Some((at, _)) = held.positions.remove(&token.low()) else {
                    if !held.done.contains(&token.low()) {
                        settled.lost.push(*token);
                    }
                    continue;
                };
                held.done.insert(token.low());
                match how {
                    Settle::Ack | Settle::Reject => {
                        if let Some(log) = &mut group.settled_log {
                            log.write_all(&at.to_le_bytes()).map_err(io)?;
                        }
                    }
                    Settle::Retry { .. } | Settle::Return => drop(group.pending.insert(at).then_some(())),
                }
            }
            self.folder.shared.arrived.notify_waiters();
            Ok(settled)
        })
    }

    async fn release(&self, _partitions: &[PartitionId]) -> Result<()> {
        Ok(())
    }

    async fn renew(&self, _tokens: &[Token], _lease: Duration) -> Result<Settled> {
        Err(Error::new(ErrorKind::Unsupported, "a folder has no leases"))
    }

    async fn close(&self, _deadline: Instant) -> Result<()> {
        self.leave();
        Ok(())
    }
}

impl Drop for FolderConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Writes optional fields as length + 1 and bytes, 0 for an absent one.
fn put(out: &mut Vec<u8>, field: Option<&[u8]>) {
    out.extend((field.map_or(0, |bytes| bytes.len() as u64 + 1)).to_le_bytes());
    out.extend(field.unwrap_or_default());
}

fn encode(event: &Envelope) -> Vec<u8> {
    let mut out = Vec::new();
    let text = |text: Option<&str>| text.map(|text| text.as_bytes().to_vec());
    let time = event
        .time()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map(|past| past.as_nanos().to_le_bytes().to_vec());
    for field in [
        Some(event.id().to_string().into_bytes()),
        text(Some(event.source())),
        text(Some(event.event_type())),
        event.version().map(|version| version.to_le_bytes().to_vec()),
        text(event.subject()),
        time,
        text(event.content_type()),
        text(event.schema()),
        event.key().map(|key| key.as_bytes().to_vec()),
        Some(event.extensions().as_block().to_vec()),
        Some(event.headers().as_block().to_vec()),
        event.payload().map(|payload| payload.to_vec()),
    ] {
        put(&mut out, field.as_deref());
    }
    out
}

fn get<'a>(rest: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let (length, after) = rest.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(*length);
    let Some(length) = length.checked_sub(1) else {
        *rest = after;
        return Some(None);
    };
    let (field, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = after;
    Some(Some(field))
}

/// Reads one event; `None` at the end or at a torn tail.
fn decode(rest: &mut &[u8]) -> Option<Envelope> {
    let mut fields: Vec<Option<Vec<u8>>> = Vec::new();
    for _ in 0..12 {
        fields.push(get(rest)?.map(<[u8]>::to_vec));
    }
    let mut fields = fields.into_iter();
    let mut next = || fields.next().flatten();
    let text = |bytes: Option<Vec<u8>>| bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    let (id, source, event_type) = (text(next())?, text(next())?, text(next())?);
    let version = next().and_then(|bytes| Some(u32::from_le_bytes(bytes.try_into().ok()?)));
    let subject = text(next());
    let time = next().and_then(|bytes| Some(u128::from_le_bytes(bytes.try_into().ok()?)));
    let time: Option<SystemTime> =
        time.and_then(|nanos| UNIX_EPOCH.checked_add(Duration::from_nanos(u64::try_from(nanos).ok()?)));
    let (content_type, schema, key) = (text(next()), text(next()), next());
    let block =
        |bytes: Option<Vec<u8>>| Headers::from_block(bytes.unwrap_or_default().into()).unwrap_or_default();
    let (extensions, headers, payload) = (block(next()), block(next()), next());
    let mut event =
        Envelope::new(event_type, source).with_id(EventId::parse(&id)).with_version(version).with_time(time);
    event = event.with_extensions(extensions).with_headers(headers);
    event = subject.into_iter().fold(event, Envelope::with_subject);
    event = content_type.into_iter().fold(event, Envelope::with_content_type);
    event = schema.into_iter().fold(event, Envelope::with_schema);
    event = key.into_iter().fold(event, |event, key| event.with_key(Key::new(key)));
    Some(payload.into_iter().fold(event, Envelope::with_payload))
}
