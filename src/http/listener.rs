//! The listener: HTTP/2 (TLS with ALPN, or cleartext with prior knowledge) and HTTP/1.1 on one port.
//!
//! Promises: connections at once are bounded; a client that is slow to say what it wants is closed; at shutdown
//! nothing new is accepted and requests in flight are answered.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::response::Response;
use futures_util::{TryFutureExt as _, future::MapOk};
use http::Request;
use hyper::{body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;

use super::{Entrance, gather::Gathered, request::name_methods};
use crate::lifecycle::Tasks;

/// How long a client may take for its request's head, and for a TLS handshake.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an idle HTTP/2 connection is asked whether it still lives, and how long it may take to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Requests at once on one HTTP/2 connection.
const STREAMS: u32 = 1_000;

/// How long the accept loop rests when the process has no more file descriptors.
const REST: Duration = Duration::from_millis(100);

/// A bound listener.
pub struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
    room: Arc<Semaphore>,
}

impl Listener {
    /// Binds an address.
    ///
    /// # Errors
    /// If it is taken or not ours.
    pub async fn bind(address: &str, max_connections: usize, tls: Option<TlsAcceptor>) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        Ok(Self { socket, tls, room: Arc::new(Semaphore::new(max_connections)) })
    }

    /// Where it listens; the port that the system chose for port 0.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Serves until the service stops, then until what is in flight has been answered.
    pub async fn serve(self, entrance: Entrance, tasks: Tasks) {
        let graceful = GracefulShutdown::new();
        let stop = tasks.stopping().clone();
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(&self.room).acquire_owned() => permit,
                () = stop.cancelled() => break,
            };
            let Ok(permit) = permit else { break };
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection = Connection {
                        entrance: entrance.clone(),
                        tls: self.tls.clone(),
                        watcher: graceful.watcher(),
                        permit,
                    };
                    tasks.spawn_brief("http.connection", connection.serve(stream));
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "a connection could not be accepted");
                    tokio::time::sleep(REST).await;
                }
            }
        }
        drop(self.socket);
        graceful.shutdown().await;
    }
}

struct Connection {
    entrance: Entrance,
    tls: Option<TlsAcceptor>,
    watcher: Watcher,
    permit: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        _ = stream.set_nodelay(true);
        match &self.tls {
            None => speak(stream, self.entrance, self.watcher).await,
            Some(tls) => match tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                Ok(Ok(stream)) => speak(stream, self.entrance, self.watcher).await,
                Ok(Err(error)) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a TLS handshake failed");
                }
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            },
        }
        drop(self.permit);
    }
}

/// Speaks HTTP until the connection ends; one whose first request does not come in time is dropped.
async fn speak<S>(stream: S, entrance: Entrance, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(HEAD_TIMEOUT)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(16 * 1024);
    let asked = Arc::new(AtomicBool::new(false));
    let service = Asked { entrance, asked: Arc::clone(&asked) };
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(Gathered::new(stream)), service);
    let connection = watcher.watch(connection.into_owned());
    tokio::pin!(connection);
    // hyper's own bound begins only once it knows which HTTP is spoken, and there is none for HTTP/2.
    let ended = match tokio::time::timeout(HEAD_TIMEOUT, &mut connection).await {
        Ok(ended) => ended,
        Err(_) if asked.load(Ordering::Relaxed) => connection.await,
        Err(_) => {
            tracing::debug!("a connection was dropped: it asked nothing in time");
            return;
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = error.as_ref() as &dyn std::error::Error, "a connection ended early");
    }
}

/// The way in of one connection: remembers whether it was asked anything, and names methods behind the router.
struct Asked {
    entrance: Entrance,
    asked: Arc<AtomicBool>,
}

impl Service<Request<Incoming>> for Asked {
    type Response = Response;
    type Error = Infallible;
    type Future = MapOk<<Entrance as Service<Request<Incoming>>>::Future, fn(Response) -> Response>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.asked.store(true, Ordering::Relaxed);
        self.entrance.call(request).map_ok(name_methods)
    }
}
