//! The flat header block: ordered, repeated names allowed, any bytes as values.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::{Error, ErrorKind, Result};

/// Most headers an event may carry.
pub const MAX_HEADERS: usize = 64;
/// Most bytes all names and values may take together.
pub const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Name prefixes that belong to brokers and to this framework; events of users may not carry them.
pub const RESERVED_PREFIXES: [&str; 4] = ["evt-", "nats-", "x-death", "x-opt-"];

/// An ordered list of headers in one block of bytes.
///
/// Names may repeat and values may be empty or binary. Reading borrows from the block; a clone
/// shares it; an empty list allocates nothing.
///
/// ```
/// # use eventbus::Headers;
/// let headers = Headers::new().with("tenant", "a").with("tenant", "b").with("raw", [0, 255]);
/// assert_eq!(headers.get("tenant"), Some(b"a".as_slice()));
/// assert_eq!(headers.all("tenant").count(), 2);
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Headers {
    /// Per entry: name length and value length (u32, little endian), name, value.
    block: Bytes,
}

const LENGTHS: usize = 8;

impl Headers {
    /// Creates an empty list.
    pub const fn new() -> Self {
        Self { block: Bytes::new() }
    }

    /// Appends one header; earlier ones of the same name stay.
    #[must_use]
    pub fn with(self, name: impl AsRef<str>, value: impl AsRef<[u8]>) -> Self {
        let mut block = self.into_block_mut();
        put(&mut block, name.as_ref(), value.as_ref());
        Self { block: block.freeze() }
    }

    /// Builds the list from pairs, in their order, with one allocation.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut block = BytesMut::new();
        for (name, value) in pairs {
            put(&mut block, name, value);
        }
        Self { block: block.freeze() }
    }

    /// Returns the headers in order.
    pub fn iter(&self) -> Iter<'_> {
        Iter { rest: &self.block }
    }

    /// Returns the first value of `name`, compared without regard to ASCII case.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Returns the first value of `name` if it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Returns every value of `name`, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        self.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Returns the list without the headers for which `drop` is true.
    #[must_use]
    pub fn without(&self, drop: impl Fn(&str) -> bool) -> Self {
        if self.iter().any(|(name, _)| drop(name)) {
            Self::from_pairs(self.iter().filter(|(name, _)| !drop(name)))
        } else {
            self.clone()
        }
    }

    /// Returns the number of headers.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Tells whether there is no header.
    pub fn is_empty(&self) -> bool {
        self.block.is_empty()
    }

    /// Returns the bytes of all names and values together.
    pub fn size_bytes(&self) -> usize {
        self.block.len() - self.len() * LENGTHS
    }

    /// Returns the block as it is stored: per entry two little-endian `u32` lengths, name, value.
    pub fn as_block(&self) -> &Bytes {
        &self.block
    }

    /// Takes a stored block back.
    ///
    /// # Errors
    /// [`Undecodable`](ErrorKind::Undecodable) if the lengths do not fit or a name is not UTF-8.
    pub fn from_block(block: Bytes) -> Result<Self> {
        let mut rest: &[u8] = &block;
        while !rest.is_empty() {
            let (name, _, after) = split(rest)
                .ok_or_else(|| Error::new(ErrorKind::Undecodable, "header block ends inside an entry"))?;
            if std::str::from_utf8(name).is_err() {
                return Err(Error::new(ErrorKind::Undecodable, "header name is not UTF-8"));
            }
            rest = after;
        }
        Ok(Self { block })
    }

    /// Checks the bounds: count, bytes, names.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) above [`MAX_HEADERS`] or [`MAX_HEADER_BYTES`];
    /// [`Invalid`](ErrorKind::Invalid) for an empty name, or one with control characters or spaces.
    pub fn check(&self) -> Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let (mut n_headers, mut n_bytes) = (0, 0);
        for (name, value) in self.iter() {
            n_headers += 1;
            n_bytes += name.len() + value.len();
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic() && b != b':') {
                return Err(Error::invalid("header name must be visible ASCII without ':'")
                    .with("name", name.escape_debug()));
            }
        }
        if n_headers > MAX_HEADERS || n_bytes > MAX_HEADER_BYTES {
            return Err(Error::new(ErrorKind::TooLarge, "too many headers or header bytes")
                .with("headers", n_headers)
                .with("max_headers", MAX_HEADERS)
                .with("bytes", n_bytes)
                .with("max_bytes", MAX_HEADER_BYTES));
        }
        Ok(())
    }

    fn into_block_mut(self) -> BytesMut {
        self.block.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]))
    }
}

