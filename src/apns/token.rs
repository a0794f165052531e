//! Provider tokens: the ES256 JWT that goes with every request.
//!
//! Promises (design.md, promise 6; `apns-protocol.md` §3.2):
//!
//! - A token is a pure function of (credential, slot): `iat` is the slot's start, the signature is deterministic
//!   (RFC 6979), the bytes have a fixed order. Any number of replicas mint the same bytes without talking.
//! - A slot lasts [`SLOT`] and is used from [`SETTLING`] after its start, so no `iat` is in the future on a clock that
//!   is at most that much ahead.
//! - A connection keeps its token for [`STICKINESS`] from its own first use: APNs counts changes per connection and
//!   takes one per 20 minutes.
//! - No token is sent at the age of [`MAX_AGE`] or more: where the clock was moved so far that the two rules above
//!   leave no token, the connection is replaced.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use p256::ecdsa::{Signature, signature::Signer as _};

use super::credential::Credential;
use crate::domain::clock::Timestamp;

/// How long one token is the newest.
pub const SLOT: Duration = Duration::from_secs(30 * 60);

/// A slot is used from this long after its start.
pub const SETTLING: Duration = Duration::from_secs(2 * 60);

/// A connection uses one token for at least this long before it takes the next. Apple: 20 minutes; one to spare.
pub const STICKINESS: Duration = Duration::from_secs(21 * 60);

/// No token is sent at this age. Apple: 60 minutes.
pub const MAX_AGE: Duration = Duration::from_secs(56 * 60);

const SLOT_SECONDS: i64 = 30 * 60;

/// A stretch of 30 minutes, counted from the UNIX epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(i64);

impl Slot {
    /// The newest slot whose token may be used at `now`.
    #[must_use]
    pub fn at(now: Timestamp) -> Self {
        Self(now.minus(SETTLING).as_seconds().div_euclid(SLOT_SECONDS))
    }

    /// Its start: the token's `iat`.
    #[must_use]
    pub const fn start(self) -> Timestamp {
        Timestamp::from_seconds(self.0.saturating_mul(SLOT_SECONDS))
    }

    /// How old its token is at `now`; `None` if its `iat` is in the future.
    #[must_use]
    pub fn age(self, now: Timestamp) -> Option<Duration> {
        (self.start() <= now).then(|| now.since(self.start()))
    }
}

/// One token, ready to be a header's value.
#[derive(Debug)]
pub struct ProviderToken {
    slot: Slot,
    /// Marked sensitive: `Debug` does not show it, and HPACK never indexes it.
    authorization: HeaderValue,
}

impl ProviderToken {
    /// Whose `iat` it carries.
    #[must_use]
    pub const fn slot(&self) -> Slot {
        self.slot
    }

    /// `bearer <jwt>`.
    #[must_use]
    pub const fn authorization(&self) -> &HeaderValue {
        &self.authorization
    }
}

/// Mints the token of one slot. Pure.
#[must_use]
pub fn mint(credential: &Credential, slot: Slot) -> ProviderToken {
    // By hand and not by a serializer: the order of the bytes is part of the promise. Key id and team are letters and
    // digits, so nothing needs escaping.
    let header = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, credential.key_id());
    let claims = format!(r#"{{"iss":"{}","iat":{}}}"#, credential.team(), slot.start().as_seconds());
    let mut token = format!("bearer {}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signed = token.strip_prefix("bearer ").unwrap_or(&token);
    let signature: Signature = credential.key().expose().sign(signed.as_bytes());
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature.to_bytes(), &mut token);
    let mut authorization = HeaderValue::try_from(token).unwrap_or_else(|_| HeaderValue::from_static("bearer"));
    authorization.set_sensitive(true);
    ProviderToken { slot, authorization }
}

/// Mints each slot's token once and shares it among all connections of a credential.
#[derive(Debug)]
pub struct Minter {
    credential: Arc<Credential>,
    /// At most two are alive: the newest, and the one that connections still keep.
    minted: Mutex<Vec<Arc<ProviderToken>>>,
}

