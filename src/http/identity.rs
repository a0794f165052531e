//! Identity tokens: who holds the phone, on somebody's word that is believed.
//!
//! A token is a JWT, ES256, with `sub` the user, `aud` the topic, `exp` at most 24 hours after `iat`, and a `kid` that
//! is among the app's `identity_keys` or is [`OWN_KEY_ID`].
//!
//! Promises: no token is believed on its own word (the algorithm is ours, never the token's); each reason for a refusal
//! has its own code and its own advice; time is the service's clock. Sonnette's own key is made once and shared by all
//! replicas through the database.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use p256::{
    SecretKey,
    elliptic_curve::Generate,
    pkcs8::{DecodePrivateKey, EncodePrivateKey},
};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;

use super::{
    catalogue::{Known, OWN_KEY_ID},
    problem::Problem,
};
use crate::{
    domain::{clock::Timestamp, device::UserId, topic::Topic},
    store::Store,
};

/// The longest life of an identity token.
pub const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);

/// How far clocks of others may be off.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// A longer token is not looked at.
const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// The name under which all replicas share the key.
const SECRET_NAME: &str = "identity_key";

/// Why a token is not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) code: &'static str,
    pub(super) detail: String,
    /// It is no token at all: a wrong field rather than a lack of proof.
    pub(super) malformed: bool,
}

impl Refused {
    pub(super) fn new(code: &'static str, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), malformed: false }
    }

    fn malformed(detail: &str) -> Self {
        Self { code: "identity_token_malformed", detail: detail.to_owned(), malformed: true }
    }
}

/// Sonnette's own key.
pub(super) struct Own {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl Own {
    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let key = SecretKey::from_pkcs8_der(der).ok()?;
        Some(Self {
            encoding: EncodingKey::from_ec_der(der),
            decoding: DecodingKey::from_ec_der(&key.public_key().to_sec1_bytes()),
        })
    }

    /// A token for this user of this app.
    pub(super) fn mint(
        &self,
        user: &UserId,
        topic: &Topic,
        issued_at: Timestamp,
        expires_at: Timestamp,
    ) -> Result<String, Problem> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(OWN_KEY_ID.to_owned());
        let claims = json!({
            "sub": user,
            "aud": topic,
            "iat": issued_at.as_seconds(),
            "exp": expires_at.as_seconds(),
        });
        jsonwebtoken::encode(&header, &claims, &self.encoding).map_err(Problem::internal)
    }
}

/// Reads Sonnette's own key when it is first needed.
#[derive(Default)]
pub(super) struct OwnKey(OnceCell<Own>);

impl OwnKey {
    pub(super) async fn get(&self, store: &dyn Store) -> Result<&Own, Problem> {
        self.0
            .get_or_try_init(|| async {
                let fresh = fresh()?;
                let kept = store.shared_secret(SECRET_NAME, &fresh).await?;
                Own::from_pkcs8(&kept)
                    .ok_or_else(|| Problem::internal("the shared secret `identity_key` is no P-256 key in PKCS#8"))
            })
            .await
    }
}

fn fresh() -> Result<Vec<u8>, Problem> {
    let key = SecretKey::try_generate().map_err(|_| Problem::internal("the operating system gave no randomness"))?;
    let der = key.to_pkcs8_der().map_err(|_| Problem::internal("a fresh key could not be written as PKCS#8"))?;
    Ok(der.as_bytes().to_vec())
}

/// The `kid` of a token, to see whether Sonnette's own key is needed. `None` for what is no token.
pub(super) fn key_id(token: &str) -> Option<String> {
    jsonwebtoken::decode_header(token).ok()?.kid
}

/// The user that a token proves for this app.
pub(super) fn verify(
    token: &str,
    topic: &Topic,
    app: &Known,
    own: Option<&Own>,
    now: Timestamp,
) -> Result<UserId, Refused> {
    if token.len() > MAX_TOKEN_BYTES || token.bytes().filter(|byte| *byte == b'.').count() != 2 {
        return Err(Refused::malformed("This is not a JWT: three parts in base64url with two dots between them."));
    }
    let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
        // An algorithm that the library does not know makes the header unreadable.
        ErrorKind::Json(_) if mentions_algorithm(token) => wrong_algorithm(),
        _ => Refused::malformed("This is not a JWT: its first part is not a header in base64url."),
    })?;
    if header.alg != Algorithm::ES256 {
        return Err(wrong_algorithm());
    }
    let Some(kid) = header.kid else {
        return Err(Refused::new(
            "identity_token_key_missing",
            "The identity token's header has no `kid`: name the key that signed it.",
        ));
    };
    let key =
        app.key(&kid).or_else(|| own.filter(|_| kid == OWN_KEY_ID).map(|own| &own.decoding)).ok_or_else(|| {
            Refused::new(
                "identity_token_key_unknown",
                "The `kid` of the identity token is not among this app's `identity_keys`, nor is it `sonnette`.",
            )
        })?;
    let mut validation = Validation::new(Algorithm::ES256);
    // Time and audience are checked below, against our clock and with our words.
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    let claims = jsonwebtoken::decode::<Map<String, Value>>(token, key, &validation)
        .map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => Refused::new(
                "identity_token_signature",
                "The identity token's signature does not match the key that its `kid` names.",
            ),
            _ => Refused::malformed("This is not a JWT: its claims cannot be read."),
        })?
        .claims;
    check(&claims, topic, now)
}

