//! The file `index`: which pages are where. `docs/snapshot.md`, 4.2.

use std::io::Read;
use std::path::Path;

use super::Error;
use super::pageset::{BLOCK, PAGE, PageSet};

/// The version that this program writes.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"UMLINDX\n";
const HEADER: usize = 16;
const ENTRY: usize = 128;
/// More blocks than that do not fit into an address space of 57 bits, nor more slots into a file.
const MOST_BLOCKS: u64 = 1 << 36;
/// An index larger than that (64 TiB of memory) is not read.
const LARGEST: u64 = 4 << 30;

/// Some pages of one block, in one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// An address space or a shared object.
    pub space: u32,
    /// 0 is the snapshot's own `pages`, n that of the manifest's n-th layer.
    pub layer: u32,
    /// Address divided by 2 MiB.
    pub block: u64,
    /// Offset in `pages` divided by 2 MiB.
    pub slot: u64,
    /// Which pages.
    pub pages: PageSet,
    /// blake3 over them, in order.
    pub sum: [u8; 32],
}

impl Entry {
    fn key(&self) -> (u32, u64, u32) {
        (self.space, self.block, self.layer)
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.space.to_le_bytes());
        out.extend(self.layer.to_le_bytes());
        out.extend(self.block.to_le_bytes());
        out.extend(self.slot.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.extend(self.pages.to_bytes());
        out.extend(self.sum);
    }

    fn read(b: &[u8; ENTRY]) -> Result<Self, &'static str> {
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| b[at + i]));
        let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| b[at + i]));
        let entry = Self {
            space: short(0),
            layer: short(4),
            block: long(8),
            slot: long(16),
            pages: PageSet::from_bytes(&std::array::from_fn(|i| b[32 + i])),
            sum: std::array::from_fn(|i| b[96 + i]),
        };
        if long(24) != 0 {
            return Err("has a field that is not zero as it should be");
        }
        if entry.block >= MOST_BLOCKS || entry.slot >= MOST_BLOCKS {
            return Err("names an impossible block or slot");
        }
        if entry.pages.is_empty() {
            return Err("names no page");
        }
        Ok(entry)
    }
}

/// Pages in a row, in the target and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address (or offset in the object) of the first.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Whose `pages`: 0 the snapshot's own, n the n-th layer's.
    pub layer: u32,
    /// Offset there.
    pub offset: u64,
}

/// The whole index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    entries: Vec<Entry>,
}

