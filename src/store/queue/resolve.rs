//! From kept audiences to chunks: short lists whole, the others piece by piece.
//!
//! Promises: a row without targets stands for what is still to be resolved, behind all chunks of its notification. A
//! piece is one transaction: its chunks, the place reached, and a row for the rest, free for any replica; so a kill
//! loses and repeats nothing. The rest is due when its piece was made: behind others of its lane that wait. What was
//! cancelled or has expired is only counted.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    Context, FREE, accept,
    chunk::{self, NewChunk, Notes},
};
use crate::domain::{
    clock::Timestamp,
    delivery::{CHUNK_TARGETS, Chunk, ChunkKey, DeliveryStatus, State, Target, decode_targets},
    device::{Addresses, DeviceSeq, DeviceToken},
    notification::{Audience, Notification, NotificationId},
    outcome::Cause,
};
use crate::store::{
    Kind, ReplicaId, StoreError,
    audience::{self, LIST, Wanted},
    sql::Failure,
    statement::{Conn, Statement, corrupt, id_value},
};

/// The most targets that one transaction resolves of audiences that are not short, and the most such audiences: some tens of
/// milliseconds. SQLite has one writer, for which urgent notifications wait meanwhile.
const fn at_once(kind: Kind) -> (usize, usize) {
    // Differs: how many may write.
    match kind {
        Kind::Sqlite => (CHUNK_TARGETS, 1),
        Kind::Mysql => (10 * CHUNK_TARGETS, 10),
    }
}

/// A row that stands for an audience, taken by whoever resolves.
pub(super) struct Unresolved<'r> {
    pub(super) key: ChunkKey,
    pub(super) epoch: i64,
    pub(super) notification: &'r Arc<Notification>,
    pub(super) audience: &'r Audience,
    /// Nothing is sent any more: how everybody ends.
    pub(super) ending: Option<(DeliveryStatus, Cause)>,
}

/// A chunk with something to send, of whoever resolved it.
pub(super) struct Own {
    pub(super) key: ChunkKey,
    pub(super) epoch: i64,
    pub(super) notification: Arc<Notification>,
    pub(super) chunk: Chunk,
}

/// What came of it.
#[derive(Default)]
pub(super) struct Resolution {
    pub(super) own: Vec<Own>,
    /// The addresses that were read on the way.
    pub(super) addresses: Addresses,
    /// Audiences have a rest that may be claimed at once.
    pub(super) more: bool,
}

/// How far an audience has come.
#[derive(Debug, Clone, Copy)]
struct Place {
    reached: i64,
    up_to: i64,
}

/// A part of an audience, resolved.
struct Piece {
    targets: Vec<(Target, State)>,
    unmatched: u64,
    /// Where the next one begins; `None`: this is the last.
    rest: Option<Place>,
}

