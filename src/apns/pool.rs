//! The connections of one credential to one environment, and who may use them when.
//!
//! Promises:
//!
//! - A connection carries one request until it has proved itself: by an answer that is not about the credential, or by
//!   a raised limit. Only then the others follow.
//! - Never more streams than the peer allows at this moment. Where streams are scarce, the urgent lane goes first,
//!   strictly; within a lane, first come, first served.
//! - One attempt to connect at a time, however many wait. Failures and connections that end without having proved
//!   themselves (a refused credential is one) are followed by a back-off of 1 s doubling to 60 s; and there are never
//!   more than a few attempts a minute, whatever the peer does.
//! - Nobody waits past the deadline of the push, nor longer than [`PATIENCE`].
//!
//! Locks: one mutex for the choice, held for a few instructions, never across an await.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustls::ClientConfig;
use tokio::sync::{Notify, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Fence, Head, Push,
    connection::{self, Address, Care, Connection, End, Ended, Gate, Opened, Owner},
    request::Template,
    response::{self, Verdict},
    token::{Minter, Slot as TokenSlot},
};
use crate::domain::{
    clock::{Clock, Timestamp},
    notification::Lane,
    outcome::{Outcome, Reply},
    topic::Environment,
};

/// The longest a push waits for a stream before it is given back as unsent.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// After this long without traffic a connection is checked by a PING.
const IDLE_PING: Duration = Duration::from_secs(5 * 60);

/// A connection that has been silent for this long is checked before it is used again.
const REUSE_PING: Duration = Duration::from_secs(60);

/// One more connection than needed is closed after this long without traffic, at most one in [`SURPLUS_PACE`].
const SURPLUS_IDLE: Duration = Duration::from_secs(10 * 60);
const SURPLUS_PACE: Duration = Duration::from_secs(60);

/// A connection is replaced at this age, give or take [`AGE_JITTER`].
const MAX_AGE: Duration = Duration::from_secs(12 * 3600);
const AGE_JITTER: Duration = Duration::from_secs(2 * 3600);

/// A connection is replaced after this many requests: stream ids end at 2^30 requests.
const MAX_REQUESTS: u64 = 1 << 29;

/// While a fresh or long idle connection finds out whether it works, nobody opens another, for so long.
const UNSURE: Duration = Duration::from_secs(2);

/// A connection whose peer has not sent its first SETTINGS by then is given up.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// A connection younger than this already knows what Apple's portal says.
const FRESH: Duration = Duration::from_secs(60);

/// Attempts to connect in [`OPENS_WINDOW`] are limited to this or twice the connections, whichever is more.
const MAX_OPENS: usize = 8;
const OPENS_WINDOW: Duration = Duration::from_secs(60);

const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// The most streams used of one connection where the peer names no limit or a huge one.
const MAX_STREAMS: usize = 4096;

/// Templates of so many notifications are kept at a time.
const TEMPLATES: usize = 16;

/// How often the clocks are compared.
const SKEW_EVERY: Duration = Duration::from_secs(60);

/// What a pool is for and how it behaves.
pub(super) struct Spec {
    pub(super) environment: Environment,
    pub(super) address: Address,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) request_deadline: Duration,
    pub(super) max_connections: usize,
}

/// How a pool stands.
#[derive(Debug, Clone)]
pub(super) struct Report {
    pub(super) connections: usize,
    pub(super) in_flight: usize,
    pub(super) waiting: usize,
    pub(super) connect_error: Option<String>,
    pub(super) provider_token_age: Option<Duration>,
    pub(super) clock_skew_seconds: Option<i64>,
}

pub(super) struct Pool {
    spec: Spec,
    minter: Minter,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    /// Ends attempts to connect.
    stop: CancellationToken,
    /// Ends connections.
    abort: CancellationToken,
    stopped: AtomicBool,
    /// A connection ended.
    ended: Notify,
    templates: Mutex<VecDeque<(Weak<Head>, Arc<Template>)>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    members: Vec<Member>,
    /// The urgent lane, and the other.
    waiting: [VecDeque<oneshot::Sender<Slot>>; 2],
    /// The length of the queues after those who had left were last swept out.
    swept: usize,
    next_id: u64,
    connecting: bool,
    /// Failures and unproved connections in a row.
    strikes: u32,
    not_before: Duration,
    opens: VecDeque<Duration>,
    connect_error: Option<String>,
    surplus_closed_at: Option<Duration>,
    clock_skew_seconds: Option<i64>,
    skew_measured_at: Option<Duration>,
}

