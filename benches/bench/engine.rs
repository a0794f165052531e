//! Sonnette's own way to APNs, without what stands before it: pushes go into [`Gateway::send`] as the dispatcher hands
//! them in, and come out answered.
//!
//! The gateway is built as `app.rs` builds it, from a configuration file in which only addresses are named; so are the
//! runtime and the log. The fence costs what the dispatcher's costs, less its reads of the database.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::{Deserialize, Serialize};
use sonnette::{
    apns::{
        Fence, Gateway, Head, Push,
        client::{self, ApnsGateway, Endpoint},
        credential::Credential,
    },
    config::Config,
    domain::{
        clock::{Clock, SystemClock},
        notification::{Lane, NotificationId},
        outcome::Outcome,
        push::{ApnsId, CollapseId, Expiration, Priority, PushType, Recipient},
        secret::Secret,
        topic::{Environment, Topic},
    },
    telemetry::{self, LogSettings},
};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    service::{self, PAYLOAD, TOPIC},
    yardstick::{Timed, Took, WARM_UP},
};

/// Targets of a full chunk, all in flight at once, and full chunks in memory at once: the dispatcher's bounds.
const CHUNK: usize = 1_000;
const CHUNKS: usize = 20;

/// Single notifications in memory at once: the store's room.
const SINGLES: usize = 4_096;

/// What is sent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// One notification for all devices.
    Broadcast,
    /// A notification for each device.
    Singles,
}

/// How it is sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Engine {
    pub(crate) kind: Kind,
    /// `[apns] max_connections`, if it is not to be the default.
    pub(crate) connections: Option<usize>,
    /// Whether all pushes are ready before the clock starts, as the yardsticks' are; otherwise a chunk is made when its
    /// turn comes, and memory is the engine's own.
    pub(crate) prepared: bool,
}

/// Sends `pushes` and waits for the last answer.
pub(crate) async fn run(engine: &Engine, config: &Path, pushes: usize) -> Took {
    let mut config = Config::load(Some(config), &BTreeMap::new()).expect("a configuration");
    if let Some(connections) = engine.connections {
        config.apns.max_connections = connections;
    }
    telemetry::start_logs(&LogSettings { level: config.log.level.clone(), json: config.log.json }).expect("a level");
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let gateway: Arc<dyn Gateway> = Arc::new(gateway(&config, &clock));
    let line = Arc::new(Line { gateway, duties: Duties::new(&clock) });

    line.all(engine.kind, chunks(engine.kind, 0..WARM_UP)).await;
    let chunks = chunks(engine.kind, 0..pushes);
    let took = if engine.prepared {
        let chunks: Vec<_> = chunks.collect();
        let timed = Timed::start();
        line.all(engine.kind, chunks.clone().into_iter()).await;
        timed.stop()
    } else {
        let timed = Timed::start();
        line.all(engine.kind, chunks).await;
        timed.stop()
    };
    line.gateway.close(Duration::from_secs(5)).await;
    took
}

/// As `app.rs` does it.
fn gateway(config: &Config, clock: &Arc<dyn Clock>) -> ApnsGateway {
    let settings = client::Settings {
        production: Endpoint { url: config.apns.production.clone() },
        sandbox: Endpoint { url: config.apns.sandbox.clone() },
        extra_roots_pem: config.apns.ca_file.as_deref().map(|file| std::fs::read(file).expect("the CA file")),
        request_deadline: Duration::from_secs(config.apns.request_timeout_seconds),
        max_connections: config.apns.max_connections,
        ..client::Settings::default()
    };
    let apps: Vec<_> = config.apps.iter().map(app).collect();
    ApnsGateway::new(&settings, &apps, clock, &TaskTracker::new(), &CancellationToken::new()).expect("a gateway")
}

fn app(app: &sonnette::config::App) -> client::App {
    let p8 = Secret::new(std::fs::read_to_string(&app.key_file).expect("the key"));
    let (team, key_id) = (app.team_id.parse().expect("a team"), app.key_id.parse().expect("a key id"));
    client::App {
        topic: app.topic.clone(),
        environments: app.environments.clone(),
        credential: Arc::new(Credential::new(team, key_id, &p8).expect("a P-256 key")),
    }
}

