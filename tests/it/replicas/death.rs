//! Replicas that are killed, hang and wake under load, with clocks ten minutes apart: nothing is lost or stuck, repeated
//! is only what a dead replica had written and not settled, and a phone that has passed on gets nothing more.
//!
//! `REPLICAS_SECONDS` and `REPLICAS_SEED` set how long and which; `make replicas` is the long run.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Mutex,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use sonnette::domain::clock::{Clock, SystemClock, Timestamp};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};
use tokio_util::sync::CancellationToken;

use super::size;
use crate::{
    broadcast::{device_id, device_token, with_devices, with_riders},
    store::number,
    support::{
        client::Client,
        cluster::{Cluster, Member},
        database::{OPEN, TestDatabase, mysql_database},
        running::running,
        service::Service,
        world::{TOPIC, patiently, until},
    },
};

/// From the true time.
const CLOCKS: [i64; 3] = [0, 300, -300];

/// Devices that everything is sent to, and phones beyond them that pass on: so many at each death.
pub(crate) const DEVICES: usize = 1_000;
const PASS_ON: usize = 20;

/// So many callers post one notification after another.
const WORKERS: u64 = 16;

/// How long APNs takes to answer, so that a victim has something unsettled.
pub(crate) const LATENCY: Duration = Duration::from_millis(600);

/// Work of a dead replica is not stuck for longer. The short run, beside others on a slow machine, is more patient.
const STUCK: Duration = Duration::from_secs(10);

/// An ownership read counts for a second; the rest is this machine's.
const OWNERSHIP: Duration = Duration::from_secs(3);

/// What a caller waits for an answer before it asks another replica.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blow {
    Kill,
    /// For longer than the others wait.
    Hang,
    /// For less.
    Pause,
}

/// What a victim held at its death.
pub(crate) struct Death {
    pub(crate) at: Timestamp,
    /// The notifications that were open, by id in hex.
    pub(crate) open: BTreeSet<String>,
}

/// What was asked for, by the number that it bears, and when each `202` came.
#[derive(Default)]
pub(crate) struct Asked(pub(crate) Mutex<BTreeMap<u64, String>>, pub(crate) Mutex<Vec<Instant>>);

impl Asked {
    fn next(&self) -> u64 {
        let mut asked = self.0.lock().unwrap();
        let number = asked.len() as u64;
        asked.insert(number, String::new());
        number
    }

    /// Posts a notification until some replica answers `202`, always with the same idempotency key.
    pub(crate) async fn post(&self, callers: &[Client], first: usize, to: Value) -> u64 {
        let number = self.next();
        let payload = json!({ "aps": { "alert": "Ding dong" }, "number": number });
        let body = json!({ "topic": TOPIC, "to": to, "payload": payload }).to_string();
        let key = format!("order-{number}");
        let headers = [("idempotency-key", key.as_str())];
        let answer = insist(callers, first, http::Method::POST, "/v1/notifications", &headers, &body).await;
        let id = answer["id"].as_str().unwrap().replace('-', "");
        self.0.lock().unwrap().insert(number, id);
        self.1.lock().unwrap().push(Instant::now());
        number
    }
}

