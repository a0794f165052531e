//! Accepting a group: resolved, committed and handed over in one transaction. What is not due, tags, everyone and long
//! lists are kept as they were asked for: accepting reads no device for them, whatever their size.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::LazyLock,
};

use super::{
    Context,
    chunk::{self, NewChunk, Notes},
    cohort::{self, NewCohort},
};
use crate::domain::{
    clock::Timestamp,
    delivery::{Chunk, ChunkKey, Target},
    device::{Addresses, DeviceSeq, UserId},
    notification::{Audience, Counts, Lane, Notification, NotificationStatus, NotificationView},
    push::{Expiration, OnUnknown, Priority, PushType},
    topic::Topic,
};
use crate::store::{
    Accepted, Idempotency, Kind, Lease, ReplicaId, Seat, StoreError, Submission,
    audience::{self, LIST, Wanted},
    sql::Failure,
    statement::{Conn, Statement, Usual, Value, corrupt, id_value},
};

/// One submission on its way.
struct Entry<'s> {
    submission: &'s Submission,
    /// `None`: not resolved yet.
    chunks: Option<Vec<Chunk>>,
    view: NotificationView,
    /// Where its chunk is put, if that is accepted together with others.
    seat: Option<Seat>,
}

/// Accepts a group; the answers come in its order.
pub(in crate::store) async fn accept(
    conn: &mut Conn<'_>,
    context: &Context,
    group: &[&Submission],
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<Accepted>, Failure> {
    let due: Vec<Wanted<'_>> = group
        .iter()
        .filter(|submission| at_once(submission, now))
        .map(|submission| Wanted { notification: &submission.notification, audience: &submission.audience, from: 0 })
        .collect();
    let resolution = audience::resolve(conn, &*context.clock, &due, now).await?;
    let mut resolved = resolution.resolved.into_iter();
    let mut entries: Vec<Entry<'_>> = group
        .iter()
        .map(|submission| {
            let resolved = if at_once(submission, now) { resolved.next() } else { None };
            entry(submission, resolved, now)
        })
        .collect();
    let mut answers = known(conn, &entries, now).await?;
    let cohorts = seat(&mut entries, &answers);
    let new: Vec<&Entry<'_>> =
        entries.iter().enumerate().filter(|(at, _)| !answers.contains_key(at)).map(|(_, entry)| entry).collect();
    let taken = insert(conn, context, &new, replica, now).await?;
    cohort::insert(conn, cohorts, replica, now).await?;
    let own = super::keeps(conn, context, &taken, replica).await?;
    let mut accepted = Vec::with_capacity(group.len());
    for (at, entry) in entries.into_iter().enumerate() {
        accepted.push(if let Some(answer) = answers.remove(&at) {
            answer
        } else {
            let leases = if own { leases(&entry, &resolution.addresses, resolution.read_at) } else { Vec::new() };
            Accepted::New { view: entry.view, leases }
        });
    }
    Ok(accepted)
}

/// Whether it is resolved where it is accepted.
fn at_once(submission: &Submission, now: Timestamp) -> bool {
    submission.notification.due_at <= now && submission.audience.is_short()
}

fn entry(submission: &Submission, resolved: Option<audience::Resolved>, now: Timestamp) -> Entry<'_> {
    let notification = &submission.notification;
    let unmatched = resolved.as_ref().map_or(0, |resolved| resolved.unmatched);
    let chunks = resolved.map(|resolved| audience::into_chunks(resolved.targets, true));
    let mut counts = Counts::default();
    let mut tried = false;
    for chunk in chunks.iter().flatten() {
        counts.add(&chunk.counts());
        tried |= counts.pending < counts.targeted;
    }
    let status = match &chunks {
        None if notification.due_at > now => NotificationStatus::Scheduled,
        Some(_) if counts.pending == 0 => NotificationStatus::Done,
        Some(_) if tried => NotificationStatus::Sending,
        None | Some(_) => NotificationStatus::Queued,
    };
    let done_at = (status == NotificationStatus::Done).then_some(match counts.targeted {
        0 => notification.created_at,
        _ => now,
    });
    let view = NotificationView {
        id: notification.id,
        status,
        topic: notification.topic.clone(),
        reference: notification.reference.clone(),
        counts,
        unmatched,
        audience_complete: chunks.is_some(),
        waiting_for: None,
        warnings: notification.warnings.clone(),
        created_at: notification.created_at,
        cancelled_at: None,
        done_at,
    };
    Entry { submission, chunks, view, seat: None }
}

