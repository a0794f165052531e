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
use bytes::Bytes;
use futures_util::StreamExt as _;
use sonnette::{
    apns::{
        Fence, Gateway, NoFence, Push,
        client::{ApnsGateway, App, Endpoint, Settings},
        credential::{self, Credential},
    },
    domain::{
        clock::{Clock, ManualClock, Timer, Timestamp},
        notification::Lane,
        outcome::{Outcome, Reply},
        topic::Environment,
    },
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::support::{
    apns_server::{MANY, ONE, Order, Script, Server, issued_at},
    gateway::{Client, START, client, client_with, count, gateway_on, outcome, outcomes, push, push_until, topic},
    waiting::{until, within},
};

/// Longer than any of these tests lets pass.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// A fence that answers for the instant only, or that says until when, on the monotonic clock.
struct Switch {
    open: AtomicBool,
    asked: AtomicUsize,
    until: Duration,
}

impl Switch {
    fn new(open: bool) -> Arc<Self> {
        Self::until(open, Duration::ZERO)
    }

    fn until(open: bool, until: Duration) -> Arc<Self> {
        Arc::new(Self { open: AtomicBool::new(open), asked: AtomicUsize::new(0), until })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }
}

#[async_trait]
impl Fence for Switch {
    fn is_open(&self) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.open.load(Ordering::SeqCst)
    }

    fn open_until(&self) -> Option<Duration> {
        self.is_open().then_some(self.until)
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
    // The first goes alone. Two at once take two connections then.
    server.next().await.answer(200, "");
    for got in server.next_many(2).await {
        got.answer(200, "");
    }
    for _ in 3..12 {
        server.next().await.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 12);
    assert!((2..=3).contains(&server.connections()), "{}", server.connections());
}

#[tokio::test]
async fn where_the_limit_has_fallen_more_connections_are_opened_up_to_the_bound() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.allow(1, 1_000).await;
    let sent = client.send_n(20);
    let mut held = server.next_many(20).await;
    server.allow(1, 1).await;
    let waiting: Vec<_> = (20..60).map(|number| client.send(push(number, Lane::Bulk))).collect();
    // The first answer proves a connection, the second request on it occupies its only stream.
    for connection in 2..=4 {
        let first = server.next().await;
        assert_eq!(first.connection, connection);
        first.answer(200, "");
        held.push(server.next().await);
    }
    assert_eq!(server.connections(), 4, "the default");
    assert_eq!(client.production().waiting, 34);
    for got in held {
        got.answer(200, "");
    }
    for _ in 0..34 {
        server.next().await.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 20);
    assert_eq!(count(&outcomes(waiting).await, &Outcome::Accepted), 40);
    assert_eq!(server.connections(), 4, "and no more");
}

/// A fence that answers for the instant only, and refuses every twentieth time.
#[derive(Default)]
struct Fickle(AtomicUsize);

#[async_trait]
impl Fence for Fickle {
    fn is_open(&self) -> bool {
        self.0.fetch_add(1, Ordering::SeqCst) % 20 != 19
    }

