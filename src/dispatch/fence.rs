//! The last look before a push leaves.
//!
//! Promises (4, 5, 8): right before the write, with the stream already in hand, a push leaves only if this replica
//! still owns it, it is not cancelled, its breaker is closed, its time has not passed, and an ownership read begun at most one second before
//! shows the generation captured when the notification became due. Reads are shared: whoever asks while one runs goes
//! into the next.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use super::{breakers::Board, pulse::Pulse};
use crate::{
    apns::Fence,
    domain::{
        clock::{Clock, Timestamp},
        delivery::DeliveryStatus,
        device::{Address, Addresses, DeviceSeq, DeviceStatus, DeviceToken, Generation},
        notification::NotificationId,
        outcome::{Cause, own},
        topic::{Environment, Topic},
    },
    lifecycle::Tasks,
    store::{ReplicaId, Store, intake::Cancelled},
};

/// How old an ownership read may be.
pub(super) const OWNERSHIP_MAX_AGE: Duration = Duration::from_secs(1);

/// Why a fenced push did not leave.
#[derive(Debug, Clone)]
pub(super) enum Verdict {
    /// It ends without having been sent.
    End(DeliveryStatus, Cause),
    /// The device has another token now: send to that one.
    Readdressed(Arc<Address>),
    /// The credential's breaker is open.
    Breaker,
    /// Somebody else may own it now.
    NotOurs,
    /// Ownership could not be read.
    Unread,
}

/// What the device's row, as it is now, says of a push that was meant for it.
pub(super) fn judge(
    address: Option<&Arc<Address>>,
    generation: Option<Generation>,
) -> Result<&Arc<Address>, (DeliveryStatus, Cause)> {
    let Some(address) = address else {
        return Err((DeliveryStatus::Suppressed, own::DEVICE_FORGOTTEN));
    };
    if generation.is_some_and(|captured| captured != address.generation) {
        let cause = if address.user_id.is_some() { own::OWNER_CHANGED } else { own::LOGGED_OUT };
        return Err((DeliveryStatus::Suppressed, cause));
    }
    match address.status {
        DeviceStatus::Active => Ok(address),
        DeviceStatus::Inactive => Err((DeliveryStatus::Unregistered, own::DEVICE_INACTIVE)),
        DeviceStatus::Suspended => Err((DeliveryStatus::Failed, own::DEVICE_SUSPENDED)),
    }
}

/// What all fences share.
pub(super) struct Guard {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) pulse: Pulse,
    pub(super) board: Arc<Board>,
    pub(super) reader: Reader,
    pub(super) cancelled: Cancelled,
}

/// The device behind a push, and what was captured of it.
pub(super) struct Owned {
    pub(super) seq: DeviceSeq,
    pub(super) generation: Option<Generation>,
    /// When the read began, in ms of the monotonic clock.
    pub(super) read_at: AtomicU64,
}

/// The fence of one attempt.
pub(super) struct AttemptFence<'a> {
    pub(super) guard: &'a Guard,
    pub(super) replica: ReplicaId,
    pub(super) notification: NotificationId,
    pub(super) topic: &'a Topic,
    pub(super) environment: Environment,
    pub(super) token: &'a DeviceToken,
    pub(super) deadline: Timestamp,
    /// A probe goes through an open breaker.
    pub(super) probe: bool,
    /// `None`: a raw token, which nobody owns.
    pub(super) owned: Option<Owned>,
    pub(super) verdict: Mutex<Option<Verdict>>,
}

impl AttemptFence<'_> {
    fn closed_by(&self) -> Option<Verdict> {
        if !self.guard.pulse.holds(self.replica) {
            return Some(Verdict::NotOurs);
        }
        if self.guard.cancelled.holds(self.notification) {
            return Some(Verdict::End(DeliveryStatus::Cancelled, own::CANCELLED));
        }
        if self.guard.clock.now() >= self.deadline {
            return Some(Verdict::End(DeliveryStatus::Expired, own::EXPIRED));
        }
        if !self.probe && self.guard.board.is_open(self.topic, self.environment) {
            return Some(Verdict::Breaker);
        }
        None
    }

    fn refuse(&self, verdict: Verdict) -> bool {
        *self.verdict.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(verdict);
        false
    }
}

#[async_trait]
impl Fence for AttemptFence<'_> {
    fn is_open(&self) -> bool {
        self.open_until().is_some()
    }

    fn open_until(&self) -> Option<Duration> {
        let now = self.guard.clock.monotonic();
        let read = self.owned.as_ref().map_or(Duration::MAX, |owned| {
            Duration::from_millis(owned.read_at.load(Ordering::Acquire)) + OWNERSHIP_MAX_AGE
        });
        let until = read.min(self.guard.pulse.trusted_until());
        (now < until && self.closed_by().is_none()).then_some(until)
    }

    async fn renew(&self) -> bool {
        if let Some(verdict) = self.closed_by() {
            return self.refuse(verdict);
        }
        let Some(owned) = &self.owned else { return true };
        let Some((address, read_at)) = self.guard.reader.read(owned.seq).await else {
            return self.refuse(Verdict::Unread);
        };
        match judge(address.as_ref(), owned.generation) {
            Err((status, cause)) => self.refuse(Verdict::End(status, cause)),
            Ok(address) if address.token != *self.token => self.refuse(Verdict::Readdressed(Arc::clone(address))),
            Ok(_) => {
                owned.read_at.store(millis(read_at), Ordering::Release);
                true
            }
        }
    }
}

/// Milliseconds of a monotonic moment, rounded down: a read never looks younger than it is.
pub(super) fn millis(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(u64::MAX)
}

type Answer = oneshot::Sender<Option<(Option<Arc<Address>>, Duration)>>;

/// Ownership reads, shared by whoever waits.
#[derive(Clone)]
pub(super) struct Reader(mpsc::Sender<(DeviceSeq, Answer)>);

/// The most devices in one read.
const READ_GROUP: usize = 500;

impl Reader {
    /// Starts the reading task.
    pub(super) fn start(store: Arc<dyn Store>, clock: Arc<dyn Clock>, tasks: &Tasks) -> Self {
        let (sender, mut waiting) = mpsc::channel::<(DeviceSeq, Answer)>(READ_GROUP);
        tasks.spawn_brief("dispatch.ownership", async move {
            let mut group = Vec::with_capacity(READ_GROUP);
            while waiting.recv_many(&mut group, READ_GROUP).await > 0 {
                let devices: Vec<DeviceSeq> = group.iter().map(|(seq, _)| *seq).collect();
                let read_at = clock.monotonic();
                let found: Option<Addresses> = match store.addresses(&devices).await {
                    Ok(addresses) => Some(addresses.into_iter().collect()),
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "ownership could not be read: what depends on it waits"
                        );
                        None
                    }
                };
                for (seq, answer) in group.drain(..) {
                    _ = answer.send(found.as_ref().map(|found| (found.of(seq).cloned(), read_at)));
                }
            }
        });
        Self(sender)
    }

    /// The device as it is now and when the read began; `None` if it could not be read. The inner `None`: forgotten.
    async fn read(&self, device: DeviceSeq) -> Option<(Option<Arc<Address>>, Duration)> {
        let (answer, answered) = oneshot::channel();
        self.0.send((device, answer)).await.ok()?;
        answered.await.ok()?
    }
}
