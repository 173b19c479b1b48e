//! Taking a snapshot: what may be taken ([`plan`]), what there is beside memory and open files ([`state`], [`ranges`]), and
//! the order of events.

mod directory;
mod exits;
mod guardian;
pub mod hold;
pub mod host;
pub mod plan;
pub mod ranges;
pub mod run;
pub mod state;
pub mod threads;
pub mod userfault;

use nix::errno::Errno;
use std::path::PathBuf;

/// Taking a snapshot failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something in it cannot be captured. Nothing was disturbed.
    #[error("this cannot be captured:\n{}", plan::lines(.0))]
    Refused(Vec<plan::Refusal>),
    /// The target could not be driven.
    #[error(transparent)]
    Target(#[from] crate::target::Error),
    /// Reading /proc failed.
    #[error(transparent)]
    Proc(#[from] crate::proc::Error),
    /// A call that was made in the target's name failed.
    #[error("process {0}: {1} made in its name failed")]
    Call(i32, &'static str, #[source] Errno),
    /// A descriptor could not be fetched from the target.
    #[error("cannot fetch descriptor {1} of process {0}")]
    Fetch(i32, i32, #[source] Errno),
    /// The userfaultfd could not be made.
    #[error("process {0}: no userfaultfd: {1}")]
    NoUserfault(i32, &'static str),
    /// It changed its processes again and again.
    #[error(
        "the process tree of {0} changed while it was being stopped, {1} times; try again when it is calmer"
    )]
    Restless(i32, u32),
    /// A mapping's backing is gone.
    #[error("process {0}: {1} at {2:#x} cannot be read")]
    Mapping(i32, PathBuf, u64, #[source] std::io::Error),
    /// There is something at that name.
    #[error("{0} exists: choose another name, or remove it")]
    Exists(PathBuf),
    /// The directory could not be made.
    #[error("cannot make the directory {0}")]
    Directory(PathBuf, #[source] std::io::Error),
    /// The guardian could not be started.
    #[error("cannot start {0} as the guardian of the target")]
    Guardian(PathBuf, #[source] std::io::Error),
    /// Open files.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    /// The snapshot's own files.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
}
