//! `database.url`: what it says, which files it names, and what a server's refusal means.
//!
//! Promises: an option that is not known, given twice, or without effect is an error and never passes in silence; a file
//! that is named is there and holds what it should before anything is connected; no error shows the password.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use rustls::{
    CertificateError,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};

use super::StoreError;

/// Prepared statements a connection keeps: all there are, with lists in powers of two. One that is pushed out is closed,
/// and MySQL does not answer a close: with Nagle's algorithm on, which sqlx leaves on, the next statement waits 40 ms.
const KEPT_STATEMENTS: usize = 400;

/// What may stand behind the `?`. sqlx would ignore anything else, and a misspelt `ssl-mode` must not pass in silence.
const OPTIONS: &[&str] = &["ssl-mode", "ssl-ca", "ssl-cert", "ssl-key", "socket", "statement-cache-capacity"];

/// Those whose values are files.
const FILES: &[&str] = &["ssl-ca", "ssl-cert", "ssl-key", "socket"];

/// The same address with its files relative to `folder`, where they are not absolute.
#[must_use]
pub fn anchored(url: &str, folder: &Path) -> String {
    if let Some(path) = url.strip_prefix("sqlite://") {
        return format!("sqlite://{}", folder.join(path).display());
    }
    let Some((address, options)) = url.split_once('?') else { return url.to_owned() };
    let anchored = options.split('&').map(|option| match named(option) {
        (key, Some(value)) if FILES.contains(&key.as_str()) && !value.is_empty() => {
            let path = folder.join(value).display().to_string();
            format!("{key}={}", utf8_percent_encode(&path, NON_ALPHANUMERIC))
        }
        _ => option.to_owned(),
    });
    format!("{address}?{}", anchored.collect::<Vec<_>>().join("&"))
}

/// The private key that the address names, if it does.
#[must_use]
pub fn private_key(url: &str) -> Option<PathBuf> {
    let (_, options) = url.split_once('?')?;
    options.split('&').find_map(|option| match named(option) {
        (key, Some(value)) if key == "ssl-key" => Some(PathBuf::from(value)),
        _ => None,
    })
}

/// An option's name, as the documentation writes it, and its value.
fn named(option: &str) -> (String, Option<String>) {
    let (key, value) = option.split_once('=').map_or((option, None), |(key, value)| (key, Some(value)));
    let key = match key {
        "sslmode" => "ssl-mode",
        "sslca" => "ssl-ca",
        "sslcert" => "ssl-cert",
        "sslkey" => "ssl-key",
        other => other,
    };
    // As browsers encode: a blank is a `+`.
    let value = value.map(|v| percent_decode_str(&v.replace('+', " ")).decode_utf8_lossy().into_owned());
    (key.to_owned(), value)
}

fn bad(why: impl fmt::Display) -> StoreError {
    StoreError::Settings(format!("{why}: write mysql://user:password@host/database, with `%40` for an `@` and so on"))
}

/// One server, and how to speak to it.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// For sqlx. Holds the password.
    pub(super) options: MySqlConnectOptions,
    tls: Tls,
}

#[derive(Debug, Clone, Default)]
struct Tls {
    mode: MySqlSslMode,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.options.get_socket() {
            Some(socket) => write!(f, "{}", socket.display()),
            None => write!(f, "{}:{}", self.options.get_host(), self.options.get_port()),
        }
    }
}

/// What stands behind the `?`.
#[derive(Debug, Default)]
struct Options {
    tls: Tls,
    key: Option<PathBuf>,
    socket: Option<PathBuf>,
    kept_statements: Option<usize>,
}

