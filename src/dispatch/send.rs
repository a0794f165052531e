//! One chunk on its way: from the lease to its last settled outcome.
//!
//! Promises: one path for one device and for a thousand. Nothing is tried whose time has passed; a retry of a push with
//! the caller's collapse id is not made when a newer one has gone to the device; with `on_unknown: stop` a durable
//! mark is made before the write, and what bears a mark after a crash counts as written. A chunk leaves memory only
//! settled, given back, or lost to another owner.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    fence::{AttemptFence, Guard, OWNERSHIP_MAX_AGE, Owned, Verdict, judge, millis},
    settle::{Progress, Settlement, Settler},
};
use crate::{
    apns::{Gateway, Head, Push},
    domain::{
        clock::Timestamp,
        delivery::{Chunk, Circumstances, Conclusion, DeliveryStatus, DeviceEffect, State, Target, conclude},
        device::{Address, DeviceSeq, DeviceToken},
        notification::Notification,
        outcome::{Busy, Fault, Outcome, Reply, own},
        push::{ApnsId, OnUnknown, Recipient},
        topic::Environment,
    },
    store::{BreakerId, Disposition, Lease, ReplicaId, Store, StoreError, intake::Entry},
    telemetry::names,
};

/// What all chunks share.
pub(super) struct Sender {
    pub(super) store: Arc<dyn Store>,
    pub(super) gateway: Arc<dyn Gateway>,
    pub(super) guard: Guard,
    pub(super) settler: Settler,
    pub(super) stopping: CancellationToken,
}

/// A chunk in memory.
pub(super) struct Work {
    pub(super) lease: Lease,
    /// Under which number it was leased.
    pub(super) replica: ReplicaId,
    /// Its place on the roster, until it has left memory.
    pub(super) _entry: Entry,
    /// Its share of the room.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
    /// Sent through an open breaker to see whether it may close: one push only.
    pub(super) probe: Option<Probe>,
}

/// A try through an open breaker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probe {
    /// Which breaker.
    pub(super) breaker: BreakerId,
    /// Where it is open: a push to the other environment proves nothing of it.
    pub(super) environment: Environment,
}

/// A retry sooner than this is waited for in memory; a later one goes back to the database.
const WAIT_IN_MEMORY: Duration = Duration::from_secs(5);

/// How long a chunk is put back when no connection could be had or ownership could not be read.
const PUT_BACK_FOR: Duration = Duration::from_secs(5);

/// How long a chunk is put back when this replica has no credential for its app: another may have one.
const NO_CREDENTIAL_FOR: Duration = Duration::from_secs(30);

/// The shortest time for which a chunk with targets behind a breaker is put back.
const BLOCKED_PAUSE: Duration = Duration::from_secs(1);

/// The most pushes of one chunk in flight.
const IN_FLIGHT: usize = 1_000;

/// Progress of a large chunk is settled at least this often while it is sent.
const SETTLE_EVERY: Duration = Duration::from_millis(25);

/// A device's `last_accepted_at` is right to within this time.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(24 * 3600);

/// How often a push that the connection gave back is tried again at once.
const UNSENT_RETRIES: u32 = 3;

/// Why a target was left open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    /// It has a time of its own for the next try, or can be tried at once.
    Open,
    /// Nothing can be sent right now.
    Later(Duration),
    /// Its breaker is open in this environment.
    Blocked(Environment),
    /// The chunk is no longer ours.
    Lost,
}

/// One attempt's end.
struct Attempted {
    position: usize,
    state: State,
    left: Left,
    effect: Option<(DeviceSeq, DeviceToken, DeviceEffect)>,
    fault: Option<(Environment, Fault)>,
    unique_id: Option<Box<str>>,
    environment: Option<Environment>,
    readdressed: Option<Box<Address>>,
    /// APNs answered, or may have.
    moved: bool,
    /// APNs got as far as looking at the push: it has no quarrel with the credential.
    proves_credential: bool,
}

