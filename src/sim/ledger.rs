//! What arrived: counters, the truth about every push, accepted pushes, provider tokens and connections.
//!
//! Promises: counters are always kept and cost an atomic addition each. Accepted pushes are kept one by one only while
//! recording is on, at most [`Limits::max_pushes`] of them (the oldest go first), at about 120 bytes each and the bytes
//! of token, collapse id and body. A provider token is kept as its SHA-256 only. At most 10,000 provider tokens and
//! 10,000 closed connections are remembered. What grows with every push is [`truth`], which forgets nothing until it is
//! told to.

mod truth;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use uuid::Uuid;

use self::truth::Records;
pub(super) use self::truth::{Attempt, Stalled, Unproved};
pub use self::truth::{Summary, Truth, TruthQuery, Verdict};
use super::{
    environment::{Environment, PerEnvironment},
    fault::Answer,
    frames::Traffic,
    provider_token::{Claims, Switch},
    push_type::PushType,
    reason::Reason,
};
use crate::domain::clock::Timestamp;

const MAX_PROVIDER_TOKENS: usize = 10_000;
const MAX_CLOSED_CONNECTIONS: usize = 10_000;
const MAX_SWITCHES: usize = 1_000;

/// What the ledger keeps of accepted pushes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) record_attempts: bool,
    pub(super) record_pushes: bool,
    pub(super) max_pushes: usize,
}

/// One accepted push.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Push {
    /// Counts accepted pushes of both environments from 1.
    pub sequence: u64,
    /// When it was accepted.
    pub at: Timestamp,
    /// Where.
    pub environment: Environment,
    /// The device token, lower-case hex.
    pub token: String,
    /// `apns-topic`
    pub topic: String,
    /// `apns-push-type`
    pub push_type: Option<&'static str>,
    /// `apns-priority`
    pub priority: Option<u8>,
    /// `apns-expiration`, seconds since the epoch
    pub expiration: Option<u64>,
    /// `apns-collapse-id`
    pub collapse_id: Option<String>,
    /// The `apns-id`, in lower case whoever made it.
    #[serde(serialize_with = "as_text")]
    pub apns_id: Uuid,
    /// Whether the simulator made the `apns-id`.
    pub apns_id_made: bool,
    /// The connection it came on.
    pub connection: u64,
    /// Its HTTP/2 stream.
    pub stream: u32,
    /// The body as text; bytes that are no UTF-8 are replaced.
    pub body: String,
}

/// Which accepted pushes to list.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PushQuery {
    /// Only those with a higher sequence number.
    #[serde(default)]
    pub after: u64,
    /// At most this many; absent: 1,000.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Only this environment.
    #[serde(default)]
    pub environment: Option<Environment>,
    /// Only this device token, in either case.
    #[serde(default)]
    pub token: Option<String>,
    /// Only this topic.
    #[serde(default)]
    pub topic: Option<String>,
}

/// A device token and `apns-id` that were accepted more than once.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Repeat {
    /// Where.
    pub environment: Environment,
    /// The device token.
    pub token: String,
    /// The `apns-id`.
    #[serde(serialize_with = "as_text")]
    pub apns_id: Uuid,
    /// How often.
    pub times: u64,
}

/// A provider token that was seen.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ProviderTokenSeen {
    /// SHA-256 of the JWT, hex.
    pub fingerprint: String,
    /// Its `kid`.
    pub key_id: String,
    /// Its `iss`.
    pub team_id: String,
    /// Its `iat`, seconds since the epoch.
    pub issued_at: i64,
    /// When it was first accepted on a connection.
    pub first_seen: Timestamp,
    /// When a push with it was last accepted as authenticated.
    pub last_seen: Timestamp,
    /// The connections that used it.
    pub connections: Vec<u64>,
}

/// A change of provider token on a connection; the first use is one.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TokenSwitch {
    /// When.
    pub at: Timestamp,
    /// SHA-256 of the new JWT, hex.
    pub fingerprint: String,
    /// Its `iat`, seconds since the epoch.
    pub issued_at: i64,
}

/// A connection that was seen.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ConnectionSeen {
    /// Counts connections of both environments from 1.
    pub number: u64,
    /// Where.
    pub environment: Environment,
    /// When its TLS handshake was done.
    pub opened: Timestamp,
    /// When it ended; absent: it is open.
    pub closed: Option<Timestamp>,
    /// Requests received whole.
    pub requests: u64,
    /// Its provider tokens, in order.
    pub token_switches: Vec<TokenSwitch>,
}

