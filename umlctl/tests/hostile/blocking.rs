//! A target that sits in a system call: the snapshot, and the kill and resume, do with it what signal(7) says.

use crate::common::*;
use std::process::Stdio;

/// What a call may do that is stopped by no signal.
#[derive(Debug, Clone, Copy, PartialEq)]
enum May {
    /// Nothing is seen of it.
    GoOn,
    /// EINTR is allowed: signal(7), "Interruption of system calls and library functions by stop signals".
    Eintr,
    /// What ends it is a signal, and then EINTR is what it must give.
    UntilSignal,
}
use May::*;

/// Name, the system call's number, what it may do.
const CALLS: [(&str, i64, May); 35] = [
    ("nanosleep", libc::SYS_clock_nanosleep, GoOn),
    ("clock_nanosleep", libc::SYS_clock_nanosleep, GoOn),
    ("poll", libc::SYS_poll, GoOn),
    ("poll-timeout", libc::SYS_poll, GoOn),
    ("ppoll", libc::SYS_ppoll, GoOn),
    ("ppoll-signal", libc::SYS_ppoll, UntilSignal),
    ("select", libc::SYS_pselect6, GoOn),
    ("pselect6", libc::SYS_pselect6, GoOn),
    ("epoll_wait", libc::SYS_epoll_wait, GoOn),
    ("epoll_wait-timeout", libc::SYS_epoll_wait, Eintr),
    ("epoll_pwait", libc::SYS_epoll_pwait, GoOn),
    ("epoll_pwait-signal", libc::SYS_epoll_pwait, UntilSignal),
    ("read-pipe", libc::SYS_read, GoOn),
    ("read-signal", libc::SYS_read, UntilSignal),
    ("read-socket", libc::SYS_read, GoOn),
    ("read-tty", libc::SYS_read, GoOn),
    ("read-inotify", libc::SYS_read, Eintr),
    ("read-eventfd", libc::SYS_read, GoOn),
    ("read-timerfd", libc::SYS_read, GoOn),
    ("write-pipe", libc::SYS_write, GoOn),
    ("recvmsg", libc::SYS_recvmsg, GoOn),
    ("recvmsg-timeout", libc::SYS_recvmsg, Eintr),
    ("accept", libc::SYS_accept, GoOn),
    ("futex", libc::SYS_futex, GoOn),
    ("futex-timeout", libc::SYS_futex, GoOn),
    ("semop", libc::SYS_semtimedop, GoOn),
    ("semtimedop", libc::SYS_semtimedop, Eintr),
    ("msgrcv", libc::SYS_msgrcv, GoOn),
    ("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, GoOn),
    ("rt_sigtimedwait-timeout", libc::SYS_rt_sigtimedwait, Eintr),
    ("sigsuspend", libc::SYS_rt_sigsuspend, UntilSignal),
    ("pause", libc::SYS_pause, UntilSignal),
    ("wait4", libc::SYS_wait4, GoOn),
    ("flock", libc::SYS_flock, GoOn),
    ("fcntl", libc::SYS_fcntl, GoOn),
];

fn sits(pid: i32, nr: i64) -> bool {
    // A call that the kernel has made again as restart_syscall(2) has that number.
    std::fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|s| {
        let n = s.split_whitespace().next().unwrap_or_default().to_owned();
        [nr.to_string(), libc::SYS_restart_syscall.to_string()].contains(&n)
    })
}

fn one(name: &str, nr: i64, may: May, resume: bool) -> Result<(), String> {
    let mut t = Target::start(&["block", name]);
    let full = name.ends_with("sleep")
        || name == "poll-timeout"
        || name == "futex-timeout"
        || name == "pselect6";
    until(name, || sits(t.pid, nr) || t.status()[0] == 2);
    let tree = if name == "wait4" {
        &["--tree"][..]
    } else {
        &[]
    };
    let snapshots = if resume { 1 } else { 3 };
    for i in 0..snapshots {
        let mut c = t.snapshot(&format!("s{i}"));
        c.args(tree);
        if resume {
            c.arg("--kill");
        }
        let (status, _, err) = run(c);
        if !status.success() {
            return Err(format!("{name}: no snapshot: {err}"));
        }
    }
    if resume {
        until("its end", || t.child.try_wait().unwrap().is_some());
        let mut c = umlctl();
        c.args(["resume", "--detach"]).arg(t.dir.path().join("s0"));
        let (status, _, err) = run(c.stdin_null());
        if !status.success() {
            return Err(format!("{name}: no resume: {err}"));
        }
    }
    if may != Eintr && !full && name != "read-timerfd" {
        until(&format!("{name}: it sits again"), || {
            sits(t.pid, nr) || t.status()[0] == 2
        });
        let s = t.status();
        if s[0] == 2 {
            return Err(format!(
                "{name}: it has ended with {} {}",
                s[1] as i64, s[2]
            ));
        }
    }
    std::fs::write(t.dir.path().join("go"), "").unwrap();
    until(&format!("{name}: its end"), || t.status()[0] == 2);
    let s = t.status();
    let (r, e) = (s[1] as i64, s[2] as i32);
    let right = match may {
        UntilSignal => r == -1 && e == libc::EINTR,
        Eintr => r >= 0 || e == libc::EINTR,
        GoOn if name == "futex-timeout" => r == -1 && e == libc::ETIMEDOUT && s[3] == 1,
        GoOn => r >= 0 && (!full || s[3] == 1),
    };
    if right {
        Ok(())
    } else {
        Err(format!("{name}: {r}, errno {e}, {}", s[3]))
    }
}

trait Quiet {
    fn stdin_null(self) -> Self;
}

impl Quiet for std::process::Command {
    fn stdin_null(mut self) -> Self {
        self.stdin(Stdio::null());
        self
    }
}

fn table(resume: bool) -> Vec<String> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let wrong = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while let Some(&(name, nr, may)) =
                    CALLS.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    let r = std::panic::catch_unwind(|| one(name, nr, may, resume));
                    match r.unwrap_or_else(|_| Err(format!("{name}: panicked"))) {
                        Ok(()) => {}
                        Err(e) => wrong.lock().unwrap().push(e),
                    }
                }
            });
        }
    });
    wrong.into_inner().unwrap()
}

#[test]
fn a_snapshot_is_not_seen() {
    let wrong = table(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_resume_goes_on() {
    let wrong = table(true);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
