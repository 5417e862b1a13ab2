//! The life of an order: six states, nine inputs, a total transition without input or output.

use serde::Serialize;

/// Where an order is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Status {
    /// Waits for its grace period.
    Submitted,
    /// Waits for its stock.
    AwaitingValidation,
    /// Waits for its payment.
    StockConfirmed,
    /// Paid.
    Paid,
    /// On its way.
    Shipped,
    /// Off.
    Cancelled,
}

impl Status {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::Submitted,
        Self::AwaitingValidation,
        Self::StockConfirmed,
        Self::Paid,
        Self::Shipped,
        Self::Cancelled,
    ];

    /// Returns the name as it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Submitted => "Submitted",
            Self::AwaitingValidation => "AwaitingValidation",
            Self::StockConfirmed => "StockConfirmed",
            Self::Paid => "Paid",
            Self::Shipped => "Shipped",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Reads a stored name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }
}

/// What happens to an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The grace period is over.
    Grace,
    /// The stock is held.
    StockOk,
    /// There is not enough stock.
    StockShort,
    /// No word about the stock in time.
    StockLate,
    /// The payment is authorised.
    PayOk,
    /// The payment is declined.
    PayFailed,
    /// No word about the payment in time.
    PayLate,
    /// The buyer cancels.
    Cancel,
    /// The parcel leaves.
    Ship,
}

impl Input {
    /// Every input.
    pub const ALL: [Self; 9] = [
        Self::Grace,
        Self::StockOk,
        Self::StockShort,
        Self::StockLate,
        Self::PayOk,
        Self::PayFailed,
        Self::PayLate,
        Self::Cancel,
        Self::Ship,
    ];

    /// Returns the name as it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grace => "Grace",
            Self::StockOk => "StockOk",
            Self::StockShort => "StockShort",
            Self::StockLate => "StockLate",
            Self::PayOk => "PayOk",
            Self::PayFailed => "PayFailed",
            Self::PayLate => "PayLate",
            Self::Cancel => "Cancel",
            Self::Ship => "Ship",
        }
    }
}

/// What must follow a transition, besides the event of the new state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Catalog: turn the hold into a sale.
    Commit,
    /// Catalog: give the hold back, also one that is still to come.
    Release,
    /// Payment: take the money.
    Capture,
    /// Payment: let the authorisation go, also one that is still to come.
    Void,
    /// Payment: give the money back.
    Refund,
    /// Arm the timer of the new state.
    Timer,
}

