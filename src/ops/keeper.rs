//! Keeping house: one replica at a time deletes what has been kept for as long as was promised.
//!
//! Promises: nothing is deleted before its time, and nothing that is open. Small steps with a pause after each, at most a
//! quarter of the time, and far less while due work waits. Of the replicas that are alive the one that joined first keeps
//! house; once it is dead, the next one does within seconds. What fails is tried again a minute later. Dropping the task
//! loses nothing: a step is one transaction.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::clock::{Clock, Timestamp},
    store::{
        Store, StoreError,
        intake::Identity,
        retention::{Place, Subject},
    },
    telemetry::names,
};

/// How long things are kept; `None`: for ever.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Notifications and their outcomes, from their end.
    pub notifications: Option<Duration>,
    /// Payloads, from their notification's end, where that is shorter.
    pub payloads: Option<Duration>,
    /// Devices that are inactive or suspended and do not register.
    pub inactive_devices: Option<Duration>,
    /// API keys, from their revocation or expiry.
    pub api_keys: Option<Duration>,
}

/// Idempotency keys are kept for this long after they came, and after their notification ended.
const IDEMPOTENCY: Duration = Duration::from_secs(24 * 3600);

/// From the end of a round to the next.
const ROUND_EVERY: Duration = Duration::from_secs(3600);

/// From the start to the first round.
const AT_FIRST: Duration = Duration::from_secs(5);

/// Between looks of those who do not keep house: whether they do now.
const WATCH_EVERY: Duration = Duration::from_secs(10);

/// From a round that failed to the next.
const SOON: Duration = Duration::from_secs(60);

/// How often payloads are walked through from the first one: what was open when the walk passed is found then.
const PAYLOADS_ANEW: Duration = Duration::from_secs(24 * 3600);

/// The shortest pause after a step.
const PAUSE: Duration = Duration::from_millis(50);

/// A pause is this many times as long as its step took.
const PAUSE_FACTOR: u32 = 3;

/// The pause while work is due and waits.
const LONG_PAUSE: Duration = Duration::from_secs(2);

/// How long work may be due before it counts as waiting.
const BEHIND: Duration = Duration::from_secs(5);

/// How a round ended.
enum Round {
    /// Everything that was due at this time has gone.
    Kept(Timestamp),
    /// Another replica keeps house.
    NotOurs,
}

/// The task that keeps house.
pub struct Keeper {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    identity: Identity,
    settings: Settings,
    /// Up to where payloads have been walked through, and since when on the monotonic clock.
    payloads: (Place, Duration),
}

impl Keeper {
    /// Does nothing yet. `identity` is the one under which this process has joined.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, identity: Identity, settings: Settings) -> Self {
        let payloads = (Place::default(), clock.monotonic());
        Self { store, clock, identity, settings, payloads }
    }

    /// Keeps house for ever.
    pub async fn run(mut self) {
        let mut pause = AT_FIRST;
        loop {
            self.clock.sleep(pause).await;
            pause = match self.round().await {
                Ok(Round::Kept(at)) => match self.store.record_house_kept(at).await {
                    Ok(()) => ROUND_EVERY,
                    Err(error) => failed(&error),
                },
                Ok(Round::NotOurs) => WATCH_EVERY,
                Err(error) => failed(&error),
            };
        }
    }

    /// Walks through everything once. What fails does not keep the rest from going; its error comes back at the end.
    async fn round(&mut self) -> Result<Round, StoreError> {
        let now = self.clock.now();
        let since = |kept: Option<Duration>| kept.map(|kept| now.minus(kept));
        let Settings { notifications, payloads, inactive_devices, api_keys } = self.settings;
        if self.clock.monotonic().saturating_sub(self.payloads.1) >= PAYLOADS_ANEW {
            self.payloads = (Place::default(), self.clock.monotonic());
        }
        let mut failure = None;
        for (subject, until) in [
            (Subject::Remains, Some(now)),
            // Payloads of what goes altogether need not be emptied first.
            (Subject::Notifications, since(notifications)),
            (Subject::Cohorts, since(notifications)),
            (Subject::Remains, Some(now)),
            (Subject::Payloads, since(payloads)),
            (Subject::IdempotencyKeys, since(Some(IDEMPOTENCY))),
            (Subject::NewlyInactive, inactive_devices.map(|_| now)),
            (Subject::InactiveDevices, since(inactive_devices)),
            (Subject::Tombstones, since(notifications)),
            (Subject::ApiKeys, since(api_keys)),
        ] {
            let Some(until) = until else { continue };
            match self.walk(subject, until).await {
                Ok(true) => {}
                Ok(false) => return Ok(Round::NotOurs),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(Round::Kept(now)), Err)
    }

    /// Walks through one subject, page by page. False if another replica keeps house.
    async fn walk(&mut self, subject: Subject, until: Timestamp) -> Result<bool, StoreError> {
        let mut place = if subject == Subject::Payloads { self.payloads.0.clone() } else { Place::default() };
        loop {
            let began = self.clock.monotonic();
            let Some(swept) = self.store.sweep(subject, &place, until, self.identity.get()).await? else {
                return Ok(false);
            };
            for (table, rows) in swept.deleted {
                names::retention_deleted(table, rows);
            }
            let Some(next) = swept.next else { return Ok(true) };
            place = next;
            if subject == Subject::Payloads {
                self.payloads.0 = place.clone();
            }
            let took = self.clock.monotonic().saturating_sub(began);
            self.clock.sleep(self.pause_after(took).await?).await;
        }
    }

    async fn pause_after(&self, took: Duration) -> Result<Duration, StoreError> {
        let due_at = self.store.next_due_at().await?;
        let behind = due_at.is_some_and(|at| self.clock.now().since(at) >= BEHIND);
        Ok(if behind { LONG_PAUSE } else { PAUSE.max(took * PAUSE_FACTOR) })
    }
}

fn failed(error: &StoreError) -> Duration {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "what has been kept long enough could not all be deleted: tried again in a minute"
    );
    SOON
}
