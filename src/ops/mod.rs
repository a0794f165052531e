//! Health and metrics: how everything stands, what it means, and what to do.
//!
//! Promises: `fail` only if a new request could not be kept; a breaker, APNs out of reach, or held work fail their own
//! check and the whole is `warn`. Each check says what it means and what to do. Looking costs the database at most one
//! round a second, however many ask.

pub mod clock;
pub mod keeper;
pub mod schema;

use std::{fmt::Write as _, sync::Arc, time::Duration};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Mutex;

use crate::{
    apns::{Gateway, RouteReport},
    domain::{
        clock::{Clock, Timestamp},
        notification::Lane,
    },
    store::{
        Breaker, Holding, QueueDepth, Replica, ReplicaId, SchemaState, Store, StoreError, intake::Identity,
        retention::Sizes,
    },
    telemetry::names,
};

/// How a check, or the whole, stands. Words of `application/health+json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Healthy.
    Pass,
    /// Somebody should look.
    Warn,
    /// It does not work.
    Fail,
}

impl Status {
    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone)]
pub struct Check {
    /// Component and measurement, such as `database:commit`.
    pub name: String,
    /// Which of several, such as an app and environment.
    pub component: Option<String>,
    /// How it stands.
    pub status: Status,
    /// What was seen.
    pub observed: Option<String>,
    /// What it means.
    pub output: String,
    /// What to do; empty when nothing.
    pub advice: String,
    /// When it was looked at.
    pub time: Timestamp,
}

/// Everything that was looked at.
#[derive(Debug, Clone)]
pub struct Report {
    /// The whole.
    pub status: Status,
    /// Of this binary.
    pub version: &'static str,
    /// Each check.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether a new request would be accepted and kept.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status != Status::Fail
    }
}

/// How long a report is shown again before anybody looks anew.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// How long the database may take for a look.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long a round of housekeeping may be over before somebody should look.
const HOUSE_LATE: Duration = Duration::from_secs(6 * 3600);

/// How long sizes are shown again before anybody measures anew.
const SIZES_FRESH_FOR: Duration = Duration::from_secs(600);

/// How long the oldest due work of a lane may wait before somebody should look.
const fn patience_of(lane: Lane) -> Duration {
    match lane {
        Lane::Transactional => Duration::from_secs(30),
        Lane::Bulk => Duration::from_secs(600),
    }
}

/// Looks at everything.
pub struct Health {
    store: Arc<dyn Store>,
    gateway: Arc<dyn Gateway>,
    clock: Arc<dyn Clock>,
    /// Which replica this is.
    identity: Identity,
    /// What was suspicious about the configuration at start.
    warnings: Vec<String>,
    prometheus: PrometheusHandle,
    last: Mutex<Option<(Duration, Report)>>,
    /// When this process began to look, and so the earliest time since which housekeeping can be late.
    since: Timestamp,
    /// When sizes were measured last, or were tried to be.
    measured_at: Mutex<Option<Duration>>,
}

/// What one look at the database found.
struct Seen {
    schema: SchemaState,
    server: String,
    breakers: Vec<Breaker>,
    depth: Vec<QueueDepth>,
    replicas: Vec<Replica>,
    holdings: Vec<Holding>,
    /// Whatever was due then has been deleted.
    house_kept_at: Option<Timestamp>,
}

