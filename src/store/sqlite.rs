//! The SQLite file: one writer, a few readers, and one `serve` at a time.
//!
//! Promises: WAL with `synchronous=FULL`, so a commit survives a power cut; the file, made if it is absent, is for its
//! owner's eyes only; a second `serve` on the same file is refused, however the file is named.

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::{
    Pool, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::{Mutex, MutexGuard};

use super::{Role, Settings, StoreError, sql::Failure};
use crate::domain::clock::Clock;

/// How long a statement waits for another process that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that only read.
const READERS: u32 = 4;

/// What the names in a text stamped by `on_both` mean here.
pub(super) mod names {
    /// sqlx's database.
    pub(in crate::store) type Db = sqlx::Sqlite;
    /// The store.
    pub(in crate::store) type Base = super::SqliteStore;
    /// An open transaction.
    pub(in crate::store) type Tx = sqlx::Transaction<'static, sqlx::Sqlite>;
    /// Which of the two this is.
    pub(in crate::store) const DIALECT: crate::store::Kind = crate::store::Kind::Sqlite;
    /// Differs: `BEGIN IMMEDIATE` has locked everything already.
    pub(in crate::store) const FOR_UPDATE: &str = "";
    /// Differs: as above; nobody else is in a transaction that writes.
    /// Differs: the words for "do nothing if the key is taken".
    pub(in crate::store) const INSERT_IF_ABSENT: &str = "INSERT OR IGNORE INTO ";
    /// Differs: what sqlx calls the number of the row just inserted.
    pub(in crate::store) fn new_id(done: &sqlx::sqlite::SqliteQueryResult) -> i64 {
        done.last_insert_rowid()
    }
}

/// A store in one file.
#[derive(Debug)]
pub(super) struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
    /// Whose turn it is of those that are not urgent.
    turn: Mutex<()>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) reasons: Arc<super::reasons::Reasons>,
    pub(super) noted: Arc<super::queue::chunk::Noted>,
    /// Held as long as the store: the lock goes with the file handle.
    _lock: Option<File>,
}

impl SqliteStore {
    /// Opens the file, and locks it for `serve`.
    pub(super) async fn open(settings: &Settings, role: Role, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let path = path(settings.url.expose())?;
        let cannot = |error: std::io::Error| {
            StoreError::Settings(format!("{} cannot be opened or made: {error}", path.display()))
        };
        for_owner_only().write(true).open(&path).map_err(cannot)?;
        // One file may have several names; its lock has one.
        let path = path.canonicalize().map_err(cannot)?;
        let lock = match role {
            Role::Serve => Some(lock(&path)?),
            Role::CommandLine => None,
        };
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let options = super::quiet(options, settings.slow_statement);
        let pool = |most| {
            SqlitePoolOptions::new()
                .max_connections(most)
                .idle_timeout(None)
                .max_lifetime(None)
                .test_before_acquire(false)
                .acquire_timeout(settings.acquire_timeout)
        };
        // The writer first: it turns WAL on.
        let writer = pool(1).connect_with(options.clone()).await?;
        let readers = pool(READERS).connect_with(options.pragma("query_only", "ON")).await?;
        Ok(Self {
            writer,
            readers,
            turn: Mutex::default(),
            clock,
            reasons: Arc::default(),
            noted: Arc::default(),
            _lock: lock,
        })
    }

