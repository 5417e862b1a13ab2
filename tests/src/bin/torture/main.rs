//! Torture: producers and consumers as processes of their own on one bus, a fault every second, and an account at the
//! end: nothing that was confirmed is lost, no key out of order, nothing from nowhere. Bugs can be planted, to see that
//! the account finds them.

mod account;
mod bugs;
mod faults;
mod roles;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use self::bugs::Bug;
use self::roles::Place;

const USAGE: &str = "usage: cargo xtask torture KIND|URL [--seconds N] [--seed S] [--bug NAME]
  KIND   a broker that is started for it, and is killed and cut off too: kafka, nats, postgres, rabbitmq,
         redis, valkey
  URL    an address, such as sqlite:///tmp/t.db: only the processes on it are tortured
  NAME   ack-early, past-a-hole, retry-to-tail, lost-confirm, parked-forgotten,
         panics, never-ends";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let all: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match all.as_slice() {
        ["produce", url, topic, folder, id, bug] => role(url, topic, folder, id, bug, true),
        ["consume", url, topic, folder, id, bug] => role(url, topic, folder, id, bug, false),
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
fn role(url: &str, topic: &str, folder: &str, id: &str, bug: &str, produces: bool) -> Result<bool, String> {
    let place = Place {
        url: url.to_owned(),
        topic: topic.to_owned(),
        folder: PathBuf::from(folder),
        id: id.parse().map_err(|_| USAGE.to_owned())?,
        bug: Bug::parse(bug)?,
    };
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let playing =
        async { if produces { roles::produce(&place).await } else { roles::consume(&place).await } };
    runtime.block_on(playing).map(|()| true).map_err(|error| error.to_string())
}

fn run(target: &str, options: &[&str]) -> Result<bool, String> {
    let (mut seconds, mut seed, mut bug) = (60, fastrand::u64(..), Bug::None);
    for option in options.chunks(2) {
        match option {
            ["--seconds", value] => seconds = value.parse().map_err(|_| USAGE.to_owned())?,
            ["--seed", value] => seed = value.parse().map_err(|_| USAGE.to_owned())?,
            ["--bug", value] => bug = Bug::parse(value)?,
            _ => return Err(USAGE.to_owned()),
        }
    }
    let folder = std::env::temp_dir().join(format!("eventbus-torture-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    println!("torture of {target} for {seconds} s, seed {seed}, bug {bug:?}");
    let report = faults::run(target, Duration::from_secs(seconds), seed, bug, &folder)?;
    println!("{report}");
    if report.is_clean() {
        drop(std::fs::remove_dir_all(&folder));
    } else {
        println!("what was written is kept in {}; repeat with --seed {seed}", Path::new(&folder).display());
    }
    Ok(report.is_clean())
}
