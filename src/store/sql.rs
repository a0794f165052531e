//! What both databases share: one text stamped for each, the shape of a transaction, and what errors mean.
//!
//! Promises: a transaction is repeated only when it certainly did not commit (deadlock, lock wait, a connection that
//! broke before COMMIT, and a duplicate key where the verb asks for it); a COMMIT that was not answered is
//! [`StoreError::CommitUnknown`], never a guess; no error carries a value of a row: MySQL quotes device tokens in its
//! "Duplicate entry".
//!
//! A verb that writes reads like this, in a module stamped by [`on_both`]:
//!
//! ```text
//! async fn log_out(&self, id: DeviceId, now: Timestamp) -> Result<bool, StoreError> {
//!     committed(Repeat::Deadlocks, || self.log_out_once(id, now)).await
//! }
//! async fn log_out_once(&self, id: DeviceId, now: Timestamp) -> Result<(Tx, bool), Failure> {
//!     let mut tx = self.begin().await?;
//!     sqlx::query("-- devices.log_out\nUPDATE …").bind(…).execute(&mut *tx).await?;
//!     Ok((tx, true))
//! }
//! ```

use std::{fmt, future::Future, time::Duration};

use sqlx::{Database, Encode, QueryBuilder, Sqlite, Transaction, Type, error::ErrorKind};

use super::{BoxError, StoreError};

/// Stamps one text twice: in module `on_sqlite` and in module `on_mysql`. Inside, these names mean the one or the
/// other (see `names` in `sqlite.rs` and `mysql.rs`, where each difference is explained):
///
/// `Db` sqlx's database · `Base` the store (`turn`, `begin`, `snapshot`, `reader`) · `Tx` a transaction · `DIALECT` a
/// [`super::Kind`] to choose a text by · `FOR_UPDATE`, `SKIP_LOCKED` pushed at the end of a SELECT ·
/// `INSERT_IF_ABSENT` instead of INSERT · `new_id` the number of the row just inserted.
macro_rules! on_both {
    ($($body:tt)*) => {
        mod on_sqlite {
            #[allow(unused_imports, clippy::wildcard_imports, clippy::allow_attributes, reason = "one text, two sets of names")]
            use {super::*, $crate::store::sqlite::names::*};
            $($body)*
        }
        mod on_mysql {
            #[allow(unused_imports, clippy::wildcard_imports, clippy::allow_attributes, reason = "one text, two sets of names")]
            use {super::*, $crate::store::mysql::names::*};
            $($body)*
        }
    };
}
pub(super) use on_both;

/// Why a transaction could not be brought to its COMMIT. `?` makes one of either.
#[derive(Debug)]
pub(super) enum Failure {
    /// The database said so; [`committed`] decides whether to repeat.
    Sql(sqlx::Error),
    /// Not to be repeated.
    Store(StoreError),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Sql(error) => error.into(),
            Failure::Store(error) => error,
        }
    }
}

impl From<sqlx::Error> for StoreError {
    /// What an error outside COMMIT means.
    fn from(error: sqlx::Error) -> Self {
        if is_away(&error) { Self::Unavailable(without_values(error)) } else { Self::Statement(without_values(error)) }
    }
}

/// When a transaction that did not commit is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// On a deadlock, a lock that was waited for too long, or a connection that broke before COMMIT.
    Deadlocks,
    /// Also on a duplicate key: somebody has just inserted what this transaction did not see.
    DuplicatesToo,
}

/// How often one transaction is tried before the database counts as unavailable.
const TRIES: u32 = 12;

/// How long a transaction may take up to its COMMIT. The service's own clock does not rule here: the peer is real.
const WORK_DEADLINE: Duration = Duration::from_secs(10);

/// How long a COMMIT may stay unanswered before it counts as unknown.
const COMMIT_DEADLINE: Duration = Duration::from_secs(10);

/// An open transaction. Dropped, it is rolled back.
pub(super) trait Open: Send + Sized {
    /// Commits it.
    fn commit(self) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

impl Open for Transaction<'_, Sqlite> {
    fn commit(self) -> impl Future<Output = Result<(), sqlx::Error>> + Send {
        Transaction::commit(self)
    }
}

