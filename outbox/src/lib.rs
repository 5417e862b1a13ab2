//! Events that are published if and only if their transaction commits, and handlers whose effects happen once.
//!
//! A service that writes to its database and then publishes loses events when it crashes in between; one that publishes
//! first tells of what never happened. Here an event is a row of the same transaction, and a [`Relay`] publishes rows: no
//! event is lost, none is a ghost, and events of one key keep their order. On the other side, [`Tx`] makes a handler's
//! writes, what it publishes and the memory of having handled the event one transaction.
//!
//! # A tour
//! - [`Outbox`] publishes inside a transaction: [`Outbox::begin`] starts one, [`Outbox::publish`] takes yours.
//! - [`Relay`] sends what is stored to a bus: in the service, or as a process of its own; any number at once.
//! - [`Inbox`] is the state of handlers that take a [`Tx`], or an [`Intent`] if they call somebody else.
//! - [`Operator`] looks into it and repairs it; `eventctl outbox` does so from a terminal.
//! - [`Store`] is what a relay needs of a database; `outbox::conformance!` (feature `conformance`) proves one.
//!
//! ```
//! # use eventbus::{Event, Failure, Service, Topic, Typed};
//! # use serde::{Deserialize, Serialize};
//! use outbox::{Inbox, Outbox, Relay, Tx};
//! use sqlx::Sqlite;
//!
//! #[derive(Event, Serialize, Deserialize)]
//! #[event(type = "shop.order.placed", version = 1, key = order_id)]
//! struct OrderPlaced { order_id: i64 }
//!
//! async fn bill(mut tx: Tx<Sqlite>, Typed(order): Typed<OrderPlaced>) -> Result<(), Failure> {
//!     sqlx::query("INSERT INTO bills VALUES (?)").bind(order.order_id).execute(&mut *tx).await?;
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let file = folder.path().join("shop.db");
//! # let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file).create_if_missing(true);
//! # let pool = sqlx::SqlitePool::connect_with(options).await?;
//! # sqlx::query("CREATE TABLE orders (id INTEGER)").execute(&pool).await?;
//! # sqlx::query("CREATE TABLE bills (id INTEGER)").execute(&pool).await?;
//! let outbox = Outbox::new(pool.clone());
//! outbox.migrate().await?;
//! let bus = eventbus::connect("memory://").await?;
//! let orders = Topic::new("orders")?;
//! let service = Service::new("billing").on(orders.clone(), bill).with_state(Inbox::new(&outbox));
//! let service = service.start(&bus).await?;
//! let relay = Relay::new(&outbox).start(&bus).await?;
//!
//! let mut tx = outbox.begin().await?;
//! sqlx::query("INSERT INTO orders VALUES (7)").execute(&mut *tx).await?;
//! tx.publish(&orders, &OrderPlaced { order_id: 7 })?;
//! tx.commit().await?; // The order and its event, or neither.
//! # while service.counts().handled == 0 { tokio::time::sleep(std::time::Duration::from_millis(5)).await; }
//! # relay.stop().await; service.stop().await?;
//! # let bills: i64 = sqlx::query_scalar("SELECT count(*) FROM bills").fetch_one(&pool).await?;
//! # assert_eq!(bills, 1);
//! # Ok(()) }
//! ```

#[cfg(not(any(feature = "postgres", feature = "sqlite")))]
compile_error!("outbox needs a database: enable its feature \"postgres\" or \"sqlite\"");

mod any;
mod backend;
mod bell;
#[cfg(feature = "conformance")]
pub mod conformance;
mod direct;
mod doorbell;
mod fitness;
mod head;
mod inbox;
mod namespace;
mod operator;
#[allow(clippy::module_inception, reason = "the crate is named after its main type")]
mod outbox;
#[cfg(feature = "postgres")]
mod postgres;
mod recall;
mod relay;
mod row;
#[cfg(feature = "sqlite")]
mod sqlite;
mod store;
mod transaction;

pub use self::any::AnyOutbox;
pub use self::backend::Backend;
pub use self::inbox::{Inbox, Intent, Memory, Tx};
pub use self::namespace::Namespace;
pub use self::operator::{Entry, Operator, RelaySeen, Status, Stuck, Which};
pub use self::outbox::{Options, Outbox, Ticket};
pub use self::recall::{ConsumerSeen, Handled, InboxOperator, Progress, known_by};
pub use self::relay::{Counts, Permanent, Relay, Relaying, State};
pub use self::row::{Pending, RowId, Shard};
pub use self::store::{Blocked, Claim, Leased, Store};
pub use self::transaction::Transaction;

#[cfg(all(doctest, feature = "sqlite"))]
#[doc = include_str!("../README.md")]
struct Readme;
