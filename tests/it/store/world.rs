//! A store, a clock that is moved by hand, and a connection beside the store for what no verb does.

use std::{sync::Arc, time::Duration};

use sonnette::{
    domain::{
        clock::{Clock, ManualClock, Timestamp},
        delivery::{Chunk, DeliveryStatus, DeviceEffect, State},
        device::{DeviceId, DeviceSeq, DeviceToken, UserId},
        notification::{Audience, Lane, Notification, NotificationId, NotificationView},
        outcome::Cause,
        payload::Payload,
        push::{Expiration, OnUnknown, Priority, PushType},
        secret::Secret,
        topic::Topic,
    },
    store::{
        self, Accepted, DeliveryView, Disposition, Idempotency, Lease, PageRequest, ReplicaId, Role, Settings, Settled,
        Store, Submission,
    },
};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row, SqliteConnection};

use crate::support::database::TestDatabase;

/// When the tests begin.
pub(crate) const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

pub(crate) const TOPIC: &str = "fr.ocpizza.livreur";

pub(crate) struct World {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) replica: ReplicaId,
    pub(crate) database: TestDatabase,
    raw: tokio::sync::Mutex<Raw>,
}

pub(crate) enum Raw {
    Sqlite(SqliteConnection),
    Mysql(MySqlConnection),
}

impl Raw {
    pub(crate) async fn open(url: &str) -> Self {
        if url.starts_with("sqlite:") {
            Self::Sqlite(SqliteConnection::connect(url).await.unwrap())
        } else {
            Self::Mysql(MySqlConnection::connect(url).await.unwrap())
        }
    }

    pub(crate) async fn run(&mut self, sql: &str) -> u64 {
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            // Not prepared: MySQL prepares neither BEGIN nor COMMIT.
            Self::Sqlite(conn) => sqlx::raw_sql(sql).execute(conn).await.unwrap().rows_affected(),
            Self::Mysql(conn) => sqlx::raw_sql(sql).execute(conn).await.unwrap().rows_affected(),
        }
    }

    /// The first column of the first row, as a text.
    pub(crate) async fn text(&mut self, sql: &str) -> Option<String> {
        let sql = AssertSqlSafe(sql.to_owned());
        let bytes: Option<Vec<u8>> = match self {
            Self::Sqlite(conn) => sqlx::query(sql).fetch_one(conn).await.unwrap().try_get_unchecked(0).unwrap(),
            Self::Mysql(conn) => sqlx::query(sql).fetch_one(conn).await.unwrap().try_get_unchecked(0).unwrap(),
        };
        bytes.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    /// The first column of the first row, as a number.
    pub(crate) async fn number(&mut self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            Self::Sqlite(conn) => sqlx::query_scalar(sql).fetch_one(conn).await.unwrap(),
            Self::Mysql(conn) => sqlx::query_scalar(sql).fetch_one(conn).await.unwrap(),
        }
    }
}

/// A device that was put there by hand.
#[derive(Debug, Clone)]
pub(crate) struct Phone {
    pub(crate) id: DeviceId,
    pub(crate) seq: DeviceSeq,
    pub(crate) token: DeviceToken,
}

pub(crate) async fn open(url: &str, role: Role, clock: Arc<dyn Clock>) -> Arc<dyn Store> {
    let settings = Settings {
        url: Secret::new(url.to_owned()),
        max_connections: 8,
        acquire_timeout: Duration::from_secs(30),
        slow_statement: None,
    };
    store::open(&settings, role, clock).await.unwrap()
}

impl World {
    pub(crate) async fn on(database: TestDatabase) -> Self {
        let clock = Arc::new(ManualClock::new(NOW));
        let store = open(database.url(), Role::Serve, clock.clone()).await;
        store.migrate().await.unwrap();
        let replica = store.join("one", "0.1.0", NOW).await.unwrap();
        let raw = tokio::sync::Mutex::new(Raw::open(database.url()).await);
        Self { store, clock, replica, database, raw }
    }

