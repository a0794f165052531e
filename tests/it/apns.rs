//! The APNs client against an HTTP/2 server that the test scripts frame by frame, over real TLS.
//!
//! The server is `h2` behind a proxy that sees every frame: the test can raise and lower the stream limit, say GOAWAY
//! with any last-stream-id, swallow PINGs, stop reading, say nothing at all, and cut the connection, none of which
//! `h2`'s server offers. It shares no code with the client.

use std::{
    collections::HashMap,
    fmt::Debug,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use h2::server::SendResponse;
use http::Response;
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
        topic::{Environment, Topic},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const START: Timestamp = Timestamp::from_seconds(1_795_000_000);

// ---------------------------------------------------------------------------------------------- the scripted server

/// A request that the server has read to its end, waiting for the test to answer it.
struct Got {
    connection: usize,
    stream: u32,
    path: String,
    headers: http::HeaderMap,
    body: Vec<u8>,
    respond: SendResponse<Bytes>,
    open: Arc<Load>,
}

impl Got {
    fn answer(mut self, status: u16, body: &str) {
        self.open.now.fetch_sub(1, Ordering::SeqCst);
        let response = Response::builder().status(status).body(()).unwrap();
        let mut stream = self.respond.send_response(response, body.is_empty()).unwrap();
        if !body.is_empty() {
            stream.send_data(Bytes::from(body.to_owned()), true).unwrap();
        }
    }

    fn refuse(mut self) {
        self.open.now.fetch_sub(1, Ordering::SeqCst);
        self.respond.send_reset(h2::Reason::REFUSED_STREAM);
    }

    fn token(&self) -> &str {
        self.headers["authorization"].to_str().unwrap()
    }
}

/// Streams open on the server at the same time.
#[derive(Default)]
struct Load {
    now: AtomicUsize,
    most: AtomicUsize,
    /// HEADERS frames that came, whether or not a body followed.
    heads: AtomicUsize,
    /// Requests that the client reset before their end.
    taken_back: AtomicUsize,
}

enum Order {
    Frame(Vec<u8>),
    Cut,
}

struct Server {
    port: u16,
    ca_pem: Vec<u8>,
    got: mpsc::UnboundedReceiver<Got>,
    load: Arc<Load>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    orders: Mutex<Vec<mpsc::UnboundedSender<Order>>>,
    acknowledged: AtomicUsize,
    swallow_pings: AtomicBool,
    /// Nothing is read of what clients send, so that their sockets fill up.
    deaf: AtomicBool,
}

#[derive(Clone, Copy)]
struct Script {
    streams: u32,
    alpn: bool,
    /// The first connections are accepted and told nothing, not even SETTINGS.
    mute: usize,
}

const ONE: Script = Script { streams: 1, alpn: true, mute: 0 };
const MANY: Script = Script { streams: 1_000, ..ONE };

impl Server {
    async fn start(script: Script) -> Self {
        let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let ca_pem = key.cert.pem().into_bytes();
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
        let mut config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![key.cert.der().clone()], private)
                .unwrap();
        if script.alpn {
            config.alpn_protocols = vec![b"h2".to_vec()];
        }
        let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        // Little room in the kernel: a client notices soon that nobody reads.
        socket2::SockRef::from(&listener).set_recv_buffer_size(16 * 1024).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, got) = mpsc::unbounded_channel();
        let load = Arc::new(Load::default());
        let shared = Arc::new(Shared::default());
        let server = Self { port, ca_pem, got, load: Arc::clone(&load), shared: Arc::clone(&shared) };
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (orders, inbox) = mpsc::unbounded_channel();
                let number = {
                    let mut all = shared.orders.lock().unwrap();
                    all.push(orders);
                    all.len()
                };
                let (tls, sender, load, shared) = (tls.clone(), sender.clone(), Arc::clone(&load), Arc::clone(&shared));
                tokio::spawn(async move {
                    if let Ok(tls) = tls.accept(tcp).await
                        && script.alpn
                    {
                        serve(tls, number, script, inbox, sender, load, shared).await;
                    }
                });
            }
        });
        server
    }

    fn connections(&self) -> usize {
        self.shared.orders.lock().unwrap().len()
    }

    fn order(&self, connection: usize, order: Order) {
        let _ = self.shared.orders.lock().unwrap()[connection - 1].send(order);
    }

    /// SETTINGS with another `MAX_CONCURRENT_STREAMS`.
    async fn allow(&self, connection: usize, streams: u32) {
        self.settings(connection, 3, streams).await;
    }

    /// SETTINGS with another `INITIAL_WINDOW_SIZE`: how much body a stream may send.
    async fn window(&self, connection: usize, bytes: u32) {
        self.settings(connection, 4, bytes).await;
    }

    /// Returns once the client has acknowledged it.
    async fn settings(&self, connection: usize, id: u16, value: u32) {
        let before = self.shared.acknowledged.load(Ordering::SeqCst);
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend(value.to_be_bytes());
        self.order(connection, Order::Frame(frame(4, 0, 0, &payload)));
        until("the SETTINGS are acknowledged", || self.shared.acknowledged.load(Ordering::SeqCst) > before).await;
    }

    /// Waits until so many connections have acknowledged their first SETTINGS, where there are no others.
    async fn greeted(&self, connections: usize, what: &str) {
        until(what, || self.shared.acknowledged.load(Ordering::SeqCst) == connections).await;
    }

    fn go_away(&self, connection: usize, last_stream: u32) {
        let mut payload = last_stream.to_be_bytes().to_vec();
        payload.extend(0_u32.to_be_bytes());
        payload.extend(b"{\"reason\":\"Shutdown\"}");
        self.order(connection, Order::Frame(frame(7, 0, 0, &payload)));
    }

    async fn next(&mut self) -> Got {
        within("a request", self.got.recv()).await.unwrap()
    }

    async fn next_many(&mut self, n: usize) -> Vec<Got> {
        let mut all = Vec::new();
        while all.len() < n {
            all.push(self.next().await);
        }
        all
    }

    fn has_nothing(&mut self) -> bool {
        self.got.try_recv().is_err()
    }

    /// Answers everything from now on, and counts.
    fn answer_all(mut self, status: u16, body: &'static str) -> Arc<Mutex<Vec<(usize, String)>>> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Some(got) = self.got.recv().await {
                log.lock().unwrap().push((got.connection, got.token().to_owned()));
                got.answer(status, body);
            }
        });
        seen
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

