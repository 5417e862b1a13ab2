//! Events as messages: CloudEvents in binary mode, as the binding for RabbitMQ says (headers `ce-…`, the media type as a
//! property).
//!
//! A table of headers has no order and no repeated names, and some names mean something to the broker. So one header
//! lists the names of an event's own headers and extensions in order, and what cannot stand under its name (again,
//! longer than a name may be, `CC` and `BCC`, which route, `x-…`) stands under its place in that list.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::cloudevents::{Binding, percent, read, write};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::transport::Content;
use crate::transport::kit::leased::Stored;

const BINDING: Binding = Binding {
    prefix: "ce-",
    content_type: "content-type",
    has_key: false,
    has_absent: false,
    has_bare_events: false,
    taken: &[],
};

/// The names of an event's own headers and extensions, in order.
const ORDER: &str = "evt-order";
/// Before the place in that list of what does not stand under its name.
const NTH: &str = "evt-nth.";
/// When it was published, in milliseconds: the name under which brokers that stamp messages do it.
const TIME: &str = "timestamp_in_ms";
/// Where a message of a stream stands.
const OFFSET: &str = "x-stream-offset";
/// The first message of each partition, which is no event: so that a partition is never empty, and its end can be found.
const BIRTH: &str = "evt-birth";

/// The longest name of a header that is written as it is.
const MAX_NAME: usize = 200;
/// What a frame of headers may take: the least that a server must accept (AMQP 0-9-1, 4.2.3) is less, but RabbitMQ's
/// is 128 KiB unless it is set lower.
const MAX_HEADERS: usize = 96 << 10;

/// The attributes that need no place in the order.
const PLAIN: [&str; 9] = [
    "ce-specversion",
    "ce-id",
    "ce-source",
    "ce-type",
    "ce-time",
    "ce-subject",
    "ce-dataschema",
    "ce-dataversion",
    "ce-partitionkey",
];

fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// Whether a header may stand under this name.
fn is_free(name: &str) -> bool {
    let begins =
        |prefix: &str| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    name.len() <= MAX_NAME
        && !matches!(name, "CC" | "BCC" | TIME | ORDER | BIRTH)
        && !begins("x-")
        && !name.starts_with(NTH)
}

/// The properties of an event's message that is published at a time.
///
/// # Errors
/// [`TooLarge`](ErrorKind::TooLarge) for attributes and headers above what a frame holds.
pub(super) fn properties(event: &Envelope, now: SystemTime) -> Result<BasicProperties> {
    let (mut table, mut order, mut used) = (FieldTable::default(), String::new(), HashSet::new());
    let (mut media, mut n_own, mut n_bytes) = (None, 0_usize, 0_usize);
    let mut put = |name: &str, value: &[u8]| {
        n_bytes += name.len() + value.len() + 8;
        if let Some(name) = short(name) {
            table.insert(name, AMQPValue::LongString(value.into()));
        }
    };
    write(&BINDING, event, |name, value| {
        if name == BINDING.content_type {
            media = std::str::from_utf8(value).ok().and_then(short);
            if media.is_none() {
                put("ce-datacontenttype", value);
            }
            return;
        }
        // Of an extension of that name its place matters.
        let is_extension = name == "ce-partitionkey" && event.extensions().get("partitionkey").is_some();
        if PLAIN.contains(&name) && !is_extension {
            return put(name, value);
        }
        if !order.is_empty() {
            order.push(',');
        }
        order.push_str(&percent::name(name));
        if is_free(name) && used.insert(name.to_owned()) {
            put(name, value);
        } else {
            put(&format!("{NTH}{n_own}"), value);
        }
        n_own += 1;
    });
    if !order.is_empty() {
        put(ORDER, order.as_bytes());
    }
    if n_bytes > MAX_HEADERS {
        return Err(Error::new(ErrorKind::TooLarge, "attributes and headers are above what a frame holds")
            .with("bytes", n_bytes)
            .with("max", MAX_HEADERS));
    }
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    table.insert(TIME.into(), AMQPValue::LongLongInt(i64::try_from(now.as_millis()).unwrap_or(i64::MAX)));
    let mut properties =
        BasicProperties::default().with_delivery_mode(2).with_timestamp(now.as_secs()).with_headers(table);
    if let Some(media) = media {
        properties = properties.with_content_type(media);
    }
    if let Some(id) = short(&event.id().to_string()) {
        properties = properties.with_message_id(id);
    }
    Ok(properties)
}

