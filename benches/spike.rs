//! What the schema can carry: accepts, settles and a broadcast to a million devices, through the real verbs, on a real
//! MariaDB or MySQL that flushes its log at every commit.
//!
//! `cargo bench --bench spike` starts a server of its own; `-- --url mysql://…/database` takes an empty database that
//! is there; `-- --devices 100000` makes everything smaller. It refuses to measure a server whose commits are not
//! durable. The yardstick, the rate of single-row commits, is measured in the same run.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "a measurement: it stops where something is wrong"
)]
#![expect(clippy::cast_precision_loss, reason = "rates")]

/// The tests' private database server, and the processes and folders it needs.
#[path = "../tests/it/support"]
#[expect(clippy::expect_used, clippy::print_stderr, reason = "as in the tests: a failure is to stop it and say where")]
mod support {
    #[expect(dead_code, unused_macros, unused_imports, reason = "the tests use more of it")]
    pub(crate) mod database;
    #[expect(dead_code, reason = "the tests use more of it")]
    pub(crate) mod galera;
    pub(crate) mod ports;
    #[expect(dead_code, reason = "the tests use more of it")]
    pub(crate) mod scratch;
}

use std::{
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use sonnette::{
    domain::{
        clock::{Clock, SystemClock, Timestamp},
        delivery::{Chunk, DeliveryStatus, DeviceEffect, State, Target},
        device::{DeviceId, DeviceSeq, DeviceToken},
        notification::{Audience, Lane, Notification, NotificationId},
        outcome::Cause,
        payload::Payload,
        push::{Expiration, OnUnknown, Priority, PushType},
        secret::Secret,
        topic::Environment,
    },
    store::{
        self, Accepted, Claimed, Disposition, Idempotency, Lease, ReplicaId, Role, Settings, Settled, Store, Submission,
    },
};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};

/// How long each of the smaller measurements takes.
const A_WHILE: Duration = Duration::from_secs(3);

struct Spike {
    url: String,
    store: Arc<dyn Store>,
    clock: Arc<SystemClock>,
    replica: ReplicaId,
    devices: u32,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut url = None;
    let mut devices = 1_000_000;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--url" => url = arguments.next(),
            "--devices" => {
                devices = arguments.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("--devices N"));
            }
            "--bench" => {}
            other => panic!("unknown: {other}; known: --url URL, --devices N"),
        }
    }
    let mut private = None;
    let url = if let Some(url) = url {
        url
    } else {
        let server = support::database::PrivateServer::start().await;
        let database = server.database().await;
        let url = database.url().to_owned();
        private = Some((server, database));
        url
    };
    let mut conn = MySqlConnection::connect(&url).await.unwrap();
    let variable = durable(&mut conn).await;
    if private.is_some() {
        for setting in ["innodb_buffer_pool_size = 1073741824", "innodb_log_file_size = 536870912"] {
            let sql = AssertSqlSafe(format!("SET GLOBAL {setting}"));
            if let Err(error) = sqlx::query(sql).execute(&mut conn).await {
                println!("{setting}: not set ({error})");
            }
        }
    }
    println!("server: {variable}");
    let clock = Arc::new(SystemClock::new());
    let settings = Settings {
        url: Secret::new(url.clone()),
        max_connections: 8,
        acquire_timeout: Duration::from_secs(30),
        slow_statement: None,
    };
    let store = store::open(&settings, Role::Serve, clock.clone()).await.unwrap();
    store.migrate().await.unwrap();
    let replica = store.join("spike", "0", clock.now()).await.unwrap();
    let spike = Arc::new(Spike { url, store, clock, replica, devices });

    spike.yardstick().await;
    spike.register(&mut conn).await;
    spike.singles().await;
    spike.broadcast(&mut conn, "first of the day: each device's last_accepted_at is written").await;
    spike.broadcast(&mut conn, "second of the day: no device is written").await;
    spike.store.close().await;
    drop(private);
}

/// Refuses a server whose commits are not durable.
async fn durable(conn: &mut MySqlConnection) -> String {
    let row = sqlx::query(
        "SELECT VERSION(), @@GLOBAL.innodb_flush_log_at_trx_commit, @@GLOBAL.log_bin, @@GLOBAL.sync_binlog",
    )
    .fetch_one(conn)
    .await
    .unwrap();
    let version: String = row.try_get_unchecked(0).unwrap();
    let number = |column: usize| row.try_get_unchecked::<i64, _>(column).unwrap();
    let (flush, log_bin, sync_binlog) = (number(1), number(2), number(3));
    assert!(
        flush == 1,
        "innodb_flush_log_at_trx_commit is {flush}: a commit would not be durable, nothing is measured"
    );
    assert!(log_bin == 0 || sync_binlog == 1, "sync_binlog is {sync_binlog}: nothing is measured");
    format!("{version}, innodb_flush_log_at_trx_commit = 1, log_bin = {log_bin}")
}

