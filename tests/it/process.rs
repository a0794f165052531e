//! The binary as an operator meets it: starting, stopping, and what it says when it cannot.

use std::time::Duration;

use serde_json::json;

use crate::support::{
    client::Client,
    database::on_both_stores,
    scratch::Folder,
    service::{Service, SimulatorProcess, free_address, run},
    world::{TOPIC, keys_folder, until},
};

on_both_stores! {
    async fn told_to_stop_while_pushes_are_in_flight_it_settles_them_and_exits_with_0(database) {
        let folder = Folder::new("stop");
        let keys = keys_folder(&folder, "environments = [\"production\"]");
        let sim = SimulatorProcess::start(folder.path(), &keys, &["--latency-ms", "2500"]).await;
        let mut service = Service::start(folder.path(), database.url(), &sim).await;
        let (_, key, _) = run(folder.path(), &["api-keys", "create", "--owner", "shop", "--scopes", "register,send,read"]);
        let client = Client::new(service.address, Some(key.trim()));
        let mut ids = Vec::new();
        for number in 0..50 {
            let body = json!({ "topic": TOPIC, "token": format!("{number:064x}"), "user_id": format!("user-{number}") });
            client.post("/v1/devices", &body).await.ok();
        }
        for number in 0..50 {
            let body = json!({ "topic": TOPIC, "to": { "user_ids": [format!("user-{number}")] }, "payload": { "aps": { "alert": "x" } } });
            ids.push(client.post("/v1/notifications", &body).await.ok()["id"].as_str().unwrap().to_owned());
        }
        until("some are in flight", || async {
            (sim.total().await["unanswered"].as_i64().unwrap() > 0).then_some(())
        })
        .await;
        service.process().signal("TERM");
        // Longer than the grace, so that the exit status tells which it was.
        let status = service.process().wait(Duration::from_secs(60)).await.expect("it ends");
        assert_eq!(status.code(), Some(0), "drained in good order");
        service.restart().await;
        for id in &ids {
            until("it is done", || async {
                let seen = client.get(&format!("/v1/notifications/{id}")).await.ok();
                (seen["counts"]["accepted"] == 1).then_some(())
            })
            .await;
        }
        assert_eq!(sim.control.get("/ledger/repeats").await.ok()["items"].as_array().map(Vec::len), Some(0), "nothing was sent twice");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_and_a_second_start_are_said_in_a_sentence() {
    let folder = Folder::new("taken");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = |name: &str, listen: &str| {
        std::fs::write(folder.path().join(name), format!("[server]\nlisten = \"{listen}\"\n")).unwrap();
    };
    config("a.toml", &taken.local_addr().unwrap().to_string());
    let (status, _, error) = run(folder.path(), &["serve", "--config", "a.toml"]);
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("server.listen") && error.contains("another port"), "{error}");

    let keys = keys_folder(&folder, "");
    let sim = SimulatorProcess::start(folder.path(), &keys, &[]).await;
    let _service = Service::start(folder.path(), "sqlite://s.db", &sim).await;
    std::fs::write(
        folder.path().join("b.toml"),
        format!("[server]\nlisten = \"{}\"\n[database]\nurl = \"sqlite://s.db\"\n", free_address()),
    )
    .unwrap();
    let (status, _, error) = run(folder.path(), &["serve", "--config", "b.toml"]);
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("another sonnette is serving"), "{error}");
}

#[test]
fn mistakes_on_the_command_line_and_in_files_are_named() {
    let folder = Folder::new("mistakes");
    std::fs::write(folder.path().join("sonnette.toml"), "[database]\nulr = \"mysql://u:hunter2@h/d\"\n").unwrap();
    let (status, _, error) = run(folder.path(), &["serve"]);
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("ulr") && !error.contains("hunter2"), "{error}");
    let (status, _, error) = run(folder.path(), &["serve", "--nonsense"]);
    assert_eq!(status.code(), Some(2), "{error}");
    let (status, help, _) = run(folder.path(), &["--help"]);
    assert!(status.success());
    for command in ["demo", "serve", "simulator", "migrate", "keys", "api-keys", "send", "health"] {
        assert!(help.contains(command), "{help}");
    }
}

#[test]
fn keys_and_api_keys_are_made_listed_and_revoked() {
    let folder = Folder::new("keys");
    let go = |arguments: &[&str]| {
        let (status, output, error) = run(folder.path(), arguments);
        assert!(status.success(), "{arguments:?}: {error}");
        output
    };
    go(&["keys", "generate", "k.p8"]);
    assert!(go(&["keys", "inspect", "k.p8"]).contains("BEGIN PUBLIC KEY"));
    let pem = std::fs::read_to_string(folder.path().join("k.p8")).unwrap();
    assert!(!go(&["keys", "inspect", "k.p8"]).contains(pem.lines().nth(1).unwrap()), "the private key is not shown");
    let (status, ..) = run(folder.path(), &["keys", "generate", "k.p8"]);
    assert!(!status.success(), "keys are not overwritten");
    let key = go(&["api-keys", "create", "--owner", "shop", "--scopes", "send,read"]);
    assert_eq!(key.lines().count(), 1, "the key alone on standard output");
    let id = key.split('_').nth(1).unwrap();
    assert!(go(&["api-keys", "list"]).contains(id));
    go(&["api-keys", "revoke", id]);
    assert!(go(&["api-keys", "list"]).contains("revoked"));
    assert!(go(&["migrate"]).contains("up to date"));
}
