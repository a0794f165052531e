//! How many large bulk chunks of one app are sent at once.
//!
//! Promise: of one app's broadcasts no more than some 2,500 pushes have been let go whose outcome the database does not
//! have ([`AT_ONCE`] chunks with [`IN_FLIGHT`] each, and the [`STRAGGLERS`] of others). That is what a killed process
//! can make its successor repeat, however large the broadcast. First come, first served; no other app waits.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain::{
    delivery::SMALL_CHUNK,
    notification::{Lane, Notification},
    topic::Topic,
};

/// The most large chunks of one app that are sent at once.
const AT_ONCE: usize = 4;

/// The most pushes of a large chunk in flight, or answered and not settled.
pub(super) const IN_FLIGHT: usize = 500;

/// With no more than these left unanswered, and no more than [`UNSETTLED`] not settled, a chunk lets the next one begin.
pub(super) const STRAGGLERS: usize = 25;

/// Each of [`AT_ONCE`] chunks may follow one that has so many left: they settle before their followers have got far.
pub(super) const UNSETTLED: usize = 100;

/// The slots of each app.
#[derive(Debug, Default)]
pub(super) struct Slots(Mutex<HashMap<Topic, Arc<Semaphore>>>);

/// Leave to send a large chunk, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot(Option<OwnedSemaphorePermit>);

impl Slot {
    /// Whether it is one of a large bulk chunk.
    pub(super) const fn is_taken(&self) -> bool {
        self.0.is_some()
    }
}

impl Slots {
    /// Waits until a chunk with so many due targets may be sent: the urgent lane does not. Cancelling it loses the
    /// place in the queue alone.
    pub(super) async fn enter(&self, notification: &Notification, due: usize) -> Slot {
        if due <= SMALL_CHUNK || notification.lane == Lane::Transactional {
            return Slot(None);
        }
        let slots = {
            let mut apps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match apps.get(&notification.topic) {
                Some(slots) => Arc::clone(slots),
                None => Arc::clone(
                    apps.entry(notification.topic.clone()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))),
                ),
            }
        };
        // Never closed.
        Slot(slots.acquire_owned().await.ok())
    }
}
