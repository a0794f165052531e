//! A process killed at any point leaves nothing lost or stuck (promises 1 and 3).

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use crate::{
    store::number,
    support::{
        client::Client,
        database::{ACCEPTED, ENDED, OPEN, TestDatabase, on_both_stores},
        scratch::Folder,
        service::{Service, SimulatorProcess, run},
        world::{TOPIC, keys_folder, until},
    },
};

const KILLS: usize = 20;
/// A caller that has no answer by then asks again.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is posted before each kill.
const BATCH: usize = 500;
const NOTIFICATIONS: usize = KILLS * BATCH;
const DEVICES: usize = 500;
/// Pushes that the ledger must show as written and the database not as settled, or a kill does not count.
const UNSETTLED: i64 = 100;

fn device_token(number: usize) -> String {
    format!("{number:064x}")
}

/// Posts one notification until it is answered with `202`, with the same idempotency key each time. Returns its id.
async fn post(client: &Client, number: usize) -> String {
    let body = json!({
        "topic": TOPIC, "to": { "user_ids": [format!("user-{}", number % DEVICES)] },
        "payload": { "aps": { "alert": { "title": format!("Commande {number}") } } },
    })
    .to_string();
    let key = format!("order-{number}");
    until("the notification is accepted", || async {
        let headers = [("idempotency-key", key.as_str())];
        let answer =
            client.send_within(PATIENCE, http::Method::POST, "/v1/notifications", &headers, body.clone()).await?;
        match answer.status.as_u16() {
            // Killed in mid-answer: half a body is no answer.
            202 => answer.body["id"].as_str().map(str::to_owned),
            503 | 429 => None,
            status => panic!("{status}: {}", answer.text),
        }
    })
    .await
}

async fn settled(database: &TestDatabase) -> i64 {
    number(database, ENDED).await
}

/// Kills the service at a moment at which the ledger, in another process, shows pushes written and not yet settled.
/// Returns how many. Frozen first, so that both can be counted at one moment.
async fn kill_in_the_middle(
    service: &mut Service,
    sim: &SimulatorProcess,
    database: &TestDatabase,
    base: (i64, i64),
) -> i64 {
    for _ in 0..1_000 {
        let before = service.freeze_and_count(async || settled(database).await).await;
        let written = sim.total().await["requests"].as_i64().unwrap() - base.0;
        let unsettled = written - (before - base.1);
        if unsettled >= UNSETTLED {
            service.process().kill();
            return unsettled;
        }
        service.process().signal("CONT");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    panic!("never were {UNSETTLED} pushes written and not settled");
}

on_both_stores! {
    async fn ten_thousand_notifications_survive_twenty_kills(database) {
        let folder = Folder::new("kill");
        let keys = keys_folder(&folder, "environments = [\"production\"]");
        let sim = SimulatorProcess::start(folder.path(), &keys, &["--latency-ms", "600"]).await;
        let mut service = Service::start(folder.path(), database.url(), &sim).await;
        let (status, key, error) = run(folder.path(), &["api-keys", "create", "--owner", "shop", "--scopes", "register,send,read"]);
        assert!(status.success(), "{error}");
        let client = Client::new(service.address, Some(key.trim()));
        for number in 0..DEVICES {
            let body = json!({ "topic": TOPIC, "token": device_token(number), "user_id": format!("user-{number}") });
            client.post("/v1/devices", &body).await.ok();
        }

        let mut exposed = 0;
        let mut posting = Vec::new();
        for batch in 0..KILLS {
            // What an earlier life wrote and lost is not this kill's doing.
            let base = (sim.total().await["requests"].as_i64().unwrap(), settled(&database).await);
            let client = client.clone();
            posting.push(tokio::spawn(async move {
                stream::iter(batch * BATCH..(batch + 1) * BATCH)
                    .map(|number| { let client = client.clone(); async move { post(&client, number).await } })
                    .buffer_unordered(64)
                    .collect::<Vec<String>>()
                    .await
            }));
            exposed += kill_in_the_middle(&mut service, &sim, &database, base).await;
            service.restart().await;
        }
        let mut ids = Vec::new();
        for batch in posting {
            ids.extend(batch.await.unwrap());
        }

        until("every notification has ended", || async {
            let open = number(&database, OPEN).await;
            (open == 0 && settled(&database).await == i64::try_from(NOTIFICATIONS).unwrap()).then_some(())
        })
        .await;
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), NOTIFICATIONS, "each accepted once");
        assert_eq!(number(&database, ACCEPTED).await, 10_000, "all accepted");
        for id in ids.iter().step_by(997) {
            assert_eq!(client.get(&format!("/v1/notifications/{id}")).await.ok()["status"], "done");
        }

        // The truth is the ledger's: every notification arrived, and what arrived twice bore the same apns-id.
        let mut arrived: HashMap<String, (String, String, i64)> = HashMap::new();
        let mut after = 0;
        loop {
            let page = sim.control.get(&format!("/ledger/pushes?after={after}&limit=1000")).await.ok();
            let pushes = page["items"].as_array().unwrap().clone();
            if pushes.is_empty() {
                break;
            }
            for push in &pushes {
                let text = |field: &str| push[field].as_str().unwrap().to_owned();
                let body: Value = serde_json::from_str(&text("body")).unwrap();
                let title = body["aps"]["alert"]["title"].as_str().unwrap().to_owned();
                let seen = arrived.entry(title).or_insert_with(|| (text("token"), text("apns_id"), 0));
                assert_eq!((seen.0.as_str(), seen.1.as_str()), (text("token").as_str(), text("apns_id").as_str()));
                seen.2 += 1;
            }
            after = page["last"].as_i64().unwrap();
        }
        assert_eq!(arrived.len(), NOTIFICATIONS, "none is lost");
        let repeats: i64 = arrived.values().map(|seen| seen.2 - 1).sum();
        eprintln!("{KILLS} kills, {exposed} pushes written and unsettled at them, {repeats} repeats");
        assert!(repeats <= exposed, "{repeats} repeats, {exposed} written and not settled");
    }
}
