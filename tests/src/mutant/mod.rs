//! Broken transports: each wraps the in-process one with a single defect, and names who must catch it.

mod admin;
mod consumer;
mod publisher;
pub mod store;
mod transport;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::time::Duration;

use eventbus::capability::{Durability, Instances};
use eventbus::conformance::{Settings, Subject};
use eventbus::transport::memory::{Memory, Options};
use eventbus::{Content, EventId, PartitionId, Topic, Transport};
use parking_lot::Mutex;

use self::transport::Mutant;

macro_rules! mutants {
    ($($defect:ident $name:literal on $base:ident : $($killer:literal)+ ;)*) => {
        /// What is broken.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Defect { $(
            #[doc = $name]
            $defect
        ),* }

        /// Every mutant: its defect, its name, what it is built on, the cases that must fail.
        pub const MUTANTS: &[(Defect, &str, Base, &[&str])] =
            &[$((Defect::$defect, $name, Base::$base, &[$($killer),+])),*];
    };
}

/// The configuration of the memory transport below a mutant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing optional is on.
    Plain,
    /// Replay ring, deduplication window.
    Strong,
    /// One partition.
    Total,
}

mutants! {
    // The first set.
    EveryoneGetsEverything "everyone_gets_everything" on Plain: "S2" "D10" "S5";
    DropsHeaders "drops_headers" on Plain: "P2" "P1";
    TruncatesPayload "truncates_payload" on Plain: "P3" "P1";
    RetryToTail "retry_to_tail" on Strong: "O3";
    OkAfterClose "ok_after_close" on Plain: "P11";
    AckCoversBatch "ack_covers_batch" on Plain: "C12" "C11";
    LosesOnCancel "loses_on_cancel" on Plain: "C4";
    ForgetsRetry "forgets_retry" on Plain: "C13" "C8";
    Reverses "reverses" on Total: "O1" "O2" "O4";
    SecondSettleFails "second_settle_fails" on Plain: "C5";
    SharedGroups "shared_groups" on Plain: "S1" "C10";
    CommitsHighest "commits_highest" on Plain: "C7";
    AckOnDelivery "ack_on_delivery" on Plain: "C2" "C22" "S5";
    LateAckOk "late_ack_ok" on Plain: "C15";
    TokenReuse "token_reuse" on Plain: "C17";
    UnroutableIsOk "unroutable_is_ok" on Plain: "P12";
    ReturnOnWrongConfirm "return_on_wrong_confirm" on Plain: "P10";
    TimeoutIsOk "timeout_is_ok" on Plain: "P18";
    NewIdOnResend "new_id_on_resend" on Plain: "C8" "C2";
    ConfirmBeforeStore "confirm_before_store" on Strong: "P6" "P8" "D2";
    DedupByPayload "dedup_by_payload" on Plain: "P17";
    HiddenDedup "hidden_dedup" on Plain: "P16";
    SilentUnsupported "silent_unsupported" on Plain: "S10" "S11";
    UnboundedPrefetch "unbounded_prefetch" on Plain: "C19";
    CloseLeavesWaiting "close_leaves_waiting" on Plain: "P21";
    UnboundedPublish "unbounded_publish" on Plain: "P14";
    GarbageDropped "garbage_dropped" on Plain: "C23";
    GarbagePanics "garbage_panics" on Plain: "C23";
    RevokeCommits "revoke_commits" on Plain: "S5" "S4";
    RandomPartition "random_partition" on Plain: "O7" "O1";
    // The second set: publishing.
    OversizeKillsConnection "oversize_kills_connection" on Plain: "P4";
    TombstoneIsError "tombstone_is_error" on Plain: "P5";
    SwapsReceipts "swaps_receipts" on Plain: "P7";
    CancelPublishesHalf "cancel_publishes_half" on Plain: "P9";
    BatchVerdictIsOne "batch_verdict_is_one" on Plain: "P10";
    CloseClosesPeers "close_closes_peers" on Plain: "P13" "C21";
    FlushLies "flush_lies" on Plain: "P15";
    DedupIgnored "dedup_ignored" on Plain: "P16";
    DedupForEver "dedup_for_ever" on Strong: "P16";
    PrefixMatch "prefix_match" on Plain: "S6" "P19";
    SpoofableHeaders "spoofable_headers" on Plain: "P20";
    // Groups.
    ForgetsPosition "forgets_position" on Strong: "S3" "C3";
    StartIgnored "start_ignored" on Strong: "S7" "R1";
    GhostSubscribe "ghost_subscribe" on Plain: "S12";
    BroadcastIsShared "broadcast_is_shared" on Plain: "S13";
    EarlySubscribe "early_subscribe" on Plain: "S8";
    SilentMissingTopic "silent_missing_topic" on Plain: "S9";
    HistoryGap "history_gap" on Strong: "S11" "S7";
    // Settling.
    IgnoresMax "ignores_max" on Plain: "C1";
    OneLock "one_lock" on Plain: "C6";
    AttemptAlwaysOne "attempt_always_one" on Plain: "C8";
    DelayIgnored "delay_ignored" on Plain: "C9";
    DelayInMemory "delay_in_memory" on Plain: "C9";
    RejectRequeues "reject_requeues" on Plain: "C10";
    RejectForAllGroups "reject_for_all_groups" on Plain: "C10";
    RetryRewindsBatch "retry_rewinds_batch" on Plain: "C11";
    SilentDeliveryLimit "silent_delivery_limit" on Plain: "C14";
    LeaseNeverExpires "lease_never_expires" on Plain: "C15";
    IgnoresRenewal "ignores_renewal" on Plain: "C16";
    SettleAfterCloseOk "settle_after_close_ok" on Plain: "C18";
    CloseHangsPoll "close_hangs_poll" on Plain: "C20";
    CloseAcksFetched "close_acks_fetched" on Plain: "C22";
    ReturnCounts "return_counts" on Plain: "C26";
    GhostOnDelete "ghost_on_delete" on Plain: "C24";
    // Order and replay.
    EarlyHandover "early_handover" on Plain: "O5";
    SecondActiveMember "second_active_member" on Strong: "O6";
    ReplayOffByOne "replay_off_by_one" on Strong: "R1";
    ReadsShortPages "reads_short_pages" on Strong: "R4";
    TimeSeekExclusive "time_seek_exclusive" on Strong: "R1";
    ReplayMovesGroup "replay_moves_group" on Strong: "R2";
    JumpsToLatest "jumps_to_latest" on Strong: "R3";
    // Faults.
    WindowLostOnResume "window_lost_on_resume" on Strong: "D3";
    FullIsOk "full_is_ok" on Plain: "D6";
    WallClockLeases "wall_clock_leases" on Plain: "D11";
    PurgesByStep "purges_by_step" on Strong: "D11";
    TwoOwners "two_owners" on Plain: "D10";
    // The surface.
    LagLies "lag_lies" on Plain: "A1";
    RetentionHidden "retention_hidden" on Plain: "A6";
    CapabilityFlips "capability_flips" on Plain: "A2";
    PrintsSecret "prints_secret" on Plain: "A3";
    LeaksTask "leaks_task" on Plain: "A4";
}

