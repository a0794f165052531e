//! Keeping house: what has been kept for as long as was promised is deleted, a few hundred rows a transaction.
//!
//! Promises: nothing that is open goes, however old it is; a notification goes whole, or its own row first and the rest
//! by [`Subject::Remains`], also after a crash; a forgotten device's tombstone stays as long as any notification that
//! could name it. Walks go by index and key, page by page; a page that is cut or fails is simply walked again.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;

use super::{
    Kind, ReplicaId, StoreError, acceptances,
    audience::LIST,
    queue::{
        cohort::{self, Spans, Standing},
        for_update, notification_id,
    },
    sql::{Failure, Repeat, committed, on_both, read},
    statement::{Conn, Row, Statement, Value, corrupt, id_value},
};
use crate::domain::{
    clock::Timestamp,
    device::{DeviceSeq, DeviceToken},
    notification::NotificationId,
};

/// What is walked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    /// What is left of large notifications whose own row has gone.
    Remains,
    /// Cohorts of notifications that came at or before the time given, and have gone.
    Cohorts,
    /// Payloads of notifications that ended at or before the time given. Their rows stay.
    Payloads,
    /// Notifications that ended at or before the time given, with everything that belongs to them.
    Notifications,
    /// Idempotency keys that came, and whose notifications ended, at or before the time given.
    IdempotencyKeys,
    /// Notes since when devices are inactive or suspended: `until` is that time. Deletes nothing.
    NewlyInactive,
    /// Devices that have been inactive or suspended since before the time given, and have not registered since.
    InactiveDevices,
    /// Tombstones of devices forgotten at or before the time given that no notification can name.
    Tombstones,
    /// API keys revoked or expired at or before the time given.
    ApiKeys,
}

/// Where a walk goes on; the default is its beginning.
#[derive(Debug, Clone, Default)]
pub struct Place(Vec<Value>);

/// What one page came to.
#[derive(Debug, Clone, Default)]
pub struct Swept {
    /// Rows that went, by table; payloads under `payloads`, although their rows stay.
    pub deleted: Vec<(&'static str, u64)>,
    /// Where to go on; `None` at the end of the walk.
    pub next: Option<Place>,
}

/// How large a table is, by the database's own account: an estimate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSize {
    /// Which.
    pub table: String,
    /// Data and indexes.
    pub bytes: u64,
    /// Rows.
    pub rows: u64,
}

/// How large everything is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Each table of ours; none where asking costs too much (an SQLite file beyond [`WALKED_BYTES`]).
    pub tables: Vec<TableSize>,
    /// All of it.
    pub bytes: u64,
    /// Of that, room for new rows left by deleted ones.
    pub free_bytes: u64,
}

/// What is over goes, in small steps.
#[async_trait]
pub trait Retention: Send + Sync {
    /// Walks one page of a subject, if `replica` keeps house: of those that are alive the one that joined first.
    /// `None` if it does not. `until` is what the [`Subject`] says.
    async fn sweep(
        &self,
        subject: Subject,
        from: &Place,
        until: Timestamp,
        replica: ReplicaId,
    ) -> Result<Option<Swept>, StoreError>;
    /// Writes down that whatever was due at `at` has gone.
    async fn record_house_kept(&self, at: Timestamp) -> Result<(), StoreError>;
    /// The newest moment of which all that was due has gone; `None` if that never was.
    async fn house_kept_at(&self) -> Result<Option<Timestamp>, StoreError>;
    /// How large everything is. Cheap, but not for every request.
    async fn sizes(&self) -> Result<Sizes, StoreError>;
}

/// Rows of all tables that one transaction deletes, about; and a larger notification goes piece by piece.
const ROWS: u64 = 500;

/// Rows that one page looks at.
const PAGE: usize = 256;

/// Cohorts that one page looks at: of each the notifications that are left, up to 256, are looked at as well.
const COHORTS_PAGE: usize = 64;

/// Rows that one page looks at where most of them stay and little is read of each.
const LONG_PAGE: usize = 1_000;

/// By how much replicas' clocks may differ before a tombstone goes too early.
const CLOCK_MARGIN: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// The largest SQLite file whose tables are measured: each of its pages is looked at.
pub const WALKED_BYTES: u64 = 1 << 30;

const HOUSE_KEPT_AT: &str = "house_kept_at";

const TABLES: [&str; 18] = [
    "acceptances",
    "api_keys",
    "breakers",
    "chunks",
    "cohorts",
    "delivery_notes",
    "device_tags",
    "device_tombstones",
    "devices",
    "idempotency_keys",
    "inactive_devices",
    "notification_remains",
    "notification_users",
    "notifications",
    "reasons",
    "replicas",
    "schema_migrations",
    "service_facts",
];

