//! The database lost, APNs lost, the service restarted: what was promised is kept, and whoever asks is told the truth.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use sonnette::{
    domain::clock::SystemClock,
    sim::{self, Simulator},
};

use crate::{
    store::number,
    support::{
        callers::Callers,
        client::Client,
        database::{ACCEPTED, OPEN, PrivateServer, on_both_stores},
        scratch::Folder,
        service::{Service, SimulatorProcess, run},
        world::{TOPIC, World, keys_folder, until},
    },
};

/// Requests at once under load.
const CALLERS: usize = 64;

fn alert(user: &str) -> serde_json::Value {
    json!({ "topic": TOPIC, "to": { "user_ids": [user] }, "payload": { "aps": { "alert": "x" } } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_killed_callers_are_told_to_come_back_and_nothing_accepted_is_lost() {
    let mut server = PrivateServer::start().await;
    let world = World::start(server.database().await).await;
    world.device(&"ab".repeat(32), Some("rider")).await;
    let mut kept = Vec::new();
    for _ in 0..20 {
        kept.push(world.send(json!({ "user_ids": ["rider"] })).await);
    }
    server.kill();
    let refused = until("a request is refused", || async {
        let answer = world.server.post("/v1/notifications", &alert("rider")).await;
        assert_ne!(answer.status, 202, "a killed database keeps nothing");
        (answer.status == 503).then_some(answer)
    })
    .await;
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    let health = until("health says so", || async {
        let health = world.server.get("/health").await;
        (health.status == 503).then_some(health)
    })
    .await;
    assert_eq!(health.body["status"], "fail");
    assert_eq!(world.server.get("/health/live").await.status, 200);
    assert_eq!(world.server.get("/health/ready").await.status, 503);

    server.restart().await;
    let later = until("requests are kept again", || async {
        let answer = world.server.post("/v1/notifications", &alert("rider")).await;
        (answer.status == 202).then(|| answer.body["id"].as_str().unwrap().to_owned())
    })
    .await;
    kept.push(later);
    for id in &kept {
        assert_eq!(world.done(id).await["counts"]["accepted"], 1);
    }
}

/// How long the database is gone: `LOST_SECONDS=30` is the long run. Callers wait for a minute at most.
fn gone_for() -> Duration {
    let seconds = std::env::var("LOST_SECONDS").map_or(3, |text| text.parse().expect("a number in LOST_SECONDS"));
    Duration::from_secs(seconds)
}

/// MiB that a process has taken at most; `None` where the system does not say.
fn peak_memory(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_killed_under_load_and_gone_for_a_while_loses_nothing_that_was_accepted() {
    let mut server = PrivateServer::start().await;
    let database = server.database().await;
    let folder = Folder::new("lost");
    let keys = keys_folder(&folder, "environments = [\"production\"]");
    let sim = SimulatorProcess::start(folder.path(), &keys, &[]).await;
    let mut service = Service::start(folder.path(), database.url(), &sim).await;
    let (status, key, error) =
        run(folder.path(), &["api-keys", "create", "--owner", "shop", "--scopes", "register,send,read"]);
    assert!(status.success(), "{error}");
    let client = Client::new(service.address, Some(key.trim()));
    let phone = json!({ "topic": TOPIC, "token": "ab".repeat(32), "user_id": "rider" });
    client.post("/v1/devices", &phone).await.ok();

    let callers = Callers::start(&client, CALLERS);
    callers.until_kept(2_000).await;
    let before = peak_memory(service.process().child().id());
    server.kill();
    let lost = Instant::now();
    callers.until_refused().await;
    // What was committed is still being answered.
    until("no more is", || async {
        let kept = callers.kept();
        tokio::time::sleep(Duration::from_millis(300)).await;
        (callers.kept() == kept).then_some(())
    })
    .await;
    let kept_before = callers.kept();
    tokio::time::sleep(gone_for().saturating_sub(lost.elapsed())).await;
    assert_eq!(callers.kept(), kept_before, "what cannot be kept is not accepted");
    let (told, meanwhile) = (callers.refused(), peak_memory(service.process().child().id()));
    server.restart().await;
    let back = Instant::now();
    callers.until_kept(kept_before).await;
    eprintln!(
        "gone for {:?}: {told} told to come back; the first 202 {:?} after it was back; peak memory {before:?} and {meanwhile:?} MiB",
        lost.elapsed(),
        back.elapsed()
    );
    callers.until_kept(kept_before + 2_000).await;
    let ids = callers.stop().await;

    until("everything has ended", || async { (number(&database, OPEN).await == 0).then_some(()) }).await;
    let count = i64::try_from(ids.len()).unwrap();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "each accepted once");
    assert_eq!(number(&database, "SELECT COUNT(*) FROM notifications").await, count, "nothing but what was accepted");
    assert_eq!(number(&database, ACCEPTED).await, count, "one outcome each");
    assert_eq!(sim.total().await["accepted"], count, "and sent once");
}

on_both_stores! {
    async fn while_apns_is_gone_work_waits_and_leaves_once_it_is_back(database) {
        let mut world = World::start(database).await;
        world.device(&"ab".repeat(32), Some("rider")).await;
        let first = world.send(json!({ "user_ids": ["rider"] })).await;
        world.done(&first).await;
        let settings = sim::Settings {
            production: world.sim.production(),
            sandbox: world.sim.sandbox(),
            folder: world.folder.path().join("simulator"),
            keys: world.sim.keys().list(),
            ..sim::Settings::default()
        };
        let elsewhere = Simulator::start(
            sim::Settings { folder: world.folder.path().join("elsewhere"), ..sim::Settings::default() },
            Arc::new(SystemClock::new()),
        )
        .await
        .unwrap();
        std::mem::replace(&mut world.sim, elsewhere).shutdown().await;
        let waiting = world.send(json!({ "user_ids": ["rider"] })).await;
        let check = until("health says that APNs is out of reach", || async {
            world.check("apns:connection", "production").await.filter(|check| check["status"] == "fail")
        })
        .await;
        assert!(check["advice"].as_str().unwrap().contains("2197"), "{check}");
        assert_eq!(world.server.get("/health").await.status, 200, "new requests are kept");
        assert_eq!(world.notification(&waiting).await["counts"]["pending"], 1);

        let back = Simulator::start(settings, Arc::new(SystemClock::new())).await.unwrap();
        assert_eq!(world.done(&waiting).await["counts"]["accepted"], 1);
        assert_eq!(back.ledger().counters().accepted, 1);
    }

    async fn a_restart_goes_on_with_what_was_scheduled_and_remembers_what_was_answered(database) {
        let mut world = World::start(database).await;
        world.device(&"ab".repeat(32), Some("rider")).await;
        let done = world.send(json!({ "user_ids": ["rider"] })).await;
        world.done(&done).await;
        let at = sonnette::domain::clock::Timestamp::to_string(&world.clock.now().plus(std::time::Duration::from_secs(2)));
        let scheduled = world.send_with(json!({ "user_ids": ["rider"] }), json!({ "send_at": at })).await;
        assert_eq!(world.notification(&scheduled).await["status"], "scheduled");
        world.restart().await;
        assert_eq!(world.notification(&done).await["counts"]["accepted"], 1);
        assert_eq!(world.done(&scheduled).await["counts"]["accepted"], 1);
        assert_eq!(world.sim.ledger().repeats().len(), 0);
    }
}
