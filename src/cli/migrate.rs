//! `sonnette migrate`: applies migrations, or shows what there is to apply.

use crate::cli::{Common, say};

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
    let store = common.open().await?;
    let migrations = if args.dry_run { store.pending().await? } else { store.migrate().await? };
    let did = if args.dry_run { "would apply" } else { "applied" };
    for migration in &migrations {
        say(format_args!("{did} {migration}"));
    }
    if migrations.is_empty() {
        say("the schema is up to date");
    }
    store.close().await;
    Ok(())
}
