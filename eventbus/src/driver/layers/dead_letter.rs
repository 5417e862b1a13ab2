//! Dead letters: the event as it came, with what happened to it in `evt-dlq-*` marks.

use std::time::SystemTime;

use crate::envelope::Envelope;
use crate::failure::Failure;
use crate::name::{Group, Topic};
use crate::time::to_rfc3339;
use crate::transport::{Content, Delivery};

/// Longest error text in a dead letter, in bytes.
const MAX_MESSAGE_BYTES: usize = 1024;

/// The type of a dead letter whose bytes are no event.
const UNDECODABLE: &str = "evt.undecodable";

/// Turns a delivery into its dead letter. Attributes and body stay as they are; bytes that are no
/// event become the body of one.
pub(in crate::driver) fn letter(
    delivery: &Delivery,
    topic: &Topic,
    group: &Group,
    handler: &str,
    failure: &Failure,
) -> Envelope {
    let base = match &delivery.content {
        Content::Envelope(envelope) => envelope.clone(),
        Content::Undecodable(bad) => {
            let letter = Envelope::new(UNDECODABLE, "/eventbus").with_headers(bad.headers.clone());
            match &bad.raw {
                Some(raw) => letter.with_payload(raw.clone()),
                None => letter,
            }
        }
    };
    let mut message = failure.message();
    while message.len() > MAX_MESSAGE_BYTES {
        let end = message.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_MESSAGE_BYTES).last();
        message = message.get(..end.unwrap_or(0)).unwrap_or_default();
    }
    let attempts = delivery.attempt.map_or(1, u32::from);
    let mut letter = base
        .with_extension("evt-dlq-origin", topic.as_str())
        .with_extension("evt-dlq-partition", delivery.partition.to_string())
        .with_extension("evt-dlq-group", group.as_str())
        .with_extension("evt-dlq-handler", handler)
        .with_extension("evt-dlq-reason", failure.code())
        .with_extension("evt-dlq-error-message", message)
        .with_extension("evt-dlq-attempts", attempts.to_string())
        .with_extension("evt-dlq-last-at", to_rfc3339(SystemTime::now()));
    if let Some(offset) = delivery.offset {
        letter = letter.with_extension("evt-dlq-offset", offset.to_string());
    }
    if !failure.error_type().is_empty() {
        letter = letter.with_extension("evt-dlq-error-type", failure.error_type());
    }
    if let Some(stored) = delivery.stored_at {
        letter = letter.with_extension("evt-dlq-first-at", to_rfc3339(stored));
    }
    letter
}
