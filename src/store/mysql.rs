//! MySQL (8.0 and later) and MariaDB (10.6 and later): pools, sessions, and several hosts in one URL.
//!
//! Promises: every session is READ COMMITTED, strict, in UTC and utf8mb4 whatever the server's defaults; on a Galera
//! node reads wait for what was committed elsewhere before them; hosts are tried in the order they are named; no
//! error shows the password.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::{
    Connection, Executor, MySql, MySqlPool, Pool, Transaction,
    mysql::{MySqlConnectOptions, MySqlConnection, MySqlPoolOptions},
};

use super::{Settings, StoreError};
use crate::domain::clock::Clock;

/// An idle connection is asked whether it still lives only if it was idle for longer than this.
const TRUSTED_FOR: Duration = Duration::from_secs(5);

/// What the names in a text stamped by `on_both` mean here.
pub(super) mod names {
    /// sqlx's database.
    pub(in crate::store) type Db = sqlx::MySql;
    /// The store.
    pub(in crate::store) type Base = super::MysqlStore;
    /// An open transaction.
    pub(in crate::store) type Tx = sqlx::Transaction<'static, sqlx::MySql>;
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
    pool: MySqlPool,
    hosts: Vec<MySqlConnectOptions>,
    /// Which of the hosts new connections go to.
    host: AtomicUsize,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) reasons: Arc<super::reasons::Reasons>,
    pub(super) noted: Arc<super::queue::chunk::Noted>,
}

impl MysqlStore {
    /// Connects to the first host that answers.
    pub(super) async fn open(settings: &Settings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let hosts = hosts(settings.url.expose())?;
        let mut last = None;
        for (host, options) in hosts.iter().enumerate() {
            let tried = tokio::time::timeout(settings.acquire_timeout, async {
                let mut connection = MySqlConnection::connect_with(options).await?;
                pin_session(&mut connection).await?;
                connection.close().await
            });
            match tried.await {
                Ok(Ok(())) => {
                    let pool = pool(settings).connect_lazy_with(options.clone());
                    return Ok(Self {
                        pool,
                        hosts,
                        host: AtomicUsize::new(host),
                        clock,
                        reasons: Arc::default(),
                        noted: Arc::default(),
                    });
                }
                Ok(Err(error)) => last = Some(StoreError::from(error)),
                Err(_) => last = Some(StoreError::Unavailable("no answer before the deadline".into())),
            }
        }
        Err(last.unwrap_or_else(|| StoreError::Settings("names no host".to_owned())))
    }

    /// Begins a transaction that writes, at READ COMMITTED.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, MySql>, sqlx::Error> {
        let begun = self.pool.begin_with("START TRANSACTION").await;
        begun.inspect_err(|error| self.turn_away_from_a_dead_host(error))
    }

    /// Begins a transaction of several reads that see one moment.
    pub(super) async fn snapshot(&self) -> Result<Transaction<'static, MySql>, sqlx::Error> {
        // Differs: the session's READ COMMITTED would ignore the snapshot, hence the level for this one transaction.
        let begun = self
            .pool
            .begin_with(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
                 START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
            )
            .await;
        begun.inspect_err(|error| self.turn_away_from_a_dead_host(error))
    }

    /// For a single read.
    pub(super) fn reader(&self) -> &Pool<MySql> {
        &self.pool
    }

    /// The server's name and version.
    pub(super) async fn version(pool: &Pool<MySql>) -> Result<String, sqlx::Error> {
        let version: String = sqlx::query_scalar("-- database.server\nSELECT VERSION()").fetch_one(pool).await?;
        let name = if version.contains("MariaDB") { "MariaDB" } else { "MySQL" };
        Ok(format!("{name} {version}"))
    }

    /// Closes all connections.
    pub(super) async fn close_all(&self) {
        self.pool.close().await;
    }

    /// After a connection could not be had: the next one goes to the next host. A known gap: single reads do not turn,
    /// and a host that comes back is not returned to before the other one fails.
    fn turn_away_from_a_dead_host(&self, error: &sqlx::Error) {
        let no_connection = matches!(error, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Tls(_));
        if self.hosts.len() > 1 && no_connection && self.pool.num_idle() == 0 {
            let next = (self.host.fetch_add(1, Ordering::Relaxed) + 1) % self.hosts.len();
            if let Some(options) = self.hosts.get(next) {
                self.pool.set_connect_options(options.clone());
            }
        }
    }
}

fn pool(settings: &Settings) -> MySqlPoolOptions {
    MySqlPoolOptions::new()
        .max_connections(settings.max_connections.max(2))
        .acquire_timeout(settings.acquire_timeout)
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
}

