//! The durable queue: what is accepted, who sends it, what became of it. One text for both databases.
//!
//! Promises: each function here runs in one transaction that its caller begins and commits, and may run again from
//! its start when the database asks for that. A chunk is changed only by whoever holds it in the epoch in which it
//! was leased; device rows are touched only after that was checked, in the same transaction.

pub(super) mod accept;
pub(super) mod cancel;
pub(super) mod chunk;
pub(super) mod claim;
pub(super) mod cohort;
mod resolve;
pub(super) mod settle;
mod verbs;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Kind, QueueDepth, ReplicaId, StoreError,
    audience::{LIST, parsed},
    reasons::Reasons,
    sql::Failure,
    statement::{Conn, Statement, corrupt, id_value},
};
use crate::domain::{
    clock::{Clock, Timestamp},
    delivery::{ChunkKey, DeliveryStatus, Target},
    device::DeviceSeq,
    notification::{Lane, NotificationId},
    push::CollapseId,
    topic::Topic,
};

/// Nobody's: whoever is free takes it.
pub(super) const FREE: i64 = 0;
/// Held by the operator.
pub(super) const HELD: i64 = -1;

/// Compares the holder of chunks that are named by their keys. As an expression, so that no optimizer looks them up by
/// holder instead: MariaDB did, locked rows of others on the way, and every second settle met a deadlock.
pub(super) const BY_KEY_HOLDER: &str = " AND holder + 0 = ";

/// The breaker that a holder stands for.
pub(super) const fn breaker_of(holder: i64) -> Option<i64> {
    if holder < -1000 { Some(-holder - 1000) } else { None }
}

/// What the verbs need beside a connection.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) reasons: Arc<Reasons>,
    pub(super) noted: Arc<chunk::Noted>,
}

/// Whether this replica may take work in its name: its row is there, and stays until the transaction ends.
///
/// Whoever buries a replica deletes the row before it gives the work back; so either the burial waits for us and sees
/// what we took, or we see that the row is gone. The last statement before COMMIT: until the transaction ends no heartbeat
/// gets the row, and one that takes long would be taken for a death.
async fn lives(conn: &mut Conn<'_>, replica: ReplicaId) -> Result<bool, Failure> {
    let mut statement = Statement::new("-- queue.replica_lives\nSELECT id FROM replicas WHERE id = ");
    statement.bind(replica.0).push(for_share(conn.kind()));
    Ok(!conn.fetch(statement).await?.is_empty())
}

/// Differs: SQLite's one writer has locked everything already. MariaDB knows only this spelling, MySQL both.
pub(super) const fn for_share(kind: Kind) -> &'static str {
    match kind {
        Kind::Sqlite => "",
        Kind::Mysql => " LOCK IN SHARE MODE",
    }
}

/// Differs: SQLite's one writer has locked everything already.
pub(super) const fn for_update(kind: Kind) -> &'static str {
    match kind {
        Kind::Sqlite => "",
        Kind::Mysql => " FOR UPDATE",
    }
}

/// Which of these are committed. On MySQL a locking read waits for a commit that is under way.
pub(super) async fn committed(
    conn: &mut Conn<'_>,
    ids: &[NotificationId],
) -> Result<BTreeSet<NotificationId>, Failure> {
    let mut there = BTreeSet::new();
    for piece in ids.chunks(LIST) {
        let mut statement = Statement::new("-- queue.committed\nSELECT id FROM notifications WHERE id IN ");
        statement.list(piece.iter().map(|id| id_value(id.as_uuid())));
        statement.push(for_share(conn.kind()));
        for row in &conn.fetch(statement).await? {
            there.insert(notification_id(row.bytes(0)?)?);
        }
    }
    Ok(there)
}

/// Gives back what this transaction has taken in the replica's name if it lives no longer. True if all of it is kept.
pub(super) async fn keeps(
    conn: &mut Conn<'_>,
    context: &Context,
    taken: &[ChunkKey],
    replica: ReplicaId,
) -> Result<bool, Failure> {
    if taken.is_empty() || lives(conn, replica).await? {
        return Ok(true);
    }
    disown(conn, context, taken, replica).await?;
    Ok(false)
}

