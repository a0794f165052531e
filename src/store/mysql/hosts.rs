//! Which host is spoken to, and when to turn to another.
//!
//! Promises: a host that is read-only is never turned to, and at the start only if no other answers that can be written
//! to; nor is a node that is outside its cluster, or cannot catch up with it; the one that is spoken to stays for as
//! long as it answers and can be written to, whatever the order in the URL; after a turn no statement goes to a connection
//! made before it. Hosts are looked at only when something went wrong, all at once, by one task for all, and at most every
//! [`LOOK_EVERY`].

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use sqlx::{
    Connection, Executor, MySqlPool, Row,
    mysql::{MySqlConnection, MySqlPoolOptions},
};

use super::warm::{Tx, Warm};
use crate::store::{
    Kind, StoreError,
    address::Host,
    reasons::Reasons,
    sql::{self, is_cut, is_of_its_host},
};

/// How long a host may take to show that it can be written to.
const LOOK: Duration = Duration::from_secs(2);

/// The shortest time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a transaction may take to begin, once there is a connection.
const BEGIN: Duration = Duration::from_secs(2);

/// A pool on which nothing was answered for so long is stuck, though the host answers others: it has moved, or a network
/// between us has forgotten our connections.
const STUCK: Duration = Duration::from_secs(8);

/// All hosts, and the connections to one of them.
#[derive(Debug)]
pub(super) struct Hosts {
    all: Vec<Host>,
    pools: MySqlPoolOptions,
    current: RwLock<Current>,
    /// When the last look ended.
    looked: tokio::sync::Mutex<Option<Instant>>,
    /// What is remembered of the database's content, and may not be true of another host's.
    reasons: Arc<Reasons>,
    /// Moves when the pool is not to be waited for any longer: its host was left, or nobody is there.
    left: tokio::sync::watch::Sender<()>,
    /// The last look found nobody to speak to.
    lost: AtomicBool,
    started: Instant,
    /// When something was last answered, in milliseconds since `started`.
    answered: AtomicU64,
}

#[derive(Debug, Clone)]
struct Current {
    pools: Pools,
    host: usize,
    /// Grows with every new pool.
    turn: u64,
}

/// The connections to one host.
#[derive(Debug, Clone)]
struct Pools {
    work: MySqlPool,
    /// Those of them that have just committed.
    warm: Arc<Warm>,
    /// One, which nothing else may keep busy.
    heart: MySqlPool,
}

impl Pools {
    fn to(host: &Host, options: &MySqlPoolOptions) -> Self {
        // Kept for good: where the server is full, another could not be had.
        let heart = options.clone().max_connections(1).max_lifetime(None).idle_timeout(None);
        let pool = |options: MySqlPoolOptions| options.connect_lazy_with(host.options.clone());
        let work = pool(options.clone());
        Self { warm: Arc::new(Warm::of(work.clone())), work, heart: pool(heart) }
    }

    const fn of(&self, whose: Whose) -> &MySqlPool {
        match whose {
            Whose::Work => &self.work,
            Whose::Heart => &self.heart,
        }
    }

    /// Marks them at once, whether or not the answer is waited for: until all of them have come back.
    fn close(&self) -> impl Future<Output = ()> {
        let (work, heart) = (self.work.close(), self.heart.close());
        self.warm.close();
        async { _ = tokio::join!(work, heart) }
    }
}

/// Whose connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Everybody's but the heart's.
    Work,
    /// The heart's alone.
    Heart,
}

/// What a look at a host found.
enum Seen {
    Writable,
    ReadOnly,
    /// It lives, and takes no more connections.
    Busy,
    Gone(String),
}

impl Hosts {
    /// Looks at all hosts and takes the first that can be written to, else the first that answers.
    ///
    /// # Errors
    /// [`StoreError::Settings`] if none answers and all say something that the configuration can cure, else
    /// [`StoreError::Unavailable`].
    pub(super) async fn open(
        hosts: Vec<Host>,
        pools: MySqlPoolOptions,
        patience: Duration,
        reasons: Arc<Reasons>,
    ) -> Result<Self, StoreError> {
        let mut refused = Vec::new();
        let mut to_be_cured = true;
        let mut found: Option<usize> = None;
        for (number, host) in hosts.iter().enumerate() {
            match look(host, patience).await {
                Ok(true) => {
                    found = Some(number);
                    break;
                }
                Ok(false) => {
                    tracing::warn!(host = %host, "the database's host {host} is read-only");
                    found = found.or(Some(number));
                }
                Err(Unreached { said, cure, .. }) => {
                    to_be_cured &= cure;
                    refused.push(said);
                }
            }
        }
        let Some(number) = found else {
            let refused = refused.join("; ");
            return Err(if to_be_cured {
                StoreError::Settings(refused)
            } else {
                StoreError::Unavailable(refused.into())
            });
        };
        for said in refused {
            tracing::warn!("a host of the database is passed over: {said}");
        }
        let Some(host) = hosts.get(number) else { return Err(StoreError::Settings("names no host".to_owned())) };
        let current = Current { pools: Pools::to(host, &pools), host: number, turn: 0 };
        Ok(Self {
            current: RwLock::new(current),
            all: hosts,
            pools,
            looked: tokio::sync::Mutex::new(None),
            reasons,
            left: tokio::sync::watch::Sender::new(()),
            lost: AtomicBool::new(false),
            started: Instant::now(),
            answered: AtomicU64::new(0),
        })
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins a transaction by `statement`, on another host if this one is gone or does not take it.
    pub(super) async fn begin(&self, statement: &'static str, whose: Whose) -> Result<Tx, sqlx::Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut left = self.left.subscribe();
            let current = self.present().await?;
            let begun = tokio::select! {
                biased;
                begun = self.begin_on(&current.pools, whose, statement) => begun,
                // What it had begun, if anything, is rolled back.
                _ = left.changed() => Err(gone("the database's host was left")),
            };
            let error = match begun {
                Ok(tx) => {
                    self.heard(whose);
                    return Ok(tx);
                }
                Err(error) => error,
            };
            if !self.turned_after(&current, &error).await || tries > 2 {
                return Err(error);
            }
        }
    }

