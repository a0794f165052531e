//! The load: a back-office that POSTs single notifications, each a request of its own.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderValue, Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::{
    service::{self, Database, PAYLOAD, Processors, Serve, Sink, TOPIC},
    settings::Settings,
    wire,
};

/// Connections to the API.
const CONNECTIONS: usize = 4;

/// Notifications before the clock starts: connections to APNs and to the database are open then.
const WARM_UP: usize = 200;

/// How long the last outcome may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// An answer of the API.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
    pub(crate) took: Duration,
}

impl Answer {
    /// Of the notification, if it is one that was accepted.
    pub(crate) fn id(&self) -> Option<String> {
        if self.status != StatusCode::ACCEPTED {
            return None;
        }
        let body: Value = serde_json::from_slice(&self.body).expect("JSON");
        Some(body["id"].as_str().expect("an id").to_owned())
    }
}

/// A request; with a body it is JSON.
pub(crate) fn request(method: Method, url: &str, key: Option<&HeaderValue>) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = url.parse().expect("an address");
    request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(key) = key {
        request.headers_mut().insert(header::AUTHORIZATION, key.clone());
    }
    request
}

/// One request.
pub(crate) async fn ask(send: &mut SendRequest<Bytes>, request: Request<()>, body: Bytes) -> Answer {
    let mut answer = None;
    wire::drive(send, [(request, body)], 1, read, |read| answer = Some(read)).await;
    answer.expect("it was waited for")
}

/// Reads an answer to its end; the clock starts now.
async fn read_from(started: Instant, response: ResponseFuture) -> Answer {
    let response = response.await.expect("an answer");
    let status = response.status();
    let mut stream = response.into_body();
    let mut body = BytesMut::new();
    while let Some(part) = stream.data().await {
        let part = part.expect("the rest of an answer");
        stream.flow_control().release_capacity(part.len()).expect("what was received can be released");
        body.extend_from_slice(&part);
    }
    Answer { status, body: body.freeze(), took: started.elapsed() }
}

fn read(response: ResponseFuture) -> impl Future<Output = Answer> {
    read_from(Instant::now(), response)
}

/// The API of a running service.
pub(crate) struct Api {
    lines: Vec<SendRequest<Bytes>>,
    url: String,
    key: HeaderValue,
    devices: usize,
    concurrency: usize,
}