impl Sender {
    /// Sends a chunk to its end. Never cancelled; ends early, giving the chunk back, when the service stops.
    pub(super) async fn run(&self, mut work: Work) {
        let head = Arc::new(head(&work.lease.notification));
        let mut addresses: HashMap<DeviceSeq, Address> =
            std::mem::take(&mut work.lease.addresses).into_iter().map(|a| (a.seq, a)).collect();
        let mut read_at = work.lease.read_at;
        let mut unsent = 0_u32;
        self.end_marked(&mut work.lease.chunk);
        loop {
            let now = self.guard.clock.now();
            // Nothing is in flight here: those that wait for a later try end as well.
            if self.guard.cancelled.holds(work.lease.key.notification) {
                work.lease.chunk.end_open(DeliveryStatus::Cancelled, &own::CANCELLED, now);
            }
            let due = due(&work.lease.chunk, now);
            let mut left = Left::Open;
            let mut blocked = HashSet::new();
            if !due.is_empty() {
                let old = self.guard.clock.monotonic().saturating_sub(read_at) >= OWNERSHIP_MAX_AGE;
                if old || addresses.is_empty() {
                    let began = self.guard.clock.monotonic();
                    match self.store.addresses(&open_devices(&work.lease.chunk)).await {
                        Ok(read) => {
                            addresses = read.into_iter().map(|a| (a.seq, a)).collect();
                            read_at = began;
                        }
                        Err(error) => {
                            tracing::warn!(
                                error = &error as &dyn std::error::Error,
                                "ownership could not be read: the chunk waits"
                            );
                            left = Left::Later(PUT_BACK_FOR);
                        }
                    }
                }
            }
            if left == Left::Open && !due.is_empty() {
                match self.mark(&mut work, &due).await {
                    Settlement::Done => {}
                    Settlement::Lost | Settlement::GivenUp => return,
                }
                let began = self.guard.clock.monotonic();
                let round = self.round(&mut work, &head, &due, &mut addresses, read_at).await;
                left = round.left;
                blocked = round.blocked;
                unsent = if round.moved { 0 } else { unsent + 1 };
                if round.over {
                    return;
                }
                let waited = self.guard.clock.monotonic().saturating_sub(began);
                if let Left::Open = left
                    && (unsent > UNSENT_RETRIES || unsent > 0 && waited >= PUT_BACK_FOR)
                {
                    // No connection is to be had: let it show that it waits, and others have the room.
                    left = Left::Later(PUT_BACK_FOR);
                }
                work.probe = None;
            }
            let Some(next) = work.lease.chunk.next_try_at(now) else {
                self.settle(&mut work, Disposition::Keep, Learned::default()).await;
                return;
            };
            let now = self.guard.clock.now();
            let stopping = self.stopping.is_cancelled();
            let disposition = match left {
                // If it is still ours after all, what was answered is kept; if not, this changes nothing.
                Left::Lost => Disposition::Free { due_at: next },
                _ if stopping => Disposition::Free { due_at: next },
                Left::Blocked(environment) => self.park(&work.lease, &blocked, environment, now),
                Left::Later(pause) => Disposition::Free { due_at: next.max(now.plus(pause)) },
                Left::Open if next.since(now) > WAIT_IN_MEMORY => Disposition::Free { due_at: next },
                Left::Open => Disposition::Keep,
            };
            let settlement = self.settle(&mut work, disposition, Learned::default()).await;
            if settlement != Settlement::Done || disposition != Disposition::Keep {
                return;
            }
            tokio::select! {
                () = self.guard.clock.sleep(next.since(self.guard.clock.now())) => {}
                () = self.guard.cancelled.reached(work.lease.key.notification) => {}
                () = self.stopping.cancelled() => {}
            }
        }
    }

    /// What bears a durable mark was written, or may have been, before somebody died: never again.
    fn end_marked(&self, chunk: &mut Chunk) {
        for state in chunk.states.iter_mut().filter(|s| s.is_open() && s.marked) {
            state.ambiguous = true;
            state.end(DeliveryStatus::Unknown, Some(own::NO_ANSWER), self.guard.clock.now());
        }
    }

    /// The durable mark before the write, for `on_unknown: stop`.
    async fn mark(&self, work: &mut Work, due: &[usize]) -> Settlement {
        if work.lease.notification.on_unknown != OnUnknown::Stop {
            return Settlement::Done;
        }
        for position in due {
            if let Some(state) = work.lease.chunk.states.get_mut(*position) {
                state.marked = true;
            }
        }
        self.settle(work, Disposition::Keep, Learned::default()).await
    }

    /// Parked only if nothing else of the chunk can go on; otherwise it comes back when that can.
    fn park(&self, lease: &Lease, blocked: &HashSet<usize>, environment: Environment, now: Timestamp) -> Disposition {
        let others =
            lease.chunk.states.iter().enumerate().filter(|(at, state)| state.is_open() && !blocked.contains(at));
        if let Some(next) = others.map(|(_, state)| state.retry_at.unwrap_or(now)).min() {
            return Disposition::Free { due_at: next.max(now.plus(BLOCKED_PAUSE)) };
        }
        match self.guard.board.id(&lease.notification.topic, environment) {
            Some(breaker) => Disposition::Park { breaker, until: lease.notification.deadline() },
            // Closed again, or the database could not be told of it yet.
            None => Disposition::Free { due_at: now.plus(BLOCKED_PAUSE) },
        }
    }

