//! Tasks and their end.
//!
//! Promises: every task is spawned here, with a name. A task that was meant to live as long as the service and ends on
//! its own, or panics, stops the rest: half a service is worse than none. [`Tasks::stop`] asks for a drain (nothing new
//! is begun, what is in flight ends), [`Tasks::abort`] gives up waiting.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::runtime::{Builder, Runtime};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The tasks of one running service. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    shared: Arc<Shared>,
    /// Whether this handle spawns in the background.
    behind: bool,
}

/// One for all, because each task has a handle of its own.
#[derive(Debug, Default)]
struct Shared {
    tracker: TaskTracker,
    background: Option<Background>,
    stop: CancellationToken,
    abort: CancellationToken,
    failed: AtomicBool,
}

impl Tasks {
    /// No tasks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// No tasks yet, and threads of their own for those that may keep a thread busy: see [`Self::in_background`].
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn with_background() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("background").enable_all().build()?;
        let shared = Shared { background: Some(Background(Some(runtime))), ..Shared::default() };
        Ok(Self { shared: Arc::new(shared), behind: false })
    }

    /// The same tasks; what is spawned through this handle runs on threads of its own, if there are such. A task that
    /// computes for a millisecond keeps no urgent one waiting there: the system shares out processors in smaller pieces.
    #[must_use]
    pub fn in_background(&self) -> Self {
        Self { behind: true, ..self.clone() }
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

    /// The same for a task that does not look whether it is to stop: it is dropped then, wherever it waits.
    pub fn spawn_until_stopped(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.shared.stop.clone();
        self.spawn(name, async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Spawns a task that ends when its work is done. A panic in it stops everything.
    pub fn spawn_brief(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let tasks = self.clone();
        // On the heap at once: on its way into a task a future is moved several times, and what is awaited takes its room
        // once more in what awaits it. It may be large.
        let task = Box::pin(task);
        self.launch(name, async move {
            let mut ended = Ended { name, tasks, normally: false };
            task.await;
            ended.normally = true;
        });
    }

    fn launch(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        tracing::trace!(task = name, "task begins");
        let Shared { tracker, background, .. } = &*self.shared;
        match background.as_ref().filter(|_| self.behind).and_then(|background| background.0.as_ref()) {
            Some(runtime) => drop(tracker.spawn_on(task, runtime.handle())),
            None => drop(tracker.spawn(task)),
        }
    }

    /// Cancelled once the service is to stop: begin nothing new.
    #[must_use]
    pub fn stopping(&self) -> &CancellationToken {
        &self.shared.stop
    }

    /// Cancelled once nobody waits any longer: drop what you hold.
    #[must_use]
    pub fn aborting(&self) -> &CancellationToken {
        &self.shared.abort
    }

    /// Asks all tasks to stop.
    pub fn stop(&self) {
        self.shared.stop.cancel();
    }

    /// Gives up on tasks that have not stopped.
    pub fn abort(&self) {
        self.shared.stop.cancel();
        self.shared.abort.cancel();
    }

    /// Waits until every task has ended. Call after [`Self::stop`].
    pub async fn ended(&self) {
        self.shared.tracker.close();
        self.shared.tracker.wait().await;
    }

    /// Whether a task ended on its own or panicked.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }
}

/// Threads for what is not urgent.
#[derive(Debug)]
struct Background(Option<Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        // Dropped inside of another runtime, which must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
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
        self.normally = self.tasks.stopping().is_cancelled();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if !self.normally {
            tracing::error!(task = self.name, "the task `{}` ended on its own: the service stops", self.name);
            self.tasks.shared.failed.store(true, Ordering::Relaxed);
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