/// Tells whether a header name belongs to a broker or to the framework.
pub fn is_reserved(name: &str) -> bool {
    RESERVED_PREFIXES
        .iter()
        .any(|prefix| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)))
}

fn put(block: &mut BytesMut, name: &str, value: &[u8]) {
    block.reserve(LENGTHS + name.len() + value.len());
    block.put_u32_le(u32::try_from(name.len()).unwrap_or(u32::MAX));
    block.put_u32_le(u32::try_from(value.len()).unwrap_or(u32::MAX));
    block.put_slice(name.as_bytes());
    block.put_slice(value);
}

fn split(rest: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (lengths, rest) = rest.split_at_checked(LENGTHS)?;
    let (name_len, value_len) = lengths.split_at_checked(4)?;
    let name_len = u32::from_le_bytes(name_len.try_into().ok()?) as usize;
    let value_len = u32::from_le_bytes(value_len.try_into().ok()?) as usize;
    let (name, rest) = rest.split_at_checked(name_len)?;
    let (value, rest) = rest.split_at_checked(value_len)?;
    Some((name, value, rest))
}

/// The headers of a block, in order.
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value, rest) = split(self.rest)?;
        self.rest = rest;
        Some((std::str::from_utf8(name).unwrap_or_default(), value))
    }
}

impl<'a> IntoIterator for &'a Headers {
    type Item = (&'a str, &'a [u8]);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|(name, value)| (name, Bytes::copy_from_slice(value))))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_repeats_empty_and_binary() {
        let headers = Headers::new().with("a", "1").with("b", "").with("a", [0u8, 255]).with("A", "3");
        let read: Vec<_> = headers.iter().map(|(n, v)| (n.to_owned(), v.to_vec())).collect();
        assert_eq!(
            read,
            [
                ("a".into(), b"1".to_vec()),
                ("b".into(), vec![]),
                ("a".into(), vec![0, 255]),
                ("A".into(), b"3".to_vec())
            ]
        );
        assert_eq!(headers.all("a").count(), 3);
        assert_eq!(Headers::from_block(headers.as_block().clone()).unwrap(), headers);
        assert_eq!(headers.without(|name| name == "a").len(), 2);
    }

    #[test]
    fn every_cut_of_a_block_is_an_error() {
        let block = Headers::new().with("name", "value").with("n", "").as_block().clone();
        let whole: Vec<usize> = vec![0, 8 + 9, block.len()];
        for len in 0..=block.len() {
            assert_eq!(Headers::from_block(block.slice(..len)).is_ok(), whole.contains(&len), "{len}");
        }
    }

    #[test]
    fn bounds_are_checked() {
        let many = |n: usize| (0..n).fold(Headers::new(), |headers, at| headers.with(format!("h{at}"), "v"));
        assert!(many(MAX_HEADERS).check().is_ok());
        assert_eq!(many(MAX_HEADERS + 1).check().unwrap_err().kind(), ErrorKind::TooLarge);
        let fits = Headers::new().with("n", vec![7; MAX_HEADER_BYTES - 1]);
        assert!(fits.check().is_ok());
        assert_eq!(
            Headers::new().with("n", vec![7; MAX_HEADER_BYTES]).check().unwrap_err().kind(),
            ErrorKind::TooLarge
        );
        for name in ["", "a b", "a\n", "é", "a:b"] {
            assert_eq!(Headers::new().with(name, "v").check().unwrap_err().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn reserved_names_are_known_in_any_case() {
        for name in ["evt-seq", "EVT-x", "Nats-Msg-Id", "x-death", "x-opt-deaths"] {
            assert!(is_reserved(name), "{name}");
        }
        assert!(!is_reserved("event") && !is_reserved("x-request-id") && !is_reserved("e"));
    }
}
