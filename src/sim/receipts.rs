//! What a client has certainly read of the answers on one connection.
//!
//! Promises: an answer is certain only on proof. Bytes that TLS has taken may still be lost, so behind what was answered
//! goes a PING: HTTP/2 is read in order, so its acknowledgement says that everything before it was read. A stream that
//! the client resets before the proof was given up: its answer stays uncertain, as does all that is unproved when the
//! connection ends. Clients write the acknowledgement of a PING before resets that were decided earlier (`h2` and nghttp2
//! do), so the proof is the acknowledgement of a second PING, sent when the first was acknowledged, or the end of TLS in
//! good order (`close_notify`). That alone proves nothing: Node ends TLS in good order with answers unread. One PING is
//! under way at a time, and none while there is nothing to prove.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::ledger::{Ledger, Unproved};

/// The frames of one connection, as far as they carry or prove answers.
#[derive(Debug)]
pub(super) struct Receipts {
    ledger: Ledger,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// What was told on which stream.
    told: HashMap<u32, Unproved>,
    /// How often something was told.
    tellings: u64,
    /// Streams whose last frame was written, in order.
    written: VecDeque<u32>,
    /// How many were taken off the front of `written`.
    passed: u64,
    /// How many, counted from the connection's start, lie before a PING that was acknowledged.
    read: u64,
    /// The PINGs under way.
    pings: VecDeque<Sent>,
    /// What the last PING asks for.
    asked: Asked,
    /// `tellings` when it was sent.
    asked_tellings: u64,
}

#[derive(Debug)]
struct Sent {
    payload: [u8; 8],
    asked: Asked,
}

/// What the acknowledgement of a PING says.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    /// This many were read.
    read: u64,
    /// This many had been read when it was sent: now they are proved.
    proved: u64,
}

impl Inner {
    fn written(&self) -> u64 {
        self.passed + self.written.len() as u64
    }
}

impl Receipts {
    pub(super) fn new(ledger: Ledger) -> Arc<Self> {
        Arc::new(Self { ledger, inner: Mutex::default() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client is told something on `stream`, in a frame that is not written yet.
    pub(super) fn expect(&self, stream: u32, told: Option<Unproved>) {
        if let Some(told) = told {
            let mut inner = self.inner();
            inner.tellings += 1;
            inner.told.insert(stream, told);
        }
    }

    /// The last frame of `stream` is written.
    pub(super) fn stream_ended(&self, stream: u32) {
        let mut inner = self.inner();
        if inner.told.contains_key(&stream) {
            inner.written.push_back(stream);
        }
    }

    /// A GOAWAY is written that excludes the streams above `last`.
    pub(super) fn excluded(&self, last: u32) {
        let mut inner = self.inner();
        let Inner { told, written, .. } = &mut *inner;
        written.extend(
            told.iter().filter(|(stream, told)| **stream > last && !told.is_answer()).map(|(stream, _)| stream),
        );
    }

    /// A PING is written.
    pub(super) fn ping_sent(&self, payload: [u8; 8]) {
        let mut inner = self.inner();
        let asked = Asked { read: inner.written(), proved: inner.read };
        inner.asked = asked;
        inner.asked_tellings = inner.tellings;
        inner.pings.push_back(Sent { payload, asked });
    }

    /// Whether another PING would prove something.
    pub(super) fn wants_ping(&self) -> bool {
        let inner = self.inner();
        // What was told is about to be written; what the client's window held up was written behind the PING.
        inner.tellings > inner.asked_tellings
            || inner.written() > inner.asked.read
            || inner.read > inner.asked.proved.max(inner.passed)
    }

    /// The client has acknowledged a PING.
    pub(super) fn ping_acknowledged(&self, payload: [u8; 8]) {
        let mut inner = self.inner();
        if let Some(place) = inner.pings.iter().position(|sent| sent.payload == payload)
            && let Some(Sent { asked, .. }) = inner.pings.remove(place)
        {
            inner.read = inner.read.max(asked.read);
            self.prove(&mut inner, asked.proved);
        }
    }

    /// The client has reset `stream`.
    pub(super) fn given_up(&self, stream: u32) {
        if self.inner().told.remove(&stream).is_some() {
            self.ledger.records().never_proved(1);
        }
    }

    /// The client has ended TLS in good order: no reset is on its way any more.
    pub(super) fn closed_in_order(&self) {
        let mut inner = self.inner();
        let read = inner.read;
        self.prove(&mut inner, read);
    }

    fn prove(&self, inner: &mut Inner, before: u64) {
        let count = usize::try_from(before.saturating_sub(inner.passed)).unwrap_or(0).min(inner.written.len());
        inner.passed += count as u64;
        let Inner { told, written, .. } = inner;
        self.ledger.records().proved(written.drain(..count).filter_map(|stream| told.remove(&stream)));
    }
}

impl Drop for Receipts {
    fn drop(&mut self) {
        let never = self.inner().told.len();
        self.ledger.records().never_proved(never);
    }
}
