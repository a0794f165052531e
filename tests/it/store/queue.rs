//! The durable queue.

use std::{collections::BTreeSet, time::Duration};

use sonnette::{
    domain::{
        delivery::{DeliveryStatus, DeviceEffect, State, Target},
        device::Generation,
        notification::{Audience, Lane, NotificationId, NotificationStatus},
        outcome::{Fault, Reason, own},
        push::PushType,
        topic::Environment,
    },
    store::{Accepted, Disposition, Lease, ReplicaId, Settled, StoreError, Submission},
};

use sqlx::{Connection, MySqlConnection};

use super::world::{NOW, Raw, World, apple, devices, ended, key, new, topic, users};
use crate::support::{
    database::{Store, mysql_database, on_both_stores},
    running::running,
    waiting::within,
};

/// Accepts them for whoever is free, and claims them: each has a row of its own. In their order.
async fn claimed(world: &World, group: impl IntoIterator<Item = Submission>) -> Vec<Lease> {
    let group: Vec<_> = group.into_iter().map(|one| Submission { own: false, ..one }).collect();
    for answer in world.store.accept(&group, world.replica, NOW).await.unwrap() {
        new(answer);
    }
    let claimed = world.store.claim(&Lane::ALL, group.len(), &[], &[], world.replica, NOW).await.unwrap().leases;
    let place = |lease: &Lease| group.iter().position(|one| one.notification.id == lease.key.notification);
    let mut leases: Vec<_> = claimed.into_iter().map(|lease| (place(&lease).unwrap(), lease)).collect();
    leases.sort_by_key(|(place, _)| *place);
    leases.into_iter().map(|(_, lease)| lease).collect()
}

fn accepted_state() -> State {
    ended(DeliveryStatus::Accepted, None, NOW)
}

