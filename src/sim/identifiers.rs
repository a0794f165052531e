//! The UUIDs APNs gives out: `apns-id` for pushes that bring none, and `apns-unique-id`.
//!
//! Promises: cheap (no system call per push) and distinct within a process; they are names, not secrets.

use http::HeaderValue;
use uuid::Uuid;

/// A source of UUIDs, one for each connection.
#[derive(Debug)]
pub(super) struct Identifiers {
    state: u64,
}

impl Identifiers {
    /// A source that starts at a random place.
    pub(super) fn new() -> Self {
        Self { state: Uuid::new_v4().as_u64_pair().0 }
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Uuid {
        let (high, low) = (self.step(), self.step());
        uuid::Builder::from_random_bytes(Uuid::from_u64_pair(high, low).into_bytes()).into_uuid()
    }

    /// `SplitMix64`, by Sebastiano Vigna (public domain).
    const fn step(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// A UUID as APNs writes those it makes itself: in upper case.
pub(super) fn upper_case(id: Uuid) -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text: &str = id.hyphenated().encode_upper(&mut text);
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Reads a UUID in canonical form, 8-4-4-4-12 hex digits in either case.
pub(super) fn canonical(value: &[u8]) -> Option<Uuid> {
    if value.len() != uuid::fmt::Hyphenated::LENGTH {
        return None; // the parser below also reads forms without hyphens, in braces and as URN
    }
    Uuid::try_parse_ascii(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_ids_are_distinct_version_4_and_upper_case() {
        let mut source = Identifiers::new();
        let (one, two) = (source.next(), source.next());
        assert_ne!(one, two);
        assert_eq!(one.get_version_num(), 4);
        let text = upper_case(Uuid::from_u128(0xabcd));
        assert_eq!(text, "00000000-0000-0000-0000-00000000ABCD");
    }

    #[test]
    fn only_the_canonical_form_is_a_message_id() {
        assert!(canonical(b"123e4567-e89b-12d3-a456-4266554400a0").is_some());
        assert!(canonical(b"123E4567-E89B-12D3-A456-4266554400A0").is_some());
        assert!(canonical(b"123e4567e89b12d3a4564266554400a0").is_none(), "no hyphens");
        assert!(canonical(b"{123e4567-e89b-12d3-a456-4266554400a0}").is_none());
        assert!(canonical(b"123e4567-e89b-12d3-a456-4266554400ag").is_none());
        assert!(canonical(b"").is_none());
    }
}
