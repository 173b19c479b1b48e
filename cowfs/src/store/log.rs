//! The redo log: what happened since the last commit, in order, in chunks that are whole or absent.
//!
//! Two files, `log.0` and `log.1`, are written in turn; a commit switches to the other. A chunk begins at a multiple of
//! 4 KiB, so that writing one never touches a block of a durable one:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `CLG1` |
//! | 4 | 4 | payload bytes |
//! | 8 | 8 | first record number |
//! | 16 | 8 | last record number |
//! | 24 | 16 | checksum of the chunk before (the chain) |
//! | 40 | 16 | blake3 (first 16 bytes) of bytes 0 to 40 and the payload |
//! | 56 | 8 | reserved, 0 |
//! | 64 | | payload: records |
//!
//! A record: length u32 (of what follows), kind u8, then by kind
//!
//! | kind | body |
//! |---|---|
//! | 1 batch | record number u64, generation u64, head u32, then changes: key length u16, value length u16 (0xffff: deleted), key, value |
//! | 2 catalog | record number u64, generation u64, JSON of a [`super::catalog::CatalogOp`] |
//! | 3 data | segment u32, offset u64, bytes: file data that was not yet durable in its segment |
//!
//! The chain makes a stale chunk of an earlier use of the file, or one that follows a torn one, not count.

use std::sync::Arc;

use super::disk::{Disk, DiskFile};
use super::error::StoreError;

/// Bytes of a chunk's header.
const HEADER: usize = 64;
const MAGIC: &[u8; 4] = b"CLG1";
const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// The log grows in steps of this many bytes, written as zeros, so that later chunks overwrite blocks that exist
/// and their sync needs no journal commit of the host filesystem.
const GROW: u64 = 1 << 20;
/// A file that grew beyond this is cut back when it is no longer needed.
const KEEP: u64 = 8 << 20;
/// Bytes that each file has at least.
const ROOM: u64 = 2 << 20;
/// Largest payload that replay accepts.
pub const MAX_PAYLOAD: usize = 256 << 20;

/// Marks a deleted key in a batch.
pub const DELETED: u16 = 0xffff;
/// Record kinds.
pub const BATCH: u8 = 1;
/// A change of the catalog.
pub const CATALOG: u8 = 2;
/// File data.
pub const DATA: u8 = 3;

/// The names of the two files.
pub const FILES: [&str; 2] = ["log.0", "log.1"];

/// The writing end.
#[derive(Debug)]
pub struct Log {
    files: [Arc<dyn DiskFile>; 2],
    written: [u64; 2],
    active: usize,
    pos: u64,
    chain: [u8; 16],
    /// An append failed, but its chunk may be on disk.
    doubt: bool,
}

fn chunk_sum(header: &[u8], payload: &[u8]) -> [u8; 16] {
    let mut h = blake3::Hasher::new();
    h.update(&header[..40]);
    h.update(payload);
    let mut out = [0; 16];
    out.copy_from_slice(&h.finalize().as_bytes()[..16]);
    out
}

