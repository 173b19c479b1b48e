//! The pager: a process that fills a resumed process's memory, first where it is touched, then all the rest; and its
//! standby, which goes on when the pager dies. `docs/snapshot.md`, section 5.
//!
//! Both share the table of descriptors (so that what one is given, also in the middle of a call, the other has) and the
//! log of what the process gave up. All else is made from the log again.

mod serve;
mod state;

use super::memory::lazy_ranges;
use super::source::PageSource;
use super::{Error, Plan, sys};
use crate::sys::clone::{Fork, close_range, exit_now, fork};
use crate::sys::log::Log;
use crate::sys::{ptrace, remote};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serve::Pager;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

/// Messages that are remembered: 64 bytes each, and none of it is used before it is needed.
const LOG: usize = 32 << 20;

/// Starts pager and standby; the number of the pager. `memories` are the userfaultfds by address space.
pub fn spawn(
    plan: &Plan<'_>,
    source: &dyn PageSource,
    memories: Vec<(u32, OwnedFd)>,
) -> Result<i32, Error> {
    let log = Log::new(LOG).map_err(sys("mapping the pager's log"))?;
    // No signal at its end, and none of the caller's handlers.
    match fork(crate::sys::clone::CLEAR_SIGHAND, 0, None).map_err(sys("clone3"))? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            let run = std::panic::AssertUnwindSafe(|| {
                let first: Vec<(u32, i32)> = memories
                    .into_iter()
                    .map(|(space, fd)| (space, fd.into_raw_fd()))
                    .collect();
                let ranges = |space: u32| lazy_ranges(&plan.manifest.spaces[space as usize]);
                settle(source, &first);
                let start = || Pager::new(&log, source, &first, ranges);
                live(&log, start);
            });
            let _ = std::panic::catch_unwind(run);
            exit_now(1)
        }
    }
}

/// Leaves the caller's session and descriptors.
fn settle(source: &dyn PageSource, memories: &[(u32, i32)]) {
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
        std::mem::forget(null);
    }
    let mut keep: Vec<i32> = source.files().iter().map(AsRawFd::as_raw_fd).collect();
    keep.extend(memories.iter().map(|m| m.1));
    keep.sort_unstable();
    let mut at = 3;
    for fd in keep {
        let _ = close_range(at, fd);
        at = at.max(fd + 1);
    }
    let _ = close_range(at, i32::MAX);
}

/// Pages until all is done; makes a standby first, and again whenever it is gone.
fn live<'a>(log: &'a Log, start: impl Fn() -> Pager<'a>) -> ! {
    loop {
        name(c"umlctl-pager");
        let own = remote::pidfd_open(std::process::id() as i32);
        let mut standby = own.as_ref().ok().and_then(make_standby);
        if standby == Some(0) {
            let Ok(pager) = own else { exit_now(1) };
            stand_by(log, pager);
            continue;
        }
        let mut pager = start();
        pager.take_over();
        let mut round = 0u32;
        let mut again = false;
        while pager.step() {
            round = round.wrapping_add(1);
            if round.is_multiple_of(64)
                && let (Some(pid), Ok(own)) = (standby, &own)
                && matches!(ptrace::wait(pid, false), Ok(Some(_)) | Err(_))
            {
                standby = make_standby(own);
                if standby == Some(0) {
                    again = true;
                    break;
                }
            }
        }
        if again {
            let Ok(pager) = own else { exit_now(1) };
            stand_by(log, pager);
            continue;
        }
        // The standby ends first, so that this is the last to hold the descriptors.
        log.set_done();
        exit_now(0)
    }
}

/// `Some(0)` in the standby.
fn make_standby(_own: &OwnedFd) -> Option<i32> {
    match fork(libc::CLONE_FILES as u64, 0, None) {
        Ok(Fork::Child) => Some(0),
        Ok(Fork::Parent(pid)) => Some(pid),
        Err(_) => None,
    }
}

/// Waits for the pager's end; comes back if there is something left to do.
fn stand_by(log: &Log, pager: OwnedFd) {
    name(c"umlctl-standby");
    loop {
        let mut fds = [PollFd::new(pager.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::NONE).is_ok() {
            break;
        }
    }
    if log.done() {
        exit_now(0);
    }
    // Closes it in the one table there is; the pager is dead.
    drop(pager);
}

fn name(name: &std::ffi::CStr) {
    let _ = nix::sys::prctl::set_name(name);
}
