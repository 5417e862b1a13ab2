//! An e-shop of small services over the event bus: basket, ordering, grace task, catalog, payment,
//! shipping and notification. They talk through the events of [`contracts`]; ordering also sets [`timers`].

pub mod basket;
pub mod catalog;
pub mod contracts;
pub mod http;
pub mod machine;
pub mod notification;
pub mod ordering;
pub mod orders_file;
pub mod patience;
pub mod payment;
pub mod shop;
pub mod store;
pub mod summary;
pub mod timers;
