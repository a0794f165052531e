//! A device that APNs wants left alone (429 `TooManyRequests`) is left alone by all notifications, and nobody else is.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::json;
use sonnette::domain::clock::{Clock, ManualClock, Timestamp};

use crate::support::{
    apns_server::{MANY, Server},
    crowd::token,
    database::on_both_stores,
    world::{World, ticking_until_done, until},
};

/// When which device was sent what.
type Log = Arc<Mutex<HashMap<String, Vec<Timestamp>>>>;

/// Phone 1 is too busy for its first `refusals` pushes; all others are accepted.
async fn busy_phone(
    database: crate::support::database::TestDatabase,
    refusals: usize,
    headers: &'static [(&str, &str)],
) -> (World, Arc<ManualClock>, Log) {
    let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
    let server = Server::start(MANY).await;
    let world = World::before(&server, database, Arc::clone(&clock) as _).await;
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
        if device == token(1) && tries <= refusals {
            got.answer_with(429, headers, "{\"reason\":\"TooManyRequests\"}");
        } else {
            got.answer(200, "");
        }
    });
    for number in 1..=2 {
        world.device(&token(number), Some(&format!("user-{number}"))).await;
    }
    (world, clock, log)
}

fn sent(log: &Log, number: usize) -> Vec<Timestamp> {
    log.lock().unwrap().get(&token(number)).cloned().unwrap_or_default()
}

on_both_stores! {
    async fn other_notifications_wait_for_a_busy_device_and_other_devices_do_not(database) {
        let (world, clock, log) = busy_phone(database, 1, &[]).await;
        let began = clock.now();
        let first = world.send(json!({ "user_ids": ["user-1"] })).await;
        until("it is put off", || async { (world.deliveries(&first).await[0]["attempts"] == 1).then_some(()) }).await;
        let second = world.send(json!({ "user_ids": ["user-1"] })).await;
        let both = world.send(json!({ "user_ids": ["user-1", "user-2"] })).await;
        until("the other device has its push", || async {
            (world.notification(&both).await["counts"]["accepted"] == 1).then_some(())
        })
        .await;
        assert_eq!(clock.now(), began, "at once");
        assert_eq!((sent(&log, 1).len(), sent(&log, 2).len()), (1, 1));
        let waiting = world.deliveries(&second).await.remove(0);
        assert_eq!((&waiting["status"], &waiting["attempts"]), (&json!("pending"), &json!(0)), "{waiting}");
        for id in [&first, &second, &both] {
            let seen = ticking_until_done(&world, &clock, id).await;
            assert_eq!(seen["counts"]["accepted"], seen["counts"]["targeted"], "{seen}");
        }
        let times = sent(&log, 1);
        assert_eq!(times.len(), 4, "one refusal, three pushes");
        assert!(times[1].since(times[0]) >= Duration::from_secs(1), "2 s, give or take a half: {times:?}");
    }

    async fn a_device_that_stays_busy_is_tried_more_and_more_rarely_whatever_is_sent(database) {
        let (world, clock, log) = busy_phone(database, 4, &[]).await;
        let mut ids = vec![world.send(json!({ "user_ids": ["user-1"] })).await];
        until("it is put off", || async { (world.deliveries(&ids[0]).await[0]["attempts"] == 1).then_some(()) }).await;
        for _ in 0..9 {
            ids.push(world.send(json!({ "user_ids": ["user-1"] })).await);
        }
        for id in &ids {
            assert_eq!(ticking_until_done(&world, &clock, id).await["counts"]["accepted"], 1);
        }
        let times = sent(&log, 1);
        assert_eq!(times.len(), 14, "each was accepted once, and four were refused: {times:?}");
        // 2, 4, 8 and 16 s, each give or take a half.
        for (pair, least) in times.windows(2).zip([1, 2, 4, 8]) {
            assert!(pair[1].since(pair[0]) >= Duration::from_secs(least), "{times:?}");
        }
    }

    async fn retry_after_holds_all_that_is_for_the_device(database) {
        let (world, clock, log) = busy_phone(database, 1, &[("retry-after", "40")]).await;
        let first = world.send(json!({ "user_ids": ["user-1"] })).await;
        until("it is put off", || async { (world.deliveries(&first).await[0]["attempts"] == 1).then_some(()) }).await;
        let second = world.send(json!({ "user_ids": ["user-1"] })).await;
        for id in [&first, &second] {
            assert_eq!(ticking_until_done(&world, &clock, id).await["counts"]["accepted"], 1);
        }
        let times = sent(&log, 1);
        assert!(times[1..].iter().all(|at| at.since(times[0]) >= Duration::from_secs(40)), "{times:?}");
    }
}
