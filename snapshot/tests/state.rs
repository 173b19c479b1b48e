//! What is read of a process beside its memory and files.

mod common;

use snapshot::capture::threads::Known;
use snapshot::capture::{plan, state, userfault};
use snapshot::proc;
use snapshot::sys::remote;
use snapshot::target::journal::Journal;
use snapshot::target::{Driver, Stopped};
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

const PROGRAM: &str = r#"
import sys, os, signal, threading, time, ctypes
if sys.argv[1] == "nobody":
    os.setgid(65534); os.setgroups([]); os.setuid(65534)
os.umask(0o027)
libc = ctypes.CDLL(None)
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
signal.setitimer(signal.ITIMER_REAL, 1000, 7)
signal.signal(signal.SIGALRM, lambda *a: None)
tid = ctypes.c_int()
class SigEvent(ctypes.Structure):
    _fields_ = [("value", ctypes.c_long), ("signo", ctypes.c_int), ("notify", ctypes.c_int), ("pad", ctypes.c_int * 12)]
ev = SigEvent(0x1234, signal.SIGUSR1, 0)
assert libc.timer_create(1, ctypes.byref(ev), ctypes.byref(tid)) == 0
class Spec(ctypes.Structure):
    _fields_ = [("is_", ctypes.c_long), ("in_", ctypes.c_long), ("vs", ctypes.c_long), ("vn", ctypes.c_long)]
sp = Spec(3, 5, 900, 0)
assert libc.timer_settime(ctypes.c_void_p(tid.value), 0, ctypes.byref(sp), None) == 0 or True
for _ in range(3):
    threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
os.kill(os.getpid(), signal.SIGUSR2)
print("ready", flush=True)
time.sleep(1000)
"#;

struct Target(Child);

impl Target {
    fn new(user: &str) -> Self {
        let mut command = Command::new("python3");
        let (target, line) = Self::start(command.args(["-c", PROGRAM, user]));
        assert_eq!(line, "ready\n");
        target
    }

    /// And its first line.
    fn start(command: &mut Command) -> (Self, String) {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        (Self(child), line)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn check(user: &str, uid: u32) {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::new(user);
    let pid = target.pid();
    let planned = plan::plan(pid, false).unwrap().0.remove(0);
    let before = planned.before.unwrap();
    let maps = proc::maps(pid).unwrap();
    let mut journal = Journal::create(dir.path(), pid, planned.start_time).unwrap();
    let pidfd = remote::pidfd_open(pid).unwrap();
    let stopped = Stopped::one(pid, pid).unwrap();
    let mut driver = Driver::enter(&stopped, &[pid], &mut journal, None).unwrap();
    let foothold = driver
        .settle(before.scratch_len(planned.threads, planned.timers))
        .unwrap();
    let fds = std::fs::read_dir(proc::path(pid, "fd")).unwrap().count();
    let uffd = userfault::create(pid, pidfd.as_fd(), &mut driver).unwrap();
    assert_eq!(
        std::fs::read_dir(proc::path(pid, "fd")).unwrap().count(),
        fds
    );
    let link = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&uffd)
    ))
    .unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    driver.leave().unwrap();
    stopped.release();

    let stopped = Stopped::all(pid).unwrap();
    let threads = state::Threads::read(&stopped, &before).unwrap();
    let mut driver =
        Driver::enter(&stopped, stopped.threads(), &mut journal, Some(foothold)).unwrap();
    let asked = state::ask(&mut driver, &before, threads, &HashMap::new()).unwrap();
    let (mut p, _, xstates) = state::put_together(&mut driver, &before, asked, &stopped).unwrap();
    xstates.put(&mut p);
    driver.unsettle().unwrap();
    stopped.release();
    assert_eq!(proc::maps(pid).unwrap(), maps);

    assert_eq!((p.pid, p.credentials.uid, p.umask), (pid, [uid; 4], 0o027));
    assert_eq!(p.threads.len(), 4);
    let action = |n| p.actions.iter().find(|a| a.signal == n);
    assert!(action(libc::SIGUSR1).unwrap().handler > 1);
    assert_eq!(action(libc::SIGHUP).unwrap().handler, 1);
    assert!(action(libc::SIGUSR2).is_none());
    assert_eq!(p.itimers[0].0, 7_000_000);
    assert!(
        p.itimers[0].1 > 900_000_000 && p.itimers[0].1 <= 1_000_000_000,
        "{:?}",
        p.itimers
    );
    let t = &p.timers[0];
    assert_eq!(
        (t.clock, t.signal, t.value, t.notify),
        (1, libc::SIGUSR1, 0x1234, libc::SIGEV_SIGNAL)
    );
    assert_eq!(t.interval_ns, 3_000_000_005);
    assert!(t.left_ns > 800_000_000_000 && t.left_ns <= 900_000_000_000);
    assert_eq!(p.pending.len() + p.threads[0].pending.len(), 1);
    assert!(
        p.threads
            .iter()
            .all(|t| t.sigmask & (1 << (libc::SIGUSR2 - 1)) != 0)
    );
    assert!(
        p.threads.iter().all(|t| t.clear_child_tid != 0
            && t.rseq.0 != 0
            && t.robust.0 != 0
            && t.regs.len() == 27)
    );
}

