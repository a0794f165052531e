//! One push as an HTTP/2 request. Pure.
//!
//! Promises: every request carries topic (with the push type's suffix), push type, priority, expiration and `apns-id`,
//! and the collapse id where there is one. What requests share is prepared once ([`Requests`]).
//! Apple's advice on HPACK (`apns-protocol.md` §2.4) is followed: the values that hardly repeat (`apns-id`,
//! `apns-expiration`, `apns-collapse-id`) are marked never-indexed but for the first on a connection, whose name the
//! next ones refer to; `h2` keeps `:path` and `authorization` out of the table by itself.

use std::sync::{Arc, Weak};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::AUTHORIZATION,
    uri::{Authority, PathAndQuery, Scheme},
};
use uuid::fmt::Hyphenated;

use super::{
    Head,
    token::{ProviderToken, Slot},
};
use crate::domain::{
    device::DeviceToken,
    push::{ApnsId, Priority, PushType},
    topic::Topic,
};

const APNS_TOPIC: HeaderName = HeaderName::from_static("apns-topic");
const APNS_PUSH_TYPE: HeaderName = HeaderName::from_static("apns-push-type");
const APNS_PRIORITY: HeaderName = HeaderName::from_static("apns-priority");
const APNS_EXPIRATION: HeaderName = HeaderName::from_static("apns-expiration");
const APNS_COLLAPSE_ID: HeaderName = HeaderName::from_static("apns-collapse-id");
const APNS_ID: HeaderName = HeaderName::from_static("apns-id");

const PATH: &[u8] = b"/3/device/";

/// What one notification needs a place of its own for, here: so many are known at a time.
const KNOWN_HEADS: usize = 16;

/// So many combinations of topic, push type and priority are known at a time.
const KNOWN_KINDS: usize = 64;

/// A text that a value of the domain should never hold. Not possible with today's types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a part of the push cannot stand in a request")]
pub struct NotARequest;

/// The requests of one connection. What they share is prepared once, and shares no memory with other connections: no two
/// threads count references to the same bytes.
#[derive(Debug)]
pub struct Requests {
    authority: Authority,
    /// `None`: not authorized yet.
    token: Option<(Slot, HeaderValue)>,
    kinds: Vec<Kind>,
    heads: Vec<Prepared>,
    /// The newest head that was not known. A notification for one device is never met again: not worth a place.
    met_once: Weak<Head>,
    /// Whose names have not been sent yet.
    unnamed: Vec<HeaderName>,
}

/// The headers of a topic, push type and priority, with the places for the others already there, so that filling them
/// in moves nothing.
#[derive(Debug)]
struct Kind {
    topic: Topic,
    push_type: PushType,
    priority: Priority,
    headers: HeaderMap,
}

/// What all pushes of one notification share.
#[derive(Debug)]
struct Prepared {
    /// The weak reference keeps the place in memory from being used again, so the same place is the same head.
    head: Weak<Head>,
    headers: HeaderMap,
    payload: Bytes,
}

impl Requests {
    /// For one connection.
    #[must_use]
    pub fn new(authority: &Authority) -> Self {
        let own = Bytes::copy_from_slice(authority.as_str().as_bytes());
        Self {
            authority: Authority::from_maybe_shared(own).unwrap_or_else(|_| authority.clone()),
            token: None,
            kinds: Vec::new(),
            heads: Vec::new(),
            met_once: Weak::new(),
            unnamed: vec![APNS_ID, APNS_EXPIRATION, APNS_COLLAPSE_ID],
        }
    }

    /// The provider token of the requests from now on.
    pub fn authorize(&mut self, token: &ProviderToken) {
        if self.token.as_ref().is_some_and(|(slot, _)| *slot == token.slot()) {
            return;
        }
        let mut own = value(&String::from_utf8_lossy(token.authorization().as_bytes()));
        if let Ok(own) = &mut own {
            own.set_sensitive(true);
        }
        let own = own.unwrap_or_else(|_| token.authorization().clone());
        let all = self.kinds.iter_mut().map(|k| &mut k.headers).chain(self.heads.iter_mut().map(|p| &mut p.headers));
        for headers in all {
            headers.insert(AUTHORIZATION, own.clone());
        }
        self.token = Some((token.slot(), own));
    }

