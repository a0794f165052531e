//! Mistakes with what APNs says: words that nobody expected, answers given to the wrong push, impatience.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use sonnette::{
    domain::clock::{Clock, ManualClock, SystemClock, Timestamp},
    sim::{Action, Script},
};

use crate::support::{
    apns_server::{Got, MANY, Server},
    database::{Store, database, on_both_stores},
    gateway::START,
    world::{World, ticking, ticking_until_done},
};

fn token(number: usize) -> String {
    format!("{number:064x}")
}

on_both_stores! {
    async fn m14_words_that_nobody_has_heard_of_are_told_as_they_came(database) {
        let clock = Arc::new(ManualClock::new(START));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let long = "Long".repeat(30);
        let cases = [
            (400, "NeverHeardOf", "failed"),
            (400, "NEVERHEARDOF", "failed"),
            (400, "baddevicetoken", "failed"),
            (404, "Où est-ce ? \"ça\" \\", "failed"),
            (410, "Retired", "unregistered"),
            (413, long.as_str(), "failed"),
        ];
        for (number, (status, reason, _)) in cases.iter().enumerate() {
            let answer = Action::Answer { status: *status, reason: Some((*reason).to_owned()), timestamp_ms: None };
            world.sim.scripts().add(Script::new(token(number), answer));
        }
        let tokens: Vec<String> = (0..cases.len()).map(token).collect();
        let id = world.send(json!({ "tokens": tokens })).await;
        ticking_until_done(&world, &clock, &id).await;
        for delivery in world.deliveries(&id).await {
            let (status, reason, outcome) = cases[usize::try_from(delivery["index"].as_u64().unwrap()).unwrap()];
            assert_eq!(
                (&delivery["status"], &delivery["apns_status"], &delivery["reason"]),
                (&json!(outcome), &json!(status), &json!(reason))
            );
        }

        // One that blames the key holds the push, says so in APNs' own word, and goes on by itself.
        let answer = Action::Answer { status: 403, reason: Some("KeyOnHoliday".into()), timestamp_ms: None };
        world.sim.scripts().add(Script::new(token(100), answer));
        let id = world.send(json!({ "tokens": [token(100)] })).await;
        let check = ticking(&world, &clock, "health says so", || world.check("apns:breaker", "production")).await;
        assert!(check["output"].as_str().unwrap().contains("403 KeyOnHoliday"), "{check}");
        world.sim.scripts().clear(None);
        assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
    }
}

/// What became of each raw token, by its place.
async fn outcomes(world: &World, id: &str) -> BTreeMap<u64, Value> {
    world.done(id).await;
    world.deliveries(id).await.into_iter().map(|delivery| (delivery["index"].as_u64().unwrap(), delivery)).collect()
}

/// What the answers to two requests bear, made of the ids that the requests bore.
type Ids = fn(&str, &str) -> [Option<String>; 2];

