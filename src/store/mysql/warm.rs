//! Transactions, and the connections that have just committed one: they are at hand for the next.
//!
//! On its way back into the pool a connection is rolled back, asked whether it lives, and passed on by a task of its own:
//! two of the seven or so times that the server is spoken to for a group, and all of it in vain behind a COMMIT that was
//! answered. And the pool gives out whichever connection has rested longest, so that each of many has to have the same
//! statements prepared.
//!
//! Promises: only a connection whose COMMIT was answered is kept here; one whose transaction failed, was given up or
//! was cut off goes the pool's way. At most [`MOST`] are kept. None that has rested for [`RESTS_FOR`] is used again, and none
//! stays past [`KEPT_FOR`], so that the pool judges its age. Whoever waits for the pool waits for none of them: while
//! somebody does, nothing is kept. Once closed, nothing is.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{Executor, MySql, MySqlPool, mysql::MySqlConnection, pool::PoolConnection};

use crate::store::sql::Open;

/// The most connections of one pool that are kept, of those half at most that it may have.
const MOST: u32 = 4;

/// One that has rested for longer is given back when the next is asked for: the server may have ended it (see `pin_session`).
const RESTS_FOR: Duration = Duration::from_secs(1);

/// One that is out for longer is given back at its next COMMIT: the pool ends those that are too old.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// An open transaction. Dropped, it is rolled back on its way into the pool.
#[derive(Debug)]
pub(in crate::store) struct Tx {
    lent: Lent,
    /// `None`: its pool keeps nothing at hand.
    warm: Option<Arc<Warm>>,
}

impl Tx {
    /// On a connection that has just committed, or else on one of the pool's.
    pub(super) async fn begin(warm: &Arc<Warm>, statement: &'static str) -> Result<Self, sqlx::Error> {
        let lent = warm.lend().await?;
        Self { lent, warm: Some(Arc::clone(warm)) }.begun(statement).await
    }

    /// On a connection that has just committed, where there is one; not begun yet.
    pub(super) fn at_hand(warm: &Arc<Warm>) -> Option<Self> {
        Some(Self { lent: warm.at_hand()?, warm: Some(Arc::clone(warm)) })
    }

    /// On a connection of this pool, and back into it.
    pub(super) async fn begin_in(pool: &MySqlPool, statement: &'static str) -> Result<Self, sqlx::Error> {
        Self { lent: Lent::new(pool.acquire().await?), warm: None }.begun(statement).await
    }

    async fn begun(mut self, statement: &'static str) -> Result<Self, sqlx::Error> {
        self.execute(statement).await?;
        Ok(self)
    }

    /// Undoes what it has done.
    pub(in crate::store) async fn rollback(mut self) -> Result<(), sqlx::Error> {
        self.execute("ROLLBACK").await.map(drop)
    }
}

impl Open for Tx {
    async fn commit(mut self) -> Result<(), sqlx::Error> {
        self.execute("COMMIT").await?;
        let Self { lent, warm } = self;
        if let Some(warm) = warm {
            warm.keep(lent);
        }
        Ok(())
    }
}

impl Deref for Tx {
    type Target = MySqlConnection;

    fn deref(&self) -> &MySqlConnection {
        &self.lent.connection
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut MySqlConnection {
        &mut self.lent.connection
    }
}

/// A connection that is out of its pool.
#[derive(Debug)]
struct Lent {
    connection: PoolConnection<MySql>,
    since: Instant,
}

impl Lent {
    fn new(connection: PoolConnection<MySql>) -> Self {
        Self { connection, since: Instant::now() }
    }
}

/// The connections of one pool that are at hand.
#[derive(Debug)]
pub(super) struct Warm {
    pool: MySqlPool,
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Each with when it was put here, the newest last.
    resting: Vec<(Lent, Instant)>,
    /// Who waits for the pool, or may do so any moment.
    wanting: u32,
    closed: bool,
}

impl Kept {
    /// Those that have rested for too long.
    fn stale(&mut self) -> Vec<(Lent, Instant)> {
        let stale = self.resting.iter().take_while(|(_, since)| since.elapsed() >= RESTS_FOR).count();
        self.resting.drain(..stale).collect()
    }

    /// One that has not, if there is one; and those that have.
    fn take(&mut self) -> (Option<Lent>, Vec<(Lent, Instant)>) {
        let stale = self.stale();
        (self.resting.pop().map(|(lent, _)| lent), stale)
    }
}

impl Warm {
    /// None yet.
    pub(super) fn of(pool: MySqlPool) -> Self {
        let most = usize::try_from(MOST.min(pool.options().get_max_connections() / 2)).unwrap_or_default();
        Self { pool, most, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that has just committed.
    fn at_hand(&self) -> Option<Lent> {
        let (lent, stale) = self.kept().take();
        drop(stale);
        lent
    }

    async fn lend(&self) -> Result<Lent, sqlx::Error> {
        // What goes back into the pool does so behind the lock, here and below.
        let (lent, stale, wanting) = {
            let mut kept = self.kept();
            let (lent, stale) = kept.take();
            // Under the same lock: from here on whoever commits gives back.
            let wanting = lent.is_none().then(|| self.wanting_in(&mut kept));
            (lent, stale, wanting)
        };
        drop(stale);
        let lent = match lent {
            Some(lent) => lent,
            None => Lent::new(self.pool.acquire().await?),
        };
        drop(wanting);
        Ok(lent)
    }

    /// To be held by whoever asks the pool itself: until it is dropped nothing is kept here that he may wait for.
    pub(super) fn wanting(&self) -> Wanting<'_> {
        let (given_back, wanting) = {
            let mut kept = self.kept();
            let wanting = self.wanting_in(&mut kept);
            let idle = u32::try_from(self.pool.num_idle()).unwrap_or(u32::MAX);
            let out = self.pool.size().saturating_sub(idle);
            let free = self.pool.options().get_max_connections().saturating_sub(out);
            let given_back = if kept.wanting > free { std::mem::take(&mut kept.resting) } else { kept.stale() };
            (given_back, wanting)
        };
        drop(given_back);
        wanting
    }

    fn wanting_in(&self, kept: &mut Kept) -> Wanting<'_> {
        kept.wanting += 1;
        Wanting(self)
    }

    /// Keeps one that has just committed, if it may.
    fn keep(&self, lent: Lent) {
        let refused = {
            let mut kept = self.kept();
            let is_kept =
                !kept.closed && kept.wanting == 0 && kept.resting.len() < self.most && lent.since.elapsed() < KEPT_FOR;
            if is_kept {
                kept.resting.push((lent, Instant::now()));
                None
            } else {
                Some(lent)
            }
        };
        drop(refused);
    }

    /// Gives all back, now and from now on.
    pub(super) fn close(&self) {
        let given_back = {
            let mut kept = self.kept();
            kept.closed = true;
            std::mem::take(&mut kept.resting)
        };
        drop(given_back);
    }
}

/// A wait for a connection of the pool.
pub(super) struct Wanting<'w>(&'w Warm);

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.0.kept().wanting -= 1;
    }
}
