//! Who we are to APNs: team, key id and the P-256 key out of a `.p8` file.
//!
//! Promises: a [`Credential`] has been checked, so that signing with it cannot fail for a reason a person could have
//! been told earlier; errors say what is wrong with a file and how to get a right one; nothing here shows a key.

use std::{fmt, str::FromStr};

use p256::{
    SecretKey,
    ecdsa::SigningKey,
    elliptic_curve::Generate,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey, LineEnding, ObjectIdentifier, PrivateKeyInfoRef},
};
use rustls::pki_types::pem::{PemObject, SectionKind};
use sha2::{Digest, Sha256};

use super::Fingerprint;
use crate::domain::secret::Secret;

const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const P_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");

macro_rules! ten_characters {
    ($(#[$doc:meta])* $type:ident, $error:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash)]
        pub struct $type(Box<str>);

        #[doc = concat!("A text that is no ", $what, ".")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        #[error("not a {}: ten letters and digits, as the Apple developer account shows them", $what)]
        pub struct $error;

        impl $type {
            /// Apple's length, in characters.
            pub const CHARACTERS: usize = 10;

            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = $error;

            fn from_str(text: &str) -> Result<Self, $error> {
                if text.len() == Self::CHARACTERS && text.bytes().all(|b| b.is_ascii_alphanumeric()) {
                    Ok(Self(text.into()))
                } else {
                    Err($error)
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($type), &self.0)
            }
        }
    };
}

ten_characters! {
    /// The team that owns the key: the claim `iss`.
    TeamId, NotATeamId, "team id"
}

ten_characters! {
    /// Which of the team's keys it is: the header field `kid`.
    KeyId, NotAKeyId, "key id"
}

/// What is wrong with a key file. Never repeats what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Nothing in it is PEM.
    #[error("not a PEM file: a .p8 file from Apple begins with `-----BEGIN PRIVATE KEY-----`")]
    NotPem,
    /// A certificate.
    #[error(
        "a certificate, not a key: Sonnette uses token-based authentication, whose .p8 file is made under Keys in the Apple developer account"
    )]
    Certificate,
    /// The public half.
    #[error("a public key: the private key is needed, the .p8 file that Apple lets you download once")]
    PublicKey,
    /// Behind a passphrase.
    #[error("the key is encrypted with a passphrase: a .p8 file from Apple is not")]
    Encrypted,
    /// `RSA PRIVATE KEY`, or RSA inside PKCS#8.
    #[error("an RSA key: APNs wants an elliptic-curve key on P-256")]
    Rsa,
    /// `EC PRIVATE KEY`.
    #[error(
        "a key in SEC1 form (`BEGIN EC PRIVATE KEY`), not PKCS#8: convert it with `openssl pkcs8 -topk8 -nocrypt -in FILE`"
    )]
    Sec1,
    /// An elliptic curve, but another one.
    #[error("a key on another curve than P-256")]
    OtherCurve,
    /// Ed25519 and others.
    #[error("not an elliptic-curve key for ES256: APNs wants one on P-256")]
    OtherAlgorithm,
    /// The label is right, the inside is not.
    #[error("damaged: the label says PRIVATE KEY, but there is no whole PKCS#8 key inside")]
    Damaged,
}

/// A team's key for APNs.
#[derive(Clone)]
pub struct Credential {
    team: TeamId,
    key_id: KeyId,
    key: Secret<SigningKey>,
    fingerprint: Fingerprint,
}

impl Credential {
    /// From the text of a `.p8` file.
    ///
    /// # Errors
    /// [`KeyError`] says what the text is instead.
    pub fn new(team: TeamId, key_id: KeyId, p8: &Secret<String>) -> Result<Self, KeyError> {
        let key = parse(p8)?;
        let public = public_key_der(&key)?;
        let mut hash = Sha256::new();
        for part in [team.as_str().as_bytes(), key_id.as_str().as_bytes()] {
            hash.update(part);
            hash.update([0]);
        }
        hash.update(&public);
        Ok(Self {
            team,
            key_id,
            key: Secret::new(SigningKey::from(&key)),
            fingerprint: Fingerprint(hex::encode(hash.finalize()).into()),
        })
    }

