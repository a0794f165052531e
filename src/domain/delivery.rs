//! What became of each device: delivery states, chunks of an audience, and the compact form in which both are kept.
//!
//! Promises: every target of a chunk has exactly one state, and [`conclude`] is the only function that moves one on
//! after an attempt. After an ambiguous attempt only `accepted` or `unknown` can end a delivery (promise 3).
//! Outcomes that are missing are an error, never a guess: a compact form that does not name each target exactly once
//! does not decode.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use super::{
    clock::Timestamp,
    device::{BlockVersion, DeviceSeq, DeviceToken, Generation},
    notification::{Counts, NotificationId},
    outcome::{Answer, Busy, Cause, Fault, Outcome, Reason, Reply, own},
    push::OnUnknown,
    topic::Environment,
};

/// Where one delivery stands: the count words of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeliveryStatus {
    /// Open.
    Pending,
    /// APNs accepted it; never "delivered".
    Accepted,
    /// Refused for good.
    Failed,
    /// The token is dead.
    Unregistered,
    /// Its time passed first.
    Expired,
    /// Cancelled before it left.
    Cancelled,
    /// Withheld by us: the phone has changed hands, or something newer replaced it.
    Suppressed,
    /// Written, and nobody can know what became of it.
    Unknown,
}

impl DeliveryStatus {
    /// All of them; the position is the number in the compact form and must never change.
    pub const ALL: [Self; 8] = [
        Self::Pending,
        Self::Accepted,
        Self::Failed,
        Self::Unregistered,
        Self::Expired,
        Self::Cancelled,
        Self::Suppressed,
        Self::Unknown,
    ];

    /// The name on the API, in metrics and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Accepted => "accepted",
            Self::Failed => "failed",
            Self::Unregistered => "unregistered",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Suppressed => "suppressed",
            Self::Unknown => "unknown",
        }
    }

    /// The number in the compact form.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }
}

impl fmt::Display for DeliveryStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no delivery status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a delivery status: pending, accepted, failed, unregistered, expired, cancelled, suppressed or unknown")]
pub struct NotADeliveryStatus;

impl FromStr for DeliveryStatus {
    type Err = NotADeliveryStatus;

    fn from_str(text: &str) -> Result<Self, NotADeliveryStatus> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(NotADeliveryStatus)
    }
}

super::serde_by_text!(DeliveryStatus);

/// A chunk of an audience: which notification, and the how-manieth part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    /// The notification.
    pub notification: NotificationId,
    /// Counts from 0.
    pub number: u32,
}

/// The most targets of one chunk: a notification for no more is one chunk.
pub const CHUNK_TARGETS: usize = 1_000;

/// The most targets of a chunk of a notification for more than [`CHUNK_TARGETS`]: they are all sent at once, so that most
/// such chunks are settled once, as a whole.
pub const PART_TARGETS: usize = 256;

/// A chunk of more targets bears a durable mark while it is sent, whatever `on_unknown` says, so that it is known what a
/// process that dies may have written. Of a smaller one all that is open is in doubt then.
pub const SMALL_CHUNK: usize = 100;

/// One target of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A registered device.
    Device {
        /// Its internal number.
        seq: DeviceSeq,
        /// The generation captured when the notification became due; `None`: not fenced.
        generation: Option<Generation>,
    },
    /// A raw token that nobody registered.
    Token {
        /// Its place in the caller's list.
        index: u32,
        /// The token.
        token: DeviceToken,
    },
}

/// Where the delivery to one target stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each asked for by name")]
pub struct State {
    /// The count word.
    pub status: DeliveryStatus,
    /// Requests written to APNs for it.
    pub attempts: u32,
    /// The last answer, or our own word.
    pub cause: Option<Cause>,
    /// When it came to this status, or was last tried.
    pub at: Option<Timestamp>,
    /// An attempt was written and never answered.
    pub ambiguous: bool,
    /// A durable mark was made before a write: after a crash it counts as written.
    pub marked: bool,
    /// A replica ended while it sent its chunk: an attempt may have been written that nobody knows of.
    pub maybe_written: bool,
    /// `BadDeviceToken` came from production.
    pub refused_production: bool,
    /// `BadDeviceToken` came from the sandbox.
    pub refused_sandbox: bool,
    /// Not before then.
    pub retry_at: Option<Timestamp>,
}

impl State {
    /// Nothing tried yet.
    pub const PENDING: Self = Self {
        status: DeliveryStatus::Pending,
        attempts: 0,
        cause: None,
        at: None,
        ambiguous: false,
        marked: false,
        maybe_written: false,
        refused_production: false,
        refused_sandbox: false,
        retry_at: None,
    };

    /// Ended without an attempt, with a word of ours.
    #[must_use]
    pub fn ended(status: DeliveryStatus, cause: Cause, at: Timestamp) -> Self {
        Self { status, cause: Some(cause), at: Some(at), ..Self::PENDING }
    }

