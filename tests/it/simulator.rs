//! The simulator, driven over real TLS by a bare `h2` client and by hand-written bytes, so that nothing of our own
//! client can hide what it does.

mod chaos;
mod truth;

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Method, Request};
use p256::{
    ecdsa::{Signature, SigningKey, signature::Signer as _},
    pkcs8::{EncodePublicKey as _, LineEnding},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use sonnette::{
    domain::clock::{Clock as _, ManualClock, Timestamp},
    sim::{
        Action, Device, Environment, GoAwayOrder, LastStream, PREFIX, PREFIXES, ProviderKey, PushQuery, Reason, Script,
        Settings, Simulator, Topics,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

pub(super) const START: i64 = 1_795_372_500;
pub(super) const TOPIC: &str = "fr.ocpizza.livreur";
pub(super) const TOKEN: &str = "00a1b2c3d4e5f60718293a4b5c6d7e8f00a1b2c3d4e5f60718293a4b5c6d7e8f";

/// A simulator on its own clock, with the keys of two teams, and what a test needs to talk to it.
pub(super) struct World {
    pub(super) simulator: Simulator,
    pub(super) clock: Arc<ManualClock>,
    pub(super) signing: SigningKey,
    pub(super) tasks: JoinSet<()>,
    pub(super) folder: std::path::PathBuf,
}

impl World {
    pub(super) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(super) async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let signing = SigningKey::from_slice(&[7; 32]).unwrap();
        let public_key_pem = signing.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
        let key = |key_id: &str, environments: &[Environment], topics: Topics| ProviderKey {
            key_id: key_id.to_owned(),
            team_id: "TEAM000001".to_owned(),
            public_key_pem: public_key_pem.clone(),
            environments: environments.to_vec(),
            topics,
            related_key_id: None,
        };
        let folder = std::env::temp_dir().join(format!("sonnette-sim-{}", uuid::Uuid::new_v4()));
        let mut settings = Settings {
            folder: folder.clone(),
            keys: vec![
                key("KEY0000001", &Environment::ALL, Topics::All),
                key("STRANGER01", &Environment::ALL, Topics::All),
                key("SANDBOX001", &[Environment::Sandbox], Topics::Only(vec![TOPIC.to_owned()])),
            ],
            ..Settings::default()
        };
        change(&mut settings);
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(START)));
        let simulator = Simulator::start(settings, Arc::<ManualClock>::clone(&clock)).await.unwrap();
        Self { simulator, clock, signing, tasks: JoinSet::new(), folder }
    }

    /// A provider token issued `age` seconds ago.
    pub(super) fn jwt(&self, key_id: &str, age: i64) -> String {
        let url = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let header = url.encode(format!(r#"{{"alg":"ES256","kid":"{key_id}"}}"#));
        let claims = url.encode(format!(r#"{{"iss":"TEAM000001","iat":{}}}"#, self.clock.now().as_seconds() - age));
        let signature: Signature = self.signing.sign(format!("{header}.{claims}").as_bytes());
        format!("{header}.{claims}.{}", url.encode(signature.to_bytes()))
    }

    pub(super) fn connector(&self, protocols: &[&[u8]]) -> TlsConnector {
        self.connector_with(protocols, None)
    }

    /// Who presents this certificate, if any, with its key.
    pub(super) fn connector_with(
        &self,
        protocols: &[&[u8]],
        certificate: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    ) -> TlsConnector {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.simulator.ca_pem().as_bytes()).unwrap()).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certificate {
            Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }

    pub(super) async fn tls(&self, protocols: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.simulator.sandbox()).await.unwrap();
        self.connector(protocols).connect(ServerName::try_from("localhost").unwrap(), stream).await
    }

    pub(super) async fn connect(&mut self) -> Client {
        self.connect_to(Environment::Sandbox).await
    }

    pub(super) async fn connect_to(&mut self, environment: Environment) -> Client {
        self.connect_by(environment, self.connector(&[b"h2"])).await
    }

    pub(super) async fn connect_by(&mut self, environment: Environment, connector: TlsConnector) -> Client {
        let stream = TcpStream::connect(self.simulator.address(environment)).await.unwrap();
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        let (send, connection) =
            h2::client::Builder::new().initial_max_send_streams(1).handshake::<_, Bytes>(stream).await.unwrap();
        let (ended, end) = tokio::sync::oneshot::channel();
        self.tasks.spawn(async move {
            let result = connection.await;
            let _ = ended.send(result.map_err(|error| error.to_string()));
        });
        Client { send, jwt: self.jwt("KEY0000001", 0), end: Some(end) }
    }

    /// Waits, at most ten seconds, until the simulator is as `is` says.
    pub(super) async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        for _ in 0..2000 {
            if is(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never happened: {what}; {:?}", self.simulator.ledger().counters());
    }

    pub(super) async fn end(self) {
        self.simulator.shutdown().await;
        std::fs::remove_dir_all(self.folder).unwrap();
    }
}

/// One HTTP/2 connection.
pub(super) struct Client {
    pub(super) send: SendRequest<Bytes>,
    pub(super) jwt: String,
    pub(super) end: Option<tokio::sync::oneshot::Receiver<Result<(), String>>>,
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Value,
}

impl Answer {
    pub(super) fn reason(&self) -> (u16, &str) {
        (self.status, self.body["reason"].as_str().unwrap_or(""))
    }
}

impl Client {
    pub(super) fn request(&self, token: &str) -> http::request::Builder {
        Request::builder()
            .method(Method::POST)
            .uri(format!("https://localhost/3/device/{token}"))
            .header("authorization", format!("bearer {}", self.jwt))
            .header("apns-topic", TOPIC)
            .header("apns-push-type", "alert")
    }

    /// Waits for a stream and sends; the answer comes by the future.
    pub(super) async fn begin(
        &mut self,
        request: http::request::Builder,
        body: &str,
    ) -> Result<ResponseFuture, h2::Error> {
        let mut ready = self.send.clone().ready().await?;
        let (response, mut stream) = ready.send_request(request.body(()).unwrap(), body.is_empty())?;
        if !body.is_empty() {
            stream.send_data(Bytes::copy_from_slice(body.as_bytes()), true)?;
        }
        Ok(response)
    }

    pub(super) async fn ask(&mut self, request: http::request::Builder, body: &str) -> Result<Answer, h2::Error> {
        finish(self.begin(request, body).await?).await
    }

    pub(super) async fn push(&mut self, token: &str) -> Answer {
        self.ask(self.request(token), "{}").await.unwrap()
    }

    /// How the connection ended.
    pub(super) async fn ended(&mut self) -> Result<(), String> {
        tokio::time::timeout(Duration::from_secs(10), self.end.take().unwrap())
            .await
            .expect("the connection never ended")
            .unwrap()
    }
}

pub(super) async fn finish(response: ResponseFuture) -> Result<Answer, h2::Error> {
    let waited = async {
        let (head, mut stream) = response.await?.into_parts();
        let mut body = Vec::new();
        while let Some(bytes) = stream.data().await {
            body.extend_from_slice(&bytes?);
        }
        let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap_or_else(|_| text()) };
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
    };
    tokio::time::timeout(Duration::from_secs(10), waited).await.expect("no answer in ten seconds")
}

#[tokio::test]
async fn an_accepted_push_gets_its_id_back_and_no_body() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let id = "123e4567-e89b-12d3-a456-4266554400a0";
    let answer =
        client.ask(client.request(TOKEN).header("apns-id", id), r#"{"aps":{"alert":"Bonjour"}}"#).await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["apns-id"], id);
    assert_eq!(answer.headers["apns-unique-id"].len(), 36);
    assert!(!answer.headers.contains_key("content-type"));
    assert_eq!(answer.body, Value::Null);
    let pushes = world.simulator.ledger().pushes(&PushQuery::default());
    assert_eq!(pushes.len(), 1);
    assert_eq!((pushes[0].token.as_str(), pushes[0].topic.as_str()), (TOKEN, TOPIC));
    assert_eq!(
        (pushes[0].apns_id.to_string().as_str(), pushes[0].body.as_str()),
        (id, r#"{"aps":{"alert":"Bonjour"}}"#)
    );
    assert_eq!((pushes[0].connection, pushes[0].stream, pushes[0].push_type), (1, 1, Some("alert")));
    assert_eq!(pushes[0].at, Timestamp::from_seconds(START));
    world.end().await;
}

#[tokio::test]
async fn a_push_without_id_gets_one_in_upper_case_and_production_gives_no_unique_id() {
    let mut world = World::start().await;
    let mut client = world.connect_to(Environment::Production).await;
    let answer = client.push(TOKEN).await;
    let id = answer.headers["apns-id"].to_str().unwrap();
    assert_eq!((answer.status, id.len()), (200, 36));
    assert_eq!(id, id.to_uppercase());
    assert!(!answer.headers.contains_key("apns-unique-id"));
    assert_eq!(world.simulator.ledger().counters_of(Environment::Production).accepted, 1);
    assert_eq!(world.simulator.ledger().counters_of(Environment::Sandbox).accepted, 0);
    world.end().await;
}

#[tokio::test]
async fn every_documented_reason_is_reached_by_a_device_token_alone() {
    let mut world = World::start().await;
    let mut reached = Vec::new();
    for (code, _) in PREFIXES.iter().filter(|(code, _)| !code.starts_with('0')) {
        let mut client = world.connect().await;
        let answer = client.push(&format!("{PREFIX}{code}{TOKEN}")).await;
        assert_eq!(answer.status.to_string(), code[..3]);
        assert_eq!(answer.headers["apns-id"].len(), 36);
        if answer.body != Value::Null {
            assert_eq!(answer.headers["content-type"], "application/json");
            let timestamp = (answer.status == 410 && *code != "4102").then_some(START * 1000);
            assert_eq!(answer.body["timestamp"].as_i64(), timestamp, "{code}");
            reached.push(format!("{} {}", answer.status, answer.body["reason"].as_str().unwrap()));
        }
    }
    // Typed from Apple's page, with the two spellings seen on the wire only by others left out of the count below.
    let documented = [
        "400 BadCollapseId",
        "400 BadDeviceToken",
        "400 BadExpirationDate",
        "400 BadMessageId",
        "400 BadPriority",
        "400 BadTopic",
        "400 DeviceTokenNotForTopic",
        "400 DuplicateHeaders",
        "400 IdleTimeout",
        "400 InvalidPushType",
        "400 MissingDeviceToken",
        "400 MissingTopic",
        "400 PayloadEmpty",
        "400 TopicDisallowed",
        "403 BadCertificate",
        "403 BadCertificateEnvironment",
        "403 ExpiredProviderToken",
        "403 Forbidden",
        "403 InvalidProviderToken",
        "403 MissingProviderToken",
        "403 UnrelatedKeyIdInToken",
        "403 BadEnvironmentKeyIdInToken",
        "403 BadEnvironmentKeyInToken",
        "404 BadPath",
        "405 MethodNotAllowed",
        "410 ExpiredToken",
        "410 Unregistered",
        "413 PayloadTooLarge",
        "429 TooManyProviderTokenUpdates",
        "429 TooManyRequests",
        "500 InternalServerError",
        "503 ServiceUnavailable",
        "503 Shutdown",
    ];
    assert_eq!(documented.len(), Reason::ALL.len());
    for reason in documented {
        assert!(reached.iter().any(|one| one == reason), "{reason}");
    }
    assert_eq!(world.simulator.ledger().counters().accepted, 0);
    world.end().await;
}

#[tokio::test]
async fn genuine_mistakes_get_their_own_reason() {
    let mut world = World::start().await;
    assert!(world.simulator.devices().register(Device {
        environment: Environment::Sandbox,
        token: "aa01".to_owned(),
        topic: Some("fr.ocpizza.client".to_owned()),
        inactive_since_ms: None,
    }));
    assert!(world.simulator.devices().register(Device {
        environment: Environment::Sandbox,
        token: "aa02".to_owned(),
        topic: None,
        inactive_since_ms: Some(1_700_000_000_001),
    }));
    assert!(world.simulator.devices().register(Device {
        environment: Environment::Production,
        token: "aa03".to_owned(),
        topic: None,
        inactive_since_ms: None,
    }));
    let mut client = world.connect().await;
    let jwt = client.jwt.clone();
    let bare = |path: &str| Request::builder().method(Method::POST).uri(format!("https://localhost{path}"));
    let signed_as = |kind: &str, path: &str| {
        bare(path).header("authorization", format!("bearer {jwt}")).header("apns-push-type", kind)
    };
    let good_as = |kind: &str| signed_as(kind, &format!("/3/device/{TOKEN}")).header("apns-topic", TOPIC);
    let (signed, good) = (|path: &str| signed_as("alert", path), || good_as("alert"));
    let full = "x".repeat(4097);
    let voip = "x".repeat(5121);
    let cases: Vec<(http::request::Builder, &str, (u16, &str))> = vec![
        (bare("/3/device"), "{}", (404, "BadPath")),
        (bare("/4/broadcasts/apps/fr.ocpizza.livreur"), "{}", (404, "BadPath")),
        (bare("/3/device/ab").method(Method::HEAD), "", (405, "")),
        (bare("/3/device/ab").method(Method::GET), "", (405, "MethodNotAllowed")),
        (good().header("apns-topic", TOPIC), "{}", (400, "DuplicateHeaders")),
        (good().header("authorization", "bearer x"), "{}", (400, "DuplicateHeaders")),
        (bare("/3/device/ab").header("apns-topic", TOPIC), "{}", (403, "MissingProviderToken")),
        (bare("/3/device/ab").header("authorization", "bearer a.b.c"), "{}", (403, "InvalidProviderToken")),
        (good().header("apns-id", "1042"), "{}", (400, "BadMessageId")),
        (good().header("apns-expiration", "tomorrow"), "{}", (400, "BadExpirationDate")),
        (good().header("apns-priority", "11"), "{}", (400, "BadPriority")),
        (good_as("background").header("apns-priority", "10"), "{}", (400, "BadPriority")),
        (good_as("shout"), "{}", (400, "InvalidPushType")),
        (good().header("apns-collapse-id", "c".repeat(65)), "{}", (400, "BadCollapseId")),
        (signed("/3/device/ab"), "{}", (400, "MissingTopic")),
        (signed("/3/device/ab").header("apns-topic", "<fr.ocpizza>"), "{}", (400, "BadTopic")),
        (signed("/3/device/").header("apns-topic", TOPIC), "{}", (400, "MissingDeviceToken")),
        (signed("/3/device/abc").header("apns-topic", TOPIC), "{}", (400, "BadDeviceToken")),
        (signed("/3/device/%3Cab%3E").header("apns-topic", TOPIC), "{}", (400, "BadDeviceToken")),
        (signed("/3/device/aa01").header("apns-topic", TOPIC), "{}", (400, "DeviceTokenNotForTopic")),
        (signed("/3/device/AA02").header("apns-topic", TOPIC), "{}", (410, "Unregistered")),
        (signed("/3/device/aa03").header("apns-topic", TOPIC), "{}", (400, "BadDeviceToken")),
        (good(), "", (400, "PayloadEmpty")),
        (good(), &full, (413, "PayloadTooLarge")),
        (good_as("voip"), &voip, (413, "PayloadTooLarge")),
    ];
    for (request, body, expected) in cases {
        let shown = format!("{request:?}");
        let answer = client.ask(request, body).await.unwrap();
        assert_eq!(answer.status, expected.0, "{shown}");
        if expected.1.is_empty() {
            continue; // HEAD: the body may not be read
        }
        assert_eq!(answer.reason(), expected, "{shown}");
        if expected.0 == 410 {
            assert_eq!(answer.body["timestamp"], json!(1_700_000_000_001_i64));
        }
    }
    assert_eq!(client.ask(good(), &full[..4096]).await.unwrap().status, 200);
    assert_eq!(client.ask(good_as("voip"), &voip[..5120]).await.unwrap().status, 200);
    world.end().await;
}

#[tokio::test]
async fn a_body_in_pieces_larger_than_the_windows_is_read_to_its_limit() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let mut ready = client.send.clone().ready().await.unwrap();
    let (response, mut stream) = ready.send_request(client.request(TOKEN).body(()).unwrap(), false).unwrap();
    for piece in [r#"{"aps":"#, r#"{"alert":"#, r#""a"}}"#] {
        stream.send_data(Bytes::from_static(piece.as_bytes()), false).unwrap();
        tokio::task::yield_now().await;
    }
    stream.send_data(Bytes::new(), true).unwrap();
    assert_eq!(finish(response).await.unwrap().status, 200);
    assert_eq!(world.simulator.ledger().pushes(&PushQuery::default())[0].body, r#"{"aps":{"alert":"a"}}"#);
    let huge = "x".repeat(200_000); // over the connection's window of 65,535
    let answer = client.ask(client.request(TOKEN), &huge).await.unwrap();
    assert_eq!(answer.reason(), (413, "PayloadTooLarge"));
    assert_eq!(client.push(TOKEN).await.status, 200, "the connection lives on");
    world.end().await;
}

#[tokio::test]
async fn a_provider_token_lives_an_hour_on_the_clock() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(60 * 60));
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(60));
    assert_eq!(client.push(TOKEN).await.reason(), (403, "ExpiredProviderToken"));
    client.jwt = world.jwt("KEY0000001", -3601);
    assert_eq!(client.push(TOKEN).await.reason(), (403, "InvalidProviderToken"), "an hour ahead");
    world.end().await;
}