    /// The team.
    #[must_use]
    pub fn team(&self) -> &TeamId {
        &self.team
    }

    /// The key's id.
    #[must_use]
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// What names this credential in breakers and metrics.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    pub(super) fn key(&self) -> &Secret<SigningKey> {
        &self.key
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("team", &self.team)
            .field("key_id", &self.key_id)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// What a `.p8` file is, as `sonnette keys inspect` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// SHA-256 of the public key (DER, `SubjectPublicKeyInfo`) in hex: the same for every copy of the key, and what
    /// `openssl ec -in FILE -pubout -outform DER | sha256sum` prints.
    pub public_key_sha256: String,
    /// The public key as PEM: may be shown.
    pub public_key_pem: String,
}

/// Looks at a `.p8` file without needing to know whose it is.
///
/// # Errors
/// [`KeyError`] says what the text is instead.
pub fn inspect(p8: &Secret<String>) -> Result<KeyInfo, KeyError> {
    let key = parse(p8)?;
    let pem = key.public_key().to_public_key_pem(LineEnding::LF).map_err(|_| KeyError::Damaged)?;
    Ok(KeyInfo { public_key_sha256: hex::encode(Sha256::digest(public_key_der(&key)?)), public_key_pem: pem })
}

/// Why no key could be made: the machine gave no randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no randomness for a key")]
pub struct NoRandomness;

/// Makes a new key as the text of a `.p8` file: for the simulator, demonstrations and tests. Apple accepts only keys
/// that it made itself.
///
/// # Errors
/// If the machine gives no randomness.
pub fn generate() -> Result<Secret<String>, NoRandomness> {
    let key = SecretKey::try_generate().map_err(|_| NoRandomness)?;
    let pem = key.to_pkcs8_pem(LineEnding::LF).map_err(|_| NoRandomness)?;
    Ok(Secret::new(pem.as_str().to_owned()))
}

fn public_key_der(key: &SecretKey) -> Result<Vec<u8>, KeyError> {
    key.public_key().to_public_key_der().map(p256::pkcs8::Document::into_vec).map_err(|_| KeyError::Damaged)
}

fn parse(p8: &Secret<String>) -> Result<SecretKey, KeyError> {
    // An editor may have put a mark or a comment in front.
    let text = p8.expose();
    let text = text.find("-----BEGIN").and_then(|at| text.get(at..)).ok_or(KeyError::NotPem)?;
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") || text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(KeyError::Encrypted);
    }
    let (kind, der) = <(SectionKind, Vec<u8>)>::from_pem_slice(text.as_bytes())
        .map_err(|_| if text.contains("-----BEGIN PRIVATE KEY-----") { KeyError::Damaged } else { KeyError::NotPem })?;
    match kind {
        SectionKind::PrivateKey => {}
        SectionKind::Certificate | SectionKind::Csr => return Err(KeyError::Certificate),
        SectionKind::PublicKey => return Err(KeyError::PublicKey),
        SectionKind::RsaPrivateKey => return Err(KeyError::Rsa),
        SectionKind::EcPrivateKey => return Err(KeyError::Sec1),
        _ => return Err(KeyError::NotPem),
    }
    let info = PrivateKeyInfoRef::try_from(der.as_slice()).map_err(|_| KeyError::Damaged)?;
    match info.algorithm.oid {
        EC_PUBLIC_KEY => {}
        RSA_ENCRYPTION => return Err(KeyError::Rsa),
        _ => return Err(KeyError::OtherAlgorithm),
    }
    if !info.algorithm.parameters_oid().is_ok_and(|curve| curve == P_256) {
        return Err(KeyError::OtherCurve);
    }
    SecretKey::from_pkcs8_der(&der).map_err(|_| KeyError::Damaged)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A throw-away key that was never Apple's: the SHA-256 of "sonnette: a throw-away key for tests" as the number.
    pub(crate) const TEST_KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjt/JdFjtJiO4OLcQ
