//! Refuses what would make the figures a toy's: a database that answers before its commit is on the disk.

use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use sqlx::{ConnectOptions as _, mysql::MySqlConnectOptions};

/// At most so many registrations are looked at, each a commit.
const COMMITS: u64 = 400;

/// So many of them must be seen flushing. Without a flush at each commit there would be two or three: those at the
/// checkpoints, every 1,000 pages. Not all are seen even so: on a busy machine the watcher waits for its turn.
const FLUSHED: u64 = 12;

/// Refuses a folder in memory.
pub(crate) fn on_a_disk(folder: &Path) -> Result<(), String> {
    let folder = fs::canonicalize(folder).map_err(|error| error.to_string())?;
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| format!("/proc/mounts: {error}"))?;
    let kind = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            Some((fields.nth(1)?, fields.next()?))
        })
        .filter(|(point, _)| folder.starts_with(point))
        .max_by_key(|(point, _)| point.len())
        .map_or("an unknown kind", |(_, kind)| kind);
    if ["tmpfs", "ramfs"].contains(&kind) {
        return Err(format!("{} is in memory ({kind}): set TMPDIR to a folder on a disk", folder.display()));
    }
    Ok(())
}

/// Refuses a server that does not flush each commit. Says what it has seen.
pub(crate) async fn of_server(url: &str) -> Result<String, String> {
    let options: MySqlConnectOptions = url.parse().map_err(|error| format!("BENCH_DATABASE_URL: {error}"))?;
    let mut connection = options.connect().await.map_err(|error| format!("the database server: {error}"))?;
    let variables: Vec<(String, String)> = sqlx::query_as("SHOW GLOBAL VARIABLES")
        .fetch_all(&mut connection)
        .await
        .map_err(|error| format!("the database server: {error}"))?;
    let status: Vec<(String, String)> = sqlx::query_as("SHOW GLOBAL STATUS LIKE 'Innodb_redo_log_enabled'")
        .fetch_all(&mut connection)
        .await
        .map_err(|error| format!("the database server: {error}"))?;
    let known: HashMap<String, String> =
        variables.into_iter().chain(status).map(|(name, value)| (name.to_lowercase(), value)).collect();
    let value = |name: &str| known.get(name).map(|value| value.to_uppercase());
    // A variable that a server does not have cannot be wrong.
    let wanted: [(&str, &[&str]); 5] = [
        ("innodb_flush_log_at_trx_commit", &["1"]),
        ("innodb_doublewrite", &["ON", "1", "FAST", "DETECT_AND_RECOVER"]),
        ("innodb_flush_method", &["FSYNC", "O_DSYNC", "O_DIRECT", "O_DIRECT_NO_FSYNC"]),
        ("debug_no_sync", &["OFF"]),
        ("innodb_redo_log_enabled", &["ON"]),
    ];
    let mut seen = Vec::new();
    let mut check = |name: &str, good: &[&str]| match value(name) {
        Some(is) if !good.contains(&is.as_str()) => Err(format!("durability is off: {name} is {is}, not {}", good[0])),
        Some(is) => {
            seen.push(format!("{name}={is}"));
            Ok(())
        }
        None => Ok(()),
    };
    for (name, good) in wanted {
        check(name, good)?;
    }
    if value("log_bin").as_deref() == Some("ON") {
        check("sync_binlog", &["1"])?;
    }
    // If it runs on this machine, and we may look.
    if let Some(pid) = known.get("pid_file").and_then(|file| pid_in(file)) {
        not_bypassed(pid)?;
        known.get("datadir").map_or(Ok(()), |folder| on_a_disk(Path::new(folder)))?;
    }
    Ok(format!("MySQL: {}, {}", known.get("version").map_or("", String::as_str), seen.join(", ")))
}

/// The process of a server on this machine.
pub(crate) fn pid_in(file: &str) -> Option<u32> {
    fs::read_to_string(file).ok().and_then(|pid| pid.trim().parse().ok())
}

/// Refuses a process whose flushes are swallowed by a preloaded library.
pub(crate) fn not_bypassed(pid: u32) -> Result<(), String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|error| format!("/proc/{pid}/maps: {error}"))?;
    if maps.contains("eatmydata") {
        return Err("durability is off: libeatmydata is loaded".to_owned());
    }
    Ok(())
}

/// How often a thread was seen flushing; and the end of looking.
#[derive(Default)]
struct Watch {
    seen: AtomicU64,
    stop: AtomicBool,
}

/// Watches a process while `commit` is done one after another, and refuses unless enough commits were seen waiting
/// for the disk.
///
/// `PRAGMA synchronous` belongs to a connection and cannot be asked from outside. But with `FULL` each commit calls
/// `fdatasync` (with less, only the rare checkpoint does), and the kernel shows which call each thread is in.
pub(crate) async fn of_commits<F: Future<Output = ()>>(pid: u32, commit: impl Fn() -> F) -> Result<String, String> {
    let calls: &[&[u8]] = match std::env::consts::ARCH {
        "x86_64" => &[b"74 ", b"75 "],
        "aarch64" | "riscv64" => &[b"82 ", b"83 "],
        other => return Err(format!("it is not known how {other} numbers fsync: STORES=mysql leaves SQLite out")),
    };
    let threads: Vec<File> = fs::read_dir(format!("/proc/{pid}/task"))
        .and_then(|tasks| tasks.map(|task| File::open(task?.path().join("syscall"))).collect())
        .map_err(|error| {
            format!(
                "/proc/{pid}/task/*/syscall: {error}: whether SQLite flushes cannot be seen; STORES=mysql leaves it out"
            )
        })?;
    let watch = Arc::new(Watch::default());
    let watcher = Arc::clone(&watch);
    let watching = std::thread::spawn(move || {
        let mut call = [0_u8; 3];
        while !watcher.stop.load(Ordering::Relaxed) {
            for thread in &threads {
                // A thread that has ended is in no call.
                let read = thread.read_at(&mut call, 0).unwrap_or_default();
                if calls.iter().any(|flush| call[..read].starts_with(flush)) {
                    watcher.seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    let (mut flushed, mut commits) = (0, 0);
    while flushed < FLUSHED && commits < COMMITS {
        let before = watch.seen.load(Ordering::Relaxed);
        commit().await;
        commits += 1;
        flushed += u64::from(watch.seen.load(Ordering::Relaxed) > before);
    }
    watch.stop.store(true, Ordering::Relaxed);
    watching.join().map_err(|_| "the watcher failed".to_owned())?;
    if flushed < FLUSHED {
        return Err(format!("durability is off: of {commits} commits to SQLite only {flushed} were seen flushing"));
    }
    Ok(format!("SQLite: {flushed} of {commits} commits were seen in fsync or fdatasync"))
}