fn token(n: u32) -> DeviceToken {
    DeviceToken::from_bytes(&Sha256::digest(n.to_be_bytes())).unwrap()
}

fn device_id(n: u32) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128((0x0193_515e_8f00_7abc << 64) | 0x8def << 48 | u128::from(n)))
}

fn line(what: &str, count: u64, took: Duration, unit: &str) {
    let rate = count as f64 / took.as_secs_f64();
    println!("| {what} | {count} | {:.2} s | {rate:.0} {unit}/s |", took.as_secs_f64());
}

impl Spike {
    /// Single-row commits: what the disk and the server can do at all.
    async fn yardstick(&self) {
        println!("\n| yardstick: one row a commit | count | took | rate |\n|---|---|---|---|");
        let mut conn = MySqlConnection::connect(&self.url).await.unwrap();
        sqlx::query(
            "CREATE TABLE yardstick (n BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, v BIGINT NOT NULL) ENGINE=InnoDB",
        )
        .execute(&mut conn)
        .await
        .unwrap();
        for connections in [1, 4] {
            let started = Instant::now();
            let mut running = Vec::new();
            for _ in 0..connections {
                let url = self.url.clone();
                running.push(spawn(async move {
                    let mut conn = MySqlConnection::connect(&url).await.unwrap();
                    let mut count = 0;
                    while started.elapsed() < A_WHILE {
                        sqlx::query("INSERT INTO yardstick (v) VALUES (?)")
                            .bind(count)
                            .execute(&mut conn)
                            .await
                            .unwrap();
                        count += 1;
                    }
                    count
                }));
            }
            let mut count = 0;
            for one in running {
                count += one.await.unwrap();
            }
            line(&format!("{connections} connections"), u64::try_from(count).unwrap(), started.elapsed(), "commits");
        }
    }