/// What a state makes of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A new state, and what follows.
    To(Status, &'static [Effect]),
    /// The state stays; something follows.
    Stay(&'static [Effect]),
    /// Late or repeated: nothing.
    Ignore,
    /// It cannot be: set aside for a person.
    Park,
    /// The caller is told no.
    Refuse,
}

/// Decides. Every combination is written out: a new state or input does not compile until it is.
pub fn on(status: Status, input: Input) -> Next {
    use Effect::{Capture, Commit, Refund, Release, Timer, Void};
    use Input as I;
    use Next::{Ignore, Park, Refuse, Stay, To};
    use Status::{AwaitingValidation, Cancelled, Paid, Shipped, StockConfirmed, Submitted};
    match (status, input) {
        (Submitted, I::Grace) => To(AwaitingValidation, &[Timer]),
        (Submitted, I::StockOk | I::StockShort | I::PayOk | I::PayFailed) => Park,
        (Submitted, I::StockLate | I::PayLate) => Ignore,
        (Submitted, I::Cancel) => To(Cancelled, &[]),
        (Submitted, I::Ship) => Refuse,

        (AwaitingValidation, I::Grace | I::PayLate) => Ignore,
        (AwaitingValidation, I::StockOk) => To(StockConfirmed, &[Timer]),
        (AwaitingValidation, I::StockShort) => To(Cancelled, &[]),
        (AwaitingValidation, I::StockLate | I::Cancel) => To(Cancelled, &[Release]),
        (AwaitingValidation, I::PayOk | I::PayFailed) => Park,
        (AwaitingValidation, I::Ship) => Refuse,

        (StockConfirmed, I::Grace | I::StockOk | I::StockLate) => Ignore,
        (StockConfirmed, I::StockShort) => Park,
        (StockConfirmed, I::PayOk) => To(Paid, &[Capture, Commit]),
        (StockConfirmed, I::PayFailed) => To(Cancelled, &[Release]),
        (StockConfirmed, I::PayLate | I::Cancel) => To(Cancelled, &[Void, Release]),
        (StockConfirmed, I::Ship) => Refuse,

        (Paid, I::Grace | I::StockOk | I::StockLate | I::PayOk | I::PayLate) => Ignore,
        (Paid, I::StockShort | I::PayFailed) => Park,
        (Paid, I::Cancel) => Refuse,
        (Paid, I::Ship) => To(Shipped, &[]),

        (Shipped, I::Grace | I::StockOk | I::StockLate | I::PayOk | I::PayLate | I::Ship) => Ignore,
        (Shipped, I::StockShort | I::PayFailed) => Park,
        (Shipped, I::Cancel) => Refuse,

        (Cancelled, I::StockOk) => Stay(&[Release]),
        (Cancelled, I::PayOk) => Stay(&[Refund]),
        (Cancelled, I::Grace | I::StockShort | I::StockLate | I::PayFailed | I::PayLate | I::Cancel) => {
            Ignore
        }
        (Cancelled, I::Ship) => Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the shop's documents, cell by cell: columns as in [`Input::ALL`].
    const TABLE: [(Status, [&str; 9]); 6] = [
        (
            Status::Submitted,
            [
                "AwaitingValidation timer",
                "park",
                "park",
                "ignore",
                "park",
                "park",
                "ignore",
                "Cancelled",
                "refuse",
            ],
        ),
        (
            Status::AwaitingValidation,
            [
                "ignore",
                "StockConfirmed timer",
                "Cancelled",
                "Cancelled release",
                "park",
                "park",
                "ignore",
                "Cancelled release",
                "refuse",
            ],
        ),
        (
            Status::StockConfirmed,
            [
                "ignore",
                "ignore",
                "park",
                "ignore",
                "Paid capture commit",
                "Cancelled release",
                "Cancelled void release",
                "Cancelled void release",
                "refuse",
            ],
        ),
        (
            Status::Paid,
            ["ignore", "ignore", "park", "ignore", "ignore", "park", "ignore", "refuse", "Shipped"],
        ),
        (
            Status::Shipped,
            ["ignore", "ignore", "park", "ignore", "ignore", "park", "ignore", "refuse", "ignore"],
        ),
        (
            Status::Cancelled,
            [
                "ignore",
                "stay release",
                "ignore",
                "ignore",
                "stay refund",
                "ignore",
                "ignore",
                "ignore",
                "refuse",
            ],
        ),
    ];

    fn text(next: Next) -> String {
        let with = |word: &str, effects: &[Effect]| {
            effects.iter().fold(word.to_owned(), |text, effect| {
                format!("{text} {}", format!("{effect:?}").to_lowercase())
            })
        };
        match next {
            Next::To(status, effects) => with(status.as_str(), effects),
            Next::Stay(effects) => with("stay", effects),
            Next::Ignore => "ignore".into(),
            Next::Park => "park".into(),
            Next::Refuse => "refuse".into(),
        }
    }

    #[test]
    fn every_cell_is_as_documented() {
        for (status, cells) in TABLE {
            for (input, cell) in Input::ALL.into_iter().zip(cells) {
                assert_eq!(text(on(status, input)), cell, "{status:?} on {input:?}");
            }
        }
    }

    #[test]
    fn names_round_trip() {
        assert!(Status::ALL.into_iter().all(|status| Status::parse(status.as_str()) == Some(status)));
    }
}
