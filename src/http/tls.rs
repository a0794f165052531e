//! The listener's own certificate: TLS 1.2 or newer, HTTP/2 and HTTP/1.1 by ALPN.

use std::sync::Arc;

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio_rustls::TlsAcceptor;

/// From PEM: the chain, and its key. Nothing secret is in an error.
///
/// # Errors
/// A sentence that says which file is wrong and how.
pub fn acceptor(chain: &[u8], key: &[u8]) -> Result<TlsAcceptor, String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|_| "`cert` is not a chain of certificates in PEM".to_owned())?;
    if chain.is_empty() {
        return Err("`cert` holds no certificate: it must be PEM, the server's own certificate first".into());
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "`key` holds no private key in PEM".to_owned())?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| format!("`cert` and `key` do not fit together: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
