//! Opening, locking, probing, and what errors say.

use std::sync::Arc;

use sonnette::{
    domain::clock::SystemClock,
    store::{DeviceFilter, Kind, PageRequest, Role, Store, StoreError, open},
};

use super::{NOW, later, settings, store, try_open};
use crate::support::{
    database::{PrivateServer, Store as Which, on_both_stores, sqlite_database},
    waiting::within,
};

on_both_stores! {
    async fn it_says_what_it_is_and_that_it_commits(database) {
        let store = store(&database).await;
        let (kind, name) = match database.store() {
            Which::Sqlite => (Kind::Sqlite, "SQLite 3."),
            Which::Mysql => (Kind::Mysql, "M"),
        };
        assert_eq!(store.kind(), kind);
        assert!(store.server().await.unwrap().starts_with(name));
        store.probe(NOW).await.unwrap();
        store.probe(later(1)).await.unwrap();
        store.close().await;
        assert!(matches!(store.probe(NOW).await, Err(StoreError::Unavailable(_))));
    }

    async fn a_shared_secret_is_one_for_all_who_ask_at_once(database) {
        let first = store(&database).await;
        let second = try_open(&database).await.unwrap();
        let fresh: Vec<_> = (0..8u8).map(|n| vec![n; 32]).collect();
        let asked = fresh.iter().zip([&first, &second].into_iter().cycle());
        let all = futures_util::future::join_all(asked.map(|(fresh, store)| store.shared_secret("identity", fresh))).await;
        let kept: std::collections::BTreeSet<_> = all.into_iter().map(Result::unwrap).collect();
        assert_eq!(kept.len(), 1);
        assert_eq!(second.shared_secret("identity", b"late").await.unwrap(), *kept.first().unwrap());
    }

    async fn what_is_cut_off_wherever_it_is_costs_no_connection_and_leaves_nothing_in_it(database) {
        is_not_harmed_by_what_is_cut_off(&*store(&database).await).await;
    }
}

/// A caller who hangs up, a service that stops: what they were about is cut, and what the server had half answered, or
/// a transaction that had just begun, is still in the line.
pub(crate) async fn is_not_harmed_by_what_is_cut_off(store: &dyn Store) {
    let many: Vec<_> = (0..1_000).map(|n| super::devices::registration(&format!("{n:04x}"))).collect();
    for some in many.chunks(250) {
        store.register(some, NOW).await.unwrap();
    }
    let (filter, page) = (DeviceFilter::default(), PageRequest { cursor: None, limit: 1_000 });
    for polls in (0..400).step_by(3) {
        cut_after(polls, store.devices(&filter, &page)).await;
        cut_after(polls, store.probe(NOW)).await;
    }
    let all = async {
        let reads = futures_util::future::join_all((0..32).map(|_| store.devices(&filter, &page)));
        let writes = futures_util::future::join_all((0..32).map(|_| store.probe(NOW)));
        let (reads, writes) = tokio::join!(reads, writes);
        assert!(reads.iter().all(|read| read.as_ref().unwrap().items.len() == 1_000));
        assert!(writes.iter().all(Result::is_ok), "{writes:?}");
        store.close().await;
    };
    within("every connection to come back", all).await;
}

async fn cut_after(polls: usize, statement: impl Future) {
    let mut statement = std::pin::pin!(statement);
    for _ in 0..polls {
        if futures_util::poll!(&mut statement).is_ready() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn one_serve_has_the_file_and_the_command_line_may_write_beside_it() {
    let database = sqlite_database();
    let clock = Arc::new(SystemClock::new());
    let serving = open(&settings(database.url()), Role::Serve, clock.clone()).await.unwrap();
    serving.migrate().await.unwrap();
    let path = database.url().strip_prefix("sqlite://").unwrap();
    let alias = format!("{path}.alias");
    std::os::unix::fs::symlink(path, &alias).unwrap();
    for url in [database.url(), &format!("sqlite://{alias}")] {
        let second = open(&settings(url), Role::Serve, clock.clone()).await;
        assert!(matches!(second.err(), Some(StoreError::Locked(_))), "{url}");
    }
    let beside = try_open(&database).await.unwrap();
    beside.register(&[super::devices::registration("a1")], NOW).await.unwrap();

    serving.close().await;
    drop(serving);
    open(&settings(database.url()), Role::Serve, clock).await.expect("the lock goes with its holder");
}

#[cfg(unix)]
#[tokio::test]
async fn the_file_and_its_companions_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;

    let database = sqlite_database();
    let _store = store(&database).await;
    let path = database.url().strip_prefix("sqlite://").unwrap();
    for name in [path.to_owned(), format!("{path}-wal"), format!("{path}-shm")] {
        let mode = std::fs::metadata(&name).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn hosts_are_tried_in_their_order() {
    let mut server = PrivateServer::start().await;
    let database = server.database().await;
    let both = database.url().replace("127.0.0.1", "127.0.0.1:1,127.0.0.1");
    let store = open(&settings(&both), Role::Serve, Arc::new(SystemClock::new())).await.unwrap();
    store.migrate().await.unwrap();

    server.kill();
    assert!(matches!(store.probe(NOW).await, Err(StoreError::Unavailable(_) | StoreError::CommitUnknown(_))));
    let nobody = open(&settings(database.url()), Role::Serve, Arc::new(SystemClock::new())).await.err().unwrap();
    assert!(matches!(nobody, StoreError::Unavailable(_)), "{nobody:?}");
    server.restart().await;
    crate::store::eventually("a commit is made again", async || store.probe(NOW).await.is_ok()).await;
}

#[tokio::test]
async fn a_server_that_hangs_is_unavailable_and_used_again_when_it_goes_on() {
    let server = PrivateServer::start().await;
    let database = server.database().await;
    let store = store(&database).await;
    store.probe(NOW).await.unwrap();
    server.freeze();
    let started = std::time::Instant::now();
    let (write, read) = tokio::join!(store.probe(NOW), store.api_keys());
    assert!(matches!(write, Err(StoreError::Unavailable(_) | StoreError::CommitUnknown(_))), "{write:?}");
    assert!(matches!(read, Err(StoreError::Unavailable(_))));
    assert!(started.elapsed() < std::time::Duration::from_secs(25), "a deadline, not a hope");
    server.thaw();
    crate::store::eventually("a commit is made again", async || store.probe(NOW).await.is_ok()).await;
}
