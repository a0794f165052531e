//! MySQL (8.0 and later) and MariaDB (10.6 and later): pools, sessions, and several hosts in one URL.
//!
//! Promises: every session is READ COMMITTED, strict, in UTC and utf8mb4 whatever the server's defaults; on a Galera
//! node reads wait for what was committed elsewhere before them; a host that is gone or has become read-only is left for
//! another one (`hosts.rs`); a connection that was cut off in the middle of something is not used again before that is undone,
//! and one that has just committed is, at once (`warm.rs`).

mod hosts;
mod warm;

use std::{sync::Arc, time::Duration};

use sqlx::{
    Connection, Executor, MySql, Pool,
    mysql::{MySqlConnection, MySqlPoolOptions},
};
use tokio::sync::MutexGuard;

use self::{
    hosts::{Hosts, Whose},
    warm::Tx,
};
use super::{
    Settings, StoreError, address,
    sql::{Failure, is_full},
};
use crate::domain::clock::Clock;

/// An idle connection is asked whether it still lives only if it was idle for longer than this.
const TRUSTED_FOR: Duration = Duration::from_secs(5);

/// A connection on which a statement was cut off is used again if it answers within this time; if not, it is closed.
const RETURNS_WITHIN: Duration = Duration::from_secs(1);

/// READ WRITE is what any transaction is; said aloud, a server that has become read-only refuses it at once.
const WRITES: &str = "START TRANSACTION READ WRITE";

/// What the names in a text stamped by `on_both` mean here.
pub(super) mod names {
    /// sqlx's database.
    pub(in crate::store) type Db = sqlx::MySql;
    /// The store.
    pub(in crate::store) type Base = super::MysqlStore;
    /// An open transaction.
    pub(in crate::store) use super::warm::Tx;
    /// Which of the two this is.
    pub(in crate::store) const DIALECT: crate::store::Kind = crate::store::Kind::Mysql;
    /// Differs: rows are locked one by one.
    pub(in crate::store) const FOR_UPDATE: &str = " FOR UPDATE";
    /// Differs: the words for "do nothing if the key is taken". Only for rows whose values are ours: IGNORE also turns
    /// other errors into warnings.
    pub(in crate::store) const INSERT_IF_ABSENT: &str = "INSERT IGNORE INTO ";
    /// Differs: what sqlx calls the number of the row just inserted.
    pub(in crate::store) fn new_id(done: &sqlx::mysql::MySqlQueryResult) -> i64 {
        i64::try_from(done.last_insert_id()).unwrap_or(i64::MAX)
    }
}

/// A store on a server.
#[derive(Debug)]
pub(super) struct MysqlStore {
    hosts: Hosts,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) reasons: Arc<super::reasons::Reasons>,
    pub(super) noted: Arc<super::queue::chunk::Noted>,
}

impl MysqlStore {
    /// Connects to the first host that can be written to, or else that answers.
    pub(super) async fn open(settings: &Settings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let hosts = address::hosts(settings.url.expose(), settings.slow_statement)?;
        let reasons = Arc::default();
        let hosts = Hosts::open(hosts, pools(settings), settings.acquire_timeout, Arc::clone(&reasons)).await?;
        Ok(Self { hosts, clock, reasons, noted: Arc::default() })
    }

