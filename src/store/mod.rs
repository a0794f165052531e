//! Durable state in domain words: what the service needs kept, on SQLite and on MySQL.
//!
//! Promises: one method, one transaction, one thing the business would say; what a method has answered is committed
//! with the durability of the database's own commit. No pool, transaction, row or SQL crosses this border. Two
//! implementations, one conformance suite (`tests/it/store/`), which is the contract.

pub mod address;
pub mod intake;
pub mod retention;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;

mod acceptances;
mod api_keys;
mod audience;
mod breakers;
mod cursor;
mod database;
mod devices;
mod migrate;
mod mysql;
mod notifications;
mod queue;
mod ranges;
mod reasons;
mod replicas;
mod rows;
mod sql;
mod sqlite;
mod statement;

use self::retention::Retention;
use crate::domain::{
    api_key::{ApiKey, ApiKeyId},
    clock::{Clock, Timestamp},
    delivery::{Chunk, ChunkKey, DeliveryStatus, DeviceEffect, State},
    device::{Address, Addresses, Device, DeviceId, DeviceSeq, DeviceStatus, DeviceToken, Registration, Tag, UserId},
    notification::{Audience, Lane, Notification, NotificationId, NotificationStatus, NotificationView, Reference},
    outcome::Fault,
    push::{ApnsId, CollapseId},
    topic::{Environment, Topic},
};

/// An error of another crate, kept as the source of one of ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong below.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, refused, or is read-only: come back.
    #[error("the database did not answer")]
    Unavailable(#[source] BoxError),
    /// The commit was sent and its fate could not be found out in time. Nothing may be concluded from it.
    #[error("the database did not say whether it committed")]
    CommitUnknown(#[source] BoxError),
    /// A row that this version would never write.
    #[error("{table}.{column} of row {row} holds a value that is never written")]
    Corrupt {
        /// Where.
        table: &'static str,
        /// Which column.
        column: &'static str,
        /// Which row, by its key.
        row: String,
        /// What is wrong with it.
        #[source]
        source: BoxError,
    },
    /// The schema is too new for this version, or not there.
    #[error("{0}")]
    Schema(String),
    /// Another `serve` has this SQLite file.
    #[error("another sonnette is serving {0}: stop it first, or give this one a database of its own")]
    Locked(String),
    /// The URL or its options cannot be used.
    #[error("database.url: {0}")]
    Settings(String),
    /// A statement that should never fail did: a bug of ours.
    #[error("a statement failed")]
    Statement(#[source] BoxError),
}

/// Which database it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The embedded default.
    Sqlite,
    /// MySQL or MariaDB.
    Mysql,
}

/// How to reach the database.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `sqlite://path` or `mysql://user:password@host/db?…`. Holds a password: never logged.
    pub url: crate::domain::secret::Secret<String>,
    /// The most connections to MySQL.
    pub max_connections: u32,
    /// How long a statement may wait for a connection before [`StoreError::Unavailable`]: at most
    /// [`Self::LONGEST_ACQUIRE`].
    pub acquire_timeout: Duration,
    /// A statement that takes longer is logged with its name; `None`: none is.
    pub slow_statement: Option<Duration>,
}

impl Settings {
    /// Whoever waits longer could not notice in time that the host is to blame.
    pub const LONGEST_ACQUIRE: Duration = Duration::from_secs(5);
}

/// Who opens the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `serve`: an SQLite file is locked, so that there is one.
    Serve,
    /// Any other command: may write beside a `serve`.
    CommandLine,
}

/// Opens the store that the URL names. Nothing is migrated: see [`Database::schema`] and [`Database::migrate`].
///
/// # Errors
/// [`StoreError::Settings`] for a URL that cannot be used, [`StoreError::Locked`] if another `serve` has the file,
/// [`StoreError::Unavailable`] if no host answers.
pub async fn open(settings: &Settings, role: Role, clock: Arc<dyn Clock>) -> Result<Arc<dyn Store>, StoreError> {
    if settings.url.expose().starts_with("sqlite:") {
        Ok(Arc::new(sqlite::SqliteStore::open(settings, role, clock).await?))
    } else {
        Ok(Arc::new(mysql::MysqlStore::open(settings, clock).await?))
    }
}