#[expect(clippy::struct_excessive_bools, reason = "five independent facts about a connection, each asked for by name")]
struct Member {
    connection: Arc<Connection>,
    in_flight: usize,
    /// What the peer allows.
    limit: usize,
    /// The peer's first SETTINGS have come.
    greeted: bool,
    requests: u64,
    /// An answer came that was not about the credential or the connection.
    proved: bool,
    /// The limit was raised after the first SETTINGS.
    raised: bool,
    /// Opens streams.
    usable: bool,
    /// Since when it waits for a PING before it is used again.
    checking: Option<Duration>,
    /// Its end has been counted as a failure, or need not be.
    judged: bool,
    opened_at: Duration,
    /// When a request was last begun or answered, or a PING acknowledged.
    active_at: Duration,
    answered_at: Duration,
    max_age: Duration,
}

impl Member {
    /// Since when it is not known what the connection is good for; `None`: it is known.
    fn unsure_since(&self) -> Option<Duration> {
        match self.checking {
            Some(since) => Some(since),
            None if self.proved || self.raised => None,
            None => Some(self.opened_at),
        }
    }

    fn room(&self) -> usize {
        let streams = if self.proved || self.raised { self.limit.min(MAX_STREAMS) } else { self.limit.min(1) };
        if self.usable && self.checking.is_none() { streams.saturating_sub(self.in_flight) } else { 0 }
    }
}

/// The right to one stream. Given back when dropped.
struct Slot {
    pool: Option<Arc<Pool>>,
    connection: Arc<Connection>,
}

/// What became of a slot's stream.
enum Note {
    /// Nothing that says anything about the connection.
    Unused,
    Answered(Verdict),
    TimedOut,
    /// No stream can be opened on the connection any more.
    Over,
}

impl Slot {
    fn done(mut self, note: &Note) {
        if let Some(pool) = self.pool.take() {
            pool.release(self.connection.id, note);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.release(self.connection.id, &Note::Unused);
        }
    }
}

const UNSENT: Reply = Reply { outcome: Outcome::Unsent, answer: None, sent_at: None };

