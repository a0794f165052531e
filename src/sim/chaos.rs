//! Faults by rate: of every thousand pushes so many are refused, stalled, reset or sent away, and the same seed does it
//! again.
//!
//! Promises: what happens to an attempt is a pure function of the seed, the device token, the `apns-id`, and the
//! how-manieth attempt of that push it is, whatever else happens at the same time and on however many connections.
//! Whether a token is dead is a function of the seed and the token alone. A fault that takes the whole connection is
//! decided by the push that triggers it. A push that names no `apns-id` counts as the how-manieth of its token instead.
//! Only a push that passed every check, and that no script and no prefix is for, is decided here.
//!
//! The draws are the first and second four bytes, big-endian, of the SHA-256 over `push`, the seed (8 bytes), the
//! attempt (4 bytes), the `apns-id` (16 bytes) and the device token, each divided by 2³²: the first picks the fault, the
//! second the latency. For dead tokens it is the SHA-256 over `dead`, the seed and the token. So anyone can repeat them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    environment::{Environment, PerEnvironment},
    fault::{Action, Answer, Fault, FaultAction},
    ledger::Ledger,
    reason::Reason,
};
use crate::domain::clock::Timestamp;

/// The longest latency that may be asked for: an hour.
const MAX_LATENCY_MS: u64 = 3_600_000;

/// What shall go wrong in an environment, and how often.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChaosPlan {
    /// Another seed decides otherwise.
    pub seed: u64,
    /// Faults happen to the first so many attempts of a push only, so that none is put off for ever; absent: to all.
    /// Dead tokens and latency are for every attempt; pushes without an `apns-id` have but a first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affected_attempts: Option<u32>,
    /// The share of device tokens that are dead for good: `410 Unregistered`, with the time of the answer as timestamp.
    #[serde(default)]
    pub dead_tokens: f64,
    /// How long answers wait, besides the environment's latency; absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// The faults; each attempt has one of them or none, so their rates add up to at most 1.
    #[serde(default)]
    pub faults: Vec<RatedFault>,
}

/// A fault and how often it happens.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatedFault {
    /// The share of attempts it happens to, from 0 to 1.
    pub rate: f64,
    /// What happens. A 410 without `timestamp_ms` says the time of the answer.
    pub action: Action,
}

/// How long answers wait, in milliseconds, at most an hour.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Latency {
    /// All the same.
    FixedMs(u64),
    /// Anything from `min` to `max`, evenly.
    UniformMs {
        /// The shortest.
        min: u64,
        /// The longest.
        max: u64,
    },
    /// By percentiles, such as `p50` and `p99.9`, with `min` (absent: 0) and `max`; evenly between neighbours.
    PercentilesMs(BTreeMap<String, u64>),
}

/// Why a plan is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChaosError {
    /// A rate is not between 0 and 1.
    #[error("`{0}` is not a rate from 0 to 1")]
    Rate(String),
    /// The rates of the faults are too much together.
    #[error("the rates of `faults` add up to more than 1")]
    Sum,
    /// The latency is none.
    #[error("`latency`: {0}")]
    Latency(&'static str),
    /// Attempts cannot be counted.
    #[error("the ledger keeps no records, by which attempts are counted: start without `--no-ledger`")]
    NoRecords,
}

/// What was done by the plan of an environment so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct ChaosApplied {
    /// Attempts refused because their token is dead.
    pub dead_tokens: u64,
    /// Attempts by the fault that happened to them, in the order of the plan.
    pub faults: Vec<u64>,
}

impl Latency {
    /// Quantiles and their milliseconds, in order, from 0 to 1.
    fn curve(&self) -> Result<Vec<(f64, u64)>, ChaosError> {
        let curve = match self {
            Self::FixedMs(all) => vec![(0.0, *all), (1.0, *all)],
            Self::UniformMs { min, max } => vec![(0.0, *min), (1.0, *max)],
            Self::PercentilesMs(percentiles) => {
                let mut curve = Vec::with_capacity(percentiles.len() + 1);
                for (name, ms) in percentiles {
                    curve.push((quantile(name)?, *ms));
                }
                if !percentiles.contains_key("min") {
                    curve.push((0.0, 0));
                }
                curve.sort_by(|(a, _), (b, _)| a.total_cmp(b));
                curve
            }
        };
        if !curve.is_sorted_by(|(_, shorter), (_, longer)| shorter <= longer) {
            return Err(ChaosError::Latency("a higher percentile is shorter than a lower one"));
        }
        match curve.last() {
            Some((_, longest)) if *longest > MAX_LATENCY_MS => Err(ChaosError::Latency("longer than an hour")),
            Some((quantile, _)) if *quantile >= 1.0 => Ok(curve),
            _ => Err(ChaosError::Latency("`max` is missing")),
        }
    }
}

