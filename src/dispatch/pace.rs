//! How many pushes a second an app may have.
//!
//! Promises: an app with `max_pushes_per_second` gets no more than that, and a tenth of a second's worth at once, from
//! all replicas together: each takes its share of those alive. Urgent pushes go first; within a lane, first come, first
//! served. Other apps never wait.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, Semaphore};

use super::pulse::Pulse;
use crate::{
    domain::{
        clock::Clock,
        notification::{Lane, Notification},
        topic::Topic,
    },
    lifecycle::Tasks,
};

/// How often leave is given while somebody waits for it.
const TICK: Duration = Duration::from_millis(20);

/// What may go at once is a tenth of a second's worth.
const BURST: f64 = 0.1;

/// A large chunk asks for no more at a time than a quarter of a second's worth: it looks at who owns its devices again.
const AT_A_TIME: u32 = 4;

/// The apps that have a limit.
#[derive(Debug, Default)]
pub(super) struct Pace(HashMap<Topic, Arc<Limited>>);

#[derive(Debug)]
struct Limited {
    max_per_second: NonZeroU32,
    /// By lane: leave that was given and not taken, and how much is waited for.
    lanes: [(Semaphore, AtomicUsize); 2],
    asked: Notify,
}

impl Pace {
    /// Starts a task for each app with a limit; it ends with the service.
    pub(super) fn start(
        limits: &BTreeMap<Topic, NonZeroU32>,
        clock: &Arc<dyn Clock>,
        pulse: &Pulse,
        tasks: &Tasks,
    ) -> Self {
        let start = |(topic, max_per_second): (&Topic, &NonZeroU32)| {
            let lane = || (Semaphore::new(0), AtomicUsize::new(0));
            let limited =
                Arc::new(Limited { max_per_second: *max_per_second, lanes: [lane(), lane()], asked: Notify::new() });
            let (clock, pulse, given) = (Arc::clone(clock), pulse.clone(), Arc::clone(&limited));
            tasks.spawn_until_stopped("dispatch.pace", async move { given.give(&*clock, &pulse).await });
            (topic.clone(), limited)
        };
        Self(limits.iter().map(start).collect())
    }

    /// Waits until some of `due` pushes may leave, and says how many: all of them where there is no limit. Cancelling it
    /// loses the place in the queue alone.
    pub(super) async fn leave(&self, notification: &Notification, due: usize) -> usize {
        let Some(limited) = self.0.get(&notification.topic) else { return due };
        limited.leave(notification.lane, due).await
    }
}

impl Limited {
    async fn leave(&self, lane: Lane, due: usize) -> usize {
        let (given, wanted) = self.lane(lane);
        let count = (self.max_per_second.get() / AT_A_TIME).max(1).min(u32::try_from(due).unwrap_or(u32::MAX));
        let wants = Wants::new(wanted, count as usize);
        self.asked.notify_one();
        // Never closed.
        if let Ok(leave) = given.acquire_many(count).await {
            leave.forget();
        }
        drop(wants);
        count as usize
    }

    const fn lane(&self, lane: Lane) -> &(Semaphore, AtomicUsize) {
        let [urgent, bulk] = &self.lanes;
        match lane {
            Lane::Transactional => urgent,
            Lane::Bulk => bulk,
        }
    }

    /// Gives leave for ever, as time passes.
    async fn give(&self, clock: &dyn Clock, pulse: &Pulse) {
        let mut at = clock.monotonic();
        let mut budget = 1.0;
        loop {
            let share = f64::from(self.max_per_second.get()) / pulse.living();
            let now = clock.monotonic();
            budget = (budget + share * now.saturating_sub(at).as_secs_f64()).min((share * BURST).max(1.0));
            at = now;
            let mut waited_for = false;
            for (given, wanted) in &self.lanes {
                let missing = wanted.load(Ordering::Relaxed).saturating_sub(given.available_permits());
                waited_for |= missing > 0;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and small")]
                let some = missing.min(budget as usize);
                given.add_permits(some);
                #[expect(clippy::cast_precision_loss, reason = "small")]
                let spent = some as f64;
                budget -= spent;
            }
            if waited_for {
                clock.sleep(TICK.max(Duration::from_secs_f64(1.0 / share))).await;
            } else {
                self.asked.notified().await;
            }
        }
    }
}

/// So much is waited for, until it is dropped.
struct Wants<'a>(&'a AtomicUsize, usize);

impl<'a> Wants<'a> {
    fn new(wanted: &'a AtomicUsize, count: usize) -> Self {
        wanted.fetch_add(count, Ordering::Relaxed);
        Self(wanted, count)
    }
}

impl Drop for Wants<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
