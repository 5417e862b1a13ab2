//! Brokers behind one contract.
//!
//! Publish events, consume them in groups with order per key, replay them; on memory or one SQLite
//! file with nothing installed, and on other brokers by changing an address. What a transport can do
//! is data ([`Capabilities`]), and a conformance suite proves it in both directions.
//!
//! # A tour
//! - [`Envelope`]: CloudEvents 1.0 attributes, headers, a body. [`Event`] and [`Command`] give a type
//!   its wire name and version; [`codec`] writes the body.
//! - [`connect`] opens a [`Bus`] by its address; [`Bus::publisher`] publishes by type.
//! - [`transport`] is the contract for brokers, in three traits: [`Transport`], [`Publisher`], [`Consumer`].
//! - [`Admin`] declares topics, looks at groups and reads ranges.
//! - [`Service`] runs async functions as handlers: order by key, retry, parking, dead letters, draining; its table
//!   lists every bound with the option that sets it.
//! - [`Requests`] sends commands that are answered.
//! - `testing` (feature) runs a service in process and says what it did; `conformance` (feature) proves a transport.
//!
//! ```
//! # use eventbus::{Event, Topic};
//! # use serde::{Serialize, Deserialize};
//! #[derive(Event, Serialize, Deserialize)]
//! #[event(type = "shop.order.placed", version = 1, key = order_id)]
//! struct OrderPlaced { order_id: u64 }
//!
//! # #[cfg(feature = "memory")]
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> eventbus::Result<()> {
//! let bus = eventbus::connect("memory://").await?;
//! let receipt = bus.publisher().await?.publish(&Topic::new("orders")?, &OrderPlaced { order_id: 7 }).await?;
//! println!("stored in partition {}", receipt.partition);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "memory"))] fn main() {}
//! ```

pub mod admin;
mod backoff;
mod batch;
mod bus;
pub mod capability;
#[cfg(feature = "cloudevents")]
pub mod cloudevents;
pub mod codec;
#[cfg(feature = "conformance")]
pub mod conformance;
mod driver;
pub mod envelope;
mod error;
mod event;
mod extract;
mod failure;
pub mod fitness;
mod handler;
pub mod header;
mod id;
mod name;
mod observer;
mod outcome;
mod parking;
pub mod partition;
mod request;
mod service;
#[cfg(feature = "sqlx")]
pub mod sql;
mod subscription;
#[cfg(feature = "testing")]
pub mod testing;
mod text;
pub mod time;
pub mod transport;
mod unit;
pub mod url;
mod versions;

pub use eventbus_derive::{Command, Event};

pub use self::admin::{Admin, Offset, TopicSpec};
pub use self::backoff::Retry;
pub use self::batch::{Batch, BatchHandler, ExtractBatch, Gathered, IntoOutcomes, Item, Outcomes};
pub use self::bus::{Bus, TypedPublisher, connect, schemes};
pub use self::capability::Capabilities;
pub use self::driver::{Counts, Health, HealthState, HeldKey, Monitor, ParkedKeys, Running, shutdown_signal};
pub use self::envelope::Envelope;
pub use self::error::{Class, Error, ErrorKind, Result};
pub use self::event::{Command, Event, Message};
pub use self::extract::{Attempt, Beginning, Context, Deadline, Extract, FromState, Meta, Raw, State, Typed};
pub use self::failure::Failure;
pub use self::handler::Handler;
pub use self::header::Headers;
pub use self::id::EventId;
pub use self::name::{Group, Key, MAX_GROUP_BYTES, MAX_KEY_BYTES, MAX_TOPIC_BYTES, Topic};
pub use self::outcome::{Emit, Emits, IntoOutcome, Outcome, Reply};
pub use self::parking::{Followers, Parking, Waits};
pub use self::partition::PartitionId;
pub use self::request::Requests;
pub use self::service::{Guard, Service};
pub use self::subscription::{Audience, Start, Subscription};
pub use self::text::Text;
pub use self::transport::{
    Confirm, Consumer, Content, Delivery, InFile, Polled, Publisher, Receipt, Receipts, Resolver, Settle,
    Settled, Token, Transport, Undecodable,
};
pub use self::unit::Unit;
pub use self::versions::OtherVersions;

// The derives name this crate by its own path; tests inside it are users too.
#[cfg(test)]
#[expect(unused_extern_crates, reason = "used by the expansion of the derives")]
extern crate self as eventbus;
