//! One notification for everybody, from the request to the last outcome, and what single notifications feel of it.
//!
//! Each run has a fresh database with fresh devices. In one process of `serve`, after a warm-up with single
//! notifications: a broadcast to devices that have never accepted anything, a second one to the same, single
//! notifications alone at two rates, and single notifications while a third broadcast runs (and more, until enough were
//! posted).

use std::{
    cell::Cell,
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use http::{Method, Request};
use serde_json::Value;

use crate::{
    load::{self, Api, Batch, percentiles},
    service::{self, Arrival, Database, Kit, PAYLOAD, Processors, Serve, Sink, TOPIC, device_token},
    settings::Settings,
};

/// Devices of the broadcasts whose [`peaks`] are compared a larger one with.
pub(crate) const SMALL: usize = 100_000;

/// Devices written by one statement.
const ROWS: usize = 1_000;

/// What a registration writes as `last_accepted_at` of a token that was never accepted.
const NEVER: i64 = -(1 << 40);

/// Single notifications a second: alone and beside a broadcast, and more of them alone.
pub(crate) const RATE: usize = 100;
const LARGER_RATE: usize = 500;

/// How long they are posted, at the least: until there are enough to speak of the slowest hundredth.
const SECONDS: usize = 5;

/// So long after the warm-up no broadcast leaves the way free for its urgent pushes any more, with a second to spare.
const QUIET: Duration = Duration::from_secs(6);

/// How long nothing may happen before a broadcast counts as stuck, and a single notification as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the simulator is asked for what it has recorded: it keeps the newest 100,000.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// All that is measured of broadcasts to `BROADCAST` devices on a fresh database beside `place`.
pub(crate) async fn measure(kit: &Kit, sink: &Sink, place: &Database, settings: &Settings) -> Batch {
    let mut batch = Batch::default();
    let stage = Stage::set(kit, sink, place, settings, settings.broadcast, (1, "")).await;
    let mut size = stage.database.size().await;
    for which in ["first", "second"] {
        let note = |batch: &mut Batch, name: &str, value| batch.note(&format!("{which} broadcast: {name}"), value);
        let processors = Processors::start(&stage.serve, &stage.database, sink);
        let broadcast = match stage.broadcast(true).await {
            Ok(broadcast) => broadcast,
            Err(problem) => {
                batch.problems.push(format!("{which} broadcast: {problem}"));
                break;
            }
        };
        let cpu = processors.since();
        note(&mut batch, "POST to 202, ms", broadcast.answered.as_secs_f64() * 1e3);
        let devices = stage.devices as f64;
        note(&mut batch, "delivered/s", devices / broadcast.delivered.as_secs_f64());
        note(&mut batch, "devices/s", devices / broadcast.settled.as_secs_f64());
        for (name, took) in cpu {
            note(&mut batch, &format!("{name}: CPU µs/device"), took / devices);
        }
        note(&mut batch, "serve: peak memory MiB", service::peak_memory(&stage.serve));
        let grown = stage.database.size().await;
        for (name, before, after) in
            [("devices' rows", size.devices, grown.devices), ("everything else", size.others, grown.others)]
        {
            note(&mut batch, &format!("growth of {name}, bytes/device"), (after as f64 - before as f64) / devices);
        }
        size = grown;
    }
    if batch.problems.is_empty() {
        stage.singles(&mut batch).await;
    }
    batch.problems.extend(stage.strike().await);
    batch
}

/// The most memory that `serve` has had at once after one broadcast to so many devices and after two, in MiB.
pub(crate) async fn peaks(
    kit: &Kit,
    sink: &Sink,
    place: &Database,
    settings: &Settings,
    devices: usize,
) -> Result<[f64; 2], String> {
    let stage = Stage::set(kit, sink, place, settings, devices, (1, "")).await;
    let mut peaks = [0.0; 2];
    let mut problem = None;
    for peak in &mut peaks {
        problem = problem.or(stage.broadcast(true).await.err());
        *peak = service::peak_memory(&stage.serve);
    }
    let stopped = stage.strike().await;
    problem.or(stopped.into_iter().next()).map_or(Ok(peaks), Err)
}

/// A service that is warm, and whom it serves.
pub(crate) struct Stage<'a> {
    database: Database,
    serve: Vec<Serve>,
    api: Api,
    sink: &'a Sink,
    devices: usize,
}

/// How long a broadcast took: until its `202`, and from there until the simulator had accepted it for each device, and
/// until the API said so.
pub(crate) struct Broadcast {
    answered: Duration,
    delivered: Duration,
    pub(crate) settled: Duration,
}

