//! Breakers: a credential that APNs refuses stops by itself, holds its work, and resumes by itself (promise 5).
//!
//! Promises: the first answer that blames our own key, topic or environment opens the breaker of that app, environment
//! and credential, in memory at once and in the database for all replicas; while it is open nothing of it leaves but
//! one probe at a time, by one elected replica, rarely; no device is touched. A probe whose answer shows that APNs looked
//! at the push itself closes it and sets the work free; a server's trouble or silence does not.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::Duration,
};

use super::send::Probe;
use crate::{
    apns::Gateway,
    domain::{
        clock::{Clock, Timestamp},
        outcome::Fault,
        topic::{Environment, Topic},
    },
    store::{Breaker, BreakerId, Store, StoreError},
};

type Route = (Topic, Environment);

/// What is known of breakers. Refreshed from the database every second.
pub struct Board {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    gateway: Arc<dyn Gateway>,
    /// Open breakers of our own credentials.
    open: RwLock<HashMap<Route, Open>>,
    /// Open breakers of other credentials for apps that we serve with a healthy one: their work may be ours.
    passable: RwLock<Vec<BreakerId>>,
    /// All open breakers: what waits for one and has expired must still be counted.
    all: RwLock<Vec<BreakerId>>,
    /// Serialises opening, so that a thousand answers open one breaker.
    tripping: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone)]
struct Open {
    /// `None` until the database has it.
    id: Option<BreakerId>,
    fault: Fault,
    next_probe_at: Timestamp,
    probes: u32,
}

/// When the next probe may be made after so many that failed: soon once, for what passes by itself, then rarely.
fn probe_delay(failed: u32) -> Duration {
    Duration::from_secs(match failed {
        0 => 2,
        1 => 30,
        2 => 60,
        3 => 120,
        _ => 300,
    })
}