async fn read_frame(from: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 9];
    from.read_exact(&mut bytes).await.ok()?;
    let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
    bytes.resize(9 + length, 0);
    from.read_exact(&mut bytes[9..]).await.ok()?;
    Some(bytes)
}

/// What the client says, but for what the script keeps back.
async fn pass_on(
    mut from_client: impl AsyncReadExt + Unpin,
    mut to_server: impl AsyncWriteExt + Unpin,
    shared: Arc<Shared>,
) {
    let mut acknowledgements = 0;
    loop {
        while shared.deaf.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let Some(bytes) = read_frame(&mut from_client).await else { break };
        match (bytes[3], bytes[4]) {
            (4, 1) => {
                // `h2` expects one acknowledgement, for its own SETTINGS.
                acknowledgements += 1;
                shared.acknowledged.fetch_add(1, Ordering::SeqCst);
                if acknowledgements > 1 {
                    continue;
                }
            }
            (6, 0) if shared.swallow_pings.load(Ordering::SeqCst) => continue,
            _ => {}
        }
        if to_server.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = to_server.shutdown().await;
}

async fn serve(
    tls: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    number: usize,
    script: Script,
    mut orders: mpsc::UnboundedReceiver<Order>,
    sender: mpsc::UnboundedSender<Got>,
    load: Arc<Load>,
    shared: Arc<Shared>,
) {
    if number <= script.mute {
        while !matches!(orders.recv().await, Some(Order::Cut) | None) {}
        return;
    }
    let (inner, outer) = tokio::io::duplex(1 << 20);
    let proxy = tokio::spawn(async move {
        let (mut from_client, mut to_client) = tokio::io::split(tls);
        let (mut from_server, mut to_server) = tokio::io::split(outer);
        let mut preface = [0; 24];
        if from_client.read_exact(&mut preface).await.is_err() {
            return;
        }
        to_server.write_all(&preface).await.unwrap();
        let upstream = tokio::spawn(pass_on(from_client, to_server, shared));
        loop {
            tokio::select! {
                bytes = read_frame(&mut from_server) => {
                    let Some(mut bytes) = bytes else { break };
                    if bytes[3] == 4 && bytes[4] == 0 {
                        for setting in bytes[9..].chunks_exact_mut(6) {
                            if setting[1] == 3 {
                                setting[2..].copy_from_slice(&script.streams.to_be_bytes());
                            }
                        }
                    }
                    if to_client.write_all(&bytes).await.is_err() { break }
                    let _ = to_client.flush().await;
                }
                order = orders.recv() => match order {
                    Some(Order::Frame(bytes)) => {
                        let _ = to_client.write_all(&bytes).await;
                        let _ = to_client.flush().await;
                    }
                    Some(Order::Cut) | None => break,
                }
            }
        }
        upstream.abort();
    });
    let Ok(mut connection) = h2::server::Builder::new()
        .max_concurrent_streams(10_000)
        .initial_connection_window_size(1 << 20)
        .handshake::<_, Bytes>(inner)
        .await
    else {
        return;
    };
    while let Some(Ok((request, respond))) = connection.accept().await {
        load.heads.fetch_add(1, Ordering::SeqCst);
        let now = load.now.fetch_add(1, Ordering::SeqCst) + 1;
        load.most.fetch_max(now, Ordering::SeqCst);
        let (sender, load) = (sender.clone(), Arc::clone(&load));
        tokio::spawn(async move {
            let (head, mut stream) = request.into_parts();
            let mut body = Vec::new();
            while let Some(piece) = stream.data().await {
                let Ok(piece) = piece else {
                    load.now.fetch_sub(1, Ordering::SeqCst);
                    load.taken_back.fetch_add(1, Ordering::SeqCst);
                    return;
                };
                let _ = stream.flow_control().release_capacity(piece.len());
                body.extend(piece);
            }
            let _ = sender.send(Got {
                connection: number,
                stream: respond.stream_id().as_u32(),
                path: head.uri.path().to_owned(),
                headers: head.headers,
                body,
                respond,
                open: load,
            });
        });
    }
    let _ = proxy.await;
}

// ------------------------------------------------------------------------------------------------------- the client

struct Client {
    gateway: Arc<ApnsGateway>,
    clock: Arc<ManualClock>,
}

fn topic() -> Topic {
    "fr.ocpizza.livreur".parse().unwrap()
}

fn client_with(port: u16, ca_pem: &[u8], adjust: impl FnOnce(&mut Settings)) -> Client {
    let clock = Arc::new(ManualClock::new(START));
    let credential =
        Credential::new("ABCDE12345".parse().unwrap(), "ABC123DEFG".parse().unwrap(), &credential::generate().unwrap())
            .unwrap();
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
    let dyn_clock: Arc<dyn Clock> = Arc::<ManualClock>::clone(&clock);
    let gateway =
        ApnsGateway::new(&settings, &[app], &dyn_clock, &TaskTracker::new(), &CancellationToken::new()).unwrap();
    Client { gateway: Arc::new(gateway), clock }
}

fn client(server: &Server) -> Client {
    client_with(server.port, &server.ca_pem, |_| {})
}

fn push(number: usize, lane: Lane) -> Push {
    push_until(number, lane, START.plus(Duration::from_secs(30 * 24 * 3600)))
}

fn push_until(number: usize, lane: Lane, deadline: Timestamp) -> Push {
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
    fn send(&self, push: Push) -> JoinHandle<Reply> {
        self.send_fenced(push, Arc::new(NoFence))
    }

    fn send_fenced(&self, push: Push, fence: Arc<dyn Fence>) -> JoinHandle<Reply> {
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { gateway.send(&push, &*fence).await })
    }

    fn send_n(&self, n: usize) -> Vec<JoinHandle<Reply>> {
        (0..n).map(|i| self.send(push(i, Lane::Transactional))).collect()
    }

    fn production(&self) -> sonnette::apns::RouteReport {
        self.gateway.report().into_iter().find(|r| r.environment == Environment::Production).unwrap()
    }

    /// A connection that has proved itself and may open as many streams as the script says.
    async fn warm_up(&self, server: &mut Server) {
        let first = self.send(push(999_999, Lane::Transactional));
        server.next().await.answer(200, "");
        assert_eq!(outcome(first).await, Outcome::Accepted);
    }
}

