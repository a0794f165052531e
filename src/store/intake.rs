//! Group commit: whoever arrives while a commit runs goes into the next.
//!
//! Promises: throughput rises with load and one lonely request waits for nothing; a client that leaves never cancels a
//! commit; a bad one never fails its group; a commit whose result is unknown is resolved by id before anything is
//! answered; registrations keep their order. Bounded: beyond [`Settings::waiting`] requests the answer is
//! [`IntakeError::Full`] at once.
//!
//! What is accepted and due is inserted as this replica's own and handed to the sender through a bounded queue of the
//! store ([`Handover`]): it is sent from memory, and read from the database again only after a crash.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard, Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{Accepted, Idempotency, Lease, ReplicaId, Store, StoreError, Submission};
use crate::{
    domain::{
        clock::Clock,
        device::{Device, Registration},
        notification::{Audience, Notification, NotificationId, NotificationView},
    },
    lifecycle::Tasks,
};

/// Bounds of the intake.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Requests that may wait for a commit, of each kind.
    pub waiting: usize,
    /// The largest group.
    pub group: usize,
    /// Chunks that may be handed over and not ended.
    pub room: usize,
    /// How long the fate of a commit is looked for before the caller is told to come back.
    pub resolve: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { waiting: 2_048, group: 256, room: 4_096, resolve: Duration::from_secs(10) }
    }
}

/// A list longer than this is not handed over but left to be claimed, chunk by chunk.
const HANDED_LIST: usize = 100;

/// How many groups of notifications may commit at once, the second only if it is full. Of several replicas each has one:
/// together they keep the database as busy, and their groups as large.
const COMMITS_AT_ONCE: usize = 2;

/// A commit that takes longer than this keeps no other from beginning.
const SLOW_COMMIT: Duration = Duration::from_millis(100);

/// The same of a replica that is alone: a database that is far away takes as long for one as for two at once.
const SLOW_COMMIT_ALONE: Duration = Duration::from_millis(20);

/// Why nothing was kept.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// More requests wait than the database can take: come back.
    #[error("too many requests wait for the database")]
    Full,
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopped,
    /// The database.
    #[error(transparent)]
    Store(Arc<StoreError>),
}

/// What became of a notification.
#[derive(Debug)]
pub enum Noted {
    /// Committed.
    Accepted(NotificationView),
    /// The same request was accepted before: the same answer again.
    Seen(NotificationView),
    /// The same idempotency key came with another body before.
    Conflict,
}

/// Which notifications this process has in memory, from before their commit until their last chunk has left it. What
/// the database says is ours and is not on the roster was lost on the way, and is given back.
#[derive(Debug, Clone, Default)]
pub struct Roster(Arc<std::sync::Mutex<HashMap<NotificationId, usize>>>);

impl Roster {
    /// Enters a notification; it stays until the guard is dropped.
    #[must_use]
    pub fn enter(&self, id: NotificationId) -> Entry {
        *self.lock().entry(id).or_default() += 1;
        Entry { roster: self.clone(), id }
    }

    /// Whether it is on the roster.
    #[must_use]
    pub fn holds(&self, id: NotificationId) -> bool {
        self.lock().contains_key(&id)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<NotificationId, usize>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// One place on the [`Roster`].
#[derive(Debug)]
pub struct Entry {
    roster: Roster,
    id: NotificationId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut entries = self.roster.lock();
        if let Some(count) = entries.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                entries.remove(&self.id);
            }
        }
    }
}

/// Notifications that were cancelled and have not ended: nothing of them is to leave. What the API of this process
/// cancels is here at once; what another cancels, as soon as the dispatcher has looked.
#[derive(Debug, Clone, Default)]
pub struct Cancelled(Arc<CancelledIds>);

#[derive(Debug, Default)]
struct CancelledIds {
    ids: RwLock<BTreeSet<NotificationId>>,
    added: Notify,
}

impl Cancelled {
    /// Whether it is one of them.
    #[must_use]
    pub fn holds(&self, id: NotificationId) -> bool {
        let ids = self.0.ids.read().unwrap_or_else(PoisonError::into_inner);
        !ids.is_empty() && ids.contains(&id)
    }

    /// One more.
    pub fn add(&self, id: NotificationId) {
        self.0.ids.write().unwrap_or_else(PoisonError::into_inner).insert(id);
        self.0.added.notify_waiters();
    }

    /// These, and no others.
    pub fn replace(&self, ids: BTreeSet<NotificationId>) {
        *self.0.ids.write().unwrap_or_else(PoisonError::into_inner) = ids;
        self.0.added.notify_waiters();
    }

