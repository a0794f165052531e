//! Devices: how registrations merge, who holds a phone, and what is read back.

use std::sync::Arc;

use sonnette::{
    domain::{
        device::{Device, DeviceId, DeviceSeq, DeviceStatus, Field, Proof, Registration, UserId},
        push::PushType,
        topic::Environment,
    },
    store::{DeviceFilter, PageRequest, Store},
};

use super::{NOW, execute, later, number, store, try_open};
use crate::support::database::on_both_stores;

/// A server's registration of a token that says nothing else.
pub(crate) fn registration(token: &str) -> Registration {
    Registration {
        topic: "fr.ocpizza.livreur".parse().unwrap(),
        token: token.parse().unwrap(),
        push_type: None,
        activity_id: None,
        proof: Proof::Server,
        user_id: Field::Absent,
        installation_id: Field::Absent,
        environment: Field::Absent,
        tags: Field::Absent,
        locale: Field::Absent,
        time_zone: Field::Absent,
        app_version: Field::Absent,
        os_version: Field::Absent,
        model: Field::Absent,
    }
}

fn user(id: &str) -> UserId {
    id.parse().unwrap()
}

fn of(token: &str, user_id: &str) -> Registration {
    Registration { user_id: Field::Set(user(user_id)), ..registration(token) }
}

fn on(installation: &str, registration: Registration) -> Registration {
    Registration { installation_id: Field::Set(installation.parse().unwrap()), ..registration }
}

fn tagged(tags: &[&str], registration: Registration) -> Registration {
    Registration { tags: Field::Set(tags.iter().map(|tag| tag.parse().unwrap()).collect()), ..registration }
}

async fn one(store: &Arc<dyn Store>, registration: Registration) -> Device {
    store.register(&[registration], NOW).await.unwrap().remove(0)
}

async fn read(store: &Arc<dyn Store>, id: DeviceId) -> Device {
    store.device(id).await.unwrap().expect("the device is known")
}

async fn list(store: &Arc<dyn Store>, filter: DeviceFilter) -> Vec<String> {
    let page = store.devices(&filter, &PageRequest { cursor: None, limit: 1_000 }).await.unwrap();
    page.items.iter().map(|device| device.token.as_hex().to_owned()).collect()
}

fn tags(device: &Device) -> Vec<&str> {
    device.tags.iter().map(sonnette::domain::device::Tag::as_str).collect()
}

