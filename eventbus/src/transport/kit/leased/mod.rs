//! Groups by leases, for stores that do not hand out partitions themselves.
//!
//! Members are entries with a deadline. Every member computes the same targets from the same entries; a
//! partition has one owner at a time, and each ownership has an epoch that every write of the owner names.
//! A [`Store`] keeps this durably; [`LeasedConsumer`] does the rest in memory, alike for every store.

mod consumer;
mod partitions;
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
pub(in crate::transport) mod registers;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;

pub(in crate::transport) use self::consumer::{Consumers, LeasedConsumer};
use super::assign;
use super::cursor::Past;
use crate::capability::{Ack, Attempts, Capabilities, Instances, Lease, Members, Ordering, Replay};
use crate::error::Result;
use crate::subscription::Subscription;
use crate::transport::delivery::Content;

/// What keeps events, groups and members for [`LeasedConsumer`].
///
/// Dropping a future of these leaves the work done, not begun, or going on by itself: never half done.
#[async_trait]
pub(in crate::transport) trait Store: Send + Sync + 'static {
    /// How the store names a group of a topic.
    type Group: Clone + fmt::Debug + Send + Sync + 'static;

    /// The name that tells a consumer's transport apart in `Debug`.
    const NAME: &'static str;

    /// Fails once the store is closed.
    fn is_open(&self) -> Result<()>;

    /// A member that is silent for so long loses its partitions.
    fn session(&self) -> Duration;

    /// How often a member looks though nothing rang: where news can be lost, or others store without telling.
    fn look_every(&self) -> Option<Duration>;

    /// Rings when events of the group's topic may have been stored, or the group may have changed.
    fn news(&self, group: &Self::Group) -> watch::Receiver<u64>;

    /// Enters a group, creating it (and where topics are created on use, the topic).
    async fn join(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat<Self::Group>>;

    /// Says that a member lives, removes those that do not, and takes what should be its own.
    async fn stand(self: &Arc<Self>, seat: &Seat<Self::Group>, known: BTreeMap<u32, u32>)
    -> Result<Standing>;

    /// Reads at most `max` events of each wanted partition, and at most `max_bytes` (but one). `None` = the
    /// group is gone.
    async fn read(
        self: &Arc<Self>,
        seat: &Seat<Self::Group>,
        wanted: Vec<Wanted>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Look>>;

    /// Stores progress; returns the partitions that are no longer the member's, of which nothing changed.
    /// One call at a time for a member.
    async fn save(self: &Arc<Self>, seat: &Seat<Self::Group>, progress: Arc<[Progress]>) -> Result<Vec<u32>>;

    /// Hands partitions back.
    async fn release(self: &Arc<Self>, seat: &Seat<Self::Group>, partitions: Vec<u32>) -> Result<()>;

    /// Leaves the group; a broadcast's group goes with it.
    async fn leave(self: &Arc<Self>, seat: &Seat<Self::Group>) -> Result<()>;

    /// Leaves without waiting, also outside of a runtime; what fails is left to the session's end.
    fn leave_soon(self: &Arc<Self>, seat: Seat<Self::Group>);
}

/// Where a member sits.
#[derive(Debug, Clone)]
pub(in crate::transport) struct Seat<G> {
    pub(in crate::transport) group: G,
    /// The member's id; it gets a new one if others had declared it dead.
    pub(in crate::transport) member: u64,
}

/// A partition that is ours now.
pub(in crate::transport) struct Gained {
    pub(in crate::transport) partition: u32,
    pub(in crate::transport) epoch: u32,
    pub(in crate::transport) floor: u64,
    /// Events above the floor that are settled, or wait.
    pub(in crate::transport) exceptions: HashMap<u64, Past>,
}

/// What a member learns of its group.
pub(in crate::transport) struct Standing {
    /// The member's id; a new one if others had declared it dead.
    pub(in crate::transport) member: u64,
    pub(in crate::transport) generation: u64,
    pub(in crate::transport) gained: Vec<Gained>,
    /// Partitions the caller thought to own, and does not.
    pub(in crate::transport) lost: Vec<u32>,
    /// Partitions of ours that another member should have.
    pub(in crate::transport) to_release: Vec<u32>,
}

/// A member's progress in one partition.
#[derive(Debug, Clone)]
pub(in crate::transport) struct Progress {
    pub(in crate::transport) partition: u32,
    pub(in crate::transport) epoch: u32,
    pub(in crate::transport) floor: u64,
    /// Events that the floor passed since the last progress that was stored.
    pub(in crate::transport) n_passed: u64,
    /// What changed at or above the floor.
    pub(in crate::transport) changed: Vec<(u64, Past)>,
    /// Whether entries below the floor may be stored.
    pub(in crate::transport) has_exceptions: bool,
}

/// From where a partition is to be read.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Wanted {
    pub(in crate::transport) partition: u32,
    pub(in crate::transport) epoch: u32,
    pub(in crate::transport) from: u64,
}

