//! Migrations by processes: many at once, one that is killed or frozen in the middle, a schema of a later version.

use std::{
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use super::{Account, Serving, said};
use crate::{
    store::{execute, number},
    support::{
        database::PrivateServer,
        scratch::{Folder, Process},
        service::SONNETTE,
        world::until,
    },
};

const APPLIED: &str = "SELECT COUNT(*) FROM schema_migrations";

/// How many there are, by the files.
fn known() -> i64 {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/mysql");
    i64::try_from(std::fs::read_dir(folder).unwrap().count()).unwrap()
}

#[tokio::test]
async fn replicas_that_start_at_once_on_an_empty_database_all_serve() {
    let server = PrivateServer::start().await;
    let account = Account::create(&server, "ALL", "").await;
    let folders: Vec<_> = (0..4).map(|_| Folder::new("replica")).collect();
    let replicas: Vec<_> =
        folders.iter().map(|folder| Serving::start(folder.path(), &account.url_of(&[&server]), "")).collect();
    for replica in &replicas {
        replica.ready().await;
    }
    assert_eq!(number(&account.database, APPLIED).await, known());
    assert_eq!(number(&account.database, "SELECT COUNT(*) FROM replicas").await, 4);
    let applied: usize =
        replicas.iter().map(|r| r.said().iter().filter(|line| !line["fields"]["migration"].is_null()).count()).sum();
    assert_eq!(i64::try_from(applied).unwrap(), known(), "each step was applied by one of them");
}

/// Stops `sonnette migrate` in its middle by this signal.
async fn cut(server: &PrivateServer, folder: &Folder, signal: &str) -> (Account, Process) {
    for _ in 0..20 {
        let account = Account::create(server, "ALL", "").await;
        let file = folder.path().join("migrate.toml");
        std::fs::write(&file, format!("[database]\nurl = \"{}\"\n", account.url_of(&[server]))).unwrap();
        let mut command = Command::new(SONNETTE);
        command.args(["migrate", "--config"]).arg(&file).env_remove("DATABASE_URL");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::spawn(&mut command).unwrap();
        let begun = format!(
            "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = '{}' AND table_name = 'devices'",
            account.name
        );
        until("the migration is under way", || async { (server.number(&begun).await == 1).then_some(()) }).await;
        if process.is_running() {
            process.signal(signal);
            let applied = number(&account.database, APPLIED).await;
            let held = number(&account.database, "SELECT COUNT(*) FROM schema_lock WHERE holder IS NOT NULL").await;
            if applied < known() && held == 1 {
                return (account, process);
            }
        }
        server.execute(&["DROP USER 'shop'@'%'"]).await;
    }
    panic!("never was a migration met in its middle, at {}", Ipv4Addr::LOCALHOST)
}

#[tokio::test]
async fn a_migration_that_is_killed_or_frozen_in_its_middle_is_ended_by_the_others() {
    for signal in ["KILL", "STOP"] {
        let server = PrivateServer::start().await;
        let folder = Folder::new("cut");
        let (account, mut process) = cut(&server, &folder, signal).await;
        let serving = Serving::start(folder.path(), &account.url_of(&[&server]), "");
        // Within the lease of 5 seconds, and what the steps take.
        serving.ready().await;
        assert_eq!(number(&account.database, APPLIED).await, known());
        if signal == "STOP" {
            // It wakes, and undoes nothing.
            process.signal("CONT");
            until("it ends", || {
                let running = process.is_running();
                async move { (!running).then_some(()) }
            })
            .await;
            assert_eq!(number(&account.database, APPLIED).await, known());
            assert!(serving.is_ready().await);
        }
        let free = "SELECT COUNT(*) FROM schema_lock WHERE holder IS NULL";
        assert_eq!(number(&account.database, free).await, 1, "the lease is free");
    }
}

#[tokio::test]
async fn a_schema_of_a_later_version_is_served_while_its_min_reader_allows_it() {
    let server = PrivateServer::start().await;
    let account = Account::create(&server, "ALL", "").await;
    let (folder, url) = (Folder::new("later"), account.url_of(&[&server]));
    let (well, error) = said(folder.path(), &url, "migrate");
    assert!(well, "{error}");
    // What a later version adds to a table that this one writes to: a column that may be left out.
    execute(
        &account.database,
        &[
            "ALTER TABLE devices ADD COLUMN tomorrow INT NULL",
            "INSERT INTO schema_migrations (version, name, checksum, applied_at) VALUES (9998, 'tomorrow', X'00', 0)",
            &format!("REPLACE INTO service_facts (name, value) VALUES ('min_reader', '{}')", known()),
        ],
    )
    .await;
    Serving::start(folder.path(), &url, "").ready().await;

    execute(&account.database, &["UPDATE service_facts SET value = '9998' WHERE name = 'min_reader'"]).await;
    let (well, error) = said(folder.path(), &url, "serve");
    assert!(!well && error.contains("9998") && error.contains("run a newer sonnette"), "{error}");
}
