//! Torture: producers and consumers as processes of their own on one bus, a fault every second, and an account at the
//! end: nothing that was confirmed is lost, no key out of order, nothing from nowhere. With an outbox, writers commit events
//! in a database, relays publish them, and consumers have each effect once, in another transaction of it. Bugs can be
//! planted, to see that the account finds them.

mod account;
mod base;
mod bugs;
mod faults;
mod ledger;
mod roles;
mod upset;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use sqlx::{Postgres, Sqlite};

use self::bugs::Bug;
use self::roles::Place;

const USAGE: &str =
    "usage: cargo xtask torture KIND|URL [--outbox postgres|sqlite] [--seconds N|--minutes N] [--seed S] [--bug NAME]
  KIND   a broker that is started for it, and is killed and cut off too: kafka, nats, postgres, rabbitmq,
         redis, valkey
  URL    an address, such as sqlite:///tmp/t.db: only the processes on it are tortured
  NAME   ack-early, past-a-hole, retry-to-tail, lost-confirm, parked-forgotten,
         panics, never-ends; with an outbox: ack-early, after-commit, no-inbox";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let all: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match all.as_slice() {
        [name @ ("produce" | "consume"), url, topic, folder, id, bug] => {
            role(name, url, topic, folder, id, bug, "")
        }
        [name @ ("write" | "relay" | "apply"), url, topic, folder, id, bug, db] => {
            role(name, url, topic, folder, id, bug, db)
        }
        [target, options @ ..] if !target.starts_with("--") => run(target, options),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(2)
        }
    }
}

/// What a process of the run does until it is told to end. What it says goes to its log (`RUST_LOG`).
fn role(
    name: &str,
    url: &str,
    topic: &str,
    folder: &str,
    id: &str,
    bug: &str,
    db: &str,
) -> Result<bool, String> {
    let place = Place {
        url: url.to_owned(),
        topic: topic.to_owned(),
        folder: PathBuf::from(folder),
        id: id.parse().map_err(|_| USAGE.to_owned())?,
        bug: Bug::parse(bug)?,
        db: db.to_owned(),
    };
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let playing = async {
        match (name, db.starts_with("sqlite")) {
            ("produce", _) => roles::produce(&place).await,
            ("write", true) => ledger::write::<Sqlite>(&place).await,
            ("write", false) => ledger::write::<Postgres>(&place).await,
            ("relay", true) => ledger::relay::<Sqlite>(&place).await,
            ("relay", false) => ledger::relay::<Postgres>(&place).await,
            ("apply", true) => ledger::apply::<Sqlite>(&place).await,
            ("apply", false) => ledger::apply::<Postgres>(&place).await,
            _ => roles::consume(&place).await,
        }
    };
    runtime.block_on(playing).map(|()| true).map_err(|error| error.to_string())
}

fn run(target: &str, options: &[&str]) -> Result<bool, String> {
    let (mut seconds, mut seed, mut bug, mut outbox) = (60, fastrand::u64(..), Bug::None, None);
    for option in options.chunks(2) {
        match option {
            ["--seconds", value] => seconds = value.parse().map_err(|_| USAGE.to_owned())?,
            ["--minutes", value] => {
                let minutes: u64 = value.parse().map_err(|_| USAGE.to_owned())?;
                seconds = minutes.saturating_mul(60);
            }
            ["--seed", value] => seed = value.parse().map_err(|_| USAGE.to_owned())?,
            ["--bug", value] => bug = Bug::parse(value)?,
            ["--outbox", value] => outbox = Some(*value),
            _ => return Err(USAGE.to_owned()),
        }
    }
    let folder = std::env::temp_dir().join(format!("eventbus-torture-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let with = outbox.map(|database| format!(" with an outbox in {database}")).unwrap_or_default();
    println!("torture of {target}{with} for {seconds} s, seed {seed}, bug {bug:?}");
    let length = Duration::from_secs(seconds);
    let report = match outbox {
        Some(database) => upset::run(target, database, length, seed, bug, &folder)?,
        None => faults::run(target, length, seed, bug, &folder)?,
    };
    println!("{report}");
    if report.is_clean() {
        drop(std::fs::remove_dir_all(&folder));
    } else {
        println!("what was written is kept in {}; repeat with --seed {seed}", Path::new(&folder).display());
    }
    Ok(report.is_clean())
}
