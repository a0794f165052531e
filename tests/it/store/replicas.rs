//! Who is alive, and what becomes of the work of those who are not.

use sonnette::{
    domain::{
        outcome::{Fault, Reason},
        topic::Environment,
    },
    store::ReplicaId,
};

use super::{NOW, chunk, execute, number, store};
use crate::support::database::on_both_stores;

on_both_stores! {
    async fn a_replica_whose_counter_moved_is_not_buried(database) {
        let store = store(&database).await;
        let living = store.join("pod-1/17", "0.1.0", NOW).await.unwrap();
        let observer = store.join("pod-2/18", "0.1.0", NOW).await.unwrap();
        assert_ne!(living, observer);
        let seen = store.replicas().await.unwrap().into_iter().find(|r| r.id == living).unwrap();
        assert_eq!((seen.name.as_str(), seen.version.as_str(), seen.started_at), ("pod-1/17", "0.1.0", NOW));

        execute(&database, &[&chunk(1, living.0)]).await;
        assert!(store.beat(living).await.unwrap());
        assert!(!store.bury(living, seen.beat).await.unwrap(), "its counter moved since it was seen");
        assert!(store.beat(living).await.unwrap());
        assert_eq!(number(&database, "SELECT holder FROM chunks").await, living.0);
    }

    async fn the_work_of_a_buried_replica_is_nobodys_with_a_higher_epoch(database) {
        let store = store(&database).await;
        let dead = store.join("dead", "0.1.0", NOW).await.unwrap();
        let other = store.join("other", "0.1.0", NOW).await.unwrap();
        execute(&database, &[&chunk(1, dead.0), &chunk(2, other.0)]).await;
        let beat = store.replicas().await.unwrap()[0].beat;

        assert!(store.bury(dead, beat).await.unwrap());
        assert!(!store.bury(dead, beat).await.unwrap(), "once");
        assert!(!store.beat(dead).await.unwrap(), "it learns that it is dead");
        assert_eq!(number(&database, "SELECT epoch FROM chunks WHERE holder = 0").await, 8);
        assert_eq!(number(&database, &format!("SELECT epoch FROM chunks WHERE holder = {}", other.0)).await, 7);
    }

    async fn one_that_leaves_gives_everything_back(database) {
        let store = store(&database).await;
        let leaving = store.join("leaving", "0.1.0", NOW).await.unwrap();
        execute(&database, &[&chunk(1, leaving.0)]).await;
        store.leave(leaving).await.unwrap();
        store.leave(leaving).await.unwrap();
        store.leave(ReplicaId(4711)).await.unwrap();
        assert_eq!(number(&database, "SELECT epoch FROM chunks WHERE holder = 0").await, 8);
        assert!(store.replicas().await.unwrap().is_empty());
        assert_ne!(store.join("next", "0.1.0", NOW).await.unwrap(), leaving, "a number is not used again");
    }

    async fn of_many_that_bury_one_replica_one_does(database) {
        let store = store(&database).await;
        let dead = store.join("dead", "0.1.0", NOW).await.unwrap();
        let all = futures_util::future::join_all((0..8).map(|_| store.bury(dead, 0))).await;
        assert_eq!(all.into_iter().filter(|buried| *buried.as_ref().unwrap()).count(), 1);
    }

    async fn work_that_bears_the_name_of_nobody_who_is_there_is_free_again(database) {
        let store = store(&database).await;
        let living = store.join("living", "0.1.0", NOW).await.unwrap();
        let fault = Fault { status: 403, reason: Reason::InvalidProviderToken };
        let topic = "fr.ocpizza.livreur".parse().unwrap();
        let open = store.open_breaker(&topic, Environment::Production, "key", &fault, NOW, NOW).await.unwrap();
        assert_eq!(store.free_orphans(NOW).await.unwrap(), 0);
        // As if it had been taken on while its replica was buried, or parked while its breaker closed.
        let gone = [living.0 + 1, -(1_000 + open.0 + 1)];
        let there = [living.0, -(1_000 + open.0), 0, -1];
        for (number, holder) in (1..).zip(gone.into_iter().chain(there)) {
            execute(&database, &[&chunk(number, holder)]).await;
        }
        assert_eq!(store.free_orphans(NOW).await.unwrap(), 2);
        assert_eq!(number(&database, "SELECT COUNT(*) FROM chunks WHERE holder = 0 AND epoch = 8").await, 2);
        for holder in there {
            assert_eq!(number(&database, &format!("SELECT COUNT(*) FROM chunks WHERE holder = {holder} AND epoch = 7")).await, 1);
        }
        assert_eq!(store.free_orphans(NOW).await.unwrap(), 0);
    }
}
