//! By what an event is known.

use std::time::{Duration, SystemTime};

use eventbus::{Envelope, Failure, Topic};

use super::Memory;
use crate::backend::Known;
use crate::row::dedup_id;

/// How long ago an event was made, as far as it says: by its time, or by its id (UUIDv7).
pub(super) fn age(event: &Envelope) -> Option<Duration> {
    let of_id = || {
        let (seconds, nanos) = event.id().as_uuid()?.get_timestamp()?.to_unix();
        SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
    };
    SystemTime::now().duration_since(event.time().or_else(of_id)?).ok()
}

/// By what an event is known.
pub(super) enum Identity {
    Message { id: uuid::Uuid },
    Sequence { source: String, key: Vec<u8>, seq: i64 },
}

impl Identity {
    pub(super) fn of(event: &Envelope, topic: &Topic, memory: Memory) -> Result<Self, Failure> {
        let (Memory::Sequences, Some(key)) = (memory, event.key()) else {
            return Ok(Self::Message { id: dedup_id(event) });
        };
        let seq = event.extension("evt-seq").and_then(|seq| seq.parse().ok());
        match (seq, event.extension("evt-source")) {
            (Some(seq), Some(source)) => {
                // Numbers ascend along the keys of a topic.
                let source = format!("{source}/{topic}");
                Ok(Self::Sequence { source, key: key.as_bytes().to_vec(), seq })
            }
            _ => Err(Failure::permanent(
                "inbox.no_sequence",
                "the event has no number of an outbox (evt-seq, evt-source), which Memory::Sequences needs",
            )),
        }
    }

    pub(super) fn known(&self) -> Known<'_> {
        match self {
            Self::Message { id } => Known::Message { id: *id },
            Self::Sequence { source, key, seq } => Known::Sequence { source, key, seq: *seq },
        }
    }

    /// Whether it is forgotten after a time.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self, Self::Message { .. })
    }
}