/// sqlx writes a line for a slow statement alone, which `telemetry` makes shorter.
fn quiet<O: sqlx::ConnectOptions>(options: O, slow: Option<Duration>) -> O {
    let options = options.disable_statement_logging();
    match slow {
        Some(limit) => options.log_slow_statements(log::LevelFilter::Warn, limit),
        None => options,
    }
}

/// One running `serve`, by the number of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub i64);

/// A breaker, by the number of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BreakerId(pub i64);

/// Which part of a list.
#[derive(Debug, Clone, Default)]
pub struct PageRequest {
    /// Opaque, from [`Page::next_cursor`].
    pub cursor: Option<String>,
    /// 1 to 1,000.
    pub limit: usize,
}

/// Part of a list, newest first.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where to go on; `None` at the end.
    pub next_cursor: Option<String>,
}

/// A cursor that was not made by this version, or for another list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor of this list: take `next_cursor` of the page before")]
pub struct NotACursor;

/// The lists that go on page by page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    /// [`Devices::devices`].
    Devices,
    /// [`Notifications::notifications`].
    Notifications,
    /// [`Notifications::deliveries`] of this one.
    Deliveries(NotificationId),
}

impl List {
    /// Nothing, if this text is a cursor of this list. A list itself begins anew at what is none.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(self, text: &str) -> Result<(), NotACursor> {
        let known = match self {
            Self::Devices => devices::is_cursor(text),
            Self::Notifications => notifications::is_cursor(text),
            Self::Deliveries(id) => notifications::is_cursor_of(id, text),
        };
        if known { Ok(()) } else { Err(NotACursor) }
    }
}

/// Which devices. All that is set must match.
#[derive(Debug, Clone, Default)]
pub struct DeviceFilter {
    /// Held by this user.
    pub user_id: Option<UserId>,
    /// Bears this tag.
    pub tag: Option<Tag>,
    /// Of this app.
    pub topic: Option<Topic>,
    /// Of one of these apps: what the caller's key may see. `None`: all.
    pub topics: Option<BTreeSet<Topic>>,
    /// In this status.
    pub status: Option<DeviceStatus>,
}

/// Which notifications. All that is set must match.
#[derive(Debug, Clone, Default)]
pub struct NotificationFilter {
    /// Of this app.
    pub topic: Option<Topic>,
    /// Of one of these apps: what the caller's key may see. `None`: all.
    pub topics: Option<BTreeSet<Topic>>,
    /// In this status.
    pub status: Option<NotificationStatus>,
    /// Addressed to this user.
    pub user_id: Option<UserId>,
    /// With this reference.
    pub reference: Option<Reference>,
    /// With at least one delivery of this status.
    pub outcome: Option<DeliveryStatus>,
    /// Accepted by us at or after.
    pub since: Option<Timestamp>,
    /// Accepted by us before.
    pub until: Option<Timestamp>,
}

/// The outcome of one device.
#[derive(Debug, Clone)]
pub struct DeliveryView {
    /// The device; `None` for a raw token that nobody registered.
    pub device_id: Option<DeviceId>,
    /// The place of a raw token in the caller's list.
    pub index: Option<u32>,
    /// The last six digits of the token, if it is still known.
    pub token_hint: Option<String>,
    /// Where it stands.
    pub state: State,
    /// The id of every attempt.
    pub apns_id: ApnsId,
    /// The key to Apple's delivery log.
    pub apns_unique_id: Option<String>,
}

/// A caller's promise that two requests are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idempotency {
    /// SHA-256 over owner, endpoint and key.
    pub key: [u8; 32],
    /// SHA-256 over the body's bytes.
    pub body: [u8; 32],
}

/// One notification to be accepted.
#[derive(Debug, Clone)]
pub struct Submission {
    /// What.
    pub notification: Notification,
    /// To whom.
    pub audience: Audience,
    /// Its idempotency key.
    pub idempotency: Option<Idempotency>,
    /// Whether this replica has room to send it at once: then its chunks are inserted as this replica's own and
    /// handed back. Otherwise, or when it is not due yet, whoever is free will claim them.
    pub own: bool,
}

/// What became of a [`Submission`].
#[derive(Debug)]
pub enum Accepted {
    /// Committed. The leases are empty unless [`Submission::own`] was set and it is due.
    New {
        /// How it stands.
        view: NotificationView,
        /// Its chunks, to be sent.
        leases: Vec<Lease>,
    },
    /// The same request was accepted before: the same answer again.
    Seen(NotificationView),
    /// The same idempotency key came with another body before.
    Conflict,
}

