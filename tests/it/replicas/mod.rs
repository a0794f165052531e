//! Several replicas on one database: they share the work, and nothing is sent twice while they are well.
//!
//! `REPLICAS` (how many, such as `2,3,5`), `REPLICAS_NOTIFICATIONS` and `REPLICAS_DEVICES` set the sizes; `make replicas`
//! is the long run.

mod agree;
pub(crate) mod death;
mod heart;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use sonnette::{
    app::{App, Options},
    domain::clock::{Clock, SystemClock, Timer, Timestamp},
};

use crate::{
    broadcast::{accepted, broadcast, device_id, with_devices},
    store::number,
    support::{
        client::Client,
        cluster::{Cluster, Member},
        database::mysql_database,
        world::{TOPIC, World, patiently, until},
    },
};

/// Reads a size from the environment.
pub(crate) fn size(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("a number in {name}")))
}

/// How many deliveries this replica says it has brought to their end.
async fn delivered(caller: &Client) -> usize {
    let text = caller.get("/metrics").await.text;
    let count = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<usize>().ok());
    text.lines().filter(|line| line.starts_with("sonnette_deliveries_total{")).filter_map(count).sum()
}

async fn delivered_by_each(cluster: &Cluster) -> Vec<usize> {
    let mut each = Vec::new();
    for caller in &cluster.callers {
        each.push(delivered(caller).await);
    }
    each
}

fn less(now: &[usize], before: &[usize]) -> Vec<usize> {
    now.iter().zip(before).map(|(now, before)| now - before).collect()
}

pub(crate) async fn everything_is_accepted(cluster: &Cluster, count: usize) {
    patiently("everything is accepted", || async {
        (accepted(cluster.database()).await == i64::try_from(count).unwrap()).then_some(())
    })
    .await;
    patiently("the ledger is final", || async {
        let summary = cluster.sim.control.get("/ledger/summary").await.ok();
        (summary["waiting"] == 0 && summary["unproved"] == 0).then_some(())
    })
    .await;
}

/// Posts a notification to one device through each replica in turn.
pub(crate) async fn post_singles(cluster: &Cluster, count: usize, devices: usize) {
    stream::iter(0..count)
        .for_each_concurrent(64, |number| async move {
            let to = json!({ "device_ids": [device_id(number % devices + 1)] });
            let body = json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": "Ding dong" } } });
            let caller = &cluster.callers[number % cluster.callers.len()];
            let answer = caller.post("/v1/notifications", &body).await;
            assert_eq!(answer.status, 202, "{}", answer.text);
        })
        .await;
}

/// Whatever replica a connection is of, the provider token of one 30-minute slot is the same, byte by byte.
async fn assert_one_token_a_slot(cluster: &Cluster) {
    let tokens = cluster.sim.control.get("/ledger/provider-tokens").await.ok();
    let tokens: Vec<&Value> = tokens.as_array().or(tokens["items"].as_array()).unwrap().iter().collect();
    let slots: BTreeSet<i64> = tokens.iter().map(|token| token["issued_at"].as_i64().unwrap()).collect();
    assert_eq!(tokens.len(), slots.len(), "one token a slot: {tokens:?}");
    let connections: usize = tokens.iter().map(|token| token["connections"].as_array().unwrap().len()).sum();
    assert!(connections >= cluster.replicas.len(), "each replica has sent: {tokens:?}");
}