    /// Waits until it is one of them. Dropping the future loses nothing.
    pub async fn reached(&self, id: NotificationId) {
        loop {
            let added = self.0.added.notified();
            tokio::pin!(added);
            // Registered before the look, so that what comes in between is not missed.
            added.as_mut().enable();
            if self.holds(id) {
                return;
            }
            added.await;
        }
    }
}

/// A chunk that was just committed as ours.
#[derive(Debug)]
pub struct Handed {
    /// The chunk.
    pub lease: Lease,
    /// As whom we leased it.
    pub replica: ReplicaId,
    /// Its place on the roster.
    pub entry: Entry,
    /// Its share of the room; dropped when it has left memory.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// The receiving end, for the sender.
#[derive(Debug)]
pub struct Handover {
    /// Chunks, in the order of their commits.
    pub handed: mpsc::UnboundedReceiver<Handed>,
    /// Notified when something was accepted that nobody owns yet.
    pub wake: Arc<Notify>,
    /// What is in memory.
    pub roster: Roster,
    /// What must not leave any more.
    pub cancelled: Cancelled,
}

/// This replica among those that live: its number, a new one after it was declared dead, and how many there are.
#[derive(Debug, Clone, Default)]
pub struct Identity(Arc<Membership>);

#[derive(Debug, Default)]
struct Membership {
    number: AtomicI64,
    living: AtomicU32,
}

impl Identity {
    /// As who we act now.
    #[must_use]
    pub fn get(&self) -> ReplicaId {
        ReplicaId(self.0.number.load(Ordering::Acquire))
    }

    /// From now on as this one.
    pub fn set(&self, replica: ReplicaId) {
        self.0.number.store(replica.0, Ordering::Release);
    }

    /// How many replicas live, this one among them: at least 1.
    #[must_use]
    pub fn living(&self) -> u32 {
        self.0.living.load(Ordering::Relaxed).max(1)
    }