impl Api {
    /// Over connections to each of the replicas in turn.
    pub(crate) async fn connect(replicas: &[Serve], key: String, settings: &Settings) -> Self {
        let address = replicas.first().expect("at least one replica").address();
        let mut lines = Vec::new();
        for address in replicas.iter().map(Serve::address).cycle().take(CONNECTIONS.max(replicas.len())) {
            let stream = TcpStream::connect(address).await.expect("serve listens");
            stream.set_nodelay(true).expect("a socket");
            lines.push(wire::handshake(stream).await);
        }
        let mut key = HeaderValue::try_from(format!("Bearer {key}")).expect("a header");
        key.set_sensitive(true);
        let (devices, concurrency) = (settings.devices, settings.concurrency);
        let api = Self { lines, url: format!("http://{address}"), key, devices, concurrency };
        // One request after another, so that `serve` knows the key: a burst with one it has not met since its start is partly
        // answered `429 Too many requests with unknown API keys`.
        for mut line in api.lines.clone() {
            ask(&mut line, api.request(Method::GET, "/v1/notifications?limit=1"), Bytes::new()).await;
        }
        api
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> Request<()> {
        request(method, &format!("{}{path}", self.url), Some(&self.key))
    }

    /// Sends all, over all connections, `concurrency` at once.
    pub(crate) async fn all(&self, requests: Vec<(Request<()>, Bytes)>) -> Vec<Answer> {
        let mut shares: Vec<Vec<_>> = self.lines.iter().map(|_| Vec::new()).collect();
        for (number, request) in requests.into_iter().enumerate() {
            shares[number % self.lines.len()].push(request);
        }
        let window = self.concurrency.div_ceil(self.lines.len());
        let lines = self.lines.iter().cloned().zip(shares).map(|(mut line, share)| async move {
            let mut answers = Vec::with_capacity(share.len());
            wire::drive(&mut line, share, window, read, |answer| answers.push(answer)).await;
            answers
        });
        futures_util::future::join_all(lines).await.into_iter().flatten().collect()
    }

    pub(crate) fn registration(&self, number: usize) -> (Request<()>, Bytes) {
        let body = json!({ "token": service::device_token(number), "topic": TOPIC, "user_id": user(number) });
        (self.request(Method::POST, "/v1/devices"), Bytes::from(body.to_string()))
    }

    /// Registers one device: one commit of its own.
    pub(crate) async fn register(&self, number: usize) {
        for answer in self.all(vec![self.registration(number)]).await {
            assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
        }
    }

    /// Registers devices; returns how many a second.
    pub(crate) async fn register_all(&self, numbers: Range<usize>) -> f64 {
        let devices = numbers.len();
        let requests = numbers.map(|number| self.registration(number)).collect();
        let started = Instant::now();
        let answers = self.all(requests).await;
        let took = started.elapsed();
        for answer in answers {
            assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
        }
        devices as f64 / took.as_secs_f64()
    }

    /// Any of the connections, for a request that is not to wait for others.
    pub(crate) fn line(&self, number: usize) -> SendRequest<Bytes> {
        self.lines[number % self.lines.len()].clone()
    }

    pub(crate) fn notification(&self, number: usize) -> (Request<()>, Bytes) {
        let user = user(number % self.devices);
        let body = format!(
            r#"{{"topic":"{TOPIC}","to":{{"user_ids":["{user}"]}},"payload":{PAYLOAD},"reference":"order-{number}"}}"#
        );
        (self.request(Method::POST, "/v1/notifications"), Bytes::from(body))
    }

    pub(crate) fn notifications(&self, count: usize) -> Vec<(Request<()>, Bytes)> {
        (0..count).map(|number| self.notification(number)).collect()
    }

    fn question(&self, id: &str) -> (Request<()>, Bytes) {
        (self.request(Method::GET, &format!("/v1/notifications/{id}")), Bytes::new())
    }

    /// Those of the given notifications that are not done.
    async fn open_among(&self, ids: Vec<String>) -> Vec<String> {
        let answers = self.all(ids.iter().map(|id| self.question(id)).collect()).await;
        // `all` answers in an order of its own.
        let done: HashSet<String> = answers
            .iter()
            .map(|answer| serde_json::from_slice::<Value>(&answer.body).unwrap_or_default())
            .filter(|seen| seen["status"] == "done")
            .filter_map(|seen| seen["id"].as_str().map(str::to_owned))
            .collect();
        ids.into_iter().filter(|id| !done.contains(id)).collect()
    }
}

/// The user who holds a device.
pub(crate) fn user(number: usize) -> String {
    format!("livreur-{number}")
}

/// What a batch has shown.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) figures: Vec<(String, f64)>,
    pub(crate) problems: Vec<String>,
}

impl Batch {
    pub(crate) fn note(&mut self, name: &str, value: f64) {
        self.figures.push((name.to_owned(), value));
    }
}