impl Log {
    /// Opens both files (made when missing), to write at `pos` of `active`.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(
        disk: &dyn Disk,
        active: usize,
        pos: u64,
        chain: [u8; 16],
    ) -> Result<Self, StoreError> {
        let open = |i: usize| {
            disk.open(FILES[i], true)
                .map_err(StoreError::io(FILES[i], "opening"))
        };
        let files = [open(0)?, open(1)?];
        let mut written = [0; 2];
        for i in 0..2 {
            let io = StoreError::io(FILES[i], "reading");
            written[i] = files[i].len().map_err(io)?;
            // Room from the start, so that a full disk does not stop small syncs. Without it things only fail earlier.
            if written[i] < ROOM
                && let Ok(len) = usize::try_from(ROOM - written[i])
                && files[i].write_at(&vec![0; len], written[i]).is_ok()
            {
                written[i] = ROOM;
            }
        }
        Ok(Self {
            files,
            written,
            active,
            pos,
            chain,
            doubt: false,
        })
    }

    /// Bytes used in the active file.
    pub fn used(&self) -> u64 {
        self.pos
    }

    /// The active file's number.
    pub fn active(&self) -> usize {
        self.active
    }

    /// Checksum of the last chunk.
    pub fn chain(&self) -> [u8; 16] {
        self.chain
    }

    /// Appends one chunk and makes it durable. On an error nothing has happened as far as replay is concerned,
    /// and the same chunk may be tried again.
    ///
    /// # Errors
    /// What the host says; [`StoreError::NoSpace`] also when the chunk is larger than a log may have.
    pub fn append(&mut self, first: u64, last: u64, payload: &[&[u8]]) -> Result<(), StoreError> {
        let name = FILES[self.active];
        let len: usize = payload.iter().map(|p| p.len()).sum();
        let len32 = u32::try_from(len)
            .ok()
            .filter(|_| len <= MAX_PAYLOAD)
            .ok_or(StoreError::NoSpace)?;
        let mut chunk = Vec::with_capacity((HEADER + len).next_multiple_of(BLOCK_BYTES));
        chunk.extend_from_slice(MAGIC);
        chunk.extend_from_slice(&len32.to_le_bytes());
        chunk.extend_from_slice(&first.to_le_bytes());
        chunk.extend_from_slice(&last.to_le_bytes());
        chunk.extend_from_slice(&self.chain);
        chunk.resize(HEADER, 0);
        for p in payload {
            chunk.extend_from_slice(p);
        }
        let sum = chunk_sum(&chunk[..HEADER], &chunk[HEADER..]);
        chunk[40..56].copy_from_slice(&sum);
        // Whole blocks: the host need not read the rest of the last one from its disk first.
        chunk.resize(chunk.len().next_multiple_of(BLOCK_BYTES), 0);
        let end = self.pos + chunk.len() as u64;
        let file = &self.files[self.active];
        if end > self.written[self.active] {
            let from = self.written[self.active];
            let upto = end.next_multiple_of(GROW);
            let zeros = vec![0; usize::try_from(upto - from).unwrap_or(0)];
            file.write_at(&zeros, from)
                .map_err(StoreError::io(name, "growing"))?;
            self.written[self.active] = upto;
        }
        self.doubt = true;
        file.write_at(&chunk, self.pos)
            .map_err(StoreError::io(name, "writing"))?;
        file.sync().map_err(StoreError::sync(name))?;
        self.doubt = false;
        self.pos = end;
        self.chain = sum;
        Ok(())
    }

    /// Goes on in the other file, whose chunks must not be needed any more.
    ///
    /// # Errors
    /// What the host says; the file stays the same then.
    pub fn switch(&mut self) -> Result<(), StoreError> {
        if self.doubt {
            // Replay must not find a chunk here that failed: those in the other file follow the one before.
            let name = FILES[self.active];
            let file = &self.files[self.active];
            file.write_at(&[0; BLOCK as usize], self.pos)
                .map_err(StoreError::io(name, "writing"))?;
            file.sync().map_err(StoreError::sync(name))?;
            self.doubt = false;
        }
        self.trim();
        self.active ^= 1;
        self.pos = 0;
        Ok(())
    }

    /// Cuts the file that is not written to, whose chunks must not be needed any more: one that grew large once need not
    /// stay so. If the host will not shrink it, it only keeps the space.
    pub fn trim(&mut self) {
        let other = self.active ^ 1;
        if self.written[other] > KEEP && self.files[other].set_len(KEEP).is_ok() {
            self.written[other] = KEEP;
        }
    }

    /// Cuts both files to the room that they have from the start, or to what is in use of the active one. The chunks of the
    /// other must not be needed any more. The next busy time makes them grow again, as in a new store.
    pub fn shrink(&mut self) {
        // Of a chunk in doubt, nobody knows whether it is there.
        if self.doubt {
            return;
        }
        for i in 0..2 {
            let used = if i == self.active { self.pos } else { 0 };
            let len = used.max(ROOM);
            if self.written[i] > len && self.files[i].set_len(len).is_ok() {
                self.written[i] = len;
            }
        }
    }
}

