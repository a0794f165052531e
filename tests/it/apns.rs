//! The APNs client against an HTTP/2 server that the test scripts frame by frame, over real TLS.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use sonnette::{
    apns::{
        Fence, Gateway, NoFence,
        client::{ApnsGateway, App, Endpoint, Settings},
        credential::{self, Credential},
    },
    domain::{
        clock::{Clock, ManualClock},
        notification::Lane,
        outcome::Outcome,
        topic::Environment,
    },
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::support::{
    apns_server::{MANY, ONE, Order, Script, Server, issued_at},
    gateway::{START, client, client_with, count, outcome, outcomes, push, push_until, topic},
    waiting::{until, within},
};

struct Switch {
    open: AtomicBool,
    asked: AtomicUsize,
}

impl Switch {
    fn new(open: bool) -> Arc<Self> {
        Arc::new(Self { open: AtomicBool::new(open), asked: AtomicUsize::new(0) })
    }
}

#[async_trait]
impl Fence for Switch {
    fn is_open(&self) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.open.load(Ordering::SeqCst)
    }

    async fn renew(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn a_push_arrives_as_the_sheet_says_and_is_accepted() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let one = push(42, Lane::Transactional);
    let sent = client.send(one.clone());
    let got = server.next().await;
    assert_eq!(got.path, "/3/device/0000002a");
    assert_eq!(got.body, b"{\"aps\":{\"alert\":\"Bonjour\"}}");
    assert_eq!(got.headers["apns-id"], one.apns_id.to_string());
    assert_eq!(got.headers["apns-topic"], "fr.ocpizza.livreur");
    assert!(got.token().starts_with("bearer eyJ"));
    got.answer(200, "");
    let reply = within("a reply", sent).await.unwrap();
    assert_eq!(reply.outcome, Outcome::Accepted);
    assert_eq!(reply.sent_at, Some(START));
    let report = client.production();
    assert_eq!((report.connections, report.in_flight, report.waiting), (1, 0, 0));
    assert_eq!(report.last_accepted_at, Some(START));
    assert_eq!(client.gateway.environments(&topic()), [Environment::Production, Environment::Sandbox]);
}

#[tokio::test]
async fn there_is_one_stream_until_the_limit_is_raised() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let sent = client.send_n(20);
    let first = server.next().await;
    until("the others wait", || client.production().waiting == 19).await;
    first.answer(200, "");
    server.next().await.answer(200, "");
    let third = server.next().await;
    assert_eq!(server.load.most.load(Ordering::SeqCst), 1, "never more than one at a time");
    server.allow(1, 1_000).await;
    let rest = server.next_many(17).await;
    third.answer(200, "");
    for got in rest {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn even_where_many_streams_are_allowed_the_first_request_goes_alone() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    let sent = client.send_n(20);
    let first = server.next().await;
    until("the others wait", || client.production().waiting == 19).await;
    assert_eq!(client.production().in_flight, 1);
    assert_eq!(server.connections(), 1, "nobody opens a second connection meanwhile");
    first.answer(200, "");
    for got in server.next_many(19).await {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
}

#[tokio::test]
async fn a_limit_that_falls_is_obeyed_at_once() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    let before = client.send_n(10);
    let in_flight = server.next_many(10).await;
    server.allow(1, 1).await;
    until("the client has seen it", || client.production().in_flight == 10).await;
    let after = client.send_n(5);
    until("five wait", || client.production().waiting == 5).await;
    for got in in_flight {
        assert!(server.has_nothing(), "nothing new while the limit is exceeded");
        got.answer(200, "");
    }
    server.load.most.store(0, Ordering::SeqCst);
    for _ in 0..5 {
        server.next().await.answer(200, "");
    }
    assert_eq!(server.load.most.load(Ordering::SeqCst), 1);
    assert_eq!(count(&outcomes(before).await, &Outcome::Accepted), 10);
    assert_eq!(count(&outcomes(after).await, &Outcome::Accepted), 5);
}

#[tokio::test]
async fn where_streams_are_scarce_more_connections_are_opened_up_to_the_bound() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 3);
    let sent = client.send_n(12);
    for _ in 0..12 {
        server.next().await.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 12);
    assert!((2..=3).contains(&server.connections()), "{}", server.connections());
}