    async fn renew(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn no_push_is_lost_among_resets_limits_and_windows_that_never_rest() {
    const PUSHES: usize = 20_000;
    let mut server = Server::start(MANY).await;
    // Its clock stands still: no push is saved by its deadline.
    let client = client(&server);
    client.warm_up(&mut server).await;
    let shared = Arc::clone(&server.shared);
    let mut answered = 0_u32;
    server.answer_by(move |got| {
        answered += 1;
        match answered % 10 {
            0..=2 => got.refuse(),
            3 => got.reset(h2::Reason::INTERNAL_ERROR),
            _ => got.answer(200, ""),
        }
    });
    let weather = async {
        for round in 0_u32.. {
            shared.allow_all(1 + round * 5 % 7);
            shared.window_all([0, 65_535, 10][round as usize % 3]);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let fence: Arc<dyn Fence> = Arc::new(Fickle::default());
    let all = futures_util::stream::iter(0..PUSHES)
        .map(|number| outcome(client.send_fenced(push(number, Lane::Bulk), Arc::clone(&fence))))
        .buffer_unordered(500)
        .collect::<Vec<_>>();
    let all = tokio::select! {
        all = all => all,
        () = weather => unreachable!("the weather goes on"),
    };
    let of = |outcome| count(&all, &outcome);
    let [accepted, unknown, unsent, fenced] =
        [Outcome::Accepted, Outcome::Unknown, Outcome::Unsent, Outcome::Fenced].map(of);
    assert_eq!(accepted + unknown + unsent + fenced, PUSHES);
    assert!(accepted > PUSHES / 2 && unknown > 0 && unsent > 0 && fenced > 0, "{accepted} {unknown} {unsent} {fenced}");
    let report = client.production();
    assert_eq!((report.in_flight, report.waiting, report.connections), (0, 0, 4), "every stream was given back");
}

#[tokio::test]
async fn streams_above_the_last_one_of_a_goaway_go_elsewhere_at_once() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send_n(6);
    let in_flight = server.next_many(6).await;
    // Streams 1 (the warm-up), 3, 5, 7, 9, 11, 13: those up to 7 are still answered.
    server.go_away(1, 7);
    let (mut not_processed, mut elsewhere) = (Vec::new(), Vec::new());
    for got in in_flight.iter().filter(|got| got.stream > 7) {
        not_processed.push(got.path.clone());
        let again = server.next().await;
        assert_eq!(again.connection, 2, "nothing goes where GOAWAY was said");
        elsewhere.push(again.path.clone());
        again.answer(200, "");
    }
    not_processed.sort();
    elsewhere.sort();
    assert_eq!(elsewhere, not_processed);
    for got in in_flight {
        if got.stream <= 7 {
            got.answer(200, "");
        }
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 6);
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
    server.next().await.answer(200, "");
    server.order(1, Order::Cut);
    let all = outcomes(sent).await;
    assert_eq!(count(&all, &Outcome::Accepted), 1, "{all:?}");
    assert_eq!(count(&all, &Outcome::Unknown), 1, "{all:?}");
}

#[tokio::test]
async fn a_push_whose_stream_is_refused_is_sent_three_times_more_each_time_past_its_fence() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let fence = Switch::until(true, LONG);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    for _ in 0..4 {
        server.next().await.refuse();
    }
    assert_eq!(outcome(sent).await, Outcome::Unsent);
    assert_eq!(fence.asked(), 4);
    assert_eq!(client.production().connections, 1, "the connection stays");

    let sent = client.send_fenced(push(2, Lane::Transactional), Arc::<Switch>::clone(&fence));
    let got = server.next().await;
    fence.close();
    got.refuse();
    assert_eq!(outcome(sent).await, Outcome::Fenced, "a fence that has closed meanwhile is heard");
    assert!(server.has_nothing());
}

#[tokio::test]
async fn a_push_whose_stream_is_refused_tries_another_connection() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 2);
    client.warm_up(&mut server).await;
    let both = client.send_n(2);
    for got in server.next_many(2).await {
        got.answer(200, "");
    }
    assert_eq!((count(&outcomes(both).await, &Outcome::Accepted), server.connections()), (2, 2));
    let sent = client.send(push(3, Lane::Transactional));
    let refused = server.next().await;
    let by = refused.connection;
    refused.refuse();
    let again = server.next().await;
    assert_ne!(again.connection, by);
    again.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn what_is_sent_again_is_waited_for_no_longer_than_the_first_try() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let sent = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    client.clock.advance(Duration::from_secs(15));
    server.go_away(1, got.stream - 2);
    let again = server.next().await;
    assert_eq!(again.connection, 2);
    client.clock.advance(Duration::from_secs(4));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!sent.is_finished(), "19 seconds are not 20");
    client.clock.advance(Duration::from_secs(1));
    assert_eq!(outcome(sent).await, Outcome::Unknown);
    let next = client.send(push(2, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "five seconds of silence are nothing");
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
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

// Its reason may be about the connection (`IdleTimeout`) and not about the push.
#[tokio::test]
async fn a_400_that_breaks_off_before_its_reason_leaves_it_unknown() {
    for falls_silent in [false, true] {
        let mut server = Server::start(ONE).await;
        let client = client(&server);
        let sent = client.send(push(1, Lane::Transactional));
        let mut got = server.next().await;
        let head = http::Response::builder().status(400).body(()).unwrap();
        let _rest = got.respond.send_response(head, false).unwrap();
        // What stands before an acknowledged frame has been read.
        for streams in [2, 3] {
            server.allow(1, streams).await;
        }
        if falls_silent {
            client.clock.advance(Duration::from_secs(20));
        } else {
            server.order(1, Order::Cut);
        }
        assert_eq!(outcome(sent).await, Outcome::Unknown);
    }
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
async fn a_connection_lost_before_the_body_left_sends_the_push_elsewhere() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let sent = client.send(push(1, Lane::Transactional));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    server.order(1, Order::Cut);
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
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

#[tokio::test]
async fn a_fence_that_holds_is_asked_once_and_the_push_leaves_whole() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    let fence = Switch::until(true, LONG);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    server.next().await.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
    assert_eq!(fence.asked(), 1);
}

#[tokio::test]
async fn a_body_that_has_waited_too_long_for_room_asks_the_fence_again_and_is_taken_back() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::until(true, LONG);
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.close();
    // Nobody sees it close who was told that it holds; but that is believed for a tenth of a second only.
    client.clock.advance(Duration::from_millis(100));
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    assert_eq!(fence.asked(), 2);
    until("it is taken back", || server.load.taken_back.load(Ordering::SeqCst) == 1).await;
    assert!(server.has_nothing(), "no request came to its end");
    let next = client.send(push(2, Lane::Transactional));
    server.next().await.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted, "its stream was given back");
}

