//! Migrations: twice, at once, half-way, and schemas of other versions.

use sonnette::store::StoreError;

use super::{execute, number, store, try_open};
use crate::support::database::{Store as Which, mysql_database, on_both_stores};

on_both_stores! {
    async fn an_empty_database_is_migrated_once_and_then_usable(database) {
        let store = try_open(&database).await.unwrap();
        let empty = store.schema().await.unwrap();
        assert_eq!((empty.version, empty.min_reader), (0, 1));
        assert!(matches!(empty.check(), Err(StoreError::Schema(advice)) if advice.contains("sonnette migrate")));
        let pending = store.pending().await.unwrap();
        assert_eq!(pending.last().map(|step| step.version), Some(empty.known));

        assert_eq!(store.migrate().await.unwrap(), pending);
        assert_eq!(store.migrate().await.unwrap(), [], "the second run has nothing to do");
        assert_eq!(store.pending().await.unwrap(), []);
        let state = store.schema().await.unwrap();
        assert_eq!(state.version, state.known);
        state.check().unwrap();
    }

    async fn of_many_that_migrate_at_once_each_step_is_applied_by_one(database) {
        let mut stores = Vec::new();
        for _ in 0..4 {
            stores.push(try_open(&database).await.unwrap());
        }
        let pending: Vec<_> = stores[0].pending().await.unwrap().iter().map(|step| step.version).collect();
        let all = futures_util::future::join_all(stores.iter().map(|store| store.migrate())).await;
        let mut applied: Vec<_> = all.into_iter().flat_map(Result::unwrap).map(|step| step.version).collect();
        applied.sort_unstable();
        assert_eq!(applied, pending);
    }

    async fn a_run_that_was_killed_before_it_could_record_its_step_is_run_again(database) {
        let first = store(&database).await;
        let device = super::devices::registration("a1");
        first.register(&[device], super::NOW).await.unwrap();
        execute(&database, &["DELETE FROM schema_migrations WHERE version >= 5"]).await;
        assert_eq!(first.migrate().await.unwrap().first().map(|step| step.version), Some(5));
        assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 1, "nothing was made anew");
    }

    async fn a_step_that_was_changed_after_it_was_applied_is_refused(database) {
        let store = store(&database).await;
        execute(&database, &["UPDATE schema_migrations SET checksum = X'00' WHERE version = 6"]).await;
        for answer in [store.migrate().await, store.pending().await] {
            assert!(matches!(answer, Err(StoreError::Schema(why)) if why.contains("0006_devices")));
        }
    }

    async fn a_newer_schema_is_used_while_its_min_reader_allows_it(database) {
        let store = store(&database).await;
        let known = store.schema().await.unwrap().known;
        execute(&database, &[
            &format!("INSERT INTO schema_migrations (version, name, checksum, applied_at) VALUES ({}, 'tomorrow', X'00', 0)", known + 1),
            &format!("REPLACE INTO service_facts (name, value) VALUES ('min_reader', X'{}')", hex::encode(known.to_string())),
        ]).await;
        let newer = store.schema().await.unwrap();
        assert_eq!((newer.version, newer.min_reader), (known + 1, known));
        newer.check().unwrap();
        assert_eq!(store.migrate().await.unwrap(), []);

        execute(&database, &[
            &format!("UPDATE service_facts SET value = X'{}' WHERE name = 'min_reader'", hex::encode((known + 1).to_string())),
        ]).await;
        let too_new = store.schema().await.unwrap();
        assert!(matches!(too_new.check(), Err(StoreError::Schema(advice)) if advice.contains("newer sonnette")));
    }
}

#[tokio::test]
async fn a_lease_whose_holder_was_killed_is_taken_over_and_one_that_moves_is_not() {
    let database = mysql_database().await;
    assert_eq!(database.store(), Which::Mysql);
    let store = store(&database).await;
    execute(
        &database,
        &[
            "DELETE FROM schema_migrations WHERE version = 19",
            "UPDATE schema_lock SET holder = X'000102030405060708090a0b0c0d0e0f', beat = 40 WHERE id = 1",
        ],
    )
    .await;
    let started = std::time::Instant::now();
    let waiting = async {
        let applied = store.migrate().await.unwrap();
        (applied.len(), started.elapsed())
    };
    let moving = async {
        for _ in 0..6 {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            execute(&database, &["UPDATE schema_lock SET beat = beat + 1 WHERE beat < 100"]).await;
        }
    };
    let ((applied, after), ()) = tokio::join!(waiting, moving);
    assert_eq!(applied, 1);
    assert!(after > std::time::Duration::from_secs(10), "six beats and then a lease: {after:?}");
    assert_eq!(number(&database, "SELECT COUNT(*) FROM schema_lock WHERE holder IS NULL").await, 1, "it is given back");
}
