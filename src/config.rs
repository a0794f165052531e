//! File and environment to checked settings. Nothing else reads the environment.
//!
//! Promises: the file, then `DATABASE_URL`, then `SONNETTE_<SECTION>__<KEY>` (and `…__<KEY>_FILE` for secrets), later
//! wins. Paths are relative to the file they stand in. Unknown keys are errors that name the key; no error shows a
//! value that may be secret. `config.example.toml` holds every key with its default; a test compares.

use std::{
    collections::BTreeMap,
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    domain::{
        secret::Secret,
        topic::{Environment, Topic},
    },
    store::{self, address},
};

/// What is wrong with the configuration, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("{path} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file or variable does not say what it should.
    #[error("{place}: {what}")]
    Wrong {
        /// A file and line, or a variable.
        place: String,
        /// What is wrong and what to do.
        what: String,
    },
}

fn wrong(place: impl Into<String>, what: impl Into<String>) -> ConfigError {
    ConfigError::Wrong { place: place.into(), what: what.into() }
}

/// Where the configuration is looked for when `--config` names no file.
pub const PLACES: [&str; 2] = ["sonnette.toml", "/etc/sonnette/sonnette.toml"];

/// Everything that can be configured.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Listeners.
    pub server: Server,
    /// The database.
    pub database: Database,
    /// APNs.
    pub apns: Apns,
    /// How long things are kept.
    pub retention: Retention,
    /// Logs.
    pub log: Log,
    /// Apps, here or in the keys folder's apps.toml.
    #[serde(rename = "app")]
    pub apps: Vec<App>,
}

/// `[server]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address of the API.
    pub listen: String,
    /// Address of a listener for a private network: health details, metrics and admin without a key.
    pub ops_listen: Option<String>,
    /// How long what is in flight may take to end at shutdown.
    pub shutdown_grace_seconds: u64,
    /// Connections at once.
    pub max_connections: usize,
    /// A certificate of our own.
    pub tls: Option<ServerTls>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            ops_listen: None,
            shutdown_grace_seconds: 30,
            max_connections: 4_096,
            tls: None,
        }
    }
}

/// `[server.tls]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// PEM, the chain.
    pub cert: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// `[database]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `sqlite://path` or `mysql://user:password@host/db?…`
    pub url: Secret<String>,
    /// Whether `serve` applies migrations at start.
    pub migrate: bool,
    /// The most connections to MySQL.
    pub max_connections: u32,
    /// How long a request waits for a connection.
    pub acquire_timeout_ms: u64,
    /// A statement that takes longer is logged; 0 in the file: none is.
    #[serde(deserialize_with = "zero_is_none")]
    pub slow_statement_ms: Option<NonZeroU64>,
}

fn zero_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU64>, D::Error> {
    u64::deserialize(deserializer).map(NonZeroU64::new)
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: Secret::new("sqlite://sonnette.db".into()),
            migrate: true,
            max_connections: 16,
            acquire_timeout_ms: 3_000,
            slow_statement_ms: NonZeroU64::new(1_000),
        }
    }
}

/// `[apns]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Apns {
    /// A folder with apps.toml and the .p8 files.
    pub keys: PathBuf,
    /// The production address.
    pub production: String,
    /// The sandbox address.
    pub sandbox: String,
    /// An extra root of trust, PEM: a simulator, an inspecting proxy.
    pub ca_file: Option<PathBuf>,
    /// After this a push that was written counts as unanswered.
    pub request_timeout_seconds: u64,
    /// The most connections for each key and environment, of all replicas together; each has at least one.
    pub max_connections: usize,
}

impl Default for Apns {
    fn default() -> Self {
        Self {
            keys: "keys".into(),
            production: "https://api.push.apple.com".into(),
            sandbox: "https://api.sandbox.push.apple.com".into(),
            ca_file: None,
            request_timeout_seconds: 20,
            max_connections: 4,
        }
    }
}

/// `[retention]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Notifications and their outcomes, from their end.
    pub notifications_days: Days,
    /// Payloads, from their notification's end.
    pub payloads_days: Days,
    /// Devices that are inactive or suspended and do not register.
    pub inactive_devices_days: Days,
    /// API keys, from their revocation or expiry.
    pub api_keys_days: Days,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            notifications_days: Days(Some(30)),
            payloads_days: Days(Some(7)),
            inactive_devices_days: Days(Some(90)),
            api_keys_days: Days(Some(90)),
        }
    }
}