/// A chunk that this replica owns in this epoch.
#[derive(Debug)]
pub struct Lease {
    /// Which.
    pub key: ChunkKey,
    /// Fences every settle: it grows with every change of owner.
    pub epoch: i64,
    /// What to send.
    pub notification: Arc<Notification>,
    /// To whom, and where each stands.
    pub chunk: Chunk,
    /// Addresses of the chunk's open devices as of [`Lease::read_at`]; may be empty.
    pub addresses: Addresses,
    /// When the read of `addresses` began, on the clock's monotonic scale.
    pub read_at: Duration,
    /// Where the chunk was put, if it was accepted together with others.
    pub seat: Option<Seat>,
}

/// The place of a chunk of one target that was accepted together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// The one of them that is first by its id.
    pub cohort: NotificationId,
    /// Counts from 0.
    pub number: u32,
}

/// What a claim has come to.
#[derive(Debug, Default)]
pub struct Claimed {
    /// To be sent by this replica.
    pub leases: Vec<Lease>,
    /// An audience has a rest that may be claimed at once, though this claim may have brought no lease.
    pub more: bool,
}

/// What the chunk does after a settle. A chunk all of whose targets have ended is ended whatever is said here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Stays with this replica, which goes on sending.
    Keep,
    /// Given back: whoever is free takes it, not before this time.
    Free {
        /// When it is due again.
        due_at: Timestamp,
    },
    /// Waits until the breaker closes; one that has closed meanwhile sets it free at once.
    Park {
        /// Which.
        breaker: BreakerId,
        /// When it is claimed all the same, to be counted as expired.
        until: Timestamp,
    },
}

/// The progress of one chunk.
#[derive(Debug)]
pub struct Settled<'a> {
    /// Which.
    pub key: ChunkKey,
    /// The epoch in which it was leased.
    pub epoch: i64,
    /// As it was leased.
    pub seat: Option<Seat>,
    /// Where each target stands now.
    pub chunk: &'a Chunk,
    /// What the chunk does next.
    pub disposition: Disposition,
    /// What the attempts said of devices: the token that was tried, and the effect.
    pub effects: &'a [(DeviceSeq, DeviceToken, DeviceEffect)],
    /// `apns-unique-id`s by position.
    pub unique_ids: &'a [(u32, Box<str>)],
}

/// How much waits.
#[derive(Debug, Clone)]
pub struct QueueDepth {
    /// The app.
    pub topic: Topic,
    /// The lane.
    pub lane: Lane,
    /// Chunks that are due and not ended.
    pub due: u64,
    /// Since when the oldest of them is due.
    pub oldest_due_at: Option<Timestamp>,
    /// Chunks whose time has not come.
    pub scheduled: u64,
    /// Chunks held by the operator or parked by a breaker.
    pub waiting: u64,
}

/// A replica as others see it.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Its row.
    pub id: ReplicaId,
    /// Host and process.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Moves every second while it lives.
    pub beat: i64,
    /// When it joined, on its own clock.
    pub started_at: Timestamp,
}

/// What a replica has taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Whose.
    pub replica: ReplicaId,
    /// Pieces of work.
    pub chunks: u64,
    /// Their devices whose outcome is open, as far as that has been settled.
    pub devices: u64,
}

/// A breaker as all replicas see it.
#[derive(Debug, Clone)]
pub struct Breaker {
    /// Its row.
    pub id: BreakerId,
    /// The app.
    pub topic: Topic,
    /// The environment.
    pub environment: Environment,
    /// The credential's fingerprint.
    pub fingerprint: String,
    /// Since when it is open.
    pub opened_at: Timestamp,
    /// What APNs said.
    pub fault: Fault,
    /// When one replica may try again.
    pub next_probe_at: Timestamp,
    /// How many probes have failed that told something new.
    pub probes: u32,
    /// Chunks that wait for it.
    pub parked: u64,
}

/// The fingerprint of a breaker that an operator has opened.
const PAUSED: &str = "paused";

impl Breaker {
    /// Whether an operator has opened it: then it holds whatever the credential, and is not probed.
    #[must_use]
    pub fn is_pause(&self) -> bool {
        self.fingerprint == PAUSED
    }
}