on_both_stores! {
    async fn a_user_means_the_active_devices_for_this_push_type_with_the_generation_of_now(database) {
        let world = World::on(database).await;
        let one = world.phone("a1", Some("livreur-42")).await;
        let two = world.phone("a2", Some("livreur-42")).await;
        world.phone_with("a3", Some("livreur-42"), "fr.ocpizza.livreur", "voip", "active").await;
        world.phone_with("a4", Some("livreur-42"), "fr.ocpizza.client", "alert", "active").await;
        world.phone_with("a5", Some("livreur-42"), "fr.ocpizza.livreur", "alert", "inactive").await;
        let mut submission = world.submission(users(&["livreur-42", "nobody", "livreur-42", "Livreur-42"]));
        submission.notification.push_type = PushType::Background;
        let (view, leases) = world.accept(submission).await;
        assert_eq!((view.counts.targeted, view.counts.pending, view.unmatched), (2, 2, 2), "bytes, not letters");
        assert_eq!(view.status, NotificationStatus::Queued);
        let [lease] = leases.as_slice() else { panic!("{leases:?}") };
        let fenced = |phone: &super::world::Phone| Target::Device { seq: phone.seq, generation: Some(Generation(3)) };
        assert_eq!(lease.chunk.targets, [fenced(&one), fenced(&two)]);
        assert_eq!(lease.addresses.len(), 2);
        assert_eq!(lease.addresses[0].token, one.token);
        assert_eq!(world.store.owned(world.replica).await.unwrap(), [lease.key]);
        assert_eq!(world.number("SELECT COUNT(*) FROM notification_users").await, 3);
        world.counts_add_up(view.id).await;
    }

    async fn a_named_device_that_cannot_be_sent_to_ends_at_once_with_the_word_for_why(database) {
        let world = World::on(database).await;
        let app = "fr.ocpizza.livreur";
        let good = world.phone("b1", Some("u")).await;
        let wrong = world.phone_with("b2", Some("u"), app, "voip", "active").await;
        let inactive = world.phone_with("b3", Some("u"), app, "alert", "inactive").await;
        let suspended = world.phone_with("b4", Some("u"), app, "alert", "suspended").await;
        let theirs = world.phone("b5", Some("v")).await;
        let nobodys = world.phone("b6", None).await;
        let elsewhere = world.phone_with("b7", Some("u"), "fr.ocpizza.client", "alert", "active").await;
        let Audience::Devices { mut ids, .. } =
            devices(&[&good, &wrong, &inactive, &suspended, &theirs, &nobodys, &elsewhere, &good]) else { panic!() };
        ids.push(sonnette::domain::device::DeviceId::new(NOW));
        let fence = Audience::Devices { ids: ids.clone(), user_id: Some("u".parse().unwrap()) };
        let (view, leases) = world.accept(world.submission(fence)).await;
        assert_eq!((view.counts.targeted, view.unmatched), (6, 2));
        assert_eq!(leases[0].addresses.len(), 1, "only what is open is to be sent");
        assert_eq!(leases[0].chunk.targets[0], Target::Device { seq: good.seq, generation: Some(Generation(3)) });
        let told: Vec<_> = world.deliveries(view.id).await.into_iter()
            .map(|d| (d.state.status, d.state.cause.map(|c| c.reason.into_owned()))).collect();
        let named = |status, word: &str| (status, Some(word.to_owned()));
        assert_eq!(told, [
            (DeliveryStatus::Pending, None),
            named(DeliveryStatus::Failed, "WrongPushType"),
            named(DeliveryStatus::Unregistered, "DeviceInactive"),
            named(DeliveryStatus::Failed, "DeviceSuspended"),
            named(DeliveryStatus::Suppressed, "OwnerChanged"),
            named(DeliveryStatus::Suppressed, "LoggedOut"),
        ]);
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes").await, 5);
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications WHERE user_id = X'75'").await, 1, "the fence's user");
        world.counts_add_up(view.id).await;

        let (view, leases) = world.accept(world.submission(Audience::Devices { ids, user_id: None })).await;
        assert_eq!(view.counts.pending, 3, "without a fence nobody's phone is withheld");
        assert_eq!(leases[0].chunk.targets[0], Target::Device { seq: good.seq, generation: None });
        let (view, leases) = world.accept(world.submission(devices(&[&inactive]))).await;
        assert_eq!((view.status, leases.len()), (NotificationStatus::Done, 0));
        assert_eq!(world.view(view.id).await.status, NotificationStatus::Done);
    }

    async fn a_raw_token_that_is_registered_is_that_device(database) {
        let world = World::on(database).await;
        let known = world.phone("c1c1", Some("u")).await;
        let stranger: sonnette::domain::device::DeviceToken = "c2c2".parse().unwrap();
        let tokens = Audience::Tokens(vec![stranger.clone(), known.token.clone(), stranger.clone()]);
        let (view, leases) = world.accept(world.submission(tokens)).await;
        assert_eq!(leases[0].chunk.targets, [
            Target::Token { index: 0, token: stranger },
            Target::Device { seq: known.seq, generation: None },
        ]);
        let told = world.deliveries(view.id).await;
        assert_eq!((told[0].index, told[0].device_id, told[0].token_hint.as_deref()), (Some(0), None, Some("c2c2")));
        assert_eq!((told[1].index, told[1].device_id), (None, Some(known.id)));
        world.counts_add_up(view.id).await;
    }

    async fn nobody_is_done_at_once(database) {
        let world = World::on(database).await;
        let (view, leases) = world.accept(world.submission(users(&["nobody"]))).await;
        assert_eq!((view.status, view.counts.targeted, view.unmatched), (NotificationStatus::Done, 0, 1));
        assert!(leases.is_empty());
        let read = world.view(view.id).await;
        assert_eq!((read.status, read.done_at, read.unmatched), (NotificationStatus::Done, Some(NOW), 1));
        assert!(world.deliveries(view.id).await.is_empty());
    }

    async fn a_list_of_up_to_two_thousand_is_resolved_where_it_is_accepted(database) {
        let world = World::on(database).await;
        let tokens = (0..2_000_u32).map(|n| format!("{n:08x}").parse().unwrap()).collect();
        let (view, leases) = world.accept(world.submission(Audience::Tokens(tokens))).await;
        assert_eq!(leases.iter().map(|l| l.chunk.targets.len()).collect::<Vec<_>>(), [256, 256, 256, 256, 256, 256, 256, 208]);
        assert_eq!(view.counts.targeted, 2_000);
        assert_eq!(world.view(view.id).await.counts.targeted, 2_000);
    }

    async fn the_same_key_is_answered_the_same_again_and_another_body_is_a_conflict(database) {
        let world = World::on(database).await;
        world.phone("d1", Some("u")).await;
        let with = |idempotency| {
            let mut submission = world.submission(users(&["u"]));
            submission.idempotency = idempotency;
            submission
        };
        let group = [with(Some(key(9, 1))), with(Some(key(1, 1))), with(Some(key(9, 1))), with(Some(key(9, 2))), with(None)];
        let mut answers = world.store.accept(&group, world.replica, NOW).await.unwrap().into_iter();
        let (first, leases) = new(answers.next().unwrap());
        assert_eq!(leases.len(), 1);
        new(answers.next().unwrap());
        let Accepted::Seen(seen) = answers.next().unwrap().unwrap() else { panic!("the same group, the same key") };
        assert_eq!(seen.id, first.id);
        assert!(matches!(answers.next().unwrap().unwrap(), Accepted::Conflict));
        new(answers.next().unwrap());
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications").await, 3);

        let mut done = leases[0].chunk.clone();
        done.states[0] = accepted_state();
        world.settle(&leases[0], &done, Disposition::Keep).await;
        world.clock.advance(Duration::from_secs(5));
        let again = world.store.accept(&[with(Some(key(9, 1)))], world.replica, world.now()).await.unwrap().pop().unwrap();
        let Accepted::Seen(seen) = again.unwrap() else { panic!() };
        assert_eq!((seen.id, seen.status, seen.counts), (first.id, first.status, first.counts), "as it was answered");
        assert_eq!(seen.created_at, NOW);
    }

    async fn of_two_replicas_with_the_same_key_at_once_one_wins(database) {
        let world = World::on(database).await;
        world.phone("d2", Some("u")).await;
        let other = world.beside().await;
        for round in 0..8 {
            // In opposite order, so that unsorted claims would deadlock.
            let keys = [1, 2, 3, 4].map(|n| round * 4 + n);
            let group = |keys: &mut dyn Iterator<Item = u8>| keys.map(|n| {
                let mut submission = world.submission(users(&["u"]));
                submission.idempotency = Some(key(n, 1));
                submission
            }).collect::<Vec<_>>();
            let (forward, backward) = (group(&mut keys.into_iter()), group(&mut keys.into_iter().rev()));
            let (here, there) = tokio::join!(
                world.store.accept(&forward, world.replica, NOW),
                other.accept(&backward, world.replica, NOW),
            );
            let mut answers = here.unwrap();
            let mut others = there.unwrap();
            others.reverse();
            for (one, two) in answers.drain(..).zip(others) {
                let winner = |answer: Result<Accepted, StoreError>| match answer.unwrap() {
                    Accepted::New { view, .. } => (true, view.id),
                    Accepted::Seen(view) => (false, view.id),
                    Accepted::Conflict => panic!("the bodies are the same"),
                };
                let ((one_new, one_id), (two_new, two_id)) = (winner(one), winner(two));
                assert!(one_new != two_new, "one of them is new");
                assert_eq!(one_id, two_id, "and both are told of the same");
            }
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications").await, 32);
        assert_eq!(world.chunks().await, 32);
    }

    async fn a_bad_row_never_fails_its_group(database) {
        let world = World::on(database).await;
        world.phone("d3", Some("u")).await;
        let (there, _) = world.accept(world.submission(users(&["u"]))).await;
        let mut bad = world.submission(users(&["u"]));
        bad.notification.id = there.id;
        let group = [world.submission(users(&["u"])), bad, world.submission(users(&["u"]))];
        let mut answers = world.store.accept(&group, world.replica, NOW).await.unwrap();
        assert_eq!(answers.len(), 3);
        assert!(matches!(answers.remove(1), Err(StoreError::Statement(_))));
        for answer in answers {
            let (view, leases) = new(answer);
            assert_eq!(leases.len(), 1);
            assert_eq!(world.view(view.id).await.counts.targeted, 1);
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM notifications").await, 3);
    }

    async fn what_is_committed_is_known_and_an_open_commit_is_waited_for(database) {
        let world = World::on(database).await;
        let (there, _) = world.accept(world.submission(users(&["nobody"]))).await;
        let absent = NotificationId::new(NOW);
        let known = world.store.committed(&[there.id, absent]).await.unwrap();
        assert_eq!(known, BTreeSet::from([there.id]));

        let mut other = Raw::open(world.database.url()).await;
        other.run(if world.database.store() == Store::Sqlite { "BEGIN IMMEDIATE" } else { "START TRANSACTION" }).await;
        other.run(&format!(
            "INSERT INTO notifications (id, topic, owner, lane, push_type, priority, expires_at, derives_collapse_id, \
             on_unknown, audience_complete, unmatched, due_at, created_at) VALUES \
             (X'{}', 'a', 'o', 0, 'alert', 10, 0, 0, 'retry', 1, 0, 0, 0)", absent.as_uuid().simple())).await;
        let asked = world.store.committed(std::slice::from_ref(&absent));
        tokio::pin!(asked);
        tokio::select! {
            answer = &mut asked => panic!("answered before the commit: {answer:?}"),
            () = tokio::time::sleep(Duration::from_millis(300)) => {}
        }
        other.run("COMMIT").await;
        assert_eq!(asked.await.unwrap(), BTreeSet::from([absent]));
    }

    async fn work_of_a_replica_that_was_buried_is_nobodys(database) {
        let world = World::on(database).await;
        world.phone("d4", Some("u")).await;
        let (_, leases) = world.accept(world.submission(users(&["u"]))).await;
        let beat = world.store.replicas().await.unwrap()[0].beat;
        assert!(world.store.bury(world.replica, beat).await.unwrap());
        let mut done = leases[0].chunk.clone();
        done.states[0] = accepted_state();
        let settled = Settled { key: leases[0].key, epoch: leases[0].epoch, seat: leases[0].seat, chunk: &done,
            disposition: Disposition::Keep, effects: &[], unique_ids: &[] };
        assert_eq!(world.store.settle(&[settled], world.replica, NOW).await.unwrap(), [leases[0].key]);
        let (late, leases) = world.accept(world.submission(users(&["u"]))).await;
        assert!(leases.is_empty(), "nothing is taken in the name of the dead");
        assert!(world.store.claim(&Lane::ALL, 10, &[], &[], world.replica, NOW).await.unwrap().leases.is_empty());
        let heir = world.store.join("two", "0.1.0", NOW).await.unwrap();
        let taken = world.store.claim(&Lane::ALL, 10, &[], &[], heir, NOW).await.unwrap().leases;
        assert_eq!(taken.len(), 2);
        assert!(taken.iter().any(|lease| lease.key.notification == late.id));
    }

    async fn what_was_parked_and_taken_by_one_who_died_goes_on_once_the_breaker_closes(database) {
        let world = World::on(database).await;
        world.phone("d5", Some("u")).await;
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let breaker = world.store.open_breaker(&topic(), Environment::Production, "abc", &fault, NOW, NOW).await.unwrap();
        let until = NOW.plus(Duration::from_secs(3_600));
        for _ in 0..3 {
            let (_, leases) = world.accept(world.submission(users(&["u"]))).await;
            world.settle(&leases[0], &leases[0].chunk, Disposition::Park { breaker, until }).await;
        }
        // One was taken before its replica died, the others by a replica that does not know yet that it is dead.
        assert!(world.store.claim_probe(breaker, world.replica, NOW).await.unwrap().is_some());
        assert!(world.store.bury(world.replica, 0).await.unwrap());
        assert!(world.store.claim_probe(breaker, world.replica, NOW).await.unwrap().is_none());
        let taken = world.store.claim(&Lane::ALL, 10, &[breaker], &[breaker], world.replica, NOW).await.unwrap();
        assert!(taken.leases.is_empty() && !taken.more, "nothing is taken in the name of the dead");

        world.store.close_breaker(breaker, NOW).await.unwrap();
        let heir = world.store.join("two", "0.1.0", NOW).await.unwrap();
        assert_eq!(world.store.claim(&Lane::ALL, 10, &[], &[], heir, NOW).await.unwrap().leases.len(), 3);
    }

    async fn two_claimers_never_get_the_same_chunk(database) {
        let world = World::on(database).await;
        world.phone("e1", Some("u")).await;
        let group: Vec<_> = (0..60).map(|_| {
            let mut submission = world.submission(users(&["u"]));
            submission.own = false;
            submission
        }).collect();
        for answer in world.store.accept(&group, world.replica, NOW).await.unwrap() {
            assert!(new(answer).1.is_empty(), "not ours");
        }
        let other = world.beside().await;
        let second = other.join("two", "0.1.0", NOW).await.unwrap();
        let mut taken = BTreeSet::new();
        let mut count = 0;
        while count < 60 {
            let (here, there) = tokio::join!(
                world.store.claim(&Lane::ALL, 7, &[], &[], world.replica, NOW), other.claim(&Lane::ALL, 7, &[], &[], second, NOW));
            for lease in here.unwrap().leases.into_iter().chain(there.unwrap().leases) {
                assert_eq!((lease.epoch, lease.addresses.len()), (1, 1));
                assert!(taken.insert(lease.key), "taken twice");
                count += 1;
            }
        }
        assert!(world.store.claim(&Lane::ALL, 7, &[], &[], world.replica, NOW).await.unwrap().leases.is_empty());
        let mine = world.store.owned(world.replica).await.unwrap();
        let theirs = world.store.owned(second).await.unwrap();
        assert_eq!(mine.len() + theirs.len(), 60);
        world.store.disown(&mine, second).await.unwrap();
        assert_eq!(world.store.owned(world.replica).await.unwrap().len(), mine.len(), "only one's own is given back");
        world.store.disown(&mine, world.replica).await.unwrap();
        assert!(world.store.owned(world.replica).await.unwrap().is_empty());
        assert_eq!(world.store.claim(&Lane::ALL, 100, &[], &[], second, NOW).await.unwrap().leases[0].epoch, 2);
    }

    async fn urgent_comes_first_then_the_oldest_and_nothing_before_its_time(database) {
        let world = World::on(database).await;
        world.phone("e2", Some("u")).await;
        let mut ids = Vec::new();
        for (lane, due) in [(Lane::Bulk, 0), (Lane::Transactional, 20), (Lane::Transactional, 10), (Lane::Transactional, 90)] {
            let mut submission = world.submission(users(&["u"]));
            submission.notification.lane = lane;
            submission.notification.due_at = NOW.plus(Duration::from_secs(due));
            submission.own = false;
            ids.push(world.accept(submission).await.0.id);
        }
        assert_eq!(world.store.next_due_at().await.unwrap(), Some(NOW));
        let depth = world.store.depth(NOW.plus(Duration::from_secs(15))).await.unwrap();
        assert_eq!(depth.len(), 2);
        assert_eq!((depth[0].lane, depth[0].due, depth[0].scheduled), (Lane::Transactional, 1, 2));
        assert_eq!(depth[0].oldest_due_at, Some(NOW.plus(Duration::from_secs(10))));
        world.clock.advance(Duration::from_secs(30));
        let mut order = Vec::new();
        loop {
            let leases = world.store.claim(&Lane::ALL, 1, &[], &[], world.replica, world.now()).await.unwrap().leases;
            let Some(lease) = leases.first() else { break };
            order.push(lease.key.notification);
        }
        assert_eq!(order, [ids[2], ids[1], ids[0]]);
        assert_eq!(world.store.next_due_at().await.unwrap(), Some(NOW.plus(Duration::from_secs(90))));
    }

    async fn a_scheduled_audience_is_who_it_is_when_it_is_due(database) {
        let world = World::on(database).await;
        let early = world.phone("f1", Some("u")).await;
        let due = NOW.plus(Duration::from_secs(60));
        let mut submission = world.submission(users(&["u", "late", "nobody"]));
        submission.notification.due_at = due;
        let (view, leases) = world.accept(submission).await;
        assert_eq!((view.status, view.audience_complete, leases.len()), (NotificationStatus::Scheduled, false, 0));
        let read = world.view(view.id).await;
        assert_eq!((read.status, read.counts.targeted), (NotificationStatus::Scheduled, 0));
        assert!(world.deliveries(view.id).await.is_empty());
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap().leases.is_empty());
        world.run(&format!("UPDATE devices SET generation = 4 WHERE seq = {}", early.seq.0)).await;
        let late = world.phone("f2", Some("late")).await;
        world.clock.advance(Duration::from_secs(60));
        let leases = world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, due).await.unwrap().leases;
        assert_eq!(leases[0].chunk.targets, [
            Target::Device { seq: early.seq, generation: Some(Generation(4)) },
            Target::Device { seq: late.seq, generation: Some(Generation(3)) },
        ]);
        assert_eq!(leases[0].addresses.len(), 2);
        let read = world.view(view.id).await;
        assert!(read.audience_complete);
        assert_eq!((read.status, read.counts.targeted, read.unmatched), (NotificationStatus::Queued, 2, 1));

        let mut nobody = world.submission(users(&["nobody"]));
        nobody.notification.due_at = world.now().plus(Duration::from_secs(1));
        let (view, _) = world.accept(nobody).await;
        world.clock.advance(Duration::from_secs(1));
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, world.now()).await.unwrap().leases.is_empty());
        let read = world.view(view.id).await;
        assert_eq!((read.status, read.unmatched, read.done_at), (NotificationStatus::Done, 1, Some(world.now())));

        let tokens = (0..2_500_u32).map(|n| format!("{n:08x}").parse().unwrap()).collect();
        let mut many = world.submission(Audience::Tokens(tokens));
        many.notification.due_at = world.now().plus(Duration::from_secs(1));
        let (view, _) = world.accept(many).await;
        world.clock.advance(Duration::from_secs(1));
        // As much as there is room for; SQLite's one writer has less at once.
        let piece: &[usize] = match world.database.store() {
            Store::Sqlite => &[256, 256, 256, 232],
            Store::Mysql => &[256, 256, 256, 256, 256, 256, 256, 208],
        };
        let (mut number, mut left) = (0, 2_500);
        while left > 0 {
            let part = world.store.claim(&Lane::ALL, 2, &[], &[], world.replica, world.now()).await.unwrap().leases;
            let expected: &[usize] = if left > 500 { piece } else { &[256, 244] };
            assert_eq!(part.iter().map(|l| l.chunk.targets.len()).collect::<Vec<_>>(), expected);
            assert!(part.iter().map(|l| l.key.number).eq((number..).take(part.len())));
            number += u32::try_from(part.len()).unwrap();
            left -= expected.iter().sum::<usize>();
        }
        assert_eq!(world.view(view.id).await.counts.targeted, 2_500);
    }

    async fn a_settle_of_an_old_epoch_changes_nothing_at_all(database) {
        let world = World::on(database).await;
        let phone = world.phone("aa", Some("u")).await;
        let ours = world.phone("ab", Some("v")).await;
        let (view, leases) = world.accept(world.submission(users(&["u"]))).await;
        let (kept, ours_leases) = world.accept(world.submission(users(&["v"]))).await;
        world.store.disown(&[leases[0].key], world.replica).await.unwrap();
        let again = world.store.claim(&Lane::ALL, 1, &[], &[], world.replica, NOW).await.unwrap().leases;
        assert_eq!(again[0].epoch, leases[0].epoch + 1);
        let dump = "SELECT CONCAT(COALESCE(HEX(states), ''), '/', holder, '/', epoch) FROM chunks WHERE notification_id = ";
        let sql = if world.database.store() == Store::Sqlite { dump.replace("CONCAT(COALESCE(HEX(states), ''), '/', holder, '/', epoch)",
            "COALESCE(HEX(states), '') || '/' || holder || '/' || epoch") } else { dump.to_owned() };
        let sql = format!("{sql} X'{}'", view.id.as_uuid().simple());
        let before = world.text(&sql).await;

        let mut done = leases[0].chunk.clone();
        done.states[0] = ended(DeliveryStatus::Unregistered, Some(apple(410, "Unregistered")), NOW);
        let dead = |phone: &super::world::Phone| [(phone.seq, phone.token.clone(),
            DeviceEffect::Dead { reason: "Unregistered".into(), since: NOW })];
        let (old, fresh) = (dead(&phone), dead(&ours));
        let settled = |lease: &sonnette::store::Lease, effects| Settled { key: lease.key, epoch: lease.epoch, seat: lease.seat,
            chunk: &done, disposition: Disposition::Keep, effects, unique_ids: &[] };
        let mut theirs = done.clone();
        theirs.targets.clone_from(&ours_leases[0].chunk.targets);
        let mine = Settled { chunk: &theirs, ..settled(&ours_leases[0], &fresh) };
        let lost = world.store.settle(&[settled(&leases[0], &old), mine], world.replica, NOW).await.unwrap();
        assert_eq!(lost, [leases[0].key]);
        assert_eq!(world.text(&sql).await, before);
        assert_eq!(world.device(&phone, "status").await.as_deref(), Some("active"), "nothing of it is applied");
        assert_eq!(world.device(&ours, "status").await.as_deref(), Some("inactive"), "the others' is");
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes").await, 1);
        assert_eq!(world.view(kept.id).await.counts.unregistered, 1);
        // Another replica's name does not help.
        let other = world.store.settle(&[settled(&again[0], &old)], ReplicaId(world.replica.0 + 1), NOW).await.unwrap();
        assert_eq!(other, [leases[0].key]);
        assert_eq!(world.text(&sql).await, before);
        world.counts_add_up(view.id).await;
    }

    async fn counts_add_up_at_every_step_and_every_outcome_is_read_back(database) {
        let world = World::on(database).await;
        let mut phones = Vec::new();
        for n in 0..8 {
            phones.push(world.phone(&format!("70{n:02x}"), Some("u")).await);
        }
        let (view, leases) = world.accept(world.submission(users(&["u"]))).await;
        let lease = &leases[0];
        let mut chunk = lease.chunk.clone();
        let long = format!("{}é", "x".repeat(127));
        let outcomes = [
            (DeliveryStatus::Accepted, None),
            (DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken"))),
            (DeliveryStatus::Unregistered, Some(apple(410, "Unregistered"))),
            (DeliveryStatus::Expired, Some(own::EXPIRED)),
            (DeliveryStatus::Cancelled, Some(own::DROPPED)),
            (DeliveryStatus::Suppressed, Some(own::SUPERSEDED)),
            (DeliveryStatus::Unknown, Some(own::NO_ANSWER)),
            (DeliveryStatus::Failed, Some(apple(499, &long))),
        ];
        for (at, (status, cause)) in outcomes.iter().enumerate() {
            chunk.states[at] = ended(*status, cause.clone(), NOW);
            let unique = [(u32::try_from(at).unwrap(), format!("unique-{at}").into())];
            let settled = Settled { key: lease.key, epoch: lease.epoch, seat: lease.seat, chunk: &chunk, disposition: Disposition::Keep,
                effects: &[], unique_ids: &unique };
            assert_eq!(world.store.settle(&[settled], world.replica, NOW).await.unwrap(), []);
            world.counts_add_up(view.id).await;
            let read = world.view(view.id).await;
            let status = if at == 7 { NotificationStatus::Done } else { NotificationStatus::Sending };
            assert_eq!((read.status, read.done_at.is_some()), (status, at == 7));
        }
        let told = world.beside().await.deliveries(view.id, None, &sonnette::store::PageRequest { cursor: None, limit: 9 })
            .await.unwrap().unwrap().items;
        for (at, (status, cause)) in outcomes.iter().enumerate() {
            let expected = if at == 7 { Some(apple(499, &"x".repeat(127))) } else { cause.clone() };
            assert_eq!((told[at].state.status, &told[at].state.cause), (*status, &expected), "also in another process");
            assert_eq!(told[at].device_id, Some(phones[at].id));
            assert_eq!(told[at].apns_unique_id.as_deref(), Some(format!("unique-{at}").as_str()));
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes WHERE status <> 'accepted'").await, 7);
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes WHERE reason = 'BadDeviceToken' AND apns_status = 400").await, 1);
        assert!(world.store.owned(world.replica).await.unwrap().is_empty(), "it has ended");
    }

    async fn hundreds_are_settled_at_once_each_with_its_own(database) {
        let world = World::on(database).await;
        let at = |n: usize| NOW.plus(Duration::from_millis(n as u64));
        let mut names = Vec::new();
        for n in 0..30 {
            names.push(format!("user-{n}"));
            world.phone(&format!("71{n:02x}"), Some(&names[n])).await;
        }
        let group: Vec<_> = names.iter().map(|name| world.submission(users(&[name]))).collect();
        let leases = claimed(&world, group).await;
        let chunks: Vec<_> = leases.iter().enumerate().map(|(n, lease)| {
            let mut chunk = lease.chunk.clone();
            chunk.states[0] = match n % 3 {
                0 => ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), at(n)),
                _ => ended(DeliveryStatus::Accepted, None, at(n)),
            };
            chunk
        }).collect();
        let effects: Vec<_> = leases.iter().map(|lease| {
            let address = &lease.addresses[0];
            [(address.seq, address.token.clone(), DeviceEffect::Accepted(Environment::Production, None))]
        }).collect();
        let done: Vec<_> = leases.iter().zip(&chunks).enumerate().map(|(n, (lease, chunk))| Settled { key: lease.key,
            epoch: lease.epoch, seat: lease.seat, chunk, disposition: Disposition::Keep,
            effects: if n % 3 == 0 { &[] } else { &effects[n] }, unique_ids: &[] }).collect();
        assert_eq!(world.store.settle(&done, world.replica, NOW).await.unwrap(), []);
        for (n, lease) in leases.iter().enumerate() {
            let counts = world.view(lease.key.notification).await.counts;
            assert_eq!((counts.failed, counts.accepted), if n % 3 == 0 { (1, 0) } else { (0, 1) });
            assert_eq!(world.deliveries(lease.key.notification).await[0].state.at, Some(at(n)), "each with its own time");
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM devices WHERE environment = 'production'").await, 20);
    }

    async fn what_came_back_in_a_new_epoch_is_not_ended_by_what_is_settled_of_the_old_one(database) {
        let world = World::on(database).await;
        world.phone("73", Some("u")).await;
        let group = [world.submission(users(&["u"])), world.submission(users(&["u"]))];
        let leases = claimed(&world, group).await;
        world.store.disown(&[leases[1].key], world.replica).await.unwrap();
        // This replica has it again: only the epoch tells.
        assert_eq!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap().leases.len(), 1);
        let done = leases[0].chunk.targets.iter().map(|_| accepted_state()).collect::<Vec<_>>();
        let chunks: Vec<_> = leases.iter().map(|lease| sonnette::domain::delivery::Chunk { states: done.clone(),
            ..lease.chunk.clone() }).collect();
        let settled: Vec<_> = leases.iter().zip(&chunks).map(|(lease, chunk)| Settled { key: lease.key,
            epoch: lease.epoch, seat: lease.seat, chunk, disposition: Disposition::Keep, effects: &[], unique_ids: &[] }).collect();
        assert_eq!(world.store.settle(&settled, world.replica, NOW).await.unwrap(), [leases[1].key]);
        assert_eq!(world.view(leases[0].key.notification).await.counts.accepted, 1);
        assert_eq!(world.view(leases[1].key.notification).await.counts.pending, 1);
    }

    async fn of_many_that_were_accepted_only_those_are_ended_whose_lease_still_holds(database) {
        let world = World::on(database).await;
        let mut names = Vec::new();
        let mut phones = Vec::new();
        for n in 0..7 {
            names.push(format!("user-{n}"));
            phones.push(world.phone(&format!("72{n:02x}"), Some(&names[n])).await);
        }
        let group: Vec<_> = names.iter().map(|name| world.submission(users(&[name]))).collect();
        let leases = claimed(&world, group).await;
        let id = |n: usize| leases[n].key.notification;
        // One was taken over, one has been deleted.
        world.store.disown(&[leases[1].key], world.replica).await.unwrap();
        assert_eq!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap().leases.len(), 1);
        world.run(&format!("DELETE FROM chunks WHERE notification_id = X'{}'", id(4).as_uuid().simple())).await;

        let at = |n: usize| NOW.plus(Duration::from_millis(n as u64));
        let chunks: Vec<_> = leases.iter().enumerate().map(|(n, lease)| {
            let mut chunk = lease.chunk.clone();
            chunk.states[0] = ended(DeliveryStatus::Accepted, None, at(n));
            chunk
        }).collect();
        let effects: Vec<_> = leases.iter().map(|lease| {
            let address = &lease.addresses[0];
            [(address.seq, address.token.clone(), DeviceEffect::Accepted(Environment::Sandbox, None))]
        }).collect();
        let done: Vec<_> = leases.iter().zip(&chunks).zip(&effects).map(|((lease, chunk), effects)| Settled {
            key: lease.key, epoch: lease.epoch, seat: lease.seat, chunk, disposition: Disposition::Keep, effects, unique_ids: &[] }).collect();
        let mut lost = world.store.settle(&done, world.replica, NOW).await.unwrap();
        lost.sort_unstable();
        let mut expected = vec![leases[1].key, leases[4].key];
        expected.sort_unstable();
        assert_eq!(lost, expected);
        for n in [0, 2, 3, 5, 6] {
            let read = world.view(id(n)).await;
            assert_eq!((read.status, read.counts.accepted), (NotificationStatus::Done, 1));
            assert_eq!(world.deliveries(id(n)).await[0].state.at, Some(at(n)), "each with its own time");
            assert_eq!(world.device(&phones[n], "environment").await.as_deref(), Some("sandbox"));
        }
        assert_eq!(world.view(id(1)).await.counts.pending, 1, "whoever has it now ends it");
        assert_eq!(world.device(&phones[1], "environment").await, None, "nor was anything learned");
        assert_eq!(world.number("SELECT COUNT(*) FROM chunks").await, 6, "what is gone stays gone");
        let again = world.store.settle(&done[..1], world.replica, NOW).await.unwrap();
        assert_eq!(again, [leases[0].key], "what has ended has no lease");
    }

    async fn a_parked_chunk_waits_for_its_breaker_and_says_so(database) {
        let world = World::on(database).await;
        world.phone("75", Some("u")).await;
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let breaker = world.store.open_breaker(&topic(), Environment::Production, "abc", &fault, NOW, NOW).await.unwrap();
        let until = NOW.plus(Duration::from_secs(3_600));
        let (view, leases) = world.accept(world.submission(users(&["u"]))).await;
        let mut chunk = leases[0].chunk.clone();
        chunk.states[0].attempts = 1;
        chunk.states[0].cause = Some(apple(403, "InvalidProviderToken"));
        world.settle(&leases[0], &chunk, Disposition::Park { breaker, until }).await;
        let waiting = world.view(view.id).await.waiting_for.unwrap();
        assert_eq!((waiting.reason.as_str(), waiting.since), ("breaker: InvalidProviderToken", NOW));
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap().leases.is_empty());
        assert_eq!(world.store.depth(NOW).await.unwrap()[0].waiting, 1);
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[breaker], world.replica, NOW).await.unwrap().leases.is_empty());
        let overdue = world.store.claim(&Lane::ALL, 9, &[breaker], &[breaker], world.replica, until).await.unwrap().leases;
        assert_eq!(overdue.len(), 1, "what has expired is claimed to be counted, and once only");
        world.settle(&overdue[0], &chunk, Disposition::Park { breaker, until }).await;
        let passed = world.store.claim(&Lane::ALL, 9, &[breaker], &[], world.replica, NOW).await.unwrap().leases;
        assert_eq!(passed[0].chunk, chunk);
        world.settle(&passed[0], &chunk, Disposition::Park { breaker, until }).await;
        let probe = world.store.claim_probe(breaker, world.replica, NOW).await.unwrap().unwrap();
        assert_eq!((probe.chunk.states[0].attempts, probe.addresses.len()), (1, 1));
        assert!(world.store.claim_probe(breaker, world.replica, NOW).await.unwrap().is_none());
        world.store.close_breaker(breaker, NOW).await.unwrap();
        world.settle(&probe, &chunk, Disposition::Park { breaker, until }).await;
        let free = world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap().leases;
        assert_eq!(free.len(), 1, "a breaker that was closed meanwhile parks nothing");
    }

    async fn a_probe_takes_what_was_not_tried_and_then_whosever_turn_it_is(database) {
        let world = World::on(database).await;
        world.phone("77", Some("u")).await;
        let fault = Fault { status: 400, reason: Reason::BadDeviceToken };
        let breaker = world.store.open_breaker(&topic(), Environment::Production, "abc", &fault, NOW, NOW).await.unwrap();
        let park = async |lane, tried: bool, until: u64| {
            let mut submission = world.submission(users(&["u"]));
            submission.notification.lane = lane;
            let (view, leases) = world.accept(submission).await;
            let mut chunk = leases[0].chunk.clone();
            if tried {
                chunk.states[0].attempts = 1;
                chunk.states[0].cause = Some(apple(400, "BadDeviceToken"));
            }
            let until = NOW.plus(Duration::from_secs(until));
            world.settle(&leases[0], &chunk, Disposition::Park { breaker, until }).await;
            view.id
        };
        let over = park(Lane::Transactional, false, 0).await;
        let refused = park(Lane::Transactional, true, 100).await;
        world.clock.advance(Duration::from_secs(1));
        let refused_later = park(Lane::Transactional, true, 50).await;
        let bulk = park(Lane::Bulk, false, 30).await;
        let urgent = park(Lane::Transactional, false, 900).await;
        let mut taken = Vec::new();
        for _ in 0..6 {
            world.clock.advance(Duration::from_secs(1));
            let Some(lease) = world.store.claim_probe(breaker, world.replica, world.now()).await.unwrap() else { break };
            taken.push(lease.key.notification);
            let mut chunk = lease.chunk.clone();
            chunk.states[0].attempts += 1;
            let until = world.now().plus(Duration::from_secs(900));
            world.settle(&lease, &chunk, Disposition::Park { breaker, until }).await;
        }
        assert!(!taken.contains(&over), "its time is over: it is claimed to be counted");
        assert_eq!(taken, [urgent, bulk, refused, refused_later, urgent, bulk]);
    }

    async fn held_work_stays_until_it_is_released(database) {
        let world = World::on(database).await;
        world.phone("76", Some("u")).await;
        let (view, leases) = world.accept(world.submission(users(&["u"]))).await;
        let mut later = world.submission(users(&["u"]));
        later.notification.due_at = NOW.plus(Duration::from_secs(60));
        world.accept(later).await;
        assert_eq!(world.store.hold(NOW).await.unwrap(), 2);
        assert_eq!(world.store.hold(NOW).await.unwrap(), 0);
        let waiting = world.view(view.id).await.waiting_for.unwrap();
        assert_eq!((waiting.reason.as_str(), waiting.since), ("held", NOW));
        let settled = Settled { key: leases[0].key, epoch: leases[0].epoch, seat: leases[0].seat, chunk: &leases[0].chunk,
            disposition: Disposition::Keep, effects: &[], unique_ids: &[] };
        assert_eq!(world.store.settle(&[settled], world.replica, NOW).await.unwrap(), [leases[0].key]);
        let later = NOW.plus(Duration::from_secs(90));
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, later).await.unwrap().leases.is_empty());
        assert_eq!(world.store.release_held().await.unwrap(), 2);
        assert_eq!(world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, later).await.unwrap().leases.len(), 2);
    }

    async fn a_token_dies_only_if_it_did_not_register_since_with_a_margin_for_clocks(database) {
        let world = World::on(database).await;
        let since = NOW.minus(Duration::from_secs(600));
        let mut verdicts = Vec::new();
        // Seconds by which the registration came before APNs' timestamp.
        for (n, before) in [600_i64, 61, 59, -30].into_iter().enumerate() {
            let phone = world.phone(&format!("80{n:02x}"), Some(&format!("u{n}"))).await;
            let at = since.as_millis() - before * 1000;
            world.run(&format!("UPDATE devices SET last_registered_at = {at} WHERE seq = {}", phone.seq.0)).await;
            let (_, leases) = world.accept(world.submission(users(&[&format!("u{n}")]))).await;
            let mut done = leases[0].chunk.clone();
            done.states[0] = ended(DeliveryStatus::Unregistered, Some(apple(410, "ExpiredToken")), NOW);
            let effect = [(phone.seq, phone.token.clone(), DeviceEffect::Dead { reason: "ExpiredToken".into(), since })];
            world.settle_with(&leases[0], &done, Disposition::Keep, &effect).await;
            verdicts.push((world.device(&phone, "status").await.unwrap(), world.device(&phone, "status_reason").await));
        }
        let dead = ("inactive".to_owned(), Some("ExpiredToken".to_owned()));
        let alive = ("active".to_owned(), None);
        assert_eq!(verdicts, [dead.clone(), dead, alive.clone(), alive]);
    }

    async fn what_was_said_of_an_old_token_does_not_touch_the_new_one(database) {
        let world = World::on(database).await;
        let tried = "8a8a".parse().unwrap();
        let since = NOW;
        for (n, effect) in [
            DeviceEffect::Accepted(Environment::Sandbox, None), DeviceEffect::Bad { sent_at: NOW }, DeviceEffect::Suspend { sent_at: NOW },
            DeviceEffect::Dead { reason: "Unregistered".into(), since },
        ].into_iter().enumerate() {
            let phone = world.phone(&format!("81{n:02x}"), Some(&format!("u{n}"))).await;
            let (_, leases) = world.accept(world.submission(users(&[&format!("u{n}")]))).await;
            let mut done = leases[0].chunk.clone();
            done.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken")), NOW);
            let old = [(phone.seq, sonnette::domain::device::DeviceToken::clone(&tried), effect.clone())];
            world.settle_with(&leases[0], &leases[0].chunk, Disposition::Keep, &old).await;
            assert_eq!(world.device(&phone, "status").await.as_deref(), Some("active"));
            assert_eq!(world.device(&phone, "last_accepted_at").await.as_deref(), Some("0"));
            let same = [(phone.seq, phone.token.clone(), effect)];
            world.settle_with(&leases[0], &done, Disposition::Keep, &same).await;
            let expected = ["active", "inactive", "suspended", "inactive"][n];
            assert_eq!(world.device(&phone, "status").await.as_deref(), Some(expected));
        }
    }

    async fn a_bad_token_is_kept_if_it_was_accepted_or_has_registered_since_the_push_was_written(database) {
        let world = World::on(database).await;
        let written = NOW.minus(Duration::from_secs(2));
        let bad = || DeviceEffect::Bad { sent_at: written };
        let suspend = || DeviceEffect::Suspend { sent_at: written };
        let (accepted, registered) = ("last_accepted_at", "last_registered_at");
        let at = written.as_millis();
        for (n, (column, value, effect, expected)) in [
            (accepted, 1, bad(), "active"), (registered, at + 1, bad(), "active"), (registered, at, bad(), "inactive"),
            (accepted, 1, suspend(), "suspended"), (registered, at + 1, suspend(), "active"), (registered, at, suspend(), "suspended"),
        ].into_iter().enumerate() {
            let phone = world.phone(&format!("82{n:02x}"), Some(&format!("u{n}"))).await;
            let (_, leases) = world.accept(world.submission(users(&[&format!("u{n}")]))).await;
            world.run(&format!("UPDATE devices SET {column} = {value} WHERE seq = {}", phone.seq.0)).await;
            let mut done = leases[0].chunk.clone();
            // Concluded later than it was written: the answer was judged first.
            done.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken")), NOW);
            let what = format!("{column}, {effect:?}");
            world.settle_with(&leases[0], &done, Disposition::Keep, &[(phone.seq, phone.token.clone(), effect)]).await;
            assert_eq!(world.device(&phone, "status").await.as_deref(), Some(expected), "{what}");
        }
    }

    async fn an_acceptance_teaches_the_environment_and_is_written_once_a_day(database) {
        let world = World::on(database).await;
        let phone = world.phone("83", Some("u")).await;
        let mut seen = Vec::new();
        for (hours, environment) in [
            (0, Environment::Production), (1, Environment::Production), (2, Environment::Sandbox), (30, Environment::Sandbox),
        ] {
            world.clock.set_wall(NOW.plus(Duration::from_secs(hours * 3600)));
            let (_, leases) = world.accept(world.submission(users(&["u"]))).await;
            let mut done = leases[0].chunk.clone();
            done.states[0] = accepted_state();
            let effect = [(phone.seq, phone.token.clone(), DeviceEffect::Accepted(environment, None))];
            world.settle_with(&leases[0], &done, Disposition::Keep, &effect).await;
            let at: i64 = world.device(&phone, "last_accepted_at").await.unwrap().parse().unwrap();
            seen.push(((at - NOW.as_millis()) / 3_600_000, world.device(&phone, "environment").await.unwrap()));
        }
        assert_eq!(seen, [(0, "production".into()), (0, "production".into()), (2, "sandbox".into()), (30, "sandbox".into())]);
    }

    async fn an_acceptance_of_many_that_lie_together_teaches_of_those_that_were_tried_and_of_nobody_between(database) {
        let world = World::on(database).await;
        let token = |n: usize| format!("84{n:04x}");
        let mut tried = Vec::new();
        let mut expected = Vec::new();
        for n in 0..120 {
            let phone = world.phone(&token(n), Some("u")).await;
            // First most of them, then one here and there.
            let is_tried = if n < 60 { n % 5 != 0 } else { n % 20 == 0 };
            if n == 30 {
                world.phone_with(&token(11), None, "fr.example.other", "alert", "active").await;
            }
            if is_tried {
                // One has got another token since.
                let was = if n == 7 || n == 100 { "8a8a".parse().unwrap() } else { phone.token.clone() };
                if was == phone.token {
                    expected.push(phone.seq.0);
                }
                tried.push((phone.seq, was, DeviceEffect::Accepted(Environment::Sandbox, None)));
            }
        }
        let (_, leases) = world.accept(world.submission(users(&["u"]))).await;
        world.settle_with(&leases[0], &leases[0].chunk, Disposition::Keep, &tried).await;
        let taught = "SELECT seq FROM devices WHERE last_accepted_at > 0 AND environment = 'sandbox' AND seq > ";
        let mut seen = vec![0];
        while let Some(next) = world.text(&format!("SELECT CAST(MIN(seq) AS CHAR) FROM ({taught}{}) taught", seen.last().unwrap())).await {
            seen.push(next.parse().unwrap());
        }
        assert_eq!(seen[1..], expected);
        assert_eq!(world.number("SELECT COUNT(*) FROM devices WHERE last_accepted_at <> 0").await, i64::try_from(expected.len()).unwrap());
    }

    async fn only_something_newer_that_goes_to_the_same_device_supersedes(database) {
        let world = World::on(database).await;
        let phone = world.phone("90", Some("u")).await;
        let other = world.phone("91", Some("v")).await;
        let collapse: sonnette::domain::push::CollapseId = "order-1042".parse().unwrap();
        let make = |user: &str, due: u64| {
            world.clock.advance(Duration::from_millis(5));
            let mut submission = world.submission(users(&[user]));
            submission.notification.collapse_id = Some(collapse.clone());
            submission.notification.due_at = world.now().plus(Duration::from_secs(due));
            submission
        };
        let of = topic();
        let newer = |than| world.store.superseded(phone.seq, &of, &collapse, than);
        let (old, _) = world.accept(make("u", 0)).await;
        assert!(!newer(old.id).await.unwrap(), "itself");
        world.accept(make("v", 0)).await;
        assert!(!newer(old.id).await.unwrap(), "for {other:?}");
        world.accept(make("u", 60)).await;
        assert!(!newer(old.id).await.unwrap(), "its time has not come");
        let (failed, leases) = world.accept(make("u", 0)).await;
        assert!(newer(old.id).await.unwrap(), "going");
        let mut done = leases[0].chunk.clone();
        done.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), NOW);
        world.settle(&leases[0], &done, Disposition::Keep).await;
        assert!(!newer(old.id).await.unwrap(), "it never went");
        let (gone, leases) = world.accept(make("u", 0)).await;
        let mut done = leases[0].chunk.clone();
        done.states[0] = accepted_state();
        world.settle(&leases[0], &done, Disposition::Keep).await;
        assert!(newer(old.id).await.unwrap() && newer(failed.id).await.unwrap());
        assert!(!newer(gone.id).await.unwrap());
        world.accept(make("u", 0)).await;
        assert!(newer(gone.id).await.unwrap());
        world.store.hold(world.now()).await.unwrap();
        assert!(!newer(gone.id).await.unwrap(), "what is held is not going");
        let others: sonnette::domain::push::CollapseId = "order-7".parse().unwrap();
        assert!(!world.store.superseded(phone.seq, &topic(), &others, old.id).await.unwrap());
    }

    async fn a_damaged_chunk_is_an_error_and_does_not_stop_the_rest(database) {
        let world = World::on(database).await;
        world.phone("95", Some("u")).await;
        let mut ids = Vec::new();
        for damage in ["targets = X'01FF'", "targets = X'0903'", "states = X'01'", "states = X'01000000000000000001095800'"] {
            let mut submission = world.submission(users(&["u"]));
            submission.own = false;
            let (view, _) = world.accept(submission).await;
            world.run(&format!("UPDATE chunks SET {damage} WHERE notification_id = X'{}'", view.id.as_uuid().simple())).await;
            let page = sonnette::store::PageRequest { cursor: None, limit: 10 };
            let error = world.store.deliveries(view.id, None, &page).await.unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { table: "chunks", .. }), "{damage}: {error}");
            ids.push(view.id);
        }
        let mut good = world.submission(users(&["u"]));
        good.own = false;
        let (good, _) = world.accept(good).await;
        let leases = world.store.claim(&Lane::ALL, 99, &[], &[], world.replica, NOW).await.unwrap().leases;
        assert_eq!(leases.iter().map(|lease| lease.key.notification).collect::<Vec<_>>(), [good.id]);
        for id in ids {
            assert_eq!(world.view(id).await.waiting_for.unwrap().reason, "held");
        }
        assert_eq!(world.store.owned(world.replica).await.unwrap().len(), 1);
    }
}

