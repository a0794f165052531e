//! What was asked for, read back: notifications with their counts, and the outcome of each device.
//!
//! Promises: the counts of one answer come from one moment and add up; an outcome is read, never inferred: a target
//! whose device is neither there nor remembered is an error.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use super::{
    BoxError, DeliveryView, NotificationFilter, Notifications, Page, PageRequest, StoreError,
    audience::{LIST, parsed, parsed_or_null},
    queue::{
        self, Context, breaker_of,
        cohort::{self, Standing},
    },
    sql::{Failure, on_both, read},
    statement::{Conn, Row, Statement, corrupt, id_value},
};
use crate::domain::{
    clock::Timestamp,
    delivery::{Chunk, ChunkKey, DeliveryStatus, Target},
    device::{DeviceId, DeviceSeq, DeviceToken},
    notification::{Counts, NotificationId, NotificationStatus, NotificationView, WaitingFor, Warning},
    push::{ApnsId, Recipient},
    topic::Topic,
};

on_both! {
    #[async_trait]
    impl Notifications for Base {
        async fn notification(&self, id: NotificationId) -> Result<Option<NotificationView>, StoreError> {
            let now = self.clock.now();
            read(|| async {
                let mut tx = self.snapshot().await?;
                one(&mut Conn::from(&mut *tx), id, now).await
            })
            .await
        }

        async fn notifications(
            &self,
            filter: &NotificationFilter,
            page: &PageRequest,
        ) -> Result<Page<NotificationView>, StoreError> {
            let now = self.clock.now();
            read(|| async {
                let mut tx = self.snapshot().await?;
                list(&mut Conn::from(&mut *tx), filter, page, now).await
            })
            .await
        }

        async fn deliveries(
            &self,
            id: NotificationId,
            status: Option<DeliveryStatus>,
            page: &PageRequest,
        ) -> Result<Option<Page<DeliveryView>>, StoreError> {
            let context = self.context();
            read(|| async {
                let mut tx = self.snapshot().await?;
                deliveries(&mut Conn::from(&mut *tx), &context, id, status, page).await
            })
            .await
        }
    }
}

const SELECT: &str = "SELECT id, topic, reference, audience_complete, unmatched, due_at, created_at, cancelled_at, \
    warnings, cohort IS NOT NULL FROM notifications n";

/// A notification as its row.
struct Asked {
    view: NotificationView,
    due_at: Timestamp,
    /// It was accepted together with others, and how it stands may be said by a seat.
    seated: bool,
}

/// What its chunks add up to.
#[derive(Default)]
struct Sum {
    counts: Counts,
    open: i64,
    tried: i64,
    ended_at: Option<Timestamp>,
    /// How many are held, and since when.
    held: i64,
    held_since: Option<i64>,
    /// The smallest holder: of a breaker, if there is one.
    least_holder: Option<i64>,
    parked_since: Option<i64>,
    /// How many are nobody's and not due again yet, after an attempt.
    backing_off: i64,
    backing_off_since: Option<i64>,
}

/// One notification as it stands in this transaction.
pub(super) async fn one(
    conn: &mut Conn<'_>,
    id: NotificationId,
    now: Timestamp,
) -> Result<Option<NotificationView>, Failure> {
    let mut statement = Statement::new("-- notifications.notification\n");
    statement.push(SELECT).push(" WHERE id = ").bind(id_value(id.as_uuid()));
    let asked = conn.fetch(statement).await?.iter().map(asked_from).collect::<Result<_, _>>()?;
    Ok(views(conn, asked, now).await?.pop())
}