/// Pauses an app: nothing of it leaves, in either environment, until [`resume`]. What is accepted meanwhile waits.
///
/// # Errors
/// If the database does not answer.
pub async fn pause(store: &dyn Store, topic: &Topic, now: Timestamp) -> Result<(), StoreError> {
    let fault = Fault { status: 0, reason: "Paused".into() };
    for environment in Environment::ALL {
        store.open_breaker(topic, environment, PAUSED, &fault, now, now).await?;
    }
    Ok(())
}

/// Lets a paused app go on. False if it was not paused.
///
/// # Errors
/// If the database does not answer.
pub async fn resume(store: &dyn Store, topic: &Topic, now: Timestamp) -> Result<bool, StoreError> {
    let mut was_paused = false;
    for breaker in store.breakers().await?.iter().filter(|b| b.is_pause() && b.topic == *topic) {
        store.close_breaker(breaker.id, now).await?;
        was_paused = true;
    }
    Ok(was_paused)
}

/// The schema that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaState {
    /// The newest migration applied; 0: none.
    pub version: i64,
    /// The newest migration that this binary knows.
    pub known: i64,
    /// The oldest version of the schema whose readers may use this database.
    pub min_reader: i64,
}

impl SchemaState {
    /// Whether this version may serve on this schema.
    ///
    /// # Errors
    /// [`StoreError::Schema`], which says what to do, if a migration is missing or the schema is too new.
    pub fn check(&self) -> Result<(), StoreError> {
        if self.min_reader > self.known {
            return Err(StoreError::Schema(format!(
                "the database's schema {} may be used by versions that know schema {} or a later one, and this one knows {}: \
                 run a newer sonnette",
                self.version, self.min_reader, self.known
            )));
        }
        if self.version < self.known {
            return Err(StoreError::Schema(format!(
                "the database's schema is {} and this version needs {}: run `sonnette migrate`",
                self.version, self.known
            )));
        }
        Ok(())
    }
}

/// One step of the schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// Its number.
    pub version: i64,
    /// What it makes.
    pub name: String,
}

impl std::fmt::Display for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}_{}", self.version, self.name)
    }
}

/// Devices and who holds them.
#[async_trait]
pub trait Devices: Send + Sync {
    /// Registers or refreshes a group, in its order; one device a registration comes back.
    async fn register(&self, group: &[Registration], now: Timestamp) -> Result<Vec<Device>, StoreError>;
    /// One device.
    async fn device(&self, id: DeviceId) -> Result<Option<Device>, StoreError>;
    /// A list, newest first. A cursor of another list starts it anew.
    async fn devices(&self, filter: &DeviceFilter, page: &PageRequest) -> Result<Page<Device>, StoreError>;
    /// Takes the user off this device and all tokens of its installation (same topic). False if there is no such
    /// device.
    async fn log_out(&self, id: DeviceId, now: Timestamp) -> Result<bool, StoreError>;
    /// Forgets a device; its number stays as a tombstone. False if there is no such device.
    async fn forget(&self, id: DeviceId, now: Timestamp) -> Result<bool, StoreError>;
    /// The ownership read: these devices as they are now. Those that are forgotten are missing.
    async fn addresses(&self, devices: &[DeviceSeq]) -> Result<Vec<Address>, StoreError>;
}

/// What was asked for, read back.
#[async_trait]
pub trait Notifications: Send + Sync {
    /// One notification with its counts, in one consistent read.
    async fn notification(&self, id: NotificationId) -> Result<Option<NotificationView>, StoreError>;
    /// A list, newest first.
    async fn notifications(
        &self,
        filter: &NotificationFilter,
        page: &PageRequest,
    ) -> Result<Page<NotificationView>, StoreError>;
    /// The outcome of each device, in the audience's order; `None` if there is no such notification.
    async fn deliveries(
        &self,
        id: NotificationId,
        status: Option<DeliveryStatus>,
        page: &PageRequest,
    ) -> Result<Option<Page<DeliveryView>>, StoreError>;
}

