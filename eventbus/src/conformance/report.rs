//! The report: one line a case, and the table of a transport.

use std::fmt;
use std::time::Duration;

use super::cases::Case;
use super::check::Outcome;

/// How one case ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Line {
    /// The case.
    pub case: &'static Case,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
    /// The seed that repeats it: `CONFORMANCE_SEED`.
    pub seed: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, outcome, took, seed } = self;
        write!(f, "{:4} {:44} ", case.id, case.name)?;
        match outcome {
            Outcome::Passed => write!(f, "passed  {:>6} ms", took.as_millis()),
            Outcome::Skipped(hook) => write!(f, "skipped: the subject offers no {hook:?} hook"),
            Outcome::Failed(violation) => {
                write!(f, "FAILED  {violation}\n     repeat with CONFORMANCE_SEED={seed}")
            }
        }
    }
}

/// How a whole run ended.
#[derive(Debug, Clone)]
pub struct Report {
    subject: &'static str,
    lines: Vec<Line>,
}

impl Report {
    pub(super) fn new(subject: &'static str, lines: Vec<Line>) -> Self {
        Self { subject, lines }
    }

    /// Returns the lines in the order of the list.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Counts passed, failed and skipped cases.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count =
            |wanted: fn(&Outcome) -> bool| self.lines.iter().filter(|line| wanted(&line.outcome)).count();
        (
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(Outcome::is_failure),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        let (passed, failed, skipped) = self.counts();
        write!(f, "{}: {passed} passed, {failed} failed, {skipped} skipped", self.subject)
    }
}
