//! What can be wrong with an image. The message names the file and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of images.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host gave an error.
    #[error("{}: {doing} failed", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Neither base nor COW.
    #[error("{} is no regular file; give the path of an image", .0.display())]
    NotRegular(PathBuf),
    /// A COW file was wanted.
    #[error("{} is no COW file; make one on it with 'cowfs image create COW {}'", .0.display(), .0.display())]
    NotCow(PathBuf),
    /// A base was wanted.
    #[error(
        "{} is itself a COW file, and a guest would take its bytes for a disk; make a base of it with \
         'cowfs image merge {} NEWBASE'", .0.display(), .0.display()
    )]
    IsCow(PathBuf),
    /// Another version of the format.
    #[error(
        "{}: COW format version {found}, and only version 3 is known here; uml_moo reads versions 1 and 2: make a base of it \
         with 'uml_moo {} NEWBASE'", path.display(), path.display()
    )]
    Version {
        /// File.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Version 3 as 64-bit programs wrote it before 2006.
    #[error(
        "{}: a version-3 header with the padding that 64-bit programs wrote before 2006; make a base of it with \
         'uml_moo {} NEWBASE'", .0.display(), .0.display()
    )]
    OldLayout(PathBuf),
    /// A field that no version-3 file has.
    #[error("{}: {what}; the file is damaged or not made for User Mode Linux: restore it from a copy", path.display())]
    Field {
        /// File.
        path: PathBuf,
        /// Field and value.
        what: String,
    },
    /// The file ends too early.
    #[error(
        "{}: {what} ends at byte {need}, the file at {have}; it was cut short: restore it from a copy", path.display()
    )]
    Truncated {
        /// File.
        path: PathBuf,
        /// What is not whole.
        what: String,
        /// Where that ends.
        need: u64,
        /// Where the file ends.
        have: u64,
    },
    /// The base cannot be opened.
    #[error(
        "{}: its base {} cannot be opened; bring it back, or if it has moved say where it is: \
         'cowfs image rebase --unchecked {} BASE'", cow.display(), base.display(), cow.display()
    )]
    BaseMissing {
        /// COW file.
        cow: PathBuf,
        /// Base that its header names.
        base: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The base has changed under the COW file.
    #[error(
        "{}: its base {} has changed since: {what}; restore the base, or if only its time has changed \
         'cowfs image rebase --unchecked {} {}'", cow.display(), base.display(), cow.display(), base.display()
    )]
    BaseChanged {
        /// COW file.
        cow: PathBuf,
        /// Base.
        base: PathBuf,
        /// What differs.
        what: String,
    },
    /// Backing files that lead back to one of themselves.
    #[error("{}: its backing files form a loop: {links}; give one of them its base back with 'cowfs image rebase --unchecked'", path.display())]
    Loop {
        /// Where it began.
        path: PathBuf,
        /// The files, with arrows.
        links: String,
    },
    /// Too many backing files.
    #[error("{}: more than {max} backing files one under another; merge some with 'cowfs image merge'", path.display())]
    TooDeep {
        /// Where it began.
        path: PathBuf,
        /// How many are followed.
        max: usize,
    },
    /// There is something already.
    #[error("{} is there already; take another name, or --force to replace it", .0.display())]
    Exists(PathBuf),
    /// Source and target are one file.
    #[error("{} would be written from itself; take another name, or for a merge into the base --in-place", .0.display())]
    Same(PathBuf),
    /// A guest has it.
    #[error(
        "{} is in use by {by}; stop that guest, or freeze it and work on a copy made with 'cowfs image duplicate'", path.display()
    )]
    InUse {
        /// File.
        path: PathBuf,
        /// Who holds a lock.
        by: String,
    },
    /// Not a whole number of sectors.
    #[error(
        "{}: its size {size} is not a multiple of 512, and uml_moo would lose the rest; fill it up with 'truncate -s %512 {}'", path.display(), path.display()
    )]
    OddSize {
        /// File.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Nothing in it, or too much for the format.
    #[error("{}: a base of {size} bytes; the format holds 1 to {max}: take another image", path.display())]
    Size {
        /// File.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Most.
        max: u64,
    },
    /// Old and new base have different sizes.
    #[error(
        "{}: made for a base of {want} bytes, and {} has {have}; merge it instead, and resize the result", cow.display(), base.display()
    )]
    SizeDiffers {
        /// COW file.
        cow: PathBuf,
        /// New base.
        base: PathBuf,
        /// Size that the header has.
        want: u64,
        /// Size of the new base.
        have: u64,
    },
    /// A path or a time that a header has no room for.
    #[error("{}: {what}, which a COW header cannot hold; {fix}", path.display())]
    Unfit {
        /// Base.
        path: PathBuf,
        /// What does not fit.
        what: &'static str,
        /// What to do.
        fix: &'static str,
    },
}

impl ImageError {
    /// Wraps a host error.
    pub(super) fn io<'a>(
        path: &'a Path,
        doing: &'static str,
    ) -> impl Fn(io::Error) -> ImageError + use<'a> {
        move |source| ImageError::Io {
            path: path.to_owned(),
            doing,
            source,
        }
    }

    /// Wraps an errno.
    pub(super) fn errno<'a>(
        path: &'a Path,
        doing: &'static str,
    ) -> impl Fn(nix::errno::Errno) -> ImageError + use<'a> {
        move |e| ImageError::io(path, doing)(e.into())
    }

    /// The message with those of its sources.
    pub fn in_full(&self) -> String {
        crate::errors::in_full(self)
    }
}

/// Result of the image verbs.
pub(super) type Result<T> = std::result::Result<T, ImageError>;
