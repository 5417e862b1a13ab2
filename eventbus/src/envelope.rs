//! The envelope: CloudEvents 1.0 attributes, our extensions, headers and a body, in one shared value.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};
use crate::header::{self, Headers};
use crate::id::{EventId, MAX_ID_BYTES};
use crate::name::{Key, MAX_KEY_BYTES};
use crate::text::Text;

/// Names of the extension attributes this framework knows; each is in the CloudEvents repository or ours.
pub mod extension {
    /// The business conversation an event belongs to.
    pub const CORRELATION_ID: &str = "correlationid";
    /// The id of the event or command that caused this one.
    pub const CAUSATION_ID: &str = "causationid";
    /// W3C trace context of the journey's origin.
    pub const TRACE_PARENT: &str = "traceparent";
    /// W3C vendor state of the journey's origin.
    pub const TRACE_STATE: &str = "tracestate";
    /// The topic that an answer to a command is sent to.
    pub const REPLY_TO: &str = "replyto";
    /// RFC 3339 time after which the event is worthless.
    pub const EXPIRY_TIME: &str = "expirytime";
}

/// Longest type, source, subject, content type or schema, in bytes.
pub const MAX_ATTRIBUTE_BYTES: usize = 1024;

/// One event or command on the wire.
///
/// The value is one pointer wide; a clone shares everything, a change copies what is shared.
/// It survives a hop between any two transports unchanged: attributes, extensions, headers in
/// order with repeats, an absent body as absent.
///
/// ```
/// # use eventbus::Envelope;
/// let placed = Envelope::new("shop.order.placed", "/shop/web").with_key("7").with_payload("{}");
/// assert_eq!(placed.payload().unwrap().as_ref(), b"{}");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope(Arc<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    id: EventId,
    source: Text,
    event_type: Text,
    version: Option<u32>,
    subject: Option<Text>,
    time: Option<SystemTime>,
    content_type: Option<Text>,
    schema: Option<Text>,
    key: Option<Key>,
    extensions: Headers,
    headers: Headers,
    payload: Option<Bytes>,
}

/// Building.
impl Envelope {
    /// Creates an envelope with a fresh id and the present time; no key, no headers, an absent body.
    pub fn new(event_type: impl Into<Text>, source: impl Into<Text>) -> Self {
        let (id, time) = (EventId::generate(), Some(SystemTime::now()));
        Self::bare(event_type.into(), source.into(), id, time)
    }

    /// Creates an envelope that says nothing else.
    pub(crate) fn bare(event_type: Text, source: Text, id: EventId, time: Option<SystemTime>) -> Self {
        let (extensions, headers) = (Headers::new(), Headers::new());
        Self(Arc::new(Inner {
            id,
            source,
            event_type,
            version: None,
            subject: None,
            time,
            content_type: None,
            schema: None,
            key: None,
            extensions,
            headers,
            payload: None,
        }))
    }

    fn set(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// Replaces the id.
    #[must_use]
    pub fn with_id(self, id: EventId) -> Self {
        self.set(|inner| inner.id = id)
    }

    /// Replaces the source, a URI reference of the producer's context such as `/shop/ordering`.
    #[must_use]
    pub fn with_source(self, source: impl Into<Text>) -> Self {
        self.set(|inner| inner.source = source.into())
    }

    /// Sets the version of the type.
    #[must_use]
    pub fn with_version(self, version: impl Into<Option<u32>>) -> Self {
        self.set(|inner| inner.version = version.into())
    }

    /// Sets the thing inside the source that the event is about.
    #[must_use]
    pub fn with_subject(self, subject: impl Into<Text>) -> Self {
        self.set(|inner| inner.subject = Some(subject.into()))
    }

    /// Sets or clears the producer's time. It is never used for order.
    #[must_use]
    pub fn with_time(self, time: impl Into<Option<SystemTime>>) -> Self {
        self.set(|inner| inner.time = time.into())
    }

    /// Sets the media type of the body.
    #[must_use]
    pub fn with_content_type(self, content_type: impl Into<Text>) -> Self {
        self.set(|inner| inner.content_type = Some(content_type.into()))
    }

    /// Sets the URI of the body's schema.
    #[must_use]
    pub fn with_schema(self, schema: impl Into<Text>) -> Self {
        self.set(|inner| inner.schema = Some(schema.into()))
    }

    /// Sets the key that orders the event among others.
    #[must_use]
    pub fn with_key(self, key: impl Into<Key>) -> Self {
        self.set(|inner| inner.key = Some(key.into()))
    }

    /// Clears the key: the event is ordered with no other.
    #[must_use]
    pub fn without_key(self) -> Self {
        self.set(|inner| inner.key = None)
    }

    /// Sets an extension attribute (`[a-z0-9]`, at most 20 characters) or a framework mark (`evt-…`).
    ///
    /// An earlier value of the same name is replaced. Other names are refused at publish.
    #[must_use]
    pub fn with_extension(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.set(|inner| {
            let others = std::mem::take(&mut inner.extensions).without(|known| known == name);
            inner.extensions = others.with(name, value);
        })
    }

    /// Removes the extensions for which `drop` is true.
    #[must_use]
    pub fn without_extensions(self, drop: impl Fn(&str) -> bool) -> Self {
        self.set(|inner| inner.extensions = inner.extensions.without(drop))
    }

    /// Replaces all extension attributes.
    #[must_use]
    pub fn with_extensions(self, extensions: Headers) -> Self {
        self.set(|inner| inner.extensions = extensions)
    }

    /// Appends a user header.
    #[must_use]
    pub fn with_header(self, name: impl AsRef<str>, value: impl AsRef<[u8]>) -> Self {
        self.set(|inner| inner.headers = std::mem::take(&mut inner.headers).with(name, value))
    }

    /// Replaces all user headers.
    #[must_use]
    pub fn with_headers(self, headers: Headers) -> Self {
        self.set(|inner| inner.headers = headers)
    }

    /// Sets the body. An empty body differs from an absent one.
    #[must_use]
    pub fn with_payload(self, payload: impl Into<Bytes>) -> Self {
        self.set(|inner| inner.payload = Some(payload.into()))
    }

    /// Makes the body absent, as in a tombstone.
    #[must_use]
    pub fn without_payload(self) -> Self {
        self.set(|inner| inner.payload = None)
    }
}

/// Reading.
impl Envelope {
    /// Returns the id.
    pub fn id(&self) -> &EventId {
        &self.0.id
    }

