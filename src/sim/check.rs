//! The checks a request passes before its push is accepted, in the order of `apns-protocol.md` §13.
//!
//! Promises: pure, apart from what it is given; the first failing check answers. Apple documents no order; this one
//! agrees with Apple's prose and with what others probed. Where Apple is silent or its pages disagree (the uncertainties
//! of `apns-protocol.md` §15), strict checks refuse and lenient ones let through. Check 5 is `provider_token`, the registry half of check 7 is
//! `devices`, check 9 is `fault`.

use http::{HeaderMap, HeaderName, Method, header};
use uuid::Uuid;

use super::{
    devices, identifiers,
    push_type::{MAX_BODY_BYTES, PushType},
    reason::Reason,
};

/// The longest `apns-collapse-id` (Apple: "Sending notification requests to APNs").
pub const MAX_COLLAPSE_ID_BYTES: usize = 64;
/// The last `apns-expiration` that is a time and no mistake: the end of the year 9999. Milliseconds lie beyond.
pub const MAX_EXPIRATION_SECONDS: u64 = 253_402_300_799;

const PATH: &str = "/3/device/";

static EXPIRATION: HeaderName = HeaderName::from_static("apns-expiration");
static PRIORITY: HeaderName = HeaderName::from_static("apns-priority");
static PUSH_TYPE: HeaderName = HeaderName::from_static("apns-push-type");
static COLLAPSE_ID: HeaderName = HeaderName::from_static("apns-collapse-id");
static TOPIC: HeaderName = HeaderName::from_static("apns-topic");
/// The name of the header that names a push.
pub(super) static ID: HeaderName = HeaderName::from_static("apns-id");

/// Checks 3: the path and then the method. Gives the device token's place in the path, unchecked.
pub(super) fn route<'a>(method: &Method, path: &'a str) -> Result<&'a str, Reason> {
    let token = place(path).ok_or(Reason::BadPath)?;
    if *method == Method::POST { Ok(token) } else { Err(Reason::MethodNotAllowed) }
}

/// The device token's place in a path, unchecked.
pub(super) fn place(path: &str) -> Option<&str> {
    path.strip_prefix(PATH)
}

/// Check 4: no `apns-*` header and no `authorization` stands twice.
pub(super) fn duplicates(headers: &HeaderMap) -> Result<(), Reason> {
    if headers.len() == headers.keys_len() {
        return Ok(());
    }
    let counts = |name: &header::HeaderName| *name == header::AUTHORIZATION || name.as_str().starts_with("apns-");
    let twice = headers.keys().filter(|name| counts(name)).any(|name| headers.get_all(name).iter().nth(1).is_some());
    if twice { Err(Reason::DuplicateHeaders) } else { Ok(()) }
}

/// What the headers of a request say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Push<'a> {
    /// What the request brought as `apns-id`.
    pub(super) id: Option<Uuid>,
    /// Seconds since the epoch.
    pub(super) expiration: Option<u64>,
    pub(super) priority: Option<u8>,
    pub(super) kind: Option<PushType>,
    pub(super) collapse_id: Option<&'a [u8]>,
    pub(super) topic: &'a str,
}

/// Whether what may be refused is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Strict,
    /// Whatever passes strictly passes with the same meaning.
    Lenient,
}

/// Check 6, all but whether the sender may send to the topic. `only_topic` is that of a certificate that has no other.
pub(super) fn push<'a>(headers: &'a HeaderMap, mode: Mode, only_topic: Option<&'a str>) -> Result<Push<'a>, Reason> {
    let is_strict = mode == Mode::Strict;
    let value = |name: &HeaderName| headers.get(name).map(http::HeaderValue::as_bytes);
    let id = value(&ID).map(|id| message_id(id, mode).ok_or(Reason::BadMessageId)).transpose()?;
    let expiration =
        value(&EXPIRATION).map(|time| expiration(time, mode).ok_or(Reason::BadExpirationDate)).transpose()?;
    let priority = value(&PRIORITY).map(|priority| self::priority(priority).ok_or(Reason::BadPriority)).transpose()?;
    let kind = value(&PUSH_TYPE).map(|kind| push_type(kind, mode).ok_or(Reason::InvalidPushType)).transpose()?;
    if is_strict && kind.is_none() {
        return Err(Reason::InvalidPushType); // needed on watchOS only, and nobody can tell: U34
    }
    if is_strict && kind == Some(PushType::Background) && priority == Some(10) {
        return Err(Reason::BadPriority); // documented as "an error"; the string is what uniqush saw: U33
    }
    let collapse_id = value(&COLLAPSE_ID);
    if collapse_id.is_some_and(|id| id.len() > MAX_COLLAPSE_ID_BYTES) {
        return Err(Reason::BadCollapseId);
    }
    let own = value(&TOPIC).filter(|topic| !topic.is_empty());
    let topic = own.or(only_topic.map(str::as_bytes)).ok_or(Reason::MissingTopic)?;
    let topic = std::str::from_utf8(topic).ok().filter(|topic| is_topic(topic)).ok_or(Reason::BadTopic)?;
    Ok(Push { id, expiration, priority, kind, collapse_id, topic })
}

