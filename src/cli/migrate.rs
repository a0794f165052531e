//! `sonnette migrate`: applies migrations, or shows what there is to apply.

use crate::{
    cli::{Common, say},
    store,
};

/// Brings the schema of the database up to date. Safe to repeat, and beside a running service.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only say what would be applied.
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the command.
///
/// # Errors
/// What is in the way.
pub async fn run(common: &Common, args: &Args) -> anyhow::Result<()> {
    let config = common.config()?;
    let settings = common.store_settings(&config);
    let pending = store::migrate::pending(&settings).await?;
    if pending.is_empty() {
        say("the schema is up to date");
        return Ok(());
    }
    if !args.dry_run {
        store::migrate::migrate(&settings, common.clock()).await?;
    }
    for migration in &pending {
        say(format_args!("{} {}", if args.dry_run { "would apply" } else { "applied" }, migration));
    }
    Ok(())
}
