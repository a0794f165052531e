//! The schema under a service that runs: a newer version may have migrated it.
//!
//! Promises: a schema that this version may still use changes nothing. One that says it is too new for this version stops
//! the service in good order within seconds of its saying so, and the log names both; what is open goes to the replicas of
//! the newer version. Until then statements may fail: a step that shuts older versions out should be applied once they
//! are gone.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    domain::clock::Clock,
    store::{Store, StoreError},
};

/// How often the schema is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Returns when the service stops, or when this version may use the schema no longer.
pub async fn watch(store: Arc<dyn Store>, clock: Arc<dyn Clock>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = clock.sleep(LOOK_EVERY) => {}
        }
        // A database that does not answer is not too new: whoever needs it says so.
        if let Ok(Err(StoreError::Schema(why))) = store.schema().await.map(|schema| schema.check()) {
            return tracing::error!("{why}");
        }
    }
}
