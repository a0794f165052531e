//! Health and metrics, for whoever watches.
//!
//! Promises: `/health` is 503 only if a new request could not be kept; statuses are for everybody, what they mean and
//! what to do only for the operator; the format is `application/health+json`.

use std::collections::BTreeMap;

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use serde::Serialize;

use super::{
    Shared,
    auth::{Caller, Staleness},
    problem::{Kind, Problem},
};
use crate::{
    domain::{api_key::Scope, clock::Timestamp},
    ops::{Report, Status},
};

/// The media type of a health document.
pub const HEALTH_JSON: &str = "application/health+json";

#[derive(Serialize)]
struct Document {
    status: &'static str,
    version: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    checks: BTreeMap<String, Vec<Finding>>,
}

/// One check; without details, how it stands and nothing else.
#[derive(Serialize)]
struct Finding {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    component_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    observed_value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<Timestamp>,
}

fn answer(report: &Report, details: bool) -> Response {
    let mut checks: BTreeMap<String, Vec<Finding>> = BTreeMap::new();
    for check in &report.checks {
        let shown = |text: &str| (details && !text.is_empty()).then(|| text.to_owned());
        checks.entry(check.name.clone()).or_default().push(Finding {
            status: check.status.as_str(),
            component_id: check.component.as_deref().and_then(shown),
            observed_value: check.observed.as_deref().and_then(shown),
            output: shown(&check.output),
            advice: shown(&check.advice),
            time: details.then_some(check.time),
        });
    }
    document(report.is_ready(), &Document { status: report.status.as_str(), version: report.version, checks })
}

fn document(ready: bool, document: &Document) -> Response {
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::to_vec(document).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, HEALTH_JSON)], body).into_response()
}

/// `GET /health`
pub(super) async fn health(State(api): State<Shared>, request: Request) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let asks = parts.headers.contains_key(header::AUTHORIZATION) && !api.services.settings.ops_elsewhere;
    let details = api.trusted
        || (asks
            && match api.keys.authenticate(&parts.headers, &api, Staleness::Any).await {
                Ok(caller) => {
                    caller.sign(&parts);
                    caller.0.may(Scope::Admin)
                }
                // The database being away must not hide that it is.
                Err(problem) if problem.kind() == Kind::Unavailable => false,
                Err(problem) => return Err(problem),
            });
    Ok(answer(&api.services.health.report().await, details))
}

/// `GET /health/live`
pub(super) async fn live() -> Response {
    ([(header::CONTENT_TYPE, HEALTH_JSON)], r#"{"status":"pass"}"#).into_response()
}

/// `GET /health/ready`
pub(super) async fn ready(State(api): State<Shared>) -> Response {
    let report = api.services.health.report().await;
    let ready = report.is_ready() && !api.services.stopping.is_cancelled();
    let status = if ready { report.status } else { Status::Fail };
    document(ready, &Document { status: status.as_str(), version: report.version, checks: BTreeMap::new() })
}

/// `GET /metrics`
pub(super) async fn metrics(State(api): State<Shared>, request: Request) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    if !api.trusted {
        let caller: Caller = api.keys.authenticate(&parts.headers, &api, Staleness::Any).await?;
        caller.sign(&parts);
        caller.require(&[Scope::Metrics])?;
    }
    let text = api.services.health.metrics().await;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
