//! Making outcomes durable: small and soon.
//!
//! Promises: what was answered is settled within milliseconds, together with whatever else comes meanwhile; while the
//! database is gone, settles wait and are repeated, and since every chunk waits for its own settle, sending stops when
//! the buffer is full. A settle with an old epoch changes nothing, and whoever sent it is told.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::sync::{Notify, mpsc, oneshot};

use crate::{
    domain::{
        clock::Clock,
        delivery::{Chunk, ChunkKey, DeviceEffect},
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

/// The door to the settling task.
#[derive(Debug, Clone)]
pub(super) struct Settler {
    results: mpsc::Sender<Waiting>,
    /// Somebody waits with a push until its mark is durable, or goes on with a chunk.
    hurry: Arc<Notify>,
}

/// Results that may wait for a commit.
const BUFFER: usize = 4_096;

/// The most chunks in one commit.
const GROUP: usize = 256;

/// So long a group that is not full waits for more, by the machine's time, if all of it has ended: nobody waits for that
/// to be durable as callers wait for their `202`, whose commits these would hold up. Once for each replica that lives, so
/// that together they commit about as often as one alone, but no longer than for [`GATHERED_BY`] of them.
const GATHER: Duration = Duration::from_millis(5);
const GATHERED_BY: u32 = 4;

/// The pause between two tries while the database is gone.
const PAUSE: Duration = Duration::from_millis(250);

impl Settler {
    /// Starts the settling task. It ends once every [`Settler`] is dropped, so that a drain settles everything.
    pub(super) fn start(store: Arc<dyn Store>, clock: Arc<dyn Clock>, identity: Identity, tasks: &Tasks) -> Self {
        let (results, mut waiting) = mpsc::channel::<Waiting>(BUFFER);
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        let work = Desk { store, clock, identity, tasks: tasks.clone() };
        tasks.spawn_brief("dispatch.settle", async move {
            let mut group = Vec::with_capacity(GROUP);
            while waiting.recv_many(&mut group, GROUP).await > 0 {
                if group.len() < GROUP && group.iter().all(|w| w.progress.chunk.is_done()) {
                    tokio::select! {
                        () = tokio::time::sleep(GATHER * work.identity.living().min(GATHERED_BY)) => {}
                        () = hurried.notified() => {}
                    }
                    while group.len() < GROUP
                        && let Ok(next) = waiting.try_recv()
                    {
                        group.push(next);
                    }
                }
                // Two of one chunk, of an old and a new lease, must not share an answer.
                let mut keys = HashSet::with_capacity(group.len());
                let (first, again): (Vec<Waiting>, Vec<Waiting>) =
                    group.drain(..).partition(|w| keys.insert(w.progress.key));
                work.settle(first).await;
                for alone in again {
                    work.settle(vec![alone]).await;
                }
            }
        });
        Self { results, hurry }
    }

    /// Waits until the progress is committed. Not cancellable: dropping the future does not undo the settle.
    pub(super) async fn settle(&self, progress: Progress) -> (Option<Progress>, Settlement) {
        let (answer, answered) = oneshot::channel();
        let is_done = progress.chunk.is_done();
        if self.results.send(Waiting { progress, answer }).await.is_err() {
            return (None, Settlement::GivenUp);
        }
        if !is_done {
            self.hurry.notify_one();
        }
        match answered.await {
            Ok((progress, settlement)) => (Some(progress), settlement),
            Err(_) => (None, Settlement::GivenUp),
        }
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
