//! `sonnette send`: one notification through a running service.
#![expect(clippy::indexing_slicing, reason = "an index into a JSON value answers null for what is absent")]

use std::path::PathBuf;

use anyhow::bail;
use serde_json::{Value, json};

use crate::cli::{
    Common,
    client::{Answer, Client},
    say,
};

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

/// How often a request is made at most, and the time between.
const TRIES: u32 = 3;
const PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// How often, and how many times, the outcome is asked for.
const LOOKS: u32 = 100;

/// Runs the command.
///
/// # Errors
/// What is in the way; also if the notification is for no device, or ended without being accepted for every one. One
/// that still waits is no error.
pub async fn run(common: &Common, args: &Args) -> anyhow::Result<()> {
    let Some(key) = args.key.clone().or_else(|| common.variable("SONNETTE_API_KEY")) else {
        bail!(
            "an API key is needed: --key, or SONNETTE_API_KEY; make one with `sonnette api-keys create --owner me --scopes send,read`"
        );
    };
    let (_, client) = common.service(args.url.as_deref(), Some(key), args.ca_file.as_deref(), false)?;
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
    let sent = post(common, &client, &body).await?.ok()?;
    let id = sent.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
    say(format_args!("{id} is kept, for {} device(s)", sent["counts"]["targeted"]));
    if args.no_wait {
        return Ok(());
    }
    let seen = until_done(common, &client, &id).await?;
    if !is_done(&seen) {
        let reason = match seen["waiting_for"]["reason"].as_str() {
            Some(reason) => format!("still waiting ({reason})"),
            None => "still waiting".to_owned(),
        };
        say(format_args!(
            "{reason}: it is kept and leaves by itself; do not send it again. GET /v1/notifications/{id} tells its outcome."
        ));
        return Ok(());
    }
    if seen["counts"]["targeted"] == json!(0) {
        match &args.user {
            Some(user) => bail!("no device of the user `{user}` is registered for {} and can be sent to", args.topic),
            None => bail!("no such device of {} can be sent to", args.topic),
        }
    }
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
    if seen["counts"]["accepted"] != seen["counts"]["targeted"] {
        bail!("not every device was accepted: see above");
    }
    Ok(())
}

fn is_done(seen: &Value) -> bool {
    matches!(seen["status"].as_str(), Some("done" | "cancelled"))
}

/// Sends, and repeats while no answer comes or the service asks for it: the key makes it one notification.
async fn post(common: &Common, client: &Client, body: &Value) -> anyhow::Result<Answer> {
    let key = uuid::Uuid::new_v4().to_string();
    let mut tries = 1;
    loop {
        let answer = client.ask_as(http::Method::POST, "/v1/notifications", Some(body.clone()), Some(&key)).await;
        let again = answer.as_ref().map_or(true, |answer| matches!(answer.status.as_u16(), 429 | 503));
        if !again || tries >= TRIES {
            return answer;
        }
        tries += 1;
        common.clock().sleep(PAUSE).await;
    }
}

/// Asks until the notification is done, or patience ends: then the last answer.
pub(crate) async fn until_done(common: &Common, client: &Client, id: &str) -> anyhow::Result<Value> {
    let mut looks = 0;
    loop {
        let seen = client.ask(http::Method::GET, &format!("/v1/notifications/{id}"), None).await?.ok()?;
        looks += 1;
        if is_done(&seen) || looks >= LOOKS {
            return Ok(seen);
        }
        common.clock().sleep(std::time::Duration::from_millis(100)).await;
    }
}
