//! Waits with a bound: far longer than what is waited for takes, so that only a fault reaches it.

use std::{future::Future, time::Duration};

/// What `future` gives, within 20 seconds.
pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

/// Returns once `condition` holds, within 20 seconds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
