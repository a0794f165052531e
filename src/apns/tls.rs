//! TLS to APNs: 1.2 or newer, HTTP/2 by ALPN and nothing else.
//!
//! Promises: `ring` is named explicitly, so no process-wide default is needed or changed; the roots are Mozilla's (which
//! hold the `USERTrust` root that APNs' certificates chain to since 2025) and, if given, those of one more file: a
//! simulator, or an inspecting proxy. Nothing is pinned and verification cannot be switched off.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

/// The only protocol offered.
pub const ALPN_H2: &[u8] = b"h2";

/// What is wrong with the extra roots.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate in it.
    #[error("`ca_file` holds no certificate: PEM with `-----BEGIN CERTIFICATE-----` is expected")]
    NoCertificate,
    /// PEM that does not decode.
    #[error("`ca_file` is not whole PEM")]
    NotPem(#[source] rustls::pki_types::pem::Error),
    /// A certificate that cannot be a root.
    #[error("a certificate in `ca_file` cannot serve as a root of trust")]
    NotARoot(#[source] rustls::Error),
    /// The TLS library lacks what we ask of it.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// Whom we trust: Mozilla's roots, and those of `extra_pem` beside them, the text of a CA file.
///
/// # Errors
/// If the extra roots are not usable.
pub fn roots(extra_pem: Option<&[u8]>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(pem) = extra_pem {
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.add(certificate.map_err(TlsError::NotPem)?).map_err(TlsError::NotARoot)?;
            found = true;
        }
        if !found {
            return Err(TlsError::NoCertificate);
        }
    }
    Ok(roots)
}

/// The configuration that all connections share. `extra_roots_pem` is the text of a CA file.
///
/// # Errors
/// If the extra roots are not usable.
pub fn client_config(extra_roots_pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots(extra_roots_pem)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_2_is_offered() {
        let config = client_config(None).unwrap();
        assert_eq!(config.alpn_protocols, [b"h2".to_vec()]);
    }

    #[test]
    fn extra_roots_that_are_none_are_refused() {
        assert!(matches!(client_config(Some(b"")), Err(TlsError::NoCertificate)));
        assert!(matches!(
            client_config(Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
            Err(TlsError::NotARoot(_))
        ));
    }
}