#[tokio::test]
async fn a_second_token_within_20_minutes_is_too_many_on_this_connection_only() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let first = client.jwt.clone();
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(19 * 60));
    client.jwt = world.jwt("KEY0000001", 0);
    assert_eq!(client.push(TOKEN).await.reason(), (429, "TooManyProviderTokenUpdates"));
    let mut other = world.connect().await;
    assert_eq!(other.push(TOKEN).await.status, 200, "the rule is per connection");
    let newer = std::mem::replace(&mut client.jwt, first);
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.clock.advance(Duration::from_secs(60));
    client.jwt = newer;
    assert_eq!(client.push(TOKEN).await.status, 200, "after 20 minutes");
    let seen = world.simulator.ledger().connections();
    let issued: Vec<_> = seen[0]
        .token_switches
        .iter()
        .map(|switch| (switch.at.as_seconds() - START, switch.issued_at - START))
        .collect();
    assert_eq!(issued, [(0, 0), (20 * 60, 19 * 60)]);
    let tokens = world.simulator.ledger().provider_tokens();
    assert_eq!(tokens.iter().map(|token| token.connections.clone()).collect::<Vec<_>>(), [vec![1], vec![2, 1]]);
    assert_eq!(tokens[0].last_seen, Timestamp::from_seconds(START + 19 * 60));
    world.end().await;
}