/// A fence that answers for the instant only, or that says until when, on the monotonic clock.
struct Switch {
    open: AtomicBool,
    asked: AtomicUsize,
    until: Duration,
}

impl Switch {
    fn new(open: bool) -> Arc<Self> {
        Self::until(open, Duration::ZERO)
    }

    fn until(open: bool, until: Duration) -> Arc<Self> {
        Arc::new(Self { open: AtomicBool::new(open), asked: AtomicUsize::new(0), until })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }
}

#[async_trait]
impl Fence for Switch {
    fn is_open(&self) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.open.load(Ordering::SeqCst)
    }

    fn open_until(&self) -> Option<Duration> {
        self.is_open().then_some(self.until)
    }

    async fn renew(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

async fn outcome(sent: JoinHandle<Reply>) -> Outcome {
    within("a reply", sent).await.unwrap().outcome
}

async fn outcomes(sent: Vec<JoinHandle<Reply>>) -> Vec<Outcome> {
    let mut all = Vec::new();
    for one in sent {
        all.push(outcome(one).await);
    }
    all
}

fn count<T: PartialEq + Debug>(all: &[T], one: &T) -> usize {
    all.iter().filter(|o| *o == one).count()
}

// -------------------------------------------------------------------------------------------------------- the tests

#[tokio::test]
async fn a_push_arrives_as_the_sheet_says_and_is_accepted() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let one = push(42, Lane::Transactional);
    let sent = client.send(one.clone());
    let got = server.next().await;
    assert_eq!(got.path, "/3/device/0000002a");
    assert_eq!(got.body, b"{\"aps\":{\"alert\":\"Bonjour\"}}");
    assert_eq!(got.headers["apns-id"], one.apns_id.to_string());
    assert_eq!(got.headers["apns-topic"], "fr.ocpizza.livreur");
    assert!(got.token().starts_with("bearer eyJ"));
    got.answer(200, "");
    let reply = within("a reply", sent).await.unwrap();
    assert_eq!(reply.outcome, Outcome::Accepted);
    assert_eq!(reply.sent_at, Some(START));
    let report = client.production();
    assert_eq!((report.connections, report.in_flight, report.waiting), (1, 0, 0));
    assert_eq!(report.last_accepted_at, Some(START));
    assert_eq!(client.gateway.environments(&topic()), [Environment::Production, Environment::Sandbox]);
}