/// For how long something is kept: 1 to [`Days::MOST`] days, or for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Days(Option<u32>);

impl Days {
    /// A hundred years.
    pub const MOST: u32 = 36_500;

    /// As a duration; `None`: for ever.
    #[must_use]
    pub fn duration(self) -> Option<Duration> {
        self.0.map(|days| Duration::from_secs(u64::from(days) * 24 * 3600))
    }
}

impl<'de> Deserialize<'de> for Days {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = Days;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a number of days from 1 to {}, or \"never\" to keep it for ever", Days::MOST)
            }

            fn visit_i64<E: serde::de::Error>(self, days: i64) -> Result<Days, E> {
                let days_in_bounds = u32::try_from(days).ok().filter(|days| (1..=Days::MOST).contains(days));
                match days_in_bounds {
                    Some(days) => Ok(Days(Some(days))),
                    None => Err(E::invalid_value(serde::de::Unexpected::Signed(days), &self)),
                }
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Days, E> {
                match word {
                    "never" => Ok(Days(None)),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// `[log]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `info`, `debug`, or directives such as `info,sonnette::dispatch=debug`.
    pub level: String,
    /// One JSON object a line instead of text.
    pub json: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), json: false }
    }
}

/// Whether binding a user needs an identity token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// A key that may only register must prove the user.
    #[default]
    Required,
    /// It need not.
    Optional,
}

/// `[[app]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// Bundle id.
    pub topic: Topic,
    /// 10 characters.
    pub team_id: String,
    /// 10 characters.
    pub key_id: String,
    /// The .p8 file.
    pub key_file: PathBuf,
    /// Which environments the key serves.
    #[serde(default = "both_environments")]
    pub environments: Vec<Environment>,
    /// The most pushes a second, from all replicas together; of two entries for a topic the lower counts.
    #[serde(default)]
    pub max_pushes_per_second: Option<NonZeroU32>,
    /// Whether binding a user needs an identity token.
    #[serde(default)]
    pub identity: Identity,
    /// Public keys whose identity tokens are believed, by `kid`.
    #[serde(default)]
    pub identity_keys: Vec<IdentityKey>,
}

fn both_environments() -> Vec<Environment> {
    Environment::ALL.to_vec()
}

/// `[[app.identity_keys]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityKey {
    /// The `kid` of tokens signed with it.
    pub kid: String,
    /// A P-256 public key, PEM.
    pub public_key_file: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppsFile {
    #[serde(default, rename = "app")]
    apps: Vec<App>,
}

/// The environment as the process was given it.
#[must_use]
pub fn process_environment() -> BTreeMap<String, String> {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    let variables = std::env::vars().collect();
    variables
}

impl Config {
    /// Reads the file that `named` names, else the first of [`PLACES`] that exists, else the defaults; then the
    /// environment; then the keys folder's apps.toml.
    ///
    /// # Errors
    /// What is wrong, where, and what to do.
    pub fn load(named: Option<&Path>, environment: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let file = match named {
            Some(path) => Some(path.to_path_buf()),
            None => PLACES.iter().map(PathBuf::from).find(|path| path.exists()),
        };
        let (mut table, folder) = match &file {
            Some(path) => (read_table(path)?, path.parent().unwrap_or(Path::new("")).to_path_buf()),
            None => (toml::Table::new(), PathBuf::new()),
        };
        overlay(&mut table, environment)?;
        let place = file.as_ref().map_or_else(|| "the environment".to_owned(), |p| p.display().to_string());
        let mut config: Self =
            toml::Value::Table(table).try_into().map_err(|error: toml::de::Error| wrong(&place, with_key(&error)))?;
        config.anchor(&folder);
        config.read_apps()?;
        config.check(&place)?;
        Ok(config)
    }

    /// Makes paths relative to the file absolute or relative to where we stand.
    fn anchor(&mut self, folder: &Path) {
        let at = |path: &mut PathBuf| *path = folder.join(&*path);
        at(&mut self.apns.keys);
        if let Some(path) = &mut self.apns.ca_file {
            at(path);
        }
        if let Some(tls) = &mut self.server.tls {
            at(&mut tls.cert);
            at(&mut tls.key);
        }
        anchor_apps(&mut self.apps, folder);
        self.database.url = Secret::new(address::anchored(self.database.url.expose(), folder));
    }