/// The quantile that a percentile's name means.
fn quantile(name: &str) -> Result<f64, ChaosError> {
    let percent: f64 = match name {
        "min" => return Ok(0.0),
        "max" => return Ok(1.0),
        _ => name.strip_prefix('p').and_then(|percent| percent.parse().ok()).unwrap_or(f64::NAN),
    };
    if percent > 0.0 && percent < 100.0 {
        Ok(percent / 100.0)
    } else {
        Err(ChaosError::Latency(
            "a percentile is `min`, `max`, or `p` with a number between 0 and 100, such as `p99.9`",
        ))
    }
}

/// A plan made ready.
#[derive(Debug)]
struct Ready {
    plan: ChaosPlan,
    curve: Vec<(f64, u64)>,
    /// With the sum of the rates up to and including each.
    faults: Vec<(f64, FaultAction)>,
    applied_dead: AtomicU64,
    applied: Vec<AtomicU64>,
    /// How many pushes without an `apns-id` came for each token.
    unnamed: Mutex<HashMap<Box<[u8]>, u32>>,
}

impl Ready {
    fn new(plan: ChaosPlan) -> Result<Self, ChaosError> {
        let is_rate = |name: &dyn Fn() -> String, rate: f64| {
            if (0.0..=1.0).contains(&rate) { Ok(rate) } else { Err(ChaosError::Rate(name())) }
        };
        is_rate(&|| "dead_tokens".to_owned(), plan.dead_tokens)?;
        let mut sum = 0.0;
        let mut faults = Vec::with_capacity(plan.faults.len());
        for (place, fault) in plan.faults.iter().enumerate() {
            sum += is_rate(&|| format!("faults[{place}].rate"), fault.rate)?;
            faults.push((sum, FaultAction::from(&fault.action)));
        }
        if sum > 1.0 + 1e-9 {
            return Err(ChaosError::Sum); // a little more is how tenths add up in binary
        }
        let curve = plan.latency.as_ref().map_or(Ok(Vec::new()), Latency::curve)?;
        let applied = faults.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Self { plan, curve, faults, applied_dead: AtomicU64::new(0), applied, unnamed: Mutex::default() })
    }

    /// Both draws of an attempt.
    fn draw(&self, token: &[u8], apns_id: Uuid, attempt: u32) -> (f64, f64) {
        let digest = Sha256::new()
            .chain_update(b"push")
            .chain_update(self.plan.seed.to_be_bytes())
            .chain_update(attempt.to_be_bytes())
            .chain_update(apns_id.as_bytes())
            .chain_update(token)
            .finalize();
        fractions(&digest)
    }

    fn is_dead(&self, token: &[u8]) -> bool {
        let seed = self.plan.seed.to_be_bytes();
        let digest = Sha256::new().chain_update(b"dead").chain_update(seed).chain_update(token).finalize();
        fractions(&digest).0 < self.plan.dead_tokens
    }

    fn latency_ms(&self, draw: f64) -> u64 {
        let above = self.curve.partition_point(|(quantile, _)| *quantile <= draw);
        let (Some((high, longer)), Some((low, shorter))) =
            (self.curve.get(above), above.checked_sub(1).and_then(|below| self.curve.get(below)))
        else {
            return 0;
        };
        let share = (draw - low) / (high - low);
        // In 2^32nds, because an hour of milliseconds is far from what this could overflow.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of at most 1")]
        let parts = (share * 4_294_967_296.0) as u64;
        shorter + (((longer - shorter) * parts) >> 32)
    }

    fn decide(&self, token: &[u8], apns_id: Option<Uuid>, attempt: u32, now: Timestamp) -> Fault {
        let (name, number, attempt) = match apns_id {
            Some(id) => (id, attempt, attempt),
            None => (Uuid::nil(), self.count_unnamed(token), 1),
        };
        let (draw, delay) = self.draw(token, name, number);
        let delay_ms = self.latency_ms(delay);
        if self.is_dead(token) {
            self.applied_dead.fetch_add(1, Ordering::Relaxed);
            let action = FaultAction::Answer(Answer::Refused(Reason::Unregistered, Some(now)));
            return Fault { delay_ms, action };
        }
        let is_affected = self.plan.affected_attempts.is_none_or(|first| attempt <= first);
        let fault = self.faults.iter().zip(&self.applied).find(|((sum, _), _)| is_affected && draw < *sum);
        let action = fault.map_or(FaultAction::Answer(Answer::Accepted), |((_, action), applied)| {
            applied.fetch_add(1, Ordering::Relaxed);
            action.clone().stamped(now)
        });
        Fault { delay_ms, action }
    }

    fn count_unnamed(&self, token: &[u8]) -> u32 {
        let mut unnamed = self.unnamed.lock().unwrap_or_else(PoisonError::into_inner);
        let number = unnamed.entry(Box::from(token)).or_default();
        *number = number.saturating_add(1);
        *number
    }
}

