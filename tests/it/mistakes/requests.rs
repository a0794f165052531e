//! Mistakes in what is sent: units of time, defaults, push types, bodies.

use std::sync::Arc;

use serde_json::{Value, json};
use sonnette::{
    domain::clock::{Clock, ManualClock},
    sim::{Push, PushQuery},
};

use crate::support::{
    database::{Store, TestDatabase, database, on_both_stores},
    gateway::START,
    world::{TOPIC, World, ticking_until_done},
};

const TOKEN: &str = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90";

async fn start(database: TestDatabase) -> (World, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new(START));
    let world = World::with(database, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
    (world, clock)
}

/// Sends the body of a request as it stands, with a raw token in it, and returns what the simulator accepted of it.
async fn sent(world: &World, clock: &ManualClock, body: &str) -> Push {
    let answer = world.server.send(http::Method::POST, "/v1/notifications", &[], body.to_owned()).await.unwrap();
    assert_eq!(answer.status, 202, "{}", answer.text);
    let done = ticking_until_done(world, clock, answer.body["id"].as_str().unwrap()).await;
    assert_eq!(done["counts"]["accepted"], 1, "{done}");
    let last = world.sim.ledger().counters().accepted - 1;
    world.sim.ledger().pushes(&PushQuery { after: last, ..PushQuery::default() }).remove(0)
}

fn now(clock: &ManualClock) -> u64 {
    u64::try_from(clock.now().as_seconds()).unwrap()
}

/// An alert with these fields more.
fn alert(more: &Value) -> String {
    let mut body =
        json!({ "topic": TOPIC, "to": { "tokens": [TOKEN] }, "payload": { "aps": { "alert": "Commande 1042" } } });
    for (field, value) in more.as_object().unwrap() {
        body[field] = value.clone();
    }
    body.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m17_times_are_told_to_apns_in_seconds() {
    let (world, clock) = start(database(Store::Sqlite).await).await;
    for ttl in [600, 86_400, 2_592_000] {
        let told = now(&clock) + ttl;
        let push = sent(&world, &clock, &alert(&json!({ "ttl_seconds": ttl }))).await;
        assert_eq!(push.expiration, Some(told), "in {ttl} s");
    }
    let push = sent(&world, &clock, &alert(&json!({ "expiration": "2026-11-18T13:06:40+01:00" }))).await;
    assert_eq!(push.expiration, Some(1_795_003_600));
    let tokens = world.sim.ledger().provider_tokens();
    assert_eq!(tokens.len(), 1, "the age of a token is counted in seconds too");
    let age = clock.now().as_seconds() - tokens[0].issued_at;
    assert!((0..3600).contains(&age), "iat {}", tokens[0].issued_at);
}

on_both_stores! {
    async fn m18_apns_stores_a_push_for_a_day_unless_the_caller_says_otherwise(database) {
        let (world, clock) = start(database).await;
        for (fields, ttl) in [
            (json!({}), 86_400),
            (json!({ "ttl_seconds": null }), 86_400),
            (json!({ "push_type": "background", "payload": { "aps": { "content-available": 1 } } }), 86_400),
            (json!({ "push_type": "voip", "payload": {} }), 86_400),
            (json!({ "ttl_seconds": 1_000 }), 1_000),
        ] {
            let told = now(&clock) + ttl;
            assert_eq!(sent(&world, &clock, &alert(&fields)).await.expiration, Some(told), "{fields}");
        }
        let once = sent(&world, &clock, &alert(&json!({ "ttl_seconds": 0 }))).await;
        assert_eq!(once.expiration, Some(0), "one attempt and no storage, for who asks for it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m19_a_background_push_at_priority_10_is_refused_with_a_pointer_and_nothing_is_sent() {
    let (world, _clock) = start(database(Store::Sqlite).await).await;
    let background =
        json!({ "push_type": "background", "payload": { "aps": { "content-available": 1 } }, "priority": 10 });
    let body: Value = serde_json::from_str(&alert(&background)).unwrap();
    let answer = world.server.post("/v1/notifications", &body).await;
    assert_eq!((answer.status.as_u16(), answer.pointers()), (422, vec!["/priority"]), "{}", answer.text);
    assert_eq!(world.sim.ledger().counters().requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m19_every_request_names_its_push_type_its_topic_and_a_priority_that_fits() {
    let (world, clock) = start(database(Store::Sqlite).await).await;
    let live_activity =
        json!({ "aps": { "timestamp": START.as_seconds(), "event": "update", "content-state": { "step": "oven" } } });
    let changed = json!({ "aps": { "content-changed": true } });
    // Apple's table: the value of apns-push-type, what stands behind the bundle id, and the priority of those that
    // have only one.
    for (push_type, suffix, priority, payload) in [
        ("alert", "", 10, json!({ "aps": { "alert": "x" } })),
        ("background", "", 5, json!({ "aps": { "content-available": 1 } })),
        ("voip", ".voip", 10, json!({})),
        ("complication", ".complication", 10, json!({})),
        ("fileprovider", ".pushkit.fileprovider", 10, json!({ "container-identifier": "x" })),
        ("location", ".location-query", 10, json!({})),
        ("liveactivity", ".push-type.liveactivity", 10, live_activity),
        ("pushtotalk", ".voip-ptt", 10, json!({})),
        ("controls", ".push-type.controls", 10, changed.clone()),
        ("widgets", ".push-type.widgets", 10, changed),
    ] {
        let push = sent(&world, &clock, &alert(&json!({ "push_type": push_type, "payload": payload }))).await;
        assert_eq!(push.push_type, Some(push_type));
        assert_eq!((push.topic, push.priority), (format!("{TOPIC}{suffix}"), Some(priority)), "{push_type}");
    }
    let push = sent(&world, &clock, &alert(&json!({}))).await;
    assert_eq!(push.push_type, Some("alert"), "also when the caller says nothing");
}

on_both_stores! {
    async fn m25_an_empty_object_is_a_body_and_bodies_arrive_byte_for_byte(database) {
        let (world, clock) = start(database).await;
        for push_type in ["voip", "complication", "location", "pushtotalk"] {
            // Not by `json!`, which would write them its own way.
            for payload in ["{}", "{ }", "{\"b\":1.0,\n \"a\":\"\\u00e9\"}"] {
                let body = format!(
                    "{{\"topic\":\"{TOPIC}\",\"to\":{{\"tokens\":[\"{TOKEN}\"]}},\"push_type\":\"{push_type}\",\"payload\":{payload}}}"
                );
                assert_eq!(sent(&world, &clock, &body).await.body, payload, "{push_type}");
            }
        }
        let before = world.sim.ledger().counters().requests;
        // To people there must be something to show; and nothing is not an empty object.
        for (push_type, payload) in [("alert", json!({})), ("voip", Value::Null), ("voip", json!("")), ("voip", json!([]))] {
            let body: Value = serde_json::from_str(&alert(&json!({ "push_type": push_type, "payload": payload }))).unwrap();
            let answer = world.server.post("/v1/notifications", &body).await;
            assert_eq!(answer.status, 422, "{push_type} {payload}: {}", answer.text);
            assert!(answer.pointers().iter().all(|pointer| pointer.starts_with("/payload")), "{}", answer.text);
        }
        assert_eq!(world.sim.ledger().counters().requests, before, "nothing was sent");
    }
}