/// The median and the value that one of a hundred exceeds.
pub(crate) fn percentiles(mut values: Vec<f64>) -> [(&'static str, f64); 2] {
    values.sort_by(f64::total_cmp);
    [("p50", values[values.len() / 2]), ("p99", values[values.len() * 99 / 100])]
}

/// Sends so many pushes that all connections are open. Says whether they have ended.
pub(crate) async fn warm_up(api: &Api, sink: &Sink) -> bool {
    let at_first = sink.accepted().await;
    let answers = api.all(api.notifications(WARM_UP)).await;
    delivered(sink, at_first + WARM_UP as u64).await && settled(api, &answers).await
}

/// Sends `NOTIFICATIONS` and waits until each is accepted, delivered and settled.
pub(crate) async fn batch(api: &Api, serve: &[Serve], database: &Database, sink: &Sink, settings: &Settings) -> Batch {
    let mut batch = Batch::default();
    if !warm_up(api, sink).await {
        batch.problems.push("the warm-up did not end".to_owned());
        return batch;
    }

    let count = settings.notifications;
    let requests = api.notifications(count);
    let before = sink.accepted().await;
    let processors = Processors::start(serve, database, sink);
    let started = Instant::now();
    let answers = api.all(requests).await;
    let answered_after = started.elapsed();
    let all_delivered = delivered(sink, before + count as u64).await;
    let delivered_after = started.elapsed();
    let all_settled = settled(api, &answers).await;
    let settled_after = started.elapsed();
    let cpu = processors.since();

    let per_second = |took: Duration| count as f64 / took.as_secs_f64();
    batch.note("answered 202/s", per_second(answered_after));
    batch.note("delivered/s", per_second(delivered_after));
    batch.note("accepted, delivered and settled/s", per_second(settled_after));
    let latencies = answers.iter().map(|answer| answer.took.as_secs_f64() * 1e3).collect();
    for (name, latency) in percentiles(latencies) {
        batch.note(&format!("POST to 202, {name} ms"), latency);
    }
    for (name, took) in cpu {
        batch.note(&format!("{name}: CPU µs/notification"), took / count as f64);
    }
    batch.note("serve: peak memory MiB", service::peak_memory(serve));

    if !all_delivered || !all_settled {
        batch.problems.push(format!("not settled after {PATIENCE:?}"));
    }
    verify(api, &answers, &mut batch.problems).await;
    let arrived = sink.accepted().await - before;
    if arrived != count as u64 {
        batch.problems.push(format!("{count} notifications sent, the simulator accepted {arrived} pushes"));
    }
    batch
}

/// Waits until the simulator has accepted so many since its start.
async fn delivered(sink: &Sink, accepted: u64) -> bool {
    let started = Instant::now();
    while sink.accepted().await < accepted {
        if started.elapsed() > PATIENCE {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}

/// Waits until the last 100 and every 100th are done, as the API says. To ask for each would be a load of its own;
/// [`verify`] does, when the clock has stopped.
async fn settled(api: &Api, answers: &[Answer]) -> bool {
    let started = Instant::now();
    let last = answers.len().saturating_sub(100);
    let looked_at = answers.iter().enumerate().filter(|(number, _)| *number >= last || number % 100 == 0);
    let mut open: Vec<String> = looked_at.filter_map(|(_, answer)| answer.id()).collect();
    while !open.is_empty() {
        if started.elapsed() > PATIENCE {
            return false;
        }
        open = api.open_among(open).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    true
}

/// Reads each notification back: one device, accepted, done.
async fn verify(api: &Api, answers: &[Answer], problems: &mut Vec<String>) {
    let mut refused: HashMap<StatusCode, usize> = HashMap::new();
    let mut questions = Vec::new();
    for answer in answers {
        if let Some(id) = answer.id() {
            questions.push(api.question(&id));
        } else {
            *refused.entry(answer.status).or_default() += 1;
        }
    }
    problems.extend(refused.iter().map(|(status, times)| format!("{times} requests were answered {status}")));
    let mut wrong = Vec::new();
    for answer in api.all(questions).await {
        let seen: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let counts = &seen["counts"];
        if seen["status"] != "done" || counts["targeted"] != 1 || counts["accepted"] != 1 {
            wrong.push(format!("{} {seen}", answer.status));
        }
    }
    if let Some(first) = wrong.first() {
        problems.push(format!("{} notifications are not done with one device accepted, such as {first}", wrong.len()));
    }
}
