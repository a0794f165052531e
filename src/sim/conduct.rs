//! How an environment conducts itself: what Apple leaves open, or does on its bad days, chosen while it runs.
//!
//! Promises: the default is a good day. One JSON object holds all of it (`--conduct`, `/environments/…/conduct`);
//! fields it does not name have their default. What a field changes it changes on open connections too, unless it says
//! that it is for new ones.

use std::{num::NonZeroU32, time::Duration};

use serde::Deserialize as _;
use serde_json::{Map, Value};

/// The whole of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conduct {
    /// What Apple may or may not refuse is accepted: docs/simulator.md has the list. By default it is refused.
    pub lenient: bool,
    /// The stream limit falls to 1 with every refusal but 410, and rises again with the next 200 (openradar 27870881).
    pub adaptive_streams: bool,
    /// When a new connection is sent its first SETTINGS.
    pub settings: FirstSettings,
    /// The flow-control window of each stream at first, in bytes, at most 2^31-1; absent: 65,535. For new connections.
    #[serde(deserialize_with = "window")]
    pub stream_window: Option<u32>,
    /// That of the connection, likewise. HTTP/2 lets it begin no lower than 65,535: a lower one is not topped up before
    /// the client has used it down to this. For new connections.
    #[serde(deserialize_with = "window")]
    pub connection_window: Option<u32>,
    /// How many milliseconds what was read waits before the client gets it back by `WINDOW_UPDATE`.
    pub window_updates_after_ms: u64,
    /// How fast each connection is read, inside TLS, at least 1; absent: as fast as it comes.
    pub read_bytes_per_second: Option<NonZeroU32>,
    /// What a connection does after `ExpiredProviderToken` and `TooManyProviderTokenUpdates` (pushy 811).
    pub after_token_error: AfterTokenError,
    /// How many refusals a connection may bring on itself before GOAWAY without a word; 410 does not count, and
    /// `BadDeviceToken` counts twice, because it weighs more at Apple. Absent: any number.
    pub max_errors: Option<NonZeroU32>,
    /// How long a connection may be idle; absent: for ever.
    pub idle_timeout: Option<IdleTimeout>,
    /// How many milliseconds the `date` of answers is ahead of the simulator's clock; absent: there is none.
    pub date_skew_ms: Option<i64>,
    /// The `retry-after` of 429 and 503; absent: there is none.
    pub retry_after: Option<RetryAfter>,
    /// How a provider token older than an hour is refused.
    pub expired_token: ExpiredToken,
    /// How `apns-id` comes back.
    pub apns_id: MessageId,
    /// The form of a refusal's body.
    pub error_body: ErrorBody,
    /// How many pushes one device token takes before 429 `TooManyRequests`; absent: any number.
    pub device_rate: Option<DeviceRate>,
}

/// So many pushes to one device token in so long; those refused for it do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRate {
    /// How many.
    pub pushes: u32,
    /// In how many milliseconds.
    pub within_ms: u64,
}

/// How a client is told to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryAfter {
    /// In so many seconds.
    Seconds(u32),
    /// At a time, which is so many seconds away.
    DateInSeconds(u32),
}

/// What an expired provider token gets: others saw each (pushy 408, node-apn 480).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpiredToken {
    /// 403 `ExpiredProviderToken`.
    #[default]
    Refused,
    /// 500 `InternalServerError`.
    InternalServerError,
    /// No answer.
    Silence,
}

/// The `apns-id` of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageId {
    /// As the client wrote it; one that APNs makes is in upper case.
    #[default]
    Echoed,
    /// In upper case in any case.
    UpperCase,
    /// There is none.
    Missing,
}

/// The body of a refusal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorBody {
    /// `{"reason": "…"}`
    #[default]
    Json,
    /// The bare reason.
    Text,
    /// A page such as a proxy's.
    Html,
    /// The first half of the JSON.
    Truncated,
    /// None.
    Empty,
}

/// What a connection does once its provider token was refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterTokenError {
    /// Nothing: the next request is judged by itself.
    #[default]
    GoesOn,
    /// Every later answer is the same error.
    Repeats,
    /// No later request is answered; PING still is.
    FallsSilent,
}

