//! `/v1/users`: identity tokens, by which an app proves who holds the phone.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{NoQuery, known_topic};
use crate::{
    domain::{api_key::Scope, device::UserId},
    http::{
        Shared,
        auth::Caller,
        body::{Incoming, SMALL_BYTES},
        fields::{self, Object, Value, parameter},
        identity::MAX_LIFE,
        problem::{Faults, Problem},
    },
};

/// How long a token lives when nobody says.
const DEFAULT_TTL_SECONDS: i64 = 3600;
/// The shortest life.
const MIN_TTL_SECONDS: i64 = 60;

/// `POST /v1/users/{user_id}/identity-tokens`
pub(in crate::http) async fn mint(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(user): Path<String>,
    incoming: Incoming,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Send])?;
    let services = &api.services;
    let body = incoming.read(SMALL_BYTES).await?;
    let mut faults = Faults::default();
    let user: Option<UserId> = user.parse().ok();
    if user.is_none() {
        faults.push(parameter("user_id", "invalid", "Must have 1 to 255 bytes."));
    }
    let Some(mut object) = Object::open(&Value::new(fields::json(&body.bytes)?, ""), &mut faults) else {
        return Err(faults.into());
    };
    let topic = object.required("topic", &mut faults);
    let topic = known_topic(topic.as_ref(), &caller, &services.catalogue, &mut faults)?;
    let longest = i64::try_from(MAX_LIFE.as_secs()).unwrap_or(i64::MAX);
    let ttl = object.optional("ttl_seconds").map_or(DEFAULT_TTL_SECONDS, |value| {
        let seconds = value.integer(&mut faults).unwrap_or(DEFAULT_TTL_SECONDS);
        if !(MIN_TTL_SECONDS..=longest).contains(&seconds) {
            value.fault(&mut faults, "invalid", format!("Must be {MIN_TTL_SECONDS} to {longest}."));
        }
        seconds
    });
    object.finish(&[("ttl", "it is called `ttl_seconds`"), ("bundle_id", "it is called `topic`")], &mut faults);
    let (Some(user), Some(topic), true) = (user, topic, faults.is_empty()) else {
        return Err(faults.into());
    };
    let now = services.clock.now();
    let expires_at = now.plus(Duration::from_secs(u64::try_from(ttl).unwrap_or_default()));
    let token = api.own_key.get(services.store.as_ref()).await?.mint(&user, &topic, now, expires_at)?;
    Ok(Json(json!({ "identity_token": token, "expires_at": expires_at })).into_response())
}
