//! API keys: who may call what.
//!
//! Promises: a key is `sonnette_<id>_<secret>`; the secret has 256 bits and only its SHA-256 is kept, compared in
//! constant time; neither the secret nor the whole key is ever printed but once, when it is made.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{clock::Timestamp, secret::Secret, text_value, topic::Topic};

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Register devices. Public in practice: it ships inside the app.
    Register,
    /// Send to users, devices and tokens; mint identity tokens; log out and forget devices.
    Send,
    /// Send to tags and to everyone.
    Broadcast,
    /// Read devices, notifications and outcomes.
    Read,
    /// Scrape `/metrics`.
    Metrics,
    /// Everything an operator does.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Register, Self::Send, Self::Broadcast, Self::Read, Self::Metrics, Self::Admin];

    /// The name on the command line, the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Send => "send",
            Self::Broadcast => "broadcast",
            Self::Read => "read",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a scope: register, send, broadcast, read, metrics or admin")]
pub struct NotAScope(String);

impl FromStr for Scope {
    type Err = NotAScope;

    fn from_str(text: &str) -> Result<Self, NotAScope> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or_else(|| NotAScope(text.into()))
    }
}

super::serde_by_text!(Scope);

/// The public part of a key: 16 hex digits. Safe to log.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ApiKeyId(Arc<str>);

/// A text that is no key id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the id of an API key: 16 hex digits, the part between the two underscores")]
pub struct NotAnApiKeyId;

impl FromStr for ApiKeyId {
    type Err = NotAnApiKeyId;

    fn from_str(text: &str) -> Result<Self, NotAnApiKeyId> {
        let shaped = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if shaped { Ok(Self(text.into())) } else { Err(NotAnApiKeyId) }
    }
}

text_value!(ApiKeyId, NotAnApiKeyId);

/// A key as a caller presents it, or as it was just made.
#[derive(Debug, Clone)]
pub struct PresentedKey {
    /// The public part.
    pub id: ApiKeyId,
    secret: Secret<Box<str>>,
}

impl PresentedKey {
    /// Makes a new key from 8 random bytes for the id and 32 for the secret.
    #[must_use]
    pub fn from_random(id: [u8; 8], secret: [u8; 32]) -> Self {
        Self { id: ApiKeyId(hex::encode(id).into()), secret: Secret::new(hex::encode(secret).into()) }
    }

    /// Reads `sonnette_<id>_<secret>`; `None` if it does not have that shape.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix("sonnette_")?.split_once('_')?;
        let shaped = secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit());
        if !shaped {
            return None;
        }
        Some(Self { id: id.parse().ok()?, secret: Secret::new(secret.into()) })
    }

    /// The whole key. For the one moment in which it is handed out.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("sonnette_{}_{}", self.id, self.secret.expose())
    }

    /// What is kept of the secret.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.secret.expose().as_bytes()).into()
    }
}

/// A key as it is kept.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// The public part.
    pub id: ApiKeyId,
    /// SHA-256 of the secret.
    pub hash: Secret<[u8; 32]>,
    /// Whose key it is. Idempotency keys belong to the owner, so that a rotated key sees the same answers.
    pub owner: String,
    /// What it may do.
    pub scopes: BTreeSet<Scope>,
    /// The apps it is for; `None`: all.
    pub topics: Option<BTreeSet<Topic>>,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when it is refused.
    pub expires_at: Option<Timestamp>,
    /// Since when it is refused.
    pub revoked_at: Option<Timestamp>,
}

impl ApiKey {
    /// Whether `presented` is this key, in constant time.
    #[must_use]
    pub fn is(&self, presented: &PresentedKey) -> bool {
        bool::from(self.hash.expose().ct_eq(&presented.hash()))
    }

    /// Whether the key may do this.
    #[must_use]
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether the key is for this app.
    #[must_use]
    pub fn is_for(&self, topic: &Topic) -> bool {
        self.topics.as_ref().is_none_or(|topics| topics.contains(topic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_back_as_it_was_handed_out_and_does_not_print() {
        let made = PresentedKey::from_random([0xab; 8], [0xcd; 32]);
        let text = made.reveal();
        assert!(text.starts_with("sonnette_abababababababab_cdcd"));
        assert_eq!(PresentedKey::parse(&text).unwrap().hash(), made.hash());
        assert!(!format!("{made:?}").contains("cdcd"));
        for bad in ["", "sonnette_", "sonnette_abababababababab_", "abababababababab_cd", &text.replace('c', "z")] {
            assert!(PresentedKey::parse(bad).is_none(), "{bad:?} is refused");
        }
    }
}
