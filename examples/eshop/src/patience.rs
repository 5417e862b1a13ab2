//! What is done again while the bus or a database is away. All of it may be done twice.

use std::time::{Duration, Instant};

/// How long they may be away before the program gives up.
const WITHIN: Duration = Duration::from_secs(120);
const AGAIN: Duration = Duration::from_millis(250);

/// Does something again until it is done, or fails for good.
///
/// # Errors
/// What cannot be mended by waiting, or is not mended within two minutes.
pub async fn patiently<T>(mut work: impl AsyncFnMut() -> eventbus::Result<T>) -> eventbus::Result<T> {
    let end = Instant::now() + WITHIN;
    loop {
        match work().await {
            Err(error) if error.is_retryable() && Instant::now() < end => {
                tracing::warn!(%error, "away; trying again");
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}