enKG8AidHmzZAwsQfQHXczfGj2GhRANCAAQGUYplFAlJofF61XExg8L0JN1qYYJq
N7r5Lwg/gD3OyKwbEfF2cyH7vAitWXPpRI3KRIzHDykoSNtRERwkd7bp
-----END PRIVATE KEY-----";

    const SEC1: &str = "-----BEGIN EC PRIVATE KEY-----
MHcCAQEEII7fyXRY7SYjuDi3EHpyhvAInR5s2QMLEH0B13M3xo9hoAoGCCqGSM49
AwEHoUQDQgAEBlGKZRQJSaHxetVxMYPC9CTdamGCaje6+S8IP4A9zsisGxHxdnMh
+7wIrVlz6USNykSMxw8pKEjbUREcJHe26Q==
-----END EC PRIVATE KEY-----";

    const P_384: &str = "-----BEGIN PRIVATE KEY-----
MIG2AgEAMBAGByqGSM49AgEGBSuBBAAiBIGeMIGbAgEBBDBdF2ks86Qw3rsvga/0
5Mdjck9uYpXUj9XDedxyu5sp9UNWiFbSwIj/IWL6jeKVZtShZANiAAQlgev6/ks9
blf9/iFJFm+P3Jrih1uL0f+3eRjYaZ4DlbVCdS28f8kz7HrHcWzfzGxCZQjHuyiC
IeRp1hHdTNA6ar4ejrsgyo6W8lS/p27d8qHTQS8BTi/a3MfRko4fVrc=
-----END PRIVATE KEY-----";

    const ED25519: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEICJsUedzsG8qvJuiX9G0XODFBe6LD7l/1cFSuzfUMu0W
-----END PRIVATE KEY-----";

    const RSA: &str = "-----BEGIN PRIVATE KEY-----
