//! Mistakes with provider tokens: too many, too old, and a clock that is wrong.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;
use sonnette::{
    domain::{
        clock::{Clock, ManualClock, Timestamp},
        notification::Lane,
        outcome::Outcome,
        secret::Secret,
    },
    sim::{self, Action, ConnectionSeen, Environment, Ledger, Script, Simulator},
};

use crate::support::{
    apns_server::{MANY, ONE, Server, issued_at},
    database::{Store, database, on_both_stores},
    gateway::{Client, START, client, client_of, count, outcome, outcomes, push},
    scratch::Folder,
    waiting::until,
    world::{KEY_ID, TEAM, TOPIC, World, keys_folder, ticking_until_done, until as until_in},
};

/// What Apple says: no second token on a connection within 20 minutes, none older than an hour.
const BETWEEN_CHANGES_MS: i64 = 20 * 60_000;
const OLDEST_MS: i64 = 60 * 60_000;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// The simulator, on the true time, and replicas that share its one key and each have their own clock.
struct Apple {
    sim: Simulator,
    time: Arc<ManualClock>,
    p8: Secret<String>,
    _folder: Folder,
}

impl Apple {
    async fn start() -> Self {
        let folder = Folder::new("apple");
        let keys = keys_folder(&folder, "");
        let time = Arc::new(ManualClock::new(START));
        let settings = sim::Settings {
            folder: folder.path().join("simulator"),
            keys: sim::read_folder(&keys).unwrap(),
            ..sim::Settings::default()
        };
        let sim = Simulator::start(settings, Arc::clone(&time) as _).await.unwrap();
        let p8 = Secret::new(std::fs::read_to_string(keys.join("key.p8")).unwrap());
        Self { sim, time, p8, _folder: folder }
    }

    /// A replica whose clock is ahead of the true time by so many seconds.
    fn replica(&self, ahead: i64) -> Client {
        let now = Timestamp::from_seconds(self.time.now().as_seconds() + ahead);
        client_of(&self.p8, now, self.sim.production().port(), self.sim.ca_pem().as_bytes(), |_| {})
    }

    fn pass(&self, replicas: &[&Client], duration: Duration) {
        self.time.advance(duration);
        for replica in replicas {
            replica.clock.advance(duration);
        }
    }

    fn connections(&self) -> Vec<ConnectionSeen> {
        self.sim.ledger().connections()
    }

    fn refused(&self) -> std::collections::BTreeMap<String, u64> {
        self.sim.ledger().counters().refused
    }
}

async fn pushed(replica: &Client) -> Outcome {
    outcome(replica.send(push(1, Lane::Transactional))).await
}

