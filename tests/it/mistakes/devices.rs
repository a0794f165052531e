//! Mistakes with devices: tokens that are destroyed, refused or misread although nothing is wrong with them.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::{
    domain::{
        api_key::Scope,
        clock::{ManualClock, Timestamp},
    },
    sim::{Action, Device, Environment, PushQuery, Script},
};

use crate::support::{
    database::on_both_stores,
    gateway::START,
    world::{KEY_ID, TEAM, TOPIC, World, ticking, ticking_until_done},
};

const PHONE: &str = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90";

fn token(number: usize) -> String {
    format!("{number:064x}")
}

fn refusal(status: u16, reason: &str, timestamp: Option<Timestamp>) -> Action {
    Action::Answer { status, reason: Some(reason.to_owned()), timestamp_ms: timestamp.map(Timestamp::as_millis) }
}

async fn device(world: &World, id: &str) -> Value {
    world.server.get(&format!("/v1/devices/{id}")).await.ok()
}

/// Sends to one device, waits for its outcome, and returns its delivery.
async fn push_to(world: &World, id: &str) -> Value {
    let notification = world.send(json!({ "device_ids": [id] })).await;
    world.done(&notification).await;
    world.deliveries(&notification).await.remove(0)
}

fn accepted_in(world: &World, environment: Environment) -> usize {
    world.sim.ledger().pushes(&PushQuery { environment: Some(environment), ..PushQuery::default() }).len()
}

