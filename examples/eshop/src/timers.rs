//! Timers: the grace period, and the time-outs of stock and payment, durable as rows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus::{Bus, Envelope, Failure, Running, State, Typed};
use rusqlite::{Connection, params};

use crate::contracts::{GracePeriodConfirmed, OrderId, OrderStarted, event_id};
use crate::machine::Input;
use crate::ordering;
use crate::shop::Shop;

/// The timers' own table.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS timer (ord INTEGER NOT NULL, kind TEXT NOT NULL, due_ms INTEGER NOT NULL, PRIMARY KEY (ord, kind))
  WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS timer_by_due ON timer (kind, due_ms);
";

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The buyer may still change their mind.
    Grace,
    /// The catalog should have answered.
    StockLate,
    /// The payment should have answered.
    PayLate,
}

/// How long the shop waits for stock or payment before it cancels.
const LATE: Duration = Duration::from_secs(600);
/// How often due timers are looked for, and how many are taken at once.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const BATCH: usize = 512;

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |past| past.as_millis() as i64)
}

/// Arms a time-out of an order, once.
///
/// # Errors
/// What the database reports.
pub fn arm(tables: &Connection, order: OrderId, kind: Kind) -> rusqlite::Result<()> {
    arm_in(tables, order, kind, LATE)
}

fn arm_in(tables: &Connection, order: OrderId, kind: Kind, after: Duration) -> rusqlite::Result<()> {
    let due = now_ms().saturating_add(after.as_millis() as i64);
    let sql = "INSERT OR IGNORE INTO timer VALUES (?1, ?2, ?3)";
    tables.prepare_cached(sql)?.execute(params![order, format!("{kind:?}"), due]).map(drop)
}

async fn started(Typed(event): Typed<OrderStarted>, State(shop): State<Shop>) -> Result<(), Failure> {
    let grace = shop.grace;
    shop.store.run(move |tables| arm_in(tables, event.order, Kind::Grace, grace)).await?;
    Ok(())
}

/// Starts the grace task: it notes when an order's grace period ends, and confirms it then.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    let running = shop
        .service(bus, "grace")
        .on(shop.topics.orders.clone(), started)
        .with_state(shop.clone())
        .start(bus)
        .await?;
    // Nobody could answer while the shop was down: who waits for an answer waits its full time from now.
    let late = now_ms().saturating_add(LATE.as_millis() as i64);
    let sql = "UPDATE timer SET due_ms = ?1 WHERE kind IN ('StockLate', 'PayLate') AND due_ms < ?1";
    shop.store.run(move |tables| tables.execute(sql, [late])).await?;
    tokio::spawn(watch(bus.clone(), shop.clone()));
    Ok(running)
}

/// Fires due timers until the process ends. A crash between firing and forgetting fires again, under
/// the same id or into a state that ignores it.
async fn watch(bus: Bus, shop: Shop) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for kind in [Kind::Grace, Kind::StockLate, Kind::PayLate] {
            if let Err(failure) = fire(&bus, &shop, kind).await {
                tracing::warn!(%failure, ?kind, "timers could not fire; trying again");
            }
        }
    }
}

async fn fire(bus: &Bus, shop: &Shop, kind: Kind) -> Result<(), Failure> {
    let due: Vec<OrderId> = shop
        .store
        .run(move |tables| {
            let sql = "SELECT ord FROM timer WHERE kind = ?1 AND due_ms <= ?2 ORDER BY due_ms LIMIT ?3";
            let mut statement = tables.prepare_cached(sql)?;
            statement.query_map(params![format!("{kind:?}"), now_ms(), BATCH], |row| row.get(0))?.collect()
        })
        .await?;
    if due.is_empty() {
        return Ok(());
    }
    let publisher = bus.transport().publisher().await?;
    match kind {
        Kind::Grace => {
            let confirmed = |order: &OrderId| {
                Envelope::of(&GracePeriodConfirmed { order: *order }, "/grace")
                    .map(|event| event.with_id(event_id(*order, "grace")))
            };
            let batch = due.iter().map(confirmed).collect::<eventbus::Result<Vec<_>>>()?;
            publisher.enqueue(&shop.topics.grace, batch).await?.await.all()?;
        }
        Kind::StockLate | Kind::PayLate => {
            let input = if kind == Kind::StockLate { Input::StockLate } else { Input::PayLate };
            for order in &due {
                for (topic, envelope) in ordering::apply(shop, *order, input).await?.into_envelopes("/grace")
                {
                    publisher.enqueue(&topic, vec![envelope]).await?.await.all()?;
                }
            }
        }
    }
    shop.store
        .run(move |tables| {
            let mut delete = tables.prepare_cached("DELETE FROM timer WHERE ord = ?1 AND kind = ?2")?;
            due.iter().try_for_each(|order| delete.execute(params![order, format!("{kind:?}")]).map(drop))
        })
        .await?;
    Ok(())
}
