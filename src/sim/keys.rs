//! The provider keys the simulator knows, as Apple's developer portal would.
//!
//! Promises: only public keys are kept. Keys may come and change while connections are open; a provider token that a
//! connection has verified before is then verified anew.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use p256::{
    ecdsa::VerifyingKey,
    pkcs8::{DecodePrivateKey as _, DecodePublicKey as _},
};

use super::environment::Environment;
use crate::domain::secret::Secret;

/// What a key may send to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Topics {
    /// A team key: everything.
    All,
    /// A topic-specific key: these bundle ids, with any push type's suffix.
    Only(Vec<String>),
}

/// A provider key as it is registered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderKey {
    /// The `kid` of its tokens: Apple's are 10 characters.
    pub key_id: String,
    /// The `iss` of its tokens.
    pub team_id: String,
    /// The public key: PEM, `SubjectPublicKeyInfo`, P-256.
    pub public_key_pem: String,
    /// Where it may be used.
    #[serde(default = "both_environments")]
    pub environments: Vec<Environment>,
    /// What it may send to.
    #[serde(default = "all_topics")]
    pub topics: Topics,
    /// The one other key that may be used on the same connection.
    #[serde(default)]
    pub related_key_id: Option<String>,
}

fn both_environments() -> Vec<Environment> {
    Environment::ALL.to_vec()
}

const fn all_topics() -> Topics {
    Topics::All
}

/// What can go wrong with keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The text is no P-256 public key.
    #[error("the public key of `{key_id}` is no P-256 key in PEM (`-----BEGIN PUBLIC KEY-----`)")]
    NotAPublicKey {
        /// Whose.
        key_id: String,
    },
    /// The file is no provider key.
    #[error("`{}` is no provider key (PKCS#8, EC P-256, in PEM)", path.display())]
    NotAPrivateKey {
        /// Which file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("`{}` cannot be read", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `apps.toml` is not what it should be.
    #[error("`{}` is not understood", path.display())]
    Apps {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },
    /// Two entries contradict each other.
    #[error("key `{key_id}` stands in `{}` with two teams or two key files", path.display())]
    Contradiction {
        /// Which key.
        key_id: String,
        /// Which file.
        path: PathBuf,
    },
    /// No such key is registered.
    #[error("no key `{key_id}` is registered")]
    Unknown {
        /// Which key.
        key_id: String,
    },
}

/// A registered key, ready to verify.
#[derive(Debug)]
pub(super) struct KnownKey {
    pub(super) registered: ProviderKey,
    pub(super) verifying: VerifyingKey,
}

impl KnownKey {
    fn new(registered: ProviderKey) -> Result<Self, KeyError> {
        let verifying = VerifyingKey::from_public_key_pem(&registered.public_key_pem)
            .map_err(|_| KeyError::NotAPublicKey { key_id: registered.key_id.clone() })?;
        Ok(Self { registered, verifying })
    }

    /// Whether it may be used in `environment`.
    pub(super) fn serves(&self, environment: Environment) -> bool {
        self.registered.environments.contains(&environment)
    }

    /// Whether it may send to `topic`, suffix included.
    pub(super) fn allows(&self, topic: &str) -> bool {
        match &self.registered.topics {
            Topics::All => true,
            Topics::Only(list) => {
                let bundle = super::push_type::bundle_id(topic);
                list.iter().any(|allowed| allowed == bundle || allowed == topic)
            }
        }
    }

    /// Whether both may be used on one connection.
    pub(super) fn goes_with(&self, other: &Self, lenient: bool) -> bool {
        let is_kin = self.registered.team_id == other.registered.team_id
            && (&self.registered.topics, &other.registered.topics) == (&Topics::All, &Topics::All);
        let names = |a: &Self, b: &Self| a.registered.related_key_id.as_ref() == Some(&b.registered.key_id);
        (lenient && is_kin)
            || self.registered.key_id == other.registered.key_id
            || names(self, other)
            || names(other, self)
    }
}

