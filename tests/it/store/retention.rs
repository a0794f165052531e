//! Retention: exactly what is due goes, in steps of a bounded size, and whatever is left is whole.

use std::{collections::BTreeSet, time::Duration};

use sonnette::{
    cli::make_api_key,
    domain::{
        api_key::Scope,
        clock::Timestamp,
        delivery::DeliveryStatus,
        device::{DeviceSeq, Field},
        notification::{NotificationId, NotificationView},
        topic::Environment,
    },
    store::{
        Disposition, Lease, NotificationFilter, PageRequest, Submission,
        retention::{Place, Subject},
    },
};

use super::world::{NOW, World, apple, devices, ended, key, users};
use crate::support::database::on_both_stores;

const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

/// The most rows that one step may delete, all tables together.
const BOUND: u64 = 520;

/// Rows deleted by a whole walk, by table. Each step is checked against the bound.
async fn walk(world: &World, subject: Subject, until: Timestamp) -> Vec<(String, u64)> {
    let mut deleted: std::collections::BTreeMap<String, u64> = std::collections::BTreeMap::new();
    let mut place = Place::default();
    loop {
        let swept = world.store.sweep(subject, &place, until, world.replica).await.unwrap().expect("we keep house");
        let step: u64 = swept.deleted.iter().map(|(_, rows)| rows).sum();
        assert!(step <= BOUND, "{subject:?}: {step} rows in one step");
        for (table, rows) in swept.deleted {
            *deleted.entry(table.to_owned()).or_default() += rows;
        }
        match swept.next {
            Some(next) => place = next,
            None => return deleted.into_iter().filter(|(_, rows)| *rows > 0).collect(),
        }
    }
}

fn counted(deleted: &[(String, u64)], table: &str) -> u64 {
    deleted.iter().filter(|(t, _)| t == table).map(|(_, rows)| rows).sum()
}

/// Accepts one for `user`, and ends it with this outcome at the world's time.
async fn accepted_and_ended(world: &World, submission: Submission, status: DeliveryStatus) -> NotificationId {
    let (view, leases) = world.accept(submission).await;
    for lease in &leases {
        end(world, lease, status).await;
    }
    view.id
}

async fn end(world: &World, lease: &Lease, status: DeliveryStatus) {
    let mut chunk = lease.chunk.clone();
    for state in &mut chunk.states {
        *state = ended(status, (status == DeliveryStatus::Failed).then(|| apple(400, "BadTopic")), world.now());
    }
    world.settle(lease, &chunk, Disposition::Keep).await;
}

async fn listed(world: &World) -> BTreeSet<NotificationId> {
    let page = PageRequest { cursor: None, limit: 1_000 };
    let page = world.store.notifications(&NotificationFilter::default(), &page).await.unwrap();
    page.items.into_iter().map(|view| view.id).collect()
}

/// Rows that belong to a notification that is not there, and is not being cleared away either.
async fn orphans(world: &World) -> i64 {
    let mut sum = 0;
    for table in ["chunks", "notification_users", "delivery_notes"] {
        sum += world
            .number(&format!(
                "SELECT COUNT(*) FROM {table} WHERE notification_id NOT IN (SELECT id FROM notifications) \
                 AND notification_id NOT IN (SELECT notification_id FROM notification_remains)"
            ))
            .await;
    }
    sum
}

async fn rows(world: &World, table: &str) -> i64 {
    world.number(&format!("SELECT COUNT(*) FROM {table}")).await
}

fn summary(view: &NotificationView) -> String {
    format!("{view:?}")
}

