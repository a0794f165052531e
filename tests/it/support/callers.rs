//! Callers who post one notification after another to one user until they are told to stop.
//!
//! Each asks again, with the same idempotency key, until it has its `202`; meanwhile it may be told to come back and nothing
//! else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::task::JoinHandle;

use super::{
    client::Client,
    world::{TOPIC, until},
};

/// The callers of a user named `rider`.
pub(crate) struct Callers {
    counted: Arc<Counted>,
    posting: Vec<JoinHandle<Vec<String>>>,
}

#[derive(Default)]
struct Counted {
    kept: AtomicUsize,
    refused: AtomicUsize,
    stop: AtomicBool,
}

impl Callers {
    /// So many at once.
    pub(crate) fn start(client: &Client, callers: usize) -> Self {
        let counted = Arc::<Counted>::default();
        let posting = (0..callers)
            .map(|lane| {
                let (client, counted) = (client.clone(), Arc::clone(&counted));
                tokio::spawn(async move {
                    let mut ids = Vec::new();
                    while !counted.stop.load(Ordering::Relaxed) {
                        ids.push(post(&client, lane * 1_000_000 + ids.len(), &counted.refused).await);
                        counted.kept.fetch_add(1, Ordering::Relaxed);
                    }
                    ids
                })
            })
            .collect();
        Self { counted, posting }
    }

    /// How many were accepted.
    pub(crate) fn kept(&self) -> usize {
        self.counted.kept.load(Ordering::Relaxed)
    }

    /// How often one was told to come back.
    pub(crate) fn refused(&self) -> usize {
        self.counted.refused.load(Ordering::Relaxed)
    }

    /// Waits until more than so many were accepted.
    pub(crate) async fn until_kept(&self, than: usize) {
        until("more is kept", || async { (self.kept() > than).then_some(()) }).await;
    }

    /// Waits until one was told to come back.
    pub(crate) async fn until_refused(&self) {
        until("callers are told to come back", || async { (self.refused() > 0).then_some(()) }).await;
    }

    /// Stops them once each has its answer; the ids of all that was accepted.
    pub(crate) async fn stop(self) -> Vec<String> {
        self.counted.stop.store(true, Ordering::Relaxed);
        let mut ids = Vec::new();
        for lane in self.posting {
            ids.extend(lane.await.unwrap());
        }
        ids
    }
}

/// Posts one notification until it is accepted; counts how often that was told to come back.
async fn post(client: &Client, number: usize, refused: &AtomicUsize) -> String {
    let body = json!({
        "topic": TOPIC, "to": { "user_ids": ["rider"] }, "payload": { "aps": { "alert": { "title": format!("n-{number}") } } },
    })
    .to_string();
    let key = format!("order-{number}");
    until("the notification is accepted", || async {
        let headers = [("idempotency-key", key.as_str())];
        let answer = client.send(http::Method::POST, "/v1/notifications", &headers, body.clone()).await.ok()?;
        if answer.status == 202 {
            return Some(answer.body["id"].as_str().unwrap().to_owned());
        }
        assert_eq!(answer.status, 503, "{}", answer.text);
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
        refused.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
        None
    })
    .await
}
