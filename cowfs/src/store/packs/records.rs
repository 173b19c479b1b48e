//! Keys and values of the index of packed contents, a tree of its own. Integers in keys are big-endian, others
//! little-endian.
//!
//! | key | value |
//! |---|---|
//! | 0x21, segment u32, offset u64 | entry: length u32, flags u8 (1: packed), BLAKE3 of the bytes (32) |
//! | 0x22, BLAKE3 (32) | chunk: pack u32, frame's offset u64, frame's bytes u32, offset in the frame u32, length u32 |
//! | 0x23, pack u32, offset u64 | frame: bytes u32, raw bytes u32, chunks u32 |
//!
//! No key has nine bytes, so none looks like that of an inode.

/// First byte of an entry's key.
pub const ENTRY: u8 = 0x21;
/// First byte of a chunk's key.
pub const CHUNK: u8 = 0x22;
/// First byte of a frame's key.
pub const FRAME: u8 = 0x23;
/// Bytes of a chunk at most.
pub const CHUNK_MAX: u32 = 1 << 20;

/// The name that an entry has when what it named was lost with a damaged page of the index. No chunk has it, so that reading
/// there is an error.
pub const UNKNOWN: Name = [0; 32];

/// The name of a chunk: BLAKE3 of its bytes.
pub type Name = [u8; 32];

/// The name of these bytes.
pub fn name_of(bytes: &[u8]) -> Name {
    *blake3::hash(bytes).as_bytes()
}

/// A name as hexadecimal digits.
pub fn hex(name: &Name) -> String {
    blake3::Hash::from_bytes(*name).to_hex().to_string()
}

/// What a range of a logical segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Bytes.
    pub len: u32,
    /// The bytes are in a pack; otherwise they are in the segment's file, and this is only their sum.
    pub packed: bool,
    /// Name of the chunk.
    pub name: Name,
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkAt {
    /// Pack file.
    pub pack: u32,
    /// Offset of its frame there.
    pub frame: u64,
    /// Bytes of the frame there.
    pub frame_bytes: u32,
    /// Offset in the unpacked frame.
    pub off: u32,
    /// Length.
    pub len: u32,
}

/// A frame of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameInfo {
    /// Bytes in the pack.
    pub bytes: u32,
    /// Bytes when unpacked.
    pub raw: u32,
    /// Number of chunks.
    pub chunks: u32,
}

fn place_key(kind: u8, file: u32, off: u64) -> [u8; 13] {
    let mut k = [0; 13];
    k[0] = kind;
    k[1..5].copy_from_slice(&file.to_be_bytes());
    k[5..].copy_from_slice(&off.to_be_bytes());
    k
}

/// Key of an entry.
pub fn entry_key(segment: u32, off: u64) -> [u8; 13] {
    place_key(ENTRY, segment, off)
}

/// Key of a frame.
pub fn frame_key(pack: u32, off: u64) -> [u8; 13] {
    place_key(FRAME, pack, off)
}

/// Key of a chunk.
pub fn chunk_key(name: &Name) -> [u8; 33] {
    let mut k = [0; 33];
    k[0] = CHUNK;
    k[1..].copy_from_slice(name);
    k
}

/// File and offset of the key of an entry or a frame.
pub fn place_of(kind: u8, key: &[u8]) -> Option<(u32, u64)> {
    let k: &[u8; 13] = key.try_into().ok()?;
    let file = u32::from_be_bytes(k[1..5].try_into().ok()?);
    let off = u64::from_be_bytes(k[5..].try_into().ok()?);
    (k[0] == kind).then_some((file, off))
}

/// Name of a chunk's key.
pub fn chunk_name(key: &[u8]) -> Option<Name> {
    let k: &[u8; 33] = key.try_into().ok()?;
    (k[0] == CHUNK).then(|| k[1..].try_into().ok()).flatten()
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

impl Entry {
    /// The record.
    pub fn encode(&self) -> [u8; 37] {
        let mut b = [0; 37];
        b[..4].copy_from_slice(&self.len.to_le_bytes());
        b[4] = u8::from(self.packed);
        b[5..].copy_from_slice(&self.name);
        b
    }

    /// Reads a record; `None` if it is none.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; 37] = b.try_into().ok()?;
        let e = Self {
            len: u32_at(b, 0)?,
            packed: b[4] == 1,
            name: b[5..].try_into().ok()?,
        };
        (b[4] < 2 && (1..=CHUNK_MAX).contains(&e.len)).then_some(e)
    }
}

impl ChunkAt {
    /// The record.
    pub fn encode(&self) -> [u8; 24] {
        let mut b = [0; 24];
        b[..4].copy_from_slice(&self.pack.to_le_bytes());
        b[4..12].copy_from_slice(&self.frame.to_le_bytes());
        b[12..16].copy_from_slice(&self.frame_bytes.to_le_bytes());
        b[16..20].copy_from_slice(&self.off.to_le_bytes());
        b[20..].copy_from_slice(&self.len.to_le_bytes());
        b
    }

    /// Reads a record; `None` if it is none.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; 24] = b.try_into().ok()?;
        Some(Self {
            pack: u32_at(b, 0)?,
            frame: u64::from_le_bytes(b[4..12].try_into().ok()?),
            frame_bytes: u32_at(b, 12)?,
            off: u32_at(b, 16)?,
            len: u32_at(b, 20)?,
        })
    }
}

impl FrameInfo {
    /// The record.
    pub fn encode(&self) -> [u8; 12] {
        let mut b = [0; 12];
        b[..4].copy_from_slice(&self.bytes.to_le_bytes());
        b[4..8].copy_from_slice(&self.raw.to_le_bytes());
        b[8..].copy_from_slice(&self.chunks.to_le_bytes());
        b
    }

    /// Reads a record; `None` if it is none.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; 12] = b.try_into().ok()?;
        Some(Self {
            bytes: u32_at(b, 0)?,
            raw: u32_at(b, 4)?,
            chunks: u32_at(b, 8)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        let e = Entry {
            len: 77,
            packed: true,
            name: [9; 32],
        };
        assert_eq!(Entry::decode(&e.encode()), Some(e));
        let c = ChunkAt {
            pack: 1,
            frame: 1 << 29,
            frame_bytes: 3,
            off: 4,
            len: 5,
        };
        assert_eq!(ChunkAt::decode(&c.encode()), Some(c));
        let f = FrameInfo {
            bytes: 6,
            raw: 7,
            chunks: 8,
        };
        assert_eq!(FrameInfo::decode(&f.encode()), Some(f));
        assert_eq!(place_of(ENTRY, &entry_key(5, 6)), Some((5, 6)));
        assert_eq!(place_of(FRAME, &entry_key(5, 6)), None);
        assert_eq!(chunk_name(&chunk_key(&[3; 32])), Some([3; 32]));
    }

    #[test]
    fn nonsense_is_refused() {
        let mut b = Entry {
            len: 1,
            packed: false,
            name: [0; 32],
        }
        .encode();
        b[4] = 2;
        assert_eq!(Entry::decode(&b), None);
        assert_eq!(Entry::decode(&[0; 37]), None);
        assert_eq!(Entry::decode(&[0; 36]), None);
    }
}
