//! What a transport can do, as data that the conformance suite proves in both directions.

use std::fmt;
use std::time::Duration;

/// Which events keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Ordering {
    /// No order is kept.
    None,
    /// Events with equal keys keep the order in which they were accepted.
    PerKey,
    /// All events of a topic keep the order in which they were accepted.
    PerTopic,
}

/// How many members of one group can be active at once in an ordered subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Members {
    /// One works, the others wait for it to leave.
    One,
    /// They share the partitions.
    Many,
}

/// What settling one delivery says about earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Ack {
    /// A position: everything before it counts as settled.
    Cumulative,
    /// Each delivery alone.
    Individual,
}

/// Whether an unsettled delivery returns by itself while its consumer lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Lease {
    /// It does not.
    None,
    /// After a fixed time.
    Fixed,
    /// After a time that the consumer can extend.
    Extendable,
}

/// Whether deliveries carry a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Attempts {
    /// They carry none; `attempt` is `None`, never an invented 1.
    None,
    /// One plus the retries settled and the leases that ended under a live group.
    Exact,
}

/// Where reading may start again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Replay {
    /// Nowhere: what is settled is gone.
    None,
    /// At an offset.
    Offset,
    /// At an offset or a time.
    OffsetAndTime,
}

/// What a confirmed publish survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// Nothing: it lives in this process.
    Volatile,
    /// The end of the publishing process.
    Process,
    /// A restart of the broker.
    Broker,
    /// Power loss: it was flushed before the confirm.
    Flushed,
}

/// Whether several processes can open the same store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Instances {
    /// A second one gets a typed error.
    One,
    /// They share it.
    Many,
}

/// The capabilities of one transport value: constant for its life.
///
/// Every axis is a lower bound that grows from left to right; build one with struct update from
/// [`Capabilities::NONE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// The strongest order a subscription may ask for.
    pub ordering: Ordering,
    /// Active members of an ordered group.
    pub order_members: Members,
    /// What one settle covers.
    pub ack: Ack,
    /// Whether unsettled deliveries return by themselves.
    pub lease: Lease,
    /// Whether deliveries are counted.
    pub attempts: Attempts,
    /// Whether `Retry` may ask for a delay.
    pub delay: bool,
    /// For how long one id is stored once; `None` = every copy is stored.
    pub dedup: Option<Duration>,
    /// Where a group or a reader may start.
    pub replay: Replay,
    /// What a confirmed publish survives.
    pub durability: Durability,
    /// Largest event in bytes, headers counted; `None` = not known.
    pub max_event_bytes: Option<usize>,
    /// Whether an absent body differs from an empty one.
    pub absent_payload: bool,
    /// Whether several processes can share the store.
    pub instances: Instances,
    /// Whether [`Transport::admin`](crate::Transport::admin) is present.
    pub admin: bool,
}

impl Capabilities {
    /// The weakest value of every axis.
    pub const NONE: Self = Self {
        ordering: Ordering::None,
        order_members: Members::One,
        ack: Ack::Cumulative,
        lease: Lease::None,
        attempts: Attempts::None,
        delay: false,
        dedup: None,
        replay: Replay::None,
        durability: Durability::Volatile,
        max_event_bytes: None,
        absent_payload: false,
        instances: Instances::One,
        admin: false,
    };

    /// Returns every axis with its value as text, in the order of the capability page.
    pub fn rows(&self) -> [(&'static str, String); 13] {
        let yes = |claimed: bool| if claimed { "yes" } else { "no" }.to_owned();
        [
            ("ordering", self.ordering.to_string()),
            ("order members", self.order_members.to_string()),
            ("ack", self.ack.to_string()),
            ("lease", self.lease.to_string()),
            ("attempts", self.attempts.to_string()),
            ("delay", yes(self.delay)),
            ("dedup window", self.dedup.map_or("none".into(), |window| format!("{window:?}"))),
            ("replay", self.replay.to_string()),
            ("durability of Ok", self.durability.to_string()),
            ("max event", self.max_event_bytes.map_or("unknown".into(), |bytes| format!("{bytes} B"))),
            ("absent payload", yes(self.absent_payload)),
            ("processes", self.instances.to_string()),
            ("admin", yes(self.admin)),
        ]
    }
}

macro_rules! display {
    ($($axis:ident { $($value:ident => $text:literal),+ $(,)? })+) => {$(
        impl fmt::Display for $axis {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$value => $text),+ })
            }
        }
    )+};
}

display! {
    Ordering { None => "none", PerKey => "per key", PerTopic => "per topic" }
    Members { One => "one", Many => "many" }
    Ack { Cumulative => "cumulative", Individual => "individual" }
    Lease { None => "none", Fixed => "fixed", Extendable => "extendable" }
    Attempts { None => "none", Exact => "exact" }
    Replay { None => "none", Offset => "offset", OffsetAndTime => "offset, time" }
    Durability { Volatile => "volatile", Process => "process", Broker => "broker", Flushed => "flushed" }
    Instances { One => "one", Many => "many" }
}