/// What belongs to a notification and is deleted with it, and the rest of each row's key.
const PARTS: [(&str, &str); 3] =
    [("delivery_notes", "number, position"), ("notification_users", "user_id"), ("chunks", "number")];

on_both! {
    #[async_trait]
    impl Retention for Base {
        async fn sweep(
            &self,
            subject: Subject,
            from: &Place,
            until: Timestamp,
            replica: ReplicaId,
        ) -> Result<Option<Swept>, StoreError> {
            // Looked at beside the deletion, not locked with it: the heartbeat must never wait for a slow disk. At
            // worst two replicas delete the same page once, and what the second finds gone is not counted.
            let plan = read(|| async {
                let mut tx = self.snapshot().await?;
                let conn = &mut Conn::from(&mut *tx);
                if !keeps_house(conn, replica).await? {
                    return Ok(None);
                }
                Ok(Some(plan(conn, subject, from, until).await?))
            })
            .await?;
            let Some(Plan { doomed, next }) = plan else { return Ok(None) };
            if doomed.is_empty() {
                return Ok(Some(Swept { deleted: Vec::new(), next }));
            }
            let now = self.clock.now();
            let _turn = self.turn().await?;
            let deleted = committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let deleted = carry_out(&mut Conn::from(&mut *tx), &doomed, now).await?;
                Ok((tx, deleted))
            })
            .await?;
            Ok(Some(Swept { deleted, next }))
        }

        async fn record_house_kept(&self, at: Timestamp) -> Result<(), StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let mut statement = Statement::new("-- retention.kept\nREPLACE INTO service_facts (name, value) VALUES (");
                statement.bind(HOUSE_KEPT_AT).push(", ").bind(at.as_millis().to_string().into_bytes()).push(")");
                Conn::from(&mut *tx).execute(statement).await?;
                Ok((tx, ()))
            })
            .await
        }

        async fn house_kept_at(&self) -> Result<Option<Timestamp>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                let mut statement = Statement::new("-- retention.kept_at\nSELECT value FROM service_facts WHERE name = ");
                statement.bind(HOUSE_KEPT_AT);
                let rows = Conn::from(&mut *tx).fetch(statement).await?;
                Ok(rows.first().map(kept_at).transpose()?)
            })
            .await
        }

        async fn sizes(&self) -> Result<Sizes, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                sizes(&mut Conn::from(&mut *tx)).await
            })
            .await
        }
    }
}

/// What one transaction is to delete. Read before it begins: what has ended never opens again, and what could change
/// meanwhile (a device) is looked at once more, with a lock.
enum Doomed {
    Payloads(Vec<Value>),
    Notifications(Vec<Value>),
    /// Too large for one transaction: its own row goes, the rest is remembered as remains.
    Large(Value),
    Cohorts(Vec<Value>),
    /// One part of what remains of one notification, by place in [`PARTS`].
    Part(Value, usize),
    /// Nothing remains of it.
    Cleared(Value),
    IdempotencyKeys(Vec<Value>),
    NewlyInactive(Vec<Value>, Timestamp),
    InactiveDevices(Vec<i64>),
    Tombstones(Vec<Value>),
    ApiKeys(Vec<Value>),
}

impl Doomed {
    fn is_empty(&self) -> bool {
        match self {
            Self::Payloads(keys)
            | Self::Notifications(keys)
            | Self::Cohorts(keys)
            | Self::IdempotencyKeys(keys)
            | Self::NewlyInactive(keys, _)
            | Self::Tombstones(keys)
            | Self::ApiKeys(keys) => keys.is_empty(),
            Self::InactiveDevices(seqs) => seqs.is_empty(),
            Self::Large(_) | Self::Part(..) | Self::Cleared(_) => false,
        }
    }
}

struct Plan {
    doomed: Doomed,
    next: Option<Place>,
}

async fn keeps_house(conn: &mut Conn<'_>, replica: ReplicaId) -> Result<bool, Failure> {
    let rows = conn.fetch(Statement::new("-- retention.keeper\nSELECT MIN(id) FROM replicas")).await?;
    let first = rows.first().map(|row| row.int_or_null(0)).transpose()?.flatten();
    Ok(first == Some(replica.0))
}

