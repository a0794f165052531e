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

mod commits;
mod durability;
mod load;
mod report;
mod service;
mod settings;
mod wire;
mod yardstick;

/// The tests' private database server, and processes and folders that do not outlive us.
#[path = "../../tests/it/support"]
mod support {
    #[expect(dead_code, unused_macros, unused_imports, reason = "the tests use more of it")]
    pub(crate) mod database;
    pub(crate) mod ports;
    pub(crate) mod scratch;
}

use std::{path::Path, process::ExitCode};

use crate::{
    commits::Commits,
    report::Rounds,
    service::{Database, Kit, Sink},
    settings::Settings,
    support::{database::PrivateServer, scratch::Folder},
    yardstick::{Client, Plan},
};

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
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
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

/// What takes its turn in a round.
enum Step<'a> {
    Yardstick(&'static str, Client),
    Commits(&'a Commits),
    Sonnette(&'a Database),
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
    let sink = Sink::start(&kit);
    for database in &databases {
        prepare(settings, &kit, &sink, database).await?;
    }
    let rounds = measure(settings, &kit, &sink, &databases, folder.path()).await;
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
    let api = load::Api::connect(serve.address(), kit.api_key(database), settings).await;
    durability::not_bypassed(serve.pid())?;
    if database.is_sqlite() {
        println!("{}", durability::of_commits(serve.pid(), || api.register(0)).await?);
    }
    let per_second = api.register_all(settings.devices).await;
    println!("{database}: {} devices registered, {per_second:.0}/s", settings.devices);
    serve.stop().await
}

async fn measure(settings: &Settings, kit: &Kit, sink: &Sink, databases: &[Database], folder: &Path) -> Rounds {
    let mut commits = Vec::new();
    for database in databases {
        commits.push(Commits::new(database, folder).await);
    }
    let mut steps = vec![
        Step::Yardstick("h2 loop, 1 connection", Client::BareH2 { connections: 1 }),
        Step::Yardstick("h2 loop, 4 connections", Client::BareH2 { connections: 4 }),
        Step::Yardstick("hyper-util client", Client::HyperUtil),
    ];
    steps.extend(commits.iter().map(Step::Commits));
    steps.extend(databases.iter().map(Step::Sonnette));

    let mut rounds = Rounds::default();
    for round in 0..settings.rounds {
        println!("round {} of {}", round + 1, settings.rounds);
        rounds.begin();
        for step in &steps {
            match step {
                Step::Yardstick(name, client) => {
                    let before = sink.accepted().await;
                    let figures = yardstick::run(&Plan::new(client.clone(), kit, sink, settings));
                    let arrived = sink.accepted().await - before;
                    if arrived != figures.sent {
                        rounds.problem(format!("{name}: {} pushes sent, {arrived} accepted", figures.sent));
                    }
                    rounds.note(&format!("{name}: pushes/s"), figures.per_second);
                    rounds.note(&format!("{name}: CPU µs/push"), figures.cpu_us);
                }
                Step::Commits(commits) => {
                    for (name, per_second) in commits.measure(settings.commits).await {
                        rounds.note(&name, per_second);
                    }
                }
                Step::Sonnette(database) => {
                    let serve = kit.serve(database, sink).await;
                    let api = load::Api::connect(serve.address(), kit.api_key(database), settings).await;
                    let batch = load::batch(&api, &serve, database, sink, settings).await;
                    for (name, value) in batch.figures {
                        rounds.note(&format!("sonnette, {database}: {name}"), value);
                    }
                    for problem in batch.problems {
                        rounds.problem(format!("{database}, round {}: {problem}", round + 1));
                    }
                    if let Err(problem) = serve.stop().await {
                        rounds.problem(format!("{database}, round {}: {problem}", round + 1));
                    }
                }
            }
        }
        rounds.compare(databases);
        // Nobody is always the first after a pause, or always behind the same other.
        steps.rotate_left(1);
    }
    rounds
}