#[test]
fn of_root() {
    check("root", 0);
}

#[test]
fn of_nobody() {
    check("nobody", 65534);
}

/// What a thread told before the stop counts in it if it made no call that could have changed it. The one that took signals
/// and the one that ended count as changed; the one that changed its stack is asked again, and so told right.
#[test]
fn what_threads_told_before_the_stop_holds_or_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(common::compile("altstacks", dir.path()));
    let (target, line) = Target::start(&mut command);
    let pid = target.pid();
    let tids: Vec<i32> = line.split_whitespace().flat_map(str::parse).collect();
    let planned = plan::plan(pid, false).unwrap().0.remove(0);
    let mut before = planned.before.unwrap();
    let mut journal = Journal::create(dir.path(), pid, planned.start_time).unwrap();
    let stopped = Stopped::one(pid, pid).unwrap();
    let mut driver = Driver::enter(&stopped, &[pid], &mut journal, None).unwrap();
    let foothold = driver
        .settle(before.scratch_len(planned.threads, planned.timers))
        .unwrap();
    driver.leave().unwrap();
    stopped.release();

    let (known, hot) = Known::look(pid, &mut before, &mut journal, foothold).unwrap();
    assert!(hot.len() >= 8, "{hot:x?}");
    let signal = nix::sys::signal::Signal::SIGUSR2;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    let ended = || !proc::threads(pid).unwrap().contains(&tids[3]);
    while !ended() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // Each of the others has gone round some times.
    std::thread::sleep(std::time::Duration::from_millis(50));

    let stopped = Stopped::all(pid).unwrap();
    let still = known.still();
    let told: Vec<i32> = still.keys().copied().collect();
    assert_eq!(told, [tids[0]]);
    let ask = |journal: &mut Journal, known: &HashMap<i32, _>| {
        let threads = state::Threads::read(&stopped, &before).unwrap();
        let all = stopped.threads().iter().copied();
        let silent: Vec<i32> = all.filter(|t| !known.contains_key(t)).collect();
        let mut driver = Driver::enter(&stopped, &silent, journal, Some(foothold)).unwrap();
        let asked = state::ask(&mut driver, &before, threads, known).unwrap();
        let p = state::put_together(&mut driver, &before, asked, &stopped).unwrap();
        driver.leave().unwrap();
        let own = |t: &snapshot::image::manifest::Thread| (t.tid, t.altstack, t.clear_child_tid);
        p.0.threads.iter().map(own).collect::<Vec<_>>()
    };
    let all = ask(&mut journal, &HashMap::new());
    assert_eq!(ask(&mut journal, &still), all);
    assert!(all.iter().all(|t| t.2 != 0), "{all:?}");
    let size = |tid| all.iter().find(|t| t.0 == tid).unwrap().1.2;
    assert_eq!((size(tids[0]), size(tids[2])), (64 << 10, 64 << 10));
    assert!(size(tids[1]) > 64 << 10, "{all:?}");
    let driver = Driver::enter(&stopped, &[pid], &mut journal, Some(foothold)).unwrap();
    driver.unsettle().unwrap();
    stopped.release();
}

#[test]
fn refusals_come_in_one_list() {
    let target = Target::new("root");
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    // A parent with a child, asked for without its tree: this test itself.
    let own = std::process::id().cast_signed();
    let error = plan::lines(&plan::plan(own, false).unwrap().1);
    assert!(
        error.contains("--tree") && error.contains("cannot capture itself"),
        "{error}"
    );
    assert_eq!(plan::plan(target.pid(), true).unwrap().1, []);
    let _ = child.kill();
    let _ = child.wait();
}
