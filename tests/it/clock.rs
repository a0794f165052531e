//! A clock that differs from APNs' is seen, and said with what it means and what to do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use sonnette::domain::{
    api_key::Scope,
    clock::{Clock, ManualClock, Timestamp},
};

use crate::support::{
    apns_server::{MANY, Server},
    crowd::{pass, token},
    database::on_both_stores,
    world::World,
};

on_both_stores! {
    async fn a_clock_that_differs_from_apns_by_more_than_a_minute_is_warned_of(database) {
        // 11:06:40 on this day.
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let server = Server::start(MANY).await;
        let world = World::before(&server, database, Arc::clone(&clock) as _).await;
        let ahead = Arc::new(AtomicI64::new(0));
        let (theirs, ours) = (Arc::clone(&ahead), Arc::clone(&clock));
        server.answer_by(move |got| {
            let seconds = ours.now().as_seconds() + theirs.load(Ordering::SeqCst);
            let of_day = seconds.rem_euclid(86_400);
            let date = format!("Wed, 18 Nov 2026 {:02}:{:02}:{:02} GMT", of_day / 3600, of_day / 60 % 60, of_day % 60);
            got.answer_with(200, &[("date", &date)], "");
        });
        world.device(&token(1), Some("rider")).await;
        let check = || async {
            // A report is shown again for a second.
            clock.advance(Duration::from_secs(1));
            world.check("clock", "").await.unwrap()
        };
        let silent = check().await;
        assert_eq!((&silent["status"], silent.get("observed_value")), (&json!("pass"), None), "{silent}");
        for (seconds, status, says) in
            [(0, "pass", "agrees"), (3_600, "warn", "3600 s behind"), (-90, "warn", "90 s ahead"), (59, "pass", "59 s behind")]
        {
            ahead.store(seconds, Ordering::SeqCst);
            let id = world.send(json!({ "user_ids": ["rider"] })).await;
            assert_eq!(world.done(&id).await["counts"]["accepted"], 1);
            let check = check().await;
            assert_eq!((&check["status"], &check["observed_value"]), (&json!(status), &json!(format!("{seconds} s"))));
            assert!(check["output"].as_str().unwrap().contains(says), "{check}");
            assert_eq!(check["advice"].as_str().is_some_and(|advice| advice.contains("NTP")), status == "warn", "{check}");
            let metrics = world.caller(&[Scope::Metrics]).await.get("/metrics").await.text;
            // Metrics are the process's: another test may have set it in between.
            assert!(metrics.lines().any(|line| line.starts_with("sonnette_clock_skew_seconds ")), "{metrics}");
            assert_eq!(world.server.get("/health").await.status, 200, "requests are kept all the same");
            // Looked at once a minute.
            pass(&world, &clock, Duration::from_secs(61)).await;
        }
    }
}
