//! CloudEvents 1.0 on the wire: structured mode (JSON) and binary mode (headers), as brokers carry them.

#[cfg(any(feature = "kafka", feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod binary;
mod json;
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
pub(crate) mod percent;

#[cfg(any(feature = "kafka", feature = "nats", feature = "rabbitmq", feature = "redis"))]
pub(crate) use self::binary::{Binding, read, write};
pub use self::json::from_json;
