//! The schema's steps: what this version knows, what a database has, and how it gets there.
//!
//! Promises: a step that was applied is never applied again, and one whose text changed since is an error; a run that
//! was killed anywhere is simply run again, because each step may be repeated; of many processes that start at once
//! one applies and the others wait for it. No two machines' clocks are compared, and no lock is local to a node.
//!
//! A step that only newer versions can live with raises `min_reader` in `service_facts` itself, in a file of its own
//! before the one that needs it. There is no row at first: that means 1.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, MySql, Pool, SqlSafeStr, SqlStr, migrate::Migrator};
use uuid::Uuid;

use super::{
    Migration, SchemaState, StoreError,
    mysql::MysqlStore,
    sql::{self, Failure, on_both, read, without_values},
    sqlite::SqliteStore,
};

static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");
static MYSQL: Migrator = sqlx::migrate!("migrations/mysql");

/// How often the one that migrates shows that it lives.
const BEAT: Duration = Duration::from_millis(500);

/// How long its counter must stand still before another takes over, on the other's own monotonic clock.
const LEASE: Duration = Duration::from_secs(5);

/// How often those who wait look.
const WATCH: Duration = Duration::from_millis(200);

/// What was applied, with checksums.
type Applied = BTreeMap<i64, Vec<u8>>;

fn known(migrator: &Migrator) -> i64 {
    migrator.iter().map(|m| m.version).max().unwrap_or(0)
}

/// What `applied` lacks. An error if a text has changed.
fn lacking(
    migrator: &'static Migrator,
    applied: &Applied,
) -> Result<Vec<&'static sqlx::migrate::Migration>, StoreError> {
    let mut lacking = Vec::new();
    for step in migrator.iter() {
        match applied.get(&step.version) {
            None => lacking.push(step),
            Some(checksum) if checksum.as_slice() == step.checksum.as_ref() => {}
            Some(_) => {
                return Err(StoreError::Schema(format!(
                    "migration {:04}_{} was changed after it was applied to this database: use the version of sonnette \
                     that made it, or a newer release",
                    step.version,
                    named(step).name
                )));
            }
        }
    }
    Ok(lacking)
}

fn named(step: &sqlx::migrate::Migration) -> Migration {
    Migration { version: step.version, name: step.description.replace(' ', "_") }
}

/// What is executed of a step: its text under its number, for logs.
fn text(step: &sqlx::migrate::Migration) -> SqlStr {
    AssertSqlSafe(format!("-- migrate.{:04}\n{}", step.version, step.sql.as_str())).into_sql_str()
}

on_both! {
    impl Base {
        /// What was applied; `None` if there is no table that says so.
        pub(in crate::store) async fn applied(&self) -> Result<Option<Applied>, sqlx::Error> {
            let exists: i64 = sqlx::query_scalar(match DIALECT {
                // Differs: each has its own catalogue.
                crate::store::Kind::Sqlite => {
                    "-- migrate.exists\nSELECT COUNT(*) FROM sqlite_master WHERE name = 'schema_migrations'"
                }
                crate::store::Kind::Mysql => {
                    "-- migrate.exists\nSELECT COUNT(*) FROM information_schema.tables \
                     WHERE table_schema = DATABASE() AND table_name = 'schema_migrations'"
                }
            })
            .fetch_one(&self.pool())
            .await?;
            if exists == 0 {
                return Ok(None);
            }
            let rows: Vec<(i64, Vec<u8>)> =
                sqlx::query_as("-- migrate.applied\nSELECT version, checksum FROM schema_migrations")
                    .fetch_all(&self.pool())
                    .await?;
            Ok(Some(rows.into_iter().collect()))
        }

        async fn min_reader(&self) -> Result<i64, Failure> {
            let value: Option<Vec<u8>> =
                sqlx::query_scalar("-- migrate.min_reader\nSELECT value FROM service_facts WHERE name = 'min_reader'")
                    .fetch_optional(&self.pool())
                    .await?;
            let Some(value) = value else { return Ok(1) };
            std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
                Failure::Store(StoreError::Corrupt {
                    table: "service_facts",
                    column: "value",
                    row: "min_reader".to_owned(),
                    source: "not a number".into(),
                })
            })
        }

        /// The schema that was found.
        pub(in crate::store) async fn schema_state(&self) -> Result<SchemaState, StoreError> {
            read(|| async {
                let applied = self.applied().await?.unwrap_or_default();
                let min_reader = if applied.contains_key(&1) { self.min_reader().await? } else { 1 };
                let version = applied.keys().next_back().copied().unwrap_or(0);
                Ok(SchemaState { version, known: known(Self::MIGRATIONS), min_reader })
            })
            .await
        }

        /// What is known and not applied.
        pub(in crate::store) async fn pending_steps(&self) -> Result<Vec<Migration>, StoreError> {
            let applied = read(|| async { Ok(self.applied().await?) }).await?.unwrap_or_default();
            Ok(lacking(Self::MIGRATIONS, &applied)?.into_iter().map(named).collect())
        }
    }
}

