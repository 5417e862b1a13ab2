//! Events as messages: CloudEvents in binary mode, as the binding for NATS says.
//!
//! Headers of NATS are text, and the client keeps no order between different names. So attributes are
//! percent-encoded (CloudEvents 1.0.2, NATS binding section 3.1.3.2), and where an event has headers or extensions of
//! its own, one header lists their names in order; those are percent-encoded too.

use std::collections::{HashMap, HashSet};

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;

use crate::cloudevents::{Binding, percent, read, write};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::transport::Content;

// The binding for servers before 2.2, which knew no headers, and the SDK for Go write structured mode without a media type.
const BINDING: Binding = Binding {
    prefix: "ce-",
    content_type: "content-type",
    has_key: false,
    has_absent: false,
    has_bare_events: true,
    taken: &[],
};

/// The names of an event's own headers and extensions, in order.
const ORDER: &str = "evt-order";

/// The attributes that need no place in the order.
const PLAIN: [&str; 10] = [
    "ce-specversion",
    "ce-id",
    "ce-source",
    "ce-type",
    "ce-time",
    "ce-subject",
    "ce-dataschema",
    "ce-dataversion",
    "ce-partitionkey",
    "content-type",
];

/// The headers of an event's message, and the bytes they take on the wire.
///
/// # Errors
/// [`Invalid`](ErrorKind::Invalid) for a media type with control characters.
pub(super) fn headers(event: &Envelope) -> Result<(HeaderMap, usize)> {
    let (mut headers, mut order) = (HeaderMap::new(), String::new());
    // The first and the last line.
    let mut n_bytes = "NATS/1.0\r\n\r\n".len();
    let mut failed = false;
    let mut append =
        |name: &str, value: &str| match (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            (Ok(known), Ok(text)) => {
                n_bytes += name.len() + value.len() + ": \r\n".len();
                headers.append(known, text);
            }
            _ => failed = true,
        };
    write(&BINDING, event, |name, value| {
        // Of an extension of that name its place matters.
        let is_extension = name == "ce-partitionkey" && event.extensions().get("partitionkey").is_some();
        if PLAIN.contains(&name) && !is_extension {
            match std::str::from_utf8(value) {
                // Of media types the binding says that they stay as they are.
                Ok(media) if name == "content-type" && !media.is_empty() && media.trim() == media => {
                    append(name, media);
                }
                _ if name == "content-type" => append("ce-datacontenttype", &percent::value(value)),
                _ => append(name, &percent::value(value)),
            }
        } else {
            let name = percent::name(name);
            if !order.is_empty() {
                order.push(',');
            }
            order.push_str(&name);
            append(&name, &percent::value(value));
        }
    });
    if !order.is_empty() {
        append(ORDER, &order);
    }
    if failed {
        return Err(Error::new(ErrorKind::Invalid, "an attribute cannot be written as a header of NATS"));
    }
    Ok((headers, n_bytes))
}

/// The id under which the server knows a repetition: source and id, which no other pair shares.
pub(super) fn id(event: &Envelope) -> String {
    format!(
        "{} {}",
        percent::value(event.source().as_bytes()),
        percent::value(event.id().to_string().as_bytes())
    )
}

/// Reads what a message holds.
pub(super) fn content(headers: Option<&HeaderMap>, payload: Bytes) -> Content {
    let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
    if let Some(headers) = headers {
        // The last: an extension may have this name too.
        let order = headers.get_last(ORDER).map(|order| order.as_str().split(',').collect::<Vec<_>>());
        let order = order.unwrap_or_default();
        let ordered: HashSet<&str> = order.iter().copied().collect();
        let mut own: HashMap<&str, std::vec::IntoIter<&HeaderValue>> = HashMap::new();
        let mut rest: Vec<(&str, &HeaderValue)> = Vec::new();
        for (name, values) in headers.iter() {
            let name: &str = name.as_ref();
            if ordered.contains(name) {
                own.insert(name, values.iter().collect::<Vec<_>>().into_iter());
            } else if name != ORDER {
                rest.extend(values.iter().map(|value| (name, value)));
            }
        }
        // The client's order between names is none: this one is the same each time.
        rest.sort_by_key(|(name, _)| *name);
        for (name, value) in rest {
            let is_attribute = name.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("ce-"))
                || name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("evt-"));
            let value = value.as_str();
            pairs.push((name.to_owned(), if is_attribute { percent::decoded(value) } else { value.into() }));
        }
        for name in order {
            let Some(value) = own.get_mut(name).and_then(Iterator::next) else { continue };
            let known = String::from_utf8_lossy(&percent::decoded(name)).into_owned();
            pairs.push((known, percent::decoded(value.as_str())));
        }
    }
    read(&BINDING, pairs.iter().map(|(name, value)| (name.as_str(), value.as_slice())), None, Some(payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Key;

    #[test]
    fn everything_survives_the_way_there_and_back() {
        let full = Envelope::new("shop.paid", "/shop")
            .with_version(3)
            .with_subject("o-7 ü \"100%\"")
            .with_content_type("application/json; charset=utf-8")
            .with_key(Key::new(&b"\0\xff, key"[..]))
            .with_extension("correlationid", "c d")
            .with_extension("abc", "1")
            .with_extension("evt-attempt", "2")
            .with_extension("evt-order", "a, b")
            .with_header("zeta", "1")
            .with_header("Alpha", "2 %41")
            .with_header("zeta", "")
            .with_header("ce-id", "spoof")
            .with_header("%41lpha", "all")
            .with_header("a,b:c ü", "\r\nX: y")
            .with_header("binary", [0, 255, 128])
            .with_payload("");
        for event in [full.clone(), full.clone().without_payload(), full.without_key()] {
            let (headers, n_bytes) = headers(&event).unwrap();
            assert!(n_bytes > 100);
            let found = content(Some(&headers), event.payload().cloned().unwrap_or_default());
            assert_eq!(found.envelope(), Some(&event));
        }
    }

    #[test]
    fn foreign_headers_stay_as_they_are() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "1"),
            ("ce-source", "/s%20p"),
            ("ce-type", "100%"),
            ("tenant", "a%20b"),
        ] {
            headers.append(name, value);
        }
        let found = content(Some(&headers), Bytes::from_static(b"x"));
        let event = found.envelope().unwrap();
        assert_eq!((event.source(), event.event_type()), ("/s p", "100%"));
        assert_eq!(event.headers().get_str("tenant"), Some("a%20b"));
        assert!(content(None, Bytes::from_static(b"raw")).envelope().is_none());
    }
}
