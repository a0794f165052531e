//! The frames that `h2` cannot write: a layer between it and TLS that completes SETTINGS and GOAWAY on their way out.
//!
//! Promises: every other frame passes unchanged, in order. Why it exists: `h2` 0.4.20 has no way to change
//! `MAX_CONCURRENT_STREAMS` on a living connection and none to put debug data or a chosen last stream into GOAWAY. `h2`
//! can send a second SETTINGS (`set_initial_window_size`) and keeps the books of its acknowledgement; here the limit is
//! written into each SETTINGS that passes. What is read is passed on untouched; it is looked at for the acknowledgement
//! of the first SETTINGS, because before that the client cannot know of any limit. [`Receipts`] is told of the frames, of
//! both directions, by which answers are given, given up, and proved to be read.

use std::{
    io,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::Sleep,
};
use tokio_rustls::server::TlsStream;

use super::receipts::Receipts;
use crate::domain::clock::{Clock, Timer};

const HEADER_BYTES: usize = 9;
const PREFACE_BYTES: usize = 24;
const TYPE_DATA: u8 = 0;
const TYPE_HEADERS: u8 = 1;
const TYPE_RST_STREAM: u8 = 3;
const TYPE_SETTINGS: u8 = 4;
const TYPE_PING: u8 = 6;
const TYPE_GOAWAY: u8 = 7;
const FLAG_ACK: u8 = 1;
const FLAG_END_STREAM: u8 = 1;
const PING_BYTES: usize = 8;
const MAX_CONCURRENT_STREAMS: u16 = 3;
/// The most bytes read at once from a connection that is read slowly.
const MAX_SLOW_BYTES: usize = 1024;
/// Above this the peer must read before more is taken from `h2`.
const MAX_BUFFERED_BYTES: usize = 64 * 1024;
/// A PING of our own: `h2` sends none while it closes.
const LAST_PING: &[u8; PING_BYTES] = b"the last";
/// How long the client may take to end TLS once it was ended here.
const LINGER: Duration = Duration::from_secs(1);

/// What a GOAWAY shall say.
#[derive(Debug, Clone)]
pub(super) struct GoAway {
    /// The last stream named; absent: what `h2` says.
    pub(super) last_stream: Option<u32>,
    /// The error code; absent: what `h2` says.
    pub(super) code: Option<u32>,
    /// The debug data.
    pub(super) debug: Bytes,
    /// Whether the frame is written two times.
    pub(super) twice: bool,
}

/// What the connection's owner tells the layer.
#[derive(Debug)]
pub(super) struct Orders {
    inner: Mutex<(u32, Option<GoAway>)>,
    /// Whole frames of our own that shall leave between those of `h2`.
    additional: Mutex<BytesMut>,
    has_additional: AtomicBool,
    cut: AtomicBool,
    close_tls: AtomicBool,
    half_open: AtomicBool,
    /// How many bytes a second are read; 0: all that come.
    read_bytes_per_second: AtomicU32,
    /// The highest stream that was opened before the first SETTINGS was acknowledged; as yet all, if it is not.
    unaware: AtomicU32,
}

