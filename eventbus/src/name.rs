//! Names that are checked once and carried as proof: [`Topic`], [`Group`], and the event's [`Key`].

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};

/// Longest topic name, in bytes; what Kafka's 249 leaves for the suffixes of derived topics.
pub const MAX_TOPIC_BYTES: usize = 200;
/// Longest group name, in bytes.
pub const MAX_GROUP_BYTES: usize = 100;
/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 4096;

fn check(what: &str, name: &str, max: usize) -> Result<()> {
    let bytes = name.as_bytes();
    let problem = match bytes {
        [] => "is empty",
        _ if bytes.len() > max => "is too long",
        [first, ..] if !(first.is_ascii_alphanumeric() || *first == b'_') => {
            "must start with a letter, a digit or an underscore"
        }
        _ if !bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) => {
            "may hold only letters, digits, '.', '_' and '-'"
        }
        _ if name.ends_with('.') || name.contains("..") => "has an empty part between dots",
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("{what} name {problem}"))
        .with("name", name.escape_debug())
        .with("max_bytes", max))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks a name: letters, digits, `.`, `_`, `-`; no empty part; within the length bound.
            ///
            /// # Errors
            /// [`Invalid`](crate::ErrorKind::Invalid) with the rule that the name breaks.
            pub fn new(name: impl AsRef<str>) -> Result<Self> {
                let name = name.as_ref();
                check($what, name, $max)?;
                Ok(Self(name.into()))
            }

            /// Returns the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl FromStr for $type {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::new(name)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name! {
    /// A validated topic name.
    ///
    /// Names are flat: no character is a wildcard or a path on any transport.
    Topic, "topic", MAX_TOPIC_BYTES
}

name! {
    /// A validated consumer group: the name of one service.
    Group, "group", MAX_GROUP_BYTES
}

impl Topic {
    /// Returns the topic that holds this topic's dead letters: `<topic>.dlq`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the derived name is too long.
    pub fn dead_letters(&self) -> Result<Self> {
        Self::new(format!("{self}.dlq"))
    }

    /// Returns the topic that holds the parked events of `group`: `<topic>.<group>.parked`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the derived name is too long.
    pub fn parked(&self, group: &Group) -> Result<Self> {
        Self::new(format!("{self}.{group}.parked"))
    }
}

/// The value that keeps events in order: events with equal keys share a partition and a lane.
///
/// Any bytes, up to [`MAX_KEY_BYTES`]; shown as text where they are UTF-8.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// Takes bytes as a key. The bound is checked when the envelope is published.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// Returns the bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the shared bytes.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        Self(Bytes::from(text))
    }
}

impl From<&String> for Key {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

macro_rules! key_from_display {
    ($($type:ty),*) => {$(
        /// The decimal or canonical text, as other languages would write it.
        impl From<$type> for Key {
            fn from(value: $type) -> Self {
                Self::from(value.to_string())
            }
        }

        /// The decimal or canonical text, as other languages would write it.
        impl From<&$type> for Key {
            fn from(value: &$type) -> Self {
                Self::from(value.to_string())
            }
        }
    )*};
}

key_from_display!(u16, u32, u64, u128, i16, i32, i64, i128, uuid::Uuid);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        let long = "x".repeat(MAX_TOPIC_BYTES + 1);
        for name in [
            "", ".", "..", ".a", "-a", "a..b", "a.", "*", ">", "a.*", "a b", "a/b", "../etc", "a\nb", "a\0",
            "ü", "$JS", "a>", "a#", &long,
        ] {
            assert!(Topic::new(name).is_err(), "{name:?} was accepted");
        }
        for name in ["a", "A.b", "orders", "_evt.audit", "order-status", "a_b.c-d", &long[1..]] {
            assert_eq!(Topic::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn derived_names_follow_the_convention() {
        let orders = Topic::new("orders").unwrap();
        assert_eq!(orders.dead_letters().unwrap().as_str(), "orders.dlq");
        assert_eq!(orders.parked(&Group::new("billing").unwrap()).unwrap().as_str(), "orders.billing.parked");
        assert!(Topic::new("x".repeat(MAX_TOPIC_BYTES)).unwrap().dead_letters().is_err());
    }
}
