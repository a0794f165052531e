//! What the simulator does beyond Apple's good days: streams, connections, answers and devices at their hardest, seen
//! by a bare `h2` client and by hand-written frames.

use std::{sync::Arc, time::Duration};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject as _},
    sign::CertifiedKey,
};
use serde_json::json;
use sonnette::{
    domain::clock::Clock as _,
    sim::{
        Action, ClientCertificate, Conduct, Connects, Environment, GoAwayOrder, MAX_SHOWN, PushQuery, Script,
        WedgeError, WedgeOrder,
    },
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_rustls::TlsConnector;

use crate::simulator::{RawFrames, START, TOKEN, TOPIC, World, control, finish, settings};

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const DATA: u8 = 0;
const ACK: u8 = 1;
const SANDBOX: Environment = Environment::Sandbox;

/// A simulator that conducts itself so from the start. It does not prove that its answers were read: its PINGs would
/// stand between the frames that are looked for.
async fn conducted(json: &str) -> World {
    World::with(|settings| {
        settings.conduct = Conduct::parse(json).unwrap();
        settings.record_attempts = false;
    })
    .await
}

async fn quiet() -> World {
    conducted("{}").await
}

/// Frames on a connection whose limit is raised; the next free stream is 3.
async fn raised(world: &World) -> RawFrames {
    let mut raw = RawFrames::open(world).await;
    raw.next_of(SETTINGS).await;
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    assert_eq!(raw.next_of(HEADERS).await.1, 1);
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(3, 1000)));
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw
}

/// Whether nothing comes for a moment: too short a moment proves less, but never wrongly fails.
async fn is_silent(raw: &mut RawFrames) -> bool {
    tokio::time::timeout(Duration::from_millis(100), raw.stream.read_u8()).await.is_err()
}

#[tokio::test]
async fn the_stream_limit_falls_to_1_with_a_refusal_and_rises_with_the_next_200() {
    let world = conducted(r#"{"adaptive_streams": true}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    raw.post_to(3, &jwt, "abc").await; // BadDeviceToken
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(3, 1)), "a refusal");
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.post(5, &jwt).await;
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(3, 1000)), "a 200");
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.post_to(7, &jwt, "fa17ed4100").await; // Unregistered
    loop {
        let (kind, flags, stream, _) = raw.next().await;
        assert!(kind != SETTINGS || flags == ACK, "410 is no error of the provider's");
        if (kind, stream) == (HEADERS, 7) {
            raw.frame(PING, 0, 0, b"more yet").await; // SETTINGS would come before its acknowledgement
        } else if kind == PING {
            break;
        }
    }
    world.end().await;
}

#[tokio::test]
async fn streams_above_a_limit_that_shrinks_are_reset_and_not_processed() {
    let world = conducted(r#"{"adaptive_streams": true}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    world.simulator.scripts().add(Script::new(TOKEN, Action::Accept).times(4).after_ms(60_000));
    let mut raw = RawFrames::open(&world).await;
    raw.next_of(SETTINGS).await;
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.post(1, &jwt).await;
    raw.next_of(SETTINGS).await;
    raw.frame(SETTINGS, ACK, 0, b"").await;
    for stream in [3, 5] {
        raw.post(stream, &jwt).await;
    }
    raw.begin(7, &jwt).await; // its body never ends
    raw.post_to(9, &jwt, "abc").await;
    let mut refused = Vec::new();
    for _ in 0..3 {
        let (_, stream, payload) = raw.next_of(RST_STREAM).await;
        assert_eq!(payload, [0, 0, 0, 7], "REFUSED_STREAM");
        refused.push(stream);
    }
    refused.sort_unstable();
    assert_eq!(refused, [3, 5, 7], "the oldest keeps its slot");
    world.clock.advance(Duration::from_secs(60));
    assert_eq!(raw.next_of(HEADERS).await.1, 1);
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.accepted, counters.reset), (1, 3));
    world.end().await;
}

#[tokio::test]
async fn lowering_the_limit_of_open_connections_resets_what_is_held() {
    let mut world = quiet().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.simulator.gates().hold(SANDBOX);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(client.begin(client.request(TOKEN), "{}").await.unwrap());
    }
    world.until("three are held", |world| world.simulator.ledger().counters().unanswered == 3).await;
    world.simulator.gates().set_stream_limit(SANDBOX, 1);
    let newest = held.split_off(1);
    for response in newest {
        let error = finish(response).await.err().unwrap();
        assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM));
    }
    world.simulator.gates().release(SANDBOX);
    assert_eq!(finish(held.remove(0)).await.unwrap().status, 200);
    assert_eq!(world.simulator.ledger().counters().accepted, 2);
    world.end().await;
}

#[tokio::test]
async fn settings_that_come_late_find_streams_that_knew_of_no_limit() {
    let world = conducted(r#"{"settings": {"after_ms": 60000}}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &jwt).await;
    raw.post(3, &jwt).await;
    assert!(is_silent(&mut raw).await);
    assert_eq!(world.simulator.ledger().counters().requests, 0);
    world.clock.advance(Duration::from_secs(60));
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(3, 1)));
    let (_, stream, payload) = raw.next_of(RST_STREAM).await;
    assert_eq!((stream, payload), (3, vec![0, 0, 0, 7]), "refused, not punished");
    world.end().await;
}