    /// So many live, as was seen just now.
    pub fn see(&self, living: usize) {
        self.0.living.store(u32::try_from(living).unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

struct Waiting<T, A> {
    what: T,
    answer: oneshot::Sender<Result<A, IntakeError>>,
}

struct Submitted {
    notification: Notification,
    audience: Audience,
    idempotency: Option<Idempotency>,
}

/// The door through which everything durable comes in.
pub struct Intake {
    notifications: mpsc::Sender<Waiting<Submitted, Noted>>,
    registrations: mpsc::Sender<Waiting<Registration, Device>>,
    committer: Arc<Committer>,
}

impl Intake {
    /// Starts the committing tasks.
    #[must_use]
    pub fn start(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        identity: Identity,
        settings: &Settings,
        tasks: &Tasks,
    ) -> (Self, Handover) {
        let (notifications, submitted) = mpsc::channel(settings.waiting);
        let (registrations, registered) = mpsc::channel(settings.waiting);
        let (leases, handed) = mpsc::unbounded_channel();
        let wake = Arc::new(Notify::new());
        let handover = Handover { handed, wake, roster: Roster::default(), cancelled: Cancelled::default() };
        let committer = Arc::new(Committer {
            store,
            clock,
            identity,
            settings: settings.clone(),
            room: Arc::new(Semaphore::new(settings.room)),
            leases,
            wake: Arc::clone(&handover.wake),
            roster: handover.roster.clone(),
            cancelled: handover.cancelled.clone(),
            committing: Mutex::default(),
        });
        let submitted = Arc::new(Mutex::new(submitted));
        for _ in 0..COMMITS_AT_ONCE {
            let (committer, submitted) = (Arc::clone(&committer), Arc::clone(&submitted));
            let stop = tasks.stopping().clone();
            tasks.spawn("store.accept", async move {
                loop {
                    let mut waiting = submitted.lock().await;
                    let first = tokio::select! {
                        biased;
                        first = waiting.recv() => first,
                        () = stop.cancelled() => {
                            waiting.close();
                            continue;
                        }
                    };
                    let Some(first) = first else {
                        // Stopped, and everything that had come in before was committed.
                        break;
                    };
                    let mut group = vec![first];
                    let _turn = committer.turn(&mut waiting, &mut group).await;
                    drop(waiting);
                    committer.accept(group).await;
                }
            });
        }
        let stop = tasks.stopping().clone();
        let registering = Arc::clone(&committer);
        tasks.spawn("store.register", async move {
            let mut registered = registered;
            loop {
                let mut group = Vec::new();
                tokio::select! {
                    biased;
                    _ = registered.recv_many(&mut group, registering.settings.group) => {}
                    () = stop.cancelled() => registered.close(),
                }
                if group.is_empty() {
                    break;
                }
                registering.register(group).await;
            }
        });
        (Self { notifications, registrations, committer }, handover)
    }

    /// Commits a notification together with whatever else waits. It waits from now on; dropping the future does not undo it.
    ///
    /// # Errors
    /// [`IntakeError::Full`] at once if too many wait; the database's errors after its time-outs.
    pub fn notify(
        &self,
        notification: Notification,
        audience: Audience,
        idempotency: Option<Idempotency>,
    ) -> impl Future<Output = Result<Noted, IntakeError>> + use<> {
        ask(&self.notifications, Submitted { notification, audience, idempotency })
    }

    /// Cancels a notification: durable when this returns, and known to the sender of this process. How it stands then;
    /// `None` if there is no such notification. Dropping the future may undo it.
    ///
    /// # Errors
    /// The database's errors after its time-outs.
    pub async fn cancel(&self, id: NotificationId) -> Result<Option<NotificationView>, IntakeError> {
        self.committer.cancel(id).await.map_err(|error| IntakeError::Store(Arc::new(error)))
    }

    /// Commits a registration together with whatever else waits, in the order of arrival. It waits from now on.
    ///
    /// # Errors
    /// As [`Self::notify`].
    pub fn register(&self, registration: Registration) -> impl Future<Output = Result<Device, IntakeError>> + use<> {
        ask(&self.registrations, registration)
    }
}

/// At once, because a future that takes what is asked along is several times as large: thousands wait.
fn ask<T, A>(queue: &mpsc::Sender<Waiting<T, A>>, what: T) -> impl Future<Output = Result<A, IntakeError>> + use<T, A> {
    let (answer, answered) = oneshot::channel();
    let asked = queue.try_send(Waiting { what, answer }).map_err(|refused| match refused {
        mpsc::error::TrySendError::Full(_) => IntakeError::Full,
        mpsc::error::TrySendError::Closed(_) => IntakeError::Stopped,
    });
    async move {
        asked?;
        answered.await.map_err(|_| IntakeError::Stopped)?
    }
}

/// What the committing tasks share.
struct Committer {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    identity: Identity,
    settings: Settings,
    room: Arc<Semaphore>,
    leases: mpsc::UnboundedSender<Handed>,
    wake: Arc<Notify>,
    roster: Roster,
    cancelled: Cancelled,
    committing: Mutex<()>,
}

/// Gathers until it is the group's turn; until it is full, if that is enough.
async fn gather<T, G>(
    waiting: &mut mpsc::Receiver<T>,
    group: &mut Vec<T>,
    most: usize,
    full_is_enough: bool,
    turn: impl Future<Output = G>,
) -> Option<G> {
    tokio::pin!(turn);
    let mut more = true;
    let turn = loop {
        tokio::select! {
            biased;
            turn = &mut turn => break Some(turn),
            come = waiting.recv_many(group, most - group.len()), if more && group.len() < most => more = come > 0,
        }
        if group.len() >= most && full_is_enough {
            break None;
        }
    };
    while group.len() < most
        && let Ok(next) = waiting.try_recv()
    {
        group.push(next);
    }
    turn
}

/// One submission on its way, with what it needs once it is committed.
struct OnTheWay {
    answer: oneshot::Sender<Result<Noted, IntakeError>>,
    permit: Option<OwnedSemaphorePermit>,
    entry: Entry,
}

impl Committer {
    /// Gathers a group until no other commits here, or one has for long; or until it is full, where no other replicas
    /// live. A commit, and each statement of it, costs as much for a hundred as for a few, and two that insert at once
    /// are in each other's way.
    async fn turn(
        &self,
        waiting: &mut mpsc::Receiver<Waiting<Submitted, Noted>>,
        group: &mut Vec<Waiting<Submitted, Noted>>,
    ) -> Option<MutexGuard<'_, ()>> {
        let is_alone = self.identity.living() == 1;
        let turn = async {
            tokio::select! {
                biased;
                turn = self.committing.lock() => Some(turn),
                () = self.clock.sleep(if is_alone { SLOW_COMMIT_ALONE } else { SLOW_COMMIT }) => None,
            }
        };
        gather(waiting, group, self.settings.group, is_alone, turn).await.flatten()
    }

    async fn accept(&self, group: Vec<Waiting<Submitted, Noted>>) {
        let now = self.clock.now();
        let mut submissions = Vec::with_capacity(group.len());
        let mut on_the_way = Vec::with_capacity(group.len());
        for Waiting { what, answer } in group {
            let Submitted { notification, audience, idempotency } = what;
            let small = audience.named().is_some_and(|named| named <= HANDED_LIST);
            let permit = (small && notification.due_at <= now)
                .then(|| Arc::clone(&self.room).try_acquire_owned().ok())
                .flatten();
            // Before the commit: from then on the database may say that it is ours.
            let entry = self.roster.enter(notification.id);
            submissions.push(Submission { notification, audience, idempotency, own: permit.is_some() });
            on_the_way.push(OnTheWay { answer, permit, entry });
        }
        self.commit(submissions, on_the_way).await;
    }

    async fn commit(&self, mut submissions: Vec<Submission>, mut on_the_way: Vec<OnTheWay>) {
        let deadline = self.clock.monotonic() + self.settings.resolve;
        loop {
            let replica = self.identity.get();
            match self.store.accept(&submissions, replica, self.clock.now()).await {
                Ok(answers) => {
                    for (answer, waiting) in answers.into_iter().zip(on_the_way) {
                        self.answer(answer, waiting, replica);
                    }
                    return;
                }
                Err(StoreError::CommitUnknown(source)) => {
                    tracing::warn!(
                        group = submissions.len(),
                        error = %source,
                        "a commit's answer was lost: looking for what became of it"
                    );
                    match self.resolve(&submissions, deadline).await {
                        Ok(committed) => {
                            // Certainly not committed: again. Committed: answered; its chunks are ours in the
                            // database only, and the sender gives back what it does not have.
                            let mut rest = (Vec::new(), Vec::new());
                            for (submission, waiting) in submissions.into_iter().zip(on_the_way) {
                                if let Some(view) = committed.get(&submission.notification.id) {
                                    _ = waiting.answer.send(Ok(Noted::Accepted(view.clone())));
                                } else {
                                    rest.0.push(submission);
                                    rest.1.push(waiting);
                                }
                            }
                            self.wake.notify_one();
                            (submissions, on_the_way) = rest;
                            if submissions.is_empty() {
                                return;
                            }
                        }
                        Err(error) => return refuse(on_the_way.into_iter().map(|w| w.answer), error),
                    }
                }
                Err(error) => return refuse(on_the_way.into_iter().map(|w| w.answer), error),
            }
            if self.clock.monotonic() >= deadline {
                let error = StoreError::Unavailable("the fate of a commit could not be found out in time".into());
                return refuse(on_the_way.into_iter().map(|w| w.answer), error);
            }
        }
    }

    async fn resolve(
        &self,
        submissions: &[Submission],
        deadline: Duration,
    ) -> Result<HashMap<NotificationId, NotificationView>, StoreError> {
        let ids: Vec<_> = submissions.iter().map(|s| s.notification.id).collect();
        loop {
            let error = match self.committed_views(&ids).await {
                Ok(views) => return Ok(views),
                Err(error) => error,
            };
            if self.clock.monotonic() >= deadline {
                return Err(error);
            }
            self.clock.sleep(Duration::from_millis(200)).await;
        }
    }

    async fn committed_views(
        &self,
        ids: &[NotificationId],
    ) -> Result<HashMap<NotificationId, NotificationView>, StoreError> {
        let mut views = HashMap::new();
        for id in self.store.committed(ids).await? {
            if let Some(view) = self.store.notification(id).await? {
                views.insert(id, view);
            }
        }
        Ok(views)
    }

    fn answer(&self, accepted: Result<Accepted, StoreError>, waiting: OnTheWay, replica: ReplicaId) {
        let OnTheWay { answer, mut permit, entry } = waiting;
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                _ = answer.send(Err(IntakeError::Store(Arc::new(error))));
                return;
            }
        };
        let noted = match accepted {
            Accepted::New { view, leases } => {
                if leases.is_empty() && view.counts.pending > 0 || !view.audience_complete {
                    self.wake.notify_one();
                }
                let id = entry.id;
                for lease in leases {
                    let entry = self.roster.enter(id);
                    // A sender that is gone has ended with the service; the next one takes over from the database.
                    _ = self.leases.send(Handed { lease, replica, entry, permit: permit.take() });
                }
                Noted::Accepted(view)
            }
            Accepted::Seen(view) => Noted::Seen(view),
            Accepted::Conflict => Noted::Conflict,
        };
        // A client that has left does not hear it; it stays committed.
        _ = answer.send(Ok(noted));
    }