/// Asks one replica after another until one answers well.
async fn insist(
    callers: &[Client],
    first: usize,
    method: http::Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Value {
    let mut turn = first;
    patiently("a request is answered", || {
        let caller = &callers[turn % callers.len()];
        turn += 1;
        let (method, body) = (method.clone(), body.to_owned());
        async move {
            let answer = caller.send_within(PATIENCE, method, path, headers, body).await?;
            match answer.status.as_u16() {
                // Killed in mid-answer: half a body is no answer.
                200..300 => (!answer.body.is_null()).then_some(answer.body),
                503 | 429 => {
                    assert!(answer.header("retry-after").is_some(), "{path}: {}", answer.text);
                    None
                }
                status => panic!("{path}: {status}: {}", answer.text),
            }
        }
    })
    .await
}

/// Single notifications without pause, and a broadcast every few seconds, until it is told to stop.
pub(crate) async fn load(callers: &[Client], asked: &Asked, seed: u64, stop: &CancellationToken) {
    let single = |worker: u64| async move {
        let mut dice = StdRng::seed_from_u64(seed + worker);
        while !stop.is_cancelled() {
            let to = json!({ "device_ids": [device_id(dice.random_range(1..=DEVICES))] });
            asked.post(callers, dice.random_range(0..callers.len()), to).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let broadcasts = async {
        while !stop.is_cancelled() {
            asked.post(callers, 0, json!({ "everyone": true })).await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(Duration::from_secs(7)) => {}
            }
        }
    };
    tokio::join!(futures_util::future::join_all((1..=WORKERS).map(single)), broadcasts);
}

/// The chunks that a replica holds, as notification in hex and number.
async fn held(database: &TestDatabase, pid: u32) -> BTreeSet<(String, i32)> {
    let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
    // Galera: what was committed on another node is to be seen. Nothing to others.
    sqlx::raw_sql("SET @seen = 1 /*M!100107 , SESSION wsrep_sync_wait = 1 */").execute(&mut connection).await.unwrap();
    let question = format!(
        "SELECT LOWER(HEX(notification_id)), number FROM chunks \
         WHERE holder = (SELECT MAX(id) FROM replicas WHERE name LIKE '%:{pid}') \
         UNION ALL SELECT LOWER(HEX(n.id)), 0 FROM cohorts k JOIN notifications n ON n.cohort = k.id WHERE SUBSTR(k.seats, 4 * n.seat + 1, 4) = X'00000000' \
         AND k.holder = (SELECT MAX(id) FROM replicas WHERE name LIKE '%:{pid}')"
    );
    let rows: Vec<(String, i32)> = sqlx::query_as(AssertSqlSafe(question)).fetch_all(&mut connection).await.unwrap();
    rows.into_iter().collect()
}

/// Whether these chunks have not all come to an end.
async fn open(database: &TestDatabase, chunks: &BTreeSet<(String, i32)>) -> i64 {
    if chunks.is_empty() {
        return 0;
    }
    let keys: Vec<String> = chunks.iter().map(|(id, number)| format!("(X'{id}', {number})")).collect();
    let keys = keys.join(", ");
    let question = format!(
        "SELECT (SELECT COUNT(*) FROM chunks WHERE ended_at IS NULL AND (notification_id, number) IN ({keys})) + \
         (SELECT COUNT(*) FROM notifications n JOIN cohorts k ON k.id = n.cohort \
          WHERE SUBSTR(k.seats, 4 * n.seat + 1, 4) = X'00000000' AND (n.id, 0) IN ({keys}))"
    );
    number(database, &question).await
}

/// Freezes a replica, and tells what it holds once a commit that was under way has ended.
pub(crate) async fn freeze(service: &Service, pid: u32, database: &TestDatabase) -> BTreeSet<(String, i32)> {
    service.freeze();
    let mut before = held(database, pid).await;
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        match held(database, pid).await {
            now if now == before => return now,
            now => before = now,
        }
    }
}

/// What was tried, and what came of it.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) deaths: Vec<Death>,
    /// When each phone had passed on, by the number of the notification to its former user.
    passed_on: HashMap<u64, Timestamp>,
    pub(crate) longest: Duration,
    pub(crate) blows: Vec<Blow>,
}

struct Fate<'a> {
    cluster: &'a mut Cluster,
    callers: &'a [Client],
    asked: &'a Asked,
    dice: StdRng,
    stuck: Duration,
    phones: usize,
    report: Report,
}

impl Fate<'_> {
    async fn strike(&mut self) {
        let victim = self.dice.random_range(0..self.callers.len());
        // The first two are fixed, so that the short run has both.
        let blow = match self.report.blows.len() {
            0 => Blow::Kill,
            1 => Blow::Hang,
            _ => [Blow::Kill, Blow::Kill, Blow::Hang, Blow::Pause][self.dice.random_range(0..4)],
        };
        self.report.blows.push(blow);

        // Riders of phones that are about to pass on: on their way to APNs when the blow falls.
        let phones: Vec<usize> = (self.phones + 1..=self.phones + PASS_ON).collect();
        self.phones += PASS_ON;
        let written: Vec<u64> = stream::iter(&phones)
            .map(|phone| {
                let to = json!({ "user_ids": [format!("rider-{phone}")] });
                self.asked.post(self.callers, victim, to)
            })
            .buffered(PASS_ON)
            .collect()
            .await;

        let pid = self.cluster.replicas[victim].process().child().id();
        let chunks = freeze(&self.cluster.replicas[victim], pid, self.cluster.database()).await;
        let began = Instant::now();
        let at = now();
        if blow == Blow::Kill {
            self.cluster.replicas[victim].process().kill();
        }
        self.pass_on(&phones, &written, victim + 1).await;
        if blow == Blow::Pause {
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            self.cluster.replicas[victim].signal("CONT");
        } else {
            self.report.deaths.push(Death { at, open: chunks.iter().map(|(id, _)| id.clone()).collect() });
        }
        let restarts_at_once = blow == Blow::Kill && self.dice.random();
        if restarts_at_once {
            self.cluster.replicas[victim].restart().await;
        }
        let database = self.cluster.database();
        until("what the victim held has ended", || async { (open(database, &chunks).await == 0).then_some(()) }).await;
        let took = began.elapsed();
        eprintln!("replica {victim}: {blow:?} with {} pieces of work, all ended after {took:?}", chunks.len());
        self.report.longest = self.report.longest.max(took);
        assert!(took <= self.stuck, "work was stuck for {took:?}");
        match blow {
            Blow::Kill if !restarts_at_once => self.cluster.replicas[victim].restart().await,
            Blow::Hang => self.cluster.replicas[victim].signal("CONT"),
            _ => {}
        }
    }

    /// Another replica is told that the phones have other users now.
    async fn pass_on(&mut self, phones: &[usize], written: &[u64], through: usize) {
        let callers = self.callers;
        let changed: Vec<(u64, Timestamp)> = stream::iter(phones.iter().zip(written))
            .map(|(phone, number)| async move {
                let user = format!("new-rider-{phone}");
                let body = json!({ "topic": TOPIC, "token": device_token(*phone), "user_id": user }).to_string();
                insist(callers, through, http::Method::POST, "/v1/devices", &[], &body).await;
                (*number, now())
            })
            .buffered(PASS_ON)
            .collect()
            .await;
        self.report.passed_on.extend(changed);
    }
}

