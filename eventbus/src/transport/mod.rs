//! THE CONTRACT: what a broker must do to carry events, and the plain data that crosses the seam.
//!
//! A transport never sees handlers, routers or layers. It is proven by one macro line:
//! `eventbus::conformance!`.
//!
//! ```text
//!  publisher ── enqueue ──▶ topic ── poll ──▶ consumer
//!      ▲                                         │
//!      └──────────── Confirm          settle ◀───┘
//! ```

mod confirm;
mod delivery;
mod in_file;

#[cfg_attr(
    not(all(
        feature = "memory",
        feature = "sqlite",
        feature = "nats",
        feature = "postgres",
        feature = "rabbitmq",
        feature = "redis"
    )),
    allow(
        dead_code,
        unreachable_pub,
        unused_imports,
        reason = "what of it is used depends on the transports that are built"
    )
)]
mod kit;

#[cfg(feature = "kafka")]
pub mod kafka;
#[cfg(feature = "memory")]
pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "sqlite")]
pub mod sqlite;

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

pub use self::confirm::{Confirm, Receipt, Receipts, Resolver};
pub use self::delivery::{Content, Delivery, Polled, Settle, Settled, Token, Undecodable};
pub use self::in_file::{InFile, Place, SqlValue, Statements};
#[cfg(any(
    feature = "kafka",
    feature = "nats",
    feature = "postgres",
    feature = "rabbitmq",
    feature = "redis"
))]
pub use self::kit::tls::TlsFiles;
use crate::admin::Admin;
use crate::capability::Capabilities;
use crate::envelope::Envelope;
use crate::error::Result;
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::Subscription;

/// A broker, or an embedded store, behind one contract.
///
/// Values are shared behind an `Arc` and used from many tasks at once. No method is provided by
/// default: a wrapper that forgets one does not compile.
#[async_trait]
pub trait Transport: Debug + Send + Sync + 'static {
    /// Returns what this value can do: constant from before the first use until after the last.
    fn capabilities(&self) -> Capabilities;

    /// Opens a publisher. Publishers of one transport do not share a fate: closing one leaves the others.
    ///
    /// # Errors
    /// Transient if the broker cannot be reached; [`Closed`](crate::ErrorKind::Closed) after [`close`](Self::close).
    ///
    /// # Cancellation
    /// Nothing stays open.
    async fn publisher(&self) -> Result<Arc<dyn Publisher>>;

    /// Joins a group, or starts a broadcast. When it returns, an event published from then on is not missed.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) before any input or output if the subscription asks
    /// for more than [`capabilities`](Self::capabilities) claims; [`NotFound`](crate::ErrorKind::NotFound)
    /// for a topic that does not exist, where topics are not created on use.
    ///
    /// # Cancellation
    /// The member may have joined; it leaves at once, and what it was handed returns.
    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>>;

    /// Returns the administration; `None` exactly where the capability is not claimed.
    fn admin(&self) -> Option<&dyn Admin>;

    /// Returns how events are stored by transactions of others on the same SQLite file; `None` for every other broker, and for
    /// a wrapper that does something with what is published.
    fn in_file(&self) -> Option<&dyn InFile>;

    /// Closes this value with everything that was opened from it, and waits for it. May be repeated.
    ///
    /// # Cancellation
    /// Closing goes on; a repeated call waits for it.
    async fn close(&self) -> Result<()>;
}

/// Accepts events in call order and confirms each when it is stored.
///
/// Publishing has two steps, so that order is the order of calls, a window of confirms can be in
/// flight without a task each, and a failure belongs to one event of a batch.
#[async_trait]
pub trait Publisher: Debug + Send + Sync {
    /// Accepts a batch behind everything accepted earlier; waits while the transport is full.
    ///
    /// The [`Confirm`] resolves to one receipt or error for each event, in the batch's order.
    /// Reserved user headers are dropped.
    ///
    /// # Errors
    /// Nothing was accepted: [`Closed`](crate::ErrorKind::Closed), or [`TooLarge`](crate::ErrorKind::TooLarge)
    /// for a batch above what the topic may ever hold. What is wrong with one event (too
    /// large, invalid, unroutable) is reported by its place in the confirm, and the others go on; on
    /// an ordered transport the later events of the failed one's key fail too.
    ///
    /// # Cancellation
    /// Before it returns, dropping the future means that none of the batch is published. Dropping the
    /// confirm afterwards loses only the knowledge.
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm>;

    /// Waits until every earlier confirm is resolved, whatever its outcome.
    ///
    /// # Cancellation
    /// Safe; nothing is undone.
    async fn flush(&self) -> Result<()>;

    /// Flushes and closes. Later calls to [`enqueue`](Self::enqueue) are [`Closed`](crate::ErrorKind::Closed).
    /// May be repeated.
    ///
    /// # Cancellation
    /// It is closed all the same, and what was accepted is still published.
    async fn close(&self) -> Result<()>;
}

/// One member of a group, or one broadcast instance.
///
/// [`poll`](Self::poll) and [`settle`](Self::settle) run side by side. Dropping the value without
/// [`close`](Self::close) loses nothing: what was not settled is delivered again.
#[async_trait]
pub trait Consumer: Debug + Send + Sync {
    /// Waits for deliveries, at most `max` and never more than the window leaves room for, or for
    /// news of partitions. One call waits at a time; a second one is queued behind it.
    ///
    /// # Errors
    /// Transient: poll again. [`DataLoss`](crate::ErrorKind::DataLoss): events were removed unread; the
    /// next poll goes on behind the hole. [`NotFound`](crate::ErrorKind::NotFound): the topic was deleted.
    ///
    /// # Cancellation
    /// Safe at every point: no delivery is lost or waits for its lease.
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled>;

    /// Settles deliveries; when it returns, that is as durable as the transport's confirms.
    ///
    /// A token may be settled twice. Tokens whose delivery is no longer ours come back in
    /// [`Settled::lost`] and touch no other delivery.
    ///
    /// # Errors
    /// [`Closed`](crate::ErrorKind::Closed), or transient: nothing is settled, repeat.
    ///
    /// # Cancellation
    /// The outcomes may or may not be settled; repeat them.
    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled>;

    /// Hands back partitions that [`Polled::Revoking`] named, when their deliveries are settled. What
    /// is still unsettled goes to the next owner.
    ///
    /// # Cancellation
    /// They may or may not be handed back: repeat it, or let the deadline take them.
    async fn release(&self, partitions: &[PartitionId]) -> Result<()>;

    /// Extends the lease of deliveries to `lease` from now, for slow handlers.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where there is no lease to extend.
    ///
    /// # Cancellation
    /// Leases may or may not be extended: repeat it.
    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled>;

    /// Leaves the group and hands over what is unsettled, without waiting for it. A poll in progress
    /// returns [`Polled::Closed`]; a settle in progress is not lost. May be repeated.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) if the broker did not answer by `deadline`; the member is gone all the same.
    ///
    /// # Cancellation
    /// The member leaves all the same.
    async fn close(&self, deadline: Instant) -> Result<()>;
}
