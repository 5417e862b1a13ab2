//! Addresses of transports: `scheme://place?option=value`, with secrets kept out of every text.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Result};

/// A parsed address. Its `Display` and `Debug` hide the user's password and secret options.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    scheme: String,
    place: String,
    options: Vec<(String, String)>,
}

/// Options whose values are never shown.
const SECRET: [&str; 5] = ["password", "token", "secret", "key", "credentials"];

impl Url {
    /// Parses an address.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming what is missing or malformed, without the text itself.
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            Error::config(
                "a transport's address looks like scheme://place, such as sqlite://shop.db or memory://",
            )
        })?;
        if scheme.is_empty()
            || !scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
        {
            return Err(Error::config(
                "the scheme of an address holds only letters, digits, '+', '-' and '.'",
            ));
        }
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut options = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(|| {
                Error::config("an option of an address is written name=value").with("scheme", scheme)
            })?;
            options.push((decode(name)?, decode(value)?));
        }
        Ok(Self { scheme: scheme.to_ascii_lowercase(), place: decode(place)?, options })
    }

    /// Returns the scheme, in lower case.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Returns what stands between `://` and `?`, with `%xx` decoded.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Returns the options in order, decoded.
    pub fn options(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Reads an option's value as a number.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option.
    pub fn number<T: FromStr>(&self, name: &str, value: &str) -> Result<T> {
        value.parse().map_err(|_| self.bad_option(name, "is not a number in range"))
    }

    /// Reads an option's value as a duration: a whole number with `ms`, `s`, `m`, `h` or `d`.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option.
    pub fn duration(&self, name: &str, value: &str) -> Result<Duration> {
        parse_duration(value)
            .ok_or_else(|| self.bad_option(name, "is not a duration such as 250ms, 30s, 5m, 2h or 7d"))
    }

    /// Reports a value that an option cannot take.
    pub fn bad_option(&self, name: &str, problem: &str) -> Error {
        Error::config(format!("the option {name} {problem}")).with("scheme", &self.scheme)
    }

    /// Reports an option that the transport does not know, with those it knows.
    pub fn unknown_option(&self, name: &str, known: &[&str]) -> Error {
        Error::config(format!("unknown option {}", name.escape_debug()))
            .with("scheme", &self.scheme)
            .with("known", known.join(", "))
    }
}

/// Reads a whole number with a unit: `ms`, `s`, `m`, `h` or `d`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(at);
    let number: u64 = number.parse().ok()?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3_600),
        "d" => seconds(86_400),
        _ => None,
    }
}

fn decode(text: &str) -> Result<String> {
    let bad = || Error::config("a '%' in an address is followed by two hexadecimal digits of UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(bad)?;
        let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

impl FromStr for Url {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme)?;
        match self.place.rsplit_once('@') {
            Some((user, host)) => write!(f, "{}:***@{host}", user.split(':').next().unwrap_or_default())?,
            None => f.write_str(&self.place)?,
        }
        for (at, (name, value)) in self.options.iter().enumerate() {
            let secret = SECRET.iter().any(|word| name.to_ascii_lowercase().contains(word));
            write!(f, "{}{name}={}", if at == 0 { '?' } else { '&' }, if secret { "***" } else { value })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Url({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_decoded() {
        let url = Url::parse("sqlite://a%20b/shop.db?partitions=4&x=%C3%BC").unwrap();
        assert_eq!((url.scheme(), url.place()), ("sqlite", "a b/shop.db"));
        assert_eq!(url.options().collect::<Vec<_>>(), [("partitions", "4"), ("x", "ü")]);
    }

    #[test]
    fn secrets_are_never_shown() {
        let url =
            Url::parse("kafka://me:canary@host:1?sasl.password=canary&acks=all&api_token=canary").unwrap();
        assert!(!format!("{url} {url:?}").contains("canary"));
        assert!(url.to_string().contains("acks=all") && url.to_string().contains("me:***@host:1"));
        for bad in ["canary", "://canary", "a b://canary", "x://y?canary", "x://%zzcanary"] {
            assert!(!Url::parse(bad).unwrap_err().to_string().contains("canary"));
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("7d"), Some(Duration::from_secs(7 * 86_400)));
        for bad in ["", "5", "s", "-1s", "1.5s", "5 s", "99999999999999999999s", "18446744073709551615d"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
