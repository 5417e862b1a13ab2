//! The record envelope `eventctl.record/1`: lossless both ways, one JSON object a record.
//!
//! All attributes travel as `ce_…` headers, so that what is read can be published again as it was.
//! `ref`, `ce` and `size` are for the reader and ignored on the way back.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use eventbus::admin::Record;
use eventbus::time::{from_rfc3339, to_rfc3339};
use eventbus::{Content, Envelope, EventId, Headers, Key, Topic};
use serde_json::{Value, json};

use crate::decode::{self, Decode, Shown};
use crate::exit::{Failure, Outcome};
use crate::jq::Jq;

/// The attributes that have a place of their own in an envelope.
const KNOWN: [&str; 8] =
    ["id", "source", "type", "specversion", "subject", "time", "dataschema", "dataversion"];

/// Bodies that are nested deeper are shown as text.
const MAX_DEPTH: usize = 64;

/// Bytes as text, and how they were made text.
pub(crate) fn coded(bytes: &[u8]) -> (String, &'static str) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), "utf8"),
        Err(_) => (BASE64.encode(bytes), "base64"),
    }
}

/// A body as the value of a record.
pub(crate) fn body(bytes: &[u8]) -> Value {
    // Shown as JSON only where writing it again gives the same bytes, and where a reader that bounds the depth
    // of nesting, as most do, can still read the record around it.
    if let Ok(value) = serde_json::from_slice::<Value>(bytes)
        && depth(&value) <= MAX_DEPTH
        && serde_json::to_vec(&value).is_ok_and(|again| again == bytes)
    {
        return json!({"enc": "json", "data": value});
    }
    let (data, enc) = coded(bytes);
    json!({"enc": enc, "data": data})
}

/// How deep a value is nested.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn uncoded(enc: Option<&str>, data: &Value) -> Outcome<Vec<u8>> {
    let bad = |problem: &str| Failure::Usage(format!("record: {problem}"));
    match (enc, data) {
        (Some("json"), value) => serde_json::to_vec(value).map_err(|error| bad(&error.to_string())),
        (Some("utf8") | None, Value::String(text)) => Ok(text.clone().into_bytes()),
        (Some("base64"), Value::String(text)) => {
            BASE64.decode(text).map_err(|error| bad(&format!("base64: {error}")))
        }
        (Some("hex"), Value::String(text)) => {
            decode::from_hex(text).ok_or_else(|| bad("hex: two digits a byte"))
        }
        (enc, _) => Err(bad(&format!("data does not fit the encoding {}", enc.unwrap_or("utf8")))),
    }
}

/// The place of a record: `topic/partition@offset`.
pub(crate) fn reference(topic: &Topic, record: &Record) -> String {
    format!("{topic}/{}@{}", record.partition, record.offset)
}

/// The bytes that are stored as its body: none if it has no body.
pub(crate) fn bytes(record: &Record) -> Bytes {
    let body = match &record.content {
        Content::Envelope(event) => event.payload().cloned(),
        Content::Undecodable(bad) => bad.raw.clone(),
        _ => None,
    };
    body.unwrap_or_default()
}

/// A record as filters see it: with a body that is JSON as JSON, also where writing it again would give other bytes.
pub(crate) fn for_jq(mut record: Value) -> Value {
    let parsed = record["value"]["data"].as_str().filter(|_| record["value"]["enc"] == "utf8");
    let parsed = parsed.and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(data) = parsed.filter(|data| depth(data) <= MAX_DEPTH) {
        record["value"] = json!({"enc": "json", "data": data});
    }
    record
}

/// The event that a jq filter makes of a record. A body that it leaves alone keeps its bytes.
///
/// # Errors
/// The filter fails, or what it makes is no record.
pub(crate) fn edited(broker: &str, topic: &Topic, record: &Record, edit: &Jq) -> Outcome<Envelope> {
    let before = for_jq(to_json(broker, topic, record));
    let after = edit.one(&before)?;
    let edited = from_json(&after)?;
    Ok(match after["value"] == before["value"] && !before["value"].is_null() {
        true => edited.with_payload(bytes(record)),
        false => edited,
    })
}

