//! `make bench`: how fast Sonnette is, against yardsticks measured in the same run. docs/performance.md explains it.
//!
//! Promises: the APNs simulator (its checks on, its ledger off), the database and `serve` are separate processes, and
//! so is each yardstick; everything takes turns, in rounds; each figure is shown as median and spread, each comparison
//! as a ratio to the yardstick of the same round. It refuses to run with durability off, and it ends with a failure
//! unless the simulator has accepted each notification exactly once and the API says the same of each.
//!
//! Linux only: processor time and memory of the processes are read from `/proc`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a measurement that cannot be made is to stop the run and say where; the table is the user interface"
)]
#![expect(clippy::cast_precision_loss, reason = "figures are rounded to three digits anyway")]

mod broadcast;
mod commits;
mod durability;
mod engine;
mod load;
mod registrations;
mod replicas;
mod report;
mod retention;
mod service;
mod settings;
mod wire;
mod yardstick;

/// The tests' private database server, and processes and folders that do not outlive us.
#[path = "../../tests/it/support"]
mod support {
    #[expect(dead_code, unused_macros, unused_imports, reason = "the tests use more of it")]
    pub(crate) mod database;
    #[expect(dead_code, reason = "the tests use more of it")]
    pub(crate) mod galera;
    pub(crate) mod ports;
    pub(crate) mod scratch;
}

use std::{path::Path, process::ExitCode, time::Duration};

use crate::{
    commits::Commits,
    engine::{Engine, Kind},
    load::Batch,
    registrations::Registrations,
    report::Rounds,
    service::{Database, Kit, Sink},
    settings::Settings,
    support::{database::PrivateServer, scratch::Folder},
    yardstick::{Client, Figures, Plan},
};

/// That of `sonnette`, so that the yardsticks and the engine have what `serve` has.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How late the second simulator answers.
const LATENCY: Duration = Duration::from_millis(50);

/// How much more memory ten times as many pushes may take.
const MEMORY_GROWTH: f64 = 1.1;

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => {}
        ["yardstick"] => {
            yardstick::run_child();
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("no arguments are known; sizes are set by the environment, see docs/performance.md");
            return ExitCode::from(2);
        }
    }
    // One thread is enough for the load, and no part of it waits for another thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(run(&Settings::read())) {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            eprintln!("\nTHE FIGURES ABOVE DO NOT COUNT:");
            for problem in problems {
                eprintln!("  {problem}");
            }
            ExitCode::FAILURE
        }
        Err(refusal) => {
            eprintln!("make bench refuses to run: {refusal}");
            ExitCode::FAILURE
        }
    }
}

/// Yardsticks of many connections get all threads.
fn on_all_threads<T: Send>(work: impl Future<Output = T> + Send) -> T {
    let all = || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(work)
    };
    std::thread::scope(|scope| scope.spawn(all).join()).expect("the yardstick ends")
}

