//! Sonnette, a self-hosted APNs provider server.
//!
//! The rooms, and who may know whom (a test in `tests/it/layers.rs` refuses an import against these arrows):
//!
//! ```text
//! main -> cli -> app -> { http, dispatch, ops, sim, config } -> { store, apns } -> domain
//! ```
//!
//! | room | what it is for |
//! |---|---|
//! | [`cli`] | one file a command |
//! | [`app`] | the wiring, and the only file that names every room |
//! | [`config`] | file and environment to checked settings; nothing else reads the environment |
//! | [`http`] | the API: extract, one store verb, respond |
//! | [`dispatch`] | the queue at work: claim, send, settle, recover |
//! | [`ops`] | health |
//! | [`store`] | durable state in domain words, on SQLite and on MySQL |
//! | [`apns`] | the client: HTTP/2 connections, provider tokens, answers |
//! | [`sim`] | an APNs of our own, for tests and for `sonnette simulator`; shares no code with [`apns`] |
//! | [`lifecycle`], [`telemetry`] | tasks and shutdown; logs and metric names |
//! | [`domain`] | what a push is: values, outcomes and what follows from them; no I/O |

pub mod apns;
pub mod app;
pub mod cli;
pub mod config;
pub mod dispatch;
pub mod domain;
pub mod http;
pub mod lifecycle;
pub mod ops;
pub mod sim;
pub mod store;
pub mod telemetry;
