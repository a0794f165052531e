//! Mistakes with connections: dead ones that are used on, requests that go down with them, too many and too few.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::{Value, json};
use sonnette::{
    apns::tls,
    domain::{
        clock::{Clock, ManualClock, SystemClock},
        notification::Lane,
        outcome::Outcome,
    },
    sim::{Action, Environment, GoAwayOrder, Push, PushQuery, Script},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use uuid::Uuid;

use crate::support::{
    apns_server::{MANY, ONE, Server},
    database::{Store, database, on_both_stores},
    gateway::{START, client, client_with, count, outcome, outcomes, push},
    waiting::until as until_now,
    world::{KEY_ID, TEAM, TOPIC, World, ticking_until_done, until},
};

fn tokens(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{number:064x}")).collect()
}

/// Sends one push to a raw token and waits until it is accepted.
async fn push_one(world: &World) {
    let id = world.send(json!({ "tokens": ["ab".repeat(32)] })).await;
    assert_eq!(world.done(&id).await["counts"]["accepted"], 1);
}

/// What the simulator accepted of one notification, by device token.
fn accepted_of(world: &World, order: &str) -> BTreeMap<String, Vec<Push>> {
    let mut by_token: BTreeMap<String, Vec<Push>> = BTreeMap::new();
    for push in world.sim.ledger().pushes(&PushQuery { limit: Some(100_000), ..PushQuery::default() }) {
        let body: Value = serde_json::from_str(&push.body).unwrap();
        if body["order"] == order {
            by_token.entry(push.token.clone()).or_default().push(push);
        }
    }
    by_token
}

async fn send_order(world: &World, order: &str, tokens: &[String]) -> String {
    let payload = json!({ "aps": { "alert": "x" }, "order": order });
    world.send_with(json!({ "tokens": tokens }), json!({ "payload": payload })).await
}

/// Sends an order whose answers the simulator holds back, and waits until all of it is in flight there.
async fn hold_order(world: &World, order: &str, tokens: &[String]) -> String {
    let unanswered = || world.sim.ledger().counters().unanswered;
    world.sim.gates().hold(Environment::Production);
    let before = unanswered();
    let id = send_order(world, order, tokens).await;
    until("all of them are in flight", || async { (unanswered() == before + tokens.len() as u64).then_some(()) }).await;
    id
}

#[tokio::test]
async fn m06_after_a_goaway_in_whatever_words_nothing_more_is_sent_there_and_nothing_hangs() {
    for words in [
        &["{\"reason\":\"Shutdown\"}"][..],
        &["Maximum active streams violated for this endpoint."],
        &[""],
        &["{\"reason\":\"Shutdown\"}", "{\"reason\":\"Shutdown\"}"],
    ] {
        let mut server = Server::start(MANY).await;
        let client = client(&server);
        client.warm_up(&mut server).await;
        let before = client.send(push(0, Lane::Transactional));
        let draining = server.next().await;
        for said in words {
            server.go_away_saying(1, draining.stream, said);
        }
        // It is read once what was sent behind it is acknowledged. The socket stays open.
        server.allow(1, 999).await;
        let after = client.send_n(20);
        for _ in 0..20 {
            let got = server.next().await;
            assert_ne!(got.connection, 1, "after GOAWAY {words:?}");
            got.answer(200, "");
        }
        assert_eq!(count(&outcomes(after).await, &Outcome::Accepted), 20, "{words:?}");
        draining.answer(200, "");
        assert_eq!(outcome(before).await, Outcome::Accepted, "what it promised to answer is waited for");
    }
}

on_both_stores! {
    async fn m07_what_is_in_flight_when_a_connection_goes_is_not_lost_and_never_gets_another_id(database) {
        const PHONES: usize = 200;
        let world = World::start(database).await;
        push_one(&world).await;
        let (gates, phones) = (world.sim.gates(), tokens(PHONES));

        // GOAWAY in the middle of them: half are answered, half were not processed.
        let opened = || world.sim.ledger().counters().connections_opened;
        let before = opened();
        let id = hold_order(&world, "goaway", &phones).await;
        let order = GoAwayOrder { last_stream: Some(201), ..GoAwayOrder::default() };
        assert_eq!(gates.go_away(Environment::Production, &order), 1);
        // Not only once the last of the chunk is answered.
        until("the others are in flight on another connection", || async {
            let in_flight: usize = world.app().routes().iter().map(|route| route.in_flight).sum();
            (in_flight == PHONES && opened() > before).then_some(())
        })
        .await;
        gates.release(Environment::Production);
        assert_eq!(world.done(&id).await["counts"]["accepted"], PHONES);
        assert!(world.deliveries(&id).await.iter().all(|delivery| delivery["attempts"] == 1), "nothing was in doubt");
        let accepted = accepted_of(&world, "goaway");
        assert_eq!((accepted.len(), accepted.values().flatten().count()), (PHONES, PHONES), "each once");

        // The connection is cut before anything was accepted. Nobody can know, so all are sent again.
        let id = hold_order(&world, "cut", &phones).await;
        let opened = opened();
        assert!(gates.close(Environment::Production, None) > 0);
        until("all are closed", || async {
            (world.sim.ledger().counters().connections_closed >= opened).then_some(())
        })
        .await;
        gates.release(Environment::Production);
        assert_eq!(world.done(&id).await["counts"]["accepted"], PHONES);
        let accepted = accepted_of(&world, "cut");
        assert_eq!((accepted.len(), accepted.values().flatten().count()), (PHONES, PHONES), "each once");

        // Each is accepted, and its answer never comes.
        let lost = Action::Reset { code: 2, accepted: true };
        world.sim.scripts().add(Script::new("*", lost).times(u32::try_from(PHONES).unwrap()));
        let id = send_order(&world, "answer lost", &phones).await;
        assert_eq!(world.done(&id).await["counts"]["accepted"], PHONES);
        let accepted = accepted_of(&world, "answer lost");
        assert_eq!(accepted.len(), PHONES);
        for (token, pushes) in accepted {
            let ids: BTreeSet<Uuid> = pushes.iter().map(|push| push.apns_id).collect();
            let shown: BTreeSet<&Option<String>> = pushes.iter().map(|push| &push.collapse_id).collect();
            assert_eq!((pushes.len(), ids.len()), (2, 1), "{token} got the repeat under the same apns-id");
            assert_eq!((shown.len(), shown.contains(&None)), (1, false), "the repeat replaces the first on the phone");
        }
    }
}

/// A way to APNs that can die without a word: both sides keep their TCP connection and hear nothing any more.
struct Relay {
    listener: std::net::TcpListener,
    frozen: Arc<watch::Sender<u64>>,
}

impl Relay {
    fn bind() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { listener, frozen: Arc::new(watch::Sender::new(0)) }
    }

    /// Forwards to `apns` from now on. Returns its own address, as in the configuration.
    fn forward(&self, apns: SocketAddr) -> String {
        let listener = TcpListener::from_std(self.listener.try_clone().unwrap()).unwrap();
        let frozen = Arc::clone(&self.frozen);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(apns).await.unwrap();
                let (near, far) = (near.into_split(), far.into_split());
                for (mut from, mut to) in [(near.0, far.1), (far.0, near.1)] {
                    let mut frozen = frozen.subscribe();
                    tokio::spawn(async move {
                        let mut bytes = vec![0; 16 * 1024];
                        loop {
                            tokio::select! {
                                biased;
                                _ = frozen.changed() => std::future::pending::<()>().await,
                                read = from.read(&mut bytes) => match read {
                                    Ok(length) if length > 0 && to.write_all(&bytes[..length]).await.is_ok() => {}
                                    _ => return,
                                },
                            }
                        }
                    });
                }
            }
        });
        format!("https://{}", self.listener.local_addr().unwrap())
    }

    /// Every connection of this moment forwards nothing any more; new ones do.
    fn freeze(&self) {
        self.frozen.send_modify(|times| *times += 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m08_a_connection_that_dies_without_a_word_loses_nothing_and_holds_nothing_up() {
    const PHONES: usize = 50;
    let relay = Relay::bind();
    let world = World::configured(
        database(Store::Sqlite).await,
        Arc::new(SystemClock::new()),
        "environments = [\"production\"]",
        |config, sim| {
            config.apns.production = relay.forward(sim.production());
            config.apns.request_timeout_seconds = 2;
        },
    )
    .await;
    push_one(&world).await;
    let dead = world.sim.ledger().connections()[0].number;
    relay.freeze();
    let ids = [send_order(&world, "first", &tokens(PHONES)).await, send_order(&world, "second", &tokens(PHONES)).await];
    for id in ids {
        assert_eq!(world.done(&id).await["counts"]["accepted"], PHONES);
    }
    for order in ["first", "second"] {
        let accepted = accepted_of(&world, order);
        assert_eq!(accepted.len(), PHONES, "{order}");
        for (token, pushes) in accepted {
            assert!(pushes.iter().all(|push| push.connection != dead), "{token}");
            // A busy machine may be slower than two seconds, so that one is sent again: never as another.
            assert!(pushes.iter().all(|push| push.apns_id == pushes[0].apns_id), "{token}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m09_no_connection_is_used_for_days() {
    let clock = Arc::new(ManualClock::new(START));
    let world =
        World::with(database(Store::Sqlite).await, Arc::clone(&clock) as _, "environments = [\"production\"]").await;
    for _hour in 0..36 {
        let id = world.send(json!({ "tokens": ["ab".repeat(32)] })).await;
        assert_eq!(ticking_until_done(&world, &clock, &id).await["counts"]["accepted"], 1);
        clock.advance(Duration::from_secs(3600));
    }
    let connections = world.sim.ledger().connections();
    assert!(connections.len() >= 2, "{connections:?}");
    for connection in connections {
        let hours = connection.closed.unwrap_or(clock.now()).since(connection.opened).as_secs() / 3600;
        assert!(hours <= 15, "connection {} was used for {hours} hours", connection.number);
    }
    let counters = world.sim.ledger().counters();
    assert_eq!((counters.accepted, counters.requests), (36, 36), "and nothing was lost or repeated over it");
}

#[tokio::test]
async fn m10_no_stream_is_opened_before_apns_has_said_how_many_it_allows() {
    let mut server = Server::start(ONE).await;
    server.shared.withhold_greeting.store(true, Ordering::SeqCst);
    let client = client_with(server.port, &server.ca_pem, |settings| settings.max_connections = 1);
    let sent = client.send_n(20);
    until_now("the connection is open", || client.production().connections == 1).await;
    let report = client.production();
    assert_eq!((report.in_flight, report.waiting), (0, 20), "nobody knows yet what is allowed");
    server.greet(1);
    for _ in 0..20 {
        server.next().await.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
    assert_eq!(server.load.most.load(Ordering::SeqCst), 1, "and then no more than that");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m10_no_connection_has_more_streams_than_apns_allows_whatever_it_allows() {
    let world =
        World::with(database(Store::Sqlite).await, Arc::new(SystemClock::new()), "environments = [\"production\"]")
            .await;
    // Fresh connections: one stream each, until APNs has accepted a provider token.
    let id = send_order(&world, "fresh", &tokens(1_000)).await;
    assert_eq!(world.done(&id).await["counts"]["accepted"], 1_000);
    let counters = world.sim.ledger().counters();
    assert_eq!((counters.stream_limit_violations, counters.reset), (0, 0), "{counters:?}");

    // Under way the limit falls and rises, and APNs resets what was too much: it has not processed that.
    world.sim.scripts().add(Script::new("*", Action::Reset { code: 7, accepted: false }).times(300));
    let id = send_order(&world, "rise and fall", &tokens(2_000)).await;
    for (step, limit) in (1..).zip([3, 200, 1, 50, 2, 1_000]) {
        until("the next step is reached", || async {
            (world.sim.ledger().counters().accepted >= 1_000 + step * 250).then_some(())
        })
        .await;
        world.sim.gates().set_stream_limit(Environment::Production, limit);
    }
    assert_eq!(world.done(&id).await["counts"]["accepted"], 2_000);
    assert!(world.deliveries(&id).await.iter().all(|delivery| delivery["attempts"] == 1));
    let counters = world.sim.ledger().counters();
    assert_eq!((counters.stream_limit_violations, counters.accepted), (0, 3_000), "{counters:?}");
    assert_eq!(counters.connections_closed, 0, "APNs had no reason to close one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m21_a_push_has_no_connection_of_its_own() {
    let world =
        World::with(database(Store::Sqlite).await, Arc::new(SystemClock::new()), "environments = [\"production\"]")
            .await;
    for _ in 0..30 {
        push_one(&world).await;
    }
    assert_eq!(world.sim.ledger().counters().connections_opened, 1, "one after the other, they share one");
    let ids = futures_util::future::join_all((0..500).map(|number| {
        let world = &world;
        async move { world.send(json!({ "tokens": [format!("{number:064x}")] })).await }
    }))
    .await;
    let bulk = send_order(&world, "bulk", &tokens(500)).await;
    for id in ids.iter().chain([&bulk]) {
        world.done(id).await;
    }
    let counters = world.sim.ledger().counters();
    assert_eq!(counters.accepted, 1_030);
    assert!(counters.connections_opened <= 4, "{} connections for 1,000 pushes", counters.connections_opened);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m23_two_credentials_never_share_a_connection_and_two_topics_of_one_do() {
    let app = |topic: &str, key_id: &str| {
        format!("[[app]]\ntopic = \"{topic}\"\nteam_id = \"{TEAM}\"\nkey_id = \"{key_id}\"\nkey_file = \"key.p8\"\n")
    };
    let more = app("fr.ocpizza.shop", "OTHERKEY01") + &app("fr.ocpizza.kitchen", KEY_ID);
    let world = World::with(database(Store::Sqlite).await, Arc::new(SystemClock::new()), &more).await;
    let topics = [TOPIC, "fr.ocpizza.shop", "fr.ocpizza.kitchen"];
    for topic in topics.into_iter().cycle().take(12) {
        let body = json!({ "topic": topic, "to": { "tokens": ["ab"] }, "payload": { "aps": { "alert": "x" } } });
        let id = world.server.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned();
        assert_eq!(world.done(&id).await["counts"]["accepted"], 1, "{topic}");
    }
    let ledger = world.sim.ledger();
    let connections_of = |topic: &str| -> BTreeSet<u64> {
        let query = PushQuery { topic: Some(topic.into()), ..PushQuery::default() };
        ledger.pushes(&query).iter().map(|push| push.connection).collect()
    };
    let [one, other, same] = topics.map(connections_of);
    assert_eq!(one, same, "topics of one key share what there is");
    assert!(one.is_disjoint(&other), "{one:?} {other:?}");
    assert!(ledger.counters().refused.is_empty(), "{:?}", ledger.counters().refused);
}

/// Subjects as they stand in certificates: the common name is a string of its own in them.
fn holds(roots: &rustls::RootCertStore, common_name: &str) -> bool {
    roots.roots.iter().any(|root| root.subject.windows(common_name.len()).any(|part| part == common_name.as_bytes()))
}

#[test]
fn m26_the_roots_that_apns_certificates_chain_to_are_trusted_and_another_is_added_to_them() {
    let built_in = tls::roots(None).unwrap();
    // Production since 24 February 2025; and what its owner replaces it with.
    for common_name in ["USERTrust RSA Certification Authority", "Sectigo Public Server Authentication Root R46"] {
        assert!(holds(&built_in, common_name), "{common_name}");
    }
    let own = rcgen::generate_simple_self_signed(vec!["apns.example".to_owned()]).unwrap();
    let with_own = tls::roots(Some(own.cert.pem().as_bytes())).unwrap();
    let anchor = webpki_anchor(&own.cert.pem());
    assert!(!built_in.roots.contains(&anchor) && with_own.roots.contains(&anchor));
    for root in &built_in.roots {
        assert!(with_own.roots.contains(root), "an extra CA file takes nothing away");
    }
}

fn webpki_anchor(pem: &str) -> rustls::pki_types::TrustAnchor<'static> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
    roots.roots.remove(0)
}
