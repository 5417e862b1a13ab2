//! The end of the day: what became of the orders, and whether the laws hold.

use std::fmt;
use std::time::Duration;

use eventbus::{Bus, Counts};
use rusqlite::Connection;
use serde::Serialize;

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
    /// Orders of the file, and those from the web that were accepted until the file was settled.
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

/// What the tables say at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Watched orders that exist.
    pub orders: u64,
    /// Those that are shipped or cancelled, told to their buyers, with nothing held or authorised.
    pub settled: u64,
}

/// Names the orders to watch: those of the file, whatever else is in the tables.
///
/// # Errors
/// What the tables report.
pub async fn watch_for(shop: &Shop, orders: Vec<u64>) -> eventbus::Result<()> {
    shop.store
        .run(move |tables| {
            tables.execute_batch("CREATE TEMP TABLE IF NOT EXISTS watched (ord INTEGER PRIMARY KEY)")?;
            let mut insert = tables.prepare_cached("INSERT OR IGNORE INTO watched VALUES (?1)")?;
            orders.iter().try_for_each(|order| insert.execute([order]).map(drop))
        })
        .await
}

/// Watches the orders from the web as well that were accepted until now. Returns how many are watched.
///
/// # Errors
/// What the tables report.
pub async fn watch_all(shop: &Shop) -> eventbus::Result<u64> {
    shop.store
        .run(|tables| {
            let all = "SELECT id FROM ordering_order UNION SELECT ord FROM basket_request";
            tables.execute(&format!("INSERT OR IGNORE INTO watched {all}"), [])?;
            tables.query_row("SELECT count(*) FROM watched", [], |row| row.get(0))
        })
        .await
}

/// Looks at how far the orders are.
///
/// # Errors
/// What the tables report.
pub async fn progress(shop: &Shop) -> eventbus::Result<Progress> {
    shop.store
        .run(|tables| {
            let count = |sql: &str| tables.prepare_cached(sql)?.query_row([], |row| row.get::<_, u64>(0));
            let orders = count("SELECT count(*) FROM ordering_order JOIN watched ON ord = id")?;
            let open = count(
                "SELECT count(*) FROM ordering_order JOIN watched ON ord = id WHERE status NOT IN ('Shipped', 'Cancelled')",
            )?;
            let held = count("SELECT count(*) FROM catalog_hold JOIN watched USING (ord) WHERE state = 'held'")?;
            let authorised = count("SELECT count(*) FROM payment_payment JOIN watched USING (ord) WHERE state = 'authorised'")?;
            let told = count("SELECT count(*) FROM notification_mail JOIN watched USING (ord) WHERE kind IN ('paid', 'cancelled')")?;
            Ok(Progress { orders, settled: (orders - open.max(held).max(authorised).min(orders)).min(told) })
        })
        .await
}

/// Reads the account of the watched orders; the stock is that of everybody.
fn account(tables: &Connection) -> rusqlite::Result<(Summary, Books)> {
    let count = |sql: &str| {
        tables.query_row(sql, [], |row| row.get::<_, Option<u64>>(0)).map(Option::unwrap_or_default)
    };
    let orders = "FROM ordering_order JOIN watched ON ord = id";
    let cancelled_by = |who: &str| count(&format!("SELECT count(*) {orders} WHERE cancelled_by = '{who}'"));
    let paid = format!("{orders} WHERE status IN ('Paid', 'Shipped')");
    let told = "FROM notification_mail JOIN watched USING (ord)";
    let terminal = format!("{told} WHERE kind IN ('paid', 'cancelled')");
    let summary = Summary {
        orders: count(&format!("SELECT count(*) {orders}"))?,
        paid: count(&format!("SELECT count(*) {paid}"))?,
        cancelled: count(&format!("SELECT count(*) {orders} WHERE status = 'Cancelled'"))?,
        cancelled_by: CancelledBy {
            stock: cancelled_by("stock")?,
            payment: cancelled_by("payment")?,
            buyer: cancelled_by("buyer")?,
        },
        revenue_cents: count(
            "SELECT sum(amount_cents) FROM payment_payment JOIN watched USING (ord) WHERE state = 'captured'",
        )?,
        quantity_sold: count(&format!("SELECT sum(quantity) {paid}"))?,
        stock: Stock {
            initial: count("SELECT sum(initial) FROM catalog_product")?,
            on_hand: count("SELECT sum(on_hand) FROM catalog_product")?,
            held: count("SELECT sum(quantity) FROM catalog_hold WHERE state = 'held'")?,
            sold: count("SELECT sum(quantity) FROM catalog_hold WHERE state = 'sold'")?,
        },
        terminal_events: count(&format!("SELECT count(*) {terminal}"))?,
        ..Summary::default()
    };
    let books = Books {
        paid_amount: count(&format!("SELECT sum(amount_cents) {paid}"))?,
        sold: count("SELECT sum(quantity) FROM catalog_hold JOIN watched USING (ord) WHERE state = 'sold'")?,
        with_one_terminal: count(&format!(
            "SELECT count(*) FROM (SELECT ord {terminal} GROUP BY ord HAVING count(*) = 1)"
        ))?,
        told: count(&format!("SELECT count(DISTINCT ord) {told}"))?,
    };
    Ok((summary, books))
}

/// What the laws compare the summary with, of the same orders.
struct Books {
    paid_amount: u64,
    sold: u64,
    with_one_terminal: u64,
    told: u64,
}

/// Draws up the account.
///
/// # Errors
/// What the tables or the bus report.
pub async fn draw_up(bus: &Bus, shop: &Shop, counts: Counts, took: Duration) -> eventbus::Result<Summary> {
    let (mut summary, books) = shop.store.run(account).await?;
    summary.redeliveries = counts.redelivered;
    summary.duplicates_skipped = shop.n_duplicates();
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
        law("quantity_sold = stock.sold", *quantity_sold == books.sold),
        law(
            "one terminal event an order",
            terminal_events == orders && books.with_one_terminal == *orders && books.told == *orders,
        ),
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
