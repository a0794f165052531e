//! Several hosts: one is lost, hangs or becomes read-only, and another takes over.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use sonnette::{
    domain::{clock::SystemClock, secret::Secret},
    store::{Role, Settings, Store, StoreError, open},
};

use super::Account;
use crate::{
    store::{NOW, eventually},
    support::{
        callers::Callers,
        database::{ACCEPTED, ENDED, OPEN, PrivateServer},
        world::{World, until},
    },
};

async fn opened(url: &str) -> Arc<dyn Store> {
    let settings = Settings {
        url: Secret::new(url.to_owned()),
        max_connections: 8,
        acquire_timeout: Duration::from_secs(3),
        slow_statement: None,
    };
    open(&settings, Role::Serve, Arc::new(SystemClock::new())).await.unwrap()
}

/// Two servers that do not know each other, with the same empty database, and the account of both.
async fn twins() -> (PrivateServer, PrivateServer, Account) {
    let (first, second) = tokio::join!(PrivateServer::start(), PrivateServer::start());
    let account = Account::create(&first, "ALL", "").await;
    account.create_also(&second, "ALL").await;
    for server in [&first, &second] {
        opened(&account.url_of(&[server])).await.migrate().await.unwrap();
    }
    (first, second, account)
}

/// Which of the two took the last write.
async fn probes(server: &PrivateServer, account: &Account) -> i64 {
    server.number(&format!("SELECT COUNT(*) FROM {}.service_facts WHERE name = 'probe'", account.name)).await
}

async fn connections(server: &PrivateServer) -> i64 {
    server.number("SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'shop'").await
}

#[tokio::test]
async fn a_read_only_host_is_not_taken_while_another_can_be_written_to() {
    let (first, second, account) = twins().await;
    first.execute(&["SET GLOBAL read_only = ON"]).await;
    let store = opened(&account.url_of(&[&first, &second])).await;
    store.probe(NOW).await.unwrap();
    assert_eq!((probes(&first, &account).await, probes(&second, &account).await), (0, 1));

    // Of two that are read-only neither is written to, and what can be read is.
    second.execute(&["SET GLOBAL read_only = ON"]).await;
    assert!(matches!(store.probe(NOW).await, Err(StoreError::Unavailable(_))));
    assert_eq!(store.api_keys().await.unwrap().len(), 0);
    first.execute(&["SET GLOBAL read_only = OFF"]).await;
    eventually("the first one is written to", async || store.probe(NOW).await.is_ok()).await;
    assert_eq!(probes(&first, &account).await, 1);
}

#[tokio::test]
async fn a_host_that_becomes_read_only_is_left_at_once_and_with_all_connections() {
    let (first, second, account) = twins().await;
    let store = opened(&account.url_of(&[&first, &second])).await;
    futures_util::future::join_all((0..8).map(|_| store.probe(NOW))).await;
    assert!(connections(&first).await >= 1);
    first.execute(&["SET GLOBAL read_only = ON"]).await;
    store.probe(NOW).await.expect("this very write is made on the other host");
    assert_eq!(probes(&second, &account).await, 1);
    eventually("no connection to the first is left", async || connections(&first).await == 0).await;
    // It stays there, whatever the order in the URL.
    first.execute(&["SET GLOBAL read_only = OFF"]).await;
    store.probe(NOW).await.unwrap();
    assert_eq!(connections(&first).await, 0);
}

#[tokio::test]
async fn a_single_read_and_a_write_turn_to_the_next_host_when_theirs_is_killed_and_back_again() {
    let (mut first, mut second, account) = twins().await;
    let store = opened(&account.url_of(&[&first, &second])).await;
    futures_util::future::join_all((0..8).map(|_| store.probe(NOW))).await;
    first.kill();
    assert_eq!(store.api_keys().await.expect("this very read is made on the other host").len(), 0);
    store.probe(NOW).await.unwrap();
    assert_eq!(probes(&second, &account).await, 1);

    first.restart().await;
    second.kill();
    store.probe(NOW).await.expect("and back");
    assert_eq!(store.api_keys().await.unwrap().len(), 0);
}

