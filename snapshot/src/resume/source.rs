//! Where the pages of a snapshot are found.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Pages of a block.
pub const PAGES: u32 = 512;

/// In ranges of more blocks than that, only the blocks that have pages are looked at.
const SPARSE: u64 = 1024;

/// Pages of one block that lie in a row in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First page, counted in the block.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Which file: see [`PageSource::file`].
    pub layer: u32,
    /// Where in the file, bytes.
    pub offset: u64,
}

/// A snapshot's pages.
pub trait PageSource {
    /// The blocks of a space that have any page, by rising number.
    fn blocks(&self, space: u32) -> Vec<u64>;
    /// The pages of one block, by rising number; none twice.
    fn runs(&self, space: u32, block: u64) -> Vec<Run>;
    /// The files with the pages.
    fn files(&self) -> Vec<BorrowedFd<'_>>;
}

/// The pages in `[start, end)`: address, length, run's layer, offset.
pub fn pieces(
    source: &dyn PageSource,
    space: u32,
    start: u64,
    end: u64,
) -> Vec<(u64, u64, u32, u64)> {
    let mut out = Vec::new();
    if start >= end {
        return out;
    }
    let all = start / BLOCK..=(end - 1) / BLOCK;
    // Programs promise themselves terabytes of which they use little.
    let blocks: Vec<u64> = if end - start > SPARSE * BLOCK {
        let there = source.blocks(space).into_iter();
        there.filter(|b| all.contains(b)).collect()
    } else {
        all.collect()
    };
    for block in blocks {
        for r in source.runs(space, block) {
            let a = block * BLOCK + u64::from(r.first) * PAGE;
            let b = a + u64::from(r.count) * PAGE;
            let (from, to) = (a.max(start), b.min(end));
            if from < to {
                out.push((from, to - from, r.layer, r.offset + (from - a)));
            }
        }
    }
    out
}

/// A directory's own `index` and `pages`, without sequels.
#[derive(Debug)]
pub struct Plain {
    entries: Vec<(u32, u64, u64, [u8; 64])>,
    pages: File,
}

impl Plain {
    /// Opens a snapshot's directory.
    pub fn open(dir: &Path) -> std::io::Result<Plain> {
        let index = std::fs::read(dir.join("index"))?;
        let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, "damaged index");
        if index.get(..8) != Some(b"UMLINDX\n") || index.len() % 128 != 16 {
            return Err(bad());
        }
        let mut entries = Vec::with_capacity(index.len() / 128);
        for e in index[16..].chunks_exact(128) {
            let word = |i: usize| u64::from_le_bytes(e[i..i + 8].try_into().unwrap_or_default());
            let space = word(0) as u32;
            if word(0) >> 32 != 0 || word(16) >= 1 << 42 || word(8) >= 1 << 27 {
                return Err(bad());
            }
            let bits = e[32..96].try_into().map_err(|_| bad())?;
            entries.push((space, word(8), word(16), bits));
        }
        entries.sort_unstable_by_key(|e| (e.0, e.1));
        let pages = File::open(dir.join("pages"))?;
        Ok(Plain { entries, pages })
    }
}

impl PageSource for Plain {
    fn blocks(&self, space: u32) -> Vec<u64> {
        let from = self.entries.partition_point(|e| e.0 < space);
        let to = self.entries.partition_point(|e| e.0 <= space);
        self.entries[from..to].iter().map(|e| e.1).collect()
    }

    fn runs(&self, space: u32, block: u64) -> Vec<Run> {
        let Ok(i) = self
            .entries
            .binary_search_by_key(&(space, block), |e| (e.0, e.1))
        else {
            return Vec::new();
        };
        let (_, _, slot, bits) = &self.entries[i];
        let mut runs: Vec<Run> = Vec::new();
        for page in 0..PAGES {
            if bits[page as usize / 8] & (1 << (page % 8)) == 0 {
                continue;
            }
            match runs.last_mut() {
                Some(r) if r.first + r.count == page => r.count += 1,
                _ => runs.push(Run {
                    first: page,
                    count: 1,
                    layer: 0,
                    offset: slot * BLOCK + u64::from(page) * PAGE,
                }),
            }
        }
        runs
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.pages.as_fd()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Pages 3 and 4 of two blocks; counts how often it is asked.
    struct Two(Cell<u64>);

    impl PageSource for Two {
        fn blocks(&self, _: u32) -> Vec<u64> {
            vec![5, 1 << 20]
        }

        fn runs(&self, space: u32, block: u64) -> Vec<Run> {
            self.0.set(self.0.get() + 1);
            let run = Run {
                first: 3,
                count: 2,
                layer: 0,
                offset: 0,
            };
            if self.blocks(space).contains(&block) {
                vec![run]
            } else {
                Vec::new()
            }
        }

        fn files(&self) -> Vec<BorrowedFd<'_>> {
            Vec::new()
        }
    }

    #[test]
    fn terabytes_of_nothing_cost_nothing() {
        let source = Two(Cell::new(0));
        let first = 5 * BLOCK + 3 * PAGE;
        let last = (BLOCK << 20) + 3 * PAGE;
        let found = pieces(&source, 0, 0, 1 << 47);
        assert_eq!(found, [(first, 2 * PAGE, 0, 0), (last, 2 * PAGE, 0, 0)]);
        assert_eq!(source.0.get(), 2);
        // In part, and with each block looked at.
        let found = pieces(&source, 0, first + PAGE, 20 * BLOCK);
        assert_eq!(found, [(first + PAGE, PAGE, 0, PAGE)]);
        assert_eq!(pieces(&source, 0, last + PAGE, 1 << 47).len(), 1);
        assert!(pieces(&source, 0, last + 2 * PAGE, 1 << 47).is_empty());
    }
}