/// What a read found.
pub(in crate::transport) struct Look {
    /// Changes with every join, leave and release.
    pub(in crate::transport) generation: u64,
    pub(in crate::transport) fetched: Vec<Fetched>,
}

/// What was read of one partition: events from `wanted.from` on, unless what `first` says is gone.
pub(in crate::transport) struct Fetched {
    pub(in crate::transport) wanted: Wanted,
    /// Everything below was removed.
    pub(in crate::transport) first: u64,
    pub(in crate::transport) rows: Vec<Stored>,
}

/// An event with its place.
#[derive(Debug)]
pub(in crate::transport) struct Stored {
    pub(in crate::transport) offset: u64,
    pub(in crate::transport) stored_at: SystemTime,
    pub(in crate::transport) content: Content,
}

/// What a group's entries say of one partition.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Share {
    pub(in crate::transport) partition: u32,
    pub(in crate::transport) owner: Option<u64>,
    pub(in crate::transport) epoch: u32,
}

/// What a member does about one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) enum Step {
    /// Make it its own under the next epoch, and load it.
    Take,
    /// It is its own under an epoch that it did not know: load it.
    Load,
    /// It is its own, and should be another's.
    Release,
    /// Nothing: it stays as it is, ours or not.
    Keep,
}

/// Decides for each partition of a group; `shares` holds them all in order, `members` those that live, ascending.
/// Returns the steps, and the partitions that the member thought to own as they were, and does not.
pub(in crate::transport) fn steps(
    member: u64,
    members: &[u64],
    shares: &[Share],
    known: &BTreeMap<u32, u32>,
) -> (Vec<Step>, Vec<u32>) {
    let targets = assign::targets(members, shares.len() as u32);
    let mut lost = Vec::new();
    let step = |(share, target): (&Share, usize)| {
        let (mine, is_target) = (share.owner == Some(member), members.get(target) == Some(&member));
        let known = known.get(&share.partition);
        let step = match known {
            // A partition that is ours in the store and unknown to us was let go of without the store taking
            // it: it begins anew, so that no token of before fits.
            None if mine => Step::Take,
            _ if share.owner.is_none() && is_target => Step::Take,
            Some(before) if mine && *before != share.epoch => Step::Load,
            _ if mine && !is_target => Step::Release,
            _ => Step::Keep,
        };
        if known.is_some() && (!mine || step == Step::Load) {
            lost.push(share.partition);
        }
        step
    };
    (shares.iter().zip(targets).map(step).collect(), lost)
}

/// How a member's process is called where operators see it.
pub(in crate::transport) fn process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("process {} on {}", std::process::id(), host.trim())
}

/// What every transport over a [`Store`] claims; durability and the largest event are its own.
pub(in crate::transport) const CLAIMS: Capabilities = Capabilities {
    ordering: Ordering::PerKey,
    order_members: Members::Many,
    ack: Ack::Individual,
    lease: Lease::Extendable,
    attempts: Attempts::Exact,
    delay: true,
    replay: Replay::OffsetAndTime,
    absent_payload: true,
    instances: Instances::Many,
    admin: true,
    ..Capabilities::NONE
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_partition_has_one_step() {
        let share = |partition, owner, epoch| Share { partition, owner, epoch };
        let shares = [
            share(0, None, 1),
            share(1, Some(7), 2),
            share(2, Some(7), 3),
            share(3, Some(8), 4),
            share(4, Some(7), 5),
        ];
        // Alone, every partition is the member's own target.
        let known = BTreeMap::from([(0, 1), (1, 2), (3, 4), (4, 4)]);
        let (alone, lost) = steps(7, &[7], &shares, &known);
        assert_eq!(alone, [Step::Take, Step::Keep, Step::Take, Step::Keep, Step::Load]);
        assert_eq!(lost, [0, 3, 4], "what is not ours any more, or is ours anew");
        // A member that is no target gives everything back, and takes nothing.
        let all: BTreeMap<u32, u32> = [(1, 2), (2, 3), (4, 5)].into();
        let (two, _) = steps(7, &[8], &shares, &all);
        assert_eq!(two, [Step::Keep, Step::Release, Step::Release, Step::Keep, Step::Release]);
    }
}
