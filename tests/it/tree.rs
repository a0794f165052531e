//! That the tree carries nothing of the machine it was written on: what is tracked has to work on any other.

use std::{path::Path, process::Command};

/// Folders of the machines this is developed on. Put together here, so that this file does not hold them itself.
const MACHINE_PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/tmp", "/wt/")];

/// What turns a package manager away from its public registry.
const REDIRECTIONS: &[&str] = &[
    concat!("replace", "-with"),
    concat!("index", "-url"),
    concat!("PIP_INDEX", "_URL"),
    concat!("npm_config", "_registry"),
    concat!("GO", "PROXY="),
];

/// Lock files, and where what they name may come from.
const SOURCES: &[(&str, &[&str])] = &[
    ("Cargo.lock", &["https://github.com/rust-lang/crates.io-index"]),
    ("package-lock.json", &["https://registry.npmjs.org/"]),
    ("poetry.lock", &["https://pypi.org/", "https://files.pythonhosted.org/"]),
    ("uv.lock", &["https://pypi.org/", "https://files.pythonhosted.org/"]),
];

#[test]
fn nothing_of_one_machine_is_tracked() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = tracked(root);
    assert!(files.iter().any(|file| file == "Cargo.toml"), "the files are found: {files:?}");
    let mut wrong = Vec::new();
    for file in files {
        // Deleted but not committed yet, or a link to nowhere.
        let Ok(bytes) = std::fs::read(root.join(&file)) else { continue };
        wrong.extend(faults(&file, &String::from_utf8_lossy(&bytes)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_belongs_to_a_machine_is_found() {
    let path = format!("see {}shared", MACHINE_PATHS[0]);
    assert_eq!(faults("docs/a.md", &format!("\n{path}")), [format!("docs/a.md:2: of one machine: {path}")]);
    assert_eq!(faults("docs/a.md", "https://example.com/work, network/farm"), [""; 0]);
    let redirected = format!("[source.crates-io]\n{} = 'x'", REDIRECTIONS[0]);
    assert_eq!(faults(".cargo/config.toml", &redirected).len(), 1);
    let lock = "source = \"registry+https://github.com/rust-lang/crates.io-index\"\nsource = \"registry+https://mirror.example/i\"";
    assert_eq!(faults("Cargo.lock", lock).len(), 1);
    let lock = "\"resolved\": \"https://registry.npmjs.org/a/-/a-1.tgz\",\n\"resolved\": \"http://10.0.0.1/a-1.tgz\",";
    assert_eq!(faults("docs/console/package-lock.json", lock).len(), 1);
}

fn faults(file: &str, text: &str) -> Vec<String> {
    let name = file.rsplit('/').next().unwrap_or(file);
    let sources = SOURCES.iter().find(|(lock, _)| *lock == name).map(|(_, sources)| *sources);
    let of_a_machine = |line: &str| {
        let elsewhere = sources.is_some_and(|sources| {
            let names_a_source =
                ["source = ", "\"resolved\"", "registry = ", "url = "].iter().any(|key| line.contains(key));
            names_a_source && line.contains("://") && !sources.iter().any(|source| line.contains(source))
        });
        elsewhere || MACHINE_PATHS.iter().chain(REDIRECTIONS).any(|word| line.contains(word))
    };
    let lines = text.lines().enumerate().filter(|(_, line)| of_a_machine(line));
    lines.map(|(number, line)| format!("{file}:{}: of one machine: {}", number + 1, line.trim())).collect()
}

/// What git tracks or would (new files that are not ignored), or everything but build output where there is no git.
fn tracked(root: &Path) -> Vec<String> {
    let listed = Command::new("git")
        .args(["-c", "core.quotePath=off", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output();
    match listed {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let names = String::from_utf8_lossy(&output.stdout);
            names.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        }
        _ => walk(root, ""),
    }
}

fn walk(root: &Path, folder: &str) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if entry.file_type().unwrap().is_dir() {
            if !matches!(name.as_str(), "target" | ".git" | "node_modules") {
                files.extend(walk(root, &path));
            }
        } else {
            files.push(path);
        }
    }
    files
}