/// The durable queue.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Commits a group: each has its own idempotency key and gets its own answer; a bad one never fails the others.
    /// The outer error is everybody's: nothing can be said of any of them.
    /// On [`StoreError::CommitUnknown`] the caller asks [`Queue::committed`] before it says anything.
    /// Work is taken in this replica's name only while its row is there, looked at with a lock: once it is buried,
    /// what it accepts is nobody's.
    async fn accept(
        &self,
        group: &[Submission],
        replica: ReplicaId,
        now: Timestamp,
    ) -> Result<Vec<Result<Accepted, StoreError>>, StoreError>;
    /// What was accepted under this idempotency key before: [`Accepted::Seen`], [`Accepted::Conflict`] for another body,
    /// `None` if the key is new. For a request that is refused by the clock now and was right when it came first.
    async fn seen(&self, idempotency: &Idempotency) -> Result<Option<Accepted>, StoreError>;
    /// Which of these notifications are committed. Waits for a commit that is still under way.
    async fn committed(&self, ids: &[NotificationId]) -> Result<BTreeSet<NotificationId>, StoreError>;
    /// Takes over at most `max` due chunks of `lanes`, in that order, that nobody owns, oldest first, or of audiences that are
    /// resolved as many parts as have the targets of so many chunks; also those parked by one of
    /// `passable` breakers (open for another credential than this replica's), and those whose time parked by one of
    /// `overdue` is over. Audiences that are due are resolved: long ones a piece at a time, whose chunks are this
    /// replica's, and whose rest is due behind what else waits in its lane. What was cancelled ends, and is not taken.
    async fn claim(
        &self,
        lanes: &[Lane],
        max: usize,
        passable: &[BreakerId],
        overdue: &[BreakerId],
        replica: ReplicaId,
        now: Timestamp,
    ) -> Result<Claimed, StoreError>;
    /// Takes a chunk parked by this breaker, for a probe: an urgent one nothing of which was tried, the oldest first;
    /// else a bulk one; else the one that has waited longest since it was tried. Never one whose time is over.
    async fn claim_probe(
        &self,
        breaker: BreakerId,
        replica: ReplicaId,
        now: Timestamp,
    ) -> Result<Option<Lease>, StoreError>;
    /// Records progress, moves each chunk on, and applies what was learned of devices. Returns those whose lease was
    /// lost: somebody else owns them now, and nothing of theirs was changed.
    async fn settle(
        &self,
        done: &[Settled<'_>],
        replica: ReplicaId,
        now: Timestamp,
    ) -> Result<Vec<ChunkKey>, StoreError>;
    /// Cancels what no replica holds, of a notification that has not ended, and tells the others by
    /// [`Queue::cancelled`]; how it stands now. May be repeated; what has ended stays as it is. `None` if there is no such
    /// notification.
    async fn cancel(&self, id: NotificationId, now: Timestamp) -> Result<Option<NotificationView>, StoreError>;
    /// Notifications that were cancelled and of which some deliveries are open: nothing of them may leave. What was put
    /// back or parked by a replica that did not know yet may be claimed at once, to be ended.
    async fn cancelled(&self, now: Timestamp) -> Result<BTreeSet<NotificationId>, StoreError>;
    /// The chunks that this replica owns according to the database.
    async fn owned(&self, replica: ReplicaId) -> Result<Vec<ChunkKey>, StoreError>;
    /// Gives back chunks that this replica owns but does not have in memory.
    async fn disown(&self, keys: &[ChunkKey], replica: ReplicaId) -> Result<(), StoreError>;
    /// Whether a newer notification with this collapse id has gone, or is going, to this device.
    async fn superseded(
        &self,
        device: DeviceSeq,
        topic: &Topic,
        collapse_id: &CollapseId,
        than: NotificationId,
    ) -> Result<bool, StoreError>;
    /// When the next chunk that nobody owns is due; `None` if there is none.
    async fn next_due_at(&self) -> Result<Option<Timestamp>, StoreError>;
    /// How much waits, by app and lane.
    async fn depth(&self, now: Timestamp) -> Result<Vec<QueueDepth>, StoreError>;
    /// Holds whatever is open until [`Queue::release_held`]. Returns how many chunks.
    async fn hold(&self, now: Timestamp) -> Result<u64, StoreError>;
    /// Lets held work go on. Returns how many chunks.
    async fn release_held(&self) -> Result<u64, StoreError>;
}

