//! What is kept of a group: its members and who owns which partition, and its position in each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::transport::kit::cursor::Past;
use crate::transport::kit::leased::{self, Progress, Share};

/// How a store writes down a moment at which an event is due, so that another process understands it.
pub(in crate::transport) trait Clock {
    fn write(&self, due: Instant) -> u64;
    /// The moment, or a little later.
    fn read(&self, due: u64) -> Option<Instant>;
}

/// What is kept of a group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::transport) struct GroupDoc {
    /// Tells a group from one of the same name that was deleted.
    pub(in crate::transport) id: u64,
    /// Changes with every join, leave and release.
    pub(in crate::transport) generation: u64,
    /// Where the group begins in each partition.
    pub(in crate::transport) starts: Vec<u64>,
    pub(in crate::transport) members: BTreeMap<u64, MemberDoc>,
    /// Owner and epoch of each partition.
    pub(in crate::transport) shares: Vec<(Option<u64>, u32)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::transport) struct MemberDoc {
    /// Changes as long as the member lives; what it means is the store's own.
    pub(in crate::transport) until: u64,
    pub(in crate::transport) process: String,
}

impl MemberDoc {
    pub(super) fn new(until: u64) -> Self {
        Self { until, process: leased::process() }
    }
}

impl GroupDoc {
    pub(super) fn new(starts: Vec<u64>) -> Self {
        Self {
            id: fastrand::u64(1..),
            generation: 1,
            shares: starts.iter().map(|_| (None, 0)).collect(),
            starts,
            members: BTreeMap::new(),
        }
    }

    /// Removes members that are dead; true if there were some.
    pub(super) fn bury(&mut self, dead: &BTreeSet<u64>) -> bool {
        let before = self.members.len();
        self.members.retain(|member, _| !dead.contains(member));
        self.free_shares();
        self.members.len() < before
    }

    pub(super) fn free_shares(&mut self) {
        let Self { members, shares, .. } = self;
        for (owner, _) in shares {
            *owner = owner.filter(|owner| members.contains_key(owner));
        }
    }

    /// The position in a partition as the group begins.
    pub(super) fn beginning(&self, partition: u32) -> CursorDoc {
        let floor = self.starts.get(partition as usize).copied().unwrap_or(1);
        CursorDoc { group: self.id, epoch: 0, floor, past: BTreeMap::new() }
    }

    pub(super) fn shares(&self) -> Vec<Share> {
        let share = |(partition, (owner, epoch)): (usize, &(Option<u64>, u32))| Share {
            partition: partition as u32,
            owner: *owner,
            epoch: *epoch,
        };
        self.shares.iter().enumerate().map(share).collect()
    }
}

/// What is kept of a group's position in a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::transport) struct CursorDoc {
    /// The group's id.
    pub(in crate::transport) group: u64,
    pub(in crate::transport) epoch: u32,
    pub(in crate::transport) floor: u64,
    /// Events above the floor that are settled, or wait.
    pub(in crate::transport) past: BTreeMap<u64, PastDoc>,
}

/// `attempt` 0 = settled; `due` is as the store's clock writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::transport) struct PastDoc {
    pub(in crate::transport) attempt: u32,
    pub(in crate::transport) due: Option<u64>,
}

impl PastDoc {
    fn write(past: Past, clock: &impl Clock) -> Option<Self> {
        match past {
            Past::Fresh => None,
            Past::Settled => Some(Self { attempt: 0, due: None }),
            Past::Waiting { attempt, due } => {
                Some(Self { attempt: attempt.get(), due: due.map(|due| clock.write(due)) })
            }
        }
    }

    fn read(self, clock: &impl Clock) -> Past {
        match NonZeroU32::new(self.attempt) {
            None => Past::Settled,
            Some(attempt) => Past::Waiting { attempt, due: self.due.and_then(|due| clock.read(due)) },
        }
    }
}

impl CursorDoc {
    pub(super) fn exceptions(&self, clock: &impl Clock) -> HashMap<u64, Past> {
        self.past.iter().map(|(offset, past)| (*offset, past.read(clock))).collect()
    }

    /// This with a member's progress in it.
    pub(super) fn with(&self, progress: &Progress, clock: &impl Clock) -> Self {
        let mut after = self.clone();
        after.floor = after.floor.max(progress.floor);
        for (offset, past) in &progress.changed {
            match PastDoc::write(*past, clock) {
                Some(known) => _ = after.past.insert(*offset, known),
                None => _ = after.past.remove(offset),
            }
        }
        after.past = after.past.split_off(&after.floor);
        after
    }

    /// How many events from the floor up to `end` are not settled; below `first` there are none.
    pub(super) fn lag(&self, first: u64, end: u64) -> u64 {
        let from = self.floor.max(first);
        let settled_above = self.past.range(from..).filter(|(_, past)| past.attempt == 0).count() as u64;
        end.saturating_sub(from).saturating_sub(settled_above)
    }
}