    /// Whether it is still open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.status == DeliveryStatus::Pending
    }

    /// Ends it. After an ambiguous attempt anything but `accepted` is `unknown`: the first try may have arrived. Where
    /// there may have been one that nobody knows of, so is all that APNs did not say itself.
    pub fn end(&mut self, status: DeliveryStatus, cause: Option<Cause>, at: Timestamp) {
        self.status = match status {
            DeliveryStatus::Accepted => DeliveryStatus::Accepted,
            _ if self.ambiguous => DeliveryStatus::Unknown,
            DeliveryStatus::Expired | DeliveryStatus::Cancelled | DeliveryStatus::Suppressed if self.maybe_written => {
                DeliveryStatus::Unknown
            }
            other => other,
        };
        self.cause = match status {
            DeliveryStatus::Accepted => None,
            _ => cause.or_else(|| self.cause.take()),
        };
        self.at = Some(at);
        self.retry_at = None;
        self.marked = false;
        self.maybe_written = false;
        self.refused_production = false;
        self.refused_sandbox = false;
    }

    /// Whether the last answer refused the token for good and it was not known what to think of that.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.is_open()
            && self.cause.as_ref().is_some_and(|cause| {
                cause.apns_status == Some(400) && Reason::from(&*cause.reason).is_about_the_token()
            })
    }

    /// Whether this environment has refused the token as bad in this delivery.
    #[must_use]
    pub const fn refused_in(&self, environment: Environment) -> bool {
        match environment {
            Environment::Production => self.refused_production,
            Environment::Sandbox => self.refused_sandbox,
        }
    }
}

/// A part of an audience in memory: targets, and where each stands, in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunk {
    /// To whom.
    pub targets: Vec<Target>,
    /// How each stands.
    pub states: Vec<State>,
}

impl Chunk {
    /// A chunk nothing of which has been tried.
    #[must_use]
    pub fn new(targets: Vec<Target>) -> Self {
        let states = vec![State::PENDING; targets.len()];
        Self { targets, states }
    }

    /// How many stand where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts { targeted: self.targets.len() as u64, ..Counts::default() };
        for state in &self.states {
            *match state.status {
                DeliveryStatus::Pending => &mut counts.pending,
                DeliveryStatus::Accepted => &mut counts.accepted,
                DeliveryStatus::Failed => &mut counts.failed,
                DeliveryStatus::Unregistered => &mut counts.unregistered,
                DeliveryStatus::Expired => &mut counts.expired,
                DeliveryStatus::Cancelled => &mut counts.cancelled,
                DeliveryStatus::Suppressed => &mut counts.suppressed,
                DeliveryStatus::Unknown => &mut counts.unknown,
            } += 1;
        }
        counts
    }

    /// Whether every target has its outcome.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.states.iter().all(|state| !state.is_open())
    }

    /// Whoever had it is gone: what bears a mark may have been written, and so may `all` that is open.
    pub fn taken_over(&mut self, all: bool) {
        for state in self.states.iter_mut().filter(|state| state.is_open()) {
            state.maybe_written |= all || state.marked;
        }
    }

    /// Ends whatever is open, without an attempt.
    pub fn end_open(&mut self, status: DeliveryStatus, cause: &Cause, at: Timestamp) {
        for state in self.states.iter_mut().filter(|state| state.is_open()) {
            state.end(status, Some(cause.clone()), at);
        }
    }

    /// When the next open target may be tried; `None` if none is open.
    #[must_use]
    pub fn next_try_at(&self, due_at: Timestamp) -> Option<Timestamp> {
        self.states.iter().filter(|s| s.is_open()).map(|s| s.retry_at.unwrap_or(due_at)).min()
    }
}

/// What [`conclude`] must know beside the reply.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    /// Now.
    pub now: Timestamp,
    /// Nothing leaves at or after this.
    pub deadline: Timestamp,
    /// What to do about an unanswered write.
    pub on_unknown: OnUnknown,
    /// The environment that the caller named.
    pub named_environment: Option<Environment>,
    /// Where the app has keys.
    pub environments: &'a [Environment],
    /// Where this attempt went.
    pub environment: Environment,
    /// Whether APNs ever accepted a push for this device's token in this environment.
    pub accepted_here: bool,
    /// What is thought of tokens refused here lately; `None`: that is not known yet. Asked for only by an answer that
    /// [`Conclusion::awaits_judgement`].
    pub judgement: Option<Judgement>,
    /// Between 0 and 1: spreads retries by up to half of their delay.
    pub jitter: f64,
}

/// What is thought of device tokens that APNs refused in some app and environment, from all that it answered there at
/// that time (promise 5). The worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Judgement {
    /// The tokens are to blame: enough others are accepted.
    Healthy,
    /// Nobody can say: hardly anything was accepted lately. Nothing follows but another try later.
    Unjudged,
    /// The fault is ours: too many tokens that worked are refused.
    Wave,
}

/// What an attempt says of the device itself. Raw tokens have none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceEffect {
    /// Accepted in this environment: it is known to be the token's. With the version of its block, where that was read with
    /// what was known of the device: then a mark there will do.
    Accepted(Environment, Option<BlockVersion>),
    /// The token has left the topic then, unless it was presented after.
    Dead {
        /// APNs' word for it.
        reason: Cow<'static, str>,
        /// APNs' timestamp, or the time of sending.
        since: Timestamp,
    },
    /// Refused as a bad token everywhere, and never accepted: inactive, unless it has registered after this push was
    /// written.
    Bad {
        /// When the push was written.
        sent_at: Timestamp,
    },
    /// Refused as a bad token, but accepted before: not sent to until it registers again, which it may have done since
    /// this push was written.
    Suspend {
        /// When the push was written.
        sent_at: Timestamp,
    },
}

