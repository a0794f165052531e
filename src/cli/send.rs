//! `sonnette send`: one notification through a running service.
#![expect(clippy::indexing_slicing, reason = "an index into a JSON value answers null for what is absent")]

use std::path::PathBuf;

use anyhow::bail;
use serde_json::{Value, json};

use crate::cli::{Common, client::Client, say};

/// Sends one notification through a running service and waits for its outcome.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The app's bundle id.
    #[arg(long)]
    pub topic: String,
    /// The user whose devices are sent to.
    #[arg(long, required_unless_present = "device")]
    pub user: Option<String>,
    /// The id of one device instead.
    #[arg(long, conflicts_with = "user")]
    pub device: Option<String>,
    /// The title that is shown.
    #[arg(long)]
    pub title: String,
    /// The text that is shown.
    #[arg(long)]
    pub body: Option<String>,
    /// Your own word for it.
    #[arg(long)]
    pub reference: Option<String>,
    /// Where the service is; without it, where the configuration says that it listens.
    #[arg(long)]
    pub url: Option<String>,
    /// An API key with the scopes `send` and `read`; without it, the environment's `SONNETTE_API_KEY`.
    #[arg(long)]
    pub key: Option<String>,
    /// The certificate of a service with a private one, PEM.
    #[arg(long)]
    pub ca_file: Option<PathBuf>,
    /// Do not wait for the outcome.
    #[arg(long)]
    pub no_wait: bool,
}

/// How often, and how many times, the outcome is asked for.
const LOOKS: u32 = 100;

/// Runs the command.
///
/// # Errors
/// What is in the way; also if the notification ended without being accepted for every device.
pub async fn run(common: &Common, args: &Args) -> anyhow::Result<()> {
    let url = match &args.url {
        Some(url) => url.clone(),
        None => Common::service_url(&common.config()?),
    };
    let Some(key) = args.key.clone().or_else(|| common.variable("SONNETTE_API_KEY")) else {
        bail!(
            "an API key is needed: --key, or SONNETTE_API_KEY; make one with `sonnette api-keys create --owner me --scopes send,read`"
        );
    };
    let client = Client::new(&url, Some(key), args.ca_file.as_deref())?;
    let mut alert = json!({ "title": args.title });
    if let Some(body) = &args.body {
        alert["body"] = json!(body);
    }
    let to = match (&args.user, &args.device) {
        (Some(user), _) => json!({ "user_ids": [user] }),
        (None, device) => json!({ "device_ids": [device] }),
    };
    let mut body =
        json!({ "topic": args.topic, "to": to, "payload": { "aps": { "alert": alert, "sound": "default" } } });
    if let Some(reference) = &args.reference {
        body["reference"] = json!(reference);
    }
    let sent = client.ask(http::Method::POST, "/v1/notifications", Some(body)).await?.ok()?;
    let id = sent.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
    say(format_args!("{id} is kept, for {} device(s)", sent["counts"]["targeted"]));
    if args.no_wait {
        return Ok(());
    }
    let seen = until_done(common, &client, &id).await?;
    say(format_args!("{}: {}", seen["status"].as_str().unwrap_or_default(), seen["counts"]));
    let deliveries = client.ask(http::Method::GET, &format!("/v1/notifications/{id}/deliveries"), None).await?.ok()?;
    for delivery in deliveries["items"].as_array().into_iter().flatten() {
        say(format_args!(
            "  …{}: {} {}",
            delivery["token_hint"].as_str().unwrap_or("?"),
            delivery["status"].as_str().unwrap_or_default(),
            delivery["reason"].as_str().unwrap_or_default()
        ));
    }
    if seen["counts"]["accepted"] != seen["counts"]["targeted"] || seen["counts"]["targeted"] == json!(0) {
        bail!("not every device was accepted: see above");
    }
    Ok(())
}

/// Asks until the notification is done, or patience ends: then the last answer.
pub(crate) async fn until_done(common: &Common, client: &Client, id: &str) -> anyhow::Result<Value> {
    let mut looks = 0;
    loop {
        let seen = client.ask(http::Method::GET, &format!("/v1/notifications/{id}"), None).await?.ok()?;
        looks += 1;
        if matches!(seen["status"].as_str(), Some("done" | "cancelled")) || looks >= LOOKS {
            return Ok(seen);
        }
        common.clock().sleep(std::time::Duration::from_millis(100)).await;
    }
}