async fn list(
    conn: &mut Conn<'_>,
    filter: &NotificationFilter,
    page: &PageRequest,
    now: Timestamp,
) -> Result<Page<NotificationView>, Failure> {
    let limit = page.limit.clamp(1, 1_000);
    let mut statement = Statement::new("-- notifications.notifications\n");
    statement.push(SELECT);
    if let Some(NotificationStatus::Scheduled | NotificationStatus::Queued | NotificationStatus::Sending) =
        filter.status
    {
        let spans = cohort::open_spans(conn, None).await?;
        statement.push(OPEN);
        if !spans.is_empty() {
            spans.push(statement.push(" UNION ").push(cohort::OPEN_IDS), "n.id");
        }
        statement.push(") o ON o.open_id = n.id");
    }
    if let Some(user) = &filter.user_id {
        // One who was addressed alone, and one of several.
        statement.push(" JOIN (SELECT m.id AS addressed_id FROM notifications m WHERE m.user_id = ");
        statement.bind(user.as_str().as_bytes());
        statement.push(" UNION SELECT u.notification_id FROM notification_users u WHERE u.user_id = ");
        statement.bind(user.as_str().as_bytes()).push(") a ON a.addressed_id = n.id");
    }
    statement.push(" WHERE 1 = 1");
    filtered(&mut statement, filter, now);
    if let Some(Cursor::Notification(before)) = page.cursor.as_deref().and_then(Cursor::parse) {
        statement.push(" AND n.id < ").bind(id_value(before.as_uuid()));
    }
    statement.push(" ORDER BY n.id DESC LIMIT ").bind(limit as u64 + 1);
    let rows = conn.fetch(statement).await?;
    let asked: Vec<Asked> = rows.iter().take(limit).map(asked_from).collect::<Result<_, _>>()?;
    let more = rows.len() > limit;
    let items = views(conn, asked, now).await?;
    let next_cursor = items.last().filter(|_| more).map(|last| Cursor::Notification(last.id).to_text());
    Ok(Page { items, next_cursor })
}

/// By the indexes of what is open, which is little of what there is.
const OPEN: &str = " JOIN (SELECT c.notification_id AS open_id FROM chunks c WHERE c.holder IS NOT NULL";
const ALL_ENDED: &str = " AND n.audience_complete = 1 AND NOT EXISTS \
    (SELECT 1 FROM chunks c WHERE c.notification_id = n.id AND c.holder IS NOT NULL)";
const DUE: &str = " AND (n.cancelled_at IS NOT NULL OR n.due_at <= ";
const ONE_TRIED: &str = " AND EXISTS (SELECT 1 FROM chunks c WHERE c.notification_id = n.id AND ";
const NONE_TRIED: &str = " AND NOT EXISTS (SELECT 1 FROM chunks c WHERE c.notification_id = n.id AND ";

fn filtered(statement: &mut Statement, filter: &NotificationFilter, now: Timestamp) {
    if let Some(topic) = &filter.topic {
        statement.push(" AND n.topic = ").bind(topic.as_str());
    }
    if let Some(topics) = &filter.topics {
        statement.push(" AND n.topic IN ").list(topics.iter().map(Topic::as_str));
    }
    if let Some(reference) = &filter.reference {
        statement.push(" AND n.reference = ").bind(reference.as_str().as_bytes());
    }
    if let Some(since) = filter.since {
        statement.push(" AND n.created_at >= ").bind(since);
    }
    if let Some(until) = filter.until {
        statement.push(" AND n.created_at < ").bind(until);
    }
    if let Some(outcome) = filter.outcome {
        statement.push(" AND (EXISTS (SELECT 1 FROM chunks c WHERE c.notification_id = n.id AND ");
        statement.push(some_are(outcome)).push(")").push(match outcome {
            DeliveryStatus::Pending => cohort::OR_OPEN,
            DeliveryStatus::Accepted => cohort::OR_ACCEPTED,
            DeliveryStatus::Failed
            | DeliveryStatus::Unregistered
            | DeliveryStatus::Expired
            | DeliveryStatus::Cancelled
            | DeliveryStatus::Suppressed
            | DeliveryStatus::Unknown => "",
        });
        statement.push(")");
    }
    match filter.status {
        None => {}
        Some(NotificationStatus::Done) => {
            statement.push(" AND n.cancelled_at IS NULL").push(ALL_ENDED).push(cohort::AND_NOT_OPEN);
        }
        Some(NotificationStatus::Cancelled) => {
            statement.push(" AND n.cancelled_at IS NOT NULL").push(ALL_ENDED).push(cohort::AND_NOT_OPEN);
        }
        Some(NotificationStatus::Scheduled) => {
            statement.push(" AND n.cancelled_at IS NULL AND n.due_at > ").bind(now);
        }
        Some(NotificationStatus::Queued) => {
            statement.push(DUE).bind(now).push(")").push(NONE_TRIED).push(queue::chunk::TRIED).push(")");
        }
        Some(NotificationStatus::Sending) => {
            statement.push(DUE).bind(now).push(")").push(ONE_TRIED).push(queue::chunk::TRIED).push(")");
        }
    }
}

