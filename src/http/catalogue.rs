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
    /// Enters an app, with the public keys whose identity tokens are believed: their `kid`, and P-256 in PEM. An app
    /// that is entered twice, for two environments, has both; where the two disagree, the stricter one counts.
    ///
    /// # Errors
    /// If a key is no P-256 public key, has a name that is taken, or the name of Sonnette's own.
    pub fn add(
        &mut self,
        topic: &Topic,
        environments: &[Environment],
        identity_required: bool,
        keys: &[(String, String)],
    ) -> Result<(), String> {
        let known = self.apps.entry(topic.clone()).or_insert_with(|| Known {
            environments: BTreeSet::new(),
            identity: Identity::Optional,
            keys: BTreeMap::new(),
        });
        known.environments.extend(environments);
        if identity_required {
            known.identity = Identity::Required;
        }
        for (kid, pem) in keys {
            let bad = |what| Err(format!("the identity key `{kid}` of `{topic}` cannot be used: {what}"));
            if kid == OWN_KEY_ID {
                return bad("this name is kept for the tokens that Sonnette mints; choose another `kid`");
            }
            let Ok(public) = PublicKey::from_public_key_pem(pem) else {
                return bad("it is not a P-256 public key in PEM (`-----BEGIN PUBLIC KEY-----`)");
            };
            let bytes = public.to_sec1_bytes();
            let same = |other: &DecodingKey| other.try_get_as_bytes().is_ok_and(|other| *other == *bytes);
            match known.keys.get(kid) {
                Some(other) if same(other) => {}
                Some(_) => return bad("another key has this name"),
                None => {
                    known.keys.insert(kid.clone(), DecodingKey::from_ec_der(&bytes));
                }
            }
        }
        Ok(())
    }

    pub(super) fn app(&self, topic: &Topic) -> Option<&Known> {
        self.apps.get(topic)
    }

    /// What to tell somebody who named an app that is not configured. `whole` names those that are.
    pub(super) fn unknown(&self, topic: &Topic, whole: bool) -> String {
        let bundle = PushType::ALL.iter().find_map(|push_type| {
            let suffix = Some(push_type.topic_suffix()).filter(|suffix| !suffix.is_empty())?;
            let bundle: Topic = topic.as_str().strip_suffix(suffix)?.parse().ok()?;
            self.apps.contains_key(&bundle).then_some((bundle, suffix, *push_type))
        });
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