impl Board {
    /// Nothing known yet: the dispatcher reads it.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, gateway: Arc<dyn Gateway>) -> Self {
        Self {
            store,
            clock,
            gateway,
            open: RwLock::default(),
            passable: RwLock::default(),
            all: RwLock::default(),
            tripping: tokio::sync::Mutex::new(()),
        }
    }

    /// Whether the breaker of our credential for this app and environment is open.
    #[must_use]
    pub fn is_open(&self, topic: &Topic, environment: Environment) -> bool {
        let open = self.open.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        !open.is_empty() && open.contains_key(&(topic.clone(), environment))
    }

    /// The open breaker's number, if the database has it.
    pub(super) fn id(&self, topic: &Topic, environment: Environment) -> Option<BreakerId> {
        let open = self.open.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        open.get(&(topic.clone(), environment)).and_then(|open| open.id)
    }

    /// Breakers of other credentials whose work this replica may take.
    pub(super) fn passable(&self) -> Vec<BreakerId> {
        self.passable.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// All open breakers, whosever credential they are about.
    pub(super) fn all(&self) -> Vec<BreakerId> {
        self.all.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Opens the breaker, or counts a failed probe. `None`: the database could not be told; it stays open in memory.
    pub(super) async fn trip(
        &self,
        topic: &Topic,
        environment: Environment,
        fault: &Fault,
        probe: bool,
    ) -> Option<BreakerId> {
        let route = (topic.clone(), environment);
        let now = self.clock.now();
        let fresh = self.change(|open| {
            let fresh = !open.contains_key(&route);
            open.entry(route.clone()).or_insert(Open {
                id: None,
                fault: fault.clone(),
                next_probe_at: now.plus(probe_delay(0)),
                probes: 0,
            });
            fresh
        });
        let _one_at_a_time = self.tripping.lock().await;
        if !probe && let Some(id) = self.id(topic, environment) {
            return Some(id);
        }
        let fingerprint = self.gateway.fingerprint(topic, environment)?;
        if fresh {
            tracing::error!(
                topic = topic.as_str(),
                environment = environment.as_str(),
                apns.status = fault.status,
                apns.reason = fault.reason.as_str(),
                "the breaker of `{topic}` in {environment} opens: {fault}. {}",
                fault.cure()
            );
        }
        let failed = self.change(|open| {
            let open = open.get_mut(&route)?;
            if probe {
                open.probes += 1;
            }
            Some(open.probes)
        });
        let next_probe_at = now.plus(probe_delay(failed.unwrap_or(0)));
        match self.store.open_breaker(topic, environment, &fingerprint.0, fault, now, next_probe_at).await {
            Ok(id) => {
                self.change(|open| {
                    if let Some(open) = open.get_mut(&route) {
                        open.id = Some(id);
                        open.next_probe_at = next_probe_at;
                    }
                });
                Some(id)
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the breaker could not be recorded");
                None
            }
        }
    }

    /// A probe went through: everything goes on.
    pub(super) async fn close(&self, topic: &Topic, environment: Environment, breaker: BreakerId) {
        match self.store.close_breaker(breaker, self.clock.now()).await {
            Ok(()) => {
                self.change(|open| open.remove(&(topic.clone(), environment)));
                tracing::info!(
                    topic = topic.as_str(),
                    environment = environment.as_str(),
                    "the breaker of `{topic}` in {environment} closes: APNs answers again"
                );
            }
            // It stays open; the next probe closes it.
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the breaker could not be closed");
            }
        }
    }

    /// Reads what all replicas know, and elects this replica for probes that are due. Returns the breakers to probe.
    ///
    /// # Errors
    /// If the database does not answer: what was known stays.
    pub(super) async fn refresh(&self) -> Result<Vec<Probe>, StoreError> {
        // What is being opened meanwhile must not be forgotten for not having been in the answer.
        let _one_at_a_time = self.tripping.lock().await;
        self.record_unrecorded().await?;
        let known = self.store.breakers().await?;
        self.forget_orphans(&known).await?;
        // A pause by the operator holds whatever the credential.
        let ours = |b: &Breaker| {
            b.is_pause() || self.gateway.fingerprint(&b.topic, b.environment).is_some_and(|f| *f.0 == *b.fingerprint)
        };
        let now = self.clock.now();
        self.change(|open| {
            // Kept: what is being opened right now and not in the database yet.
            open.retain(|_, open| open.id.is_none());
            for breaker in known.iter().filter(|b| ours(b)) {
                open.insert(
                    (breaker.topic.clone(), breaker.environment),
                    Open {
                        id: Some(breaker.id),
                        fault: breaker.fault.clone(),
                        next_probe_at: breaker.next_probe_at,
                        probes: breaker.probes,
                    },
                );
            }
        });
        let passable = known
            .iter()
            .filter(|b| !ours(b))
            .filter(|b| self.gateway.fingerprint(&b.topic, b.environment).is_some())
            .filter(|b| !self.is_open(&b.topic, b.environment))
            .map(|b| b.id)
            .collect();
        *self.passable.write().unwrap_or_else(std::sync::PoisonError::into_inner) = passable;
        *self.all.write().unwrap_or_else(std::sync::PoisonError::into_inner) = known.iter().map(|b| b.id).collect();
        let mut probes = Vec::new();
        for breaker in known.iter().filter(|b| ours(b) && !b.is_pause() && b.next_probe_at <= now && b.parked > 0) {
            let next = now.plus(probe_delay(breaker.probes + 1));
            if self.store.elect_probe(breaker.id, now, next).await? {
                probes.push(Probe { breaker: breaker.id, environment: breaker.environment });
            }
        }
        Ok(probes)
    }

    /// What the database could not be told of when it happened.
    async fn record_unrecorded(&self) -> Result<(), StoreError> {
        let unrecorded: Vec<(Route, Open)> = self.change(|open| {
            open.iter().filter(|(_, open)| open.id.is_none()).map(|(r, o)| (r.clone(), o.clone())).collect()
        });
        for ((topic, environment), open) in unrecorded {
            let Some(fingerprint) = self.gateway.fingerprint(&topic, environment) else { continue };
            let now = self.clock.now();
            let id = self
                .store
                .open_breaker(&topic, environment, &fingerprint.0, &open.fault, now, open.next_probe_at)
                .await?;
            self.change(|all| {
                if let Some(open) = all.get_mut(&(topic, environment)) {
                    open.id = Some(id);
                }
            });
        }
        Ok(())
    }

    /// Closes breakers of a credential that nobody has any more: ours is another, nothing waits behind them, and no
    /// other replica is alive that could have it.
    async fn forget_orphans(&self, known: &[Breaker]) -> Result<(), StoreError> {
        let orphans: Vec<&Breaker> = known
            .iter()
            .filter(|b| b.parked == 0 && !b.is_pause())
            .filter(|b| self.gateway.fingerprint(&b.topic, b.environment).is_some_and(|f| *f.0 != *b.fingerprint))
            .collect();
        if !orphans.is_empty() && self.store.replicas().await?.len() == 1 {
            for orphan in orphans {
                self.store.close_breaker(orphan.id, self.clock.now()).await?;
            }
        }
        Ok(())
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Route, Open>) -> T) -> T {
        change(&mut self.open.write().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}