/// Seats those of the new ones that are for one device, and are sent at once by whoever accepts them: apps and lanes
/// apart. What is never to be written twice gets a mark first, and so a row of its own; a raw token goes with its
/// notification.
fn seat<'s>(entries: &mut [Entry<'s>], answers: &BTreeMap<usize, Accepted>) -> Vec<NewCohort<'s>> {
    let mut new: Vec<&mut Entry<'s>> =
        entries.iter_mut().enumerate().filter(|(at, _)| !answers.contains_key(at)).map(|(_, entry)| entry).collect();
    new.sort_unstable_by_key(|entry| entry.view.id);
    let mut cohorts: BTreeMap<(&'s Topic, i64), NewCohort<'s>> = BTreeMap::new();
    for entry in new {
        let Submission { notification, own, .. } = entry.submission;
        let Some([chunk]) = entry.chunks.as_deref() else { continue };
        let [target @ Target::Device { .. }] = chunk.targets.as_slice() else { continue };
        if !own || chunk.is_done() || notification.on_unknown != OnUnknown::Retry {
            continue;
        }
        let (id, topic, lane, due_at) = (notification.id, &notification.topic, notification.lane, notification.due_at);
        let empty = || NewCohort { topic, lane, due_at, members: Vec::new() };
        let cohort = cohorts.entry((topic, lane.as_number())).or_insert_with(empty);
        cohort.due_at = cohort.due_at.min(due_at);
        let first = cohort.members.first().map_or(id, |(first, _)| *first);
        let number = u32::try_from(cohort.members.len()).unwrap_or(u32::MAX);
        cohort.members.push((id, target.clone()));
        entry.seat = Some(Seat { cohort: first, number });
    }
    cohorts.into_values().collect()
}

