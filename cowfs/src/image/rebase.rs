//! A COW file on another base.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::bitmap::Writer;
use super::copy::{self, At, CHUNK};
use super::create::header_for;
use super::error::{ImageError, Result};
use super::header::{Header, SECTOR};
use super::lock;
use super::merge::{bytes, pieces};
use super::open::{Cow, regular};
use super::publish::Fresh;

/// What a rebase made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebased {
    /// Bytes that the COW file holds now.
    pub written_bytes: u64,
}

/// A COW file that no guest uses and none can begin to use, with its path without a link at the end.
fn alone(cow: &Path) -> Result<(Cow, PathBuf)> {
    let path = cow.canonicalize().map_err(ImageError::io(cow, "opening"))?;
    let cow = Cow::of(cow, regular(&path, true)?)?;
    lock::alone(cow.path(), cow.file())?;
    Ok((cow, path))
}

fn new_header(cow: &Cow, base: &Path) -> Result<Header> {
    let header = header_for(base)?;
    if header.size != cow.header().size {
        return Err(ImageError::SizeDiffers {
            cow: cow.path().to_owned(),
            base: base.to_owned(),
            want: cow.header().size,
            have: header.size,
        });
    }
    Ok(header)
}

fn write_header(fresh: &Fresh, header: &Header) -> Result<()> {
    let at = fresh.at();
    at.file
        .write_all_at(&header.encode(), 0)
        .map_err(ImageError::io(at.path, "writing"))
}

/// Puts a COW file on another base, so that a guest sees what it saw: sectors in which the bases differ are taken into the
/// COW file, and those that the new base has too are left out of it.
///
/// # Errors
/// When the old base has changed, the new one has another size, or a guest uses the COW file.
pub fn rebase(cow: &Path, base: &Path) -> Result<Rebased> {
    let (cow, path) = alone(cow)?;
    let old = cow.base()?;
    let new = regular(base, false)?;
    lock::shared(&cow.header().base, &old)?;
    lock::shared(base, &new)?;
    let header = new_header(&cow, base)?;
    let layout = header.layout();
    let fresh = Fresh::replacing(&path)?;
    write_header(&fresh, &header)?;
    fresh.set_len(layout.len)?;
    let mut bitmap = Writer::new(fresh.at(), &layout);
    let mut c = Compare {
        new: At {
            path: base,
            file: &new,
        },
        theirs: vec![0; CHUNK],
        ours: vec![0; CHUNK],
    };
    let old = At {
        path: &cow.header().base,
        file: &old,
    };
    let mut written = 0;
    pieces(&cow, &mut |ours, sectors| {
        let (from, shift) = match ours {
            true => (cow.at(), cow.layout().data_offset),
            false => (old, 0),
        };
        c.differing(from, shift, bytes(&sectors), &mut |at, data| {
            fresh
                .at()
                .file
                .write_all_at(data, layout.data_offset + at)
                .map_err(ImageError::io(&path, "writing"))?;
            written += data.len() as u64;
            bitmap.set(at / SECTOR..(at + data.len() as u64) / SECTOR)
        })
    })?;
    bitmap.flush()?;
    finish(fresh, cow.file(), &path)?;
    Ok(Rebased {
        written_bytes: written,
    })
}

/// Compares what a guest sees with the new base.
struct Compare<'a> {
    new: At<'a>,
    theirs: Vec<u8>,
    ours: Vec<u8>,
}

impl Compare<'_> {
    /// Calls for each run of sectors of `from`, which lie `shift` further there, that the new base has not.
    fn differing(
        &mut self,
        from: At<'_>,
        shift: u64,
        range: Range<u64>,
        each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let hole = |at: At<'_>, offset: u64| -> Result<u64> {
            let data = copy::next_data(at.file, offset)
                .map_err(ImageError::io(at.path, "looking for data"))?;
            Ok(data.unwrap_or(u64::MAX))
        };
        let mut at = range.start;
        while at < range.end {
            // Where both have nothing there is nothing to compare.
            let empty = hole(self.new, at)?.min(hole(from, at + shift)?.saturating_sub(shift));
            let empty = empty - empty % SECTOR;
            if empty > at {
                at = empty;
                continue;
            }
            let n = copy::step(at, range.end);
            copy::read_padded(from, at + shift, &mut self.ours[..n])?;
            copy::read_padded(self.new, at, &mut self.theirs[..n])?;
            let sector = SECTOR as usize;
            let mut start = None;
            for s in (0..n).step_by(sector) {
                let differs = self.ours[s..s + sector] != self.theirs[s..s + sector];
                match (differs, start) {
                    (true, None) => start = Some(s),
                    (false, Some(b)) => {
                        each(at + b as u64, &self.ours[b..s])?;
                        start = None;
                    }
                    _ => {}
                }
            }
            if let Some(b) = start {
                each(at + b as u64, &self.ours[b..n])?;
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// Writes another base into a COW file's header and nothing else: the caller vouches that its contents are those of the
/// old one. For a base that was moved, or whose time has changed.
///
/// # Errors
/// When the new base has another size, or a guest uses the COW file.
pub fn rebase_unchecked(cow: &Path, base: &Path) -> Result<()> {
    let (cow, path) = alone(cow)?;
    let mut header = new_header(&cow, base)?;
    // The data stays where it is.
    header.alignment = cow.header().alignment;
    let fresh = Fresh::replacing(&path)?;
    copy::whole(cow.at(), fresh.at())?;
    write_header(&fresh, &header)?;
    finish(fresh, cow.file(), &path)
}

fn finish(fresh: Fresh, old: &File, path: &Path) -> Result<()> {
    fresh.like(&old.metadata().map_err(ImageError::io(path, "stat"))?)?;
    fresh.publish(true)
}