impl Minter {
    /// For one credential.
    #[must_use]
    pub const fn new(credential: Arc<Credential>) -> Self {
        Self { credential, minted: Mutex::new(Vec::new()) }
    }

    /// The token of `slot`, minted now if it has not been.
    pub fn token(&self, slot: Slot) -> Arc<ProviderToken> {
        let mut minted = self.minted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(token) = minted.iter().find(|t| t.slot == slot) {
            return Arc::clone(token);
        }
        let token = Arc::new(mint(&self.credential, slot));
        minted.insert(0, Arc::clone(&token));
        minted.truncate(2);
        token
    }
}

/// What a connection does about its token before a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Sends the token it has.
    Keep(Slot),
    /// Sends this one from now on: its first token, or the next.
    Take(Slot),
    /// Sends nothing any more: it may neither keep its token nor take another. Another connection has to.
    Replace,
}

/// When one connection changes its token. Pure: the clock is a parameter.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectionToken {
    /// The token in use, and when this connection first used it, on the monotonic clock.
    current: Option<(Slot, Duration)>,
}

impl ConnectionToken {
    /// Decides for a request that leaves at `now` on the wall clock and `passed` on the monotonic one. Stickiness is
    /// measured on the latter, which nobody can set.
    #[must_use]
    pub fn choose(&self, now: Timestamp, passed: Duration) -> Choice {
        let newest = Slot::at(now);
        let Some((slot, first_used)) = self.current else {
            return Choice::Take(newest);
        };
        let may_change = passed.saturating_sub(first_used) >= STICKINESS;
        let fit = slot.age(now).is_some_and(|age| age < MAX_AGE);
        if may_change && newest != slot && (newest > slot || !fit) {
            Choice::Take(newest)
        } else if fit {
            Choice::Keep(slot)
        } else {
            Choice::Replace
        }
    }

    /// Decides, and remembers what was decided.
    pub fn advance(&mut self, now: Timestamp, passed: Duration) -> Choice {
        let choice = self.choose(now, passed);
        if let Choice::Take(slot) = choice {
            self.current = Some((slot, passed));
        }
        choice
    }

    /// The slot in use.
    #[must_use]
    pub fn slot(&self) -> Option<Slot> {
        self.current.map(|(slot, _)| slot)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::credential::tests::credential, *};

    const NOON: Timestamp = Timestamp::from_seconds(1_794_999_600);

    /// Computed by python's `cryptography` 48 (OpenSSL): `key.sign(message, ec.ECDSA(hashes.SHA256(),
    /// deterministic_signing=True))`, the DER signature taken apart into r and s of 32 bytes each. The first has a low
    /// s, the second a high one: APNs takes both, and no normalising may creep in.
    const GOLDEN: [(i64, &str); 2] = [
        (
            1_794_997_800,
            "bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ.eyJpc3MiOiJBQkNERTEyMzQ1IiwiaWF0IjoxNzk0OTk3ODAwfQ.y0UQ_gXY03Ou7iurJqOiiQshrvWcVju8Mv3sQMBX_Fh8vtEcZzrH9YNzV440vJkHNm237q8N31ep9fqjp-yiPw",
        ),
        (
            1_794_999_600,
            "bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ.eyJpc3MiOiJBQkNERTEyMzQ1IiwiaWF0IjoxNzk0OTk5NjAwfQ.JbcDzy4XzuGCHY5maFXOcf8ozShj5Xp7HNx4ZW4XXUiECnwchVszFOgDyGr0KlDwu9wwB4nMQ3uy2Ii5S32qPw",
        ),
    ];

