//! Whether a broker is set up so that what this framework promises holds.

use std::fmt;

/// One setting or fact of a broker, and what it means. Made by [`Admin::probes`](crate::Admin::probes).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// What was looked at: `append-only file`.
    pub name: String,
    /// What it means.
    pub verdict: Verdict,
    /// What was found, for a person.
    pub detail: String,
    /// What to do about it; empty where nothing is to be done.
    pub hint: &'static str,
}

/// What a probe means for the promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Verdict {
    /// They hold.
    Good,
    /// They hold less than one may think, or nobody can tell.
    Doubtful,
    /// They do not hold.
    Bad,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "ok",
            Self::Doubtful => "WARNING",
            Self::Bad => "FAILED",
        })
    }
}

impl Probe {
    /// Something that is as it should be.
    pub fn good(name: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { name: name.into(), verdict: Verdict::Good, detail: detail.to_string(), hint: "" }
    }

    /// Makes it one that is doubtful, with what to do.
    #[must_use]
    pub fn or_doubtful(self, is_good: bool, hint: &'static str) -> Self {
        self.or(is_good, Verdict::Doubtful, hint)
    }

    /// Makes it one that is bad, with what to do.
    #[must_use]
    pub fn or_bad(self, is_good: bool, hint: &'static str) -> Self {
        self.or(is_good, Verdict::Bad, hint)
    }

    /// Says what may be done although it is as it should be.
    #[must_use]
    pub fn with_hint(self, hint: &'static str) -> Self {
        Self { hint, ..self }
    }

    fn or(self, is_good: bool, verdict: Verdict, hint: &'static str) -> Self {
        if is_good { self } else { Self { verdict: self.verdict.max(verdict), hint, ..self } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_verdict_stays() {
        let probe = Probe::good("a", 1).or_bad(false, "mend it").or_doubtful(true, "look");
        assert_eq!((probe.verdict, probe.hint), (Verdict::Bad, "mend it"));
        assert_eq!(Probe::good("a", 1).or_doubtful(true, "look"), Probe::good("a", "1"));
        assert_eq!(format!("{} {} {}", Verdict::Good, Verdict::Doubtful, Verdict::Bad), "ok WARNING FAILED");
    }
}
