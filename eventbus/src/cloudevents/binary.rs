//! Binary mode: attributes as headers, the body as it is.
//!
//! What a broker's own form cannot hold is kept in marks of ours, so that an event survives any way there and
//! back: a header of a user that is named like an attribute becomes `evt-header-…`; where a broker has no place for
//! a key it is the attribute `partitionkey`; where an absent body looks like an empty one it is marked.

use std::borrow::Cow;

use bytes::Bytes;

use crate::envelope::Envelope;
use crate::header::Headers;
use crate::id::EventId;
use crate::name::Key;
use crate::time::{from_rfc3339, to_rfc3339};
use crate::transport::{Content, Undecodable};

/// How one broker's binding names things.
#[derive(Debug)]
pub(crate) struct Binding {
    /// Before the names of attributes.
    pub(crate) prefix: &'static str,
    /// The header of the media type.
    pub(crate) content_type: &'static str,
    /// Whether the key has a place of its own; otherwise it is an attribute.
    pub(crate) has_key: bool,
    /// Whether an absent body differs from an empty one; otherwise it is marked.
    pub(crate) has_absent: bool,
    /// Whether structured mode needs no media type: a body that is an event, with neither
    /// attributes nor a media type beside it, is one.
    pub(crate) has_bare_events: bool,
    /// Further names that a user's header must not have there.
    pub(crate) taken: &'static [&'static str],
}

/// A header of a user under a name that means something else on the wire.
const ESCAPED: &str = "evt-header-";
/// The key, where the attribute of that name is an extension of the producer's.
const KEY: &str = "evt-key";
/// There is no key, though there is an extension named as one.
const NO_KEY: &str = "evt-nokey";
/// The body is absent, not empty.
const NO_DATA: &str = "evt-nodata";
const PARTITION_KEY: &str = "partitionkey";

impl Binding {
    /// Whether a user's header of this name would be taken for something else.
    fn is_taken(&self, name: &str) -> bool {
        // Every form that a reader takes for an attribute, whatever the binding writes.
        let attribute = ["ce_", "ce-", "cloudevents_", "cloudevents:"];
        let starts =
            |prefix: &str| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
        attribute.into_iter().any(starts)
            || name.eq_ignore_ascii_case("content-type")
            || self.taken.iter().any(|taken| name.eq_ignore_ascii_case(taken))
    }

    /// The attribute that a header names.
    fn attribute<'a>(&self, name: &'a str) -> Option<&'a str> {
        let rest = |prefix: &str| {
            let (start, rest) = name.split_at_checked(prefix.len())?;
            start.eq_ignore_ascii_case(prefix).then_some(rest)
        };
        if self.prefix == "ce-" {
            // The forms of the bindings for AMQP 1.0 are read too.
            return rest("ce-").or_else(|| rest("cloudEvents_")).or_else(|| rest("cloudEvents:"));
        }
        rest(self.prefix)
    }
}

/// Writes everything but body and (where it has its place) key as headers, in an order that reading restores.
pub(crate) fn write(binding: &Binding, event: &Envelope, mut put: impl FnMut(&str, &[u8])) {
    let mut name = String::with_capacity(32);
    let mut attribute = |what: &str, value: &[u8], put: &mut dyn FnMut(&str, &[u8])| {
        name.clear();
        name.push_str(binding.prefix);
        name.push_str(what);
        put(&name, value);
    };
    attribute("specversion", b"1.0", &mut put);
    attribute("id", event.id().to_string().as_bytes(), &mut put);
    attribute("source", event.source().as_bytes(), &mut put);
    attribute("type", event.event_type().as_bytes(), &mut put);
    if let Some(time) = event.time() {
        attribute("time", to_rfc3339(time).as_bytes(), &mut put);
    }
    if let Some(subject) = event.subject() {
        attribute("subject", subject.as_bytes(), &mut put);
    }
    if let Some(schema) = event.schema() {
        attribute("dataschema", schema.as_bytes(), &mut put);
    }
    if let Some(version) = event.version() {
        attribute("dataversion", version.to_string().as_bytes(), &mut put);
    }
    if let Some(media) = event.content_type() {
        put(binding.content_type, media.as_bytes());
    }
    let mut has_partition_key = false;
    for (extension, value) in event.extensions() {
        if extension.starts_with("evt-") {
            put(extension, value);
        } else {
            has_partition_key |= extension == PARTITION_KEY;
            attribute(extension, value, &mut put);
        }
    }
    if !binding.has_key {
        match (event.key(), has_partition_key) {
            (Some(key), false) => attribute(PARTITION_KEY, key.as_bytes(), &mut put),
            (Some(key), true) => put(KEY, key.as_bytes()),
            (None, true) => put(NO_KEY, b"1"),
            (None, false) => {}
        }
    }
    if !binding.has_absent && event.payload().is_none() {
        put(NO_DATA, b"1");
    }
    for (header, value) in event.headers() {
        if binding.is_taken(header) {
            put(&format!("{ESCAPED}{header}"), value);
        } else {
            put(header, value);
        }
    }
}

