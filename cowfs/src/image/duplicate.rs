//! A second COW file with the same contents, also of one that a guest uses.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::copy;
use super::error::{ImageError, Result};
use super::header::is_cow;
use super::open::{Cow, beginning, regular};
use super::publish::{Fresh, not_same};

/// How to duplicate.
#[derive(Debug, Clone, Copy)]
pub struct DuplicateOptions {
    /// Replace what has the name already.
    pub force: bool,
    /// Return only when the copy is on disk. Without it a power cut may take the copy away again, or leave it with
    /// holes: for callers who sync later, when the guest goes on.
    pub sync: bool,
}

impl Default for DuplicateOptions {
    fn default() -> Self {
        Self {
            force: false,
            sync: true,
        }
    }
}

/// What a duplication did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Duplicate {
    /// The filesystem shares the blocks of both: the time does not depend on how much is in them.
    pub shared: bool,
    /// Bytes copied.
    pub copied_bytes: u64,
    /// Size of the file.
    pub size_bytes: u64,
}

/// Duplicates an image. A guest may have it in use, but must not write to it meanwhile: freeze it before.
///
/// # Errors
/// When there is something of that name, or the source is a COW file with a header that is not good.
pub fn duplicate(from: &Path, to: &Path) -> Result<Duplicate> {
    duplicate_with(from, to, DuplicateOptions::default())
}

/// As [`duplicate`], with options.
///
/// # Errors
/// As of [`duplicate`].
pub fn duplicate_with(from: &Path, to: &Path, options: DuplicateOptions) -> Result<Duplicate> {
    open_duplicate(from, regular(from, false)?, to, options)
}

/// As [`duplicate`], of a file that is open: one that a guest has may have lost its name, and be reached by a descriptor
/// only. Neither the descriptor's offset nor locks are touched.
///
/// # Errors
/// As of [`duplicate`].
pub fn duplicate_file(from: &File, to: &Path) -> Result<Duplicate> {
    duplicate_file_with(from, to, DuplicateOptions::default())
}

/// As [`duplicate_file`], with options.
///
/// # Errors
/// As of [`duplicate`].
pub fn duplicate_file_with(from: &File, to: &Path, options: DuplicateOptions) -> Result<Duplicate> {
    // A description of its own: looking for holes moves the offset, and the guest's must stay.
    let path = PathBuf::from(format!("/proc/self/fd/{}", from.as_raw_fd()));
    open_duplicate(&path, regular(&path, false)?, to, options)
}

fn open_duplicate(
    name: &Path,
    source: File,
    to: &Path,
    options: DuplicateOptions,
) -> Result<Duplicate> {
    // What no guest would take is not worth a copy. The base may have changed; the copy says so as well as the original.
    let source = if is_cow(&beginning(name, &source)?) {
        Cow::of(name, source)?
            .file()
            .try_clone()
            .map_err(ImageError::io(name, "opening"))?
    } else {
        source
    };
    not_same(&source, to)?;
    let meta = source.metadata().map_err(ImageError::io(name, "stat"))?;
    let fresh = Fresh::new(to, options.force)?;
    let from = copy::At {
        path: name,
        file: &source,
    };
    let done = copy::whole(from, fresh.at())?;
    fresh.like(&meta)?;
    fresh.publish(options.sync)?;
    Ok(Duplicate {
        shared: done.shared,
        copied_bytes: done.bytes,
        size_bytes: meta.len(),
    })
}
