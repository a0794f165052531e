//! Cancelling, wherever the work is.

use std::{collections::BTreeSet, time::Duration};

use sonnette::{
    domain::{
        delivery::{DeliveryStatus, State},
        notification::{Audience, Lane, NotificationId, NotificationStatus},
        outcome::{Fault, Reason, own},
        topic::Environment,
    },
    store::{Disposition, Lease, StoreError, Submission},
};

use super::world::{NOW, World, apple, ended, topic, users};
use crate::support::database::on_both_stores;

async fn claim(world: &World) -> Vec<Lease> {
    world.store.claim(&Lane::ALL, 9, &[], &[], world.replica, world.now()).await.unwrap().leases
}

async fn leased(world: &World, user: &str) -> Lease {
    let (_, mut leases) = world.accept(world.submission(users(&[user]))).await;
    leases.remove(0)
}

async fn cancelled(world: &World, id: NotificationId) -> sonnette::domain::notification::NotificationView {
    let view = world.store.cancel(id, world.now()).await.unwrap().unwrap();
    assert_eq!(world.view(id).await, view, "what is answered is what is kept");
    view
}

async fn watched(world: &World) -> BTreeSet<NotificationId> {
    world.store.cancelled(world.now()).await.unwrap()
}

fn tried(ambiguous: bool) -> State {
    State { attempts: 1, at: Some(NOW), ambiguous, cause: Some(apple(503, "ServiceUnavailable")), ..State::PENDING }
}