impl SqliteStore {
    const MIGRATIONS: &Migrator = &SQLITE;

    /// Applies what is pending.
    ///
    /// Differs: DDL is part of a transaction here, so all steps are one, and the file's write lock is the lock.
    pub(super) async fn apply_pending(&self) -> Result<Vec<Migration>, StoreError> {
        let mut tries = 0;
        let mut tx = loop {
            match self.begin().await.map_err(StoreError::from) {
                // Somebody else is migrating, each wait is the busy timeout.
                Err(StoreError::Unavailable(_)) if tries < 24 => tries += 1,
                begun => break begun?,
            }
        };
        sqlx::raw_sql(
            "-- migrate.table\nCREATE TABLE IF NOT EXISTS schema_migrations \
             (version INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL, checksum BLOB NOT NULL, applied_at INTEGER NOT NULL) STRICT",
        )
        .execute(&mut *tx)
        .await?;
        let rows: Vec<(i64, Vec<u8>)> =
            sqlx::query_as("-- migrate.applied\nSELECT version, checksum FROM schema_migrations")
                .fetch_all(&mut *tx)
                .await?;
        let steps = lacking(&SQLITE, &rows.into_iter().collect())?;
        for step in &steps {
            match sqlx::raw_sql(text(step)).execute(&mut *tx).await {
                // There is no ADD COLUMN IF NOT EXISTS: what the step would add is there.
                Err(error) if is_duplicate_column(&error) => {}
                done => {
                    done?;
                }
            }
            let Migration { version, name } = named(step);
            sqlx::query("-- migrate.record\nINSERT INTO schema_migrations (version, name, checksum, applied_at) VALUES (?, ?, ?, ?)")
                .bind(version)
                .bind(name)
                .bind(step.checksum.to_vec())
                .bind(self.clock.now().as_millis())
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await.map_err(|error| StoreError::CommitUnknown(without_values(error)))?;
        Ok(steps.into_iter().map(named).collect())
    }
}

fn is_duplicate_column(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.message().starts_with("duplicate column name"))
}

impl MysqlStore {
    const MIGRATIONS: &Migrator = &MYSQL;

    /// Applies what is pending, under a lease that is kept alive beside the work. Where nothing is, nothing is written:
    /// the account that serves need not be allowed to create tables.
    pub(super) async fn apply_pending(&self) -> Result<Vec<Migration>, StoreError> {
        if self.pending_steps().await?.is_empty() {
            return Ok(Vec::new());
        }
        for statement in [
            "-- migrate.table\nCREATE TABLE IF NOT EXISTS schema_migrations \
             (version BIGINT NOT NULL PRIMARY KEY, name VARCHAR(128) NOT NULL, checksum VARBINARY(64) NOT NULL, \
              applied_at BIGINT NOT NULL) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            "-- migrate.lock_table\nCREATE TABLE IF NOT EXISTS schema_lock \
             (id INT NOT NULL PRIMARY KEY, holder BINARY(16) NULL, beat BIGINT NOT NULL) \
             ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            "-- migrate.lock_row\nINSERT IGNORE INTO schema_lock (id, holder, beat) VALUES (1, NULL, 0)",
        ] {
            self.again_if_locked(|pool| async move { sqlx::raw_sql(statement).execute(&pool).await }).await?;
        }
        let me = Uuid::new_v4();
        self.take_lease(me).await?;
        // The loser of the race is dropped: a step that was cut is repeated by whoever comes next.
        let done = tokio::select! {
            done = self.apply_steps() => done,
            lost = self.keep_lease(me) => Err(lost),
        };
        let released = self
            .again_if_locked(|pool| async move {
                sqlx::query("-- migrate.release\nUPDATE schema_lock SET holder = NULL WHERE id = 1 AND holder = ?")
                    .bind(me.as_bytes().to_vec())
                    .execute(&pool)
                    .await
            })
            .await;
        let done = done?;
        released?;
        Ok(done)
    }

