//! Reads the body of a request, once its caller is known to be allowed to send one.
//!
//! Promises: a body is declared as JSON, arrives within its time and is no longer than its path allows; all large
//! bodies together have a bound, beyond which the answer is 503 and nothing is read.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequest, Request},
};
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::{HeaderMap, header, request::Parts};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Shared,
    problem::{Kind, Problem},
};

/// The longest body of a registration or of any other small request.
pub const SMALL_BYTES: usize = 64 * 1024;

/// The longest body of a notification: 20,000 tokens of 256 bytes in hex, with quotes and commas, and a payload.
pub const NOTIFICATION_BYTES: usize = 12 * 1024 * 1024;

/// Room is taken from the common budget in steps of this.
const STEP_BYTES: usize = 256 * 1024;

/// A body that has not been read yet.
pub(super) struct Incoming {
    /// The request's headers.
    pub(super) headers: HeaderMap,
    body: Body,
    api: Shared,
}

impl FromRequest<Shared> for Incoming {
    type Rejection = std::convert::Infallible;

    async fn from_request(request: Request, api: &Shared) -> Result<Self, Self::Rejection> {
        let (parts, body) = request.into_parts();
        Ok(Self::of(parts, body, api))
    }
}

/// A body that was read, and its share of the common budget.
pub(super) struct Read {
    /// The bytes.
    pub(super) bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

impl Incoming {
    /// Of a request that was taken apart.
    pub(super) fn of(parts: Parts, body: Body, api: &Shared) -> Self {
        Self { headers: parts.headers, body, api: Arc::clone(api) }
    }

    /// The whole body, if it is JSON by its header, in time, and no longer than `limit`.
    ///
    /// Not an `async fn`: that would have two places for what it is made of.
    pub(super) fn read(self, limit: usize) -> impl Future<Output = Result<Read, Problem>> + use<> {
        let Self { headers, body, api } = self;
        let collecting = expected(&headers, limit).map(|bytes| collect(body, Arc::clone(&api), limit, bytes));
        async move {
            let collecting = collecting?;
            tokio::pin!(collecting);
            // Of a small one all is here mostly, and nothing has to be waited for.
            if let Some(read) = collecting.as_mut().now_or_never() {
                return read;
            }
            let patience = api.services.settings.body_timeout;
            tokio::select! {
                biased;
                read = collecting => read,
                () = api.services.clock.sleep(patience) => Err(Problem::new(
                    Kind::Timeout,
                    format!("The body did not arrive within {} seconds.", patience.as_secs()),
                )),
            }
        }
    }
}

/// How much room a body is given at first, by what its headers declare.
fn expected(headers: &HeaderMap, limit: usize) -> Result<usize, Problem> {
    declared_as_json(headers)?;
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<usize>().ok())
        .unwrap_or_default();
    if declared > limit {
        return Err(too_large(limit));
    }
    Ok(declared.min(SMALL_BYTES))
}

async fn collect(mut body: Body, api: Shared, limit: usize, expected: usize) -> Result<Read, Problem> {
    let mut bytes = BytesMut::with_capacity(expected);
    let mut share: Option<OwnedSemaphorePermit> = None;
    let mut room = SMALL_BYTES;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::new(Kind::BadRequest, "The body broke off or is malformed."))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        while bytes.len() + data.len() > room {
            let more = super::take_room(&api.bodies, STEP_BYTES).ok_or_else(|| {
                Problem::unavailable("Too many large requests are being read. Send this one again.", 1, None)
            })?;
            match &mut share {
                Some(share) => share.merge(more),
                None => share = Some(more),
            }
            room += STEP_BYTES;
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Read { bytes: bytes.freeze(), _share: share })
}

fn too_large(limit: usize) -> Problem {
    Problem::new(Kind::TooLarge, format!("The body of this request may have at most {limit} bytes."))
}

fn declared_as_json(headers: &HeaderMap) -> Result<(), Problem> {
    let refused = |detail| Err(Problem::new(Kind::UnsupportedMediaType, detail));
    if headers.get(header::CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return refused("Compressed bodies are not read: send it without Content-Encoding.");
    }
    let Some(declared) = headers.get(header::CONTENT_TYPE) else {
        return refused("Send `Content-Type: application/json`.");
    };
    let declared = declared.to_str().unwrap_or_default().to_ascii_lowercase();
    let mut parts = declared.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    let json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    if !json {
        return refused("This is declared as something else: send `Content-Type: application/json`.");
    }
    let foreign = parts
        .filter_map(|part| part.strip_prefix("charset="))
        .any(|charset| !matches!(charset.trim_matches('"'), "utf-8" | "utf8" | "us-ascii"));
    if foreign {
        return refused("JSON is written in UTF-8: leave the charset out.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_json_in_utf_8_is_read() {
        let of = |text: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = text {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(text));
            }
            declared_as_json(&headers).is_ok()
        };
        for right in ["application/json", "Application/JSON; charset=UTF-8", "application/vnd.shop+json"] {
            assert!(of(Some(right)), "{right}");
        }
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin1", ""] {
            assert!(!of(Some(wrong)), "{wrong}");
        }
        assert!(!of(None));
    }

    #[test]
    fn the_longest_list_of_tokens_fits() {
        let (audience, quotes, frame) = (20_000, 3, 64 * 1024);
        assert!(audience * (2 * 256 + quotes) + frame <= NOTIFICATION_BYTES);
    }
}
