//! What can go wrong in a store.

use std::io;

use crate::tree::TreeError;

/// Errors of the store. `Display` names the file or object and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host gave an error on one of the store's files.
    #[error("{file}: {doing} failed")]
    Io {
        /// File inside the store directory.
        file: String,
        /// What was being done.
        doing: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// No room on the host for what was asked.
    #[error(
        "no space left on the store's disk; free some, or delete checkpoints and run 'cowfs gc'"
    )]
    NoSpace,
    /// A tree page is damaged.
    #[error(
        "meta: {0}; run 'cowfs check', which says what is lost; with --repair --from it gets what another store has"
    )]
    Tree(#[from] TreeError),
    /// A file of the store does not hold what it should.
    #[error(
        "{file}: {what}; run 'cowfs check', which says what is lost; with --repair it puts right what can be"
    )]
    Corrupt {
        /// File inside the store directory.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// Written by a newer cowfs.
    #[error(
        "the store has format version {found}, this cowfs reads up to {known}; use a newer cowfs"
    )]
    Newer {
        /// Version found.
        found: u32,
        /// Newest version this build reads.
        known: u32,
    },
    /// The directory is no store.
    #[error("{0} is not a cowfs store; make one with 'cowfs init'")]
    NoStore(String),
    /// There is something already.
    #[error("{0}")]
    Exists(String),
    /// Another process serves the store.
    #[error(
        "the store is in use by another process; use its mount point, or stop that daemon with 'cowfs unmount'"
    )]
    Locked,
    /// No checkpoint or head of that name.
    #[error("{0}")]
    NotFound(String),
    /// The request cannot be done as asked.
    #[error("{0}")]
    Refused(String),
}

impl StoreError {
    /// Wraps a host error, turning ENOSPC and EDQUOT into [`StoreError::NoSpace`].
    pub fn io(file: &str, doing: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        let file = file.to_owned();
        move |source| match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => StoreError::NoSpace,
            _ => StoreError::Io {
                file,
                doing,
                source,
            },
        }
    }

    /// Wraps an error of a sync. It is never [`StoreError::NoSpace`], which means that nothing was written: after a
    /// failed sync the host may have dropped what was written before, whatever the errno.
    pub fn sync(file: &str) -> impl FnOnce(io::Error) -> StoreError {
        let file = file.to_owned();
        move |source| StoreError::Io {
            file,
            doing: "syncing",
            source,
        }
    }

    /// True if something of the store is not what it should be, or cannot be read.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            StoreError::Tree(_) | StoreError::Corrupt { .. } | StoreError::Io { .. }
        )
    }

    /// A corrupt file.
    pub fn corrupt(file: &str, what: impl Into<String>) -> StoreError {
        StoreError::Corrupt {
            file: file.to_owned(),
            what: what.into(),
        }
    }

    /// The errno a caller of the filesystem gets.
    pub fn errno(&self) -> i32 {
        match self {
            StoreError::NoSpace => libc::ENOSPC,
            StoreError::Io { source, .. } => match source.raw_os_error() {
                Some(e @ (libc::ENOSPC | libc::EDQUOT)) => e,
                _ => libc::EIO,
            },
            _ => libc::EIO,
        }
    }
}
