//! The queue at work: what is owned is sent, what is left over is claimed, what ends is settled.
//!
//! Promises: work that this replica has just committed is sent from memory at once; scheduled, overflowing and orphaned
//! work is claimed, urgent first; a process killed at any point leaves nothing lost or stuck: its chunks are taken over
//! once its heartbeat has stopped. Memory is bounded by [`Settings::targets`] and by the store's room.
//!
//! | file | holds |
//! |---|---|
//! | this one | the loop: hand-over, claims, probes, the sweep for what was lost on the way |
//! | `send.rs` | one chunk from lease to last outcome |
//! | `fence.rs` | the last look before a push leaves |
//! | `settle.rs` | making outcomes durable |
//! | `pulse.rs` | heartbeats and take-overs |
//! | [`breakers`] | credentials that APNs refuses |
//! | `wave.rs` | whether refused tokens are bad, or a mistake of ours |
//! | `yielding.rs` | how a broadcast leaves the way free for urgent pushes |
//! | `backoff.rs` | devices that APNs wants left alone for a while |

mod backoff;
pub mod breakers;
mod fence;
mod pace;
mod pulse;
mod send;
mod settle;
mod slots;
mod wave;
mod yielding;

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, Notify, mpsc};

use self::{
    backoff::BusyDevices,
    breakers::Board,
    fence::{Guard, Reader},
    pace::Pace,
    pulse::Pulse,
    send::{Probe, Sender, Work},
    settle::Settler,
    slots::Slots,
    yielding::Traffic,
};
use crate::{
    apns::Gateway,
    domain::{
        clock::Clock,
        delivery::{CHUNK_TARGETS, ChunkKey},
        notification::Lane,
        topic::Topic,
    },
    lifecycle::Tasks,
    store::{
        Claimed, Lease, ReplicaId, Store, StoreError,
        intake::{Cancelled, Handed, Handover, Identity, Roster},
    },
};

/// Bounds and rhythms of the dispatcher.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The most open targets of claimed chunks in memory, in each lane; half as many where other replicas live, which
    /// could send the rest.
    pub targets: usize,
    /// The most chunks in one claim.
    pub claim: usize,
    /// How often left-over work is looked for when nobody says that there is some.
    pub poll_every: Duration,
    /// This process among others: host and process number.
    pub name: String,
    /// Of the apps that have such a limit.
    pub max_pushes_per_second: BTreeMap<Topic, NonZeroU32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            targets: 20_000,
            claim: 200,
            poll_every: Duration::from_millis(500),
            name: "sonnette".into(),
            max_pushes_per_second: BTreeMap::new(),
        }
    }
}

/// How often breakers are read: replicas agree within two seconds.
const REFRESH_EVERY: Duration = Duration::from_secs(1);

/// How many pushes are looked for and taken for one probe while nothing can be written for them: they end first, or wait
/// for something else.
const UNSPENT_TRIES: u32 = 20;

/// How many such probes may wait to be made again.
const UNSPENT: usize = 64;

/// How often what the database says is ours is compared with what we have.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// The dispatcher's handle.
pub struct Dispatcher {
    store: Arc<dyn Store>,
    identity: Identity,
    /// The heart beats longer than everything else: what is in flight must stay ours until it is settled.
    heart: Tasks,
}

