//! How much of one app's broadcasts is on its way at once.
//!
//! Promise: of one app's large bulk chunks no more than [`UNSETTLED`] pushes have been let go whose outcome the database
//! does not have: each has a [`Share`] of them. That is what a killed process can make its successor repeat, however large
//! the broadcast. First come, first served, [`AT_ONCE`] chunks at a time; no other app waits.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, OptionFuture},
};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::domain::{
    delivery::SMALL_CHUNK,
    notification::{Lane, Notification},
    topic::Topic,
};

/// The most large chunks of one app of which pushes are let go at once. What was let go of others goes on beside them.
const AT_ONCE: usize = 4;

/// The most pushes of one app's large chunks in flight, or answered and not settled.
const UNSETTLED: usize = 2_000;

/// So much of it is taken at once.
const STEP: usize = 50;

/// The most pushes of one chunk in flight, or answered and not settled.
pub(super) const IN_FLIGHT: usize = 500;

/// With no more than these left unanswered, a chunk makes room for others in memory.
pub(super) const STRAGGLERS: usize = 25;

/// What is left for each app.
#[derive(Debug, Default)]
pub(super) struct Slots(Mutex<HashMap<Topic, App>>);

#[derive(Debug, Clone)]
struct App {
    chunks: Arc<Semaphore>,
    pushes: Arc<Semaphore>,
}

impl Slots {
    /// Waits until pushes of a chunk with so many due targets may be let go. Small ones and the urgent lane have a share
    /// without bounds, at once. Cancelling it loses the place in the queue alone.
    pub(super) async fn enter(&self, notification: &Notification, due: usize) -> Share {
        if due <= SMALL_CHUNK || notification.lane == Lane::Transactional {
            return Share::default();
        }
        let App { chunks, pushes } = {
            let mut apps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match apps.get(&notification.topic) {
                Some(app) => app.clone(),
                None => apps.entry(notification.topic.clone()).or_insert_with(App::new).clone(),
            }
        };
        // Never closed.
        Share { slot: chunks.acquire_owned().await.ok(), of: Some(pushes), ..Share::default() }
    }
}

impl App {
    fn new() -> Self {
        Self { chunks: Arc::new(Semaphore::new(AT_ONCE)), pushes: Arc::new(Semaphore::new(UNSETTLED)) }
    }
}

/// A chunk's part of the pushes that may be on their way; given back when it is dropped.
#[derive(Default)]
pub(super) struct Share {
    /// Its place among those that let go of pushes.
    slot: Option<OwnedSemaphorePermit>,
    /// `None`: it has no bounds.
    of: Option<Arc<Semaphore>>,
    held: Option<OwnedSemaphorePermit>,
    asked: OptionFuture<BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>>,
    is_waiting: bool,
}

impl Share {
    /// Whether it is one of a large bulk chunk.
    pub(super) const fn is_bounded(&self) -> bool {
        self.of.is_some()
    }

    /// Once all of its pushes were let go the next chunk may begin.
    pub(super) fn begin_next_if(&mut self, all_let_go: bool) {
        if all_let_go {
            self.slot = None;
        }
    }

    /// Whether so many pushes may be on their way. If not, more is asked for: as much as is good for so many that are to
    /// follow.
    pub(super) fn covers(&mut self, pushes: usize, to_follow: usize) -> bool {
        let Some(of) = &self.of else { return true };
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if pushes <= held || self.is_waiting {
            return pushes <= held;
        }
        let step = u32::try_from(to_follow.clamp(1, STEP)).unwrap_or(1);
        if let Ok(more) = Arc::clone(of).try_acquire_many_owned(step) {
            self.take(more);
            return pushes <= held + step as usize;
        }
        self.asked = Some(Arc::clone(of).acquire_many_owned(step).boxed()).into();
        self.is_waiting = true;
        false
    }

    /// Whether more was asked for and has not come.
    pub(super) const fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Waits for what was asked for. Dropping the future loses nothing.
    pub(super) async fn granted(&mut self) {
        if let Some(Ok(more)) = (&mut self.asked).await {
            self.take(more);
        }
        (self.asked, self.is_waiting) = (OptionFuture::default(), false);
    }

    fn take(&mut self, more: OwnedSemaphorePermit) {
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
    }

    /// Gives back what so many pushes do not need.
    pub(super) fn keep(&mut self, pushes: usize) {
        if let Some(held) = &mut self.held {
            drop(held.split(held.num_permits().saturating_sub(pushes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn large(app: &App) -> Share {
        Share { of: Some(Arc::clone(&app.pushes)), ..Share::default() }
    }

    /// Takes as much as it gets at once.
    fn fill(share: &mut Share) -> usize {
        let mut pushes = 0;
        while share.covers(pushes + 1, CHUNK) {
            pushes += 1;
        }
        pushes
    }

    const CHUNK: usize = 1_000;

    #[tokio::test]
    async fn however_many_chunks_there_are_of_one_app_their_pushes_on_the_way_are_bounded_together() {
        let app = App::new();
        let mut shares: Vec<Share> = (0..10).map(|_| large(&app)).collect();
        let on_their_way: usize = shares.iter_mut().map(fill).sum();
        assert_eq!(on_their_way, UNSETTLED);
        assert_eq!(fill(&mut large(&App::new())), UNSETTLED, "another app has its own");
        assert!(Share::default().covers(UNSETTLED + 1, CHUNK), "small ones have no bounds");
    }

    #[tokio::test]
    async fn what_is_given_back_goes_to_whoever_waited_first() {
        let app = App::new();
        let [mut all, mut first, mut second] = [(); 3].map(|()| large(&app));
        assert_eq!(fill(&mut all), UNSETTLED);
        assert!(!first.covers(1, CHUNK) && first.granted().now_or_never().is_none());
        assert!(!second.covers(1, CHUNK) && second.granted().now_or_never().is_none());
        all.keep(UNSETTLED - STEP);
        assert!(!all.covers(UNSETTLED, CHUNK), "who gave it back is behind them");
        assert!(second.granted().now_or_never().is_none(), "second");
        first.granted().await;
        assert!(first.covers(STEP, CHUNK) && !first.covers(STEP + 1, CHUNK));
        drop(first);
        second.granted().await;
        assert!(second.covers(STEP, CHUNK));
    }

    #[tokio::test]
    async fn no_more_is_taken_than_is_to_follow_and_what_is_not_needed_is_given_back() {
        let app = App::new();
        let [mut one, mut other] = [(); 2].map(|()| large(&app));
        assert!(one.covers(1, 3) && one.covers(3, 1));
        assert_eq!(fill(&mut other), UNSETTLED - STEP);
        drop(other);
        one.keep(0);
        assert_eq!(app.pushes.available_permits(), UNSETTLED);
    }
}
