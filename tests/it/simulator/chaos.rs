//! Faults by rate: what each does, that a seed repeats itself, and that the ledger is right about all of it.

use std::collections::BTreeMap;

use sonnette::sim::{ChaosApplied, ChaosPlan, Truth, TruthQuery, Verdict};
use uuid::Uuid;

use super::{truth::endings, *};
use crate::support::{
    scratch::Folder,
    service::{SimulatorProcess, run},
    world::keys_folder,
};

fn plan(json: Value) -> ChaosPlan {
    serde_json::from_value(json).unwrap()
}

fn always(action: &Value) -> ChaosPlan {
    plan(json!({ "seed": 1, "faults": [{ "rate": 1.0, "action": action }] }))
}

fn id(number: usize) -> String {
    Uuid::from_u128(number as u128 + 1).to_string()
}

impl World {
    fn plan(&self, plan: ChaosPlan) {
        self.simulator.chaos().set(Environment::Sandbox, plan).unwrap();
    }

    fn applied(&self) -> ChaosApplied {
        self.simulator.chaos().plan(Environment::Sandbox).unwrap().1
    }
}

/// What a client saw of an attempt.
async fn seen(client: &mut Client, token: &str, id: &str) -> String {
    let request = client.request(token).header("apns-id", id);
    match client.ask(request, "{}").await {
        Ok(answer) => format!("{} {}", answer.status, answer.reason().1),
        Err(error) if error.is_reset() => format!("reset {:?}", error.reason().unwrap()),
        Err(error) if error.is_go_away() && error.is_remote() => "go away".to_owned(),
        Err(_) => "lost".to_owned(),
    }
}

#[tokio::test]
async fn each_fault_does_what_it_says_and_the_ledger_is_right_about_it() {
    for (action, expected, ending) in [
        (
            json!({ "answer": { "status": 500, "reason": "InternalServerError" } }),
            "500 InternalServerError",
            "refused_certain",
        ),
        (
            json!({ "answer": { "status": 503, "reason": "ServiceUnavailable" } }),
            "503 ServiceUnavailable",
            "refused_certain",
        ),
        (json!({ "answer": { "status": 503, "reason": "Shutdown" } }), "503 Shutdown", "refused_certain"),
        (json!({ "answer": { "status": 429, "reason": "TooManyRequests" } }), "429 TooManyRequests", "refused_certain"),
        (json!({ "answer": { "status": 410, "reason": "Unregistered" } }), "410 Unregistered", "refused_certain"),
        (json!({ "answer": { "status": 418, "reason": "NeverHeardOf" } }), "418 NeverHeardOf", "refused_certain"),
        (json!({ "reset": { "code": 7 } }), "reset REFUSED_STREAM", "unprocessed_certain"),
        (json!({ "reset": { "code": 2 } }), "reset INTERNAL_ERROR", "unanswered"),
        (json!({ "reset": { "code": 2, "accepted": true } }), "reset INTERNAL_ERROR", "accepted_unanswered"),
        (json!({ "close": {} }), "lost", "unanswered"),
        (json!({ "close": { "accepted": true } }), "lost", "accepted_unanswered"),
        (json!({ "close_tls": {} }), "lost", "unanswered"),
        (json!({ "close_tls": { "accepted": true } }), "lost", "accepted_unanswered"),
        (json!({ "go_away": { "last_stream": "before_this" } }), "go away", "unprocessed_certain"),
        (
            json!({ "go_away": { "last_stream": "before_this", "twice": true, "debug": "" } }),
            "go away",
            "unprocessed_certain",
        ),
        (json!({ "go_away": {} }), "200 ", "accepted_certain"),
        (json!({ "stream_limit": { "limit": 3 } }), "200 ", "accepted_certain"),
        (json!("accept"), "200 ", "accepted_certain"),
    ] {
        let mut world = World::start().await;
        let mut client = world.connect().await;
        assert_eq!(client.push("00aa").await.status, 200);
        world.plan(always(&action));
        assert_eq!(seen(&mut client, TOKEN, &id(0)).await, expected, "{action}");
        world.simulator.ledger().clear_truth(); // it forgets: the record below is that of the second attempt alone
        let mut client = world.connect().await;
        assert_eq!(seen(&mut client, TOKEN, &id(0)).await, expected, "{action}: on another connection");
        let truth = world.truth_of(TOKEN, &id(0)).await;
        assert_eq!(endings(&truth), [(ending.to_owned(), 1)], "{action}");
        assert_eq!(truth.gone_certain, u32::from(expected.starts_with("410")));
        assert_eq!(world.applied().faults, [2]);
        world.end().await;
    }
}