impl Dispatcher {
    /// Joins as a replica and starts sending.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn start(
        store: Arc<dyn Store>,
        gateway: Arc<dyn Gateway>,
        clock: Arc<dyn Clock>,
        identity: Identity,
        handover: Handover,
        settings: Settings,
        tasks: &Tasks,
    ) -> Result<Self, StoreError> {
        let heart = Tasks::new();
        let name = settings.name.clone();
        let (beaten, sent) = (Arc::clone(&store), Arc::clone(&gateway));
        let pulse = Pulse::start(beaten, sent, Arc::clone(&clock), identity.clone(), name, &heart).await?;
        let (beating, stopping) = (heart.stopping().clone(), tasks.stopping().clone());
        tasks.spawn("dispatch.heart", async move {
            // A heart that stops by itself takes the service with it: nothing would be sent any more.
            tokio::select! {
                () = beating.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        });
        let board = Arc::new(Board::new(Arc::clone(&store), Arc::clone(&clock), Arc::clone(&gateway)));
        let owed = board.refresh().await?;
        let pace = Pace::start(&settings.max_pushes_per_second, &clock, &pulse, tasks);
        let sender = Arc::new(Sender {
            store: Arc::clone(&store),
            gateway,
            guard: Guard {
                clock: Arc::clone(&clock),
                pulse,
                board: Arc::clone(&board),
                reader: Reader::start(Arc::clone(&store), Arc::clone(&clock), tasks),
                cancelled: handover.cancelled.clone(),
            },
            settler: Settler::start(Arc::clone(&store), Arc::clone(&clock), identity.clone(), &tasks.in_background()),
            busy: BusyDevices::new(Arc::clone(&clock)),
            slots: Slots::default(),
            traffic: Traffic::new(),
            pace,
            stopping: tasks.stopping().clone(),
        });
        let (unspent, again) = mpsc::channel(UNSPENT);
        let desk = Desk {
            store: Arc::clone(&store),
            clock,
            identity: identity.clone(),
            claiming: Mutex::new(()),
            roster: handover.roster.clone(),
            sender,
            board,
            in_memory: Arc::new(InMemory::new(&handover.wake)),
            cancelled: handover.cancelled.clone(),
            settings,
            unspent,
            background: tasks.in_background(),
            tasks: tasks.clone(),
        };
        desk.start(handover, owed, again);
        Ok(Self { store, identity, heart })
    }

    /// Leaves in good order: what is still owned is given back. Call once every other task has ended, or was given up.
    ///
    /// # Errors
    /// If the database does not answer: then others take over once the heartbeat is missed.
    pub async fn leave(&self) -> Result<(), StoreError> {
        self.heart.stop();
        self.heart.ended().await;
        self.store.leave(self.identity.get()).await
    }
}

/// Open targets of claimed chunks in memory, by lane.
#[derive(Debug)]
struct InMemory {
    transactional: Room,
    bulk: Room,
}

/// The room of one lane.
#[derive(Debug)]
struct Room {
    held: AtomicUsize,
    /// A claim stopped though there was more to take.
    wanted: AtomicBool,
    /// With so many left, the claim that stopped goes on.
    enough_left: AtomicUsize,
    wake: Arc<Notify>,
}

impl InMemory {
    fn new(wake: &Arc<Notify>) -> Self {
        let room = || Room {
            held: AtomicUsize::new(0),
            wanted: AtomicBool::new(false),
            enough_left: AtomicUsize::new(0),
            wake: Arc::clone(wake),
        };
        Self { transactional: room(), bulk: room() }
    }

    const fn of(&self, lane: Lane) -> &Room {
        match lane {
            Lane::Transactional => &self.transactional,
            Lane::Bulk => &self.bulk,
        }
    }
}

impl Room {
    /// How many more targets there may be, of so many in all. Who is alone goes on early; others, who look for work less
    /// often than a quick one sends a piece, get theirs in the meantime.
    fn left_of(&self, targets: usize, alone: bool) -> usize {
        self.enough_left.store(if alone { targets / 4 * 3 } else { targets / 4 }, Ordering::Relaxed);
        targets.saturating_sub(self.held.load(Ordering::Relaxed))
    }

    fn leave(&self, targets: usize) {
        let left = self.held.fetch_sub(targets, Ordering::Relaxed).saturating_sub(targets);
        if left <= self.enough_left.load(Ordering::Relaxed) && self.wanted.swap(false, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }
}

/// A claimed chunk's share of the room; given back when it is dropped.
struct Weight {
    in_memory: Arc<InMemory>,
    lane: Lane,
    targets: usize,
}

impl Weight {
    fn new(in_memory: &Arc<InMemory>, lane: Lane, targets: usize) -> Self {
        in_memory.of(lane).held.fetch_add(targets, Ordering::Relaxed);
        Self { in_memory: Arc::clone(in_memory), lane, targets }
    }

