//! A value that closes once, and wakes whoever waits for that.

use std::sync::atomic::{AtomicBool, Ordering as Atomic};

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Closing {
    closed: AtomicBool,
    rung: Notify,
}

impl Closing {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Atomic::Acquire)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Atomic::Release);
        self.rung.notify_waiters();
    }

    /// Waits until it is closed.
    pub(super) async fn wait(&self) {
        let mut rung = std::pin::pin!(self.rung.notified());
        // Listen first, look second: a close between the two is not missed.
        rung.as_mut().enable();
        if !self.is_closed() {
            rung.await;
        }
    }
}