impl Pool {
    pub(super) fn new(
        spec: Spec,
        minter: Minter,
        clock: Arc<dyn Clock>,
        tracker: TaskTracker,
        abort: &CancellationToken,
    ) -> Arc<Self> {
        let abort = abort.child_token();
        Arc::new(Self {
            spec,
            minter,
            clock,
            tracker,
            stop: abort.child_token(),
            abort,
            stopped: AtomicBool::new(false),
            ended: Notify::new(),
            templates: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Sends one push in the caller's task.
    pub(super) async fn send(self: &Arc<Self>, push: &Push, fence: &dyn Fence) -> Reply {
        let Some(template) = self.template(&push.head) else {
            return UNSENT;
        };
        let gate = Gate { fence, clock: &*self.clock, deadline: push.head.deadline, stopped: &self.stopped };
        // Another round only where nothing was written: the connection turned out to take no more streams.
        for _ in 0..=self.spec.max_connections {
            let Some(slot) = self.acquire(push.head.lane, push.head.deadline).await else {
                return UNSENT;
            };
            let ended = connection::exchange(
                &slot.connection,
                &self.minter,
                &gate,
                |token| template.request(push, &self.spec.address.authority, token.authorization()).ok(),
                push.head.payload.clone(),
                self.spec.request_deadline,
            )
            .await;
            match ended {
                Ended::Answered { status, headers, body, sent_at } => {
                    let now = self.clock.now();
                    let reply = response::read(status, &headers, &body, sent_at, now);
                    let verdict = reply.answer.as_ref().map_or(Verdict::Keep, response::verdict);
                    self.compare_clocks(&headers, now);
                    slot.done(&Note::Answered(verdict));
                    return reply;
                }
                Ended::Unknown { sent_at, timed_out } => {
                    slot.done(if timed_out { &Note::TimedOut } else { &Note::Unused });
                    return Reply { outcome: Outcome::Unknown, answer: None, sent_at: Some(sent_at) };
                }
                Ended::Fenced => {
                    return Reply { outcome: Outcome::Fenced, answer: None, sent_at: None };
                }
                Ended::Unsent => return UNSENT,
                Ended::UnsentForGood => slot.done(&Note::Over),
            }
        }
        UNSENT
    }

    /// Waits for a stream; `None` if there is none in time, or the pool was stopped.
    async fn acquire(self: &Arc<Self>, lane: Lane, deadline: Timestamp) -> Option<Slot> {
        let granted = {
            let mut state = self.state();
            if self.stopped.load(Ordering::Acquire) {
                return None;
            }
            if !state.somebody_is_before(lane)
                && let Some(connection) = state.take_room(self.clock.monotonic())
            {
                return Some(Slot { pool: Some(Arc::clone(self)), connection });
            }
            let (grant, granted) = oneshot::channel();
            state.enqueue(lane, grant);
            self.settle(&mut state);
            granted
        };
        let patience = deadline.since(self.clock.now()).min(PATIENCE);
        tokio::select! {
            biased;
            slot = granted => slot.ok(),
            // A grant that comes at this very moment is given back when `granted` is dropped.
            () = self.clock.sleep(patience) => None,
        }
    }

    fn release(self: &Arc<Self>, id: u64, note: &Note) {
        let now = self.clock.monotonic();
        let mut state = self.state();
        let Some(member) = state.member(id) else {
            return;
        };
        member.in_flight = member.in_flight.saturating_sub(1);
        match note {
            Note::Unused => {}
            Note::Over => state.retire(id, now, true),
            Note::Answered(verdict) => {
                member.active_at = now;
                member.answered_at = now;
                let fresh = now.saturating_sub(member.opened_at) < FRESH;
                match verdict {
                    Verdict::Retire => {
                        if member.usable {
                            tracing::info!(
                                apns.environment = %self.spec.environment,
                                connection.id = id,
                                "connection {id} is replaced: APNs' answer says so"
                            );
                        }
                        state.retire(id, now, true);
                    }
                    Verdict::RetireIfOld if !fresh => state.retire(id, now, false),
                    Verdict::Keep | Verdict::RetireIfOld => {
                        if !member.proved {
                            member.proved = true;
                            member.judged = true;
                            state.strikes = 0;
                        }
                    }
                }
            }
            Note::TimedOut => {
                // PINGs may be acknowledged by a connection that answers nothing (§3.2: wedged).
                let wedged = now.saturating_sub(member.answered_at) >= self.spec.request_deadline;
                member.connection.ping();
                if wedged && member.usable {
                    tracing::warn!(
                        apns.environment = %self.spec.environment,
                        connection.id = id,
                        "connection {id} is replaced: it has answered nothing for a whole request deadline"
                    );
                    state.retire(id, now, true);
                }
            }
        }
        state.close_if_done(id);
        self.settle(&mut state);
    }

    /// Hands free streams to those who wait, and sees to a connection if streams are missing. Called after every
    /// change.
    fn settle(self: &Arc<Self>, state: &mut State) {
        if state.waiting.iter().all(VecDeque::is_empty) {
            return;
        }
        let now = self.clock.monotonic();
        loop {
            state.skip_those_who_left();
            let Some(queue) = state.waiting.iter().position(|q| !q.is_empty()) else {
                return;
            };
            let Some(connection) = state.take_room(now) else {
                break;
            };
            let id = connection.id;
            let slot = Slot { pool: Some(Arc::clone(self)), connection };
            let waiter = state.waiting.get_mut(queue).and_then(VecDeque::pop_front);
            if let Some(mut unwanted) = waiter.and_then(|w| w.send(slot).err()) {
                // Not by its drop, which would want the lock that is held here.
                unwanted.pool = None;
                if let Some(member) = state.member(id) {
                    member.in_flight = member.in_flight.saturating_sub(1);
                }
            }
        }
        self.connect_if_needed(state);
    }

    fn connect_if_needed(self: &Arc<Self>, state: &mut State) {
        if state.connecting || self.stopped.load(Ordering::Acquire) {
            return;
        }
        let now = self.clock.monotonic();
        let mut counted = 0;
        for member in state.members.iter().filter(|m| m.usable) {
            match member.unsure_since() {
                // Is about to be known: wait for it. After failures, one at a time, however long it takes.
                Some(since) if now.saturating_sub(since) < UNSURE || state.strikes > 0 && member.checking.is_none() => {
                    return;
                }
                // May well be dead: it does not stand in the way of another.
                Some(_) if member.checking.is_some() => {}
                _ => counted += 1,
            }
        }
        if counted >= self.spec.max_connections || state.members.len() >= 2 * self.spec.max_connections {
            return;
        }
        state.connecting = true;
        self.tracker.spawn(Arc::clone(self).connect());
    }

    /// One attempt to connect, after the back-off. Ends early if the pool is stopped or nobody waits any more.
    async fn connect(self: Arc<Self>) {
        let pause = {
            let mut state = self.state();
            let now = self.clock.monotonic();
            let opens = MAX_OPENS.max(2 * self.spec.max_connections);
            while state.opens.front().is_some_and(|at| now.saturating_sub(*at) >= OPENS_WINDOW) {
                state.opens.pop_front();
            }
            let pace = if state.opens.len() >= opens {
                state.opens.front().map_or(Duration::ZERO, |at| *at + OPENS_WINDOW)
            } else {
                Duration::ZERO
            };
            state.not_before.max(pace).saturating_sub(now)
        };
        let stopped = self.stop.cancelled();
        if !pause.is_zero() {
            tokio::select! {
                () = stopped => return,
                () = self.clock.sleep(pause) => {}
            }
        }
        {
            let mut state = self.state();
            state.skip_those_who_left();
            if self.stopped.load(Ordering::Acquire) || state.waiting.iter().all(VecDeque::is_empty) {
                state.connecting = false;
                return;
            }
            state.opens.push_back(self.clock.monotonic());
        }
        let opened = tokio::select! {
            () = self.stop.cancelled() => return,
            opened = connection::open(&self.spec.address, &self.spec.tls, &*self.clock) => opened,
        };
        let mut state = self.state();
        state.connecting = false;
        let now = self.clock.monotonic();
        match opened {
            Ok(opened) => {
                state.connect_error = None;
                self.add(&mut state, opened, now);
            }
            Err(error) => {
                let error = error.chain();
                state.strike(now);
                tracing::warn!(
                    apns.environment = %self.spec.environment,
                    server.address = %self.spec.address.authority,
                    retry_in_ms = state.not_before.saturating_sub(now).as_millis(),
                    error,
                    "no connection to APNs: {error}"
                );
                state.connect_error = Some(error);
            }
        }
        self.settle(&mut state);
    }

    fn add(self: &Arc<Self>, state: &mut State, opened: Opened, now: Duration) {
        let id = state.next_id;
        state.next_id += 1;
        let connection = Arc::new(Connection::new(id, &opened));
        let jitter = AGE_JITTER.mul_f64(rand::random_range(0.0..=2.0));
        state.members.push(Member {
            connection: Arc::clone(&connection),
            in_flight: 0,
            limit: 0,
            greeted: false,
            requests: 0,
            proved: false,
            raised: false,
            usable: true,
            checking: None,
            judged: false,
            opened_at: now,
            active_at: now,
            answered_at: now,
            max_age: (MAX_AGE + jitter).saturating_sub(AGE_JITTER),
        });
        tracing::info!(
            apns.environment = %self.spec.environment,
            server.address = %self.spec.address.authority,
            connection.id = id,
            "connection {id} to APNs is open"
        );
        self.tracker.spawn(connection::drive(
            connection,
            opened,
            Arc::clone(self),
            Arc::clone(&self.clock),
            self.abort.clone(),
        ));
    }

    /// What all pushes of a notification share, made once. `None`: cannot be, by the domain's types.
    fn template(&self, head: &Arc<Head>) -> Option<Arc<Template>> {
        let mut templates = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        // The weak reference keeps the place in memory from being used again, so the same place is the same head.
        let known = templates.iter().find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(head)));
        if let Some((_, template)) = known {
            return Some(Arc::clone(template));
        }
        let template = Arc::new(Template::new(head).ok()?);
        templates.truncate(TEMPLATES - 1);
        templates.push_front((Arc::downgrade(head), Arc::clone(&template)));
        Some(template)
    }

    fn compare_clocks(&self, headers: &http::HeaderMap, now: Timestamp) {
        if !headers.contains_key(http::header::DATE) {
            return;
        }
        let passed = self.clock.monotonic();
        let mut state = self.state();
        if state.skew_measured_at.is_none_or(|at| passed.saturating_sub(at) >= SKEW_EVERY) {
            state.skew_measured_at = Some(passed);
            state.clock_skew_seconds = response::clock_skew_seconds(headers, now);
        }
    }

    pub(super) fn report(&self) -> Report {
        let state = self.state();
        let now = self.clock.now();
        let kept = state.members.iter().filter(|m| m.usable).filter_map(|m| m.connection.token_age(&*self.clock)).max();
        Report {
            connections: state.members.len(),
            in_flight: state.members.iter().map(|m| m.in_flight).sum(),
            waiting: state.waiting.iter().flatten().filter(|w| !w.is_closed()).count(),
            connect_error: state.connect_error.clone(),
            provider_token_age: kept.or_else(|| TokenSlot::at(now).age(now)),
            clock_skew_seconds: state.clock_skew_seconds,
        }
    }

    /// Nothing new is written from now on.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.stop.cancel();
        let waiting = {
            let mut state = self.state();
            // Whoever waits gets an error instead of a slot.
            std::mem::take(&mut state.waiting)
        };
        drop(waiting);
    }

