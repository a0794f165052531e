//! The [`Gateway`]: all apps, one pool of connections for each credential and environment.
//!
//! Promises: topics of one credential share its connections; two credentials never meet on one connection (APNs binds a
//! connection to the team and key of its first push, `apns-protocol.md` §3.4). Nothing is connected before the first
//! push. Tasks are spawned on the tracker handed in and end by [`Gateway::close`] or by the token handed in.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use http::{Uri, uri::Scheme};
use rustls::pki_types::ServerName;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Fence, Fingerprint, Gateway, Push, RouteReport,
    connection::Address,
    credential::Credential,
    pool::{Pool, Spec},
    tls::{self, TlsError},
    token::Minter,
};
use crate::domain::{
    clock::{Clock, Timestamp},
    outcome::{Outcome, Reply},
    topic::{Environment, Topic},
};

/// Where APNs is for one environment: `https://host`, port 443 unless the URL names another (2197 is Apple's other).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The URL, without a path.
    pub url: String,
}

/// How the client behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// APNs' production environment.
    pub production: Endpoint,
    /// APNs' sandbox.
    pub sandbox: Endpoint,
    /// Roots of trust beside Mozilla's, as PEM: for a simulator or an inspecting proxy.
    pub extra_roots_pem: Option<Vec<u8>>,
    /// A request without an answer for so long is unknown.
    pub request_deadline: Duration,
    /// The most connections for one credential and environment, of all processes that share them together.
    pub max_connections: usize,
    /// A connection is replaced after so many requests. Stream ids end at 2^30.
    pub max_requests_per_connection: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            production: Endpoint { url: "https://api.push.apple.com".to_owned() },
            sandbox: Endpoint { url: "https://api.sandbox.push.apple.com".to_owned() },
            extra_roots_pem: None,
            request_deadline: Duration::from_secs(20),
            max_connections: 4,
            max_requests_per_connection: 1 << 29,
        }
    }
}

/// One app and the credential that serves it in some environments.
#[derive(Debug, Clone)]
pub struct App {
    /// The bundle id.
    pub topic: Topic,
    /// Where the credential serves it.
    pub environments: Vec<Environment>,
    /// The credential.
    pub credential: Arc<Credential>,
}

/// Why no gateway could be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An address that is none.
    #[error("`{url}` is not an address of APNs: `https://host` or `https://host:port` is expected, without a path")]
    Url {
        /// The address as it was given.
        url: String,
    },
    /// The extra roots are not usable.
    #[error("the roots of trust are not usable")]
    Tls(#[from] TlsError),
    /// No connections allowed.
    #[error("`max_connections` must be at least 1")]
    NoConnections,
}

struct Route {
    topic: Topic,
    environment: Environment,
    fingerprint: Fingerprint,
    pool: Arc<Pool>,
    /// Milliseconds since the epoch; 0: never.
    last_accepted_at: AtomicI64,
}

#[derive(Default)]
struct AppRoutes {
    /// Production first.
    environments: Vec<Environment>,
    routes: Vec<Route>,
}

/// The way to APNs over real connections.
pub struct ApnsGateway {
    apps: HashMap<Topic, AppRoutes>,
    pools: Vec<Arc<Pool>>,
}

impl std::fmt::Debug for ApnsGateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApnsGateway")
            .field("topics", &self.apps.keys())
            .field("pools", &self.pools.len())
            .finish_non_exhaustive()
    }
}

impl ApnsGateway {
    /// Builds the gateway; connects to nothing yet. Where several `apps` name the same topic and environment (a key
    /// being rotated), the first is used. `abort` ends everything at once, for when a shutdown takes too long.
    ///
    /// # Errors
    /// If an address or the extra roots are not usable.
    pub fn new(
        settings: &Settings,
        apps: &[App],
        clock: &Arc<dyn Clock>,
        tracker: &TaskTracker,
        abort: &CancellationToken,
    ) -> Result<Self, BuildError> {
        if settings.max_connections == 0 {
            return Err(BuildError::NoConnections);
        }
        let tls = tls::client_config(settings.extra_roots_pem.as_deref())?;
        let addresses = [
            (Environment::Production, address(&settings.production)?),
            (Environment::Sandbox, address(&settings.sandbox)?),
        ];
        let mut pools: HashMap<(Fingerprint, Environment), Arc<Pool>> = HashMap::new();
        let mut routes: HashMap<Topic, AppRoutes> = HashMap::new();
        for (environment, address) in addresses {
            for app in apps {
                let known = routes.entry(app.topic.clone()).or_default();
                if !app.environments.contains(&environment) || known.environments.contains(&environment) {
                    continue;
                }
                let fingerprint = app.credential.fingerprint().clone();
                let pool = pools.entry((fingerprint.clone(), environment)).or_insert_with(|| {
                    Pool::new(
                        Spec {
                            environment,
                            address: address.clone(),
                            tls: Arc::clone(&tls),
                            request_deadline: settings.request_deadline,
                            max_connections: settings.max_connections,
                            max_requests: settings.max_requests_per_connection,
                        },
                        Minter::new(Arc::clone(&app.credential)),
                        Arc::clone(clock),
                        tracker.clone(),
                        abort,
                    )
                });
                known.environments.push(environment);
                known.routes.push(Route {
                    topic: app.topic.clone(),
                    environment,
                    fingerprint,
                    pool: Arc::clone(pool),
                    last_accepted_at: AtomicI64::new(0),
                });
            }
        }
        Ok(Self { apps: routes, pools: pools.into_values().collect() })
    }

