//! The `sonnette` binary: parse, start the runtime, exit code.

use std::process::ExitCode;

use clap::Parser;
use sonnette::{cli::Cli, telemetry};

/// A notification is a hundred small pieces of memory, and what one thread takes another gives back: glibc spent a third
/// of `serve`'s time on that.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(cli.run()));
    telemetry::write_logs();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "what went wrong goes to standard error")]
            {
                eprintln!("sonnette: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
