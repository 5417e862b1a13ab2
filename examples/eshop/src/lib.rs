//! An e-shop of small services over the event bus: basket, ordering, grace task, catalog, payment,
//! shipping and notification. They talk through the events of [`contracts`] alone: each has tables of its own, and what it
//! stores, what it has handled and what it publishes is one transaction ([`outbox`]).

pub mod basket;
pub mod catalog;
pub mod contracts;
pub mod db;
pub mod grace;
pub mod http;
pub mod machine;
pub mod notification;
pub mod ordering;
pub mod orders_file;
pub mod patience;
pub mod payment;
pub mod shop;
pub mod summary;
