//! The topic: an app's bundle id, and the environment of APNs that a token belongs to.

use std::{fmt, str::FromStr, sync::Arc};

use super::text_value;

/// An app's bundle id, as the caller names it. The suffix that a push type needs is added by
/// [`super::push::PushType::apns_topic`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

/// A text that is no bundle id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a bundle id: 1 to 155 letters, digits, hyphens and dots, such as fr.example.app")]
pub struct NotATopic;

impl Topic {
    /// Apple's limit on a bundle id (App Store Connect; K in the protocol sheet).
    pub const MAX_BYTES: usize = 155;
}

impl FromStr for Topic {
    type Err = NotATopic;

    fn from_str(text: &str) -> Result<Self, NotATopic> {
        let shaped = !text.is_empty()
            && text.len() <= Self::MAX_BYTES
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if shaped { Ok(Self(text.into())) } else { Err(NotATopic) }
    }
}

text_value!(Topic, NotATopic);

/// One of the two worlds of APNs. They share nothing: neither tokens nor, for new keys, signing keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Environment {
    /// TestFlight, Ad Hoc, App Store and Enterprise builds.
    Production,
    /// Builds run from Xcode; Apple also says "development".
    Sandbox,
}

impl Environment {
    /// Both, production first.
    pub const ALL: [Self; 2] = [Self::Production, Self::Sandbox];

    /// The name on the API, in configuration and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Production => "production",
            Self::Sandbox => "sandbox",
        }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Production => Self::Sandbox,
            Self::Sandbox => Self::Production,
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an environment: production or sandbox")]
pub struct NotAnEnvironment;

impl FromStr for Environment {
    type Err = NotAnEnvironment;

    /// `development` is read as `sandbox`, the word Xcode uses for it.
    fn from_str(text: &str) -> Result<Self, NotAnEnvironment> {
        match text {
            "production" => Ok(Self::Production),
            "sandbox" | "development" => Ok(Self::Sandbox),
            _ => Err(NotAnEnvironment),
        }
    }
}

super::serde_by_text!(Environment);
