//! Layers: what happens around a run of a handler, one file each. They are plain calls, no boxed futures.
//!
//! ```text
//!  rate ▶ breaker ▶ trace ▶ metrics ▶ limit (timeout, panic) ▶ handler ▶ outputs ▶ retry · parking · dead letter
//! ```
//! Retry and parking decide what becomes of a failed event: they are in `handle` and `parked`.

pub(super) mod breaker;
pub(super) mod dead_letter;
pub(super) mod limit;
pub(super) mod metrics;
pub(super) mod rate;
pub(super) mod trace;