on_both_stores! {
    async fn what_is_scheduled_ends_at_once_without_ever_being_due(database) {
        let world = World::on(database).await;
        world.phone("a1", Some("u")).await;
        world.phone("a2", Some("u")).await;
        let later = |audience| {
            let mut submission = world.submission(audience);
            submission.notification.due_at = NOW.plus(Duration::from_secs(3_600));
            submission.notification.lane = Lane::Bulk;
            submission
        };
        for (audience, unmatched) in [(users(&["u", "nobody"]), 1), (Audience::Everyone, 0)] {
            let (view, _) = world.accept(later(audience)).await;
            let seen = cancelled(&world, view.id).await;
            assert_eq!((seen.status, seen.counts.targeted, seen.counts.cancelled), (NotificationStatus::Cancelled, 2, 2));
            assert_eq!((seen.unmatched, seen.audience_complete), (unmatched, true));
            assert_eq!((seen.cancelled_at, seen.done_at), (Some(NOW), Some(NOW)));
            let causes: Vec<_> = world.deliveries(view.id).await.into_iter().map(|d| d.state.cause).collect();
            assert_eq!(causes, [Some(own::CANCELLED), Some(own::CANCELLED)]);
        }
        world.clock.advance(Duration::from_secs(3_600));
        assert!(claim(&world).await.is_empty());
        assert_eq!(watched(&world).await, BTreeSet::new());
        assert_eq!(world.number("SELECT COUNT(*) FROM cancellations").await, 0, "what has ended is not looked at for ever");
    }

    async fn what_is_parked_held_or_waits_for_a_retry_ends_at_once_and_what_may_have_arrived_is_unknown(database) {
        let world = World::on(database).await;
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let breaker = world.store.open_breaker(&topic(), Environment::Production, "abc", &fault, NOW, NOW).await.unwrap();
        let until = NOW.plus(Duration::from_secs(3_600));
        for (n, (disposition, hold, state, word)) in [
            (Disposition::Park { breaker, until }, false, tried(false), DeliveryStatus::Cancelled),
            (Disposition::Park { breaker, until }, false, tried(true), DeliveryStatus::Unknown),
            (Disposition::Free { due_at: until }, false, tried(false), DeliveryStatus::Cancelled),
            (Disposition::Free { due_at: until }, false, tried(true), DeliveryStatus::Unknown),
            // Marked before a write by a replica that then died.
            (Disposition::Free { due_at: until }, false, State { marked: true, ..State::PENDING }, DeliveryStatus::Unknown),
            (Disposition::Free { due_at: NOW }, true, tried(false), DeliveryStatus::Cancelled),
        ].into_iter().enumerate() {
            let user = format!("u{n}");
            for phone in 0..2 {
                world.phone(&format!("b{n}0{phone}"), Some(&user)).await;
            }
            let lease = leased(&world, &user).await;
            let mut chunk = lease.chunk.clone();
            chunk.states = vec![ended(DeliveryStatus::Accepted, None, NOW), state];
            world.settle(&lease, &chunk, disposition).await;
            if hold {
                world.store.hold(NOW).await.unwrap();
            }
            let seen = cancelled(&world, lease.key.notification).await;
            assert_eq!((seen.status, seen.counts.accepted, seen.counts.pending), (NotificationStatus::Cancelled, 1, 0), "{n}");
            assert_eq!(world.deliveries(lease.key.notification).await[1].state.status, word, "{n}");
            world.counts_add_up(lease.key.notification).await;
            assert_eq!(world.number("SELECT COUNT(*) FROM chunks WHERE ended_at IS NULL").await, 0, "{n}");
        }
    }

    async fn what_a_replica_holds_is_told_to_it_and_ends_as_it_says(database) {
        let world = World::on(database).await;
        world.phone("c1", Some("u")).await;
        let lease = leased(&world, "u").await;
        let id = lease.key.notification;
        let seen = cancelled(&world, id).await;
        assert_eq!((seen.status, seen.counts.pending, seen.cancelled_at), (NotificationStatus::Queued, 1, Some(NOW)));
        assert_eq!(watched(&world).await, BTreeSet::from([id]));
        assert!(claim(&world).await.is_empty(), "it is not taken from whoever may be sending it");
        let mut chunk = lease.chunk.clone();
        chunk.states[0] = ended(DeliveryStatus::Accepted, None, NOW);
        world.settle(&lease, &chunk, Disposition::Keep).await;
        let seen = world.view(id).await;
        assert_eq!((seen.status, seen.counts.accepted), (NotificationStatus::Cancelled, 1), "what was in flight is what it is");
        assert_eq!(watched(&world).await, BTreeSet::new());
    }

    async fn a_replica_that_had_not_heard_does_not_keep_it_from_ending(database) {
        let world = World::on(database).await;
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let breaker = world.store.open_breaker(&topic(), Environment::Production, "abc", &fault, NOW, NOW).await.unwrap();
        let until = NOW.plus(Duration::from_secs(3_600));
        for (n, disposition) in [Disposition::Park { breaker, until }, Disposition::Free { due_at: until }].into_iter().enumerate() {
            let user = format!("u{n}");
            world.phone(&format!("d{n}"), Some(&user)).await;
            let lease = leased(&world, &user).await;
            let id = lease.key.notification;
            cancelled(&world, id).await;
            let mut chunk = lease.chunk.clone();
            chunk.states[0] = tried(false);
            world.settle(&lease, &chunk, disposition).await;
            assert!(claim(&world).await.is_empty());
            assert_eq!(world.view(id).await.counts.pending, 1);
            assert_eq!(watched(&world).await, BTreeSet::from([id]), "whoever looks sets it free");
            assert!(claim(&world).await.is_empty(), "and it ends, and is not leased");
            let seen = world.view(id).await;
            assert_eq!((seen.status, seen.counts.cancelled), (NotificationStatus::Cancelled, 1));
        }
    }

    async fn what_a_dead_replica_may_have_written_ends_as_unknown_when_it_is_taken_over(database) {
        let world = World::on(database).await;
        world.phone("e1", Some("u")).await;
        let lease = leased(&world, "u").await;
        cancelled(&world, lease.key.notification).await;
        let beat = world.store.replicas().await.unwrap()[0].beat;
        assert!(world.store.bury(world.replica, beat).await.unwrap());
        let heir = world.store.join("two", "0.1.0", NOW).await.unwrap();
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], heir, NOW).await.unwrap().leases.is_empty());
        assert_eq!(world.view(lease.key.notification).await.counts.unknown, 1);
    }

    async fn what_was_left_behind_stays_in_doubt_through_every_hand_until_apns_says_what_it_is(database) {
        let mut world = World::on(database).await;
        world.phone("e1", Some("u")).await;
        for (said, word) in [
            (DeliveryStatus::Expired, DeliveryStatus::Unknown),
            (DeliveryStatus::Unregistered, DeliveryStatus::Unregistered),
        ] {
            let id = leased(&world, "u").await.key.notification;
            let beat = world.store.replicas().await.unwrap()[0].beat;
            assert!(world.store.bury(world.replica, beat).await.unwrap());
            world.replica = world.store.join("heir", "0.1.0", NOW).await.unwrap();
            let lease = claim(&world).await.remove(0);
            assert!(lease.chunk.states[0].maybe_written);
            world.settle(&lease, &lease.chunk, Disposition::Free { due_at: NOW }).await;
            let lease = claim(&world).await.remove(0);
            assert!(lease.chunk.states[0].maybe_written, "given back in good order, it is what it was");
            let mut chunk = lease.chunk.clone();
            chunk.states[0].end(said, None, NOW);
            world.settle(&lease, &chunk, Disposition::Keep).await;
            assert_eq!(world.deliveries(id).await[0].state.status, word);
        }
    }

    async fn cancelling_twice_or_too_late_changes_nothing(database) {
        let world = World::on(database).await;
        world.phone("f1", Some("u")).await;
        assert!(world.store.cancel(NotificationId::new(NOW), NOW).await.unwrap().is_none());
        let lease = leased(&world, "u").await;
        let mut chunk = lease.chunk.clone();
        chunk.states[0] = ended(DeliveryStatus::Accepted, None, NOW);
        world.settle(&lease, &chunk, Disposition::Keep).await;
        let seen = cancelled(&world, lease.key.notification).await;
        assert_eq!((seen.status, seen.cancelled_at, seen.counts.accepted), (NotificationStatus::Done, None, 1));
        let (nobody, _) = world.accept(world.submission(users(&["nobody"]))).await;
        assert_eq!(cancelled(&world, nobody.id).await.status, NotificationStatus::Done);

        let lease = leased(&world, "u").await;
        let first = cancelled(&world, lease.key.notification).await;
        world.clock.advance(Duration::from_secs(5));
        let again = cancelled(&world, lease.key.notification).await;
        assert_eq!(again, first, "the first time counts");
        assert_eq!(watched(&world).await.len(), 1);
    }

    async fn half_way_the_rest_of_a_broadcast_is_counted_and_the_counts_add_up_all_the_while(database) {
        let world = World::on(database).await;
        let at = NOW.minus(Duration::from_secs(3600)).as_millis();
        let rows: Vec<String> = (1..=3_400).map(|seq| format!(
            "({seq}, X'{seq:032x}', 'fr.ocpizza.livreur', X'{seq:064x}', 'alert', 3, 'active', {at}, {at}, 0)"
        )).collect();
        world.run(&format!("INSERT INTO devices (seq, id, topic, token, push_type, generation, status, created_at, \
            last_registered_at, last_accepted_at) VALUES {}", rows.join(","))).await;
        let mut submission: Submission = world.submission(Audience::Everyone);
        submission.notification.lane = Lane::Bulk;
        let (view, _) = world.accept(submission).await;
        let leases = world.store.claim(&Lane::ALL, 1, &[], &[], world.replica, NOW).await.unwrap().leases;
        let seen = cancelled(&world, view.id).await;
        let c = seen.counts;
        assert_eq!(c.targeted, c.pending + c.cancelled);
        assert_eq!(c.pending, 1_000, "what a replica may be sending is still open");
        while world.store.claim(&Lane::ALL, 1, &[], &[], world.replica, NOW).await.unwrap().more {}
        for lease in &leases {
            let mut chunk = lease.chunk.clone();
            chunk.states.fill(ended(DeliveryStatus::Accepted, None, NOW));
            world.settle(lease, &chunk, Disposition::Keep).await;
        }
        let seen = world.view(view.id).await;
        assert_eq!((seen.counts.targeted, seen.counts.accepted, seen.counts.cancelled), (3_400, 1_000, 2_400));
        assert_eq!((seen.status, seen.audience_complete), (NotificationStatus::Cancelled, true));
        let list = |status| {
            let filter = sonnette::store::NotificationFilter { status: Some(status), ..Default::default() };
            let store = &world.store;
            async move {
                let page = sonnette::store::PageRequest { cursor: None, limit: 10 };
                store.notifications(&filter, &page).await.unwrap().items.len()
            }
        };
        assert_eq!((list(NotificationStatus::Cancelled).await, list(NotificationStatus::Done).await), (1, 0));
        assert_eq!(list(NotificationStatus::Sending).await, 0);
    }

    async fn what_cannot_be_read_is_held_and_said_once(database) {
        let world = World::on(database).await;
        world.phone("9a", Some("u")).await;
        let mut submission = world.submission(users(&["u"]));
        submission.own = false;
        let (view, _) = world.accept(submission).await;
        world.run(&format!("UPDATE chunks SET targets = X'01FF' WHERE notification_id = X'{}'", view.id.as_uuid().simple())).await;
        let seen = cancelled(&world, view.id).await;
        assert_eq!(seen.waiting_for.unwrap().reason, "held");
        assert_eq!(watched(&world).await.len(), 1);
        assert_eq!(world.view(view.id).await.waiting_for.unwrap().reason, "held", "nobody tries it again and again");
        let page = sonnette::store::PageRequest { cursor: None, limit: 10 };
        assert!(matches!(world.store.deliveries(view.id, None, &page).await, Err(StoreError::Corrupt { .. })));
    }
}
