//! Payment: authorise, capture, void, refund; each once for an order. The provider is a fake with a rule.

use eventbus::{Bus, Emits, Failure, Running, State, Typed};
use rusqlite::{Connection, OptionalExtension, params};

use crate::contracts::{
    CapturePayment, OrderId, OrderPaymentFailed, OrderPaymentSucceeded, OrderStatusChangedToStockConfirmed,
    RefundPayment, VoidPayment, event_id,
};
use crate::shop::Shop;

/// Payment's own table.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS payment_payment (ord INTEGER PRIMARY KEY, amount_cents INTEGER NOT NULL, state TEXT NOT NULL);
";

/// The fake provider's rule: it declines the orders whose number leaves 5 when divided by 37, which is
/// 2.7 % of them.
pub fn declines(order: OrderId) -> bool {
    order % 37 == 5
}

fn authorise(tables: &Connection, order: OrderId, amount_cents: u64) -> rusqlite::Result<(String, bool)> {
    let known: Option<String> = tables
        .prepare_cached("SELECT state FROM payment_payment WHERE ord = ?1")?
        .query_row([order], |row| row.get(0))
        .optional()?;
    if let Some(state) = known {
        return Ok((state, true));
    }
    let state = if declines(order) { "declined" } else { "authorised" };
    tables.prepare_cached("INSERT INTO payment_payment VALUES (?1, ?2, ?3)")?.execute(params![
        order,
        amount_cents,
        state
    ])?;
    Ok((state.to_owned(), false))
}

async fn pay(
    Typed(event): Typed<OrderStatusChangedToStockConfirmed>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    let OrderStatusChangedToStockConfirmed { order, amount_cents, .. } = event;
    let (state, repeated) = shop.store.run(move |tables| authorise(tables, order, amount_cents)).await?;
    if repeated {
        shop.count_duplicate();
    }
    Ok(match state.as_str() {
        // Voided before it was asked for: the order is off, nobody waits for an answer.
        "voided" => Emits::new(),
        "declined" => Emits::new().to_as(
            &shop.topics.payment,
            &OrderPaymentFailed { order },
            event_id(order, "payment-failed"),
        )?,
        _ => {
            let event = OrderPaymentSucceeded { order };
            Emits::new().to_as(&shop.topics.payment, &event, event_id(order, "payment-succeeded"))?
        }
    })
}

/// Moves a payment from one state to the next, once.
async fn change(shop: &Shop, order: OrderId, from: &'static str, to: &'static str) -> Result<(), Failure> {
    let sql = "UPDATE payment_payment SET state = ?3 WHERE ord = ?1 AND state = ?2";
    let n_changed =
        shop.store.run(move |tables| tables.prepare_cached(sql)?.execute(params![order, from, to])).await?;
    if n_changed == 0 {
        shop.count_duplicate();
    }
    Ok(())
}

async fn capture(Typed(command): Typed<CapturePayment>, State(shop): State<Shop>) -> Result<(), Failure> {
    change(&shop, command.order, "authorised", "captured").await
}

async fn refund(Typed(command): Typed<RefundPayment>, State(shop): State<Shop>) -> Result<(), Failure> {
    change(&shop, command.order, "authorised", "refunded").await
}

async fn void(Typed(command): Typed<VoidPayment>, State(shop): State<Shop>) -> Result<(), Failure> {
    let order = command.order;
    shop.store
        .run(move |tables| {
            // It may come before the authorisation: remember it, so that none follows.
            tables
                .prepare_cached("INSERT OR IGNORE INTO payment_payment VALUES (?1, 0, 'voided')")?
                .execute([order])?;
            let sql = "UPDATE payment_payment SET state = 'voided' WHERE ord = ?1 AND state = 'authorised'";
            tables.prepare_cached(sql)?.execute([order])
        })
        .await?;
    Ok(())
}

/// Starts payment.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    shop.service(bus, "payment")
        .on(shop.topics.stock_confirmed.clone(), pay)
        .on(shop.topics.payment_commands.clone(), capture)
        .on(shop.topics.payment_commands.clone(), void)
        .on(shop.topics.payment_commands.clone(), refund)
        .with_state(shop.clone())
        .start(bus)
        .await
}