on_both_stores! {
    async fn a_notification_goes_when_its_last_outcome_is_old_enough_and_not_a_millisecond_before(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        let old = accepted_and_ended(&world, world.submission(users(&["anna", "bert"])), DeliveryStatus::Failed).await;
        let empty = accepted_and_ended(&world, world.submission(users(&["nobody"])), DeliveryStatus::Accepted).await;
        // Made just as early, and ended an hour later.
        let (late, leases) = world.accept(world.submission(users(&["anna"]))).await;
        let at = world.now();
        world.clock.advance(HOUR);
        end(&world, &leases[0], DeliveryStatus::Accepted).await;

        assert_eq!(walk(&world, Subject::Notifications, at.minus(MILLISECOND)).await, []);
        assert_eq!(listed(&world).await, BTreeSet::from([old, empty, late.id]));

        let first_page = PageRequest { cursor: None, limit: 1 };
        let first_page = world.store.notifications(&NotificationFilter::default(), &first_page).await.unwrap();
        let deleted = walk(&world, Subject::Notifications, at).await;
        assert_eq!((counted(&deleted, "notifications"), counted(&deleted, "chunks")), (2, 1), "{deleted:?}");
        assert_eq!((counted(&deleted, "notification_users"), counted(&deleted, "delivery_notes")), (2, 1), "{deleted:?}");
        assert_eq!(listed(&world).await, BTreeSet::from([late.id]));
        for gone in [old, empty] {
            assert!(world.store.notification(gone).await.unwrap().is_none());
            assert!(world.store.deliveries(gone, None, &PageRequest { cursor: None, limit: 1 }).await.unwrap().is_none());
        }
        // A list that was begun before goes on behind what is gone.
        let rest = PageRequest { cursor: first_page.next_cursor, limit: 10 };
        let rest = world.store.notifications(&NotificationFilter::default(), &rest).await.unwrap();
        let seen: Vec<_> = first_page.items.iter().chain(&rest.items).map(|view| view.id).filter(|id| *id == late.id).collect();
        assert_eq!((seen, rest.next_cursor), (vec![late.id], None));

        assert_eq!(walk(&world, Subject::Notifications, world.now().minus(MILLISECOND)).await, []);
        assert_eq!(counted(&walk(&world, Subject::Notifications, world.now()).await, "notifications"), 1);
        assert_eq!((rows(&world, "chunks").await, rows(&world, "notification_users").await, orphans(&world).await), (0, 0, 0));
    }

    async fn what_is_open_stays_whatever_its_age(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        let mut open = BTreeSet::new();
        let submission = |number: u8| {
            let mut submission = world.submission(users(&["anna"]));
            submission.idempotency = Some(key(number, number));
            submission
        };
        // Being sent; nobody's; scheduled; held; parked.
        open.insert(world.accept(submission(1)).await.0.id);
        open.insert(world.accept(Submission { own: false, ..submission(2) }).await.0.id);
        let mut scheduled = submission(3);
        scheduled.notification.due_at = NOW.plus(400 * 24 * HOUR);
        open.insert(world.accept(scheduled).await.0.id);
        let (held, _) = world.accept(Submission { own: false, ..submission(4) }).await;
        let of = |id: NotificationId| format!("X'{}'", id.as_uuid().simple());
        world.run(&format!("UPDATE chunks SET holder = -1, waiting_since = 5 WHERE notification_id = {}", of(held.id))).await;
        open.insert(held.id);
        let (parked, leases) = world.accept(submission(5)).await;
        let fault = sonnette::domain::outcome::Fault { status: 403, reason: "InvalidProviderToken".into() };
        let breaker = world.store.open_breaker(&super::world::topic(), Environment::Production, "f", &fault, NOW, NOW).await.unwrap();
        world.settle(&leases[0], &leases[0].chunk, Disposition::Park { breaker, until: NOW.plus(HOUR) }).await;
        open.insert(parked.id);
        // One of two chunks has ended long ago.
        let (half, _) = world.accept(submission(6)).await;
        world.run(&format!(
            "INSERT INTO chunks (notification_id, number, lane, holder, epoch, due_at, targeted, accepted, failed, unregistered, \
             expired, cancelled, suppressed, unanswered, ended_at) VALUES ({}, 1, 0, NULL, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5)",
            of(half.id)
        )).await;
        open.insert(half.id);
        // All chunks so far have ended, and there are more to come.
        let filling = accepted_and_ended(&world, submission(7), DeliveryStatus::Accepted).await;
        world.run(&format!("UPDATE notifications SET audience_complete = 0 WHERE id = {}", of(filling))).await;
        open.insert(filling);

        let for_ever = NOW.plus(10_000 * 24 * HOUR);
        for subject in [Subject::Notifications, Subject::Payloads, Subject::IdempotencyKeys, Subject::Remains, Subject::Tombstones] {
            assert_eq!(walk(&world, subject, for_ever).await, [], "{subject:?}");
        }
        assert_eq!(listed(&world).await, open);
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications WHERE payload IS NOT NULL").await, 7);
        assert_eq!(rows(&world, "idempotency_keys").await, 7);
    }

    async fn a_payload_goes_first_and_everything_else_reads_as_before(database) {
        let world = World::on(database).await;
        let phone = world.phone("a1", Some("anna")).await;
        let id = accepted_and_ended(&world, world.submission(devices(&[&phone])), DeliveryStatus::Failed).await;
        let at = world.now();
        world.clock.advance(HOUR);
        let later = accepted_and_ended(&world, world.submission(devices(&[&phone])), DeliveryStatus::Accepted).await;
        let before = (summary(&world.view(id).await), format!("{:?}", world.deliveries(id).await));

        assert_eq!(walk(&world, Subject::Payloads, at.minus(MILLISECOND)).await, []);
        assert_eq!(walk(&world, Subject::Payloads, at).await, [("payloads".to_owned(), 1)]);
        assert_eq!(walk(&world, Subject::Payloads, at).await, [], "once");
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications WHERE payload IS NULL").await, 1);
        assert_eq!((summary(&world.view(id).await), format!("{:?}", world.deliveries(id).await)), before);
        assert_eq!(listed(&world).await, BTreeSet::from([id, later]));
        world.counts_add_up(id).await;
        assert_eq!(counted(&walk(&world, Subject::Notifications, at).await, "notifications"), 1);
    }

    async fn a_backlog_goes_in_steps_of_a_bounded_size(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        for _ in 0..6 {
            let one = || Submission { own: false, ..world.submission(users(&["anna", "nobody"])) };
            let group: Vec<_> = (0..200).map(|_| one()).collect();
            world.store.accept(&group, world.replica, world.now()).await.unwrap();
        }
        world.run("UPDATE chunks SET accepted = 1, holder = NULL, ended_at = 5").await;
        let at = world.now();
        world.clock.advance(HOUR);
        let stays = accepted_and_ended(&world, world.submission(users(&["anna"])), DeliveryStatus::Accepted).await;
        assert_eq!(counted(&walk(&world, Subject::Payloads, at).await, "payloads"), 1_200);
        let deleted = walk(&world, Subject::Notifications, at).await;
        assert_eq!((counted(&deleted, "notifications"), counted(&deleted, "chunks")), (1_200, 1_200));
        assert_eq!(counted(&deleted, "notification_users"), 2_400);
        assert_eq!((listed(&world).await, orphans(&world).await), (BTreeSet::from([stays]), 0));
    }

    async fn a_large_notification_goes_piece_by_piece_and_nobody_sees_a_part_of_it(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        let names: Vec<String> = (0..1_300).map(|number| format!("user-{number}")).chain(["anna".to_owned()]).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let id = accepted_and_ended(&world, world.submission(users(&names)), DeliveryStatus::Failed).await;
        let of = format!("X'{}'", id.as_uuid().simple());
        for number in 1..700 {
            world.run(&format!(
                "INSERT INTO chunks (notification_id, number, lane, holder, epoch, due_at, targeted, accepted, failed, unregistered, \
                 expired, cancelled, suppressed, unanswered, ended_at) VALUES ({of}, {number}, 0, NULL, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5)"
            )).await;
        }
        let small = accepted_and_ended(&world, world.submission(users(&["anna", "bert"])), DeliveryStatus::Accepted).await;
        let at = world.now();

        assert_eq!(walk(&world, Subject::Notifications, at).await.iter().map(|(_, rows)| rows).sum::<u64>(), 1 + 3);
        for gone in [id, small] {
            assert!(world.store.notification(gone).await.unwrap().is_none());
            assert!(world.store.deliveries(gone, None, &PageRequest { cursor: None, limit: 1 }).await.unwrap().is_none());
        }
        assert_eq!(listed(&world).await, BTreeSet::new());
        assert_eq!(orphans(&world).await, 0, "what is left is known to be left");
        // One step, and then everybody is killed: the next keeper goes on.
        let step = world.store.sweep(Subject::Remains, &Place::default(), at, world.replica).await.unwrap().unwrap();
        assert_eq!(step.deleted.iter().map(|(_, rows)| rows).sum::<u64>(), 1, "the note");
        let left = walk(&world, Subject::Remains, at).await;
        assert_eq!((counted(&left, "notification_users"), counted(&left, "chunks")), (1_301, 700));
        for table in ["notifications", "chunks", "notification_users", "delivery_notes", "notification_remains"] {
            assert_eq!(rows(&world, table).await, 0, "{table}");
        }
    }

    async fn an_idempotency_key_is_kept_until_its_notification_has_been_over_for_long_enough(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        let submission = |number: u8| Submission { idempotency: Some(key(number, number)), ..world.submission(users(&["anna"])) };
        let at = world.now();
        accepted_and_ended(&world, submission(1), DeliveryStatus::Accepted).await;
        let (_, leases) = world.accept(submission(2)).await;
        world.clock.advance(HOUR);
        end(&world, &leases[0], DeliveryStatus::Accepted).await;
        // Its notification has gone; the key has its own time.
        accepted_and_ended(&world, submission(3), DeliveryStatus::Accepted).await;
        let late = world.now();
        world.run("DELETE FROM notifications WHERE id IN (SELECT notification_id FROM idempotency_keys WHERE request_key = X'0303030303030303030303030303030303030303030303030303030303030303')").await;

        assert_eq!(walk(&world, Subject::IdempotencyKeys, at.minus(MILLISECOND)).await, []);
        assert_eq!(counted(&walk(&world, Subject::IdempotencyKeys, at).await, "idempotency_keys"), 1, "the first");
        assert!(world.store.seen(&key(1, 1)).await.unwrap().is_none());
        assert!(world.store.seen(&key(2, 2)).await.unwrap().is_some(), "came as early, and ended later");
        assert_eq!(walk(&world, Subject::IdempotencyKeys, late.minus(MILLISECOND)).await, []);
        assert_eq!(counted(&walk(&world, Subject::IdempotencyKeys, late).await, "idempotency_keys"), 2);
    }

    async fn a_device_goes_after_it_was_inactive_for_long_enough_and_did_not_come_back(database) {
        let world = World::on(database).await;
        let active = world.phone("a0", Some("anna")).await;
        let dead = world.phone("a1", Some("anna")).await;
        let suspended = world.phone("a2", Some("anna")).await;
        let back = world.phone("a3", None).await;
        let again = world.phone("a4", None).await;
        let all = [&active, &dead, &suspended, &back, &again];
        let id = accepted_and_ended(&world, world.submission(devices(&all)), DeliveryStatus::Accepted).await;
        let set = async |phone: &super::world::Phone, status: &str| {
            world.run(&format!("UPDATE devices SET status = '{status}' WHERE seq = {}", phone.seq.0)).await;
        };
        for phone in [&dead, &back, &again] {
            set(phone, "inactive").await;
        }
        set(&suspended, "suspended").await;
        world.run(&format!("INSERT INTO device_tags (device_seq, tag) VALUES ({}, X'61'), ({}, X'61')", dead.seq.0, active.seq.0)).await;

        let noted = world.now();
        walk(&world, Subject::NewlyInactive, noted).await;
        world.clock.advance(HOUR);
        // Two come back; one of them goes again.
        for phone in [&back, &again] {
            let mut registration = super::devices::registration(phone.token.as_hex());
            registration.topic = super::world::topic();
            registration.user_id = Field::Absent;
            world.store.register(&[registration], world.now()).await.unwrap();
            assert_eq!(world.device(phone, "status").await.as_deref(), Some("active"));
        }
        set(&again, "inactive").await;
        let noted_again = world.now();
        walk(&world, Subject::NewlyInactive, noted_again).await;

        assert_eq!(walk(&world, Subject::InactiveDevices, noted.minus(MILLISECOND)).await, []);
        let deleted = walk(&world, Subject::InactiveDevices, noted).await;
        assert_eq!(deleted, [("device_tags".to_owned(), 1), ("devices".to_owned(), 2)]);
        let there = world.store.addresses(&all.map(|phone| phone.seq)).await.unwrap();
        let there: BTreeSet<DeviceSeq> = there.into_iter().map(|address| address.seq).collect();
        assert_eq!(there, BTreeSet::from([active.seq, back.seq, again.seq]));
        assert_eq!(walk(&world, Subject::InactiveDevices, noted_again.minus(MILLISECOND)).await, [], "its time began anew");
        assert_eq!(counted(&walk(&world, Subject::InactiveDevices, noted_again).await, "devices"), 1);
        assert_eq!(rows(&world, "inactive_devices").await, 0);
        assert_eq!(rows(&world, "device_tags").await, 1);

        // Outcomes still name them, for as long as there are any.
        let names: Vec<_> = world.deliveries(id).await.into_iter().map(|d| (d.device_id.unwrap(), d.token_hint.unwrap())).collect();
        let expected: Vec<_> = all.iter().map(|phone| (phone.id, phone.token.hint().to_owned())).collect();
        assert_eq!(names, expected);
        world.clock.advance(100 * 24 * HOUR);
        assert_eq!(walk(&world, Subject::Tombstones, world.now()).await, [], "a notification may name them");
        walk(&world, Subject::Notifications, world.now()).await;
        let forgotten_at = world.number("SELECT MAX(forgotten_at) FROM device_tombstones").await;
        let forgotten_at = Timestamp::from_millis(forgotten_at);
        assert_eq!(walk(&world, Subject::Tombstones, forgotten_at.minus(MILLISECOND)).await, []);
        assert_eq!(counted(&walk(&world, Subject::Tombstones, forgotten_at).await, "device_tombstones"), 3);
    }

    async fn api_keys_go_after_their_end_and_living_ones_stay(database) {
        let world = World::on(database).await;
        let mut ids = Vec::new();
        for expires_at in [None, None, Some(NOW.plus(HOUR)), Some(NOW.plus(2 * HOUR))] {
            let (_, key) = make_api_key("shop", [Scope::Send], None, expires_at, NOW);
            world.store.add_api_key(&key).await.unwrap();
            ids.push(key.id);
        }
        world.store.revoke_api_key(&ids[1], NOW.plus(HOUR)).await.unwrap();
        assert_eq!(walk(&world, Subject::ApiKeys, NOW.plus(HOUR).minus(MILLISECOND)).await, []);
        assert_eq!(counted(&walk(&world, Subject::ApiKeys, NOW.plus(HOUR)).await, "api_keys"), 2);
        let left: BTreeSet<_> = world.store.api_keys().await.unwrap().into_iter().map(|key| key.id.to_string()).collect();
        assert_eq!(left, BTreeSet::from([ids[0].to_string(), ids[3].to_string()]));
    }

    async fn of_several_replicas_one_keeps_house_and_a_dead_one_is_replaced(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("anna")).await;
        accepted_and_ended(&world, world.submission(users(&["anna"])), DeliveryStatus::Accepted).await;
        let other = world.beside().await;
        let second = other.join("two", "0.1.0", NOW).await.unwrap();
        let sweep = async |replica| other.sweep(Subject::Notifications, &Place::default(), world.now(), replica).await.unwrap();
        assert!(sweep(second).await.is_none(), "another keeps house");
        assert_eq!(listed(&world).await.len(), 1, "and nothing was deleted");
        assert!(other.bury(world.replica, 0).await.unwrap());
        assert_eq!(sweep(second).await.unwrap().deleted[0], ("notifications", 1));
        assert!(sweep(world.replica).await.is_none(), "who was buried keeps house no more");
    }

    async fn when_the_house_was_last_kept_is_known_to_all(database) {
        let world = World::on(database).await;
        assert_eq!(world.store.house_kept_at().await.unwrap(), None);
        for at in [NOW, NOW.plus(HOUR)] {
            world.store.record_house_kept(at).await.unwrap();
            assert_eq!(world.beside().await.house_kept_at().await.unwrap(), Some(at));
        }
    }

    async fn tables_are_measured(database) {
        let world = World::on(database).await;
        for number in 0..300 {
            world.phone(&format!("{number:064x}"), None).await;
        }
        let measured = || async {
            let sizes = world.store.sizes().await.unwrap();
            let devices = sizes.tables.iter().find(|size| size.table == "devices").cloned().unwrap();
            (sizes, devices)
        };
        if world.database.store() == crate::support::database::Store::Mysql {
            world.run("ANALYZE TABLE devices").await;
        }
        super::eventually("the estimate follows", async || (250..=350).contains(&measured().await.1.rows)).await;
        let (sizes, devices) = measured().await;
        assert!(sizes.tables.len() >= 16, "{sizes:?}");
        assert!(devices.bytes >= 16_384, "{devices:?}");
        assert!(sizes.bytes >= sizes.tables.iter().map(|size| size.bytes).sum::<u64>(), "{sizes:?}");
    }
}
