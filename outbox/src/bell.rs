//! Wakes the relays of this process when something was committed.

use std::sync::Arc;

use tokio::sync::Notify;

/// Rung after a commit. A ring that nobody hears is kept for the next who listens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bell(Arc<Notify>);

impl Bell {
    pub(crate) fn ring(&self) {
        self.0.notify_one();
    }

    pub(crate) async fn rung(&self) {
        self.0.notified().await;
    }
}
