//! Snapshots in a directory: sums that fit whatever is in the files, so that damage gets past them.

use std::fs;
use std::path::{Path, PathBuf};

use snapshot::image::index::Index;
use snapshot::image::pages::sum;
use snapshot::image::pageset::{BLOCK, PAGE, PageSet};
use snapshot::resume::source::{PageSource, Run};

use crate::Bytes;

/// A directory of the process's own, in memory where there is such a place; it goes with the value.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// A new, empty one.
    pub fn new(name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let dir = root.join(format!("umlctl-fuzz-{name}.{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("room");
        Self(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("room");
        fs::write(path, bytes).expect("room");
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A manifest's bytes: the header with the right length and sum, and a body.
pub fn sealed(magic: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend(1u32.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend((body.len() as u64).to_le_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&out).update(body);
    out.extend(hasher.finalize().as_bytes());
    out.extend(body);
    out
}

/// An index with a right header around raw entries of 128 bytes; what is more is cut off.
pub fn index(entries: &[u8]) -> Vec<u8> {
    let count = entries.len() / 128;
    let mut out = b"UMLINDX\n\x01\0\0\0".to_vec();
    out.extend((count as u32).to_le_bytes());
    out.extend(&entries[..count * 128]);
    out
}

/// The bytes of an entry whose pages are all `fill`, or which has a wrong sum.
pub fn entry(b: &mut Bytes<'_>, fill: u8) -> [u8; 128] {
    let mut out = [0; 128];
    let (space, layer) = (b.u8(), b.u8());
    out[0] = space & 3;
    out[4] = layer & 1;
    out[8] = b.u8() & 7;
    let slot = if layer & 2 == 0 {
        u64::from(b.u8() & 3)
    } else {
        b.u64() >> (b.u8() & 63)
    };
    out[16..24].copy_from_slice(&slot.to_le_bytes());
    let mut pages = PageSet::EMPTY;
    for _ in 0..=layer >> 2 & 1 {
        let first = usize::from(b.u16()) % 512;
        pages.add(first..(first + 1 + usize::from(b.u8()) % 8).min(512));
    }
    out[32..96].copy_from_slice(&pages.to_bytes());
    let block = vec![fill; BLOCK as usize];
    out[96..].copy_from_slice(&sum(&pages, &block));
    if space & 0xf0 == 0xf0 {
        // Any byte of it.
        out[usize::from(b.u8()) % 128] = b.u8();
    }
    out
}

/// What `docs/snapshot.md`, 4.2, says of an index, and that lookups agree with it.
pub fn sound(index: &Index) {
    let keys: Vec<_> = index
        .entries()
        .iter()
        .map(|e| (e.space, e.block, e.layer))
        .collect();
    assert!(keys.is_sorted_by(|a, b| a < b), "sorted, none twice");
    for (i, e) in index.entries().iter().enumerate() {
        assert!(!e.pages.is_empty());
        assert!(e.slot < index.slots(e.layer) && e.layer <= index.layers());
        let others = index.block(e.space, e.block);
        assert!(others.contains(e));
        for o in others.iter().filter(|o| o.layer != e.layer) {
            assert!((o.pages & e.pages).is_empty(), "no page twice");
        }
        let runs: u64 = index.runs(e.space, e.block).map(|r| r.len).sum();
        let pages: usize = others.iter().map(|o| o.pages.count()).sum();
        assert_eq!(runs, (pages * PAGE) as u64);
        if i < 50 {
            for page in e.pages.runs().map(|r| r.start) {
                let at = e.block * BLOCK + (page * PAGE) as u64;
                let found = index.page_source(e.space, at).expect("a page of an entry");
                assert_eq!((found.address, found.layer), (at, e.layer));
            }
        }
    }
}

/// Some pages in the first blocks of every space.
#[derive(Debug, Clone, Copy)]
pub struct Few;

impl PageSource for Few {
    fn blocks(&self, _: u32) -> Vec<u64> {
        (0..4).collect()
    }

    fn runs(&self, _: u32, block: u64) -> Vec<Run> {
        let run = Run {
            first: 1,
            count: 2,
            layer: 0,
            offset: 4096,
        };
        if block < 4 { vec![run] } else { Vec::new() }
    }

    fn files(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        Vec::new()
    }
}
