//! Many phones at once, and time that passes quickly over a service that waits.

use std::time::Duration;

use serde_json::json;
use sonnette::{
    domain::{
        clock::{Clock, ManualClock},
        device::{DeviceToken, Field, Proof, Registration},
    },
    sim::{self, Environment},
};

use super::world::{TOPIC, World, ticking_until_done, until};

/// The token of the phone with this number.
pub(crate) fn token(number: usize) -> String {
    format!("{number:064x}")
}

/// Phones of riders, registered.
pub(crate) struct Crowd {
    pub(crate) ids: Vec<String>,
}

impl Crowd {
    /// Registers phones with these numbers, each of a user of its own, past HTTP.
    pub(crate) async fn registered(world: &World, numbers: std::ops::Range<usize>) -> Self {
        let registrations: Vec<Registration> = numbers.map(registration).collect();
        let mut ids = Vec::new();
        for group in registrations.chunks(500) {
            let devices = world.app().store().register(group, world.clock.now()).await.unwrap();
            ids.extend(devices.iter().map(|device| device.id.to_string()));
        }
        Self { ids }
    }

    /// The same, and APNs accepts a push for each.
    pub(crate) async fn once_accepted(world: &World, clock: &ManualClock, numbers: std::ops::Range<usize>) -> Self {
        let crowd = Self::registered(world, numbers).await;
        let id = crowd.send(world).await;
        let done = ticking_until_done(world, clock, &id).await;
        assert_eq!(done["counts"]["accepted"], crowd.ids.len(), "{done}");
        crowd
    }

    /// Sends an alert to all of them, as a list.
    pub(crate) async fn send(&self, world: &World) -> String {
        world.send(json!({ "device_ids": self.ids })).await
    }

    /// How many devices there are in each status: active, inactive, suspended.
    pub(crate) async fn statuses(world: &World) -> [usize; 3] {
        let mut counts = [0; 3];
        for (status, count) in ["active", "inactive", "suspended"].into_iter().zip(&mut counts) {
            *count = world.server.all(&format!("/v1/devices?status={status}")).await.len();
        }
        counts
    }
}

/// The registration of a phone by its user, as a server makes it.
pub(crate) fn registration(number: usize) -> Registration {
    let token: DeviceToken = token(number).parse().unwrap();
    Registration {
        topic: TOPIC.parse().unwrap(),
        token,
        push_type: None,
        activity_id: None,
        proof: Proof::Server,
        user_id: Field::Set(format!("user-{number}").parse().unwrap()),
        installation_id: Field::Absent,
        environment: Field::Absent,
        tags: Field::Absent,
        locale: Field::Absent,
        time_zone: Field::Absent,
        app_version: Field::Absent,
        os_version: Field::Absent,
        model: Field::Absent,
    }
}

/// Tells the simulator where these phones live, and for which topic their tokens are.
pub(crate) fn live(world: &World, numbers: std::ops::Range<usize>, environment: Environment, topic: Option<&str>) {
    for number in numbers {
        let topic = topic.map(str::to_owned);
        assert!(world.sim.devices().register(sim::Device {
            environment,
            token: token(number),
            topic,
            inactive_since_ms: None
        }));
    }
}

/// Lets time pass quickly, some three seconds at a time, each time until the heart has beaten and nothing is in flight:
/// a heart that has not beaten for four seconds is not trusted. Slowly while APNs is to answer: a slow machine's answer
/// would come too late, and count as none.
pub(crate) async fn pass(world: &World, clock: &ManualClock, time: Duration) {
    let beat = || async { world.app().store().replicas().await.unwrap()[0].beat };
    let later = clock.monotonic() + time;
    while clock.monotonic() < later {
        let before = beat().await;
        clock.advance(Duration::from_millis(2_500));
        let mut looks = 0;
        until("the heart beats and nothing is in flight", || {
            looks += 1;
            if looks % (if world.is_answered() { 3 } else { 30 }) == 0 {
                // It began to wait only after the time had passed.
                clock.advance(Duration::from_millis(250));
            }
            async {
                let idle = world.app().routes().iter().all(|route| route.in_flight == 0 && route.waiting == 0);
                (beat().await > before && idle).then_some(())
            }
        })
        .await;
    }
}

/// How many requests the simulator has got.
pub(crate) fn requests(world: &World) -> u64 {
    world.sim.ledger().counters().requests
}
