//! `sonnette serve`: the service.
//!
//! Promises: ends kindly on Ctrl-C and SIGTERM: nothing new is accepted, what is in flight is answered and settled, the
//! rest is given back; exit status 0 if all of that was done within the grace, 1 otherwise. A second signal gives up at
//! once: whatever was not settled is repeated by whoever takes over.

use std::time::Duration;

use anyhow::bail;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    app::{App, Options},
    cli::Common,
    telemetry::{self, LogSettings},
};

/// The service: accepts, keeps, sends.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hold whatever is open in the database until the operator releases it: for a restored backup.
    #[arg(long)]
    pub hold: bool,
}

/// Runs the service until it is told to stop.
///
/// # Errors
/// What is in the way of starting; also if it could not stop in good order.
pub async fn run(common: &Common, args: Args) -> anyhow::Result<()> {
    let config = common.config()?;
    let logs = LogSettings { level: config.log.level.clone(), json: config.log.json };
    telemetry::start_logs(&logs).map_err(anyhow::Error::msg)?;
    let grace = Duration::from_secs(config.server.shutdown_grace_seconds);
    let options = Options { hold: args.hold, database_time: true };
    let app = App::start(&config, common.clock(), options).await?;
    until_told(app, grace).await
}

/// Serves until a signal, then stops in good order.
pub(crate) async fn until_told(app: App, grace: Duration) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("told to stop"),
        _ = interrupt.recv() => tracing::info!("told to stop; once more to give up at once"),
        () = app.stopped() => tracing::error!("the service stops by itself: see above"),
    }
    let failed = app.has_failed();
    let drained = tokio::select! {
        drained = app.shutdown(grace) => drained,
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
    };
    if failed {
        bail!("a task ended on its own: see the log");
    }
    if !drained {
        bail!("gave up before everything in flight had ended: what was not settled is sent again at the next start");
    }
    tracing::info!("stopped in good order");
    Ok(())
}
