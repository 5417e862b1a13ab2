//! Catalog: products and their stock; holds it, sells it, gives it back.

use eventbus::{Bus, Emits, Failure, Running, State, Typed};
use outbox::Tx;

use crate::contracts::{
    CommitStock, OrderId, OrderStatusChangedToAwaitingValidation, OrderStockConfirmed, OrderStockRejected,
    ReleaseStock,
};
use crate::db::{Db, Tables};
use crate::shop::Desk;

/// Catalog's own tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS catalog_product (id BIGINT PRIMARY KEY, initial BIGINT NOT NULL, on_hand BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS catalog_hold (
  ord BIGINT PRIMARY KEY, product BIGINT NOT NULL, quantity BIGINT NOT NULL, state TEXT NOT NULL);
";

/// How many products the shop has; an order's product is its number modulo this.
pub const PRODUCTS: u64 = 50;

/// Fills the shelves once.
///
/// # Errors
/// What the database reports.
pub async fn stock_up<D: Db>(desk: &Desk<D>, initial: &[(u32, u64)]) -> eventbus::Result<()> {
    let mut tx = desk.begin().await?;
    for &(product, quantity) in initial {
        let sql = "INSERT INTO catalog_product VALUES ($1, $2, $2) ON CONFLICT DO NOTHING";
        tx.run(sql, &[product.into(), quantity.into()]).await?;
    }
    tx.commit().await
}

/// Holds a quantity of a product for an order; returns how much is missing.
async fn hold(
    tables: &mut impl Tables,
    order: OrderId,
    product: u32,
    quantity: u32,
) -> eventbus::Result<u32> {
    // Whoever notes the order first makes the other wait, hold or release, and is seen by it.
    let note = "INSERT INTO catalog_hold VALUES ($1, $2, $3, 'rejected') ON CONFLICT DO NOTHING";
    if tables.run(note, &[order.into(), product.into(), quantity.into()]).await? == 0 {
        // It was given back before it was asked for: the order is off.
        return Ok(quantity);
    }
    let take = "UPDATE catalog_product SET on_hand = on_hand - $2 WHERE id = $1 AND on_hand >= $2";
    if tables.run(take, &[product.into(), quantity.into()]).await? == 1 {
        tables.run("UPDATE catalog_hold SET state = 'held' WHERE ord = $1", &[order.into()]).await?;
        return Ok(0);
    }
    let on_hand =
        tables.first("SELECT on_hand FROM catalog_product WHERE id = $1", &[product.into()]).await?;
    // A product nobody knows has no stock.
    let on_hand: u32 = on_hand.map_or(Ok(0), |row| row.number(0))?;
    // What came back in this moment is for the next order.
    Ok(quantity.saturating_sub(on_hand).max(1))
}

async fn validate<D: Db>(
    mut tx: Tx<D>,
    Typed(event): Typed<OrderStatusChangedToAwaitingValidation>,
    State(desk): State<Desk<D>>,
) -> Result<Emits, Failure> {
    let OrderStatusChangedToAwaitingValidation { order, product, quantity } = event;
    Ok(match hold(&mut *tx, order, product, quantity).await? {
        0 => Emits::new().to(&desk.topics.stock, &OrderStockConfirmed { order })?,
        missing => Emits::new().to(&desk.topics.stock, &OrderStockRejected { order, product, missing })?,
    })
}

async fn commit<D: Db>(
    mut tx: Tx<D>,
    Typed(command): Typed<CommitStock>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    let sql = "UPDATE catalog_hold SET state = 'sold' WHERE ord = $1 AND state = 'held'";
    tx.run(sql, &[command.order.into()]).await?;
    Ok(())
}

async fn release<D: Db>(
    mut tx: Tx<D>,
    Typed(command): Typed<ReleaseStock>,
    State(_): State<Desk<D>>,
) -> Result<(), Failure> {
    let order = command.order;
    // If it comes before the request to hold, nothing is held afterwards.
    let note = "INSERT INTO catalog_hold VALUES ($1, 0, 0, 'released') ON CONFLICT DO NOTHING";
    tx.run(note, &[order.into()]).await?;
    let give_back = "UPDATE catalog_hold SET state = 'released' WHERE ord = $1 AND state = 'held'
        RETURNING product, quantity";
    if let Some(held) = tx.first(give_back, &[order.into()]).await? {
        let (product, quantity): (u32, u32) = (held.number(0)?, held.number(1)?);
        let sql = "UPDATE catalog_product SET on_hand = on_hand + $2 WHERE id = $1";
        tx.run(sql, &[product.into(), quantity.into()]).await?;
    }
    Ok(())
}

/// Starts the catalog.
///
/// # Errors
/// What the bus reports.
pub async fn start<D: Db>(bus: &Bus, desk: &Desk<D>) -> eventbus::Result<Running> {
    desk.service(bus, "catalog")
        .on(desk.topics.waiting.clone(), validate::<D>)
        .on(desk.topics.catalog_commands.clone(), commit::<D>)
        .on(desk.topics.catalog_commands.clone(), release::<D>)
        .with_state(desk.clone())
        .start(bus)
        .await
}
