//! The gateway to APNs alone, without queue and database, on a clock that the test moves.

use std::{fmt::Debug, sync::Arc, time::Duration};

use bytes::Bytes;
use sonnette::{
    apns::{
        Fence, Gateway, Head, NoFence, Push,
        client::{ApnsGateway, App, Endpoint, Settings},
        credential::{self, Credential},
    },
    domain::{
        clock::{Clock, ManualClock, Timestamp},
        notification::Lane,
        outcome::{Outcome, Reply},
        push::{ApnsId, Expiration, Priority, PushType, Recipient},
        secret::Secret,
        topic::{Environment, Topic},
    },
};
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    apns_server::Server,
    waiting::within,
    world::{KEY_ID, TEAM, TOPIC},
};

/// What the clock shows at first.
pub(crate) const START: Timestamp = Timestamp::from_seconds(1_795_000_000);

pub(crate) struct Client {
    pub(crate) gateway: Arc<ApnsGateway>,
    pub(crate) clock: Arc<ManualClock>,
}

pub(crate) fn topic() -> Topic {
    TOPIC.parse().unwrap()
}

pub(crate) fn client_with(port: u16, ca_pem: &[u8], adjust: impl FnOnce(&mut Settings)) -> Client {
    client_of(&credential::generate().unwrap(), START, port, ca_pem, adjust)
}

/// A client that reads this key for itself, as each replica does, on a clock of its own.
pub(crate) fn client_of(
    p8: &Secret<String>,
    now: Timestamp,
    port: u16,
    ca_pem: &[u8],
    adjust: impl FnOnce(&mut Settings),
) -> Client {
    let clock = Arc::new(ManualClock::new(now));
    let dyn_clock: Arc<dyn Clock> = Arc::<ManualClock>::clone(&clock);
    Client { gateway: gateway_on(&dyn_clock, p8, port, ca_pem, adjust), clock }
}

/// The gateway on any clock.
pub(crate) fn gateway_on(
    clock: &Arc<dyn Clock>,
    p8: &Secret<String>,
    port: u16,
    ca_pem: &[u8],
    adjust: impl FnOnce(&mut Settings),
) -> Arc<ApnsGateway> {
    let credential = Credential::new(TEAM.parse().unwrap(), KEY_ID.parse().unwrap(), p8).unwrap();
    let url = format!("https://localhost:{port}");
    let mut settings = Settings {
        production: Endpoint { url: url.clone() },
        sandbox: Endpoint { url },
        extra_roots_pem: Some(ca_pem.to_vec()),
        ..Settings::default()
    };
    adjust(&mut settings);
    let app = App {
        topic: topic(),
        environments: vec![Environment::Sandbox, Environment::Production],
        credential: Arc::new(credential),
    };
    let gateway = ApnsGateway::new(&settings, &[app], clock, &TaskTracker::new(), &CancellationToken::new());
    Arc::new(gateway.unwrap())
}

pub(crate) fn client(server: &Server) -> Client {
    client_with(server.port, &server.ca_pem, |_| {})
}

pub(crate) fn push(number: usize, lane: Lane) -> Push {
    push_until(number, lane, START.plus(Duration::from_secs(30 * 24 * 3600)))
}

pub(crate) fn push_until(number: usize, lane: Lane, deadline: Timestamp) -> Push {
    let token = format!("{number:08x}").parse().unwrap();
    Push {
        apns_id: ApnsId::derive("0193515e-8f00-7abc-8def-0123456789ab".parse().unwrap(), Recipient::Token(&token)),
        head: Arc::new(Head {
            topic: topic(),
            push_type: PushType::Alert,
            priority: Priority::Ten,
            expiration: Expiration::At(deadline),
            collapse_id: None,
            payload: Bytes::from_static(b"{\"aps\":{\"alert\":\"Bonjour\"}}"),
            lane,
            deadline,
        }),
        environment: Environment::Production,
        token,
    }
}

impl Client {
    pub(crate) fn send(&self, push: Push) -> JoinHandle<Reply> {
        self.send_fenced(push, Arc::new(NoFence))
    }

    pub(crate) fn send_fenced(&self, push: Push, fence: Arc<dyn Fence>) -> JoinHandle<Reply> {
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { gateway.send(&push, &*fence).await })
    }

    pub(crate) fn send_n(&self, n: usize) -> Vec<JoinHandle<Reply>> {
        (0..n).map(|i| self.send(push(i, Lane::Transactional))).collect()
    }

    pub(crate) fn production(&self) -> sonnette::apns::RouteReport {
        self.gateway.report().into_iter().find(|r| r.environment == Environment::Production).unwrap()
    }

    /// A connection that has proved itself and may open as many streams as the script says.
    pub(crate) async fn warm_up(&self, server: &mut Server) {
        let first = self.send(push(999_999, Lane::Transactional));
        server.next().await.answer(200, "");
        assert_eq!(outcome(first).await, Outcome::Accepted);
    }
}

pub(crate) async fn outcome(sent: JoinHandle<Reply>) -> Outcome {
    within("a reply", sent).await.unwrap().outcome
}

pub(crate) async fn outcomes(sent: Vec<JoinHandle<Reply>>) -> Vec<Outcome> {
    let mut all = Vec::new();
    for one in sent {
        all.push(outcome(one).await);
    }
    all
}

pub(crate) fn count<T: PartialEq + Debug>(all: &[T], one: &T) -> usize {
    all.iter().filter(|o| *o == one).count()
}
