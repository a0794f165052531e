//! The ledger's truth: what became of every push, and what its provider could have known.

use sonnette::sim::{Summary, Truth, TruthQuery, Verdict};
use uuid::Uuid;

use super::*;

const ID: &str = "123e4567-e89b-12d3-a456-4266554400a0";

impl World {
    /// The truth about a push, once nothing about it can change any more.
    pub(super) async fn truth_of(&self, token: &str, id: &str) -> Truth {
        self.settled().await;
        let id = Uuid::parse_str(id).unwrap();
        self.simulator.ledger().truth_of(Environment::Sandbox, token, id).unwrap_or_else(|| panic!("no {token}"))
    }

    async fn truth(&self, token: &str) -> Truth {
        self.truth_of(token, ID).await
    }

    pub(super) async fn settled(&self) -> Summary {
        let is_final = |summary: Summary| summary.waiting == 0 && summary.unproved == 0;
        self.until("the ledger is final", |world| is_final(world.simulator.ledger().summary())).await;
        self.simulator.ledger().summary()
    }
}

impl Client {
    /// The push `ID` to `token`.
    async fn attempt(&mut self, token: &str) -> Result<Answer, h2::Error> {
        let request = self.request(token).header("apns-id", ID);
        self.ask(request, "{}").await
    }
}

/// The numbers in which the attempts of a push are, as they are named in JSON.
pub(super) fn endings(truth: &Truth) -> Vec<(String, u64)> {
    let shown = serde_json::to_value(truth).unwrap();
    let is_ending = |name: &str| {
        let is_told = name.contains("certain") && !name.starts_with("gone"); // `uncertain` too
        is_told || name.contains("unanswered") || name == "waiting"
    };
    let numbers = shown.as_object().unwrap().iter().filter(|(name, _)| is_ending(name));
    numbers.map(|(name, number)| (name.clone(), number.as_u64().unwrap())).collect()
}

fn one(ending: &str) -> Vec<(String, u64)> {
    vec![(ending.to_owned(), 1)]
}

#[tokio::test]
async fn an_answer_that_the_client_has_read_is_certain() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.attempt(TOKEN).await.unwrap().status, 200);
    let truth = world.truth(TOKEN).await;
    assert_eq!((truth.received, truth.accepted, truth.verdict), (1, 1, Verdict::Accepted));
    assert_eq!((endings(&truth), truth.last_status, truth.last_reason), (one("accepted_certain"), Some(200), None));
    let busy = format!("{PREFIX}4290");
    assert_eq!(client.attempt(&busy).await.unwrap().status, 429);
    let truth = world.truth(&busy).await;
    assert_eq!((truth.accepted, truth.verdict, endings(&truth)), (0, Verdict::Refused, one("refused_certain")));
    assert_eq!((truth.last_status, truth.last_reason.as_deref()), (Some(429), Some("TooManyRequests")));
    let gone = format!("{PREFIX}4100");
    assert_eq!(client.attempt(&gone).await.unwrap().status, 410);
    let truth = world.truth(&gone).await;
    assert_eq!((truth.gone_certain, truth.refused_certain, truth.gone_uncertain), (1, 1, 0));
    world.end().await;
}

#[tokio::test]
async fn a_push_that_is_not_answered_is_so_in_the_ledger_accepted_or_not() {
    let mut world = World::start().await;
    for (action, ending) in [
        (Action::Stall { accepted: false }, "unanswered"),
        (Action::Stall { accepted: true }, "accepted_unanswered"),
        (Action::Reset { code: 2, accepted: false }, "unanswered"),
        (Action::Reset { code: 2, accepted: true }, "accepted_unanswered"),
        (Action::Reset { code: 7, accepted: true }, "accepted_unanswered"),
        (Action::Close { accepted: false }, "unanswered"),
        (Action::Close { accepted: true }, "accepted_unanswered"),
    ] {
        world.simulator.ledger().clear_truth();
        world.simulator.scripts().add(Script::new(TOKEN, action.clone()).times(1));
        let mut client = world.connect().await;
        let unanswered = client.begin(client.request(TOKEN).header("apns-id", ID), "{}").await.unwrap();
        world.until("it is there", |world| world.simulator.ledger().summary().pushes == 1).await;
        let truth = world.truth(TOKEN).await;
        assert_eq!((endings(&truth), truth.verdict), (one(ending), Verdict::Ambiguous), "{action:?}");
        assert_eq!(truth.last_status, None);
        drop(unanswered);
    }
    world.end().await;
}

