//! One HTTP/2 connection: opening it, the task that owns it, and one exchange on it.
//!
//! Promises:
//!
//! - No stream before the peer's first SETTINGS. Every SETTINGS frame that changes the limit is reported to the
//!   [`Owner`] right after the poll that read it, and so is a GOAWAY. A connection that was told GOAWAY opens no stream.
//! - What [`exchange`] returns is honest: [`Ended::Unsent`] only if APNs cannot have processed the request (never
//!   written, its body never handed over, `REFUSED_STREAM`, GOAWAY below its stream), [`Ended::Unknown`] if it may have.
//! - The fence and the deadline are asked with the stream's slot in hand before HEADERS, and again before DATA. A
//!   request without its body cannot be accepted, so a push that is refused between the two is taken back by a reset.
//!
//! On `h2` 0.4.20: a stream gets capacity for its body only once the connection's task has opened it within the peer's
//! limit, so a push that raced with a falling limit waits in front of the second fence, not behind it. A stream's error
//! `is_go_away() && is_remote()` is given only to streams above the GOAWAY's last-stream-id (`Streams::recv_go_away`);
//! what is at or below goes on, and gets an I/O error if the connection ends first.

use std::{
    error::Error as _,
    fmt::Write as _,
    future::{Future as _, poll_fn},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use h2::{
    Ping, PingPong, Reason as H2Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request, uri::Authority};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

use super::{
    Fence,
    response::MAX_BODY_BYTES,
    tls::ALPN_H2,
    token::{Choice, ConnectionToken, Minter, ProviderToken},
};
use crate::domain::clock::{Clock, Timer, Timestamp};

/// How often a connection's task looks at its timers.
const TICK: Duration = Duration::from_secs(1);

/// A PING that is not acknowledged within this time ends the connection.
const PING_PATIENCE: Duration = Duration::from_secs(10);

/// A connection that has nothing in flight any more has this long to say goodbye.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// TCP to one address.
const TCP_PATIENCE: Duration = Duration::from_secs(5);

/// Lookup, TCP, TLS and the HTTP/2 preface together.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);

/// How often an old fence is renewed for one write.
const FENCE_RENEWALS: u32 = 3;

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

/// A connection that has said its preface, before anybody drives it.
pub(super) struct Opened {
    handle: SendRequest<Bytes>,
    h2: h2::client::Connection<TlsStream<TcpStream>, Bytes>,
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
    let stream = TlsConnector::from(Arc::clone(tls))
        .connect(address.server_name.clone(), tcp)
        .await
        .map_err(|source| OpenError::Tls { address: at, source })?;
    if stream.get_ref().1.alpn_protocol() != Some(ALPN_H2) {
        return Err(OpenError::NotHttp2 { address: at });
    }
    let (handle, h2) = h2::client::Builder::new()
        // None before the peer's first SETTINGS: what it allows is then known, and a later raise is told from it.
        .initial_max_send_streams(0)
        .enable_push(false)
        .max_header_list_size(16 * 1024)
        // A reset of ours after a deadline must not be held against the peer's late answer.
        .max_concurrent_reset_streams(4096)
        .max_local_error_reset_streams(None)
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(|source| OpenError::Preface { address: at, source })?;
    Ok(Opened { handle, h2 })
}

/// `future`, unless `patience` passes first.
async fn within<F: Future>(clock: &dyn Clock, patience: Duration, future: F) -> Option<F::Output> {
    tokio::select! {
        biased;
        done = future => Some(done),
        () = clock.sleep(patience) => None,
    }
}

/// What a connection's task tells whoever keeps the connections, and asks it.
pub(super) trait Owner: Send + Sync {
    /// The peer allows this many streams from now on.
    fn limit_changed(&self, id: u64, streams: usize);
    /// The peer said GOAWAY: no more streams.
    fn leaving(&self, id: u64, why: &str);
    /// A PING was acknowledged.
    fn pong(&self, id: u64);
    /// Called about once a second.
    fn care(&self, id: u64) -> Care;
    /// The connection is gone; what was in flight has got its error.
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

/// How a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The peer or the network ended it, or we did after [`Connection::close`].
    Closed(Option<h2::Error>),
    /// A PING was not acknowledged.
    Silent,
    /// It did not finish saying goodbye.
    Stuck,
    /// The process ends.
    Aborted,
}

/// The side of a connection that requests use.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: u64,
    handle: Mutex<Option<SendRequest<Bytes>>>,
    token: Mutex<Token>,
    ping_wanted: AtomicBool,
    close_wanted: AtomicBool,
    task: AtomicWaker,
}