#[tokio::test]
async fn a_connection_keeps_to_its_key_and_its_environment() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    client.jwt = world.jwt("STRANGER01", 0);
    assert_eq!(client.push(TOKEN).await.reason(), (403, "UnrelatedKeyIdInToken"));
    let mut fresh = world.connect().await;
    fresh.jwt = world.jwt("STRANGER01", 0);
    assert_eq!(fresh.push(TOKEN).await.status, 200, "on a new connection it works");
    let mut production = world.connect_to(Environment::Production).await;
    production.jwt = world.jwt("SANDBOX001", 0);
    assert_eq!(production.push(TOKEN).await.reason(), (403, "BadEnvironmentKeyIdInToken"));
    let mut bound = world.connect().await;
    bound.jwt = world.jwt("SANDBOX001", 0);
    assert_eq!(bound.push(TOKEN).await.status, 200);
    let elsewhere = Request::builder()
        .method(Method::POST)
        .uri(format!("https://localhost/3/device/{TOKEN}"))
        .header("authorization", format!("bearer {}", bound.jwt))
        .header("apns-push-type", "alert")
        .header("apns-topic", "fr.ocpizza.client");
    assert_eq!(bound.ask(elsewhere, "{}").await.unwrap().reason(), (400, "TopicDisallowed"));
    world.end().await;
}

