//! Two thousand histories hold, and each planted bug is found in one of the first.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

use std::process::Command;

/// Optimized, whatever the tests are: twenty thousand virtual minutes are to be run.
fn simulation(arguments: &[&str]) -> (bool, String) {
    let run = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["run", "--quiet", "--release", "--package", "eventbus-simulation", "--"])
        .args(arguments)
        .output()
        .unwrap();
    let said = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    println!("{said}");
    (run.status.success(), said)
}

#[test]
fn two_thousand_seeds_hold() {
    let (is_clean, said) = simulation(&["--seeds", "2000"]);
    assert!(is_clean, "{said}");
}

#[test]
fn each_planted_bug_is_found() {
    let (are_found, said) = simulation(&["--bugs"]);
    assert!(are_found, "{said}");
}
