//! JSON (RFC 8259) through serde_json, whose nesting limit of 128 stays on.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Codec;
use crate::error::{Error, ErrorKind, Result};

/// The JSON codec, `application/json`.
#[derive(Debug, Clone, Copy)]
pub struct Json;

impl<T: Serialize + DeserializeOwned> Codec<T> for Json {
    const CONTENT_TYPE: &'static str = "application/json";

    fn encode(value: &T) -> Result<Bytes> {
        serde_json::to_vec(value)
            .map(Bytes::from)
            .map_err(|error| Error::invalid("the value cannot be written as JSON").caused_by(error))
    }

    fn decode(body: &Bytes) -> Result<T> {
        serde_json::from_slice(body).map_err(|error| {
            // serde's text may quote the value it met; the place and the category are enough.
            let category = match error.classify() {
                serde_json::error::Category::Io => "input ended",
                serde_json::error::Category::Syntax => "not JSON",
                serde_json::error::Category::Data => "JSON of another shape",
                serde_json::error::Category::Eof => "JSON cut short",
            };
            Error::new(ErrorKind::Undecodable, category)
                .with("line", error.line())
                .with("column", error.column())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_place_and_never_the_payload() {
        let body = Bytes::from_static(br#"{"a": "secret-token"}"#);
        let error = <Json as Codec<std::collections::HashMap<String, u8>>>::decode(&body).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Undecodable);
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn deep_nesting_is_refused() {
        let deep = Bytes::from("[".repeat(100_000));
        assert!(<Json as Codec<serde_json::Value>>::decode(&deep).is_err());
    }
}