/// The first and second four bytes as fractions of 1.
fn fractions(digest: &[u8]) -> (f64, f64) {
    let (words, _) = digest.as_chunks::<4>();
    let mut words = words.iter().map(|word| f64::from(u32::from_be_bytes(*word)) / 4_294_967_296.0);
    (words.next().unwrap_or(0.0), words.next().unwrap_or(0.0))
}

/// The plans of both environments. A clone is another handle on the same plans.
#[derive(Debug, Clone)]
pub struct Chaos {
    plans: Arc<PerEnvironment<Current>>,
    ledger: Ledger,
}

#[derive(Debug, Default)]
struct Current {
    /// So that an environment without a plan takes no lock.
    is_set: AtomicBool,
    ready: RwLock<Option<Arc<Ready>>>,
}

impl Chaos {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self { plans: Arc::default(), ledger }
    }

    /// From now on `plan` decides in `environment`, on open connections too, instead of the plan before.
    ///
    /// # Errors
    /// [`ChaosError`] says what is wrong with it; nothing has changed then.
    pub fn set(&self, environment: Environment, plan: ChaosPlan) -> Result<(), ChaosError> {
        if !self.ledger.keeps_records() {
            return Err(ChaosError::NoRecords);
        }
        self.replace(environment, Some(Arc::new(Ready::new(plan)?)));
        Ok(())
    }

    /// Nothing goes wrong by itself any more. Says whether there was a plan.
    #[expect(clippy::must_use_candidate, reason = "the effect is what it is called for")]
    pub fn clear(&self, environment: Environment) -> bool {
        self.replace(environment, None).is_some()
    }

    fn replace(&self, environment: Environment, ready: Option<Arc<Ready>>) -> Option<Arc<Ready>> {
        let current = self.plans.of(environment);
        let mut place = current.ready.write().unwrap_or_else(PoisonError::into_inner);
        current.is_set.store(ready.is_some(), Ordering::Release);
        std::mem::replace(&mut *place, ready)
    }

    fn ready(&self, environment: Environment) -> Option<Arc<Ready>> {
        let current = self.plans.of(environment);
        if !current.is_set.load(Ordering::Acquire) {
            return None;
        }
        current.ready.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The plan of an environment, and what was done by it.
    #[must_use]
    pub fn plan(&self, environment: Environment) -> Option<(ChaosPlan, ChaosApplied)> {
        let ready = self.ready(environment)?;
        let applied = ChaosApplied {
            dead_tokens: ready.applied_dead.load(Ordering::Relaxed),
            faults: ready.applied.iter().map(|times| times.load(Ordering::Relaxed)).collect(),
        };
        Some((ready.plan.clone(), applied))
    }

    /// Whether the plan of an environment makes a device token a dead one, in either case of letters.
    #[must_use]
    pub fn is_dead(&self, environment: Environment, token: &str) -> bool {
        self.ready(environment).is_some_and(|ready| hex::decode(token).is_ok_and(|token| ready.is_dead(&token)))
    }

    /// What happens to an attempt, if there is a plan. `apns_id` is the push's own.
    pub(super) fn decide(
        &self,
        environment: Environment,
        token: &str,
        apns_id: Option<Uuid>,
        attempt: u32,
        now: Timestamp,
    ) -> Option<Fault> {
        let ready = self.ready(environment)?;
        Some(ready.decide(&hex::decode(token).ok()?, apns_id, attempt, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_795_372_500_123);

    fn ready(plan: serde_json::Value) -> Result<Ready, ChaosError> {
        Ready::new(serde_json::from_value(plan).unwrap())
    }

    #[test]
    fn the_draws_are_those_that_are_documented() {
        // Made with Python: hashlib.sha256(b"push" + seed + attempt + apns_id + token), as the module says.
        let id = Uuid::parse_str("123e4567-e89b-12d3-a456-4266554400a0").unwrap();
        let token = [0x00, 0xaa, 0x11, 0xbb];
        let draw = |seed, attempt| ready(serde_json::json!({ "seed": seed })).unwrap().draw(&token, id, attempt);
        assert_eq!(draw(42, 1), (0.057_281_787_507_236_004, 0.883_358_261_082_321_4));
        assert_eq!(draw(42, 2), (0.624_384_757_829_83, 0.719_664_923_846_721_6));
        assert_eq!(draw(43, 1), (0.259_132_441_831_752_66, 0.848_677_810_980_007));
        let dead = |rate: f64| ready(serde_json::json!({ "seed": 42, "dead_tokens": rate })).unwrap().is_dead(&token);
        assert!(dead(0.196_321_37) && !dead(0.196_321_36));
    }

    #[test]
    fn each_fault_happens_as_often_as_its_rate_says() {
        let plan = serde_json::json!({ "seed": 7, "faults": [
            { "rate": 0.01, "action": { "stall": {} } },
            { "rate": 0.0, "action": { "close": {} } },
            { "rate": 0.1, "action": { "reset": { "code": 2, "accepted": true } } },
        ] });
        let ready = ready(plan).unwrap();
        for number in 0..100_000 {
            ready.decide(&[1; 32], Some(Uuid::from_u128(number)), 1, NOW);
        }
        let applied: Vec<_> = ready.applied.iter().map(|times| times.load(Ordering::Relaxed)).collect();
        assert!((900..1100).contains(&applied[0]) && applied[1] == 0, "{applied:?}");
        assert!((9700..10_300).contains(&applied[2]), "{applied:?}");
    }

    #[test]
    fn latencies_lie_evenly_between_the_percentiles() {
        let latency = |latency: serde_json::Value, draw: f64| {
            ready(serde_json::json!({ "seed": 0, "latency": latency })).unwrap().latency_ms(draw)
        };
        let percentiles = serde_json::json!({ "percentiles_ms": { "p50": 10, "p99": 206, "max": 2206 } });
        for (draw, ms) in
            [(0.0, 0), (0.25, 5), (0.5, 10), (0.745, 108), (0.99, 206), (0.995, 1206), (0.999_999_9, 2205)]
        {
            assert_eq!(latency(percentiles.clone(), draw), ms, "{draw}");
        }
        assert_eq!(latency(serde_json::json!({ "fixed_ms": 20 }), 0.7), 20);
        assert_eq!(latency(serde_json::json!({ "uniform_ms": { "min": 100, "max": 300 } }), 0.25), 150);
        let from = serde_json::json!({ "percentiles_ms": { "min": 4, "p99.9": 4, "max": 8 } });
        assert_eq!((latency(from.clone(), 0.5), latency(from, 0.9995)), (4, 6));
    }

    #[test]
    fn a_plan_that_makes_no_sense_is_refused_with_the_reason() {
        for (plan, error) in [
            (serde_json::json!({ "seed": 1, "dead_tokens": 1.1 }), "`dead_tokens` is not a rate from 0 to 1"),
            (
                serde_json::json!({ "seed": 1, "faults": [{ "rate": 0.1, "action": "accept" }, { "rate": -0.1, "action": "accept" }] }),
                "`faults[1].rate` is not a rate from 0 to 1",
            ),
            (
                serde_json::json!({ "seed": 1, "faults": [{ "rate": 0.6, "action": "accept" }, { "rate": 0.5, "action": "accept" }] }),
                "the rates of `faults` add up to more than 1",
            ),
            (
                serde_json::json!({ "seed": 1, "latency": { "uniform_ms": { "min": 5, "max": 4 } } }),
                "`latency`: a higher percentile is shorter than a lower one",
            ),
            (
                serde_json::json!({ "seed": 1, "latency": { "percentiles_ms": { "p50": 4 } } }),
                "`latency`: `max` is missing",
            ),
            (serde_json::json!({ "seed": 1, "latency": { "fixed_ms": 3_600_001 } }), "`latency`: longer than an hour"),
        ] {
            assert_eq!(ready(plan).unwrap_err().to_string(), error);
        }
        let odd = serde_json::json!({ "seed": 1, "latency": { "percentiles_ms": { "p100": 4, "max": 5 } } });
        assert!(ready(odd).unwrap_err().to_string().contains("such as `p99.9`"));
        let tenths = serde_json::json!({ "rate": 0.1, "action": "accept" });
        assert!(ready(serde_json::json!({ "seed": 1, "faults": vec![tenths; 10] })).is_ok(), "ten tenths are 1");
    }
}
