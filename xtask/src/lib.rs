//! What the project's own commands and its tests share: real brokers on this machine.

pub mod brokers;
pub mod clients;
