//! Basket: checkouts, from the file of orders and from the web.

use std::time::Duration;

use eventbus::{Bus, Error, ErrorKind, Failure, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{OrderId, OrderStarted, UserCheckoutAccepted};
use crate::db::{Db, Tables};
use crate::orders_file::{FIRST_WEB_ORDER, OrderLine};
use crate::patience::patiently;
use crate::shop::Desk;

/// Basket's own tables: what was checked out, and what is not an order yet.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS basket_checkout (ord BIGINT PRIMARY KEY, request TEXT UNIQUE, asked TEXT);
CREATE TABLE IF NOT EXISTS basket_basket (ord BIGINT PRIMARY KEY, buyer BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS basket_import (file TEXT PRIMARY KEY, n_lines BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS basket_number (id BIGINT PRIMARY KEY, last BIGINT NOT NULL);
";

/// Checkouts of one transaction.
const BATCH: usize = 128;

/// Imports the lines that no earlier run has imported: baskets, events and how far it is, in one transaction.
///
/// # Errors
/// What the tables report.
pub async fn import<D: Db>(
    desk: &Desk<D>,
    digest: &str,
    lines: &[OrderLine],
    rate: Option<u32>,
) -> eventbus::Result<()> {
    let sql = "SELECT n_lines FROM basket_import WHERE file = $1";
    let done = patiently(async || {
        let found = desk.look().await?.first(sql, &[digest.into()]).await?;
        found.map_or(Ok(0), |row| row.number(0))
    });
    let done: usize = done.await?;
    let mut pace = rate.map(|rate| tokio::time::interval(Duration::from_secs(1) / rate.max(1)));
    let batch = if rate.is_some() { 1 } else { BATCH };
    let mut n_done = done;
    for part in lines.get(done..).unwrap_or_default().chunks(batch) {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        n_done += part.len();
        patiently(async || import_part(desk, digest, part, n_done).await).await?;
    }
    Ok(())
}

/// What is imported already is passed over: a commit may have been answered with a lost connection.
async fn import_part<D: Db>(
    desk: &Desk<D>,
    digest: &str,
    part: &[OrderLine],
    n_done: usize,
) -> eventbus::Result<()> {
    let mut tx = desk.begin().await?;
    for line in part {
        let known = "INSERT INTO basket_checkout (ord) VALUES ($1) ON CONFLICT DO NOTHING";
        if tx.run(known, &[line.order.into()]).await? == 1 {
            accept(&mut tx, desk, &line.checkout()).await?;
        }
    }
    let sql = "INSERT INTO basket_import VALUES ($1, $2) ON CONFLICT (file) DO UPDATE SET n_lines = $2";
    tx.run(sql, &[digest.into(), (n_done as u64).into()]).await?;
    tx.commit().await
}

/// The basket waits for its order, and ordering is told.
async fn accept<D: Db>(
    tx: &mut outbox::Transaction<D>,
    desk: &Desk<D>,
    checkout: &UserCheckoutAccepted,
) -> eventbus::Result<()> {
    let basket = "INSERT INTO basket_basket VALUES ($1, $2)";
    tx.run(basket, &[checkout.order.into(), checkout.buyer.into()]).await?;
    tx.publish(&desk.topics.checkouts, checkout).map(drop)
}

/// Checks out an order from the web. The same request id gives the same order, however often it comes: the id, the order's
/// number and the event are one transaction.
///
/// # Errors
/// [`Conflict`](ErrorKind::Conflict) if the same request id came with another order before; what the tables report:
/// nothing of it is stored then, and the request may be repeated.
pub async fn check_out<D: Db>(
    desk: &Desk<D>,
    request: Option<String>,
    order: impl Fn(OrderId) -> UserCheckoutAccepted,
) -> eventbus::Result<OrderId> {
    let request = request.unwrap_or_else(|| eventbus::EventId::generate().to_string());
    // What was asked for, whatever the order's number will be.
    let asked = format!("{:?}", order(0));
    let mut tx = desk.begin().await?;
    // Whoever takes a number makes others wait, also those with the same request.
    let next = "INSERT INTO basket_number VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET last = basket_number.last + 1
        RETURNING last";
    let taken = tx.first(next, &[FIRST_WEB_ORDER.into()]).await?;
    let taken = taken.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the shop has no numbers for orders"))?;
    let number: OrderId = taken.number(0)?;
    let new = "INSERT INTO basket_checkout VALUES ($1, $2, $3) ON CONFLICT (request) DO NOTHING";
    if tx.run(new, &[number.into(), request.as_str().into(), asked.as_str().into()]).await? == 1 {
        accept(&mut tx, desk, &order(number)).await?;
        tx.commit().await?;
        return Ok(number);
    }
    let before = "SELECT ord FROM basket_checkout WHERE request = $1 AND asked = $2";
    let before = tx.first(before, &[request.as_str().into(), asked.into()]).await?;
    tx.rollback().await?;
    match before {
        Some(row) => row.number(0),
        None => Err(Error::new(ErrorKind::Conflict, "this x-request-id came with another order before")
            .with("request", request)),
    }
}

/// Whether a checkout was accepted under this number: ordering knows the order then, or will.
///
/// # Errors
/// What the tables report.
pub async fn has_accepted(tables: &mut impl Tables, order: OrderId) -> eventbus::Result<bool> {
    let sql = "SELECT ord FROM basket_checkout WHERE ord = $1";
    Ok(tables.first(sql, &[order.into()]).await?.is_some())
}

async fn started<D: Db>(
    mut tx: Tx<D>,
    Typed(event): Typed<OrderStarted>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    tx.run("DELETE FROM basket_basket WHERE ord = $1", &[event.order.into()]).await?;
    Ok(())
}

/// Starts the basket.
///
/// # Errors
/// What the bus reports.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    desk.service(bus, "basket")
        .on(desk.topics.orders.clone(), started::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await
}
