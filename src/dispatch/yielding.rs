//! How a broadcast leaves the way free for urgent pushes.
//!
//! Promise: while urgent pushes come, large bulk chunks have no more in flight than APNs, or the way to it, answers about
//! as quickly as it answers one alone. What is in flight beyond that waits in queues that nobody can overtake: in sockets
//! and at the other end. With no urgent push for [`QUIET`] nothing is held back.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use super::{fence::millis, slots::IN_FLIGHT};
use crate::domain::topic::Environment;

/// So long after the last urgent push broadcasts have all the room again.
const QUIET: Duration = Duration::from_secs(5);

/// An answer that takes longer than twice the quickest, and this, has waited in a queue.
const SLACK: Duration = Duration::from_millis(3);

/// So long the quickest answer is remembered: the way to APNs may have become a longer one.
const REMEMBERED: Duration = Duration::from_secs(30);

/// The least that a chunk has in flight.
const LEAST: usize = 12;

/// How much room is won each time that all of it was answered quickly.
const STEP: usize = 4;

/// What all chunks know.
#[derive(Debug)]
pub(super) struct Traffic {
    /// When the last urgent chunk came, in ms of the monotonic clock; 0: none yet.
    urgent_at: AtomicU64,
    production: Way,
    sandbox: Way,
}

/// The way to one of APNs' environments.
#[derive(Debug)]
struct Way {
    /// The quickest answer lately, in ms, and since when that is looked for.
    quickest: AtomicU64,
    since: AtomicU64,
    /// How many pushes of a large bulk chunk may be in flight beside urgent ones, in thousandths.
    room: AtomicUsize,
}

impl Traffic {
    pub(super) const fn new() -> Self {
        Self { urgent_at: AtomicU64::new(0), production: Way::new(), sandbox: Way::new() }
    }

    /// An urgent chunk is about to be sent.
    pub(super) fn urgent(&self, now: Duration) {
        self.urgent_at.store(millis(now).max(1), Ordering::Relaxed);
    }

    /// How many pushes of a large bulk chunk may be in flight now.
    pub(super) fn room(&self, now: Duration) -> usize {
        let urgent_at = self.urgent_at.load(Ordering::Relaxed);
        if urgent_at == 0 || now.saturating_sub(Duration::from_millis(urgent_at)) >= QUIET {
            return IN_FLIGHT;
        }
        let room = |way: &Way| way.room.load(Ordering::Relaxed) / 1_000;
        room(&self.production).min(room(&self.sandbox))
    }

    /// Learns from an answer to a bulk push: room that makes answers slow is given back, half of it each time that all of
    /// it was answered.
    pub(super) fn answered(&self, environment: Environment, took: Duration, now: Duration) {
        let way = match environment {
            Environment::Production => &self.production,
            Environment::Sandbox => &self.sandbox,
        };
        let waited = way.has_waited(took, now);
        let change = |room: usize| {
            let changed = if waited { room.saturating_sub(500) } else { room + STEP * 1_000_000 / room };
            Some(changed.clamp(LEAST * 1_000, IN_FLIGHT * 1_000))
        };
        // It never refuses.
        _ = way.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

impl Way {
    const fn new() -> Self {
        Self { quickest: AtomicU64::new(u64::MAX), since: AtomicU64::new(0), room: AtomicUsize::new(IN_FLIGHT * 1_000) }
    }

    /// An answer took so long; whether it has waited in a queue.
    fn has_waited(&self, took: Duration, now: Duration) -> bool {
        if now.saturating_sub(Duration::from_millis(self.since.load(Ordering::Relaxed))) >= REMEMBERED {
            self.since.store(millis(now), Ordering::Relaxed);
            self.quickest.store(u64::MAX, Ordering::Relaxed);
        }
        let quickest = self.quickest.fetch_min(millis(took), Ordering::Relaxed).min(millis(took));
        took > 2 * Duration::from_millis(quickest) + SLACK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn answers(traffic: &Traffic, count: usize, took: Duration, now: Duration) {
        (0..count).for_each(|_| traffic.answered(Environment::Production, took, now));
    }

    #[test]
    fn a_broadcast_has_all_the_room_while_nothing_urgent_comes() {
        let traffic = Traffic::new();
        answers(&traffic, 1, ms(1), ms(10));
        answers(&traffic, 1_000, ms(80), ms(10));
        assert_eq!(traffic.room(ms(10)), IN_FLIGHT);
        traffic.urgent(ms(10));
        assert_eq!(traffic.room(ms(11)), LEAST);
        assert_eq!(traffic.room(ms(10) + QUIET), IN_FLIGHT);
    }

    #[test]
    fn room_is_left_while_answers_are_as_quick_as_one_alone_however_far_away_apns_is() {
        for away in [0, 1, 50, 300] {
            let traffic = Traffic::new();
            traffic.urgent(ms(10));
            answers(&traffic, 1_000, ms(away), ms(10));
            assert_eq!(traffic.room(ms(11)), IN_FLIGHT, "{away} ms");
            answers(&traffic, 2_000, ms(2 * away + 4), ms(11));
            assert_eq!(traffic.room(ms(11)), LEAST, "{away} ms");
            answers(&traffic, 40_000, ms(away), ms(12));
            assert_eq!(traffic.room(ms(12)), IN_FLIGHT, "{away} ms, won back");
        }
    }

    #[test]
    fn a_sandbox_farther_away_is_not_taken_for_a_queue() {
        let traffic = Traffic::new();
        traffic.urgent(ms(10));
        answers(&traffic, 1, ms(1), ms(10));
        (0..2_000).for_each(|_| traffic.answered(Environment::Sandbox, ms(50), ms(10)));
        assert_eq!(traffic.room(ms(11)), IN_FLIGHT);
    }

    #[test]
    fn a_way_that_has_become_longer_is_not_taken_for_a_queue_for_ever() {
        let traffic = Traffic::new();
        answers(&traffic, 1, ms(1), ms(10));
        answers(&traffic, 1_000, ms(80), ms(10));
        let later = ms(10) + REMEMBERED;
        traffic.urgent(later);
        assert_eq!(traffic.room(later), LEAST);
        answers(&traffic, 40_000, ms(80), later);
        assert_eq!(traffic.room(later), IN_FLIGHT);
    }
}
