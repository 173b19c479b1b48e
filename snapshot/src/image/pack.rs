//! Packed snapshots: `pages.zst` in the place of `pages`. `docs/snapshot.md`, section 4.5.
//!
//! The pages of each index entry of layer 0 are one zstd frame. A packed snapshot is unpacked, in place, before it is
//! used again.

use super::Error;
use super::index::{Entry, Index};
use super::manifest::Manifest;
use super::pages::{PagesWriter, sum};
use super::pageset::{BLOCK, PageSet};
use super::verify;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// The file's name.
pub const NAME: &str = "pages.zst";
const MAGIC: [u8; 8] = *b"UMLPACK\n";
const VERSION: u32 = 1;

/// What packing has brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packed {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of the packed file.
    pub packed_bytes: u64,
}

/// Whether a snapshot is packed.
#[must_use]
pub fn is_packed(dir: &Path) -> bool {
    dir.join(NAME).exists() && !dir.join("pages").exists()
}

/// Packs the snapshot in `dir`. Every page is checked on the way: damage is not made permanent.
pub fn pack(dir: &Path, manifest: &Manifest, level: i32) -> Result<Packed, Error> {
    let (index, pages) = verify::open(dir, manifest)?;
    let (new, path) = (dir.join("pages.zst.new"), dir.join(NAME));
    let fail = || Error::io(&new, "write it");
    let mut out = BufWriter::new(File::create(&new).map_err(fail())?);
    let own: Vec<&Entry> = index.entries().iter().filter(|e| e.layer == 0).collect();
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(own.len() as u32).to_le_bytes());
    out.write_all(&head).map_err(fail())?;
    let mut packed = Packed::default();
    let mut block = vec![0u8; BLOCK as usize];
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    for e in own {
        pages.check(e, &mut block)?;
        bytes.clear();
        for r in e.pages.byte_runs() {
            bytes.extend_from_slice(&block[r]);
        }
        let frame = zstd::bulk::compress(&bytes, level).map_err(fail())?;
        out.write_all(&(frame.len() as u64).to_le_bytes())
            .map_err(fail())?;
        out.write_all(&frame).map_err(fail())?;
        packed.memory_bytes += bytes.len() as u64;
        packed.packed_bytes += frame.len() as u64 + 8;
    }
    let file = out.into_inner().map_err(|e| fail()(e.into_error()))?;
    file.sync_all().map_err(fail())?;
    crate::fault::point("pack.rename");
    std::fs::rename(&new, &path).map_err(Error::io(&path, "name it"))?;
    sync_directory(dir)?;
    let pages = dir.join("pages");
    std::fs::remove_file(&pages).map_err(Error::io(&pages, "remove it"))?;
    packed.packed_bytes += 16;
    Ok(packed)
}

/// Unpacks the snapshot in `dir`, if it is packed; the index must be its own.
pub fn unpack(dir: &Path, index: &Index) -> Result<bool, Error> {
    if !is_packed(dir) {
        return Ok(false);
    }
    // One that was left half done is made anew.
    let _ = std::fs::remove_file(dir.join("pages.new"));
    let pages = PagesWriter::create_as(dir, "pages.new", index.slots(0))?;
    let mut block = vec![0u8; BLOCK as usize];
    read(dir, index, |e, bytes| {
        scatter(&e.pages, bytes, &mut block);
        if sum(&e.pages, &block) != e.sum {
            return Err(damaged(dir, "a block is not what was packed"));
        }
        pages.write(e.slot, &e.pages, &block)
    })?;
    pages.finish()?;
    pages.sync()?;
    let path = dir.join("pages");
    std::fs::rename(dir.join("pages.new"), &path).map_err(Error::io(&path, "name it"))?;
    sync_directory(dir)?;
    let packed = dir.join(NAME);
    std::fs::remove_file(&packed).map_err(Error::io(&packed, "remove it"))?;
    Ok(true)
}

/// Checks a packed snapshot without unpacking it; gives how many blocks and pages it has.
pub fn check(dir: &Path, index: &Index) -> Result<(u64, u64), Error> {
    let mut block = vec![0u8; BLOCK as usize];
    let mut found = (0, 0);
    read(dir, index, |e, bytes| {
        scatter(&e.pages, bytes, &mut block);
        if sum(&e.pages, &block) != e.sum {
            return Err(damaged(dir, "a block is not what was packed"));
        }
        found.0 += 1;
        found.1 += e.pages.count() as u64;
        Ok(())
    })?;
    Ok(found)
}

fn scatter(set: &PageSet, bytes: &[u8], block: &mut [u8]) {
    let mut at = 0;
    for r in set.byte_runs() {
        let len = r.len();
        block[r].copy_from_slice(&bytes[at..at + len]);
        at += len;
    }
}