    async fn settle(&self, work: &mut Work, disposition: Disposition, learned: Learned) -> Settlement {
        let chunk = std::mem::take(&mut work.lease.chunk);
        let Learned { effects, unique_ids } = learned;
        let progress =
            Progress { key: work.lease.key, epoch: work.lease.epoch, chunk, disposition, effects, unique_ids };
        let (progress, settlement) = self.settler.settle(progress).await;
        if let Some(progress) = progress {
            work.lease.chunk = progress.chunk;
        }
        if settlement == Settlement::Lost {
            tracing::warn!(
                notification.id = %work.lease.key.notification,
                chunk = work.lease.key.number,
                "another replica has taken over {}: what this one had not settled may be repeated",
                work.lease.key.notification
            );
        }
        settlement
    }

    /// Tries every due target once.
    async fn round(
        &self,
        work: &mut Work,
        head: &Arc<Head>,
        due: &[usize],
        addresses: &mut HashMap<DeviceSeq, Address>,
        read_at: Duration,
    ) -> Round {
        let mut round = Round { left: Left::Open, moved: false, over: false, blocked: HashSet::new() };
        let mut learned = Learned::default();
        let notification = Arc::clone(&work.lease.notification);
        let mut rest = due.iter().copied();
        let mut running = FuturesUnordered::new();
        let mut ended = VecDeque::new();
        let mut settled_at = self.guard.clock.monotonic();
        // A probe is one push; the others wait for what it says.
        let mut room = if work.probe.is_some() { 1 } else { IN_FLIGHT };
        loop {
            while running.len() < room && !self.stopping.is_cancelled() {
                let Some(position) = rest.next() else { break };
                if let Some(attempt) = attempt_at(work, addresses, position, read_at) {
                    running.push(self.attempt(Arc::clone(&notification), Arc::clone(head), attempt));
                }
            }
            let next = match ended.pop_front() {
                Some(attempted) => Some(attempted),
                None => running.next().await,
            };
            let Some(attempted) = next else { break };
            if work.probe.is_some() {
                room = beside(&mut running, &mut ended, self.judge_probe(work, &attempted, &mut round)).await;
            } else if let Some((environment, fault)) = &attempted.fault {
                let trip = self.guard.board.trip(&notification.topic, *environment, fault, false);
                beside(&mut running, &mut ended, trip).await;
                round.block(attempted.position, *environment);
            }
            round.take(&notification, attempted, &mut work.lease.chunk, addresses, &mut learned);
            let now = self.guard.clock.monotonic();
            if !running.is_empty() && now.saturating_sub(settled_at) >= SETTLE_EVERY {
                settled_at = now;
                let settle = self.settle(work, Disposition::Keep, std::mem::take(&mut learned));
                if beside(&mut running, &mut ended, settle).await != Settlement::Done {
                    // What is in flight is still read to its end: a written push is never dropped.
                    while running.next().await.is_some() {}
                    round.over = true;
                    return round;
                }
            }
        }
        drop(running);
        for state in work.lease.chunk.states.iter_mut().filter(|s| s.is_open()) {
            // Nothing is in flight: what was marked and not tried was not written.
            state.marked = false;
        }
        if round.over {
            return round;
        }
        if work.lease.chunk.is_done() {
            // The end and what was learned of devices in one commit.
            self.settle(work, Disposition::Keep, learned).await;
            round.over = true;
        } else if !learned.is_empty() {
            round.over = self.settle(work, Disposition::Keep, learned).await != Settlement::Done;
        }
        round
    }

    /// What a probe's end says of the breaker. Returns how many pushes may be in flight now.
    async fn judge_probe(&self, work: &mut Work, attempted: &Attempted, round: &mut Round) -> usize {
        let topic = &work.lease.notification.topic;
        let Some(probe) = work.probe else { return IN_FLIGHT };
        if let Some((environment, fault)) = &attempted.fault {
            self.guard.board.trip(topic, *environment, fault, true).await;
            round.block(attempted.position, *environment);
            return 0;
        }
        if attempted.environment != Some(probe.environment) {
            // Ended before it was sent, or not one of those that wait for this breaker: the next one.
            return 1;
        }
        if attempted.proves_credential {
            self.guard.board.close(topic, probe.environment, probe.breaker).await;
            work.probe = None;
            return IN_FLIGHT;
        }
        if attempted.moved || attempted.left != Left::Open || attempted.state.is_open() {
            // No answer, or one that proves nothing: the breaker stays, and so does everything behind it.
            round.block(attempted.position, probe.environment);
            return 0;
        }
        1
    }

