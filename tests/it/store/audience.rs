//! Tags, everyone, and long lists: resolved piece by piece, as they are claimed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use sonnette::{
    domain::{
        delivery::{DeliveryStatus, Target},
        device::{DeviceSeq, Generation, Tag},
        notification::{Audience, Lane, NotificationId, NotificationStatus, NotificationView},
    },
    store::{Disposition, Lease},
};

use super::world::{NOW, TOPIC, World, apple, ended, users};
use crate::support::database::{Store, on_both_stores};

/// A device as it is written past the store.
#[derive(Clone)]
struct Row {
    topic: &'static str,
    push_type: &'static str,
    status: &'static str,
    tags: BTreeSet<&'static str>,
}

const PLAIN: Row = Row { topic: TOPIC, push_type: "alert", status: "active", tags: BTreeSet::new() };

/// Compared as bytes: case, accents, a trailing space, and one the beginning of the other.
const TAGS: [&str; 9] = ["paris", "Paris", "paris ", "pari", "ete", "été", "common", "rare", "never"];

/// Writes devices with numbers from 1 on.
async fn write(world: &World, rows: &[Row]) {
    let at = NOW.minus(Duration::from_secs(3600)).as_millis();
    for (page, rows) in rows.chunks(500).enumerate() {
        let numbered = || (page * 500 + 1..).zip(rows);
        let values: Vec<String> = numbered()
            .map(|(seq, Row { topic, push_type, status, .. })| {
                format!("({seq}, X'{seq:032x}', '{topic}', X'{seq:064x}', '{push_type}', 3, '{status}', {at}, {at}, 0)")
            })
            .collect();
        world
            .run(&format!(
                "INSERT INTO devices (seq, id, topic, token, push_type, generation, status, created_at, \
                 last_registered_at, last_accepted_at) VALUES {}",
                values.join(",")
            ))
            .await;
        let tags: Vec<String> = numbered()
            .flat_map(|(seq, row)| row.tags.iter().map(move |tag| format!("({seq}, X'{}')", hex::encode(tag))))
            .collect();
        if !tags.is_empty() {
            world.run(&format!("INSERT INTO device_tags (device_seq, tag) VALUES {}", tags.join(","))).await;
        }
    }
}

async fn devices(world: &World, count: usize) {
    write(world, &vec![PLAIN; count]).await;
}

/// Accepts without a lease.
async fn accept(world: &World, audience: Audience) -> NotificationView {
    accept_with(world, audience, |_| {}).await
}

async fn accept_with(
    world: &World,
    audience: Audience,
    change: impl FnOnce(&mut sonnette::domain::notification::Notification),
) -> NotificationView {
    let mut submission = world.submission(audience);
    submission.notification.lane = Lane::Bulk;
    change(&mut submission.notification);
    let (view, leases) = world.accept(submission).await;
    assert_eq!(leases.len(), 0, "nothing of it is resolved yet");
    view
}

async fn claim(world: &World, max: usize) -> (Vec<Lease>, bool) {
    let claimed = world.store.claim(&Lane::ALL, max, &[], &[], world.replica, world.now()).await.unwrap();
    (claimed.leases, claimed.more)
}

/// Claims piece by piece until nothing is left.
async fn drain(world: &World, max: usize) -> Vec<Lease> {
    let mut all = Vec::new();
    loop {
        let (leases, more) = claim(world, max).await;
        let nothing = leases.is_empty();
        all.extend(leases);
        if nothing && !more {
            return all;
        }
    }
}

fn numbers(leases: &[Lease]) -> Vec<i64> {
    let targets = leases.iter().flat_map(|lease| &lease.chunk.targets);
    targets
        .map(|target| match target {
            Target::Device { seq, .. } => seq.0,
            Target::Token { .. } => panic!("a raw token"),
        })
        .collect()
}

fn tags(names: &[&str]) -> Vec<Tag> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

async fn settle_all(world: &World, lease: &Lease, status: DeliveryStatus) {
    let mut chunk = lease.chunk.clone();
    let cause = (status != DeliveryStatus::Accepted).then(|| apple(400, "BadTopic"));
    chunk.states.fill(ended(status, cause, NOW));
    world.settle(lease, &chunk, Disposition::Keep).await;
}

