//! Ordering: turns checkouts into orders and leads them through their life.

use eventbus::{Bus, Emits, Failure, Running, State, Typed};
use rusqlite::{Connection, OptionalExtension, params};

use crate::contracts::{
    CancelOrder, CapturePayment, CommitStock, GracePeriodConfirmed, OrderId, OrderPaymentFailed,
    OrderPaymentSucceeded, OrderStarted, OrderStatusChangedToAwaitingValidation,
    OrderStatusChangedToCancelled, OrderStatusChangedToPaid, OrderStatusChangedToShipped,
    OrderStatusChangedToStockConfirmed, OrderStatusChangedToSubmitted, OrderStockConfirmed,
    OrderStockRejected, RefundPayment, ReleaseStock, Topics, UserCheckoutAccepted, VoidPayment, event_id,
};
use crate::machine::{Effect, Input, Next, Status, on};
use crate::shop::Shop;

/// Ordering's own tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS ordering_order (
  id INTEGER PRIMARY KEY, buyer INTEGER NOT NULL, product INTEGER NOT NULL, quantity INTEGER NOT NULL,
  amount_cents INTEGER NOT NULL, status TEXT NOT NULL, cancelled_by TEXT);
CREATE TABLE IF NOT EXISTS ordering_transition (
  ord INTEGER NOT NULL, input TEXT NOT NULL, from_status TEXT NOT NULL, PRIMARY KEY (ord, input)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ordering_parked (ord INTEGER NOT NULL, input TEXT NOT NULL, status TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS ordering_by_status ON ordering_order (status);
";

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
pub fn find(tables: &Connection, id: OrderId) -> rusqlite::Result<Option<Order>> {
    let sql = "SELECT buyer, product, quantity, amount_cents, status, cancelled_by FROM ordering_order WHERE id = ?1";
    tables
        .prepare_cached(sql)?
        .query_row([id], |row| {
            let status: String = row.get(4)?;
            let status = Status::parse(&status).ok_or(rusqlite::Error::InvalidQuery)?;
            Ok(Order {
                id,
                buyer: row.get(0)?,
                product: row.get(1)?,
                quantity: row.get(2)?,
                amount_cents: row.get(3)?,
                status,
                cancelled_by: row.get(5)?,
            })
        })
        .optional()
}

/// What an input led to: now, or at an earlier delivery of the same input.
struct Step {
    order: Order,
    next: Next,
    repeated: bool,
}

/// Makes a transition once. A repeated input finds it made, and learns what it led to.
fn step(tables: &Connection, id: OrderId, input: Input) -> rusqlite::Result<Option<Step>> {
    let Some(mut order) = find(tables, id)? else { return Ok(None) };
    let name = format!("{input:?}");
    let sql = "SELECT from_status FROM ordering_transition WHERE ord = ?1 AND input = ?2";
    let made: Option<String> =
        tables.prepare_cached(sql)?.query_row(params![id, name], |row| row.get(0)).optional()?;
    if let Some(from) = made.and_then(|from| Status::parse(&from)) {
        return Ok(Some(Step { next: on(from, input), order, repeated: true }));
    }
    let next = on(order.status, input);
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| tables.prepare_cached(sql)?.execute(values);
    match next {
        Next::To(status, _) => {
            let from = order.status;
            order.status = status;
            order.cancelled_by = (status == Status::Cancelled).then(|| cancelled_by(input).to_owned());
            let sql = "UPDATE ordering_order SET status = ?2, cancelled_by = ?3 WHERE id = ?1";
            run(sql, &[&id, &status.as_str(), &order.cancelled_by])?;
            run("INSERT INTO ordering_transition VALUES (?1, ?2, ?3)", &[&id, &name, &from.as_str()])?;
            if status == Status::AwaitingValidation {
                crate::timers::arm(tables, id, crate::timers::Kind::StockLate)?;
            }
            if status == Status::StockConfirmed {
                crate::timers::arm(tables, id, crate::timers::Kind::PayLate)?;
            }
        }
        Next::Stay(_) => {
            run(
                "INSERT INTO ordering_transition VALUES (?1, ?2, ?3)",
                &[&id, &name, &order.status.as_str()],
            )?;
        }
        Next::Park => {
            run("INSERT INTO ordering_parked VALUES (?1, ?2, ?3)", &[&id, &name, &order.status.as_str()])?;
        }
        Next::Ignore | Next::Refuse => {}
    }
    Ok(Some(Step { order, next, repeated: false }))
}

fn cancelled_by(input: Input) -> &'static str {
    match input {
        Input::StockShort | Input::StockLate => "stock",
        Input::PayFailed | Input::PayLate => "payment",
        _ => "buyer",
    }
}

/// The events and commands of a step, under ids that depend only on the order and the transition.
fn outputs(topics: &Topics, step: &Step, input: Input) -> eventbus::Result<Emits> {
    let Order { id: order, buyer, product, quantity, amount_cents, .. } = step.order;
    let (status, effects) = match step.next {
        Next::To(status, effects) => (Some(status), effects),
        Next::Stay(effects) => (None, effects),
        Next::Ignore | Next::Park | Next::Refuse => return Ok(Emits::new()),
    };
    let id = |what: &str| event_id(order, what);
    let mut emits = Emits::new();
    for effect in effects {
        emits = match effect {
            Effect::Commit => emits.to_as(&topics.catalog_commands, &CommitStock { order }, id("commit"))?,
            Effect::Release => {
                emits.to_as(&topics.catalog_commands, &ReleaseStock { order }, id("release"))?
            }
            Effect::Capture => {
                emits.to_as(&topics.payment_commands, &CapturePayment { order }, id("capture"))?
            }
            Effect::Void => emits.to_as(&topics.payment_commands, &VoidPayment { order }, id("void"))?,
            Effect::Refund => {
                emits.to_as(&topics.payment_commands, &RefundPayment { order }, id("refund"))?
            }
            Effect::Timer => emits,
        };
    }
    match status {
        None | Some(Status::Submitted) => Ok(emits),
        Some(Status::AwaitingValidation) => {
            let event = OrderStatusChangedToAwaitingValidation { order, product, quantity };
            emits.to_as(&topics.waiting, &event, id("AwaitingValidation"))
        }
        Some(Status::StockConfirmed) => {
            let event = OrderStatusChangedToStockConfirmed { order, buyer, amount_cents };
            emits.to_as(&topics.stock_confirmed, &event, id("StockConfirmed"))
        }
        Some(Status::Paid) => {
            let event = OrderStatusChangedToPaid { order, buyer, product, quantity, amount_cents };
            emits.to_as(&topics.paid, &event, id("Paid"))
        }
        Some(Status::Shipped) => {
            emits.to_as(&topics.status, &OrderStatusChangedToShipped { order, buyer }, id("Shipped"))
        }
        Some(Status::Cancelled) => {
            let event = OrderStatusChangedToCancelled { order, buyer, reason: cancelled_by(input).into() };
            emits.to_as(&topics.status, &event, id("Cancelled"))
        }
    }
}

/// Applies an input to an order: state and outputs.
///
/// # Errors
/// Transient if the tables fail, or if the order is not known yet.
pub async fn apply(shop: &Shop, id: OrderId, input: Input) -> Result<Emits, Failure> {
    let made = shop.store.run(move |tables| step(tables, id, input)).await?;
    let Some(made) = made else {
        return Err(Failure::transient("order.unknown", format_args!("order {id} is not known (yet)")));
    };
    if made.repeated {
        shop.count_duplicate();
    }
    Ok(outputs(&shop.topics, &made, input)?)
}

async fn checkout(
    Typed(checkout): Typed<UserCheckoutAccepted>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    let UserCheckoutAccepted { order, buyer, product, quantity, amount_cents } = checkout;
    let n_new = shop
        .store
        .run(move |tables| {
            let sql = "INSERT OR IGNORE INTO ordering_order VALUES (?1, ?2, ?3, ?4, ?5, 'Submitted', NULL)";
            tables.prepare_cached(sql)?.execute(params![order, buyer, product, quantity, amount_cents])
        })
        .await?;
    if n_new == 0 {
        shop.count_duplicate();
    }
    Ok(Emits::new()
        .to_as(&shop.topics.orders, &OrderStarted { order, buyer }, event_id(order, "started"))?
        .to_as(
        &shop.topics.status,
        &OrderStatusChangedToSubmitted { order, buyer },
        event_id(order, "Submitted"),
    )?)
}

async fn grace(
    Typed(event): Typed<GracePeriodConfirmed>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::Grace).await
}

