//! Broadcasts: to everyone and to tags, from the request to the simulator's ledger.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use sonnette::{
    app::{App, Options},
    domain::{
        api_key::Scope,
        clock::{ManualClock, SystemClock, Timestamp},
    },
    sim::{Environment, PushQuery},
};

use crate::{
    store::{execute, number, store},
    support::{
        client::Client,
        database::{ACCEPTED, Store, TestDatabase, database, on_both_stores},
        scratch::Folder,
        service::{Service, SimulatorProcess, run},
        world::{TOPIC, World, keys_folder, until},
    },
};

/// The id of one of [`with_devices`].
pub(crate) fn device_id(number: usize) -> String {
    uuid::Uuid::from_u128(number as u128).to_string()
}

pub(crate) fn device_token(number: usize) -> String {
    format!("{number:064x}")
}

/// Writes devices past the API: registering them is not what is tried here.
pub(crate) async fn with_devices(database: &TestDatabase, count: usize) {
    store(database).await.close().await;
    let numbers: Vec<usize> = (1..=count).collect();
    for page in numbers.chunks(1_000) {
        let rows: Vec<String> = page
            .iter()
            .map(|n| format!("(X'{n:032x}', '{TOPIC}', X'{n:064x}', 'alert', 1, 'production', 'active', 1, 1, 1)"))
            .collect();
        let insert = format!(
            "INSERT INTO devices (id, topic, token, push_type, generation, environment, status, created_at, \
             last_registered_at, last_accepted_at) VALUES {}",
            rows.join(",")
        );
        execute(database, &[&insert]).await;
    }
}

/// Gives those of [`with_devices`] that come after the first `none` a user each: `rider-` and its number.
pub(crate) async fn with_riders(database: &TestDatabase, none: usize) {
    let number = "CONV(RIGHT(HEX(token), 8), 16, 10)";
    let update = format!("UPDATE devices SET user_id = CONCAT('rider-', {number}) WHERE {number} > {none}");
    execute(database, &[&update]).await;
}

/// A caller that may broadcast, cancel and read.
pub(crate) async fn broadcaster(world: &World) -> Client {
    world.caller(&[Scope::Send, Scope::Broadcast, Scope::Read]).await
}

/// Sends an alert; returns the answer.
pub(crate) async fn broadcast(caller: &Client, to: Value) -> Value {
    let body = json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": { "title": "Promo" } } } });
    let answer = caller.post("/v1/notifications", &body).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    answer.body
}

/// The question how much a column adds up to.
fn sum(database: &TestDatabase, column: &str, table: &str) -> String {
    let kind = if database.store() == Store::Mysql { "SIGNED" } else { "INTEGER" };
    format!("SELECT CAST(COALESCE(SUM({column}), 0) AS {kind}) FROM {table}")
}

/// How many deliveries the database has as accepted.
pub(crate) async fn accepted(database: &TestDatabase) -> i64 {
    number(database, ACCEPTED).await
}

/// Every delivery of a notification.
async fn all_deliveries(caller: &Client, id: &str) -> Vec<Value> {
    caller.all(&format!("/v1/notifications/{id}/deliveries")).await
}

/// How often each token is in the ledger.
fn arrived(world: &World) -> BTreeMap<String, usize> {
    let mut arrived = BTreeMap::new();
    for push in world.sim.ledger().pushes(&PushQuery { limit: Some(100_000), ..PushQuery::default() }) {
        *arrived.entry(push.token).or_default() += 1;
    }
    arrived
}

fn once_each(count: usize) -> BTreeMap<String, usize> {
    (1..=count).map(|n| (device_token(n), 1)).collect()
}

const DEVICES: usize = 20_300;