/// Whether a chunk has a target of this status.
const fn some_are(status: DeliveryStatus) -> &'static str {
    match status {
        DeliveryStatus::Pending => {
            "c.targeted > c.accepted + c.failed + c.unregistered + c.expired + c.cancelled + c.suppressed + c.unanswered"
        }
        DeliveryStatus::Accepted => "c.accepted > 0",
        DeliveryStatus::Failed => "c.failed > 0",
        DeliveryStatus::Unregistered => "c.unregistered > 0",
        DeliveryStatus::Expired => "c.expired > 0",
        DeliveryStatus::Cancelled => "c.cancelled > 0",
        DeliveryStatus::Suppressed => "c.suppressed > 0",
        DeliveryStatus::Unknown => "c.unanswered > 0",
    }
}

fn asked_from(row: &Row) -> Result<Asked, StoreError> {
    let id = queue::notification_id(row.bytes(0)?)?;
    let bad = |column| move |error: BoxError| corrupt("notifications", column, id, error);
    let unmatched = row.int(4)?;
    Ok(Asked {
        view: NotificationView {
            id,
            status: NotificationStatus::Queued,
            topic: parsed(row.bytes(1)?).map_err(bad("topic"))?,
            reference: parsed_or_null(row.bytes_or_null(2)?).map_err(bad("reference"))?,
            counts: Counts::default(),
            unmatched: u64::try_from(unmatched).map_err(|error| bad("unmatched")(error.into()))?,
            audience_complete: row.int(3)? != 0,
            waiting_for: None,
            warnings: warnings(row.bytes_or_null(8)?).map_err(bad("warnings"))?,
            created_at: Timestamp::from_millis(row.int(6)?),
            cancelled_at: row.int_or_null(7)?.map(Timestamp::from_millis),
            done_at: None,
        },
        due_at: Timestamp::from_millis(row.int(5)?),
        seated: row.int(9)? != 0,
    })
}

/// Warnings from the JSON that is kept of them.
pub(super) fn warnings(bytes: Option<&[u8]>) -> Result<Vec<Warning>, BoxError> {
    Ok(bytes.map(serde_json::from_slice).transpose()?.unwrap_or_default())
}

/// Sums up the chunks of all of them, in two reads at most.
async fn views(conn: &mut Conn<'_>, asked: Vec<Asked>, now: Timestamp) -> Result<Vec<NotificationView>, Failure> {
    let mut sums: HashMap<NotificationId, Sum> = HashMap::with_capacity(asked.len());
    let seated: Vec<NotificationId> = asked.iter().filter(|one| one.seated).map(|one| one.view.id).collect();
    for (id, standing) in cohort::standings(conn, &seated).await? {
        sums.extend(seat_sum(standing?).map(|sum| (id, sum)));
    }
    let others: Vec<NotificationId> = asked.iter().map(|one| one.view.id).filter(|id| !sums.contains_key(id)).collect();
    for piece in others.chunks(LIST) {
        let mut statement = Statement::new(
            "-- notifications.sums\nSELECT notification_id, CAST(SUM(targeted) AS SIGNED), \
             CAST(SUM(accepted) AS SIGNED), CAST(SUM(failed) AS SIGNED), CAST(SUM(unregistered) AS SIGNED), \
             CAST(SUM(expired) AS SIGNED), CAST(SUM(cancelled) AS SIGNED), CAST(SUM(suppressed) AS SIGNED), \
             CAST(SUM(unanswered) AS SIGNED), CAST(SUM(holder IS NOT NULL) AS SIGNED), CAST(SUM(",
        );
        statement.push(queue::chunk::TRIED).push(
            ") AS SIGNED), MAX(ended_at), \
             CAST(SUM(CASE WHEN holder = -1 THEN 1 ELSE 0 END) AS SIGNED), \
             MIN(CASE WHEN holder = -1 THEN waiting_since END), MIN(holder), \
             MIN(CASE WHEN holder < -1000 THEN waiting_since END), CAST(SUM(CASE WHEN holder = 0 AND due_at > ",
        );
        statement.bind(now).push(" AND waiting_since IS NOT NULL THEN 1 ELSE 0 END) AS SIGNED), ");
        statement.push("MIN(CASE WHEN holder = 0 THEN waiting_since END) FROM chunks WHERE notification_id IN ");
        statement.list(piece.iter().map(|id| id_value(id.as_uuid()))).push(" GROUP BY notification_id");
        for row in &conn.fetch(statement).await? {
            let id = queue::notification_id(row.bytes(0)?)?;
            sums.insert(id, sum_from(row, id)?);
        }
    }
    let breakers: BTreeSet<i64> = sums.values().filter_map(|sum| breaker_of(sum.least_holder?)).collect();
    let faults = faults(conn, &breakers).await?;
    Ok(asked
        .into_iter()
        .map(|asked| {
            let sum = sums.remove(&asked.view.id).unwrap_or_default();
            view(asked, &sum, &faults, now)
        })
        .collect())
}

