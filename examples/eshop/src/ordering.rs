//! Ordering: turns checkouts into orders and leads them through their life.

use std::time::Duration;

use eventbus::{Bus, Emits, ErrorKind, Failure, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{
    CancelOrder, CapturePayment, CommitStock, GracePeriodConfirmed, OrderId, OrderPaymentFailed,
    OrderPaymentSucceeded, OrderStarted, OrderStatusChangedToAwaitingValidation,
    OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToStockConfirmed, OrderStatusChangedToSubmitted, OrderStockConfirmed,
    OrderStockRejected, RefundPayment, ReleaseStock, Topics, UserCheckoutAccepted, VoidPayment,
};
use crate::db::{Db, Row, Tables};
use crate::grace::{BATCH, LOOK_EVERY, now_ms};
use crate::machine::{Effect, Input, Next, Status, on};
use crate::shop::Desk;

/// Ordering's own tables: orders, what could not be, and until when an answer is waited for.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS ordering_order (
  id BIGINT PRIMARY KEY, buyer BIGINT NOT NULL, product BIGINT NOT NULL, quantity BIGINT NOT NULL,
  amount_cents BIGINT NOT NULL, status TEXT NOT NULL, cancelled_by TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ordering_parked (ord BIGINT NOT NULL, input TEXT NOT NULL, status TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ordering_deadline (
  ord BIGINT NOT NULL, input TEXT NOT NULL, due_ms BIGINT NOT NULL, PRIMARY KEY (ord, input));
CREATE INDEX IF NOT EXISTS ordering_deadline_by_due ON ordering_deadline (due_ms);
";

/// How long the shop waits for stock or payment before it cancels.
const LATE: Duration = Duration::from_secs(600);

/// An order as ordering knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its number.
    pub id: OrderId,
    /// Who buys.
    pub buyer: u64,
    /// What.
    pub product: u32,
    /// How many.
    pub quantity: u32,
    /// For how much, in cents.
    pub amount_cents: u64,
    /// Where it is.
    pub status: Status,
    /// Why it was cancelled: `stock`, `payment` or `buyer`.
    pub cancelled_by: Option<String>,
}

/// Finds an order.
///
/// # Errors
/// What the database reports.
pub async fn find(tables: &mut impl Tables, id: OrderId) -> eventbus::Result<Option<Order>> {
    let sql = "SELECT buyer, product, quantity, amount_cents, status, cancelled_by FROM ordering_order WHERE id = $1";
    tables.first(sql, &[id.into()]).await?.map(|row| order(id, &row)).transpose()
}

/// Finds an order that nobody else may change before the transaction ends.
async fn take(tables: &mut impl Tables, id: OrderId) -> eventbus::Result<Option<Order>> {
    // A change that changes nothing waits for who changes the row now, on both databases.
    let sql = "UPDATE ordering_order SET status = status WHERE id = $1
        RETURNING buyer, product, quantity, amount_cents, status, cancelled_by";
    tables.first(sql, &[id.into()]).await?.map(|row| order(id, &row)).transpose()
}

fn order(id: OrderId, row: &Row) -> eventbus::Result<Order> {
    let status = Status::parse(row.text(4)?)
        .ok_or_else(|| eventbus::Error::new(ErrorKind::Corrupt, "an order has no known status"))?;
    Ok(Order {
        id,
        buyer: row.number(0)?,
        product: row.number(1)?,
        quantity: row.number(2)?,
        amount_cents: row.number(3)?,
        status,
        cancelled_by: Some(row.text(5)?.to_owned()).filter(|who| !who.is_empty()),
    })
}

/// Applies an input to an order: its new state is stored in the transaction, what follows is returned.
async fn apply(
    tables: &mut impl Tables,
    topics: &Topics,
    id: OrderId,
    input: Input,
) -> Result<Emits, Failure> {
    let Some(mut order) = take(tables, id).await? else {
        return Err(Failure::transient("order.unknown", format_args!("order {id} is not known (yet)")));
    };
    let next = on(order.status, input);
    match next {
        Next::To(status, effects) => {
            order.status = status;
            order.cancelled_by = (status == Status::Cancelled).then(|| cancelled_by(input).to_owned());
            let by = order.cancelled_by.clone().unwrap_or_default();
            let sql = "UPDATE ordering_order SET status = $2, cancelled_by = $3 WHERE id = $1";
            tables.run(sql, &[id.into(), status.as_str().into(), by.into()]).await?;
            if effects.contains(&Effect::Timer) {
                let late = if status == Status::StockConfirmed { Input::PayLate } else { Input::StockLate };
                let due = now_ms().saturating_add(LATE.as_millis() as u64);
                let sql = "INSERT INTO ordering_deadline VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
                tables.run(sql, &[id.into(), late.as_str().into(), due.into()]).await?;
            }
        }
        Next::Park => {
            let sql = "INSERT INTO ordering_parked VALUES ($1, $2, $3)";
            tables.run(sql, &[id.into(), input.as_str().into(), order.status.as_str().into()]).await?;
        }
        Next::Stay(_) | Next::Ignore | Next::Refuse => {}
    }
    Ok(outputs(topics, &order, next, input)?)
}

fn cancelled_by(input: Input) -> &'static str {
    match input {
        Input::StockShort | Input::StockLate => "stock",
        Input::PayFailed | Input::PayLate => "payment",
        _ => "buyer",
    }
}