/// What takes its turn in a round.
enum Step<'a> {
    Client { name: &'static str, client: Client, sink: &'a Sink },
    Commits(&'a Commits),
    Sonnette(&'a Database),
    Upserts(&'a Registrations),
    Registrations(&'a Registrations),
    Broadcast(&'a Database),
    Replicas(&'a Database),
    Retention(&'a Database),
}

/// Everything. `Ok` has what was found wrong with the results, `Err` why nothing was measured.
async fn run(settings: &Settings) -> Result<Vec<String>, String> {
    println!("{settings}");
    let folder = Folder::new("bench");
    durability::on_a_disk(folder.path())?;
    // Ours, unless another is named; alive until the end.
    let mut private = None;
    let mut databases = Vec::new();
    if settings.mysql {
        let url = if let Some(url) = &settings.database_url {
            url.clone()
        } else {
            let server = PrivateServer::start().await;
            let url = format!("mysql://sonnette:sonnette@127.0.0.1:{}/", server.port());
            private = Some(server);
            url
        };
        println!("{}", durability::of_server(&url).await?);
        databases.push(Database::mysql(&url).await);
    }
    if settings.sqlite {
        databases.push(Database::sqlite(folder.path()));
    }
    let kit = Kit::new(folder.path());
    let sink = Sink::start(&kit, Duration::ZERO);
    let far = Sink::start(&kit, LATENCY);
    for database in &databases {
        prepare(settings, &kit, &sink, database).await?;
    }
    let mut rounds = measure(settings, &kit, [&sink, &far], &databases, folder.path()).await;
    memory(settings, &kit, &sink, &mut rounds).await;
    for database in databases {
        database.drop().await;
    }
    drop(private);
    rounds.print();
    rounds.write(settings);
    Ok(rounds.problems)
}

/// Registers the devices and looks whether commits reach the disk.
async fn prepare(settings: &Settings, kit: &Kit, sink: &Sink, database: &Database) -> Result<(), String> {
    let serve = kit.serve(database, sink).await;
    let pid = serve[0].pid();
    let api = load::Api::connect(&serve, kit.api_key(database), settings).await;
    durability::not_bypassed(pid)?;
    if database.is_sqlite() {
        println!("{}", durability::of_commits(pid, || api.register(0)).await?);
    }
    let per_second = api.register_all(0..settings.devices).await;
    println!("{database}: {} devices registered, {per_second:.0}/s", settings.devices);
    service::stop(serve).await.pop().map_or(Ok(()), Err)
}

/// All rounds, with the simulator that answers at once and the one that is far away.
async fn measure(
    settings: &Settings,
    kit: &Kit,
    [sink, far]: [&Sink; 2],
    databases: &[Database],
    folder: &Path,
) -> Rounds {
    let mut commits = Vec::new();
    for database in databases {
        commits.push(Commits::new(database, folder).await);
    }
    let mut registrations = Vec::new();
    if settings.registrations > 0 {
        for database in databases {
            registrations.push(Registrations::beside(database).await);
        }
    }
    let engine = |kind, connections| Client::Engine(Engine { kind, connections, prepared: true });
    let mut steps = vec![
        Step::Client { name: report::H2_1, client: Client::BareH2 { connections: 1 }, sink },
        Step::Client { name: report::H2_4, client: Client::BareH2 { connections: 4 }, sink },
        Step::Client { name: report::HYPER, client: Client::HyperUtil, sink },
        Step::Client { name: report::BROADCAST, client: engine(Kind::Broadcast, None), sink },
        Step::Client { name: report::SINGLES, client: engine(Kind::Singles, None), sink },
    ];
    // Beside what they are compared with.
    if settings.broadcast > 0 {
        steps.extend(databases.iter().map(Step::Broadcast));
    }
    steps.extend([
        Step::Client { name: report::FAR_1, client: engine(Kind::Broadcast, Some(1)), sink: far },
        Step::Client { name: report::FAR_4, client: engine(Kind::Broadcast, Some(4)), sink: far },
    ]);
    steps.extend(commits.iter().map(Step::Commits));
    steps.extend(databases.iter().map(Step::Sonnette));
    steps.extend(registrations.iter().flat_map(|both| [Step::Upserts(both), Step::Registrations(both)]));

    if settings.replicas_notifications > 0 {
        steps.extend(databases.iter().filter(|database| !database.is_sqlite()).map(Step::Replicas));
    }

    if settings.retention > 0 {
        steps.extend(databases.iter().filter(|database| !database.is_sqlite()).map(Step::Retention));
    }

    let mut rounds = Rounds::default();
    for round in 0..settings.rounds {
        println!("round {} of {}", round + 1, settings.rounds);
        rounds.begin();
        for step in &steps {
            match step {
                Step::Client { name, client, sink } => {
                    let plan = Plan::new(client.clone(), kit, sink, settings.pushes);
                    let figures = client_run(name, &plan, kit, sink, &mut rounds).await;
                    rounds.note(&format!("{name}: pushes/s"), figures.per_second);
                    rounds.note(&format!("{name}: CPU µs/push"), figures.cpu_us);
                    if matches!(client, Client::Engine(_)) {
                        rounds.note(&format!("{name}: peak memory MiB"), figures.peak_memory);
                        rounds.note(&format!("{name}: of the machine's processors"), figures.busy);
                    }
                }
                Step::Commits(commits) => {
                    for (name, per_second) in on_all_threads(commits.measure(settings.commits)) {
                        rounds.note(&name, per_second);
                    }
                }
                Step::Sonnette(database) => {
                    let serve = kit.serve(database, sink).await;
                    let api = load::Api::connect(&serve, kit.api_key(database), settings).await;
                    let mut batch = load::batch(&api, &serve, database, sink, settings).await;
                    batch.problems.extend(service::stop(serve).await);
                    rounds.take(database, batch);
                }
                Step::Upserts(registrations) => {
                    for (name, per_second) in on_all_threads(registrations.upserts(settings, round)) {
                        rounds.note(&name, per_second);
                    }
                }
                Step::Registrations(registrations) => {
                    let batch = registrations.through_the_api(kit, sink, settings, round).await;
                    rounds.take(registrations.place(), batch);
                }
                Step::Replicas(database) => {
                    rounds.take(database, replicas::measure(kit, [sink, far], database, settings, round).await);
                }
                Step::Retention(_) if round > 0 => {}
                Step::Retention(database) => {
                    rounds.take(database, retention::measure(kit, sink, database, settings).await);
                }
                // A large one takes minutes.
                Step::Broadcast(_) if round > 0 && settings.broadcast > broadcast::SMALL => {}
                Step::Broadcast(database) => {
                    let batch = broadcast::measure(kit, sink, database, settings).await;
                    rounds.take(database, batch);
                    if settings.broadcast > broadcast::SMALL {
                        small_broadcast(kit, sink, database, settings, &mut rounds).await;
                    }
                }
            }
        }
        rounds.compare(databases);
        // Nobody is always the first after a pause, or always behind the same other.
        steps.rotate_left(1);
    }
    for both in registrations {
        both.drop().await;
    }
    rounds
}

/// The memory of a broadcast to fewer devices, to compare with.
async fn small_broadcast(kit: &Kit, sink: &Sink, database: &Database, settings: &Settings, rounds: &mut Rounds) {
    let devices = broadcast::SMALL;
    let mut batch = Batch::default();
    match broadcast::peaks(kit, sink, database, settings, devices).await {
        Ok(peaks) => {
            for (name, peak) in report::SMALL_PEAKS.iter().zip(peaks) {
                batch.note(name, peak);
            }
        }
        Err(problem) => batch.problems.push(format!("broadcast to {devices} devices: {problem}")),
    }
    rounds.take(database, batch);
}

/// One client in its process; each of its pushes must have been accepted once.
async fn client_run(name: &str, plan: &Plan, kit: &Kit, sink: &Sink, rounds: &mut Rounds) -> Figures {
    let before = sink.accepted().await;
    let figures = yardstick::run(plan, &kit.client_log());
    let arrived = sink.accepted().await - before;
    if arrived != figures.sent {
        rounds.problem(format!("{name}: {} pushes sent, {arrived} accepted", figures.sent));
    }
    figures
}

/// Once: ten times as many pushes in one run take no more memory. No push is made before its turn comes.
async fn memory(settings: &Settings, kit: &Kit, sink: &Sink, rounds: &mut Rounds) {
    rounds.begin();
    let mut peaks = Vec::new();
    for pushes in [settings.pushes, 10 * settings.pushes] {
        let client = Client::Engine(Engine { kind: Kind::Broadcast, connections: None, prepared: false });
        let name = format!("engine, {pushes} pushes");
        let figures = client_run(&name, &Plan::new(client, kit, sink, pushes), kit, sink, rounds).await;
        rounds.note(&format!("{name}: peak memory MiB"), figures.peak_memory);
        peaks.push(figures.peak_memory);
    }
    if peaks[1] > MEMORY_GROWTH * peaks[0] {
        rounds.problem(format!("ten times as many pushes took {:.2} times the memory", peaks[1] / peaks[0]));
    }
}
