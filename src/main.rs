//! The `sonnette` binary.

fn main() {}
