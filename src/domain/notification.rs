//! What a caller asked for, and how it stands.
//!
//! Promises: a [`Notification`] has been checked as a whole; after it, nobody checks again. The counts of one consistent
//! read add up: `targeted = pending + accepted + failed + unregistered + expired + cancelled + suppressed + unknown`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    clock::Timestamp,
    device::{DeviceId, DeviceToken, NotInBounds, Tag, UserId},
    payload::Payload,
    push::{CollapseId, Expiration, OnUnknown, Priority, PushType},
    text_value,
    topic::{Environment, Topic},
    uuid_value,
};

uuid_value! {
    /// The id of a notification.
    NotificationId
}

/// The caller's own word for what this is about, such as an order number. Filterable, not sent to APNs.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference(Box<str>);

impl Reference {
    /// The most bytes it may have.
    pub const MAX_BYTES: usize = 128;
}

impl FromStr for Reference {
    type Err = NotInBounds;

    fn from_str(text: &str) -> Result<Self, NotInBounds> {
        if text.is_empty() || text.len() > Self::MAX_BYTES {
            return Err(NotInBounds { max: Self::MAX_BYTES });
        }
        Ok(Self(text.into()))
    }
}

text_value!(Reference, NotInBounds);

/// Which of two queues a notification waits in: the first always overtakes the second (promise 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// For somebody who waits for it.
    Transactional,
    /// For many.
    Bulk,
}

impl Lane {
    /// Both, the urgent one first.
    pub const ALL: [Self; 2] = [Self::Transactional, Self::Bulk];

    /// A list longer than this goes to [`Lane::Bulk`] unless the caller says otherwise.
    pub const TRANSACTIONAL_LIST: usize = 100;

    /// The name on the API and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transactional => "transactional",
            Self::Bulk => "bulk",
        }
    }

    /// The number in the database; smaller is more urgent.
    #[must_use]
    pub const fn as_number(self) -> i64 {
        match self {
            Self::Transactional => 0,
            Self::Bulk => 1,
        }
    }
}

impl FromStr for Lane {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|l| l.as_str() == text).ok_or(())
    }
}

/// To whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// All devices of these users, each fenced by its generation.
    Users(Vec<UserId>),
    /// These devices; with a user, only while that user holds them.
    Devices {
        /// Whose addresses.
        ids: Vec<DeviceId>,
        /// The fence.
        user_id: Option<UserId>,
    },
    /// Raw tokens: not fenced; one that is registered is that device.
    Tokens(Vec<DeviceToken>),
    /// Devices by their tags.
    Tags {
        /// Has each of these.
        all: Vec<Tag>,
        /// Has at least one of these, if any is named.
        any: Vec<Tag>,
        /// Has none of these.
        none: Vec<Tag>,
    },
    /// Every device of the app.
    Everyone,
}

impl Audience {
    /// The longest list of users, devices or tokens.
    pub const MAX_LIST: usize = 20_000;

    /// A longer list is resolved piece by piece, as tags and everyone are.
    pub const AT_ONCE: usize = 2_000;

    /// How many were named; `None` for tags and everyone.
    #[must_use]
    pub fn named(&self) -> Option<usize> {
        match self {
            Self::Users(users) => Some(users.len()),
            Self::Devices { ids, .. } => Some(ids.len()),
            Self::Tokens(tokens) => Some(tokens.len()),
            Self::Tags { .. } | Self::Everyone => None,
        }
    }

    /// Whether it is read as a whole, when it is accepted or claimed; else piece by piece, when it is claimed.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.named().is_some_and(|named| named <= Self::AT_ONCE)
    }

    /// The lane used when the caller names none.
    #[must_use]
    pub fn default_lane(&self) -> Lane {
        match self.named() {
            Some(named) if named <= Lane::TRANSACTIONAL_LIST => Lane::Transactional,
            _ => Lane::Bulk,
        }
    }
}

/// Something suspicious that was accepted all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// A JSON pointer into the request.
    pub pointer: String,
    /// A stable word.
    pub code: String,
    /// What is suspicious, and what to do.
    pub detail: String,
}

