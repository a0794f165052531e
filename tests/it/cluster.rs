//! Three Galera nodes with a replica of Sonnette at each: nothing is lost, sent twice or sent to a former user, and nobody
//! waits long, while nodes and replicas are killed, hang and are cut off.
//!
//! `make test-cluster` runs these; they need Galera, and pass without a look where `TEST_CLUSTER` does not ask for it.
//! `CLUSTER_RUNS`, `CLUSTER_SEED` and `CLUSTER_SECONDS` set how often and how long is killed; `CLUSTER_NOTIFICATIONS` and
//! `CLUSTER_DEVICES` how much is sent while nothing is.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use sonnette::{
    domain::{
        clock::SystemClock,
        device::{DeviceSeq, Registration},
        secret::Secret,
    },
    store::{Role, Settings, Store, open},
};
use tokio_util::sync::CancellationToken;

use crate::{
    broadcast::{device_token, with_devices, with_riders},
    replicas::{
        death::{Arrived, Asked, Blow, DEVICES, Death, LATENCY, Report, arrived, check, ends, freeze, load, now},
        share, size,
    },
    store::{NOW, eventually, number},
    support::{
        cluster::{Cluster, Member},
        crowd::registration,
        database::{OPEN, TestDatabase},
        galera::{self, Galera},
        world::{TOPIC, patiently, until},
    },
};

/// Nobody waits for longer while one node and one replica are killed: a node is evicted after five seconds, a replica
/// declared dead after five more.
const STALL: Duration = Duration::from_secs(15);

/// A cluster of the test's own, if there is to be one.
async fn galera() -> Option<Galera> {
    if galera::wanted() {
        return Some(Galera::start().await.unwrap_or_else(|why| panic!("{why}")));
    }
    eprintln!("not tried: TEST_CLUSTER does not ask for a Galera cluster (`make test-cluster` does)");
    None
}

/// Replicas on this database, one at each node, with the others to turn to.
async fn at_each_node(galera: &Galera, database: TestDatabase, sim: &[&str]) -> Cluster {
    let urls = [0, 1, 2].map(|node| galera.url(&database, &[node, (node + 1) % 3, (node + 2) % 3]));
    let mut cluster = Cluster::without_replicas(database, "", sim).await;
    for url in urls {
        cluster.join_at(&url, Member::default(), |_| {}).await;
    }
    cluster
}

/// A store that speaks to these nodes.
async fn store_at(galera: &Galera, database: &TestDatabase, nodes: &[usize]) -> Arc<dyn Store> {
    let settings = Settings {
        url: Secret::new(galera.url(database, nodes)),
        max_connections: 8,
        acquire_timeout: Duration::from_secs(3),
        slow_statement: None,
    };
    let store = open(&settings, Role::CommandLine, Arc::new(SystemClock::new())).await.unwrap();
    store.migrate().await.unwrap();
    store
}

