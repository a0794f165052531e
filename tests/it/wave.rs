//! A wave of refused tokens is a mistake of ours until the opposite is shown (promise 5): no token dies by it, and no bad
//! phone holds up the others.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::{
    app::{App, Options},
    domain::clock::{Clock, ManualClock, Timestamp},
    sim::{Action, Environment, Script},
};

use crate::support::{
    client::Client,
    crowd::{Crowd, live, pass, requests, token},
    database::{Store, TestDatabase, database, on_both_stores},
    world::{TOPIC, World, tick, ticking, ticking_until_done, until},
};

async fn started(database: TestDatabase) -> (World, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
    let world = World::with(database, Arc::clone(&clock) as _, "").await;
    (world, clock)
}

/// From now on APNs answers so for this phone, in both environments.
fn answers(world: &World, number: usize, status: u16, reason: &str) {
    let action = Action::Answer { status, reason: Some(reason.into()), timestamp_ms: None };
    world.sim.scripts().add(Script::new(token(number), action));
}

async fn status(world: &World, id: &str) -> Value {
    world.server.get(&format!("/v1/devices/{id}")).await.ok()["status"].clone()
}

async fn breaker(world: &World) -> Option<Value> {
    world.check("apns:breaker", "livreur").await
}

/// Waits until something waits for a reason that contains this.
async fn waits(world: &World, clock: &ManualClock, id: &str, reason: &str) {
    ticking(world, clock, "it says why it waits", || async {
        let seen = world.notification(id).await;
        seen["waiting_for"]["reason"].as_str().is_some_and(|r| r.contains(reason)).then_some(())
    })
    .await;
}