async fn plan(conn: &mut Conn<'_>, subject: Subject, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    match subject {
        Subject::Remains => remains(conn).await,
        Subject::Cohorts => cohorts(conn, from, until).await,
        Subject::Payloads => payloads(conn, from, until).await,
        Subject::Notifications => notifications(conn, from, until).await,
        Subject::IdempotencyKeys => idempotency_keys(conn, from, until).await,
        Subject::NewlyInactive => newly_inactive(conn, from, until).await,
        Subject::InactiveDevices => inactive_devices(conn, from, until).await,
        Subject::Tombstones => tombstones(conn, from, until).await,
        Subject::ApiKeys => api_keys(conn, until).await,
    }
}

/// Where the next page begins, if this one was full.
fn next_page(
    page: usize,
    rows: &[Row],
    key: impl Fn(&Row) -> Result<Vec<Value>, StoreError>,
) -> Result<Option<Place>, StoreError> {
    match rows.last() {
        Some(last) if rows.len() >= page => Ok(Some(Place(key(last)?))),
        _ => Ok(None),
    }
}

/// The smallest id that could have been made after `at`: ids begin with their time.
fn first_id_after(at: Timestamp) -> Value {
    let millis = u64::try_from(at.as_millis()).unwrap_or(0).saturating_add(1).min((1 << 48) - 1);
    Value::Bytes(millis.to_be_bytes().into_iter().skip(2).chain([0; 10]).collect())
}

/// A page of what was made at or before `until`, oldest first, by ids that begin with their time.
fn by_id(statement: &mut Statement, page: usize, from: &Place, until: Timestamp) {
    statement.push("id > ").bind(from.0.first().cloned().unwrap_or_else(|| Value::Bytes(Vec::new())));
    statement.push(" AND id < ").bind(first_id_after(until)).push(" ORDER BY id LIMIT ").bind(page as u64);
}

/// A notification that may be over.
struct Candidate {
    id: NotificationId,
    created_at: i64,
    complete: bool,
    /// Whether it is worth a look: for payloads, whether there is one.
    wanted: bool,
}

/// Notifications made at or before `until`, oldest first.
async fn candidates(
    conn: &mut Conn<'_>,
    page: usize,
    from: &Place,
    until: Timestamp,
) -> Result<(Vec<Candidate>, Option<Place>), Failure> {
    let mut statement = Statement::new(
        "-- retention.candidates\nSELECT id, created_at, audience_complete, payload IS NOT NULL FROM notifications WHERE ",
    );
    by_id(&mut statement, page, from, until);
    let rows = conn.fetch(statement).await?;
    let next = next_page(page, &rows, |row| Ok(vec![row.bytes(0)?.into()]))?;
    let candidates = rows.iter().map(|row| {
        Ok(Candidate {
            id: notification_id(row.bytes(0)?)?,
            created_at: row.int(1)?,
            complete: row.int(2)? != 0,
            wanted: row.int(3)? != 0,
        })
    });
    Ok((candidates.collect::<Result<_, StoreError>>()?, next))
}

/// Which of these have been over since `until`, with the number of their chunks.
async fn over(
    conn: &mut Conn<'_>,
    candidates: &[Candidate],
    until: Timestamp,
) -> Result<HashMap<NotificationId, u64>, Failure> {
    let mut chunks: HashMap<NotificationId, (i64, i64, Option<i64>)> = HashMap::new();
    let ids: Vec<NotificationId> = candidates.iter().map(|one| one.id).collect();
    for (id, standing) in cohort::standings(conn, &ids).await? {
        match standing {
            // What cannot be read stays.
            Ok(Standing::Open) | Err(_) => drop(chunks.insert(id, (0, 1, None))),
            Ok(Standing::Accepted(at)) => drop(chunks.insert(id, (0, 0, Some(at.as_millis())))),
            Ok(Standing::Moved) => {}
        }
    }
    let others: Vec<NotificationId> = ids.into_iter().filter(|id| !chunks.contains_key(id)).collect();
    for piece in others.chunks(LIST) {
        let mut statement = Statement::new(
            "-- retention.ended\nSELECT notification_id, COUNT(*), CAST(SUM(holder IS NOT NULL) AS SIGNED), \
             MAX(ended_at) FROM chunks WHERE notification_id IN ",
        );
        statement.list(piece.iter().map(|id| id_value(id.as_uuid()))).push(" GROUP BY notification_id");
        for row in &conn.fetch(statement).await? {
            chunks.insert(notification_id(row.bytes(0)?)?, (row.int(1)?, row.int(2)?, row.int_or_null(3)?));
        }
    }
    let over = candidates.iter().filter_map(|one| {
        let (count, open, ended_at) = chunks.get(&one.id).copied().unwrap_or_default();
        let is_over = one.complete && open == 0 && ended_at.unwrap_or(one.created_at) <= until.as_millis();
        is_over.then_some((one.id, u64::try_from(count).unwrap_or(u64::MAX)))
    });
    Ok(over.collect())
}