/// Where a replay ended.
#[derive(Debug, Clone, Copy)]
pub struct ReplayEnd {
    /// Checksum of the last whole chunk.
    pub chain: [u8; 16],
    /// Last record in it (or what replay began with).
    pub last_seq: u64,
    /// Chunks read.
    pub chunks: u64,
    /// File that the last chunk was in.
    pub file: usize,
    /// Where the next one would be in it.
    pub pos: u64,
    /// Checksum of the last whole chunk in the first file (or what replay began with).
    pub first_chain: [u8; 16],
}

/// What a replay hands each chunk to: the number of its last record, and its payload.
pub type OnChunk<'a> = dyn FnMut(u64, &[u8]) -> Result<(), StoreError> + 'a;

/// Reads the chunks that follow `chain`, first in file `start`, then in the other, and hands the last record number and
/// the payload of each to `f`.
///
/// # Errors
/// Host errors, and whatever `f` returns. A torn or foreign chunk is the end, not an error.
pub fn replay(
    disk: &dyn Disk,
    start: usize,
    chain: [u8; 16],
    last_seq: u64,
    f: &mut OnChunk<'_>,
) -> Result<ReplayEnd, StoreError> {
    let mut end = ReplayEnd {
        chain,
        last_seq,
        chunks: 0,
        file: start,
        pos: 0,
        first_chain: chain,
    };
    for index in [start, start ^ 1] {
        let Ok(file) = disk.open(FILES[index], false) else {
            break;
        };
        let len = file
            .len()
            .map_err(StoreError::io(FILES[index], "reading"))?;
        let mut pos = 0;
        let mut found = false;
        while pos + HEADER as u64 <= len {
            let mut header = [0; HEADER];
            file.read_at(&mut header, pos)
                .map_err(StoreError::io(FILES[index], "reading"))?;
            let Some((payload_len, last)) = check_header(&header, &end, len - pos) else {
                break;
            };
            let mut payload = vec![0; payload_len];
            file.read_at(&mut payload, pos + HEADER as u64)
                .map_err(StoreError::io(FILES[index], "reading"))?;
            if chunk_sum(&header, &payload) != header[40..56] {
                break;
            }
            f(last, &payload)?;
            end.chain.copy_from_slice(&header[40..56]);
            end.last_seq = end.last_seq.max(last);
            end.chunks += 1;
            end.file = index;
            found = true;
            pos += (HEADER as u64 + payload_len as u64).next_multiple_of(BLOCK);
            end.pos = pos;
            if index == start {
                end.first_chain = end.chain;
            }
        }
        // An empty first file may still be followed by nothing only: the second continues the first's chain.
        if !found && index != start {
            break;
        }
    }
    Ok(end)
}

fn check_header(header: &[u8; HEADER], end: &ReplayEnd, room: u64) -> Option<(usize, u64)> {
    let u64_at = |at: usize| {
        let mut v = [0; 8];
        v.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(v)
    };
    let mut len = [0; 4];
    len.copy_from_slice(&header[4..8]);
    let len = usize::try_from(u32::from_le_bytes(len)).ok()?;
    let (first, last) = (u64_at(8), u64_at(16));
    let fits = len <= MAX_PAYLOAD && (HEADER + len) as u64 <= room;
    let follows = header[24..40] == end.chain;
    // A chunk may hold only data (last == first - 1).
    (&header[..4] == MAGIC
        && fits
        && follows
        && last.wrapping_add(1) >= first
        && last < u64::MAX / 2)
        .then_some((len, last))
}

/// A record as replay sees it.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Changes of one head's keys.
    Batch {
        /// Record number.
        seq: u64,
        /// Generation.
        generation: u64,
        /// Head id.
        head: u32,
        /// Encoded changes, for [`changes`].
        changes: &'a [u8],
    },
    /// JSON of a catalog operation.
    Catalog {
        /// Record number.
        seq: u64,
        /// Generation.
        generation: u64,
        /// JSON.
        json: &'a [u8],
    },
    /// File data.
    Data {
        /// Segment number.
        segment: u32,
        /// Offset in it.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
}

