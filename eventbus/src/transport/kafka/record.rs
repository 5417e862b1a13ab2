//! Events as records: CloudEvents in binary mode, the key as the record's key, an absent body as a null value.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Header, Headers as _, OwnedHeaders};

use crate::cloudevents::{Binding, read, write};
use crate::envelope::Envelope;
use crate::transport::kit::leased::Stored;

const BINDING: Binding = Binding {
    prefix: "ce_",
    content_type: "content-type",
    has_key: true,
    has_absent: true,
    has_bare_events: false,
    taken: &[],
};

/// The headers of an event's record.
pub(super) fn headers(event: &Envelope) -> OwnedHeaders {
    let mut headers = Some(OwnedHeaders::new_with_capacity(12 + event.headers().len()));
    write(&BINDING, event, |key, value| {
        headers = headers.take().map(|headers| headers.insert(Header { key, value: Some(value) }));
    });
    headers.unwrap_or_default()
}

/// Copies a record out of the client's memory.
pub(super) fn stored(message: &BorrowedMessage<'_>) -> Stored {
    let pairs: Vec<(&str, &[u8])> = message.headers().map_or_else(Vec::new, |headers| {
        headers.iter().map(|header| (header.key, header.value.unwrap_or_default())).collect()
    });
    let copy = |bytes: Option<&[u8]>| bytes.map(Bytes::copy_from_slice);
    let content = read(&BINDING, pairs.into_iter(), copy(message.key()), copy(message.payload()));
    let stored_at = message.timestamp().to_millis().map_or(UNIX_EPOCH, of_millis);
    Stored { offset: message.offset().unsigned_abs(), stored_at, content }
}

fn of_millis(millis: i64) -> SystemTime {
    let size = Duration::from_millis(millis.unsigned_abs());
    if millis < 0 { UNIX_EPOCH.checked_sub(size).unwrap_or(UNIX_EPOCH) } else { UNIX_EPOCH + size }
}
