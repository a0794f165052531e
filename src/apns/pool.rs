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
//! - What APNs did certainly nothing with goes elsewhere at once, if there is an elsewhere: a few times, past its fence
//!   anew, and within the request deadline of the first try.
//! - A connection that is in use and has reached its age or its number of requests serves until its successor does.
//! - Nobody waits past the deadline of the push, nor longer than [`PATIENCE`].
//!
//! Locks: one mutex for the choice, held for a few instructions, never across an await.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustls::ClientConfig;
use tokio::{
    runtime::Handle,
    sync::{Notify, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Fence, Push,
    connection::{self, Address, Care, Connection, End, Ended, Gate, Note, Opened, Owner, Slot},
    drive::{self, Duty},
    response::Verdict,
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

/// How often a push that APNs did nothing with is sent again at once.
const RESENDS: usize = 3;

/// A connection that was well is kept through fewer such answers in a row, if it was well within this time.
const ILL_AFTER: u32 = 3;
const WELL_FOR: Duration = Duration::from_secs(10);

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

/// What a pool is for and how it behaves.
pub(super) struct Spec {
    pub(super) environment: Environment,
    pub(super) address: Address,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) request_deadline: Duration,
    /// Of all processes together.
    pub(super) max_connections: usize,
    /// A connection is replaced after so many.
    pub(super) max_requests: u64,
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
    /// For those who outlive a call: connections and tasks.
    this: Weak<Self>,
    spec: Spec,
    /// Of the connections there may be, this process's.
    part: AtomicUsize,
    minter: Arc<Minter>,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    /// Where connections live, whoever asks for one first.
    runtime: Handle,
    /// Ends attempts to connect.
    stop: CancellationToken,
    /// Ends connections.
    abort: CancellationToken,
    stopped: AtomicBool,
    /// A connection ended.
    ended: Notify,
    /// Somebody waits who will give up sooner than everybody before.
    sooner: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    members: Vec<Member>,
    /// The urgent lane, and the other.
    waiting: [VecDeque<Waiter>; 2],
    /// The length of the queues after those who had left were last swept out.
    swept: usize,
    /// When the next of them is told that there is no stream for it; `None`: nobody looks.
    next_given_up: Option<Duration>,
    next_id: u64,
    connecting: bool,
    /// Failures and unproved connections in a row.
    strikes: u32,
    not_before: Duration,
    opens: VecDeque<Duration>,
    connect_error: Option<String>,
    surplus_closed_at: Option<Duration>,
    clock_skew_seconds: Option<i64>,
}

/// Somebody who waits for a stream.
struct Waiter {
    grant: oneshot::Sender<Slot>,
    until: Duration,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts about a connection, each asked for by name")]
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
    /// Is to be retired once its successor can be used.
    expiring: bool,
    /// Since when it waits for a PING before it is used again.
    checking: Option<Duration>,
    /// Its end has been counted as a failure, or need not be.
    judged: bool,
    opened_at: Duration,
    /// When a request was last begun or answered, or a PING acknowledged.
    active_at: Duration,
    answered_at: Duration,
    /// When an answer last showed that it is well.
    well_at: Option<Duration>,
    /// Answers since then that only an ill connection gives.
    ill: u32,
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
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            part: AtomicUsize::new(spec.max_connections),
            spec,
            minter: Arc::new(minter),
            clock,
            tracker,
            runtime: Handle::current(),
            stop: abort.child_token(),
            abort,
            stopped: AtomicBool::new(false),
            ended: Notify::new(),
            sooner: Notify::new(),
            state: Mutex::default(),
        })
    }

    /// Sends one push in the caller's task.
    pub(super) async fn send(&self, push: &Push, fence: &dyn Fence) -> Reply {
        let deadline = push.head.deadline;
        let mut gate = Gate { fence, clock: &*self.clock, deadline, answer_by: None, stopped: &self.stopped };
        let mut shunned = None;
        for _ in 0..=RESENDS {
            let Some(slot) = self.acquire(push.head.lane, deadline, gate.answer_by, shunned).await else {
                return UNSENT;
            };
            shunned = Some(slot.connection());
            match connection::exchange(slot, push, &gate).await {
                Ended::Answered(reply) => return reply,
                Ended::Unknown { sent_at } => {
                    return Reply { outcome: Outcome::Unknown, answer: None, sent_at: Some(sent_at) };
                }
                Ended::Fenced => return Reply { outcome: Outcome::Fenced, answer: None, sent_at: None },
                Ended::Unsent => return UNSENT,
                Ended::GivenBack { answer_by } => gate.answer_by = answer_by,
            }
        }
        UNSENT
    }

    /// Waits for a stream; `None` if there is none in time, or the pool was stopped. Not of the connection `shunned` if
    /// another has one right now.
    async fn acquire(
        &self,
        lane: Lane,
        deadline: Timestamp,
        answer_by: Option<Duration>,
        shunned: Option<u64>,
    ) -> Option<Slot> {
        let granted = {
            let mut state = self.state();
            if self.stopped.load(Ordering::Acquire) {
                return None;
            }
            if !state.somebody_is_before(lane)
                && let Some(connection) = state.take_room(&*self.clock, shunned)
            {
                return Some(Slot::new(connection));
            }
            let patience = deadline.since(self.clock.now()).min(PATIENCE);
            let until = (self.clock.monotonic() + patience).min(answer_by.unwrap_or(Duration::MAX));
            let (grant, granted) = oneshot::channel();
            state.enqueue(lane, Waiter { grant, until });
            self.watch(&mut state, until);
            self.settle(&mut state);
            granted
        };
        granted.await.ok()
    }

    /// Sees to it that whoever waits in vain is told so.
    fn watch(&self, state: &mut State, until: Duration) {
        match state.next_given_up {
            Some(next) if next <= until => {}
            Some(_) => self.sooner.notify_one(),
            None => {
                state.next_given_up = Some(until);
                if let Some(this) = self.this.upgrade() {
                    self.tracker.spawn_on(this.give_up(), &self.runtime);
                }
            }
        }
    }

    /// Tells those who have waited long enough, until nobody waits.
    async fn give_up(self: Arc<Self>) {
        loop {
            let pause = {
                let mut state = self.state();
                let now = self.clock.monotonic();
                for queue in &mut state.waiting {
                    queue.retain(|waiter| waiter.until > now && !waiter.grant.is_closed());
                }
                state.next_given_up = state.waiting.iter().flatten().map(|waiter| waiter.until).min();
                match state.next_given_up {
                    Some(next) => next.saturating_sub(now),
                    None => return,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.sooner.notified() => {}
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    /// Hands free streams to those who wait, and sees to a connection if streams are missing. Called after every
    /// change.
    fn settle(&self, state: &mut State) {
        loop {
            state.skip_those_who_left();
            let Some(queue) = state.waiting.iter().position(|q| !q.is_empty()) else {
                return;
            };
            let Some(connection) = state.take_room(&*self.clock, None) else {
                break;
            };
            let id = connection.id;
            let waiter = state.waiting.get_mut(queue).and_then(VecDeque::pop_front);
            if let Some(unwanted) = waiter.and_then(|w| w.grant.send(Slot::new(connection)).err()) {
                // Not by its drop, which would want the lock that is held here.
                unwanted.spend();
                if let Some(member) = state.member(id) {
                    member.in_flight = member.in_flight.saturating_sub(1);
                }
            }
        }
        self.connect_if_needed(state);
    }

    fn connect_if_needed(&self, state: &mut State) {
        if state.connecting || self.stopped.load(Ordering::Acquire) {
            return;
        }
        let now = self.clock.monotonic();
        let mut counted = 0;
        for member in state.members.iter().filter(|m| m.usable && !m.expiring) {
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
        if counted < self.part.load(Ordering::Relaxed) {
            self.connect_soon(state);
        }
    }

    /// Sees to a successor of what is expiring, whether or not somebody waits.
    fn replace_if_needed(&self, state: &mut State) {
        let successor = state.members.iter().any(|m| m.usable && !m.greeted);
        if state.is_expiring() && !successor && !state.connecting && !self.stopped.load(Ordering::Acquire) {
            self.connect_soon(state);
        }
    }

    fn connect_soon(&self, state: &mut State) {
        if state.members.len() < 2 * self.spec.max_connections
            && let Some(this) = self.this.upgrade()
        {
            state.connecting = true;
            self.tracker.spawn_on(this.connect(), &self.runtime);
        }
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
            let wanted = state.waiting.iter().any(|queue| !queue.is_empty()) || state.is_expiring();
            if self.stopped.load(Ordering::Acquire) || !wanted {
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
        let owner: Weak<dyn Owner> = Weak::<Self>::clone(&self.this);
        let connection = Arc::new(Connection::new(id, owner, Arc::clone(&self.minter)));
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
            expiring: false,
            checking: None,
            judged: false,
            opened_at: now,
            active_at: now,
            answered_at: now,
            well_at: None,
            ill: 0,
            max_age: (MAX_AGE + jitter).saturating_sub(AGE_JITTER),
        });
        tracing::info!(
            apns.environment = %self.spec.environment,
            server.address = %self.spec.address.authority,
            connection.id = id,
            "connection {id} to APNs is open"
        );
        let duty = Duty {
            connection,
            authority: self.spec.address.authority.clone(),
            request_deadline: self.spec.request_deadline,
            clock: Arc::clone(&self.clock),
            abort: self.abort.clone(),
        };
        let owner: Arc<dyn Owner> = Arc::<Self>::clone(self);
        self.tracker.spawn_on(drive::drive(duty, opened, owner), &self.runtime);
    }

    /// What became of one stream.
    fn note(&self, state: &mut State, id: u64, note: Note, now: Duration) {
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
                    Verdict::RetireIfIll => {
                        member.ill += 1;
                        let well = member.well_at.is_some_and(|at| now.saturating_sub(at) < WELL_FOR);
                        if !well || member.ill >= ILL_AFTER {
                            state.retire(id, now, true);
                        }
                    }
                    Verdict::Keep | Verdict::RetireIfOld => {
                        member.ill = 0;
                        member.well_at = Some(now);
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
    }

    /// The connections there may be are shared with other processes. Those beyond our part, the youngest, take nothing new.
    pub(super) fn share_out(&self, place: usize, of: usize) {
        let (all, of) = (self.spec.max_connections, of.max(1));
        let part = (all / of + usize::from(place < all % of)).max(1);
        if self.part.swap(part, Ordering::Relaxed) == part {
            return;
        }
        let mut state = self.state();
        let now = self.clock.monotonic();
        let kept = state.members.iter().filter(|m| m.usable && !m.expiring);
        let beyond: Vec<u64> = kept.skip(part).map(|m| m.connection.id).collect();
        for id in beyond {
            state.retire(id, now, false);
            state.close_if_done(id);
        }
        self.settle(&mut state);
    }

    pub(super) fn report(&self) -> Report {
        let state = self.state();
        let now = self.clock.now();
        let kept = state.members.iter().filter(|m| m.usable).filter_map(|m| m.connection.token_age(&*self.clock)).max();
        Report {
            connections: state.members.len(),
            in_flight: state.members.iter().map(|m| m.in_flight).sum(),
            waiting: state.waiting.iter().flatten().filter(|w| !w.grant.is_closed()).count(),
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

    fn is_expiring(&self) -> bool {
        self.members.iter().any(|m| m.usable && m.expiring)
    }

    fn somebody_is_before(&self, lane: Lane) -> bool {
        self.waiting.iter().take(queue_of(lane) + 1).any(|q| !q.is_empty())
    }

    /// Takes a stream of the usable connection that has the fewest requests in flight, of the one `shunned` only if no
    /// other has any.
    fn take_room(&mut self, clock: &dyn Clock, shunned: Option<u64>) -> Option<Arc<Connection>> {
        loop {
            let with_room = self.members.iter_mut().filter(|m| m.room() > 0);
            let member = with_room.min_by_key(|m| (shunned == Some(m.connection.id), m.in_flight))?;
            // Where something is in flight, the time of the last activity is not asked for.
            if member.in_flight == 0 {
                let now = clock.monotonic();
                if member.requests > 0 && now.saturating_sub(member.active_at) > REUSE_PING {
                    member.checking = Some(now);
                    member.connection.ping();
                    continue;
                }
                member.active_at = now;
            }
            member.in_flight += 1;
            member.requests += 1;
            return Some(Arc::clone(&member.connection));
        }
    }

    fn enqueue(&mut self, lane: Lane, waiter: Waiter) {
        if let Some(queue) = self.waiting.get_mut(queue_of(lane)) {
            queue.push_back(waiter);
        }
        // Those who gave up are swept out now and then, so that the queues are at most twice as long as they need be.
        let length: usize = self.waiting.iter().map(VecDeque::len).sum();
        if length > 2 * self.swept + 64 {
            for queue in &mut self.waiting {
                queue.retain(|w| !w.grant.is_closed());
            }
            self.swept = self.waiting.iter().map(VecDeque::len).sum();
        }
    }

    fn skip_those_who_left(&mut self) {
        for queue in &mut self.waiting {
            while queue.front().is_some_and(|waiter| waiter.grant.is_closed()) {
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

impl Owner for Pool {
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
            let is_new = !std::mem::replace(&mut member.greeted, true);
            member.limit = streams;
            if is_new && let Some(old) = state.members.iter().find(|m| m.usable && m.expiring) {
                let old = old.connection.id;
                state.retire(old, self.clock.monotonic(), false);
                state.close_if_done(old);
            }
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

    fn released(&self, id: u64, notes: &[Note]) {
        let now = self.clock.monotonic();
        let mut state = self.state();
        for note in notes {
            self.note(&mut state, id, *note, now);
        }
        state.close_if_done(id);
        self.settle(&mut state);
    }

    fn skew_measured(&self, seconds: i64) {
        self.state().clock_skew_seconds = Some(seconds);
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
        let is_used = member.in_flight > 0 || idle < REUSE_PING;
        if member.usable && !member.greeted && age >= GREETING_PATIENCE {
            state.retire(id, now, true);
        } else if member.usable && (age >= member.max_age || member.requests >= self.spec.max_requests) {
            if !is_used {
                state.retire(id, now, false);
            } else if !std::mem::replace(&mut member.expiring, true) {
                tracing::info!(
                    apns.environment = %self.spec.environment,
                    connection.id = id,
                    requests = member.requests,
                    "connection {id} is replaced: it has served long enough"
                );
            }
        } else if member.usable && member.in_flight == 0 && traffic >= SURPLUS_IDLE && usable > 1 && surplus_pace {
            state.surplus_closed_at = Some(now);
            state.retire(id, now, false);
        }
        self.replace_if_needed(&mut state);
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
            End::Broken(error) => tracing::warn!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                %error,
                "connection {id} to APNs is lost: {error}"
            ),
            End::Silent => tracing::warn!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                "connection {id} to APNs is given up: it did not acknowledge a PING, or took nothing for as long"
            ),
            End::Stopped => tracing::warn!(
                apns.environment = %self.spec.environment,
                connection.id = id,
                "connection {id} to APNs is given up: this process stood still while it wrote"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_after_a_failure_doubles_to_a_minute_and_is_never_quite_the_same() {
        let pauses = || -> Vec<Duration> {
            let mut state = State::default();
            let now = Duration::from_secs(100);
            let mut pause = || {
                state.strike(now);
                state.not_before.saturating_sub(now)
            };
            (0..10).map(|_| pause()).collect()
        };
        let [one, two] = [pauses(), pauses()];
        for (seconds, pause) in [1, 2, 4, 8, 16, 32, 60, 60, 60, 60].into_iter().zip(&one) {
            let full = Duration::from_secs(seconds);
            assert!(*pause <= full && *pause >= full.mul_f64(0.75), "{pause:?} of {full:?}");
        }
        assert_ne!(one, two, "two processes that fail together do not come back together");
    }
}
