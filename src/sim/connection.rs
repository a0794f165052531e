//! One HTTP/2 connection: requests in, checks, answers out, all in the connection's own task.
//!
//! Promises: a push that nothing delays is answered in the same turn in which its body was complete, without a task or a
//! timer. The stream limit is counted here, from the moment a stream's headers are read until its answer is
//! handed to `h2`; streams beyond it get what APNs gives them. A push is in the ledger as accepted exactly when its 200
//! was handed over, or when a script said so; how every request received whole ended is in the ledger too, also when
//! the connection ends first.

mod answers;
mod sender;
mod silence;
mod streams;
mod wedge;
mod windows;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::future::poll_fn;
use h2::{
    Ping, PingPong, RecvStream,
    server::{self, SendResponse},
};
use http::{HeaderName, Method, Response, StatusCode, header, request::Parts};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::server::TlsStream;
use uuid::Uuid;

use self::{streams::StreamLimit, windows::Windows};
use super::{
    State, check,
    client_certificate::KnownCertificate,
    conduct::{Conduct, MessageId},
    environment::Environment,
    fault::{Answer, Fault, FaultAction, LastStream, SHUTDOWN_DEBUG},
    frames::{Completing, GoAway, Orders},
    gate::{Command, GoAwayOrder, Wedge},
    identifiers::{self, Identifiers},
    ledger::{Attempt, ConnectionRecord, Entry, Stalled, Tally, TokenRecord, count},
    provider_token::{ConnectionTokens, Judge},
    reason::Reason,
    receipts::Receipts,
};
use crate::domain::clock::{Timer, Timestamp};

const HEADER_TABLE_BYTES: u32 = 4096;
const FRAME_BYTES: u32 = 16_384;
const HEADER_LIST_BYTES: u32 = 8000;
/// A body longer than this is answered before it ends.
const MAX_READ_BYTES: usize = 64 * 1024;
/// The debug data of the GOAWAY for too many streams (pushy 356).
const TOO_MANY_STREAMS: &str = "Maximum active streams violated for this endpoint.";

static UNIQUE_ID: HeaderName = HeaderName::from_static("apns-unique-id");

/// A request whose body is not complete.
struct Arriving {
    head: Parts,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    received: Received,
    stream: u32,
}

/// What has come of a body.
enum Received {
    Nothing,
    One(Bytes),
    Many(BytesMut),
}

impl Received {
    fn add(&mut self, more: Bytes) {
        *self = match std::mem::replace(self, Self::Nothing) {
            Self::Nothing => Self::One(more),
            Self::One(first) => {
                let mut whole = BytesMut::from(first.as_ref());
                whole.extend_from_slice(&more);
                Self::Many(whole)
            }
            Self::Many(mut whole) => {
                whole.extend_from_slice(&more);
                Self::Many(whole)
            }
        };
    }

    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::One(bytes) => bytes.len(),
            Self::Many(bytes) => bytes.len(),
        }
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(bytes) => bytes,
            Self::Many(bytes) => bytes.freeze(),
        }
    }
}

/// A request received whole.
struct Whole<'a> {
    head: Parts,
    body: Bytes,
    respond: SendResponse<Bytes>,
    stream: u32,
    /// Its `apns-id`: its own, or one made for it.
    id: Uuid,
    id_made: bool,
    attempt: Attempt<'a>,
}

/// A stream that is never answered.
struct Silent<'a> {
    respond: SendResponse<Bytes>,
    stream: u32,
    /// Nothing came of the request, and the client has not been told.
    stalled: Option<Stalled<'a>>,
}

/// A request whose answer waits.
struct Waiting<'a> {
    request: Whole<'a>,
    action: FaultAction,
}

/// Asks the client what it has read.
struct Prover {
    ping: Option<PingPong>,
    receipts: Arc<Receipts>,
}

impl Prover {
    /// Sends a PING behind what was told and is not proved. Says whether there is one to write.
    fn ask(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(ping) = &mut self.ping else { return false };
        // Its acknowledgement is seen by `frames`; here it frees the way for the next, and wakes us for it.
        let _acknowledged = ping.poll_pong(cx);
        self.receipts.wants_ping() && ping.send_ping(Ping::opaque()).is_ok()
    }
}

/// Whether the connection goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    End,
    /// It stays, and nothing goes on any more.
    HalfOpen,
}

