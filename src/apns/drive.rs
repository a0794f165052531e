//! The task that owns one HTTP/2 connection: it alone opens streams, hands over bodies and reads answers.
//!
//! Promises:
//!
//! - No stream before the peer's first SETTINGS. Every SETTINGS frame that changes the limit is reported to the
//!   [`Owner`] right after the poll that read it, and so is a GOAWAY. A connection that was told GOAWAY opens no stream.
//! - A push leaves only while its [`Permit`] holds, looked at in the same turn in which HEADERS, and then DATA, are
//!   handed to `h2`. If it does not hold any more, the push's own task is asked to ask the fence again.
//! - Nothing is handed over while the socket takes nothing. A body is handed over only when there is room for it in the
//!   peer's windows, and what `h2` has not taken of it when the turn ends is taken back by a reset. So nothing that has
//!   a deadline or an owner waits in a queue from which it would leave by itself later; what the socket has taken, and
//!   at most one turn's frames before it, is beyond recall. A process that was stopped for [`STOPPED_FOR`] between handing
//!   over and writing, or while the socket took nothing, gives up the connection instead of writing.
//! - A request without its whole body cannot be accepted, so whoever is taken back before that is given back.
//! - Whatever was taken from the mail comes to an end by the request deadline, whatever the peer or `h2` do.
//!
//! A turn, as far as there is something to do: some orders become HEADERS; the bodies of those before follow where there
//! is room; `h2` writes them and reads what has come. After some turns all of it leaves in one write, and answers go back
//! to their pushes.
//!
//! On `h2` 0.4.20: a stream gets room for its body only once it is opened within the peer's limit, so a push that raced
//! with a falling limit waits without its body. Dropping both handles of a stream discards what is queued of its body
//! and resets it. A stream's error `is_go_away() && is_remote()` is given only to streams above the GOAWAY's
//! last-stream-id (`Streams::recv_go_away`); what is at or below goes on, and gets an I/O error if the connection ends
//! first.

use std::{
    collections::VecDeque,
    future::{Future as _, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{
    Ping, PingPong, Reason as H2Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{StatusCode, header, response::Parts, uri::Authority};
use slab::Slab;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Begin, Care, Connection, End, Ended, Key, Note, Opened, Order, Owner, Permit, Slot, Word},
    request::Requests,
    response::{self, MAX_BODY_BYTES, Verdict},
    wire::Wire,
};
use crate::domain::{
    clock::{Clock, Timer, Timestamp},
    outcome::Reply,
};

/// How often a connection's task looks at its timers.
const TICK: Duration = Duration::from_secs(1);

/// A PING that is not acknowledged within this time, or a socket that takes nothing for as long, ends the connection.
const PING_PATIENCE: Duration = Duration::from_secs(10);

/// A connection that has nothing in flight any more has this long to say goodbye.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// How often the clocks are compared.
const SKEW_EVERY: Duration = Duration::from_secs(60);

/// Requests begun in one turn: so few that what is allocated for them is soon used again.
const BEGUN_AT_ONCE: usize = 8;

/// With so much to send, in bytes, it is sent before more is begun.
const SENT_AT_ONCE: usize = 64 * 1024;

/// From handing over to writing takes far less, unless the process is stopped. With what a heartbeat is trusted for it is no
/// more than others wait for the next one.
const STOPPED_FOR: Duration = Duration::from_secs(1);

/// How often a connection whose socket takes nothing makes sure that the process was not stopped.
const BLOCKED_TICK: Duration = Duration::from_millis(250);

/// What the task must know.
pub(super) struct Duty {
    pub(super) connection: Arc<Connection>,
    pub(super) authority: Authority,
    /// How long an answer may take, from the write of its request.
    pub(super) request_deadline: Duration,
    pub(super) clock: Arc<dyn Clock>,
    /// Ends the connection at once; what is in flight then ends as after a cut.
    pub(super) abort: CancellationToken,
}

/// Drives a connection until it ends.
pub(super) async fn drive(duty: Duty, opened: Opened, owner: Arc<dyn Owner>) {
    let Opened { handle, mut h2, wire } = opened;
    let abort = duty.abort.clone();
    let mut aborted = pin!(abort.cancelled());
    let mut driver = Driver {
        pings: h2.ping_pong(),
        limit: h2.max_concurrent_send_streams(),
        h2,
        handle: Some(handle),
        wire,
        requests: Requests::new(&duty.authority),
        orders: VecDeque::new(),
        flights: Slab::new(),
        marks: Marks::new(&duty.connection),
        serial: 0,
        turn: 0,
        begun: Vec::new(),
        roomy: Vec::new(),
        handed: Vec::new(),
        notes: Vec::new(),
        words: Vec::new(),
        gathered: false,
        now: duty.clock.now(),
        passed: duty.clock.monotonic(),
        blocked: None,
        pinged_at: None,
        closing_since: None,
        skew_measured_at: None,
        tick: duty.clock.sleep(TICK),
        duty: &duty,
        owner: &*owner,
    };
    let end = poll_fn(|cx| {
        if aborted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Aborted);
        }
        driver.poll(cx)
    })
    .await;
    driver.end(&end);
}

