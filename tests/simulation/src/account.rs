//! The account of a run: what was committed against what was published and what had an effect.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering::Relaxed;

use eventbus::{Envelope, Transport as _};

use crate::clock;
use crate::ledger::Noted;
use crate::step::{Step, applied, ordered};
use crate::world::World;

/// Of each sort of violation so many are shown.
const SHOWN: usize = 5;

/// What a run came to.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) n_committed: usize,
    pub(crate) n_published: usize,
    pub(crate) n_repeated: u64,
    pub(crate) n_faults: u64,
    pub(crate) n_calls: u64,
    pub(crate) minutes: u64,
    pub(crate) trace: u64,
    pub(crate) violations: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    pub(crate) fn violated(&mut self, what: &'static str, how: String) {
        self.violations.entry(what).or_default().push(how);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "committed {} published {} repeated {} faults {} calls {} minutes {} trace {:016x}",
            self.n_committed,
            self.n_published,
            self.n_repeated,
            self.n_faults,
            self.n_calls,
            self.minutes,
            self.trace
        )?;
        for (what, violations) in &self.violations {
            write!(f, "\nVIOLATIONS {what}: {}", violations.len())?;
            for violation in violations.iter().take(SHOWN) {
                write!(f, "\n    {violation}")?;
            }
        }
        Ok(())
    }
}

/// The events of a topic, each partition in its order.
async fn published(world: &World, topic: &eventbus::Topic) -> eventbus::Result<Vec<Envelope>> {
    let mut events = Vec::new();
    let Some(admin) = world.broker.admin() else { return Ok(events) };
    for known in admin.topic(topic).await?.map(|info| info.partitions).unwrap_or_default() {
        let records = admin.read(topic, known.partition, known.first, usize::MAX).await?;
        events.extend(records.iter().filter_map(|record| record.content.envelope().cloned()));
    }
    Ok(events)
}

/// Compares.
pub(crate) async fn draw_up(world: &World, is_done: bool) -> Report {
    let mut report = Report::default();
    let (committed, effects) = world.ledger.account();
    let mut tokens: HashMap<(&str, &str, u64), u64> = HashMap::new();
    for Noted { topic, key, n, token } in &committed {
        if tokens.insert((topic, key, *n), *token).is_some() {
            report.violated("run", format!("{topic} {key} {n} was committed twice: the run itself is wrong"));
        }
    }
    let mut next: HashMap<(&str, &str), u64> = HashMap::new();
    let mut had: BTreeSet<(&str, &str, u64)> = BTreeSet::new();
    for Noted { topic, key, n, token } in &effects {
        if tokens.get(&(topic, key, *n)) != Some(token) {
            report.violated("ghost", format!("{topic} {key} {n} had an effect that was never committed"));
        }
        if !had.insert((topic, key, *n)) {
            report.violated("twice", format!("{topic} {key} {n} had its effect again"));
            continue;
        }
        let due = next.entry((topic, key)).or_default();
        if n != due {
            report.violated("order", format!("{topic} {key} {n} had its effect when {due} was due"));
        }
        *due = n + 1;
    }
    for Noted { topic, key, n, .. } in &committed {
        if !had.contains(&(topic, key, *n)) {
            report.violated("loss", format!("{topic} {key} {n} has no effect"));
        }
    }
    for topic in [ordered(), applied()].into_iter().flatten() {
        let events = match published(world, &topic).await {
            Ok(events) => events,
            Err(error) => {
                report.violated("run", format!("{topic} cannot be read: {error}"));
                continue;
            }
        };
        report.n_published += events.len();
        in_order(&events, topic.as_str(), &tokens, &mut report);
    }
    if !is_done && report.violations.is_empty() {
        report.violated(
            "end",
            format!("not all is done, open and committed and effects: {:?}", world.ledger.counts()),
        );
    }
    for stale in world.ledger.stale_blocks() {
        report.violated("stale", stale);
    }
    report.n_committed = committed.len();
    report.n_repeated = world.n_repeated.load(Relaxed);
    report.n_faults = world.n_faults.load(Relaxed);
    report.n_calls = world.n_calls.load(Relaxed);
    report.minutes = clock::elapsed().as_secs() / 60;
    report.trace = world.trace();
    report
}

/// The first time that an event of a key is in a topic, all before it of its key have been there; and its id is that of its
/// repetitions.
fn in_order(events: &[Envelope], topic: &str, tokens: &HashMap<(&str, &str, u64), u64>, report: &mut Report) {
    let mut next: HashMap<String, u64> = HashMap::new();
    let mut ids = HashMap::new();
    for event in events {
        let Ok(step) = event.decode::<Step>() else {
            report.violated("ghost", format!("{topic}: {} is no step", event.id()));
            continue;
        };
        if tokens.get(&(topic, step.key.as_str(), step.n)) != Some(&step.token) {
            report.violated(
                "ghost",
                format!("{topic} {} {} was published and never committed", step.key, step.n),
            );
        }
        let id = ids.entry((step.key.clone(), step.n)).or_insert_with(|| event.id().clone());
        if id != event.id() {
            report.violated("twice", format!("{topic} {} {} was published under two ids", step.key, step.n));
        }
        let due = next.entry(step.key.clone()).or_default();
        if step.n > *due {
            report.violated(
                "order",
                format!("{topic} {} {} was published when {due} was due", step.key, step.n),
            );
        }
        *due = (*due).max(step.n + 1);
    }
}

/// At once, on this many threads of the machine.
pub(crate) fn at_once() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}