impl Health {
    /// Nothing is looked at until somebody asks.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        gateway: Arc<dyn Gateway>,
        clock: Arc<dyn Clock>,
        identity: Identity,
        warnings: Vec<String>,
        prometheus: PrometheusHandle,
    ) -> Self {
        let since = clock.now();
        let (last, measured_at) = (Mutex::new(None), Mutex::new(None));
        Self { store, gateway, clock, identity, warnings, prometheus, last, since, measured_at }
    }

    /// How everything stands, at most a second old.
    pub async fn report(&self) -> Report {
        let mut last = self.last.lock().await;
        let now = self.clock.monotonic();
        if let Some((at, report)) = &*last
            && now.saturating_sub(*at) < FRESH_FOR
        {
            return report.clone();
        }
        let report = self.look().await;
        *last = Some((now, report.clone()));
        report
    }

    /// Metrics in Prometheus' text format.
    pub async fn metrics(&self) -> String {
        // The report's look also sets the gauges.
        let report = self.report().await;
        metrics::gauge!(names::BUILD_INFO, "version" => report.version).set(1.0);
        let up = f64::from(u8::from(report.is_ready()));
        metrics::gauge!(names::DATABASE_UP).set(up);
        if report.is_ready() {
            self.measure().await;
        }
        self.prometheus.run_upkeep();
        self.prometheus.render()
    }

    /// Sets the gauges of sizes, unless that was done a short time ago. What the database does not say in time is shown
    /// as it was.
    async fn measure(&self) {
        let mut measured_at = self.measured_at.lock().await;
        let now = self.clock.monotonic();
        if measured_at.is_some_and(|at| now.saturating_sub(at) < SIZES_FRESH_FOR) {
            return;
        }
        *measured_at = Some(now);
        let sizes = tokio::select! {
            sizes = self.store.sizes() => sizes,
            () = self.clock.sleep(PATIENCE) => Err(StoreError::Unavailable("no answer within 3 seconds".into())),
        };
        match sizes {
            Ok(sizes) => size_gauges(&sizes),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "tables could not be measured"),
        }
    }

    async fn look(&self) -> Report {
        let now = self.clock.now();
        let mut checks = Vec::new();
        let began = self.clock.monotonic();
        let probe = tokio::select! {
            probe = self.store.probe(now) => probe,
            () = self.clock.sleep(PATIENCE) => Err(StoreError::Unavailable("no answer within 3 seconds".into())),
        };
        let took = self.clock.monotonic().saturating_sub(began);
        match &probe {
            Ok(()) => checks.push(pass("database:commit", None, now, "a request can be kept", Some(format!("{} ms", took.as_millis())))),
            Err(error) => checks.push(Check {
                name: "database:commit".into(),
                component: None,
                status: Status::Fail,
                observed: None,
                output: format!("nothing can be kept: {}", chain(error)),
                advice: "Check that the database of `database.url` runs, can be reached, has disk space and takes writes. Requests get 503 until then; what was accepted is safe and leaves once the database is back.".into(),
                time: now,
            }),
        }
        let routes = self.gateway.report();
        if probe.is_ok() {
            let seen = tokio::select! {
                seen = self.see(now) => seen,
                () = self.clock.sleep(PATIENCE) => Err(StoreError::Unavailable("no answer within 3 seconds".into())),
            };
            match seen {
                Ok(seen) => {
                    Self::judge(&seen, now, &mut checks);
                    checks.push(self.judge_house(&seen, now));
                    gauges(&seen, &routes, now);
                    replica_gauges(&seen, self.identity.get());
                    let kept_at = seen.house_kept_at.unwrap_or(self.since);
                    metrics::gauge!(names::RETENTION_BEHIND).set(now.since(kept_at).as_secs_f64());
                }
                Err(error) => checks.push(Check {
                    name: "database:read".into(),
                    component: None,
                    status: Status::Fail,
                    observed: None,
                    output: format!("the database does not answer questions: {}", chain(&error)),
                    advice: "Look at the database's own log and load. Requests are still kept.".into(),
                    time: now,
                }),
            }
        }
        judge_routes(&routes, now, &mut checks);
        if !routes.is_empty() {
            checks.push(clock::check(&routes, now));
        }
        for warning in &self.warnings {
            checks.push(Check {
                name: "configuration:secrets".into(),
                component: None,
                status: Status::Warn,
                observed: None,
                output: warning.clone(),
                advice: "See the sentence itself; it is looked at when the service starts.".into(),
                time: now,
            });
        }
        // Only what keeps a request from being kept fails the whole.
        let status = if checks.iter().any(|c| c.status == Status::Fail && c.name == "database:commit") {
            Status::Fail
        } else if checks.iter().any(|c| c.status != Status::Pass) {
            Status::Warn
        } else {
            Status::Pass
        };
        Report { status, version: env!("CARGO_PKG_VERSION"), checks }
    }

    async fn see(&self, now: Timestamp) -> Result<Seen, StoreError> {
        Ok(Seen {
            schema: self.store.schema().await?,
            server: self.store.server().await?,
            breakers: self.store.breakers().await?,
            depth: self.store.depth(now).await?,
            replicas: self.store.replicas().await?,
            holdings: self.store.holdings().await?,
            house_kept_at: self.store.house_kept_at().await?,
        })
    }

    fn judge_house(&self, seen: &Seen, now: Timestamp) -> Check {
        // Not since before this process: a service that was stopped for a week is given time to catch up.
        let kept_at = seen.house_kept_at.map_or(self.since, |at| at.max(self.since));
        let late = now.since(kept_at) > HOUSE_LATE;
        let last = seen.house_kept_at.map_or_else(
            || "housekeeping has not come to its end yet".to_owned(),
            |at| format!("what was due by {at} has been deleted"),
        );
        Check {
            name: "retention:behind".into(),
            component: None,
            status: if late { Status::Warn } else { Status::Pass },
            observed: Some(format!("{} s", now.since(seen.house_kept_at.unwrap_or(self.since)).as_secs())),
            output: last,
            advice: if late {
                "More is due than is deleted, or deleting fails: look at the log for `could not all be deleted`, at sonnette_retention_deleted_total and sonnette_table_rows in /metrics, and at the database's load. Nothing is lost; the tables grow.".into()
            } else {
                String::new()
            },
            time: now,
        }
    }

    fn judge(seen: &Seen, now: Timestamp, checks: &mut Vec<Check>) {
        let behind = seen.schema.version < seen.schema.known;
        checks.push(Check {
            name: "database:migrations".into(),
            component: None,
            status: if behind { Status::Warn } else { Status::Pass },
            observed: Some(format!("{} of {}", seen.schema.version, seen.schema.known)),
            output: format!("the schema of {}", seen.server),
            advice: if behind { "Run `sonnette migrate`.".into() } else { String::new() },
            time: now,
        });
        for breaker in &seen.breakers {
            if breaker.is_pause() {
                checks.push(paused(breaker, now));
                continue;
            }
            checks.push(broken(breaker, now));
        }
        for lane in Lane::ALL {
            let oldest = seen.depth.iter().filter(|d| d.lane == lane).filter_map(|d| d.oldest_due_at).min();
            let age = oldest.map_or(Duration::ZERO, |at| now.since(at));
            let late = age > patience_of(lane);
            let due: u64 = seen.depth.iter().filter(|d| d.lane == lane).map(|d| d.due).sum();
            checks.push(Check {
                name: "queue:oldest_due".into(),
                component: Some(lane.as_str().into()),
                status: if late { Status::Warn } else { Status::Pass },
                observed: Some(format!("{} s", age.as_secs())),
                output: format!("{due} pieces of work are due"),
                advice: if late {
                    "Work waits longer than it should: look at the other checks, at APNs' answers in /metrics, and at the load of this machine and of the database.".into()
                } else {
                    String::new()
                },
                time: now,
            });
        }
        let parked: u64 = seen.breakers.iter().map(|b| b.parked).sum();
        let waiting: u64 = seen.depth.iter().map(|d| d.waiting).sum();
        if waiting > parked {
            checks.push(Check {
                name: "queue:held".into(),
                component: None,
                status: Status::Warn,
                observed: Some((waiting - parked).to_string()),
                output: "work is held: it was open when the service was started with --hold, or in a backup".into(),
                advice: "`sonnette held release` lets it go on.".into(),
                time: now,
            });
        }
        checks.push(pass(
            "replicas:alive",
            None,
            now,
            "replicas that share this database",
            Some(seen.replicas.len().to_string()),
        ));
        for replica in &seen.replicas {
            let (chunks, devices) = seen.held_by(replica.id);
            checks.push(pass(
                "replicas:work",
                Some(replica.name.clone()),
                now,
                &format!("replica {} of version {}, since {}", replica.id.0, replica.version, replica.started_at),
                Some(format!("{chunks} pieces of work, {devices} devices")),
            ));
        }
    }
}

