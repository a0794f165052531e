//! One push as an HTTP/2 request. Pure.
//!
//! Promises: every request carries topic (with the push type's suffix), push type, priority, expiration and `apns-id`,
//! and the collapse id where there is one. What all pushes of a notification share is prepared once ([`Template`]).
//! Following Apple's advice on HPACK (`apns-protocol.md` §2.4), the values that hardly repeat (`apns-id`,
//! `apns-expiration`, `apns-collapse-id`) are marked never-indexed; `h2` keeps `:path` and `authorization` out of the
//! table by itself.

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::AUTHORIZATION,
    uri::{Authority, PathAndQuery, Scheme},
};
use uuid::fmt::Hyphenated;

use super::{Head, Push};

const APNS_TOPIC: HeaderName = HeaderName::from_static("apns-topic");
const APNS_PUSH_TYPE: HeaderName = HeaderName::from_static("apns-push-type");
const APNS_PRIORITY: HeaderName = HeaderName::from_static("apns-priority");
const APNS_EXPIRATION: HeaderName = HeaderName::from_static("apns-expiration");
const APNS_COLLAPSE_ID: HeaderName = HeaderName::from_static("apns-collapse-id");
const APNS_ID: HeaderName = HeaderName::from_static("apns-id");

const PATH: &[u8] = b"/3/device/";

/// The headers that all pushes of one notification share, with the places for the two that differ already there, so
/// that filling them in moves nothing.
#[derive(Debug)]
pub struct Template {
    headers: HeaderMap,
}

/// A text that a value of the domain should never hold. Not possible with today's types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a part of the push cannot stand in a request")]
pub struct NotARequest;

impl Template {
    /// Prepares the shared headers.
    ///
    /// # Errors
    /// If a text cannot be a header's value; the domain's types exclude that.
    pub fn new(head: &Head) -> Result<Self, NotARequest> {
        let empty = HeaderValue::from_static("");
        let mut headers = HeaderMap::with_capacity(7);
        headers.insert(AUTHORIZATION, empty.clone());
        headers.insert(APNS_TOPIC, value(head.push_type.apns_topic(&head.topic))?);
        headers.insert(APNS_PUSH_TYPE, HeaderValue::from_static(head.push_type.as_str()));
        headers.insert(APNS_PRIORITY, HeaderValue::from_static(head.priority.as_str()));
        headers.insert(APNS_ID, empty);
        headers.insert(APNS_EXPIRATION, sensitive(HeaderValue::from(head.expiration.header_seconds())));
        if let Some(collapse_id) = &head.collapse_id {
            headers.insert(APNS_COLLAPSE_ID, sensitive(value(collapse_id.as_str().to_owned())?));
        }
        Ok(Self { headers })
    }

    /// The request for one device, without its body (the head's payload, sent as it is).
    ///
    /// # Errors
    /// If a text cannot stand in a request; the domain's types exclude that.
    pub fn request(
        &self,
        push: &Push,
        authority: &Authority,
        authorization: &HeaderValue,
    ) -> Result<Request<()>, NotARequest> {
        let token = push.token.as_hex();
        let mut path = BytesMut::with_capacity(PATH.len() + token.len());
        path.extend_from_slice(PATH);
        path.extend_from_slice(token.as_bytes());
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTPS);
        parts.authority = Some(authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_maybe_shared(path.freeze()).map_err(|_| NotARequest)?);

        let mut id = [0; Hyphenated::LENGTH];
        let id: &str = push.apns_id.as_uuid().hyphenated().encode_lower(&mut id);
        let id = HeaderValue::from_maybe_shared(Bytes::copy_from_slice(id.as_bytes())).map_err(|_| NotARequest)?;

        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| NotARequest)?;
        let mut headers = self.headers.clone();
        headers.insert(AUTHORIZATION, authorization.clone());
        headers.insert(APNS_ID, sensitive(id));
        *request.headers_mut() = headers;
        Ok(request)
    }
}

fn value(text: String) -> Result<HeaderValue, NotARequest> {
    HeaderValue::try_from(text).map_err(|_| NotARequest)
}

fn sensitive(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::{
        clock::Timestamp,
        notification::Lane,
        push::{ApnsId, Expiration, Priority, PushType, Recipient},
        topic::Environment,
    };

    pub(crate) fn push(push_type: PushType, collapse_id: Option<&str>) -> Push {
        let token = "a1b2c3d4".parse().unwrap();
        let notification = "0193515e-8f00-7abc-8def-0123456789ab".parse().unwrap();
        Push {
            apns_id: ApnsId::derive(notification, Recipient::Token(&token)),
            head: Arc::new(Head {
                topic: "fr.ocpizza.livreur".parse().unwrap(),
                push_type,
                priority: Priority::Ten,
                expiration: Expiration::At(Timestamp::from_millis(1_795_000_000_999)),
                collapse_id: collapse_id.map(|c| c.parse().unwrap()),
                payload: Bytes::from_static(b"{\"aps\":{\"alert\":\"Bonjour\"}}"),
                lane: Lane::Transactional,
                deadline: Timestamp::from_seconds(1_795_000_000),
            }),
            environment: Environment::Production,
            token,
        }
    }

    fn request(push: &Push) -> Request<()> {
        let mut token = HeaderValue::from_static("bearer x");
        token.set_sensitive(true);
        Template::new(&push.head)
            .unwrap()
            .request(push, &Authority::from_static("api.push.apple.com:2197"), &token)
            .unwrap()
    }

    #[test]
    fn a_request_is_a_post_to_the_device_with_every_header() {
        let push = push(PushType::Voip, Some("order-1042"));
        let request = request(&push);
        assert_eq!(request.method(), Method::POST);
        assert_eq!(request.uri(), "https://api.push.apple.com:2197/3/device/a1b2c3d4");
        let mut headers: Vec<(&str, &str)> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        headers.sort_unstable();
        let id = push.apns_id.to_string();
        assert_eq!(
            headers,
            [
                ("apns-collapse-id", "order-1042"),
                ("apns-expiration", "1795000000"),
                ("apns-id", id.as_str()),
                ("apns-priority", "10"),
                ("apns-push-type", "voip"),
                ("apns-topic", "fr.ocpizza.livreur.voip"),
                ("authorization", "bearer x"),
            ]
        );
        assert_eq!(id, id.to_lowercase());
    }

    #[test]
    fn without_a_collapse_id_there_is_no_such_header() {
        assert!(!request(&push(PushType::Alert, None)).headers().contains_key("apns-collapse-id"));
    }

    #[test]
    fn values_that_hardly_repeat_never_enter_the_header_table() {
        let request = request(&push(PushType::Alert, Some("order-1042")));
        let mut sensitive: Vec<&str> =
            request.headers().iter().filter(|(_, value)| value.is_sensitive()).map(|(name, _)| name.as_str()).collect();
        sensitive.sort_unstable();
        assert_eq!(sensitive, ["apns-collapse-id", "apns-expiration", "apns-id", "authorization"]);
    }
}