#[tokio::test]
async fn a_wrong_team_can_be_corrected_while_connections_are_open() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    world.simulator.keys().set_team("KEY0000001", "WRONGTEAM1").unwrap();
    assert_eq!(client.push(TOKEN).await.reason(), (403, "InvalidProviderToken"));
    world.simulator.keys().set_team("KEY0000001", "TEAM000001").unwrap();
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.end().await;
}

#[tokio::test]
async fn one_stream_is_allowed_before_the_first_accepted_token_and_a_thousand_after() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    world.simulator.gates().hold(Environment::Sandbox);
    let first = client.begin(client.request(TOKEN), "{}").await.unwrap();
    world.until("the first push has arrived", |world| world.simulator.ledger().counters().requests == 1).await;
    // Held, but its provider token was accepted: now the second SETTINGS must let others in.
    let mut waiting = vec![first];
    for _ in 0..999 {
        waiting.push(client.begin(client.request(TOKEN), "{}").await.unwrap());
    }
    world.until("a thousand are held", |world| world.simulator.ledger().counters().unanswered == 1000).await;
    world.simulator.gates().release(Environment::Sandbox);
    for response in waiting {
        assert_eq!(finish(response).await.unwrap().status, 200);
    }
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.accepted, counters.stream_limit_violations), (1000, 0));
    world.end().await;
}