/// Runs `once` up to its COMMIT and commits, again where that is safe and sensible. `once` gives its open transaction
/// and the answer.
pub(super) async fn committed<X, T, F, Fut>(repeat: Repeat, mut once: F) -> Result<T, StoreError>
where
    X: Open,
    F: FnMut() -> Fut + Send,
    Fut: Future<Output = Result<(X, T), Failure>> + Send,
    T: Send,
{
    let mut tries = 0;
    loop {
        tries += 1;
        let error = match within(WORK_DEADLINE, once()).await {
            Ok((tx, answer)) => match commit(tx).await {
                Ok(()) => return Ok(answer),
                Err(Failure::Sql(error)) => error,
                Err(Failure::Store(error)) => return Err(error),
            },
            Err(Failure::Sql(error)) => error,
            Err(Failure::Store(error)) => return Err(error),
        };
        let again = is_lock_lost(&error)
            || (is_of_its_host(&error) && tries <= 3)
            || (repeat == Repeat::DuplicatesToo && is_duplicate(&error));
        if !again {
            return Err(error.into());
        }
        if tries >= TRIES {
            return Err(StoreError::Unavailable(without_values(error)));
        }
        pause(tries).await;
    }
}

/// Runs a read, once more if the connection broke: a read changes nothing.
pub(super) async fn read<T, F, Fut>(mut once: F) -> Result<T, StoreError>
where
    F: FnMut() -> Fut + Send,
    Fut: Future<Output = Result<T, Failure>> + Send,
{
    let mut tries = 0;
    loop {
        tries += 1;
        match within(WORK_DEADLINE, once()).await {
            Err(Failure::Sql(error))
                if tries <= 3 && (is_cut(&error) || is_lock_lost(&error) || is_outside(&error)) =>
            {
                pause(tries).await;
            }
            done => return done.map_err(StoreError::from),
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Failure>> + Send) -> Result<T, Failure> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(Failure::Store(StoreError::Unavailable("no answer before the deadline".into()))),
    }
}

/// Commits. [`Failure::Sql`] only if it is certain that nothing was.
async fn commit(tx: impl Open) -> Result<(), Failure> {
    match tokio::time::timeout(COMMIT_DEADLINE, tx.commit()).await {
        Ok(Ok(())) => Ok(()),
        // Also how Galera says that another node's transaction won. A server that has become read-only rolls back.
        Ok(Err(error)) if is_lock_lost(&error) || is_read_only(&error) => Err(Failure::Sql(error)),
        Ok(Err(error)) => Err(Failure::Store(StoreError::CommitUnknown(without_values(error)))),
        Err(_) => Err(Failure::Store(StoreError::CommitUnknown("no answer before the deadline".into()))),
    }
}

/// A short pause, longer with every try and different for everybody.
pub(super) async fn pause(tries: u32) {
    let most = 10u64.saturating_mul(1 << tries.min(5));
    tokio::time::sleep(Duration::from_millis(rand::random_range(1..=most))).await;
}

/// The number that the database gave its error: MySQL's, or SQLite's extended result code.
pub(super) fn number(error: &sqlx::Error) -> Option<(super::Kind, u32)> {
    let database = error.as_database_error()?;
    if let Some(mysql) = database.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
        return Some((super::Kind::Mysql, mysql.number().into()));
    }
    Some((super::Kind::Sqlite, database.code()?.parse().ok()?))
}

/// The transaction was rolled back, or never begun, because of others: it may be made again.
fn is_lock_lost(error: &sqlx::Error) -> bool {
    match number(error) {
        // Deadlock (and Galera's certification failure), lock wait timeout, "record has changed since last read"
        // (MariaDB's snapshot isolation), Group Replication's certification failure.
        Some((super::Kind::Mysql, code)) => matches!(code, 1213 | 1205 | 1020 | 3101),
        // SQLITE_BUSY, SQLITE_LOCKED, with any extension.
        Some((super::Kind::Sqlite, code)) => matches!(code & 0xff, 5 | 6),
        None => false,
    }
}