#[tokio::test]
async fn there_is_one_stream_until_the_limit_is_raised() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let sent = client.send_n(20);
    let first = server.next().await;
    until("the others wait", || client.production().waiting == 19).await;
    first.answer(200, "");
    server.next().await.answer(200, "");
    let third = server.next().await;
    assert_eq!(server.load.most.load(Ordering::SeqCst), 1, "never more than one at a time");
    server.allow(1, 1_000).await;
    let rest = server.next_many(17).await;
    third.answer(200, "");
    for got in rest {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn even_where_many_streams_are_allowed_the_first_request_goes_alone() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    let sent = client.send_n(20);
    let first = server.next().await;
    until("the others wait", || client.production().waiting == 19).await;
    assert_eq!(client.production().in_flight, 1);
    assert_eq!(server.connections(), 1, "nobody opens a second connection meanwhile");
    first.answer(200, "");
    for got in server.next_many(19).await {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
}

#[tokio::test]
async fn a_limit_that_falls_is_obeyed_at_once() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    let before = client.send_n(10);
    let in_flight = server.next_many(10).await;
    server.allow(1, 1).await;
    until("the client has seen it", || client.production().in_flight == 10).await;
    let after = client.send_n(5);
    until("five wait", || client.production().waiting == 5).await;
    for got in in_flight {
        assert!(server.has_nothing(), "nothing new while the limit is exceeded");
        got.answer(200, "");
    }
    server.load.most.store(0, Ordering::SeqCst);
    for _ in 0..5 {
        server.next().await.answer(200, "");
    }
    assert_eq!(server.load.most.load(Ordering::SeqCst), 1);
    assert_eq!(count(&outcomes(before).await, &Outcome::Accepted), 10);
    assert_eq!(count(&outcomes(after).await, &Outcome::Accepted), 5);
}

#[tokio::test]
async fn where_streams_are_scarce_more_connections_are_opened_up_to_the_bound() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 3);
    let sent = client.send_n(12);
    for _ in 0..12 {
        server.next().await.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 12);
    assert!((2..=3).contains(&server.connections()), "{}", server.connections());
}

#[tokio::test]
async fn streams_above_the_last_one_of_a_goaway_come_back_unsent_and_go_elsewhere() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send_n(6);
    let in_flight = server.next_many(6).await;
    // Streams 1 (the warm-up), 3, 5, 7, 9, 11, 13: those up to 7 are still answered.
    server.go_away(1, 7);
    until("three are left", || client.production().in_flight == 3).await;
    let again = client.send(push(77, Lane::Transactional));
    let elsewhere = server.next().await;
    assert_eq!(elsewhere.connection, 2, "nothing new goes where GOAWAY was said");
    elsewhere.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
    for got in in_flight {
        if got.stream <= 7 {
            got.answer(200, "");
        }
    }
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Accepted), 3, "{all:?}");
    assert_eq!(count(&all, &Outcome::Unsent), 3, "{all:?}");
    until("the old connection is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn what_a_goaway_promised_to_answer_and_did_not_is_unknown() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send_n(2);
    let _in_flight = server.next_many(2).await;
    server.go_away(1, 3);
    until("one is left", || client.production().in_flight == 1).await;
    server.order(1, Order::Cut);
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Unsent), 1, "{all:?}");
    assert_eq!(count(&all, &Outcome::Unknown), 1, "{all:?}");
}

#[tokio::test]
async fn a_refused_stream_is_unsent() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    server.next().await.refuse();
    assert_eq!(outcome(sent).await, Outcome::Unsent);
    assert_eq!(client.production().connections, 1, "the connection stays");
}

#[tokio::test]
async fn another_reset_leaves_it_unknown() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    server.next().await.respond.send_reset(h2::Reason::INTERNAL_ERROR);
    assert_eq!(outcome(sent).await, Outcome::Unknown);
}

#[tokio::test]
async fn a_connection_cut_after_the_request_was_read_leaves_it_unknown() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let sent = client.send(push(1, Lane::Transactional));
    let _got = server.next().await;
    server.order(1, Order::Cut);
    let reply = within("a reply", sent).await.unwrap();
    assert_eq!(reply.outcome, Outcome::Unknown);
    assert_eq!(reply.sent_at, Some(START));
}

