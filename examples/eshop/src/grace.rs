//! The grace task: when the time in which a buyer may change their mind is over, it says so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus::{Bus, Envelope, Failure, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{GracePeriodConfirmed, OrderId, OrderStarted, event_id};
use crate::db::{Db, Tables as _};
use crate::shop::Desk;

/// Grace's own table.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS grace_timer (ord BIGINT PRIMARY KEY, due_ms BIGINT NOT NULL);
CREATE INDEX IF NOT EXISTS grace_timer_by_due ON grace_timer (due_ms);
";

/// How often due timers are looked for, and how many are taken at once.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);
pub(crate) const BATCH: u64 = 256;

/// Milliseconds since 1970, as timers are noted: they outlive processes.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |past| past.as_millis() as u64)
}

async fn started<D: Db>(
    mut tx: Tx<D>,
    Typed(event): Typed<OrderStarted>,
    State(desk): State<Desk<D>>,
) -> Result<(), Failure> {
    let due = now_ms().saturating_add(desk.grace.as_millis() as u64);
    tx.run(
        "INSERT INTO grace_timer VALUES ($1, $2) ON CONFLICT DO NOTHING",
        &[event.order.into(), due.into()],
    )
    .await?;
    Ok(())
}

/// Starts the grace task: it notes when an order's grace period ends, and confirms it then.
///
/// # Errors
/// What the bus reports.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    let running = desk
        .service(bus, "grace")
        .on(desk.topics.orders.clone(), started::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await?;
    tokio::spawn(watch(desk.clone()));
    Ok(running)
}

/// Confirms what is due until the process ends.
async fn watch<D: Db>(desk: Desk<D>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Err(error) = confirm(&desk).await {
            tracing::warn!(%error, "grace periods could not be confirmed; trying again");
        }
    }
}

/// Confirms what is due: timers go and events come in one transaction.
async fn confirm<D: Db>(desk: &Desk<D>) -> eventbus::Result<()> {
    let due = "SELECT ord FROM grace_timer WHERE due_ms <= $1 LIMIT 1";
    if desk.look().await?.first(due, &[now_ms().into()]).await?.is_none() {
        return Ok(());
    }
    let mut tx = desk.begin().await?;
    let take = "DELETE FROM grace_timer WHERE ord IN (
        SELECT ord FROM grace_timer WHERE due_ms <= $1 ORDER BY due_ms, ord LIMIT $2) RETURNING ord";
    for row in tx.read(take, &[now_ms().into(), BATCH.into()]).await? {
        let order: OrderId = row.number(0)?;
        // Under an id that depends on the order alone: whoever else confirms it says the same.
        let event =
            Envelope::of(&GracePeriodConfirmed { order }, "/grace")?.with_id(event_id(order, "grace"));
        tx.publish_envelope(&desk.topics.grace, event)?;
    }
    tx.commit().await
}