#[tokio::test]
async fn what_a_fence_said_is_not_acted_on_past_the_moment_that_it_named() {
    let mut server = Server::start(ONE).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    server.window(1, 0).await;
    let fence = Switch::until(true, Duration::from_millis(50));
    let sent = client.send_fenced(push(1, Lane::Transactional), Arc::<Switch>::clone(&fence));
    until("the head came", || server.load.heads.load(Ordering::SeqCst) == 2).await;
    fence.close();
    client.clock.advance(Duration::from_millis(50));
    server.window(1, 65_535).await;
    assert_eq!(outcome(sent).await, Outcome::Fenced);
    assert!(server.has_nothing());
}

/// So many bytes that two hundred of them fill every buffer between client and server.
fn large(number: usize) -> Push {
    let mut large = push(number, Lane::Transactional);
    let payload = format!("{{\"aps\":{{\"alert\":\"{}\"}}}}", "a".repeat(4_000));
    Arc::make_mut(&mut large.head).payload = Bytes::from(payload);
    large
}

/// A connection whose peer has stopped reading, with pushes that it has taken and pushes that it has not.
async fn clogged(server: &mut Server, client: &Client, fence: &Arc<Switch>) -> Vec<JoinHandle<Reply>> {
    client.warm_up(server).await;
    server.shared.deaf.store(true, Ordering::SeqCst);
    let sent: Vec<_> = (0..200).map(|n| client.send_fenced(large(n), Arc::<Switch>::clone(fence))).collect();
    until("all have asked their fence", || fence.asked() == 200).await;
    // What can leave has had the time to.
    tokio::time::sleep(Duration::from_millis(300)).await;
    sent
}

/// Time goes by while the process runs: after one long step it looks as if it had been stopped. Everything runs on one
/// thread, so whoever a step has woken has had a turn before the next one.
async fn go_by(client: &Client, seconds: u32) {
    for _ in 0..4 * seconds {
        client.clock.advance(Duration::from_millis(250));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "the kernel takes whatever comes")]
async fn what_waits_for_a_socket_that_takes_nothing_asks_its_fence_again_before_it_leaves() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let fence = Switch::until(true, LONG);
    let sent = clogged(&mut server, &client, &fence).await;
    fence.close();
    go_by(&client, 1).await;
    server.shared.deaf.store(false, Ordering::SeqCst);
    let seen = server.answer_all(200, "");
    let all = outcomes(sent).await;
    let (accepted, fenced) = (count(&all, &Outcome::Accepted), count(&all, &Outcome::Fenced));
    assert_eq!(accepted + fenced, 200, "{all:?}");
    assert!(fenced >= 100, "{fenced} were fenced: most were not yet out of our hands");
    assert_eq!(seen.lock().unwrap().len(), accepted, "nothing that was fenced has left");
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "the kernel takes whatever comes")]
async fn a_socket_that_takes_nothing_for_ten_seconds_is_given_up_and_what_it_had_not_taken_goes_elsewhere() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let fence = Switch::until(true, LONG);
    let sent = clogged(&mut server, &client, &fence).await;
    go_by(&client, 9).await;
    assert_eq!(server.connections(), 1, "not sooner");
    go_by(&client, 1).await;
    until("another connection", || server.connections() == 2).await;
    server.shared.deaf.store(false, Ordering::SeqCst);
    let seen = server.answer_all(200, "");
    let all = outcomes(sent).await;
    let (accepted, unknown) = (count(&all, &Outcome::Accepted), count(&all, &Outcome::Unknown));
    assert_eq!(accepted + unknown, 200, "{all:?}");
    assert!(accepted >= 100, "{accepted} went elsewhere");
    let elsewhere = seen.lock().unwrap().iter().filter(|(connection, _)| *connection == 2).count();
    assert_eq!(elsewhere, accepted);
}

