//! Folders and child processes that do not outlive the test process, however it ends.
//!
//! One keeper, a small `sh`, holds a pipe from the test process. When that closes, because the test process returned,
//! panicked, or was killed with SIGKILL, the keeper kills the processes and removes the folder that all others are in.
//! It sits in a process group of its own, and so does every process here, so that Ctrl-C reaches only the test process.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// Reads `add PID` and `end PID` until its input ends, then kills whole process groups and removes the folder `$1`.
/// Repeats the removal, for a process that dies may still write.
const KEEPER: &str = r#"
pids=
while read -r word pid; do
    others=
    for one in $pids; do [ "$one" = "$pid" ] || others="$others $one"; done
    pids=$others
    [ "$word" = add ] && pids="$pids $pid"
done
for pid in $pids; do kill -s KILL -- "-$pid"; done
for _ in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$1" && exit
    sleep 0.2
done
"#;

struct Keeper {
    root: PathBuf,
    // Its input is the pipe. Never dropped: it closes with the process.
    process: Mutex<Child>,
}

impl Keeper {
    fn get() -> &'static Self {
        static KEEPER_PROCESS: OnceLock<Keeper> = OnceLock::new();
        KEEPER_PROCESS.get_or_init(|| {
            let root = std::env::temp_dir().join(format!("sonnette-tests-{}", uuid::Uuid::new_v4().simple()));
            let keeper = Command::new("sh")
                .args(["-c", KEEPER, "keeper"])
                .arg(&root)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()
                .expect("`sh` starts");
            std::fs::create_dir(&root).expect("a folder in the system's temporary folder");
            Self { root, process: Mutex::new(keeper) }
        })
    }

    fn tell(&self, word: &str, pid: u32) {
        let mut process = self.process.lock().unwrap();
        let pipe = process.stdin.as_mut().expect("a pipe was asked for");
        pipe.write_all(format!("{word} {pid}\n").as_bytes()).expect("the keeper is alive");
    }
}

/// A temporary folder, removed when this is dropped and at the latest when the test process ends.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// A new, empty folder; `name` is for whoever looks at it from outside.
    pub(crate) fn new(name: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Keeper::get().root.join(format!("{name}-{number}"));
        std::fs::create_dir(&path).expect("a temporary folder");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Best effort: the keeper removes what is left.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A child process, killed when this is dropped and at the latest when the test process ends.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    /// Starts `command` in a process group of its own.
    pub(crate) fn spawn(command: &mut Command) -> std::io::Result<Self> {
        let keeper = Keeper::get();
        let child = command.process_group(0).spawn()?;
        keeper.tell("add", child.id());
        Ok(Self(child))
    }

    /// The child, for its pipes and its id.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Sends a signal by name, such as `TERM`, `STOP` or `CONT`, to this one process.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        // The shell's own `kill`: a small system has no other.
        let sent = Command::new("sh").args(["-c", "kill -s \"$1\" \"$2\"", "kill", name, &pid]).status();
        let sent = sent.expect("`sh` starts");
        assert!(sent.success(), "SIG{name} could not be sent to {pid}");
    }

    /// SIGSTOP, and waits until no thread of it runs: the signal is on its way to them for a moment.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
        let threads = format!("/proc/{}/task", self.0.id());
        let runs = |thread: std::io::Result<std::fs::DirEntry>| {
            let stat =
                thread.and_then(|thread| std::fs::read_to_string(thread.path().join("stat"))).unwrap_or_default();
            // Its state stands behind its name, which is in brackets.
            stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('T'))
        };
        let started = std::time::Instant::now();
        // Elsewhere than on Linux there is no such folder, and nothing to be seen.
        while std::fs::read_dir(&threads).is_ok_and(|mut threads| threads.any(runs)) {
            assert!(started.elapsed() < Duration::from_secs(20), "{} does not stand still", self.0.id());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) -> ExitStatus {
        // Refused only if it has ended already.
        let _ = self.0.kill();
        self.0.wait().expect("a child can be waited for")
    }

    /// Waits until it ends by itself; `None` if it has not after `limit`.
    pub(crate) async fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("a child can be waited for") {
                return Some(status);
            }
            if started.elapsed() > limit {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        Keeper::get().tell("end", self.0.id());
    }
}