fn wrong_algorithm() -> Refused {
    Refused::new("identity_token_algorithm", "An identity token must be signed with ES256.")
}

fn mentions_algorithm(token: &str) -> bool {
    use base64::Engine as _;
    token
        .split('.')
        .next()
        .and_then(|part| base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part).ok())
        .and_then(|bytes| serde_json::from_slice::<Map<String, Value>>(&bytes).ok())
        .is_some_and(|header| header.contains_key("alg"))
}

fn check(claims: &Map<String, Value>, topic: &Topic, now: Timestamp) -> Result<UserId, Refused> {
    let user =
        claims.get("sub").and_then(Value::as_str).and_then(|sub| sub.parse::<UserId>().ok()).ok_or_else(|| {
            Refused::new("identity_token_subject", "The identity token needs `sub`: the user's id, a string.")
        })?;
    let for_this_app = match claims.get("aud") {
        Some(Value::String(audience)) => audience == topic.as_str(),
        Some(Value::Array(list)) => list.iter().any(|audience| audience.as_str() == Some(topic.as_str())),
        _ => false,
    };
    if !for_this_app {
        return Err(Refused::new(
            "identity_token_audience",
            format!("The identity token's `aud` must be the topic of this registration, `{topic}`."),
        ));
    }
    let seconds = |name| claims.get(name).and_then(numeric_date);
    let (Some(issued_at), Some(expires_at)) = (seconds("iat"), seconds("exp")) else {
        return Err(Refused::new(
            "identity_token_lifetime",
            "The identity token needs `iat` and `exp`, in seconds since 1970.",
        ));
    };
    if expires_at <= issued_at || expires_at.since(issued_at) > MAX_LIFE {
        return Err(Refused::new(
            "identity_token_lifetime",
            "The identity token's `exp` must come after its `iat`, by at most 24 hours.",
        ));
    }
    let begins = seconds("nbf").map_or(issued_at, |nbf| nbf.max(issued_at));
    if begins > now.plus(LEEWAY) {
        return Err(Refused::new(
            "identity_token_not_yet_valid",
            "The identity token is from the future: check the clock of the server that made it.",
        ));
    }
    if expires_at.plus(LEEWAY) <= now {
        return Err(Refused::new(
            "identity_token_expired",
            "The identity token has expired: fetch a new one from your server.",
        ));
    }
    Ok(user)
}

/// Seconds since 1970; a fraction is allowed (RFC 7519) and cut off.
fn numeric_date(value: &Value) -> Option<Timestamp> {
    #[expect(clippy::cast_possible_truncation, reason = "the cast saturates, and a fraction is to be cut off")]
    let seconds = value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds as i64))?;
    Some(Timestamp::from_seconds(seconds))
}

#[cfg(test)]
mod tests {
    use p256::pkcs8::{EncodePublicKey, LineEnding};

    use super::*;
    use crate::{domain::topic::Environment, http::catalogue::Catalogue};

    const NOW: Timestamp = Timestamp::from_seconds(1_795_000_000);

    struct Shop {
        catalogue: Catalogue,
        topic: Topic,
        key: EncodingKey,
        own: Own,
    }

    fn shop() -> Shop {
        let topic: Topic = "fr.ocpizza.livreur".parse().unwrap();
        let secret = SecretKey::try_generate().unwrap();
        let pem = secret.public_key().to_public_key_pem(LineEnding::LF).unwrap();
        let mut catalogue = Catalogue::default();
        catalogue.add(&topic, &[Environment::Production], true, &[("shop-1".into(), pem)]).unwrap();
        Shop {
            catalogue,
            topic,
            key: EncodingKey::from_ec_der(secret.to_pkcs8_der().unwrap().as_bytes()),
            own: Own::from_pkcs8(&fresh().unwrap()).unwrap(),
        }
    }

    impl Shop {
        fn token(&self, kid: Option<&str>, claims: &Value) -> String {
            let mut header = Header::new(Algorithm::ES256);
            header.kid = kid.map(str::to_owned);
            jsonwebtoken::encode(&header, claims, &self.key).unwrap()
        }

        fn verify(&self, token: &str) -> Result<UserId, Refused> {
            verify(token, &self.topic, self.catalogue.app(&self.topic).unwrap(), Some(&self.own), NOW)
        }

