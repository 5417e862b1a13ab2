//! One producer of the client library, with the thread that serves it, and the gates of its partitions: the first event
//! goes alone.
//!
//! A broker takes any sequence number from a producer that it does not know yet (KIP-360). If the first request to a
//! partition is refused for the moment and the next, already on its way, is taken, librdkafka (2.12) says of both that
//! they were delivered (confluent-kafka-go #921): an event would be confirmed and lost. So nothing follows the first
//! event of a partition before the broker has said where it stored it. What is said to be delivered without an offset
//! is not confirmed in any case.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Atomic};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};

use super::client::{from_kafka, of_code};
use super::ends::Ends;
use super::publisher::Waiting;
use super::record;
use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::transport::Receipt;

/// How long the thread of a producer waits for a report before it looks whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A pause after which a partition begins anew: brokers forget producers (`producer.id.expiration.ms`, a day if nobody
/// changed it).
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

type Producer = BaseProducer<Reports>;

/// A way to the brokers. Dropping it ends the thread, after what was accepted was answered.
pub(super) struct Line {
    producer: Arc<Producer>,
    gates: Arc<Gates>,
}

#[derive(Default)]
struct Gates {
    places: Mutex<HashMap<(Topic, PartitionId), Gate>>,
    /// How many gates are opening.
    n_opening: AtomicUsize,
    producer: OnceLock<Weak<Producer>>,
    is_over: AtomicBool,
    /// Set by an error after which the client refuses all work.
    is_fatal: AtomicBool,
}

/// Whether a partition takes more than one event at a time.
enum Gate {
    /// The first is on its way; the others wait for its report.
    Opening(VecDeque<Held>),
    /// Something was sent last at this time.
    Open(Instant),
}

struct Held {
    event: Envelope,
    waiting: Waiting,
}

struct Reports {
    /// Who waits for events outside of groups.
    ends: Arc<Ends>,
    gates: Arc<Gates>,
}

impl Line {
    /// Makes a producer. When the line is dropped, what is not answered within `last` is given up.
    pub(super) fn open(config: &ClientConfig, ends: &Arc<Ends>, last: Duration) -> Result<Self> {
        let gates = Arc::<Gates>::default();
        let reports = Reports { ends: ends.clone(), gates: gates.clone() };
        let producer: Arc<Producer> = Arc::new(config.create_with_context(reports).map_err(from_kafka)?);
        drop(gates.producer.set(Arc::downgrade(&producer)));
        let (served, over) = (producer.clone(), gates.clone());
        std::thread::Builder::new()
            .name("eventbus-kafka".to_owned())
            .spawn(move || serve(&served, &over, last))
            .map_err(|error| {
                Error::new(ErrorKind::Unavailable, "no thread could be had for a producer").caused_by(error)
            })?;
        Ok(Self { producer, gates })
    }

    /// Whether another line is to be made in the place of this one.
    pub(super) fn is_fatal(&self) -> bool {
        self.gates.is_fatal.load(Atomic::Acquire)
    }

    /// Sends an event, or has it wait until its partition takes more than one. It is reported in any case, now or later.
    ///
    /// # Errors
    /// That of the client, if the event was refused at once; then it is reported by whoever called.
    pub(super) fn send(
        &self,
        topic: &Topic,
        partition: PartitionId,
        event: &Envelope,
        waiting: Waiting,
    ) -> std::result::Result<(), (Error, Waiting)> {
        let mut places = self.gates.places.lock();
        let place = (topic.clone(), partition);
        let held = Held { event: event.clone(), waiting };
        match places.get_mut(&place) {
            Some(Gate::Opening(behind)) => {
                behind.push_back(held);
                Ok(())
            }
            Some(Gate::Open(last)) if last.elapsed() < FORGOTTEN_AFTER => {
                *last = Instant::now();
                self.gates.give(&self.producer, topic, partition, held)
            }
            _ => {
                // Before it is sent: its report may come at once.
                places.insert(place.clone(), Gate::Opening(VecDeque::new()));
                self.gates.n_opening.fetch_add(1, Atomic::AcqRel);
                self.gates.give(&self.producer, topic, partition, held).inspect_err(|_| {
                    places.remove(&place);
                    self.gates.n_opening.fetch_sub(1, Atomic::AcqRel);
                })
            }
        }
    }

    /// A topic may be another under the same name, whose partitions know nothing of this producer.
    pub(super) fn forget(&self, topic: &Topic) {
        let is_kept = |gate: &Gate| matches!(gate, Gate::Opening(_));
        self.gates.places.lock().retain(|(of, _), gate| of != topic || is_kept(gate));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.gates.is_over.store(true, Atomic::Release);
    }
}

/// Has the reports come in. To let go of a producer blocks, and drops its queue: this thread is the last that has it.
fn serve(producer: &Producer, gates: &Gates, last: Duration) {
    let mut end = None;
    loop {
        producer.poll(LOOK_EVERY);
        if !gates.is_over.load(Atomic::Acquire) {
            continue;
        }
        let end = *end.get_or_insert_with(|| Instant::now() + last);
        // Nothing waits at a gate either: the one before it would be in flight.
        if producer.in_flight_count() == 0 {
            return;
        }
        if Instant::now() > end {
            tracing::warn!("a Kafka producer was dropped before all was sent");
            return;
        }
    }
}

