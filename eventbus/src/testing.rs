//! A user's services in process, on the in-memory transport: publish, settle, look at what happened.
//!
//! ```
//! # use eventbus::{Emit, Event, Failure, Service, Topic, Typed, testing::TestBus};
//! # use serde::{Serialize, Deserialize};
//! # #[derive(Debug, PartialEq, Event, Serialize, Deserialize)]
//! # #[event(type = "shop.order.placed", version = 1, key = order_id)]
//! # struct OrderPlaced { order_id: u64 }
//! # #[derive(Debug, PartialEq, Event, Serialize, Deserialize)]
//! # #[event(type = "shop.stock.reserved", version = 1, key = order_id)]
//! # struct StockReserved { order_id: u64 }
//! async fn reserve(Typed(order): Typed<OrderPlaced>) -> Result<Emit<StockReserved>, Failure> {
//!     Ok(Emit(StockReserved { order_id: order.order_id }))
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (orders, stock) = (Topic::new("orders")?, Topic::new("stock")?);
//! let test = TestBus::new();
//! let service = Service::new("catalog").on(orders.clone(), reserve).emit_to(stock.clone());
//! let running = service.start(test.bus()).await?;
//! test.publish(&orders, &OrderPlaced { order_id: 7 }).await?;
//! test.settle().await?;
//! assert_eq!(test.published::<StockReserved>(&stock).await?, [StockReserved { order_id: 7 }]);
//! assert_eq!(test.runs("reserve").len(), 1);
//! # running.stop().await?;
//! # Ok(()) }
//! ```
//! On a paused clock (`#[tokio::test(start_paused = true)]`) retries cost no time at all.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::bus::Bus;
use crate::envelope::Envelope;
use crate::error::{Class, Error, Result};
use crate::event::Message;
use crate::extract::Context;
use crate::failure::Failure;
use crate::name::Topic;
use crate::observer::{Observer, Watched};
use crate::transport::memory::{Memory, Options};
use crate::transport::{Receipt, Transport};

/// How long [`TestBus::settle`] waits at most.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it looks again without being rung: for services whose timers ring nobody.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Events of a partition that the test can look back on.
const HISTORY: usize = 1_000_000;
/// Runs that the story of a failure tells.
const TOLD: usize = 40;

/// How a run of a handler ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// It succeeded, and its outputs are stored.
    Done,
    /// It failed.
    Failed {
        /// How the failure is treated.
        class: Class,
        /// Its code.
        code: String,
        /// Its words.
        message: String,
    },
}

/// One run of a handler.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Run {
    /// The service.
    pub service: String,
    /// The handler's name.
    pub handler: &'static str,
    /// The topic.
    pub topic: Topic,
    /// What it was given.
    pub event: Envelope,
    /// Which delivery it was, from 1.
    pub attempt: u32,
    /// How it ended.
    pub ended: Ended,
}

/// An in-memory bus that remembers what the services on it did.
///
/// Services are started on [`bus`](Self::bus) as on any other; with replay on, they park and hold as they do in
/// production.
pub struct TestBus {
    bus: Bus,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    runs: Mutex<Vec<Run>>,
    subscriptions: Mutex<Vec<Weak<dyn Watched>>>,
    changed: Notify,
}

impl Observer for Seen {
    fn joined(&self, subscription: Arc<dyn Watched>) {
        self.subscriptions.lock().push(Arc::downgrade(&subscription));
    }

    fn ran(&self, handler: &'static str, context: &Context, failure: Option<&Failure>) {
        let ended = failure.map_or(Ended::Done, |failure| Ended::Failed {
            class: failure.class(),
            code: failure.code().to_owned(),
            message: failure.message().to_owned(),
        });
        self.runs.lock().push(Run {
            service: context.group().to_string(),
            handler,
            topic: context.topic().clone(),
            event: context.envelope().clone(),
            attempt: context.attempt().map_or(1, u32::from),
            ended,
        });
        self.changed.notify_waiters();
    }

    fn settled(&self) {
        self.changed.notify_waiters();
    }
}

/// What is still open, and what happened until then. Its `Debug` is for people, as a failing test shows it.
pub struct Unsettled {
    story: String,
}

impl fmt::Display for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.story)
    }
}

impl fmt::Debug for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.story)
    }
}

impl std::error::Error for Unsettled {}

impl Default for TestBus {
    fn default() -> Self {
        Self::new()
    }
}

impl TestBus {
    /// Opens an empty bus.
    pub fn new() -> Self {
        Self::over(Memory::new(Options { replay: HISTORY, ..Options::default() }))
    }

    /// Watches services on any other transport that has an admin and replay.
    pub fn over(transport: impl Transport) -> Self {
        let seen = Arc::<Seen>::default();
        Self { bus: Bus::new(transport).with_observer(seen.clone()), seen }
    }

    /// Returns the bus: start services on it.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Publishes one message.
    ///
    /// # Errors
    /// As [`TypedPublisher::publish`](crate::TypedPublisher::publish).
    ///
    /// # Cancellation
    /// It may or may not be published.
    pub async fn publish<M: Message>(&self, topic: &Topic, message: &M) -> Result<Receipt> {
        self.bus.publisher().await?.publish(topic, message).await
    }

