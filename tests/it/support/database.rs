//! Databases for tests, real ones: a SQLite file each, and a database each on a MariaDB or MySQL server.
//!
//! That server is the one in `TEST_DATABASE_URL`, else one of our own, started once in a test process from the
//! `mariadbd` or `mysqld` that is installed, in a temporary folder and on a free port of 127.0.0.1; or the first node of a
//! Galera cluster of our own, if `TEST_CLUSTER` asks for one (`galera.rs`). Without any the tests fail and say what to
//! install; none is skipped.
//!
//! The server runs with its own defaults (`--no-defaults`), so its character set is latin1 on an older MariaDB: tables
//! have to say what they need, as they have to on a host whose settings we do not know.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, MySqlConnection, mysql::MySqlConnectOptions};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::{
    galera::{self, Galera},
    ports::free_port,
    scratch::{Folder, Process},
};

/// How many deliveries are open: in rows of their own, and in what was accepted together.
pub(crate) const OPEN: &str = "SELECT (SELECT COUNT(*) FROM chunks WHERE ended_at IS NULL) + \
    (SELECT CAST(COALESCE(SUM(open), 0) AS SIGNED) FROM cohorts)";

/// How many of single notifications have ended.
pub(crate) const ENDED: &str = "SELECT (SELECT COUNT(*) FROM chunks WHERE ended_at IS NOT NULL) + \
    (SELECT CAST(COALESCE(SUM(accepted), 0) AS SIGNED) FROM cohorts)";

/// How many were accepted by APNs.
pub(crate) const ACCEPTED: &str = "SELECT (SELECT CAST(COALESCE(SUM(accepted), 0) AS SIGNED) FROM chunks) + \
    (SELECT CAST(COALESCE(SUM(accepted), 0) AS SIGNED) FROM cohorts)";

/// What the names of our databases begin with, on whatever server.
const PREFIX: &str = "sonnette_test_";

/// How long a server may take until it answers: it may be recovering from a kill, on a slow disk, beside a build.
pub(super) const ANSWERS_WITHIN: Duration = Duration::from_secs(120);

/// What to do where no server is installed.
const ADVICE: &str = "no `mariadbd` or `mysqld` is installed: run `make test` once, which installs it on Debian and \
    Ubuntu (macOS: `brew install mariadb`), or name a server in TEST_DATABASE_URL";

/// Which of the two kinds of store a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Sqlite,
    Mysql,
}

/// An empty database of a test's own. Dropping it drops the database, and cuts whoever is still connected to it.
#[derive(Debug)]
pub(crate) struct TestDatabase {
    store: Store,
    url: String,
    /// The folder of a SQLite file.
    _folder: Option<Folder>,
    /// On a server that outlives the test: what to drop, and where.
    on_server: Option<(MySqlConnectOptions, String)>,
}

impl TestDatabase {
    /// `sqlite://…` or `mysql://…`, as in the configuration.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn store(&self) -> Store {
        self.store
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let Some((server, name)) = self.on_server.take() else { return };
        // A thread, because the test's own runtime is not to be blocked on and may be ending.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(drop_database(&server, &name))
        });
        if let Ok(Err(error)) = dropping.join() {
            eprintln!("a test database was left behind: {error}");
        }
    }
}

/// A fresh database of the given kind.
pub(crate) async fn database(store: Store) -> TestDatabase {
    match store {
        Store::Sqlite => sqlite_database(),
        Store::Mysql => mysql_database().await,
    }
}

/// A SQLite file in a folder of its own; the file does not exist yet.
pub(crate) fn sqlite_database() -> TestDatabase {
    let folder = Folder::new("sqlite");
    let url = format!("sqlite://{}", folder.path().join("sonnette.db").display());
    TestDatabase { store: Store::Sqlite, url, _folder: Some(folder), on_server: None }
}

/// A fresh database on the server that the tests of this process share.
pub(crate) async fn mysql_database() -> TestDatabase {
    static SERVER: OnceCell<Result<Server, String>> = OnceCell::const_new();
    let server = SERVER.get_or_init(Server::shared).await;
    let server_url = match server {
        Ok(Server::Named(url)) => url.as_str(),
        Ok(Server::Private(server)) => &server.url,
        Ok(Server::Cluster(cluster)) => cluster.node(0).url(),
        Err(why) => panic!("{why}"),
    };
    create_database(server_url).await
}

