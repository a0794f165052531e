//! Whether an environment lets new TCP connections in.
//!
//! Promises: whoever closes the door waits until it is closed; open connections notice nothing. A port that refuses stays
//! reserved: nobody else gets it.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};

/// What new TCP connections get.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Connects {
    /// They are accepted.
    #[default]
    Accept,
    /// Nobody listens: the client is refused.
    Refuse,
    /// They are accepted, and reset before TLS begins.
    Reset,
    /// They are accepted, and the TLS handshake never goes on.
    Stall,
}

/// An order to the door.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Order {
    number: u64,
    pub(super) connects: Connects,
    /// How long; then connections are accepted again. `None`: until the next order.
    pub(super) lasting: Option<Duration>,
}

/// The door of one environment: orders go in, and the listener says which it has carried out.
#[derive(Debug, Default)]
pub(super) struct Door {
    orders: watch::Sender<Order>,
    done: watch::Sender<u64>,
}

impl Door {
    /// Gives an order and waits until it is carried out, or the listener has ended.
    pub(super) async fn order(&self, connects: Connects, lasting: Option<Duration>) {
        let mut number = 0;
        self.orders.send_modify(|order| {
            number = order.number + 1;
            *order = Order { number, connects, lasting };
        });
        let mut done = self.done.subscribe();
        // Fails only once the door is gone, and we hold it.
        let _ = done.wait_for(|done| *done >= number).await;
    }

    /// The last order.
    pub(super) fn connects(&self) -> Connects {
        self.orders.borrow().connects
    }

    pub(super) fn orders(&self) -> watch::Receiver<Order> {
        self.orders.subscribe()
    }

    /// The listener has carried out `order`.
    pub(super) fn done(&self, order: Order) {
        self.done.send_replace(order.number);
    }

    /// Its time is over: connections are accepted again.
    pub(super) fn over(&self, order: Order) {
        self.orders.send_if_modified(|current| {
            let is_last = current.number == order.number;
            if is_last {
                current.connects = Connects::Accept;
            }
            false // the listener knows
        });
    }

    /// The listener has ended: nobody need wait for it.
    pub(super) fn remove(&self) {
        self.done.send_replace(u64::MAX);
    }
}

/// A port, listened on or only reserved.
#[derive(Debug)]
pub(super) struct Port {
    address: SocketAddr,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Listening(TcpListener),
    Reserved(TcpSocket),
    None,
}

impl Port {
    /// A port that is listened on.
    pub(super) fn new(listener: TcpListener) -> io::Result<Self> {
        Ok(Self { address: listener.local_addr()?, socket: Socket::Listening(listener) })
    }

    /// The next connection; never if nobody listens. Cancelling loses none.
    pub(super) async fn accept(&self) -> io::Result<TcpStream> {
        match &self.socket {
            Socket::Listening(listener) => listener.accept().await.map(|(stream, _)| stream),
            Socket::Reserved(_) | Socket::None => std::future::pending().await,
        }
    }

    /// Listens no longer; who was not accepted yet is reset.
    pub(super) fn shut(&mut self) -> io::Result<()> {
        if matches!(self.socket, Socket::Listening(_)) {
            self.socket = Socket::None; // the listener must be closed before its port can be bound again
            self.socket = Socket::Reserved(bind(self.address)?);
        }
        Ok(())
    }

    /// Listens, if it does not yet.
    pub(super) fn open(&mut self) -> io::Result<()> {
        let reserved = match std::mem::replace(&mut self.socket, Socket::None) {
            Socket::Listening(listener) => {
                self.socket = Socket::Listening(listener);
                return Ok(());
            }
            Socket::Reserved(socket) => socket,
            Socket::None => bind(self.address)?,
        };
        self.socket = Socket::Listening(reserved.listen(1024)?);
        Ok(())
    }
}

/// A socket that has the port and does not listen: who connects to it is refused.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?; // connections of the listener may still be open
    socket.bind(address)?;
    Ok(socket)
}