/// The counters of one environment, or of both.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Requests received whole, body included.
    pub requests: u64,
    /// Requests that were given a status.
    pub answered: u64,
    /// Requests received whole and not answered: waiting, stalled, reset, or lost with their connection.
    pub unanswered: u64,
    /// Pushes accepted, whether the client heard of it or not.
    pub accepted: u64,
    /// Pushes accepted whose answer was withheld by a script.
    pub accepted_unanswered: u64,
    /// Refusals by `status reason`.
    pub refused: BTreeMap<String, u64>,
    /// Streams the simulator reset by script or because the stream limit had fallen.
    pub reset: u64,
    /// Streams the client gave up before their answer.
    pub cancelled: u64,
    /// Connections closed because they opened more streams than allowed.
    pub stream_limit_violations: u64,
    /// Connections whose TLS handshake succeeded.
    pub connections_opened: u64,
    /// Those of them that ended.
    pub connections_closed: u64,
    /// TLS handshakes that failed, those without ALPN `h2` included.
    pub tls_failures: u64,
    /// HTTP/2 bytes read, inside TLS.
    pub bytes_read: u64,
    /// HTTP/2 bytes written, inside TLS.
    pub bytes_written: u64,
}

/// The ledger of one simulator. A clone is another handle on the same ledger.
#[derive(Debug, Clone)]
pub struct Ledger {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tallies: PerEnvironment<Tally>,
    records: Records,
    recording: AtomicBool,
    max_pushes: usize,
    pushes: Mutex<Pushes>,
    provider_tokens: Mutex<HashMap<[u8; 32], Arc<TokenRecord>>>,
    connections: Mutex<VecDeque<Arc<ConnectionRecord>>>,
    connection_numbers: AtomicU64,
}

#[derive(Debug, Default)]
struct Pushes {
    next: u64,
    kept: VecDeque<Kept>,
}

/// The live counters of an environment.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) requests: AtomicU64,
    pub(super) answered: AtomicU64,
    pub(super) accepted: AtomicU64,
    pub(super) accepted_unanswered: AtomicU64,
    refused: Vec<AtomicU64>,
    other: Mutex<BTreeMap<String, u64>>,
    pub(super) reset: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) stream_limit_violations: AtomicU64,
    pub(super) connections_opened: AtomicU64,
    pub(super) connections_closed: AtomicU64,
    pub(super) tls_failures: AtomicU64,
    pub(super) traffic: Arc<Traffic>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            refused: Reason::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            requests: AtomicU64::default(),
            answered: AtomicU64::default(),
            accepted: AtomicU64::default(),
            accepted_unanswered: AtomicU64::default(),
            other: Mutex::default(),
            reset: AtomicU64::default(),
            cancelled: AtomicU64::default(),
            stream_limit_violations: AtomicU64::default(),
            connections_opened: AtomicU64::default(),
            connections_closed: AtomicU64::default(),
            tls_failures: AtomicU64::default(),
            traffic: Arc::default(),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Tally {
    /// An answer was given. Acceptance is counted by [`Ledger::accept`].
    pub(super) fn answered(&self, answer: &Answer) {
        count(&self.answered);
        match answer {
            Answer::Accepted => {}
            Answer::Refused(reason, _) => {
                if let Some(counter) = self.refused.get(reason.index()) {
                    count(counter);
                }
            }
            Answer::Other { status, reason, .. } => {
                let name = format!("{status} {}", reason.as_deref().unwrap_or("-"));
                *lock(&self.other).entry(name).or_default() += 1;
            }
        }
    }

    fn snapshot(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // `answered` before `requests`: a request between the two shows as unanswered, never as less than none.
        let answered = read(&self.answered);
        let requests = read(&self.requests);
        let mut refused = lock(&self.other).clone();
        for (reason, counter) in Reason::ALL.iter().zip(&self.refused) {
            if read(counter) > 0 {
                refused.insert(format!("{} {}", reason.status(), reason.name()), read(counter));
            }
        }
        Counters {
            requests,
            answered,
            unanswered: requests.saturating_sub(answered),
            accepted: read(&self.accepted),
            accepted_unanswered: read(&self.accepted_unanswered),
            refused,
            reset: read(&self.reset),
            cancelled: read(&self.cancelled),
            stream_limit_violations: read(&self.stream_limit_violations),
            connections_opened: read(&self.connections_opened),
            connections_closed: read(&self.connections_closed),
            tls_failures: read(&self.tls_failures),
            bytes_read: read(&self.traffic.read),
            bytes_written: read(&self.traffic.written),
        }
    }
}

