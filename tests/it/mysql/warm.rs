//! Connections that have just committed are used again at once, and nobody who waits for one waits for those.

use std::{sync::Arc, time::Duration};

use sonnette::{
    domain::{clock::SystemClock, secret::Secret},
    store::{Role, Settings, Store, open},
};

use crate::{
    store::{NOW, eventually},
    support::{
        database::{PrivateServer, TestDatabase},
        waiting::within,
    },
};

/// With so many connections beside the heart's.
async fn opened(database: &TestDatabase, max_connections: u32) -> Arc<dyn Store> {
    let settings = Settings {
        url: Secret::new(database.url().to_owned()),
        max_connections,
        acquire_timeout: Duration::from_secs(20),
        slow_statement: None,
    };
    let store = open(&settings, Role::CommandLine, Arc::new(SystemClock::new())).await.unwrap();
    store.migrate().await.unwrap();
    store.probe(NOW).await.unwrap();
    store
}

/// How often the server was told so since its start.
async fn told(server: &PrivateServer, what: &str) -> i64 {
    server.row(&format!("SHOW GLOBAL STATUS LIKE 'Com_{what}'")).await.1.parse().unwrap()
}

/// So many statements stand still on the server.
async fn stand_still(server: &PrivateServer, statement: &str, count: i64) {
    let question = format!(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE '-- {statement}%' AND id <> CONNECTION_ID()"
    );
    eventually("it stands still", async || server.number(&question).await == count).await;
}

#[tokio::test]
async fn behind_a_commit_nothing_is_asked_and_after_a_rest_the_pool_has_it_back() {
    let server = PrivateServer::start().await;
    let database = server.database().await;
    let store = opened(&database, 8).await;
    let prepared = "stmt_prepare";
    let (rolled_back, asked, before) =
        (told(&server, "rollback").await, told(&server, "admin_commands").await, told(&server, prepared).await);
    for _ in 0..100 {
        store.probe(NOW).await.unwrap();
    }
    let (rolled_back, asked) =
        (told(&server, "rollback").await - rolled_back, told(&server, "admin_commands").await - asked);
    assert!(rolled_back < 10 && asked < 20, "{rolled_back} times rolled back, {asked} times asked whether it lives");
    assert!(told(&server, prepared).await - before < 10, "one connection has its statement prepared");

    let before = told(&server, "rollback").await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    store.probe(NOW).await.unwrap();
    eventually("it went back into the pool", async || told(&server, "rollback").await > before).await;
    store.close().await;
}

#[tokio::test]
async fn who_waits_for_the_last_connection_has_it_though_it_has_just_committed() {
    let server = PrivateServer::start().await;
    let database = server.database().await;
    let store = opened(&database, 2).await;
    let name = database.url().rsplit_once('/').unwrap().1;
    let locked = server.hold(&format!("LOCK TABLES {name}.api_keys WRITE")).await;
    let reading = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.api_keys().await }
    });
    stand_still(&server, "api_keys", 1).await;
    // One of the two stands still; the other one rests.
    tokio::time::timeout(Duration::from_secs(5), store.breakers()).await.expect("at once").unwrap();

    // It commits while somebody waits for it.
    store.probe(NOW).await.unwrap();
    let row = server.hold(&format!("BEGIN; SELECT * FROM {name}.service_facts FOR UPDATE")).await;
    let writing = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.probe(NOW).await }
    });
    stand_still(&server, "database.probe", 1).await;
    let queued = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.breakers().await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(row);
    writing.await.unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(5), queued).await.expect("at once").unwrap().unwrap();

    drop(locked);
    reading.await.unwrap().unwrap();
    within("every connection to come back", store.close()).await;
}