#[derive(Debug, Default)]
struct Token {
    rule: ConnectionToken,
    current: Option<Arc<ProviderToken>>,
}

impl Connection {
    pub(super) fn new(id: u64, opened: &Opened) -> Self {
        Self {
            id,
            handle: Mutex::new(Some(opened.handle.clone())),
            token: Mutex::default(),
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

    /// Wants the connection closed once nothing is in flight on it.
    pub(super) fn close(&self) {
        drop(lock(&self.handle).take());
        self.close_wanted.store(true, Ordering::Release);
        self.task.wake();
    }

    /// The token for a request that leaves now; `None`: this connection may send none, replace it.
    fn authorize(&self, minter: &Minter, clock: &dyn Clock) -> Option<Arc<ProviderToken>> {
        let mut token = lock(&self.token);
        let slot = match token.rule.advance(clock.now(), clock.monotonic()) {
            Choice::Keep(slot) | Choice::Take(slot) => slot,
            Choice::Replace => return None,
        };
        match &token.current {
            Some(current) if current.slot() == slot => Some(Arc::clone(current)),
            _ => {
                let fresh = minter.token(slot);
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

/// Drives a connection until it ends: the one task that owns it. Cancelled by `abort`; what is in flight then ends as
/// after a cut.
pub(super) async fn drive(
    connection: Arc<Connection>,
    opened: Opened,
    owner: impl Owner,
    clock: Arc<dyn Clock>,
    abort: CancellationToken,
) {
    let Opened { handle, mut h2 } = opened;
    let pings = h2.ping_pong();
    let mut driver = Driver {
        limit: h2.max_concurrent_send_streams(),
        h2,
        probe: Some(handle),
        pings,
        pinged_at: None,
        closing_since: None,
        tick: clock.sleep(TICK),
        connection: &connection,
        owner: &owner,
        clock: &*clock,
    };
    let mut aborted = pin!(abort.cancelled());
    let end = poll_fn(|cx| {
        if aborted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Aborted);
        }
        driver.poll(cx)
    })
    .await;
    // Dropping the connection gives every stream its error, before the owner hears of it.
    drop(driver);
    drop(lock(&connection.handle).take());
    owner.ended(connection.id, &end);
}

struct Driver<'a> {
    h2: h2::client::Connection<TlsStream<TcpStream>, Bytes>,
    /// Asked after each poll whether streams may still be opened. Opens none itself.
    probe: Option<SendRequest<Bytes>>,
    pings: Option<PingPong>,
    limit: usize,
    pinged_at: Option<Duration>,
    closing_since: Option<Duration>,
    tick: Timer,
    connection: &'a Connection,
    owner: &'a dyn Owner,
    clock: &'a dyn Clock,
}

impl Driver<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let id = self.connection.id;
        self.connection.task.register(cx.waker());
        if self.closing_since.is_none() && self.connection.close_wanted.load(Ordering::Acquire) {
            self.closing_since = Some(self.clock.monotonic());
            self.probe = None;
        }
        if self.connection.ping_wanted.swap(false, Ordering::AcqRel) {
            self.ping();
        }
        if let Poll::Ready(result) = Pin::new(&mut self.h2).poll(cx) {
            return Poll::Ready(End::Closed(result.err()));
        }
        let limit = self.h2.max_concurrent_send_streams();
        if limit != self.limit {
            self.limit = limit;
            self.owner.limit_changed(id, limit);
        }
        if let Some(Poll::Ready(Err(error))) = self.probe.as_mut().map(|p| p.poll_ready(cx)) {
            self.probe = None;
            self.owner.leaving(id, &error.to_string());
        }
        if self.pinged_at.is_some()
            && let Some(Poll::Ready(Ok(_))) = self.pings.as_mut().map(|p| p.poll_pong(cx))
        {
            self.pinged_at = None;
            self.owner.pong(id);
        }
        while self.tick.as_mut().poll(cx).is_ready() {
            self.tick = self.clock.sleep(TICK);
            let now = self.clock.monotonic();
            let over =
                |since: Option<Duration>, patience| since.is_some_and(|since| now.saturating_sub(since) >= patience);
            if over(self.pinged_at, PING_PATIENCE) {
                return Poll::Ready(End::Silent);
            }
            if over(self.closing_since, CLOSE_PATIENCE) {
                return Poll::Ready(End::Stuck);
            }
            match self.owner.care(id) {
                Care::Nothing => {}
                Care::Ping => self.ping(),
                Care::Close => self.connection.close(),
            }
        }
        Poll::Pending
    }

    fn ping(&mut self) {
        if self.pinged_at.is_none()
            && let Some(pings) = &mut self.pings
            && pings.send_ping(Ping::opaque()).is_ok()
        {
            self.pinged_at = Some(self.clock.monotonic());
        }
    }
}

/// How one exchange ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// APNs answered.
    Answered { status: u16, headers: HeaderMap, body: Bytes, sent_at: Timestamp },
    /// APNs cannot have processed it.
    Unsent,
    /// The same, and the connection opens no more streams.
    UnsentForGood,
    /// It may have.
    Unknown {
        sent_at: Timestamp,
        /// The request deadline passed; otherwise the stream broke.
        timed_out: bool,
    },
    /// The fence refused it.
    Fenced,
}

