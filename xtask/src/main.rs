//! The project's own commands.
//!
//! `cargo xtask test` passes all tests and closes with one line that counts them.
//! `cargo xtask brokers` starts and ends real brokers on this machine.
//! `cargo xtask bench` runs the paired benchmarks and prints their table; with an argument, lines that hold it.
//! `cargo xtask matrix` runs the suite on several versions of each broker, and writes their table.
//! `cargo xtask torture` has processes killed, stopped and cut off on one bus, and checks what came of it.
//! `cargo xtask simulate` has outbox, relays and services run on virtual time with every fault, one history a seed.
//! `cargo xtask conformance URL` runs the suite on a transport and prints its capabilities; with `--readme`
//! it writes what the transports of this workspace claim into the README.

mod matrix;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

use xtask::brokers::{self, Broker, Kind};

const USAGE: &str = "usage: cargo xtask test [ARGS OF cargo test]
       cargo xtask brokers up|down|env|doctor [KIND ...] [--version V]
       cargo xtask bench [PART OF A NAME]
       cargo xtask conformance URL
       cargo xtask matrix [KIND ...]
       cargo xtask torture KIND|URL [--outbox postgres|sqlite] [--seconds N|--minutes N] [--seed S] [--bug NAME]
       cargo xtask simulate [--seeds N] [--seed S] [--bugs] [--help]
       cargo xtask conformance --readme";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("test", rest)) => test(rest),
        Some(("matrix", rest)) => match kinds(rest, &Kind::ALL) {
            Ok(kinds) => matrix::run(&kinds),
            Err(problem) => Err(std::io::Error::other(problem)),
        },
        Some(("brokers", rest)) => match of_brokers(rest) {
            Ok(()) => Ok(true),
            Err(problem) => Err(std::io::Error::other(problem)),
        },
        Some(("bench", only)) if only.len() <= 1 => {
            let pairs = ["run", "--release", "--package", "eventbus-benches", "--bin", "pairs", "--"];
            cargo().args(pairs).args(only).status().map(|status| status.success())
        }
        Some(("conformance", [to])) if to == "--readme" => {
            let table =
                ["test", "--quiet", "--package", "eventbus-tests", "--test", "readme", "table_of_transports"];
            cargo().args(table).env("UPDATE_README", "1").status().map(|status| status.success())
        }
        Some(("conformance", [url])) => {
            // With the program that plays roles in other processes.
            run(&["build", "--quiet", "--package", "eventbus-tests", "--bins"]).and_then(|built| {
                let suite =
                    ["run", "--quiet", "--package", "eventbus-tests", "--bin", "conformance", "--", url];
                Ok(built && run(&suite)?)
            })
        }
        Some(("torture", rest)) => {
            let torture = ["run", "--quiet", "--package", "eventbus-tests", "--bin", "torture", "--"];
            cargo().args(torture).args(rest).status().map(|status| status.success())
        }
        Some(("simulate", rest)) => {
            let simulation = ["run", "--quiet", "--release", "--package", "eventbus-simulation", "--"];
            cargo().args(simulation).args(rest).status().map(|status| status.success())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts, ends and lists real brokers on this machine.
fn of_brokers(arguments: &[String]) -> brokers::Result<()> {
    let (what, rest) = arguments.split_first().ok_or(USAGE)?;
    let (names, version) = match rest {
        [names @ .., option, version] if option == "--version" => (names, Some(version.as_str())),
        names => (names, None),
    };
    let kinds = kinds(names, &Kind::ALL)?;
    match what.as_str() {
        "up" => {
            for kind in kinds {
                let started = std::time::Instant::now();
                for running in brokers::up(&[kind], version)? {
                    println!(
                        "{:<9} {}  ({:.1} s)",
                        running.kind,
                        running.url,
                        started.elapsed().as_secs_f32()
                    );
                }
            }
        }
        "down" => brokers::down(&kinds)?.iter().for_each(|ended| println!("{} ended", ended.kind)),
        "env" => {
            let running = brokers::running()?;
            let shown = running.iter().filter(|running| kinds.contains(&running.kind));
            shown.for_each(|running| println!("export {}='{}'", running.kind.variable(), running.url));
        }
        "doctor" => {
            for (kind, found) in brokers::doctor()? {
                println!("{kind:<9} {}", found.unwrap_or_else(|problem| format!("MISSING: {problem}")));
            }
        }
        _ => return Err(USAGE.to_owned()),
    }
    Ok(())
}

/// The brokers of these names, separated by commas or blanks; all if none is named.
fn kinds(names: &[String], all: &[Kind]) -> brokers::Result<Vec<Kind>> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    names.iter().flat_map(|name| name.split(',')).map(str::parse).collect()
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs every test of the workspace, shows what cargo shows, and adds up the programs' closing lines.
fn test(arguments: &[String]) -> std::io::Result<bool> {
    let mut cargo = cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast"]).args(arguments).stdout(Stdio::piped());
    // Most of them wait for something.
    if std::env::var_os("RUST_TEST_THREADS").is_none() {
        let n_threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get) + 1;
        cargo.env("RUST_TEST_THREADS", n_threads.to_string());
    }
    if let Err(problem) = xtask::clients::openssl() {
        println!("openssl: {problem}");
    }
    // They end with this process. One that cannot be started fails the tests that need it, with the reason.
    let mut brokers = Vec::new();
    for kind in Kind::ALL {
        if std::env::var_os(kind.variable()).is_some() {
            println!("{kind}: as {} says", kind.variable());
            continue;
        }
        match Broker::start(kind, None) {
            Ok(broker) => {
                println!("{kind}: {}", broker.version());
                cargo.env(kind.variable(), broker.url());
                brokers.push(broker);
            }
            Err(problem) => println!("{kind}: {problem}"),
        }
    }
    let started = std::time::Instant::now();
    let mut child = cargo.spawn()?;
    let mut tally = Tally::default();
    let mut out = std::io::stdout();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            writeln!(out, "{line}")?;
            tally.add(&line);
        }
    }
    let passed = child.wait()?.success();
    drop(brokers);
    let Tally { n_passed, n_failed, n_ignored } = tally.ended(passed);
    let skipped = if n_ignored > 0 { format!(", {n_ignored} skipped") } else { String::new() };
    writeln!(out, "done in {} s", started.elapsed().as_secs())?;
    writeln!(out, "{n_passed} passed, {n_failed} failed{skipped}")?;
    Ok(passed)
}

