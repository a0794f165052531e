//! Whatever APNs and the network do, every device has exactly one outcome, and it is the truth (promises 1, 2, 3, 5).
//!
//! The real service and the simulator run in processes of their own. Faults come by rate from a seed, and every half
//! second something happens to the whole environment. What must have come out is read from the simulator's ledger
//! alone: it knows what it accepted, and which of its answers the service has certainly read.
//!
//! `CHAOS_PUSHES` and `CHAOS_SEED` set size and seed, which is printed; `make chaos` is the long run.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::support::{
    client::Client,
    database::{TestDatabase, on_both_stores},
    scratch::Folder,
    service::{Service, SimulatorProcess, run},
    world::{TOPIC, keys_folder, until},
};

/// Notifications to all devices at once; one for each device comes on top. The last is sent on a good day.
const LISTS: usize = 9;

/// A 410 that is no younger than this against a registration proves nothing: clocks may differ (design.md, promise 5).
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The share of device tokens that are dead.
const DEAD_TOKENS: f64 = 0.05;

/// So many attempts of one push are at the mercy of the seed, so that retries end within the patience of a test.
const AFFECTED_ATTEMPTS: u32 = 2;

struct Plan {
    seed: u64,
    devices: usize,
}

impl Plan {
    fn read() -> Self {
        let number =
            |name, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number in CHAOS_…"));
        let devices = usize::try_from(number("CHAOS_PUSHES", 4_000)).unwrap() / (LISTS + 1);
        assert!((10..=20_000).contains(&devices), "CHAOS_PUSHES is 100 to 200,000");
        Self { seed: number("CHAOS_SEED", 1), devices }
    }

    fn pushes(&self) -> usize {
        self.devices * (LISTS + 1)
    }

    /// What the seed does to single attempts. What takes a whole connection is rare: hundreds are in flight on it, and
    /// the service opens only a few a minute.
    fn faults(&self) -> Value {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rare = (self.pushes() / 25_000).max(1) as f64 / self.pushes() as f64;
        let fault = |rate: f64, action: Value| json!({ "rate": rate, "action": action });
        let answer = |rate: f64, status: u16, reason: &str| {
            fault(rate, json!({ "answer": { "status": status, "reason": reason } }))
        };
        json!({
            "seed": self.seed,
            "affected_attempts": AFFECTED_ATTEMPTS,
            "dead_tokens": DEAD_TOKENS,
            "latency": { "percentiles_ms": { "p50": 5, "p99": 150, "max": 1_000 } },
            "faults": [
                answer(0.01, 500, "InternalServerError"),
                answer(0.01, 503, "ServiceUnavailable"),
                answer(0.01, 429, "TooManyRequests"),
                answer(0.002, 503, "NeverHeardOf"),
                answer(rare, 429, "TooManyProviderTokenUpdates"),
                answer(rare, 400, "IdleTimeout"),
                answer(rare, 503, "Shutdown"),
                fault(0.004, json!({ "stall": { "accepted": false } })),
                fault(0.004, json!({ "stall": { "accepted": true } })),
                fault(0.01, json!({ "reset": { "code": 7, "accepted": false } })),
                fault(0.005, json!({ "reset": { "code": 2, "accepted": false } })),
                fault(0.005, json!({ "reset": { "code": 2, "accepted": true } })),
                fault(rare, json!({ "close": { "accepted": false } })),
                fault(rare, json!({ "close": { "accepted": true } })),
                fault(rare, json!({ "go_away": { "last_stream": "all" } })),
                fault(rare, json!({ "go_away": { "last_stream": "before_this" } })),
            ],
        })
    }
}

fn device_token(number: usize) -> String {
    format!("{number:064x}")
}

/// What happens to the whole environment, until it is cancelled: stream limits rise and fall, and now and then every
/// connection is sent away or cut.
async fn weather(control: &Client, seed: u64) {
    let mut dice = StdRng::seed_from_u64(seed);
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (method, what, body) = match dice.random_range(0..100) {
            0..40 => {
                let limits = [1, 50, 500, 1_000, 1_000, 1_000, 1_000, 1_000];
                let limit = limits[dice.random_range(0..limits.len())];
                (http::Method::PUT, "stream-limit", json!({ "stream_limit": limit }))
            }
            40 => match dice.random_range(0..3) {
                0 => (http::Method::POST, "go-away", json!({})),
                1 => (http::Method::POST, "go-away", json!({ "debug": "", "twice": true })),
                _ => (http::Method::POST, "close", json!({})),
            },
            _ => continue,
        };
        let path = format!("/environments/production/{what}");
        let answer = control.send(method, &path, &[], body.to_string()).await.expect("the simulator lives");
        assert!(answer.status.is_success(), "{path}: {}", answer.text);
    }
}

