//! Frames: chunks compressed together, and what it takes to find and check each.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `CPF1` |
//! | 4 | 1 | codec: 0 plain, 1 zstd |
//! | 5 | 3 | 0 |
//! | 8 | 4 | bytes of all chunks |
//! | 12 | 4 | bytes of the payload |
//! | 16 | 4 | number of chunks |
//! | 20 | 12 | 0 |
//! | 32 | 32 | BLAKE3 of bytes 0 to 31 and the table |
//! | 64 | 36 each | table: BLAKE3 of a chunk, its length u32 |
//! | behind | | payload |

use super::records::{CHUNK_MAX, Name, name_of};

/// First bytes.
pub(super) const MAGIC: &[u8; 4] = b"CPF1";
/// Bytes before the table.
pub(super) const HEADER: usize = 64;
const ROW: usize = 36;
/// A frame is closed when it has so many bytes.
pub const RAW_WANTED: usize = 512 << 10;
/// Bytes of all chunks at most.
pub const RAW_MAX: usize = RAW_WANTED + CHUNK_MAX as usize;
/// Chunks at most.
const CHUNKS_MAX: usize = 64 << 10;

/// A chunk of an unpacked frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Name.
    pub name: Name,
    /// Offset in the frame, bytes.
    pub off: usize,
    /// Length, bytes.
    pub len: usize,
    /// The bytes have this name.
    pub good: bool,
}

/// An unpacked frame.
#[derive(Debug)]
pub struct Frame {
    /// All chunks, one behind the other.
    pub raw: Vec<u8>,
    /// The table.
    pub chunks: Vec<Chunk>,
}

impl Frame {
    /// The bytes of a chunk, if they have its name.
    pub fn chunk(&self, name: &Name) -> Option<&[u8]> {
        let c = self.chunks.iter().find(|c| c.name == *name && c.good)?;
        self.raw.get(c.off..c.off + c.len)
    }
}

/// Gathers chunks for a frame.
#[derive(Debug, Default)]
pub struct Builder {
    raw: Vec<u8>,
    chunks: Vec<(Name, u32)>,
}

impl Builder {
    /// Adds a chunk; returns its offset in the frame.
    pub fn add(&mut self, name: Name, bytes: &[u8]) -> u32 {
        let off = u32::try_from(self.raw.len()).unwrap_or(u32::MAX);
        self.raw.extend_from_slice(bytes);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.chunks.push((name, len));
        off
    }

    /// True when it should be closed.
    pub fn is_full(&self) -> bool {
        self.raw.len() >= RAW_WANTED || self.chunks.len() >= CHUNKS_MAX
    }

    /// True when nothing was added.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes of all chunks.
    pub fn raw_len(&self) -> usize {
        self.raw.len()
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.chunks.len()
    }

    /// The frame's bytes; empty again afterwards.
    pub fn close(&mut self, level: i32) -> Vec<u8> {
        let packed = zstd::bulk::compress(&self.raw, level).ok();
        let packed = packed.filter(|p| p.len() < self.raw.len());
        let payload = packed.as_deref().unwrap_or(&self.raw);
        let num = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let mut out = Vec::with_capacity(HEADER + ROW * self.chunks.len() + payload.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[u8::from(packed.is_some()), 0, 0, 0]);
        out.extend_from_slice(&num(self.raw.len()));
        out.extend_from_slice(&num(payload.len()));
        out.extend_from_slice(&num(self.chunks.len()));
        out.resize(HEADER, 0);
        for (name, len) in &self.chunks {
            out.extend_from_slice(name);
            out.extend_from_slice(&len.to_le_bytes());
        }
        let sum = head_sum(&out);
        out[32..HEADER].copy_from_slice(&sum);
        out.extend_from_slice(payload);
        self.raw.clear();
        self.chunks.clear();
        out
    }
}

fn head_sum(head: &[u8]) -> [u8; 32] {
    let mut h = blake3::Hasher::new();
    h.update(&head[..32]);
    h.update(&head[HEADER..]);
    *h.finalize().as_bytes()
}

/// Bytes of a frame, as its header says; nothing if that cannot be one.
pub(super) fn len_of(header: &[u8; HEADER]) -> Option<u64> {
    let number = |at: usize| {
        let bytes = header.get(at..at + 4)?.first_chunk::<4>()?;
        Some(u64::from(u32::from_le_bytes(*bytes)))
    };
    let (stored, count) = (number(12)?, number(16)?);
    header
        .starts_with(MAGIC)
        .then_some(HEADER as u64 + ROW as u64 * count + stored)
}

/// Unpacks a frame. A payload that is damaged leaves chunks that are not good.
///
/// # Errors
/// What is wrong with header or table, in words.
pub fn open(bytes: &[u8]) -> Result<Frame, &'static str> {
    let u32_at = |at: usize| {
        let b = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_le_bytes(b.unwrap_or_default()) as usize
    };
    if bytes.len() < HEADER || &bytes[..4] != MAGIC {
        return Err("there is no frame");
    }
    let (codec, raw, stored, count) = (bytes[4], u32_at(8), u32_at(12), u32_at(16));
    if codec > 1 || raw > RAW_MAX || count > CHUNKS_MAX {
        return Err("a frame has impossible sizes");
    }
    let table = HEADER + ROW * count;
    let Some(head) = bytes.get(..table) else {
        return Err("a frame was cut short");
    };
    if head_sum(head) != bytes[32..HEADER] {
        return Err("a frame's header has a wrong checksum");
    }
    let Some(payload) = bytes.get(table..table + stored) else {
        return Err("a frame was cut short");
    };
    let mut data = match codec {
        0 => payload.to_vec(),
        _ => zstd::bulk::decompress(payload, raw).unwrap_or_default(),
    };
    // What could not be unpacked is not good.
    data.resize(raw, 0);
    let mut chunks = Vec::with_capacity(count);
    let mut off = 0;
    for row in head[HEADER..].chunks_exact(ROW) {
        let (name, len) = row.split_at(32);
        let name: Name = name.try_into().unwrap_or_default();
        let len = u32::from_le_bytes(len.try_into().unwrap_or_default()) as usize;
        let Some(piece) = data.get(off..off + len) else {
            return Err("a frame's table makes no sense");
        };
        chunks.push(Chunk {
            name,
            off,
            len,
            good: name_of(piece) == name,
        });
        off += len;
    }
    Ok(Frame { raw: data, chunks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> (Vec<u8>, Vec<Vec<u8>>) {
        let parts: Vec<Vec<u8>> = (0..9u8).map(|i| vec![i; 5000 + usize::from(i)]).collect();
        let mut b = Builder::default();
        for p in &parts {
            b.add(name_of(p), p);
        }
        (b.close(3), parts)
    }

    #[test]
    fn comes_back() {
        let (bytes, parts) = frame();
        assert!(bytes.len() < 2000);
        let f = open(&bytes).expect("whole");
        for p in &parts {
            assert_eq!(f.chunk(&name_of(p)), Some(&p[..]));
        }
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let (bytes, parts) = frame();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            let Ok(f) = open(&bad) else { continue };
            let wrong = f.chunks.iter().any(|c| !c.good);
            // A bit of zstd's own header may mean nothing.
            let same = parts.iter().all(|p| f.chunk(&name_of(p)) == Some(&p[..]));
            assert!(wrong || same, "{at}");
        }
        for len in 0..bytes.len() {
            if let Ok(f) = open(&bytes[..len]) {
                assert!(f.chunks.iter().any(|c| !c.good), "{len}");
            }
        }
    }
}
