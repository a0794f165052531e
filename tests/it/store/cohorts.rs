//! Notifications for one device each that were accepted together, in one row.

use std::{collections::BTreeSet, time::Duration};

use sonnette::{
    domain::{
        clock::Timestamp,
        delivery::{DeliveryStatus, State},
        notification::{Lane, NotificationId, NotificationStatus},
        outcome::own,
        push::OnUnknown,
    },
    store::{
        Accepted, Disposition, Lease, NotificationFilter, PageRequest, ReplicaId, Settled, StoreError, Submission,
        retention::{Place, Subject},
    },
};

use super::world::{NOW, World, apple, ended, new, topic, users};
use crate::support::database::on_both_stores;

const SECOND: Duration = Duration::from_secs(1);

/// So many users with one phone each.
async fn riders(world: &World, count: usize) -> Vec<String> {
    let mut names = Vec::new();
    for n in 0..count {
        names.push(format!("livreur-{n}"));
        world.phone(&format!("c0{n:02x}"), Some(&names[n])).await;
    }
    names
}

/// One notification for each, accepted together.
async fn accepted_together(world: &World, names: &[String]) -> Vec<Lease> {
    let group: Vec<_> = names.iter().map(|name| world.submission(users(&[name]))).collect();
    let answers = world.store.accept(&group, world.replica, world.now()).await.unwrap();
    answers.into_iter().map(|answer| new(answer).1.remove(0)).collect()
}

fn with(lease: &Lease, state: State) -> sonnette::domain::delivery::Chunk {
    let mut chunk = lease.chunk.clone();
    chunk.states[0] = state;
    chunk
}

fn accepted_at(at: Timestamp) -> State {
    ended(DeliveryStatus::Accepted, None, at)
}

fn id(lease: &Lease) -> NotificationId {
    lease.key.notification
}

async fn rows(world: &World) -> (i64, i64) {
    (world.number("SELECT COUNT(*) FROM cohorts").await, world.number("SELECT COUNT(*) FROM chunks").await)
}

async fn found(world: &World, filter: NotificationFilter) -> BTreeSet<NotificationId> {
    let page = PageRequest { cursor: None, limit: 100 };
    world.store.notifications(&filter, &page).await.unwrap().items.into_iter().map(|view| view.id).collect()
}

async fn claimed(world: &World) -> Vec<Lease> {
    world.store.claim(&Lane::ALL, 100, &[], &[], world.replica, world.now()).await.unwrap().leases
}

