//! What is wrong with a snapshot's files.

use std::io;
use std::path::PathBuf;

/// A snapshot cannot be read, written, or trusted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// {path}: cannot {what}
    #[error("{}: cannot {what}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// {path}: damaged: {what}
    #[error("{}: damaged: {what}; take the snapshot again, or copy it again from where it came", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// {path}: made by a newer version
    #[error("{}: format {found} is newer than {known}, the one this program knows; use a newer umlctl", path.display())]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// {path}: memory is not as it was saved
    #[error(
        "{}: the memory at {:#x} of space {space} is not what was saved; do not resume this snapshot",
        path.display(), block << 21
    )]
    Sum {
        /// The file that holds it.
        path: PathBuf,
        /// Address space.
        space: u32,
        /// Block of it.
        block: u64,
    },
}

impl Error {
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        what: &'static str,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, what, source }
    }
}
