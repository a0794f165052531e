//! Making outcomes durable: small and soon.
//!
//! Promises: what was answered is settled within milliseconds, together with whatever else comes meanwhile, small chunks
//! apart from large ones; while the database is gone, settles wait and are repeated, and since every chunk waits for its own
//! settle, sending stops when the buffer is full. A settle with an old epoch changes nothing, and whoever sent it is told.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::sync::{
    Mutex, Notify,
    mpsc::{self, error::TrySendError},
    oneshot,
};

use crate::{
    domain::{
        clock::Clock,
        delivery::{Chunk, ChunkKey, DeviceEffect, SMALL_CHUNK},
        device::{DeviceSeq, DeviceToken},
    },
    lifecycle::Tasks,
    store::{Disposition, Seat, Settled, Store, StoreError, intake::Identity},
};

/// Progress of one chunk, on its way to the database.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) key: ChunkKey,
    pub(super) epoch: i64,
    pub(super) seat: Option<Seat>,
    pub(super) chunk: Chunk,
    pub(super) disposition: Disposition,
    pub(super) effects: Vec<(DeviceSeq, DeviceToken, DeviceEffect)>,
    pub(super) unique_ids: Vec<(u32, Box<str>)>,
    /// Not one of the many of a broadcast: a probe, which a breaker waits for, or what leaves memory.
    pub(super) at_once: bool,
}

/// What became of a settle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settlement {
    /// Committed.
    Done,
    /// Somebody else owns the chunk now; nothing was changed.
    Lost,
    /// The service was told to give up first. Whoever takes the chunk over will repeat what was not settled.
    GivenUp,
}

struct Waiting {
    progress: Progress,
    answer: oneshot::Sender<(Progress, Settlement)>,
}

/// The doors to the settling tasks.
#[derive(Debug, Clone)]
pub(super) struct Settler {
    /// Of a few, by hundreds a commit.
    small: Door,
    /// Of more than a hundred each: what a single one waits for does not stand behind them.
    large: Door,
}

#[derive(Debug, Clone)]
struct Door {
    results: mpsc::Sender<Waiting>,
    /// Somebody waits with a push until its mark is durable, or goes on with a chunk.
    hurry: Arc<Notify>,
}

/// Results that may wait for a commit.
const BUFFER: usize = 4_096;

/// The most chunks in one commit.
const GROUP: usize = 256;

/// How many commits with large chunks run at once: while one waits for its database, the next is gathered.
const LARGE_AT_ONCE: usize = 2;

/// So long a group that is not full waits for more, by the machine's time, if all of it has ended: nobody waits for that
/// to be durable as callers wait for their `202`, whose commits these would hold up. Once for each replica that lives, so
/// that together they commit about as often as one alone, but no longer than for [`GATHERED_BY`] of them.
const GATHER: Duration = Duration::from_millis(5);
const GATHERED_BY: u32 = 4;

/// The same for large chunks, whatever has become of them, but for no more than so many: others wait for their room.
const GATHERED_LARGE: usize = 6;

/// The pause between two tries while the database is gone.
const PAUSE: Duration = Duration::from_millis(250);

impl Settler {
    /// Starts the settling tasks. They end once every [`Settler`] is dropped, so that a drain settles everything.
    pub(super) fn start(store: Arc<dyn Store>, clock: Arc<dyn Clock>, identity: Identity, tasks: &Tasks) -> Self {
        let desk = Desk { store, clock, identity, tasks: tasks.clone() };
        Self {
            small: Door::open(&desk, 1, Wait::UntilHurried),
            large: Door::open(&desk, LARGE_AT_ONCE, Wait::UntilEnough),
        }
    }

    /// Hands progress over, and waits until it is committed; it comes back. Not cancellable: dropping the future does not undo
    /// the settle, unless the buffer is full.
    pub(super) fn settle(&self, progress: Progress) -> impl Future<Output = (Option<Progress>, Settlement)> + use<'_> {
        let (answer, answered) = oneshot::channel();
        let is_done = progress.chunk.is_done();
        let Door { results, hurry } =
            if progress.chunk.targets.len() > SMALL_CHUNK && !progress.at_once { &self.large } else { &self.small };
        // At once, because a future that takes progress along is several times as large. If nobody is there any more the
        // answer says so.
        let full = match results.try_send(Waiting { progress, answer }) {
            Err(TrySendError::Full(waiting)) => Some(results.send(waiting).boxed()),
            Ok(()) | Err(TrySendError::Closed(_)) => None,
        };
        async move {
            if let Some(room) = full {
                _ = room.await;
            }
            if !is_done {
                hurry.notify_one();
            }
            match answered.await {
                Ok((progress, settlement)) => (Some(progress), settlement),
                Err(_) => (None, Settlement::GivenUp),
            }
        }
    }
}

/// How long more is gathered for one commit.
#[derive(Debug, Clone, Copy)]
enum Wait {
    /// For [`GATHER`], unless somebody cannot go on without it.
    UntilHurried,
    /// For [`GATHER`], but for no more than [`GATHERED_LARGE`].
    UntilEnough,
}

