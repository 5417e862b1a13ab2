//! Publishing: events go to the client's queue in call order, each answered by its own delivery report.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Atomic};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::ClientConfig;
use tokio::sync::watch;

use super::Options;
use super::client::{Client, missing};
use super::ends::Ends;
use super::line::Line;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Key, Topic};
use crate::partition;
use crate::transport::kit::queue::{Queued, Room};
use crate::transport::{Confirm, Publisher, Receipt};

/// What headers and framing may add to an event above what is counted.
const OVERHEAD: usize = 16 << 10;

/// The producer of a transport value, which all its publishers share.
pub(super) struct Producing {
    config: ClientConfig,
    /// Held while a batch goes to the client's queue, so that batches do not mix.
    line: Mutex<Line>,
    delivery_timeout: Duration,
    room: Room,
    books: Arc<Books>,
    /// Who waits for events outside of groups.
    ends: Arc<Ends>,
}

/// Which batches wait for their reports.
#[derive(Debug, Default)]
struct Books {
    next: Mutex<u64>,
    open: Mutex<BTreeSet<u64>>,
    closed: watch::Sender<u64>,
}

/// A batch whose reports come in.
struct Pending {
    number: u64,
    queued: Mutex<Option<Queued>>,
    outcomes: Mutex<Vec<Option<Result<Receipt>>>>,
    n_left: AtomicUsize,
    books: Arc<Books>,
}

/// One event that waits for its report.
pub(super) type Waiting = Box<Awaited>;

pub(super) struct Awaited {
    batch: Arc<Pending>,
    at: usize,
}

impl Awaited {
    pub(super) fn report(self, outcome: Result<Receipt>) {
        self.batch.report(self.at, outcome);
    }
}

impl Pending {
    fn report(&self, at: usize, outcome: Result<Receipt>) {
        if let Some(place) = self.outcomes.lock().get_mut(at) {
            *place = Some(outcome);
        }
        if self.n_left.fetch_sub(1, Atomic::AcqRel) > 1 {
            return;
        }
        let outcomes = std::mem::take(&mut *self.outcomes.lock());
        if let Some(queued) = self.queued.lock().take() {
            let unknown = || Err(Error::new(ErrorKind::Unknown, "the client reported nothing"));
            queued.answer(outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(unknown)));
        }
        self.books.open.lock().remove(&self.number);
        self.books.closed.send_modify(|n| *n += 1);
    }
}

impl Producing {
    pub(super) fn new(mut config: ClientConfig, options: &Options, ends: Arc<Ends>) -> Result<Self> {
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("delivery.timeout.ms", options.delivery_timeout.as_millis().to_string())
            .set("linger.ms", options.linger.as_millis().to_string())
            .set("compression.type", options.compression)
            .set("message.max.bytes", (options.max_event_bytes + OVERHEAD).to_string())
            // The bound that publishing waits for is ours; these lie above it.
            .set("queue.buffering.max.messages", "200000")
            .set("queue.buffering.max.kbytes", "262144");
        let delivery_timeout = options.delivery_timeout;
        let line = Mutex::new(Line::open(&config, &ends, delivery_timeout)?);
        Ok(Self { config, line, delivery_timeout, room: Room::default(), books: Arc::default(), ends })
    }

    /// Waits until everything that was accepted before is answered.
    pub(super) async fn flush(&self) {
        let last = *self.books.next.lock();
        let mut closed = self.books.closed.subscribe();
        loop {
            closed.borrow_and_update();
            if self.books.open.lock().first().is_none_or(|first| *first >= last) {
                return;
            }
            if closed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes a topic for one that nothing was sent to yet.
    pub(super) fn forget(&self, topic: &Topic) {
        self.line.lock().forget(topic);
    }

    /// Hands a batch to the client.
    fn send(&self, queued: Queued, n_partitions: u32) {
        let mut line = self.line.lock();
        if line.is_fatal() {
            match Line::open(&self.config, &self.ends, self.delivery_timeout) {
                Ok(another) => *line = another,
                Err(error) => return queued.fail(&error),
            }
        }
        let n_events = queued.events.len();
        if n_events == 0 {
            return queued.answer(std::iter::empty());
        }
        let number = {
            let mut next = self.books.next.lock();
            *next += 1;
            *next - 1
        };
        self.books.open.lock().insert(number);
        let (topic, events) = (queued.topic.clone(), queued.events.clone());
        let pending = Arc::new(Pending {
            number,
            queued: Mutex::new(Some(queued)),
            outcomes: Mutex::new((0..n_events).map(|_| None).collect()),
            n_left: AtomicUsize::new(n_events),
            books: self.books.clone(),
        });
        let mut held: HashSet<Key> = HashSet::new();
        for (at, event) in events.iter().enumerate() {
            if event.key().is_some_and(|key| held.contains(key)) {
                let error =
                    Error::new(ErrorKind::Failed, "an earlier event of this key in the batch was refused");
                pending.report(at, Err(error));
                continue;
            }
            let partition = partition::of_envelope(event, n_partitions);
            let waiting = Box::new(Awaited { batch: pending.clone(), at });
            if let Err((error, waiting)) = line.send(&topic, partition, event, waiting) {
                held.extend(event.key().cloned());
                waiting.report(Err(error));
            }
        }
    }
}

pub(super) struct KafkaPublisher {
    client: Arc<Client>,
    closed: AtomicBool,
    /// Calls are accepted one after another, in the order they were made, also while a topic is looked up.
    accepting: tokio::sync::Mutex<()>,
}

impl KafkaPublisher {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self { client, closed: AtomicBool::new(false), accepting: tokio::sync::Mutex::default() }
    }

    fn open(&self) -> Result<()> {
        self.client.is_open()?;
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("publisher")) } else { Ok(()) }
    }
}

impl fmt::Debug for KafkaPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaPublisher").field("place", &self.client.place).finish_non_exhaustive()
    }
}

#[async_trait]
impl Publisher for KafkaPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let (client, max_event_bytes) = (&self.client, self.client.options.max_event_bytes);
        self.open()?;
        let _in_turn = self.accepting.lock().await;
        let found = client.partitions(topic).await;
        let (queued, confirm) =
            client.producing.room.accept(topic, batch, max_event_bytes, || self.open()).await?;
        match found {
            Ok(n_partitions) => client.producing.send(queued, n_partitions),
            Err(error) if error.kind() == ErrorKind::NotFound => queued.fail(&missing(topic)),
            Err(error) => queued.fail(&error),
        }
        Ok(confirm)
    }

    async fn flush(&self) -> Result<()> {
        self.client.producing.flush().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if !self.closed.swap(true, Atomic::AcqRel) {
            self.client.producing.flush().await;
        }
        Ok(())
    }
}
