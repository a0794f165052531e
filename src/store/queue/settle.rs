//! Recording progress: leases first, then outcomes, then what was learned of devices.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use super::{
    BY_KEY_HOLDER, Context, FREE,
    chunk::{self, Notes},
    cohort,
};
use crate::domain::{
    clock::Timestamp,
    delivery::{Chunk, ChunkKey, DeliveryStatus, DeviceEffect, State},
    device::{DeviceSeq, DeviceToken},
    outcome::Cause,
    topic::Environment,
};
use crate::store::{
    Disposition, Kind, ReplicaId, Settled, StoreError,
    acceptances::{self, Acceptance, Locked},
    audience::{LIST, numbered},
    breakers::parked_holder,
    reasons,
    sql::Failure,
    statement::{Conn, Done, Statement, Value, id_value},
};

/// By how much APNs' clock and ours may differ: a token that registered within this time before APNs saw it leave has
/// registered after, for all we know, and is kept. NTP keeps clocks much closer; a wrong guess costs one more push.
pub(in crate::store) const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// `last_accepted_at` is right to within this time, so that a broadcast a day writes each device once.
pub(in crate::store) const ACCEPTED_WITHIN: Duration = Duration::from_secs(24 * 3600);

/// All causes of a settle: the dictionary must hold them before it begins.
pub(in crate::store) fn causes<'s>(done: &'s [Settled<'_>]) -> impl Iterator<Item = &'s Cause> {
    done.iter().flat_map(|settled| settled.chunk.states.iter().filter_map(|state| state.cause.as_ref()))
}

/// What a chunk becomes. Chunks that become the same are written together.
#[derive(PartialEq, Eq, Hash)]
struct Content {
    epoch: i64,
    holder: Option<i64>,
    due_at: Option<Timestamp>,
    waiting_since: Option<Timestamp>,
    ended_at: Option<Timestamp>,
    states: Option<Vec<u8>>,
    counted: [Value; 7],
}

/// Whether chunks that were accepted as a whole, or are only marked, are looked at before that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Look {
    /// Only the rows that were met are counted.
    Behind,
    /// Every chunk is read and locked first: it is known which leases were lost.
    Before,
}

/// Records progress; those whose lease was lost come back. With [`Look::Behind`] `None` if there are any: then nothing
/// of it may be committed, and the group is to be settled again with [`Look::Before`].
pub(in crate::store) async fn settle(
    conn: &mut Conn<'_>,
    context: &Context,
    done: &[Settled<'_>],
    replica: ReplicaId,
    now: Timestamp,
    look: Look,
) -> Result<Option<Vec<ChunkKey>>, Failure> {
    let rows = cohort::settle(conn, context, done, replica, now).await?;
    let mut plain = Plain::default();
    let mut others = Vec::new();
    for settled in rows {
        match plainly(settled).filter(|_| look == Look::Behind) {
            Some(Plainly::Ended) => plain.ended.push(settled),
            Some(Plainly::Marked) => plain.marked.push(settled),
            None => others.push(settled),
        }
    }
    let mut blindly = end(conn.kind(), context, plain.ended, replica, now)?;
    blindly.extend(mark(context, plain.marked, replica)?);
    let (mut statements, met): (Vec<Statement>, Vec<u64>) = blindly.into_iter().unzip();
    // Where no other chunk is, all that was learned is written or nothing: the blocks for it are locked on the same journey.
    let known = others.is_empty().then(|| Effects::of(done));
    if let Some(effects) = known.as_ref().filter(|effects| effects.are_marks()) {
        statements.extend(acceptances::locking(conn.kind(), effects.devices()));
    }
    let mut seen = conn.all(statements).await?;
    let locked = seen.split_off(met.len());
    if seen.into_iter().map(|done| done.met).ne(met) {
        return Ok(None);
    }
    let lost = record(conn, context, &others, replica, now).await?;
    let effects = known.unwrap_or_else(|| Effects::of(done.iter().filter(|settled| !lost.contains(&settled.key))));
    effects.apply(conn, &locked, now).await?;
    Ok(Some(lost))
}

/// What is written without a look at what was there.
#[derive(Default)]
struct Plain<'s> {
    ended: Vec<&'s Settled<'s>>,
    marked: Vec<&'s Settled<'s>>,
}

