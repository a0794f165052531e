//! Ports for servers that are stopped and started again where they were.
//!
//! A port that the system gave out a moment ago may be given to anybody's outgoing connection before the server has it,
//! and between its end and its next start. These are below the ports that Linux, macOS and Windows give out.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicU16, Ordering},
};

const FIRST: u16 = 12_000;
const COUNT: u16 = 20_000;

/// A port of the loopback address that nobody listens on, and that this process gets once.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test processes beside this one begin elsewhere.
    let begin = u16::try_from(std::process::id().wrapping_mul(7_919) % u32::from(COUNT)).expect("below the count");
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + (begin + step % COUNT) % COUNT;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free between {FIRST} and {}", FIRST + COUNT)
}
