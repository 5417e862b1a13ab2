//! What a consumer is handed, and what it answers.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::admin::Offset;
use crate::envelope::Envelope;
use crate::header::Headers;
use crate::partition::PartitionId;

/// Names one handing-out of one event to one consumer. Plain data: copy it, send it, keep it.
///
/// A token from before a reconnect, a reopen or a lost lease never hits another delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    high: u64,
    low: u64,
}

impl Token {
    /// Packs what a transport needs to find the delivery again. Must not repeat within a group.
    pub const fn new(high: u64, low: u64) -> Self {
        Self { high, low }
    }

    /// Returns the first half.
    pub const fn high(self) -> u64 {
        self.high
    }

    /// Returns the second half.
    pub const fn low(self) -> u64 {
        self.low
    }
}

/// Bytes in a topic that are not an event of this framework.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Undecodable {
    /// The body, untouched.
    pub raw: Option<Bytes>,
    /// What could be read of the headers.
    pub headers: Headers,
    /// Why it is not an event, without any of the payload.
    pub reason: String,
}

impl Undecodable {
    /// Keeps the bytes with the reason.
    pub fn new(raw: Option<Bytes>, headers: Headers, reason: impl Into<String>) -> Self {
        Self { raw, headers, reason: reason.into() }
    }
}

/// What a stored record holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// An event.
    Envelope(Envelope),
    /// Bytes that are not one; a delivery all the same, so that they are dead-lettered and not lost.
    Undecodable(Box<Undecodable>),
}

impl Content {
    /// Returns the event, if it is one.
    pub fn envelope(&self) -> Option<&Envelope> {
        match self {
            Self::Envelope(envelope) => Some(envelope),
            Self::Undecodable(_) => None,
        }
    }

    /// Returns the bytes that count against a window.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Envelope(envelope) => envelope.size_bytes(),
            Self::Undecodable(bad) => bad.headers.as_block().len() + bad.raw.as_ref().map_or(0, Bytes::len),
        }
    }
}

/// One event in hand.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Delivery {
    /// What to settle it with.
    pub token: Token,
    /// Where it came from.
    pub partition: PartitionId,
    /// Its position, where the transport has positions.
    pub offset: Option<Offset>,
    /// From 1; `None` where the transport does not count.
    pub attempt: Option<NonZeroU32>,
    /// When it returns by itself; `None` where there is no lease.
    pub lease_until: Option<Instant>,
    /// When the transport stored it, where it says so.
    pub stored_at: Option<std::time::SystemTime>,
    /// The event, or bytes that are not one.
    pub content: Content,
}

impl Delivery {
    /// Hands out `content` without position, count or lease.
    pub fn new(token: Token, partition: PartitionId, content: Content) -> Self {
        Self { token, partition, offset: None, attempt: None, lease_until: None, stored_at: None, content }
    }

    /// Sets the position.
    #[must_use]
    pub fn with_offset(mut self, offset: Offset) -> Self {
        self.offset = Some(offset);
        self
    }

    /// Sets the count.
    #[must_use]
    pub fn with_attempt(mut self, attempt: NonZeroU32) -> Self {
        self.attempt = Some(attempt);
        self
    }

    /// Sets the end of the lease.
    #[must_use]
    pub fn with_lease_until(mut self, until: Instant) -> Self {
        self.lease_until = Some(until);
        self
    }

    /// Sets when the transport stored it.
    #[must_use]
    pub fn with_stored_at(mut self, time: std::time::SystemTime) -> Self {
        self.stored_at = Some(time);
        self
    }
}

/// What a poll returns.
#[derive(Debug)]
#[non_exhaustive]
pub enum Polled {
    /// Events, in order within each partition's keys; never empty.
    Deliveries(Vec<Delivery>),
    /// These partitions are ours now.
    Assigned(Vec<PartitionId>),
    /// These partitions move away: no more of them is handed out. Settle what is in hand and
    /// [`release`](super::Consumer::release) them before the deadline.
    Revoking {
        /// The partitions.
        partitions: Vec<PartitionId>,
        /// When they are taken.
        deadline: Instant,
    },
    /// These partitions are gone; nothing of them can be settled any more.
    Lost(Vec<PartitionId>),
    /// The consumer was closed.
    Closed,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settle {
    /// Done.
    Ack,
    /// Deliver again, not before `after`; in an ordered subscription before any later event of its
    /// key that was not handed out.
    Retry {
        /// The least delay; `None` = at once.
        after: Option<Duration>,
    },
    /// It was not handled: deliver it again at once, in its place, without counting an attempt.
    Return,
    /// Never deliver again to this group. Other groups are not affected.
    Reject,
}

/// What settling or renewing did not reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "lost tokens were not settled"]
pub struct Settled {
    /// Tokens whose delivery is no longer ours: `LeaseLost`.
    pub lost: Vec<Token>,
}

impl Settled {
    /// Turns lost tokens into an error.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) with the number of lost tokens.
    pub fn all(self) -> crate::Result<()> {
        if self.lost.is_empty() {
            return Ok(());
        }
        Err(crate::Error::new(crate::ErrorKind::LeaseLost, "deliveries are no longer ours")
            .with("tokens", self.lost.len()))
    }
}

/// The count of a first delivery.
#[cfg_attr(
    not(feature = "memory"),
    allow(dead_code, reason = "what uses it depends on the transports that are built")
)]
pub(crate) const FIRST: NonZeroU32 = NonZeroU32::MIN;
