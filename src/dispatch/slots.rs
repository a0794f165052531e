//! How much of one app's broadcasts is on its way at once.
//!
//! Promises: of one app's large bulk chunks no more than [`UNSETTLED`] pushes have been let go whose outcome the database does
//! not have. That is what a killed process can make its successor repeat, however large the broadcast. No more than [`MARKED`]
//! bear the mark that says so. First come, first served; no other app waits.

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

/// The most pushes of one app's large chunks in flight, or answered and not settled.
const UNSETTLED: usize = 2_400;

/// The most that bear a durable mark, among them those: who waits for a share has its mark by then.
const MARKED: usize = 2 * UNSETTLED;

/// The most pushes of one chunk in flight, or answered and not settled.
pub(super) const IN_FLIGHT: usize = 500;

/// With no more than these left unanswered, a chunk makes room for others in memory.
pub(super) const STRAGGLERS: usize = 25;

/// What is left for each app.
#[derive(Debug, Default)]
pub(super) struct Slots(Mutex<HashMap<Topic, App>>);

#[derive(Debug, Clone)]
struct App {
    marked: Arc<Semaphore>,
    unsettled: Arc<Semaphore>,
}

/// A chunk's part of what its app may have; given back when it is dropped. One without bounds has none.
#[derive(Debug, Default)]
pub(super) struct Share {
    marked: Option<OwnedSemaphorePermit>,
    unsettled: Option<OwnedSemaphorePermit>,
}

impl Share {
    /// Whether it is one of a large bulk chunk that may be sent.
    pub(super) const fn is_bounded(&self) -> bool {
        self.unsettled.is_some()
    }

    /// How many pushes of the chunk may be on their way.
    pub(super) fn pushes(&self) -> usize {
        self.unsettled.as_ref().map_or(IN_FLIGHT, OwnedSemaphorePermit::num_permits)
    }

    /// Gives back all but so many.
    pub(super) fn keep(&mut self, pushes: usize) {
        for held in [&mut self.marked, &mut self.unsettled].into_iter().flatten() {
            drop(held.split(held.num_permits().saturating_sub(pushes)));
        }
    }
}

impl Slots {
    /// Waits until so many due ones of a chunk's targets may be marked. Small chunks and the urgent lane do not wait.
    /// Cancelling it loses the place in the queue alone.
    pub(super) async fn prepare(&self, notification: &Notification, targets: usize, due: usize) -> Share {
        match self.of(&notification.topic, notification.lane, targets) {
            // Never closed.
            Some(App { marked, .. }) => {
                Share { marked: marked.acquire_many_owned(permits(due, MARKED)).await.ok(), unsettled: None }
            }
            None => Share::default(),
        }
    }

    /// Waits until pushes to so many due ones of a chunk's targets may be let go. Small chunks and the urgent lane do not wait.
    /// Cancelling it loses the place in the queue alone.
    pub(super) async fn enter(&self, share: &mut Share, notification: &Notification, targets: usize, due: usize) {
        if let Some(App { unsettled, .. }) = self.of(&notification.topic, notification.lane, targets) {
            share.unsettled = unsettled.acquire_many_owned(permits(due, IN_FLIGHT)).await.ok();
        }
    }

    /// The bounds of a large bulk chunk, however few of its targets are due.
    fn of(&self, topic: &Topic, lane: Lane, targets: usize) -> Option<App> {
        if targets <= SMALL_CHUNK || lane == Lane::Transactional {
            return None;
        }
        let mut apps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(match apps.get(topic) {
            Some(app) => app.clone(),
            None => apps.entry(topic.clone()).or_insert_with(App::new).clone(),
        })
    }
}

impl App {
    fn new() -> Self {
        Self { marked: Arc::new(Semaphore::new(MARKED)), unsettled: Arc::new(Semaphore::new(UNSETTLED)) }
    }
}

fn permits(due: usize, most: usize) -> u32 {
    u32::try_from(due.min(most)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn share(app: &App, due: usize) -> Option<Share> {
        let marked = Arc::clone(&app.marked).acquire_many_owned(permits(due, MARKED)).now_or_never()?;
        let unsettled = Arc::clone(&app.unsettled).acquire_many_owned(permits(due, IN_FLIGHT)).now_or_never()?;
        Some(Share { marked: marked.ok(), unsettled: unsettled.ok() })
    }

    #[test]
    fn however_many_chunks_there_are_of_one_app_their_pushes_on_the_way_are_bounded_together() {
        let app = App::new();
        let mut shares = Vec::new();
        while let Some(share) = share(&app, 250) {
            shares.push(share);
        }
        let on_their_way: usize = shares.iter().map(Share::pushes).sum();
        assert!(on_their_way <= UNSETTLED && on_their_way > UNSETTLED - 250, "{on_their_way}");
        assert!(share(&App::new(), 250).is_some(), "another app has its own");
    }

    #[test]
    fn large_chunks_of_broadcasts_have_bounds_small_ones_and_urgent_ones_have_none() {
        let (slots, topic): (_, Topic) = (Slots::default(), "fr.ocpizza.livreur".parse().unwrap());
        let bounded = |lane, targets| slots.of(&topic, lane, targets).is_some();
        assert!(bounded(Lane::Bulk, SMALL_CHUNK + 1));
        assert!(!bounded(Lane::Bulk, SMALL_CHUNK) && !bounded(Lane::Transactional, 1_000));
        assert!(!Share::default().is_bounded());
    }

    #[test]
    fn what_a_chunk_does_not_need_any_more_is_there_for_others() {
        let app = App::new();
        let mut large = share(&app, 1_000).unwrap();
        assert_eq!(large.pushes(), IN_FLIGHT, "a large one has no more on its way than this");
        large.keep(20);
        assert_eq!((large.pushes(), app.unsettled.available_permits()), (20, UNSETTLED - 20));
        assert_eq!(app.marked.available_permits(), MARKED - 20, "nor do its marks keep others waiting");
        large.keep(50);
        assert_eq!(large.pushes(), 20, "what was given back is gone");
        drop(large);
        assert_eq!(app.unsettled.available_permits(), UNSETTLED);
    }
}
