//! What one replica is told or finds out holds for all, and what there is once is shared out among them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sonnette::{
    apns::credential,
    app::{App, Options},
    domain::clock::{Clock, ManualClock, Timestamp},
};
use sqlx::{Connection, MySqlConnection};

use super::{everything_is_accepted, post_singles};
use crate::{
    broadcast::{broadcast, with_devices},
    store::number,
    support::{
        client::Client,
        cluster::{Cluster, Member},
        crowd::requests,
        database::mysql_database,
        running::running,
        world::{KEY_ID, TEAM, TOPIC, World, ticking_until_done, until},
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

/// Two replicas on a clock that moves only when told.
struct Pair {
    world: World,
    other: App,
    clock: Arc<ManualClock>,
    /// A caller at each.
    callers: [Client; 2],
}

impl Pair {
    async fn start() -> Self {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(mysql_database().await, Arc::clone(&clock) as _, "").await;
        let other = App::start(&world.config, Arc::clone(&clock) as _, Options::default()).await.unwrap();
        let callers = [world.server.clone(), Client::new(other.address(), Some(world.server.key()))];
        world.device(&"ab".repeat(32), Some("rider")).await;
        Self { world, other, clock, callers }
    }

    /// Lets so much time pass, in steps within which both hearts beat.
    async fn pass(&self, time: Duration) {
        const STEP: Duration = Duration::from_millis(250);
        let beats =
            || async { self.other.store().replicas().await.unwrap().iter().map(|r| r.beat).collect::<Vec<_>>() };
        let began = self.clock.monotonic();
        let (mut before, mut since) = (beats().await, began);
        while self.clock.monotonic() < began + time {
            self.clock.advance(STEP);
            tokio::time::sleep(Duration::from_millis(50)).await;
            if self.clock.monotonic() > since + Duration::from_secs(1) {
                until("both hearts beat", || async {
                    beats().await.iter().zip(&before).all(|(now, before)| now > before).then_some(())
                })
                .await;
                (before, since) = (beats().await, self.clock.monotonic());
            }
        }
    }

    /// Posts through each replica while the clock stands: what either does with it follows from what it knew.
    async fn post_through_each(&self) -> Vec<String> {
        let mut ids = Vec::new();
        for caller in &self.callers {
            let to = json!({ "user_ids": ["rider"] });
            let body = json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": "Ding dong" } } });
            ids.push(caller.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned());
        }
        ids
    }

    /// Neither replica sends anything.
    async fn both_hold(&self, reason: &str) -> Vec<String> {
        let asked = requests(&self.world);
        let ids = self.post_through_each().await;
        for id in &ids {
            until("it says why it waits", || async {
                (self.world.notification(id).await["waiting_for"]["reason"] == reason).then_some(())
            })
            .await;
        }
        assert_eq!(requests(&self.world), asked, "nothing leaves");
        ids
    }

    /// Both replicas send, at once.
    async fn both_send(&self) {
        let accepted = || self.world.sim.ledger().counters().accepted;
        let before = accepted();
        self.post_through_each().await;
        until("both have left", || async { (accepted() >= before + 2).then_some(()) }).await;
    }

    async fn all_leave(&self, ids: &[String]) {
        for id in ids {
            ticking_until_done(&self.world, &self.clock, id).await;
        }
    }

    async fn stop(self) {
        let stopped = self.other.shutdown(Duration::from_secs(30));
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                stopped = &mut stopped => return assert!(stopped, "it stops in good order"),
                () = tokio::time::sleep(Duration::from_millis(200)) => self.clock.advance(Duration::from_millis(250)),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_and_its_end_hold_on_all_replicas_within_two_seconds() {
    let pair = Pair::start().await;
    let [first, second] = &pair.callers;
    assert_eq!(first.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
    pair.pass(AGREED).await;
    let ids = pair.both_hold("paused").await;
    assert_eq!(second.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
    pair.pass(AGREED).await;
    pair.both_send().await;
    pair.all_leave(&ids).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_breaker_that_one_replica_opens_is_open_on_all_within_two_seconds_and_closed_on_all_within_two() {
    let pair = Pair::start().await;
    let keys = pair.world.sim.keys();
    pair.both_send().await;
    keys.set_team(KEY_ID, "ZZZZZ99999").unwrap();
    let open = || async { pair.other.store().breakers().await.unwrap() };
    let refused = pair.world.send(json!({ "user_ids": ["rider"] })).await;
    until("the first one opens it", || async { (!open().await.is_empty()).then_some(()) }).await;
    // The first probe is made after two seconds.
    pair.pass(AGREED * 3 / 4).await;
    let mut ids = pair.both_hold("breaker: InvalidProviderToken").await;

    keys.set_team(KEY_ID, TEAM).unwrap();
    ids.push(refused);
    let mut passed = Duration::ZERO;
    while !open().await.is_empty() {
        assert!(passed < Duration::from_secs(600), "one of the two finds out");
        pair.pass(Duration::from_secs(1)).await;
        passed += Duration::from_secs(1);
    }
    pair.pass(AGREED).await;
    pair.both_send().await;
    pair.all_leave(&ids).await;
    pair.stop().await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_takes_long_holds_up_no_other_though_each_replica_has_one_at_a_time() {
    let pair = Pair::start().await;
    pair.pass(Duration::from_secs(2)).await;
    let database = pair.world.config.database.url.expose();
    let mut locks = MySqlConnection::connect(database).await.unwrap();
    // What is sent at once is in the name of a replica that lives.
    sqlx::raw_sql("START TRANSACTION; SELECT * FROM replicas FOR UPDATE").execute(&mut locks).await.unwrap();
    let send = |more: Value| {
        let mut body =
            json!({ "topic": TOPIC, "to": { "user_ids": ["rider"] }, "payload": { "aps": { "alert": "ding" } } });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let caller = pair.callers[0].clone();
        tokio::spawn(async move { caller.post("/v1/notifications", &body).await.status.as_u16() })
    };
    let long = send(json!({}));
    until("its commit waits", || async {
        let mut observer = MySqlConnection::connect(database).await.unwrap();
        running(&mut observer).await.iter().any(|one| one.text.contains("LOCK IN SHARE MODE")).then_some(())
    })
    .await;
    let later = send(json!({ "send_at": "2027-01-01T00:00:00Z" }));
    until("another is accepted", || {
        pair.clock.advance(Duration::from_millis(50));
        async { later.is_finished().then_some(()) }
    })
    .await;
    assert!(!long.is_finished());
    assert_eq!(later.await.unwrap(), 202);
    locks.close().await.unwrap();
    assert_eq!(long.await.unwrap(), 202);
    pair.stop().await;
}
