//! That the databases the tests run on are what they are taken for: real, empty, apart, durable, and gone afterwards.

use sqlx::{AssertSqlSafe, Connection, MySqlConnection, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::support::{
    database::{PrivateServer, Store, TestDatabase, mysql_database, on_both_stores},
    scratch::{Folder, Process},
};

/// Runs `statements`, then gives the first column of the last one's rows, over a connection of its own.
async fn ask(database: &TestDatabase, statements: &[&str], question: &str) -> Result<Vec<String>, sqlx::Error> {
    match database.store() {
        Store::Sqlite => {
            let options: SqliteConnectOptions = database.url().parse()?;
            let mut connection = SqliteConnection::connect_with(&options.create_if_missing(true)).await?;
            for statement in statements {
                sqlx::raw_sql(AssertSqlSafe(*statement)).execute(&mut connection).await?;
            }
            sqlx::query_scalar(AssertSqlSafe(question)).fetch_all(&mut connection).await
        }
        Store::Mysql => {
            let mut connection = MySqlConnection::connect(database.url()).await?;
            for statement in statements {
                sqlx::raw_sql(AssertSqlSafe(*statement)).execute(&mut connection).await?;
            }
            sqlx::query_scalar(AssertSqlSafe(question)).fetch_all(&mut connection).await
        }
    }
}

const TABLE: &str = "CREATE TABLE doorbells (name VARCHAR(20) NOT NULL)";

on_both_stores! {
    async fn what_is_written_is_read_over_another_connection(database) {
        let written = ask(&database, &[TABLE, "INSERT INTO doorbells VALUES ('front')"], "SELECT name FROM doorbells");
        assert_eq!(written.await.unwrap(), ["front"]);
        assert_eq!(ask(&database, &[], "SELECT name FROM doorbells").await.unwrap(), ["front"]);
    }

    async fn two_databases_of_a_kind_are_apart(database) {
        ask(&database, &[TABLE], "SELECT name FROM doorbells").await.unwrap();
        let other = crate::support::database::database(database.store()).await;
        assert!(ask(&other, &[], "SELECT name FROM doorbells").await.is_err(), "the other database is empty");
    }
}

#[tokio::test]
async fn a_database_is_dropped_even_under_an_open_transaction() {
    let database = mysql_database().await;
    let url = database.url().to_owned();
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    for statement in [TABLE, "BEGIN", "INSERT INTO doorbells VALUES ('front')"] {
        sqlx::raw_sql(statement).execute(&mut connection).await.unwrap();
    }
    drop(database);
    let error = MySqlConnection::connect(&url).await.expect_err("it is gone");
    assert!(error.to_string().contains("Unknown database"), "{error}");
}

#[tokio::test]
async fn a_killed_server_comes_back_on_its_port_with_what_was_committed() {
    let mut server = PrivateServer::start().await;
    let database = server.database().await;
    let port = server.port();
    ask(&database, &[TABLE, "INSERT INTO doorbells VALUES ('committed')"], "SELECT 'done'").await.unwrap();
    let mut open = MySqlConnection::connect(database.url()).await.unwrap();
    for statement in ["BEGIN", "INSERT INTO doorbells VALUES ('open')"] {
        sqlx::raw_sql(statement).execute(&mut open).await.unwrap();
    }

    server.kill();
    assert!(open.ping().await.is_err(), "the connection is cut");
    assert!(ask(&database, &[], "SELECT 'alive'").await.is_err(), "nobody listens");

    server.restart().await;
    assert_eq!(server.port(), port);
    assert_eq!(ask(&database, &[], "SELECT name FROM doorbells").await.unwrap(), ["committed"]);

    server.stop().await;
    assert!(ask(&database, &[], "SELECT 'alive'").await.is_err(), "nobody listens");
    server.restart().await;
    assert_eq!(ask(&database, &[], "SELECT name FROM doorbells").await.unwrap(), ["committed"]);
}

#[tokio::test]
async fn a_frozen_server_is_silent_until_it_is_thawed() {
    let server = PrivateServer::start().await;
    let database = server.database().await;
    server.freeze();
    let asked = tokio::time::timeout(std::time::Duration::from_millis(300), ask(&database, &[], "SELECT 'alive'"));
    assert!(asked.await.is_err(), "a connection is taken and nothing answers");
    server.thaw();
    assert_eq!(ask(&database, &[], "SELECT 'alive'").await.unwrap(), ["alive"]);
}

#[tokio::test]
async fn nothing_is_left_of_a_test_process_that_was_killed() {
    use std::io::{BufRead, BufReader};

    // This test starts itself once more, as the process to be killed.
    const VICTIM: &str = "SONNETTE_TEST_VICTIM";
    if std::env::var_os(VICTIM).is_some() {
        let server = PrivateServer::start().await;
        let folder = Folder::new("victim");
        eprintln!("VICTIM {} {}", server.port(), folder.path().display());
        return std::future::pending().await;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "database::nothing_is_left_of_a_test_process_that_was_killed", "--nocapture"]);
    command.env(VICTIM, "1").stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let mut victim = Process::spawn(&mut command).unwrap();
    let mut said = BufReader::new(victim.child().stderr.take().unwrap()).lines().map_while(Result::ok);
    let line = said.find_map(|line| Some(line.split_once("VICTIM ")?.1.to_owned())).expect("the victim starts");
    let (port, folder) = line.split_once(' ').unwrap();
    let port: u16 = port.parse().unwrap();
    let root = std::path::Path::new(folder).parent().unwrap();
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(listens() && root.is_dir());

    victim.kill();
    for _ in 0..200 {
        if !listens() && !root.exists() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("left behind: server on {port}: {}, {}: {}", listens(), root.display(), root.exists());
}
