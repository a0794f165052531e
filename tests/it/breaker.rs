//! A mistake of ours never kills a token (promise 5): a refused credential stops by itself and resumes by itself.

use std::{collections::HashSet, sync::Arc, time::Duration};

use serde_json::json;
use sonnette::{
    domain::clock::{Clock, ManualClock, Timestamp},
    sim::{Action, Environment, PushQuery, Script, Topics},
};

use crate::{
    store::world::Raw,
    support::{
        crowd::{Crowd, live, pass, requests, token},
        database::{TestDatabase, on_both_stores},
        world::{KEY_ID, TEAM, TOPIC, World, tick, ticking, ticking_until_done, until},
    },
};

fn accepted(world: &World) -> u64 {
    world.sim.ledger().counters().accepted
}

/// Phones that APNs accepted once, and pushes that are queued for them, in lists and one by one.
const PHONES: usize = 1_000;
const LISTS: usize = 9;
const SINGLES: usize = 1_000;
const QUEUED: usize = LISTS * PHONES + SINGLES;

/// Ten minutes of one mistake of ours with ten thousand pushes queued: no device is touched, APNs is asked at most once
/// an interval, health names the fault and the cure, and after the cure everything leaves, once.
async fn ten_minutes_of(
    database: TestDatabase,
    reason: &str,
    cure: &str,
    begin: impl AsyncFnOnce(&mut World, &ManualClock),
    end: impl AsyncFnOnce(&mut World, &ManualClock),
) {
    let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
    let mut world = World::with(database, Arc::clone(&clock) as _, "").await;
    live(&world, 0..PHONES, Environment::Production, None);
    let crowd = Crowd::once_accepted(&world, &clock, 0..PHONES).await;
    begin(&mut world, &clock).await;
    let mut ids = Vec::with_capacity(LISTS + SINGLES);
    for _ in 0..LISTS {
        ids.push(crowd.send(&world).await);
    }
    let singles = (0..SINGLES).map(|n| world.send(json!({ "user_ids": [format!("user-{n}")] })));
    ids.extend(futures_util::future::join_all(singles).await);

    let check = ticking(&world, &clock, "health names the fault", || world.check("apns:breaker", "production")).await;
    assert_eq!(check["status"], "fail");
    assert!(check["output"].as_str().unwrap().contains(reason), "{check}");
    assert!(check["advice"].as_str().unwrap().contains(cure), "the cure is named: {check}");
    let health = world.server.get("/health").await;
    assert_eq!((health.status.as_u16(), health.body["status"].as_str()), (200, Some("warn")));
    ticking(&world, &clock, "all of it waits for the breaker", || async {
        for id in ids.iter().take(LISTS).chain(ids.last()) {
            let seen = world.notification(id).await;
            let waits = seen["waiting_for"]["reason"].as_str().is_some_and(|r| r == format!("breaker: {reason}"));
            if !waits {
                return None;
            }
        }
        Some(())
    })
    .await;

    let (since, before) = (clock.now(), requests(&world));
    let mut probed_at = Vec::new();
    while clock.now().since(since) < Duration::from_secs(600) {
        pass(&world, &clock, Duration::from_secs(2)).await;
        let now = requests(&world) - before;
        assert!(now <= probed_at.len() as u64 + 1, "one push at a time is tried");
        if now > probed_at.len() as u64 {
            probed_at.push(clock.now());
        }
    }
    // After 2 s, 30 s, 1, 2, then every 5 minutes; the first ones may have been made before all of it waited.
    assert!((1..=5).contains(&probed_at.len()), "{probed_at:?} in ten minutes");
    let gaps: Vec<_> = probed_at.windows(2).map(|at| at[1].since(at[0]).as_secs()).collect();
    assert!(gaps.iter().all(|gap| *gap >= 25), "{probed_at:?}");
    assert!(gaps.windows(2).all(|gap| gap[1] + 5 > gap[0]), "rarer and rarer: {probed_at:?}");
    assert_eq!(Crowd::statuses(&world).await, [PHONES, 0, 0], "no device is touched");
    assert_eq!(accepted(&world), PHONES as u64, "{:?}", world.sim.ledger().repeats());

    end(&mut world, &clock).await;
    ticking(&world, &clock, "everything has left", || async {
        (accepted(&world) == (PHONES + QUEUED) as u64).then_some(())
    })
    .await;
    ticking(&world, &clock, "everything is told", || async {
        for id in &ids {
            if world.notification(id).await["status"] != "done" {
                return None;
            }
        }
        Some(())
    })
    .await;
    let pushes = world.sim.ledger().pushes(&PushQuery { limit: Some(2 * QUEUED), ..PushQuery::default() });
    let different: HashSet<_> = pushes.iter().map(|push| (&push.token, push.apns_id)).collect();
    assert_eq!((pushes.len(), different.len()), (PHONES + QUEUED, PHONES + QUEUED), "each of them once");
    assert_eq!(Crowd::statuses(&world).await, [PHONES, 0, 0]);
    assert!(world.check("apns:breaker", "production").await.is_none());
}

