//! One HTTP/2 connection: opening it, and one exchange on it, as the push's own task sees it. The task that owns the
//! connection is in [`super::drive`].
//!
//! Promises: what [`exchange`] returns is honest: [`Ended::GivenBack`] and [`Ended::Unsent`] only if APNs cannot have
//! processed the request (never written, its body never whole, `REFUSED_STREAM`, GOAWAY below its stream),
//! [`Ended::Unknown`] if it may have. The fence is asked with the stream's [`Slot`] in hand, and again whenever the push
//! could not leave soon after.

use std::{
    collections::VecDeque,
    error::Error as _,
    fmt::Write as _,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::task::AtomicWaker;
use h2::client::SendRequest;
use http::uri::{Authority, PathAndQuery};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, sync::oneshot};
use tokio_rustls::TlsConnector;

use super::{
    Fence, Head, Push,
    drive::Body,
    request,
    response::Verdict,
    tls::ALPN_H2,
    token::{Choice, ConnectionToken, Minter, ProviderToken},
    wire::Wire,
};
use crate::domain::{
    clock::{Clock, Timestamp},
    outcome::Reply,
    push::ApnsId,
};

/// TCP to one address.
const TCP_PATIENCE: Duration = Duration::from_secs(5);

/// Lookup, TCP, TLS and the HTTP/2 preface together.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);

/// With so many bytes that the kernel cannot send yet, the socket takes no more.
#[cfg(target_os = "linux")]
const KERNEL_BYTES: u32 = 64 * 1024;

/// How often an old fence is renewed for one write.
const FENCE_RENEWALS: u32 = 3;

/// What a fence said is acted on for so long at most, even if it said that it holds for longer: nobody sees a breaker
/// open or an identity change meanwhile.
const PERMIT_LASTS: Duration = Duration::from_millis(100);

/// Where APNs is.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub(super) authority: Authority,
    pub(super) port: u16,
    pub(super) server_name: ServerName<'static>,
}

/// Why no connection came about. Nothing secret in it.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("`{host}` could not be resolved")]
    Resolve {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("`{host}` has no address")]
    NoAddress { host: String },
    #[error("no TCP connection to {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("the TLS handshake with {address} failed")]
    Tls {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{address} does not speak HTTP/2 over TLS (no `h2` by ALPN): is there a proxy in between, or is the address wrong?"
    )]
    NotHttp2 { address: SocketAddr },
    #[error("the HTTP/2 preface to {address} failed")]
    Preface {
        address: SocketAddr,
        #[source]
        source: h2::Error,
    },
    #[error("no connection within {} s", OPEN_PATIENCE.as_secs())]
    TooSlow,
}

impl OpenError {
    /// This error and what caused it, in one line.
    pub(super) fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            let _ = write!(line, ": {error}");
            source = error.source();
        }
        line
    }
}

/// A connection that is open, before anybody drives it.
pub(super) struct Opened {
    pub(super) handle: SendRequest<Body>,
    pub(super) h2: h2::client::Connection<Wire, Body>,
    pub(super) wire: Wire,
}

/// Opens a connection: a fresh lookup, the addresses in random order, TLS, preface. Dropping the future closes
/// whatever was opened.
pub(super) async fn open(address: &Address, tls: &Arc<ClientConfig>, clock: &dyn Clock) -> Result<Opened, OpenError> {
    within(clock, OPEN_PATIENCE, open_unbounded(address, tls, clock)).await.unwrap_or(Err(OpenError::TooSlow))
}

