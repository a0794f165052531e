//! Everything that is not a 2xx, as `application/problem+json` (RFC 9457).
//!
//! Promises: the only place where an error meets a status code; `type` is a stable word of [`Kind`]; `errors` lists all
//! faults of a request; a 5xx tells its cause to nobody but the log, where [`super::request`] writes the chain once.

use std::{borrow::Cow, sync::Arc};

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::store::{BoxError, StoreError, intake::IntakeError};

/// The media type of an error.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Seconds after which a caller should come back when the database does not answer.
const RETRY_DATABASE: u64 = 2;
/// Seconds after which a caller should come back when too many wait.
const RETRY_FULL: u64 = 1;
/// Seconds after which a caller should come back when this process stops.
const RETRY_STOPPING: u64 = 5;

/// What kind of problem it is. The slug never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The body is not JSON.
    NotJson,
    /// The request itself is malformed, beside its fields.
    BadRequest,
    /// No API key, or one that is refused.
    Unauthorized,
    /// The key may not do this.
    Forbidden,
    /// The registration does not prove who holds the phone.
    IdentityRefused,
    /// There is no such thing, or the key may not see it.
    NotFound,
    /// The path knows other methods.
    MethodNotAllowed,
    /// The request did not arrive in time.
    Timeout,
    /// The same idempotency key came with another body before.
    IdempotencyConflict,
    /// The body is longer than this path takes.
    TooLarge,
    /// The body is not `application/json`.
    UnsupportedMediaType,
    /// Fields that are wrong, unknown or missing.
    InvalidFields,
    /// Too many requests of this kind.
    TooManyRequests,
    /// A bug of ours.
    Internal,
    /// Nothing can be kept at the moment, or too many wait.
    Unavailable,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::NotJson,
        Self::BadRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::IdentityRefused,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Timeout,
        Self::IdempotencyConflict,
        Self::TooLarge,
        Self::UnsupportedMediaType,
        Self::InvalidFields,
        Self::TooManyRequests,
        Self::Internal,
        Self::Unavailable,
    ];

    /// The value of `type`.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::NotJson => "/problems/not-json",
            Self::BadRequest => "/problems/bad-request",
            Self::Unauthorized => "/problems/unauthorized",
            Self::Forbidden => "/problems/forbidden",
            Self::IdentityRefused => "/problems/identity-refused",
            Self::NotFound => "/problems/not-found",
            Self::MethodNotAllowed => "/problems/method-not-allowed",
            Self::Timeout => "/problems/timeout",
            Self::IdempotencyConflict => "/problems/idempotency-conflict",
            Self::TooLarge => "/problems/too-large",
            Self::UnsupportedMediaType => "/problems/unsupported-media-type",
            Self::InvalidFields => "/problems/invalid-fields",
            Self::TooManyRequests => "/problems/too-many-requests",
            Self::Internal => "/problems/internal",
            Self::Unavailable => "/problems/unavailable",
        }
    }

    /// The value of `title`.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::NotJson => "The body is not JSON",
            Self::BadRequest => "The request is malformed",
            Self::Unauthorized => "A valid API key is needed",
            Self::Forbidden => "The API key may not do this",
            Self::IdentityRefused => "It is not proven who holds the phone",
            Self::NotFound => "There is no such thing here",
            Self::MethodNotAllowed => "The path does not know this method",
            Self::Timeout => "The request did not arrive in time",
            Self::IdempotencyConflict => "The idempotency key was used for another request",
            Self::TooLarge => "The body is too large",
            Self::UnsupportedMediaType => "The body is not declared as JSON",
            Self::InvalidFields => "Some fields are wrong",
            Self::TooManyRequests => "Too many requests",
            Self::Internal => "Something went wrong on this side",
            Self::Unavailable => "The request could not be kept at the moment",
        }
    }

    /// The value of `status`.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::NotJson | Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden | Self::IdentityRefused => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::IdempotencyConflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::InvalidFields => StatusCode::UNPROCESSABLE_ENTITY,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Where a fault is: exactly one of the three names it in the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// A JSON pointer into the body; empty: the body itself.
    Pointer(String),
    /// A parameter of the query or of the path.
    Parameter(String),
    /// A header.
    Header(&'static str),
}