#[tokio::test]
async fn a_push_may_be_stalled_before_or_after_it_is_accepted() {
    for (accepted, ending) in [(false, "unanswered"), (true, "accepted_unanswered")] {
        let mut world = World::start().await;
        world.plan(always(&json!({ "stall": { "accepted": accepted } })));
        let mut client = world.connect().await;
        let stalled = client.begin(client.request(TOKEN).header("apns-id", id(0)), "{}").await.unwrap();
        world.until("it has stalled", |world| world.simulator.ledger().summary().pushes == 1).await;
        let truth = world.truth_of(TOKEN, &id(0)).await;
        assert_eq!((endings(&truth), truth.verdict), (vec![(ending.to_owned(), 1)], Verdict::Ambiguous));
        drop(stalled);
        world.end().await;
    }
}

#[tokio::test]
async fn a_dead_token_is_dead_for_every_push_and_says_since_now() {
    let mut world = World::start().await;
    world.plan(plan(json!({ "seed": 5, "dead_tokens": 0.5, "affected_attempts": 1,
        "faults": [{ "rate": 1.0, "action": { "answer": { "status": 500 } } }] })));
    let mut client = world.connect().await;
    let mut dead = 0;
    for number in 0..20 {
        let token = format!("{number:064x}");
        let is_dead = world.simulator.chaos().is_dead(Environment::Sandbox, &token);
        dead += u64::from(is_dead);
        for push in 0..2 {
            world.clock.advance(Duration::from_secs(1));
            let now = world.clock.now().as_millis();
            let request = client.request(&token).header("apns-id", id(push));
            let answer = client.ask(request, "{}").await.unwrap();
            let expected = if is_dead { (410, Some(now)) } else { (500, None) };
            assert_eq!((answer.status, answer.body["timestamp"].as_i64()), expected);
        }
    }
    assert!((5..16).contains(&dead), "{dead}");
    assert_eq!(world.applied(), ChaosApplied { dead_tokens: 2 * dead, faults: vec![2 * (20 - dead)] });
    world.end().await;
}

/// What three attempts of each of 60 pushes see, sent one after another or by 6 connections at once, last first.
async fn three_attempts(seed: u64, at_once: bool) -> BTreeMap<usize, Vec<String>> {
    let mut world = World::start().await;
    let mut clients = Vec::new();
    for _ in 0..if at_once { 6 } else { 1 } {
        let mut client = world.connect().await;
        assert_eq!(client.push("00aa").await.status, 200);
        clients.push(client);
    }
    let answer = |status: u16| json!({ "answer": { "status": status } });
    world.plan(plan(json!({ "seed": seed, "faults": [
        { "rate": 0.2, "action": answer(500) },
        { "rate": 0.1, "action": answer(429) },
        { "rate": 0.2, "action": { "reset": { "code": 2, "accepted": true } } },
        { "rate": 0.1, "action": { "reset": { "code": 7 } } },
    ] })));
    let mut running = JoinSet::new();
    let each = 60 / clients.len();
    for (place, mut client) in clients.into_iter().enumerate() {
        running.spawn(async move {
            let mut all = Vec::new();
            let mut numbers: Vec<_> = (place * each..(place + 1) * each).collect();
            if at_once {
                numbers.reverse();
            }
            for number in numbers {
                let mut attempts = Vec::new();
                for _ in 0..3 {
                    attempts.push(seen(&mut client, &format!("{:064x}", number % 7), &id(number)).await);
                }
                all.push((number, attempts));
            }
            all
        });
    }
    let mut all = BTreeMap::new();
    while let Some(some) = running.join_next().await {
        all.extend(some.unwrap());
    }
    world.end().await;
    all
}

