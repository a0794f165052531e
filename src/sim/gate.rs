//! What can be done to a whole environment while it runs: hold answers, slow them, limit streams, send connections away.
//!
//! Promises: a change reaches open connections at once and new ones from their start.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::{
    conduct::{Conduct, ConductError},
    door::{Connects, Door},
    environment::{Environment, PerEnvironment},
    fault::Answer,
};

/// A word to one connection.
#[derive(Debug, Clone)]
pub(super) enum Command {
    /// Answer what is held.
    Release,
    /// Tell the client this many streams.
    StreamLimit(u32),
    /// Send GOAWAY.
    GoAway(GoAwayOrder),
    /// Conduct yourself so.
    Conduct(Arc<Conduct>),
    /// Go on like this, or say nothing any more.
    Wedge(Wedge),
    /// Neither read nor write any more.
    HalfOpen,
    /// Close TLS and TCP without GOAWAY.
    CloseTls,
    /// Reset the TCP connection.
    Close,
}

/// What a wedged connection does with every request.
#[derive(Debug, Clone)]
pub(super) enum Wedge {
    /// It answers nothing; PING is acknowledged.
    Silence,
    /// It answers this.
    Repeat(Answer),
}

/// A connection to wedge.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WedgeOrder {
    /// The connection; absent: all of the environment.
    #[serde(default)]
    pub connection: Option<u64>,
    /// What every request on it is answered from now on; absent: nothing, while PING still is.
    #[serde(default)]
    pub error: Option<WedgeError>,
}

/// The only answer of a wedged connection.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WedgeError {
    /// The HTTP status.
    pub status: u16,
    /// The reason, in Apple's table or not.
    pub reason: String,
}

/// A GOAWAY to send.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoAwayOrder {
    /// The connection; absent: all of the environment.
    #[serde(default)]
    pub connection: Option<u64>,
    /// The last stream that is processed: those above it are never answered. Absent: graceful, all are.
    #[serde(default)]
    pub last_stream: Option<u32>,
    /// The HTTP/2 error code.
    #[serde(default)]
    pub code: u32,
    /// The debug data, JSON or not; absent: `{"reason":"Shutdown"}`.
    #[serde(default)]
    pub debug: Option<String>,
    /// Whether it is sent two times in a row. (A graceful one is followed by another in any case, as soon as the client
    /// has acknowledged a PING.)
    #[serde(default)]
    pub twice: bool,
    /// The connection stays open afterwards, without ever processing another stream.
    #[serde(default)]
    pub linger: bool,
}

/// How an environment is set now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct GateState {
    /// Whether answers are held.
    pub held: bool,
    /// How long every answer waits.
    pub latency_ms: u64,
    /// `MAX_CONCURRENT_STREAMS` behind the first accepted provider token.
    pub stream_limit: u32,
    /// The same before it.
    pub initial_stream_limit: u32,
    /// What new TCP connections get.
    pub connects: Connects,
    /// Open connections.
    pub open_connections: usize,
}

/// One environment's gate.
#[derive(Debug)]
pub(super) struct Gate {
    held: AtomicBool,
    latency_ms: AtomicU64,
    stream_limit: AtomicU32,
    initial_stream_limit: AtomicU32,
    conduct: RwLock<Arc<Conduct>>,
    door: Door,
    open: Mutex<HashMap<u64, mpsc::UnboundedSender<Command>>>,
}

impl Gate {
    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    pub(super) fn latency(&self) -> Duration {
        Duration::from_millis(self.latency_ms.load(Ordering::Relaxed))
    }

    pub(super) fn stream_limit(&self) -> u32 {
        self.stream_limit.load(Ordering::Acquire)
    }

    pub(super) fn initial_stream_limit(&self) -> u32 {
        self.initial_stream_limit.load(Ordering::Acquire)
    }

    /// The conduct of now.
    pub(super) fn conduct(&self) -> Arc<Conduct> {
        Arc::clone(&self.conduct.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) const fn door(&self) -> &Door {
        &self.door
    }

    /// A connection opens: what is said to it arrives in the channel.
    pub(super) fn enter(&self, connection: u64) -> mpsc::UnboundedReceiver<Command> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(connection, sender);
        receiver
    }

    /// It has closed.
    pub(super) fn leave(&self, connection: u64) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&connection);
    }

    fn tell(&self, only: Option<u64>, command: &Command) -> usize {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let meant = open.iter().filter(|(number, _)| only.is_none_or(|only| only == **number));
        meant.filter(|(_, sender)| sender.send(command.clone()).is_ok()).count()
    }
}

/// The gates of both environments. A clone is another handle on the same gates.
#[derive(Debug, Clone)]
pub struct Gates {
    gates: Arc<PerEnvironment<Gate>>,
}

impl Gates {
    pub(super) fn new(initial_stream_limit: u32, stream_limit: u32, latency: Duration, conduct: Conduct) -> Self {
        let latency_ms = u64::try_from(latency.as_millis()).unwrap_or(u64::MAX);
        let conduct = Arc::new(conduct);
        let gate = |_| Gate {
            held: AtomicBool::new(false),
            latency_ms: AtomicU64::new(latency_ms),
            stream_limit: AtomicU32::new(stream_limit),
            initial_stream_limit: AtomicU32::new(initial_stream_limit),
            conduct: RwLock::new(Arc::clone(&conduct)),
            door: Door::default(),
            open: Mutex::default(),
        };
        Self { gates: Arc::new(PerEnvironment::new(gate)) }
    }