/// Connections to this database at a node, but for the one that asks.
async fn connections(galera: &Galera, node: usize, database: &TestDatabase) -> i64 {
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let question = format!("SELECT COUNT(*) FROM information_schema.processlist WHERE db = '{name}'");
    galera.node(node).number(&question).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_at_three_nodes_share_the_work_and_send_everything_once() {
    let Some(galera) = galera().await else { return };
    let (notifications, devices) = (size("CLUSTER_NOTIFICATIONS", 3_000), size("CLUSTER_DEVICES", 30_000));
    let database = galera.database(0).await;
    with_devices(&database, devices).await;
    let cluster = at_each_node(&galera, database, &[]).await;
    // Who comes second at another node has to begin anew, so that the first may well get the next piece too.
    share(&cluster, notifications, devices, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_nodes_write_at_once_is_written_again_as_a_whole_until_both_have() {
    let Some(galera) = galera().await else { return };
    let database = galera.database(0).await;
    let stores = [store_at(&galera, &database, &[0]).await, store_at(&galera, &database, &[1]).await];
    let group: Vec<Registration> = (0..20).map(registration).collect();
    for round in 0..30 {
        let both = stores.iter().map(|store| store.register(&group, NOW.plus(Duration::from_secs(round))));
        for devices in join_all(both).await {
            assert_eq!(devices.unwrap().len(), 20);
        }
    }
    assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 20, "one device a token");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_at_one_node_waits_for_what_was_committed_at_another() {
    let Some(galera) = galera().await else { return };
    let database = galera.database(0).await;
    let (here, there) = (store_at(&galera, &database, &[0]).await, store_at(&galera, &database, &[1]).await);
    let device = here.register(&[registration(1)], NOW).await.unwrap().remove(0);
    let seq = DeviceSeq(number(&database, "SELECT seq FROM devices").await);
    assert_eq!(there.addresses(&[seq]).await.unwrap()[0].generation.0, 1);

    // This node applies nothing for a while, as if it were far behind.
    let behind = galera.node(1).hold("FLUSH TABLES WITH READ LOCK").await;
    assert!(here.log_out(device.id, NOW).await.unwrap());
    let single = tokio::spawn({
        let there = Arc::clone(&there);
        async move { there.addresses(&[seq]).await.unwrap().remove(0).generation.0 }
    });
    let several = tokio::spawn(async move { there.device(device.id).await.unwrap().unwrap().user_id });
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(behind);
    assert_eq!(single.await.unwrap(), 2, "who owns the phone");
    assert_eq!(several.await.unwrap(), None, "reads of one moment");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_that_passes_on_at_one_node_gets_nothing_more_for_its_former_user_from_another() {
    const PHONES: usize = 8;
    let Some(galera) = galera().await else { return };
    let database = galera.database(0).await;
    with_devices(&database, PHONES).await;
    with_riders(&database, 0).await;
    let cluster = at_each_node(&galera, database, &[]).await;
    let [here, there, _] = &cluster.callers[..] else { panic!("three replicas") };
    let mut passed_on = BTreeMap::new();
    for phone in 1..=PHONES {
        let rider = format!("rider-{phone}");
        let alert = json!({ "aps": { "alert": "Ding dong" }, "number": phone });
        let body = json!({ "topic": TOPIC, "to": { "user_ids": [rider] }, "payload": alert });
        let first = there.post("/v1/notifications", &body).await.ok();
        assert_eq!(first["counts"]["targeted"], 1, "{first}");
        let path = format!("/v1/notifications/{}", first["id"].as_str().unwrap());
        until("it is accepted", || async { (there.get(&path).await.ok()["status"] == "done").then_some(()) }).await;

        // The other replica's node applies nothing for a while, as if it were far behind.
        let behind = galera.node(1).hold("FLUSH TABLES WITH READ LOCK").await;
        let change = json!({ "topic": TOPIC, "token": device_token(phone), "user_id": format!("new-{rider}") });
        here.post("/v1/devices", &change).await.ok();
        let at = now();
        passed_on.insert(phone as u64, at);
        let (second, ()) = tokio::join!(there.post("/v1/notifications", &body), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(behind);
        });
        assert_eq!(second.ok()["counts"]["targeted"], 0, "phone {phone}: nobody has it who is asked for");
    }
    until("everything has ended", || async { (number(cluster.database(), OPEN).await == 0).then_some(()) }).await;
    let ledger = arrived(&cluster.sim.control).await;
    assert_eq!(ledger.len(), PHONES);
    for ((phone, _), push) in &ledger {
        assert!(
            push.at.len() == 1 && push.at[0] <= passed_on[phone],
            "phone {phone}: {:?}, {:?}",
            push.at,
            passed_on[phone]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_cluster_is_left_though_it_answers() {
    let Some(galera) = galera().await else { return };
    let database = galera.database(0).await;
    let store = store_at(&galera, &database, &[0, 1]).await;
    join_all((0..8).map(|_| store.probe(NOW))).await;
    galera.node(0).execute(&["SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'"]).await;
    eventually("it is left", async || store.probe(NOW).await.is_ok() && connections(&galera, 0, &database).await == 0)
        .await;
    store.addresses(&[DeviceSeq(1)]).await.expect("reads go where the writes go");
    assert!(connections(&galera, 1, &database).await > 0);

    galera.node(0).execute(&["SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'"]).await;
    galera.whole().await;
    galera.node(1).execute(&["SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'"]).await;
    eventually("and turned to again once the other is cut off", async || {
        store.addresses(&[DeviceSeq(1)]).await.is_ok() && connections(&galera, 1, &database).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hangs_is_left_by_its_replica_and_comes_back() {
    let Some(mut galera) = galera().await else { return };
    let database = galera.database(2).await;
    with_devices(&database, 10).await;
    let url = galera.url(&database, &[0, 1]);
    let mut cluster = Cluster::without_replicas(database, "", &[]).await;
    cluster.join_at(&url, Member::default(), |_| {}).await;
    let caller = cluster.callers.clone();
    let asked = Asked::default();
    let post = async || {
        let posted = asked.post(&caller, 0, json!({ "everyone": true }));
        tokio::time::timeout(4 * STALL, posted).await.expect("a notification is kept within a minute");
    };
    post().await;
    assert!(connections(&galera, 0, cluster.database()).await > 0);

    let began = Instant::now();
    galera.node(0).freeze();
    let ((), took) = tokio::join!(post(), async {
        eventually("the replica is at the other node", async || connections(&galera, 1, cluster.database()).await > 0)
            .await;
        began.elapsed()
    });
    eprintln!("frozen: turned to the other node after {took:?}, kept again after {:?}", began.elapsed());
    galera.node(0).thaw();
    galera.whole().await;
    eprintln!("thawed: whole again");
    post().await;

    let began = Instant::now();
    galera.node_mut(1).kill();
    post().await;
    eprintln!("the other one killed: kept again after {:?}", began.elapsed());
    assert!(connections(&galera, 0, cluster.database()).await > 0, "the replica is back at the first");
    all_add_up(&cluster, asked, Report::default()).await;
}

/// Waits for the end and holds everything against the ledger.
async fn all_add_up(
    cluster: &Cluster,
    asked: Asked,
    report: Report,
) -> std::collections::HashMap<(u64, String), Arrived> {
    let database = cluster.database();
    patiently("everything has ended", || async { (number(database, OPEN).await == 0).then_some(()) }).await;
    let ledger = arrived(&cluster.sim.control).await;
    check(&report, &asked.0.into_inner().unwrap(), &ends(database).await, &ledger);
    ledger
}

/// The longest pause between two of these moments, each in milliseconds.
fn longest_pause(mut moments: Vec<i64>) -> Duration {
    moments.sort_unstable();
    let longest = moments.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    Duration::from_millis(u64::try_from(longest).unwrap())
}

/// One node and one replica are killed under load, at random moments, and brought back.
async fn kill_one_of_each(galera: &mut Galera, seed: u64, seconds: u64) {
    let mut dice = StdRng::seed_from_u64(seed);
    let (node, victim) = (dice.random_range(0..3), dice.random_range(0..3));
    let apart = Duration::from_millis(dice.random_range(0..4_000));
    let node_first: bool = dice.random();
    // Asked at a node that lives.
    let asked_at = (node + 1) % 3;
    let database = galera.database(asked_at).await;
    with_devices(&database, DEVICES).await;
    let latency = LATENCY.as_millis().to_string();
    let mut cluster = at_each_node(galera, database, &["--latency-ms", &latency]).await;
    let callers = cluster.callers.clone();
    let (asked, stop) = (Asked::default(), CancellationToken::new());
    let mut report = Report::default();

    let blows = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        for turn in [node_first, !node_first] {
            if turn {
                galera.node_mut(node).kill();
            } else {
                let pid = cluster.replicas[victim].process().child().id();
                let chunks = freeze(&cluster.replicas[victim], pid, cluster.database()).await;
                let at = now();
                cluster.replicas[victim].process().kill();
                report.deaths.push(Death { at, open: chunks.into_iter().map(|(id, _)| id).collect() });
                report.blows.push(Blow::Kill);
            }
            tokio::time::sleep(apart).await;
        }
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        cluster.replicas[victim].restart().await;
        galera.restart(node).await;
        galera.whole().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        stop.cancel();
    };
    tokio::join!(blows, load(&callers, &asked, seed, &stop));
    let kept = std::mem::take(&mut *asked.1.lock().unwrap());
    let began = kept.iter().min().copied().unwrap();
    let kept = kept.iter().map(|at| i64::try_from(at.duration_since(began).as_millis()).unwrap()).collect();
    let answers = longest_pause(kept);
    let ledger = all_add_up(&cluster, asked, report).await;
    let pushes = longest_pause(ledger.values().flat_map(|push| &push.at).map(|at| at.as_millis()).collect());
    eprintln!(
        "CLUSTER_SEED={seed}: node {node} and replica {victim} killed ({}, {apart:?} apart): the longest time without \
         a 202 {answers:?}, without a push {pushes:?}",
        if node_first { "the node first" } else { "the replica first" }
    );
    assert!(answers <= STALL && pushes <= STALL, "callers or pushes stood still");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_and_a_replica_that_are_killed_lose_nothing_and_only_the_replicas_own_is_repeated() {
    let Some(mut galera) = galera().await else { return };
    let (runs, seed) = (size("CLUSTER_RUNS", 1) as u64, size("CLUSTER_SEED", 1) as u64);
    for seed in seed..seed + runs {
        kill_one_of_each(&mut galera, seed, size("CLUSTER_SECONDS", 5) as u64).await;
    }
}