impl Orders {
    /// The first SETTINGS shall say `stream_limit`.
    pub(super) fn new(stream_limit: u32) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new((stream_limit, None)),
            additional: Mutex::default(),
            has_additional: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            close_tls: AtomicBool::new(false),
            half_open: AtomicBool::new(false),
            read_bytes_per_second: AtomicU32::new(0),
            unaware: AtomicU32::new(u32::MAX),
        })
    }

    /// The next SETTINGS shall say this.
    pub(super) fn set_stream_limit(&self, limit: u32) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0 = limit;
    }

    /// Every GOAWAY from now on shall say this.
    pub(super) fn set_go_away(&self, go_away: GoAway) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(go_away);
    }

    /// This GOAWAY shall leave now, unknown to `h2`, when that is next polled. One that names no last stream excludes none.
    pub(super) fn add_go_away(&self, go_away: &GoAway) {
        let mut frames = self.additional.lock().unwrap_or_else(PoisonError::into_inner);
        let mut payload = BytesMut::with_capacity(8 + go_away.debug.len());
        payload.put_u32(go_away.last_stream.unwrap_or(u32::MAX >> 1));
        payload.put_u32(go_away.code.unwrap_or(0));
        payload.extend_from_slice(&go_away.debug);
        put_frame(&mut frames, TYPE_GOAWAY, [0; 5], &payload);
        self.has_additional.store(true, Ordering::Release);
    }

    /// Whether a GOAWAY was ordered.
    pub(super) fn is_going_away(&self) -> bool {
        self.go_away().is_some()
    }

    /// When the connection is dropped, TCP shall be reset.
    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    /// When the connection is dropped, TLS shall be closed by its alert, and TCP after it.
    pub(super) fn close_tls(&self) {
        self.close_tls.store(true, Ordering::Relaxed);
    }

    /// From now on nothing is read, and what is written vanishes. What is read ends when the client has closed TCP.
    pub(super) fn be_half_open(&self) {
        self.half_open.store(true, Ordering::Relaxed);
    }

    /// How fast the client is read; `None`: as fast as it can.
    pub(super) fn set_read_bytes_per_second(&self, rate: Option<NonZeroU32>) {
        self.read_bytes_per_second.store(rate.map_or(0, NonZeroU32::get), Ordering::Relaxed);
    }

    fn is_half_open(&self) -> bool {
        self.half_open.load(Ordering::Relaxed)
    }

    /// Whether the client may have opened `stream` before it heard of a limit.
    pub(super) fn is_unaware(&self, stream: u32) -> bool {
        stream <= self.unaware.load(Ordering::Relaxed)
    }

    fn stream_limit(&self) -> u32 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn go_away(&self) -> Option<GoAway> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

/// The bytes of all connections of an environment, inside TLS.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) read: AtomicU64,
    pub(super) written: AtomicU64,
}

/// Rewrites outgoing frames.
#[derive(Debug)]
struct Rewriter {
    orders: Arc<Orders>,
    receipts: Arc<Receipts>,
    /// The frame header being collected.
    header: BytesMut,
    /// Payload bytes of the current frame that are still to come.
    left: usize,
    /// The payload of a frame that is held back to be completed, with its type, flags and stream.
    held: Option<([u8; HEADER_BYTES], BytesMut)>,
    /// PINGs that go behind all that is flushed with them, so that they ask for it: `h2` writes them first.
    pings: Vec<[u8; PING_BYTES]>,
    out: BytesMut,
}

impl Rewriter {
    fn new(orders: Arc<Orders>, receipts: Arc<Receipts>) -> Self {
        Self {
            orders,
            receipts,
            header: BytesMut::with_capacity(HEADER_BYTES),
            left: 0,
            held: None,
            pings: Vec::new(),
            out: BytesMut::with_capacity(16 * 1024),
        }
    }

    fn take(&mut self, mut input: &[u8]) {
        while !input.is_empty() {
            if self.left > 0 {
                let (now, later) = input.split_at(self.left.min(input.len()));
                self.left -= now.len();
                match &mut self.held {
                    Some((_, payload)) => payload.extend_from_slice(now),
                    None => self.out.extend_from_slice(now),
                }
                input = later;
            } else {
                let missing = HEADER_BYTES - self.header.len();
                let (now, later) = input.split_at(missing.min(input.len()));
                self.header.extend_from_slice(now);
                input = later;
                if let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_ref()) {
                    self.header.clear();
                    self.begin(header);
                }
            }
            if self.left == 0
                && let Some((header, payload)) = self.held.take()
            {
                self.complete(header, &payload);
            }
        }
    }

    fn begin(&mut self, header: [u8; HEADER_BYTES]) {
        let [l0, l1, l2, kind, flags, stream @ ..] = header;
        self.left = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        if kind == TYPE_GOAWAY || (matches!(kind, TYPE_SETTINGS | TYPE_PING) && flags & FLAG_ACK == 0) {
            self.held = Some((header, BytesMut::new()));
            return;
        }
        self.out.extend_from_slice(&header);
        let is_last = matches!(kind, TYPE_HEADERS | TYPE_DATA) && flags & FLAG_END_STREAM != 0;
        if is_last || kind == TYPE_RST_STREAM {
            self.receipts.stream_ended(u32::from_be_bytes(stream));
        }
    }

    fn complete(&mut self, header: [u8; HEADER_BYTES], payload: &[u8]) {
        let [_, _, _, kind, rest @ ..] = header;
        if let (TYPE_PING, Ok(payload)) = (kind, payload.try_into()) {
            self.pings.push(payload);
            return;
        }
        let order = if kind == TYPE_GOAWAY { self.orders.go_away() } else { None };
        let is_twice = order.as_ref().is_some_and(|order| order.twice);
        let payload = match kind {
            TYPE_SETTINGS => settings(payload, self.orders.stream_limit()),
            TYPE_GOAWAY => go_away(payload, order),
            _ => BytesMut::from(payload),
        };
        if let (TYPE_GOAWAY, Some(last_stream)) = (kind, payload.first_chunk()) {
            self.receipts.excluded(u32::from_be_bytes(*last_stream));
        }
        for _ in 0..=u8::from(is_twice) {
            put_frame(&mut self.out, kind, rest, &payload);
        }
    }

    /// Puts in frames of our own and the PINGs that waited, if this is between two of `h2`'s.
    fn add(&mut self) {
        if self.left > 0 || !self.header.is_empty() || self.held.is_some() {
            return;
        }
        if self.orders.has_additional.load(Ordering::Acquire) {
            self.orders.has_additional.store(false, Ordering::Relaxed);
            let mut frames = self.orders.additional.lock().unwrap_or_else(PoisonError::into_inner);
            self.out.extend_from_slice(&frames.split());
        }
        for payload in self.pings.drain(..) {
            put_frame(&mut self.out, TYPE_PING, [0; 5], &payload);
            self.receipts.ping_sent(payload);
        }
    }
}

