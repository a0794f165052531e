//! Taking over what nobody owns.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Context, FREE, HELD,
    accept::{addresses_of, open_devices},
    chunk::{self, NewChunk, Notes},
    lane_from,
};
use crate::domain::{
    clock::Timestamp,
    delivery::{Chunk, ChunkKey},
    device::DeviceSeq,
    notification::{Audience, Lane, Notification, NotificationId},
    payload::Payload,
    push::{Expiration, Priority},
};
use crate::store::{
    BoxError, BreakerId, Kind, Lease, ReplicaId, StoreError,
    audience::{self, LIST, Wanted, parsed, parsed_or_null},
    breakers::parked_holder,
    sql::Failure,
    statement::{Conn, Row, Statement, corrupt, id_value},
};

/// A chunk that was chosen, as its row.
struct Chosen {
    key: ChunkKey,
    epoch: i64,
    targets: Option<Vec<u8>>,
    states: Option<Vec<u8>>,
}

/// Which parked chunks may be taken beside those that nobody holds.
pub(in crate::store) struct Parked<'a> {
    /// Behind these, all: the breaker is another credential's.
    pub(in crate::store) passable: &'a [BreakerId],
    /// Behind these, those whose time is over.
    pub(in crate::store) overdue: &'a [BreakerId],
}

/// Takes over at most `max` chunks: urgent first, and in a lane what is free before what is parked. What is parked bears
/// the end of its time as `due_at`: behind a passable breaker it is taken whatever that says.
pub(in crate::store) async fn claim(
    conn: &mut Conn<'_>,
    context: &Context,
    lanes: &[Lane],
    max: usize,
    parked: &Parked<'_>,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<Lease>, Failure> {
    if !super::lives(conn, replica).await? {
        return Ok(Vec::new());
    }
    let mut chosen = Vec::new();
    for lane in lanes.iter().copied() {
        let passable = parked.passable.iter().map(|breaker| (parked_holder(*breaker), Which::All));
        let overdue = parked.overdue.iter().map(|breaker| (parked_holder(*breaker), Which::Due));
        for (holder, which) in std::iter::once((FREE, Which::Due)).chain(passable).chain(overdue) {
            let room = max.saturating_sub(chosen.len());
            if room > 0 {
                let more = choose(conn, holder, &[lane], which, now, room).await?;
                let known: BTreeSet<ChunkKey> = chosen.iter().map(|one: &Chosen| one.key).collect();
                chosen.extend(more.into_iter().filter(|one| !known.contains(&one.key)));
            }
        }
    }
    take(conn, context, chosen, max, replica, now).await
}