#[tokio::test]
async fn a_client_that_read_that_its_push_was_not_processed_knows_it() {
    let mut world = World::start().await;
    let go_away = Action::GoAway { last_stream: LastStream::BeforeThis, code: 0, debug: None, twice: false };
    for action in [Action::Reset { code: 7, accepted: false }, go_away] {
        world.simulator.ledger().clear_truth();
        let mut client = world.connect().await;
        assert_eq!(client.push("00aa").await.status, 200);
        world.simulator.scripts().add(Script::new(TOKEN, action.clone()).times(1));
        assert!(client.attempt(TOKEN).await.is_err());
        let truth = world.truth(TOKEN).await;
        assert_eq!((endings(&truth), truth.verdict), (one("unprocessed_certain"), Verdict::Refused), "{action:?}");
    }
    world.end().await;
}

/// A client that answers no PING has sent one push and the simulator has answered it.
async fn answered_raw(world: &World) -> RawFrames {
    let mut raw = RawFrames::open(world).await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    world.until("it is answered", |world| world.simulator.ledger().counters().answered == 1).await;
    raw
}

/// The only push.
async fn only(world: &World) -> Truth {
    world.settled().await;
    world.simulator.ledger().truth(&TruthQuery::default()).0.remove(0)
}

#[tokio::test]
async fn an_answer_on_a_connection_that_is_reset_before_the_client_proved_to_have_read_it_is_uncertain() {
    let world = World::start().await;
    let mut raw = answered_raw(&world).await;
    raw.next_of(6).await; // the PING behind the answer is there, but stays unanswered
    assert_eq!(world.simulator.ledger().summary().unproved, 1);
    assert_eq!(world.simulator.gates().close(Environment::Sandbox, None), 1);
    let truth = only(&world).await;
    assert_eq!((endings(&truth), truth.verdict), (one("accepted_uncertain"), Verdict::Ambiguous));
    assert_eq!((truth.accepted, truth.apns_id_made), (1, true));
    world.end().await;
}

#[tokio::test]
async fn a_second_ping_acknowledged_behind_an_answer_proves_it() {
    let world = World::start().await;
    let mut raw = answered_raw(&world).await;
    let (_, _, payload) = raw.next_of(6).await;
    raw.frame(6, 1, 0, b"00000000").await; // somebody else's
    raw.frame(6, 0, 0, b"are they").await;
    while raw.next_of(6).await.0 & 1 == 0 {}
    raw.frame(6, 1, 0, &payload).await;
    let (_, _, payload) = raw.next_of(6).await;
    assert_eq!(world.simulator.ledger().summary().unproved, 1, "a reset may still be on its way");
    raw.frame(6, 1, 0, &payload).await;
    assert_eq!(endings(&only(&world).await), one("accepted_certain"));
    world.end().await;
}

#[tokio::test]
async fn an_answer_to_a_stream_that_the_client_gave_up_is_uncertain() {
    let world = World::start().await;
    let mut raw = answered_raw(&world).await;
    let (_, _, payload) = raw.next_of(6).await;
    raw.frame(6, 1, 0, &payload).await;
    raw.frame(3, 0, 1, &[0, 0, 0, 8]).await; // RST_STREAM(CANCEL), decided before the answer was read
    let (_, _, payload) = raw.next_of(6).await;
    raw.frame(6, 1, 0, &payload).await;
    assert_eq!(endings(&only(&world).await), one("accepted_uncertain"));
    world.end().await;
}

#[tokio::test]
async fn a_goaway_tells_nothing_of_a_stream_that_the_client_had_given_up() {
    let world = World::start().await;
    world.simulator.gates().hold(Environment::Sandbox);
    let mut raw = RawFrames::open(&world).await;
    raw.frame(4, 1, 0, b"").await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    world.until("it is held", |world| world.simulator.ledger().summary().waiting == 1).await;
    raw.frame(3, 0, 1, &[0, 0, 0, 8]).await;
    raw.frame(6, 0, 0, b"are they").await; // its acknowledgement says that the reset was read
    while raw.next_of(6).await.0 & 1 == 0 {}
    let order = GoAwayOrder { last_stream: Some(0), ..GoAwayOrder::default() };
    world.simulator.gates().go_away(Environment::Sandbox, &order);
    raw.next_of(7).await;
    assert_eq!(endings(&only(&world).await), one("unanswered"));
    world.end().await;
}