impl Options {
    fn read(text: &str) -> Result<Self, StoreError> {
        let mut options = Self::default();
        let mut seen = Vec::new();
        let mut mode = None;
        for option in text.split('&').filter(|o| !o.is_empty()) {
            let (key, value) = named(option);
            if !OPTIONS.contains(&key.as_str()) {
                // Shown only if it is a word: behind a `?` in a password that was not escaped stands the rest of it.
                let word = key.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'_');
                let key = if word { key.as_str() } else { "that" };
                return Err(bad(format_args!("no option is called `{key}` (there are {})", OPTIONS.join(", "))));
            }
            if seen.contains(&key) {
                return Err(bad(format_args!("`{key}` is given twice")));
            }
            let value = value.filter(|v| !v.is_empty()).ok_or_else(|| bad(format_args!("`{key}` has no value")))?;
            match key.as_str() {
                "ssl-mode" => {
                    let parsed = value.parse::<MySqlSslMode>().map_err(|_| {
                        bad("`ssl-mode` is none of DISABLED, PREFERRED, REQUIRED, VERIFY_CA and VERIFY_IDENTITY")
                    })?;
                    mode = Some(parsed);
                }
                "ssl-ca" => options.tls.ca = Some(value.into()),
                "ssl-cert" => options.tls.certificate = Some(value.into()),
                "ssl-key" => options.key = Some(value.into()),
                "socket" => options.socket = Some(value.into()),
                _ => {
                    let number = value.parse().map_err(|_| bad(format_args!("`{key}` is not a number")))?;
                    options.kept_statements = Some(number);
                }
            }
            seen.push(key);
        }
        options.tls.mode = mode.unwrap_or_default();
        options.check()?;
        Ok(options)
    }

    /// What would be ignored, or found missing only while connecting.
    fn check(&self) -> Result<(), StoreError> {
        let Tls { mode, ca, certificate } = &self.tls;
        let refused = |why: &str| Err(StoreError::Settings(why.to_owned()));
        if ca.is_some() && !matches!(mode, MySqlSslMode::VerifyCa | MySqlSslMode::VerifyIdentity) {
            return refused(
                "`ssl-ca` has no effect without `ssl-mode=VERIFY_IDENTITY` (or VERIFY_CA, which takes any host's name)",
            );
        }
        if certificate.is_some() != self.key.is_some() {
            return refused("`ssl-cert` and `ssl-key` belong together: name both");
        }
        if certificate.is_some() && matches!(mode, MySqlSslMode::Disabled) {
            return refused("`ssl-cert` has no effect with `ssl-mode=DISABLED`");
        }
        for (key, file) in [("ssl-ca", ca), ("ssl-cert", certificate)] {
            if let Some(file) = file {
                let pem = read(key, file)?;
                match CertificateDer::pem_slice_iter(&pem).next() {
                    Some(Ok(_)) => {}
                    _ => return Err(holds_no(key, file, "certificate in PEM (`-----BEGIN CERTIFICATE-----`)")),
                }
            }
        }
        if let Some(file) = &self.key {
            PrivateKeyDer::from_pem_slice(&read("ssl-key", file)?)
                .map_err(|_| holds_no("ssl-key", file, "private key in PEM that has no password of its own"))?;
        }
        Ok(())
    }
}

fn read(key: &str, file: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(file)
        .map_err(|error| StoreError::Settings(format!("`{key}`: {} cannot be read: {error}", file.display())))
}

fn holds_no(key: &str, file: &Path, what: &str) -> StoreError {
    StoreError::Settings(format!("`{key}`: {} holds no {what}", file.display()))
}

/// The hosts of `mysql://user:password@host1,host2:3307/database?options`, in their order.
pub(super) fn hosts(url: &str, slow: Option<Duration>) -> Result<Vec<Host>, StoreError> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| bad("not a URL"))?;
    if !matches!(scheme, "mysql" | "mariadb") {
        return Err(bad("the scheme is none of sqlite, mysql and mariadb"));
    }
    let (address, options) = rest.split_once('?').unwrap_or((rest, ""));
    let options = Options::read(options)?;
    let (authority, database) = address.split_once('/').unwrap_or((address, ""));
    if database.is_empty() {
        return Err(bad("the name of the database is missing"));
    }
    let (account, names) = authority.rsplit_once('@').map_or(("", authority), |(account, names)| (account, names));
    let account = if account.is_empty() { String::new() } else { format!("{account}@") };
    names
        .split(',')
        .map(|host| {
            if host.is_empty() {
                return Err(bad("a host's name is missing"));
            }
            // The error of the parser is not shown: it may quote the password.
            let parsed = format!("mysql://{account}{host}/{database}").parse::<MySqlConnectOptions>();
            let parsed = parsed.map_err(|_| bad("user, password, host or port cannot be read"))?;
            Ok(options.host(parsed, slow))
        })
        .collect()
}

impl Options {
    fn host(&self, parsed: MySqlConnectOptions, slow: Option<Duration>) -> Host {
        let kept = self.kept_statements.unwrap_or(KEPT_STATEMENTS);
        let mut options = parsed
            .charset("utf8mb4")
            .timezone(Some("+00:00".to_owned()))
            .statement_cache_capacity(kept)
            .ssl_mode(self.tls.mode);
        // Files are read anew for each connection: certificates may be renewed in place.
        if let Some(file) = &self.tls.ca {
            options = options.ssl_ca(file);
        }
        if let (Some(certificate), Some(key)) = (&self.tls.certificate, &self.key) {
            options = options.ssl_client_cert(certificate).ssl_client_key(key);
        }
        if let Some(socket) = &self.socket {
            options = options.socket(socket);
        }
        Host { options: super::quiet(options, slow), tls: self.tls.clone() }
    }
}

impl Host {
    /// Why this host could not be connected to, with what to do about it, for what the configuration can cure.
    pub(super) fn advice(&self, error: &sqlx::Error) -> Option<String> {
        let said = match error {
            sqlx::Error::Io(error) => {
                let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
                self.about_tls(tls)
            }
            sqlx::Error::Tls(source) => match source.downcast_ref::<rustls::Error>() {
                Some(tls) => self.about_tls(tls),
                None if source.to_string().contains("does not support TLS") => {
                    "the server speaks no TLS, and `ssl-mode` asks for it: set it up there (`ssl_cert`, `ssl_key`)"
                        .to_owned()
                }
                None => format!("TLS failed: {source}"),
            },
            sqlx::Error::Database(_) => match super::sql::number(error)?.1 {
                // Access denied, also to the database alone.
                1045 | 1698 | 1044 => {
                    let tls = match (&self.tls.mode, &self.tls.certificate) {
                        (MySqlSslMode::Disabled, _) => ", without TLS (`ssl-mode=DISABLED`)",
                        (_, None) => ", without a certificate (`ssl-cert`, `ssl-key`)",
                        _ => "",
                    };
                    format!(
                        "access denied: is the account known there, with this password, from this machine, for this \
                         database{tls}?"
                    )
                }
                1049 => "there is no such database: create it, or correct the name in the URL".to_owned(),
                3159 => "the server takes no connection without TLS: leave `ssl-mode=DISABLED` out".to_owned(),
                _ => return None,
            },
            _ => return None,
        };
        Some(format!("{self}: {said}"))
    }

