//! A statement that takes long is logged with its name.

use super::{Account, Serving};
use crate::support::{database::PrivateServer, scratch::Folder};

#[tokio::test]
async fn a_slow_statement_is_logged_with_its_name_and_without_its_text() {
    let server = PrivateServer::start().await;
    let account = Account::create(&server, "ALL", "").await;
    let url = account.url_of(&[&server]);

    // Making a table takes longer than a millisecond anywhere.
    let folder = Folder::new("slow");
    let serving = Serving::start(folder.path(), &url, "slow_statement_ms = 1");
    serving.ready().await;
    let said = serving.said();
    let slow =
        said.iter().find(|line| line["fields"]["statement"].as_str().is_some_and(|s| s.starts_with("migrate.0")));
    let slow = slow.unwrap_or_else(|| panic!("no slow step of the migration: {said:?}"));
    assert_eq!(slow["level"], "WARN");
    assert!(slow["fields"]["duration_ms"].as_u64().unwrap() >= 1, "{slow}");
    assert!(slow["fields"]["message"].as_str().unwrap().contains("the statement `migrate.0"), "{slow}");
    assert!(!format!("{said:?}").contains("CREATE TABLE"), "no text: {said:?}");

    let folder = Folder::new("not-slow");
    let quiet = Serving::start(folder.path(), &url, "slow_statement_ms = 0");
    quiet.ready().await;
    assert!(quiet.said().iter().all(|line| line["fields"]["statement"].is_null()));
}
