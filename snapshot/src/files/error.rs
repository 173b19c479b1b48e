//! What can go wrong with open files.

use std::fmt;
use std::io;

/// One object that cannot be captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whose it is.
    pub pid: i32,
    /// The descriptor and what it is.
    pub object: String,
    /// Why not.
    pub reason: String,
    /// What the user can do.
    pub advice: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "process {}, {}: {}; {}",
            self.pid, self.object, self.reason, self.advice
        )
    }
}

/// An error of capturing or restoring open files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Objects that cannot be captured: all that were found.
    #[error("{} open files cannot be captured:\n{}", .0.len(), lines(.0))]
    Refused(Vec<Refusal>),
    /// The kernel did not answer about a process's files.
    #[error("cannot read the open files of process {pid} ({what}); is it still running?")]
    Read {
        /// Which process.
        pid: i32,
        /// What was read.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A file could not be saved in the snapshot.
    #[error("cannot save a copy in {path}; free space there or take the snapshot elsewhere")]
    Save {
        /// Where to.
        path: std::path::PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file could not be made again.
    #[error("open file {file} cannot be made again: {what}")]
    Restore {
        /// Its number in the manifest.
        file: usize,
        /// What was tried, and what to do.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The world has changed since the snapshot.
    #[error("open file {file} cannot be made again: {what}")]
    Changed {
        /// Its number in the manifest.
        file: usize,
        /// What has changed, and what to do.
        what: String,
    },
    /// The manifest says something impossible.
    #[error("the manifest is damaged: open file {file}: {what}")]
    Damaged {
        /// Its number in the manifest.
        file: usize,
        /// What is wrong.
        what: String,
    },
    /// A descriptor could not be put in its place.
    #[error(
        "descriptor {fd} cannot be put in its place; is the limit of open files (ulimit -n) as it was?"
    )]
    Install {
        /// Its number.
        fd: i32,
        /// Why not.
        source: io::Error,
    },
}

fn lines(list: &[Refusal]) -> String {
    list.iter()
        .map(|refusal| format!("  {refusal}"))
        .collect::<Vec<_>>()
        .join("\n")
}

impl Error {
    pub(super) fn restore(file: usize, what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Restore { file, what, source }
    }

    pub(super) fn errno(file: usize, what: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let what = what.into();
        move |errno| Self::Restore {
            file,
            what,
            source: errno.into(),
        }
    }

    pub(super) fn damaged(file: usize, what: impl Into<String>) -> Self {
        Self::Damaged {
            file,
            what: what.into(),
        }
    }
}

/// Why one description cannot be captured.
#[derive(Debug)]
pub(super) enum Refuse {
    /// It is of a kind, or in a state, that is not captured: reason and advice.
    No(String, String),
    /// The kernel did not answer.
    Failed(String, io::Error),
    /// A copy could not be written.
    Save(std::path::PathBuf, io::Error),
}

impl Refuse {
    pub(super) fn no(reason: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::No(reason.into(), advice.into())
    }

    pub(super) fn failed(what: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Failed(what.to_owned(), source)
    }

    pub(super) fn errno(what: &str) -> impl FnOnce(nix::Error) -> Self {
        move |source| Self::Failed(what.to_owned(), source.into())
    }
}
