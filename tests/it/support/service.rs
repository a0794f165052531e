//! The real binary in processes of its own: `serve`, and the simulator beside it, to be killed and frozen.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use super::{client::Client, ports::free_port, scratch::Process, world::until};

/// The binary under test.
pub(crate) const SONNETTE: &str = env!("CARGO_BIN_EXE_sonnette");

/// Where a process may listen, and listen again after its end.
pub(crate) fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// Runs a command to its end: exit status, standard output, standard error.
pub(crate) fn run(folder: &Path, arguments: &[&str]) -> (std::process::ExitStatus, String, String) {
    let output =
        Command::new(SONNETTE).args(arguments).current_dir(folder).env_remove("DATABASE_URL").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status, text(output.stdout), text(output.stderr))
}

/// `sonnette simulator` in a process of its own.
pub(crate) struct SimulatorProcess {
    _process: Process,
    pub(crate) production: SocketAddr,
    pub(crate) sandbox: SocketAddr,
    pub(crate) control: Client,
    pub(crate) ca_file: PathBuf,
}

impl SimulatorProcess {
    pub(crate) async fn start(folder: &Path, keys: &Path, more: &[&str]) -> Self {
        let (production, sandbox, control) = (free_address(), free_address(), free_address());
        let mut command = Command::new(SONNETTE);
        command
            .args(["simulator", "--folder", "simulator", "--ledger-pushes", "1000000"])
            .args(["--listen-production", &production.to_string(), "--listen-sandbox", &sandbox.to_string()])
            .args(["--listen-control", &control.to_string(), "--keys"])
            .arg(keys)
            .args(more)
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let process = Process::spawn(&mut command).unwrap();
        let control = Client::new_http1(control);
        until("the simulator listens", || async {
            control.send(http::Method::GET, "/ledger", &[], String::new()).await.ok().map(|_| ())
        })
        .await;
        let ca_file = folder.join("simulator").join("ca.pem");
        Self { _process: process, production, sandbox, control, ca_file }
    }

    /// The counters of both environments.
    pub(crate) async fn total(&self) -> serde_json::Value {
        self.control.get("/ledger").await.ok()["total"].clone()
    }
}

/// `sonnette serve` in a process of its own.
pub(crate) struct Service {
    folder: PathBuf,
    pub(crate) address: SocketAddr,
    process: Option<Process>,
    /// Variables of its environment.
    variables: Vec<(&'static str, String)>,
}

impl Service {
    /// Writes sonnette.toml into `folder` and starts on it.
    pub(crate) async fn start(folder: &Path, database: &str, sim: &SimulatorProcess) -> Self {
        Self::start_with(folder, database, sim, "").await
    }

    /// The same with more lines in `[apns]`.
    pub(crate) async fn start_with(folder: &Path, database: &str, sim: &SimulatorProcess, apns: &str) -> Self {
        Self::start_in(folder, database, sim, apns, Vec::new()).await
    }

    /// The same with variables in its environment.
    pub(crate) async fn start_in(
        folder: &Path,
        database: &str,
        sim: &SimulatorProcess,
        apns: &str,
        variables: Vec<(&'static str, String)>,
    ) -> Self {
        let address = free_address();
        let text = format!(
            "[server]\nlisten = \"{address}\"\n[database]\nurl = \"{database}\"\n[apns]\nkeys = \"keys\"\nproduction = \"https://{}\"\nsandbox = \"https://{}\"\nca_file = \"{}\"\n{apns}[log]\nlevel = \"error\"\n",
            sim.production,
            sim.sandbox,
            sim.ca_file.display()
        );
        std::fs::write(folder.join("sonnette.toml"), text).unwrap();
        let mut service = Self { folder: folder.to_path_buf(), address, process: None, variables };
        service.restart().await;
        service
    }

    /// Starts it again and waits until it is ready.
    pub(crate) async fn restart(&mut self) {
        let mut command = Command::new(SONNETTE);
        command.arg("serve").current_dir(&self.folder).env_remove("DATABASE_URL").stdout(Stdio::null());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let log = std::fs::File::options().create(true).append(true).open(self.log()).unwrap();
        self.process = Some(Process::spawn(command.stderr(log)).unwrap());
        let client = Client::new(self.address, None);
        until("the service is ready", || async {
            let answer = client.send(http::Method::GET, "/health/ready", &[], String::new()).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
    }

    /// Where it says what is wrong.
    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("errors.log")
    }

    /// Sends it a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        self.process.as_ref().expect("the service was started").signal(name);
    }

    /// SIGSTOP until it is told `CONT`; no thread of it runs any more.
    pub(crate) fn freeze(&self) {
        self.process.as_ref().expect("the service was started").freeze();
    }

    /// Freezes it, and returns what the database counts once that stands still: a commit that was under way on the
    /// database's side may still end.
    pub(crate) async fn freeze_and_count(&self, counted: impl AsyncFn() -> i64) -> i64 {
        self.freeze();
        let mut before = counted().await;
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            match counted().await {
                now if now == before => return now,
                now => before = now,
            }
        }
    }

    pub(crate) fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the service was started")
    }
}

/// What it said goes to whoever reads of the test's failure.
impl Drop for Service {
    fn drop(&mut self) {
        eprint!("{}", std::fs::read_to_string(self.log()).unwrap_or_default());
    }
}