    fn route(&self, topic: &Topic, environment: Environment) -> Option<&Route> {
        self.apps.get(topic)?.routes.iter().find(|r| r.environment == environment)
    }
}

fn address(endpoint: &Endpoint) -> Result<Address, BuildError> {
    let wrong = || BuildError::Url { url: endpoint.url.clone() };
    let uri: Uri = endpoint.url.parse().map_err(|_| wrong())?;
    let authority = uri.authority().ok_or_else(wrong)?;
    if uri.scheme() != Some(&Scheme::HTTPS)
        || authority.as_str().contains('@')
        || !matches!(uri.path(), "" | "/")
        || uri.query().is_some()
    {
        return Err(wrong());
    }
    let host = authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    Ok(Address {
        port: authority.port_u16().unwrap_or(443),
        server_name: ServerName::try_from(bare.to_owned()).map_err(|_| wrong())?,
        authority: authority.clone(),
    })
}

#[async_trait]
impl Gateway for ApnsGateway {
    async fn send(&self, push: &Push, fence: &dyn Fence) -> Reply {
        let Some(route) = self.route(&push.head.topic, push.environment) else {
            tracing::error!(
                topic = %push.head.topic,
                apns.environment = %push.environment,
                "a push for {} in {} has no credential: whoever sends looks at `environments` first",
                push.head.topic,
                push.environment
            );
            return Reply { outcome: Outcome::Unsent, answer: None, sent_at: None };
        };
        let reply = route.pool.send(push, fence).await;
        if reply.outcome == Outcome::Accepted
            && let Some(at) = reply.sent_at
            // Mostly somebody else has noted that millisecond: looking costs less than writing what all threads share.
            && route.last_accepted_at.load(Ordering::Relaxed) < at.as_millis()
        {
            route.last_accepted_at.fetch_max(at.as_millis(), Ordering::Relaxed);
        }
        tracing::debug!(
            topic = %push.head.topic,
            apns.environment = %push.environment,
            device.token = ?push.token,
            apns.id = %push.apns_id,
            apns.status = reply.answer.as_ref().map(|a| a.status),
            apns.reason = reply.answer.as_ref().and_then(|a| a.reason.as_ref()).map(tracing::field::display),
            outcome = ?reply.outcome,
            "apns.send"
        );
        reply
    }

    fn environments(&self, topic: &Topic) -> &[Environment] {
        self.apps.get(topic).map_or(&[], |app| &app.environments)
    }

    fn fingerprint(&self, topic: &Topic, environment: Environment) -> Option<&Fingerprint> {
        self.route(topic, environment).map(|r| &r.fingerprint)
    }

    fn share_out(&self, place: usize, of: usize) {
        for pool in &self.pools {
            pool.share_out(place, of);
        }
    }

    fn report(&self) -> Vec<RouteReport> {
        let mut routes: Vec<&Route> = self.apps.values().flat_map(|a| &a.routes).collect();
        routes.sort_by(|a, b| (&a.topic, a.environment).cmp(&(&b.topic, b.environment)));
        routes
            .into_iter()
            .map(|route| {
                let pool = route.pool.report();
                let accepted = route.last_accepted_at.load(Ordering::Relaxed);
                RouteReport {
                    topic: route.topic.clone(),
                    environment: route.environment,
                    fingerprint: route.fingerprint.clone(),
                    connections: pool.connections,
                    in_flight: pool.in_flight,
                    waiting: pool.waiting,
                    connect_error: pool.connect_error,
                    provider_token_age: pool.provider_token_age,
                    last_accepted_at: (accepted != 0).then(|| Timestamp::from_millis(accepted)),
                    clock_skew_seconds: pool.clock_skew_seconds,
                }
            })
            .collect()
    }

    fn stop(&self) {
        for pool in &self.pools {
            pool.stop();
        }
    }

    async fn close(&self, grace: Duration) {
        futures_util::future::join_all(self.pools.iter().map(|p| p.close(grace))).await;
    }
}