/// Single notifications through all replicas and a broadcast: each arrives once, and each replica has carried at least
/// so many hundredths of what would be even.
pub(crate) async fn share(cluster: &Cluster, notifications: usize, devices: usize, hundredths: usize) {
    let replicas = cluster.replicas.len();
    // Whoever does not know yet that there are others takes twice as much at once. They look every second.
    until("the youngest has lived for two seconds", || async {
        (number(cluster.database(), "SELECT MIN(beat) FROM replicas").await >= 2).then_some(())
    })
    .await;
    let began = Instant::now();
    post_singles(cluster, notifications, devices).await;
    everything_is_accepted(cluster, notifications).await;
    let (singles, took) = (delivered_by_each(cluster).await, began.elapsed());
    eprintln!("{replicas} replicas: {notifications} single notifications in {took:?}, by each {singles:?}");

    let began = Instant::now();
    broadcast(&cluster.callers[0], json!({ "everyone": true })).await;
    everything_is_accepted(cluster, notifications + devices).await;
    let (broadcast, took) = (less(&delivered_by_each(cluster).await, &singles), began.elapsed());
    eprintln!("{replicas} replicas: a broadcast to {devices} devices in {took:?}, by each {broadcast:?}");

    let summary = cluster.sim.control.get("/ledger/summary").await.ok();
    let all = u64::try_from(notifications + devices).unwrap();
    assert_eq!((summary["pushes"].as_u64(), summary["accepted_once"].as_u64()), (Some(all), Some(all)), "{summary}");
    assert_eq!(summary["attempts"].as_u64(), Some(all), "{summary}");
    assert_one_token_a_slot(cluster).await;
    for (what, each, whole) in [("notifications", &singles, notifications), ("the broadcast", &broadcast, devices)] {
        assert_eq!(each.iter().sum::<usize>(), whole, "{what}: {each:?}");
        let fair = |one: &usize| one * replicas * 100 >= whole * hundredths;
        assert!(each.iter().all(fair), "each carries a fair share of {what}: {each:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_work_and_send_everything_once() {
    let counts = std::env::var("REPLICAS").unwrap_or_else(|_| "3".to_owned());
    for count in counts.split(',') {
        let replicas: usize = count.trim().parse().expect("numbers in REPLICAS");
        let (notifications, devices) = (size("REPLICAS_NOTIFICATIONS", 1_000), size("REPLICAS_DEVICES", 30_000));
        let database = mysql_database().await;
        with_devices(&database, devices).await;
        let cluster = Cluster::start(database, &vec![Member::default(); replicas], "", &[]).await;
        share(&cluster, notifications, devices, 33).await;
    }
}

/// A machine's clock that is ten minutes ahead.
#[derive(Debug)]
struct Ahead(SystemClock);

impl Clock for Ahead {
    fn now(&self) -> Timestamp {
        self.0.now().plus(Duration::from_secs(600))
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }

    fn sleep(&self, duration: Duration) -> Timer {
        self.0.sleep(duration)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_clock_is_ten_minutes_ahead_goes_by_the_databases() {
    let world = World::start(mysql_database().await).await;
    world.device(&"ab".repeat(32), Some("rider")).await;
    let options = Options { database_time: true, ..Options::default() };
    let other = App::start(&world.config, std::sync::Arc::new(Ahead(SystemClock::new())), options).await.unwrap();
    let caller = Client::new(other.address(), Some(world.server.key()));

    let due = world.clock.now().plus(Duration::from_secs(2));
    let body = json!({
        "topic": TOPIC, "to": { "user_ids": ["rider"] }, "payload": { "aps": { "alert": "Ding dong" } }, "send_at": due,
    });
    let before = world.clock.now();
    let answer = caller.post("/v1/notifications", &body).await.ok();
    let after = world.clock.now();
    assert_eq!(answer["status"], "scheduled", "its time has not come: {answer}");
    let created: Timestamp = answer["created_at"].as_str().unwrap().parse().unwrap();
    let slack = Duration::from_secs(1);
    assert!(before.minus(slack) <= created && created <= after.plus(slack), "{before} to {after}: {answer}");
    world.done(answer["id"].as_str().unwrap()).await;
    assert!(world.clock.now() >= due, "neither replica was early");
    let health = until("both replicas are seen", || async {
        let health = caller.get("/health").await.ok();
        (health["checks"]["replicas:alive"][0]["observed_value"] == "2").then_some(health)
    })
    .await;
    assert_ne!(health["checks"]["clock"][0]["status"], "warn", "{health}");
    assert!(other.shutdown(Duration::from_secs(30)).await);
}
