//! Chunks of one target that were accepted together: one row holds them all.
//!
//! Promises: a cohort says of each of its seats where it stands: open, accepted by APNs at its first attempt, or moved
//! out, to a row of its own in `chunks`, where everything else is said that can become of a delivery. Whoever wants to do
//! more with an open one than to end it so moves it out first, in the same transaction and in the name of whoever holds it:
//! from then on it is a chunk as any other. A cohort is held by the replica that accepted it until nothing in it is open,
//! and never by another. A seat that is not there is an error, never an outcome.

use std::collections::{BTreeMap, HashMap};

use super::{
    Context, NEWER_AT_A_TIME,
    chunk::{self, NewChunk},
    claim::unreadable,
    for_update, lane_from, newer, notification_id,
};
use crate::domain::{
    clock::Timestamp,
    delivery::{Chunk, ChunkKey, DeliveryStatus, State, Target, decode_targets, encode_targets},
    device::DeviceSeq,
    notification::{Lane, NotificationId},
    push::CollapseId,
    topic::Topic,
};
use crate::store::{
    Kind, ReplicaId, Seat, Settled, StoreError,
    audience::LIST,
    sql::Failure,
    statement::{Conn, Row, Statement, Value, corrupt, id_value},
};

/// The bytes of a seat.
const SEAT: usize = 4;
/// Of one that is open.
const OPEN: [u8; SEAT] = [0; SEAT];
/// Of one that has moved out.
const MOVED: [u8; SEAT] = [0xff; SEAT];

/// SQL: the seat of notification `n` in cohort `k`.
macro_rules! seat {
    () => {
        "SUBSTR(k.seats, n.seat * 4 + 1, 4)"
    };
}

/// SQL: the ids of notifications that are open in a cohort, of those that are [`Spans::push`]ed next. Crossed, because SQLite
/// then begins with the notifications.
pub(in crate::store) const OPEN_IDS: &str = concat!(
    "SELECT n.id FROM notifications n CROSS JOIN cohorts k WHERE k.id = n.cohort AND k.holder IS NOT NULL AND ",
    seat!(),
    " = X'00000000' AND "
);

/// SQL: and notification `n` is in no cohort, or not open there.
pub(in crate::store) const AND_NOT_OPEN: &str = concat!(
    " AND (n.cohort IS NULL OR EXISTS (SELECT 1 FROM cohorts k WHERE k.id = n.cohort AND ",
    seat!(),
    " <> X'00000000'))"
);

/// SQL: or notification `n` is open in a cohort.
pub(in crate::store) const OR_OPEN: &str =
    concat!(" OR EXISTS (SELECT 1 FROM cohorts k WHERE k.id = n.cohort AND ", seat!(), " = X'00000000')");

/// SQL: or notification `n` was accepted by APNs, and is in a cohort.
pub(in crate::store) const OR_ACCEPTED: &str = concat!(
    " OR EXISTS (SELECT 1 FROM cohorts k WHERE k.id = n.cohort AND ",
    seat!(),
    " <> X'00000000' AND ",
    seat!(),
    " <> X'FFFFFFFF')"
);

/// Between which ids all members of some cohorts lie. Others may lie there as well: whoever reads them looks whose they are.
///
/// Members have no index of their own, which each notification would pay for. They were accepted together, so their ids,
/// which begin with their time, are neighbours.
pub(in crate::store) struct Spans(Vec<(uuid::Uuid, uuid::Uuid)>);

impl Spans {
    /// The most of them: beyond that those that are closest to each other become one, so that a statement stays short.
    const MOST: usize = 64;

    /// From the first and the last member of each. `None`: a version before 0038 accepted it, and the last is not known.
    pub(in crate::store) fn of(ends: impl Iterator<Item = (NotificationId, Option<NotificationId>)>) -> Self {
        let last = |last: Option<NotificationId>| last.map_or(uuid::Uuid::max(), |last| *last.as_uuid());
        let mut ends: Vec<_> = ends.map(|(first, of)| (*first.as_uuid(), last(of))).collect();
        ends.sort_unstable();
        let mut spans: Vec<(uuid::Uuid, uuid::Uuid)> = Vec::new();
        for (first, last) in ends {
            match spans.last_mut() {
                Some((_, before)) if first <= *before => *before = last.max(*before),
                _ => spans.push((first, last)),
            }
        }
        Self(spans).at_most(Self::MOST)
    }