/// Cases that no running transport can fail: the compiler decides them, as
/// `tests/ui/tests/ui/not_sendable.rs` proves.
pub const DECIDED_BY_THE_COMPILER: &[&str] = &["A5"];

/// Stores with a fault, and the case that must find it.
pub const FAULTY_STORES: &[(store::Fault, &str)] = &[
    (store::Fault::DiskLies, "D8"),
    (store::Fault::TrustsSecondSync, "D9"),
    (store::Fault::SkipsCorruption, "D12"),
];

/// Defects of the child program `tests/src/bin/child.rs`, with the case that catches each.
pub const BROKEN_CHILDREN: &[(&str, &str)] = &[("confirms_before_storing", "D1"), ("acks_on_delivery", "D4")];

/// What the values of one mutant share: the hooks' switches and the defect's memory.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Answers to publishes are lost.
    pub(crate) cut: AtomicBool,
    /// The store has no room.
    pub(crate) full: AtomicBool,
    pub(crate) restarted: AtomicBool,
    /// The clock was stepped forward, and nobody has reacted to it yet.
    pub(crate) stepped: AtomicBool,
    pub(crate) any_closed: AtomicBool,
    pub(crate) replayed: AtomicBool,
    pub(crate) counter: AtomicU64,
    pub(crate) seen_payloads: Mutex<HashSet<Vec<u8>>>,
    pub(crate) seen_ids: Mutex<HashSet<EventId>>,
    pub(crate) rejected: Mutex<HashSet<EventId>>,
    pub(crate) topics: Mutex<Vec<Topic>>,
}

