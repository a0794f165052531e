//! Connections that end without a word, or on which nothing is said: TCP stays up, and that is all.
//!
//! Promises: none of them outlives the simulator, nor a client that closes or resets TCP.

use std::task::{Context, Waker};

use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_rustls::server::TlsStream;

use super::{Command, Connection, Flow, State, mpsc, poll_fn};
use crate::sim::conduct::FirstSettings;

impl Connection<'_> {
    /// Ends the connection without GOAWAY. What was answered leaves, if the client reads; no stream is reset.
    pub(super) fn close_tls(&mut self) -> Flow {
        // One try, and before anything is dropped: a stream that is dropped is reset. Nobody waits for a slow reader.
        let _ = self.h2.poll_closed(&mut Context::from_waker(Waker::noop()));
        self.orders.close_tls();
        Flow::End
    }

    /// Lets TCP stay up, and that is all.
    pub(super) async fn lie_half_open(&mut self) {
        self.orders.be_half_open();
        let state = self.state;
        loop {
            tokio::select! {
                biased;
                () = state.stop.cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(Command::Close) => return self.orders.cut(),
                    None => return,
                    Some(_) => {}
                },
                // What `h2` makes of what it has read already, nobody gets to see.
                _ = poll_fn(|cx| self.h2.poll_closed(cx)) => return,
            }
        }
    }
}

/// Waits until a new connection may be sent its SETTINGS. `None`: that never was, and it is over.
pub(super) async fn before_settings(
    state: &State,
    settings: FirstSettings,
    mut stream: TlsStream<TcpStream>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
) -> Option<TlsStream<TcpStream>> {
    if let Some(delay) = settings.delay() {
        if !delay.is_zero() {
            tokio::select! {
                () = state.stop.cancelled() => return None,
                () = state.clock.sleep(delay) => {}
            }
        }
        return Some(stream);
    }
    let mut thrown_away = [0; 4096];
    loop {
        let goes_on = tokio::select! {
            () = state.stop.cancelled() => false,
            command = commands.recv() => !matches!(command, Some(Command::Close) | None),
            read = stream.read(&mut thrown_away) => read.is_ok_and(|bytes| bytes > 0),
        };
        if !goes_on {
            return None;
        }
    }
}