    fn at_most(self, most: usize) -> Self {
        let Self(spans) = self;
        let gap = |before: &(uuid::Uuid, uuid::Uuid), after: &(uuid::Uuid, uuid::Uuid)| {
            after.0.as_u128().saturating_sub(before.1.as_u128())
        };
        let mut gaps: Vec<u128> = spans.iter().zip(spans.iter().skip(1)).map(|(one, next)| gap(one, next)).collect();
        gaps.sort_unstable_by(|one, other| other.cmp(one));
        // Gaps at least as large as this one stay.
        let Some(least) = gaps.get(most.saturating_sub(1)).copied() else { return Self(spans) };
        let mut fewer: Vec<(uuid::Uuid, uuid::Uuid)> = Vec::with_capacity(most);
        for span in spans {
            match fewer.last_mut() {
                Some(before) if gap(before, &span) <= least => before.1 = span.1,
                _ => fewer.push(span),
            }
        }
        Self(fewer)
    }

    /// Whether there is nothing between any.
    pub(in crate::store) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// SQL: `(id >= ? AND id <= ? OR …)`, for at least one. As lists are, filled up to a power of two.
    pub(in crate::store) fn push(&self, statement: &mut Statement, id: &'static str) {
        let filled = self.0.len().next_power_of_two();
        let spans = self.0.iter().chain(std::iter::repeat_n(self.0.last(), filled - self.0.len()).flatten());
        for (at, (first, last)) in spans.enumerate() {
            statement.push(if at == 0 { "(" } else { " OR " });
            statement.push(id).push(" >= ").bind(id_value(first)).push(" AND ");
            statement.push(id).push(" <= ").bind(id_value(last));
        }
        statement.push(")");
    }
}

/// Between which ids whatever is open in cohorts lies, of this replica or of all.
pub(in crate::store) async fn open_spans(conn: &mut Conn<'_>, holder: Option<ReplicaId>) -> Result<Spans, Failure> {
    let mut statement = Statement::new("-- queue.open_spans\nSELECT id, last FROM cohorts");
    held_by(&mut statement, holder);
    let mut ends = Vec::new();
    for row in &conn.fetch(statement).await? {
        ends.push((notification_id(row.bytes(0)?)?, row.bytes_or_null(1)?.map(notification_id).transpose()?));
    }
    Ok(Spans::of(ends.into_iter()))
}

fn held_by(statement: &mut Statement, holder: Option<ReplicaId>) {
    match holder {
        Some(replica) => drop(statement.push(" WHERE holder = ").bind(replica.0)),
        None => drop(statement.push(" WHERE holder IS NOT NULL")),
    }
}

/// Where a seat stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Standing {
    /// Nothing has come of it yet.
    Open,
    /// APNs accepted it then, at the first attempt.
    Accepted(Timestamp),
    /// Its chunk has a row of its own.
    Moved,
}

impl Standing {
    fn read(seat: &[u8], accepted_at: Timestamp) -> Option<Self> {
        let seat: [u8; SEAT] = seat.try_into().ok()?;
        Some(match seat {
            OPEN => Self::Open,
            MOVED => Self::Moved,
            after => {
                let millis = i64::from(u32::from_be_bytes(after)) - 1;
                Self::Accepted(Timestamp::from_millis(accepted_at.as_millis() + millis))
            }
        })
    }

    /// The state that it stands for; `None`: its chunk knows.
    fn state(self) -> Option<State> {
        match self {
            Self::Open => Some(State::PENDING),
            Self::Accepted(at) => {
                Some(State { status: DeliveryStatus::Accepted, attempts: 1, at: Some(at), ..State::PENDING })
            }
            Self::Moved => None,
        }
    }
}

/// A seat for a chunk that was accepted, if one can say all there is to say of it.
fn seat_of(settled: &Settled<'_>, accepted_at: Timestamp) -> Option<[u8; SEAT]> {
    let [state] = settled.chunk.states.as_slice() else { return None };
    let at = state.at?;
    if Standing::Accepted(at).state().as_ref() != Some(state) || !settled.unique_ids.is_empty() {
        return None;
    }
    let seat = u32::try_from(at.as_millis() - accepted_at.as_millis() + 1).ok()?.to_be_bytes();
    (seat != OPEN && seat != MOVED).then_some(seat)
}