impl Counters {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.unanswered += other.unanswered;
        self.accepted += other.accepted;
        self.accepted_unanswered += other.accepted_unanswered;
        self.reset += other.reset;
        self.cancelled += other.cancelled;
        self.stream_limit_violations += other.stream_limit_violations;
        self.connections_opened += other.connections_opened;
        self.connections_closed += other.connections_closed;
        self.tls_failures += other.tls_failures;
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        for (name, times) in &other.refused {
            *self.refused.entry(name.clone()).or_default() += times;
        }
    }
}

/// What a connection knows of a push it accepts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) at: Timestamp,
    pub(super) environment: Environment,
    pub(super) token: &'a str,
    pub(super) topic: &'a Arc<str>,
    pub(super) push_type: Option<PushType>,
    pub(super) priority: Option<u8>,
    pub(super) expiration: Option<u64>,
    pub(super) collapse_id: Option<&'a [u8]>,
    pub(super) apns_id: Uuid,
    pub(super) apns_id_made: bool,
    pub(super) connection: u64,
    pub(super) stream: u32,
    pub(super) body: &'a [u8],
}

/// An accepted push as it is kept: one allocation holds token, collapse id and body.
#[derive(Debug)]
struct Kept {
    sequence: u64,
    at: Timestamp,
    apns_id: Uuid,
    expiration: Option<u64>,
    connection: u64,
    topic: Arc<str>,
    packed: Box<[u8]>,
    stream: u32,
    token_bytes: u16,
    collapse_id_bytes: Option<u8>,
    priority: Option<u8>,
    push_type: Option<PushType>,
    environment: Environment,
    apns_id_made: bool,
}

impl Kept {
    fn new(sequence: u64, entry: &Entry<'_>) -> Self {
        let token = hex::decode(entry.token).unwrap_or_default(); // checked before: it is hex
        let collapse_id = entry.collapse_id.unwrap_or_default();
        let packed = [token.as_slice(), collapse_id, entry.body].concat().into_boxed_slice();
        Self {
            sequence,
            at: entry.at,
            apns_id: entry.apns_id,
            expiration: entry.expiration,
            connection: entry.connection,
            topic: Arc::clone(entry.topic),
            packed,
            stream: entry.stream,
            token_bytes: u16::try_from(token.len()).unwrap_or(0), // at most 256
            collapse_id_bytes: entry.collapse_id.map(|id| u8::try_from(id.len()).unwrap_or(0)), // at most 64
            priority: entry.priority,
            push_type: entry.push_type,
            environment: entry.environment,
            apns_id_made: entry.apns_id_made,
        }
    }

    fn parts(&self) -> (&[u8], &[u8], &[u8]) {
        let (token, rest) = self.packed.split_at_checked(usize::from(self.token_bytes)).unwrap_or_default();
        let (collapse_id, body) =
            rest.split_at_checked(usize::from(self.collapse_id_bytes.unwrap_or(0))).unwrap_or_default();
        (token, collapse_id, body)
    }

    fn show(&self) -> Push {
        let (token, collapse_id, body) = self.parts();
        Push {
            sequence: self.sequence,
            at: self.at,
            environment: self.environment,
            token: hex::encode(token),
            topic: self.topic.as_ref().to_owned(),
            push_type: self.push_type.map(PushType::name),
            priority: self.priority,
            expiration: self.expiration,
            collapse_id: self.collapse_id_bytes.map(|_| String::from_utf8_lossy(collapse_id).into_owned()),
            apns_id: self.apns_id,
            apns_id_made: self.apns_id_made,
            connection: self.connection,
            stream: self.stream,
            body: String::from_utf8_lossy(body).into_owned(),
        }
    }
}

/// The live record of a provider token.
#[derive(Debug)]
pub(super) struct TokenRecord {
    claims: Claims,
    first_seen: Timestamp,
    last_seen: AtomicI64,
    connections: Mutex<Vec<u64>>,
}

