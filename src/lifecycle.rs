//! Tasks and their end.
//!
//! Promises: every task is spawned here, with a name. A task that was meant to live as long as the service and ends on
//! its own, or panics, stops the rest: half a service is worse than none. [`Tasks::stop`] asks for a drain (nothing new
//! is begun, what is in flight ends), [`Tasks::abort`] gives up waiting.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The tasks of one running service. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
    failed: Arc<AtomicBool>,
}

impl Tasks {
    /// No tasks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task that lives until [`Self::stopping`]. If it ends earlier, everything is stopped.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let tasks = self.clone();
        self.launch(name, async move {
            let ended = Ended { name, tasks, normally: false };
            task.await;
            ended.normally();
        });
    }

    /// Spawns a task that ends when its work is done. A panic in it stops everything.
    pub fn spawn_brief(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let tasks = self.clone();
        self.launch(name, async move {
            let mut ended = Ended { name, tasks, normally: false };
            task.await;
            ended.normally = true;
        });
    }

    fn launch(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        tracing::trace!(task = name, "task begins");
        self.tracker.spawn(task);
    }

    /// Cancelled once the service is to stop: begin nothing new.
    #[must_use]
    pub const fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Cancelled once nobody waits any longer: drop what you hold.
    #[must_use]
    pub const fn aborting(&self) -> &CancellationToken {
        &self.abort
    }

    /// Asks all tasks to stop.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Gives up on tasks that have not stopped.
    pub fn abort(&self) {
        self.stop.cancel();
        self.abort.cancel();
    }

    /// Waits until every task has ended. Call after [`Self::stop`].
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Whether a task ended on its own or panicked.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Notices how a task ends, a panic included.
struct Ended {
    name: &'static str,
    tasks: Tasks,
    normally: bool,
}

impl Ended {
    fn normally(mut self) {
        self.normally = self.tasks.stop.is_cancelled();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if !self.normally {
            tracing::error!(task = self.name, "the task `{}` ended on its own: the service stops", self.name);
            self.tasks.failed.store(true, Ordering::Relaxed);
            self.tasks.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_on_its_own_stops_the_rest() {
        let tasks = Tasks::new();
        let stop = tasks.stopping().clone();
        tasks.spawn("waits", async move { stop.cancelled().await });
        tasks.spawn("ends", async {});
        tasks.ended().await;
        assert!(tasks.failed());
    }

    #[tokio::test]
    async fn tasks_that_stop_when_asked_have_not_failed() {
        let tasks = Tasks::new();
        let stop = tasks.stopping().clone();
        tasks.spawn("waits", async move { stop.cancelled().await });
        tasks.spawn_brief("brief", async {});
        tasks.stop();
        tasks.ended().await;
        assert!(!tasks.failed());
    }
}