const INSERT: &str = "-- queue.insert_cohorts\nINSERT INTO cohorts (id, topic, lane, holder, due_at, accepted_at, targets, \
    seats, open, accepted, last)";

/// A cohort about to be inserted.
pub(super) struct NewCohort<'c> {
    pub(super) topic: &'c Topic,
    pub(super) lane: Lane,
    pub(super) due_at: Timestamp,
    /// In the order of their seats, by id.
    pub(super) members: Vec<(NotificationId, Target)>,
}

/// Inserts cohorts, all of whose seats are open, as this replica's.
pub(super) async fn insert(
    conn: &mut Conn<'_>,
    cohorts: Vec<NewCohort<'_>>,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<(), Failure> {
    let mut rows = Vec::with_capacity(cohorts.len());
    for NewCohort { topic, lane, due_at, members } in cohorts {
        let (Some((first, _)), Some((last, _))) = (members.first(), members.last()) else { continue };
        let (id, last, open) = (id_value(first.as_uuid()), id_value(last.as_uuid()), members.len());
        let targets: Vec<Target> = members.into_iter().map(|(_, target)| target).collect();
        rows.push(vec![
            id,
            topic.as_str().into(),
            lane.as_number().into(),
            replica.0.into(),
            due_at.into(),
            now.into(),
            encode_targets(&targets).into(),
            OPEN.repeat(open).into(),
            (open as u64).into(),
            Value::Int(0),
            last,
        ]);
    }
    Ok(conn.insert(INSERT, rows, "").await?)
}

/// A cohort as its row, locked.
struct Cohort {
    id: NotificationId,
    lane: i64,
    holder: Option<i64>,
    due_at: Timestamp,
    accepted_at: Timestamp,
    targets: Vec<u8>,
    seats: Vec<u8>,
    /// Of the notification that is last by its id, if that is known.
    last: Option<NotificationId>,
}

impl Cohort {
    fn from_row(row: &Row) -> Result<Self, StoreError> {
        Ok(Self {
            id: notification_id(row.bytes(0)?)?,
            lane: row.int(1)?,
            holder: row.int_or_null(2)?,
            due_at: Timestamp::from_millis(row.int(3)?),
            accepted_at: Timestamp::from_millis(row.int(4)?),
            targets: row.bytes(5)?.to_vec(),
            seats: row.bytes(6)?.to_vec(),
            last: row.bytes_or_null(7)?.map(notification_id).transpose()?,
        })
    }

    fn seat(&mut self, number: u32) -> Result<&mut [u8], StoreError> {
        let id = self.id;
        let begin = usize::try_from(number).unwrap_or(usize::MAX).saturating_mul(SEAT);
        self.seats.get_mut(begin..begin.saturating_add(SEAT)).ok_or_else(|| no_seat(id))
    }

    fn standing(&mut self, number: u32) -> Result<Standing, StoreError> {
        let (id, accepted_at) = (self.id, self.accepted_at);
        Standing::read(self.seat(number)?, accepted_at).ok_or_else(|| no_seat(id))
    }

    fn count(&self, what: impl Fn(&[u8]) -> bool) -> u64 {
        self.seats.chunks(SEAT).filter(|seat| what(seat)).count() as u64
    }

    /// Gives up those of these seats that are open; their chunks are to be inserted, in the name of the cohort's holder.
    fn move_out(&mut self, members: &[(NotificationId, u32)]) -> Result<Vec<Moved>, StoreError> {
        let targets = decode_targets(&self.targets).unwrap_or_default();
        let mut moved = Vec::with_capacity(members.len());
        for (id, number) in members {
            if self.standing(*number)? == Standing::Open {
                self.seat(*number)?.copy_from_slice(&MOVED);
                moved.push(self.moved(*id, target_at(&targets, *number)));
            }
        }
        Ok(moved)
    }