    /// Returns the producer's context.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// Returns the wire name of the type.
    pub fn event_type(&self) -> &str {
        &self.0.event_type
    }

    /// Returns the version of the type, if the producer stated one.
    pub fn version(&self) -> Option<u32> {
        self.0.version
    }

    /// Returns the thing the event is about.
    pub fn subject(&self) -> Option<&str> {
        self.0.subject.as_deref()
    }

    /// Returns the producer's time.
    pub fn time(&self) -> Option<SystemTime> {
        self.0.time
    }

    /// Returns the media type of the body.
    pub fn content_type(&self) -> Option<&str> {
        self.0.content_type.as_deref()
    }

    /// Returns the URI of the body's schema.
    pub fn schema(&self) -> Option<&str> {
        self.0.schema.as_deref()
    }

    /// Returns the ordering key.
    pub fn key(&self) -> Option<&Key> {
        self.0.key.as_ref()
    }

    /// Returns the extension attributes and framework marks.
    pub fn extensions(&self) -> &Headers {
        &self.0.extensions
    }

    /// Returns one extension as text.
    pub fn extension(&self, name: &str) -> Option<&str> {
        self.0.extensions.get_str(name)
    }

    /// Returns the user's headers.
    pub fn headers(&self) -> &Headers {
        &self.0.headers
    }

    /// Returns the body; `None` is absent, which differs from empty.
    pub fn payload(&self) -> Option<&Bytes> {
        self.0.payload.as_ref()
    }

    /// Returns when the event is of no use any more: the extension `expirytime`, if it is a time.
    pub fn expiry(&self) -> Option<SystemTime> {
        self.extension(extension::EXPIRY_TIME).and_then(crate::time::from_rfc3339)
    }

    /// Returns the bytes this event counts against limits: body, key, attributes and headers.
    pub fn size_bytes(&self) -> usize {
        let inner = &*self.0;
        let optional = |text: &Option<Text>| text.as_ref().map_or(0, |text| text.len());
        inner.id.len()
            + inner.source.len()
            + inner.event_type.len()
            + optional(&inner.subject)
            + optional(&inner.content_type)
            + optional(&inner.schema)
            + inner.key.as_ref().map_or(0, |key| key.as_bytes().len())
            + inner.extensions.as_block().len()
            + inner.headers.as_block().len()
            + inner.payload.as_ref().map_or(0, Bytes::len)
    }

    /// Checks what every transport checks before any input or output, and drops reserved user headers.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) for an empty or hostile attribute, [`TooLarge`](ErrorKind::TooLarge)
    /// above `max_bytes` or a header bound. Both are permanent.
    pub fn admit(self, max_bytes: usize) -> Result<Self> {
        self.check(max_bytes)?;
        Ok(self.strip().unwrap_or(self))
    }