/// What follows from an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conclusion {
    /// Where the delivery stands now.
    pub state: State,
    /// What it says of the device.
    pub effect: Option<DeviceEffect>,
    /// What it says of the credential: a breaker opens.
    pub fault: Option<Fault>,
    /// APNs refused the token for good, and nothing follows from that before it is known whether the fault is ours: to
    /// be concluded again, from the state before, with a [`Judgement`].
    pub awaits_judgement: bool,
}

/// Moves a delivery on after an attempt. Pure; one exhaustive match.
#[must_use]
pub fn conclude(state: &State, reply: &Reply, with: Circumstances<'_>) -> Conclusion {
    let mut next = state.clone();
    next.retry_at = None;
    next.marked = false;
    let mut effect = None;
    let mut fault = None;
    let mut awaits_judgement = false;
    let cause = reply.answer.as_ref().and_then(cause_of);
    if !matches!(reply.outcome, Outcome::Unsent | Outcome::Fenced) {
        next.attempts += 1;
        next.at = Some(with.now);
    }
    match &reply.outcome {
        Outcome::Accepted => {
            next.end(DeliveryStatus::Accepted, None, with.now);
            effect = Some(DeviceEffect::Accepted(with.environment, None));
        }
        Outcome::Rejected => {
            next.end(DeliveryStatus::Failed, cause, with.now);
        }
        Outcome::BadToken if may_try_other(state, with) => {
            match with.environment {
                Environment::Production => next.refused_production = true,
                Environment::Sandbox => next.refused_sandbox = true,
            }
            next.cause = cause;
        }
        Outcome::BadToken | Outcome::WrongTopic => {
            // In doubt, what was found out about where the token works counts for nothing.
            next.refused_production = false;
            next.refused_sandbox = false;
            next.cause.clone_from(&cause);
            match with.judgement {
                Some(Judgement::Healthy) => {
                    if reply.outcome == Outcome::BadToken {
                        effect = blame(with, reply.sent_at.unwrap_or(with.now));
                    }
                    next.end(DeliveryStatus::Failed, cause, with.now);
                }
                Some(Judgement::Unjudged) => {
                    let delay = back_off(Busy::Server, next.attempts, with.jitter);
                    postpone(&mut next, delay.max(UNJUDGED_PAUSE), with.now, with.deadline);
                }
                Some(Judgement::Wave) => fault = reply.answer.as_ref().map(Fault::from),
                None => awaits_judgement = true,
            }
        }
        Outcome::Gone { since } => {
            let since = since.or(reply.sent_at).unwrap_or(with.now);
            let reason = cause.as_ref().map_or(Cow::Borrowed("Unregistered"), |c| c.reason.clone());
            effect = Some(DeviceEffect::Dead { reason, since });
            next.end(DeliveryStatus::Unregistered, cause, with.now);
        }
        Outcome::Deferred { whose, after } => {
            next.cause = cause;
            // "At once, elsewhere" has an end too.
            let delay = match after {
                Some(after) if !after.is_zero() || next.attempts <= AT_ONCE => *after,
                Some(_) | None => back_off(*whose, next.attempts, with.jitter),
            };
            postpone(&mut next, delay, with.now, with.deadline);
        }
        Outcome::Withheld(found) => {
            next.cause = cause;
            fault = Some(found.clone());
        }
        // Why a fenced push may not leave is known to whoever made the fence, and who ends it.
        Outcome::Unsent | Outcome::Fenced => {}
        Outcome::Unknown => {
            next.ambiguous = true;
            next.cause = Some(own::NO_ANSWER);
            match with.on_unknown {
                OnUnknown::Stop => {
                    next.end(DeliveryStatus::Unknown, Some(own::NO_ANSWER), with.now);
                }
                OnUnknown::Retry => {
                    let delay = back_off(Busy::Server, next.attempts, with.jitter);
                    postpone(&mut next, delay, with.now, with.deadline);
                }
            }
        }
    }
    Conclusion { state: next, effect, fault, awaits_judgement }
}

/// Whether a token that is bad here may be one of the other environment: that is tried once, where nobody knows better.
fn may_try_other(state: &State, with: Circumstances<'_>) -> bool {
    let other = with.environment.other();
    with.judgement != Some(Judgement::Wave)
        && with.named_environment.is_none()
        && !with.accepted_here
        && with.environments.contains(&other)
        && !state.refused_in(other)
}

/// What a bad token means for its device.
fn blame(with: Circumstances<'_>, sent_at: Timestamp) -> Option<DeviceEffect> {
    if with.accepted_here {
        return Some(DeviceEffect::Suspend { sent_at });
    }
    // One environment alone proves nothing where the caller insisted on it.
    with.named_environment.is_none().then_some(DeviceEffect::Bad { sent_at })
}

fn cause_of(answer: &Answer) -> Option<Cause> {
    if answer.status == 200 {
        return None;
    }
    let reason = answer.reason.as_ref().map_or(Cow::Borrowed(""), |r| Cow::Owned(r.as_str().to_owned()));
    Some(Cause { apns_status: Some(answer.status), reason })
}

