//! The values of `apns-push-type` and what each allows.
//!
//! Promises: the simulator's own table, from Apple's page "Sending notification requests to APNs".

/// The most bytes a body may have, for every push type but `voip`.
pub const MAX_BODY_BYTES: usize = 4096;
/// The most bytes the body of a `voip` push may have.
pub const MAX_VOIP_BODY_BYTES: usize = 5120;

macro_rules! push_types {
    ($($variant:ident $name:literal $suffix:literal;)*) => {
        /// A push type APNs knows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum PushType { $(#[doc = concat!("`", $name, "`")] $variant,)* }

        impl PushType {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The header's value.
            #[must_use]
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => $name,)* } }

            /// What its topics have behind the bundle id.
            #[must_use]
            pub const fn topic_suffix(self) -> &'static str { match self { $(Self::$variant => $suffix,)* } }

            /// The push type with this header value; letter case counts.
            #[must_use]
            pub fn parse(value: &[u8]) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| kind.name().as_bytes() == value)
            }
        }
    };
}

push_types! {
    Alert "alert" "";
    Background "background" "";
    Voip "voip" ".voip";
    Complication "complication" ".complication";
    FileProvider "fileprovider" ".pushkit.fileprovider";
    Mdm "mdm" "";
    Location "location" ".location-query";
    LiveActivity "liveactivity" ".push-type.liveactivity";
    PushToTalk "pushtotalk" ".voip-ptt";
    Controls "controls" ".push-type.controls";
    Widgets "widgets" ".push-type.widgets";
}

impl PushType {
    /// The most bytes its body may have.
    #[must_use]
    pub const fn max_body_bytes(self) -> usize {
        match self {
            Self::Voip => MAX_VOIP_BODY_BYTES,
            _ => MAX_BODY_BYTES,
        }
    }
}

/// The bundle id in a topic: the topic without a push type's suffix.
#[must_use]
pub fn bundle_id(topic: &str) -> &str {
    PushType::ALL
        .iter()
        .map(|kind| kind.topic_suffix())
        .filter(|suffix| !suffix.is_empty())
        .find_map(|suffix| topic.strip_suffix(suffix))
        .unwrap_or(topic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_voip_may_be_longer_than_4096_bytes() {
        assert_eq!(PushType::parse(b"voip").unwrap().max_body_bytes(), 5120);
        assert_eq!(PushType::parse(b"liveactivity").unwrap().max_body_bytes(), 4096);
        assert_eq!(PushType::parse(b"Alert"), None, "push types are lower case");
    }

    #[test]
    fn a_topic_is_a_bundle_id_and_a_suffix() {
        assert_eq!(bundle_id("fr.ocpizza.livreur"), "fr.ocpizza.livreur");
        assert_eq!(bundle_id("fr.ocpizza.livreur.voip"), "fr.ocpizza.livreur");
        assert_eq!(bundle_id("fr.ocpizza.livreur.push-type.liveactivity"), "fr.ocpizza.livreur");
    }
}