    /// A chunk of its own for a member. One whose target cannot be read has none: whoever claims it holds it, and it shows.
    fn moved(&self, id: NotificationId, target: Option<Target>) -> Moved {
        Moved {
            key: ChunkKey { notification: id, number: 0 },
            lane: lane_from(self.lane).unwrap_or(Lane::Transactional),
            due_at: self.due_at,
            owner: self.holder.map(ReplicaId),
            chunk: target.map(|target| Chunk::new(vec![target])),
        }
    }
}

fn target_at(targets: &[Target], number: u32) -> Option<Target> {
    usize::try_from(number).ok().and_then(|number| targets.get(number)).cloned()
}

/// A chunk that leaves its seat.
struct Moved {
    key: ChunkKey,
    lane: Lane,
    due_at: Timestamp,
    owner: Option<ReplicaId>,
    chunk: Option<Chunk>,
}

async fn insert_moved(conn: &mut Conn<'_>, context: &Context, moved: &[Moved], now: Timestamp) -> Result<(), Failure> {
    let rows: Vec<NewChunk<'_>> = moved
        .iter()
        .map(|one| NewChunk {
            key: one.key,
            lane: one.lane,
            due_at: one.due_at,
            owner: one.owner,
            chunk: one.chunk.as_ref(),
        })
        .collect();
    chunk::insert(conn, &context.reasons, &rows, now).await
}

/// Writes how the seats of these stand, which are there and locked. One nothing of which is open is nobody's any more.
async fn keep(conn: &mut Conn<'_>, cohorts: &[Cohort]) -> Result<(), Failure> {
    let rows = cohorts.iter().map(|cohort| {
        let open = cohort.count(|seat| seat == OPEN);
        vec![
            id_value(cohort.id.as_uuid()),
            // Not written: all rows are there.
            "".into(),
            cohort.lane.into(),
            cohort.holder.filter(|_| open > 0).into(),
            cohort.due_at.into(),
            cohort.accepted_at.into(),
            Value::Bytes(Vec::new()),
            cohort.seats.as_slice().into(),
            open.into(),
            cohort.count(|seat| seat != OPEN && seat != MOVED).into(),
            // Nor this.
            Value::Null,
        ]
    });
    // Differs: how a row that is there is brought up to date. One statement for all of them, however many.
    let tail = match conn.kind() {
        Kind::Sqlite => {
            " ON CONFLICT (id) DO UPDATE SET seats = excluded.seats, open = excluded.open, accepted = excluded.accepted, \
             holder = excluded.holder"
        }
        Kind::Mysql => {
            " ON DUPLICATE KEY UPDATE seats = VALUES(seats), open = VALUES(open), accepted = VALUES(accepted), \
             holder = VALUES(holder)"
        }
    };
    Ok(conn.insert(INSERT, rows.collect(), tail).await?)
}

fn no_seat(id: NotificationId) -> StoreError {
    corrupt("cohorts", "seats", id, "no such seat")
}

const COHORT: &str =
    "-- queue.cohorts\nSELECT id, lane, holder, due_at, accepted_at, targets, seats, last FROM cohorts";

/// Reads cohorts and locks them, in the order of their ids.
async fn lock(conn: &mut Conn<'_>, ids: impl Iterator<Item = NotificationId>) -> Result<Vec<Cohort>, Failure> {
    let ids: std::collections::BTreeSet<NotificationId> = ids.collect();
    let ids: Vec<NotificationId> = ids.into_iter().collect();
    let mut locked = Vec::with_capacity(ids.len());
    for piece in ids.chunks(LIST) {
        let mut statement = Statement::new(COHORT);
        // Differs: MySQL reads a small table as a whole, and would lock the rows of others.
        if conn.kind() == Kind::Mysql {
            statement.push(" FORCE INDEX (PRIMARY)");
        }
        statement.push(" WHERE id IN ").list(piece.iter().map(|id| id_value(id.as_uuid())));
        locked.extend(fetch_locked(conn, statement).await?);
    }
    Ok(locked)
}

async fn fetch_locked(conn: &mut Conn<'_>, mut statement: Statement) -> Result<Vec<Cohort>, Failure> {
    statement.push(for_update(conn.kind()));
    // Mostly the first of its transaction.
    let read = conn.all(vec![statement]).await?;
    Ok(read.iter().flat_map(|done| &done.rows).map(Cohort::from_row).collect::<Result<_, _>>()?)
}

