//! Who may know whom: reads every path into the crate in `src/` and refuses an arrow that points up.
//!
//! ```text
//! main -> cli -> app -> { http, dispatch, ops, sim, config } -> { store, apns } -> domain
//! ```
//!
//! A new room is entered in [`ROOMS`], with what it may know, before it compiles into anything.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

/// A room, and what it may name besides itself: rooms, or single modules of them.
const ROOMS: &[(&str, &[&str])] = &[
    (
        "main",
        &["cli", "app", "http", "dispatch", "ops", "sim", "config", "store", "apns", "domain", TELEMETRY, LIFECYCLE],
    ),
    ("cli", &["app", "http", "dispatch", "ops", "sim", "config", "store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    ("app", &["http", "dispatch", "ops", "sim", "config", "store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    // `config` fills in the settings that each room owns.
    ("config", &["http", "dispatch", "ops", "sim", "store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    // `/health` and `/metrics` show what `ops` finds. `http` and `dispatch` meet only in the store.
    ("http", &["ops", "store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    ("dispatch", &["store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    ("ops", &["store", "apns", "domain", TELEMETRY, LIFECYCLE]),
    // Code shared with `apns`, or through `domain`, would share the bug.
    ("sim", &["domain::clock", "domain::secret", TELEMETRY, LIFECYCLE]),
    ("store", &["domain", TELEMETRY, LIFECYCLE]),
    ("apns", &["domain", TELEMETRY, LIFECYCLE]),
    (TELEMETRY, &["domain"]),
    (LIFECYCLE, &["domain"]),
    ("domain", &[]),
    // The list of modules: its documentation links to them, its code names none.
    ("lib", &[]),
];
const TELEMETRY: &str = "telemetry";
const LIFECYCLE: &str = "lifecycle";

#[test]
fn no_room_knows_one_it_should_not() {
    let mut wrong = String::new();
    for file in rust_files("src") {
        wrong.push_str(&faults(&file, &std::fs::read_to_string(in_crate(&file)).unwrap()));
    }
    assert!(wrong.is_empty(), "arrows that point up (see {}):\n{wrong}", file!());
}

#[test]
fn every_room_is_in_the_table() {
    let unknown: Vec<_> =
        rust_files("src").into_iter().filter(|file| allowed(&module_path(file)[0]).is_none()).collect();
    assert!(unknown.is_empty(), "not in the table of rooms in {}: {unknown:?}", file!());
}

#[test]
fn every_file_opens_with_what_it_is_for() {
    let files: Vec<_> = ["src", "tests", "benches"].iter().flat_map(|folder| rust_files(folder)).collect();
    assert!(files.len() > 5, "the files are found: {files:?}");
    let silent: Vec<_> = files
        .into_iter()
        .filter(|file| !std::fs::read_to_string(in_crate(file)).unwrap().starts_with("//! "))
        .collect();
    assert!(silent.is_empty(), "files that do not open with `//! `: {silent:?}");
}

#[test]
fn arrows_down_are_followed_and_arrows_up_are_found_however_they_are_written() {
    let right = [
        ("src/http/v1/devices.rs", "use crate::{domain::device::Token, store::{Devices, StoreError}};"),
        ("src/http/v1/devices.rs", "use super::super::router; use crate::http::problem; use self::x;"),
        ("src/sim/mod.rs", "use crate::domain::{clock::Clock, secret};"),
        ("src/domain/push.rs", "// as crate::store does\n/* crate::http */ const A: &str = \"crate::apns\";"),
        ("src/domain/push.rs", "#[cfg(test)]\nmod tests { use super::*; fn f() { crate::store::open() } }"),
        ("src/config.rs", "fn f(s: crate::http::Settings, c: char) -> bool { c == '\"' }"),
        ("src/main.rs", "use sonnette::cli; fn main() { cli::run() }"),
        ("src/lib.rs", "//! [`crate::store`]\npub mod domain;"),
        ("src/store/mod.rs", "use other_crate::http; macro_rules! m { () => { $crate::domain::x } }"),
    ];
    for (file, text) in right {
        assert_eq!(faults(file, text), "", "{file}: {text}");
    }
    let wrong = [
        ("src/domain/push.rs", "\nuse crate::store::Store;", "src/domain/push.rs:2: `domain` may not know `store`\n"),
        (
            "src/domain/push.rs",
            "fn f() { crate::telemetry::count() }",
            "src/domain/push.rs:1: `domain` may not know `telemetry`\n",
        ),
        (
            "src/store/mod.rs",
            "use crate::{\n    domain::x,\n    apns::Gateway,\n};",
            "src/store/mod.rs:3: `store` may not know `apns`\n",
        ),
        ("src/apns/pool.rs", "use super::super::store::Queue;", "src/apns/pool.rs:1: `apns` may not know `store`\n"),
        ("src/telemetry.rs", "use super::http;", "src/telemetry.rs:1: `telemetry` may not know `http`\n"),
        (
            "src/http/mod.rs",
            "let x = ('\"', crate :: dispatch::run);",
            "src/http/mod.rs:1: `http` may not know `dispatch`\n",
        ),
        (
            "src/dispatch/mod.rs",
            "let r = r#\"\"\"#; use crate::{http};",
            "src/dispatch/mod.rs:1: `dispatch` may not know `http`\n",
        ),
        (
            "src/sim/server.rs",
            "use crate::domain::{clock::{Clock}, topic::Topic};",
            "src/sim/server.rs:1: `sim` may not know `domain::topic`\n",
        ),
        ("src/sim/server.rs", "use crate::{apns as a};", "src/sim/server.rs:1: `sim` may not know `apns`\n"),
        ("src/sim/server.rs", "use crate::domain;", "src/sim/server.rs:1: `sim` may not know `domain`\n"),
        ("src/lib.rs", "pub use crate::store::Store;", "src/lib.rs:1: `lib` may not know `store`\n"),
        ("src/app.rs", "use crate::cli;", "src/app.rs:1: `app` may not know `cli`\n"),
        ("src/ops/mod.rs", "use crate::*;", "src/ops/mod.rs:1: `ops` may not know `*`\n"),
        (
            "src/lifecycle.rs",
            "#[cfg(test)] mod tests { fn f() { let _ = '}'; } }\nuse crate::r#http::x;",
            "src/lifecycle.rs:2: `lifecycle` may not know `http`\n",
        ),
    ];
    for (file, text, expected) in wrong {
        assert_eq!(faults(file, text), expected, "{text}");
    }
}

fn allowed(room: &str) -> Option<&'static [&'static str]> {
    ROOMS.iter().find(|(name, _)| *name == room).map(|(_, may)| *may)
}

/// One line for each path in `text` that `file` may not name.
fn faults(file: &str, text: &str) -> String {
    let module = module_path(file);
    let room = module[0].as_str();
    // Said by `every_room_is_in_the_table`.
    let Some(may) = allowed(room) else { return String::new() };
    let mut lines = String::new();
    for (line, path) in paths(&without_tests(&tokens(text)), &module) {
        let fits = |entry: &&str| {
            let entry: Vec<_> = entry.split("::").collect();
            path.len() >= entry.len() && entry.iter().zip(&path).all(|(a, b)| a == b)
        };
        if path[0] != room && !may.iter().any(fits) {
            // As much of the path as the table speaks of.
            let depth = if may.iter().any(|entry| entry.starts_with(&format!("{}::", path[0]))) { 2 } else { 1 };
            let named = path.iter().take(depth).cloned().collect::<Vec<_>>().join("::");
            writeln!(lines, "{file}:{line}: `{room}` may not know `{named}`").unwrap();
        }
    }
    lines
}

/// `src/http/v1/mod.rs` is the module `http::v1`. The roots `main` and `lib` count as rooms.
fn module_path(file: &str) -> Vec<String> {
    let inside = file.strip_prefix("src/").unwrap_or(file).trim_end_matches(".rs");
    inside.trim_end_matches("/mod").split('/').map(str::to_owned).collect()
}

/// A word (identifier or `*`) or a single sign, and its line.
type Token = (usize, String);

/// The tokens of Rust text that matter here: words, signs, `::`; no comments, strings, characters and lifetimes.
fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut line = 1;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let raw = rest.trim_start_matches('b').strip_prefix('r');
        let hashes = raw.map_or(0, |raw| raw.len() - raw.trim_start_matches('#').len());
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if raw.is_some_and(|raw| raw[hashes..].starts_with('"')) {
            let start = rest.find('"').unwrap() + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len())
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            // A character, or a lifetime, whose sign alone is skipped.
            let mut after = rest.chars().skip(1);
            if after.next() == Some('\\') || after.next() == Some('\'') { quoted(rest, '\'') } else { 1 }
        } else if rest.starts_with("r#") {
            2
        } else if is_word(first) {
            let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            found.push((line, rest[..length].to_owned()));
            length
        } else if rest.starts_with("::") {
            found.push((line, "::".to_owned()));
            2
        } else {
            if !first.is_whitespace() {
                found.push((line, first.to_string()));
            }
            first.len_utf8()
        };
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a literal between two `quote`s, with escapes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// Leaves out `#[cfg(test)] mod … { … }`: tests beside the code may build what they like.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let text: Vec<_> = tokens.iter().map(|(_, token)| token.as_str()).collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if text[at..].starts_with(&["#", "[", "cfg", "(", "test", ")", "]", "mod"]) {
            let mut depth = 0_usize;
            while at < tokens.len() {
                match text[at] {
                    "{" => depth += 1,
                    "}" => depth -= 1,
                    _ => {}
                }
                at += 1;
                if depth == 0 && matches!(text[at - 1], "}" | ";") {
                    break;
                }
            }
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// All paths that begin at the crate's root, one for each leaf of a group: `crate::…`, `sonnette::…`, and as many
/// `super::` as lead there. Each without the root, and never empty.
fn paths(tokens: &[Token], module: &[String]) -> Vec<(usize, Vec<String>)> {
    let text: Vec<_> = tokens.iter().map(|(_, token)| token.as_str()).collect();
    let is_root = matches!(module, [only] if only == "main" || only == "lib");
    let depth = if is_root { 0 } else { module.len() };
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        if at > 0 && text[at - 1] == "::" {
            continue;
        }
        let supers = text[at..].chunks(2).take_while(|pair| *pair == ["super", "::"]).count();
        let after = match text[at] {
            "crate" | "sonnette" | "self" if text.get(at + 1) == Some(&"::") => {
                // `self` is the root only in the root's own file.
                if text[at] == "self" && !is_root {
                    continue;
                }
                at + 2
            }
            "super" if supers >= depth && supers > 0 => at + 2 * supers,
            _ => continue,
        };
        leaves(tokens, after, &mut Vec::new(), &mut found);
    }
    found
}

/// Reads one path, or a group of them, from `at`; returns where it ended.
fn leaves(tokens: &[Token], mut at: usize, before: &mut Vec<String>, found: &mut Vec<(usize, Vec<String>)>) -> usize {
    let length = before.len();
    while let Some((line, token)) = tokens.get(at) {
        if token == "{" {
            at += 1;
            while tokens.get(at).is_some_and(|(_, token)| token != "}") {
                let end = leaves(tokens, at, before, found);
                // A comma, or `as name`, or something that is no path.
                at = if end == at { at + 1 } else { end };
            }
            before.truncate(length);
            return at + 1;
        }
        let is_word = token == "*" || token.starts_with(|c: char| c.is_alphabetic() || c == '_');
        if !is_word {
            break;
        }
        if token != "self" {
            before.push(token.clone());
        }
        at += 1;
        if tokens.get(at).is_some_and(|(_, token)| token == "::") {
            at += 1;
        } else {
            if !before.is_empty() {
                found.push((*line, before.clone()));
            }
            if tokens.get(at).is_some_and(|(_, token)| token == "as") {
                at += 2;
            }
            break;
        }
    }
    before.truncate(length);
    at
}

fn in_crate(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// The Rust files under a folder of the crate, as paths with `/` from the crate's root.
fn rust_files(folder: &str) -> Vec<String> {
    let mut files = Vec::new();
    let Ok(entries) = std::fs::read_dir(in_crate(folder)) else { return files };
    for entry in entries {
        let entry = entry.unwrap();
        let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            files.extend(rust_files(&path));
        } else if entry.path().extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}