on_both_stores! {
    async fn those_accepted_together_share_a_row_and_each_is_read_with_its_own_outcome(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 6).await).await;
        assert_eq!(rows(&world).await, (1, 0));
        assert_eq!(leases.iter().map(|lease| lease.seat.unwrap().number).collect::<BTreeSet<_>>(), (0..6).collect());
        for lease in &leases {
            let view = world.view(id(lease)).await;
            assert_eq!((view.status, view.counts.pending, view.done_at), (NotificationStatus::Queued, 1, None));
            world.counts_add_up(id(lease)).await;
        }
        let depth = world.store.depth(NOW).await.unwrap();
        assert_eq!((depth.len(), depth[0].due, depth[0].oldest_due_at), (1, 6, Some(NOW)));
        let holdings = world.store.holdings().await.unwrap();
        assert_eq!((holdings.len(), holdings[0].replica, holdings[0].chunks, holdings[0].devices), (1, world.replica, 6, 6));
        assert_eq!(world.store.owned(world.replica).await.unwrap().len(), 6);

        let at = NOW.plus(Duration::from_millis(1_234));
        let unique: [(u32, Box<str>); 1] = [(0, "F1E2".into())];
        let twice = State { attempts: 2, ..accepted_at(at) };
        let again = State { attempts: 1, at: Some(at), cause: Some(apple(503, "ServiceUnavailable")), ..State::PENDING };
        let chunks = [
            with(&leases[0], accepted_at(at)),
            with(&leases[1], ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), at)),
            with(&leases[2], again.clone()),
            with(&leases[3], twice.clone()),
            with(&leases[4], accepted_at(at)),
        ];
        let later = Disposition::Free { due_at: NOW.plus(9 * SECOND) };
        let done: Vec<_> = leases.iter().zip(&chunks).enumerate().map(|(n, (lease, chunk))| Settled { key: lease.key,
            epoch: lease.epoch, seat: lease.seat, chunk, disposition: if n == 2 { later } else { Disposition::Keep },
            effects: &[], unique_ids: if n == 4 { &unique } else { &[] } }).collect();
        assert_eq!(world.store.settle(&done, world.replica, NOW).await.unwrap(), []);
        assert_eq!(rows(&world).await, (1, 4), "whoever has more to say has a row of its own");
        assert_eq!(world.number("SELECT open FROM cohorts").await, 1);
        assert_eq!(world.number("SELECT accepted FROM cohorts").await, 1);
        let states = [chunks[0].states[0].clone(), chunks[1].states[0].clone(), again, twice, accepted_at(at), State::PENDING];
        for (lease, state) in leases.iter().zip(states) {
            let deliveries = world.deliveries(id(lease)).await;
            assert_eq!((deliveries.len(), &deliveries[0].state), (1, &state));
            assert!(deliveries[0].device_id.is_some());
            world.counts_add_up(id(lease)).await;
        }
        assert_eq!(world.deliveries(id(&leases[4])).await[0].apns_unique_id.as_deref(), Some("F1E2"));
        assert_eq!(world.view(id(&leases[0])).await.done_at, Some(at));

        let of = |numbers: &[usize]| numbers.iter().map(|n| id(&leases[*n])).collect::<BTreeSet<_>>();
        let filter = NotificationFilter::default;
        for (status, expected) in [
            (NotificationStatus::Queued, of(&[5])), (NotificationStatus::Sending, of(&[2])),
            (NotificationStatus::Done, of(&[0, 1, 3, 4])), (NotificationStatus::Scheduled, of(&[])),
            (NotificationStatus::Cancelled, of(&[])),
        ] {
            assert_eq!(found(&world, NotificationFilter { status: Some(status), ..filter() }).await, expected, "{status}");
        }
        for (outcome, expected) in [
            (DeliveryStatus::Accepted, of(&[0, 3, 4])), (DeliveryStatus::Failed, of(&[1])),
            (DeliveryStatus::Pending, of(&[2, 5])), (DeliveryStatus::Unknown, of(&[])),
        ] {
            assert_eq!(found(&world, NotificationFilter { outcome: Some(outcome), ..filter() }).await, expected, "{outcome}");
        }
        let page = PageRequest { cursor: None, limit: 10 };
        let of_status = |n: usize, status| world.store.deliveries(id(&leases[n]), Some(status), &page);
        assert_eq!(of_status(0, DeliveryStatus::Accepted).await.unwrap().unwrap().items.len(), 1);
        assert!(of_status(0, DeliveryStatus::Pending).await.unwrap().unwrap().items.is_empty());
        assert_eq!(of_status(5, DeliveryStatus::Pending).await.unwrap().unwrap().items.len(), 1);
        assert_eq!(world.store.owned(world.replica).await.unwrap(), [leases[5].key]);

        // The last one: then nobody holds any of it.
        world.settle(&leases[5], &with(&leases[5], accepted_at(at)), Disposition::Keep).await;
        assert_eq!(world.number("SELECT COUNT(*) FROM cohorts WHERE holder IS NULL AND open = 0 AND accepted = 2").await, 1);
        world.clock.advance(10 * SECOND);
        let back = claimed(&world).await;
        assert_eq!(back.iter().map(id).collect::<BTreeSet<_>>(), of(&[2]), "and what waits is claimed in its time");
        assert_eq!(back[0].seat, None);
    }

    async fn apps_and_lanes_are_apart_and_what_one_device_is_not_enough_for_has_rows(database) {
        let world = World::on(database).await;
        let names = riders(&world, 2).await;
        world.phone("cc01", Some("both")).await;
        world.phone("cc02", Some("both")).await;
        world.phone_with("cc03", Some("livreur-0"), "fr.ocpizza.client", "alert", "active").await;
        let one = |n: usize| world.submission(users(&[&names[n]]));
        let mut bulk = one(1);
        bulk.notification.lane = Lane::Bulk;
        let mut client = one(0);
        client.notification.topic = "fr.ocpizza.client".parse().unwrap();
        let mut stops = one(1);
        stops.notification.on_unknown = OnUnknown::Stop;
        let later = Submission { own: false, ..one(0) };
        let raw = world.submission(sonnette::domain::notification::Audience::Tokens(vec!["dd01".parse().unwrap()]));
        let group = [one(0), one(1), bulk, client, stops, later, world.submission(users(&["both"])), world.submission(users(&["nobody"])), raw];
        let answers = world.store.accept(&group, world.replica, NOW).await.unwrap();
        let seats: Vec<_> = answers.into_iter().map(|answer| new(answer).1.first().and_then(|lease| lease.seat)).collect();
        assert_eq!(rows(&world).await, (3, 4));
        assert_eq!(seats[0].unwrap().cohort, seats[1].unwrap().cohort);
        assert_eq!([2, 3].map(|n| seats[n].unwrap().number), [0, 0]);
        assert_eq!(seats[4..], [None; 5]);
        let depth = world.store.depth(NOW).await.unwrap();
        let mut counted: Vec<_> = depth.iter().map(|one| (one.topic.as_str(), one.lane.as_number(), one.due)).collect();
        counted.sort_unstable();
        assert_eq!(counted, [("fr.ocpizza.client", 0, 1), ("fr.ocpizza.livreur", 0, 6), ("fr.ocpizza.livreur", 1, 1)]);
    }

    async fn what_is_open_when_its_replica_dies_is_taken_over_and_what_was_settled_stays(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 4).await).await;
        world.settle(&leases[0], &with(&leases[0], accepted_at(NOW)), Disposition::Keep).await;
        let next = world.store.join("two", "0.1.0", NOW).await.unwrap();
        assert!(world.store.bury(world.replica, 0).await.unwrap());
        assert_eq!(rows(&world).await, (1, 3));
        assert!(world.store.owned(world.replica).await.unwrap().is_empty());
        assert_eq!(world.store.next_due_at().await.unwrap(), Some(NOW));

        // It was only asleep: what it settles now changes nothing.
        let done: Vec<_> = leases.iter().map(|lease| with(lease, accepted_at(NOW.plus(SECOND)))).collect();
        let late: Vec<_> = leases.iter().zip(&done).map(|(lease, chunk)| Settled { key: lease.key, epoch: lease.epoch,
            seat: lease.seat, chunk, disposition: Disposition::Keep, effects: &[], unique_ids: &[] }).collect();
        let lost: BTreeSet<_> = world.store.settle(&late, world.replica, NOW).await.unwrap().into_iter().collect();
        assert_eq!(lost, leases.iter().map(|lease| lease.key).collect());
        assert_eq!(world.deliveries(id(&leases[0])).await[0].state, accepted_at(NOW));

        let theirs = world.store.claim(&Lane::ALL, 100, &[], &[], next, NOW).await.unwrap().leases;
        assert_eq!(theirs.iter().map(id).collect::<BTreeSet<_>>(), leases[1..].iter().map(id).collect());
        for lease in &theirs {
            assert_eq!(lease.chunk.targets, leases.iter().find(|one| one.key == lease.key).unwrap().chunk.targets);
            assert!(lease.epoch > 1 << 40 && lease.chunk.states[0].maybe_written, "nobody knows whether it was written");
            assert_eq!(lease.addresses.len(), 1);
            let settled = Settled { key: lease.key, epoch: lease.epoch, seat: lease.seat, chunk: &with(lease, accepted_at(NOW)),
                disposition: Disposition::Keep, effects: &[], unique_ids: &[] };
            assert_eq!(world.store.settle(&[settled], next, NOW).await.unwrap(), []);
        }
        for lease in &leases {
            assert_eq!(world.view(id(lease)).await.counts.accepted, 1);
            world.counts_add_up(id(lease)).await;
        }
    }

    async fn what_one_accepts_that_was_buried_meanwhile_is_nobodys(database) {
        let world = World::on(database).await;
        let names = riders(&world, 3).await;
        let group: Vec<_> = names.iter().map(|name| world.submission(users(&[name]))).collect();
        for answer in world.store.accept(&group, ReplicaId(4_711), NOW).await.unwrap() {
            assert!(matches!(answer.unwrap(), Accepted::New { leases, .. } if leases.is_empty()));
        }
        assert_eq!(world.number("SELECT COUNT(*) FROM cohorts WHERE holder IS NOT NULL").await, 0);
        assert_eq!(claimed(&world).await.len(), 3);
    }

    async fn what_is_held_in_the_name_of_one_who_is_gone_is_set_free(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 3).await).await;
        assert_eq!(world.store.free_orphans(NOW).await.unwrap(), 0);
        world.run("UPDATE cohorts SET holder = 4711").await;
        assert_eq!(world.store.free_orphans(NOW).await.unwrap(), 3);
        assert_eq!(claimed(&world).await.iter().map(id).collect::<BTreeSet<_>>(), leases.iter().map(id).collect());
    }

    async fn one_that_is_cancelled_is_ended_by_whoever_has_it(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 3).await).await;
        let view = world.store.cancel(id(&leases[1]), NOW).await.unwrap().unwrap();
        assert_eq!((view.counts.pending, view.done_at), (1, None), "its replica has it in memory");
        assert_eq!(world.store.cancelled(NOW).await.unwrap(), BTreeSet::from([id(&leases[1])]));
        assert_eq!(rows(&world).await, (1, 1));
        let gone = with(&leases[1], ended(DeliveryStatus::Cancelled, Some(own::CANCELLED), NOW));
        world.settle(&leases[1], &gone, Disposition::Keep).await;
        assert_eq!(world.view(id(&leases[1])).await.status, NotificationStatus::Cancelled);
        assert!(world.store.cancelled(NOW).await.unwrap().is_empty());
        // One that had been accepted stays so.
        world.settle(&leases[0], &with(&leases[0], accepted_at(NOW)), Disposition::Keep).await;
        assert_eq!(world.store.cancel(id(&leases[0]), NOW).await.unwrap().unwrap().status, NotificationStatus::Done);
        assert_eq!(world.view(id(&leases[2])).await.counts.pending, 1, "the others are not touched");
    }

    async fn what_the_operator_holds_is_held_one_by_one(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 3).await).await;
        world.settle(&leases[0], &with(&leases[0], accepted_at(NOW)), Disposition::Keep).await;
        assert_eq!(world.store.hold(NOW).await.unwrap(), 2);
        let waiting = world.view(id(&leases[1])).await.waiting_for.unwrap();
        assert_eq!(waiting.reason, "held");
        assert_eq!(world.store.depth(NOW).await.unwrap()[0].waiting, 2);
        assert!(claimed(&world).await.is_empty());
        assert_eq!(world.store.release_held().await.unwrap(), 2);
        assert_eq!(claimed(&world).await.len(), 2);
    }

    async fn a_settle_whose_commit_was_not_heard_of_is_repeated_and_another_outcome_is_refused(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 2).await).await;
        let chunk = with(&leases[0], accepted_at(NOW));
        for _ in 0..2 {
            world.settle(&leases[0], &chunk, Disposition::Keep).await;
        }
        let other = with(&leases[0], ended(DeliveryStatus::Failed, Some(apple(400, "BadTopic")), NOW));
        let settled = Settled { key: leases[0].key, epoch: leases[0].epoch, seat: leases[0].seat, chunk: &other,
            disposition: Disposition::Keep, effects: &[], unique_ids: &[] };
        assert_eq!(world.store.settle(&[settled], world.replica, NOW).await.unwrap(), [leases[0].key]);
        assert_eq!(world.deliveries(id(&leases[0])).await[0].state, accepted_at(NOW));
        // Nor is anything settled in another's name.
        let settled = Settled { key: leases[1].key, epoch: leases[1].epoch, seat: leases[1].seat, chunk: &with(&leases[1], accepted_at(NOW)),
            disposition: Disposition::Keep, effects: &[], unique_ids: &[] };
        let other = ReplicaId(world.replica.0 + 1);
        assert_eq!(world.store.settle(&[settled], other, NOW).await.unwrap(), [leases[1].key]);
        assert_eq!(world.deliveries(id(&leases[1])).await[0].state, State::PENDING);
    }

    async fn an_outcome_from_before_the_clock_was_set_back_is_kept_as_it_is(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 2).await).await;
        for (lease, at) in leases.iter().zip([NOW.minus(SECOND), NOW.plus(400 * 24 * 3_600 * SECOND)]) {
            world.settle(lease, &with(lease, accepted_at(at)), Disposition::Keep).await;
            assert_eq!(world.deliveries(id(lease)).await[0].state.at, Some(at));
        }
        assert_eq!(rows(&world).await, (1, 2));
    }

    async fn a_damaged_one_is_an_error_and_its_work_is_held_by_whoever_claims_it(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 2).await).await;
        let last = leases.iter().max_by_key(|lease| lease.seat.unwrap().number).unwrap();
        let page = PageRequest { cursor: None, limit: 10 };
        world.run("UPDATE cohorts SET seats = X'000000000000'").await;
        let error = world.store.notification(id(last)).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { table: "cohorts", column: "seats", .. }), "{error}");
        let error = world.store.deliveries(id(last), None, &page).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { table: "cohorts", .. }), "{error}");
        world.run("UPDATE cohorts SET seats = X'0000000000000000', targets = X'0903'").await;
        let error = world.store.deliveries(id(last), None, &page).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { table: "cohorts", column: "targets", .. }), "{error}");
        world.store.hold(NOW).await.unwrap();
        world.store.release_held().await.unwrap();
        let more = accepted_together(&world, &["livreur-0".to_owned(), "livreur-1".to_owned()]).await;
        world.run(&format!("UPDATE cohorts SET seats = X'00' WHERE id = X'{}'", more[0].seat.unwrap().cohort.as_uuid().simple())).await;
        let walked = world.store.sweep(Subject::Notifications, &Place::default(), NOW, world.replica).await.unwrap().unwrap();
        assert!(walked.deleted.iter().all(|(_, rows)| *rows == 0), "what cannot be read stays");
        world.store.leave(world.replica).await.unwrap();
        let next = world.store.join("two", "0.1.0", NOW).await.unwrap();
        assert!(world.store.claim(&Lane::ALL, 9, &[], &[], next, NOW).await.unwrap().leases.is_empty());
        assert_eq!(world.store.depth(NOW).await.unwrap()[0].waiting, 4, "kept, and it shows");
    }

    async fn of_one_that_dies_all_are_found_and_none_of_another_whose_ids_lie_between(database) {
        let world = World::on(database).await;
        let names = riders(&world, 8).await;
        let other = world.store.join("two", "0.1.0", NOW).await.unwrap();
        let mut groups = [Vec::new(), Vec::new()];
        for (n, name) in names.iter().enumerate() {
            world.clock.advance(Duration::from_millis(1));
            groups[n % 2].push(world.submission(users(&[name])));
        }
        let ids = |group: &[Submission]| group.iter().map(|one| one.notification.id).collect::<BTreeSet<_>>();
        let owned = async |replica| {
            let keys = world.store.owned(replica).await.unwrap();
            keys.into_iter().map(|key| key.notification).collect::<BTreeSet<_>>()
        };
        for (group, replica) in groups.iter().zip([world.replica, other]) {
            world.store.accept(group, replica, world.now()).await.unwrap();
            assert_eq!(owned(replica).await, ids(group));
        }
        let queued = NotificationFilter { status: Some(NotificationStatus::Queued), ..NotificationFilter::default() };
        assert_eq!(found(&world, queued).await.len(), 8);
        assert!(world.store.bury(world.replica, 0).await.unwrap());
        assert_eq!(owned(other).await, ids(&groups[1]));
        let claimed = world.store.claim(&Lane::ALL, 100, &[], &[], other, world.now()).await.unwrap().leases;
        assert_eq!(claimed.iter().map(id).collect::<BTreeSet<_>>(), ids(&groups[0]));
    }

    async fn one_whose_last_is_not_known_is_complete_and_stays_while_anything_is_left_that_could_be_in_it(database) {
        let world = World::on(database).await;
        let names = riders(&world, 3).await;
        let end = async |lease: &Lease| world.settle(lease, &with(lease, accepted_at(world.now())), Disposition::Keep).await;
        let swept = async |subject| {
            let swept = world.store.sweep(subject, &Place::default(), world.now(), world.replica).await.unwrap().unwrap();
            swept.deleted.iter().map(|(_, rows)| rows).sum::<u64>()
        };
        let leases = accepted_together(&world, &names).await;
        world.run("UPDATE cohorts SET last = NULL").await;
        assert_eq!(world.store.owned(world.replica).await.unwrap().len(), 3);
        for lease in &leases {
            end(lease).await;
        }
        world.clock.advance(3_600 * SECOND);
        let later = accepted_together(&world, &names[..1]).await;
        assert_eq!((swept(Subject::Notifications).await, swept(Subject::Cohorts).await), (3, 0), "a member may be later by a clock");
        end(&later[0]).await;
        world.clock.advance(48 * 3_600 * SECOND);
        let latest = accepted_together(&world, &names[..1]).await;
        world.run(&format!("UPDATE cohorts SET last = NULL WHERE id = X'{}'", id(&latest[0]).as_uuid().simple())).await;
        assert_eq!((swept(Subject::Notifications).await, swept(Subject::Cohorts).await), (1, 2));
        assert_eq!(rows(&world).await, (1, 0));
        let open = accepted_together(&world, &names).await;
        assert_eq!(world.store.hold(world.now()).await.unwrap(), 4, "of those that are open nothing is missed either");
        assert_eq!(open.len(), 3);
    }

    async fn a_cohort_goes_with_the_last_of_its_notifications(database) {
        let world = World::on(database).await;
        let leases = accepted_together(&world, &riders(&world, 3).await).await;
        let end = async |n: usize| world.settle(&leases[n], &with(&leases[n], accepted_at(world.now())), Disposition::Keep).await;
        end(0).await;
        let first = world.now();
        world.clock.advance(3_600 * SECOND);
        end(1).await;
        let second = world.now();
        world.clock.advance(3_600 * SECOND);
        let sweep = async |subject, until| {
            let swept = world.store.sweep(subject, &Place::default(), until, world.replica).await.unwrap().unwrap();
            swept.deleted.into_iter().find(|(table, _)| *table == "notifications" || *table == "cohorts").map_or(0, |(_, rows)| rows)
        };
        for (until, expected) in [(first, 1), (second, 1), (world.now(), 0)] {
            assert_eq!(sweep(Subject::Notifications, until).await, expected, "what is open stays");
            assert_eq!(sweep(Subject::Cohorts, until).await, 0);
        }
        assert_eq!(found(&world, NotificationFilter { topic: Some(topic()), ..NotificationFilter::default() }).await,
            BTreeSet::from([id(&leases[2])]));
        end(2).await;
        assert_eq!(sweep(Subject::Notifications, world.now()).await, 1);
        assert_eq!(sweep(Subject::Cohorts, world.now()).await, 1);
        assert_eq!(rows(&world).await, (0, 0));
    }
}