    async fn attempt(&self, notification: Arc<Notification>, head: Arc<Head>, attempt: Attempt) -> Attempted {
        let Attempt { position, target, state, address, read_at, replica, probe } = attempt;
        // The mark stands in the database until this attempt is settled.
        let mut attempted = Attempted {
            position,
            state: State { marked: false, ..state },
            left: Left::Open,
            effect: None,
            fault: None,
            unique_id: None,
            environment: None,
            readdressed: None,
            moved: false,
            proves_credential: false,
        };
        let now = self.guard.clock.now();
        if self.guard.cancelled.holds(notification.id) {
            attempted.state.end(DeliveryStatus::Cancelled, Some(own::CANCELLED), now);
            return attempted;
        }
        if now >= notification.deadline() {
            attempted.state.end(DeliveryStatus::Expired, Some(own::EXPIRED), now);
            return attempted;
        }
        let device = match &target {
            Target::Token { token, .. } => Recipe::raw(token.clone()),
            Target::Device { generation, .. } => match judge(address.as_ref(), *generation) {
                Ok(address) => Recipe::device(address.clone(), *generation),
                Err((status, cause)) => {
                    attempted.state.end(status, Some(cause), now);
                    return attempted;
                }
            },
        };
        let environments = self.gateway.environments(&notification.topic);
        if environments.is_empty() {
            attempted.left = Left::Later(NO_CREDENTIAL_FOR);
            return attempted;
        }
        let Some(environment) = environment(&notification, &device, &attempted.state, environments) else {
            attempted.state.end(DeliveryStatus::Failed, Some(own::NO_KEY), now);
            return attempted;
        };
        attempted.environment = Some(environment);
        let probe = match probe {
            // Its turn comes once the probe is over.
            Some(probed) if probed != environment => return attempted,
            Some(_) => true,
            None => false,
        };
        if !probe && self.guard.board.is_open(&notification.topic, environment) {
            attempted.left = Left::Blocked(environment);
            return attempted;
        }
        match self.is_superseded(&notification, &device, &attempted.state).await {
            Ok(false) => {}
            Ok(true) => {
                attempted.state.end(DeliveryStatus::Suppressed, Some(own::SUPERSEDED), now);
                return attempted;
            }
            Err(_) => {
                attempted.left = Left::Later(PUT_BACK_FOR);
                return attempted;
            }
        }
        let push = Push {
            head,
            environment,
            token: device.token.clone(),
            apns_id: ApnsId::derive(notification.id, device.recipient()),
        };
        let fence = AttemptFence {
            guard: &self.guard,
            replica,
            notification: notification.id,
            topic: &notification.topic,
            environment,
            token: &device.token,
            deadline: notification.deadline(),
            probe,
            owned: device.address.as_ref().map(|address| Owned {
                seq: address.seq,
                generation: device.generation,
                read_at: AtomicU64::new(millis(read_at)),
            }),
            verdict: Mutex::new(None),
        };
        let reply = self.gateway.send(&push, &fence).await;
        let verdict = fence.verdict.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.conclude(&notification, &device, environment, environments, reply, verdict, &mut attempted);
        attempted
    }

