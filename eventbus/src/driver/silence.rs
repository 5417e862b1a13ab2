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

/// No expected delay grows beyond this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
struct State {
    /// Nothing was to be expected before this.
    since: Instant,
    owned: BTreeSet<PartitionId>,
    /// The silence for which the consumer is to be given up.
    given_up: Option<Instant>,
    /// How often that was in vain: a delay that another process asked for may be longer than ours.
    n_in_vain: u32,
}

impl Silence {
    /// Takes a silence of that time as a fault. What an owner before us handed back is due after the longest
    /// delay.
    pub(super) fn new(after: Duration, longest_delay: Duration) -> Self {
        Self {
            after,
            longest_delay,
            state: Mutex::new(State {
                since: Instant::now(),
                owned: BTreeSet::new(),
                given_up: None,
                n_in_vain: 0,
            }),
            broken: Notify::new(),
            is_silent: AtomicBool::new(false),
        }
    }

    /// Something was delivered.
    pub(super) fn heard(&self) {
        self.is_silent.store(false, Atomic::Relaxed);
        self.state.lock().n_in_vain = 0;
        self.expect_after(Duration::ZERO);
    }

    /// What was handed back comes again after a delay, and until then perhaps nothing does.
    pub(super) fn expect_after(&self, delay: Duration) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.since = state.since.max(now.checked_add(delay).unwrap_or(now));
    }

    pub(super) fn gained(&self, partitions: &[PartitionId]) {
        let n_in_vain = {
            let mut state = self.state.lock();
            state.owned.extend(partitions);
            state.n_in_vain.min(16)
        };
        self.expect_after((self.longest_delay * 2u32.pow(n_in_vain)).min(LONGEST));
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

    /// Waits until the consumer is to be given up, unless something changed since that was decided.
    pub(super) async fn broken(&self) {
        loop {
            self.broken.notified().await;
            let mut state = self.state.lock();
            if state.given_up.take() == Some(state.since) {
                state.n_in_vain += 1;
                return;
            }
        }
    }
}

/// Looks, as long as the subscription runs.
pub(super) async fn watch(subscribed: &Subscribed) {
    let silence = &subscribed.silence;
    let mut seen = None;
    loop {
        tokio::time::sleep(silence.after / 2).await;
        let since = silence.state.lock().since;
        let is_idle = || subscribed.books.is_empty() && silence.state.lock().since == since;
        let is_quiet = is_idle() && since.elapsed() >= silence.after / 2;
        if !is_quiet && !silence.is_silent() {
            seen = None;
            continue;
        }
        // What cannot be asked is told elsewhere.
        let Ok(n_waiting) = lag(subscribed).await else { continue };
        if n_waiting == 0 {
            // Nothing is missed, whoever took it.
            silence.is_silent.store(false, Atomic::Relaxed);
            seen = None;
        } else if is_quiet && is_idle() && seen.replace(since) == Some(since) {
            tracing::warn!(
                n_waiting, topic = %subscribed.topic, group = %subscribed.group,
                "events wait and nothing is delivered: joining again"
            );
            silence.is_silent.store(true, Atomic::Relaxed);
            silence.state.lock().given_up = Some(since);
            silence.broken.notify_one();
            seen = None;
        }
    }
}

/// Unsettled events in the partitions that are ours.
async fn lag(subscribed: &Subscribed) -> Result<u64> {
    let Some(admin) = subscribed.transport.admin() else { return Ok(0) };
    let positions = admin.group(&subscribed.group, &subscribed.topic).await?;
    let owned = &subscribed.silence.state.lock().owned;
    Ok(positions.iter().filter(|info| owned.contains(&info.partition)).map(|info| info.lag).sum())
}
