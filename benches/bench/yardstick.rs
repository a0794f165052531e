//! Ways to send the same pushes to the same simulator: what the `h2` crate can do at most, how the field's Rust
//! libraries (such as a2) do it, and Sonnette's own engine. Each runs in a process of its own.
//!
//! The first two keep one valid provider token, send the headers that Sonnette sends, wait for each answer and check
//! it. None keeps anything: no database, no retry.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Command, Stdio},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::{TokioExecutor, TokioIo},
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use uuid::Uuid;

use crate::{
    engine::{self, Engine},
    service::{self, Kit, Sink, TOPIC},
    wire,
};

/// Sent before the clock starts: the handshake, the first SETTINGS, and the first allocations are behind it then.
pub(crate) const WARM_UP: usize = 200;

/// Pushes at once of the hyper-util client: the stream limit of APNs.
const AT_ONCE: usize = 1_000;

/// Which way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Client {
    /// A loop over the `h2` crate with requests that are ready before the clock starts, on one thread.
    BareH2 { connections: usize },
    /// hyper-util's client as a2 0.10 uses it: one client, each request built when it is sent.
    HyperUtil,
    /// Sonnette's.
    Engine(Engine),
}

/// What a child is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    client: Client,
    address: SocketAddr,
    ca_file: PathBuf,
    provider_token: String,
    /// Of Sonnette.
    config: PathBuf,
    pushes: usize,
}

impl Plan {
    pub(crate) fn new(client: Client, kit: &Kit, sink: &Sink, pushes: usize) -> Self {
        Self {
            client,
            address: sink.production,
            ca_file: sink.ca_file.clone(),
            provider_token: kit.provider_token(),
            config: kit.engine_config(sink),
            pushes,
        }
    }
}

/// What a child tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// With the warm-up.
    pub(crate) sent: u64,
    pub(crate) per_second: f64,
    /// A push.
    pub(crate) cpu_us: f64,
    /// MiB.
    pub(crate) peak_memory: f64,
    /// How much of the machine's processors was busy meanwhile, with everything that runs on it: 1 is all.
    pub(crate) busy: f64,
}

/// The clocks of one measurement.
pub(crate) struct Timed {
    started: Instant,
    cpu_us: f64,
    machine: service::Ticks,
}

impl Timed {
    pub(crate) fn start() -> Self {
        Self { started: Instant::now(), cpu_us: service::cpu_us_of(std::process::id()), machine: service::Ticks::now() }
    }

    pub(crate) fn stop(self) -> Took {
        Took {
            wall: self.started.elapsed(),
            cpu_us: service::cpu_us_of(std::process::id()) - self.cpu_us,
            busy: self.machine.busy_since(),
        }
    }
}

/// What they say.
pub(crate) struct Took {
    wall: Duration,
    cpu_us: f64,
    busy: f64,
}

/// Runs a client in a process of its own; what it logs goes to the end of `log`.
pub(crate) fn run(plan: &Plan, log: &Path) -> Figures {
    let to = File::options().create(true).append(true).open(log).expect("a log");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .arg("yardstick")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(to)
        .spawn()
        .expect("this program starts again");
    let plan = serde_json::to_vec(plan).expect("plain data");
    child.stdin.take().expect("asked for").write_all(&plan).expect("the child reads");
    let output = child.wait_with_output().expect("the child ends");
    assert!(output.status.success(), "a client failed, and said:\n{}", service::end_of(log));
    serde_json::from_slice(&output.stdout).expect("figures")
}

/// The child: reads a [`Plan`], prints [`Figures`].
pub(crate) fn run_child() {
    let mut plan = Vec::new();
    std::io::stdin().read_to_end(&mut plan).expect("a plan");
    let plan: Plan = serde_json::from_slice(&plan).expect("a plan");
    let multi_thread = || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let took = match &plan.client {
        // One thread: handing frames from thread to thread costs a bare loop more than a second thread brings.
        Client::BareH2 { connections } => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(bare_h2(&plan, *connections))
        }
        // As `#[tokio::main]` makes it.
        Client::HyperUtil => multi_thread().block_on(hyper_util(&plan)),
        // As `sonnette` makes it.
        Client::Engine(engine) => multi_thread().block_on(engine::run(engine, &plan.config, plan.pushes)),
    };
    let count = plan.pushes as f64;
    let figures = Figures {
        sent: (plan.pushes + WARM_UP) as u64,
        per_second: count / took.wall.as_secs_f64(),
        cpu_us: took.cpu_us / count,
        peak_memory: service::peak_memory_of(std::process::id()),
        busy: took.busy,
    };
    println!("{}", serde_json::to_string(&figures).expect("plain data"));
}

