//! The wiring, and the only file that names every room: configuration, built, started, stopped.
//!
//! Promises: what cannot work is said before anything is started; a started service is stopped in the order in which
//! nothing is lost: readiness off, nothing new accepted, nothing new claimed or written, what is in flight answered and
//! settled, the rest given back, connections closed.

use std::{collections::BTreeMap, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio_util::task::TaskTracker;

use crate::{
    apns::{
        Gateway, RouteReport,
        client::{self, ApnsGateway, BuildError, Endpoint},
        credential::{Credential, KeyError},
    },
    config::{self, Config, ConfigError},
    dispatch::{self, Dispatcher},
    domain::{
        clock::{Clock, SharedClock},
        secret::Secret,
    },
    http::{self, listener::Listener},
    lifecycle::Tasks,
    ops::{
        self, Health,
        keeper::{self, Keeper},
    },
    store::{
        self, Role, Store, StoreError,
        intake::{self, Identity, Intake},
    },
    telemetry,
};

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The database.
    #[error("the database cannot be used")]
    Store(#[from] StoreError),
    /// The schema lacks migrations, and `database.migrate` is off.
    #[error("the schema lacks {0} migration(s): run `sonnette migrate`, or set `database.migrate = true`")]
    Behind(usize),
    /// The system.
    #[error("no threads could be started")]
    Threads(#[source] std::io::Error),
    /// A provider key.
    #[error("the key of `{topic}`, {file}, cannot be used")]
    Key {
        /// Which app.
        topic: String,
        /// Which file.
        file: PathBuf,
        /// Why.
        source: KeyError,
    },
    /// `team_id` or `key_id`.
    #[error("the app `{topic}` in apps.toml: {what}")]
    App {
        /// Which app.
        topic: String,
        /// What is wrong.
        what: String,
    },
    /// A file.
    #[error("{file} cannot be read")]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The way to APNs.
    #[error("[apns]")]
    Gateway(#[from] BuildError),
    /// An identity key.
    #[error("{0}")]
    Identity(String),
    /// The certificate of the listener.
    #[error("[server.tls]: {0}")]
    Tls(String),
    /// An address is taken.
    #[error("{key} = \"{address}\" cannot be listened on: stop what is there, or choose another port")]
    Listen {
        /// Which key of the configuration.
        key: &'static str,
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// How this run differs from the configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Hold whatever is open.
    pub hold: bool,
    /// Go by the database's clock where it has one, so that all replicas have the same.
    pub database_time: bool,
}

/// A running service.
pub struct App {
    tasks: Tasks,
    store: Arc<dyn Store>,
    gateway: Arc<ApnsGateway>,
    dispatcher: Dispatcher,
    address: SocketAddr,
    ops_address: Option<SocketAddr>,
    clock: Arc<dyn Clock>,
}

/// The store's part of the configuration.
#[must_use]
pub fn store_settings(config: &Config) -> store::Settings {
    store::Settings {
        url: config.database.url.clone(),
        max_connections: config.database.max_connections,
        acquire_timeout: Duration::from_millis(config.database.acquire_timeout_ms),
        slow_statement: config.database.slow_statement_ms.map(|ms| Duration::from_millis(ms.get())),
    }
}

impl App {
    /// Builds everything, then starts it. When this returns, requests are accepted.
    ///
    /// # Errors
    /// What is in the way; nothing is left running then.
    pub async fn start(config: &Config, clock: Arc<dyn Clock>, options: Options) -> Result<Self, AppError> {
        // Built, without effects.
        let tasks = Tasks::with_background().map_err(AppError::Threads)?;
        let apps = credentials(config)?;
        let way = apns_settings(config)?;
        let catalogue = Arc::new(catalogue(config)?);
        let tls = match &config.server.tls {
            Some(files) => Some(http::tls::acceptor(&read(&files.cert)?, &read(&files.key)?).map_err(AppError::Tls)?),
            None => None,
        };
        let max = config.server.max_connections;
        let listener = listen("server.listen", &config.server.listen, max, tls).await?;
        let ops_listener = match &config.server.ops_listen {
            Some(address) => Some(listen("server.ops_listen", address, max, None).await?),
            None => None,
        };
        let shared = Arc::new(SharedClock::new(clock));
        let clock = Arc::clone(&shared) as Arc<dyn Clock>;
        let store = open_store(config, &clock).await?;
        if options.database_time {
            ops::clock::agree(&*store, &shared).await?;
        }
        if options.hold {
            let held = store.hold(clock.now()).await?;
            tracing::warn!(chunks = held, "--hold: what was open is held until it is released");
        }
        let warnings = config.readable_secrets();
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        // Before any push is counted: whoever counts remembers with which recorder.
        let metrics = telemetry::prometheus();
        // Started.
        // Connections live on their own tracker: an idle one must not keep a drain waiting.
        let connections = TaskTracker::new();
        let gateway = Arc::new(ApnsGateway::new(&way, &apps, &clock, &connections, tasks.aborting())?);
        let identity = Identity::default();
        let (intake, handover) = Intake::start(
            Arc::clone(&store),
            Arc::clone(&clock),
            identity.clone(),
            &intake::Settings::default(),
            &tasks,
        );
        let dispatcher = Dispatcher::start(
            Arc::clone(&store),
            Arc::clone(&gateway) as Arc<dyn Gateway>,
            Arc::clone(&clock),
            identity.clone(),
            handover,
            dispatch_settings(config),
            &tasks,
        )
        .await?;
        let keeper = Keeper::new(Arc::clone(&store), Arc::clone(&clock), identity.clone(), retention(config));
        // A step that is cut is rolled back, or was committed.
        tasks.spawn_until_stopped("ops.keeper", async move { keeper.run().await });
        let health = Arc::new(Health::new(
            Arc::clone(&store),
            Arc::clone(&gateway) as Arc<dyn Gateway>,
            Arc::clone(&clock),
            identity,
            warnings,
            metrics,
        ));
        watch(&tasks, &store, &gateway, &clock, options.database_time.then_some(shared));
        let services = http::Services {
            store: Arc::clone(&store),
            intake: Arc::new(intake),
            clock: Arc::clone(&clock),
            catalogue,
            health,
            stopping: tasks.stopping().clone(),
            settings: http::Settings { ops_elsewhere: config.server.ops_listen.is_some(), ..http::Settings::default() },
        };
        let (address, ops_address) = (address_of(&listener)?, ops_listener.as_ref().map(address_of).transpose()?);
        if let Some(listener) = ops_listener {
            tasks.spawn("http.ops", listener.serve(http::ops_entrance(services.clone()), tasks.clone()));
            if let Some(address) = ops_address {
                tracing::info!(address = %address, "operations on {address}");
            }
        }
        tasks.spawn("http", listener.serve(http::entrance(services), tasks.clone()));
        tracing::info!(
            address = %address,
            apps = config.apps.len(),
            database = ?store.kind(),
            "sonnette {} listens on {address}",
            env!("CARGO_PKG_VERSION")
        );
        Ok(Self { tasks, store, gateway, dispatcher, address, ops_address, clock })
    }

    /// Where the API listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where operations have a listener of their own.
    #[must_use]
    pub const fn ops_address(&self) -> Option<SocketAddr> {
        self.ops_address
    }

    /// How each app stands towards APNs.
    #[must_use]
    pub fn routes(&self) -> Vec<RouteReport> {
        self.gateway.report()
    }

    /// What is kept.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Resolves once the service stops by itself, because a task ended that should not have.
    pub async fn stopped(&self) {
        self.tasks.stopping().cancelled().await;
    }

    /// Whether a task ended on its own.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.tasks.failed()
    }

    /// Stops in good order. False if the grace was not enough: then what was not settled is repeated by whoever takes
    /// over.
    pub async fn shutdown(self, grace: Duration) -> bool {
        self.tasks.stop();
        self.gateway.stop();
        let drained = tokio::select! {
            () = self.tasks.ended() => true,
            () = self.clock.sleep(grace) => false,
        };
        if !drained {
            self.tasks.abort();
        }
        self.gateway.close(Duration::from_secs(1)).await;
        let left = match self.dispatcher.leave().await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the database could not be told that we leave"
                );
                false
            }
        };
        self.store.close().await;
        drained && left && !self.tasks.failed()
    }
}

