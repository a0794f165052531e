//! Black-box tests of the whole crate, in one binary: one module a behaviour.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking, in its support too"
)]

mod simulator;
