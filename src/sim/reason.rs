//! Every reason APNs gives for refusing a push, with its status.
//!
//! Promises: this table is the simulator's own, typed from Apple's page "Handling notification responses from APNs"
//! (and two wire variants that others observed). It shares no line with the client's table, so that a mistake in one
//! is found by the other.

macro_rules! reasons {
    ($($status:literal $variant:ident $doc:literal;)*) => {
        /// A reason string APNs answers with; the variant's name is the string.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $(#[doc = $doc] $variant,)* }

        impl Reason {
            /// All of them, in the order of the variants.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The HTTP status that goes with it.
            #[must_use]
            pub const fn status(self) -> u16 { match self { $(Self::$variant => $status,)* } }

            /// The string in the answer's `reason`.
            #[must_use]
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => stringify!($variant),)* } }

            /// The whole answer body of a refusal without a timestamp.
            pub(super) const fn body(self) -> &'static str {
                match self { $(Self::$variant => concat!("{\"reason\":\"", stringify!($variant), "\"}"),)* }
            }
        }
    };
}

reasons! {
    400 BadCollapseId "The collapse id is longer than 64 bytes.";
    400 BadDeviceToken "The device token is malformed, or of the other environment.";
    400 BadExpirationDate "`apns-expiration` is no time.";
    400 BadMessageId "`apns-id` is no UUID.";
    400 BadPriority "`apns-priority` is not 10, 5 or 1, or not allowed for the push type.";
    400 BadTopic "`apns-topic` is malformed.";
    400 DeviceTokenNotForTopic "The device token belongs to another topic.";
    400 DuplicateHeaders "An `apns-*` header or `authorization` stands twice.";
    400 IdleTimeout "The connection was idle for too long.";
    400 InvalidPushType "`apns-push-type` is unknown.";
    400 MissingDeviceToken "The path has no device token.";
    400 MissingTopic "`apns-topic` is missing.";
    400 PayloadEmpty "There is no body.";
    400 TopicDisallowed "This key may not push to this topic.";
    403 BadCertificate "The client certificate is invalid.";
    403 BadCertificateEnvironment "The client certificate is for the other environment.";
    403 BadEnvironmentKeyIdInToken "The key is not for this environment.";
    403 BadEnvironmentKeyInToken "The same, as others saw it spelled on the wire (`APNSwift`, PR 229).";
    403 ExpiredProviderToken "The provider token is older than an hour.";
    403 Forbidden "The action is not allowed.";
    403 InvalidProviderToken "The provider token cannot be read, or its signature, key or team is wrong.";
    403 MissingProviderToken "There is no provider token.";
    403 UnrelatedKeyIdInToken "The key is not the one this connection began with.";
    404 BadPath "The path is wrong.";
    405 MethodNotAllowed "The method is not POST.";
    410 ExpiredToken "The device token has expired.";
    410 Unregistered "The device token is no longer active for the topic.";
    413 PayloadTooLarge "The body is over the push type's limit.";
    429 TooManyProviderTokenUpdates "The provider token changed twice within 20 minutes on this connection.";
    429 TooManyRequests "Too many pushes to this device.";
    500 InternalServerError "Apple's own fault.";
    503 ServiceUnavailable "Overload.";
    503 Shutdown "This server is going away.";
}

impl Reason {
    /// The reason with this status and name, if it is in the table.
    #[must_use]
    pub fn find(status: u16, name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.status() == status && reason.name() == name)
    }

    /// Its place in [`Reason::ALL`].
    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_what_apple_documents() {
        // Typed by hand from the page, sorted by status.
        let written = "400 BadCollapseId, 400 BadDeviceToken, 400 BadExpirationDate, 400 BadMessageId, 400 BadPriority, \
             400 BadTopic, 400 DeviceTokenNotForTopic, 400 DuplicateHeaders, 400 IdleTimeout, 400 InvalidPushType, \
             400 MissingDeviceToken, 400 MissingTopic, 400 PayloadEmpty, 400 TopicDisallowed, 403 BadCertificate, \
             403 BadCertificateEnvironment, 403 BadEnvironmentKeyIdInToken, 403 BadEnvironmentKeyInToken, \
             403 ExpiredProviderToken, 403 Forbidden, 403 InvalidProviderToken, 403 MissingProviderToken, \
             403 UnrelatedKeyIdInToken, 404 BadPath, 405 MethodNotAllowed, 410 ExpiredToken, 410 Unregistered, \
             413 PayloadTooLarge, 429 TooManyProviderTokenUpdates, 429 TooManyRequests, 500 InternalServerError, \
             503 ServiceUnavailable, 503 Shutdown";
        let ours: Vec<String> = Reason::ALL.iter().map(|r| format!("{} {}", r.status(), r.name())).collect();
        assert_eq!(ours.join(", "), written);
    }

    #[test]
    fn a_body_is_the_json_apple_sends() {
        assert_eq!(Reason::BadDeviceToken.body(), r#"{"reason":"BadDeviceToken"}"#);
        assert_eq!(Reason::ALL[Reason::Shutdown.index()], Reason::Shutdown);
    }
}
