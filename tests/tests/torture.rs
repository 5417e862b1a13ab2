//! The torture, for seconds on brokers and on a file: nothing lost, nothing out of order, nothing from
//! nowhere, no panic, and an end; and it finds the bugs that are planted. With an outbox also what is published and what
//! handles it is in a transaction. `cargo xtask torture` is the long form.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

use std::process::Command;

use parking_lot::Mutex;

/// Seconds of faults, one a second: with an outbox a minute, as all that the company has goes through there. A planted bug
/// is found in less.
const SECONDS: &str = "8";
const SECONDS_OVER_OUTBOX: &str = "60";
const SECONDS_OF_A_BUG: &str = "14";
const SECONDS_ON_A_FILE: &str = "20";

/// One at a time: each has a broker and nine processes of its own.
static ALONE: Mutex<()> = Mutex::new(());

/// A seed under which consumers are killed, and the wire is cut: what the planted bugs need to do harm.
const HARMFUL: &str = "3";

/// Runs it; returns whether the account was clean, and what was said.
fn torture(target: &str, more: &[&str]) -> (bool, String) {
    let _alone = ALONE.lock();
    let seconds = match more {
        more if !more.contains(&"--outbox") => SECONDS,
        more if more.contains(&"--bug") => SECONDS_OF_A_BUG,
        more if more.contains(&"sqlite") => SECONDS_ON_A_FILE,
        _ => SECONDS_OVER_OUTBOX,
    };
    let run = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args([target, "--seconds", seconds])
        .args(more)
        .output()
        .unwrap();
    let said = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(matches!(run.status.code(), Some(0 | 1)), "{said}");
    (run.status.success(), said)
}

macro_rules! holds {
    ($($name:ident: $target:literal $more:expr;)*) => {$(
        #[test]
        fn $name() {
            let folder = tempfile::tempdir().unwrap();
            let target = $target.replace("FOLDER", &folder.path().display().to_string());
            let (is_clean, said) = torture(&target, &$more);
            println!("{said}");
            assert!(is_clean, "{said}");
        }
    )*};
}

holds! {
    postgres: "postgres" [];
    valkey: "valkey" [];
    sqlite: "sqlite://FOLDER/bus.db" [];
    kafka_over_an_outbox: "kafka" ["--outbox", "postgres"];
    nats_over_an_outbox: "nats" ["--outbox", "postgres"];
    rabbitmq_over_an_outbox: "rabbitmq" ["--outbox", "postgres"];
    redis_over_an_outbox: "redis" ["--outbox", "postgres"];
    sqlite_over_an_outbox: "sqlite://FOLDER/bus.db" ["--outbox", "sqlite"];
}

#[test]
fn bugs_over_an_outbox_are_found() {
    // Who publishes after the commit loses what is killed in between, or is overtaken by another writer.
    for (bug, found) in [("after-commit", "loss"), ("no-inbox", "twice")] {
        let (is_clean, said) = torture("redis", &["--outbox", "postgres", "--bug", bug, "--seed", HARMFUL]);
        assert!(!is_clean && said.contains(&format!("VIOLATIONS  {found}")), "{bug}: {said}");
    }
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