/// One checked notification.
#[derive(Debug, Clone)]
pub struct Notification {
    /// Its id.
    pub id: NotificationId,
    /// The app.
    pub topic: Topic,
    /// The owner of the API key that sent it.
    pub owner: String,
    /// The caller's word for it.
    pub reference: Option<Reference>,
    /// Its queue.
    pub lane: Lane,
    /// `apns-push-type`.
    pub push_type: PushType,
    /// `apns-priority`.
    pub priority: Priority,
    /// `apns-expiration`, and when we give up.
    pub expiration: Expiration,
    /// The caller's collapse id.
    pub collapse_id: Option<CollapseId>,
    /// Whether, without one of the caller's, the notification's id is the collapse id (a visible alert).
    pub derives_collapse_id: bool,
    /// What to do when a push was written and no answer came.
    pub on_unknown: OnUnknown,
    /// Where to send; `None`: each device's own.
    pub environment: Option<Environment>,
    /// Apple's JSON.
    pub payload: Payload,
    /// When it is to leave.
    pub due_at: Timestamp,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// What was suspicious.
    pub warnings: Vec<Warning>,
}

impl Notification {
    /// The value of `apns-collapse-id`.
    #[must_use]
    pub fn apns_collapse_id(&self) -> Option<CollapseId> {
        match &self.collapse_id {
            Some(given) => Some(given.clone()),
            None => self.derives_collapse_id.then(|| CollapseId::derived(self.id)),
        }
    }

    /// Nothing leaves at or after this moment.
    #[must_use]
    pub fn deadline(&self) -> Timestamp {
        self.expiration.deadline(self.due_at)
    }
}

/// How many devices stand where. Words of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the words of design.md, each explained there")]
pub struct Counts {
    pub targeted: u64,
    pub pending: u64,
    pub accepted: u64,
    pub failed: u64,
    pub unregistered: u64,
    pub expired: u64,
    pub cancelled: u64,
    pub suppressed: u64,
    pub unknown: u64,
}

impl Counts {
    /// Adds the counts of another part.
    pub fn add(&mut self, other: &Self) {
        self.targeted += other.targeted;
        self.pending += other.pending;
        self.accepted += other.accepted;
        self.failed += other.failed;
        self.unregistered += other.unregistered;
        self.expired += other.expired;
        self.cancelled += other.cancelled;
        self.suppressed += other.suppressed;
        self.unknown += other.unknown;
    }
}

/// Where a notification stands as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotificationStatus {
    /// Its time has not come.
    Scheduled,
    /// Due, nothing has been tried yet.
    Queued,
    /// Some devices have an outcome or an attempt, some are open.
    Sending,
    /// Every device has its outcome.
    Done,
    /// Cancelled; every device has its outcome.
    Cancelled,
}

impl NotificationStatus {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Scheduled, Self::Queued, Self::Sending, Self::Done, Self::Cancelled];

    /// The name on the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Queued => "queued",
            Self::Sending => "sending",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for NotificationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a notification status: scheduled, queued, sending, done or cancelled")]
pub struct NotAStatus;

impl FromStr for NotificationStatus {
    type Err = NotAStatus;

    fn from_str(text: &str) -> Result<Self, NotAStatus> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(NotAStatus)
    }
}

super::serde_by_text!(NotificationStatus);

/// Why a notification waits though it is due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingFor {
    /// A breaker, a hold, a back-off: a word, and for a breaker APNs' reason.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
}

/// A notification as it is read back: what `POST` and `GET /v1/notifications` answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields of the API's answer, explained in design.md")]
pub struct NotificationView {
    pub id: NotificationId,
    pub status: NotificationStatus,
    pub topic: Topic,
    pub reference: Option<Reference>,
    pub counts: Counts,
    pub unmatched: u64,
    pub audience_complete: bool,
    pub waiting_for: Option<WaitingFor>,
    pub warnings: Vec<Warning>,
    pub created_at: Timestamp,
    /// Absent in answers that were kept before there was cancelling.
    #[serde(default)]
    pub cancelled_at: Option<Timestamp>,
    pub done_at: Option<Timestamp>,
}
