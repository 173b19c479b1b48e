//! Processes without children are captured, ended, resumed, and go on.

mod common;

use std::path::Path;
use std::process::Command;

fn goes_on(command: Command, args: &[&str], ready: &str, code: i32, out: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut target = common::start(command, &dir.path().join("out"), ready);
    common::capture(&mut target, dir.path());
    let (c, o, e) = common::resume(dir.path(), args);
    assert_eq!((c, o.as_str()), (code, out), "{e}");
}

const WAYS: [&[&str]; 2] = [&["--eager"], &[]];

#[test]
fn a_counter_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    for way in WAYS {
        let exe = common::compile("counter", dir.path());
        goes_on(Command::new(exe), way, "ready", 42, "counted 20 11.5\n");
    }
}

#[test]
fn threads_signals_and_timers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    for way in WAYS {
        let exe = common::compile("threads", dir.path());
        goes_on(Command::new(exe), way, "ready", 0, "all right\n");
    }
}

#[test]
fn python_with_threads_goes_on() {
    let text = "
import threading, time, hashlib, sys
data = bytes(range(256)) * 40000
want = hashlib.sha256(data).hexdigest()
objects = {i: [i, str(i)] for i in range(100000)}
counts = [0] * 4
stop = threading.Event()
def work(i):
    while not stop.is_set():
        counts[i] += 1
        time.sleep(0.01)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]
time.sleep(0.2)
print('ready', flush=True)
time.sleep(1)
before = list(counts)
time.sleep(0.5)
assert all(b > a for a, b in zip(before, counts))
stop.set()
[t.join() for t in threads]
assert hashlib.sha256(data).hexdigest() == want
assert all(v == [k, str(k)] for k, v in objects.items())
print('good', flush=True)
sys.exit(7)
";
    for way in WAYS {
        let mut c = Command::new(python());
        c.args(["-c", text]);
        goes_on(c, way, "ready", 7, "good\n");
    }
}

/// A shim that starts the real one would be another process.
fn python() -> String {
    let out = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .unwrap();
    String::from_utf8(out.stdout).unwrap().trim().into()
}

#[test]
fn bash_goes_on() {
    let text = "declare -A m; for i in {1..2000}; do m[$i]=$((i*i)); done; trap 'echo trapped' USR1; echo ready; \
                for ((j = 0; j < 300000; j++)); do :; done; kill -USR1 $$; echo ${m[1999]} $j; exit 9";
    for way in WAYS {
        let mut c = Command::new("/bin/bash");
        c.args(["-c", text]);
        goes_on(c, way, "ready", 9, "trapped\n3996001 300000\n");
    }
}

/// Everything that /proc shows of it is as it was.
#[test]
fn nothing_of_the_resume_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut command = Command::new(common::compile("counter", dir));
    command.args(["8", "1000000"]);
    let mut target = common::start(command, &dir.join("out"), "ready");
    let pid = target.id() as i32;
    let look = || {
        let maps = snapshot::proc::maps(pid).unwrap();
        let link = |n| snapshot::proc::link(pid, n).unwrap();
        let cmdline = snapshot::proc::read_bytes(pid, "cmdline").unwrap();
        let limits = snapshot::proc::read_bytes(pid, "limits").unwrap();
        let s = snapshot::proc::stat(pid).unwrap();
        let mut fds: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|e| {
                e.unwrap()
                    .file_name()
                    .into_string()
                    .unwrap()
                    .parse::<i32>()
                    .unwrap()
            })
            .filter(|f| *f < 3)
            .collect();
        fds.sort();
        let u = snapshot::proc::status(pid).unwrap();
        (
            (maps, link("exe"), link("cwd"), cmdline, limits, fds),
            (s.comm, s.sid, s.layout),
            (
                u.uid, u.gid, u.groups, u.caps, u.blocked, u.ignored, u.umask,
            ),
        )
    };
    let before = look();
    common::capture(&mut target, dir);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    let (code, _, err) = common::resume(dir, &["--eager", "--detach"]);
    assert_eq!(code, 0, "{err}");
    let after = look();
    let _ = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    );
    for (a, b) in before.0.0.iter().zip(&after.0.0) {
        assert_eq!(a, b);
    }
    assert_eq!(before.0.1, after.0.1);
    assert_eq!(before.0.3, after.0.3);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert_eq!(text(&before.0.4), text(&after.0.4));
    assert_eq!(before.0.5, after.0.5);
    assert_eq!(before.1, after.1);
    assert_eq!(before.2, after.2);
    assert_eq!(before, after);
}
