//! Health and metrics, for whoever watches.
//!
//! Promises: `/health` is 503 only if a new request could not be kept; statuses are for everybody, what they mean and
//! what to do only for the operator; the format is `application/health+json`.

use std::collections::BTreeMap;

use async_trait::async_trait;
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
    ops,
};

/// The media type of a health document.
pub const HEALTH_JSON: &str = "application/health+json";

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Well.
    Pass,
    /// Somebody should look, and new requests are kept.
    Warn,
    /// For the whole: a new request could not be kept. For a part: it does not work.
    Fail,
}

/// One finding about one component.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// How well it is.
    pub status: HealthStatus,
    /// Which of several, such as an app and environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub component_id: Option<String>,
    /// What was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_value: Option<String>,
    /// What it means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// When it was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
}

/// How the service is.
#[derive(Debug, Clone, Serialize)]
pub struct HealthReport {
    /// The whole. [`HealthStatus::Fail`] only if a new request could not be kept.
    pub status: HealthStatus,
    /// The version of this binary.
    pub version: String,
    /// By component.
    pub checks: BTreeMap<String, Vec<Check>>,
}

impl HealthReport {
    /// The same without what is for the operator only.
    #[must_use]
    pub fn without_details(mut self) -> Self {
        for check in self.checks.values_mut().flatten() {
            check.component_id = None;
            check.observed_value = None;
            check.output = None;
            check.advice = None;
            check.time = None;
        }
        self
    }
}

/// Who knows how the service is. It must answer soon, also while the database does not.
#[async_trait]
pub trait HealthSource: Send + Sync {
    /// How the service is now.
    async fn report(&self) -> HealthReport;
    /// The metrics as Prometheus reads them.
    async fn metrics(&self) -> String;
}

#[async_trait]
impl HealthSource for ops::Health {
    async fn report(&self) -> HealthReport {
        let report = Self::report(self).await;
        let mut checks: BTreeMap<String, Vec<Check>> = BTreeMap::new();
        for check in report.checks {
            checks.entry(check.name).or_default().push(Check {
                status: check.status.into(),
                component_id: check.component,
                observed_value: check.observed,
                output: Some(check.output),
                advice: Some(check.advice).filter(|advice| !advice.is_empty()),
                time: Some(check.time),
            });
        }
        HealthReport { status: report.status.into(), version: report.version.to_owned(), checks }
    }

    async fn metrics(&self) -> String {
        Self::metrics(self).await
    }
}

impl From<ops::Status> for HealthStatus {
    fn from(status: ops::Status) -> Self {
        match status {
            ops::Status::Pass => Self::Pass,
            ops::Status::Warn => Self::Warn,
            ops::Status::Fail => Self::Fail,
        }
    }
}

fn answer(report: &HealthReport) -> Response {
    let status = match report.status {
        HealthStatus::Pass | HealthStatus::Warn => StatusCode::OK,
        HealthStatus::Fail => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = serde_json::to_vec(report).unwrap_or_default();
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
    let report = api.services.health.report().await;
    Ok(answer(&if details { report } else { report.without_details() }))
}

/// `GET /health/live`
pub(super) async fn live() -> Response {
    ([(header::CONTENT_TYPE, HEALTH_JSON)], r#"{"status":"pass"}"#).into_response()
}

/// `GET /health/ready`
pub(super) async fn ready(State(api): State<Shared>) -> Response {
    let mut report = api.services.health.report().await;
    report.checks.clear();
    if api.services.stopping.is_cancelled() {
        report.status = HealthStatus::Fail;
    }
    answer(&report)
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