    pub(super) fn of(&self, environment: Environment) -> &Gate {
        self.gates.of(environment)
    }

    /// From now on requests are read and checked, and answered only after [`Gates::release`]: they keep their slots.
    pub fn hold(&self, environment: Environment) {
        self.of(environment).held.store(true, Ordering::Release);
    }

    /// Answers what was held, and answers at once again.
    pub fn release(&self, environment: Environment) {
        let gate = self.of(environment);
        gate.held.store(false, Ordering::Release); // first: whoever still sees it held has the word behind it
        gate.tell(None, &Command::Release);
    }

    /// How long every answer waits, refusals too.
    pub fn set_latency(&self, environment: Environment, latency: Duration) {
        let latency_ms = u64::try_from(latency.as_millis()).unwrap_or(u64::MAX);
        self.of(environment).latency_ms.store(latency_ms, Ordering::Relaxed);
    }

    /// `MAX_CONCURRENT_STREAMS` of every connection with an accepted provider token, open ones by another SETTINGS.
    /// 0 lets nothing through. Streams above the limit are reset with `REFUSED_STREAM` on a connection whose limit has
    /// fallen or whose client has not acknowledged the first SETTINGS; else they cost the connection (GOAWAY 7).
    pub fn set_stream_limit(&self, environment: Environment, limit: u32) {
        let gate = self.of(environment);
        gate.stream_limit.store(limit, Ordering::Release);
        gate.tell(None, &Command::StreamLimit(limit));
    }

    /// `MAX_CONCURRENT_STREAMS` of new connections before their first accepted provider token; Apple's is 1.
    pub fn set_initial_stream_limit(&self, environment: Environment, limit: u32) {
        self.of(environment).initial_stream_limit.store(limit, Ordering::Release);
    }

    /// Sends GOAWAY. Says to how many connections.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn go_away(&self, environment: Environment, order: &GoAwayOrder) -> usize {
        self.of(environment).tell(order.connection, &Command::GoAway(order.clone()))
    }

    /// Resets the TCP connection `connection`, or all. Says how many.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn close(&self, environment: Environment, connection: Option<u64>) -> usize {
        self.of(environment).tell(connection, &Command::Close)
    }

    /// From now on TCP connection `connection`, or all, stay up and are neither read nor written: PING is not acknowledged,
    /// answers that wait never leave. They end with the simulator, when the client closes them, or by
    /// [`Gates::close`]. Says how many.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn half_open(&self, environment: Environment, connection: Option<u64>) -> usize {
        self.of(environment).tell(connection, &Command::HalfOpen)
    }

    /// Wedges connections: requests are read, and answered with one error or not at all. Says how many.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn wedge(&self, environment: Environment, order: &WedgeOrder) -> usize {
        let wedge = order
            .error
            .as_ref()
            .map_or(Wedge::Silence, |error| Wedge::Repeat(Answer::from_parts(error.status, Some(&error.reason), None)));
        self.of(environment).tell(order.connection, &Command::Wedge(wedge))
    }

    /// Closes TLS and TCP of `connection`, or of all, without GOAWAY. Says how many.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn close_tls(&self, environment: Environment, connection: Option<u64>) -> usize {
        self.of(environment).tell(connection, &Command::CloseTls)
    }

    /// What new TCP connections get: until the next order, or only so long. Returns when it is so.
    pub async fn set_connects(&self, environment: Environment, connects: Connects, lasting: Option<Duration>) {
        self.of(environment).door.order(connects, lasting).await;
    }

    /// How the environment conducts itself.
    #[must_use]
    pub fn conduct(&self, environment: Environment) -> Conduct {
        Conduct::clone(&self.of(environment).conduct())
    }

    /// The environment shall conduct itself so, in every respect.
    pub fn set_conduct(&self, environment: Environment, conduct: Conduct) {
        let gate = self.of(environment);
        let mut current = gate.conduct.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(conduct);
        gate.tell(None, &Command::Conduct(Arc::clone(&current)));
    }

    /// The environment shall conduct itself so in what `changes` names; `null` gives a field its default back.
    ///
    /// # Errors
    /// [`ConductError`] if a field or value is unknown; nothing is changed then.
    pub fn change_conduct(
        &self,
        environment: Environment,
        changes: Map<String, Value>,
    ) -> Result<Conduct, ConductError> {
        let gate = self.of(environment);
        let mut conduct = gate.conduct.write().unwrap_or_else(PoisonError::into_inner);
        let new = conduct.with(changes)?;
        *conduct = Arc::new(new.clone());
        gate.tell(None, &Command::Conduct(Arc::clone(&conduct)));
        Ok(new)
    }

    /// How the environment is set now.
    #[must_use]
    pub fn state(&self, environment: Environment) -> GateState {
        let gate = self.of(environment);
        GateState {
            held: gate.is_held(),
            latency_ms: gate.latency_ms.load(Ordering::Relaxed),
            stream_limit: gate.stream_limit(),
            initial_stream_limit: gate.initial_stream_limit(),
            connects: gate.door.connects(),
            open_connections: gate.open.lock().unwrap_or_else(PoisonError::into_inner).len(),
        }
    }
}
