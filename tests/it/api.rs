//! The API as its callers see it: over HTTP/2, against the real service on both stores.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::Method;
use serde_json::{Value, json};
use sonnette::{
    cli::make_api_key,
    domain::{
        api_key::{ApiKeyId, Scope},
        clock::{Clock, SystemClock, Timestamp},
    },
};

use crate::support::{
    client::{Answer, Client},
    database::on_both_stores,
    world::{TOPIC, World},
};

const TOKEN: &str = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90";

fn request(more: &Value) -> Value {
    let mut body = json!({
        "topic": TOPIC, "to": {"user_ids": ["livreur-42"]}, "payload": {"aps": {"alert": "Commande 1042"}}
    });
    for (field, value) in more.as_object().unwrap() {
        body[field] = value.clone();
    }
    body
}

/// What every refusal must look like.
#[track_caller]
fn refused(answer: &Answer, status: u16, kind: &str) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{}", answer.text);
    assert_eq!(answer.body["type"], format!("/problems/{kind}"), "{}", answer.text);
    assert_eq!(answer.body["status"], status);
    assert_eq!(answer.body["request_id"].as_str(), answer.header("x-request-id"));
    assert!(answer.body["detail"].is_string() && answer.body["errors"].is_array(), "{}", answer.text);
}

async fn send(client: &Client, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    client.send(method, path, headers, body.to_owned()).await.unwrap()
}