#[tokio::test]
async fn the_same_seed_does_the_same_whatever_the_order_and_another_does_not() {
    let first = three_attempts(11, false).await;
    assert_eq!(first, three_attempts(11, true).await);
    assert_ne!(first, three_attempts(12, false).await);
    let attempts = |place: usize| first.values().map(move |attempts| attempts[place].clone()).collect::<Vec<_>>();
    assert_ne!(attempts(0), attempts(1), "each attempt is another decision");
}

#[tokio::test]
async fn faults_end_after_the_affected_attempts_of_a_push() {
    let mut world = World::start().await;
    world.plan(plan(json!({ "seed": 1, "affected_attempts": 2,
        "faults": [{ "rate": 1.0, "action": { "answer": { "status": 500, "reason": "InternalServerError" } } }] })));
    let mut client = world.connect().await;
    for push in 0..2 {
        let mut statuses = Vec::new();
        for _ in 0..3 {
            statuses.push(seen(&mut client, TOKEN, &id(push)).await);
        }
        assert_eq!(statuses, ["500 InternalServerError", "500 InternalServerError", "200 "], "push {push}");
    }
    world.end().await;
}

#[tokio::test]
async fn pushes_without_an_id_are_decided_by_their_place_among_those_of_their_token() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let mut world = World::start().await;
        world.plan(plan(json!({ "seed": 3, "affected_attempts": 1,
            "faults": [{ "rate": 0.5, "action": { "answer": { "status": 500 } } }] })));
        let mut client = world.connect().await;
        let mut statuses = Vec::new();
        for _ in 0..40 {
            statuses.push(client.push(TOKEN).await.status);
        }
        runs.push(statuses);
        world.end().await;
    }
    assert_eq!(runs[0], runs[1]);
    assert!(runs[0][20..].contains(&200) && runs[0][20..].contains(&500), "{:?}", runs[0]);
}

#[tokio::test]
async fn latency_is_waited_on_the_clock_and_differs_by_push() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    world.plan(plan(json!({ "seed": 9, "latency": { "percentiles_ms": { "p50": 1000, "max": 100_000 } } })));
    let mut waiting = Vec::new();
    for number in 0..40 {
        waiting.push(client.begin(client.request(TOKEN).header("apns-id", id(number)), "{}").await.unwrap());
    }
    let open = |world: &World| world.simulator.ledger().summary().waiting;
    world.until("all wait", |world| open(world) == 40).await;
    world.clock.advance(Duration::from_secs(1));
    world.until("about half are answered", |world| open(world) < 30).await;
    assert!(open(&world) > 10, "{}", open(&world));
    world.clock.advance(Duration::from_secs(100));
    for response in waiting {
        assert_eq!(finish(response).await.unwrap().status, 200);
    }
    world.end().await;
}

#[tokio::test]
async fn scripts_and_prefixes_go_before_chaos() {
    let mut world = World::start().await;
    world.plan(always(&json!({ "answer": { "status": 500 } })));
    world.simulator.scripts().add(Script::new(TOKEN, Action::Accept).times(1));
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    assert_eq!(client.push(&format!("{PREFIX}4100")).await.status, 410);
    assert_eq!(client.push("abc").await.status, 400, "and every check does");
    assert_eq!(client.push(TOKEN).await.status, 500);
    let mut production = world.connect_to(Environment::Production).await;
    assert_eq!(production.push(TOKEN).await.status, 200, "the plan is the sandbox's");
    assert!(world.simulator.chaos().clear(Environment::Sandbox));
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.end().await;
}

