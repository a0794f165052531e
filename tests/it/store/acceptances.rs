//! What is noted of a broadcast's acceptances, and what that is worth: marks by blocks of devices' numbers.

use std::time::Duration;

use sonnette::{
    domain::{
        delivery::{Chunk, DeliveryStatus, DeviceEffect},
        device::{Address, Device, DeviceSeq, DeviceToken, Field, Registration},
        notification::{Audience, Lane},
        topic::Environment,
    },
    store::{
        DeviceFilter, Disposition, Lease, PageRequest, Settled,
        retention::{Place, Subject},
    },
};

use super::world::{NOW, Phone, World, apple, ended, users};
use crate::support::database::on_both_stores;

/// What came of each device of a chunk.
type Effects = Vec<(DeviceSeq, DeviceToken, DeviceEffect)>;

/// A broadcast that is taken, and not sent yet.
async fn broadcast(world: &World) -> Vec<Lease> {
    world.clock.advance(Duration::from_millis(10));
    let mut submission = world.submission(Audience::Everyone);
    submission.notification.lane = Lane::Bulk;
    world.accept(submission).await;
    world.store.claim(&[Lane::Bulk], 20, &[], &[], world.replica, world.now()).await.unwrap().leases
}

/// What an acceptance of all its devices says, as it was known of them when they were read.
fn accepted_in(lease: &Lease, environment: Environment) -> Effects {
    let effect = |address: &Address| DeviceEffect::Accepted(environment, address.block);
    lease.addresses.iter().map(|address| (address.seq, address.token.clone(), effect(address))).collect()
}

/// Ends it with these effects.
async fn settle(world: &World, lease: &Lease, effects: &Effects) {
    let mut chunk: Chunk = lease.chunk.clone();
    chunk.states.fill(ended(DeliveryStatus::Accepted, None, world.now()));
    world.settle_with(lease, &chunk, Disposition::Keep, effects).await;
}

async fn phones(world: &World, count: usize) -> Vec<Phone> {
    let mut phones = Vec::with_capacity(count);
    for n in 0..count {
        phones.push(world.phone(&format!("a0{n:04x}"), Some(&format!("u{n}"))).await);
    }
    phones
}

async fn device(world: &World, phone: &Phone) -> Device {
    world.store.device(phone.id).await.unwrap().unwrap()
}

fn registration(token: &DeviceToken) -> Registration {
    super::devices::registration(token.as_hex())
}