#[tokio::test]
async fn streams_above_the_last_one_of_a_goaway_come_back_unsent_and_go_elsewhere() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send_n(6);
    let in_flight = server.next_many(6).await;
    // Streams 1 (the warm-up), 3, 5, 7, 9, 11, 13: those up to 7 are still answered.
    server.go_away(1, 7);
    until("three are left", || client.production().in_flight == 3).await;
    let again = client.send(push(77, Lane::Transactional));
    let elsewhere = server.next().await;
    assert_eq!(elsewhere.connection, 2, "nothing new goes where GOAWAY was said");
    elsewhere.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
    for got in in_flight {
        if got.stream <= 7 {
            got.answer(200, "");
        }
    }
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Accepted), 3, "{all:?}");
    assert_eq!(count(&all, &Outcome::Unsent), 3, "{all:?}");
    until("the old connection is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn what_a_goaway_promised_to_answer_and_did_not_is_unknown() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send_n(2);
    let _in_flight = server.next_many(2).await;
    server.go_away(1, 3);
    until("one is left", || client.production().in_flight == 1).await;
    server.order(1, Order::Cut);
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Unsent), 1, "{all:?}");
    assert_eq!(count(&all, &Outcome::Unknown), 1, "{all:?}");
}

#[tokio::test]
async fn a_refused_stream_is_unsent() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    server.next().await.refuse();
    assert_eq!(outcome(sent).await, Outcome::Unsent);
    assert_eq!(client.production().connections, 1, "the connection stays");
}

#[tokio::test]
async fn another_reset_leaves_it_unknown() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    server.next().await.respond.send_reset(h2::Reason::INTERNAL_ERROR);
    assert_eq!(outcome(sent).await, Outcome::Unknown);
}

#[tokio::test]
async fn a_connection_cut_after_the_request_was_read_leaves_it_unknown() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let sent = client.send(push(1, Lane::Transactional));
    let _got = server.next().await;
    server.order(1, Order::Cut);
    let reply = within("a reply", sent).await.unwrap();
    assert_eq!(reply.outcome, Outcome::Unknown);
    assert_eq!(reply.sent_at, Some(START));
}

