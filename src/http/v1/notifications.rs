//! `/v1/notifications`: accepting, and reading back what became of each.
//!
//! Promises: a `202` is committed; all faults of a request are told at once; a repeat under the same idempotency key
//! gets the same answer, whatever the clock says by then: times are compared with now only where nothing was seen.

use std::time::Duration;

use axum::{
    Json,
    extract::{FromRequestParts as _, Path, RawQuery, Request, State},
    response::{IntoResponse, Response},
};
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{NoQuery, known_topic, listed, page, time};
use crate::{
    domain::{
        api_key::Scope,
        clock::Timestamp,
        delivery::DeliveryStatus,
        device::{DeviceId, DeviceToken, MAX_TAGS, Tag, UserId},
        notification::{
            Audience, Counts, Lane, Notification, NotificationId, NotificationStatus, NotificationView, Reference,
            WaitingFor, Warning,
        },
        payload::{Finding, Payload},
        push::{CollapseId, Expiration, OnUnknown, Priority, PushType},
        topic::{Environment, Topic},
    },
    http::{
        Shared,
        auth::Caller,
        body::{Incoming, NOTIFICATION_BYTES},
        catalogue::Catalogue,
        fields::{self, Object, Query, Value},
        problem::{Fault, Faults, Kind, Place, Problem},
    },
    store::{Accepted, DeliveryView, Idempotency, List, NotificationFilter, intake::Noted},
};

/// How long a notification lives when nobody says.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);

/// How far ahead a notification may be scheduled.
const MAX_AHEAD: Duration = Duration::from_secs(366 * 24 * 3600);

/// A call that may ring later than this is suspicious.
const CALL_TTL: Duration = Duration::from_secs(60);

/// The longest idempotency key.
const MAX_IDEMPOTENCY_KEY_BYTES: usize = 255;

const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// Tells that the answer is that to an earlier request.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// Where guessed names live.
const PLACES: &[(&str, &str)] = &[
    ("title", "it lives at /payload/aps/alert/title"),
    ("subtitle", "it lives at /payload/aps/alert/subtitle"),
    ("body", "it lives at /payload/aps/alert/body"),
    ("message", "a text lives at /payload/aps/alert/body"),
    ("text", "a text lives at /payload/aps/alert/body"),
    ("alert", "it lives at /payload/aps/alert"),
    ("sound", "it lives at /payload/aps/sound"),
    ("badge", "it lives at /payload/aps/badge"),
    ("category", "it lives at /payload/aps/category"),
    ("thread_id", "it lives at /payload/aps/thread-id"),
    ("mutable_content", "it lives at /payload/aps/mutable-content"),
    ("content_available", "it lives at /payload/aps/content-available"),
    ("interruption_level", "it lives at /payload/aps/interruption-level"),
    ("aps", "it lives at /payload/aps"),
    ("data", "the app's own data live in /payload, beside `aps`"),
    ("custom", "the app's own data live in /payload, beside `aps`"),
    ("notification", "what is shown lives at /payload/aps/alert"),
    ("user", "users live at /to/user_ids"),
    ("users", "they live at /to/user_ids"),
    ("user_id", "users live at /to/user_ids"),
    ("user_ids", "they live at /to/user_ids"),
    ("device", "devices live at /to/device_ids"),
    ("device_id", "devices live at /to/device_ids"),
    ("device_ids", "they live at /to/device_ids"),
    ("token", "tokens live at /to/tokens"),
    ("tokens", "they live at /to/tokens"),
    ("device_token", "tokens live at /to/tokens"),
    ("deviceToken", "tokens live at /to/tokens"),
    ("tags", "they live at /to/tags"),
    ("ttl", "it is called `ttl_seconds`"),
    ("expiry", "a time is called `expiration`, a duration `ttl_seconds`"),
    ("expires_at", "it is called `expiration`"),
    ("apns_expiration", "it is called `expiration`"),
    ("collapse_key", "it is called `collapse_id`"),
    ("apns_collapse_id", "it is called `collapse_id`"),
    ("bundle_id", "it is called `topic`"),
    ("bundleId", "it is called `topic`"),
    ("app", "it is called `topic`: the app's bundle id"),
    ("app_id", "it is called `topic`: the app's bundle id"),
    ("type", "it is called `push_type`"),
    ("apns_push_type", "it is called `push_type`"),
    ("apns_priority", "it is called `priority`"),
    ("scheduled_at", "it is called `send_at`"),
    ("deliver_at", "it is called `send_at`"),
    ("idempotency_key", "it is a header, `Idempotency-Key`"),
    ("id", "ids are given by the server; yours goes into `reference`"),
];

/// Where guessed names of audiences live.
const TO_PLACES: &[(&str, &str)] = &[
    ("user", "write `user_ids`, a list"),
    ("users", "it is called `user_ids`"),
    ("device", "write `device_ids`, a list"),
    ("device_id", "write `device_ids`, a list"),
    ("devices", "it is called `device_ids`"),
    ("token", "write `tokens`, a list"),
    ("device_tokens", "it is called `tokens`"),
    ("all", "it belongs into `tags`; for every device write `everyone`"),
    ("any", "it belongs into `tags`"),
    ("none", "it belongs into `tags`"),
    ("tag", "it is called `tags`"),
    ("topic", "it lives at /topic"),
];

