//! What an answer means: for the push ([`read`]) and for the connection it came on ([`verdict`]). Pure.
//!
//! Promises: the whole table of `apns-protocol.md` §6.2, both spellings where documentation and wire differ; a reason
//! or a body that nobody has seen before is classified by its status and kept as it came. No answer is an error.

use std::time::Duration;

use http::{HeaderMap, header};

use crate::domain::{
    clock::Timestamp,
    outcome::{Answer, Busy, Fault, Outcome, Reason, Reply},
};

/// How much of an answer's body is read, in bytes. Apple's are below 100.
pub const MAX_BODY_BYTES: usize = 4096;

/// The longest `retry-after` that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// How much of a reason that nobody knows is kept, in bytes.
const MAX_REASON_BYTES: usize = 128;

/// What an answer says of the connection it came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Keep,
    /// Finish what is in flight, open no more streams, replace.
    Retire,
    /// Retire it unless it is fresh: a live connection does not learn of a bundle id, a capability or a transfer that
    /// came after it was opened (§2.1), and would go on saying no.
    RetireIfOld,
    /// Retire it if it says nothing else: a stale connection answers so, and one with an expired token (§6), but so does a
    /// live one now and then.
    RetireIfIll,
}

/// Reads an answer. `body` is at most [`MAX_BODY_BYTES`] of what came.
#[must_use]
pub fn read(status: u16, headers: &HeaderMap, body: &[u8], sent_at: Timestamp, now: Timestamp) -> Reply {
    let body = if status == 200 { Body::default() } else { Body::parse(body) };
    let reason = body.reason.as_deref().map(Reason::from);
    let outcome = outcome(status, reason.as_ref(), body.timestamp, || retry_after(headers, now));
    Reply {
        outcome,
        answer: Some(Answer {
            status,
            reason,
            apns_unique_id: headers.get("apns-unique-id").and_then(|v| v.to_str().ok()).map(|id| truncated(id).into()),
        }),
        sent_at: Some(sent_at),
    }
}

fn outcome(
    status: u16,
    reason: Option<&Reason>,
    timestamp: Option<Timestamp>,
    retry_after: impl FnOnce() -> Option<Duration>,
) -> Outcome {
    let withheld =
        || Outcome::Withheld(Fault { status, reason: reason.cloned().unwrap_or_else(|| Reason::Other("".into())) });
    match (status, reason) {
        (200, _) => Outcome::Accepted,
        (400, Some(Reason::BadDeviceToken)) => Outcome::BadToken,
        (400, Some(Reason::DeviceTokenNotForTopic)) => Outcome::WrongTopic,
        (400, Some(Reason::TopicDisallowed | Reason::MissingTopic | Reason::BadTopic)) => withheld(),
        // They name that connection or that server only: at once, elsewhere.
        (400, Some(Reason::IdleTimeout))
        | (403, Some(Reason::UnrelatedKeyIdInToken))
        | (503, Some(Reason::Shutdown)) => {
            Outcome::Deferred { whose: Busy::Server, after: Some(retry_after().unwrap_or_default()) }
        }
        (400 | 404 | 405 | 413, _) => Outcome::Rejected,
        (410, _) => Outcome::Gone { since: timestamp },
        (429, Some(Reason::TooManyRequests)) => Outcome::Deferred { whose: Busy::Device, after: retry_after() },
        (408 | 421 | 425 | 429 | 500..=599, _) => Outcome::Deferred { whose: Busy::Server, after: retry_after() },
        // 403, and what APNs never says: whoever answers so is not what we think we talk to.
        (401..=499, _) => withheld(),
        // Not 200 and no refusal: nobody can know what was done with the push.
        _ => Outcome::Unknown,
    }
}

/// What the answer says of the connection.
#[must_use]
pub fn verdict(answer: &Answer) -> Verdict {
    match (answer.status, answer.reason.as_ref()) {
        (400, Some(Reason::IdleTimeout))
        | (401 | 403 | 407 | 421, _)
        | (429, Some(Reason::TooManyProviderTokenUpdates))
        | (503, Some(Reason::Shutdown)) => Verdict::Retire,
        (400, Some(Reason::TopicDisallowed)) => Verdict::RetireIfOld,
        (500, _) => Verdict::RetireIfIll,
        (200 | 400..=599, _) => Verdict::Keep,
        _ => Verdict::Retire,
    }
}

#[derive(Debug, Default)]
struct Body {
    reason: Option<String>,
    timestamp: Option<Timestamp>,
}

impl Body {
    /// `{"reason": "…", "timestamp": 1795000000000}`; anything else is nothing.
    fn parse(bytes: &[u8]) -> Self {
        let Ok(serde_json::Value::Object(body)) = serde_json::from_slice(bytes) else {
            return Self::default();
        };
        Self {
            reason: body
                .get("reason")
                .and_then(serde_json::Value::as_str)
                .filter(|reason| !reason.is_empty())
                .map(|reason| truncated(reason).to_owned()),
            timestamp: body
                .get("timestamp")
                .and_then(serde_json::Value::as_i64)
                .filter(|millis| *millis > 0)
                .map(Timestamp::from_millis),
        }
    }
}