    /// Closes everything, once nothing is in flight or `grace` has passed.
    pub(super) async fn close(&self, grace: Duration) {
        self.stop();
        {
            let now = self.clock.monotonic();
            let mut state = self.state();
            let ids: Vec<u64> = state.members.iter().map(|m| m.connection.id).collect();
            for id in ids {
                state.retire(id, now, false);
                state.close_if_done(id);
            }
        }
        let all_ended = async {
            loop {
                let ended = self.ended.notified();
                if self.state().members.is_empty() {
                    return;
                }
                ended.await;
            }
        };
        tokio::select! {
            biased;
            () = all_ended => {}
            () = self.clock.sleep(grace) => {}
        }
        self.abort.cancel();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn queue_of(lane: Lane) -> usize {
    match lane {
        Lane::Transactional => 0,
        Lane::Bulk => 1,
    }
}

impl State {
    fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|m| m.connection.id == id)
    }

    fn somebody_is_before(&self, lane: Lane) -> bool {
        self.waiting.iter().take(queue_of(lane) + 1).any(|q| !q.is_empty())
    }

    /// Takes a stream of the usable connection that has the fewest requests in flight.
    fn take_room(&mut self, now: Duration) -> Option<Arc<Connection>> {
        loop {
            let member = self.members.iter_mut().filter(|m| m.room() > 0).min_by_key(|m| m.in_flight)?;
            if member.in_flight == 0 && member.requests > 0 && now.saturating_sub(member.active_at) > REUSE_PING {
                member.checking = Some(now);
                member.connection.ping();
                continue;
            }
            if member.requests >= MAX_REQUESTS {
                let id = member.connection.id;
                self.retire(id, now, false);
                continue;
            }
            member.in_flight += 1;
            member.requests += 1;
            member.active_at = now;
            return Some(Arc::clone(&member.connection));
        }
    }

