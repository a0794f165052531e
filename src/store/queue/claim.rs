//! Taking over what nobody owns. What was cancelled meanwhile is ended here, and not taken.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Context, FREE, HELD,
    accept::open_devices,
    chunk::{self, Notes},
    lane_from,
    resolve::{self, Own, Unresolved},
};
use crate::domain::{
    clock::Timestamp,
    delivery::{CHUNK_TARGETS, ChunkKey, DeliveryStatus},
    device::DeviceSeq,
    notification::{Audience, Lane, Notification, NotificationId},
    outcome::{Cause, own},
    payload::Payload,
    push::{Expiration, Priority},
};
use crate::store::{
    BoxError, BreakerId, Claimed, Kind, Lease, ReplicaId, StoreError,
    audience::{self, LIST, parsed, parsed_or_null},
    breakers::parked_holder,
    replicas::A_DEATH,
    sql::Failure,
    statement::{Conn, Row, Statement, corrupt, id_value},
};

/// A chunk that was chosen, as its row.
pub(super) struct Chosen {
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
) -> Result<Claimed, Failure> {
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
    let claimed = take(conn, context, chosen, max, replica, now).await?;
    Ok(if keeps(conn, context, &claimed.leases, replica).await? { claimed } else { Claimed::default() })
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
    let untried = Lane::ALL.map(|lane| (vec![lane], Which::Untried));
    for (lanes, which) in untried.into_iter().chain([(Lane::ALL.to_vec(), Which::LongestAgo)]) {
        let chosen = choose(conn, parked_holder(breaker), &lanes, which, now, 1).await?;
        let mut leases = take(conn, context, chosen, 1, replica, now).await?.leases;
        if !leases.is_empty() {
            return Ok(if keeps(conn, context, &leases, replica).await? { leases.pop() } else { None });
        }
    }
    Ok(None)
}

/// Whether this replica lives, and keeps what it has taken.
async fn keeps(conn: &mut Conn<'_>, context: &Context, leases: &[Lease], replica: ReplicaId) -> Result<bool, Failure> {
    let taken: Vec<ChunkKey> = leases.iter().map(|lease| lease.key).collect();
    super::keeps(conn, context, &taken, replica).await
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
            statement.push(" AND due_at > ").bind(now).push(" AND NOT ").push(chunk::TRIED);
            " ORDER BY due_at"
        }
        Which::LongestAgo => {
            statement.push(" AND due_at > ").bind(now);
            " ORDER BY waiting_since"
        }
    };
    statement.push(order).push(" LIMIT ").bind(max as u64).push(lock);
    chosen_from(&conn.fetch(statement).await?)
}

/// Rows of `notification_id, number, epoch, targets, states`.
pub(super) fn chosen_from(rows: &[Row]) -> Result<Vec<Chosen>, Failure> {
    let chosen = rows.iter().map(|row| {
        Ok(Chosen {
            key: chunk::key_from(row, 0)?,
            epoch: row.int(2)?,
            targets: row.bytes_or_null(3)?.map(<[u8]>::to_vec),
            states: row.bytes_or_null(4)?.map(<[u8]>::to_vec),
        })
    });
    Ok(chosen.collect::<Result<_, StoreError>>()?)
}

