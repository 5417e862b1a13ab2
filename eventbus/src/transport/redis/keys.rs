//! Names of keys, and positions as ids.
//!
//! Everything of a topic has the topic as its hash tag, so that it is in one slot of a cluster and one script may
//! change it. Names of topics and groups hold no `:` and no brace, so that no two share a key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::name::Topic;

/// The set of all topics.
pub(super) const TOPICS: &str = "evt:topics";

pub(super) fn meta(topic: &Topic) -> String {
    format!("evt:{{{topic}}}:meta")
}

pub(super) fn groups(topic: &Topic) -> String {
    format!("evt:{{{topic}}}:groups")
}

pub(super) fn stream(topic: &Topic, partition: u32) -> String {
    format!("evt:{{{topic}}}:s:{partition}")
}

pub(super) fn streams(topic: &Topic, n_partitions: u32) -> impl Iterator<Item = String> + '_ {
    (0..n_partitions).map(move |partition| stream(topic, partition))
}

/// What the keys of all groups of a topic begin with.
pub(super) fn group_prefix(topic: &Topic) -> String {
    format!("evt:{{{topic}}}:g:")
}

pub(super) fn group(topic: &Topic, group: &str) -> String {
    format!("{}{group}", group_prefix(topic))
}

/// What the keys of all groups' exceptions in a topic begin with.
pub(super) fn exception_prefix(topic: &Topic) -> String {
    format!("evt:{{{topic}}}:x:")
}

pub(super) fn exceptions(topic: &Topic, group: &str, partition: u32) -> String {
    format!("{}{group}:{partition}", exception_prefix(topic))
}

/// The channel on which news of a topic are told.
pub(super) fn channel(topic: &Topic) -> String {
    format!("evt:{{{topic}}}:news")
}

/// Bits of an offset for the counter within a millisecond: 4,194,304 events.
const COUNTER_BITS: u32 = 22;
const MAX_COUNTER: u64 = (1 << COUNTER_BITS) - 1;

/// The offset of an entry's id `milliseconds-counter`, in one number; ids sort as their offsets do. `None` if it is
/// no id, or is out of range: times from the year 2109 on, or four million events in one millisecond.
pub(super) fn offset(id: &[u8]) -> Option<u64> {
    let (millis, counter) = std::str::from_utf8(id).ok()?.split_once('-')?;
    let (millis, counter): (u64, u64) = (millis.parse().ok()?, counter.parse().ok()?);
    (millis >> (64 - COUNTER_BITS) == 0 && counter <= MAX_COUNTER).then_some(millis << COUNTER_BITS | counter)
}

/// The id of an offset.
pub(super) fn id(offset: u64) -> String {
    format!("{}-{}", offset >> COUNTER_BITS, offset & MAX_COUNTER)
}

/// When the server stored the entry of an offset.
pub(super) fn stored_at(offset: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(offset >> COUNTER_BITS)
}

/// The lowest id of an entry that was stored at or after a time.
pub(super) fn since(time: SystemTime) -> String {
    let past = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    // Up: an entry of the same millisecond was stored before the rest of it.
    let millis = past.as_nanos().div_ceil(1_000_000).min(u128::from(u64::MAX >> COUNTER_BITS));
    format!("{millis}-0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_offsets_are_one_to_one_and_sort_alike() {
        let ids = ["0-0", "0-1", "1-0", "1700000000000-0", "1700000000000-4194303", "1700000000001-0"];
        let offsets: Vec<u64> = ids.iter().map(|id| offset(id.as_bytes()).unwrap()).collect();
        assert!(offsets.is_sorted());
        assert!(ids.iter().zip(offsets).all(|(known, offset)| id(offset) == *known));
        for bad in ["", "5", "a-1", "1-4194304", "99999999999999999-0"] {
            assert_eq!(offset(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_part_of_a_millisecond_is_the_next_one() {
        let time = UNIX_EPOCH + Duration::from_millis(5);
        assert_eq!(
            (since(time), since(time + Duration::from_nanos(1))),
            ("5-0".to_owned(), "6-0".to_owned())
        );
        assert_eq!(since(UNIX_EPOCH - Duration::from_secs(1)), "0-0");
    }
}
