//! One chunk on its way: from the lease to its last settled outcome.
//!
//! Promises: one path for one device and for a thousand. Nothing is tried whose time has passed; a retry of a push with
//! the caller's collapse id is not made when a newer one has gone to the device; with `on_unknown: stop` a durable
//! mark is made before the write, and what bears a mark after a crash counts as written. A token that is refused for
//! good is concluded once that is judged (`wave.rs`), while the others of its chunk go on. A chunk leaves memory only
//! settled, given back, or lost to another owner.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, OptionFuture},
    stream::FuturesUnordered,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    Weight,
    backoff::BusyDevices,
    fence::{AttemptFence, Guard, OWNERSHIP_MAX_AGE, Owned, Verdict, judge, millis},
    pace::Pace,
    settle::{Progress, Settlement, Settler},
    slots::{self, Share, Slots},
    wave::{Opinion, Refused},
    yielding::Traffic,
};
use crate::{
    apns::{Gateway, Head, Push},
    domain::{
        clock::Timestamp,
        delivery::{
            Chunk, Circumstances, Conclusion, DeliveryStatus, DeviceEffect, Judgement, SMALL_CHUNK, State, Target,
            conclude, postpone,
        },
        device::{Address, Addresses, DeviceSeq, DeviceToken},
        notification::{Lane, Notification},
        outcome::{Busy, Fault, Outcome, Reply, own},
        push::{ApnsId, OnUnknown, Recipient},
        topic::Environment,
    },
    store::{Breaker, BreakerId, Disposition, Lease, ReplicaId, Store, StoreError, intake},
    telemetry::names,
};

/// What all chunks share.
pub(super) struct Sender {
    pub(super) store: Arc<dyn Store>,
    pub(super) gateway: Arc<dyn Gateway>,
    pub(super) guard: Guard,
    pub(super) settler: Settler,
    pub(super) busy: BusyDevices,
    pub(super) slots: Slots,
    pub(super) traffic: Traffic,
    pub(super) pace: Pace,
    pub(super) stopping: CancellationToken,
}

/// A chunk in memory.
pub(super) struct Work {
    pub(super) lease: Lease,
    /// Under which number it was leased.
    pub(super) replica: ReplicaId,
    /// Its place on the roster, until it has left memory.
    pub(super) _entry: intake::Entry,
    /// Its share of the room, if it was handed over.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
    /// Its share of the room, if it was claimed.
    pub(super) weight: Option<Weight>,
    /// Sent through an open breaker to see whether it may close: one push only.
    pub(super) probe: Option<Probe>,
}

impl Work {
    /// Gives back all of its room but so much.
    fn shrink(&mut self, targets: usize) {
        if let Some(weight) = &mut self.weight {
            weight.shrink(targets);
        }
    }
}

/// Whether targets may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// Those that are left.
    Open,
    /// The notification was cancelled first.
    Cancelled,
    /// The chunk is no longer ours.
    Over,
}

/// A try through an open breaker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probe {
    /// Which breaker.
    pub(super) breaker: BreakerId,
    /// Where it is open: a push to the other environment proves nothing of it.
    pub(super) environment: Environment,
    /// Open because tokens are refused: that the credential is accepted proves nothing then.
    pub(super) wave: bool,
    /// How many pushes were looked for or taken for it before, and none could be written.
    pub(super) unspent: u32,
    /// When the next one is due, by whoever is elected for it then.
    pub(super) until: Timestamp,
}

impl Probe {
    pub(super) const fn new(breaker: &Breaker, until: Timestamp) -> Self {
        Self { breaker: breaker.id, environment: breaker.environment, wave: breaker.fault.is_wave(), unspent: 0, until }
    }

    /// Whether this answer shows that the breaker may close.
    fn proves(self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Accepted | Outcome::Gone { .. } | Outcome::Deferred { whose: Busy::Device, .. } => true,
            // APNs authenticates first: it has looked at the push itself.
            Outcome::Rejected | Outcome::BadToken | Outcome::WrongTopic => !self.wave,
            Outcome::Deferred { whose: Busy::Server, .. }
            | Outcome::Withheld(_)
            | Outcome::Unsent
            | Outcome::Unknown
            | Outcome::Fenced => false,
        }
    }
}

/// A retry sooner than this is waited for in memory; a later one goes back to the database.
const WAIT_IN_MEMORY: Duration = Duration::from_secs(5);

/// How long a chunk is put back when no connection could be had or ownership could not be read.
const PUT_BACK_FOR: Duration = Duration::from_secs(5);

/// How long a chunk is put back when this replica has no credential for its app: another may have one.
const NO_CREDENTIAL_FOR: Duration = Duration::from_secs(30);

/// The shortest time for which a chunk with targets behind a breaker is put back.
const BLOCKED_PAUSE: Duration = Duration::from_secs(1);