pub(crate) fn now() -> Timestamp {
    SystemClock::new().now()
}

/// How a notification ended: targeted, accepted, suppressed, unknown.
pub(crate) async fn ends(database: &TestDatabase) -> HashMap<String, [i64; 4]> {
    let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
    let sum = |column: &str| format!("CAST(SUM({column}) AS SIGNED)");
    let sums = ["targeted", "accepted", "suppressed", "unanswered"].map(sum).join(", ");
    let question = format!(
        "SELECT LOWER(HEX(notification_id)), {sums} FROM chunks GROUP BY notification_id \
         UNION ALL SELECT LOWER(HEX(n.id)), 1, IF(SUBSTR(k.seats, 4 * n.seat + 1, 4) = X'00000000', 0, 1), 0, 0 \
         FROM notifications n JOIN cohorts k ON k.id = n.cohort WHERE SUBSTR(k.seats, 4 * n.seat + 1, 4) <> X'FFFFFFFF'"
    );
    let rows: Vec<(String, i64, i64, i64, i64)> =
        sqlx::query_as(AssertSqlSafe(question)).fetch_all(&mut connection).await.unwrap();
    rows.into_iter().map(|(id, a, b, c, d)| (id, [a, b, c, d])).collect()
}

/// One push in the ledger.
pub(crate) struct Arrived {
    apns_id: String,
    pub(crate) at: Vec<Timestamp>,
}

/// What arrived, by the number of the notification and device token.
pub(crate) async fn arrived(control: &Client) -> HashMap<(u64, String), Arrived> {
    let mut all: HashMap<(u64, String), Arrived> = HashMap::new();
    let mut after = 0;
    loop {
        let page = control.get(&format!("/ledger/pushes?after={after}&limit=10000")).await.ok();
        let pushes = page["items"].as_array().unwrap();
        if pushes.is_empty() {
            return all;
        }
        for push in pushes {
            let text = |field: &str| push[field].as_str().unwrap().to_owned();
            let body: Value = serde_json::from_str(&text("body")).unwrap();
            let key = (body["number"].as_u64().unwrap(), text("token"));
            let seen = all.entry(key).or_insert_with(|| Arrived { apns_id: text("apns_id"), at: Vec::new() });
            assert_eq!(seen.apns_id, text("apns_id"), "a repeat bears the same apns-id: {push}");
            seen.at.push(text("at").parse().unwrap());
        }
        after = page["last"].as_u64().unwrap();
    }
}

