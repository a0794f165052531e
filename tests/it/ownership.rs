//! The right person (promise 4): the last look is right before the write.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sonnette::{
    domain::clock::{ManualClock, Timestamp},
    sim::{Environment, PushQuery},
};

use crate::support::{
    database::on_both_stores,
    world::{TOPIC, World, until},
};

const PHONE: &str = "aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11aa11";
const OTHER: &str = "bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22bb22";

/// A world in which a connection is open and none of its streams is to be had.
async fn held_up(database: crate::support::database::TestDatabase) -> (World, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
    let world = World::with(database, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
    world.device(PHONE, Some("livreur-42")).await;
    world.device(OTHER, Some("livreur-99")).await;
    let first = world.send(json!({ "user_ids": ["livreur-99"] })).await;
    assert_eq!(world.done(&first).await["counts"]["accepted"], 1);
    world.sim.gates().set_initial_stream_limit(Environment::Production, 0);
    world.sim.gates().set_stream_limit(Environment::Production, 0);
    (world, clock)
}

async fn until_two_wait(world: &World) {
    until("both pushes wait for a stream", || async {
        let waiting: usize = world.app().routes().iter().map(|route| route.waiting).sum();
        (waiting == 2).then_some(())
    })
    .await;
}

fn let_go(world: &World) {
    world.sim.gates().set_initial_stream_limit(Environment::Production, 1);
    world.sim.gates().set_stream_limit(Environment::Production, 1_000);
}

fn pushes_to(world: &World, token: &str) -> usize {
    world
        .sim
        .ledger()
        .pushes(&PushQuery { token: Some(token.into()), limit: Some(1_000), ..PushQuery::default() })
        .len()
}

on_both_stores! {
    async fn a_phone_that_passes_on_while_a_push_waits_for_a_stream_never_gets_it(database) {
        let (world, clock) = held_up(database).await;
        let withheld = world.send(json!({ "user_ids": ["livreur-42"] })).await;
        let kept = world.send(json!({ "user_ids": ["livreur-99"] })).await;
        until_two_wait(&world).await;
        world.device(PHONE, Some("livreur-7")).await;
        clock.advance(Duration::from_secs(2));
        let_go(&world);

        let seen = world.done(&withheld).await;
        assert_eq!(seen["counts"]["suppressed"], 1, "{seen}");
        let delivery = &world.deliveries(&withheld).await[0];
        assert_eq!((delivery["status"].as_str(), delivery["reason"].as_str()), (Some("suppressed"), Some("OwnerChanged")));
        assert_eq!(pushes_to(&world, PHONE), 0, "the ledger shows nothing for the former user");
        assert_eq!(world.done(&kept).await["counts"]["accepted"], 1, "whose phone did not change hands gets it");
        assert_eq!(pushes_to(&world, OTHER), 2);
    }

    async fn a_rider_who_logs_out_while_a_push_waits_for_a_stream_never_gets_it(database) {
        let (world, clock) = held_up(database).await;
        let withheld = world.send(json!({ "user_ids": ["livreur-42"] })).await;
        world.send(json!({ "user_ids": ["livreur-99"] })).await;
        until_two_wait(&world).await;
        let body = json!({ "topic": TOPIC, "token": PHONE, "user_id": null });
        world.server.post("/v1/devices", &body).await.ok();
        clock.advance(Duration::from_secs(2));
        let_go(&world);

        world.done(&withheld).await;
        let delivery = &world.deliveries(&withheld).await[0];
        assert_eq!((delivery["status"].as_str(), delivery["reason"].as_str()), (Some("suppressed"), Some("LoggedOut")));
        assert_eq!(pushes_to(&world, PHONE), 0);
    }

    async fn a_phone_that_comes_back_to_the_same_rider_is_another_generation(database) {
        let (world, clock) = held_up(database).await;
        let withheld = world.send(json!({ "user_ids": ["livreur-42"] })).await;
        world.send(json!({ "user_ids": ["livreur-99"] })).await;
        until_two_wait(&world).await;
        world.device(PHONE, Some("livreur-7")).await;
        world.device(PHONE, Some("livreur-42")).await;
        clock.advance(Duration::from_secs(2));
        let_go(&world);

        assert_eq!(world.done(&withheld).await["counts"]["suppressed"], 1);
        assert_eq!(pushes_to(&world, PHONE), 0);
    }
}
