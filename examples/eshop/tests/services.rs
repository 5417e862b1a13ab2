//! Single services of the shop on a test bus: what they publish, how often they run, what they refuse.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

use std::time::Duration;

use eshop::contracts::{
    CommitStock, OrderPaymentFailed, OrderPaymentSucceeded, OrderStatusChangedToAwaitingValidation,
    OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToStockConfirmed, OrderStockConfirmed, OrderStockRejected, UserCheckoutAccepted,
};
use eshop::shop::Shop;
use eshop::{basket, catalog, notification, ordering, payment, timers};
use eventbus::testing::{Ended, TestBus};
use eventbus::{Envelope, Event};

fn shop() -> Shop {
    Shop::open(None, Duration::ZERO).unwrap()
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
    let (test, shop) = (TestBus::new(), shop());
    let running = payment::start(test.bus(), &shop).await.unwrap();
    let topics = &shop.topics;
    for order in [1, 5] {
        let event = OrderStatusChangedToStockConfirmed { order, buyer: 9, amount_cents: 1_250 };
        publish_twice(&test, &topics.stock_confirmed, &event).await;
    }
    test.settle().await.unwrap();
    // A repetition says the same under the same id, and takes no money.
    let answers = test.events(&topics.payment).await.unwrap();
    let ids: std::collections::HashSet<_> = answers.iter().map(Envelope::id).collect();
    assert_eq!((answers.len(), ids.len()), (4, 2), "{:?}", test.story("answers"));
    let paid = test.published::<OrderPaymentSucceeded>(&topics.payment).await.unwrap();
    assert!(paid.iter().all(|paid| paid.order == 1));
    let declined = test.published::<OrderPaymentFailed>(&topics.payment).await.unwrap();
    assert!(declined.iter().all(|declined| declined.order == 5));
    assert_eq!((test.runs("pay").len(), shop.n_duplicates()), (4, 2));
    running.stop().await.unwrap();
}

#[tokio::test]
async fn catalog_holds_what_it_has_and_says_what_is_missing() {
    let (test, shop) = (TestBus::new(), shop());
    shop.store.run(|tables| catalog::stock_up(tables, &[(3, 10)])).await.unwrap();
    let running = catalog::start(test.bus(), &shop).await.unwrap();
    let topics = &shop.topics;
    for (order, quantity) in [(1, 6), (2, 6), (3, 4)] {
        let event = OrderStatusChangedToAwaitingValidation { order, product: 3, quantity };
        test.publish(&topics.waiting, &event).await.unwrap();
        test.settle().await.unwrap();
    }
    test.publish(&topics.catalog_commands, &CommitStock { order: 1 }).await.unwrap();
    test.settle().await.unwrap();
    let mut held: Vec<_> = test.published::<OrderStockConfirmed>(&topics.stock).await.unwrap();
    held.sort_by_key(|held| held.order);
    assert_eq!(held, [OrderStockConfirmed { order: 1 }, OrderStockConfirmed { order: 3 }]);
    let rejected = test.published::<OrderStockRejected>(&topics.stock).await.unwrap();
    assert_eq!(rejected, [OrderStockRejected { order: 2, product: 3, missing: 2 }]);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_checkout_that_nobody_can_read_is_a_dead_letter_and_no_order() {
    let (test, shop) = (TestBus::new(), shop());
    let running = ordering::start(test.bus(), &shop).await.unwrap();
    let good = UserCheckoutAccepted { order: 1, buyer: 7, product: 1, quantity: 1, amount_cents: 100 };
    let bad = Envelope::of(&good, "/test").unwrap().with_key("8").with_payload("{\"order\":");
    let publisher = test.bus().publisher().await.unwrap();
    publisher.publish_envelope(&shop.topics.checkouts, bad.clone()).await.unwrap();
    test.publish(&shop.topics.checkouts, &good).await.unwrap();
    test.settle().await.unwrap();
    let letters = test.dead_letters(&shop.topics.checkouts).await.unwrap();
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
}

#[tokio::test]
async fn every_order_ends_paid_and_shipped_or_cancelled() {
    let (test, shop) = (TestBus::new(), shop());
    shop.store.run(|tables| catalog::stock_up(tables, &[(1, 6), (2, 1)])).await.unwrap();
    let bus = test.bus();
    let services = [
        basket::start(bus, &shop).await.unwrap(),
        ordering::start(bus, &shop).await.unwrap(),
        ordering::start_shipping(bus, &shop).await.unwrap(),
        timers::start(bus, &shop).await.unwrap(),
        catalog::start(bus, &shop).await.unwrap(),
        payment::start(bus, &shop).await.unwrap(),
        notification::start(bus, &shop).await.unwrap(),
    ];
    let order = async |order: u64, product: u32| {
        let (buyer, quantity, amount_cents) = (order % 3, 1, 500);
        let event = UserCheckoutAccepted { order, buyer, product, quantity, amount_cents };
        test.publish(&shop.topics.checkouts, &event).await.unwrap();
    };
    // Seven orders for six pieces: one goes empty. The provider declines order 5, which had the only other one.
    for (number, product) in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 1), (7, 1), (8, 1)] {
        order(number, product).await;
    }
    test.wait_for::<OrderStatusChangedToShipped>(&shop.topics.status, 6).await.unwrap();
    test.wait_for::<OrderStatusChangedToCancelled>(&shop.topics.status, 2).await.unwrap();
    test.settle().await.unwrap();
    // The piece that order 5 gave back is for sale again.
    order(9, 2).await;
    let shipped = test.wait_for::<OrderStatusChangedToShipped>(&shop.topics.status, 7).await.unwrap();
    test.settle().await.unwrap();
    let paid = test.published::<OrderStatusChangedToPaid>(&shop.topics.paid).await.unwrap();
    assert_eq!((shipped.len(), paid.len()), (7, 7), "{:?}", test.story("orders"));
    for service in services {
        service.stop().await.unwrap();
    }
}
