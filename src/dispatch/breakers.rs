//! Breakers: a credential that APNs refuses stops by itself, holds its work, and resumes by itself (promise 5).
//!
//! Promises: the first answer that blames our own key, topic or environment, or a wave of refused device tokens
//! (`wave.rs`), opens the breaker of that app, environment and credential, in memory at once and in the database for all
//! replicas; while it is open nothing of it leaves but one probe at a time, by one elected replica, rarely; no device is
//! touched. A probe whose answer shows the fault to be over closes it and sets the work free; a server's trouble or
//! silence does not. One that opens again soon after it closed is probed more rarely from the start.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use super::{
    send::Probe,
    wave::{End, Opinion, Refused, Waves},
};
use crate::{
    apns::Gateway,
    domain::{
        clock::{Clock, Timestamp},
        delivery::Judgement,
        device::DeviceSeq,
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
    /// What tells refused tokens apart from a mistake of ours.
    waves: Mutex<Waves>,
    past: Mutex<HashMap<Route, Past>>,
}

#[derive(Debug, Clone)]
struct Open {
    /// `None` until the database has it.
    id: Option<BreakerId>,
    fault: Fault,
    next_probe_at: Timestamp,
    /// By an operator.
    is_pause: bool,
}

/// What a route's breakers did before.
#[derive(Debug, Default)]
struct Past {
    /// The one that is open, once the database has it.
    open: Option<BreakerId>,
    /// How often in a row one has opened soon after the one before had closed.
    in_a_row: u32,
    closed_at: Option<Duration>,
}

/// A route that has been closed for so long has recovered.
const RECOVERED: Duration = Duration::from_secs(10 * 60);

impl Past {
    fn opens(&mut self, now: Duration) {
        let soon = self.closed_at.is_some_and(|at| now.saturating_sub(at) < RECOVERED);
        self.in_a_row = if soon { self.in_a_row.saturating_add(1) } else { 0 };
        self.closed_at = None;
    }

    fn closes(&mut self, now: Duration) {
        self.open = None;
        self.closed_at = Some(now);
    }
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
            waves: Mutex::default(),
            past: Mutex::default(),
        }
    }

    /// Whether nothing of this app may leave for this environment: a breaker is open, or an operator has paused it.
    #[must_use]
    pub fn is_open(&self, topic: &Topic, environment: Environment) -> bool {
        self.has(topic, environment, |_| true)
    }

    /// Whether a breaker is open for a fault.
    fn is_at_fault(&self, topic: &Topic, environment: Environment) -> bool {
        self.has(topic, environment, |open| !open.is_pause)
    }

    fn has(&self, topic: &Topic, environment: Environment, which: impl Fn(&Open) -> bool) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        !open.is_empty() && open.get(&(topic.clone(), environment)).is_some_and(which)
    }

    /// The open breaker's number, if the database has it.
    pub(super) fn id(&self, topic: &Topic, environment: Environment) -> Option<BreakerId> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&(topic.clone(), environment)).and_then(|open| open.id)
    }

    /// Whether a probe of this breaker may still leave: it is open, and no operator has paused the app meanwhile.
    pub(super) fn may_be_probed(&self, breaker: BreakerId) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().any(|open| open.id == Some(breaker) && !open.is_pause)
    }

    /// Breakers of other credentials whose work this replica may take.
    pub(super) fn passable(&self) -> Vec<BreakerId> {
        self.passable.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All open breakers, whosever credential they are about.
    pub(super) fn all(&self) -> Vec<BreakerId> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A push was accepted for a device that had been accepted there before.
    pub(super) fn accepted(&self, topic: &Topic, environment: Environment, device: DeviceSeq) {
        self.waves().accepted(topic, environment, device, self.clock.monotonic());
    }

    /// APNs refused a token for good; a wave opens the breaker at once. `passed`: the push went through an open breaker,
    /// which then says nothing of its answer.
    pub(super) fn refused(
        &self,
        topic: &Topic,
        environment: Environment,
        what: Refused,
        fault: &Fault,
        passed: bool,
    ) -> Opinion {
        if !passed && self.is_at_fault(topic, environment) {
            return Opinion::Judged(Judgement::Wave);
        }
        let opinion = self.waves().refused(topic, environment, what, self.clock.monotonic());
        if matches!(opinion, Opinion::Judged(Judgement::Wave)) {
            self.mark(topic, environment, fault);
        }
        opinion
    }

    /// What is thought of refusals there at this moment.
    pub(super) fn opinion(&self, topic: &Topic, environment: Environment) -> Opinion {
        if self.is_at_fault(topic, environment) {
            return Opinion::Judged(Judgement::Wave);
        }
        self.waves().pending(topic, environment).map_or(Opinion::Judged(Judgement::Healthy), Opinion::Pending)
    }

    /// Waits until it is known what is thought of a refusal. Dropping it loses nothing.
    pub(super) async fn judgement(
        &self,
        topic: &Topic,
        environment: Environment,
        opinion: Opinion,
        fault: &Fault,
    ) -> Judgement {
        let mut pending = match opinion {
            Opinion::Judged(judgement) => return judgement,
            Opinion::Pending(pending) => pending,
        };
        loop {
            if let Some(judgement) = *pending.borrow_and_update() {
                return judgement;
            }
            // Whoever waits and sees the time over ends the window, for all.
            let end = self.waves().end(topic, environment, self.clock.monotonic());
            match end {
                End::Judged(Judgement::Wave) => self.mark(topic, environment, fault),
                End::Judged(_) => {}
                End::Over => return pending.borrow().unwrap_or(Judgement::Unjudged),
                End::NotYet(rest) => tokio::select! {
                    told = pending.changed() => if told.is_err() {
                        return Judgement::Unjudged;
                    },
                    () = self.clock.sleep(rest) => {}
                },
            }
        }
    }

    fn waves(&self) -> MutexGuard<'_, Waves> {
        self.waves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn past<T>(&self, route: &Route, then: impl FnOnce(&mut Past) -> T) -> T {
        then(self.past.lock().unwrap_or_else(PoisonError::into_inner).entry(route.clone()).or_default())
    }

    /// Opens the breaker in memory, if it is not.
    fn mark(&self, topic: &Topic, environment: Environment, fault: &Fault) {
        let route = (topic.clone(), environment);
        let opens = self.change(|open| {
            if open.contains_key(&route) {
                return false;
            }
            let in_a_row = self.past(&route, |past| {
                past.opens(self.clock.monotonic());
                past.in_a_row
            });
            let next_probe_at = self.clock.now().plus(probe_delay(in_a_row));
            open.insert(route, Open { id: None, fault: fault.clone(), next_probe_at, is_pause: false });
            true
        });
        if opens {
            tracing::error!(
                topic = topic.as_str(),
                environment = environment.as_str(),
                apns.status = fault.status,
                apns.reason = fault.reason.as_str(),
                "the breaker of `{topic}` in {environment} opens: {fault}. {}",
                fault.cure()
            );
        }
    }

    /// Opens the breaker, in memory and in the database. If the database cannot be told it stays open in memory, and
    /// the next refresh tells it.
    pub(super) async fn trip(&self, topic: &Topic, environment: Environment, fault: &Fault) {
        self.mark(topic, environment, fault);
        let _one_at_a_time = self.tripping.lock().await;
        if self.id(topic, environment).is_none()
            && let Err(error) = self.record_unrecorded().await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "the breaker could not be recorded");
        }
    }

    /// A probe was refused like everything before it.
    pub(super) async fn probe_failed(&self, breaker: BreakerId, fault: &Fault) {
        if let Err(error) = self.store.probe_failed(breaker, fault).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "a probe that failed could not be counted");
        }
    }

    /// A probe went through: everything goes on.
    pub(super) async fn close(&self, topic: &Topic, environment: Environment, breaker: BreakerId) {
        // A refresh must not bring back what it read before.
        let _one_at_a_time = self.tripping.lock().await;
        match self.store.close_breaker(breaker, self.clock.now()).await {
            Ok(()) => {
                let route = (topic.clone(), environment);
                self.change(|open| {
                    if open.get(&route).is_some_and(|open| open.id == Some(breaker)) {
                        open.remove(&route);
                    }
                });
                self.closed(&route);
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

    /// What was refused before a breaker closed is no evidence any more.
    fn closed(&self, route: &Route) {
        self.past(route, |past| past.closes(self.clock.monotonic()));
        self.waves().forgive(&route.0, route.1);
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
        let ours =
            |b: &Breaker| self.gateway.fingerprint(&b.topic, b.environment).is_some_and(|f| *f.0 == *b.fingerprint);
        let faults: Vec<&Breaker> = known.iter().filter(|b| !b.is_pause() && ours(b)).collect();
        // A pause by the operator holds whatever the credential, and whatever else is open.
        let pauses: Vec<&Breaker> = known.iter().filter(|b| b.is_pause()).collect();
        self.change(|open| {
            // Kept: what is being opened right now and not in the database yet.
            open.retain(|_, open| open.id.is_none());
            for breaker in faults.iter().chain(&pauses) {
                open.insert(
                    (breaker.topic.clone(), breaker.environment),
                    Open {
                        id: Some(breaker.id),
                        fault: breaker.fault.clone(),
                        next_probe_at: breaker.next_probe_at,
                        is_pause: breaker.is_pause(),
                    },
                );
            }
        });
        self.remember(&faults);
        let passable = known
            .iter()
            .filter(|b| !b.is_pause() && !ours(b))
            .filter(|b| self.gateway.fingerprint(&b.topic, b.environment).is_some())
            .filter(|b| !self.is_open(&b.topic, b.environment))
            .map(|b| b.id)
            .collect();
        *self.passable.write().unwrap_or_else(PoisonError::into_inner) = passable;
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = known.iter().map(|b| b.id).collect();
        let now = self.clock.now();
        let mut probes = Vec::new();
        for breaker in faults.into_iter().filter(|b| b.next_probe_at <= now && b.parked > 0) {
            let route = (breaker.topic.clone(), breaker.environment);
            if !self.is_at_fault(&route.0, route.1) {
                continue; // Paused: not even a probe leaves.
            }
            let tried = self.past(&route, |past| past.in_a_row).saturating_add(breaker.probes);
            let next = now.plus(probe_delay(tried.saturating_add(1)));
            if self.store.elect_probe(breaker.id, now, next).await? {
                probes.push(Probe::new(breaker, next));
            }
        }
        Ok(probes)
    }

    /// Notes which breakers have been opened and closed by others.
    fn remember(&self, faults: &[&Breaker]) {
        let now = self.clock.monotonic();
        for breaker in faults {
            self.past(&(breaker.topic.clone(), breaker.environment), |past| {
                if past.open != Some(breaker.id) {
                    past.opens(now);
                    past.open = Some(breaker.id);
                }
            });
        }
        let closed: Vec<Route> = {
            let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            let is_open = |id| faults.iter().any(|b| b.id == id);
            past.iter().filter(|(_, p)| p.open.is_some_and(|id| !is_open(id))).map(|(route, _)| route.clone()).collect()
        };
        for route in closed {
            self.closed(&route);
        }
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
            let route = (topic, environment);
            self.past(&route, |past| past.open = Some(id));
            self.change(|all| {
                if let Some(open) = all.get_mut(&route) {
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
        change(&mut self.open.write().unwrap_or_else(PoisonError::into_inner))
    }
}
