//! The transports under test, with the hooks they can offer.

use std::sync::Arc;

use eventbus::conformance::Subject;
use eventbus::transport::memory::{Memory, Options};
use eventbus::{Content, PartitionId, Transport};

/// Events a topic of the memory subject holds before publishing waits.
const BOUND: usize = 6_000;

/// The in-process transport; `strong` switches on what is optional.
pub fn memory(strong: Strength) -> Subject {
    let mut options = Options::default();
    options.max_events = BOUND.try_into().unwrap_or(options.max_events);
    let name = match strong {
        Strength::Default => "memory",
        Strength::Strong => {
            options.replay = 100_000;
            options.dedup = Some(std::time::Duration::from_millis(800));
            "memory-strong"
        }
        Strength::Total => {
            options.partitions = std::num::NonZeroU32::MIN;
            options.replay = 100_000;
            "memory-total"
        }
    };
    let memory = Memory::new(options);
    let raw = memory.clone();
    Subject::new(name, move || {
        let memory = memory.reopen();
        async move { Ok(Arc::new(memory) as Arc<dyn Transport>) }
    })
    .with_bound(options.max_events)
    .with_raw(move |topic, content| {
        let memory = raw.clone();
        async move { memory.inject(&topic, PartitionId(0), Content::Undecodable(Box::new(content))) }
    })
}

/// Which of its options a transport runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// As it comes.
    Default,
    /// Replay and deduplication on.
    Strong,
    /// One partition: order over the whole topic.
    Total,
}