/// The frames of a connection as bytes: type, flags, stream, payload.
pub(super) struct RawFrames {
    pub(super) stream: TlsStream<TcpStream>,
}

impl RawFrames {
    pub(super) async fn open(world: &World) -> Self {
        Self::over(world.tls(&[b"h2"]).await.unwrap()).await
    }

    pub(super) async fn over(mut stream: TlsStream<TcpStream>) -> Self {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        Self { stream }
    }

    pub(super) async fn next(&mut self) -> (u8, u8, u32, Vec<u8>) {
        let read = async {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).await.unwrap();
            (head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload)
        };
        tokio::time::timeout(Duration::from_secs(10), read).await.expect("no frame in ten seconds")
    }

    /// The next frame of this type, past others.
    pub(super) async fn next_of(&mut self, kind: u8) -> (u8, u32, Vec<u8>) {
        loop {
            let (found, flags, stream, payload) = self.next().await;
            if found == kind && !(kind == 4 && flags & 1 == 1) {
                return (flags, stream, payload);
            }
        }
    }

    /// A complete request.
    pub(super) async fn post(&mut self, stream: u32, jwt: &str) {
        self.post_to(stream, jwt, TOKEN).await;
    }

    /// A complete request for this device token.
    pub(super) async fn post_to(&mut self, stream: u32, jwt: &str, token: &str) {
        self.begin_to(stream, jwt, token).await;
        self.frame(0, 1, stream, b"{}").await;
    }

    /// The HEADERS of a request, with literal, never Huffman-coded fields.
    pub(super) async fn begin(&mut self, stream: u32, jwt: &str) {
        self.begin_to(stream, jwt, TOKEN).await;
    }

    async fn begin_to(&mut self, stream: u32, jwt: &str, token: &str) {
        let mut block = vec![0x83, 0x87]; // :method POST, :scheme https
        let path = format!("/3/device/{token}");
        let authorization = format!("bearer {jwt}");
        for (name, value) in [
            (":path", path.as_str()),
            (":authority", "localhost"),
            ("authorization", &authorization),
            ("apns-topic", TOPIC),
            ("apns-push-type", "alert"),
        ] {
            block.push(0);
            block.push(u8::try_from(name.len()).unwrap());
            block.extend_from_slice(name.as_bytes());
            if value.len() < 127 {
                block.push(u8::try_from(value.len()).unwrap());
            } else {
                block.push(127);
                let rest = value.len() - 127;
                if rest < 128 {
                    block.push(u8::try_from(rest).unwrap());
                } else {
                    block.extend_from_slice(&[
                        u8::try_from(rest % 128).unwrap() | 128,
                        u8::try_from(rest / 128).unwrap(),
                    ]);
                }
            }
            block.extend_from_slice(value.as_bytes());
        }
        self.frame(1, 4, stream, &block).await;
    }

    pub(super) async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags];
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).await.unwrap();
    }
}

/// The entries of a SETTINGS payload, sorted by id.
pub(super) fn settings(payload: &[u8]) -> Vec<(u16, u32)> {
    let entry = |entry: &[u8]| {
        (u16::from_be_bytes([entry[0], entry[1]]), u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]))
    };
    let mut all: Vec<_> = payload.chunks(6).map(entry).collect();
    all.sort_unstable();
    all
}

#[tokio::test]
async fn the_settings_frames_say_what_apns_says() {
    let world = World::start().await;
    let mut raw = RawFrames::open(&world).await;
    let (_, _, first) = raw.next_of(4).await;
    // header table, concurrent streams, window, frame, header list
    assert_eq!(settings(&first), [(1, 4096), (3, 1), (4, 65_535), (5, 16_384), (6, 8000)]);
    raw.post(1, &world.jwt("KEY0000001", 0)).await; // before the first SETTINGS is acknowledged
    let (flags, stream, _) = raw.next_of(1).await;
    assert_eq!((flags & 1, stream), (1, 1), "a 200 ends its stream with its HEADERS");
    raw.frame(4, 1, 0, b"").await;
    let (_, _, second) = raw.next_of(4).await;
    assert!(settings(&second).contains(&(3, 1000)), "{:?}", settings(&second));
    world.end().await;
}

#[tokio::test]
async fn a_client_that_ignores_the_limit_gets_goaway_7_in_plain_text() {
    let world = World::start().await;
    let mut raw = RawFrames::open(&world).await;
    world.simulator.gates().hold(Environment::Sandbox);
    let jwt = world.jwt("KEY0000001", 3601); // expired: the limit stays 1
    raw.post(1, &jwt).await;
    raw.post(3, &jwt).await;
    let (_, stream, refused) = raw.next_of(3).await;
    assert_eq!((stream, refused), (3, vec![0, 0, 0, 7]), "it had not acknowledged any limit: REFUSED_STREAM");
    raw.frame(4, 1, 0, b"").await;
    raw.post(5, &jwt).await;
    let (_, _, goaway) = raw.next_of(7).await;
    assert_eq!(goaway[4..8], [0, 0, 0, 7]);
    assert_eq!(std::str::from_utf8(&goaway[8..]).unwrap(), "Maximum active streams violated for this endpoint.");
    world.until("the connection is closed", |world| world.simulator.ledger().counters().connections_closed == 1).await;
    assert_eq!(world.simulator.ledger().counters().stream_limit_violations, 1);
    world.end().await;
}