/// The keys of one simulator. A clone is another handle on the same keys.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    known: RwLock<HashMap<String, Arc<KnownKey>>>,
    /// Grows with every change.
    generation: AtomicU64,
}

impl Keys {
    /// Registers a key, or replaces the one with the same key id.
    ///
    /// # Errors
    /// [`KeyError::NotAPublicKey`].
    pub fn register(&self, key: ProviderKey) -> Result<(), KeyError> {
        let known = Arc::new(KnownKey::new(key)?);
        self.change(|all| all.insert(known.registered.key_id.clone(), Arc::clone(&known)));
        Ok(())
    }

    /// Corrects the team of a registered key.
    ///
    /// # Errors
    /// [`KeyError::Unknown`].
    pub fn set_team(&self, key_id: &str, team_id: &str) -> Result<(), KeyError> {
        let unknown = || KeyError::Unknown { key_id: key_id.to_owned() };
        let mut key = self.find(key_id).ok_or_else(unknown)?.registered.clone();
        team_id.clone_into(&mut key.team_id);
        self.register(key)
    }

    /// Forgets a key, as if it had been revoked. Says whether it was there.
    #[must_use]
    pub fn remove(&self, key_id: &str) -> bool {
        self.change(|all| all.remove(key_id)).is_some()
    }

    /// All keys, by key id.
    #[must_use]
    pub fn list(&self) -> Vec<ProviderKey> {
        let known = self.shared.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = known.values().map(|key| key.registered.clone()).collect();
        all.sort_by(|a, b| a.key_id.cmp(&b.key_id));
        all
    }

    pub(super) fn find(&self, key_id: &str) -> Option<Arc<KnownKey>> {
        self.shared.known.read().unwrap_or_else(PoisonError::into_inner).get(key_id).cloned()
    }

    /// Which state of the keys this is; another number after every change.
    pub(super) fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<String, Arc<KnownKey>>) -> T) -> T {
        let mut known = self.shared.known.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut known);
        self.shared.generation.fetch_add(1, Ordering::Release);
        result
    }
}

/// `apps.toml`, as far as the simulator reads it: what else an entry says is the provider's business.
#[derive(serde::Deserialize)]
struct Apps {
    #[serde(default)]
    app: Vec<App>,
}

#[derive(serde::Deserialize)]
struct App {
    topic: String,
    team_id: String,
    key_id: String,
    key_file: PathBuf,
    #[serde(default = "both_environments")]
    environments: Vec<Environment>,
}

/// Reads every `[[app]]` of `<folder>/apps.toml`. Entries with the same key id become one key with all their topics
/// and environments.
///
/// # Errors
/// [`KeyError`] says which file and why.
pub fn read_folder(folder: &Path) -> Result<Vec<ProviderKey>, KeyError> {
    let path = folder.join("apps.toml");
    let text = fs::read_to_string(&path).map_err(|source| KeyError::File { path: path.clone(), source })?;
    let apps: Apps = toml::from_str(&text).map_err(|source| KeyError::Apps { path: path.clone(), source })?;
    let mut keys: Vec<ProviderKey> = Vec::new();
    for app in apps.app {
        let public_key_pem = public_half(&folder.join(&app.key_file))?;
        if let Some(key) = keys.iter_mut().find(|key| key.key_id == app.key_id) {
            if key.team_id != app.team_id || key.public_key_pem != public_key_pem {
                return Err(KeyError::Contradiction { key_id: app.key_id, path });
            }
            for environment in app.environments {
                if !key.environments.contains(&environment) {
                    key.environments.push(environment);
                }
            }
            match &mut key.topics {
                Topics::Only(topics) if !topics.contains(&app.topic) => topics.push(app.topic),
                Topics::Only(_) | Topics::All => {}
            }
        } else {
            keys.push(ProviderKey {
                key_id: app.key_id,
                team_id: app.team_id,
                public_key_pem,
                environments: app.environments,
                topics: Topics::Only(vec![app.topic]),
                related_key_id: None,
            });
        }
    }
    Ok(keys)
}

