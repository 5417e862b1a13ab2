//! Payment: authorise, capture, void, refund; each once for an order. The provider is a fake with a rule.

use eventbus::{Bus, Emits, Failure, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{
    CapturePayment, OrderId, OrderPaymentFailed, OrderPaymentSucceeded, OrderStatusChangedToStockConfirmed,
    RefundPayment, VoidPayment,
};
use crate::db::{Db, Tables as _};
use crate::shop::Desk;

/// Payment's own table.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS payment_payment (ord BIGINT PRIMARY KEY, amount_cents BIGINT NOT NULL, state TEXT NOT NULL);
";

/// The fake provider's rule: it declines the orders whose number leaves 5 when divided by 37, which is
/// 2.7 % of them.
pub fn declines(order: OrderId) -> bool {
    order % 37 == 5
}

async fn pay<D: Db>(
    mut tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToStockConfirmed>,
    State(desk): State<Desk<D>>,
) -> Result<Emits, Failure> {
    let OrderStatusChangedToStockConfirmed { order, amount_cents, .. } = event;
    let state = if declines(order) { "declined" } else { "authorised" };
    let sql = "INSERT INTO payment_payment VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
    let is_new = tx.run(sql, &[order.into(), amount_cents.into(), state.into()]).await? == 1;
    Ok(match state {
        // Voided before it was asked for: the order is off, nobody waits for an answer.
        _ if !is_new => Emits::new(),
        "declined" => Emits::new().to(&desk.topics.payment, &OrderPaymentFailed { order })?,
        _ => Emits::new().to(&desk.topics.payment, &OrderPaymentSucceeded { order })?,
    })
}

/// An authorised payment comes to its end.
async fn end<D: Db>(tx: &mut Tx<D>, order: OrderId, state: &str) -> Result<(), Failure> {
    let sql = "UPDATE payment_payment SET state = $2 WHERE ord = $1 AND state = 'authorised'";
    tx.run(sql, &[order.into(), state.into()]).await?;
    Ok(())
}

async fn capture<D: Db>(
    mut tx: Tx<D>,
    Typed(command): Typed<CapturePayment>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    end(&mut tx, command.order, "captured").await
}

async fn refund<D: Db>(
    mut tx: Tx<D>,
    Typed(command): Typed<RefundPayment>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    end(&mut tx, command.order, "refunded").await
}

async fn void<D: Db>(
    mut tx: Tx<D>,
    Typed(command): Typed<VoidPayment>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    // It may come before the authorisation: remember it, so that none follows.
    let sql = "INSERT INTO payment_payment VALUES ($1, 0, 'voided') ON CONFLICT DO NOTHING";
    tx.run(sql, &[command.order.into()]).await?;
    end(&mut tx, command.order, "voided").await
}

/// Starts payment.
///
/// # Errors
/// What the bus reports.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    desk.service(bus, "payment")
        .on(desk.topics.stock_confirmed.clone(), pay::<D>)
        .on(desk.topics.payment_commands.clone(), capture::<D>)
        .on(desk.topics.payment_commands.clone(), refund::<D>)
        .on(desk.topics.payment_commands.clone(), void::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await
}
