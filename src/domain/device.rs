//! Devices: the token, who holds the phone, and how a registration changes what is known.
//!
//! Promises: identity is topic + token; absent = unchanged, `null` = cleared; a device has at most one user and a
//! *generation* that grows whenever its user changes, logs out or is erased; a registration never undoes a learned
//! environment unless it names another value than it named before.

use std::{fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};

use super::{
    clock::Timestamp,
    push::PushType,
    text_value,
    topic::{Environment, Topic},
    uuid_value,
};

/// An APNs device token, kept as lower-case hex.
///
/// Apple gives no fixed length, so only the shape is checked: whole bytes, at most [`Self::MAX_BYTES`] of them.
/// Source: Apple, "Registering your app with APNs".
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceToken(Arc<str>);

/// A text that is no device token. The text itself is not repeated: tokens are not shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a device token: 1 to 256 bytes as hex digits, without spaces, angle brackets or base64")]
pub struct NotADeviceToken;

impl DeviceToken {
    /// The longest token kept, in bytes (not hex digits).
    pub const MAX_BYTES: usize = 256;

    /// The whole token as lower-case hex: for APNs and the database, never for a log.
    #[must_use]
    pub fn as_hex(&self) -> &str {
        &self.0
    }

    /// The token's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        hex::decode(self.0.as_bytes()).unwrap_or_default()
    }

    /// From the token's bytes.
    ///
    /// # Errors
    /// If there are none, or more than [`Self::MAX_BYTES`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotADeviceToken> {
        if bytes.is_empty() || bytes.len() > Self::MAX_BYTES {
            return Err(NotADeviceToken);
        }
        // `hex::encode` goes digit by digit.
        Self::written(2 * bytes.len(), |digits| hex::encode_to_slice(bytes, digits).is_ok())
    }

    /// From so many digits, as they are written to their place.
    fn written(length: usize, write: impl FnOnce(&mut [u8]) -> bool) -> Result<Self, NotADeviceToken> {
        let mut digits = [0; 2 * Self::MAX_BYTES];
        let digits = digits.get_mut(..length).ok_or(NotADeviceToken)?;
        if !write(digits) {
            return Err(NotADeviceToken);
        }
        std::str::from_utf8(digits).map(|digits| Self(digits.into())).map_err(|_| NotADeviceToken)
    }

    /// The last six digits, by which people recognise a token.
    #[must_use]
    pub fn hint(&self) -> &str {
        self.0.get(self.0.len().saturating_sub(6)..).unwrap_or(&self.0)
    }

    /// Eight hex digits of the token's SHA-256: tells tokens apart in a log without holding one.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.0.as_bytes());
        hex::encode(digest.get(..4).unwrap_or_default())
    }
}

impl FromStr for DeviceToken {
    type Err = NotADeviceToken;

    fn from_str(text: &str) -> Result<Self, NotADeviceToken> {
        let shaped = !text.is_empty()
            && text.len().is_multiple_of(2)
            && text.len() <= 2 * Self::MAX_BYTES
            && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !shaped {
            return Err(NotADeviceToken);
        }
        Self::written(text.len(), |digits| {
            digits.copy_from_slice(text.as_bytes());
            digits.make_ascii_lowercase();
            true
        })
    }
}

impl fmt::Debug for DeviceToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceToken({})", self.fingerprint())
    }
}

uuid_value! {
    /// The public id of a device; stays when the token of an installation is replaced.
    DeviceId
}

/// The internal number of a device: chunks hold these. Never used again, outlives its device as a tombstone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceSeq(pub i64);

/// How often a device has changed hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub i64);

/// A text that is empty or too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must have 1 to {max} bytes")]
pub struct NotInBounds {
    /// The most bytes it may have.
    pub max: usize,
}