#[tokio::test]
async fn a_silent_server_leaves_it_unknown_after_the_deadline_and_the_connection_is_replaced() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let sent = client.send(push(1, Lane::Transactional));
    let _got = server.next().await;
    client.clock.advance(Duration::from_secs(19));
    tokio::task::yield_now().await;
    assert!(!sent.is_finished());
    client.clock.advance(Duration::from_secs(1));
    assert_eq!(outcome(sent).await, Outcome::Unknown);
    let again = client.send(push(2, Lane::Transactional));
    until("back-off", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(1));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "it acknowledges PINGs, but it answers nothing");
    got.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_that_does_not_acknowledge_a_ping_is_closed() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.shared.swallow_pings.store(true, Ordering::SeqCst);
    client.clock.advance(Duration::from_secs(61));
    let sent = client.send(push(1, Lane::Transactional));
    until("it waits for the PING", || client.production().waiting == 1).await;
    assert_eq!(server.load.heads.load(Ordering::SeqCst), 1, "an idle connection is checked before it is used");
    client.clock.advance(Duration::from_secs(10));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
    until("the dead one is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn an_idle_connection_that_acknowledges_is_used_again() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    client.clock.advance(Duration::from_secs(3600));
    let sent = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 1);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_refused_credential_costs_few_requests() {
    let server = Server::start(MANY).await;
    let client = client(&server);
    let shared = Arc::clone(&server.shared);
    let seen = server.answer_all(403, "{\"reason\":\"InvalidProviderToken\"}");
    let sent = client.send_n(50);
    until("the first answer", || seen.lock().unwrap().len() == 1).await;
    for _ in 0..31 {
        client.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = outcomes(sent).await;
    let requests = seen.lock().unwrap().len();
    let withheld = all.iter().filter(|o| matches!(o, Outcome::Withheld(_))).count();
    assert_eq!(withheld, requests);
    assert_eq!(count(&all, &Outcome::Unsent), 50 - requests, "the others were given back");
    assert!(requests <= 6, "{requests} requests in half a minute");
    // The last one may have opened when nobody waited any more.
    let connections = shared.orders.lock().unwrap().len();
    assert!(
        (requests..=requests + 1).contains(&connections),
        "{connections} connections for {requests} requests: each has one of its own"
    );
}

#[tokio::test]
async fn too_many_token_updates_replace_the_connection_and_not_the_token() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let token = got.token().to_owned();
    got.answer(429, "{\"reason\":\"TooManyProviderTokenUpdates\"}");
    assert!(matches!(outcome(sent).await, Outcome::Deferred { .. }));
    let again = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!((got.connection, got.token()), (2, token.as_str()));
    got.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_fence_that_closes_while_a_push_waits_for_a_stream_stops_it_before_the_first_byte() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let first = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let fence = Switch::new(true);
    let fenced = client.send_fenced(push(2, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("it waits", || client.production().waiting == 1).await;
    assert_eq!(fence.asked.load(Ordering::SeqCst), 0, "the fence is asked with a stream in hand");
    fence.open.store(false, Ordering::SeqCst);
    got.answer(200, "");
    assert_eq!(outcome(first).await, Outcome::Accepted);
    assert_eq!(outcome(fenced).await, Outcome::Fenced);
    let next = client.send(push(3, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted, "its stream was given back");
    assert_eq!(
        server.load.heads.load(Ordering::SeqCst),
        2,
        "of the fenced one the server saw nothing, not even its head"
    );
}

#[tokio::test]
async fn a_fence_that_closes_while_the_body_waits_for_room_takes_the_push_back() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::new(true);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.open.store(false, Ordering::SeqCst);
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    until("it is taken back", || server.load.taken_back.load(Ordering::SeqCst) == 1).await;
    assert!(server.has_nothing(), "no request came to its end");
    let next = client.send(push(2, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_body_that_fits_only_in_pieces_arrives_whole() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 10).await;
    let sent = client.send(push(1, Lane::Transactional));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    server.window(1, 20).await;
    server.window(1, 100).await;
    let got = server.next().await;
    assert_eq!(got.body, b"{\"aps\":{\"alert\":\"Bonjour\"}}");
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_lost_before_the_body_left_gives_the_push_back_unsent() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let sent = client.send(push(1, Lane::Transactional));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    server.order(1, Order::Cut);
    assert_eq!(outcome(sent).await, Outcome::Unsent);
}

#[tokio::test]
async fn nothing_is_written_once_its_deadline_has_passed() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let deadline = START.plus(Duration::from_secs(5));
    let with_stream = client.send(push_until(1, Lane::Transactional, deadline));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    let waiting = client.send(push_until(2, Lane::Transactional, deadline));
    until("the other waits", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(5));
    assert_eq!(outcome(waiting).await, Outcome::Unsent);
    server.window(1, 65_535).await;
    assert_eq!(outcome(with_stream).await, Outcome::Unsent);
    let late = client.send(push_until(3, Lane::Transactional, deadline));
    assert_eq!(outcome(late).await, Outcome::Unsent);
    assert!(server.has_nothing());
}

#[tokio::test]
async fn the_urgent_lane_goes_first() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let first = client.send(push(0, Lane::Bulk));
    let got = server.next().await;
    let mut sent = vec![first];
    for number in 1..=5 {
        sent.push(client.send(push(number, Lane::Bulk)));
        until("it waits", || client.production().waiting == number).await;
    }
    sent.push(client.send(push(100, Lane::Transactional)));
    until("it waits", || client.production().waiting == 6).await;
    got.answer(200, "");
    let mut order = Vec::new();
    for _ in 0..6 {
        let got = server.next().await;
        order.push(got.path.clone());
        got.answer(200, "");
    }
    assert_eq!(order[0], "/3/device/00000064");
    assert_eq!(order[1..], (1..=5).map(|n| format!("/3/device/{n:08x}")).collect::<Vec<_>>());
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 7);
}

#[tokio::test]
async fn where_nobody_listens_pushes_come_back_unsent_after_few_attempts() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    let ca = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let client = client_with(port, ca.cert.pem().as_bytes(), |_| {});
    let sent = client.send_n(100);
    until("the first attempt failed", || client.production().connect_error.is_some()).await;
    for _ in 0..31 {
        client.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Unsent), 100);
    let attempts = attempts.load(Ordering::SeqCst);
    assert!((3..=6).contains(&attempts), "{attempts} attempts in half a minute");
    assert!(client.production().connect_error.unwrap().contains("TLS handshake"));
}

