//! What can go wrong while memory is saved. The target is unharmed by all of it.

use std::io;

/// Memory could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of /proc cannot be opened.
    #[error("process {pid}: cannot open its {what}; it may have ended, or root is needed")]
    Open {
        /// Whose.
        pid: i32,
        /// Which file.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// userfaultfd(2) refuses.
    #[error(
        "process {pid}: userfaultfd: cannot {what} {start:#x}..{end:#x}; copy it while it is stopped instead"
    )]
    Uffd {
        /// Whose.
        pid: i32,
        /// What was asked.
        what: &'static str,
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// The kernel's reason.
        source: nix::Error,
    },
    /// Memory that must be there cannot be read.
    #[error("process {pid}: cannot read its memory at {address:#x}; the snapshot is given up")]
    Read {
        /// Whose.
        pid: i32,
        /// Where.
        address: u64,
        /// Why not.
        source: io::Error,
    },
    /// The process has ended.
    #[error("process {pid} has ended while its memory was saved; the snapshot is given up")]
    Gone {
        /// Which.
        pid: i32,
    },
    /// The step before has not been taken.
    #[error("process {pid}: {what}")]
    Order {
        /// Which.
        pid: i32,
        /// What was missing.
        what: &'static str,
    },
    /// The snapshot's files.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
}