impl<'a> Stage<'a> {
    /// On a fresh database beside `place` with so many devices; with so many replicas, and more lines behind their `[apns]`.
    pub(crate) async fn set(
        kit: &Kit,
        sink: &'a Sink,
        place: &Database,
        settings: &Settings,
        devices: usize,
        replicas: (usize, &str),
    ) -> Self {
        let database = place.sibling().await;
        with_devices(&database, devices).await;
        let stage = Self::on(kit, sink, database, settings, devices, replicas).await;
        tokio::time::sleep(QUIET).await;
        stage
    }

    /// On a database that has its devices.
    pub(crate) async fn on(
        kit: &Kit,
        sink: &'a Sink,
        database: Database,
        settings: &Settings,
        devices: usize,
        (replicas, more): (usize, &str),
    ) -> Self {
        let serve = kit.replicas(replicas, &database, sink, more).await;
        // All single notifications go to one of the devices: the simulator can be asked for what arrived there.
        let settings = Settings { devices: 1, ..settings.clone() };
        let api = Api::connect(&serve, kit.api_key(&database), &settings).await;
        assert!(load::warm_up(&api, sink).await, "the warm-up did not end");
        Self { database, serve, api, sink, devices }
    }

    pub(crate) const fn database(&self) -> &Database {
        &self.database
    }

    /// Ends the processes: the database, and what went wrong with them.
    pub(crate) async fn leave(self) -> (Database, Vec<String>) {
        (self.database, service::stop(self.serve).await)
    }

    /// The same, and the database goes.
    pub(crate) async fn strike(self) -> Vec<String> {
        let (database, problems) = self.leave().await;
        database.drop().await;
        problems
    }

    /// [`Self::ways`] by the simulator's record.
    pub(crate) async fn recorded(
        &self,
        rate: usize,
        posted: &Cell<usize>,
        enough: impl Fn() -> bool,
    ) -> Result<Vec<f64>, String> {
        self.sink.record(true).await;
        let ways = self.ways(rate, posted, enough).await;
        self.sink.record(false).await;
        ways
    }

    /// Sends to everybody, and waits until each device is accepted: the simulator has accepted as many pushes then, and
    /// no other unless it is not `alone`.
    pub(crate) async fn broadcast(&self, alone: bool) -> Result<Broadcast, String> {
        let before = self.sink.accepted().await;
        let body = format!(r#"{{"topic":"{TOPIC}","to":{{"everyone":true}},"payload":{PAYLOAD}}}"#);
        let post = (self.api.request(Method::POST, "/v1/notifications"), Bytes::from(body));
        let answer = self.api.all(vec![post]).await.pop().ok_or("no answer")?;
        let started = Instant::now();
        let id = answer.id().ok_or_else(|| format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)))?;