/// Takes what was chosen and locked: as leases, what is to be sent. What was cancelled ends here.
pub(super) async fn take(
    conn: &mut Conn<'_>,
    context: &Context,
    chosen: Vec<Chosen>,
    max: usize,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Claimed, Failure> {
    if chosen.is_empty() {
        return Ok(Claimed::default());
    }
    let mut keys: Vec<ChunkKey> = chosen.iter().map(|one| one.key).collect();
    keys.sort_unstable();
    for piece in keys.chunks(LIST) {
        // What was parked bears the end of its time as `due_at`: given back by whatever way, it is due now. First, because
        // MySQL assigns one after the other.
        let mut statement = Statement::new("-- queue.take\nUPDATE chunks SET due_at = CASE WHEN holder < -1000 THEN ");
        statement
            .bind(now)
            .push(" ELSE due_at END, holder = ")
            .bind(replica.0)
            .push(", epoch = epoch + 1, waiting_since = NULL WHERE ");
        statement.keys(conn.kind(), piece);
        let taken = conn.execute(statement).await?;
        if taken != piece.len() as u64 {
            return Err(StoreError::Statement("a chunk that was locked went away".into()).into());
        }
    }
    let mut aside = Vec::new();
    let ids: BTreeSet<NotificationId> = keys.iter().map(|key| key.notification).collect();
    let notifications = notifications(conn, &ids).await?;

    // Chunks as they are, those that end here, and audiences that are still to be resolved.
    let mut open: Vec<Own> = Vec::with_capacity(chosen.len());
    let mut cancelled = Vec::new();
    let mut unresolved = Vec::new();
    for one in chosen {
        let (key, epoch) = (one.key, one.epoch + 1);
        let Some(asked) = notifications.get(&key.notification) else {
            aside.push(key);
            continue;
        };
        let notification = &asked.notification;
        match (&one.targets, &asked.audience) {
            (Some(targets), _) => {
                let read = chunk::read(conn, &context.reasons, key, targets, one.states.as_deref()).await;
                let read = read.map(|mut chunk| {
                    chunk.taken_over(epoch >= A_DEATH);
                    chunk
                });
                match read {
                    Ok(chunk) if asked.cancelled => cancelled.push((key, chunk)),
                    Ok(chunk) => open.push(Own { key, epoch, notification: Arc::clone(notification), chunk }),
                    Err(Failure::Store(error @ StoreError::Corrupt { .. })) => {
                        unreadable(key.notification, &error);
                        aside.push(key);
                    }
                    Err(error) => return Err(error),
                }
            }
            (None, Some(audience)) => {
                let ending = asked.ending(now);
                unresolved.push(Unresolved { key, epoch, notification, audience, ending });
            }
            (None, None) => {
                let row = key.notification;
                unreadable(row, &corrupt("notifications", "audience", row, "not resolved, and not there"));
                aside.push(key);
            }
        }
    }
    for (key, chunk) in &mut cancelled {
        let ended = (0..).zip(&chunk.states).filter(|(_, state)| state.is_open()).map(|(at, _)| at).collect();
        chunk.end_open(DeliveryStatus::Cancelled, &own::CANCELLED, now);
        chunk::write(conn, &context.reasons, *key, chunk, now).await?;
        chunk::note(conn, context, &[Notes { key: *key, chunk, ended, unique_ids: &[] }]).await?;
    }
    let room = max.saturating_sub(open.len()) * CHUNK_TARGETS;
    let read_at = context.clock.monotonic();
    let resolution = resolve::resolve(conn, context, &unresolved, room, replica, now).await?;
    open.extend(resolution.own);
    set_aside(conn, &aside, now).await?;

    let mut addresses = resolution.addresses;
    let open_ones = addresses.each(open.iter().flat_map(|own| open_devices(&own.chunk)));
    let unread: Vec<DeviceSeq> = open_ones.filter(|(_, address)| address.is_none()).map(|(device, _)| device).collect();
    addresses.extend(audience::read_addresses(conn, &unread).await?);
    let lease = |Own { key, epoch, notification, chunk }| {
        let addresses = addresses.among(open_devices(&chunk));
        Lease { key, epoch, notification, chunk, addresses, read_at, seat: None }
    };
    Ok(Claimed { leases: open.into_iter().map(lease).collect(), more: resolution.more })
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

pub(super) fn unreadable(id: NotificationId, error: &StoreError) {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::error!(notification.id = %id, error = %error, source, "work of {id} cannot be read: it is held");
}

/// A notification as it is sent.
struct Asked {
    notification: Arc<Notification>,
    /// Until it is resolved.
    audience: Option<Audience>,
    cancelled: bool,
}

impl Asked {
    /// How everybody ends who has not been resolved; `None`: as APNs says.
    fn ending(&self, now: Timestamp) -> Option<(DeliveryStatus, Cause)> {
        if self.cancelled {
            return Some((DeliveryStatus::Cancelled, own::CANCELLED));
        }
        (now >= self.notification.deadline()).then_some((DeliveryStatus::Expired, own::EXPIRED))
    }
}

/// Notifications as they are sent. Those that cannot be read are missing.
async fn notifications(
    conn: &mut Conn<'_>,
    ids: &BTreeSet<NotificationId>,
) -> Result<BTreeMap<NotificationId, Asked>, Failure> {
    let mut found = BTreeMap::new();
    let all: Vec<_> = ids.iter().copied().collect();
    for piece in all.chunks(LIST) {
        let mut statement = Statement::new(
            "-- queue.notifications\nSELECT id, topic, owner, reference, lane, push_type, priority, expires_at, \
             collapse_id, derives_collapse_id, on_unknown, environment, payload, audience, due_at, created_at, \
             warnings, cancelled_at FROM notifications WHERE id IN ",
        );
        statement.list(piece.iter().map(|id| id_value(id.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let id = super::notification_id(row.bytes(0)?)?;
            match notification_from(row, id) {
                Ok(asked) => drop(found.insert(id, asked)),
                Err(error) => unreadable(id, &error),
            }
        }
    }
    Ok(found)
}

fn notification_from(row: &Row, id: NotificationId) -> Result<Asked, StoreError> {
    let bad = |column| move |error: BoxError| corrupt("notifications", column, id, error);
    let expires_at = row.int(7)?;
    let audience = row.bytes_or_null(13)?;
    let audience = audience.map(audience::decode).transpose().map_err(bad("audience"))?;
    let notification = Notification {
        id,
        topic: parsed(row.bytes(1)?).map_err(bad("topic"))?,
        owner: String::from_utf8(row.bytes(2)?.to_vec()).map_err(|error| bad("owner")(error.into()))?,
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
            row.bytes_or_null(12)?
                .map(<[u8]>::to_vec)
                .ok_or_else(|| bad("payload")("gone, and not all of it is sent".into()))?
                .into(),
        ),
        due_at: Timestamp::from_millis(row.int(14)?),
        created_at: Timestamp::from_millis(row.int(15)?),
        warnings: crate::store::notifications::warnings(row.bytes_or_null(16)?).map_err(bad("warnings"))?,
    };
    Ok(Asked { notification: Arc::new(notification), audience, cancelled: row.int_or_null(17)?.is_some() })
}
