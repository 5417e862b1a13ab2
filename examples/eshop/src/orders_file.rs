//! The file of orders: `order,buyer,date,quantity,amount`, a line each.

use crate::catalog::PRODUCTS;
use crate::contracts::{OrderId, UserCheckoutAccepted};

/// The orders that come with the example.
pub const SHIPPED: &str = include_str!("../data/cdnow_orders.csv");

/// Numbers from here do not fit the tables.
pub const MAX_STORED: u64 = i64::MAX as u64;

/// One purchase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderLine {
    /// Its running number.
    pub order: OrderId,
    /// Who bought.
    pub buyer: u64,
    /// How many.
    pub quantity: u32,
    /// For how much, in cents.
    pub amount_cents: u64,
}

impl OrderLine {
    /// The file names no product: it is the order's number modulo 50.
    pub fn product(&self) -> u32 {
        (self.order % PRODUCTS) as u32
    }

    /// The checkout that the line stands for.
    pub fn checkout(&self) -> UserCheckoutAccepted {
        let Self { order, buyer, quantity, amount_cents } = *self;
        UserCheckoutAccepted { order, buyer, product: self.product(), quantity, amount_cents }
    }
}

/// Web orders are numbered from here; a file's orders stay below.
pub const FIRST_WEB_ORDER: OrderId = 1_000_000_000;

/// What a file holds: the lines that can be read, and what is wrong with the others.
#[derive(Debug, Default)]
pub struct OrdersFile {
    /// The readable lines, in order.
    pub lines: Vec<OrderLine>,
    /// For each broken line its number, from 1, and what is wrong.
    pub broken: Vec<(usize, String)>,
}

impl OrdersFile {
    /// Names the content: a corrected file is another one, and is imported whole under the same ids.
    pub fn digest(&self) -> String {
        let text: String = self.lines.iter().map(|line| format!("{line:?}\n")).collect();
        eventbus::EventId::derive(&eventbus::EventId::parse("orders"), &text).to_string()
    }
}

/// Reads a file's text. A broken line is named and the rest goes on.
pub fn read(text: &str) -> OrdersFile {
    let mut file = OrdersFile::default();
    let mut seen = std::collections::HashSet::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim_end_matches('\r');
        if line.is_empty() || (at == 0 && line.starts_with("order,")) {
            continue;
        }
        match parse(line) {
            Ok(line) if seen.insert(line.order) => file.lines.push(line),
            Ok(line) => file.broken.push((at + 1, format!("order {} was on an earlier line", line.order))),
            Err(problem) => file.broken.push((at + 1, problem)),
        }
    }
    file
}

fn parse(line: &str) -> Result<OrderLine, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let [order, buyer, _date, quantity, amount] = fields.as_slice() else {
        return Err(format!("{} fields, expected order,buyer,date,quantity,amount", fields.len()));
    };
    let number =
        |name: &str, text: &str| text.parse::<u64>().map_err(|_| format!("{name} is not a number: {text:?}"));
    let quantity = number("quantity", quantity)?;
    let bounded = |name: &str, text: &str, below: u64| match number(name, text)? {
        value if value < below => Ok(value),
        _ => Err(format!("{name} must be below {below}")),
    };
    Ok(OrderLine {
        order: bounded("order", order, FIRST_WEB_ORDER)?,
        buyer: bounded("buyer", buyer, MAX_STORED)?,
        quantity: u32::try_from(quantity)
            .ok()
            .filter(|quantity| *quantity > 0)
            .ok_or("quantity is out of range")?,
        amount_cents: cents(amount)
            .filter(|cents| *cents < MAX_STORED)
            .ok_or_else(|| format!("amount is not dollars with two decimals: {amount:?}"))?,
    })
}

/// Reads dollars exactly, without a detour through binary fractions.
fn cents(text: &str) -> Option<u64> {
    let (dollars, cents) = text.split_once('.').unwrap_or((text, "00"));
    if cents.len() > 2 || !text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    let cents: u64 = format!("{cents:0<2}").parse().ok()?;
    dollars.parse::<u64>().ok()?.checked_mul(100)?.checked_add(cents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_has_the_totals_of_its_notice() {
        let file = read(SHIPPED);
        assert!(file.broken.is_empty());
        assert_eq!(file.lines.len(), 6_919);
        assert_eq!(file.lines.iter().map(|line| u64::from(line.quantity)).sum::<u64>(), 16_479);
        assert_eq!(file.lines.iter().map(|line| line.amount_cents).sum::<u64>(), 24_409_194);
    }

    #[test]
    fn broken_lines_are_named_and_the_rest_goes_on() {
        let file = read(
            "order,buyer,date,quantity,amount\n1,2,d,3,4.5\nx,2,d,3,4.00\n2,2,d,0,1.00\n3,2,d,1,1.234\n4,2,d\n1,2,d,1,1.00\n5,2,d,1,7\n",
        );
        assert_eq!(
            file.lines.iter().map(|line| (line.order, line.amount_cents)).collect::<Vec<_>>(),
            [(1, 450), (5, 700)]
        );
        assert_eq!(file.broken.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [3, 4, 5, 6, 7]);
    }
}
