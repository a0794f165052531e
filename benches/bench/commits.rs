//! What the database alone can do: rows of the size of a notification, each inserted with a commit of its own.

use std::{path::Path, time::Instant};

use sqlx::{
    ConnectOptions as _, MySqlConnection, SqliteConnection,
    mysql::MySqlConnectOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use crate::{load::percentiles, service::Database};

/// Bytes of a row.
const ROW: usize = 300;

/// Connections of the larger of the two.
pub(crate) const MANY: usize = 32;

/// A table and how to reach it.
pub(crate) enum Commits {
    MySql(MySqlConnectOptions),
    Sqlite(SqliteConnectOptions),
}

impl Commits {
    pub(crate) async fn new(database: &Database, folder: &Path) -> Self {
        if database.is_sqlite() {
            // A file of its own beside the other: one writer each, the same disk.
            let options = durable_sqlite(&folder.join("commits.db")).create_if_missing(true);
            let mut connection = options.connect().await.expect("SQLite");
            sqlx::raw_sql("CREATE TABLE yardstick (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
                .execute(&mut connection)
                .await
                .expect("a table");
            return Self::Sqlite(options);
        }
        let options: MySqlConnectOptions = database.url.parse().expect("a MySQL address");
        let mut connection = options.connect().await.expect("the server answers");
        sqlx::raw_sql(
            "CREATE TABLE bench_yardstick (id BIGINT AUTO_INCREMENT PRIMARY KEY, body VARBINARY(1000) NOT NULL) \
             ENGINE=InnoDB",
        )
        .execute(&mut connection)
        .await
        .expect("a table");
        Self::MySql(options)
    }

    /// Commits a second and how long one takes, by name.
    pub(crate) async fn measure(&self, commits: usize) -> Vec<(String, f64)> {
        match self {
            Self::MySql(options) => {
                let mut figures = Vec::new();
                for (connections, commits) in [(1, commits / 8), (MANY, commits)] {
                    let mut open = Vec::new();
                    for _ in 0..connections {
                        open.push(options.connect().await.expect("the server answers"));
                    }
                    let each = commits.div_ceil(connections).max(1);
                    let started = Instant::now();
                    let all = open.into_iter().map(|connection| on_any_thread(mysql_inserts(connection, each)));
                    let took = futures_util::future::join_all(all).await.concat();
                    let per_second = (each * connections) as f64 / started.elapsed().as_secs_f64();
                    let plural = if connections == 1 { "" } else { "s" };
                    figures.push((format!("MySQL, {connections} connection{plural}: commits/s"), per_second));
                    figures.push((format!("MySQL, {connections} connection{plural}: a commit, p50 ms"), p50(took)));
                }
                figures
            }
            Self::Sqlite(options) => {
                let connection = options.connect().await.expect("SQLite");
                let commits = (commits / 8).max(1);
                let started = Instant::now();
                let took = sqlite_inserts(connection, commits).await;
                let per_second = commits as f64 / started.elapsed().as_secs_f64();
                vec![
                    ("SQLite, 1 connection: commits/s".to_owned(), per_second),
                    ("SQLite, 1 connection: a commit, p50 ms".to_owned(), p50(took)),
                ]
            }
        }
    }
}

/// A file each of whose commits is flushed.
pub(crate) fn durable_sqlite(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(file).journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full)
}

/// Not all on the thread that waits for them.
pub(crate) async fn on_any_thread<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(work);
    tasks.join_all().await.pop().expect("one task")
}

fn p50(took: Vec<f64>) -> f64 {
    let [(_, p50), _] = percentiles(took);
    p50
}

/// Milliseconds of each commit.
async fn mysql_inserts(mut connection: MySqlConnection, count: usize) -> Vec<f64> {
    let mut took = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        sqlx::query("INSERT INTO bench_yardstick (body) VALUES (?)")
            .bind(vec![0x5a_u8; ROW])
            .execute(&mut connection)
            .await
            .expect("a commit");
        took.push(started.elapsed().as_secs_f64() * 1e3);
    }
    took
}

async fn sqlite_inserts(mut connection: SqliteConnection, count: usize) -> Vec<f64> {
    let mut took = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        sqlx::query("INSERT INTO yardstick (body) VALUES (?)")
            .bind(vec![0x5a_u8; ROW])
            .execute(&mut connection)
            .await
            .expect("a commit");
        took.push(started.elapsed().as_secs_f64() * 1e3);
    }
    took
}
