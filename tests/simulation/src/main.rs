//! A deterministic simulation. The real relay and the real driver with its lanes and its retries run on virtual time against a
//! database and a broker that lose calls and answers, are slow and go away, in processes that are killed, stopped and set
//! wrong in their time. Ten minutes of it are a fraction of a second, and a seed is one history: what fails once fails
//! again.
//!
//! The database is a model here: that PostgreSQL and SQLite keep to it is what the outbox's own tests are for.

mod account;
mod bug;
mod clock;
mod ledger;
mod roles;
mod run;
mod step;
mod wire;
mod world;

use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::bug::Bug;

const USAGE: &str = "usage: simulation [--seeds N] [--from SEED] [--minutes M] [--bug NAME | --bugs]
       simulation --seed SEED [--minutes M] [--bug NAME]
  --seeds   so many, one after another on each processor; 2000 unless told
  --seed    one alone: the same every time
  --bug     with a bug; --bugs: with each, until a seed finds it
  --minutes of virtual time with faults; 10 unless told";

/// Seeds that are tried at once on a bug.
const HELPING: u64 = 10;

struct Options {
    from: u64,
    n_seeds: u64,
    seed: Option<u64>,
    minutes: u64,
    bug: (String, Bug),
    bugs: bool,
}

fn options(arguments: &[String]) -> Option<Options> {
    let mut options = Options {
        from: 1,
        n_seeds: 2000,
        seed: None,
        minutes: 10,
        bug: ("none".to_owned(), Bug::None),
        bugs: false,
    };
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        match name.as_str() {
            "--bugs" => options.bugs = true,
            "--seeds" => options.n_seeds = rest.next()?.parse().ok()?,
            "--from" => options.from = rest.next()?.parse().ok()?,
            "--seed" => options.seed = Some(rest.next()?.parse().ok()?),
            "--minutes" => options.minutes = rest.next()?.parse().ok()?,
            "--bug" => {
                let name = rest.next()?;
                options.bug = (name.clone(), if name == "none" { Bug::None } else { Bug::parse(name)? });
            }
            _ => return None,
        }
    }
    Some(options)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(options) = options(&arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let outcome = match (options.seed, options.bugs) {
        (Some(seed), _) => one(seed, &options),
        (None, true) => each_bug(&options),
        (None, false) => all(&options),
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

/// One seed, in this process.
fn one(seed: u64, options: &Options) -> Result<bool, String> {
    clock::seed(seed);
    // A task that panics ends unseen where another takes over its work.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(101);
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let length = Duration::from_secs(options.minutes * 60);
    let report = runtime.block_on(run::run(seed, length, options.bug.1));
    println!("{report}");
    // What is left are processes that were killed: there is nothing of them to be ended.
    std::mem::forget(runtime);
    Ok(report.violations.is_empty())
}

/// What one seed says, in a process of its own, as hash tables and runtimes count what was made before them.
fn apart(seed: u64, bug: &str, minutes: u64) -> Result<(bool, String), String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let (seed, minutes) = (seed.to_string(), minutes.to_string());
    let run = Command::new(me).args(["--seed", &seed, "--bug", bug, "--minutes", &minutes]).output();
    let run = run.map_err(|error| error.to_string())?;
    let said = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    Ok((run.status.success(), said))
}

/// Runs seeds, and returns what each said.
fn seeds(from: u64, n: u64, bug: &str, minutes: u64) -> Result<Vec<(u64, bool, String)>, String> {
    let (next, ended) = (AtomicU64::new(from), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= from + n {
                return Ok(());
            }
            let (is_clean, said) = apart(seed, bug, minutes)?;
            ended.lock().push((seed, is_clean, said));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..account::at_once()).map(|_| scope.spawn(work)).collect();
        let ends =
            workers.into_iter().map(|worker| worker.join().map_err(|_| "a worker panicked".to_owned())?);
        ends.collect::<Result<Vec<()>, String>>()
    })?;
    let mut ended = ended.into_inner();
    ended.sort_unstable_by_key(|(seed, ..)| *seed);
    Ok(ended)
}

/// The sum of a figure over what seeds said.
fn sum(ended: &[(u64, bool, String)], of: &str) -> u64 {
    let figure = |(_, _, said): &(u64, bool, String)| {
        let mut words = said.split_whitespace().skip_while(|word| *word != of);
        words.nth(1).and_then(|figure| figure.parse::<u64>().ok())
    };
    ended.iter().filter_map(figure).sum()
}

fn all(options: &Options) -> Result<bool, String> {
    let began = Instant::now();
    let ended = seeds(options.from, options.n_seeds, &options.bug.0, options.minutes)?;
    let failed: Vec<_> = ended.iter().filter(|(_, is_clean, _)| !is_clean).collect();
    for (seed, _, said) in failed.iter().take(10) {
        let with = format!("--seed {seed} --minutes {} --bug {}", options.minutes, options.bug.0);
        println!("seed {seed}: {said}\n  again: cargo xtask simulate {with}\n");
    }
    let figures = ["committed", "published", "repeated", "faults", "calls", "minutes"];
    let figures = figures.map(|of| format!("{of} {}", sum(&ended, of))).join(", ");
    println!("seeds {} to {}: {figures}", options.from, options.from + options.n_seeds - 1);
    // The same seed is the same history.
    let (first, again) = (ended.first(), apart(options.from, &options.bug.0, options.minutes)?);
    let is_same = first.is_some_and(|(_, _, said)| *said == again.1);
    println!(
        "{} of {} seeds failed; the first is {} again; {:.1} s",
        failed.len(),
        ended.len(),
        if is_same { "the same" } else { "ANOTHER" },
        began.elapsed().as_secs_f32()
    );
    Ok(failed.is_empty() && is_same)
}

/// The first seed that finds each bug, and as what.
fn each_bug(options: &Options) -> Result<bool, String> {
    let mut are_found = true;
    println!("| bug | first found by seed | as |\n|---|---|---|");
    for (name, _, expected) in Bug::ALL {
        let finds = |said: &str| said.contains(&format!("VIOLATIONS {expected}:"));
        let mut found = None;
        let mut from = options.from;
        while found.is_none() && from < options.from + options.n_seeds {
            let ended = seeds(from, HELPING, name, options.minutes)?;
            found = ended.iter().find(|(_, _, said)| finds(said)).map(|(seed, ..)| *seed);
            from += HELPING;
        }
        are_found &= found.is_some();
        let seed = found.map_or_else(|| "NONE".to_owned(), |seed| seed.to_string());
        println!("| {name} | {seed} | {expected} |");
    }
    Ok(are_found)
}