    fn about_tls(&self, error: &rustls::Error) -> String {
        let ca = match &self.tls.ca {
            Some(file) => format!(
                "`ssl-ca` names {}, which did not: put the certificate of the authority that did there",
                file.display()
            ),
            None => "name the certificate of that authority by `ssl-ca`".to_owned(),
        };
        match error {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                format!("its certificate was signed by nobody that is trusted; {ca}")
            }
            rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { expected, presented }) => {
                format!(
                    "its certificate is not for `{}` but for {}: write the host's name as the certificate has it",
                    expected.to_str(),
                    if presented.is_empty() { "no name at all".to_owned() } else { presented.join(", ") },
                )
            }
            rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                "its certificate has expired: renew it there".to_owned()
            }
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
                format!("its certificate was signed by another authority of the same name; {ca}")
            }
            rustls::Error::InvalidCertificate(why) => format!("its certificate cannot be trusted: {why}"),
            rustls::Error::AlertReceived(alert) => format!(
                "it refused our side of TLS ({alert:?}): does it know the authority that signed `ssl-cert`{}?",
                self.tls.certificate.as_ref().map(|file| format!(", {}", file.display())).unwrap_or_default()
            ),
            other => format!("TLS failed: {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_hosts_are_read_in_their_order_with_their_ports() {
        let hosts = hosts("mysql://u:p%40ss@db1,db2:3307/sonnette?ssl-mode=VERIFY_IDENTITY", None).unwrap();
        let read: Vec<_> =
            hosts.iter().map(|h| (h.options.get_host(), h.options.get_port(), h.options.get_database())).collect();
        assert_eq!(read, [("db1", 3306, Some("sonnette")), ("db2", 3307, Some("sonnette"))]);
        assert!(matches!(hosts[1].options.get_ssl_mode(), MySqlSslMode::VerifyIdentity));
        assert_eq!(hosts[1].to_string(), "db2:3307");
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_the_password() {
        for bad in [
            "mysql://u:hunter2@h:port/db",
            "mysql://u:hunter2@h/",
            "mysql://u:hunter2@h",
            "mysql://u:hunter2@,/db",
            "mysql://u:hunter2@h/db?ssl_mode=REQUIRED",
            "mysql://u:hunter2@h/db?ssl-mode=hunter2",
            "mysql://u:a?hunter2@h/db",
            "postgres://u:hunter2@h/db",
            "hunter2",
        ] {
            let error = hosts(bad, None).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn an_option_without_effect_is_refused_and_says_what_is_missing() {
        for (options, names) in [
            ("ssl-ca=ca.pem", "VERIFY_IDENTITY"),
            ("ssl-ca=ca.pem&ssl-mode=REQUIRED", "VERIFY_IDENTITY"),
            ("ssl-cert=c.pem", "ssl-key"),
            ("ssl-key=k.pem", "ssl-cert"),
            ("ssl-cert=c.pem&ssl-key=k.pem&ssl-mode=DISABLED", "DISABLED"),
            ("ssl-mode=REQUIRED&sslmode=DISABLED", "twice"),
            ("ssl-mode=", "no value"),
            ("statement-cache-capacity=many", "not a number"),
        ] {
            let error = hosts(&format!("mysql://u:p@h/db?{options}"), None).unwrap_err().to_string();
            assert!(error.contains(names), "{options}: {error}");
        }
    }

    #[test]
    fn files_are_relative_to_the_folder_of_the_configuration() {
        let anchored = |url: &str| anchored(url, Path::new("/etc/sonnette"));
        assert_eq!(anchored("sqlite://a.db"), "sqlite:///etc/sonnette/a.db");
        assert_eq!(anchored("sqlite:///var/a.db"), "sqlite:///var/a.db");
        assert_eq!(anchored("mysql://u:p@h/db"), "mysql://u:p@h/db");
        let url = anchored("mysql://u:p%3F@h/db?ssl-mode=VERIFY_CA&sslca=a+b%2Fca.pem&ssl-key=/k.pem");
        assert_eq!(private_key(&url), Some("/k.pem".into()));
        assert_eq!(named(url.split('&').nth(1).unwrap()).1.as_deref(), Some("/etc/sonnette/a b/ca.pem"));
        assert!(url.starts_with("mysql://u:p%3F@h/db?ssl-mode=VERIFY_CA&ssl-ca="), "{url}");
    }
}
