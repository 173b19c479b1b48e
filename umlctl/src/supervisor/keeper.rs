//! Process 1 of a VM's pid namespace. If it ends, for whatever reason, the kernel kills everything in the namespace, in one
//! step; and it ends when the supervisor does, or main.

use super::start::{MainFds, Start};
use super::{Error, system};
use crate::sys::fd::{MESSAGE, close_except, messages, receive, send};
use crate::vm::cmdline::PRIVATE;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use snapshot::sys::clone::{self, Fork};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// What the keeper is to set up.
#[derive(Debug)]
pub struct Plan<S> {
    /// How main comes to be.
    pub start: S,
    /// Main's descriptors.
    pub fds: MainFds,
    /// The VM's network namespace; none: an empty one of its own.
    pub netns: Option<OwnedFd>,
    /// How much the private file system may hold.
    pub private_bytes: u64,
    /// Paths that main needs; mounts without any of them are let go.
    pub needed: Vec<PathBuf>,
    /// The VM's lock, which the keeper holds, too: as long as anything of the VM runs.
    pub lock: RawFd,
}

/// A keeper with a running main.
#[derive(Debug)]
pub struct Keeper {
    /// Its number, in our namespace. Our child, to be reaped.
    pub pid: Pid,
    /// Main.
    pub main: OwnedFd,
    /// Main's number in our namespace.
    pub main_pid: Pid,
    /// Kept open: how the keeper tells that we are there.
    _channel: OwnedFd,
}

/// Forks a keeper and waits until main runs; `forked` is called in between, and may start threads. The calling process must have one thread, and that thread must be the one that
/// stays: the keeper dies with it.
///
/// # Errors
/// Main could not be started. Then the keeper is gone.
pub fn launch<S: Start>(
    plan: Plan<S>,
    forked: impl FnOnce(Pid) -> Result<(), Error>,
) -> Result<Keeper, Error> {
    let (ours, theirs) = messages().map_err(system("make a socket pair"))?;
    let flags = (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64;
    match clone::fork(flags, libc::SIGCHLD, None).map_err(system("make a pid namespace"))? {
        Fork::Child => {
            drop(ours);
            let code = keep(plan, &theirs);
            clone::exit_now(code);
        }
        Fork::Parent(pid) => {
            drop((theirs, plan));
            let pid = Pid::from_raw(pid);
            forked(pid)
                .and_then(|()| hear(&ours))
                .map(|(main, main_pid)| Keeper {
                    pid,
                    main,
                    main_pid,
                    _channel: ours,
                })
                .inspect_err(|_| end(pid))
        }
    }
}

impl Keeper {
    /// Ends it, and with it main and all that is main's.
    pub fn end(self) {
        end(self.pid);
    }
}

fn end(pid: Pid) {
    let _ = kill(pid, Signal::SIGKILL);
    let _ = waitpid(pid, None);
}

/// The keeper's one message: main's pidfd, or why there is none.
fn hear(channel: &OwnedFd) -> Result<(OwnedFd, Pid), Error> {
    let (text, main) = receive(channel).map_err(system("hear from the keeper"))?;
    match main {
        Some(main) => {
            let pid = pidfd_number(main.as_fd())
                .ok_or_else(|| Error::Start("it has ended at once".into()))?;
            // Its number is known: now it may be reaped.
            send(channel, b"+", None).map_err(system("answer the keeper"))?;
            Ok((main, pid))
        }
        None if text.is_empty() => Err(Error::Start("its keeper has ended".into())),
        None => Err(Error::Start(String::from_utf8_lossy(&text).into_owned())),
    }
}

/// Whose pidfd it is, in the namespace of our /proc.
fn pidfd_number(fd: BorrowedFd<'_>) -> Option<Pid> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let number = info.lines().find_map(|l| l.strip_prefix("Pid:"))?;
    let number = number.trim().parse().ok()?;
    (number > 0).then(|| Pid::from_raw(number))
}

/// Whether the supervisor is gone: its end of the channel is closed.
fn orphaned(channel: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::empty())];
    !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// The keeper's life. Returns its exit status: main's, as a shell has it.
fn keep<S: Start>(plan: Plan<S>, channel: &OwnedFd) -> i32 {
    // From here on the supervisor's end is ours. Had it ended before, nobody would tell us: hence the second look.
    if set_pdeathsig(Signal::SIGKILL).is_err() || orphaned(channel) {
        return 1;
    }
    let Plan {
        start,
        fds,
        netns,
        private_bytes,
        needed,
        lock,
    } = plan;
    let mut kept: Vec<RawFd> = fds.numbers().iter().map(|n| n.0).collect();
    kept.extend([channel.as_raw_fd(), lock]);
    kept.extend(start.descriptors());
    kept.extend(netns.as_ref().map(AsRawFd::as_raw_fd));
    close_except(&kept);
    let main = prepare(netns, private_bytes, &needed).and_then(|()| start.start(fds));
    let main = main.and_then(|pid| {
        let pidfd = snapshot::sys::remote::pidfd_open(pid.as_raw())
            .map_err(|e| format!("cannot open the guest's kernel: {e}"))?;
        Ok((pid, pidfd))
    });
    let said = match &main {
        Ok((_, pidfd)) => send(channel, b"+", Some(pidfd.as_raw_fd())),
        Err(message) => send(
            channel,
            &message.as_bytes()[..message.len().min(MESSAGE)],
            None,
        ),
    };
    match (main, said) {
        (Ok((main, _)), Ok(())) => {
            // One that has ended at once has a number only until it is reaped.
            let _ = receive(channel);
            reap(main)
        }
        _ => 1,
    }
}

/// Reaps all, and when main ends kills what is left at once: a user process of the guest whose tracer is gone would run on
/// as a process of the host. So this comes before all others when it has something to do, which is hardly ever.
fn reap(main: Pid) -> i32 {
    snapshot::sys::sched::prefer_this_thread();
    loop {
        let code = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == main => code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => 128 + signal as i32,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => 1,
        };
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        return code;
    }
}

/// Namespaces, mounts, signals: what main finds.
fn prepare(netns: Option<OwnedFd>, private_bytes: u64, needed: &[PathBuf]) -> Result<(), String> {
    let say = |what: &'static str| move |e: Errno| format!("{what}: {}", e.desc());
    // What the supervisor ignores and blocks main must not.
    SigSet::empty()
        .thread_set_mask()
        .map_err(say("cannot unblock signals"))?;
    for signal in [
        Signal::SIGPIPE,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        default(signal).map_err(say("cannot reset signals"))?;
    }
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(say("cannot forbid core dumps"))?;
    match netns {
        Some(ns) => setns(ns, CloneFlags::CLONE_NEWNET)
            .map_err(say("cannot enter the network namespace"))?,
        None => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(say("cannot make a network namespace"))?
        }
    }
    let none: Option<&str> = None;
    super::mounts::leave_behind(needed).map_err(say("cannot detach the mounts"))?;
    // Memory of the guest: not on a disk, not on a /dev/shm that may be small or noexec, and gone with the namespace.
    let options = format!("mode=0700,size={private_bytes}");
    mount(
        Some("umlctl"),
        PRIVATE,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )
    .map_err(say("cannot mount a tmpfs for the guest's memory"))?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)
        .map_err(say("cannot mount /proc"))
}

fn default(signal: Signal) -> Result<(), Errno> {
    crate::sys::signal::set(signal, SigHandler::SigDfl)
}
