//! A mistake of ours never kills a token (promise 5): a refused credential stops by itself and resumes by itself.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::{
    domain::clock::{Clock, ManualClock, Timestamp},
    sim::{Action, Script},
};

use crate::support::{
    database::on_both_stores,
    world::{KEY_ID, TEAM, TOPIC, World, tick, ticking, until},
};

fn token(number: usize) -> String {
    format!("{number:064x}")
}

fn accepted(world: &World) -> u64 {
    world.sim.ledger().counters().accepted
}

on_both_stores! {
    async fn a_key_of_the_wrong_team_costs_a_handful_of_requests_and_no_device(database) {
        const QUEUED: u64 = 1_000;
        const DEVICES: usize = 10;
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        for number in 0..DEVICES {
            world.device(&token(number), Some(&format!("user-{number}"))).await;
        }
        world.sim.keys().set_team(KEY_ID, "ZZZZZ99999").unwrap();
        let sends = (0..QUEUED).map(|n| world.send(json!({ "user_ids": [format!("user-{}", n % DEVICES as u64)] })));
        let ids = futures_util::future::join_all(sends).await;

        let check = ticking(&world, &clock, "health names the fault", || world.check("apns:breaker", "production")).await;
        assert_eq!(check["status"], "fail");
        assert!(check["output"].as_str().unwrap().contains("InvalidProviderToken"), "{check}");
        assert!(check["advice"].as_str().unwrap().contains("team_id"), "the cure is named: {check}");
        let health = world.server.get("/health").await;
        assert_eq!((health.status.as_u16(), health.body["status"].as_str()), (200, Some("warn")));

        // Everything is parked, and ten minutes pass.
        ticking(&world, &clock, "all of it waits for the breaker", || async {
            let page = world.server.get("/v1/notifications?limit=1000").await.ok();
            let waiting = |n: &Value| n["waiting_for"]["reason"].as_str().is_some_and(|r| r.contains("InvalidProviderToken"));
            page["items"].as_array().unwrap().iter().all(waiting).then_some(())
        })
        .await;
        let later = clock.now().plus(Duration::from_secs(600));
        while clock.now() < later {
            tick(&world, &clock).await;
        }
        let requests = world.sim.ledger().counters().requests;
        assert!(requests <= 12, "a handful of requests in ten minutes, not {requests}");
        assert_eq!(accepted(&world), 0);
        let devices = world.server.get("/v1/devices?limit=1000").await.ok();
        assert!(devices["items"].as_array().unwrap().iter().all(|d| d["status"] == "active"), "no device is touched");
        let seen = world.notification(&ids[0]).await;
        assert_eq!((seen["counts"]["pending"].as_u64(), seen["counts"]["failed"].as_u64()), (Some(1), Some(0)));

        world.sim.keys().set_team(KEY_ID, TEAM).unwrap();
        ticking(&world, &clock, "everything has left", || async { (accepted(&world) == QUEUED).then_some(()) }).await;
        for id in ids {
            until("it is done", || async {
                (world.notification(&id).await["counts"]["accepted"] == 1).then_some(())
            })
            .await;
        }
        assert_eq!(world.sim.ledger().repeats().len(), 0, "and nothing twice");
        assert!(world.check("apns:breaker", "production").await.is_none());
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
}
