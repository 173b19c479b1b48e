//! What a child must do before it becomes another program.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

/// The child begins with no signal blocked, whatever its parent waits for: a service that could not be stopped by SIGTERM
/// would outlive its upgrade.
pub(super) fn unblock_signals(command: &mut Command) {
    let none = SigSet::empty();
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed: it makes one
    // system call (sigprocmask) on a value that was made before, and neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&none), None).map_err(Into::into)
        });
    }
}