#[tokio::test]
async fn a_server_without_http_2_is_named_as_the_fault() {
    let server = Server::start(Script { alpn: false, ..ONE }).await;
    let client = client(&server);
    let _sent = client.send(push(1, Lane::Transactional));
    until("the attempt failed", || client.production().connect_error.is_some()).await;
    let error = client.production().connect_error.unwrap();
    assert!(error.contains("does not speak HTTP/2"), "{error}");
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_is_refused() {
    let server = Server::start(ONE).await;
    let client = client_with(server.port, &[], |s| s.extra_roots_pem = None);
    let _sent = client.send(push(1, Lane::Transactional));
    until("the attempt failed", || client.production().connect_error.is_some()).await;
    let error = client.production().connect_error.unwrap();
    assert!(error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn stop_gives_back_who_waits_and_lets_who_is_under_way_finish() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let under_way = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let waiting = client.send(push(2, Lane::Transactional));
    until("it waits", || client.production().waiting == 1).await;
    client.gateway.stop();
    assert_eq!(outcome(waiting).await, Outcome::Unsent);
    assert_eq!(outcome(client.send(push(3, Lane::Transactional))).await, Outcome::Unsent);
    let gateway = Arc::clone(&client.gateway);
    let closing = tokio::spawn(async move { gateway.close(Duration::from_secs(30)).await });
    got.answer(200, "");
    assert_eq!(outcome(under_way).await, Outcome::Accepted);
    within("the end", closing).await.unwrap();
    assert_eq!(client.production().connections, 0);
}

#[tokio::test]
async fn two_credentials_never_meet_on_one_connection() {
    let server = Server::start(MANY).await;
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(START));
    let url = format!("https://localhost:{}", server.port);
    let settings = Settings {
        production: Endpoint { url: url.clone() },
        sandbox: Endpoint { url },
        extra_roots_pem: Some(server.ca_pem.clone()),
        ..Settings::default()
    };
    let app = |topic: &str, team: &str| App {
        topic: topic.parse().unwrap(),
        environments: vec![Environment::Production],
        credential: Arc::new(
            Credential::new(team.parse().unwrap(), "ABC123DEFG".parse().unwrap(), &credential::generate().unwrap())
                .unwrap(),
        ),
    };
    let mut apps = vec![app("fr.a", "TEAMAAAAAA"), app("fr.b", "TEAMBBBBBB")];
    apps.push(App { topic: "fr.c".parse().unwrap(), ..apps[0].clone() });
    let gateway = ApnsGateway::new(&settings, &apps, &clock, &TaskTracker::new(), &CancellationToken::new()).unwrap();
    let seen = server.answer_all(200, "");
    for topic in ["fr.a", "fr.b", "fr.c", "fr.a", "fr.b"] {
        let mut one = push(1, Lane::Transactional);
        let mut head = (*one.head).clone();
        head.topic = topic.parse().unwrap();
        one.head = Arc::new(head);
        assert_eq!(gateway.send(&one, &NoFence).await.outcome, Outcome::Accepted);
    }
    let mut tokens: HashMap<usize, Vec<String>> = HashMap::new();
    for (connection, token) in seen.lock().unwrap().iter() {
        let of = tokens.entry(*connection).or_default();
        if !of.contains(token) {
            of.push(token.clone());
        }
    }
    assert_eq!(tokens.len(), 2, "two topics of one credential share a connection");
    assert!(tokens.values().all(|t| t.len() == 1));
}

/// Reads `iat` out of `bearer header.claims.signature`, with code of the test's own.
fn issued_at(token: &str) -> i64 {
    use base64::Engine as _;
    let claims = token.split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    claims["iat"].as_i64().unwrap()
}

#[tokio::test]
async fn over_six_hours_no_connection_changes_its_token_within_21_minutes_or_sends_an_old_one() {
    let server = Server::start(MANY).await;
    let shared = Arc::clone(&server.shared);
    let client = client(&server);
    let seen = server.answer_all(200, "");
    // connection -> (token, first used at)
    let mut used: HashMap<usize, (String, i64)> = HashMap::new();
    let mut changes = 0;
    let step = 50;
    for round in 0..(6 * 3600 / step) {
        let now = client.clock.now().as_seconds();
        assert_eq!(outcome(client.send(push(round, Lane::Transactional))).await, Outcome::Accepted);
        let (connection, token) = seen.lock().unwrap().last().unwrap().clone();
        let age = now - issued_at(&token);
        assert!((120..56 * 60).contains(&age), "a token of {age} s was sent");
        match used.get(&connection) {
            Some((known, _)) if *known == token => {}
            Some((_, since)) => {
                assert!(now - since >= 21 * 60, "changed after {} s", now - since);
                changes += 1;
                used.insert(connection, (token, now));
            }
            None => {
                used.insert(connection, (token, now));
            }
        }
        if round % 37 == 36 {
            // A new connection at odd moments of the slot.
            let last = shared.orders.lock().unwrap().len();
            let _ = shared.orders.lock().unwrap()[last - 1].send(Order::Cut);
            until("it is gone", || client.production().connections == 0).await;
        }
        client.clock.advance(Duration::from_secs(u64::try_from(step).unwrap()));
    }
    assert!(used.len() > 8, "{} connections", used.len());
    assert!(changes > 3, "{changes} changes");
}

#[tokio::test]
async fn a_dead_connection_holds_up_an_urgent_push_for_two_seconds_and_not_for_ten() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    server.shared.swallow_pings.store(true, Ordering::SeqCst);
    client.clock.advance(Duration::from_secs(61));
    let sent = client.send(push(1, Lane::Transactional));
    until("it waits for the PING", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(3));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

/// Longer than any of these tests lets pass.
const LONG: Duration = Duration::from_secs(24 * 3600);

#[tokio::test]
async fn a_fence_that_holds_is_asked_once_and_the_push_leaves_whole() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let fence = Switch::until(true, LONG);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    server.next().await.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
    assert_eq!(fence.asked(), 1);
}