    /// The same database, seen by another process.
    pub(crate) async fn beside(&self) -> Arc<dyn Store> {
        open(self.database.url(), Role::CommandLine, self.clock.clone()).await
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub(crate) async fn run(&self, sql: &str) -> u64 {
        self.raw.lock().await.run(sql).await
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        self.raw.lock().await.number(sql).await
    }

    /// How many chunks there are: as rows, and in seats that have not been left.
    pub(crate) async fn chunks(&self) -> i64 {
        let of_seats = "SELECT CAST(COALESCE(SUM(open + accepted), 0) AS SIGNED) FROM cohorts";
        self.number("SELECT COUNT(*) FROM chunks").await + self.number(of_seats).await
    }

    pub(crate) async fn text(&self, sql: &str) -> Option<String> {
        self.raw.lock().await.text(sql).await
    }

    /// An active device of the app for alerts, registered an hour ago.
    pub(crate) async fn phone(&self, token: &str, user: Option<&str>) -> Phone {
        self.phone_with(token, user, TOPIC, "alert", "active").await
    }

    pub(crate) async fn phone_with(
        &self,
        token: &str,
        user: Option<&str>,
        topic: &str,
        push_type: &str,
        status: &str,
    ) -> Phone {
        let id = DeviceId::new(NOW);
        let token: DeviceToken = token.parse().unwrap();
        let at = NOW.minus(Duration::from_secs(3600)).as_millis();
        let user = user.map_or("NULL".to_owned(), |user| format!("X'{}'", hex::encode(user)));
        self.run(&format!(
            "INSERT INTO devices (id, topic, token, push_type, user_id, generation, status, created_at, \
             last_registered_at, last_accepted_at) VALUES (X'{}', '{topic}', X'{}', '{push_type}', {user}, 3, \
             '{status}', {at}, {at}, 0)",
            id.as_uuid().simple(),
            token.as_hex(),
        ))
        .await;
        let seq = self.number(&format!("SELECT seq FROM devices WHERE id = X'{}'", id.as_uuid().simple())).await;
        Phone { id, seq: DeviceSeq(seq), token }
    }

    /// What a column of a device says.
    pub(crate) async fn device(&self, phone: &Phone, column: &str) -> Option<String> {
        let cast = match self.database.store() {
            crate::support::database::Store::Sqlite => "TEXT",
            crate::support::database::Store::Mysql => "CHAR",
        };
        self.text(&format!("SELECT CAST({column} AS {cast}) FROM devices WHERE seq = {}", phone.seq.0)).await
    }

    pub(crate) fn notification(&self) -> Notification {
        let now = self.now();
        Notification {
            id: NotificationId::new(now),
            topic: topic(),
            owner: "boutique".to_owned(),
            reference: Some("1042".parse().unwrap()),
            lane: Lane::Transactional,
            push_type: PushType::Alert,
            priority: Priority::Ten,
            expiration: Expiration::At(now.plus(Duration::from_secs(600))),
            collapse_id: None,
            derives_collapse_id: true,
            on_unknown: OnUnknown::Retry,
            environment: None,
            payload: Payload::from_stored(br#"{"aps":{"alert":"Commande 1042"}}"#.as_slice().into()),
            due_at: now,
            created_at: now,
            warnings: Vec::new(),
        }
    }

    pub(crate) fn submission(&self, audience: Audience) -> Submission {
        Submission { notification: self.notification(), audience, idempotency: None, own: true }
    }

    /// Accepts one, which must be new.
    pub(crate) async fn accept(&self, submission: Submission) -> (NotificationView, Vec<Lease>) {
        let mut answers = self.store.accept(&[submission], self.replica, self.now()).await.unwrap();
        new(answers.pop().unwrap())
    }

    pub(crate) async fn view(&self, id: NotificationId) -> NotificationView {
        self.store.notification(id).await.unwrap().unwrap()
    }

    pub(crate) async fn deliveries(&self, id: NotificationId) -> Vec<DeliveryView> {
        let page = PageRequest { cursor: None, limit: 1_000 };
        self.store.deliveries(id, None, &page).await.unwrap().unwrap().items
    }

    /// Settles one chunk that must still be ours.
    pub(crate) async fn settle(&self, lease: &Lease, chunk: &Chunk, disposition: Disposition) {
        self.settle_with(lease, chunk, disposition, &[]).await;
    }

    pub(crate) async fn settle_with(
        &self,
        lease: &Lease,
        chunk: &Chunk,
        disposition: Disposition,
        effects: &[(DeviceSeq, DeviceToken, DeviceEffect)],
    ) {
        let settled = Settled {
            key: lease.key,
            epoch: lease.epoch,
            seat: lease.seat,
            chunk,
            disposition,
            effects,
            unique_ids: &[],
        };
        let lost = self.store.settle(&[settled], self.replica, self.now()).await.unwrap();
        assert_eq!(lost, [], "the lease was lost");
    }

    /// Every view's counts add up.
    pub(crate) async fn counts_add_up(&self, id: NotificationId) {
        let c = self.view(id).await.counts;
        assert_eq!(
            c.targeted,
            c.pending + c.accepted + c.failed + c.unregistered + c.expired + c.cancelled + c.suppressed + c.unknown
        );
        let mut by_hand = std::collections::HashMap::new();
        for delivery in self.deliveries(id).await {
            *by_hand.entry(delivery.state.status).or_insert(0) += 1;
        }
        for (status, count) in [
            (DeliveryStatus::Pending, c.pending),
            (DeliveryStatus::Accepted, c.accepted),
            (DeliveryStatus::Failed, c.failed),
            (DeliveryStatus::Unregistered, c.unregistered),
            (DeliveryStatus::Expired, c.expired),
            (DeliveryStatus::Cancelled, c.cancelled),
            (DeliveryStatus::Suppressed, c.suppressed),
            (DeliveryStatus::Unknown, c.unknown),
        ] {
            assert_eq!(by_hand.get(&status).copied().unwrap_or(0), count, "{status}");
        }
    }
}

pub(crate) fn topic() -> Topic {
    TOPIC.parse().unwrap()
}

pub(crate) fn users(names: &[&str]) -> Audience {
    Audience::Users(names.iter().map(|name| name.parse::<UserId>().unwrap()).collect())
}

pub(crate) fn devices(phones: &[&Phone]) -> Audience {
    Audience::Devices { ids: phones.iter().map(|phone| phone.id).collect(), user_id: None }
}

pub(crate) fn key(key: u8, body: u8) -> Idempotency {
    Idempotency { key: [key; 32], body: [body; 32] }
}

pub(crate) fn new(answer: Result<Accepted, store::StoreError>) -> (NotificationView, Vec<Lease>) {
    match answer.unwrap() {
        Accepted::New { view, leases } => (view, leases),
        other => panic!("not new: {other:?}"),
    }
}

/// Tried once, and ended.
pub(crate) fn ended(status: DeliveryStatus, cause: Option<Cause>, at: Timestamp) -> State {
    State { status, attempts: 1, cause, at: Some(at), ..State::PENDING }
}

pub(crate) fn apple(apns_status: u16, reason: &str) -> Cause {
    Cause { apns_status: Some(apns_status), reason: reason.to_owned().into() }
}