    /// Adds the apps of the keys folder's apps.toml, if there is one.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn read_apps(&mut self) -> Result<(), ConfigError> {
        let path = self.apns.keys.join("apps.toml");
        if !path.exists() {
            return Ok(());
        }
        let place = path.display().to_string();
        let mut file: AppsFile = toml::Value::Table(read_table(&path)?)
            .try_into()
            .map_err(|error: toml::de::Error| wrong(&place, with_key(&error)))?;
        anchor_apps(&mut file.apps, &self.apns.keys);
        self.apps.append(&mut file.apps);
        Ok(())
    }

    fn check(&self, place: &str) -> Result<(), ConfigError> {
        self.check_database(place)?;
        for (index, app) in self.apps.iter().enumerate() {
            for environment in &app.environments {
                let twin = self
                    .apps
                    .iter()
                    .take(index)
                    .find(|other| other.topic == app.topic && other.environments.contains(environment));
                if let Some(twin) = twin
                    && twin.key_id == app.key_id
                {
                    return Err(wrong(
                        place,
                        format!("`{}` in {environment} is listed twice with key `{}`: keep one", app.topic, app.key_id),
                    ));
                }
            }
            if app.environments.is_empty() {
                return Err(wrong(
                    place,
                    format!("`{}` has no environments: name production, sandbox or both", app.topic),
                ));
            }
        }
        Ok(())
    }

    fn check_database(&self, place: &str) -> Result<(), ConfigError> {
        let Database { max_connections, acquire_timeout_ms, .. } = &self.database;
        if !(2..=10_000).contains(max_connections) {
            return Err(wrong(place, "`database.max_connections` is from 2 to 10000: pushes and requests share them"));
        }
        let longest = store::Settings::LONGEST_ACQUIRE.as_millis();
        if *acquire_timeout_ms < 100 || u128::from(*acquire_timeout_ms) > longest {
            return Err(wrong(place, format!("`database.acquire_timeout_ms` is from 100 to {longest}")));
        }
        Ok(())
    }

    /// Files with secrets that others on this machine can read: a warning each.
    #[must_use]
    pub fn readable_secrets(&self) -> Vec<String> {
        let mut files: Vec<&Path> = self.apps.iter().map(|app| app.key_file.as_path()).collect();
        if let Some(tls) = &self.server.tls {
            files.push(&tls.key);
        }
        let database_key = address::private_key(self.database.url.expose());
        files.extend(database_key.as_deref());
        files.sort_unstable();
        files.dedup();
        files
            .into_iter()
            .filter(|path| readable_by_everybody(path))
            .map(|path| format!("{} can be read by everybody on this machine: chmod 600 it", path.display()))
            .collect()
    }
}

#[cfg(unix)]
fn readable_by_everybody(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0)
}

#[cfg(not(unix))]
fn readable_by_everybody(_: &Path) -> bool {
    false
}

fn anchor_apps(apps: &mut [App], folder: &Path) {
    for app in apps {
        app.key_file = folder.join(&app.key_file);
        for key in &mut app.identity_keys {
            key.public_key_file = folder.join(&key.public_key_file);
        }
    }
}

/// What is wrong with a value, and in which key. The text of the file, which may hold a password, is not at hand.
fn with_key(error: &toml::de::Error) -> String {
    error.to_string().trim_end().replace('\n', " ")
}

fn read_table(path: &Path) -> Result<toml::Table, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    text.parse().map_err(|error: toml::de::Error| {
        // Not `Display`: that repeats the line, which may hold a password.
        let line =
            error.span().and_then(|span| text.get(..span.start)).map_or(1, |before| before.matches('\n').count() + 1);
        wrong(format!("{}:{line}", path.display()), error.message())
    })
}

const PREFIX: &str = "SONNETTE_";
const FILE_SUFFIX: &str = "_FILE";