/// Serves one connection until it ends or the simulator stops.
pub(super) async fn serve(state: Arc<State>, environment: Environment, stream: TlsStream<TcpStream>) {
    let record = state.ledger.connection_opened(environment, state.clock.now());
    let gate = state.gates.of(environment);
    let mut commands = gate.enter(record.number);
    let conduct = gate.conduct();
    let presented = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = presented.map(|presented| state.client_certificates.check(presented, environment));
    let initial = if certificate.is_some() { gate.stream_limit() } else { gate.initial_stream_limit() };
    let limit = initial.min(gate.stream_limit());
    let orders = Orders::new(limit);
    let receipts = Receipts::new(state.ledger.clone());
    let windows = conduct.windows();
    orders.set_read_bytes_per_second(conduct.read_bytes_per_second);
    let mut builder = server::Builder::new();
    builder
        .header_table_size(HEADER_TABLE_BYTES)
        .initial_window_size(windows.0)
        .initial_connection_window_size(windows.1)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .data_frame_budget(usize::MAX)
        .max_concurrent_reset_streams(10_000)
        .max_pending_accept_reset_streams(10_000)
        .max_local_error_reset_streams(None);
    let greeted = silence::before_settings(&state, conduct.settings, stream, &mut commands).await;
    let handshake = match greeted {
        Some(stream) => {
            let traffic = Arc::clone(&state.ledger.tally(environment).traffic);
            let clock = Arc::clone(&state.clock);
            let stream = Completing::new(stream, Arc::clone(&orders), Arc::clone(&receipts), traffic, clock);
            tokio::select! {
                () = state.stop.cancelled() => None,
                done = builder.handshake::<_, Bytes>(stream) => Some(done),
            }
        }
        None => None,
    };
    match handshake {
        Some(Ok(mut h2)) => {
            let prover = Prover { ping: h2.ping_pong(), receipts };
            let connection = Connection {
                environment,
                record: Arc::clone(&record),
                orders,
                h2,
                prover,
                commands,
                certificate,
                tokens: ConnectionTokens::default(),
                token_record: None,
                identifiers: Identifiers::new(),
                windows: Windows::new(
                    Arc::clone(&state.clock),
                    windows.0,
                    Duration::from_millis(conduct.window_updates_after_ms),
                ),
                conduct,
                wedge: None,
                last_active: state.clock.monotonic(),
                is_expired: false,
                errors: 0,
                limit: StreamLimit::new(initial, limit),
                highest: 0,
                is_violated: false,
                last_processed: None,
                highest_processed: 0,
                open: 0,
                arriving: Vec::new(),
                still_arriving: Vec::new(),
                held: Vec::new(),
                due: BTreeMap::new(),
                due_count: 0,
                timer: None,
                silent: Vec::new(),
                ignored: Vec::new(),
                topic: Arc::from(""),
                state: &state,
            };
            connection.run().await;
        }
        Some(Err(error)) => {
            tracing::debug!(connection = record.number, error = %error, "no HTTP/2 connection was made");
        }
        None => {}
    }
    gate.leave(record.number);
    state.ledger.connection_closed(&record, state.clock.now());
}

struct Connection<'a> {
    state: &'a State,
    environment: Environment,
    record: Arc<ConnectionRecord>,
    orders: Arc<Orders>,
    h2: server::Connection<Completing, Bytes>,
    prover: Prover,
    commands: mpsc::UnboundedReceiver<Command>,
    /// The client's certificate, if it presented one, as it was known then.
    certificate: Option<Result<Arc<KnownCertificate>, Reason>>,
    tokens: ConnectionTokens,
    token_record: Option<Arc<TokenRecord>>,
    identifiers: Identifiers,
    conduct: Arc<Conduct>,
    windows: Windows,
    /// What every request gets instead of what it deserves.
    wedge: Option<Wedge>,
    /// When something was last asked or answered, on the monotonic clock; kept while there is an idle timeout.
    last_active: Duration,
    /// The connection was idle for too long.
    is_expired: bool,
    /// Refusals that weigh on the client.
    errors: u32,
    limit: StreamLimit,
    /// The highest stream the client has opened.
    highest: u32,
    /// The client has broken the limit; the connection is on its way out.
    is_violated: bool,
    /// GOAWAY has named this stream: those above are not processed.
    last_processed: Option<u32>,
    /// The highest stream that was answered, or accepted without an answer.
    highest_processed: u32,
    /// Streams that are open.
    open: usize,
    arriving: Vec<Arriving>,
    /// Kept only for its allocation.
    still_arriving: Vec<Arriving>,
    held: Vec<Waiting<'a>>,
    /// By the time when they are due, on the monotonic clock, and by order.
    due: BTreeMap<(Duration, u64), Waiting<'a>>,
    due_count: u64,
    timer: Option<(Duration, Timer)>,
    /// Streams that are never answered and keep their slots.
    silent: Vec<Silent<'a>>,
    /// Streams that came behind a GOAWAY that named an earlier one: never looked at.
    ignored: Vec<SendResponse<Bytes>>,
    /// The last topic, so that the ledger's entries share it.
    topic: Arc<str>,
}