#[tokio::test]
async fn a_client_that_ends_tls_in_good_order_has_read_what_it_acknowledged() {
    for (acknowledges, in_order, ending) in
        [(true, true, "accepted_certain"), (true, false, "accepted_uncertain"), (false, true, "accepted_uncertain")]
    {
        let world = World::start().await;
        let mut raw = answered_raw(&world).await;
        let (_, _, payload) = raw.next_of(6).await;
        if acknowledges {
            raw.frame(6, 1, 0, &payload).await;
            raw.next_of(6).await;
        }
        if in_order {
            raw.stream.shutdown().await.unwrap();
        }
        drop(raw);
        assert_eq!(endings(&only(&world).await), one(ending), "acknowledges {acknowledges}, in order {in_order}");
        world.end().await;
    }
}

#[tokio::test]
async fn the_simulator_ends_a_connection_so_that_its_last_answer_can_be_read_and_proved() {
    let world = World::start().await;
    world.simulator.gates().hold(Environment::Sandbox);
    let mut raw = RawFrames::open(&world).await;
    raw.frame(4, 1, 0, b"").await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    world.until("it is held", |world| world.simulator.ledger().summary().waiting == 1).await;
    world.simulator.gates().go_away(Environment::Sandbox, &GoAwayOrder::default());
    raw.next_of(7).await;
    let (_, _, payload) = raw.next_of(6).await;
    raw.frame(6, 1, 0, &payload).await;
    raw.next_of(7).await; // the second GOAWAY: from here the connection ends with its last stream
    world.simulator.gates().release(Environment::Sandbox);
    raw.next_of(1).await;
    let (_, _, payload) = raw.next_of(6).await;
    raw.frame(6, 1, 0, &payload).await;
    while raw.stream.read_u8().await.is_ok() {}
    raw.stream.shutdown().await.unwrap();
    assert_eq!(endings(&only(&world).await), one("accepted_certain"));
    world.end().await;
}

#[tokio::test]
async fn a_lost_connection_leaves_what_waited_on_it_unanswered() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push("00aa").await.status, 200);
    world.simulator.gates().hold(Environment::Sandbox);
    let held = client.begin(client.request(TOKEN).header("apns-id", ID), "{}").await.unwrap();
    world.until("it is held", |world| world.simulator.ledger().summary().waiting == 1).await;
    let id = Uuid::parse_str(ID).unwrap();
    let waiting = world.simulator.ledger().truth_of(Environment::Sandbox, TOKEN, id).unwrap();
    assert_eq!((waiting.verdict, endings(&waiting)), (Verdict::Waiting, one("waiting")));
    world.simulator.gates().close(Environment::Sandbox, None);
    assert!(finish(held).await.is_err());
    assert_eq!(endings(&world.truth(TOKEN).await), one("unanswered"));
    world.end().await;
}

#[tokio::test]
async fn all_attempts_of_a_push_are_in_one_record_and_what_has_no_id_is_a_push_of_its_own() {
    let mut world = World::start().await;
    let busy = Action::Answer { status: 503, reason: Some("ServiceUnavailable".to_owned()), timestamp_ms: None };
    for action in [Action::Reset { code: 2, accepted: true }, busy] {
        let script = Script { environment: Some(Environment::Sandbox), ..Script::new(TOKEN, action).times(1) };
        world.simulator.scripts().add(script);
    }
    let mut client = world.connect().await;
    assert!(client.attempt(TOKEN).await.is_err());
    assert_eq!(client.attempt(&TOKEN.to_uppercase()).await.unwrap().status, 503);
    assert_eq!(client.attempt(TOKEN).await.unwrap().status, 200);
    let truth = world.truth(TOKEN).await;
    assert_eq!((truth.received, truth.accepted, truth.verdict), (3, 2, Verdict::Accepted));
    let expected = ["accepted_certain", "accepted_unanswered", "refused_certain"].map(|ending| (ending.to_owned(), 1));
    let mut found = endings(&truth);
    found.sort();
    assert_eq!(found, expected);
    for _ in 0..2 {
        assert_eq!(client.push(TOKEN).await.status, 200);
    }
    assert_eq!(client.push("abc").await.status, 400, "no device token, no record");
    let mut production = world.connect_to(Environment::Production).await;
    assert_eq!(production.attempt(TOKEN).await.unwrap().status, 200);
    let summary = world.settled().await;
    assert_eq!((summary.pushes, summary.attempts, summary.acceptances), (4, 6, 5));
    assert_eq!((summary.accepted_once, summary.accepted_repeatedly, summary.known_accepted), (3, 1, 4));
    let long = "ab".repeat(256);
    assert_eq!(client.attempt(&long).await.unwrap().status, 200);
    assert_eq!(world.truth(&long).await.token, long);
    world.end().await;
}