/// Resolves audiences, or the next pieces of them. The first chunk of each is this replica's, and others as far as there is
/// `room` for their targets; what is beyond is nobody's.
pub(super) async fn resolve(
    conn: &mut Conn<'_>,
    context: &Context,
    unresolved: &[Unresolved<'_>],
    mut room: usize,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Resolution, Failure> {
    let mut resolution = Resolution::default();
    let (short, long): (Vec<_>, Vec<_>) = unresolved.iter().partition(|one| one.audience.is_short());
    if !short.is_empty() {
        let wanted: Vec<Wanted<'_>> = short
            .iter()
            .map(|one| Wanted { notification: one.notification, audience: one.audience, from: 0 })
            .collect();
        let read = audience::resolve(conn, &*context.clock, &wanted, now).await?;
        resolution.addresses.extend(read.addresses.iter().cloned());
        for (one, resolved) in short.into_iter().zip(read.resolved) {
            let piece = Piece { targets: resolved.targets, unmatched: resolved.unmatched, rest: None };
            keep(conn, context, one, None, piece, &mut room, replica, &mut resolution, now).await?;
        }
    }
    if long.is_empty() {
        return Ok(resolution);
    }
    let places = places(conn, &long).await?;
    let (most_targets, most_audiences) = at_once(conn.kind());
    let (now_resolved, later) = long.split_at(long.len().min(most_audiences));
    for one in now_resolved {
        let share = match one.ending {
            None => room.min(most_targets) / now_resolved.len(),
            // Nothing of it stays in memory.
            Some(_) => most_targets / now_resolved.len(),
        };
        let place = places.get(&one.key.notification).copied();
        let most = share.max(CHUNK_TARGETS);
        let piece = next_piece(conn, context, one, place, most, &mut resolution, now).await?;
        keep(conn, context, one, place, piece, &mut room, replica, &mut resolution, now).await?;
    }
    // More than a transaction should hold: the next one begins with them.
    for one in later {
        resolution.more = true;
        give_back(conn, one.key, one.notification.due_at).await?;
    }
    Ok(resolution)
}

async fn next_piece(
    conn: &mut Conn<'_>,
    context: &Context,
    one: &Unresolved<'_>,
    place: Option<Place>,
    most: usize,
    resolution: &mut Resolution,
    now: Timestamp,
) -> Result<Piece, Failure> {
    let Unresolved { notification, audience, .. } = one;
    let Some(named) = audience.named() else {
        let place = match place {
            Some(place) => place,
            None => Place { reached: 0, up_to: audience::highest(conn).await? },
        };
        let window = (place.reached, place.up_to);
        let piece = audience::next_piece(conn, notification, audience, window, most).await?;
        resolution.addresses.extend(piece.addresses);
        let rest = (piece.reached < place.up_to).then_some(Place { reached: piece.reached, ..place });
        return Ok(Piece { targets: piece.targets, unmatched: 0, rest });
    };
    let from = place.map_or(Ok(0), |place| {
        usize::try_from(place.reached).map_err(|error| corrupt("audiences", "reached", notification.id, error))
    })?;
    let to = from.saturating_add(most).min(named);
    let part = audience::part(audience, from..to);
    if let Audience::Users(_) = part {
        accept::link(conn, audience::links(notification.id, &part)).await?;
    }
    let wanted = Wanted { notification, audience: &part, from };
    let read = audience::resolve(conn, &*context.clock, &[wanted], now).await?;
    resolution.addresses.extend(read.addresses.iter().cloned());
    let Some(mut resolved) = read.resolved.into_iter().next() else {
        return Err(StoreError::Statement("a part of a list was not resolved".into()).into());
    };
    if from > 0 {
        // A phone that passes from one user of the list to another in between was the first one's when it was due.
        let earlier = earlier(conn, notification.id).await?;
        resolved.targets.retain(|(target, _)| !earlier.contains(&Same::from(target)));
    }
    let place = |at: usize| i64::try_from(at).unwrap_or(i64::MAX);
    let rest = (to < named).then_some(Place { reached: place(to), up_to: place(named) });
    Ok(Piece { targets: resolved.targets, unmatched: resolved.unmatched, rest })
}

/// What makes two targets the same.
#[derive(PartialEq, Eq, Hash)]
enum Same {
    Device(DeviceSeq),
    Token(DeviceToken),
}

impl From<&Target> for Same {
    fn from(target: &Target) -> Self {
        match target {
            Target::Device { seq, .. } => Self::Device(*seq),
            Target::Token { token, .. } => Self::Token(token.clone()),
        }
    }
}

/// The targets of all chunks that are there.
async fn earlier(conn: &mut Conn<'_>, id: NotificationId) -> Result<HashSet<Same>, Failure> {
    let mut statement = Statement::new(
        "-- queue.earlier\nSELECT number, targets FROM chunks WHERE targets IS NOT NULL AND notification_id = ",
    );
    statement.bind(id_value(id.as_uuid()));
    let mut earlier = HashSet::new();
    for row in &conn.fetch(statement).await? {
        let bad = |error| corrupt("chunks", "targets", id, error);
        earlier.extend(decode_targets(row.bytes(1)?).map_err(bad)?.iter().map(Same::from));
    }
    Ok(earlier)
}

/// Writes a piece: the row that stood for it becomes the first of its chunks, and a new one stands for the rest.
#[expect(clippy::too_many_arguments, reason = "the facts of one piece, used here only")]
async fn keep(
    conn: &mut Conn<'_>,
    context: &Context,
    one: &Unresolved<'_>,
    place: Option<Place>,
    piece: Piece,
    room: &mut usize,
    replica: ReplicaId,
    resolution: &mut Resolution,
    now: Timestamp,
) -> Result<(), Failure> {
    let Piece { targets, unmatched, rest } = piece;
    let id = one.key.notification;
    let mut chunks = audience::into_chunks(targets, place.is_none() && rest.is_none());
    if let Some((status, cause)) = &one.ending {
        for chunk in &mut chunks {
            chunk.end_open(*status, cause, now);
        }
    }
    reach(conn, id, place, rest, unmatched).await?;
    resolution.more |= rest.is_some();
    if chunks.is_empty() && rest.is_some() {
        return give_back(conn, one.key, now).await;
    }
    let key = |number| ChunkKey { notification: id, number };
    let (lane, due_at) = (one.notification.lane, one.notification.due_at);
    let mut chunks = chunks.into_iter();
    let head = chunks.next().unwrap_or_default();
    *room = room.saturating_sub(head.targets.len());
    let others: Vec<(ChunkKey, Chunk)> = (one.key.number + 1..).map(key).zip(chunks).collect();
    let mut rows = Vec::with_capacity(others.len() + 1);
    for (key, chunk) in &others {
        let owner = (*room > 0 && !chunk.is_done()).then_some(replica);
        if owner.is_some() {
            *room = room.saturating_sub(chunk.targets.len());
        }
        rows.push(NewChunk { key: *key, lane, due_at, owner, chunk: Some(chunk) });
    }
    if rest.is_some() {
        let last = others.last().map_or(one.key.number, |(key, _)| key.number);
        rows.push(NewChunk { key: key(last + 1), lane, due_at: now, owner: None, chunk: None });
    }
    chunk::write(conn, &context.reasons, one.key, &head, now).await?;
    chunk::insert(conn, &context.reasons, &rows, now).await?;
    // What is only counted is explained by the notification itself.
    if one.ending.is_none() {
        let notes = others.iter().map(|(key, chunk)| Notes::at_first(*key, chunk));
        let notes: Vec<Notes<'_>> = std::iter::once(Notes::at_first(one.key, &head)).chain(notes).collect();
        chunk::note(conn, context, &notes).await?;
    }
    let owned: HashSet<ChunkKey> = rows.iter().filter(|row| row.owner.is_some()).map(|row| row.key).collect();
    let own = |key, epoch, chunk| Own { key, epoch, notification: Arc::clone(one.notification), chunk };
    if !head.is_done() {
        resolution.own.push(own(one.key, one.epoch, head));
    }
    let others = others.into_iter().filter(|(key, _)| owned.contains(key));
    resolution.own.extend(others.map(|(key, chunk)| own(key, chunk::FIRST_EPOCH, chunk)));
    Ok(())
}

/// Nobody's again.
async fn give_back(conn: &mut Conn<'_>, key: ChunkKey, due_at: Timestamp) -> Result<(), Failure> {
    let mut statement = Statement::new("-- queue.give_back\nUPDATE chunks SET holder = ");
    statement.bind(FREE).push(", due_at = ").bind(due_at).push(" WHERE ").keys(conn.kind(), [&key]);
    conn.execute(statement).await?;
    Ok(())
}

/// Notes how far an audience has come.
async fn reach(
    conn: &mut Conn<'_>,
    id: NotificationId,
    before: Option<Place>,
    rest: Option<Place>,
    unmatched: u64,
) -> Result<(), Failure> {
    let bytes = id_value(id.as_uuid());
    match (before, rest) {
        (None, None) => {}
        (None, Some(Place { reached, up_to })) => {
            let row = vec![bytes.clone(), reached.into(), up_to.into()];
            let head = "-- queue.reached\nINSERT INTO audiences (notification_id, reached, up_to)";
            conn.insert(head, vec![row], "").await?;
        }
        (Some(_), Some(Place { reached, .. })) => {
            let mut statement = Statement::new("-- queue.reached\nUPDATE audiences SET reached = ");
            statement.bind(reached).push(" WHERE notification_id = ").bind(bytes.clone());
            conn.execute(statement).await?;
        }
        (Some(_), None) => {
            let mut statement = Statement::new("-- queue.reached\nDELETE FROM audiences WHERE notification_id = ");
            statement.bind(bytes.clone());
            conn.execute(statement).await?;
        }
    }
    if rest.is_some() && unmatched == 0 {
        return Ok(());
    }
    let mut statement = Statement::new("-- queue.resolved\nUPDATE notifications SET unmatched = unmatched + ");
    statement.bind(unmatched);
    if rest.is_none() {
        statement.push(", audience = NULL, audience_complete = 1");
    }
    statement.push(" WHERE id = ").bind(bytes);
    conn.execute(statement).await?;
    Ok(())
}

async fn places(
    conn: &mut Conn<'_>,
    unresolved: &[&Unresolved<'_>],
) -> Result<HashMap<NotificationId, Place>, Failure> {
    let mut places = HashMap::new();
    for piece in unresolved.chunks(LIST) {
        let mut statement = Statement::new(
            "-- queue.places\nSELECT notification_id, reached, up_to FROM audiences WHERE notification_id IN ",
        );
        statement.list(piece.iter().map(|one| id_value(one.key.notification.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let place = Place { reached: row.int(1)?, up_to: row.int(2)? };
            places.insert(super::notification_id(row.bytes(0)?)?, place);
        }
    }
    Ok(places)
}