/// Check 7, the form of the device token.
pub(super) fn device_token(token: &str) -> Result<(), Reason> {
    if token.is_empty() {
        Err(Reason::MissingDeviceToken)
    } else if devices::is_well_formed(token) {
        Ok(())
    } else {
        Err(Reason::BadDeviceToken)
    }
}

/// Check 8: the size of the body.
pub(super) fn body(bytes: usize, push_type: Option<PushType>) -> Result<(), Reason> {
    if bytes == 0 {
        Err(Reason::PayloadEmpty)
    } else if bytes > push_type.map_or(MAX_BODY_BYTES, PushType::max_body_bytes) {
        Err(Reason::PayloadTooLarge)
    } else {
        Ok(())
    }
}

/// A UUID in canonical form, which Apple writes in lower case; if lenient, in any.
fn message_id(value: &[u8], mode: Mode) -> Option<Uuid> {
    let is_as_written = mode == Mode::Lenient || !value.iter().any(u8::is_ascii_uppercase);
    identifiers::canonical(value).filter(|_| is_as_written)
}

/// Seconds since the epoch. What is no such time, but a number, is one if lenient: U28.
fn expiration(value: &[u8], mode: Mode) -> Option<u64> {
    if mode == Mode::Lenient {
        let (is_negative, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
        let seconds = (!digits.is_empty() && digits.iter().all(u8::is_ascii_digit)).then(|| {
            digits.iter().fold(0, |sum: u64, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
        });
        return if is_negative { seconds.map(|_| 0) } else { seconds };
    }
    if value.is_empty() || value.len() > 12 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = value.iter().fold(0, |sum: u64, digit| sum * 10 + u64::from(digit - b'0'));
    (seconds <= MAX_EXPIRATION_SECONDS).then_some(seconds)
}

/// A push type, in lower case or, if lenient, in any: U27.
fn push_type(value: &[u8], mode: Mode) -> Option<PushType> {
    match mode {
        Mode::Strict => PushType::parse(value),
        Mode::Lenient => PushType::parse(&value.to_ascii_lowercase()),
    }
}

const fn priority(value: &[u8]) -> Option<u8> {
    match value {
        b"10" => Some(10),
        b"5" => Some(5),
        b"1" => Some(1),
        _ => None,
    }
}

/// A topic is a bundle id, with a suffix perhaps: letters, digits, `-`, `_` and dots between non-empty parts.
fn is_topic(topic: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    topic.len() <= 255 && topic.split('.').all(is_part)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn with_topic(name: &'static str, value: &str) -> Result<(), Reason> {
        with_mode(name, value, Mode::Strict)
    }

    fn with_mode(name: &'static str, value: &str, mode: Mode) -> Result<(), Reason> {
        let mut map = headers(&[("apns-topic", "a.b"), ("apns-push-type", "alert")]);
        map.insert(name, HeaderValue::from_str(value).unwrap());
        push(&map, mode, None).map(|_| ())
    }

    #[test]
    fn the_path_is_looked_at_before_the_method() {
        assert_eq!(route(&Method::POST, "/3/device/ab"), Ok("ab"));
        assert_eq!(route(&Method::POST, "/3/device/"), Ok(""));
        assert_eq!(route(&Method::HEAD, "/3/device/ab"), Err(Reason::MethodNotAllowed));
        for bad in ["/", "/3/device", "/2/device/ab", "/3/devices/ab", "/4/broadcasts/apps/a.b"] {
            assert_eq!(route(&Method::GET, bad), Err(Reason::BadPath), "{bad}");
        }
    }

    #[test]
    fn only_apns_headers_and_authorization_may_not_stand_twice() {
        assert_eq!(duplicates(&headers(&[("apns-topic", "a"), ("accept", "b")])), Ok(()));
        let mut map = headers(&[("apns-topic", "a"), ("accept", "b")]);
        map.append("accept", HeaderValue::from_static("c"));
        assert_eq!(duplicates(&map), Ok(()));
        for name in ["apns-topic", "apns-id", "authorization"] {
            let mut map = headers(&[(name, "a")]);
            map.append(name, HeaderValue::from_static("a"));
            assert_eq!(duplicates(&map), Err(Reason::DuplicateHeaders), "{name}");
        }
    }

    #[test]
    fn each_header_is_refused_with_its_own_reason() {
        for (name, value, reason) in [
            ("apns-id", "1234", Reason::BadMessageId),
            ("apns-id", "", Reason::BadMessageId),
            ("apns-expiration", "soon", Reason::BadExpirationDate),
            ("apns-expiration", "-1", Reason::BadExpirationDate),
            ("apns-expiration", "1.5", Reason::BadExpirationDate),
            ("apns-expiration", "1795372500000", Reason::BadExpirationDate),
            ("apns-priority", "7", Reason::BadPriority),
            ("apns-priority", "high", Reason::BadPriority),
            ("apns-push-type", "Alert", Reason::InvalidPushType),
            ("apns-push-type", "", Reason::InvalidPushType),
            ("apns-collapse-id", &"x".repeat(65), Reason::BadCollapseId),
        ] {
            assert_eq!(with_topic(name, value), Err(reason), "{name}: {value}");
        }
        for (name, value) in [
            ("apns-id", "123e4567-e89b-12d3-a456-4266554400a0"),
            ("apns-expiration", "0"),
            ("apns-expiration", "253402300799"),
            ("apns-priority", "1"),
            ("apns-push-type", "widgets"),
            ("apns-collapse-id", &"x".repeat(64)),
        ] {
            assert_eq!(with_topic(name, value), Ok(()), "{name}: {value}");
        }
    }

    #[test]
    fn a_background_push_may_not_ask_for_priority_10() {
        let background = |priority| {
            let map = headers(&[("apns-topic", "a.b"), ("apns-push-type", "background"), ("apns-priority", priority)]);
            push(&map, Mode::Strict, None).map(|_| ())
        };
        assert_eq!(background("10"), Err(Reason::BadPriority));
        assert_eq!(background("5"), Ok(()));
    }

    #[test]
    fn a_topic_is_needed_and_looks_like_a_bundle_id() {
        assert_eq!(
            push(&headers(&[("apns-push-type", "alert")]), Mode::Strict, None).err(),
            Some(Reason::MissingTopic)
        );
        assert_eq!(with_topic("apns-topic", ""), Err(Reason::MissingTopic));
        for bad in ["a b", "a..b", ".a", "a.", "<com.x.y>", "a/b", "é"] {
            assert_eq!(with_topic("apns-topic", bad), Err(Reason::BadTopic), "{bad}");
        }
        for good in
            ["fr.ocpizza.livreur", "fr.ocpizza.livreur.push-type.liveactivity", "com.apple.mgmt.External.0a1b-2c"]
        {
            assert_eq!(with_topic("apns-topic", good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_apple_may_refuse_is_refused_strictly_and_let_through_leniently() {
        for (name, value, reason) in [
            ("apns-id", "123E4567-E89B-12D3-A456-4266554400A0", Reason::BadMessageId),
            ("apns-push-type", "Alert", Reason::InvalidPushType),
            ("apns-expiration", "1795372500000", Reason::BadExpirationDate),
            ("apns-expiration", "-1", Reason::BadExpirationDate),
            ("apns-expiration", "99999999999999999999999", Reason::BadExpirationDate),
        ] {
            assert_eq!(with_mode(name, value, Mode::Strict), Err(reason), "{name}: {value}");
            assert_eq!(with_mode(name, value, Mode::Lenient), Ok(()), "{name}: {value}");
        }
        let bare = headers(&[("apns-topic", "a.b")]);
        assert_eq!(push(&bare, Mode::Strict, None).err(), Some(Reason::InvalidPushType));
        assert_eq!(push(&bare, Mode::Lenient, None).map(|push| push.kind), Ok(None));
        let loud = headers(&[("apns-topic", "a.b"), ("apns-push-type", "background"), ("apns-priority", "10")]);
        assert_eq!(push(&loud, Mode::Strict, None).err(), Some(Reason::BadPriority));
        assert_eq!(push(&loud, Mode::Lenient, None).map(|push| push.priority), Ok(Some(10)));
        for (name, value) in [("apns-push-type", "shout"), ("apns-expiration", "soon"), ("apns-expiration", "-")] {
            assert!(with_mode(name, value, Mode::Lenient).is_err(), "{name}: {value}");
        }
    }

    #[test]
    fn the_first_failing_header_answers() {
        let all =
            headers(&[("apns-id", "x"), ("apns-expiration", "x"), ("apns-priority", "x"), ("apns-push-type", "x")]);
        assert_eq!(push(&all, Mode::Strict, None).err(), Some(Reason::BadMessageId));
        let later = headers(&[("apns-priority", "x"), ("apns-push-type", "x")]);
        assert_eq!(push(&later, Mode::Strict, None).err(), Some(Reason::BadPriority));
    }

    #[test]
    fn a_body_has_one_to_4096_bytes_and_5120_for_voip() {
        assert_eq!(body(0, Some(PushType::Alert)), Err(Reason::PayloadEmpty));
        assert_eq!(body(2, None), Ok(()));
        assert_eq!(body(4096, Some(PushType::Alert)), Ok(()));
        assert_eq!(body(4097, Some(PushType::Alert)), Err(Reason::PayloadTooLarge));
        assert_eq!(body(4097, None), Err(Reason::PayloadTooLarge));
        assert_eq!(body(5120, Some(PushType::Voip)), Ok(()));
        assert_eq!(body(5121, Some(PushType::Voip)), Err(Reason::PayloadTooLarge));
    }

    #[test]
    fn a_device_token_is_there_and_is_hex() {
        assert_eq!(device_token(""), Err(Reason::MissingDeviceToken));
        assert_eq!(device_token("abc"), Err(Reason::BadDeviceToken));
        assert_eq!(device_token("ab/cd"), Err(Reason::BadDeviceToken));
        assert_eq!(device_token("abcd"), Ok(()));
    }
}