macro_rules! bounded_text {
    ($(#[$doc:meta])* $type:ident, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The most bytes it may have; it has at least one.
            pub const MAX_BYTES: usize = $max;
        }

        impl FromStr for $type {
            type Err = NotInBounds;

            fn from_str(text: &str) -> Result<Self, NotInBounds> {
                if text.is_empty() || text.len() > Self::MAX_BYTES {
                    return Err(NotInBounds { max: Self::MAX_BYTES });
                }
                Ok(Self(text.into()))
            }
        }

        text_value!($type, NotInBounds);
    };
}

bounded_text! {
    /// Who holds the phone, in the company's own words; compared byte by byte.
    UserId, 255
}
bounded_text! {
    /// The app's `identifierForVendor`: ties the tokens of one installation together.
    InstallationId, 255
}
bounded_text! {
    /// The Live Activity that an update token belongs to.
    ActivityId, 255
}
bounded_text! {
    /// A label by which devices are addressed together; compared byte by byte.
    Tag, 64
}
bounded_text! {
    /// A short fact about the phone or the app: locale, time zone, version, model.
    Attribute, 64
}

/// The most tags a device may have.
pub const MAX_TAGS: usize = 50;

/// Whether a device is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceStatus {
    /// Sent to.
    Active,
    /// APNs has said that its token is dead; revived by a registration.
    Inactive,
    /// Once accepted, then refused as a bad token: not sent to until it registers again.
    Suspended,
}

impl DeviceStatus {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Active, Self::Inactive, Self::Suspended];

    /// The name on the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Inactive => "inactive",
            Self::Suspended => "suspended",
        }
    }
}

impl fmt::Display for DeviceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no device status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a device status: active, inactive or suspended")]
pub struct NotADeviceStatus;

impl FromStr for DeviceStatus {
    type Err = NotADeviceStatus;

    fn from_str(text: &str) -> Result<Self, NotADeviceStatus> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(NotADeviceStatus)
    }
}

super::serde_by_text!(DeviceStatus);

/// A device as it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The public id.
    pub id: DeviceId,
    /// The app.
    pub topic: Topic,
    /// Its address at APNs.
    pub token: DeviceToken,
    /// What the token is for; `alert` also serves `background`.
    pub push_type: PushType,
    /// The Live Activity of an update token.
    pub activity_id: Option<ActivityId>,
    /// Who holds the phone.
    pub user_id: Option<UserId>,
    /// Grows when the user changes, logs out or is erased.
    pub generation: Generation,
    /// The installation that the token belongs to.
    pub installation_id: Option<InstallationId>,
    /// Where the token works: learned from APNs, or as the registration named it. `None`: not known yet.
    pub environment: Option<Environment>,
    /// What the last registration that named an environment named.
    pub environment_named: Option<Environment>,
    /// Sorted, without repeats.
    pub tags: Vec<Tag>,
    /// Such as `fr-FR`.
    pub locale: Option<Attribute>,
    /// Such as `Europe/Paris`.
    pub time_zone: Option<Attribute>,
    /// Such as `3.2.1`.
    pub app_version: Option<Attribute>,
    /// Such as `18.6`.
    pub os_version: Option<Attribute>,
    /// Such as `iPhone15,2`.
    pub model: Option<Attribute>,
    /// Whether it is sent to.
    pub status: DeviceStatus,
    /// Why it is not `active`: APNs' reason, or a word of ours.
    pub status_reason: Option<String>,
    /// When it was first registered.
    pub created_at: Timestamp,
    /// When the app last presented this token.
    pub last_registered_at: Timestamp,
    /// When APNs last accepted a push for this token in this environment, to within a day; `None`: never.
    pub last_accepted_at: Option<Timestamp>,
}

/// What a request says of one field: nothing, `null`, or a value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Field<T> {
    /// Absent: unchanged.
    #[default]
    Absent,
    /// `null`: cleared.
    Clear,
    /// A value.
    Set(T),
}

impl<T: Clone> Field<T> {
    /// What the field is after this.
    #[must_use]
    pub fn applied_to(&self, current: Option<T>) -> Option<T> {
        match self {
            Self::Absent => current,
            Self::Clear => None,
            Self::Set(value) => Some(value.clone()),
        }
    }
}

