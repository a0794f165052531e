//! What the tests share: folders and processes that do not outlive them, and databases of their own.

pub(crate) mod client;
pub(crate) mod database;
pub(crate) mod scratch;
pub(crate) mod service;
pub(crate) mod world;