/// The parts of a push that differ from the next.
struct Push {
    token: String,
    id: Uuid,
    expiration: i64,
}

impl Push {
    fn new(number: usize) -> Self {
        let expiration = jiff::Timestamp::now().as_second() + 86_400;
        Self { token: service::device_token(number), id: Uuid::now_v7(), expiration }
    }
}

async fn bare_h2(plan: &Plan, connections: usize) -> Took {
    let tls = wire::tls(&plan.ca_file);
    let body = Bytes::from_static(service::PAYLOAD.as_bytes());
    let mut shared = HeaderMap::new();
    shared.insert(header::AUTHORIZATION, text(format!("bearer {}", plan.provider_token)));
    shared.insert("apns-topic", HeaderValue::from_static(TOPIC));
    shared.insert("apns-push-type", HeaderValue::from_static("alert"));
    shared.insert("apns-priority", HeaderValue::from_static("10"));
    let request = |number| {
        let push = Push::new(number);
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri(plan, &push);
        let mut headers = shared.clone();
        // Never the same twice: not worth a place in the compression table.
        for (name, value) in [
            ("apns-id", push.id.to_string()),
            ("apns-collapse-id", push.id.to_string()),
            ("apns-expiration", push.expiration.to_string()),
        ] {
            let mut value = text(value);
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        *request.headers_mut() = headers;
        (request, body.clone())
    };
    let mut lines = Vec::new();
    for number in 0..connections {
        let mut send = wire::handshake(wire::connect_tls(&tls, plan.address).await.expect("the simulator")).await;
        let share = |all: usize| (number..all).step_by(connections);
        let warm_up: Vec<_> = share(WARM_UP).map(request).collect();
        wire::drive(&mut send, warm_up, usize::MAX, |response| response, check).await;
        let requests: Vec<_> = share(plan.pushes).map(request).collect();
        lines.push((send, requests));
    }
    let timed = Timed::start();
    let all = lines.into_iter().map(|(mut send, requests)| async move {
        wire::drive(&mut send, requests, usize::MAX, |response| response, check).await;
    });
    futures_util::future::join_all(all).await;
    timed.stop()
}

fn check(response: Result<http::Response<h2::RecvStream>, h2::Error>) {
    assert_eq!(response.expect("an answer").status(), StatusCode::OK);
}

async fn hyper_util(plan: &Plan) -> Took {
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .pool_idle_timeout(Duration::from_secs(600))
        .http2_only(true)
        .build(Connector { tls: wire::tls(&plan.ca_file), address: plan.address });
    let send = async |number| {
        let push = Push::new(number);
        let body = service::PAYLOAD.to_owned();
        let request = Request::builder()
            .method(Method::POST)
            .uri(uri(plan, &push))
            .header(header::CONTENT_TYPE, "application/json")
            .header("apns-priority", "10")
            .header("apns-id", push.id.to_string())
            .header("apns-expiration", push.expiration.to_string())
            .header("apns-push-type", "alert")
            .header("apns-collapse-id", push.id.to_string())
            .header("apns-topic", TOPIC)
            .header(header::AUTHORIZATION, format!("Bearer {}", plan.provider_token))
            .header(header::CONTENT_LENGTH, body.len().to_string())
            .body(Full::new(Bytes::from(body)))
            .expect("a request");
        let response = client.request(request).await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
    };
    // One by one first: hyper opens 100 streams before it has read SETTINGS, for which APNs would close the connection.
    for number in 0..WARM_UP {
        send(number).await;
    }
    let timed = Timed::start();
    futures_util::stream::iter(0..plan.pushes).map(send).buffer_unordered(AT_ONCE).for_each(async |()| {}).await;
    timed.stop()
}

fn uri(plan: &Plan, push: &Push) -> Uri {
    format!("https://localhost:{}/3/device/{}", plan.address.port(), push.token).parse().expect("an address")
}

fn text(value: String) -> HeaderValue {
    HeaderValue::try_from(value).expect("a header")
}

/// What hyper-rustls does for a2: TCP, TLS with `h2` by ALPN.
#[derive(Clone)]
struct Connector {
    tls: TlsConnector,
    address: SocketAddr,
}

impl tower::Service<Uri> for Connector {
    type Response = Io;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Io>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { tls, address } = self.clone();
        Box::pin(async move { Ok(Io(TokioIo::new(wire::connect_tls(&tls, address).await?))) })
    }
}

/// A connection as hyper-util wants it.
struct Io(TokioIo<TlsStream<TcpStream>>);

impl Connection for Io {
    fn connected(&self) -> Connected {
        Connected::new().negotiated_h2()
    }
}

impl hyper::rt::Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