/// What ended a wait.
enum Event {
    Stop,
    Command(Option<Command>),
    Due,
    Batch(Flow),
}

impl<'a> Connection<'a> {
    async fn run(mut self) {
        let state = self.state;
        let mut whole = Vec::new();
        loop {
            self.set_timer();
            let event = tokio::select! {
                biased;
                () = state.stop.cancelled() => Event::Stop,
                command = self.commands.recv() => Event::Command(command),
                () = async { match &mut self.timer { Some((_, timer)) => timer.await, None => std::future::pending().await } } => Event::Due,
                flow = poll_fn(|cx| poll_batch(&mut self.h2, &mut self.arriving, &mut self.limit, &mut self.windows, &self.orders, &mut self.prover, cx)) => Event::Batch(flow),
            };
            let flow = match event {
                Event::Stop => {
                    self.h2.abrupt_shutdown(h2::Reason::NO_ERROR);
                    poll_fn(|cx| Poll::Ready(self.h2.poll_closed(cx).is_ready())).await; // one try: nobody waits for a slow reader
                    Flow::End
                }
                Event::Command(Some(command)) => self.obey(command),
                Event::Due => self.answer_due(),
                Event::Command(None) => Flow::End,
                Event::Batch(Flow::Continue) => {
                    self.refuse_surplus();
                    poll_fn(|cx| {
                        self.read_bodies(cx, &mut whole);
                        Poll::Ready(())
                    })
                    .await;
                    self.take_batch(&mut whole)
                }
                Event::Batch(flow) => flow,
            };
            match flow {
                Flow::Continue => continue,
                Flow::End => {}
                Flow::HalfOpen => self.lie_half_open().await,
            }
            break;
        }
        let lost = self.open.saturating_sub(self.silent.len());
        if lost > 0 {
            tracing::debug!(connection = self.record.number, streams = lost, "the connection ended with open streams");
        }
    }

    fn tally(&self) -> &Tally {
        self.state.ledger.tally(self.environment)
    }

    /// Admits new streams against the limit and reads what has come of every body.
    fn read_bodies(&mut self, cx: &mut Context<'_>, whole: &mut Vec<Whole<'a>>) {
        let mut arriving = std::mem::take(&mut self.arriving);
        let mut still = std::mem::take(&mut self.still_arriving);
        for mut request in arriving.drain(..) {
            if request.stream == 0 {
                request.stream = request.respond.stream_id().as_u32();
                if !self.admit(&mut request, cx) {
                    if self.last_processed.is_some() {
                        self.ignored.push(request.respond); // dropping it would reset the stream
                    }
                    continue;
                }
            }
            match poll_body(&mut request, &mut self.windows, cx) {
                Poll::Ready(true) => {
                    whole.push(self.receive(request));
                }
                Poll::Ready(false) => {
                    self.open -= 1;
                    count(&self.tally().cancelled);
                }
                Poll::Pending => still.push(request),
            }
        }
        self.arriving = still;
        self.still_arriving = arriving;
    }