/// Writes a frame whose payload is a few dozen bytes; `rest` is flags and stream.
fn put_frame(out: &mut BytesMut, kind: u8, rest: [u8; 5], payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    out.extend_from_slice(length.get(1..).unwrap_or_default());
    out.put_u8(kind);
    out.extend_from_slice(&rest);
    out.extend_from_slice(payload);
}

fn settings(payload: &[u8], stream_limit: u32) -> BytesMut {
    let mut whole = BytesMut::from(payload);
    whole.put_u16(MAX_CONCURRENT_STREAMS);
    whole.put_u32(stream_limit);
    whole
}

fn go_away(mut payload: &[u8], order: Option<GoAway>) -> BytesMut {
    let (Some(order), true) = (order, payload.len() >= 8) else { return BytesMut::from(payload) };
    let (last_stream, code) = (payload.get_u32(), payload.get_u32());
    let mut whole = BytesMut::with_capacity(8 + order.debug.len());
    whole.put_u32(order.last_stream.unwrap_or(last_stream));
    whole.put_u32(order.code.unwrap_or(code));
    whole.extend_from_slice(&order.debug);
    whole
}

/// Walks over incoming frames.
#[derive(Debug)]
struct Reader {
    /// Bytes to pass over: the preface, or a payload.
    left: usize,
    header: BytesMut,
    /// The payload of the acknowledgement of a PING, being collected.
    acknowledged: Option<BytesMut>,
    highest: u32,
    is_aware: bool,
}

impl Reader {
    fn new() -> Self {
        Self {
            left: PREFACE_BYTES,
            header: BytesMut::with_capacity(HEADER_BYTES),
            acknowledged: None,
            highest: 0,
            is_aware: false,
        }
    }

    fn look(&mut self, mut input: &[u8], orders: &Orders, receipts: &Receipts) {
        while !input.is_empty() {
            let (payload, later) = input.split_at(self.left.min(input.len()));
            self.left -= payload.len();
            input = later;
            if let Some(collected) = &mut self.acknowledged {
                collected.extend_from_slice(payload);
                if let Ok(payload) = <[u8; PING_BYTES]>::try_from(collected.as_ref()) {
                    self.acknowledged = None;
                    receipts.ping_acknowledged(payload);
                }
            }
            let missing = if self.left == 0 { HEADER_BYTES - self.header.len() } else { 0 };
            let (now, later) = input.split_at(missing.min(input.len()));
            self.header.extend_from_slice(now);
            input = later;
            if let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_ref()) {
                self.header.clear();
                self.begin(header, orders, receipts);
            }
        }
    }

    fn begin(&mut self, header: [u8; HEADER_BYTES], orders: &Orders, receipts: &Receipts) {
        let [l0, l1, l2, kind, flags, stream @ ..] = header;
        self.left = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        let stream = u32::from_be_bytes(stream);
        match kind {
            TYPE_HEADERS if !self.is_aware => self.highest = self.highest.max(stream),
            TYPE_SETTINGS if flags & FLAG_ACK != 0 && !self.is_aware => {
                orders.unaware.store(self.highest, Ordering::Relaxed);
                self.is_aware = true;
            }
            TYPE_PING if flags & FLAG_ACK != 0 && self.left == PING_BYTES => {
                self.acknowledged = Some(BytesMut::with_capacity(PING_BYTES));
            }
            TYPE_RST_STREAM => receipts.given_up(stream),
            _ => {}
        }
    }
}

