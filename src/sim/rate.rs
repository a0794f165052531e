//! How many pushes one device token takes in a time, where an environment limits that.
//!
//! Promises: only pushes that were let through count, so a device recovers however it is hammered. A token costs memory
//! while its last push is young enough to count, and eight bytes for each of those.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use super::{
    conduct::DeviceRate,
    environment::{Environment, PerEnvironment},
};

/// Below this many tokens nobody looks for old ones.
const FEW: usize = 1024;

/// What every device token of a simulator got lately.
#[derive(Debug, Default)]
pub(super) struct Rates {
    seen: PerEnvironment<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// By token, when its pushes were let through: ms on the monotonic clock.
    by_token: HashMap<String, VecDeque<u64>>,
    /// How many tokens there may be before old ones are looked for.
    room: usize,
}

impl Rates {
    /// Whether one more push may go to `token`, which it counts as then.
    pub(super) fn allow(&self, environment: Environment, token: &str, rate: DeviceRate, now: Duration) -> bool {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let is_old = |at: u64| now.saturating_sub(at) >= rate.within_ms;
        let mut seen = self.seen.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
        if seen.by_token.len() >= seen.room.max(FEW) {
            seen.by_token.retain(|_, times| times.back().is_some_and(|last| !is_old(*last)));
            seen.room = 2 * seen.by_token.len();
        }
        let times = seen.by_token.entry(token.to_ascii_lowercase()).or_default();
        while times.front().is_some_and(|first| is_old(*first)) {
            times.pop_front();
        }
        let is_allowed = times.len() < rate.pushes as usize;
        if is_allowed {
            times.push_back(now);
        }
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: DeviceRate = DeviceRate { pushes: 2, within_ms: 1000 };

    #[test]
    fn a_window_slides_and_refusals_do_not_count() {
        let rates = Rates::default();
        let at = |ms| rates.allow(Environment::Sandbox, "AB", RATE, Duration::from_millis(ms));
        assert_eq!([at(0), at(600), at(700), at(999), at(1000), at(1001)], [true, true, false, false, true, false]);
        assert!(rates.allow(Environment::Sandbox, "cd", RATE, Duration::from_millis(1001)), "others are not concerned");
        assert!(rates.allow(Environment::Production, "ab", RATE, Duration::from_millis(1001)));
    }

    #[test]
    fn tokens_whose_time_is_over_are_forgotten() {
        let rates = Rates::default();
        for n in 0..10_000_u64 {
            assert!(rates.allow(Environment::Sandbox, &n.to_string(), RATE, Duration::from_millis(10 * n)));
        }
        assert!(rates.seen.of(Environment::Sandbox).lock().unwrap().by_token.len() <= FEW);
    }
}
