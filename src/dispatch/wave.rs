//! The wave rule (promise 5): whether device tokens that APNs refuses are bad, or a mistake of ours makes them look so.
//!
//! Promises: pure; the passing time is handed in. What is refused for good is judged together with everything that APNs
//! answered for that app and environment in a window of [`WINDOW`] and in the ten minutes before. Only devices whose
//! token was accepted there once can make a wave: dead tokens (410), garbage registrations, first tries and raw tokens
//! never do. Memory is bounded for each app and environment, by [`MOST`] devices a minute.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use tokio::sync::watch;

use crate::domain::{
    delivery::Judgement,
    device::DeviceSeq,
    topic::{Environment, Topic},
};

/// How long refusals are gathered before they are judged; again from the first by a device once accepted.
pub(super) const WINDOW: Duration = Duration::from_secs(2);

/// How many minutes of the past are looked at beside the window, the running one included.
const MINUTES: u64 = 10;

/// So many devices refused, and one to four accepted, are a wave.
const FEW: usize = 3;

/// So many devices refused, and not fewer than accepted, are a wave before the window is over.
const MANY: usize = 10;

/// So many devices a minute are told apart; of more, each answer counts.
const MOST: usize = 4_096;

/// What a refusal is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// This device's token was accepted in this environment once.
    Known(DeviceSeq),
    /// The same, and this delivery was refused before and came to no judgement, or waited for a breaker that has closed
    /// since: enough of them are a wave, a few are not again.
    Again(DeviceSeq),
    /// Nobody knows that the token ever worked here.
    Unknown,
}

/// What is thought of a refusal.
#[derive(Debug)]
pub(super) enum Opinion {
    /// It was judged with this one.
    Judged(Judgement),
    /// It will be judged with others: the channel says when.
    Pending(watch::Receiver<Option<Judgement>>),
}

/// What became of a window whose time may be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It is judged now.
    Judged(Judgement),
    /// Its time is not over: ask again after so long.
    NotYet(Duration),
    /// It was judged before: the channel has told.
    Over,
}

/// Different devices; beyond [`MOST`] of them, answers.
#[derive(Debug, Default)]
struct Devices {
    seen: HashSet<DeviceSeq>,
    more: usize,
}

impl Devices {
    fn add(&mut self, device: DeviceSeq) {
        if self.seen.len() < MOST {
            self.seen.insert(device);
        } else if !self.seen.contains(&device) {
            self.more += 1;
        }
    }

    fn count(&self) -> usize {
        self.seen.len() + self.more
    }

    fn remove(&mut self, device: DeviceSeq) {
        if !self.seen.is_empty() {
            self.seen.remove(&device);
        }
    }

    fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

/// What was answered in some time about devices once accepted.
#[derive(Debug, Default)]
struct Answers {
    /// Refused.
    refused: Devices,
    /// Those of them of which that was news.
    fresh: Devices,
    accepted: Devices,
}

impl Answers {
    fn refuse(&mut self, what: Refused) {
        match what {
            Refused::Known(device) => {
                self.refused.add(device);
                self.fresh.add(device);
            }
            Refused::Again(device) => self.refused.add(device),
            Refused::Unknown => {}
        }
    }
}

/// How many devices were refused and accepted in some time, once accepted before.
#[derive(Debug, Clone, Copy)]
struct Tally {
    refused: usize,
    fresh: usize,
    accepted: usize,
}

impl Tally {
    fn of(answers: &Answers) -> Self {
        Self { refused: answers.refused.count(), fresh: answers.fresh.count(), accepted: answers.accepted.count() }
    }

    /// Over several minutes, each device once.
    fn over(minutes: &BTreeMap<u64, Answers>) -> Self {
        let count = |devices: fn(&Answers) -> &Devices| {
            let different: HashSet<&DeviceSeq> = minutes.values().flat_map(|a| &devices(a).seen).collect();
            different.len() + minutes.values().map(|a| devices(a).more).sum::<usize>()
        };
        Self { refused: count(|a| &a.refused), fresh: count(|a| &a.fresh), accepted: count(|a| &a.accepted) }
    }

    const fn is_great_wave(self) -> bool {
        self.refused >= MANY && self.refused >= self.accepted
    }

