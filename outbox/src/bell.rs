//! Wakes the relays of this process when something was committed.

use std::sync::Arc;

use tokio::sync::watch;

/// Rung after a commit.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<watch::Sender<()>>);

/// One who hears it: also what was rung while it did not listen, once.
#[derive(Debug)]
pub(crate) struct Ear(watch::Receiver<()>);

impl Default for Bell {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }
}

impl Bell {
    pub(crate) fn ring(&self) {
        self.0.send_replace(());
    }

    pub(crate) fn ear(&self) -> Ear {
        Ear(self.0.subscribe())
    }
}

impl Ear {
    pub(crate) async fn rung(&mut self) {
        if self.0.changed().await.is_err() {
            // Nobody can ring any more.
            std::future::pending().await
        }
    }
}
