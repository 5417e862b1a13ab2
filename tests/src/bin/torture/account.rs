//! The account: what was confirmed against what was handled.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::base::Noted;

/// How a panic is told.
const PANIC: &str = "panicked at";

/// Of each sort of violation so many are shown.
const SHOWN: usize = 5;

/// What a run came to.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) faults: BTreeMap<&'static str, u32>,
    n_confirmed: u64,
    n_handled: u64,
    n_repeated: u64,
    longest_gap_ms: u64,
    /// Over an outbox: events in the topic, and how long the end took.
    pub(crate) n_published: u64,
    pub(crate) drained_ms: u64,
    /// By what they are: order, loss, ghost, twice, panic, gone, end, memory, secret.
    violations: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    pub(crate) fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    pub(crate) fn violated(&mut self, what: &'static str, how: String) {
        self.violations.entry(what).or_default().push(how);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> = self.faults.iter().map(|(name, n)| format!("{n} × {name}")).collect();
        writeln!(f, "faults      {}", faults.join(", "))?;
        writeln!(f, "confirmed   {}", self.n_confirmed)?;
        writeln!(f, "handled     {}, {} of them again", self.n_handled, self.n_repeated)?;
        if self.n_published > 0 {
            writeln!(f, "published   {}", self.n_published)?;
            writeln!(f, "drained     in {} ms", self.drained_ms)?;
        } else {
            writeln!(f, "longest gap {} ms without an effect", self.longest_gap_ms)?;
        }
        for (what, violations) in &self.violations {
            writeln!(f, "VIOLATIONS  {what}: {}", violations.len())?;
            for violation in violations.iter().take(SHOWN) {
                writeln!(f, "            {violation}")?;
            }
        }
        write!(f, "{} violations", self.violations.values().map(Vec::len).sum::<usize>())
    }
}

/// The next number of each key that is not confirmed.
pub(crate) fn confirmed(folder: &Path, n_producers: usize) -> Result<HashMap<String, u64>, String> {
    let mut next = HashMap::new();
    for id in 0..n_producers {
        let lines = std::fs::read_to_string(folder.join(format!("confirmed.{id}"))).unwrap_or_default();
        for line in lines.lines() {
            let (key, n) = line.split_once(' ').ok_or_else(|| format!("a torn line: {line}"))?;
            let n: u64 = n.parse().map_err(|_| format!("a torn line: {line}"))?;
            next.insert(key.to_owned(), n + 1);
        }
    }
    Ok(next)
}

/// How many events were handled at least once.
pub(crate) fn handled(folder: &Path) -> Result<HashMap<String, u64>, String> {
    let mut next: HashMap<String, u64> = HashMap::new();
    for (_, key, n) in effects(folder)? {
        let seen = next.entry(key).or_default();
        *seen = (*seen).max(n + 1);
    }
    Ok(next)
}

fn effects(folder: &Path) -> Result<Vec<(u64, String, u64)>, String> {
    let lines = std::fs::read_to_string(folder.join("effects")).unwrap_or_default();
    let read = |line: &str| {
        let mut parts = line.split(' ');
        let (at, key, n) = (parts.next()?, parts.next()?, parts.next()?);
        Some((at.parse().ok()?, key.to_owned(), n.parse().ok()?))
    };
    lines.lines().map(|line| read(line).ok_or_else(|| format!("a torn line: {line}"))).collect()
}

/// What the logs of the processes say with a word in it.
fn said(folder: &Path, word: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| error.to_string())?.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".log") {
            let said = std::fs::read(entry.path()).map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&said).into_owned();
            let lines = said.lines().filter(|line| line.contains(word));
            found.extend(lines.map(|line| (name.clone(), line.to_owned())));
        }
    }
    Ok(found)
}

