//! Making outcomes durable: small and soon.
//!
//! Promises: what was answered is settled in the next commit, together with whatever else waits; while the database is
//! gone, settles wait and are repeated, and since every chunk waits for its own settle, sending stops when the buffer
//! is full. A settle with an old epoch changes nothing, and whoever sent it is told.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot};

use crate::{
    domain::{
        clock::Clock,
        delivery::{Chunk, ChunkKey, DeviceEffect},
        device::{DeviceSeq, DeviceToken},
    },
    lifecycle::Tasks,
    store::{Disposition, Settled, Store, intake::Identity},
};

/// Progress of one chunk, on its way to the database.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) key: ChunkKey,
    pub(super) epoch: i64,
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
pub(super) struct Settler(mpsc::Sender<Waiting>);

/// Results that may wait for a commit.
const BUFFER: usize = 4_096;

/// The most chunks in one commit.
const GROUP: usize = 256;

/// The pause between two tries while the database is gone.
const PAUSE: Duration = Duration::from_millis(250);

impl Settler {
    /// Starts the settling task. It ends once every [`Settler`] is dropped, so that a drain settles everything.
    pub(super) fn start(store: Arc<dyn Store>, clock: Arc<dyn Clock>, identity: Identity, tasks: &Tasks) -> Self {
        let (sender, mut waiting) = mpsc::channel::<Waiting>(BUFFER);
        let abort = tasks.aborting().clone();
        tasks.spawn_brief("dispatch.settle", async move {
            let mut group = Vec::with_capacity(GROUP);
            while waiting.recv_many(&mut group, GROUP).await > 0 {
                let settled: Vec<Settled<'_>> = group.iter().map(|w| settled(&w.progress)).collect();
                let mut said = false;
                let lost = loop {
                    match store.settle(&settled, identity.get(), clock.now()).await {
                        Ok(lost) => break Some(lost),
                        Err(error) if !said => {
                            said = true;
                            tracing::error!(
                                chunks = settled.len(),
                                error = &error as &dyn std::error::Error,
                                "outcomes cannot be kept: trying again until the database is back"
                            );
                        }
                        Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "still not"),
                    }
                    tokio::select! {
                        () = clock.sleep(PAUSE) => {}
                        () = abort.cancelled() => break None,
                    }
                };
                drop(settled);
                for Waiting { progress, answer } in group.drain(..) {
                    let settlement = match &lost {
                        None => Settlement::GivenUp,
                        Some(lost) if lost.contains(&progress.key) => Settlement::Lost,
                        Some(_) => Settlement::Done,
                    };
                    _ = answer.send((progress, settlement));
                }
            }
        });
        Self(sender)
    }

    /// Waits until the progress is committed. Not cancellable: dropping the future does not undo the settle.
    pub(super) async fn settle(&self, progress: Progress) -> (Option<Progress>, Settlement) {
        let (answer, answered) = oneshot::channel();
        if self.0.send(Waiting { progress, answer }).await.is_err() {
            return (None, Settlement::GivenUp);
        }
        match answered.await {
            Ok((progress, settlement)) => (Some(progress), settlement),
            Err(_) => (None, Settlement::GivenUp),
        }
    }
}

fn settled(progress: &Progress) -> Settled<'_> {
    Settled {
        key: progress.key,
        epoch: progress.epoch,
        chunk: &progress.chunk,
        disposition: progress.disposition,
        effects: &progress.effects,
        unique_ids: &progress.unique_ids,
    }
}
