//! CloudEvents 1.0 on the wire: structured mode (JSON) and binary mode (headers), as brokers carry them.

#[cfg(any(feature = "kafka", feature = "nats", feature = "redis"))]
mod binary;
mod json;

#[cfg(any(feature = "kafka", feature = "nats", feature = "redis"))]
pub(crate) use self::binary::{Binding, read, write};
pub use self::json::from_json;