async fn payloads(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    // Most have been emptied by an earlier walk.
    let (mut candidates, mut next) = candidates(conn, LONG_PAGE, from, until).await?;
    candidates.retain(|one| one.wanted);
    if candidates.len() > PAGE {
        candidates.truncate(PAGE);
        next = candidates.last().map(|last| Place(vec![id_value(last.id.as_uuid())]));
    }
    let over = over(conn, &candidates, until).await?;
    let ids = candidates.iter().filter(|one| over.contains_key(&one.id)).map(|one| id_value(one.id.as_uuid()));
    Ok(Plan { doomed: Doomed::Payloads(ids.collect()), next })
}

async fn notifications(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    let (candidates, mut next) = candidates(conn, PAGE, from, until).await?;
    let mut rows = over(conn, &candidates, until).await?;
    let ids: Vec<Value> = rows.keys().map(|id| id_value(id.as_uuid())).collect();
    for table in ["delivery_notes", "notification_users"] {
        if ids.is_empty() {
            break;
        }
        let mut statement = Statement::new("-- retention.rows\nSELECT notification_id, COUNT(*) FROM ");
        statement.push(table).push(" WHERE notification_id IN ").list(ids.iter().cloned());
        statement.push(" GROUP BY notification_id");
        for row in &conn.fetch(statement).await? {
            if let Some(count) = rows.get_mut(&notification_id(row.bytes(0)?)?) {
                *count = count.saturating_add(u64::try_from(row.int(1)?).unwrap_or(0));
            }
        }
    }
    let (mut doomed, mut sum) = (Vec::new(), 0u64);
    let mut before = from.clone();
    for one in &candidates {
        let id = id_value(one.id.as_uuid());
        let here = Place(vec![id.clone()]);
        if let Some(rows) = rows.get(&one.id).map(|rows| rows.saturating_add(1)) {
            if doomed.is_empty() && rows > ROWS {
                return Ok(Plan { doomed: Doomed::Large(id), next: Some(here) });
            }
            if sum + rows > ROWS {
                next = Some(before);
                break;
            }
            sum += rows;
            doomed.push(id);
        }
        before = here;
    }
    Ok(Plan { doomed: Doomed::Notifications(doomed), next })
}

/// One piece of what is left of a notification.
async fn remains(conn: &mut Conn<'_>) -> Result<Plan, Failure> {
    let rows = conn
        .fetch(Statement::new(
            "-- retention.remains\nSELECT notification_id FROM notification_remains ORDER BY notification_id LIMIT 1",
        ))
        .await?;
    let Some(id) = rows.first().map(|row| row.bytes(0)).transpose()?.map(Value::from) else {
        return Ok(Plan { doomed: Doomed::Notifications(Vec::new()), next: None });
    };
    for (place, (table, _)) in (0..).zip(PARTS) {
        let mut statement = Statement::new("-- retention.part\nSELECT 1 FROM ");
        statement.push(table).push(" WHERE notification_id = ").bind(id.clone()).push(" LIMIT 1");
        if !conn.fetch(statement).await?.is_empty() {
            return Ok(Plan { doomed: Doomed::Part(id, place), next: Some(Place::default()) });
        }
    }
    Ok(Plan { doomed: Doomed::Cleared(id), next: Some(Place::default()) })
}

/// The two keys at which a walk in the order of a time goes on.
fn time_and_key(from: &Place, first_key: Value) -> (Value, Value) {
    let mut keys = from.0.iter().cloned();
    (keys.next().unwrap_or(Value::Int(i64::MIN)), keys.next().unwrap_or(first_key))
}