on_both_stores! {
    async fn every_field_is_read_back_as_it_was_registered(database) {
        let store = store(&database).await;
        let full = Registration {
            push_type: Some(PushType::LiveActivity),
            activity_id: Some("activité-1".parse().unwrap()),
            environment: Field::Set(Environment::Sandbox),
            locale: Field::Set("fr-FR".parse().unwrap()),
            time_zone: Field::Set("Europe/Paris".parse().unwrap()),
            app_version: Field::Set("3.2.1".parse().unwrap()),
            os_version: Field::Set("18.6".parse().unwrap()),
            model: Field::Set("iPhone15,2".parse().unwrap()),
            ..tagged(&["paris-11", "Équipe", "équipe", "🍕"], on("9C1F", of(&"ab".repeat(256), "livreur-42 ")))
        };
        let answered = one(&store, full.clone()).await;
        let found = read(&store, answered.id).await;
        assert_eq!(found, answered);
        assert_eq!(found, Device { id: found.id, ..full.into_device(NOW) });
        assert_eq!(found.generation.0, 1);
        let bare = one(&store, registration("01")).await;
        assert_eq!(read(&store, bare.id).await, bare);
        assert!(store.device(DeviceId::new(NOW)).await.unwrap().is_none());
    }

    async fn texts_are_compared_byte_by_byte(database) {
        let store = store(&database).await;
        for (token, name) in [("01", "a"), ("02", "A"), ("03", "a "), ("04", "á"), ("05", "a\u{301}")] {
            one(&store, tagged(&[name], of(token, name))).await;
        }
        for (token, name) in [("01", "a"), ("02", "A"), ("03", "a "), ("04", "á"), ("05", "a\u{301}")] {
            let by_user = DeviceFilter { user_id: Some(user(name)), ..Default::default() };
            assert_eq!(list(&store, by_user).await, [token], "user {name:?}");
            let by_tag = DeviceFilter { tag: Some(name.parse().unwrap()), ..Default::default() };
            assert_eq!(list(&store, by_tag).await, [token], "tag {name:?}");
        }
    }

    async fn the_same_token_again_refreshes_its_device(database) {
        let store = store(&database).await;
        let first = one(&store, tagged(&["paris-11"], of("A1", "livreur-42"))).await;
        let again = store.register(&[registration("a1")], later(60)).await.unwrap().remove(0);
        assert_eq!(again, Device { last_registered_at: later(60), ..first.clone() }, "absent is unchanged");
        assert_eq!(read(&store, first.id).await, again);

        let cleared = Registration { user_id: Field::Clear, ..registration("a1") };
        let cleared = store.register(&[cleared], later(120)).await.unwrap().remove(0);
        assert_eq!((cleared.id, cleared.user_id.clone(), cleared.generation.0), (first.id, None, 2));
        assert!(cleared.tags.is_empty(), "a change of user clears tags");
        assert_eq!(read(&store, first.id).await, cleared);

        let other_app = Registration { topic: "fr.ocpizza.client".parse().unwrap(), ..registration("a1") };
        assert_ne!(one(&store, other_app).await.id, first.id, "identity is topic and token");
    }

    async fn a_registration_revives_a_dead_device(database) {
        let store = store(&database).await;
        let device = one(&store, of("a1", "livreur-42")).await;
        execute(&database, &["UPDATE devices SET status = 'suspended', status_reason = 'BadDeviceToken', last_accepted_at = 77"]).await;
        assert_eq!(read(&store, device.id).await.status, DeviceStatus::Suspended);
        let again = one(&store, registration("a1")).await;
        assert_eq!((again.status, again.status_reason.as_deref()), (DeviceStatus::Active, None));
        assert_eq!(again.last_accepted_at.unwrap().as_millis(), 77);
        assert_eq!(read(&store, device.id).await, again);
    }

    async fn a_group_is_applied_in_its_order(database) {
        let store = store(&database).await;
        let group = [
            of("a1", "first"),
            of("a2", "other"),
            of("a1", "second"),
            Registration { user_id: Field::Clear, ..registration("a1") },
            of("a1", "last"),
            registration("a1"),
        ];
        let answers = store.register(&group, NOW).await.unwrap();
        let held: Vec<_> = answers.iter().map(|d| (d.user_id.as_ref().map(UserId::as_str), d.generation.0)).collect();
        assert_eq!(held, [(Some("first"), 1), (Some("other"), 1), (Some("second"), 2), (None, 3), (Some("last"), 4), (Some("last"), 4)]);
        assert_eq!(read(&store, answers[0].id).await, answers[5]);
        assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 2);
        assert_eq!(store.register(&[], NOW).await.unwrap(), []);
    }

    async fn a_new_token_of_an_installation_replaces_the_old_one(database) {
        let store = store(&database).await;
        let old = one(&store, tagged(&["paris-11"], on("phone", of("a1", "livreur-42")))).await;
        execute(&database, &["UPDATE devices SET environment = 'sandbox', last_accepted_at = 77"]).await;
        let new = one(&store, on("phone", registration("a2"))).await;
        assert_eq!((new.id, new.token.as_hex(), tags(&new)), (old.id, "a2", vec!["paris-11"]));
        assert_eq!((new.environment, new.last_accepted_at), (None, None), "what was learned of the old token is forgotten");
        assert_eq!((new.user_id.clone(), new.generation.0), (Some(user("livreur-42")), 1), "a server's word is proof");
        assert_eq!(read(&store, old.id).await, new);

        let unproven = Registration { proof: Proof::None, ..on("phone", registration("a3")) };
        let unproven = one(&store, unproven).await;
        assert_eq!((unproven.id, unproven.user_id.clone(), unproven.generation.0), (old.id, None, 2), "the user only with proof");
        assert_eq!(tags(&unproven), ["paris-11"]);
        assert_eq!(read(&store, old.id).await, unproven);
        assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 1);
    }

    async fn only_a_token_of_the_same_kind_is_replaced(database) {
        let store = store(&database).await;
        let live = |token, activity: &str| Registration {
            push_type: Some(PushType::LiveActivity),
            activity_id: Some(activity.parse().unwrap()),
            ..on("phone", registration(token))
        };
        let group = [
            on("phone", registration("a1")),
            Registration { push_type: Some(PushType::Voip), ..on("phone", registration("a2")) },
            live("a3", "one"),
            live("a4", "two"),
            Registration { topic: "fr.ocpizza.client".parse().unwrap(), ..on("phone", registration("a5")) },
            on("tablet", registration("a6")),
        ];
        let ids: std::collections::BTreeSet<_> = store.register(&group, NOW).await.unwrap().iter().map(|d| d.id).collect();
        assert_eq!(ids.len(), group.len());
        one(&store, live("a7", "two")).await;
        let mut all = list(&store, DeviceFilter::default()).await;
        all.sort();
        assert_eq!(all, ["a1", "a2", "a3", "a5", "a6", "a7"]);
    }

    async fn a_new_token_that_has_a_row_of_its_own_keeps_it_and_the_old_row_is_replaced(database) {
        let store = store(&database).await;
        let old = one(&store, on("phone", of("a1", "livreur-42"))).await;
        let own = one(&store, registration("a2")).await;
        let now = one(&store, on("phone", registration("a2"))).await;
        assert_eq!(now.id, own.id);
        let old = read(&store, old.id).await;
        assert_eq!((old.status, old.status_reason.as_deref(), old.token.as_hex()), (DeviceStatus::Inactive, Some("Replaced"), "a1"));

        let third = one(&store, on("phone", registration("a3"))).await;
        assert_eq!(third.id, own.id, "the row that is replaced already is left alone");
        assert_eq!(read(&store, old.id).await.token.as_hex(), "a1");
        let back = one(&store, on("phone", registration("a1"))).await;
        assert_eq!((back.id, back.status), (old.id, DeviceStatus::Active));
        assert_eq!(read(&store, own.id).await.status_reason.as_deref(), Some("Replaced"));
        let fourth = one(&store, on("phone", registration("a4"))).await;
        assert_eq!(fourth.id, old.id, "never the row that is replaced, though its number is the higher");
    }

    async fn tokens_change_places_within_one_group(database) {
        let store = store(&database).await;
        let one_id = one(&store, on("one", registration("a1"))).await.id;
        let two_id = one(&store, on("two", registration("a2"))).await.id;
        let group = [
            on("one", registration("a9")),
            on("two", registration("a1")),
            on("one", registration("a2")),
            on("three", registration("a9")),
        ];
        let answers = store.register(&group, NOW).await.unwrap();
        assert_eq!([answers[0].id, answers[1].id, answers[2].id], [one_id, two_id, one_id]);
        assert_eq!(read(&store, one_id).await.token.as_hex(), "a2");
        assert_eq!(read(&store, two_id).await.token.as_hex(), "a1");
        assert_eq!(read(&store, answers[3].id).await.token.as_hex(), "a9");
        assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 3);
    }

    async fn a_phone_that_changes_hands_does_so_with_all_its_tokens(database) {
        let store = store(&database).await;
        let voip = |registration| Registration { push_type: Some(PushType::Voip), ..registration };
        let alert = one(&store, on("phone", of("a1", "anna"))).await;
        let call = one(&store, tagged(&["paris-11"], voip(on("phone", of("a2", "anna"))))).await;
        let other_app = Registration { topic: "fr.ocpizza.client".parse().unwrap(), ..on("phone", of("a3", "anna")) };
        let other_app = one(&store, other_app).await;
        let other_phone = one(&store, on("another", of("a4", "anna"))).await;

        one(&store, of("a1", "bruno")).await;
        let followed = read(&store, call.id).await;
        assert_eq!((followed.user_id.clone(), followed.generation.0, followed.tags.len()), (Some(user("bruno")), 2, 0));
        for untouched in [&other_app, &other_phone] {
            assert_eq!(read(&store, untouched.id).await, *untouched);
        }
        one(&store, Registration { user_id: Field::Clear, ..voip(registration("a2")) }).await;
        let alert = read(&store, alert.id).await;
        assert_eq!((alert.user_id, alert.generation.0), (None, 3));
        one(&store, on("phone, reinstalled", of("a1", "bruno"))).await;
        assert_eq!(read(&store, call.id).await.user_id, Some(user("bruno")), "it is the same phone under its new name");
        let fresh = one(&store, Registration { push_type: Some(PushType::Widgets), ..on("phone", of("a5", "chloé")) }).await;
        assert_eq!(fresh.generation.0, 1);
        assert_eq!(read(&store, call.id).await.user_id, Some(user("chloé")), "a token never seen before speaks for the phone too");
    }

    async fn a_log_out_takes_the_user_off_all_tokens_of_the_phone(database) {
        let store = store(&database).await;
        let voip = Registration { push_type: Some(PushType::Voip), ..tagged(&["paris-11"], on("phone", of("a2", "anna"))) };
        let group = [on("phone", of("a1", "anna")), voip, of("a3", "anna")];
        let devices = store.register(&group, NOW).await.unwrap();
        assert!(store.log_out(devices[0].id, later(1)).await.unwrap());
        assert!(store.log_out(devices[0].id, later(2)).await.unwrap());
        for device in &devices[..2] {
            let device = read(&store, device.id).await;
            assert_eq!((device.user_id, device.generation.0, device.tags.len()), (None, 2, 0));
        }
        assert_eq!(read(&store, devices[2].id).await, devices[2]);
        assert!(store.log_out(devices[2].id, later(3)).await.unwrap());
        assert_eq!(read(&store, devices[2].id).await.user_id, None);
        assert!(!store.log_out(DeviceId::new(NOW), NOW).await.unwrap());
    }

    async fn a_forgotten_device_leaves_its_number_and_a_new_one_takes_another(database) {
        let store = store(&database).await;
        let device = one(&store, tagged(&["paris-11"], of("a1b2c3d4", "anna"))).await;
        let seq = number(&database, "SELECT seq FROM devices").await;
        assert!(store.forget(device.id, NOW).await.unwrap());
        assert!(!store.forget(device.id, NOW).await.unwrap());
        assert!(store.device(device.id).await.unwrap().is_none());
        assert!(store.addresses(&[DeviceSeq(seq)]).await.unwrap().is_empty());
        assert_eq!(number(&database, "SELECT COUNT(*) FROM device_tags").await, 0);
        assert_eq!(number(&database, "SELECT seq FROM device_tombstones WHERE token_hint = 'b2c3d4'").await, seq);
        let again = one(&store, registration("a1b2c3d4")).await;
        assert_ne!(again.id, device.id);
        assert!(number(&database, "SELECT seq FROM devices").await > seq);
    }

    async fn addresses_are_as_they_are_now(database) {
        let store = store(&database).await;
        let group: Vec<_> = (0..100).map(|n| of(&format!("{n:04x}"), "anna")).collect();
        let devices = store.register(&group, NOW).await.unwrap();
        let mut seqs = Vec::new();
        for place in 0..devices.len() {
            let seq = format!("SELECT seq FROM devices ORDER BY seq LIMIT 1 OFFSET {place}");
            seqs.push(DeviceSeq(number(&database, &seq).await));
        }
        for asked in [1, 2, 3, 99, 100] {
            assert_eq!(store.addresses(&seqs[..asked]).await.unwrap().len(), asked);
        }
        assert!(store.addresses(&[]).await.unwrap().is_empty());
        execute(&database, &["UPDATE devices SET environment = 'production', status = 'inactive', last_accepted_at = 77"]).await;
        store.log_out(devices[0].id, NOW).await.unwrap();
        let address = store.addresses(&seqs[..1]).await.unwrap().remove(0);
        assert_eq!((address.id, address.token, address.user_id, address.generation.0), (devices[0].id, devices[0].token.clone(), None, 2));
        assert_eq!((address.environment, address.status), (Some(Environment::Production), DeviceStatus::Inactive));
        assert_eq!(address.last_accepted_at.unwrap().as_millis(), 77);
    }

    async fn devices_are_listed_newest_first_page_by_page(database) {
        let store = store(&database).await;
        let group: Vec<_> = (0..25).map(|n| registration(&format!("{n:04x}"))).collect();
        store.register(&group, NOW).await.unwrap();
        let mut tokens = Vec::new();
        let mut page = PageRequest { cursor: None, limit: 10 };
        loop {
            let part = store.devices(&DeviceFilter::default(), &page).await.unwrap();
            tokens.extend(part.items.iter().map(|device| device.token.as_hex().to_owned()));
            // What is registered while somebody pages is newer than all that is still to come.
            one(&store, registration(&format!("ff{:02x}", tokens.len()))).await;
            page.cursor = part.next_cursor;
            if page.cursor.is_none() {
                break;
            }
        }
        let expected: Vec<_> = (0..25).rev().map(|n| format!("{n:04x}")).collect();
        assert_eq!(tokens, expected);
        let exact = PageRequest { cursor: None, limit: 28 };
        assert!(store.devices(&DeviceFilter::default(), &exact).await.unwrap().next_cursor.is_none(), "a full last page has no next");
    }

    async fn a_list_shows_what_matches_all_filters(database) {
        let store = store(&database).await;
        let client = |registration| Registration { topic: "fr.ocpizza.client".parse().unwrap(), ..registration };
        let group = [
            tagged(&["paris", "nuit"], of("a1", "anna")),
            tagged(&["paris"], of("a2", "bruno")),
            client(tagged(&["paris"], of("a3", "anna"))),
            registration("a4"),
        ];
        store.register(&group, NOW).await.unwrap();
        execute(&database, &["UPDATE devices SET status = 'inactive' WHERE token = X'a2'"]).await;
        let topic = |name: &str| name.parse().unwrap();
        for (filter, expected) in [
            (DeviceFilter { user_id: Some(user("anna")), ..Default::default() }, vec!["a3", "a1"]),
            (DeviceFilter { tag: Some("paris".parse().unwrap()), ..Default::default() }, vec!["a3", "a2", "a1"]),
            (DeviceFilter { topic: Some(topic("fr.ocpizza.livreur")), ..Default::default() }, vec!["a4", "a2", "a1"]),
            (DeviceFilter { topics: Some([topic("fr.ocpizza.client"), topic("x")].into()), ..Default::default() }, vec!["a3"]),
            (DeviceFilter { topics: Some([].into()), ..Default::default() }, vec![]),
            (DeviceFilter { status: Some(DeviceStatus::Inactive), ..Default::default() }, vec!["a2"]),
            (
                DeviceFilter {
                    user_id: Some(user("anna")),
                    tag: Some("paris".parse().unwrap()),
                    topic: Some(topic("fr.ocpizza.livreur")),
                    topics: Some([topic("fr.ocpizza.livreur")].into()),
                    status: Some(DeviceStatus::Active),
                },
                vec!["a1"],
            ),
        ] {
            assert_eq!(list(&store, filter.clone()).await, expected, "{filter:?}");
        }
        let all = store.devices(&DeviceFilter::default(), &PageRequest { cursor: Some("garbage".into()), limit: 2 }).await.unwrap();
        assert_eq!(all.items.len(), 2, "a cursor of another list starts anew");
        assert_eq!(all.items[0].token.as_hex(), "a4");
    }

    async fn one_token_registered_by_two_replicas_at_once_is_one_device(database) {
        let first = store(&database).await;
        let second = try_open(&database).await.unwrap();
        for round in 0..10 {
            let token = format!("{round:04x}");
            let all = futures_util::future::join_all((0..8).map(|n| {
                let store = if n % 2 == 0 { &first } else { &second };
                let group = [registration("aaaa"), of(&token, &format!("user-{n}")), registration("bbbb")];
                async move { store.register(&group, NOW).await.unwrap().remove(1) }
            }))
            .await;
            let ids: std::collections::BTreeSet<_> = all.iter().map(|device| device.id).collect();
            assert_eq!(ids.len(), 1);
            let mut generations: Vec<_> = all.iter().map(|device| device.generation.0).collect();
            generations.sort_unstable();
            assert_eq!(generations, (1..=8).collect::<Vec<_>>(), "no change of hands is lost");
            assert_eq!(read(&first, all[0].id).await.generation.0, 8);
        }
    }

    async fn groups_that_cross_each_other_are_all_applied(database) {
        let first = store(&database).await;
        let second = try_open(&database).await.unwrap();
        let tokens: Vec<_> = (0..40).map(|n| format!("{n:04x}")).collect();
        let forward: Vec<_> = tokens.iter().map(|token| of(token, "anna")).collect();
        let backward: Vec<_> = tokens.iter().rev().map(|token| of(token, "bruno")).collect();
        for _ in 0..5 {
            let (one, two) = tokio::join!(first.register(&forward, NOW), second.register(&backward, NOW));
            assert_eq!((one.unwrap().len(), two.unwrap().len()), (40, 40));
        }
        assert_eq!(number(&database, "SELECT COUNT(*) FROM devices").await, 40);
        let held = number(&database, "SELECT COUNT(DISTINCT user_id) FROM devices").await;
        assert_eq!(held, 1, "the last group has them all");
    }
}
