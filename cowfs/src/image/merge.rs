//! COW file and base in one: a new base, the old base in place, or a plain file or stream for elsewhere.

use std::fs::{File, FileTimes, Metadata};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::bitmap;
use super::copy::{self, At, CHUNK};
use super::error::{ImageError, Result};
use super::header::{SECTOR, is_cow};
use super::open::{Cow, beginning, len, regular};
use super::publish::{Fresh, not_same};
use super::{digest, lock};

/// What a merge made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Size of the result.
    pub size_bytes: u64,
    /// Bytes of it that came from the COW file.
    pub from_cow_bytes: u64,
}

/// Calls for the sectors of the disk in order: true with a run that the COW file has, false with one of the base. Refuses a
/// COW file that ends before its data does.
pub(super) fn pieces(
    cow: &Cow,
    each: &mut dyn FnMut(bool, Range<u64>) -> Result<()>,
) -> Result<()> {
    let layout = cow.layout();
    let have = len(cow.path(), cow.file())?;
    let mut at = 0;
    bitmap::runs(cow.at(), layout, &mut |run| {
        // The last sector need not be whole where the base's is not.
        let need = layout.data_offset + (run.end * SECTOR).min(cow.header().size);
        if need > have {
            return Err(ImageError::Truncated {
                path: cow.path().to_owned(),
                what: format!("sector {}, which the bitmap says is there,", run.end - 1),
                need,
                have,
            });
        }
        if run.start > at {
            each(false, at..run.start)?;
        }
        at = run.end;
        each(true, run)
    })?;
    if at < layout.sectors {
        each(false, at..layout.sectors)?;
    }
    Ok(())
}

pub(super) fn bytes(sectors: &Range<u64>) -> Range<u64> {
    sectors.start * SECTOR..sectors.end * SECTOR
}

/// A COW file that nobody writes to, and its base.
fn quiet(path: &Path) -> Result<(Cow, File)> {
    let cow = Cow::open(path)?;
    let base = cow.base()?;
    lock::shared(path, cow.file())?;
    lock::shared(&cow.header().base, &base)?;
    Ok((cow, base))
}

fn write_merged(cow: &Cow, base: &File, fresh: &Fresh) -> Result<Merged> {
    let layout = cow.layout();
    let size = layout.sectors * SECTOR;
    fresh.set_len(size)?;
    let base = At {
        path: &cow.header().base,
        file: base,
    };
    let mut buf = vec![0; CHUNK];
    let mut taken = 0;
    pieces(cow, &mut |ours, sectors| {
        let range = bytes(&sectors);
        let out = range.start;
        if !ours {
            // What the kernel copies may be shared, but must not reach over the end.
            let end = range.end.min(cow.header().size);
            return copy::data(base, fresh.at(), range.start..end, out).map(drop);
        }
        taken += range.end - range.start;
        let range = layout.data_offset + range.start..layout.data_offset + range.end;
        copy::without_zeros(cow.at(), fresh.at(), range, out, &mut buf).map(drop)
    })?;
    Ok(Merged {
        size_bytes: size,
        from_cow_bytes: taken,
    })
}

/// Makes a new base of a COW file and its base, as `uml_moo COW NEWBASE` does. The two stay as they are.
///
/// # Errors
/// When the two do not belong together or a guest writes to the COW file.
pub fn merge(cow: &Path, to: &Path, force: bool) -> Result<Merged> {
    let (cow, base) = quiet(cow)?;
    not_same(cow.file(), to)?;
    not_same(&base, to)?;
    let fresh = Fresh::new(to, force)?;
    let done = write_merged(&cow, &base, &fresh)?;
    let noted = digest::forget(to)?;
    fresh.publish(true)?;
    if noted {
        digest::note(to)?;
    }
    Ok(done)
}

/// Puts a COW file's sectors into its base, as `uml_moo -d` does, but the base is replaced in one step. After it no COW
/// file on this base is good any more, this one neither.
///
/// # Errors
/// When the two do not belong together or a guest uses either.
pub fn merge_in_place(cow: &Path) -> Result<Merged> {
    let (cow, base) = quiet(cow)?;
    drop(base);
    // Not the link, but what it shows.
    let named = &cow.header().base;
    let path = named
        .canonicalize()
        .map_err(ImageError::io(named, "finding"))?;
    // A lock for writing needs a file that is open for it.
    let base = regular(&path, true)?;
    lock::alone(&path, &base)?;
    // Others may have done this between the two locks.
    cow.base()?;
    let meta = base.metadata().map_err(ImageError::io(&path, "stat"))?;
    let fresh = Fresh::replacing(&path)?;
    let done = write_merged(&cow, &base, &fresh)?;
    fresh.like(&meta)?;
    set_later(&fresh, &meta)?;
    let noted = digest::forget(&path)?;
    fresh.publish(true)?;
    if noted {
        digest::note(&path)?;
    }
    Ok(done)
}

/// Gives the new base a time that no COW file on the old one has: the format knows seconds only.
fn set_later(fresh: &Fresh, old: &Metadata) -> Result<()> {
    let old = UNIX_EPOCH + Duration::from_secs(u64::try_from(old.mtime()).unwrap_or(0) + 1);
    let time = SystemTime::now().max(old);
    let at = fresh.at();
    at.file
        .set_times(FileTimes::new().set_modified(time))
        .map_err(ImageError::io(at.path, "setting its time"))
}

/// Writes what a guest would see of an image, a base or a COW file with its base, to a plain file.
///
/// # Errors
/// As of [`merge`].
pub fn export(image: &Path, to: &Path, force: bool) -> Result<Merged> {
    let file = regular(image, false)?;
    if is_cow(&beginning(image, &file)?) {
        return merge(image, to, force);
    }
    not_same(&file, to)?;
    lock::shared(image, &file)?;
    let fresh = Fresh::new(to, force)?;
    let from = At {
        path: image,
        file: &file,
    };
    let size = len(image, &file)?;
    fresh.set_len(size)?;
    copy::without_zeros(from, fresh.at(), 0..size, 0, &mut vec![0; CHUNK])?;
    fresh.publish(true)?;
    Ok(Merged {
        size_bytes: size,
        from_cow_bytes: 0,
    })
}

/// As [`export`], to a stream.
///
/// # Errors
/// As of [`merge`].
pub fn export_to(image: &Path, out: &mut dyn Write) -> Result<Merged> {
    let file = regular(image, false)?;
    let mut buf = vec![0; CHUNK];
    if !is_cow(&beginning(image, &file)?) {
        lock::shared(image, &file)?;
        let (from, size) = (
            At {
                path: image,
                file: &file,
            },
            len(image, &file)?,
        );
        copy::stream(from, 0..size, out, &mut buf)?;
        return Ok(Merged {
            size_bytes: size,
            from_cow_bytes: 0,
        });
    }
    let (cow, base) = quiet(image)?;
    let base = At {
        path: &cow.header().base,
        file: &base,
    };
    let offset = cow.layout().data_offset;
    let mut taken = 0;
    pieces(&cow, &mut |ours, sectors| {
        let r = bytes(&sectors);
        if !ours {
            return copy::stream(base, r, out, &mut buf);
        }
        taken += r.end - r.start;
        copy::stream(cow.at(), offset + r.start..offset + r.end, out, &mut buf)
    })?;
    Ok(Merged {
        size_bytes: cow.layout().sectors * SECTOR,
        from_cow_bytes: taken,
    })
}
