//! Scripted behaviour: what the simulator does instead of accepting a push that passed every check.
//!
//! Promises: a script never hides a genuine mistake, because it is asked last (check 9). Two ways lead here:
//!
//! - **By device token alone.** A token that begins with [`PREFIX`] and a code of four hex digits gets that code's
//!   behaviour, always, for whoever sends to it. The first three digits of a code are the status, the fourth is a row:
//!   `fa17ed4100…` is answered `410 Unregistered`. [`PREFIXES`] lists all; a code that is not listed is an ordinary
//!   token.
//! - **By script**, through [`Scripts`] or the control API: for a token, or for [`ANY_TOKEN`], the next *n* pushes or
//!   all of them. Scripts of one token are used up in the order in which they were added; a script for the token itself
//!   goes before one for any token, and both before the prefix. What none of these is for may be decided by `chaos`.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    environment::{Environment, PerEnvironment},
    reason::Reason,
};
use crate::domain::clock::Timestamp;

/// The first six hex digits of a device token that asks for a behaviour: "failed".
pub const PREFIX: &str = "fa17ed";
/// Stands for every token in a [`Script`].
pub const ANY_TOKEN: &str = "*";

/// What a push is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// 200: taken for delivery.
    Accepted,
    /// A reason of the table, with a timestamp if the status is 410.
    Refused(Reason, Option<Timestamp>),
    /// Anything a script wants.
    Other { status: u16, reason: Option<String>, timestamp: Option<Timestamp> },
}

impl Answer {
    /// The answer with this status and reason; 200 is an acceptance.
    pub(super) fn from_parts(status: u16, reason: Option<&str>, timestamp: Option<Timestamp>) -> Self {
        match reason.and_then(|name| Reason::find(status, name)) {
            _ if status == 200 => Self::Accepted,
            Some(known) => Self::Refused(known, timestamp),
            None => Self::Other { status, reason: reason.map(str::to_owned), timestamp },
        }
    }

    /// Whether it counts against the provider: every refusal but 410 (Apple: "Sending notification requests to APNs").
    pub(super) const fn is_error(&self) -> bool {
        match self {
            Self::Accepted => false,
            Self::Refused(reason, _) => reason.status() != 410,
            Self::Other { status, .. } => *status != 410,
        }
    }

    /// A refusal without a timestamp.
    pub(super) const fn refusal(reason: Reason) -> Self {
        Self::Refused(reason, None)
    }

    /// The HTTP status.
    pub(super) const fn status(&self) -> u16 {
        match self {
            Self::Accepted => 200,
            Self::Refused(reason, _) => reason.status(),
            Self::Other { status, .. } => *status,
        }
    }

    /// The reason in the body, if there is one.
    pub(super) fn reason(&self) -> Option<&str> {
        match self {
            Self::Accepted => None,
            Self::Refused(reason, _) => Some(reason.name()),
            Self::Other { reason, .. } => reason.as_deref(),
        }
    }
}

/// The last stream a scripted GOAWAY names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LastStream {
    /// Graceful: every stream that arrived is still answered, this one too.
    #[default]
    All,
    /// The stream before this one: this push and those above are not processed and never answered. Where a later stream
    /// was processed already it is that one, and those up to it are answered: a GOAWAY does not lie.
    BeforeThis,
    /// This stream id: streams above it are not processed and never answered.
    Exactly(u32),
}

