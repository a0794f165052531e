//! The parts of one request to APNs beside token and payload: push type, priority, expiration, collapse id, `apns-id`.
//!
//! Limits and spellings are those of Apple's "Sending notification requests to APNs".

use std::{fmt, str::FromStr, time::Duration};

use uuid::Uuid;

use super::{clock::Timestamp, device::DeviceToken, notification::NotificationId, text_value, topic::Topic};

/// What kind of push this is: the value of `apns-push-type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "Apple's own words, each explained in docs and in Apple's table")]
pub enum PushType {
    Alert,
    Background,
    Voip,
    Complication,
    FileProvider,
    Mdm,
    Location,
    LiveActivity,
    PushToTalk,
    Controls,
    Widgets,
}

impl PushType {
    /// All of them, in Apple's order.
    pub const ALL: [Self; 11] = [
        Self::Alert,
        Self::Background,
        Self::Voip,
        Self::Complication,
        Self::FileProvider,
        Self::Mdm,
        Self::Location,
        Self::LiveActivity,
        Self::PushToTalk,
        Self::Controls,
        Self::Widgets,
    ];

    /// The header's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alert => "alert",
            Self::Background => "background",
            Self::Voip => "voip",
            Self::Complication => "complication",
            Self::FileProvider => "fileprovider",
            Self::Mdm => "mdm",
            Self::Location => "location",
            Self::LiveActivity => "liveactivity",
            Self::PushToTalk => "pushtotalk",
            Self::Controls => "controls",
            Self::Widgets => "widgets",
        }
    }

    /// What Apple wants behind the bundle id in `apns-topic` for this type.
    #[must_use]
    pub const fn topic_suffix(self) -> &'static str {
        match self {
            Self::Alert | Self::Background | Self::Mdm => "",
            Self::Voip => ".voip",
            Self::Complication => ".complication",
            Self::FileProvider => ".pushkit.fileprovider",
            Self::Location => ".location-query",
            Self::LiveActivity => ".push-type.liveactivity",
            Self::PushToTalk => ".voip-ptt",
            Self::Controls => ".push-type.controls",
            Self::Widgets => ".push-type.widgets",
        }
    }

    /// The value of `apns-topic` for this type of push to an app.
    #[must_use]
    pub fn apns_topic(self, topic: &Topic) -> String {
        format!("{topic}{}", self.topic_suffix())
    }

    /// The largest payload APNs takes, in bytes.
    #[must_use]
    pub const fn max_payload_bytes(self) -> usize {
        match self {
            Self::Voip => 5120,
            _ => 4096,
        }
    }

    /// The priority used when the caller names none.
    #[must_use]
    pub const fn default_priority(self) -> Priority {
        match self {
            Self::Background => Priority::Five,
            _ => Priority::Ten,
        }
    }

    /// Whether a push of this type may be repeated when it is not known if it arrived.
    #[must_use]
    pub const fn default_on_unknown(self) -> OnUnknown {
        match self {
            Self::Voip | Self::PushToTalk | Self::Location => OnUnknown::Stop,
            _ => OnUnknown::Retry,
        }
    }

    /// The type of token that a push of this type goes to: `background` goes to the token for alerts.
    #[must_use]
    pub const fn token_type(self) -> Self {
        match self {
            Self::Background => Self::Alert,
            other => other,
        }
    }
}

impl fmt::Display for PushType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no push type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a push type: alert, background, voip, complication, fileprovider, mdm, location, liveactivity, pushtotalk, controls or widgets"
)]
pub struct NotAPushType;

impl FromStr for PushType {
    type Err = NotAPushType;

    fn from_str(text: &str) -> Result<Self, NotAPushType> {
        Self::ALL.into_iter().find(|t| t.as_str() == text).ok_or(NotAPushType)
    }
}

super::serde_by_text!(PushType);

/// `apns-priority`: about delivery to the device, not about our queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Priority {
    /// Deliver at once.
    Ten,
    /// When the device's power allows.
    Five,
    /// Power above everything; never wakes the device.
    One,
}

impl Priority {
    /// The header's number.
    #[must_use]
    pub const fn as_number(self) -> u8 {
        match self {
            Self::Ten => 10,
            Self::Five => 5,
            Self::One => 1,
        }
    }

    /// The header's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ten => "10",
            Self::Five => "5",
            Self::One => "1",
        }
    }

    /// From the header's number; `None` for any other than 10, 5 and 1.
    #[must_use]
    pub const fn from_number(number: i64) -> Option<Self> {
        match number {
            10 => Some(Self::Ten),
            5 => Some(Self::Five),
            1 => Some(Self::One),
            _ => None,
        }
    }
}

/// Until when a push may leave, and what APNs is told about storing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiration {
    /// `apns-expiration: 0`: one attempt at delivery by APNs, no storage. We ourselves give up after
    /// [`Expiration::IMMEDIATE_PATIENCE`] from the due time.
    Immediate,
    /// Stored and retried until then.
    At(Timestamp),
}

impl Expiration {
    /// How long a push with expiration 0 may wait in our queue before it is late: "now" has a meaning.
    pub const IMMEDIATE_PATIENCE: Duration = Duration::from_secs(30);