#[tokio::test]
async fn a_silent_server_leaves_it_unknown_after_the_deadline_and_the_connection_is_replaced() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    let sent = client.send(push(1, Lane::Transactional));
    let _got = server.next().await;
    client.clock.advance(Duration::from_secs(19));
    tokio::task::yield_now().await;
    assert!(!sent.is_finished());
    client.clock.advance(Duration::from_secs(1));
    assert_eq!(outcome(sent).await, Outcome::Unknown);
    let again = client.send(push(2, Lane::Transactional));
    until("back-off", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(1));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "it acknowledges PINGs, but it answers nothing");
    got.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_that_does_not_acknowledge_a_ping_is_closed() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.shared.swallow_pings.store(true, Ordering::SeqCst);
    client.clock.advance(Duration::from_secs(61));
    let sent = client.send(push(1, Lane::Transactional));
    until("it waits for the PING", || client.production().waiting == 1).await;
    assert_eq!(server.load.heads.load(Ordering::SeqCst), 1, "an idle connection is checked before it is used");
    client.clock.advance(Duration::from_secs(10));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
    until("the dead one is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn an_idle_connection_that_acknowledges_is_used_again() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    client.clock.advance(Duration::from_secs(3600));
    let sent = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 1);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_refused_credential_costs_few_requests() {
    let server = Server::start(MANY).await;
    let client = client(&server);
    let shared = Arc::clone(&server.shared);
    let seen = server.answer_all(403, "{\"reason\":\"InvalidProviderToken\"}");
    let sent = client.send_n(50);
    until("the first answer", || seen.lock().unwrap().len() == 1).await;
    for _ in 0..31 {
        client.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = outcomes(sent).await;
    let requests = seen.lock().unwrap().len();
    let withheld = all.iter().filter(|o| matches!(o, Outcome::Withheld(_))).count();
    assert_eq!(withheld, requests);
    assert_eq!(count(&all, &Outcome::Unsent), 50 - requests, "the others were given back");
    assert!(requests <= 6, "{requests} requests in half a minute");
    // The last one may have opened when nobody waited any more.
    let connections = shared.orders.lock().unwrap().len();
    assert!(
        (requests..=requests + 1).contains(&connections),
        "{connections} connections for {requests} requests: each has one of its own"
    );
}

#[tokio::test]
async fn too_many_token_updates_replace_the_connection_and_not_the_token() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let token = got.token().to_owned();
    got.answer(429, "{\"reason\":\"TooManyProviderTokenUpdates\"}");
    assert!(matches!(outcome(sent).await, Outcome::Deferred { .. }));
    let again = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!((got.connection, got.token()), (2, token.as_str()));
    got.answer(200, "");
    assert_eq!(outcome(again).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_fence_that_closes_while_a_push_waits_for_a_stream_stops_it_before_the_first_byte() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let first = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let fence = Switch::new(true);
    let fenced = client.send_fenced(push(2, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("it waits", || client.production().waiting == 1).await;
    assert_eq!(fence.asked.load(Ordering::SeqCst), 0, "the fence is asked with a stream in hand");
    fence.open.store(false, Ordering::SeqCst);
    got.answer(200, "");
    assert_eq!(outcome(first).await, Outcome::Accepted);
    assert_eq!(outcome(fenced).await, Outcome::Fenced);
    let next = client.send(push(3, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted, "its stream was given back");
    assert_eq!(
        server.load.heads.load(Ordering::SeqCst),
        2,
        "of the fenced one the server saw nothing, not even its head"
    );
}

#[tokio::test]
async fn a_fence_that_closes_while_the_body_waits_for_room_takes_the_push_back() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::new(true);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.open.store(false, Ordering::SeqCst);
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    until("it is taken back", || server.load.taken_back.load(Ordering::SeqCst) == 1).await;
    assert!(server.has_nothing(), "no request came to its end");
    let next = client.send(push(2, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_body_that_fits_only_in_pieces_arrives_whole() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 10).await;
    let sent = client.send(push(1, Lane::Transactional));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    server.window(1, 20).await;
    server.window(1, 100).await;
    let got = server.next().await;
    assert_eq!(got.body, b"{\"aps\":{\"alert\":\"Bonjour\"}}");
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_lost_before_the_body_left_gives_the_push_back_unsent() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let sent = client.send(push(1, Lane::Transactional));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    server.order(1, Order::Cut);
    assert_eq!(outcome(sent).await, Outcome::Unsent);
}

#[tokio::test]
async fn nothing_is_written_once_its_deadline_has_passed() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let deadline = START.plus(Duration::from_secs(5));
    let with_stream = client.send(push_until(1, Lane::Transactional, deadline));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    let waiting = client.send(push_until(2, Lane::Transactional, deadline));
    until("the other waits", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(5));
    assert_eq!(outcome(waiting).await, Outcome::Unsent);
    server.window(1, 65_535).await;
    assert_eq!(outcome(with_stream).await, Outcome::Unsent);
    let late = client.send(push_until(3, Lane::Transactional, deadline));
    assert_eq!(outcome(late).await, Outcome::Unsent);
    assert!(server.has_nothing());
}

#[tokio::test]
async fn the_urgent_lane_goes_first() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let first = client.send(push(0, Lane::Bulk));
    let got = server.next().await;
    let mut sent = vec![first];
    for number in 1..=5 {
        sent.push(client.send(push(number, Lane::Bulk)));
        until("it waits", || client.production().waiting == number).await;
    }
    sent.push(client.send(push(100, Lane::Transactional)));
    until("it waits", || client.production().waiting == 6).await;
    got.answer(200, "");
    let mut order = Vec::new();
    for _ in 0..6 {
        let got = server.next().await;
        order.push(got.path.clone());
        got.answer(200, "");
    }
    assert_eq!(order[0], "/3/device/00000064");
    assert_eq!(order[1..], (1..=5).map(|n| format!("/3/device/{n:08x}")).collect::<Vec<_>>());
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 7);
}

#[tokio::test]
async fn where_nobody_listens_pushes_come_back_unsent_after_few_attempts() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    let ca = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let client = client_with(port, ca.cert.pem().as_bytes(), |_| {});
    let sent = client.send_n(100);
    until("the first attempt failed", || client.production().connect_error.is_some()).await;
    for _ in 0..31 {
        client.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Unsent), 100);
    let attempts = attempts.load(Ordering::SeqCst);
    assert!((3..=6).contains(&attempts), "{attempts} attempts in half a minute");
    assert!(client.production().connect_error.unwrap().contains("TLS handshake"));
}

