//! Where the tables are: a schema of PostgreSQL, a prefix in SQLite.

use std::fmt;
use std::sync::Arc;

use eventbus::{Error, ErrorKind, Result};

/// Longest name, in bytes: PostgreSQL cuts names at 63, and ours follow.
const MAX_BYTES: usize = 40;

/// The name of a schema (PostgreSQL) or the prefix of tables (SQLite): several services can share one database.
///
/// Lower-case letters, digits and `_`, not beginning with a digit, at most 40 bytes. The default is `evt`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Namespace(Arc<str>);

impl Namespace {
    /// Checks a name.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) for any other name: it becomes part of statements.
    pub fn new(name: &str) -> Result<Self> {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let rest = bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if first && rest && name.len() <= MAX_BYTES && !name.starts_with("pg_") {
            return Ok(Self(name.into()));
        }
        Err(Error::new(
            ErrorKind::Invalid,
            "a namespace is 1 to 40 of a-z, 0-9 and _, and begins with neither a digit nor pg_",
        )
        .with("name", name.escape_debug()))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The statement for these tables; `text` is written for those of the default name, before a `separator`.
    pub(crate) fn sql(&self, text: &str, separator: char) -> Arc<str> {
        text.replace(&format!("evt{separator}"), &format!("{}{separator}", self.0))
            .replace("SCHEMA IF NOT EXISTS evt;", &format!("SCHEMA IF NOT EXISTS {};", self.0))
            .into()
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self("evt".into())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_change_a_statement_are_refused() {
        for name in ["", "Evt", "1a", "a-b", "a;b", "a b", "é", "pg_x", "a.b", &"a".repeat(41)] {
            assert_eq!(Namespace::new(name).unwrap_err().kind(), ErrorKind::Invalid, "{name}");
        }
        for name in ["evt", "_x", "shop_7", &"a".repeat(40)] {
            assert_eq!(Namespace::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn statements_name_the_chosen_tables() {
        let shop = Namespace::new("shop").unwrap();
        assert_eq!(&*shop.sql("SELECT * FROM evt.outbox", '.'), "SELECT * FROM shop.outbox");
        assert_eq!(&*shop.sql("DELETE FROM evt_inbox", '_'), "DELETE FROM shop_inbox");
    }
}
