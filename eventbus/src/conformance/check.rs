//! How a case says what it saw.

use std::fmt;

use super::cases::Hook;
use crate::error::Error;

/// What a transport did that the contract forbids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(String);

impl Violation {
    /// Says what was seen.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An error where the case expected success.
impl From<Error> for Violation {
    fn from(error: Error) -> Self {
        Self(format!("unexpected error: {error}"))
    }
}

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The contract held.
    Passed,
    /// It did not.
    Failed(Violation),
    /// The subject does not offer this hook.
    Skipped(Hook),
}

impl Outcome {
    /// Tells whether the contract was broken.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

/// Ends the case with a violation unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::conformance::Violation::new(format!($($text)+)));
        }
    };
}

/// Ends the case unless both sides are equal.
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($text:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            return Err($crate::conformance::Violation::new(format!("{}: {left:?} != {right:?}", format!($($text)+))));
        }
    }};
}

pub(crate) use {ensure, ensure_eq};