/// Reads what a broker holds: binary mode, structured mode, or bytes that are no event.
pub(crate) fn read<'a>(
    binding: &Binding,
    pairs: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
    key: Option<Bytes>,
    body: Option<Bytes>,
) -> Content {
    let reason = match binary(binding, pairs.clone(), key.clone(), body.clone()) {
        Ok(envelope) => return Content::Envelope(envelope),
        Err(reason) => match structured(binding, pairs.clone(), key, body.as_deref()) {
            Some(Ok(envelope)) => return Content::Envelope(envelope),
            Some(Err(reason)) => reason,
            None => reason,
        },
    };
    let is_absent = !binding.has_absent && pairs.clone().any(|(name, _)| name == NO_DATA);
    let body = body.filter(|_| !is_absent);
    Content::Undecodable(Box::new(Undecodable::new(body, Headers::from_pairs(pairs), reason)))
}

fn text<'a>(what: &str, value: &'a [u8]) -> Result<&'a str, String> {
    std::str::from_utf8(value).map_err(|_| format!("the attribute {} is not UTF-8", what.escape_debug()))
}

fn binary<'a>(
    binding: &Binding,
    pairs: impl Iterator<Item = (&'a str, &'a [u8])>,
    key: Option<Bytes>,
    body: Option<Bytes>,
) -> Result<Envelope, String> {
    let (mut spec, mut id, mut source, mut event_type) = (None, None, None, None);
    let (mut time, mut version, mut subject, mut schema, mut media) = (None, None, None, None, None);
    let (mut extensions, mut headers) = (Vec::new(), Vec::new());
    let (mut marked_key, mut has_no_key, mut has_no_data, mut partition_key) = (None, false, false, None);
    let once = |what: &str, slot: &mut Option<&'a str>, value| match slot.replace(text(what, value)?) {
        None => Ok(()),
        Some(_) => Err(format!("the attribute {what} is there twice")),
    };
    for (name, value) in pairs {
        if name.eq_ignore_ascii_case(binding.content_type) {
            once("datacontenttype", &mut media, value)?;
        } else if let Some(attribute) = binding.attribute(name) {
            match attribute {
                "specversion" => once(attribute, &mut spec, value)?,
                "id" => once(attribute, &mut id, value)?,
                "source" => once(attribute, &mut source, value)?,
                "type" => once(attribute, &mut event_type, value)?,
                "time" => once(attribute, &mut time, value)?,
                "subject" => once(attribute, &mut subject, value)?,
                "dataschema" => once(attribute, &mut schema, value)?,
                "datacontenttype" => once(attribute, &mut media, value)?,
                "dataversion" => once(attribute, &mut version, value)?,
                PARTITION_KEY if !binding.has_key => partition_key = Some((extensions.len(), value)),
                other => extensions.push((Cow::Borrowed(other), value)),
            }
        } else if let Some(escaped) = name.strip_prefix(ESCAPED) {
            headers.push((escaped, value));
        } else if name == KEY && !binding.has_key {
            marked_key = Some(value);
        } else if name == NO_KEY && !binding.has_key {
            has_no_key = true;
        } else if name == NO_DATA && !binding.has_absent {
            has_no_data = true;
        } else if name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("evt-")) {
            extensions.push((Cow::Owned(name.to_ascii_lowercase()), value));
        } else if !crate::header::is_reserved(name) {
            headers.push((name, value));
        }
    }
    match spec {
        Some("1.0") => {}
        Some(other) => return Err(format!("its specversion {} is not 1.0", other.escape_debug())),
        None => return Err("it is no CloudEvent: there is no specversion".to_owned()),
    }
    let required = |what: &str, found: Option<&'a str>| match found {
        Some(found) if !found.is_empty() => Ok(found.to_owned()),
        _ => Err(format!("the attribute {what} is missing")),
    };
    let time = match time {
        Some(time) => Some(from_rfc3339(time).ok_or("the time is not RFC 3339")?),
        None => None,
    };
    let version =
        version.map(str::parse::<u32>).transpose().map_err(|_| "the dataversion is not a number")?;
    let id = EventId::parse(&required("id", id)?);
    let mut event =
        Envelope::bare(required("type", event_type)?.into(), required("source", source)?.into(), id, time)
            .with_version(version);
    if let Some(subject) = subject {
        event = event.with_subject(subject.to_owned());
    }
    if let Some(schema) = schema {
        event = event.with_schema(schema.to_owned());
    }
    if let Some(media) = media {
        event = event.with_content_type(media.to_owned());
    }
    let key = match (marked_key, partition_key) {
        (Some(key), attribute) => {
            if let Some((at, value)) = attribute {
                extensions.insert(at, (Cow::Borrowed(PARTITION_KEY), value));
            }
            Some(Bytes::copy_from_slice(key))
        }
        (None, Some((at, value))) if has_no_key => {
            extensions.insert(at, (Cow::Borrowed(PARTITION_KEY), value));
            None
        }
        (None, Some((_, attribute))) => Some(Bytes::copy_from_slice(attribute)),
        (None, None) => key,
    };
    if let Some(key) = key {
        event = event.with_key(Key::new(key));
    }
    if !extensions.is_empty() {
        event = event
            .with_extensions(Headers::from_pairs(extensions.iter().map(|(name, value)| (&**name, *value))));
    }
    if !headers.is_empty() {
        event = event.with_headers(Headers::from_pairs(headers));
    }
    Ok(match body {
        Some(body) if !has_no_data => event.with_payload(body),
        _ => event,
    })
}

