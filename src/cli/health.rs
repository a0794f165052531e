//! `sonnette health`: asks a running service; the exit status is for container and systemd checks.

use std::path::PathBuf;

use anyhow::bail;
use serde_json::Value;

use crate::cli::{Common, remark, say};

/// Asks a running service how it stands. Exit status 0 for pass and warn, 1 for fail or no answer.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the service is; without it, where the configuration says that it tells: `server.ops_listen`, else
    /// `server.listen`.
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
    let key = args.key.clone().or_else(|| common.variable("SONNETTE_API_KEY"));
    let (url, client) = common.service(args.url.as_deref(), key, args.ca_file.as_deref(), true)?;
    let mut answer = client.ask(http::Method::GET, "/health", None).await?;
    if matches!(answer.status.as_u16(), 401 | 403 | 429) {
        remark("the key is refused: no details");
        answer = client.without_key().ask(http::Method::GET, "/health", None).await?;
    }
    // A problem document has a number there.
    let Some(status) = answer.body.get("status").and_then(Value::as_str) else {
        bail!("{url} answered {} without a health report", answer.status);
    };
    say(status);
    for (name, checks) in answer.body.get("checks").and_then(Value::as_object).into_iter().flatten() {
        for check in checks.as_array().into_iter().flatten() {
            let text = |field: &str| check.get(field).and_then(Value::as_str).unwrap_or_default();
            if text("status") != "pass" {
                let line = format!("{name} {}: {} {}", text("status"), text("output"), text("advice"));
                say(line.trim_end().trim_end_matches(':'));
            }
        }
    }
    match answer.status {
        status if status.is_success() => Ok(()),
        http::StatusCode::SERVICE_UNAVAILABLE => bail!("{url} cannot keep new requests"),
        status => bail!("{url} answered {status}"),
    }
}
