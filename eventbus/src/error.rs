//! The one error of the public API: a kind for the program, words for the person, the source kept.

use std::error::Error as StdError;
use std::fmt;

use crate::admin::Offset;

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for a program to match on.
///
/// Each kind has one [`Class`], so that whether to retry never depends on a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The store or broker cannot be reached, or is busy. Retrying helps.
    Unavailable,
    /// There is no room now: a bound, a quota or a full disk. Nothing was accepted. Retrying helps.
    Full,
    /// A deadline passed and nothing had been sent. Retrying helps.
    Timeout,
    /// The outcome is not known: it may have happened. Repeat with the same id until it is confirmed.
    Unknown,
    /// A URL, option or combination of options is wrong.
    Config,
    /// The transport does not claim this capability; nothing was attempted.
    Unsupported,
    /// The named topic, group, record or file does not exist.
    NotFound,
    /// What exists differs from what was asked for, such as another partition count.
    Conflict,
    /// Above the limit of the transport, headers counted. Refused before any input or output.
    TooLarge,
    /// A name, key or header that is not allowed.
    Invalid,
    /// Credentials or rights are missing.
    Unauthorized,
    /// This value was closed.
    Closed,
    /// The delivery is no longer ours: its lease ended, or its partition moved.
    LeaseLost,
    /// Events between `expected` and `first` were removed before they were read.
    DataLoss {
        /// The offset that was due.
        expected: Offset,
        /// The first offset that still exists.
        first: Offset,
    },
    /// The bytes are not what the codec or the envelope rules expect.
    Undecodable,
    /// The type or version is not one that this program knows.
    UnknownType,
    /// The store is damaged; nothing was skipped.
    Corrupt,
    /// The handler, or what it called, failed in a way that a repetition will not mend.
    Failed,
    /// A state that should not occur; the message says what was seen.
    Unexpected,
}

/// How a failure is treated: again, never again, or never and look at the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// It may pass: try again, later.
    Transient,
    /// Repeating gives the same answer.
    Permanent,
    /// The message itself cannot be understood.
    Poison,
}

impl ErrorKind {
    /// Returns the class that decides whether to retry.
    pub fn class(self) -> Class {
        match self {
            Self::Unavailable | Self::Full | Self::Timeout | Self::Unknown => Class::Transient,
            Self::Undecodable | Self::UnknownType => Class::Poison,
            _ => Class::Permanent,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Full => "full",
            Self::Timeout => "timeout",
            Self::Unknown => "outcome unknown",
            Self::Config => "configuration",
            Self::Unsupported => "unsupported",
            Self::NotFound => "not found",
            Self::Conflict => "conflict",
            Self::TooLarge => "too large",
            Self::Invalid => "invalid",
            Self::Unauthorized => "unauthorized",
            Self::Closed => "closed",
            Self::LeaseLost => "lease lost",
            Self::DataLoss { .. } => "data loss",
            Self::Undecodable => "undecodable",
            Self::UnknownType => "unknown type",
            Self::Corrupt => "corrupt",
            Self::Failed => "failed",
            Self::Unexpected => "unexpected",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error of the bus: a kind, a message, named context and the source.
///
/// Messages never hold a payload or a secret. The value is one pointer wide.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Creates an error of `kind`; `message` is a lowercase fragment without a final period.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), context: Vec::new(), source: None }))
    }

    /// Adds a named value that helps a person find the place, such as the topic.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((name, value.to_string()));
        self
    }

    /// Keeps the error that caused this one.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Returns what went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the message alone, without kind, context and source.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the named values, in the order they were added.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// Tells whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.class() == Class::Transient
    }

    /// Tells whether the effect may have happened: resend under the same id.
    pub fn is_unknown(&self) -> bool {
        self.0.kind == ErrorKind::Unknown
    }

    /// Returns a copy for another item of the same batch; the source is kept as text.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let inner = &self.0;
        Self(Box::new(Inner {
            kind: inner.kind,
            message: inner.message.clone(),
            context: inner.context.clone(),
            source: inner.source.as_ref().map(|source| source.to_string().into()),
        }))
    }
}

/// Shorthands for the kinds that many modules report.
impl Error {
    pub(crate) fn closed(what: &str) -> Self {
        Self::new(ErrorKind::Closed, format!("the {what} is closed"))
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.kind, self.0.message)?;
        if let ErrorKind::DataLoss { expected, first } = self.0.kind {
            write!(f, " (expected {expected}, first {first})")?;
        }
        for (at, (name, value)) in self.0.context.iter().enumerate() {
            f.write_str(if at == 0 { " [" } else { ", " })?;
            write!(f, "{name}={value}")?;
        }
        if !self.0.context.is_empty() {
            f.write_str("]")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({self})")
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_kind_message_context_and_source() {
        let error = Error::new(ErrorKind::Full, "no room for the batch")
            .with("topic", "orders")
            .with("events", 3)
            .caused_by(std::io::Error::other("disk"));
        assert_eq!(error.to_string(), "full: no room for the batch [topic=orders, events=3]: disk");
        assert!(error.is_retryable());
        assert_eq!(error.duplicate().to_string(), error.to_string());
    }

    #[test]
    fn unknown_is_neither_success_nor_permanent() {
        let error = Error::new(ErrorKind::Unknown, "no answer");
        assert!(error.is_unknown() && error.is_retryable());
        assert_eq!(ErrorKind::Undecodable.class(), Class::Poison);
        assert_eq!(ErrorKind::TooLarge.class(), Class::Permanent);
    }
}