    /// The longest APNs stores a notification.
    pub const MAX: Duration = Duration::from_secs(30 * 24 * 3600);

    /// The header's value: whole seconds since the epoch, or 0.
    #[must_use]
    pub const fn header_seconds(self) -> i64 {
        match self {
            Self::Immediate => 0,
            Self::At(at) => at.as_seconds(),
        }
    }

    /// Nothing leaves at or after this moment. `due` is when the notification was to leave.
    #[must_use]
    pub fn deadline(self, due: Timestamp) -> Timestamp {
        match self {
            Self::Immediate => due.plus(Self::IMMEDIATE_PATIENCE),
            Self::At(at) => at,
        }
    }
}

/// What to do when a push was written and no answer came (promise 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnknown {
    /// Send it again with the same `apns-id`: at least once.
    Retry,
    /// Never again: at most once, at the price of a durable mark before the write.
    Stop,
}

impl OnUnknown {
    /// The name on the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Stop => "stop",
        }
    }
}

impl FromStr for OnUnknown {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "retry" => Ok(Self::Retry),
            "stop" => Ok(Self::Stop),
            _ => Err(()),
        }
    }
}

/// `apns-collapse-id`: a later notification with the same value replaces the one shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CollapseId(Box<str>);

impl CollapseId {
    /// Apple's limit.
    pub const MAX_BYTES: usize = 64;

    /// The collapse id that a visible alert without one of its own carries: the notification's id, so that a repeat
    /// replaces the first on the phone.
    #[must_use]
    pub fn derived(notification: NotificationId) -> Self {
        Self(notification.to_string().into())
    }
}

/// A text that is no collapse id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a collapse id: 1 to 64 bytes of visible ASCII")]
pub struct NotACollapseId;

impl FromStr for CollapseId {
    type Err = NotACollapseId;

    fn from_str(text: &str) -> Result<Self, NotACollapseId> {
        let shaped = !text.is_empty() && text.len() <= Self::MAX_BYTES && text.bytes().all(|b| b.is_ascii_graphic());
        if shaped { Ok(Self(text.into())) } else { Err(NotACollapseId) }
    }
}

text_value!(CollapseId, NotACollapseId);

/// The `apns-id` of every attempt for one notification and one device: derived from the two, so that it is the same
/// after any crash and needs no room in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApnsId(Uuid);

impl ApnsId {
    /// Derives the id (`UUIDv5` in the notification's namespace, from the device token's bytes).
    #[must_use]
    pub fn derive(notification: NotificationId, recipient: Recipient<'_>) -> Self {
        match recipient {
            Recipient::Device(id) => Self(Uuid::new_v5(notification.as_uuid(), id.as_uuid().as_bytes())),
            Recipient::Token(token) => Self(Uuid::new_v5(notification.as_uuid(), token.as_hex().as_bytes())),
        }
    }

    /// The plain UUID; written to APNs in lower case.
    #[must_use]
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl fmt::Display for ApnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// To whom a push goes: a registered device, or a raw token that nobody registered.
#[derive(Debug, Clone, Copy)]
pub enum Recipient<'a> {
    /// A registered device; its token may change, its id does not.
    Device(super::device::DeviceId),
    /// A raw token.
    Token(&'a DeviceToken),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_push_type_has_apples_topic_suffix() {
        let topic: Topic = "fr.ocpizza.livreur".parse().unwrap();
        let topics: Vec<String> = PushType::ALL.iter().map(|t| t.apns_topic(&topic)).collect();
        assert_eq!(
            topics,
            [
                "fr.ocpizza.livreur",
                "fr.ocpizza.livreur",
                "fr.ocpizza.livreur.voip",
                "fr.ocpizza.livreur.complication",
                "fr.ocpizza.livreur.pushkit.fileprovider",
                "fr.ocpizza.livreur",
                "fr.ocpizza.livreur.location-query",
                "fr.ocpizza.livreur.push-type.liveactivity",
                "fr.ocpizza.livreur.voip-ptt",
                "fr.ocpizza.livreur.push-type.controls",
                "fr.ocpizza.livreur.push-type.widgets",
            ]
        );
    }

    #[test]
    fn an_apns_id_is_the_same_each_time_and_another_for_each_device() {
        let notification: NotificationId = "0193515e-8f00-7abc-8def-0123456789ab".parse().unwrap();
        let one = Recipient::Device("0193515e-8f00-7abc-8def-000000000001".parse().unwrap());
        let two = Recipient::Device("0193515e-8f00-7abc-8def-000000000002".parse().unwrap());
        assert_eq!(ApnsId::derive(notification, one), ApnsId::derive(notification, one));
        assert_ne!(ApnsId::derive(notification, one), ApnsId::derive(notification, two));
    }

    #[test]
    fn a_collapse_id_has_at_most_64_bytes_of_visible_ascii() {
        assert!("order-1042".parse::<CollapseId>().is_ok());
        assert!("a".repeat(64).parse::<CollapseId>().is_ok());
        assert!("a".repeat(65).parse::<CollapseId>().is_err());
        assert!("commande 1042".parse::<CollapseId>().is_err());
        assert!("é".parse::<CollapseId>().is_err());
    }
}