#[tokio::test]
async fn repeats_are_found_however_long_ago_the_first_was() {
    let mut world = World::with(|settings| settings.max_recorded_pushes = 1).await;
    let mut client = world.connect().await;
    assert_eq!(client.attempt(TOKEN).await.unwrap().status, 200);
    for _ in 0..5 {
        assert_eq!(client.push(TOKEN).await.status, 200);
    }
    assert_eq!(client.attempt(TOKEN).await.unwrap().status, 200);
    let repeats = world.simulator.ledger().repeats();
    assert_eq!(repeats.len(), 1);
    assert_eq!((repeats[0].apns_id.to_string().as_str(), repeats[0].times), (ID, 2));
    world.end().await;
}

#[tokio::test]
async fn without_records_nothing_is_kept_and_no_ping_is_sent() {
    let world = World::with(|settings| settings.record_attempts = false).await;
    let mut raw = answered_raw(&world).await;
    raw.frame(6, 0, 0, b"are they").await;
    let (flags, _, payload) = raw.next_of(6).await;
    assert_eq!((flags, payload.as_slice()), (1, b"are they".as_slice()), "the acknowledgement is the first PING");
    assert_eq!(world.simulator.ledger().summary(), Summary::default());
    assert!(world.simulator.ledger().truth(&TruthQuery::default()).0.is_empty());
    world.end().await;
}

#[tokio::test]
async fn the_truth_is_read_in_pages_in_lines_and_by_what_could_be_known() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    for token in ["00aa", "00bb", "00cc"] {
        assert_eq!(client.attempt(token).await.unwrap().status, 200);
    }
    world.simulator.scripts().add(Script::new("00dd", Action::Reset { code: 2, accepted: true }).times(1));
    assert!(client.attempt("00dd").await.is_err());
    world.settled().await;
    let tokens = |page: &Value| page["items"].as_array().unwrap().iter().map(|item| item["token"].clone()).collect();
    let (status, page) = control(&world, "GET /ledger/truth?after=1&limit=2", "").await;
    let found: Vec<Value> = tokens(&page);
    assert_eq!((status, found, &page["last"]), (200, vec![json!("00bb"), json!("00cc")], &json!(3)));
    let (_, page) = control(&world, "GET /ledger/truth?verdict=ambiguous", "").await;
    let found: Vec<Value> = tokens(&page);
    assert_eq!((found, &page["last"]), (vec![json!("00dd")], &json!(4)));
    let (_, page) = control(&world, "GET /ledger/truth?token=00BB&environment=sandbox", "").await;
    let expected = json!({"sequence": 2, "environment": "sandbox", "token": "00bb", "apns_id": ID, "received": 1, "accepted": 1,
        "accepted_certain": 1, "last_status": 200, "verdict": "accepted"});
    assert_eq!(page["items"], json!([expected]));
    let lines = control_text(&world, "GET /ledger/truth/lines?after=1", "").await.1;
    let lines: Vec<Value> =
        lines.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]), (3, &expected));
    let lines = control_text(&world, "GET /ledger/truth/lines?limit=2", "").await.1;
    assert_eq!(lines.lines().filter(|line| line.starts_with('{')).count(), 2);
    let (_, summary) = control(&world, "GET /ledger/summary", "").await;
    assert_eq!((&summary["known_accepted"], &summary["ambiguous_accepted"]), (&json!(3), &json!(1)));
    assert_eq!(control(&world, "GET /ledger/truth?verdict=perhaps", "").await.0, 400);
    assert_eq!(control(&world, "GET /ledger/truth?token=x", "").await.0, 422);
    assert_eq!(control(&world, "DELETE /ledger/truth", "").await.0, 204);
    assert_eq!(control(&world, "GET /ledger/truth", "").await.1, json!({"items": [], "last": 0}));
    assert_eq!(world.simulator.ledger().counters().accepted, 4, "the counters stay");
    world.end().await;
}
