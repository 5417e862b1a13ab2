//! What a handler reports when it did not succeed: a class, a stable code, words.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use crate::error::{Class, Error};

/// Why a handler did not handle.
///
/// `?` turns errors into failures by their type: an [`Error`] of the bus by its class, an
/// `std::io::Error` as transient unless it says otherwise, a `serde_json::Error` as poison, an `sqlx::Error`
/// (feature `sqlx`) by its code, anything else as transient. It is no `std::error::Error` itself, so that this conversion can exist.
#[derive(Clone)]
pub struct Failure {
    class: Class,
    code: Cow<'static, str>,
    message: String,
    error_type: Cow<'static, str>,
    retry_after: Option<Duration>,
    by_panic: bool,
}

impl Failure {
    fn new(class: Class, code: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        Self {
            class,
            code: code.into(),
            message: message.to_string(),
            error_type: "".into(),
            retry_after: None,
            by_panic: false,
        }
    }

    /// It may succeed later: retried with backoff, then dead-lettered.
    pub fn transient(code: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        Self::new(Class::Transient, code, message)
    }

    /// It never will: dead-lettered at once.
    pub fn permanent(code: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        Self::new(Class::Permanent, code, message)
    }

    /// The message itself cannot be understood: dead-lettered at once.
    pub fn poison(code: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        Self::new(Class::Poison, code, message)
    }

    /// Asks for the next attempt not before a delay, instead of the policy's backoff.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// A handler that panicked: likely the event or the code, so it is retried and counted.
    pub(crate) fn panic(message: impl fmt::Display) -> Self {
        Self { by_panic: true, ..Self::transient("panic", message) }
    }

    /// Whether it may be what every event needs that failed, and not this event.
    pub(crate) fn is_of_a_dependency(&self) -> bool {
        self.class == Class::Transient && !self.by_panic && self.retry_after.is_none()
    }

    /// Whether another run at once is worth it.
    pub(crate) fn may_pass_at_once(&self) -> bool {
        self.class == Class::Transient && self.retry_after.is_none()
    }

    /// Returns how the failure is treated.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Returns the stable code, such as `payment.timeout`.
    pub fn code(&self) -> &str {
        &self.code
    }

    /// Returns the words, without payload.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the Rust type of the error this came from; empty if there was none.
    pub fn error_type(&self) -> &str {
        &self.error_type
    }

    /// Returns the delay that was asked for.
    pub fn delay(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let any: &(dyn std::error::Error + 'static) = &error;
        let (class, code) = if let Some(bus) = any.downcast_ref::<Error>() {
            (bus.kind().class(), format!("bus.{}", bus.kind()).replace(' ', "_").into())
        } else if let Some(meant) = of_database(any) {
            meant
        } else if let Some(json) = any.downcast_ref::<serde_json::Error>() {
            (if json.is_io() { Class::Transient } else { Class::Poison }, Cow::Borrowed("json"))
        } else if let Some(io) = any.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind as Io;
            let permanent = matches!(
                io.kind(),
                Io::NotFound | Io::PermissionDenied | Io::InvalidInput | Io::InvalidData | Io::Unsupported
            );
            (if permanent { Class::Permanent } else { Class::Transient }, Cow::Borrowed("io"))
        } else {
            (Class::Transient, Cow::Borrowed("error"))
        };
        Self {
            class,
            code,
            message: error.to_string(),
            error_type: std::any::type_name::<E>().into(),
            retry_after: None,
            by_panic: false,
        }
    }
}

/// What an error of a database means for a handler. A row that is not there may come yet.
#[cfg(feature = "sqlx")]
fn of_database(error: &(dyn std::error::Error + 'static)) -> Option<(Class, Cow<'static, str>)> {
    let error = error.downcast_ref::<sqlx::Error>()?;
    let (kind, _) = crate::sql::meaning(error);
    let class = if matches!(error, sqlx::Error::RowNotFound) { Class::Transient } else { kind.class() };
    Some((class, format!("sql.{kind}").replace(' ', "_").into()))
}

#[cfg(not(feature = "sqlx"))]
fn of_database(_: &(dyn std::error::Error + 'static)) -> Option<(Class, Cow<'static, str>)> {
    None
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}: {}", self.class, self.code, self.message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn errors_are_classed_by_type() {
        let of = |error: Error| Failure::from(error).class();
        assert_eq!(of(Error::new(ErrorKind::Full, "x")), Class::Transient);
        assert_eq!(of(Error::new(ErrorKind::TooLarge, "x")), Class::Permanent);
        assert_eq!(of(Error::new(ErrorKind::Undecodable, "x")), Class::Poison);
        assert_eq!(Failure::from(serde_json::from_str::<u8>("x").unwrap_err()).class(), Class::Poison);
        assert_eq!(
            Failure::from(std::io::Error::from(std::io::ErrorKind::TimedOut)).class(),
            Class::Transient
        );
        assert_eq!(Failure::from(std::fmt::Error).class(), Class::Transient);
        #[cfg(feature = "sqlx")]
        for (error, class) in [
            (sqlx::Error::RowNotFound, Class::Transient),
            (sqlx::Error::PoolTimedOut, Class::Transient),
            (sqlx::Error::ColumnNotFound("x".into()), Class::Permanent),
        ] {
            assert_eq!(Failure::from(error).class(), class);
        }
    }
}
