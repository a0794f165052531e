//! HTTP/2 as bare as the `h2` crate gives it; none of Sonnette's code.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// The same roots as `serve` has: Mozilla's, and those of the file.
pub(crate) fn tls(ca_file: &Path) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    for certificate in CertificateDer::pem_file_iter(ca_file).expect("the simulator's CA file") {
        roots.add(certificate.expect("PEM")).expect("a root of trust");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// TCP and TLS to the simulator.
pub(crate) async fn connect_tls(tls: &TlsConnector, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    tls.connect(ServerName::try_from("localhost").expect("a name"), stream).await
}

/// HTTP/2 on a connection, with one stream until the server's SETTINGS allow more: what APNs asks for.
pub(crate) async fn handshake<S>(stream: S) -> SendRequest<Bytes>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) = h2::client::Builder::new()
        .initial_max_send_streams(1)
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 24)
        .handshake(stream)
        .await
        .expect("the server speaks HTTP/2");
    background(async move {
        // A connection that breaks is seen by whoever waits for an answer on it.
        let _ = connection.await;
    });
    send
}

/// Runs beside everything else until it ends.
pub(crate) fn background(task: impl Future<Output = ()> + Send + 'static) {
    #[expect(clippy::disallowed_methods, reason = "the bench has no tracker: its tasks end with its process")]
    tokio::spawn(task);
}

/// Sends all requests on one connection, as many at once as `window` and the server's stream limit allow, each with
/// its body (none if empty). `answer` makes of a response what is waited for, `done` takes what came of it.
pub(crate) async fn drive<F: Future>(
    send: &mut SendRequest<Bytes>,
    requests: impl IntoIterator<Item = (Request<()>, Bytes)>,
    window: usize,
    mut answer: impl FnMut(ResponseFuture) -> F,
    mut done: impl FnMut(F::Output),
) {
    let mut requests = requests.into_iter();
    let mut next = requests.next();
    let mut waiting = FuturesUnordered::new();
    poll_fn(|context| {
        loop {
            while next.is_some() && waiting.len() < window {
                match send.poll_ready(context) {
                    Poll::Ready(ready) => {
                        ready.expect("the connection lives");
                        if let Some((request, body)) = next.take() {
                            let (response, mut stream) =
                                send.send_request(request, body.is_empty()).expect("a request can be sent");
                            if !body.is_empty() {
                                stream.send_data(body, true).expect("a body can be sent");
                            }
                            waiting.push(answer(response));
                        }
                        next = requests.next();
                    }
                    Poll::Pending => break,
                }
            }
            match waiting.poll_next_unpin(context) {
                Poll::Ready(Some(result)) => done(result),
                Poll::Ready(None) if next.is_none() => return Poll::Ready(()),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}