impl TokenRecord {
    /// It was used again.
    pub(super) fn used(&self, now: Timestamp) {
        self.last_seen.store(now.as_millis(), Ordering::Relaxed);
    }
}

/// The live record of a connection.
#[derive(Debug)]
pub(super) struct ConnectionRecord {
    pub(super) number: u64,
    environment: Environment,
    opened: Timestamp,
    pub(super) requests: AtomicU64,
    state: Mutex<(Option<Timestamp>, Vec<TokenSwitch>)>,
}

impl Ledger {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            shared: Arc::new(Shared {
                tallies: PerEnvironment::new(|_| Tally::default()),
                records: Records::new(limits.record_attempts),
                recording: AtomicBool::new(limits.record_pushes),
                max_pushes: limits.max_pushes,
                pushes: Mutex::default(),
                provider_tokens: Mutex::default(),
                connections: Mutex::default(),
                connection_numbers: AtomicU64::new(0),
            }),
        }
    }

    /// The counters of both environments together.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for environment in Environment::ALL {
            sum.add(&self.counters_of(environment));
        }
        sum
    }

    /// The counters of one environment.
    #[must_use]
    pub fn counters_of(&self, environment: Environment) -> Counters {
        self.tally(environment).snapshot()
    }

    /// Whether accepted pushes are kept one by one.
    pub fn record_pushes(&self, record: bool) {
        self.shared.recording.store(record, Ordering::Relaxed);
    }

    /// Accepted pushes, oldest first.
    #[must_use]
    pub fn pushes(&self, query: &PushQuery) -> Vec<Push> {
        let token = query.token.as_deref().map(|token| hex::decode(token).unwrap_or_default());
        let pushes = lock(&self.shared.pushes);
        let first = pushes.kept.front().map_or(0, |kept| kept.sequence);
        let skipped = usize::try_from(query.after.saturating_add(1).saturating_sub(first)).unwrap_or(usize::MAX);
        let wanted = |kept: &&Kept| {
            query.environment.is_none_or(|only| only == kept.environment)
                && query.topic.as_deref().is_none_or(|only| only == kept.topic.as_ref())
                && token.as_deref().is_none_or(|only| only == kept.parts().0)
        };
        pushes.kept.iter().skip(skipped).filter(wanted).take(query.limit.unwrap_or(1000)).map(Kept::show).collect()
    }

    /// The truth about pushes, by their first attempt, and the sequence number up to which was looked: pass it as
    /// `after` for the next page. Empty if attempts are not recorded.
    #[must_use]
    pub fn truth(&self, query: &TruthQuery) -> (Vec<Truth>, u64) {
        self.shared.records.list(query)
    }

    /// The truth about one push; absent: no attempt was received whole.
    #[must_use]
    pub fn truth_of(&self, environment: Environment, token: &str, apns_id: Uuid) -> Option<Truth> {
        self.shared.records.of(environment, token, apns_id)
    }

    /// The truth about all pushes in numbers.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.shared.records.summary()
    }

    /// Forgets the truth; an attempt under way leaves no trace then. Counters, accepted pushes, tokens and connections
    /// stay.
    pub fn clear_truth(&self) {
        self.shared.records.clear();
    }

    /// Pushes accepted more than once, by environment, device token and `apns-id`.
    #[must_use]
    pub fn repeats(&self) -> Vec<Repeat> {
        let repeat = |truth: Truth| Repeat {
            environment: truth.environment,
            token: truth.token,
            apns_id: truth.apns_id,
            times: truth.accepted,
        };
        let mut repeats: Vec<_> = self.shared.records.accepted_repeatedly().into_iter().map(repeat).collect();
        repeats.sort_by(|a, b| {
            (a.environment.name(), &a.token, a.apns_id).cmp(&(b.environment.name(), &b.token, b.apns_id))
        });
        repeats
    }

    /// The provider tokens accepted so far, by the time of their first use.
    #[must_use]
    pub fn provider_tokens(&self) -> Vec<ProviderTokenSeen> {
        let tokens = lock(&self.shared.provider_tokens);
        let mut all: Vec<_> = tokens
            .iter()
            .map(|(fingerprint, record)| ProviderTokenSeen {
                fingerprint: hex::encode(fingerprint),
                key_id: record.claims.key_id.clone(),
                team_id: record.claims.team_id.clone(),
                issued_at: record.claims.issued_at,
                first_seen: record.first_seen,
                last_seen: Timestamp::from_millis(record.last_seen.load(Ordering::Relaxed)),
                connections: lock(&record.connections).clone(),
            })
            .collect();
        drop(tokens);
        all.sort_by(|a, b| (a.first_seen, &a.fingerprint).cmp(&(b.first_seen, &b.fingerprint)));
        all
    }

    /// The connections seen so far, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionSeen> {
        let show = |record: &Arc<ConnectionRecord>| {
            let state = lock(&record.state);
            ConnectionSeen {
                number: record.number,
                environment: record.environment,
                opened: record.opened,
                closed: state.0,
                requests: record.requests.load(Ordering::Relaxed),
                token_switches: state.1.clone(),
            }
        };
        lock(&self.shared.connections).iter().map(show).collect()
    }

    /// Forgets the accepted pushes; counters, tokens and connections stay.
    pub fn clear_pushes(&self) {
        lock(&self.shared.pushes).kept.clear();
    }

    /// Whether every push has a record, in which its attempts are counted.
    pub(super) fn keeps_records(&self) -> bool {
        self.shared.records.is_kept()
    }

    pub(super) fn records(&self) -> &Records {
        &self.shared.records
    }

    pub(super) fn tally(&self, environment: Environment) -> &Tally {
        self.shared.tallies.of(environment)
    }

    /// Whether [`Ledger::accept`] wants to know more than that there was one.
    pub(super) fn is_recording(&self) -> bool {
        self.shared.recording.load(Ordering::Relaxed)
    }

    /// Counts an accepted push and keeps it.
    pub(super) fn accept(&self, entry: &Entry<'_>) {
        count(&self.tally(entry.environment).accepted);
        if self.is_recording() {
            let mut pushes = lock(&self.shared.pushes);
            pushes.next += 1;
            let kept = Kept::new(pushes.next, entry);
            pushes.kept.push_back(kept);
            while pushes.kept.len() > self.shared.max_pushes {
                pushes.kept.pop_front();
            }
        }
    }

    pub(super) fn connection_opened(&self, environment: Environment, now: Timestamp) -> Arc<ConnectionRecord> {
        count(&self.tally(environment).connections_opened);
        let record = Arc::new(ConnectionRecord {
            number: self.shared.connection_numbers.fetch_add(1, Ordering::Relaxed) + 1,
            environment,
            opened: now,
            requests: AtomicU64::new(0),
            state: Mutex::default(),
        });
        let mut connections = lock(&self.shared.connections);
        connections.push_back(Arc::clone(&record));
        if connections.len() > MAX_CLOSED_CONNECTIONS
            && let Some(oldest_closed) = connections.iter().position(|known| lock(&known.state).0.is_some())
        {
            connections.remove(oldest_closed);
        }
        record
    }

    pub(super) fn connection_closed(&self, record: &ConnectionRecord, now: Timestamp) {
        count(&self.tally(record.environment).connections_closed);
        lock(&record.state).0 = Some(now);
    }

    /// A connection began to use another provider token.
    pub(super) fn token_switched(
        &self,
        record: &ConnectionRecord,
        switch: &Switch,
        now: Timestamp,
    ) -> Option<Arc<TokenRecord>> {
        let fingerprint = hex::encode(switch.fingerprint);
        let mut state = lock(&record.state);
        if state.1.len() < MAX_SWITCHES {
            state.1.push(TokenSwitch { at: now, fingerprint, issued_at: switch.claims.issued_at });
        }
        drop(state);
        let mut tokens = lock(&self.shared.provider_tokens);
        if tokens.len() >= MAX_PROVIDER_TOKENS && !tokens.contains_key(&switch.fingerprint) {
            return None;
        }
        let token = tokens.entry(switch.fingerprint).or_insert_with(|| {
            Arc::new(TokenRecord {
                claims: switch.claims.clone(),
                first_seen: now,
                last_seen: AtomicI64::new(now.as_millis()),
                connections: Mutex::default(),
            })
        });
        let token = Arc::clone(token);
        drop(tokens);
        let mut connections = lock(&token.connections);
        if !connections.contains(&record.number) && connections.len() < MAX_CLOSED_CONNECTIONS {
            connections.push(record.number);
        }
        drop(connections);
        Some(token)
    }
}

