//! Catalog: products and their stock; holds it, sells it, gives it back.

use eventbus::{Bus, Emits, Failure, Running, State, Typed};
use rusqlite::{Connection, OptionalExtension, params};

use crate::contracts::{
    CommitStock, OrderId, OrderStatusChangedToAwaitingValidation, OrderStockConfirmed, OrderStockRejected,
    ReleaseStock, event_id,
};
use crate::shop::Shop;

/// Catalog's own tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS catalog_product (id INTEGER PRIMARY KEY, initial INTEGER NOT NULL, on_hand INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS catalog_hold (
  ord INTEGER PRIMARY KEY, product INTEGER NOT NULL, quantity INTEGER NOT NULL, state TEXT NOT NULL);
";

/// How many products the shop has; an order's product is its number modulo this.
pub const PRODUCTS: u64 = 50;

/// Fills the shelves once.
///
/// # Errors
/// What the database reports.
pub fn stock_up(tables: &Connection, initial: &[(u32, u64)]) -> rusqlite::Result<()> {
    let mut insert = tables.prepare_cached("INSERT OR IGNORE INTO catalog_product VALUES (?1, ?2, ?2)")?;
    initial.iter().try_for_each(|(product, quantity)| insert.execute(params![product, quantity]).map(drop))
}

enum Held {
    Yes { repeated: bool },
    No { missing: u32, repeated: bool },
}

fn hold(tables: &Connection, order: OrderId, product: u32, quantity: u32) -> rusqlite::Result<Held> {
    let found: Option<String> = tables
        .prepare_cached("SELECT state FROM catalog_hold WHERE ord = ?1")?
        .query_row([order], |row| row.get(0))
        .optional()?;
    match found.as_deref() {
        Some("held" | "sold") => return Ok(Held::Yes { repeated: true }),
        Some(_) => return Ok(Held::No { missing: quantity, repeated: true }),
        None => {}
    }
    let on_hand: Option<u32> = tables
        .prepare_cached("SELECT on_hand FROM catalog_product WHERE id = ?1")?
        .query_row([product], |row| row.get(0))
        .optional()?;
    // A product nobody knows has no stock.
    let on_hand = on_hand.unwrap_or(0);
    let enough = on_hand >= quantity;
    let mut insert = tables.prepare_cached("INSERT INTO catalog_hold VALUES (?1, ?2, ?3, ?4)")?;
    insert.execute(params![order, product, quantity, if enough { "held" } else { "rejected" }])?;
    if !enough {
        return Ok(Held::No { missing: quantity - on_hand, repeated: false });
    }
    let mut take =
        tables.prepare_cached("UPDATE catalog_product SET on_hand = on_hand - ?2 WHERE id = ?1")?;
    take.execute(params![product, quantity])?;
    Ok(Held::Yes { repeated: false })
}

async fn validate(
    Typed(event): Typed<OrderStatusChangedToAwaitingValidation>,
    State(shop): State<Shop>,
) -> Result<Emits, Failure> {
    let OrderStatusChangedToAwaitingValidation { order, product, quantity } = event;
    let (emits, repeated) = match shop.store.run(move |tables| hold(tables, order, product, quantity)).await?
    {
        Held::Yes { repeated } => {
            let event = OrderStockConfirmed { order };
            (Emits::new().to_as(&shop.topics.stock, &event, event_id(order, "stock-confirmed"))?, repeated)
        }
        Held::No { missing, repeated } => {
            let event = OrderStockRejected { order, product, missing };
            (Emits::new().to_as(&shop.topics.stock, &event, event_id(order, "stock-rejected"))?, repeated)
        }
    };
    if repeated {
        shop.count_duplicate();
    }
    Ok(emits)
}

async fn commit(Typed(command): Typed<CommitStock>, State(shop): State<Shop>) -> Result<(), Failure> {
    let sql = "UPDATE catalog_hold SET state = 'sold' WHERE ord = ?1 AND state = 'held'";
    let n_sold = shop.store.run(move |tables| tables.prepare_cached(sql)?.execute([command.order])).await?;
    if n_sold == 0 {
        shop.count_duplicate();
    }
    Ok(())
}

async fn release(Typed(command): Typed<ReleaseStock>, State(shop): State<Shop>) -> Result<(), Failure> {
    let order = command.order;
    let changed = shop
        .store
        .run(move |tables| {
            let sql = "UPDATE catalog_hold SET state = 'released' WHERE ord = ?1 AND state = 'held' RETURNING product, quantity";
            let held: Option<(u32, u32)> =
                tables.prepare_cached(sql)?.query_row([order], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            match held {
                Some((product, quantity)) => {
                    let sql = "UPDATE catalog_product SET on_hand = on_hand + ?2 WHERE id = ?1";
                    tables.prepare_cached(sql)?.execute(params![product, quantity])
                }
                // It came before the request to hold: remember it, so that nothing is held afterwards.
                None => {
                    let sql = "INSERT OR IGNORE INTO catalog_hold VALUES (?1, 0, 0, 'released')";
                    tables.prepare_cached(sql)?.execute([order])
                }
            }
        })
        .await?;
    if changed == 0 {
        shop.count_duplicate();
    }
    Ok(())
}

/// Starts the catalog.
///
/// # Errors
/// What the bus reports.
pub async fn start(bus: &Bus, shop: &Shop) -> eventbus::Result<Running> {
    shop.service(bus, "catalog")
        .on(shop.topics.waiting.clone(), validate)
        .on(shop.topics.catalog_commands.clone(), commit)
        .on(shop.topics.catalog_commands.clone(), release)
        .with_state(shop.clone())
        .start(bus)
        .await
}