    fn enqueue(&mut self, lane: Lane, waiter: oneshot::Sender<Slot>) {
        if let Some(queue) = self.waiting.get_mut(queue_of(lane)) {
            queue.push_back(waiter);
        }
        // Those who gave up are swept out now and then, so that the queues are at most twice as long as they need be.
        let length: usize = self.waiting.iter().map(VecDeque::len).sum();
        if length > 2 * self.swept + 64 {
            for queue in &mut self.waiting {
                queue.retain(|w| !w.is_closed());
            }
            self.swept = self.waiting.iter().map(VecDeque::len).sum();
        }
    }

    fn skip_those_who_left(&mut self) {
        for queue in &mut self.waiting {
            while queue.front().is_some_and(oneshot::Sender::is_closed) {
                queue.pop_front();
            }
        }
    }

    /// Opens no more streams on it. `peer`: because of what the other side did.
    fn retire(&mut self, id: u64, now: Duration, peer: bool) {
        let Some(member) = self.member(id) else {
            return;
        };
        member.usable = false;
        let strike = peer && !member.judged;
        member.judged = true;
        if strike {
            self.strike(now);
        }
    }

    fn strike(&mut self, now: Duration) {
        let doubled = BACKOFF_FIRST.saturating_mul(1 << self.strikes.min(6)).min(BACKOFF_MAX);
        self.strikes = self.strikes.saturating_add(1);
        self.not_before = now + doubled.mul_f64(rand::random_range(0.75..=1.0));
    }

