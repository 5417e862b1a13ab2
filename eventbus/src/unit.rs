//! A unit of work around one run of a handler, such as a database transaction.

use std::fmt::Debug;

use async_trait::async_trait;

use crate::envelope::Envelope;
use crate::failure::Failure;
use crate::name::Topic;

/// What an extractor opened for one run of a handler, to be ended with the run's outcome.
///
/// An extractor gives it to [`Context::enlist`](crate::Context::enlist). When the handler succeeded, the driver
/// commits it with what the handler emits, in place of publishing that, and settles the event after that. When the
/// handler failed, panicked or ran out of time it is abandoned. A value that is dropped without either (the driver
/// stops, the partition is gone) leaves nothing behind as well.
#[async_trait]
pub trait Unit: Debug + Send + Sync {
    /// Makes the handler's work final together with `outputs`, in their order: all of it or nothing.
    ///
    /// # Errors
    /// The run has failed, and is treated as if the handler had. A transient failure may be an outcome that is not
    /// known: the next run finds out.
    ///
    /// # Cancellation
    /// It is not cancelled by the time limit of the handler; if the process ends, the outcome is all or nothing.
    async fn commit(self: Box<Self>, outputs: Vec<(Topic, Envelope)>) -> Result<(), Failure>;

    /// Undoes what the handler did. It cannot fail: what cannot be undone in words is undone by going away.
    async fn abandon(self: Box<Self>);
}