/// What a seat adds up to; `None`: its chunk knows.
fn seat_sum(standing: Standing) -> Option<Sum> {
    let one = Counts { targeted: 1, ..Counts::default() };
    match standing {
        Standing::Open => Some(Sum { counts: Counts { pending: 1, ..one }, open: 1, ..Sum::default() }),
        Standing::Accepted(at) => {
            Some(Sum { counts: Counts { accepted: 1, ..one }, ended_at: Some(at), tried: 1, ..Sum::default() })
        }
        Standing::Moved => None,
    }
}

fn sum_from(row: &Row, id: NotificationId) -> Result<Sum, StoreError> {
    let many = |column| {
        row.int(column).and_then(|many| u64::try_from(many).map_err(|error| corrupt("chunks", "targeted", id, error)))
    };
    let mut counts = Counts {
        targeted: many(1)?,
        pending: 0,
        accepted: many(2)?,
        failed: many(3)?,
        unregistered: many(4)?,
        expired: many(5)?,
        cancelled: many(6)?,
        suppressed: many(7)?,
        unknown: many(8)?,
    };
    let ended = counts.accepted
        + counts.failed
        + counts.unregistered
        + counts.expired
        + counts.cancelled
        + counts.suppressed
        + counts.unknown;
    counts.pending = counts
        .targeted
        .checked_sub(ended)
        .ok_or_else(|| corrupt("chunks", "targeted", id, "more outcomes than targets"))?;
    let open = row.int(9)?;
    if open == 0 && counts.pending > 0 {
        return Err(corrupt("chunks", "holder", id, "ended, and not all of its targets have"));
    }
    Ok(Sum {
        counts,
        open,
        tried: row.int(10)?,
        ended_at: row.int_or_null(11)?.map(Timestamp::from_millis),
        held: row.int(12)?,
        held_since: row.int_or_null(13)?,
        least_holder: row.int_or_null(14)?,
        parked_since: row.int_or_null(15)?,
        backing_off: row.int(16)?,
        backing_off_since: row.int_or_null(17)?,
    })
}

fn view(asked: Asked, sum: &Sum, faults: &BTreeMap<i64, String>, now: Timestamp) -> NotificationView {
    let Asked { mut view, due_at, seated: _ } = asked;
    let cancelled = view.cancelled_at.is_some();
    view.counts = sum.counts;
    view.status = if sum.open == 0 && view.audience_complete {
        if cancelled { NotificationStatus::Cancelled } else { NotificationStatus::Done }
    } else if due_at > now && !cancelled {
        NotificationStatus::Scheduled
    } else if sum.tried == 0 {
        NotificationStatus::Queued
    } else {
        NotificationStatus::Sending
    };
    if matches!(view.status, NotificationStatus::Done | NotificationStatus::Cancelled) {
        view.done_at = Some(sum.ended_at.unwrap_or(view.created_at));
    }
    view.waiting_for = waiting_for(sum, faults, now);
    view
}

