//! Subjects and broken transports for the whole-system tests.

pub mod apart;
pub mod around;
pub mod brokers;
pub mod disk;
pub mod folder;
pub mod mutant;
pub mod proxy;
pub mod shelf;
pub mod small;
pub mod subjects;

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