/// Prepared statements a connection keeps: all there are, with lists in powers of two. One that is pushed out is closed,
/// and MySQL does not answer a close: with Nagle's algorithm on, which sqlx leaves on, the next statement waits 40 ms.
const KEPT_STATEMENTS: usize = 400;

/// What every session is, whatever the server's defaults. sqlx has set the time zone to UTC and the names to utf8mb4.
async fn pin_session(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    connection
        .execute(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; \
             SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ERROR_FOR_DIVISION_BY_ZERO', \
                 autocommit = 1, innodb_lock_wait_timeout = 5",
        )
        .await?;
    // Galera: an ownership read on this node waits for what was committed on another before it. The variable is there
    // on every MariaDB and on no MySQL.
    let galera = sqlx::query("SHOW VARIABLES WHERE Variable_name = 'wsrep_on' AND Value = 'ON'");
    if galera.fetch_optional(&mut *connection).await?.is_some() {
        connection.execute("SET SESSION wsrep_sync_wait = 3").await?;
    }
    super::replicas::end_what_stands_still(connection).await
}

/// What may stand behind the `?`. sqlx would ignore anything else, and a misspelt `ssl-mode` must not pass in silence.
const OPTIONS: &[&str] = &[
    "ssl-mode",
    "sslmode",
    "ssl-ca",
    "sslca",
    "ssl-cert",
    "sslcert",
    "ssl-key",
    "sslkey",
    "socket",
    "statement-cache-capacity",
];

/// The hosts of `mysql://user:password@host1,host2:3307/database?options`, in their order.
fn hosts(url: &str) -> Result<Vec<MySqlConnectOptions>, StoreError> {
    let bad = |why: &str| {
        StoreError::Settings(format!(
            "{why}: write mysql://user:password@host/database, with `%40` for an `@` and so on"
        ))
    };
    let (scheme, rest) = url.split_once("://").ok_or_else(|| bad("not a URL"))?;
    if !matches!(scheme, "mysql" | "mariadb") {
        return Err(bad("the scheme is none of sqlite, mysql and mariadb"));
    }
    let (address, options) = rest.split_once('?').map_or((rest, ""), |(address, options)| (address, options));
    for option in options.split('&').filter(|o| !o.is_empty()) {
        let key = option.split('=').next().unwrap_or_default();
        if !OPTIONS.contains(&key) {
            // Shown only if it is a word: behind a `?` in a password that was not escaped stands the rest of it.
            let word = key.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'_');
            let key = if word { key } else { "that" };
            return Err(bad(&format!("no option is called `{key}` (there are {})", OPTIONS.join(", "))));
        }
    }
    let (authority, database) = address.split_once('/').unwrap_or((address, ""));
    if database.is_empty() {
        return Err(bad("the name of the database is missing"));
    }
    let (account, names) = authority.rsplit_once('@').map_or(("", authority), |(account, names)| (account, names));
    let account = if account.is_empty() { String::new() } else { format!("{account}@") };
    names
        .split(',')
        .map(|host| {
            if host.is_empty() {
                return Err(bad("a host's name is missing"));
            }
            // The error of the parser is not shown: it may quote the password.
            let one = format!("mysql://{account}{host}/{database}?{options}");
            let parsed = one.parse::<MySqlConnectOptions>();
            let parsed = parsed.map_err(|_| bad("user, password, host, port or an option cannot be read"))?;
            let parsed = parsed.charset("utf8mb4").timezone(Some("+00:00".to_owned()));
            Ok(super::quiet(parsed.statement_cache_capacity(KEPT_STATEMENTS)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_hosts_are_read_in_their_order_with_their_ports() {
        let hosts = hosts("mysql://u:p%40ss@db1,db2:3307/sonnette?ssl-mode=VERIFY_IDENTITY").unwrap();
        let read: Vec<_> = hosts.iter().map(|h| (h.get_host(), h.get_port(), h.get_database())).collect();
        assert_eq!(read, [("db1", 3306, Some("sonnette")), ("db2", 3307, Some("sonnette"))]);
        assert!(matches!(hosts[1].get_ssl_mode(), sqlx::mysql::MySqlSslMode::VerifyIdentity));
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_the_password() {
        for bad in [
            "mysql://u:hunter2@h:port/db",
            "mysql://u:hunter2@h/",
            "mysql://u:hunter2@h",
            "mysql://u:hunter2@,/db",
            "mysql://u:hunter2@h/db?ssl_mode=REQUIRED",
            "mysql://u:hunter2@h/db?ssl-mode=hunter2",
            "mysql://u:a?hunter2@h/db",
            "postgres://u:hunter2@h/db",
            "hunter2",
        ] {
            let error = hosts(bad).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }
}