fn waiting_for(sum: &Sum, faults: &BTreeMap<i64, String>, now: Timestamp) -> Option<WaitingFor> {
    let since = |at: Option<i64>| at.map_or(now, Timestamp::from_millis);
    if sum.held > 0 {
        return Some(WaitingFor { reason: "held".to_owned(), since: since(sum.held_since) });
    }
    if let Some(breaker) = sum.least_holder.and_then(breaker_of) {
        let reason = match faults.get(&breaker) {
            Some(fault) if fault == "Paused" => "paused".to_owned(),
            Some(fault) => format!("breaker: {fault}"),
            // Closed a moment ago: its chunks are about to be freed.
            None => "breaker".to_owned(),
        };
        return Some(WaitingFor { reason, since: since(sum.parked_since) });
    }
    let all_back_off = sum.open > 0 && sum.backing_off == sum.open;
    all_back_off.then(|| WaitingFor { reason: "backoff".to_owned(), since: since(sum.backing_off_since) })
}

async fn faults(conn: &mut Conn<'_>, breakers: &BTreeSet<i64>) -> Result<BTreeMap<i64, String>, Failure> {
    if breakers.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut statement = Statement::new("-- notifications.faults\nSELECT id, reason FROM breakers WHERE id IN ");
    statement.list(breakers.iter().copied());
    let rows = conn.fetch(statement).await?;
    let fault = |row: &Row| {
        let id = row.int(0)?;
        let reason =
            String::from_utf8(row.bytes(1)?.to_vec()).map_err(|error| corrupt("breakers", "reason", id, error))?;
        Ok((id, reason))
    };
    Ok(rows.iter().map(fault).collect::<Result<_, StoreError>>()?)
}

/// How many chunks are read at a time.
const CHUNKS_AT_A_TIME: u64 = 8;

async fn deliveries(
    conn: &mut Conn<'_>,
    context: &Context,
    id: NotificationId,
    status: Option<DeliveryStatus>,
    page: &PageRequest,
) -> Result<Option<Page<DeliveryView>>, Failure> {
    let limit = page.limit.clamp(1, 1_000);
    let mut statement =
        Statement::new("-- notifications.exists\nSELECT cohort IS NOT NULL FROM notifications WHERE id = ");
    statement.bind(id_value(id.as_uuid()));
    let seated = match conn.fetch(statement).await?.first() {
        Some(row) => row.int(0)? != 0,
        None => return Ok(None),
    };
    let (mut number, mut position) = match page.cursor.as_deref().and_then(Cursor::parse) {
        Some(Cursor::Delivery { of, number, position }) if of == id => (number, position),
        _ => (0, 0),
    };
    let mut items = Vec::with_capacity(limit);
    if seated && let Some(chunk) = cohort::chunk_of(conn, id).await? {
        let wanted = chunk.states.iter().any(|state| status.is_none_or(|status| state.status == status));
        if wanted && (number, position) == (0, 0) {
            items = delivery_views(conn, ChunkKey { notification: id, number }, &chunk, &[0]).await?;
        }
        return Ok(Some(Page { items, next_cursor: None }));
    }
    loop {
        let mut statement = Statement::new(
            "-- notifications.chunks\nSELECT c.notification_id, c.number, c.targets, c.states FROM chunks c \
             WHERE c.targets IS NOT NULL AND c.notification_id = ",
        );
        statement.bind(id_value(id.as_uuid())).push(" AND c.number >= ").bind(number);
        if let Some(status) = status {
            statement.push(" AND ").push(some_are(status));
        }
        statement.push(" ORDER BY c.number LIMIT ").bind(CHUNKS_AT_A_TIME);
        let rows = conn.fetch(statement).await?;
        for row in &rows {
            let key = queue::chunk::key_from(row, 0)?;
            let begin = if key.number == number { position } else { 0 };
            let targets = row.bytes(2)?;
            let outcomes = row.bytes_or_null(3)?;
            let chunk = queue::chunk::read(conn, &context.reasons, key, targets, outcomes).await?;
            let mut chosen: Vec<usize> = (begin..chunk.targets.len())
                .filter(|at| {
                    status.is_none_or(|status| chunk.states.get(*at).is_some_and(|state| state.status == status))
                })
                .take(limit - items.len() + 1)
                .collect();
            // One more than fits: there is a next page, and it begins there.
            let next = if chosen.len() > limit - items.len() { chosen.pop() } else { None };
            items.extend(delivery_views(conn, key, &chunk, &chosen).await?);
            if let Some(position) = next {
                let cursor = Cursor::Delivery { of: id, number: key.number, position };
                return Ok(Some(Page { items, next_cursor: Some(cursor.to_text()) }));
            }
            (number, position) = (key.number + 1, 0);
        }
        if (rows.len() as u64) < CHUNKS_AT_A_TIME {
            return Ok(Some(Page { items, next_cursor: None }));
        }
    }
}

