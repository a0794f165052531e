//! Provider tokens: reading the JWT, verifying it, and what one connection remembers of the tokens used on it.
//!
//! Promises: signatures are really verified, once for each connection and token string. Encodings are read as laxly as
//! APNs is known to read them (`R||S` and DER signatures, both base64 alphabets, padded or not). No JWT is kept beyond
//! its connection, and none is ever logged.

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use http::HeaderValue;
use p256::ecdsa::{Signature, signature::Verifier as _};
use sha2::{Digest as _, Sha256};

use super::{
    environment::Environment,
    keys::{Keys, KnownKey},
    reason::Reason,
};
use crate::domain::clock::Timestamp;

/// The oldest acceptable `iat`, and as far as it may lie ahead (Apple: "Establishing a token-based connection").
pub const MAX_AGE: Duration = Duration::from_secs(3600);
/// How long a connection must keep a token before it may bring another (same page).
pub const MIN_TIME_BETWEEN_CHANGES: Duration = Duration::from_secs(1200);

/// Base64 of either alphabet, padded or not.
const LAX: base64::engine::GeneralPurpose = base64::engine::GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    base64::engine::GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::RequireNone),
);

/// What a JWT says of itself, before anything is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) algorithm: String,
    pub(super) key_id: String,
    pub(super) team_id: String,
    /// Seconds since the epoch.
    pub(super) issued_at: i64,
}

/// A JWT taken apart.
pub(super) struct Parsed<'a> {
    pub(super) claims: Claims,
    signed: &'a str,
    signature: Vec<u8>,
}

impl<'a> Parsed<'a> {
    /// Takes a JWT apart; `None` if it cannot be read at all.
    pub(super) fn new(jwt: &'a str) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Header {
            alg: String,
            kid: String,
        }
        #[derive(serde::Deserialize)]
        struct Body {
            iss: String,
            iat: i64,
        }
        let (signed, signature) = jwt.rsplit_once('.')?;
        let (header, body) = signed.split_once('.')?;
        let header: Header = serde_json::from_slice(&decode(header)?).ok()?;
        let body: Body = serde_json::from_slice(&decode(body)?).ok()?;
        let claims = Claims { algorithm: header.alg, key_id: header.kid, team_id: body.iss, issued_at: body.iat };
        Some(Self { claims, signed, signature: decode(signature)? })
    }

    /// Whether `key` signed this.
    fn is_signed_by(&self, key: &KnownKey) -> bool {
        let raw = Signature::from_slice(&self.signature).ok();
        raw.or_else(|| Signature::from_der(&self.signature).ok())
            .is_some_and(|signature| key.verifying.verify(self.signed.as_bytes(), &signature).is_ok())
    }
}

fn decode(part: &str) -> Option<Vec<u8>> {
    let part = part.trim_end_matches('=').replace('+', "-").replace('/', "_");
    LAX.decode(part).ok()
}

/// SHA-256 of a JWT: enough to tell tokens apart, useless to send pushes with.
pub(super) fn fingerprint(jwt: &str) -> [u8; 32] {
    Sha256::digest(jwt.as_bytes()).into()
}

/// The JWT in an `authorization` header; `None` if there is none or it has another scheme.
pub(super) fn bearer(value: &HeaderValue) -> Option<&str> {
    let (scheme, jwt) = value.to_str().ok()?.split_once(' ')?;
    let jwt = jwt.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !jwt.is_empty()).then_some(jwt)
}

/// A token whose signature, key and team were found right.
#[derive(Debug)]
struct Verified {
    header: HeaderValue,
    key: Arc<KnownKey>,
    issued_at: Timestamp,
    generation: u64,
}

/// A change of token on a connection, for the ledger.
#[derive(Debug)]
pub(super) struct Switch {
    pub(super) fingerprint: [u8; 32],
    pub(super) claims: Claims,
}

/// What one connection remembers of provider tokens.
#[derive(Debug, Default)]
pub(super) struct ConnectionTokens {
    /// The token in use.
    current: Option<Verified>,
    /// When it came, on the monotonic clock.
    changed_at: Duration,
    /// The key the connection began with.
    first_key: Option<Arc<KnownKey>>,
    /// The last change that the ledger has not heard of.
    switch: Option<Switch>,
}

/// What is needed to judge a token.
pub(super) struct Judge<'a> {
    pub(super) keys: &'a Keys,
    pub(super) environment: Environment,
    pub(super) now: Timestamp,
    pub(super) monotonic: Duration,
    /// Answer `BadEnvironmentKeyInToken` instead of `BadEnvironmentKeyIdInToken`.
    pub(super) wire_spelling: bool,
    /// Let a connection change between team keys of one team.
    pub(super) lenient: bool,
}

