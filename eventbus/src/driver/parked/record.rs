//! Records of the parking log, on the wire: a parked event is itself, with marks; the rest are marks alone.

use std::time::{Duration, SystemTime};

use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::name::Key;

/// Which record it is.
pub(crate) const RECORD: &str = "evt-parked-record";
const ID: &str = "evt-parked-id";
const KEY: &str = "evt-parked-key";
const ORIGIN: &str = "evt-parked-origin";
const ATTEMPTS: &str = "evt-parked-attempts";
const DUE: &str = "evt-parked-due";
const HELD: &str = "evt-parked-held";
const EPOCH: &str = "evt-parked-epoch";
const REASON: &str = "evt-parked-reason";

/// What orders a parked event among others: its key, or itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::driver) enum Sequence {
    Key(Key),
    Event(EventId),
}

impl Sequence {
    pub(in crate::driver) fn of(envelope: &Envelope) -> Self {
        envelope.key().map_or_else(|| Self::Event(envelope.id().clone()), |key| Self::Key(key.clone()))
    }
}

/// What is known of a parked event beside its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) struct Parked {
    pub(in crate::driver) id: EventId,
    pub(in crate::driver) sequence: Sequence,
    /// Its offset in the source's partition: the order inside its sequence.
    pub(in crate::driver) origin: Offset,
    /// Runs so far.
    pub(in crate::driver) attempts: u32,
    /// Not before; `None` = at once.
    pub(in crate::driver) due: Option<SystemTime>,
    /// It was dead-lettered, and its sequence waits for an operator.
    pub(in crate::driver) held: bool,
}

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) enum Record {
    Park(Parked),
    Attempt {
        id: EventId,
        attempts: u32,
        due: Option<SystemTime>,
        held: bool,
    },
    Done {
        id: EventId,
    },
    /// A new owner begins.
    Takeover,
    /// An owner leaves by itself, with nothing begun.
    Release,
    /// An owner rewrites: what it took over may lie below the low-water mark from here on.
    Swept,
    Redrive {
        sequence: Sequence,
        id: EventId,
    },
    Resolve {
        sequence: Sequence,
        id: EventId,
        reason: String,
    },
}

/// A record with whose it is: the position of its owner's Takeover.
#[derive(Debug, Clone)]
pub(in crate::driver) struct Entry {
    pub(in crate::driver) record: Record,
    pub(in crate::driver) epoch: u64,
}

fn put_due(envelope: Envelope, due: Option<SystemTime>) -> Envelope {
    match due.and_then(|due| due.duration_since(SystemTime::UNIX_EPOCH).ok()) {
        Some(since) => envelope.with_extension(DUE, since.as_millis().to_string()),
        None => envelope,
    }
}

/// Marks an event as parked. The record has an id of its own: a copy that a sweep makes is not a duplicate.
pub(in crate::driver) fn park(event: &Envelope, parked: &Parked, slot: &Key, epoch: u64) -> Envelope {
    let record = event
        .clone()
        .with_id(EventId::generate())
        .with_key(slot.clone())
        .with_extension(RECORD, "park")
        .with_extension(ID, parked.id.to_string())
        .with_extension(ORIGIN, parked.origin.to_string())
        .with_extension(ATTEMPTS, parked.attempts.to_string())
        .with_extension(EPOCH, epoch.to_string())
        .without_extensions(|name| name == DUE || name == HELD);
    let record = match &parked.sequence {
        Sequence::Key(key) => record.with_extension(KEY, key.as_bytes()),
        Sequence::Event(_) => record,
    };
    let record = put_due(record, parked.due);
    if parked.held { record.with_extension(HELD, "1") } else { record }
}

/// Writes a record that is not an event.
pub(in crate::driver) fn control(record: &Record, slot: &Key, epoch: u64) -> Envelope {
    let (word, id) = match record {
        Record::Park(parked) => ("park", Some(&parked.id)),
        Record::Attempt { id, .. } => ("attempt", Some(id)),
        Record::Done { id } => ("done", Some(id)),
        Record::Takeover => ("takeover", None),
        Record::Release => ("release", None),
        Record::Swept => ("swept", None),
        Record::Redrive { id, .. } => ("redrive", Some(id)),
        Record::Resolve { id, .. } => ("resolve", Some(id)),
    };
    let envelope = Envelope::new("evt.parked", "/eventbus")
        .with_key(slot.clone())
        .with_extension(RECORD, word)
        .with_extension(EPOCH, epoch.to_string());
    let envelope = match id {
        Some(id) => envelope.with_extension(ID, id.to_string()),
        None => envelope,
    };
    match record {
        Record::Attempt { attempts, due, held, .. } => {
            let envelope = put_due(envelope.with_extension(ATTEMPTS, attempts.to_string()), *due);
            if *held { envelope.with_extension(HELD, "1") } else { envelope }
        }
        Record::Redrive { sequence, .. } => put_sequence(envelope, sequence),
        Record::Resolve { sequence, reason, .. } => {
            put_sequence(envelope.with_extension(REASON, reason), sequence)
        }
        _ => envelope,
    }
}