/// How many tries may follow at once when a server sends us elsewhere; then it counts as busy.
const AT_ONCE: u32 = 3;

/// The sheet's retry arithmetic, §14. `attempt` counts from 1; `jitter`, between 0 and 1, spreads it by up to half.
#[must_use]
pub fn back_off(whose: Busy, attempt: u32, jitter: f64) -> Duration {
    let delay = match whose {
        Busy::Device => Duration::from_secs((1_u64 << attempt.clamp(1, 9)).min(300)),
        Busy::Server => Duration::from_secs(match attempt {
            0 | 1 => 1,
            2 => 5,
            3 => 30,
            4 => 120,
            _ => 900,
        }),
    };
    delay.mul_f64(0.5 + jitter.clamp(0.0, 1.0))
}

/// A token of which nobody can say whether it is bad is not tried again sooner.
const UNJUDGED_PAUSE: Duration = Duration::from_secs(30);

/// The shortest time worth waiting for one more try before the deadline.
const LAST_TRY: Duration = Duration::from_secs(1);

/// Puts the next try off, at most to shortly before the deadline; ends as expired what has no time left.
pub fn postpone(state: &mut State, delay: Duration, now: Timestamp, deadline: Timestamp) {
    let last = deadline.minus(LAST_TRY);
    if now >= last {
        let cause = state.cause.clone().unwrap_or(own::EXPIRED);
        state.end(DeliveryStatus::Expired, Some(cause), now);
        return;
    }
    state.retry_at = Some(now.plus(delay).min(last));
}

/// A compact form that this version did not write, or that lost its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAChunk {
    /// Written by another version.
    #[error("version {0} of the compact form is not known")]
    Version(u8),
    /// Too short, too long, or a value that is never written.
    #[error("the compact form is damaged")]
    Damaged,
    /// A number that the dictionary of reasons does not hold.
    #[error("reason {0} is not in the dictionary")]
    Reason(u32),
}

const VERSION: u8 = 1;

/// The compact form of targets: version, then per target a tag and varints.
///
/// A device costs one or two bytes beside its neighbour (numbers are kept as differences), two or three when fenced.
#[must_use]
pub fn encode_targets(targets: &[Target]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + targets.len() * 3);
    out.push(VERSION);
    let mut previous = 0_i64;
    for target in targets {
        match target {
            // The two lowest bits of the first varint say what follows, so that a plain device costs no tag.
            Target::Device { seq, generation } => {
                let difference = zigzag(seq.0.wrapping_sub(previous));
                previous = seq.0;
                let tag = u64::from(generation.is_some());
                put_varint(&mut out, u128::from(difference) << 2 | u128::from(tag));
                if let Some(generation) = generation {
                    put_varint(&mut out, u128::from(zigzag(generation.0)));
                }
            }
            Target::Token { index, token } => {
                put_varint(&mut out, u128::from(*index) << 2 | 2);
                let bytes = token.to_bytes();
                put_varint(&mut out, bytes.len() as u128);
                out.extend_from_slice(&bytes);
            }
        }
    }
    out
}

/// Reads [`encode_targets`] back.
///
/// # Errors
/// If the bytes are not such a form.
pub fn decode_targets(bytes: &[u8]) -> Result<Vec<Target>, NotAChunk> {
    let mut input = Input::open(bytes)?;
    let mut targets = Vec::new();
    let mut previous = 0_i64;
    while !input.is_empty() {
        let head = input.varint()?;
        match head & 3 {
            tag @ (0 | 1) => {
                let difference = u64::try_from(head >> 2).map_err(|_| NotAChunk::Damaged)?;
                previous = previous.wrapping_add(unzigzag(difference));
                let generation = if tag == 1 { Some(Generation(unzigzag(input.small()?))) } else { None };
                targets.push(Target::Device { seq: DeviceSeq(previous), generation });
            }
            2 => {
                let index = u32::try_from(head >> 2).map_err(|_| NotAChunk::Damaged)?;
                let length = usize::try_from(input.small()?).map_err(|_| NotAChunk::Damaged)?;
                let token = DeviceToken::from_bytes(input.take(length)?).map_err(|_| NotAChunk::Damaged)?;
                targets.push(Target::Token { index, token });
            }
            _ => return Err(NotAChunk::Damaged),
        }
    }
    Ok(targets)
}

const HAS_CAUSE: u8 = 1 << 3;
const HAS_FACTS: u8 = 1 << 4;
const ATTEMPTS_SHIFT: u8 = 5;
const ATTEMPTS_FOLLOW: u8 = 7;

const AMBIGUOUS: u8 = 1;
const MARKED: u8 = 1 << 1;
const REFUSED_PRODUCTION: u8 = 1 << 2;
const REFUSED_SANDBOX: u8 = 1 << 3;
const HAS_RETRY_AT: u8 = 1 << 4;
const HAS_AT: u8 = 1 << 5;
const MAYBE_WRITTEN: u8 = 1 << 6;
/// Only written with something to tell: the common end, `at` and nothing else, is folded into [`HAS_FACTS`] = 0.
const FACTS_BEYOND_AT: u8 = AMBIGUOUS | MARKED | REFUSED_PRODUCTION | REFUSED_SANDBOX | HAS_RETRY_AT | MAYBE_WRITTEN;

