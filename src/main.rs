//! The `sonnette` binary.

use clap::Parser as _;

#[derive(clap::Parser)]
#[command(name = "sonnette")]
enum Command {
    /// The APNs simulator alone.
    Simulator(sonnette::cli::simulator::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Simulator(args) => sonnette::cli::simulator::run(args).await,
    }
}