async fn delivery_views(
    conn: &mut Conn<'_>,
    key: ChunkKey,
    chunk: &Chunk,
    chosen: &[usize],
) -> Result<Vec<DeliveryView>, Failure> {
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let mut seqs: Vec<DeviceSeq> = chosen
        .iter()
        .filter_map(|at| match chunk.targets.get(*at) {
            Some(Target::Device { seq, .. }) => Some(*seq),
            _ => None,
        })
        .collect();
    seqs.sort_unstable();
    seqs.dedup();
    let devices = names(conn, &seqs).await?;
    let mut unique_ids = unique_ids(conn, key).await?;
    let mut views = Vec::with_capacity(chosen.len());
    for at in chosen {
        let (Some(target), Some(state)) = (chunk.targets.get(*at), chunk.states.get(*at)) else { continue };
        let apns_unique_id = unique_ids.remove(at);
        views.push(match target {
            Target::Device { seq, .. } => {
                let (device, hint) = devices.get(seq).ok_or_else(|| {
                    let row = format!("{}/{}", key.notification, key.number);
                    corrupt("chunks", "targets", row, format!("device {} is neither there nor remembered", seq.0))
                })?;
                DeliveryView {
                    device_id: Some(*device),
                    index: None,
                    token_hint: Some(hint.clone()),
                    state: state.clone(),
                    apns_id: ApnsId::derive(key.notification, Recipient::Device(*device)),
                    apns_unique_id,
                }
            }
            Target::Token { index, token } => DeliveryView {
                device_id: None,
                index: Some(*index),
                token_hint: Some(token.hint().to_owned()),
                state: state.clone(),
                apns_id: ApnsId::derive(key.notification, Recipient::Token(token)),
                apns_unique_id,
            },
        });
    }
    Ok(views)
}

/// Public ids and the last digits of tokens, of devices that are there and of those that are remembered.
async fn names(conn: &mut Conn<'_>, seqs: &[DeviceSeq]) -> Result<HashMap<DeviceSeq, (DeviceId, String)>, Failure> {
    let mut names = HashMap::with_capacity(seqs.len());
    for piece in seqs.chunks(LIST) {
        let mut statement =
            Statement::new("-- notifications.devices\nSELECT seq, id, token FROM devices WHERE seq IN ");
        statement.list(piece.iter().map(|seq| seq.0));
        for row in &conn.fetch(statement).await? {
            let seq = row.int(0)?;
            let token = DeviceToken::from_bytes(row.bytes(2)?).map_err(|e| corrupt("devices", "token", seq, e))?;
            let id = device_id(row, "devices", seq)?;
            names.insert(DeviceSeq(seq), (id, token.hint().to_owned()));
        }
    }
    let forgotten: Vec<DeviceSeq> = seqs.iter().filter(|seq| !names.contains_key(seq)).copied().collect();
    for piece in forgotten.chunks(LIST) {
        let mut statement = Statement::new(
            "-- notifications.tombstones\nSELECT seq, id, token_hint FROM device_tombstones WHERE seq IN ",
        );
        statement.list(piece.iter().map(|seq| seq.0));
        for row in &conn.fetch(statement).await? {
            let seq = row.int(0)?;
            let hint = String::from_utf8(row.bytes(2)?.to_vec())
                .map_err(|error| corrupt("device_tombstones", "token_hint", seq, error))?;
            names.insert(DeviceSeq(seq), (device_id(row, "device_tombstones", seq)?, hint));
        }
    }
    Ok(names)
}