    /// Gives back all but so many: the rest of the chunk has ended.
    fn shrink(&mut self, targets: usize) {
        let less = self.targets.saturating_sub(targets);
        self.targets -= less;
        self.in_memory.of(self.lane).leave(less);
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        self.in_memory.of(self.lane).leave(self.targets);
    }
}

struct Desk {
    store: Arc<dyn Store>,
    /// Held from before a claim's commit until its chunks are on the roster: the sweep must not look in between.
    claiming: Mutex<()>,
    clock: Arc<dyn Clock>,
    identity: Identity,
    roster: Roster,
    settings: Settings,
    sender: Arc<Sender>,
    board: Arc<Board>,
    in_memory: Arc<InMemory>,
    /// Probes for which nothing was written.
    unspent: mpsc::Sender<Probe>,
    cancelled: Cancelled,
    tasks: Tasks,
    /// For what is not urgent.
    background: Tasks,
}

impl Desk {
    /// Sends until the service stops: three tasks, so that what is handed over never waits for a claim.
    fn start(self, handover: Handover, owed: Vec<Probe>, again: mpsc::Receiver<Probe>) {
        let Handover { mut handed, wake, .. } = handover;
        let desk = Arc::new(self);
        let hand = Arc::clone(&desk);
        desk.tasks.spawn_until_stopped("dispatch.hand", async move {
            while let Some(Handed { lease, replica, entry, permit }) = handed.recv().await {
                hand.launch(Work { lease, replica, _entry: entry, _permit: permit, weight: None, probe: None });
            }
        });
        let claimer = Arc::clone(&desk);
        // Losing a claim in its middle leaves chunks that are ours and not in memory; they are given back when this replica
        // leaves.
        desk.background.spawn_until_stopped("dispatch.claim", async move {
            loop {
                // Registered before the look, so that what comes in between is not missed.
                let woken = wake.notified();
                // One lane after the other: of two claims at once one may skip what the other locks for a moment.
                let mut more = false;
                for lane in Lane::ALL {
                    more |= claimer.claim(lane).await;
                }
                if more {
                    continue;
                }
                tokio::select! {
                    () = woken => {}
                    () = claimer.clock.sleep(claimer.settings.poll_every) => {}
                }
            }
        });
        let upkeep = Arc::clone(&desk);
        desk.tasks.spawn_until_stopped("dispatch.upkeep", async move { upkeep.upkeep(owed, again).await });
    }

    /// Takes what is due in a lane. True if there may be more. Each lane has an allowance of its own: bulk that waits in
    /// memory never keeps urgent work out.
    async fn claim(&self, lane: Lane) -> bool {
        let lane_room = self.in_memory.of(lane);
        // What one takes into memory others cannot send.
        let alone = self.sender.guard.pulse.living() <= 1.0;
        let room = lane_room.left_of(if alone { self.settings.targets } else { self.settings.targets / 2 }, alone);
        // A bulk chunk is mostly full, an urgent one mostly of one.
        let max = match lane {
            Lane::Transactional => self.settings.claim.min(room),
            Lane::Bulk => self.settings.claim.min(room.div_ceil(CHUNK_TARGETS)),
        };
        if max == 0 {
            return false;
        }
        let _claiming = self.claiming.lock().await;
        let replica = self.identity.get();
        let now = self.clock.now();
        match self.store.claim(&[lane], max, &self.board.passable(), &self.board.all(), replica, now).await {
            Ok(Claimed { leases, more }) => {
                let more = more || leases.len() >= max;
                lane_room.wanted.store(more, Ordering::Relaxed);
                for lease in leases {
                    self.take(lease, replica, None);
                }
                more
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "nothing could be claimed");
                false
            }
        }
    }

    fn take(&self, lease: Lease, replica: ReplicaId, probe: Option<Probe>) {
        let weight = Some(Weight::new(&self.in_memory, lease.notification.lane, lease.chunk.targets.len()));
        let entry = self.roster.enter(lease.key.notification);
        self.launch(Work { lease, replica, _entry: entry, _permit: None, weight, probe });
    }

