//! Copying between files: shared where the filesystem can, else only what is no hole.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek};

use super::error::{ImageError, Result};
use super::sys;
use crate::mountinfo;

/// Bytes read at once.
pub(super) const CHUNK: usize = 1 << 20;
/// What becomes a hole when it is all zeros, if it lies at a multiple of it.
const BLOCK: u64 = 4096;

/// An open file and its name for messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct At<'a> {
    pub path: &'a Path,
    pub file: &'a File,
}

/// What a copy did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Copied {
    /// Nothing was copied: both files have the same blocks.
    pub shared: bool,
    /// Bytes copied.
    pub bytes: u64,
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::Error::from(Errno::EFBIG))?;
    match lseek(file.as_fd(), from, whence) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Where the next data begins, if there is any. A filesystem that does not know its holes has none.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, from, Whence::SeekData) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Some(from)),
        r => r,
    }
}

/// Calls for each range of data.
pub(super) fn data_ranges(
    from: At<'_>,
    range: Range<u64>,
    each: &mut dyn FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let seeking = ImageError::io(from.path, "looking for data");
    let mut at = range.start;
    while at < range.end {
        let Some(start) = next_data(from.file, at).map_err(&seeking)? else {
            return Ok(());
        };
        if start >= range.end {
            return Ok(());
        }
        let end = match seek(from.file, start, Whence::SeekHole) {
            Ok(Some(end)) if end > start => end.min(range.end),
            Ok(_) => range.end,
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => range.end,
            Err(e) => return Err(seeking(e)),
        };
        each(start..end)?;
        at = end;
    }
    Ok(())
}

/// Fills a buffer; what lies behind the end of the file is zeros.
pub(super) fn read_padded(from: At<'_>, mut offset: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match from.file.read_at(&mut buf[done..], offset) {
            Ok(0) => break,
            Ok(n) => {
                done += n;
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ImageError::io(from.path, "reading")(e)),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

/// Length of the next piece of at most `CHUNK` bytes that ends at a multiple of it, where there is one.
pub(super) fn step(at: u64, end: u64) -> usize {
    let chunk = CHUNK as u64;
    // Never more than CHUNK, which is a usize.
    usize::try_from((end - at).min(chunk - at % chunk)).unwrap_or(CHUNK)
}

/// Copies a range to the same or another place; the kernel does it where it can, and may share blocks. False if it could not
/// and the bytes went through here.
fn kernel(from: At<'_>, to: At<'_>, range: Range<u64>, place: u64) -> Result<bool> {
    let (mut at, mut out) = (range.start, place);
    while at < range.end {
        // Of cowfs one call shares at most 1 GiB, and no call may ask for more than there is.
        let n = usize::try_from((range.end - at).min(1 << 30)).unwrap_or(CHUNK);
        let (mut a, mut b) = (offset(at)?, offset(out)?);
        match copy_file_range(from.file, Some(&mut a), to.file, Some(&mut b), n) {
            Ok(n @ 1..) => {
                at += n as u64;
                out += n as u64;
            }
            Err(Errno::EINTR) => {}
            // Some filesystems say 0 where they cannot do it.
            Ok(0) | Err(Errno::EXDEV | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                without_zeros(from, to, at..range.end, out, &mut vec![0; CHUNK])?;
                return Ok(false);
            }
            Err(e) => return Err(ImageError::errno(to.path, "copying")(e)),
        }
    }
    Ok(true)
}

fn offset(at: u64) -> Result<i64> {
    i64::try_from(at)
        .map_err(|_| ImageError::io(Path::new("an image"), "copying")(Errno::EFBIG.into()))
}

/// Copies the data of a range to a place where there is nothing yet.
pub(super) fn data(from: At<'_>, to: At<'_>, range: Range<u64>, place: u64) -> Result<u64> {
    let start = range.start;
    let mut bytes = 0;
    data_ranges(from, range, &mut |r| {
        bytes += r.end - r.start;
        let out = place + (r.start - start);
        kernel(from, to, r, out).map(drop)
    })?;
    Ok(bytes)
}

/// Copies a range to a place where there is nothing yet, and leaves blocks of zeros out. Returns what was written.
pub(super) fn without_zeros(
    from: At<'_>,
    to: At<'_>,
    range: Range<u64>,
    place: u64,
    buf: &mut [u8],
) -> Result<u64> {
    let start = range.start;
    let mut written = 0;
    data_ranges(from, range, &mut |r| {
        let mut at = r.start;
        while at < r.end {
            let out = place + (at - start);
            let n = step(out, out + (r.end - at));
            read_padded(from, at, &mut buf[..n])?;
            written += write_sparse(to, out, &buf[..n])?;
            at += n as u64;
        }
        Ok(())
    })?;
    Ok(written)
}

/// Writes what is not zeros, by blocks of the target.
pub(super) fn write_sparse(to: At<'_>, offset: u64, bytes: &[u8]) -> Result<u64> {
    let mut written = 0;
    let (mut at, mut pending) = (0, 0..0);
    let mut put = |r: Range<usize>| -> Result<()> {
        written += r.len() as u64;
        to.file
            .write_all_at(&bytes[r.clone()], offset + r.start as u64)
            .map_err(ImageError::io(to.path, "writing"))
    };
    while at < bytes.len() {
        let room = BLOCK - (offset + at as u64) % BLOCK;
        let end = bytes
            .len()
            .min(at + usize::try_from(room).unwrap_or(bytes.len()));
        if bytes[at..end].iter().any(|b| *b != 0) {
            if pending.end != at {
                put(std::mem::replace(&mut pending, at..at))?;
            }
            pending.end = end;
        }
        at = end;
    }
    put(pending)?;
    Ok(written)
}

/// Copies a whole file into an empty one.
pub(super) fn whole(from: At<'_>, to: At<'_>) -> Result<Copied> {
    let meta = |a: At<'_>| a.file.metadata().map_err(ImageError::io(a.path, "stat"));
    let (source, target) = (meta(from)?, meta(to)?);
    let len = source.len();
    if sys::reflink(from.file, to.file).is_ok() {
        return Ok(Copied {
            shared: true,
            bytes: 0,
        });
    }
    to.file
        .set_len(len)
        .map_err(ImageError::io(to.path, "setting its size"))?;
    if source.dev() == target.dev() && on_cowfs(to.path) {
        // Holes are shared too, so no question for each of them.
        let shared = kernel(from, to, 0..len, 0)?;
        return Ok(Copied {
            shared,
            bytes: if shared { 0 } else { len },
        });
    }
    let bytes = data(from, to, 0..len, 0)?;
    Ok(Copied {
        shared: false,
        bytes,
    })
}

/// True for a file on a mounted cowfs.
fn on_cowfs(path: &Path) -> bool {
    let (Ok(path), Ok(mounts)) = (path.canonicalize(), mountinfo::of("self")) else {
        return false;
    };
    let over = path
        .ancestors()
        .find_map(|p| mounts.iter().rev().find(|m| m.point == p));
    over.is_some_and(|m| m.cowfs.is_some())
}

/// Writes a range to a stream, holes as zeros.
pub(super) fn stream(
    from: At<'_>,
    range: Range<u64>,
    out: &mut dyn Write,
    buf: &mut [u8],
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let n = step(at, range.end);
        read_padded(from, at, &mut buf[..n])?;
        out.write_all(&buf[..n])
            .map_err(ImageError::io(Path::new("the output"), "writing"))?;
        at += n as u64;
    }
    Ok(())
}
