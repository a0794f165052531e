//! Chunks as rows: read and written.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{Mutex, PoisonError},
};

use super::{Context, notification_id};
use crate::domain::{
    clock::Timestamp,
    delivery::{
        Chunk, ChunkKey, NotAChunk, PART_TARGETS, State, decode_states, decode_targets, encode_states, encode_targets,
        encode_untried,
    },
    notification::{Counts, Lane, NotificationId},
    outcome::Cause,
};
use crate::store::{
    Kind, ReplicaId, StoreError,
    reasons::{self, Reasons},
    sql::Failure,
    statement::{Conn, Row, Statement, Usual, Value, corrupt, id_value},
};

/// The key of a chunk, from two columns.
pub(in crate::store) fn key_from(row: &Row, column: usize) -> Result<ChunkKey, StoreError> {
    let number = row.int(column + 1)?;
    Ok(ChunkKey {
        notification: notification_id(row.bytes(column)?)?,
        number: u32::try_from(number).map_err(|error| corrupt("chunks", "number", number, error))?,
    })
}

/// A chunk from its compact forms. A reason that is not known here is looked up once.
pub(in crate::store) async fn read(
    conn: &mut Conn<'_>,
    reasons: &Reasons,
    key: ChunkKey,
    targets: &[u8],
    states: Option<&[u8]>,
) -> Result<Chunk, Failure> {
    let row = || format!("{}/{}", key.notification, key.number);
    let targets = decode_targets(targets).map_err(|error| corrupt("chunks", "targets", row(), error))?;
    let Some(bytes) = states else { return Ok(Chunk::new(targets)) };
    let mut states = decode_states(bytes, targets.len(), |code| reasons.cause(code));
    if matches!(states, Err(NotAChunk::Reason(_))) {
        // What is in a chunk that can be read was committed, and its dictionary before it.
        reasons.learn(reasons::all(conn).await?);
        states = decode_states(bytes, targets.len(), |code| reasons.cause(code));
    }
    let states = states.map_err(|error| corrupt("chunks", "states", row(), error))?;
    Ok(Chunk { targets, states })
}

/// The compact form of states; `None` while nothing has been tried.
pub(super) fn states(chunk: &Chunk, reasons: &Reasons) -> Result<Option<Vec<u8>>, StoreError> {
    if chunk.states.iter().all(|state| *state == State::PENDING) {
        return Ok(None);
    }
    let mut without = None;
    let bytes = encode_states(&chunk.states, |cause| {
        reasons.code(cause).unwrap_or_else(|| {
            without = Some(cause.clone());
            0
        })
    });
    match without {
        None => Ok(Some(bytes)),
        Some(Cause { reason, .. }) => Err(StoreError::Statement(format!("{reason:?} has no number").into())),
    }
}

/// Writes a chunk as a whole over the row that stands for it; one all of whose targets have ended is ended.
pub(super) async fn write(
    conn: &mut Conn<'_>,
    reasons: &Reasons,
    key: ChunkKey,
    chunk: &Chunk,
    now: Timestamp,
) -> Result<(), Failure> {
    let counts = chunk.counts();
    let mut statement = Statement::new("-- queue.write_chunk\nUPDATE chunks SET targets = ");
    statement.bind(encode_targets(&chunk.targets));
    statement.push(", states = ").bind(states(chunk, reasons)?);
    statement.push(", targeted = ").bind(counts.targeted);
    for (column, count) in COUNTED.into_iter().zip(counted(&counts)) {
        statement.push(column).bind(count);
    }
    if chunk.is_done() {
        statement.push(", holder = NULL, ended_at = ").bind(now);
    }
    statement.push(" WHERE ").keys(conn.kind(), [&key]);
    conn.execute(statement).await?;
    Ok(())
}

/// The count columns behind `targeted`, in the order of the table.
pub(super) fn counted(counts: &Counts) -> [Value; 7] {
    [
        counts.accepted.into(),
        counts.failed.into(),
        counts.unregistered.into(),
        counts.expired.into(),
        counts.cancelled.into(),
        counts.suppressed.into(),
        counts.unknown.into(),
    ]
}

/// The same columns, to be set.
pub(super) const COUNTED: [&str; 7] = [
    ", accepted = ",
    ", failed = ",
    ", unregistered = ",
    ", expired = ",
    ", cancelled = ",
    ", suppressed = ",
    ", unanswered = ",
];

