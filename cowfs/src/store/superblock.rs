//! The superblock: two 4 KiB slots in `cowfs.store`, written in turn, so that one whole one always exists.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `COWFS\0SB` |
//! | 8 | 4 | format version (1) |
//! | 12 | 4 | reserved, 0 |
//! | 16 | 16 | store uuid |
//! | 32 | 16 | key of the directory hash |
//! | 48 | 8 | commit number; the slot with the higher one counts |
//! | 56 | 8 | generation of the commit: every page on disk that it reaches has a birth of at most this |
//! | 64 | 8 | last log record that the commit holds |
//! | 72 | 4 | log file (0 or 1) that replay begins with |
//! | 76 | 4 | next data segment number |
//! | 80 | 8 | length of `meta`, pages |
//! | 88 | 4 | number of runs of pages that the commit blob has |
//! | 92 | 4 | reserved, 0 |
//! | 96 | 8 | bytes of the commit blob: the catalog, then the page bitmap (8 bytes for each 64 pages of `meta`) |
//! | 104 | 8 | bytes of its first part, the catalog (JSON, at most 256 MiB) |
//! | 112 | 16 | chain value: checksum of the log chunk before the first to replay |
//! | 128 | 32 | blake3 of the commit blob |
//! | 160 | 32 | blake3 of bytes 0 to 160 and 192 to 4096 |
//! | 192 | 16 each | runs, at most 240: first page u64, pages u64. The blob fills them in this order; what is left over belongs to it as well |
//!
//! All numbers are little-endian; the rest of the slot is 0.

use super::disk::DiskFile;
use super::error::StoreError;

/// File name of the superblock; its presence makes a directory a store.
pub const FILE: &str = "cowfs.store";
/// Format version this build writes and the newest it reads.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"COWFS\0SB";
/// Bytes of a slot.
pub const SLOT_BYTES: usize = 4096;
const SLOT: u64 = SLOT_BYTES as u64;
const LEN: usize = 192;
/// Runs of a blob at most.
pub const RUNS_MAX: usize = 240;
/// Bytes of a catalog at most.
pub const CATALOG_MAX: u64 = 256 << 20;
/// Pages of `meta` at most (8 TiB), which bounds what opening a damaged store may allocate.
const PAGES_MAX: u64 = 1 << 31;

/// Pages in a row: the first, and how many.
pub type Run = (u64, u64);

/// Pages in all runs.
pub fn run_pages(runs: &[Run]) -> u64 {
    runs.iter().fold(0, |n, r| n.saturating_add(r.1))
}

/// A decoded superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Store uuid.
    pub uuid: [u8; 16],
    /// Key of the directory hash.
    pub hash_key: [u8; 16],
    /// Commit number.
    pub commit: u64,
    /// Generation of the commit.
    pub generation: u64,
    /// Last log record contained.
    pub last_seq: u64,
    /// Log file that replay begins with.
    pub log: u32,
    /// Next data segment.
    pub next_segment: u32,
    /// Pages in `meta`.
    pub meta_pages: u64,
    /// Pages of the blob.
    pub runs: Vec<Run>,
    /// Bytes of the blob.
    pub blob_len: u64,
    /// Bytes of the catalog in it.
    pub catalog_len: u64,
    /// Chain value of the log.
    pub chain: [u8; 16],
    /// blake3 of the blob.
    pub blob_sum: [u8; 32],
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(v)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

fn array_at<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut v = [0; N];
    v.copy_from_slice(&b[at..at + N]);
    v
}

fn slot_sum(b: &[u8]) -> [u8; 32] {
    let mut h = blake3::Hasher::new();
    h.update(&b[..160]);
    h.update(&b[LEN..SLOT_BYTES]);
    *h.finalize().as_bytes()
}