async fn open_unbounded(address: &Address, tls: &Arc<ClientConfig>, clock: &dyn Clock) -> Result<Opened, OpenError> {
    let host = address.authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut found: Vec<SocketAddr> = tokio::net::lookup_host((bare, address.port))
        .await
        .map_err(|source| OpenError::Resolve { host: host.to_owned(), source })?
        .collect();
    // In random order, so that the connections of many processes spread over Apple's servers.
    for last in (1..found.len()).rev() {
        found.swap(last, rand::random_range(0..=last));
    }
    let mut failure = OpenError::NoAddress { host: host.to_owned() };
    for at in found {
        match open_at(at, address, tls, clock).await {
            Ok(opened) => return Ok(opened),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn open_at(
    at: SocketAddr,
    address: &Address,
    tls: &Arc<ClientConfig>,
    clock: &dyn Clock,
) -> Result<Opened, OpenError> {
    let tcp = within(clock, TCP_PATIENCE, TcpStream::connect(at))
        .await
        .unwrap_or_else(|| Err(std::io::ErrorKind::TimedOut.into()))
        .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
        .map_err(|source| OpenError::Tcp { address: at, source })?;
    keep_little(&tcp);
    let stream = TlsConnector::from(Arc::clone(tls))
        .connect(address.server_name.clone(), tcp)
        .await
        .map_err(|source| OpenError::Tls { address: at, source })?;
    if stream.get_ref().1.alpn_protocol() != Some(ALPN_H2) {
        return Err(OpenError::NotHttp2 { address: at });
    }
    handshake(Wire::new(stream)).await.map_err(|source| OpenError::Preface { address: at, source })
}

/// HTTP/2 on a fresh wire. Sends nothing yet: that is left to whoever drives it.
pub(super) async fn handshake(wire: Wire) -> Result<Opened, h2::Error> {
    let (handle, h2) = h2::client::Builder::new()
        // None before the peer's first SETTINGS: what it allows is then known, and a later raise is told from it.
        .initial_max_send_streams(0)
        .enable_push(false)
        .max_header_list_size(16 * 1024)
        // A reset of ours after a deadline must not be held against the peer's late answer.
        .max_concurrent_reset_streams(4096)
        .max_local_error_reset_streams(None)
        .handshake(wire.clone())
        .await?;
    Ok(Opened { handle, h2, wire })
}

/// Lets the kernel keep little of what cannot be sent yet: it could not be called back.
#[cfg(target_os = "linux")]
fn keep_little(tcp: &TcpStream) {
    // If the kernel does not know it, it keeps what it always does.
    _ = socket2::SockRef::from(tcp).set_tcp_notsent_lowat(KERNEL_BYTES);
}

#[cfg(not(target_os = "linux"))]
const fn keep_little(_: &TcpStream) {}

/// `future`, unless `patience` passes first.
async fn within<F: Future>(clock: &dyn Clock, patience: Duration, future: F) -> Option<F::Output> {
    tokio::select! {
        biased;
        done = future => Some(done),
        () = clock.sleep(patience) => None,
    }
}

/// Whoever keeps the connections: told by a connection's task what happens on it, and asked what it needs.
pub(super) trait Owner: Send + Sync {
    /// The peer allows this many streams from now on.
    fn limit_changed(&self, id: u64, streams: usize);
    /// The peer said GOAWAY: no more streams.
    fn leaving(&self, id: u64, why: &str);
    /// A PING was acknowledged.
    fn pong(&self, id: u64);
    /// These streams are free again, and this came of them.
    fn released(&self, id: u64, notes: &[Note]);
    /// How many seconds APNs' clock is ahead of ours, by an answer's `date`.
    fn skew_measured(&self, seconds: i64);
    /// Called about once a second.
    fn care(&self, id: u64) -> Care;
    /// The connection is gone; what was on it has ended.
    fn ended(&self, id: u64, why: &End);
}

/// What a connection needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    Nothing,
    Ping,
    /// Nothing is in flight and nothing will be: say goodbye.
    Close,
}

/// What became of a slot's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    /// Nothing that says anything about the connection.
    Unused,
    Answered(Verdict),
    TimedOut,
    /// No stream can be opened on the connection any more.
    Over,
}

/// How a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The peer or the network ended it, or we did after [`Connection::close`].
    Closed(Option<h2::Error>),
    /// The socket broke while it was written to.
    Broken(std::io::Error),
    /// A PING was not acknowledged, or the socket took nothing for as long.
    Silent,
    /// This process was stopped while pushes were handed over: what had not left must not leave now.
    Stopped,
    /// It did not finish saying goodbye.
    Stuck,
    /// The process ends.
    Aborted,
}

/// The side of a connection that pushes use.
pub(super) struct Connection {
    pub(super) id: u64,
    owner: Weak<dyn Owner>,
    minter: Arc<Minter>,
    token: Mutex<Token>,
    mail: Mutex<Mail>,
    ping_wanted: AtomicBool,
    close_wanted: AtomicBool,
    pub(super) task: AtomicWaker,
}

#[derive(Debug, Default)]
struct Token {
    rule: ConnectionToken,
    current: Option<Arc<ProviderToken>>,
}

/// What pushes ask of the connection's task.
#[derive(Default)]
struct Mail {
    orders: VecDeque<Order>,
    /// Nobody reads it any more.
    closed: bool,
}

