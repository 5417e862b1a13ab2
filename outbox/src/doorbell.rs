//! Tells relays of other processes that something was committed, beside the transactions and seldom.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::backend::Backend;
use crate::outbox::Outbox;

/// How often at most it is rung. The server commits those who notify one after another, and waits for nobody else.
const EVERY: Duration = Duration::from_millis(50);

/// When it was rung last, and whether it will be anyway.
#[derive(Debug, Default)]
pub(crate) struct Doorbell {
    is_due: AtomicBool,
    last: Mutex<Option<Instant>>,
}

impl Doorbell {
    /// Has it rung soon, once for all who say so until then. Where that fails, relays look by themselves.
    pub(crate) fn ring<Db: Backend>(&self, outbox: &Outbox<Db>) {
        // Nobody rings outside of a runtime.
        let Ok(runtime) = Handle::try_current() else { return };
        if self.is_due.swap(true, Ordering::AcqRel) {
            return;
        }
        let due = self.last.lock().map(|last| last + EVERY);
        let outbox = outbox.clone();
        runtime.spawn(async move {
            if let Some(due) = due {
                tokio::time::sleep_until(due).await;
            }
            let connection = outbox.pool().acquire().await;
            let doorbell = outbox.doorbell();
            // What is committed from here on rings again.
            *doorbell.last.lock() = Some(Instant::now());
            doorbell.is_due.store(false, Ordering::Release);
            let rung = match connection {
                Ok(mut connection) => Db::announce(&mut connection, outbox.statements()).await,
                Err(error) => Err(eventbus::sql::from_sqlx(error)),
            };
            if let Err(error) = rung {
                tracing::debug!(%error, "relays of other processes look by themselves");
            }
        });
    }
}
