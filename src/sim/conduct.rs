//! How an environment conducts itself: what Apple leaves open, or does on its bad days, chosen while it runs.
//!
//! Promises: the default is a good day. One JSON object holds all of it (`--conduct`, `/environments/…/conduct`);
//! fields it does not name have their default. What a field changes it changes on open connections too, unless it says
//! that it is for new ones.

use std::time::Duration;

use serde_json::{Map, Value};

/// The whole of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conduct {
    /// The stream limit falls to 1 with every refusal but 410, and rises again with the next 200 (openradar 27870881).
    pub adaptive_streams: bool,
    /// When a new connection is sent its first SETTINGS.
    pub settings: FirstSettings,
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