#[tokio::test]
async fn a_goaway_may_come_twice_and_with_any_debug_data() {
    for (debug, expected) in
        [(json!(null), r#"{"reason":"Shutdown"}"#), (json!("going down"), "going down"), (json!(""), "")]
    {
        let world = World::start().await;
        world.plan(always(
            &json!({ "go_away": { "last_stream": "before_this", "code": 0, "twice": true, "debug": debug } }),
        ));
        let mut raw = RawFrames::open(&world).await;
        raw.post(1, &world.jwt("KEY0000001", 0)).await;
        let first = loop {
            let (kind, _, _, payload) = raw.next().await;
            if kind == 7 {
                break payload;
            }
        };
        assert_eq!(first, [&[0; 8], expected.as_bytes()].concat());
        let (kind, _, _, second) = raw.next().await;
        assert_eq!((kind, second), (7, first), "in a row");
        world.end().await;
    }
}

#[tokio::test]
async fn a_goaway_never_excludes_what_was_processed() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    let before = Action::GoAway { last_stream: LastStream::BeforeThis, code: 0, debug: None, twice: false };
    world.simulator.scripts().add(Script::new("00bb", before).times(1).after_ms(1000));
    let slow = client.begin(client.request("00bb"), "{}").await.unwrap(); // stream 3
    assert_eq!(client.push("00cc").await.status, 200); // stream 5
    world.clock.advance(Duration::from_secs(1));
    assert_eq!(finish(slow).await.unwrap().status, 200);
    world.end().await;
}

#[tokio::test]
async fn what_arrived_together_with_a_push_that_a_goaway_excludes_is_excluded_too() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    world.simulator.gates().hold(Environment::Sandbox);
    let before = Action::GoAway { last_stream: LastStream::BeforeThis, code: 0, debug: None, twice: false };
    world.simulator.scripts().add(Script::new("00bb", before).times(1));
    let mut waiting = Vec::new();
    for token in ["00bb", "00cc"] {
        waiting.push(client.begin(client.request(token).header("apns-id", id(0)), "{}").await.unwrap());
    }
    world.until("both are held", |world| world.simulator.ledger().summary().waiting == 2).await;
    world.simulator.gates().release(Environment::Sandbox);
    for response in waiting {
        assert!(finish(response).await.err().unwrap().is_go_away());
    }
    let truth = world.truth_of("00cc", &id(0)).await;
    assert_eq!(endings(&truth), [("unprocessed_certain".to_owned(), 1)]);
    world.end().await;
}

#[tokio::test]
async fn a_push_that_was_stalled_and_then_excluded_by_a_goaway_was_not_processed() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    let all_but_the_first = Action::GoAway { last_stream: LastStream::Exactly(1), code: 0, debug: None, twice: false };
    world.simulator.scripts().add(Script::new("00cc", Action::Stall { accepted: false }).times(1));
    world.simulator.scripts().add(Script::new("00bb", all_but_the_first).times(1));
    let mut waiting = Vec::new();
    for token in ["00cc", "00bb"] {
        waiting.push(client.begin(client.request(token).header("apns-id", id(0)), "{}").await.unwrap());
    }
    for response in waiting {
        assert!(finish(response).await.err().unwrap().is_go_away());
    }
    let truth = world.truth_of("00cc", &id(0)).await;
    assert_eq!(endings(&truth), [("unprocessed_certain".to_owned(), 1)]);
    world.end().await;
}