impl World {
    pub(crate) fn next(&self) -> u64 {
        self.counter.fetch_add(1, Atomic::Relaxed)
    }
}

/// Events the topics of a mutant hold before publishing waits.
const BOUND: usize = 1_000;

fn options(base: Base, defect: Option<Defect>) -> Options {
    let mut options = Options::default();
    let bound = if defect == Some(Defect::UnboundedPublish) { 1_000_000 } else { BOUND };
    options.max_events = bound.try_into().unwrap_or(options.max_events);
    options.max_event_bytes = (1 << 20).try_into().unwrap_or(options.max_event_bytes);
    if base != Base::Plain {
        options.replay = 100_000;
    }
    if base == Base::Strong {
        options.dedup = Some(Duration::from_millis(500));
    }
    if base == Base::Total {
        options.partitions = std::num::NonZeroU32::MIN;
    }
    options
}

/// A subject over memory that simulates the hooks and has one defect, or none.
pub fn subject(base: Base, defect: Option<Defect>, mut settings: Settings, seed: u64) -> Subject {
    settings.seed = seed;
    let options = options(base, defect);
    let memory = Memory::new(options);
    let world = Arc::new(World::default());
    let (raw, cut, full, restarted) = (memory.clone(), world.clone(), world.clone(), world.clone());
    let (clock, stepped) = (memory.clone(), world.clone());
    let connect = move || {
        // Two owners of one store that do not know of each other.
        let memory = if defect == Some(Defect::TwoOwners) { Memory::new(options) } else { memory.reopen() };
        if defect == Some(Defect::LeaksTask) {
            tokio::spawn(std::future::pending::<()>());
        }
        let mutant = Mutant::new(memory, defect, world.clone());
        async move { Ok(Arc::new(mutant) as Arc<dyn Transport>) }
    };
    Subject::new("mutant", connect)
        .with_settings(settings)
        .with_bound(BOUND.try_into().unwrap_or(std::num::NonZeroUsize::MIN))
        .with_raw(move |topic, content| {
            let memory = raw.clone();
            async move { memory.inject(&topic, PartitionId(0), Content::Undecodable(Box::new(content))) }
        })
        .with_cut(move |on| {
            cut.cut.store(on, Atomic::SeqCst);
            async { Ok(()) }
        })
        .with_fill(move |on| {
            full.full.store(on, Atomic::SeqCst);
            async { Ok(()) }
        })
        .with_clock(move |forward, by| {
            clock.step_clock(crate::subjects::nanos(forward, by));
            stepped.stepped.store(forward, Atomic::SeqCst);
            async { Ok(()) }
        })
        .with_restart(move || {
            restarted.restarted.store(true, Atomic::SeqCst);
            async { Ok(()) }
        })
}

/// The claims of the simulated store: it stays when the values on it go.
pub(crate) fn claims(mut capabilities: eventbus::Capabilities) -> eventbus::Capabilities {
    capabilities.durability = Durability::Broker;
    capabilities.instances = Instances::Many;
    capabilities
}