/// An event in structured mode, if that is what it is.
fn structured<'a>(
    binding: &Binding,
    pairs: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
    key: Option<Bytes>,
    body: Option<&[u8]>,
) -> Option<Result<Envelope, String>> {
    let says = |(name, value): (&str, &[u8])| {
        (name.eq_ignore_ascii_case(binding.content_type) || name.eq_ignore_ascii_case("content-type"))
            && value.get(..22).is_some_and(|media| media.eq_ignore_ascii_case(b"application/cloudevent"))
    };
    let is_beside = |(name, _): (&str, &[u8])| {
        binding.attribute(name).is_some()
            || name.eq_ignore_ascii_case(binding.content_type)
            || name.eq_ignore_ascii_case("content-type")
    };
    let is_said = pairs.clone().any(says);
    if !is_said && (!binding.has_bare_events || pairs.clone().any(is_beside)) {
        return None;
    }
    let read = super::from_json(body.unwrap_or_default()).map_err(|error| error.message().to_owned());
    if !is_said && read.is_err() {
        return None;
    }
    let plain = |name: &str| {
        !name.eq_ignore_ascii_case(binding.content_type)
            && !name.eq_ignore_ascii_case("content-type")
            && binding.attribute(name).is_none()
            && !crate::header::is_reserved(name)
    };
    Some(read.map(|event| {
        let headers = Headers::from_pairs(pairs.filter(|(name, _)| plain(name)));
        let event = if headers.is_empty() { event } else { event.with_headers(headers) };
        match key {
            Some(key) if event.key().is_none() => event.with_key(Key::new(key)),
            _ => event,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Binding = Binding {
        prefix: "ce_",
        content_type: "content-type",
        has_key: true,
        has_absent: true,
        has_bare_events: false,
        taken: &["data"],
    };
    const NARROW: Binding = Binding {
        prefix: "ce-",
        content_type: "ce-datacontenttype",
        has_key: false,
        has_absent: false,
        has_bare_events: true,
        taken: &[],
    };

    fn there_and_back(binding: &Binding, event: &Envelope) -> Content {
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        write(binding, event, |name, value| pairs.push((name.to_owned(), value.to_vec())));
        let key = event.key().filter(|_| binding.has_key).map(Key::to_bytes);
        let body = event.payload().cloned().or((!binding.has_absent).then(Bytes::new));
        read(binding, pairs.iter().map(|(name, value)| (name.as_str(), value.as_slice())), key, body)
    }

    #[test]
    fn everything_survives_the_way_there_and_back() {
        let bare = Envelope::new("t", "/s").with_time(None);
        let full = Envelope::new("shop.paid", "/shop")
            .with_version(3)
            .with_subject("o-7 ü")
            .with_schema("urn:x")
            .with_content_type("application/json")
            .with_key(Key::new(&b"\0\xff key"[..]))
            .with_extension("correlationid", "c")
            .with_extension("evt-attempt", "2")
            .with_header("same", "1")
            .with_header("Same", "2")
            .with_header("same", "")
            .with_header("ce_id", "spoof")
            .with_header("CE-Type", "spoof")
            .with_header("cloudEvents_source", "spoof")
            .with_header("Content-Type", "spoof")
            .with_header("data", [0, 255, 128])
            .with_payload("");
        let odd = [
            full.clone().without_payload(),
            full.clone().with_extension("partitionkey", "other"),
            full.clone().without_key().with_extension("partitionkey", "other"),
            full.clone().with_extension("partitionkey", "other").with_extension("after", "1"),
            full.clone().without_key(),
            full.clone().with_id(EventId::parse("not a uuid")),
        ];
        for event in [bare, full].into_iter().chain(odd) {
            for binding in [&WIDE, &NARROW] {
                assert_eq!(there_and_back(binding, &event).envelope(), Some(&event), "{}", binding.prefix);
            }
        }
    }

    #[test]
    fn foreign_forms_are_read() {
        let amqp = [
            ("cloudEvents:specversion", "1.0"),
            ("cloudEvents:id", "1"),
            ("cloudEvents:source", "/s"),
            ("cloudEvents:type", "t"),
        ];
        let pairs = amqp.iter().map(|(name, value)| (*name, value.as_bytes()));
        assert_eq!(read(&NARROW, pairs, None, Some(Bytes::new())).envelope().unwrap().event_type(), "t");
        let structured = br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":7}"#;
        let pairs = [("Content-Type", "application/cloudevents+json; charset=UTF-8"), ("tenant", "a")];
        let pairs = pairs.iter().map(|(name, value)| (*name, value.as_bytes()));
        let found = read(&WIDE, pairs, Some(Bytes::from_static(b"k")), Some(Bytes::from_static(structured)));
        let event = found.envelope().unwrap();
        assert_eq!(
            (event.payload().unwrap().as_ref(), event.headers().get_str("tenant")),
            (&b"7"[..], Some("a"))
        );
        assert_eq!(event.key().unwrap().as_bytes(), b"k");
        // Without a media type only where a binding has it so, and with no attribute beside it.
        let bare = |binding: &Binding, name: &str| {
            let pairs = [(name, &b"1"[..])].into_iter();
            read(binding, pairs, None, Some(Bytes::from_static(structured))).envelope().is_some()
        };
        assert_eq!(
            ["tenant", "ce-id", "Content-Type"].map(|name| bare(&NARROW, name)),
            [true, false, false],
            "what is said otherwise holds"
        );
        assert!(!bare(&WIDE, "tenant"));
    }

    #[test]
    fn what_is_no_event_is_kept_with_the_reason() {
        let whole = [("ce_specversion", "1.0"), ("ce_id", "1"), ("ce_source", "/s"), ("ce_type", "t")];
        for (change, reason) in [
            (vec![], "no specversion"),
            (vec![("ce_specversion", "0.3")], "is not 1.0"),
            (whole[..3].to_vec(), "type is missing"),
            ([&whole[..], &[("ce_id", "2")]].concat(), "twice"),
            ([&whole[..], &[("ce_time", "noon")]].concat(), "RFC 3339"),
            (vec![("content-type", "application/cloudevents+json")], "CloudEvent: "),
        ] {
            let pairs = change.iter().map(|(name, value)| (*name, value.as_bytes()));
            match read(&WIDE, pairs, None, Some(Bytes::from_static(b"raw"))) {
                Content::Undecodable(bad) => {
                    assert!(bad.reason.contains(reason), "{} is not {reason}", bad.reason);
                    assert_eq!((bad.raw.as_deref(), bad.headers.len()), (Some(&b"raw"[..]), change.len()));
                }
                Content::Envelope(event) => panic!("{event:?}"),
            }
        }
    }
}