fn take<'a>(b: &mut &'a [u8], n: usize) -> Result<&'a [u8], StoreError> {
    if b.len() < n {
        return Err(StoreError::corrupt("log", "a record is cut short"));
    }
    let (head, rest) = b.split_at(n);
    *b = rest;
    Ok(head)
}

fn take_u16(b: &mut &[u8]) -> Result<u16, StoreError> {
    let s = take(b, 2)?;
    Ok(u16::from_le_bytes([s[0], s[1]]))
}

fn take_u32(b: &mut &[u8]) -> Result<u32, StoreError> {
    let s = take(b, 4)?;
    Ok(u32::from_le_bytes([s[0], s[1], s[2], s[3]]))
}

fn take_u64(b: &mut &[u8]) -> Result<u64, StoreError> {
    let mut v = [0; 8];
    v.copy_from_slice(take(b, 8)?);
    Ok(u64::from_le_bytes(v))
}

/// Takes the next record off a payload.
///
/// # Errors
/// Corrupt, when it is not one.
pub fn next_record<'a>(payload: &mut &'a [u8]) -> Result<Option<Record<'a>>, StoreError> {
    if payload.is_empty() {
        return Ok(None);
    }
    let len = take_u32(payload)? as usize;
    let mut body = take(payload, len)?;
    let kind = take(&mut body, 1)?[0];
    Ok(Some(match kind {
        BATCH => Record::Batch {
            seq: take_u64(&mut body)?,
            generation: take_u64(&mut body)?,
            head: take_u32(&mut body)?,
            changes: body,
        },
        CATALOG => Record::Catalog {
            seq: take_u64(&mut body)?,
            generation: take_u64(&mut body)?,
            json: body,
        },
        DATA => Record::Data {
            segment: take_u32(&mut body)?,
            offset: take_u64(&mut body)?,
            bytes: body,
        },
        other => {
            return Err(StoreError::corrupt(
                "log",
                format!("a record of unknown kind {other}"),
            ));
        }
    }))
}

/// One change of a batch: a key and its new value, or `None` when it was deleted.
pub type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// Takes the next change off a batch.
///
/// # Errors
/// Corrupt, when it is not one.
pub fn next_change<'a>(changes: &mut &'a [u8]) -> Result<Option<Change<'a>>, StoreError> {
    if changes.is_empty() {
        return Ok(None);
    }
    let klen = take_u16(changes)? as usize;
    let vlen = take_u16(changes)?;
    if klen == 0 || klen > crate::tree::MAX_KEY {
        return Err(StoreError::corrupt("log", "a key of impossible length"));
    }
    if vlen != DELETED && usize::from(vlen) > crate::tree::MAX_VALUE {
        return Err(StoreError::corrupt("log", "a value of impossible length"));
    }
    let key = take(changes, klen)?;
    Ok(Some(if vlen == DELETED {
        (key, None)
    } else {
        (key, Some(take(changes, vlen as usize)?))
    }))
}

/// Appends one change to a batch under construction.
pub fn push_change(out: &mut Vec<u8>, key: &[u8], value: Option<&[u8]>) {
    let klen = u16::try_from(key.len()).unwrap_or(0);
    let vlen = value.map_or(DELETED, |v| u16::try_from(v.len()).unwrap_or(DELETED));
    out.extend_from_slice(&klen.to_le_bytes());
    out.extend_from_slice(&vlen.to_le_bytes());
    out.extend_from_slice(key);
    if let Some(v) = value {
        out.extend_from_slice(v);
    }
}

/// Appends a data record.
pub fn push_data(out: &mut Vec<u8>, segment: u32, offset: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len() + 13).unwrap_or(0);
    out.extend_from_slice(&len.to_le_bytes());
    out.push(DATA);
    out.extend_from_slice(&segment.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(bytes);
}