impl Door {
    /// With so many tasks behind it.
    fn open(desk: &Desk, tasks: usize, wait: Wait) -> Self {
        let (results, waiting) = mpsc::channel::<Waiting>(BUFFER);
        let (waiting, hurry) = (Arc::new(Mutex::new(waiting)), Arc::new(Notify::new()));
        for _ in 0..tasks {
            let (desk, waiting, hurried) = (desk.clone(), Arc::clone(&waiting), Arc::clone(&hurry));
            desk.tasks.clone().spawn_brief("dispatch.settle", async move {
                while let Some(group) = desk.gather(&waiting, &hurried, wait).await {
                    // Two of one chunk, of an old and a new lease, must not share an answer.
                    let mut keys = HashSet::with_capacity(group.len());
                    let (first, again): (Vec<Waiting>, Vec<Waiting>) =
                        group.into_iter().partition(|w| keys.insert(w.progress.key));
                    desk.settle(first).await;
                    for alone in again {
                        desk.settle(vec![alone]).await;
                    }
                }
            });
        }
        Self { results, hurry }
    }
}

#[derive(Clone)]
struct Desk {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    identity: Identity,
    tasks: Tasks,
}

impl Desk {
    /// What is to be committed next; `None` once there will be no more.
    async fn gather(
        &self,
        waiting: &Mutex<mpsc::Receiver<Waiting>>,
        hurried: &Notify,
        wait: Wait,
    ) -> Option<Vec<Waiting>> {
        let mut waiting = waiting.lock().await;
        let mut group = Vec::new();
        waiting.recv_many(&mut group, GROUP).await;
        if group.is_empty() {
            return None;
        }
        let is_full = group.len() >= GROUP;
        let waits = match wait {
            _ if is_full => false,
            Wait::UntilHurried if group.iter().any(|w| !w.progress.chunk.is_done()) => false,
            Wait::UntilHurried => {
                tokio::select! {
                    () = tokio::time::sleep(GATHER * self.identity.living().min(GATHERED_BY)) => {}
                    () = hurried.notified() => {}
                }
                true
            }
            Wait::UntilEnough => {
                let over = tokio::time::sleep(GATHER);
                tokio::pin!(over);
                while group.len() < GATHERED_LARGE {
                    tokio::select! {
                        () = &mut over => break,
                        Some(next) = waiting.recv() => group.push(next),
                        else => break,
                    }
                }
                true
            }
        };
        if waits {
            while group.len() < GROUP
                && let Ok(next) = waiting.try_recv()
            {
                group.push(next);
            }
        }
        Some(group)
    }

    /// Settles a group, however long that takes.
    async fn settle(&self, group: Vec<Waiting>) {
        match self.keep_trying(&group).await {
            Ok(lost) => answer(group, lost.as_deref()),
            Err(OneIsToBlame) => {
                // Each alone, so that it stops nobody but itself.
                for alone in group {
                    let desk = self.clone();
                    self.tasks.spawn_brief("dispatch.settle_alone", async move {
                        let alone = vec![alone];
                        let lost = desk.keep_trying(&alone).await.unwrap_or_default();
                        answer(alone, lost.as_deref());
                    });
                }
            }
        }
    }

    /// Those whose lease was lost; `None` once the service has given up.
    async fn keep_trying(&self, group: &[Waiting]) -> Result<Option<Vec<ChunkKey>>, OneIsToBlame> {
        let settled: Vec<Settled<'_>> = group.iter().map(|w| settled(&w.progress)).collect();
        let mut said = false;
        loop {
            match self.store.settle(&settled, self.identity.get(), self.clock.now()).await {
                Ok(lost) => return Ok(Some(lost)),
                Err(StoreError::Statement(_) | StoreError::Corrupt { .. }) if group.len() > 1 => {
                    return Err(OneIsToBlame);
                }
                Err(error) if !said => {
                    said = true;
                    tracing::error!(
                        chunks = settled.len(),
                        error = &error as &dyn std::error::Error,
                        "outcomes cannot be kept: trying again until the database takes them"
                    );
                }
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "still not"),
            }
            tokio::select! {
                () = self.clock.sleep(PAUSE) => {}
                () = self.tasks.aborting().cancelled() => return Ok(None),
            }
        }
    }
}

/// The database refuses a group for what is in it, not for how it is.
#[derive(Debug)]
struct OneIsToBlame;

fn answer(group: Vec<Waiting>, lost: Option<&[ChunkKey]>) {
    for Waiting { progress, answer } in group {
        let settlement = match lost {
            None => Settlement::GivenUp,
            Some(lost) if lost.contains(&progress.key) => Settlement::Lost,
            Some(_) => Settlement::Done,
        };
        _ = answer.send((progress, settlement));
    }
}

fn settled(progress: &Progress) -> Settled<'_> {
    Settled {
        key: progress.key,
        epoch: progress.epoch,
        seat: progress.seat,
        chunk: &progress.chunk,
        disposition: progress.disposition,
        effects: &progress.effects,
        unique_ids: &progress.unique_ids,
    }
}