impl ConnectionTokens {
    /// Check 5: judges the `authorization` header of a request and remembers an accepted token.
    pub(super) fn check(&mut self, header: Option<&HeaderValue>, judge: &Judge<'_>) -> Result<Arc<KnownKey>, Reason> {
        let header = header.ok_or(Reason::MissingProviderToken)?;
        if let Some(current) = &self.current
            && current.header == *header
            && current.generation == judge.keys.generation()
        {
            check_age(current.issued_at, judge.now)?;
            return Ok(Arc::clone(&current.key));
        }
        let jwt = bearer(header).ok_or(Reason::MissingProviderToken)?;
        let generation = judge.keys.generation();
        let parsed = Parsed::new(jwt).ok_or(Reason::InvalidProviderToken)?;
        let key = verify(&parsed, judge.keys).ok_or(Reason::InvalidProviderToken)?;
        let issued_at = Timestamp::from_seconds(parsed.claims.issued_at);
        check_age(issued_at, judge.now)?;
        if !key.serves(judge.environment) {
            return Err(if judge.wire_spelling {
                Reason::BadEnvironmentKeyInToken
            } else {
                Reason::BadEnvironmentKeyIdInToken
            });
        }
        if self.first_key.as_ref().is_some_and(|first| !first.goes_with(&key, judge.lenient)) {
            return Err(Reason::UnrelatedKeyIdInToken);
        }
        let is_change = self.current.as_ref().is_none_or(|current| bearer(&current.header) != Some(jwt));
        if is_change {
            let too_soon = judge.monotonic.saturating_sub(self.changed_at) < MIN_TIME_BETWEEN_CHANGES;
            if self.current.is_some() && too_soon {
                return Err(Reason::TooManyProviderTokenUpdates);
            }
            self.changed_at = judge.monotonic;
            self.switch = Some(Switch { fingerprint: fingerprint(jwt), claims: parsed.claims });
        }
        if self.first_key.is_none() {
            self.first_key = Some(Arc::clone(&key));
        }
        self.current = Some(Verified { header: header.clone(), key: Arc::clone(&key), issued_at, generation });
        Ok(key)
    }

    /// Whether a token has been accepted on this connection.
    pub(super) const fn is_authenticated(&self) -> bool {
        self.current.is_some()
    }

    /// The change that happened since this was asked last.
    pub(super) fn take_switch(&mut self) -> Option<Switch> {
        self.switch.take()
    }
}

fn verify(parsed: &Parsed<'_>, keys: &Keys) -> Option<Arc<KnownKey>> {
    let key = keys.find(&parsed.claims.key_id)?;
    let right = parsed.claims.algorithm == "ES256"
        && key.registered.team_id == parsed.claims.team_id
        && parsed.is_signed_by(&key);
    right.then_some(key)
}

