//! What an event says beside topic, key and body, as JSON that a person can read and write.
//!
//! ```json
//! {"source": "/shop", "type": "shop.order.placed", "version": 1, "time": "2026-11-22T10:00:00Z",
//!  "datacontenttype": "application/json", "extensions": {"correlationid": "7"}, "headers": [["tenant", "a"]]}
//! ```
//! Headers may be an object or a list of pairs, which may repeat names. A value that is no text is `{"base64": "…"}`.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use eventbus::time::{from_rfc3339, to_rfc3339};
use eventbus::{Envelope, EventId, Headers, Key};
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head<'a> {
    /// Where it is no UUID, and so not the row's.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    event_type: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    subject: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    time: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    datacontenttype: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    dataschema: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Extensions::is_empty")]
    extensions: Extensions,
    #[serde(default, skip_serializing_if = "Pairs::is_empty")]
    headers: Pairs,
}

/// Writes the head of an event.
pub(crate) fn write(event: &Envelope) -> String {
    let head = Head {
        id: event.id().as_uuid().is_none().then(|| event.id().to_string().into()),
        source: event.source().into(),
        event_type: event.event_type().into(),
        version: event.version(),
        subject: event.subject().map(Cow::from),
        time: event.time().map(|time| to_rfc3339(time).into()),
        datacontenttype: event.content_type().map(Cow::from),
        dataschema: event.schema().map(Cow::from),
        extensions: Extensions(event.extensions().clone()),
        headers: Pairs(event.headers().clone()),
    };
    // Texts and lists of texts: there is nothing that JSON cannot hold.
    serde_json::to_string(&head).unwrap_or_default()
}

/// Puts an event together again; says why if that cannot be.
pub(crate) fn read(
    head: &str,
    id: uuid::Uuid,
    key: Option<Bytes>,
    payload: Option<Bytes>,
) -> Result<Envelope, String> {
    let head: Head<'_> = serde_json::from_str(head).map_err(|error| format!("its head: {error}"))?;
    let time = head.time.map(|time| from_rfc3339(&time).ok_or("its time is not RFC 3339")).transpose()?;
    let id = head.id.map_or_else(|| EventId::from(id), |id| EventId::parse(&id));
    let mut event = Envelope::new(head.event_type.into_owned(), head.source.into_owned())
        .with_id(id)
        .with_time(time)
        .with_version(head.version)
        .with_extensions(head.extensions.0)
        .with_headers(head.headers.0);
    if let Some(subject) = head.subject {
        event = event.with_subject(subject.into_owned());
    }
    if let Some(content_type) = head.datacontenttype {
        event = event.with_content_type(content_type.into_owned());
    }
    if let Some(schema) = head.dataschema {
        event = event.with_schema(schema.into_owned());
    }
    if let Some(key) = key {
        event = event.with_key(Key::new(key));
    }
    if let Some(payload) = payload {
        event = event.with_payload(payload);
    }
    Ok(event)
}

/// Headers with unique names: an object.
#[derive(Default)]
struct Extensions(Headers);

/// Headers whose names may repeat: a list of pairs.
#[derive(Default)]
struct Pairs(Headers);

impl Extensions {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Pairs {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Extensions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        self.0
            .iter()
            .try_for_each(|(name, value)| map.serialize_entry(name, &Value(Cow::Borrowed(value))))?;
        map.end()
    }
}

impl Serialize for Pairs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        self.0
            .iter()
            .try_for_each(|(name, value)| list.serialize_element(&(name, Value(Cow::Borrowed(value)))))?;
        list.end()
    }
}

impl<'de> Deserialize<'de> for Extensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HeadersVisitor).map(Self)
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HeadersVisitor).map(Self)
    }
}

/// Reads both forms, in their order.
struct HeadersVisitor;

impl<'de> Visitor<'de> for HeadersVisitor {
    type Value = Headers;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of headers, or a list of pairs")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
        let mut found = Vec::new();
        while let Some(pair) = map.next_entry::<String, Value<'de>>()? {
            found.push(pair);
        }
        Ok(collect(&found))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Headers, A::Error> {
        let mut found = Vec::new();
        while let Some(pair) = list.next_element::<(String, Value<'de>)>()? {
            found.push(pair);
        }
        Ok(collect(&found))
    }
}

fn collect(pairs: &[(String, Value<'_>)]) -> Headers {
    Headers::from_pairs(pairs.iter().map(|(name, value)| (name.as_str(), &*value.0)))
}

/// The bytes of a header: text where they are text.
struct Value<'a>(Cow<'a, [u8]>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Binary<'a> {
    #[serde(borrow)]
    base64: Cow<'a, str>,
}

impl Serialize for Value<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => Binary { base64: STANDARD.encode(&self.0).into() }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form<'a> {
            Text(#[serde(borrow)] Cow<'a, str>),
            Binary(#[serde(borrow)] Binary<'a>),
            Bool(bool),
            Number(serde_json::Number),
        }
        Ok(Self(match Form::deserialize(deserializer)? {
            Form::Text(Cow::Borrowed(text)) => Cow::Borrowed(text.as_bytes()),
            Form::Text(Cow::Owned(text)) => text.into_bytes().into(),
            Form::Binary(binary) => {
                STANDARD.decode(&*binary.base64).map_err(|_| de::Error::custom("not base64"))?.into()
            }
            Form::Bool(value) => value.to_string().into_bytes().into(),
            Form::Number(value) => value.to_string().into_bytes().into(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn there_and_back(event: &Envelope) -> Envelope {
        let id = event.id().as_uuid().unwrap_or_default();
        read(&write(event), id, event.key().map(Key::to_bytes), event.payload().cloned()).unwrap()
    }

    #[test]
    fn events_survive() {
        let bare = Envelope::new("a.b", "/x").with_time(None);
        let full = Envelope::new("a.b", "/x")
            .with_id(EventId::parse("not a uuid"))
            .with_version(3)
            .with_time(UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789))
            .with_subject("s\u{0}\n\"é")
            .with_content_type("text/plain")
            .with_schema("urn:x")
            .with_key(Key::new(vec![0u8, 255]))
            .with_extension("zulu", "1")
            .with_extension("alpha", [0u8, 159])
            .with_header("tenant", "b")
            .with_header("tenant", "a")
            .with_header("raw", [0u8, 255, 10])
            .with_header("empty", "")
            .with_payload("");
        for event in [bare, full] {
            assert_eq!(there_and_back(&event), event);
        }
    }

    #[test]
    fn heads_written_by_hand_are_read() {
        let read = |head: &str| read(head, uuid::Uuid::nil(), None, None);
        let event = read(r#"{"type":"a","source":"/x","headers":{"n":1,"b":true}}"#).unwrap();
        assert_eq!(
            (event.headers().get("n"), event.headers().get("b")),
            (Some(&b"1"[..]), Some(&b"true"[..]))
        );
        for bad in [
            "",
            "[]",
            r#"{"type":"a"}"#,
            r#"{"type":"a","source":"/x","tiem":"x"}"#,
            r#"{"type":"a","source":"/x","time":"yesterday"}"#,
            r#"{"type":"a","source":"/x","headers":7}"#,
            r#"{"type":"a","source":"/x","headers":{"a":{"base64":"%"}}}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