    /// Devices, in bulk: each with a user of its own.
    async fn register(&self, conn: &mut MySqlConnection) {
        println!("\n| set-up | count | took | rate |\n|---|---|---|---|");
        let started = Instant::now();
        let at = self.clock.now().minus(Duration::from_secs(3600)).as_millis();
        for first in (0..self.devices).step_by(5_000) {
            let mut sql = "INSERT INTO devices (id, topic, token, push_type, user_id, generation, installation_id, \
                status, created_at, last_registered_at, last_accepted_at) VALUES "
                .to_owned();
            for n in first..(first + 5_000).min(self.devices) {
                let comma = if n == first { "" } else { "," };
                let (id, token) = (device_id(n), token(n));
                write!(
                    sql,
                    "{comma}(X'{}','fr.ocpizza.livreur',X'{}','alert','user-{n:07}',1,'{id}','active',{at},{at},0)",
                    id.as_uuid().simple(),
                    token.as_hex()
                )
                .unwrap();
            }
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *conn).await.unwrap();
        }
        line("devices, 5,000 a statement", self.devices.into(), started.elapsed(), "devices");
        sizes(conn, "devices", u64::from(self.devices)).await;
    }

    fn notification(&self, lane: Lane) -> Notification {
        let now = self.clock.now();
        Notification {
            id: NotificationId::new(now),
            topic: "fr.ocpizza.livreur".parse().unwrap(),
            owner: "boutique".to_owned(),
            reference: Some("1042".parse().unwrap()),
            lane,
            push_type: PushType::Alert,
            priority: Priority::Ten,
            expiration: Expiration::At(now.plus(Duration::from_secs(86_400))),
            collapse_id: None,
            derives_collapse_id: true,
            on_unknown: OnUnknown::Retry,
            environment: None,
            payload: Payload::from_stored(
                br#"{"aps":{"alert":{"title":"Nouvelle livraison","body":"Commande 1042, 12 rue Oberkampf"},"sound":"default"},"order_id":1042}"#
                    .as_slice()
                    .into(),
            ),
            due_at: now,
            created_at: now,
            warnings: Vec::new(),
        }
    }

    /// Single notifications, in groups, accepted and settled.
    async fn singles(self: &Arc<Self>) {
        println!("\n| single notifications | count | took | rate |\n|---|---|---|---|");
        let mut next = 0;
        for (group, concurrent, keys) in [
            (1, 1, false),
            (32, 1, false),
            (128, 1, false),
            (256, 1, false),
            (1, 4, false),
            (32, 4, false),
            (128, 4, false),
            (256, 4, false),
            (128, 4, true),
        ] {
            let started = Instant::now();
            let mut running = Vec::new();
            for _ in 0..concurrent {
                let spike = Arc::clone(self);
                let first = next;
                // Far more than fits into the time, wrapped around.
                next = (next + self.devices / 41) % self.devices;
                running.push(spawn(async move { spike.accept_for_a_while(first, group, keys, started).await }));
            }
            let mut leases = Vec::new();
            for one in running {
                leases.push(one.await.unwrap());
            }
            let count = leases.iter().map(Vec::len).sum::<usize>() as u64;
            let with = if keys { ", with idempotency keys" } else { "" };
            line(
                &format!("accept, {group} a group, {concurrent} at once{with}"),
                count,
                started.elapsed(),
                "notifications",
            );
            let started = Instant::now();
            let mut running = Vec::new();
            for leases in leases {
                let spike = Arc::clone(self);
                running.push(spawn(async move { spike.settle_singles(&leases, group).await }));
            }
            for one in running {
                one.await.unwrap();
            }
            line(&format!("settle, {group} a group, {concurrent} at once"), count, started.elapsed(), "notifications");
        }
        assert!(self.store.owned(self.replica).await.unwrap().is_empty(), "everything has ended");
    }

    async fn accept_for_a_while(&self, first: u32, group: u32, keys: bool, started: Instant) -> Vec<Lease> {
        let mut leases = Vec::new();
        let mut n = first;
        while started.elapsed() < A_WHILE {
            let group: Vec<Submission> = (0..group)
                .map(|_| {
                    n = (n + 1) % self.devices;
                    let notification = self.notification(Lane::Transactional);
                    let key = Sha256::digest(notification.id.as_uuid().as_bytes()).into();
                    Submission {
                        idempotency: keys.then_some(Idempotency { key, body: key }),
                        notification,
                        audience: Audience::Users(vec![format!("user-{n:07}").parse().unwrap()]),
                        own: true,
                    }
                })
                .collect();
            for answer in self.store.accept(&group, self.replica, self.clock.now()).await.unwrap() {
                match answer.unwrap() {
                    Accepted::New { leases: new, .. } => leases.extend(new),
                    other => panic!("{other:?}"),
                }
            }
        }
        leases
    }

    async fn settle_singles(&self, leases: &[Lease], group: u32) {
        for piece in leases.chunks(group as usize) {
            let now = self.clock.now();
            let chunks: Vec<Chunk> = piece
                .iter()
                .map(|lease| Chunk { targets: lease.chunk.targets.clone(), states: vec![accepted(now)] })
                .collect();
            let effects: Vec<_> = piece
                .iter()
                .map(|lease| {
                    [(
                        lease.addresses[0].seq,
                        lease.addresses[0].token.clone(),
                        DeviceEffect::Accepted(Environment::Production, None),
                    )]
                })
                .collect();
            let done: Vec<Settled<'_>> = piece
                .iter()
                .zip(&chunks)
                .zip(&effects)
                .map(|((lease, chunk), effects)| Settled {
                    key: lease.key,
                    epoch: lease.epoch,
                    seat: lease.seat,
                    chunk,
                    disposition: Disposition::Keep,
                    effects,
                    unique_ids: &[],
                })
                .collect();
            assert!(self.store.settle(&done, self.replica, now).await.unwrap().is_empty());
        }
    }

    /// A broadcast to everyone, resolved as it is claimed, each chunk settled in four steps.
    async fn broadcast(&self, conn: &mut MySqlConnection, which: &str) {
        println!("\n| broadcast, {which} | count | took | rate |\n|---|---|---|---|");
        let before = bytes(conn, "chunks").await;
        let started = Instant::now();
        let submission = Submission {
            notification: self.notification(Lane::Bulk),
            audience: Audience::Everyone,
            idempotency: None,
            own: false,
        };
        self.store.accept(&[submission], self.replica, self.clock.now()).await.unwrap().pop().unwrap().unwrap();
        line("accepted", 1, started.elapsed(), "notifications");

        let started = Instant::now();
        let (mut claiming, mut settling) = (Duration::ZERO, Duration::ZERO);
        let (mut chunks, mut settles, mut devices) = (0_u64, 0_u64, 0_u64);
        loop {
            let began = Instant::now();
            let Claimed { leases, more } =
                self.store.claim(&Lane::ALL, 16, &[], &[], self.replica, self.clock.now()).await.unwrap();
            claiming += began.elapsed();
            if leases.is_empty() && !more {
                break;
            }
            chunks += leases.len() as u64;
            let mut current: Vec<Chunk> = leases.iter().map(|lease| lease.chunk.clone()).collect();
            for step in 0..4 {
                let began = Instant::now();
                let now = self.clock.now();
                let effects: Vec<_> =
                    leases.iter().zip(&mut current).map(|(lease, chunk)| progress(lease, chunk, step, now)).collect();
                devices += effects.iter().map(Vec::len).sum::<usize>() as u64;
                let done: Vec<Settled<'_>> = leases
                    .iter()
                    .zip(&current)
                    .zip(&effects)
                    .map(|((lease, chunk), effects)| Settled {
                        key: lease.key,
                        epoch: lease.epoch,
                        seat: lease.seat,
                        chunk,
                        disposition: Disposition::Keep,
                        effects,
                        unique_ids: &[],
                    })
                    .collect();
                assert!(self.store.settle(&done, self.replica, now).await.unwrap().is_empty());
                settling += began.elapsed();
                settles += 1;
            }
        }
        line(
            &format!("resolved and claimed as {chunks} chunks, 10 at a time, with addresses"),
            self.devices.into(),
            claiming,
            "devices",
        );
        line(&format!("settled in {settles} settles ({devices} accepted)"), self.devices.into(), settling, "devices");
        line("claim and settle together", self.devices.into(), started.elapsed(), "devices");
        sizes_since(conn, "chunks", before, u64::from(self.devices)).await;
        let sql = "SELECT CAST(SUM(LENGTH(targets)) AS SIGNED), CAST(SUM(LENGTH(states)) AS SIGNED), \
            CAST(SUM(targeted) AS SIGNED) FROM chunks WHERE lane = 1";
        let row = sqlx::query(sql).fetch_one(&mut *conn).await.unwrap();
        let number = |column: usize| row.try_get_unchecked::<i64, _>(column).unwrap() as f64;
        println!(
            "| compact forms: {:.2} bytes a device of targets, {:.2} of outcomes | | | |",
            number(0) / number(2),
            number(1) / number(2)
        );
        assert!(self.store.owned(self.replica).await.unwrap().is_empty(), "everything has ended");
    }
}

