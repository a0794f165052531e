//! Medians and spreads, ratios of the same round, a table, and `target/bench.json`.

use std::path::Path;

use serde_json::json;

use crate::{load::Batch, registrations, replicas, service::Database, settings::Settings};

/// The names of the clients.
pub(crate) const H2_1: &str = "h2 loop, 1 connection";
pub(crate) const H2_4: &str = "h2 loop, 4 connections";
pub(crate) const HYPER: &str = "hyper-util client";
pub(crate) const BROADCAST: &str = "engine, broadcast";
pub(crate) const SINGLES: &str = "engine, singles";
pub(crate) const FAR_1: &str = "engine, 50 ms away, 1 connection";
pub(crate) const FAR_4: &str = "engine, 50 ms away, 4 connections";

/// Of Sonnette, if more devices than that are measured: after a first and after a second broadcast.
pub(crate) const SMALL_PEAKS: [&str; 2] = [
    "first broadcast to 100,000 devices: serve: peak memory MiB",
    "second broadcast to 100,000 devices: serve: peak memory MiB",
];

/// What was measured, round by round.
#[derive(Default)]
pub(crate) struct Rounds {
    /// In the order of their first appearance: a name, and a value a round.
    figures: Vec<(String, Vec<f64>)>,
    /// Names and values of the round that runs.
    current: Vec<(String, f64)>,
    pub(crate) problems: Vec<String>,
}

impl Rounds {
    pub(crate) fn begin(&mut self) {
        self.current.clear();
    }

    pub(crate) fn note(&mut self, name: &str, value: f64) {
        println!("  {name}: {}", shown(value));
        self.keep(name, value);
    }

    pub(crate) fn problem(&mut self, what: String) {
        eprintln!("  PROBLEM: {what}");
        self.problems.push(what);
    }

    /// What was measured of Sonnette on a database.
    pub(crate) fn take(&mut self, database: &Database, batch: Batch) {
        for (name, value) in batch.figures {
            self.note(&format!("sonnette, {database}: {name}"), value);
        }
        for problem in batch.problems {
            self.problem(format!("{database}: {problem}"));
        }
    }

