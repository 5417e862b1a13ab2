//! Basket: checkouts, from the file of orders and from the web.

use std::time::Duration;

use eventbus::{Bus, Envelope, Error, ErrorKind, Failure, Running, State, Typed};
use rusqlite::{OptionalExtension, params};

use crate::contracts::{OrderId, OrderStarted, UserCheckoutAccepted, event_id};
use crate::orders_file::{FIRST_WEB_ORDER, OrderLine};
use crate::patience::patiently;
use crate::shop::Shop;

/// Basket's own tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS basket_basket (ord INTEGER PRIMARY KEY, buyer INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS basket_import (file TEXT PRIMARY KEY, n_lines INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS basket_request (
  request TEXT PRIMARY KEY, ord INTEGER NOT NULL UNIQUE, asked TEXT NOT NULL) WITHOUT ROWID;
";

/// Checkouts published in one batch.
const BATCH: usize = 128;

fn envelope(checkout: &UserCheckoutAccepted) -> eventbus::Result<Envelope> {
    Ok(Envelope::of(checkout, "/basket")?.with_id(event_id(checkout.order, "checkout")))
}

/// Imports the lines that no earlier run has imported. A crash repeats at most one batch, under the
/// same ids.
///
/// # Errors
/// What the bus or the tables report.
pub async fn import(
    bus: &Bus,
    shop: &Shop,
    digest: &str,
    lines: &[OrderLine],
    rate: Option<u32>,
) -> eventbus::Result<()> {
    let publisher = bus.transport().publisher().await?;
    let name = digest.to_owned();
    let sql = "SELECT n_lines FROM basket_import WHERE file = ?1";
    let query =
        move |tables: &rusqlite::Connection| tables.query_row(sql, [name], |row| row.get(0)).optional();
    let done: usize = shop.store.run(query).await?.unwrap_or(0);
    let mut pace = rate.map(|rate| tokio::time::interval(Duration::from_secs(1) / rate.max(1)));
    let batch = if rate.is_some() { 1 } else { BATCH };
    let mut n_done = done;
    for part in lines.get(done..).unwrap_or_default().chunks(batch) {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        let checkouts =
            part.iter().map(|line| envelope(&line.checkout())).collect::<eventbus::Result<Vec<_>>>()?;
        let rows: Vec<(OrderId, u64)> = part.iter().map(|line| (line.order, line.buyer)).collect();
        shop.store
            .run(move |tables| {
                let mut insert =
                    tables.prepare_cached("INSERT OR IGNORE INTO basket_basket VALUES (?1, ?2)")?;
                rows.iter().try_for_each(|(order, buyer)| insert.execute(params![order, buyer]).map(drop))
            })
            .await?;
        let publish =
            async || publisher.enqueue(&shop.topics.checkouts, checkouts.clone()).await?.await.all();
        patiently(publish).await?;
        n_done += part.len();
        let (name, n_lines) = (digest.to_owned(), n_done);
        let sql = "INSERT INTO basket_import VALUES (?1, ?2) ON CONFLICT DO UPDATE SET n_lines = ?2";
        shop.store.run(move |tables| tables.execute(sql, params![name, n_lines])).await?;
    }
    Ok(())
}

/// Checks out an order from the web. The same request id gives the same order, however often it comes.
///
/// # Errors
/// [`Conflict`](ErrorKind::Conflict) if the same request id came with another order before; what the bus or the
/// tables report.
pub async fn check_out(
    bus: &Bus,
    shop: &Shop,
    request: Option<String>,
    order: impl Fn(OrderId) -> UserCheckoutAccepted,
) -> eventbus::Result<OrderId> {
    let request = request.unwrap_or_else(|| eventbus::EventId::generate().to_string());
    // What was asked for, whatever the order's number will be.
    let asked = format!("{:?}", order(0));
    let (wanted, named) = (asked.clone(), request.clone());
    let (id, before): (OrderId, String) = shop
        .store
        .run(move |tables| {
            let next =
                "INSERT OR IGNORE INTO basket_request SELECT ?1, coalesce(max(ord) + 1, ?2), ?3 FROM basket_request";
            tables.execute(next, params![request, FIRST_WEB_ORDER, wanted])?;
            let found = "SELECT ord, asked FROM basket_request WHERE request = ?1";
            tables.query_row(found, [request], |row| Ok((row.get(0)?, row.get(1)?)))
        })
        .await?;
    if before != asked {
        return Err(Error::new(ErrorKind::Conflict, "this x-request-id came with another order before")
            .with("request", named)
            .with("order", id));
    }
    let checkout = envelope(&order(id))?;
    bus.publisher().await?.publish_envelope(&shop.topics.checkouts, checkout).await?;
    Ok(id)
}

/// Whether a checkout was accepted under this number: ordering knows the order then, or will.
///
/// # Errors
/// What the tables report.
pub fn has_accepted(tables: &rusqlite::Connection, order: OrderId) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM basket_request WHERE ord = ?1)
        OR EXISTS (SELECT 1 FROM basket_basket WHERE ord = ?1)";
    tables.prepare_cached(sql)?.query_row([order], |row| row.get(0))
}

async fn started(Typed(event): Typed<OrderStarted>, State(shop): State<Shop>) -> Result<(), Failure> {
    let sql = "DELETE FROM basket_basket WHERE ord = ?1";
    shop.store.run(move |tables| tables.prepare_cached(sql)?.execute([event.order])).await?;
    Ok(())
}

/// Starts the basket.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    shop.service(bus, "basket")
        .on(shop.topics.orders.clone(), started)
        .with_state(shop.clone())
        .start(bus)
        .await
}