    #[test]
    fn a_token_has_the_bytes_that_another_program_computes() {
        for (iat, expected) in GOLDEN {
            let token = mint(&credential(), Slot(iat / SLOT_SECONDS));
            assert_eq!(token.authorization().to_str().unwrap(), expected);
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        let shown = format!("{:?}", mint(&credential(), Slot::at(NOON)));
        assert!(!shown.contains("eyJ"), "{shown}");
    }

    #[test]
    fn a_slot_is_used_from_two_minutes_after_its_start() {
        let before = Slot::at(NOON.plus(Duration::from_millis(119_999)));
        let after = Slot::at(NOON.plus(Duration::from_secs(120)));
        assert_eq!(before.start(), NOON.minus(SLOT));
        assert_eq!(after.start(), NOON);
    }

    #[test]
    fn a_token_is_minted_once_and_shared() {
        let minter = Minter::new(Arc::new(credential()));
        let (old, new) = (Slot::at(NOON), Slot::at(NOON.plus(SLOT)));
        let first = minter.token(old);
        let _newer = minter.token(new);
        assert!(Arc::ptr_eq(&first, &minter.token(old)));
        assert!(Arc::ptr_eq(&minter.token(new), &minter.token(new)));
    }

    /// Six hours, a connection opened at each of 720 moments and used every few seconds, at a different rhythm each.
    #[test]
    fn over_six_hours_no_connection_breaks_apples_rules() {
        const SIX_HOURS: u64 = 6 * 3600;
        for connection in 0..720_u64 {
            let mut token = ConnectionToken::default();
            let mut last_change: Option<u64> = None;
            let mut changes = 0;
            let rhythm = 1 + (connection * 7919) % 613;
            let mut second = connection * 30;
            while second < SIX_HOURS {
                let now = NOON.plus(Duration::from_secs(second));
                let slot = match token.advance(now, Duration::from_secs(second)) {
                    Choice::Take(slot) => {
                        if let Some(last) = last_change {
                            assert!(
                                second - last >= 21 * 60,
                                "connection {connection} changed after {} s",
                                second - last
                            );
                        }
                        last_change = Some(second);
                        changes += 1;
                        slot
                    }
                    Choice::Keep(slot) => slot,
                    Choice::Replace => {
                        panic!("connection {connection} ran out of tokens at {second} s")
                    }
                };
                let age = slot.age(now).expect("iat in the future");
                assert!(age >= SETTLING && age < MAX_AGE, "connection {connection} sent a token of {age:?}");
                second += rhythm;
            }
            assert!(changes <= 1 + SIX_HOURS / (21 * 60));
        }
    }

    #[test]
    fn a_connection_opened_just_before_a_new_slot_keeps_the_old_token_for_21_minutes() {
        let mut token = ConnectionToken::default();
        let opened = NOON.plus(Duration::from_secs(115));
        let old = Slot::at(opened);
        assert_eq!(token.advance(opened, Duration::ZERO), Choice::Take(old));
        let minutes = |n: u64| Duration::from_secs(60 * n);
        assert_eq!(token.advance(opened.plus(minutes(20)), minutes(20)), Choice::Keep(old));
        assert_eq!(token.advance(opened.plus(minutes(21)), minutes(21)), Choice::Take(Slot(old.0 + 1)));
    }

    #[test]
    fn a_clock_that_was_set_never_sends_a_future_or_an_old_token() {
        let mut token = ConnectionToken::default();
        let start = NOON.plus(Duration::from_secs(300));
        let _ = token.advance(start, Duration::ZERO);
        let minute = Duration::from_secs(60);
        assert_eq!(
            token.choose(start.minus(Duration::from_secs(3600)), minute),
            Choice::Replace,
            "set back by an hour"
        );
        assert_eq!(
            token.choose(start.plus(Duration::from_secs(3600)), minute),
            Choice::Replace,
            "set forward by an hour"
        );
        let back = start.minus(Duration::from_secs(3600));
        assert_eq!(
            token.choose(back, STICKINESS),
            Choice::Take(Slot::at(back)),
            "after 21 minutes the connection may take a fitting one"
        );
    }
}
