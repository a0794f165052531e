//! Who calls, and whether they may.
//!
//! Promises: a secret is compared in constant time; a key that was revoked is refused within [`KEY_LIFE`]; an unknown id
//! and a wrong secret get the same answer, and only who knows the secret is told that a key is revoked or has expired.
//! A failed attempt costs a hash and, for ids nobody knows, one of a bounded number of reads.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::extract::FromRequestParts;
use http::{HeaderMap, header, request::Parts};
use tokio::sync::OnceCell;

use super::{
    Shared,
    problem::{Kind, Problem},
    request::Context,
};
use crate::{
    domain::{
        api_key::{ApiKey, ApiKeyId, PresentedKey, Scope},
        topic::Topic,
    },
    store::Store,
};

/// How long a key is remembered without asking the database again.
pub const KEY_LIFE: Duration = Duration::from_secs(2);

/// Keys that are remembered. Only keys that exist are.
const MAX_KEYS: usize = 4_096;

/// Reads for ids that nobody knows: so many at once, then so many a second.
const MISSES: f64 = 50.0;
const MISSES_PER_SECOND: f64 = 20.0;

/// After a failed read of a key, others do not try for this long: they would only queue up.
const AFTER_FAILURE: Duration = Duration::from_millis(250);

/// The caller of a request: its key was checked.
#[derive(Debug, Clone)]
pub(super) struct Caller(pub(super) Arc<ApiKey>);

impl FromRequestParts<Shared> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, Problem> {
        let caller = api.keys.authenticate(&parts.headers, api, Staleness::Short).await?;
        caller.sign(parts);
        Ok(caller)
    }
}

/// How old a remembered key may be when the database does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Staleness {
    /// [`KEY_LIFE`]: whatever changes or shows data.
    Short,
    /// Any: health and metrics are wanted most while the database is away.
    Any,
}

impl Caller {
    /// Leaves the key's id for the log.
    pub(super) fn sign(&self, parts: &Parts) {
        if let Some(context) = parts.extensions.get::<Arc<Context>>() {
            // A request has one caller.
            drop(context.key.set(self.0.id.clone()));
        }
    }

    /// Nothing, if the key has one of these scopes.
    pub(super) fn require(&self, scopes: &[Scope]) -> Result<(), Problem> {
        if scopes.iter().any(|scope| self.0.may(*scope)) {
            return Ok(());
        }
        let all: Vec<&str> = scopes.iter().map(|scope| scope.as_str()).collect();
        let named: Vec<String> = all.iter().map(|scope| format!("`{scope}`")).collect();
        Err(Problem::new(
            Kind::Forbidden,
            format!("This API key lacks the scope {}. An operator can make a key that has it.", named.join(" or ")),
        )
        .challenge(format!("Bearer realm=\"sonnette\", error=\"insufficient_scope\", scope=\"{}\"", all.join(" "))))
    }

    /// Nothing, if the key is for this app.
    pub(super) fn require_topic(&self, topic: &Topic) -> Result<(), Problem> {
        if self.0.is_for(topic) {
            Ok(())
        } else {
            Err(Problem::new(Kind::Forbidden, format!("This API key is not for the app `{topic}`.")))
        }
    }

    /// Whether it is an app's key, public in practice: it may register and neither send nor read.
    pub(super) fn is_an_app(&self) -> bool {
        !self.0.may(Scope::Send) && !self.0.may(Scope::Read) && !self.0.may(Scope::Admin)
    }
}

/// What a first read found; nothing if it failed.
type Flight = Arc<OnceCell<Option<Option<Arc<ApiKey>>>>>;

/// A part in a flight. The last to leave, and whoever leaves after it has ended, takes it off the list.
struct Passenger<'a> {
    flights: &'a Mutex<HashMap<ApiKeyId, Flight>>,
    id: &'a ApiKeyId,
    flight: Flight,
}