#[tokio::test]
async fn a_connection_that_goes_away_is_not_sent_away_again() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    world.simulator.gates().hold(Environment::Sandbox);
    world.plan(always(&json!({ "go_away": { "last_stream": "before_this" } })));
    let mut waiting = Vec::new();
    for number in 0..3 {
        waiting.push(client.begin(client.request(TOKEN).header("apns-id", id(number)), "{}").await.unwrap());
    }
    world.until("three are held", |world| world.simulator.ledger().summary().waiting == 3).await;
    let graceful = GoAwayOrder::default();
    world.simulator.gates().go_away(Environment::Sandbox, &graceful);
    world.simulator.gates().release(Environment::Sandbox);
    for response in waiting {
        assert_eq!(finish(response).await.unwrap().status, 200);
    }
    world.end().await;
}

#[tokio::test]
async fn tls_is_ended_in_good_order_and_without_a_goaway() {
    let world = World::start().await;
    world.plan(always(&json!({ "close_tls": {} })));
    let mut raw = RawFrames::open(&world).await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), raw.stream.read_to_end(&mut rest)).await;
    read.expect("the end").expect("`close_notify`, else rustls calls it an error");
    let mut kinds = Vec::new();
    let mut rest = rest.as_slice();
    while let Some((head, behind)) = rest.split_at_checked(9) {
        kinds.push(head[3]);
        rest = &behind[u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize..];
    }
    assert!(!kinds.contains(&7) && !kinds.contains(&1), "{kinds:?}");
    world.end().await;
}

#[tokio::test]
async fn a_stream_limit_falls_by_rate_too() {
    let world = World::start().await;
    world.plan(always(&json!({ "stream_limit": { "limit": 3 } })));
    let mut raw = RawFrames::open(&world).await;
    raw.next_of(4).await;
    raw.frame(4, 1, 0, b"").await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    assert!(settings(&raw.next_of(4).await.2).contains(&(3, 3)));
    world.end().await;
}