#[tokio::test]
async fn whoever_waits_for_a_stream_goes_elsewhere_as_soon_as_goaway_is_said() {
    let mut server = Server::start(ONE).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    client.warm_up(&mut server).await;
    let first = client.send(push(1, Lane::Transactional));
    let in_flight = server.next().await;
    let waiting = client.send(push(2, Lane::Transactional));
    until("it waits", || client.production().waiting == 1).await;
    // Everything on the connection will still be answered, so no stream's failure tells of it.
    server.go_away(1, in_flight.stream);
    let elsewhere = server.next().await;
    assert_eq!((elsewhere.connection, elsewhere.path.as_str()), (2, "/3/device/00000002"));
    elsewhere.answer(200, "");
    assert_eq!(outcome(waiting).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(first).await, Outcome::Accepted);
    until("the old connection is gone", || client.production().connections == 1).await;
}

#[tokio::test]
async fn a_connection_at_its_age_serves_until_its_successor_does() {
    let mut server = Server::start(MANY).await;
    // A push that is under way all the time.
    let client = client_with(server.port, &server.ca_pem, |s| s.request_deadline = Duration::from_secs(20 * 3600));
    client.warm_up(&mut server).await;
    let long = client.send(push(1, Lane::Transactional));
    let in_flight = server.next().await;
    client.clock.advance(Duration::from_secs(10 * 3600 - 60));
    let early = client.send(push(2, Lane::Transactional));
    let got = server.next().await;
    assert_eq!((got.connection, server.connections()), (1, 1), "ten hours are no age");
    got.answer(200, "");
    assert_eq!(outcome(early).await, Outcome::Accepted);
    client.clock.advance(Duration::from_secs(4 * 3600 + 60));
    server.greeted(2, "a successor, though nobody waits for it").await;
    assert_eq!(client.production().connections, 2);
    let next = client.send(push(3, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2, "nothing new goes where it is to be closed");
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(long).await, Outcome::Accepted, "what was under way is answered");
    until("the old one is closed", || client.production().connections == 1).await;
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn an_idle_connection_at_its_age_is_closed_and_not_replaced() {
    let mut server = Server::start(MANY).await;
    let client = client(&server);
    client.warm_up(&mut server).await;
    client.clock.advance(Duration::from_secs(14 * 3600));
    until("it is closed", || client.production().connections == 0).await;
    assert_eq!(server.connections(), 1);
    let next = client.send(push(1, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_connection_is_replaced_before_its_stream_ids_run_out() {
    let mut server = Server::start(MANY).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_requests_per_connection = 5);
    client.warm_up(&mut server).await;
    let sent = client.send_n(3);
    for got in server.next_many(3).await {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 3);
    client.clock.advance(Duration::from_secs(1));
    let fifth = client.send(push(5, Lane::Transactional));
    let in_flight = server.next().await;
    assert_eq!((in_flight.connection, server.connections()), (1, 1), "four are not five");
    client.clock.advance(Duration::from_secs(1));
    server.greeted(2, "a successor").await;
    let next = client.send(push(6, Lane::Transactional));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(next).await, Outcome::Accepted);
    in_flight.answer(200, "");
    assert_eq!(outcome(fifth).await, Outcome::Accepted);
    until("the old one is closed", || client.production().connections == 1).await;
}

#[tokio::test]
async fn streams_are_spread_over_connections_and_spare_ones_are_closed_one_a_minute() {
    let mut server = Server::start(Script { streams: 10, ..ONE }).await;
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 3);
    let sent = client.send_n(30);
    // A connection carries one until it has proved itself.
    let mut held = Vec::new();
    let mut proved = std::collections::HashSet::new();
    while held.len() < 27 {
        let got = server.next().await;
        if proved.insert(got.connection) {
            got.answer(200, "");
        } else {
            held.push(got);
        }
    }
    assert_eq!(server.connections(), 3);
    for got in held {
        got.answer(200, "");
    }
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 30);

    let sent = client.send_n(9);
    let mut share = HashMap::new();
    for got in server.next_many(9).await {
        *share.entry(got.connection).or_insert(0) += 1;
        got.answer(200, "");
    }
    assert_eq!(share, HashMap::from([(1, 3), (2, 3), (3, 3)]));
    assert_eq!(count(&outcomes(sent).await, &Outcome::Accepted), 9);

    let left = || client.production().connections;
    client.clock.advance(Duration::from_secs(9 * 60));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 3, "nine minutes are not idle");
    client.clock.advance(Duration::from_secs(61));
    until("one is closed", || left() == 2).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 2, "one a minute");
    client.clock.advance(Duration::from_secs(60));
    until("another is closed", || left() == 1).await;
    client.clock.advance(Duration::from_secs(3600));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(left(), 1, "one stays");
}