/// Who is alive.
#[async_trait]
pub trait Replicas: Send + Sync {
    /// Joins as a new replica.
    async fn join(&self, name: &str, version: &str, now: Timestamp) -> Result<ReplicaId, StoreError>;
    /// Bumps the counter. False: this replica was declared dead; nothing it owned is its own any more.
    async fn beat(&self, replica: ReplicaId) -> Result<bool, StoreError>;
    /// What the database's own clock shows; `None` where it has none (SQLite).
    async fn time(&self) -> Result<Option<Timestamp>, StoreError>;
    /// All replicas.
    async fn replicas(&self) -> Result<Vec<Replica>, StoreError>;
    /// What each replica has taken on; one that has nothing is not listed.
    async fn holdings(&self) -> Result<Vec<Holding>, StoreError>;
    /// Declares a replica dead if its counter still shows `beat`: its work is given back. False if it moved.
    async fn bury(&self, replica: ReplicaId, beat: i64) -> Result<bool, StoreError>;
    /// Sets free what is held in the name of a replica that is gone, or parked behind a breaker that is closed; how many
    /// chunks. There are none but on a Galera cluster, whose nodes do not know each other's locks.
    async fn free_orphans(&self, now: Timestamp) -> Result<u64, StoreError>;
    /// Leaves in good order; whatever is still owned is given back.
    async fn leave(&self, replica: ReplicaId) -> Result<(), StoreError>;
}

/// Credentials that APNs refuses.
#[async_trait]
pub trait Breakers: Send + Sync {
    /// Opens a breaker; one that is open already stays as it is.
    async fn open_breaker(
        &self,
        topic: &Topic,
        environment: Environment,
        fingerprint: &str,
        fault: &Fault,
        now: Timestamp,
        next_probe_at: Timestamp,
    ) -> Result<BreakerId, StoreError>;
    /// A probe got the same answer, or another of the kind: counted, and the last answer is shown. Nothing, if the breaker
    /// has closed.
    async fn probe_failed(&self, breaker: BreakerId, fault: &Fault) -> Result<(), StoreError>;
    /// All open breakers.
    async fn breakers(&self) -> Result<Vec<Breaker>, StoreError>;
    /// Tries to become the one that probes now: true for one replica only. Moves the next probe to `next_probe_at`.
    async fn elect_probe(
        &self,
        breaker: BreakerId,
        now: Timestamp,
        next_probe_at: Timestamp,
    ) -> Result<bool, StoreError>;
    /// Closes a breaker and lets its chunks go on: they are due now.
    async fn close_breaker(&self, breaker: BreakerId, now: Timestamp) -> Result<(), StoreError>;
}

/// API keys.
#[async_trait]
pub trait ApiKeys: Send + Sync {
    /// Keeps a new key.
    async fn add_api_key(&self, key: &ApiKey) -> Result<(), StoreError>;
    /// One key, revoked and expired ones included.
    async fn api_key(&self, id: &ApiKeyId) -> Result<Option<ApiKey>, StoreError>;
    /// All keys, newest first.
    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError>;
    /// Revokes a key. False if there is no such key.
    async fn revoke_api_key(&self, id: &ApiKeyId, now: Timestamp) -> Result<bool, StoreError>;
}

/// The database itself.
#[async_trait]
pub trait Database: Send + Sync {
    /// Which database.
    fn kind(&self) -> Kind;
    /// Whether a commit can be made now: commits a small row of its own.
    async fn probe(&self, now: Timestamp) -> Result<(), StoreError>;
    /// The schema. An empty database has version 0.
    async fn schema(&self) -> Result<SchemaState, StoreError>;
    /// What this version knows and this database lacks, in order.
    async fn pending(&self) -> Result<Vec<Migration>, StoreError>;
    /// Applies what is pending, one process at a time; what this call has applied comes back.
    async fn migrate(&self) -> Result<Vec<Migration>, StoreError>;
    /// A secret that all replicas share: kept as `fresh` if there is none yet; the one that is kept comes back.
    async fn shared_secret(&self, name: &str, fresh: &[u8]) -> Result<Vec<u8>, StoreError>;
    /// The server's name and version, for `/health`.
    async fn server(&self) -> Result<String, StoreError>;
    /// Closes all connections.
    async fn close(&self);
}

/// Everything that is kept.
pub trait Store: Devices + Notifications + Queue + Replicas + Breakers + ApiKeys + Retention + Database {}

impl<T: Devices + Notifications + Queue + Replicas + Breakers + ApiKeys + Retention + Database> Store for T {}
