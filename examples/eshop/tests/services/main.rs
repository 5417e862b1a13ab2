//! Single services of the shop on a test bus: what they publish, how often they run, what they refuse.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

mod holes;

use std::time::Duration;

use eshop::contracts::{
    CommitStock, OrderPaymentFailed, OrderPaymentSucceeded, OrderStatusChangedToAwaitingValidation,
    OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToStockConfirmed, OrderStockConfirmed, OrderStockRejected, Topics,
    UserCheckoutAccepted,
};
use eshop::db::Tables as _;
use eshop::shop::{Desk, Shop};
use eshop::{basket, catalog, grace, notification, ordering, payment};
use eventbus::testing::{Ended, TestBus};
use eventbus::{Envelope, Event, Running, Topic};
use outbox::Relaying;
use sqlx::Sqlite;

/// A shop whose services have a file each, on a test's bus.
struct Open {
    test: TestBus,
    topics: Topics,
    shop: Shop<Sqlite>,
    relays: Vec<Relaying>,
    _folder: tempfile::TempDir,
}

async fn open() -> Open {
    let mut open = open_over(TestBus::new()).await;
    open.relay().await;
    open
}

/// Without a relay: what is published stays where it is.
async fn open_over(test: TestBus) -> Open {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/{{service}}.db", folder.path().display());
    let shop = Shop::open(&url, Duration::ZERO).await.unwrap();
    Open { test, topics: Topics::new().unwrap(), shop, relays: Vec::new(), _folder: folder }
}

impl Open {
    async fn relay(&mut self) {
        self.relays = self.shop.relay(self.test.bus(), Duration::from_secs(5)).await.unwrap();
    }

    /// Starts all services.
    async fn services(&self) -> Vec<Running> {
        let (bus, shop) = (self.test.bus(), &self.shop);
        vec![
            basket::start(bus, &shop.basket).await.unwrap(),
            ordering::start(bus, &shop.ordering).await.unwrap(),
            ordering::start_shipping(bus, &shop.ordering).await.unwrap(),
            grace::start(bus, &shop.grace).await.unwrap(),
            catalog::start(bus, &shop.catalog).await.unwrap(),
            payment::start(bus, &shop.payment).await.unwrap(),
            notification::start(bus, &shop.notification).await.unwrap(),
        ]
    }

    /// Waits until the topic has so many events of a type, and no service has anything to do.
    async fn until<E: Event>(&self, topic: &Topic, n_events: usize) -> Vec<E> {
        let events = self.test.wait_for::<E>(topic, n_events).await.unwrap();
        self.test.settle().await.unwrap();
        events
    }

    async fn close(self) {
        for relay in self.relays {
            relay.stop().await;
        }
    }
}

async fn count(desk: &Desk<Sqlite>, sql: &'static str) -> u64 {
    desk.look().await.unwrap().count(sql).await.unwrap()
}

/// The same event twice, as a redelivery would be.
async fn publish_twice<E: Event>(test: &TestBus, topic: &eventbus::Topic, event: &E) {
    let envelope = Envelope::of(event, "/test").unwrap();
    let publisher = test.bus().publisher().await.unwrap();
    publisher.publish_envelope(topic, envelope.clone()).await.unwrap();
    publisher.publish_envelope(topic, envelope).await.unwrap();
}

#[tokio::test]
async fn payment_authorises_once_and_declines_by_its_rule() {
    let open = open().await;
    let (test, shop) = (&open.test, &open.shop);
    let running = payment::start(test.bus(), &shop.payment).await.unwrap();
    let topics = &open.topics;
    for order in [1, 5] {
        let event = OrderStatusChangedToStockConfirmed { order, buyer: 9, amount_cents: 1_250 };
        publish_twice(test, &topics.stock_confirmed, &event).await;
    }
    // A repetition is passed over: it says nothing again, and takes no money.
    let paid = open.until::<OrderPaymentSucceeded>(&topics.payment, 1).await;
    assert_eq!(paid, [OrderPaymentSucceeded { order: 1 }]);
    let declined = open.until::<OrderPaymentFailed>(&topics.payment, 1).await;
    assert_eq!(declined, [OrderPaymentFailed { order: 5 }]);
    assert_eq!(test.events(&topics.payment).await.unwrap().len(), 2, "{:?}", test.story("answers"));
    assert_eq!((running.counts().handled, running.counts().duplicates), (2, 2));
    running.stop().await.unwrap();
    open.close().await;
}

