//! Notification: tells buyers what became of their order, once for each event.

use eventbus::{Bus, Failure, Meta, Running, State, Typed};
use rusqlite::params;

use crate::contracts::{
    OrderId, OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToSubmitted,
};
use crate::shop::Shop;

/// Notification's own table: an outbox of mails, keyed by the event that caused each.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS notification_mail (
  event TEXT PRIMARY KEY, ord INTEGER NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL) WITHOUT ROWID;
";

async fn mail(
    shop: &Shop,
    event: String,
    order: OrderId,
    kind: &'static str,
    text: String,
) -> Result<(), Failure> {
    let sql = "INSERT OR IGNORE INTO notification_mail VALUES (?1, ?2, ?3, ?4)";
    let n_new = shop
        .store
        .run(move |tables| tables.prepare_cached(sql)?.execute(params![event, order, kind, text]))
        .await?;
    if n_new == 0 {
        shop.count_duplicate();
    }
    Ok(())
}

async fn submitted(
    Typed(event): Typed<OrderStatusChangedToSubmitted>,
    Meta(meta): Meta,
    State(shop): State<Shop>,
) -> Result<(), Failure> {
    let text = format!("Thank you, buyer {}: we have your order {}.", event.buyer, event.order);
    mail(&shop, meta.id().to_string(), event.order, "submitted", text).await
}

async fn paid(
    Typed(event): Typed<OrderStatusChangedToPaid>,
    Meta(meta): Meta,
    State(shop): State<Shop>,
) -> Result<(), Failure> {
    let (dollars, cents) = (event.amount_cents / 100, event.amount_cents % 100);
    let text = format!("Order {} is paid: {dollars}.{cents:02} dollars.", event.order);
    mail(&shop, meta.id().to_string(), event.order, "paid", text).await
}

async fn shipped(
    Typed(event): Typed<OrderStatusChangedToShipped>,
    Meta(meta): Meta,
    State(shop): State<Shop>,
) -> Result<(), Failure> {
    mail(
        &shop,
        meta.id().to_string(),
        event.order,
        "shipped",
        format!("Order {} is on its way.", event.order),
    )
    .await
}

async fn cancelled(
    Typed(event): Typed<OrderStatusChangedToCancelled>,
    Meta(meta): Meta,
    State(shop): State<Shop>,
) -> Result<(), Failure> {
    let text = format!("Order {} was cancelled ({}).", event.order, event.reason);
    mail(&shop, meta.id().to_string(), event.order, "cancelled", text).await
}

/// Starts notification.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    shop.service(bus, "notification")
        .on(shop.topics.status.clone(), submitted)
        .on(shop.topics.status.clone(), shipped)
        .on(shop.topics.status.clone(), cancelled)
        .on(shop.topics.paid.clone(), paid)
        .with_state(shop.clone())
        .start(bus)
        .await
}