/// Progress of a large chunk is settled at least this often while it is sent.
const SETTLE_EVERY: Duration = Duration::from_millis(25);

/// A chunk that leaves the way free for urgent pushes looks at least this often whether it still has to.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A device's `last_accepted_at` is right to within this time.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(24 * 3600);

/// How often a push that the connection gave back is tried again at once.
const UNSENT_RETRIES: u32 = 3;

/// The most room that a chunk takes of which only stragglers are under way: others go on meanwhile.
const STRAGGLING_WEIGHT: usize = 64;

/// The least room that a chunk takes: of one that only waits for a judgement, the outcomes are still in memory.
const LEAST_WEIGHT: usize = 25;

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
    readdressed: Option<Arc<Address>>,
    went: Went,
    /// How long APNs took to answer.
    took: Option<Duration>,
    /// A probe's answer: the breaker may close.
    proves: bool,
    /// The token was refused before, in this delivery, and that came to no judgement.
    in_doubt: bool,
    /// To be judged before anything follows from it.
    hearing: Option<Box<Hearing>>,
}

impl Attempted {
    /// Before anything has come of it.
    fn at(position: usize, state: State) -> Self {
        Self {
            position,
            in_doubt: state.is_in_doubt(),
            state,
            left: Left::Open,
            effect: None,
            fault: None,
            unique_id: None,
            environment: None,
            readdressed: None,
            went: Went::No,
            took: None,
            proves: false,
            hearing: None,
        }
    }

    /// Enters a conclusion.
    fn learn(&mut self, notification: &Notification, facts: &Facts, conclusion: Conclusion, now: Timestamp) {
        let Conclusion { state, effect, fault, .. } = conclusion;
        let (answer, token) = (&facts.reply.answer, &facts.device.token);
        tracing::debug!(
            notification.id = %notification.id,
            token = token.fingerprint(),
            environment = facts.environment.as_str(),
            apns.status = answer.as_ref().map(|a| a.status),
            apns.reason = answer.as_ref().and_then(|a| a.reason.as_ref()).map(tracing::field::display),
            attempts = state.attempts,
            outcome = state.status.as_str(),
            "one attempt: {}",
            state.status
        );
        self.effect = effect
            .zip(facts.device.address.as_ref())
            .filter(|(effect, address)| is_news(effect, address, now))
            .map(|(effect, address)| (address.seq, token.clone(), marked(effect, address)));
        self.fault = fault.map(|fault| (facts.environment, fault));
        self.unique_id = answer.as_ref().and_then(|a| a.apns_unique_id.clone());
        self.state = state;
    }
}

/// How far an attempt got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Went {
    /// Not to the connection: it ended first, or something held it back.
    No,
    /// No connection took it.
    Back,
    /// It was written: APNs has answered it, or may have.
    Out,
}

/// What the conclusion of an attempt needs to know of it.
struct Facts {
    device: Recipe,
    environment: Environment,
    /// Where the delivery stood before.
    before: State,
    reply: Reply,
}

/// A token that APNs refused for good, and what is thought of that where it was refused.
struct Hearing {
    facts: Facts,
    fault: Fault,
    opinions: Vec<(Environment, Opinion)>,
}

impl Sender {
    /// Sends a chunk to its end. Never cancelled; ends early, giving the chunk back, when the service stops. The probe
    /// that it was to make comes back if there was nothing to be sent for it: another push may do.
    pub(super) async fn run(&self, work: &mut Work) -> Option<Probe> {
        let probe = work.probe;
        let mut spent = false;
        self.send(work, &mut spent).await;
        probe.filter(|_| !spent)
    }

