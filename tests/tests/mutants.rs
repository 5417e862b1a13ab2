//! The suite is tested by broken transports: each must be caught by the case that names it.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

use std::collections::BTreeSet;
use std::time::Duration;

use eventbus::conformance::{self, CASES, Case, Hook, Outcome, Settings};
use eventbus_tests::mutant::{
    BROKEN_CHILDREN, Base, DECIDED_BY_THE_COMPILER, Defect, FAULTY_STORES, MUTANTS, subject,
};
use eventbus_tests::subjects;

const SEEDS: std::ops::Range<u64> = 0..20;

fn case(id: &str) -> &'static Case {
    CASES.iter().find(|case| case.id == id).unwrap_or_else(|| panic!("there is no case {id}"))
}

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.idle = Duration::from_secs(5);
    settings
}

/// Runs a case on virtual time, so that a wait for something that never comes costs nothing.
fn run(id: &str, base: Base, defect: Option<Defect>, seed: u64) -> Outcome {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        conformance::run(case(id), &subject(base, defect, settings(), seed)).await.outcome
    })
}

#[test]
fn the_unbroken_transport_passes() {
    let mut failures = Vec::new();
    for base in [Base::Plain, Base::Strong, Base::Total] {
        for case in CASES {
            for seed in 0..3 {
                match run(case.id, base, None, seed) {
                    // Children are other processes, which a volatile transport cannot have: see below.
                    Outcome::Passed | Outcome::Skipped(Hook::Kill | Hook::Power) => {}
                    other => failures.push(format!("{} on {base:?}, seed {seed}: {other:?}", case.id)),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn every_mutant_is_killed_by_its_cases_in_every_seed() {
    let hook = std::panic::take_hook();
    // A mutant may panic on purpose; its outcome says so.
    std::panic::set_hook(Box::new(|_| {}));
    let mut survivors = Vec::new();
    println!("{:28} {:10} killed in", "mutant", "by");
    for (defect, name, base, killers) in MUTANTS {
        for killer in *killers {
            let n_killed = SEEDS.filter(|seed| run(killer, *base, Some(*defect), *seed).is_failure()).count();
            println!("{name:28} {killer:10} {n_killed} of {}", SEEDS.end);
            if n_killed as u64 != SEEDS.end {
                survivors.push(format!(
                    "{name} survives {killer} in {} of {} runs",
                    SEEDS.end as usize - n_killed,
                    SEEDS.end
                ));
            }
        }
    }
    std::panic::set_hook(hook);
    assert!(survivors.is_empty(), "{survivors:#?}");
}

#[test]
fn every_case_kills_a_mutant() {
    let killers: BTreeSet<&str> = MUTANTS.iter().flat_map(|(.., killers)| killers.iter().copied()).collect();
    let killers: BTreeSet<&str> =
        killers.into_iter().chain(BROKEN_CHILDREN.iter().map(|(_, killer)| *killer)).collect();
    let killers: BTreeSet<&str> =
        killers.into_iter().chain(FAULTY_STORES.iter().map(|(_, killer)| *killer)).collect();
    let idle: Vec<_> = CASES
        .iter()
        .map(|case| case.id)
        .filter(|id| !killers.contains(id) && !DECIDED_BY_THE_COMPILER.contains(id))
        .collect();
    assert!(idle.is_empty(), "cases that no mutant needs: {idle:?}");
}

/// Stores with a fault below or beside them: found by the cases about disks. All seeds run side by side.
#[test]
fn every_faulty_store_is_caught_in_every_seed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for (fault, killer) in FAULTY_STORES {
        let runs: Vec<_> = SEEDS
            .map(|seed| {
                let mut settings = settings();
                settings.seed = seed;
                let child = env!("CARGO_BIN_EXE_child");
                let subject = subjects::sqlite_with(4, child, "sound", *fault).with_settings(settings);
                runtime
                    .spawn(async move { conformance::run(case(killer), &subject).await.outcome.is_failure() })
            })
            .collect();
        let caught = runs.into_iter().map(|run| runtime.block_on(run).unwrap()).filter(|caught| *caught);
        let n_caught = caught.count() as u64;
        println!("{:28} {killer:10} {n_caught} of {}", format!("{fault:?}"), SEEDS.end);
        assert_eq!(n_caught, SEEDS.end, "{fault:?} survives {killer}");
    }
}

/// Children with a defect, on SQLite in real processes: killed by the cases that kill processes.
#[test]
fn every_broken_child_is_caught_in_every_seed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for (broken, killer) in BROKEN_CHILDREN {
        let caught = SEEDS.filter(|seed| {
            let mut settings = settings();
            settings.seed = *seed;
            let subject = subjects::sqlite(16, env!("CARGO_BIN_EXE_child"), broken).with_settings(settings);
            runtime
                .block_on(async move { conformance::run(case(killer), &subject).await.outcome.is_failure() })
        });
        let n_caught = caught.count() as u64;
        println!("{broken:28} {killer:10} {n_caught} of {}", SEEDS.end);
        assert_eq!(n_caught, SEEDS.end, "{broken} survives {killer}");
    }
}