/// When a notification ends, as it was asked for.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// So long after it is due.
    Ttl(Duration),
    /// Then.
    At(Timestamp),
}

/// A request in which everything is right that does not depend on the clock.
#[derive(Debug)]
struct Draft {
    topic: Topic,
    audience: Audience,
    payload: Payload,
    push_type: PushType,
    priority: Priority,
    until: Until,
    send_at: Option<Timestamp>,
    collapse_id: Option<CollapseId>,
    on_unknown: OnUnknown,
    environment: Option<Environment>,
    lane: Lane,
    reference: Option<Reference>,
    warnings: Vec<Warning>,
}

fn read(text: &str, caller: &Caller, catalogue: &Catalogue) -> Result<Draft, Problem> {
    let mut faults = Faults::default();
    let Some(mut object) = Object::open(&Value::new(text, ""), &mut faults) else {
        return Err(faults.into());
    };
    let topic = object.required("topic", &mut faults);
    let topic = known_topic(topic.as_ref(), caller, catalogue, &mut faults)?;
    let audience = object.required("to", &mut faults).and_then(|value| audience(&value, &mut faults));
    if let Some(audience) = &audience {
        caller.require(&[if audience.named().is_some() { Scope::Send } else { Scope::Broadcast }])?;
    }
    let push_type = object.optional("push_type").map_or(Some(PushType::Alert), |value| push_type(&value, &mut faults));
    let mut warnings = Vec::new();
    let payload = object
        .required("payload", &mut faults)
        .zip(push_type)
        .and_then(|(value, push_type)| payload(&value, push_type, &mut warnings, &mut faults));
    let given = object.optional("priority");
    let priority = push_type.map(|push_type| {
        let given = given.and_then(|value| priority(&value, push_type, &mut faults));
        given.unwrap_or(push_type.default_priority())
    });
    let until = until(&mut object, &mut faults);
    let send_at = object.optional("send_at").and_then(|value| value.parse(&mut faults));
    let collapse_id = object.optional("collapse_id").and_then(|value| value.parse(&mut faults));
    let on_unknown = object
        .optional("on_unknown")
        .and_then(|value| value.word(&[("retry", OnUnknown::Retry), ("stop", OnUnknown::Stop)], &mut faults));
    let environment =
        object.optional("environment").and_then(|value| environment(&value, topic.as_ref(), catalogue, &mut faults));
    let lane = object
        .optional("lane")
        .and_then(|value| value.word(&[("transactional", Lane::Transactional), ("bulk", Lane::Bulk)], &mut faults));
    let reference = object.optional("reference").and_then(|value| value.parse(&mut faults));
    if let Some(value) = object.optional("dry_run")
        && value.boolean(&mut faults) == Some(true)
    {
        value.fault(&mut faults, "not_available_yet", "`dry_run` does not work yet: leave it out.");
    }
    object.finish(PLACES, &mut faults);
    let (Some(topic), Some(audience), Some(payload), Some(push_type), Some(priority), true) =
        (topic, audience, payload, push_type, priority, faults.is_empty())
    else {
        return Err(faults.into());
    };
    let rings = matches!(push_type, PushType::Voip | PushType::PushToTalk);
    if rings && matches!(until, Until::Ttl(ttl) if ttl > CALL_TTL) {
        warnings.push(Warning {
            pointer: "/ttl_seconds".to_owned(),
            code: "long_ttl".to_owned(),
            detail: format!(
                "A push of type `{push_type}` that arrives hours late rings for nobody: set `ttl_seconds` to 0 or a few seconds."
            ),
        });
    }
    let lane = lane.unwrap_or_else(|| audience.default_lane());
    let on_unknown = on_unknown.unwrap_or(push_type.default_on_unknown());
    Ok(Draft {
        topic,
        audience,
        payload,
        push_type,
        priority,
        until,
        send_at,
        collapse_id,
        on_unknown,
        environment,
        lane,
        reference,
        warnings,
    })
}

fn push_type(value: &Value<'_>, faults: &mut Faults) -> Option<PushType> {
    let push_type = super::push_type(value, &[PushType::Mdm], faults)?;
    if push_type == PushType::Mdm {
        value.fault(faults, "invalid", "APNs takes MDM pushes by certificate only, which is not spoken here.");
        return None;
    }
    Some(push_type)
}

fn environment(
    value: &Value<'_>,
    topic: Option<&Topic>,
    catalogue: &Catalogue,
    faults: &mut Faults,
) -> Option<Environment> {
    let environment = value.parse::<Environment>(faults)?;
    let app = catalogue.app(topic?)?;
    if !app.environments.contains(&environment) {
        value.fault(
            faults,
            "no_key_for_environment",
            format!("This app has no key for `{environment}`. Best leave `environment` out: each device has its own."),
        );
    }
    Some(environment)
}

