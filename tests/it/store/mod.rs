//! What every store promises, tried through the traits: one text, run on SQLite and on MariaDB or MySQL.

mod acceptances;
mod api_keys;
mod audience;
mod breakers;
mod cancel;
mod cohorts;
pub(crate) mod connection;
mod devices;
mod migrations;
mod notifications;
mod queue;
mod replicas;
mod retention;
pub(crate) mod world;

use std::{sync::Arc, time::Duration};

use sonnette::{
    domain::{
        clock::{SystemClock, Timestamp},
        secret::Secret,
    },
    store::{Role, Settings, Store, StoreError, open},
};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, SqliteConnection};

use crate::support::database::{Store as Which, TestDatabase};

/// A moment that means nothing.
pub(crate) const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

pub(crate) fn later(seconds: u64) -> Timestamp {
    NOW.plus(Duration::from_secs(seconds))
}

pub(crate) fn settings(url: &str) -> Settings {
    Settings {
        url: Secret::new(url.to_owned()),
        max_connections: 8,
        acquire_timeout: Duration::from_secs(10),
        slow_statement: None,
    }
}

/// Opens the store as the command line does; several may be open.
pub(crate) async fn try_open(database: &TestDatabase) -> Result<Arc<dyn Store>, StoreError> {
    open(&settings(database.url()), Role::CommandLine, Arc::new(SystemClock::new())).await
}

/// A store whose schema is there.
pub(crate) async fn store(database: &TestDatabase) -> Arc<dyn Store> {
    let store = try_open(database).await.expect("the store opens");
    store.migrate().await.expect("the schema is made");
    store
}

/// Runs statements past the store, over a connection of their own.
pub(crate) async fn execute(database: &TestDatabase, statements: &[&str]) {
    for statement in statements {
        let text = AssertSqlSafe((*statement).to_owned());
        match database.store() {
            Which::Sqlite => {
                let mut connection = SqliteConnection::connect(database.url()).await.unwrap();
                sqlx::raw_sql(text).execute(&mut connection).await.unwrap();
            }
            Which::Mysql => {
                let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
                sqlx::raw_sql(text).execute(&mut connection).await.unwrap();
            }
        }
    }
}

/// One number, asked past the store.
pub(crate) async fn number(database: &TestDatabase, question: &str) -> i64 {
    let text = AssertSqlSafe(question.to_owned());
    match database.store() {
        Which::Sqlite => {
            let mut connection = SqliteConnection::connect(database.url()).await.unwrap();
            sqlx::query_scalar(text).fetch_one(&mut connection).await.unwrap()
        }
        Which::Mysql => {
            let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
            sqlx::query_scalar(text).fetch_one(&mut connection).await.unwrap()
        }
    }
}

/// A chunk of one target with this holder, written past the store.
pub(crate) fn chunk(notification: u8, holder: i64) -> String {
    let waiting_since = if holder < 0 { "5" } else { "NULL" };
    format!(
        "INSERT INTO chunks (notification_id, number, lane, holder, epoch, due_at, targeted, accepted, failed, \
         unregistered, expired, cancelled, suppressed, unanswered, waiting_since) VALUES \
         (X'{notification:032x}', 0, 0, {holder}, 7, 0, 1, 0, 0, 0, 0, 0, 0, 0, {waiting_since})"
    )
}

/// Waits until `holds`, for half a minute at most.
pub(crate) async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    for _ in 0..300 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("in vain: {what}");
}
