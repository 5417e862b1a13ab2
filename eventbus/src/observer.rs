//! A hook for tests: who joined, and how each run ended.

use std::sync::Arc;

use crate::extract::Context;
use crate::failure::Failure;

/// Sees what the driver does. It is called on the driver's tasks and must not block.
pub(crate) trait Observer: Send + Sync {
    /// A subscription begins its work.
    fn joined(&self, subscription: Arc<dyn Watched>);

    /// A run of a handler ended; its outputs are stored, if it succeeded.
    fn ran(&self, handler: &'static str, context: &Context, failure: Option<&Failure>);

    /// A delivery was settled.
    fn settled(&self);
}

/// A subscription, as an observer sees it.
#[cfg_attr(not(feature = "testing"), allow(dead_code, reason = "observers come with testing"))]
pub(crate) trait Watched: Send + Sync {
    /// Parked events that do not wait for an operator.
    fn n_waiting(&self) -> u64;

    /// Topic and group.
    fn name(&self) -> String;
}
