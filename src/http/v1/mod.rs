//! Version 1 of the API: one file a resource.

pub(super) mod apps;
pub(super) mod devices;
pub(super) mod notifications;
pub(super) mod users;

use axum::{
    Json,
    extract::FromRequestParts,
    response::{IntoResponse, Response},
};
use http::{Uri, request::Parts};
use serde::Serialize;

use super::{
    auth::Caller,
    catalogue::Catalogue,
    fields::{Query, Value, parameter},
    problem::{Faults, Kind, Problem},
};
use crate::{
    domain::{
        clock::{NotATime, Timestamp},
        push::PushType,
        topic::Topic,
    },
    store::{List, NotACursor, Page, PageRequest},
};

/// How many items a list has when nobody says.
const DEFAULT_LIMIT: usize = 100;
/// How many it may have.
const MAX_LIMIT: usize = 1_000;

/// The answer to a path that does not exist.
pub(super) async fn no_such_path(uri: Uri) -> Problem {
    let path = uri.path();
    let detail = if path.len() > 1 && path.ends_with('/') {
        "There is no such path: leave the slash at the end out."
    } else if path.starts_with("/v1/") || path == "/v1" {
        "There is no such path."
    } else {
        "There is no such path: those of the API begin with /v1/."
    };
    Problem::new(Kind::NotFound, detail)
}

/// That a request has no query: what stands there would do nothing, and surprise whoever wrote it.
pub(super) struct NoQuery;

impl<S: Sync> FromRequestParts<S> for NoQuery {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let mut faults = Faults::default();
        Query::open(parts.uri.query(), &mut faults).finish(&mut faults);
        faults.check().map(|()| Self)
    }
}

/// `limit` and `cursor`.
fn page(query: &mut Query, list: List, faults: &mut Faults) -> PageRequest {
    let limit = match query.take("limit") {
        None => DEFAULT_LIMIT,
        Some(text) => text.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit)).unwrap_or_else(|| {
            faults.push(parameter("limit", "invalid", "Must be a whole number from 1 to 1000."));
            DEFAULT_LIMIT
        }),
    };
    let cursor = query.take("cursor");
    if let Some(cursor) = &cursor
        && let Err(NotACursor) = list.check(cursor)
    {
        faults.push(parameter(
            "cursor",
            "invalid",
            "This is not a cursor of this list. Take `next_cursor` of the page before, unchanged.",
        ));
    }
    PageRequest { cursor, limit }
}

/// A time in a query, where an unescaped `+` of an offset has become a space.
fn time(query: &mut Query, name: &'static str, faults: &mut Faults) -> Option<Timestamp> {
    let text = query.take(name)?.replace(' ', "+");
    let time: Result<Timestamp, NotATime> = text.parse();
    time.map_err(|error| faults.push(parameter(name, "invalid", format!("This is {error}.")))).ok()
}

/// A page of a list.
fn listed<'a, T, B: Serialize>(page: &'a Page<T>, body: impl Fn(&'a T) -> B) -> Response {
    #[derive(Serialize)]
    struct List<'a, B> {
        items: Vec<B>,
        next_cursor: Option<&'a str>,
    }
    Json(List { items: page.items.iter().map(body).collect(), next_cursor: page.next_cursor.as_deref() })
        .into_response()
}

/// A push type that is offered: one of all but `refused`, which the caller of this explains by itself.
fn push_type(value: &Value<'_>, refused: &[PushType], faults: &mut Faults) -> Option<PushType> {
    let text = value.string(faults)?;
    let found = text.parse().ok();
    if found.is_none() {
        let offered: Vec<&str> =
            PushType::ALL.iter().filter(|known| !refused.contains(known)).map(|known| known.as_str()).collect();
        value.fault(faults, "invalid", format!("Not a push type: {}.", offered.join(", ")));
    }
    found
}

/// The app that a body names: one the key is for, and one that is configured.
fn known_topic(
    value: Option<&Value<'_>>,
    caller: &Caller,
    catalogue: &Catalogue,
    faults: &mut Faults,
) -> Result<Option<Topic>, Problem> {
    let Some((value, topic)) = value.and_then(|value| Some((value, value.parse::<Topic>(faults)?))) else {
        return Ok(None);
    };
    caller.require_topic(&topic)?;
    if catalogue.app(&topic).is_none() {
        value.fault(faults, "unknown_topic", catalogue.unknown(&topic, !caller.is_an_app()));
        return Ok(None);
    }
    Ok(Some(topic))
}
