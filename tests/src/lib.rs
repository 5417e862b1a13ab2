//! Subjects and broken transports for the whole-system tests.

pub mod mutant;
pub mod subjects;