/// The chunks of a replica.
pub(super) async fn owned(conn: &mut Conn<'_>, replica: ReplicaId) -> Result<Vec<ChunkKey>, Failure> {
    let mut statement = Statement::new("-- queue.owned\nSELECT notification_id, number FROM chunks WHERE holder = ");
    statement.bind(replica.0);
    let rows = conn.fetch(statement).await?;
    let mut owned = cohort::owned(conn, replica).await?;
    for row in &rows {
        owned.push(chunk::key_from(row, 0)?);
    }
    Ok(owned)
}

/// Gives chunks back.
pub(super) async fn disown(
    conn: &mut Conn<'_>,
    context: &Context,
    keys: &[ChunkKey],
    replica: ReplicaId,
) -> Result<(), Failure> {
    cohort::leave(conn, context, keys.iter().map(|key| key.notification), context.clock.now()).await?;
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    for piece in keys.chunks(LIST) {
        let mut statement = Statement::new("-- queue.disown\nUPDATE chunks SET holder = 0 WHERE ");
        statement.keys(conn.kind(), piece).push(BY_KEY_HOLDER).bind(replica.0);
        conn.execute(statement).await?;
    }
    Ok(())
}

/// How many notifications, or chunks of them, are looked through at a time for something newer.
const NEWER_AT_A_TIME: i64 = 50;

/// SQL, a condition on notification `n`: it bears this collapse id, and was due no sooner. What was made after and was due
/// before is the older one on the phone.
fn newer(statement: &mut Statement, topic: &Topic, collapse_id: &CollapseId, than: NotificationId) {
    statement.push("n.due_at >= (SELECT own.due_at FROM notifications own WHERE own.id = ");
    statement.bind(id_value(than.as_uuid())).push(") AND n.collapse_id = ").bind(collapse_id.as_str().as_bytes());
    statement.push(" AND n.topic = ").bind(topic.as_str());
}

/// Whether something newer with this collapse id has gone, or is going, to the device.
pub(super) async fn superseded(
    conn: &mut Conn<'_>,
    context: &Context,
    device: DeviceSeq,
    topic: &Topic,
    collapse_id: &CollapseId,
    than: NotificationId,
) -> Result<bool, Failure> {
    let mut after = ChunkKey { notification: than, number: u32::MAX };
    loop {
        // Held work is not going, and an audience that is not resolved has not been due.
        let mut statement = Statement::new(
            "-- queue.superseded\nSELECT c.notification_id, c.number, c.targets, c.states \
             FROM notifications n JOIN chunks c ON c.notification_id = n.id WHERE ",
        );
        newer(&mut statement, topic, collapse_id, than);
        statement.push(" AND n.id >= ").bind(id_value(after.notification.as_uuid()));
        statement.push(" AND (c.notification_id > ").bind(id_value(after.notification.as_uuid()));
        statement.push(" OR c.number > ").bind(after.number);
        statement.push(") AND c.targets IS NOT NULL AND (c.holder IS NULL OR c.holder <> -1) ");
        statement.push("ORDER BY c.notification_id, c.number LIMIT ").bind(NEWER_AT_A_TIME);
        let rows = conn.fetch(statement).await?;
        for row in &rows {
            let key = chunk::key_from(row, 0)?;
            after = key;
            let chunk = chunk::read(conn, &context.reasons, key, row.bytes(2)?, row.bytes_or_null(3)?).await?;
            let gone = chunk.targets.iter().zip(&chunk.states).any(|(target, state)| {
                let this = matches!(target, Target::Device { seq, .. } if *seq == device);
                this && match state.status {
                    DeliveryStatus::Pending | DeliveryStatus::Accepted | DeliveryStatus::Unknown => true,
                    DeliveryStatus::Failed
                    | DeliveryStatus::Unregistered
                    | DeliveryStatus::Expired
                    | DeliveryStatus::Cancelled
                    | DeliveryStatus::Suppressed => false,
                }
            });
            if gone {
                return Ok(true);
            }
        }
        if i64::try_from(rows.len()).unwrap_or(i64::MAX) < NEWER_AT_A_TIME {
            return cohort::superseded(conn, device, topic, collapse_id, than).await;
        }
    }
}