#[tokio::test]
async fn a_body_that_has_waited_too_long_for_room_asks_the_fence_again_and_is_taken_back() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::until(true, LONG);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.close();
    // Nobody sees it close who was told that it holds; but that is believed for a tenth of a second only.
    client.clock.advance(Duration::from_millis(100));
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    assert_eq!(fence.asked(), 2);
    until("it is taken back", || server.load.taken_back.load(Ordering::SeqCst) == 1).await;
    assert!(server.has_nothing(), "no request came to its end");
    let next = client.send(push(2, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted, "its stream was given back");
}

#[tokio::test]
async fn what_a_fence_said_is_not_acted_on_past_the_moment_that_it_named() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::until(true, Duration::from_millis(50));
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.close();
    client.clock.advance(Duration::from_millis(50));
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    assert!(server.has_nothing());
}

/// So many bytes that two hundred of them fill every buffer between client and server.
fn large(number: usize) -> Push {
    let mut large = push(number, Lane::Transactional);
    let payload = format!("{{\"aps\":{{\"alert\":\"{}\"}}}}", "a".repeat(4_000));
    Arc::make_mut(&mut large.head).payload = Bytes::from(payload);
    large
}

/// A connection whose peer has stopped reading, with pushes that it has taken and pushes that it has not.
async fn clogged(server: &mut Server, client: &Client, fence: &Arc<Switch>) -> Vec<JoinHandle<Reply>> {
    client.warm_up(server).await;
    server.shared.deaf.store(true, Ordering::SeqCst);
    let sent: Vec<_> = (0..200).map(|n| client.send_fenced(large(n), Arc::<Switch>::clone(fence))).collect();
    until("all have asked their fence", || fence.asked() == 200).await;
    // What can leave has had the time to.
    tokio::time::sleep(Duration::from_millis(300)).await;
    sent
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "the kernel takes whatever comes")]
async fn what_waits_for_a_socket_that_takes_nothing_asks_its_fence_again_before_it_leaves() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let fence = Switch::until(true, LONG);
    let sent = clogged(&mut server, &client, &fence).await;
    fence.close();
    client.clock.advance(Duration::from_secs(1));
    server.shared.deaf.store(false, Ordering::SeqCst);
    let seen = server.answer_all(200, "");
    let all = outcomes(sent).await;
    let (accepted, fenced) = (count(&all, &Outcome::Accepted), count(&all, &Outcome::Fenced));
    assert_eq!(accepted + fenced, 200, "{all:?}");
    assert!(fenced >= 100, "{fenced} were fenced: most were not yet out of our hands");
    assert_eq!(seen.lock().unwrap().len(), accepted, "nothing that was fenced has left");
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "the kernel takes whatever comes")]
async fn a_socket_that_takes_nothing_for_ten_seconds_is_given_up_and_what_it_had_not_taken_goes_elsewhere() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let fence = Switch::until(true, LONG);
    let sent = clogged(&mut server, &client, &fence).await;
    client.clock.advance(Duration::from_secs(5));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(server.connections(), 1, "not sooner");
    client.clock.advance(Duration::from_secs(5));
    until("another connection", || server.connections() == 2).await;
    server.shared.deaf.store(false, Ordering::SeqCst);
    let seen = server.answer_all(200, "");
    let all = outcomes(sent).await;
    let (accepted, unknown) = (count(&all, &Outcome::Accepted), count(&all, &Outcome::Unknown));
    let unsent = count(&all, &Outcome::Unsent);
    assert_eq!(accepted + unknown + unsent, 200, "{all:?}");
    assert!(accepted >= 100, "{accepted} went elsewhere");
    let elsewhere = seen.lock().unwrap().iter().filter(|(connection, _)| *connection == 2).count();
    assert_eq!(elsewhere, accepted);
}

