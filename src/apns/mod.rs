//! The APNs client: what the dispatcher knows of it.
//!
//! Promises: one call, one request at most that APNs may have processed; the answer says honestly whether it was never
//! processed ([`Outcome::Unsent`]), answered, or written and left unanswered ([`Outcome::Unknown`]). The fence is asked right
//! before the first byte, with the stream already in hand, and again if anything had to wait.
//!
//! | file | holds |
//! |---|---|
//! | [`client`] | the [`Gateway`] over real connections: settings, apps, routes |
//! | `pool` | the connections of one credential to one environment, and who may use them when |
//! | `connection` | one HTTP/2 connection: opening it, and one exchange on it, as the push's task sees it |
//! | `drive` | the task that owns a connection: it alone opens streams, writes and reads |
//! | `wire` | the connection's bytes, between HTTP/2 and TLS |
//! | [`request`], [`response`] | a push as a request; what an answer means. Pure |
//! | [`token`], [`credential`] | provider tokens; team, key id and key |
//! | [`tls`] | TLS to APNs |

pub mod client;
mod connection;
pub mod credential;
mod drive;
mod pool;
pub mod request;
pub mod response;
pub mod tls;
pub mod token;
mod wire;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::domain::{
    clock::Timestamp,
    device::DeviceToken,
    notification::Lane,
    outcome::Reply,
    push::{ApnsId, CollapseId, Expiration, Priority, PushType},
    topic::{Environment, Topic},
};

#[cfg(doc)]
use crate::domain::outcome::Outcome;

/// What all pushes of one notification share: prepared once, used for a million devices.
#[derive(Debug, Clone)]
pub struct Head {
    /// The app's bundle id; the suffix is added for the header.
    pub topic: Topic,
    /// `apns-push-type`, and the suffix of `apns-topic`.
    pub push_type: PushType,
    /// `apns-priority`.
    pub priority: Priority,
    /// `apns-expiration`.
    pub expiration: Expiration,
    /// `apns-collapse-id`.
    pub collapse_id: Option<CollapseId>,
    /// The body.
    pub payload: Bytes,
    /// Who goes first when streams are scarce.
    pub lane: Lane,
    /// Nothing is written at or after this moment.
    pub deadline: Timestamp,
}

/// One push for one device.
#[derive(Debug, Clone)]
pub struct Push {
    /// What it shares with the others of its notification.
    pub head: Arc<Head>,
    /// Where to send it.
    pub environment: Environment,
    /// To which device.
    pub token: DeviceToken,
    /// The same for every attempt.
    pub apns_id: ApnsId,
}

/// Asked right before a push is written: may it still leave?
#[async_trait]
pub trait Fence: Send + Sync {
    /// Whether what is known about the push is young enough to be acted on at this instant, and allows it.
    fn is_open(&self) -> bool;

    /// The same, and for how long: until this moment of the clock's monotonic time what is known stays young enough.
    /// `None`: it is not open. A fence that answers for the instant only says zero, and is asked once more if the push
    /// cannot leave at once; any other is asked again at that moment at the latest, and long before it.
    fn open_until(&self) -> Option<Duration> {
        self.is_open().then_some(Duration::ZERO)
    }

    /// Called when [`Fence::is_open`] says no: finds out again. `false`: the push must not leave.
    async fn renew(&self) -> bool;
}

/// A fence that is always open: for pushes that nobody can withdraw.
#[derive(Debug, Clone, Copy)]
pub struct NoFence;

#[async_trait]
impl Fence for NoFence {
    fn is_open(&self) -> bool {
        true
    }

    fn open_until(&self) -> Option<Duration> {
        Some(Duration::MAX)
    }

    async fn renew(&self) -> bool {
        true
    }
}

/// Which credential serves an app in an environment: a SHA-256 over team, key id and public key, in hex. Names the
/// credential in breakers and metrics; tells nothing about the key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub Box<str>);

/// How one app stands in one environment, for `/health` and `/metrics`.
#[derive(Debug, Clone)]
pub struct RouteReport {
    /// The app.
    pub topic: Topic,
    /// The environment.
    pub environment: Environment,
    /// The credential.
    pub fingerprint: Fingerprint,
    /// Connections that are open now.
    pub connections: usize,
    /// Requests in flight on them.
    pub in_flight: usize,
    /// Pushes that wait for a stream.
    pub waiting: usize,
    /// Why the last attempt to connect failed, if none has succeeded since. Nothing secret in it.
    pub connect_error: Option<String>,
    /// How old the provider token is that a new request would carry.
    pub provider_token_age: Option<Duration>,
    /// When APNs last accepted a push of this app here, since this process started.
    pub last_accepted_at: Option<Timestamp>,
    /// How many seconds APNs' clock is ahead of ours, by the `date` of a recent answer; negative: behind. `None` if no
    /// answer named a date.
    pub clock_skew_seconds: Option<i64>,
}

/// The way to APNs.
#[async_trait]
pub trait Gateway: Send + Sync {
    /// Sends one push: waits for a stream (urgent lane first), asks the fence, writes, waits for the answer within the
    /// request deadline. What APNs certainly did nothing with is sent again at once, a few times within that deadline.
    ///
    /// Dropping the future before the fence was asked costs nothing; after that, it may leave a push written and
    /// unanswered: callers do not drop it.
    async fn send(&self, push: &Push, fence: &dyn Fence) -> Reply;

    /// Where this app has a credential, production first.
    fn environments(&self, topic: &Topic) -> &[Environment];

    /// The credential of this app in this environment.
    fn fingerprint(&self, topic: &Topic, environment: Environment) -> Option<&Fingerprint>;

    /// This process is number `place`, from 0, of `of` that share the connections there may be: it takes its part of them,
    /// at least one, and lets those beyond it go once nothing is in flight on them.
    fn share_out(&self, place: usize, of: usize);

    /// How everything stands.
    fn report(&self) -> Vec<RouteReport>;

    /// No new request is written from now on: whoever waits for a stream gets [`Outcome::Unsent`] at once. What is in
    /// flight is still answered.
    fn stop(&self);

    /// Closes the connections, once nothing is in flight or `grace` has passed.
    async fn close(&self, grace: Duration);
}