/// Lays `DATABASE_URL` and `SONNETTE_<SECTION>__<KEY>` over what the file said.
fn overlay(table: &mut toml::Table, environment: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    if let Some(url) = environment.get("DATABASE_URL") {
        set(table, "DATABASE_URL", &["database", "url"], toml::Value::String(url.clone()))?;
    }
    for (name, value) in environment {
        let Some(path) = name.strip_prefix(PREFIX) else { continue };
        if !path.contains("__") {
            // Such as SONNETTE_API_KEY for `sonnette send`: not configuration.
            continue;
        }
        // `apns.ca_file` is a key of its own and names a file anyway.
        let (path, value) = match path.strip_suffix(FILE_SUFFIX).filter(|p| !p.ends_with("__CA")) {
            Some(path) => {
                let text = std::fs::read_to_string(value)
                    .map_err(|source| ConfigError::Read { path: value.into(), source })?;
                (path, toml::Value::String(text.trim_end().to_owned()))
            }
            None => (path, scalar(value)),
        };
        let path = path.to_ascii_lowercase();
        let keys: Vec<&str> = path.split("__").collect();
        set(table, name, &keys, value)?;
    }
    Ok(())
}

/// Numbers and booleans as such, lists in brackets as lists, everything else as text.
fn scalar(value: &str) -> toml::Value {
    if let Ok(number) = value.parse::<i64>() {
        return toml::Value::Integer(number);
    }
    match value {
        "true" => toml::Value::Boolean(true),
        "false" => toml::Value::Boolean(false),
        _ => toml::Value::String(value.to_owned()),
    }
}