/// One thing that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// A stable word.
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub detail: Cow<'static, str>,
}

/// All that is wrong with one request, up to a bound.
#[derive(Debug, Default)]
pub struct Faults {
    list: Vec<Fault>,
    more: usize,
}

impl Faults {
    /// The most that are listed; how many more there are is told.
    pub const MAX: usize = 100;

    /// A fault in the body.
    pub fn add(&mut self, pointer: impl Into<String>, code: &'static str, detail: impl Into<Cow<'static, str>>) {
        self.push(Fault { place: Place::Pointer(pointer.into()), code, detail: detail.into() });
    }

    /// A fault anywhere.
    pub fn push(&mut self, fault: Fault) {
        if self.list.len() < Self::MAX {
            self.list.push(fault);
        } else {
            self.more += 1;
        }
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The faults so far.
    #[must_use]
    pub fn list(&self) -> &[Fault] {
        &self.list
    }

    /// Nothing, or the problem that lists all faults.
    ///
    /// # Errors
    /// If there is a fault.
    pub fn check(self) -> Result<(), Problem> {
        if self.list.is_empty() { Ok(()) } else { Err(self.into()) }
    }
}

impl From<Faults> for Problem {
    fn from(faults: Faults) -> Self {
        let detail = match (faults.list.as_slice(), faults.more) {
            ([], _) => "The request has faults.".into(),
            ([only], 0) => only.detail.clone(),
            (list, 0) => format!("{} faults, listed in `errors`.", list.len()).into(),
            (list, more) => {
                format!("{} faults, the first {} of which are listed in `errors`.", list.len() + more, list.len())
                    .into()
            }
        };
        let mut problem = Self::new(Kind::InvalidFields, detail);
        problem.faults = faults.list;
        problem
    }
}

/// An answer that is not a 2xx.
#[derive(Debug)]
pub struct Problem {
    kind: Kind,
    detail: Cow<'static, str>,
    faults: Vec<Fault>,
    retry_after: Option<u64>,
    challenge: Option<String>,
    source: Option<BoxError>,
}

impl Problem {
    /// A problem with a sentence about this request.
    #[must_use]
    pub fn new(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, detail: detail.into(), faults: Vec::new(), retry_after: None, challenge: None, source: None }
    }

    /// There is no such thing.
    #[must_use]
    pub fn not_found(what: &'static str) -> Self {
        Self::new(Kind::NotFound, format!("There is no such {what}, or this API key may not see it."))
    }

    /// A bug of ours; the cause goes to the log.
    #[must_use]
    pub fn internal(source: impl Into<BoxError>) -> Self {
        let mut problem = Self::new(
            Kind::Internal,
            "This is a fault of the server, not of the request. Its log tells more under this `request_id`.",
        );
        problem.source = Some(source.into());
        problem
    }

    /// Come back later; the cause goes to the log.
    #[must_use]
    pub fn unavailable(detail: &'static str, retry_after: u64, source: Option<BoxError>) -> Self {
        let mut problem = Self::new(Kind::Unavailable, detail);
        problem.retry_after = Some(retry_after);
        problem.source = source;
        problem
    }

    /// With a fault listed.
    #[must_use]
    pub fn with(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }

    /// With a `Retry-After` in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// With a `WWW-Authenticate`.
    #[must_use]
    pub fn challenge(mut self, challenge: String) -> Self {
        self.challenge = Some(challenge);
        self
    }

    /// What kind it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// What is listed in `errors`.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// The cause and its causes, for the log.
    #[must_use]
    pub fn chain(&self) -> Option<String> {
        let mut error: Option<&dyn std::error::Error> = Some(self.source.as_deref()?);
        let mut chain = String::new();
        while let Some(current) = error {
            if !chain.is_empty() {
                chain.push_str(": ");
            }
            chain.push_str(&current.to_string());
            error = current.source();
        }
        Some(chain)
    }

