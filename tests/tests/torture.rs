//! The torture, for a few seconds on each broker and on a file: nothing lost, nothing out of order, nothing from
//! nowhere, no panic, and an end; and it finds the bugs that are planted. `cargo xtask torture` is the long form.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

use std::process::Command;

use parking_lot::Mutex;

/// Seconds of faults, one a second.
const SECONDS: &str = "8";

/// One at a time: each has a broker and nine processes of its own.
static ALONE: Mutex<()> = Mutex::new(());

/// A seed under which consumers are killed, and the wire is cut: what the planted bugs need to do harm.
const HARMFUL: &str = "3";

/// Runs it; returns whether the account was clean, and what was said.
fn torture(target: &str, more: &[&str]) -> (bool, String) {
    let _alone = ALONE.lock();
    let run = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args([target, "--seconds", SECONDS])
        .args(more)
        .output()
        .unwrap();
    let said = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(matches!(run.status.code(), Some(0 | 1)), "{said}");
    (run.status.success(), said)
}

macro_rules! holds {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let (is_clean, said) = torture(stringify!($name), &[]);
            assert!(is_clean, "{said}");
        }
    )*};
}

holds! { kafka nats postgres rabbitmq redis valkey }

#[test]
fn sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let (is_clean, said) = torture(&format!("sqlite://{}/bus.db", folder.path().display()), &[]);
    assert!(is_clean, "{said}");
}

#[test]
fn planted_bugs_are_found() {
    for (bug, found) in [
        ("ack-early", "loss"),
        ("retry-to-tail", "order"),
        ("lost-confirm", "loss"),
        ("panics", "panic"),
        ("never-ends", "end"),
    ] {
        let (is_clean, said) = torture("redis", &["--bug", bug, "--seed", HARMFUL]);
        assert!(!is_clean && said.contains(&format!("VIOLATIONS  {found}")), "{bug}: {said}");
    }
}