#[tokio::test]
async fn a_rejected_provider_token_does_not_raise_the_limit() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    client.jwt = world.jwt("KEY0000001", 3601);
    assert_eq!(client.push(TOKEN).await.reason(), (403, "ExpiredProviderToken"));
    world.simulator.gates().hold(Environment::Sandbox);
    let held = client.begin(client.request(TOKEN), "{}").await.unwrap();
    world.until("it is held", |world| world.simulator.ledger().counters().unanswered == 1).await;
    let mut second = client.send.clone();
    let ready = tokio::time::timeout(Duration::from_millis(200), async {
        let _second = second.send_request(client.request(TOKEN).body(()).unwrap(), true).unwrap();
        second.ready().await
    });
    assert!(ready.await.is_err(), "the client must still be limited to one stream");
    drop(held);
    world.end().await;
}

#[tokio::test]
async fn only_clients_that_agree_on_h2_get_past_the_handshake() {
    let world = World::start().await;
    let refused = world.tls(&[b"http/1.1"]).await.unwrap_err().to_string();
    assert!(refused.contains("NoApplicationProtocol") || refused.contains("no_application_protocol"), "{refused}");
    world.until("the refusal is counted", |world| world.simulator.ledger().counters().tls_failures == 1).await;
    let mut silent = world.tls(&[]).await.unwrap();
    let mut buffer = [0; 1];
    let read = tokio::time::timeout(Duration::from_secs(10), silent.read(&mut buffer)).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "a client without ALPN is closed");
    world.until("it is counted", |world| world.simulator.ledger().counters().tls_failures == 2).await;
    assert_eq!(world.simulator.ledger().counters().connections_opened, 0);
    world.end().await;
}

#[tokio::test]
async fn the_ledger_shows_what_was_accepted_twice() {
    let mut world = World::with(|settings| settings.conduct.lenient = true).await; // an id in upper case
    let mut client = world.connect().await;
    for id in [
        "123e4567-e89b-12d3-a456-426655440001",
        "123E4567-E89B-12D3-A456-426655440001",
        "123e4567-e89b-12d3-a456-426655440002",
    ] {
        assert_eq!(client.ask(client.request(TOKEN).header("apns-id", id), "{}").await.unwrap().status, 200);
    }
    let repeats = world.simulator.ledger().repeats();
    assert_eq!(repeats.len(), 1);
    assert_eq!(
        (repeats[0].apns_id.to_string().as_str(), repeats[0].times),
        ("123e4567-e89b-12d3-a456-426655440001", 2)
    );
    world.end().await;
}

#[tokio::test]
async fn a_delay_lasts_as_long_as_the_clock_says() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    world.simulator.scripts().add(Script::new(TOKEN, Action::Accept).times(1).after_ms(60_000));
    let slow = client.begin(client.request(TOKEN), "{}").await.unwrap();
    world.until("it waits", |world| world.simulator.ledger().counters().unanswered == 1).await;
    assert_eq!(client.push("00bb").await.status, 200, "others do not wait");
    world.clock.advance(Duration::from_secs(59));
    assert_eq!(client.push("00bb").await.status, 200);
    assert_eq!(world.simulator.ledger().counters().unanswered, 1);
    world.clock.advance(Duration::from_secs(1));
    assert_eq!(finish(slow).await.unwrap().status, 200);
    world.simulator.gates().set_latency(Environment::Sandbox, Duration::from_millis(250));
    let late = client.begin(client.request("abc"), "{}").await.unwrap();
    world.until("it waits too", |world| world.simulator.ledger().counters().unanswered == 1).await;
    world.clock.advance(Duration::from_millis(250));
    assert_eq!(finish(late).await.unwrap().reason(), (400, "BadDeviceToken"), "latency is for refusals as well");
    world.end().await;
}

#[tokio::test]
async fn a_stalled_push_is_never_answered_and_gives_its_slot_back_when_the_client_gives_up() {
    let mut world = World::with(|settings| settings.stream_limit = 2).await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.simulator.scripts().add(Script::new("aa", Action::Stall { accepted: false }).times(1));
    world.simulator.scripts().add(Script::new("bb", Action::Stall { accepted: true }).times(1));
    let (one, two) = (
        client.begin(client.request("aa"), "{}").await.unwrap(),
        client.begin(client.request("bb"), "{}").await.unwrap(),
    );
    world.until("both stall", |world| world.simulator.ledger().counters().unanswered == 2).await;
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.accepted, counters.accepted_unanswered), (2, 1), "the ledger knows which was accepted");
    drop((one, two)); // RST_STREAM(CANCEL)
    assert_eq!(client.push(TOKEN).await.status, 200);
    assert_eq!(client.push(TOKEN).await.status, 200);
    assert_eq!(world.simulator.ledger().counters().stream_limit_violations, 0);
    world.end().await;
}

#[tokio::test]
async fn a_reset_may_come_before_or_after_acceptance() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    world.simulator.scripts().add(Script::new(TOKEN, Action::Reset { code: 7, accepted: false }).times(1));
    world.simulator.scripts().add(Script::new(TOKEN, Action::Reset { code: 2, accepted: true }).times(1));
    let refused = client.ask(client.request(TOKEN), "{}").await.err().unwrap();
    assert_eq!(refused.reason(), Some(h2::Reason::REFUSED_STREAM));
    assert_eq!(world.simulator.ledger().counters().accepted, 0);
    let lost = client.ask(client.request(TOKEN), "{}").await.err().unwrap();
    assert_eq!(lost.reason(), Some(h2::Reason::INTERNAL_ERROR));
    assert_eq!(world.simulator.ledger().counters().accepted, 1);
    assert_eq!(client.push(TOKEN).await.status, 200, "the connection lives on");
    world.end().await;
}

