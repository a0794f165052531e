//! The least privileges that work: as docs/operations.md has them.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sonnette::{
    domain::{api_key::Scope, clock::SystemClock, secret::Secret},
    store::retention::{Place, Subject},
};

use super::{Account, said};
use crate::support::{
    database::PrivateServer,
    scratch::Folder,
    world::{TOPIC, World},
};

/// The statement in the documentation that grants them, between these words.
fn documented(before: &str) -> String {
    let text = include_str!("../../../docs/operations.md");
    let granted = text.split(before).nth(1).unwrap_or_else(|| panic!("no `{before}` in docs/operations.md"));
    granted.split(" ON ").next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_documentation_grants_is_enough_to_migrate_and_less_to_serve() {
    let (serve, migrate) = (documented("-- serve\nGRANT "), documented("-- migrate, besides\nGRANT "));
    assert_eq!(serve, "SELECT, INSERT, UPDATE, DELETE");
    let server = PrivateServer::start().await;
    let account = Account::create(&server, &serve, "").await;
    let url = account.url_of(&[&server]);
    let folder = Folder::new("privileges");
    let (well, error) = said(folder.path(), &url, "migrate");
    assert!(!well && error.contains("denied"), "making tables takes more: {error}");
    account.may_only(&server, &format!("{serve}, {migrate}")).await;
    let (well, error) = said(folder.path(), &url, "migrate");
    assert!(well, "{error}");

    account.may_only(&server, &serve).await;
    let (well, error) = said(folder.path(), &url, "migrate");
    assert!(well, "nothing is pending, and nothing is written: {error}");
    let world = World::configured(account.database, Arc::new(SystemClock::new()), "", |config, _| {
        config.database.url = Secret::new(url);
        assert!(config.database.migrate, "the default");
    })
    .await;
    let caller = world.caller(&[Scope::Send, Scope::Broadcast, Scope::Read, Scope::Register, Scope::Metrics]).await;
    for number in 0..5 {
        let body = json!({ "topic": TOPIC, "token": format!("{number:064x}"), "user_id": "rider", "tags": ["paris"] });
        caller.post("/v1/devices", &body).await.ok();
    }
    let one = world.send(json!({ "user_ids": ["rider"] })).await;
    assert_eq!(world.done(&one).await["counts"]["accepted"], 5);
    let all = json!({ "topic": TOPIC, "to": { "tags": { "any": ["paris"] } }, "payload": { "aps": { "alert": "x" } } });
    let all = caller.post("/v1/notifications", &all).await.ok()["id"].as_str().unwrap().to_owned();
    assert_eq!(world.done(&all).await["counts"]["accepted"], 5);
    let tomorrow = world.clock.now().plus(Duration::from_secs(86_400)).to_string();
    let later = world.send_with(json!({ "user_ids": ["rider"] }), json!({ "send_at": tomorrow })).await;
    assert_eq!(world.server.delete(&format!("/v1/notifications/{later}")).await.status, 200);
    let device = caller.all("/v1/devices").await[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(world.server.delete(&format!("/v1/devices/{device}")).await.status, 204);
    // Everything is over by then, and goes.
    let (store, far) = (world.app().store(), world.clock.now().plus(Duration::from_secs(1_000_000)));
    let replica = store.replicas().await.unwrap()[0].id;
    let mut deleted = 0;
    for subject in [
        Subject::Remains,
        Subject::Payloads,
        Subject::IdempotencyKeys,
        Subject::NewlyInactive,
        Subject::InactiveDevices,
        Subject::Notifications,
        Subject::Tombstones,
    ] {
        let swept = store.sweep(subject, &Place::default(), far, replica).await.unwrap().expect("it keeps house");
        deleted += swept.deleted.iter().map(|(_, rows)| rows).sum::<u64>();
    }
    assert!(deleted > 5, "something went");
    assert_eq!(world.server.get("/health").await.body["checks"]["database:commit"][0]["status"], "pass");
    let metrics = caller.get("/metrics").await.text;
    assert!(metrics.contains("sonnette_table_bytes"), "the sizes of tables are seen: {metrics}");
}
