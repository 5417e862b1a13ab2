//! The bounds of one run: a panic or an overrun is a failure like any other.

use std::panic::AssertUnwindSafe;
use std::task::Poll;
use std::time::Duration;

use crate::failure::Failure;

/// Runs what may panic, or take longer than it may.
pub(in crate::driver) async fn limited<T>(
    limit: Option<Duration>,
    running: impl Future<Output = T>,
) -> Result<T, Failure> {
    let mut running = std::pin::pin!(running);
    let caught = std::future::poll_fn(|task| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(task))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                Poll::Ready(Err(Failure::panic(text)))
            }
        }
    });
    match limit {
        None => caught.await,
        Some(limit) => tokio::time::timeout(limit, caught)
            .await
            .unwrap_or_else(|_| Err(Failure::transient("timeout", format_args!("not done after {limit:?}")))),
    }
}
