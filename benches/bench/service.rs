//! The processes: the simulator, `serve`, and what `/proc` says of them.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Method};
use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, MySqlConnection, mysql::MySqlConnectOptions};
use tokio::net::TcpStream;

use crate::{
    commits::durable_sqlite,
    durability, load,
    support::{ports::free_port, scratch::Process},
    wire,
};

pub(crate) const TOPIC: &str = "fr.ocpizza.livreur";
pub(crate) const PAYLOAD: &str = r#"{"aps":{"alert":{"title":"Nouvelle livraison","body":"Commande 1042, 12 rue Oberkampf"},"sound":"default"},"order_id":1042}"#;
const TEAM: &str = "BENCHTEAM1";
const KEY_ID: &str = "BENCHKEY01";
const KEY_FILE: &str = "AuthKey_BENCHKEY01.p8";
const SONNETTE: &str = env!("CARGO_BIN_EXE_sonnette");

/// What the address of a file begins with.
const SQLITE: &str = "sqlite://";

/// Streams of a connection to a simulator that nothing else was said to.
pub(crate) const STREAMS: usize = 1_000;

/// How long a process may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pushes that the simulator keeps: what it accepts in about three seconds, many times as long as from one look to the next.
const RECORDED: usize = 500_000;

/// The token of a device: 32 bytes in hex, as iPhones have them, and never one that asks the simulator for a fault.
pub(crate) fn device_token(number: usize) -> String {
    format!("{:064x}", (number as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

/// Where Sonnette keeps everything.
pub(crate) struct Database {
    pub(crate) url: String,
    /// The server and the name of our database on it.
    on_server: Option<(MySqlConnectOptions, String)>,
    /// The server's process, if it is on this machine.
    pub(crate) pid: Option<u32>,
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_sqlite() { "SQLite" } else { "MySQL" })
    }
}

impl Database {
    pub(crate) fn is_sqlite(&self) -> bool {
        self.on_server.is_none()
    }

    /// A file that is not there yet.
    pub(crate) fn sqlite(folder: &Path) -> Self {
        let file = folder.join(format!("sonnette-{}.db", uuid::Uuid::now_v7().simple()));
        Self { url: format!("{SQLITE}{}", file.display()), on_server: None, pid: None }
    }

    /// Another one in the same place: a fresh database on the same server, a fresh file in the same folder, with the
    /// schema in it.
    pub(crate) async fn sibling(&self) -> Self {
        let sibling = match self.sqlite_file() {
            Some(file) => Self::sqlite(file.parent().expect("a file is in a folder")),
            None => Self::mysql(&self.url).await,
        };
        sonnette(&["migrate"], &sibling);
        sibling
    }

    /// Where it is, if it is a file.
    pub(crate) fn sqlite_file(&self) -> Option<&Path> {
        self.url.strip_prefix(SQLITE).map(Path::new)
    }

    /// A fresh database on a server.
    pub(crate) async fn mysql(server_url: &str) -> Self {
        let options: MySqlConnectOptions = server_url.parse().expect("a MySQL address");
        let mut connection = options.connect().await.expect("the server answers");
        let name = format!("sonnette_bench_{}", uuid::Uuid::now_v7().simple());
        execute(&mut connection, format!("CREATE DATABASE {name}")).await;
        let (_, pid_file): (String, String) = sqlx::query_as("SHOW GLOBAL VARIABLES LIKE 'pid_file'")
            .fetch_one(&mut connection)
            .await
            .expect("a server has a pid file");
        let _ = connection.close().await;
        let (address, parameters) = server_url.split_once('?').unwrap_or((server_url, ""));
        let (scheme, rest) = address.split_once("://").expect("an address has a scheme");
        let host = rest.split('/').next().unwrap_or(rest);
        let question = if parameters.is_empty() { "" } else { "?" };
        Self {
            url: format!("{scheme}://{host}/{name}{question}{parameters}"),
            on_server: Some((options, name)),
            pid: durability::pid_in(&pid_file),
        }
    }

    /// Bytes of its tables and indexes.
    pub(crate) async fn size(&self) -> Size {
        let all = if self.is_sqlite() {
            "SELECT CAST(COALESCE(SUM(pgsize), 0) AS INTEGER) FROM dbstat WHERE aggregate = TRUE"
        } else {
            // Else it would tell what it has last looked up.
            let tables: Vec<String> = sqlx::query_scalar(
                "SELECT CAST(table_name AS CHAR) FROM information_schema.tables WHERE table_schema = DATABASE()",
            )
            .fetch_all(&mut self.connection().await)
            .await
            .expect("a server tells its tables");
            self.execute_all([format!("ANALYZE TABLE {}", tables.join(", "))].into_iter()).await;
            "SELECT CAST(SUM(data_length + index_length) AS SIGNED) FROM information_schema.tables \
             WHERE table_schema = DATABASE()"
        };
        let of_devices = if self.is_sqlite() {
            " AND (name LIKE 'devices%' OR name LIKE 'sqlite_autoindex_devices_%')"
        } else {
            " AND table_name = 'devices'"
        };
        let devices = self.number(&format!("{all}{of_devices}")).await;
        Size { devices, others: self.number(all).await - devices }
    }

    /// What a statement of one number says.
    pub(crate) async fn number(&self, statement: &str) -> u64 {
        let statement = AssertSqlSafe(statement.to_owned());
        let number: i64 = if let Some(file) = self.sqlite_file() {
            let mut connection = durable_sqlite(file).connect().await.expect("SQLite");
            sqlx::query_scalar(statement).fetch_one(&mut connection).await.expect("a number")
        } else {
            sqlx::query_scalar(statement).fetch_one(&mut self.connection().await).await.expect("a number")
        };
        number.try_into().expect("not below zero")
    }

    /// Statements of ours, each with a commit of its own.
    pub(crate) async fn execute_all(&self, statements: impl Iterator<Item = String>) {
        if let Some(file) = self.sqlite_file() {
            let mut connection = durable_sqlite(file).connect().await.expect("SQLite");
            for statement in statements {
                sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.expect("a commit");
            }
        } else {
            let mut connection = self.connection().await;
            for statement in statements {
                sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.expect("a commit");
            }
        }
    }

    /// To a server.
    async fn connection(&self) -> MySqlConnection {
        let options: MySqlConnectOptions = self.url.parse().expect("a MySQL address");
        let mut connection = options.connect().await.expect("the server answers");
        // Of MySQL; else sizes are those of a day ago. MariaDB does not know it.
        let _ = sqlx::raw_sql("SET SESSION information_schema_stats_expiry = 0").execute(&mut connection).await;
        connection
    }

    pub(crate) async fn drop(self) {
        if let Some((options, name)) = self.on_server {
            let mut connection = options.connect().await.expect("the server answers");
            execute(&mut connection, format!("DROP DATABASE {name}")).await;
        } else if let Some(file) = self.sqlite_file() {
            for end in ["", "-wal", "-shm"] {
                // Those beside it may be gone already; the folder goes at the end.
                let _ = fs::remove_file(format!("{}{end}", file.display()));
            }
        }
    }
}

async fn execute(connection: &mut MySqlConnection, statement: String) {
    // Names are ours: a prefix and hexadecimal digits.
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(connection).await.expect("we may create and drop databases");
}

/// Bytes of tables with their indexes.
pub(crate) struct Size {
    /// Of `devices`.
    pub(crate) devices: u64,
    pub(crate) others: u64,
}

/// A command of ours on a database; returns what it says.
fn sonnette(words: &[&str], database: &Database) -> String {
    let done = Command::new(SONNETTE)
        .args(words)
        .env("DATABASE_URL", &database.url)
        // Where no configuration is.
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .output()
        .expect("sonnette starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text").trim().to_owned()
}

/// Keys and folders.
pub(crate) struct Kit {
    folder: PathBuf,
    provider_token: String,
    api_keys: RefCell<HashMap<String, String>>,
}

impl Kit {
    pub(crate) fn new(folder: &Path) -> Self {
        let keys = folder.join("keys");
        fs::create_dir(&keys).expect("a folder");
        let p8 = keys.join(KEY_FILE);
        let made = Command::new(SONNETTE).args(["keys", "generate"]).arg(&p8).output().expect("sonnette starts");
        assert!(made.status.success(), "{made:?}");
        let apps = format!(
            "[[app]]\ntopic = \"{TOPIC}\"\nteam_id = \"{TEAM}\"\nkey_id = \"{KEY_ID}\"\nkey_file = \"{KEY_FILE}\"\n"
        );
        fs::write(keys.join("apps.toml"), apps).expect("a file");

        let mut head = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        head.kid = Some(KEY_ID.to_owned());
        let claims = serde_json::json!({ "iss": TEAM, "iat": jiff::Timestamp::now().as_second() });
        let key = jsonwebtoken::EncodingKey::from_ec_pem(&fs::read(&p8).expect("the key")).expect("a P-256 key");
        let provider_token = jsonwebtoken::encode(&head, &claims, &key).expect("a signature");
        Self { folder: folder.to_owned(), provider_token, api_keys: RefCell::default() }
    }

    /// A provider token for the yardsticks, valid for the whole run.
    pub(crate) fn provider_token(&self) -> String {
        self.provider_token.clone()
    }

    /// A key of a back-office that also registers.
    pub(crate) fn api_key(&self, database: &Database) -> String {
        let create = ["api-keys", "create", "--owner", "bench", "--scopes", "register,send,broadcast,read,metrics"];
        let make = || sonnette(&create, database);
        self.api_keys.borrow_mut().entry(database.url.clone()).or_insert_with(make).clone()
    }

    /// A configuration in which only the way to the simulator is named.
    pub(crate) fn engine_config(&self, sink: &Sink) -> PathBuf {
        let file = self.folder.join(format!("engine-{}.toml", sink.production.port()));
        fs::write(&file, sink.as_apns()).expect("a file");
        file
    }

    /// Where clients log.
    pub(crate) fn client_log(&self) -> PathBuf {
        self.folder.join("clients.log")
    }

    /// Starts `sonnette serve` as an operator would: a configuration file with its defaults, the log into a file.
    pub(crate) async fn serve(&self, database: &Database, sink: &Sink) -> Vec<Serve> {
        vec![self.replica(database, sink, "").await]
    }

    /// Starts replicas, with more lines behind `[apns]`, and waits until each knows of all.
    pub(crate) async fn replicas(&self, count: usize, database: &Database, sink: &Sink, more: &str) -> Vec<Serve> {
        let mut replicas = Vec::new();
        for _ in 0..count {
            replicas.push(self.replica(database, sink, more).await);
        }
        let mut key = HeaderValue::try_from(format!("Bearer {}", self.api_key(database))).expect("a header");
        key.set_sensitive(true);
        let all = format!("sonnette_replicas {count}");
        let started = Instant::now();
        for replica in &replicas {
            while !replica.metrics(&key).await.lines().any(|line| line == all) {
                assert!(started.elapsed() < PATIENCE, "the replicas do not know of each other:\n{}", replica.log_end());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        replicas
    }

    async fn replica(&self, database: &Database, sink: &Sink, more: &str) -> Serve {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let config = format!(
            "[server]\nlisten = \"{address}\"\n[database]\nurl = \"{}\"\n{}{more}\n",
            database.url,
            sink.as_apns()
        );
        let file = self.folder.join(format!("{database}-{}.toml", address.port()));
        fs::write(&file, config).expect("a file");
        let log = self.folder.join(format!("{database}.log"));
        let to = || Stdio::from(fs::File::options().create(true).append(true).open(&log).expect("a log"));
        let mut command = Command::new(SONNETTE);
        command.arg("serve").arg("--config").arg(&file).stdin(Stdio::null()).stdout(to()).stderr(to());
        let mut process = Process::spawn(&mut command).expect("sonnette starts");
        let pid = process.child().id();
        let mut serve = Serve { process, pid, address, log };
        let started = Instant::now();
        let mut stream = TcpStream::connect(address).await;
        while stream.is_err() {
            assert!(serve.process.is_running(), "serve ended:\n{}", serve.log_end());
            assert!(started.elapsed() < PATIENCE, "serve does not listen:\n{}", serve.log_end());
            tokio::time::sleep(Duration::from_millis(20)).await;
            stream = TcpStream::connect(address).await;
        }
        // It listens before it has migrated, and answers behind that.
        let mut send = wire::handshake(stream.expect("seen above")).await;
        let ready = load::request(Method::GET, &format!("http://{address}/health/ready"), None);
        let answer = load::ask(&mut send, ready, Bytes::new()).await;
        assert_eq!(answer.status, http::StatusCode::OK, "serve is not ready:\n{}", serve.log_end());
        serve
    }
}

/// `sonnette serve`.
pub(crate) struct Serve {
    process: Process,
    pid: u32,
    address: SocketAddr,
    log: PathBuf,
}

impl Serve {
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    async fn metrics(&self, key: &HeaderValue) -> String {
        let stream = TcpStream::connect(self.address).await.expect("serve listens");
        let request = load::request(Method::GET, &format!("http://{}/metrics", self.address), Some(key));
        let answer = load::ask(&mut wire::handshake(stream).await, request, Bytes::new()).await;
        assert_eq!(answer.status, http::StatusCode::OK, "no metrics");
        String::from_utf8_lossy(&answer.body).into_owned()
    }

    /// SIGTERM; an error if it does not end in good order.
    pub(crate) async fn stop(mut self) -> Result<(), String> {
        self.process.signal("TERM");
        match self.process.wait(PATIENCE).await {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("serve ended with {status}:\n{}", self.log_end())),
            None => Err(format!("serve did not end:\n{}", self.log_end())),
        }
    }

    fn log_end(&self) -> String {
        end_of(&self.log)
    }
}

/// The last lines of a log.
pub(crate) fn end_of(log: &Path) -> String {
    let log = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// `sonnette simulator`, with its checks and without keeping pushes.
pub(crate) struct Sink {
    _process: Process,
    pid: u32,
    pub(crate) production: SocketAddr,
    pub(crate) sandbox: SocketAddr,
    pub(crate) ca_file: PathBuf,
    control: SocketAddr,
}

impl Sink {
    /// One whose every answer waits for `latency`.
    pub(crate) fn start(kit: &Kit, latency: Duration) -> Self {
        let name = format!("simulator-{}", latency.as_millis());
        let mut command = Command::new(SONNETTE);
        command.args(["simulator", "--no-ledger", "--folder"]).arg(kit.folder.join(&name));
        command.args(["--latency-ms", &latency.as_millis().to_string()]);
        command.args(["--ledger-pushes", &RECORDED.to_string()]);
        command.arg("--keys").arg(kit.folder.join("keys"));
        for listener in ["production", "sandbox", "control"] {
            command.args([format!("--listen-{listener}"), "127.0.0.1:0".to_owned()]);
        }
        let output = kit.folder.join(format!("{name}.log"));
        let file = fs::File::create(&output).expect("a log");
        let mut process =
            Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::from(file))).expect("sonnette starts");
        let started = Instant::now();
        let mut said: HashMap<String, String> = HashMap::new();
        // The last of the lines we need.
        while !said.contains_key("keys") {
            assert!(process.is_running() && started.elapsed() < PATIENCE, "the simulator did not start: {said:?}");
            std::thread::sleep(Duration::from_millis(20));
            let text = fs::read_to_string(&output).expect("a log");
            // Only whole lines.
            let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.split_once(':'));
            said.extend(lines.map(|(what, value)| (what.to_owned(), value.trim().to_owned())));
        }
        let address = |what: &str| {
            let url = said.get(what).unwrap_or_else(|| panic!("the simulator says where {what} is"));
            url.rsplit('/').next().and_then(|address| address.parse().ok()).expect("an address")
        };
        Self {
            production: address("production"),
            sandbox: address("sandbox"),
            control: address("control"),
            ca_file: PathBuf::from(&said["CA file"]),
            pid: process.child().id(),
            _process: process,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The section of a configuration that leads to it.
    fn as_apns(&self) -> String {
        format!(
            "[apns]\nkeys = \"keys\"\nproduction = \"https://{}\"\nsandbox = \"https://{}\"\nca_file = \"{}\"\n",
            self.production,
            self.sandbox,
            self.ca_file.display()
        )
    }

    /// Pushes accepted since its start.
    pub(crate) async fn accepted(&self) -> u64 {
        let ledger: Value = serde_json::from_slice(&self.control(Method::GET, "/ledger", "").await).expect("JSON");
        ledger["total"]["accepted"].as_u64().expect("a counter")
    }

    /// How many streams a connection may have from now on.
    pub(crate) async fn limit_streams(&self, streams: usize) {
        for environment in ["production", "sandbox"] {
            let path = format!("/environments/{environment}/stream-limit");
            self.control(Method::PUT, &path, &format!("{{\"stream_limit\":{streams}}}")).await;
        }
    }

    /// From now on it keeps the newest [`RECORDED`] accepted pushes one by one, or none.
    pub(crate) async fn record(&self, record: bool) {
        self.control(Method::PUT, "/ledger/recording", &format!("{{\"record_pushes\":{record}}}")).await;
        self.control(Method::DELETE, "/ledger/pushes", "").await;
    }

    /// The pushes to a device that were accepted behind number `after`, if they are recorded.
    pub(crate) async fn arrivals(&self, token: &str, after: u64) -> Vec<Arrival> {
        let path = format!("/ledger/pushes?after={after}&token={token}");
        let mut page: Value = serde_json::from_slice(&self.control(Method::GET, &path, "").await).expect("JSON");
        serde_json::from_value(page["items"].take()).expect("pushes")
    }

    async fn control(&self, method: Method, path: &str, body: &str) -> Bytes {
        let stream = TcpStream::connect(self.control).await.expect("the simulator runs");
        let mut send = wire::handshake(stream).await;
        let request = load::request(method, &format!("http://{}{path}", self.control), None);
        let answer = load::ask(&mut send, request, Bytes::copy_from_slice(body.as_bytes())).await;
        assert!(answer.status.is_success(), "{path}: {}", String::from_utf8_lossy(&answer.body));
        answer.body
    }
}

/// A push that the simulator has accepted.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Arrival {
    pub(crate) sequence: u64,
    at: String,
    /// Of a visible alert without one of its own: the notification's id.
    pub(crate) collapse_id: Option<String>,
}

impl Arrival {
    /// When it was accepted, since 1970; the simulator tells it to the millisecond.
    pub(crate) fn at_ms(&self) -> f64 {
        let at: jiff::Timestamp = self.at.parse().expect("a time");
        at.as_millisecond() as f64
    }
}

/// Milliseconds since 1970, as exactly as the clock has them.
pub(crate) fn now_ms() -> f64 {
    jiff::Timestamp::now().as_nanosecond() as f64 / 1e6
}

/// Processor time of all that takes part, from a moment on; of all replicas together.
pub(crate) struct Processors(Vec<(&'static str, Vec<u32>, f64)>);

impl Processors {
    pub(crate) fn start(serve: &[Serve], database: &Database, sink: &Sink) -> Self {
        let all = [
            ("serve", serve.iter().map(Serve::pid).collect()),
            ("database", database.pid.into_iter().collect()),
            ("load", vec![std::process::id()]),
            ("simulator", vec![sink.pid()]),
        ];
        let known = all.into_iter().filter(|(_, pids): &(_, Vec<u32>)| !pids.is_empty());
        Self(
            known
                .map(|(name, pids)| {
                    let before = cpu_us_of_all(&pids);
                    (name, pids, before)
                })
                .collect(),
        )
    }

    /// Microseconds of each since the start.
    pub(crate) fn since(&self) -> Vec<(&'static str, f64)> {
        self.0.iter().map(|(name, pids, before)| (*name, cpu_us_of_all(pids) - before)).collect()
    }
}

fn cpu_us_of_all(pids: &[u32]) -> f64 {
    pids.iter().map(|pid| cpu_us_of(*pid)).sum()
}

/// Processor time of a process so far in microseconds, in user and kernel mode, in steps of 10 ms.
pub(crate) fn cpu_us_of(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // Behind the name, which may hold anything: the 14th and 15th field of all.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // 100 ticks a second on every architecture, whatever the kernel's own.
    fields[11..=12].iter().map(|ticks| ticks.parse::<f64>().expect("a number") * 1e4).sum()
}

/// The most memory that any of the replicas has had at once, in MiB.
pub(crate) fn peak_memory(serve: &[Serve]) -> f64 {
    serve.iter().map(|replica| peak_memory_of(replica.pid())).fold(0.0, f64::max)
}

/// Ends all of them; what went wrong with each.
pub(crate) async fn stop(serve: Vec<Serve>) -> Vec<String> {
    let mut problems = Vec::new();
    for replica in serve {
        problems.extend(replica.stop().await.err());
    }
    problems
}

/// The most memory that a process has had at once, in MiB.
pub(crate) fn peak_memory_of(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// Processor time of the whole machine: busy and all, in ticks since it was started.
pub(crate) struct Ticks {
    busy: f64,
    all: f64,
}

impl Ticks {
    pub(crate) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").expect("Linux");
        // user, nice, system, idle, iowait, irq, softirq, steal: of all processors together.
        let fields: Vec<f64> = stat
            .lines()
            .next()
            .expect("the sum stands first")
            .split_whitespace()
            .skip(1)
            .take(8)
            .map(|ticks| ticks.parse().expect("a number"))
            .collect();
        let all = fields.iter().sum();
        Self { busy: all - fields[3] - fields[4], all }
    }

    /// The share of the machine that has been busy from then to now.
    pub(crate) fn busy_since(&self) -> f64 {
        let now = Self::now();
        (now.busy - self.busy) / (now.all - self.all).max(1.0)
    }
}