/// Starts what goes on beside the work: clocks are compared, the schema is looked at, and observations are summed up.
fn watch(
    tasks: &Tasks,
    store: &Arc<dyn Store>,
    gateway: &Arc<ApnsGateway>,
    clock: &Arc<dyn Clock>,
    shared: Option<Arc<SharedClock>>,
) {
    let stopping = tasks.stopping();
    let gateway = Arc::clone(gateway) as Arc<dyn Gateway>;
    tasks.spawn("ops.clock", ops::clock::watch(gateway, Arc::clone(clock), stopping.clone()));
    tasks.spawn("ops.schema", ops::schema::watch(Arc::clone(store), Arc::clone(clock), stopping.clone()));
    if let Some(shared) = shared {
        tasks.spawn("ops.database_clock", ops::clock::follow(Arc::clone(store), shared, stopping.clone()));
    }
    tasks.spawn_until_stopped("telemetry", telemetry::sum_up(Arc::clone(clock)));
}

fn dispatch_settings(config: &Config) -> dispatch::Settings {
    let mut max_pushes_per_second = BTreeMap::new();
    for app in &config.apps {
        if let Some(max) = app.max_pushes_per_second {
            max_pushes_per_second.entry(app.topic.clone()).and_modify(|lower| *lower = max.min(*lower)).or_insert(max);
        }
    }
    dispatch::Settings { name: replica_name(), max_pushes_per_second, ..dispatch::Settings::default() }
}

