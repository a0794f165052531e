//! The simulator's certificate authority and its server certificate.
//!
//! Promises: the authority is made on the first start and kept in a folder (`ca.key`, `ca.pem`), so whoever trusts
//! `ca.pem` once trusts every later start; the private file is readable by its owner only. The server's certificate
//! and key are made anew at every start and never leave memory.

use std::{
    fs, io,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::client_certificate::AnyCertificate;

/// What can go wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file of the folder cannot be read or written.
    #[error("`{}` cannot be read or written", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stored authority cannot be used, or a name is no host name.
    #[error("the certificate authority in `{}` cannot be used: delete `ca.key` and `ca.pem` there to make a new one", folder.display())]
    Authority {
        /// Its folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// rustls refuses our certificate.
    #[error("the server certificate is refused by the TLS library")]
    Tls(#[from] rustls::Error),
}

/// The authority whose certificate clients must trust.
pub(super) struct Authority {
    /// Its certificate.
    pub(super) pem: String,
    /// Where that is on disk.
    pub(super) file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    /// Opens the authority in `folder`, making what is missing.
    pub(super) fn open(folder: &Path) -> Result<Self, CertificateError> {
        let refused = |source| CertificateError::Authority { folder: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(|source| CertificateError::File { path: folder.to_owned(), source })?;
        let (key_file, file) = (folder.join("ca.key"), folder.join("ca.pem"));
        let (key, key_is_new) = if let Some(pem) = read(&key_file)? {
            (KeyPair::from_pem(&pem).map_err(refused)?, false)
        } else {
            let key = KeyPair::generate().map_err(refused)?;
            write(&key_file, &key.serialize_pem(), 0o600)?;
            (key, true)
        };
        let pem = match read(&file)? {
            Some(pem) if !key_is_new => pem,
            _ => {
                let pem = authority_params().self_signed(&key).map_err(refused)?.pem();
                write(&file, &pem, 0o644)?;
                pem
            }
        };
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(refused)?;
        Ok(Self { pem, file, issuer, folder: folder.to_owned() })
    }

    /// TLS settings of the server: a fresh certificate for this machine and `names`, TLS 1.2 and 1.3, ALPN `h2` only,
    /// client certificates as they like.
    pub(super) fn server_config(&self, names: &[String]) -> Result<rustls::ServerConfig, CertificateError> {
        let refused = |source| CertificateError::Authority { folder: self.folder.clone(), source };
        let key = KeyPair::generate().map_err(refused)?;
        let certificate =
            server_params(names).and_then(|params| params.signed_by(&key, &self.issuer)).map_err(refused)?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = rustls::crypto::ring::default_provider();
        let clients = Arc::new(AnyCertificate { algorithms: provider.signature_verification_algorithms });
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.der().clone()], private)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Sonnette APNs simulator CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = rcgen::date_time_ymd(2025, 1, 1);
    params.not_after = rcgen::date_time_ymd(2125, 1, 1);
    params
}

fn server_params(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut all = vec![
        "localhost".to_owned(),
        IpAddr::from(Ipv4Addr::LOCALHOST).to_string(),
        IpAddr::from(Ipv6Addr::LOCALHOST).to_string(),
    ];
    all.extend(names.iter().cloned());
    let mut params = CertificateParams::new(all)?; // an address among the names becomes an address in the certificate
    params.distinguished_name.push(DnType::CommonName, "Sonnette APNs simulator");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.not_before = rcgen::date_time_ymd(2025, 1, 1);
    params.not_after = rcgen::date_time_ymd(2125, 1, 1);
    Ok(params)
}

fn read(path: &Path) -> Result<Option<String>, CertificateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CertificateError::File { path: path.to_owned(), source }),
    }
}

/// Writes a whole file or none: a half-written key must not be taken for a key at the next start.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertificateError> {
    let failed = |source| CertificateError::File { path: path.to_owned(), source };
    let part = path.with_extension("part");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&part).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&part, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_second_start_has_the_same_authority_and_keeps_its_key_private() {
        let folder = std::env::temp_dir().join(format!("sonnette-ca-{}", uuid::Uuid::new_v4()));
        let first = Authority::open(&folder).unwrap();
        let second = Authority::open(&folder).unwrap();
        assert_eq!(first.pem, second.pem);
        second.server_config(&["apns.example".to_owned(), "10.0.0.7".to_owned()]).unwrap();
        assert_eq!(fs::metadata(folder.join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_lost_key_makes_a_new_authority_and_a_broken_one_says_what_to_do() {
        let folder = std::env::temp_dir().join(format!("sonnette-ca-{}", uuid::Uuid::new_v4()));
        let first = Authority::open(&folder).unwrap();
        fs::remove_file(folder.join("ca.key")).unwrap();
        let second = Authority::open(&folder).unwrap();
        assert_ne!(first.pem, second.pem);
        fs::write(folder.join("ca.key"), "no key").unwrap();
        let error = Authority::open(&folder).err().unwrap().to_string();
        assert!(error.contains("delete `ca.key`"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }
}