impl Seen {
    /// Pieces of work and open devices.
    fn held_by(&self, replica: ReplicaId) -> (u64, u64) {
        let held = self.holdings.iter().find(|holding| holding.replica == replica);
        held.map_or((0, 0), |holding| (holding.chunks, holding.devices))
    }
}

fn broken(breaker: &Breaker, now: Timestamp) -> Check {
    let refused = if breaker.fault.is_wave() { "device tokens that worked before" } else { "the credential" };
    Check {
        name: "apns:breaker".into(),
        component: Some(format!("{} {}", breaker.topic, breaker.environment)),
        status: Status::Fail,
        observed: Some(breaker.fault.to_string()),
        output: format!(
            "APNs refuses {refused} of `{}` in {} since {}: {}. {} pieces of work wait; no device is touched; one push is tried at {}.",
            breaker.topic, breaker.environment, breaker.opened_at, breaker.fault, breaker.parked, breaker.next_probe_at
        ),
        advice: breaker.fault.cure().into(),
        time: now,
    }
}

fn paused(breaker: &Breaker, now: Timestamp) -> Check {
    Check {
        name: "queue:paused".into(),
        component: Some(format!("{} {}", breaker.topic, breaker.environment)),
        status: Status::Warn,
        observed: Some(breaker.parked.to_string()),
        output: format!("an operator has paused `{}` since {}: pieces of work wait", breaker.topic, breaker.opened_at),
        advice: format!("`sonnette resume --topic {}` lets them go on.", breaker.topic),
        time: now,
    }
}

