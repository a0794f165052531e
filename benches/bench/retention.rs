//! What single notifications feel of the deletion of old ones: on MySQL, at a steady rate, on the same tables.
//!
//! The old ones are copies of such as were really sent, dated back behind the days that they are kept: a notification, its
//! chunk with the outcome, and its user's link each. The rate alone is measured with retention off, in a process of
//! its own.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use crate::{
    broadcast::{self, Stage, note_ways},
    load::Batch,
    service::{Database, Kit, Sink},
    settings::Settings,
};

/// Days since the old ones ended: beyond the default of 30.
const AGE: Duration = Duration::from_secs(40 * 24 * 3600);

/// Copies of each that one statement makes.
const COPIES: usize = 50;

/// For how long single notifications are posted, alone and beside the deletion.
const SECONDS: usize = 15;

/// How long the deletion may take to begin: it waits for 5 s after the start.
const PATIENCE: Duration = Duration::from_secs(60);

const NEVER: &str = "[retention]\nnotifications_days = \"never\"\npayloads_days = \"never\"";

const LEFT: &str = "SELECT COUNT(*) FROM notifications";

/// All of it, on a fresh database beside `place`.
pub(crate) async fn measure(kit: &Kit, sink: &Sink, place: &Database, settings: &Settings) -> Batch {
    let mut batch = Batch::default();
    let stage = Stage::set(kit, sink, place, settings, 1, (1, NEVER)).await;
    let old = with_old_notifications(stage.database(), settings.retention).await;
    singles(&stage, &mut batch, "beside old ones").await;
    let (database, problems) = stage.leave().await;
    batch.problems.extend(problems);

    // The warm-up is over long before the deletion begins.
    let stage = Stage::on(kit, sink, database, settings, 1, (1, "")).await;
    let (began, before) = (Instant::now(), stage.database().number(LEFT).await);
    while stage.database().number(LEFT).await >= before && began.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (began, before) = (Instant::now(), stage.database().number(LEFT).await);
    let posted = singles(&stage, &mut batch, "while old ones are deleted").await;
    let after = stage.database().number(LEFT).await;
    let deleted = (before + posted as u64).saturating_sub(after);
    batch.note("old notifications deleted/s meanwhile", deleted as f64 / began.elapsed().as_secs_f64());
    if deleted == 0 {
        batch.problems.push(format!("none of {old} old notifications was deleted"));
    }
    batch.problems.extend(stage.strike().await);
    batch
}

/// Returns how many were posted.
async fn singles(stage: &Stage<'_>, batch: &mut Batch, when: &str) -> usize {
    let (rate, posted) = (broadcast::RATE, Cell::new(0));
    let ways = stage.recorded(rate, &posted, || posted.get() >= SECONDS * rate).await;
    note_ways(batch, rate, when, ways);
    posted.get()
}

/// Copies what is there until there are at least so many more. Returns how many.
async fn with_old_notifications(database: &Database, count: usize) -> usize {
    let there = usize::try_from(database.number(LEFT).await).expect("not that many");
    let then = jiff::Timestamp::now().as_millisecond() - i64::try_from(AGE.as_millis()).expect("days");
    let turns = count.div_ceil(there * COPIES);
    let numbers: Vec<String> = (0..COPIES).map(|number| format!("SELECT {number} AS copy")).collect();
    let numbers = numbers.join(" UNION ALL ");
    let statements = (0..turns).flat_map(|turn| {
        // Each copy has a time of its own in its id, which begins with it; what makes ids different stands behind that.
        let first = then + i64::try_from(turn * COPIES).expect("not that many");
        let from = |table: &str, id: &str, is_original: &str, columns: [&str; 2]| {
            format!(
                "INSERT INTO {table} ({id}, {}) SELECT CONCAT(UNHEX(LPAD(HEX({first} + copy), 12, '0')), SUBSTR({id}, 7)), {} \
                 FROM {table} JOIN ({numbers}) AS copies WHERE {is_original}",
                columns[0], columns[1]
            )
        };
        let kept = "topic, owner, reference, lane, push_type, priority, expires_at, collapse_id, derives_collapse_id, \
                    on_unknown, environment, payload, audience, audience_complete, unmatched, due_at, cancelled_at, warnings";
        let outcome = "number, lane, holder, epoch, due_at, targets, states, targeted, accepted, failed, unregistered, \
                       expired, cancelled, suppressed, unanswered, waiting_since";
        let together = "topic, lane, holder, due_at, targets, seats, open, accepted";
        let cohort = format!("CONCAT(UNHEX(LPAD(HEX({first} + copy), 12, '0')), SUBSTR(cohort, 7))");
        let recent = |id: &str| format!("SUBSTR({id}, 1, 6) > UNHEX(LPAD(HEX({}), 12, '0'))", then + 24 * 3_600_000);
        [
            from(
                "notifications",
                "id",
                &recent("id"),
                [
                    &format!("{kept}, seat, created_at, cohort"),
                    &format!("{kept}, seat, {first} + copy, {cohort}"),
                ],
            ),
            from(
                "chunks",
                "notification_id",
                &recent("notification_id"),
                [&format!("{outcome}, ended_at"), &format!("{outcome}, {first} + copy")],
            ),
            from(
                "cohorts",
                "id",
                &recent("id"),
                [&format!("{together}, accepted_at"), &format!("{together}, {first} + copy")],
            ),
            from("notification_users", "notification_id", &recent("notification_id"), ["user_id", "user_id"]),
        ]
    });
    database.execute_all(statements).await;
    turns * COPIES * there
}
