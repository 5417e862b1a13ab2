//! Parking on each embedded transport, and bugs planted in it that its tests must find.

mod cases;
mod gate;
mod log_cases;
mod random;

use std::sync::Arc;
use std::time::Duration;

use self::cases::{CASES, IN_EVERY_FORM};
use self::gate::Gate;
use super::planted::{Bug, plant};
use crate::bus::Bus;
use crate::parking::Waits;
use crate::transport::Transport;
use crate::transport::memory::{Memory, Options};
use crate::transport::sqlite::{self, Sqlite};

const SEEDS: std::ops::Range<u64> = 0..20;

/// Which case finds which bug.
const FOUND_BY: &[(Bug, &str)] = &[
    (Bug::RunsFollowerInLane, "follower_waits_for_parked_head"),
    (Bug::ForgetsParkedOnTakeover, "takeover_loads_parked_keys_first"),
    (Bug::ParksTwice, "crash_between_park_and_settle_parks_once"),
    (Bug::SettlesBeforePark, "source_settles_after_park_is_confirmed"),
    (Bug::FreesKeyEarly, "key_is_free_only_after_done"),
    (Bug::CountsAfterRun, "crash_loop_is_counted"),
    (Bug::NoCaution, "crash_loop_is_counted"),
    (Bug::NoCaution, "crash_loop_ends_where_nothing_is_held"),
    (Bug::LogOrder, "order_inside_a_key_is_the_origin"),
    (Bug::SweepsBlind, "zombie_sweep_moves_nothing"),
    (Bug::SweepMovesFirst, "zombie_sweep_moves_nothing"),
    (Bug::SweepReorders, "sweep_keeps_order_and_state"),
    (Bug::SweepForgetsAttempts, "sweep_keeps_order_and_state"),
    (Bug::RedriveHeadOnly, "held_sequence_redrives_oldest_first"),
    (Bug::DropsOverBound, "full_parking_pauses_not_drops"),
    (Bug::ParksEverything, "outage_opens_breaker_and_parks_nothing"),
    (Bug::EpochIgnored, "zombie_cannot_undo_done"),
    (Bug::TrustsFirstMark, "takeover_beside_a_sweep_reads_the_mark_again"),
];

/// Bugs that can be made where failed events wait in rows.
const IN_ROWS: &[Bug] = &[Bug::RedriveHeadOnly, Bug::ParksEverything];

/// A bus whose parking can be held up, for one run of a case.
struct World {
    bus: Bus,
    gate: Arc<Gate>,
    random: fastrand::Rng,
    /// Where failed events wait.
    waits: Waits,
}

impl World {
    fn new(transport: Arc<dyn Transport>, waits: Waits, seed: u64) -> Self {
        let gate = Arc::new(Gate::new(transport));
        let bus = Bus::new(gate::Gated(gate.clone()));
        Self { bus, gate, random: fastrand::Rng::with_seed(seed), waits }
    }
}

/// Runs a case on virtual time in the in-process transport.
fn on_memory(case: &cases::Case, waits: Waits, seed: u64) -> Result<(), String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let options = Options { replay: 1_000_000, ..Options::default() };
    let world = World::new(Arc::new(Memory::new(options)), waits, seed);
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(3_600), (case.run)(world))
            .await
            .unwrap_or(Err("stuck".into()))
    })
}

/// The forms in which a case is run: the log's, and the rows' where it holds there too.
fn forms(case: &cases::Case) -> Vec<Waits> {
    let rows = IN_EVERY_FORM.contains(&case.name).then_some(Waits::Transport);
    [Waits::Log].into_iter().chain(rows).collect()
}

#[test]
fn every_case_passes_on_memory() {
    for case in CASES {
        for waits in forms(case) {
            for seed in SEEDS {
                let ended = on_memory(case, waits, seed);
                assert_eq!(ended, Ok(()), "{} with {waits:?}, seed {seed}", case.name);
            }
        }
    }
}

#[test]
fn every_case_passes_on_sqlite() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for (case, waits) in CASES.iter().flat_map(|case| forms(case).into_iter().map(move |waits| (case, waits)))
    {
        let folder = tempfile::tempdir().unwrap();
        let ended = runtime.block_on(async {
            let path = folder.path().join("bus.db");
            let file = Sqlite::open_path(&path, sqlite::Options::default()).await.unwrap();
            let world = World::new(Arc::new(file.clone()), waits, 1);
            let ended = tokio::time::timeout(Duration::from_secs(60), (case.run)(world)).await;
            file.close().await.unwrap();
            ended.unwrap_or(Err("stuck".into()))
        });
        assert_eq!(ended, Ok(()), "{} with {waits:?}", case.name);
    }
}

#[test]
fn every_planted_bug_is_found_in_every_seed() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut survivors = Vec::new();
    println!("{:28} {:44} found in", "bug", "by");
    for (bug, name) in FOUND_BY {
        let case = CASES.iter().find(|case| case.name == *name).unwrap();
        for waits in forms(case).into_iter().filter(|waits| *waits == Waits::Log || IN_ROWS.contains(bug)) {
            plant(Some(*bug));
            let n_found = SEEDS.filter(|seed| on_memory(case, waits, *seed).is_err()).count();
            plant(None);
            println!(
                "{:28} {name:44} {:10} {n_found} of {}",
                format!("{bug:?}"),
                format!("{waits:?}"),
                SEEDS.end
            );
            if n_found as u64 != SEEDS.end {
                let n_missed = SEEDS.end as usize - n_found;
                survivors.push(format!("{bug:?} survives {name} with {waits:?} in {n_missed} runs"));
            }
        }
    }
    std::panic::set_hook(hook);
    assert!(survivors.is_empty(), "{survivors:#?}");
}

#[test]
fn every_case_finds_a_bug() {
    for case in CASES {
        assert!(
            case.is_extra || FOUND_BY.iter().any(|(_, name)| *name == case.name),
            "{} finds nothing",
            case.name
        );
    }
}