#[tokio::test]
async fn a_host_that_hangs_is_left_within_seconds() {
    let (first, second, account) = twins().await;
    let store = opened(&account.url_of(&[&first, &second])).await;
    futures_util::future::join_all((0..8).map(|_| store.probe(NOW))).await;
    first.freeze();
    // The signal may take a moment, and what is under way then may well be told to come back.
    eventually("it stands still", async || {
        tokio::time::timeout(Duration::from_millis(500), first.number("SELECT 1")).await.is_err()
    })
    .await;
    store.probe(NOW).await.expect("this very write is made on the other host");
    assert_eq!(probes(&second, &account).await, 1);
    first.thaw();
}

#[tokio::test]
async fn one_server_that_is_started_again_fails_nobody_who_comes_later() {
    let mut server = PrivateServer::start().await;
    let account = Account::create(&server, "ALL", "").await;
    let store = opened(&account.url_of(&[&server])).await;
    store.migrate().await.unwrap();
    // Eight connections, all of which the restart cuts.
    futures_util::future::join_all((0..8).map(|_| store.probe(NOW))).await;
    assert!(connections(&server).await > 4, "more than a read is tried");
    server.restart().await;
    store.api_keys().await.expect("a read alone");
    let all = futures_util::future::join_all((0..8).map(|_| store.api_keys())).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    store.probe(NOW).await.unwrap();
}

/// A question about the tables of this database.
fn of(question: &str, database: &str) -> String {
    question.replace("FROM ", &format!("FROM {database}."))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_drill_primary_read_only_then_killed_replica_takes_over_and_everything_adds_up() {
    // The real thing: asynchronous replication, and a replica that is read-only until it is promoted.
    let logged = |id: u8| ["--log-bin=log".to_owned(), format!("--server-id={id}"), "--binlog-format=ROW".to_owned()];
    let (one, two) = (logged(1), logged(2));
    let (mut primary, replica) = tokio::join!(PrivateServer::start_with(&one), PrivateServer::start_with(&two));
    replica.execute(&["SET GLOBAL read_only = ON"]).await;
    replica.follow(&primary).await;
    let account = Account::create(&primary, "ALL", "").await;
    let url = account.url_of(&[&primary, &replica]);
    eventually("the account has come over", async || {
        replica.number("SELECT COUNT(*) FROM mysql.user WHERE user = 'shop'").await == 1
    })
    .await;
    let world = World::configured(account.database, Arc::new(SystemClock::new()), "", |config, _| {
        config.database.url = Secret::new(url);
    })
    .await;
    world.device(&"ab".repeat(32), Some("rider")).await;

    let callers = Callers::start(&world.server, 8);
    let ended = || async { replica.number(&of(ENDED, &account.name)).await };
    until("the load runs", || async { (ended().await > 500).then_some(()) }).await;

    primary.execute(&["SET GLOBAL read_only = ON"]).await;
    callers.until_refused().await;
    replica.catch_up(&primary).await;
    primary.kill();
    replica.promote().await;
    let promoted = Instant::now();
    let (before, kept_before) = (ended().await, callers.kept());
    callers.until_kept(kept_before).await;
    eprintln!("the first 202 came {:?} after the promotion", promoted.elapsed());
    until("work goes on at the other host", || async { (ended().await > before + 500).then_some(()) }).await;
    eprintln!(
        "500 went out within {:?} of the promotion, {} were told to come back",
        promoted.elapsed(),
        callers.refused()
    );
    let ids = callers.stop().await;

    let open = of(OPEN, &account.name);
    until("everything has ended", || async { (replica.number(&open).await == 0).then_some(()) }).await;
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "each accepted once");
    let count = i64::try_from(ids.len()).unwrap();
    let notifications = format!("SELECT COUNT(*) FROM {}.notifications", account.name);
    assert_eq!(replica.number(&notifications).await, count, "nothing but what was accepted");
    let accepted = of(ACCEPTED, &account.name);
    assert_eq!(replica.number(&accepted).await, count, "one outcome each");
    for id in ids.iter().step_by(997) {
        assert_eq!(world.done(id).await["counts"]["accepted"], 1);
    }
    assert_eq!(world.check("database:commit", "").await.map(|check| check["status"].clone()), Some(json!("pass")));
}