    async fn send(&self, work: &mut Work, spent: &mut bool) {
        if work.lease.notification.lane == Lane::Transactional {
            self.traffic.urgent(self.guard.clock.monotonic());
        }
        let head = Arc::new(head(&work.lease.notification));
        let mut addresses = std::mem::take(&mut work.lease.addresses);
        let mut read_at = work.lease.read_at;
        let mut unsent = 0_u32;
        self.end_marked(work);
        loop {
            let now = self.guard.clock.now();
            // Nothing is in flight here: those that wait for a later try end as well.
            if self.guard.cancelled.holds(work.lease.key.notification) {
                work.lease.chunk.end_open(DeliveryStatus::Cancelled, &own::CANCELLED, now);
            }
            let mut due = due(&work.lease.chunk, now);
            let mut left = Left::Open;
            let mut blocked = HashSet::new();
            let mut share = Share::default();
            if !due.is_empty() {
                match self.let_in(work, &mut due, &mut share).await {
                    Entry::Open => {}
                    Entry::Cancelled => continue,
                    Entry::Over => return,
                }
                let old = self.guard.clock.monotonic().saturating_sub(read_at) >= OWNERSHIP_MAX_AGE;
                if old || addresses.is_empty() {
                    let began = self.guard.clock.monotonic();
                    match self.store.addresses(&open_devices(&work.lease.chunk)).await {
                        Ok(read) => {
                            addresses = read.into_iter().collect();
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
                let is_stop = work.lease.notification.on_unknown == OnUnknown::Stop;
                if is_stop && self.mark(work, &due).await != Settlement::Done {
                    return;
                }
                let began = self.guard.clock.monotonic();
                let round = self.round(work, &head, &due, &mut addresses, read_at, &mut share).await;
                *spent |= round.spent;
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
            unmark(&mut work.lease.chunk);
            let Some(next) = work.lease.chunk.next_try_at(now) else {
                self.settle(work, Disposition::Keep, Learned::default()).await;
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
            let settlement = self.settle(work, disposition, Learned::default()).await;
            if settlement != Settlement::Done || disposition != Disposition::Keep {
                return;
            }
            // Nothing is on its way that is not settled.
            drop(share);
            tokio::select! {
                () = self.guard.clock.sleep(next.since(self.guard.clock.now())) => {}
                () = self.guard.cancelled.reached(work.lease.key.notification) => {}
                () = self.stopping.cancelled() => {}
            }
        }
    }

    /// Waits until some of the due targets may be sent, which are left in `due`. What is in doubt if this process dies bears
    /// its mark by then, but for what is never to be written twice: that gets it right before the write, because it ends
    /// as `unknown` then.
    async fn let_in(&self, work: &mut Work, due: &mut Vec<usize>, share: &mut Share) -> Entry {
        let targets = work.lease.chunk.targets.len();
        if work.lease.notification.on_unknown != OnUnknown::Stop {
            tokio::select! {
                prepared = self.slots.prepare(&work.lease.notification, targets, due.len()) => *share = prepared,
                () = self.guard.cancelled.reached(work.lease.key.notification) => return Entry::Cancelled,
                () = self.stopping.cancelled() => {}
            }
            if self.mark(work, due).await != Settlement::Done {
                return Entry::Over;
            }
        }
        tokio::select! {
            may_leave = self.admit(share, &work.lease.notification, targets, due.len()) => due.truncate(may_leave),
            () = self.guard.cancelled.reached(work.lease.key.notification) => return Entry::Cancelled,
            () = self.stopping.cancelled() => {}
        }
        Entry::Open
    }

    /// Waits until some of so many due targets may be sent, and says how many.
    async fn admit(&self, share: &mut Share, notification: &Notification, targets: usize, due: usize) -> usize {
        self.slots.enter(share, notification, targets, due).await;
        self.pace.leave(notification, due).await
    }

    /// With `on_unknown: stop`, what was written, or may have been, before somebody died is never written again.
    fn end_marked(&self, work: &mut Work) {
        if work.lease.notification.on_unknown != OnUnknown::Stop {
            return;
        }
        for state in work.lease.chunk.states.iter_mut().filter(|s| s.is_open() && s.marked) {
            state.ambiguous = true;
            state.end(DeliveryStatus::Unknown, Some(own::NO_ANSWER), self.guard.clock.now());
        }
    }

    /// The durable mark before the write: for `on_unknown: stop`, and on what a process that dies would leave in doubt.
    async fn mark(&self, work: &mut Work, due: &[usize]) -> Settlement {
        let is_small = work.lease.chunk.targets.len() <= SMALL_CHUNK;
        if is_small && work.lease.notification.on_unknown != OnUnknown::Stop || self.stopping.is_cancelled() {
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

    /// Makes the chunk as it is now durable.
    fn settle<'a>(
        &'a self,
        work: &'a mut Work,
        disposition: Disposition,
        learned: Learned,
    ) -> impl Future<Output = Settlement> + use<'a> {
        let chunk = std::mem::take(&mut work.lease.chunk);
        let settled = self.settled(progress(work, chunk, disposition, learned));
        async move {
            let (progress, settlement) = settled.await;
            if let Some(progress) = progress {
                work.lease.chunk = progress.chunk;
            }
            settlement
        }
    }

    /// Makes a copy of the chunk as it is now durable, while the chunk goes on.
    fn settle_beside(&self, work: &Work, learned: Learned) -> BoxFuture<'_, Settlement> {
        let progress = progress(work, work.lease.chunk.clone(), Disposition::Keep, learned);
        self.settled(progress).map(|(_, settlement)| settlement).boxed()
    }

    /// Hands progress over, and waits until it is durable; it comes back.
    fn settled(&self, progress: Progress) -> impl Future<Output = (Option<Progress>, Settlement)> + use<'_> {
        let key = progress.key;
        let settled = self.settler.settle(progress);
        async move {
            let (progress, settlement) = settled.await;
            if settlement == Settlement::Lost {
                tracing::warn!(
                    notification.id = %key.notification,
                    chunk = key.number,
                    "another replica has taken over {}: what this one had not settled may be repeated",
                    key.notification
                );
            }
            (progress, settlement)
        }
    }

    /// Tries every due target once.
    async fn round(
        &self,
        work: &mut Work,
        head: &Arc<Head>,
        due: &[usize],
        addresses: &mut Addresses,
        read_at: Duration,
        share: &mut Share,
    ) -> Round {
        let mut round = Round { left: Left::Open, moved: false, spent: false, over: false, blocked: HashSet::new() };
        let mut learned = Learned::default();
        let notification = Arc::clone(&work.lease.notification);
        let mut rest = in_order(work, due).into_iter();
        let mut running = FuturesUnordered::new();
        // Rare, and large.
        let mut judged = FuturesUnordered::<BoxFuture<'_, Attempted>>::new();
        let mut settling = OptionFuture::<BoxFuture<'_, Settlement>>::default();
        let mut ended = VecDeque::new();
        let mut open = Open { unsettled: 0, settling: 0, since: Duration::ZERO };
        // A probe is one push; the others wait for what it says.
        let mut room = if work.probe.is_some() { 1 } else { share.pushes() };
        let gives_way = share.is_bounded();
        let mut now = self.guard.clock.monotonic();
        loop {
            let in_flight = if gives_way { self.traffic.room(now) } else { room };
            while running.len() < in_flight
                && running.len() + ended.len() + open.all() < room
                && !self.stopping.is_cancelled()
            {
                let Some(position) = rest.next() else { break };
                match self.aim(work, addresses, position) {
                    Some(Aim::At(aimed)) => running.push(self.attempt(work, &notification, head, aimed, read_at)),
                    Some(Aim::Ended(attempted)) => ended.push_back(attempted),
                    None => {}
                }
            }
            // Once what was answered is settled.
            let more = rest.len() > 0 && open.all() > 0 && room > 0 && !self.stopping.is_cancelled();
            if rest.len() == 0 && running.len() <= slots::STRAGGLERS {
                work.shrink(STRAGGLING_WEIGHT);
            }
            let next = if let Some(settlement) = (&mut settling).now_or_never().flatten() {
                Next::Settled(settlement)
            } else if let Some(attempted) = ended.pop_front().or_else(|| running.next().now_or_never().flatten()) {
                Next::Ended(attempted)
            } else if running.is_empty() && judged.is_empty() && !more {
                break;
            } else if running.is_empty() && open.is_to_be_settled() {
                // What was answered does not wait for what is to be judged.
                Next::Pause
            } else {
                tokio::select! {
                    biased;
                    Some(settlement) = &mut settling => Next::Settled(settlement),
                    Some(attempted) = running.next(), if !running.is_empty() => Next::Ended(attempted),
                    Some(attempted) = judged.next(), if !judged.is_empty() => Next::Ended(attempted),
                    () = self.guard.clock.sleep(SETTLE_EVERY), if open.is_to_be_settled() => Next::Pause,
                    // No answer says that it is quiet again.
                    () = self.guard.clock.sleep(LOOK_EVERY), if gives_way && running.len() >= in_flight && rest.len() > 0 => Next::Look,
                    else => break,
                }
            };
            now = self.guard.clock.monotonic();
            let pause = matches!(next, Next::Pause);
            match next {
                Next::Ended(mut attempted) => {
                    round.spent |= attempted.went != Went::No;
                    self.look_at_traffic(gives_way, &attempted, now);
                    if work.probe.is_some() {
                        let judging = self.judge_probe(work, &attempted, &mut round);
                        let judged = beside(&mut running, &mut ended, judging).await;
                        room = judged.min(share.pushes());
                    } else if let Some((environment, fault)) = &attempted.fault {
                        let trip = self.guard.board.trip(&notification.topic, *environment, fault);
                        beside(&mut running, &mut ended, trip).await;
                        round.block(attempted.position, *environment);
                    }
                    if let Some(hearing) = attempted.hearing.take() {
                        judged.push(self.judged(Arc::clone(&notification), attempted, *hearing).boxed());
                        continue;
                    }
                    round.take(&notification, attempted, &mut work.lease.chunk, addresses, &mut learned);
                    open.one_more(now);
                }
                Next::Settled(Settlement::Done) => {
                    (settling, open.settling) = (OptionFuture::default(), 0);
                    if rest.len() == 0 {
                        share.keep(running.len() + ended.len() + open.all());
                    }
                }
                Next::Settled(_) => {
                    // What is in flight is still read to its end: a written push is never dropped.
                    while running.next().await.is_some() {}
                    round.over = true;
                    return round;
                }
                Next::Pause if running.is_empty() => work.shrink(judged.len().max(LEAST_WEIGHT)),
                Next::Pause | Next::Look => {}
            }
            let goes_on = !running.is_empty() || !judged.is_empty() || more;
            let frees_room = rest.len() > 0 && open.unsettled >= room / 2;
            if goes_on && open.is_to_be_settled() && (pause || frees_room || open.is_due(now)) {
                open = Open { unsettled: 0, settling: open.unsettled, since: now };
                settling = Some(self.settle_beside(work, std::mem::take(&mut learned))).into();
            }
        }
        // In the order of what happened.
        if let Some(settlement) = settling.await {
            round.over |= settlement != Settlement::Done;
        }
        drop(running);
        self.close(work, &mut round, learned).await;
        round
    }

    /// Learns from an answer how much of a broadcast may be in flight beside urgent pushes.
    fn look_at_traffic(&self, gives_way: bool, attempted: &Attempted, now: Duration) {
        if let (true, Some(environment), Some(took)) = (gives_way, attempted.environment, attempted.took) {
            self.traffic.answered(environment, took, now);
        }
    }

    /// Ends a round: nothing is in flight, and all but what was learned last is durable.
    async fn close(&self, work: &mut Work, round: &mut Round, learned: Learned) {
        if round.over {
            return;
        }
        unmark(&mut work.lease.chunk);
        if work.lease.chunk.is_done() {
            // The end and what was learned of devices in one commit.
            self.settle(work, Disposition::Keep, learned).await;
            round.over = true;
        } else if !learned.is_empty() {
            round.over = self.settle(work, Disposition::Keep, learned).await != Settlement::Done;
        }
    }

    /// What a probe's end says of the breaker. Returns how many pushes may be in flight now.
    async fn judge_probe(&self, work: &mut Work, attempted: &Attempted, round: &mut Round) -> usize {
        let topic = &work.lease.notification.topic;
        let Some(probe) = work.probe else { return usize::MAX };
        if let Some((environment, fault)) = &attempted.fault {
            // A token that was refused before tells nothing new: the others are not kept waiting longer for it.
            if !(fault.is_wave() && attempted.in_doubt) {
                self.guard.board.probe_failed(probe.breaker, fault).await;
            }
            round.block(attempted.position, *environment);
            return 0;
        }
        if attempted.environment != Some(probe.environment) {
            // Ended before it was sent, or not one of those that wait for this breaker: the next one.
            return 1;
        }
        if attempted.proves {
            self.guard.board.close(topic, probe.environment, probe.breaker).await;
            work.probe = None;
            return usize::MAX;
        }
        if attempted.went == Went::Out || attempted.left != Left::Open || attempted.state.is_open() {
            // No answer, or one that proves nothing: the breaker stays, and so does everything behind it.
            round.block(attempted.position, probe.environment);
            return 0;
        }
        1
    }

    /// What can be said of a push without waiting: where it goes, or that it ends, or waits, without having been made. The
    /// mark stands in the database until its attempt is settled.
    fn aim(&self, work: &Work, addresses: &Addresses, position: usize) -> Option<Aim> {
        let notification = &work.lease.notification;
        let target = work.lease.chunk.targets.get(position)?;
        let state = State { marked: false, ..work.lease.chunk.states.get(position)?.clone() };
        let mut attempted = Attempted::at(position, state);
        let now = self.guard.clock.now();
        if self.guard.cancelled.holds(notification.id) {
            attempted.state.end(DeliveryStatus::Cancelled, Some(own::CANCELLED), now);
            return Some(Aim::Ended(attempted));
        }
        if now >= notification.deadline() {
            attempted.state.end(DeliveryStatus::Expired, Some(own::EXPIRED), now);
            return Some(Aim::Ended(attempted));
        }
        let device = match target {
            Target::Token { token, .. } => Recipe::raw(token.clone()),
            Target::Device { seq, generation } => match judge(addresses.of(*seq), *generation) {
                Ok(address) => Recipe::device(Arc::clone(address), *generation),
                Err((status, cause)) => {
                    attempted.state.end(status, Some(cause), now);
                    return Some(Aim::Ended(attempted));
                }
            },
        };
        let environments = self.gateway.environments(&notification.topic);
        if environments.is_empty() {
            attempted.left = Left::Later(NO_CREDENTIAL_FOR);
            return Some(Aim::Ended(attempted));
        }
        let Some(environment) = environment(notification, &device, &attempted.state, environments) else {
            attempted.state.end(DeliveryStatus::Failed, Some(own::NO_KEY), now);
            return Some(Aim::Ended(attempted));
        };
        attempted.environment = Some(environment);
        if work.probe.is_some_and(|probe| probe.environment != environment) {
            // Its turn comes once the probe is over.
            return Some(Aim::Ended(attempted));
        }
        if work.probe.is_none() && self.guard.board.is_open(&notification.topic, environment) {
            attempted.left = Left::Blocked(environment);
            return Some(Aim::Ended(attempted));
        }
        if let Some(rest) = self.busy.wait(&device.token) {
            postpone(&mut attempted.state, rest, now, notification.deadline());
            return Some(Aim::Ended(attempted));
        }
        Some(Aim::At(Aimed { position, state: attempted.state, device, environment }))
    }

    /// Makes a push and waits for what comes of it. `read_at`: when its device was read.
    fn attempt<'a>(
        &'a self,
        work: &Work,
        notification: &'a Notification,
        head: &Arc<Head>,
        aimed: Aimed,
        read_at: Duration,
    ) -> impl Future<Output = Attempted> + use<'a> {
        let (replica, probe) = (work.replica, work.probe);
        let push = Push {
            head: Arc::clone(head),
            environment: aimed.environment,
            token: aimed.device.token.clone(),
            apns_id: ApnsId::derive(notification.id, aimed.device.recipient()),
        };
        // Not an `async fn`: that would have two places for each of these, and there are thousands of them.
        async move {
            let ended =
                |state| Attempted { environment: Some(aimed.environment), ..Attempted::at(aimed.position, state) };
            match self.is_superseded(notification, &aimed.device, &aimed.state).await {
                Ok(false) => {}
                Ok(true) => {
                    let mut attempted = ended(aimed.state);
                    attempted.state.end(DeliveryStatus::Suppressed, Some(own::SUPERSEDED), self.guard.clock.now());
                    return attempted;
                }
                Err(_) => return Attempted { left: Left::Later(PUT_BACK_FOR), ..ended(aimed.state) },
            }
            let fence = AttemptFence {
                guard: &self.guard,
                replica,
                notification: notification.id,
                topic: &notification.topic,
                environment: aimed.environment,
                token: &aimed.device.token,
                deadline: notification.deadline(),
                probe: probe.is_some(),
                owned: aimed.device.address.as_ref().map(|address| Owned {
                    seq: address.seq,
                    generation: aimed.device.generation,
                    read_at: AtomicU64::new(millis(read_at)),
                }),
                verdict: Mutex::new(None),
            };
            let reply = self.gateway.send(&push, &fence).await;
            let verdict = fence.verdict.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut attempted = ended(aimed.state.clone());
            if reply.outcome == Outcome::Fenced {
                match verdict {
                    Some(Verdict::End(status, cause)) => {
                        attempted.state.end(status, Some(cause), self.guard.clock.now());
                    }
                    Some(Verdict::Readdressed(address)) => attempted.readdressed = Some(address),
                    Some(Verdict::Breaker) => attempted.left = Left::Blocked(aimed.environment),
                    Some(Verdict::NotOurs) => attempted.left = Left::Lost,
                    Some(Verdict::Unread) | None => attempted.left = Left::Later(PUT_BACK_FOR),
                }
                return attempted;
            }
            let Aimed { state: before, device, environment, .. } = aimed;
            self.answered(notification, Facts { device, environment, before, reply }, probe, &mut attempted);
            attempted
        }
    }

    /// What follows from an answer, or from none.
    fn answered(&self, notification: &Notification, mut facts: Facts, probe: Option<Probe>, attempted: &mut Attempted) {
        let (reply, now) = (&facts.reply, self.guard.clock.now());
        attempted.went = if reply.sent_at.is_some() { Went::Out } else { Went::Back };
        attempted.proves = probe.is_some_and(|probe| probe.proves(&reply.outcome));
        if let (Some(sent_at), Some(answer)) = (reply.sent_at, &reply.answer) {
            let took = now.since(sent_at);
            names::apns_answered(facts.environment.as_str(), answer.status, took.as_secs_f64());
            // A refusal may come sooner than an acceptance.
            attempted.took = (reply.outcome == Outcome::Accepted).then_some(took);
        }
        let topic = &notification.topic;
        if let (Outcome::Accepted, Some(device)) = (&reply.outcome, facts.known()) {
            self.guard.board.accepted(topic, facts.environment, device);
        }
        let token = &facts.device.token;
        if let Outcome::Deferred { whose: Busy::Device, after } = &mut facts.reply.outcome {
            *after = Some(self.busy.refused(token, *after, rand::random()));
        } else if facts.reply.answer.is_some() {
            self.busy.answered(token);
        }
        // Through a breaker that is open because tokens are refused, one more of them is nothing new.
        let wave = probe.filter(|probe| probe.wave).map(|_| Judgement::Wave);
        let conclusion = self.conclude(notification, &facts, wave, now);
        let awaits = conclusion.awaits_judgement;
        attempted.learn(notification, &facts, conclusion, now);
        let goes_elsewhere = facts.reply.outcome == Outcome::BadToken && wave.is_none() && !awaits;
        if let Some(answer) = facts.reply.answer.as_ref().filter(|_| awaits || goes_elsewhere) {
            let (fault, passed) = (Fault::from(answer), probe.is_some());
            if awaits {
                attempted.hearing = Some(Box::new(self.hear(notification, facts, fault, passed)));
            } else {
                // What is thought of this environment by the time the other has answered decides about that one too.
                self.guard.board.refused(topic, facts.environment, Refused::Unknown, &fault, passed);
            }
        }
    }

    fn conclude(
        &self,
        notification: &Notification,
        facts: &Facts,
        judgement: Option<Judgement>,
        now: Timestamp,
    ) -> Conclusion {
        let with = Circumstances {
            now,
            deadline: notification.deadline(),
            on_unknown: notification.on_unknown,
            named_environment: notification.environment,
            environments: self.gateway.environments(&notification.topic),
            environment: facts.environment,
            accepted_here: facts.known().is_some(),
            judgement,
            jitter: rand::random(),
        };
        conclude(&facts.before, &facts.reply, with)
    }

    /// A token was refused for good: who else was, here and where it was tried before?
    fn hear(&self, notification: &Notification, facts: Facts, fault: Fault, passed: bool) -> Hearing {
        let (topic, environment) = (&notification.topic, facts.environment);
        let what = match facts.known() {
            Some(device) if facts.before.is_in_doubt() => Refused::Again(device),
            Some(device) => Refused::Known(device),
            None => Refused::Unknown,
        };
        let board = &self.guard.board;
        let mut opinions = vec![(environment, board.refused(topic, environment, what, &fault, passed))];
        let other = environment.other();
        if facts.before.refused_in(other) {
            opinions.push((other, board.opinion(topic, other)));
        }
        Hearing { facts, fault, opinions }
    }

    /// Concludes an attempt once it is judged; leaves the delivery open if the service stops before.
    async fn judged(&self, notification: Arc<Notification>, mut attempted: Attempted, hearing: Hearing) -> Attempted {
        let Hearing { facts, fault, opinions } = hearing;
        let worst = async {
            let mut worst = (Judgement::Healthy, facts.environment);
            for (environment, opinion) in opinions {
                let judgement = self.guard.board.judgement(&notification.topic, environment, opinion, &fault).await;
                if judgement > worst.0 {
                    worst = (judgement, environment);
                }
            }
            worst
        };
        let (judgement, environment) = tokio::select! {
            biased;
            () = self.stopping.cancelled() => return attempted,
            worst = worst => worst,
        };
        if judgement == Judgement::Unjudged {
            tracing::warn!(
                notification.id = %notification.id,
                token = facts.device.token.fingerprint(),
                environment = environment.as_str(),
                apns.reason = fault.reason.as_str(),
                "a token of `{}` is refused, and too little was accepted in {environment} lately to tell whether it \
                 is to blame: its push is tried again later",
                notification.topic
            );
        }
        let now = self.guard.clock.now();
        let conclusion = self.conclude(&notification, &facts, Some(judgement), now);
        attempted.learn(&notification, &facts, conclusion, now);
        if let Some((at, _)) = &mut attempted.fault {
            *at = environment;
        }
        attempted
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

impl Facts {
    /// The device, if its token was accepted here before.
    fn known(&self) -> Option<DeviceSeq> {
        let address = self.device.address.as_ref()?;
        address.was_accepted_in(self.environment).then_some(address.seq)
    }
}

/// What a round goes on with.
#[expect(clippy::large_enum_variant, reason = "made once an attempt, and taken apart at once")]
enum Next {
    /// An attempt came to its end.
    Ended(Attempted),
    /// Progress was made durable, or not.
    Settled(Settlement),
    /// Nothing happens for a moment.
    Pause,
    /// There may be more room by now.
    Look,
}

/// What was answered and is not known to be durable.
struct Open {
    unsettled: usize,
    /// In the settle that is under way: there is one at a time.
    settling: usize,
    /// When the first of those that are unsettled was answered.
    since: Duration,
}

impl Open {
    const fn all(&self) -> usize {
        self.unsettled + self.settling
    }

    /// Whether a settle may begin.
    const fn is_to_be_settled(&self) -> bool {
        self.unsettled > 0 && self.settling == 0
    }

    fn one_more(&mut self, now: Duration) {
        if self.unsettled == 0 {
            self.since = now;
        }
        self.unsettled += 1;
    }

    /// Whether it should, though answers still come in.
    fn is_due(&self, now: Duration) -> bool {
        now.saturating_sub(self.since) >= SETTLE_EVERY
    }
}

fn progress(work: &Work, chunk: Chunk, disposition: Disposition, learned: Learned) -> Progress {
    let Learned { effects, unique_ids } = learned;
    let Lease { key, epoch, seat, .. } = work.lease;
    let at_once = work.probe.is_some() || disposition != Disposition::Keep;
    Progress { key, epoch, seat, chunk, disposition, effects, unique_ids, at_once }
}

/// How a round went.
struct Round {
    left: Left,
    /// Something came of it: an answer, an end, a new address.
    moved: bool,
    /// A probe was made, as far as that was possible.
    spent: bool,
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

/// Waits for `other` while what is in flight goes on: a future that is not polled may hold what `other` needs. On the heap,
/// because it is rare, and large.
fn beside<'a, F, T>(
    running: &'a mut FuturesUnordered<F>,
    ended: &'a mut VecDeque<Attempted>,
    other: impl Future<Output = T> + Send + 'a,
) -> BoxFuture<'a, T>
where
    F: Future<Output = Attempted> + Send,
{
    async move {
        tokio::pin!(other);
        loop {
            tokio::select! {
                biased;
                done = &mut other => return done,
                Some(attempted) = running.next(), if !running.is_empty() => ended.push_back(attempted),
            }
        }
    }
    .boxed()
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
        addresses: &mut Addresses,
        learned: &mut Learned,
    ) {
        self.moved |= attempted.went == Went::Out || !attempted.state.is_open() || attempted.readdressed.is_some();
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
            addresses.extend([address]);
        }
        learned.effects.extend(attempted.effect);
        if let Some(unique_id) = attempted.unique_id
            && let Ok(position) = u32::try_from(attempted.position)
        {
            learned.unique_ids.push((position, unique_id));
        }
    }
}

/// The targets that are due in the order in which they are tried. A probe tries first what was not tried before: what
/// was refused already may have been refused rightly.
fn in_order(work: &Work, due: &[usize]) -> Vec<usize> {
    let mut due = due.to_vec();
    if work.probe.is_some() {
        due.sort_by_key(|position| work.lease.chunk.states.get(*position).map(|state| (state.is_in_doubt(), state.at)));
    }
    due
}

/// What comes of a look at a target.
enum Aim {
    /// It is to be sent.
    At(Aimed),
    /// Not now, or not at all.
    Ended(Attempted),
}

/// A push that is to be made.
struct Aimed {
    position: usize,
    /// Where its delivery stands.
    state: State,
    device: Recipe,
    environment: Environment,
}

/// Where one push goes.
struct Recipe {
    token: DeviceToken,
    address: Option<Arc<Address>>,
    generation: Option<crate::domain::device::Generation>,
}

impl Recipe {
    fn raw(token: DeviceToken) -> Self {
        Self { token, address: None, generation: None }
    }