/// The public key of a `.p8` file.
fn public_half(path: &Path) -> Result<String, KeyError> {
    use p256::pkcs8::EncodePublicKey as _;
    let refused = || KeyError::NotAPrivateKey { path: path.to_owned() };
    let pem = fs::read_to_string(path).map_err(|source| KeyError::File { path: path.to_owned(), source })?;
    let pem = Secret::new(pem);
    let private = p256::SecretKey::from_pkcs8_pem(pem.expose().trim()).map_err(|_| refused())?;
    private.public_key().to_public_key_pem(p256::pkcs8::LineEnding::LF).map_err(|_| refused())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Made with `openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt` for these tests only.
    pub(in crate::sim) const PRIVATE_PEM: &str = "-----BEGIN PRIVATE KEY-----\n\
        MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgKsYZ7uqeTm+Ec0U7\n\
        E8L3mdKxIUBVj6LUAdXVrhLxVeWhRANCAASAY8IsweogxbTDWmTBzHErfK19pwAy\n\
        PIU+fqU2PJBvOMRXPgFxKRqaNhIYxtvTZElnZwZ07TvRGmPEFnJ3mey6\n\
        -----END PRIVATE KEY-----\n";
    /// Its public half, by `openssl pkey -pubout`.
    pub(in crate::sim) const PUBLIC_PEM: &str = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEgGPCLMHqIMW0w1pkwcxxK3ytfacA\n\
        MjyFPn6lNjyQbzjEVz4BcSkamjYSGMbb02RJZ2cGdO070RpjxBZyd5nsug==\n\
        -----END PUBLIC KEY-----\n";

    fn folder(apps: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("sonnette-keys-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("apps.toml"), apps).unwrap();
        fs::write(folder.join("one.p8"), PRIVATE_PEM).unwrap();
        folder
    }

    #[test]
    fn entries_of_one_key_become_one_key_with_all_topics() {
        let folder = folder(
            "[[app]]\ntopic = 'a.b'\nteam_id = 'T'\nkey_id = 'K'\nkey_file = 'one.p8'\nenvironments = ['production']\nidentity = 'required'\n\
             [[app]]\ntopic = 'a.c'\nteam_id = 'T'\nkey_id = 'K'\nkey_file = 'one.p8'\nenvironments = ['development']\n",
        );
        let keys = read_folder(&folder).unwrap();
        assert_eq!(keys.len(), 1);
        assert_eq!(keys[0].topics, Topics::Only(vec!["a.b".to_owned(), "a.c".to_owned()]));
        assert_eq!(keys[0].environments, [Environment::Production, Environment::Sandbox]);
        assert_eq!(keys[0].public_key_pem.trim(), PUBLIC_PEM.trim());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn one_key_with_two_teams_is_refused() {
        let folder = folder(
            "[[app]]\ntopic = 'a.b'\nteam_id = 'T'\nkey_id = 'K'\nkey_file = 'one.p8'\n\
             [[app]]\ntopic = 'a.c'\nteam_id = 'U'\nkey_id = 'K'\nkey_file = 'one.p8'\n",
        );
        assert!(matches!(read_folder(&folder), Err(KeyError::Contradiction { .. })));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_topic_specific_key_allows_its_bundle_ids_with_any_suffix() {
        let key = KnownKey::new(ProviderKey {
            key_id: "K".to_owned(),
            team_id: "T".to_owned(),
            public_key_pem: PUBLIC_PEM.to_owned(),
            environments: vec![Environment::Sandbox],
            topics: Topics::Only(vec!["a.b".to_owned()]),
            related_key_id: None,
        })
        .unwrap();
        assert!(key.allows("a.b") && key.allows("a.b.voip"));
        assert!(!key.allows("a.bc") && !key.allows("a"));
        assert!(key.serves(Environment::Sandbox) && !key.serves(Environment::Production));
    }
}