    /// Waits until nothing is in flight: every group has settled every event, and nothing that is parked
    /// waits for a time. Keys that are held for an operator are at rest.
    ///
    /// # Errors
    /// What is open after 30 s, and what ran until then.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn settle(&self) -> Result<(), Unsettled> {
        let settled = self.until(async || self.open().await.is_ok_and(|open| open.is_empty()));
        if settled.await {
            return Ok(());
        }
        let open = self.open().await.unwrap_or_else(|error| vec![error.to_string()]);
        Err(self.story(&format!("not settled after {PATIENCE:?}: {}", open.join(", "))))
    }

    /// Waits until a topic holds so many messages of a type, for services that also act by the clock, and
    /// returns them.
    ///
    /// # Errors
    /// What is there after 30 s, and what ran until then.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn wait_for<M: Message>(&self, topic: &Topic, n: usize) -> Result<Vec<M>, Unsettled> {
        let found = async || self.published::<M>(topic).await.unwrap_or_default();
        if self.until(async || found().await.len() >= n).await {
            return Ok(found().await);
        }
        let n_found = found().await.len();
        Err(self.story(&format!("{n_found} of {n} {} in {topic} after {PATIENCE:?}", M::TYPE)))
    }

    async fn until(&self, holds: impl AsyncFn() -> bool) -> bool {
        let reached = async {
            loop {
                let mut changed = std::pin::pin!(self.seen.changed.notified());
                changed.as_mut().enable();
                // What moves while we look is seen at the second look.
                if holds().await && holds().await {
                    return;
                }
                drop(tokio::time::timeout(LOOK_EVERY, changed).await);
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.is_ok()
    }

    /// What is in flight, in words.
    async fn open(&self) -> Result<Vec<String>> {
        let mut open = Vec::new();
        let admin = self.bus.transport().admin();
        for group in admin.ok_or_else(|| Error::config("a test bus needs an admin"))?.groups(None).await? {
            // The position in a parking log is its low-water mark, and says nothing of what is open.
            if group.lag > 0 && !group.topic.as_str().ends_with(".parked") {
                open.push(format!("{} events of {} for {}", group.lag, group.topic, group.group));
            }
        }
        let subscriptions: Vec<_> = self.seen.subscriptions.lock().iter().filter_map(Weak::upgrade).collect();
        for subscription in subscriptions {
            let n_waiting = subscription.n_waiting();
            if n_waiting > 0 {
                open.push(format!("{n_waiting} parked events of {}", subscription.name()));
            }
        }
        Ok(open)
    }

    /// Returns the messages of one type and version in a topic, by partition and place.
    ///
    /// # Errors
    /// What reading reports; a topic that does not exist holds nothing.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn published<M: Message>(&self, topic: &Topic) -> Result<Vec<M>> {
        let events = self.events(topic).await?;
        Ok(events.iter().filter_map(|event| event.decode().ok()).collect())
    }

    /// Returns the events of a topic, by partition and place.
    ///
    /// # Errors
    /// As [`published`](Self::published).
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn events(&self, topic: &Topic) -> Result<Vec<Envelope>> {
        let admin = self.bus.transport().admin().ok_or_else(|| Error::config("a test bus needs an admin"))?;
        let mut events = Vec::new();
        for known in admin.topic(topic).await?.map(|info| info.partitions).unwrap_or_default() {
            let records = admin.read(topic, known.partition, known.first, usize::MAX).await?;
            events.extend(records.iter().filter_map(|record| record.content.envelope().cloned()));
        }
        Ok(events)
    }

    /// Returns the dead letters of a topic.
    ///
    /// # Errors
    /// As [`published`](Self::published).
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn dead_letters(&self, topic: &Topic) -> Result<Vec<Envelope>> {
        self.events(&topic.dead_letters()?).await
    }

    /// Returns the runs of a handler, in the order in which they ended.
    pub fn runs(&self, handler: &str) -> Vec<Run> {
        self.seen.runs.lock().iter().filter(|run| run.handler == handler).cloned().collect()
    }

    /// Tells what happened: a heading, and a line for each of the last runs.
    pub fn story(&self, heading: &str) -> Unsettled {
        let runs = self.seen.runs.lock();
        let mut story = format!("{heading}\n");
        let skipped = runs.len().saturating_sub(TOLD);
        if skipped > 0 {
            story.push_str(&format!("  … {skipped} earlier runs\n"));
        }
        for run in runs.iter().skip(skipped) {
            let key = run.event.key().map_or_else(|| "-".to_owned(), |key| key.to_string());
            let ended = match &run.ended {
                Ended::Done => "done".to_owned(),
                Ended::Failed { class, code, message } => format!("{class:?} {code}: {message}"),
            };
            let Run { service, handler, topic, attempt, .. } = run;
            let event_type = run.event.event_type();
            story.push_str(&format!(
                "  {topic} ▶ {service}.{handler}  {event_type} key {key} attempt {attempt}  {ended}\n"
            ));
        }
        Unsettled { story }
    }
}

impl fmt::Debug for TestBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestBus")
            .field("bus", &self.bus)
            .field("n_runs", &self.seen.runs.lock().len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Meta, Service};

    #[tokio::test(start_paused = true)]
    async fn what_is_open_is_told_with_its_story() {
        async fn late(Meta(_): Meta) -> Result<(), Failure> {
            Err(Failure::transient("bank.down", "no answer").retry_after(Duration::from_secs(3_600)))
        }
        let (test, orders) = (TestBus::new(), Topic::new("orders").unwrap());
        let running = Service::new("billing").on(orders.clone(), late).with_state(()).start(test.bus());
        let running = running.await.unwrap();
        let publisher = test.bus().publisher().await.unwrap();
        let event = Envelope::new("shop.paid", "/t").with_key("7");
        publisher.publish_envelope(&orders, event).await.unwrap();
        let story = format!("{:?}", test.settle().await.unwrap_err());
        assert_eq!(
            story,
            "not settled after 30s: 1 events of orders for billing
  orders ▶ billing.late  shop.paid key 7 attempt 1  Transient bank.down: no answer
"
        );
        drop(running);
    }
}
