//! The HTTP API: extract, one store verb, respond.
//!
//! Promises: what is answered with a 2xx was committed first; whatever is refused is told all that is wrong with it, as
//! [`problem`] documents; a caller is known before its body is read; memory is bounded, whoever calls.
//!
//! | file | holds |
//! |---|---|
//! | `v1/` | one file a resource |
//! | [`ops`] | health, metrics |
//! | [`problem`] | the only place where an error meets a status code |
//! | [`fields`] | reads JSON and queries, and collects what is wrong |
//! | [`auth`], [`identity`] | who calls; who holds the phone |
//! | [`body`], [`request`] | bounded bodies; request ids, the log line, metrics, deadlines |
//! | [`catalogue`] | the configured apps |
//! | [`listener`], [`tls`], `gather.rs` | sockets |
//! | `entrance.rs` | what a listener asks: the router, or past it |

pub mod auth;
pub mod body;
pub mod catalogue;
mod entrance;
pub mod fields;
mod gather;
pub mod identity;
pub mod listener;
pub mod ops;
pub mod problem;
pub mod request;
pub mod tls;
mod v1;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    routing::{delete, get, post},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

pub use catalogue::Catalogue;
pub use entrance::Entrance;

use crate::{
    domain::clock::Clock,
    ops::Health,
    store::{Store, intake::Intake},
};

/// Bounds of the API.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Health details, metrics and administration have a listener of their own.
    pub ops_elsewhere: bool,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request may take as a whole.
    pub request_timeout: Duration,
    /// What all bodies beyond [`body::SMALL_BYTES`] may take together.
    pub large_bodies_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ops_elsewhere: false,
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(60),
            large_bodies_bytes: 256 * 1024 * 1024,
        }
    }
}

/// What the API works with.
#[derive(Clone)]
pub struct Services {
    /// What is kept.
    pub store: Arc<dyn Store>,
    /// The door for what is to be kept.
    pub intake: Arc<Intake>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The configured apps.
    pub catalogue: Arc<Catalogue>,
    /// How the service is, and its metrics.
    pub health: Arc<Health>,
    /// Cancelled once the service is to stop: then it is not ready.
    pub stopping: CancellationToken,
    /// Bounds.
    pub settings: Settings,
}

/// What all handlers share.
struct Api {
    services: Services,
    keys: auth::Keys,
    own_key: identity::OwnKey,
    /// Room for large bodies, in KiB.
    bodies: Arc<Semaphore>,
    /// Whoever reaches this router may operate the service.
    trusted: bool,
}

type Shared = Arc<Api>;

impl Api {
    fn new(services: Services, trusted: bool) -> Shared {
        let room = (services.settings.large_bodies_bytes / 1024).min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            services,
            keys: auth::Keys::new(),
            own_key: identity::OwnKey::default(),
            bodies: Arc::new(Semaphore::new(room)),
            trusted,
        })
    }
}

/// A share of the room for large bodies, if there is any left.
fn take_room(bodies: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let kib = u32::try_from(bytes.div_ceil(1024)).ok()?;
    Arc::clone(bodies).try_acquire_many_owned(kib).ok()
}

/// The API, for everybody; every path but health wants a key.
pub fn entrance(services: Services) -> Entrance {
    let elsewhere = services.settings.ops_elsewhere;
    let api = Api::new(services, false);
    let mut router = Router::new()
        .route("/v1/devices", post(v1::devices::register).get(v1::devices::list))
        .route("/v1/devices/{id}", get(v1::devices::one).delete(v1::devices::forget))
        .route("/v1/devices/{id}/user", delete(v1::devices::log_out))
        .route("/v1/users/{user_id}/identity-tokens", post(v1::users::mint))
        .route("/v1/apps/{topic}/pause", post(v1::apps::pause))
        .route("/v1/apps/{topic}/resume", post(v1::apps::resume))
        .route(v1::notifications::PATH, post(v1::notifications::send).get(v1::notifications::list))
        .route("/v1/notifications/{id}", get(v1::notifications::one).delete(v1::notifications::cancel))
        .route("/v1/notifications/{id}/deliveries", get(v1::notifications::deliveries))
        .merge(health());
    if !elsewhere {
        router = router.route("/metrics", get(ops::metrics));
    }
    Entrance::by(framed(router, Arc::clone(&api))).past(api)
}

/// Health with details and metrics, without a key: for a listener on a private network.
pub fn ops_entrance(services: Services) -> Entrance {
    let api = Api::new(services, true);
    Entrance::by(framed(health().route("/metrics", get(ops::metrics)), api))
}

fn health() -> Router<Shared> {
    Router::new()
        .route("/health", get(ops::health))
        .route("/health/live", get(ops::live))
        .route("/health/ready", get(ops::ready))
}

fn framed(router: Router<Shared>, api: Shared) -> Router {
    router.fallback(v1::no_such_path).layer(request::Frame::around(&api)).with_state(api)
}