/// What no connection and no token of the ledger may show, in Apple's own numbers.
fn keeps_apples_rules(ledger: &Ledger) {
    for connection in ledger.connections() {
        for pair in connection.token_switches.windows(2) {
            let kept = pair[1].at.as_millis() - pair[0].at.as_millis();
            assert!(kept >= BETWEEN_CHANGES_MS, "connection {} changed after {kept} ms", connection.number);
        }
    }
    for token in ledger.provider_tokens() {
        let age = token.last_seen.as_millis() - token.issued_at * 1000;
        assert!((0..OLDEST_MS).contains(&age), "a token was sent at the age of {age} ms");
    }
    let refused = ledger.counters().refused;
    assert!(refused.is_empty(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m01_one_token_serves_all_requests_topics_and_environments() {
    let clock = Arc::new(ManualClock::new(START));
    let more = format!(
        "[[app]]\ntopic = \"fr.ocpizza.shop\"\nteam_id = \"{TEAM}\"\nkey_id = \"{KEY_ID}\"\nkey_file = \"key.p8\""
    );
    let world = World::with(database(Store::Sqlite).await, Arc::clone(&clock) as _, &more).await;
    for (number, topic) in [TOPIC, "fr.ocpizza.shop"].into_iter().cycle().take(20).enumerate() {
        for (push_type, payload) in [("alert", json!({ "aps": { "alert": "x" } })), ("voip", json!({}))] {
            for environment in ["production", "sandbox"] {
                let body = json!({
                    "topic": topic, "to": { "tokens": [format!("{number:064x}")] }, "payload": payload,
                    "push_type": push_type, "environment": environment,
                });
                let id = world.server.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned();
                assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
            }
        }
    }
    let ledger = world.sim.ledger();
    assert_eq!(ledger.counters().accepted, 80);
    assert_eq!(ledger.provider_tokens().len(), 1, "{:?}", ledger.provider_tokens());
    assert!(ledger.connections().iter().all(|connection| connection.token_switches.len() == 1));
    keeps_apples_rules(&ledger);
}

#[tokio::test]
async fn m02_replicas_with_one_key_send_the_same_bytes_and_no_connection_mixes_tokens() {
    let apple = Apple::start().await;
    // As far apart as machines without a good NTP are.
    let replicas = [apple.replica(0), apple.replica(40), apple.replica(-25)];
    let all: Vec<&Client> = replicas.iter().collect();
    for _minute in 0..90 {
        for replica in &replicas {
            assert_eq!(pushed(replica).await, Outcome::Accepted);
        }
        apple.pass(&all, MINUTE);
    }
    let tokens = apple.sim.ledger().provider_tokens();
    let issued: BTreeSet<i64> = tokens.iter().map(|token| token.issued_at).collect();
    assert_eq!(tokens.len(), issued.len(), "the replicas' tokens of one half hour are one token: {tokens:?}");
    assert_eq!(tokens.len(), 4, "90 minutes from the seventh minute of a half hour see four half hours");
    for token in &tokens {
        let connections: BTreeSet<u64> = token.connections.iter().copied().collect();
        assert_eq!(connections.len(), replicas.len(), "each replica used each token: {token:?}");
    }
    assert_eq!(apple.connections().len(), replicas.len());
    keeps_apples_rules(&apple.sim.ledger());
}

#[tokio::test]
async fn m03_a_connection_opened_just_before_the_token_changes_does_not_change_it_too_soon() {
    let apple = Apple::start().await;
    // A token is the newest from the second minute of its half hour: this is the last second of the one before.
    let half_hour = 1800 - START.as_seconds() % 1800;
    apple.pass(&[], Duration::from_secs(u64::try_from(half_hour).unwrap() + 119));
    let replica = apple.replica(0);
    for _half_minute in 0..180 {
        assert_eq!(pushed(&replica).await, Outcome::Accepted);
        apple.pass(&[&replica], MINUTE / 2);
    }
    let connections = apple.connections();
    assert_eq!(connections.len(), 1);
    assert!(connections[0].token_switches.len() >= 3, "it did change: {connections:?}");
    keeps_apples_rules(&apple.sim.ledger());
}

on_both_stores! {
    async fn m04_a_hundred_pushes_refused_for_an_expired_token_at_once_bring_no_new_token(database) {
        const PUSHES: u32 = 100;
        let world = World::start(database).await;
        let first = world.send(json!({ "tokens": ["ab".repeat(32)] })).await;
        assert_eq!(world.done(&first).await["counts"]["accepted"], 1);
        let gates = world.sim.gates();
        gates.hold(Environment::Production);
        let expired =
            Action::Answer { status: 403, reason: Some("ExpiredProviderToken".into()), timestamp_ms: None };
        world.sim.scripts().add(Script::new(sim::ANY_TOKEN, expired).times(PUSHES));
        let tokens: Vec<String> = (0..PUSHES).map(|number| format!("{number:064x}")).collect();
        let id = world.send(json!({ "tokens": tokens })).await;
        until_in("all of them are in flight", || async {
            (world.sim.ledger().counters().unanswered == u64::from(PUSHES)).then_some(())
        })
        .await;
        gates.release(Environment::Production);
        let seen = world.done(&id).await;
        assert_eq!(seen["counts"]["accepted"], PUSHES, "{seen}");
        let ledger = world.sim.ledger();
        assert_eq!(ledger.provider_tokens().len(), 1, "{:?}", ledger.provider_tokens());
        let refused = ledger.counters().refused;
        assert_eq!(refused.get("403 ExpiredProviderToken"), Some(&u64::from(PUSHES)));
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert_eq!(ledger.repeats().len(), 0);
    }
}

/// A server that says nothing to an old token, as was seen of APNs: whoever waits for `ExpiredProviderToken` hangs.
#[tokio::test]
async fn m05_a_token_is_renewed_by_the_clock_and_no_old_one_meets_a_server_that_is_silent_about_it() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    for idle in [25, 31, 59, 61, 5, 180, 33] {
        client.clock.advance(idle * MINUTE);
        let sent = client.send(push(1, Lane::Transactional));
        let got = server.next().await;
        let age = client.clock.now().as_seconds() - issued_at(got.token());
        assert!((0..3600).contains(&age), "after {idle} minutes a token of {age} s was sent");
        got.answer(200, "");
        assert_eq!(outcome(sent).await, Outcome::Accepted);
    }
}

#[tokio::test]
async fn m05_a_connection_that_answers_as_to_an_expired_token_is_replaced() {
    for (status, body) in
        [(403, "{\"reason\":\"ExpiredProviderToken\"}"), (500, "{\"reason\":\"InternalServerError\"}"), (500, "")]
    {
        let mut server = Server::start(MANY).await;
        let client = client(&server);
        client.warm_up(&mut server).await;
        let refused = client.send_n(3);
        let mut tokens = BTreeSet::new();
        for got in server.next_many(3).await {
            assert_eq!(got.connection, 1);
            tokens.insert(got.token().to_owned());
            got.answer(status, body);
        }
        assert_eq!(count(&outcomes(refused).await, &Outcome::Accepted), 0);
        until("the connection is gone", || client.production().connections == 0).await;
        let again = client.send(push(4, Lane::Transactional));
        let got = server.next().await;
        assert_eq!(got.connection, 2, "after {status} {body}");
        tokens.insert(got.token().to_owned());
        assert_eq!(tokens.len(), 1, "the clock, and no answer, brings another token");
        got.answer(200, "");
        assert_eq!(outcome(again).await, Outcome::Accepted);
    }
}

#[tokio::test]
async fn m05_an_internal_error_now_and_then_costs_no_connection_and_one_after_a_silence_does() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    for status in [500, 500, 200, 500, 500, 200, 500] {
        let sent = client.send(push(1, Lane::Transactional));
        let got = server.next().await;
        assert_eq!(got.connection, 1);
        got.answer(status, "");
        assert_eq!(outcome(sent).await == Outcome::Accepted, status == 200);
        client.clock.advance(Duration::from_secs(1));
    }
    client.clock.advance(Duration::from_secs(10));
    let sent = client.send(push(2, Lane::Transactional));
    server.next().await.answer(500, "");
    assert_ne!(outcome(sent).await, Outcome::Accepted);
    let sent = client.send(push(3, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "it may be stale");
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn m16_how_far_apns_clock_is_from_ours_is_seen_in_its_answers() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    assert_eq!(client.production().clock_skew_seconds, None);
    // START is 11:06:40 on this day.
    for (date, skew) in [("Wed, 18 Nov 2026 10:06:40 GMT", -3600), ("Wed, 18 Nov 2026 12:07:41 GMT", 3600)] {
        let sent = client.send(push(1, Lane::Transactional));
        server.next().await.answer_with(200, &[("date", date)], "");
        assert_eq!(outcome(sent).await, Outcome::Accepted);
        assert_eq!(client.production().clock_skew_seconds, Some(skew));
        client.clock.advance(Duration::from_secs(61));
    }
}

/// The machine slept, or its clock stood an hour off and was set right: no time has passed for the process.
#[tokio::test]
async fn m16_a_clock_that_jumps_by_an_hour_sends_no_token_of_yesterday_or_tomorrow() {
    for (what, ahead_at_first, true_hours) in
        [("the machine slept for an hour", 0, 1), ("the clock was an hour ahead", 3000, 0)]
    {
        let apple = Apple::start().await;
        let replica = apple.replica(ahead_at_first);
        assert_eq!(pushed(&replica).await, Outcome::Accepted, "{what}");
        apple.time.advance(true_hours * HOUR);
        let now = apple.time.now();
        replica.clock.set_wall(now);
        assert_eq!(pushed(&replica).await, Outcome::Accepted, "{what}");
        let connections = apple.connections();
        assert_eq!(connections.len(), 2, "{what}: neither keep the token nor change it there");
        let age = now.as_seconds() - connections[1].token_switches[0].issued_at;
        assert!((0..3600).contains(&age), "{what}: a token of {age} s was sent");
        for connection in &connections {
            assert_eq!((connection.requests, connection.token_switches.len()), (1, 1), "{what}");
        }
        assert!(apple.refused().is_empty(), "{what}: {:?}", apple.refused());
    }
}

#[tokio::test]
async fn m16_a_clock_an_hour_behind_costs_one_refusal_and_works_once_it_is_set_right() {
    let apple = Apple::start().await;
    let replica = apple.replica(-3600);
    assert!(matches!(pushed(&replica).await, Outcome::Withheld(_)));
    assert_eq!(apple.refused().get("403 ExpiredProviderToken"), Some(&1));
    replica.clock.set_wall(apple.time.now());
    let again = replica.send(push(1, Lane::Transactional));
    until("it waits for another connection", || replica.production().waiting == 1).await;
    apple.pass(&[&replica], Duration::from_secs(1));
    assert_eq!(outcome(again).await, Outcome::Accepted);
    assert_eq!(apple.refused().values().sum::<u64>(), 1, "{:?}", apple.refused());
    assert_eq!(apple.connections().len(), 2);
}