    /// Checks the bounds; returns the size.
    pub(crate) fn check(&self, max_bytes: usize) -> Result<usize> {
        let inner = &*self.0;
        check_attribute("type", &inner.event_type, 1)?;
        check_attribute("source", &inner.source, 1)?;
        for (what, text) in [
            ("subject", &inner.subject),
            ("datacontenttype", &inner.content_type),
            ("dataschema", &inner.schema),
        ] {
            if let Some(text) = text {
                check_attribute(what, text, 0)?;
            }
        }
        if inner.id.len() == 0 || inner.id.len() > MAX_ID_BYTES {
            return Err(Error::invalid("event id is empty or too long")
                .with("bytes", inner.id.len())
                .with("max_bytes", MAX_ID_BYTES));
        }
        if inner.id.as_uuid().is_none() && inner.id.to_string().chars().any(char::is_control) {
            return Err(Error::invalid("event id holds a control character"));
        }
        if inner.key.as_ref().is_some_and(|key| key.as_bytes().len() > MAX_KEY_BYTES) {
            return Err(Error::new(ErrorKind::TooLarge, "key is too long").with("max_bytes", MAX_KEY_BYTES));
        }
        inner.extensions.check()?;
        for (name, _) in &inner.extensions {
            let attribute =
                name.len() <= 20 && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            if !attribute && !name.starts_with("evt-") {
                return Err(Error::invalid(
                    "extension name must be [a-z0-9], at most 20 characters, or start with 'evt-'",
                )
                .with("name", name.escape_debug()));
            }
        }
        inner.headers.check()?;
        let size = self.size_bytes();
        if size > max_bytes {
            return Err(Error::new(ErrorKind::TooLarge, "event is above the transport's limit")
                .with("bytes", size)
                .with("max_bytes", max_bytes)
                .with("id", &inner.id));
        }
        Ok(size)
    }

    /// Returns the event without reserved user headers, if it has any.
    pub(crate) fn strip(&self) -> Option<Self> {
        let headers = &self.0.headers;
        let has_reserved = headers.iter().any(|(name, _)| header::is_reserved(name));
        has_reserved.then(|| self.clone().with_headers(headers.without(header::is_reserved)))
    }
}

fn check_attribute(what: &'static str, text: &str, min: usize) -> Result<()> {
    if text.len() < min || text.len() > MAX_ATTRIBUTE_BYTES {
        return Err(Error::invalid(format!("{what} must have {min} to {MAX_ATTRIBUTE_BYTES} bytes"))
            .with("bytes", text.len()));
    }
    // Most texts are ASCII, which is looked at faster by bytes.
    let is_plain = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !is_plain && text.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{what} holds a control character")));
    }
    Ok(())
}

/// Attributes and sizes only: a body may be a secret.
impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("id", &self.0.id)
            .field("type", &self.0.event_type)
            .field("version", &self.0.version)
            .field("source", &self.0.source)
            .field("key", &self.0.key)
            .field("n_headers", &self.0.headers.len())
            .field("payload_bytes", &self.0.payload.as_ref().map(Bytes::len))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Envelope {
        Envelope::new("shop.order.placed", "/shop/web")
    }

    #[test]
    fn a_clone_is_not_changed_by_its_twin() {
        let one = sample().with_header("a", "1");
        let two = one.clone().with_header("a", "2").with_payload("x");
        assert_eq!((one.headers().len(), two.headers().len()), (1, 2));
        assert!(one.payload().is_none());
        assert_eq!(std::mem::size_of::<Envelope>(), std::mem::size_of::<usize>());
    }

    #[test]
    fn extensions_replace_and_headers_repeat() {
        let envelope = sample().with_extension("correlationid", "1").with_extension("correlationid", "2");
        assert_eq!(envelope.extension("correlationid"), Some("2"));
        assert_eq!(envelope.extensions().len(), 1);
    }

    #[test]
    fn hostile_attributes_are_refused() {
        let refused = [
            Envelope::new("", "/s"),
            Envelope::new("t", ""),
            Envelope::new("t\r\nx: y", "/s"),
            Envelope::new("t", "/s\0"),
            sample().with_subject("x".repeat(MAX_ATTRIBUTE_BYTES + 1)),
            sample().with_id(EventId::parse("")),
            sample().with_id(EventId::parse("a\0b")),
            sample().with_key("k".repeat(MAX_KEY_BYTES + 1)),
            sample().with_extension("Upper", "x"),
            sample().with_extension("x-death", "x"),
            sample().with_header("a\r\nb", "x"),
        ];
        for envelope in refused {
            let error = envelope.clone().admit(1 << 20).unwrap_err();
            assert!(!error.is_retryable(), "{envelope:?} {error}");
        }
    }

    #[test]
    fn reserved_headers_are_dropped_and_marks_stay() {
        let envelope = sample()
            .with_header("evt-attempt", "9")
            .with_header("Nats-Msg-Id", "x")
            .with_header("ok", "1")
            .with_extension("evt-seq", "4")
            .admit(1 << 20)
            .unwrap();
        assert_eq!(envelope.headers().len(), 1);
        assert_eq!(envelope.extension("evt-seq"), Some("4"));
    }

    #[test]
    fn the_limit_counts_headers() {
        let envelope = sample().with_payload(vec![0; 100]).with_header("name", "value");
        let size = envelope.size_bytes();
        assert!(envelope.clone().admit(size).is_ok());
        assert_eq!(envelope.admit(size - 1).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}