fn audience(value: &Value<'_>, faults: &mut Faults) -> Option<Audience> {
    let mut to = Object::open(value, faults)?;
    let users = to.optional("user_ids");
    let devices = to.optional("device_ids");
    let tokens = to.optional("tokens");
    let fence = to.optional("user_id");
    let tags = to.optional("tags");
    let everyone = to.optional("everyone");
    if let (None, Some(fence)) = (&devices, &fence) {
        fence.fault(
            faults,
            "conflict",
            "`user_id` only goes with `device_ids`, as the user who must hold them; to send to a user write `user_ids`, a list.",
        );
    }
    to.finish(TO_PLACES, faults);
    let named = [&users, &devices, &tokens, &tags, &everyone].into_iter().flatten().count();
    if named != 1 {
        if named > 1 || fence.is_none() {
            let code = if named == 0 { "required" } else { "conflict" };
            let one = "`to` must have exactly one of `user_ids`, `device_ids`, `tokens`, `tags` and `everyone`.";
            value.fault(faults, code, one);
        }
        return None;
    }
    if let Some(tags) = tags {
        return tagged(&tags, faults);
    }
    if let Some(everyone) = everyone {
        let true = everyone.boolean(faults)? else {
            everyone.fault(faults, "invalid", "Must be true: to send to fewer, name them.");
            return None;
        };
        return Some(Audience::Everyone);
    }
    if let Some(users) = users {
        return filled::<UserId>(&users, faults).map(Audience::Users);
    }
    if let Some(tokens) = tokens {
        return filled::<DeviceToken>(&tokens, faults).map(Audience::Tokens);
    }
    let ids = filled::<DeviceId>(&devices?, faults);
    let user_id = match fence {
        Some(fence) => Some(fence.parse::<UserId>(faults)?),
        None => None,
    };
    Some(Audience::Devices { ids: ids?, user_id })
}

/// Devices by their tags.
fn tagged(value: &Value<'_>, faults: &mut Faults) -> Option<Audience> {
    let mut tags = Object::open(value, faults)?;
    let mut list = |name| tags.optional(name).map_or(Some(Vec::new()), |list| list.list::<Tag>(MAX_TAGS, faults));
    let lists = (list("all"), list("any"), list("none"));
    tags.finish(&[], faults);
    let (Some(all), Some(any), Some(none)) = lists else { return None };
    if all.is_empty() && any.is_empty() && none.is_empty() {
        let detail = "Name at least one tag in `all`, `any` or `none`; for every device write `everyone` instead.";
        value.fault(faults, "required", detail);
        return None;
    }
    Some(Audience::Tags { all, any, none })
}