fn answer(got: Got, status: u16, apns_id: Option<&str>, body: &str) {
    got.answer_with(status, apns_id.map(|id| ("apns-id", id)).as_slice(), body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m20_an_answer_belongs_to_its_stream_whatever_apns_id_it_bears() {
    let mut server = Server::start(MANY).await;
    let world = World::before(&server, database(Store::Sqlite).await, Arc::new(SystemClock::new())).await;
    let first = world.send(json!({ "tokens": [token(9)] })).await;
    server.next().await.answer(200, "");
    world.done(&first).await;

    let wordings: [(&str, Ids); 4] = [
        ("swapped", |one, two| [two, one].map(|id| Some(id.to_owned()))),
        ("in upper case", |one, two| [one, two].map(|id| Some(id.to_uppercase()))),
        ("missing", |_, _| [None, None]),
        ("the same", |one, _| [one, one].map(|id| Some(id.to_owned()))),
    ];
    for (what, wording) in wordings {
        let id = world.send(json!({ "tokens": [token(0), token(1)] })).await;
        let (one, two) = (server.next().await, server.next().await);
        let (one, two) = if one.path < two.path { (one, two) } else { (two, one) };
        let sent = [&one, &two].map(|got| got.headers["apns-id"].to_str().unwrap().to_owned());
        let [to_one, to_two] = wording(&sent[0], &sent[1]);
        // The later of the two is answered first.
        answer(two, 200, to_two.as_deref(), "");
        answer(one, 413, to_one.as_deref(), "{\"reason\":\"PayloadTooLarge\"}");
        let seen = outcomes(&world, &id).await;
        assert_eq!((&seen[&0]["status"], &seen[&0]["reason"]), (&json!("failed"), &json!("PayloadTooLarge")), "{what}");
        assert_eq!(seen[&1]["status"], "accepted", "{what}");
        for (index, id) in (0..).zip(&sent) {
            assert_eq!((&seen[&index]["apns_id"], &seen[&index]["attempts"]), (&json!(id), &json!(1)), "{what}");
        }
    }
    assert!(server.has_nothing(), "nothing was sent a second time");
}

/// When each device token was sent to, on the service's clock.
type Log = Arc<Mutex<BTreeMap<String, Vec<Timestamp>>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m22_what_apns_puts_off_is_tried_again_later_and_later_and_not_all_at_once() {
    const PHONES: usize = 20;
    let server = Server::start(MANY).await;
    let clock = Arc::new(ManualClock::new(START));
    let world = World::before(&server, database(Store::Sqlite).await, Arc::clone(&clock) as _).await;
    let log = Log::default();
    let (seen, time) = (Arc::clone(&log), Arc::clone(&clock));
    server.answer_by(move |got| {
        let device = got.device().to_owned();
        let tries = {
            let mut log = seen.lock().unwrap();
            let times = log.entry(device.clone()).or_default();
            times.push(time.now());
            times.len()
        };
        let busy = "{\"reason\":\"ServiceUnavailable\"}";
        match (usize::from_str_radix(&device[48..], 16).unwrap(), tries) {
            (0..PHONES, ..=3) => got.answer(503, busy),
            (100, ..=3) => got.answer(429, "{\"reason\":\"TooManyRequests\"}"),
            (101, 1) => got.answer_with(503, &[("retry-after", "40")], busy),
            (102, 1) => got.answer_with(429, &[("retry-after", "40")], "{\"reason\":\"TooManyRequests\"}"),
            _ => got.answer(200, ""),
        }
    });
    let tokens: Vec<String> = (0..PHONES).chain(100..103).map(token).collect();
    let id = world.send(json!({ "tokens": tokens })).await;
    let done = ticking_until_done(&world, &clock, &id).await;
    assert_eq!(done["counts"]["accepted"], tokens.len(), "{done}");

    let log = log.lock().unwrap();
    let pauses = |number: usize| -> Vec<u128> {
        log[&token(number)].windows(2).map(|pair| pair[1].since(pair[0]).as_millis()).collect()
    };
    // Apple names no times; the sheet's are 1 s, 5 s, 30 s for a server and 2 s, 4 s, 8 s for a device, each give or
    // take a half.
    let later_and_later = |number: usize, least: [u128; 3]| {
        let pauses = pauses(number);
        assert_eq!(pauses.len(), least.len(), "phone {number}: {pauses:?}");
        assert!(pauses.iter().zip(least).all(|(pause, least)| *pause >= least), "phone {number}: {pauses:?}");
    };
    for number in 0..PHONES {
        later_and_later(number, [500, 2_500, 15_000]);
    }
    later_and_later(100, [1_000, 2_000, 4_000]);
    // Of all three pauses: the first is a second or so, which a slow machine lets pass in one leap.
    let ways: BTreeSet<Vec<u128>> = (0..PHONES).map(pauses).collect();
    assert!(ways.len() > PHONES / 2, "they come back spread, not all after {ways:?} ms");
    for number in [101, 102] {
        assert!(pauses(number)[0] >= 40_000, "as long as APNs says: {:?}", pauses(number));
    }
    assert!(log.values().all(|times| times.len() <= 4), "and never more often than that");
}