    fn keep(&mut self, name: &str, value: f64) {
        self.current.push((name.to_owned(), value));
        match self.figures.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.figures.push((name.to_owned(), vec![value])),
        }
    }

    /// The ratios of this round.
    pub(crate) fn compare(&mut self, databases: &[Database]) {
        for (engine, yardstick) in
            [BROADCAST, SINGLES].into_iter().flat_map(|engine| [H2_1, H2_4, HYPER].map(|yardstick| (engine, yardstick)))
        {
            let figures = |what: &str| (format!("{engine}: {what}"), format!("{yardstick}: {what}"));
            let (above, below) = figures("pushes/s");
            self.ratio(&format!("{engine} ÷ {yardstick}: pushes/s"), &above, &below);
            // The other way round, so that more is better here as well.
            let (below, above) = figures("CPU µs/push");
            self.ratio(&format!("{engine} ÷ {yardstick}: pushes per CPU second"), &above, &below);
        }
        for database in databases {
            let whole = format!("sonnette, {database}: accepted, delivered and settled/s");
            let commits = if database.is_sqlite() {
                "SQLite, 1 connection: commits/s"
            } else {
                "MySQL, 32 connections: commits/s"
            };
            let cpu = format!("sonnette, {database}: serve: CPU µs/notification");
            for (name, above, below) in [
                ("settled/s ÷ h2 loop (1 connection) pushes/s", &*whole, "h2 loop, 1 connection: pushes/s"),
                ("settled/s ÷ h2 loop (4 connections) pushes/s", &whole, "h2 loop, 4 connections: pushes/s"),
                ("settled/s ÷ hyper-util pushes/s", &whole, "hyper-util client: pushes/s"),
                ("settled/s ÷ bare commits/s", &whole, commits),
                ("serve CPU ÷ h2 loop (4 connections) CPU", &cpu, "h2 loop, 4 connections: CPU µs/push"),
                ("serve CPU ÷ hyper-util CPU", &cpu, "hyper-util client: CPU µs/push"),
            ] {
                self.ratio(&format!("{database}: {name}"), above, below);
            }
            for (name, above, below) in registrations::ratios(database) {
                self.ratio(&format!("{database}: {name}"), &above, &below);
            }
            for (name, above, below) in replicas::ratios() {
                let figure = |name: &str| format!("sonnette, {database}: {name}");
                self.ratio(&format!("{database}: {name}"), &figure(&above), &figure(&below));
            }
            self.compare_broadcasts(database);
        }
    }

    fn compare_broadcasts(&mut self, database: &Database) {
        for (which, small) in ["first", "second"].into_iter().zip(SMALL_PEAKS) {
            let broadcast = format!("sonnette, {database}: {which} broadcast");
            for yardstick in [BROADCAST, H2_1, H2_4] {
                let name = format!("{database}: {which} broadcast ÷ {yardstick}");
                let per_second = format!("{yardstick}: pushes/s");
                self.ratio(&format!("{name}: pushes/s"), &format!("{broadcast}: devices/s"), &per_second);
                let (below, above) =
                    (format!("{broadcast}: serve: CPU µs/device"), format!("{yardstick}: CPU µs/push"));
                self.ratio(&format!("{name}: pushes per CPU second"), &above, &below);
            }
            let peak = format!("{broadcast}: serve: peak memory MiB");
            let small = format!("sonnette, {database}: {small}");
            self.ratio(&format!("{database}: {which} broadcast ÷ one to 100,000 devices: peak memory"), &peak, &small);
        }
        let singles =
            |rate, when| format!("sonnette, {database}: {rate} single notifications/s {when}: POST to arrival, p99 ms");
        let name = format!("{database}: 100 single notifications/s during a broadcast ÷ alone: p99");
        self.ratio(&name, &singles(100, "during a broadcast"), &singles(100, "alone"));
        let name = format!("{database}: 500 single notifications/s alone: p99 ÷ a bare commit's p50");
        self.ratio(&name, &singles(500, "alone"), &format!("{database}, 1 connection: a commit, p50 ms"));
    }

    fn ratio(&mut self, name: &str, above: &str, below: &str) {
        let value = |name: &str| self.current.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
        if let (Some(above), Some(below)) = (value(above), value(below)) {
            self.keep(&format!("ratio, {name}"), above / below);
        }
    }

    /// The table, in Markdown, to be pasted into docs/performance.md.
    pub(crate) fn print(&self) {
        let mut figures: Vec<_> = self.figures.iter().collect();
        // Yardsticks, Sonnette, ratios, whatever order the last round had; the sort is stable.
        figures.sort_by_key(|(name, _)| (name.starts_with("ratio"), name.starts_with("sonnette")));
        println!("\n| figure | median | spread |\n|---|---:|---:|");
        for (name, values) in figures {
            let (median, low, high) = spread(values);
            println!("| {name} | {} | {}–{} |", shown(median), shown(low), shown(high));
        }
    }

    pub(crate) fn write(&self, settings: &Settings) {
        let figures: Vec<_> = self
            .figures
            .iter()
            .map(|(name, values)| {
                let (median, low, high) = spread(values);
                json!({ "name": name, "median": median, "min": low, "max": high, "rounds": values })
            })
            .collect();
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let report = json!({
            "at": jiff::Timestamp::now().to_string(), "version": env!("CARGO_PKG_VERSION"), "cores": cores,
            "settings": settings, "figures": figures, "problems": self.problems,
        });
        // target/dist/sonnette -> target/bench.json
        let target = Path::new(env!("CARGO_BIN_EXE_sonnette")).ancestors().nth(2).expect("target/dist");
        let text = serde_json::to_string_pretty(&report).expect("plain data");
        std::fs::write(target.join("bench.json"), text + "\n").expect("target can be written");
        println!("\n{cores} cores; all rounds are in target/bench.json");
    }
}

/// Median, smallest and largest.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] };
    (median, sorted[0], sorted[sorted.len() - 1])
}

/// Three digits are all that such a figure is worth.
fn shown(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}