/// What stands between a push and its first byte.
pub(super) struct Gate<'a> {
    pub(super) fence: &'a dyn Fence,
    pub(super) clock: &'a dyn Clock,
    /// Nothing is written at or after this moment.
    pub(super) deadline: Timestamp,
    /// Nothing is written any more.
    pub(super) stopped: &'a AtomicBool,
}

impl Gate<'_> {
    async fn pass(&self) -> Result<(), Ended> {
        for renewals in 0..=FENCE_RENEWALS {
            if self.stopped.load(Ordering::Acquire) || self.clock.now() >= self.deadline {
                return Err(Ended::Unsent);
            }
            if self.fence.is_open() {
                return Ok(());
            }
            if renewals < FENCE_RENEWALS && !self.fence.renew().await {
                return Err(Ended::Fenced);
            }
        }
        // What is known grows old faster than it is found out: later.
        Err(Ended::Unsent)
    }
}

/// Sends one request and waits for its answer, `patience` from the write at most.
///
/// Not to be dropped once the gate was passed: the push may then be written and unanswered.
pub(super) async fn exchange(
    connection: &Connection,
    minter: &Minter,
    gate: &Gate<'_>,
    prepare: impl FnOnce(&ProviderToken) -> Option<Request<()>>,
    mut payload: Bytes,
    patience: Duration,
) -> Ended {
    if let Err(refused) = gate.pass().await {
        return refused;
    }
    let Some(token) = connection.authorize(minter, gate.clock) else {
        return Ended::UnsentForGood;
    };
    let Some(request) = prepare(&token) else {
        return Ended::Unsent;
    };
    // A clone for each request: a handle remembers the stream it opened last, and refuses the next one for it.
    let Some(mut handle) = lock(&connection.handle).clone() else {
        return Ended::UnsentForGood;
    };
    let sent_at = gate.clock.now();
    let Ok((response, mut body)) = handle.send_request(request, payload.is_empty()) else {
        return Ended::UnsentForGood;
    };
    drop(handle);
    let mut exchange = Exchange { response, timer: gate.clock.sleep(patience) };
    body.reserve_capacity(payload.len());
    while !payload.is_empty() {
        match exchange.step(&mut body).await {
            Step::Room(room) => {
                if let Err(refused) = gate.pass().await {
                    body.send_reset(H2Reason::CANCEL);
                    return refused;
                }
                let piece = payload.split_to(room.min(payload.len()));
                if body.send_data(piece, payload.is_empty()).is_err() {
                    // The stream is closed already; its end says how.
                    return match exchange.answer().await {
                        Some(Ok(response)) => exchange.read(response, sent_at).await,
                        _ => Ended::Unsent,
                    };
                }
            }
            Step::Answer(Ok(response)) => return exchange.read(response, sent_at).await,
            Step::Answer(Err(_)) => return Ended::Unsent,
            Step::TooLate => {
                body.send_reset(H2Reason::CANCEL);
                return Ended::Unsent;
            }
        }
    }
    match exchange.answer().await {
        Some(Ok(response)) => exchange.read(response, sent_at).await,
        Some(Err(error)) if never_processed(&error) => Ended::Unsent,
        Some(Err(_)) => Ended::Unknown { sent_at, timed_out: false },
        None => {
            body.send_reset(H2Reason::CANCEL);
            Ended::Unknown { sent_at, timed_out: true }
        }
    }
}

