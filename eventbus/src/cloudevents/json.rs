//! Structured mode: the JSON format of CloudEvents 1.0.2, sections 2 and 3.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::time::from_rfc3339;

/// Reads one event in structured mode. `partitionkey` (the Partitioning extension) becomes the key, `dataversion` the version of
/// the type; other extensions stay extensions.
///
/// # Errors
/// [`Undecodable`](ErrorKind::Undecodable): it is not JSON, a required attribute is missing, or one has the wrong
/// form.
pub fn from_json(text: &[u8]) -> Result<Envelope> {
    let bad = |problem: String| Error::new(ErrorKind::Undecodable, format!("CloudEvent: {problem}"));
    let mut event: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| bad(error.to_string()))?;
    let mut take = |name: &str| -> Result<Option<String>> {
        match event.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other @ (Value::Number(_) | Value::Bool(_))) => Ok(Some(other.to_string())),
            Some(_) => Err(bad(format!("{name} is not a text"))),
        }
    };
    let mut required = |name: &str| take(name)?.ok_or_else(|| bad(format!("{name} is missing")));
    match required("specversion")?.as_str() {
        "1.0" => {}
        other => return Err(bad(format!("specversion {other} is not 1.0"))),
    }
    let (id, source, event_type) = (required("id")?, required("source")?, required("type")?);
    let time = take("time")?
        .map(|text| from_rfc3339(&text).ok_or_else(|| bad(format!("time is not RFC 3339: {text}"))))
        .transpose()?;
    let version = take("dataversion")?
        .map(|text| text.parse::<u32>().map_err(|_| bad(format!("dataversion is not a number: {text}"))))
        .transpose()?;
    let (subject, schema) = (take("subject")?, take("dataschema")?);
    let (content_type, key) = (take("datacontenttype")?, take("partitionkey")?);
    let base64 = take("data_base64")?;
    let data = event.remove("data").filter(|data| !data.is_null());
    let is_json = content_type.as_deref().is_none_or(|media| {
        let media = media.split(';').next().unwrap_or_default().trim();
        media.ends_with("/json") || media.ends_with("+json")
    });
    let payload = match (data, base64) {
        (Some(_), Some(_)) => return Err(bad("data and data_base64 exclude each other".into())),
        (None, Some(text)) => {
            Some(BASE64.decode(text).map_err(|error| bad(format!("data_base64: {error}")))?)
        }
        // Without a JSON media type a text is the data itself (section 3.1.1).
        (Some(Value::String(text)), None) if !is_json => Some(text.into_bytes()),
        (Some(data), None) => Some(data.to_string().into_bytes()),
        (None, None) => None,
    };
    let mut envelope =
        Envelope::new(event_type, source).with_id(EventId::parse(&id)).with_time(time).with_version(version);
    if let Some(subject) = subject {
        envelope = envelope.with_subject(subject);
    }
    if let Some(schema) = schema {
        envelope = envelope.with_schema(schema);
    }
    if let Some(key) = key {
        envelope = envelope.with_key(key);
    }
    if let Some(payload) = payload {
        envelope = envelope
            .with_content_type(content_type.unwrap_or_else(|| "application/json".into()))
            .with_payload(payload);
    }
    for (name, value) in event {
        let value = match value {
            Value::Null => continue,
            Value::String(text) => text,
            other @ (Value::Number(_) | Value::Bool(_)) => other.to_string(),
            _ => return Err(bad(format!("extension {name} is not a scalar"))),
        };
        envelope = envelope.with_extension(&name, value);
    }
    Ok(envelope)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structured_events_are_read_as_the_format_says() {
        let event = from_json(
            br#"{"specversion":"1.0","id":"A234","source":"/shop","type":"shop.paid","time":"2026-08-22T10:00:00Z",
            "subject":"o-7","partitionkey":"7","dataversion":2,"correlationid":"c","data":{"amount":7}}"#,
        )
        .unwrap();
        assert_eq!((event.id().to_string().as_str(), event.version()), ("A234", Some(2)));
        assert_eq!(event.key().unwrap().as_bytes(), b"7");
        assert_eq!(
            (event.extension("correlationid"), event.content_type()),
            (Some("c"), Some("application/json"))
        );
        assert_eq!(event.payload().unwrap().as_ref(), br#"{"amount":7}"#);
        let with = |rest: &str| {
            from_json(
                format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t"{rest}}}"#).as_bytes(),
            )
        };
        let body = |rest: &str| with(rest).unwrap().payload().map(|body| body.to_vec());
        assert_eq!(body(""), None);
        assert_eq!(body(r#","data":"a""#), Some(b"\"a\"".to_vec()));
        assert_eq!(body(r#","datacontenttype":"text/plain","data":"a""#), Some(b"a".to_vec()));
        assert_eq!(body(r#","data_base64":"AP8=""#), Some(vec![0, 255]));
        for bad in [
            "{}",
            r#"{"specversion":"0.3","id":"1","source":"/s","type":"t"}"#,
            r#"{"specversion":"1.0","id":"1","source":"/s"}"#,
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","time":"yesterday"}"#,
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1,"data_base64":"AA=="}"#,
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","nested":{}}"#,
        ] {
            assert_eq!(from_json(bad.as_bytes()).unwrap_err().kind(), ErrorKind::Undecodable, "{bad}");
        }
    }
}