on_both_stores! {
    async fn m11_a_sandbox_token_sent_to_production_is_tried_in_the_sandbox_and_its_device_learns_from_it(database) {
        let world = World::start(database).await;
        // As an app run from Xcode has it: nobody told the back-office.
        let xcode = Device { environment: Environment::Sandbox, token: PHONE.into(), topic: None, inactive_since_ms: None };
        assert!(world.sim.devices().register(xcode));
        let id = world.device(PHONE, Some("tester")).await;
        for _ in 0..3 {
            assert_eq!(push_to(&world, &id).await["status"], "accepted");
        }
        assert_eq!((accepted_in(&world, Environment::Sandbox), accepted_in(&world, Environment::Production)), (3, 0));
        let seen = device(&world, &id).await;
        assert_eq!((&seen["status"], &seen["environment"]), (&json!("active"), &json!("sandbox")));
        world.device(PHONE, Some("tester")).await;
        assert_eq!(push_to(&world, &id).await["status"], "accepted");
        let production = world.sim.ledger().counters_of(Environment::Production);
        assert_eq!(production.refused.values().sum::<u64>(), 1, "asked once, and never again: {production:?}");
    }

    async fn m12_a_410_ends_only_a_registration_that_is_older_than_it(database) {
        let clock = Arc::new(ManualClock::new(START));
        let world = World::with(database, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
        let minute = Duration::from_secs(60);
        // Registered at START. A clock may differ by a minute from APNs'; the last three registered later.
        let cases = [
            ("long before the 410", START.plus(10 * minute), None, "inactive"),
            ("a minute before the 410", START.plus(minute), None, "inactive"),
            ("less than a minute before it", START.plus(minute).minus(Duration::from_millis(1)), None, "active"),
            ("after it", START.minus(minute), None, "active"),
            ("again after it", START.plus(10 * minute), Some(12), "active"),
            ("again, long before it", START.plus(14 * minute), Some(12), "inactive"),
        ];
        let mut ids = Vec::new();
        for (number, (_, since, _, _)) in cases.iter().enumerate() {
            ids.push(world.device(&token(number), Some(&format!("user-{number}"))).await);
            world.sim.scripts().add(Script::new(token(number), refusal(410, "Unregistered", Some(*since))));
        }
        let mut passed = 0;
        for (number, (_, _, again, _)) in cases.iter().enumerate() {
            if let Some(minutes) = again {
                clock.advance((minutes - passed) * minute);
                passed = *minutes;
                assert_eq!(world.device(&token(number), Some(&format!("user-{number}"))).await, ids[number]);
            }
        }
        clock.advance(8 * minute);
        let notification = world.send(json!({ "device_ids": ids })).await;
        let seen = ticking_until_done(&world, &clock, &notification).await;
        assert_eq!(seen["counts"]["unregistered"], cases.len(), "{seen}");
        assert!(world.deliveries(&notification).await.iter().all(|delivery| delivery["attempts"] == 1), "410 is final");
        for ((what, .., status), id) in cases.iter().zip(&ids) {
            assert_eq!(device(&world, id).await["status"], *status, "registered {what}");
        }

        // Without APNs' time, that of sending counts.
        let fresh = world.device(&token(100), Some("fresh")).await;
        for id in [&fresh, &ids[2]] {
            let token = device(&world, id).await["token"].as_str().unwrap().to_owned();
            world.sim.scripts().clear(Some(&token));
            world.sim.scripts().add(Script::new(token, refusal(410, "ExpiredToken", None)));
            assert_eq!(push_to(&world, id).await["status"], "unregistered");
        }
        assert_eq!(device(&world, &fresh).await["status"], "active", "registered a moment ago");
        assert_eq!(device(&world, &ids[2]).await["status"], "inactive", "registered long ago");

        // A phone that comes back is sent to again.
        world.sim.scripts().clear(None);
        world.device(&token(0), Some("user-0")).await;
        assert_eq!(push_to(&world, &ids[0]).await["status"], "accepted");
    }

    async fn m13_a_wrong_topic_fails_the_push_and_keeps_the_device(database) {
        let world = World::start(database).await;
        let id = world.device(PHONE, Some("rider")).await;
        let others: Vec<String> = futures_util::future::join_all((1..20).map(|number| {
            let world = &world;
            async move { world.device(&token(number), Some("others")).await }
        }))
        .await;
        let everybody: Vec<&String> = others.iter().chain([&id]).collect();
        let first = world.send(json!({ "device_ids": everybody })).await;
        assert_eq!(world.done(&first).await["counts"]["accepted"], 20);

        // The phone's token is of another app now, as after a release under another bundle id.
        let elsewhere = Device {
            environment: Environment::Production,
            token: PHONE.into(),
            topic: Some("fr.ocpizza.shop".into()),
            inactive_since_ms: None,
        };
        assert!(world.sim.devices().register(elsewhere));
        let second = world.send(json!({ "device_ids": everybody })).await;
        let seen = world.done(&second).await;
        assert_eq!((&seen["counts"]["accepted"], &seen["counts"]["failed"]), (&json!(19), &json!(1)), "{seen}");
        let deliveries = world.deliveries(&second).await;
        let failed = deliveries.iter().find(|delivery| delivery["device_id"] == id.as_str()).unwrap();
        assert_eq!((&failed["apns_status"], &failed["reason"]), (&json!(400), &json!("DeviceTokenNotForTopic")));
        assert_eq!(device(&world, &id).await["status"], "active");

        // What is wrong is set right: nobody has to register again.
        assert!(world.sim.devices().remove(Environment::Production, PHONE));
        assert_eq!(push_to(&world, &id).await["status"], "accepted");
    }

    async fn m13_a_topic_that_the_key_may_not_push_to_holds_the_push_and_keeps_the_device(database) {
        let clock = Arc::new(ManualClock::new(START));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let id = world.device(PHONE, Some("rider")).await;
        world.sim.scripts().add(Script::new(PHONE, refusal(400, "TopicDisallowed", None)));
        let notification = world.send(json!({ "device_ids": [id] })).await;
        let check = ticking(&world, &clock, "health says so", || world.check("apns:breaker", "production")).await;
        assert!(check["output"].as_str().unwrap().contains("TopicDisallowed"), "{check}");
        assert_eq!(device(&world, &id).await["status"], "active");
        assert_eq!(world.notification(&notification).await["counts"]["pending"], 1);

        world.sim.scripts().clear(None);
        let done = ticking_until_done(&world, &clock, &notification).await;
        assert_eq!(done["counts"]["accepted"], 1, "it leaves once the topic is allowed");
        assert_eq!(accepted_in(&world, Environment::Production), 1);
    }

    async fn m15_tokens_of_any_length_are_kept_and_sent_to(database) {
        let world = World::start(database).await;
        // 32: an iPhone's. 54 and 80: seen. 100: announced. 1 and 256: what is taken at all.
        let lengths = [1, 31, 32, 54, 80, 100, 256];
        let mut ids = Vec::new();
        for length in lengths {
            let token = "C3".repeat(length);
            let id = world.device(&token, Some("rider")).await;
            assert_eq!(device(&world, &id).await["token"], token.to_lowercase(), "{length} bytes");
            assert_eq!(world.device(&token.to_lowercase(), Some("rider")).await, id, "the same token in the other case");
            ids.push(id);
        }
        let tokens: Vec<String> = lengths.iter().map(|length| "d4".repeat(*length)).collect();
        for to in [json!({ "device_ids": ids }), json!({ "tokens": tokens })] {
            let id = world.send(to).await;
            assert_eq!(world.done(&id).await["counts"]["accepted"], lengths.len());
        }
        for byte in ["c3", "d4"] {
            for length in lengths {
                let query = PushQuery { token: Some(byte.repeat(length)), ..PushQuery::default() };
                assert_eq!(world.sim.ledger().pushes(&query).len(), 1, "{length} bytes of {byte}");
            }
        }
        for bad in ["", "c", "c3c", "<c3c3>", &"c3".repeat(257)] {
            let answer = world.server.post("/v1/devices", &json!({ "token": bad, "topic": TOPIC })).await;
            assert_eq!((answer.status.as_u16(), answer.pointers()), (422, vec!["/token"]), "{bad}: {}", answer.text);
        }
    }

    async fn m24_a_410_is_told_as_apns_said_it_and_counted_as_nothing_else(database) {
        // Metrics are the process's: a topic that no other test has.
        let topic = format!("fr.ocpizza.m24-{:?}", database.store());
        let more = format!(
            "[[app]]\ntopic = \"{topic}\"\nteam_id = \"{TEAM}\"\nkey_id = \"{KEY_ID}\"\nkey_file = \"key.p8\""
        );
        let clock = Arc::new(ManualClock::new(START));
        let world = World::with(database, Arc::clone(&clock) as _, &more).await;
        let mut ids = Vec::new();
        for (number, reason) in ["Unregistered", "ExpiredToken"].into_iter().enumerate() {
            let body = json!({ "topic": topic, "token": token(number), "user_id": "rider" });
            ids.push(world.server.post("/v1/devices", &body).await.ok()["id"].as_str().unwrap().to_owned());
            world.sim.scripts().add(Script::new(token(number), refusal(410, reason, Some(START.plus(Duration::from_secs(300))))));
        }
        clock.advance(Duration::from_secs(600));
        let body = json!({ "topic": topic, "to": { "user_ids": ["rider"] }, "payload": { "aps": { "alert": "x" } } });
        let id = world.server.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned();
        let seen = ticking_until_done(&world, &clock, &id).await;
        assert_eq!((&seen["counts"]["unregistered"], &seen["counts"]["failed"]), (&json!(2), &json!(0)), "{seen}");
        let mut said = vec![seen.to_string()];
        for (device_id, reason) in ids.iter().zip(["Unregistered", "ExpiredToken"]) {
            let deliveries = world.deliveries(&id).await;
            let delivery = deliveries.iter().find(|delivery| delivery["device_id"] == device_id.as_str()).unwrap();
            assert_eq!((&delivery["status"], &delivery["apns_status"], &delivery["reason"]), (&json!("unregistered"), &json!(410), &json!(reason)));
            let kept = device(&world, device_id).await;
            assert_eq!((&kept["status"], &kept["status_reason"]), (&json!("inactive"), &json!(reason)));
            assert_eq!(kept["user_id"], "rider", "it is kept, and knows whose it was");
            said.extend([delivery.to_string(), kept.to_string()]);
        }
        let metrics = world.caller(&[Scope::Metrics]).await.get("/metrics").await.text;
        for reason in ["Unregistered", "ExpiredToken"] {
            let line = format!(
                "sonnette_deliveries_total{{topic=\"{topic}\",environment=\"production\",outcome=\"unregistered\",reason=\"{reason}\"}} 1"
            );
            assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
        }
        said.extend([metrics, world.server.get("/health").await.text]);
        for text in said {
            assert!(!text.to_lowercase().contains("uninstall"), "APNs does not say that anything was uninstalled: {text}");
        }
    }
}
