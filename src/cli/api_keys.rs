//! `sonnette api-keys`: who may call what.

use std::collections::BTreeSet;

use anyhow::{Context, bail};

use crate::{
    cli::{Common, say},
    domain::{
        api_key::{ApiKey, ApiKeyId, PresentedKey, Scope},
        clock::Timestamp,
        secret::Secret,
        topic::Topic,
    },
};

/// API keys.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Makes a key and prints it, alone, on standard output: it is not shown again.
    Create {
        /// Whose key it is: a system, not a person. Idempotency keys belong to the owner.
        #[arg(long)]
        owner: String,
        /// What it may do, separated by commas: register, send, broadcast, read, metrics, admin.
        #[arg(long, value_delimiter = ',', required = true)]
        scopes: Vec<Scope>,
        /// The apps it is for, separated by commas; without it, all.
        #[arg(long, value_delimiter = ',')]
        topics: Option<Vec<Topic>>,
        /// From when it is refused, such as 2027-01-01T00:00:00Z.
        #[arg(long)]
        expires_at: Option<Timestamp>,
    },
    /// Lists the keys, newest first; secrets are not kept and not shown.
    List,
    /// Refuses a key from now on; running services notice within two seconds.
    Revoke {
        /// The part between the two underscores, or the whole key.
        id: String,
    },
}

/// The longest owner's name, in bytes.
const MAX_OWNER_BYTES: usize = 255;

/// Runs the command.
///
/// # Errors
/// What is in the way.
pub async fn run(common: &Common, command: &Command) -> anyhow::Result<()> {
    let store = common.store().await?;
    let now = common.clock().now();
    match command {
        Command::Create { owner, scopes, topics, expires_at } => {
            if owner.is_empty() || owner.len() > MAX_OWNER_BYTES {
                bail!("--owner must have 1 to {MAX_OWNER_BYTES} bytes");
            }
            if expires_at.is_some_and(|at| at <= now) {
                bail!("--expires-at is in the past: the key would never work");
            }
            let (presented, key) = make(owner, scopes.iter().copied(), topics.clone(), *expires_at, now);
            store.add_api_key(&key).await?;
            say(presented.reveal());
        }
        Command::List => {
            say("id                owner                 scopes                        topics                state");
            for key in store.api_keys().await? {
                let scopes: Vec<_> = key.scopes.iter().map(Scope::to_string).collect();
                let state = match (key.revoked_at, key.expires_at) {
                    (Some(at), _) => format!("revoked {at}"),
                    (None, Some(at)) if at <= now => format!("expired {at}"),
                    (None, Some(at)) => format!("until {at}"),
                    (None, None) => "active".to_owned(),
                };
                let topics = key.topics.as_ref().map_or_else(
                    || "all".to_owned(),
                    |topics| topics.iter().map(Topic::to_string).collect::<Vec<_>>().join(","),
                );
                let (id, owner, scopes) = (&key.id, &key.owner, scopes.join(","));
                say(format_args!("{id}  {owner:<20}  {scopes:<28}  {topics:<20}  {state}"));
            }
        }
        Command::Revoke { id } => {
            let id: ApiKeyId = match PresentedKey::parse(id) {
                Some(whole) => whole.id,
                None => id.parse().with_context(|| "see `sonnette api-keys list`")?,
            };
            if !store.revoke_api_key(&id, now).await? {
                bail!("no key has the id {id}: see `sonnette api-keys list`");
            }
            say(format_args!("{id} is refused from now on"));
        }
    }
    store.close().await;
    Ok(())
}

/// Makes a key: what is handed out, and what is kept.
#[must_use]
pub fn make(
    owner: &str,
    scopes: impl IntoIterator<Item = Scope>,
    topics: Option<Vec<Topic>>,
    expires_at: Option<Timestamp>,
    now: Timestamp,
) -> (PresentedKey, ApiKey) {
    let presented = PresentedKey::from_random(rand::random(), rand::random());
    let key = ApiKey {
        id: presented.id.clone(),
        hash: Secret::new(presented.hash()),
        owner: owner.to_owned(),
        scopes: scopes.into_iter().collect(),
        topics: topics.map(BTreeSet::from_iter),
        created_at: now,
        expires_at,
        revoked_at: None,
    };
    (presented, key)
}
