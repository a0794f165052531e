//! A replica that is busy, or that waits for somebody, is alive: its heart waits for nothing that it does beside.

use std::time::Duration;

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};

use super::{death::now, everything_is_accepted};
use crate::{
    broadcast::{broadcast, with_devices, with_riders},
    store::number,
    support::{
        cluster::{Cluster, Member},
        database::{TestDatabase, mysql_database},
        running::{Running, running},
        world::{TOPIC, until},
    },
};

/// What a slow machine may need for two beats.
const PATIENCE: Duration = Duration::from_secs(60);

/// Until the youngest replica's counter has moved twice while the same statements have been waiting: those that `which`
/// tells, at least so many.
async fn its_heart_beats_on_while(database: &TestDatabase, which: impl Fn(&Running) -> bool, many: usize) {
    let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
    let beaten = async {
        // Of which connections, for how long, and with which count it began.
        let mut since: Option<(Vec<u64>, i64, i64)> = None;
        loop {
            let mut these = running(&mut connection).await;
            these.retain(&which);
            let beats = number(database, "SELECT beat FROM replicas ORDER BY id DESC LIMIT 1").await;
            let seconds = these.iter().map(|one| one.seconds).min().filter(|_| these.len() >= many);
            let ids: Vec<u64> = these.iter().map(|one| one.connection).collect();
            since = seconds.map(|seconds| match &since {
                // A shorter time is another statement's.
                Some((same, before, from)) if *same == ids && *before <= seconds => (ids, seconds, *from),
                _ => (ids, seconds, beats),
            });
            if since.as_ref().is_some_and(|(.., from)| beats >= from + 2) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, beaten).await.expect("a heart that beats on while others wait");
}

/// Whoever wants these rows waits until the connection is dropped.
async fn hold(database: &TestDatabase, rows: &str) -> MySqlConnection {
    let mut connection = MySqlConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; {rows}"))).execute(&mut connection).await.unwrap();
    connection
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_lives_while_its_claim_takes_long() {
    let database = mysql_database().await;
    with_devices(&database, 10).await;
    let cluster = Cluster::start(database, &[Member::default()], "", &[]).await;
    let database = cluster.database();
    let soon = now().plus(Duration::from_secs(2));
    let body = json!({
        "topic": TOPIC, "to": { "everyone": true }, "payload": { "aps": { "alert": "Ding dong" } }, "send_at": soon,
    });
    let answer = cluster.callers[0].post("/v1/notifications", &body).await.ok();
    let id = answer["id"].as_str().unwrap().replace('-', "");
    let rows = format!("SELECT id FROM notifications WHERE id = X'{id}' FOR UPDATE");
    let held = hold(database, &rows).await;
    its_heart_beats_on_while(database, |one| one.waits_in("queue.resolved"), 1).await;
    held.close().await.unwrap();
    everything_is_accepted(&cluster, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_lives_while_accepting_takes_long() {
    let database = mysql_database().await;
    with_devices(&database, 1).await;
    with_riders(&database, 0).await;
    let cluster = Cluster::start(database, &[Member::default()], "", &[]).await;
    let database = cluster.database();
    let held = hold(database, "SELECT * FROM notification_users WHERE user_id = 'rider-1' FOR UPDATE").await;
    let body = json!({ "topic": TOPIC, "to": { "user_ids": ["rider-1", "nobody"] }, "payload": { "aps": { "alert": "Ding dong" } } });
    let meanwhile = async {
        its_heart_beats_on_while(database, |one| one.waits_in("queue.insert_links"), 1).await;
        held.close().await.unwrap();
    };
    let (answer, ()) = tokio::join!(cluster.callers[0].post("/v1/notifications", &body), meanwhile);
    assert_eq!(answer.status, 202, "{}", answer.text);
    everything_is_accepted(&cluster, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_lives_while_it_takes_over_from_one_that_is_dead() {
    let mut cluster = Cluster::start(mysql_database().await, &[Member::default(); 2], "", &[]).await;
    let dead = number(cluster.database(), "SELECT MIN(id) FROM replicas").await;
    cluster.replicas[0].process().kill();
    let database = cluster.database();
    let held = hold(database, &format!("SELECT id FROM replicas WHERE id = {dead} FOR UPDATE")).await;
    its_heart_beats_on_while(database, |one| one.waits_in("replicas.end"), 1).await;
    held.close().await.unwrap();
    until("it is taken over", || async {
        (number(database, "SELECT COUNT(*) FROM replicas").await == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_lives_while_all_its_connections_are_in_use() {
    let database = mysql_database().await;
    with_devices(&database, 1).await;
    let cluster = Cluster::start(database, &[Member::default()], "", &[]).await;
    let database = cluster.database();
    let sent = broadcast(&cluster.callers[0], json!({ "everyone": true })).await;
    everything_is_accepted(&cluster, 1).await;
    let mut held = MySqlConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql("LOCK TABLES notifications WRITE").execute(&mut held).await.unwrap();
    let path = format!("/v1/notifications/{}", sent["id"].as_str().unwrap());
    let asking = futures_util::future::join_all((0..24).map(|_| async {
        loop {
            cluster.callers[0].get(&path).await;
        }
    }));
    tokio::select! {
        _ = asking => unreachable!("they ask for ever"),
        // As many as there are by default.
        () = its_heart_beats_on_while(database, |one| one.state.starts_with("Waiting for table"), 16) => {}
    }
    held.close().await.unwrap();
    until("requests are answered again", || async {
        (cluster.callers[0].get(&path).await.status == 200).then_some(())
    })
    .await;
}
