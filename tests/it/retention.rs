//! Retention as operators and callers see it: by itself, beside other work, and whatever is killed on the way.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::domain::{
    api_key::Scope,
    clock::{Clock, ManualClock, SystemClock, Timestamp},
};

use crate::{
    store::{execute, number, store, world::Raw},
    support::{
        database::{TestDatabase, on_both_stores},
        scratch::Folder,
        service::{Service, SimulatorProcess},
        world::{TOPIC, World, keys_folder, until},
    },
};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Lets time pass in small steps until a condition holds: what waits for a pause goes on.
async fn passing<T, F>(clock: &ManualClock, step: Duration, what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    until(what, || {
        clock.advance(step);
        look()
    })
    .await
}

/// A connection beside the service, to a database that the world has taken.
struct Beside(tokio::sync::Mutex<Raw>);

impl Beside {
    /// Makes the schema first, and with it an SQLite file.
    async fn of(database: &TestDatabase) -> Self {
        store(database).await.close().await;
        Self(tokio::sync::Mutex::new(Raw::open(database.url()).await))
    }

    async fn number(&self, question: &str) -> i64 {
        self.0.lock().await.number(question).await
    }

    async fn run(&self, statement: &str) {
        self.0.lock().await.run(statement).await;
    }
}

/// Makes the schema, and notifications that ended 40 days ago, each with a chunk, a link and a note; every 500th has 600 links.
async fn put_old(database: &TestDatabase, count: usize) {
    store(database).await.close().await;
    let at = SystemClock::new().now().minus(40 * DAY).as_millis();
    let mut notifications = Vec::new();
    let (mut chunks, mut users, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        let id = format!("X'{at:012x}7000{:016x}'", 0x8000_0000_0000_0000 + number);
        notifications
            .push(format!("({id}, '{TOPIC}', 'shop', 0, 'alert', 10, {at}, 1, 'retry', X'7b7d', 1, 0, {at}, {at})"));
        chunks.push(format!("({id}, 0, 0, NULL, 1, {at}, X'01', NULL, 0, 0, 0, 0, 0, 0, 0, 0, {at})"));
        let links = if number % 500 == 0 { 600 } else { 1 };
        users.extend((0..links).map(|user| format!("(X'{user:08x}', {id})")));
        notes.push(format!("({id}, 0, 0, 'failed', 1, {at})"));
    }
    for (head, rows) in [
        (
            "notifications (id, topic, owner, lane, push_type, priority, expires_at, derives_collapse_id, on_unknown, payload, \
             audience_complete, unmatched, due_at, created_at)",
            notifications,
        ),
        (
            "chunks (notification_id, number, lane, holder, epoch, due_at, targets, states, targeted, accepted, failed, \
             unregistered, expired, cancelled, suppressed, unanswered, ended_at)",
            chunks,
        ),
        ("notification_users (user_id, notification_id)", users),
        ("delivery_notes (notification_id, number, position, status, attempts, at)", notes),
    ] {
        for rows in rows.chunks(1_000) {
            execute(database, &[&format!("INSERT INTO {head} VALUES {}", rows.join(", "))]).await;
        }
    }
}

/// Rows that belong to a notification that is neither there nor known to be being cleared away.
async fn orphans(database: &TestDatabase) -> i64 {
    let mut sum = 0;
    for table in ["chunks", "notification_users", "delivery_notes"] {
        let question = format!(
            "SELECT COUNT(*) FROM {table} t WHERE NOT EXISTS (SELECT 1 FROM notifications n WHERE n.id = t.notification_id) \
             AND NOT EXISTS (SELECT 1 FROM notification_remains r WHERE r.notification_id = t.notification_id)"
        );
        sum += number(database, &question).await;
    }
    sum
}

/// Old notifications that are still there, wholly or in part.
async fn old_left(database: &TestDatabase) -> i64 {
    let now = SystemClock::new().now().minus(20 * DAY).as_millis();
    number(database, &format!("SELECT COUNT(*) FROM notifications WHERE created_at < {now}")).await
        + number(database, "SELECT COUNT(*) FROM notification_remains").await
}