async fn stock_confirmed(
    Typed(event): Typed<OrderStockConfirmed>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::StockOk).await
}

async fn stock_rejected(
    Typed(event): Typed<OrderStockRejected>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::StockShort).await
}

async fn payment_succeeded(
    Typed(event): Typed<OrderPaymentSucceeded>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::PayOk).await
}

async fn payment_failed(
    Typed(event): Typed<OrderPaymentFailed>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::PayFailed).await
}

async fn cancel(Typed(event): Typed<CancelOrder>, State(shop): State<Shop>) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::Cancel).await
}

async fn ship(
    Typed(event): Typed<OrderStatusChangedToPaid>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    apply(&shop, event.order, Input::Ship).await
}

/// Starts ordering.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    let topics = &shop.topics;
    shop.service(bus, "ordering")
        .on(topics.checkouts.clone(), checkout)
        .on(topics.grace.clone(), grace)
        .on(topics.stock.clone(), stock_confirmed)
        .on(topics.stock.clone(), stock_rejected)
        .on(topics.payment.clone(), payment_succeeded)
        .on(topics.payment.clone(), payment_failed)
        .on(topics.ordering_commands.clone(), cancel)
        .with_state(shop.clone())
        .start(bus)
        .await
}

/// Starts shipping, a part of ordering with a group of its own: what is paid leaves the house.
///
/// # Errors
/// What the bus reports.
pub async fn start_shipping(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    shop.service(bus, "shipping").on(shop.topics.paid.clone(), ship).with_state(shop.clone()).start(bus).await
}
