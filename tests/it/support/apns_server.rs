//! An APNs that a test scripts frame by frame, over real TLS.
//!
//! The server is `h2` behind a proxy that sees every frame: the test can raise and lower the stream limit, say GOAWAY
//! with any last-stream-id, swallow PINGs, withhold its SETTINGS, stop reading, and cut the connection, none of which
//! `h2`'s server offers. It shares no code with the client, and answers what the test says, request by request.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::server::SendResponse;
use http::Response;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};

use super::waiting::{until, within};

/// A request that the server has read to its end, waiting for the test to answer it.
pub(crate) struct Got {
    pub(crate) connection: usize,
    pub(crate) stream: u32,
    pub(crate) path: String,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) respond: SendResponse<Bytes>,
    open: Arc<Load>,
}

impl Got {
    pub(crate) fn answer(self, status: u16, body: &str) {
        self.answer_with(status, &[], body);
    }

    /// The same, with headers.
    pub(crate) fn answer_with(mut self, status: u16, headers: &[(&str, &str)], body: &str) {
        self.open.now.fetch_sub(1, Ordering::SeqCst);
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        let response = response.body(()).unwrap();
        let mut stream = self.respond.send_response(response, body.is_empty()).unwrap();
        if !body.is_empty() {
            stream.send_data(Bytes::from(body.to_owned()), true).unwrap();
        }
    }

    pub(crate) fn refuse(self) {
        self.reset(h2::Reason::REFUSED_STREAM);
    }

    pub(crate) fn reset(mut self, reason: h2::Reason) {
        self.open.now.fetch_sub(1, Ordering::SeqCst);
        self.respond.send_reset(reason);
    }

    pub(crate) fn token(&self) -> &str {
        self.headers["authorization"].to_str().unwrap()
    }

    /// The device token of the path.
    pub(crate) fn device(&self) -> &str {
        self.path.strip_prefix("/3/device/").unwrap()
    }
}

/// Streams open on the server at the same time.
#[derive(Default)]
pub(crate) struct Load {
    now: AtomicUsize,
    pub(crate) most: AtomicUsize,
    /// HEADERS frames that came, whether or not a body followed.
    pub(crate) heads: AtomicUsize,
    /// Requests that the client reset before their end.
    pub(crate) taken_back: AtomicUsize,
}

pub(crate) enum Order {
    Frame(Vec<u8>),
    Greet,
    Cut,
}

pub(crate) struct Server {
    pub(crate) port: u16,
    pub(crate) ca_pem: Vec<u8>,
    got: mpsc::UnboundedReceiver<Got>,
    pub(crate) load: Arc<Load>,
    pub(crate) shared: Arc<Shared>,
}

#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) orders: Mutex<Vec<mpsc::UnboundedSender<Order>>>,
    acknowledged: AtomicUsize,
    pub(crate) swallow_pings: AtomicBool,
    /// The first SETTINGS wait for [`Server::greet`].
    pub(crate) withhold_greeting: AtomicBool,
    /// Nothing is read of what clients send, so that their sockets fill up.
    pub(crate) deaf: AtomicBool,
}

impl Shared {
    /// As [`Server::allow`], on all connections, without waiting.
    pub(crate) fn allow_all(&self, streams: u32) {
        self.tell_all(3, streams);
    }

    /// As [`Server::window`], on all connections, without waiting.
    pub(crate) fn window_all(&self, bytes: u32) {
        self.tell_all(4, bytes);
    }