/// The compact form of states: version, a base time, then runs of equal states. Neighbours that ended in one settle
/// share a time and so a run: a broadcast costs well under a byte a device.
///
/// `code` numbers a cause in the dictionary of reasons.
#[must_use]
pub fn encode_states(states: &[State], mut code: impl FnMut(&Cause) -> u32) -> Vec<u8> {
    let base = states.iter().filter_map(|s| s.at).min().map_or(0, Timestamp::as_millis);
    let mut out = vec![VERSION];
    out.extend_from_slice(&base.to_be_bytes());
    let mut rest = states;
    while let Some(first) = rest.first() {
        let run = rest.iter().take_while(|s| *s == first).count();
        put_varint(&mut out, run as u128);
        put_state(&mut out, first, base, &mut code);
        rest = rest.get(run..).unwrap_or_default();
    }
    out
}

/// The form of so many states of which none was tried. It is as long as that of as many that were accepted at one moment:
/// a row that becomes longer when it is settled is in its neighbours' way.
#[must_use]
pub fn encode_untried(targets: usize) -> Vec<u8> {
    let mut out = vec![VERSION];
    out.extend_from_slice(&0_i64.to_be_bytes());
    put_varint(&mut out, targets as u128);
    // The facts say nothing, and take the place of a time.
    out.extend_from_slice(&[DeliveryStatus::Pending.code() | HAS_FACTS, 0]);
    out
}

fn put_state(out: &mut Vec<u8>, state: &State, base: i64, code: &mut impl FnMut(&Cause) -> u32) {
    let mut facts = 0_u8;
    for (bit, set) in [
        (AMBIGUOUS, state.ambiguous),
        (MARKED, state.marked),
        (MAYBE_WRITTEN, state.maybe_written),
        (REFUSED_PRODUCTION, state.refused_production),
        (REFUSED_SANDBOX, state.refused_sandbox),
        (HAS_RETRY_AT, state.retry_at.is_some()),
        (HAS_AT, state.at.is_some()),
    ] {
        if set {
            facts |= bit;
        }
    }
    // An ended state always has a time, an untouched one never: only what differs from that needs facts.
    let usual = if state.is_open() { 0 } else { HAS_AT };
    let has_facts = facts & FACTS_BEYOND_AT != 0 || facts & HAS_AT != usual;
    let attempts = u8::try_from(state.attempts).unwrap_or(u8::MAX).min(ATTEMPTS_FOLLOW);
    let mut head = state.status.code() | attempts << ATTEMPTS_SHIFT;
    if state.cause.is_some() {
        head |= HAS_CAUSE;
    }
    if has_facts {
        head |= HAS_FACTS;
    }
    out.push(head);
    if attempts == ATTEMPTS_FOLLOW {
        put_varint(out, u128::from(state.attempts));
    }
    if let Some(cause) = &state.cause {
        put_varint(out, u128::from(code(cause)));
    }
    if has_facts {
        out.push(facts);
    }
    if let Some(at) = state.at {
        put_varint(out, u128::from(zigzag(at.as_millis().wrapping_sub(base))));
    }
    if let Some(retry_at) = state.retry_at {
        put_varint(out, u128::from(zigzag(retry_at.as_millis().wrapping_sub(base))));
    }
}

/// Reads [`encode_states`] back. `targets` is how many states there must be.
///
/// # Errors
/// If the bytes are not such a form, or do not name each target exactly once.
pub fn decode_states(
    bytes: &[u8],
    targets: usize,
    cause: impl Fn(u32) -> Option<Cause>,
) -> Result<Vec<State>, NotAChunk> {
    let mut input = Input::open(bytes)?;
    let base = input.take(8)?.try_into().map(i64::from_be_bytes).map_err(|_| NotAChunk::Damaged)?;
    let mut states = Vec::with_capacity(targets);
    while !input.is_empty() {
        let run = usize::try_from(input.small()?).map_err(|_| NotAChunk::Damaged)?;
        if run == 0 || run > targets - states.len() {
            return Err(NotAChunk::Damaged);
        }
        let state = take_state(&mut input, base, &cause)?;
        states.extend(std::iter::repeat_n(state, run));
    }
    if states.len() == targets { Ok(states) } else { Err(NotAChunk::Damaged) }
}

fn take_state(input: &mut Input<'_>, base: i64, cause: &impl Fn(u32) -> Option<Cause>) -> Result<State, NotAChunk> {
    let head = input.byte()?;
    let status = DeliveryStatus::from_code(head & 7).ok_or(NotAChunk::Damaged)?;
    let attempts = match head >> ATTEMPTS_SHIFT {
        ATTEMPTS_FOLLOW => u32::try_from(input.small()?).map_err(|_| NotAChunk::Damaged)?,
        few => u32::from(few),
    };
    let cause = if head & HAS_CAUSE == 0 {
        None
    } else {
        let code = u32::try_from(input.small()?).map_err(|_| NotAChunk::Damaged)?;
        Some(cause(code).ok_or(NotAChunk::Reason(code))?)
    };
    let facts = if head & HAS_FACTS != 0 {
        input.byte()?
    } else if status == DeliveryStatus::Pending {
        0
    } else {
        HAS_AT
    };
    let mut time = |flag: u8| -> Result<Option<Timestamp>, NotAChunk> {
        if facts & flag == 0 {
            return Ok(None);
        }
        Ok(Some(Timestamp::from_millis(base.wrapping_add(unzigzag(input.small()?)))))
    };
    let at = time(HAS_AT)?;
    let retry_at = time(HAS_RETRY_AT)?;
    Ok(State {
        status,
        attempts,
        cause,
        at,
        ambiguous: facts & AMBIGUOUS != 0,
        marked: facts & MARKED != 0,
        maybe_written: facts & MAYBE_WRITTEN != 0,
        refused_production: facts & REFUSED_PRODUCTION != 0,
        refused_sandbox: facts & REFUSED_SANDBOX != 0,
        retry_at,
    })
}

const fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63).cast_unsigned()
}

const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

fn put_varint(out: &mut Vec<u8>, mut value: u128) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// Bytes being read; every read is checked.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, NotAChunk> {
        let mut input = Self(bytes);
        match input.byte()? {
            VERSION => Ok(input),
            other => Err(NotAChunk::Version(other)),
        }
    }

    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> Result<u8, NotAChunk> {
        let (&first, rest) = self.0.split_first().ok_or(NotAChunk::Damaged)?;
        self.0 = rest;
        Ok(first)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], NotAChunk> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(NotAChunk::Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u128, NotAChunk> {
        let mut value = 0_u128;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            value |= u128::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(NotAChunk::Damaged)
    }

    fn small(&mut self) -> Result<u64, NotAChunk> {
        u64::try_from(self.varint()?).map_err(|_| NotAChunk::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

    fn circumstances() -> Circumstances<'static> {
        Circumstances {
            now: NOW,
            deadline: NOW.plus(Duration::from_secs(600)),
            on_unknown: OnUnknown::Retry,
            named_environment: None,
            environments: &Environment::ALL,
            environment: Environment::Production,
            accepted_here: false,
            judgement: Some(Judgement::Healthy),
            jitter: 0.5,
        }
    }

    fn reply(outcome: Outcome, status: u16, reason: &str) -> Reply {
        let answer = (status != 0).then(|| Answer {
            status,
            reason: (!reason.is_empty()).then(|| Reason::from(reason)),
            apns_unique_id: None,
        });
        Reply { outcome, answer, sent_at: Some(NOW) }
    }

    fn bad_token() -> Reply {
        reply(Outcome::BadToken, 400, "BadDeviceToken")
    }

    #[test]
    fn what_a_process_that_died_may_have_written_ends_as_unknown_unless_apns_says_what_it_is() {
        let mut chunk = Chunk::new(vec![Target::Device { seq: DeviceSeq(1), generation: None }; 2]);
        chunk.states[0].marked = true;
        chunk.taken_over(false);
        let ended = |state: &State, status| {
            let mut state = state.clone();
            state.end(status, Some(own::CANCELLED), NOW);
            assert!(!state.maybe_written && !state.marked, "what has ended is like its neighbours");
            state.status
        };
        for status in [DeliveryStatus::Cancelled, DeliveryStatus::Expired, DeliveryStatus::Suppressed] {
            assert_eq!(ended(&chunk.states[0], status), DeliveryStatus::Unknown);
            assert_eq!(ended(&chunk.states[1], status), status, "this one bore no mark");
        }
        for status in [DeliveryStatus::Accepted, DeliveryStatus::Failed, DeliveryStatus::Unregistered] {
            assert_eq!(ended(&chunk.states[0], status), status);
        }
        chunk.taken_over(true);
        assert_eq!(ended(&chunk.states[1], DeliveryStatus::Cancelled), DeliveryStatus::Unknown);
    }

    #[test]
    fn after_an_ambiguous_attempt_only_accepted_or_unknown_end_a_delivery() {
        let unanswered = conclude(&State::PENDING, &reply(Outcome::Unknown, 0, ""), circumstances()).state;
        assert!(unanswered.is_open() && unanswered.ambiguous);
        let gone = conclude(&unanswered, &reply(Outcome::Gone { since: None }, 410, "Unregistered"), circumstances());
        assert_eq!(gone.state.status, DeliveryStatus::Unknown);
        assert!(matches!(gone.effect, Some(DeviceEffect::Dead { .. })), "a 410 still deactivates");
        let failed = conclude(&unanswered, &reply(Outcome::Rejected, 413, "PayloadTooLarge"), circumstances());
        assert_eq!(failed.state.status, DeliveryStatus::Unknown);
        let accepted = conclude(&unanswered, &reply(Outcome::Accepted, 200, ""), circumstances());
        assert_eq!(accepted.state.status, DeliveryStatus::Accepted);
        assert_eq!(accepted.state.attempts, 2);
    }

    #[test]
    fn an_unanswered_write_is_not_repeated_when_told_to_stop() {
        let with = Circumstances { on_unknown: OnUnknown::Stop, ..circumstances() };
        let state = conclude(&State::PENDING, &reply(Outcome::Unknown, 0, ""), with).state;
        assert_eq!(state.status, DeliveryStatus::Unknown);
    }

    #[test]
    fn a_bad_token_never_accepted_is_tried_once_in_the_other_environment() {
        let first = conclude(&State::PENDING, &bad_token(), circumstances());
        assert!(first.state.is_open() && first.effect.is_none());
        let sandbox = Circumstances { environment: Environment::Sandbox, ..circumstances() };
        let both = conclude(&first.state, &bad_token(), sandbox);
        assert_eq!(
            (both.state.status, both.effect),
            (DeliveryStatus::Failed, Some(DeviceEffect::Bad { sent_at: NOW }))
        );
        let learned = conclude(&first.state, &reply(Outcome::Accepted, 200, ""), sandbox);
        assert_eq!(learned.effect, Some(DeviceEffect::Accepted(Environment::Sandbox, None)));
    }

    #[test]
    fn a_bad_token_once_accepted_is_suspended_and_not_tried_elsewhere() {
        let with = Circumstances { accepted_here: true, ..circumstances() };
        let refused = conclude(&State::PENDING, &bad_token(), with);
        assert_eq!(
            (refused.state.status, refused.effect),
            (DeliveryStatus::Failed, Some(DeviceEffect::Suspend { sent_at: NOW }))
        );
    }

    #[test]
    fn a_bad_token_in_an_environment_that_the_caller_named_proves_nothing() {
        let with = Circumstances { named_environment: Some(Environment::Production), ..circumstances() };
        let refused = conclude(&State::PENDING, &bad_token(), with);
        assert_eq!((refused.state.status, refused.effect), (DeliveryStatus::Failed, None));
    }

    #[test]
    fn before_a_refused_token_is_judged_nothing_follows_from_it() {
        for outcome in [Outcome::BadToken, Outcome::WrongTopic] {
            let reason = if outcome == Outcome::BadToken { "BadDeviceToken" } else { "DeviceTokenNotForTopic" };
            let refusal = reply(outcome, 400, reason);
            let with = |judgement| Circumstances { accepted_here: true, judgement, ..circumstances() };
            let before = conclude(&State::PENDING, &refusal, with(None));
            assert!(before.awaits_judgement && before.state.is_open() && before.state.is_in_doubt());
            assert_eq!((before.effect, before.fault, before.state.attempts), (None, None, 1));
            let wave = conclude(&State::PENDING, &refusal, with(Some(Judgement::Wave)));
            assert!(wave.state.is_open() && wave.state.retry_at.is_none() && wave.effect.is_none());
            assert_eq!(wave.fault, Some(Fault { status: 400, reason: reason.into() }));
            let unjudged = conclude(&State::PENDING, &refusal, with(Some(Judgement::Unjudged)));
            assert!(unjudged.state.is_open() && unjudged.effect.is_none() && unjudged.fault.is_none());
            assert_eq!(unjudged.state.retry_at, Some(NOW.plus(Duration::from_secs(30))));
        }
    }

    #[test]
    fn a_wave_forgets_which_environments_refused_a_token_never_accepted() {
        let first = conclude(&State::PENDING, &bad_token(), circumstances()).state;
        let sandbox = Circumstances { environment: Environment::Sandbox, ..circumstances() };
        for judgement in [None, Some(Judgement::Unjudged), Some(Judgement::Wave)] {
            let state = conclude(&first, &bad_token(), Circumstances { judgement, ..sandbox }).state;
            assert!(!state.refused_production && !state.refused_sandbox, "{judgement:?}: it starts over");
        }
        let probe = Circumstances { judgement: Some(Judgement::Wave), ..circumstances() };
        assert!(!conclude(&State::PENDING, &bad_token(), probe).state.refused_production, "nor by a probe");
    }

    #[test]
    fn our_own_fault_holds_nothing_against_the_device() {
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let withheld = conclude(
            &State::PENDING,
            &reply(Outcome::Withheld(fault.clone()), 403, "InvalidProviderToken"),
            circumstances(),
        );
        assert!(withheld.state.is_open() && withheld.effect.is_none());
        assert_eq!(withheld.fault, Some(fault));
    }

    #[test]
    fn retries_follow_the_sheet_and_end_at_the_deadline() {
        let busy = |whose| reply(Outcome::Deferred { whose, after: None }, 503, "ServiceUnavailable");
        let mut state = State::PENDING;
        let mut delays = Vec::new();
        let with = Circumstances { deadline: NOW.plus(Duration::from_secs(100_000)), ..circumstances() };
        for _ in 0..6 {
            state = conclude(&state, &busy(Busy::Server), with).state;
            delays.push(state.retry_at.unwrap().since(NOW).as_secs());
        }
        assert_eq!(delays, [1, 5, 30, 120, 900, 900]);
        let mut state = State::PENDING;
        delays.clear();
        for _ in 0..9 {
            state = conclude(&state, &busy(Busy::Device), with).state;
            delays.push(state.retry_at.unwrap().since(NOW).as_secs());
        }
        assert_eq!(delays, [2, 4, 8, 16, 32, 64, 128, 256, 300]);
        let late = Circumstances { deadline: NOW.plus(Duration::from_millis(900)), ..circumstances() };
        let expired = conclude(&State::PENDING, &busy(Busy::Server), late).state;
        assert_eq!(expired.status, DeliveryStatus::Expired);
        assert_eq!(expired.cause.unwrap().reason, "ServiceUnavailable", "what APNs last said is kept");
    }

    #[test]
    fn retry_after_is_honoured_but_not_past_the_deadline() {
        let after = |seconds| {
            let after = Some(Duration::from_secs(seconds));
            let reply = reply(Outcome::Deferred { whose: Busy::Server, after }, 503, "");
            conclude(&State::PENDING, &reply, circumstances()).state.retry_at.unwrap().since(NOW).as_secs()
        };
        assert_eq!(after(77), 77);
        assert_eq!(after(7_700), 599);
    }

    #[test]
    fn being_sent_elsewhere_at_once_has_an_end() {
        let shutdown = reply(Outcome::Deferred { whose: Busy::Server, after: Some(Duration::ZERO) }, 503, "Shutdown");
        let mut state = State::PENDING;
        let mut delays = Vec::new();
        for _ in 0..5 {
            state = conclude(&state, &shutdown, circumstances()).state;
            delays.push(state.retry_at.unwrap().since(NOW).as_secs());
        }
        assert_eq!(delays, [0, 0, 0, 120, 599]);
    }

    fn dictionary() -> Vec<Cause> {
        vec![own::OWNER_CHANGED, Cause { apns_status: Some(410), reason: "Unregistered".into() }]
    }

    fn samples() -> Vec<State> {
        let causes = dictionary();
        let accepted = State { status: DeliveryStatus::Accepted, attempts: 1, at: Some(NOW), ..State::PENDING };
        let mut states = vec![accepted; 500];
        states.push(State::ended(DeliveryStatus::Suppressed, causes[0].clone(), NOW.plus(Duration::from_millis(7))));
        states.push(State {
            attempts: 70_000,
            cause: Some(causes[1].clone()),
            at: Some(NOW.minus(Duration::from_secs(5))),
            ambiguous: true,
            marked: true,
            maybe_written: true,
            refused_production: true,
            refused_sandbox: true,
            retry_at: Some(NOW.plus(Duration::from_secs(900))),
            ..State::PENDING
        });
        states.push(State::PENDING);
        states.push(State {
            status: DeliveryStatus::Unknown,
            ambiguous: true,
            attempts: 2,
            at: Some(NOW),
            ..State::PENDING
        });
        states
    }

    fn encoded(states: &[State]) -> Vec<u8> {
        let causes = dictionary();
        encode_states(states, |cause| u32::try_from(causes.iter().position(|c| c == cause).unwrap()).unwrap())
    }

    #[test]
    fn states_survive_their_compact_form() {
        let causes = dictionary();
        let bytes = encoded(&samples());
        assert!(bytes.len() < 80, "500 equal outcomes are one run: {} bytes", bytes.len());
        let read = decode_states(&bytes, samples().len(), |code| causes.get(code as usize).cloned()).unwrap();
        assert_eq!(read, samples());
    }

    #[test]
    fn what_was_not_tried_takes_as_much_room_as_what_was_accepted_at_one_moment() {
        for targets in [1, 100, 1_000] {
            let untried = encode_untried(targets);
            let pending = vec![State::PENDING; targets];
            assert_eq!(decode_states(&untried, targets, |_| None).unwrap(), pending);
            assert_eq!(
                (&untried[1..9], &untried[untried.len() - 2..]),
                (&[0; 8][..], &[0x10, 0][..]),
                "as SQL finds it"
            );
            assert!(!encoded(&pending).ends_with(&[0x10, 0]), "as nothing else is written");
            let accepted = State { status: DeliveryStatus::Accepted, attempts: 1, at: Some(NOW), ..State::PENDING };
            assert_eq!(untried.len(), encoded(&vec![accepted; targets]).len());
        }
    }

    #[test]
    fn a_compact_form_with_an_outcome_missing_or_too_many_does_not_decode() {
        let causes = dictionary();
        let bytes = encoded(&samples());
        let decode = |bytes: &[u8], n| decode_states(bytes, n, |code| causes.get(code as usize).cloned());
        assert_eq!(decode(&bytes, samples().len() + 1), Err(NotAChunk::Damaged));
        assert_eq!(decode(&bytes, samples().len() - 1), Err(NotAChunk::Damaged));
        assert_eq!(decode(&bytes[..bytes.len() - 1], samples().len()), Err(NotAChunk::Damaged));
        assert_eq!(decode(&[9], 0), Err(NotAChunk::Version(9)));
        assert!(matches!(decode_states(&bytes, samples().len(), |_| None), Err(NotAChunk::Reason(_))));
    }

    #[test]
    fn targets_survive_their_compact_form_at_a_byte_or_two_a_device() {
        let mut targets: Vec<Target> =
            (0..1_000).map(|i| Target::Device { seq: DeviceSeq(5_000_000 + i), generation: None }).collect();
        let bytes = encode_targets(&targets);
        assert!(bytes.len() < 1_010, "{} bytes for 1,000 neighbours", bytes.len());
        assert_eq!(decode_targets(&bytes).unwrap(), targets);
        targets.push(Target::Device { seq: DeviceSeq(3), generation: Some(Generation(4)) });
        targets.push(Target::Token { index: 19_999, token: "a1b2c3".parse().unwrap() });
        targets.push(Target::Device { seq: DeviceSeq(i64::MAX), generation: Some(Generation(0)) });
        assert_eq!(decode_targets(&encode_targets(&targets)).unwrap(), targets);
    }
}
