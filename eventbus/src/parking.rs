//! How a service keeps events that wait: for another attempt, or behind an event of their key that failed.

use std::num::NonZeroUsize;

/// Where an event that failed in its lane waits for its next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Waits {
    /// With the transport where it keeps delays, else in the parking log, else in the lane.
    #[default]
    Auto,
    /// In the transport, handed back with a delay. Needs [`delay`](crate::Capabilities::delay).
    Transport,
    /// In a log of its own, the topic `<topic>.<group>.parked`: for transports without delays. Needs
    /// [`replay`](crate::Capabilities::replay) by offset and [`Admin`](crate::Admin).
    Log,
    /// In its lane: later events of its key, and the transport's progress, wait with it.
    Lane,
}

/// What becomes of later events of a key when one of them was dead-lettered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Followers {
    /// They wait, durably and in order, until an operator redrives or resolves the one that failed:
    /// `eventctl dlq redrive --sequence KEY`, or [`ParkedKeys`](crate::ParkedKeys).
    Hold,
    /// They are handled without it.
    Skip,
}

/// How a service keeps events that wait, and the bounds of that.
///
/// Parked events are in the topic `<topic>.<group>.parked`, stored before their source is settled. Memory
/// holds their ids and positions, not their bodies. What was parked and handled is known by its place in the source:
/// after a group was moved back by hand, delete that topic as well, or such events are taken for handled ones. At a bound the key or the partition waits with the
/// transport, health says so, and nothing is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parking {
    /// Where failed events wait. Default: chosen by what the transport can do.
    pub waits: Waits,
    /// What later events of a dead-lettered key do. `None` (default): hold where the subscription is ordered
    /// and the transport can keep a log, else skip.
    pub followers: Option<Followers>,
    /// Parked events a key; at the bound the key's lane waits. Default 1,024.
    pub max_per_key: NonZeroUsize,
    /// Parked keys a partition; at the bound the lanes of new ones wait. Default 10,000.
    pub max_keys: NonZeroUsize,
    /// Records of the log between its low-water mark and its end that make it be rewritten. Default 10,000.
    pub sweep_after: NonZeroUsize,
}

impl Default for Parking {
    fn default() -> Self {
        Self {
            waits: Waits::Auto,
            followers: None,
            max_per_key: NonZeroUsize::MIN.saturating_add(1_023),
            max_keys: NonZeroUsize::MIN.saturating_add(9_999),
            sweep_after: NonZeroUsize::MIN.saturating_add(9_999),
        }
    }
}

impl Parking {
    /// Sets where failed events wait.
    #[must_use]
    pub fn with_waits(mut self, waits: Waits) -> Self {
        self.waits = waits;
        self
    }

    /// Sets what later events of a dead-lettered key do.
    #[must_use]
    pub fn with_followers(mut self, followers: Followers) -> Self {
        self.followers = Some(followers);
        self
    }

    /// Sets the bound of parked events a key.
    #[must_use]
    pub fn with_max_per_key(mut self, events: NonZeroUsize) -> Self {
        self.max_per_key = events;
        self
    }

    /// Sets the bound of parked keys a partition.
    #[must_use]
    pub fn with_max_keys(mut self, keys: NonZeroUsize) -> Self {
        self.max_keys = keys;
        self
    }

    /// Sets after how many records the log is rewritten.
    #[must_use]
    pub fn with_sweep_after(mut self, records: NonZeroUsize) -> Self {
        self.sweep_after = records;
        self
    }
}