/// A TLS stream whose outgoing frames are completed.
pub(super) struct Completing {
    stream: TlsStream<TcpStream>,
    rewriter: Rewriter,
    reader: Reader,
    traffic: Arc<Traffic>,
    /// How long the client may still take to end its side.
    linger: Option<Pin<Box<Sleep>>>,
    clock: Arc<dyn Clock>,
    /// Nothing is read before this, so that reading keeps its pace.
    pause: Option<Timer>,
}

impl Completing {
    pub(super) fn new(
        stream: TlsStream<TcpStream>,
        orders: Arc<Orders>,
        receipts: Arc<Receipts>,
        traffic: Arc<Traffic>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let rewriter = Rewriter::new(orders, receipts);
        Self { stream, rewriter, reader: Reader::new(), traffic, linger: None, clock, pause: None }
    }

    /// Reads a little, and not again before `rate` bytes a second allow it.
    fn poll_read_slowly(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        rate: NonZeroU32,
    ) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        let mut piece = [0; MAX_SLOW_BYTES];
        let at_once = usize::try_from(rate.get() / 10).unwrap_or(MAX_SLOW_BYTES).clamp(1, MAX_SLOW_BYTES);
        let mut piece = ReadBuf::new(piece.get_mut(..at_once.min(buffer.remaining())).unwrap_or_default());
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
        buffer.put_slice(piece.filled());
        let read = u32::try_from(piece.filled().len()).unwrap_or(0); // at most a thousand
        self.pause = (read > 0).then(|| self.clock.sleep(Duration::from_secs(1) * read / rate.get()));
        Poll::Ready(Ok(()))
    }

    /// Reads nothing. Ready, as at the end, once the client has closed or reset TCP.
    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let tcp = self.stream.get_ref().0;
        loop {
            ready!(tcp.poll_read_ready(cx))?;
            match tcp.ready(Interest::READABLE).now_or_never() {
                Some(Ok(ready)) if ready.is_read_closed() => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                // What has come stays where it is: wait for the next news of the socket.
                Some(Ok(_)) => drop(tcp.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()))),
                None => {
                    cx.waker().wake_by_ref(); // this task has had its turn
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.rewriter.out.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.rewriter.out))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.rewriter.out.advance(written);
            self.traffic.written.fetch_add(written as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.rewriter.orders.is_half_open() {
            return self.poll_gone(cx);
        }
        let before = buffer.filled().len();
        match NonZeroU32::new(self.rewriter.orders.read_bytes_per_second.load(Ordering::Relaxed)) {
            None => ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?,
            Some(rate) => ready!(self.poll_read_slowly(cx, buffer, rate))?,
        }
        let new = buffer.filled().get(before..).unwrap_or_default();
        self.traffic.read.fetch_add(new.len() as u64, Ordering::Relaxed);
        if new.is_empty() && buffer.remaining() > 0 {
            self.rewriter.receipts.closed_in_order(); // rustls calls an end without `close_notify` an error
        }
        self.reader.look(new, &self.rewriter.orders, &self.rewriter.receipts);
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Completing {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_receive(cx, buffer)
    }
}

impl AsyncWrite for Completing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, input: &[u8]) -> Poll<io::Result<usize>> {
        if self.rewriter.orders.is_half_open() {
            return Poll::Ready(Ok(input.len()));
        }
        if self.rewriter.out.len() > MAX_BUFFERED_BYTES {
            ready!(self.poll_drain(cx))?;
        }
        self.rewriter.take(input);
        Poll::Ready(Ok(input.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.rewriter.orders.is_half_open() {
            return Poll::Ready(Ok(()));
        }
        self.rewriter.add();
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Ends TLS and waits, at most [`LINGER`], until the client has ended it too: else what it still sends would make
    /// the kernel reset the connection, and answers that it has not read would be lost. A last PING asks for those.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.rewriter.orders.is_half_open() {
            return Poll::Ready(Ok(()));
        }
        if self.linger.is_none() {
            if self.rewriter.receipts.wants_ping() {
                self.rewriter.pings.push(*LAST_PING);
            }
            self.rewriter.add();
            ready!(self.poll_drain(cx))?;
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.linger = Some(Box::pin(tokio::time::sleep(LINGER)));
        }
        let mut passed_over = [0; 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut passed_over);
            match self.poll_receive(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        self.linger.as_mut().map_or(Poll::Ready(()), |timer| timer.as_mut().poll(cx)).map(Ok)
    }
}

impl Drop for Completing {
    fn drop(&mut self) {
        if self.rewriter.orders.cut.load(Ordering::Relaxed)
            && let Err(error) = self.stream.get_ref().0.set_zero_linger()
        {
            tracing::debug!(error = %error, "the connection is closed, not reset");
        }
        if self.rewriter.orders.close_tls.load(Ordering::Relaxed) {
            let (tcp, tls) = self.stream.get_mut();
            tls.send_close_notify();
            // What does not fit now is lost: nobody waits for a slow reader.
            while tls.wants_write() && tls.write_tls(&mut AtOnce(tcp)).is_ok_and(|bytes| bytes > 0) {}
        }
    }
}

/// Writes what TCP takes without waiting.
struct AtOnce<'a>(&'a TcpStream);

