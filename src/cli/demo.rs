//! `sonnette demo`: the main job on this machine, with no account.
//!
//! Promises: SQLite (or the database that `DATABASE_URL` names), a fresh key, the APNs simulator and sample devices, all in a folder of its own; a push goes from
//! an HTTP request over real TLS and HTTP/2 to the simulator and its outcome is read back; then it keeps serving. A
//! second start finds its folder and goes on; a port that is taken is replaced by a free one, and said.
#![expect(clippy::indexing_slicing, reason = "an index into a JSON value answers null for what is absent")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::{
    app::{App, Options},
    cli::{Common, api_keys, client::Client, keys, say, send::until_done, serve::until_told},
    config::Config,
    domain::{api_key::Scope, secret::Secret},
    sim::{self, Simulator},
    telemetry::{self, LogSettings},
};

/// Everything on this machine with no account.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the API listens; without it 127.0.0.1:8080, or a free port if that is taken.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Where the database, the key and the simulator's certificate are kept.
    #[arg(long, value_name = "FOLDER", default_value = "sonnette-demo")]
    pub folder: PathBuf,
    /// End after the push was shown instead of serving on.
    #[arg(long)]
    pub once: bool,
}

const TOPIC: &str = "fr.ocpizza.livreur";
const TEAM: &str = "DEMOTEAM01";
const KEY_ID: &str = "DEMOKEY001";
const KEY_FILE: &str = "AuthKey_DEMOKEY001.p8";

/// Sample phones: token, user, installation.
const PHONES: [(&str, &str, &str); 2] = [
    ("a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90", "livreur-42", "phone-of-the-counter"),
    ("0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0", "livreur-7", "phone-of-the-kitchen"),
];

/// Runs the demo.
///
/// # Errors
/// What is in the way; also if the push was not accepted.
pub async fn run(common: &Common, args: Args) -> anyhow::Result<()> {
    telemetry::start_logs(&LogSettings { level: "warn".into(), json: false }).map_err(anyhow::Error::msg)?;
    let keys_folder = prepare(&args.folder)?;
    say(format_args!("Sonnette {}, a demo in {}", env!("CARGO_PKG_VERSION"), args.folder.display()));
    say("");
    let simulator = Simulator::start(
        sim::Settings {
            folder: args.folder.join("simulator"),
            keys: sim::read_folder(&keys_folder)?,
            ..sim::Settings::default()
        },
        common.clock(),
    )
    .await?;
    step(format_args!("an APNs of our own listens on {} (TLS, HTTP/2)", simulator.production()));
    let app = start(common, &args, &simulator).await?;
    let database = app.store().server().await?;
    step(format_args!("the service listens on http://{} and keeps everything in {database}", app.address()));
    let (presented, key) = api_keys::make(
        "demo",
        [Scope::Register, Scope::Send, Scope::Read, Scope::Metrics, Scope::Admin],
        None,
        None,
        common.clock().now(),
    );
    app.store().add_api_key(&key).await?;
    let key = presented.reveal();
    let url = format!("http://{}", app.address());
    let client = Client::new(&url, Some(key.clone()), None)?;
    let device = show(common, &client, &simulator).await?;
    if args.once {
        app.shutdown(Duration::from_secs(5)).await;
        simulator.shutdown().await;
        return Ok(());
    }
    print_what_to_try(&url, &key, &device, &simulator);
    let outcome = until_told(app, Duration::from_secs(5)).await;
    simulator.shutdown().await;
    outcome
}

fn step(what: impl std::fmt::Display) {
    say(format_args!("  ✓ {what}"));
}

/// The folder with a fresh key, or the one of the last start.
fn prepare(folder: &Path) -> anyhow::Result<PathBuf> {
    let keys_folder = folder.join("keys");
    std::fs::create_dir_all(&keys_folder)
        .with_context(|| format!("{} cannot be made: choose another with --folder", keys_folder.display()))?;
    let key_file = keys_folder.join(KEY_FILE);
    if !key_file.exists() {
        keys::generate(&key_file)?;
    }
    let apps = format!(
        "[[app]]\ntopic = \"{TOPIC}\"\nteam_id = \"{TEAM}\"\nkey_id = \"{KEY_ID}\"\nkey_file = \"{KEY_FILE}\"\nenvironments = [\"production\", \"sandbox\"]\n"
    );
    std::fs::write(keys_folder.join("apps.toml"), apps)?;
    Ok(keys_folder)
}