/// A piece of a body, which knows how much of it `h2` has taken.
pub(super) struct Body {
    piece: Bytes,
    mark: Arc<Mark>,
}

impl Buf for Body {
    fn remaining(&self) -> usize {
        self.piece.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.piece.chunk()
    }

    fn advance(&mut self, bytes: usize) {
        self.piece.advance(bytes);
        self.mark.untaken.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The place of a stream among the flights: used again for the next one, and woken by `h2` when there is news.
struct Mark {
    place: usize,
    /// Bytes of the piece that was handed over and not yet taken.
    untaken: AtomicUsize,
    woken: Arc<Woken>,
}

/// Places with news.
struct Woken {
    places: Mutex<Vec<usize>>,
    connection: Arc<Connection>,
}

impl Wake for Mark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut places = self.woken.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.push(self.place);
        let first = places.len() == 1;
        drop(places);
        if first {
            self.woken.connection.task.wake();
        }
    }
}

struct Marks {
    woken: Arc<Woken>,
    all: Vec<(Arc<Mark>, Waker)>,
}

impl Marks {
    fn new(connection: &Arc<Connection>) -> Self {
        let woken = Woken { places: Mutex::default(), connection: Arc::clone(connection) };
        Self { woken: Arc::new(woken), all: Vec::new() }
    }

    fn fresh(&self, place: usize) -> (Arc<Mark>, Waker) {
        let mark = Arc::new(Mark { place, untaken: AtomicUsize::new(0), woken: Arc::clone(&self.woken) });
        let waker = Waker::from(Arc::clone(&mark));
        (mark, waker)
    }

    /// Makes sure that there is one for this place. Places are given out without gaps.
    fn reach(&mut self, place: usize) {
        while self.all.len() <= place {
            let fresh = self.fresh(self.all.len());
            self.all.push(fresh);
        }
    }

    fn at(&self, place: usize) -> Option<&(Arc<Mark>, Waker)> {
        self.all.get(place)
    }

    /// `h2` may still hold the old one.
    fn replace(&mut self, place: usize) {
        let fresh = self.fresh(place);
        if let Some(mark) = self.all.get_mut(place) {
            *mark = fresh;
        }
    }

    fn take_woken(&self, into: &mut Vec<usize>) {
        std::mem::swap(&mut *self.woken.places.lock().unwrap_or_else(PoisonError::into_inner), into);
    }
}

/// One request on its way.
struct Flight {
    serial: u64,
    /// Given back once it is over.
    slot: Option<Slot>,
    /// `None`: the push's task was asked something and has not answered.
    reply: Option<oneshot::Sender<Word>>,
    /// What it came to while the push's task was asked.
    ended: Option<Ended>,
    stage: Stage,
    permit: Permit,
    /// In which turn the permit was given.
    permitted_in: u64,
    /// It is on the list of those with room for their body, and for so many bytes of it.
    roomy: Option<usize>,
    sent_at: Timestamp,
    due: Duration,
    /// What it says of the connection if no answer has come by then.
    late: Note,
}

enum Stage {
    /// HEADERS were handed over, and the body in so far as it is not in `rest`. `is_whole`: `h2` has taken all of it.
    Waiting { response: ResponseFuture, body: Option<SendStream<Body>>, rest: Bytes, is_whole: bool },
    /// The head of an answer has come, and what of its body.
    Answered { head: Parts, stream: RecvStream, read: BytesMut },
    /// It is over.
    Over,
}

/// A socket that takes nothing.
#[derive(Clone, Copy)]
struct Blocked {
    since: Duration,
    /// When it was last found so: what waits for it was not held up by anything else until then.
    found_at: Duration,
}

struct Driver<'a> {
    h2: h2::client::Connection<Wire, Body>,
    /// Opens streams, and says whether streams may still be opened. `None`: no more.
    handle: Option<SendRequest<Body>>,
    wire: Wire,
    requests: Requests,
    /// Taken from the mail and not yet looked at.
    orders: VecDeque<Order>,
    flights: Slab<Flight>,
    marks: Marks,
    serial: u64,
    turn: u64,
    /// Places whose HEADERS were handed over in this turn.
    begun: Vec<usize>,
    /// Places with room for more of their body.
    roomy: Vec<usize>,
    /// Places whose body was handed over in this turn.
    handed: Vec<usize>,
    notes: Vec<Note>,
    words: Vec<(oneshot::Sender<Word>, Word)>,
    /// One turn was let pass for others to post what they have.
    gathered: bool,
    /// This turn's time.
    now: Timestamp,
    passed: Duration,
    /// The socket takes nothing.
    blocked: Option<Blocked>,
    pings: Option<PingPong>,
    limit: usize,
    pinged_at: Option<Duration>,
    closing_since: Option<Duration>,
    skew_measured_at: Option<Duration>,
    tick: Timer,
    duty: &'a Duty,
    owner: &'a dyn Owner,
}