    /// A push to the device at `path`, as a request and its body.
    ///
    /// # Errors
    /// If a text cannot stand in a request, which the domain's types exclude, or before [`Self::authorize`].
    pub fn make(
        &mut self,
        head: &Arc<Head>,
        path: PathAndQuery,
        apns_id: &ApnsId,
    ) -> Result<(Request<()>, Bytes), NotARequest> {
        let (mut headers, payload) = self.share(head)?;
        let mut id = [0; Hyphenated::LENGTH];
        let id: &str = apns_id.as_uuid().hyphenated().encode_lower(&mut id);
        headers.insert(APNS_ID, sensitive(value(id)?));
        self.unnamed.retain(|name| match headers.get_mut(name) {
            Some(value) => {
                value.set_sensitive(false);
                false
            }
            None => true,
        });

        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTPS);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| NotARequest)?;
        *request.headers_mut() = headers;
        Ok((request, payload))
    }

    /// The headers and the body that all pushes of a notification share.
    fn share(&mut self, head: &Arc<Head>) -> Result<(HeaderMap, Bytes), NotARequest> {
        let is_it = |known: &Weak<Head>| std::ptr::eq(known.as_ptr(), Arc::as_ptr(head));
        if let Some(prepared) = self.heads.iter().find(|prepared| is_it(&prepared.head)) {
            return Ok((prepared.headers.clone(), prepared.payload.clone()));
        }
        let mut headers = self.kind(head)?.clone();
        headers.insert(APNS_EXPIRATION, sensitive(HeaderValue::from(head.expiration.header_seconds())));
        match &head.collapse_id {
            Some(collapse_id) => drop(headers.insert(APNS_COLLAPSE_ID, sensitive(value(collapse_id.as_str())?))),
            None => drop(headers.remove(APNS_COLLAPSE_ID)),
        }
        if is_it(&self.met_once) {
            self.heads.truncate(KNOWN_HEADS - 1);
            let payload = Bytes::copy_from_slice(&head.payload);
            self.heads.insert(0, Prepared { head: Arc::downgrade(head), headers: headers.clone(), payload });
        } else {
            self.met_once = Arc::downgrade(head);
        }
        Ok((headers, head.payload.clone()))
    }

    fn kind(&mut self, head: &Head) -> Result<&HeaderMap, NotARequest> {
        let is_it = |k: &Kind| k.priority == head.priority && k.push_type == head.push_type && k.topic == head.topic;
        let place = self.kinds.iter().position(is_it);
        if place.is_none() {
            let (_, authorization) = self.token.as_ref().ok_or(NotARequest)?;
            self.kinds.truncate(KNOWN_KINDS - 1);
            self.kinds.insert(0, Kind::new(head, authorization.clone())?);
        }
        self.kinds.get(place.unwrap_or(0)).map(|kind| &kind.headers).ok_or(NotARequest)
    }
}

impl Kind {
    fn new(head: &Head, authorization: HeaderValue) -> Result<Self, NotARequest> {
        let mut headers = HeaderMap::with_capacity(7);
        headers.insert(AUTHORIZATION, authorization);
        headers.insert(APNS_TOPIC, value(&head.push_type.apns_topic(&head.topic))?);
        headers.insert(APNS_PUSH_TYPE, HeaderValue::from_static(head.push_type.as_str()));
        headers.insert(APNS_PRIORITY, HeaderValue::from_static(head.priority.as_str()));
        for name in [APNS_ID, APNS_EXPIRATION, APNS_COLLAPSE_ID] {
            headers.insert(name, HeaderValue::from_static(""));
        }
        Ok(Self { topic: head.topic.clone(), push_type: head.push_type, priority: head.priority, headers })
    }
}