    /// The body of the answer.
    #[must_use]
    pub fn body(&self, request_id: &str) -> Vec<u8> {
        #[derive(Serialize)]
        struct Body<'a> {
            r#type: &'static str,
            title: &'static str,
            status: u16,
            detail: &'a str,
            request_id: &'a str,
            errors: &'a [Fault],
        }
        serde_json::to_vec(&Body {
            r#type: self.kind.slug(),
            title: self.kind.title(),
            status: self.kind.status().as_u16(),
            detail: &self.detail,
            request_id,
            errors: &self.faults,
        })
        .unwrap_or_default()
    }
}

/// The problem of a response, for [`super::request`], which knows the request id and writes the body.
#[derive(Debug, Clone)]
pub(super) struct Told(pub(super) Arc<Problem>);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(challenge) = self.challenge.as_deref().and_then(|text| HeaderValue::from_str(text).ok()) {
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        response.extensions_mut().insert(Told(Arc::new(self)));
        response
    }
}

const DATABASE: &str = "The database does not answer. Nothing was kept; send the request again.";
const COMMIT_UNKNOWN: &str = "The database did not say whether this was kept. Send the request again, with the same Idempotency-Key if it had one.";

impl Problem {
    /// Which answer a fault of the store is; the fault itself, or what shares it, goes to the log.
    fn of_store(error: &StoreError, source: BoxError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::unavailable(DATABASE, RETRY_DATABASE, Some(source)),
            StoreError::CommitUnknown(_) => Self::unavailable(COMMIT_UNKNOWN, RETRY_DATABASE, Some(source)),
            StoreError::Corrupt { .. }
            | StoreError::Schema(_)
            | StoreError::Locked(_)
            | StoreError::Settings(_)
            | StoreError::Statement(_) => Self::internal(source),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let error = Arc::new(error);
        Self::of_store(&error, Box::new(Arc::clone(&error)))
    }
}

impl From<IntakeError> for Problem {
    fn from(error: IntakeError) -> Self {
        match &error {
            IntakeError::Full => Self::unavailable(
                "More requests wait than the database can take. Nothing was kept; send the request again.",
                RETRY_FULL,
                Some(error.into()),
            ),
            IntakeError::Stopped => Self::unavailable(
                "This process is stopping. Send the request again, with the same Idempotency-Key if it had one.",
                RETRY_STOPPING,
                Some(error.into()),
            ),
            IntakeError::Store(store) => Self::of_store(store, Box::new(Arc::clone(store))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_slug_of_its_own() {
        let slugs: std::collections::BTreeSet<_> = Kind::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(slugs.len(), Kind::ALL.len());
        assert!(Kind::ALL.iter().all(|kind| kind.status().as_u16() >= 400));
    }

    #[test]
    fn all_faults_are_listed_up_to_a_bound() {
        let mut faults = Faults::default();
        for index in 0..250 {
            faults.add(format!("/to/tokens/{index}"), "invalid", "not a device token");
        }
        let problem = Problem::from(faults);
        let body: serde_json::Value = serde_json::from_slice(&problem.body("r-1")).unwrap();
        assert_eq!(body["errors"].as_array().unwrap().len(), Faults::MAX);
        assert_eq!(body["detail"], "250 faults, the first 100 of which are listed in `errors`.");
        assert_eq!(
            body["errors"][0],
            serde_json::json!({"pointer": "/to/tokens/0", "code": "invalid", "detail": "not a device token"})
        );
        assert_eq!((body["status"].as_u64(), body["request_id"].as_str()), (Some(422), Some("r-1")));
    }

    #[test]
    fn a_fault_of_the_database_is_told_to_the_log_alone() {
        let problem = Problem::from(StoreError::Unavailable("connection refused to db7:3306".into()));
        assert_eq!(problem.chain().unwrap(), "the database did not answer: connection refused to db7:3306");
        assert!(!String::from_utf8(problem.body("r")).unwrap().contains("db7"));
        let response = problem.into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