/// A list that names at least one.
fn filled<T>(value: &Value<'_>, faults: &mut Faults) -> Option<Vec<T>>
where
    T: std::str::FromStr<Err: std::fmt::Display> + Eq + std::hash::Hash + Clone,
{
    let list = value.list::<T>(Audience::MAX_LIST, faults)?;
    if list.is_empty() {
        value.fault(faults, "required", "This list is empty: name at least one.");
        return None;
    }
    Some(list)
}

fn payload(
    value: &Value<'_>,
    push_type: PushType,
    warnings: &mut Vec<Warning>,
    faults: &mut Faults,
) -> Option<Payload> {
    match Payload::parse(value.raw(), push_type) {
        Ok((payload, findings)) => {
            warnings.extend(findings.into_iter().map(|Finding { pointer, code, detail }| Warning {
                pointer,
                code: code.to_owned(),
                detail,
            }));
            Some(payload)
        }
        Err(findings) => {
            for Finding { pointer, code, detail } in findings {
                faults.add(pointer, code, detail);
            }
            None
        }
    }
}

fn priority(value: &Value<'_>, push_type: PushType, faults: &mut Faults) -> Option<Priority> {
    let number = value.integer(faults)?;
    let Some(priority) = Priority::from_number(number) else {
        value.fault(faults, "invalid", "Must be 10, 5 or 1.");
        return None;
    };
    if push_type == PushType::Background && priority == Priority::Ten {
        value.fault(faults, "invalid", "APNs refuses background pushes of priority 10: write 5, or leave it out.");
        return None;
    }
    Some(priority)
}

fn until(object: &mut Object<'_>, faults: &mut Faults) -> Until {
    let ttl = object.optional("ttl_seconds");
    let expiration = object.optional("expiration");
    if let (Some(_), Some(expiration)) = (&ttl, &expiration) {
        expiration.fault(faults, "conflict", "`ttl_seconds` and `expiration` exclude each other.");
    }
    if let Some(value) = ttl {
        let Some(seconds) = value.integer(faults) else { return Until::Ttl(DEFAULT_TTL) };
        let ttl = u64::try_from(seconds).ok().map(Duration::from_secs).filter(|ttl| *ttl <= Expiration::MAX);
        return Until::Ttl(ttl.unwrap_or_else(|| {
            let max = Expiration::MAX.as_secs();
            value.fault(faults, "invalid", format!("Must be 0 to {max}: APNs stores a push for 30 days at most."));
            DEFAULT_TTL
        }));
    }
    match expiration {
        Some(value) if value.kind() == "a number" => {
            value.fault(
                faults,
                "type",
                "`expiration` is a time in RFC 3339; for seconds from now write `ttl_seconds`, where 0 means one attempt.",
            );
            Until::Ttl(DEFAULT_TTL)
        }
        Some(value) => value.parse(faults).map_or(Until::Ttl(DEFAULT_TTL), Until::At),
        None => Until::Ttl(DEFAULT_TTL),
    }
}

impl Draft {
    /// The notification as it is accepted now, if the clock allows it.
    fn at(&self, owner: &str, now: Timestamp) -> Result<Notification, Faults> {
        let mut faults = Faults::default();
        if self.send_at.is_some_and(|at| at > now.plus(MAX_AHEAD)) {
            faults.add("/send_at", "too_far", "A notification can be scheduled at most 366 days ahead.");
        }
        let due_at = self.send_at.map_or(now, |at| at.max(now));
        let expiration = match self.until {
            Until::Ttl(Duration::ZERO) => Expiration::Immediate,
            // From when it was to be sent: a request that comes late does not live longer.
            Until::Ttl(ttl) => Expiration::At(self.send_at.unwrap_or(now).plus(ttl)),
            Until::At(at) => Expiration::At(at),
        };
        if let Expiration::At(at) = expiration {
            let pointer = if matches!(self.until, Until::At(_)) { "/expiration" } else { "/ttl_seconds" };
            if at <= due_at {
                let then = if due_at > now { "when it is to be sent" } else { "now" };
                faults.add(pointer, "expired", format!("This ends at {at}, which is not after {then}, {due_at}."));
            } else if at.since(due_at) > Expiration::MAX {
                faults.add(
                    pointer,
                    "too_far",
                    "APNs stores a push for 30 days at most: let it end at most 30 days after it is sent.",
                );
            }
        }
        faults.is_empty().then_some(()).ok_or(faults)?;
        Ok(Notification {
            id: NotificationId::new(now),
            topic: self.topic.clone(),
            owner: owner.to_owned(),
            reference: self.reference.clone(),
            lane: self.lane,
            push_type: self.push_type,
            priority: self.priority,
            expiration,
            collapse_id: self.collapse_id.clone(),
            derives_collapse_id: self.push_type == PushType::Alert && self.payload.shows_alert(),
            on_unknown: self.on_unknown,
            environment: self.environment,
            payload: self.payload.clone(),
            due_at,
            created_at: now,
            warnings: self.warnings.clone(),
        })
    }
}

/// The caller's idempotency key, if there is one.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<Vec<u8>>, Problem> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let bytes = value.as_bytes();
    let shaped = (1..=MAX_IDEMPOTENCY_KEY_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    if shaped && values.next().is_none() {
        return Ok(Some(bytes.to_vec()));
    }
    let detail = "`Idempotency-Key` must be given once, with 1 to 255 bytes of visible ASCII.";
    Err(Problem::new(Kind::InvalidFields, detail).with(Fault {
        place: Place::Header(IDEMPOTENCY_KEY),
        code: "invalid",
        detail: detail.into(),
    }))
}

/// What makes two requests the same: owner, endpoint and key; and then the body's bytes.
fn promise(owner: &str, key: &[u8], body: &[u8]) -> Idempotency {
    let mut hash = Sha256::new();
    for part in [owner.as_bytes(), b"POST /v1/notifications", key] {
        // With its length, so that no two different triples read the same.
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    Idempotency { key: hash.finalize().into(), body: Sha256::digest(body).into() }
}

/// Where they are sent and listed.
pub(in crate::http) const PATH: &str = "/v1/notifications";

/// `POST /v1/notifications`, if the router was not asked.
pub(in crate::http) fn send_straight(api: Shared, request: Request) -> impl Future<Output = Response> + use<> {
    let (mut parts, body) = request.into_parts();
    let sent = async move {
        let caller = Caller::from_request_parts(&mut parts, &api).await?;
        let no_query = NoQuery::from_request_parts(&mut parts, &api).await?;
        let incoming = Incoming::of(parts, body, &api);
        send(State(api), caller, no_query, incoming).await
    };
    sent.map(IntoResponse::into_response)
}

/// `POST /v1/notifications`
pub(in crate::http) async fn send(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    incoming: Incoming,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Send, Scope::Broadcast])?;
    let services = &api.services;
    let owner = caller.0.owner.as_str();
    let key = idempotency_key(&incoming.headers)?;
    let body = incoming.read(NOTIFICATION_BYTES).await?;
    let idempotency = key.map(|key| promise(owner, &key, &body.bytes));
    let draft = fields::json(&body.bytes).and_then(|text| read(text, &caller, &services.catalogue));
    drop(body);
    let noting = draft.and_then(|draft| {
        let notification = draft.at(owner, services.clock.now())?;
        Ok(services.intake.notify(notification, draft.audience, idempotency))
    });
    let noted = match noting {
        Ok(noting) => noting.await?,
        Err(problem) if !matches!(problem.kind(), Kind::NotJson | Kind::InvalidFields) => return Err(problem),
        // It may have been right when it came first; and another body under its key is told as that.
        Err(problem) => {
            let seen = match &idempotency {
                Some(idempotency) => services.store.seen(idempotency).await?,
                None => None,
            };
            match seen {
                Some(Accepted::Seen(view) | Accepted::New { view, .. }) => Noted::Seen(view),
                Some(Accepted::Conflict) => Noted::Conflict,
                None => return Err(problem),
            }
        }
    };
    match noted {
        Noted::Accepted(view) => Ok(accepted(&view)),
        Noted::Seen(view) => {
            let mut response = accepted(&view);
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
            Ok(response)
        }
        Noted::Conflict => Err(Problem::new(
            Kind::IdempotencyConflict,
            "This Idempotency-Key came with another body before. Bodies are compared as bytes; a new request needs a new key.",
        )),
    }
}

fn accepted(view: &NotificationView) -> Response {
    let mut response = (StatusCode::ACCEPTED, Json(Shown::of(view))).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/notifications/{}", view.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A notification as it is answered.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    id: NotificationId,
    status: NotificationStatus,
    topic: &'a Topic,
    reference: Option<&'a Reference>,
    counts: Counts,
    unmatched: u64,
    audience_complete: bool,
    waiting_for: Option<&'a WaitingFor>,
    warnings: &'a [Warning],
    created_at: Timestamp,
    cancelled_at: Option<Timestamp>,
    done_at: Option<Timestamp>,
}