impl Driver<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let connection = &self.duty.connection;
        connection.task.register(cx.waker());
        // Whoever was woken together with the first to post has not had a turn yet: what they post goes into one write.
        if !self.gathered && connection.has_mail() {
            self.gathered = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.gathered = false;
        if self.closing_since.is_none() && connection.is_closing() {
            self.closing_since = Some(self.duty.clock.monotonic());
            self.handle = None;
        }
        if connection.take_ping() {
            self.ping();
        }
        loop {
            let blocked = self.blocked;
            let began = blocked.map_or_else(|| self.duty.clock.monotonic(), |blocked| blocked.found_at);
            while {
                if let Err(end) = self.turn(cx) {
                    return Poll::Ready(end);
                }
                self.has_more() && self.wire.waiting() < SENT_AT_ONCE
            } {}
            let now = self.duty.clock.monotonic();
            // What waits for the socket may have left the wire for TLS.
            if now.saturating_sub(began) >= STOPPED_FOR && (blocked.is_some() || self.wire.waiting() > 0) {
                return Poll::Ready(End::Stopped);
            }
            let freed = match self.wire.poll_send(cx) {
                Poll::Ready(Ok(())) => self.blocked.take().is_some(),
                Poll::Ready(Err(error)) => return Poll::Ready(End::Broken(error)),
                Poll::Pending => {
                    if blocked.is_none() {
                        self.tick = self.duty.clock.sleep(BLOCKED_TICK);
                    }
                    self.blocked = Some(Blocked { since: blocked.map_or(now, |blocked| blocked.since), found_at: now });
                    false
                }
            };
            self.report();
            // What was posted while the socket took nothing woke nobody again.
            if !freed && !self.has_more() {
                break;
            }
        }
        if self.pinged_at.is_some()
            && let Some(Poll::Ready(Ok(_))) = self.pings.as_mut().map(|p| p.poll_pong(cx))
        {
            self.pinged_at = None;
            self.owner.pong(connection.id);
        }
        self.look_after(cx)
    }

    /// Hands over what may leave, lets `h2` write and read, and looks at what that brings.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        self.turn += 1;
        self.now = self.duty.clock.now();
        self.passed = self.duty.clock.monotonic();
        if self.blocked.is_none() {
            self.begin();
            self.hand_over_bodies();
        }
        self.poll_h2(cx)?;
        self.take_back_untaken();
        self.look_at_news();
        Ok(())
    }

    /// Whether another turn would hand over something.
    fn has_more(&self) -> bool {
        self.blocked.is_none() && !(self.orders.is_empty() && self.roomy.is_empty())
    }

    /// Lets `h2` write what is queued and read what has come, and reports what that says of the connection.
    fn poll_h2(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if let Poll::Ready(result) = Pin::new(&mut self.h2).poll(cx) {
            return Err(End::Closed(result.err()));
        }
        let id = self.duty.connection.id;
        let limit = self.h2.max_concurrent_send_streams();
        if limit != self.limit {
            self.limit = limit;
            self.owner.limit_changed(id, limit);
        }
        if let Some(Poll::Ready(Err(error))) = self.handle.as_mut().map(|handle| handle.poll_ready(cx)) {
            self.handle = None;
            self.owner.leaving(id, &error.to_string());
        }
        Ok(())
    }

    /// Turns orders into HEADERS.
    fn begin(&mut self) {
        if self.orders.is_empty() {
            self.duty.connection.take_mail(&mut self.orders);
        }
        if self.orders.is_empty() {
            return;
        }
        let token = self.duty.connection.authorize(self.now, self.passed);
        let is_authorized = token.is_some();
        if let Some(token) = token {
            self.requests.authorize(&token);
        }
        for _ in 0..BEGUN_AT_ONCE {
            match self.orders.pop_front() {
                Some(Order::Begin(begin)) if is_authorized => self.open(begin),
                Some(Order::Begin(begin)) => self.refuse(begin),
                Some(Order::GoOn { key, permit, reply }) => self.go_on(key, permit, reply),
                Some(Order::TakeBack { key }) => self.take_back(key),
                None => return,
            }
        }
    }

    fn open(&mut self, begin: Begin) {
        let Begin { slot, head, path, apns_id, permit, answer_by, reply } = begin;
        if !permit.holds(self.now, self.passed, true) {
            self.words.push((reply, Word::Late(slot)));
            return;
        }
        let Ok((request, payload)) = self.requests.make(&head, path, &apns_id) else {
            self.close_flight(Some(slot), Note::Unused);
            self.words.push((reply, Word::Ended(Ended::Unsent)));
            return;
        };
        let opened = self.handle.as_mut().map(|handle| {
            let opened = handle.send_request(request, payload.is_empty());
            // It remembers a stream that is beyond the limit: it would refuse the next one for it, and whenever it is asked
            // it takes that stream's waker away, so that nobody hears of room for its body. A clone remembers nothing.
            if handle.poll_ready(&mut Context::from_waker(Waker::noop())).is_pending() {
                *handle = handle.clone();
            }
            opened
        });
        let Some(Ok((response, mut body))) = opened else {
            self.close_flight(Some(slot), Note::Over);
            self.words.push((reply, Word::Ended(Ended::GivenBack { answer_by })));
            return;
        };
        let due = self.passed + self.duty.request_deadline;
        body.reserve_capacity(payload.len());
        self.serial += 1;
        let place = self.flights.insert(Flight {
            serial: self.serial,
            slot: Some(slot),
            reply: Some(reply),
            ended: None,
            stage: Stage::Waiting { response, body: Some(body), is_whole: payload.is_empty(), rest: payload },
            permit,
            permitted_in: self.turn,
            roomy: None,
            sent_at: self.now,
            due: answer_by.map_or(due, |by| by.min(due)),
            // That something resent has little time left says nothing of the connection.
            late: if answer_by.is_none() { Note::TimedOut } else { Note::Unused },
        });
        self.marks.reach(place);
        self.begun.push(place);
    }

    /// This connection may send no provider token any more.
    fn refuse(&mut self, begin: Begin) {
        self.close_flight(Some(begin.slot), Note::Over);
        self.words.push((begin.reply, Word::Ended(Ended::GivenBack { answer_by: begin.answer_by })));
    }

    fn go_on(&mut self, key: Key, permit: Permit, reply: oneshot::Sender<Word>) {
        let Some(flight) = self.flights.get_mut(key.place).filter(|flight| flight.serial == key.serial) else {
            self.words.push((reply, Word::Ended(Ended::Unsent)));
            return;
        };
        if let Some(ended) = flight.ended.take() {
            self.flights.remove(key.place);
            self.words.push((reply, Word::Ended(ended)));
            return;
        }
        flight.reply = Some(reply);
        flight.permit = permit;
        flight.permitted_in = self.turn;
        if flight.roomy.is_none()
            && let Stage::Waiting { body: Some(body), .. } = &flight.stage
        {
            flight.roomy = Some(body.capacity());
            self.roomy.push(key.place);
        }
    }

    fn take_back(&mut self, key: Key) {
        if self.flights.get(key.place).is_some_and(|flight| flight.serial == key.serial) {
            let flight = self.flights.remove(key.place);
            self.close_flight(flight.slot, Note::Unused);
        }
    }

    /// Looks at the streams that are new, and at those of which `h2` says that there is news.
    fn look_at_news(&mut self) {
        let mut places = std::mem::take(&mut self.begun);
        for place in places.drain(..) {
            self.look_at(place);
        }
        self.marks.take_woken(&mut places);
        for place in places.drain(..) {
            self.look_at(place);
        }
        // What is to be looked at again waits for the next time; the place in memory is used again.
        places.append(&mut self.begun);
        self.begun = places;
    }

    /// Looks for an answer, or for room for the body.
    fn look_at(&mut self, place: usize) {
        let (Some(flight), Some((_, waker))) = (self.flights.get_mut(place), self.marks.at(place)) else {
            return;
        };
        let mut cx = Context::from_waker(waker);
        if let Stage::Waiting { response, body, rest, is_whole } = &mut flight.stage {
            match Pin::new(response).poll(&mut cx) {
                Poll::Ready(Ok(answer)) => {
                    let (head, stream) = answer.into_parts();
                    flight.stage = Stage::Answered { head, stream, read: BytesMut::new() };
                }
                Poll::Ready(Err(error)) => {
                    let ended = if !*is_whole || never_processed(&error) {
                        Ended::GivenBack { answer_by: Some(flight.due) }
                    } else {
                        Ended::Unknown { sent_at: flight.sent_at }
                    };
                    self.finish(place, ended, Note::Unused);
                    return;
                }
                Poll::Pending => {
                    // `None` and errors: the stream is closed, and its answer is about to say why.
                    if flight.roomy.is_none()
                        && !rest.is_empty()
                        && let Some(body) = body
                        && let Poll::Ready(Some(Ok(room))) = body.poll_capacity(&mut cx)
                    {
                        flight.roomy = Some(room);
                        self.roomy.push(place);
                    }
                    return;
                }
            }
        }
        if let Stage::Answered { head, stream, read } = &mut flight.stage
            && let Poll::Ready(is_whole) = read_more(head.status, stream, read, &mut cx)
        {
            self.answer(place, is_whole);
        }
    }

    /// The answer has been read, or has broken off.
    fn answer(&mut self, place: usize, is_whole: bool) {
        let Some(flight) = self.flights.get_mut(place) else { return };
        let Stage::Answered { head, read, .. } = std::mem::replace(&mut flight.stage, Stage::Over) else { return };
        let reply = response::read(head.status.as_u16(), &head.headers, &read, flight.sent_at, self.now);
        if !is_whole && tells_nothing(&reply) {
            let sent_at = flight.sent_at;
            self.finish(place, Ended::Unknown { sent_at }, Note::Unused);
            return;
        }
        let verdict = reply.answer.as_ref().map_or(Verdict::Keep, response::verdict);
        if self.skew_measured_at.is_none_or(|at| self.passed.saturating_sub(at) >= SKEW_EVERY)
            && head.headers.contains_key(header::DATE)
        {
            self.skew_measured_at = Some(self.passed);
            if let Some(seconds) = response::clock_skew_seconds(&head.headers, self.now) {
                self.owner.skew_measured(seconds);
            }
        }
        self.finish(place, Ended::Answered(reply), Note::Answered(verdict));
    }

    /// Hands over bodies where there is room.
    fn hand_over_bodies(&mut self) {
        let mut roomy = std::mem::take(&mut self.roomy);
        for place in roomy.drain(..) {
            self.hand_over_body(place);
        }
        self.roomy = roomy;
    }

    fn hand_over_body(&mut self, place: usize) {
        let (Some(flight), Some((mark, _))) = (self.flights.get_mut(place), self.marks.at(place)) else {
            return;
        };
        let room = flight.roomy.take().unwrap_or(0);
        let Stage::Waiting { body: Some(body), rest, .. } = &mut flight.stage else { return };
        if room == 0 {
            self.begun.push(place);
            return;
        }
        // The turn after the one that opened the stream follows it at once.
        let at_once = self.turn - flight.permitted_in <= 1;
        if !flight.permit.holds(self.now, self.passed, at_once) {
            if let Some(reply) = flight.reply.take() {
                self.words.push((reply, Word::Ask(Key { place, serial: flight.serial })));
            }
            return;
        }
        let piece = rest.split_to(room.min(rest.len()));
        let is_whole = rest.is_empty();
        mark.untaken.store(piece.len(), Ordering::Relaxed);
        // An error: the stream is closed already, and its answer is about to say how.
        if body.send_data(Body { piece, mark: Arc::clone(mark) }, is_whole).is_ok() {
            self.handed.push(place);
        }
    }

    /// A window that shrank in this turn keeps a body in `h2`, which would let it leave by itself later.
    fn take_back_untaken(&mut self) {
        let mut handed = std::mem::take(&mut self.handed);
        for place in handed.drain(..) {
            let untaken = self.marks.at(place).map_or(0, |(mark, _)| mark.untaken.load(Ordering::Relaxed));
            let Some(flight) = self.flights.get_mut(place) else { continue };
            if untaken > 0 {
                let ended = Ended::GivenBack { answer_by: Some(flight.due) };
                self.marks.replace(place);
                self.finish(place, ended, Note::Unused);
                continue;
            }
            if let Stage::Waiting { body, rest, is_whole, .. } = &mut flight.stage {
                if rest.is_empty() {
                    *is_whole = true;
                    *body = None;
                } else {
                    // The rest waits for more room.
                    self.begun.push(place);
                }
            }
        }
        self.handed = handed;
    }

    /// It is over: the stream is dropped, which resets it if it is not closed, and the push's task is told.
    fn finish(&mut self, place: usize, ended: Ended, note: Note) {
        let Some(flight) = self.flights.get_mut(place) else { return };
        let slot = flight.slot.take();
        if let Some(reply) = flight.reply.take() {
            self.flights.remove(place);
            self.words.push((reply, Word::Ended(ended)));
        } else {
            flight.stage = Stage::Over;
            flight.ended = Some(ended);
        }
        self.close_flight(slot, note);
    }

    fn close_flight(&mut self, slot: Option<Slot>, note: Note) {
        if let Some(slot) = slot {
            slot.spend();
            self.notes.push(note);
        }
    }

    /// Tells the owner first, so that whoever hears of an end finds the stream free.
    fn report(&mut self) {
        if !self.notes.is_empty() {
            self.owner.released(self.duty.connection.id, &self.notes);
            self.notes.clear();
        }
        for (reply, word) in self.words.drain(..) {
            if let Err(Word::Ask(key)) = reply.send(word) {
                // Nobody waits for it any more.
                self.orders.push_back(Order::TakeBack { key });
            }
        }
    }

    /// What is to be looked at now and then.
    fn look_after(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let connection = &self.duty.connection;
        while self.tick.as_mut().poll(cx).is_ready() {
            let next_due = self.time_out();
            self.report();
            let tick = if self.blocked.is_some() { BLOCKED_TICK } else { TICK };
            self.tick = self.duty.clock.sleep(next_due.saturating_sub(self.passed).min(tick));
            let over =
                |since: Option<Duration>, patience| since.is_some_and(|at| self.passed.saturating_sub(at) >= patience);
            if over(self.pinged_at, PING_PATIENCE) || over(self.blocked.map(|blocked| blocked.since), PING_PATIENCE) {
                return Poll::Ready(End::Silent);
            }
            if over(self.closing_since, CLOSE_PATIENCE) {
                return Poll::Ready(End::Stuck);
            }
            match self.owner.care(connection.id) {
                Care::Nothing => {}
                Care::Ping => self.ping(),
                Care::Close => connection.close(),
            }
        }
        Poll::Pending
    }

    /// Ends what has waited too long. Returns when the next one will have.
    fn time_out(&mut self) -> Duration {
        let mut late = Vec::new();
        let mut next = Duration::MAX;
        for (place, flight) in &self.flights {
            if flight.due <= self.passed {
                late.push(place);
            } else {
                next = next.min(flight.due);
            }
        }
        for place in late {
            let Some(flight) = self.flights.get(place) else { continue };
            match &flight.stage {
                // The status alone may have a meaning.
                Stage::Answered { .. } => self.answer(place, false),
                Stage::Waiting { is_whole: true, .. } => {
                    let (sent_at, late) = (flight.sent_at, flight.late);
                    self.finish(place, Ended::Unknown { sent_at }, late);
                }
                Stage::Waiting { .. } => {
                    let late = flight.late;
                    self.finish(place, Ended::Unsent, late);
                }
                // Nobody has asked for it.
                Stage::Over => drop(self.flights.remove(place)),
            }
        }
        next
    }

    fn ping(&mut self) {
        if self.pinged_at.is_none()
            && let Some(pings) = &mut self.pings
            && pings.send_ping(Ping::opaque()).is_ok()
        {
            self.pinged_at = Some(self.duty.clock.monotonic());
        }
    }

    /// Everything gets its end: the streams theirs from `h2`, whatever was not looked at yet as never sent.
    fn end(self, why: &End) {
        let Self { h2, handle, flights, orders, mut words, duty, owner, .. } = self;
        // Gives every stream its error.
        drop(h2);
        drop(handle);
        let mut cx = Context::from_waker(Waker::noop());
        let mut ends: Vec<_> = flights.into_iter().collect();
        for order in orders.into_iter().chain(duty.connection.close_mail()) {
            match order {
                Order::Begin(Begin { slot, answer_by, reply, .. }) => {
                    slot.spend();
                    words.push((reply, Word::Ended(Ended::GivenBack { answer_by })));
                }
                Order::GoOn { key, reply, .. } => {
                    let flight = ends.iter_mut().find(|(_, flight)| flight.serial == key.serial);
                    match flight {
                        Some((_, flight)) => flight.reply = Some(reply),
                        None => words.push((reply, Word::Ended(Ended::Unsent))),
                    }
                }
                Order::TakeBack { .. } => {}
            }
        }
        for (_, flight) in ends {
            let Flight { slot, reply, ended, stage, sent_at, due, .. } = flight;
            let given_back = Ended::GivenBack { answer_by: Some(due) };
            if let Some(slot) = slot {
                slot.spend();
            }
            let ended = match (ended, stage) {
                (Some(ended), _) => ended,
                (None, Stage::Waiting { mut response, is_whole, .. }) => match Pin::new(&mut response).poll(&mut cx) {
                    Poll::Ready(Ok(answer)) => {
                        let (head, _) = answer.into_parts();
                        broken_off(&head, b"", sent_at, duty.clock.now())
                    }
                    Poll::Ready(Err(error)) if never_processed(&error) => given_back,
                    _ if is_whole => Ended::Unknown { sent_at },
                    _ => given_back,
                },
                (None, Stage::Answered { head, read, .. }) => broken_off(&head, &read, sent_at, duty.clock.now()),
                (None, Stage::Over) => Ended::Unsent,
            };
            if let Some(reply) = reply {
                words.push((reply, Word::Ended(ended)));
            }
        }
        owner.ended(duty.connection.id, why);
        for (reply, word) in words {
            // Whoever has left does not want to know.
            _ = reply.send(word);
        }
    }
}

