//! The shop's events, commands and topics: what the services agree on, and all they know of each other.

use eventbus::{Event, EventId, Topic};
use serde::{Deserialize, Serialize};

/// The number of an order.
pub type OrderId = u64;

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident $wire:literal by $key:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Event, Serialize, Deserialize)]
        #[event(type = $wire, version = 1, key = $key)]
        pub struct $name {
            $(#[allow(missing_docs, reason = "named as in the shop's language")] pub $field: $type),*
        }
    )*};
}

events! {
    /// A buyer has paid with the basket's content.
    UserCheckoutAccepted "shop.UserCheckoutAccepted" by buyer {
        order: OrderId, buyer: u64, product: u32, quantity: u32, amount_cents: u64,
    }
    /// An order exists; the basket can go.
    OrderStarted "shop.OrderStarted" by buyer { order: OrderId, buyer: u64 }
    /// The order waits for its grace period.
    OrderStatusChangedToSubmitted "shop.OrderStatusChangedToSubmitted" by order { order: OrderId, buyer: u64 }
    /// The grace period is over.
    GracePeriodConfirmed "shop.GracePeriodConfirmed" by order { order: OrderId }
    /// The order waits for its stock.
    OrderStatusChangedToAwaitingValidation "shop.OrderStatusChangedToAwaitingValidation" by order {
        order: OrderId, product: u32, quantity: u32,
    }
    /// The stock is held.
    OrderStockConfirmed "shop.OrderStockConfirmed" by order { order: OrderId }
    /// There is not enough stock.
    OrderStockRejected "shop.OrderStockRejected" by order { order: OrderId, product: u32, missing: u32 }
    /// The order waits for its payment.
    OrderStatusChangedToStockConfirmed "shop.OrderStatusChangedToStockConfirmed" by order {
        order: OrderId, buyer: u64, amount_cents: u64,
    }
    /// The provider authorised the amount.
    OrderPaymentSucceeded "shop.OrderPaymentSucceeded" by order { order: OrderId }
    /// The provider declined.
    OrderPaymentFailed "shop.OrderPaymentFailed" by order { order: OrderId }
    /// The order is paid: terminal for the money.
    OrderStatusChangedToPaid "shop.OrderStatusChangedToPaid" by order {
        order: OrderId, buyer: u64, product: u32, quantity: u32, amount_cents: u64,
    }
    /// The order is on its way.
    OrderStatusChangedToShipped "shop.OrderStatusChangedToShipped" by order { order: OrderId, buyer: u64 }
    /// The order is off, whatever the way: terminal.
    OrderStatusChangedToCancelled "shop.OrderStatusChangedToCancelled" by order {
        order: OrderId, buyer: u64, reason: String,
    }
    /// Asks the catalog to turn a hold into a sale.
    CommitStock "shop.CommitStock" by order { order: OrderId }
    /// Asks the catalog to give a hold back.
    ReleaseStock "shop.ReleaseStock" by order { order: OrderId }
    /// Asks payment to take the authorised amount.
    CapturePayment "shop.CapturePayment" by order { order: OrderId }
    /// Asks payment to let an authorisation go, or to refuse a later one.
    VoidPayment "shop.VoidPayment" by order { order: OrderId }
    /// Asks payment to give money back that came too late.
    RefundPayment "shop.RefundPayment" by order { order: OrderId }
    /// A buyer asks to cancel.
    CancelOrder "shop.CancelOrder" by order { order: OrderId }
}

/// The topics, by the names of the shop's documents.
#[derive(Debug, Clone)]
pub struct Topics {
    /// `order-checkouts`
    pub checkouts: Topic,
    /// `orders`
    pub orders: Topic,
    /// `order-status`
    pub status: Topic,
    /// `grace-period-confirmed`
    pub grace: Topic,
    /// `orders-waiting-for-validation`
    pub waiting: Topic,
    /// `order-stock-statuses`
    pub stock: Topic,
    /// `stock-confirmed`
    pub stock_confirmed: Topic,
    /// `payment-status`
    pub payment: Topic,
    /// `paid-orders`
    pub paid: Topic,
    /// `catalog.commands`
    pub catalog_commands: Topic,
    /// `payment.commands`
    pub payment_commands: Topic,
    /// `ordering.commands`
    pub ordering_commands: Topic,
}

impl Topics {
    /// Names the topics.
    ///
    /// # Errors
    /// None in practice: the names are fixed and valid.
    pub fn new() -> eventbus::Result<Self> {
        Ok(Self {
            checkouts: Topic::new("order-checkouts")?,
            orders: Topic::new("orders")?,
            status: Topic::new("order-status")?,
            grace: Topic::new("grace-period-confirmed")?,
            waiting: Topic::new("orders-waiting-for-validation")?,
            stock: Topic::new("order-stock-statuses")?,
            stock_confirmed: Topic::new("stock-confirmed")?,
            payment: Topic::new("payment-status")?,
            paid: Topic::new("paid-orders")?,
            catalog_commands: Topic::new("catalog.commands")?,
            payment_commands: Topic::new("payment.commands")?,
            ordering_commands: Topic::new("ordering.commands")?,
        })
    }

    /// Returns every topic.
    pub fn all(&self) -> [&Topic; 12] {
        [
            &self.checkouts,
            &self.orders,
            &self.status,
            &self.grace,
            &self.waiting,
            &self.stock,
            &self.stock_confirmed,
            &self.payment,
            &self.paid,
            &self.catalog_commands,
            &self.payment_commands,
            &self.ordering_commands,
        ]
    }
}

/// The id of what an order's transition emits: a repetition emits the same event again.
pub fn event_id(order: OrderId, what: &str) -> EventId {
    EventId::derive(&EventId::parse("eshop"), &format!("{order}/{what}"))
}
