//! Events as entries of a stream: CloudEvents in binary mode, the body in the field `data`, the key in `key`.

use bytes::Bytes;

use super::keys;
use crate::cloudevents::{Binding, read, write};
use crate::envelope::Envelope;
use crate::name::Key;
use crate::transport::kit::leased::Stored;

const BINDING: Binding = Binding {
    prefix: "ce_",
    content_type: "content-type",
    has_key: true,
    has_absent: true,
    has_bare_events: false,
    taken: &["data", "key"],
};

/// Calls back with each field and value.
pub(super) fn fields(event: &Envelope, mut put: impl FnMut(&[u8], &[u8])) {
    write(&BINDING, event, |name, value| put(name.as_bytes(), value));
    if let Some(key) = event.key().map(Key::as_bytes) {
        put(b"key", key);
    }
    if let Some(payload) = event.payload() {
        put(b"data", payload);
    }
}

/// Reads an entry as `XRANGE` returns it; `None` if that is none.
pub(super) fn stored(entry: &redis::Value) -> Option<Stored> {
    let redis::Value::Array(entry) = entry else { return None };
    let [redis::Value::BulkString(id), redis::Value::Array(fields)] = entry.as_slice() else { return None };
    let offset = keys::offset(id)?;
    let (mut pairs, mut key, mut body) = (Vec::with_capacity(fields.len() / 2), None, None);
    for pair in fields.as_chunks::<2>().0 {
        let [redis::Value::BulkString(name), redis::Value::BulkString(value)] = pair else { return None };
        match name.as_slice() {
            b"key" if key.is_none() => key = Some(Bytes::copy_from_slice(value)),
            b"data" if body.is_none() => body = Some(Bytes::copy_from_slice(value)),
            name => pairs.push((String::from_utf8_lossy(name), value.as_slice())),
        }
    }
    let content = read(&BINDING, pairs.iter().map(|(name, value)| (&**name, *value)), key, body);
    Some(Stored { offset, stored_at: keys::stored_at(offset), content })
}

/// The bytes of an entry, against which the next read is bounded.
pub(super) fn size(entry: &redis::Value) -> usize {
    match entry {
        redis::Value::Array(parts) => parts.iter().map(size).sum(),
        redis::Value::BulkString(bytes) => bytes.len(),
        _ => 0,
    }
}