/// How a chunk is settled of which there is nothing to note.
enum Plainly {
    /// All of it was accepted.
    Ended,
    /// All of it bears its mark, and nothing of it was tried.
    Marked,
}

/// Whether all of a chunk stands alike and there is nothing to note: what hardly any chunk does not.
fn plainly(settled: &Settled<'_>) -> Option<Plainly> {
    const MARKED: State = State { marked: true, ..State::PENDING };
    let Chunk { targets, states } = settled.chunk;
    if targets.len() != states.len() || !settled.unique_ids.is_empty() {
        return None;
    }
    if states.iter().all(|state| state.status == DeliveryStatus::Accepted && state.cause.is_none()) {
        return Some(Plainly::Ended);
    }
    let marked = settled.disposition == Disposition::Keep && states.iter().all(|state| *state == MARKED);
    marked.then_some(Plainly::Marked)
}

/// The most chunks that one statement ends: on a server each looks for its states in a list of so many.
const ENDED_A_STATEMENT: usize = 128;

/// What ends chunks that were accepted as a whole, each with states of its own, without looking at them first: statements,
/// and how many rows each is to meet. If not, not all of them were this replica's in their epoch: then the transaction is to
/// be rolled back.
///
/// A statement for those of one notification that have their epoch in common, and for those that have their number and
/// their epoch in common: of notifications for a few there are hundreds.
fn end(
    kind: Kind,
    context: &Context,
    mut ended: Vec<&Settled<'_>>,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<(Statement, u64)>, StoreError> {
    let mut statements = Vec::new();
    ended.sort_unstable_by_key(|settled| (settled.key.notification, settled.epoch, settled.key.number));
    let mut single = Vec::with_capacity(ended.len());
    for alike in ended.chunk_by(|one, next| (one.key.notification, one.epoch) == (next.key.notification, next.epoch)) {
        if let [one] = alike {
            single.push(*one);
            continue;
        }
        for piece in alike.chunks(ENDED_A_STATEMENT) {
            statements.extend(end_alike(kind, context, piece, Alike::Notification, replica, now)?);
        }
    }
    single.sort_unstable_by_key(|settled| (settled.key.number, settled.epoch, settled.key));
    let alike = single.chunk_by(|one, next| (one.key.number, one.epoch) == (next.key.number, next.epoch));
    for piece in alike.flat_map(|alike| alike.chunks(ENDED_A_STATEMENT)) {
        statements.extend(end_alike(kind, context, piece, Alike::Number, replica, now)?);
    }
    Ok(statements)
}

/// What some chunks have in common beside their epoch.
#[derive(Clone, Copy)]
enum Alike {
    Notification,
    Number,
}

