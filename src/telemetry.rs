//! Logs and metric names.
//!
//! Promises: metric names live here and nowhere else; labels are bounded (a topic, a reason, a room), never a device, a
//! user or a token. Logs go to standard error, one line an event, gathered for a few milliseconds (`lines.rs`).

mod lines;

use std::{
    io::{IsTerminal, Stderr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, Layer, layer::Context, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use self::lines::{Lines, ToLines};
use crate::domain::clock::Clock;

/// What is logged, and how.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// A level or directives.
    pub level: String,
    /// One JSON object a line.
    pub json: bool,
}

/// What is logged, once that was started.
static LINES: OnceLock<Arc<Lines<Stderr>>> = OnceLock::new();

/// Starts logging to standard error. A second call changes nothing.
///
/// # Errors
/// If the level cannot be understood, or the system gives no thread.
pub fn start_logs(settings: &LogSettings) -> Result<(), String> {
    let filter = EnvFilter::try_new(&settings.level).map_err(|error| {
        format!("log.level: {error}; write a level such as `info`, or `info,sonnette::dispatch=debug`")
    })?;
    let lines = if let Some(lines) = LINES.get() {
        Arc::clone(lines)
    } else {
        let lines = Lines::start(std::io::stderr()).map_err(|error| format!("no thread for the log: {error}"))?;
        written_before_a_panic();
        Arc::clone(LINES.get_or_init(|| lines))
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(ToLines(lines)).with_ansi(std::io::stderr().is_terminal());
    let lines = if settings.json { lines.json().boxed() } else { lines.with_target(false).boxed() };
    // Already started, as in tests: the first one stays.
    _ = tracing_subscriber::registry().with(filter).with(lines).with(SlowStatements).try_init();
    Ok(())
}

/// Writes what was logged and is still gathered: before the process ends, or says something without the log.
pub fn write_logs() {
    if let Some(lines) = LINES.get() {
        lines.write_out();
    }
}

/// What a panic says stands behind what led to it.
fn written_before_a_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        write_logs();
        say(panic);
    }));
}

/// Replaces the line that sqlx writes for a slow statement, which shows all its text, by one that shows its name.
struct SlowStatements;

impl<S: tracing::Subscriber> Layer<S> for SlowStatements {
    fn event_enabled(&self, event: &tracing::Event<'_>, _: Context<'_, S>) -> bool {
        if event.metadata().target() != "sqlx::query" {
            return true;
        }
        let mut seen = Slow::default();
        event.record(&mut seen);
        names::slow_statement(&seen.name);
        tracing::warn!(
            statement = seen.name,
            duration_ms = seen.duration_ms,
            "the statement `{}` took {} ms",
            seen.name,
            seen.duration_ms
        );
        false
    }
}

/// What is kept of sqlx's line.
#[derive(Default)]
struct Slow {
    name: String,
    duration_ms: u64,
}

impl tracing::field::Visit for Slow {
    fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        if field.name() == "summary" {
            // Statements open with `-- name`; COMMIT and the like have no other than their words.
            let mut words = value.split_whitespace();
            self.name = match words.next() {
                Some("--") => words.next().filter(|name| name.contains('.')).unwrap_or("unnamed").to_owned(),
                Some(word) => word.to_owned(),
                None => String::new(),
            };
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a duration; casts saturate")]
    fn record_f64(&mut self, field: &tracing::field::Field, value: f64) {
        if field.name() == "elapsed_secs" {
            self.duration_ms = (value * 1_000.0).round() as u64;
        }
    }
}

/// Upper bounds of the buckets of durations, in seconds.
const DURATION_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The process's metric registry; made at the first call.
pub fn prometheus() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let builder = PrometheusBuilder::new();
            // The list is not empty, which is all that could be wrong with it.
            let recorder =
                match builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &DURATION_BUCKETS) {
                    Ok(builder) => builder,
                    Err(_) => PrometheusBuilder::new(),
                }
                .build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is installed: /metrics shows only gauges");
            }
            handle
        })
        .clone()
}

/// How often what was observed is summed up: 16 bytes an observation, of which a broadcast makes a hundred thousand a second.
const SUM_UP_EVERY: Duration = Duration::from_secs(1);

/// Sums up what histograms observed, again and again: until then each observation is kept, also where nobody asks for
/// `/metrics`. Cancelled by dropping; loses nothing.
pub async fn sum_up(clock: Arc<dyn Clock>) {
    loop {
        clock.sleep(SUM_UP_EVERY).await;
        prometheus().run_upkeep();
    }
}

/// Metric names, and the few calls that need their labels right.
pub mod names {
    use std::cell::RefCell;

    use metrics::{Counter, Histogram};

