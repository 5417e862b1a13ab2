//! What a consumer asks for: topic, group, start, order, window.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::{Duration, SystemTime};

use crate::admin::Offset;
use crate::capability::{Capabilities, Lease, Ordering, Replay};
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Group, Topic};
use crate::partition::PartitionId;

/// Who else sees an event that this consumer sees.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Audience {
    /// The members of a durable group share the events; the group's position survives them.
    Group(Group),
    /// Every instance gets every event from now on; its position ends with it.
    Broadcast,
}

/// Where a group starts when it is new; a group that exists goes on where it was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Start {
    /// At the first event after the subscription.
    #[default]
    Latest,
    /// At the oldest event that is kept. Needs [`Replay::Offset`].
    Earliest,
    /// At the given offset of each partition, inclusive; others at the oldest. Needs [`Replay::Offset`].
    Offsets(BTreeMap<PartitionId, Offset>),
    /// At the first event stored at or after the time. Needs [`Replay::OffsetAndTime`].
    Time(SystemTime),
}

/// What a consumer asks a transport for.
///
/// Every bound has a name and a default: window 1,024 events and 64 MiB, lease 30 s, revocation 10 s.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Subscription {
    /// The topic to read.
    pub topic: Topic,
    /// The group, or broadcast.
    pub audience: Audience,
    /// Where a new group starts.
    pub start: Start,
    /// The order that must hold; a transport that cannot keep it refuses.
    pub ordering: Ordering,
    /// Most unsettled events in hand.
    pub window: NonZeroUsize,
    /// Most bytes of unsettled events in hand; one larger event is still handed out alone.
    pub window_bytes: NonZeroUsize,
    /// How long a delivery stays ours without a settle or a renewal, where the transport has leases.
    pub lease: Duration,
    /// How long a member may finish what it holds of a partition that moves away.
    pub revoke_within: Duration,
    /// Whether `Settle::Retry` will ask for a delay.
    pub delayed_retry: bool,
}

impl Subscription {
    /// Default window, in events.
    pub const WINDOW: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
    /// Default window, in bytes.
    pub const WINDOW_BYTES: NonZeroUsize = NonZeroUsize::new(64 << 20).unwrap();
    /// Default lease.
    pub const LEASE: Duration = Duration::from_secs(30);
    /// Default time to drain a partition that moves.
    pub const REVOKE_WITHIN: Duration = Duration::from_secs(10);

    /// Subscribes a group to a topic; the order of keys is kept.
    pub fn group(topic: Topic, group: Group) -> Self {
        Self::to(topic, Audience::Group(group))
    }

    /// Subscribes this instance alone: it gets every event from now on.
    pub fn broadcast(topic: Topic) -> Self {
        Self::to(topic, Audience::Broadcast)
    }

    fn to(topic: Topic, audience: Audience) -> Self {
        Self {
            topic,
            audience,
            start: Start::default(),
            ordering: Ordering::PerKey,
            window: Self::WINDOW,
            window_bytes: Self::WINDOW_BYTES,
            lease: Self::LEASE,
            revoke_within: Self::REVOKE_WITHIN,
            delayed_retry: false,
        }
    }

    /// Sets where a new group starts.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Sets the order that must hold.
    #[must_use]
    pub fn with_ordering(mut self, ordering: Ordering) -> Self {
        self.ordering = ordering;
        self
    }

    /// Sets the most unsettled events in hand.
    #[must_use]
    pub fn with_window(mut self, events: NonZeroUsize) -> Self {
        self.window = events;
        self
    }

    /// Sets the most unsettled bytes in hand.
    #[must_use]
    pub fn with_window_bytes(mut self, bytes: NonZeroUsize) -> Self {
        self.window_bytes = bytes;
        self
    }

    /// Sets the lease of a delivery.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets the time to drain a partition that moves away.
    #[must_use]
    pub fn with_revoke_within(mut self, budget: Duration) -> Self {
        self.revoke_within = budget;
        self
    }

    /// States that retries will ask for a delay.
    #[must_use]
    pub fn with_delayed_retry(mut self) -> Self {
        self.delayed_retry = true;
        self
    }

    /// Returns the group, unless this is a broadcast.
    pub fn group_name(&self) -> Option<&Group> {
        match &self.audience {
            Audience::Group(group) => Some(group),
            Audience::Broadcast => None,
        }
    }

    /// Checks the request against what a transport claims, before any input or output.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) naming the axis; [`Config`](ErrorKind::Config) for a lease of zero.
    pub fn check(&self, capabilities: &Capabilities) -> Result<()> {
        let needs = |axis: &str, claimed: String| {
            Err(Error::new(ErrorKind::Unsupported, format!("the transport does not offer this {axis}"))
                .with("claimed", claimed)
                .with("topic", &self.topic))
        };
        if self.ordering > capabilities.ordering {
            return needs("ordering", capabilities.ordering.to_string());
        }
        let replay = match self.start {
            Start::Latest => Replay::None,
            Start::Earliest | Start::Offsets(_) => Replay::Offset,
            Start::Time(_) => Replay::OffsetAndTime,
        };
        if replay > capabilities.replay {
            return needs("start position (replay)", capabilities.replay.to_string());
        }
        if self.delayed_retry && !capabilities.delay {
            return needs("delayed retry", "no".into());
        }
        if self.lease.is_zero() && capabilities.lease != Lease::None {
            return Err(Error::config("a lease must be longer than zero"));
        }
        Ok(())
    }
}
