//! The events of a run.

use eventbus::{Event, Topic};

use crate::ledger::Noted;

/// A number of a key.
#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "simulation.step", version = 1, key = key)]
pub(crate) struct Step {
    pub(crate) key: String,
    pub(crate) n: u64,
    /// Tells attempts for one number apart, of which only one is committed.
    pub(crate) token: u64,
}

impl Step {
    pub(crate) fn noted(&self, topic: &Topic) -> Noted {
        Noted { topic: topic.to_string(), key: self.key.clone(), n: self.n, token: self.token }
    }
}

/// What writers publish.
pub(crate) fn ordered() -> eventbus::Result<Topic> {
    Topic::new("ordered")
}

/// What the handler of that publishes.
pub(crate) fn applied() -> eventbus::Result<Topic> {
    Topic::new("applied")
}