fn as_text<S: serde::Serializer>(id: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// A poisoned lock means a panic elsewhere; what it guards here is never half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_795_372_500_123);

    fn accept(ledger: &Ledger, token: &str, topic: &str, id: u128) {
        ledger.accept(&Entry {
            at: NOW,
            environment: Environment::Sandbox,
            token,
            topic: &Arc::from(topic),
            push_type: Some(PushType::Alert),
            priority: Some(5),
            expiration: Some(0),
            collapse_id: Some(b"order-1042"),
            apns_id: Uuid::from_u128(id),
            apns_id_made: false,
            connection: 3,
            stream: 7,
            body: b"{\"aps\":{}}",
        });
    }

    fn ledger(max_pushes: usize) -> Ledger {
        Ledger::new(Limits { record_attempts: true, record_pushes: true, max_pushes })
    }

    #[test]
    fn an_accepted_push_is_shown_as_it_came() {
        let ledger = ledger(10);
        accept(&ledger, "AB01", "a.b", 1);
        let expected = Push {
            sequence: 1,
            at: NOW,
            environment: Environment::Sandbox,
            token: "ab01".to_owned(),
            topic: "a.b".to_owned(),
            push_type: Some("alert"),
            priority: Some(5),
            expiration: Some(0),
            collapse_id: Some("order-1042".to_owned()),
            apns_id: Uuid::from_u128(1),
            apns_id_made: false,
            connection: 3,
            stream: 7,
            body: "{\"aps\":{}}".to_owned(),
        };
        assert_eq!(ledger.pushes(&PushQuery::default()), [expected]);
    }

    #[test]
    fn pushes_are_listed_in_pages_and_by_token_and_topic() {
        let ledger = ledger(100);
        for n in 0..10 {
            accept(&ledger, if n % 2 == 0 { "ab" } else { "cd" }, if n < 5 { "a.b" } else { "a.c" }, n);
        }
        let sequences = |query: PushQuery| ledger.pushes(&query).iter().map(|push| push.sequence).collect::<Vec<_>>();
        assert_eq!(sequences(PushQuery { after: 3, limit: Some(3), ..PushQuery::default() }), [4, 5, 6]);
        assert_eq!(sequences(PushQuery { token: Some("AB".to_owned()), ..PushQuery::default() }), [1, 3, 5, 7, 9]);
        assert_eq!(sequences(PushQuery { topic: Some("a.c".to_owned()), after: 8, ..PushQuery::default() }), [9, 10]);
        assert_eq!(sequences(PushQuery { after: 10, ..PushQuery::default() }), [0; 0]);
        assert_eq!(sequences(PushQuery { environment: Some(Environment::Production), ..PushQuery::default() }), [0; 0]);
    }

    #[test]
    fn the_oldest_pushes_make_room_and_sequence_numbers_go_on() {
        let ledger = ledger(2);
        (0..5).for_each(|n| accept(&ledger, "ab", "a.b", n));
        let sequences: Vec<_> =
            ledger.pushes(&PushQuery { after: 1, ..PushQuery::default() }).iter().map(|push| push.sequence).collect();
        assert_eq!(sequences, [4, 5]);
        assert_eq!(ledger.counters().accepted, 5);
    }

    #[test]
    fn without_recording_only_counters_are_kept() {
        let ledger = ledger(100);
        ledger.record_pushes(false);
        accept(&ledger, "ab", "a.b", 1);
        assert!(ledger.pushes(&PushQuery::default()).is_empty());
        assert_eq!(ledger.counters_of(Environment::Sandbox).accepted, 1);
        assert_eq!(ledger.counters_of(Environment::Production).accepted, 0);
    }

    #[test]
    fn refusals_are_counted_by_status_and_reason() {
        let ledger = ledger(1);
        let tally = ledger.tally(Environment::Production);
        tally.answered(&Answer::refusal(Reason::BadTopic));
        tally.answered(&Answer::refusal(Reason::BadTopic));
        tally.answered(&Answer::Other { status: 418, reason: Some("Odd".to_owned()), timestamp: None });
        tally.answered(&Answer::Other { status: 500, reason: None, timestamp: None });
        let shown: Vec<_> = ledger.counters().refused.into_iter().collect();
        assert_eq!(shown, [("400 BadTopic".to_owned(), 2), ("418 Odd".to_owned(), 1), ("500 -".to_owned(), 1)]);
    }
}