    /// Enters a request into the ledger.
    fn receive(&mut self, request: Arriving) -> Whole<'a> {
        let Arriving { head, respond, received, stream, .. } = request;
        let own = head.headers.get(&check::ID).and_then(|id| identifiers::canonical(id.as_bytes()));
        let (id, id_made) = own.map_or_else(|| (self.identifiers.next(), true), |id| (id, false));
        let token = check::place(head.uri.path());
        let attempt = self.state.ledger.records().receive(self.environment, token, id, id_made);
        Whole { head, body: received.into_bytes(), respond, stream, id, id_made, attempt }
    }

    /// Counts a new stream. `false`: it is not processed, and has been told so.
    fn admit(&mut self, request: &mut Arriving, cx: &mut Context<'_>) -> bool {
        if self.is_violated || self.last_processed.is_some_and(|last| request.stream > last) {
            return false;
        }
        self.highest = self.highest.max(request.stream);
        self.note_request();
        self.open += 1;
        if self.limit.allows(self.open) {
            return true;
        }
        self.sweep(cx);
        if self.limit.allows(self.open) {
            return true;
        }
        self.open -= 1;
        if self.limit.has_fallen || self.orders.is_unaware(request.stream) {
            count(&self.tally().reset);
            request.respond.send_reset(h2::Reason::REFUSED_STREAM);
        } else {
            count(&self.tally().stream_limit_violations);
            tracing::info!(
                connection = self.record.number,
                limit = self.limit.told,
                "the client opened more streams than allowed"
            );
            self.is_violated = true;
            self.orders.set_go_away(GoAway {
                last_stream: None,
                code: None,
                debug: Bytes::from_static(TOO_MANY_STREAMS.as_bytes()),
                twice: false,
            });
            self.h2.abrupt_shutdown(h2::Reason::REFUSED_STREAM);
        }
        false
    }

    /// Forgets waiting streams that the client has reset, which freed their slots.
    fn sweep(&mut self, cx: &mut Context<'_>) {
        let mut gone = 0;
        let mut is_open = |respond: &mut SendResponse<Bytes>| {
            let open = respond.poll_reset(cx).is_pending();
            gone += usize::from(!open);
            open
        };
        self.held.retain_mut(|waiting| is_open(&mut waiting.request.respond));
        self.due.retain(|_, waiting| is_open(&mut waiting.request.respond));
        self.silent.retain_mut(|silent| is_open(&mut silent.respond));
        self.open = self.open.saturating_sub(gone);
        self.tally().cancelled.fetch_add(gone as u64, Ordering::Relaxed);
    }

    /// Judges every complete request and answers those that need not wait.
    fn take_batch(&mut self, whole: &mut Vec<Whole<'a>>) -> Flow {
        let arrived = whole.len() as u64;
        self.tally().requests.fetch_add(arrived, Ordering::Relaxed);
        self.record.requests.fetch_add(arrived, Ordering::Relaxed);
        let now = self.state.clock.now();
        let latency = self.state.gates.of(self.environment).latency();
        for request in whole.drain(..) {
            let Fault { delay_ms, action } = self.judge(&request, now);
            let delay = latency.saturating_add(Duration::from_millis(delay_ms));
            if self.state.gates.of(self.environment).is_held() {
                self.held.push(Waiting { request, action });
            } else if delay.is_zero() {
                let flow = self.perform(request, action, now);
                if flow != Flow::Continue {
                    return flow;
                }
            } else {
                self.due_count += 1;
                let due = self.state.clock.monotonic().saturating_add(delay);
                self.due.insert((due, self.due_count), Waiting { request, action });
            }
        }
        Flow::Continue
    }

    /// Checks 3 to 9.
    fn judge(&mut self, request: &Whole<'_>, now: Timestamp) -> Fault {
        if self.is_expired {
            return Fault { delay_ms: 0, action: FaultAction::Answer(Answer::refusal(Reason::IdleTimeout)) };
        }
        match self.check(request, now) {
            Ok(fault) => fault.unwrap_or(Fault { delay_ms: 0, action: FaultAction::Answer(Answer::Accepted) }),
            Err(answer) => Fault { delay_ms: 0, action: self.conducted(answer) },
        }
    }

    fn check(&mut self, request: &Whole<'_>, now: Timestamp) -> Result<Option<Fault>, Answer> {
        let headers = &request.head.headers;
        let token = check::route(&request.head.method, request.head.uri.path()).map_err(Answer::refusal)?;
        check::duplicates(headers).map_err(Answer::refusal)?;
        let sender = self.sender(headers, now).map_err(Answer::refusal)?;
        let mode = if self.conduct.lenient { check::Mode::Lenient } else { check::Mode::Strict };
        let push = check::push(headers, mode, sender.only_topic()).map_err(Answer::refusal)?;
        if !sender.allows(push.topic) {
            return Err(Answer::refusal(Reason::TopicDisallowed));
        }
        check::device_token(token).map_err(Answer::refusal)?;
        self.state.devices.check(self.environment, token, push.topic)?;
        check::body(request.body.len(), push.kind).map_err(Answer::refusal)?;
        if let Some(rate) = self.conduct.device_rate
            && !self.state.rates.allow(self.environment, token, rate, self.state.clock.monotonic())
        {
            return Err(Answer::refusal(Reason::TooManyRequests));
        }
        let scripted = self.state.scripts.take(self.environment, token, now);
        Ok(scripted.or_else(|| {
            let id = (!request.id_made).then_some(request.id);
            self.state.chaos.decide(self.environment, token, id, request.attempt.number(), now)
        }))
    }

    fn token_accepted(&mut self, now: Timestamp) {
        if let Some(switch) = self.tokens.take_switch() {
            self.token_record = self.state.ledger.token_switched(&self.record, &switch, now);
        }
        if let Some(record) = &self.token_record {
            record.used(now);
        }
        if !self.limit.is_raised && self.tokens.is_authenticated() {
            self.limit.is_raised = true;
            self.limit.want(self.state.gates.of(self.environment).stream_limit());
        }
    }

    /// Does to a request what was decided.
    fn perform(&mut self, mut request: Whole<'a>, action: FaultAction, now: Timestamp) -> Flow {
        if self.last_processed.is_some_and(|last| request.stream > last) {
            self.exclude(request); // a GOAWAY went out since it was judged
            return Flow::Continue;
        }
        match self.or_wedged(action) {
            FaultAction::Answer(answer) => {
                self.answer(request, &answer, now);
                if matches!(answer, Answer::Refused(Reason::Shutdown | Reason::IdleTimeout, _)) {
                    let Answer::Refused(reason, _) = answer else { return Flow::Continue };
                    self.go_away(None, 0, reason.body().to_owned(), false);
                }
            }
            FaultAction::Stall { accepted } => self.stall(request, accepted, now),
            FaultAction::Reset { code, accepted } => {
                self.accept_unanswered(&request, accepted, now);
                self.open -= 1;
                count(&self.tally().reset);
                request.respond.send_reset(h2::Reason::from(code));
                if h2::Reason::from(code) == h2::Reason::REFUSED_STREAM && !accepted {
                    self.prover.receipts.expect(request.stream, request.attempt.unprocessed());
                } else {
                    request.attempt.unanswered(accepted);
                }
            }
            FaultAction::Close { accepted } => {
                self.accept_unanswered(&request, accepted, now);
                request.attempt.unanswered(accepted);
                self.orders.cut();
                return Flow::End;
            }
            FaultAction::CloseTls { accepted } => {
                self.accept_unanswered(&request, accepted, now);
                request.attempt.unanswered(accepted);
                return self.close_tls();
            }
            FaultAction::HalfOpen { accepted } => {
                self.accept_unanswered(&request, accepted, now);
                request.attempt.unanswered(accepted);
                return Flow::HalfOpen;
            }
            FaultAction::Wedge { accepted } => {
                self.wedge = Some(Wedge::Silence);
                self.stall(request, accepted, now);
            }
            FaultAction::StreamLimit { limit } => {
                self.limit.want(limit);
                self.answer(request, &Answer::Accepted, now);
            }
            FaultAction::GoAway { .. } if self.orders.is_going_away() => self.answer(request, &Answer::Accepted, now),
            FaultAction::GoAway { last_stream, code, debug, twice } => {
                let last = match last_stream {
                    LastStream::All => None,
                    LastStream::BeforeThis => Some(request.stream.saturating_sub(2).max(self.highest_processed)),
                    LastStream::Exactly(stream) => Some(stream),
                };
                self.go_away(last, code, debug, twice);
                if last.is_none_or(|last| request.stream <= last) {
                    self.answer(request, &Answer::Accepted, now);
                } else {
                    self.exclude(request);
                }
            }
        }
        Flow::Continue
    }

    /// It is never answered and keeps its slot.
    fn stall(&mut self, request: Whole<'a>, accepted: bool, now: Timestamp) {
        self.accept_unanswered(&request, accepted, now);
        let Whole { respond, stream, attempt, .. } = request;
        let stalled = if accepted {
            attempt.unanswered(true);
            None
        } else {
            Some(attempt.stalled())
        };
        self.silent.push(Silent { respond, stream, stalled });
    }

    /// A request lies behind the last stream that a GOAWAY names.
    fn exclude(&mut self, mut request: Whole<'_>) {
        if request.respond.poll_reset(&mut Context::from_waker(Waker::noop())).is_ready() {
            self.open -= 1;
            count(&self.tally().cancelled);
            return; // the client had given it up: the GOAWAY tells it nothing
        }
        self.prover.receipts.expect(request.stream, request.attempt.unprocessed());
        self.silent.push(Silent { respond: request.respond, stream: request.stream, stalled: None });
    }

    fn accept_unanswered(&mut self, request: &Whole<'_>, accepted: bool, now: Timestamp) {
        if accepted {
            self.highest_processed = self.highest_processed.max(request.stream);
            count(&self.tally().accepted_unanswered);
            self.accept(request, now);
        }
    }

    fn accept(&mut self, request: &Whole<'_>, at: Timestamp) {
        let is_followed = self.state.phones.are_any();
        if !self.state.ledger.is_recording() && !is_followed {
            count(&self.tally().accepted);
            return;
        }
        let only_topic = self.certificate.as_ref().and_then(|known| known.as_ref().ok()?.only_topic());
        // These passed when the request was judged, strictly or leniently: so they pass again.
        let (Ok(token), Ok(push)) = (
            check::route(&request.head.method, request.head.uri.path()),
            check::push(&request.head.headers, check::Mode::Lenient, only_topic),
        ) else {
            return;
        };
        if self.topic.as_ref() != push.topic {
            self.topic = Arc::from(push.topic);
        }
        let entry = Entry {
            at,
            environment: self.environment,
            token,
            topic: &self.topic,
            push_type: push.kind,
            priority: push.priority,
            expiration: push.expiration,
            collapse_id: push.collapse_id,
            apns_id: request.id,
            apns_id_made: request.id_made,
            connection: self.record.number,
            stream: request.stream,
            body: &request.body,
        };
        self.state.ledger.accept(&entry);
        if is_followed {
            self.state.phones.accept(&entry);
        }
    }

    /// Sends an answer. If the client no longer wants it, the push was not accepted.
    fn answer(&mut self, mut request: Whole<'_>, answer: &Answer, now: Timestamp) {
        self.open -= 1;
        let mut response = Response::new(());
        *response.status_mut() = match answer {
            Answer::Accepted => StatusCode::OK,
            Answer::Refused(reason, _) => StatusCode::from_u16(reason.status()).unwrap_or_default(),
            Answer::Other { status, .. } => StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        };
        let status = response.status().as_u16();
        let headers = response.headers_mut();
        let own = request
            .head
            .headers
            .get(&check::ID)
            .filter(|_| !request.id_made && self.conduct.apns_id == MessageId::Echoed);
        if self.conduct.apns_id != MessageId::Missing {
            let mut id_value = own.cloned().unwrap_or_else(|| identifiers::upper_case(request.id));
            id_value.set_sensitive(true); // never indexed: it fills no header table
            headers.insert(check::ID.clone(), id_value);
        }
        answers::add_headers(headers, &self.conduct, status, now);
        let (reason, body) = match answer {
            Answer::Accepted => {
                if self.environment == Environment::Sandbox {
                    let mut unique = identifiers::upper_case(self.identifiers.next());
                    unique.set_sensitive(true);
                    headers.insert(UNIQUE_ID.clone(), unique);
                }
                (None, None)
            }
            Answer::Refused(reason, None) => (Some(reason.name()), Some(Bytes::from_static(reason.body().as_bytes()))),
            Answer::Refused(reason, timestamp) => (Some(reason.name()), Some(error_body(reason.name(), *timestamp))),
            Answer::Other { reason, timestamp, .. } => {
                (reason.as_deref(), reason.as_deref().map(|reason| error_body(reason, *timestamp)))
            }
        };
        let body = body.filter(|_| request.head.method != Method::HEAD).map(|json| {
            let (body, content_type) = answers::body(self.conduct.error_body, reason, json);
            headers.insert(header::CONTENT_TYPE, content_type);
            body
        });
        let sent = request.respond.send_response(response, body.is_none()).and_then(|mut stream| match body {
            Some(body) => stream.send_data(body, true),
            None => Ok(()),
        });
        if let Err(error) = sent {
            count(&self.tally().cancelled);
            tracing::debug!(connection = self.record.number, stream = request.stream, error = %error, "the answer is no longer wanted");
            return;
        }
        if *answer == Answer::Accepted {
            self.accept(&request, now);
        }
        self.highest_processed = self.highest_processed.max(request.stream);
        self.tally().answered(answer);
        self.prover.receipts.expect(request.stream, request.attempt.answered(answer));
        self.touch();
        self.wedge_after(answer);
        self.count_error(answer);
        if self.conduct.adaptive_streams || self.limit.is_shrunk {
            let full = self.state.gates.of(self.environment).stream_limit();
            self.limit.adapt(answer, full, self.conduct.adaptive_streams);
        }
    }

    fn go_away(&mut self, last_stream: Option<u32>, code: u32, debug: String, twice: bool) {
        // A later GOAWAY never names a later stream: RFC 9113, 6.8.
        let last_stream = last_stream.into_iter().chain(self.last_processed).min();
        self.orders.set_go_away(GoAway { last_stream, code: Some(code), debug: Bytes::from(debug), twice });
        self.h2.graceful_shutdown();
        self.exclude_above(last_stream);
    }

    /// Streams above `last_stream` are not processed and never answered.
    fn exclude_above(&mut self, last_stream: Option<u32>) {
        let Some(last) = last_stream else { return };
        self.last_processed = Some(last);
        let (held, due, arriving) =
            (std::mem::take(&mut self.held), std::mem::take(&mut self.due), std::mem::take(&mut self.arriving));
        for waiting in held {
            if waiting.request.stream <= last {
                self.held.push(waiting);
            } else {
                self.exclude(waiting.request);
            }
        }
        for (place, waiting) in due {
            if waiting.request.stream <= last {
                self.due.insert(place, waiting);
            } else {
                self.exclude(waiting.request);
            }
        }
        for request in arriving {
            // A stream that was never looked at (0) is looked at in its turn.
            if request.stream <= last {
                self.arriving.push(request);
            } else {
                self.silent.push(Silent { respond: request.respond, stream: request.stream, stalled: None });
            }
        }
        let mut cx = Context::from_waker(Waker::noop());
        for silent in self.silent.iter_mut().filter(|silent| silent.stream > last) {
            // The GOAWAY tells nothing to a client that has given it up.
            if silent.respond.poll_reset(&mut cx).is_pending()
                && let Some(stalled) = silent.stalled.take()
            {
                self.prover.receipts.expect(silent.stream, stalled.excluded());
            }
        }
    }

    fn obey(&mut self, command: Command) -> Flow {
        match command {
            Command::Release => {
                let now = self.state.clock.now();
                for waiting in std::mem::take(&mut self.held) {
                    let flow = self.perform(waiting.request, waiting.action, now);
                    if flow != Flow::Continue {
                        return flow;
                    }
                }
            }
            Command::StreamLimit(limit) => self.limit.want(limit),
            Command::Conduct(conduct) => {
                self.orders.set_read_bytes_per_second(conduct.read_bytes_per_second);
                self.windows.delay = Duration::from_millis(conduct.window_updates_after_ms);
                self.conduct = conduct;
                self.touch();
            }
            Command::GoAway(order) => self.obey_go_away(order),
            Command::Wedge(wedge) => self.wedge = Some(wedge),
            Command::HalfOpen => return Flow::HalfOpen,
            Command::CloseTls => return self.close_tls(),
            Command::Close => {
                self.orders.cut();
                return Flow::End;
            }
        }
        Flow::Continue
    }

    /// Sends a GOAWAY from outside: once or twice, and perhaps nothing follows it.
    fn obey_go_away(&mut self, order: GoAwayOrder) {
        let GoAwayOrder { last_stream, code, twice, .. } = order;
        let debug = order.debug.unwrap_or_else(|| SHUTDOWN_DEBUG.to_owned());
        if !order.linger {
            self.go_away(last_stream, code, debug, twice);
            return;
        }
        let last_stream = Some(last_stream.unwrap_or(self.highest));
        let frame = GoAway { last_stream, code: Some(code), debug: Bytes::from(debug), twice };
        for _ in 0..=u8::from(twice) {
            self.orders.add_go_away(&frame);
        }
        self.exclude_above(last_stream);
    }

    fn answer_due(&mut self) -> Flow {
        self.timer = None;
        let (monotonic, now) = (self.state.clock.monotonic(), self.state.clock.now());
        self.windows.give_back(monotonic);
        if self.idle_end().is_some_and(|end| end <= monotonic) {
            self.is_expired = true;
            self.go_away(None, 0, Reason::IdleTimeout.body().to_owned(), false);
        }
        while let Some(first) = self.due.first_entry().filter(|first| first.key().0 <= monotonic) {
            let Waiting { request, action } = first.remove();
            let flow = self.perform(request, action, now);
            if flow != Flow::Continue {
                return flow;
            }
        }
        Flow::Continue
    }

    /// Sets the timer to what is due first.
    fn set_timer(&mut self) {
        let answer = self.due.first_key_value().map(|((due, _), _)| *due);
        let first = [answer, self.windows.due(), self.idle_end()].into_iter().flatten().min();
        if self.timer.as_ref().map(|(due, _)| *due) != first {
            self.timer =
                first.map(|due| (due, self.state.clock.sleep(due.saturating_sub(self.state.clock.monotonic()))));
        }
    }
}

