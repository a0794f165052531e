//! What the tests share: folders and processes that do not outlive them, databases of their own, the service and APNs.

pub(crate) mod apns_server;
pub(crate) mod callers;
pub(crate) mod client;
pub(crate) mod cluster;
pub(crate) mod crowd;
pub(crate) mod database;
pub(crate) mod galera;
pub(crate) mod gateway;
pub(crate) mod ports;
pub(crate) mod running;
pub(crate) mod scratch;
pub(crate) mod service;
pub(crate) mod waiting;
pub(crate) mod world;