#[tokio::test]
async fn settings_that_never_come_leave_the_client_without_a_word() {
    let world = conducted(r#"{"settings": "never"}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &jwt).await;
    raw.frame(PING, 0, 0, b"are you?").await;
    assert!(is_silent(&mut raw).await);
    let mut other = RawFrames::open(&world).await;
    other.post(1, &jwt).await;
    drop(raw);
    world.until("who closes is let go", |world| world.simulator.ledger().counters().connections_closed == 1).await;
    assert_eq!(world.simulator.ledger().counters().requests, 0);
    world.end().await; // ends with `other` open
}

#[tokio::test]
async fn a_goaway_may_be_text_or_empty_and_come_twice() {
    let world = quiet().await;
    for (order, debug) in [
        ("{}", r#"{"reason":"Shutdown"}"#),
        (r#"{"debug": "Maximum connection lifetime reached.", "twice": true}"#, "Maximum connection lifetime reached."),
        (r#"{"debug": "", "twice": true, "code": 11, "last_stream": 1}"#, ""),
    ] {
        let mut raw = raised(&world).await;
        assert_eq!(control(&world, "POST /environments/sandbox/go-away", order).await.0, 200);
        let order: serde_json::Value = serde_json::from_str(order).unwrap();
        let last = order["last_stream"].as_u64().unwrap_or(0x7fff_ffff);
        let code = order["code"].as_u64().unwrap_or(0);
        let head = u64::to_be_bytes(last << 32 | code);
        for _ in 0..if order["twice"] == true { 2 } else { 1 } {
            let (kind, _, _, payload) = raw.next().await;
            assert_eq!((kind, payload), (GOAWAY, [&head, debug.as_bytes()].concat()), "{order}");
        }
        drop(raw);
        world.until("it is closed", |world| world.simulator.gates().state(SANDBOX).open_connections == 0).await;
    }
    world.end().await;
}

#[tokio::test]
async fn a_connection_may_stay_open_behind_goaway_without_ever_taking_a_stream_again() {
    let world = quiet().await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    world.simulator.gates().go_away(SANDBOX, &GoAwayOrder { linger: true, ..GoAwayOrder::default() });
    let (kind, _, _, payload) = raw.next().await;
    assert_eq!((kind, &payload[..4]), (GOAWAY, [0, 0, 0, 1].as_slice()), "the last stream is the last one opened");
    for stream in [3, 5] {
        raw.post(stream, &jwt).await;
        raw.frame(PING, 0, 0, b"still up").await;
        let (kind, flags, _, _) = raw.next().await;
        assert_eq!((kind, flags), (PING, ACK));
    }
    assert_eq!(world.simulator.ledger().counters().requests, 1);
    assert_eq!(world.simulator.gates().state(SANDBOX).open_connections, 1);
    world.end().await;
}

#[tokio::test]
async fn conduct_is_changed_whole_or_in_part_and_nonsense_changes_nothing() {
    let world = quiet().await;
    let path = |method: &str| format!("{method} /environments/sandbox/conduct");
    let (_, whole) = control(&world, &path("GET"), "").await;
    assert_eq!((&whole["adaptive_streams"], &whole["settings"]), (&json!(false), &json!("at_once")));
    assert_eq!(control(&world, &path("PUT"), r#"{"adaptive_streams": true}"#).await.0, 204);
    let (status, changed) = control(&world, &path("PATCH"), r#"{"settings": "never"}"#).await;
    assert_eq!((status, &changed["adaptive_streams"], &changed["settings"]), (200, &json!(true), &json!("never")));
    assert_eq!(control(&world, &path("PATCH"), r#"{"settings": "seldom"}"#).await.0, 422);
    assert_eq!(control(&world, &path("PUT"), r#"{"moody": true}"#).await.0, 422);
    assert_eq!(control(&world, &path("GET"), "").await.1, changed);
    assert_eq!(control(&world, "GET /environments/production/conduct", "").await.1, whole, "the other is as it was");
    assert_eq!(control(&world, &path("PUT"), "{}").await.0, 204);
    assert_eq!(control(&world, &path("GET"), "").await.1, whole);
    world.end().await;
}

/// Whether a PING is acknowledged.
async fn answers_ping(raw: &mut RawFrames) -> bool {
    raw.frame(PING, 0, 0, b"are you?").await;
    let answer = async {
        loop {
            if raw.next().await.0 == PING {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_millis(100), answer).await.is_ok()
}

#[tokio::test]
async fn a_half_open_connection_neither_answers_nor_acknowledges_and_ends_when_the_client_closes() {
    let world = quiet().await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    assert!(answers_ping(&mut raw).await);
    assert_eq!(
        control(&world, "POST /environments/sandbox/half-open", r#"{"connection": 1}"#).await.1["connections"],
        1
    );
    raw.post(3, &jwt).await;
    assert!(!answers_ping(&mut raw).await);
    let mut accepted = raised(&world).await;
    accepted.post_to(3, &jwt, "fa17ed000b").await;
    assert!(is_silent(&mut accepted).await);
    let mut refused = raised(&world).await;
    refused.post_to(3, &jwt, "fa17ed000a").await;
    assert!(is_silent(&mut refused).await); // a PING in the same breath would be read before the push is judged
    assert!(!answers_ping(&mut refused).await);
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.requests, counters.accepted, counters.accepted_unanswered), (5, 4, 1));
    assert_eq!(world.simulator.gates().state(SANDBOX).open_connections, 3);
    drop(raw);
    world.until("who closes is let go", |world| world.simulator.ledger().counters().connections_closed == 1).await;
    world.end().await; // ends with two half-open connections
}

#[tokio::test]
async fn a_wedged_connection_acknowledges_ping_and_answers_nothing_or_one_error() {
    let mut world = quiet().await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    world.simulator.gates().wedge(SANDBOX, &WedgeOrder::default());
    raw.post(3, &jwt).await;
    assert!(answers_ping(&mut raw).await);
    assert!(is_silent(&mut raw).await);
    assert_eq!(world.simulator.ledger().counters().accepted, 1);
    let mut scripted = raised(&world).await;
    scripted.post_to(3, &jwt, "fa17ed000c").await;
    scripted.post(5, &jwt).await;
    assert!(answers_ping(&mut scripted).await);
    assert!(is_silent(&mut scripted).await);
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200, "other connections go on");
    let error = WedgeError { status: 500, reason: "InternalServerError".to_owned() };
    world.simulator.gates().wedge(SANDBOX, &WedgeOrder { error: Some(error), connection: None });
    for _ in 0..2 {
        assert_eq!(client.push(TOKEN).await.reason(), (500, "InternalServerError"));
    }
    world.end().await;
}

#[tokio::test]
async fn a_refused_provider_token_may_wedge_its_connection() {
    let mut world = conducted(r#"{"after_token_error": "repeats"}"#).await;
    let mut client = world.connect().await;
    let good = client.jwt.clone();
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(60));
    client.jwt = world.jwt("KEY0000001", 0);
    assert_eq!(client.push(TOKEN).await.reason(), (429, "TooManyProviderTokenUpdates"));
    client.jwt = good;
    assert_eq!(client.push(TOKEN).await.reason(), (429, "TooManyProviderTokenUpdates"), "the good token helps no more");
    assert_eq!(world.connect().await.push(TOKEN).await.status, 200);
    world.simulator.gates().set_conduct(SANDBOX, Conduct::parse(r#"{"after_token_error": "falls_silent"}"#).unwrap());
    let (old, new) = (world.jwt("KEY0000001", 3601), world.jwt("KEY0000001", 0));
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &old).await;
    assert_eq!(raw.next_of(HEADERS).await.1, 1);
    raw.post(3, &new).await;
    assert!(answers_ping(&mut raw).await);
    assert!(is_silent(&mut raw).await);
    world.end().await;
}

#[tokio::test]
async fn a_connection_may_be_read_slowly() {
    let world = conducted(r#"{"read_bytes_per_second": 100}"#).await;
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    while world.simulator.ledger().counters().requests == 0 {
        world.clock.advance(Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(world.clock.monotonic() < Duration::from_secs(1000), "it never arrives");
    }
    let bytes = world.simulator.ledger().counters().bytes_read;
    let passed = world.clock.monotonic();
    assert!(bytes > 300 && passed.as_millis() >= u128::from(bytes - 10) * 10, "{bytes} bytes in {passed:?}");
    world.simulator.gates().set_conduct(SANDBOX, Conduct::default());
    raw.post(3, &world.jwt("KEY0000001", 0)).await;
    world.until("it comes at once", |world| world.simulator.ledger().counters().requests == 2).await;
    world.end().await;
}

/// Sends the next `length` bytes of a body in frames of at most 16,384.
async fn data(raw: &mut RawFrames, stream: u32, mut length: usize) {
    while length > 0 {
        let now = length.min(16_384);
        raw.frame(DATA, 0, stream, &vec![b'x'; now]).await;
        length -= now;
    }
}

#[tokio::test]
async fn windows_may_be_tiny_and_updated_late() {
    let world = conducted(r#"{"stream_window": 16, "window_updates_after_ms": 60000}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = RawFrames::open(&world).await;
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(4, 16)));
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.begin(1, &jwt).await;
    data(&mut raw, 1, 16).await;
    assert!(answers_ping(&mut raw).await);
    assert!(is_silent(&mut raw).await);
    world.clock.advance(Duration::from_secs(60));
    let (_, stream, increment) = raw.next_of(WINDOW_UPDATE).await;
    assert_eq!((stream, increment), (1, vec![0, 0, 0, 16]));
    raw.frame(DATA, 1, 1, b"xxxx").await;
    assert_eq!(raw.next_of(HEADERS).await.1, 1);
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(4, 16)), "the second SETTINGS keeps to it");
    world.end().await;
}

#[tokio::test]
async fn the_window_of_a_connection_may_shrink_to_almost_nothing() {
    let world = conducted(r#"{"stream_window": 1000000, "connection_window": 1000}"#).await;
    let mut raw = RawFrames::open(&world).await;
    raw.next_of(SETTINGS).await;
    raw.frame(SETTINGS, ACK, 0, b"").await;
    raw.begin(1, &world.jwt("KEY0000001", 0)).await;
    data(&mut raw, 1, 60_000).await; // of the 65,535 every connection begins with
    assert!(answers_ping(&mut raw).await);
    data(&mut raw, 1, 5_500).await;
    let (_, stream, increment) = raw.next_of(WINDOW_UPDATE).await;
    assert_eq!(stream, 0);
    assert!(u32::from_be_bytes(increment.try_into().unwrap()) <= 1000);
    for window in ["-1", "2147483648", "\"wide\""] {
        assert!(Conduct::parse(&format!(r#"{{"stream_window": {window}}}"#)).is_err(), "{window}");
    }
    world.end().await;
}

#[tokio::test]
async fn tls_may_be_closed_without_goaway() {
    let world = quiet().await;
    let jwt = world.jwt("KEY0000001", 0);
    for how in ["order", "fa17ed000d", "fa17ed000e"] {
        let mut raw = raised(&world).await;
        if how == "order" {
            assert_eq!(control(&world, "POST /environments/sandbox/close-tls", "{}").await.1["connections"], 1);
        } else {
            raw.post_to(3, &jwt, how).await;
        }
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(10), raw.stream.read_to_end(&mut rest)).await.unwrap();
        assert!(end.is_ok(), "{how}: TLS is closed in good order: {end:?}");
        let mut frames = rest.as_slice();
        while let Some((head, payload)) = frames.split_at_checked(9) {
            assert!(head[3] != GOAWAY && head[3] != RST_STREAM, "{how}: {head:?}");
            frames = &payload[u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize..];
        }
        world.until("it is closed", |world| world.simulator.gates().state(SANDBOX).open_connections == 0).await;
    }
    assert_eq!(world.simulator.ledger().counters().accepted, 4, "three pushes before, and the one accepted unheard");
    world.end().await;
}

#[tokio::test]
async fn new_connections_are_refused_reset_or_stalled_for_a_while() {
    let mut world = quiet().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    let address = world.simulator.sandbox();
    let path = "PUT /environments/sandbox/connects";
    assert_eq!(control(&world, path, r#"{"connects": "refuse"}"#).await.0, 204);
    for _ in 0..3 {
        let error = TcpStream::connect(address).await.err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(client.push(TOKEN).await.status, 200, "open connections notice nothing");
    assert_eq!(control(&world, path, r#"{"connects": "reset"}"#).await.0, 204);
    assert!(world.tls(&[b"h2"]).await.is_err());
    assert_eq!(control(&world, path, r#"{"connects": "stall"}"#).await.0, 204);
    let stalled = tokio::time::timeout(Duration::from_millis(100), world.tls(&[b"h2"])).await;
    assert!(stalled.is_err(), "the handshake never finishes");
    world.simulator.gates().set_connects(SANDBOX, Connects::Refuse, Some(Duration::from_secs(5))).await;
    assert!(TcpStream::connect(address).await.is_err());
    assert_eq!(world.simulator.gates().state(SANDBOX).connects, Connects::Refuse);
    world.clock.advance(Duration::from_secs(5));
    world.until("it is over", |world| world.simulator.gates().state(SANDBOX).connects == Connects::Accept).await;
    assert_eq!(world.connect().await.push(TOKEN).await.status, 200);
    assert_eq!(control(&world, path, r#"{"connects": "stall"}"#).await.0, 204);
    let _stalled = TcpStream::connect(address).await.unwrap();
    let gates = world.simulator.gates();
    world.end().await; // ends with a stalled handshake
    gates.set_connects(SANDBOX, Connects::Refuse, None).await; // nobody listens any more, and nobody waits
}

#[tokio::test]
async fn an_idle_connection_is_told_by_the_next_answer() {
    let mut world = conducted(r#"{"idle_timeout": {"after_ms": 600000, "by": "answer"}}"#).await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(599));
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(600));
    assert_eq!(client.push(TOKEN).await.reason(), (400, "IdleTimeout"));
    assert!(client.ended().await.err().is_none_or(|error| error.contains("IdleTimeout")));
    world.end().await;
}

#[tokio::test]
async fn an_idle_connection_is_sent_away_and_one_that_waits_is_not_idle() {
    let world = conducted(r#"{"idle_timeout": {"after_ms": 600000}}"#).await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    world.simulator.gates().hold(SANDBOX);
    raw.post(3, &jwt).await;
    world.until("it is held", |world| world.simulator.ledger().counters().unanswered == 1).await;
    world.clock.advance(Duration::from_secs(3600));
    assert!(answers_ping(&mut raw).await);
    world.simulator.gates().release(SANDBOX);
    assert_eq!(raw.next_of(HEADERS).await.1, 3, "it waited for us: no GOAWAY came");
    world.clock.advance(Duration::from_secs(600));
    let (_, _, payload) = raw.next_of(GOAWAY).await;
    assert_eq!(&payload[8..], br#"{"reason":"IdleTimeout"}"#);
    world.end().await;
}

#[tokio::test]
async fn answers_may_carry_a_date_that_is_wrong() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert!(!client.push(TOKEN).await.headers.contains_key("date"), "none unless asked for");
    assert_eq!(control(&world, "PATCH /environments/sandbox/conduct", r#"{"date_skew_ms": -90000}"#).await.0, 200);
    for token in [TOKEN, "abc"] {
        assert_eq!(client.push(token).await.headers["date"], "Sun, 22 Nov 2026 18:33:30 GMT", "START is 18:35:00");
    }
    world.clock.advance(Duration::from_secs(90));
    assert_eq!(client.push(TOKEN).await.headers["date"], "Sun, 22 Nov 2026 18:35:00 GMT");
    world.end().await;
}

#[tokio::test]
async fn retry_after_comes_with_429_and_503_when_asked_for() {
    let mut world = conducted(r#"{"retry_after": {"seconds": 30}}"#).await;
    let mut client = world.connect().await;
    for token in ["fa17ed4290", "fa17ed5030"] {
        assert_eq!(client.push(token).await.headers["retry-after"], "30");
    }
    for token in [TOKEN, "fa17ed4001", "fa17ed5000"] {
        assert!(!client.push(token).await.headers.contains_key("retry-after"), "{token}");
    }
    let as_date = Conduct::parse(r#"{"retry_after": {"date_in_seconds": 60}}"#).unwrap();
    world.simulator.gates().set_conduct(SANDBOX, as_date);
    assert_eq!(client.push("fa17ed4290").await.headers["retry-after"], "Sun, 22 Nov 2026 18:36:00 GMT");
    world.end().await;
}

#[tokio::test]
async fn an_expired_provider_token_may_get_500_or_nothing() {
    let mut world = conducted(r#"{"expired_token": "internal_server_error"}"#).await;
    let mut client = world.connect().await;
    client.jwt = world.jwt("KEY0000001", 3601);
    assert_eq!(client.push(TOKEN).await.reason(), (500, "InternalServerError"));
    assert_eq!(control(&world, "PUT /environments/sandbox/conduct", r#"{"expired_token": "silence"}"#).await.0, 204);
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &client.jwt).await;
    assert!(answers_ping(&mut raw).await);
    assert!(is_silent(&mut raw).await);
    assert_eq!(world.simulator.ledger().counters().accepted, 0);
    client.jwt = world.jwt("KEY0000001", 0);
    assert_eq!(client.push(TOKEN).await.status, 200, "a fresh one is fine");
    assert_eq!(client.push("fa17ed4034").await.reason(), (403, "ExpiredProviderToken"), "a script says what it says");
    world.end().await;
}

#[tokio::test]
async fn an_apns_id_may_come_back_in_upper_case_or_not_at_all() {
    let mut world =
        World::with(|settings| settings.conduct = Conduct::parse(r#"{"apns_id": "upper_case"}"#).unwrap()).await;
    let mut client = world.connect().await;
    let id = "123e4567-e89b-12d3-a456-4266554400a0";
    for token in [TOKEN, "abc"] {
        let answer = client.ask(client.request(token).header("apns-id", id), "{}").await.unwrap();
        assert_eq!(answer.headers["apns-id"], id.to_uppercase());
    }
    world.simulator.gates().set_conduct(SANDBOX, Conduct::parse(r#"{"apns_id": "missing"}"#).unwrap());
    for token in [TOKEN, "abc"] {
        let answer = client.ask(client.request(token).header("apns-id", id), "{}").await.unwrap();
        assert!(!answer.headers.contains_key("apns-id"));
    }
    assert_eq!(world.simulator.ledger().repeats()[0].times, 2, "the ledger knows it all the same");
    world.end().await;
}

#[tokio::test]
async fn the_body_of_a_refusal_need_not_be_json() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    for (form, body, content_type) in [
        ("text", json!("InternalServerError"), "text/plain"),
        ("html", json!("<html><body><h1>InternalServerError</h1></body></html>"), "text/html"),
        ("truncated", json!("{\"reason\":\"Inter"), "application/json"),
        ("empty", json!(null), "application/json"),
        ("json", json!({"reason": "InternalServerError"}), "application/json"),
    ] {
        let changes = format!(r#"{{"error_body": "{form}"}}"#);
        assert_eq!(control(&world, "PATCH /environments/sandbox/conduct", &changes).await.0, 200);
        let answer = client.push("fa17ed5000").await;
        assert_eq!((answer.status, &answer.body), (500, &body), "{form}");
        assert_eq!(answer.headers["content-type"], content_type, "{form}");
        assert_eq!(client.push(TOKEN).await.status, 200);
    }
    world.end().await;
}

#[tokio::test]
async fn a_device_takes_so_many_pushes_in_so_long() {
    let mut world = conducted(r#"{"device_rate": {"pushes": 2, "within_ms": 10000}}"#).await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(4));
    assert_eq!(client.push(TOKEN).await.status, 200);
    for _ in 0..3 {
        assert_eq!(client.push(&TOKEN.to_uppercase()).await.reason(), (429, "TooManyRequests"));
    }
    assert_eq!(client.push("00bb").await.status, 200, "others are not concerned");
    world.clock.advance(Duration::from_secs(6));
    assert_eq!(world.connect().await.push(TOKEN).await.status, 200, "refusals did not count");
    assert_eq!(client.push(TOKEN).await.reason(), (429, "TooManyRequests"), "connections count together");
    world.end().await;
}

/// What a device shows and what is stored for it, as bodies, by the control API.
async fn phone(world: &World, token: &str) -> (Vec<String>, Vec<String>, serde_json::Value) {
    let (status, phone) = control(world, &format!("GET /devices/sandbox/{token}"), "").await;
    assert_eq!(status, 200, "{phone}");
    let bodies = |list: &serde_json::Value| {
        list.as_array().unwrap().iter().map(|one| one["body"].as_str().unwrap().to_owned()).collect()
    };
    (bodies(&phone["shown"]), bodies(&phone["stored"]), phone)
}

#[tokio::test]
async fn one_notification_is_stored_for_an_offline_device_and_app_and_the_next_overwrites_it() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let offline = format!("PUT /devices/sandbox/{}/online", TOKEN.to_uppercase());
    assert_eq!(control(&world, &offline, r#"{"online": false}"#).await.0, 204);
    let jwt = client.jwt.clone();
    let push = |topic: &str, expiration: Option<i64>| {
        let request = http::Request::builder()
            .method("POST")
            .uri(format!("https://localhost/3/device/{TOKEN}"))
            .header("authorization", format!("bearer {jwt}"))
            .header("apns-push-type", "alert")
            .header("apns-topic", topic);
        match expiration {
            Some(seconds) => request.header("apns-expiration", START + seconds),
            None => request,
        }
    };
    for (request, body) in [
        (push("fr.ocpizza.livreur", None), "one"),
        (push("fr.ocpizza.livreur.voip", Some(60)), "two"),
        (push("fr.ocpizza.client", Some(600)), "other app"),
        (push("fr.ocpizza.livreur", Some(-1)), "past"),
        (push("fr.ocpizza.livreur", None).header("apns-expiration", "0"), "now or never"),
    ] {
        assert_eq!(client.ask(request, body).await.unwrap().status, 200, "{body}");
    }
    let (shown, stored, whole) = phone(&world, TOKEN).await;
    assert_eq!((shown, stored), (vec![], vec!["two".to_owned(), "other app".to_owned()]));
    assert_eq!((&whole["overwritten"], &whole["not_stored"], &whole["delivered"]), (&json!(1), &json!(2), &json!(0)));
    assert_eq!(
        (&whole["stored"][0]["replaced"], &whole["stored"][0]["bundle_id"]),
        (&json!(1), &json!("fr.ocpizza.livreur"))
    );
    world.clock.advance(Duration::from_secs(60));
    assert_eq!(control(&world, &offline, r#"{"online": true}"#).await.0, 204);
    let (shown, stored, whole) = phone(&world, TOKEN).await;
    assert_eq!((shown, stored), (vec!["other app".to_owned()], vec![]), "the other had expired");
    assert_eq!((&whole["expired"], &whole["delivered"]), (&json!(1), &json!(1)));
    world.end().await;
}

#[tokio::test]
async fn what_is_stored_without_expiration_lasts_thirty_days() {
    let mut world = World::start().await;
    let phones = world.simulator.phones();
    phones.set_online(SANDBOX, TOKEN, false).unwrap();
    for days in [29, 2] {
        assert_eq!(world.connect().await.push(TOKEN).await.status, 200);
        assert_eq!(phones.find(SANDBOX, TOKEN).unwrap().stored.len(), 1);
        world.clock.advance(Duration::from_secs(days * 24 * 60 * 60));
        assert_eq!(phones.find(SANDBOX, TOKEN).unwrap().stored.len(), 1, "after {days} days");
    }
    world.clock.advance(Duration::from_secs(28 * 24 * 60 * 60));
    assert_eq!(phones.find(SANDBOX, TOKEN).unwrap().stored.len(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_collapse_id_replaces_what_an_online_device_shows() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let online = format!("PUT /devices/sandbox/{TOKEN}/online");
    assert_eq!(control(&world, &online, r#"{"online": true}"#).await.0, 204);
    let order = |client: &crate::simulator::Client| client.request(TOKEN).header("apns-collapse-id", "order-1042");
    for (request, body) in [
        (order(&client), "in the oven"),
        (client.request(TOKEN), "hello"),
        (order(&client), "on its way"),
        (client.request(TOKEN).header("apns-collapse-id", "order-1043"), "another"),
        (order(&client), "here"),
    ] {
        assert_eq!(client.ask(request, body).await.unwrap().status, 200);
    }
    let silent = http::Request::builder()
        .method("POST")
        .uri(format!("https://localhost/3/device/{TOKEN}"))
        .header("authorization", format!("bearer {}", client.jwt))
        .header("apns-topic", TOPIC)
        .header("apns-push-type", "background")
        .header("apns-priority", "5");
    assert_eq!(client.ask(silent, "{}").await.unwrap().status, 200);
    let (shown, _, whole) = phone(&world, TOKEN).await;
    assert_eq!(shown, ["hello", "another", "here"]);
    assert_eq!(
        (&whole["shown"][2]["replaced"], &whole["delivered"]),
        (&json!(2), &json!(6)),
        "silent ones arrive unseen"
    );
    for n in 0..100 {
        assert_eq!(client.ask(client.request(TOKEN), &n.to_string()).await.unwrap().status, 200);
    }
    let (shown, _, _) = phone(&world, TOKEN).await;
    assert_eq!((shown.len(), shown[0].as_str()), (MAX_SHOWN, "36"), "the oldest go first");
    assert_eq!(control(&world, &format!("DELETE /devices/sandbox/{TOKEN}"), "").await.0, 204);
    assert_eq!(control(&world, &format!("GET /devices/sandbox/{TOKEN}"), "").await.0, 404);
    assert_eq!(control(&world, "PUT /devices/sandbox/xyz/online", r#"{"online": true}"#).await.0, 422);
    world.end().await;
}

#[tokio::test]
async fn what_apple_may_or_may_not_refuse_is_refused_unless_the_simulator_is_lenient() {
    let mut world = World::start().await;
    let requests = |client: &crate::simulator::Client| {
        let bare = || {
            http::Request::builder()
                .method("POST")
                .uri(format!("https://localhost/3/device/{TOKEN}"))
                .header("authorization", format!("bearer {}", client.jwt))
                .header("apns-topic", TOPIC)
        };
        [
            (bare(), "InvalidPushType"),
            (bare().header("apns-push-type", "Alert"), "InvalidPushType"),
            (bare().header("apns-push-type", "background").header("apns-priority", "10"), "BadPriority"),
            (bare().header("apns-push-type", "alert").header("apns-expiration", "1795372500000"), "BadExpirationDate"),
            (
                bare().header("apns-push-type", "alert").header("apns-id", "123E4567-E89B-12D3-A456-4266554400A0"),
                "BadMessageId",
            ),
        ]
    };
    let mut client = world.connect().await;
    for (request, reason) in requests(&client) {
        assert_eq!(client.ask(request, "{}").await.unwrap().reason(), (400, reason));
    }
    assert_eq!(client.push(TOKEN).await.status, 200);
    let key = std::mem::take(&mut client.jwt);
    world.clock.advance(Duration::from_secs(1200));
    client.jwt = world.jwt("STRANGER01", 0);
    assert_eq!(client.push(TOKEN).await.reason(), (403, "UnrelatedKeyIdInToken"));
    assert_eq!(control(&world, "PATCH /environments/sandbox/conduct", r#"{"lenient": true}"#).await.0, 200);
    assert_eq!(client.push(TOKEN).await.status, 200, "another team key of the same team");
    let mut other = world.connect().await;
    other.jwt = key;
    for (request, reason) in requests(&other) {
        assert_eq!(other.ask(request, "{}").await.unwrap().status, 200, "{reason}");
    }
    let pushes = world.simulator.ledger().pushes(&PushQuery::default());
    assert_eq!(pushes.len(), 7, "what was let through is in the ledger");
    assert_eq!((pushes[2].push_type, pushes[3].push_type), (None, Some("alert")));
    world.end().await;
}

/// A client certificate that nobody knows yet, with its key and in PEM.
fn client_certificate() -> (CertificateDer<'static>, PrivateKeyDer<'static>, String) {
    let made = rcgen::generate_simple_self_signed(vec!["fr.ocpizza.livreur".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    (made.cert.der().clone(), key, made.cert.pem())
}

#[tokio::test]
async fn a_client_certificate_needs_no_provider_token_and_begins_with_a_thousand_streams() {
    let mut world = World::start().await;
    let (certificate, key, pem) = client_certificate();
    let connector = world.connector_with(&[b"h2"], Some((certificate, key)));
    let push = |topic: Option<&str>| {
        let request = http::Request::builder()
            .method("POST")
            .uri(format!("https://localhost/3/device/{TOKEN}"))
            .header("apns-push-type", "alert");
        match topic {
            Some(topic) => request.header("apns-topic", topic),
            None => request,
        }
    };
    let mut stranger = world.connect_by(SANDBOX, connector.clone()).await;
    assert_eq!(stranger.ask(push(Some(TOPIC)), "{}").await.unwrap().reason(), (403, "BadCertificate"));
    let registered = |topics: serde_json::Value| {
        json!({ "certificate_pem": pem, "topics": topics, "environments": ["sandbox"] }).to_string()
    };
    let (status, one) = control(&world, "POST /client-certificates", &registered(json!([TOPIC]))).await;
    assert_eq!(status, 200);
    let mut elsewhere = world.connect_by(Environment::Production, connector.clone()).await;
    assert_eq!(elsewhere.ask(push(None), "{}").await.unwrap().reason(), (403, "BadCertificateEnvironment"));
    let mut client = world.connect_by(SANDBOX, connector.clone()).await;
    assert_eq!(client.ask(push(None), "{}").await.unwrap().status, 200, "one topic: it need not be named");
    assert_eq!(client.ask(push(None).header("authorization", "bearer x"), "{}").await.unwrap().status, 200);
    assert_eq!(client.ask(push(Some("fr.ocpizza.client")), "{}").await.unwrap().reason(), (400, "TopicDisallowed"));
    assert_eq!(world.simulator.ledger().pushes(&PushQuery::default())[0].topic, TOPIC);
    control(&world, "POST /client-certificates", &registered(json!([TOPIC, "fr.ocpizza.livreur.voip"]))).await;
    let mut client = world.connect_by(SANDBOX, connector.clone()).await;
    assert_eq!(client.ask(push(None), "{}").await.unwrap().reason(), (400, "MissingTopic"));
    assert_eq!(client.ask(push(Some("fr.ocpizza.livreur.voip")), "{}").await.unwrap().status, 200);

    let tcp = TcpStream::connect(world.simulator.sandbox()).await.unwrap();
    let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
    let mut raw = RawFrames::over(stream).await;
    assert!(settings(&raw.next_of(SETTINGS).await.2).contains(&(3, 1000)), "at once");

    let path = format!("DELETE /client-certificates/{}", one["fingerprint"].as_str().unwrap());
    assert_eq!(control(&world, &path, "").await.0, 204);
    assert_eq!(control(&world, &path, "").await.0, 404);
    let nonsense = json!({ "certificate_pem": "no", "topics": [] }).to_string();
    assert_eq!(control(&world, "POST /client-certificates", &nonsense).await.0, 422);
    world.end().await;
}

#[tokio::test]
async fn a_client_certificate_is_worth_nothing_without_its_key() {
    let world = World::start().await;
    let (certificate, _, pem) = client_certificate();
    let known = ClientCertificate { certificate_pem: pem, topics: vec![TOPIC.to_owned()], environments: vec![SANDBOX] };
    world.simulator.client_certificates().register(known).unwrap();
    let (_, key, _) = client_certificate();
    let key = rustls::crypto::ring::sign::any_ecdsa_type(&key).unwrap();
    let stolen = Arc::new(rustls::sign::CertifiedKey::new(vec![certificate], key));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(world.simulator.ca_pem().as_bytes()).unwrap()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(CertifiedKey::clone(&stolen))));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(world.simulator.sandbox()).await.unwrap();
    let connected = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), tcp).await;
    if let Ok(mut stream) = connected {
        assert!(stream.read_u8().await.is_err(), "TLS 1.3: the client learns of it behind its own handshake");
    }
    world.until("it is counted", |world| world.simulator.ledger().counters().tls_failures == 1).await;
    world.end().await;
}

#[tokio::test]
async fn too_many_errors_cost_the_connection_and_bad_device_tokens_weigh_double() {
    let mut world = conducted(r#"{"max_errors": 4}"#).await;
    for (tokens, what) in [
        (vec!["fa17ed4004"; 4], "four of one"),
        (vec!["fa17ed4001"; 2], "two that weigh double"),
        (
            vec!["fa17ed4100", "fa17ed4100", "fa17ed4100", "fa17ed5000", TOKEN, "fa17ed4100", "fa17ed4004", "abc"],
            "410 is free",
        ),
    ] {
        let mut client = world.connect().await;
        let last = tokens.len() - 1;
        for (n, token) in tokens.into_iter().enumerate() {
            assert!(client.end.as_mut().unwrap().try_recv().is_err(), "{what}: too soon, before {n}");
            client.push(token).await;
            assert_eq!(world.simulator.gates().state(SANDBOX).open_connections, 1, "{what}: {n} of {last}");
        }
        let _ = client.ended().await; // by GOAWAY, once the last answer was read
        world.until("it is closed", |world| world.simulator.gates().state(SANDBOX).open_connections == 0).await;
    }
    assert_eq!(world.simulator.ledger().counters().accepted, 1);
    world.end().await;
}

#[tokio::test]
async fn whatever_hangs_ends_with_the_simulator() {
    let world = World::start().await;
    let jwt = world.jwt("KEY0000001", 0);
    let gates = world.simulator.gates();
    let mut open = Vec::new();
    for token in ["fa17ed000a", "fa17ed000c"] {
        let mut raw = raised(&world).await;
        raw.post_to(3, &jwt, token).await;
        open.push(raw);
    }
    for conduct in [
        r#"{"settings": "never"}"#,
        r#"{"settings": {"after_ms": 60000}}"#,
        r#"{"read_bytes_per_second": 1}"#,
        r#"{"stream_window": 0}"#,
        r#"{"window_updates_after_ms": 60000, "idle_timeout": {"after_ms": 60000}}"#,
    ] {
        gates.set_conduct(SANDBOX, Conduct::parse(conduct).unwrap());
        let mut raw = RawFrames::open(&world).await;
        raw.begin(1, &jwt).await;
        open.push(raw);
    }
    gates.set_connects(SANDBOX, Connects::Stall, None).await;
    let _stalled = TcpStream::connect(world.simulator.sandbox()).await.unwrap();
    gates.set_connects(Environment::Production, Connects::Refuse, Some(Duration::from_secs(60))).await;
    world.until("all are open", |world| world.simulator.gates().state(SANDBOX).open_connections == 7).await;
    tokio::time::timeout(Duration::from_secs(10), world.end()).await.expect("something hangs");
}