async fn idempotency_keys(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    let (time, key) = time_and_key(from, Value::Bytes(Vec::new()));
    let mut statement = Statement::new(
        "-- retention.idempotency_keys\nSELECT created_at, request_key, notification_id FROM idempotency_keys",
    );
    statement.push(by_index(
        conn.kind(),
        " INDEXED BY idempotency_keys_created",
        " FORCE INDEX (idempotency_keys_created)",
    ));
    statement.push(" WHERE created_at >= ").bind(time.clone()).push(" AND (created_at > ").bind(time);
    statement.push(" OR request_key > ").bind(key).push(") AND created_at <= ").bind(until);
    statement.push(" ORDER BY created_at, request_key LIMIT ").bind(PAGE as u64);
    let rows = conn.fetch(statement).await?;
    let next = next_page(PAGE, &rows, |row| Ok(vec![Value::Int(row.int(0)?), row.bytes(1)?.into()]))?;

    let mut wanted = Vec::with_capacity(rows.len());
    for row in &rows {
        wanted.push((row.bytes(1)?, notification_id(row.bytes(2)?)?));
    }
    let ids: HashSet<NotificationId> = wanted.iter().map(|(_, id)| *id).collect();
    let mut there = Vec::with_capacity(ids.len());
    if !ids.is_empty() {
        let mut statement = Statement::new(
            "-- retention.notifications_of_keys\nSELECT id, created_at, audience_complete FROM notifications WHERE id IN ",
        );
        statement.list(ids.iter().map(|id| id_value(id.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let id = notification_id(row.bytes(0)?)?;
            there.push(Candidate { id, created_at: row.int(1)?, complete: row.int(2)? != 0, wanted: true });
        }
    }
    let over = over(conn, &there, until).await?;
    let still: HashSet<NotificationId> = there.iter().map(|one| one.id).filter(|id| !over.contains_key(id)).collect();
    let keys = wanted.into_iter().filter(|(_, id)| !still.contains(id)).map(|(key, _)| Value::from(key));
    Ok(Plan { doomed: Doomed::IdempotencyKeys(keys.collect()), next })
}

async fn cohorts(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    let mut statement = Statement::new("-- retention.cohorts\nSELECT id, last, accepted_at FROM cohorts WHERE ");
    by_id(&mut statement, COHORTS_PAGE, from, until);
    let rows = conn.fetch(statement).await?;
    let next = next_page(COHORTS_PAGE, &rows, |row| Ok(vec![row.bytes(0)?.into()]))?;
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for row in &rows {
        let id = notification_id(row.bytes(0)?)?;
        match row.bytes_or_null(1)? {
            Some(last) => known.push((id, Some(notification_id(last)?))),
            None => unknown.push((id, Timestamp::from_millis(row.int(2)?))),
        }
    }
    let mut empty: Vec<NotificationId> = known.iter().map(|(id, _)| *id).collect();
    if !known.is_empty() {
        let mut statement =
            Statement::new("-- retention.members\nSELECT DISTINCT cohort FROM notifications WHERE cohort IN ");
        statement.list(empty.iter().map(|id| id_value(id.as_uuid()))).push(" AND ");
        Spans::of(known.into_iter()).push(&mut statement, "id");
        let mut inhabited = HashSet::new();
        for row in &conn.fetch(statement).await? {
            inhabited.insert(notification_id(row.bytes(0)?)?);
        }
        empty.retain(|id| !inhabited.contains(id));
    }
    if !unknown.is_empty() {
        // Where its last member is not known, nothing may be left that is old enough to be one.
        let oldest = oldest(conn).await?.map(|oldest| oldest.minus(CLOCK_MARGIN));
        let gone = unknown.into_iter().filter(|(_, accepted_at)| oldest.is_none_or(|oldest| *accepted_at < oldest));
        empty.extend(gone.map(|(id, _)| id));
    }
    Ok(Plan { doomed: Doomed::Cohorts(empty.iter().map(|id| id_value(id.as_uuid())).collect()), next })
}

/// When the oldest notification came.
async fn oldest(conn: &mut Conn<'_>) -> Result<Option<Timestamp>, Failure> {
    let oldest = Statement::new("-- retention.oldest\nSELECT created_at FROM notifications ORDER BY id LIMIT 1");
    let oldest = conn.fetch(oldest).await?.first().map(|row| row.int(0)).transpose()?;
    Ok(oldest.map(Timestamp::from_millis))
}

/// Differs: how an index is named.
const fn by_index(kind: Kind, sqlite: &'static str, mysql: &'static str) -> &'static str {
    match kind {
        Kind::Sqlite => sqlite,
        Kind::Mysql => mysql,
    }
}

const IDLE: [&str; 2] = ["inactive", "suspended"];

async fn newly_inactive(conn: &mut Conn<'_>, from: &Place, now: Timestamp) -> Result<Plan, Failure> {
    let (which, seq) = match from.0.as_slice() {
        [Value::Int(which), Value::Int(seq)] => (*which, *seq),
        _ => (0, 0),
    };
    let Some(status) = usize::try_from(which).ok().and_then(|which| IDLE.get(which)) else {
        return Ok(Plan { doomed: Doomed::NewlyInactive(Vec::new(), now), next: None });
    };
    let mut statement =
        Statement::new("-- retention.inactive\nSELECT d.seq, d.last_registered_at, i.since FROM devices d");
    statement.push(by_index(conn.kind(), " INDEXED BY devices_status", " FORCE INDEX (devices_status)"));
    statement.push(" LEFT JOIN inactive_devices i ON i.device_seq = d.seq WHERE d.status = ").bind(*status);
    statement.push(" AND d.seq > ").bind(seq).push(" ORDER BY d.seq LIMIT ").bind(LONG_PAGE as u64);
    let rows = conn.fetch(statement).await?;
    let next = next_page(LONG_PAGE, &rows, |row| Ok(vec![Value::Int(which), Value::Int(row.int(0)?)]))?;
    let mut seqs = Vec::new();
    for row in &rows {
        let registered_at = row.int(1)?;
        if row.int_or_null(2)?.is_none_or(|since| since < registered_at) {
            seqs.push(Value::Int(row.int(0)?));
        }
    }
    let next = next.or_else(|| Some(Place(vec![Value::Int(which + 1), Value::Int(0)])));
    Ok(Plan { doomed: Doomed::NewlyInactive(seqs, now), next })
}

async fn inactive_devices(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    let (time, seq) = time_and_key(from, Value::Int(0));
    let mut statement =
        Statement::new("-- retention.dead_devices\nSELECT since, device_seq FROM inactive_devices WHERE since >= ");
    statement.bind(time.clone()).push(" AND (since > ").bind(time).push(" OR device_seq > ").bind(seq);
    statement.push(") AND since <= ").bind(until).push(" ORDER BY since, device_seq LIMIT ").bind(PAGE as u64);
    let rows = conn.fetch(statement).await?;
    let next = next_page(PAGE, &rows, |row| Ok(vec![Value::Int(row.int(0)?), Value::Int(row.int(1)?)]))?;
    let seqs = rows.iter().map(|row| row.int(1)).collect::<Result<_, _>>()?;
    Ok(Plan { doomed: Doomed::InactiveDevices(seqs), next })
}

async fn tombstones(conn: &mut Conn<'_>, from: &Place, until: Timestamp) -> Result<Plan, Failure> {
    // Whatever names a device was accepted before the device was forgotten.
    let until = oldest(conn).await?.map_or(until, |oldest| until.min(oldest.minus(CLOCK_MARGIN)));
    let (time, seq) = time_and_key(from, Value::Int(0));
    let mut statement = Statement::new("-- retention.tombstones\nSELECT forgotten_at, seq FROM device_tombstones");
    statement.push(by_index(
        conn.kind(),
        " INDEXED BY device_tombstones_forgotten",
        " FORCE INDEX (device_tombstones_forgotten)",
    ));
    statement.push(" WHERE forgotten_at >= ").bind(time.clone()).push(" AND (forgotten_at > ").bind(time);
    statement.push(" OR seq > ").bind(seq).push(") AND forgotten_at <= ").bind(until);
    statement.push(" ORDER BY forgotten_at, seq LIMIT ").bind(PAGE as u64);
    let rows = conn.fetch(statement).await?;
    let next = next_page(PAGE, &rows, |row| Ok(vec![Value::Int(row.int(0)?), Value::Int(row.int(1)?)]))?;
    let seqs = rows.iter().map(|row| Ok(Value::Int(row.int(1)?))).collect::<Result<_, StoreError>>()?;
    Ok(Plan { doomed: Doomed::Tombstones(seqs), next })
}

async fn api_keys(conn: &mut Conn<'_>, until: Timestamp) -> Result<Plan, Failure> {
    let mut statement = Statement::new("-- retention.api_keys\nSELECT id FROM api_keys WHERE revoked_at <= ");
    statement.bind(until).push(" OR expires_at <= ").bind(until).push(" LIMIT ").bind(PAGE as u64);
    let rows = conn.fetch(statement).await?;
    let ids: Vec<Value> = rows
        .iter()
        .map(|row| {
            String::from_utf8(row.bytes(0)?.to_vec())
                .map(Value::Text)
                .map_err(|error| corrupt("api_keys", "id", "", error))
        })
        .collect::<Result<_, _>>()?;
    let next = (ids.len() >= PAGE).then(Place::default);
    Ok(Plan { doomed: Doomed::ApiKeys(ids), next })
}

/// Deletes in one transaction; how many rows of which tables.
async fn carry_out(conn: &mut Conn<'_>, doomed: &Doomed, now: Timestamp) -> Result<Vec<(&'static str, u64)>, Failure> {
    match doomed {
        Doomed::Payloads(ids) => {
            let mut statement = Statement::new(
                "-- retention.empty\nUPDATE notifications SET payload = NULL WHERE payload IS NOT NULL AND id IN ",
            );
            statement.list(ids.iter().cloned());
            Ok(vec![("payloads", conn.execute(statement).await?)])
        }
        Doomed::Notifications(ids) => {
            let mut deleted = vec![("notifications", delete(conn, "notifications", " WHERE id IN ", ids).await?)];
            for (table, _) in PARTS {
                deleted.push((table, delete(conn, table, " WHERE notification_id IN ", ids).await?));
            }
            Ok(deleted)
        }
        Doomed::Cohorts(ids) => Ok(vec![("cohorts", delete(conn, "cohorts", " WHERE id IN ", ids).await?)]),
        Doomed::Large(id) => {
            let row = vec![vec![id.clone()]];
            // Already there only if another replica has been as far.
            let tail = by_index(
                conn.kind(),
                " ON CONFLICT DO NOTHING",
                " ON DUPLICATE KEY UPDATE notification_id = notification_id",
            );
            conn.insert("-- retention.remember\nINSERT INTO notification_remains (notification_id)", row, tail).await?;
            let ids = std::slice::from_ref(id);
            Ok(vec![("notifications", delete(conn, "notifications", " WHERE id IN ", ids).await?)])
        }
        Doomed::Part(id, place) => match PARTS.get(*place) {
            Some((table, rest)) => Ok(vec![(*table, delete_part(conn, table, rest, id).await?)]),
            None => Ok(Vec::new()),
        },
        Doomed::Cleared(id) => {
            delete(conn, "notification_remains", " WHERE notification_id IN ", std::slice::from_ref(id)).await?;
            Ok(Vec::new())
        }
        Doomed::IdempotencyKeys(keys) => {
            Ok(vec![("idempotency_keys", delete(conn, "idempotency_keys", " WHERE request_key IN ", keys).await?)])
        }
        Doomed::NewlyInactive(seqs, since) => {
            let rows: Vec<Vec<Value>> = seqs.iter().map(|seq| vec![seq.clone(), (*since).into()]).collect();
            let tail = by_index(
                conn.kind(),
                " ON CONFLICT (device_seq) DO UPDATE SET since = excluded.since",
                " ON DUPLICATE KEY UPDATE since = VALUES(since)",
            );
            conn.insert("-- retention.note\nINSERT INTO inactive_devices (device_seq, since)", rows, tail).await?;
            Ok(Vec::new())
        }
        Doomed::InactiveDevices(seqs) => forget(conn, seqs, now).await,
        Doomed::Tombstones(seqs) => {
            let tombstones = delete(conn, "device_tombstones", " WHERE seq IN ", seqs).await?;
            let numbers =
                seqs.iter().filter_map(|seq| if let Value::Int(seq) = seq { Some(DeviceSeq(*seq)) } else { None });
            let blocks = acceptances::delete_empty(conn, numbers).await?;
            Ok(vec![("device_tombstones", tombstones), ("acceptances", blocks)])
        }
        Doomed::ApiKeys(ids) => Ok(vec![("api_keys", delete(conn, "api_keys", " WHERE id IN ", ids).await?)]),
    }
}

async fn delete(conn: &mut Conn<'_>, table: &'static str, which: &'static str, keys: &[Value]) -> Result<u64, Failure> {
    let mut statement = Statement::new("-- retention.delete\nDELETE FROM ");
    statement.push(table).push(which).list(keys.iter().cloned());
    Ok(conn.execute(statement).await?)
}

/// Deletes a few hundred rows of one notification.
async fn delete_part(conn: &mut Conn<'_>, table: &'static str, rest: &'static str, id: &Value) -> Result<u64, Failure> {
    let mut statement = Statement::new("-- retention.delete_part\nDELETE FROM ");
    statement.push(table).push(" WHERE notification_id = ").bind(id.clone());
    match conn.kind() {
        Kind::Mysql => {
            statement.push(" ORDER BY ").push(rest).push(" LIMIT ").bind(ROWS);
        }
        // Differs: a DELETE takes no LIMIT.
        Kind::Sqlite => {
            statement.push(" AND (").push(rest).push(") IN (SELECT ").push(rest).push(" FROM ").push(table);
            statement.push(" WHERE notification_id = ").bind(id.clone()).push(" LIMIT ").bind(ROWS).push(")");
        }
    }
    Ok(conn.execute(statement).await?)
}

/// Forgets those of these devices that are inactive still, as `Devices::forget` does.
async fn forget(conn: &mut Conn<'_>, seqs: &[i64], now: Timestamp) -> Result<Vec<(&'static str, u64)>, Failure> {
    let all: Vec<Value> = seqs.iter().copied().map(Value::Int).collect();
    let mut statement = Statement::new(
        "-- retention.lock_devices\nSELECT d.seq, d.id, d.token FROM devices d JOIN inactive_devices i ON i.device_seq = d.seq \
         WHERE d.status <> 'active' AND d.last_registered_at <= i.since AND d.seq IN ",
    );
    statement.list(all.iter().cloned());
    statement.push(for_update(conn.kind()));
    let mut gone = Vec::new();
    let mut tombstones = Vec::new();
    for row in &conn.fetch(statement).await? {
        let seq = row.int(0)?;
        let token = DeviceToken::from_bytes(row.bytes(2)?).map_err(|e| corrupt("devices", "token", seq, e))?;
        gone.push(Value::Int(seq));
        tombstones.push(vec![Value::Int(seq), row.bytes(1)?.into(), token.hint().into(), now.into()]);
    }
    let mut deleted = Vec::new();
    if !gone.is_empty() {
        let head = "-- retention.tombstone\nINSERT INTO device_tombstones (seq, id, token_hint, forgotten_at)";
        conn.insert(head, tombstones, "").await?;
        deleted.push(("device_tags", delete(conn, "device_tags", " WHERE device_seq IN ", &gone).await?));
        deleted.push(("devices", delete(conn, "devices", " WHERE seq IN ", &gone).await?));
    }
    // Those that have come back too: they are noted anew once they go again.
    delete(conn, "inactive_devices", " WHERE device_seq IN ", &all).await?;
    Ok(deleted)
}

fn kept_at(row: &Row) -> Result<Timestamp, StoreError> {
    let value = row.bytes(0)?;
    let millis = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    millis.map(Timestamp::from_millis).ok_or_else(|| corrupt("service_facts", "value", HOUSE_KEPT_AT, "not a number"))
}

async fn sizes(conn: &mut Conn<'_>) -> Result<Sizes, Failure> {
    let many = |row: &Row, column| row.int_or_null(column).map(|n| n.and_then(|n| u64::try_from(n).ok()).unwrap_or(0));
    let mut sizes = Sizes::default();
    let mut statement = match conn.kind() {
        Kind::Mysql => Statement::new(
            "-- retention.sizes\nSELECT table_name, CAST(data_length + index_length AS SIGNED), CAST(table_rows AS SIGNED), \
             CAST(data_free AS SIGNED) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name IN ",
        ),
        // Differs: one file, whose pages have to be looked at to tell its tables apart. A leaf's cells are rows; of
        // tables that are an index themselves, all cells are.
        Kind::Sqlite => {
            let file = Statement::new(
                "-- retention.file\nSELECT (SELECT page_count FROM pragma_page_count) * s.page_size, \
                 (SELECT freelist_count FROM pragma_freelist_count) * s.page_size FROM pragma_page_size s",
            );
            for row in &conn.fetch(file).await? {
                sizes.bytes = many(row, 0)?;
                sizes.free_bytes = many(row, 1)?;
            }
            if sizes.bytes > WALKED_BYTES {
                return Ok(sizes);
            }
            Statement::new(
                "-- retention.sizes\nSELECT m.tbl_name, SUM(s.pgsize), SUM(CASE WHEN s.name = m.tbl_name AND \
                 (s.pagetype = 'leaf' OR t.wr = 1) THEN s.ncell ELSE 0 END) FROM dbstat s JOIN sqlite_master m ON m.name = s.name \
                 JOIN pragma_table_list t ON t.name = m.tbl_name WHERE m.tbl_name IN ",
            )
        }
    };
    statement.list(TABLES);
    if conn.kind() == Kind::Sqlite {
        statement.push(" GROUP BY m.tbl_name");
    }
    for row in &conn.fetch(statement).await? {
        let table = String::from_utf8(row.bytes(0)?.to_vec()).map_err(|error| StoreError::Statement(error.into()))?;
        let size = TableSize { table, bytes: many(row, 1)?, rows: many(row, 2)? };
        if conn.kind() == Kind::Mysql {
            sizes.bytes += size.bytes;
            sizes.free_bytes += many(row, 3)?;
        }
        sizes.tables.push(size);
    }
    Ok(sizes)
}
