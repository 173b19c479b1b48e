//! Targets, and what is looked at before and after.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub const JOURNALS: &str = "/run/umlctl/journal";
const LONG: Duration = Duration::from_secs(30);

/// A count that can be set by the environment.
pub fn count(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |v| v.parse().expect("a number"))
}

/// Waits until something is so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Ends with the test, whatever becomes of it.
#[derive(Debug)]
pub struct Target {
    pub child: Child,
    pub pid: i32,
    pub dir: tempfile::TempDir,
}

impl Target {
    pub fn start(args: &[&str]) -> Self {
        let umlctl = Path::new(env!("CARGO_BIN_EXE_umlctl"));
        let program = umlctl.with_file_name("examples").join("target");
        assert!(
            program.exists(),
            "run `cargo test -p umlctl`, or build the examples"
        );
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.arg(args[0]);
        if args[0] != "idle" {
            command.arg(dir.path().join("status"));
        }
        command.args(&args[1..]);
        if args[0] == "block" {
            command.arg(dir.path().join("go"));
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("err")).unwrap())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let target = Self { child, pid, dir };
        if args[0] != "idle" {
            until("the target's start", || target.status()[0] > 0);
        }
        target
    }

    /// A Python program.
    pub fn python(program: &str, dir: tempfile::TempDir) -> Self {
        let child = Command::new("/usr/bin/python3")
            .args(["-c", program])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        Self { child, pid, dir }
    }

    /// The words of its status file.
    pub fn status(&self) -> [u64; 8] {
        let mut bytes = [0u8; 64];
        if let Ok(f) = File::open(self.dir.path().join("status")) {
            let _ = f.read_at(&mut bytes, 0);
        }
        std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap()))
    }

    /// It goes on, with all that it does, and has found nothing wrong in its memory.
    pub fn check(&self, when: &str) {
        let s = self.status();
        until(&format!("a heartbeat, {when}"), || {
            self.status()[0] >= s[0] + 5
        });
        // What is zero is nothing that it does.
        for extra in (5..8).filter(|&w| s[w] > 0) {
            until(
                &format!("extra {} of the target, {when}", extra - 5),
                || self.status()[extra] > s[extra],
            );
        }
        let s = self.status();
        let err = std::fs::read_to_string(self.dir.path().join("err")).unwrap();
        assert_eq!(s[1], 0, "{when}: wrong memory: {err}");
    }

    /// `umlctl snapshot` of it, to a new name.
    pub fn snapshot(&self, name: &str) -> Command {
        let mut c = umlctl();
        c.args(["snapshot", "--json", "--pid", &self.pid.to_string()])
            .arg(self.dir.path().join(name));
        c
    }

    /// Nothing is to be repaired. (A saver that dies before it has a guardian leaves a journal that says so.)
    pub fn is_repaired(&self) -> bool {
        snapshot::target::journal::Journal::look(&self.journal()).map_or(true, |r| !r.active)
    }

    pub fn journal(&self) -> PathBuf {
        Path::new(JOURNALS).join(self.pid.to_string())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // After `--kill` and `resume` the number is the same, and the process is not ours.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::SIGKILL,
        );
        let _ = self.child.wait();
    }
}

pub fn umlctl() -> Command {
    let mut c = Command::new("timeout");
    // In the foreground: `timeout` is then not in the way of signals; 20 s and it is killed.
    c.args([
        "--foreground",
        "-s",
        "KILL",
        "30",
        env!("CARGO_BIN_EXE_umlctl"),
    ])
    .stdin(Stdio::null());
    c
}

/// Runs to the end, with its output in files: what it leaves behind must not hold a pipe of ours.
pub fn run(mut c: Command) -> (ExitStatus, String, String) {
    let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let status = c
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .status()
        .unwrap();
    let text = |f: File| {
        let mut bytes = vec![0; f.metadata().unwrap().len() as usize];
        f.read_exact_at(&mut bytes, 0).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    (status, text(out), text(err))
}

/// Whether umlctl was killed (and `timeout` then ends in the same way).
pub fn was_killed(status: ExitStatus) -> bool {
    status.code() == Some(137) || status.signal() == Some(9)
}

/// Runs and must succeed.
pub fn good(c: Command) -> String {
    let text = format!("{c:?}");
    let (status, out, err) = run(c);
    assert!(status.success(), "{text}: {status}: {err}");
    out
}

/// Mappings that are not the heap's or a thread's own doing; and descriptors.
pub fn traces(pid: i32) -> (Vec<String>, Vec<String>) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let maps = maps.lines().map(str::to_owned).collect();
    let mut fds: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .map(|e| {
            let to = std::fs::read_link(e.path()).unwrap_or_default();
            format!("{:?} {}", e.file_name(), to.display())
        })
        .collect();
    fds.sort();
    (maps, fds)
}

/// What the signals that it blocks are, a line a thread; and who traces it.
pub fn masks(pid: i32) -> Vec<String> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
    {
        let text = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        all.extend(
            text.lines()
                .filter(|l| l.starts_with("SigBlk") || l.starts_with("TracerPid"))
                .map(str::to_owned),
        );
    }
    all.sort();
    all
}

/// sigqueue(3); waits if too many are queued.
#[allow(unsafe_code)]
pub fn sigqueue(pid: i32, signal: i32, value: u64) {
    let value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    // SAFETY: takes numbers only.
    while unsafe { libc::sigqueue(pid, signal, value) } != 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
}
