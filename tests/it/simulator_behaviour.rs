//! What the simulator does beyond Apple's good days: streams, connections, answers and devices at their hardest, seen
//! by a bare `h2` client and by hand-written frames.

use std::time::Duration;

use serde_json::json;
use sonnette::sim::{Action, Conduct, Environment, GoAwayOrder, Script};
use tokio::io::AsyncReadExt as _;

use crate::simulator::{RawFrames, TOKEN, World, control, settings};

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const SANDBOX: Environment = Environment::Sandbox;

/// A simulator that conducts itself so from the start.
async fn conducted(json: &str) -> World {
    World::with(|settings| settings.conduct = Conduct::parse(json).unwrap()).await
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
            break;
        }
    }
    raw.frame(PING, 0, 0, b"more yet").await;
    assert_eq!(raw.next_of(PING).await.2, b"more yet");
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
    let mut world = World::start().await;
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
        let error = crate::simulator::finish(response).await.err().unwrap();
        assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM));
    }
    world.simulator.gates().release(SANDBOX);
    assert_eq!(crate::simulator::finish(held.remove(0)).await.unwrap().status, 200);
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

/// The next frame past the PINGs with which the simulator proves that its answers were read.
async fn past_pings(raw: &mut RawFrames) -> (u8, u8, u32, Vec<u8>) {
    loop {
        let frame = raw.next().await;
        if (frame.0, frame.1) != (PING, 0) {
            return frame;
        }
        raw.frame(PING, ACK, 0, &frame.3).await;
    }
}

#[tokio::test]
async fn a_goaway_may_be_text_or_empty_and_come_twice() {
    let world = World::start().await;
    for (order, debug) in [
        ("{}", r#"{"reason":"Shutdown"}"#),
        (r#"{"debug": "Maximum connection lifetime reached.", "times": 2}"#, "Maximum connection lifetime reached."),
        (r#"{"debug": "", "times": 3, "code": 11, "last_stream": 1}"#, ""),
    ] {
        let mut raw = raised(&world).await;
        assert_eq!(control(&world, "POST /environments/sandbox/go-away", order).await.0, 200);
        let order: serde_json::Value = serde_json::from_str(order).unwrap();
        let last = order["last_stream"].as_u64().unwrap_or(0x7fff_ffff);
        let code = order["code"].as_u64().unwrap_or(0);
        let head = u64::to_be_bytes(last << 32 | code);
        for _ in 0..order["times"].as_u64().unwrap_or(1) {
            let (kind, _, _, payload) = past_pings(&mut raw).await;
            assert_eq!((kind, payload), (GOAWAY, [&head, debug.as_bytes()].concat()), "{order}");
        }
        drop(raw);
        world.until("it is closed", |world| world.simulator.gates().state(SANDBOX).open_connections == 0).await;
    }
    world.end().await;
}

#[tokio::test]
async fn a_connection_may_stay_open_behind_goaway_without_ever_taking_a_stream_again() {
    let world = World::start().await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = raised(&world).await;
    world.simulator.gates().go_away(SANDBOX, &GoAwayOrder { linger: true, ..GoAwayOrder::default() });
    let (kind, _, _, payload) = past_pings(&mut raw).await;
    assert_eq!((kind, &payload[..4]), (GOAWAY, [0, 0, 0, 1].as_slice()), "the last stream is the last one opened");
    for stream in [3, 5] {
        raw.post(stream, &jwt).await;
        raw.frame(PING, 0, 0, b"still up").await;
        let (kind, flags, _, _) = past_pings(&mut raw).await;
        assert_eq!((kind, flags), (PING, ACK));
    }
    assert_eq!(world.simulator.ledger().counters().requests, 1);
    assert_eq!(world.simulator.gates().state(SANDBOX).open_connections, 1);
    world.end().await;
}

#[tokio::test]
async fn conduct_is_changed_whole_or_in_part_and_nonsense_changes_nothing() {
    let world = World::start().await;
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