    fn device(address: Arc<Address>, generation: Option<crate::domain::device::Generation>) -> Self {
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

/// Whether the device's row does not say it yet: a second broadcast on a day writes no device.
fn is_news(effect: &DeviceEffect, address: &Address, now: Timestamp) -> bool {
    match effect {
        DeviceEffect::Accepted(environment, _) => {
            address.environment != Some(*environment)
                || address.last_accepted_at.is_none_or(|at| now.since(at) >= ACCEPTED_WITHIN)
        }
        DeviceEffect::Dead { .. } | DeviceEffect::Bad { .. } | DeviceEffect::Suspend { .. } => true,
    }
}

/// A mark will do where it can say all: the row knows of no other environment.
fn marked(effect: DeviceEffect, address: &Address) -> DeviceEffect {
    match effect {
        DeviceEffect::Accepted(environment, _) if address.environment.is_none_or(|known| known == environment) => {
            DeviceEffect::Accepted(environment, address.block)
        }
        effect => effect,
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

/// Nothing is in flight: what bears a mark and is open was not written, or it is known what came of that.
fn unmark(chunk: &mut Chunk) {
    for state in chunk.states.iter_mut().filter(|state| state.is_open()) {
        state.marked = false;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_closes_a_breaker_depends_on_why_it_is_open() {
        let later = |whose| Outcome::Deferred { whose, after: None };
        let fault = Fault { status: 403, reason: "InvalidProviderToken".into() };
        for (outcome, closes_a_credentials, closes_a_wave) in [
            (Outcome::Accepted, true, true),
            (Outcome::Gone { since: None }, true, true),
            (later(Busy::Device), true, true),
            (Outcome::Rejected, true, false),
            (Outcome::BadToken, true, false),
            (Outcome::WrongTopic, true, false),
            (later(Busy::Server), false, false),
            (Outcome::Withheld(fault), false, false),
            (Outcome::Unsent, false, false),
            (Outcome::Unknown, false, false),
            (Outcome::Fenced, false, false),
        ] {
            let probe = |wave| Probe {
                breaker: BreakerId(1),
                environment: Environment::Production,
                wave,
                unspent: 0,
                until: Timestamp::from_seconds(0),
            };
            assert_eq!(probe(false).proves(&outcome), closes_a_credentials, "{outcome:?}, credential");
            assert_eq!(probe(true).proves(&outcome), closes_a_wave, "{outcome:?}, wave");
        }
    }
}