/// What happens to a push.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is accepted: 200. Useful with a delay.
    Accept,
    /// It is answered with this status and reason.
    Answer {
        /// The HTTP status; 200 is an acceptance.
        status: u16,
        /// The reason, in Apple's table or not; absent: no body.
        #[serde(default)]
        reason: Option<String>,
        /// The `timestamp` of the body, in ms since the epoch.
        #[serde(default)]
        timestamp_ms: Option<i64>,
    },
    /// It is never answered; its stream stays open and keeps its slot.
    Stall {
        /// Whether the ledger counts it as accepted all the same.
        #[serde(default)]
        accepted: bool,
    },
    /// Its stream is reset.
    Reset {
        /// The HTTP/2 error code, such as 7 for `REFUSED_STREAM`.
        code: u32,
        /// Whether the ledger counts it as accepted before that.
        #[serde(default)]
        accepted: bool,
    },
    /// The TCP connection is reset, without a word, and every push on it with it.
    Close {
        /// Whether the ledger counts this push as accepted before that.
        #[serde(default)]
        accepted: bool,
    },
    /// TLS and TCP are closed in good order, without GOAWAY; whatever was not answered is lost.
    CloseTls {
        /// Whether the ledger counts this push as accepted before that.
        #[serde(default)]
        accepted: bool,
    },
    /// TCP stays up, but the connection is neither read nor written any more.
    HalfOpen {
        /// Whether the ledger counts this push as accepted before that.
        #[serde(default)]
        accepted: bool,
    },
    /// Neither this push nor any later one of the connection is answered; PING still is.
    Wedge {
        /// Whether the ledger counts this push as accepted before that.
        #[serde(default)]
        accepted: bool,
    },
    /// It is accepted, and the connection's stream limit becomes this by another SETTINGS; streams above a limit that
    /// fell are reset with `REFUSED_STREAM`.
    StreamLimit {
        /// `MAX_CONCURRENT_STREAMS`
        limit: u32,
    },
    /// The connection is sent GOAWAY. One that goes away already is not sent another: the push is accepted.
    GoAway {
        /// What becomes of the open streams.
        #[serde(default)]
        last_stream: LastStream,
        /// The HTTP/2 error code.
        #[serde(default)]
        code: u32,
        /// The debug data; absent: `{"reason":"Shutdown"}`.
        #[serde(default)]
        debug: Option<String>,
        /// Whether it is sent two times in a row.
        #[serde(default)]
        twice: bool,
    },
}

/// A scripted behaviour.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The environment it is for; absent: both.
    #[serde(default)]
    pub environment: Option<Environment>,
    /// A device token in hex, or [`ANY_TOKEN`].
    pub token: String,
    /// How many pushes it is for; absent: all.
    #[serde(default)]
    pub times: Option<u32>,
    /// How long the answer waits.
    #[serde(default)]
    pub delay_ms: u64,
    /// What happens then.
    pub action: Action,
}

impl Script {
    /// A script for every push to `token` in both environments, at once.
    #[must_use]
    pub fn new(token: impl Into<String>, action: Action) -> Self {
        Self { environment: None, token: token.into(), times: None, delay_ms: 0, action }
    }

    /// The same for the next `times` pushes only.
    #[must_use]
    pub const fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }

    /// The same, answered after `delay_ms`.
    #[must_use]
    pub const fn after_ms(mut self, delay_ms: u64) -> Self {
        self.delay_ms = delay_ms;
        self
    }
}

/// What check 9 found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) delay_ms: u64,
    pub(super) action: FaultAction,
}

/// An [`Action`] made ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FaultAction {
    Answer(Answer),
    Stall { accepted: bool },
    Reset { code: u32, accepted: bool },
    Close { accepted: bool },
    CloseTls { accepted: bool },
    HalfOpen { accepted: bool },
    Wedge { accepted: bool },
    StreamLimit { limit: u32 },
    GoAway { last_stream: LastStream, code: u32, debug: String, twice: bool },
}

impl FaultAction {
    /// The same, where a 410 without a timestamp says `now`.
    pub(super) fn stamped(mut self, now: Timestamp) -> Self {
        if let Self::Answer(answer) = &mut self
            && answer.status() == 410
            && let Answer::Refused(_, timestamp) | Answer::Other { timestamp, .. } = answer
        {
            timestamp.get_or_insert(now);
        }
        self
    }
}

/// The debug data of a GOAWAY, as Apple sends it when a server goes away.
pub(super) const SHUTDOWN_DEBUG: &str = r#"{"reason":"Shutdown"}"#;

