//! An APNs of our own.