#[tokio::test]
async fn plans_are_set_shown_and_cleared_by_the_control_api() {
    let mut world = World::start().await;
    assert_eq!(control(&world, "GET /environments/sandbox/chaos", "").await.0, 404);
    let body = r#"{"seed":4,"affected_attempts":3,"dead_tokens":0.25,"latency":{"uniform_ms":{"min":1,"max":2}},
        "faults":[{"rate":0.5,"action":{"close":{"accepted":true}}}]}"#;
    assert_eq!(control(&world, "PUT /environments/sandbox/chaos", body).await.0, 204);
    let (_, shown) = control(&world, "GET /environments/sandbox/chaos", "").await;
    assert_eq!(shown["plan"], serde_json::from_str::<Value>(body).unwrap());
    assert_eq!(shown["applied"], json!({ "dead_tokens": 0, "faults": [0] }));
    for (body, status) in [
        (r#"{"seed":4,"dead_tokens":2}"#, 422),
        (r#"{"seed":4,"faults":[{"rate":0.1,"action":"explode"}]}"#, 422),
        (r#"{"seed":4,"fault":[]}"#, 422),
        ("{", 400),
    ] {
        assert_eq!(control(&world, "PUT /environments/sandbox/chaos", body).await.0, status, "{body}");
    }
    assert_eq!(
        control(&world, "GET /environments/sandbox/chaos", "").await.1["plan"]["seed"],
        4,
        "nothing has changed"
    );
    assert_eq!(control(&world, "DELETE /environments/sandbox/chaos", "").await.0, 204);
    assert_eq!(control(&world, "DELETE /environments/sandbox/chaos", "").await.0, 404);
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.end().await;
    let world = World::with(|settings| settings.record_attempts = false).await;
    let (status, error) = control(&world, "PUT /environments/sandbox/chaos", r#"{"seed":4}"#).await;
    assert_eq!(status, 422);
    assert!(error["error"].as_str().unwrap().contains("--no-ledger"), "{error}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_is_given_on_the_command_line() {
    let folder = Folder::new("chaos");
    let keys = keys_folder(&folder, "");
    let file = folder.path().join("chaos.json");
    std::fs::write(&file, r#"{"seed": 1, "faults": [{"rate": 2, "action": "accept"}]}"#).unwrap();
    let arguments = ["simulator", "--listen-control", "127.0.0.1:0", "--chaos", file.to_str().unwrap()];
    let (status, _, error) = run(folder.path(), &arguments);
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("`faults[0].rate` is not a rate from 0 to 1"), "{error}");
    std::fs::write(&file, r#"{"seed": 1, "fault": []}"#).unwrap();
    let (_, _, error) = run(folder.path(), &arguments);
    assert!(error.contains("chaos.json") && error.contains("unknown field `fault`"), "{error}");
    std::fs::write(&file, r#"{"seed": 77, "faults": [{"rate": 0.5, "action": "accept"}]}"#).unwrap();
    let simulator = SimulatorProcess::start(folder.path(), &keys, &["--chaos", file.to_str().unwrap()]).await;
    for environment in ["production", "sandbox"] {
        let shown = simulator.control.get(&format!("/environments/{environment}/chaos")).await.ok();
        assert_eq!(shown["plan"]["seed"], 77);
    }
}

/// How often a client read each of three things about a push.
#[derive(Debug, Default)]
struct Read {
    accepted: u32,
    refused: u32,
    unprocessed: u32,
    /// How often it gave up waiting: what came at that moment it may have read all the same.
    given_up: u32,
}

/// Sends pushes until each was accepted, refused for good, or tried ten times, on one connection after another.
async fn send_all(
    connector: TlsConnector,
    address: std::net::SocketAddr,
    jwt: String,
    pushes: Vec<usize>,
) -> BTreeMap<usize, Read> {
    let mut read: BTreeMap<usize, Read> = BTreeMap::new();
    let mut left: Vec<_> = pushes.into_iter().map(|push| (push, 0)).collect();
    while !left.is_empty() {
        let tcp = TcpStream::connect(address).await.unwrap();
        let Ok(tls) = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await else { continue };
        let builder = h2::client::Builder::new().initial_max_send_streams(1).handshake::<_, Bytes>(tls).await;
        let Ok((send, connection)) = builder else { continue };
        let mut running = JoinSet::new();
        running.spawn(async move {
            let _ = connection.await;
            None
        });
        let mut client = Client { send, jwt: jwt.clone(), end: None };
        let mut again = Vec::new();
        while let Some((push, attempts)) = left.pop() {
            let request = client.request(&format!("{:064x}", push % 50)).header("apns-id", id(push));
            let Ok(Ok(response)) = tokio::time::timeout(Duration::from_secs(2), client.begin(request, "{}")).await
            else {
                left.push((push, attempts));
                break; // the connection is of no more use
            };
            running.spawn(async move {
                // A stalled push is given up.
                let answer = tokio::time::timeout(Duration::from_millis(500), finish(response)).await;
                Some((push, attempts + 1, answer))
            });
        }
        drop(client);
        while let Some(done) = running.join_next().await {
            let Some((push, attempts, answer)) = done.unwrap() else { continue };
            let read = read.entry(push).or_default();
            let is_over = match answer {
                Ok(Ok(answer)) if answer.status == 200 => {
                    read.accepted += 1;
                    true
                }
                Ok(Ok(answer)) => {
                    read.refused += 1;
                    answer.status == 410
                }
                Ok(Err(error))
                    if error.is_remote()
                        && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM)) =>
                {
                    read.unprocessed += 1;
                    false
                }
                Ok(Err(_)) => false,
                Err(_) => {
                    read.given_up += 1;
                    false
                }
            };
            if !is_over && attempts < 10 {
                again.push((push, attempts));
            }
        }
        left.append(&mut again);
    }
    read
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_middle_of_everything_the_ledger_agrees_with_what_a_client_has_read() {
    let seed: u64 = rand::random();
    let world = World::start().await;
    world.plan(plan(json!({ "seed": seed, "affected_attempts": 4, "dead_tokens": 0.05, "faults": [
        { "rate": 0.02, "action": { "answer": { "status": 500, "reason": "InternalServerError" } } },
        { "rate": 0.002, "action": { "answer": { "status": 503, "reason": "Shutdown" } } },
        { "rate": 0.02, "action": { "answer": { "status": 429, "reason": "TooManyRequests" } } },
        { "rate": 0.005, "action": { "stall": { "accepted": false } } },
        { "rate": 0.005, "action": { "stall": { "accepted": true } } },
        { "rate": 0.02, "action": { "reset": { "code": 7 } } },
        { "rate": 0.02, "action": { "reset": { "code": 2 } } },
        { "rate": 0.02, "action": { "reset": { "code": 2, "accepted": true } } },
        { "rate": 0.003, "action": { "close": { "accepted": false } } },
        { "rate": 0.003, "action": { "close": { "accepted": true } } },
        { "rate": 0.003, "action": { "close_tls": { "accepted": true } } },
        { "rate": 0.003, "action": { "go_away": {} } },
        { "rate": 0.003, "action": { "go_away": { "last_stream": "before_this", "twice": true, "debug": "" } } },
        { "rate": 0.005, "action": { "stream_limit": { "limit": 5 } } },
        { "rate": 0.01, "action": { "stream_limit": { "limit": 1000 } } },
    ] })));
    let mut running = JoinSet::new();
    for worker in 0..4 {
        let pushes = (worker * 300..(worker + 1) * 300).collect();
        running.spawn(send_all(
            world.connector(&[b"h2"]),
            world.simulator.sandbox(),
            world.jwt("KEY0000001", 0),
            pushes,
        ));
    }
    let mut read = BTreeMap::new();
    while let Some(some) = running.join_next().await {
        read.extend(some.unwrap());
    }
    let summary = world.settled().await;
    let query = TruthQuery { limit: Some(usize::MAX), ..TruthQuery::default() };
    let truths = world.simulator.ledger().truth(&query).0;
    assert_eq!(truths.len() as u64, summary.pushes);
    let none = Read::default();
    for truth in &truths {
        let read = read.get(&(usize::try_from(truth.apns_id.as_u128()).unwrap() - 1)).unwrap_or(&none);
        let between = |certain: u32, read: u32, uncertain: u32| certain <= read && read <= certain + uncertain;
        let shown = format!("seed {seed}: {read:?} {truth:?}");
        assert!(between(truth.accepted_certain, read.accepted, truth.accepted_uncertain), "{shown}");
        assert!(between(truth.refused_certain, read.refused, truth.refused_uncertain), "{shown}");
        // A stream may also be refused before it was read, or excluded: of that there is no trace.
        assert!(truth.unprocessed_certain <= read.unprocessed + read.given_up, "{shown}");
        let dead = world.simulator.chaos().is_dead(Environment::Sandbox, &truth.token);
        assert_eq!(
            dead,
            truth.gone_certain + truth.gone_uncertain > 0 || (dead && truth.last_status.is_none()),
            "{shown}"
        );
        assert!(!dead || truth.accepted == 0, "{shown}");
    }
    let all = |number: fn(&Truth) -> u32| truths.iter().map(|truth| u64::from(number(truth))).sum::<u64>();
    let certain = all(|truth| truth.accepted_certain);
    let uncertain = all(|truth| truth.accepted_uncertain);
    let acceptances = all(|truth| truth.accepted_unanswered) + certain + uncertain;
    assert_eq!((summary.acceptances, world.simulator.ledger().counters().accepted), (acceptances, acceptances));
    let faults = world.applied().faults;
    assert!(faults.iter().sum::<u64>() > 100, "seed {seed}: {faults:?}");
    let repeats = world.simulator.ledger().repeats();
    assert_eq!(repeats.len() as u64, summary.accepted_repeatedly);
    assert!(!repeats.is_empty());
    world.end().await;
}