/// Each has what the other wants: the claim its chunks, the burial the replica's row.
#[tokio::test]
async fn a_burial_in_the_middle_of_a_claim_leaves_nothing_in_the_name_of_the_dead() {
    let world = World::on(mysql_database().await).await;
    world.phone("d6", Some("u")).await;
    let mut submission = world.submission(Audience::Everyone);
    submission.own = false;
    world.accept(submission).await;
    let mut held = Raw::open(world.database.url()).await;
    held.run("START TRANSACTION").await;
    held.run("SELECT id FROM notifications FOR UPDATE").await;
    let observer = world.beside().await;
    let claimed = world.store.claim(&Lane::ALL, 10, &[], &[], world.replica, NOW);
    let mut connection = MySqlConnection::connect(world.database.url()).await.unwrap();
    let mut waits = async |name: &str| {
        let waits = async {
            while !running(&mut connection).await.iter().any(|one| one.text.starts_with(name)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(name, waits).await;
    };
    let buried = async {
        waits("-- queue.resolved").await;
        let meet = async {
            waits("-- replicas.give_back").await;
            held.run("ROLLBACK").await;
        };
        tokio::join!(observer.bury(world.replica, 0), meet).0
    };
    let (claimed, buried) = tokio::join!(claimed, buried);
    assert!(buried.unwrap());
    assert!(claimed.unwrap().leases.len() <= 1);
    assert!(world.store.owned(world.replica).await.unwrap().is_empty());
    let heir = world.store.join("two", "0.1.0", NOW).await.unwrap();
    let taken = world.store.claim(&Lane::ALL, 10, &[], &[], heir, NOW).await.unwrap().leases;
    assert_eq!(taken.iter().map(|lease| lease.chunk.targets.len()).sum::<usize>(), 1);
}
