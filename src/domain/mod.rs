//! What a push is: values that cannot be wrong, and pure functions on them.
//!
//! Promises: no I/O, no framework, no clock of its own (time is a parameter), and no `use` of any other room. A value
//! of one of these types has been checked; nobody checks it again.
//!
//! | file | holds |
//! |---|---|
//! | [`topic`] | bundle id, environment |
//! | [`push`] | push type, priority, expiration, collapse id, `apns-id` |
//! | [`payload`] | Apple's JSON, byte for byte, and what is wrong or suspicious about it |
//! | [`device`] | device token, device, and how a registration changes it |
//! | [`notification`] | what a caller asked for: audience, lane, counts, status |
//! | [`delivery`] | what became of each device: states, chunks, their compact form |
//! | [`outcome`] | what APNs can answer, and what follows |
//! | [`api_key`] | API keys and scopes |
//! | [`clock`], [`secret`] | time as a value; secrets that do not print |
//! | [`spelling`] | what a name that does not exist was probably meant to be |

pub mod api_key;
pub mod clock;
pub mod delivery;
pub mod device;
pub mod notification;
pub mod outcome;
pub mod payload;
pub mod push;
pub mod secret;
pub mod spelling;
pub mod topic;

/// Serialize and Deserialize through `Display`/`FromStr` for a small value with a name.
macro_rules! serde_by_text {
    ($type:ident) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// `as_str`, `Display`, `Debug` and serde for a checked text behind a private field.
macro_rules! text_value {
    ($type:ident, $error:ident) => {
        impl $type {
            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({:?})", stringify!($type), &self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = $error;

            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }

        $crate::domain::serde_by_text!($type);
    };
}

/// A text that is no id of the kind that is named, a type of this module's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAnId(&'static str);

impl std::fmt::Display for NotAnId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = self.0.strip_suffix("Id").unwrap_or(self.0).to_ascii_lowercase();
        write!(f, "not a {kind} id: a UUID")
    }
}

impl std::error::Error for NotAnId {}

/// A `UUIDv7` with a type of its own.
macro_rules! uuid_value {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(uuid::Uuid);

        impl $type {
            /// A new id whose leading bits are `now`, so that ids sort by time.
            #[must_use]
            pub fn new(now: $crate::domain::clock::Timestamp) -> Self {
                let millis = u64::try_from(now.as_millis()).unwrap_or(0);
                let nanos = u32::try_from(millis % 1000).unwrap_or(0) * 1_000_000;
                Self(uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, millis / 1000, nanos)))
            }

            /// An id read back from where it was kept.
            #[must_use]
            pub const fn from_uuid(id: uuid::Uuid) -> Self {
                Self(id)
            }

            /// The plain UUID.
            #[must_use]
            pub const fn as_uuid(&self) -> &uuid::Uuid {
                &self.0
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(&self.0, f)
            }
        }

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({})", stringify!($type), self.0)
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::domain::NotAnId;

            fn from_str(text: &str) -> Result<Self, $crate::domain::NotAnId> {
                text.parse().map(Self).map_err(|_| $crate::domain::NotAnId(stringify!($type)))
            }
        }

        $crate::domain::serde_by_text!($type);
    };
}

pub(crate) use {serde_by_text, text_value, uuid_value};