    fn tell_all(&self, id: u16, value: u32) {
        for connection in self.orders.lock().unwrap().iter() {
            let _ = connection.send(Order::Frame(settings(id, value)));
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Script {
    pub(crate) streams: u32,
    pub(crate) alpn: bool,
}

pub(crate) const ONE: Script = Script { streams: 1, alpn: true };
pub(crate) const MANY: Script = Script { streams: 1_000, ..ONE };

impl Server {
    pub(crate) async fn start(script: Script) -> Self {
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

    pub(crate) fn connections(&self) -> usize {
        self.shared.orders.lock().unwrap().len()
    }

    pub(crate) fn order(&self, connection: usize, order: Order) {
        let _ = self.shared.orders.lock().unwrap()[connection - 1].send(order);
    }

    /// SETTINGS with another `MAX_CONCURRENT_STREAMS`.
    pub(crate) async fn allow(&self, connection: usize, streams: u32) {
        self.settings(connection, 3, streams).await;
    }

    /// SETTINGS with another `INITIAL_WINDOW_SIZE`: how much body a stream may send.
    pub(crate) async fn window(&self, connection: usize, bytes: u32) {
        self.settings(connection, 4, bytes).await;
    }

    /// Sends the SETTINGS that were withheld, or are about to be.
    pub(crate) fn greet(&self, connection: usize) {
        self.shared.withhold_greeting.store(false, Ordering::SeqCst);
        self.order(connection, Order::Greet);
    }

    /// Returns once the client has acknowledged it.
    async fn settings(&self, connection: usize, id: u16, value: u32) {
        let before = self.shared.acknowledged.load(Ordering::SeqCst);
        self.order(connection, Order::Frame(settings(id, value)));
        until("the SETTINGS are acknowledged", || self.shared.acknowledged.load(Ordering::SeqCst) > before).await;
    }

    /// Waits until so many connections have acknowledged their first SETTINGS, where there are no others.
    pub(crate) async fn greeted(&self, connections: usize, what: &str) {
        until(what, || self.shared.acknowledged.load(Ordering::SeqCst) == connections).await;
    }

    pub(crate) fn go_away(&self, connection: usize, last_stream: u32) {
        self.go_away_saying(connection, last_stream, "{\"reason\":\"Shutdown\"}");
    }

    /// GOAWAY with any debug data. The connection stays open.
    pub(crate) fn go_away_saying(&self, connection: usize, last_stream: u32, words: &str) {
        let mut payload = last_stream.to_be_bytes().to_vec();
        payload.extend(0_u32.to_be_bytes());
        payload.extend(words.as_bytes());
        self.order(connection, Order::Frame(frame(7, 0, 0, &payload)));
    }

    pub(crate) async fn next(&mut self) -> Got {
        within("a request", self.got.recv()).await.unwrap()
    }

    pub(crate) async fn next_many(&mut self, n: usize) -> Vec<Got> {
        let mut all = Vec::new();
        while all.len() < n {
            all.push(self.next().await);
        }
        all
    }

    pub(crate) fn has_nothing(&mut self) -> bool {
        self.got.try_recv().is_err()
    }

    /// Answers everything from now on, and counts.
    pub(crate) fn answer_all(self, status: u16, body: &'static str) -> Arc<Mutex<Vec<(usize, String)>>> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        self.answer_by(move |got| {
            log.lock().unwrap().push((got.connection, got.token().to_owned()));
            got.answer(status, body);
        });
        seen
    }

    /// Hands every request from now on to `answer`.
    pub(crate) fn answer_by(mut self, mut answer: impl FnMut(Got) + Send + 'static) {
        tokio::spawn(async move {
            while let Some(got) = self.got.recv().await {
                answer(got);
            }
        });
    }

    /// Its address, as in the configuration.
    pub(crate) fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }
}

fn settings(id: u16, value: u32) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend(value.to_be_bytes());
    frame(4, 0, 0, &payload)
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

/// Between the client and `h2`: sees every frame, and adds, changes and withholds some.
async fn relay_frames(
    tls: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    outer: tokio::io::DuplexStream,
    script: Script,
    mut orders: mpsc::UnboundedReceiver<Order>,
    shared: Arc<Shared>,
) {
    let (mut from_client, mut to_client) = tokio::io::split(tls);
    let (mut from_server, mut to_server) = tokio::io::split(outer);
    let mut preface = [0; 24];
    if from_client.read_exact(&mut preface).await.is_err() {
        return;
    }
    to_server.write_all(&preface).await.unwrap();
    let upstream = tokio::spawn(pass_on(from_client, to_server, Arc::clone(&shared)));
    // A task of its own: half a frame is not to be lost when an order comes.
    let (sender, mut frames) = mpsc::channel(16);
    let downstream = tokio::spawn(async move {
        while let Some(bytes) = read_frame(&mut from_server).await
            && sender.send(bytes).await.is_ok()
        {}
    });
    let mut withheld = Vec::new();
    loop {
        tokio::select! {
            bytes = frames.recv() => {
                let Some(mut bytes) = bytes else { break };
                if bytes[3] == 4 && bytes[4] == 0 {
                    for setting in bytes[9..].chunks_exact_mut(6) {
                        if setting[1] == 3 {
                            setting[2..].copy_from_slice(&script.streams.to_be_bytes());
                        }
                    }
                    if shared.withhold_greeting.load(Ordering::SeqCst) {
                        withheld = bytes;
                        continue;
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
                Some(Order::Greet) => {
                    let _ = to_client.write_all(&std::mem::take(&mut withheld)).await;
                    let _ = to_client.flush().await;
                }
                Some(Order::Cut) | None => break,
            }
        }
    }
    upstream.abort();
    downstream.abort();
}

async fn serve(
    tls: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    number: usize,
    script: Script,
    orders: mpsc::UnboundedReceiver<Order>,
    sender: mpsc::UnboundedSender<Got>,
    load: Arc<Load>,
    shared: Arc<Shared>,
) {
    let (inner, outer) = tokio::io::duplex(1 << 20);
    let proxy = tokio::spawn(relay_frames(tls, outer, script, orders, shared));
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

/// Reads `iat` out of `bearer header.claims.signature`, with code of the test's own.
pub(crate) fn issued_at(token: &str) -> i64 {
    use base64::Engine as _;
    let claims = token.split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    claims["iat"].as_i64().unwrap()
}