async fn start(common: &Common, args: &Args, simulator: &Simulator) -> anyhow::Result<App> {
    let mut config = Config::default();
    config.database.url = Secret::new(format!("sqlite://{}", args.folder.join("sonnette.db").display()));
    if let Some(url) = common.variable("DATABASE_URL") {
        config.database.url = Secret::new(url);
    }
    config.apns.production = format!("https://{}", simulator.production());
    config.apns.sandbox = format!("https://{}", simulator.sandbox());
    config.apns.ca_file = Some(simulator.ca_file().to_path_buf());
    config.apns.keys = args.folder.join("keys");
    config.read_apps()?;
    if let Some(address) = args.listen {
        config.server.listen = address.to_string();
        return Ok(App::start(&config, common.clock(), Options::default()).await?);
    }
    match App::start(&config, common.clock(), Options::default()).await {
        Err(crate::app::AppError::Listen { address, .. }) => {
            say(format_args!("  · {address} is taken: a free port is used instead"));
            config.server.listen = "127.0.0.1:0".into();
            Ok(App::start(&config, common.clock(), Options::default()).await?)
        }
        started => Ok(started?),
    }
}

/// Registers, sends, reads back: as anybody would, over HTTP. Returns a device's id.
async fn show(common: &Common, client: &Client, simulator: &Simulator) -> anyhow::Result<String> {
    let mut device = String::new();
    for (token, user, installation) in PHONES {
        let body = json!({
            "token": token, "topic": TOPIC, "user_id": user, "installation_id": installation,
            "locale": "fr-FR", "model": "iPhone15,2",
        });
        let registered = client.ask(http::Method::POST, "/v1/devices", Some(body)).await?.ok()?;
        if device.is_empty() {
            registered["id"].as_str().unwrap_or_default().clone_into(&mut device);
        }
    }
    step("two phones are registered, for livreur-42 and livreur-7");
    let body = json!({
        "topic": TOPIC,
        "to": { "user_ids": ["livreur-42"] },
        "payload": {
            "aps": {
                "alert": { "title": "Nouvelle livraison", "body": "Commande 1042, 12 rue Oberkampf" },
                "sound": "default",
            },
            "order_id": 1042,
        },
        "reference": "1042",
    });
    let before = simulator.ledger().counters().accepted;
    let sent = client.ask(http::Method::POST, "/v1/notifications", Some(body)).await?.ok()?;
    let id = sent["id"].as_str().unwrap_or_default();
    step(format_args!("POST /v1/notifications for livreur-42: 202, kept as {id}"));
    let seen = until_done(common, client, id).await?;
    let path = format!("/v1/notifications/{id}/deliveries");
    let deliveries = client.ask(http::Method::GET, &path, None).await?.ok()?;
    let delivery = deliveries["items"].get(0).cloned().unwrap_or(Value::Null);
    if delivery["status"] != json!("accepted") {
        bail!("the push was not accepted: {seen} {delivery}");
    }
    step(format_args!(
        "the APNs answered 200 for the phone …{}: accepted, apns-id {}",
        delivery["token_hint"].as_str().unwrap_or_default(),
        delivery["apns_id"].as_str().unwrap_or_default(),
    ));
    let arrived = simulator.ledger().counters().accepted - before;
    step(format_args!("the APNs' own ledger shows {arrived} push, over HTTP/2 with a verified provider token"));
    Ok(device)
}

fn print_what_to_try(url: &str, key: &str, device: &str, simulator: &Simulator) {
    let payload = r#"{"aps":{"alert":{"title":"Bonjour"}}}"#;
    say(format_args!(
        r#"
It keeps serving. What to try, in another terminal:

  export KEY={key}

  # send to the rider
  curl --http2-prior-knowledge {url}/v1/notifications -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
    -d '{{"topic":"{TOPIC}","to":{{"user_ids":["livreur-42"]}},"payload":{payload},"reference":"1043"}}'

  # did order 1043 arrive?
  curl -s "{url}/v1/notifications?reference=1043" -H "Authorization: Bearer $KEY"

  # the phone passes to another rider, then nobody's
  curl {url}/v1/devices -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
    -d '{{"topic":"{TOPIC}","token":"{token}","user_id":"livreur-7"}}'
  curl -X DELETE {url}/v1/devices/{device}/user -H "Authorization: Bearer $KEY"

  # health, metrics, and what the APNs saw
  curl -s {url}/health -H "Authorization: Bearer $KEY"
  curl -s {url}/metrics -H "Authorization: Bearer $KEY"
  curl -s http://{control}/ledger

Ctrl-C ends it."#,
        token = PHONES[0].0,
        control = simulator.control(),
    ));
}
