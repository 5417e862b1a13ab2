//! Names of streams, subjects and keys.
//!
//! Names of topics and groups hold no `=`, so it may stand for a dot where NATS does not allow one: in the name of a
//! stream, and within a token of a key. No part between their dots is empty, as subjects want it. So no two topics or
//! groups share a name.

use crate::name::Topic;

/// The bucket in which topics and groups are kept.
pub(super) const BUCKET: &str = "evt";

/// The entry that is written to learn the server's time.
pub(super) const CLOCK: &str = "clock";

fn flat(name: &str) -> String {
    name.replace('.', "=")
}

/// The name of a topic or a group that a part of a key stands for.
pub(super) fn unflat(part: &str) -> String {
    part.replace('=', ".")
}

/// The stream of a partition.
pub(super) fn stream(topic: &Topic, partition: u32) -> String {
    format!("evt-{}-{partition}", flat(topic.as_str()))
}

/// The subject of a partition, on which its events are published.
pub(super) fn subject(topic: &Topic, partition: u32) -> String {
    format!("evt.{topic}.{partition}")
}

/// The subjects of all partitions, and of nothing else.
pub(super) fn subjects(topic: &Topic) -> String {
    format!("evt.{topic}.*")
}

/// What the keys of topics begin with.
pub(super) const TOPICS: &str = "t.";

pub(super) fn topic(topic: &Topic) -> String {
    format!("{TOPICS}{}", flat(topic.as_str()))
}

/// What the keys of a topic's groups begin with.
pub(super) fn groups(topic: &Topic) -> String {
    format!("g.{}.", flat(topic.as_str()))
}

pub(super) fn group(topic: &Topic, group: &str) -> String {
    format!("{}{}", groups(topic), flat(group))
}

pub(super) fn cursor(topic: &Topic, group: &str, partition: u32) -> String {
    format!("c.{}.{}.{partition}", flat(topic.as_str()), flat(group))
}

/// All positions of all groups of a topic.
pub(super) fn cursors(topic: &Topic) -> String {
    format!("c.{}.>", flat(topic.as_str()))
}

/// The subject on which changes of a key are published.
pub(super) fn changes(key: &str) -> String {
    format!("$KV.{BUCKET}.{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_apart_and_are_allowed() {
        let topics = ["a", "a-1", "a.1", "a.1.1", "a_1", "a-1-1"].map(|name| Topic::new(name).unwrap());
        let mut seen = std::collections::HashSet::new();
        for topic in &topics {
            for partition in [0, 1, 11] {
                let (stream, subject) = (stream(topic, partition), subject(topic, partition));
                assert!(!stream.contains(['.', '*', '>', ' ']), "{stream}");
                assert!(subject.split('.').all(|token| !token.is_empty()), "{subject}");
                assert!(seen.insert(stream) && seen.insert(subject), "{topic} {partition}");
            }
            assert_eq!(unflat(&flat(topic.as_str())), topic.as_str());
        }
    }
}