/// When a connection was idle for too long: no stream open, nothing asked or answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdleTimeout {
    /// After so many milliseconds.
    pub after_ms: u64,
    /// How the client learns of it.
    #[serde(default)]
    pub by: IdleEnd,
}

impl IdleTimeout {
    pub(super) const fn after(self) -> Duration {
        Duration::from_millis(self.after_ms)
    }
}

/// How an idle connection ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdleEnd {
    /// By GOAWAY with `{"reason":"IdleTimeout"}`, when the time is over.
    #[default]
    GoAway,
    /// By 400 `IdleTimeout` to the next request, and GOAWAY behind it.
    Answer,
}

/// The largest window HTTP/2 knows.
const MAX_WINDOW_BYTES: u32 = u32::MAX >> 1;
/// The window HTTP/2 begins with.
const WINDOW_BYTES: u32 = 65_535;

fn window<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let window = Option::<u32>::deserialize(deserializer)?;
    if window.is_some_and(|bytes| bytes > MAX_WINDOW_BYTES) {
        return Err(serde::de::Error::custom("a window has at most 2147483647 bytes"));
    }
    Ok(window)
}

/// When the first SETTINGS of a connection leaves. Nothing else leaves before it, and nothing is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstSettings {
    /// Right behind the TLS handshake.
    #[default]
    AtOnce,
    /// So many milliseconds behind it.
    AfterMs(u64),
    /// Never: what the client sends is thrown away, until it closes the connection.
    Never,
}

impl FirstSettings {
    /// How long a new connection says nothing; `None`: for ever.
    pub(super) const fn delay(self) -> Option<Duration> {
        match self {
            Self::AtOnce => Some(Duration::ZERO),
            Self::AfterMs(ms) => Some(Duration::from_millis(ms)),
            Self::Never => None,
        }
    }
}

/// A conduct that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConductError {
    /// The JSON has unknown fields or values.
    #[error("the conduct is not understood: {0}")]
    Unknown(serde_json::Error),
}

impl Conduct {
    /// The windows of a new connection, of streams and its own, in bytes.
    pub(super) fn windows(&self) -> (u32, u32) {
        let bytes = |window: Option<u32>| window.unwrap_or(WINDOW_BYTES).min(MAX_WINDOW_BYTES);
        (bytes(self.stream_window), bytes(self.connection_window))
    }

    /// Reads a conduct from its JSON.
    ///
    /// # Errors
    /// [`ConductError`] if a field or value is unknown.
    pub fn parse(json: &str) -> Result<Self, ConductError> {
        serde_json::from_str(json).map_err(ConductError::Unknown)
    }

    /// This conduct with `changes`: a field with `null` gets its default back.
    ///
    /// # Errors
    /// [`ConductError`], as for [`Conduct::parse`].
    pub fn with(&self, changes: Map<String, Value>) -> Result<Self, ConductError> {
        let mut all = serde_json::to_value(self).map_err(ConductError::Unknown)?;
        if let Value::Object(fields) = &mut all {
            for (name, value) in changes {
                if value.is_null() {
                    fields.remove(&name);
                } else {
                    fields.insert(name, value);
                }
            }
        }
        serde_json::from_value(all).map_err(ConductError::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(json: &str) -> Map<String, Value> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_is_not_named_stays_and_null_gives_the_default_back() {
        let one = Conduct::parse(r#"{"adaptive_streams":true,"settings":{"after_ms":5}}"#).unwrap();
        assert_eq!(one.settings.delay(), Some(Duration::from_millis(5)));
        let two = one.with(changes(r#"{"settings":"never"}"#)).unwrap();
        assert_eq!((two.adaptive_streams, two.settings), (true, FirstSettings::Never));
        assert_eq!(two.with(changes(r#"{"settings":null,"adaptive_streams":null}"#)).unwrap(), Conduct::default());
    }

    #[test]
    fn an_unknown_field_or_value_is_an_error() {
        assert!(Conduct::parse(r#"{"adaptive":true}"#).is_err());
        assert!(Conduct::parse(r#"{"settings":"seldom"}"#).is_err());
        assert!(Conduct::default().with(changes(r#"{"settings":7}"#)).is_err());
    }
}