impl<'a> Shown<'a> {
    fn of(view: &'a NotificationView) -> Self {
        Self {
            id: view.id,
            status: view.status,
            topic: &view.topic,
            reference: view.reference.as_ref(),
            counts: view.counts,
            unmatched: view.unmatched,
            audience_complete: view.audience_complete,
            waiting_for: view.waiting_for.as_ref(),
            warnings: &view.warnings,
            created_at: view.created_at,
            cancelled_at: view.cancelled_at,
            done_at: view.done_at,
        }
    }
}

/// The notification of a path, if this key may see it.
async fn visible(api: &Shared, caller: &Caller, id: NotificationId) -> Result<NotificationView, Problem> {
    let missing = || Problem::not_found("notification");
    let view = api.services.store.notification(id).await?;
    view.filter(|view| caller.0.is_for(&view.topic)).ok_or_else(missing)
}

/// `GET /v1/notifications/{id}`
pub(in crate::http) async fn one(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Read])?;
    let id = id.parse().map_err(|_| Problem::not_found("notification"))?;
    Ok(Json(Shown::of(&visible(&api, &caller, id).await?)).into_response())
}

/// `DELETE /v1/notifications/{id}`
pub(in crate::http) async fn cancel(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Send])?;
    let missing = || Problem::not_found("notification");
    let id = id.parse().map_err(|_| missing())?;
    if caller.0.topics.is_some() {
        visible(&api, &caller, id).await?;
    }
    let view = api.services.intake.cancel(id).await?.ok_or_else(missing)?;
    Ok(Json(Shown::of(&view)).into_response())
}

/// `GET /v1/notifications`
pub(in crate::http) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Read])?;
    let mut faults = Faults::default();
    let mut query = Query::open(query.as_deref(), &mut faults);
    let filter = NotificationFilter {
        topic: query.parse("topic", &mut faults),
        topics: caller.0.topics.clone(),
        status: query.parse("status", &mut faults),
        user_id: query.parse("user_id", &mut faults),
        reference: query.parse("reference", &mut faults),
        outcome: query.parse("outcome", &mut faults),
        since: time(&mut query, "since", &mut faults),
        until: time(&mut query, "until", &mut faults),
    };
    let page = page(&mut query, List::Notifications, &mut faults);
    query.finish(&mut faults);
    faults.check()?;
    if let Some(topic) = &filter.topic {
        caller.require_topic(topic)?;
    }
    let views = api.services.store.notifications(&filter, &page).await?;
    Ok(listed(&views, Shown::of))
}

/// The outcome of one device as it is answered.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    device_id: Option<DeviceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    token_hint: Option<&'a str>,
    status: DeliveryStatus,
    apns_status: Option<u16>,
    reason: Option<&'a str>,
    apns_id: String,
    apns_unique_id: Option<&'a str>,
    attempts: u32,
    at: Option<Timestamp>,
}

impl<'a> Outcome<'a> {
    fn of(delivery: &'a DeliveryView) -> Self {
        let state = &delivery.state;
        let accepted = state.status == DeliveryStatus::Accepted;
        Self {
            device_id: delivery.device_id,
            index: delivery.index,
            token_hint: delivery.token_hint.as_deref(),
            status: state.status,
            apns_status: if accepted { Some(200) } else { state.cause.as_ref().and_then(|cause| cause.apns_status) },
            reason: state.cause.as_ref().map(|cause| cause.reason.as_ref()),
            apns_id: delivery.apns_id.to_string(),
            apns_unique_id: delivery.apns_unique_id.as_deref(),
            attempts: state.attempts,
            at: state.at,
        }
    }
}