    /// A transaction that has not begun, on a connection that has just committed one. `None`: there is none at hand.
    pub(super) fn at_hand(&self) -> Option<Tx> {
        Tx::at_hand(&self.current().pools.warm)
    }

    async fn begin_on(&self, pools: &Pools, whose: Whose, statement: &'static str) -> Result<Tx, sqlx::Error> {
        // The time to wait for a connection is the pool's own affair: behind others, that is no sign of a dead host.
        let limit = self.pools.get_acquire_timeout() + BEGIN;
        let begun = async {
            match whose {
                Whose::Work => Tx::begin(&pools.warm, statement).await,
                Whose::Heart => Tx::begin_in(&pools.heart, statement).await,
            }
        };
        match tokio::time::timeout(limit, begun).await {
            Ok(begun) => begun,
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        }
    }

    /// The pool as it is now.
    pub(super) fn pool(&self) -> MySqlPool {
        self.current().pools.work
    }

    /// Runs a single read, and has the hosts looked at if it fails because of its host.
    pub(super) async fn read<T, F, Fut>(&self, whose: Whose, once: F) -> Result<T, sqlx::Error>
    where
        F: FnOnce(MySqlPool) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut left = self.left.subscribe();
        let current = self.present().await?;
        let wanting = (whose == Whose::Work).then(|| current.pools.warm.wanting());
        let done = tokio::select! {
            biased;
            done = once(current.pools.of(whose).clone()) => done,
            _ = left.changed() => Err(gone("the database's host was left")),
        };
        drop(wanting);
        match &done {
            Ok(_) => self.heard(whose),
            Err(error) => _ = self.turned_after(&current, error).await,
        }
        done
    }

    pub(super) async fn close(&self) {
        self.current().pools.close().await;
    }

    /// That the heart's own connection lives says nothing of the others.
    fn heard(&self, whose: Whose) {
        if whose == Whose::Heart {
            return;
        }
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.store(now, Ordering::Relaxed);
    }

    fn is_stuck(&self) -> bool {
        let answered = Duration::from_millis(self.answered.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(answered) > STUCK
    }

    /// The pool to be used now, after another look if the last one found nobody and was not just now: of several hosts
    /// one may be back, or have been promoted, any moment. A host that is alone is waited for by its pool.
    async fn present(&self) -> Result<Current, sqlx::Error> {
        let before = self.current();
        if self.all.len() < 2 || !self.lost.load(Ordering::Relaxed) {
            return Ok(before);
        }
        let mut looked = self.looked.lock().await;
        let just_now = looked.is_some_and(|at| at.elapsed() < LOOK_EVERY);
        if self.current().turn == before.turn && !before.pools.work.is_closed() && !just_now {
            self.look_around(&before, true).await;
            *looked = Some(Instant::now());
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(gone("no host of the database can be written to"));
        }
        Ok(self.current())
    }

    /// After this error of this pool: whether there is a new pool, so that what was not committed may be tried again.
    async fn turned_after(&self, before: &Current, error: &sqlx::Error) -> bool {
        let cut = is_cut(error);
        // Asked of what begins a transaction or only reads, which waits for no row lock.
        let host_is_to_blame = is_of_its_host(error)
            || is_behind(error)
            || matches!(error, sqlx::Error::PoolTimedOut | sqlx::Error::Tls(_) | sqlx::Error::PoolClosed);
        if !host_is_to_blame {
            return false;
        }
        let failed_at = Instant::now();
        let mut looked = self.looked.lock().await;
        let current = self.current();
        if current.turn != before.turn {
            return true;
        }
        // Closed, and nobody made a new one: the service is ending.
        if before.pools.work.is_closed() || looked.is_some_and(|at| at > failed_at) {
            return false;
        }
        if let Some(wait) = looked.and_then(|at| LOOK_EVERY.checked_sub(at.elapsed())) {
            tokio::time::sleep(wait).await;
        }
        let turned = self.look_around(&current, cut).await;
        *looked = Some(Instant::now());
        turned
    }

    async fn look_around(&self, current: &Current, cut: bool) -> bool {
        let seen = join_all(self.all.iter().map(|host| async move {
            match look(host, LOOK).await {
                Ok(true) => Seen::Writable,
                Ok(false) => Seen::ReadOnly,
                Err(unreached) if unreached.busy => Seen::Busy,
                Err(unreached) => Seen::Gone(unreached.said),
            }
        }))
        .await;
        // From the one that was spoken to, around. Another one that is read-only may lag behind: who owns a device is
        // not to be asked there.
        let mut around = (0..seen.len()).map(|step| (current.host + step) % seen.len());
        let writable = around.find(|number| matches!(seen.get(*number), Some(Seen::Writable)));
        let stays = matches!(seen.get(current.host), Some(Seen::ReadOnly | Seen::Busy)).then_some(current.host);
        let was_lost = self.lost.swap(writable.or(stays).is_none(), Ordering::Relaxed);
        let Some(number) = writable.or(stays) else {
            for seen in seen.iter().filter(|_| !was_lost) {
                if let Seen::Gone(said) = seen {
                    tracing::warn!("a host of the database is out of reach: {said}");
                }
            }
            // A host that is alone is waited for by its pool.
            if self.all.len() > 1 {
                self.left.send_replace(());
            }
            return false;
        };
        // The same host as before: anew only if what there is of connections is dead.
        if number == current.host && !cut && !self.is_stuck() {
            return false;
        }
        let Some(host) = self.all.get(number) else { return false };
        if number != current.host {
            let was = match seen.get(current.host) {
                Some(Seen::Gone(said)) => said.as_str(),
                _ => "it is read-only",
            };
            tracing::warn!(host = %host, "turned to the database's host {host}; the one before cannot be used: {was}");
            self.reasons.forget();
        }
        let new = Current { pools: Pools::to(host, &self.pools), host: number, turn: current.turn + 1 };
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        // Marks it: whoever waits for one of its connections is told at once, and what comes back to it is closed.
        // Not waited for, because what hangs may hang for long.
        drop(current.pools.close());
        self.left.send_replace(());
        self.heard(Whose::Work);
        true
    }
}

