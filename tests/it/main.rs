//! Black-box tests: what Sonnette promises, tried on real databases and real sockets.
//!
//! One binary, one module a behaviour; what they share stands in `support`. `cargo test --test it <name>` runs some.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "helpers of tests: a failure is to stop the test and say where"
)]

mod api;
mod apns;
mod breaker;
mod broadcast;
mod busy;
mod cancel;
mod chaos;
mod clock;
mod cluster;
mod database;
mod kill;
mod layers;
mod lost;
mod million;
mod mistakes;
mod mysql;
mod ownership;
mod pace;
mod process;
mod provider_token;
mod replicas;
mod retention;
mod simulator;
mod simulator_behaviour;
mod store;
mod support;
mod tour;
mod tree;
mod wave;
