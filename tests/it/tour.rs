//! The README's tour, as it is printed there, with curl.

use std::process::Command;

use crate::support::{
    database::on_both_stores,
    scratch::Folder,
    world::{SERVER, World},
};

/// The shell blocks of the tour, but for the first, which names the demo's address and key.
fn tour() -> String {
    let readme = include_str!("../../README.md");
    let section = readme.split("## The tour").nth(1).unwrap().split("## Run it for real").next().unwrap();
    let blocks: Vec<&str> = section.split("```sh\n").skip(2).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 6, "the tour has its blocks");
    blocks.join("\n")
}

/// Over HTTP/1.1, as printed, and over HTTP/2.
pub(crate) async fn take_the_tour(world: &World) {
    for curl in ["", "curl() { command curl --http2-prior-knowledge \"$@\"; }"] {
        take_it_with(world, curl).await;
    }
}

async fn take_it_with(world: &World, curl: &str) {
    let folder = Folder::new("tour");
    let mut scopes = SERVER.to_vec();
    scopes.push(sonnette::domain::api_key::Scope::Metrics);
    let key = world.key(&format!("tourist {curl}"), &scopes).await;
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", &format!("{curl}\n{}", tour())])
        .env("SONNETTE", format!("http://{}", world.app().address()))
        .env("KEY", key)
        .current_dir(folder.path());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

on_both_stores! {
    async fn the_tour_of_the_readme_works_as_printed_over_http_1_1_and_http_2(database) {
        let world = World::start(database).await;
        take_the_tour(&world).await;
    }
}
