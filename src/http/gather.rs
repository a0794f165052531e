//! Answers that are ready together leave together.
//!
//! Promises: bytes are passed on unchanged and in their order. What is to be written waits until the tasks that are ready
//! to run on this thread have had their turn: when a commit answers hundreds of requests at once, their answers share a
//! few segments instead of having one each, which is most of what an answer costs. A long answer, which HTTP/2 writes in
//! pieces, waits before each. Where nothing else is ready nothing waits.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream whose writes wait for a turn.
#[derive(Debug)]
pub(super) struct Gathered<S> {
    stream: S,
    /// What is written now has waited, until it is flushed.
    waited: bool,
}

impl<S> Gathered<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self { stream, waited: false }
    }

    /// Once before the first write of a flush: the task runs again behind those that are ready.
    fn wait(&mut self, context: &Context<'_>) -> Poll<()> {
        if self.waited {
            return Poll::Ready(());
        }
        self.waited = true;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.wait(context));
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    /// Else `h2` would leave the body of an answer where it is, and write each for itself: up to a KiB it copies.
    fn is_write_vectored(&self) -> bool {
        false
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.waited = false;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Counts writes and passes them on.
    struct Counted<S>(S, Arc<AtomicUsize>);

    impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
        fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write(context, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(context)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(context)
        }
    }

    #[tokio::test]
    async fn a_write_waits_for_one_turn_and_the_next_flush_for_another() {
        let (near, mut far) = tokio::io::duplex(1024);
        let writes = Arc::new(AtomicUsize::new(0));
        let mut gathered = Gathered::new(Counted(near, Arc::clone(&writes)));
        let mut turns = 0;
        for (number, word) in ["one ", "two "].into_iter().enumerate() {
            poll_fn(|context| {
                turns += 1;
                Pin::new(&mut gathered).poll_write(context, word.as_bytes())
            })
            .await
            .unwrap();
            assert_eq!(turns, 2 * (number + 1), "{word}");
            // What belongs to the same flush does not wait once more.
            let at_once =
                poll_fn(|context| Poll::Ready(Pin::new(&mut gathered).poll_write(context, b"more ").is_ready()));
            assert!(at_once.await, "{word}");
            gathered.flush().await.unwrap();
        }
        gathered.shutdown().await.unwrap();
        drop(gathered);
        let mut read = String::new();
        far.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "one more two more ");
        assert_eq!(writes.load(Ordering::Relaxed), 4);
    }
}