/// A chunk about to be inserted.
pub(super) struct NewChunk<'c> {
    pub(super) key: ChunkKey,
    pub(super) lane: Lane,
    pub(super) due_at: Timestamp,
    /// Who is to send what is open; `None`: whoever is free.
    pub(super) owner: Option<ReplicaId>,
    /// `None`: the audience is still to be resolved.
    pub(super) chunk: Option<&'c Chunk>,
}

/// The epoch of a chunk that is inserted with an owner.
pub(super) const FIRST_EPOCH: i64 = 1;

const INSERT: &str = "-- queue.insert_chunks\nINSERT INTO chunks (notification_id, number, lane, holder, epoch, due_at, \
    targets, states, targeted, accepted, failed, unregistered, expired, cancelled, suppressed, unanswered, \
    waiting_since, ended_at)";

/// Inserts chunks; those all of whose targets have ended are ended.
pub(super) async fn insert(
    conn: &mut Conn<'_>,
    reasons: &Reasons,
    chunks: &[NewChunk<'_>],
    now: Timestamp,
) -> Result<(), Failure> {
    let mut rows = Vec::with_capacity(chunks.len());
    for NewChunk { key, lane, due_at, owner, chunk } in chunks {
        let ended = chunk.is_some_and(Chunk::is_done);
        let counts = chunk.map(Chunk::counts).unwrap_or_default();
        let (holder, epoch) = match owner {
            Some(replica) => (replica.0, FIRST_EPOCH),
            None => (super::FREE, 0),
        };
        let mut row = vec![
            id_value(key.notification.as_uuid()),
            key.number.into(),
            lane.as_number().into(),
            (!ended).then_some(holder).into(),
            epoch.into(),
            (*due_at).into(),
            chunk.map(|chunk| encode_targets(&chunk.targets)).into(),
            chunk.map(|chunk| inserted_states(chunk, reasons)).transpose()?.into(),
            counts.targeted.into(),
        ];
        row.extend(counted(&counts));
        row.extend([Value::Null, ended.then_some(now).into()]);
        rows.push(row);
    }
    Ok(conn.insert_mostly(INSERT, &UNTRIED, rows, "").await?)
}

/// The states of a chunk that is inserted. See [`encode_untried`].
fn inserted_states(chunk: &Chunk, reasons: &Reasons) -> Result<Vec<u8>, StoreError> {
    Ok(states(chunk, reasons)?.unwrap_or_else(|| encode_untried(chunk.targets.len())))
}

/// Whether anything of a chunk was tried, 1 or 0: whether its states are other than [`encode_untried`] makes them, which
/// have no time (it stands behind the version) and end with facts that say nothing.
pub(in crate::store) const TRIED: &str =
    "COALESCE(SUBSTR(states, 2, 8) <> X'0000000000000000' OR SUBSTR(states, -2) <> X'1000', 0)";

/// The columns of a chunk of which nothing has been tried yet, behind `targeted`.
const UNTRIED: [Usual; 9] = [
    (9, Value::Int(0), "0"),
    (10, Value::Int(0), "0"),
    (11, Value::Int(0), "0"),
    (12, Value::Int(0), "0"),
    (13, Value::Int(0), "0"),
    (14, Value::Int(0), "0"),
    (15, Value::Int(0), "0"),
    (16, Value::Null, "NULL"),
    (17, Value::Null, "NULL"),
];

/// The most rows of outcomes other than accepted that a notification gets. Its first chunk has a share of its own.
const MAX_NOTES: usize = 10_000;

/// The most of them beside the first chunk's: where there are others, that is a part.
const MAX_FURTHER_NOTES: usize = MAX_NOTES - PART_TARGETS;

/// What is to be noted of one chunk: positions, and Apple's ids where there are any.
pub(super) struct Notes<'c> {
    pub(super) key: ChunkKey,
    pub(super) chunk: &'c Chunk,
    /// Positions that have just ended otherwise than accepted.
    pub(super) ended: Vec<usize>,
    /// Apple's ids by position.
    pub(super) unique_ids: &'c [(u32, Box<str>)],
}

impl<'c> Notes<'c> {
    /// What a chunk tells that was just resolved.
    pub(super) fn at_first(key: ChunkKey, chunk: &'c Chunk) -> Self {
        let ended = (0..).zip(&chunk.states).filter(|(_, state)| !state.is_open()).map(|(at, _)| at).collect();
        Self { key, chunk, ended, unique_ids: &[] }
    }
}

