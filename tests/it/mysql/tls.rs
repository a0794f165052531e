//! TLS to the database: every `ssl-mode`, a certificate of our own, and what is said when the two sides do not fit.

use std::{path::Path, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use sonnette::{
    domain::{clock::SystemClock, secret::Secret},
    store::{Role, address, open},
};

use super::{Account, PASSWORD, said};
use crate::{
    store::{connection::is_not_harmed_by_what_is_cut_off, settings},
    support::{database::PrivateServer, scratch::Folder, world::World},
    tour::take_the_tour,
};

/// Writes `<name>.pem` and `<name>.key`: an authority, and whoever it signs.
struct Authority<'f> {
    folder: &'f Path,
    issuer: Issuer<'static, KeyPair>,
}

impl<'f> Authority<'f> {
    fn new(folder: &'f Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    fn signs(&self, name: &str, hosts: &[&str], change: impl FnOnce(&mut CertificateParams)) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(hosts.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(self.folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// Options of a server that takes nothing but TLS, with the certificate of this name.
fn only_tls(folder: &Path, name: &str) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    vec![
        "--require-secure-transport=ON".to_owned(),
        format!("--ssl-ca={}", file("ca.pem")),
        format!("--ssl-cert={}", file(&format!("{name}.pem"))),
        format!("--ssl-key={}", file(&format!("{name}.key"))),
    ]
}

/// A world whose service comes as this account to `localhost`, with these options; their files are in `folder`.
async fn served(folder: &Path, account: Account, options: &str) -> World {
    let url = address::anchored(&account.url("localhost", options), folder);
    let clock = Arc::new(SystemClock::new());
    World::configured(account.database, clock, "", |config, _| config.database.url = Secret::new(url)).await
}

#[tokio::test]
async fn every_ssl_mode_does_what_it_says_and_a_refusal_says_what_to_change() {
    let folder = Folder::new("tls");
    let authority = Authority::new(folder.path(), "ca");
    Authority::new(folder.path(), "stranger");
    // The name is that of the machine, the address is not among them.
    authority.signs("server", &["localhost", "db.example"], |_| {});
    let server = PrivateServer::start_with(&only_tls(folder.path(), "server")).await;
    let account = Account::create(&server, "ALL", "").await;
    let go = |host: &str, options: &str| said(folder.path(), &account.url(host, options), "migrate");

    for (host, options) in [
        ("127.0.0.1", ""),
        ("127.0.0.1", "ssl-mode=PREFERRED"),
        ("127.0.0.1", "ssl-mode=REQUIRED"),
        // Whatever the host's name. Paths are relative to the configuration.
        ("127.0.0.1", "ssl-mode=VERIFY_CA&ssl-ca=ca.pem"),
        ("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem"),
        ("localhost", "ssl-mode=verify_identity&sslca=./ca.pem"),
    ] {
        let (well, error) = go(host, options);
        assert!(well, "{host} {options}: {error}");
    }

    for (host, options, words) in [
        ("127.0.0.1", "ssl-mode=DISABLED", ["without TLS", "ssl-mode=DISABLED"]),
        ("127.0.0.1", "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem", ["not for `127.0.0.1`", "db.example"]),
        ("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=stranger.pem", ["stranger.pem", "signed by nobody"]),
        ("localhost", "ssl-mode=VERIFY_CA&ssl-ca=stranger.pem", ["stranger.pem", "signed by nobody"]),
        ("localhost", "ssl-mode=VERIFY_IDENTITY", ["signed by nobody", "`ssl-ca`"]),
        ("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=absent.pem", ["`ssl-ca`", "absent.pem cannot be read"]),
        ("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=server.key", ["`ssl-ca`", "holds no certificate"]),
        ("localhost", "ssl-cert=server.pem&ssl-key=absent.key", ["`ssl-key`", "absent.key cannot be read"]),
        ("localhost", "ssl-cert=server.pem&ssl-key=ca.pem", ["`ssl-key`", "holds no private key"]),
    ] {
        let (well, error) = go(host, options);
        let all = words.iter().all(|word| error.contains(word));
        assert!(!well && all && error.contains("database.url"), "{host} {options}: {error}");
    }
}

#[tokio::test]
async fn a_certificate_that_has_expired_and_a_server_without_tls_are_named() {
    let folder = Folder::new("expired");
    let authority = Authority::new(folder.path(), "ca");
    authority.signs("server", &["localhost"], |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let expired = PrivateServer::start_with(&only_tls(folder.path(), "server")).await;
    let account = Account::create(&expired, "ALL", "").await;
    let url = account.url("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem");
    let (well, error) = said(folder.path(), &url, "migrate");
    assert!(!well && error.contains("expired") && error.contains("localhost:"), "{error}");
    drop(expired);

    let plain = PrivateServer::start_with(&["--loose-skip-ssl".to_owned(), "--loose-tls-version=".to_owned()]).await;
    let account = Account::create(&plain, "ALL", "").await;
    let (well, error) = said(folder.path(), &account.url("127.0.0.1", "ssl-mode=REQUIRED"), "migrate");
    assert!(!well && error.contains("speaks no TLS") && error.contains("127.0.0.1:"), "{error}");
    let (well, error) = said(folder.path(), &account.url("127.0.0.1", "ssl-mode=PREFERRED"), "migrate");
    assert!(well, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_that_requires_a_certificate_is_served_with_it_and_refused_without() {
    let folder = Folder::new("x509");
    let authority = Authority::new(folder.path(), "ca");
    authority.signs("server", &["localhost"], |_| {});
    authority.signs("sonnette", &[], |_| {});
    let stranger = Authority::new(folder.path(), "stranger");
    stranger.signs("unknown", &[], |_| {});
    let server = PrivateServer::start_with(&only_tls(folder.path(), "server")).await;
    let account = Account::create(&server, "ALL", "REQUIRE X509").await;

    let verified = "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem";
    let (well, error) = said(folder.path(), &account.url("localhost", verified), "migrate");
    assert!(!well && error.contains("access denied") && error.contains("`ssl-cert`"), "{error}");
    let unknown = format!("{verified}&ssl-cert=unknown.pem&ssl-key=unknown.key");
    let (well, error) = said(folder.path(), &account.url("localhost", &unknown), "migrate");
    assert!(!well && error.contains("unknown.pem"), "{error}");
    let known = format!("{verified}&ssl-cert=sonnette.pem&ssl-key=sonnette.key");
    let (well, error) = said(folder.path(), &account.url("localhost", &known), "migrate");
    assert!(well, "{error}");

    // The whole service, over such connections only.
    let world = served(folder.path(), account, &known).await;
    world.device(&"ab".repeat(32), Some("rider")).await;
    let id = world.send(json!({ "user_ids": ["rider"] })).await;
    assert_eq!(world.done(&id).await["counts"]["accepted"], 1);
    assert!(!format!("{:?}", world.config).contains(PASSWORD));
}

/// A server at `localhost` that takes only TLS, and an account that has to come over it; `ca.pem` is in the folder.
async fn behind_tls(folder: &Path) -> (PrivateServer, Account) {
    Authority::new(folder, "ca").signs("server", &["localhost"], |_| {});
    let server = PrivateServer::start_with(&only_tls(folder, "server")).await;
    let account = Account::create(&server, "ALL", "REQUIRE SSL").await;
    (server, account)
}

#[tokio::test]
async fn what_is_cut_off_costs_no_connection_over_tls_either() {
    let folder = Folder::new("cut");
    let (_server, account) = behind_tls(folder.path()).await;
    let url = address::anchored(&account.url("localhost", "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem"), folder.path());
    let store = open(&settings(&url), Role::CommandLine, Arc::new(SystemClock::new())).await.unwrap();
    store.migrate().await.unwrap();
    is_not_harmed_by_what_is_cut_off(&*store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tour_of_the_readme_works_on_a_server_that_takes_only_tls_and_whose_name_is_verified() {
    let folder = Folder::new("tour");
    let (_server, account) = behind_tls(folder.path()).await;
    let world = served(folder.path(), account, "ssl-mode=VERIFY_IDENTITY&ssl-ca=ca.pem").await;
    take_the_tour(&world).await;
}
