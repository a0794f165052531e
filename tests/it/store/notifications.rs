//! What was asked for, read back.

use std::{collections::BTreeSet, time::Duration};

use sonnette::{
    domain::{
        delivery::DeliveryStatus,
        notification::{Audience, Lane, NotificationId, NotificationStatus},
        push::{ApnsId, Recipient},
    },
    store::{Disposition, NotificationFilter, PageRequest, StoreError, Submission},
};

use super::world::{NOW, World, apple, devices, ended, topic, users};
use crate::support::database::on_both_stores;

fn page(limit: usize) -> PageRequest {
    PageRequest { cursor: None, limit }
}

on_both_stores! {
    async fn a_user_finds_what_was_for_them_alone_and_what_was_for_several_newest_first_page_by_page(database) {
        let world = World::on(database).await;
        world.phone("a0", Some("anna")).await;
        let mut expected = Vec::new();
        for names in [&["anna"][..], &["anna", "bert"], &["bert"], &["anna", "anna"], &["bert", "carl"]] {
            world.clock.advance(Duration::from_secs(1));
            let (view, _) = world.accept(world.submission(users(names))).await;
            if names.contains(&"anna") {
                expected.insert(0, view.id);
            }
        }
        let mut cursor = None;
        let mut listed = Vec::new();
        loop {
            let filter = NotificationFilter { user_id: Some("anna".parse().unwrap()), ..NotificationFilter::default() };
            let one = world.store.notifications(&filter, &PageRequest { cursor, limit: 1 }).await.unwrap();
            listed.extend(one.items.iter().map(|view| view.id));
            let Some(next) = one.next_cursor else { break };
            cursor = Some(next);
        }
        assert_eq!(listed, expected);
    }

    async fn a_list_is_newest_first_and_each_filter_finds_its_own(database) {
        let world = World::on(database).await;
        world.phone("a0", Some("u")).await;
        world.phone_with("a1", Some("u"), "fr.ocpizza.client", "alert", "active").await;
        let mut ids = Vec::new();
        for n in 0..5_u64 {
            world.clock.advance(Duration::from_secs(10));
            let mut submission = world.submission(users(&[if n == 3 { "nobody" } else { "u" }]));
            submission.notification.reference = Some(format!("{n}").parse().unwrap());
            if n == 4 {
                submission.notification.due_at = world.now().plus(Duration::from_secs(100));
            }
            if n == 2 {
                submission.notification.topic = "fr.ocpizza.client".parse().unwrap();
            }
            let (view, leases) = world.accept(submission).await;
            ids.push(view.id);
            let mut chunk = leases.first().map(|lease| lease.chunk.clone()).unwrap_or_default();
            if n == 0 {
                chunk.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), NOW);
                world.settle(&leases[0], &chunk, Disposition::Keep).await;
            }
            if n == 1 {
                chunk.states[0].attempts = 1;
                chunk.states[0].at = Some(world.now());
                world.settle(&leases[0], &chunk, Disposition::Free { due_at: world.now().plus(Duration::from_secs(300)) }).await;
            }
        }
        let find = |filter: NotificationFilter| {
            let (store, ids) = (world.store.clone(), ids.clone());
            async move {
                let items = store.notifications(&filter, &page(100)).await.unwrap().items;
                items.iter().map(|view| ids.iter().position(|id| *id == view.id).unwrap()).collect::<Vec<_>>()
            }
        };
        let filter = NotificationFilter::default;
        assert_eq!(find(filter()).await, [4, 3, 2, 1, 0]);
        for (status, expected) in [
            (NotificationStatus::Scheduled, vec![4]), (NotificationStatus::Queued, vec![2]),
            (NotificationStatus::Sending, vec![1]), (NotificationStatus::Done, vec![3, 0]),
            (NotificationStatus::Cancelled, vec![]),
        ] {
            assert_eq!(find(NotificationFilter { status: Some(status), ..filter() }).await, expected, "{status}");
            for n in expected {
                assert_eq!(world.view(ids[n]).await.status, status, "as one says, so does the list");
            }
        }
        assert_eq!(find(NotificationFilter { topic: Some(topic()), ..filter() }).await, [4, 3, 1, 0]);
        assert_eq!(find(NotificationFilter { topics: Some(BTreeSet::from([topic()])), ..filter() }).await, [4, 3, 1, 0]);
        assert!(find(NotificationFilter { topics: Some(BTreeSet::new()), ..filter() }).await.is_empty());
        assert_eq!(find(NotificationFilter { user_id: Some("u".parse().unwrap()), ..filter() }).await, [4, 2, 1, 0]);
        assert!(find(NotificationFilter { user_id: Some("U".parse().unwrap()), ..filter() }).await.is_empty());
        assert_eq!(find(NotificationFilter { reference: Some("2".parse().unwrap()), ..filter() }).await, [2]);
        assert_eq!(find(NotificationFilter { outcome: Some(DeliveryStatus::Failed), ..filter() }).await, [0]);
        assert_eq!(find(NotificationFilter { outcome: Some(DeliveryStatus::Pending), ..filter() }).await, [2, 1]);
        let (since, until) = (NOW.plus(Duration::from_secs(20)), NOW.plus(Duration::from_secs(40)));
        assert_eq!(find(NotificationFilter { since: Some(since), until: Some(until), ..filter() }).await, [2, 1]);
        let waiting = world.view(ids[1]).await.waiting_for.unwrap();
        assert_eq!((waiting.reason.as_str(), waiting.since), ("backoff", NOW.plus(Duration::from_secs(20))));
    }

    async fn pages_follow_each_other_without_a_gap_or_a_repeat(database) {
        let world = World::on(database).await;
        let mut ids = Vec::new();
        for _ in 0..7 {
            world.clock.advance(Duration::from_millis(2));
            ids.push(world.accept(world.submission(users(&["nobody"]))).await.0.id);
        }
        ids.reverse();
        let mut read = Vec::new();
        let mut request = page(3);
        loop {
            let part = world.store.notifications(&NotificationFilter::default(), &request).await.unwrap();
            assert!(part.items.len() <= 3);
            read.extend(part.items.iter().map(|view| view.id));
            let Some(next) = part.next_cursor else { break };
            request.cursor = Some(next);
        }
        assert_eq!(read, ids);
        request.cursor = Some("of another list".to_owned());
        assert_eq!(world.store.notifications(&NotificationFilter::default(), &request).await.unwrap().items[0].id, ids[0]);
        assert!(world.store.notification(NotificationId::new(NOW)).await.unwrap().is_none());
    }

    async fn deliveries_come_in_the_audiences_order_page_by_page_across_chunks(database) {
        let world = World::on(database).await;
        let tokens = (0..2_300_u32).map(|n| format!("{n:08x}").parse().unwrap()).collect();
        let (view, _) = world.accept(world.submission(Audience::Tokens(tokens))).await;
        // A claim resolves a piece of a long list.
        let mut leases = Vec::new();
        loop {
            let claimed = world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, NOW).await.unwrap();
            leases.extend(claimed.leases);
            if !claimed.more {
                break;
            }
        }
        let mut chunk = leases[1].chunk.clone();
        for at in [0, 255] {
            chunk.states[at] = ended(DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken")), NOW);
        }
        world.settle(&leases[1], &chunk, Disposition::Keep).await;
        let mut indexes = Vec::new();
        let mut request = page(700);
        let mut pages = 0;
        loop {
            let part = world.store.deliveries(view.id, None, &request).await.unwrap().unwrap();
            indexes.extend(part.items.iter().map(|delivery| delivery.index.unwrap()));
            pages += 1;
            let Some(next) = part.next_cursor else { break };
            request.cursor = Some(next);
        }
        assert_eq!(indexes, (0..2_300).collect::<Vec<_>>());
        assert_eq!(pages, 4);
        let failed = world.store.deliveries(view.id, Some(DeliveryStatus::Failed), &page(1)).await.unwrap().unwrap();
        assert_eq!(failed.items[0].index, Some(256));
        let next = PageRequest { cursor: failed.next_cursor, limit: 1 };
        let failed = world.store.deliveries(view.id, Some(DeliveryStatus::Failed), &next).await.unwrap().unwrap();
        assert_eq!((failed.items[0].index, failed.next_cursor), (Some(511), None));
        assert_eq!(failed.items[0].state.cause, Some(apple(400, "BadDeviceToken")));
        let token = format!("{:08x}", 511).parse().unwrap();
        assert_eq!(failed.items[0].apns_id, ApnsId::derive(view.id, Recipient::Token(&token)));
        assert!(world.store.deliveries(NotificationId::new(NOW), None, &page(1)).await.unwrap().is_none());
    }

    async fn a_forgotten_device_is_remembered_and_one_that_vanished_is_an_error(database) {
        let world = World::on(database).await;
        let phone = world.phone("abcdef0123", None).await;
        let (view, _) = world.accept(world.submission(devices(&[&phone]))).await;
        let before = world.deliveries(view.id).await.remove(0);
        world.run(&format!("DELETE FROM devices WHERE seq = {}", phone.seq.0)).await;
        let error = world.store.deliveries(view.id, None, &page(1)).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        world.run(&format!("INSERT INTO device_tombstones (seq, id, token_hint, forgotten_at) VALUES ({}, X'{}', 'ef0123', 1)",
            phone.seq.0, phone.id.as_uuid().simple())).await;
        let after = world.deliveries(view.id).await.remove(0);
        assert_eq!((after.device_id, after.token_hint, after.apns_id), (before.device_id, before.token_hint, before.apns_id));
    }

    async fn counts_that_do_not_add_up_are_an_error_not_an_answer(database) {
        let world = World::on(database).await;
        let phone = world.phone("ab12", None).await;
        let (view, _) = world.accept(Submission { own: false, ..world.submission(devices(&[&phone])) }).await;
        for damage in ["accepted = 2", "accepted = 0, holder = NULL, ended_at = 1"] {
            world.run(&format!("UPDATE chunks SET {damage}")).await;
            let error = world.store.notification(view.id).await.unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{damage}: {error}");
        }
    }
}
