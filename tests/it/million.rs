//! A broadcast to everyone during which everything happens at once: kills, dead tokens, a busy APNs, phones that leave
//! and phones that register again, and in its second half it is cancelled. Every device has exactly one outcome, and
//! the simulator's ledger says the same (promises 1, 2, 3).
//!
//! `MILLION_DEVICES` sets the size; `make million` is the long run.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use crate::{
    broadcast::{accepted, broadcast, device_id, device_token, with_devices},
    support::{
        client::Client,
        database::{TestDatabase, on_both_stores},
        scratch::Folder,
        service::{Service, SimulatorProcess, run},
        world::{TOPIC, keys_folder, patiently, until},
    },
};

/// In percent of the devices that have been tried.
const KILLS_AT: [usize; 3] = [10, 25, 40];
const CANCELLED_AT: usize = 55;

/// A kill repeats no more than this.
const REPEATS_PER_KILL: u64 = 2_400;

/// And leaves no more in doubt: what the chunks that were being sent had not settled.
const IN_DOUBT_PER_KILL: u64 = 5_000;

/// One device of so many is deleted while the broadcast runs, and the next one registers again.
const ONE_OF: usize = 100;

fn devices() -> usize {
    std::env::var("MILLION_DEVICES").map_or(50_000, |text| text.parse().expect("a number in MILLION_DEVICES"))
}

fn is_deleted(number: usize) -> bool {
    number % ONE_OF == 1
}

async fn requests(sim: &SimulatorProcess) -> usize {
    usize::try_from(sim.total().await["requests"].as_u64().unwrap()).unwrap()
}

/// Deletes and registers, and asks again wherever no answer came.
async fn phones_come_and_go(client: Client, count: usize) {
    stream::iter((1..=count).filter(|number| is_deleted(*number) || is_deleted(*number - 1)))
        .for_each_concurrent(16, |number| {
            let client = client.clone();
            async move {
                let body =
                    json!({ "topic": TOPIC, "token": device_token(number), "user_id": format!("user-{number}") });
                let (method, path, body) = if is_deleted(number) {
                    (http::Method::DELETE, format!("/v1/devices/{}", device_id(number)), String::new())
                } else {
                    (http::Method::POST, "/v1/devices".to_owned(), body.to_string())
                };
                patiently("a phone's request is answered", || async {
                    let patience = Duration::from_secs(10);
                    let answer = client.send_within(patience, method.clone(), &path, &[], body.clone()).await?;
                    match answer.status.as_u16() {
                        // 404: done already, by a request whose answer was lost.
                        200..300 | 404 => Some(()),
                        503 | 429 => None,
                        status => panic!("{method} {path}: {status}: {}", answer.text),
                    }
                })
                .await;
            }
        })
        .await;
}

/// Kills the service while the ledger, in another process, shows pushes accepted that the database does not know of.
async fn kill(service: &mut Service, sim: &SimulatorProcess, database: &TestDatabase, exposed: &mut i64) {
    let unsettled = patiently("pushes are accepted and not settled", || async {
        let settled = service.freeze_and_count(async || accepted(database).await).await;
        let acceptances = sim.control.get("/ledger/summary").await.ok()["acceptances"].as_i64().unwrap();
        if acceptances - settled > *exposed {
            return Some(acceptances - settled);
        }
        service.signal("CONT");
        None
    })
    .await;
    service.process().kill();
    *exposed = unsettled;
    service.restart().await;
}

/// What the ledger knows of the push to one device.
#[derive(Debug, Default)]
struct Truth {
    apns_id: String,
    accepted: u64,
    answered_200: u64,
    gone: u64,
}

/// Each record of the ledger, by the device's number. There is one push for each.
async fn truths(control: &Client) -> HashMap<usize, Truth> {
    patiently("the ledger is final", || async {
        let summary = control.get("/ledger/summary").await.ok();
        (summary["waiting"] == 0 && summary["unproved"] == 0).then_some(())
    })
    .await;
    let mut truths = HashMap::new();
    let mut after = 0;
    loop {
        let page = control.get(&format!("/ledger/truth/lines?after={after}&limit=20000")).await.text;
        let known = truths.len();
        for line in page.lines() {
            let record: Value = serde_json::from_str(line).unwrap();
            let count = |names: &[&str]| names.iter().map(|name| record[*name].as_u64().unwrap_or(0)).sum();
            let device = usize::from_str_radix(record["token"].as_str().unwrap(), 16).unwrap();
            let truth = Truth {
                apns_id: record["apns_id"].as_str().unwrap().to_owned(),
                accepted: count(&["accepted"]),
                answered_200: count(&["accepted_certain", "accepted_uncertain"]),
                gone: count(&["gone_certain", "gone_uncertain"]),
            };
            after = record["sequence"].as_u64().unwrap();
            assert!(truths.insert(device, truth).is_none(), "device {device} was sent two apns-ids: {record}");
        }
        if truths.len() == known {
            return truths;
        }
    }
}

/// Whether the service may say this of a device, and if not, why. Who read an answer may have died of a kill before it
/// could be kept: how many are unknown is bounded by the whole.
fn check(status: &str, number: usize, truth: &Truth) -> Result<(), &'static str> {
    match status {
        "accepted" if truth.answered_200 == 0 => Err("it was never answered 200"),
        "unregistered" if truth.gone == 0 => Err("it was never answered 410"),
        "cancelled" | "suppressed" if truth.accepted > 0 => Err("APNs accepted it"),
        "suppressed" if !is_deleted(number) => Err("it was never deleted"),
        "accepted" | "unregistered" | "cancelled" | "suppressed" | "unknown" => Ok(()),
        _ => Err("nothing that happened leads there"),
    }
}