impl Drop for Passenger<'_> {
    fn drop(&mut self) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = flights.get(self.id).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight));
        // The list and this passenger hold it.
        if is_this && (self.flight.initialized() || Arc::strong_count(&self.flight) <= 2) {
            flights.remove(self.id);
        }
    }
}

/// Keys that were read lately.
pub(super) struct Keys {
    known: Mutex<HashMap<ApiKeyId, (Arc<ApiKey>, Duration)>>,
    misses: Mutex<Bucket>,
    /// First reads of keys, under way: one for all who wait for the same id.
    flights: Mutex<HashMap<ApiKeyId, Flight>>,
    /// One read for all who wait for one.
    reading: tokio::sync::Mutex<Option<Duration>>,
}

impl Keys {
    pub(super) fn new() -> Self {
        Self {
            known: Mutex::default(),
            misses: Mutex::new(Bucket { left: MISSES, filled_at: Duration::ZERO }),
            flights: Mutex::default(),
            reading: tokio::sync::Mutex::new(None),
        }
    }

    /// The caller that these headers prove.
    pub(super) async fn authenticate(
        &self,
        headers: &HeaderMap,
        api: &Shared,
        staleness: Staleness,
    ) -> Result<Caller, Problem> {
        let presented = presented(headers)?;
        let key = self.look_up(&presented.id, api, staleness).await?;
        let Some(key) = key.filter(|key| key.is(&presented)) else {
            return Err(refused("This API key is not known: its id or its secret is wrong."));
        };
        if key.revoked_at.is_some() {
            return Err(refused("This API key was revoked."));
        }
        if key.expires_at.is_some_and(|at| at <= api.services.clock.now()) {
            return Err(refused("This API key has expired."));
        }
        Ok(Caller(key))
    }

    async fn look_up(&self, id: &ApiKeyId, api: &Shared, staleness: Staleness) -> Result<Option<Arc<ApiKey>>, Problem> {
        let store: &dyn Store = api.services.store.as_ref();
        let now = || api.services.clock.monotonic();
        let Some((key, read_at)) = self.remembered(id) else {
            return self.first_look(id, api).await;
        };
        if now().saturating_sub(read_at) < KEY_LIFE {
            return Ok(Some(key));
        }
        let mut failed_at = self.reading.lock().await;
        // While this one waited, another may have read it, or found that it cannot be read.
        if let Some((key, read_at)) = self.remembered(id)
            && now().saturating_sub(read_at) < KEY_LIFE
        {
            return Ok(Some(key));
        }
        let stale = (staleness == Staleness::Any).then_some(key);
        if failed_at.is_some_and(|at| now().saturating_sub(at) < AFTER_FAILURE) {
            return stale.map(Some).ok_or_else(unavailable);
        }
        let began = now();
        let read = store.api_key(id).await;
        *failed_at = read.is_err().then(now);
        match read {
            Ok(key) => Ok(self.remember(id, key, began)),
            Err(error) => stale.map(Some).ok_or_else(|| error.into()),
        }
    }

    /// Reads a key that is not remembered, once for all who ask for it meanwhile.
    async fn first_look(&self, id: &ApiKeyId, api: &Shared) -> Result<Option<Arc<ApiKey>>, Problem> {
        let now = || api.services.clock.monotonic();
        let passenger = self.board(id, now()).ok_or_else(|| {
            Problem::new(Kind::TooManyRequests, "Too many requests with unknown API keys. Send this one again.")
                .retry_after(1)
        })?;
        let mut failure = None;
        let read = async {
            // The flight before this one may have landed in between.
            if let Some((key, _)) = self.remembered(id) {
                return Some(Some(key));
            }
            let began = now();
            match api.services.store.api_key(id).await {
                Ok(key) => Some(self.remember(id, key, began)),
                Err(error) => {
                    failure = Some(error);
                    None
                }
            }
        };
        let found = passenger.flight.get_or_init(|| read).await.clone();
        found.ok_or_else(|| failure.map_or_else(unavailable, Into::into))
    }