impl Connection {
    pub(super) fn new(id: u64, owner: Weak<dyn Owner>, minter: Arc<Minter>) -> Self {
        Self {
            id,
            owner,
            minter,
            token: Mutex::default(),
            mail: Mutex::default(),
            ping_wanted: AtomicBool::new(false),
            close_wanted: AtomicBool::new(false),
            task: AtomicWaker::new(),
        }
    }

    /// Wants a PING soon.
    pub(super) fn ping(&self) {
        self.ping_wanted.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Whether a PING was wanted since the last call.
    pub(super) fn take_ping(&self) -> bool {
        self.ping_wanted.swap(false, Ordering::AcqRel)
    }

    /// Wants the connection closed once nothing is in flight on it.
    pub(super) fn close(&self) {
        self.close_wanted.store(true, Ordering::Release);
        self.task.wake();
    }

    pub(super) fn is_closing(&self) -> bool {
        self.close_wanted.load(Ordering::Acquire)
    }

    /// Hands an order to the connection's task. Comes back if there is no task any more.
    fn post(&self, order: Order) -> Option<Order> {
        let mut mail = lock(&self.mail);
        if mail.closed {
            return Some(order);
        }
        mail.orders.push_back(order);
        let first = mail.orders.len() == 1;
        drop(mail);
        if first {
            self.task.wake();
        }
        None
    }

    pub(super) fn has_mail(&self) -> bool {
        !lock(&self.mail).orders.is_empty()
    }

    /// What was posted, in its order. `into` is empty, and lends its place in memory.
    pub(super) fn take_mail(&self, into: &mut VecDeque<Order>) {
        std::mem::swap(&mut lock(&self.mail).orders, into);
    }

    /// The same, for the last time.
    pub(super) fn close_mail(&self) -> VecDeque<Order> {
        let mut mail = lock(&self.mail);
        mail.closed = true;
        std::mem::take(&mut mail.orders)
    }

    /// The token for requests that leave now; `None`: this connection may send none, replace it.
    pub(super) fn authorize(&self, now: Timestamp, passed: Duration) -> Option<Arc<ProviderToken>> {
        let mut token = lock(&self.token);
        let slot = match token.rule.advance(now, passed) {
            Choice::Keep(slot) | Choice::Take(slot) => slot,
            Choice::Replace => return None,
        };
        match &token.current {
            Some(current) if current.slot() == slot => Some(Arc::clone(current)),
            _ => {
                let fresh = self.minter.token(slot);
                token.current = Some(Arc::clone(&fresh));
                Some(fresh)
            }
        }
    }

    /// How old the token is that a request would carry now.
    pub(super) fn token_age(&self, clock: &dyn Clock) -> Option<Duration> {
        match lock(&self.token).rule.choose(clock.now(), clock.monotonic()) {
            Choice::Keep(slot) | Choice::Take(slot) => slot.age(clock.now()),
            Choice::Replace => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to one stream of a connection. Given back when dropped.
pub(super) struct Slot {
    connection: Arc<Connection>,
    spent: bool,
}

impl Slot {
    pub(super) const fn new(connection: Arc<Connection>) -> Self {
        Self { connection, spent: false }
    }

    /// The owner is told in another way that the stream is free.
    pub(super) fn spend(mut self) {
        self.spent = true;
    }

    /// Of which connection.
    pub(super) fn connection(&self) -> u64 {
        self.connection.id
    }

    fn give_back(self, note: Note) {
        if let Some(owner) = self.connection.owner.upgrade() {
            owner.released(self.connection.id, &[note]);
        }
        self.spend();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.spent
            && let Some(owner) = self.connection.owner.upgrade()
        {
            owner.released(self.connection.id, &[Note::Unused]);
        }
    }
}

/// What a push asks of the connection's task.
pub(super) enum Order {
    /// Open a stream for this request.
    Begin(Begin),
    /// The fence was asked again.
    GoOn { key: Key, permit: Permit, reply: oneshot::Sender<Word> },
    /// The fence refused the rest.
    TakeBack { key: Key },
}

/// A push and its right to leave.
pub(super) struct Begin {
    pub(super) slot: Slot,
    pub(super) head: Arc<Head>,
    pub(super) path: PathAndQuery,
    pub(super) apns_id: ApnsId,
    pub(super) permit: Permit,
    /// As [`Gate::answer_by`].
    pub(super) answer_by: Option<Duration>,
    pub(super) reply: oneshot::Sender<Word>,
}

/// Names a stream between the two tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) place: usize,
    /// Places are used again.
    pub(super) serial: u64,
}

/// What the connection's task says to a push.
pub(super) enum Word {
    /// It took too long to get here. Nothing was done: ask the fence again.
    Late(Slot),
    /// The head has left, and now there is room for the body: ask the fence again.
    Ask(Key),
    /// It is over.
    Ended(Ended),
}

/// How one exchange ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// APNs answered.
    Answered(Reply),
    /// APNs cannot have processed it: here or elsewhere it may be sent at once. `answer_by`: until when its answer would
    /// have been waited for, if it got so far.
    GivenBack { answer_by: Option<Duration> },
    /// APNs cannot have processed it, and there is no time for another try.
    Unsent,
    /// It may have. When the request left.
    Unknown { sent_at: Timestamp },
    /// The fence refused it.
    Fenced,
}

/// What stands between a push and its first byte.
pub(super) struct Gate<'a> {
    pub(super) fence: &'a dyn Fence,
    pub(super) clock: &'a dyn Clock,
    /// Nothing is written at or after this moment.
    pub(super) deadline: Timestamp,
    /// An answer is not waited for past this moment of the monotonic clock; `None`: for a whole request deadline.
    pub(super) answer_by: Option<Duration>,
    /// Nothing is written any more.
    pub(super) stopped: &'a AtomicBool,
}

/// What the gate said, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Permit {
    asked_at: Timestamp,
    /// On the monotonic clock; zero: at that instant only.
    until: Duration,
    deadline: Timestamp,
}