    const fn is_wave(self) -> bool {
        self.fresh >= FEW && self.fresh.saturating_mul(4) >= self.accepted
    }
}

#[derive(Debug)]
struct Window {
    ends_at: Duration,
    answers: Answers,
    judgement: watch::Sender<Option<Judgement>>,
}

/// One app in one environment.
#[derive(Debug, Default)]
struct Route {
    window: Option<Window>,
    /// By minute of the passing time; the last [`MINUTES`] in which there was anything.
    minutes: BTreeMap<u64, Answers>,
}

impl Route {
    fn minute(&mut self, now: Duration) -> &mut Answers {
        let minute = now.as_secs() / 60;
        while self.minutes.first_key_value().is_some_and(|(at, _)| at + MINUTES <= minute) {
            self.minutes.pop_first();
        }
        self.minutes.entry(minute).or_default()
    }

    /// A device counts by its last answer.
    fn refuse(&mut self, what: Refused, now: Duration) {
        self.minute(now).refuse(what);
        if let Refused::Known(device) | Refused::Again(device) = what {
            for answers in self.minutes.values_mut() {
                answers.accepted.remove(device);
            }
        }
    }

    /// A device counts by its last answer.
    fn accept(&mut self, device: DeviceSeq, now: Duration) {
        self.minute(now).accepted.add(device);
        for answers in self.minutes.values_mut() {
            answers.refused.remove(device);
            answers.fresh.remove(device);
        }
    }

    /// Ends the window with a judgement, and tells everybody who waits for it.
    fn judge(&mut self, now: Duration) -> Option<Judgement> {
        let window = self.window.take()?;
        self.minute(now);
        let judgement = judge(Tally::of(&window.answers), Tally::over(&self.minutes));
        window.judgement.send_replace(Some(judgement));
        Some(judgement)
    }
}

/// The rule, at the end of a window.
fn judge(window: Tally, minutes: Tally) -> Judgement {
    if window.refused == 0 {
        Judgement::Healthy
    } else if window.is_great_wave() || window.is_wave() || (window.fresh > 0 && minutes.is_wave()) {
        Judgement::Wave
    } else if minutes.refused > minutes.accepted {
        // Two refused and one accepted: who is to tell which of them shows how things are?
        Judgement::Unjudged
    } else {
        Judgement::Healthy
    }
}

#[derive(Debug, Default)]
struct App {
    production: Route,
    sandbox: Route,
}

impl App {
    const fn route(&mut self, environment: Environment) -> &mut Route {
        match environment {
            Environment::Production => &mut self.production,
            Environment::Sandbox => &mut self.sandbox,
        }
    }
}

/// What was answered lately, by app and environment.
#[derive(Debug, Default)]
pub(super) struct Waves {
    apps: HashMap<Topic, App>,
}

impl Waves {
    fn on<T>(&mut self, topic: &Topic, environment: Environment, then: impl FnOnce(&mut Route) -> T) -> T {
        // Asked for every accepted push: the topic is copied once.
        if let Some(app) = self.apps.get_mut(topic) {
            return then(app.route(environment));
        }
        then(self.apps.entry(topic.clone()).or_default().route(environment))
    }

    /// A push was accepted for a device that was accepted here before.
    pub(super) fn accepted(&mut self, topic: &Topic, environment: Environment, device: DeviceSeq, now: Duration) {
        self.on(topic, environment, |route| {
            if let Some(window) = &mut route.window {
                window.answers.accepted.add(device);
            }
            route.accept(device, now);
        });
    }

    /// APNs refused a token for good.
    pub(super) fn refused(&mut self, topic: &Topic, environment: Environment, what: Refused, now: Duration) -> Opinion {
        self.on(topic, environment, |route| {
            if route.window.as_ref().is_some_and(|window| window.ends_at <= now) {
                // Whoever was to end it is gone.
                route.judge(now);
            }
            route.refuse(what, now);
            let window = route.window.get_or_insert_with(|| Window {
                ends_at: now + WINDOW,
                answers: Answers::default(),
                judgement: watch::Sender::default(),
            });
            let told_nothing = window.answers.refused.is_empty();
            window.answers.refuse(what);
            if told_nothing && !window.answers.refused.is_empty() {
                // First tries have opened it: its time begins here.
                window.ends_at = now + WINDOW;
            }
            let pending = window.judgement.subscribe();
            if Tally::of(&window.answers).is_great_wave() {
                route.judge(now);
            }
            match *pending.borrow() {
                Some(judgement) => Opinion::Judged(judgement),
                None => Opinion::Pending(pending.clone()),
            }
        })
    }