    async fn cancel(&self, id: NotificationId) -> Result<Option<NotificationView>, StoreError> {
        let deadline = self.clock.monotonic() + self.settings.resolve;
        loop {
            match self.store.cancel(id, self.clock.now()).await {
                // Cancelling again what was cancelled changes nothing: no need to know.
                Err(StoreError::CommitUnknown(_)) if self.clock.monotonic() < deadline => {
                    self.clock.sleep(Duration::from_millis(200)).await;
                }
                Err(error) => return Err(error),
                Ok(view) => {
                    if view.as_ref().is_some_and(|view| view.done_at.is_none()) {
                        self.cancelled.add(id);
                        self.wake.notify_one();
                    }
                    return Ok(view);
                }
            }
        }
    }

    async fn register(&self, group: Vec<Waiting<Registration, Device>>) {
        let (registrations, answers): (Vec<_>, Vec<_>) = group.into_iter().map(|w| (w.what, w.answer)).unzip();
        let deadline = self.clock.monotonic() + self.settings.resolve;
        loop {
            match self.store.register(&registrations, self.clock.now()).await {
                Ok(devices) => {
                    for (device, answer) in devices.into_iter().zip(answers) {
                        _ = answer.send(Ok(device));
                    }
                    return;
                }
                // Registering again what was registered changes nothing but the time: no need to know.
                Err(StoreError::CommitUnknown(_)) if self.clock.monotonic() < deadline => {
                    self.clock.sleep(Duration::from_millis(200)).await;
                }
                Err(error) => return refuse(answers.into_iter(), error),
            }
        }
    }
}

fn refuse<A>(answers: impl Iterator<Item = oneshot::Sender<Result<A, IntakeError>>>, error: StoreError) {
    let error = Arc::new(error);
    for answer in answers {
        _ = answer.send(Err(IntakeError::Store(Arc::clone(&error))));
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::{FutureExt, pin_mut};

    use super::*;

    /// A channel with so many in it.
    fn with(count: usize) -> (mpsc::Sender<usize>, mpsc::Receiver<usize>) {
        let (sender, receiver) = mpsc::channel(100);
        (0..count).for_each(|number| sender.try_send(number).unwrap());
        (sender, receiver)
    }

    /// A group of up to 8 is gathered until its turn comes, and not before: how many it is by then.
    fn waits_for_its_turn(waiting: &mut mpsc::Receiver<usize>, full_is_enough: bool) -> usize {
        let (end, ended) = oneshot::channel::<()>();
        let mut group = vec![99];
        {
            let gathered = gather(waiting, &mut group, 8, full_is_enough, ended);
            pin_mut!(gathered);
            assert_eq!((&mut gathered).now_or_never(), None);
            end.send(()).unwrap();
            assert_eq!(gathered.now_or_never(), Some(Some(Ok(()))));
        }
        group.len()
    }

    #[tokio::test]
    async fn whose_turn_it_is_takes_what_is_there_and_waits_for_no_more() {
        for (there, taken) in [(0, 1), (3, 4), (20, 8)] {
            let (_sender, mut waiting) = with(there);
            let mut group = vec![99];
            assert_eq!(gather(&mut waiting, &mut group, 8, true, ready("turn")).now_or_never(), Some(Some("turn")));
            assert_eq!((group.len(), waiting.len()), (taken, there + 1 - taken));
        }
    }

    #[tokio::test]
    async fn behind_another_a_group_grows_and_goes_only_full_and_of_several_replicas_not_even_then() {
        let (sender, mut waiting) = with(3);
        let mut group = vec![99];
        {
            let gathered = gather(&mut waiting, &mut group, 8, true, pending::<()>());
            pin_mut!(gathered);
            assert_eq!((&mut gathered).now_or_never(), None);
            (0..10).for_each(|number| sender.try_send(number).unwrap());
            assert_eq!(gathered.now_or_never(), Some(None), "without its turn");
        }
        assert_eq!((group.len(), waiting.len()), (8, 6), "the others are for the next");

        let (_sender, mut waiting) = with(20);
        assert_eq!(waits_for_its_turn(&mut waiting, false), 8);
    }

    #[tokio::test]
    async fn who_stops_waits_for_the_turn_of_what_had_come() {
        let (sender, mut waiting) = with(2);
        drop(sender);
        assert_eq!(waits_for_its_turn(&mut waiting, true), 3);
    }
}