fn judge_routes(routes: &[RouteReport], now: Timestamp, checks: &mut Vec<Check>) {
    if routes.is_empty() {
        checks.push(Check {
            name: "apns:credentials".into(),
            component: None,
            status: Status::Warn,
            observed: Some("0".into()),
            output: "no app is configured: nothing can be sent".into(),
            advice: "Copy keys.example/ to the folder of `apns.keys`, enter your app in apps.toml, and restart.".into(),
            time: now,
        });
    }
    for route in routes {
        let component = Some(format!("{} {}", route.topic, route.environment));
        let output = route.last_accepted_at.map_or_else(
            || "APNs has not accepted a push since this process started".to_owned(),
            |at| format!("APNs last accepted a push at {at}"),
        );
        checks.push(match &route.connect_error {
            Some(error) => Check {
                name: "apns:connection".into(),
                component,
                status: Status::Fail,
                observed: Some(error.clone()),
                output: format!("APNs cannot be reached; {output}"),
                advice: "Check that this machine reaches the address in [apns] on its port (a firewall? try port 2197), and `apns.ca_file` where a proxy inspects TLS. What was accepted waits until its expiration.".into(),
                time: now,
            },
            None => pass("apns:connection", component, now, &output, Some(format!("{} connections", route.connections))),
        });
    }
}

fn pass(name: &str, component: Option<String>, time: Timestamp, output: &str, observed: Option<String>) -> Check {
    Check {
        name: name.into(),
        component,
        status: Status::Pass,
        observed,
        output: output.into(),
        advice: String::new(),
        time,
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; counts stay far below 2^52")]
fn gauges(seen: &Seen, routes: &[RouteReport], now: Timestamp) {
    // What waits no longer is not among what waits: back to zero first.
    for route in routes {
        for lane in Lane::ALL {
            let labels = [("topic", route.topic.to_string()), ("lane", lane.as_str().to_owned())];
            metrics::gauge!(names::QUEUE_DEPTH, &labels).set(0.0);
            metrics::gauge!(names::QUEUE_OLDEST_AGE, &labels).set(0.0);
        }
    }
    for depth in &seen.depth {
        let labels = [("topic", depth.topic.to_string()), ("lane", depth.lane.as_str().to_owned())];
        metrics::gauge!(names::QUEUE_DEPTH, &labels).set((depth.due + depth.waiting) as f64);
        let age = depth.oldest_due_at.map_or(Duration::ZERO, |at| now.since(at));
        metrics::gauge!(names::QUEUE_OLDEST_AGE, &labels).set(age.as_secs_f64());
    }
    if let Some(skew) = clock::skew_seconds(routes) {
        names::clock_skew(skew);
    }
    for route in routes {
        let labels = [("topic", route.topic.to_string()), ("environment", route.environment.to_string())];
        let open = seen.breakers.iter().any(|b| {
            b.topic == route.topic && b.environment == route.environment && *b.fingerprint == *route.fingerprint.0
        });
        metrics::gauge!(names::BREAKER_OPEN, &labels).set(f64::from(u8::from(open)));
        metrics::gauge!(names::APNS_CONNECTIONS, &labels).set(route.connections as f64);
        if let Some(age) = route.provider_token_age {
            metrics::gauge!(names::PROVIDER_TOKEN_AGE, &labels).set(age.as_secs_f64());
        }
    }
    metrics::gauge!(names::REPLICAS).set(seen.replicas.len() as f64);
}

/// Of this replica alone: whoever collects asks each.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats; counts and seconds stay far below 2^52")]
fn replica_gauges(seen: &Seen, this: ReplicaId) {
    let (chunks, devices) = seen.held_by(this);
    metrics::gauge!(names::REPLICA_CHUNKS).set(chunks as f64);
    metrics::gauge!(names::REPLICA_DEVICES).set(devices as f64);
    if let Some(replica) = seen.replicas.iter().find(|replica| replica.id == this) {
        metrics::gauge!(names::REPLICA_STARTED).set(replica.started_at.as_seconds() as f64);
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; bytes stay far below 2^52")]
fn size_gauges(sizes: &Sizes) {
    for size in &sizes.tables {
        metrics::gauge!(names::TABLE_BYTES, "table" => size.table.clone()).set(size.bytes as f64);
        metrics::gauge!(names::TABLE_ROWS, "table" => size.table.clone()).set(size.rows as f64);
    }
    metrics::gauge!(names::DATABASE_BYTES).set(sizes.bytes as f64);
    metrics::gauge!(names::DATABASE_FREE_BYTES).set(sizes.free_bytes as f64);
}

/// An error and what caused it, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
