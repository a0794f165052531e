//! What APNs can answer to one push, as values.
//!
//! Promises: "Apple said no" and "we do not know" are different values; a reason that Apple invents tomorrow is kept
//! as it came. What follows for the device is in [`super::delivery`]; what follows for the connection is the APNs
//! client's business.

use std::{borrow::Cow, fmt, time::Duration};

use super::clock::Timestamp;

macro_rules! reasons {
    ($($name:ident),+ $(,)?) => {
        /// A reason as APNs spells it. Open: a string that is not in Apple's tables is kept in [`Reason::Other`].
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        #[expect(missing_docs, reason = "Apple's own words, explained in docs/architecture.md and Apple's tables")]
        pub enum Reason {
            $($name,)+
            /// Not in Apple's tables.
            Other(Box<str>),
        }

        impl Reason {
            /// Every reason that Apple documents or that was seen on the wire.
            pub const KNOWN: &'static [Self] = &[$(Self::$name),+];

            /// APNs' spelling.
            #[must_use]
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$name => stringify!($name),)+
                    Self::Other(text) => text,
                }
            }
        }

        impl From<&str> for Reason {
            fn from(text: &str) -> Self {
                match text {
                    $(stringify!($name) => Self::$name,)+
                    other => Self::Other(other.into()),
                }
            }
        }
    };
}

reasons! {
    // Device pushes
    BadCollapseId, BadDeviceToken, BadExpirationDate, BadMessageId, BadPriority, BadTopic, DeviceTokenNotForTopic,
    DuplicateHeaders, IdleTimeout, InvalidPushType, MissingDeviceToken, MissingTopic, PayloadEmpty, TopicDisallowed,
    BadCertificate, BadCertificateEnvironment, ExpiredProviderToken, Forbidden, InvalidProviderToken,
    MissingProviderToken, UnrelatedKeyIdInToken, BadEnvironmentKeyIdInToken, BadEnvironmentKeyInToken,
    BadPath, MethodNotAllowed, ExpiredToken, Unregistered, PayloadTooLarge,
    TooManyProviderTokenUpdates, TooManyRequests, InternalServerError, ServiceUnavailable, Shutdown,
    // Broadcast channels
    FeatureNotEnabled, BroadcastFeatureNotEnabled, MissingChannelId, BadChannelId, ChannelNotRegistered,
    BadRequestParams, BadRequestPayload, MissingPushType, CannotCreateChannelConfig, MissingChannelQueueSize,
    TopicMismatch,
}

impl Reason {
    /// Whether it refuses the device's token, which many devices at once cannot be to blame for.
    #[must_use]
    pub const fn is_about_the_token(&self) -> bool {
        matches!(self, Self::BadDeviceToken | Self::DeviceTokenNotForTopic)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What APNs said in so many words: kept unchanged for whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The reason; absent on 200, or when the body could not be read.
    pub reason: Option<Reason>,
    /// `apns-unique-id`, the key to Apple's delivery log; sandbox only.
    pub apns_unique_id: Option<Box<str>>,
}

/// Our own key, topic or environment is wrong: nothing is held against any device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The HTTP status.
    pub status: u16,
    /// APNs' reason.
    pub reason: Reason,
}

impl Fault {
    /// Whether APNs accepts the credential and refuses device tokens that worked: only a token that it knows shows that
    /// such a fault is over.
    #[must_use]
    pub const fn is_wave(&self) -> bool {
        self.reason.is_about_the_token()
    }

    /// What an operator should do about it. A sentence.
    #[must_use]
    pub fn cure(&self) -> &'static str {
        match self.reason {
            Reason::InvalidProviderToken | Reason::MissingProviderToken => {
                "APNs does not recognise the provider token: check `team_id`, `key_id` and `key_file` of this app in apps.toml against the Apple developer account, that the key has not been revoked, and that this machine's clock is right."
            }
            Reason::ExpiredProviderToken => {
                "APNs finds the provider token too old: this machine's clock is wrong; set it by NTP."
            }
            Reason::TopicDisallowed | Reason::BadTopic | Reason::MissingTopic | Reason::TopicMismatch => {
                "The key may not push to this topic: check `topic` in apps.toml, that the bundle id belongs to `team_id`, that Push Notifications is enabled for it, and, for a topic-specific key, that the key lists it."
            }
            Reason::BadEnvironmentKeyIdInToken
            | Reason::BadEnvironmentKeyInToken
            | Reason::BadCertificateEnvironment => {
                "The key is for the other environment: correct `environments` of this app in apps.toml, or add a second [[app]] with a key for this environment."
            }
            Reason::UnrelatedKeyIdInToken => {
                "Two unrelated keys met on one connection: check that each [[app]] names its own key."
            }
            Reason::DeviceTokenNotForTopic => {
                "Tokens that worked do not belong to this topic: check `topic` of this app in apps.toml against the app's bundle id, and that each token is registered under the topic and the `push_type` it was made for."
            }
            Reason::BadDeviceToken => {
                "Tokens that worked are refused: check that `production` and `sandbox` in [apns] are Apple's addresses of that environment and not of the other, and `environments` of this app in apps.toml."
            }
            _ => "APNs refuses this credential: check the key in the Apple developer account, and apps.toml.",
        }
    }
}