/// What APNs' portal says of the key is changed so.
fn change_key(world: &World, change: impl FnOnce(&mut sonnette::sim::ProviderKey)) {
    let mut key = world.sim.keys().list().into_iter().find(|key| key.key_id == KEY_ID).unwrap();
    change(&mut key);
    world.sim.keys().register(key).unwrap();
}

on_both_stores! {
    async fn ten_minutes_of_a_key_that_apns_does_not_know(database) {
        let kept = std::sync::Mutex::new(None);
        ten_minutes_of(database, "InvalidProviderToken", "key_id",
            async |world, _| {
                *kept.lock().unwrap() = world.sim.keys().list().pop();
                assert!(world.sim.keys().remove(KEY_ID));
            },
            async |world, _| world.sim.keys().register(kept.lock().unwrap().take().unwrap()).unwrap(),
        )
        .await;
    }

    async fn ten_minutes_of_a_wrong_team(database) {
        ten_minutes_of(database, "InvalidProviderToken", "team_id",
            async |world, _| world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap(),
            async |world, _| world.sim.keys().set_team(KEY_ID, TEAM).unwrap(),
        )
        .await;
    }

    async fn ten_minutes_of_a_topic_that_the_key_may_not_use(database) {
        let only = |topic: &str| Topics::Only(vec![topic.to_owned()]);
        ten_minutes_of(database, "TopicDisallowed", "`topic`",
            async |world, _| change_key(world, |key| key.topics = only("fr.ocpizza.shop")),
            async |world, _| change_key(world, |key| key.topics = only(TOPIC)),
        )
        .await;
    }

    async fn ten_minutes_of_tokens_of_another_topic(database) {
        ten_minutes_of(database, "DeviceTokenNotForTopic", "`topic`",
            async |world, _| live(world, 0..PHONES, Environment::Production, Some("fr.ocpizza.shop")),
            async |world, _| live(world, 0..PHONES, Environment::Production, None),
        )
        .await;
    }

    async fn ten_minutes_of_a_key_of_the_other_environment(database) {
        ten_minutes_of(database, "BadEnvironmentKeyIdInToken", "`environments`",
            async |world, _| change_key(world, |key| key.environments = vec![Environment::Sandbox]),
            async |world, _| change_key(world, |key| key.environments = Environment::ALL.to_vec()),
        )
        .await;
    }

    async fn ten_minutes_of_a_key_of_the_other_environment_as_it_is_spelled_on_the_wire(database) {
        let reason = "BadEnvironmentKeyInToken";
        ten_minutes_of(database, reason, "`environments`",
            async |world, _| {
                let action = Action::Answer { status: 403, reason: Some(reason.into()), timestamp_ms: None };
                world.sim.scripts().add(Script::new(sonnette::sim::ANY_TOKEN, action));
            },
            async |world, _| assert_eq!(world.sim.scripts().clear(None), 2),
        )
        .await;
    }

    async fn ten_minutes_of_the_sandbox_where_production_should_be(database) {
        ten_minutes_of(database, "BadDeviceToken", "[apns]",
            async |world, clock| {
                world.config.apns.production = format!("https://{}", world.sim.sandbox());
                world.restart_on(clock).await;
            },
            async |world, clock| {
                world.config.apns.production = format!("https://{}", world.sim.production());
                world.restart_on(clock).await;
            },
        )
        .await;
    }

    async fn ten_thousand_devices_on_one_wrong_key_cost_a_handful_of_requests(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let crowd = Crowd::registered(&world, 0..10_000).await;
        world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
        let id = crowd.send(&world).await;
        ticking(&world, &clock, "all of it waits for the breaker", || async {
            let seen = world.notification(&id).await;
            seen["waiting_for"]["reason"].as_str().is_some_and(|r| r.contains("InvalidProviderToken")).then_some(())
        })
        .await;
        pass(&world, &clock, Duration::from_secs(60)).await;
        assert!(requests(&world) <= 12, "{} requests", requests(&world));
        world.sim.keys().set_team(KEY_ID, TEAM).unwrap();
        let seen = ticking_until_done(&world, &clock, &id).await;
        assert_eq!(seen["counts"]["accepted"], 10_000, "{seen}");
        assert_eq!((accepted(&world), world.sim.ledger().repeats().len()), (10_000, 0));
        assert_eq!(Crowd::statuses(&world).await, [10_000, 0, 0]);
    }

    async fn a_breaker_that_opens_again_soon_is_probed_more_rarely_from_the_start(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        world.device(&token(1), Some("user-1")).await;
        let mut took = Vec::new();
        for _ in 0..3 {
            world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
            let id = world.send(json!({ "user_ids": ["user-1"] })).await;
            ticking(&world, &clock, "it waits", || async {
                (!world.notification(&id).await["waiting_for"].is_null()).then_some(())
            })
            .await;
            world.sim.keys().set_team(KEY_ID, TEAM).unwrap();
            let since = clock.now();
            assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
            took.push(clock.now().since(since).as_secs());
        }
        // 2 s, 30 s, 1 min, less what passed before it was seen to wait.
        assert!(took[0] < 20 && (20..45).contains(&took[1]) && (45..80).contains(&took[2]), "{took:?}");
    }

    async fn a_paused_app_is_not_probed_either(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        world.device(&token(1), Some("user-1")).await;
        world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
        let id = world.send(json!({ "user_ids": ["user-1"] })).await;
        ticking(&world, &clock, "it waits", || async {
            (!world.notification(&id).await["waiting_for"].is_null()).then_some(())
        })
        .await;
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
        ticking(&world, &clock, "health shows the pause", || world.check("queue:paused", "production")).await;
        world.sim.keys().set_team(KEY_ID, TEAM).unwrap();
        let before = requests(&world);
        pass(&world, &clock, Duration::from_secs(60)).await;
        assert_eq!(requests(&world), before);
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
        ticking(&world, &clock, "it has left", || async { (accepted(&world) == 1).then_some(()) }).await;
    }

    async fn work_that_expires_behind_a_breaker_ends_as_expired(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        world.device(&token(1), Some("user-1")).await;
        world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
        let id = world.send_with(json!({ "user_ids": ["user-1"] }), json!({ "ttl_seconds": 45 })).await;
        let seen = ticking(&world, &clock, "it has ended", || async {
            let seen = world.notification(&id).await;
            (seen["status"] == "done").then_some(seen)
        })
        .await;
        assert_eq!(seen["counts"]["expired"], 1, "{seen}");
    }

    async fn another_apps_work_is_not_concerned(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let more = "[[app]]\ntopic = \"fr.ocpizza.shop\"\nteam_id = \"ABCDE12345\"\nkey_id = \"OTHERKEY01\"\nkey_file = \"key.p8\"";
        let world = World::with(database, Arc::clone(&clock) as _, more).await;
        world.device(&token(1), Some("user-1")).await;
        world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
        world.send(json!({ "user_ids": ["user-1"] })).await;
        let body = json!({ "topic": "fr.ocpizza.shop", "token": token(2), "user_id": "user-1" });
        world.server.post("/v1/devices", &body).await.ok();
        ticking(&world, &clock, "the breaker is open", || world.check("apns:breaker", "livreur")).await;
        let body = json!({ "topic": "fr.ocpizza.shop", "to": { "user_ids": ["user-1"] }, "payload": { "aps": { "alert": "x" } } });
        let id = world.server.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned();
        assert_eq!(world.done(&id).await["counts"]["accepted"], 1);
        assert!(world.check("apns:breaker", "shop").await.is_none());
    }

    async fn a_paused_app_accepts_and_sends_nothing_until_it_is_resumed(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        world.device(&token(1), Some("user-1")).await;
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
        ticking(&world, &clock, "health shows the pause", || world.check("queue:paused", "production")).await;
        let id = world.send(json!({ "user_ids": ["user-1"] })).await;
        ticking(&world, &clock, "it says why it waits", || async {
            (world.notification(&id).await["waiting_for"]["reason"] == "paused").then_some(())
        })
        .await;
        for _ in 0..5 {
            tick(&world, &clock).await;
        }
        assert_eq!(world.sim.ledger().counters().requests, 0);
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
        ticking(&world, &clock, "it has left", || async { (accepted(&world) == 1).then_some(()) }).await;
    }

    async fn a_chunk_of_ten_devices_that_are_all_put_off_loses_none(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let mut users = Vec::new();
        for number in 0..10 {
            world.device(&token(number), Some(&format!("user-{number}"))).await;
            users.push(format!("user-{number}"));
            let busy = Action::Answer { status: 503, reason: Some("ServiceUnavailable".into()), timestamp_ms: None };
            world.sim.scripts().add(Script::new(token(number), busy).times(1));
        }
        let id = world.send(json!({ "user_ids": users })).await;
        // Their retries are spread over a second: each meets what was read for another.
        let seen = until("it is done", || async {
            clock.advance(Duration::from_millis(20));
            tokio::time::sleep(Duration::from_millis(5)).await;
            let seen = world.notification(&id).await;
            (seen["status"] == "done").then_some(seen)
        })
        .await;
        assert_eq!(seen["counts"]["accepted"], 10, "{seen}");
    }

    async fn a_probe_that_may_not_be_made_for_want_of_a_heartbeat_is_made_after_the_next(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let (id, mut beside) = without_heartbeats(&world, &clock).await;
        let since = clock.monotonic();
        beside.run("DROP TRIGGER no_beat").await;
        assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
        let took = clock.monotonic().saturating_sub(since);
        assert!(took < Duration::from_secs(20), "{took:?}: what was not made is not waited for as if it had been");
    }

    async fn a_probe_that_waits_for_a_heartbeat_is_not_made_once_the_app_is_paused(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let (id, mut beside) = without_heartbeats(&world, &clock).await;
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
        until("the pause is known", || {
            clock.advance(Duration::from_millis(250));
            async { (what_waits(&world).await.1 == "paused").then_some(()) }
        })
        .await;
        let before = requests(&world);
        beside.run("DROP TRIGGER no_beat").await;
        pass(&world, &clock, Duration::from_secs(15)).await;
        assert_eq!(requests(&world), before);
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
        assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
    }
}

