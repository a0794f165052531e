//! MySQL as people run it: over TLS, with accounts that may little, on servers whose defaults are not ours.

mod defaults;
mod failover;
mod migration;
mod privileges;
mod slow;
mod tls;
mod warm;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::support::{
    client::Client,
    database::{PrivateServer, TestDatabase},
    scratch::Process,
    service::{SONNETTE, free_address, run},
    world::until,
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

    /// From the next connection on it may do `privileges` alone.
    pub(crate) async fn may_only(&self, server: &PrivateServer, privileges: &str) {
        let Self { name, .. } = self;
        server
            .execute(&[
                &format!("REVOKE ALL ON {name}.* FROM 'shop'@'%'"),
                &format!("GRANT {privileges} ON {name}.* TO 'shop'@'%'"),
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

/// `sonnette serve` on a configuration of its own in `folder`; what it says goes to `said` there.
struct Serving {
    _process: Process,
    address: SocketAddr,
    said: PathBuf,
}

impl Serving {
    /// `database`: more lines of that section.
    fn start(folder: &Path, url: &str, database: &str) -> Self {
        let address = free_address();
        let (file, said) = (folder.join("sonnette.toml"), folder.join("said"));
        let text =
            format!("[server]\nlisten = \"{address}\"\n[database]\nurl = \"{url}\"\n{database}\n[log]\njson = true\n");
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(SONNETTE);
        command.args(["serve", "--config"]).arg(&file).env_remove("DATABASE_URL");
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&said).unwrap());
        Self { _process: Process::spawn(&mut command).unwrap(), address, said }
    }

    async fn is_ready(&self) -> bool {
        let client = Client::new(self.address, None);
        let answer = client.send(http::Method::GET, "/health/ready", &[], String::new()).await;
        answer.is_ok_and(|answer| answer.status == 200)
    }

    async fn ready(&self) {
        until("the service is ready", || async { self.is_ready().await.then_some(()) }).await;
    }

    /// The lines it has written so far; the password is in none.
    fn said(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.said).unwrap();
        assert!(!text.contains(PASSWORD), "{text}");
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}