    /// The judgement that is being waited for there, if any.
    pub(super) fn pending(
        &mut self,
        topic: &Topic,
        environment: Environment,
    ) -> Option<watch::Receiver<Option<Judgement>>> {
        self.on(topic, environment, |route| Some(route.window.as_ref()?.judgement.subscribe()))
    }

    /// Judges the window if its time is over.
    pub(super) fn end(&mut self, topic: &Topic, environment: Environment, now: Duration) -> End {
        self.on(topic, environment, |route| match &route.window {
            Some(window) if window.ends_at > now => End::NotYet(window.ends_at.saturating_sub(now)),
            _ => route.judge(now).map_or(End::Over, End::Judged),
        })
    }

    /// A breaker has closed: what was refused before says nothing any more.
    pub(super) fn forgive(&mut self, topic: &Topic, environment: Environment) {
        self.on(topic, environment, |route| {
            for answers in route.minutes.values_mut() {
                answers.refused = Devices::default();
                answers.fresh = Devices::default();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRODUCTION: Environment = Environment::Production;

    /// A court on a clock of its own.
    struct Court {
        waves: Waves,
        topic: Topic,
        now: Duration,
    }

    impl Court {
        fn new() -> Self {
            Self { waves: Waves::default(), topic: "fr.ocpizza.livreur".parse().unwrap(), now: Duration::from_secs(7) }
        }

        fn accept(&mut self, devices: std::ops::Range<i64>) {
            for device in devices {
                self.waves.accepted(&self.topic, PRODUCTION, DeviceSeq(device), self.now);
            }
        }

        fn refuse(&mut self, what: Refused) -> Opinion {
            self.waves.refused(&self.topic, PRODUCTION, what, self.now)
        }

        fn refuse_all(&mut self, devices: std::ops::Range<i64>) {
            for device in devices {
                self.refuse(Refused::Known(DeviceSeq(device)));
            }
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        /// What the window says once its time is over.
        fn judgement(&mut self) -> Judgement {
            self.pass(2);
            match self.waves.end(&self.topic, PRODUCTION, self.now) {
                End::Judged(judgement) => judgement,
                other => panic!("the window is over: {other:?}"),
            }
        }
    }

    #[test]
    fn ten_refused_and_not_fewer_than_accepted_are_a_wave_at_once() {
        let mut court = Court::new();
        court.refuse_all(0..9);
        let Opinion::Pending(waiting) = court.refuse(Refused::Known(DeviceSeq(8))) else { panic!("nine devices") };
        assert!(matches!(court.refuse(Refused::Known(DeviceSeq(9))), Opinion::Judged(Judgement::Wave)));
        assert_eq!(*waiting.borrow(), Some(Judgement::Wave), "and all of them are told");
        let mut busy = Court::new();
        busy.refuse_all(0..9);
        busy.accept(100..111);
        assert!(matches!(busy.refuse(Refused::Known(DeviceSeq(9))), Opinion::Pending(_)), "eleven were accepted");
    }

    #[test]
    fn three_refused_are_a_wave_unless_more_than_four_times_as_many_are_accepted() {
        for (accepted, expected) in [(12, Judgement::Wave), (13, Judgement::Healthy)] {
            let mut court = Court::new();
            court.refuse_all(0..3);
            court.accept(100..100 + accepted);
            assert_eq!(court.judgement(), expected, "{accepted} accepted");
        }
    }

    #[test]
    fn two_refused_are_no_wave_but_with_one_of_the_last_ten_minutes_they_are() {
        let mut court = Court::new();
        court.accept(100..105);
        court.refuse_all(0..1);
        assert_eq!(court.judgement(), Judgement::Healthy);
        court.pass(400);
        court.refuse_all(1..3);
        assert_eq!(court.judgement(), Judgement::Wave);
        let mut later = Court::new();
        later.accept(100..105);
        later.refuse_all(0..1);
        assert_eq!(later.judgement(), Judgement::Healthy);
        later.pass(601);
        later.accept(100..105);
        later.refuse_all(1..3);
        assert_eq!(later.judgement(), Judgement::Healthy, "ten minutes later the first is forgotten");
    }

    #[test]
    fn one_refused_where_hardly_anything_is_accepted_is_not_judged() {
        let mut court = Court::new();
        court.refuse_all(0..1);
        assert_eq!(court.judgement(), Judgement::Unjudged);
        court.accept(100..101);
        court.refuse_all(1..2);
        assert_eq!(court.judgement(), Judgement::Unjudged, "two refused, one accepted");
        court.accept(101..102);
        court.refuse(Refused::Again(DeviceSeq(0)));
        assert_eq!(court.judgement(), Judgement::Healthy, "two and two");
    }

    #[test]
    fn first_tries_are_no_wave_however_many() {
        let mut court = Court::new();
        for _ in 0..1_000 {
            assert!(matches!(court.refuse(Refused::Unknown), Opinion::Pending(_)));
        }
        assert_eq!(court.judgement(), Judgement::Healthy);
        court.refuse(Refused::Unknown);
        court.refuse_all(0..3);
        assert_eq!(court.judgement(), Judgement::Wave, "they share the judgement of the others");
    }

    #[test]
    fn what_first_tries_have_opened_lasts_its_time_from_the_first_device_that_tells_something() {
        let mut court = Court::new();
        court.refuse(Refused::Unknown);
        court.pass(1);
        court.refuse_all(0..1);
        court.pass(1);
        assert_eq!(court.waves.end(&court.topic, PRODUCTION, court.now), End::NotYet(Duration::from_secs(1)));
        court.refuse_all(1..3);
        assert_eq!(court.judgement(), Judgement::Wave);
    }

    #[test]
    fn after_a_breaker_has_closed_a_few_that_are_refused_again_hold_nobody() {
        let mut court = Court::new();
        court.refuse_all(0..3);
        assert_eq!(court.judgement(), Judgement::Wave);
        court.waves.forgive(&court.topic, PRODUCTION);
        court.accept(100..102);
        for device in 0..3 {
            court.refuse(Refused::Again(DeviceSeq(device)));
        }
        assert_eq!(court.judgement(), Judgement::Unjudged);
        court.accept(102..103);
        court.refuse(Refused::Again(DeviceSeq(0)));
        assert_eq!(court.judgement(), Judgement::Healthy, "as many are accepted by now");
        for device in 0..9 {
            court.refuse(Refused::Again(DeviceSeq(device)));
        }
        assert!(matches!(court.refuse(Refused::Again(DeviceSeq(9))), Opinion::Judged(Judgement::Wave)), "but ten do");
    }

    #[test]
    fn a_device_counts_by_its_last_answer() {
        let mut court = Court::new();
        court.refuse_all(0..2);
        assert_eq!(court.judgement(), Judgement::Unjudged);
        court.accept(0..2);
        court.refuse_all(2..3);
        assert_eq!(court.judgement(), Judgement::Healthy);
        let mut alone = Court::new();
        alone.accept(0..1);
        alone.refuse_all(0..1);
        assert_eq!(alone.judgement(), Judgement::Unjudged, "that it worked before says nothing for it now");
    }

    #[test]
    fn one_device_is_one_device_however_often_it_is_refused() {
        let mut court = Court::new();
        court.accept(100..101);
        for _ in 0..1_000 {
            court.refuse_all(0..1);
        }
        assert_eq!(court.judgement(), Judgement::Healthy);
    }

    #[test]
    fn a_window_that_nobody_ended_is_judged_by_the_next_refusal() {
        let mut court = Court::new();
        let Opinion::Pending(waiting) = court.refuse(Refused::Known(DeviceSeq(0))) else { panic!("one alone") };
        court.pass(60);
        court.refuse_all(1..2);
        assert_eq!(*waiting.borrow(), Some(Judgement::Unjudged));
    }

    #[test]
    fn memory_is_bounded_and_what_is_beyond_still_counts() {
        let mut court = Court::new();
        court.accept(0..5 * 4_096);
        let kept = |court: &mut Court| {
            court.waves.on(&court.topic, PRODUCTION, |route| {
                route.minutes.values().map(|m| (m.accepted.seen.len(), m.accepted.more)).collect::<Vec<_>>()
            })
        };
        assert_eq!(kept(&mut court), [(MOST, 4 * MOST)]);
        court.pass(60 * 60);
        court.accept(0..1);
        assert_eq!(kept(&mut court), [(1, 0)]);
    }
}
