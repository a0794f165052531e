//! The command line: one file a command.
//!
//! Promises: every command takes `--config`; what goes wrong is said in a sentence with what to do, on standard error,
//! with exit status 1 (2 for a wrong use). Only what was asked for goes to standard output.

pub mod api_keys;
mod client;
pub mod demo;
pub mod health;
pub mod keys;
pub mod migrate;
pub mod operations;
pub mod send;
pub mod serve;
pub mod simulator;

pub use api_keys::make as make_api_key;

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use client::Client;

use crate::{
    app,
    config::{self, Config},
    domain::clock::{Clock, SystemClock},
    store::{self, Role, Store},
};

/// Sonnette, a self-hosted APNs provider server.
#[derive(Debug, clap::Parser)]
#[command(name = "sonnette", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// The configuration file; without it `./sonnette.toml`, then `/etc/sonnette/sonnette.toml`, then the defaults.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Everything on this machine with no account: shows a push accepted, keeps serving, prints what to try.
    Demo(demo::Args),
    /// The service.
    Serve(serve::Args),
    /// The APNs simulator alone.
    Simulator(simulator::Args),
    /// Applies or shows migrations.
    Migrate(migrate::Args),
    /// Provider keys: a development key, and what a .p8 file holds.
    #[command(subcommand)]
    Keys(keys::Command),
    /// API keys: create, list, revoke.
    #[command(subcommand)]
    ApiKeys(api_keys::Command),
    /// One notification through a running service.
    Send(send::Args),
    /// Pauses an app: what is accepted waits.
    Pause(operations::App),
    /// Lets a paused app go on.
    Resume(operations::App),
    /// Work that was open when the service was started with --hold.
    #[command(subcommand)]
    Held(operations::Held),
    /// Asks a running service how it stands; the exit status is for container and systemd checks.
    Health(health::Args),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// A sentence for the person who typed it.
    pub async fn run(self) -> anyhow::Result<()> {
        let common = Common {
            file: self.config,
            environment: config::process_environment(),
            clock: Arc::new(SystemClock::new()),
        };
        match self.command {
            Command::Demo(args) => demo::run(&common, args).await,
            Command::Serve(args) => serve::run(&common, args).await,
            Command::Simulator(args) => simulator::run(args).await,
            Command::Migrate(args) => migrate::run(&common, &args).await,
            Command::Keys(command) => keys::run(&command),
            Command::ApiKeys(command) => api_keys::run(&common, &command).await,
            Command::Send(args) => send::run(&common, &args).await,
            Command::Pause(app) => operations::pause(&common, &app).await,
            Command::Resume(app) => operations::resume(&common, &app).await,
            Command::Held(command) => operations::held(&common, &command).await,
            Command::Health(args) => health::run(&common, &args).await,
        }
    }
}

/// What every command has: where the configuration is, the environment, the clock.
#[derive(Debug)]
pub struct Common {
    file: Option<PathBuf>,
    environment: BTreeMap<String, String>,
    clock: Arc<dyn Clock>,
}

impl Common {
    fn config(&self) -> anyhow::Result<Config> {
        Ok(Config::load(self.file.as_deref(), &self.environment)?)
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock)
    }

    /// A variable that is no configuration, such as an API key.
    fn variable(&self, name: &str) -> Option<String> {
        self.environment.get(name).filter(|value| !value.is_empty()).cloned()
    }

    /// The store, whatever its schema.
    async fn open(&self) -> anyhow::Result<Arc<dyn Store>> {
        let settings = app::store_settings(&self.config()?);
        store::open(&settings, Role::CommandLine, self.clock()).await.context("the database cannot be opened")
    }

    /// The store with a schema that this version can use.
    async fn store(&self) -> anyhow::Result<Arc<dyn Store>> {
        let store = self.open().await?;
        if store.schema().await?.version == 0 {
            // The first thing that many people do is to make an API key.
            store.migrate().await?;
            let url = self.config()?.database.url;
            // Only a file's name is shown: the address of a server holds a password.
            match url.expose().strip_prefix("sqlite://").map(|file| file.split('?').next().unwrap_or(file)) {
                Some(file) => {
                    let file = std::path::absolute(file).unwrap_or_else(|_| file.into());
                    remark(format_args!("a new database was made: {}", file.display()));
                }
                None => remark("the empty database of `database.url` was set up"),
            }
        }
        store.schema().await?.check()?;
        Ok(store)
    }

    /// A running service: the one at `url`, or the one of this configuration; `ops`: where it tells how it stands.
    fn service(
        &self,
        url: Option<&str>,
        key: Option<String>,
        ca_file: Option<&Path>,
        ops: bool,
    ) -> anyhow::Result<(String, Client)> {
        if let Some(url) = url {
            return Ok((url.to_owned(), Client::new(url, key, ca_file)?));
        }
        let server = self.config()?.server;
        let (listen, tls) = match server.ops_listen {
            Some(address) if ops => (address, false),
            _ => (server.listen, server.tls.is_some()),
        };
        let scheme = if tls { "https" } else { "http" };
        let listen = listen.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
        let url = format!("{scheme}://{listen}");
        let hint = tls.then_some("the certificate is for a name: use `--url https://NAME`");
        let client = Client::new(&url, key, ca_file)?.with_hint(hint);
        Ok((url, client))
    }
}

/// Says something beside what was asked for, on standard error.
pub(crate) fn remark(line: impl std::fmt::Display) {
    _ = writeln!(std::io::stderr(), "sonnette: {line}");
}

/// Prints a line that was asked for. A reader that has gone away, as `head` does, is no fault.
pub(crate) fn say(line: impl std::fmt::Display) {
    _ = writeln!(std::io::stdout(), "{line}");
}
