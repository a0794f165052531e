//! What surrounds every request: its id, its one log line, its metrics, its deadline, and the body of its problem.
//!
//! Promises: every answer bears `x-request-id`; whatever is not a 2xx is a problem document, also what the framework
//! or a panic said; the log never holds a token, a payload, a query or a key's secret. A client that leaves is logged
//! with status 499, and undoes nothing.

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    task::{Context as Polling, Poll},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody as _},
    extract::{MatchedPath, Request},
    response::{IntoResponse, Response},
    routing::Route,
};
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tower::{Layer, Service};
use tracing::Instrument;

use super::{
    Shared,
    problem::{Kind, MEDIA_TYPE, Problem, Told},
};
use crate::{
    domain::{api_key::ApiKeyId, clock::Clock},
    telemetry::names,
};

/// The header of the request id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A longer request id of the caller's is not taken over.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// What the log says when the client left before the answer.
const CLIENT_LEFT: u16 = 499;

/// What is known of a request beside the request.
#[derive(Debug)]
pub(super) struct Context {
    /// Its id.
    pub(super) id: String,
    /// The key that was accepted for it.
    pub(super) key: OnceLock<ApiKeyId>,
}

impl Context {
    fn new(headers: &HeaderMap) -> Self {
        let given = headers
            .get(&REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| {
                (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
            })
            .map(str::to_owned);
        Self { id: given.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()), key: OnceLock::new() }
    }
}

/// The pattern of a path, as it is logged and counted.
pub(super) enum Pattern {
    /// The router's.
    Matched(MatchedPath),
    /// That of a path that the router was not asked for.
    Fixed(&'static str),
    /// None that is known.
    Unknown,
}

impl Pattern {
    fn as_str(&self) -> &str {
        match self {
            Self::Matched(path) => path.as_str(),
            Self::Fixed(path) => path,
            Self::Unknown => "unmatched",
        }
    }
}

/// Logs and counts once, also when the request is dropped.
struct Record {
    context: Arc<Context>,
    clock: Arc<dyn Clock>,
    began: Duration,
    method: &'static str,
    route: Pattern,
    status: u16,
    chain: Option<String>,
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.clock.monotonic().saturating_sub(self.began);
        let route = self.route.as_str();
        let (method, status, chain) = (self.method, self.status, self.chain.as_deref());
        let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let (request, key) = (self.context.id.as_str(), self.context.key.get().map(ApiKeyId::as_str));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    http.method = method,
                    http.route = route,
                    http.status = status,
                    duration_ms,
                    request.id = request,
                    key.id = key,
                    error = chain,
                    "{method} {route}: {status}"
                )
            };
        }
        let watched = matches!(route, "/health" | "/health/live" | "/health/ready" | "/metrics");
        match status {
            500 => line!(error),
            501.. => line!(warn),
            ..400 if watched => line!(debug),
            _ => line!(info),
        }
        names::request_answered(method, route, status, duration.as_secs_f64());
    }
}

/// The one layer of the router: what it surrounds is a path's handler, whose pattern is known here.
///
/// One, with one future of its own on the heap, because each layer of a router costs several.
#[derive(Clone)]
pub(super) struct Frame<S> {
    api: Shared,
    inner: S,
}

impl Frame<()> {
    /// Around whatever it is laid.
    pub(super) fn around(api: &Shared) -> Self {
        Self { api: Arc::clone(api), inner: () }
    }
}

impl Layer<Route> for Frame<()> {
    type Service = Frame<Route>;

    fn layer(&self, inner: Route) -> Frame<Route> {
        Frame { api: Arc::clone(&self.api), inner }
    }
}

impl Service<Request> for Frame<Route> {
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, polling: &mut Polling<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request>::poll_ready(&mut self.inner, polling)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        // A route is always ready, and so are its copies.
        let (api, mut inner) = (Arc::clone(&self.api), self.inner.clone());
        let pattern = request.extensions().get::<MatchedPath>().cloned().map_or(Pattern::Unknown, Pattern::Matched);
        let handle = move |request| async move {
            let Ok(response) = inner.call(request).await;
            response
        };
        Box::pin(frame(api, pattern, request, handle).map(Ok))
    }
}

