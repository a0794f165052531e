//! Time, as one injected object: what time it is, how much time has passed, and timers.
//!
//! Promises: nothing else in the crate reads a clock or sets a timer that decides anything, so a test can live
//! through six hours in a second. Wall-clock times ([`Timestamp`]) are for what users and APNs see; durations that
//! decide who owns work are measured with [`Clock::monotonic`], which no administrator and no NTP moves.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

/// A moment in UTC, to the millisecond. Written as RFC 3339 with `Z`, read with any offset.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since the UNIX epoch.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// From whole seconds since the UNIX epoch, as in `iat` and `apns-expiration`. Saturates.
    #[must_use]
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Milliseconds since the UNIX epoch.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since the UNIX epoch, rounded down.
    #[must_use]
    pub const fn as_seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// This moment and `duration` more. Saturates.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// This moment less `duration`. Saturates.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is not after it.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no RFC 3339 time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a time in RFC 3339 with an offset, such as 2026-11-22T19:15:00+01:00")]
pub struct NotATime;

impl FromStr for Timestamp {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<Self, NotATime> {
        text.parse::<jiff::Timestamp>().map(|at| Self(at.as_millisecond())).map_err(|_| NotATime)
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A timer: resolves once its time has come. Dropping it cancels it and costs nothing.
pub type Timer = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The one source of time and timers.
pub trait Clock: Send + Sync + fmt::Debug {
    /// What time it is, UTC.
    fn now(&self) -> Timestamp;

    /// Time passed since some fixed moment in this process's past; never goes backwards.
    fn monotonic(&self) -> Duration;

    /// A timer that ends once `duration` has passed on this clock.
    fn sleep(&self, duration: Duration) -> Timer;
}

/// The machine's own clock.
#[derive(Debug, Clone)]
pub struct SystemClock {
    origin: std::time::Instant,
}

impl SystemClock {
    /// The machine's clock; [`Clock::monotonic`] counts from now.
    #[must_use]
    pub fn new() -> Self {
        Self { origin: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the machine's clock")]
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Timestamp(since_epoch.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX)))
    }

    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }

    fn sleep(&self, duration: Duration) -> Timer {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// A clock whose wall time is set by somebody else's, so that several machines have one. Time passes, and timers end, as
/// on the clock within.
#[derive(Debug)]
pub struct SharedClock {
    within: Arc<dyn Clock>,
    /// By how many milliseconds the other is ahead of the clock within.
    ahead: AtomicI64,
}

impl SharedClock {
    /// What is known more exactly than this is not corrected.
    const FINE: Duration = Duration::from_millis(10);

    /// Shows what `within` shows, until it is told better.
    #[must_use]
    pub const fn new(within: Arc<dyn Clock>) -> Self {
        Self { within, ahead: AtomicI64::new(0) }
    }

    /// The other clock showed `theirs` at some moment between `asked`, a moment of [`Clock::monotonic`], and now. Returns by
    /// how many milliseconds it is ahead of the clock within.
    pub fn agree(&self, theirs: Timestamp, asked: Duration) -> i64 {
        let took = self.monotonic().saturating_sub(asked);
        let seen = theirs.plus(took / 2).as_millis().saturating_sub(self.within.now().as_millis());
        let ahead = self.ahead.load(Ordering::Relaxed);
        if seen.abs_diff(ahead) > took.max(Self::FINE).as_millis().try_into().unwrap_or(u64::MAX) {
            self.ahead.store(seen, Ordering::Relaxed);
        }
        seen
    }
}

impl Clock for SharedClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.within.now().0.saturating_add(self.ahead.load(Ordering::Relaxed)))
    }

    fn monotonic(&self) -> Duration {
        self.within.monotonic()
    }

    fn sleep(&self, duration: Duration) -> Timer {
        self.within.sleep(duration)
    }
}

/// A clock that moves only when told, for tests and simulations: six hours pass in one call.
#[derive(Debug)]
pub struct ManualClock {
    /// Wall clock in ms, and what has passed since the start.
    time: watch::Sender<(i64, Duration)>,
}

impl ManualClock {
    /// A clock that shows `now` until it is moved.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self { time: watch::Sender::new((now.0, Duration::ZERO)) }
    }

    /// Lets `duration` pass: both clocks move, and timers that have come due end.
    pub fn advance(&self, duration: Duration) {
        self.time.send_modify(|(wall, passed)| {
            *wall = Timestamp(*wall).plus(duration).0;
            *passed += duration;
        });
    }

    /// Sets the wall clock, as an administrator or NTP would: no time passes, no timer ends.
    pub fn set_wall(&self, now: Timestamp) {
        self.time.send_modify(|(wall, _)| *wall = now.0);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.time.borrow().0)
    }

    fn monotonic(&self) -> Duration {
        self.time.borrow().1
    }

    fn sleep(&self, duration: Duration) -> Timer {
        let mut time = self.time.subscribe();
        let due = self.monotonic().saturating_add(duration);
        Box::pin(async move {
            // The sender lives as long as the clock; if that is dropped, nobody can move time any more.
            if time.wait_for(|(_, passed)| *passed >= due).await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_offset_is_read_and_z_is_written() {
        let at: Timestamp = "2026-11-22T19:15:00+01:00".parse().unwrap();
        assert_eq!(at.to_string(), "2026-11-22T18:15:00.000Z");
        assert!("2026-11-22T19:15:00".parse::<Timestamp>().is_err(), "a time without an offset is refused");
        assert!("tomorrow".parse::<Timestamp>().is_err());
    }

    #[test]
    fn a_shared_clock_shows_the_others_time_and_lets_it_pass_as_its_own() {
        let within = Arc::new(ManualClock::new(Timestamp::from_seconds(1_000)));
        let clock = SharedClock::new(Arc::clone(&within) as _);
        let asked = clock.monotonic();
        within.advance(Duration::from_millis(100));
        assert_eq!(clock.agree(Timestamp::from_seconds(400), asked), -600_050, "it was read half-way");
        assert_eq!(clock.now(), Timestamp::from_millis(400_050));
        within.advance(Duration::from_secs(60));
        assert_eq!((clock.now(), clock.monotonic()), (Timestamp::from_millis(460_050), within.monotonic()));
        let asked = clock.monotonic();
        within.advance(Duration::from_secs(5));
        clock.agree(Timestamp::from_millis(465_050), asked);
        assert_eq!(clock.now(), Timestamp::from_millis(465_050), "an answer that took long proves too little");
    }

    #[tokio::test]
    async fn a_manual_clock_ends_timers_only_when_it_is_moved() {
        let clock = ManualClock::new(Timestamp::from_seconds(1_000));
        let mut timer = clock.sleep(Duration::from_secs(60));
        assert!(futures_util::poll!(&mut timer).is_pending());
        clock.set_wall(Timestamp::from_seconds(9_999));
        assert!(futures_util::poll!(&mut timer).is_pending(), "setting the wall clock lets no time pass");
        clock.advance(Duration::from_secs(60));
        timer.await;
        assert_eq!(clock.now(), Timestamp::from_seconds(10_059));
    }
}