/// A breaker whose cause is over, and a probe that is due and may not be made, because the database refuses the heartbeats;
/// one of the two notifications that wait, and a connection to the database.
async fn without_heartbeats(world: &World, clock: &ManualClock) -> (String, Raw) {
    let mut beside = Raw::open(world.config.database.url.expose()).await;
    world.device(&token(1), Some("user-1")).await;
    world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
    let refusal = match &beside {
        Raw::Sqlite(_) => "BEGIN SELECT RAISE(ABORT, 'no'); END",
        Raw::Mysql(_) => "FOR EACH ROW SIGNAL SQLSTATE '45000'",
    };
    beside.run(&format!("CREATE TRIGGER no_beat BEFORE UPDATE ON replicas {refusal}")).await;
    // In a second the last beat is too old, in two the probe is due.
    clock.advance(Duration::from_secs(3));
    let (id, _) = what_waits(world).await;
    what_waits(world).await;
    world.sim.keys().set_team(KEY_ID, TEAM).unwrap();
    let due = beside.number("SELECT next_probe_at FROM breakers").await;
    let since = clock.monotonic();
    while beside.number("SELECT next_probe_at FROM breakers").await == due {
        assert!(clock.monotonic().saturating_sub(since) < Duration::from_secs(600), "nobody is elected for the probe");
        clock.advance(Duration::from_millis(250));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (id, beside)
}

/// A notification that waits, and for what.
async fn what_waits(world: &World) -> (String, String) {
    let id = world.send(json!({ "user_ids": ["user-1"] })).await;
    let reason = until("it waits", || async {
        world.notification(&id).await["waiting_for"]["reason"].as_str().map(str::to_owned)
    })
    .await;
    (id, reason)
}