    #[expect(clippy::too_many_arguments, reason = "the facts of one attempt, used here only")]
    fn conclude(
        &self,
        notification: &Notification,
        device: &Recipe,
        environment: Environment,
        environments: &[Environment],
        reply: Reply,
        verdict: Option<Verdict>,
        attempted: &mut Attempted,
    ) {
        let now = self.guard.clock.now();
        attempted.moved = reply.answer.is_some() || reply.outcome == Outcome::Unknown;
        attempted.proves_credential = proves_credential(&reply.outcome);
        if let (Some(sent_at), Some(answer)) = (reply.sent_at, &reply.answer) {
            names::apns_answered(environment.as_str(), answer.status, now.since(sent_at).as_secs_f64());
        }
        if reply.outcome == Outcome::Fenced {
            match verdict {
                Some(Verdict::End(status, cause)) => attempted.state.end(status, Some(cause), now),
                Some(Verdict::Readdressed(address)) => attempted.readdressed = Some(address),
                Some(Verdict::Breaker) => attempted.left = Left::Blocked(environment),
                Some(Verdict::NotOurs) => attempted.left = Left::Lost,
                Some(Verdict::Unread) | None => attempted.left = Left::Later(PUT_BACK_FOR),
            }
            return;
        }
        let Conclusion { state, effect, fault } = conclude(
            &attempted.state,
            &reply,
            Circumstances {
                now,
                deadline: notification.deadline(),
                on_unknown: notification.on_unknown,
                named_environment: notification.environment,
                environments,
                environment,
                ever_accepted: device.address.as_ref().is_some_and(|a| a.last_accepted_at.is_some()),
                jitter: rand::random(),
            },
        );
        tracing::debug!(
            notification.id = %notification.id,
            token = device.token.fingerprint(),
            environment = environment.as_str(),
            apns.status = reply.answer.as_ref().map(|a| a.status),
            apns.reason = reply.answer.as_ref().and_then(|a| a.reason.as_ref()).map(tracing::field::display),
            attempts = state.attempts,
            outcome = state.status.as_str(),
            "one attempt: {}",
            state.status
        );
        attempted.effect = effect
            .zip(device.address.as_ref())
            .filter(|(effect, address)| is_news(effect, address, now))
            .map(|(effect, address)| (address.seq, device.token.clone(), effect));
        attempted.fault = fault.map(|fault| (environment, fault));
        attempted.unique_id = reply.answer.and_then(|a| a.apns_unique_id);
        attempted.state = state;
    }

    /// Only a repeat can come too late: the first tries of two notifications leave in their order.
    async fn is_superseded(
        &self,
        notification: &Notification,
        device: &Recipe,
        state: &State,
    ) -> Result<bool, StoreError> {
        match (&notification.collapse_id, &device.address) {
            (Some(collapse_id), Some(address)) if state.attempts > 0 => {
                self.store.superseded(address.seq, &notification.topic, collapse_id, notification.id).await
            }
            _ => Ok(false),
        }
    }
}

/// How a round went.
struct Round {
    left: Left,
    /// Something came of it: an answer, an end, a new address.
    moved: bool,
    /// The chunk has ended or is no longer ours: nothing more to do.
    over: bool,
    /// Targets behind an open breaker.
    blocked: HashSet<usize>,
}

/// What is to be settled beside the states.
#[derive(Default)]
struct Learned {
    effects: Vec<(DeviceSeq, DeviceToken, DeviceEffect)>,
    unique_ids: Vec<(u32, Box<str>)>,
}

impl Learned {
    fn is_empty(&self) -> bool {
        self.effects.is_empty() && self.unique_ids.is_empty()
    }
}

/// Waits for `other` while what is in flight goes on: a future that is not polled may hold what `other` needs.
async fn beside<F, T>(
    running: &mut FuturesUnordered<F>,
    ended: &mut VecDeque<Attempted>,
    other: impl Future<Output = T>,
) -> T
where
    F: Future<Output = Attempted>,
{
    tokio::pin!(other);
    loop {
        tokio::select! {
            biased;
            done = &mut other => return done,
            Some(attempted) = running.next(), if !running.is_empty() => ended.push_back(attempted),
        }
    }
}

impl Round {
    /// A target waits for its breaker.
    fn block(&mut self, position: usize, environment: Environment) {
        self.blocked.insert(position);
        self.left = self.left.max(Left::Blocked(environment));
    }

    /// Enters the end of one attempt.
    fn take(
        &mut self,
        notification: &Notification,
        attempted: Attempted,
        chunk: &mut Chunk,
        addresses: &mut HashMap<DeviceSeq, Address>,
        learned: &mut Learned,
    ) {
        self.moved |= attempted.moved || !attempted.state.is_open() || attempted.readdressed.is_some();
        match attempted.left {
            Left::Blocked(environment) => self.block(attempted.position, environment),
            left => self.left = self.left.max(left),
        }
        if !attempted.state.is_open() {
            let reason = attempted.state.cause.as_ref().map_or("", |c| &c.reason);
            names::delivery_ended(
                notification.topic.as_str(),
                attempted.environment.map_or("", Environment::as_str),
                attempted.state.status.as_str(),
                reason,
            );
        }
        if let Some(state) = chunk.states.get_mut(attempted.position) {
            *state = attempted.state;
        }
        if let Some(address) = attempted.readdressed {
            addresses.insert(address.seq, *address);
        }
        learned.effects.extend(attempted.effect);
        if let Some(unique_id) = attempted.unique_id
            && let Ok(position) = u32::try_from(attempted.position)
        {
            learned.unique_ids.push((position, unique_id));
        }
    }
}

