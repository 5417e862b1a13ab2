//! Notification: tells buyers what became of their order, once for each event.

use eventbus::{Bus, Failure, Meta, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{
    OrderId, OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToSubmitted,
};
use crate::db::{Db, Tables as _};
use crate::shop::Desk;

/// Notification's own table: mails to send, keyed by the event that caused each.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS notification_mail (
  event TEXT PRIMARY KEY, ord BIGINT NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL);
";

async fn mail<D: Db>(
    mut tx: Tx<D>,
    Meta(meta): &Meta,
    order: OrderId,
    kind: &str,
    text: String,
) -> Result<(), Failure> {
    let sql = "INSERT INTO notification_mail VALUES ($1, $2, $3, $4)";
    tx.run(sql, &[meta.id().to_string().into(), order.into(), kind.into(), text.into()]).await?;
    Ok(())
}

async fn submitted<D: Db>(
    tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToSubmitted>,
    meta: Meta,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    let text = format!("Thank you, buyer {}: we have your order {}.", event.buyer, event.order);
    mail(tx, &meta, event.order, "submitted", text).await
}

async fn paid<D: Db>(
    tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToPaid>,
    meta: Meta,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    let (dollars, cents) = (event.amount_cents / 100, event.amount_cents % 100);
    let text = format!("Order {} is paid: {dollars}.{cents:02} dollars.", event.order);
    mail(tx, &meta, event.order, "paid", text).await
}

async fn shipped<D: Db>(
    tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToShipped>,
    meta: Meta,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    mail(tx, &meta, event.order, "shipped", format!("Order {} is on its way.", event.order)).await
}

async fn cancelled<D: Db>(
    tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToCancelled>,
    meta: Meta,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    let text = format!("Order {} was cancelled ({}).", event.order, event.reason);
    mail(tx, &meta, event.order, "cancelled", text).await
}

/// Starts notification.
///
/// # Errors
/// What the bus reports.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    desk.service(bus, "notification")
        .on(desk.topics.status.clone(), submitted::<D>)
        .on(desk.topics.status.clone(), shipped::<D>)
        .on(desk.topics.status.clone(), cancelled::<D>)
        .on(desk.topics.paid.clone(), paid::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await
}
