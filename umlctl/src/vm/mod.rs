//! What a VM is on disk: names, places, configuration, state, the COW disk, the kernel's command line.

pub mod cmdline;
pub mod config;
pub mod disk;
pub mod home;
pub mod initrd;
pub mod name;
pub mod state;

use std::path::{Path, PathBuf};

/// What can be wrong with a VM's files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// {0:?} is no name for a VM
    #[error(
        "{0:?} is no name for a VM: use letters, digits, '.', '_' and '-', at most 63 of them, the first a letter or digit"
    )]
    Name(String),
    /// there is no VM {0}
    #[error("there is no VM {0} in {1}: `umlctl list` shows those there are")]
    NoVm(String, PathBuf),
    /// there is a VM {0} already
    #[error(
        "there is a VM {0} already: choose another name, remove it with `umlctl rm {0}`, or start it again with `umlctl run {0}` without --image"
    )]
    Exists(String),
    /// VM {0} runs
    #[error("VM {0} runs: stop it first, with `umlctl stop {0}` or `umlctl kill {0}`")]
    Running(String),
    /// VM {0} does not run
    #[error("VM {0} does not run (it is {1}): start it with `umlctl run {0}`")]
    NotRunning(String, &'static str),
    /// the image cannot be used
    #[error("the image {path} cannot be used: {why}")]
    Image {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// a path cannot stand on the kernel's command line
    #[error(
        "{0:?} cannot be given to the guest's kernel, whose command line has no quotes: use a path without blanks, commas, colons, quotes and backslashes"
    )]
    Path(PathBuf),
    /// the kernel's command line is too long
    #[error(
        "the kernel's command line has {0} bytes, and {1} are allowed: use shorter paths or fewer --append arguments"
    )]
    CommandLine(usize, usize),
    /// an argument for the kernel that umlctl itself gives
    #[error("--append {0}: umlctl itself sets this argument; {1}")]
    Append(String, &'static str),
    /// memory size out of range
    #[error("--mem {0}: {1}")]
    Memory(String, String),
    /// a file cannot be understood
    #[error("{path} cannot be understood: {why}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// a file was written by a newer umlctl
    #[error(
        "{path} has version {found}, and this umlctl knows {known}: use the umlctl that made it"
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// a file operation failed
    #[error("cannot {what} {path}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// For `map_err`: an I/O error with its path.
pub(crate) fn io<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |source| Error::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
