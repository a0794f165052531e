//! The heartbeat: who is alive, and whether we ourselves still are.
//!
//! Promises: no two machines' clocks are compared. A replica whose counter was not seen to move for [`DEAD_AFTER`] of
//! our own monotonic time, while our own commits succeed, is dead: its work is given back. A replica that could not
//! bump its own counter for [`TRUSTED_FOR`] (it hung, it was stopped, its database is gone) writes nothing more to
//! APNs until it has: by then others may have taken over. One that finds itself declared dead joins anew, and what it
//! held is no longer its own. The connections to APNs are shared out among those that live. The heart waits for no work
//! of ours but the commits that take some on, and has a connection of its own: who is busy, or waits for somebody, is
//! alive.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    apns::Gateway,
    domain::clock::Clock,
    lifecycle::Tasks,
    store::{Kind, ReplicaId, Store, StoreError, intake::Identity},
};

/// How often the counter moves.
const EVERY: Duration = Duration::from_secs(1);

/// How long a counter may stand still.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// How long after the start of our last successful beat we may act as owner; less than [`DEAD_AFTER`], with room for a
/// push that is being written.
const TRUSTED_FOR: Duration = Duration::from_secs(4);

/// After a gap as long as this, in our looks or in the steps of our own counter, the others are watched from the beginning.
const GAP: Duration = Duration::from_secs(3);

/// Whether this replica may act as the owner of what it owns.
#[derive(Debug, Clone)]
pub(super) struct Pulse {
    clock: Arc<dyn Clock>,
    identity: Identity,
    /// Start of the last successful beat, in ms of the monotonic clock.
    beaten_at: Arc<AtomicU64>,
}

impl Pulse {
    /// How many replicas share the work, at least one.
    pub(super) fn living(&self) -> f64 {
        f64::from(self.identity.living())
    }

    /// Whether work leased to `replica` may still be acted on at this instant.
    pub(super) fn holds(&self, replica: ReplicaId) -> bool {
        self.identity.get() == replica && self.clock.monotonic() < self.trusted_until()
    }

    /// Until when, without another beat.
    pub(super) fn trusted_until(&self) -> Duration {
        Duration::from_millis(self.beaten_at.load(Ordering::Acquire)) + TRUSTED_FOR
    }

    fn beaten(&self, at: Duration) {
        self.beaten_at.store(u64::try_from(at.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// Joins, and keeps beating until the service stops. On SQLite every other replica is dead already: the file is
    /// locked by us.
    pub(super) async fn start(
        store: Arc<dyn Store>,
        gateway: Arc<dyn Gateway>,
        clock: Arc<dyn Clock>,
        identity: Identity,
        name: String,
        tasks: &Tasks,
    ) -> Result<Self, StoreError> {
        let pulse = Self { clock: Arc::clone(&clock), identity, beaten_at: Arc::default() };
        let at = clock.monotonic();
        pulse.identity.set(store.join(&name, env!("CARGO_PKG_VERSION"), clock.now()).await?);
        pulse.beaten(at);
        if store.kind() == Kind::Sqlite {
            for replica in store.replicas().await? {
                if replica.id != pulse.identity.get() {
                    store.bury(replica.id, replica.beat).await?;
                }
            }
        }
        let heart = Heart { store: Arc::clone(&store), pulse: pulse.clone(), name };
        let mut watch = Watch { store, gateway, pulse: pulse.clone(), counters: HashMap::new(), observed_at: at };
        watch.observe().await?;
        // Losing a beat, or a look, loses nothing.
        tasks.spawn_until_stopped("dispatch.pulse", async move { heart.beat().await });
        tasks.spawn_until_stopped("dispatch.watch", async move { watch.keep().await });
        Ok(pulse)
    }
}

/// Moves our own counter, and waits for nothing else: a take-over may take long.
struct Heart {
    store: Arc<dyn Store>,
    pulse: Pulse,
    name: String,
}

impl Heart {
    async fn beat(self) {
        loop {
            self.pulse.clock.sleep(EVERY).await;
            if let Err(error) = self.once().await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "no heartbeat: nothing more is sent until the database is back"
                );
            }
        }
    }

    async fn once(&self) -> Result<(), StoreError> {
        let started = self.pulse.clock.monotonic();
        if !self.store.beat(self.pulse.identity.get()).await? {
            let joined = self.store.join(&self.name, env!("CARGO_PKG_VERSION"), self.pulse.clock.now()).await?;
            tracing::warn!(
                replica = joined.0,
                "this replica was declared dead and joins anew: what it held belongs to others now"
            );
            self.pulse.identity.set(joined);
        }
        // As of the start: it may have taken so long that others have stopped waiting.
        self.pulse.beaten(started);
        Ok(())
    }
}

/// Watches the counters: the others', and our own beside them.
struct Watch {
    store: Arc<dyn Store>,
    gateway: Arc<dyn Gateway>,
    pulse: Pulse,
    /// What each counter showed, and since when on our own clock.
    counters: HashMap<ReplicaId, (i64, Duration)>,
    /// When we last looked: what happened before a gap proves nothing.
    observed_at: Duration,
}

impl Watch {
    async fn keep(mut self) {
        let clock = Arc::clone(&self.pulse.clock);
        loop {
            clock.sleep(EVERY).await;
            if let Err(error) = self.observe().await {
                // While we could not look, nobody can be said to have stood still.
                self.counters.clear();
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the other replicas cannot be seen: none is taken over from until they are"
                );
            }
        }
    }

    /// How long a counter has been seen to stand still; for ever, if there is none.
    fn still_for(&self, replica: ReplicaId, now: Duration) -> Duration {
        self.counters.get(&replica).map_or(Duration::MAX, |(_, since)| now.saturating_sub(*since))
    }

    async fn observe(&mut self) -> Result<(), StoreError> {
        let me = self.pulse.identity.get();
        let replicas = self.store.replicas().await?;
        self.pulse.identity.see(replicas.len());
        let before_us = replicas.iter().filter(|r| r.id < me).count();
        self.gateway.share_out(before_us, replicas.len());
        let now = self.pulse.clock.monotonic();
        if now.saturating_sub(self.observed_at) > GAP {
            self.counters.clear();
        }
        self.observed_at = now;
        self.counters.retain(|id, _| replicas.iter().any(|r| r.id == *id));
        for replica in &replicas {
            let seen = self.counters.entry(replica.id).or_insert((replica.beat, now));
            if seen.0 != replica.beat {
                *seen = (replica.beat, now);
            }
        }
        // Where ours does not move either, it may be the database.
        if self.still_for(me, now) > GAP {
            self.counters.clear();
            return Ok(());
        }
        for replica in replicas.iter().filter(|r| r.id != me) {
            if self.still_for(replica.id, now) >= DEAD_AFTER && self.store.bury(replica.id, replica.beat).await? {
                tracing::warn!(
                    replica = replica.id.0,
                    name = replica.name,
                    "the replica `{}` is dead: its work is taken over",
                    replica.name
                );
                self.counters.remove(&replica.id);
            }
        }
        Ok(())
    }
}
