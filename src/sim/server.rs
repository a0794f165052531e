//! Listening: TCP, TLS, and a task for every connection.
//!
//! Promises: only clients that agree on `h2` by ALPN get past the handshake. A client that offers other protocols is
//! refused in it; one that offers none is closed right behind it. Both count as TLS failures.

use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::{State, connection, environment::Environment, ledger::count};

/// Accepts connections until the simulator stops.
pub(super) async fn listen(state: Arc<State>, environment: Environment, listener: TcpListener, acceptor: TlsAcceptor) {
    loop {
        let accepted = tokio::select! {
            () = state.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let task = handshake(Arc::clone(&state), environment, stream, acceptor.clone());
                state.tasks.spawn(task);
            }
            Err(error) => {
                // Such as too many open files: wait a moment instead of spinning.
                tracing::warn!(environment = %environment, error = %error, "a connection could not be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn handshake(state: Arc<State>, environment: Environment, stream: TcpStream, acceptor: TlsAcceptor) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %error, "TCP_NODELAY could not be set");
    }
    let done = tokio::select! {
        () = state.stop.cancelled() => return,
        done = acceptor.accept(stream) => done,
    };
    match done {
        Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
            connection::serve(state, environment, stream).await;
        }
        Ok(_) => {
            count(&state.ledger.tally(environment).tls_failures);
            tracing::debug!(environment = %environment, "a client did not ask for h2");
        }
        Err(error) => {
            count(&state.ledger.tally(environment).tls_failures);
            tracing::debug!(environment = %environment, error = %error, "a TLS handshake failed");
        }
    }
}