async fn post(client: &Client, to: Value) -> String {
    let payload = json!({ "aps": { "alert": "Ding dong" } });
    let body = json!({ "topic": TOPIC, "to": to, "payload": payload }).to_string();
    let key = uuid::Uuid::new_v4().to_string();
    until("the notification is accepted", || async {
        let headers = [("idempotency-key", key.as_str())];
        let patience = Duration::from_secs(10);
        let answer =
            client.send_within(patience, http::Method::POST, "/v1/notifications", &headers, body.clone()).await?;
        match answer.status.as_u16() {
            202 => answer.body["id"].as_str().map(str::to_owned),
            503 | 429 => None,
            status => panic!("{status}: {}", answer.text),
        }
    })
    .await
}

/// Waits until all are done: bounded by the schedule of retries, not by how fast this machine is.
async fn all_done(client: &Client, notifications: &[String]) {
    let deadline = Instant::now() + Duration::from_secs(1_800);
    for id in notifications {
        while client.get(&format!("/v1/notifications/{id}")).await.ok()["status"] != "done" {
            assert!(Instant::now() < deadline, "{id} is not done after half an hour");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// What the ledger knows of one push.
struct Truth(Value);

impl Truth {
    fn number(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap_or(0)
    }

    /// Attempts that were received whole and processed.
    fn processed(&self) -> u64 {
        self.number("received") - self.number("unprocessed_certain") - self.number("unprocessed_uncertain")
    }

    /// An attempt was received, and the service may never have learned what became of it.
    fn has_doubt(&self) -> bool {
        let doubts =
            ["accepted_uncertain", "accepted_unanswered", "refused_uncertain", "unprocessed_uncertain", "unanswered"];
        doubts.into_iter().any(|name| self.number(name) > 0)
    }

    /// Whether the service may say this of it after so many attempts, and if not, why. One more than arrived was cut on
    /// its way, which the service cannot know.
    fn check(&self, status: &str, attempts: u64, is_dead: bool) -> Result<(), &'static str> {
        let answered_200 = self.number("accepted_certain") + self.number("accepted_uncertain") > 0;
        let unanswered = self.number("accepted_unanswered") + self.number("unanswered") > 0;
        match status {
            _ if attempts < self.processed() => Err("more attempts arrived than were counted"),
            "accepted" if !answered_200 => Err("it was never answered 200"),
            "unknown" if self.number("accepted_certain") > 0 => Err("the service has read a 200"),
            "unknown" if !self.has_doubt() && attempts == self.processed() => Err("every answer was certainly read"),
            "unregistered" if !is_dead => Err("nothing to this token was ever answered 410"),
            "unregistered" if self.number("accepted_certain") > 0 => Err("it was accepted"),
            "unregistered" if unanswered => Err("an attempt was never answered"),
            "accepted" | "unknown" | "unregistered" => Ok(()),
            _ => Err("no fault of this plan leads there"),
        }
    }
}

/// Every record of the ledger, by device token and `apns-id`, once nothing moves any more.
async fn truths(control: &Client) -> HashMap<(String, String), Truth> {
    until("the ledger is final", || async {
        let summary = control.get("/ledger/summary").await.ok();
        (summary["waiting"] == 0 && summary["unproved"] == 0).then_some(())
    })
    .await;
    let lines = control.get("/ledger/truth/lines").await.text;
    let text = |record: &Value, name: &str| record[name].as_str().unwrap().to_owned();
    lines
        .lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            ((text(&record, "token"), text(&record, "apns_id")), Truth(record))
        })
        .collect()
}

on_both_stores! {
    async fn every_device_has_one_outcome_and_it_is_the_ledgers(database) {
        chaos(&database).await;
    }
}

/// Lets the weather turn, once registrations are old enough for a 410 to count: whatever is dead is found to be so now.
async fn good_day(control: &Client, seed: u64, registered: Instant) {
    tokio::time::sleep(CLOCK_SKEW.saturating_sub(registered.elapsed()) + Duration::from_secs(1)).await;
    let limit = json!({ "stream_limit": 1_000 });
    let plan = json!({ "seed": seed, "dead_tokens": DEAD_TOKENS });
    for (what, body) in [("stream-limit", limit), ("chaos", plan)] {
        let path = format!("/environments/production/{what}");
        let answer = control.send(http::Method::PUT, &path, &[], body.to_string()).await.unwrap();
        assert!(answer.status.is_success(), "{path}: {}", answer.text);
    }
}