/// Writes rows for exceptions.
pub(super) async fn note(conn: &mut Conn<'_>, context: &Context, notes: &[Notes<'_>]) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut further = HashMap::new();
    for Notes { key, chunk, ended, unique_ids } in notes {
        let fits = match key.number {
            0 => ended.len(),
            _ if ended.is_empty() => 0,
            _ => {
                let room = match further.entry(key.notification) {
                    Entry::Occupied(room) => room.into_mut(),
                    Entry::Vacant(unknown) => unknown.insert(room_for_notes(conn, context, key.notification).await?),
                };
                let fits = ended.len().min(*room);
                *room -= fits;
                fits
            }
        };
        let mut at_position = std::collections::BTreeMap::new();
        for at in ended.iter().take(fits) {
            at_position.insert(*at, None);
        }
        // The first chunk of a notification is all of it up to 1,000 targets.
        if key.number == 0 {
            for (at, id) in *unique_ids {
                at_position.insert(usize::try_from(*at).unwrap_or(usize::MAX), Some(&**id));
            }
        }
        for (at, unique_id) in at_position {
            let (Some(target), Some(state)) = (chunk.targets.get(at), chunk.states.get(at)) else { continue };
            rows.push(note_row(*key, at, target, state, unique_id));
        }
    }
    // Differs: how a row that is there is brought up to date. (MariaDB lacks MySQL's newer spelling.)
    let tail = match conn.kind() {
        Kind::Sqlite => {
            " ON CONFLICT (notification_id, number, position) DO UPDATE SET status = excluded.status, \
             apns_status = excluded.apns_status, reason = excluded.reason, \
             apns_unique_id = COALESCE(excluded.apns_unique_id, apns_unique_id), attempts = excluded.attempts, \
             at = excluded.at"
        }
        Kind::Mysql => {
            " ON DUPLICATE KEY UPDATE status = VALUES(status), apns_status = VALUES(apns_status), \
             reason = VALUES(reason), apns_unique_id = COALESCE(VALUES(apns_unique_id), apns_unique_id), \
             attempts = VALUES(attempts), at = VALUES(at)"
        }
    };
    let head = "-- queue.note\nINSERT INTO delivery_notes (notification_id, number, position, device_seq, status, \
                apns_status, reason, apns_unique_id, attempts, at)";
    Ok(conn.insert(head, rows, tail).await?)
}

fn note_row(
    key: ChunkKey,
    at: usize,
    target: &crate::domain::delivery::Target,
    state: &State,
    unique_id: Option<&str>,
) -> Vec<Value> {
    use crate::domain::delivery::Target;
    let seq = match target {
        Target::Device { seq, .. } => Some(seq.0),
        Target::Token { .. } => None,
    };
    let cause = state.cause.as_ref().map(reasons::kept);
    vec![
        id_value(key.notification.as_uuid()),
        key.number.into(),
        (at as u64).into(),
        seq.into(),
        state.status.as_str().into(),
        cause.as_ref().and_then(|cause| cause.apns_status).into(),
        cause.map(|cause| cause.reason.into_owned()).into(),
        unique_id.map(short).into(),
        state.attempts.into(),
        state.at.map_or(0, Timestamp::as_millis).into(),
    ]
}

/// Apple's ids are UUIDs; whatever else comes is cut to what the column holds.
fn short(id: &str) -> String {
    id.chars().take(64).collect()
}

/// How many more may be noted beside the first chunk's. What is full is remembered: a million failures are not counted
/// again with every settle.
async fn room_for_notes(conn: &mut Conn<'_>, context: &Context, id: NotificationId) -> Result<usize, Failure> {
    if context.noted.is_full(id) {
        return Ok(0);
    }
    let mut statement =
        Statement::new("-- queue.noted\nSELECT COUNT(*) FROM delivery_notes WHERE number > 0 AND notification_id = ");
    statement.bind(id_value(id.as_uuid()));
    let rows = conn.fetch(statement).await?;
    let there = rows.first().map(|row| row.int(0)).transpose()?.unwrap_or(0);
    let room = MAX_FURTHER_NOTES.saturating_sub(usize::try_from(there).unwrap_or(usize::MAX));
    if room == 0 {
        context.noted.fill(id);
    }
    Ok(room)
}

/// Notifications that have all the notes they get.
#[derive(Debug, Default)]
pub(in crate::store) struct Noted(Mutex<HashSet<NotificationId>>);

impl Noted {
    /// The most that are remembered; then they are counted anew.
    const MOST: usize = 1_000;

    fn is_full(&self, id: NotificationId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    fn fill(&self, id: NotificationId) {
        let mut full = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if full.len() >= Self::MOST {
            full.clear();
        }
        full.insert(id);
    }
}