fn device_id(row: &Row, table: &'static str, seq: i64) -> Result<DeviceId, StoreError> {
    uuid::Uuid::from_slice(row.bytes(1)?).map(DeviceId::from_uuid).map_err(|error| corrupt(table, "id", seq, error))
}

async fn unique_ids(conn: &mut Conn<'_>, key: ChunkKey) -> Result<HashMap<usize, String>, Failure> {
    let mut found = HashMap::new();
    // Only the first chunk has any.
    if key.number > 0 {
        return Ok(found);
    }
    let mut statement = Statement::new(
        "-- notifications.unique_ids\nSELECT position, apns_unique_id FROM delivery_notes \
         WHERE apns_unique_id IS NOT NULL AND number = 0 AND notification_id = ",
    );
    statement.bind(id_value(key.notification.as_uuid()));
    for row in &conn.fetch(statement).await? {
        let bad = |error: BoxError| corrupt("delivery_notes", "apns_unique_id", key.notification, error);
        let position = usize::try_from(row.int(0)?).map_err(|error| bad(error.into()))?;
        found.insert(position, String::from_utf8(row.bytes(1)?.to_vec()).map_err(|error| bad(error.into()))?);
    }
    Ok(found)
}

/// Whether this is a cursor of the list of notifications.
pub(super) fn is_cursor(text: &str) -> bool {
    matches!(Cursor::parse(text), Some(Cursor::Notification(_)))
}

/// Whether this is a cursor of the deliveries of this notification.
pub(super) fn is_cursor_of(id: NotificationId, text: &str) -> bool {
    matches!(Cursor::parse(text), Some(Cursor::Delivery { of, .. }) if of == id)
}

/// Where a list goes on. A text that is none, or of another list, starts the list anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cursor {
    /// Below this one.
    Notification(NotificationId),
    /// At this place.
    Delivery { of: NotificationId, number: u32, position: usize },
}

impl Cursor {
    fn to_text(self) -> String {
        let mut bytes = Vec::with_capacity(25);
        match self {
            Self::Notification(id) => {
                bytes.push(b'n');
                bytes.extend_from_slice(id.as_uuid().as_bytes());
            }
            Self::Delivery { of, number, position } => {
                bytes.push(b'd');
                bytes.extend_from_slice(of.as_uuid().as_bytes());
                bytes.extend_from_slice(&number.to_be_bytes());
                bytes.extend_from_slice(&u32::try_from(position).unwrap_or(u32::MAX).to_be_bytes());
            }
        }
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (list, rest) = bytes.split_first()?;
        let (id, rest) = rest.split_at_checked(16)?;
        let id = NotificationId::from_uuid(uuid::Uuid::from_slice(id).ok()?);
        match (list, rest.len()) {
            (b'n', 0) => Some(Self::Notification(id)),
            (b'd', 8) => {
                let (number, position) = rest.split_at_checked(4)?;
                Some(Self::Delivery {
                    of: id,
                    number: u32::from_be_bytes(number.try_into().ok()?),
                    position: u32::from_be_bytes(position.try_into().ok()?) as usize,
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_back_and_one_of_another_list_is_none() {
        let id: NotificationId = "0193515e-8f00-7abc-8def-0123456789ab".parse().unwrap();
        for cursor in [Cursor::Notification(id), Cursor::Delivery { of: id, number: 7, position: 999 }] {
            let text = cursor.to_text();
            assert_eq!(Cursor::parse(&text), Some(cursor));
            assert_eq!(Cursor::parse(text.get(..text.len() - 2).unwrap()), None, "cut short");
        }
        assert_eq!(Cursor::parse("not a cursor"), None);
    }
}