async fn chaos(database: &TestDatabase) {
    let plan = Plan::read();
    eprintln!("chaos: CHAOS_SEED={} CHAOS_PUSHES={}", plan.seed, plan.pushes());
    let folder = Folder::new("chaos");
    std::fs::write(folder.path().join("chaos.json"), plan.faults().to_string()).unwrap();
    let keys = keys_folder(&folder, "environments = [\"production\"]");
    let sim = SimulatorProcess::start(folder.path(), &keys, &["--chaos", "chaos.json"]).await;
    let more = "request_timeout_seconds = 5\n";
    let service = Service::start_with(folder.path(), database.url(), &sim, more).await;
    let scopes = ["api-keys", "create", "--owner", "shop", "--scopes", "register,send,read"];
    let (status, key, error) = run(folder.path(), &scopes);
    assert!(status.success(), "{error}");
    let client = Client::new(service.address, Some(key.trim()));
    let ids: Vec<String> = stream::iter(0..plan.devices)
        .map(|number| {
            let client = client.clone();
            async move {
                let user = format!("user-{number}");
                let body = json!({ "topic": TOPIC, "token": device_token(number), "user_id": user });
                client.post("/v1/devices", &body).await.ok()["id"].as_str().unwrap().to_owned()
            }
        })
        .buffered(64)
        .collect()
        .await;

    let registered = Instant::now();
    let work = async {
        let lists = (1..LISTS).map(|_| json!({ "device_ids": ids }));
        let singles = (0..plan.devices).map(|number| json!({ "user_ids": [format!("user-{number}")] }));
        let notifications: Vec<String> = stream::iter(lists.chain(singles))
            .map(|to| {
                let client = client.clone();
                async move { post(&client, to).await }
            })
            .buffer_unordered(64)
            .collect()
            .await;
        all_done(&client, &notifications).await;
        notifications
    };
    let mut notifications = tokio::select! {
        notifications = work => notifications,
        () = weather(&sim.control, plan.seed) => unreachable!("the weather goes on"),
    };
    let took = registered.elapsed();

    let applied = sim.control.get("/environments/production/chaos").await.ok()["applied"].clone();
    good_day(&sim.control, plan.seed, registered).await;
    notifications.push(post(&client, json!({ "device_ids": ids })).await);
    all_done(&client, &notifications).await;

    let tokens: HashMap<&str, String> =
        ids.iter().enumerate().map(|(number, id)| (id.as_str(), device_token(number))).collect();
    let truths = truths(&sim.control).await;
    let gone: HashSet<&str> = truths
        .iter()
        .filter(|(_, truth)| truth.number("gone_certain") + truth.number("gone_uncertain") > 0)
        .map(|((token, _), _)| token.as_str())
        .collect();

    let mut by_status: BTreeMap<String, usize> = BTreeMap::new();
    let mut named = HashSet::new();
    for id in &notifications {
        let mut seen = HashSet::new();
        for delivery in client.all(&format!("/v1/notifications/{id}/deliveries")).await {
            let device = delivery["device_id"].as_str().unwrap();
            assert!(seen.insert(device.to_owned()), "{device} is in {id} twice");
            let token = &tokens[device];
            let push = (token.clone(), delivery["apns_id"].as_str().unwrap().to_owned());
            let status = delivery["status"].as_str().unwrap();
            let attempts = delivery["attempts"].as_u64().unwrap();
            match truths.get(&push) {
                Some(truth) => {
                    if let Err(why) = truth.check(status, attempts, gone.contains(token.as_str())) {
                        panic!("{status} is not the truth: {why}: {delivery} {}", truth.0);
                    }
                }
                // Nothing of it ever arrived: the token was known to be dead, or every attempt was cut on its way.
                None if status == "unregistered" => assert!(gone.contains(token.as_str()), "{delivery}"),
                None => assert!(status == "unknown" && attempts > 0, "{delivery}"),
            }
            assert!(named.insert(push), "two deliveries share an apns-id: {delivery}");
            *by_status.entry(status.to_owned()).or_default() += 1;
        }
        assert!(seen.len() == plan.devices || seen.len() == 1, "{} deliveries of {id}", seen.len());
    }
    assert_eq!(by_status.values().sum::<usize>(), plan.pushes(), "one outcome for each device: {by_status:?}");
    for push in truths.keys() {
        assert!(
            named.contains(push),
            "the ledger has a push that nobody asked for, or one with another apns-id: {push:?}"
        );
    }

    // Dead are exactly those with proof.
    let inactive = client.all(&format!("/v1/devices?topic={TOPIC}&status=inactive")).await;
    let inactive: HashSet<&str> =
        inactive.iter().map(|device| tokens[device["id"].as_str().unwrap()].as_str()).collect();
    assert_eq!(inactive, gone, "inactive are those whose token was answered 410");
    let suspended = client.all(&format!("/v1/devices?topic={TOPIC}&status=suspended")).await;
    assert!(suspended.is_empty(), "nothing in this plan suspends a device");

    let summary = sim.control.get("/ledger/summary").await.ok();
    eprintln!("chaos: {by_status:?} in {took:?}; ledger {summary}; faults {applied}");
    assert_eq!(sim.total().await["stream_limit_violations"], 0, "the service keeps to the stream limit");
}