impl Index {
    /// From entries in any order. Two of one block and layer, or with a page in common, are a mistake of the caller.
    pub fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable_by_key(Entry::key);
        debug_assert!(
            check_order(&entries).is_ok(),
            "two entries hold the same page"
        );
        Self { entries }
    }

    /// Reads and checks `index` of the directory `dir`. Its sum, for the comparison with the manifest, comes with it.
    pub fn open(dir: &Path) -> Result<(Self, blake3::Hash), Error> {
        let path = dir.join("index");
        let file = std::fs::File::open(&path).map_err(Error::io(&path, "open it"))?;
        let len = file
            .metadata()
            .map_err(Error::io(&path, "read its size"))?
            .len();
        if len > LARGEST {
            return Err(Error::Damaged {
                path,
                what: format!("it has {len} bytes, an index has {LARGEST} at most"),
            });
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(LARGEST)
            .read_to_end(&mut bytes)
            .map_err(Error::io(&path, "read it"))?;
        Ok((Self::parse(&bytes, &path)?, blake3::hash(&bytes)))
    }

    /// Parses the bytes of an index; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, Error> {
        let damaged = |what: String| Error::Damaged {
            path: path.into(),
            what,
        };
        let (Some(magic), Some(version), Some(count)) =
            (bytes.get(..8), word(bytes, 8), word(bytes, 12))
        else {
            return Err(damaged(format!(
                "{} bytes are too few for an index",
                bytes.len()
            )));
        };
        if magic != MAGIC {
            return Err(damaged("it does not begin like an index".into()));
        }
        if version > VERSION {
            return Err(Error::Newer {
                path: path.into(),
                found: version,
                known: VERSION,
            });
        }
        let (raw, rest) = bytes[HEADER..].as_chunks::<ENTRY>();
        if version != VERSION || raw.len() as u64 != u64::from(count) || !rest.is_empty() {
            return Err(damaged(format!(
                "it says {count} entries, and its {} bytes are not those",
                bytes.len()
            )));
        }
        let mut entries = Vec::with_capacity(raw.len());
        for (i, raw) in raw.iter().enumerate() {
            entries.push(Entry::read(raw).map_err(|what| damaged(format!("entry {i} {what}")))?);
        }
        check_order(&entries).map_err(|(i, what)| damaged(format!("entry {i} {what}")))?;
        Ok(Self { entries })
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + ENTRY * self.entries.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.entries.len() as u32).to_le_bytes());
        self.entries.iter().for_each(|e| e.write(&mut out));
        out
    }

    /// Writes `index` into `dir`, and gives its sum for the manifest.
    pub fn write(&self, dir: &Path) -> Result<blake3::Hash, Error> {
        let path = dir.join("index");
        let bytes = self.to_bytes();
        std::fs::write(&path, &bytes).map_err(Error::io(path, "write it"))?;
        Ok(blake3::hash(&bytes))
    }

    /// All entries, by space, block, layer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Those of one block.
    pub fn block(&self, space: u32, block: u64) -> &[Entry] {
        let from = self
            .entries
            .partition_point(|e| (e.space, e.block) < (space, block));
        let n = self.entries[from..].partition_point(|e| (e.space, e.block) == (space, block));
        &self.entries[from..from + n]
    }

    /// Where the page at an address is; none: it is zero, or its file's.
    pub fn page_source(&self, space: u32, address: u64) -> Option<Run> {
        let page = (address % BLOCK) as usize / PAGE;
        let e = self
            .block(space, address / BLOCK)
            .iter()
            .find(|e| e.pages.has(page))?;
        Some(run(e, page..page + 1))
    }

    /// The pages of a block in rows, by rising address within each layer.
    pub fn runs(&self, space: u32, block: u64) -> impl Iterator<Item = Run> + '_ {
        self.block(space, block)
            .iter()
            .flat_map(|e| e.pages.runs().map(move |r| run(e, r)))
    }

    /// The blocks of a space that have pages, each once, by rising number.
    pub fn blocks(&self, space: u32) -> impl Iterator<Item = u64> + '_ {
        let from = self.entries.partition_point(|e| e.space < space);
        let mut last = None;
        self.entries[from..]
            .iter()
            .take_while(move |e| e.space == space)
            .map(|e| e.block)
            .filter(move |b| last.replace(*b) != Some(*b))
    }

    /// How many slots `pages` of a layer must have.
    pub fn slots(&self, layer: u32) -> u64 {
        self.entries
            .iter()
            .filter(|e| e.layer == layer)
            .map(|e| e.slot + 1)
            .max()
            .unwrap_or(0)
    }

    /// How many layers there must be besides the snapshot itself.
    pub fn layers(&self) -> u32 {
        self.entries.iter().map(|e| e.layer).max().unwrap_or(0)
    }
}

fn run(e: &Entry, pages: std::ops::Range<usize>) -> Run {
    let at = (pages.start * PAGE) as u64;
    Run {
        address: e.block * BLOCK + at,
        len: (pages.len() * PAGE) as u64,
        layer: e.layer,
        offset: e.slot * BLOCK + at,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn check_order(entries: &[Entry]) -> Result<(), (usize, &'static str)> {
    let mut seen = PageSet::EMPTY;
    for (i, e) in entries.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| &entries[i]);
        if before.is_some_and(|b| b.key() >= e.key()) {
            return Err((i, "is out of order"));
        }
        if before.is_none_or(|b| (b.space, b.block) != (e.space, e.block)) {
            seen = PageSet::EMPTY;
        }
        if !(seen & e.pages).is_empty() {
            return Err((i, "holds a page that another one holds too"));
        }
        seen |= e.pages;
    }
    Ok(())
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