/// Records what became of chunks in cohorts of this replica; those that are to be recorded as rows come back: they are not,
/// or no longer, in a cohort that it holds, or more became of them than a seat can say.
pub(super) async fn settle<'s>(
    conn: &mut Conn<'_>,
    context: &Context,
    done: &'s [Settled<'s>],
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<&'s Settled<'s>>, Failure> {
    let mut rest = Vec::with_capacity(done.len());
    let mut seated: BTreeMap<NotificationId, Vec<(&Settled<'_>, u32)>> = BTreeMap::new();
    for settled in done {
        match settled.seat {
            Some(Seat { cohort, number }) => seated.entry(cohort).or_default().push((settled, number)),
            None => rest.push(settled),
        }
    }
    if seated.is_empty() {
        return Ok(rest);
    }
    let mut changed = Vec::with_capacity(seated.len());
    let mut leaving = Vec::new();
    for mut cohort in lock(conn, seated.keys().copied()).await? {
        let is_ours = cohort.holder == Some(replica.0);
        let (mut has_changed, mut leave) = (false, Vec::new());
        for (settled, number) in seated.remove(&cohort.id).unwrap_or_default() {
            match (cohort.standing(number)?, seat_of(settled, cohort.accepted_at)) {
                // Settled again, because the answer of its commit was lost.
                (Standing::Accepted(_), Some(seat)) if cohort.seat(number)? == seat => {}
                (Standing::Open, Some(seat)) if is_ours => {
                    cohort.seat(number)?.copy_from_slice(&seat);
                    has_changed = true;
                }
                (Standing::Open, None) if is_ours => {
                    leave.push((settled.key.notification, number));
                    rest.push(settled);
                    has_changed = true;
                }
                (Standing::Open | Standing::Accepted(_) | Standing::Moved, _) => rest.push(settled),
            }
        }
        leaving.extend(cohort.move_out(&leave)?);
        if has_changed {
            changed.push(cohort);
        }
    }
    insert_moved(conn, context, &leaving, now).await?;
    keep(conn, &changed).await?;
    rest.extend(seated.into_values().flatten().map(|(settled, _)| settled));
    Ok(rest)
}

/// Moves these out as far as they are open in a cohort.
pub(super) async fn leave(
    conn: &mut Conn<'_>,
    context: &Context,
    ids: impl Iterator<Item = NotificationId>,
    now: Timestamp,
) -> Result<(), Failure> {
    let ids: Vec<NotificationId> = ids.collect();
    let mut leaving = members_by_id(conn, &ids).await?;
    let mut cohorts = lock(conn, leaving.keys().copied()).await?;
    cohorts.retain(|cohort| cohort.holder.is_some());
    let mut moved = Vec::new();
    for cohort in &mut cohorts {
        moved.extend(cohort.move_out(&leaving.remove(&cohort.id).unwrap_or_default())?);
    }
    insert_moved(conn, context, &moved, now).await?;
    keep(conn, &cohorts).await
}

/// Moves out whatever is open in the cohorts of this replica, or of all: in a few statements, whatever there is. What is
/// damaged keeps nothing else from going.
pub(in crate::store) async fn disband(
    conn: &mut Conn<'_>,
    context: &Context,
    holder: Option<ReplicaId>,
    now: Timestamp,
) -> Result<(), Failure> {
    let mut statement = Statement::new(COHORT);
    held_by(&mut statement, holder);
    let mut cohorts = fetch_locked(conn, statement).await?;
    let mut members = members_of(conn, &cohorts).await?;
    let mut moved = Vec::new();
    for cohort in &mut cohorts {
        let members = members.remove(&cohort.id).unwrap_or_default();
        match cohort.move_out(&members) {
            Ok(all) => moved.extend(all),
            Err(error) => {
                unreadable(cohort.id, &error);
                moved.extend(members.iter().map(|(id, _)| cohort.moved(*id, None)));
            }
        }
    }
    insert_moved(conn, context, &moved, now).await?;
    for cohort in &mut cohorts {
        cohort.holder = None;
    }
    keep(conn, &cohorts).await
}

/// Notifications with their seats, by cohort.
type Members = HashMap<NotificationId, Vec<(NotificationId, u32)>>;

const MEMBERS: &str = "-- queue.members\nSELECT id, seat, cohort FROM notifications WHERE cohort ";

/// Those of these that are in a cohort.
async fn members_by_id(conn: &mut Conn<'_>, ids: &[NotificationId]) -> Result<Members, Failure> {
    let mut members = Members::new();
    for piece in ids.chunks(LIST) {
        let mut statement = Statement::new(MEMBERS);
        statement.push("IS NOT NULL AND id IN ").list(piece.iter().map(|id| id_value(id.as_uuid())));
        enter(&mut members, &conn.fetch(statement).await?)?;
    }
    Ok(members)
}

/// All that are in one of these cohorts.
async fn members_of(conn: &mut Conn<'_>, cohorts: &[Cohort]) -> Result<Members, Failure> {
    let mut members = Members::new();
    for piece in cohorts.chunks(LIST) {
        let mut statement = Statement::new(MEMBERS);
        statement.push("IN ").list(piece.iter().map(|cohort| id_value(cohort.id.as_uuid()))).push(" AND ");
        Spans::of(piece.iter().map(|cohort| (cohort.id, cohort.last))).push(&mut statement, "id");
        enter(&mut members, &conn.fetch(statement).await?)?;
    }
    Ok(members)
}

fn enter(members: &mut Members, rows: &[Row]) -> Result<(), StoreError> {
    for row in rows {
        members.entry(notification_id(row.bytes(2)?)?).or_default().push(member_from(row)?);
    }
    Ok(())
}

/// From `id, seat`.
fn member_from(row: &Row) -> Result<(NotificationId, u32), StoreError> {
    let id = notification_id(row.bytes(0)?)?;
    let seat = row.int(1)?;
    Ok((id, u32::try_from(seat).map_err(|error| corrupt("notifications", "seat", id, error))?))
}

/// The chunks that this replica holds in cohorts.
pub(super) async fn owned(conn: &mut Conn<'_>, replica: ReplicaId) -> Result<Vec<ChunkKey>, Failure> {
    let spans = open_spans(conn, Some(replica)).await?;
    if spans.is_empty() {
        return Ok(Vec::new());
    }
    let mut statement = Statement::new("-- queue.owned_seats\n");
    spans.push(statement.push(OPEN_IDS), "n.id");
    statement.push(" AND k.holder = ").bind(replica.0);
    let rows = conn.fetch(statement).await?;
    let key = |row: &Row| Ok(ChunkKey { notification: notification_id(row.bytes(0)?)?, number: 0 });
    Ok(rows.iter().map(key).collect::<Result<_, StoreError>>()?)
}

/// Where those of these stand that are in a cohort; an error for each that is damaged.
pub(in crate::store) async fn standings(
    conn: &mut Conn<'_>,
    ids: &[NotificationId],
) -> Result<HashMap<NotificationId, Result<Standing, StoreError>>, Failure> {
    let mut standings = HashMap::with_capacity(ids.len());
    for piece in ids.chunks(LIST) {
        let mut statement = Statement::new(concat!(
            "-- queue.standings\nSELECT n.id, ",
            seat!(),
            ", k.accepted_at FROM notifications n LEFT JOIN cohorts k ON k.id = n.cohort \
             WHERE n.cohort IS NOT NULL AND n.id IN "
        ));
        statement.list(piece.iter().map(|id| id_value(id.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let id = notification_id(row.bytes(0)?)?;
            standings.insert(id, standing_from(row, 1, id));
        }
    }
    Ok(standings)
}

/// From a seat and the time from which it counts.
fn standing_from(row: &Row, column: usize, id: NotificationId) -> Result<Standing, StoreError> {
    let seat = row.bytes_or_null(column)?.zip(row.int_or_null(column + 1)?);
    seat.and_then(|(seat, at)| Standing::read(seat, Timestamp::from_millis(at))).ok_or_else(|| no_seat(id))
}

/// SQL: what is said of notifications `n` by their seats, for [`seated_from`].
const SEATED: &str = concat!(
    "SELECT n.id, n.seat, k.targets, ",
    seat!(),
    ", k.accepted_at FROM notifications n LEFT JOIN cohorts k ON k.id = n.cohort WHERE n.cohort IS NOT NULL AND "
);

/// Who sits there, and where that stands; `None`: it has moved out.
fn seated_from(row: &Row) -> Result<Option<(Target, State)>, StoreError> {
    let (id, number) = member_from(row)?;
    let Some(state) = standing_from(row, 3, id)?.state() else { return Ok(None) };
    let targets = decode_targets(row.bytes(2)?).map_err(|error| corrupt("cohorts", "targets", id, error))?;
    Ok(Some((target_at(&targets, number).ok_or_else(|| no_seat(id))?, state)))
}

/// The chunk of a notification, if it is in a cohort.
pub(in crate::store) async fn chunk_of(conn: &mut Conn<'_>, id: NotificationId) -> Result<Option<Chunk>, Failure> {
    let mut statement = Statement::new("-- queue.seat\n");
    statement.push(SEATED).push("n.id = ").bind(id_value(id.as_uuid()));
    let rows = conn.fetch(statement).await?;
    let seated = rows.first().map(seated_from).transpose()?.flatten();
    Ok(seated.map(|(target, state)| Chunk { targets: vec![target], states: vec![state] }))
}

/// Whether a newer notification with this collapse id has gone, or is going, to the device, of those that are in a cohort.
pub(super) async fn superseded(
    conn: &mut Conn<'_>,
    device: DeviceSeq,
    topic: &Topic,
    collapse_id: &CollapseId,
    than: NotificationId,
) -> Result<bool, Failure> {
    let mut after = than;
    loop {
        let mut statement = Statement::new("-- queue.superseded_by_seat\n");
        statement.push(SEATED);
        newer(&mut statement, topic, collapse_id, than);
        statement.push(" AND n.id > ").bind(id_value(after.as_uuid()));
        statement.push(" ORDER BY n.id LIMIT ").bind(NEWER_AT_A_TIME);
        let rows = conn.fetch(statement).await?;
        for row in &rows {
            after = notification_id(row.bytes(0)?)?;
            if matches!(seated_from(row)?, Some((Target::Device { seq, .. }, _)) if seq == device) {
                return Ok(true);
            }
        }
        if i64::try_from(rows.len()).unwrap_or(i64::MAX) < NEWER_AT_A_TIME {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> NotificationId {
        NotificationId::from_uuid(uuid::Uuid::from_u128(number))
    }

    fn spans(ends: &[(u128, u128)]) -> Vec<(u128, u128)> {
        let Spans(spans) = Spans::of(ends.iter().map(|(first, last)| (id(*first), Some(id(*last)))));
        spans.iter().map(|(first, last)| (first.as_u128(), last.as_u128())).collect()
    }

    #[test]
    fn what_overlaps_is_one_span_and_what_does_not_is_apart() {
        assert_eq!(spans(&[]), []);
        assert_eq!(spans(&[(30, 40), (1, 9), (5, 7), (9, 12), (13, 13)]), [(1, 12), (13, 13), (30, 40)]);
        let Spans(open) = Spans::of([(id(7), None), (id(9), Some(id(11)))].into_iter());
        assert_eq!(open, [(*id(7).as_uuid(), uuid::Uuid::max())]);
    }

    #[test]
    fn many_become_a_few_that_hold_them_all_and_the_widest_gaps_stay_open() {
        let near: Vec<(u128, u128)> = (0..1_000).map(|n| (1_000_000 + n * 10, 1_000_000 + n * 10 + 3)).collect();
        let mut ends = near.clone();
        ends.extend([(1, 2), (u128::MAX - 5, u128::MAX)]);
        let few = spans(&ends);
        assert!(few.len() <= Spans::MOST);
        assert_eq!((few[0], few[few.len() - 1]), ((1, 2), (u128::MAX - 5, u128::MAX)));
        for (first, last) in ends {
            assert!(few.iter().any(|span| span.0 <= first && last <= span.1), "{first} to {last}");
        }
        let different: Vec<(u128, u128)> = (1..=200).map(|n: u128| (n * n * 10, n * n * 10 + 1)).collect();
        let few = spans(&different);
        assert_eq!(few.len(), Spans::MOST);
        assert_eq!(few[0], (10, 137 * 137 * 10 + 1), "those closest to each other are one");
    }
}
