//! What an image is, of one and of all in a directory.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::bitmap;
use super::chain::chain;
use super::error::{ImageError, Result};
use super::header::{SECTOR, is_cow};
use super::lock::{Use, in_use};
use super::open::{Cow, beginning, regular};
use super::publish::PARTIAL;

/// Base or COW file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A plain disk.
    Base,
    /// A COW file.
    Cow,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Info {
    /// Its path as it was given.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Size of the disk that a guest sees.
    pub size_bytes: u64,
    /// What the file takes of its filesystem.
    pub disk_bytes: u64,
    /// Who has it in use.
    pub in_use: Option<Use>,
    /// Of a COW file.
    pub cow: Option<CowInfo>,
    /// Why no guest takes it, if that is so.
    pub problem: Option<String>,
}

/// What only a COW file has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CowInfo {
    /// Version of the format.
    pub version: u32,
    /// Its base.
    pub base: String,
    /// Time of the base when the COW file was made, seconds.
    pub base_mtime_s: u32,
    /// The file itself, its base, and so on; one that is good has two.
    pub chain: Vec<String>,
    /// Sectors that it holds.
    pub written_sectors: u64,
    /// As bytes.
    pub written_bytes: u64,
    /// Where the bitmap begins.
    pub bitmap_offset: u64,
    /// Where the data begins.
    pub data_offset: u64,
}

/// What an image is. Works on one that is in use. A base that is missing or has changed is no error here, but told.
///
/// # Errors
/// When the file is no image, or its header or bitmap is damaged.
pub fn info(path: &Path) -> Result<Info> {
    let file = regular(path, false)?;
    let meta = file.metadata().map_err(ImageError::io(path, "stat"))?;
    let mut out = Info {
        path: path.display().to_string(),
        kind: Kind::Base,
        size_bytes: meta.len(),
        disk_bytes: meta.blocks() * 512,
        in_use: in_use(path, &file)?,
        cow: None,
        problem: None,
    };
    if !is_cow(&beginning(path, &file)?) {
        return Ok(out);
    }
    let cow = Cow::of(path, file)?;
    let (header, layout) = (cow.header(), cow.layout());
    let mut sectors = 0;
    bitmap::runs(cow.at(), layout, &mut |r| {
        sectors += r.end - r.start;
        Ok(())
    })?;
    out.kind = Kind::Cow;
    out.size_bytes = layout.sectors * SECTOR;
    out.problem = cow.base().err().map(|e| e.in_full());
    out.cow = Some(CowInfo {
        version: 3,
        base: header.base.display().to_string(),
        base_mtime_s: header.mtime,
        chain: chain(path)
            .unwrap_or_default()
            .iter()
            .map(|p| p.display().to_string())
            .collect(),
        written_sectors: sectors,
        written_bytes: sectors * SECTOR,
        bitmap_offset: layout.bitmap_offset,
        data_offset: layout.data_offset,
    });
    Ok(out)
}

/// All images in a directory, by name: COW files, and files whose size could be that of a disk. Digests, names that begin
/// with a dot, and what is no regular file are left out.
///
/// # Errors
/// When the directory cannot be read. A COW file that cannot be read is in the list, with its problem.
pub fn list(dir: &Path) -> Result<Vec<Info>> {
    let failed = ImageError::io(dir, "reading");
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name.ends_with(".b3") || name.ends_with(PARTIAL) {
            continue;
        }
        // What goes away meanwhile is not there.
        let Ok(file) = regular(&path, false) else {
            continue;
        };
        let Ok(meta) = file.metadata() else { continue };
        let cow = beginning(&path, &file).is_ok_and(|b| is_cow(&b));
        if !cow && (meta.len() == 0 || meta.len() % SECTOR != 0) {
            continue;
        }
        drop(file);
        out.push(info(&path).unwrap_or_else(|e| Info {
            path: path.display().to_string(),
            kind: if cow { Kind::Cow } else { Kind::Base },
            size_bytes: 0,
            disk_bytes: meta.blocks() * 512,
            in_use: None,
            cow: None,
            problem: Some(e.in_full()),
        }));
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}
