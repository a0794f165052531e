//! `sonnette pause`, `resume` and `held`: what an operator does to work that waits.

use anyhow::bail;

use crate::{
    cli::{Common, say},
    domain::topic::Topic,
    store,
};

/// Which app.
#[derive(Debug, clap::Args)]
pub struct App {
    /// Its bundle id.
    #[arg(long)]
    pub topic: Topic,
}

/// Work that was open when the service was started with `--hold`.
#[derive(Debug, clap::Subcommand)]
pub enum Held {
    /// Lets it go on: what has not expired is sent.
    Release,
}

/// Runs `sonnette pause`.
///
/// # Errors
/// What is in the way.
pub async fn pause(common: &Common, app: &App) -> anyhow::Result<()> {
    if !common.config()?.apps.iter().any(|known| known.topic == app.topic) {
        bail!("`{}` is not configured: see the [[app]] tables of apps.toml", app.topic);
    }
    let store = common.store().await?;
    store::pause(store.as_ref(), &app.topic, common.clock().now()).await?;
    say(format_args!("{} is paused: what is accepted waits; running services notice within two seconds", app.topic));
    store.close().await;
    Ok(())
}

/// Runs `sonnette resume`.
///
/// # Errors
/// What is in the way.
pub async fn resume(common: &Common, app: &App) -> anyhow::Result<()> {
    let store = common.store().await?;
    if !store::resume(store.as_ref(), &app.topic, common.clock().now()).await? {
        bail!("`{}` is not paused", app.topic);
    }
    say(format_args!("{} goes on", app.topic));
    store.close().await;
    Ok(())
}

/// Runs `sonnette held`.
///
/// # Errors
/// What is in the way.
pub async fn held(common: &Common, command: &Held) -> anyhow::Result<()> {
    let Held::Release = command;
    let store = common.store().await?;
    say(format_args!("{} pieces of work go on", store.release_held().await?));
    store.close().await;
    Ok(())
}