/// The events and commands that follow.
fn outputs(topics: &Topics, of: &Order, next: Next, input: Input) -> eventbus::Result<Emits> {
    let &Order { id: order, buyer, product, quantity, amount_cents, .. } = of;
    let (status, effects) = match next {
        Next::To(status, effects) => (Some(status), effects),
        Next::Stay(effects) => (None, effects),
        Next::Ignore | Next::Park | Next::Refuse => return Ok(Emits::new()),
    };
    let mut emits = Emits::new();
    for effect in effects {
        emits = match effect {
            Effect::Commit => emits.to(&topics.catalog_commands, &CommitStock { order })?,
            Effect::Release => emits.to(&topics.catalog_commands, &ReleaseStock { order })?,
            Effect::Capture => emits.to(&topics.payment_commands, &CapturePayment { order })?,
            Effect::Void => emits.to(&topics.payment_commands, &VoidPayment { order })?,
            Effect::Refund => emits.to(&topics.payment_commands, &RefundPayment { order })?,
            Effect::Timer => emits,
        };
    }
    match status {
        None | Some(Status::Submitted) => Ok(emits),
        Some(Status::AwaitingValidation) => {
            emits.to(&topics.waiting, &OrderStatusChangedToAwaitingValidation { order, product, quantity })
        }
        Some(Status::StockConfirmed) => emits
            .to(&topics.stock_confirmed, &OrderStatusChangedToStockConfirmed { order, buyer, amount_cents }),
        Some(Status::Paid) => {
            let event = OrderStatusChangedToPaid { order, buyer, product, quantity, amount_cents };
            emits.to(&topics.paid, &event)
        }
        Some(Status::Shipped) => emits.to(&topics.status, &OrderStatusChangedToShipped { order, buyer }),
        Some(Status::Cancelled) => {
            let event = OrderStatusChangedToCancelled { order, buyer, reason: cancelled_by(input).into() };
            emits.to(&topics.status, &event)
        }
    }
}

async fn checkout<D: Db>(
    mut tx: Tx<D>,
    Typed(checkout): Typed<UserCheckoutAccepted>,
    State(desk): State<Desk<D>>,
) -> Result<Emits, Failure> {
    let UserCheckoutAccepted { order, buyer, product, quantity, amount_cents } = checkout;
    let sql =
        "INSERT INTO ordering_order VALUES ($1, $2, $3, $4, $5, 'Submitted', '') ON CONFLICT DO NOTHING";
    let values = [order.into(), buyer.into(), product.into(), quantity.into(), amount_cents.into()];
    if tx.run(sql, &values).await? == 0 {
        // A basket that was restored from an older copy checks out again: it is told that the order is there.
        return Ok(Emits::new().to(&desk.topics.orders, &OrderStarted { order, buyer })?);
    }
    Ok(Emits::new()
        .to(&desk.topics.orders, &OrderStarted { order, buyer })?
        .to(&desk.topics.status, &OrderStatusChangedToSubmitted { order, buyer })?)
}