#[tokio::test]
async fn catalog_holds_what_it_has_and_says_what_is_missing() {
    let open = open().await;
    let (test, shop) = (&open.test, &open.shop);
    catalog::stock_up(&shop.catalog, &[(3, 10)]).await.unwrap();
    let running = catalog::start(test.bus(), &shop.catalog).await.unwrap();
    let topics = &open.topics;
    for (order, quantity) in [(1, 6), (2, 6), (3, 4)] {
        let event = OrderStatusChangedToAwaitingValidation { order, product: 3, quantity };
        test.publish(&topics.waiting, &event).await.unwrap();
        test.settle().await.unwrap();
    }
    test.publish(&topics.catalog_commands, &CommitStock { order: 1 }).await.unwrap();
    let mut held = open.until::<OrderStockConfirmed>(&topics.stock, 2).await;
    held.sort_by_key(|held| held.order);
    assert_eq!(held, [OrderStockConfirmed { order: 1 }, OrderStockConfirmed { order: 3 }]);
    let rejected = open.until::<OrderStockRejected>(&topics.stock, 1).await;
    assert_eq!(rejected, [OrderStockRejected { order: 2, product: 3, missing: 2 }]);
    assert_eq!(count(&shop.catalog, "SELECT ord FROM catalog_hold WHERE state = 'sold'").await, 1);
    running.stop().await.unwrap();
    open.close().await;
}

#[tokio::test]
async fn a_checkout_that_nobody_can_read_is_a_dead_letter_and_no_order() {
    let open = open().await;
    let (test, shop) = (&open.test, &open.shop);
    let running = ordering::start(test.bus(), &shop.ordering).await.unwrap();
    let good = UserCheckoutAccepted { order: 1, buyer: 7, product: 1, quantity: 1, amount_cents: 100 };
    let bad = Envelope::of(&good, "/test").unwrap().with_key("8").with_payload("{\"order\":");
    let publisher = test.bus().publisher().await.unwrap();
    publisher.publish_envelope(&open.topics.checkouts, bad.clone()).await.unwrap();
    test.publish(&open.topics.checkouts, &good).await.unwrap();
    test.settle().await.unwrap();
    let letters = test.dead_letters(&open.topics.checkouts).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].id(), letters[0].payload()), (bad.id(), bad.payload()));
    let runs = test.runs("checkout");
    assert_eq!(
        runs.iter().filter(|run| run.ended == Ended::Done).count(),
        1,
        "{:?}",
        test.story("checkouts")
    );
    // Later checkouts of the same buyer wait for an operator; those of others do not.
    assert_eq!(running.counts().held, 1);
    running.stop().await.unwrap();
    open.close().await;
}

#[tokio::test]
async fn every_order_ends_paid_and_shipped_or_cancelled() {
    let open = open().await;
    let (test, shop) = (&open.test, &open.shop);
    catalog::stock_up(&shop.catalog, &[(1, 6), (2, 1)]).await.unwrap();
    let services = open.services().await;
    let order = async |order: u64, product: u32| {
        let (buyer, quantity, amount_cents) = (order % 3, 1, 500);
        let event = UserCheckoutAccepted { order, buyer, product, quantity, amount_cents };
        test.publish(&open.topics.checkouts, &event).await.unwrap();
    };
    // Seven orders for six pieces: one goes empty. The provider declines order 5, which had the only other one.
    for (number, product) in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 1), (7, 1), (8, 1)] {
        order(number, product).await;
    }
    open.until::<OrderStatusChangedToShipped>(&open.topics.status, 6).await;
    open.until::<OrderStatusChangedToCancelled>(&open.topics.status, 2).await;
    // The piece that order 5 gave back is for sale again.
    order(9, 2).await;
    let shipped = open.until::<OrderStatusChangedToShipped>(&open.topics.status, 7).await;
    let paid = test.published::<OrderStatusChangedToPaid>(&open.topics.paid).await.unwrap();
    assert_eq!((shipped.len(), paid.len()), (7, 7), "{:?}", test.story("orders"));
    for service in services {
        service.stop().await.unwrap();
    }
    open.close().await;
}
