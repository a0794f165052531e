//! Migrations by processes: many at once, one that is killed or frozen in the middle, a schema of a later version.

use std::{
    net::Ipv4Addr,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::json;

use super::{Account, Serving, said};
use crate::{
    broadcast::{broadcast, with_devices},
    replicas::{everything_is_accepted, post_singles},
    store::{execute, number},
    support::{
        cluster::{Cluster, Member},
        database::{PrivateServer, mysql_database},
        scratch::{Folder, Process},
        service::SONNETTE,
        world::{TOPIC, until},
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

/// What a later version may do to a schema that this one goes on using: every table it writes gets a column that may be
/// left out, or an index; a table is new.
fn tomorrow() -> Vec<String> {
    let mut steps = vec!["CREATE TABLE tomorrow (id BIGINT NOT NULL PRIMARY KEY) ENGINE = InnoDB".to_owned()];
    let tables = [
        "acceptances",
        "devices",
        "device_tags",
        "device_tombstones",
        "notifications",
        "chunks",
        "cohorts",
        "audiences",
        "cancellations",
        "notification_users",
        "delivery_notes",
        "reasons",
        "idempotency_keys",
        "replicas",
        "breakers",
        "api_keys",
    ];
    steps.extend(tables.map(|table| format!("ALTER TABLE {table} ADD COLUMN tomorrow INT NULL")));
    steps.push("CREATE INDEX notifications_tomorrow ON notifications (tomorrow)".to_owned());
    steps.push(
        "INSERT INTO schema_migrations (version, name, checksum, applied_at) VALUES (9998, 'tomorrow', X'00', 0)"
            .to_owned(),
    );
    steps.push(min_reader(known_version()));
    steps
}

/// The newest step that this version knows.
fn known_version() -> i64 {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/mysql");
    let names = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    names.map(|name| name.split('_').next().unwrap().parse().unwrap()).max().unwrap()
}

fn min_reader(version: i64) -> String {
    format!("REPLACE INTO service_facts (name, value) VALUES ('min_reader', '{version}')")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_goes_on_while_the_next_schema_is_applied_under_it_and_another_starts_until_it_is_shut_out() {
    const DEVICES: usize = 2_000;
    let database = mysql_database().await;
    with_devices(&database, DEVICES).await;
    // Answers take their time, so that something is always under way.
    let mut cluster = Cluster::start(database, &[Member::default()], "", &["--latency-ms", "20"]).await;

    broadcast(&cluster.callers[0], json!({ "everyone": true })).await;
    let steps = tomorrow();
    let singles = steps.len() * 20;
    tokio::join!(post_singles(&cluster, singles, DEVICES), async {
        for step in &steps {
            execute(cluster.database(), &[step]).await;
        }
    });
    // The second one starts on tomorrow's schema. Both register, accept, send, settle and answer.
    cluster.join(Member::default(), |_| {}).await;
    broadcast(&cluster.callers[1], json!({ "everyone": true })).await;
    post_singles(&cluster, 200, DEVICES).await;
    for (number, caller) in cluster.callers.iter().enumerate() {
        let phone =
            json!({ "topic": TOPIC, "token": format!("{number:02x}").repeat(32), "user_id": "rider", "tags": ["x"] });
        caller.post("/v1/devices", &phone).await.ok();
    }
    let all = 2 * DEVICES + singles + 200;
    everything_is_accepted(&cluster, all).await;
    let summary = cluster.sim.control.get("/ledger/summary").await.ok();
    assert_eq!(summary["accepted_once"].as_u64(), u64::try_from(all).ok(), "{summary}");
    for caller in &cluster.callers {
        assert_eq!(caller.get("/health").await.status, 200);
    }

    // The step after that shuts this version out: both stop, in good order but for the exit status.
    execute(cluster.database(), &[&min_reader(9998)]).await;
    for replica in &mut cluster.replicas {
        let status = replica.process().wait(Duration::from_secs(60)).await.expect("it stops by itself");
        assert_eq!(status.code(), Some(1));
        let said = std::fs::read_to_string(replica.log()).unwrap();
        assert!(said.contains("9998") && said.contains("run a newer sonnette"), "{said}");
    }
    assert_eq!(number(cluster.database(), "SELECT COUNT(*) FROM replicas").await, 0, "both have left");
    let (well, error) = said(Folder::new("shut-out").path(), cluster.database().url(), "serve");
    assert!(!well && error.contains("9998") && error.contains("run a newer sonnette"), "{error}");
}