impl From<&Action> for FaultAction {
    fn from(action: &Action) -> Self {
        match action {
            Action::Accept => Self::Answer(Answer::Accepted),
            Action::Answer { status, reason, timestamp_ms } => {
                let timestamp = timestamp_ms.map(Timestamp::from_millis);
                Self::Answer(Answer::from_parts(*status, reason.as_deref(), timestamp))
            }
            Action::Stall { accepted } => Self::Stall { accepted: *accepted },
            Action::Reset { code, accepted } => Self::Reset { code: *code, accepted: *accepted },
            Action::Close { accepted } => Self::Close { accepted: *accepted },
            Action::CloseTls { accepted } => Self::CloseTls { accepted: *accepted },
            Action::HalfOpen { accepted } => Self::HalfOpen { accepted: *accepted },
            Action::Wedge { accepted } => Self::Wedge { accepted: *accepted },
            Action::StreamLimit { limit } => Self::StreamLimit { limit: *limit },
            Action::GoAway { last_stream, code, debug, twice } => Self::GoAway {
                last_stream: *last_stream,
                code: *code,
                debug: debug.clone().unwrap_or_else(|| SHUTDOWN_DEBUG.to_owned()),
                twice: *twice,
            },
        }
    }
}

/// The scripts of one simulator. A clone is another handle on the same scripts.
#[derive(Debug, Clone, Default)]
pub struct Scripts {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: PerEnvironment<Mutex<HashMap<String, VecDeque<Script>>>>,
    /// How many there are, so that a simulator without any takes no lock.
    count: AtomicUsize,
}