/// One statement of [`end`], and how many rows it is to meet; none for no chunk.
fn end_alike(
    kind: Kind,
    context: &Context,
    piece: &[&Settled<'_>],
    alike: Alike,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Option<(Statement, u64)>, StoreError> {
    let Some(first) = piece.first() else { return Ok(None) };
    let id = |settled: &&Settled<'_>| id_value(settled.key.notification.as_uuid());
    let (mut own, common): (Vec<Value>, Value) = match alike {
        Alike::Notification => (piece.iter().map(|settled| settled.key.number.into()).collect(), id(first)),
        Alike::Number => (piece.iter().map(id).collect(), first.key.number.into()),
    };
    let (own_column, common_column) = match alike {
        Alike::Notification => ("number", " AND notification_id = "),
        Alike::Number => ("notification_id", " AND number = "),
    };
    let mut states = piece
        .iter()
        .map(|settled| Ok(chunk::states(settled.chunk, &context.reasons)?.into()))
        .collect::<Result<Vec<Value>, StoreError>>()?;
    // The last one several times, so that lists of all lengths make a few statements, which stay prepared.
    if let (Some(last), Some(last_states)) = (own.last().cloned(), states.last().cloned()) {
        own.resize(piece.len().next_power_of_two(), last);
        states.resize(own.len(), last_states);
    }
    let mut statement = Statement::new("-- queue.end\nUPDATE chunks SET ended_at = ");
    statement.bind(now).push(", accepted = targeted, waiting_since = NULL, holder = NULL, states = ");
    // Differs: how each row gets a value of its own.
    match kind {
        Kind::Sqlite => {
            statement
                .push("ended.column2 FROM (VALUES ")
                .rows(own.into_iter().zip(states).map(|(own, states)| [own, states]), "");
            statement.push(") AS ended WHERE ").push(own_column).push(" = ended.column1");
        }
        // An insert that becomes an update is what is mostly used for this; it costs the server more by a sixth. The
        // column itself stands first in the list, so that what comes of it is bytes to every server.
        Kind::Mysql => {
            statement.push("ELT(1 + FIELD(").push(own_column).push(", ").values(own.clone());
            statement.push("), states, ").values(states);
            statement.push(") WHERE ").push(own_column).push(" IN ").list(own);
        }
    }
    statement.push(common_column).bind(common).push(" AND epoch = ").bind(first.epoch);
    statement.push(BY_KEY_HOLDER).bind(replica.0);
    Ok(Some((statement, piece.len() as u64)))
}

/// What marks chunks before they are sent, without looking at them first: as [`end`].
fn mark(
    context: &Context,
    mut marked: Vec<&Settled<'_>>,
    replica: ReplicaId,
) -> Result<Vec<(Statement, u64)>, StoreError> {
    let mut statements = Vec::new();
    let alike = |settled: &&Settled<'_>| (settled.key.notification, settled.epoch, settled.chunk.states.len());
    marked.sort_unstable_by_key(|settled| (alike(settled), settled.key.number));
    for piece in marked.chunk_by(|one, next| alike(one) == alike(next)).flat_map(|alike| alike.chunks(LIST)) {
        let Some(first) = piece.first() else { continue };
        let mut statement = Statement::new("-- queue.mark\nUPDATE chunks SET waiting_since = NULL, states = ");
        statement.bind(chunk::states(first.chunk, &context.reasons)?).push(" WHERE notification_id = ");
        statement.bind(id_value(first.key.notification.as_uuid())).push(" AND number IN ");
        statement.list(piece.iter().map(|settled| settled.key.number)).push(" AND epoch = ").bind(first.epoch);
        statement.push(BY_KEY_HOLDER).bind(replica.0);
        statements.push((statement, piece.len() as u64));
    }
    Ok(statements)
}

/// Records progress of chunks that are looked at first; the keys of those whose lease was lost.
async fn record(
    conn: &mut Conn<'_>,
    context: &Context,
    done: &[&Settled<'_>],
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Vec<ChunkKey>, Failure> {
    if done.is_empty() {
        return Ok(Vec::new());
    }
    let before = lock(conn, done, replica).await?;
    let mut lost = Vec::new();
    let mut held = Vec::with_capacity(done.len());
    for settled in done.iter().copied() {
        match before.get(&settled.key) {
            Some(before) if before.epoch == settled.epoch => held.push((settled, before)),
            _ => lost.push(settled.key),
        }
    }
    let open = open_breakers(conn, &held).await?;
    write(conn, context, &held, &open, replica, now).await?;
    notes(conn, context, &held).await?;
    Ok(lost)
}

/// The breakers for which chunks are parked, of those that are still open, locked until the transaction ends: whoever
/// closes one deletes its row before it frees its chunks.
async fn open_breakers(conn: &mut Conn<'_>, held: &[(&Settled<'_>, &Before)]) -> Result<BTreeSet<i64>, Failure> {
    let wanted: BTreeSet<i64> = held
        .iter()
        .filter_map(|(settled, _)| match settled.disposition {
            Disposition::Park { breaker, .. } => Some(breaker.0),
            Disposition::Keep | Disposition::Free { .. } => None,
        })
        .collect();
    if wanted.is_empty() {
        return Ok(wanted);
    }
    let mut statement = Statement::new("-- queue.settle_breakers\nSELECT id FROM breakers WHERE id IN ");
    statement.list(wanted).push(super::for_share(conn.kind()));
    Ok(conn.fetch(statement).await?.iter().map(|row| row.int(0)).collect::<Result<_, _>>()?)
}

/// A chunk as it stood.
struct Before {
    epoch: i64,
    targets: Option<Vec<u8>>,
    states: Option<Vec<u8>>,
    ended_otherwise: i64,
}

/// Locks the chunks that this replica still holds.
async fn lock(
    conn: &mut Conn<'_>,
    done: &[&Settled<'_>],
    replica: ReplicaId,
) -> Result<HashMap<ChunkKey, Before>, Failure> {
    let mut keys: Vec<ChunkKey> = done.iter().map(|settled| settled.key).collect();
    keys.sort_unstable();
    let mut before = HashMap::with_capacity(keys.len());
    for piece in keys.chunks(LIST) {
        let mut statement = Statement::new(
            "-- queue.settle_lock\nSELECT notification_id, number, epoch, targets, states, \
             failed + unregistered + expired + cancelled + suppressed + unanswered FROM chunks WHERE ",
        );
        statement.keys(conn.kind(), piece).push(BY_KEY_HOLDER).bind(replica.0).push(super::for_update(conn.kind()));
        for row in &conn.fetch(statement).await? {
            let found = Before {
                epoch: row.int(2)?,
                targets: row.bytes_or_null(3)?.map(<[u8]>::to_vec),
                states: row.bytes_or_null(4)?.map(<[u8]>::to_vec),
                ended_otherwise: row.int(5)?,
            };
            before.insert(chunk::key_from(row, 0)?, found);
        }
    }
    Ok(before)
}

async fn write(
    conn: &mut Conn<'_>,
    context: &Context,
    held: &[(&Settled<'_>, &Before)],
    open_breakers: &BTreeSet<i64>,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<(), Failure> {
    let mut alike: HashMap<Content, Vec<ChunkKey>> = HashMap::with_capacity(held.len());
    for (settled, before) in held {
        if before.targets.as_deref() != Some(&crate::domain::delivery::encode_targets(&settled.chunk.targets))
            || settled.chunk.targets.len() != settled.chunk.states.len()
        {
            let key = settled.key;
            let what = format!("a settle of {}/{} does not name its targets", key.notification, key.number);
            return Err(StoreError::Statement(what.into()).into());
        }
        alike.entry(content(settled, context, open_breakers, replica, now)?).or_default().push(settled.key);
    }
    let mut alike: Vec<(Content, Vec<ChunkKey>)> = alike.into_iter().collect();
    alike.sort_unstable_by_key(|(_, keys)| keys.first().copied());
    for (content, keys) in &alike {
        for piece in keys.chunks(LIST) {
            let mut statement = Statement::new("-- queue.settle\nUPDATE chunks SET holder = ");
            statement.bind(content.holder).push(", waiting_since = ").bind(content.waiting_since);
            statement.push(", ended_at = ").bind(content.ended_at).push(", states = ").bind(content.states.clone());
            if let Some(due_at) = content.due_at {
                statement.push(", due_at = ").bind(due_at);
            }
            for (column, count) in chunk::COUNTED.into_iter().zip(&content.counted) {
                statement.push(column).bind(count.clone());
            }
            statement.push(" WHERE ").keys(conn.kind(), piece);
            statement.push(BY_KEY_HOLDER).bind(replica.0).push(" AND epoch = ").bind(content.epoch);
            if conn.execute(statement).await? != piece.len() as u64 {
                return Err(StoreError::Statement("a chunk that was locked went away".into()).into());
            }
        }
    }
    Ok(())
}

fn content(
    settled: &Settled<'_>,
    context: &Context,
    open_breakers: &BTreeSet<i64>,
    replica: ReplicaId,
    now: Timestamp,
) -> Result<Content, StoreError> {
    let ended = settled.chunk.is_done();
    let (holder, due_at, waiting_since) = match settled.disposition {
        _ if ended => (None, None, None),
        Disposition::Keep => (Some(replica.0), None, None),
        Disposition::Free { due_at } => (Some(FREE), Some(due_at), Some(now)),
        // Closed meanwhile: nobody would free it.
        Disposition::Park { breaker, .. } if !open_breakers.contains(&breaker.0) => (Some(FREE), Some(now), None),
        // Claimed all the same once its time is over, by this column.
        Disposition::Park { breaker, until } => (Some(parked_holder(breaker)), Some(until), Some(now)),
    };
    Ok(Content {
        epoch: settled.epoch,
        holder,
        due_at,
        waiting_since,
        ended_at: ended.then_some(now),
        states: chunk::states(settled.chunk, &context.reasons)?,
        counted: chunk::counted(&settled.chunk.counts()),
    })
}

/// Rows for exceptions: outcomes other than accepted that are new, and Apple's ids.
async fn notes(conn: &mut Conn<'_>, context: &Context, held: &[(&Settled<'_>, &Before)]) -> Result<(), Failure> {
    let mut notes = Vec::new();
    for (settled, before) in held {
        let otherwise = |status| !matches!(status, DeliveryStatus::Pending | DeliveryStatus::Accepted);
        let states = &settled.chunk.states;
        let now_otherwise = states.iter().filter(|state| otherwise(state.status)).count();
        let mut ended = Vec::new();
        if i64::try_from(now_otherwise).ok() != Some(before.ended_otherwise) {
            let targets = before.targets.as_deref().unwrap_or_default();
            let old = chunk::read(conn, &context.reasons, settled.key, targets, before.states.as_deref()).await?;
            ended = (0..)
                .zip(states.iter().zip(&old.states))
                .filter(|(_, (state, old))| otherwise(state.status) && old.status != state.status)
                .map(|(at, _)| at)
                .collect();
        }
        if !ended.is_empty() || !settled.unique_ids.is_empty() {
            notes.push(Notes { key: settled.key, chunk: settled.chunk, ended, unique_ids: settled.unique_ids });
        }
    }
    chunk::note(conn, context, &notes).await
}

/// What was learned of devices.
#[derive(Default)]
struct Effects<'s> {
    /// Accepted, and to be marked in a block.
    to_mark: Vec<Acceptance<'s>>,
    /// Accepted, and to be written into the row.
    accepted: BTreeMap<Environment, Vec<(DeviceSeq, &'s DeviceToken)>>,
    others: Vec<(DeviceSeq, &'s DeviceToken, &'s DeviceEffect)>,
}

impl<'s> Effects<'s> {
    fn of(settled: impl IntoIterator<Item = &'s Settled<'s>>) -> Self {
        let mut all = Self::default();
        for (seq, token, effect) in settled.into_iter().flat_map(|one| one.effects) {
            match effect {
                DeviceEffect::Accepted(environment, Some(version)) => {
                    let (device, environment, version) = (*seq, *environment, *version);
                    all.to_mark.push(Acceptance { device, token, environment, version });
                }
                DeviceEffect::Accepted(environment, None) => {
                    all.accepted.entry(*environment).or_default().push((*seq, token));
                }
                DeviceEffect::Dead { .. } | DeviceEffect::Bad { .. } | DeviceEffect::Suspend { .. } => {
                    all.others.push((*seq, token, effect));
                }
            }
        }
        all
    }

    /// Whether nothing but marks is to be made.
    fn are_marks(&self) -> bool {
        self.accepted.is_empty() && self.others.is_empty()
    }

    /// Those that are to be marked.
    fn devices(&self) -> impl Iterator<Item = DeviceSeq> {
        self.to_mark.iter().map(|one| one.device)
    }

    /// Writes it all. `locked`: the blocks of those that are to be marked, if they are locked already.
    async fn apply(mut self, conn: &mut Conn<'_>, locked: &[Done], now: Timestamp) -> Result<(), Failure> {
        // What is marked below has been accepted, too.
        if self.others.iter().any(|(.., effect)| matches!(effect, DeviceEffect::Bad { .. })) {
            let marked: HashSet<(DeviceSeq, &DeviceToken)> =
                self.to_mark.iter().map(|one| (one.device, one.token)).collect();
            self.others.retain(|(seq, token, effect)| {
                !matches!(effect, DeviceEffect::Bad { .. }) || !marked.contains(&(*seq, *token))
            });
        }
        write_accepted(conn, std::mem::take(&mut self.accepted), now).await?;
        self.others.sort_by_key(|(seq, ..)| *seq);
        let mut seen = HashSet::new();
        for (seq, token, effect) in &self.others {
            if !seen.insert((seq, effect)) {
                continue;
            }
            if let Some(statement) = effect_on_one(*seq, token, effect) {
                conn.execute(statement).await?;
            }
        }
        // Behind the devices' rows, as a registration does it.
        let locked = match locked {
            [] => acceptances::lock(conn, self.devices()).await?,
            locked => Locked::from_done(locked)?,
        };
        let mut passed: BTreeMap<Environment, Vec<(DeviceSeq, &DeviceToken)>> = BTreeMap::new();
        for Acceptance { device, token, environment, .. } in acceptances::note(conn, &self.to_mark, locked, now).await?
        {
            passed.entry(environment).or_default().push((device, token));
        }
        write_accepted(conn, passed, now).await
    }
}

/// Writes into the devices' rows that their tokens were accepted.
async fn write_accepted(
    conn: &mut Conn<'_>,
    accepted: BTreeMap<Environment, Vec<(DeviceSeq, &DeviceToken)>>,
    now: Timestamp,
) -> Result<(), Failure> {
    for (environment, mut devices) in accepted {
        devices.sort_unstable();
        devices.dedup();
        let runs = devices.chunk_by(|(one, _), (next, _)| next.0 - one.0 <= APART);
        let (runs, scattered): (Vec<&[_]>, Vec<&[_]>) = runs.partition(|run| run.len() >= A_RUN);
        let scattered = scattered.concat();
        for piece in runs.into_iter().flat_map(|run| run.chunks(LIST)).chain(scattered.chunks(LIST)) {
            learn_accepted(conn, environment, piece, now).await?;
        }
    }
    Ok(())
}

/// Devices whose numbers are no further apart than this, and that are at least so many, have a statement of their own: a
/// server walks through them in one go, which takes it a third less than to look up each.
const APART: i64 = 8;
const A_RUN: usize = 32;

/// Notes that the tokens of these devices, in the order of their numbers, were accepted.
async fn learn_accepted(
    conn: &mut Conn<'_>,
    environment: Environment,
    devices: &[(DeviceSeq, &DeviceToken)],
    now: Timestamp,
) -> Result<(), Failure> {
    let numbers: Vec<DeviceSeq> = devices.iter().map(|(seq, _)| *seq).collect();
    let mut statement = Statement::new("-- queue.settle_accepted\nUPDATE devices SET last_accepted_at = ");
    statement.bind(now).push(", environment = ").bind(environment.as_str()).push(" WHERE ");
    if numbered(&mut statement, &numbers) {
        statement.push(" AND seq + 0 IN ").list(numbers.iter().map(|seq| seq.0));
    }
    // A token stands in one row of a topic: where both lists meet, the row still bears the token that was tried.
    statement.push(" AND token IN ").list(devices.iter().map(|(_, token)| token.to_bytes()));
    statement.push(" AND (last_accepted_at < ").bind(now.minus(ACCEPTED_WITHIN));
    statement.push(" OR environment IS NULL OR environment <> ").bind(environment.as_str()).push(")");
    conn.execute(statement).await?;
    Ok(())
}

fn effect_on_one(seq: DeviceSeq, token: &DeviceToken, effect: &DeviceEffect) -> Option<Statement> {
    let mut statement = Statement::new("-- queue.settle_device\nUPDATE devices SET status = ");
    let (status, reason, registered_until, never_accepted) = match effect {
        DeviceEffect::Accepted(..) => return None,
        DeviceEffect::Dead { reason, since } => {
            let reason = reasons::kept(&Cause { apns_status: None, reason: reason.clone() }).reason.into_owned();
            ("inactive", reason, since.minus(CLOCK_SKEW), false)
        }
        DeviceEffect::Bad { sent_at } => ("inactive", "BadDeviceToken".to_owned(), *sent_at, true),
        DeviceEffect::Suspend { sent_at } => ("suspended", "BadDeviceToken".to_owned(), *sent_at, false),
    };
    statement.bind(status).push(", status_reason = ").bind(reason);
    statement.push(" WHERE seq = ").bind(seq.0).push(" AND token = ").bind(token.to_bytes());
    statement.push(" AND status = 'active' AND last_registered_at <= ").bind(registered_until);
    if never_accepted {
        statement.push(" AND last_accepted_at <= 0 AND ");
        acceptances::unless_marked(&mut statement, seq);
    }
    Some(statement)
}