/// On whose word a registration speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// A key that may only register, without an identity token.
    None,
    /// An identity token for this user was checked.
    User(UserId),
    /// A server's key (it also has `send`), or an app whose `identity` is `optional`.
    Server,
}

/// One checked registration. Whether its `user_id` is allowed was decided before: [`Registration::proof`] tells how.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each field is the one of the same name in `Device`")]
pub struct Registration {
    pub topic: Topic,
    pub token: DeviceToken,
    /// `None`: unchanged; `alert` for a token that nobody knew.
    pub push_type: Option<PushType>,
    pub activity_id: Option<ActivityId>,
    pub proof: Proof,
    pub user_id: Field<UserId>,
    pub installation_id: Field<InstallationId>,
    pub environment: Field<Environment>,
    pub tags: Field<Vec<Tag>>,
    pub locale: Field<Attribute>,
    pub time_zone: Field<Attribute>,
    pub app_version: Field<Attribute>,
    pub os_version: Field<Attribute>,
    pub model: Field<Attribute>,
}

impl Registration {
    /// The device that this registration makes where none was known.
    #[must_use]
    pub fn into_device(&self, now: Timestamp) -> Device {
        let mut device = Device {
            id: DeviceId::new(now),
            topic: self.topic.clone(),
            token: self.token.clone(),
            push_type: self.push_type.unwrap_or(PushType::Alert),
            activity_id: self.activity_id.clone(),
            user_id: None,
            generation: Generation(0),
            installation_id: None,
            environment: None,
            environment_named: None,
            tags: Vec::new(),
            locale: None,
            time_zone: None,
            app_version: None,
            os_version: None,
            model: None,
            status: DeviceStatus::Active,
            status_reason: None,
            created_at: now,
            last_registered_at: now,
            last_accepted_at: None,
        };
        device.refresh(self, now);
        device
    }
}

impl Device {
    /// What the same token, presented again, changes. True if the user changed: then the generation has grown, and
    /// the other tokens of the installation must follow ([`Self::follow`]).
    pub fn refresh(&mut self, registration: &Registration, now: Timestamp) -> bool {
        let user = registration.user_id.applied_to(self.user_id.clone());
        let changed = self.change_user(user);
        match &registration.tags {
            Field::Absent => {}
            Field::Clear => self.tags.clear(),
            Field::Set(tags) => {
                self.tags.clone_from(tags);
                self.tags.sort_unstable();
                self.tags.dedup();
            }
        }
        match registration.environment {
            Field::Absent => {}
            Field::Clear => {
                self.learn_anew(None);
                self.environment_named = None;
            }
            Field::Set(named) => {
                if self.environment_named != Some(named) {
                    self.learn_anew(Some(named));
                }
                self.environment_named = Some(named);
            }
        }
        self.push_type = registration.push_type.unwrap_or(self.push_type);
        if registration.activity_id.is_some() {
            self.activity_id.clone_from(&registration.activity_id);
        }
        self.installation_id = registration.installation_id.applied_to(self.installation_id.take());
        self.locale = registration.locale.applied_to(self.locale.take());
        self.time_zone = registration.time_zone.applied_to(self.time_zone.take());
        self.app_version = registration.app_version.applied_to(self.app_version.take());
        self.os_version = registration.os_version.applied_to(self.os_version.take());
        self.model = registration.model.applied_to(self.model.take());
        self.status = DeviceStatus::Active;
        self.status_reason = None;
        self.last_registered_at = now;
        changed
    }

    /// A new token of the same installation takes this device's place: id and tags stay, the user only with proof,
    /// what was learned of the old token is forgotten. True if the user changed.
    pub fn replace_token(&mut self, registration: &Registration, now: Timestamp) -> bool {
        self.token = registration.token.clone();
        self.environment = self.environment_named;
        self.last_accepted_at = None;
        let proven = match &registration.proof {
            Proof::Server => true,
            Proof::User(user) => self.user_id.as_ref() == Some(user),
            Proof::None => false,
        };
        let tags = std::mem::take(&mut self.tags);
        let dropped = !proven && registration.user_id == Field::Absent && self.change_user(None);
        self.tags = tags;
        self.refresh(registration, now) || dropped
    }

