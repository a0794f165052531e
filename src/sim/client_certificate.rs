//! Client certificates: the other way to prove who sends, on connections without provider tokens.
//!
//! Promises: whoever presents a certificate must have its private key; nothing else of it is looked at but its bytes.
//! What it may send to is registered here, as Apple would have written it into the certificate. One that nobody
//! registered gets as far as its first answer, as at Apple's.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use sha2::{Digest as _, Sha256};

use super::{environment::Environment, reason::Reason};

/// A client certificate as it is registered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// The certificate in PEM, by whomever signed.
    pub certificate_pem: String,
    /// What it may send to, suffixes included. If it is one, `apns-topic` may be absent.
    pub topics: Vec<String>,
    /// Where it may be used.
    #[serde(default = "both_environments")]
    pub environments: Vec<Environment>,
}

fn both_environments() -> Vec<Environment> {
    Environment::ALL.to_vec()
}

/// A text that is no certificate in PEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("`certificate_pem` is no certificate in PEM (`-----BEGIN CERTIFICATE-----`)")]
pub struct NotACertificate;

/// A registered client certificate and its SHA-256 in hex, which names it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KnownCertificate {
    /// SHA-256 of the certificate, hex.
    pub fingerprint: String,
    /// What it may send to.
    pub topics: Vec<String>,
    /// Where it may be used.
    pub environments: Vec<Environment>,
}

impl KnownCertificate {
    /// Whether it may send to `topic`.
    pub(super) fn allows(&self, topic: &str) -> bool {
        self.topics.iter().any(|allowed| allowed == topic)
    }

    /// The topic of pushes that name none.
    pub(super) fn only_topic(&self) -> Option<&str> {
        match self.topics.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }
}

/// The client certificates of one simulator. A clone is another handle on the same certificates.
#[derive(Debug, Clone, Default)]
pub struct ClientCertificates {
    known: Arc<RwLock<HashMap<String, Arc<KnownCertificate>>>>,
}

impl ClientCertificates {
    /// Registers a certificate, or replaces what is known of it. Returns its fingerprint. Open connections keep what was
    /// known when they were made.
    ///
    /// # Errors
    /// [`NotACertificate`]
    pub fn register(&self, certificate: ClientCertificate) -> Result<String, NotACertificate> {
        let der =
            CertificateDer::from_pem_slice(certificate.certificate_pem.as_bytes()).map_err(|_| NotACertificate)?;
        let fingerprint = fingerprint(&der);
        let ClientCertificate { topics, environments, .. } = certificate;
        let known = Arc::new(KnownCertificate { fingerprint: fingerprint.clone(), topics, environments });
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(fingerprint.clone(), known);
        Ok(fingerprint)
    }

    /// Forgets a certificate. Says whether it was there.
    #[must_use]
    pub fn remove(&self, fingerprint: &str) -> bool {
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&fingerprint.to_ascii_lowercase()).is_some()
    }

    /// All of them, by fingerprint.
    #[must_use]
    pub fn list(&self) -> Vec<KnownCertificate> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = known.values().map(|known| KnownCertificate::clone(known)).collect();
        all.sort_by(|a, b| a.fingerprint.cmp(&b.fingerprint));
        all
    }

    /// Check 5 of a connection that began with `certificate`.
    pub(super) fn check(
        &self,
        certificate: &CertificateDer<'_>,
        environment: Environment,
    ) -> Result<Arc<KnownCertificate>, Reason> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let known = known.get(&fingerprint(certificate)).ok_or(Reason::BadCertificate)?;
        if known.environments.contains(&environment) {
            Ok(Arc::clone(known))
        } else {
            Err(Reason::BadCertificateEnvironment)
        }
    }
}

fn fingerprint(der: &CertificateDer<'_>) -> String {
    hex::encode(Sha256::digest(der))
}

/// Lets in clients without a certificate, and those that have the key of theirs.
#[derive(Debug)]
pub(super) struct AnyCertificate {
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnyCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion()) // who signed it does not matter: it is registered, or its pushes are refused
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
