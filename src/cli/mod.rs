//! The command line: one file a command.
//!
//! Promises: every command takes `--config`; what goes wrong is said in a sentence with what to do, on standard error,
//! with exit status 1 (2 for a wrong use). Only what was asked for goes to standard output.

pub mod simulator;

#[expect(clippy::print_stdout, reason = "what was asked for goes to standard output")]
/// Prints a line that was asked for. A reader that has gone away is no fault.
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{line}");
}