impl io::Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::ledger::{Ledger, Limits},
        *,
    };

    fn receipts() -> Arc<Receipts> {
        Receipts::new(Ledger::new(Limits { record_attempts: true, record_pushes: false, max_pushes: 0 }))
    }

    fn rewriter(orders: Arc<Orders>) -> Rewriter {
        Rewriter::new(orders, receipts())
    }

    const SETTINGS: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0xff, 0xff]; // INITIAL_WINDOW_SIZE 65535
    const ACK: &[u8] = &[0, 0, 0, 4, 1, 0, 0, 0, 0];
    const DATA: &[u8] = &[0, 0, 3, 0, 1, 0, 0, 0, 1, b'a', b'b', b'c'];
    const GOAWAY: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

    #[test]
    fn settings_get_the_limit_and_all_else_passes_however_it_is_cut() {
        let input = [SETTINGS, ACK, DATA, SETTINGS].concat();
        let completed: &[u8] = &[0, 0, 12, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0xff, 0xff, 0, 3, 0, 0, 3, 0xe8];
        let expected = [completed, ACK, DATA, completed].concat();
        for size in 1..=input.len() {
            let mut rewriter = rewriter(Orders::new(1000));
            input.chunks(size).for_each(|chunk| rewriter.take(chunk));
            assert_eq!(rewriter.out, expected.as_slice(), "in pieces of {size} bytes");
        }
    }

    #[test]
    fn empty_settings_get_the_limit_too() {
        let mut rewriter = rewriter(Orders::new(1));
        rewriter.take(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(rewriter.out, [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1].as_slice());
    }

    #[test]
    fn a_client_is_unaware_of_limits_until_it_acknowledges_the_first_settings() {
        let headers: &[u8] = &[0, 0, 2, 1, 5, 0, 0, 0, 7, 0x83, 0x87];
        let later: &[u8] = &[0, 0, 0, 1, 5, 0, 0, 0, 9];
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice();
        let input = [preface, SETTINGS, headers, DATA, ACK, later].concat();
        for size in 1..=input.len() {
            let orders = Orders::new(1);
            let mut reader = Reader::new();
            assert!(orders.is_unaware(9));
            input.chunks(size).for_each(|chunk| reader.look(chunk, &orders, &receipts()));
            assert!(orders.is_unaware(7) && !orders.is_unaware(9), "in pieces of {size} bytes");
        }
    }

    #[test]
    fn a_ping_goes_behind_what_is_flushed_with_it() {
        let mut rewriter = rewriter(Orders::new(1));
        let ping: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        rewriter.take(&[ping, DATA].concat());
        rewriter.add();
        assert_eq!(rewriter.out, [DATA, ping].concat());
    }

    #[test]
    fn a_goaway_says_what_was_ordered() {
        let orders = Orders::new(1);
        let mut rewriter = rewriter(Arc::clone(&orders));
        rewriter.take(GOAWAY);
        assert_eq!(rewriter.out, GOAWAY, "without an order it passes");
        rewriter.out.clear();
        orders.set_go_away(GoAway {
            last_stream: Some(5),
            code: Some(7),
            debug: Bytes::from_static(b"why"),
            twice: true,
        });
        rewriter.take(GOAWAY);
        let ordered: &[u8] = &[0, 0, 11, 7, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 7, b'w', b'h', b'y'];
        assert_eq!(rewriter.out, [ordered, ordered].concat());
    }
}