#[tokio::test]
async fn a_server_that_never_sends_settings_is_given_up_and_another_is_tried() {
    let mut server = Server::start(ONE).await;
    server.shared.withhold_greeting.store(true, Ordering::SeqCst);
    let client = client_with(server.port, &server.ca_pem, |s| s.max_connections = 1);
    let sent = client.send(push(1, Lane::Transactional));
    until("the first connection", || client.production().connections == 1).await;
    client.clock.advance(Duration::from_secs(9));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(server.connections(), 1, "nine seconds of patience and more");
    client.clock.advance(Duration::from_secs(1));
    until("it is closed", || client.production().connections == 0).await;
    server.shared.withhold_greeting.store(false, Ordering::SeqCst);
    // It counts as a failure: the next attempt comes after a pause.
    client.clock.advance(Duration::from_secs(1));
    let got = server.next().await;
    assert_eq!(got.connection, 2);
    got.answer(200, "");
    assert_eq!(outcome(sent).await, Outcome::Accepted);
}

#[tokio::test]
async fn a_server_that_hangs_up_at_once_is_not_hammered() {
    let server = Server::start(ONE).await;
    let client = client(&server);
    let (shared, clock) = (Arc::clone(&server.shared), Arc::clone(&client.clock));
    // Whoever connects is cut off, for two minutes in which somebody always waits.
    let mut cut = 0;
    for _ in 0..480 {
        if client.production().waiting == 0 {
            drop(client.send(push(1, Lane::Transactional)));
        }
        {
            let orders = shared.orders.lock().unwrap();
            for connection in orders.iter().skip(cut) {
                _ = connection.send(Order::Cut);
            }
            cut = orders.len();
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
        clock.advance(Duration::from_millis(250));
    }
    // 1 + 2 + 4 + 8 + 16 + 32 s and a minute, a quarter less at most.
    assert!((4..=9).contains(&server.connections()), "{} connections in two minutes", server.connections());
}

/// A clock that leaps two seconds ahead once it is armed and has been asked for the time: as a process sees it that is
/// stopped there.
#[derive(Debug)]
struct Leaping {
    within: ManualClock,
    armed: AtomicBool,
}

impl Clock for Leaping {
    fn now(&self) -> Timestamp {
        let now = self.within.now();
        if self.armed.swap(false, Ordering::SeqCst) {
            self.within.advance(Duration::from_secs(2));
        }
        now
    }

    fn monotonic(&self) -> Duration {
        self.within.monotonic()
    }

    fn sleep(&self, duration: Duration) -> Timer {
        self.within.sleep(duration)
    }
}

/// Opens once, and then arms the clock: the next to ask that is the task that hands the push over.
struct Once {
    clock: Arc<Leaping>,
    open: AtomicBool,
}

#[async_trait]
impl Fence for Once {
    fn is_open(&self) -> bool {
        let open = self.open.swap(false, Ordering::SeqCst);
        self.clock.armed.store(open, Ordering::SeqCst);
        open
    }

    fn open_until(&self) -> Option<Duration> {
        self.is_open().then_some(Duration::MAX)
    }

    async fn renew(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_process_that_was_stopped_between_handing_a_push_over_and_writing_it_does_not_write_it() {
    let mut server = Server::start(MANY).await;
    let clock = Arc::new(Leaping { within: ManualClock::new(START), armed: AtomicBool::new(false) });
    let dyn_clock: Arc<dyn Clock> = Arc::<Leaping>::clone(&clock);
    let gateway = gateway_on(&dyn_clock, &credential::generate().unwrap(), server.port, &server.ca_pem, |_| {});
    let send = |number, fence: Arc<dyn Fence>| {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { gateway.send(&push(number, Lane::Transactional), &*fence).await })
    };
    let first = send(1, Arc::new(NoFence));
    server.next().await.answer(200, "");
    assert_eq!(outcome(first).await, Outcome::Accepted);

    let once = Once { clock, open: AtomicBool::new(true) };
    assert_eq!(outcome(send(2, Arc::new(once))).await, Outcome::Fenced, "its fence is asked anew");
    let third = send(3, Arc::new(NoFence));
    let got = server.next().await;
    assert_eq!(got.path, "/3/device/00000003", "the second never left");
    got.answer(200, "");
    assert_eq!(outcome(third).await, Outcome::Accepted);
    assert_eq!(server.connections(), 2, "what had not left went with its connection");
}