    fn close_if_done(&mut self, id: u64) {
        if let Some(member) = self.member(id)
            && !member.usable
            && member.in_flight == 0
        {
            member.connection.close();
        }
    }
}

impl Owner for Arc<Pool> {
    fn limit_changed(&self, id: u64, streams: usize) {
        let mut state = self.state();
        if let Some(member) = state.member(id) {
            tracing::debug!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                streams,
                "connection {id} may have {streams} streams"
            );
            member.raised |= member.greeted && streams > member.limit;
            member.greeted = true;
            member.limit = streams;
        }
        self.settle(&mut state);
    }

    fn leaving(&self, id: u64, why: &str) {
        tracing::info!(
            apns.environment = %self.spec.environment,
            connection.id = id,
            error = why,
            "connection {id} is replaced: {why}"
        );
        let now = self.clock.monotonic();
        let mut state = self.state();
        state.retire(id, now, true);
        state.close_if_done(id);
        self.settle(&mut state);
    }

    fn pong(&self, id: u64) {
        let now = self.clock.monotonic();
        let mut state = self.state();
        if let Some(member) = state.member(id) {
            member.active_at = now;
            member.checking = None;
        }
        self.settle(&mut state);
    }

    fn care(&self, id: u64) -> Care {
        let now = self.clock.monotonic();
        let mut state = self.state();
        let usable = state.members.iter().filter(|m| m.usable).count();
        let surplus_pace = state.surplus_closed_at.is_none_or(|at| now.saturating_sub(at) >= SURPLUS_PACE);
        let Some(member) = state.member(id) else {
            return Care::Nothing;
        };
        let idle = if member.in_flight == 0 { now.saturating_sub(member.active_at) } else { Duration::ZERO };
        let traffic = now.saturating_sub(member.answered_at);
        let age = now.saturating_sub(member.opened_at);
        if member.usable && (age >= member.max_age || !member.greeted && age >= GREETING_PATIENCE) {
            let peer = !member.greeted;
            state.retire(id, now, peer);
        } else if member.usable && member.in_flight == 0 && traffic >= SURPLUS_IDLE && usable > 1 && surplus_pace {
            state.surplus_closed_at = Some(now);
            state.retire(id, now, false);
        }
        self.settle(&mut state);
        match state.member(id) {
            Some(member) if !member.usable && member.in_flight == 0 => Care::Close,
            Some(_) if idle >= IDLE_PING => Care::Ping,
            _ => Care::Nothing,
        }
    }

    fn ended(&self, id: u64, why: &End) {
        let now = self.clock.monotonic();
        let mut state = self.state();
        state.retire(id, now, true);
        state.members.retain(|m| m.connection.id != id);
        match why {
            End::Closed(None) | End::Aborted => tracing::info!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                "connection {id} to APNs is closed"
            ),
            End::Closed(Some(error)) => tracing::warn!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                %error,
                "connection {id} to APNs is lost: {error}"
            ),
            End::Silent => tracing::warn!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                "connection {id} to APNs is given up: it did not acknowledge a PING"
            ),
            End::Stuck => tracing::info!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                "connection {id} to APNs is dropped: it did not finish closing"
            ),
        }
        self.settle(&mut state);
        drop(state);
        self.ended.notify_waiters();
    }
}