on_both_stores! {
    async fn one_bad_phone_in_a_quiet_shop_waits_and_holds_nobody_up(database) {
        let (mut world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..2).await;
        // This process has seen nothing yet.
        world.restart_on(&clock).await;
        answers(&world, 0, 400, "BadDeviceToken");
        let bad = world.send(json!({ "user_ids": ["user-0"] })).await;
        waits(&world, &clock, &bad, "backoff").await;
        let delivery = world.deliveries(&bad).await.remove(0);
        assert_eq!((&delivery["status"], &delivery["reason"]), (&json!("pending"), &json!("BadDeviceToken")), "{delivery}");
        assert_eq!(status(&world, &shop.ids[0]).await, "active");
        assert!(breaker(&world).await.is_none());

        let other = world.send(json!({ "user_ids": ["user-1"] })).await;
        assert_eq!(world.done(&other).await["counts"]["accepted"], 1, "at once, for no time passes here");
        // Now it is known that things are well, and the next try tells.
        let seen = ticking_until_done(&world, &clock, &bad).await;
        assert_eq!(seen["counts"]["failed"], 1, "{seen}");
        assert_eq!(status(&world, &shop.ids[0]).await, "suspended");
        assert_eq!(status(&world, &shop.ids[1]).await, "active");
        assert!(breaker(&world).await.is_none());
    }

    async fn a_bad_phone_that_nobody_can_judge_is_tried_rarely_and_never_touched(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..1).await;
        answers(&world, 0, 400, "BadDeviceToken");
        let before = requests(&world);
        let bad = world.send_with(json!({ "user_ids": ["user-0"] }), json!({ "ttl_seconds": 700 })).await;
        pass(&world, &clock, Duration::from_secs(600)).await;
        let tried = requests(&world) - before;
        assert!((3..=7).contains(&tried), "30 s, 30 s, 30 s, 2 min, 15 min with some spread, not {tried} requests");
        pass(&world, &clock, Duration::from_secs(200)).await;
        let seen = ticking_until_done(&world, &clock, &bad).await;
        assert_eq!(seen["counts"]["expired"], 1, "{seen}");
        assert_eq!(status(&world, &shop.ids[0]).await, "active");
    }

    async fn three_bad_tokens_in_a_busy_shop_are_told_apart_within_seconds(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..30).await;
        answers(&world, 3, 400, "BadDeviceToken");
        answers(&world, 4, 400, "BadDeviceToken");
        answers(&world, 5, 400, "DeviceTokenNotForTopic");
        let id = shop.send(&world).await;
        let judged = until("all that can be told is told", || async {
            let counts = world.notification(&id).await["counts"].clone();
            (counts["accepted"] == 27).then_some(counts)
        })
        .await;
        assert_eq!(judged["pending"], 3, "nothing follows from a refusal before it is judged: {judged}");
        assert_eq!(Crowd::statuses(&world).await, [30, 0, 0]);
        let seen = ticking_until_done(&world, &clock, &id).await;
        assert_eq!((&seen["counts"]["accepted"], &seen["counts"]["failed"]), (&json!(27), &json!(3)));
        assert_eq!(status(&world, &shop.ids[3]).await, "suspended");
        assert_eq!(status(&world, &shop.ids[5]).await, "active", "a token of another topic costs the delivery alone");
        assert_eq!(Crowd::statuses(&world).await, [28, 0, 2]);
        assert!(breaker(&world).await.is_none());
    }

    async fn dead_tokens_garbage_and_first_tries_never_open_a_breaker(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..100).await;
        for number in 0..5 {
            answers(&world, number, 410, "Unregistered");
        }
        for number in 100..140 {
            answers(&world, number, 400, "BadDeviceToken");
        }
        live(&world, 140..160, Environment::Sandbox, None);
        let new = Crowd::registered(&world, 100..200).await;
        // Tokens that registered within a minute before APNs saw them leave are kept.
        pass(&world, &clock, Duration::from_secs(120)).await;
        let (garbage, dead) = (new.send(&world).await, shop.send(&world).await);
        let seen = ticking_until_done(&world, &clock, &garbage).await;
        assert_eq!((&seen["counts"]["accepted"], &seen["counts"]["failed"]), (&json!(60), &json!(40)), "{seen}");
        let seen = ticking_until_done(&world, &clock, &dead).await;
        assert_eq!((&seen["counts"]["accepted"], &seen["counts"]["unregistered"]), (&json!(95), &json!(5)), "{seen}");
        assert!(breaker(&world).await.is_none());
        assert_eq!(Crowd::statuses(&world).await, [155, 45, 0]);
        // Raw tokens are nobody's first tries.
        let tokens: Vec<String> = (100..140).map(token).map(|t| t.replace("00", "11")).collect();
        for token in &tokens {
            let action = Action::Answer { status: 400, reason: Some("BadDeviceToken".into()), timestamp_ms: None };
            world.sim.scripts().add(Script::new(token.clone(), action));
        }
        let raw = world.send(json!({ "tokens": tokens })).await;
        assert_eq!(ticking_until_done(&world, &clock, &raw).await["counts"]["failed"], 40);
        assert!(breaker(&world).await.is_none());
    }

    async fn a_wave_touches_no_device_not_even_one_never_accepted_and_all_leave_afterwards(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..50).await;
        let new = Crowd::registered(&world, 50..60).await;
        // As if production were answered by the sandbox, and these ten were nowhere.
        live(&world, 0..50, Environment::Sandbox, None);
        for number in 50..60 {
            answers(&world, number, 400, "BadDeviceToken");
        }
        // The new ones are refused everywhere before the others show that something is wrong with production.
        let before = requests(&world);
        let second = new.send(&world).await;
        until("both environments have refused them", || async { (requests(&world) == before + 20).then_some(()) }).await;
        let first = shop.send(&world).await;
        waits(&world, &clock, &first, "breaker: BadDeviceToken").await;
        waits(&world, &clock, &second, "breaker: BadDeviceToken").await;
        let check = breaker(&world).await.unwrap();
        assert!(check["output"].as_str().unwrap().contains("400 BadDeviceToken"), "{check}");
        assert!(check["advice"].as_str().unwrap().contains("[apns]"), "{check}");
        assert_eq!(world.server.get("/health").await.body["status"], "warn");
        pass(&world, &clock, Duration::from_secs(120)).await;
        assert_eq!(Crowd::statuses(&world).await, [60, 0, 0]);
        assert_eq!(world.notification(&first).await["counts"]["pending"], 50);

        live(&world, 0..50, Environment::Production, None);
        world.sim.scripts().clear(None);
        for id in [&first, &second] {
            let seen = ticking_until_done(&world, &clock, id).await;
            assert_eq!(seen["counts"]["accepted"], seen["counts"]["targeted"], "{seen}");
        }
        assert_eq!(world.sim.ledger().repeats().len(), 0, "and nothing twice");
        assert!(breaker(&world).await.is_none());
    }

    async fn three_bad_tokens_in_a_small_shop_hold_it_up_for_half_a_minute_once(database) {
        let (mut world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..6).await;
        // This process has seen nothing yet.
        world.restart_on(&clock).await;
        for number in 0..3 {
            answers(&world, number, 400, "BadDeviceToken");
        }
        let bad = world.send(json!({ "device_ids": shop.ids[..3] })).await;
        waits(&world, &clock, &bad, "breaker").await;
        // Minutes of nothing but bad pushes do not make the next good one wait longer.
        pass(&world, &clock, Duration::from_secs(400)).await;
        let good = world.send(json!({ "user_ids": ["user-3"] })).await;
        let sent_at = clock.now();
        assert_eq!(ticking_until_done(&world, &clock, &good).await["counts"]["accepted"], 1);
        assert!(clock.now().since(sent_at) < Duration::from_secs(40), "it took {:?}", clock.now().since(sent_at));

        // The breaker has closed; what was refused before is now judged without another.
        for number in [4, 5, 3, 4, 5] {
            let id = world.send(json!({ "user_ids": [format!("user-{number}")] })).await;
            assert_eq!(world.done(&id).await["counts"]["accepted"], 1, "at once, for no time passes here");
        }
        let seen = ticking_until_done(&world, &clock, &bad).await;
        assert_eq!(seen["counts"]["failed"], 3, "{seen}");
        assert_eq!(Crowd::statuses(&world).await, [3, 0, 3]);
    }

    async fn a_wave_survives_a_restart_in_its_middle(database) {
        let (mut world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..40).await;
        live(&world, 0..40, Environment::Sandbox, None);
        // Refused and not judged yet: nothing moves the clock.
        let before = requests(&world);
        let first = world.send(json!({ "device_ids": shop.ids[..5] })).await;
        until("five are refused", || async { (requests(&world) == before + 5).then_some(()) }).await;
        world.restart_on(&clock).await;
        assert_eq!(world.notification(&first).await["counts"]["pending"], 5);
        let second = shop.send(&world).await;
        waits(&world, &clock, &second, "breaker").await;
        let before = requests(&world);
        world.restart_on(&clock).await;
        for _ in 0..5 {
            tick(&world, &clock).await;
        }
        assert!(requests(&world) <= before + 2, "the breaker is still open");
        assert!(breaker(&world).await.is_some());
        assert_eq!(Crowd::statuses(&world).await, [40, 0, 0]);
        live(&world, 0..40, Environment::Production, None);
        for id in [&first, &second] {
            let seen = ticking_until_done(&world, &clock, id).await;
            assert_eq!(seen["counts"]["accepted"], seen["counts"]["targeted"], "{seen}");
        }
        assert_eq!(world.sim.ledger().repeats().len(), 0);
    }

    async fn a_caller_who_names_the_wrong_environment_fails_alone(database) {
        let (world, clock) = started(database).await;
        live(&world, 0..20, Environment::Production, None);
        let shop = Crowd::once_accepted(&world, &clock, 0..20).await;
        let id = world.send_with(json!({ "device_ids": shop.ids }), json!({ "environment": "sandbox" })).await;
        let seen = ticking_until_done(&world, &clock, &id).await;
        assert_eq!(seen["counts"]["failed"], 20, "{seen}");
        assert!(breaker(&world).await.is_none());
        assert_eq!(Crowd::statuses(&world).await, [20, 0, 0]);
        let right = shop.send(&world).await;
        assert_eq!(ticking_until_done(&world, &clock, &right).await["counts"]["accepted"], 20);
    }

    async fn an_app_that_names_the_wrong_environment_is_put_right_and_opens_no_breaker(database) {
        let (world, clock) = started(database).await;
        live(&world, 0..20, Environment::Production, None);
        let shop = Crowd::once_accepted(&world, &clock, 0..20).await;
        for number in 0..20 {
            let body = json!({ "token": token(number), "topic": TOPIC, "environment": "sandbox" });
            assert!(world.server.post("/v1/devices", &body).await.ok()["last_accepted_at"].is_null());
        }
        let id = shop.send(&world).await;
        let seen = ticking_until_done(&world, &clock, &id).await;
        assert_eq!(seen["counts"]["accepted"], 20, "{seen}");
        let device = world.server.get(&format!("/v1/devices/{}", shop.ids[0])).await.ok();
        assert_eq!(device["environment"], "production", "learned from APNs: {device}");
        assert!(breaker(&world).await.is_none());
    }

    async fn a_phone_that_registers_while_its_push_is_judged_stays_active(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..20).await;
        answers(&world, 0, 400, "BadDeviceToken");
        answers(&world, 1, 400, "BadDeviceToken");
        let id = shop.send(&world).await;
        until("all but two are accepted", || async {
            (world.notification(&id).await["counts"]["accepted"] == 18).then_some(())
        })
        .await;
        clock.advance(Duration::from_millis(100));
        world.device(&token(0), Some("user-0")).await;
        assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["failed"], 2);
        assert_eq!(status(&world, &shop.ids[0]).await, "active", "it has registered since");
        assert_eq!(status(&world, &shop.ids[1]).await, "suspended");
    }

    async fn a_probe_that_cannot_be_written_does_not_cost_the_interval(database) {
        let (world, clock) = started(database).await;
        let shop = Crowd::once_accepted(&world, &clock, 0..30).await;
        live(&world, 0..30, Environment::Sandbox, None);
        let wave = shop.send(&world).await;
        waits(&world, &clock, &wave, "breaker").await;
        // The oldest that was not tried, five times, is for riders who log out before the next probe.
        let mut withheld = Vec::new();
        for number in 0..5 {
            withheld.push(world.send_with(json!({ "user_ids": [format!("user-{number}")] }), json!({ "ttl_seconds": 3600 })).await);
        }
        let good = world.send(json!({ "user_ids": ["user-9"] })).await;
        for id in withheld.iter().chain([&good]) {
            waits(&world, &clock, id, "breaker").await;
        }
        pass(&world, &clock, Duration::from_secs(300)).await;
        for id in &shop.ids[..5] {
            world.server.delete(&format!("/v1/devices/{id}/user")).await;
        }
        live(&world, 0..30, Environment::Production, None);
        let cured_at = clock.now();
        assert_eq!(ticking_until_done(&world, &clock, &good).await["counts"]["accepted"], 1);
        let took = clock.now().since(cured_at);
        assert!(took < Duration::from_secs(310), "one interval of 5 minutes at most, not {took:?}");
        for id in &withheld {
            assert_eq!(ticking_until_done(&world, &clock, id).await["counts"]["suppressed"], 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wave_that_one_replica_sees_holds_the_others_within_two_seconds() {
    let (world, clock) = started(database(Store::Mysql).await).await;
    let shop = Crowd::once_accepted(&world, &clock, 0..30).await;
    let other = App::start(&world.config, Arc::clone(&clock) as _, Options::default()).await.unwrap();
    let beside = Client::new(other.address(), Some(world.server.key()));
    live(&world, 0..30, Environment::Sandbox, None);
    let wave = world.send(json!({ "device_ids": shop.ids[..20] })).await;
    ticking(&world, &clock, "the breaker is open", || breaker(&world)).await;
    for _ in 0..2 {
        tick(&world, &clock).await;
    }
    let before = requests(&world);
    let body = json!({ "topic": TOPIC, "to": { "user_ids": ["user-25"] }, "payload": { "aps": { "alert": "x" } } });
    let id = beside.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned();
    waits(&world, &clock, &id, "breaker").await;
    assert!(requests(&world) <= before + 1, "nothing but a probe has left");
    live(&world, 0..30, Environment::Production, None);
    for id in [&wave, &id] {
        let seen = ticking_until_done(&world, &clock, id).await;
        assert_eq!(seen["counts"]["accepted"], seen["counts"]["targeted"], "{seen}");
    }
    assert_eq!(world.sim.ledger().repeats().len(), 0);
    assert!(other.shutdown(Duration::from_secs(60)).await);
}
