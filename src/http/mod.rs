//! The HTTP API.

pub mod listener;
