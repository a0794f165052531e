//! Breakers: opened once, probed by one, and what waits goes on when they close.

use sonnette::{
    domain::{
        outcome::{Fault, Reason},
        topic::{Environment, Topic},
    },
    store::BreakerId,
};

use super::{NOW, chunk, execute, later, number, store};
use crate::support::database::on_both_stores;

fn topic() -> Topic {
    "fr.ocpizza.livreur".parse().unwrap()
}

fn fault(reason: Reason) -> Fault {
    Fault { status: 403, reason }
}

on_both_stores! {
    async fn one_that_is_open_stays_as_it_is_and_counts_the_probes_that_fail(database) {
        let store = store(&database).await;
        let (topic, reason) = (topic(), Reason::Other("x".repeat(300).into()));
        let open = |now, fault| {
            let (store, topic) = (&store, &topic);
            async move { store.open_breaker(topic, Environment::Production, "abc", &fault, now, later(60)).await.unwrap() }
        };
        let id = open(NOW, fault(Reason::InvalidProviderToken)).await;
        assert_eq!(open(later(5), fault(Reason::TopicDisallowed)).await, id);
        let other = store
            .open_breaker(&topic, Environment::Sandbox, "abc", &fault(Reason::TopicDisallowed), NOW, later(60))
            .await
            .unwrap();
        assert_ne!(other, id, "another environment is another breaker");

        let found = async |id| store.breakers().await.unwrap().into_iter().find(|breaker| breaker.id == id).unwrap();
        let as_opened = found(id).await;
        assert_eq!((as_opened.topic, as_opened.environment, as_opened.fingerprint.as_str()), (topic.clone(), Environment::Production, "abc"));
        assert_eq!((as_opened.opened_at, as_opened.next_probe_at, as_opened.probes, as_opened.parked), (NOW, later(60), 0, 0));
        assert_eq!(as_opened.fault.reason, Reason::InvalidProviderToken);

        store.probe_failed(id, &fault(reason)).await.unwrap();
        let probed = found(id).await;
        assert_eq!((probed.opened_at, probed.next_probe_at, probed.probes), (NOW, later(60), 1));
        assert_eq!(probed.fault.reason.as_str().len(), 128, "a reason of any length is kept in part");
        assert_eq!(found(other).await.probes, 0);
        store.close_breaker(id, NOW).await.unwrap();
        store.probe_failed(id, &fault(Reason::InvalidProviderToken)).await.unwrap();
        assert_eq!(store.breakers().await.unwrap().len(), 1, "one that has closed stays closed");
    }

    async fn many_that_open_it_at_once_open_one(database) {
        let store = store(&database).await;
        let (topic, fault) = (topic(), fault(Reason::InvalidProviderToken));
        let all = futures_util::future::join_all(
            (0..8).map(|_| store.open_breaker(&topic, Environment::Production, "abc", &fault, NOW, later(60))),
        )
        .await;
        let ids: std::collections::BTreeSet<_> = all.into_iter().map(Result::unwrap).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(store.breakers().await.unwrap()[0].probes, 0, "and none of them was a probe");
    }

    async fn of_many_replicas_one_is_elected_to_probe(database) {
        let store = store(&database).await;
        let id = store
            .open_breaker(&topic(), Environment::Production, "abc", &fault(Reason::InvalidProviderToken), NOW, later(60))
            .await
            .unwrap();
        assert!(!store.elect_probe(id, later(59), later(120)).await.unwrap(), "not yet");
        for round in 1..=5 {
            let all = futures_util::future::join_all(
                (0..8).map(|_| store.elect_probe(id, later(60 * round), later(60 * (round + 1)))),
            )
            .await;
            assert_eq!(all.into_iter().filter(|elected| *elected.as_ref().unwrap()).count(), 1);
        }
        assert!(!store.elect_probe(BreakerId(4711), later(9_999), later(99_999)).await.unwrap());
    }

    async fn what_waits_for_it_goes_on_when_it_closes(database) {
        let store = store(&database).await;
        let id = store
            .open_breaker(&topic(), Environment::Production, "abc", &fault(Reason::InvalidProviderToken), NOW, later(60))
            .await
            .unwrap();
        execute(&database, &[&chunk(1, -(1_000 + id.0)), &chunk(2, -(1_000 + id.0)), &chunk(3, -(1_001 + id.0)), &chunk(4, -1)]).await;
        assert_eq!(store.breakers().await.unwrap()[0].parked, 2);

        store.close_breaker(id, NOW).await.unwrap();
        store.close_breaker(id, NOW).await.unwrap();
        assert!(store.breakers().await.unwrap().is_empty());
        assert_eq!(number(&database, "SELECT COUNT(*) FROM chunks WHERE holder = 0 AND waiting_since IS NULL AND epoch = 8").await, 2);
        assert_eq!(number(&database, "SELECT COUNT(*) FROM chunks WHERE holder < 0 AND waiting_since = 5 AND epoch = 7").await, 2);
    }
}