impl Permit {
    /// Whether the push may leave at this moment. `at_once`: nothing has been waited for since the fence was asked.
    pub(super) fn holds(&self, now: Timestamp, passed: Duration, at_once: bool) -> bool {
        let fence_holds = passed < self.until || at_once && self.until.is_zero();
        fence_holds && now.since(self.asked_at) < PERMIT_LASTS && now < self.deadline
    }
}

impl Gate<'_> {
    async fn pass(&self) -> Result<Permit, Ended> {
        for renewals in 0..=FENCE_RENEWALS {
            let asked_at = self.clock.now();
            let late = asked_at >= self.deadline || self.answer_by.is_some_and(|by| self.clock.monotonic() >= by);
            if late || self.stopped.load(Ordering::Acquire) {
                return Err(Ended::Unsent);
            }
            if let Some(until) = self.fence.open_until() {
                return Ok(Permit { asked_at, until, deadline: self.deadline });
            }
            if renewals < FENCE_RENEWALS && !self.fence.renew().await {
                return Err(Ended::Fenced);
            }
        }
        // What is known grows old faster than it is found out: later.
        Err(Ended::Unsent)
    }
}

/// Sends one push in the slot and waits for what comes of it.
///
/// Not to be dropped once the gate was passed: the push may then be written and unanswered.
pub(super) async fn exchange(slot: Slot, push: &Push, gate: &Gate<'_>) -> Ended {
    let connection = Arc::clone(&slot.connection);
    let mut slot = slot;
    let mut answer = loop {
        let permit = match gate.pass().await {
            Ok(permit) => permit,
            Err(refused) => return refused,
        };
        let Ok(path) = request::path(&push.token) else {
            return Ended::Unsent;
        };
        let (reply, answer) = oneshot::channel();
        let Gate { answer_by, .. } = *gate;
        let begin = Begin { slot, head: Arc::clone(&push.head), path, apns_id: push.apns_id, permit, answer_by, reply };
        if let Some(Order::Begin(begin)) = connection.post(Order::Begin(begin)) {
            begin.slot.give_back(Note::Over);
            return Ended::GivenBack { answer_by };
        }
        match answer.await {
            Ok(Word::Late(unused)) => slot = unused,
            other => break other,
        }
    };
    loop {
        match answer {
            Ok(Word::Ended(ended)) => return ended,
            Ok(Word::Ask(key)) => {
                let permit = match gate.pass().await {
                    Ok(permit) => permit,
                    Err(refused) => {
                        // If there is no task any more, there is nothing to take back.
                        _ = connection.post(Order::TakeBack { key });
                        return refused;
                    }
                };
                let (reply, next) = oneshot::channel();
                if connection.post(Order::GoOn { key, permit, reply }).is_some() {
                    return Ended::GivenBack { answer_by: gate.answer_by };
                }
                answer = next.await;
            }
            // Only a task that was cut off in the middle says nothing: the push may have left.
            Ok(Word::Late(_)) | Err(_) => return Ended::Unknown { sent_at: gate.clock.now() },
        }
    }
}