fn accepted(at: Timestamp) -> State {
    State { status: DeliveryStatus::Accepted, attempts: 1, at: Some(at), ..State::PENDING }
}

/// A quarter of the targets, in their order, gets its outcome; one in two hundred is refused.
fn progress(
    lease: &Lease,
    chunk: &mut Chunk,
    step: usize,
    now: Timestamp,
) -> Vec<(DeviceSeq, DeviceToken, DeviceEffect)> {
    let addresses: std::collections::HashMap<_, _> = lease.addresses.iter().map(|a| (a.seq, &a.token)).collect();
    let mut effects = Vec::new();
    let quarter = chunk.targets.len().div_ceil(4);
    for at in (step * quarter..(step + 1) * quarter).take_while(|at| *at < lease.chunk.targets.len()) {
        if at % 200 == 0 {
            let cause = Cause { apns_status: Some(400), reason: "DeviceTokenNotForTopic".into() };
            chunk.states[at] = State { status: DeliveryStatus::Failed, cause: Some(cause), ..accepted(now) };
            continue;
        }
        chunk.states[at] = accepted(now);
        if let Target::Device { seq, .. } = chunk.targets[at] {
            effects.push((seq, addresses[&seq].clone(), DeviceEffect::Accepted(Environment::Production, None)));
        }
    }
    effects
}

async fn bytes(conn: &mut MySqlConnection, table: &str) -> (u64, u64) {
    sqlx::raw_sql(AssertSqlSafe(format!("ANALYZE TABLE {table}"))).execute(&mut *conn).await.unwrap();
    let sql = "SELECT CAST(data_length AS SIGNED), CAST(index_length AS SIGNED) FROM information_schema.tables \
        WHERE table_schema = DATABASE() AND table_name = ?";
    let row = sqlx::query(sql).bind(table).fetch_one(conn).await.unwrap();
    let number = |column: usize| u64::try_from(row.try_get_unchecked::<i64, _>(column).unwrap()).unwrap();
    (number(0), number(1))
}

async fn sizes(conn: &mut MySqlConnection, table: &str, devices: u64) {
    sizes_since(conn, table, (0, 0), devices).await;
}

async fn sizes_since(conn: &mut MySqlConnection, table: &str, before: (u64, u64), devices: u64) {
    let now = bytes(conn, table).await;
    let (data, index) = (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
    println!(
        "| {table}: {:.1} MB of rows, {:.1} MB of indexes | {:.1} bytes a device | | |",
        data as f64 / 1e6,
        index as f64 / 1e6,
        (data + index) as f64 / devices as f64
    );
}

#[expect(clippy::disallowed_methods, reason = "a measurement has no tracker")]
fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::spawn(work)
}
