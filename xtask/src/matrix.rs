//! `cargo xtask matrix`: the suite on several versions of each broker, and the table of what came of it.

use std::io::{BufRead, BufReader, Error, Result};
use std::process::Stdio;
use std::time::Instant;

use xtask::brokers::{Broker, Kind, Way};

use super::Tally;

/// Where the last table is kept.
const TABLE: &str = "tests/MATRIX.md";

const HEAD: &str = "# The suite on several versions of each broker

Written by `cargo xtask matrix`: the conformance suite on a real broker of each version, on one machine. Cases that restart
the broker or damage what it keeps need a hook that a shared broker has not: they count as passed here, and are run on one
version of each by the tests.

| broker | version | passed | failed | seconds |
|---|---|---|---|---|
";

/// Runs the suite on all known versions of some brokers; the table is written when all were run.
pub(crate) fn run(kinds: &[Kind]) -> Result<bool> {
    let (mut table, mut all_passed) = (HEAD.to_owned(), true);
    let way = Way::chosen().map_err(Error::other)?;
    for kind in kinds {
        for version in kind.versions(way) {
            let row = match Broker::start(*kind, Some(version)) {
                Ok(broker) => {
                    let started = Instant::now();
                    let Tally { n_passed, n_failed, .. } = suite(*kind, &broker)?;
                    all_passed &= n_failed == 0 && n_passed > 0;
                    let seconds = started.elapsed().as_secs();
                    format!("| {kind} | {version} | {n_passed} | {n_failed} | {seconds} |\n")
                }
                Err(problem) => {
                    all_passed = false;
                    eprintln!("{kind} {version}: {problem}");
                    format!("| {kind} | {version} | did not start | | |\n")
                }
            };
            print!("{row}");
            table.push_str(&row);
        }
    }
    if kinds == Kind::ALL && way == Way::Processes {
        std::fs::write(TABLE, table).map_err(|error| Error::other(format!("{TABLE}: {error}")))?;
    }
    Ok(all_passed)
}

/// What became of the cases on a broker.
fn suite(kind: Kind, broker: &Broker) -> Result<Tally> {
    let cases = format!("{kind}::");
    let mut child = super::cargo()
        .args(["test", "--quiet", "--package", "eventbus-tests", "--test", "brokers", "--", &cases])
        .env(kind.variable(), broker.url())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut tally = Tally::default();
    let said = child.stdout.take().ok_or_else(|| Error::other("no output of cargo"))?;
    for line in BufReader::new(said).lines() {
        let line = line?;
        if !tally.add(&line) && (line.contains("FAILED") || line.contains("panicked")) {
            eprintln!("{line}");
        }
    }
    Ok(tally.ended(child.wait()?.success()))
}
