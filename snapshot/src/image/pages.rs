//! The file `pages`: slots of 2 MiB. `docs/snapshot.md`, section 4.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;
use nix::fcntl::{FallocateFlags, fallocate};

use super::Error;
use super::index::{Entry, Index, Run};
use super::pageset::{BLOCK, PAGE, PageSet};

/// `pages` while it is written; several threads may do so.
#[derive(Debug)]
pub struct PagesWriter {
    file: File,
    path: PathBuf,
    slots: AtomicU64,
}

impl PagesWriter {
    /// Makes a new, empty `pages` in `dir`.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        Self::create_as(dir, "pages", 0)
    }

    /// The same under another name, with the first `slots` slots taken.
    pub fn create_as(dir: &Path, name: &str, slots: u64) -> Result<Self, Error> {
        let path = dir.join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io(&path, "create it; it must not exist"))?;
        Ok(Self {
            file,
            path,
            slots: AtomicU64::new(slots),
        })
    }

    /// Takes the next free slot.
    pub fn slot(&self) -> u64 {
        self.slots.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes the pages `set` of `block` (2 MiB of bytes) into a slot.
    pub fn write(&self, slot: u64, set: &PageSet, block: &[u8]) -> Result<(), Error> {
        for r in set.byte_runs() {
            let at = slot * BLOCK + r.start as u64;
            self.file
                .write_all_at(&block[r], at)
                .map_err(Error::io(&self.path, "write memory to it"))?;
        }
        Ok(())
    }

    /// Writes bytes of pages at an offset.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(Error::io(&self.path, "write memory to it"))
    }

    /// Makes the pages `set` of a slot holes again.
    pub fn punch(&self, slot: u64, set: &PageSet) -> Result<(), Error> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for r in set.byte_runs() {
            let at = (slot * BLOCK + r.start as u64) as i64;
            if fallocate(&self.file, how, at, r.len() as i64).is_err() {
                // A file system without holes: zeroes are as good.
                let zeroes = vec![0; r.len()];
                self.file
                    .write_all_at(&zeroes, at as u64)
                    .map_err(Error::io(&self.path, "write zeroes to it"))?;
            }
        }
        Ok(())
    }

    /// Reads the pages `set` of a slot to their places in `block`.
    pub fn read(&self, slot: u64, set: &PageSet, block: &mut [u8]) -> Result<(), Error> {
        read(&self.file, &self.path, slot, set, block)
    }

    /// Gives the file its full size, once all slots are taken.
    pub fn finish(&self) -> Result<(), Error> {
        let len = self.slots.load(Ordering::Relaxed) * BLOCK;
        self.file
            .set_len(len)
            .map_err(Error::io(&self.path, "set its size"))
    }

    /// Brings it to the disk.
    pub fn sync(&self) -> Result<(), Error> {
        self.file
            .sync_data()
            .map_err(Error::io(&self.path, "bring it to the disk"))
    }
}

fn read(file: &File, path: &Path, slot: u64, set: &PageSet, block: &mut [u8]) -> Result<(), Error> {
    for r in set.byte_runs() {
        let at = slot * BLOCK + r.start as u64;
        file.read_exact_at(&mut block[r], at)
            .map_err(Error::io(path, "read memory from it"))?;
    }
    Ok(())
}

/// The `pages` of a snapshot and of its layers, for reading.
#[derive(Debug)]
pub struct PagesReader {
    files: Vec<(PathBuf, File)>,
}

impl PagesReader {
    /// Opens those of `dir` and of its layers (their directories, in the manifest's order), and checks that what the
    /// index names is there.
    pub fn open<'a>(
        dir: &'a Path,
        layers: impl IntoIterator<Item = &'a Path>,
        index: &Index,
    ) -> Result<Self, Error> {
        let mut files = Vec::new();
        for (n, dir) in std::iter::once(dir).chain(layers).enumerate() {
            let path = dir.join("pages");
            let file = File::open(&path).map_err(Error::io(&path, "open it"))?;
            let len = file
                .metadata()
                .map_err(Error::io(&path, "read its size"))?
                .len();
            let wanted = index.slots(n as u32).saturating_mul(BLOCK);
            if len < wanted {
                let what = format!("it has {len} bytes, and the index names {wanted}");
                return Err(Error::Damaged { path, what });
            }
            files.push((path, file));
        }
        if index.layers() as usize >= files.len() {
            let what = format!(
                "it names layer {}, the manifest has {}",
                index.layers(),
                files.len() - 1
            );
            return Err(Error::Damaged {
                path: dir.join("index"),
                what,
            });
        }
        Ok(Self { files })
    }

    /// Reads the pages `set` of a slot of a layer to their places in `block`.
    pub fn read(
        &self,
        layer: u32,
        slot: u64,
        set: &PageSet,
        block: &mut [u8],
    ) -> Result<(), Error> {
        let (path, file) = &self.files[layer as usize];
        read(file, path, slot, set, block)
    }

    /// Checks an entry's sum; `block` is 2 MiB of room.
    pub fn check(&self, e: &Entry, block: &mut [u8]) -> Result<(), Error> {
        self.read(e.layer, e.slot, &e.pages, block)?;
        if sum(&e.pages, block) == e.sum {
            return Ok(());
        }
        Err(Error::Sum {
            path: self.files[e.layer as usize].0.clone(),
            space: e.space,
            block: e.block,
        })
    }

    /// Maps all of them.
    pub fn map(&self) -> Result<MappedPages, Error> {
        let map = |(path, file): &(PathBuf, File)| {
            // An empty file cannot be mapped, and need not be.
            let len = file
                .metadata()
                .map_err(Error::io(path, "read its size"))?
                .len();
            match len {
                0 => Ok(None),
                _ => crate::sys::mapfile::map(file)
                    .map(Some)
                    .map_err(Error::io(path, "map it")),
            }
        };
        Ok(MappedPages {
            maps: self.files.iter().map(map).collect::<Result<_, _>>()?,
        })
    }

    /// The files, the snapshot's own first.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.files.iter().map(|(p, f)| (p.as_path(), f))
    }
}

/// The same, mapped.
#[derive(Debug)]
pub struct MappedPages {
    maps: Vec<Option<Mmap>>,
}

impl MappedPages {
    /// The bytes of a run that the index gave; none if it is not one of this snapshot's.
    pub fn bytes(&self, run: &Run) -> Option<&[u8]> {
        let from = usize::try_from(run.offset).ok()?;
        self.maps
            .get(run.layer as usize)?
            .as_ref()?
            .get(from..from.checked_add(run.len as usize)?)
    }
}

/// blake3 over the pages `set` of a block, in order.
pub fn sum(set: &PageSet, block: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for r in set.byte_runs() {
        hasher.update(&block[r]);
    }
    *hasher.finalize().as_bytes()
}

/// Whether a page holds nothing but zeroes.
pub fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<64>();
    words.iter().all(|w| w == &[0; 64]) && rest.iter().all(|&b| b == 0)
}

/// Those of the pages `set` of a block that are not zero.
pub fn not_zero(set: &PageSet, block: &[u8]) -> PageSet {
    let mut out = PageSet::EMPTY;
    for i in set.runs().flatten() {
        if !is_zero(&block[i * PAGE..(i + 1) * PAGE]) {
            out.add(i..i + 1);
        }
    }
    out
}