MIICdwIBADANBgkqhkiG9w0BAQEFAASCAmEwggJdAgEAAoGBAKck6dngPADSxFBT
LMPHnlLWyUyNo+QyWCMMlHsLhFRFJLuFh/tulSDiC/XHwpZb0/VTFQtREAWWmRM7
nZm1eP1NTgYXwLXX/6AtCyd9RUo1yeIodWrNqeI7kY9d3bTc65QBrOxDXG6cE1NV
5KEqVmxMryIHreGKZBlOkVZIlYhVAgMBAAECgYEAmKh1UcKk6xeVp8uf2hyq9Pwp
lNrU8qosp65ous01CoawWvlFzpYcbJEo3U2a4xtxxuIgGVrraD85BkDv26DMpAuS
m86fXi5LqkVWudQvhTLf0HR3EPBE4mmpv+mkbRFEliKsI0ph6kwyAt3bcpt6TNRo
B3H8fcSlNBxEJaYx5G0CQQDTP9EI7bEvlM1VVSVKJiU9r2GXw5+HW2WT4dFI5Kmx
uTdrNOUOf2ysLrnII9XGLceBK1pEKMrGzAaHMJvXobirAkEAyo0/7++hmCuO0Jts
RCV2xnZCxZ5QxE7Tf6Q9VGSXPdHUysYQW1QZHOfVNlL+IMF/VLin4TOZQ2ZJl+QJ
a6fC/wJANNtM5F0E7pDe57EMSYdN3idZ1e1epzGZMu1XvlNomk1rrmlnvr7nZBW0
6nz86j9eIdXFGjTSt/co0v64n7WZTQJAE7DFjWqrN+LMIGVrkfheYo6ukQ2B5oOP
NfJeb+zTcxQJ7qhwgKBdTJ0Q8hYBVGfbG/5Te6YLeSzhbJ2jeM63OwJBAMkPL64s
6MYpXxMLIXD/fXEkbwrCPCxFeMw33hG3Itx4wuINJKsu3rekrkDiuB37bDEjYjAW
mnh1659vLw837Aw=
-----END PRIVATE KEY-----";

    pub(crate) fn credential() -> Credential {
        Credential::new("ABCDE12345".parse().unwrap(), "ABC123DEFG".parse().unwrap(), &Secret::new(TEST_KEY.to_owned()))
            .unwrap()
    }

    fn verdict(text: &str) -> Result<KeyInfo, KeyError> {
        inspect(&Secret::new(text.to_owned()))
    }

    #[test]
    fn a_wrong_key_file_is_told_what_it_is() {
        let damaged = TEST_KEY.replace("MIGHAgEAMBMGByqGSM49", "MIGHAgEAMBMGByqGSM48");
        let encrypted = TEST_KEY.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        let certificate = TEST_KEY.replace("PRIVATE KEY", "CERTIFICATE");
        let rsa_label = RSA.replace("PRIVATE KEY", "RSA PRIVATE KEY");
        let public = TEST_KEY.replace("PRIVATE KEY", "PUBLIC KEY");
        let cut = TEST_KEY.get(..80).unwrap();
        let cases = [
            ("", KeyError::NotPem),
            ("eyJhbGciOiJFUzI1NiJ9", KeyError::NotPem),
            (cut, KeyError::Damaged),
            (SEC1, KeyError::Sec1),
            (P_384, KeyError::OtherCurve),
            (ED25519, KeyError::OtherAlgorithm),
            (RSA, KeyError::Rsa),
            (&rsa_label, KeyError::Rsa),
            (&encrypted, KeyError::Encrypted),
            (&certificate, KeyError::Certificate),
            (&public, KeyError::PublicKey),
        ];
        for (text, expected) in cases {
            assert_eq!(verdict(text), Err(expected), "{expected}");
        }
        assert!(verdict(&damaged).is_err());
    }

    #[test]
    fn a_key_file_with_carriage_returns_or_without_a_last_line_end_is_read() {
        let plain = verdict(TEST_KEY).unwrap();
        assert_eq!(verdict(&format!("{TEST_KEY}\n")).unwrap(), plain);
        assert_eq!(verdict(&TEST_KEY.replace('\n', "\r\n")).unwrap(), plain);
        assert_eq!(verdict(&format!("\u{feff}{TEST_KEY}\n")).unwrap(), plain);
    }

    #[test]
    fn fingerprints_are_those_that_another_program_computes() {
        // python3: cryptography's SubjectPublicKeyInfo DER through hashlib.sha256
        assert_eq!(
            verdict(TEST_KEY).unwrap().public_key_sha256,
            "3198ce6c6c3475e74de2e1c1bdf0e153b58b9be31a27db31b0aabf9a3c5f7a2e"
        );
        assert_eq!(&*credential().fingerprint().0, "e589c8ff22e98a3f03ec9c91d244082b7507554fe6d7bc2674c6611402dd8c56");
    }

    #[test]
    fn a_generated_key_is_a_key_and_never_the_same_twice() {
        let (one, two) = (generate().unwrap(), generate().unwrap());
        assert_ne!(inspect(&one).unwrap(), inspect(&two).unwrap());
    }

    #[test]
    fn ids_have_ten_letters_or_digits() {
        assert!("ABCDE12345".parse::<TeamId>().is_ok());
        assert!("ABCDE1234".parse::<TeamId>().is_err());
        assert!("ABCDE-2345".parse::<KeyId>().is_err());
        assert!("ABCDÉ1234".parse::<KeyId>().is_err());
    }

    #[test]
    fn a_credential_does_not_show_its_key() {
        let shown = format!("{:?}", credential());
        assert_eq!(shown, "Credential { team: TeamId(ABCDE12345), key_id: KeyId(ABC123DEFG), key: [secret], .. }");
    }
}
