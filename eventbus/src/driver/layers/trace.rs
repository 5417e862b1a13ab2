//! Trace context (W3C Trace Context 1.0): where a run belongs, and what its outputs carry on.
//!
//! The header `traceparent` is the context of the last hop and is written anew by each; the extension of the
//! same name is the origin of the journey and is never changed (CloudEvents, distributed tracing extension).

use tracing::Span;

use crate::driver::subscribed::Subscribed;
use crate::envelope::{Envelope, extension};
use crate::extract::Context;

/// The trace and span that a hop belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::driver) struct Hop {
    trace: u128,
    span: u64,
    flags: u8,
}

impl Hop {
    /// Reads a `traceparent` of version 00, or the known part of a later one.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace) = (parts.next()?, parts.next()?);
        let (span, flags) = (parts.next()?, parts.next()?);
        let plain = |part: &str, n: usize| {
            part.len() == n && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let whole = version != "00" || parts.next().is_none();
        if !(plain(version, 2) && plain(trace, 32) && plain(span, 16) && plain(flags, 2) && whole)
            || version == "ff"
        {
            return None;
        }
        let hop = Self {
            trace: u128::from_str_radix(trace, 16).ok()?,
            span: u64::from_str_radix(span, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (hop.trace != 0 && hop.span != 0).then_some(hop)
    }

    /// The hop that an event came with.
    fn of(envelope: &Envelope) -> Option<Self> {
        let header =
            envelope.headers().get(extension::TRACE_PARENT).and_then(|raw| std::str::from_utf8(raw).ok());
        header.and_then(Self::parse).or_else(|| Self::parse(envelope.extension(extension::TRACE_PARENT)?))
    }

    /// The hop of a run: the same trace, a span of its own.
    pub(in crate::driver) fn begin(context: &Context) -> Option<Self> {
        Self::of(&context.envelope).map(|hop| Self { span: fastrand::u64(1..), ..hop })
    }

    /// Writes the context of this hop into an output, unless its handler did.
    pub(in crate::driver) fn mark(self, output: Envelope) -> Envelope {
        if output.headers().get(extension::TRACE_PARENT).is_some() {
            return output;
        }
        let Self { trace, span, flags } = self;
        output.with_header(extension::TRACE_PARENT, format!("00-{trace:032x}-{span:016x}-{flags:02x}"))
    }
}

/// The span of a run, with the attributes of the semantic conventions for messaging. It costs nothing where
/// nobody listens at this level.
pub(in crate::driver) fn span(
    subscribed: &Subscribed,
    handler: &'static str,
    context: &Context,
    hop: Option<Hop>,
) -> Span {
    let span = tracing::debug_span!(
        "process",
        otel.kind = "consumer",
        messaging.operation.name = "process",
        messaging.operation.r#type = "process",
        messaging.destination.name = %subscribed.topic,
        messaging.consumer.group.name = %subscribed.group,
        messaging.message.id = %context.envelope.id(),
        messaging.message.conversation_id = context.envelope.extension(extension::CORRELATION_ID),
        messaging.destination.partition.id = %context.delivery.partition,
        cloudevents.event_type = context.envelope.event_type(),
        handler,
        trace_id = tracing::field::Empty,
        span_id = tracing::field::Empty,
    );
    if let Some(hop) = hop.filter(|_| !span.is_disabled()) {
        span.record("trace_id", format_args!("{:032x}", hop.trace));
        span.record("span_id", format_args!("{:016x}", hop.span));
    }
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn contexts_are_read_as_the_recommendation_says() {
        assert!(Hop::parse(PARENT).is_some());
        assert!(Hop::parse("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more").is_some());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Hop::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_last_hop_wins_and_the_origin_is_the_rest() {
        let origin = Envelope::new("t", "/s").with_extension("traceparent", PARENT);
        let last = "00-4bf92f3577b34da6a3ce929d0e0e4736-1111111111111111-00";
        let hop = Hop::of(&origin.clone().with_header("traceparent", last)).unwrap();
        assert_eq!((hop.span, hop.flags), (0x1111_1111_1111_1111, 0));
        assert_eq!(Hop::of(&origin).unwrap().flags, 1);
        let marked = hop.mark(Envelope::new("t", "/s"));
        assert_eq!(marked.headers().get("traceparent"), Some(last.as_bytes()));
    }
}