fn retention(config: &Config) -> keeper::Settings {
    let kept = &config.retention;
    keeper::Settings {
        notifications: kept.notifications_days.duration(),
        payloads: kept.payloads_days.duration(),
        inactive_devices: kept.inactive_devices_days.duration(),
        api_keys: kept.api_keys_days.duration(),
    }
}

async fn open_store(config: &Config, clock: &Arc<dyn Clock>) -> Result<Arc<dyn Store>, AppError> {
    let store = store::open(&store_settings(config), Role::Serve, Arc::clone(clock)).await?;
    if config.database.migrate {
        for migration in store.migrate().await? {
            tracing::info!(migration = %migration, "applied");
        }
    } else {
        let pending = store.pending().await?.len();
        if pending > 0 {
            return Err(AppError::Behind(pending));
        }
    }
    store.schema().await?.check()?;
    Ok(store)
}

async fn listen(
    key: &'static str,
    address: &str,
    max_connections: usize,
    tls: Option<tokio_rustls::TlsAcceptor>,
) -> Result<Listener, AppError> {
    Listener::bind(address, max_connections, tls).await.map_err(|source| AppError::Listen {
        key,
        address: address.to_owned(),
        source,
    })
}

fn address_of(listener: &Listener) -> Result<SocketAddr, AppError> {
    listener.address().map_err(|source| AppError::Listen { key: "server.listen", address: String::new(), source })
}

fn read(file: &std::path::Path) -> Result<Vec<u8>, AppError> {
    std::fs::read(file).map_err(|source| AppError::Read { file: file.to_path_buf(), source })
}

fn read_text(file: &std::path::Path) -> Result<String, AppError> {
    std::fs::read_to_string(file).map_err(|source| AppError::Read { file: file.to_path_buf(), source })
}

/// One credential an `[[app]]`, in the order of the configuration.
fn credentials(config: &Config) -> Result<Vec<client::App>, AppError> {
    let mut apps = Vec::new();
    for app in &config.apps {
        let topic = app.topic.to_string();
        let wrong = |what: String| AppError::App { topic: topic.clone(), what };
        let team = app.team_id.parse().map_err(|e| wrong(format!("team_id: {e}")))?;
        let key_id = app.key_id.parse().map_err(|e| wrong(format!("key_id: {e}")))?;
        let p8 = Secret::new(read_text(&app.key_file)?);
        let credential = Credential::new(team, key_id, &p8).map_err(|source| AppError::Key {
            topic: topic.clone(),
            file: app.key_file.clone(),
            source,
        })?;
        apps.push(client::App {
            topic: app.topic.clone(),
            environments: app.environments.clone(),
            credential: Arc::new(credential),
        });
    }
    Ok(apps)
}

fn apns_settings(config: &Config) -> Result<client::Settings, AppError> {
    Ok(client::Settings {
        production: Endpoint { url: config.apns.production.clone() },
        sandbox: Endpoint { url: config.apns.sandbox.clone() },
        extra_roots_pem: config.apns.ca_file.as_deref().map(read).transpose()?,
        request_deadline: Duration::from_secs(config.apns.request_timeout_seconds),
        max_connections: config.apns.max_connections,
        ..client::Settings::default()
    })
}

/// What the API must know of apps: no secret among it.
fn catalogue(config: &Config) -> Result<http::Catalogue, AppError> {
    let mut catalogue = http::Catalogue::default();
    for app in &config.apps {
        let mut keys = Vec::new();
        for key in &app.identity_keys {
            keys.push((key.kid.clone(), read_text(&key.public_key_file)?));
        }
        let required = app.identity == config::Identity::Required;
        catalogue.add(&app.topic, &app.environments, required, &keys).map_err(AppError::Identity)?;
    }
    Ok(catalogue)
}

/// This process among others.
fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    format!("{}:{}", if host.is_empty() { "sonnette" } else { host }, std::process::id())
}