#[tokio::test]
async fn a_closed_connection_takes_the_answer_with_it() {
    let mut world = World::start().await;
    for accepted in [false, true] {
        let mut client = world.connect().await;
        world.simulator.scripts().add(Script::new(TOKEN, Action::Close { accepted }).times(1));
        assert!(client.ask(client.request(TOKEN), "{}").await.is_err());
        assert!(client.ended().await.is_err());
    }
    world.until("both are closed", |world| world.simulator.ledger().counters().connections_closed == 2).await;
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.requests, counters.accepted, counters.answered), (2, 1, 0));
    world.end().await;
}

#[tokio::test]
async fn a_goaway_tells_what_was_not_processed() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.simulator.gates().hold(Environment::Sandbox);
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(client.begin(client.request(TOKEN), "{}").await.unwrap()); // streams 3, 5, 7, 9
    }
    world.until("four are held", |world| world.simulator.ledger().counters().unanswered == 4).await;
    let order = GoAwayOrder { last_stream: Some(5), ..GoAwayOrder::default() };
    assert_eq!(world.simulator.gates().go_away(Environment::Sandbox, &order), 1);
    let refused = waiting.split_off(2);
    for response in refused {
        let error = finish(response).await.err().unwrap();
        assert!(error.is_go_away(), "{error:?}");
        assert!(error.to_string().contains("Shutdown"), "{error}");
    }
    world.simulator.gates().release(Environment::Sandbox);
    for response in waiting {
        assert_eq!(finish(response).await.unwrap().status, 200);
    }
    assert_eq!(world.simulator.ledger().counters().accepted, 3);
    world.end().await;
}

#[tokio::test]
async fn a_push_whose_body_ends_behind_a_goaway_that_excludes_it_is_not_processed() {
    let world = World::start().await;
    let jwt = world.jwt("KEY0000001", 0);
    let mut raw = RawFrames::open(&world).await;
    raw.frame(4, 1, 0, b"").await;
    raw.post(1, &jwt).await;
    raw.next_of(1).await;
    raw.begin(3, &jwt).await;
    raw.begin(5, &jwt).await;
    raw.frame(6, 0, 0, b"are they").await; // PING: its answer says that the headers were read
    while raw.next_of(6).await.0 & 1 == 0 {}
    world.simulator.gates().go_away(
        Environment::Sandbox,
        &GoAwayOrder { last_stream: Some(3), debug: Some("enough".to_owned()), ..GoAwayOrder::default() },
    );
    let (_, _, goaway) = raw.next_of(7).await;
    assert_eq!(goaway, [&[0, 0, 0, 3, 0, 0, 0, 0], b"enough".as_slice()].concat());
    raw.frame(0, 1, 5, b"{}").await;
    raw.post(7, &jwt).await;
    raw.frame(0, 1, 3, b"{}").await;
    let (flags, stream, _) = raw.next_of(1).await;
    assert_eq!((flags & 1, stream), (1, 3));
    let counters = world.simulator.ledger().counters();
    assert_eq!((counters.requests, counters.accepted), (2, 2));
    world.end().await;
}

#[tokio::test]
async fn a_graceful_goaway_still_answers_what_arrived() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let action = Action::GoAway { last_stream: LastStream::All, code: 0, debug: None, twice: false };
    world.simulator.scripts().add(Script::new(TOKEN, action).times(1));
    assert_eq!(client.push(TOKEN).await.status, 200);
    let _ = client.ended().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    let action =
        Action::GoAway { last_stream: LastStream::BeforeThis, code: 0, debug: Some("no".to_owned()), twice: false };
    world.simulator.scripts().add(Script::new(TOKEN, action).times(1));
    assert!(client.ask(client.request(TOKEN), "{}").await.err().unwrap().is_go_away());
    assert_eq!(world.simulator.ledger().counters().accepted, 2);
    world.end().await;
}

#[tokio::test]
async fn the_stream_limit_of_open_connections_can_be_changed() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.simulator.gates().set_stream_limit(Environment::Sandbox, 0);
    let mut raw = RawFrames::open(&world).await;
    assert!(settings(&raw.next_of(4).await.2).contains(&(3, 0)), "new connections begin with it");
    world.simulator.gates().set_stream_limit(Environment::Sandbox, 3);
    raw.frame(4, 1, 0, b"").await;
    assert!(settings(&raw.next_of(4).await.2).contains(&(3, 1)), "1 until a provider token is accepted");
    raw.frame(4, 1, 0, b"").await;
    raw.post(1, &world.jwt("KEY0000001", 0)).await;
    assert!(settings(&raw.next_of(4).await.2).contains(&(3, 3)));
    raw.frame(4, 1, 0, b"").await;
    for limit in [5, 3] {
        world.simulator.gates().set_stream_limit(Environment::Sandbox, limit);
        assert!(settings(&raw.next_of(4).await.2).contains(&(3, limit)), "{limit}");
        raw.frame(4, 1, 0, b"").await;
    }
    world.simulator.gates().hold(Environment::Sandbox);
    let jwt = world.jwt("KEY0000001", 0);
    for stream in [3, 5, 7, 9] {
        raw.post(stream, &jwt).await;
    }
    let (_, stream, payload) = raw.next_of(3).await;
    assert_eq!(
        (stream, payload),
        (9, vec![0, 0, 0, 7]),
        "the limit had fallen once: the surplus is refused, not punished"
    );
    world.end().await;
}

