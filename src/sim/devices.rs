//! The device tokens the simulator was told about, by environment.
//!
//! Promises: a token is looked at in lower case. Unless registered devices are required, a well-formed token nobody
//! registered is somebody's phone; one that is registered only in the other environment is refused either way.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use super::{
    environment::{Environment, PerEnvironment},
    fault::Answer,
    reason::Reason,
};
use crate::domain::clock::Timestamp;

/// The longest device token in bytes; Apple publishes no bound.
pub const MAX_TOKEN_BYTES: usize = 256;

/// A device as it is registered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where it lives.
    pub environment: Environment,
    /// Its token in hex.
    pub token: String,
    /// The only topic it belongs to, suffix included; absent: any.
    #[serde(default)]
    pub topic: Option<String>,
    /// Since when it is no longer active, in ms since the epoch; absent: it is active.
    #[serde(default)]
    pub inactive_since_ms: Option<i64>,
}

/// Whether `token` is whole bytes in hex, at least one and at most [`MAX_TOKEN_BYTES`].
#[must_use]
pub fn is_well_formed(token: &str) -> bool {
    !token.is_empty()
        && token.len().is_multiple_of(2)
        && token.len() <= 2 * MAX_TOKEN_BYTES
        && token.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The devices of one simulator. A clone is another handle on the same devices.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    known: PerEnvironment<RwLock<HashMap<String, Device>>>,
    /// How many there are, so that a simulator without any takes no lock.
    count: AtomicUsize,
    required: AtomicBool,
}

impl Devices {
    /// Registers a device, or replaces the one with the same token in the same environment. `false`: the token is
    /// malformed and nothing was done.
    #[must_use]
    pub fn register(&self, mut device: Device) -> bool {
        if !is_well_formed(&device.token) {
            return false;
        }
        device.token.make_ascii_lowercase();
        let mut known = self.shared.known.of(device.environment).write().unwrap_or_else(PoisonError::into_inner);
        if known.insert(device.token.clone(), device).is_none() {
            self.shared.count.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Forgets a device. Says whether it was there.
    #[must_use]
    pub fn remove(&self, environment: Environment, token: &str) -> bool {
        let mut known = self.shared.known.of(environment).write().unwrap_or_else(PoisonError::into_inner);
        let was_there = known.remove(&token.to_ascii_lowercase()).is_some();
        if was_there {
            self.shared.count.fetch_sub(1, Ordering::Relaxed);
        }
        was_there
    }

    /// All devices, by environment and token.
    #[must_use]
    pub fn list(&self) -> Vec<Device> {
        let mut all = Vec::new();
        for environment in Environment::ALL {
            let known = self.shared.known.of(environment).read().unwrap_or_else(PoisonError::into_inner);
            let mut devices: Vec<_> = known.values().cloned().collect();
            devices.sort_by(|a, b| a.token.cmp(&b.token));
            all.append(&mut devices);
        }
        all
    }

    /// Whether tokens nobody registered are refused.
    pub fn require_registration(&self, required: bool) {
        self.shared.required.store(required, Ordering::Relaxed);
    }

    /// Check 7, behind the token's form: is this device known here, for this topic, and active?
    pub(super) fn check(&self, environment: Environment, token: &str, topic: &str) -> Result<(), Answer> {
        let required = self.shared.required.load(Ordering::Relaxed);
        if self.shared.count.load(Ordering::Relaxed) == 0 && !required {
            return Ok(());
        }
        let token = token.to_ascii_lowercase();
        let known = self.shared.known.of(environment).read().unwrap_or_else(PoisonError::into_inner);
        let Some(device) = known.get(&token) else {
            drop(known);
            let elsewhere = self.shared.known.of(environment.other()).read().unwrap_or_else(PoisonError::into_inner);
            let refused = required || elsewhere.contains_key(&token);
            return if refused { Err(Answer::refusal(Reason::BadDeviceToken)) } else { Ok(()) };
        };
        if device.topic.as_deref().is_some_and(|own| own != topic) {
            return Err(Answer::refusal(Reason::DeviceTokenNotForTopic));
        }
        match device.inactive_since_ms {
            Some(since) => Err(Answer::Refused(Reason::Unregistered, Some(Timestamp::from_millis(since)))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(environment: Environment, token: &str) -> Device {
        Device { environment, token: token.to_owned(), topic: None, inactive_since_ms: None }
    }

    #[test]
    fn a_token_is_whole_bytes_in_hex() {
        assert!(is_well_formed("ab") && is_well_formed("AB01") && is_well_formed(&"a".repeat(512)));
        for bad in ["", "a", "abc", "xy", "a b1", "<ab>", "é1", &"a".repeat(514)] {
            assert!(!is_well_formed(bad), "{bad}");
        }
    }

    #[test]
    fn a_token_of_the_other_environment_is_bad_here() {
        let devices = Devices::default();
        assert_eq!(devices.check(Environment::Production, "ab", "t"), Ok(()));
        assert!(devices.register(device(Environment::Sandbox, "AB")));
        assert_eq!(devices.check(Environment::Sandbox, "ab", "t"), Ok(()));
        assert_eq!(devices.check(Environment::Production, "aB", "t"), Err(Answer::refusal(Reason::BadDeviceToken)));
        assert_eq!(devices.check(Environment::Production, "cd", "t"), Ok(()), "nobody registered this one");
        assert!(devices.remove(Environment::Sandbox, "ab"));
        assert_eq!(devices.check(Environment::Production, "ab", "t"), Ok(()));
    }

    #[test]
    fn registered_devices_only_refuses_the_rest() {
        let devices = Devices::default();
        devices.require_registration(true);
        assert_eq!(devices.check(Environment::Production, "ab", "t"), Err(Answer::refusal(Reason::BadDeviceToken)));
        assert!(devices.register(device(Environment::Production, "ab")));
        assert_eq!(devices.check(Environment::Production, "ab", "t"), Ok(()));
    }

    #[test]
    fn a_device_has_its_topic_and_its_end() {
        let devices = Devices::default();
        let known = Device {
            topic: Some("a.b".to_owned()),
            inactive_since_ms: Some(7),
            ..device(Environment::Production, "ab")
        };
        assert!(devices.register(known));
        assert_eq!(
            devices.check(Environment::Production, "ab", "a.c"),
            Err(Answer::refusal(Reason::DeviceTokenNotForTopic))
        );
        let gone = Answer::Refused(Reason::Unregistered, Some(Timestamp::from_millis(7)));
        assert_eq!(devices.check(Environment::Production, "ab", "a.b"), Err(gone));
    }
}
