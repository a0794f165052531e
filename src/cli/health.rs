//! `sonnette health`: asks a running service; the exit status is for container and systemd checks.

use std::path::PathBuf;

use anyhow::bail;
use serde_json::Value;

use crate::cli::{Common, client::Client, say};

/// Asks a running service how it stands. Exit status 0 for pass and warn, 1 for fail or no answer.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the service is; without it, where the configuration says that it listens.
    #[arg(long)]
    pub url: Option<String>,
    /// An API key with the scope `admin`, for details; without it, the environment's `SONNETTE_API_KEY`.
    #[arg(long)]
    pub key: Option<String>,
    /// The certificate of a service with a private one, PEM.
    #[arg(long)]
    pub ca_file: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// If the service does not answer, or says that it cannot keep a request.
pub async fn run(common: &Common, args: &Args) -> anyhow::Result<()> {
    let url = match &args.url {
        Some(url) => url.clone(),
        None => Common::service_url(&common.config()?),
    };
    let key = args.key.clone().or_else(|| common.variable("SONNETTE_API_KEY"));
    let answer = Client::new(&url, key, args.ca_file.as_deref())?.ask(http::Method::GET, "/health", None).await?;
    let status = answer.body.get("status").and_then(Value::as_str).unwrap_or("no health report");
    say(status);
    for (name, checks) in answer.body.get("checks").and_then(Value::as_object).into_iter().flatten() {
        for check in checks.as_array().into_iter().flatten() {
            let text = |field: &str| check.get(field).and_then(Value::as_str).unwrap_or_default();
            if text("status") != "pass" {
                say(format_args!("{name} {}: {} {}", text("status"), text("output"), text("advice")));
            }
        }
    }
    if !answer.status.is_success() {
        bail!("{url} cannot keep new requests");
    }
    Ok(())
}
