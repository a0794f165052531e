//! A server whose defaults are not ours: what every session pins does not depend on them.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use sonnette::{
    domain::{clock::Timestamp, outcome::Fault, topic::Environment},
    store::StoreError,
};

use crate::{
    store::{NOW, store, world::Raw},
    support::{database::PrivateServer, scratch::Process},
};

/// The conformance suite itself, in a process of its own, on such a server.
#[tokio::test]
async fn whatever_the_servers_modes_time_zone_isolation_and_character_set_the_store_keeps_its_promises() {
    let options = [
        "--sql-mode=ANSI,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH,NO_UNSIGNED_SUBTRACTION,HIGH_NOT_PRECEDENCE",
        "--default-time-zone=+05:00",
        "--transaction-isolation=SERIALIZABLE",
        "--character-set-server=latin1",
        "--collation-server=latin1_german2_ci",
        "--default-storage-engine=MEMORY",
        "--group-concat-max-len=4",
        "--innodb-lock-wait-timeout=1",
    ];
    let server = PrivateServer::start_with(&options.map(str::to_owned)).await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["store::devices", "store::queue", "store::notifications", "store::cancel", "store::breakers"])
        .args(["store::retention", "--skip", "on_sqlite", "--test-threads", "2"])
        .env("TEST_DATABASE_URL", server.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut suite = Process::spawn(&mut command).unwrap();
    let output = suite.child().stdout.take().unwrap();
    let said = tokio::task::spawn_blocking(move || std::io::read_to_string(output).unwrap());
    let status = suite.wait(Duration::from_secs(300)).await.expect("it ends");
    let said = said.await.unwrap();
    assert!(status.success() && !said.contains(" 0 passed"), "{said}");
}

#[tokio::test]
async fn sessions_are_read_committed_and_strict_whatever_the_server_says() {
    let options = ["--sql-mode=", "--transaction-isolation=SERIALIZABLE"];
    let server = PrivateServer::start_with(&options.map(str::to_owned)).await;
    let database = server.database().await;
    let store = store(&database).await;

    // READ COMMITTED: a read waits for nobody's row lock. SERIALIZABLE would.
    let topic = "fr.ocpizza.livreur".parse().unwrap();
    let fault = Fault { status: 403, reason: "InvalidProviderToken".into() };
    let open = || store.open_breaker(&topic, Environment::Production, "f1", &fault, NOW, Timestamp::from_seconds(0));
    let opened = open().await.unwrap();
    let mut other = Raw::open(database.url()).await;
    other.run("BEGIN").await;
    other.run("UPDATE breakers SET fingerprint = 'f2'").await;
    let again = tokio::time::timeout(Duration::from_secs(4), open()).await.expect("it does not wait");
    assert_eq!(again.unwrap(), opened);
    other.run("ROLLBACK").await;

    // Strict: what does not fit is refused, not cut.
    let joined = store.join(&"x".repeat(10_000), "1", NOW).await;
    assert!(matches!(joined, Err(StoreError::Statement(_))), "{joined:?}");
}