#[tokio::test]
async fn whoever_waits_for_a_stream_goes_elsewhere_as_soon_as_goaway_is_said() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    let first = client.send(push(1, Lane::Transactional));
    let in_flight = server.next().await;
    let waiting = client.send(push(2, Lane::Transactional));
    until("it waits", || client.production().waiting == 1).await;
    // Everything on the connection will still be answered, so no stream's failure tells of it.
    server.go_away(1, in_flight.stream);
    let elsewhere = server.next().await;
    assert_eq!((elsewhere.connection, elsewhere.path.as_str()), (2, "/3/device/00000002"));
    elsewhere.answer(200, "");
    assert_eq!(outcome(waiting).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(first).await, Outcome::Accepted);
    until("the old connection is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn a_connection_at_its_age_serves_until_its_successor_does() {
    let mut server = Server::start(MANY).await;
    // A push that is under way all the time.
    let client = client_with(server.port, &server.ca_pem, |s| s.request_deadline = Duration::from_secs(20 * 3600));
    client.warm_up(&mut server).await;
    let long = client.send(push(1, Lane::Transactional));
    let in_flight = server.next().await;
    client.clock.advance(Duration::from_secs(10 * 3600 - 60));
    let early = client.send(push(2, Lane::Transactional));
    let got = server.next().await;
    assert_eq!((got.connection, server.connections()), (1, 1), "ten hours are no age");
    got.answer(200, "");
    assert_eq!(outcome(early).await, Outcome::Accepted);
    client.clock.advance(Duration::from_secs(4 * 3600 + 60));
    server.greeted(2, "a successor, though nobody waits for it").await;
    assert_eq!(client.production().connections, 2);
    let next = client.send(push(3, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "nothing new goes where it is to be closed");
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(long).await, Outcome::Accepted, "what was under way is answered");
    until("the old one is closed", || client.production().connections == 1).await;
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn an_idle_connection_at_its_age_is_closed_and_not_replaced() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    client.clock.advance(Duration::from_secs(14 * 3600));
    until("it is closed", || client.production().connections == 0).await;
    assert_eq!(server.connections(), 1);
    let next = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_is_replaced_before_its_stream_ids_run_out() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_requests_per_connection = 5);
    client.warm_up(&mut server).await;
    let sent = client.send_n(3);
    for got in server.next_many(3).await {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 3);
    client.clock.advance(Duration::from_secs(1));
    let fifth = client.send(push(5, Lane::Transactional));
    let in_flight = server.next().await;
    assert_eq!((in_flight.connection, server.connections()), (1, 1), "four are not five");
    client.clock.advance(Duration::from_secs(1));
    server.greeted(2, "a successor").await;
    let next = client.send(push(6, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(fifth).await, Outcome::Accepted);
    until("the old one is closed", || client.production().connections == 1).await;
}

#[tokio::test]
async fn streams_are_spread_over_connections_and_spare_ones_are_closed_one_a_minute() {
    let mut server = Server::start(Script { streams: 10, ..ONE }).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 3);
    let sent = client.send_n(30);
    // A connection carries one until it has proved itself.
    let mut held = Vec::new();
    let mut proved = std::collections::HashSet::new();
    while held.len() < 27 {
        let got = server.next().await;
        if proved.insert(got.connection) {
            got.answer(200, "");
        } else {
            held.push(got);
        }
    }
    assert_eq!(server.connections(), 3);
    for got in held {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 30);

    let sent = client.send_n(9);
    let mut share = HashMap::new();
    for got in server.next_many(9).await {
        *share.entry(got.connection).or_insert(0) += 1;
        got.answer(200, "");
    }
    assert_eq!(share, HashMap::from([(1, 3), (2, 3), (3, 3)]));
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 9);

    let left = || client.production().connections;
    client.clock.advance(Duration::from_secs(9 * 60));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 3, "nine minutes are not idle");
    client.clock.advance(Duration::from_secs(61));
    until("one is closed", || left() == 2).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 2, "one a minute");
    client.clock.advance(Duration::from_secs(60));
    until("another is closed", || left() == 1).await;
    client.clock.advance(Duration::from_secs(3600));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 1, "one stays");
}

#[tokio::test]
async fn a_server_that_never_sends_settings_is_given_up_and_another_is_tried() {
    let mut server = Server::start(Script { mute: 1, ..ONE }).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let sent = client.send(push(1, Lane::Transactional));
    until("the first connection", || client.production().connections == 1).await;
    client.clock.advance(Duration::from_secs(9));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(server.connections(), 1, "nine seconds of patience and more");
    client.clock.advance(Duration::from_secs(1));
    until("it is closed", || client.production().connections == 0).await;
    // It counts as a failure: the next attempt comes after a pause.
    client.clock.advance(Duration::from_secs(1));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_server_that_hangs_up_at_once_is_not_hammered() {
    let server = Server::start(ONE).await;
    let client = client(&server);
    let (shared, clock) = (Arc::clone(&server.shared), Arc::clone(&client.clock));
    // Whoever connects is cut off, for two minutes in which somebody always waits.
    let mut cut = 0;
    for _ in 0..480 {
        if client.production().waiting == 0 {
            drop(client.send(push(1, Lane::Transactional)));
        }
        {
            let orders = shared.orders.lock().unwrap();
            for connection in orders.iter().skip(cut) {
                _ = connection.send(Order::Cut);
            }
            cut = orders.len();
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
        clock.advance(Duration::from_millis(250));
    }
    // 1 + 2 + 4 + 8 + 16 + 32 s and a minute, a quarter less at most.
    assert!((4..=9).contains(&server.connections()), "{} connections in two minutes", server.connections());
}