pub(super) fn gone(why: &'static str) -> sqlx::Error {
    std::io::Error::new(std::io::ErrorKind::NotConnected, why).into()
}

/// A Galera node could not wait until it had what was committed before on others: "lock wait timeout", which is also
/// what a node outside its cluster says to a read that is no transaction.
fn is_behind(error: &sqlx::Error) -> bool {
    matches!(sql::number(error), Some((Kind::Mysql, 1205)))
}

/// Why a host cannot be used, and whether the configuration can cure it.
struct Unreached {
    said: String,
    cure: bool,
    busy: bool,
}

/// Whether a host can be written to.
async fn look(host: &Host, patience: Duration) -> Result<bool, Unreached> {
    let asked = tokio::time::timeout(patience, async {
        let mut connection = MySqlConnection::connect_with(&host.options).await?;
        super::pin_session(&mut connection).await?;
        let writable = is_writable(&mut connection).await?;
        if writable {
            // A Galera node says so also outside its cluster; but there no transaction begins, and it waits for the others'.
            connection.execute("START TRANSACTION READ WRITE").await?;
        }
        // Best effort: the answer is there.
        _ = connection.close().await;
        Ok(writable)
    });
    match asked.await {
        Ok(Ok(writable)) => Ok(writable),
        Ok(Err(error)) => {
            let advice = host.advice(&error);
            let busy = sql::is_full(&error);
            let cure = advice.is_some();
            let said = advice.unwrap_or_else(|| format!("{host}: {}", sql::without_values(error)));
            Err(Unreached { said, cure, busy })
        }
        Err(_) => Err(Unreached { said: format!("{host}: no answer within {patience:?}"), cure: false, busy: false }),
    }
}

/// Whether the server takes writes from an ordinary account: an account with more rights than it needs would be let
/// through, and write past a replication.
async fn is_writable(connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    // What MySQL, MariaDB and hosted versions of them call it; the values are words on some and numbers on others.
    let rows = sqlx::query(
        "-- database.writable\nSHOW GLOBAL VARIABLES WHERE Variable_name IN ('read_only', 'super_read_only', \
         'innodb_read_only', 'transaction_read_only', 'tx_read_only')",
    )
    .fetch_all(connection)
    .await?;
    for row in rows {
        let value: String = row.try_get(1)?;
        if !matches!(value.as_str(), "OFF" | "0") {
            return Ok(false);
        }
    }
    Ok(true)
}