on_both_stores! {
    async fn each_of_twenty_thousand_devices_gets_one_push_and_its_outcome_is_read_back(database) {
        with_devices(&database, DEVICES).await;
        let world = World::start(database).await;
        let caller = broadcaster(&world).await;
        let accepted = broadcast(&caller, json!({ "everyone": true })).await;
        assert_eq!((accepted["status"].as_str(), accepted["audience_complete"].as_bool()), (Some("queued"), Some(false)));
        assert_eq!(accepted["counts"]["targeted"], 0, "accepting waits for nobody: {accepted}");
        let id = accepted["id"].as_str().unwrap();
        let done = world.done(id).await;
        assert_eq!((done["counts"]["targeted"].as_u64(), done["counts"]["accepted"].as_u64()), (Some(20_300), Some(20_300)));
        assert_eq!(done["audience_complete"], true);
        assert_eq!(arrived(&world), once_each(DEVICES));
        let deliveries = all_deliveries(&caller, id).await;
        let devices: BTreeSet<&str> = deliveries.iter().map(|one| one["device_id"].as_str().unwrap()).collect();
        assert_eq!((deliveries.len(), devices.len()), (DEVICES, DEVICES), "each device once");
        assert!(deliveries.iter().all(|one| one["status"] == "accepted" && one["attempts"] == 1));
    }

    async fn tags_reach_whom_they_say_and_never_the_next_holder_of_a_phone(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
        let caller = broadcaster(&world).await;
        let register = async |n: usize, user: Value, tags: Value| {
            let body = json!({ "token": device_token(n), "topic": TOPIC, "user_id": user, "tags": tags });
            world.server.post("/v1/devices", &body).await.ok()["id"].as_str().unwrap().to_owned()
        };
        register(1, json!("a"), json!(["paris", "bio"])).await;
        register(2, json!("b"), json!(["paris"])).await;
        let third = register(3, json!("c"), json!(["paris", "bio"])).await;
        register(4, json!("d"), json!(["lyon", "bio"])).await;
        let to = json!({ "tags": { "all": ["bio"], "any": ["paris", "lille"], "none": ["lyon"] } });
        let first = broadcast(&caller, to.clone()).await;
        let done = world.done(first["id"].as_str().unwrap()).await;
        assert_eq!(done["counts"]["accepted"], 2, "{done}");
        assert_eq!(arrived(&world), BTreeMap::from([(device_token(1), 1), (device_token(3), 1)]));

        // One phone passes on and one is forgotten while both pushes wait for a stream.
        world.sim.gates().set_initial_stream_limit(Environment::Production, 0);
        world.sim.gates().set_stream_limit(Environment::Production, 0);
        let second = broadcast(&caller, to).await;
        until("both pushes wait for a stream", || async {
            let waiting: usize = world.app().routes().iter().map(|route| route.waiting).sum();
            (waiting == 2).then_some(())
        }).await;
        register(1, json!("z"), json!([])).await;
        assert_eq!(world.server.delete(&format!("/v1/devices/{third}")).await.status, 204);
        clock.advance(Duration::from_secs(2));
        world.sim.gates().set_initial_stream_limit(Environment::Production, 1);
        world.sim.gates().set_stream_limit(Environment::Production, 1_000);
        let id = second["id"].as_str().unwrap();
        assert_eq!(world.done(id).await["counts"]["suppressed"], 2);
        let reasons: Vec<Value> = world.deliveries(id).await.iter().map(|one| one["reason"].clone()).collect();
        assert_eq!(reasons, ["OwnerChanged", "DeviceForgotten"]);
        assert_eq!(world.sim.ledger().counters().accepted, 2, "the ledger shows nothing more");
    }

    async fn only_a_key_that_may_broadcast_does(database) {
        let world = World::start(database).await;
        let sender = world.caller(&[Scope::Send, Scope::Read]).await;
        let only = world.caller(&[Scope::Broadcast]).await;
        let ask = |to: Value| json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": "x" } } });
        for to in [json!({ "everyone": true }), json!({ "tags": { "any": ["a"] } })] {
            let refused = sender.post("/v1/notifications", &ask(to.clone())).await;
            assert_eq!((refused.status.as_u16(), refused.body["type"].as_str()), (403, Some("/problems/forbidden")));
            assert!(refused.text.contains("`broadcast`"), "{}", refused.text);
            assert_eq!(only.post("/v1/notifications", &ask(to)).await.status, 202);
        }
        assert_eq!(only.post("/v1/notifications", &ask(json!({ "user_ids": ["a"] }))).await.status, 403);
    }

    async fn an_urgent_notification_overtakes_a_broadcast(database) {
        with_devices(&database, 6_000).await;
        let world = World::start(database).await;
        let caller = broadcaster(&world).await;
        world.device(&"ab".repeat(32), Some("rider")).await;
        world.sim.gates().set_latency(Environment::Production, Duration::from_millis(200));
        world.sim.gates().set_stream_limit(Environment::Production, 100);
        let big = broadcast(&caller, json!({ "everyone": true })).await;
        let big = big["id"].as_str().unwrap();
        until("it is on its way", || async {
            (world.notification(big).await["counts"]["accepted"].as_u64() > Some(0)).then_some(())
        }).await;
        let urgent = world.send(json!({ "user_ids": ["rider"] })).await;
        world.done(&urgent).await;
        assert_eq!(world.notification(big).await["status"], "sending", "thousands were before it");
        world.sim.gates().set_latency(Environment::Production, Duration::ZERO);
        world.sim.gates().set_stream_limit(Environment::Production, 1_000);
        assert_eq!(world.done(big).await["counts"]["accepted"], 6_001);
    }

    async fn a_broadcast_survives_kills_and_every_device_has_an_outcome(database) {
        // More than one process has in memory at a time.
        const DEVICES: usize = 30_300;
        with_devices(&database, DEVICES).await;
        let folder = Folder::new("broadcast");
        let keys = keys_folder(&folder, "environments = [\"production\"]");
        let sim = SimulatorProcess::start(folder.path(), &keys, &["--latency-ms", "300"]).await;
        let mut service = Service::start(folder.path(), database.url(), &sim).await;
        let scopes = ["api-keys", "create", "--owner", "shop", "--scopes", "broadcast,read"];
        let (status, key, error) = run(folder.path(), &scopes);
        assert!(status.success(), "{error}");
        let client = Client::new(service.address, Some(key.trim()));
        let id = broadcast(&client, json!({ "everyone": true })).await["id"].as_str().unwrap().to_owned();
        let complete = sum(&database, "audience_complete", "notifications");
        let mut exposed = 0;
        let mut in_mid_resolution = 0;
        for kill in 1..=3_i64 {
            let unsettled = until("pushes are written and not settled", || async {
                if sim.total().await["requests"].as_i64().unwrap() < kill * 3_000 {
                    return None;
                }
                let before = service.freeze_and_count(async || accepted(&database).await).await;
                let unsettled = sim.total().await["requests"].as_i64().unwrap() - before;
                if unsettled > exposed {
                    return Some(unsettled - exposed);
                }
                service.signal("CONT");
                None
            }).await;
            in_mid_resolution += i64::from(number(&database, &complete).await == 0);
            service.process().kill();
            exposed += unsettled;
            service.restart().await;
        }
        assert!(in_mid_resolution > 0, "it was not resolved to its end at a kill");
        let done = until("the broadcast is done", || async {
            let seen = client.get(&format!("/v1/notifications/{id}")).await.ok();
            (seen["status"] == "done").then_some(seen)
        }).await;
        let counts = (done["counts"]["targeted"].as_u64(), done["counts"]["accepted"].as_u64());
        assert_eq!(counts, (Some(30_300), Some(30_300)), "{done}");
        let deliveries = all_deliveries(&client, &id).await;
        let devices: BTreeSet<&str> = deliveries.iter().map(|one| one["device_id"].as_str().unwrap()).collect();
        assert_eq!((deliveries.len(), devices.len()), (DEVICES, DEVICES), "each device has one outcome");
        let mut times: HashMap<&str, i64> =
            deliveries.iter().map(|one| (one["apns_id"].as_str().unwrap(), 0)).collect();
        let mut tokens = BTreeSet::new();
        let mut after = 0;
        loop {
            let page = sim.control.get(&format!("/ledger/pushes?after={after}&limit=1000")).await.ok();
            let pushes = page["items"].as_array().unwrap();
            if pushes.is_empty() {
                break;
            }
            for push in pushes {
                *times.get_mut(push["apns_id"].as_str().unwrap()).expect("an apns-id that was told") += 1;
                tokens.insert(push["token"].as_str().unwrap().to_owned());
            }
            after = page["last"].as_i64().unwrap();
        }
        assert_eq!(tokens.len(), DEVICES, "none is lost");
        let repeats: i64 = times.values().map(|times| times - 1).sum();
        eprintln!("3 kills, {exposed} pushes written and unsettled at them, {repeats} repeats");
        assert!(times.values().all(|times| *times >= 1) && repeats <= exposed, "{repeats} repeats of {exposed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_send_one_broadcast_together_and_each_device_gets_it_once() {
    let database = database(Store::Mysql).await;
    with_devices(&database, DEVICES).await;
    let world = World::start(database).await;
    let other = App::start(&world.config, Arc::new(SystemClock::new()), Options::default()).await.unwrap();
    let caller = broadcaster(&world).await;
    let id = broadcast(&caller, json!({ "everyone": true })).await["id"].as_str().unwrap().to_owned();
    let done = world.done(&id).await;
    assert_eq!(done["counts"]["accepted"], 20_300, "{done}");
    assert_eq!(arrived(&world), once_each(DEVICES));
    assert!(other.shutdown(Duration::from_secs(30)).await);
}