    /// The turn to write of what is not urgent, to be held from before a transaction begins until it has committed. Of those
    /// one at a time stands in the queue for the writer, so that whoever does not ask for a turn waits for no more than one.
    pub(super) async fn turn(&self) -> Result<Option<MutexGuard<'_, ()>>, sqlx::Error> {
        let turn = tokio::time::timeout(self.writer.options().get_acquire_timeout(), self.turn.lock()).await;
        Ok(Some(turn.map_err(|_| sqlx::Error::PoolTimedOut)?))
    }

    /// Begins a transaction that writes.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
        // IMMEDIATE: a transaction that read first and writes later could not wait for another writer.
        self.writer.begin_with("BEGIN IMMEDIATE").await
    }

    /// Differs: it is no journey.
    pub(super) async fn begin_soon(&self) -> Result<(Transaction<'static, Sqlite>, Option<&'static str>), sqlx::Error> {
        Ok((self.begin().await?, None))
    }

    /// Differs: there is one writer.
    pub(super) async fn begin_beat(&self) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
        self.begin().await
    }

    /// A single read: a reader is always to be had.
    pub(super) async fn single_beside<T, F, Fut>(&self, once: F) -> Result<T, Failure>
    where
        F: Fn(Pool<Sqlite>) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        self.single(once).await
    }

    /// Begins a transaction of several reads that see one moment.
    pub(super) async fn snapshot(&self) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
        // Differs: in WAL mode a deferred transaction sees the moment of its first read.
        self.readers.begin_with("BEGIN DEFERRED").await
    }

    /// A single read.
    pub(super) async fn single<T, F, Fut>(&self, once: F) -> Result<T, Failure>
    where
        F: FnOnce(Pool<Sqlite>) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        Ok(once(self.readers.clone()).await?)
    }

    /// The connections for reading, for migrations.
    pub(super) fn pool(&self) -> Pool<Sqlite> {
        self.readers.clone()
    }

    /// The library's name and version.
    pub(super) async fn version(pool: Pool<Sqlite>) -> Result<String, sqlx::Error> {
        let version: String =
            sqlx::query_scalar("-- database.server\nSELECT sqlite_version()").fetch_one(&pool).await?;
        Ok(format!("SQLite {version}"))
    }

    /// Closes all connections.
    pub(super) async fn close_all(&self) {
        self.readers.close().await;
        // The last one to close moves the log into the file.
        self.writer.close().await;
    }
}

/// Opens, or makes with mode 0600.
fn for_owner_only() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let cannot = |error| StoreError::Settings(format!("{} cannot be locked: {error}", name.display()));
    let file = for_owner_only().write(true).open(&name).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(path.display().to_string())),
        Err(TryLockError::Error(error)) => Err(cannot(error)),
    }
}

/// The file in `sqlite://path`.
fn path(url: &str) -> Result<PathBuf, StoreError> {
    let bad = |why: &str| StoreError::Settings(format!("{why}: write sqlite://path/to/sonnette.db"));
    let rest = url.strip_prefix("sqlite:").ok_or_else(|| bad("not an SQLite URL"))?;
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    if rest.contains(['?', '#']) {
        return Err(bad("an SQLite URL takes no options"));
    }
    let path = percent_encoding::percent_decode_str(rest).decode_utf8().map_err(|_| bad("the path is not UTF-8"))?;
    if path.is_empty() || path == ":memory:" {
        return Err(bad("the store needs a file"));
    }
    Ok(PathBuf::from(path.as_ref()))
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};

    use super::*;
    use crate::domain::{clock::SystemClock, secret::Secret};

    #[tokio::test]
    async fn whoever_is_urgent_waits_for_one_at_most_that_is_not() {
        let folder = std::env::temp_dir().join(format!("sonnette-turn-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let settings = Settings {
            url: Secret::new(format!("sqlite://{}/sonnette.db", folder.display())),
            max_connections: 1,
            acquire_timeout: Settings::LONGEST_ACQUIRE,
            slow_statement: None,
        };
        let store = SqliteStore::open(&settings, Role::Serve, Arc::new(SystemClock::new())).await.unwrap();
        let order = std::sync::Mutex::new(Vec::new());
        let write = async |name: &'static str, urgent: bool| {
            let _turn = if urgent { None } else { store.turn().await.unwrap() };
            let tx = store.begin().await.unwrap();
            order.lock().unwrap().push(name);
            tx.commit().await.unwrap();
        };
        let holds = store.begin().await.unwrap();
        let mut waiting = FuturesUnordered::new();
        for (name, urgent) in [("first", false), ("second", false), ("third", false), ("urgent", true)] {
            waiting.push(write(name, urgent));
            // Each asks before the next one does.
            assert!(waiting.next().now_or_never().is_none());
        }
        holds.rollback().await.unwrap();
        while waiting.next().await.is_some() {}
        assert_eq!(*order.lock().unwrap(), ["first", "urgent", "second", "third"]);
        drop(waiting);
        store.close_all().await;
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_path_is_what_follows_the_scheme_and_options_are_refused() {
        assert_eq!(path("sqlite://sonnette.db").unwrap(), Path::new("sonnette.db"));
        assert_eq!(path("sqlite:///var/lib/a%20b.db").unwrap(), Path::new("/var/lib/a b.db"));
        for bad in ["sqlite://", "sqlite::memory:", "sqlite://a.db?mode=memory", "postgres://a"] {
            assert!(path(bad).is_err(), "{bad} is refused");
        }
    }
}