/// Reads every outcome through the API, holds it against the ledger, and counts them by status.
async fn outcomes(client: &Client, id: &str, count: usize, truths: &HashMap<usize, Truth>) -> BTreeMap<String, u64> {
    let mut by_status: BTreeMap<String, u64> = BTreeMap::new();
    let mut seen = vec![false; count + 1];
    let mut cursor = String::new();
    loop {
        let page = client.get(&format!("/v1/notifications/{id}/deliveries?limit=1000{cursor}")).await.ok();
        for delivery in page["items"].as_array().unwrap() {
            let device: uuid::Uuid = delivery["device_id"].as_str().unwrap().parse().unwrap();
            let number = usize::try_from(device.as_u128()).unwrap();
            assert!(!std::mem::replace(&mut seen[number], true), "device {number} is listed twice");
            let status = delivery["status"].as_str().unwrap();
            let never_arrived =
                Truth { apns_id: delivery["apns_id"].as_str().unwrap_or_default().to_owned(), ..Truth::default() };
            let truth = truths.get(&number).unwrap_or(&never_arrived);
            if let Err(why) = check(status, number, truth) {
                panic!("{status} is not the truth: {why}: {delivery} {truth:?}");
            }
            assert!(truth.accepted == 0 || delivery["apns_id"] == truth.apns_id.as_str(), "{delivery} {truth:?}");
            *by_status.entry(status.to_owned()).or_default() += 1;
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    for (number, seen) in seen.into_iter().enumerate().skip(1) {
        // Who left before the audience had come to it is no part of it.
        let left_in_time = is_deleted(number) && truths.get(&number).is_none_or(|truth| truth.accepted == 0);
        assert!(seen || left_in_time, "device {number} has no outcome: {:?}", truths.get(&number));
    }
    by_status
}

on_both_stores! {
    async fn every_device_of_a_broadcast_has_an_outcome_whatever_happens_to_it(database) {
        let count = devices();
        with_devices(&database, count).await;
        let folder = Folder::new("million");
        let busy = json!({ "answer": { "status": 503, "reason": "ServiceUnavailable" } });
        let plan = json!({
            "seed": 7, "dead_tokens": 0.01, "affected_attempts": 1,
            "latency": { "percentiles_ms": { "p50": 20, "p99": 100, "max": 500 } },
            "faults": [{ "rate": 0.01, "action": busy }],
        });
        std::fs::write(folder.path().join("chaos.json"), plan.to_string()).unwrap();
        let keys = keys_folder(&folder, "environments = [\"production\"]");
        let sim = SimulatorProcess::start(folder.path(), &keys, &["--chaos", "chaos.json"]).await;
        let mut service = Service::start(folder.path(), database.url(), &sim).await;
        let scopes = ["api-keys", "create", "--owner", "shop", "--scopes", "register,send,broadcast,read"];
        let (status, key, error) = run(folder.path(), &scopes);
        assert!(status.success(), "{error}");
        let client = Client::new(service.address, Some(key.trim()));

        let began = Instant::now();
        let id = broadcast(&client, json!({ "everyone": true })).await["id"].as_str().unwrap().to_owned();
        let comings = tokio::spawn(phones_come_and_go(client.clone(), count));
        let mut exposed = 0;
        for percent in KILLS_AT {
            patiently("enough was sent", || async { (requests(&sim).await * 100 >= count * percent).then_some(()) }).await;
            kill(&mut service, &sim, &database, &mut exposed).await;
        }
        patiently("half is sent", || async { (requests(&sim).await * 100 >= count * CANCELLED_AT).then_some(()) }).await;
        until("it is cancelled", || async {
            let path = format!("/v1/notifications/{id}");
            let answer = client.send(http::Method::DELETE, &path, &[], String::new()).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
        let counts = patiently("it has ended", || async {
            let seen = client.get(&format!("/v1/notifications/{id}")).await.ok();
            assert_ne!(seen["status"], "done", "it was over before it was cancelled");
            let ended = seen["audience_complete"] == true && seen["counts"]["pending"] == 0;
            ended.then(|| seen["counts"].clone())
        })
        .await;
        comings.await.unwrap();
        let took = began.elapsed();

        let truths = truths(&sim.control).await;
        let by_status = outcomes(&client, &id, count, &truths).await;
        for (status, tally) in &by_status {
            assert_eq!(counts[status], *tally, "{status}: {counts} {by_status:?}");
        }
        assert_eq!(counts["targeted"], by_status.values().sum::<u64>(), "{counts}");
        for status in ["accepted", "unregistered", "cancelled"] {
            assert!(by_status.contains_key(status), "{status} is missing: {by_status:?}");
        }
        let kills = KILLS_AT.len() as u64;
        let repeats: u64 = truths.values().map(|truth| truth.accepted.saturating_sub(1)).sum();
        assert!(repeats <= kills * REPEATS_PER_KILL, "{repeats} repeats after {kills} kills");
        let unknown = by_status.get("unknown").copied().unwrap_or_default();
        assert!(unknown <= kills * IN_DOUBT_PER_KILL, "{unknown} unknown after {kills} kills");
        eprintln!("{count} devices in {took:?}: {by_status:?}; {exposed} accepted and unsettled at kills, {repeats} repeats");
    }
}