/// Takes every new stream that has arrived. Ready if there is something to read, the limit is another, a window waits, or the
/// connection has ended.
fn poll_batch(
    h2: &mut server::Connection<Completing, Bytes>,
    arriving: &mut Vec<Arriving>,
    limit: &mut StreamLimit,
    windows: &mut Windows,
    orders: &Orders,
    prover: &mut Prover,
    cx: &mut Context<'_>,
) -> Poll<Flow> {
    let before = arriving.len();
    let mut is_limit_new = false;
    prover.ask(cx);
    loop {
        match h2.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, respond)))) => {
                let (head, body) = request.into_parts();
                arriving.push(Arriving { head, body, respond, received: Received::Nothing, stream: 0 });
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(error = %error, "a connection failed");
                return Poll::Ready(Flow::End);
            }
            Poll::Ready(None) => return Poll::Ready(Flow::End),
            Poll::Pending => match limit.wanted {
                // Refused as long as the client has not acknowledged the last SETTINGS: its acknowledgement wakes us.
                Some(wanted) if h2.set_initial_window_size(windows.stream).is_ok() => {
                    orders.set_stream_limit(wanted);
                    limit.told = wanted;
                    limit.wanted = None;
                    is_limit_new = true;
                }
                _ if prover.ask(cx) => {}
                _ => break,
            },
        }
    }
    let has_body = |request: &mut Arriving| poll_body(request, windows, cx).is_ready();
    if is_limit_new || arriving.len() > before || arriving.iter_mut().any(has_body) || windows.take_new() {
        Poll::Ready(Flow::Continue)
    } else {
        Poll::Pending
    }
}

/// Reads what has come of a body. Ready with `true`: it is complete, or too long to read on; with `false`: the client
/// gave up.
fn poll_body(request: &mut Arriving, windows: &mut Windows, cx: &mut Context<'_>) -> Poll<bool> {
    loop {
        if request.body.is_end_stream() || request.received.len() > MAX_READ_BYTES {
            return Poll::Ready(true);
        }
        match request.body.poll_data(cx) {
            Poll::Ready(Some(Ok(bytes))) => {
                let given_back = windows.was_read(request.body.flow_control(), bytes.len());
                request.received.add(bytes);
                if !given_back {
                    return Poll::Ready(false);
                }
            }
            Poll::Ready(Some(Err(_))) => return Poll::Ready(false),
            Poll::Ready(None) => return Poll::Ready(true),
            Poll::Pending => return Poll::Pending,
        }
    }
}

fn error_body(reason: &str, timestamp: Option<Timestamp>) -> Bytes {
    #[derive(serde::Serialize)]
    struct Body<'a> {
        reason: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        timestamp: Option<i64>,
    }
    let body = Body { reason, timestamp: timestamp.map(Timestamp::as_millis) };
    serde_json::to_vec(&body).map_or_else(|_| Bytes::new(), Bytes::from)
}
