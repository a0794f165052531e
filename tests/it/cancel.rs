//! Cancelling: what has not left does not leave, and everything is counted.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::{
    app::{App, Options},
    cli::make_api_key,
    domain::{api_key::Scope, clock::SystemClock},
    sim::{Action, Environment, Script},
};

use crate::{
    broadcast::{broadcast, broadcaster, with_devices},
    support::{
        client::Client,
        database::{Store, database, on_both_stores},
        world::{TOPIC, World, until},
    },
};

const PHONE: &str = "aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11";

async fn cancel(caller: &Client, id: &str) -> Value {
    let answer = caller.delete(&format!("/v1/notifications/{id}")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(answer.body["cancelled_at"].is_string(), "{}", answer.text);
    answer.body
}

/// Waits until it has ended as cancelled.
async fn ended(world: &World, id: &str) -> Value {
    until("the notification has ended as cancelled", || async {
        let seen = world.notification(id).await;
        (seen["status"] == "cancelled").then_some(seen)
    })
    .await
}

fn accepted(world: &World) -> u64 {
    world.sim.ledger().counters().accepted
}

on_both_stores! {
    async fn half_way_through_a_broadcast_the_rest_is_counted_as_cancelled(database) {
        with_devices(&database, 12_000).await;
        let world = World::start(database).await;
        let caller = broadcaster(&world).await;
        world.sim.gates().set_latency(Environment::Production, Duration::from_millis(100));
        world.sim.gates().set_stream_limit(Environment::Production, 200);
        let id = broadcast(&caller, json!({ "everyone": true })).await["id"].as_str().unwrap().to_owned();
        until("some of it has left", || async {
            (world.notification(&id).await["counts"]["accepted"].as_u64() > Some(500)).then_some(())
        }).await;
        cancel(&caller, &id).await;
        let seen = ended(&world, &id).await;
        let counts = &seen["counts"];
        let count = |word: &str| counts[word].as_u64().unwrap();
        assert_eq!((count("targeted"), count("pending")), (12_000, 0), "{counts}");
        assert_eq!(count("accepted"), accepted(&world), "what was in flight is what it is: {counts}");
        assert_eq!(count("accepted") + count("cancelled"), 12_000, "{counts}");
        assert!(count("cancelled") > 0, "{counts}");
        assert_eq!((&seen["audience_complete"], seen["done_at"].is_string()), (&json!(true), true));
        let page = caller.get(&format!("/v1/notifications/{id}/deliveries?status=cancelled&limit=1")).await.ok();
        assert_eq!(page["items"][0]["reason"], "Cancelled");
        let again = cancel(&caller, &id).await;
        assert_eq!((&again["counts"], &again["cancelled_at"]), (counts, &seen["cancelled_at"]), "once is enough");
        let listed = caller.get("/v1/notifications?status=cancelled").await.ok();
        assert_eq!(listed["items"][0]["id"], id.as_str());
    }

    async fn what_is_scheduled_or_paused_ends_with_the_answer(database) {
        let world = World::start(database).await;
        world.device(PHONE, Some("rider")).await;
        let later = json!({ "send_at": world.clock.now().plus(Duration::from_secs(3_600)).to_string() });
        let scheduled = world.send_with(json!({ "user_ids": ["rider"] }), later).await;
        let seen = cancel(&world.server, &scheduled).await;
        assert_eq!((seen["status"].as_str(), seen["counts"]["cancelled"].as_u64()), (Some("cancelled"), Some(1)), "{seen}");

        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/pause"), &json!({})).await.status, 204);
        let paused = until("a notification waits for the pause", || async {
            let id = world.send(json!({ "user_ids": ["rider"] })).await;
            until("it has gone or waits", || async {
                let seen = world.notification(&id).await;
                match seen["waiting_for"]["reason"].as_str() {
                    Some("paused") => Some(Some(id.clone())),
                    _ if seen["status"] == "done" => Some(None),
                    _ => None,
                }
            }).await
        }).await;
        let left = accepted(&world);
        let seen = cancel(&world.server, &paused).await;
        assert_eq!((seen["status"].as_str(), seen["counts"]["cancelled"].as_u64()), (Some("cancelled"), Some(1)), "{seen}");
        assert_eq!(world.server.post(&format!("/v1/apps/{TOPIC}/resume"), &json!({})).await.status, 204);
        let after = world.send(json!({ "user_ids": ["rider"] })).await;
        world.done(&after).await;
        assert_eq!(accepted(&world), left + 1, "only what was not cancelled leaves");
    }

    async fn what_waits_for_a_retry_is_cancelled_and_what_may_have_arrived_is_unknown(database) {
        let world = World::start(database).await;
        world.device(PHONE, Some("rider")).await;
        let busy = Action::Answer { status: 503, reason: Some("ServiceUnavailable".into()), timestamp_ms: None };
        for (action, word) in [(busy, "cancelled"), (Action::Reset { code: 2, accepted: true }, "unknown")] {
            world.sim.scripts().clear(None);
            world.sim.scripts().add(Script::new(PHONE, action));
            let id = world.send(json!({ "user_ids": ["rider"] })).await;
            until("it was tried", || async {
                (world.deliveries(&id).await[0]["attempts"].as_u64() > Some(0)).then_some(())
            }).await;
            cancel(&world.server, &id).await;
            assert_eq!(ended(&world, &id).await["counts"][word], 1);
        }
    }

    async fn only_who_may_send_cancels_and_only_what_it_may_see(database) {
        let world = World::start(database).await;
        world.device(PHONE, Some("rider")).await;
        let done = world.send(json!({ "user_ids": ["rider"] })).await;
        let before = world.done(&done).await;
        let reader = world.caller(&[Scope::Read, Scope::Broadcast]).await;
        let refused = reader.delete(&format!("/v1/notifications/{done}")).await;
        assert_eq!((refused.status.as_u16(), refused.body["type"].as_str()), (403, Some("/problems/forbidden")));
        for id in ["0193515e-8f00-7abc-8def-000000000001", "1042"] {
            assert_eq!(world.server.delete(&format!("/v1/notifications/{id}")).await.status, 404, "{id}");
        }
        let elsewhere = vec!["fr.ocpizza.client".parse().unwrap()];
        let (key, kept) = make_api_key("other", [Scope::Send], Some(elsewhere), None, world.clock.now());
        world.app().store().add_api_key(&kept).await.unwrap();
        let other = world.server.with_key(&key.reveal());
        assert_eq!(other.delete(&format!("/v1/notifications/{done}")).await.status, 404, "another app's is not there");
        let late = world.server.delete(&format!("/v1/notifications/{done}")).await;
        assert_eq!((late.status.as_u16(), &late.body), (200, &before), "what has ended stays as it is");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn within_two_seconds_no_replica_sends_any_more() {
    let database = database(Store::Mysql).await;
    with_devices(&database, 30_000).await;
    let world = World::start(database).await;
    let other = App::start(&world.config, Arc::new(SystemClock::new()), Options::default()).await.unwrap();
    let caller = broadcaster(&world).await;
    // Both have pushes in hand and no stream for them.
    world.sim.gates().set_initial_stream_limit(Environment::Production, 0);
    let id = broadcast(&caller, json!({ "everyone": true })).await["id"].as_str().unwrap().to_owned();
    until("pushes of both replicas wait for a stream", || async {
        let waiting = |app: &App| app.routes().iter().map(|route| route.waiting).sum::<usize>();
        (waiting(world.app()) > 0 && waiting(&other) > 0).then_some(())
    })
    .await;
    cancel(&caller, &id).await;
    tokio::time::sleep(Duration::from_secs(2)).await; // what is promised, not what it takes
    world.sim.gates().set_initial_stream_limit(Environment::Production, 1_000);
    world.sim.gates().set_stream_limit(Environment::Production, 1_000);
    let seen = ended(&world, &id).await;
    assert_eq!(seen["counts"]["cancelled"], 30_000, "{seen}");
    assert_eq!(accepted(&world), 0);
    assert!(other.shutdown(Duration::from_secs(30)).await);
}
