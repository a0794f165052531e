//! How a broadcast leaves the way free for urgent pushes.
//!
//! Promise: while urgent pushes come, a large bulk chunk has no more in flight than APNs, or the way to it, answers about
//! as quickly as it answers one alone. What is in flight beyond that waits in queues that nobody can overtake: in sockets
//! and at the other end. With no urgent push for [`QUIET`] nothing is held back.

use std::{
    sync::atomic::{AtomicU64, Ordering},
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
const LEAST: usize = 25;

/// How much room is won each time that all of it was answered quickly.
const STEP: usize = 8;

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
}

impl Traffic {
    pub(super) const fn new() -> Self {
        Self { urgent_at: AtomicU64::new(0), production: Way::new(), sandbox: Way::new() }
    }

    /// An urgent chunk is about to be sent.
    pub(super) fn urgent(&self, now: Duration) {
        self.urgent_at.store(millis(now).max(1), Ordering::Relaxed);
    }

    /// Whether urgent chunks have come lately.
    fn is_urgent(&self, now: Duration) -> bool {
        let at = self.urgent_at.load(Ordering::Relaxed);
        at != 0 && now.saturating_sub(Duration::from_millis(at)) < QUIET
    }

    const fn way(&self, environment: Environment) -> &Way {
        match environment {
            Environment::Production => &self.production,
            Environment::Sandbox => &self.sandbox,
        }
    }
}

impl Way {
    const fn new() -> Self {
        Self { quickest: AtomicU64::new(u64::MAX), since: AtomicU64::new(0) }
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

/// How many pushes of a large bulk chunk may be in flight: that many thousandths.
#[derive(Debug)]
pub(super) struct Room(usize);

impl Room {
    pub(super) const fn new() -> Self {
        Self(LEAST * 1_000)
    }

    /// Learns from an answer: room that makes answers slow is given back, half of it each time that all was answered.
    pub(super) fn learn(&mut self, traffic: &Traffic, environment: Environment, took: Duration, now: Duration) {
        let room = if traffic.way(environment).has_waited(took, now) {
            self.0.saturating_sub(500)
        } else {
            self.0 + STEP * 1_000_000 / self.0
        };
        self.0 = room.clamp(LEAST * 1_000, IN_FLIGHT * 1_000);
    }

    /// How many now.
    pub(super) fn now(&self, traffic: &Traffic, now: Duration) -> usize {
        if traffic.is_urgent(now) { self.0 / 1_000 } else { IN_FLIGHT }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn answers(room: &mut Room, traffic: &Traffic, count: usize, took: Duration, now: Duration) {
        (0..count).for_each(|_| room.learn(traffic, Environment::Production, took, now));
    }

    #[test]
    fn a_broadcast_has_all_the_room_while_nothing_urgent_comes() {
        let (traffic, mut room) = (Traffic::new(), Room::new());
        answers(&mut room, &traffic, 1, ms(1), ms(10));
        answers(&mut room, &traffic, 1_000, ms(80), ms(10));
        assert_eq!(room.now(&traffic, ms(10)), IN_FLIGHT);
        traffic.urgent(ms(10));
        assert_eq!(room.now(&traffic, ms(11)), LEAST);
        assert_eq!(room.now(&traffic, ms(10) + QUIET), IN_FLIGHT);
    }

    #[test]
    fn room_grows_while_answers_are_as_quick_as_one_alone_however_far_away_apns_is() {
        for away in [0, 1, 50, 300] {
            let (traffic, mut room) = (Traffic::new(), Room::new());
            traffic.urgent(ms(10));
            answers(&mut room, &traffic, 40_000, ms(away), ms(10));
            assert_eq!(room.now(&traffic, ms(11)), IN_FLIGHT, "{away} ms");
            answers(&mut room, &traffic, 2_000, ms(2 * away + 4), ms(11));
            assert_eq!(room.now(&traffic, ms(11)), LEAST, "{away} ms");
        }
    }

    #[test]
    fn a_sandbox_farther_away_is_not_taken_for_a_queue() {
        let (traffic, mut room) = (Traffic::new(), Room::new());
        traffic.urgent(ms(10));
        answers(&mut room, &traffic, 1, ms(1), ms(10));
        (0..40_000).for_each(|_| room.learn(&traffic, Environment::Sandbox, ms(50), ms(10)));
        assert_eq!(room.now(&traffic, ms(11)), IN_FLIGHT);
    }

    #[test]
    fn a_way_that_has_become_longer_is_not_taken_for_a_queue_for_ever() {
        let (traffic, mut room) = (Traffic::new(), Room::new());
        answers(&mut room, &traffic, 1, ms(1), ms(10));
        answers(&mut room, &traffic, 1_000, ms(80), ms(10));
        let later = ms(10) + REMEMBERED;
        traffic.urgent(later);
        assert_eq!(room.now(&traffic, later), LEAST);
        answers(&mut room, &traffic, 40_000, ms(80), later);
        assert_eq!(room.now(&traffic, later), IN_FLIGHT);
    }
}