/// Pushes in chunks: of one notification, or each of its own.
fn chunks(kind: Kind, numbers: std::ops::Range<usize>) -> impl Iterator<Item = Arc<[Push]>> {
    let clock = SystemClock::new();
    let head = move || {
        let id = NotificationId::from_uuid(Uuid::now_v7());
        let deadline = clock.now().plus(Duration::from_secs(86_400));
        let head = Head {
            topic: TOPIC.parse().expect("a topic"),
            push_type: PushType::Alert,
            priority: Priority::Ten,
            expiration: Expiration::At(deadline),
            collapse_id: Some(CollapseId::derived(id)),
            payload: Bytes::from_static(PAYLOAD.as_bytes()),
            lane: Lane::Transactional,
            deadline,
        };
        (id, Arc::new(head))
    };
    let mut shared = head();
    let all = numbers.end;
    numbers.step_by(CHUNK).map(move |first| {
        let push = |number| {
            if matches!(kind, Kind::Singles) {
                shared = head();
            }
            let (id, head) = &shared;
            let token = service::device_token(number).parse().expect("a device token");
            Push {
                head: Arc::clone(head),
                environment: Environment::Production,
                apns_id: ApnsId::derive(*id, Recipient::Token(&token)),
                token,
            }
        };
        (first..all.min(first + CHUNK)).map(push).collect()
    })
}

struct Line {
    gateway: Arc<dyn Gateway>,
    duties: Arc<Duties>,
}

impl Line {
    /// Each chunk, or each push, in a task of its own, launched from a task as the dispatcher does it.
    async fn all(self: &Arc<Self>, kind: Kind, chunks: impl Iterator<Item = Arc<[Push]>> + Send + 'static) {
        let tasks = TaskTracker::new();
        let (line, units) = (Arc::clone(self), tasks.clone());
        tasks.spawn(async move {
            let room = Arc::new(Semaphore::new(match kind {
                Kind::Broadcast => CHUNKS,
                Kind::Singles => SINGLES,
            }));
            for chunk in chunks {
                let length = match kind {
                    Kind::Broadcast => chunk.len(),
                    Kind::Singles => 1,
                };
                for first in (0..chunk.len()).step_by(length) {
                    let permit = Arc::clone(&room).acquire_owned().await.expect("never closed");
                    let (line, chunk) = (Arc::clone(&line), Arc::clone(&chunk));
                    units.spawn(async move {
                        line.unit(&chunk[first..first + length]).await;
                        drop(permit);
                    });
                }
            }
        });
        tasks.close();
        tasks.wait().await;
        assert!(!self.duties.refused.load(Ordering::Acquire), "a push was not accepted, or a task ended in a panic");
    }

    /// What the dispatcher does with a chunk: all at once, in one task.
    async fn unit(&self, pushes: &[Push]) {
        let read_at = millis(self.duties.clock.monotonic());
        let mut running: FuturesUnordered<_> = pushes
            .iter()
            .map(async |push| {
                let fence = Ownership { duties: &self.duties, push, read_at: AtomicU64::new(read_at) };
                self.gateway.send(push, &fence).await.outcome
            })
            .collect();
        while let Some(outcome) = running.next().await {
            if outcome != Outcome::Accepted {
                eprintln!("{outcome:?}");
                self.duties.refused.store(true, Ordering::Release);
            }
        }
    }
}

/// What the dispatcher's fences look at: heartbeat, identity, breakers.
struct Duties {
    clock: Arc<dyn Clock>,
    beaten_at: AtomicU64,
    identity: AtomicI64,
    breakers: RwLock<HashSet<(Topic, Environment)>>,
    /// Not the dispatcher's: a push came to something else than accepted.
    refused: AtomicBool,
}

impl Duties {
    /// Beats every second.
    fn new(clock: &Arc<dyn Clock>) -> Arc<Self> {
        let duties = Arc::new(Self {
            clock: Arc::clone(clock),
            beaten_at: AtomicU64::new(millis(clock.monotonic())),
            identity: AtomicI64::new(1),
            breakers: RwLock::default(),
            refused: AtomicBool::new(false),
        });
        let beating = Arc::clone(&duties);
        crate::wire::background(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                beating.beaten_at.store(millis(beating.clock.monotonic()), Ordering::Release);
            }
        });
        duties
    }
}

/// The fence of one push.
struct Ownership<'a> {
    duties: &'a Duties,
    push: &'a Push,
    read_at: AtomicU64,
}

#[async_trait]
impl Fence for Ownership<'_> {
    fn is_open(&self) -> bool {
        self.open_until().is_some()
    }

    fn open_until(&self) -> Option<Duration> {
        let after = |moment: &AtomicU64, seconds| {
            Duration::from_millis(moment.load(Ordering::Acquire)) + Duration::from_secs(seconds)
        };
        let Duties { clock, beaten_at, identity, breakers, .. } = self.duties;
        let until = after(&self.read_at, 1).min(after(beaten_at, 4));
        let open = clock.monotonic() < until
            && identity.load(Ordering::Acquire) == 1
            && clock.monotonic() < after(beaten_at, 4)
            && clock.now() < self.push.head.deadline
            && breakers.read().expect("not poisoned").is_empty();
        open.then_some(until)
    }

    async fn renew(&self) -> bool {
        self.read_at.store(millis(self.duties.clock.monotonic()), Ordering::Release);
        true
    }
}

fn millis(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).expect("not that long")
}
