//! Our clock: the same for all replicas, and against APNs' own.
//!
//! Promises: all replicas of one MySQL go by the database's clock, whatever their machines' show. What is seen of APNs' `date` is shown, measured as a gauge, and said in the log once when the clocks begin to
//! differ by more than [`WARN_OVER_SECONDS`] and once when they agree again. Nothing is done about it: APNs refuses
//! provider tokens that are an hour off (`apns-protocol.md` §3.1), and a clock is set by NTP.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{Check, Status};
use crate::{
    apns::{Gateway, RouteReport},
    domain::clock::{Clock, SharedClock, Timestamp},
    store::{Store, StoreError},
    telemetry::names,
};

/// By how many seconds the clocks may differ before somebody should look.
pub const WARN_OVER_SECONDS: u64 = 60;

/// How often the log's reader is told of a change at the earliest.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How often the database is asked for its time.
const FOLLOW_EVERY: Duration = Duration::from_secs(5);

const ADVICE: &str = "Set the clock by NTP (chrony, systemd-timesyncd): on MySQL the database server's, which all replicas go by, else this machine's. Provider tokens bear its time: APNs refuses those that are an hour off, of all apps at once; and expirations and scheduled times are off by as much.";

/// By how many seconds APNs' clock is ahead of ours (negative: behind), where that is most; `None`: no answer has named a
/// date.
pub(super) fn skew_seconds(routes: &[RouteReport]) -> Option<i64> {
    routes.iter().filter_map(|route| route.clock_skew_seconds).max_by_key(|skew| skew.unsigned_abs())
}

const fn is_off(skew: i64) -> bool {
    skew.unsigned_abs() > WARN_OVER_SECONDS
}

fn said(skew: i64) -> String {
    match skew {
        0 => "our clock agrees with APNs'".to_owned(),
        ahead @ 1.. => format!("our clock is {ahead} s behind APNs'"),
        behind => format!("our clock is {} s ahead of APNs'", behind.unsigned_abs()),
    }
}

/// How the clock stands.
pub(super) fn check(routes: &[RouteReport], now: Timestamp) -> Check {
    let skew = skew_seconds(routes);
    let off = skew.is_some_and(is_off);
    Check {
        name: "clock".into(),
        component: None,
        status: if off { Status::Warn } else { Status::Pass },
        observed: skew.map(|skew| format!("{skew} s")),
        output: skew.map_or_else(|| "no answer of APNs has named a date yet".to_owned(), said),
        advice: if off { ADVICE.to_owned() } else { String::new() },
        time: now,
    }
}

/// Sets our clock by the database's, if that has one. Returns by how many milliseconds that is ahead of this machine's.
///
/// # Errors
/// If the database does not answer: our clock goes on as it was.
pub async fn agree(store: &dyn Store, clock: &SharedClock) -> Result<Option<i64>, StoreError> {
    let asked = clock.monotonic();
    Ok(store.time().await?.map(|theirs| clock.agree(theirs, asked)))
}

/// Keeps our clock with the database's until the service stops.
pub async fn follow(store: Arc<dyn Store>, clock: Arc<SharedClock>, stop: CancellationToken) {
    let mut was_off = false;
    loop {
        match agree(&*store, &clock).await {
            Ok(None) => return stop.cancelled().await,
            Ok(Some(ahead)) => {
                let off = is_off(ahead / 1000);
                if off && !was_off {
                    tracing::warn!(
                        database.clock_ahead_ms = ahead,
                        "this machine's clock differs from the database's, which is gone by"
                    );
                }
                was_off = off;
            }
            // Whoever needs the database says so.
            Err(_) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = clock.sleep(FOLLOW_EVERY) => {}
        }
    }
}

/// Watches the clock until the service stops.
pub async fn watch(gateway: Arc<dyn Gateway>, clock: Arc<dyn Clock>, stop: CancellationToken) {
    let mut was_off = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = clock.sleep(LOOK_EVERY) => {}
        }
        let Some(skew) = skew_seconds(&gateway.report()) else { continue };
        names::clock_skew(skew);
        let off = is_off(skew);
        if off && !was_off {
            tracing::error!(clock.skew_s = skew, "{}. {ADVICE}", said(skew));
        } else if was_off && !off {
            tracing::info!(clock.skew_s = skew, "{}: it is right again", said(skew));
        }
        was_off = off;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{apns::Fingerprint, domain::topic::Environment};

    const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

    fn route(clock_skew_seconds: Option<i64>) -> RouteReport {
        RouteReport {
            topic: "fr.ocpizza.livreur".parse().unwrap(),
            environment: Environment::Production,
            fingerprint: Fingerprint("f".into()),
            connections: 1,
            in_flight: 0,
            waiting: 0,
            connect_error: None,
            provider_token_age: None,
            last_accepted_at: None,
            clock_skew_seconds,
        }
    }

    #[test]
    fn a_clock_is_off_by_more_than_a_minute_either_way_and_the_worst_counts() {
        let seen = |skews: &[Option<i64>]| {
            let check = check(&skews.iter().copied().map(route).collect::<Vec<_>>(), NOW);
            (check.status, check.observed, check.output)
        };
        assert_eq!(seen(&[None]).0, Status::Pass, "APNs need not name a date");
        assert_eq!(seen(&[Some(60), Some(-60)]).0, Status::Pass);
        let behind = seen(&[None, Some(0), Some(61)]);
        assert_eq!((behind.0, behind.1.as_deref()), (Status::Warn, Some("61 s")));
        assert!(behind.2.contains("61 s behind"), "{}", behind.2);
        let ahead = seen(&[Some(61), Some(-3_600)]);
        assert_eq!((ahead.0, ahead.1.as_deref()), (Status::Warn, Some("-3600 s")));
        assert!(ahead.2.contains("3600 s ahead"), "{}", ahead.2);
    }
}
