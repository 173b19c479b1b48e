//! Taking a base image into a directory of bases.

use std::fs::FileTimes;
use std::path::{Path, PathBuf};

use super::copy::{self, At, CHUNK};
use super::digest;
use super::error::{ImageError, Result};
use super::header::{Header, SECTOR, is_cow};
use super::lock;
use super::open::{beginning, regular};
use super::publish::{Fresh, absolute, not_same};

/// A base that was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Where it is.
    pub path: PathBuf,
    /// Its size: that of the source, filled up to whole sectors.
    pub size_bytes: u64,
    /// Bytes of it that are no holes.
    pub written_bytes: u64,
    /// BLAKE3 of its contents.
    pub digest: String,
}

/// Copies an image into a directory, by the source's name or another. Zeros become holes; the file keeps its time, so that
/// COW files on the source can be put on the copy, and nobody may write to it. Its digest is noted beside it.
///
/// # Errors
/// When the name is taken, or the source is a COW file or empty.
pub fn import(source: &Path, dir: &Path, name: Option<&str>, force: bool) -> Result<Imported> {
    let file = regular(source, false)?;
    if is_cow(&beginning(source, &file)?) {
        return Err(ImageError::IsCow(source.to_owned()));
    }
    lock::shared(source, &file)?;
    let meta = file.metadata().map_err(ImageError::io(source, "stat"))?;
    let size = meta.len().next_multiple_of(SECTOR);
    let target = match name {
        Some(n) => dir.join(n),
        None => dir.join(source.file_name().unwrap_or_default()),
    };
    let full = absolute(&target)?;
    // What no COW file could be made on is not taken in. The time is whatever it is.
    Header::new(&full, size, 0)?;
    not_same(&file, &full)?;
    let fresh = Fresh::new(&full, force)?;
    fresh.set_len(size)?;
    let from = At {
        path: source,
        file: &file,
    };
    let mut buf = vec![0; CHUNK];
    let written = copy::without_zeros(from, fresh.at(), 0..meta.len(), 0, &mut buf)?;
    let modified = meta
        .modified()
        .map_err(ImageError::io(source, "reading its time"))?;
    fresh
        .at()
        .file
        .set_times(FileTimes::new().set_modified(modified))
        .map_err(ImageError::io(&full, "setting its time"))?;
    fresh.mode(0o444)?;
    digest::forget(&full)?;
    fresh.publish(true)?;
    let digest = digest::note(&full)?;
    Ok(Imported {
        path: full,
        size_bytes: size,
        written_bytes: written,
        digest,
    })
}