/// What an answer says that broke off.
fn broken_off(head: &Parts, body: &[u8], sent_at: Timestamp, now: Timestamp) -> Ended {
    let reply = response::read(head.status.as_u16(), &head.headers, body, sent_at, now);
    if tells_nothing(&reply) { Ended::Unknown { sent_at } } else { Ended::Answered(reply) }
}

/// Of an answer that broke off: a 400 without its reason may be about the connection (`IdleTimeout`).
fn tells_nothing(reply: &Reply) -> bool {
    reply.answer.as_ref().is_some_and(|answer| answer.status == 400 && answer.reason.is_none())
}

/// Whether the peer itself says that it did nothing with the request.
fn never_processed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || (error.is_reset() && error.reason() == Some(H2Reason::REFUSED_STREAM)))
}

/// Reads an answer's body, as far as it comes within the bound. An acceptance needs none. Ready: that is all, or false: it
/// has broken off.
fn read_more(status: StatusCode, stream: &mut RecvStream, read: &mut BytesMut, cx: &mut Context<'_>) -> Poll<bool> {
    while status != StatusCode::OK && read.len() < MAX_BODY_BYTES {
        match stream.poll_data(cx) {
            Poll::Ready(Some(Ok(mut piece))) => {
                _ = stream.flow_control().release_capacity(piece.len());
                piece.truncate(MAX_BODY_BYTES - read.len());
                read.extend_from_slice(&piece);
            }
            Poll::Ready(Some(Err(_))) => return Poll::Ready(false),
            Poll::Ready(None) => break,
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(true)
}

#[cfg(test)]
mod tests {
    use std::io;

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::{
        apns::{
            NoFence,
            connection::{self, Gate},
            credential, request,
            token::Minter,
        },
        domain::{
            clock::{ManualClock, SystemClock},
            push::PushType,
        },
    };

    /// A socket whose peer sends what the test says.
    #[derive(Clone, Default)]
    struct Peer(Arc<Mutex<Said>>);

    #[derive(Default)]
    struct Said {
        /// Comes now.
        now: Vec<u8>,
        /// Comes once the socket has been found empty once more.
        later: Vec<u8>,
        reader: Option<Waker>,
        heard: Vec<u8>,
        /// Takes nothing but what TLS takes before the socket takes that.
        deaf: bool,
        held: Vec<u8>,
        writer: Option<Waker>,
    }

    impl Peer {
        fn says(&self, frame: &[u8]) {
            let mut said = self.0.lock().unwrap();
            said.now.extend(frame);
            if let Some(reader) = said.reader.take() {
                reader.wake();
            }
        }

        fn says_later(&self, frame: &[u8]) {
            self.0.lock().unwrap().later.extend(frame);
        }

        fn is_deaf(&self, deaf: bool) {
            let mut said = self.0.lock().unwrap();
            said.deaf = deaf;
            if let Some(writer) = said.writer.take() {
                writer.wake();
            }
        }

        async fn hears(&self, frame: (u8, u8)) {
            while !self.heard().contains(&frame) {
                tokio::task::yield_now().await;
            }
        }

        /// Kind and stream of each frame that it heard.
        fn heard(&self) -> Vec<(u8, u8)> {
            let said = self.0.lock().unwrap();
            let mut rest = said.heard.get(24..).unwrap_or_default();
            let mut frames = Vec::new();
            while let [a, b, c, kind, _, _, _, _, stream, ..] = rest {
                frames.push((*kind, *stream));
                let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
                rest = rest.get(9 + length..).unwrap_or_default();
            }
            frames
        }
    }

    impl AsyncRead for Peer {
        fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let mut said = self.0.lock().unwrap();
            if said.now.is_empty() {
                said.now = std::mem::take(&mut said.later);
                said.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let length = said.now.len().min(buf.remaining());
            buf.put_slice(&said.now.drain(..length).collect::<Vec<_>>());
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Peer {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            if self.as_mut().poll_flush(cx).is_pending() {
                return Poll::Pending;
            }
            self.0.lock().unwrap().held.extend(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            let mut said = self.0.lock().unwrap();
            if said.deaf && !said.held.is_empty() {
                said.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let held = std::mem::take(&mut said.held);
            said.heard.extend(held);
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Hears how many streams there may be.
    #[derive(Default)]
    struct Listener {
        limit: AtomicUsize,
    }

    impl Owner for Listener {
        fn limit_changed(&self, _: u64, streams: usize) {
            self.limit.store(streams, Ordering::SeqCst);
        }
        fn leaving(&self, _: u64, _: &str) {}
        fn pong(&self, _: u64) {}
        fn released(&self, _: u64, _: &[Note]) {}
        fn skew_measured(&self, _: i64) {}
        fn care(&self, _: u64) -> Care {
            Care::Nothing
        }
        fn ended(&self, _: u64, _: &End) {}
    }

    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const STREAMS_10: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 10];
    const WINDOW_0: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0];
    const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

    /// A connection that is driven.
    struct Scene {
        peer: Peer,
        connection: Arc<Connection>,
        clock: Arc<dyn Clock>,
    }

    impl Scene {
        async fn push(&self) -> Ended {
            let stopped = std::sync::atomic::AtomicBool::new(false);
            let push = request::tests::push(PushType::Alert, None);
            let deadline = self.clock.now().plus(Duration::from_secs(600));
            let gate = Gate { fence: &NoFence, clock: &*self.clock, deadline, answer_by: None, stopped: &stopped };
            connection::exchange(Slot::new(Arc::clone(&self.connection)), &push, &gate).await
        }
    }

    /// It moves only when it is moved.
    fn still() -> Arc<ManualClock> {
        Arc::new(ManualClock::new(Timestamp::from_seconds(1_794_999_600)))
    }

    /// Plays `scene` on a connection with ten streams.
    async fn play(clock: Arc<dyn Clock>, scene: impl AsyncFnOnce(&Scene)) {
        let peer = Peer::default();
        let owner = Arc::new(Listener::default());
        let back: std::sync::Weak<dyn Owner> = Arc::<Listener>::downgrade(&owner);
        let minter = Arc::new(Minter::new(Arc::new(credential::tests::credential())));
        let connection = Arc::new(Connection::new(0, back, minter));
        let duty = Duty {
            connection: Arc::clone(&connection),
            authority: Authority::from_static("api.push.apple.com"),
            request_deadline: Duration::from_secs(20),
            clock: Arc::clone(&clock),
            abort: CancellationToken::new(),
        };
        let opened = connection::handshake(Wire::new(peer.clone())).await.unwrap();
        // A task of its own, so that it is polled only when something wakes it.
        let listener: Arc<Listener> = Arc::clone(&owner);
        let driven = TaskTracker::new().spawn(async move { drive(duty, opened, listener).await });
        let stage = Scene { peer, connection, clock };
        let scene = async {
            stage.peer.says(STREAMS_10);
            while owner.limit.load(Ordering::SeqCst) != 10 {
                tokio::task::yield_now().await;
            }
            scene(&stage).await;
        };
        let bounded = tokio::time::timeout(Duration::from_secs(20), scene);
        tokio::select! {
            biased;
            done = bounded => done.expect("an end"),
            ended = driven => panic!("the connection ended: {ended:?}"),
        }
    }

    #[tokio::test]
    async fn a_body_that_a_shrinking_window_keeps_back_is_taken_back_at_once() {
        play(still(), async |stage| {
            // Between the turn that finds room for the body and the one that hands it over.
            stage.peer.says_later(WINDOW_0);
            let ended = stage.push().await;
            assert!(matches!(ended, Ended::GivenBack { .. }), "{ended:?}");
            stage.peer.hears((RST_STREAM, 1)).await;
            let of_the_push: Vec<_> = stage.peer.heard().into_iter().filter(|(_, stream)| *stream == 1).collect();
            assert_eq!(of_the_push, [(HEADERS, 1), (RST_STREAM, 1)], "no DATA");
        })
        .await;
    }

    #[tokio::test]
    async fn what_comes_while_the_socket_takes_nothing_leaves_as_soon_as_it_takes_again() {
        play(still(), async |stage| {
            stage.peer.is_deaf(true);
            // What it is owed cannot leave.
            stage.peer.says(PING);
            while stage.peer.0.lock().unwrap().writer.is_none() {
                tokio::task::yield_now().await;
            }
            let push = stage.push();
            let leaves = async {
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                stage.peer.is_deaf(false);
                stage.peer.hears((DATA, 1)).await;
            };
            tokio::select! {
                biased;
                ended = push => panic!("{ended:?}"),
                () = leaves => {}
            }
        })
        .await;
    }

    #[tokio::test]
    async fn what_waited_for_the_socket_while_the_process_was_stopped_never_leaves() {
        let clock = still();
        play(Arc::<ManualClock>::clone(&clock), async |stage| {
            stage.peer.is_deaf(true);
            let wakes = async {
                while stage.peer.0.lock().unwrap().held.is_empty() {
                    tokio::task::yield_now().await;
                }
                clock.advance(STOPPED_FOR);
                stage.peer.is_deaf(false);
            };
            let (ended, ()) = tokio::join!(stage.push(), wakes);
            assert!(matches!(ended, Ended::Unknown { .. }), "{ended:?}");
            let of_the_push: Vec<_> = stage.peer.heard().into_iter().filter(|(_, stream)| *stream == 1).collect();
            assert_eq!(of_the_push, []);
        })
        .await;
    }

    #[tokio::test]
    async fn what_waits_for_the_socket_for_seconds_leaves_as_soon_as_it_takes_something() {
        // The manual one would wake the connection whenever it is moved, as nothing does here.
        play(Arc::new(SystemClock::new()), async |stage| {
            stage.peer.is_deaf(true);
            let leaves = async {
                tokio::time::sleep(2 * STOPPED_FOR).await;
                assert!(!stage.peer.heard().contains(&(DATA, 1)), "it takes nothing");
                stage.peer.is_deaf(false);
                stage.peer.hears((DATA, 1)).await;
            };
            tokio::select! {
                biased;
                ended = stage.push() => panic!("{ended:?}"),
                () = leaves => {}
            }
        })
        .await;
    }
}