/// When the next chunk that nobody owns is due.
pub(super) async fn next_due_at(conn: &mut Conn<'_>) -> Result<Option<Timestamp>, Failure> {
    let rows = conn
        .fetch(Statement::new(
            "-- queue.next_due_at\nSELECT (SELECT MIN(due_at) FROM chunks WHERE holder = 0 AND lane = 0), \
             (SELECT MIN(due_at) FROM chunks WHERE holder = 0 AND lane = 1)",
        ))
        .await?;
    let mut next = None;
    for row in &rows {
        for column in 0..Lane::ALL.len() {
            next = [next, row.int_or_null(column)?].into_iter().flatten().min();
        }
    }
    Ok(next.map(Timestamp::from_millis))
}

/// How much waits, by app and lane.
pub(super) async fn depth(conn: &mut Conn<'_>, now: Timestamp) -> Result<Vec<QueueDepth>, Failure> {
    let mut statement =
        Statement::new("-- queue.depth\nSELECT n.topic, c.lane, CAST(SUM(c.holder >= 0 AND c.due_at <= ");
    statement.bind(now).push(") AS SIGNED), MIN(CASE WHEN c.holder >= 0 AND c.due_at <= ").bind(now);
    statement.push(" THEN c.due_at END), CAST(SUM(c.holder >= 0 AND c.due_at > ").bind(now);
    statement.push(
        ") AS SIGNED), CAST(SUM(c.holder < 0) AS SIGNED) \
         FROM chunks c JOIN notifications n ON n.id = c.notification_id WHERE c.holder IS NOT NULL \
         GROUP BY n.topic, c.lane UNION ALL SELECT topic, lane, CAST(SUM(open) AS SIGNED), MIN(due_at), 0, 0 \
         FROM cohorts WHERE holder IS NOT NULL GROUP BY topic, lane",
    );
    let mut depth: BTreeMap<(Topic, i64), QueueDepth> = BTreeMap::new();
    for row in &conn.fetch(statement).await? {
        let many = |column| row.int(column).map(|many| u64::try_from(many).unwrap_or(0));
        let topic: Topic = parsed(row.bytes(0)?).map_err(|e| corrupt("notifications", "topic", "of a chunk", e))?;
        let number = row.int(1)?;
        let lane = lane_from(number).ok_or_else(|| corrupt("chunks", "lane", number, "no such lane"))?;
        let nothing = QueueDepth { topic: topic.clone(), lane, due: 0, oldest_due_at: None, scheduled: 0, waiting: 0 };
        let sum = depth.entry((topic, number)).or_insert(nothing);
        sum.due += many(2)?;
        sum.oldest_due_at = sum.oldest_due_at.into_iter().chain(row.int_or_null(3)?.map(Timestamp::from_millis)).min();
        sum.scheduled += many(4)?;
        sum.waiting += many(5)?;
    }
    Ok(depth.into_values().collect())
}

/// Holds whatever is open. What was parked bears the end of its time as `due_at`: released, it is due at once.
pub(super) async fn hold(conn: &mut Conn<'_>, context: &Context, now: Timestamp) -> Result<u64, Failure> {
    cohort::disband(conn, context, None, now).await?;
    let mut statement = Statement::new("-- queue.hold\nUPDATE chunks SET due_at = CASE WHEN holder < -1000 THEN ");
    statement.bind(now).push(" ELSE due_at END, holder = -1, waiting_since = ").bind(now);
    statement.push(" WHERE holder <> -1");
    Ok(conn.execute(statement).await?)
}

/// Lets held work go on.
pub(super) async fn release_held(conn: &mut Conn<'_>) -> Result<u64, Failure> {
    let statement =
        Statement::new("-- queue.release_held\nUPDATE chunks SET holder = 0, waiting_since = NULL WHERE holder = -1");
    Ok(conn.execute(statement).await?)
}

pub(super) fn lane_from(number: i64) -> Option<Lane> {
    Lane::ALL.into_iter().find(|lane| lane.as_number() == number)
}

pub(super) fn notification_id(bytes: &[u8]) -> Result<NotificationId, StoreError> {
    uuid::Uuid::from_slice(bytes)
        .map(NotificationId::from_uuid)
        .map_err(|error| corrupt("chunks", "notification_id", hex::encode(bytes), error))
}
