//! The end of the day: what became of the orders, and whether the laws hold.

use std::fmt;
use std::time::Duration;

use eventbus::{Bus, Counts};
use serde::Serialize;

use crate::db::{Db, Tables as _};
use crate::shop::Shop;

/// Why orders were cancelled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CancelledBy {
    /// Not enough stock.
    pub stock: u64,
    /// The provider declined.
    pub payment: u64,
    /// The buyer changed their mind.
    pub buyer: u64,
}

/// Where the stock is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stock {
    /// At the beginning.
    pub initial: u64,
    /// On the shelf.
    pub on_hand: u64,
    /// Held for orders that are not paid yet.
    pub held: u64,
    /// Sold.
    pub sold: u64,
}

/// A law of the shop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Law {
    /// What must hold.
    pub name: &'static str,
    /// Whether it does.
    pub holds: bool,
}

/// The whole account.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    /// Orders that were accepted, from files and from the web.
    pub orders: u64,
    /// Orders that were paid, shipped ones included.
    pub paid: u64,
    /// Orders that were cancelled.
    pub cancelled: u64,
    /// Why.
    pub cancelled_by: CancelledBy,
    /// Captured money, in cents.
    pub revenue_cents: u64,
    /// Pieces of paid orders.
    pub quantity_sold: u64,
    /// The stock.
    pub stock: Stock,
    /// Distinct paid or cancelled events.
    pub terminal_events: u64,
    /// Events in dead-letter topics.
    pub dead_letters: u64,
    /// Deliveries that were not the first of their event, in this process.
    pub redeliveries: u64,
    /// Inputs that had been handled before, in this process.
    pub duplicates_skipped: u64,
    /// How long this run took.
    pub seconds: f64,
    /// The laws.
    pub laws: Vec<Law>,
}

/// Adds up a column.
macro_rules! sum {
    ($column:literal, $of:literal) => {
        concat!("SELECT CAST(coalesce(sum(", $column, "), 0) AS BIGINT) FROM ", $of)
    };
}

/// What the tables say at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Orders that were accepted.
    pub orders: u64,
    /// Those that are shipped or cancelled, told to their buyers, with nothing in a basket, held or authorised.
    pub settled: u64,
}

/// Looks at how far the orders are, each service for itself.
///
/// # Errors
/// What the tables report.
pub async fn progress<D: Db>(shop: &Shop<D>) -> eventbus::Result<Progress> {
    // What is behind is looked at first, so that nothing is settled that was not accepted.
    let told = "SELECT count(*) FROM notification_mail WHERE kind IN ('paid', 'cancelled')";
    let told = shop.notification.look().await?.count(told).await?;
    let authorised = "SELECT count(*) FROM payment_payment WHERE state = 'authorised'";
    let authorised = shop.payment.look().await?.count(authorised).await?;
    let held = "SELECT count(*) FROM catalog_hold WHERE state = 'held'";
    let held = shop.catalog.look().await?.count(held).await?;
    let ended = "SELECT count(*) FROM ordering_order WHERE status IN ('Shipped', 'Cancelled')";
    let ended = shop.ordering.look().await?.count(ended).await?;
    let mut basket = shop.basket.look().await?;
    let baskets = basket.count("SELECT count(*) FROM basket_basket").await?;
    let orders = basket.count("SELECT count(*) FROM basket_checkout").await?;
    Ok(Progress { orders, settled: ended.min(told).saturating_sub(held.max(authorised).max(baskets)) })
}

/// What the laws compare the summary with.
struct Books {
    paid_amount: u64,
    told_orders: u64,
    told_once: u64,
    baskets: u64,
}

