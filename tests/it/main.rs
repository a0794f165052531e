//! Black-box tests: what Sonnette promises, tried on real databases and real sockets.
//!
//! One binary, one module a behaviour; what they share stands in `support`. `cargo test --test it <name>` runs some.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "helpers of tests: a failure is to stop the test and say where"
)]

mod api;
mod apns;
mod database;
mod layers;
mod simulator;
mod store;
mod support;
mod tree;
