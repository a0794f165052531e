//! Sizes, from the environment.

use std::fmt;

/// How much of everything.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Settings {
    /// `ROUNDS`
    pub(crate) rounds: usize,
    /// `PUSHES`: of each yardstick client, in each round.
    pub(crate) pushes: usize,
    /// `NOTIFICATIONS`: single notifications, each with a POST of its own, on each store, in each round.
    pub(crate) notifications: usize,
    /// `DEVICES` that are registered, each of a user of its own.
    pub(crate) devices: usize,
    /// `CONCURRENCY`: requests to the API at once.
    pub(crate) concurrency: usize,
    /// `COMMITS` of the commit yardstick with 32 connections; an eighth of it with one.
    pub(crate) commits: usize,
    /// `REGISTRATIONS`: of new devices, and the same again of devices that are known by then, on each store, in each
    /// round; as many upserts; 0 leaves them out.
    pub(crate) registrations: usize,
    /// `BROADCAST`: devices of a broadcast, on each store; 0 leaves broadcasts out.
    pub(crate) broadcast: usize,
    /// `REPLICAS_NOTIFICATIONS`: single notifications through one replica and through two, on MySQL, in each round, and
    /// again with APNs 50 ms away, where broadcasts to `BROADCAST` devices follow; 0 leaves replicas out.
    pub(crate) replicas_notifications: usize,
    /// `RETENTION`: old notifications that are deleted beside single ones, on MySQL, in the first round; 0 leaves them out.
    pub(crate) retention: usize,
    /// `STORES`: `mysql`, `sqlite`, or both with a comma; `none` measures the way to APNs alone.
    pub(crate) mysql: bool,
    /// As above.
    pub(crate) sqlite: bool,
    /// `BENCH_DATABASE_URL`: a server to use instead of one of our own. It holds a password: not shown.
    #[serde(skip)]
    pub(crate) database_url: Option<String>,
}

impl Settings {
    pub(crate) fn read() -> Self {
        let stores = variable("STORES").unwrap_or_else(|| "mysql,sqlite".to_owned());
        for store in stores.split(',') {
            let known = ["mysql", "sqlite", "none"].contains(&store);
            assert!(known, "STORES: `{store}` is neither `mysql` nor `sqlite` nor `none`");
        }
        Self {
            rounds: number("ROUNDS", 5),
            pushes: number("PUSHES", 100_000),
            notifications: number("NOTIFICATIONS", 10_000),
            devices: number("DEVICES", 1_000),
            concurrency: number("CONCURRENCY", 512),
            commits: number("COMMITS", 8_000),
            registrations: number_or_none("REGISTRATIONS", 20_000),
            broadcast: number_or_none("BROADCAST", 100_000),
            replicas_notifications: number_or_none("REPLICAS_NOTIFICATIONS", 10_000),
            retention: number_or_none("RETENTION", 200_000),
            mysql: stores.contains("mysql"),
            sqlite: stores.contains("sqlite"),
            database_url: variable("BENCH_DATABASE_URL"),
        }
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ROUNDS={} PUSHES={} NOTIFICATIONS={} DEVICES={} CONCURRENCY={} COMMITS={} REGISTRATIONS={} BROADCAST={} \
             REPLICAS_NOTIFICATIONS={} RETENTION={}",
            self.rounds,
            self.pushes,
            self.notifications,
            self.devices,
            self.concurrency,
            self.commits,
            self.registrations,
            self.broadcast,
            self.replicas_notifications,
            self.retention
        )
    }
}

fn number(name: &str, default: usize) -> usize {
    let number = number_or_none(name, default);
    assert!(number > 0, "{name}: it cannot be left out");
    number
}

fn number_or_none(name: &str, default: usize) -> usize {
    let Some(value) = variable(name) else { return default };
    value.parse().unwrap_or_else(|_| panic!("{name}: `{value}` is no number"))
}

fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the bench's own settings, not the service's")]
    let value = std::env::var(name);
    value.ok().filter(|value| !value.is_empty())
}
