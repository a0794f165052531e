//! `sonnette simulator`: the APNs simulator alone, for whoever tests a provider.
//!
//! Promises: says what listens where before the first connection, and ends kindly on Ctrl-C or SIGTERM.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::say,
    domain::clock::SystemClock,
    sim::{self, ChaosPlan, Conduct, Environment, Settings, Simulator},
};

/// Runs an APNs of our own: real TLS and HTTP/2, Apple's checks, scripted answers, a ledger of what arrived.
///
/// See docs/simulator.md for the device tokens that force an answer and for the control API.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where production listens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2197")]
    pub listen_production: SocketAddr,
    /// Where the sandbox listens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2198")]
    pub listen_sandbox: SocketAddr,
    /// Where the control API listens: plain HTTP without authentication, keep it on this machine.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2199")]
    pub listen_control: SocketAddr,
    /// Folder of the certificate authority; made at the first start.
    #[arg(long, value_name = "FOLDER", default_value = "./simulator")]
    pub folder: PathBuf,
    /// Folder with `apps.toml` and the .p8 files it names: the provider keys to accept.
    #[arg(long, value_name = "FOLDER")]
    pub keys: Option<PathBuf>,
    /// A name or address for the server certificate, besides localhost, 127.0.0.1 and `::1`; may be repeated.
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Concurrent streams of a connection, once a provider token was accepted on it.
    #[arg(long, value_name = "STREAMS", default_value_t = 1000)]
    pub stream_limit: u32,
    /// Concurrent streams of a connection before that.
    #[arg(long, value_name = "STREAMS", default_value_t = 1)]
    pub initial_stream_limit: u32,
    /// Every answer waits this long.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0)]
    pub latency_ms: u64,
    /// A file with the faults that happen by rate, in both environments: JSON, as in docs/simulator.md.
    #[arg(long, value_name = "FILE", conflicts_with = "no_ledger")]
    pub chaos: Option<PathBuf>,
    /// Only count: keep neither the truth about every push nor accepted pushes.
    #[arg(long)]
    pub no_ledger: bool,
    /// How many accepted pushes the ledger keeps, the newest.
    #[arg(long, value_name = "PUSHES", default_value_t = 100_000)]
    pub ledger_pushes: usize,
    /// Answer `BadDeviceToken` for device tokens that were not registered through the control API.
    #[arg(long)]
    pub registered_devices_only: bool,
    /// Spell one reason as others saw it on the wire: `BadEnvironmentKeyInToken`.
    #[arg(long)]
    pub wire_spelling: bool,
    /// How both environments conduct themselves, such as `{"adaptive_streams": true}`: see docs/simulator.md.
    #[arg(long, value_name = "JSON", value_parser = Conduct::parse, default_value = "{}")]
    pub conduct: Conduct,
}

/// Runs the simulator until it is told to stop.
///
/// # Errors
/// What is in the way of starting, with what to do about it.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let keys = match &args.keys {
        Some(folder) => sim::read_folder(folder)
            .with_context(|| format!("the provider keys in `{}` cannot be used", folder.display()))?,
        None => Vec::new(),
    };
    let key_names: Vec<_> = keys.iter().map(|key| format!("{} of team {}", key.key_id, key.team_id)).collect();
    let chaos = args.chaos.as_deref().map(read_chaos).transpose()?;
    let settings = Settings {
        production: args.listen_production,
        sandbox: args.listen_sandbox,
        control: args.listen_control,
        folder: args.folder,
        names: args.names,
        keys,
        initial_stream_limit: args.initial_stream_limit,
        stream_limit: args.stream_limit,
        latency: Duration::from_millis(args.latency_ms),
        record_attempts: !args.no_ledger,
        record_pushes: !args.no_ledger,
        max_recorded_pushes: args.ledger_pushes,
        chaos,
        registered_devices_only: args.registered_devices_only,
        wire_spelling: args.wire_spelling,
        conduct: args.conduct,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let simulator = Simulator::start(settings, Arc::new(SystemClock::new())).await.map_err(advise)?;
    introduce(&simulator, &key_names);
    tokio::select! {
        done = tokio::signal::ctrl_c() => done?,
        _ = terminate.recv() => {}
    }
    let accepted = simulator.ledger().counters().accepted;
    simulator.shutdown().await;
    say(format_args!("\nStopped. Pushes accepted: {accepted}"));
    Ok(())
}

fn read_chaos(file: &Path) -> anyhow::Result<ChaosPlan> {
    let cannot_be_used = || format!("the faults in `{}` cannot be used", file.display());
    let text = std::fs::read_to_string(file).with_context(cannot_be_used)?;
    serde_json::from_str(&text).with_context(cannot_be_used)
}

/// Says what listens where and what to try.
fn introduce(simulator: &Simulator, key_names: &[String]) {
    say("The APNs simulator runs. Ctrl-C stops it.\n");
    for environment in Environment::ALL {
        say(format_args!("{:<12}https://{}", format!("{environment}:"), simulator.address(environment)));
    }
    say(format_args!("control:    http://{}", simulator.control()));
    say(format_args!("CA file:    {}", simulator.ca_file().display()));
    if key_names.is_empty() {
        say(format_args!(
            "keys:       none, so every push is `InvalidProviderToken`: start with `--keys FOLDER` or `POST /keys`"
        ));
    } else {
        say(format_args!("keys:       {}", key_names.join(", ")));
    }
    say("\nTry:");
    say(format_args!("  curl --http2 --cacert {} \\", simulator.ca_file().display()));
    say("    -H \"authorization: bearer $JWT\" -H 'apns-topic: com.example.app' -H 'apns-push-type: alert' \\");
    say(format_args!(
        "    -d '{{\"aps\":{{\"alert\":\"Ding dong\"}}}}' https://localhost:{}/3/device/00aa11bb",
        simulator.sandbox().port()
    ));
    say(format_args!("  curl http://{}/ledger", simulator.control()));
    say(format_args!(
        "\nA device token that begins with {}4100 is answered `410 Unregistered`; docs/simulator.md has the others.",
        sim::PREFIX
    ));
}

/// An error with what to do about it.
fn advise(error: sim::Error) -> anyhow::Error {
    let hint = match &error {
        sim::Error::Listen { listener, source, .. } if source.kind() == io::ErrorKind::AddrInUse => Some(format!(
            "another process has that port: stop it, or choose another with `--listen-{listener} 127.0.0.1:0`"
        )),
        sim::Error::Listen { listener, source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            Some(format!("ports below 1024 need a privilege: choose another with `--listen-{listener}`"))
        }
        _ => None,
    };
    match (hint, std::error::Error::source(&error)) {
        (Some(hint), Some(source)) => anyhow::anyhow!("{error}: {source}\nhint: {hint}"),
        _ => anyhow::Error::new(error),
    }
}
