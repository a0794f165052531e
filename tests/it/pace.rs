//! An app that may have only so many pushes a second.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sonnette::domain::clock::{Clock, ManualClock, Timestamp};

use crate::support::{
    crowd::{Crowd, pass, requests},
    database::on_both_stores,
    world::{World, tick, ticking, ticking_until_done},
};

const MAX_PER_SECOND: u64 = 20;

/// How many pushes may have left after so long: with what may go at once, and a look of the test's own.
fn allowed(time: Duration) -> u64 {
    MAX_PER_SECOND * (time.as_secs() + 1) + MAX_PER_SECOND / 10
}

on_both_stores! {
    async fn an_app_with_a_limit_keeps_to_it_and_urgent_pushes_go_first(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let more = format!("max_pushes_per_second = {MAX_PER_SECOND}");
        let world = World::with(database, Arc::clone(&clock) as _, &more).await;
        let crowd = Crowd::registered(&world, 0..400).await;
        let began = clock.monotonic();
        let mut bulk = Vec::new();
        for ids in crowd.ids.chunks(20) {
            bulk.push(world.send_with(json!({ "device_ids": ids }), json!({ "lane": "bulk" })).await);
        }
        for _ in 0..4 {
            tick(&world, &clock).await;
            let (sent, passed) = (requests(&world), clock.monotonic().saturating_sub(began));
            assert!(sent <= allowed(passed), "{sent} after {passed:?}");
        }
        ticking(&world, &clock, "some have left", || async { (requests(&world) > 40).then_some(()) }).await;

        let urgent = world.send(json!({ "user_ids": ["user-399"] })).await;
        assert_eq!(ticking_until_done(&world, &clock, &urgent).await["counts"]["accepted"], 1);
        let sent = requests(&world);
        assert!(sent < 300, "it did not wait for the others: {sent} have left");

        for id in &bulk {
            let seen = ticking_until_done(&world, &clock, id).await;
            assert_eq!(seen["counts"]["accepted"], 20, "{seen}");
        }
        let took = clock.monotonic().saturating_sub(began);
        assert!(took >= Duration::from_secs(400 / MAX_PER_SECOND - 1), "all of it took {took:?}");
        pass(&world, &clock, Duration::from_secs(5)).await;
        assert_eq!(requests(&world), 401, "and nothing twice");
    }
}
