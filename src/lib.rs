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
//! | [`domain`] | what a push is: values, outcomes and what follows from them; no I/O |
//! | [`sim`] | an APNs of our own, for tests and for `sonnette simulator` |
//! | [`cli`] | one file a command |

pub mod cli;
pub mod domain;
pub mod sim;
