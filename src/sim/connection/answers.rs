//! What an answer says besides its status: the headers and the form of the body that a conduct asks for.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use jiff::fmt::rfc2822::DateTimePrinter;

use crate::{
    domain::clock::Timestamp,
    sim::conduct::{Conduct, ErrorBody, RetryAfter},
};

/// Adds `date` and `retry-after`, where they are wanted.
pub(super) fn add_headers(headers: &mut HeaderMap, conduct: &Conduct, status: u16, now: Timestamp) {
    if let Some(skew) = conduct.date_skew_ms
        && let Some(date) = date(now, skew)
    {
        headers.insert(header::DATE, date);
    }
    if matches!(status, 429 | 503)
        && let Some(after) = conduct.retry_after
        && let Some(value) = match after {
            RetryAfter::Seconds(seconds) => Some(HeaderValue::from(seconds)),
            RetryAfter::DateInSeconds(seconds) => date(now, i64::from(seconds) * 1000),
        }
    {
        headers.insert(header::RETRY_AFTER, value);
    }
}

/// `now` and so many milliseconds more, as HTTP writes it; `None` beyond the calendar.
fn date(now: Timestamp, more_ms: i64) -> Option<HeaderValue> {
    let at = jiff::Timestamp::from_millisecond(now.as_millis().saturating_add(more_ms)).ok()?;
    let text = DateTimePrinter::new().timestamp_to_rfc9110_string(&at).ok()?;
    HeaderValue::try_from(text).ok()
}

/// The body of a refusal in the form asked for, and its type. `json` is what it is on a good day.
pub(super) fn body(form: ErrorBody, reason: Option<&str>, json: Bytes) -> (Bytes, HeaderValue) {
    const JSON: HeaderValue = HeaderValue::from_static("application/json");
    let reason = || reason.unwrap_or_default().to_owned();
    match form {
        ErrorBody::Json => (json, JSON),
        ErrorBody::Empty => (Bytes::new(), JSON),
        ErrorBody::Truncated => (json.slice(..json.len() / 2), JSON),
        ErrorBody::Text => (Bytes::from(reason()), HeaderValue::from_static("text/plain")),
        ErrorBody::Html => (
            Bytes::from(format!("<html><body><h1>{}</h1></body></html>", reason())),
            HeaderValue::from_static("text/html"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_written_as_http_does_and_may_be_wrong() {
        let now = Timestamp::from_seconds(784_111_777);
        assert_eq!(date(now, 0).unwrap(), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date(now, -90_000).unwrap(), "Sun, 06 Nov 1994 08:48:07 GMT");
        assert_eq!(date(now, i64::MAX), None);
    }

    #[test]
    fn only_429_and_503_say_when_to_come_back() {
        let says = |status| {
            let mut headers = HeaderMap::new();
            let conduct = Conduct { retry_after: Some(RetryAfter::Seconds(30)), ..Conduct::default() };
            add_headers(&mut headers, &conduct, status, Timestamp::from_seconds(0));
            headers.get("retry-after").map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!((says(429), says(503)), (Some("30".to_owned()), Some("30".to_owned())));
        assert_eq!((says(200), says(400), says(500)), (None, None, None));
    }
}