fn set(table: &mut toml::Table, variable: &str, keys: &[&str], value: toml::Value) -> Result<(), ConfigError> {
    let Some((last, sections)) = keys.split_last() else { return Ok(()) };
    let mut at = table;
    for section in sections {
        at = at
            .entry(*section)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| wrong(variable, format!("`{section}` is not a section of the configuration")))?;
    }
    at.insert((*last).to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn folder(files: &[(&str, &str)]) -> tempfolder::Folder {
        let folder = tempfolder::Folder::new();
        for (name, text) in files {
            let path = folder.0.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    mod tempfolder {
        pub(super) struct Folder(pub(super) std::path::PathBuf);

        impl Folder {
            pub(super) fn new() -> Self {
                let path = std::env::temp_dir().join(format!("sonnette-config-{}", uuid::Uuid::new_v4()));
                std::fs::create_dir_all(&path).unwrap();
                Self(path)
            }
        }

        impl Drop for Folder {
            fn drop(&mut self) {
                _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    #[test]
    fn later_wins_file_then_database_url_then_variables() {
        let folder = folder(&[("s.toml", "[database]\nurl = \"sqlite://a.db\"\n[server]\nlisten = \"0.0.0.0:1\"\n")]);
        let file = folder.0.join("s.toml");
        let plain = Config::load(Some(&file), &environment(&[])).unwrap();
        assert_eq!(*plain.database.url.expose(), format!("sqlite://{}", folder.0.join("a.db").display()));
        let url = environment(&[("DATABASE_URL", "mysql://x")]);
        assert_eq!(Config::load(Some(&file), &url).unwrap().database.url.expose(), "mysql://x");
        let both = environment(&[
            ("DATABASE_URL", "mysql://x"),
            ("SONNETTE_DATABASE__URL", "mysql://y"),
            ("SONNETTE_SERVER__SHUTDOWN_GRACE_SECONDS", "7"),
            ("SONNETTE_API_KEY", "not configuration"),
        ]);
        let config = Config::load(Some(&file), &both).unwrap();
        assert_eq!(config.database.url.expose(), "mysql://y");
        assert_eq!((config.server.shutdown_grace_seconds, config.server.listen.as_str()), (7, "0.0.0.0:1"));
    }

    #[test]
    fn a_secret_may_come_from_a_file() {
        let folder = folder(&[("secret", "mysql://u:p@h/d\n")]);
        let path = folder.0.join("secret");
        let variables = environment(&[("SONNETTE_DATABASE__URL_FILE", path.to_str().unwrap())]);
        assert_eq!(Config::load(None, &variables).unwrap().database.url.expose(), "mysql://u:p@h/d");
    }

    #[test]
    fn unknown_keys_are_named_and_no_error_shows_a_password() {
        let folder = folder(&[
            ("a.toml", "[database]\nurl = \"mysql://u:hunter2@h/d\"\nulr = 1\n"),
            ("b.toml", "[database]\nurl = \"mysql://u:hunter2@h/d\n"),
        ]);
        let error = |name| Config::load(Some(&folder.0.join(name)), &environment(&[])).unwrap_err().to_string();
        assert!(error("a.toml").contains("ulr"), "{}", error("a.toml"));
        assert!(error("b.toml").contains("b.toml:2"), "{}", error("b.toml"));
        assert!(!error("a.toml").contains("hunter2") && !error("b.toml").contains("hunter2"));
    }

    #[test]
    fn how_long_things_are_kept_is_a_number_of_days_or_never_and_the_error_names_the_key() {
        let read = |value: &str| {
            Config::load(None, &environment(&[("SONNETTE_RETENTION__PAYLOADS_DAYS", value)]))
                .map(|config| config.retention.payloads_days.duration())
                .map_err(|error| error.to_string())
        };
        assert_eq!(read("1"), Ok(Some(Duration::from_secs(86_400))));
        assert_eq!(read("36500").map(|kept| kept.is_some()), Ok(true));
        assert_eq!(read("never"), Ok(None));
        for bad in ["0", "-1", "36501", "forever", "true", "1.5"] {
            let error = read(bad).unwrap_err();
            assert!(error.contains("retention.payloads_days") && error.contains("1 to 36500, or \"never\""), "{error}");
        }
    }

    #[test]
    fn limits_of_the_database_are_named_with_their_bounds() {
        let read = |key: &str, value: &str| {
            Config::load(None, &environment(&[(&format!("SONNETTE_DATABASE__{key}"), value)]))
                .map(|config| config.database.slow_statement_ms)
                .map_err(|error| error.to_string())
        };
        for (key, value, bounds) in [
            ("MAX_CONNECTIONS", "1", "database.max_connections` is from 2"),
            ("ACQUIRE_TIMEOUT_MS", "99", "database.acquire_timeout_ms` is from 100 to 5000"),
            ("ACQUIRE_TIMEOUT_MS", "5001", "database.acquire_timeout_ms` is from 100 to 5000"),
        ] {
            assert!(read(key, value).unwrap_err().contains(bounds), "{key} {value}");
        }
        assert_eq!(read("SLOW_STATEMENT_MS", "0"), Ok(None));
        assert_eq!(read("SLOW_STATEMENT_MS", "250"), Ok(NonZeroU64::new(250)));
    }

    #[test]
    fn the_example_holds_every_key_with_its_default() {
        let text = include_str!("../config.example.toml");
        let example: Config = toml::from_str(text).unwrap();
        let default = Config::default();
        assert_eq!(format!("{example:?}"), format!("{default:?}"));
        assert_eq!(example.database.url.expose(), default.database.url.expose());
        // Those that have no default are shown behind a `#`.
        let shown = format!("{default:?}");
        let keys = shown.split(&[' ', '{', ',']).filter_map(|word| word.strip_suffix(':'));
        for key in keys.filter(|key| *key != "apps") {
            let there = text.lines().any(|l| {
                let line = l.trim_start_matches('#').trim_start();
                line.starts_with(&format!("{key} ="))
                    || line.starts_with(&format!("[{key}]"))
                    || line.contains(&format!(".{key}]"))
            });
            assert!(there, "config.example.toml does not show `{key}`");
        }
    }

    #[test]
    fn the_template_of_the_keys_folder_can_be_read() {
        let apps: AppsFile = toml::from_str(include_str!("../keys.example/apps.toml")).unwrap();
        assert_eq!(apps.apps.len(), 1);
    }

    #[test]
    fn apps_are_read_from_the_keys_folder_with_paths_relative_to_it() {
        let app =
            "[[app]]\ntopic = \"fr.a.b\"\nteam_id = \"ABCDE12345\"\nkey_id = \"ABC123DEFG\"\nkey_file = \"k.p8\"\n";
        let folder = folder(&[("s.toml", ""), ("keys/apps.toml", app)]);
        let config = Config::load(Some(&folder.0.join("s.toml")), &environment(&[])).unwrap();
        assert_eq!(config.apps.len(), 1);
        assert_eq!(config.apps[0].key_file, folder.0.join("keys/k.p8"));
        assert_eq!((config.apps[0].environments.len(), config.apps[0].identity), (2, Identity::Required));
    }
}
