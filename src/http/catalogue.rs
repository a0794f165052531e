//! Which apps this service pushes to, as far as the API must know.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use jsonwebtoken::DecodingKey;
use p256::{PublicKey, pkcs8::DecodePublicKey};

use crate::domain::{
    push::PushType,
    topic::{Environment, Topic},
};

/// The `kid` of identity tokens that Sonnette mints itself.
pub const OWN_KEY_ID: &str = "sonnette";

/// Whether an app's key must prove who holds the phone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// A `user_id` needs an `identity_token`.
    Required,
    /// Whoever has a `register` key may name any user.
    Optional,
}

/// A public key that signs identity tokens of an app.
#[derive(Debug, Clone)]
pub struct IdentityKey {
    /// Its name in the header of a token.
    pub kid: String,
    /// P-256, as `-----BEGIN PUBLIC KEY-----`.
    pub pem: String,
}

/// An app as it is configured.
#[derive(Debug, Clone)]
pub struct App {
    /// Where it has a key.
    pub environments: BTreeSet<Environment>,
    /// Whether a `user_id` needs proof.
    pub identity: Identity,
    /// Whose tokens are believed, beside those of Sonnette itself.
    pub identity_keys: Vec<IdentityKey>,
}

/// An identity key that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("identity key `{kid}` of app `{topic}`: {what}")]
pub struct BadIdentityKey {
    /// Which app.
    pub topic: Topic,
    /// Which key.
    pub kid: String,
    /// What is wrong with it.
    pub what: &'static str,
}

/// All configured apps, their keys read. Made once, when the service starts.
#[derive(Debug, Default)]
pub struct Catalogue {
    apps: BTreeMap<Topic, Known>,
}

pub(super) struct Known {
    pub(super) environments: BTreeSet<Environment>,
    pub(super) identity: Identity,
    keys: BTreeMap<String, DecodingKey>,
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known")
            .field("environments", &self.environments)
            .field("identity", &self.identity)
            .field("keys", &self.keys.keys())
            .finish()
    }
}

impl Known {
    /// The configured key of this name.
    pub(super) fn key(&self, kid: &str) -> Option<&DecodingKey> {
        self.keys.get(kid)
    }
}

impl Catalogue {
    /// Reads the apps. One that is listed twice, for two environments, becomes one with both.
    ///
    /// # Errors
    /// If a key is no P-256 public key, has a name that is taken, or the name of Sonnette's own.
    pub fn new(apps: impl IntoIterator<Item = (Topic, App)>) -> Result<Self, BadIdentityKey> {
        let mut known: BTreeMap<Topic, Known> = BTreeMap::new();
        for (topic, app) in apps {
            let entry = known.entry(topic.clone()).or_insert_with(|| Known {
                environments: BTreeSet::new(),
                identity: app.identity,
                keys: BTreeMap::new(),
            });
            entry.environments.extend(app.environments);
            // Where two tables of one app disagree, the stricter one counts.
            if app.identity == Identity::Required {
                entry.identity = Identity::Required;
            }
            for key in app.identity_keys {
                let bad = |what| BadIdentityKey { topic: topic.clone(), kid: key.kid.clone(), what };
                if key.kid == OWN_KEY_ID {
                    return Err(bad("this name is kept for the tokens that Sonnette mints: choose another `kid`"));
                }
                let public = PublicKey::from_public_key_pem(&key.pem)
                    .map_err(|_| bad("not a P-256 public key in PEM (`-----BEGIN PUBLIC KEY-----`)"))?;
                let bytes = public.to_sec1_bytes();
                let decoding = DecodingKey::from_ec_der(&bytes);
                let same = entry
                    .keys
                    .get(&key.kid)
                    .is_some_and(|other| other.try_get_as_bytes().ok().is_some_and(|other| *other == *bytes));
                if !same && entry.keys.insert(key.kid.clone(), decoding).is_some() {
                    return Err(bad("two keys have this name"));
                }
            }
        }
        Ok(Self { apps: known })
    }

    pub(super) fn app(&self, topic: &Topic) -> Option<&Known> {
        self.apps.get(topic)
    }

    /// What to tell somebody who named an app that is not configured. `whole` names those that are.
    pub(super) fn unknown(&self, topic: &Topic, whole: bool) -> String {
        let bundle = PushType::ALL
            .iter()
            .filter_map(|push_type| {
                let suffix = Some(push_type.topic_suffix()).filter(|suffix| !suffix.is_empty())?;
                let bundle: Topic = topic.as_str().strip_suffix(suffix)?.parse().ok()?;
                self.apps.contains_key(&bundle).then_some((bundle, suffix, *push_type))
            })
            .next();
        if let Some((bundle, suffix, push_type)) = bundle.filter(|_| whole) {
            return format!(
                "`topic` is always the app's bundle id: write `{bundle}` and `push_type` `{push_type}`; `{suffix}` is added for you."
            );
        }
        if !whole {
            return "This app is not configured here.".to_owned();
        }
        let named: Vec<String> = self.apps.keys().take(20).map(|topic| format!("`{topic}`")).collect();
        if named.is_empty() {
            "No app is configured here yet: see keys/apps.toml.".to_owned()
        } else {
            format!("This app is not configured here; these are: {}.", named.join(", "))
        }
    }
}