impl Superblock {
    /// The bytes of a slot.
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(4096);
        b.extend_from_slice(MAGIC);
        b.extend_from_slice(&VERSION.to_le_bytes());
        b.extend_from_slice(&0u32.to_le_bytes());
        b.extend_from_slice(&self.uuid);
        b.extend_from_slice(&self.hash_key);
        b.extend_from_slice(&self.commit.to_le_bytes());
        b.extend_from_slice(&self.generation.to_le_bytes());
        b.extend_from_slice(&self.last_seq.to_le_bytes());
        b.extend_from_slice(&self.log.to_le_bytes());
        b.extend_from_slice(&self.next_segment.to_le_bytes());
        b.extend_from_slice(&self.meta_pages.to_le_bytes());
        b.extend_from_slice(&u32::try_from(self.runs.len()).unwrap_or(0).to_le_bytes());
        b.extend_from_slice(&0u32.to_le_bytes());
        b.extend_from_slice(&self.blob_len.to_le_bytes());
        b.extend_from_slice(&self.catalog_len.to_le_bytes());
        b.extend_from_slice(&self.chain);
        b.extend_from_slice(&self.blob_sum);
        b.resize(LEN, 0);
        for (first, pages) in &self.runs {
            b.extend_from_slice(&first.to_le_bytes());
            b.extend_from_slice(&pages.to_le_bytes());
        }
        b.resize(SLOT_BYTES, 0);
        let sum = slot_sum(&b);
        b[160..LEN].copy_from_slice(&sum);
        b
    }

    /// Decodes a slot: `Ok(None)` if it is blank or torn, an error if it is whole but not for this build.
    ///
    /// # Errors
    /// [`StoreError::Newer`] for a newer format, [`StoreError::Corrupt`] for impossible values under a right checksum.
    pub fn decode(b: &[u8]) -> Result<Option<Self>, StoreError> {
        if b.len() < SLOT_BYTES || &b[..8] != MAGIC {
            return Ok(None);
        }
        let version = u32_at(b, 8);
        if version > VERSION {
            return Err(StoreError::Newer {
                found: version,
                known: VERSION,
            });
        }
        if slot_sum(b) != b[160..LEN] {
            return Ok(None);
        }
        let impossible = || StoreError::corrupt(FILE, "a superblock has impossible values");
        let runs = u32_at(b, 88) as usize;
        if runs > RUNS_MAX {
            return Err(impossible());
        }
        let run = |i: usize| (u64_at(b, LEN + 16 * i), u64_at(b, LEN + 16 * i + 8));
        let sb = Superblock {
            uuid: array_at(b, 16),
            hash_key: array_at(b, 32),
            commit: u64_at(b, 48),
            generation: u64_at(b, 56),
            last_seq: u64_at(b, 64),
            log: u32_at(b, 72),
            next_segment: u32_at(b, 76),
            meta_pages: u64_at(b, 80),
            runs: (0..runs).map(run).collect(),
            blob_len: u64_at(b, 96),
            catalog_len: u64_at(b, 104),
            chain: array_at(b, 112),
            blob_sum: array_at(b, 128),
        };
        let inside = |r: &Run| {
            r.0 > 0 && r.1 > 0 && r.0.checked_add(r.1).is_some_and(|e| e <= sb.meta_pages)
        };
        let map_len = sb.meta_pages.div_ceil(64).saturating_mul(8);
        if version == 0
            || sb.log > 1
            || sb.meta_pages > PAGES_MAX
            || sb.catalog_len > CATALOG_MAX
            || sb.blob_len != sb.catalog_len + map_len
            || !sb.runs.iter().all(inside)
            || sb.blob_len.div_ceil(4096) > run_pages(&sb.runs)
            || run_pages(&sb.runs) > sb.meta_pages
            || sb.generation > u64::MAX / 2
            || sb.last_seq > u64::MAX / 2
            || sb.commit > u64::MAX / 2
        {
            return Err(impossible());
        }
        Ok(Some(sb))
    }

    /// The newest whole superblock of the file.
    ///
    /// # Errors
    /// As [`Superblock::decode`], or corrupt when neither slot is whole.
    pub fn load(file: &dyn DiskFile) -> Result<Self, StoreError> {
        let mut best: Option<Superblock> = None;
        let mut slot = vec![0; 4096];
        let mut problem = None;
        for i in 0..2 {
            file.read_at(&mut slot, i * SLOT)
                .map_err(StoreError::io(FILE, "reading"))?;
            match Self::decode(&slot) {
                Ok(Some(sb)) => {
                    if best.as_ref().is_none_or(|b| b.commit < sb.commit) {
                        best = Some(sb);
                    }
                }
                Ok(None) => {}
                Err(e @ StoreError::Newer { .. }) => return Err(e),
                Err(e) => problem = Some(e),
            }
        }
        match (best, problem) {
            (Some(sb), _) => Ok(sb),
            (None, Some(e)) => Err(e),
            (None, None) => Err(StoreError::corrupt(FILE, "no whole superblock")),
        }
    }

    /// Writes the slot that this commit number falls on and makes it durable.
    ///
    /// # Errors
    /// What the host says.
    pub fn store(&self, file: &dyn DiskFile) -> Result<(), StoreError> {
        file.write_at(&self.encode(), (self.commit % 2) * SLOT)
            .map_err(StoreError::io(FILE, "writing"))?;
        file.sync().map_err(StoreError::sync(FILE))
    }
}