fn put_sequence(envelope: Envelope, sequence: &Sequence) -> Envelope {
    match sequence {
        Sequence::Key(key) => envelope.with_extension(KEY, key.as_bytes()),
        Sequence::Event(id) => envelope.with_extension(ID, id.to_string()),
    }
}

/// Reads a record; `None` if it is not one of ours.
pub(in crate::driver) fn parse(envelope: &Envelope) -> Option<Entry> {
    let number = |name: &str| envelope.extension(name).and_then(|text| text.parse::<u64>().ok());
    let id = || envelope.extension(ID).map(EventId::parse);
    let sequence = || match envelope.extensions().get(KEY) {
        Some(key) => Some(Sequence::Key(Key::new(key.to_vec()))),
        None => id().map(Sequence::Event),
    };
    let due = number(DUE).map(|millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis));
    let attempts = number(ATTEMPTS).and_then(|n| u32::try_from(n).ok());
    let held = envelope.extension(HELD).is_some();
    let record = match envelope.extension(RECORD)? {
        "park" => Record::Park(Parked {
            id: id()?,
            sequence: sequence()?,
            origin: Offset(number(ORIGIN)?),
            attempts: attempts?,
            due,
            held,
        }),
        "attempt" => Record::Attempt { id: id()?, attempts: attempts?, due, held },
        "done" => Record::Done { id: id()? },
        "takeover" => Record::Takeover,
        "release" => Record::Release,
        "swept" => Record::Swept,
        "redrive" => Record::Redrive { sequence: sequence()?, id: id()? },
        "resolve" => Record::Resolve {
            sequence: sequence()?,
            id: id()?,
            reason: envelope.extension(REASON).unwrap_or_default().to_owned(),
        },
        _ => return None,
    };
    Some(Entry { record, epoch: number(EPOCH).unwrap_or_default() })
}

/// Turns a Park record back into the event that was parked.
///
/// # Errors
/// Undecodable if it is not a Park record.
pub(in crate::driver) fn unpark(record: &Envelope) -> Result<Envelope> {
    match parse(record) {
        Some(Entry { record: Record::Park(parked), .. }) => {
            let event =
                record.clone().with_id(parked.id).without_extensions(|name| name.starts_with("evt-parked-"));
            Ok(match parked.sequence {
                Sequence::Key(key) => event.with_key(key),
                Sequence::Event(_) => event.without_key(),
            })
        }
        _ => Err(Error::new(ErrorKind::Undecodable, "not a parked event").with("id", record.id())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(record: Record) {
        let slot = Key::new("slot");
        let found = parse(&control(&record, &slot, 7)).unwrap();
        assert_eq!((found.record, found.epoch), (record, 7));
    }

    #[test]
    fn records_round_trip() {
        let id = EventId::generate();
        let due = Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_234_567));
        entry(Record::Attempt { id: id.clone(), attempts: 3, due, held: true });
        entry(Record::Done { id: id.clone() });
        entry(Record::Takeover);
        entry(Record::Release);
        entry(Record::Swept);
        entry(Record::Redrive { sequence: Sequence::Key(Key::new(vec![0, 255, 10])), id: id.clone() });
        let sequence = Sequence::Event(id.clone());
        entry(Record::Resolve { sequence, id, reason: "paid by phone".into() });
    }

    #[test]
    fn a_parked_event_comes_back_as_it_was() {
        for key in [None, Some(vec![0u8, 255, 13])] {
            let event = Envelope::new("t", "/s")
                .with_version(2)
                .with_subject("s")
                .with_header("a", "1")
                .with_extension("correlationid", "c")
                .with_payload("body");
            let event = match key {
                Some(key) => event.with_key(Key::new(key)),
                None => event,
            };
            let parked = Parked {
                id: event.id().clone(),
                sequence: Sequence::of(&event),
                origin: Offset(9),
                attempts: 2,
                due: None,
                held: true,
            };
            let record = park(&event, &parked, &Key::new("slot"), 3);
            assert_ne!(record.id(), event.id());
            assert_eq!(unpark(&record).unwrap(), event);
            assert_eq!(parse(&record).unwrap().record, Record::Park(parked.clone()));
            // A sweep's copy of a copy says the newest.
            let newer = Parked { attempts: 5, held: false, ..parked };
            let copy = park(&unpark(&record).unwrap(), &newer, &Key::new("slot"), 4);
            assert_eq!(parse(&copy).unwrap().record, Record::Park(newer));
        }
    }
}