impl Gates {
    /// The broker stored an event of a partition, and said where: what waited for that is sent.
    fn stored(&self, place: &(Topic, PartitionId)) {
        let mut places = self.places.lock();
        let Some(gate @ Gate::Opening(_)) = places.get_mut(place) else { return };
        let Gate::Opening(behind) = std::mem::replace(gate, Gate::Open(Instant::now())) else { return };
        self.n_opening.fetch_sub(1, Atomic::AcqRel);
        for held in behind {
            self.release(place, held);
        }
    }

    /// An event of a partition was not stored, or nobody knows: what follows begins anew.
    fn failed(&self, place: &(Topic, PartitionId), error: &Error) {
        let mut places = self.places.lock();
        let Some(Gate::Opening(mut behind)) = places.remove(place) else { return };
        self.n_opening.fetch_sub(1, Atomic::AcqRel);
        // What is wrong with one event says nothing of the next.
        while error.kind() == ErrorKind::TooLarge
            && let Some(held) = behind.pop_front()
        {
            if self.release(place, held) {
                self.n_opening.fetch_add(1, Atomic::AcqRel);
                places.insert(place.clone(), Gate::Opening(behind));
                return;
            }
        }
        for held in behind {
            let error = match error.kind() {
                ErrorKind::Unknown => {
                    let message = "an event before it was not confirmed, and this one was not sent";
                    Error::new(ErrorKind::Unavailable, message).caused_by(error.duplicate())
                }
                _ => error.duplicate(),
            };
            held.waiting.report(Err(error));
        }
    }

    /// Sends what waited; whether the client took it.
    fn release(&self, (topic, partition): &(Topic, PartitionId), held: Held) -> bool {
        let Some(producer) = self.producer.get().and_then(Weak::upgrade) else {
            held.waiting.report(Err(Error::closed("publisher")));
            return false;
        };
        match self.give(&producer, topic, *partition, held) {
            Ok(()) => true,
            Err((error, waiting)) => {
                waiting.report(Err(error));
                false
            }
        }
    }

    /// Hands an event to the client.
    fn give(
        &self,
        producer: &Producer,
        topic: &Topic,
        partition: PartitionId,
        Held { event, waiting }: Held,
    ) -> std::result::Result<(), (Error, Waiting)> {
        let mut record: BaseRecord<'_, [u8], [u8], Waiting> =
            BaseRecord::with_opaque_to(topic.as_str(), waiting)
                .partition(partition.0 as i32)
                .headers(record::headers(&event));
        if let Some(key) = event.key() {
            record = record.key(key.as_bytes());
        }
        if let Some(payload) = event.payload() {
            record = record.payload(payload);
        }
        producer.send(record).map_err(|(error, record)| {
            let is_fatal = error.rdkafka_error_code() == Some(Code::Fatal);
            self.is_fatal.fetch_or(is_fatal, Atomic::AcqRel);
            let error = if is_fatal {
                // The event was not sent, and can be: by another producer.
                Error::new(ErrorKind::Unavailable, "the producer is made anew").caused_by(error)
            } else {
                from_kafka(error)
            };
            (error, record.delivery_opaque)
        })
    }
}

impl ClientContext for Reports {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(Code::Fatal) {
            self.gates.is_fatal.store(true, Atomic::Release);
        }
        tracing::debug!(%error, reason, "librdkafka");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Waiting;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Self::DeliveryOpaque) {
        let (message, outcome) = match result {
            // It says so of events that were refused, when a later one was taken.
            Ok(message) if message.offset() < 0 => {
                let unknown = Error::new(ErrorKind::Unknown, "the broker did not say where the event is");
                (message, Err(unknown))
            }
            Ok(message) => (message, Ok(Offset(message.offset().unsigned_abs()))),
            Err((error, message)) => (message, Err(self.refused(error))),
        };
        let partition = PartitionId(message.partition().unsigned_abs());
        // Whoever hears of this event may publish the next: that must not pass those that wait.
        match &outcome {
            Ok(_) if self.gates.n_opening.load(Atomic::Acquire) == 0 => {}
            outcome => {
                if let Ok(topic) = Topic::new(message.topic()) {
                    let place = (topic, partition);
                    match outcome {
                        Ok(_) => self.gates.stored(&place),
                        Err(error) => self.gates.failed(&place, error),
                    }
                }
            }
        }
        if let Ok(offset) = outcome {
            self.ends.stored(message.topic(), partition.0, offset.0);
        }
        waiting.report(outcome.map(|offset| Receipt::new(partition, offset)));
    }
}

impl Reports {
    /// What a failed delivery means: refused for certain, or not known.
    fn refused(&self, error: &KafkaError) -> Error {
        let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
        if code == Code::Fatal {
            self.gates.is_fatal.store(true, Atomic::Release);
        }
        let (kind, message) = match of_code(code) {
            known @ (ErrorKind::NotFound | ErrorKind::TooLarge | ErrorKind::Unauthorized, _) => known,
            // Also what the client gave up: it may have been sent before.
            _ => (ErrorKind::Unknown, "the broker did not confirm"),
        };
        Error::new(kind, message).caused_by(error.clone())
    }
}
