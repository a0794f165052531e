//! Cancelling: durable before it is answered, and exact.
//!
//! Promises: what no replica holds ends at once, or with the next claims where it is much; what a replica holds is ended
//! by that replica, which hears of it from `cancellations` within a second. Whoever puts a chunk back or parks it without
//! having heard does not keep it from ending.

use std::collections::BTreeSet;

use super::{Context, FREE, claim, cohort};
use crate::domain::{
    clock::Timestamp,
    notification::{NotificationId, NotificationView},
};
use crate::store::{
    Kind, ReplicaId,
    audience::LIST,
    notifications,
    sql::Failure,
    statement::{Conn, Statement, Value, corrupt, id_value},
};

/// The most chunks that end with the cancelling itself; the others are claimed to be ended.
const ENDED_AT_ONCE: i64 = 8;

/// Cancels, and tells how it stands.
pub(in crate::store) async fn cancel(
    conn: &mut Conn<'_>,
    context: &Context,
    id: NotificationId,
    now: Timestamp,
) -> Result<Option<NotificationView>, Failure> {
    match notifications::one(conn, id, now).await? {
        Some(view) if view.done_at.is_none() => {}
        ended => return Ok(ended),
    }
    cohort::leave(conn, context, std::iter::once(id), now).await?;
    // Chunks before the notification, as a claim locks them. What is held or parked would not be claimed by itself.
    let bytes = id_value(id.as_uuid());
    let mut statement = Statement::new("-- queue.cancel\nUPDATE chunks SET waiting_since = NULL, holder = ");
    statement.bind(FREE).push(", due_at = ").bind(now);
    statement.push(" WHERE notification_id = ").bind(bytes.clone()).push(" AND holder <= 0");
    conn.execute(statement).await?;
    let mut statement = Statement::new("-- queue.cancelled_at\nUPDATE notifications SET cancelled_at = ");
    statement.bind(now).push(" WHERE cancelled_at IS NULL AND id = ").bind(bytes.clone());
    conn.execute(statement).await?;
    // Differs: how a row that is there is left alone.
    let tail = match conn.kind() {
        Kind::Sqlite => " ON CONFLICT DO NOTHING",
        Kind::Mysql => " ON DUPLICATE KEY UPDATE notification_id = notification_id",
    };
    let head = "-- queue.cancellation\nINSERT INTO cancellations (notification_id)";
    conn.insert(head, vec![vec![bytes.clone()]], tail).await?;

    let mut statement = Statement::new(
        "-- queue.cancel_some\nSELECT notification_id, number, epoch, targets, states FROM chunks \
         WHERE notification_id = ",
    );
    statement.bind(bytes).push(" AND holder = ").bind(FREE).push(" ORDER BY number LIMIT ").bind(ENDED_AT_ONCE);
    // Differs: SQLite's one writer needs no locks. What was put back just now may be taken by another: passed over.
    if conn.kind() == Kind::Mysql {
        statement.push(" FOR UPDATE SKIP LOCKED");
    }
    let chosen = claim::chosen_from(&conn.fetch(statement).await?)?;
    // Cancelled, so that nothing of it is leased: nobody's name is needed.
    claim::take(conn, context, chosen, 0, ReplicaId(FREE), now).await?;
    notifications::one(conn, id, now).await
}

/// Cancelled notifications.
#[derive(Default)]
pub(in crate::store) struct Watched {
    open: Vec<NotificationId>,
    /// Of these, chunks wait that nobody would claim now.
    waiting: Vec<NotificationId>,
    /// Nothing of these is open any more.
    ended: Vec<NotificationId>,
}

impl Watched {
    /// Whether something is to be written.
    pub(in crate::store) fn needs_care(&self) -> bool {
        !self.waiting.is_empty() || !self.ended.is_empty()
    }

    pub(in crate::store) fn open(self) -> BTreeSet<NotificationId> {
        self.open.into_iter().collect()
    }
}

/// Looks at what was cancelled.
pub(in crate::store) async fn watched(conn: &mut Conn<'_>, now: Timestamp) -> Result<Watched, Failure> {
    // What the operator holds stays so: it cannot be read, or is to be released with the rest.
    let mut statement = Statement::new(
        "-- queue.cancelled\nSELECT x.notification_id, CAST(COUNT(c.holder) AS SIGNED), \
         CAST(SUM(CASE WHEN c.holder < -1000 OR (c.holder = 0 AND c.due_at > ",
    );
    statement.bind(now).push(") THEN 1 ELSE 0 END) AS SIGNED) FROM cancellations x ");
    statement.push("LEFT JOIN chunks c ON c.notification_id = x.notification_id GROUP BY x.notification_id");
    let mut watched = Watched::default();
    for row in &conn.fetch(statement).await? {
        let bytes = row.bytes(0)?;
        let id = uuid::Uuid::from_slice(bytes)
            .map(NotificationId::from_uuid)
            .map_err(|error| corrupt("cancellations", "notification_id", hex::encode(bytes), error))?;
        if row.int(1)? == 0 {
            watched.ended.push(id);
            continue;
        }
        if row.int(2)? > 0 {
            watched.waiting.push(id);
        }
        watched.open.push(id);
    }
    Ok(watched)
}

/// Sets free what waits, and forgets what has ended.
pub(in crate::store) async fn care(conn: &mut Conn<'_>, watched: &Watched, now: Timestamp) -> Result<(), Failure> {
    let bytes = |ids: &[NotificationId]| ids.iter().map(|id| id_value(id.as_uuid())).collect::<Vec<Value>>();
    for piece in watched.waiting.chunks(LIST) {
        let mut statement =
            Statement::new("-- queue.free_cancelled\nUPDATE chunks SET waiting_since = NULL, holder = ");
        statement.bind(FREE).push(", due_at = ").bind(now).push(" WHERE notification_id IN ").list(bytes(piece));
        statement.push(" AND (holder < -1000 OR (holder = 0 AND due_at > ").bind(now).push("))");
        conn.execute(statement).await?;
    }
    for piece in watched.ended.chunks(LIST) {
        let mut statement =
            Statement::new("-- queue.forget_cancelled\nDELETE FROM cancellations WHERE notification_id IN ");
        statement.list(bytes(piece));
        conn.execute(statement).await?;
    }
    Ok(())
}
