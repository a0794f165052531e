//! One provider token per key, and no connection that changes it too soon or keeps it too long (promise 6).

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sonnette::{
    domain::clock::{Clock, ManualClock, Timestamp},
    sim::Environment,
};

use crate::support::{
    database::{Store, database},
    world::{World, until},
};

const MINUTE: i64 = 60_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_changes_its_token_within_21_minutes_and_none_is_older_than_56_over_six_hours() {
    let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_123)));
    let world =
        World::with(database(Store::Sqlite).await, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
    world.device(&"ab".repeat(32), Some("rider")).await;
    let end = clock.now().plus(Duration::from_secs(6 * 3600));
    let mut sent = 0_u64;
    // Connections open at many different moments of a token's life, and some live long.
    let mut lives = [1, 2, 3, 20, 5, 17, 9, 30].into_iter().cycle();
    let mut left = 4;
    while clock.now() < end {
        if left == 0 {
            world.sim.gates().close(Environment::Production, None);
            left = lives.next().unwrap();
        }
        left -= 1;
        clock.advance(Duration::from_secs(3 * 60 + 17));
        let id = world.send_with(json!({ "user_ids": ["rider"] }), json!({ "ttl_seconds": 3600 })).await;
        sent += 1;
        until("the push is accepted", || async {
            clock.advance(Duration::from_millis(200));
            tokio::time::sleep(Duration::from_millis(5)).await;
            (world.notification(&id).await["counts"]["accepted"] == 1).then_some(())
        })
        .await;
    }
    let ledger = world.sim.ledger();
    let connections = ledger.connections();
    assert!(connections.len() > 6 && sent > 80, "{} connections, {sent} pushes", connections.len());
    let mut switches = 0;
    for connection in &connections {
        let times: Vec<i64> = connection.token_switches.iter().map(|s| s.at.as_millis()).collect();
        for pair in times.windows(2) {
            assert!(
                pair[1] - pair[0] >= 21 * MINUTE,
                "connection {} changed after {} ms",
                connection.number,
                pair[1] - pair[0]
            );
            switches += 1;
        }
    }
    assert!(switches > 0, "some connection lived long enough to change its token");
    for token in ledger.provider_tokens() {
        let age = token.last_seen.as_millis() - token.issued_at * 1000;
        assert!(age <= 56 * MINUTE, "a token was sent {age} ms after its iat");
        assert_eq!(token.issued_at % 1800, 0, "iat is the start of a 30-minute slot");
    }
    let counters = ledger.counters();
    assert!(counters.refused.is_empty(), "the simulator refused nothing: {:?}", counters.refused);
}