    /// Requests to the API, by method, route and status.
    pub const HTTP_REQUESTS: &str = "sonnette_http_requests_total";
    /// How long they took, by route.
    pub const HTTP_DURATION: &str = "sonnette_http_request_duration_seconds";
    /// Deliveries that ended, by topic, environment, outcome and reason.
    pub const DELIVERIES: &str = "sonnette_deliveries_total";
    /// Chunks that wait, by topic and lane.
    pub const QUEUE_DEPTH: &str = "sonnette_queue_depth";
    /// How long the oldest of them has been due, by topic and lane.
    pub const QUEUE_OLDEST_AGE: &str = "sonnette_queue_oldest_age_seconds";
    /// From the write of a push to APNs' answer, by environment and status.
    pub const APNS_DURATION: &str = "sonnette_apns_request_duration_seconds";
    /// Connections to APNs, by topic and environment.
    pub const APNS_CONNECTIONS: &str = "sonnette_apns_connections";
    /// 1 while a breaker is open, by topic and environment.
    pub const BREAKER_OPEN: &str = "sonnette_breaker_open";
    /// The age of the provider token that a new request would carry, by topic and environment.
    pub const PROVIDER_TOKEN_AGE: &str = "sonnette_provider_token_age_seconds";
    /// 1, with the version.
    pub const BUILD_INFO: &str = "sonnette_build_info";
    /// 1 if a new request could be kept.
    pub const DATABASE_UP: &str = "sonnette_database_up";
    /// Replicas that are alive.
    pub const REPLICAS: &str = "sonnette_replicas";
    /// Pieces of work that this replica has taken on.
    pub const REPLICA_CHUNKS: &str = "sonnette_replica_chunks";
    /// Their devices whose outcome is open.
    pub const REPLICA_DEVICES: &str = "sonnette_replica_devices";
    /// When this replica joined, in seconds since the epoch.
    pub const REPLICA_STARTED: &str = "sonnette_replica_started_timestamp_seconds";
    /// Rows that retention has deleted, by table; `payloads` were emptied.
    pub const RETENTION_DELETED: &str = "sonnette_retention_deleted_total";
    /// For how long things may have been due and not been deleted: since the last complete round began.
    pub const RETENTION_BEHIND: &str = "sonnette_retention_behind_seconds";
    /// Data and indexes of a table, by table: an estimate.
    pub const TABLE_BYTES: &str = "sonnette_table_bytes";
    /// Rows of a table, by table: an estimate.
    pub const TABLE_ROWS: &str = "sonnette_table_rows";
    /// The whole database.
    pub const DATABASE_BYTES: &str = "sonnette_database_bytes";
    /// Room in it that deleted rows have left.
    pub const DATABASE_FREE_BYTES: &str = "sonnette_database_free_bytes";

    /// Statements that took longer than `database.slow_statement_ms`, by name.
    pub const SLOW_STATEMENTS: &str = "sonnette_database_slow_statements_total";

    /// A statement took long.
    pub fn slow_statement(name: &str) {
        metrics::counter!(SLOW_STATEMENTS, "statement" => name.to_owned()).increment(1);
    }

    /// Retention has deleted rows of this table.
    pub fn retention_deleted(table: &'static str, rows: u64) {
        metrics::counter!(RETENTION_DELETED, "table" => table).increment(rows);
    }

    /// How many seconds APNs' clock is ahead of ours; negative: behind.
    pub const CLOCK_SKEW: &str = "sonnette_clock_skew_seconds";

    /// The clocks were compared.
    #[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^52 seconds are long")]
    pub fn clock_skew(seconds: i64) {
        metrics::gauge!(CLOCK_SKEW).set(seconds as f64);
    }

    /// A request was answered, or its client left: `seconds` after it came.
    pub fn request_answered(method: &'static str, route: &str, status: u16, seconds: f64) {
        thread_local! {
            static LAST: Last<(&'static str, String, u16), (Counter, Histogram)> = const { Last::new() };
        }
        LAST.with(|last| {
            last.or_look_up(
                |labels| (labels.0, &*labels.1, labels.2) == (method, route, status),
                || {
                    let route = route.to_owned();
                    let status_text = status.to_string();
                    let answered = metrics::counter!(
                        HTTP_REQUESTS, "method" => method, "route" => route.clone(), "status" => status_text
                    );
                    let durations = metrics::histogram!(HTTP_DURATION, "route" => route.clone());
                    ((method, route, status), (answered, durations))
                },
                |(answered, durations)| {
                    answered.increment(1);
                    durations.record(seconds);
                },
            );
        });
    }

    /// APNs has answered a push: `seconds` from the write.
    pub fn apns_answered(environment: &'static str, status: u16, seconds: f64) {
        thread_local! {
            static LAST: Last<(&'static str, u16), Histogram> = const { Last::new() };
        }
        LAST.with(|last| {
            last.or_look_up(
                |labels| *labels == (environment, status),
                || {
                    let status_text = status.to_string();
                    let found =
                        metrics::histogram!(APNS_DURATION, "environment" => environment, "status" => status_text);
                    ((environment, status), found)
                },
                |durations| durations.record(seconds),
            );
        });
    }

    /// A delivery has ended.
    pub fn delivery_ended(topic: &str, environment: &'static str, outcome: &'static str, reason: &str) {
        thread_local! {
            static LAST: Last<(String, &'static str, &'static str, String), Counter> = const { Last::new() };
        }
        LAST.with(|last| {
            last.or_look_up(
                |labels| (&*labels.0, labels.1, labels.2, &*labels.3) == (topic, environment, outcome, reason),
                || {
                    let (topic, reason) = (topic.to_owned(), reason.to_owned());
                    let found = metrics::counter!(
                        DELIVERIES,
                        "topic" => topic.clone(),
                        "environment" => environment,
                        "outcome" => outcome,
                        "reason" => reason.clone()
                    );
                    ((topic, environment, outcome, reason), found)
                },
                |ended| ended.increment(1),
            );
        });
    }

    /// What was counted last, with its labels: under load nearly all is the same, and looking it up would cost more than
    /// all else that is done about an answer. A thread has its own.
    struct Last<L, M>(RefCell<Option<(L, M)>>);

    impl<L, M> Last<L, M> {
        const fn new() -> Self {
            Self(RefCell::new(None))
        }

        fn or_look_up(
            &self,
            is_same: impl FnOnce(&L) -> bool,
            look_up: impl FnOnce() -> (L, M),
            then: impl FnOnce(&M),
        ) {
            let mut last = self.0.borrow_mut();
            let (_, metric) = match last.take() {
                Some(known) if is_same(&known.0) => last.insert(known),
                _ => last.insert(look_up()),
            };
            then(metric);
        }
    }
}