    /// Another token of the installation changed hands: so does this one. True if that changed anything.
    pub fn follow(&mut self, user: Option<UserId>) -> bool {
        self.change_user(user)
    }

    /// The token is said to work there. What APNs accepted somewhere else proves nothing of that.
    fn learn_anew(&mut self, environment: Option<Environment>) {
        if self.environment != environment {
            self.environment = environment;
            self.last_accepted_at = None;
        }
    }

    fn change_user(&mut self, user: Option<UserId>) -> bool {
        if self.user_id == user {
            return false;
        }
        self.user_id = user;
        self.generation = Generation(self.generation.0 + 1);
        self.tags.clear();
        true
    }
}

/// What the sender must know of a device, read right before the write (promise 4).
#[derive(Debug, Clone)]
pub struct Address {
    /// The device's internal number.
    pub seq: DeviceSeq,
    /// Its public id.
    pub id: DeviceId,
    /// Where to send.
    pub token: DeviceToken,
    /// Who holds the phone. Only to say why a push was suppressed; the generation decides.
    pub user_id: Option<UserId>,
    /// How often it has changed hands.
    pub generation: Generation,
    /// Where the token works, if that is known.
    pub environment: Option<Environment>,
    /// Whether it is sent to.
    pub status: DeviceStatus,
    /// When APNs last accepted a push for this token in this environment, to within a day; `None`: never.
    pub last_accepted_at: Option<Timestamp>,
    /// Of the block of numbers that it is in, if that was read as well, and before all this.
    pub block: Option<BlockVersion>,
}

/// Moves on when a device of a block of numbers gets another token, or is said to be in another environment: what has been
/// accepted meanwhile was another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockVersion(pub i64);

/// Addresses, found by the numbers of their devices, in whose order they are. Shared: from the read to the last answer nobody
/// copies one.
#[derive(Debug, Clone, Default)]
pub struct Addresses(Vec<Arc<Address>>);

impl Addresses {
    /// That of a device.
    #[must_use]
    pub fn of(&self, device: DeviceSeq) -> Option<&Arc<Address>> {
        self.each([device]).next().and_then(|(_, address)| address)
    }

    /// Those of some devices, as far as they are there.
    #[must_use]
    pub fn among(&self, devices: impl IntoIterator<Item = DeviceSeq>) -> Self {
        self.each(devices).filter_map(|(_, address)| address.cloned()).collect()
    }

    /// Some devices with what is there of each: in one walk where they come in order.
    pub fn each(
        &self,
        devices: impl IntoIterator<Item = DeviceSeq>,
    ) -> impl Iterator<Item = (DeviceSeq, Option<&Arc<Address>>)> {
        let mut next = 0;
        devices.into_iter().map(move |device| {
            let place = match self.0.get(next) {
                Some(address) if address.seq == device => Ok(next),
                _ => self.0.binary_search_by_key(&device, |address| address.seq),
            };
            let found = place.ok().and_then(|place| self.0.get(place));
            next = place.map_or_else(|place| place, |place| place + 1);
            (device, found)
        })
    }
}