/// `GET /v1/notifications/{id}/deliveries`
pub(in crate::http) async fn deliveries(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Read])?;
    let missing = || Problem::not_found("notification");
    let id: NotificationId = id.parse().map_err(|_| missing())?;
    let mut faults = Faults::default();
    let mut query = Query::open(query.as_deref(), &mut faults);
    let status: Option<DeliveryStatus> = query.parse("status", &mut faults);
    let page = page(&mut query, List::Deliveries(id), &mut faults);
    query.finish(&mut faults);
    faults.check()?;
    if caller.0.topics.is_some() {
        visible(&api, &caller, id).await?;
    }
    let deliveries = api.services.store.deliveries(id, status, &page).await?.ok_or_else(missing)?;
    Ok(listed(&deliveries, Outcome::of))
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        sync::Arc,
    };

    use super::*;
    use crate::domain::{api_key::ApiKey, secret::Secret};

    const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

    pub(in crate::http::v1) fn caller(scopes: &[Scope]) -> Caller {
        Caller(Arc::new(ApiKey {
            id: "0123456789abcdef".parse().unwrap(),
            hash: Secret::new([0; 32]),
            owner: "shop".into(),
            scopes: scopes.iter().copied().collect(),
            topics: None,
            created_at: NOW,
            expires_at: None,
            revoked_at: None,
        }))
    }

    pub(in crate::http::v1) fn catalogue() -> Catalogue {
        let mut catalogue = Catalogue::default();
        catalogue.add(&"fr.ocpizza.livreur".parse().unwrap(), &[Environment::Production], true, &[]).unwrap();
        catalogue.add(&"fr.ocpizza.open".parse().unwrap(), &Environment::ALL, false, &[]).unwrap();
        catalogue
    }

    pub(in crate::http::v1) fn faults_of(problem: &Problem) -> Vec<(String, &'static str)> {
        problem
            .faults()
            .iter()
            .map(|fault| match &fault.place {
                Place::Pointer(name) | Place::Parameter(name) => (name.clone(), fault.code),
                Place::Header(name) => ((*name).to_owned(), fault.code),
            })
            .collect()
    }

    /// A right request with some fields replaced.
    fn request(fields: &[(&str, &str)]) -> String {
        let mut all = BTreeMap::from([
            ("topic", r#""fr.ocpizza.livreur""#),
            ("to", r#"{"user_ids":["livreur-42"]}"#),
            ("payload", r#"{"aps":{"alert":"Commande 1042"}}"#),
        ]);
        all.extend(fields.iter().copied());
        let fields: Vec<String> = all.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", fields.join(","))
    }

    fn drafted(fields: &[(&str, &str)]) -> Draft {
        let text = request(fields);
        read(&text, &caller(&[Scope::Send]), &catalogue())
            .unwrap_or_else(|problem| panic!("{text}: {}", String::from_utf8(problem.body("r")).unwrap()))
    }

    fn made(fields: &[(&str, &str)]) -> Notification {
        drafted(fields).at("shop", NOW).unwrap()
    }

    fn faults(fields: &[(&str, &str)]) -> Vec<(String, &'static str)> {
        match read(&request(fields), &caller(&[Scope::Send]), &catalogue()) {
            Err(problem) => faults_of(&problem),
            Ok(draft) => draft.at("shop", NOW).map_or_else(|faults| faults_of(&faults.into()), |_| Vec::new()),
        }
    }

    #[test]
    fn a_request_with_the_least_gets_the_defaults_of_its_push_type() {
        let plain = made(&[]);
        assert_eq!(
            (plain.push_type, plain.priority, plain.lane),
            (PushType::Alert, Priority::Ten, Lane::Transactional)
        );
        assert_eq!(plain.expiration, Expiration::At(NOW.plus(DEFAULT_TTL)));
        assert_eq!((plain.on_unknown, plain.due_at, plain.environment), (OnUnknown::Retry, NOW, None));
        assert!(plain.derives_collapse_id);
        let silent = made(&[("push_type", r#""background""#), ("payload", r#"{"aps":{"content-available":1}}"#)]);
        assert_eq!((silent.priority, silent.derives_collapse_id), (Priority::Five, false));
        let call = made(&[("push_type", r#""voip""#), ("payload", r#"{"a":1}"#)]);
        assert_eq!(call.on_unknown, OnUnknown::Stop);
        assert_eq!(call.warnings.len(), 1, "a call that may ring a day late is told");
        let badge = made(&[("payload", r#"{"aps":{"badge":1}}"#)]);
        assert!(!badge.derives_collapse_id);
    }

    #[test]
    fn every_field_is_taken_over() {
        let made = made(&[
            ("priority", "5"),
            ("ttl_seconds", "600"),
            ("collapse_id", r#""order-1042""#),
            ("reference", r#""1042""#),
            ("on_unknown", r#""stop""#),
            ("environment", r#""production""#),
            ("lane", r#""bulk""#),
            ("send_at", r#""2026-11-22T19:15:00+01:00""#),
            ("dry_run", "false"),
        ]);
        let send_at: Timestamp = "2026-11-22T18:15:00Z".parse().unwrap();
        assert_eq!((made.priority, made.lane, made.on_unknown), (Priority::Five, Lane::Bulk, OnUnknown::Stop));
        assert_eq!(made.due_at, send_at);
        assert_eq!(made.expiration, Expiration::At(send_at.plus(Duration::from_secs(600))));
        assert_eq!(made.collapse_id.unwrap().as_str(), "order-1042");
        assert_eq!(made.reference.unwrap().as_str(), "1042");
        assert_eq!(made.payload.bytes().as_ref(), br#"{"aps":{"alert":"Commande 1042"}}"#);
    }

    #[test]
    fn the_audience_is_exactly_one() {
        let of = |to: &str| drafted(&[("to", to)]).audience;
        assert_eq!(of(r#"{"user_ids":["a","b","a"]}"#).named(), Some(2), "duplicates are merged");
        assert_eq!(of(r#"{"tokens":["A1B2","a1b2"]}"#).named(), Some(1));
        let device = "0193515e-8f00-7abc-8def-000000000001";
        let fenced = of(&format!(r#"{{"device_ids":["{device}"],"user_id":"livreur-42"}}"#));
        assert!(matches!(fenced, Audience::Devices { user_id: Some(_), .. }));
        let many: Vec<String> = (0..101).map(|n| format!("\"u{n}\"")).collect();
        assert_eq!(drafted(&[("to", &format!(r#"{{"user_ids":[{}]}}"#, many.join(",")))]).lane, Lane::Bulk);
        for (to, pointer, code) in [
            ("{}", "/to", "required"),
            ("null", "/to", "required"),
            ("[]", "/to", "type"),
            (r#"{"user_ids":["a"],"tokens":["a1"]}"#, "/to", "conflict"),
            (r#"{"user_ids":[]}"#, "/to/user_ids", "required"),
            (r#"{"user_ids":"a"}"#, "/to/user_ids", "type"),
            (r#"{"user_ids":[7]}"#, "/to/user_ids/0", "type"),
            (r#"{"tokens":["xyz"]}"#, "/to/tokens/0", "invalid"),
            (r#"{"device_ids":["1"]}"#, "/to/device_ids/0", "invalid"),
            (r#"{"user_id":"a"}"#, "/to/user_id", "conflict"),
            (r#"{"everyone":false}"#, "/to/everyone", "invalid"),
            (r#"{"everyone":1}"#, "/to/everyone", "type"),
            (r#"{"everyone":true,"user_ids":["a"]}"#, "/to", "conflict"),
            (r#"{"tags":["a"]}"#, "/to/tags", "type"),
            (r#"{"tags":{}}"#, "/to/tags", "required"),
            (r#"{"tags":{"all":[],"none":[]}}"#, "/to/tags", "required"),
            (r#"{"tags":{"all":"a"}}"#, "/to/tags/all", "type"),
            (r#"{"tags":{"any":[""]}}"#, "/to/tags/any/0", "invalid"),
        ] {
            assert_eq!(faults(&[("to", to)]), [(pointer.to_owned(), code)], "{to}");
        }
        let unknown = [("/to/tags/not".to_owned(), "unknown_field"), ("/to/tags".to_owned(), "required")];
        assert_eq!(faults(&[("to", r#"{"tags":{"not":["a"]}}"#)]), unknown);
        let many: Vec<String> = (0..51).map(|n| format!("\"t{n}\"")).collect();
        let many = format!(r#"{{"tags":{{"none":[{}]}}}}"#, many.join(","));
        assert_eq!(faults(&[("to", &many)]), [("/to/tags/none".to_owned(), "too_many")]);
        let long: Vec<String> = (0..20_001).map(|n| format!("\"u{n}\"")).collect();
        let long = format!(r#"{{"user_ids":[{}]}}"#, long.join(","));
        assert_eq!(faults(&[("to", &long)]), [("/to/user_ids".to_owned(), "too_many")]);
    }

    #[test]
    fn all_faults_of_a_request_are_told_with_where_guessed_names_live() {
        let text = r#"{"title":"x","user_id":"a","ttl":5,"bundle_id":"b","collapseId":"c","expiry":1,"priority":"10"}"#;
        let problem = read(text, &caller(&[Scope::Send]), &catalogue()).unwrap_err();
        let mut told = faults_of(&problem);
        told.sort_unstable();
        let told: Vec<(&str, &str)> = told.iter().map(|(p, c)| (p.as_str(), *c)).collect();
        assert_eq!(
            told,
            [
                ("/bundle_id", "unknown_field"),
                ("/collapseId", "unknown_field"),
                ("/expiry", "unknown_field"),
                ("/payload", "required"),
                ("/priority", "type"),
                ("/title", "unknown_field"),
                ("/to", "required"),
                ("/topic", "required"),
                ("/ttl", "unknown_field"),
                ("/user_id", "unknown_field"),
            ]
        );
        let text = String::from_utf8(problem.body("r")).unwrap();
        for place in ["/payload/aps/alert/title", "/to/user_ids", "ttl_seconds", "`topic`", "`collapse_id`"] {
            assert!(text.contains(place), "{place}: {text}");
        }
    }

    #[test]
    fn wrong_values_are_refused_where_they_stand() {
        for (field, value, code) in [
            ("priority", "7", "invalid"),
            ("ttl_seconds", "-1", "invalid"),
            ("ttl_seconds", "2592001", "invalid"),
            ("ttl_seconds", "\"600\"", "type"),
            ("expiration", "1795000000", "type"),
            ("expiration", "\"tomorrow\"", "invalid"),
            ("send_at", "\"2026-11-22T19:15:00\"", "invalid"),
            ("collapse_id", "\"commande 1042\"", "invalid"),
            ("on_unknown", "\"maybe\"", "invalid"),
            ("environment", "\"sandbox\"", "no_key_for_environment"),
            ("environment", "\"staging\"", "invalid"),
            ("lane", "\"fast\"", "invalid"),
            ("reference", "\"\"", "invalid"),
            ("push_type", "\"mdm\"", "invalid"),
            ("push_type", "\"loud\"", "invalid"),
            ("dry_run", "true", "not_available_yet"),
            ("topic", "\"fr.elsewhere\"", "unknown_topic"),
            ("topic", "\"fr.ocpizza.livreur.voip\"", "unknown_topic"),
            ("payload", "{}", "required"),
        ] {
            let expected = if field == "payload" { "/payload/aps".to_owned() } else { format!("/{field}") };
            assert_eq!(faults(&[(field, value)]), [(expected, code)], "{field}: {value}");
        }
        assert_eq!(
            faults(&[("ttl_seconds", "5"), ("expiration", "\"2026-11-23T00:00:00Z\"")]),
            [("/expiration".to_owned(), "conflict")]
        );
        let silent = r#"{"aps":{"content-available":1}}"#;
        assert_eq!(
            faults(&[("push_type", r#""background""#), ("payload", silent), ("priority", "10")]),
            [("/priority".to_owned(), "invalid")]
        );
    }

    #[test]
    fn a_notification_ends_after_it_is_sent_and_within_apples_thirty_days() {
        let time = |at: Timestamp| format!("\"{at}\"");
        let minute = Duration::from_secs(60);
        let day = Duration::from_secs(24 * 3600);
        let of =
            |fields: &[(&str, &str)]| faults(fields).into_iter().map(|(p, c)| format!("{p} {c}")).collect::<Vec<_>>();
        let right = Vec::<String>::new();
        assert_eq!(of(&[("expiration", &time(NOW))]), ["/expiration expired"]);
        assert_eq!(of(&[("expiration", &time(NOW.plus(minute)))]), right);
        let later = time(NOW.plus(2 * minute));
        assert_eq!(of(&[("expiration", &time(NOW.plus(minute))), ("send_at", &later)]), ["/expiration expired"]);
        assert_eq!(of(&[("expiration", &time(NOW.plus(31 * day)))]), ["/expiration too_far"]);
        assert_eq!(of(&[("send_at", &time(NOW.plus(400 * day)))]), ["/send_at too_far"]);
        assert_eq!(of(&[("send_at", &time(NOW.plus(300 * day)))]), right);
        assert_eq!(of(&[("send_at", &time(NOW.minus(2 * day)))]), ["/ttl_seconds expired"]);
        let late = made(&[("send_at", &time(NOW.minus(minute))), ("ttl_seconds", "600")]);
        assert_eq!(late.due_at, NOW, "what is late leaves at once");
        assert_eq!(late.expiration, Expiration::At(NOW.plus(9 * minute)), "and lives no longer for it");
        assert_eq!(made(&[("ttl_seconds", "0")]).expiration, Expiration::Immediate);
    }

    #[test]
    fn a_key_for_some_apps_sends_to_those_only() {
        let mut key = (*caller(&[Scope::Send]).0).clone();
        key.topics = Some(BTreeSet::from(["fr.ocpizza.open".parse().unwrap()]));
        let problem = read(&request(&[]), &Caller(Arc::new(key)), &catalogue()).unwrap_err();
        assert_eq!(problem.kind(), Kind::Forbidden);
        let problem = read(&request(&[]), &caller(&[Scope::Broadcast]), &catalogue()).unwrap_err();
        assert_eq!(problem.kind(), Kind::Forbidden, "naming users needs `send`");
    }

    #[test]
    fn tags_and_everyone_need_a_scope_of_their_own_and_go_behind_what_is_urgent() {
        let of = |to: &str, scope| read(&request(&[("to", to)]), &caller(&[scope]), &catalogue());
        for to in [r#"{"everyone":true}"#, r#"{"tags":{"any":["a"]}}"#] {
            assert_eq!(of(to, Scope::Send).unwrap_err().kind(), Kind::Forbidden, "{to}");
            assert_eq!(of(to, Scope::Broadcast).unwrap().lane, Lane::Bulk, "{to}");
        }
        let tags = of(r#"{"tags":{"all":["a","a"],"any":["b","c"],"none":["d"]}}"#, Scope::Broadcast).unwrap().audience;
        let named = |names: &[&str]| names.iter().map(|name| name.parse().unwrap()).collect::<Vec<Tag>>();
        let wanted = Audience::Tags { all: named(&["a"]), any: named(&["b", "c"]), none: named(&["d"]) };
        assert_eq!(tags, wanted, "repeats are merged");
    }

    #[test]
    fn an_idempotency_key_belongs_to_its_owner_and_to_the_bytes_of_the_body() {
        let of = |owner, key: &str, body: &str| promise(owner, key.as_bytes(), body.as_bytes());
        assert_eq!(of("shop", "k", "{}"), of("shop", "k", "{}"));
        assert_ne!(of("shop", "k", "{}").key, of("erp", "k", "{}").key);
        assert_ne!(of("shop", "k", "{}").key, of("shop", "l", "{}").key);
        assert_ne!(of("shop", "k", "{}").body, of("shop", "k", "{ }").body);
        let header = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(IDEMPOTENCY_KEY, HeaderValue::from_str(value).unwrap());
            }
            idempotency_key(&headers).map_err(|problem| problem.kind())
        };
        assert_eq!(header(&[]), Ok(None));
        assert_eq!(header(&["order-1042"]), Ok(Some(b"order-1042".to_vec())));
        for wrong in [&[""][..], &["a b"], &["a", "b"], &["x".repeat(256).as_str()]] {
            assert_eq!(header(wrong), Err(Kind::InvalidFields), "{wrong:?}");
        }
    }

    #[test]
    fn hostile_requests_are_refused_and_nothing_worse() {
        let zeros = format!(r#"{{"to":{{"user_ids":[{}0]}}}}"#, "0,".repeat(1_000_000));
        let fields: Vec<String> = (0..5_000).map(|n| format!("\"f{n}\":1")).collect();
        let fields = format!("{{{},\"topic\":1}}", fields.join(","));
        let deep = format!(r#"{{"payload":{}{}}}"#, "[".repeat(50_000), "]".repeat(50_000));
        for text in [zeros.as_str(), &fields, &deep, r#"{"topic":"\ud800"}"#, r#"{"":1,"/":2,"~":3}"#] {
            let problem = read(text, &caller(&[Scope::Send]), &catalogue()).unwrap_err();
            assert!(problem.faults().len() <= Faults::MAX);
            assert!(problem.body("r").len() < 64 * 1024);
        }
    }
}
