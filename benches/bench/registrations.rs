//! Registrations through the API, all at once as after an app's update, and what the database alone can do: single
//! upserts into the same table.

use std::{ops::Range, time::Instant};

use sqlx::{Arguments as _, ConnectOptions as _, Connection as _, Database as Dialect};
use uuid::Uuid;

use crate::{
    commits::{self, MANY, durable_sqlite},
    load::{Api, Batch, user},
    service::{self, Database, Kit, Processors, Sink, TOPIC, device_token},
    settings::Settings,
};

/// The two states in which a registration finds its device.
const KINDS: [&str; 2] = ["new", "known"];

/// Two databases with Sonnette's schema in one place: one is served, the other takes statements from us. They grow
/// alike, round by round.
pub(crate) struct Registrations {
    served: Database,
    bare: Database,
}

impl Registrations {
    pub(crate) async fn beside(database: &Database) -> Self {
        Self { served: database.sibling().await, bare: database.sibling().await }
    }

    pub(crate) fn place(&self) -> &Database {
        &self.served
    }

    pub(crate) async fn drop(self) {
        self.served.drop().await;
        self.bare.drop().await;
    }

    /// Registers devices nobody knows, and then the same ones again.
    pub(crate) async fn through_the_api(&self, kit: &Kit, sink: &Sink, settings: &Settings, round: usize) -> Batch {
        let mut batch = Batch::default();
        let serve = kit.serve(&self.served, sink).await;
        let api = Api::connect(&serve, kit.api_key(&self.served), settings).await;
        let count = settings.registrations;
        for kind in KINDS {
            let processors = Processors::start(&serve, &self.served, sink);
            let per_second = api.register_all(numbers(count, round)).await;
            batch.note(&format!("registrations of {kind} devices/s"), per_second);
            for (name, took) in processors.since().into_iter().filter(|(name, _)| *name != "simulator") {
                batch.note(&format!("{name}: CPU µs/registration of a {kind} device"), took / count as f64);
            }
        }
        batch.problems.extend(service::stop(serve).await);
        let devices = self.served.number("SELECT COUNT(*) FROM devices").await;
        if devices != (count * (round + 1)) as u64 {
            batch.problems.push(format!("{devices} devices after {} were registered", count * (round + 1)));
        }
        batch
    }

    /// The same with single statements; a second, by name. SQLite has one writer, and gets an eighth of the work.
    pub(crate) async fn upserts(&self, settings: &Settings, round: usize) -> Vec<(String, f64)> {
        let mut figures = Vec::new();
        for kind in KINDS {
            let (connections, numbers, started);
            if let Some(file) = self.bare.sqlite_file() {
                let connection = durable_sqlite(file).connect().await.expect("SQLite");
                (connections, numbers) = (1, self::numbers((settings.registrations / 8).max(1), round));
                started = Instant::now();
                commits::on_any_thread(sqlite_upserts(connection, numbers.clone())).await;
            } else {
                let options: sqlx::mysql::MySqlConnectOptions = self.bare.url.parse().expect("a MySQL address");
                let mut open = Vec::new();
                for _ in 0..MANY {
                    let mut connection = options.connect().await.expect("the server answers");
                    // As Sonnette has it; with the default, neighbours deadlock.
                    let read_committed = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";
                    sqlx::raw_sql(read_committed).execute(&mut connection).await.expect("a setting");
                    open.push(connection);
                }
                (connections, numbers) = (MANY, self::numbers(settings.registrations, round));
                started = Instant::now();
                let all = open.into_iter().enumerate().map(|(first, connection)| {
                    let share = numbers.clone().skip(first).step_by(MANY);
                    commits::on_any_thread(mysql_upserts(connection, share))
                });
                futures_util::future::join_all(all).await;
            }
            let per_second = numbers.len() as f64 / started.elapsed().as_secs_f64();
            figures.push((yardstick(&self.bare, connections, kind), per_second));
        }
        figures
    }
}

/// Ratio by ratio: its name, the figure above and the figure below.
pub(crate) fn ratios(database: &Database) -> Vec<(String, String, String)> {
    let connections = if database.is_sqlite() { 1 } else { MANY };
    let ratio = |kind| {
        let above = format!("sonnette, {database}: registrations of {kind} devices/s");
        (format!("registrations ÷ single upserts, {kind} devices"), above, yardstick(database, connections, kind))
    };
    KINDS.map(ratio).into()
}

fn yardstick(database: &Database, connections: usize, kind: &str) -> String {
    let plural = if connections == 1 { "" } else { "s" };
    format!("{database}, {connections} connection{plural}: single upserts of {kind} devices/s")
}

/// The devices of a round.
fn numbers(count: usize, round: usize) -> Range<usize> {
    count * round..count * (round + 1)
}

/// What a registration writes of a device, in both dialects.
const INSERT: &str = "INSERT INTO devices (id, topic, token, push_type, user_id, generation, environment, status, \
    created_at, last_registered_at, last_accepted_at) VALUES (?, ?, ?, 'alert', ?, 1, 'unverified', 'active', ?, ?, -1099511627776)";

const BOUND: &str = "plain values can be bound";

/// The values for [`INSERT`].
fn values<'a, D: Dialect>(number: usize) -> D::Arguments
where
    D::Arguments: Default,
    Vec<u8>: sqlx::Encode<'a, D> + sqlx::Type<D>,
    &'a str: sqlx::Encode<'a, D> + sqlx::Type<D>,
    i64: sqlx::Encode<'a, D> + sqlx::Type<D>,
{
    let now = jiff::Timestamp::now().as_millisecond();
    let token = hex::decode(device_token(number)).expect("hex");
    let mut values = D::Arguments::default();
    values.add(Uuid::now_v7().as_bytes().to_vec()).expect(BOUND);
    values.add(TOPIC).expect(BOUND);
    values.add(token).expect(BOUND);
    values.add(user(number).into_bytes()).expect(BOUND);
    values.add(now).expect(BOUND);
    values.add(now).expect(BOUND);
    values
}

async fn mysql_upserts(mut connection: sqlx::MySqlConnection, numbers: impl Iterator<Item = usize>) {
    let upsert = format!(
        "{INSERT} ON DUPLICATE KEY UPDATE user_id = VALUES(user_id), last_registered_at = VALUES(last_registered_at)"
    );
    for number in numbers {
        let upsert = sqlx::query_with(sqlx::AssertSqlSafe(upsert.as_str()), values::<sqlx::MySql>(number));
        upsert.execute(&mut connection).await.expect("a commit");
    }
    let _ = connection.close().await;
}

async fn sqlite_upserts(mut connection: sqlx::SqliteConnection, numbers: impl Iterator<Item = usize>) {
    let upsert = format!(
        "{INSERT} ON CONFLICT (topic, token) DO UPDATE SET user_id = excluded.user_id, \
         last_registered_at = excluded.last_registered_at"
    );
    for number in numbers {
        let upsert = sqlx::query_with(sqlx::AssertSqlSafe(upsert.as_str()), values::<sqlx::Sqlite>(number));
        upsert.execute(&mut connection).await.expect("a commit");
    }
    let _ = connection.close().await;
}
