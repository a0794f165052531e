//! Apple's JSON, kept and sent byte for byte.
//!
//! Promises: the bytes that the caller wrote are the bytes that APNs gets; they are one UTF-8 JSON object without a
//! repeated key, no longer than the push type allows.

use bytes::Bytes;

/// A checked payload. Cloning shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload(Bytes);

impl Payload {
    /// A payload that was checked before and is read back from where it was kept.
    #[must_use]
    pub const fn from_stored(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// The bytes for APNs.
    #[must_use]
    pub const fn bytes(&self) -> &Bytes {
        &self.0
    }
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Payload({} bytes)", self.0.len())
    }
}