fn attempt_at(
    work: &Work,
    addresses: &HashMap<DeviceSeq, Address>,
    position: usize,
    read_at: Duration,
) -> Option<Attempt> {
    let target = work.lease.chunk.targets.get(position)?.clone();
    let state = work.lease.chunk.states.get(position)?.clone();
    let address = match &target {
        Target::Device { seq, .. } => addresses.get(seq).cloned(),
        Target::Token { .. } => None,
    };
    let (replica, probe) = (work.replica, work.probe.map(|probe| probe.environment));
    Some(Attempt { position, target, state, address, read_at, replica, probe })
}

struct Attempt {
    position: usize,
    target: Target,
    state: State,
    address: Option<Address>,
    read_at: Duration,
    replica: ReplicaId,
    /// Where a breaker is to be passed.
    probe: Option<Environment>,
}

/// Where one push goes.
struct Recipe {
    token: DeviceToken,
    address: Option<Address>,
    generation: Option<crate::domain::device::Generation>,
}

impl Recipe {
    fn raw(token: DeviceToken) -> Self {
        Self { token, address: None, generation: None }
    }

    fn device(address: Address, generation: Option<crate::domain::device::Generation>) -> Self {
        Self { token: address.token.clone(), address: Some(address), generation }
    }

    fn recipient(&self) -> Recipient<'_> {
        self.address.as_ref().map_or(Recipient::Token(&self.token), |a| Recipient::Device(a.id))
    }
}

/// Where to send: as the caller named it, as is known of the device, else production first; where this delivery was
/// refused as a bad token, the other one. `None`: the app has no key for it.
fn environment(
    notification: &Notification,
    device: &Recipe,
    state: &State,
    environments: &[Environment],
) -> Option<Environment> {
    let wanted = notification.environment.or_else(|| device.address.as_ref().and_then(|a| a.environment));
    match wanted {
        Some(wanted) if state.refused_in(wanted) => Some(wanted.other()),
        Some(wanted) => Some(wanted),
        None => environments.iter().copied().find(|e| !state.refused_in(*e)),
    }
    .filter(|e| environments.contains(e))
}

/// Whether APNs looked at the push itself: it authenticates first. A server's trouble proves nothing.
fn proves_credential(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Accepted
        | Outcome::Rejected
        | Outcome::BadToken
        | Outcome::WrongTopic
        | Outcome::Gone { .. }
        | Outcome::Deferred { whose: Busy::Device, .. } => true,
        Outcome::Deferred { whose: Busy::Server, .. }
        | Outcome::Withheld(_)
        | Outcome::Unsent
        | Outcome::Unknown
        | Outcome::Fenced => false,
    }
}

/// Whether the device's row does not say it yet: a second broadcast on a day writes no device.
fn is_news(effect: &DeviceEffect, address: &Address, now: Timestamp) -> bool {
    match effect {
        DeviceEffect::Accepted(environment) => {
            address.environment != Some(*environment)
                || address.last_accepted_at.is_none_or(|at| now.since(at) >= ACCEPTED_WITHIN)
        }
        DeviceEffect::Dead { .. } | DeviceEffect::Bad | DeviceEffect::Suspend => true,
    }
}

fn head(notification: &Notification) -> Head {
    Head {
        topic: notification.topic.clone(),
        push_type: notification.push_type,
        priority: notification.priority,
        expiration: notification.expiration,
        collapse_id: notification.apns_collapse_id(),
        payload: notification.payload.bytes().clone(),
        lane: notification.lane,
        deadline: notification.deadline(),
    }
}

fn due(chunk: &Chunk, now: Timestamp) -> Vec<usize> {
    chunk
        .states
        .iter()
        .enumerate()
        .filter(|(_, s)| s.is_open() && s.retry_at.is_none_or(|at| at <= now))
        .map(|(position, _)| position)
        .collect()
}

/// All that are open, not only those that are due: a later round may use the same read.
fn open_devices(chunk: &Chunk) -> Vec<DeviceSeq> {
    let open = chunk.targets.iter().zip(&chunk.states).filter(|(_, state)| state.is_open());
    open.filter_map(|(target, _)| match target {
        Target::Device { seq, .. } => Some(*seq),
        Target::Token { .. } => None,
    })
    .collect()
}