/// Where the request for a device goes.
///
/// # Errors
/// If the token cannot stand in an address; the domain's type excludes that.
pub fn path(token: &DeviceToken) -> Result<PathAndQuery, NotARequest> {
    let token = token.as_hex();
    let mut path = BytesMut::with_capacity(PATH.len() + token.len());
    path.extend_from_slice(PATH);
    path.extend_from_slice(token.as_bytes());
    PathAndQuery::from_maybe_shared(path.freeze()).map_err(|_| NotARequest)
}

fn value(text: &str) -> Result<HeaderValue, NotARequest> {
    HeaderValue::from_str(text).map_err(|_| NotARequest)
}

fn sensitive(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        apns::{Push, credential, token},
        domain::{
            clock::Timestamp,
            notification::Lane,
            push::{Expiration, Recipient},
            topic::Environment,
        },
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

    fn requests() -> Requests {
        let mut requests = Requests::new(&Authority::from_static("api.push.apple.com:2197"));
        requests.authorize(&token(1_794_999_600));
        requests
    }

    fn token(at: i64) -> ProviderToken {
        token::mint(&credential::tests::credential(), Slot::at(Timestamp::from_seconds(at)))
    }

    fn make(requests: &mut Requests, push: &Push) -> Request<()> {
        let (request, payload) = requests.make(&push.head, path(&push.token).unwrap(), &push.apns_id).unwrap();
        assert_eq!(payload, push.head.payload);
        request
    }

    #[test]
    fn a_request_is_a_post_to_the_device_with_every_header() {
        let push = push(PushType::Voip, Some("order-1042"));
        let request = make(&mut requests(), &push);
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
                ("authorization", token(1_794_999_600).authorization().to_str().unwrap()),
            ]
        );
        assert_eq!(id, id.to_lowercase());
    }

    #[test]
    fn without_a_collapse_id_there_is_no_such_header() {
        let mut requests = requests();
        for _ in 0..3 {
            let request = make(&mut requests, &push(PushType::Alert, None));
            assert!(!request.headers().contains_key("apns-collapse-id"));
        }
    }

    #[test]
    fn values_that_hardly_repeat_enter_the_header_table_once_for_their_name() {
        let sensitive = |request: &Request<()>| {
            let headers = request.headers().iter().filter(|(_, value)| value.is_sensitive());
            let mut names: Vec<String> = headers.map(|(name, _)| name.to_string()).collect();
            names.sort_unstable();
            names
        };
        let mut requests = requests();
        assert_eq!(sensitive(&make(&mut requests, &push(PushType::Alert, None))), ["authorization"]);
        let first_with_collapse_id = make(&mut requests, &push(PushType::Alert, Some("order-1042")));
        assert_eq!(sensitive(&first_with_collapse_id), ["apns-expiration", "apns-id", "authorization"]);
        let push = push(PushType::Alert, Some("order-1043"));
        for _ in 0..4 {
            let request = make(&mut requests, &push);
            assert_eq!(sensitive(&request), ["apns-collapse-id", "apns-expiration", "apns-id", "authorization"]);
        }
    }

    #[test]
    fn what_is_prepared_never_mixes_notifications_topics_or_provider_tokens() {
        let mut requests = requests();
        let of = |topic: &str, push_type, collapse_id: &str| {
            let mut push = push(push_type, Some(collapse_id));
            let head = Arc::make_mut(&mut push.head);
            head.topic = topic.parse().unwrap();
            head.payload = Bytes::copy_from_slice(collapse_id.as_bytes());
            push
        };
        let pushes: Vec<Push> = (0..100)
            .map(|n| {
                let push_type = [PushType::Alert, PushType::Voip][n % 2];
                of(&format!("fr.example.app{}", n % 70), push_type, &format!("id-{n}"))
            })
            .collect();
        for round in 0..4 {
            let token = token(1_794_999_600 + round * 1800);
            requests.authorize(&token);
            for (n, push) in pushes.iter().enumerate() {
                let request = make(&mut requests, push);
                let header = |name| request.headers()[name].to_str().unwrap().to_owned();
                assert_eq!(header("apns-topic"), push.head.push_type.apns_topic(&push.head.topic));
                assert_eq!(header("apns-collapse-id"), format!("id-{n}"));
                assert_eq!(request.headers()["authorization"], token.authorization());
            }
        }
    }
}