/// Handles a request, with all that surrounds it. `handle` only makes the future that does: a panic in that is caught.
#[expect(clippy::manual_async_fn, reason = "that would have two places for the request")]
pub(super) fn frame<F>(
    api: Shared,
    route: Pattern,
    mut request: Request,
    handle: impl FnOnce(Request) -> F,
) -> impl Future<Output = Response>
where
    F: Future<Output = Response>,
{
    async move {
        let clock = Arc::clone(&api.services.clock);
        let context = Arc::new(Context::new(request.headers()));
        let method = request.method().clone();
        let mut record = Record {
            context: Arc::clone(&context),
            began: clock.monotonic(),
            clock: Arc::clone(&clock),
            method: known(&method),
            route,
            status: CLIENT_LEFT,
            chain: None,
        };
        // What a POST asks for is done by other tasks, for many at once: hardly anything is logged in its own name.
        let span = if method == Method::POST {
            tracing::debug_span!("http.request", request.id = context.id)
        } else {
            tracing::info_span!("http.request", request.id = context.id)
        };
        request.extensions_mut().insert(Arc::clone(&context));
        // What is lost at the deadline is the wait for an answer: a commit under way goes on by itself.
        let response = tokio::select! {
            biased;
            handled = AssertUnwindSafe(handle(request)).catch_unwind().instrument(span) => match handled {
                Ok(response) => response,
                Err(panic) => panicked(panic.as_ref()),
            },
            () = clock.sleep(api.services.settings.request_timeout) => Problem::unavailable(
                "This took too long. Whether it was kept is not known; send it again, with the same Idempotency-Key if it had one.",
                1,
                Some("the request's deadline passed".into()),
            )
            .into_response(),
        };
        let mut response = if method == Method::OPTIONS { allowed(response) } else { response };
        record.status = response.status().as_u16();
        record.chain = explain(&mut response, &context.id, &method);
        let headers = response.headers_mut();
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        if let Ok(mut id) = HeaderValue::from_str(&context.id) {
            // No secret; but never to be seen again, and HTTP/2 would else remember it at both ends, in the place of another.
            id.set_sensitive(true);
            headers.insert(REQUEST_ID, id);
        }
        response
    }
}

/// Names the methods that a path knows in the document that refuses another one. Outside of the router, which adds
/// `Allow` to what the layers of its paths have answered.
pub(super) fn name_methods(mut response: Response) -> Response {
    if response.status() != StatusCode::METHOD_NOT_ALLOWED {
        return response;
    }
    let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let (Some(allowed), Some(id)) = (text(header::ALLOW), text(REQUEST_ID)) else { return response };
    let methods = allowed.replace(',', ", ");
    let problem = Problem::new(Kind::MethodNotAllowed, format!("This path knows {methods}."));
    let body = problem.body(id);
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    // `HEAD` has been answered without one, and no part of HTTP/2 behind this drops it.
    if !response.body().is_end_stream() {
        *response.body_mut() = Body::from(body);
    }
    response
}

/// `OPTIONS` of a path that exists: which methods it knows.
fn allowed(response: Response) -> Response {
    if response.status() != StatusCode::METHOD_NOT_ALLOWED {
        return response;
    }
    let mut answer = StatusCode::NO_CONTENT.into_response();
    if let Some(methods) = response.headers().get(header::ALLOW) {
        answer.headers_mut().insert(header::ALLOW, methods.clone());
    }
    answer
}

/// Writes the problem document of a response that is not a success. Returns what the log should say of its cause.
fn explain(response: &mut Response, request_id: &str, method: &Method) -> Option<String> {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return None;
    }
    if response.extensions().get::<Told>().is_none() && is_document(response) {
        // `/health` answers 503 with a document of its own.
        return None;
    }
    let problem =
        response.extensions().get::<Told>().map_or_else(|| Arc::new(of_status(status)), |told| Arc::clone(&told.0));
    *response.status_mut() = problem.kind().status();
    let body = problem.body(request_id);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    *response.body_mut() = if method == Method::HEAD { Body::empty() } else { Body::from(body) };
    problem.chain()
}

/// Whether the handler wrote a document that is meant to be read as it is.
fn is_document(response: &Response) -> bool {
    response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes() == super::ops::HEALTH_JSON.as_bytes())
}

/// What the framework refused by itself.
fn of_status(status: StatusCode) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::new(Kind::NotFound, "There is no such path."),
        StatusCode::METHOD_NOT_ALLOWED => Problem::new(Kind::MethodNotAllowed, "This path does not know this method."),
        StatusCode::REQUEST_TIMEOUT => Problem::new(Kind::Timeout, "The request did not arrive in time."),
        StatusCode::PAYLOAD_TOO_LARGE => Problem::new(Kind::TooLarge, "The body is too large."),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            Problem::new(Kind::UnsupportedMediaType, "Send `Content-Type: application/json`.")
        }
        status if status.is_server_error() => Problem::internal(format!("an unexplained {status}")),
        _ => Problem::new(Kind::BadRequest, "The request cannot be understood."),
    }
}

/// A method as a label: a bounded set.
fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "DELETE" => "DELETE",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// The answer to a request whose handler panicked: a bug of ours.
fn panicked(panic: &(dyn Any + Send)) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Problem::internal(format!("the handler panicked: {message}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_taken_over_only_if_it_is_short_and_visible() {
        let of = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            Context::new(&headers).id
        };
        assert_eq!(of(b"order-1042/7"), "order-1042/7");
        for strange in [&b"a b"[..], b"", b"\xc3\xa9", "x".repeat(129).as_bytes()] {
            assert_eq!(of(strange).len(), 36, "{strange:?} is replaced");
        }
        assert_ne!(Context::new(&HeaderMap::new()).id, Context::new(&HeaderMap::new()).id);
    }
}