/// Calls `each` with the entries and their bytes, which are as many as the entry has pages.
fn read(
    dir: &Path,
    index: &Index,
    mut each: impl FnMut(&Entry, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let path = dir.join(NAME);
    let mut file = BufReader::new(File::open(&path).map_err(Error::io(&path, "open it"))?);
    let mut head = [0u8; 16];
    file.read_exact(&mut head)
        .map_err(Error::io(&path, "read it"))?;
    if head[..8] != MAGIC {
        return Err(damaged(dir, "it does not begin as a packed snapshot"));
    }
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap_or_default());
    if word(8) > VERSION {
        return Err(Error::Newer {
            path,
            found: word(8),
            known: VERSION,
        });
    }
    let own: Vec<&Entry> = index.entries().iter().filter(|e| e.layer == 0).collect();
    if word(12) as usize != own.len() {
        return Err(damaged(
            dir,
            "it has another number of blocks than the index",
        ));
    }
    let mut frame = Vec::new();
    for e in own {
        let mut len = [0u8; 8];
        file.read_exact(&mut len)
            .map_err(Error::io(&path, "read it"))?;
        let len = u64::from_le_bytes(len);
        // Incompressible bytes grow a little.
        if len > BLOCK + (BLOCK >> 4) + 1024 {
            return Err(damaged(dir, "a block is too long"));
        }
        frame.resize(len as usize, 0);
        file.read_exact(&mut frame)
            .map_err(Error::io(&path, "read it"))?;
        let want = e.pages.count() * 4096;
        let bytes = zstd::bulk::decompress(&frame, want)
            .map_err(|e| damaged(dir, &format!("a block does not unpack: {e}")))?;
        if bytes.len() != want {
            return Err(damaged(dir, "a block is too short"));
        }
        each(e, &bytes)?;
    }
    let mut more = [0u8];
    match file.read(&mut more).map_err(Error::io(&path, "read it"))? {
        0 => Ok(()),
        _ => Err(damaged(dir, "it has bytes behind its end")),
    }
}

fn damaged(dir: &Path, what: &str) -> Error {
    let path: PathBuf = dir.join(NAME);
    Error::Damaged {
        path,
        what: what.to_owned(),
    }
}

fn sync_directory(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(Error::io(dir, "sync it"))
}

/// That a reader is not handed a directory whose pages are packed away: unpacks them.
pub fn ensure_unpacked(dir: &Path) -> Result<(), Error> {
    if !is_packed(dir) {
        return Ok(());
    }
    let (index, _) = Index::open(dir)?;
    unpack(dir, &index).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::{Host, Taken};

    /// A snapshot with one block: zeroes, text and noise.
    fn sample(dir: &Path) -> Manifest {
        let pages = PagesWriter::create(dir).unwrap();
        let mut block = vec![0u8; BLOCK as usize];
        let mut x = 1u64;
        for (i, b) in block.iter_mut().enumerate() {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *b = if i < 1 << 20 {
                b"some text "[i % 10]
            } else {
                (x >> 33) as u8
            };
        }
        let set = PageSet::of(3..300);
        let slot = pages.slot();
        pages.write(slot, &set, &block).unwrap();
        pages.finish().unwrap();
        let entry = Entry {
            space: 0,
            layer: 0,
            block: 77,
            slot,
            pages: set,
            sum: sum(&set, &block),
        };
        let index = Index::new(vec![entry]).write(dir).unwrap();
        Manifest {
            taken: Taken::default(),
            host: Host::default(),
            processes: Vec::new(),
            spaces: Vec::new(),
            shared: Vec::new(),
            files: Vec::new(),
            index: index.to_hex().to_string(),
            layers: Vec::new(),
        }
    }

    #[test]
    fn there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let m = sample(dir.path());
        let before = std::fs::read(dir.path().join("pages")).unwrap();
        let packed = pack(dir.path(), &m, 3).unwrap();
        assert!(packed.packed_bytes < packed.memory_bytes);
        assert!(is_packed(dir.path()));
        let (index, _) = Index::open(dir.path()).unwrap();
        assert_eq!(check(dir.path(), &index).unwrap(), (1, 297));
        assert_eq!(verify::verify(dir.path(), &m).unwrap().pages, 297);
        assert!(is_packed(dir.path()));
        verify::open(dir.path(), &m).unwrap();
        assert!(!is_packed(dir.path()));
        assert_eq!(std::fs::read(dir.path().join("pages")).unwrap(), before);
    }

    #[test]
    fn damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let m = sample(dir.path());
        pack(dir.path(), &m, 3).unwrap();
        let (index, _) = Index::open(dir.path()).unwrap();
        let path = dir.path().join(NAME);
        let good = std::fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(good.len() / 97).chain(0..32) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            // zstd's own header has a bit or two that mean nothing: then the pages are what they were, by their sum.
            let header = (24..40).contains(&at);
            assert!(check(dir.path(), &index).is_err() || header, "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert!(unpack(dir.path(), &index).is_err(), "cut at {at}");
            assert!(path.exists());
        }
        std::fs::write(&path, &good).unwrap();
        assert!(unpack(dir.path(), &index).unwrap());
    }
}