    /// Differs: many may write at once.
    #[expect(clippy::unused_self, reason = "the other store has something to ask")]
    pub(super) fn turn(&self) -> impl Future<Output = Result<Option<MutexGuard<'_, ()>>, sqlx::Error>> {
        std::future::ready(Ok(None))
    }

    /// Begins a transaction that writes, at READ COMMITTED.
    pub(super) async fn begin(&self) -> Result<Tx, sqlx::Error> {
        self.hosts.begin(WRITES, Whose::Work).await
    }

    /// The same for whoever tries again until it is done. Where a connection has just committed it may not have begun yet:
    /// then that is to be said before its first statement, or together with it.
    pub(super) async fn begin_soon(&self) -> Result<(Tx, Option<&'static str>), sqlx::Error> {
        match self.hosts.at_hand() {
            Some(tx) => Ok((tx, Some(WRITES))),
            None => Ok((self.begin().await?, None)),
        }
    }

    /// The same on the connection that the heart has for itself: behind no other work. Where the server has none to give,
    /// on one of the others.
    pub(super) async fn begin_beat(&self) -> Result<Tx, sqlx::Error> {
        match self.hosts.begin(WRITES, Whose::Heart).await {
            Err(error) if is_full(&error) => self.begin().await,
            begun => begun,
        }
    }

    /// A single read that the heart's watch waits for.
    pub(super) async fn single_beside<T, F, Fut>(&self, once: F) -> Result<T, Failure>
    where
        F: Fn(Pool<MySql>) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        match self.hosts.read(Whose::Heart, &once).await {
            Err(error) if is_full(&error) => Ok(self.hosts.read(Whose::Work, once).await?),
            read => Ok(read?),
        }
    }

    /// Begins a transaction of several reads that see one moment.
    pub(super) async fn snapshot(&self) -> Result<Tx, sqlx::Error> {
        // Differs: the session's READ COMMITTED would ignore the snapshot, hence the level for this one transaction.
        self.hosts
            .begin(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
                 START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
                Whose::Work,
            )
            .await
    }

    /// A single read.
    pub(super) async fn single<T, F, Fut>(&self, once: F) -> Result<T, Failure>
    where
        F: FnOnce(Pool<MySql>) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        Ok(self.hosts.read(Whose::Work, once).await?)
    }

    /// The connections there are, for migrations.
    pub(super) fn pool(&self) -> Pool<MySql> {
        self.hosts.pool()
    }

    /// The server's name and version.
    pub(super) async fn version(pool: Pool<MySql>) -> Result<String, sqlx::Error> {
        let version: String = sqlx::query_scalar("-- database.server\nSELECT VERSION()").fetch_one(&pool).await?;
        let name = if version.contains("MariaDB") { "MariaDB" } else { "MySQL" };
        Ok(format!("{name} {version}"))
    }

    /// Closes all connections.
    pub(super) async fn close_all(&self) {
        self.hosts.close().await;
    }
}

fn pools(settings: &Settings) -> MySqlPoolOptions {
    MySqlPoolOptions::new()
        .max_connections(settings.max_connections.max(2))
        .acquire_timeout(settings.acquire_timeout.min(super::Settings::LONGEST_ACQUIRE))
        .test_before_acquire(false)
        .after_connect(|connection, _| Box::pin(pin_session(connection)))
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > TRUSTED_FOR {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                // Where a statement was cut off (its caller hung up), two things are left. sqlx may take part of a row for
                // the length of what comes, and would wait for it for ever. And a transaction may have begun of which sqlx
                // knows nothing. What is not in order is closed with a word to the server, hence no error: over TLS
                // sqlx 0.9 would wait for the server to say something before it closes a connection without one.
                let rolled_back = sqlx::raw_sql("ROLLBACK").execute(&mut *connection);
                let is_in_order = matches!(tokio::time::timeout(RETURNS_WITHIN, rolled_back).await, Ok(Ok(_)));
                Ok(is_in_order && !connection.is_in_transaction())
            })
        })
}

/// What every session is, whatever the server's defaults. sqlx has set the time zone to UTC and the names to utf8mb4.
async fn pin_session(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    connection
        .execute(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE; \
             SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ERROR_FOR_DIVISION_BY_ZERO', \
                 autocommit = 1, innodb_lock_wait_timeout = 5",
        )
        .await?;
    let server: Vec<(String, String)> =
        sqlx::query_as("SHOW VARIABLES WHERE Variable_name IN ('wsrep_on', 'idle_transaction_timeout')")
            .fetch_all(&mut *connection)
            .await?;
    let value = |name: &str| server.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    // Galera: an ownership read on this node waits for what was committed on another before it. The variable is there
    // on every MariaDB and on no MySQL.
    if value("wsrep_on") == Some("ON") {
        connection.execute("SET SESSION wsrep_sync_wait = 3").await?;
    }
    // A replica that hangs in the middle of a transaction holds its locks: nobody could take its work over, nor go on with
    // what it touched. So the server ends what stands still. MariaDB can tell who stands still in a transaction. MySQL
    // ends every connection that has been idle for so long, which the pool expects: it tries one that idled for 5 s
    // before it uses it.
    let end = match value("idle_transaction_timeout") {
        Some(_) => "SET SESSION idle_transaction_timeout = 3",
        None => "SET SESSION wait_timeout = 8",
    };
    connection.execute(end).await.map(drop)
}
