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

/// The parts of an address of servers. It has no `Debug`: a password is in it.
#[derive(Clone)]
#[non_exhaustive]
pub struct Authority<'a> {
    /// Who connects.
    pub user: Option<&'a str>,
    /// With what.
    pub password: Option<&'a str>,
    /// Names or numbers, with ports; at least one.
    pub hosts: Vec<(&'a str, u16)>,
    /// What follows the first `/`, without it.
    pub path: &'a str,
}

impl Authority<'_> {
    /// Tells whether every host is this machine by its loopback address or name.
    pub fn is_loopback(&self) -> bool {
        let loops = |host: &str| {
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        };
        self.hosts.iter().all(|(host, _)| loops(host))
    }
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

    /// Reads an option's value as one of a few words; returns which.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) naming the option and the words.
    pub fn choice(&self, name: &str, value: &str, words: &[&str]) -> Result<usize> {
        words.iter().position(|word| *word == value).ok_or_else(|| {
            self.bad_option(name, "has another value than these").with("values", words.join(", "))
        })
    }

    /// Reads the place as `user:password@host:port,host:port/path`, each part but a host optional.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) if there is no host, or a port is not one.
    pub fn authority(&self, default_port: u16) -> Result<Authority<'_>> {
        let (user, rest) = match self.place.rsplit_once('@') {
            Some((user, rest)) => (Some(user), rest),
            None => (None, self.place.as_str()),
        };
        let (user, password) = match user.map(|user| user.split_once(':').unwrap_or((user, ""))) {
            Some((user, password)) => (Some(user), Some(password)),
            None => (None, None),
        };
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let hosts: Result<Vec<_>> = hosts.split(',').map(|host| self.host(host, default_port)).collect();
        let (user, password) =
            (user.filter(|text| !text.is_empty()), password.filter(|text| !text.is_empty()));
        Ok(Authority { user, password, hosts: hosts?, path })
    }

    fn host<'a>(&self, text: &'a str, default_port: u16) -> Result<(&'a str, u16)> {
        let bad = || {
            Error::config("a host of an address is written name, name:port or [IPv6]:port")
                .with("scheme", &self.scheme)
        };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(bad)?;
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(bad)?) })
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        if host.is_empty() {
            return Err(bad());
        }
        let port = port.map_or(Ok(default_port), |port| port.parse().map_err(|_| bad()))?;
        Ok((host, port))
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
    fn servers_have_parts() {
        let url = Url::parse("x://me:p%40ss:w@a:1,[::1]:2,c/v%2Fhost").unwrap();
        let place = url.authority(9).unwrap();
        assert_eq!((place.user, place.password), (Some("me"), Some("p@ss:w")));
        assert_eq!((place.hosts.clone(), place.path), (vec![("a", 1), ("::1", 2), ("c", 9)], "v/host"));
        assert!(!place.is_loopback());
        for local in ["x://127.0.0.1", "x://localhost:5,[::1]/db", "x://:pw@127.0.0.9"] {
            assert!(Url::parse(local).unwrap().authority(1).unwrap().is_loopback(), "{local}");
        }
        for bad in ["x://", "x://:5", "x://a:b", "x://a:99999", "x://[::1", "x://a,,b", "x://me@"] {
            assert!(Url::parse(bad).unwrap().authority(1).is_err(), "{bad}");
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