/// The time of day, in milliseconds: what effects are noted with.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Compares.
pub(crate) fn draw_up(folder: &Path, n_producers: usize, mut report: Report) -> Result<Report, String> {
    let confirmed = confirmed(folder, n_producers)?;
    let mut next: HashMap<String, u64> = HashMap::new();
    // What was passed over by a later one of its key.
    let mut missing: BTreeSet<(String, u64)> = BTreeSet::new();
    let mut before = None;
    for (at, key, n) in effects(folder)? {
        report.n_handled += 1;
        report.longest_gap_ms =
            report.longest_gap_ms.max(before.map_or(0, |before| at.saturating_sub(before)));
        before = Some(at);
        let due = next.entry(key.clone()).or_default();
        // An event may come again; the first time it comes, all before it of its key have been here.
        match n.cmp(due) {
            std::cmp::Ordering::Less if missing.remove(&(key.clone(), n)) => {}
            std::cmp::Ordering::Less => report.n_repeated += 1,
            std::cmp::Ordering::Equal => *due += 1,
            std::cmp::Ordering::Greater => {
                report.violated("order", format!("{key} {n} was handled before {due}"));
                missing.extend((*due..n).map(|n| (key.clone(), n)));
                *due = n + 1;
            }
        }
        // At most one event of a key is on its way without a confirm.
        if n > confirmed.get(&key).copied().unwrap_or(0) {
            report.violated("ghost", format!("{key} {n} was never published"));
        }
    }
    for (key, n) in &missing {
        report.violated("loss", format!("{key} {n} was never handled"));
    }
    for (key, end) in &confirmed {
        report.n_confirmed += end;
        let seen = next.get(key).copied().unwrap_or(0);
        if seen < *end {
            report.violated("loss", format!("{key} ends at {seen}, and {end} were confirmed"));
        }
    }
    for (log, line) in said(folder, PANIC)? {
        report.violated("panic", format!("{log}: {line}"));
    }
    if report.n_confirmed == 0 {
        report.violated("proof", "nothing was confirmed: the run proved nothing".to_owned());
    }
    Ok(report)
}

/// Compares what was committed with its effects, both in their order: each once, with the token that was committed, in the
/// order of its key; and what the processes said.
pub(crate) fn of_ledger(
    folder: &Path,
    committed: &[Noted],
    effects: &[Noted],
    canary: &str,
    mut report: Report,
) -> Result<Report, String> {
    let mut tokens: HashMap<(&str, i64), &str> = HashMap::new();
    for (key, n, token) in committed {
        if tokens.insert((key, *n), token).is_some() {
            return Err(format!("{key} {n} was committed twice: the run itself is wrong"));
        }
    }
    let mut next: HashMap<&str, i64> = HashMap::new();
    let mut had: BTreeSet<(&str, i64)> = BTreeSet::new();
    for (key, n, token) in effects {
        match tokens.get(&(key.as_str(), *n)) {
            Some(committed) if *committed == token.as_str() => {}
            _ => report.violated("ghost", format!("{key} {n} with the token {token} was never committed")),
        }
        if !had.insert((key.as_str(), *n)) {
            report.n_repeated += 1;
            report.violated("twice", format!("{key} {n} had its effect again"));
            continue;
        }
        let due = next.entry(key.as_str()).or_default();
        if n != due {
            report.violated("order", format!("{key} {n} had its effect when {due} was due"));
        }
        *due = n + 1;
    }
    for (key, n, _) in committed {
        if !had.contains(&(key.as_str(), *n)) {
            report.violated("loss", format!("{key} {n} has no effect"));
        }
    }
    (report.n_confirmed, report.n_handled) = (committed.len() as u64, effects.len() as u64);
    for (log, line) in said(folder, PANIC)? {
        report.violated("panic", format!("{log}: {line}"));
    }
    for (log, line) in said(folder, canary)? {
        report.violated("secret", format!("{log}: {line}"));
    }
    if committed.is_empty() {
        report.violated("proof", "nothing was committed: the run proved nothing".to_owned());
    }
    Ok(report)
}