/// How often an event was replayed or redriven.
pub(crate) fn n_replays(event: &Envelope) -> u32 {
    event.extension("evt-replay-count").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// The event for one group alone, and there for one handler, if one is named.
pub(crate) fn only_for(event: Envelope, group: &str, handler: Option<&str>) -> Envelope {
    let event = event.with_extension("evt-replay-group", group);
    match handler {
        Some(handler) => event.with_extension("evt-replay-handler", handler),
        None => event,
    }
}

/// Whether a name in wire form is that of an attribute.
fn is_attribute(name: &str) -> bool {
    name.starts_with("ce_") || name.starts_with("evt-") || name == "content-type"
}

/// Every attribute and header in wire form, and whether it is a header of the user.
fn headers(envelope: &Envelope) -> Vec<(String, Vec<u8>, bool)> {
    let mut headers: Vec<(String, Vec<u8>, bool)> = vec![
        ("ce_specversion".into(), b"1.0".to_vec(), false),
        ("ce_id".into(), envelope.id().to_string().into_bytes(), false),
        ("ce_source".into(), envelope.source().into(), false),
        ("ce_type".into(), envelope.event_type().into(), false),
    ];
    let mut put = |name: &str, value: Option<String>| {
        headers.extend(value.map(|value| (name.to_owned(), value.into_bytes(), false)))
    };
    put("ce_dataversion", envelope.version().map(|version| version.to_string()));
    put("ce_subject", envelope.subject().map(str::to_owned));
    put("ce_time", envelope.time().map(to_rfc3339));
    put("ce_dataschema", envelope.schema().map(str::to_owned));
    put("content-type", envelope.content_type().map(str::to_owned));
    for (name, value) in envelope.extensions() {
        let name = if name.starts_with("evt-") { name.to_owned() } else { format!("ce_{name}") };
        headers.push((name, value.to_vec(), false));
    }
    headers.extend(envelope.headers().iter().map(|(name, value)| (name.to_owned(), value.to_vec(), true)));
    headers
}

/// Writes a record, with its body whole and as it is.
pub(crate) fn to_json(broker: &str, topic: &Topic, record: &Record) -> Value {
    shown(broker, topic, record, &Decode::default(), usize::MAX)
}

/// Writes a record as it is shown: its body decoded, and cut.
pub(crate) fn shown(
    broker: &str,
    topic: &Topic,
    record: &Record,
    decode: &Decode,
    max_bytes: usize,
) -> Value {
    let (found, payload, key, decode_error) = match &record.content {
        Content::Envelope(envelope) => {
            (headers(envelope), envelope.payload().cloned(), envelope.key().cloned(), Value::Null)
        }
        Content::Undecodable(bad) => {
            let raw =
                bad.headers.iter().map(|(name, value)| (name.to_owned(), value.to_vec(), true)).collect();
            (raw, bad.raw.clone(), None, Value::String(bad.reason.clone()))
        }
        _ => (Vec::new(), None, None, Value::String("content of a newer kind".into())),
    };
    let size = payload.as_ref().map_or(0, Bytes::len);
    let shown = payload.as_ref().map(|payload| decode.show(payload, max_bytes));
    let why = shown.as_ref().and_then(|shown| shown.error.clone());
    let ce: serde_json::Map<String, Value> = found
        .iter()
        .filter(|(.., of_user)| !of_user)
        .filter_map(|(name, value, _)| {
            Some((name.strip_prefix("ce_")?.to_owned(), Value::String(coded(value).0)))
        })
        .collect();
    let listed: Vec<Value> = found
        .iter()
        .map(|(name, value, of_user)| {
            let (data, enc) = coded(value);
            // A header of the user that has the name of an attribute says so, or it would become one.
            if *of_user && is_attribute(name) {
                json!([name, data, enc, "header"])
            } else {
                json!([name, data, enc])
            }
        })
        .collect();
    json!({
        "ref": reference(topic, record),
        "broker": broker,
        "dest": topic.as_str(),
        "partition": record.partition.0,
        "offset": record.offset.0,
        "ts": to_rfc3339(record.stored_at),
        "key": key.map(|key| { let (data, enc) = coded(key.as_bytes()); json!({"enc": enc, "data": data}) }),
        "headers": listed,
        "value": shown.as_ref().map(Shown::value),
        "size": size,
        "truncated": shown.is_some_and(|shown| shown.is_cut),
        "ce": ce,
        "decode_error": why.map_or(decode_error, Value::String),
    })
}

/// Reads a record back into the event it was.
///
/// # Errors
/// Usage: the object is not a record, or was cut when it was written.
pub(crate) fn from_json(record: &Value) -> Outcome<Envelope> {
    let bad = |problem: String| Failure::Usage(format!("record: {problem}"));
    if record["truncated"] == true {
        return Err(bad("the body was cut when it was written: tail with --full".into()));
    }
    let mut attributes: Vec<(String, Vec<u8>)> = Vec::new();
    let mut user = Headers::new();
    for header in record["headers"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let name = header[0].as_str().ok_or_else(|| bad("a header is [name, data, encoding]".into()))?;
        let value = uncoded(header[2].as_str(), &header[1])?;
        if is_attribute(name) && header[3] != "header" {
            attributes.push((name.to_owned(), value));
        } else {
            user = user.with(name, value);
        }
    }
    let text = |name: &str| -> Outcome<Option<String>> {
        let found = attributes
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| String::from_utf8(value.clone()));
        found.transpose().map_err(|_| bad(format!("{name} is not UTF-8")))
    };
    let required = |name: &str| text(name)?.ok_or_else(|| bad(format!("{name} is missing")));
    let version = text("ce_dataversion")?
        .map(|text| text.parse::<u32>())
        .transpose()
        .map_err(|_| bad("ce_dataversion".into()))?;
    let time = text("ce_time")?
        .map(|text| from_rfc3339(&text).ok_or_else(|| bad("ce_time is not RFC 3339".into())))
        .transpose()?;
    let mut envelope = Envelope::new(required("ce_type")?, required("ce_source")?)
        .with_id(EventId::parse(&required("ce_id")?))
        .with_version(version)
        .with_time(time)
        .with_headers(user);
    if let Some(subject) = text("ce_subject")? {
        envelope = envelope.with_subject(subject);
    }
    if let Some(schema) = text("ce_dataschema")? {
        envelope = envelope.with_schema(schema);
    }
    if let Some(content_type) = text("content-type")? {
        envelope = envelope.with_content_type(content_type);
    }
    for (name, value) in &attributes {
        match name.strip_prefix("ce_") {
            Some(known) if KNOWN.contains(&known) => {}
            Some(extension) => envelope = envelope.with_extension(extension, value),
            None if name.starts_with("evt-") => envelope = envelope.with_extension(name, value),
            None => {}
        }
    }
    if !record["key"].is_null() {
        envelope =
            envelope.with_key(Key::new(uncoded(record["key"]["enc"].as_str(), &record["key"]["data"])?));
    }
    if !record["value"].is_null() {
        envelope = envelope.with_payload(uncoded(record["value"]["enc"].as_str(), &record["value"]["data"])?);
    }
    Ok(envelope)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use eventbus::{Offset, PartitionId};

    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was() {
        let full = Envelope::new("shop.paid", "/shop")
            .with_version(3)
            .with_subject("s ü")
            .with_schema("urn:x")
            .with_content_type("application/json")
            .with_time(SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789))
            .with_extension("correlationid", "c")
            .with_extension("evt-seq", "9")
            .with_key(Key::new(vec![0u8, 255]))
            .with_header("twice", "1")
            .with_header("twice", [0xff, 0])
            .with_header("empty", "")
            .with_header("content-type", "the user's own")
            .with_header("ce_id", "not the id")
            .with_payload("{\"a\":1}");
        let spaced = full.clone().with_payload("{ \"b\" : 1.0, \"a\": 2 }");
        let binary = full.clone().with_payload(vec![0u8, 159, 146, 150]);
        let absent = full.clone().without_payload().without_key().with_time(None);
        let empty = full.clone().with_payload("");
        let deep = full.clone().with_payload(format!("{}1{}", "[".repeat(126), "]".repeat(126)));
        let topic = Topic::new("t").unwrap();
        for event in [full, spaced, binary, absent, empty, deep] {
            let record =
                Record::new(PartitionId(1), Offset(2), SystemTime::now(), Content::Envelope(event.clone()));
            let text = to_json("sqlite", &topic, &record).to_string();
            let back = from_json(&serde_json::from_str(&text).unwrap()).unwrap();
            assert!(back == event, "{text}");
        }
    }

    #[test]
    fn a_cut_record_is_not_published() {
        let event = Envelope::new("t", "/s").with_payload("0123456789");
        let record = Record::new(PartitionId(0), Offset(0), SystemTime::now(), Content::Envelope(event));
        let cut = shown("memory", &Topic::new("t").unwrap(), &record, &Decode::default(), 4);
        assert_eq!((cut["size"].as_u64(), &cut["truncated"]), (Some(10), &Value::Bool(true)));
        assert!(from_json(&cut).is_err());
    }
}
