//! The watchdog: a consumer that is handed nothing although events wait has lost its broker without noticing.
//!
//! Twice in a row, half the time apart, the group's lag in our partitions is seen while nothing is in hand and
//! nothing was due: then the subscription leaves and joins again, and is degraded until a delivery comes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::subscribed::Subscribed;
use crate::error::Result;
use crate::partition::PartitionId;

/// What is known of the intake of one subscription.
#[derive(Debug)]
pub(super) struct Silence {
    after: Duration,
    longest_delay: Duration,
    state: Mutex<State>,
    broken: Notify,
    is_silent: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Nothing was to be expected before this.
    since: Instant,
    owned: BTreeSet<PartitionId>,
}

impl Silence {
    /// Takes a silence of that time as a fault. What an owner before us handed back is due after the longest
    /// delay.
    pub(super) fn new(after: Duration, longest_delay: Duration) -> Self {
        Self {
            after,
            longest_delay,
            state: Mutex::new(State { since: Instant::now(), owned: BTreeSet::new() }),
            broken: Notify::new(),
            is_silent: AtomicBool::new(false),
        }
    }

    /// Something was delivered.
    pub(super) fn heard(&self) {
        self.is_silent.store(false, Atomic::Relaxed);
        self.expect_after(Duration::ZERO);
    }

    /// What was handed back comes again after a delay, and until then perhaps nothing does.
    pub(super) fn expect_after(&self, delay: Duration) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.since = state.since.max(now.checked_add(delay).unwrap_or(now));
    }

    pub(super) fn gained(&self, partitions: &[PartitionId]) {
        self.state.lock().owned.extend(partitions);
        self.expect_after(self.longest_delay);
    }

    pub(super) fn left(&self, partitions: &[PartitionId]) {
        self.state.lock().owned.retain(|owned| !partitions.contains(owned));
    }

    /// Leaves everything that was owned.
    pub(super) fn leave_all(&self) -> Vec<PartitionId> {
        std::mem::take(&mut self.state.lock().owned).into_iter().collect()
    }

    /// Whether nothing has come since the consumer was given up.
    pub(super) fn is_silent(&self) -> bool {
        self.is_silent.load(Atomic::Relaxed)
    }

    /// Waits until the consumer is to be given up.
    pub(super) async fn broken(&self) {
        self.broken.notified().await;
    }
}

/// Looks, as long as the subscription runs.
pub(super) async fn watch(subscribed: &Subscribed) {
    let silence = &subscribed.silence;
    let mut seen = None;
    loop {
        tokio::time::sleep(silence.after / 2).await;
        let since = silence.state.lock().since;
        if !subscribed.books.is_empty() || since.elapsed() < silence.after / 2 {
            seen = None;
            continue;
        }
        // What cannot be asked is told elsewhere.
        let Ok(n_waiting) = lag(subscribed).await else { continue };
        if n_waiting == 0 {
            seen = None;
        } else if seen.replace(since) == Some(since) {
            tracing::warn!(
                n_waiting, topic = %subscribed.topic, group = %subscribed.group,
                "events wait and nothing is delivered: joining again"
            );
            silence.is_silent.store(true, Atomic::Relaxed);
            silence.broken.notify_one();
            silence.expect_after(Duration::ZERO);
            seen = None;
        }
    }
}

/// Unsettled events in the partitions that are ours.
async fn lag(subscribed: &Subscribed) -> Result<u64> {
    let Some(admin) = subscribed.transport.admin() else { return Ok(0) };
    let groups = admin.groups(Some(&subscribed.topic)).await?;
    let owned = &subscribed.silence.state.lock().owned;
    let ours = groups.iter().filter(|info| info.group == subscribed.group && owned.contains(&info.partition));
    Ok(ours.map(|info| info.lag).sum())
}