    fn launch(&self, mut work: Work) {
        let (sender, unspent) = (Arc::clone(&self.sender), self.unspent.clone());
        let tasks = match work.lease.notification.lane {
            Lane::Transactional => &self.tasks,
            Lane::Bulk => &self.background,
        };
        tasks.spawn_brief("dispatch.chunk", async move {
            let probe = sender.run(&mut work).await;
            // Its place and its room are free before another push is looked for.
            drop(work);
            if let Some(probe) = probe {
                // Full: the breaker's next interval will do.
                _ = unspent.try_send(probe);
            }
        });
    }

    /// Breakers, probes, what was cancelled, and the sweep.
    async fn upkeep(&self, mut owed: Vec<Probe>, mut again: mpsc::Receiver<Probe>) {
        let mut swept_at = self.clock.monotonic();
        loop {
            tokio::select! {
                () = self.clock.sleep(REFRESH_EVERY) => {}
                Some(probe) = again.recv() => {
                    // Nothing was written for it: the interval is not over for that.
                    owed.extend(self.probe(probe).await);
                    continue;
                }
            }
            match self.board.refresh().await {
                Ok(probes) => {
                    for probe in std::mem::take(&mut owed).into_iter().chain(probes) {
                        owed.extend(self.probe(probe).await);
                    }
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "breakers could not be read");
                }
            }
            match self.store.cancelled(self.clock.now()).await {
                Ok(ids) => self.cancelled.replace(ids),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "what was cancelled could not be read");
                }
            }
            let now = self.clock.monotonic();
            if now.saturating_sub(swept_at) >= SWEEP_EVERY {
                swept_at = now;
                self.sender.busy.sweep();
                if let Err(error) = self.sweep().await {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the sweep could not be made");
                }
            }
        }
    }

    /// Makes a probe. It comes back if it is owed: it could not be made yet, and its interval is not to be lost for that.
    async fn probe(&self, probe: Probe) -> Option<Probe> {
        let now = self.clock.now();
        if probe.unspent > UNSPENT_TRIES || now >= probe.until || !self.board.may_be_probed(probe.breaker) {
            return None;
        }
        let _claiming = self.claiming.lock().await;
        let replica = self.identity.get();
        if !self.sender.guard.pulse.holds(replica) {
            // Nothing may leave until the heart beats again.
            return Some(probe);
        }
        let tried = Probe { unspent: probe.unspent + 1, ..probe };
        match self.store.claim_probe(probe.breaker, replica, now).await {
            Ok(Some(lease)) => {
                self.take(lease, replica, Some(tried));
                None
            }
            // What was taken for it before may be on its way back.
            Ok(None) => Some(tried),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no probe could be made yet");
                Some(tried)
            }
        }
    }

    /// Gives back what the database says is ours and what is not in memory: an answer was lost on the way. And what is
    /// nobody's, though it bears a name.
    async fn sweep(&self) -> Result<(), StoreError> {
        let freed = self.store.free_orphans(self.clock.now()).await?;
        if freed > 0 {
            tracing::warn!(
                chunks = freed,
                "chunks of a replica that is gone, or behind a closed breaker, are given back"
            );
        }
        let replica = self.identity.get();
        if self.lost(replica).await?.is_empty() {
            return Ok(());
        }
        // Once more, when no claim is between its commit and the roster. Claims wait for that, so it is seldom asked.
        let _claiming = self.claiming.lock().await;
        let lost = self.lost(replica).await?;
        if !lost.is_empty() {
            tracing::warn!(chunks = lost.len(), "chunks that were lost on the way are given back");
            self.store.disown(&lost, replica).await?;
        }
        Ok(())
    }

    async fn lost(&self, replica: ReplicaId) -> Result<Vec<ChunkKey>, StoreError> {
        let owned = self.store.owned(replica).await?;
        Ok(owned.into_iter().filter(|key| !self.roster.holds(key.notification)).collect())
    }
}