/// Makes of one test body two tests, `<name>::on_sqlite` and `<name>::on_mysql`, each with an empty database.
///
/// ```ignore
/// on_both_stores! {
///     async fn what_is_committed_is_read_back(database) {
///         let app = App::start(database.url()).await;
///     }
/// }
/// ```
macro_rules! on_both_stores {
    ($($(#[$attribute:meta])* async fn $name:ident($database:ident) $body:block)+) => {$(
        $(#[$attribute])*
        async fn $name($database: $crate::support::database::TestDatabase) $body

        mod $name {
            use $crate::support::database::{Store, database};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_sqlite() {
                super::$name(database(Store::Sqlite).await).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_mysql() {
                super::$name(database(Store::Mysql).await).await;
            }
        }
    )+};
}
pub(crate) use on_both_stores;

/// Where the tests' databases are.
enum Server {
    Named(String),
    Private(PrivateServer),
    Cluster(Galera),
}

impl Server {
    async fn shared() -> Result<Self, String> {
        #[expect(clippy::disallowed_methods, reason = "the tests' own setting, not the service's")]
        let named = std::env::var("TEST_DATABASE_URL").ok().filter(|url| !url.is_empty());
        match named {
            Some(url) => {
                let server = url.parse().map_err(|error| format!("TEST_DATABASE_URL: {error}"))?;
                drop_left_behind(&server).await.map_err(|error| format!("the server in TEST_DATABASE_URL: {error}"))?;
                Ok(Self::Named(url))
            }
            None if galera::wanted() => Galera::start().await.map(Self::Cluster),
            None => PrivateServer::try_start(&[]).await.map(Self::Private),
        }
    }
}

/// A MariaDB or MySQL server of a test's own, to kill, stop, freeze and start again on the same port and data.
/// It commits durably. Gone with its data when this is dropped, and at the latest when the test process ends.
#[derive(Debug)]
pub(crate) struct PrivateServer {
    url: String,
    port: u16,
    process: Option<Process>,
    program: PathBuf,
    pub(super) options: Vec<String>,
    /// Whom it runs as, if not as ourselves.
    user: Option<&'static str>,
    /// What it has a row for once it can be used.
    pub(super) ready: &'static str,
    // Last, so that it is removed after the process.
    folder: Folder,
}

impl PrivateServer {
    /// Starts one with empty data and waits until it answers: about two seconds.
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same, with more options of the server: `--read-only=ON`.
    pub(crate) async fn start_with(options: &[String]) -> Self {
        Self::try_start(options).await.unwrap_or_else(|why| panic!("{why}"))
    }

    async fn try_start(options: &[String]) -> Result<Self, String> {
        let program = find_program(&["mariadbd", "mysqld"]).ok_or(ADVICE)?;
        let mut server = Self::prepare(program, None).await?;
        server.options.extend_from_slice(options);
        let mut why = String::new();
        // Another process may take the free port before the server does: then it ends, and another port is tried.
        for _ in 0..3 {
            match server.try_restart().await {
                Ok(()) => return Ok(server),
                Err(error) => why = error,
            }
            server.take_port();
        }
        Err(why)
    }

    /// One with empty data, to be started. As root it runs as `user`, if one is named, and else as root.
    pub(super) async fn prepare(program: PathBuf, user: Option<&'static str>) -> Result<Self, String> {
        let folder = Folder::new("server");
        let user = user_option(folder.path()).map(|root| user.unwrap_or(root));
        if let Some(user) = user {
            let given = Command::new("chown").arg(user).arg(folder.path()).status();
            given.map_err(|error| format!("chown {user}: {error}"))?;
        }
        initialise(&program, folder.path(), user).await?;
        std::fs::write(
            folder.path().join("init.sql"),
            "CREATE USER IF NOT EXISTS 'sonnette'@'127.0.0.1' IDENTIFIED BY 'sonnette';\n\
             GRANT ALL ON *.* TO 'sonnette'@'127.0.0.1' WITH GRANT OPTION;\n",
        )
        .map_err(|error| error.to_string())?;
        let options = vec![format!("--init-file={}", folder.path().join("init.sql").display())];
        let (url, ready) = (String::new(), "SELECT 1");
        let mut server = Self { url, port: 0, process: None, program, options, user, ready, folder };
        server.take_port();
        Ok(server)
    }

    fn take_port(&mut self) {
        self.port = free_port();
        self.url = format!("mysql://sonnette:sonnette@127.0.0.1:{}/", self.port);
    }

    /// A fresh database on this server. It goes with the server.
    pub(crate) async fn database(&self) -> TestDatabase {
        let mut database = create_database(&self.url).await;
        database.on_server = None;
        database
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Where it is, for an account with every privilege.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// One number, asked with every privilege.
    pub(crate) async fn number(&self, question: &str) -> i64 {
        let mut connection = MySqlConnection::connect(&self.url).await.expect("the test server answers");
        let question = AssertSqlSafe(question.to_owned());
        sqlx::query_scalar(question).fetch_one(&mut connection).await.expect("an answer")
    }

    /// The first row of what is asked, with every privilege: its first two columns as texts.
    pub(crate) async fn row(&self, question: &str) -> (String, String) {
        use sqlx::Row as _;

        let mut connection = MySqlConnection::connect(&self.url).await.expect("the test server answers");
        let question = AssertSqlSafe(question.to_owned());
        let row = sqlx::raw_sql(question).fetch_one(&mut connection).await.expect("a row");
        let text = |column| String::from_utf8(row.try_get_unchecked(column).unwrap()).unwrap();
        (text(0), text(1))
    }

    /// Runs statements one by one, with every privilege.
    pub(crate) async fn execute(&self, statements: &[&str]) {
        let mut connection = MySqlConnection::connect(&self.url).await.expect("the test server answers");
        for statement in statements {
            run(&mut connection, (*statement).to_owned()).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
        let _ = connection.close().await;
    }

    /// Runs one statement, whose effect lasts until the connection that comes back is dropped.
    pub(crate) async fn hold(&self, statement: &str) -> MySqlConnection {
        let mut connection = MySqlConnection::connect(&self.url).await.expect("the test server answers");
        run(&mut connection, statement.to_owned()).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
        connection
    }

    /// Becomes a replica of `primary`, which has logged everything since its start.
    pub(crate) async fn follow(&self, primary: &Self) {
        let (command, word, more) = if self.is_mariadb().await {
            ("CHANGE MASTER", "MASTER", "")
        } else {
            ("CHANGE REPLICATION SOURCE", "SOURCE", ", GET_SOURCE_PUBLIC_KEY=1")
        };
        self.execute(&[
            &format!(
                "{command} TO {word}_HOST='127.0.0.1', {word}_PORT={}, {word}_USER='sonnette', \
                 {word}_PASSWORD='sonnette', {word}_LOG_FILE='log.000001', {word}_LOG_POS=4{more}",
                primary.port
            ),
            "START REPLICA",
        ])
        .await;
    }

    /// Waits until it has everything that `primary`, which writes no more, has logged.
    pub(crate) async fn catch_up(&self, primary: &Self) {
        let (status, wait) = if self.is_mariadb().await {
            ("SHOW MASTER STATUS", "MASTER_POS_WAIT")
        } else {
            ("SHOW BINARY LOG STATUS", "SOURCE_POS_WAIT")
        };
        let (file, position) = primary.row(status).await;
        let waited = self.number(&format!("SELECT {wait}('{file}', {position}, 60)")).await;
        assert!(waited >= 0, "the replica did not catch up");
    }

    /// Is a replica no longer, and takes writes.
    pub(crate) async fn promote(&self) {
        self.execute(&["STOP REPLICA", "SET GLOBAL read_only = OFF"]).await;
    }

    async fn is_mariadb(&self) -> bool {
        self.row("SELECT VERSION(), ''").await.0.contains("MariaDB")
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// SIGKILL, as by a crash: returns once the process is gone. Does nothing if it is not running.
    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    /// An orderly shutdown: returns once the process is gone.
    pub(crate) async fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal("TERM");
            assert!(process.wait(ANSWERS_WITHIN).await.is_some(), "the server did not stop within {ANSWERS_WITHIN:?}");
        }
    }

    /// SIGSTOP: connections stay open and nothing answers, as with a machine that hangs.
    pub(crate) fn freeze(&self) {
        self.process.as_ref().expect("the server runs").freeze();
    }

    /// Ends [`Self::freeze`].
    pub(crate) fn thaw(&self) {
        self.process.as_ref().expect("the server runs").signal("CONT");
    }

    /// Starts it again on the same port and data, and waits until it answers; first kills it if it runs.
    pub(crate) async fn restart(&mut self) {
        self.try_restart().await.unwrap_or_else(|why| panic!("{why}"));
    }

    /// Waits until it has a row to answer this with.
    pub(super) async fn comes_to(&self, question: &str) {
        let started = Instant::now();
        while self.has_row(question).await != Ok(true) {
            assert!(started.elapsed() < ANSWERS_WITHIN, "waited in vain for a row: {question}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether it has a row to answer this with, within five seconds.
    pub(super) async fn has_row(&self, question: &str) -> Result<bool, String> {
        let asked = async {
            let mut connection = MySqlConnection::connect(&self.url).await?;
            let row = sqlx::raw_sql(AssertSqlSafe(question.to_owned())).fetch_optional(&mut connection).await?;
            let _ = connection.close().await;
            Ok::<_, sqlx::Error>(row.is_some())
        };
        match tokio::time::timeout(Duration::from_secs(5), asked).await {
            Ok(asked) => asked.map_err(|error| error.to_string()),
            Err(elapsed) => Err(elapsed.to_string()),
        }
    }

    /// The program with everything it is started with.
    pub(super) fn command(&self) -> Command {
        let folder = self.folder.path();
        let within = |name: &str| folder.join(name).display().to_string();
        let mut command = Command::new(&self.program);
        command
            .arg("--no-defaults") // must be the first
            .args(self.user.map(|user| format!("--user={user}")))
            .arg(format!("--datadir={}", within("data")))
            .arg(format!("--tmpdir={}", folder.display()))
            // Its built-in place for files need not exist where only the programs are installed.
            .arg(format!("--secure-file-priv={}", folder.display()))
            .arg(format!("--socket={}", within("sock")))
            .arg(format!("--pid-file={}", within("pid")))
            .arg(format!("--port={}", self.port))
            .args(["--bind-address=127.0.0.1", "--skip-name-resolve", "--max-connections=500"])
            .args(["--innodb-flush-log-at-trx-commit=1", "--innodb-buffer-pool-size=128M", "--skip-log-bin"])
            // Many servers on one machine run out of the kernel's asynchronous requests.
            .arg("--innodb-use-native-aio=0")
            // `loose`: only MySQL knows these.
            .args(["--loose-mysqlx=OFF", "--loose-performance-schema=OFF"])
            .args(&self.options);
        command
    }

    pub(super) async fn try_restart(&mut self) -> Result<(), String> {
        self.process = None;
        let folder = self.folder.path();
        self.process = Some(spawn_logged(&mut self.command(), &folder.join("server.log"))?);

        let started = Instant::now();
        loop {
            let error = match self.has_row(self.ready).await {
                Ok(true) => return Ok(()),
                Ok(false) => "it is not ready yet".to_owned(),
                Err(error) => error,
            };
            let running = self.process.as_mut().is_some_and(Process::is_running);
            if !running || started.elapsed() > ANSWERS_WITHIN {
                self.process = None;
                let what = if running { "does not answer" } else { "ended" };
                return Err(format!("the test server {what} ({error}); its log:\n{}", log_end(folder, "server.log")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Makes the data folder with its system tables.
async fn initialise(program: &Path, folder: &Path, user: Option<&str>) -> Result<(), String> {
    let is_mariadb = Command::new(program)
        .args(["--no-defaults", "--version"])
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("MariaDB"));
    let mut command = if is_mariadb {
        let install = find_program(&["mariadb-install-db", "mysql_install_db"]).ok_or(ADVICE)?;
        let mut command = Command::new(install);
        command.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
        // `force` goes on where the machine can look up neither its own name nor localhost: no account of ours needs it.
        command.arg("--force");
        command
    } else {
        let mut command = Command::new(program);
        command.args(["--no-defaults", "--initialize-insecure"]);
        command
    };
    command.args(user.map(|user| format!("--user={user}")));
    command.arg(format!("--datadir={}", folder.join("data").display()));
    // A server that starts clears temporary tables out of this folder, also those of others: never share it.
    command.arg(format!("--tmpdir={}", folder.display()));
    let mut process = spawn_logged(&mut command, &folder.join("install.log"))?;
    match process.wait(ANSWERS_WITHIN).await {
        Some(status) if status.success() => Ok(()),
        _ => Err(format!("{command:?} failed; its log:\n{}", log_end(folder, "install.log"))),
    }
}

/// Both servers refuse to run as root unless told to; an ordinary user is not to name one.
fn user_option(ours: &Path) -> Option<&'static str> {
    use std::os::unix::fs::MetadataExt;
    let is_root = std::fs::metadata(ours).is_ok_and(|folder| folder.uid() == 0);
    is_root.then_some("root")
}

fn spawn_logged(command: &mut Command, log: &Path) -> Result<Process, String> {
    let shown = format!("{command:?}");
    let log = File::options().create(true).append(true).open(log).map_err(|error| error.to_string())?;
    let errors = log.try_clone().map_err(|error| error.to_string())?;
    command.stdin(Stdio::null()).stdout(log).stderr(errors);
    Process::spawn(command).map_err(|error| format!("{shown}: {error}"))
}

fn log_end(folder: &Path, name: &str) -> String {
    let log = std::fs::read(folder.join(name)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(60)).copied().collect::<Vec<_>>().join("\n")
}

/// The first of `names` in the path or where packages put it (the same places as in `tests/database.sh`).
pub(super) fn find_program(names: &[&str]) -> Option<PathBuf> {
    const USUAL: &str = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/usr/libexec:/opt/homebrew/bin:\
        /opt/homebrew/sbin:/opt/homebrew/opt/mariadb/bin:/usr/local/opt/mariadb/bin:/opt/homebrew/opt/mysql/bin:\
        /usr/local/opt/mysql/bin";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = std::env::split_paths(&path).chain(std::env::split_paths(USUAL)).collect();
    names.iter().find_map(|name| folders.iter().map(|folder| folder.join(name)).find(|program| program.is_file()))
}

async fn create_database(server_url: &str) -> TestDatabase {
    let name = format!("{PREFIX}{}", Uuid::now_v7().simple());
    let server: MySqlConnectOptions = server_url.parse().expect("a MySQL address");
    let mut connection = server.connect().await.expect("the test server answers");
    run(&mut connection, format!("CREATE DATABASE {name}")).await.expect("the tests may create databases");
    let _ = connection.close().await;
    let url = with_database(server_url, &name);
    TestDatabase { store: Store::Mysql, url, _folder: None, on_server: Some((server, name)) }
}

/// The same address with `name` as its database; user, host and parameters stay.
fn with_database(server_url: &str, name: &str) -> String {
    let (address, parameters) = match server_url.split_once('?') {
        Some((address, parameters)) => (address, format!("?{parameters}")),
        None => (server_url, String::new()),
    };
    let (scheme, rest) = address.split_once("://").expect("an address has a scheme");
    let host = rest.split('/').next().unwrap_or(rest);
    format!("{scheme}://{host}/{name}{parameters}")
}

/// Cuts whoever is connected to the database, so that no open transaction holds it, and drops it.
async fn drop_database(server: &MySqlConnectOptions, name: &str) -> Result<(), sqlx::Error> {
    let mut connection = server.connect().await?;
    run(&mut connection, "SET SESSION lock_wait_timeout = 10".to_owned()).await?;
    let connected: Vec<i64> =
        sqlx::query_scalar("SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = ?")
            .bind(name)
            .fetch_all(&mut connection)
            .await?;
    for id in connected {
        // Refused only if it has just left.
        let _ = run(&mut connection, format!("KILL {id}")).await;
    }
    run(&mut connection, format!("DROP DATABASE IF EXISTS {name}")).await?;
    connection.close().await
}

/// Drops what killed test runs left on a server that is not ours: databases of our name that are over a day old.
async fn drop_left_behind(server: &MySqlConnectOptions) -> Result<(), sqlx::Error> {
    let seconds = |id: Uuid| id.get_timestamp().map(|at| at.to_unix().0);
    let now = seconds(Uuid::now_v7()).unwrap_or_default();
    let mut connection = server.connect().await?;
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT CAST(schema_name AS CHAR) FROM information_schema.schemata WHERE schema_name LIKE ?",
    )
    .bind(format!("{}%", PREFIX.replace('_', "\\_")))
    .fetch_all(&mut connection)
    .await?;
    for name in names {
        let made = name.strip_prefix(PREFIX).and_then(|id| Uuid::try_parse(id).ok()).and_then(seconds);
        if made.is_some_and(|made| made + 24 * 60 * 60 < now) {
            drop_database(server, &name).await?;
        }
    }
    connection.close().await
}

async fn run(connection: &mut MySqlConnection, statement: String) -> Result<(), sqlx::Error> {
    // Names are ours: a prefix and hexadecimal digits. MySQL prepares no KILL, hence the plain protocol.
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(connection).await.map(|_| ())
}

#[test]
fn a_database_is_put_into_an_address_with_all_else_kept() {
    for (server, expected) in [
        ("mysql://u:p@h:3306/", "mysql://u:p@h:3306/x"),
        ("mysql://u:p@h", "mysql://u:p@h/x"),
        ("mysql://u:p%2F@h/old?ssl-mode=REQUIRED&ssl-ca=/a/b", "mysql://u:p%2F@h/x?ssl-mode=REQUIRED&ssl-ca=/a/b"),
    ] {
        assert_eq!(with_database(server, "x"), expected);
    }
}