/// Handlers that apply an input to the order that an event is of.
macro_rules! inputs {
    ($($name:ident: $event:ty => $input:ident)*) => {$(
        async fn $name<D: Db>(
            mut tx: Tx<D>,
            Typed(event): Typed<$event>,
            State(desk): State<Desk<D>>,
        ) -> Result<Emits, Failure> {
            apply(&mut *tx, &desk.topics, event.order, Input::$input).await
        }
    )*};
}

inputs! {
    grace: GracePeriodConfirmed => Grace
    stock_confirmed: OrderStockConfirmed => StockOk
    stock_rejected: OrderStockRejected => StockShort
    payment_succeeded: OrderPaymentSucceeded => PayOk
    payment_failed: OrderPaymentFailed => PayFailed
    cancel: CancelOrder => Cancel
    ship: OrderStatusChangedToPaid => Ship
}

/// Asks for the end of an order.
///
/// # Errors
/// What the tables report: nothing is asked then.
pub async fn ask_to_cancel<D: Db>(desk: &Desk<D>, order: OrderId) -> eventbus::Result<()> {
    let mut tx = desk.begin().await?;
    tx.publish(&desk.topics.ordering_commands, &CancelOrder { order })?;
    tx.commit().await
}

/// Ends waits that are over until the process ends.
async fn watch<D: Db>(desk: Desk<D>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Err(failure) = end_waits(&desk).await {
            tracing::warn!(%failure, "waits for stock and payment could not be ended; trying again");
        }
    }
}

/// Deadlines that are over are applied and go, each in one transaction with what follows.
async fn end_waits<D: Db>(desk: &Desk<D>) -> Result<(), Failure> {
    let sql = "SELECT ord, input FROM ordering_deadline WHERE due_ms <= $1 ORDER BY due_ms LIMIT $2";
    let over = desk.look().await?.read(sql, &[now_ms().into(), BATCH.into()]).await?;
    for row in over {
        let (order, late): (OrderId, &str) = (row.number(0)?, row.text(1)?);
        if let Err(failure) = end_wait(desk, order, late).await {
            // The others are not to wait for this one.
            tracing::warn!(%failure, order, late, "a wait could not be ended; trying again");
        }
    }
    Ok(())
}

async fn end_wait<D: Db>(desk: &Desk<D>, order: OrderId, late: &str) -> Result<(), Failure> {
    let input = if late == Input::PayLate.as_str() { Input::PayLate } else { Input::StockLate };
    let mut tx = desk.begin().await?;
    let over = "DELETE FROM ordering_deadline WHERE ord = $1 AND input = $2";
    // Another process may have been here first.
    if tx.run(over, &[order.into(), late.into()]).await? == 1 {
        let emits = apply(&mut *tx, &desk.topics, order, input).await?;
        for (topic, event) in emits.into_envelopes("/eshop") {
            tx.publish_envelope(&topic, event)?;
        }
    }
    Ok(tx.commit().await?)
}

/// Starts ordering.
///
/// # Errors
/// What the bus or the tables report.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    // Nobody could answer while the shop was down: a wait that ended meanwhile begins anew.
    let now = now_ms();
    let late = now.saturating_add(LATE.as_millis() as u64);
    let mut tx = desk.begin().await?;
    tx.run("UPDATE ordering_deadline SET due_ms = $1 WHERE due_ms < $2", &[late.into(), now.into()]).await?;
    tx.commit().await?;
    let topics = &desk.topics;
    let running = desk
        .service(bus, "ordering")
        .on(topics.checkouts.clone(), checkout::<D>)
        .on(topics.grace.clone(), grace::<D>)
        .on(topics.stock.clone(), stock_confirmed::<D>)
        .on(topics.stock.clone(), stock_rejected::<D>)
        .on(topics.payment.clone(), payment_succeeded::<D>)
        .on(topics.payment.clone(), payment_failed::<D>)
        .on(topics.ordering_commands.clone(), cancel::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await?;
    tokio::spawn(watch(desk.clone()));
    Ok(running)
}

/// Starts shipping, a part of ordering with a group of its own: what is paid leaves the house.
///
/// # Errors
/// What the bus reports.
pub async fn start_shipping<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    desk.service(bus, "shipping")
        .on(desk.topics.paid.clone(), ship::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await
}