fn check_age(issued_at: Timestamp, now: Timestamp) -> Result<(), Reason> {
    if now.since(issued_at) > MAX_AGE {
        return Err(Reason::ExpiredProviderToken);
    }
    if issued_at.since(now) > MAX_AGE {
        return Err(Reason::InvalidProviderToken);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use p256::{
        ecdsa::{SigningKey, signature::Signer as _},
        pkcs8::DecodePrivateKey as _,
    };

    use super::*;
    use crate::sim::keys::{
        ProviderKey, Topics,
        tests::{PRIVATE_PEM, PUBLIC_PEM},
    };

    const NOW: i64 = 1_795_372_500;

    fn keys() -> Keys {
        let keys = Keys::default();
        for key_id in ["ABC123DEFG", "RELATED000", "STRANGER00"] {
            keys.register(ProviderKey {
                key_id: key_id.to_owned(),
                team_id: "TEAM000001".to_owned(),
                public_key_pem: PUBLIC_PEM.to_owned(),
                environments: vec![Environment::Production],
                topics: Topics::All,
                related_key_id: (key_id == "RELATED000").then(|| "ABC123DEFG".to_owned()),
            })
            .unwrap();
        }
        keys
    }

    fn sign(text: &str) -> Signature {
        SigningKey::from_pkcs8_pem(PRIVATE_PEM).unwrap().sign(text.as_bytes())
    }

    fn url(bytes: &[u8]) -> String {
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
    }

    fn unsigned(kid: &str, iss: &str, iat: i64) -> String {
        let header = format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#);
        format!("{}.{}", url(header.as_bytes()), url(format!(r#"{{"iss":"{iss}","iat":{iat}}}"#).as_bytes()))
    }

    fn token(kid: &str, iss: &str, iat: i64) -> HeaderValue {
        let signed = unsigned(kid, iss, iat);
        let signature = url(&sign(&signed).to_bytes());
        HeaderValue::from_str(&format!("bearer {signed}.{signature}")).unwrap()
    }

    fn judge(keys: &Keys, seconds: u64) -> Judge<'_> {
        Judge {
            keys,
            environment: Environment::Production,
            now: Timestamp::from_seconds(NOW).plus(Duration::from_secs(seconds)),
            monotonic: Duration::from_secs(seconds),
            wire_spelling: false,
            lenient: false,
        }
    }

    fn first(header: &HeaderValue) -> Result<(), Reason> {
        let keys = keys();
        ConnectionTokens::default().check(Some(header), &judge(&keys, 0)).map(|_| ())
    }

    #[test]
    fn a_right_token_is_accepted_in_every_encoding_apns_reads() {
        let signed = unsigned("ABC123DEFG", "TEAM000001", NOW);
        let signature = sign(&signed);
        let standard = base64::engine::general_purpose::STANDARD;
        for encoded in [
            url(&signature.to_bytes()),
            url(signature.to_der().as_bytes()),
            standard.encode(signature.to_bytes()),
            standard.encode(signature.to_der().as_bytes()),
        ] {
            for scheme in ["bearer", "Bearer"] {
                let header = HeaderValue::from_str(&format!("{scheme} {signed}.{encoded}")).unwrap();
                assert_eq!(first(&header), Ok(()), "{encoded}");
            }
        }
        // Header and claims in padded standard base64, as some crates send them.
        let padded = format!(
            "{}.{}",
            standard.encode(r#"{"alg":"ES256","kid":"ABC123DEFG","typ":"JWT"}"#),
            standard.encode(format!(r#"{{"iss":"TEAM000001","iat":{NOW}}}"#))
        );
        let header = format!("bearer {padded}.{}", standard.encode(sign(&padded).to_bytes()));
        assert_eq!(first(&HeaderValue::from_str(&header).unwrap()), Ok(()));
    }

    #[test]
    fn a_wrong_token_is_refused_with_apples_reason() {
        let keys = keys();
        assert_eq!(ConnectionTokens::default().check(None, &judge(&keys, 0)).err(), Some(Reason::MissingProviderToken));
        for (text, reason) in [
            ("", Reason::MissingProviderToken),
            ("bearer", Reason::MissingProviderToken),
            ("bearer ", Reason::MissingProviderToken),
            ("basic abc", Reason::MissingProviderToken),
            ("bearer nonsense", Reason::InvalidProviderToken),
            ("bearer a.b.c", Reason::InvalidProviderToken),
        ] {
            assert_eq!(first(&HeaderValue::from_str(text).unwrap()), Err(reason), "{text}");
        }
        assert_eq!(first(&token("UNKNOWN000", "TEAM000001", NOW)), Err(Reason::InvalidProviderToken));
        assert_eq!(first(&token("ABC123DEFG", "OTHERTEAM0", NOW)), Err(Reason::InvalidProviderToken));
        let mut forged = token("ABC123DEFG", "TEAM000001", NOW).to_str().unwrap().to_owned();
        let at = forged.rfind('.').unwrap() + 5;
        let replacement = if &forged[at..=at] == "A" { "B" } else { "A" };
        forged.replace_range(at..=at, replacement);
        assert_eq!(first(&HeaderValue::from_str(&forged).unwrap()), Err(Reason::InvalidProviderToken));
        let none = format!(
            "{}.{}",
            url(br#"{"alg":"none","kid":"ABC123DEFG"}"#),
            url(format!(r#"{{"iss":"TEAM000001","iat":{NOW}}}"#).as_bytes())
        );
        let none = format!("bearer {none}.{}", url(&sign(&none).to_bytes()));
        assert_eq!(
            first(&HeaderValue::from_str(&none).unwrap()),
            Err(Reason::InvalidProviderToken),
            "alg must be ES256"
        );
    }

    #[test]
    fn a_token_lives_an_hour_and_not_a_second_more() {
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", NOW - 3600)), Ok(()));
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", NOW - 3601)), Err(Reason::ExpiredProviderToken));
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", NOW + 3600)), Ok(()));
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", NOW + 3601)), Err(Reason::InvalidProviderToken));
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", i64::MIN)), Err(Reason::ExpiredProviderToken));
        assert_eq!(first(&token("ABC123DEFG", "TEAM000001", i64::MAX)), Err(Reason::InvalidProviderToken));
        let (keys, mut connection) = (keys(), ConnectionTokens::default());
        let header = token("ABC123DEFG", "TEAM000001", NOW);
        assert!(connection.check(Some(&header), &judge(&keys, 0)).is_ok());
        assert!(connection.check(Some(&header), &judge(&keys, 3600)).is_ok());
        assert_eq!(connection.check(Some(&header), &judge(&keys, 3601)).err(), Some(Reason::ExpiredProviderToken));
    }

    #[test]
    fn a_connection_may_change_its_token_every_20_minutes_and_the_first_use_counts() {
        let (keys, mut connection) = (keys(), ConnectionTokens::default());
        let (one, two) = (token("ABC123DEFG", "TEAM000001", NOW), token("ABC123DEFG", "TEAM000001", NOW + 1));
        assert!(connection.check(Some(&one), &judge(&keys, 0)).is_ok());
        assert_eq!(connection.check(Some(&two), &judge(&keys, 1199)).err(), Some(Reason::TooManyProviderTokenUpdates));
        assert!(connection.check(Some(&one), &judge(&keys, 1199)).is_ok(), "the token in use still is");
        assert!(connection.check(Some(&two), &judge(&keys, 1200)).is_ok());
        assert_eq!(connection.check(Some(&one), &judge(&keys, 2399)).err(), Some(Reason::TooManyProviderTokenUpdates));
        assert!(connection.check(Some(&one), &judge(&keys, 2400)).is_ok());
    }

    #[test]
    fn a_connection_belongs_to_its_first_key_and_the_related_one() {
        let (keys, mut connection) = (keys(), ConnectionTokens::default());
        assert!(connection.check(Some(&token("ABC123DEFG", "TEAM000001", NOW)), &judge(&keys, 0)).is_ok());
        let stranger = token("STRANGER00", "TEAM000001", NOW);
        assert_eq!(connection.check(Some(&stranger), &judge(&keys, 5000)).err(), Some(Reason::ExpiredProviderToken));
        assert_eq!(connection.check(Some(&stranger), &judge(&keys, 1300)).err(), Some(Reason::UnrelatedKeyIdInToken));
        assert!(connection.check(Some(&token("RELATED000", "TEAM000001", NOW)), &judge(&keys, 1300)).is_ok());
    }

    #[test]
    fn a_lenient_connection_takes_another_team_key_of_its_team() {
        let (keys, mut connection) = (keys(), ConnectionTokens::default());
        assert!(connection.check(Some(&token("ABC123DEFG", "TEAM000001", NOW)), &judge(&keys, 0)).is_ok());
        let lenient = || Judge { lenient: true, ..judge(&keys, 1300) };
        assert!(connection.check(Some(&token("STRANGER00", "TEAM000001", NOW)), &lenient()).is_ok());
        keys.set_team("STRANGER00", "TEAM000002").unwrap();
        let stranger = token("STRANGER00", "TEAM000002", NOW);
        assert_eq!(connection.check(Some(&stranger), &lenient()).err(), Some(Reason::UnrelatedKeyIdInToken));
    }

    #[test]
    fn a_key_of_the_other_environment_is_refused_in_the_spelling_asked_for() {
        let keys = keys();
        let header = token("ABC123DEFG", "TEAM000001", NOW);
        for (wire_spelling, reason) in
            [(false, Reason::BadEnvironmentKeyIdInToken), (true, Reason::BadEnvironmentKeyInToken)]
        {
            let judge = Judge { environment: Environment::Sandbox, wire_spelling, ..judge(&keys, 0) };
            assert_eq!(ConnectionTokens::default().check(Some(&header), &judge).err(), Some(reason));
        }
    }

    #[test]
    fn a_verified_token_is_verified_again_after_the_keys_change() {
        let (keys, mut connection) = (keys(), ConnectionTokens::default());
        let header = token("ABC123DEFG", "TEAM000001", NOW);
        assert!(connection.check(Some(&header), &judge(&keys, 0)).is_ok());
        keys.set_team("ABC123DEFG", "TEAM000002").unwrap();
        assert_eq!(connection.check(Some(&header), &judge(&keys, 0)).err(), Some(Reason::InvalidProviderToken));
        keys.set_team("ABC123DEFG", "TEAM000001").unwrap();
        assert!(connection.check(Some(&header), &judge(&keys, 0)).is_ok(), "the same string is no change of token");
        assert!(keys.remove("ABC123DEFG"));
        assert_eq!(connection.check(Some(&header), &judge(&keys, 0)).err(), Some(Reason::InvalidProviderToken));
    }
}