on_both_stores! {
    async fn accepting_everyone_reads_no_device_and_writes_two_rows(database) {
        let world = World::on(database).await;
        world.run("ALTER TABLE devices RENAME TO out_of_reach").await;
        world.run("ALTER TABLE device_tags RENAME TO tags_out_of_reach").await;
        for audience in [
            Audience::Everyone,
            Audience::Tags { all: tags(&["a"]), any: Vec::new(), none: Vec::new() },
            Audience::Users((0..20_000).map(|n| format!("user-{n}").parse().unwrap()).collect()),
        ] {
            let view = accept(&world, audience).await;
            let told = (view.status, view.audience_complete, view.counts.targeted);
            assert_eq!(told, (NotificationStatus::Queued, false, 0));
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM chunks").await, 3);
        assert_eq!(world.number("SELECT COUNT(*) FROM notification_users").await, 0);
    }

    async fn everyone_is_the_apps_active_devices_for_the_push_type_each_once(database) {
        let world = World::on(database).await;
        let kinds = [
            PLAIN,
            Row { topic: "fr.ocpizza.client", ..PLAIN },
            Row { push_type: "voip", ..PLAIN },
            Row { status: "inactive", ..PLAIN },
            Row { status: "suspended", ..PLAIN },
            PLAIN,
        ];
        write(&world, &(0..4_200).map(|n| kinds[n % kinds.len()].clone()).collect::<Vec<_>>()).await;
        let expected: Vec<i64> = (1..=4_200).filter(|n| matches!((n - 1) % 6, 0 | 5)).collect();
        let view = accept(&world, Audience::Everyone).await;
        let mut got = Vec::new();
        let mut targeted = Vec::new();
        loop {
            let (leases, more) = claim(&world, 1).await;
            got.extend(leases);
            let seen = world.view(view.id).await;
            targeted.push(seen.counts.targeted);
            assert_eq!(seen.audience_complete, !more, "complete with the last piece, and not before");
            if !more {
                break;
            }
        }
        assert!(targeted.is_sorted() && targeted.len() >= 2, "it grows while it is resolved: {targeted:?}");
        assert_eq!(numbers(&got), expected);
        assert!(got.iter().all(|lease| lease.addresses.len() == lease.chunk.targets.len()), "with their addresses");
        let unfenced = |target: &Target| matches!(target, Target::Device { generation: None, .. });
        assert!(got.iter().flat_map(|lease| &lease.chunk.targets).all(unfenced));
        for lease in &got {
            settle_all(&world, lease, DeliveryStatus::Accepted).await;
        }
        let seen = world.view(view.id).await;
        assert_eq!((seen.status, seen.counts.accepted), (NotificationStatus::Done, 1_400));
        assert_eq!(world.number("SELECT COUNT(*) FROM audiences").await, 0, "nothing is left of the way");
    }

    async fn everyone_of_an_app_with_few_devices_among_many_is_read_in_few_pieces(database) {
        let world = World::on(database).await;
        let of = |n: usize| if n.is_multiple_of(20) { PLAIN } else { Row { topic: "fr.ocpizza.client", ..PLAIN } };
        write(&world, &(1..=12_000).map(of).collect::<Vec<_>>()).await;
        accept(&world, Audience::Everyone).await;
        let (mut claims, mut got) = (0, Vec::new());
        loop {
            let (leases, more) = claim(&world, 2).await;
            claims += 1;
            got.extend(numbers(&leases));
            if !more {
                break;
            }
        }
        assert_eq!(got, (1..=600).map(|n| n * 20).collect::<Vec<i64>>());
        assert_eq!(claims, 1, "as many of them as go into a piece, however many others stand between");
    }

    async fn nobody_to_send_to_is_done_when_it_is_claimed(database) {
        let world = World::on(database).await;
        for audience in [Audience::Everyone, Audience::Tags { all: tags(&["a"]), any: Vec::new(), none: Vec::new() }] {
            let view = accept(&world, audience).await;
            assert_eq!(drain(&world, 5).await.len(), 0);
            let seen = world.view(view.id).await;
            assert_eq!((seen.status, seen.counts.targeted, seen.unmatched), (NotificationStatus::Done, 0, 0));
        }
    }

    async fn tags_choose_as_a_naive_reader_would(database) {
        let world = World::on(database).await;
        let mut random = StdRng::seed_from_u64(42);
        let rows: Vec<Row> = (0..2_600).map(|_| {
            let bears = |tag: &str, random: &mut StdRng| random.random_bool(match tag {
                "common" => 0.9,
                "rare" => 0.002,
                "never" => 0.0,
                _ => 0.3,
            });
            Row {
                topic: if random.random_bool(0.1) { "fr.ocpizza.client" } else { TOPIC },
                push_type: if random.random_bool(0.1) { "voip" } else { "alert" },
                status: if random.random_bool(0.1) { "inactive" } else { "active" },
                tags: TAGS.into_iter().filter(|tag| bears(tag, &mut random)).collect(),
            }
        }).collect();
        write(&world, &rows).await;
        let fixed: [[&[&str]; 3]; 8] = [
            [&["paris"], &[], &[]],
            [&[], &["rare", "never"], &[]],
            [&[], &[], &["common"]],
            [&["common", "paris", "Paris"], &["été", "ete"], &["rare"]],
            [&["never"], &["common"], &[]],
            [&["rare"], &[], &["rare"]],
            [&TAGS[..7], &[], &[]],
            [&[], &TAGS, &TAGS[..5]],
        ];
        let some = |random: &mut StdRng| TAGS.into_iter().filter(|_| random.random_bool(0.2)).collect::<Vec<&str>>();
        let mut asked: Vec<[Vec<&str>; 3]> = fixed.iter().map(|lists| lists.map(<[&str]>::to_vec)).collect();
        asked.extend((0..24).map(|_| [some(&mut random), some(&mut random), some(&mut random)]));
        asked.retain(|lists| lists.iter().any(|list| !list.is_empty()));
        for [all, any, none] in asked {
            let has = |row: &Row, tag: &&str| row.tags.contains(tag);
            let expected: Vec<i64> = (1..).zip(&rows)
                .filter(|(_, row)| row.topic == TOPIC && row.push_type == "alert" && row.status == "active")
                .filter(|(_, row)| all.iter().all(|tag| has(row, tag)))
                .filter(|(_, row)| any.is_empty() || any.iter().any(|tag| has(row, tag)))
                .filter(|(_, row)| !none.iter().any(|tag| has(row, tag)))
                .map(|(seq, _)| seq)
                .collect();
            let view = accept(&world, Audience::Tags { all: tags(&all), any: tags(&any), none: tags(&none) }).await;
            let leases = drain(&world, 1).await;
            assert_eq!(numbers(&leases), expected, "all {all:?} any {any:?} none {none:?}");
            let fenced = |target: &Target| matches!(target, Target::Device { generation: Some(Generation(3)), .. });
            assert!(leases.iter().flat_map(|lease| &lease.chunk.targets).all(fenced));
            assert!(world.view(view.id).await.audience_complete);
        }
    }

    async fn a_rare_match_among_many_is_found_in_bounded_steps(database) {
        let world = World::on(database).await;
        // Two tags that take turns, and meet once, at the very end.
        let mut rows: Vec<Row> = (0..20_000).map(|n| Row {
            tags: BTreeSet::from([if n % 2 == 0 { "even" } else { "odd" }]), ..PLAIN
        }).collect();
        rows.push(Row { tags: BTreeSet::from(["even", "odd"]), ..PLAIN });
        write(&world, &rows).await;
        let others: Vec<String> = (0..48).map(|n| format!("other-{n}")).collect();
        let none = tags(&others.iter().map(String::as_str).collect::<Vec<_>>());
        let both = Audience::Tags { all: tags(&["even", "odd"]), any: Vec::new(), none };
        let view = accept(&world, both).await;
        let (mut claims, mut got) = (0, Vec::new());
        loop {
            let (leases, more) = claim(&world, 1).await;
            claims += 1;
            got.extend(numbers(&leases));
            if !more {
                break;
            }
            assert!(claims < 1_000, "each piece gets somewhere");
        }
        assert_eq!(got, [20_001]);
        assert!(claims > 1, "a piece reads so much and no more");
        assert_eq!(world.view(view.id).await.counts.targeted, 1);
    }

    async fn a_device_registered_before_it_is_due_is_never_missed_and_one_that_comes_during_it_does_not_prolong_it(database) {
        let world = World::on(database).await;
        devices(&world, 1_500).await;
        let due = NOW.plus(Duration::from_secs(60));
        let view = accept_with(&world, Audience::Everyone, |notification| notification.due_at = due).await;
        assert_eq!(view.status, NotificationStatus::Scheduled);
        let late = world.phone("aa", None).await;
        world.clock.advance(Duration::from_secs(60));
        let (first, more) = claim(&world, 1).await;
        assert!(more);
        let later = world.phone("ab", None).await;
        let rest = drain(&world, 1).await;
        let mut got = numbers(&first);
        got.extend(numbers(&rest));
        assert!(got.contains(&late.seq.0));
        assert!(!got.contains(&later.seq.0), "its end was fixed when it became due");
        assert_eq!(got.len(), 1_501);
    }

    async fn broadcasts_of_a_lane_take_turns_and_what_is_urgent_goes_first(database) {
        let world = World::on(database).await;
        devices(&world, 3_500).await;
        let big = accept(&world, Audience::Everyone).await.id;
        let mut turn: Vec<NotificationId> = Vec::new();
        let mut ids: BTreeMap<NotificationId, &str> = BTreeMap::from([(big, "big")]);
        for step in 0..9 {
            world.clock.advance(Duration::from_millis(10));
            if step == 1 {
                ids.insert(accept(&world, Audience::Everyone).await.id, "other");
                let (small, _) = world.accept({
                    let mut submission = world.submission(Audience::Tokens(vec!["c0ffee".parse().unwrap()]));
                    submission.own = false;
                    submission.notification.lane = Lane::Bulk;
                    submission
                }).await;
                ids.insert(small.id, "small");
            }
            if step == 3 {
                let mut urgent = world.submission(Audience::Tokens(vec!["decaf0".parse().unwrap()]));
                urgent.own = false;
                ids.insert(world.accept(urgent).await.0.id, "urgent");
            }
            world.clock.advance(Duration::from_millis(10));
            let (leases, _) = claim(&world, 1).await;
            // The parts of one piece.
            let taken: BTreeSet<NotificationId> = leases.iter().map(|lease| lease.key.notification).collect();
            turn.extend(taken);
        }
        let turn: Vec<&str> = turn.iter().map(|id| ids[id]).collect();
        let position = |what| turn.iter().position(|one| *one == what).unwrap();
        assert_eq!(turn[0], "big");
        assert!(position("small") < 5 && position("other") < 5, "{turn:?}");
        assert_eq!(turn[3], "urgent");
        let bigs: Vec<&str> = turn.iter().copied().filter(|one| matches!(*one, "big" | "other")).collect();
        assert!(bigs.windows(2).skip(1).take(4).all(|pair| pair[0] != pair[1]), "they take turns: {turn:?}");
    }

    async fn two_replicas_share_a_broadcast_and_nobody_is_taken_twice(database) {
        let world = World::on(database).await;
        devices(&world, 12_000).await;
        let view = accept(&world, Audience::Everyone).await;
        let other = world.beside().await;
        let second = other.join("two", "0.1.0", NOW).await.unwrap();
        // Each certainly has a piece; then they run for the rest.
        let mut one = claim(&world, 2).await.0;
        let mut two = other.claim(&Lane::ALL, 2, &[], &[], second, NOW).await.unwrap().leases;
        while !world.view(view.id).await.audience_complete {
            let (here, there) = tokio::join!(
                world.store.claim(&Lane::ALL, 2, &[], &[], world.replica, NOW),
                other.claim(&Lane::ALL, 2, &[], &[], second, NOW));
            one.extend(here.unwrap().leases);
            two.extend(there.unwrap().leases);
        }
        assert!(!one.is_empty() && !two.is_empty(), "both have a share");
        let mut got = numbers(&one);
        got.extend(numbers(&two));
        got.sort_unstable();
        assert_eq!(got, (1..=12_000).collect::<Vec<i64>>());
    }

    async fn a_long_list_is_resolved_in_parts_and_a_phone_that_passes_on_between_them_is_one_target(database) {
        let world = World::on(database).await;
        let phone = world.phone("aa", Some("user-0")).await;
        let other = world.phone("ab", Some("user-1500")).await;
        let list: Vec<String> = (0..3_000).map(|n| format!("user-{n}")).collect();
        let names: Vec<&str> = list.iter().map(String::as_str).collect();
        let view = accept(&world, users(&names)).await;
        let (first, more) = claim(&world, 1).await;
        assert_eq!((numbers(&first), more), (vec![phone.seq.0], true));
        assert_eq!(world.number("SELECT COUNT(*) FROM notification_users").await, 1_000);
        world.run(&format!(
            "UPDATE devices SET user_id = X'{}', generation = 4 WHERE seq = {}", hex::encode("user-2999"), phone.seq.0
        )).await;
        let rest = drain(&world, 1).await;
        assert_eq!(numbers(&rest), [other.seq.0]);
        let seen = world.view(view.id).await;
        // The last one has a phone, and had none when it was due.
        assert_eq!((seen.counts.targeted, seen.unmatched, seen.audience_complete), (2, 2_997, true));
        assert_eq!(world.number("SELECT COUNT(*) FROM notification_users").await, 3_000);

        let tokens: Vec<_> = (0..5_000_u32).map(|n| format!("{n:08x}").parse().unwrap()).collect();
        let view = accept(&world, Audience::Tokens(tokens.clone())).await;
        let leases = drain(&world, 2).await;
        let places: Vec<u32> = leases.iter().flat_map(|lease| &lease.chunk.targets).map(|target| match target {
            Target::Token { index, token } => { assert_eq!(*token, tokens[*index as usize]); *index }
            Target::Device { .. } => panic!("nobody registered it"),
        }).collect();
        assert_eq!(places, (0..5_000).collect::<Vec<u32>>());
        assert_eq!(world.view(view.id).await.counts.targeted, 5_000);
    }

    async fn after_its_expiration_the_rest_is_counted_and_not_leased(database) {
        let world = World::on(database).await;
        devices(&world, 2_500).await;
        let view = accept(&world, Audience::Everyone).await;
        let (leases, more) = claim(&world, 1).await;
        assert!(more && numbers(&leases).len() == 1_000);
        for lease in &leases {
            settle_all(&world, lease, DeliveryStatus::Accepted).await;
        }
        world.clock.advance(Duration::from_secs(600));
        assert_eq!(drain(&world, 1).await.len(), 0);
        let seen = world.view(view.id).await;
        assert_eq!((seen.counts.targeted, seen.counts.accepted, seen.counts.expired), (2_500, 1_000, 1_500));
        assert_eq!(seen.status, NotificationStatus::Done);
    }

    async fn sql_finds_ten_thousand_failures_of_a_notification_and_no_more(database) {
        let world = World::on(database).await;
        devices(&world, 13_000).await;
        let view = accept(&world, Audience::Everyone).await;
        // Two settles of many chunks, one of a few, and the first chunk last: each as a group of its own.
        let leases = drain(&world, 13).await;
        let parts = leases.len();
        assert!(leases.iter().all(|lease| lease.chunk.targets.len() <= 256), "{parts} parts");
        let chunks: Vec<_> = leases.iter().map(|lease| {
            let mut chunk = lease.chunk.clone();
            chunk.states.fill(ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), NOW));
            chunk
        }).collect();
        for group in [1..parts / 2, parts / 2..parts - 5, parts - 5..parts, 0..1] {
            let done: Vec<_> = group.map(|at| sonnette::store::Settled {
                key: leases[at].key, epoch: leases[at].epoch, seat: leases[at].seat, chunk: &chunks[at], disposition: Disposition::Keep,
                effects: &[], unique_ids: &[],
            }).collect();
            assert_eq!(world.store.settle(&done, world.replica, NOW).await.unwrap(), []);
        }
        // The first part, which ends with a block, has room for 256.
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes").await, 10_000 - 1);
        assert_eq!(world.number("SELECT COUNT(*) FROM delivery_notes WHERE number = 0").await, 255);
        let seen = world.view(view.id).await;
        assert_eq!((seen.status, seen.counts.failed), (NotificationStatus::Done, 13_000));
    }

    async fn the_outcomes_of_many_are_read_page_by_page_in_order(database) {
        let world = World::on(database).await;
        devices(&world, 5_300).await;
        let view = accept(&world, Audience::Everyone).await;
        let leases = drain(&world, 10).await;
        for (at, lease) in leases.iter().enumerate() {
            let status = if at == 4 { DeliveryStatus::Failed } else { DeliveryStatus::Accepted };
            settle_all(&world, lease, status).await;
        }
        // The fifth part: SQLite resolves 1,000 at once, and a part ends with its piece.
        let failed = match world.database.store() {
            Store::Sqlite => 1_001..=1_256,
            Store::Mysql => 1_024..=1_279,
        };
        for (status, expected) in [(None, 1..=5_300_u128), (Some(DeliveryStatus::Failed), failed)] {
            let mut page = sonnette::store::PageRequest { cursor: None, limit: 700 };
            let mut got = Vec::new();
            loop {
                let read = world.store.deliveries(view.id, status, &page).await.unwrap().unwrap();
                got.extend(read.items.iter().map(|item| item.device_id.unwrap().as_uuid().as_u128()));
                page.cursor = read.next_cursor;
                if page.cursor.is_none() {
                    break;
                }
            }
            assert_eq!(got, expected.collect::<Vec<u128>>());
        }
        assert!(matches!(leases[0].chunk.targets[0], Target::Device { seq: DeviceSeq(1), .. }));
    }
}