fn truncated(text: &str) -> &str {
    let end = (0..=MAX_REASON_BYTES.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    end.and_then(|end| text.get(..end)).unwrap_or("")
}

/// `retry-after`, as seconds or as an HTTP date. Not documented by Apple; used if present (§6.1).
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let after = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => http_date(text)?.since(now),
    };
    Some(after.min(MAX_RETRY_AFTER))
}

/// How many seconds APNs' clock is ahead of ours, from the `date` header.
#[must_use]
pub fn clock_skew_seconds(headers: &HeaderMap, now: Timestamp) -> Option<i64> {
    let theirs = http_date(headers.get(header::DATE)?.to_str().ok()?)?;
    Some(theirs.as_seconds().saturating_sub(now.as_seconds()))
}

fn http_date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(text)
        .ok()
        .map(|at| Timestamp::from_millis(at.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);
    const SENT: Timestamp = Timestamp::from_seconds(1_794_999_999);

    fn answered(status: u16, body: &str) -> Reply {
        read(status, &HeaderMap::new(), body.as_bytes(), SENT, NOW)
    }

    fn fault(status: u16, reason: &str) -> Outcome {
        Outcome::Withheld(Fault { status, reason: Reason::from(reason) })
    }

    const SERVER: Outcome = Outcome::Deferred { whose: Busy::Server, after: None };
    const ELSEWHERE: Outcome = Outcome::Deferred { whose: Busy::Server, after: Some(Duration::ZERO) };
    const DEVICE: Outcome = Outcome::Deferred { whose: Busy::Device, after: None };
    const GONE: Outcome = Outcome::Gone { since: None };

    #[test]
    fn every_row_of_apples_table_means_what_the_sheet_says() {
        use Outcome::{BadToken, Rejected, WrongTopic};
        use Verdict::{Keep, Retire, RetireIfIll, RetireIfOld};
        let rows = [
            (400, "BadCollapseId", Rejected, Keep),
            (400, "BadDeviceToken", BadToken, Keep),
            (400, "BadExpirationDate", Rejected, Keep),
            (400, "BadMessageId", Rejected, Keep),
            (400, "BadPriority", Rejected, Keep),
            (400, "BadTopic", fault(400, "BadTopic"), Keep),
            (400, "DeviceTokenNotForTopic", WrongTopic, Keep),
            (400, "DuplicateHeaders", Rejected, Keep),
            (400, "IdleTimeout", ELSEWHERE, Retire),
            (400, "InvalidPushType", Rejected, Keep),
            (400, "MissingDeviceToken", Rejected, Keep),
            (400, "MissingTopic", fault(400, "MissingTopic"), Keep),
            (400, "PayloadEmpty", Rejected, Keep),
            (400, "TopicDisallowed", fault(400, "TopicDisallowed"), RetireIfOld),
            (403, "BadCertificate", fault(403, "BadCertificate"), Retire),
            (403, "BadCertificateEnvironment", fault(403, "BadCertificateEnvironment"), Retire),
            (403, "ExpiredProviderToken", fault(403, "ExpiredProviderToken"), Retire),
            (403, "Forbidden", fault(403, "Forbidden"), Retire),
            (403, "InvalidProviderToken", fault(403, "InvalidProviderToken"), Retire),
            (403, "MissingProviderToken", fault(403, "MissingProviderToken"), Retire),
            (403, "UnrelatedKeyIdInToken", ELSEWHERE, Retire),
            (403, "BadEnvironmentKeyIdInToken", fault(403, "BadEnvironmentKeyIdInToken"), Retire),
            (403, "BadEnvironmentKeyInToken", fault(403, "BadEnvironmentKeyInToken"), Retire),
            (404, "BadPath", Rejected, Keep),
            (405, "MethodNotAllowed", Rejected, Keep),
            (410, "ExpiredToken", GONE, Keep),
            (410, "Unregistered", GONE, Keep),
            (413, "PayloadTooLarge", Rejected, Keep),
            (429, "TooManyProviderTokenUpdates", SERVER, Retire),
            (429, "TooManyRequests", DEVICE, Keep),
            (500, "InternalServerError", SERVER, RetireIfIll),
            (503, "ServiceUnavailable", SERVER, Keep),
            (503, "Shutdown", ELSEWHERE, Retire),
        ];
        for (status, reason, expected, connection) in rows {
            let reply = answered(status, &format!("{{\"reason\":\"{reason}\"}}"));
            assert_eq!(reply.outcome, expected, "{status} {reason}");
            let answer = reply.answer.unwrap();
            assert_eq!(verdict(&answer), connection, "{status} {reason}");
            assert_eq!(answer.status, status);
            assert_eq!(answer.reason.unwrap().as_str(), reason);
            assert_eq!(reply.sent_at, Some(SENT));
        }
    }

    #[test]
    fn what_nobody_has_seen_before_is_classified_by_its_status_and_kept() {
        use Outcome::{Rejected, Unknown};
        let rows = [
            (400, Rejected),
            (404, Rejected),
            (405, Rejected),
            (413, Rejected),
            (403, fault(403, "BrandNew")),
            (401, fault(401, "BrandNew")),
            (410, GONE),
            (429, SERVER),
            (500, SERVER),
            (502, SERVER),
            (503, SERVER),
            (599, SERVER),
            (204, Unknown),
            (302, Unknown),
        ];
        for (status, expected) in rows {
            let reply = answered(status, "{\"reason\":\"BrandNew\",\"more\":[1]}");
            assert_eq!(reply.outcome, expected, "{status}");
            assert_eq!(reply.answer.unwrap().reason, Some(Reason::Other("BrandNew".into())));
        }
    }

    #[test]
    fn a_body_that_cannot_be_read_has_no_reason_and_still_a_meaning() {
        for body in ["", "<html>", "{\"reason\":", "{}", "[]", "{\"reason\":7}", "{\"reason\":\"\"}"] {
            assert_eq!(answered(400, body).outcome, Outcome::Rejected, "{body}");
            assert_eq!(answered(403, body).outcome, fault(403, ""), "{body}");
            assert_eq!(answered(410, body).outcome, GONE, "{body}");
            assert_eq!(answered(429, body).outcome, SERVER, "{body}");
            let reply = answered(503, body);
            assert_eq!(reply.outcome, SERVER, "{body}");
            assert_eq!(reply.answer.unwrap().reason, None);
        }
    }

    #[test]
    fn a_reason_without_end_is_cut() {
        let reply = answered(400, &format!("{{\"reason\":\"{}\"}}", "é".repeat(500)));
        assert_eq!(reply.answer.unwrap().reason.unwrap().as_str().len(), 128);
    }

    #[test]
    fn acceptance_needs_no_body_and_keeps_the_unique_id() {
        let mut headers = HeaderMap::new();
        headers.insert("apns-unique-id", "5F5D…".parse().unwrap());
        let reply = read(200, &headers, b"", SENT, NOW);
        assert_eq!(reply.outcome, Outcome::Accepted);
        let answer = reply.answer.unwrap();
        assert_eq!((answer.status, answer.reason), (200, None));
        assert_eq!(verdict(&answered(200, "").answer.unwrap()), Verdict::Keep);
        headers.insert("apns-unique-id", "0f5d7b3a".parse().unwrap());
        let answer = read(200, &headers, b"", SENT, NOW).answer.unwrap();
        assert_eq!(answer.apns_unique_id.as_deref(), Some("0f5d7b3a"));
    }

    #[test]
    fn the_time_of_a_410_is_in_milliseconds() {
        let gone = |body: &str| answered(410, body).outcome;
        let at = Timestamp::from_millis(1_794_990_000_123);
        assert_eq!(
            gone("{\"reason\":\"Unregistered\",\"timestamp\":1794990000123}"),
            Outcome::Gone { since: Some(at) }
        );
        assert_eq!(gone("{\"reason\":\"Unregistered\",\"timestamp\":-4}"), GONE);
        assert_eq!(gone("{\"reason\":\"Unregistered\",\"timestamp\":\"now\"}"), GONE);
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date() {
        let after = |status: u16, reason: &str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", value.parse().unwrap());
            let body = format!("{{\"reason\":\"{reason}\"}}");
            match read(status, &headers, body.as_bytes(), SENT, NOW).outcome {
                Outcome::Deferred { after, .. } => after.map(|d| d.as_secs()),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(after(503, "ServiceUnavailable", "77"), Some(77));
        assert_eq!(after(429, "TooManyRequests", "3"), Some(3));
        assert_eq!(after(503, "Shutdown", "5"), Some(5));
        assert_eq!(after(503, "", "Wed, 18 Nov 2026 11:06:50 GMT"), Some(10), "1795000000 is 11:06:40 that day");
        assert_eq!(after(503, "", "Sun, 06 Nov 1994 08:49:37 GMT"), Some(0));
        assert_eq!(after(503, "", "soon"), None);
        assert_eq!(after(503, "", "99999999999"), Some(24 * 3600));
    }

    #[test]
    fn the_date_header_tells_how_far_the_clocks_are_apart() {
        let mut headers = HeaderMap::new();
        assert_eq!(clock_skew_seconds(&headers, NOW), None);
        headers.insert("date", "Wed, 18 Nov 2026 11:05:40 GMT".parse().unwrap());
        assert_eq!(clock_skew_seconds(&headers, NOW), Some(-60));
    }
}
