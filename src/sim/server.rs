//! Listening: TCP, TLS, and a task for every connection.
//!
//! Promises: only clients that agree on `h2` by ALPN get past the handshake. A client that offers other protocols is
//! refused in it; one that offers none is closed right behind it. Both count as TLS failures. While the door is not open
//! new connections get what it says.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::{
    State, connection,
    door::{Connects, Order, Port},
    environment::Environment,
    ledger::count,
};
use crate::domain::clock::Timer;

/// How long to wait before a port is tried again that could not be had, or a connection accepted that could not be: such
/// as for too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections until the simulator stops.
pub(super) async fn listen(state: Arc<State>, environment: Environment, listener: TcpListener, acceptor: TlsAcceptor) {
    let door = state.gates.of(environment).door();
    let mut orders = door.orders();
    let mut order = Order::default();
    let mut over: Option<Timer> = None;
    let mut port = match Port::new(listener) {
        Ok(port) => port,
        Err(error) => {
            tracing::error!(environment = %environment, error = %error, "the listener has no address");
            return door.remove();
        }
    };
    loop {
        tokio::select! {
            () = state.stop.cancelled() => return door.remove(),
            Ok(()) = orders.changed() => {
                order = *orders.borrow_and_update();
                over = order.lasting.map(|lasting| state.clock.sleep(lasting));
                obey(&state, &mut port, order.connects, environment).await;
                door.done(order);
            }
            () = async { match &mut over { Some(timer) => timer.await, None => std::future::pending().await } } => {
                over = None;
                order.connects = Connects::Accept;
                obey(&state, &mut port, order.connects, environment).await;
                door.over(order);
            }
            accepted = port.accept() => match accepted {
                Ok(stream) => receive(&state, environment, stream, order.connects, &acceptor),
                Err(error) => {
                    tracing::warn!(environment = %environment, error = %error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
}

async fn obey(state: &State, port: &mut Port, connects: Connects, environment: Environment) {
    while let Err(error) = if connects == Connects::Refuse { port.shut() } else { port.open() } {
        tracing::warn!(environment = %environment, error = %error, "the port is another's for a moment");
        if connects == Connects::Refuse || state.stop.is_cancelled() {
            return; // nobody listens: that is what was asked for
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn receive(
    state: &Arc<State>,
    environment: Environment,
    stream: TcpStream,
    connects: Connects,
    acceptor: &TlsAcceptor,
) {
    match connects {
        Connects::Accept | Connects::Refuse => {
            state.tasks.spawn(handshake(Arc::clone(state), environment, stream, acceptor.clone()));
        }
        Connects::Reset => {
            if let Err(error) = stream.set_zero_linger() {
                tracing::debug!(error = %error, "the connection is closed, not reset");
            }
        }
        Connects::Stall => {
            state.tasks.spawn(stall(Arc::clone(state), stream));
        }
    }
}

/// Throws away what the client says until it closes TCP.
async fn stall(state: Arc<State>, mut stream: TcpStream) {
    let mut thrown_away = [0; 1024];
    let client_is_there = async { while stream.read(&mut thrown_away).await.is_ok_and(|bytes| bytes > 0) {} };
    tokio::select! {
        () = state.stop.cancelled() => {}
        () = client_is_there => {}
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
            Box::pin(connection::serve(state, environment, stream)).await; // large: in a place of its own
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
