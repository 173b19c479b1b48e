//! User Mode Linux machines: capture of one that runs, with a short stop, and its rebuilding. `docs/uml.md` has the
//! anatomy of such a machine, the point at which it is stopped, the bytes on disk, and what a death at each step leaves.

mod calls;
pub mod capture;
pub mod clock;
mod freeze;
pub mod image;
mod layout;
mod learn;
pub mod manifest;
pub mod rebuild;
mod tracker;
mod users;

use nix::errno::Errno;
use std::path::PathBuf;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Taking or rebuilding a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host process of the machine ended.
    #[error("host process {0} of the machine ended meanwhile")]
    Ended(i32),
    /// It did not come to a point at which it can be captured.
    #[error(
        "the machine did not come to rest within {0} s: its kernel is busy in one system call; try again"
    )]
    Busy(u64),
    /// Its kernel process is not what is expected.
    #[error("process {0} is no User Mode Linux kernel that can be captured: {1}")]
    Foreign(i32, String),
    /// A ptrace request failed.
    #[error("{1} on process {0} failed")]
    Ptrace(i32, &'static str, #[source] Errno),
    /// A call made in the kernel process's name failed.
    #[error("{1} made in the name of process {0} failed")]
    Call(i32, &'static str, #[source] Errno),
    /// Memory of a process could not be read or written.
    #[error("cannot reach memory of process {0} at {1:#x}")]
    Memory(i32, u64, #[source] Errno),
    /// A system call of ours.
    #[error("{0} failed")]
    Sys(&'static str, #[source] Errno),
    /// A file of the snapshot.
    #[error("cannot {1} {path}", path = .0.display())]
    Io(PathBuf, &'static str, #[source] std::io::Error),
    /// A file of the snapshot is not what was written.
    #[error("{path} is damaged: {1}; take another snapshot, or restore this one from a copy", path = .0.display())]
    Damaged(PathBuf, String),
    /// A newer program wrote it.
    #[error("{path} has format {1}, and this program knows formats up to {2}: use a newer umlctl", path = .0.display())]
    Newer(PathBuf, u32, u32),
    /// This host cannot run it.
    #[error("this host cannot run the snapshot: {0}")]
    Host(String),
    /// The open files.
    #[error("open files of the machine")]
    Files(#[from] crate::files::Error),
    /// Reading `/proc` failed.
    #[error(transparent)]
    Proc(#[from] crate::proc::Error),
    /// What is common with other processes.
    #[error(transparent)]
    Resume(#[from] crate::resume::Error),
    /// The rebuilt machine did not come up.
    #[error("the machine was not rebuilt: {0}")]
    Rebuild(String),
    /// The caller's part of a capture failed.
    #[error("{0}")]
    Caller(String),
}

/// An error with what it came of, in one line.
fn text(e: &dyn std::error::Error) -> String {
    crate::resume::text(e)
}

/// A ptrace request that failed; a process that is gone has ended.
fn traced(pid: i32, what: &'static str) -> impl Fn(Errno) -> Error {
    move |e| match e {
        Errno::ESRCH => Error::Ended(pid),
        e => Error::Ptrace(pid, what, e),
    }
}
