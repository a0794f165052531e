//! What a MySQL server is at: which statements run, and which of them wait.

use sqlx::{MySqlConnection, Row, mysql::MySqlRow};

/// A statement, or a connection that has none.
pub(crate) struct Running {
    pub(crate) connection: u64,
    pub(crate) seconds: i64,
    pub(crate) state: String,
    pub(crate) text: String,
}

impl Running {
    /// Whether it has been in a statement of this name for a second or more.
    pub(crate) fn waits_in(&self, name: &str) -> bool {
        self.seconds >= 1 && self.text.strip_prefix("-- ").is_some_and(|text| text.starts_with(name))
    }
}

/// What there is in the database of this connection. Not from `information_schema`, which MySQL cannot read where a
/// statement holds bytes.
pub(crate) async fn running(connection: &mut MySqlConnection) -> Vec<Running> {
    let own: String = sqlx::query_scalar("SELECT DATABASE()").fetch_one(&mut *connection).await.unwrap();
    let mut rows = sqlx::raw_sql("SHOW FULL PROCESSLIST").fetch_all(connection).await.unwrap();
    let text = |row: &MySqlRow, column: &str| {
        let bytes: Option<Vec<u8>> = row.get_unchecked(column);
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    };
    rows.retain(|row| text(row, "db") == own);
    let running = rows.iter().map(|row| Running {
        connection: text(row, "Id").parse().unwrap(),
        // Nothing, while it is just beginning.
        seconds: text(row, "Time").parse().unwrap_or_default(),
        state: text(row, "State"),
        text: text(row, "Info"),
    });
    running.collect()
}