on_both_stores! {
    async fn whatever_is_refused_is_a_problem_document(database) {
        let world = World::start(database).await;
        let server = &world.server;
        refused(&server.get("/v2/x").await, 404, "not-found");
        refused(&server.get("/v1/devices/").await, 404, "not-found");
        refused(&server.get("/v1/devices/not-an-id").await, 404, "not-found");
        refused(&server.get("/v1/notifications/0193515e-8f00-7abc-8def-0123456789ab").await, 404, "not-found");
        let answer = send(server, Method::PUT, "/v1/devices", &[], "{}").await;
        refused(&answer, 405, "method-not-allowed");
        assert!(answer.header("allow").unwrap().contains("POST"));
        assert_eq!(answer.body["detail"], "This path knows POST, GET, HEAD.");
        // Over HTTP/2 a body behind the answer to HEAD breaks the stream.
        let answer = send(server, Method::HEAD, "/v1/users/anna/identity-tokens", &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.text.as_str(), answer.is_whole), (405, "", true));
        assert_eq!(answer.header("allow"), Some("POST"));
        for (method, path) in [
            (Method::POST, "/v1/notifications?dry_run=true"),
            (Method::POST, "/v1/devices?x=1"),
            (Method::GET, "/v1/devices/0193515e-8f00-7abc-8def-0123456789ab?x=1"),
            (Method::DELETE, "/v1/devices/0193515e-8f00-7abc-8def-0123456789ab?x=1"),
            (Method::DELETE, "/v1/devices/0193515e-8f00-7abc-8def-0123456789ab/user?x=1"),
            (Method::GET, "/v1/notifications/0193515e-8f00-7abc-8def-0123456789ab?x=1"),
            (Method::POST, "/v1/users/anna/identity-tokens?x=1"),
        ] {
            let body = if method == Method::POST { request(&json!({})).to_string() } else { String::new() };
            let answer = send(server, method, path, &[], &body).await;
            refused(&answer, 422, "invalid-fields");
            assert_eq!(answer.body["errors"][0]["code"], "unknown_parameter", "{path}");
        }
        let id = world.send(json!({"user_ids": ["nobody"]})).await;
        let other = world.server.get("/v1/notifications?limit=1").await.ok()["next_cursor"].clone();
        assert_eq!(other, Value::Null);
        for path in ["/v1/devices".to_owned(), "/v1/notifications".to_owned(), format!("/v1/notifications/{id}/deliveries")] {
            let answer = server.get(&format!("{path}?cursor=b3RoZXI")).await;
            refused(&answer, 422, "invalid-fields");
            assert_eq!(answer.body["errors"][0]["parameter"], "cursor", "{path}");
        }
        let answer = send(server, Method::OPTIONS, "/v1/notifications", &[], "").await;
        assert_eq!(answer.status, 204);
        assert!(answer.header("allow").unwrap().contains("POST"));
        refused(
            &send(server, Method::POST, "/v1/devices", &[("content-type", "text/plain")], "").await,
            415,
            "unsupported-media-type",
        );
        refused(&send(server, Method::POST, "/v1/devices", &[], "").await, 415, "unsupported-media-type");
        refused(&send(server, Method::POST, "/v1/notifications", &[], "").await, 415, "unsupported-media-type");
        let answer = send(server, Method::POST, "/v1/devices", &[], "{\"topic\": ").await;
        refused(&answer, 400, "not-json");
        assert!(answer.body["detail"].as_str().unwrap().contains("line 1 column"));
        let long = format!("{{\"token\": \"{}\"}}", "a".repeat(70 * 1024));
        refused(&send(server, Method::POST, "/v1/devices", &[], &long).await, 413, "too-large");
        let answer = server.post("/v1/devices", &json!({"token": "xyz", "bundle_id": TOPIC, "user_id": ""})).await;
        refused(&answer, 422, "invalid-fields");
        assert_eq!(answer.pointers(), ["/topic", "/token", "/user_id", "/bundle_id"]);
        let answer = server.get("/v1/notifications?limit=0&stauts=done&since=yesterday").await;
        refused(&answer, 422, "invalid-fields");
        let named: BTreeSet<&str> =
            answer.body["errors"].as_array().unwrap().iter().map(|e| e["parameter"].as_str().unwrap()).collect();
        assert_eq!(named, BTreeSet::from(["limit", "since", "stauts"]));
        for (method, path) in [(Method::GET, "/v2/x"), (Method::POST, "/v1/notifications")] {
            let answer = send(server, method, path, &[("x-request-id", "order-1042")], "").await;
            assert_eq!(answer.header("x-request-id"), Some("order-1042"), "{path}");
        }
    }

    async fn a_notification_with_many_faults_is_told_all_of_them(database) {
        let world = World::start(database).await;
        let answer = world
            .server
            .post(
                "/v1/notifications",
                &json!({
                    "topic": TOPIC, "to": {"tokens": ["a1b2", "xyz"]}, "title": "Bonjour", "priority": 7,
                    "payload": {"aps": {"alert": {"title": "x".repeat(5_000)}}},
                }),
            )
            .await;
        refused(&answer, 422, "invalid-fields");
        let pointers: BTreeSet<&str> = answer.pointers().into_iter().collect();
        assert_eq!(pointers, BTreeSet::from(["/payload", "/priority", "/title", "/to/tokens/1"]), "{}", answer.text);
        assert!(answer.text.contains("4096") && answer.text.contains("/payload/aps/alert/title"), "{}", answer.text);
        assert_eq!(world.sim.ledger().counters().requests, 0, "nothing was sent");
    }

    async fn a_key_does_what_its_scopes_and_topics_say(database) {
        let world = World::start(database).await;
        let anonymous = Client::new(world.app().address(), None);
        let answer = anonymous.post("/v1/notifications", &request(&json!({}))).await;
        refused(&answer, 401, "unauthorized");
        assert!(answer.header("www-authenticate").unwrap().starts_with("Bearer"));
        let answer = world.server.with_key("hunter2").get("/v1/devices").await;
        refused(&answer, 401, "unauthorized");
        assert!(!answer.text.contains("hunter2"));
        let reader = world.caller(&[Scope::Read]).await;
        let answer = reader.post("/v1/notifications", &request(&json!({}))).await;
        refused(&answer, 403, "forbidden");
        assert!(answer.text.contains("`send`"), "{}", answer.text);

        let now = world.clock.now();
        let topics = vec!["fr.ocpizza.client".parse().unwrap()];
        let (presented, key) = make_api_key("web", [Scope::Send, Scope::Read], Some(topics), None, now);
        world.app().store().add_api_key(&key).await.unwrap();
        let web = world.server.with_key(&presented.reveal());
        refused(&web.post("/v1/notifications", &request(&json!({}))).await, 403, "forbidden");
        let id = world.send(json!({"user_ids": ["nobody"]})).await;
        refused(&web.get(&format!("/v1/notifications/{id}")).await, 404, "not-found");
        refused(&web.get(&format!("/v1/notifications/{id}/deliveries")).await, 404, "not-found");
        assert_eq!(web.get("/v1/notifications").await.ok()["items"], json!([]));

        let (presented, key) = make_api_key("old", [Scope::Read], None, Some(now.minus(Duration::from_secs(1))), now);
        world.app().store().add_api_key(&key).await.unwrap();
        let answer = world.server.with_key(&presented.reveal()).get("/v1/devices").await;
        refused(&answer, 401, "unauthorized");
        assert!(answer.text.contains("expired"), "{}", answer.text);

        let revoked = world.key("gone", &[Scope::Read]).await;
        assert_eq!(world.server.with_key(&revoked).get("/v1/devices").await.status, 200);
        let id: ApiKeyId = revoked.split('_').nth(1).unwrap().parse().unwrap();
        world.app().store().revoke_api_key(&id, now).await.unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let answer = world.server.with_key(&revoked).get("/v1/devices").await;
            if answer.status == 401 {
                assert!(answer.text.contains("revoked"), "{}", answer.text);
                break;
            }
            assert!(std::time::Instant::now() < deadline, "a revoked key is refused within two seconds or so");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let guess = format!("sonnette_{id}_{}", "0".repeat(64));
        let answer = world.server.with_key(&guess).get("/v1/devices").await;
        refused(&answer, 401, "unauthorized");
        assert!(!answer.text.contains("revoked"), "who does not know the secret learns nothing of the key");
    }

    async fn an_app_registers_with_proof_and_learns_nothing_it_did_not_say(database) {
        let world = World::start(database).await;
        let app = world.caller(&[Scope::Register]).await;
        let mut body = json!({"token": TOKEN, "topic": TOPIC, "user_id": "livreur-42", "locale": "fr-FR"});
        let answer = app.post("/v1/devices", &body).await;
        refused(&answer, 403, "identity-refused");
        assert_eq!(answer.pointers(), ["/identity_token"]);
        let minted = world
            .server
            .post("/v1/users/livreur-42/identity-tokens", &json!({"topic": TOPIC, "ttl_seconds": 600}))
            .await
            .ok();
        let expires_at: Timestamp = minted["expires_at"].as_str().unwrap().parse().unwrap();
        assert!(expires_at > world.clock.now());
        body["identity_token"] = minted["identity_token"].clone();
        let device = app.post("/v1/devices", &body).await.ok();
        assert_eq!(
            device,
            json!({
                "id": device["id"], "topic": TOPIC, "push_type": "alert", "token": TOKEN, "user_id": "livreur-42",
                "locale": "fr-FR"
            })
        );
        body["user_id"] = json!("livreur-43");
        refused(&app.post("/v1/devices", &body).await, 403, "identity-refused");
        let path = format!("/v1/devices/{}", device["id"].as_str().unwrap());
        let seen = world.server.get(&path).await.ok();
        assert_eq!((&seen["user_id"], &seen["status"]), (&json!("livreur-42"), &json!("active")));
        let again = app.post("/v1/devices", &json!({"token": TOKEN.to_uppercase(), "topic": TOPIC})).await.ok();
        assert_eq!(again, json!({"id": device["id"], "topic": TOPIC, "push_type": "alert", "token": TOKEN}));
        app.post("/v1/devices", &json!({"token": TOKEN, "topic": TOPIC, "user_id": null})).await.ok();
        assert_eq!(world.server.get(&path).await.ok()["user_id"], Value::Null, "logged out");

        refused(&app.get(&path).await, 403, "forbidden");
        refused(&app.delete(&path).await, 403, "forbidden");
        assert_eq!(world.server.get("/v1/devices?status=active").await.ok()["items"].as_array().unwrap().len(), 1);
        assert_eq!(world.server.delete(&format!("{path}/user")).await.status, 204);
        for _ in 0..2 {
            assert_eq!(world.server.delete(&path).await.status, 204, "whether it exists or not");
        }
        refused(&world.server.get(&path).await, 404, "not-found");
    }

    async fn a_registration_that_leaves_the_push_type_out_leaves_it_unchanged(database) {
        let world = World::start(database).await;
        let app = world.caller(&[Scope::Register]).await;
        let first = json!({"token": TOKEN, "topic": TOPIC, "push_type": "voip", "installation_id": "phone"});
        let id = app.post("/v1/devices", &first).await.ok()["id"].clone();
        let alert = json!({"token": "a1b2", "topic": TOPIC, "installation_id": "phone"});
        let alert = app.post("/v1/devices", &alert).await.ok();
        assert_eq!(alert["push_type"], "alert");
        assert_ne!(alert["id"], id, "another kind of token takes no place");
        for body in [
            json!({"token": TOKEN, "topic": TOPIC}),
            json!({"token": TOKEN, "topic": TOPIC, "installation_id": "phone"}),
        ] {
            let again = app.post("/v1/devices", &body).await.ok();
            assert_eq!((&again["id"], &again["push_type"]), (&id, &json!("voip")));
        }
        for (token, push_type) in [(TOKEN, "voip"), ("a1b2", "alert")] {
            let devices = world.server.get("/v1/devices").await.ok();
            let device = devices["items"].as_array().unwrap().iter().find(|d| d["token"] == token).unwrap();
            assert_eq!((&device["push_type"], &device["status"]), (&json!(push_type), &json!("active")));
        }
    }

    async fn a_burst_of_first_requests_with_a_new_key_is_served(database) {
        let world = World::start(database).await;
        let caller = world.caller(&[Scope::Read]).await;
        let requests = (0..100).map(|_| {
            let caller = caller.clone();
            tokio::spawn(async move { caller.get("/v1/devices?limit=1").await.status.as_u16() })
        });
        for answer in requests.collect::<Vec<_>>() {
            assert_eq!(answer.await.unwrap(), 200);
        }
    }

    async fn a_client_that_asks_nothing_does_not_keep_its_place(database) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let world = World::start(database).await;
        let address = world.app().address();
        let mut waiting = Vec::new();
        for said in [&b""[..], b"P", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HT"] {
            waiting.push(tokio::spawn(async move {
                let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
                stream.write_all(said).await.unwrap();
                let mut heard = Vec::new();
                let ended = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut heard)).await;
                assert!(ended.is_ok(), "{said:?} keeps its place");
            }));
        }
        for client in waiting {
            client.await.unwrap();
        }
        assert_eq!(world.server.get("/v1/devices").await.status, 200, "a client that has asked stays");
    }

    async fn a_notification_is_accepted_sent_and_read_back(database) {
        let world = World::start(database).await;
        let device = world.device(TOKEN, Some("livreur-42")).await;
        let answer = world.server.post("/v1/notifications", &request(&json!({"reference": "1042"}))).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        let id = answer.body["id"].as_str().unwrap().to_owned();
        assert_eq!(answer.header("location"), Some(format!("/v1/notifications/{id}").as_str()));
        // What surrounds every request surrounds also the one that goes past the router.
        let length = answer.text.len().to_string();
        let said = ["content-type", "content-length", "cache-control"].map(|name| answer.header(name));
        assert_eq!(said, [Some("application/json"), Some(length.as_str()), Some("no-store")]);
        assert_eq!(answer.header("x-request-id").map(str::len), Some(36));
        refused(&Client::new(world.app().address(), None).post("/v1/notifications", &json!({})).await, 401, "unauthorized");
        let metrics = world.caller(&[Scope::Metrics]).await.get("/metrics").await.text;
        for status in [202, 401] {
            let counted =
                format!("sonnette_http_requests_total{{method=\"POST\",route=\"/v1/notifications\",status=\"{status}\"}}");
            assert!(metrics.contains(&counted), "{metrics}");
        }
        let done = world.done(&id).await;
        assert_eq!((&done["counts"]["accepted"], &done["audience_complete"]), (&json!(1), &json!(true)));
        let deliveries = world.deliveries(&id).await;
        assert_eq!(deliveries[0]["device_id"], device);
        assert_eq!((&deliveries[0]["status"], &deliveries[0]["apns_status"]), (&json!("accepted"), &json!(200)));
        let found = world.server.get("/v1/notifications?reference=1042&outcome=accepted&status=done").await.ok();
        assert_eq!((&found["items"][0]["id"], &found["next_cursor"]), (&json!(id), &Value::Null));
        assert_eq!(world.server.get("/v1/notifications?reference=1043").await.ok()["items"], json!([]));
    }

    async fn the_same_request_gets_the_same_answer_also_when_its_time_has_passed(database) {
        let world = World::start(database).await;
        let soon = SystemClock::new().now().plus(Duration::from_millis(1500));
        let body = request(&json!({"expiration": soon})).to_string();
        let post = |key: &'static str, body: String| {
            let server = world.server.clone();
            async move { server.send(Method::POST, "/v1/notifications", &[("idempotency-key", key)], body).await.unwrap() }
        };
        let first = post("k-1", body.clone()).await;
        assert_eq!(first.status, 202, "{}", first.text);
        let clock: Arc<dyn Clock> = Arc::clone(&world.clock);
        clock.sleep(soon.since(clock.now()) + Duration::from_millis(20)).await;
        refused(&post("k-2", body.clone()).await, 422, "invalid-fields");
        let again = post("k-1", body.clone()).await;
        assert_eq!((again.status, &again.text), (first.status, &first.text));
        assert_eq!(again.header("idempotency-replayed"), Some("true"));
        refused(&post("k-1", format!("{body} ")).await, 409, "idempotency-conflict");
        refused(&post("k-1", "{}".to_owned()).await, 409, "idempotency-conflict");
        let right = request(&json!({})).to_string();
        refused(&post("k-1", right).await, 409, "idempotency-conflict");
        refused(&post("a b", body).await, 422, "invalid-fields");
    }

    async fn health_and_metrics_are_for_whom_they_are(database) {
        let world = World::start(database).await;
        let url = format!("http://{}", world.app().address());
        let reader = world.caller(&[Scope::Read]).await;
        for (key, remarks) in [("hunter2", true), (reader.key(), false)] {
            let folder = world.folder.path().to_owned();
            let arguments = ["health", "--url", &url, "--key", key].map(str::to_owned);
            let ran = tokio::task::spawn_blocking(move || {
                crate::support::service::run(&folder, &arguments.each_ref().map(String::as_str))
            });
            let (status, out, err) = ran.await.unwrap();
            assert!(status.success() && !out.is_empty(), "{out}{err}");
            assert_eq!(err.contains("the key is refused: no details"), remarks, "{out}{err}");
        }
        let anonymous = Client::new(world.app().address(), None);
        for path in ["/health", "/health/live", "/health/ready"] {
            let answer = anonymous.get(path).await;
            assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, Some("application/health+json")));
        }
        let plain = anonymous.get("/health").await.body;
        assert!(plain["checks"]["database:commit"][0]["status"].is_string(), "{plain}");
        assert!(plain["checks"]["database:commit"][0]["output"].is_null(), "details are for the operator: {plain}");
        let full = world.server.get("/health").await.body;
        assert!(full["checks"]["database:commit"][0]["output"].is_string(), "{full}");
        refused(&anonymous.get("/metrics").await, 401, "unauthorized");
        refused(&world.server.get("/metrics").await, 403, "forbidden");
        let text = world.caller(&[Scope::Metrics]).await.get("/metrics").await.text;
        assert!(text.contains("sonnette_http_requests_total{method=\"GET\",route=\"/health\",status=\"200\"}"), "{text}");
        assert!(text.contains("sonnette_http_request_duration_seconds"), "{text}");
    }
}
