//! `/v1/apps`: pausing and resuming an app.

use axum::extract::{Path, State};
use http::StatusCode;

use crate::{
    domain::{api_key::Scope, topic::Topic},
    http::{Shared, auth::Caller, problem::Problem},
    store,
};

/// `POST /v1/apps/{topic}/pause`: nothing of the app leaves until it is resumed; what is accepted meanwhile waits.
pub(in crate::http) async fn pause(
    State(api): State<Shared>,
    caller: Caller,
    Path(topic): Path<String>,
) -> Result<StatusCode, Problem> {
    let topic = known(&api, &caller, &topic)?;
    store::pause(api.services.store.as_ref(), &topic, api.services.clock.now()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/apps/{topic}/resume`: `204` whether it was paused or not.
pub(in crate::http) async fn resume(
    State(api): State<Shared>,
    caller: Caller,
    Path(topic): Path<String>,
) -> Result<StatusCode, Problem> {
    let topic = known(&api, &caller, &topic)?;
    store::resume(api.services.store.as_ref(), &topic, api.services.clock.now()).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn known(api: &Shared, caller: &Caller, topic: &str) -> Result<Topic, Problem> {
    caller.require(&[Scope::Admin])?;
    let topic: Option<Topic> = topic.parse().ok();
    let topic =
        topic.filter(|topic| api.services.catalogue.app(topic).is_some()).ok_or_else(|| Problem::not_found("app"))?;
    caller.require_topic(&topic)?;
    Ok(topic)
}