        fn code(&self, token: &str) -> &'static str {
            self.verify(token).unwrap_err().code
        }
    }

    fn claims() -> Value {
        let now = NOW.as_seconds();
        json!({"sub": "livreur-42", "aud": "fr.ocpizza.livreur", "iat": now, "exp": now + 3600})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[key] = value;
        claims
    }

    #[test]
    fn a_token_of_the_shop_or_of_ours_proves_its_user() {
        let shop = shop();
        let user: UserId = "livreur-42".parse().unwrap();
        assert_eq!(shop.verify(&shop.token(Some("shop-1"), &claims())), Ok(user.clone()));
        let many = with("aud", json!(["fr.other", "fr.ocpizza.livreur"]));
        assert_eq!(shop.verify(&shop.token(Some("shop-1"), &many)), Ok(user.clone()));
        let own = shop.own.mint(&user, &shop.topic, NOW, NOW.plus(Duration::from_secs(60))).unwrap();
        assert_eq!(shop.verify(&own), Ok(user.clone()));
        assert_eq!(key_id(&own).as_deref(), Some(OWN_KEY_ID));
        let late = NOW.as_seconds() - 3600;
        let skewed = with("iat", json!(NOW.as_seconds() + 30));
        assert_eq!(shop.verify(&shop.token(Some("shop-1"), &skewed)), Ok(user.clone()), "clocks may be off a little");
        let mut just = with("iat", json!(late));
        just["exp"] = json!(NOW.as_seconds() - 30);
        assert_eq!(shop.verify(&shop.token(Some("shop-1"), &just)), Ok(user));
    }

    #[test]
    fn each_fault_of_a_token_has_its_own_word() {
        let shop = shop();
        let now = NOW.as_seconds();
        let of = |claims: &Value| shop.code(&shop.token(Some("shop-1"), claims));
        assert_eq!(of(&with("sub", Value::Null)), "identity_token_subject");
        assert_eq!(of(&with("sub", json!(42))), "identity_token_subject");
        assert_eq!(of(&with("aud", json!("fr.other"))), "identity_token_audience");
        assert_eq!(of(&with("aud", Value::Null)), "identity_token_audience");
        assert_eq!(of(&with("iat", Value::Null)), "identity_token_lifetime");
        assert_eq!(of(&with("exp", json!(now + 24 * 3600 + 1))), "identity_token_lifetime");
        assert_eq!(of(&with("exp", json!(now - 1))), "identity_token_lifetime");
        assert_eq!(of(&with("exp", json!(i64::MAX))), "identity_token_lifetime");
        assert_eq!(of(&with("exp", json!(1e300))), "identity_token_lifetime");
        let mut old = with("iat", json!(now - 7200));
        old["exp"] = json!(now - 3600);
        assert_eq!(of(&old), "identity_token_expired");
        let mut early = with("iat", json!(now + 3600));
        early["exp"] = json!(now + 7200);
        assert_eq!(of(&early), "identity_token_not_yet_valid");
        assert_eq!(of(&with("nbf", json!(now + 600))), "identity_token_not_yet_valid");
        assert_eq!(shop.code(&shop.token(None, &claims())), "identity_token_key_missing");
        assert_eq!(shop.code(&shop.token(Some("shop-2"), &claims())), "identity_token_key_unknown");
        assert_eq!(shop.code(&shop.token(Some("sonnette"), &claims())), "identity_token_signature");
    }

    #[test]
    fn a_token_is_not_believed_on_its_own_word() {
        use base64::Engine as _;
        let shop = shop();
        let part = |value: &Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
        let none = format!("{}.{}.", part(&json!({"alg": "none", "kid": "shop-1"})), part(&claims()));
        assert_eq!(shop.code(&none), "identity_token_algorithm");
        let public = shop.catalogue.app(&shop.topic).unwrap().key("shop-1").unwrap().try_get_as_bytes().unwrap();
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("shop-1".into());
        let confused = jsonwebtoken::encode(&header, &claims(), &EncodingKey::from_secret(public)).unwrap();
        assert_eq!(shop.code(&confused), "identity_token_algorithm");
        let mut bent = shop.token(Some("shop-1"), &claims());
        let at = bent.rfind('.').unwrap() + 1;
        bent.replace_range(at..=at, if bent[at..].starts_with('A') { "B" } else { "A" });
        assert_eq!(shop.code(&bent), "identity_token_signature");
        for malformed in ["", "abc", "a.b.c", "....", &"x".repeat(100_000), &format!("{}.e30.", part(&json!([])))] {
            assert!(shop.verify(malformed).unwrap_err().malformed, "{malformed:.40}");
        }
    }

    #[test]
    fn a_catalogue_refuses_keys_that_cannot_be_used() {
        let topic: Topic = "fr.ocpizza.livreur".parse().unwrap();
        let of = |kid: &str, pem: &str| {
            Catalogue::default()
                .add(&topic, &[Environment::Production], false, &[(kid.into(), pem.into())])
                .unwrap_err()
        };
        assert!(of("shop", "nonsense").contains("not a P-256 public key"));
        assert!(of("sonnette", "").contains("choose another `kid`"));
    }
}