/// Takes one chunk that a breaker has parked. What was not tried says most, an urgent one soonest; among those that were
/// tried, whose turn it is, so that one that is refused rightly does not stand before all others.
pub(in crate::store) async fn claim_probe(
    conn: &mut Conn<'_>,
    context: &Context,
    breaker: BreakerId,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Option<Lease>, Failure> {
    if !super::lives(conn, replica).await? {
        return Ok(None);
    }
    let untried = Lane::ALL.map(|lane| (vec![lane], Which::Untried));
    for (lanes, which) in untried.into_iter().chain([(Lane::ALL.to_vec(), Which::LongestAgo)]) {
        let chosen = choose(conn, parked_holder(breaker), &lanes, which, now, 1).await?;
        if let Some(lease) = take(conn, context, chosen, 1, replica, now).await?.pop() {
            return Ok(Some(lease));
        }
    }
    Ok(None)
}

/// Which chunks of a holder, and in which order. Of what is parked, `due_at` is the end of its time.
#[derive(Clone, Copy)]
enum Which {
    /// All.
    All,
    /// Those that are due.
    Due,
    /// Those that are not due, and nothing of which was tried.
    Untried,
    /// Those that are not due; whatever has waited longest first.
    LongestAgo,
}

/// Chooses and locks. Rows that another replica is choosing are passed over; the index is read in its order, so that
/// no more rows are locked than are taken, but by [`Which::LongestAgo`], which has few to choose from.
async fn choose(
    conn: &mut Conn<'_>,
    holder: i64,
    lanes: &[Lane],
    which: Which,
    now: Timestamp,
    max: usize,
) -> Result<Vec<Chosen>, Failure> {
    // Differs: how the index is named, and SQLite's one writer needs no locks.
    let (index, lock) = match conn.kind() {
        Kind::Sqlite => (" INDEXED BY chunks_work", ""),
        Kind::Mysql => (" FORCE INDEX (chunks_work)", " FOR UPDATE SKIP LOCKED"),
    };
    let mut statement =
        Statement::new("-- queue.claim\nSELECT notification_id, number, epoch, targets, states FROM chunks");
    statement.push(index).push(" WHERE holder = ").bind(holder);
    match lanes {
        [lane] => drop(statement.push(" AND lane = ").bind(lane.as_number())),
        lanes => drop(statement.push(" AND lane IN ").list(lanes.iter().map(|lane| lane.as_number()))),
    }
    let order = match which {
        Which::All => " ORDER BY due_at",
        Which::Due => {
            statement.push(" AND due_at <= ").bind(now);
            " ORDER BY due_at"
        }
        Which::Untried => {
            statement.push(" AND due_at > ").bind(now).push(" AND states IS NULL");
            " ORDER BY due_at"
        }
        Which::LongestAgo => {
            statement.push(" AND due_at > ").bind(now);
            " ORDER BY waiting_since"
        }
    };
    statement.push(order).push(" LIMIT ").bind(max as u64).push(lock);
    let rows = conn.fetch(statement).await?;
    let chosen = rows.iter().map(|row| {
        Ok(Chosen {
            key: chunk::key_from(row, 0)?,
            epoch: row.int(2)?,
            targets: row.bytes_or_null(3)?,
            states: row.bytes_or_null(4)?,
        })
    });
    Ok(chosen.collect::<Result<_, StoreError>>()?)
}

async fn take(
    conn: &mut Conn<'_>,
    context: &Context,
    chosen: Vec<Chosen>,
    max: usize,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<Lease>, Failure> {
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let mut keys: Vec<ChunkKey> = chosen.iter().map(|one| one.key).collect();
    keys.sort_unstable();
    for piece in keys.chunks(LIST) {
        let mut statement = Statement::new("-- queue.take\nUPDATE chunks SET holder = ");
        statement.bind(replica.0).push(", epoch = epoch + 1, waiting_since = NULL WHERE ");
        statement.keys(conn.kind(), piece);
        let taken = conn.execute(statement).await?;
        if taken != piece.len() as u64 {
            return Err(StoreError::Statement("a chunk that was locked went away".into()).into());
        }
    }
    let mut aside = Vec::new();
    let ids: BTreeSet<NotificationId> = keys.iter().map(|key| key.notification).collect();
    let notifications = notifications(conn, &ids).await?;

    // Chunks as they are, and audiences that are still to be resolved.
    let mut open: Vec<(ChunkKey, i64, Arc<Notification>, Chunk)> = Vec::with_capacity(chosen.len());
    let mut unresolved = Vec::new();
    for one in chosen {
        let epoch = one.epoch + 1;
        let Some((notification, audience)) = notifications.get(&one.key.notification) else {
            aside.push(one.key);
            continue;
        };
        match (&one.targets, audience) {
            (Some(targets), _) => {
                match chunk::read(conn, &context.reasons, one.key, targets, one.states.as_deref()).await {
                    Ok(chunk) => open.push((one.key, epoch, Arc::clone(notification), chunk)),
                    Err(Failure::Store(error @ StoreError::Corrupt { .. })) => {
                        unreadable(one.key.notification, &error);
                        aside.push(one.key);
                    }
                    Err(error) => return Err(error),
                }
            }
            (None, Some(audience)) => unresolved.push((one.key, epoch, Arc::clone(notification), audience)),
            (None, None) => {
                let row = one.key.notification;
                unreadable(row, &corrupt("notifications", "audience", row, "not resolved, and not there"));
                aside.push(one.key);
            }
        }
    }
    let room = max.saturating_sub(open.len() + unresolved.len());
    let resolved = resolve(conn, context, &unresolved, room, replica, now).await?;
    open.extend(resolved);
    set_aside(conn, &aside, now).await?;

    let mut devices: Vec<DeviceSeq> = open.iter().flat_map(|(_, _, _, chunk)| open_devices(chunk)).collect();
    devices.sort_unstable();
    devices.dedup();
    let read_at = context.clock.monotonic();
    let addresses: HashMap<_, _> =
        audience::read_addresses(conn, &devices).await?.into_iter().map(|address| (address.seq, address)).collect();
    let lease = |(key, epoch, notification, chunk): (_, _, _, Chunk)| {
        let addresses = addresses_of(&chunk, &addresses);
        Lease { key, epoch, notification, chunk, addresses, read_at }
    };
    Ok(open.into_iter().map(lease).collect())
}

/// Work that cannot be read is held: it is kept, it shows, and it does not stop the rest.
async fn set_aside(conn: &mut Conn<'_>, keys: &[ChunkKey], now: Timestamp) -> Result<(), Failure> {
    for piece in keys.chunks(LIST) {
        let mut statement = Statement::new("-- queue.set_aside\nUPDATE chunks SET holder = ");
        statement.bind(HELD).push(", waiting_since = ").bind(now).push(" WHERE ").keys(conn.kind(), piece);
        conn.execute(statement).await?;
    }
    Ok(())
}

fn unreadable(id: NotificationId, error: &StoreError) {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::error!(notification.id = %id, error = %error, source, "work of {id} cannot be read: it is held");
}

/// Resolves audiences that are due. As many chunks as there is room for are this replica's, the others nobody's; the
/// chunk that stood for the audience becomes the first of them, or ends when there is nobody.
async fn resolve(
    conn: &mut Conn<'_>,
    context: &Context,
    unresolved: &[(ChunkKey, i64, Arc<Notification>, &Audience)],
    mut room: usize,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<(ChunkKey, i64, Arc<Notification>, Chunk)>, Failure> {
    if unresolved.is_empty() {
        return Ok(Vec::new());
    }
    let wanted: Vec<Wanted<'_>> =
        unresolved.iter().map(|(_, _, notification, audience)| Wanted { notification, audience }).collect();
    let resolution = audience::resolve(conn, &*context.clock, &wanted, now).await?;
    let mut mine = Vec::new();
    for ((first, epoch, notification, _), resolved) in unresolved.iter().zip(resolution.resolved) {
        let mut chunks = resolved.chunks.into_iter();
        let head = chunks.next().unwrap_or_default();
        first_chunk(conn, context, *first, &head, now).await?;
        chunk::note(conn, &[Notes::at_first(*first, &head)]).await?;
        if !head.is_done() {
            mine.push((*first, *epoch, Arc::clone(notification), head));
        }
        let rest: Vec<Chunk> = chunks.collect();
        let mut rows = Vec::with_capacity(rest.len());
        let mut notes = Vec::with_capacity(rest.len());
        let mut own = 0;
        for (number, chunk) in (first.number + 1..).zip(&rest) {
            let key = ChunkKey { notification: first.notification, number };
            let owner = (own < room && !chunk.is_done()).then_some(replica);
            own += usize::from(owner.is_some());
            rows.push(NewChunk {
                key,
                lane: notification.lane,
                due_at: notification.due_at,
                owner,
                chunk: Some(chunk),
            });
            notes.push(Notes::at_first(key, chunk));
        }
        chunk::insert(conn, &context.reasons, &rows, now).await?;
        chunk::note(conn, &notes).await?;
        let owned: BTreeSet<ChunkKey> = rows.iter().filter(|row| row.owner.is_some()).map(|row| row.key).collect();
        room = room.saturating_sub(own);
        for (number, chunk) in (first.number + 1..).zip(rest) {
            let key = ChunkKey { notification: first.notification, number };
            if owned.contains(&key) {
                mine.push((key, chunk::FIRST_EPOCH, Arc::clone(notification), chunk));
            }
        }
        let mut statement = Statement::new(
            "-- queue.resolved\nUPDATE notifications SET audience = NULL, audience_complete = 1, unmatched = ",
        );
        statement.bind(resolved.unmatched).push(" WHERE id = ").bind(id_value(first.notification.as_uuid()));
        conn.execute(statement).await?;
    }
    Ok(mine)
}

async fn first_chunk(
    conn: &mut Conn<'_>,
    context: &Context,
    key: ChunkKey,
    chunk: &Chunk,
    now: Timestamp,
) -> Result<(), Failure> {
    let counts = chunk.counts();
    let mut statement = Statement::new("-- queue.resolve_first\nUPDATE chunks SET targets = ");
    statement.bind(crate::domain::delivery::encode_targets(&chunk.targets));
    statement.push(", states = ").bind(chunk::states(chunk, &context.reasons)?);
    statement.push(", targeted = ").bind(counts.targeted);
    for (column, count) in chunk::COUNTED.into_iter().zip(chunk::counted(&counts)) {
        statement.push(column).bind(count);
    }
    if chunk.is_done() {
        statement.push(", holder = NULL, ended_at = ").bind(now);
    }
    statement.push(" WHERE ").keys(conn.kind(), [&key]);
    conn.execute(statement).await?;
    Ok(())
}

type Read = (Arc<Notification>, Option<Audience>);

/// Notifications as they are sent. Those that cannot be read are missing.
async fn notifications(
    conn: &mut Conn<'_>,
    ids: &BTreeSet<NotificationId>,
) -> Result<BTreeMap<NotificationId, Read>, Failure> {
    let mut found = BTreeMap::new();
    let all: Vec<_> = ids.iter().copied().collect();
    for piece in all.chunks(LIST) {
        let mut statement = Statement::new(
            "-- queue.notifications\nSELECT id, topic, owner, reference, lane, push_type, priority, expires_at, \
             collapse_id, derives_collapse_id, on_unknown, environment, payload, audience, due_at, created_at, \
             warnings FROM notifications WHERE id IN ",
        );
        statement.list(piece.iter().map(|id| id_value(id.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let id = super::notification_id(&row.bytes(0)?)?;
            match notification_from(row, id) {
                Ok(read) => drop(found.insert(id, read)),
                Err(error) => unreadable(id, &error),
            }
        }
    }
    Ok(found)
}

fn notification_from(row: &Row, id: NotificationId) -> Result<Read, StoreError> {
    let bad = |column| move |error: BoxError| corrupt("notifications", column, id, error);
    let expires_at = row.int(7)?;
    let audience = row.bytes_or_null(13)?;
    let audience = audience.map(|bytes| audience::decode(&bytes)).transpose().map_err(bad("audience"))?;
    if let Some(audience) = &audience {
        audience::check(audience).map_err(|error| bad("audience")(error.into()))?;
    }
    let notification = Notification {
        id,
        topic: parsed(row.bytes(1)?).map_err(bad("topic"))?,
        owner: String::from_utf8(row.bytes(2)?).map_err(|error| bad("owner")(error.into()))?,
        reference: parsed_or_null(row.bytes_or_null(3)?).map_err(bad("reference"))?,
        lane: lane_from(row.int(4)?).ok_or_else(|| bad("lane")("no such lane".into()))?,
        push_type: parsed(row.bytes(5)?).map_err(bad("push_type"))?,
        priority: Priority::from_number(row.int(6)?).ok_or_else(|| bad("priority")("no such priority".into()))?,
        expiration: match expires_at {
            0 => Expiration::Immediate,
            at => Expiration::At(Timestamp::from_millis(at)),
        },
        collapse_id: parsed_or_null(row.bytes_or_null(8)?).map_err(bad("collapse_id"))?,
        derives_collapse_id: row.int(9)? != 0,
        on_unknown: parsed(row.bytes(10)?).map_err(bad("on_unknown"))?,
        environment: parsed_or_null(row.bytes_or_null(11)?).map_err(bad("environment"))?,
        payload: Payload::from_stored(
            row.bytes_or_null(12)?.ok_or_else(|| bad("payload")("gone, and not all of it is sent".into()))?.into(),
        ),
        due_at: Timestamp::from_millis(row.int(14)?),
        created_at: Timestamp::from_millis(row.int(15)?),
        warnings: crate::store::notifications::warnings(row.bytes_or_null(16)?).map_err(bad("warnings"))?,
    };
    Ok((Arc::new(notification), audience))
}