        let devices = self.devices as u64;
        let (mut accepted, mut moved) = (0, Instant::now());
        while accepted < devices {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let now = self.sink.accepted().await - before;
            if now > accepted {
                (accepted, moved) = (now, Instant::now());
            } else if moved.elapsed() > PATIENCE {
                return Err(format!("stuck: {accepted} of {devices} devices accepted; {}", self.seen(&id).await));
            }
        }
        let delivered = started.elapsed();
        let mut seen = self.seen(&id).await;
        while seen["status"] != "done" {
            if moved.elapsed() > PATIENCE {
                return Err(format!("delivered and not settled: {seen}"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            seen = self.seen(&id).await;
        }
        let settled = started.elapsed();
        let accepted = self.sink.accepted().await - before;
        let counts = &seen["counts"];
        if counts["targeted"] != devices || counts["accepted"] != devices || (alone && accepted > devices) {
            return Err(format!("{devices} devices, the simulator accepted {accepted} pushes, the API says {seen}"));
        }
        Ok(Broadcast { answered: answer.took, delivered, settled })
    }

    async fn seen(&self, id: &str) -> Value {
        let question = self.api.request(Method::GET, &format!("/v1/notifications/{id}"));
        let answer = self.api.all(vec![(question, Bytes::new())]).await.pop();
        answer.and_then(|answer| serde_json::from_slice(&answer.body).ok()).unwrap_or_default()
    }

    /// Single notifications at a steady rate: alone, and while broadcasts run.
    async fn singles(&self, batch: &mut Batch) {
        self.sink.record(true).await;
        let posted = Cell::new(0);
        for rate in [RATE, LARGER_RATE] {
            posted.set(0);
            let alone = self.ways(rate, &posted, || posted.get() >= SECONDS * rate).await;
            note_ways(batch, rate, "alone", alone);
        }

        let over = Cell::new(false);
        posted.set(0);
        let broadcasts = async {
            let mut problems = Vec::new();
            while posted.get() < SECONDS * RATE && problems.is_empty() {
                problems.extend(self.broadcast(false).await.err());
            }
            over.set(true);
            problems
        };
        let (problems, beside) = tokio::join!(broadcasts, self.ways(RATE, &posted, || over.get()));
        batch.problems.extend(problems.into_iter().map(|problem| format!("third broadcast: {problem}")));
        note_ways(batch, RATE, "during a broadcast", beside);
        self.sink.record(false).await;
    }

    /// Posts one single notification after another, whatever becomes of those before it, until it is enough. Returns
    /// how long each took from its `POST` to the simulator, in milliseconds.
    async fn ways(&self, rate: usize, posted: &Cell<usize>, enough: impl Fn() -> bool) -> Result<Vec<f64>, String> {
        let token = device_token(0);
        let ended = Cell::new(false);
        let post = async {
            let posts = self.post(rate, posted, enough).await;
            ended.set(true);
            posts
        };
        let arrivals = async {
            let mut arrivals: Vec<Arrival> = Vec::new();
            while !ended.get() {
                tokio::time::sleep(LOOK_EVERY).await;
                self.look(&token, &mut arrivals).await;
            }
            arrivals
        };
        let (posts, mut arrivals) = tokio::join!(post, arrivals);
        let posts = posts?;
        let waiting = Instant::now();
        while posts.keys().any(|id| !arrivals.iter().any(|arrival| arrival.collapse_id.as_ref() == Some(id))) {
            if waiting.elapsed() > PATIENCE {
                return Err("not every single notification arrived".to_owned());
            }
            tokio::time::sleep(LOOK_EVERY).await;
            self.look(&token, &mut arrivals).await;
        }
        // What belongs to no post is a broadcast's.
        let ways: Vec<f64> = arrivals
            .iter()
            .filter_map(|arrival| Some(arrival.at_ms() - posts.get(arrival.collapse_id.as_ref()?)?))
            .collect();
        if ways.len() != posts.len() {
            return Err(format!("{} single notifications, {} pushes of them", posts.len(), ways.len()));
        }
        Ok(ways)
    }

    async fn look(&self, token: &str, arrivals: &mut Vec<Arrival>) {
        let after = arrivals.last().map_or(0, |arrival| arrival.sequence);
        arrivals.extend(self.sink.arrivals(token, after).await);
    }

    /// When each notification was posted, in milliseconds.
    async fn post(
        &self,
        rate: usize,
        posted: &Cell<usize>,
        enough: impl Fn() -> bool,
    ) -> Result<HashMap<String, f64>, String> {
        let one = async |number: usize, (request, body): (Request<()>, Bytes)| {
            let at = service::now_ms();
            (at, load::ask(&mut self.api.line(number), request, body).await)
        };
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / u32::try_from(rate).expect("not that many"));
        let mut waiting = FuturesUnordered::new();
        let mut posts = HashMap::new();
        let mut open = true;
        loop {
            // Neither arm loses anything when the other one is first.
            tokio::select! {
                _ = ticks.tick(), if open => {
                    open = !enough();
                    if open {
                        waiting.push(one(posted.get(), self.api.notification(posted.get())));
                        posted.set(posted.get() + 1);
                    }
                }
                Some((at, answer)) = waiting.next(), if !waiting.is_empty() => {
                    let (status, said) = (answer.status, String::from_utf8_lossy(&answer.body).into_owned());
                    let Some(id) = answer.id() else {
                        return Err(format!("a single notification was answered {status}: {said}"));
                    };
                    posts.insert(id, at);
                }
                else => return Ok(posts),
            }
        }
    }
}

pub(crate) fn note_ways(batch: &mut Batch, rate: usize, when: &str, ways: Result<Vec<f64>, String>) {
    match ways {
        Ok(ways) => {
            for (name, way) in percentiles(ways) {
                batch.note(&format!("{rate} single notifications/s {when}: POST to arrival, {name} ms"), way);
            }
        }
        Err(problem) => batch.problems.push(format!("{rate} single notifications/s {when}: {problem}")),
    }
}

/// Writes devices past the API, as their registrations leave them: never accepted, their environment not known.
async fn with_devices(database: &Database, count: usize) {
    let now = jiff::Timestamp::now().as_millisecond();
    let numbers: Vec<usize> = (0..count).collect();
    let pages = numbers.chunks(ROWS).map(|page| {
        let rows: Vec<String> = page
            .iter()
            .map(|number| {
                let (id, token) = (number + 1, device_token(*number));
                let user = hex::encode(load::user(*number));
                format!("(X'{id:032x}', '{TOPIC}', X'{token}', 'alert', X'{user}', 1, 'active', 'unverified', {now}, {now}, {NEVER})")
            })
            .collect();
        format!(
            "INSERT INTO devices (id, topic, token, push_type, user_id, generation, status, environment, created_at, \
             last_registered_at, last_accepted_at) VALUES {}",
            rows.join(",")
        )
    });
    database.execute_all(pages).await;
}