/// Reads the account, each service's part from its own tables.
async fn account<D: Db>(shop: &Shop<D>) -> eventbus::Result<(Summary, Books)> {
    let mut ordering = shop.ordering.look().await?;
    let mut summary = Summary {
        orders: ordering.count("SELECT count(*) FROM ordering_order").await?,
        paid: ordering
            .count("SELECT count(*) FROM ordering_order WHERE status IN ('Paid', 'Shipped')")
            .await?,
        cancelled: ordering.count("SELECT count(*) FROM ordering_order WHERE status = 'Cancelled'").await?,
        quantity_sold: ordering
            .count(sum!("quantity", "ordering_order WHERE status IN ('Paid', 'Shipped')"))
            .await?,
        ..Summary::default()
    };
    let why =
        "SELECT cancelled_by, count(*) FROM ordering_order WHERE status = 'Cancelled' GROUP BY cancelled_by";
    for row in ordering.read(why, &[]).await? {
        let n_orders = row.number(1)?;
        match row.text(0)? {
            "stock" => summary.cancelled_by.stock = n_orders,
            "payment" => summary.cancelled_by.payment = n_orders,
            _ => summary.cancelled_by.buyer = n_orders,
        }
    }
    let mut payment = shop.payment.look().await?;
    summary.revenue_cents =
        payment.count(sum!("amount_cents", "payment_payment WHERE state = 'captured'")).await?;
    let mut catalog = shop.catalog.look().await?;
    summary.stock = Stock {
        initial: catalog.count(sum!("initial", "catalog_product")).await?,
        on_hand: catalog.count(sum!("on_hand", "catalog_product")).await?,
        held: catalog.count(sum!("quantity", "catalog_hold WHERE state = 'held'")).await?,
        sold: catalog.count(sum!("quantity", "catalog_hold WHERE state = 'sold'")).await?,
    };
    let mut notification = shop.notification.look().await?;
    summary.terminal_events = notification
        .count("SELECT count(*) FROM notification_mail WHERE kind IN ('paid', 'cancelled')")
        .await?;
    let books = Books {
        paid_amount: ordering
            .count(sum!("amount_cents", "ordering_order WHERE status IN ('Paid', 'Shipped')"))
            .await?,
        told_orders: notification.count("SELECT count(DISTINCT ord) FROM notification_mail").await?,
        told_once: notification
            .count(
                "SELECT count(*) FROM (SELECT ord FROM notification_mail WHERE kind IN ('paid', 'cancelled')
                    GROUP BY ord HAVING count(*) = 1) AS once",
            )
            .await?,
        baskets: shop.basket.look().await?.count("SELECT count(*) FROM basket_basket").await?,
    };
    Ok((summary, books))
}

/// Draws up the account.
///
/// # Errors
/// What the tables or the bus report.
pub async fn draw_up<D: Db>(
    bus: &Bus,
    shop: &Shop<D>,
    counts: Counts,
    took: Duration,
) -> eventbus::Result<Summary> {
    let (mut summary, books) = account(shop).await?;
    summary.redeliveries = counts.redelivered;
    summary.duplicates_skipped = counts.duplicates;
    summary.seconds = (took.as_secs_f64() * 1000.0).round() / 1000.0;
    if let Some(admin) = bus.transport().admin() {
        let letters = admin.topics().await?.into_iter().filter(|info| info.topic.as_str().ends_with(".dlq"));
        summary.dead_letters = letters.flat_map(|info| info.partitions).map(|part| part.n_kept).sum();
    }
    let Summary { orders, paid, cancelled, revenue_cents, quantity_sold, stock, terminal_events, .. } =
        &summary;
    let law = |name, holds| Law { name, holds };
    summary.laws = vec![
        law("orders = paid + cancelled", *orders == paid + cancelled),
        law("initial = on_hand + held + sold", stock.initial == stock.on_hand + stock.held + stock.sold),
        law("revenue = amounts of paid orders", *revenue_cents == books.paid_amount),
        law("quantity_sold = stock.sold", *quantity_sold == stock.sold),
        law(
            "one terminal event an order",
            terminal_events == orders && books.told_once == *orders && books.told_orders == *orders,
        ),
        law("no basket is left of an order", books.baskets == 0),
    ];
    Ok(summary)
}

impl Summary {
    /// Tells whether every law holds.
    pub fn is_lawful(&self) -> bool {
        self.laws.iter().all(|law| law.holds)
    }
}

/// The table a person reads.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        let mut row = |name: &str, value: String| {
            table.add_row(vec![
                comfy_table::Cell::new(name),
                comfy_table::Cell::new(value).set_alignment(comfy_table::CellAlignment::Right),
            ]);
        };
        let Self { cancelled_by, stock, .. } = self;
        row("orders", self.orders.to_string());
        row("  paid and shipped", self.paid.to_string());
        row("  cancelled for want of stock", cancelled_by.stock.to_string());
        row("  cancelled, payment declined", cancelled_by.payment.to_string());
        row("  cancelled by the buyer", cancelled_by.buyer.to_string());
        row("revenue, dollars", format!("{}.{:02}", self.revenue_cents / 100, self.revenue_cents % 100));
        row("pieces sold", self.quantity_sold.to_string());
        row("stock at first / left", format!("{} / {}", stock.initial, stock.on_hand));
        row("dead letters", self.dead_letters.to_string());
        row("redelivered / skipped as known", format!("{} / {}", self.redeliveries, self.duplicates_skipped));
        row("seconds", format!("{:.1}", self.seconds));
        for law in &self.laws {
            row(law.name, if law.holds { "holds".into() } else { "BROKEN".into() });
        }
        write!(f, "{table}")
    }
}
