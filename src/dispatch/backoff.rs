//! Devices that APNs wants left alone for a while: 429 `TooManyRequests`.
//!
//! Promises: after such an answer nothing more leaves for that device, whatever notification it is of, before its time
//! is over: 2 s doubling to 5 min, or as long as APNs' `Retry-After` says. Then one push tries, and the others follow
//! its answer. No other device is concerned. In memory of this replica only, for at most [`MOST`] devices; an entry goes
//! with the first other answer, or a while after its time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::domain::{clock::Clock, delivery::back_off, device::DeviceToken, outcome::Busy};

/// So many devices are remembered; beyond them only the push that was refused waits.
const MOST: usize = 10_000;

/// How long the others wait for the answer to the push that tries again.
const TRIAL: Duration = Duration::from_secs(2);

/// How long after its time a device's next refusal still counts as one in a row.
const IN_A_ROW: Duration = Duration::from_secs(5 * 60);

/// The devices that are left alone.
#[derive(Debug)]
pub(super) struct BusyDevices {
    clock: Arc<dyn Clock>,
    /// By token: raw ones too.
    devices: Mutex<HashMap<DeviceToken, Pause>>,
}

#[derive(Debug)]
struct Pause {
    /// On the passing time.
    until: Duration,
    /// How often in a row APNs said so.
    times: u32,
    /// Its time was over, and a push is trying.
    on_trial: bool,
}

impl BusyDevices {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, devices: Mutex::default() }
    }

    /// Whether a push may leave for this device now; if not, how long it waits. Whoever may leave after a pause tries
    /// for all.
    pub(super) fn wait(&self, token: &DeviceToken) -> Option<Duration> {
        let mut devices = self.devices();
        if devices.is_empty() {
            return None;
        }
        let pause = devices.get_mut(token)?;
        let now = self.clock.monotonic();
        let rest = pause.until.saturating_sub(now);
        if rest.is_zero() {
            pause.until = now + TRIAL;
            pause.on_trial = true;
            return None;
        }
        Some(rest)
    }

    /// APNs asked for patience with this device; `after`: its `Retry-After`. Says how long to wait.
    pub(super) fn refused(&self, token: &DeviceToken, after: Option<Duration>, jitter: f64) -> Duration {
        let after = after.filter(|after| !after.is_zero());
        let now = self.clock.monotonic();
        let mut devices = self.devices();
        if devices.len() >= MOST && !devices.contains_key(token) {
            return after.unwrap_or_else(|| back_off(Busy::Device, 1, jitter));
        }
        let pause = devices.entry(token.clone()).or_insert(Pause { until: now, times: 0, on_trial: false });
        // What was under way with the one that was refused first is not one more in a row.
        if pause.on_trial || pause.until <= now {
            pause.times = pause.times.saturating_add(1);
            pause.until = now + after.unwrap_or_else(|| back_off(Busy::Device, pause.times, jitter));
            pause.on_trial = false;
        } else if let Some(after) = after {
            pause.until = pause.until.max(now + after);
        }
        pause.until.saturating_sub(now)
    }

    /// APNs gave this device another answer.
    pub(super) fn answered(&self, token: &DeviceToken) {
        let mut devices = self.devices();
        if !devices.is_empty() {
            devices.remove(token);
        }
    }

    /// Forgets those whose time is long over.
    pub(super) fn sweep(&self) {
        let now = self.clock.monotonic();
        let mut devices = self.devices();
        devices.retain(|_, pause| pause.until + IN_A_ROW > now);
        if devices.is_empty() {
            devices.shrink_to_fit();
        }
    }

    fn devices(&self) -> MutexGuard<'_, HashMap<DeviceToken, Pause>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::clock::{ManualClock, Timestamp};

    fn quiet() -> (Arc<ManualClock>, BusyDevices) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let busy = BusyDevices::new(Arc::clone(&clock) as Arc<dyn Clock>);
        (clock, busy)
    }

    fn phone(number: u32) -> DeviceToken {
        format!("{number:08x}").parse().unwrap()
    }

    #[test]
    fn a_device_is_left_alone_twice_as_long_each_time_and_another_is_not_concerned() {
        let (clock, busy) = quiet();
        let mut waits = Vec::new();
        for _ in 0..9 {
            assert_eq!(busy.wait(&phone(1)), None);
            waits.push(busy.refused(&phone(1), None, 0.5).as_secs());
            assert!(busy.wait(&phone(1)).is_some());
            assert_eq!(busy.wait(&phone(2)), None);
            clock.advance(Duration::from_secs(waits[waits.len() - 1]));
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 128, 256, 300]);
        busy.answered(&phone(1));
        assert_eq!(busy.refused(&phone(1), None, 0.5).as_secs(), 2, "another answer ends the row");
    }

    #[test]
    fn ten_that_were_under_way_together_are_refused_once() {
        let (_, busy) = quiet();
        let waits: Vec<_> = (0..10).map(|_| busy.refused(&phone(1), None, 0.5).as_secs()).collect();
        assert_eq!(waits, [2; 10]);
    }

    #[test]
    fn after_the_time_one_tries_and_the_others_wait_for_its_answer() {
        let (clock, busy) = quiet();
        busy.refused(&phone(1), Some(Duration::from_secs(77)), 0.5);
        clock.advance(Duration::from_secs(76));
        assert_eq!(busy.wait(&phone(1)), Some(Duration::from_secs(1)), "Retry-After is honoured");
        clock.advance(Duration::from_secs(1));
        assert_eq!(busy.wait(&phone(1)), None);
        assert_eq!(busy.wait(&phone(1)), Some(TRIAL));
        busy.answered(&phone(1));
        assert_eq!(busy.wait(&phone(1)), None);
    }

    #[test]
    fn devices_are_forgotten_when_their_time_is_over_and_are_not_more_than_the_bound() {
        let (clock, busy) = quiet();
        for number in 0..20_000 {
            assert_eq!(busy.refused(&phone(number), None, 0.5).as_secs(), 2);
        }
        assert_eq!(busy.devices().len(), MOST);
        clock.advance(Duration::from_secs(2) + IN_A_ROW);
        busy.sweep();
        assert!(busy.devices().is_empty());
    }
}
