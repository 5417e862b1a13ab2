//! What transports share that keep deliveries themselves.

pub(super) mod admit;
pub(super) mod assign;
pub(super) mod bells;
pub(super) mod cursor;
pub(super) mod hand;
pub(super) mod leased;
pub(super) mod limits;
pub(super) mod queue;
pub(super) mod refusals;
pub(super) mod tasks;
pub(super) mod texts;
pub(super) mod tls;
pub(super) mod wall;