#[tokio::test]
async fn a_server_without_http_2_is_named_as_the_fault() {
    let server = Server::start(Script { alpn: false, ..ONE }).await;
    let client = client(&server);
    let _sent = client.send(push(1, Lane::Transactional));
    until("the attempt failed", || client.production().connect_error.is_some()).await;
    let error = client.production().connect_error.unwrap();
    assert!(error.contains("does not speak HTTP/2"), "{error}");
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_is_refused() {
    let server = Server::start(ONE).await;
    let client = client_with(server.port, &[], |s| s.extra_roots_pem = None);
    let _sent = client.send(push(1, Lane::Transactional));
    until("the attempt failed", || client.production().connect_error.is_some()).await;
    let error = client.production().connect_error.unwrap();
    assert!(error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn stop_gives_back_who_waits_and_lets_who_is_under_way_finish() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let under_way = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    let waiting = client.send(push(2, Lane::Transactional));
    until("it waits", || client.production().waiting == 1).await;
    client.gateway.stop();
    assert_eq!(outcome(waiting).await, Outcome::Unsent);
    assert_eq!(outcome(client.send(push(3, Lane::Transactional))).await, Outcome::Unsent);
    let gateway = Arc::clone(&client.gateway);
    let closing = tokio::spawn(async move { gateway.close(Duration::from_secs(30)).await });
    got.answer(200, "");
    assert_eq!(outcome(under_way).await, Outcome::Accepted);
    within("the end", closing).await.unwrap();
    assert_eq!(client.production().connections, 0);
}

#[tokio::test]
async fn two_credentials_never_meet_on_one_connection() {
    let server = Server::start(MANY).await;
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(START));
    let url = format!("https://localhost:{}", server.port);
    let settings = Settings {
        production: Endpoint { url: url.clone() },
        sandbox: Endpoint { url },
        extra_roots_pem: Some(server.ca_pem.clone()),
        ..Settings::default()
    };
    let app = |topic: &str, team: &str| App {
        topic: topic.parse().unwrap(),
        environments: vec![Environment::Production],
        credential: Arc::new(
            Credential::new(team.parse().unwrap(), "ABC123DEFG".parse().unwrap(), &credential::generate().unwrap())
                .unwrap(),
        ),
    };
    let mut apps = vec![app("fr.a", "TEAMAAAAAA"), app("fr.b", "TEAMBBBBBB")];
    apps.push(App { topic: "fr.c".parse().unwrap(), ..apps[0].clone() });
    let gateway = ApnsGateway::new(&settings, &apps, &clock, &TaskTracker::new(), &CancellationToken::new()).unwrap();
    let seen = server.answer_all(200, "");
    for topic in ["fr.a", "fr.b", "fr.c", "fr.a", "fr.b"] {
        let mut one = push(1, Lane::Transactional);
        let mut head = (*one.head).clone();
        head.topic = topic.parse().unwrap();
        one.head = Arc::new(head);
        assert_eq!(gateway.send(&one, &NoFence).await.outcome, Outcome::Accepted);
    }
    let mut tokens: HashMap<usize, Vec<String>> = HashMap::new();
    for (connection, token) in seen.lock().unwrap().iter() {
        let of = tokens.entry(*connection).or_default();
        if !of.contains(token) {
            of.push(token.clone());
        }
    }
    assert_eq!(tokens.len(), 2, "two topics of one credential share a connection");
    assert!(tokens.values().all(|t| t.len() == 1));
}

#[tokio::test]
async fn over_six_hours_no_connection_changes_its_token_within_21_minutes_or_sends_an_old_one() {
    let server = Server::start(MANY).await;
    let shared = Arc::clone(&server.shared);
    let client = client(&server);
    let seen = server.answer_all(200, "");
    // connection -> (token, first used at)
    let mut used: HashMap<usize, (String, i64)> = HashMap::new();
    let mut changes = 0;
    let step = 50;
    for round in 0..(6 * 3600 / step) {
        let now = client.clock.now().as_seconds();
        assert_eq!(outcome(client.send(push(round, Lane::Transactional))).await, Outcome::Accepted);
        let (connection, token) = seen.lock().unwrap().last().unwrap().clone();
        let age = now - issued_at(&token);
        assert!((120..56 * 60).contains(&age), "a token of {age} s was sent");
        match used.get(&connection) {
            Some((known, _)) if *known == token => {}
            Some((_, since)) => {
                assert!(now - since >= 21 * 60, "changed after {} s", now - since);
                changes += 1;
                used.insert(connection, (token, now));
            }
            None => {
                used.insert(connection, (token, now));
            }
        }
        if round % 37 == 36 {
            // A new connection at odd moments of the slot.
            let last = shared.orders.lock().unwrap().len();
            let _ = shared.orders.lock().unwrap()[last - 1].send(Order::Cut);
            until("it is gone", || client.production().connections == 0).await;
        }
        client.clock.advance(Duration::from_secs(u64::try_from(step).unwrap()));
    }
    assert!(used.len() > 8, "{} connections", used.len());
    assert!(changes > 3, "{changes} changes");
}

#[tokio::test]
async fn a_dead_connection_holds_up_an_urgent_push_for_two_seconds_and_not_for_ten() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    server.shared.swallow_pings.store(true, Ordering::SeqCst);
    client.clock.advance(Duration::from_secs(61));
    let sent = client.send(push(1, Lane::Transactional));
    until("it waits for the PING", || client.production().waiting == 1).await;
    client.clock.advance(Duration::from_secs(3));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}
