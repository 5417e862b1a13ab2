//! Event ids: UUIDv7 made without a system call, or whatever text a foreign producer chose.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

/// Longest foreign id, in bytes.
pub(crate) const MAX_ID_BYTES: usize = 256;

/// The id of an event: unique within its source, kept over every retry, redelivery and redrive.
///
/// Ours are UUIDs held in 16 bytes; any other text is kept exactly as it came.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(Repr);

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Repr {
    Uuid(Uuid),
    Text(Arc<str>),
}

impl EventId {
    /// Makes a new UUIDv7 (RFC 9562 section 5.7): milliseconds, a counter within them, 62 random bits.
    ///
    /// The generator is per thread and ascends within it, also when the clock steps back. The time
    /// in an id is never used for order.
    pub fn generate() -> Self {
        Self(Repr::Uuid(GENERATOR.with_borrow_mut(Generator::next)))
    }

    /// Derives an id from a name (UUIDv5, RFC 9562 section 5.5): equal inputs give equal ids.
    ///
    /// This is how a repeated step emits its outputs again under the ids they had.
    pub fn derive(namespace: &EventId, name: &str) -> Self {
        let namespace = match &namespace.0 {
            Repr::Uuid(uuid) => *uuid,
            Repr::Text(text) => Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()),
        };
        Self(Repr::Uuid(Uuid::new_v5(&namespace, name.as_bytes())))
    }

    /// Takes an id as another program wrote it. Canonical UUID text becomes 16 bytes.
    pub fn parse(text: &str) -> Self {
        match Uuid::try_parse(text) {
            Ok(uuid) if uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text => {
                Self(Repr::Uuid(uuid))
            }
            _ => Self(Repr::Text(text.into())),
        }
    }

    /// Returns the UUID, if the id is one.
    pub fn as_uuid(&self) -> Option<Uuid> {
        match &self.0 {
            Repr::Uuid(uuid) => Some(*uuid),
            Repr::Text(_) => None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Repr::Uuid(_) => uuid::fmt::Hyphenated::LENGTH,
            Repr::Text(text) => text.len(),
        }
    }
}

impl From<Uuid> for EventId {
    fn from(uuid: Uuid) -> Self {
        Self(Repr::Uuid(uuid))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Uuid(uuid) => f.pad(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer())),
            Repr::Text(text) => f.pad(text),
        }
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

thread_local! {
    static GENERATOR: RefCell<Generator> = RefCell::new(Generator { random: fastrand::Rng::new(), millis: 0, counter: 0 });
}

struct Generator {
    random: fastrand::Rng,
    millis: u64,
    counter: u16,
}

const COUNTER_BITS: u32 = 12;

impl Generator {
    fn next(&mut self) -> Uuid {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |past| past.as_millis() as u64);
        if now > self.millis {
            self.millis = now;
            // The upper bit stays free, so that a burst within one millisecond has room to count.
            self.counter = self.random.u16(..) >> (16 - COUNTER_BITS + 1);
        } else {
            self.counter += 1;
            if self.counter >> COUNTER_BITS != 0 {
                self.millis += 1;
                self.counter = 0;
            }
        }
        let mut tail = [0u8; 10];
        let (counter, random) = tail.split_at_mut(2);
        counter.copy_from_slice(&self.counter.to_be_bytes());
        random.copy_from_slice(&self.random.u64(..).to_be_bytes());
        uuid::Builder::from_unix_timestamp_millis(self.millis, &tail).into_uuid()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_v7_unique_and_ascending() {
        let ids: Vec<_> = (0..50_000).map(|_| EventId::generate()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(ids[0].as_uuid().unwrap().get_version_num(), 7);
    }

    #[test]
    fn derived_ids_repeat() {
        let order = EventId::parse("order-7");
        assert_eq!(EventId::derive(&order, "paid"), EventId::derive(&order, "paid"));
        assert_ne!(EventId::derive(&order, "paid"), EventId::derive(&order, "shipped"));
    }

    #[test]
    fn foreign_text_is_kept_as_it_came() {
        for text in
            ["", "42", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc999c0b4ef8bb6d6bb9bd380a11", "é/1"]
        {
            let id = EventId::parse(text);
            assert_eq!((id.to_string().as_str(), id.as_uuid()), (text, None));
        }
        let canonical = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11";
        assert!(EventId::parse(canonical).as_uuid().is_some());
        assert_eq!(EventId::parse(canonical).to_string(), canonical);
    }
}
