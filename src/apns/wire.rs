//! The bytes of one connection: HTTP/2 above, TLS below.
//!
//! Promises: what HTTP/2 writes is taken at once, however many frames, and leaves in few large writes when the task that
//! owns the connection says so. So that task always knows whether the socket takes bytes, and hands over nothing while
//! it does not.

use std::{
    future::{Future as _, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::coop::unconstrained,
};

/// More than this is never waiting to leave, in bytes: pushes stop long before, so it would be answers to what the peer
/// asks for (PING, SETTINGS) without reading them.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// What is below: TLS over TCP.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Both ends of it: HTTP/2 has one, the connection's task another.
#[derive(Clone)]
pub(super) struct Wire(Arc<Mutex<Ends>>);

struct Ends {
    io: Box<dyn Io>,
    /// Written by HTTP/2 and not yet taken by TLS.
    waiting: Vec<u8>,
}

impl Wire {
    pub(super) fn new(io: impl Io + 'static) -> Self {
        Self(Arc::new(Mutex::new(Ends { io: Box::new(io), waiting: Vec::new() })))
    }

    /// Sends what waits. Ready once nothing does; pending while the socket takes no more, and for no other reason: a task
    /// that has used up its time sends all the same, or what may leave now would leave at some later time.
    pub(super) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(unconstrained(poll_fn(|cx| self.ends().poll_send(cx)))).poll(cx)
    }

    /// Bytes that HTTP/2 has written and that have not left.
    pub(super) fn waiting(&self) -> usize {
        self.ends().waiting.len()
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut taken = 0;
        let sent = loop {
            let rest = self.waiting.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                break Pin::new(&mut self.io).poll_flush(cx);
            }
            match Pin::new(&mut self.io).poll_write(cx, rest) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(more)) => taken += more,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.waiting.drain(..taken);
        sent
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.ends().io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut ends = self.ends();
        if ends.waiting.len() + bytes.len() > MAX_WAITING_BYTES {
            return Poll::Ready(Err(io::Error::other("the peer asks for answers and does not read them")));
        }
        ends.waiting.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    /// Leaves it to [`Wire::poll_send`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ends = self.ends();
        ready!(ends.poll_send(cx))?;
        Pin::new(&mut ends.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        net::{TcpListener, TcpStream},
        task::coop::consume_budget,
    };

    use super::*;

    #[tokio::test]
    async fn what_is_to_leave_leaves_at_once_though_the_task_has_used_up_its_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut wire = Wire::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        poll_fn(|cx| {
            while pin!(consume_budget()).poll(cx).is_ready() {}
            assert!(Pin::new(&mut wire).poll_write(cx, b"push").is_ready());
            assert!(wire.poll_send(cx).is_ready());
            Poll::Ready(())
        })
        .await;
    }
}
