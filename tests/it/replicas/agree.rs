//! What one replica is told or finds out holds for all, and what there is once is shared out among them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sonnette::{apns::credential, domain::clock::Timestamp};

use super::{device_id, everything_is_accepted, post_singles};
use crate::{
    broadcast::{broadcast, with_devices},
    store::number,
    support::{
        client::Client,
        cluster::{Cluster, Member},
        database::mysql_database,
        world::{TOPIC, until},
    },
};

/// Replicas agree within this time.
const AGREED: Duration = Duration::from_secs(2);

async fn cluster(replicas: usize, devices: usize, app: &str, sim: &[&str]) -> Cluster {
    let database = mysql_database().await;
    with_devices(&database, devices).await;
    Cluster::start(database, &vec![Member::default(); replicas], app, sim).await
}

/// A gauge or counter of this replica, all its labels together.
async fn metric(caller: &Client, name: &str) -> f64 {
    let text = caller.get("/metrics").await.text;
    let is_it = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    text.lines().filter(is_it).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

async fn metric_of_each(cluster: &Cluster, name: &str) -> Vec<f64> {
    let mut each = Vec::new();
    for caller in &cluster.callers {
        each.push(metric(caller, name).await);
    }
    each
}

async fn post(caller: &Client, device: usize) -> String {
    let to = json!({ "device_ids": [device_id(device)] });
    let body = json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": "Ding dong" } } });
    let answer = caller.post("/v1/notifications", &body).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    answer.body["id"].as_str().unwrap().to_owned()
}

async fn requests(cluster: &Cluster) -> u64 {
    cluster.sim.total().await["requests"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_on_one_replica_stops_that_one_alone_and_the_others_do_its_work() {
    let mut cluster = cluster(1, 600, "", &[]).await;
    cluster
        .join(Member::default(), |keys| {
            std::fs::write(keys.join("key.p8"), credential::generate().unwrap().expose()).unwrap();
        })
        .await;
    post_singles(&cluster, 400, 600).await;
    broadcast(&cluster.callers[1], json!({ "everyone": true })).await;
    everything_is_accepted(&cluster, 1_000).await;

    assert_eq!(metric_of_each(&cluster, "sonnette_breaker_open").await, [0.0, 1.0], "that one alone stops");
    let health = cluster.callers[0].get("/health").await;
    let breaker = &health.body["checks"]["apns:breaker"][0];
    assert_eq!((health.status.as_u16(), breaker["observed_value"].as_str()), (200, Some("403 InvalidProviderToken")));
    let total = cluster.sim.total().await;
    let refused = total["refused"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum::<u64>();
    assert!((1..=20).contains(&refused), "APNs was asked a handful of times with the wrong key: {total}");
    let devices = "SELECT COUNT(*) FROM devices WHERE status = 'active'";
    assert_eq!(number(cluster.database(), devices).await, 600, "no device is touched");
    let summary = cluster.sim.control.get("/ledger/summary").await.ok();
    assert_eq!((summary["accepted_once"].as_u64(), summary["accepted_repeatedly"].as_u64()), (Some(1_000), Some(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_and_its_end_hold_on_all_replicas_within_two_seconds() {
    let cluster = cluster(2, 10, "", &[]).await;
    let [first, second] = &cluster.callers[..] else { panic!("two replicas") };
    assert_eq!(first.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
    tokio::time::sleep(AGREED).await;
    let id = post(second, 1).await;
    let path = format!("/v1/notifications/{id}");
    until("it says why it waits", || async {
        (second.get(&path).await.ok()["waiting_for"]["reason"] == "paused").then_some(())
    })
    .await;
    assert_eq!(requests(&cluster).await, 0);
    assert_eq!(second.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
    until("it has left", || async { (second.get(&path).await.ok()["status"] == "done").then_some(()) }).await;
    tokio::time::sleep(AGREED).await;
    let id = post(first, 2).await;
    let path = format!("/v1/notifications/{id}");
    until("the other one sends again too", || async {
        (first.get(&path).await.ok()["status"] == "done").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_pushes_a_second_is_for_all_replicas_together() {
    const PER_SECOND: u64 = 50;
    const PUSHES: u64 = 200;
    let cluster = cluster(2, 200, &format!("max_pushes_per_second = {PER_SECOND}"), &[]).await;
    tokio::time::sleep(AGREED).await;
    post_singles(&cluster, usize::try_from(PUSHES).unwrap(), 200).await;
    everything_is_accepted(&cluster, usize::try_from(PUSHES).unwrap()).await;
    let pushes = cluster.sim.control.get("/ledger/pushes?limit=1000").await.ok();
    let at = |push: &Value| push["at"].as_str().unwrap().parse::<Timestamp>().unwrap();
    let times: Vec<Timestamp> = pushes["items"].as_array().unwrap().iter().map(at).collect();
    let took = times.iter().max().unwrap().since(*times.iter().min().unwrap());
    // A tenth of a second's worth may leave at once.
    let least = Duration::from_millis((PUSHES - PER_SECOND / 5) * 1_000 / PER_SECOND);
    assert!(took >= least, "{PUSHES} pushes left in {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_apns_are_shared_out_among_the_replicas_that_live_and_health_shows_who_does_what() {
    const DEVICES: usize = 3_000;
    let mut cluster = cluster(1, DEVICES, "", &["--latency-ms", "400"]).await;
    let limit = json!({ "stream_limit": 1 }).to_string();
    let path = "/environments/production/stream-limit";
    cluster.sim.control.send(http::Method::PUT, path, &[], limit).await.unwrap();
    broadcast(&cluster.callers[0], json!({ "everyone": true })).await;
    let each_has = async |cluster: &Cluster, expected: &[f64]| {
        let began = Instant::now();
        until(&format!("the replicas have {expected:?} connections"), || async {
            (metric_of_each(cluster, "sonnette_apns_connections").await == expected).then_some(())
        })
        .await;
        eprintln!("{expected:?} connections after {:?}", began.elapsed());
    };
    each_has(&cluster, &[4.0]).await;

    cluster.join(Member::default(), |_| {}).await;
    // The first has taken all of the work: some more, for the second.
    post_singles(&cluster, 400, DEVICES).await;
    each_has(&cluster, &[2.0, 2.0]).await;

    let each = metric_of_each(&cluster, "sonnette_replica_chunks").await;
    assert!(each.iter().all(|chunks| *chunks >= 1.0), "{each:?}");
    let devices = metric_of_each(&cluster, "sonnette_replica_devices").await;
    assert!(devices[0] > 1_000.0 && devices[0] > devices[1] && devices[1] >= 1.0, "{devices:?}");
    let health = cluster.callers[1].get("/health").await.ok();
    let work = health["checks"]["replicas:work"].as_array().unwrap();
    for (replica, seen) in cluster.replicas.iter_mut().zip(work) {
        let pid = format!(":{}", replica.process().child().id());
        assert!(seen["component_id"].as_str().unwrap().ends_with(&pid), "{health}");
        assert!(!seen["observed_value"].as_str().unwrap().starts_with("0 "), "{health}");
        assert!(seen["output"].as_str().unwrap().contains(env!("CARGO_PKG_VERSION")), "{health}");
    }
    assert_eq!(work.len(), 2, "{health}");

    cluster.replicas[0].process().kill();
    cluster.replicas.remove(0);
    cluster.callers.remove(0);
    each_has(&cluster, &[4.0]).await;
}
