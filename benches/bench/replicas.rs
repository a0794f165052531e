//! What a second replica costs, and what it brings: two beside one on the same cores, and with APNs 50 ms away.
//!
//! On the same cores a second process can bring nothing, so whatever two carry less than one is the price of sharing.
//! APNs 50 ms away, with one connection each, streams are the limit, and two have twice as many. The load is the same,
//! over as many connections, which lead to each replica in turn.

use crate::{
    broadcast::Stage,
    load::{self, Api, Batch},
    service::{self, Database, Kit, Sink},
    settings::Settings,
};

/// How many, and what figures of them are called.
const COUNTS: [(usize, &str); 2] = [(1, "one replica"), (2, "two replicas")];

/// Streams of a connection to APNs 50 ms away with single notifications: few, so that they are the limit long before
/// this machine's processors are.
const FEW_STREAMS: usize = 100;

const SETTLED: &str = "accepted, delivered and settled/s";
const CPU: &str = "serve: CPU µs/notification";
const FAR: &str = "50 ms away, one connection each";

/// All of it, with the simulator that answers at once and the one that is far away. Who is first changes by round.
pub(crate) async fn measure(
    kit: &Kit,
    [sink, far]: [&Sink; 2],
    database: &Database,
    settings: &Settings,
    round: usize,
) -> Batch {
    let settings = &Settings { notifications: settings.replicas_notifications, ..settings.clone() };
    let mut counts = COUNTS;
    counts.rotate_left(round % 2);
    let mut all = Batch::default();
    for (count, name) in counts {
        let batch = singles(kit, sink, database, settings, count, "").await;
        take(&mut all, name, batch, &[SETTLED, CPU, "database: CPU µs/notification"]);
    }
    far.limit_streams(FEW_STREAMS).await;
    for (count, name) in counts {
        let batch = singles(kit, far, database, settings, count, &connections(count)).await;
        take(&mut all, &format!("{name}, {FAR}, {FEW_STREAMS} streams"), batch, &[SETTLED]);
    }
    far.limit_streams(service::STREAMS).await;
    if settings.broadcast > 0 {
        for (count, name) in counts {
            let batch = broadcasts(kit, far, database, settings, count).await;
            take(&mut all, &format!("{name}, {FAR}"), batch, &[]);
        }
    }
    all
}

/// Ratio by ratio: its name, the figure above and the figure below.
pub(crate) fn ratios() -> Vec<(String, String, String)> {
    let [(_, one), (_, two)] = COUNTS;
    let far = |replicas: &str| format!("{replicas}, {FAR}");
    let few = |replicas: &str| format!("{replicas}, {FAR}, {FEW_STREAMS} streams");
    vec![
        ("two replicas ÷ one: settled/s".to_owned(), format!("{two}: {SETTLED}"), format!("{one}: {SETTLED}")),
        // The other way round, so that more is better here as well.
        (
            "two replicas ÷ one: notifications per CPU second of serve".to_owned(),
            format!("{one}: {CPU}"),
            format!("{two}: {CPU}"),
        ),
        (
            format!("two replicas ÷ one, {FAR}, {FEW_STREAMS} streams: settled/s"),
            format!("{}: {SETTLED}", few(two)),
            format!("{}: {SETTLED}", few(one)),
        ),
        (
            format!("two replicas ÷ one, {FAR}: first broadcast, devices/s"),
            format!("{}: first broadcast: devices/s", far(two)),
            format!("{}: first broadcast: devices/s", far(one)),
        ),
        (
            format!("two replicas ÷ one, {FAR}: second broadcast, devices/s"),
            format!("{}: second broadcast: devices/s", far(two)),
            format!("{}: second broadcast: devices/s", far(one)),
        ),
    ]
}

/// `max_connections` is for all replicas together.
fn connections(count: usize) -> String {
    format!("max_connections = {count}")
}

/// Adds the figures of one batch that are named, or all if none is.
fn take(all: &mut Batch, name: &str, batch: Batch, figures: &[&str]) {
    for (figure, value) in batch.figures {
        if figures.is_empty() || figures.contains(&&*figure) {
            all.note(&format!("{name}: {figure}"), value);
        }
    }
    all.problems.extend(batch.problems.into_iter().map(|problem| format!("{name}: {problem}")));
}

async fn singles(kit: &Kit, sink: &Sink, database: &Database, settings: &Settings, count: usize, apns: &str) -> Batch {
    let serve = kit.replicas(count, database, sink, apns).await;
    let api = Api::connect(&serve, kit.api_key(database), settings).await;
    let mut batch = load::batch(&api, &serve, database, sink, settings).await;
    batch.problems.extend(service::stop(serve).await);
    batch
}

async fn broadcasts(kit: &Kit, far: &Sink, place: &Database, settings: &Settings, count: usize) -> Batch {
    let mut batch = Batch::default();
    let replicas = (count, &*connections(count));
    let stage = Stage::set(kit, far, place, settings, settings.broadcast, replicas).await;
    for which in ["first", "second"] {
        match stage.broadcast(true).await {
            Ok(broadcast) => {
                let per_second = settings.broadcast as f64 / broadcast.settled.as_secs_f64();
                batch.note(&format!("{which} broadcast: devices/s"), per_second);
            }
            Err(problem) => batch.problems.push(format!("{which} broadcast: {problem}")),
        }
    }
    batch.problems.extend(stage.strike().await);
    batch
}
