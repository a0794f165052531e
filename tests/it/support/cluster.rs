//! Several replicas on one database, each in a process of its own, and the simulator beside them.

use std::path::Path;

use super::{
    client::Client,
    database::TestDatabase,
    scratch::Folder,
    service::{Service, SimulatorProcess, run},
    world::keys_folder,
};

/// What a replica has for itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Member {
    /// More lines in `[apns]` of its sonnette.toml.
    pub(crate) apns: &'static str,
    /// How many seconds its clock is ahead of this machine's, where `libfaketime` is installed.
    pub(crate) clock_ahead: i64,
}

pub(crate) struct Cluster {
    pub(crate) sim: SimulatorProcess,
    pub(crate) replicas: Vec<Service>,
    /// A caller at each replica, all with the same key.
    pub(crate) callers: Vec<Client>,
    folder: Folder,
    database: TestDatabase,
}

impl Cluster {
    /// Starts the simulator, then the replicas one after another; `app` is in the apps.toml of all.
    pub(crate) async fn start(database: TestDatabase, members: &[Member], app: &str, sim: &[&str]) -> Self {
        let mut cluster = Self::without_replicas(database, app, sim).await;
        for member in members {
            cluster.join(*member, |_| {}).await;
        }
        cluster
    }

    /// Starts the simulator alone.
    pub(crate) async fn without_replicas(database: TestDatabase, app: &str, sim: &[&str]) -> Self {
        let folder = Folder::new("cluster");
        let keys = keys_folder(&folder, &format!("environments = [\"production\"]\n{app}"));
        let sim = SimulatorProcess::start(folder.path(), &keys, sim).await;
        Self { sim, replicas: Vec::new(), callers: Vec::new(), folder, database }
    }

    /// Starts one more; `change` has a last word on its folder `keys`.
    pub(crate) async fn join(&mut self, member: Member, change: impl FnOnce(&Path)) {
        let url = self.database.url().to_owned();
        self.join_at(&url, member, change).await;
    }

    /// The same by another address of the database.
    pub(crate) async fn join_at(&mut self, url: &str, member: Member, change: impl FnOnce(&Path)) {
        let folder = self.folder.path().join(format!("replica-{}", self.replicas.len()));
        let keys = folder.join("keys");
        std::fs::create_dir_all(&keys).unwrap();
        for file in ["key.p8", "apps.toml"] {
            std::fs::copy(self.folder.path().join("keys").join(file), keys.join(file)).unwrap();
        }
        change(&keys);
        let variables = clock_ahead(member.clock_ahead);
        let service = Service::start_in(&folder, url, &self.sim, member.apns, variables).await;
        let caller = if let Some(first) = self.callers.first() {
            Client::new(service.address, Some(first.key()))
        } else {
            let scopes = "register,send,broadcast,read,metrics,admin";
            let (status, key, error) = run(&folder, &["api-keys", "create", "--owner", "shop", "--scopes", scopes]);
            assert!(status.success(), "{error}");
            Client::new(service.address, Some(key.trim()))
        };
        self.replicas.push(service);
        self.callers.push(caller);
    }

    pub(crate) const fn database(&self) -> &TestDatabase {
        &self.database
    }
}

/// The environment of a process whose clock is ahead; empty where that cannot be had.
fn clock_ahead(seconds: i64) -> Vec<(&'static str, String)> {
    if seconds == 0 {
        return Vec::new();
    }
    let Some(library) = faketime() else {
        eprintln!("libfaketime is not installed (`apt-get install faketime`): all replicas have the same clock");
        return Vec::new();
    };
    vec![
        ("LD_PRELOAD", library.display().to_string()),
        ("FAKETIME", format!("{seconds:+}")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

fn faketime() -> Option<std::path::PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.filter_map(Result::ok).map(|entry| entry.path());
    folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|library| library.is_file())
}
