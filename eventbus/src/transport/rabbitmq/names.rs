//! Names of exchanges, queues and entries.
//!
//! A topic is named as RabbitMQ names a super stream: the exchange as the topic, its streams `topic-0`, `topic-1` and so
//! on, each bound by its number. Names of topics and groups hold no `:`, so what is ours alone has one.

use std::fmt::Display;

use crate::name::Topic;

/// The stream in which topics are kept.
pub(super) const TOPICS: &str = "evt:topics";

/// The stream of a partition.
pub(super) fn stream(topic: impl Display, partition: impl Display) -> String {
    format!("{topic}-{partition}")
}

/// The stream in which a topic's groups are kept.
pub(super) fn groups(topic: &Topic) -> String {
    format!("evt:groups:{topic}")
}

/// What stands for a member that lives: a queue that ends with its connection.
pub(super) fn member(member: u64) -> String {
    format!("evt:member:{member:016x}")
}

/// What is held by whoever creates a stream.
pub(super) fn lock(what: &str) -> String {
    format!("evt:lock:{what}")
}

/// What the keys of a topic's groups begin with.
pub(super) const GROUP: &str = "g:";

pub(super) fn group(group: &str) -> String {
    format!("{GROUP}{group}")
}

pub(super) fn cursor(group: &str, partition: u32) -> String {
    format!("c:{group}:{partition}")
}

/// The key of the offset below which a partition was purged.
pub(super) fn low(partition: u32) -> String {
    format!("l:{partition}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_apart() {
        let topics = ["a", "a-1", "a.1", "a-1-0", "evt"].map(|name| Topic::new(name).unwrap());
        let mut seen = std::collections::HashSet::from([TOPICS.to_owned()]);
        for topic in &topics {
            assert!(seen.insert(groups(topic)));
            assert!([0, 1, 11].iter().all(|partition| seen.insert(stream(topic, partition))), "{topic}");
        }
    }
}
