//! Open files: each kind is made in a process, captured from outside, and made again in another process; both must
//! then behave as if nothing had been.
//!
//! This program is all three: the driver, the target (`target NAME`), and the process resumed (`resumed NAME`).

mod cases;
mod connections;
mod figures;
mod hostile;
mod refused;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use snapshot::files::{self, Capture, Connections, Context, OpenFile, Options};
use snapshot::image::manifest::Fd;
use snapshot::sys::descriptor;

/// What a process makes, and what must hold of it at any later time.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) make: fn(&Path),
    pub(crate) check: fn(&Path),
}

/// Moves a descriptor to a number.
pub(crate) fn at(number: i32, fd: impl Into<OwnedFd>) {
    let fd = fd.into();
    if fd.as_raw_fd() == number {
        std::mem::forget(fd);
    } else {
        descriptor::place(fd.as_fd(), number, false).unwrap();
    }
}

/// Takes what is at a number.
pub(crate) fn take(number: i32) -> OwnedFd {
    descriptor::adopt(number).unwrap()
}

pub(crate) type Captured = (Vec<OpenFile>, Vec<Vec<Fd>>);

/// A target that has made its things and stopped.
pub(crate) struct Target {
    pub(crate) child: Child,
    pub(crate) dir: PathBuf,
}

impl Target {
    pub(crate) fn start(role: &str, name: &str, dir: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([role, name]).arg(dir).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let target = Self {
            child,
            dir: dir.to_owned(),
        };
        let status = waitpid(target.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(
            matches!(status, WaitStatus::Stopped(_, Signal::SIGSTOP)),
            "{name} did not get ready: {status:?}"
        );
        target
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn captured(&self) -> Captured {
        let shared = |_, _, _: std::os::fd::BorrowedFd| None;
        let options = Options {
            stdio: true,
            ..Options::new(&self.dir, &shared)
        };
        self.captured_with(&options)
    }

    pub(crate) fn captured_with(&self, options: &Options) -> Captured {
        let mut capture = Capture::prepare(&[self.pid().as_raw()], options).unwrap();
        capture.freeze().unwrap().finish().unwrap()
    }

    /// Lets it go on and waits for its end.
    pub(crate) fn finish(mut self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
        assert!(
            self.child.wait().unwrap().success(),
            "the original does not work any more"
        );
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a captured process's files again in a new process, which then runs a check.
pub(crate) fn resume(role: &str, name: &str, dir: &Path, captured: &Captured) {
    std::fs::write(
        dir.join("captured.json"),
        serde_json::to_vec(captured).unwrap(),
    )
    .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status = command
        .args([role, name])
        .arg(dir)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(
        status.success(),
        "the resumed process does not work: {status:?}"
    );
}

/// In the resumed process: everything comes back.
pub(crate) fn restore(
    dir: &Path,
    pid: Option<i32>,
    connections: Connections,
    before: Option<&dyn Fn()>,
) {
    let text = std::fs::read(dir.join("captured.json")).unwrap();
    let (files, tables): Captured = serde_json::from_slice(&text).unwrap();
    let root = std::fs::File::open("/").unwrap();
    let external = [1, 2].map(|fd| (fd, descriptor::duplicate_number(fd, 0).unwrap()));
    let shared = |_| Err(std::io::Error::other("none in this test"));
    let ctx = Context {
        root: root.as_fd(),
        external: external.into(),
        log: None,
        shared: &shared,
        connections,
        before_connections: before,
        contended_locks: false,
    };
    let made = files::restore(&files, dir, &ctx).unwrap_or_else(|error| fail(&error));
    let pid = pid.unwrap_or_else(|| {
        std::fs::read_to_string(dir.join("pid"))
            .unwrap()
            .parse()
            .unwrap()
    });
    let keep = vec![root.as_fd().try_clone_to_owned().unwrap()];
    let (table, own) = (&tables[0], (pid, false));
    let kept = files::install(table, &files, made, keep, own).unwrap_or_else(|error| fail(&error));
    // install() has closed what these own.
    ctx.external.into_values().for_each(std::mem::forget);
    std::mem::forget(root);
    assert_eq!(kept.len(), 1);
    let now = |old| {
        if old == pid {
            std::process::id().cast_signed()
        } else {
            old
        }
    };
    files::complete(table, &files, pid, &now).unwrap_or_else(|error| fail(&error));
    drop(kept);
    let mut open: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    open.sort_unstable();
    // The listing itself has one open.
    let listed: Vec<i32> = open
        .into_iter()
        .filter(|fd| table.iter().any(|entry| entry.fd == *fd))
        .collect();
    assert_eq!(
        listed,
        table.iter().map(|entry| entry.fd).collect::<Vec<_>>()
    );
}

fn fail(error: &dyn std::error::Error) -> ! {
    let cause = error.source().map(ToString::to_string);
    panic!("{error}: {cause:?}")
}

fn run(case: &Case) {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::start("target", case.name, dir.path());
    std::fs::write(dir.path().join("pid"), target.pid().to_string()).unwrap();
    let captured = target.captured();
    target.finish();
    resume("resumed", case.name, dir.path(), &captured);
}

/// Every test of this program.
fn tests() -> Vec<(String, Box<dyn Fn()>)> {
    let mut tests: Vec<(String, Box<dyn Fn()>)> = Vec::new();
    for case in cases::ALL {
        tests.push((format!("kind::{}", case.name), Box::new(move || run(case))));
    }
    for (name, test) in [
        connections::TESTS,
        refused::TESTS,
        hostile::TESTS,
        figures::TESTS,
    ]
    .concat()
    {
        tests.push((name.to_owned(), Box::new(test)));
    }
    tests
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, role, name, dir] = &args[..]
        && [
            "target",
            "resumed",
            "peer-target",
            "peer-resumed",
            "refused",
            "many",
        ]
        .contains(&&**role)
    {
        // What the test's own caller has left open is not of the test.
        descriptor::close_range(3, u32::MAX).unwrap();
        let dir = Path::new(dir);
        let case = cases::ALL.iter().find(|case| case.name == name);
        match (&**role, case) {
            ("target", Some(case)) => {
                (case.make)(dir);
                raise(Signal::SIGSTOP).unwrap();
                (case.check)(dir);
            }
            ("resumed", Some(case)) => {
                restore(dir, None, Connections::Repair, None);
                (case.check)(dir);
            }
            ("refused", _) => refused::target(dir),
            ("many", _) => figures::target(name, dir),
            _ => connections::role(role, name, dir),
        }
        std::process::exit(0);
    }
    let wanted: Vec<&String> = args
        .iter()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let mut failed = Vec::new();
    for (name, test) in tests() {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(&***part)) {
            continue;
        }
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&test));
        println!(
            "test {name} ... {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        if result.is_err() {
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