impl std::ops::Deref for Addresses {
    type Target = [Arc<Address>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Extend<Address> for Addresses {
    fn extend<I: IntoIterator<Item = Address>>(&mut self, addresses: I) {
        self.extend(addresses.into_iter().map(Arc::new));
    }
}

impl Extend<Arc<Address>> for Addresses {
    /// The last one of a device counts.
    fn extend<I: IntoIterator<Item = Arc<Address>>>(&mut self, addresses: I) {
        self.0.extend(addresses);
        // They mostly come in order.
        if !self.0.is_sorted_by(|one, next| one.seq < next.seq) {
            self.0.reverse();
            self.0.sort_by_key(|address| address.seq);
            self.0.dedup_by_key(|address| address.seq);
        }
    }
}

impl<A> FromIterator<A> for Addresses
where
    Self: Extend<A>,
{
    fn from_iter<I: IntoIterator<Item = A>>(addresses: I) -> Self {
        let mut all = Self::default();
        all.extend(addresses);
        all
    }
}

impl Address {
    /// Whether APNs has ever accepted a push for this token there.
    #[must_use]
    pub fn was_accepted_in(&self, environment: Environment) -> bool {
        self.last_accepted_at.is_some() && self.environment == Some(environment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Timestamp = Timestamp::from_seconds(1_795_000_000);

    fn address(seq: i64, token: &str) -> Address {
        Address {
            seq: DeviceSeq(seq),
            id: DeviceId::new(AT),
            token: token.parse().unwrap(),
            user_id: None,
            generation: Generation(1),
            environment: None,
            status: DeviceStatus::Active,
            last_accepted_at: None,
            block: None,
        }
    }

    #[test]
    fn addresses_are_found_in_whatever_order_they_come_and_are_asked_for_and_the_last_one_of_a_device_counts() {
        let mut addresses: Addresses = [3, 9, 5].into_iter().map(|seq| address(seq, "aa")).collect();
        addresses.extend([address(5, "bb"), address(7, "cc")]);
        let token = |seq| addresses.of(DeviceSeq(seq)).map(|address| address.token.as_hex().to_owned());
        assert_eq!((token(5).as_deref(), token(7).as_deref(), token(4)), (Some("bb"), Some("cc"), None));
        for asked in [vec![3, 4, 5, 9, 10], vec![9, 3, 8, 3], vec![]] {
            let each: Vec<(i64, bool)> = addresses
                .each(asked.iter().copied().map(DeviceSeq))
                .map(|(device, found)| (device.0, found.is_some_and(|address| address.seq == device)))
                .collect();
            let expected: Vec<(i64, bool)> = asked.iter().map(|seq| (*seq, [3, 5, 7, 9].contains(seq))).collect();
            assert_eq!(each, expected);
        }
        let some = addresses.among([2, 5, 9].map(DeviceSeq));
        assert_eq!(some.iter().map(|address| address.seq.0).collect::<Vec<_>>(), [5, 9]);
    }
    const LATER: Timestamp = Timestamp::from_seconds(1_795_000_600);

    fn registration(token: &str) -> Registration {
        Registration {
            topic: "fr.ocpizza.livreur".parse().unwrap(),
            token: token.parse().unwrap(),
            push_type: None,
            activity_id: None,
            proof: Proof::Server,
            user_id: Field::Absent,
            installation_id: Field::Absent,
            environment: Field::Absent,
            tags: Field::Absent,
            locale: Field::Absent,
            time_zone: Field::Absent,
            app_version: Field::Absent,
            os_version: Field::Absent,
            model: Field::Absent,
        }
    }

    fn user(id: &str) -> Field<UserId> {
        Field::Set(id.parse().unwrap())
    }

    #[test]
    fn a_token_is_hex_of_1_to_256_bytes_kept_in_lower_case_and_never_shown() {
        let token: DeviceToken = "A1B2C3D4E5F6".parse().unwrap();
        assert_eq!(token.as_hex(), "a1b2c3d4e5f6");
        assert_eq!(token.hint(), "d4e5f6");
        assert!(!format!("{token:?}").contains("a1b2c3"));
        for bad in ["", "a", "abc", "<a1b2>", "a1 b2", "zz", &"ab".repeat(257)] {
            assert!(bad.parse::<DeviceToken>().is_err(), "{bad:?} is refused");
        }
        assert!("ab".repeat(256).parse::<DeviceToken>().is_ok());
        assert_eq!(DeviceToken::from_bytes(&token.to_bytes()).unwrap(), token);
    }

    #[test]
    fn the_generation_grows_when_the_user_changes_or_logs_out_and_only_then() {
        let mut one = registration("a1b2");
        one.user_id = user("livreur-42");
        let mut device = one.into_device(AT);
        assert_eq!(device.generation, Generation(1));
        assert!(!device.refresh(&one, LATER), "the same user again changes nothing");
        assert!(!device.refresh(&registration("a1b2"), LATER), "an absent user is unchanged");
        assert_eq!(device.generation, Generation(1));
        one.user_id = user("livreur-7");
        assert!(device.refresh(&one, LATER));
        assert_eq!(device.generation, Generation(2));
        one.user_id = Field::Clear;
        assert!(device.refresh(&one, LATER));
        assert_eq!((device.generation, device.user_id), (Generation(3), None));
    }

    #[test]
    fn a_change_of_user_clears_tags_that_are_not_sent_along() {
        let mut first = registration("a1b2");
        first.user_id = user("a");
        first.tags = Field::Set(vec!["paris-11".parse().unwrap()]);
        let mut device = first.into_device(AT);
        let mut next = registration("a1b2");
        next.user_id = user("b");
        device.refresh(&next, LATER);
        assert!(device.tags.is_empty());
        next.user_id = user("c");
        next.tags = Field::Set(vec!["x".parse().unwrap(), "x".parse().unwrap()]);
        device.refresh(&next, LATER);
        assert_eq!(device.tags.len(), 1);
    }

    #[test]
    fn a_learned_environment_is_undone_only_by_naming_another_than_before() {
        let mut named = registration("a1b2");
        named.environment = Field::Set(Environment::Production);
        let mut device = named.into_device(AT);
        device.environment = Some(Environment::Sandbox); // learned from APNs
        device.refresh(&registration("a1b2"), LATER);
        device.refresh(&named, LATER);
        assert_eq!(device.environment, Some(Environment::Sandbox), "naming the same again undoes nothing");
        named.environment = Field::Set(Environment::Sandbox);
        device.refresh(&named, LATER);
        named.environment = Field::Set(Environment::Production);
        device.refresh(&named, LATER);
        assert_eq!(device.environment, Some(Environment::Production));
    }

    #[test]
    fn an_acceptance_counts_for_the_environment_it_was_in_and_no_other() {
        let mut named = registration("a1b2");
        let mut device = named.into_device(AT);
        (device.environment, device.last_accepted_at) = (Some(Environment::Production), Some(AT));
        named.environment = Field::Set(Environment::Production);
        device.refresh(&named, LATER);
        assert_eq!(device.last_accepted_at, Some(AT), "naming what is known changes nothing");
        named.environment = Field::Set(Environment::Sandbox);
        device.refresh(&named, LATER);
        assert_eq!(device.last_accepted_at, None);
        (device.environment, device.last_accepted_at) = (Some(Environment::Production), Some(AT));
        device.refresh(&named, LATER);
        assert_eq!(device.last_accepted_at, Some(AT), "nor does repeating a wrong name");
        named.environment = Field::Clear;
        device.refresh(&named, LATER);
        assert_eq!((device.environment, device.last_accepted_at), (None, None));
    }

    #[test]
    fn a_replaced_token_keeps_the_user_only_with_proof() {
        let mut first = registration("a1b2");
        first.user_id = user("livreur-42");
        first.tags = Field::Set(vec!["paris-11".parse().unwrap()]);
        let device = first.into_device(AT);
        let replaced = |proof| {
            let mut next = registration("c3d4");
            next.proof = proof;
            let mut device = device.clone();
            device.replace_token(&next, LATER);
            device
        };
        assert_eq!(replaced(Proof::None).user_id, None);
        assert_eq!(replaced(Proof::None).generation, Generation(2));
        assert_eq!(replaced(Proof::User("livreur-7".parse().unwrap())).user_id, None);
        let kept = replaced(Proof::User("livreur-42".parse().unwrap()));
        assert_eq!((kept.user_id, kept.generation), (device.user_id.clone(), device.generation));
        assert_eq!(replaced(Proof::Server).user_id, device.user_id);
        assert_eq!(replaced(Proof::None).tags, device.tags, "tags stay with the installation");
        assert_eq!(replaced(Proof::None).id, device.id);
    }
}