/// Somebody else holds this key already.
pub(super) fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|e| e.kind() == ErrorKind::UniqueViolation)
}

/// The connection broke.
pub(super) fn is_cut(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed)
        // Shutdown under way, connection killed (MySQL's ways to say so).
        || matches!(number(error), Some((super::Kind::Mysql, 1053 | 1927 | 4031)))
}

/// The server takes no writes (any more): `read_only` or `super_read_only`, the engine's own, the transaction's.
fn is_read_only(error: &sqlx::Error) -> bool {
    matches!(number(error), Some((super::Kind::Mysql, 1290 | 1836 | 1792)))
}

/// A Galera node that is outside its cluster, or not in it yet, refuses the statement.
fn is_outside(error: &sqlx::Error) -> bool {
    matches!(number(error), Some((super::Kind::Mysql, 1047)))
}

/// The host is to blame: it is gone, read-only, or outside its cluster.
pub(super) fn is_of_its_host(error: &sqlx::Error) -> bool {
    is_cut(error) || is_read_only(error) || is_outside(error)
}

/// The server lives, and takes no more connections: its own limit (2), the account's.
pub(super) fn is_full(error: &sqlx::Error) -> bool {
    matches!(number(error), Some((super::Kind::Mysql, 1040 | 1203 | 1226)))
}

/// The database is away or refuses everybody: not the statement's fault.
fn is_away(error: &sqlx::Error) -> bool {
    if is_of_its_host(error) || is_lock_lost(error) {
        return true;
    }
    match error {
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Tls(_) | sqlx::Error::BeginFailed => true,
        _ => match number(error) {
            Some((super::Kind::Mysql, code)) => matches!(
                code,
                // Disk full, too many connections (2), out of resources, access denied (2), unknown database,
                // shutdown, query killed, connection lost while authenticating.
                1021 | 1040 | 1203 | 1041 | 1044 | 1045 | 1049 | 1079 | 1317 | 1158..=1161
            ),
            // Disk full, I/O error, read-only, cannot open.
            Some((super::Kind::Sqlite, code)) => matches!(code & 0xff, 8 | 10 | 13 | 14),
            None => false,
        },
    }
}

/// An error of the database without the values it quotes.
#[derive(Debug)]
struct Refused {
    code: String,
    message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

/// The error as a source that may be logged: device tokens and users' ids that MySQL quotes are left out.
pub(super) fn without_values(error: sqlx::Error) -> BoxError {
    let quoted = error
        .as_database_error()
        .and_then(|e| e.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>())
        .filter(|e| e.code().is_some_and(|state| state.starts_with("23") || state.starts_with("22")))
        .map(|e| Refused {
            code: e.number().to_string(),
            message: match e.message().rsplit_once(" for key ") {
                Some((_, key)) => format!("duplicate entry for key {key}"),
                None => "a value was refused".to_owned(),
            },
        });
    match quoted {
        Some(refused) => refused.into(),
        None => error.into(),
    }
}

/// The most values of one list in a statement: both databases take more (SQLite 32,766, MySQL 65,535 parameters).
pub(super) const LIST: usize = 8_192;

/// Pushes `(?, ?, …)` with these values, filled up to a power of two with the last one: so that lists of all lengths
/// make a few statements, which stay prepared. An empty list pushes `(NULL)`, which nothing is in.
pub(super) fn push_list<'t, DB, T>(query: &mut QueryBuilder<DB>, values: impl IntoIterator<Item = T>)
where
    DB: Database,
    T: Encode<'t, DB> + Type<DB> + Clone,
{
    let mut values = values.into_iter();
    let Some(mut last) = values.next() else {
        query.push("(NULL)");
        return;
    };
    let mut count = 1usize;
    query.push("(");
    query.push_bind(last.clone());
    for value in values {
        count += 1;
        last = value;
        query.push(", ");
        query.push_bind(last.clone());
    }
    for _ in count..count.next_power_of_two() {
        query.push(", ");
        query.push_bind(last.clone());
    }
    query.push(")");
}