#[tokio::test]
async fn only_registered_devices_are_known_when_that_is_asked_for() {
    let mut world = World::with(|settings| settings.registered_devices_only = true).await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.reason(), (400, "BadDeviceToken"));
    let device =
        Device { environment: Environment::Sandbox, token: TOKEN.to_uppercase(), topic: None, inactive_since_ms: None };
    assert!(world.simulator.devices().register(device));
    assert_eq!(client.push(TOKEN).await.status, 200);
    world.end().await;
}

#[tokio::test]
async fn shutdown_sends_goaway_and_waits_for_every_task() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    assert_eq!(client.push(TOKEN).await.status, 200);
    let ledger = world.simulator.ledger();
    let mut tasks = std::mem::take(&mut world.tasks);
    world.end().await;
    assert_eq!(ledger.counters().connections_closed, 1);
    let _ = client.ended().await;
    while tasks.join_next().await.is_some() {}
}

/// One request to the control API over HTTP/1.1, written by hand: status and body.
pub(super) async fn control(world: &World, request: &str, body: &str) -> (u16, Value) {
    let (status, body) = control_text(world, request, body).await;
    (status, serde_json::from_str(&body).unwrap_or(Value::Null))
}

/// The same with the body as it came.
async fn control_text(world: &World, request: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(world.simulator.control()).await.unwrap();
    let head = format!(
        "{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn the_control_api_does_what_the_handles_do() {
    let mut world = World::start().await;
    let mut client = world.connect().await;
    let script =
        r#"{"token":"00AA","times":1,"action":{"answer":{"status":410,"reason":"Unregistered","timestamp_ms":5}}}"#;
    assert_eq!(control(&world, "POST /scripts", script).await.0, 204);
    let gone = client.push("00aa").await;
    assert_eq!((gone.reason(), gone.body["timestamp"].as_i64()), ((410, "Unregistered"), Some(5)));
    assert_eq!(client.push("00aa").await.status, 200);

    let (status, ledger) = control(&world, "GET /ledger", "").await;
    assert_eq!(
        (status, &ledger["total"]["accepted"], &ledger["sandbox"]["refused"]["410 Unregistered"]),
        (200, &json!(1), &json!(1))
    );
    let (_, pushes) = control(&world, "GET /ledger/pushes?after=0&limit=5&token=00AA&environment=sandbox", "").await;
    assert_eq!((&pushes["items"][0]["token"], &pushes["last"]), (&json!("00aa"), &json!(1)));
    let (_, next) = control(&world, "GET /ledger/pushes?after=1", "").await;
    assert_eq!(next, json!({"items": [], "last": 1}));
    let (_, tokens) = control(&world, "GET /ledger/provider-tokens", "").await;
    assert_eq!(tokens["items"][0]["key_id"], "KEY0000001");
    assert!(!tokens.to_string().contains(&client.jwt));
    let (_, connections) = control(&world, "GET /ledger/connections", "").await;
    assert_eq!(connections["items"][0]["requests"], 2);

    assert_eq!(control(&world, "PUT /keys/KEY0000001/team", r#"{"team_id":"OTHER"}"#).await.0, 204);
    assert_eq!(client.push("00aa").await.reason(), (403, "InvalidProviderToken"));
    assert_eq!(control(&world, "PUT /keys/NOSUCHKEY1/team", r#"{"team_id":"OTHER"}"#).await.0, 404);
    assert_eq!(control(&world, "PUT /keys/KEY0000001/team", r#"{"team_id":"TEAM000001"}"#).await.0, 204);

    assert_eq!(control(&world, "POST /environments/sandbox/hold", "").await.0, 204);
    let held = client.begin(client.request("00aa"), "{}").await.unwrap();
    world.until("it is held", |world| world.simulator.ledger().counters().unanswered == 1).await;
    assert_eq!(control(&world, "GET /environments/sandbox", "").await.1["held"], true);
    assert_eq!(control(&world, "POST /environments/sandbox/release", "").await.0, 204);
    assert_eq!(finish(held).await.unwrap().status, 200);

    for (request, body, status) in [
        ("GET /nothing", "", 404),
        ("POST /scripts", "{", 400),
        ("POST /scripts", "{}", 422),
        ("POST /environments/elsewhere/hold", "", 400),
        ("POST /devices", r#"{"environment":"sandbox","token":"xyz"}"#, 422),
        ("POST /keys", r#"{"key_id":"A","team_id":"B","public_key_pem":"no"}"#, 422),
        ("DELETE /devices/sandbox/ab", "", 404),
        ("GET /ledger/pushes?token=xyz", "", 422),
        ("GET /ledger/pushes?since=1", "", 400),
    ] {
        let answer = control(&world, request, body).await;
        assert_eq!(answer.0, status, "{request} {body}: {answer:?}");
        assert!(answer.1["error"].is_string(), "{request}: {answer:?}");
    }
    world.end().await;
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let world = World::start().await;
    let settings = Settings { control: world.simulator.control(), folder: world.folder.clone(), ..Settings::default() };
    let error = Simulator::start(settings, Arc::<ManualClock>::clone(&world.clock)).await.err().unwrap();
    assert_eq!(error.to_string(), format!("the control listener cannot have {}", world.simulator.control()));
    world.end().await;
}