    /// A part in the first read of a key; none if it would be one too many.
    fn board<'a>(&'a self, id: &'a ApiKeyId, now: Duration) -> Option<Passenger<'a>> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(id) {
            return Some(Passenger { flights: &self.flights, id, flight: Arc::clone(flight) });
        }
        // Who comes just behind a flight that has landed costs nothing.
        if self.remembered(id).is_none() && !self.misses.lock().unwrap_or_else(PoisonError::into_inner).take(now) {
            return None;
        }
        let flight = Arc::clone(flights.entry(id.clone()).or_default());
        Some(Passenger { flights: &self.flights, id, flight })
    }

    fn remember(&self, id: &ApiKeyId, key: Option<ApiKey>, began: Duration) -> Option<Arc<ApiKey>> {
        let key = key.map(Arc::new);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &key {
            Some(key) => {
                if known.len() >= MAX_KEYS {
                    known.clear();
                }
                known.insert(id.clone(), (Arc::clone(key), began));
            }
            None => {
                known.remove(id);
            }
        }
        key
    }

    fn remembered(&self, id: &ApiKeyId) -> Option<(Arc<ApiKey>, Duration)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

fn unavailable() -> Problem {
    Problem::unavailable("The database does not answer. Nothing was kept; send the request again.", 2, None)
}

fn refused(detail: &'static str) -> Problem {
    Problem::new(Kind::Unauthorized, detail).challenge("Bearer realm=\"sonnette\", error=\"invalid_token\"".to_owned())
}

fn presented(headers: &HeaderMap) -> Result<PresentedKey, Problem> {
    let missing =
        |detail| Err(Problem::new(Kind::Unauthorized, detail).challenge("Bearer realm=\"sonnette\"".to_owned()));
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return missing("Send an API key: `Authorization: Bearer sonnette_…`.");
    };
    if values.next().is_some() {
        return missing("Send one Authorization header, not several.");
    }
    let text = value.to_str().unwrap_or_default();
    let Some((scheme, key)) = text.split_once(' ') else {
        return missing("The Authorization header must read `Bearer sonnette_…`.");
    };
    if !scheme.eq_ignore_ascii_case("bearer") {
        return missing("The Authorization header must read `Bearer sonnette_…`.");
    }
    PresentedKey::parse(key.trim()).map_or_else(
        || {
            Err(refused(
                "This is not an API key of Sonnette: one reads `sonnette_`, 16 hex digits, `_`, 64 hex digits.",
            ))
        },
        Ok,
    )
}

/// A token bucket on the monotonic clock.
struct Bucket {
    left: f64,
    filled_at: Duration,
}

impl Bucket {
    fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.filled_at).as_secs_f64();
        self.left = (self.left + passed * MISSES_PER_SECOND).min(MISSES);
        self.filled_at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_one_bearer_key_of_ours_is_read() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            }
            presented(&headers)
        };
        let key = PresentedKey::from_random([1; 8], [2; 32]).reveal();
        assert!(of(&[&format!("Bearer {key}")]).is_ok());
        assert!(of(&[&format!("bearer {key}")]).is_ok());
        for wrong in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["Basic dXNlcjpwYXNz"],
            &[key.as_str()],
            &[&format!("Bearer {key}"), &format!("Bearer {key}")],
        ] {
            let problem = of(wrong).unwrap_err();
            assert_eq!(problem.kind(), Kind::Unauthorized);
            assert!(!String::from_utf8(problem.body("r")).unwrap().contains(&key), "no key is repeated");
        }
    }

    #[test]
    fn unknown_ids_cost_a_bounded_number_of_reads() {
        let mut bucket = Bucket { left: MISSES, filled_at: Duration::ZERO };
        let taken = (0..1_000).filter(|_| bucket.take(Duration::from_secs(1))).count();
        assert_eq!(taken, 50);
        assert!(bucket.take(Duration::from_secs(2)), "it fills again");
    }
}