pub(crate) fn check(
    report: &Report,
    asked: &BTreeMap<u64, String>,
    ends: &HashMap<String, [i64; 4]>,
    ledger: &HashMap<(u64, String), Arrived>,
) {
    let (mut suppressed, mut unknown) = (0, 0);
    let seen: BTreeSet<u64> = ledger.keys().map(|(number, _)| *number).collect();
    for (number, id) in asked {
        let ended = ends.get(id);
        let [targeted, accepted, withheld, unanswered] =
            *ended.unwrap_or_else(|| panic!("notification {number}, {id}, was accepted and is not there"));
        suppressed += withheld;
        unknown += unanswered;
        assert!(withheld == 0 || !seen.contains(number), "notification {number} is called suppressed, and arrived");
        let lost = if report.passed_on.contains_key(number) {
            targeted != 1 || accepted + withheld + unanswered != 1
        } else {
            targeted == 0 || accepted != targeted
        };
        assert!(!lost, "notification {number}: {:?} targeted, accepted, suppressed, unknown", ends[id]);
    }
    let accepted: i64 = ends.values().map(|[_, accepted, ..]| accepted).sum();
    let missing = accepted - i64::try_from(ledger.len()).unwrap();
    assert!(missing <= 0, "{missing} pushes are called accepted and never arrived");

    let (mut repeats, mut unexplained) = (0, Vec::new());
    for ((number, token), push) in ledger {
        let slack = LATENCY + Duration::from_secs(1);
        if let Some(changed) = report.passed_on.get(number) {
            let latest = changed.plus(OWNERSHIP + LATENCY);
            let deaths: Vec<Timestamp> = report.deaths.iter().map(|death| death.at).collect();
            let in_time = push.at.iter().all(|at| *at <= latest);
            assert!(in_time, "{number} passed on at {changed}, and was sent at {:?}; deaths {deaths:?}", push.at);
        }
        if push.at.len() > 1 {
            repeats += push.at.len() - 1;
            let died = report.deaths.iter().any(|death| {
                push.at.iter().min().unwrap() <= &death.at.plus(slack) && death.open.contains(&asked[number])
            });
            if !died {
                let deaths: Vec<(Timestamp, bool)> =
                    report.deaths.iter().map(|death| (death.at, death.open.contains(&asked[number]))).collect();
                unexplained
                    .push(format!("{number} to {token}: {:?}; deaths, and whether they held it: {deaths:?}", push.at));
            }
        }
    }
    assert!(
        unexplained.is_empty(),
        "{} of {} repeats of which no dead replica held any: {unexplained:#?}",
        unexplained.len(),
        repeats
    );
    eprintln!(
        "{:?}: {} notifications, {accepted} accepted, {suppressed} suppressed, {unknown} unknown, {repeats} repeats, \
         at most {:?} stuck",
        report.blows,
        asked.len(),
        report.longest
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_die_and_hang_lose_nothing_and_repeat_only_what_they_had_not_settled() {
    let (seconds, seed) = (size("REPLICAS_SECONDS", 10), size("REPLICAS_SEED", 1) as u64);
    eprintln!("REPLICAS_SEED={seed} REPLICAS_SECONDS={seconds}");
    let database = mysql_database().await;
    let phones = (seconds / 2 + 4) * PASS_ON;
    with_devices(&database, DEVICES + phones).await;
    with_riders(&database, DEVICES).await;
    let members = CLOCKS.map(|clock_ahead| Member { clock_ahead, ..Member::default() });
    let latency = LATENCY.as_millis().to_string();
    let mut cluster = Cluster::start(database, &members, "", &["--latency-ms", &latency]).await;

    let (asked, stop) = (Asked::default(), CancellationToken::new());
    let callers = cluster.callers.clone();
    let began = Instant::now();
    let mut fate = Fate {
        cluster: &mut cluster,
        callers: &callers,
        asked: &asked,
        dice: StdRng::seed_from_u64(seed),
        stuck: if seconds > 60 { STUCK } else { 6 * STUCK },
        phones: DEVICES,
        report: Report::default(),
    };
    let blows = async {
        while began.elapsed() < Duration::from_secs(seconds as u64) || fate.report.blows.len() < 2 {
            fate.strike().await;
            let pause = fate.dice.random_range(300..1_500);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        stop.cancel();
    };
    tokio::join!(blows, load(&callers, &asked, seed, &stop));
    let report = fate.report;

    let database = cluster.database();
    until("everything has ended", || async { (number(database, OPEN).await == 0).then_some(()) }).await;
    let asked = asked.0.into_inner().unwrap();
    check(&report, &asked, &ends(database).await, &arrived(&cluster.sim.control).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hangs_in_the_middle_of_a_transaction_is_taken_over_while_it_hangs() {
    let mut cluster = Cluster::start(mysql_database().await, &[Member::default(); 2], "", &[]).await;
    let mut connection = MySqlConnection::connect(cluster.database().url()).await.unwrap();
    let pid = cluster.replicas[0].process().child().id();
    let database = cluster.database();
    let replica = format!("FROM replicas WHERE name LIKE '%:{pid}'");
    let id = number(database, &format!("SELECT id {replica}")).await;

    // Its next heartbeat waits for us, it is stopped, and gets what it waits for.
    let lock = format!("BEGIN; SELECT id FROM replicas WHERE id = {id} FOR UPDATE");
    sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut connection).await.unwrap();
    until("a heartbeat waits", || async {
        // A second: the other one's heartbeats wait for nobody.
        let mut observer = MySqlConnection::connect(database.url()).await.unwrap();
        let waiting = running(&mut observer).await;
        (waiting.iter().filter(|one| one.waits_in("replicas.beat")).count() == 1).then_some(())
    })
    .await;
    cluster.replicas[0].signal("STOP");
    sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.unwrap();

    let alive = format!("SELECT COUNT(*) {replica}");
    until("it is declared dead", || async { (number(database, &alive).await == 0).then_some(()) }).await;
    cluster.replicas[0].signal("CONT");
    until("it has joined anew", || async { (number(database, &alive).await == 1).then_some(()) }).await;
}
