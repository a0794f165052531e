//! What a device holds: what it shows, and what APNs keeps for it while it is offline.
//!
//! Promises: only devices that were once brought online or taken offline by name are followed, at most [`MAX_PHONES`];
//! the others cost nothing. Of each the newest [`MAX_SHOWN`] shown notifications are kept, and, while it is offline, one
//! notification for each bundle id, as Apple stores them: the next one overwrites it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    devices::is_well_formed,
    environment::{Environment, PerEnvironment},
    ledger::Entry,
    push_type::{PushType, bundle_id},
};
use crate::domain::clock::{Clock, Timestamp};

/// How many devices can be followed, both environments together.
pub const MAX_PHONES: usize = 10_000;
/// How many shown notifications of a device are kept; the oldest go first.
pub const MAX_SHOWN: usize = 64;
/// How long APNs stores a notification at most (Apple: "Sending notification requests to APNs").
pub const MAX_STORED: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A notification that a device shows, or that is stored for it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Notification {
    /// The app.
    pub bundle_id: String,
    /// `apns-collapse-id`
    pub collapse_id: Option<String>,
    /// `apns-push-type`
    pub push_type: Option<&'static str>,
    /// `apns-id`, in lower case
    pub apns_id: String,
    /// The body as text; bytes that are no UTF-8 are replaced.
    pub body: String,
    /// When APNs accepted it.
    pub accepted_at: Timestamp,
    /// Until when it may be stored.
    pub expires_at: Timestamp,
    /// How many notifications it has replaced where it stands.
    pub replaced: u32,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Phone {
    /// Whether notifications reach it.
    pub online: bool,
    /// What it shows, oldest first.
    pub shown: VecDeque<Notification>,
    /// What is stored for it, one for each bundle id, oldest first.
    pub stored: Vec<Notification>,
    /// How many have reached it, those that show nothing included.
    pub delivered: u64,
    /// How many were not stored, because their expiration did not allow it.
    pub not_stored: u64,
    /// How many stored ones a later one has overwritten.
    pub overwritten: u64,
    /// How many stored ones expired before the device came back.
    pub expired: u64,
}

impl Phone {
    fn expire(&mut self, now: Timestamp) {
        let before = self.stored.len();
        self.stored.retain(|stored| stored.expires_at > now);
        self.expired += (before - self.stored.len()) as u64;
    }

    fn store(&mut self, mut notification: Notification) {
        if let Some(at) = self.stored.iter().position(|stored| stored.bundle_id == notification.bundle_id) {
            notification.replaced = self.stored.remove(at).replaced.saturating_add(1);
            self.overwritten += 1;
        }
        self.stored.push(notification);
    }

    /// It arrives. What is no alert shows nothing.
    fn deliver(&mut self, mut notification: Notification) {
        self.delivered += 1;
        if notification.push_type.is_some_and(|kind| kind != PushType::Alert.name()) {
            return;
        }
        let is_replaced = |shown: &Notification| {
            shown.collapse_id.is_some()
                && shown.collapse_id == notification.collapse_id
                && shown.bundle_id == notification.bundle_id
        };
        let replaced = self.shown.iter().position(is_replaced).and_then(|at| self.shown.remove(at));
        notification.replaced = replaced.map_or(0, |replaced| replaced.replaced.saturating_add(1));
        if self.shown.len() >= MAX_SHOWN {
            self.shown.pop_front();
        }
        self.shown.push_back(notification);
    }
}

/// Why a device is not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PhoneError {
    /// The token is malformed.
    #[error("`token` is not 1 to 256 bytes in hex")]
    NotAToken,
    /// There are too many already.
    #[error("{MAX_PHONES} devices are followed already: delete some")]
    TooMany,
}

/// The devices that are followed. A clone is another handle on the same devices.
#[derive(Debug, Clone)]
pub struct Phones {
    clock: Arc<dyn Clock>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    known: PerEnvironment<Mutex<HashMap<String, Phone>>>,
    /// How many there are, so that a simulator without any takes no lock.
    count: AtomicUsize,
}

impl Phones {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, shared: Arc::default() }
    }

    /// Brings the device online, and what is stored and not expired arrives; or takes it offline. From the first time on
    /// it is followed.
    ///
    /// # Errors
    /// [`PhoneError`] if it cannot be followed.
    pub fn set_online(&self, environment: Environment, token: &str, online: bool) -> Result<(), PhoneError> {
        if !is_well_formed(token) {
            return Err(PhoneError::NotAToken);
        }
        let token = token.to_ascii_lowercase();
        let mut known = self.shared.known.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains_key(&token) && self.shared.count.fetch_add(1, Ordering::Relaxed) >= MAX_PHONES {
            self.shared.count.fetch_sub(1, Ordering::Relaxed);
            return Err(PhoneError::TooMany);
        }
        let phone = known.entry(token).or_default();
        phone.online = online;
        if online {
            phone.expire(self.clock.now());
            for notification in std::mem::take(&mut phone.stored) {
                phone.deliver(notification);
            }
        }
        Ok(())
    }

    /// What the device holds; `None` if it is not followed.
    #[must_use]
    pub fn find(&self, environment: Environment, token: &str) -> Option<Phone> {
        let mut known = self.shared.known.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
        let phone = known.get_mut(&token.to_ascii_lowercase())?;
        phone.expire(self.clock.now());
        Some(phone.clone())
    }

    /// Follows the device no longer. Says whether it was.
    #[must_use]
    pub fn remove(&self, environment: Environment, token: &str) -> bool {
        let mut known = self.shared.known.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
        let was_there = known.remove(&token.to_ascii_lowercase()).is_some();
        if was_there {
            self.shared.count.fetch_sub(1, Ordering::Relaxed);
        }
        was_there
    }

    /// Whether any device is followed.
    pub(super) fn are_any(&self) -> bool {
        self.shared.count.load(Ordering::Relaxed) > 0
    }

    /// A push was accepted: it arrives, or is stored, or is lost.
    pub(super) fn accept(&self, entry: &Entry<'_>) {
        let mut known = self.shared.known.of(entry.environment).lock().unwrap_or_else(PoisonError::into_inner);
        let Some(phone) = known.get_mut(&entry.token.to_ascii_lowercase()) else { return };
        let longest = entry.at.plus(MAX_STORED);
        let asked = entry.expiration.map(|seconds| Timestamp::from_seconds(seconds.try_into().unwrap_or(i64::MAX)));
        let notification = Notification {
            bundle_id: bundle_id(entry.topic).to_owned(),
            collapse_id: entry.collapse_id.map(|id| String::from_utf8_lossy(id).into_owned()),
            push_type: entry.push_type.map(PushType::name),
            apns_id: entry.apns_id.to_string(),
            body: String::from_utf8_lossy(entry.body).into_owned(),
            accepted_at: entry.at,
            expires_at: asked.map_or(longest, |asked| asked.min(longest)),
            replaced: 0,
        };
        phone.expire(entry.at);
        if phone.online {
            phone.deliver(notification);
        } else if notification.expires_at > entry.at {
            phone.store(notification);
        } else {
            phone.not_stored += 1; // 0 is one attempt, and so is a time that has passed
        }
    }
}