    async fn apply_steps(&self) -> Result<Vec<Migration>, StoreError> {
        let applied = self.applied().await?.unwrap_or_default();
        let steps = lacking(&MYSQL, &applied)?;
        for step in &steps {
            self.again_if_locked(|pool| async move { sqlx::raw_sql(text(step)).execute(&pool).await }).await?;
            let Migration { version, name } = &named(step);
            self.again_if_locked(|pool| async move {
                sqlx::query("-- migrate.record\nINSERT IGNORE INTO schema_migrations (version, name, checksum, applied_at) VALUES (?, ?, ?, ?)")
                    .bind(version)
                    .bind(name)
                    .bind(step.checksum.to_vec())
                    .bind(self.clock.now().as_millis())
                    .execute(&pool).await
            })
            .await?;
        }
        Ok(steps.into_iter().map(named).collect())
    }

    /// Waits until nobody holds the lease, or its holder's counter has stood still for [`LEASE`].
    async fn take_lease(&self, me: Uuid) -> Result<(), StoreError> {
        let mut seen: Option<(Option<Vec<u8>>, i64, Instant)> = None;
        loop {
            let (holder, beat): (Option<Vec<u8>>, i64) =
                sqlx::query_as("-- migrate.watch\nSELECT holder, beat FROM schema_lock WHERE id = 1")
                    .fetch_one(&self.pool())
                    .await?;
            let since = match &seen {
                Some((same_holder, same_beat, since)) if *same_holder == holder && *same_beat == beat => *since,
                _ => Instant::now(),
            };
            if holder.is_none() || since.elapsed() >= LEASE {
                let seen_holder = &holder;
                let taken = self
                    .again_if_locked(|pool| async move {
                        sqlx::query(
                            "-- migrate.take\nUPDATE schema_lock SET holder = ?, beat = beat + 1 \
                             WHERE id = 1 AND holder <=> ? AND beat = ?",
                        )
                        .bind(me.as_bytes().to_vec())
                        .bind(seen_holder)
                        .bind(beat)
                        .execute(&pool)
                        .await
                    })
                    .await?;
                if taken.rows_affected() == 1 {
                    return Ok(());
                }
            }
            if seen.is_none() {
                tracing::info!("another process is migrating the database: waiting for it");
            }
            seen = Some((holder, beat, since));
            tokio::time::sleep(WATCH).await;
        }
    }

    /// Moves the counter while the work goes on. Comes back only when the lease is lost.
    async fn keep_lease(&self, me: Uuid) -> StoreError {
        loop {
            tokio::time::sleep(BEAT).await;
            let moved =
                sqlx::query("-- migrate.beat\nUPDATE schema_lock SET beat = beat + 1 WHERE id = 1 AND holder = ?")
                    .bind(me.as_bytes().to_vec())
                    .execute(&self.pool())
                    .await;
            match moved {
                Ok(moved) if moved.rows_affected() == 1 => {}
                Ok(_) => return StoreError::Schema("another process took over the migration: run it again".to_owned()),
                // If it lasts, others will take over; each step may be repeated.
                Err(error) => {
                    tracing::warn!(error = %without_values(error), "the migration's lease could not be renewed");
                }
            }
        }
    }

    async fn again_if_locked<T, F, Fut>(&self, mut once: F) -> Result<T, StoreError>
    where
        F: FnMut(Pool<MySql>) -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut tries = 0;
        loop {
            tries += 1;
            match once(self.pool()).await.map_err(StoreError::from) {
                Err(StoreError::Unavailable(_)) if tries < 5 => sql::pause(tries).await,
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_folders_hold_the_same_numbers_and_names() {
        let names = |migrator: &Migrator| migrator.iter().map(named).collect::<Vec<_>>();
        assert_eq!(names(&SQLITE), names(&MYSQL));
        assert!(known(&SQLITE) > 0);
    }
}
