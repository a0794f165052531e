//! What a push is: values that cannot be wrong, and pure functions on them.
//!
//! Promises: no I/O, no framework, no clock of its own (time is a parameter), and no `use` of any other room. A value
//! of one of these types has been checked; nobody checks it again.

pub mod clock;
pub mod secret;
