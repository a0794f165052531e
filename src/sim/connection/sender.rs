//! Who sends: check 5, by provider token or by the client certificate the connection began with.

use std::sync::Arc;

use http::{HeaderMap, header};

use super::{Connection, Judge, Reason, Timestamp};
use crate::sim::{client_certificate::KnownCertificate, keys::KnownKey};

/// Whoever a request was found to come from.
pub(super) enum Sender {
    Key(Arc<KnownKey>),
    Certificate(Arc<KnownCertificate>),
}

impl Sender {
    /// Whether it may send to `topic`.
    pub(super) fn allows(&self, topic: &str) -> bool {
        match self {
            Self::Key(key) => key.allows(topic),
            Self::Certificate(certificate) => certificate.allows(topic),
        }
    }

    /// The topic of pushes that name none.
    pub(super) fn only_topic(&self) -> Option<&str> {
        match self {
            Self::Key(_) => None,
            Self::Certificate(certificate) => certificate.only_topic(),
        }
    }
}

impl Connection<'_> {
    /// Check 5. On a connection with a certificate provider tokens are not looked at.
    pub(super) fn sender(&mut self, headers: &HeaderMap, now: Timestamp) -> Result<Sender, Reason> {
        if let Some(certificate) = &self.certificate {
            return certificate.clone().map(Sender::Certificate);
        }
        let judge = Judge {
            keys: &self.state.keys,
            environment: self.environment,
            now,
            monotonic: self.state.clock.monotonic(),
            wire_spelling: self.state.wire_spelling,
            lenient: self.conduct.lenient,
        };
        let key = self.tokens.check(headers.get(header::AUTHORIZATION), &judge)?;
        self.token_accepted(now);
        Ok(Sender::Key(key))
    }
}