fn sample(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

on_both_stores! {
    async fn what_was_kept_for_long_enough_goes_by_itself_and_the_rest_stays(database) {
        let beside = Beside::of(&database).await;
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let metrics = world.caller(&[Scope::Metrics]).await;
        world.device(&format!("{:064x}", 1), Some("anna")).await;
        let id = world.send(json!({ "user_ids": ["anna"] })).await;
        let before = world.done(&id).await;
        let deliveries = world.deliveries(&id).await;
        let scheduled = world.send_with(json!({ "user_ids": ["anna"] }), json!({ "send_at": "2027-01-25T00:00:00Z" })).await;

        let payloads = || beside.number("SELECT COUNT(*) FROM notifications WHERE payload IS NOT NULL");
        clock.advance(6 * DAY);
        let kept_at = || async { world.app().store().house_kept_at().await.unwrap() };
        let now = clock.now();
        passing(&clock, Duration::from_secs(1), "a round is over", || async { kept_at().await.filter(|at| *at >= now) }).await;
        assert_eq!(payloads().await, 2, "nothing is due");
        clock.advance(DAY);
        passing(&clock, Duration::from_secs(60), "the payload goes", || async { (payloads().await == 1).then_some(()) }).await;
        assert_eq!(world.notification(&id).await, before);
        assert_eq!(world.deliveries(&id).await, deliveries);
        let list = world.server.get("/v1/notifications").await.ok();
        assert_eq!(list["items"].as_array().unwrap().len(), 2);

        clock.advance(23 * DAY);
        passing(&clock, Duration::from_secs(60), "the notification goes", || async {
            (world.server.get(&format!("/v1/notifications/{id}")).await.status == 404).then_some(())
        })
        .await;
        assert_eq!(world.server.get(&format!("/v1/notifications/{id}/deliveries")).await.status, 404);
        let list = world.server.get("/v1/notifications").await.ok();
        let ids: Vec<&Value> = list["items"].as_array().unwrap().iter().map(|item| &item["id"]).collect();
        assert_eq!(ids, [scheduled.as_str()]);

        let text = passing(&clock, Duration::from_secs(1), "the round is over", || async {
            let text = metrics.get("/metrics").await.text;
            sample(&text, "sonnette_retention_behind_seconds").is_some_and(|behind| behind < 7200.0).then_some(text)
        })
        .await;
        assert!(sample(&text, "sonnette_retention_deleted_total{table=\"payloads\"}") >= Some(1.0), "{text}");
        assert!(sample(&text, "sonnette_retention_deleted_total{table=\"notifications\"}") >= Some(1.0), "{text}");
        assert!(sample(&text, "sonnette_table_bytes{table=\"devices\"}") > Some(0.0), "{text}");
        assert!(sample(&text, "sonnette_table_rows{table=\"devices\"}").is_some(), "{text}");
        assert!(sample(&text, "sonnette_database_bytes") > Some(0.0), "{text}");
    }

    async fn a_round_that_fails_is_told_and_made_again(database) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_seconds(1_795_000_000)));
        let beside = Beside::of(&database).await;
        let world = World::with(database, Arc::clone(&clock) as _, "").await;
        let check = || async { world.check("retention:behind", "").await.unwrap() };
        assert_eq!(check().await["status"], "pass");
        beside.run("ALTER TABLE notification_remains RENAME TO elsewhere").await;
        let step = Duration::from_secs(300);
        let told = passing(&clock, step, "it is told", || async { Some(check().await).filter(|c| c["status"] == "warn") }).await;
        assert!(told["advice"].as_str().unwrap().contains("look at the log"), "{told}");
        beside.run("ALTER TABLE elsewhere RENAME TO notification_remains").await;
        passing(&clock, Duration::from_secs(60), "it is made again", || async { (check().await["status"] == "pass").then_some(()) }).await;
    }

    async fn a_backlog_is_worked_off_while_notifications_are_accepted_and_sent(database) {
        const OLD: i64 = 2_000;
        put_old(&database, usize::try_from(OLD).unwrap()).await;
        let beside = Beside::of(&database).await;
        let world = World::start(database).await;
        world.device(&format!("{:064x}", 1), Some("anna")).await;
        until("the backlog is gone", || async {
            world.done(&world.send(json!({ "user_ids": ["anna"] })).await).await;
            (beside.number("SELECT COUNT(*) FROM delivery_notes").await == 0).then_some(())
        })
        .await;
        let sent = world.sim.ledger().counters().accepted;
        assert!(sent > 10, "sent beside it: {sent}");
        let kept = beside.number("SELECT COUNT(*) FROM notifications WHERE payload IS NOT NULL").await;
        assert_eq!(u64::try_from(kept).unwrap(), sent, "what is new stays");
    }

    async fn a_service_killed_while_it_deletes_leaves_nothing_behind(database) {
        const OLD: usize = 5_000;
        let folder = Folder::new("house");
        let keys = keys_folder(&folder, "");
        put_old(&database, OLD).await;
        let sim = SimulatorProcess::start(folder.path(), &keys, &[]).await;
        let mut service = Service::start(folder.path(), database.url(), &sim).await;
        let mut left = i64::try_from(OLD).unwrap();
        for _ in 0..2 {
            let goal = left - 400;
            left = until("some of it is deleted", || async { Some(old_left(&database).await).filter(|n| *n < goal) }).await;
            service.process().kill();
            assert!(left > 0, "killed in the middle");
            assert_eq!(orphans(&database).await, 0, "{left} are left");
            service.restart().await;
        }
        until("all is deleted", || async { (old_left(&database).await == 0).then_some(()) }).await;
        for table in ["chunks", "notification_users", "delivery_notes", "notification_remains"] {
            assert_eq!(number(&database, &format!("SELECT COUNT(*) FROM {table}")).await, 0, "{table}");
        }
    }
}