/// Whether the peer itself says that it did nothing with the request.
fn never_processed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || (error.is_reset() && error.reason() == Some(H2Reason::REFUSED_STREAM)))
}

type Response = http::Response<RecvStream>;

enum Step {
    Answer(Result<Response, h2::Error>),
    Room(usize),
    TooLate,
}

struct Exchange {
    response: ResponseFuture,
    timer: Timer,
}

impl Exchange {
    /// Waits for room for the body, or for an answer that does not wait for it.
    async fn step(&mut self, body: &mut SendStream<Bytes>) -> Step {
        poll_fn(|cx| {
            if let Poll::Ready(answer) = Pin::new(&mut self.response).poll(cx) {
                return Poll::Ready(Step::Answer(answer));
            }
            // `None` and errors: the stream is closed, and its answer is about to say why.
            if let Poll::Ready(Some(Ok(room))) = body.poll_capacity(cx) {
                return Poll::Ready(Step::Room(room));
            }
            self.timer.as_mut().poll(cx).map(|()| Step::TooLate)
        })
        .await
    }

    /// Waits for the head of the answer; `None` if the deadline passes first.
    async fn answer(&mut self) -> Option<Result<Response, h2::Error>> {
        poll_fn(|cx| {
            if let Poll::Ready(answer) = Pin::new(&mut self.response).poll(cx) {
                return Poll::Ready(Some(answer));
            }
            self.timer.as_mut().poll(cx).map(|()| None)
        })
        .await
    }

    /// Reads an answer's body, as far as it comes within the deadline and the bound: the status alone has a meaning.
    async fn read(&mut self, response: Response, sent_at: Timestamp) -> Ended {
        let (head, mut stream) = response.into_parts();
        let mut body = BytesMut::new();
        if head.status != http::StatusCode::OK {
            while body.len() < MAX_BODY_BYTES {
                let piece = poll_fn(|cx| {
                    if let Poll::Ready(piece) = stream.poll_data(cx) {
                        return Poll::Ready(piece);
                    }
                    self.timer.as_mut().poll(cx).map(|()| None)
                })
                .await;
                let Some(Ok(mut piece)) = piece else { break };
                let _ = stream.flow_control().release_capacity(piece.len());
                piece.truncate(MAX_BODY_BYTES - body.len());
                body.extend_from_slice(&piece);
            }
        }
        Ended::Answered { status: head.status.as_u16(), headers: head.headers, body: body.freeze(), sent_at }
    }
}