impl Scripts {
    /// Adds a script behind those its token has already. One that is for both environments counts its pushes in each.
    pub fn add(&self, mut script: Script) {
        script.token.make_ascii_lowercase();
        for environment in Environment::ALL {
            if script.environment.is_none_or(|only| only == environment) && script.times != Some(0) {
                let mut waiting = self.shared.waiting.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
                waiting.entry(script.token.clone()).or_default().push_back(script.clone());
                self.shared.count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Removes the scripts of one token, or all. Says how many.
    pub fn clear(&self, token: Option<&str>) -> usize {
        let token = token.map(str::to_ascii_lowercase);
        let mut removed = 0;
        for environment in Environment::ALL {
            let mut waiting = self.shared.waiting.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|own, scripts| {
                let keep = token.as_ref().is_some_and(|token| token != own);
                removed += if keep { 0 } else { scripts.len() };
                keep
            });
        }
        self.shared.count.fetch_sub(removed, Ordering::Relaxed);
        removed
    }

    /// What is still waiting in `environment`, with what is left of each.
    #[must_use]
    pub fn list(&self, environment: Environment) -> Vec<Script> {
        let waiting = self.shared.waiting.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = waiting
            .values()
            .flatten()
            .cloned()
            .map(|script| Script { environment: Some(environment), ..script })
            .collect();
        all.sort_by(|a, b| a.token.cmp(&b.token));
        all
    }

    /// Check 9: the behaviour scripted for a push to `token`, which is used up by this.
    pub(super) fn take(&self, environment: Environment, token: &str, now: Timestamp) -> Option<Fault> {
        if self.shared.count.load(Ordering::Relaxed) > 0 {
            let mut waiting = self.shared.waiting.of(environment).lock().unwrap_or_else(PoisonError::into_inner);
            for name in [token.to_ascii_lowercase().as_str(), ANY_TOKEN] {
                let Some(scripts) = waiting.get_mut(name) else { continue };
                let Some(script) = scripts.front_mut() else { continue };
                let fault = Fault { delay_ms: script.delay_ms, action: FaultAction::from(&script.action) };
                if let Some(times) = &mut script.times {
                    *times = times.saturating_sub(1);
                    if *times == 0 {
                        scripts.pop_front();
                        self.shared.count.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                if scripts.is_empty() {
                    waiting.remove(name);
                }
                return Some(fault);
            }
        }
        by_prefix(token, now)
    }
}

/// What a prefix asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// This reason, with its status; 410 carries the time of the answer as its timestamp.
    Reason(Reason),
    /// `410 ExpiredToken` without a timestamp.
    ExpiredTokenWithoutTimestamp,
    /// A status and reason that stand in no table of Apple's: clients must survive them.
    Unheard(u16, &'static str),
    /// The status with an empty body.
    NoBody(u16),
    /// Accepted, one second late.
    Slow,
    /// Never answered, not accepted.
    Stall,
    /// Accepted and never answered.
    AcceptedThenStall,
    /// `RST_STREAM(REFUSED_STREAM)`: not processed.
    Refused,
    /// Accepted, then `RST_STREAM(INTERNAL_ERROR)`.
    AcceptedThenReset,
    /// The connection is reset; not accepted.
    Close,
    /// Accepted, then the connection is reset.
    AcceptedThenClose,
    /// GOAWAY; this push and all before it are answered.
    GoAway,
    /// GOAWAY with the last stream before this one: not processed.
    GoAwayBefore,
    /// TCP stays up, the connection is neither read nor written any more; not accepted.
    HalfOpen,
    /// Accepted, then the same.
    AcceptedThenHalfOpen,
    /// Neither this push, which is not accepted, nor any later one of the connection is answered.
    Wedge,
    /// TLS and TCP are closed without GOAWAY; not accepted.
    CloseTls,
    /// Accepted, then the same.
    AcceptedThenCloseTls,
}

/// The codes that may follow [`PREFIX`], and what each does.
pub const PREFIXES: &[(&str, Behaviour)] = &[
    ("0001", Behaviour::Slow),
    ("0002", Behaviour::Stall),
    ("0003", Behaviour::AcceptedThenStall),
    ("0004", Behaviour::Refused),
    ("0005", Behaviour::AcceptedThenReset),
    ("0006", Behaviour::Close),
    ("0007", Behaviour::AcceptedThenClose),
    ("0008", Behaviour::GoAway),
    ("0009", Behaviour::GoAwayBefore),
    ("000a", Behaviour::HalfOpen),
    ("000b", Behaviour::AcceptedThenHalfOpen),
    ("000c", Behaviour::Wedge),
    ("000d", Behaviour::CloseTls),
    ("000e", Behaviour::AcceptedThenCloseTls),
    ("4000", Behaviour::Reason(Reason::BadCollapseId)),
    ("4001", Behaviour::Reason(Reason::BadDeviceToken)),
    ("4002", Behaviour::Reason(Reason::BadExpirationDate)),
    ("4003", Behaviour::Reason(Reason::BadMessageId)),
    ("4004", Behaviour::Reason(Reason::BadPriority)),
    ("4005", Behaviour::Reason(Reason::BadTopic)),
    ("4006", Behaviour::Reason(Reason::DeviceTokenNotForTopic)),
    ("4007", Behaviour::Reason(Reason::DuplicateHeaders)),
    ("4008", Behaviour::Reason(Reason::IdleTimeout)),
    ("4009", Behaviour::Reason(Reason::InvalidPushType)),
    ("400a", Behaviour::Reason(Reason::MissingDeviceToken)),
    ("400b", Behaviour::Reason(Reason::MissingTopic)),
    ("400c", Behaviour::Reason(Reason::PayloadEmpty)),
    ("400d", Behaviour::Reason(Reason::TopicDisallowed)),
    ("400e", Behaviour::Unheard(400, "NeverHeardOf")),
    ("400f", Behaviour::NoBody(400)),
    ("4030", Behaviour::Reason(Reason::BadCertificate)),
    ("4031", Behaviour::Reason(Reason::BadCertificateEnvironment)),
    ("4032", Behaviour::Reason(Reason::BadEnvironmentKeyIdInToken)),
    ("4033", Behaviour::Reason(Reason::BadEnvironmentKeyInToken)),
    ("4034", Behaviour::Reason(Reason::ExpiredProviderToken)),
    ("4035", Behaviour::Reason(Reason::Forbidden)),
    ("4036", Behaviour::Reason(Reason::InvalidProviderToken)),
    ("4037", Behaviour::Reason(Reason::MissingProviderToken)),
    ("4038", Behaviour::Reason(Reason::UnrelatedKeyIdInToken)),
    ("4040", Behaviour::Reason(Reason::BadPath)),
    ("4050", Behaviour::Reason(Reason::MethodNotAllowed)),
    ("4100", Behaviour::Reason(Reason::Unregistered)),
    ("4101", Behaviour::Reason(Reason::ExpiredToken)),
    ("4102", Behaviour::ExpiredTokenWithoutTimestamp),
    ("4130", Behaviour::Reason(Reason::PayloadTooLarge)),
    ("4180", Behaviour::Unheard(418, "NeverHeardOf")),
    ("4290", Behaviour::Reason(Reason::TooManyRequests)),
    ("4291", Behaviour::Reason(Reason::TooManyProviderTokenUpdates)),
    ("5000", Behaviour::Reason(Reason::InternalServerError)),
    ("500f", Behaviour::NoBody(500)),
    ("5030", Behaviour::Reason(Reason::ServiceUnavailable)),
    ("5031", Behaviour::Reason(Reason::Shutdown)),
];

/// The behaviour a device token asks for by its first ten digits.
fn by_prefix(token: &str, now: Timestamp) -> Option<Fault> {
    let (prefix, rest) = token.split_at_checked(PREFIX.len())?;
    if !prefix.eq_ignore_ascii_case(PREFIX) {
        return None;
    }
    let (code, _) = rest.split_at_checked(4)?;
    let (_, behaviour) = PREFIXES.iter().find(|(row, _)| row.eq_ignore_ascii_case(code))?;
    let action = match *behaviour {
        Behaviour::Reason(reason) => {
            FaultAction::Answer(Answer::Refused(reason, (reason.status() == 410).then_some(now)))
        }
        Behaviour::ExpiredTokenWithoutTimestamp => FaultAction::Answer(Answer::refusal(Reason::ExpiredToken)),
        Behaviour::Unheard(status, reason) => {
            FaultAction::Answer(Answer::Other { status, reason: Some(reason.to_owned()), timestamp: None })
        }
        Behaviour::NoBody(status) => FaultAction::Answer(Answer::Other { status, reason: None, timestamp: None }),
        Behaviour::Slow => FaultAction::Answer(Answer::Accepted),
        Behaviour::Stall => FaultAction::Stall { accepted: false },
        Behaviour::AcceptedThenStall => FaultAction::Stall { accepted: true },
        Behaviour::Refused => FaultAction::Reset { code: h2::Reason::REFUSED_STREAM.into(), accepted: false },
        Behaviour::AcceptedThenReset => FaultAction::Reset { code: h2::Reason::INTERNAL_ERROR.into(), accepted: true },
        Behaviour::Close => FaultAction::Close { accepted: false },
        Behaviour::AcceptedThenClose => FaultAction::Close { accepted: true },
        Behaviour::HalfOpen => FaultAction::HalfOpen { accepted: false },
        Behaviour::AcceptedThenHalfOpen => FaultAction::HalfOpen { accepted: true },
        Behaviour::Wedge => FaultAction::Wedge { accepted: false },
        Behaviour::CloseTls => FaultAction::CloseTls { accepted: false },
        Behaviour::AcceptedThenCloseTls => FaultAction::CloseTls { accepted: true },
        Behaviour::GoAway => {
            FaultAction::from(&Action::GoAway { last_stream: LastStream::All, code: 0, debug: None, twice: false })
        }
        Behaviour::GoAwayBefore => FaultAction::from(&Action::GoAway {
            last_stream: LastStream::BeforeThis,
            code: 0,
            debug: None,
            twice: false,
        }),
    };
    Some(Fault { delay_ms: if *behaviour == Behaviour::Slow { 1000 } else { 0 }, action })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_795_372_500_123);

    fn answer(token: &str) -> Option<Answer> {
        match by_prefix(token, NOW)?.action {
            FaultAction::Answer(answer) => Some(answer),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_prefix_forces_a_row_of_the_table() {
        assert_eq!(answer("fa17ed4001aa"), Some(Answer::Refused(Reason::BadDeviceToken, None)));
        assert_eq!(answer("FA17ED410000"), Some(Answer::Refused(Reason::Unregistered, Some(NOW))));
        assert_eq!(answer("fa17ed4102"), Some(Answer::Refused(Reason::ExpiredToken, None)));
        assert_eq!(answer("fa17ed9999"), None, "an unknown code is an ordinary token");
        assert_eq!(answer("fa17ed"), None);
        assert_eq!(answer("fa17ed40"), None);
        assert_eq!(answer("aa17ed4001"), None);
    }

    #[test]
    fn every_documented_reason_has_a_prefix_that_begins_with_its_status() {
        for reason in Reason::ALL {
            let rows: Vec<_> =
                PREFIXES.iter().filter(|(_, behaviour)| *behaviour == Behaviour::Reason(*reason)).collect();
            assert_eq!(rows.len(), 1, "{reason:?}");
            assert!(rows[0].0.starts_with(&reason.status().to_string()), "{reason:?}");
        }
        let mut codes: Vec<_> = PREFIXES.iter().map(|(code, _)| code).collect();
        codes.dedup();
        assert_eq!(codes.len(), PREFIXES.len(), "sorted and distinct");
    }

    #[test]
    fn the_documentation_lists_every_prefix() {
        let page = include_str!("../../docs/simulator.md");
        for (code, behaviour) in PREFIXES {
            let row = match behaviour {
                Behaviour::Reason(reason) => format!("| `{PREFIX}{code}` | {} `{}`", reason.status(), reason.name()),
                _ => format!("| `{PREFIX}{code}` | "),
            };
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn scripts_of_a_token_are_used_up_in_order() {
        let scripts = Scripts::default();
        let status = |status| Action::Answer { status, reason: None, timestamp_ms: None };
        scripts.add(Script::new("AB", status(500)).times(2));
        scripts.add(Script::new("ab", status(503)).times(1));
        let taken = |token: &str| scripts.take(Environment::Sandbox, token, NOW).map(|fault| fault.action);
        let expected = |status| Some(FaultAction::Answer(Answer::Other { status, reason: None, timestamp: None }));
        assert_eq!(taken("cd"), None);
        assert_eq!(
            [taken("ab"), taken("Ab"), taken("ab"), taken("ab")],
            [expected(500), expected(500), expected(503), None]
        );
        assert_eq!(scripts.list(Environment::Production).len(), 2, "each environment counts for itself");
        assert_eq!(scripts.clear(None), 2);
        assert!(scripts.list(Environment::Production).is_empty());
    }

    #[test]
    fn a_script_for_the_token_goes_before_one_for_any_and_both_before_the_prefix() {
        let scripts = Scripts::default();
        scripts.add(Script::new("*", Action::Stall { accepted: false }).times(1));
        scripts.add(Script::new("fa17ed4001", Action::Accept).times(1));
        let next = || scripts.take(Environment::Sandbox, "fa17ed4001", NOW).map(|fault| fault.action);
        assert_eq!(next(), Some(FaultAction::Answer(Answer::Accepted)));
        assert_eq!(next(), Some(FaultAction::Stall { accepted: false }));
        assert_eq!(next(), Some(FaultAction::Answer(Answer::refusal(Reason::BadDeviceToken))));
    }

    #[test]
    fn a_scripted_answer_may_be_in_no_table() {
        let script: Script = serde_json::from_str(
            r#"{"token":"ab","times":3,"action":{"answer":{"status":410,"reason":"Unregistered","timestamp_ms":5}}}"#,
        )
        .unwrap();
        let known = FaultAction::Answer(Answer::Refused(Reason::Unregistered, Some(Timestamp::from_millis(5))));
        assert_eq!(FaultAction::from(&script.action), known);
        let odd = Action::Answer { status: 499, reason: Some("Odd".to_owned()), timestamp_ms: None };
        assert_eq!(
            FaultAction::from(&odd),
            FaultAction::Answer(Answer::Other { status: 499, reason: Some("Odd".to_owned()), timestamp: None })
        );
        let goaway: Script =
            serde_json::from_str(r#"{"token":"*","action":{"go_away":{"last_stream":{"exactly":5}}}}"#).unwrap();
        assert_eq!(
            goaway.action,
            Action::GoAway { last_stream: LastStream::Exactly(5), code: 0, debug: None, twice: false }
        );
    }
}