/// Claims the idempotency keys; the answers for those that were seen before, by place in the group.
///
/// The rows are inserted in the order of their keys: whoever comes second waits for the first to commit, and then
/// reads the first's row. A group resolves before it claims, so that a key's row is written once, with its answer.
async fn known(
    conn: &mut Conn<'_>,
    entries: &[Entry<'_>],
    now: Timestamp,
) -> Result<BTreeMap<usize, Accepted>, Failure> {
    let mut claims: Vec<([u8; 32], usize)> = entries
        .iter()
        .enumerate()
        .filter_map(|(at, entry)| entry.submission.idempotency.map(|idempotency| (idempotency.key, at)))
        .collect();
    claims.sort_unstable();
    let mut rows = Vec::with_capacity(claims.len());
    let mut last = None;
    for (key, at) in &claims {
        let Some(entry) = entries.get(*at) else { continue };
        let Some(idempotency) = entry.submission.idempotency else { continue };
        // The same key twice in one group: the first has it.
        if last.replace(*key) == Some(*key) {
            continue;
        }
        let answer = serde_json::to_vec(&entry.view).map_err(|error| StoreError::Statement(error.into()))?;
        rows.push(vec![
            key.as_slice().into(),
            idempotency.body.as_slice().into(),
            id_value(entry.view.id.as_uuid()),
            answer.into(),
            now.into(),
        ]);
    }
    // Differs: how a row that is there is left alone. IGNORE would also ignore faults.
    let tail = match conn.kind() {
        Kind::Sqlite => " ON CONFLICT (request_key) DO NOTHING",
        Kind::Mysql => " ON DUPLICATE KEY UPDATE request_key = request_key",
    };
    let head = "-- queue.insert_idempotency_keys\n\
                INSERT INTO idempotency_keys (request_key, body_hash, notification_id, answer, created_at)";
    let keys: Vec<Value> = rows.iter().filter_map(|row| row.first().cloned()).collect();
    conn.insert(head, rows, tail).await?;
    let there = requests(conn, &keys).await?;
    let mut answers = BTreeMap::new();
    for (key, at) in claims {
        let Some(entry) = entries.get(at) else { continue };
        let Some(idempotency) = entry.submission.idempotency else { continue };
        let Some(request) = there.get(key.as_slice()) else {
            return Err(StoreError::Statement("an idempotency key that was just inserted is missing".into()).into());
        };
        if request.notification.as_slice() != entry.view.id.as_uuid().as_bytes() {
            answers.insert(at, request.answer_to(&idempotency)?);
        }
    }
    Ok(answers)
}

/// What was accepted under this key before.
pub(in crate::store) async fn seen(
    conn: &mut Conn<'_>,
    idempotency: &Idempotency,
) -> Result<Option<Accepted>, Failure> {
    let there = requests(conn, &[idempotency.key.as_slice().into()]).await?;
    Ok(there.get(idempotency.key.as_slice()).map(|request| request.answer_to(idempotency)).transpose()?)
}

/// A request that was accepted under a key.
struct Request {
    body: Vec<u8>,
    notification: Vec<u8>,
    answer: Vec<u8>,
}

impl Request {
    fn answer_to(&self, idempotency: &Idempotency) -> Result<Accepted, StoreError> {
        if self.body.as_slice() != idempotency.body {
            return Ok(Accepted::Conflict);
        }
        serde_json::from_slice(&self.answer)
            .map(Accepted::Seen)
            .map_err(|error| corrupt("idempotency_keys", "answer", hex::encode(idempotency.key), error))
    }
}

/// The requests under these keys, by key.
async fn requests(conn: &mut Conn<'_>, keys: &[Value]) -> Result<HashMap<Vec<u8>, Request>, Failure> {
    let mut there = HashMap::with_capacity(keys.len());
    for piece in keys.chunks(LIST) {
        let mut statement = Statement::new(
            "-- queue.idempotency_keys\nSELECT request_key, body_hash, notification_id, answer FROM idempotency_keys \
             WHERE request_key IN ",
        );
        statement.list(piece.iter().cloned());
        for row in &conn.fetch(statement).await? {
            let request = Request {
                body: row.bytes(1)?.to_vec(),
                notification: row.bytes(2)?.to_vec(),
                answer: row.bytes(3)?.to_vec(),
            };
            there.insert(row.bytes(0)?.to_vec(), request);
        }
    }
    Ok(there)
}

const INSERT: &str = "-- queue.insert_notifications\nINSERT INTO notifications (id, topic, owner, reference, lane, \
    push_type, priority, expires_at, collapse_id, derives_collapse_id, on_unknown, environment, payload, audience, \
    audience_complete, unmatched, due_at, created_at, warnings, cohort, seat, user_id)";

/// What a notification for a few has: no collapse id, no environment, nothing left to resolve, nothing suspicious.
const PLAIN: [Usual; 6] = [
    (8, Value::Null, "NULL"),
    (11, Value::Null, "NULL"),
    (13, Value::Null, "NULL"),
    (14, Value::Int(1), "1"),
    (15, Value::Int(0), "0"),
    (18, Value::Null, "NULL"),
];

/// And what most of them are: urgent, and an alert that shows something.
static ALERT: LazyLock<Vec<Usual>> = LazyLock::new(|| {
    let mut usual = PLAIN.to_vec();
    usual.extend([
        (4, Lane::Transactional.as_number().into(), "0"),
        (5, Value::Word(PushType::Alert.as_str()), "'alert'"),
        (6, i64::from(Priority::Ten.as_number()).into(), "10"),
        (9, true.into(), "1"),
        (10, Value::Word(OnUnknown::Retry.as_str()), "'retry'"),
    ]);
    usual
});

/// Inserts what is new; the chunks that are this replica's.
async fn insert(
    conn: &mut Conn<'_>,
    context: &Context,
    new: &[&Entry<'_>],
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<ChunkKey>, Failure> {
    let mut notifications = Vec::with_capacity(new.len());
    let mut links = Vec::new();
    let mut chunks = Vec::with_capacity(new.len());
    let mut notes = Vec::new();
    let mut seated = Vec::new();
    for entry in new {
        let Submission { notification, audience, own, .. } = entry.submission;
        notifications.push(notification_row(notification, audience, entry)?);
        let users = users_at_once(audience);
        // One is in the notification's own row.
        if users.len() > 1 {
            links.extend(users.iter().map(|user| audience::link(user, notification.id)));
        }
        let (lane, due_at) = (notification.lane, notification.due_at);
        let owner = own.then_some(replica);
        match &entry.chunks {
            None => {
                let key = ChunkKey { notification: notification.id, number: 0 };
                chunks.push(NewChunk { key, lane, due_at, owner: None, chunk: None });
            }
            Some(_) if entry.seat.is_some() => seated.push(ChunkKey { notification: notification.id, number: 0 }),
            Some(resolved) => {
                for (number, chunk) in (0..).zip(resolved) {
                    let key = ChunkKey { notification: notification.id, number };
                    chunks.push(NewChunk { key, lane, due_at, owner, chunk: Some(chunk) });
                    notes.push(Notes::at_first(key, chunk));
                }
            }
        }
    }
    conn.insert_alike(INSERT, &[&ALERT, &PLAIN], notifications, "").await?;
    chunk::insert(conn, &context.reasons, &chunks, now).await?;
    link(conn, links).await?;
    chunk::note(conn, context, &notes).await?;
    seated.extend(chunks.iter().filter(|chunk| chunk.owner.is_some()).map(|chunk| chunk.key));
    Ok(seated)
}

/// Who is known to be addressed when it is accepted. The users of a long list are linked as it is resolved.
fn users_at_once(audience: &Audience) -> BTreeSet<&UserId> {
    if audience.is_short() || !matches!(audience, Audience::Users(_)) {
        audience::users(audience)
    } else {
        BTreeSet::new()
    }
}

/// Notes who is addressed, in the order of the users.
pub(super) async fn link(conn: &mut Conn<'_>, mut links: Vec<Vec<Value>>) -> Result<(), Failure> {
    links.sort_unstable_by(|one, other| key_of(one).cmp(&key_of(other)));
    let head = "-- queue.insert_links\nINSERT INTO notification_users (user_id, notification_id)";
    // Differs: how a row that is there is left alone.
    let tail = match conn.kind() {
        Kind::Sqlite => " ON CONFLICT DO NOTHING",
        Kind::Mysql => " ON DUPLICATE KEY UPDATE notification_id = notification_id",
    };
    Ok(conn.insert(head, links, tail).await?)
}

fn key_of(row: &[Value]) -> Option<&[u8]> {
    match row.first() {
        Some(Value::Bytes(bytes)) => Some(bytes),
        _ => None,
    }
}

fn notification_row(
    notification: &Notification,
    audience: &Audience,
    entry: &Entry<'_>,
) -> Result<Vec<Value>, StoreError> {
    let Entry { view, seat, .. } = entry;
    let expires_at = match notification.expiration {
        Expiration::Immediate => 0,
        Expiration::At(at) => at.as_millis(),
    };
    let warnings = match notification.warnings.as_slice() {
        [] => None,
        some => Some(serde_json::to_vec(some).map_err(|error| StoreError::Statement(error.into()))?),
    };
    let kept = if view.audience_complete { None } else { Some(audience::encode(audience)?) };
    let users = users_at_once(audience);
    let user = users.first().filter(|_| users.len() == 1);
    Ok(vec![
        id_value(notification.id.as_uuid()),
        notification.topic.as_str().into(),
        notification.owner.as_str().into(),
        notification.reference.as_ref().map(|reference| reference.as_str().as_bytes()).into(),
        notification.lane.as_number().into(),
        Value::Word(notification.push_type.as_str()),
        i64::from(notification.priority.as_number()).into(),
        expires_at.into(),
        notification.collapse_id.as_ref().map(|id| id.as_str().as_bytes()).into(),
        notification.derives_collapse_id.into(),
        Value::Word(notification.on_unknown.as_str()),
        notification.environment.map_or(Value::Null, |environment| Value::Word(environment.as_str())),
        notification.payload.bytes().as_ref().into(),
        kept.into(),
        view.audience_complete.into(),
        view.unmatched.into(),
        notification.due_at.into(),
        notification.created_at.into(),
        warnings.into(),
        seat.map_or(Value::Null, |seat| id_value(seat.cohort.as_uuid())),
        seat.map(|seat| seat.number).into(),
        user.map(|user| user.as_str().as_bytes()).into(),
    ])
}

fn leases(entry: &Entry<'_>, addresses: &Addresses, read_at: std::time::Duration) -> Vec<Lease> {
    let Some(chunks) = entry.chunks.as_ref().filter(|_| entry.submission.own) else { return Vec::new() };
    let notification = std::sync::Arc::new(entry.submission.notification.clone());
    (0..)
        .zip(chunks)
        .filter(|(_, chunk)| !chunk.is_done())
        .map(|(number, chunk)| Lease {
            key: ChunkKey { notification: notification.id, number },
            epoch: chunk::FIRST_EPOCH,
            notification: std::sync::Arc::clone(&notification),
            chunk: chunk.clone(),
            addresses: addresses.among(open_devices(chunk)),
            read_at,
            seat: entry.seat,
        })
        .collect()
}

/// The devices of a chunk that have no outcome yet.
pub(super) fn open_devices(chunk: &Chunk) -> impl Iterator<Item = DeviceSeq> {
    chunk.targets.iter().zip(&chunk.states).filter_map(|(target, state)| match target {
        Target::Device { seq, .. } if state.is_open() => Some(*seq),
        _ => None,
    })
}
