//! A hook for tests: who joined, and how each run ended.

use std::sync::Arc;

use super::Subscribed;
use crate::extract::Context;
use crate::failure::Failure;

/// Sees what the driver does. It is called on the driver's tasks and must not block.
pub(crate) trait Observer: Send + Sync {
    /// A subscription begins its work.
    fn joined(&self, subscribed: &Arc<Subscribed>);

    /// A run of a handler ended; its outputs are stored, if it succeeded.
    fn ran(&self, handler: &'static str, context: &Context, failure: Option<&Failure>);

    /// A delivery was settled.
    fn settled(&self);
}