/// The properties of the message with which a partition begins.
pub(super) fn birth() -> BasicProperties {
    let mut table = FieldTable::default();
    table.insert(BIRTH.into(), AMQPValue::LongString("1".into()));
    BasicProperties::default().with_delivery_mode(2).with_headers(table)
}

/// Where a message of a stream stands.
pub(super) fn offset(message: &Delivery) -> Option<u64> {
    match message.properties.headers().as_ref()?.inner().get(OFFSET)? {
        AMQPValue::LongLongInt(offset) => u64::try_from(*offset).ok(),
        _ => None,
    }
}

/// What a header says, as text or bytes: foreign programs write values of other types too.
fn bytes_of(value: &AMQPValue) -> Option<Vec<u8>> {
    Some(match value {
        AMQPValue::LongString(text) => text.as_bytes().to_vec(),
        AMQPValue::ShortString(text) => text.as_str().as_bytes().to_vec(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().to_vec(),
        AMQPValue::Boolean(known) => known.to_string().into_bytes(),
        AMQPValue::ShortShortInt(number) => number.to_string().into_bytes(),
        AMQPValue::ShortShortUInt(number) => number.to_string().into_bytes(),
        AMQPValue::ShortInt(number) => number.to_string().into_bytes(),
        AMQPValue::ShortUInt(number) => number.to_string().into_bytes(),
        AMQPValue::LongInt(number) => number.to_string().into_bytes(),
        AMQPValue::LongUInt(number) => number.to_string().into_bytes(),
        AMQPValue::LongLongInt(number) => number.to_string().into_bytes(),
        AMQPValue::Float(number) => number.to_string().into_bytes(),
        AMQPValue::Double(number) => number.to_string().into_bytes(),
        AMQPValue::Timestamp(seconds) => {
            crate::time::to_rfc3339(UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))?).into_bytes()
        }
        AMQPValue::Void => Vec::new(),
        nested => serde_json::to_vec(nested).ok()?,
    })
}

/// What a header of this name says. Clients of AMQP 1.0 may write a time in its milliseconds.
fn header_value(name: &str, value: &AMQPValue) -> Option<Vec<u8>> {
    let is_time = |name: &str| {
        ["cloudEvents_time", "cloudEvents:time"].iter().any(|known| known.eq_ignore_ascii_case(name))
    };
    let time = match value {
        AMQPValue::LongLongInt(millis) if is_time(name) => u64::try_from(*millis)
            .ok()
            .and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis))),
        _ => None,
    };
    time.map(|time| crate::time::to_rfc3339(time).into_bytes()).or_else(|| bytes_of(value))
}

/// When a message says that it was published.
fn published_at(properties: &BasicProperties) -> Option<SystemTime> {
    let stamped = properties.headers().as_ref().and_then(|headers| headers.inner().get(TIME));
    let since = match stamped {
        Some(AMQPValue::LongLongInt(millis)) => Duration::from_millis(u64::try_from(*millis).ok()?),
        _ => Duration::from_secs((*properties.timestamp())?),
    };
    UNIX_EPOCH.checked_add(since)
}

