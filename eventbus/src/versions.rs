//! Events of a type that a service knows, in a version that it does not.

use std::future::ready;
use std::pin::Pin;
use std::time::Duration;

use crate::extract::Context;
use crate::failure::Failure;
use crate::handler::Bound;
use crate::outcome::{IntoOutcome, Outcome};

/// What becomes of an event of a type that a service handles, in a version that none of its routes takes.
///
/// While two versions of a service run side by side, members of the old one meet events that only the new one knows, and
/// after a step back there is nobody else. To pass over them would lose them for the group, so that is not what happens
/// unless it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OtherVersions {
    /// It fails and is tried again after a time, when a newer member may have its partition; later events of its key
    /// wait. After the last delivery that [`Retry`](crate::Retry) allows it goes to the dead letters. The default, with
    /// a minute.
    Retry {
        /// The time until the next try.
        after: Duration,
    },
    /// It goes to the dead letters at once. What later events of its key do is as after any dead letter
    /// ([`Followers`](crate::Followers)).
    DeadLetter,
    /// It is acknowledged and counted, as unknown types are: for topics that carry each event in several versions.
    Skip,
}

impl Default for OtherVersions {
    fn default() -> Self {
        Self::Retry { after: Duration::from_secs(60) }
    }
}

/// The handler of such events, where they are not passed over.
pub(crate) struct Unfit {
    /// When they are tried again; `None` = never.
    after: Option<Duration>,
}

impl Unfit {
    /// Its name among the handlers of a service.
    pub(crate) const NAME: &'static str = "other_versions";

    pub(crate) fn new(policy: OtherVersions) -> Option<Self> {
        match policy {
            OtherVersions::Retry { after } => Some(Self { after: Some(after) }),
            OtherVersions::DeadLetter => Some(Self { after: None }),
            OtherVersions::Skip => None,
        }
    }
}

impl Bound for Unfit {
    fn call<'a>(&'a self, context: &'a Context) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>> {
        const CODE: &str = "version.unknown";
        let envelope = &context.envelope;
        let told = format!(
            "no route takes version {} of {}",
            envelope.version().unwrap_or(1),
            envelope.event_type()
        );
        let failure = match self.after {
            // With a time of its own it says nothing of what other events need.
            Some(after) => Failure::transient(CODE, told).retry_after(after),
            None => Failure::permanent(CODE, told),
        };
        Box::pin(ready(failure.into_outcome()))
    }
}