/// What the closing lines of test programs add up to.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    n_passed: usize,
    n_failed: usize,
    n_ignored: usize,
}

impl Tally {
    /// Takes a line of output; true if it was a closing line.
    fn add(&mut self, line: &str) -> bool {
        let Some(counts) = line.strip_prefix("test result: ") else { return false };
        self.n_passed += count(counts, "passed");
        self.n_failed += count(counts, "failed");
        self.n_ignored += count(counts, "ignored");
        true
    }

    /// A program that died without its closing line failed, whatever the others counted.
    fn ended(self, passed: bool) -> Self {
        let n_failed = if passed { self.n_failed } else { self.n_failed.max(1) };
        Self { n_failed, ..self }
    }
}

/// The number before a word, as in `ok. 12 passed; 0 failed`.
fn count(line: &str, word: &str) -> usize {
    let words: Vec<&str> = line.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    words
        .windows(2)
        .find(|pair| pair.last() == Some(&word))
        .and_then(|pair| pair.first()?.parse().ok())
        .unwrap_or(0)
}

fn run(arguments: &[&str]) -> std::io::Result<bool> {
    Ok(cargo().args(arguments).status()?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s";
        assert_eq!((count(line, "passed"), count(line, "failed"), count(line, "ignored")), (12, 3, 1));
        assert_eq!(count("nothing here", "passed"), 0);
    }
}
