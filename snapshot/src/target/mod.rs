//! A running process under our control: it is stopped, its registers are read, calls are made in its name. What a death
//! of ours leaves at each step, and who repairs it, is in `docs/snapshot.md`, section 3.

pub mod batch;
pub mod driver;
pub mod guardian;
pub mod journal;
pub mod stop;

pub use batch::Batch;
pub use driver::Driver;
pub use stop::Stopped;

use nix::errno::Errno;
use std::path::PathBuf;

/// Driving a process failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process or thread ended.
    #[error("process {0} ended meanwhile")]
    Ended(i32),
    /// Another tracer is attached.
    #[error("process {0} is traced by process {1} already: end strace, gdb or what else traces it")]
    Traced(i32, i32),
    /// We may not attach.
    #[error("no permission to attach to process {0}: run as root (CAP_SYS_PTRACE)")]
    Permission(i32),
    /// A thread did not stop.
    #[error(
        "thread {0} did not stop within {1} ms: it waits in the kernel ({2}), where it cannot be interrupted; try again"
    )]
    Busy(i32, u64, String),
    /// A ptrace request failed.
    #[error("{1} on thread {0} failed")]
    Ptrace(i32, &'static str, #[source] Errno),
    /// Its memory could not be read or written.
    #[error("cannot {1} memory of process {0} at {2:#x}")]
    Memory(i32, &'static str, u64, #[source] Errno),
    /// A call that was made in its name failed.
    #[error("process {0}: {1} made in its name failed")]
    Call(i32, &'static str, #[source] Errno),
    /// It has no vdso to put the loop into.
    #[error(
        "process {0} has no vdso with room to spare: it was started with vdso=0 or has unmapped it"
    )]
    NoVdso(i32),
    /// An earlier death of a saver left it to be repaired.
    #[error(
        "process {0} was left in the middle of a snapshot: run `umlctl rescue --pid {0}` first"
    )]
    NeedsRescue(i32),
    /// Another program is at it.
    #[error("process {0}: another umlctl is taking a snapshot of it: wait for that one to end")]
    InUse(i32),
    /// What was put into it is no longer there.
    #[error(
        "process {0} has started another program meanwhile (execve): take the snapshot of that one"
    )]
    Changed(i32),
    /// The journal could not be used.
    #[error("cannot use the journal {0}")]
    Journal(PathBuf, #[source] std::io::Error),
    /// The journal is not one of ours, or damaged.
    #[error("the journal {0} is damaged ({1}); if its process runs well, remove the file")]
    BadJournal(PathBuf, &'static str),
    /// Reading /proc failed.
    #[error(transparent)]
    Proc(#[from] crate::proc::Error),
}