impl From<&Answer> for Fault {
    fn from(answer: &Answer) -> Self {
        Self { status: answer.status, reason: answer.reason.clone().unwrap_or_else(|| Reason::from("")) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, self.reason)
    }
}

/// How one attempt ended. Errors of our own are none of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// 200: accepted for processing, not delivered.
    Accepted,
    /// Asking again gets the same no; the device is not to blame.
    Rejected,
    /// `BadDeviceToken`: garbage, or a token of the other environment; APNs does not tell which.
    BadToken,
    /// `DeviceTokenNotForTopic`: this delivery fails, the device stays.
    WrongTopic,
    /// 410: this token left this topic then; absent: take the time of sending.
    Gone {
        /// APNs' timestamp.
        since: Option<Timestamp>,
    },
    /// Ask later.
    Deferred {
        /// Who is too busy.
        whose: Busy,
        /// `retry-after`, if present.
        after: Option<Duration>,
    },
    /// Our own key, topic or environment is wrong.
    Withheld(Fault),
    /// Never processed: the connection gave it back, `REFUSED_STREAM`, GOAWAY below its stream, no connection.
    Unsent,
    /// Written, unanswered: a repeat may show twice.
    Unknown,
    /// Our own fence refused it right before the write: it was not sent.
    Fenced,
}

/// Who asked for patience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// 429 `TooManyRequests`: too many pushes to this device.
    Device,
    /// 5xx, or 429 about the connection.
    Server,
}

/// How one attempt ended, and APNs' own words where there were any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What it means.
    pub outcome: Outcome,
    /// What APNs said.
    pub answer: Option<Answer>,
    /// When the request was written; `None` if it never was.
    pub sent_at: Option<Timestamp>,
}

/// Why a delivery ended as it did, or why it waits: APNs' status and reason unchanged, or a word of our own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cause {
    /// APNs' HTTP status; `None` for a word of our own.
    pub apns_status: Option<u16>,
    /// The word.
    pub reason: Cow<'static, str>,
}

impl Cause {
    /// A word of our own.
    #[must_use]
    pub const fn own(reason: &'static str) -> Self {
        Self { apns_status: None, reason: Cow::Borrowed(reason) }
    }
}

/// Words of our own for outcomes that APNs had no part in.
pub mod own {
    use super::Cause;

    /// The phone has another user than the notification was for.
    pub const OWNER_CHANGED: Cause = Cause::own("OwnerChanged");
    /// The phone's user logged out.
    pub const LOGGED_OUT: Cause = Cause::own("LoggedOut");
    /// The device was forgotten after the notification became due.
    pub const DEVICE_FORGOTTEN: Cause = Cause::own("DeviceForgotten");
    /// The device's token is known to be dead.
    pub const DEVICE_INACTIVE: Cause = Cause::own("DeviceInactive");
    /// The device is suspended until it registers again.
    pub const DEVICE_SUSPENDED: Cause = Cause::own("DeviceSuspended");
    /// The device's token is for another push type.
    pub const WRONG_PUSH_TYPE: Cause = Cause::own("WrongPushType");
    /// A newer notification with the same collapse id has gone to the device.
    pub const SUPERSEDED: Cause = Cause::own("Superseded");
    /// The expiration passed first.
    pub const EXPIRED: Cause = Cause::own("Expired");
    /// Written, and no answer came.
    pub const NO_ANSWER: Cause = Cause::own("NoAnswer");
    /// The app has no key for the environment.
    pub const NO_KEY: Cause = Cause::own("NoKeyForEnvironment");
    /// The caller cancelled the notification before it left.
    pub const CANCELLED: Cause = Cause::own("Cancelled");
    /// Dropped by the operator while held.
    pub const DROPPED: Cause = Cause::own("Dropped");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_keeps_its_spelling_known_or_not() {
        assert_eq!(Reason::from("Unregistered"), Reason::Unregistered);
        assert_eq!(Reason::from("BrandNew").as_str(), "BrandNew");
        assert_eq!(Reason::KNOWN.len(), 44);
    }
}