/// An event as it is stored; `None` for what is none. Its time is never before `not_before`: clocks of publishers differ.
pub(super) fn stored(message: Delivery, offset: u64, not_before: SystemTime) -> Option<Stored> {
    let Delivery { properties, data, .. } = message;
    if properties.headers().as_ref().is_some_and(|headers| headers.contains_key(BIRTH)) {
        return None;
    }
    let stored_at = published_at(&properties).unwrap_or(not_before).max(not_before);
    Some(Stored { offset, stored_at, content: content(&properties, Bytes::from(data)) })
}

fn content(properties: &BasicProperties, payload: Bytes) -> Content {
    let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
    if let Some(media) = properties.content_type() {
        pairs.push((BINDING.content_type.to_owned(), media.as_str().as_bytes().to_vec()));
    }
    if let Some(table) = properties.headers() {
        let table = table.inner();
        let order = table.get(ORDER).and_then(bytes_of).and_then(|order| String::from_utf8(order).ok());
        let order: Vec<String> = order
            .iter()
            .flat_map(|order| order.split(','))
            .map(|name| String::from_utf8_lossy(&percent::decoded(name)).into_owned())
            .collect();
        let own: HashSet<&str> = order.iter().map(String::as_str).collect();
        for (name, value) in table {
            let name = name.as_str();
            let is_ours = matches!(name, ORDER | TIME | OFFSET) || name.starts_with(NTH) && !order.is_empty();
            if !is_ours && !own.contains(name) {
                pairs.extend(header_value(name, value).map(|value| (name.to_owned(), value)));
            }
        }
        for (at, name) in order.iter().enumerate() {
            let value = table.get(format!("{NTH}{at}").as_str()).or_else(|| table.get(name.as_str()));
            pairs.extend(value.and_then(bytes_of).map(|value| (name.clone(), value)));
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
            .with_header("CC", "other")
            .with_header("BCC", "other")
            .with_header("x-stream-offset", "7")
            .with_header("timestamp_in_ms", "7")
            .with_header("a".repeat(300), "long")
            .with_header("a,b:c ü", "\r\nX: y")
            .with_header("binary", [0, 255, 128])
            .with_payload("");
        let long = "a/".repeat(300);
        for event in [
            full.clone(),
            full.clone().without_payload(),
            full.clone().with_content_type(long),
            full.without_key(),
        ] {
            let properties = properties(&event, SystemTime::now()).unwrap();
            let table = properties.headers().clone().unwrap();
            assert!(!table.contains_key("CC") && !table.contains_key("BCC") && !table.contains_key(OFFSET));
            let found = content(&properties, event.payload().cloned().unwrap_or_default());
            assert_eq!(found.envelope(), Some(&event));
        }
        let large = Envelope::new("t", "/s").with_subject("s".repeat(100 << 10));
        assert_eq!(properties(&large, SystemTime::now()).unwrap_err().kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn times_of_amqp_1_0_are_milliseconds() {
        let time = |value| header_value("cloudevents_Time", &AMQPValue::LongLongInt(value)).unwrap();
        assert_eq!(time(1_767_323_045_678), b"2026-01-02T03:04:05.678Z");
        // One that we cannot say is told as it came.
        assert_eq!(time(-1), b"-1");
        assert_eq!(header_value("tenant", &AMQPValue::LongLongInt(7)).unwrap(), b"7");
    }

    #[test]
    fn values_of_other_types_are_text() {
        let mut table = FieldTable::default();
        for (name, value) in
            [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")]
        {
            table.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        table.insert("ce-dataversion".into(), AMQPValue::LongInt(3));
        table.insert("is".into(), AMQPValue::Boolean(true));
        let properties = BasicProperties::default().with_headers(table).with_timestamp(7);
        let found = content(&properties, Bytes::from_static(b"x"));
        let event = found.envelope().unwrap();
        assert_eq!((event.version(), event.headers().get_str("is")), (Some(3), Some("true")));
        assert_eq!(published_at(&properties), UNIX_EPOCH.checked_add(Duration::from_secs(7)));
        assert!(content(&BasicProperties::default(), Bytes::from_static(b"raw")).envelope().is_none());
    }
}
