//! MySQL as people run it: over TLS, with accounts that may little, on servers whose defaults are not ours.

mod failover;
mod tls;

use std::path::{Path, PathBuf};

use crate::support::{
    database::{PrivateServer, TestDatabase},
    service::{SONNETTE, run},
};

/// A database on a private server, and an account for it that is not everybody's.
pub(crate) struct Account {
    pub(crate) database: TestDatabase,
    /// The name of the database.
    pub(crate) name: String,
    pub(crate) port: u16,
}

/// What no log and no error may show.
pub(crate) const PASSWORD: &str = "hunter2-of-the-database";

impl Account {
    /// Creates `shop`, who may do `privileges` on the database; `requires` is what follows the password.
    pub(crate) async fn create(server: &PrivateServer, privileges: &str, requires: &str) -> Self {
        let database = server.database().await;
        let name = database.url().rsplit_once('/').unwrap().1.split('?').next().unwrap().to_owned();
        let account = Self { database, name, port: server.port() };
        account.grant(server, privileges, requires).await;
        account
    }

    /// The same database, empty, and the same account on another server.
    pub(crate) async fn create_also(&self, server: &PrivateServer, privileges: &str) {
        server.execute(&[&format!("CREATE DATABASE {}", self.name)]).await;
        self.grant(server, privileges, "").await;
    }

    async fn grant(&self, server: &PrivateServer, privileges: &str, requires: &str) {
        server
            .execute(&[
                &format!("CREATE USER 'shop'@'%' IDENTIFIED BY '{PASSWORD}' {requires}"),
                &format!("GRANT {privileges} ON {}.* TO 'shop'@'%'", self.name),
            ])
            .await;
    }

    /// Its address at several servers, in this order.
    pub(crate) fn url_of(&self, servers: &[&PrivateServer]) -> String {
        let hosts: Vec<_> = servers.iter().map(|server| format!("127.0.0.1:{}", server.port())).collect();
        format!("mysql://shop:{PASSWORD}@{}/{}", hosts.join(","), self.name)
    }

    /// Its address at this host, with these options.
    pub(crate) fn url(&self, host: &str, options: &str) -> String {
        format!("mysql://shop:{PASSWORD}@{host}:{}/{}?{options}", self.port, self.name)
    }
}

/// Runs a command on a configuration with this address, from another folder. What it says on standard error, and
/// whether all went well; never the password.
fn said(folder: &Path, url: &str, command: &str) -> (bool, String) {
    let file: PathBuf = folder.join("sonnette.toml");
    std::fs::write(&file, format!("[database]\nurl = \"{url}\"\n")).unwrap();
    assert!(Path::new(SONNETTE).is_absolute());
    let (status, output, error) = run(Path::new("/"), &["--config", file.to_str().unwrap(), command]);
    assert!(!output.contains(PASSWORD) && !error.contains(PASSWORD), "{output}{error}");
    (status.success(), error)
}