on_both_stores! {
    async fn what_a_broadcast_was_accepted_for_is_known_of_each_device_and_writes_none_of_their_rows(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 300).await;
        for lease in &broadcast(&world).await {
            settle(&world, lease, &accepted_in(lease, Environment::Production)).await;
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM devices WHERE last_accepted_at > 0 OR environment IS NOT NULL").await, 0);
        let at = world.now();
        let says = |device: &Device| (device.environment, device.last_accepted_at.map(|seen| at.since(seen).as_secs()));
        let known = (Some(Environment::Production), Some(0));
        for phone in [&phones[0], &phones[255], &phones[299]] {
            assert_eq!(says(&device(&world, phone).await), known);
        }
        let page = PageRequest { cursor: None, limit: 1_000 };
        let listed = world.store.devices(&DeviceFilter::default(), &page).await.unwrap().items;
        assert!(listed.len() == 300 && listed.iter().all(|device| says(device) == known));
        // Whoever sends next knows it: by list, by number, and in the next broadcast.
        let (_, named) = world.accept(world.submission(users(&["u7"]))).await;
        let read = world.store.addresses(&[phones[7].seq]).await.unwrap();
        let again = broadcast(&world).await;
        let leased = named.iter().take(1).chain(&again).flat_map(|lease| lease.addresses.iter()).map(|address| &**address);
        for address in leased.chain(&read) {
            assert!(address.was_accepted_in(Environment::Production), "{address:?}");
        }
        let refreshed = world.store.register(&[registration(&phones[9].token)], at).await.unwrap();
        assert_eq!(says(&refreshed[0]), known);
    }

    async fn what_was_accepted_for_an_old_token_is_not_noted_for_the_new_one(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 40).await;
        let install = Field::Set("iPhone".parse().unwrap());
        let of_install = |token: &DeviceToken| Registration { installation_id: install.clone(), ..registration(token) };
        world.store.register(&[of_install(&phones[3].token)], NOW).await.unwrap();
        for before_the_first in [true, false] {
            let leases = broadcast(&world).await;
            // While it is on its way.
            let token = if before_the_first { "b1" } else { "b2" };
            let new = world.store.register(&[of_install(&token.parse().unwrap())], world.now()).await.unwrap();
            assert_eq!((new[0].id, new[0].last_accepted_at), (phones[3].id, None));
            for lease in &leases {
                settle(&world, lease, &accepted_in(lease, Environment::Production)).await;
            }
            let seen = device(&world, &phones[3]).await;
            assert_eq!((seen.token.as_hex(), seen.environment, seen.last_accepted_at), (token, None, None));
            let others = [device(&world, &phones[2]).await, device(&world, &phones[4]).await];
            assert!(others.iter().all(|other| other.last_accepted_at.is_some()), "its neighbours were accepted");
        }
    }

    async fn another_environment_than_was_accepted_in_begins_anew(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 40).await;
        for lease in &broadcast(&world).await {
            settle(&world, lease, &accepted_in(lease, Environment::Production)).await;
        }
        let named = |environment| Registration { environment: Field::Set(environment), ..registration(&phones[5].token) };
        let same = world.store.register(&[named(Environment::Production)], world.now()).await.unwrap();
        assert!(same[0].last_accepted_at.is_some(), "naming what is known changes nothing");
        let other = world.store.register(&[named(Environment::Sandbox)], world.now()).await.unwrap();
        assert_eq!((other[0].environment, other[0].last_accepted_at), (Some(Environment::Sandbox), None));
        assert_eq!(device(&world, &phones[5]).await, other[0]);
        let cleared = Registration { environment: Field::Clear, ..registration(&phones[6].token) };
        let cleared = world.store.register(&[cleared], world.now()).await.unwrap();
        assert_eq!((cleared[0].environment, cleared[0].last_accepted_at), (None, None));
        assert_eq!(device(&world, &phones[6]).await, cleared[0]);

        // Accepted in the other one: its row says so, and is right.
        let lease = broadcast(&world).await.remove(0);
        let moved: Effects = accepted_in(&lease, Environment::Sandbox)
            .into_iter()
            .map(|(seq, token, _)| (seq, token, DeviceEffect::Accepted(Environment::Sandbox, None)))
            .collect();
        settle(&world, &lease, &moved).await;
        let seen = device(&world, &phones[7]).await;
        assert_eq!((seen.environment, seen.last_accepted_at), (Some(Environment::Sandbox), Some(world.now())));
    }

    async fn a_token_that_a_broadcast_was_accepted_for_never_dies_of_a_bad_answer(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 40).await;
        // Asked for before the broadcast was accepted, and refused after it.
        let (_, leases) = world.accept(world.submission(users(&["u8"]))).await;
        for lease in &broadcast(&world).await {
            settle(&world, lease, &accepted_in(lease, Environment::Production)).await;
        }
        let mut done = leases[0].chunk.clone();
        done.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken")), world.now());
        let bad = [(phones[8].seq, phones[8].token.clone(), DeviceEffect::Bad { sent_at: world.now() })];
        world.settle_with(&leases[0], &done, Disposition::Keep, &bad).await;
        assert_eq!(world.device(&phones[8], "status").await.as_deref(), Some("active"));
    }

    async fn nor_of_one_that_is_settled_together_with_the_acceptance(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 40).await;
        let (_, named) = world.accept(world.submission(users(&["u8"]))).await;
        let lease = broadcast(&world).await.remove(0);
        let effects = accepted_in(&lease, Environment::Production);
        let bad = [(phones[8].seq, phones[8].token.clone(), DeviceEffect::Bad { sent_at: world.now() })];
        let mut accepted = lease.chunk.clone();
        accepted.states.fill(ended(DeliveryStatus::Accepted, None, world.now()));
        let mut refused = named[0].chunk.clone();
        refused.states[0] = ended(DeliveryStatus::Failed, Some(apple(400, "BadDeviceToken")), world.now());
        let both = [
            Settled { key: named[0].key, epoch: named[0].epoch, seat: named[0].seat, chunk: &refused,
                disposition: Disposition::Keep, effects: &bad, unique_ids: &[] },
            Settled { key: lease.key, epoch: lease.epoch, seat: lease.seat, chunk: &accepted,
                disposition: Disposition::Keep, effects: &effects, unique_ids: &[] },
        ];
        assert_eq!(world.store.settle(&both, world.replica, world.now()).await.unwrap(), []);
        assert_eq!(world.device(&phones[8], "status").await.as_deref(), Some("active"));
    }

    async fn two_that_note_in_one_block_lose_nothing_of_each_other(database) {
        let world = World::on(database).await;
        phones(&world, 600).await;
        for _ in 0..3 {
            world.run("DELETE FROM acceptances").await;
            let leases = broadcast(&world).await;
            assert_eq!(leases.len(), 1, "one chunk");
            let all = accepted_in(&leases[0], Environment::Production);
            // As many settles at once, each with a part of the devices: which chunk they are of does not matter.
            let mut settles = Vec::new();
            for part in all.chunks(100) {
                let (_, named) = world.accept(world.submission(users(&["u1"]))).await;
                settles.push((named, part.to_vec()));
            }
            let world = &world;
            futures_util::future::join_all(settles.iter().map(|(named, part)| settle(world, &named[0], part))).await;
            settle(world, &leases[0], &Vec::new()).await;
            for address in world.store.addresses(&all.iter().map(|(seq, ..)| *seq).collect::<Vec<_>>()).await.unwrap() {
                assert!(address.was_accepted_in(Environment::Production), "{address:?}");
            }
        }
    }

    async fn a_block_goes_with_the_last_trace_of_its_devices(database) {
        let world = World::on(database).await;
        let phones = phones(&world, 20).await;
        for lease in &broadcast(&world).await {
            settle(&world, lease, &accepted_in(lease, Environment::Production)).await;
        }
        let blocks = "SELECT COUNT(*) FROM acceptances";
        assert_eq!(world.number(blocks).await, 1);
        for (left, phone) in (0..20).rev().zip(&phones) {
            world.store.forget(phone.id, NOW).await.unwrap();
            world.run("DELETE FROM notifications").await;
            let until = NOW.plus(Duration::from_secs(90 * 86_400));
            let (subject, from) = (Subject::Tombstones, Place::default());
            world.store.sweep(subject, &from, until, world.replica).await.unwrap().expect("it keeps house");
            assert_eq!(world.number(blocks).await, i64::from(left > 0), "{left} are left");
        }
    }
}
